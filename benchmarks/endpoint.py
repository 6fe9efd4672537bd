"""A chat-completions endpoint that costs next to nothing, in a process of its own.

What it says is a play: it is told by POST to `/`, which gives the play's number, and done by POST to
`/NUMBER/v1/chat/completions`. All answers are made before they are needed, and a request is not parsed: the words of a
tool's result (`MARK`) are counted in its bytes. GET `/NUMBER` tells what the endpoint has seen of a play.
Run as a program it prints its port and serves until its standard input is closed.
"""

from __future__ import annotations

import asyncio
import json
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from functools import lru_cache
from typing import Any

from benchmarks.work import ANSWER, CHUNKS, FINAL, MARK, OBJECT, REPORT, pin, raise_file_limit

Parts = list[bytes]


@dataclass(frozen=True)
class Play:
    """What the endpoint answers.

    Args:
        kind: `tools`, `stream`, `object` or `delegate`.
        latency: Seconds before each answer.
        turns: Replies with tool calls before the last answer.
        calls: Tool calls in each of them.
        pace: Seconds from one piece of a stream to the next. 0: as fast as they can be written.
        ends: Whether the last answer of a run comes; of tools and delegation.
        answer_tool: The tool that ends a run, for frameworks whose answer is a call: its name and argument.
        object_tool: The tool whose arguments are the object, for frameworks that ask for one in that way.
        ask_argument: The name of the argument of a delegating tool.
    """

    kind: str = "tools"
    latency: float = 0.0
    turns: int = 1
    calls: int = 3
    pace: float = 0.0
    ends: bool = True
    answer_tool: tuple[str, str] | None = None
    object_tool: str | None = None
    ask_argument: str = "query"


@dataclass(frozen=True)
class Endpoint:
    """The endpoint, seen from another process."""

    port: int

    def play(self, play: Play) -> int:
        """Tell it a play; gives the play's number."""
        return int(self._get("/", json.dumps(asdict(play)).encode())["number"])

    def url(self, number: int) -> str:
        return f"http://127.0.0.1:{self.port}/{number}/v1"

    def seen(self, number: int) -> dict[str, float]:
        """`served` and `waiting` requests, `open` connections, and `cpu`: seconds the process has worked in all."""
        return self._get(f"/{number}")

    def _get(self, path: str, body: bytes | None = None) -> dict[str, float]:
        with urllib.request.urlopen(f"http://127.0.0.1:{self.port}{path}", body, timeout=60) as answer:
            return json.load(answer)


@contextmanager
def running() -> Iterator[Endpoint]:
    """Start an endpoint, and end it with the block."""
    command = [sys.executable, "-m", "benchmarks.endpoint"]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        try:
            yield Endpoint(int(process.stdout.readline()))
        finally:
            process.stdin.close()


# ---- the answers

_HEAD = b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: %d\r\n\r\n"
_STREAM_HEAD = b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nTransfer-Encoding: chunked\r\n\r\n"
_USAGE = {"prompt_tokens": 50, "completion_tokens": 10, "total_tokens": 60}


@lru_cache(maxsize=2048)
def said(message: Message, streamed: bool) -> Parts:
    """The bytes of an answer, as pieces to be written one by one."""
    return message.streamed() if streamed else [message.whole()]


@dataclass(frozen=True)
class Message:
    """An answer: a text, or calls of a tool (name and arguments as JSON), numbered from `first` on."""

    text: str | None = None
    calls: tuple[tuple[str, str], ...] = ()
    first: int = 0
    pieces: int = 1

    def whole(self) -> bytes:
        message = {"role": "assistant", "content": self.text, "refusal": None, "annotations": []}
        if self.calls:
            message["tool_calls"] = self._calls()
        choice = {"index": 0, "message": message, "logprobs": None, "finish_reason": self._reason}
        facts = {"id": "chatcmpl-1", "object": "chat.completion", "created": 1764200000, "model": "gpt-4o-mini"}
        return response({**facts, "choices": [choice], "usage": _USAGE, "system_fingerprint": "fp_1"})

    def streamed(self) -> Parts:
        start = _piece({"role": "assistant", "content": None if self.calls else ""})
        calls = [{"index": index, **call} for index, call in enumerate(self._calls())]
        said = [_piece({"tool_calls": [call]}) for call in calls] or self._words()
        usage = _event({**_CHUNK, "choices": [], "usage": _USAGE})
        last = _piece({}, self._reason) + usage + _event(b"[DONE]") + b"0\r\n\r\n"
        if self.pieces == 1:
            return [_STREAM_HEAD + start + b"".join(said) + last]
        return [_STREAM_HEAD + start, *said, last]

    def _words(self) -> Parts:
        if self.pieces == 1:
            return [_piece({"content": self.text})]
        return [_piece({"content": f"word{number} "}) for number in range(self.pieces)]

    @property
    def _reason(self) -> str:
        return "tool_calls" if self.calls else "stop"

    def _calls(self) -> list[dict[str, Any]]:
        return [
            {"id": f"call_{number}", "type": "function", "function": {"name": name, "arguments": arguments}}
            for number, (name, arguments) in enumerate(self.calls, self.first)
        ]


_CHUNK = {
    "id": "chatcmpl-1",
    "object": "chat.completion.chunk",
    "created": 1764200000,
    "model": "gpt-4o-mini",
    "system_fingerprint": "fp_1",
}


