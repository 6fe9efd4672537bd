"""Ways to begin runs in a tool that random programs take, by the names that `tests.programs` has for them."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Awaitable, Callable, Sequence
from contextlib import suppress
from contextvars import copy_context
from functools import partial
from typing import TYPE_CHECKING, Any

import anyio
import anyio.to_thread
import trio

import fractal.sync
from fractal import BaseAgent, RunError, run_many, stream_many
from fractal._concurrency.background import (
    Unstarted,  # AnyIO's groups leave a coroutine where asyncio cancels all tasks
)

if TYPE_CHECKING:
    from tests.played import Played

__all__ = ["begin", "begin_in_thread", "cancels_its_own"]


class Begun:
    """What a step begins.

    Args:
        played: The program.
        agent: Whose tool it is.
        children: The agents that are to run.
        patience: Seconds to wait before something else is done with them.
    """

    def __init__(self, played: Played, agent: BaseAgent, children: Sequence[BaseAgent], patience: float) -> None:
        self.played, self.agent, self.children, self.patience = played, agent, children, patience

    @property
    def first(self) -> BaseAgent:
        return self.children[0]

    def runs(self) -> list[Awaitable[Any]]:
        return [child.run("?") for child in self.children]


async def begin(way: str, begun: Begun) -> None:
    """Begin it in an async tool."""
    await globals()[way](begun)


def begin_in_thread(way: str, begun: Begun) -> None:
    """Begin it in a plain tool."""
    globals()[way](begun)


async def quietly(function: Callable[[], Awaitable[object]]) -> None:
    with suppress(RunError):  # of which event loops would tell, where nobody asks for it
        await function()


# ---- on both backends


async def awaited(begun: Begun) -> None:
    for child in begun.children:
        await child.run("?")


async def called(begun: Begun) -> None:
    for child in begun.children:
        await begun.agent.call_agent(child, "?")


async def in_a_group(begun: Begun) -> None:
    async with anyio.create_task_group() as group:
        for child in begun.children:
            group.start_soon(Unstarted, child.run, "?")


async def all_in_a_scope(begun: Begun) -> None:
    with anyio.move_on_after(begun.patience):
        await in_a_group(begun)


async def in_a_foreign_group(begun: Begun) -> None:
    """In a task group that somebody else has opened, and wait for its end."""
    if not begun.played.is_home:  # the group is one of another event loop
        return await awaited(begun)
    ended = anyio.Event()

    async def run() -> None:
        try:
            await quietly(partial(begun.first.run, "?"))
        finally:
            ended.set()

    begun.played.foreign.start_soon(Unstarted, run)
    await ended.wait()


async def forgotten_in_a_foreign_group(begun: Begun) -> None:
    if not begun.played.is_home:
        return await awaited(begun)
    for child in begun.children:
        begun.played.foreign.start_soon(Unstarted, quietly, partial(child.run, "?"))
    await anyio.sleep(begun.patience if begun.patience < 0.01 else 0)


async def in_a_shield(begun: Begun) -> None:
    with anyio.move_on_after(min(begun.patience, 0.01), shield=True):
        await awaited(begun)


async def streamed(begun: Begun) -> None:
    async with begun.first.stream("?", buffer=1) as stream:
        async for _ in stream:
            pass


async def stream_left(begun: Begun) -> None:
    async with begun.first.stream("?", buffer=0) as stream:
        with anyio.move_on_after(begun.patience):
            async for _ in stream:
                await anyio.sleep(0)


async def stream_left_open(begun: Begun) -> None:
    for child in begun.children:
        stream = await child.stream("?", buffer=0).__aenter__()
        if begun.patience:
            await stream.__anext__()


async def batch(begun: Begun) -> None:
    await run_many(begun.first, ["?", "!"])


async def batch_streamed(begun: Begun) -> None:
    async with stream_many(begun.first, ["?", "!"], buffer=0) as results:
        async for _ in results:
            if not begun.patience:
                break


async def by_its_tool(begun: Begun) -> None:
    """Call a tool of the child's, without a run of it."""
    await begun.first.execute_tool(begun.played.first_tool(begun.first), turn=0, number=0)


# ---- on asyncio


async def gathered(begun: Begun) -> None:
    await asyncio.gather(*begun.runs())


async def created(begun: Begun) -> None:
    tasks = [asyncio.ensure_future(quietly(partial(child.run, "?"))) for child in begun.children]
    for task in tasks:
        await task


async def forgotten(begun: Begun) -> None:
    for child in begun.children:
        begun.played.kept.append(asyncio.ensure_future(quietly(partial(child.run, "?"))))
    await anyio.sleep(begun.patience if begun.patience < 0.01 else 0)


async def waited_for(begun: Begun) -> None:
    with suppress(TimeoutError):
        await asyncio.wait_for(begun.first.run("?"), begun.patience)


