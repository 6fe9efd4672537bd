"""What a streamed answer of 500 pieces costs: Fractal's streams, the `openai` SDK's own, and one written by hand.

    python benchmarks/streaming.py [--quick] [--json FILE]

All ways take turns in each round, in one process; the endpoint is another one. README.md says how to read the table.
"""

from __future__ import annotations

import argparse
import gc
import json
import statistics
import sys
import time
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import anyio
import httpx2
from concurrency import Row, machine, show
from endpoint import CHUNKS, Endpoint, running
from openai import AsyncOpenAI, OpenAI

from fractal import BaseAgent, TextDelta, sync
from fractal.models.openai import OpenAIModel

QUESTION = "Tell me a story."
Way = Callable[[Endpoint, str, int], float]


def cpu_of(read: Callable[[], int], streams: int) -> float:
    """Milliseconds of processor time for one stream, once the connection is there."""
    assert read() == CHUNKS
    gc.collect()
    started = time.process_time()
    for _ in range(streams):
        assert read() == CHUNKS
    return (time.process_time() - started) / streams * 1000


async def acpu_of(read: Callable[[], Awaitable[int]], streams: int) -> float:
    """The same, for what is awaited."""
    assert await read() == CHUNKS
    gc.collect()
    started = time.process_time()
    for _ in range(streams):
        assert await read() == CHUNKS
    return (time.process_time() - started) / streams * 1000


def sdk(endpoint: Endpoint) -> AsyncOpenAI:
    return AsyncOpenAI(base_url=endpoint.url, api_key="none", max_retries=0)


async def openai_create(endpoint: Endpoint, model: str, streams: int) -> float:
    async with sdk(endpoint) as client:

        async def read() -> int:
            count = 0
            stream = await client.chat.completions.create(
                model=model, messages=[{"role": "user", "content": QUESTION}], stream=True
            )
            async with stream:
                async for chunk in stream:
                    count += bool(chunk.choices and chunk.choices[0].delta.content)
            return count

        return await acpu_of(read, streams)


async def by_hand(endpoint: Endpoint, model: str, streams: int) -> float:
    body: dict[str, Any] = {"model": model, "stream": True, "messages": [{"role": "user", "content": QUESTION}]}
    async with httpx2.AsyncClient() as client:

        async def read() -> int:
            count, rest = 0, b""
            async with client.stream("POST", f"{endpoint.url}/chat/completions", json=body) as response:
                async for data in response.aiter_bytes():
                    *events, rest = (rest + data).split(b"\n\n")
                    for event in events:
                        if event != b"data: [DONE]":
                            chunk = json.loads(event[6:])
                            count += bool(chunk["choices"][0]["delta"].get("content"))
            return count

        return await acpu_of(read, streams)


async def _stream(agent: BaseAgent, streams: int, *, only_text: bool = False) -> float:
    async def read() -> int:
        count = 0
        async with agent.stream(QUESTION) as stream:
            if only_text:
                async for _ in stream.text():
                    count += 1
            else:
                async for event in stream:
                    count += isinstance(event, TextDelta)
        return count

    async with agent:
        return await acpu_of(read, streams)


def _agent(client: Any, model: str) -> BaseAgent:
    return BaseAgent("Teller", "You tell stories.", model, client)


async def fractal_events(endpoint: Endpoint, model: str, streams: int) -> float:
    return await _stream(_agent(OpenAIModel(base_url=endpoint.url, api_key="none"), model), streams)


async def fractal_text(endpoint: Endpoint, model: str, streams: int) -> float:
    agent = _agent(OpenAIModel(base_url=endpoint.url, api_key="none"), model)
    return await _stream(agent, streams, only_text=True)


async def fractal_sdk(endpoint: Endpoint, model: str, streams: int) -> float:
    return await _stream(_agent(sdk(endpoint), model), streams)


def on(backend: str, way: Callable[[Endpoint, str, int], Awaitable[float]]) -> Way:
    def run(endpoint: Endpoint, model: str, streams: int) -> float:
        return anyio.run(way, endpoint, model, streams, backend=backend)

    return run


def fractal_sync(endpoint: Endpoint, model: str, streams: int) -> float:
    agent = _agent(OpenAIModel(base_url=endpoint.url, api_key="none"), model)

    def read() -> int:
        with sync.stream(agent, QUESTION) as stream:
            return sum(isinstance(event, TextDelta) for event in stream)

    with sync.portal():
        return cpu_of(read, streams)


def openai_sync(endpoint: Endpoint, model: str, streams: int) -> float:
    with OpenAI(base_url=endpoint.url, api_key="none", max_retries=0) as client:

        def read() -> int:
            messages: Any = [{"role": "user", "content": QUESTION}]
            with client.chat.completions.create(model=model, messages=messages, stream=True) as stream:
                return sum(bool(chunk.choices and chunk.choices[0].delta.content) for chunk in stream)

        return cpu_of(read, streams)


BASE = "openai create(), asyncio"
WAYS: dict[str, Way] = {
    BASE: on("asyncio", openai_create),
    "openai create(), trio": on("trio", openai_create),
    "openai create(), blocking": openai_sync,
    "httpx2 by hand, asyncio": on("asyncio", by_hand),
    "fractal, asyncio": on("asyncio", fractal_events),
    "fractal text(), asyncio": on("asyncio", fractal_text),
    "fractal, trio": on("trio", fractal_events),
    "fractal with AsyncOpenAI, asyncio": on("asyncio", fractal_sdk),
    "fractal.sync": fractal_sync,
}


def measure(endpoint: Endpoint, rounds: int, streams: int) -> list[Row]:
    """CPU of each way, with pieces that come at once and pieces that come one by one."""
    took: dict[tuple[str, str], list[float]] = {}
    for number in range(rounds):
        for model in ("play", "paced"):
            for name, way in WAYS.items():
                if sys.stderr.isatty():
                    print(f"\rround {number + 1} of {rounds}: {name:40}", end="", file=sys.stderr)
                took.setdefault((name, model), []).append(way(endpoint, model, streams))
    if sys.stderr.isatty():
        print("\r" + " " * 60 + "\r", end="", file=sys.stderr)
    rows: list[Row] = []
    for name in WAYS:
        row: Row = {"way": name}
        for model, words in (("play", "at once"), ("paced", "one by one")):
            # Of each round by itself, since the machine may be slower in one than in another.
            ratios = [mine / base for mine, base in zip(took[name, model], took[BASE, model], strict=True)]
            row[f"{words}: CPU ms"] = round(statistics.median(took[name, model]), 2)
            row[f"{words}: × openai"] = round(statistics.median(ratios), 3)
        rows.append(row)
    return rows


def main() -> None:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="one round of few streams")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the numbers there too")
    options = parser.parse_args()
    rounds, streams = (1, 2) if options.quick else (5, 10)
    facts = machine()
    print(", ".join(f"{name}: {value}" for name, value in facts.items()) + f", rounds: {rounds}")
    with running(latency=0.0) as endpoint:
        rows = measure(endpoint, rounds, streams)
    show(f"A streamed answer of {CHUNKS} pieces", rows)
    if options.json:
        options.json.write_text(json.dumps({"machine": facts, "streaming": rows}, indent=2))


if __name__ == "__main__":
    main()
