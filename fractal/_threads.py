"""Worker threads with an honest end.

A thread cannot be killed. When nobody waits for it any more it is *abandoned*: it goes on, and it keeps its place in
the limit until it really ends. AnyIO's own limiters give the place back at once on asyncio, and belong to one event
loop; `Gate` does neither.
"""

from __future__ import annotations

import math
import os
import threading
import time
from collections import deque
from collections.abc import Callable
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Generic, TypeVar
from weakref import WeakSet

import anyio
import anyio.from_thread
import anyio.to_thread
from anyio.lowlevel import RunVar, current_token

from fractal._current import WeakVar, current_run
from fractal._stuck import place_in_thread
from fractal.errors import RunCancelled

if TYPE_CHECKING:
    from collections.abc import Awaitable, Generator, Sequence

    from anyio.abc import TaskGroup

__all__ = [
    "WORKER_THREADS",
    "AbandonedThread",
    "Call",
    "Gate",
    "ThreadCall",
    "Waiting",
    "abandoned_threads",
    "all_gates",
    "current_thread_call",
]

T = TypeVar("T")
R = TypeVar("R")

Waiting = Callable[[str], AbstractContextManager[object]]
"""Makes a block around a wait, out of what is waited for."""

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
        """Places taken now."""
        return self._held

    @property
    def waiting(self) -> int:
        """Tasks that wait for a place."""
        return len(self._waiters)

    def place(self, waiting: Waiting = nullcontext) -> _Place:
        """Have a place in the block; waits for it as `acquire` does."""
        return _Place(self, waiting)

    async def acquire(self, waiting: Waiting = nullcontext) -> None:
        """Wait for a place and take it.

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

    def forget_holders(self) -> None:
        """Be as new: the threads that held places are gone."""
        self._lock = threading.Lock()
        self._held = 0
        self._waiters.clear()


class _Place:
    """A place for a block; no generator, since every request has one."""

    __slots__ = ("_gate", "_waiting")

    def __init__(self, gate: Gate, waiting: Waiting) -> None:
        self._gate, self._waiting = gate, waiting

    async def __aenter__(self) -> None:
        await self._gate.acquire(self._waiting)

    async def __aexit__(self, *exc: object) -> None:
        self._gate.release()


all_gates: WeakSet[Gate] = WeakSet()
worker_gate = Gate(WORKER_THREADS, f"a free worker thread (there are {WORKER_THREADS})")

_no_limit: RunVar[anyio.CapacityLimiter] = RunVar("fractal_no_limit")
current_thread_call: WeakVar[ThreadCall[Any]] = WeakVar("fractal_thread_call")


def _start_anew_after_fork() -> None:
    # The threads that held places do not exist in the child.
    _abandoned.clear()
    for gate in list(all_gates):
        gate.forget_holders()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_start_anew_after_fork)


@dataclass(frozen=True, slots=True)
class AbandonedThread:
    """A function in a worker thread that nobody waits for any more and that has not ended yet.

    Attributes:
        name: The function: a tool by its name, as in `"tool 'search'"`.
        thread: The thread.
        since: When it was abandoned, on `time.monotonic()`'s clock.
        run_id: Id of the run that called it, as in the run's result and events; None if no run did.
        agent_name: The agent of that run, or None.

    Example:
        >>> from fractal import abandoned_threads
        >>> for each in abandoned_threads():
        ...     print(f"{each.name} has gone on for {each.seconds:.0f} s, now at {each.where}")
    """

    name: str
    thread: threading.Thread
    since: float
    run_id: str | None
    agent_name: str | None

    @property
    def seconds(self) -> float:
        """How long it has been abandoned."""
        return time.monotonic() - self.since

    @property
    def where(self) -> str | None:
        """Where it is now, as `file.py:12 in function`; None if no line of a user's own is known."""
        return place_in_thread(self.thread)


def abandoned_threads() -> tuple[AbandonedThread, ...]:
    """The functions in worker threads, over the whole process, that go on though nobody waits for them any more.

    A thread cannot be killed, so a plain `def` tool that is cancelled goes on until it returns, unless it was to be
    waited for (`on_cancel="wait"`). It is listed until then, the one that was abandoned first at the head, and keeps
    its places in limits.

    Example:
        >>> abandoned_threads()
        ()
    """
    return tuple(_abandoned.values())


_abandoned: dict[ThreadCall[Any], AbandonedThread] = {}


class Call(Generic[T]):
    """An async call that a thread started and waits for.

    Args:
        function: What to call; it runs in the context of whoever starts `run`.
        deadline: When it is cancelled, on the clock of its event loop.
    """

    def __init__(self, function: Callable[[], Awaitable[T]], *, deadline: float = math.inf) -> None:
        self._function, self._deadline = function, deadline
        self._scope: anyio.CancelScope | None = None
        self._is_cancelled = False
        self._ended = threading.Event()
        self._value: list[T] = []
        self._error: BaseException | None = None

    async def run(self) -> None:
        """The task that makes the call; it raises nothing but a cancellation from outside."""
        # Whatever happens is for the thread; an exception here would take down those who run beside it.
        self._error = RunCancelled()
        try:
            with anyio.CancelScope(deadline=self._deadline) as self._scope:
                if self._is_cancelled:
                    self._scope.cancel()
                value = await self._function()
                self._value.append(value)
                self._error = None
        except anyio.get_cancelled_exc_class():
            raise
        except BaseException as error:
            self._error = error
        finally:
            self._ended.set()

    def cancel(self) -> None:
        """Cancel it; in its event loop's thread."""
        self._is_cancelled = True
        if self._scope is not None:
            self._scope.cancel()

    def drop(self) -> None:
        """End it as cancelled without a start: there is no loop any more that could run it."""
        self._error = RunCancelled("there is no event loop any more that could run this")
        self._ended.set()

    def wait(self, timeout: float | None = None) -> bool:
        """Wait, in another thread, until it has ended, cleanup included.

        Args:
            timeout: Seconds; None: as long as it takes.

        Returns:
            Whether it has.
        """
        return self._ended.wait(timeout)

    def result(self) -> T:
        """What it returned, or raises what it raised; waits for it.

        Raises:
            RunCancelled: It was cancelled.
        """
        self.wait()
        if self._error is not None:
            raise self._error
        return self._value[0]


