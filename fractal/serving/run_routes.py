"""The handlers of the routes about runs."""

from __future__ import annotations

import hashlib
from typing import Annotated, Any

from fastapi import Query
from starlette.requests import Request
from starlette.responses import Response

from fractal._json import encode
from fractal.fastapi import CLIENT_HAS_GONE
from fractal.serving.askers import deps_of, owner_of
from fractal.serving.bodies import Bounds, Decision, RunRequest, header, last_event_id, read, request_id
from fractal.serving.problems import Problem
from fractal.serving.record import RunRecord
from fractal.serving.registry import ServedRuns
from fractal.serving.route import json_response, problem_response
from fractal.serving.run import RunAsked, ServedRun
from fractal.serving.sse import RunEvents, gone
from fractal.serving.views import run_json

__all__ = ["RunRoutes"]

_LONGEST_KEY = 255


class RunRoutes:
    """The handlers.

    Args:
        runs: The runs.
        bounds: What of a body is read.
        keep_alive: Seconds of silence after which a stream sends a comment.
    """

    def __init__(self, runs: ServedRuns, bounds: Bounds, keep_alive: float) -> None:
        self._runs, self._bounds, self._keep_alive = runs, bounds, keep_alive

    async def run(self, request: Request) -> Response:
        """Run an agent, and answer when it is done."""
        name, asked = await self._asked(request, is_streamed=False)
        run = await self._runs.begin(name, asked)
        if isinstance(run, RunRecord):
            return _answer(run)
        record = await self._runs.finished(run, lambda: gone(request.receive))
        if record is None:
            raise Problem(CLIENT_HAS_GONE, "client_gone", "the client has gone", run_id=run.id)
        return _answer(record)

    async def stream(self, request: Request) -> Response:
        """Run an agent, and answer with its events as they come; with `Last-Event-ID`, go on with one."""
        if (last := last_event_id(request)) is not None:
            return await self._events(request, *last)
        name, asked = await self._asked(request, is_streamed=True)
        return self._streamed(lambda: self._runs.begin(name, asked))

    async def watch(self, run_id: str, request: Request) -> Response:
        """Watch a run, from its beginning or from the event that `Last-Event-ID` names."""
        last = last_event_id(request, run_id)
        return await self._events(request, run_id, last[1] if last else 0)

    async def one(self, run_id: str, request: Request) -> Response:
        """Tell of a run."""
        found = await self._runs.find(run_id, owner_of(request))
        return json_response(run_json(found.record() if isinstance(found, ServedRun) else found))

    async def end(self, run_id: str, request: Request) -> Response:
        """Cancel a run, and answer when its tasks have ended."""
        found = await self._runs.find(run_id, owner_of(request))
        if isinstance(found, RunRecord):
            return json_response(run_json(found))
        found.cancel("the client cancelled the run")
        await found.ended.wait()
        return json_response(run_json(found.record()))

    async def answer(self, run_id: str, call_id: str, request: Request) -> Response:
        """Allow or deny a tool call that waits for approval."""
        found = await self._runs.find(run_id, owner_of(request))
        decision = await read(Decision, request, self._bounds)
        if isinstance(found, RunRecord):
            raise Problem(409, "run_ended", "the run has ended", run_id=run_id)
        if decision.decision == "deny" and decision.arguments is not None:
            raise Problem(422, "invalid_request", "a call that is denied takes no arguments", run_id=run_id)
        found.approvals.answer(call_id, decision.decision, reason=decision.reason, arguments=decision.arguments)
        return Response(status_code=204)

    async def page(
        self,
        request: Request,
        limit: Annotated[int, Query(ge=1, le=100)] = 20,
        before: Annotated[str | None, Query(max_length=100)] = None,
    ) -> Response:
        """List runs, the newest first."""
        records = await self._runs.page(owner_of(request), _position(before), limit + 1)
        shown = records[:limit]
        following = f"{shown[-1].created_at!r}~{shown[-1].id}" if len(records) > limit else None
        runs = b",".join(run_json(record, brief=True) for record in shown)
        return json_response(b'{"runs":[' + runs + b'],"next":' + encode(following) + b"}")

    async def health(self) -> Response:
        """Say that the service lives."""
        return json_response(encode({"status": "ok", "agents": list(self._runs.agents)}))

    async def ready(self) -> Response:
        """Say whether a run would be taken in now."""
        if not self._runs.is_ready:
            raise Problem(503, "not_ready", "no run is taken in now", retry_after=1)
        return json_response(encode({"status": "ready", "agents": list(self._runs.agents)}))

    # ---- shared

    async def _asked(self, request: Request, *, is_streamed: bool) -> tuple[str | None, RunAsked]:
        key = header(request, b"idempotency-key")
        if key is not None and not (0 < len(key) <= _LONGEST_KEY and key.isprintable()):
            raise Problem(400, "idempotency_key", f"an Idempotency-Key has 1 to {_LONGEST_KEY} printable characters")
        body = await read(RunRequest, request, self._bounds)
        fingerprint = hashlib.sha256(body.model_dump_json().encode()).hexdigest() if key is not None else ""
        asked = RunAsked(
            input=body.input,
            messages=body.messages,
            timeout=body.timeout,
            is_streamed=is_streamed,
            owner=owner_of(request),
            deps=deps_of(request),
            key=key,
            fingerprint=fingerprint,
            request_id=request_id.get(),
        )
        return body.agent, asked

    async def _events(self, request: Request, run_id: str, after: int) -> Response:
        found = await self._runs.find(run_id, owner_of(request))
        if after > found.log.last:
            raise Problem(400, "last_event_id", "Last-Event-ID is no id of an event of this run", run_id=run_id)
        return self._streamed(found, after)

    def _streamed(self, run: Any, after: int = 0) -> Response:
        return RunEvents(self._runs, run, after=after, keep_alive=self._keep_alive)


def _answer(record: RunRecord) -> Response:
    """The answer to whoever has asked for a run that has ended."""
    named = {"X-Run-Id": record.id}
    if record.problem is not None:
        return problem_response(Problem.of_facts(record.problem), named)
    return json_response(run_json(record), named)


def _position(before: str | None) -> tuple[float, str] | None:
    if before is None:
        return None
    created_at, _, run_id = before.partition("~")
    try:
        return float(created_at), run_id
    except ValueError:
        raise Problem(400, "before", "`before` is none of the values that `next` had") from None
