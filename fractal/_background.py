"""Tasks that are no children of the tasks that start them, and what they tell, as a block of the reader's.

An async generator around a block may be closed by the garbage collector, in a task that has never seen the scopes of
the one that entered it. So the block holds none: it owns a task of the event loop, and cancels and joins it at its end.
"""

from __future__ import annotations

import contextvars
import math
import sys
from abc import ABC, abstractmethod
from contextlib import suppress
from contextvars import ContextVar
from functools import partial
from typing import TYPE_CHECKING, Any, ClassVar, Generic, Self, TypeVar

import anyio

from fractal._feed import Feed
from fractal._scopes import stop_if_cancelled
from fractal.errors import InvalidArguments

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Coroutine, Iterable
    from types import TracebackType

__all__ = ["Background", "FeedBlock", "end_all"]

T = TypeVar("T")


class Background:
    """A task of the event loop, owned by whoever holds this and must `join` it; no child of the task that starts it.

    It starts with the context and the deadline of its starter.

    Args:
        function: What it runs. What that raises is for `join`; when it is cancelled, `join` does not raise.
        name: Name of the task.
    """

    def __init__(self, function: Callable[[], Awaitable[object]], name: str) -> None:
        self._scope = anyio.CancelScope(deadline=anyio.current_effective_deadline())
        self._ended = anyio.Event()
        self._error: BaseException | None = None
        # Not kept: contexts that were copied in the task may live long, and know this, but not what the task had.
        _spawn(partial(self._main, function), name, self._ended.set)

    async def _main(self, function: Callable[[], Awaitable[object]]) -> None:
        _around.set((*_around.get(), self))
        try:
            with self._scope:
                await function()
        except BaseException as error:
            # Nobody is above this task to raise to; a native cancellation, as when the loop ends, is an end like any.
            if not isinstance(error, anyio.get_cancelled_exc_class()):
                self._error = error
        finally:
            self._ended.set()

    @property
    def has_ended(self) -> bool:
        """Whether it is over, cleanup included."""
        return self._ended.is_set()

    @property
    def is_settled(self) -> bool:
        """Whether it is over, and all it raised has been told: whoever closes it need not wait for anything."""
        return self._ended.is_set() and self._error is None

    @property
    def is_around_caller(self) -> bool:
        """Whether the caller is something that this task has started, and would wait for itself."""
        return self in _around.get() and not self.has_ended

    def allow_until(self, deadline: float) -> None:
        """Give it more time than its starter had; never less."""
        if deadline > self._scope.deadline:
            self._scope.deadline = deadline

    def cancel(self) -> None:
        """Cancel it; returns at once."""
        self._scope.cancel()

    async def wait(self) -> None:
        """Wait for its end.

        Raises:
            BaseException: What it raised; told once.
        """
        await self._ended.wait()
        self._tell()

    async def join(self, until: float = math.inf) -> None:
        """Wait for its end, however often the waiting task is cancelled meanwhile; tells nothing.

        Args:
            until: When it is waited for no longer, on the clock of the event loop; infinity: as long as it takes.
        """
        interrupted: BaseException | None = None
        while not self._ended.is_set():
            try:
                with anyio.CancelScope(shield=True, deadline=until) as patience:
                    await self._ended.wait()
                if patience.cancelled_caught:
                    break
            except anyio.get_cancelled_exc_class() as error:  # asyncio's own, which no shield keeps out
                interrupted = error
        if interrupted is not None:
            raise interrupted

    async def cancel_and_join(self, until: float = math.inf) -> None:
        """Cancel it and wait for its end, however often the waiting task is cancelled meanwhile.

        Args:
            until: As in `join`.

        Raises:
            BaseException: What it raised, if nobody has been told yet.
        """
        self.cancel()
        await self.join(until)
        # Without one more checkpoint, whose cancellation would replace the exception that made the caller leave.
        self._tell()

    def _tell(self) -> None:
        error, self._error = self._error, None
        if error is not None:
            raise error


