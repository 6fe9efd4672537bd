"""Answers of runs over HTTP for OpenAI's clients: whole or streamed, and ended with the client."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Iterable
from typing import TYPE_CHECKING, Any

import anyio
from starlette.responses import Response

from fractal._json import encode, text_of
from fractal.errors import FractalError, Refused
from fractal.serving._openai.faults import Fault, fault_of
from fractal.serving.problems import Problem
from fractal.serving.route import problem_for
from fractal.serving.sse import STUCK_SECONDS, gone

if TYPE_CHECKING:
    from starlette.types import Receive, Scope, Send

    from fractal.results import AgentResult
    from fractal.serving._openai.asked import Asked
    from fractal.serving._openai.forms import Form
    from fractal.serving.event_log import LoggedEvent
    from fractal.serving.registry import ServedRuns
    from fractal.serving.run import ServedRun

__all__ = ["Answering", "fault_response"]

PATIENCE = 5.0
"""Seconds that the first text may take before the status goes out: an error within them is a status of its own."""

KEEP_ALIVE = 15.0
"""Seconds of silence after which a stream sends a comment, so that nobody on the way takes it for dead."""


def fault_response(fault: Fault) -> Response:
    """The response that tells a fault."""
    return Response(encode(fault.body()), fault.status, dict(fault.headers), "application/json")


class Answering(Response):
    """A response that has a run carried out while it is sent; the run ends when the client goes.

    Args:
        runs: Whose run it is.
        begin: Begins the run; called when there is somebody to carry it out, and not if the response is never sent.
        asked: What the client wants to know.
        form: The form of the answer.
    """

    _run: ServedRun

    def __init__(self, runs: ServedRuns, begin: Callable[[], Awaitable[ServedRun]], asked: Asked, form: Form) -> None:
        super().__init__(headers={"cache-control": "no-store"})
        del self.headers["content-length"]
        if asked.ignored:
            self.headers["x-fractal-ignored"] = ", ".join(asked.ignored)
        self._runs, self._begin, self._asked, self._form = runs, begin, asked, form

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Have the agent run and send what it answers."""
        try:
            self._run = await self._begin()
        except FractalError as error:
            await self._with_headers(fault_response(fault_of(problem_for(error))))(scope, receive, send)
            return
        self.headers["x-run-id"] = self._run.id
        self._form.of_run(self._run.id)
        async with self._runs.attended(self._run, lambda: gone(receive)) as client:
            if self._asked.is_streamed:
                await self._stream(send)
            else:
                await self._run.ended.wait()
        if not self._asked.is_streamed and not client.has_gone:
            await self._whole()(scope, receive, send)

    def _whole(self) -> Response:
        fault, result = _fault_of(self._run), self._run.result
        if fault is not None or result is None:
            return self._with_headers(fault_response(fault or fault_of(Problem(500, "error", "the run failed"))))
        return self._with_headers(Response(encode(self._form.whole(result)), 200, None, "application/json"))

    def _with_headers(self, response: Response) -> Response:
        for name, value in self.headers.items():
            response.headers[name] = value
        return response

    async def _stream(self, send: Send) -> None:
        run, log = self._run, self._run.log
        sending = _Sending(send, self._form, self._with_headers)
        pieces = _Pieces(run.id, is_whole=self._asked.agent.output_type is not None)
        after = 0
        try:
            while not run.is_over or after < log.last:
                has_more = None
                with anyio.move_on_after(KEEP_ALIVE if sending.has_begun else PATIENCE):
                    has_more = await log.wait(after)
                if has_more is None:
                    await sending.keep_alive()
                    continue
                events = log.after(after)
                after = events[-1].number
                await sending.pieces(map(pieces.of, events))
            await self._end(sending, pieces)
        except (TimeoutError, OSError):  # the client does not read, or has gone
            return

    async def _end(self, sending: _Sending, pieces: _Pieces) -> None:
        fault, result = _fault_of(self._run), self._run.result
        if fault is not None or result is None:
            await sending.fail(fault or fault_of(Problem(500, "error", "the run failed")))
        else:
            if not self._asked.tools.calls_in(result, self._run.id):  # what it says else has been streamed
                await sending.pieces([pieces.rest(result)])
            await sending.close(result)


