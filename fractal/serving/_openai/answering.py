"""Answers of runs over HTTP for OpenAI's clients: whole or streamed, and ended with the client."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Iterable
from typing import TYPE_CHECKING, Any

import anyio
from starlette.responses import Response

from fractal._agent import verbs
from fractal._concurrency.scopes import single_error
from fractal._json import encode, text_of
from fractal._log import log
from fractal.errors import Refused, UserError
from fractal.events import Event, ModelRequested, TextDelta
from fractal.serving._openai.faults import Fault, fault_of
from fractal.streaming import DEFAULT_BUFFER

if TYPE_CHECKING:
    from starlette.types import Receive, Scope, Send

    from fractal.options import RunOptions
    from fractal.results import AgentResult
    from fractal.serving._openai.asked import Asked
    from fractal.serving._openai.forms import Form
    from fractal.streaming import RunStream

__all__ = ["Answering", "fault_response"]

PATIENCE = 5.0
"""Seconds that the first text may take before the status goes out: an error within them is a status of its own."""

KEEP_ALIVE = 15.0
"""Seconds of silence after which a stream sends a comment, so that nobody on the way takes it for dead."""

_IS_BROKEN = Fault(500, "the agent cannot be run as it is", "server_error", None, None, {"x-should-retry": "false"})


def fault_response(fault: Fault, run_id: str = "") -> Response:
    """The response that tells a fault, of a run if there was one."""
    headers = {**fault.headers, **({"x-request-id": run_id} if run_id else {})}
    return Response(encode(fault.body()), fault.status, headers, "application/json")


class Answering(Response):
    """A response that runs an agent while it is sent; the run ends when the client goes.

    Args:
        asked: What the client wants to know.
        form: The form of the answer.
        options: Of the run.
    """

    def __init__(self, asked: Asked, form: Form, options: RunOptions) -> None:
        super().__init__()
        self._asked, self._form = asked, form
        self._options: RunOptions = {**options, "messages": asked.messages}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Run the agent and send what it answers."""

        async def answer() -> None:
            if self._asked.is_streamed:
                await self._streamed(send)
            else:
                await (await self._whole())(scope, receive, send)

        await _while_client_stays(receive, answer)

    async def _whole(self) -> Response:
        try:
            result = await verbs.result_of(self._asked.agent, self._asked.user_input, **self._options)
        except UserError as error:
            return fault_response(_broken(error))
        if not _is_answer(result):
            return fault_response(fault_of(result.exception), result.run_id)
        self._form.of_run(result.run_id)
        return Response(encode(self._form.whole(result)), 200, self._answer_headers(result.run_id), "application/json")

    def _answer_headers(self, run_id: str) -> dict[str, str]:
        headers = {"x-request-id": run_id, "cache-control": "no-store"}
        if self._asked.ignored:
            headers["x-fractal-ignored"] = ", ".join(self._asked.ignored)
        return headers

    async def _streamed(self, send: Send) -> None:
        asked = self._asked
        stream = verbs.open_stream(asked.agent, asked.user_input, DEFAULT_BUFFER, **self._options)
        sending, pieces = _Sending(send, self._form), _Pieces(stream, is_whole=asked.agent.output_type is not None)
        try:
            async with stream:
                self._form.of_run(stream.run_id)
                sending.headers = self._answer_headers(stream.run_id)
                while (events := await _next(stream, sending)) != []:
                    await sending.pieces(map(pieces.of, events or ()))
                result = await stream.result()
        except Exception as error:  # wrong use, or what an agent's own `run` raises
            await sending.fail(_broken(error))
            return
        if _is_answer(result):
            await sending.pieces([pieces.rest(result)])
            await sending.close(result)
        else:
            await sending.fail(fault_of(result.exception))


async def _next(stream: RunStream[Any], sending: _Sending) -> list[Event] | None:
    """The next events of a run, none at its end; None if there was nothing for long, which the client is told."""
    with anyio.move_on_after(KEEP_ALIVE if sending.has_begun else PATIENCE):
        return await stream.take()
    await sending.keep_alive()
    return None


def _broken(error: Exception) -> Fault:
    log.failure("an agent that is served could not be run", error)
    return _IS_BROKEN


def _is_answer(result: AgentResult) -> bool:
    return result.success or isinstance(result.exception, Refused)


async def _while_client_stays(receive: Receive, work: Callable[[], Awaitable[None]]) -> None:
    """Do some work, and cancel it as soon as the client closes its connection."""

    async def watch() -> None:
        while (await receive())["type"] != "http.disconnect":
            pass
        group.cancel_scope.cancel()

    with single_error():
        async with anyio.create_task_group() as group:
            group.start_soon(watch)
            await work()
            group.cancel_scope.cancel()


class _Pieces:
    """The text of a run for one who reads an answer and knows nothing of tools.

    What the model writes beside tool calls is a paragraph of its own. The last paragraph is the answer.

    Args:
        stream: The run.
        is_whole: Whether the answer is shown when it is checked, in one piece.
    """

    def __init__(self, stream: RunStream[Any], *, is_whole: bool) -> None:
        self._stream, self._is_whole = stream, is_whole
        self._turn, self._has_before = "", False

    def of(self, event: Event) -> str:
        """What an event adds to the text."""
        if self._is_whole or not isinstance(event, (ModelRequested, TextDelta)):
            return ""
        if not self._stream.is_own(event.run_id):
            return ""
        if isinstance(event, ModelRequested):
            self._has_before, self._turn = self._has_before or bool(self._turn), ""
            return ""
        return self._added(event.text)

    def rest(self, result: AgentResult) -> str:
        """What is missing of the answer when the run has ended."""
        if not result.success:
            return ""
        content = text_of(result.content)
        if content.startswith(self._turn):
            return self._added(content.removeprefix(self._turn))
        if content.strip() == self._turn.strip():
            return ""
        self._has_before, self._turn = True, ""  # a validator has put something in the place of what was written
        return self._added(content)

    def _added(self, text: str) -> str:
        gap = "\n\n" if self._has_before and not self._turn and text else ""
        self._turn += text
        return gap + text


class _Sending:
    """A streamed response: its head goes out with the first text, or when that has taken long.

    Attributes:
        headers: Headers of the response.
        has_begun: Whether the head has gone out.
    """

    def __init__(self, send: Send, form: Form) -> None:
        self._send, self._form = send, form
        self.headers: dict[str, str] = {}
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
        response = fault_response(fault, self.headers.get("x-request-id", ""))
        await self._send({"type": "http.response.start", "status": fault.status, "headers": response.raw_headers})
        await self._body(bytes(response.body), more=False)

    async def _write(self, make: bytes | Callable[[Any], bytes], *given: Any) -> None:
        opening = b""
        if not self.has_begun:
            self.has_begun, opening = True, self._form.opening()
            response = Response(None, 200, {**self.headers, "x-accel-buffering": "no"}, "text/event-stream")
            head = [each for each in response.raw_headers if each[0] != b"content-length"]
            await self._send({"type": "http.response.start", "status": 200, "headers": head})
        await self._body(opening + (make if isinstance(make, bytes) else make(*given)), more=True)

    async def _body(self, body: bytes, *, more: bool) -> None:
        await self._send({"type": "http.response.body", "body": body, "more_body": more})