class ThreadCall(Generic[T]):
    """One function, called in one worker thread.

    Args:
        function: What to call, with no arguments; it runs in a copy of the caller's context.
        name: What to call it where it is listed as abandoned.
        gates: Limits it waits at, and holds until the function has really ended, besides that of all worker threads.
        abandon: Whether a cancelled `run()` returns at once and leaves the thread to itself. If not, it returns when
            the function has.
        waiting: As in `Gate.acquire`, for all of them.
        group: Where `join` starts its tasks; without one the function cannot join.
        twins: Where others like it wait for it, if it is abandoned, to end; or None.
        on_late_end: Called in the thread when the function ends after it was abandoned, with the seconds since then.
    """

    def __init__(
        self,
        function: Callable[[], T],
        name: str,
        *,
        gates: Sequence[Gate] = (),
        waiting: Waiting = nullcontext,
        abandon: bool,
        group: TaskGroup | None = None,
        twins: Callable[[], Gate] | None = None,
        on_late_end: Callable[[float], None] | None = None,
    ) -> None:
        self._function, self._name, self._abandon, self._on_late_end = function, name, abandon, on_late_end
        self._twins, self._waiting = twins, waiting
        self._gates = (*gates, worker_gate)
        self._places: list[Gate] = []
        self._lock = threading.Lock()
        self._state = "new"  # new → running → ended, or new → dropped
        self._group = group
        self._deadline = math.inf
        self._joined: set[Call[Any]] = set()
        self._joined_done: anyio.Event | None = None
        self.abandoned = False
        self.thread: threading.Thread | None = None

    async def run(self) -> T:
        """Wait for a free thread, call the function in it, and give back what it returns.

        Raises:
            Exception: Whatever the function raises.
        """
        self._deadline = anyio.current_effective_deadline()
        try:
            for gate in self._gates:
                await gate.acquire(self._waiting)
                self._places.append(gate)
            values, error = await anyio.to_thread.run_sync(
                self._work, abandon_on_cancel=self._abandon, limiter=_unlimited()
            )
        finally:
            self._leave()
            await self._end_joined()
        if error is not None:
            raise error
        return values[0]

    def join(self, function: Callable[[], Awaitable[R]]) -> R:
        """Run an async function from within the thread: in the loop, under the deadline, in the context of the call.

        It is a task of the call's group, so that it cannot outlive the call on either backend.

        Raises:
            RunCancelled: The call was abandoned, so its loop takes nothing more from it.
            BaseException: The loop's cancellation exception, when the call is cancelled meanwhile.
        """
        call = Call(function, deadline=self._deadline)

        async def run_joined() -> None:
            try:
                await call.run()
            finally:
                self._joined.discard(call)
                if not self._joined and self._joined_done is not None:
                    self._joined_done.set()

        def start() -> None:
            self._require_waited_for()
            assert self._group is not None
            self._joined.add(call)
            self._group.start_soon(run_joined)

        # Asked here too: a loop that closes takes calls that it never makes, and the thread would wait for ever.
        self._require_waited_for()
        with self._lent():
            anyio.from_thread.run_sync(start)
            try:
                return call.result()
            except RunCancelled:
                # The loop's own exception, which a tool does not swallow by mistake, if the call is cancelled too.
                anyio.from_thread.check_cancelled()
                raise

    def _require_waited_for(self) -> None:
        if self.abandoned or self._group is None:
            raise RunCancelled("the run that called this tool is over")

    async def _end_joined(self) -> None:
        """Cancel and wait for what the thread runs in the loop, if the call ends before it."""
        if not self._joined:
            return
        self._joined_done = anyio.Event()
        for call in self._joined:
            call.cancel()
        with anyio.CancelScope(shield=True):
            await self._joined_done.wait()

    def _work(self) -> tuple[list[T], BaseException | None]:
        # What it raises is handed over as a value: AnyIO looks at it, and an exception may be of a class that raises.
        with self._lock:
            if self._state == "dropped":
                # Cancelled before this thread began; nobody will look at what comes back.
                raise RuntimeError("dropped before it began")
            self._state = "running"
            self.thread = threading.current_thread()
        current_thread_call.set(self)
        try:
            return [self._function()], None
        except BaseException as error:
            return [], error
        finally:
            with self._lock:
                self._state = "ended"
            self._release()
            record = _abandoned.pop(self, None)
            if record is not None and self._on_late_end is not None:
                self._on_late_end(record.seconds)

    def _leave(self) -> None:
        with self._lock:
            never_began = self._state == "new"
            if never_began:
                self._state = "dropped"
            self.abandoned = self._state == "running"
            if self.abandoned:
                self._note_abandoned()
        if never_began:
            self._release()

    def _note_abandoned(self) -> None:
        assert self.thread is not None
        run = current_run.get()
        of_run = (run.run_id, run.settings.agent_name) if run is not None else (None, None)
        _abandoned[self] = AbandonedThread(self._name, self.thread, time.monotonic(), *of_run)
        if self._twins is not None:
            gate = self._twins()
            gate.take()
            self._places.append(gate)

    def _release(self) -> None:
        for gate in reversed(self._places):
            gate.release()

    @contextmanager
    def _lent(self) -> Generator[None]:
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
