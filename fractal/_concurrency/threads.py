"""Worker threads with an honest end.

A thread cannot be killed. When nobody waits for it any more it is *abandoned*: it goes on, and it keeps its slot in
the limit until it really ends.
"""

from __future__ import annotations

import math
import os
import threading
import time
from collections.abc import Callable
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, Generic, Protocol, Self, TypeVar

import anyio
import anyio.from_thread
from anyio.lowlevel import EventLoopToken, current_token

from fractal._concurrency.background import Joinable
from fractal._concurrency.crossing import LoopCall
from fractal._concurrency.current import WeakVar, current_run
from fractal._concurrency.forks import end_child_with_this_step, in_child, leave_child
from fractal._concurrency.gates import Gate, Waiting, tool_threads
from fractal._concurrency.loops import call_soon
from fractal._concurrency.stuck import line_in_thread
from fractal._concurrency.workers import run_in_thread, wait_out
from fractal.errors import OtherProcess, RunCancelled

if TYPE_CHECKING:
    from collections.abc import Awaitable, Coroutine, Generator, Sequence

__all__ = [
    "AbandonedThread",
    "JoinedCall",
    "ThreadCall",
    "abandoned_threads",
    "current_thread_call",
    "refuse_abandoned",
    "threads_waited_for",
]

T = TypeVar("T")
R = TypeVar("R")

current_thread_call: WeakVar[ThreadCall[Any]] = WeakVar("fractal_thread_call")


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
        """Seconds since the thread was abandoned."""
        return time.monotonic() - self.since

    @property
    def where(self) -> str | None:
        """The line that the thread is at, as `file.py:12 in f`; None if no line of a user's is known."""
        return line_in_thread(self.thread)


def abandoned_threads() -> tuple[AbandonedThread, ...]:
    """The functions in worker threads, in the whole process, that go on after their callers stopped waiting.

    A thread cannot be killed, so a plain `def` tool that is cancelled goes on until it returns, unless it was to be
    waited for (`on_cancel="wait"`). It is listed until then, the one that was abandoned first at the head, and keeps
    its slots in limits.

    Example:
        >>> abandoned_threads()
        ()
    """
    return tuple(_abandoned.values())


_abandoned: dict[ThreadCall[Any], AbandonedThread] = {}


def refuse_abandoned() -> None:
    """Refuse to begin anything in an abandoned thread, in whatever event loop: nobody is left who would end it.

    Raises:
        RunCancelled: The calling thread is one.
    """
    if _abandoned:
        call = current_thread_call.get()
        if call is not None and call in _abandoned and call.thread is threading.current_thread():
            raise _over()


class Starter(Protocol):
    """An object that starts tasks of the event loop, as a task group does."""

    def start_soon(self, function: Callable[..., Coroutine[Any, Any, None]], /, *arguments: Any) -> object:
        """Start a task."""
        ...


