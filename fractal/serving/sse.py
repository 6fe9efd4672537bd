"""The events of a run as server-sent events, for clients that may be slow, leave and come back."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Any

import anyio
from fastapi.sse import KEEPALIVE_COMMENT, EventSourceResponse
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from fractal.errors import FractalError
from fractal.serving.event_log import EventLog, LoggedEvent
from fractal.serving.problems import PROBLEM_TYPE, Problem
from fractal.serving.record import RunRecord
from fractal.serving.registry import ServedRuns
from fractal.serving.route import problem_for
from fractal.serving.run import ServedRun

__all__ = ["RunEvents", "event_id", "frame", "gone"]

Found = ServedRun | RunRecord

_QUIET = frozenset({"run_started", "model_requested"})
"""Events that every run begins with: what follows says whether it works."""

STUCK_SECONDS = 60.0
"""Seconds that a client may take to read what was written; then it counts as gone."""


def event_id(run_id: str, number: int) -> str:
    """The id of an event on the wire, which `last_event_id` reads."""
    return f"{run_id}.{number}"


def frame(run_id: str, event: LoggedEvent) -> bytes:
    """An event as it is on the wire; its JSON is one line."""
    name = event_id(run_id, event.number)
    return b"event: %b\ndata: %b\nid: %b\n\n" % (event.kind.encode(), event.json, name.encode())


async def gone(receive: Receive) -> None:
    """Return when the client has closed its connection."""
    while (await receive())["type"] != "http.disconnect":
        pass


class RunEvents(Response):
    """A response of a run's events, as they come; the first of them is awaited before the status goes out.

    A run that fails before it has anything to tell is answered with the status of its problem.

    Args:
        runs: Whose run it is.
        run: The run, or the function that begins it: that is called when there is somebody to carry it out.
        after: Number of the last event that the client knows; 0 for all.
        keep_alive: Seconds of silence after which a comment is sent.
    """

    media_type = EventSourceResponse.media_type

    def __init__(
        self,
        runs: ServedRuns,
        run: Found | Callable[[], Awaitable[Found]],
        *,
        after: int = 0,
        keep_alive: float = 15.0,
    ) -> None:
        self._runs, self._run = runs, run
        self._after, self._keep_alive = after, keep_alive
        super().__init__(headers={"Cache-Control": "no-cache", "X-Accel-Buffering": "no"})
        del self.headers["content-length"]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve the events until the run has ended or the client has gone."""
        run, problem = self._run, None
        if callable(run):
            try:
                run = await run()
            except FractalError as error:
                await self._refuse(problem_for(error))(scope, receive, send)
                return
        self.headers["X-Run-Id"] = run.id
        if isinstance(run, RunRecord):
            await self._write(run.log, run.id, send)
            return
        async with self._runs.attended(run, lambda: gone(receive)):
            if callable(self._run):
                problem = await self._first(run)
            if problem is not None:
                await self._refuse(problem)(scope, receive, send)
            else:
                await self._write(run.log, run.id, send)

    def _refuse(self, problem: Problem) -> Response:
        kept = {name: value for name, value in self.headers.items() if name in ("x-request-id", "x-run-id")}
        return Response(problem.json(), problem.status, {**kept, **problem.headers}, PROBLEM_TYPE)

    async def _first(self, run: ServedRun) -> Problem | None:
        """Wait until the run has something to tell; its problem, if that is all."""
        number = 0
        with anyio.move_on_after(self._keep_alive):
            while await run.log.wait(number):
                events = run.log.after(number)
                number = events[-1].number
                if any(event.kind not in _QUIET for event in events):
                    break
            if run.is_over and all(event.kind in {*_QUIET, "run_finished"} for event in run.log.events):
                return run.problem
        return None

    async def _write(self, log: EventLog, run_id: str, send: Send) -> None:
        if not await _sent(send, {"type": "http.response.start", "status": 200, "headers": self.raw_headers}):
            return
        after = self._after
        while True:
            has_more = False
            with anyio.move_on_after(self._keep_alive) as quiet:
                has_more = await log.wait(after)
            if quiet.cancelled_caught:
                piece = KEEPALIVE_COMMENT
            elif has_more:
                events = log.after(after)
                after = events[-1].number
                piece = b"".join(frame(run_id, event) for event in events)
            else:
                break
            if not await _sent(send, {"type": "http.response.body", "body": piece, "more_body": True}):
                return
        await _sent(send, {"type": "http.response.body", "body": b"", "more_body": False})


async def _sent(send: Send, message: Any) -> bool:
    """Send a message; whether the client has taken it in time."""
    with anyio.move_on_after(STUCK_SECONDS) as scope:
        try:
            await send(message)
        except OSError:  # the client has gone
            return False
    return not scope.cancelled_caught
