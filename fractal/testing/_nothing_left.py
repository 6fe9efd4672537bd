"""A look at what a block of code has left behind."""

from __future__ import annotations

import functools
import gc
from collections.abc import Iterable
from importlib import import_module
from importlib.util import find_spec
from types import TracebackType
from typing import Any, Self

import anyio
from anyio.lowlevel import current_token

from fractal._concurrency.stuck import line_of
from fractal.models._http.pool import close_idle_pools
from fractal.sync._portal import PortalCall, shared_portal
from fractal.testing._leftovers import Belongings, running_tasks, wait_until_empty

__all__ = ["NothingLeft", "assert_nothing_left"]

_POLL = 0.005


class NothingLeft:
    """The block of `assert_nothing_left`.

    Args:
        within: Seconds that what is ending may take.
    """

    def __init__(self, within: float) -> None:
        self._within = within

    def __enter__(self) -> Self:
        _warm_up()
        self._portal_ran = shared_portal().is_running
        self._before = Belongings()
        self._tasks_before = {task.id for task in _tasks_here()}
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if error is None and self._look():
            gc.collect()  # what nobody refers to any more is closed by this, and warns if it should have been before
            _require_none(wait_until_empty(self._look, self._within))

    async def __aenter__(self) -> Self:
        return self.__enter__()

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if error is not None:
            return
        await close_idle_pools()
        if not self._look():
            return
        gc.collect()
        with anyio.move_on_after(self._within):
            while self._look():  # noqa: ASYNC110  # nobody tells when a thread or a socket of the system is gone
                await anyio.sleep(_POLL)
        _require_none(self._look())

    def _look(self) -> list[str]:
        tasks = [f"task {task.name!r} at {_line(task)}" for task in _tasks_here() if task.id not in self._tasks_before]
        portal = shared_portal()
        if portal.is_running and not portal.is_this_thread():
            tasks += PortalCall(_put_away_and_look, portal).result_or_cancel()
            if not tasks and not self._portal_ran:
                portal.close()  # it starts anew when it is needed
        return tasks + self._before.left(in_loop=_is_in_loop())


def assert_nothing_left(*, within: float = 5.0) -> NothingLeft:
    """Check, at the end of a block, that it has left nothing: no task, thread, socket or other open file.

    Use it as `with assert_nothing_left():` around what runs event loops of its own, and as
    `async with assert_nothing_left():` around what awaits; only the latter sees what of the loop's own is still ending,
    so in async code use that. Threads of tools that a result lists as abandoned may go on. What is kept for the next
    call is put away first: idle connections to endpoints, and the event loop of `fractal.sync`.

    A block that ends with an exception is not looked at: the exception is told.

    Args:
        within: Seconds that what is ending may take.

    Raises:
        AssertionError: At the end of the block: something is left; with a line for each, and where it is.

    Example:
        >>> import anyio
        >>> from fractal import BaseAgent
        >>> from fractal.testing import ScriptedModel, assert_nothing_left
        >>> with assert_nothing_left():
        ...     result = anyio.run(BaseAgent("Greeter", "You greet.", client=ScriptedModel(["hello"])).run, "hi")
    """
    return NothingLeft(within)


@functools.cache
def _warm_up() -> None:
    """Open the pipe that uvloop opens once and never closes; a block may be the first to use it."""
    if find_spec("uvloop") is not None:
        uvloop: Any = import_module("uvloop")
        uvloop.new_event_loop().close()


def _require_none(left: Iterable[str]) -> None:
    lines = "".join(f"\n  {line}" for line in left)
    if lines:
        raise AssertionError(f"something is left:{lines}")


def _is_in_loop() -> bool:
    try:
        current_token()
    except RuntimeError:
        return False
    return True


def _tasks_here() -> list[anyio.TaskInfo]:
    return running_tasks() if _is_in_loop() else []


def _line(task: anyio.TaskInfo) -> str:
    return line_of(task.coro) or line_of(task.coro, frozenset()) or "a place unknown"


async def _put_away_and_look() -> list[str]:
    """Close unused resources in the shared portal, and name the tasks that go on there."""
    await close_idle_pools()
    own = anyio.get_current_task()
    return [
        f"task {task.name!r}, on the event loop of fractal.sync, at {_line(task)}"
        for task in running_tasks()
        if task.id not in (own.id, own.parent_id)
    ]
