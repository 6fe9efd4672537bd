"""What running side by side brings and what it costs: tools, many runs at once, the blocking facade, cancellation.

    python benchmarks/concurrency.py [--quick] [--backend asyncio|trio|both] [--json FILE]

README.md beside this file says how to read the tables.
"""

from __future__ import annotations

import argparse
import asyncio
import contextvars
import gc
import json
import os
import platform
import statistics
import sys
import threading
import time
from collections.abc import Awaitable, Callable, Coroutine, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import anyio
from anyio.lowlevel import checkpoint
from endpoint import TOOL_CALLS, Endpoint, running

from fractal import BaseAgent, sync, tool
from fractal.models.base import ModelRequest
from fractal.models.openai import OpenAIModel
from fractal.testing import ScriptedModel, answers

MODEL_LATENCY = 0.020
TOOL_SECONDS = 0.050
Row = dict[str, str | float]


@dataclass(frozen=True)
class Plan:
    """What to measure, and how often."""

    backends: tuple[str, ...]
    rounds: int
    run_counts: tuple[int, ...] = (1, 10, 100, 1000)
    http_run_counts: tuple[int, ...] = (1, 10, 100, 1000)
    cancel_counts: tuple[int, ...] = (1, 100, 1000)
    facade_calls: int = 480
    least_runs: int = 50

    def each_round(self) -> Iterator[int]:
        """Count the rounds, with the garbage of the one before collected."""
        for number in range(self.rounds):
            gc.collect()
            yield number


def milliseconds(seconds: float) -> float:
    return round(seconds * 1000, 3)


def quantile(values: list[float], share: float) -> float:
    return sorted(values)[min(int(len(values) * share), len(values) - 1)]


# ---- 1. tools


def measure_tools(plan: Plan, _endpoint: Endpoint) -> Iterator[Row]:
    """One reply that calls 3 or 10 tools of 50 ms."""
    for backend in plan.backends:
        for kind in ("async def", "def"):
            for count in (3, 10):
                took = {
                    order: anyio.run(_tools_took, plan, kind, count, order == "sequential", backend=backend)
                    for order in ("sequential", "side by side")
                }
                yield {
                    "backend": backend,
                    "tools": f"{count} × {kind}",
                    "one after another, ms": milliseconds(took["sequential"]),
                    "side by side, ms": milliseconds(took["side by side"]),
                    "times faster": round(took["sequential"] / took["side by side"], 2),
                }


async def _tools_took(plan: Plan, kind: str, count: int, sequential: bool) -> float:
    @tool(sequential=sequential)
    async def wait_async(number: int, seconds: float) -> int:
        await anyio.sleep(seconds)
        return number

    @tool(sequential=sequential)
    def wait_plain(number: int, seconds: float) -> int:
        time.sleep(seconds)
        return number

    function: Callable[..., Any] = wait_plain if kind == "def" else wait_async

    def answer(request: ModelRequest) -> answers.AnswerLike:
        if _has_tool_results(request):
            return "done"
        seconds = float(request.transcript.messages[0]["content"])
        return [answers.call(function.__name__, {"number": n, "seconds": seconds}) for n in range(count)]

    agent = BaseAgent("Waiter", "You wait.", client=ScriptedModel(answer)).add_tool(function)
    await agent.run("0.005")  # starts the worker threads
    took: list[float] = []
    for _ in plan.each_round():
        started = time.perf_counter()
        result = await agent.run(str(TOOL_SECONDS))
        took.append(time.perf_counter() - started)
        assert [each.content for each in result.tool_results] == list(range(count)), result
    return statistics.median(took)


def _has_tool_results(request: ModelRequest) -> bool:
    return bool(request.transcript.messages[-1]["role"] == "tool")


# ---- 2. many runs


async def look(place: str) -> str:
    """Look at a place."""
    await checkpoint()
    return f"{place}: rain"


def scripted(latency: float) -> ScriptedModel:
    """The endpoint's play, in memory."""
    first = answers.calls(
        *(answers.call("look", {"place": f"place {n}"}, id=f"call_{n}") for n in range(TOOL_CALLS)),
        delay=latency,
        usage=(50, 10),
    )
    last = answers.text("It rains in one of them.", delay=latency, usage=(50, 10))
    return ScriptedModel(lambda request: last if _has_tool_results(request) else first)


def http_model(endpoint: Endpoint) -> OpenAIModel:
    return OpenAIModel(base_url=endpoint.url, api_key="none")