async def shielded(begun: Begun) -> None:
    await asyncio.shield(asyncio.ensure_future(quietly(partial(begun.first.run, "?"))))


async def in_a_native_group(begun: Begun) -> None:
    async with asyncio.TaskGroup() as group:
        for child in begun.children:
            group.create_task(quietly(partial(child.run, "?")))


async def in_a_native_timeout(begun: Begun) -> None:
    with suppress(TimeoutError):
        async with asyncio.timeout(begun.patience):
            await awaited(begun)


async def cancelled_natively(begun: Begun) -> None:
    tasks = [asyncio.ensure_future(quietly(partial(child.run, "?"))) for child in begun.children]
    await _cancel(begun, tasks)


async def gathered_and_cancelled(begun: Begun) -> None:
    async def gather() -> None:
        with suppress(RunError):
            await asyncio.gather(*begun.runs())

    await _cancel(begun, [asyncio.ensure_future(gather())])


async def _cancel(begun: Begun, tasks: Sequence[asyncio.Task[None]]) -> None:
    """Cancel tasks that await runs, several times, and see that they obey."""
    await anyio.sleep(min(begun.patience, 0.01))
    cancelled = [task for task in tasks if task.cancel()]
    await asyncio.sleep(0)
    for task in cancelled[1:]:
        task.cancel()
    await asyncio.wait(tasks)
    for task in cancelled:
        begun.played.expect(task.cancelled(), "a task that a tool has cancelled ended in another way")


async def cancels_its_own() -> None:
    """Await what this has cancelled itself, which no run may take for a cancellation of its own."""
    if anyio.get_cancelled_exc_class() is asyncio.CancelledError:
        task = asyncio.ensure_future(asyncio.sleep(1))
        await asyncio.sleep(0)
        task.cancel()
        await task
    with anyio.CancelScope() as scope:
        scope.cancel()
        await anyio.sleep(1)


# ---- on trio


async def in_a_nursery(begun: Begun) -> None:
    async with trio.open_nursery() as nursery:
        for child in begun.children:
            nursery.start_soon(child.run, "?")


async def in_a_nursery_that_is_cut(begun: Begun) -> None:
    async with trio.open_nursery() as nursery:
        for child in begun.children:
            nursery.start_soon(child.run, "?")
        await anyio.sleep(min(begun.patience, 0.01))
        nursery.cancel_scope.cancel()


async def in_a_system_task(begun: Begun) -> None:
    for child in begun.children:
        trio.lowlevel.spawn_system_task(quietly, partial(child.run, "?"), context=copy_context())
    await anyio.sleep(min(begun.patience, 0.01))


# ---- in threads


def _ask(begun: Begun) -> None:
    with suppress(RunError):
        fractal.sync.run(begun.first, "?")


async def in_a_worker_thread(begun: Begun) -> None:
    if anyio.get_cancelled_exc_class() is asyncio.CancelledError and begun.patience:
        await asyncio.to_thread(_ask, begun)
    else:
        await anyio.to_thread.run_sync(_ask, begun, abandon_on_cancel=begun.patience > 0.01)


async def in_a_thread_of_its_own(begun: Begun) -> None:
    _thread(begun, partial(_ask, begun))
    await anyio.sleep(min(begun.patience, 0.01))


async def started_in_a_thread(begun: Begun) -> None:
    _thread(begun, partial(started_and_left, begun))
    await anyio.sleep(min(begun.patience, 0.01))


def _thread(begun: Begun, function: Callable[[], None]) -> None:
    thread = threading.Thread(target=partial(copy_context().run, function))
    thread.start()
    begun.played.threads.append(thread)


# ---- in a plain tool


def blocking(begun: Begun) -> None:
    for child in begun.children:
        fractal.sync.run(child, "?")


def started(begun: Begun) -> None:
    for handle in [fractal.sync.start(child, "?") for child in begun.children]:
        handle.result()


def started_and_left(begun: Begun) -> None:
    with suppress(RunError):  # its run is over
        for child in begun.children:
            fractal.sync.start(child, "?")


def started_and_cancelled(begun: Begun) -> None:
    handles = [fractal.sync.start(child, "?") for child in begun.children]
    time.sleep(min(begun.patience, 0.01))
    for handle in handles:
        handle.cancel()
    for handle in handles:
        with suppress(RunError):
            handle.result()


def read(begun: Begun) -> None:
    with fractal.sync.stream(begun.first, "?", buffer=1) as stream:
        for _ in stream:
            pass


def read_and_left(begun: Begun) -> None:
    with fractal.sync.stream(begun.first, "?", buffer=0) as stream:
        for _ in stream:
            break


def batch_blocking(begun: Begun) -> None:
    fractal.sync.run_many(begun.first, ["?", "!"])
