"""A process that measures one adapter: it imports it once, and forks for each measurement.

    python -m benchmarks.child NAME            # a job as a line of JSON in, a line of JSON out, until the input ends
    python -m benchmarks.child NAME --first    # one job, once, in this process: what a first run costs

A fork has the imports behind it and nothing else: no connection, no warm cache of another scenario, a peak of memory of
its own.
"""

from __future__ import annotations

import asyncio
import gc
import importlib.metadata
import json
import os
import resource
import signal
import sys
import threading
import time
import urllib.request
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import anyio

from benchmarks import work
from benchmarks.adapters import ADAPTERS, Adapter, Task

TOOL_SECONDS = 0.010
Result = dict[str, Any]


@dataclass(frozen=True)
class Job:
    """What is to be measured.

    Args:
        kind: Name of the adapter's method, or `cancel`, `waiting` or `facade`.
        url: The endpoint's, with `/v1`.
        seen: Where it tells what it has seen.
        size: As in `Task`.
        at_once: Runs side by side.
        each: Runs that are measured, one after another, in each of those places.
        warm: Runs before, in each place.
        connections: As in `Task`.
        tool: `async`, `plain` (it takes TOOL_SECONDS and blocks) or `hang`.
        calls: Calls of `hang` in each run.
        by: How to cancel: `task` or `scope`.
        latency: For `facade`: seconds that its model takes.
        limit: Seconds after which the measurement is given up.
        profile: Look where the time goes, instead of how much it is.
    """

    kind: str
    url: str
    seen: str
    size: int = 1
    at_once: int = 1
    each: int = 1
    warm: int = 1
    connections: int | None = None
    tool: str = "async"
    calls: int = 3
    by: str = "task"
    latency: float = 0.0
    limit: int = 100
    profile: bool = False

    def task(self) -> Task:
        """The adapter's part of it."""
        method = self.kind
        if method in ("cancel", "waiting"):
            method = "delegate" if self.size > 1 else "tools"
        return Task(method, self.url, self.size, self.at_once, self.connections, TOOLS[self.tool])


# ---- the tools


def look_plain(place: str) -> str:
    """Look at a place."""
    time.sleep(TOOL_SECONDS)
    return work.look_plain(place)


async def look_forever(place: str) -> str:
    """Look at a place."""
    work.Looks.count += 1
    await anyio.sleep_forever()
    return place


for _each in (look_plain, look_forever):
    _each.__name__ = _each.__qualname__ = "look"
TOOLS: dict[str, Callable[..., Any]] = {"async": work.look, "plain": look_plain, "hang": look_forever}


# ---- measuring


def measure(adapter: Adapter, job: Job) -> Result:
    """Do the job."""
    if job.kind == "facade":
        from benchmarks.facade import facade

        return facade(job.at_once, job.each, job.latency)
    if adapter.backend is None:
        return in_threads(adapter, job)
    backend, options = adapter.backend
    measure = {"cancel": cancelled, "waiting": waiting}.get(job.kind, on_a_loop)
    return anyio.run(measure, adapter, job, backend=backend, backend_options=options)


async def on_a_loop(adapter: Adapter, job: Job) -> Result:
    """Measure tasks side by side."""
    one = getattr(adapter, job.task().kind)(job.task())

    async def place(times: int) -> None:
        for _ in range(times):
            check(job, await one())

    async def all_places(times: int) -> None:
        async with anyio.create_task_group() as group:
            for _ in range(job.at_once):
                group.start_soon(place, times)

    found: Result = {}
    try:
        await all_places(job.warm)
        with measured(job, found):
            await all_places(job.each)
    finally:
        await adapter.aclose()
    return found