def measure_runs(plan: Plan, endpoint: Endpoint) -> Iterator[Row]:
    """1 to 1000 runs at once, each of 2 model calls and 3 async tool calls; a model call takes 20 ms."""
    for backend in plan.backends:
        for where in ("in memory", "over HTTP"):
            for count in plan.run_counts if where == "in memory" else plan.http_run_counts:
                yield {
                    "backend": backend,
                    "model": where,
                    "runs": count,
                    **anyio.run(_runs_took, plan, endpoint, where, count, backend=backend),
                }


async def _runs_took(plan: Plan, endpoint: Endpoint, where: str, count: int) -> Row:
    repeats = max(1, plan.least_runs // count)
    rounds: list[tuple[float, float, float]] = []
    faults = Faults()
    model: Any = http_model(endpoint) if where == "over HTTP" else None
    agent = BaseAgent("Looker", "You look.", client=model or scripted(MODEL_LATENCY)).add_tool(look)
    await _at_once(agent, count, faults)  # opens the connections
    for _ in plan.each_round():
        if model is None:  # the old one has kept every request
            agent = BaseAgent("Looker", "You look.", client=scripted(MODEL_LATENCY)).add_tool(look)
        at_endpoint = endpoint.state()["cpu"]
        wall, cpu = time.perf_counter(), time.process_time()
        for _ in range(repeats):
            await _at_once(agent, count, faults)
        wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
        at_endpoint = endpoint.state()["cpu"] - at_endpoint
        rounds.append((wall / repeats, cpu / repeats, at_endpoint / wall))
    wall, cpu, at_endpoint = (statistics.median(column) for column in zip(*rounds, strict=True))
    return {
        "wall, ms": milliseconds(wall),
        "runs/s": round(count / wall, 1),
        "CPU ms/run": milliseconds(cpu / count),
        "endpoint busy, %": round(100 * at_endpoint, 1),
        "retries": faults.retries,
        "failed": faults.failed,
    }


@dataclass
class Faults:
    """What went wrong, in all rounds together."""

    retries: int = 0
    failed: int = 0


async def _at_once(agent: BaseAgent, count: int, faults: Faults) -> None:
    async def run_one() -> None:
        result = await agent.run("Where does it rain?")
        faults.retries += max(result.usage.requests - 2, 0)
        if not result.success or len(result.tool_results) != TOOL_CALLS:
            faults.failed += 1
            print(f"a run failed: {result.error}", file=sys.stderr)

    async with anyio.create_task_group() as group:
        for _ in range(count):
            group.start_soon(run_one)


# ---- 3. the blocking facade


def measure_facade(plan: Plan, _endpoint: Endpoint) -> Iterator[Row]:
    """`sync.run` against the awaited run, as many at once; each is one model call."""
    for backend in plan.backends:
        for threads, latency in ((1, 0.0), (16, 0.0), (16, MODEL_LATENCY)):
            calls = max(plan.facade_calls // threads, 10)
            awaited: list[list[float]] = []
            blocking: list[list[float]] = []
            for _ in plan.each_round():
                agent = _greeter(latency)
                awaited.append(anyio.run(_awaited_took, agent, threads, calls, backend=backend))
                blocking.append(_blocking_took(_greeter(latency), threads, calls, backend))
            row: Row = {"backend": backend, "threads": threads, "model call, ms": milliseconds(latency)}
            for name, share in (("median", 0.5), ("p95", 0.95)):
                plain = statistics.median(quantile(times, share) for times in awaited)
                facade = statistics.median(quantile(times, share) for times in blocking)
                row |= {
                    f"awaited {name}": milliseconds(plain),
                    f"sync.run {name}": milliseconds(facade),
                    f"more, {name}": milliseconds(facade - plain),
                }
            yield row


def _greeter(latency: float) -> BaseAgent:
    answer = answers.text("hello", delay=latency)
    return BaseAgent("Greeter", "You greet.", client=ScriptedModel(lambda _: answer))


async def _awaited_took(agent: BaseAgent, tasks: int, calls: int) -> list[float]:
    took: list[float] = []

    async def caller() -> None:
        await agent.run("warm up")
        for _ in range(calls):
            started = time.perf_counter()
            await agent.run("hi")
            took.append(time.perf_counter() - started)

    async with anyio.create_task_group() as group:
        for _ in range(tasks):
            group.start_soon(caller)
    return took


def _blocking_took(agent: BaseAgent, count: int, calls: int, backend: Any) -> list[float]:
    took: list[float] = []
    all_here = threading.Barrier(count)

    def caller() -> None:
        sync.run(agent, "warm up")
        all_here.wait()
        for _ in range(calls):
            started = time.perf_counter()
            sync.run(agent, "hi")
            took.append(time.perf_counter() - started)

    with sync.portal(backend):
        threads = [threading.Thread(target=contextvars.copy_context().run, args=(caller,)) for _ in range(count)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert len(took) == count * calls, "a thread has failed"
    return took


# ---- 4. cancellation

Run = Callable[[], Coroutine[Any, Any, object]]


class UnderWay:
    """Counts what has begun and never ends by itself."""

    def __init__(self, wanted: int) -> None:
        self.wanted = wanted
        self.all_here = anyio.Event()

    async def hang(self) -> None:
        self.wanted -= 1
        if not self.wanted:
            self.all_here.set()
        await anyio.sleep_forever()


def measure_cancellation(plan: Plan, endpoint: Endpoint) -> Iterator[Row]:
    """From the cancel until all runs have returned; and what is left then."""
    for backend in plan.backends:
        ways = ("scope.cancel()",) if backend == "trio" else ("scope.cancel()", "Task.cancel()", "asyncio.wait_for")
        for way in ways:
            for place in ("async tools", "model in memory", "model over HTTP"):
                row: Row = {"backend": backend, "by": way, "runs are in": place}
                tasks_left, requests_left = 0, 0
                for count in plan.cancel_counts:
                    took: list[float] = []
                    for _ in plan.each_round():
                        measured = anyio.run(_cancel, endpoint, way, place, count, backend=backend)
                        took.append(measured[0])
                        tasks_left += measured[1]
                        requests_left += measured[2]
                    row[f"{count} run{'s' * (count > 1)}, ms"] = milliseconds(statistics.median(took))
                yield row | {"tasks left": tasks_left, "requests left": requests_left}


async def _cancel(endpoint: Endpoint, way: str, place: str, count: int) -> tuple[float, int, int]:
    model = http_model(endpoint) if place == "model over HTTP" else scripted(0.0)
    await BaseAgent("Looker", "You look.", client=model).add_tool(look).run("Where does it rain?")  # warm-up
    tasks_before = _tasks()
    hanging, wait_until_under_way = _hanging_run(endpoint, place, count)

    async def run() -> None:
        result: Any = await hanging()
        raise RuntimeError(f"a run that should hang has ended: {result}")

    latency = await _WAYS[way](run, wait_until_under_way, count)
    tasks_left = _tasks() - tasks_before
    # The kernel tells the endpoint of closed connections in its own time.
    patience = time.perf_counter() + 2.0
    while (requests_left := int(endpoint.state()["waiting"])) and time.perf_counter() < patience:  # noqa: ASYNC110
        await anyio.sleep(0.01)
    return latency, tasks_left, requests_left


def _hanging_run(endpoint: Endpoint, place: str, count: int) -> tuple[Run, Callable[[], Awaitable[None]]]:
    """A run that hangs at a place, and a function that waits until so many of them do."""
    if place == "model over HTTP":
        agent = BaseAgent("Looker", "You look.", "hang", client=http_model(endpoint))

        async def wait_for_endpoint() -> None:
            while endpoint.state()["waiting"] < count:  # noqa: ASYNC110  # it is in another process
                await anyio.sleep(0.005)

        return partial(agent.run, "go"), wait_for_endpoint
    if place == "async tools":
        under_way = UnderWay(count * TOOL_CALLS)

        async def hang(place: str) -> None:
            await under_way.hang()

        agent = BaseAgent("Looker", "You look.", client=scripted(0.0)).add_tool(hang, name="look")
    else:
        under_way = UnderWay(count)

        class Hanging:
            async def respond(self, request: ModelRequest) -> Any:
                await under_way.hang()

        agent = BaseAgent("Looker", "You look.", client=Hanging())
    return partial(agent.run, "go"), under_way.all_here.wait


async def _by_scope(run: Run, wait_until_under_way: Callable[[], Awaitable[None]], count: int) -> float:
    async with anyio.create_task_group() as group:
        for _ in range(count):
            group.start_soon(run)
        await wait_until_under_way()
        cancelled = time.perf_counter()
        group.cancel_scope.cancel()
    return time.perf_counter() - cancelled


async def _by_task(run: Run, wait_until_under_way: Callable[[], Awaitable[None]], count: int) -> float:
    tasks = [asyncio.ensure_future(run()) for _ in range(count)]
    await wait_until_under_way()
    cancelled = time.perf_counter()
    for task in tasks:
        task.cancel()
    ended = await asyncio.gather(*tasks, return_exceptions=True)
    took = time.perf_counter() - cancelled
    assert all(isinstance(each, asyncio.CancelledError) for each in ended), ended
    return took


async def _by_wait_for(run: Run, wait_until_under_way: Callable[[], Awaitable[None]], count: int) -> float:
    runs = asyncio.gather(*(run() for _ in range(count)))
    await wait_until_under_way()
    due = time.perf_counter() + 0.05
    try:
        await asyncio.wait_for(runs, 0.05)
    except TimeoutError:
        return time.perf_counter() - due
    raise AssertionError("the runs have ended by themselves")


_WAYS: dict[str, Callable[..., Awaitable[float]]] = {
    "scope.cancel()": _by_scope,
    "Task.cancel()": _by_task,
    "asyncio.wait_for": _by_wait_for,
}


def _tasks() -> int:
    """How many tasks the running loop has."""
    return len(anyio.get_running_tasks())


# ---- the tables

SECTIONS = {
    "tools": ("Tools of 50 ms: one after another, and side by side", measure_tools),
    "runs": ("Runs at once: 2 model calls of 20 ms and 3 tool calls each", measure_runs),
    "facade": ("The blocking facade: sync.run against the awaited run, ms", measure_facade),
    "cancellation": ("Cancellation: from the cancel until all have returned", measure_cancellation),
}


def show(title: str, rows: list[Row]) -> None:
    """Print a table: a rich one on a terminal, if rich is there, else plain text."""
    columns = list(rows[0])
    cells = [[_text(row[column]) for column in columns] for row in rows]
    if sys.stdout.isatty() and _show_rich(title, columns, cells):
        return
    widths = [max(map(len, column)) for column in zip(columns, *cells, strict=True)]
    print(f"\n{title}\n")
    for line in (columns, ["-" * width for width in widths], *cells):
        print("  ".join(_aligned(text, width) for text, width in zip(line, widths, strict=True)).rstrip(), flush=True)


def _show_rich(title: str, columns: list[str], cells: list[list[str]]) -> bool:
    try:
        from rich.console import Console
        from rich.table import Table
    except ImportError:
        return False
    table = Table(title=title, title_justify="left")
    for index, column in enumerate(columns):
        table.add_column(column, justify="right" if _is_number(cells[0][index]) else "left")
    for line in cells:
        table.add_row(*line)
    Console().print(table)
    return True


def _text(value: str | float) -> str:
    return f"{value:.2f}" if isinstance(value, float) else str(value)


def _is_number(text: str) -> bool:
    return text.lstrip("-").replace(".", "", 1).isdigit()


def _aligned(text: str, width: int) -> str:
    return text.rjust(width) if _is_number(text) else text.ljust(width)


def machine() -> dict[str, str | int]:
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 0
    return {
        "python": f"{platform.python_implementation()} {platform.python_version()}",
        "system": f"{platform.system()} {platform.machine()}",
        "cores": cores,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="one round of each, to see that it works")
    parser.add_argument("--backend", choices=("asyncio", "trio", "both"), default="both")
    parser.add_argument("--only", choices=tuple(SECTIONS), help="one table")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the rows there")
    options = parser.parse_args()
    backends = ("asyncio", "trio") if options.backend == "both" else (options.backend,)
    plan = Plan(backends, rounds=3)
    if options.quick:
        plan = Plan(backends, 1, http_run_counts=(1, 10, 100), cancel_counts=(1, 100), facade_calls=80, least_runs=10)
    print(", ".join(f"{name}: {value}" for name, value in {**machine(), "rounds": plan.rounds}.items()))
    found: dict[str, list[Row]] = {}
    with running(MODEL_LATENCY) as endpoint:
        for name, (title, measure) in SECTIONS.items():
            if options.only in (None, name):
                found[name] = list(measure(plan, endpoint))
                show(title, found[name])
    if options.json is not None:
        facts = {"machine": machine(), "rounds": plan.rounds, **found}
        options.json.write_text(json.dumps(facts, indent=1, ensure_ascii=False) + "\n")


if __name__ == "__main__":
    main()