class FeedBlock(ABC, Generic[T]):
    """A background task and what it tells, as an async context manager; what streamed runs and batches share.

    Args:
        buffer: Items that may wait for the reader while the task goes on.

    Raises:
        InvalidArguments: `buffer` is no number of items.
    """

    _noun: ClassVar[str]
    _entered_by: ClassVar[str]

    def __init__(self, buffer: int) -> None:
        if isinstance(buffer, bool) or not isinstance(buffer, int) or buffer < 0:
            raise InvalidArguments(f"buffer={buffer!r}: give a whole number from 0 up")
        self._buffer = buffer
        self._opened: tuple[Feed[T], Background] | None = None

    @abstractmethod
    def _start(self, feed: Feed[T]) -> Background:
        """Begin; the task closes the feed at its end."""

    async def __aenter__(self) -> Self:
        if self._opened is not None:
            raise InvalidArguments(f"a {self._noun} is entered once: make another one")
        feed: Feed[T] = Feed(self._buffer)
        self._opened = feed, self._start(feed)
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        try:
            await self.aclose()
        except Exception as other:
            if error is None:
                raise
            error.add_note(f"the {self._noun} ended with {type(other).__name__}: {other}")

    async def aclose(self) -> None:
        """End it, if it goes on, and wait for its cleanup; what leaving the block does.

        Whatever belongs to it, a tool of a run say, can end it so, but not wait for it: there this returns at once.

        Raises:
            Exception: What it failed with, if nobody has been told yet.
        """
        if self._opened is None:
            return
        feed, task = self._opened
        # In this order: a task that waits for its reader must not take one more step, and start a tool with it.
        task.cancel()
        feed.desert()
        if not task.is_around_caller:
            await task.cancel_and_join()

    @property
    def is_settled(self) -> bool:
        """Whether it has ended, cleanup included, and told what it failed with: there is nothing to close."""
        return self._opened is not None and self._opened[1].is_settled

    def __aiter__(self) -> Self:
        return self

    async def _next(self) -> T:
        feed, task = self._here()
        # Whoever reads may have been given more time since the block was entered.
        task.allow_until(await stop_if_cancelled())
        if not feed.is_empty:
            return feed.pop()
        with suppress(StopAsyncIteration):
            return await feed.next()
        await task.wait()
        raise StopAsyncIteration

    def _for_reading(self) -> tuple[Feed[T], Background]:
        feed, task = self._here()
        # Whoever reads may have been given more time since the block was entered.
        task.allow_until(anyio.current_effective_deadline())
        return feed, task

    def _here(self) -> tuple[Feed[T], Background]:
        if self._opened is None:
            raise InvalidArguments(f"the {self._noun} has not begun: write `{self._entered_by}`")
        return self._opened


async def end_all(tasks: Iterable[Background]) -> None:
    """Cancel tasks that nobody has joined and wait for them; what they raised is dropped."""
    tasks = list(tasks)
    for task in tasks:
        task.cancel()
    interrupted: BaseException | None = None
    for task in tasks:
        try:
            await task.join()
        except anyio.get_cancelled_exc_class() as error:
            interrupted = error
    if interrupted is not None:
        raise interrupted


_around: ContextVar[tuple[Background, ...]] = ContextVar("fractal_background", default=())

_tasks: set[Any] = set()  # asyncio's loop remembers its tasks only weakly


def _spawn(function: Callable[[], Coroutine[Any, Any, None]], name: str, on_end: Callable[[], None]) -> None:
    def ended(_: object) -> None:
        on_end()

    # AnyIO has no task without a group. The backends are looked up, not imported: the one that runs here is there.
    asyncio: Any = sys.modules.get("asyncio")
    if asyncio is not None and anyio.get_cancelled_exc_class() is asyncio.CancelledError:
        task = asyncio.get_running_loop().create_task(function(), name=name)
        _tasks.add(task)
        task.add_done_callback(_tasks.discard)
        # A task that asyncio cancels before its first step never runs, and could not say that it has ended.
        task.add_done_callback(ended)
    else:
        trio: Any = sys.modules["trio"]
        trio.lowlevel.spawn_system_task(function, name=name, context=contextvars.copy_context())
