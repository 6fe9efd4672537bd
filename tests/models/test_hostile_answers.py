"""Whatever an endpoint answers ends in a right answer or a typed error, in time, and in bounded memory."""

from __future__ import annotations

import json
import os
import pickle
import re
import resource
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import anyio
import anyio.abc
import pytest

from fractal import (
    AgentResult,
    AgentToolkit,
    BaseAgent,
    ConnectionFailed,
    FractalError,
    Limits,
    OpenAIModel,
    UnexpectedError,
    tool,
)
from tests.hostile import hostile_answer

ANSWERS = 5000 * int(os.environ.get("FRACTAL_FUZZ", "1"))
"""Answers for each backend and each way."""
AT_A_TIME = 12
TIMEOUT = 1.0
LATE = 0.5


@tool
async def look(city: str) -> str:
    return "sunny"


TOOLS = AgentToolkit(look)


class Server:
    """Answers each request as its model's name says: by a number, hostile; all others with "done"."""

    def __init__(self) -> None:
        self.port = 0
        self._started = threading.Event()
        self._scope: Any = None

    async def serve(self) -> None:
        listener = await anyio.create_tcp_listener(local_host="127.0.0.1")
        self.port = listener.extra(anyio.abc.SocketAttribute.local_port)
        with anyio.CancelScope() as scope:
            self._scope = scope
            self._token = anyio.lowlevel.current_token()
            self._started.set()
            async with listener:
                await listener.serve(self._answer)

    async def _answer(self, stream: anyio.abc.SocketStream) -> None:
        async with stream:
            try:
                while body := await self._read(stream):
                    number = int(re.search(rb'"model":"(\d+)"', body)[1])  # type: ignore[index]
                    is_first = b'"role":"tool"' not in body
                    if not await self._write(stream, number, is_first=is_first):
                        return
            except (anyio.BrokenResourceError, anyio.ClosedResourceError, anyio.EndOfStream):
                pass

    @staticmethod
    async def _read(stream: anyio.abc.SocketStream) -> bytes:
        data = b""
        while b"\r\n\r\n" not in data:
            data += await stream.receive()
        head, _, body = data.partition(b"\r\n\r\n")
        length = int(re.search(rb"(?i)content-length: (\d+)", head)[1])  # type: ignore[index]
        pieces, size = [body], len(body)
        while size < length:
            pieces.append(await stream.receive(1 << 20))
            size += len(pieces[-1])
        return b"".join(pieces)[:400] + b"".join(pieces)[-5000:]

    @staticmethod
    async def _write(stream: anyio.abc.SocketStream, number: int, *, is_first: bool) -> bool:
        if not is_first:
            body = json.dumps({"choices": [{"message": {"content": f"answer {number}"}, "finish_reason": "stop"}]})
            await stream.send(f"HTTP/1.1 200 OK\r\nContent-Length: {len(body)}\r\n\r\n{body}".encode())
            return True
        answer = hostile_answer(number)
        data = answer.data
        for size in answer.pieces:
            await stream.send(data[:size])
            data = data[size:]
            await anyio.lowlevel.checkpoint()
        await stream.send(data)
        return answer.kind == "a good one"  # the others end with their connection

    def stop(self) -> None:
        anyio.from_thread.run_sync(self._scope.cancel, token=self._token)


@contextmanager
def serving() -> Iterator[Server]:
    server = Server()
    thread = threading.Thread(target=anyio.run, args=(server.serve,))
    thread.start()
    server._started.wait(10)
    try:
        yield server
    finally:
        server.stop()
        thread.join(10)


async def ask_until_answered(server: Server, number: int, way: str) -> tuple[AgentResult | BaseException, float]:
    """Ask; and again where the server closed the connection of an answer before, while this was on its way."""
    answer = hostile_answer(number)
    for _ in range(5):
        result, seconds = await ask(server, number, way)
        if answer.content is None or answer.cut or not is_cut_off(result):
            break
    return result, seconds


async def ask(server: Server, number: int, way: str) -> tuple[AgentResult | BaseException, float]:
    model = OpenAIModel(base_url=f"http://127.0.0.1:{server.port}/v1", api_key="any")

    agent = BaseAgent("A", "You help.", str(number), model, toolkit=TOOLS, limits=Limits(max_requests=8))
    started = time.perf_counter()
    try:
        if way == "run":
            result = await agent.run("go", max_retries=0, timeout=TIMEOUT)
        else:
            async with agent.stream("go", max_retries=0, timeout=TIMEOUT) as stream:
                async for _ in stream:
                    pass
                result = await stream.result()
    except Exception as error:
        return error, time.perf_counter() - started
    return result, time.perf_counter() - started


def is_cut_off(result: AgentResult | BaseException) -> bool:
    return isinstance(result, AgentResult) and isinstance(result.exception, ConnectionFailed)


def assert_right(number: int, result: AgentResult | BaseException) -> None:
    answer = hostile_answer(number)
    where = f"answer {number}, {answer.kind}"
    assert isinstance(result, AgentResult), f"{where}: {result!r}"
    assert result.success or isinstance(result.exception, FractalError), where
    assert not isinstance(result.exception, UnexpectedError), f"{where}: {result.exception!r}"
    assert "of somebody else" not in str(result.content), where
    if answer.content is not None and (result.success or not answer.cut):
        assert result.content == answer.content, f"{where}: {result.content!r}"
    told = result.model_dump_json()
    assert AgentResult.model_validate_json(told).success == result.success, where
    told.encode()
    str(result).encode()
    repr(result).encode()
    pickle.loads(pickle.dumps(result))


@pytest.mark.slow
@pytest.mark.untraced
@pytest.mark.timeout(900)
@pytest.mark.parametrize("anyio_backend", [("asyncio", {}), ("trio", {})], ids=["asyncio", "trio"])
@pytest.mark.parametrize("way", ["run", "stream"])
async def test_hostile_answers_end_in_right_answers_or_typed_errors(way: str):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    late: list[int] = []
    numbers = iter(range(ANSWERS))

    async def worker() -> None:
        for number in numbers:
            result, seconds = await ask_until_answered(server, number, way)
            if seconds > TIMEOUT + LATE or (seconds > TIMEOUT and hostile_answer(number).kind == "a good one"):
                late.append(number)  # or the machine was busy with something else: it is asked again alone
            else:
                assert_right(number, result)

    with serving() as server:
        async with anyio.create_task_group() as group:
            for _ in range(AT_A_TIME):
                group.start_soon(worker)
        for number in late:
            for _ in range(3):
                result, seconds = await ask_until_answered(server, number, way)
                if seconds < TIMEOUT + LATE:
                    break
            assert_right(number, result)
            assert seconds < TIMEOUT + LATE
    grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024
    # Answers of 30 MB, several at once, as the double makes, keeps and sends them, are up to 720 of these.
    assert grown < 1200
