"""A task of the event loop and what it tells, as a block; what streamed runs and streamed batches share.

An async generator around a block may be closed by the garbage collector, in a task that has never seen the scopes of
the one that entered it. So the block holds none: it owns a task of the event loop, and cancels and joins it at its end.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from contextlib import suppress
from typing import TYPE_CHECKING, Any, ClassVar, Generic, Self, TypeVar

from anyio.lowlevel import checkpoint

from fractal._checks import is_count
from fractal._concurrency.feed import Feed
from fractal.errors import InvalidArguments

if TYPE_CHECKING:
    from types import TracebackType

    from fractal._concurrency.background import Background

__all__ = ["FeedBlock"]

T = TypeVar("T")


class FeedBlock(ABC, Generic[T]):
    """An async context manager that runs a background task and streams the items it puts into a feed.

    Args:
        buffer: Items that may wait for the reader while the task goes on.

    Raises:
        InvalidArguments: `buffer` is no number of items.
    """

    _noun: ClassVar[str]
    _entered_by: ClassVar[str]

    def __init__(self, buffer: int) -> None:
        if not is_count(buffer):
            raise InvalidArguments(f"buffer={buffer!r}: give a whole number from 0 up")
        self._buffer = buffer
        self._opened: tuple[Feed[T], Background[Any]] | None = None

    @abstractmethod
    def _start(self, feed: Feed[T]) -> Background[Any]:
        """Start the task, which closes the feed at its end."""

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
        """End the task, if it goes on, and wait for its cleanup; leaving the block does so too.

        Whatever belongs to it, a tool of a run say, can end it so, but not wait for it: there this returns at once.

        Raises:
            Exception: What it failed with, if nobody has been told yet.
        """
        if self._opened is None:
            return
        feed, task = self._opened
        # In this order: a task that waits for its reader must not take one more step, and start a tool with it.
        task.cancel()
        task.in_its_loop(feed.stop_reading)
        if not task.is_around_caller:
            await task.cancel_and_join()

    @property
    def is_settled(self) -> bool:
        """Whether the task has ended, cleanup included, and its exception has been raised: nothing to close."""
        return self._opened is not None and self._opened[1].is_settled

    @property
    def state(self) -> str:
        """The state of the block, in words."""
        if self._opened is None:
            return "has not begun"
        return "has ended" if self._opened[1].has_ended else "goes on"

    def __repr__(self) -> str:
        return f"<{type(self).__name__}: the {self._noun} {self.state}>"

    def _repr_html_(self) -> str:
        return self.html()

    def html(self) -> str:
        """The card that a notebook shows."""
        from fractal._html import card, line

        return card(line(repr(self)), self._inner_html())

    @abstractmethod
    def _inner_html(self) -> str:
        """The results so far, for the card that a notebook shows."""

    def __aiter__(self) -> Self:
        return self

    async def _next(self) -> T:
        feed, task = self._here()
        deadline = task.deadline_here(self._noun)
        if deadline == -math.inf:
            await checkpoint()
        task.allow_until(deadline)  # whoever reads may have been given more time since the block was entered
        if not feed.is_empty:
            return feed.pop()
        with suppress(StopAsyncIteration):
            return await feed.next()
        await task.wait()
        raise StopAsyncIteration

    def _for_reading(self) -> tuple[Feed[T], Background[Any]]:
        feed, task = self._here()
        task.allow_until(task.deadline_here(self._noun))
        return feed, task

    def _here(self) -> tuple[Feed[T], Background[Any]]:
        if self._opened is None:
            raise InvalidArguments(f"the {self._noun} has not begun: write `{self._entered_by}`")
        return self._opened
