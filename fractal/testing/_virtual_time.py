"""Virtual time: hours of deadlines and pauses in milliseconds, and no thread or socket that would be left behind by it.

trio's `MockClock` jumps to the next deadline as soon as every task waits. It does not see that a task waits for a
thread or a socket, which need real time: it would jump over their answers. So both are refused here. A thread is
refused before it starts, at the one place through which trio starts them; a socket, a pipe or a listener when a task
has made the step after which it waits for one, which an `Instrument` of trio's sees for every library there is.
"""

from __future__ import annotations

import functools
import importlib
import math
import sys
from collections.abc import Awaitable, Callable
from contextvars import ContextVar
from typing import TYPE_CHECKING, Any, TypeVar, TypeVarTuple, cast

import anyio

from fractal._concurrency.gates import approval_threads, hook_threads, tool_threads
from fractal._concurrency.stuck import line_above, line_of
from fractal._concurrency.threads import ThreadCall
from fractal._engine.pricing import prices_of_library
from fractal.errors import UserError
from fractal.testing._patching import Patch

if TYPE_CHECKING:
    from types import CodeType, FrameType

    import trio.testing

__all__ = ["NotInVirtualTime", "VirtualTime", "virtual_time"]

T = TypeVar("T")
Ts = TypeVarTuple("Ts")

_MOST_IDLE_TURNS = 10


class NotInVirtualTime(UserError):
    """A scenario needs real time: a thread, a socket, or a wake-up from outside."""


_ADVICE = "virtual time would jump over that: use async functions and a ScriptedModel, or test it in real time"


class VirtualTime:
    """A clock that jumps to the next deadline whenever every task waits, and runs scenarios by it, on trio.

    `run` runs one. As a decorator it makes a plain test of an async one, which needs no plugin.

    Example:
        >>> import anyio
        >>> time = VirtualTime()
        >>> @time
        ... async def test_an_hour() -> None:
        ...     await anyio.sleep(3600)
        >>> test_an_hour()
        >>> time.elapsed
        3600.0
    """

    def __init__(self) -> None:
        self._clocks: list[trio.testing.MockClock] = []

    @property
    def elapsed(self) -> float:
        """Seconds that have passed on this clock, in all its runs."""
        return sum(clock.current_time() for clock in self._clocks)

    def run(self, scenario: Callable[[*Ts], Awaitable[T]], *arguments: *Ts) -> T:
        """Run an async function from beginning to end, in an event loop of its own, whose time begins at 0.

        This blocks: call it where no event loop runs, as in a plain test.

        Args:
            scenario: The function, as for `anyio.run`.
            *arguments: What it is called with, by position.

        Returns:
            What the scenario returns.

        Raises:
            NotInVirtualTime: Something in it needs real time, whatever the scenario has made of that.
            Exception: What the scenario raises.
        """
        import trio.testing

        prices = prices_of_library()
        if prices is not None and not prices.is_loaded:
            anyio.run(prices.load)  # once in a process, in a thread
        guard = _guard_class()()
        self._clocks.append(trio.testing.MockClock(autojump_threshold=0))
        options = {"clock": self._clocks[-1], "instruments": [guard]}
        try:
            with _threads_are_refused():
                return anyio.run(guard.watch, scenario, arguments, backend="trio", backend_options=options)
        finally:
            if guard.refusal is not None:
                raise guard.refusal from None

    def __call__(self, test: Callable[..., Awaitable[T]]) -> Callable[..., T]:
        """Make a plain function of an async one; it runs on this clock."""

        @functools.wraps(test)
        def run(*arguments: Any, **named: Any) -> T:
            return self.run(functools.partial(test, *arguments, **named))

        return run


def virtual_time() -> VirtualTime:
    """Make a clock on which hours pass in milliseconds, to test deadlines, retries and pauses.

    Each scenario runs on trio, in an event loop of its own. What needs real time is refused with `NotInVirtualTime`:
    plain `def` tools and hooks, since they run in threads, and whatever waits for a socket, such as a model at an
    endpoint.

    Example:
        >>> from fractal import BaseAgent
        >>> from fractal.testing import ScriptedModel, answers, virtual_time
        >>> slow = BaseAgent("Slow", "s", client=ScriptedModel([answers.text("late", delay=9e9)]), timeout=3600)
        >>> time = virtual_time()
        >>> result = time.run(slow.run, "How long?")
        >>> result.stop_reason, time.elapsed
        ('deadline', 3600.0)
    """
    return VirtualTime()


