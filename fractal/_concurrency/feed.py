"""Things on their way to one reader: a bounded queue whose writers wait, and whose cleanup never has to.

A memory stream would do, but that what a cancelled run has to say at its end must get through without waiting.
"""

from __future__ import annotations

from collections import deque
from typing import Generic, Protocol, TypeVar

import anyio
from anyio.lowlevel import EventLoopToken, checkpoint, current_token

from fractal._concurrency.loops import call_soon
from fractal._concurrency.scopes import stop_if_cancelled

__all__ = ["Feed", "Inlet"]

T = TypeVar("T")
T_contra = TypeVar("T_contra", contravariant=True)


class Inlet(Protocol[T_contra]):
    """The writers' end of a feed."""

    def put(self, item: T_contra) -> None:
        """Add an item, whether there is room or not."""
        ...

    @property
    def is_full(self) -> bool:
        """Whether the feed has no room for another item."""
        ...

    async def room(self) -> None:
        """Wait until the feed has room for another item."""
        ...

    def for_other_loop(self) -> Inlet[T_contra]:
        """A writers' end that works from another event loop, in any thread, and never waits."""
        ...


class Feed(Generic[T]):
    """A queue inside one event loop.

    Writers call `room`, then `put`, then `room` again; so there are never more than `buffer` items and the one in
    hand. With a buffer of 0 each item is read before its writer goes on.

    Args:
        buffer: Items that may wait for the reader while the writers go on.
    """

    def __init__(self, buffer: int) -> None:
        self._buffer = buffer
        self._items: deque[T] = deque()
        self._news: anyio.Event | None = None  # for the reader
        self._freed: anyio.Event | None = None  # for the writers
        self._is_closed = self._reader_left = False
        self._token = current_token()

    def put(self, item: T) -> None:
        """Add an item, whether there is room or not; one that comes after the end is dropped."""
        if not self._reader_left and not self._is_closed:
            self._items.append(item)
            self._tell_reader()

    @property
    def is_full(self) -> bool:
        """Whether the feed has no room for another item."""
        return len(self._items) > self._buffer

    async def room(self) -> None:
        """Wait until the feed has room for another item, or its reader has left."""
        while self.is_full:
            self._freed = self._freed or anyio.Event()
            await self._freed.wait()
            # A reader that takes an item and leaves has cancelled whom it let go on.
            await checkpoint()

    def for_other_loop(self) -> Inlet[T]:
        """A writers' end that works from another event loop: nothing put there is lost, and it never waits."""
        return _OtherLoopInlet(self, self._token)

    def close(self) -> None:
        """Mark the end: no more items will come."""
        self._is_closed = True
        self._tell_reader()

    async def take(self) -> list[T]:
        """Wait for items and take all there are; an empty list at the end."""
        await stop_if_cancelled()
        while not self._items and not self._is_closed and not self._reader_left:
            self._news = self._news or anyio.Event()
            await self._news.wait()
        taken = list(self._items)
        self._items.clear()
        self._tell_writers()
        return taken

    async def next(self) -> T:
        """Wait for the next item and take it.

        Raises:
            StopAsyncIteration: There is none any more.
        """
        await stop_if_cancelled()
        while not self._items:
            if self._is_closed or self._reader_left:
                raise StopAsyncIteration
            self._news = self._news or anyio.Event()
            await self._news.wait()
        return self.pop()

    @property
    def is_empty(self) -> bool:
        """Whether the feed has no item now."""
        return not self._items

    def pop(self) -> T:
        """Take the next item of a feed that is not empty."""
        item = self._items.popleft()
        self._tell_writers()
        return item

    def stop_reading(self) -> None:
        """Stop reading: items that are there or come later are dropped, and no writer waits."""
        self._reader_left = True
        self._items.clear()
        self._tell_writers()
        self._tell_reader()

    def _tell_reader(self) -> None:
        news, self._news = self._news, None
        if news is not None:
            news.set()

    def _tell_writers(self) -> None:
        if self._freed is not None and len(self._items) <= self._buffer:
            freed, self._freed = self._freed, None
            freed.set()


class _OtherLoopInlet(Generic[T]):
    def __init__(self, feed: Feed[T], token: EventLoopToken) -> None:
        self._feed, self._token = feed, token

    def put(self, item: T) -> None:
        call_soon(self._token, self._feed.put, item)  # where the reader's loop has ended, nobody reads

    @property
    def is_full(self) -> bool:
        return False

    async def room(self) -> None:
        pass

    def for_other_loop(self) -> Inlet[T]:
        return self