def in_threads(adapter: Adapter, job: Job) -> Result:
    """Measure threads side by side."""
    one: Callable[[], Any] = getattr(adapter, job.task().kind)(job.task())
    failures: list[BaseException] = []

    def place(times: int) -> None:
        try:
            for _ in range(times):
                check(job, one())
        except BaseException as error:
            failures.append(error)

    def all_places(times: int) -> None:
        threads = [threading.Thread(target=place, args=(times,)) for _ in range(job.at_once)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        if failures:
            raise failures[0]

    found: Result = {}
    all_places(job.warm)
    with measured(job, found):
        all_places(job.each)
    return found


@contextmanager
def measured(job: Job, found: Result) -> Iterator[None]:
    """Notes what the block costs, for one run; and that each run has called its tools."""
    runs = job.at_once * job.each
    gc.collect()
    looks = work.Looks.count
    wall, cpu = time.perf_counter(), time.process_time()
    yield
    cpu, wall = time.process_time() - cpu, time.perf_counter() - wall
    found |= {"cpu": cpu / runs, "wall": wall / runs, "total": wall, "looks": (work.Looks.count - looks) / runs}
    # From the import on, so that a warm-up that has all runs side by side hides nothing.
    found["memory"] = (peak_memory() - MEMORY["imported"]) / job.at_once


def check(job: Job, answer: Any) -> None:
    """See that the answer is the right one."""
    if job.kind == "stream":
        right = answer == work.CHUNKS
    elif job.kind == "object":
        right = (answer.city, answer.hours) == ("Paris", [9, 12, 15])
    elif job.kind == "delegate":
        right = answer == work.REPORT
    else:
        right = answer == work.ANSWER
    if not right:
        raise ValueError(f"a wrong answer: {answer!r}")


MEMORY = {"imported": 0.0}


def peak_memory() -> float:
    """The most that this process has had in memory, in bytes."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


# ---- cancellation


async def cancelled(adapter: Adapter, job: Job) -> Result:
    """From the cancel until all runs are back; and what is left then, of tasks and at the endpoint."""
    one = adapter.tools(job.task())
    tasks_before = len(anyio.get_running_tasks())
    cancel = by_task if job.by == "task" and (adapter.backend or "")[0] == "asyncio" else by_scope
    took, cpu = await cancel(one, partial(under_way, job, job.at_once), job.at_once)
    tasks = len(anyio.get_running_tasks()) - tasks_before
    # The kernel tells the endpoint of closed connections in its own time.
    patience = time.perf_counter() + 2.0
    while (requests := await at_endpoint(job)) and time.perf_counter() < patience:  # noqa: ASYNC110
        await anyio.sleep(0.02)
    await adapter.aclose()
    return {"total": took, "wall": took / job.at_once, "cpu": cpu / job.at_once, "tasks": tasks, "requests": requests}


async def at_endpoint(job: Job) -> int:
    """Requests that the endpoint has not answered."""

    def ask() -> int:
        with urllib.request.urlopen(job.seen) as answer:
            return int(json.load(answer)["waiting"])

    return await anyio.to_thread.run_sync(ask)


async def under_way(job: Job, count: int) -> None:
    """Wait until so many runs hang, in the model or in their tools."""
    while True:
        if job.tool == "hang":
            if work.Looks.count == job.calls * count:
                return
        elif await at_endpoint(job) == count:
            return
        await anyio.sleep(0.02)


# ---- memory


async def waiting(adapter: Adapter, job: Job) -> Result:
    """What the process needs for each run more that waits, once one does."""
    one = getattr(adapter, job.task().kind)(job.task())
    async with anyio.create_task_group() as group:
        group.start_soon(one)
        await under_way(job, 1)
        before = memory_now()
        for _ in range(job.at_once):
            group.start_soon(one)
        await under_way(job, job.at_once + 1)
        memory = memory_now() - before
        group.cancel_scope.cancel()
    await adapter.aclose()
    return {"memory": memory / job.at_once}


def memory_now() -> float:
    """Bytes that the process has in memory, garbage left out."""
    gc.collect()
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * resource.getpagesize()


# ---- the ways to cancel


async def by_scope(
    one: Callable[[], Awaitable[Any]], under_way: Callable[[], Awaitable[None]], count: int
) -> tuple[float, float]:
    """One cancel scope around all of them."""
    async with anyio.create_task_group() as group:
        for _ in range(count):
            group.start_soon(one)
        await under_way()
        wall, cpu = time.perf_counter(), time.process_time()
        group.cancel_scope.cancel()
    return time.perf_counter() - wall, time.process_time() - cpu


async def by_task(
    one: Callable[[], Awaitable[Any]], under_way: Callable[[], Awaitable[None]], count: int
) -> tuple[float, float]:
    """asyncio's own way: each task for itself."""
    tasks = [asyncio.ensure_future(one()) for _ in range(count)]
    await under_way()
    wall, cpu = time.perf_counter(), time.process_time()
    for task in tasks:
        task.cancel()
    ended = await asyncio.gather(*tasks, return_exceptions=True)
    took = time.perf_counter() - wall, time.process_time() - cpu
    others = [each for each in ended if not isinstance(each, asyncio.CancelledError)]
    if others:
        raise RuntimeError(f"{len(others)} runs did not end by the cancellation; the first: {others[0]!r}")
    return took


# ---- the process


def in_a_fork(adapter: Adapter, job: Job, out: int) -> None:
    """Do a job in a process of its own and write its line; or one that says why there is none."""
    child = os.fork()
    if child == 0:
        signal.alarm(job.limit)
        write(out, safely(adapter, job))
        os._exit(0)
    _, status = os.waitpid(child, 0)
    if os.WIFSIGNALED(status):
        late = os.WTERMSIG(status) == signal.SIGALRM
        why = f"more than {job.limit} s" if late else f"ended by signal {os.WTERMSIG(status)}"
        write(out, {"failed": why})


def safely(adapter: Adapter, job: Job) -> Result:
    """The result, or what went wrong."""
    try:
        return profiled(adapter, job) if job.profile else measure(adapter, job)
    except BaseException as error:
        while isinstance(error, BaseExceptionGroup):
            error = error.exceptions[0]
        if os.environ.get("BENCHMARKS_VERBOSE"):
            import traceback

            traceback.print_exception(error)
        return {"failed": f"{type(error).__name__}: {error}"[:300]}


def profiled(adapter: Adapter, job: Job) -> Result:
    """The functions that took most, as cProfile has them; of the main thread, warm-up and all."""
    import cProfile
    import io
    import pstats

    profile = cProfile.Profile()
    profile.runcall(measure, adapter, job)
    text = io.StringIO()
    pstats.Stats(profile, stream=text).strip_dirs().sort_stats("tottime").print_stats(40)
    return {"profile": text.getvalue()}


def write(out: int, value: object) -> None:
    os.write(out, json.dumps(value).encode() + b"\n")


def main() -> None:
    """Take jobs until there are no more."""
    out = os.dup(1)
    os.dup2(2, 1)  # what a library prints is not ours to say
    work.raise_file_limit()
    work.pin(0)
    adapter = ADAPTERS[sys.argv[1]].load()
    if "--first" in sys.argv:
        write(out, safely(adapter, Job(**json.loads(sys.stdin.readline()))))
        return
    versions = {name: importlib.metadata.version(name) for name in adapter.packages}
    facts = {"versions": versions, "cannot": adapter.cannot, "play": adapter.play, "imports": adapter.imports}
    write(out, facts)
    gc.collect()
    gc.freeze()  # a fork then copies fewer pages
    MEMORY["imported"] = peak_memory()
    for line in sys.stdin:
        in_a_fork(adapter, Job(**json.loads(line)), out)


if __name__ == "__main__":
    main()
