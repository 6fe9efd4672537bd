"""Worker threads with an honest end.

A thread cannot be killed. When nobody waits for it any more it is *abandoned*: it goes on, and it keeps its place in
the limit until it really ends. AnyIO's own limiters give the place back at once on asyncio, and belong to one event
loop; `Gate` does neither.
"""

from __future__ import annotations

import math
import os
import threading
from collections import deque
from contextlib import contextmanager
from contextvars import ContextVar
from typing import TYPE_CHECKING, Generic, TypeVar
from weakref import WeakSet

import anyio
import anyio.to_thread
from anyio.lowlevel import RunVar, current_token

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

__all__ = ["WORKER_THREADS", "Gate", "ThreadCall", "current_thread_call"]

T = TypeVar("T")

WORKER_THREADS = 128
"""Tools in worker threads at a time, over the whole process."""


class _Waiter:
    __slots__ = ("event", "granted", "token")

    def __init__(self) -> None:
        self.event = anyio.Event()
        self.token = current_token()
        self.granted = False

    def wake(self) -> None:
        self.token.backend_class.run_sync_soon(self.event.set, (), self.token.native_token)


class Gate:
    """A first-come limit that tasks of any event loop wait at and any thread gives back.

    Args:
        limit: Holders at a time.
    """

    def __init__(self, limit: float) -> None:
        self._limit = limit
        self._lock = threading.Lock()
        self._held = 0
        self._waiters: deque[_Waiter] = deque()
        _gates.add(self)

    @property
    def held(self) -> int:
        """Places taken now."""
        return self._held

    async def acquire(self) -> None:
        """Wait for a place and take it."""
        with self._lock:
            if self._held < self._limit and not self._waiters:
                self._held += 1
                return
            waiter = _Waiter()
            self._waiters.append(waiter)
        try:
            await waiter.event.wait()
        except BaseException:
            with self._lock:
                granted = waiter.granted
                if not granted:
                    self._waiters.remove(waiter)
            if granted:  # given to us in the moment we stopped waiting: pass it on
                self.release()
            raise

    def take(self) -> None:
        """Take a place without waiting, over the limit if need be."""
        with self._lock:
            self._held += 1

    def release(self) -> None:
        """Give a place back; the longest waiting task gets it. Works from any thread and never blocks."""
        with self._lock:
            self._held -= 1
            while self._waiters and self._held < self._limit:
                waiter = self._waiters.popleft()
                try:
                    waiter.wake()
                except RuntimeError:  # its event loop has ended: nobody waits there
                    continue
                waiter.granted = True
                self._held += 1

    def _forget_holders(self) -> None:
        self._lock = threading.Lock()
        self._held = 0
        self._waiters.clear()


_gates: WeakSet[Gate] = WeakSet()
worker_gate = Gate(WORKER_THREADS)

_no_limit: RunVar[anyio.CapacityLimiter] = RunVar("fractal_no_limit")
current_thread_call: ContextVar[ThreadCall[object] | None] = ContextVar("fractal_thread_call", default=None)


def _start_anew_after_fork() -> None:
    # The threads that held places do not exist in the child.
    for gate in list(_gates):
        gate._forget_holders()  # noqa: SLF001  # pyright: ignore[reportPrivateUsage]


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_start_anew_after_fork)


class ThreadCall(Generic[T]):
    """One function, called in one worker thread.

    Args:
        function: What to call, with no arguments; it runs in a copy of the caller's context.
        gates: Limits it waits at, and holds until the function has really ended, besides that of all worker threads.
        abandon: Whether a cancelled `run()` returns at once and leaves the thread to itself. If not, it returns when
            the function has.
        on_late_end: Called in the thread when the function ends after it was abandoned.
    """

    def __init__(
        self,
        function: Callable[[], T],
        *,
        gates: Sequence[Gate] = (),
        abandon: bool,
        on_late_end: Callable[[], None] | None = None,
    ) -> None:
        self._function, self._abandon, self._on_late_end = function, abandon, on_late_end
        self._gates = (*gates, worker_gate)
        self._places: list[Gate] = []
        self._lock = threading.Lock()
        self._state = "new"  # new → running → ended, or new → dropped
        self.abandoned = False
        self.thread: threading.Thread | None = None

    async def run(self) -> T:
        """Wait for a free thread, call the function in it, and give back what it returns.

        Raises:
            Exception: Whatever the function raises.
        """
        try:
            for gate in self._gates:
                await gate.acquire()
                self._places.append(gate)
            return await anyio.to_thread.run_sync(self._work, abandon_on_cancel=self._abandon, limiter=_unlimited())
        finally:
            self._leave()

    def _work(self) -> T:
        with self._lock:
            if self._state == "dropped":
                # Cancelled before this thread began; nobody will look at what comes back.
                raise RuntimeError("dropped before it began")
            self._state = "running"
        self.thread = threading.current_thread()
        current_thread_call.set(self)
        try:
            return self._function()
        finally:
            with self._lock:
                self._state = "ended"
            self._release()
            if self.abandoned and self._on_late_end is not None:
                self._on_late_end()

    def _leave(self) -> None:
        with self._lock:
            never_began = self._state == "new"
            if never_began:
                self._state = "dropped"
            self.abandoned = self._state == "running"
        if never_began:
            self._release()

    def _release(self) -> None:
        for gate in reversed(self._places):
            gate.release()

    @contextmanager
    def lent(self) -> Iterator[None]:
        """Give this thread's place to others while it only waits for an event loop.

        Otherwise tools that call agents whose tools need threads could use up all places and wait for each other.
        """
        worker_gate.release()
        try:
            yield
        finally:
            worker_gate.take()


def _unlimited() -> anyio.CapacityLimiter:
    """AnyIO wants a limiter; ours is `worker_gate`, so this one never makes anyone wait."""
    try:
        return _no_limit.get()
    except LookupError:
        limiter = anyio.CapacityLimiter(math.inf)
        _no_limit.set(limiter)
        return limiter