class ThreadCall(Generic[T]):
    """One call of a function in one worker thread.

    Args:
        function: What to call, with no arguments; it runs in a copy of the caller's context.
        name: What to call it where it is listed as abandoned.
        threads: The limit of threads of its kind. None: it is something that the library needs for itself, and waits
            for nobody.
        gates: Limits it waits at before that one. All of them it holds until the function has really ended.
        abandon: Whether a cancelled `run()` returns at once and leaves the thread to itself. If not, it returns when
            the function has.
        waiting: As in `Gate.acquire`, for all of them.
        group: Where `join` starts its tasks; without one the function cannot join.
        duplicates: The gate at which later calls of the function wait if this one is abandoned; or None.
        on_late_end: Called in the thread when the function ends after it was abandoned, with the seconds since then.
    """

    def __init__(
        self,
        function: Callable[[], T],
        name: str,
        *,
        threads: Gate | None = tool_threads,
        gates: Sequence[Gate] = (),
        waiting: Waiting = nullcontext,
        abandon: bool,
        group: Starter | None = None,
        duplicates: Callable[[], Gate] | None = None,
        on_late_end: Callable[[float], None] | None = None,
    ) -> None:
        self.name, self.abandon = name, abandon
        self._function, self._on_late_end = function, on_late_end
        self._duplicates, self._waiting = duplicates, waiting
        self.threads = threads
        self._gates = gates if threads is None else (*gates, threads)
        self._slots: list[Gate] = []
        self._lock = threading.Lock()
        self._state = "new"  # new → running → ended, or new → dropped
        self._group = group
        self._deadline = math.inf
        self._joined: set[LoopCall[Any]] = set()
        self._joined_done: anyio.Event | None = None
        self._has_left = False
        self.abandoned = False
        self._parent: int | None = None  # in a forked child: the process in which it goes on
        self.token: EventLoopToken | None = None
        self.thread: threading.Thread | None = None

    async def run(self) -> T:
        """Wait for a free thread, call the function in it, and return its result.

        Raises:
            Exception: Whatever the function raises.
        """
        self._deadline, self.token = anyio.current_effective_deadline(), current_token()
        try:
            for gate in self._gates:
                await gate.acquire(self._waiting)
                self._slots.append(gate)
            values, error = await run_in_thread(self._work, abandon=self.abandon)
        finally:
            self._leave()
            await self._end_joined()
        if error is not None:
            raise error
        return values[0]

    def join(self, function: Callable[[], Awaitable[R]]) -> R:
        """Run an async function from within the thread: in the event loop, with deadline and context of the call.

        It cannot outlive the call, on either backend.

        Raises:
            RunCancelled: The call was abandoned, so its loop takes nothing more from it.
            BaseException: The loop's cancellation exception, when the call is cancelled meanwhile.
        """
        with self.lent():
            try:
                return self.call(function).start().result()
            except RunCancelled:
                # The loop's own exception, which a tool does not swallow by mistake, if the call is cancelled too.
                if not self._has_left:
                    anyio.from_thread.check_cancelled()
                raise

    def call(self, function: Callable[[], Awaitable[R]]) -> JoinedCall[R]:
        """A call that starts as with `join` and is not waited for; it ends with this one at the latest."""
        return JoinedCall(function, self, self._deadline)

    def begin(self, call: JoinedCall[Any]) -> None:
        """Start a call that the thread joins.

        Raises:
            OtherProcess: The call goes on in the parent of this process.
        """
        if self._parent is not None:
            raise OtherProcess(self._parent)
        self._joined.add(call)
        # Asked after it was added: what is there when the call is left is waited for, what comes later never runs.
        if self._has_left or not self.soon(self._start, call):
            self._joined.discard(call)
            call.drop(_over())

    def soon(self, function: Callable[..., object], *arguments: object) -> bool:
        """Schedule a plain function in the event loop of the call; returns whether the loop takes it."""
        return self.token is not None and not self.is_over and call_soon(self.token, function, *arguments)

    def _start(self, call: JoinedCall[Any]) -> None:
        if self._has_left or call.has_ended:
            call.drop(_over())
            self._note_end(call)
            return
        assert self._group is not None
        task = self._group.start_soon(self._run_joined, call)
        if isinstance(task, Joinable):  # which asyncio may cancel before its first step: then it says nothing itself
            task.when_ended(partial(self._note_end, call))

    async def _run_joined(self, call: LoopCall[Any]) -> None:
        try:
            await call.run()
        finally:
            self._note_end(call)

    def _note_end(self, call: LoopCall[Any]) -> None:
        call.drop(_over())
        self._joined.discard(call)
        if not self._joined and self._joined_done is not None:
            self._joined_done.set()

    async def _end_joined(self) -> None:
        """Cancel and wait for what the thread runs in the event loop, if the call ends before it."""
        if not self._joined:
            return
        self._joined_done = anyio.Event()
        for call in list(self._joined):
            call.cancel()
        await wait_out(self._joined_done)

    @property
    def is_here(self) -> bool:
        """Whether the calling thread is that of the function, and may join."""
        in_process = self._parent is None and self._group is not None
        return in_process and self.thread is threading.current_thread()

    @property
    def is_over(self) -> bool:
        """Whether the call was abandoned, or is in another process: nothing can be joined any more."""
        return self._has_left or self._parent is not None

    def _work(self) -> tuple[list[T], BaseException | None]:
        # What it raises is handed over as a value: AnyIO looks at it, and an exception may be of a class that raises.
        with self._lock:
            if self._state == "dropped":
                # Cancelled before this thread began; nobody will look at what comes back.
                raise RuntimeError("dropped before it began")
            self._state = "running"
            self.thread = threading.current_thread()
        current_thread_call.set(self)
        _at_work.add(self)
        try:
            values, error = self._outcome()
            if self._parent is not None:
                leave_child(error)
            return values, error
        finally:
            _at_work.discard(self)
            with self._lock:
                self._state = "ended"
            self._release()
            record = _abandoned.pop(self, None)
            if record is not None and self._on_late_end is not None:
                self._on_late_end(record.seconds)

    def _outcome(self) -> tuple[list[T], BaseException | None]:
        try:
            return [self._function()], None
        except BaseException as error:
            return [], error

    def _leave(self) -> None:
        self._has_left = True
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
        _abandoned[self] = AbandonedThread(self.name, self.thread, time.monotonic(), *of_run)
        if self._duplicates is not None:
            gate = self._duplicates()
            gate.take()
            self._slots.append(gate)

    def _release(self) -> None:
        for gate in reversed(self._slots):
            gate.release()

    @contextmanager
    def lent(self) -> Generator[None]:
        """Give this thread's slot to others while it only waits for an event loop.

        Otherwise tools that call agents whose tools need threads could use up all slots and wait for each other.
        """
        assert self.threads is not None  # what has no limit of its kind is the library's own, and joins nothing
        self.threads.release()
        try:
            yield
        finally:
            self.threads.take()

    def forget_parent(self) -> None:
        """Mark the call as past: this process is a fork of the one in which it goes on."""
        self._parent = os.getppid()
        for call in list(self._joined):
            call.drop(OtherProcess(self._parent))


class JoinedCall(LoopCall[R]):
    """An async call that a function in a worker thread makes in the event loop of its own call.

    Args:
        function: What to call; it runs in the context of whoever starts it.
        thread_call: The call whose function it is.
        deadline: When it is cancelled, on the clock of its event loop.
    """

    def __init__(self, function: Callable[[], Awaitable[R]], thread_call: ThreadCall[Any], deadline: float) -> None:
        super().__init__(function, deadline=deadline)
        self._thread_call = thread_call

    def start(self) -> Self:
        """Start the call; returns at once."""
        self._thread_call.begin(self)
        return self

    def cancel_from_thread(self) -> None:
        """Cancel the call; returns at once, and does nothing if it has ended."""
        self._thread_call.soon(self.cancel)


_at_work: set[ThreadCall[Any]] = set()


def threads_waited_for(token: EventLoopToken) -> list[ThreadCall[Any]]:
    """The thread calls of an event loop that go on and are waited for."""
    return [
        call
        for call in list(_at_work)
        if not call.abandoned and call.token is not None and call.token.native_token is token.native_token
    ]


@in_child
def _forget_threads() -> None:
    # But for the one that has forked they do not exist in the child, and that one belongs to nobody there.
    for call in list(_at_work):
        call.forget_parent()
    _at_work.clear()
    _abandoned.clear()
    if current_run.is_in_parent:
        end_child_with_this_step()


def _over() -> RunCancelled:
    return RunCancelled("the run that called this tool is over")