class _Guard:
    """The part without trio's classes of a guard that ends a run in virtual time when it needs real time."""

    def __init__(self) -> None:
        self.refusal: NotInVirtualTime | None = None
        self._scope: anyio.CancelScope | None = None
        self._idle_turns = 0

    async def watch(self, scenario: Callable[..., Awaitable[T]], arguments: tuple[Any, ...]) -> T:
        """Run the scenario; what its tasks do is known to be this run's by their context."""
        _current_guard.set(self)
        with anyio.CancelScope() as self._scope:
            return await scenario(*arguments)
        assert self.refusal is not None  # nothing else cancels this scope
        raise self.refusal

    def refuse(self, what: str) -> NotInVirtualTime:
        """End the run; returns the error that the first reason is told by."""
        self.refusal = self.refusal or NotInVirtualTime(what)
        if self._scope is not None:
            self._scope.cancel()
        return self.refusal


_current_guard: ContextVar[_Guard | None] = ContextVar("fractal_virtual_time", default=None)


@functools.cache
def _guard_class() -> type[_Guard]:
    import trio

    names = ("wait_readable", "wait_writable", "wait_overlapped", "readinto_overlapped", "write_overlapped")
    waits: dict[CodeType, str] = {
        function.__code__: name for name in names if (function := getattr(trio.lowlevel, name, None)) is not None
    }

    class Guard(_Guard, trio.abc.Instrument):
        def after_task_step(self, task: trio.lowlevel.Task) -> None:
            self._idle_turns = 0
            if task.context.get(_current_guard) is not self or self.refusal is not None:
                return
            for frame, _ in task.iter_await_frames():
                if frame.f_code in waits:
                    self.refuse(f"a socket or a pipe is waited for at {line_of(task.coro) or task.name}; {_ADVICE}")

        def before_io_wait(self, timeout: float) -> None:
            """Check that some wake-up is due: without one, trio would poll without an end."""
            facts = trio.lowlevel.current_statistics()
            nothing_comes = not facts.tasks_runnable and facts.seconds_to_next_deadline == math.inf
            self._idle_turns = self._idle_turns + 1 if nothing_comes and timeout == 0 else 0
            if self._idle_turns > _MOST_IDLE_TURNS and self.refusal is None:
                self.refuse("every task waits, without a deadline, for something that none of them will do")

    return Guard


@functools.cache
def _threads_are_refused() -> Patch:
    """Have trio ask before it starts a thread; outside of virtual time the answer is always yes."""
    # Private, but there is no other place that all threads pass before they start, and a failure here has its way out.
    return Patch(importlib.import_module("trio._threads"), "start_thread_soon", _ask_first)


def _ask_first(start: Callable[..., None], *arguments: Any, **named: Any) -> None:
    guard = _current_guard.get()
    if guard is not None:
        frame = sys._getframe(1)  # pyright: ignore[reportPrivateUsage]
        raise guard.refuse(f"{_asker(frame)} needs a thread; {_ADVICE}")
    start(*arguments, **named)


def _asker(frame: FrameType | None) -> str:
    """The function that needs a thread, in words."""
    inner = frame
    while frame is not None:
        if frame.f_code is _RUN:
            call: ThreadCall[Any] = frame.f_locals["self"]
            return _WORDS.get(call.threads, "{}").format(call.name)
        frame = frame.f_back
    return f"what is at {line_above(inner) or 'a place unknown'}"


_RUN = cast("type[ThreadCall[Any]]", ThreadCall).run.__code__
_WORDS = {
    tool_threads: "the plain {}",
    hook_threads: "the plain function {!r}",
    approval_threads: "the plain function {!r}",
    None: "a request to an endpoint",  # what the library does for itself, it does for that
}
