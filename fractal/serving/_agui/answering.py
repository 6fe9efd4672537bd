"""Runs over HTTP for AG-UI's clients: their events as they come, until the end or until somebody has to approve."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Iterable
from typing import TYPE_CHECKING, Any

import anyio
from ag_ui.core import BaseEvent
from starlette.responses import Response

from fractal.errors import FractalError
from fractal.serving._agui.translating import Translator
from fractal.serving.event_log import EventLog
from fractal.serving.record import RunRecord
from fractal.serving.route import problem_for, problem_response
from fractal.serving.sse import STUCK_SECONDS, gone

if TYPE_CHECKING:
    from starlette.types import Receive, Scope, Send

    from fractal.serving.registry import ServedRuns
    from fractal.serving.run import ServedRun


__all__ = ["AguiEvents", "Begin"]

Begin = Callable[[], Awaitable[tuple["ServedRun | RunRecord", int]]]
"""Begins a run or takes one up, which may have ended; gives the number of the last event that the client knows, too."""

KEEP_ALIVE = 15.0
"""Seconds of silence after which a comment is sent."""

SETTLED = 0.05
"""Seconds without an event after which nothing but approvals is waited for."""


class AguiEvents(Response):
    """A response of a run's events, from where the client has left off.

    It ends, and the run goes on to wait, when nothing is under way but calls that need approval.

    Args:
        runs: Whose run it is.
        begin: Begins the run, or takes one up: gives it, and the number of the last event that the client knows, 0 for
            none. Called when there is somebody to carry it out, and not if the response is never sent.
        thread_id: What the client calls the conversation.
        client_run_id: What it calls this run.
    """

    _translator: Translator
    _after: int

    media_type = "text/event-stream"

    def __init__(self, runs: ServedRuns, begin: Begin, *, thread_id: str, client_run_id: str) -> None:
        super().__init__(headers={"cache-control": "no-store", "x-accel-buffering": "no"})
        del self.headers["content-length"]
        self._runs, self._begin, self._names = runs, begin, (thread_id, client_run_id)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send the events until the run has ended, waits or the client has gone."""
        try:
            run, self._after = await self._begin()
        except FractalError as error:
            refusal = problem_response(problem_for(error))
            refusal.headers.update({name: value for name, value in self.headers.items() if name == "x-request-id"})
            await refusal(scope, receive, send)
            return
        self._translator = Translator(run.id, *self._names, after=self._after)
        self.headers["x-run-id"] = run.id
        if isinstance(run, RunRecord):
            await self._answer(send, run.log, None)
            return
        # Carried out where it outlives this request: it may have to wait for an approval, which is another one.
        run.ends_with_clients = False
        async with self._runs.attended(run, lambda: gone(receive)):
            run.ends_with_clients = self._runs.on_disconnect == "cancel"
            await self._answer(send, run.log, run)

    async def _answer(self, send: Send, log: EventLog, run: ServedRun | None) -> None:
        try:
            await self._send(send, {"type": "http.response.start", "status": 200, "headers": self.raw_headers})
            await self._write(send, log, run)
            await self._send(send, {"type": "http.response.body", "body": b"", "more_body": False})
        except (TimeoutError, OSError):  # the client does not read, or has gone
            return

    async def _write(self, send: Send, log: EventLog, run: ServedRun | None) -> None:
        translator = self._translator
        for event in log.events:
            if event.number <= self._after:
                translator.take(event.data)  # for what is open there
        await self._put(send, translator.opening())
        while True:
            has_more = None
            may_wait = run is not None and bool(run.approvals.pending) and translator.is_idle
            with anyio.move_on_after(SETTLED if may_wait else KEEP_ALIVE):
                has_more = await log.wait(self._after)
            if has_more:
                events = log.after(self._after)
                self._after = events[-1].number
                await self._put(send, (each for event in events for each in translator.take(event.data)))
            elif has_more is False:
                return
            elif run is not None and may_wait and (pending := run.approvals.pending):
                run.ends_with_clients = False
                await self._put(send, translator.interrupted(pending, self._after))
                return
            else:
                await self._send(send, {"type": "http.response.body", "body": b": \n\n", "more_body": True})

    async def _put(self, send: Send, events: Iterable[BaseEvent]) -> None:
        body = b"".join(b"data: " + event.model_dump_json(by_alias=True).encode() + b"\n\n" for event in events)
        if body:
            await self._send(send, {"type": "http.response.body", "body": body, "more_body": True})

    @staticmethod
    async def _send(send: Send, message: Any) -> None:
        with anyio.fail_after(STUCK_SECONDS):
            await send(message)
