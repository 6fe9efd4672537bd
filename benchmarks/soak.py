"""Many mixed runs in one process: what it holds at each tenth, which must not grow.

`python -m benchmarks.soak [RUNS]`; all runs are in memory, so the numbers are those of the library alone.
"""

from __future__ import annotations

import gc
import os
import sys
import threading
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from functools import partial

import anyio
from anyio.lowlevel import checkpoint

from fractal import BaseAgent, RunCancelled, abandoned_threads, sync, tool
from fractal.testing import ScriptedModel, answers

TENTHS = 10
BATCH = 200
"""Runs between two looks at what is left to do; a fifth of them at once."""


@dataclass(frozen=True)
class Held:
    """What the process holds."""

    runs: int
    threads: int
    files: int
    memory: int
    objects: int

    def __str__(self) -> str:
        return (
            f"{self.runs:7} runs: {self.threads:3} threads, {self.files:3} files, "
            f"{self.memory / 2**20:6.1f} MiB, {self.objects:7} objects"
        )


class _Model(ScriptedModel):
    """Asks for a tool, and answers then; keeps no requests, as tests would have it."""

    def __init__(self, *names: str, delay: float = 0.0) -> None:
        def reply(request: object) -> answers.AnswerLike:
            self.requests.clear()
            asks = self._asks and len(request.messages) < 3  # type: ignore[attr-defined]
            return answers.calls(*self._asks, delay=delay) if asks else answers.text("done", delay=delay)

        super().__init__(reply)
        self._asks = [answers.call(name, {"query": "?"} if name == "ask" else {}) for name in names]


@tool
async def look() -> str:
    await checkpoint()
    return "seen"


@tool
def read() -> str:
    return "read"


@tool
async def hang() -> None:
    try:
        await anyio.sleep(60)
    finally:
        await checkpoint()


def _agent(*names: str, delay: float = 0.0) -> BaseAgent:
    return BaseAgent("A", "a", client=_Model(*names, delay=delay), toolkit=[look, read, hang])


_TOOLS, _HANGING, _CHILD = _agent("look", "read"), _agent("hang"), _agent("look")
_DELEGATING = _agent("ask", "look").register_delegate(_CHILD, "ask")


async def _streamed(*, leave: bool) -> None:
    async with _TOOLS.stream("go", buffer=1) as stream:
        async for _ in stream:
            if leave:
                break


async def _cancelled() -> None:
    with anyio.move_on_after(0.002):
        await _HANGING.run("go")


async def _in_facade() -> None:
    def ask() -> None:
        handle = sync.start(_HANGING, "go")
        sync.run(_TOOLS, "go")
        handle.cancel()
        with suppress(RunCancelled):
            handle.result()

    await anyio.to_thread.run_sync(ask)


async def _mixed(count: int) -> int:
    """About so many runs of all kinds, and how many they were."""
    kinds = [
        (1, partial(_TOOLS.run, "go")),
        (2, partial(_DELEGATING.run, "go")),
        (1, partial(_streamed, leave=False)),
        (1, partial(_streamed, leave=True)),
        (1, _cancelled),
        (1, partial(_HANGING.run, "go", timeout=0.002)),
        (2, _in_facade),
    ]
    made = 0
    while made < count:
        async with anyio.create_task_group() as group:
            for _ in range(4):
                for runs, function in kinds:
                    made += runs
                    group.start_soon(function)
    return made


def soak(runs: int, backend: str = "asyncio") -> Iterator[Held]:
    """Make so many runs, in event loops that come and go, and tell at each tenth what the process holds."""
    made = 0
    for tenth in range(1, TENTHS + 1):
        while made < runs * tenth // TENTHS:
            left = runs * tenth // TENTHS - made
            made += anyio.run(_mixed, min(left, BATCH), backend=backend)
        yield _held(made)


def _held(runs: int) -> Held:
    pause = threading.Event()
    for _ in range(200):  # what ends in threads has ended
        if not abandoned_threads():
            break
        pause.wait(0.01)
    gc.collect()
    with open("/proc/self/statm") as file:
        pages = int(file.read().split()[1])
    files = len(os.listdir("/proc/self/fd"))
    return Held(runs, threading.active_count(), files, pages * os.sysconf("SC_PAGE_SIZE"), len(gc.get_objects()))


if __name__ == "__main__":
    for held in soak(int(sys.argv[1]) if len(sys.argv) > 1 else 30_000):
        print(held, flush=True)
