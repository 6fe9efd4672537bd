"""Real servers: uvicorn on asyncio and hypercorn on trio, each in a process of its own, and clients with sockets."""

from __future__ import annotations

import importlib.util
import json
import os
import random
import re
import signal
import subprocess
import sys
import time
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import anyio
import anyio.abc
import psutil
import pytest

from tests.served import answers, free_port
from tests.serving.application import WORDS
from tests.visits import events_in, text_in

pytestmark = [pytest.mark.slow, pytest.mark.timeout(120)]


@dataclass
class Server:
    """A server that goes on, and what it has written."""

    port: int
    process: subprocess.Popen[bytes]
    log: Path

    @property
    def said(self) -> str:
        return self.log.read_text(errors="replace")


def _command(kind: str, port: int) -> list[str]:
    if kind == "uvicorn":
        serve = ["uvicorn", "--port", str(port), "--timeout-graceful-shutdown", "1", "--log-level", "warning"]
        return [sys.executable, "-m", *serve, "tests.serving.application:app"]
    serve = ["--bind", f"127.0.0.1:{port}", "--worker-class", "trio", "--graceful-timeout", "1"]
    return [sys.executable, "-m", "hypercorn", *serve, "tests.serving.application:app"]


@contextmanager
def running(kind: str, folder: Path) -> Iterator[Server]:
    if kind == "hypercorn" and importlib.util.find_spec("hypercorn") is None:
        pytest.skip("hypercorn is not installed")
    log = folder / f"{kind}.log"
    port = free_port()
    with log.open("wb") as output:
        process = subprocess.Popen(_command(kind, port), stdout=output, stderr=output, start_new_session=True)
    try:
        server = Server(port, process, log)
        _wait_until_ready(server)
        yield server
    finally:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)  # hypercorn's worker is a process of its own
        process.wait()


def _wait_until_ready(server: Server) -> None:
    give_up = time.monotonic() + 30
    while not answers(server.port, "/cancel/ready"):
        assert server.process.poll() is None and time.monotonic() < give_up, server.said  # noqa: PT018
        time.sleep(0.05)


