"""HTTP as an `Endpoint` speaks it: requests as they are read from a socket, answers as they are written to it."""

from __future__ import annotations

import json
import time
from collections.abc import Awaitable, Callable
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

import anyio
import anyio.abc
import h11

from fractal._json import is_mapping
from fractal.testing._requests import messages_of, tools_of
from fractal.testing.answers import Answer

__all__ = ["Connection", "ReadyReply", "RecordedRequest", "ready_reply"]


@dataclass(frozen=True, slots=True, kw_only=True)
class RecordedRequest:
    """A request as it arrived.

    Attributes:
        method: "POST" or "GET".
        path: The path, without the query.
        query: What follows the question mark, or "".
        headers: The headers, names in lower case.
        body: The JSON object of the body; empty if the body is none.
        raw: The bytes of the body.
        at: When the request had arrived, on `time.monotonic`.
    """

    method: str
    path: str
    query: str = ""
    headers: dict[str, str] = field(default_factory=dict[str, str])
    body: dict[str, Any] = field(default_factory=dict[str, Any])
    raw: bytes = b""
    at: float = field(default_factory=time.monotonic)

    @property
    def messages(self) -> list[dict[str, Any]]:
        """The messages of the body, the system prompt first; empty if there are none."""
        return messages_of(self.body)

    @property
    def tools(self) -> list[dict[str, Any]]:
        """The tools on offer, as chat-completions schemas; empty if there are none."""
        return tools_of(self.body)


@dataclass(frozen=True, slots=True, kw_only=True)
class ReadyReply:
    """An answer made ready: once there is one, only the connection can fail."""

    head: h11.Response
    pieces: tuple[bytes, ...]
    answer: Answer


class Connection:
    """HTTP/1.1 over one socket."""

    def __init__(self, stream: anyio.abc.SocketStream) -> None:
        self._stream = stream
        self._http = h11.Connection(h11.SERVER)

    async def next_request(self) -> RecordedRequest | None:
        """Read a request; None if the client is gone, speaks no HTTP, or is to be hung up on."""
        states = self._http.our_state, self._http.their_state
        if states == (h11.DONE, h11.DONE):
            self._http.start_next_cycle()
        elif states != (h11.IDLE, h11.IDLE):
            return None
        try:
            return await self._read_request()
        except (anyio.EndOfStream, anyio.BrokenResourceError, h11.RemoteProtocolError):
            return None

    async def _read_request(self) -> RecordedRequest | None:
        head: h11.Request | None = None
        body = bytearray()
        while True:
            event = self._http.next_event()
            if isinstance(event, h11.Request):
                head = event
            elif isinstance(event, h11.Data):
                body += event.data
            elif isinstance(event, h11.EndOfMessage) and head is not None:
                return _recorded(head, bytes(body))
            elif event is h11.NEED_DATA:
                await self._read_more()
            else:
                return None

    async def _read_more(self) -> None:
        if self._http.they_are_waiting_for_100_continue:
            go_on = self._http.send(h11.InformationalResponse(status_code=100, headers=[]))
            await self._stream.send(go_on or b"")
        self._http.receive_data(await self._stream.receive())

    async def unless_gone(self, send: Callable[[], Awaitable[None]]) -> bool:
        """Await `send`, but give up as soon as the client closes; say whether it was completed."""
        sent = False

        async def watch() -> None:
            with suppress(anyio.EndOfStream, anyio.BrokenResourceError):
                while True:  # what arrives early belongs to the next request
                    self._http.receive_data(await self._stream.receive())
            tasks.cancel_scope.cancel()

        async with anyio.create_task_group() as tasks:
            tasks.start_soon(watch)
            with suppress(anyio.BrokenResourceError):
                await send()
                sent = True
            tasks.cancel_scope.cancel()
        return sent

    async def send(self, reply: ReadyReply) -> None:
        """Send a reply, as slowly and as broken as its answer says."""
        answer = reply.answer
        await anyio.sleep(answer.delay)
        if answer.wire == "hang":
            await anyio.sleep_forever()
        if answer.wire == "nothing":
            return
        pending = self._http.send(reply.head) or b""
        for number, piece in enumerate(reply.pieces):
            if number:
                await self._stream.send(pending)
                pending = b""
                await anyio.sleep(answer.chunk_delay)
            pending += self._http.send(h11.Data(data=piece)) or b""
        # The end goes out with the last piece: a client may close as soon as it has read that.
        if answer.wire == "whole":
            pending += self._http.send(h11.EndOfMessage()) or b""
        await self._stream.send(pending)


def _recorded(head: h11.Request, raw: bytes) -> RecordedRequest:
    path, _, query = head.target.decode("ascii", "replace").partition("?")
    headers = {name.decode("latin-1"): value.decode("latin-1") for name, value in head.headers}
    try:
        body: object = json.loads(raw) if raw else None
    except ValueError:
        body = None
    return RecordedRequest(
        method=head.method.decode("ascii"),
        path=path,
        query=query,
        headers=headers,
        body=dict(body) if is_mapping(body) else {},
        raw=raw,
    )


def ready_reply(answer: Answer, request: RecordedRequest) -> ReadyReply:
    """Make an answer ready for the request that it answers: head, body and stream as bytes."""
    headers = list(answer.headers.items())
    streamed = request.body.get("stream") is True and answer.body is None and answer.error is None
    if streamed:
        pieces = _events(answer, request)
        kept = pieces[: len(pieces) // 2]
        headers += [("Content-Type", "text/event-stream"), ("Transfer-Encoding", "chunked")]
    else:
        body = _body(answer, request)
        pieces, kept = (body,), (body[: len(body) // 2],)
        headers += [("Content-Type", answer.content_type), ("Content-Length", str(len(body)))]
    head = h11.Response(status_code=answer.status, headers=headers)
    return ReadyReply(head=head, pieces=kept if answer.wire == "cut" else pieces, answer=answer)


def _body(answer: Answer, request: RecordedRequest) -> bytes:
    if answer.body is not None:
        return answer.body
    if answer.error is not None:
        return json.dumps({"error": dict(answer.error)}).encode()
    return json.dumps(answer.completion(_model(request))).encode()


def _events(answer: Answer, request: RecordedRequest) -> tuple[bytes, ...]:
    options: object = request.body.get("stream_options")
    include_usage = is_mapping(options) and options.get("include_usage") is True
    chunks = answer.chunks(_model(request), include_usage=include_usage)
    return *(f"data: {json.dumps(chunk)}\n\n".encode() for chunk in chunks), b"data: [DONE]\n\n"


def _model(request: RecordedRequest) -> str:
    # Azure names the model, as a deployment, in the path and lets the body leave it out.
    _, _, deployment = request.path.partition("/deployments/")
    return str(request.body.get("model") or deployment.partition("/")[0] or "unnamed")