def _fault_of(run: ServedRun) -> Fault | None:
    """The fault of a run that ended without an answer; None if there is one, such as a model's refusal."""
    if run.problem is None or (run.result is not None and isinstance(run.result.exception, Refused)):
        return None
    return fault_of(run.problem)


class _Pieces:
    """The text of a run for one who reads an answer and knows nothing of tools.

    What the model writes beside tool calls is a paragraph of its own. The last paragraph is the answer.

    Args:
        run_id: The run.
        is_whole: Whether the answer is shown when it is checked, in one piece.
    """

    def __init__(self, run_id: str, *, is_whole: bool) -> None:
        self._run_id, self._is_whole = run_id, is_whole
        self._turn, self._has_before = "", False

    def of(self, event: LoggedEvent) -> str:
        """The text that an event adds."""
        if self._is_whole or event.kind not in ("model_requested", "text_delta", "events_skipped"):
            return ""
        data = event.data
        if data["run_id"] != self._run_id:
            return ""
        if event.kind == "text_delta":
            return self._added(data["text"])
        if event.kind == "events_skipped":  # this client is slow: what it has missed of the text is in the event
            return self._continued(data["text"])
        self._begin_reply()
        return ""

    def rest(self, result: AgentResult) -> str:
        """The part of the answer that is missing when the run has ended."""
        if not result.success:
            return ""
        content = text_of(result.content)
        return "" if content.strip() == self._turn.strip() else self._continued(content)

    def _continued(self, text: str) -> str:
        """The missing part of a text; all of it, if it is another than the one that has been sent."""
        if not text.startswith(self._turn):
            self._begin_reply()
        return self._added(text.removeprefix(self._turn))

    def _begin_reply(self) -> None:
        self._has_before, self._turn = self._has_before or bool(self._turn), ""

    def _added(self, text: str) -> str:
        gap = "\n\n" if self._has_before and not self._turn and text else ""
        self._turn += text
        return gap + text


class _Sending:
    """A streamed response: its head goes out with the first text, or when that has taken long.

    Attributes:
        has_begun: Whether the head has gone out.
    """

    def __init__(self, send: Send, form: Form, with_headers: Callable[[Response], Response]) -> None:
        self._to, self._form, self._with_headers = send, form, with_headers
        self.has_begun = False

    async def keep_alive(self) -> None:
        """Say that the run goes on."""
        await self._write(b": the run goes on\n\n")

    async def pieces(self, pieces: Iterable[str]) -> None:
        """Send pieces of text."""
        if text := "".join(pieces):
            await self._write(self._form.piece, text)

    async def close(self, result: AgentResult) -> None:
        """Send the end of an answer."""
        await self._write(self._form.closing, result)
        await self._body(b"", more=False)

    async def fail(self, fault: Fault) -> None:
        """Send why there is no answer: as the status, unless that has gone out."""
        if self.has_begun:
            await self._write(self._form.failing, fault)
            await self._body(b"", more=False)
            return
        response = self._with_headers(fault_response(fault))
        await self._send({"type": "http.response.start", "status": fault.status, "headers": response.raw_headers})
        await self._body(bytes(response.body), more=False)

    async def _write(self, make: bytes | Callable[[Any], bytes], *given: Any) -> None:
        opening = b""
        if not self.has_begun:
            self.has_begun, opening = True, self._form.opening()
            response = self._with_headers(Response(None, 200, {"x-accel-buffering": "no"}, "text/event-stream"))
            del response.headers["content-length"]
            await self._send({"type": "http.response.start", "status": 200, "headers": response.raw_headers})
        await self._body(opening + (make if isinstance(make, bytes) else make(*given)), more=True)

    async def _body(self, body: bytes, *, more: bool) -> None:
        await self._send({"type": "http.response.body", "body": body, "more_body": more})

    async def _send(self, message: Any) -> None:
        with anyio.fail_after(STUCK_SECONDS):
            await self._to(message)
