"""The blocking facade against the awaited run, with a model in memory."""

from __future__ import annotations

import contextvars
import threading
import time

import anyio

from benchmarks import work
from benchmarks.adapters.fractal import content
from fractal import BaseAgent, sync
from fractal.testing import ScriptedModel, answers


def facade(threads: int, calls: int, latency: float) -> dict[str, float]:
    """CPU and wall seconds of one call: awaited in so many tasks, and blocking in so many threads."""
    awaited = anyio.run(_awaited, threads, calls, latency)
    blocking = _blocking(threads, calls, latency)
    return {
        "awaited cpu": awaited[0],
        "awaited wall": awaited[1],
        "blocking wall": blocking[1],
        "more cpu": blocking[0] - awaited[0],
    }


def _greeter(latency: float) -> BaseAgent:
    answer = answers.text(work.ANSWER, delay=latency)
    return BaseAgent("Greeter", "You greet.", client=ScriptedModel(lambda _: answer))


async def _awaited(tasks: int, calls: int, latency: float) -> tuple[float, float]:
    agent = _greeter(latency)

    async def caller() -> None:
        for _ in range(calls):
            content(await agent.run("hi"))

    async def all_callers() -> None:
        async with anyio.create_task_group() as group:
            for _ in range(tasks):
                group.start_soon(caller)

    await all_callers()
    agent = _greeter(latency)  # the old one's model has kept every request
    cpu, wall = time.process_time(), time.perf_counter()
    await all_callers()
    return (time.process_time() - cpu) / (tasks * calls), (time.perf_counter() - wall) / (tasks * calls)


def _blocking(count: int, calls: int, latency: float) -> tuple[float, float]:
    with sync.portal():
        _in_threads(count, calls, _greeter(latency))
        cpu, wall = time.process_time(), time.perf_counter()
        _in_threads(count, calls, _greeter(latency))
        return (time.process_time() - cpu) / (count * calls), (time.perf_counter() - wall) / (count * calls)


def _in_threads(count: int, calls: int, agent: BaseAgent) -> None:
    def caller() -> None:
        for _ in range(calls):
            content(sync.run(agent, "hi"))

    threads = [threading.Thread(target=contextvars.copy_context().run, args=(caller,)) for _ in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
