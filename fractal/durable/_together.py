"""Writes that come at the same time, done together in one worker thread."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from functools import partial
from typing import Any, Generic, TypeVar

from fractal._concurrency.forks import lock
from fractal._concurrency.workers import run_in_thread

__all__ = ["Queued", "Together"]


class Queued:
    """Something to be written, with others or alone.

    Attributes:
        is_done: Whether it is written.
    """

    __slots__ = ("is_done",)

    def __init__(self) -> None:
        self.is_done = False


Q = TypeVar("Q", bound=Queued)


class Together(Generic[Q]):
    """A queue of writes: the task whose turn it is writes all that wait.

    Args:
        turn: The lock that is held while something is written.
        write_all: Writes what it is given, all or nothing.
        is_for_all: Whether an error would come again if only one of them were written.
    """

    def __init__(
        self,
        turn: AbstractContextManager[Any],
        write_all: Callable[[Sequence[Q]], None],
        is_for_all: Callable[[BaseException], bool],
    ) -> None:
        self._turn, self._write_all, self._is_for_all = turn, write_all, is_for_all
        self._lock = lock()  # of the queue
        self._queue: list[Q] = []

    async def write(self, one: Q) -> None:
        """Write something, and what others have brought meanwhile; in a worker thread, which nothing cuts.

        Raises:
            BaseException: It could not be written.
        """
        with self._lock:
            self._queue.append(one)  # before a thread begins: tasks that are ready now bring theirs, too
        await run_in_thread(partial(self._take_turn, one), abandon=False)

    def _take_turn(self, one: Q) -> None:
        with self._turn:
            if one.is_done:  # by the thread that was before this one
                return
            with self._lock:
                writes, self._queue = self._queue, []
            try:
                self._write(writes)
            except BaseException as error:
                others = [each for each in writes if each is not one]
                with self._lock:  # each of the others is told by trying itself
                    self._queue = others + self._queue
                if not others or self._is_for_all(error):
                    raise
                self._write([one])  # what failed may be one of theirs

    def _write(self, writes: Sequence[Q]) -> None:
        self._write_all(writes)
        for each in writes:
            each.is_done = True

    def forget(self) -> None:
        """Forget what waits, in a process that was forked from the one of those threads."""
        self._queue = []
