"""Async calls that a thread starts and waits for, in whatever thread their event loop is."""

from __future__ import annotations

import math
import threading
from collections.abc import Callable
from contextlib import suppress
from typing import TYPE_CHECKING, Generic, TypeVar

import anyio

from fractal.errors import RunCancelled

if TYPE_CHECKING:
    from collections.abc import Awaitable

__all__ = ["Latch", "LoopCall"]

T = TypeVar("T")


class Latch:
    """A flag that is set once, and that threads wait for.

    No lock is held while Python code runs, as `threading.Event` holds one: so a signal handler may open it, or wait for
    it, wherever the interrupted code is, and Ctrl-C leaves nothing locked.
    """

    __slots__ = ("_waiters", "is_open")

    def __init__(self) -> None:
        self.is_open = False
        self._waiters: list[threading.Lock] = []

    def open(self) -> None:
        """Let all waiting threads go on, and all later ones; in any thread, any number of times."""
        self.is_open = True
        with suppress(IndexError):  # the last one was taken by somebody else who opens it
            while self._waiters:
                self._waiters.pop().release()

    def wait(self, timeout: float | None = None) -> bool:
        """Wait until the latch is open.

        Args:
            timeout: Seconds; None: as long as it takes.

        Returns:
            Whether it is open.
        """
        if self.is_open or timeout == 0:
            return self.is_open
        waiter = threading.Lock()
        waiter.acquire()
        self._waiters.append(waiter)
        try:
            if not self.is_open:  # it may have been opened before there was a waiter
                waiter.acquire(timeout=-1 if timeout is None else min(timeout, threading.TIMEOUT_MAX))
        finally:
            with suppress(ValueError):
                self._waiters.remove(waiter)
        return self.is_open


class LoopCall(Generic[T]):
    """An async call that a thread has an event loop make, and waits for.

    Args:
        function: What to call; it runs in the context of whoever starts `run`.
        deadline: When it is cancelled, on the clock of its event loop.
    """

    def __init__(self, function: Callable[[], Awaitable[T]], *, deadline: float = math.inf) -> None:
        self._function, self._deadline = function, deadline
        self._scope: anyio.CancelScope | None = None
        self._is_cancelled = False
        self._ended = Latch()
        self._value: list[T] = []
        self._error: BaseException | None = None

    async def run(self) -> None:
        """Make the call, as a task; raises nothing but a cancellation from outside."""
        # Whatever happens is for the thread; an exception here would take down those who run beside it.
        error: BaseException | None = RunCancelled()
        try:
            with anyio.CancelScope(deadline=self._deadline) as self._scope:
                if self._is_cancelled:
                    self._scope.cancel()
                self._value.append(await self._function())
                error = None
        except anyio.get_cancelled_exc_class():
            raise
        except BaseException as raised:
            error = raised
        finally:
            self._end(error)

    @property
    def has_ended(self) -> bool:
        """Whether the call has ended, cleanup included."""
        return self._ended.is_open

    def cancel(self) -> None:
        """Cancel the call; in the thread of its event loop."""
        self._is_cancelled = True
        if self._scope is not None:
            self._scope.cancel()

    def drop(self, error: BaseException | None = None) -> None:
        """End a call that never started or whose event loop is gone; does nothing if it has ended.

        Args:
            error: What it ends with; None: that it was cancelled.
        """
        if not self.has_ended:
            self._end(error or RunCancelled("there is no event loop any more that could run this"))

    def wait(self, timeout: float | None = None) -> bool:
        """Wait, in another thread, for the end of the call, cleanup included.

        Args:
            timeout: Seconds; None: as long as it takes.

        Returns:
            Whether it has.
        """
        return self._ended.wait(timeout)

    def result(self) -> T:
        """Wait for the call; return its result, or raise its exception.

        Raises:
            RunCancelled: It was cancelled.
        """
        self.wait()
        if self._error is not None:
            raise self._error
        return self._value[0]

    def _end(self, error: BaseException | None) -> None:
        self._error = error
        self._ended.open()