@pytest.fixture(scope="module", params=["uvicorn", "hypercorn"])
def server(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    with running(request.param, tmp_path_factory.mktemp("server")) as server:
        yield server


# ---- clients


@dataclass
class Answer:
    status: int
    headers: dict[str, str]
    body: bytes

    @property
    def json(self) -> Any:
        return json.loads(self.body)


def _written(method: str, path: str, body: Any, headers: dict[str, str]) -> bytes:
    data = b"" if body is None else json.dumps(body).encode()
    lines = [f"{method} {path} HTTP/1.1", "Host: x", "Connection: close", *(f"{n}: {v}" for n, v in headers.items())]
    if body is not None:
        lines += ["Content-Type: application/json", f"Content-Length: {len(data)}"]
    return "\r\n".join([*lines, "", ""]).encode() + data


def _read(raw: bytes) -> Answer:
    head, _, body = raw.partition(b"\r\n\r\n")
    first, *lines = head.decode().split("\r\n")
    headers = {name.lower(): value for name, value in (line.split(": ", 1) for line in lines)}
    return Answer(int(first.split()[1]), headers, _joined(body) if "chunked" in str(headers) else body)


def _joined(chunked: bytes) -> bytes:
    joined = b""
    while chunked:
        size, _, rest = chunked.partition(b"\r\n")
        length = int(size or b"0", 16)
        if not length or len(rest) < length:
            break
        joined, chunked = joined + rest[:length], rest[length + 2 :]
    return joined


async def _receive(stream: anyio.abc.SocketStream) -> bytes:
    raw = b""
    while not _is_whole(raw):  # hypercorn does not always close the connection, though it is asked to
        try:
            raw += await stream.receive()
        except (anyio.EndOfStream, anyio.BrokenResourceError):
            break
    return raw


def _is_whole(raw: bytes) -> bool:
    head, found, body = raw.partition(b"\r\n\r\n")
    length = re.search(rb"(?i)content-length: (\d+)", head)
    return bool(found) and (len(body) >= int(length[1]) if length else raw.endswith(b"\r\n0\r\n\r\n"))


async def ask(server: Server, method: str, path: str, body: Any = None, **headers: str) -> Answer:
    names = {name.replace("_", "-"): value for name, value in headers.items()}
    async with await anyio.connect_tcp("127.0.0.1", server.port) as stream:
        await stream.send(_written(method, path, body, names))
        return _read(await _receive(stream))


async def ask_and_drop(server: Server, path: str, body: Any, seconds: float, **headers: str) -> bytes:
    """Ask, read for so many seconds, and close the socket; what has come until then."""
    raw = b""
    async with await anyio.connect_tcp("127.0.0.1", server.port) as stream:
        names = {name.replace("_", "-"): value for name, value in headers.items()}
        await stream.send(_written("POST", path, body, names))
        with anyio.move_on_after(seconds):
            while True:
                try:
                    raw += await stream.receive()
                except (anyio.EndOfStream, anyio.BrokenResourceError):
                    break
    return raw


async def many(count: int, do: Callable[[int], Awaitable[Any]]) -> list[Any]:
    results: list[Any] = [None] * count

    async def one(number: int) -> None:
        results[number] = await do(number)

    async with anyio.create_task_group() as group:
        for number in range(count):
            group.start_soon(one, number)
    return results


async def runs_of(server: Server, policy: str) -> dict[str, dict[str, Any]]:
    found, path = dict[str, dict[str, Any]](), f"/{policy}/runs?limit=100"
    while path:
        page = (await ask(server, "GET", path)).json
        found |= {run["id"]: run for run in page["runs"]}
        path = f"/{policy}/runs?limit=100&before={page['next']}" if page["next"] else ""
    return found


@pytest.fixture(params=[("asyncio", {})], ids=["asyncio"])
def anyio_backend(request: pytest.FixtureRequest) -> Any:
    """The clients' own backend, which is not what is tested here."""
    return request.param


# ---- what is shown


async def test_200_requests_at_once_on_one_agent_have_each_their_own_answer(server: Server) -> None:
    with anyio.fail_after(60):
        found = await many(200, lambda n: ask(server, "POST", "/cancel/runs", {"input": f"say {n}"}))
    assert [each.json["result"]["content"] for each in found] == [str(n) for n in range(200)]


async def test_runs_of_100_clients_that_drop_their_sockets_are_cancelled_with_all_that_belongs_to_them(
    server: Server, record_property: Callable[[str, object], None]
) -> None:
    chance = random.Random(7)
    known = {*await runs_of(server, "cancel")}
    pauses = [chance.uniform(0.0, 1.0) for _ in range(100)]
    questions = ["search 30", "tell"]

    def drop(number: int) -> Awaitable[bytes]:
        path = "/cancel/runs" if number % 4 < 2 else "/cancel/runs/stream"
        body, name = {"input": questions[number % 2]}, f"drop-{number}"
        return ask_and_drop(server, path, body, pauses[number], X_Request_ID=name)

    with anyio.fail_after(60):
        await many(100, drop)
        while True:
            told = (await ask(server, "GET", "/seen")).json
            if told["begun"] == told["ended"] and told["in_flight"] == 0:
                break
            await anyio.sleep(0.01)
        times = (await ask(server, "GET", "/times")).json
    assert told["cancelled"] > 0
    for what in ("cancelled", "ended"):
        took = sorted(took_after_going(times, what))
        record_property("numbers", f"{what} after a client has gone: {numbers_of(took)}")
        assert took[len(took) // 2] <= 0.5
        assert took[-1] <= 5
    runs = [run for run_id, run in (await runs_of(server, "cancel")).items() if run_id not in known]
    assert all(run["state"] in ("cancelled", "finished") for run in runs), [run["problem"] for run in runs]


def took_after_going(times: dict[str, dict[str, float]], what: str) -> list[float]:
    """Seconds from when the server knew that a client has gone, for those whose runs went on then."""
    found = [at for request, at in times.items() if request.startswith("drop-") and {"gone", what} <= at.keys()]
    return [at[what] - at["gone"] for at in found if at[what] >= at["gone"]]


def numbers_of(took: list[float]) -> str:
    middle, last = took[len(took) // 2], took[-1]
    return f"{len(took)} times, in the middle after {middle * 1000:.0f} ms, at last after {last * 1000:.0f} ms"


async def test_detached_runs_of_clients_that_drop_their_sockets_finish_and_are_fetched_whole(server: Server) -> None:
    chance = random.Random(8)
    pauses = [chance.uniform(0.0, 1.5) for _ in range(100)]

    def drop(number: int) -> Awaitable[bytes]:
        path = "/detach/runs" if number % 2 else "/detach/runs/stream"
        return ask_and_drop(server, path, {"input": "tell"}, pauses[number])

    with anyio.fail_after(60):
        seen = await many(100, drop)
        runs = await runs_of(server, "detach")
        assert runs
        ended = await many(len(runs), lambda n: ask(server, "GET", f"/detach/runs/{[*runs][n]}/stream"))
        texts = {text_in(events_in(each.body)) for each in ended}
        results = {events_in(each.body)[-1]["data"]["result"]["content"] for each in ended}
        assert texts == results == {WORDS}
        joined = 0
        for raw in seen:
            first = events_in(_read(raw).body) if b"text/event-stream" in raw else []
            if not first:
                continue
            run_id, last = first[0]["data"]["run_id"], first[-1]["id"]
            rest = await ask(server, "GET", f"/detach/runs/{run_id}/stream", Last_Event_ID=last)
            assert text_in([*first, *events_in(rest.body)]) == WORDS
            joined += 1
        assert joined > 0


async def test_a_reader_that_does_not_read_holds_back_nobody_and_memory_is_bounded(server: Server) -> None:
    memory = psutil.Process(server.process.pid)
    with anyio.fail_after(60):
        await ask(server, "POST", "/detach/runs/stream", {"input": "much"})  # what is loaded once
        before = sum(each.memory_info().rss for each in (memory, *memory.children(recursive=True)))
        async with anyio.create_task_group() as group:
            for _ in range(20):
                stream = await anyio.connect_tcp("127.0.0.1", server.port)
                group.start_soon(_hold, stream)
                await stream.send(_written("POST", "/detach/runs/stream", {"input": "much"}, {}))
            quick = await ask(server, "POST", "/cancel/runs", {"input": "say quick"})
            assert quick.json["result"]["content"] == "quick"
            while any(run["state"] in ("queued", "running") for run in (await runs_of(server, "detach")).values()):
                pass
            after = sum(each.memory_info().rss for each in (memory, *memory.children(recursive=True)))
            group.cancel_scope.cancel()
    # Of 20 runs: 1 MiB of events and 0.8 MiB of text, some of it twice, in the result and in the conversation.
    assert after - before < 150 * 2**20, f"{(after - before) / 2**20:.0f} MiB"


async def _hold(stream: anyio.abc.SocketStream) -> None:
    async with stream:
        await anyio.sleep_forever()


_HEAD = b"POST /cancel/runs HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: "


@pytest.mark.parametrize(
    ("raw", "status"),
    [
        (_HEAD + b"99\r\n\r\n{", 408),
        (_HEAD + b"9999999\r\n\r\n", 413),
        (_written("GET", "/cancel/runs/..%2f..%2fetc%2fpasswd", None, {}), 404),
        (_written("GET", "/cancel/runs/../../tools/x", None, {}), 404),
        (_written("POST", "/cancel/runs/run_0/approvals/call_1", {"decision": "allow"}, {}), 404),
    ],
    ids=["slow", "long", "encoded path", "path", "approval"],
)
async def test_a_hostile_request_has_its_status(server: Server, raw: bytes, status: int) -> None:
    with anyio.fail_after(10):
        async with await anyio.connect_tcp("127.0.0.1", server.port) as stream:
            await stream.send(raw)
            answer = await stream.receive()
    assert answer.split()[1] == str(status).encode()


@pytest.mark.parametrize("kind", ["uvicorn", "hypercorn"])
async def test_a_server_that_is_told_to_end_under_load_loses_no_run_without_a_word(kind: str, tmp_path: Path) -> None:
    with running(kind, tmp_path) as server, anyio.fail_after(60):
        async with anyio.create_task_group() as group:
            for number in range(60):
                policy = "cancel" if number % 2 else "detach"
                path = f"/{policy}/runs" if number % 4 < 2 else f"/{policy}/runs/stream"
                group.start_soon(ask_and_drop, server, path, {"input": f"search {number % 3 * 30 + 0.5}"}, 30)
            while (await ask(server, "GET", "/seen")).json["begun"] < 60:
                pass
            server.process.send_signal(signal.SIGTERM)
            told = time.monotonic()
            await anyio.to_thread.run_sync(server.process.wait)
            took = time.monotonic() - told
            group.cancel_scope.cancel()
        begun = {*re.findall(r"run (run_\w+) of agent", server.said)}
        ended = {*re.findall(r"run (run_\w+) for request \S+ has ended", server.said)}
        unfinished = {*re.findall(r"run (run_\w+) has not finished within the grace", server.said)}
        assert (len(begun), begun) == (60, ended), server.said[-3000:]
        assert took < 9, took  # a second for what is connected, another of grace, and what a busy machine needs
        assert unfinished <= begun
