"""A chat-completions endpoint that costs next to nothing, in a process of its own.

It knows one play: a first question is answered with three calls of the tool `look`, one that comes with tool results
with a text. A question to the model `hang` is never answered. One with `"stream":true` is answered with a text in
CHUNKS pieces, each in an event and a write of its own: as fast as they can be written, or PACE seconds apart if the
model is `paced`. GET answers with what the process has used so far.
Run as a program it prints its port and serves until its standard input is closed.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

TOOL_CALLS = 3
CHUNKS = 500
PACE = 0.0005


@dataclass(frozen=True)
class Endpoint:
    """The endpoint, seen from the process that started it."""

    port: int

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}/v1"

    def state(self) -> dict[str, float]:
        """`cpu`: seconds the process has worked. `waiting`: requests without an answer. `served`: those with one."""
        with urllib.request.urlopen(self.url) as answer:
            return json.load(answer)


@contextmanager
def running(latency: float) -> Iterator[Endpoint]:
    """Start an endpoint, and end it with the block."""
    command = [sys.executable, __file__, "--latency", str(latency)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        try:
            yield Endpoint(int(process.stdout.readline()))
        finally:
            process.stdin.close()


class Connection(asyncio.Protocol):
    """One client's connection; requests are told from their bytes, not parsed."""

    latency = 0.0
    waiting = 0
    served = 0

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self.transport = transport
        self.received = b""
        self.answers: set[asyncio.TimerHandle] = set()
        self.hangs = 0

    def data_received(self, data: bytes) -> None:
        self.received += data
        head, blank, body = self.received.partition(b"\r\n\r\n")
        if blank and len(body) >= _content_length(head):
            self.received = b""
            self.answer(head, body)

    def connection_lost(self, exc: Exception | None) -> None:
        Connection.waiting -= len(self.answers) + self.hangs
        for handle in self.answers:
            handle.cancel()

    def answer(self, head: bytes, body: bytes) -> None:
        if head.startswith(b"GET"):
            facts = {"cpu": time.process_time(), "waiting": Connection.waiting, "served": Connection.served}
            self.transport.write(_response(facts))
            return
        Connection.waiting += 1
        if b'"model":"hang"' in body:
            self.hangs += 1
            return
        if b'"stream":true' in body.replace(b" ", b""):
            Connection.waiting -= 1
            self.streams = asyncio.get_running_loop().create_task(self.stream(b'"paced"' in body))
            return
        response = LAST if b'"role":"tool"' in body else FIRST
        # The timer starts when the request is here, so a slow client does not make the model slower.
        handle = asyncio.get_running_loop().call_later(self.latency, lambda: self.send(handle, response))
        self.answers.add(handle)

    def send(self, handle: asyncio.TimerHandle, response: bytes) -> None:
        self.answers.discard(handle)
        Connection.waiting -= 1
        Connection.served += 1
        self.transport.write(response)

    async def stream(self, paced: bool) -> None:
        loop = asyncio.get_running_loop()
        due = loop.time()
        for piece in PIECES:
            if self.transport.is_closing():
                return
            self.transport.write(piece)
            due += PACE if paced else 0
            await asyncio.sleep(max(due - loop.time(), 0))
        Connection.served += 1


def _content_length(head: bytes) -> int:
    _, found, rest = head.lower().partition(b"content-length:")
    return int(rest.partition(b"\r\n")[0]) if found else 0


def _response(value: object) -> bytes:
    body = json.dumps(value).encode()
    return b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: %d\r\n\r\n%b" % (len(body), body)


def _completion(message: dict[str, Any], finish_reason: str) -> dict[str, Any]:
    return {
        "id": "chatcmpl-1",
        "object": "chat.completion",
        "created": 0,
        "model": "play",
        "choices": [{"index": 0, "finish_reason": finish_reason, "message": {"role": "assistant", **message}}],
        "usage": {"prompt_tokens": 50, "completion_tokens": 10, "total_tokens": 60},
    }


def _call(number: int) -> dict[str, Any]:
    arguments = json.dumps({"place": f"place {number}"})
    return {"id": f"call_{number}", "type": "function", "function": {"name": "look", "arguments": arguments}}


FIRST = _response(_completion({"content": None, "tool_calls": [_call(n) for n in range(TOOL_CALLS)]}, "tool_calls"))
LAST = _response(_completion({"content": "It rains in one of them."}, "stop"))


def _event(value: object) -> bytes:
    data = b"data: %b\n\n" % (value if isinstance(value, bytes) else json.dumps(value).encode())
    return b"%x\r\n%b\r\n" % (len(data), data)


def _piece(delta: dict[str, str], finish_reason: str | None = None) -> bytes:
    choice = {"index": 0, "delta": delta, "logprobs": None, "finish_reason": finish_reason}
    chunk = {"id": "chatcmpl-1", "object": "chat.completion.chunk", "created": 0, "model": "play"}
    return _event({**chunk, "system_fingerprint": "fp_1", "choices": [choice], "usage": None})


PIECES = [
    b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nTransfer-Encoding: chunked\r\n\r\n",
    _piece({"role": "assistant", "content": ""}),
    *(_piece({"content": f"word{number} "}) for number in range(CHUNKS)),
    _piece({}, "stop"),
    _event(b"[DONE]") + b"0\r\n\r\n",
]


async def serve() -> None:
    loop = asyncio.get_running_loop()
    server = await loop.create_server(Connection, "127.0.0.1", 0, backlog=2048)
    print(server.sockets[0].getsockname()[1], flush=True)
    await loop.run_in_executor(None, sys.stdin.buffer.read)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--latency", type=float, default=0.0, help="seconds before each answer")
    Connection.latency = parser.parse_args().latency
    asyncio.run(serve())
