"""What a tool returned, with everything read up that can be read only once."""

from __future__ import annotations

import copy
import dataclasses
import marshal
import operator
import types
from collections import deque
from collections.abc import (
    AsyncGenerator,
    AsyncIterator,
    Awaitable,
    Callable,
    Collection,
    Generator,
    ItemsView,
    Iterator,
    KeysView,
    Mapping,
    ValuesView,
)
from contextlib import aclosing, closing, nullcontext
from typing import Any, cast

import anyio.from_thread
from anyio.lowlevel import checkpoint
from pydantic import BaseModel

from fractal._texts import kind_of

__all__ = ["is_plain", "read_in_thread", "read_up"]

AT_A_TIME = 256
"""Items that are read before a cancellation arrives and, in the event loop, other tasks have their turn."""

_ATOMS = {str, int, float, bool, bytes, type(None)}
_SEQUENCES = (list, tuple, set, frozenset, deque)
_VIEWS = (KeysView, ValuesView, ItemsView)


async def read_up(value: Any) -> Any:
    """The value with lists in the place of iterators and generators, async ones too; itself where there are none.

    What reading raises comes out as it is.
    """
    return value if is_plain(value) else await _Reader(checkpoint, waits=True).read(value)


def read_in_thread(value: Any) -> tuple[Any, bool]:
    """The value read up in a worker thread.

    Returns:
        The value, and whether all of it has been read: async iterators are left for the event loop.
    """
    if is_plain(value):
        return value, True
    reader = _Reader(_pause_in_thread, waits=False)
    reading = reader.read(value)
    try:
        reading.send(None)
    except StopIteration as done:
        return done.value, not reader.left_some
    raise AssertionError("what is read in a thread has waited")  # pragma: no cover - nothing in it waits


async def _pause_in_thread() -> None:
    anyio.from_thread.check_cancelled()


def is_plain(value: Any) -> bool:
    """Whether a value is all of JSON's own types, as far as that can be told at once."""
    kind = kind_of(value)
    if kind in _ATOMS:
        return True
    if kind not in (dict, list):
        return False
    try:
        marshal.dumps(value)  # a walk in C, which refuses what it does not know
    except ValueError:
        return False
    return True


def _can_be_closed(iterator: object) -> bool:
    return isinstance(iterator, (Generator, AsyncGenerator))


class _Reader:
    """Reads up one value."""

    def __init__(self, pause: Callable[[], Awaitable[object]], *, waits: bool) -> None:
        self._pause, self._waits = pause, waits
        self._steps = 0
        self._has_begun = False  # to read what can be read only once
        self._around: set[int] = set()  # what is being walked through: a value may contain itself
        self.left_some = False

    async def read(self, value: Any) -> Any:
        """The value, read up."""
        if type(value) in _ATOMS or id(value) in self._around:
            return value
        await self._step()
        self._around.add(id(value))
        try:
            return await self._read(value)
        except RecursionError:
            if self._has_begun:  # it may be the tool's own
                raise
            return value  # nested too deeply to be shown, let alone read
        finally:
            self._around.discard(id(value))

    async def _read(self, value: Any) -> Any:
        kind = kind_of(value)
        if issubclass(kind, AsyncIterator):
            return await self._read_async(value)
        if issubclass(kind, Iterator):
            return await self._read_sync(value)
        if issubclass(kind, _VIEWS):  # of a dict that may change
            return [await self.read(each) for each in value]
        if issubclass(kind, (dict, types.MappingProxyType)):
            return await self._read_dict(value)
        if issubclass(kind, _SEQUENCES):
            return await self._read_items(value)
        if issubclass(kind, BaseModel) or dataclasses.is_dataclass(kind):
            return await self._read_fields(value)
        return value

    async def _read_async(self, iterator: AsyncIterator[Any]) -> Any:
        if not self._waits:
            self.left_some = True
            return iterator
        self._has_begun = True
        async with aclosing(cast("AsyncGenerator[Any]", iterator)) if _can_be_closed(iterator) else nullcontext():
            return [await self._item(each) async for each in iterator]

    async def _read_sync(self, iterator: Iterator[Any]) -> list[Any]:
        self._has_begun = True
        with closing(cast("Generator[Any]", iterator)) if _can_be_closed(iterator) else nullcontext():
            return [await self._item(each) for each in iterator]

    async def _item(self, value: Any) -> Any:
        if type(value) not in _ATOMS:
            return await self.read(value)
        await self._step()
        return value

    async def _step(self) -> None:
        self._steps += 1
        if self._steps % AT_A_TIME == 0:
            await self._pause()

    async def _read_items(self, items: Collection[Any]) -> Any:
        read = [each if type(each) in _ATOMS else await self.read(each) for each in items]
        if all(map(operator.is_, read, items)):
            return items
        if isinstance(items, deque):
            return deque(read, items.maxlen)
        if not isinstance(items, tuple):
            return read
        make: Any = getattr(items, "_make", tuple)  # of a named tuple, or a plain one
        return make(read)

    async def _read_dict(self, value: Any) -> Any:
        read = await self._changed(value)
        if not read:
            return value
        other: Any = copy.copy(value) if issubclass(kind_of(value), dict) else {**value}
        other.update(read)
        return other

    async def _read_fields(self, value: Any) -> Any:
        fields = getattr(value, "__dict__", None)
        if fields is None:  # a dataclass with slots
            fields = {each.name: getattr(value, each.name, None) for each in dataclasses.fields(value)}
        read = await self._changed(fields)
        if not read:
            return value
        other = copy.copy(value)  # it is the tool's own, and others may have it
        for name, each in read.items():
            object.__setattr__(other, name, each)
        return other

    async def _changed(self, values: Mapping[Any, Any]) -> dict[Any, Any]:
        """The members of a mapping that reading has changed."""
        others = {key: each for key, each in values.items() if type(each) not in _ATOMS}
        read = {key: await self.read(each) for key, each in others.items()}
        return {key: each for key, each in read.items() if each is not others[key]}