def _piece(delta: dict[str, Any], finish_reason: str | None = None) -> bytes:
    choice = {"index": 0, "delta": delta, "logprobs": None, "finish_reason": finish_reason}
    return _event({**_CHUNK, "choices": [choice], "usage": None})


def _event(value: object) -> bytes:
    data = b"data: %b\n\n" % (value if isinstance(value, bytes) else json.dumps(value).encode())
    return b"%x\r\n%b\r\n" % (len(data), data)


def response(value: object) -> bytes:
    body = json.dumps(value).encode()
    return _HEAD % len(body) + body


# ---- a play under way


@dataclass
class Stage:
    """A play, and what has been seen of it."""

    play: Play = field(default_factory=Play)
    served: int = 0
    waiting: int = 0
    open: int = 0

    def answer(self, body: bytes) -> Message | None:
        """The message that comes next, by what the request holds; None if nothing does."""
        play, results = self.play, body.count(MARK)
        if play.kind == "stream":
            return Message(pieces=CHUNKS)
        if play.kind == "object":
            return Message(calls=((play.object_tool, OBJECT),)) if play.object_tool else Message(OBJECT)
        if play.kind == "delegate":
            if b'"ask"' in body and not results:
                return Message(calls=(("ask", json.dumps({play.ask_argument: "Where does it rain?"})),))
            return self._last(REPORT)
        if results < play.turns * play.calls:
            calls = tuple(("look", json.dumps({"place": f"place {results + n}"})) for n in range(play.calls))
            return Message(calls=calls, first=results)
        return self._last(ANSWER)

    def _last(self, text: str) -> Message | None:
        if not self.play.ends:
            return None
        if self.play.answer_tool is None:
            return Message(text)
        name, argument = self.play.answer_tool
        return Message(calls=((name, json.dumps({argument: text})),), first=FINAL)


STAGES: list[Stage] = []


class Connection(asyncio.Protocol):
    """One client's connection."""

    stage: Stage | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self.transport = transport
        self.received = bytearray()
        self.wanted = 0
        self.answers: set[Any] = set()
        self.hangs = 0

    def data_received(self, data: bytes) -> None:
        self.received += data
        if len(self.received) < self.wanted:
            return
        head, blank, body = self.received.partition(b"\r\n\r\n")
        if not blank:
            return
        self.wanted = len(head) + 4 + _content_length(head)
        if len(self.received) >= self.wanted:
            self.received, self.wanted = bytearray(), 0
            self.request(head, bytes(body))

    def connection_lost(self, exc: Exception | None) -> None:
        if self.stage is not None:
            self.stage.open -= 1
            self.stage.waiting -= len(self.answers) + self.hangs
        for handle in self.answers:
            handle.cancel()

    def request(self, head: bytearray, body: bytes) -> None:
        number = head[: head.find(b"\r\n")].split(b" ")[1].split(b"/")[1]
        if not number:
            STAGES.append(Stage(Play(**json.loads(body))))
            self.transport.write(response({"number": len(STAGES) - 1}))
            return
        stage = STAGES[int(number)]
        if head.startswith(b"GET"):
            facts = {"served": stage.served, "waiting": stage.waiting, "open": stage.open, "cpu": time.process_time()}
            self.transport.write(response(facts))
            return
        if self.stage is not stage:
            self.stage = stage
            stage.open += 1
        stage.waiting += 1
        answer = stage.answer(body)
        if answer is None:
            self.hangs += 1
            return
        self.reply(stage, said(answer, b'"stream":true' in body or b'"stream": true' in body))

    def reply(self, stage: Stage, parts: Parts) -> None:
        loop = asyncio.get_running_loop()
        if len(parts) > 1:
            task = loop.create_task(self.write_one_by_one(stage, parts))
            self.answers.add(task)
            task.add_done_callback(self.answers.discard)
        elif stage.play.latency:
            # The time starts when the request is here, so a slow client does not make the model slower.
            handle = loop.call_later(stage.play.latency, lambda: self.write(stage, parts[0], handle))
            self.answers.add(handle)
        else:
            self.write(stage, parts[0])

    def write(self, stage: Stage, part: bytes, handle: asyncio.TimerHandle | None = None) -> None:
        self.answers.discard(handle)
        stage.waiting -= 1
        stage.served += 1
        self.transport.write(part)

    async def write_one_by_one(self, stage: Stage, parts: Parts) -> None:
        loop = asyncio.get_running_loop()
        due = loop.time()
        *before, last = parts
        for part in before:
            self.transport.write(part)
            due += stage.play.pace
            await asyncio.sleep(max(due - loop.time(), 0) if stage.play.pace else 0)
        self.write(stage, last)


def _content_length(head: bytearray) -> int:
    _, found, rest = head.lower().partition(b"content-length:")
    return int(rest.partition(b"\r\n")[0]) if found else 0


async def serve() -> None:
    loop = asyncio.get_running_loop()
    server = await loop.create_server(Connection, "127.0.0.1", 0, backlog=16384)
    print(server.sockets[0].getsockname()[1], flush=True)
    await loop.run_in_executor(None, sys.stdin.buffer.read)


if __name__ == "__main__":
    raise_file_limit()
    pin(1)
    asyncio.run(serve())
