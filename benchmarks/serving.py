"""What the routes of `fractal.serving` cost, beside endpoints of FastAPI that await `agent.run`.

`/bare` does nothing else, so that its runs go on when their clients have gone; `/watched` ends them, by the least that
is right for that, and keeps nothing of them. These runs are shorter than the moment after which clients are watched.

`python -m benchmarks.serving [REQUESTS_OF_A_ROUND]`; all are served by one uvicorn, which takes turns, and the model is
an endpoint in a process of its own. A round asks each path some times; the server itself tells what processor time that
took. Numbers are medians of rounds, and the ratios those of the same round.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from statistics import median
from typing import Any
from urllib.request import urlopen

import anyio
from fastapi import FastAPI, HTTPException, Request
from pydantic import BaseModel
from starlette.types import Receive, Scope, Send

from fractal import BaseAgent, tool
from fractal.serving import agent_router
from fractal.testing import Endpoint, answers
from fractal.testing.answers import AnswerLike
from fractal.testing.endpoint import RecordedRequest
from tests.served import answers as is_there, free_port

CLIENTS, ROUNDS = 8, 41
PATHS = ("/bare", "/watched", "/runs", "/runs/stream")
OURS = {"/bare", "/watched", "/spent"}
WORDS = " ".join(["word"] * 200)


@tool
async def price(article: str) -> float:
    """Tell what something costs."""
    return 1.5 * len(article)


agent = BaseAgent("Shop", "You sell tools.").add_tool(price)
by_hand, served = FastAPI(), FastAPI()
served.include_router(agent_router(agent))


class Question(BaseModel):
    input: str
    messages: list[dict[str, Any]] = []
    timeout: float = 30


class Answer(BaseModel):
    content: str
    messages: list[dict[str, Any]]
    run_id: str


@by_hand.post("/bare")
async def bare(question: Question) -> Answer:
    result = await agent.run(question.input, messages=question.messages, timeout=question.timeout)
    result.raise_for_error()
    return Answer(content=str(result.content), messages=result.messages, run_id=result.run_id)


@by_hand.get("/spent")
async def spent() -> float:
    """Seconds of processor time that the server has taken."""
    return time.process_time()


@by_hand.post("/watched")
async def watched(question: Question, request: Request) -> Answer:
    async with anyio.create_task_group() as group:

        async def watch() -> None:
            while (await request.receive())["type"] != "http.disconnect":
                pass
            group.cancel_scope.cancel()

        group.start_soon(watch)
        answer = await bare(question)
        group.cancel_scope.cancel()
        return answer
    raise HTTPException(499, "the client has gone")


async def app(scope: Scope, receive: Receive, send: Send) -> None:
    """Pass requests to one of two applications, so that none looks through the other's routes."""
    await (by_hand if scope.get("path") in OURS else served)(scope, receive, send)


def model(request: RecordedRequest) -> AnswerLike:
    """Play the model."""
    last = request.messages[-1]
    if last["content"] == "words":
        return WORDS
    return answers.call("price", {"article": "bolt"}) if last["content"] == "tool" else "hello there"


async def _ask(stream: anyio.abc.SocketStream, path: str, question: str) -> bytes:
    body = json.dumps({"input": question, "timeout": 30}).encode()
    head = f"POST {path} HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
    await stream.send(head.encode() + body)
    raw = b""
    while True:
        raw += await stream.receive()
        headers, found, got = raw.partition(b"\r\n\r\n")
        length = re.search(rb"(?i)content-length: (\d+)", headers)
        if found and (len(got) >= int(length[1]) if length else raw.endswith(b"\r\n0\r\n\r\n")):
            assert raw.startswith(b"HTTP/1.1 200"), raw
            return raw


async def _round(port: int, path: str, question: str, requests: int) -> float:
    """The seconds that a round takes."""

    async def client() -> None:
        async with await anyio.connect_tcp("127.0.0.1", port) as stream:
            for _ in range(requests // CLIENTS):
                await _ask(stream, path, question)

    begun = time.perf_counter()
    async with anyio.create_task_group() as group:
        for _ in range(CLIENTS):
            group.start_soon(client)
    return time.perf_counter() - begun


@contextmanager
def _served() -> Iterator[int]:
    with Endpoint(model) as endpoint:
        port = free_port()
        serve = ["uvicorn", "--port", str(port), "--log-level", "error", "benchmarks.serving:app"]
        environment = {**os.environ, "OPENAI_BASE_URL": endpoint.url, "OPENAI_API_KEY": "sk-test"}
        process = subprocess.Popen([sys.executable, "-m", *serve], env=environment)
        try:
            while not is_there(port, "/ready"):
                time.sleep(0.1)
            yield port
        finally:
            process.kill()
            process.wait()


def _spent(port: int) -> float:
    with urlopen(f"http://127.0.0.1:{port}/spent") as answer:
        return float(answer.read())


def _measured(port: int, path: str, question: str, requests: int) -> tuple[float, float]:
    """Requests per second, and microseconds of processor time for each."""
    before = _spent(port)
    seconds = anyio.run(_round, port, path, question, requests)
    return requests / seconds, (_spent(port) - before) / requests * 1e6


def _print(question: str, path: str, rounds: Sequence[Mapping[str, tuple[float, float]]]) -> None:
    rate, cpu = (median(each[path][index] for each in rounds) for index in (0, 1))
    ratio = median(each[path][1] / each["/bare"][1] for each in rounds)
    print(f"{question:5} {path:13} {rate:5.0f} requests/s {cpu:5.0f} µs of processor time, {ratio:.2f} of bare")


def main(requests: int = 80) -> None:
    """Measure, and print what came out."""
    with _served() as port:
        for question in ("text", "tool"):
            rounds = list[dict[str, tuple[float, float]]]()
            for number in range(ROUNDS):
                paths = PATHS[:: -1 if number % 2 else 1]
                rounds.append({path: _measured(port, path, question, requests) for path in paths})
            for path in PATHS:
                _print(question, path, rounds[1:])
        more = [_of_words(port, requests) for _ in range(ROUNDS // 2)]
        print(f"a streamed event: {median(more):.1f} µs of processor time")


def _of_words(port: int, requests: int) -> float:
    """Microseconds of processor time for each event of a stream beyond its first two."""
    many, few = (_measured(port, "/runs/stream", question, requests)[1] for question in ("words", "text"))
    return (many - few) / (len(WORDS.split()) - 2)


if __name__ == "__main__":
    main(*map(int, sys.argv[1:2]))
