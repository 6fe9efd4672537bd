"""First-come limits that tasks of any event loop wait at.

AnyIO's own limiters belong to one event loop, and give the slot of an abandoned thread back at once on asyncio.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from weakref import WeakSet

import anyio
from anyio.lowlevel import current_token

from fractal._concurrency.forks import in_child
from fractal._concurrency.loops import call_soon

__all__ = [
    "Gate",
    "Waiting",
    "all_gates",
    "approval_threads",
    "client_threads",
    "hook_threads",
    "lookup_threads",
    "tool_threads",
]

Waiting = Callable[[str], AbstractContextManager[object]]
"""Makes a block around a wait, out of what is waited for."""

WORKER_THREADS = 128
"""Worker threads of one kind at a time, over the whole process."""


class _Waiter:
    __slots__ = ("event", "granted", "token")

    def __init__(self) -> None:
        self.event = anyio.Event()
        self.token = current_token()
        self.granted = False

    def wake(self) -> bool:
        return call_soon(self.token, self.event.set)


class Gate:
    """A first-come limit whose slots tasks of any event loop wait for, and any thread releases.

    Args:
        limit: Holders at a time.
        what: What whoever waits waits for, in words.
    """

    def __init__(self, limit: float, what: str) -> None:
        self._limit, self._what = limit, what
        self._lock = threading.Lock()
        self._held = 0
        self._waiters: deque[_Waiter] = deque()
        all_gates.add(self)

    @property
    def held(self) -> int:
        """Slots that are taken now."""
        return self._held

    @property
    def waiting(self) -> int:
        """Tasks that wait for a slot."""
        return len(self._waiters)

    def slot(self, waiting: Waiting = nullcontext) -> _Slot:
        """A slot for a block, awaited as by `acquire`."""
        return _Slot(self, waiting)

    async def acquire(self, waiting: Waiting = nullcontext) -> None:
        """Wait for a slot and take it.

        Args:
            waiting: Around the wait, if there is one.
        """
        with self._lock:
            if self._held < self._limit and not self._waiters:
                self._held += 1
                return
            waiter = _Waiter()
            self._waiters.append(waiter)
        try:
            with waiting(self._what):
                await waiter.event.wait()
        except BaseException:
            with self._lock:
                granted = waiter.granted
                if not granted and waiter in self._waiters:  # not there if its loop was found to have ended
                    self._waiters.remove(waiter)
            if granted:  # given to us in the moment we stopped waiting: pass it on
                self.release()
            raise

    def acquire_at_once(self) -> bool:
        """Take a slot if one is free and nobody waits; whether that was so."""
        with self._lock:
            is_free = self._held < self._limit and not self._waiters
            self._held += is_free
            return is_free

    def take(self) -> None:
        """Take a slot without waiting, over the limit if need be."""
        with self._lock:
            self._held += 1

    def release(self) -> None:
        """Give a slot back; the longest waiting task gets it. Works from any thread and never blocks."""
        with self._lock:
            self._held -= 1
            while self._waiters and self._held < self._limit:
                waiter = self._waiters.popleft()
                if waiter.wake():  # else its event loop has ended: nobody waits there
                    waiter.granted = True
                    self._held += 1

    def forget_holders(self) -> None:
        """Free all slots: the threads that held them are gone."""
        self._lock = threading.Lock()
        self._held = 0
        self._waiters.clear()


class _Slot:
    """A slot for a block; a class and no generator for speed, since every request takes one."""

    __slots__ = ("_gate", "_waiting")

    def __init__(self, gate: Gate, waiting: Waiting) -> None:
        self._gate, self._waiting = gate, waiting

    async def __aenter__(self) -> None:
        await self._gate.acquire(self._waiting)

    async def __aexit__(self, *exc: object) -> None:
        self._gate.release()


all_gates: WeakSet[Gate] = WeakSet()


def _threads_for(whose: str) -> Gate:
    return Gate(WORKER_THREADS, f"a free worker thread (there are {WORKER_THREADS} for {whose})")


# What hangs of one kind keeps none of another kind waiting. What the library does for itself waits at none of them.
tool_threads = _threads_for("tools")
hook_threads = _threads_for("hooks")
approval_threads = _threads_for("approvals")
client_threads = _threads_for("blocking clients")
lookup_threads = _threads_for("names of hosts")


@in_child
def _forget_holders() -> None:
    for gate in list(all_gates):
        gate.forget_holders()
