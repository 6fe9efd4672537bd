"""Who blocks the event loop: functions of the user's are watched while they run in it, where that is asked for.

An async function that computes or waits without giving up control stops every other task, and asyncio tells of it only
in its debug mode, by the name of a task. Here the tool or callback is named, with the line.
"""

from __future__ import annotations

import os
import sys
import threading
from collections.abc import Awaitable, Generator
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING, Any, TypeVar
from weakref import WeakSet

from fractal._concurrency.forks import in_child
from fractal._concurrency.stuck import line_in_thread

if TYPE_CHECKING:
    from collections.abc import Callable

__all__ = ["guarding", "is_guarded", "timed", "watched"]

T = TypeVar("T")

ENVIRONMENT = "FRACTAL_STALL_GUARD"
"""Name of the variable that asks for a guard, and says from how many seconds on a stall is reported; 0: for none."""
IN_DEBUG = 0.25
"""Seconds, in Python's development mode and in asyncio's debug mode."""

_TICKS = 3
"""Looks at the same step that a stall takes: a machine that is busy elsewhere keeps the one who looks waiting too."""


def timed(awaitable: Awaitable[T], name: str, tell: Callable[[str], object]) -> Awaitable[T]:
    """An awaitable of the user's as it is, or watched where somebody guards the event loop.

    Args:
        awaitable: What the user's function gave.
        name: What to call it.
        tell: Told of each stall, in the task that stalled.
    """
    return awaitable if _guard is None else _Timed(awaitable, _guard, name, tell)


def is_guarded() -> bool:
    """Whether anybody guards the event loop."""
    return _guard is not None


@contextmanager
def watched(name: str, tell: Callable[[str], object]) -> Generator[None]:
    """Watch a plain function of the user's that is called in the event loop."""
    guard = _guard
    if guard is None:
        yield
        return
    step = guard.begin(name)
    try:
        yield
    finally:
        guard.end(step, tell)


@contextmanager
def guarding(threshold: float) -> Generator[list[str]]:
    """Guard the event loops of the process for as long as the block lasts.

    Args:
        threshold: Seconds from which on a stall is reported.

    Returns:
        The warnings, as they come.
    """
    global _guard
    outer = _guard
    with _Guard(threshold) as _guard:
        try:
            yield _guard.messages
        finally:
            _guard = outer


class _Step:
    """The steps of a user's function between two suspensions."""

    __slots__ = ("line", "name", "ticks")

    def __init__(self, name: str) -> None:
        self.name = name
        self.ticks = 0
        self.line: str | None = None


class _Guard:
    """A thread that looks, every now and then, at what runs in the event loops."""

    def __init__(self, threshold: float) -> None:
        self._pause = threshold / _TICKS
        self._steps: dict[threading.Thread, list[_Step]] = {}
        self.messages: list[str] = []
        self._make_thread()
        _guards.add(self)

    def _make_thread(self) -> None:
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._look, name="fractal stall guard", daemon=True)
        self._start = threading.Lock()

    def __enter__(self) -> _Guard:
        return self

    def __exit__(self, *exc: object) -> None:
        self._over.set()
        if self._thread.ident is not None:
            self._thread.join()

    def begin(self, name: str) -> _Step:
        """Watch what this thread does from now on."""
        with self._start:
            if self._thread.ident is None:
                # If there is no thread left for it, that is no fault of what is watched; the next time there may be.
                with suppress(RuntimeError):
                    self._thread.start()
        step = _Step(name)
        self._steps.setdefault(threading.current_thread(), []).append(step)
        return step

    def end(self, step: _Step, tell: Callable[[str], object]) -> None:
        """Stop watching, and warn if the step took too long."""
        steps = self._steps[threading.current_thread()]
        steps.remove(step)
        if not steps:
            del self._steps[threading.current_thread()]
        if step.ticks >= _TICKS:
            for outer in steps:  # which have only called the one that is reported
                outer.ticks = 0
            message = self._message(step)
            self.messages.append(message)
            tell(message)

    def forget_parent(self) -> None:
        """Reset all but what the calling thread is about: this process is a fork of the guarded one."""
        current = threading.current_thread()
        self._steps = {thread: steps for thread, steps in self._steps.items() if thread is current}
        self._make_thread()

    def _message(self, step: _Step) -> str:
        at = f", at {step.line}" if step.line else ""
        seconds = step.ticks * self._pause
        return f"{step.name} has blocked the event loop for more than {seconds:.2g} s{at}"

    def _look(self) -> None:
        while not self._over.wait(self._pause):
            for thread, steps in list(self._steps.items()):
                for step in list(steps):
                    step.ticks += 1
                    if step.ticks == _TICKS:
                        step.line = line_in_thread(thread)


_guards: WeakSet[_Guard] = WeakSet()


@in_child
def _forget_parent() -> None:
    for guard in list(_guards):
        guard.forget_parent()


class _Timed(Generator[Any, Any, T], Awaitable[T]):
    """An awaitable whose steps are watched."""

    cr_frame = None  # for who looks where a coroutine waits, and goes on with `cr_await`

    def __init__(self, awaitable: Awaitable[T], guard: _Guard, name: str, tell: Callable[[str], object]) -> None:
        self.cr_await = awaitable
        self._steps: Any = awaitable.__await__()
        self._guard, self._name, self._tell = guard, name, tell

    def __await__(self) -> Generator[Any, Any, T]:
        return self

    def send(self, value: Any) -> Any:
        """Make a step."""
        step = self._guard.begin(self._name)
        try:
            return next(self._steps) if value is None else self._steps.send(value)
        finally:
            self._guard.end(step, self._tell)

    def throw(self, *error: Any) -> Any:
        """Make a step that begins with an exception."""
        step = self._guard.begin(self._name)
        try:
            return self._steps.throw(*error)
        finally:
            self._guard.end(step, self._tell)

    def close(self) -> None:
        """Close the awaitable."""
        self._steps.close()


def _asked_for() -> _Guard | None:
    said = os.environ.get(ENVIRONMENT)
    try:
        threshold = float(said) if said else 0.0
    except ValueError:
        threshold = 0.0
    if not said and (sys.flags.dev_mode or os.environ.get("PYTHONASYNCIODEBUG")):
        threshold = IN_DEBUG
    return _Guard(threshold) if threshold > 0 else None


_guard: _Guard | None = _asked_for()
