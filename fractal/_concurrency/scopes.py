"""Helpers around cancellation and deadlines that more than one module needs."""

from __future__ import annotations

import math
import sys
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import anyio
from anyio.lowlevel import cancel_shielded_checkpoint, checkpoint

from fractal._concurrency.current import current_call, current_run
from fractal._texts import described, is_a
from fractal.errors import DeadlineWouldPass, RunError, ToolIgnoredCancellation, UnexpectedError

if TYPE_CHECKING:
    from collections.abc import Callable, Generator, Sequence

__all__ = [
    "ENDS_A_LOOP",
    "FaultOfTest",
    "carried",
    "first_of",
    "is_cancellation",
    "is_cut",
    "leaves",
    "move_on_after",
    "outranks_cancellation",
    "raising",
    "remaining",
    "require_time",
    "single_error",
    "stop_if_cancelled",
    "unexpected",
    "waiting",
    "without_cancellations",
]


ENDS_A_LOOP = (KeyboardInterrupt, SystemExit)
"""What ends asyncio's event loop, and all that runs on it, where it leaves a task; so it is handed over as a value."""


def move_on_after(seconds: float | None) -> anyio.CancelScope:
    """A cancel scope that ends after so many seconds; None or infinity: never by itself."""
    if seconds is None or math.isinf(seconds):
        return anyio.CancelScope()
    return anyio.move_on_after(seconds)


def remaining() -> float:
    """Seconds until the nearest enclosing deadline; infinity without one, 0 when it has passed."""
    return max(anyio.current_effective_deadline() - anyio.current_time(), 0.0)


def require_time(seconds: float, what: str) -> None:
    """Refuse, at its beginning, a wait that cannot end before the deadline.

    Args:
        seconds: What it will take.
        what: What takes so long.

    Raises:
        DeadlineWouldPass: There is not so much time.
    """
    left = remaining()
    if seconds and seconds >= left:
        raise DeadlineWouldPass(what, seconds, left)


@contextmanager
def waiting(what: str, note: Callable[[str], object]) -> Generator[None]:
    """A block that notes, if a wait of unknown length is cut in it, what was waited for."""
    try:
        yield
    except anyio.get_cancelled_exc_class():
        note(what)
        raise


def is_cancellation(error: BaseException) -> bool:
    """Whether an exception is a cancellation of any event loop's, or a group of nothing but those.

    `asyncio.CancelledError` also comes to trio, out of a thread with a loop of its own.
    """
    return all(is_a(leaf, _cancellations()) for leaf in leaves(error))


def _cancellations() -> tuple[type[BaseException], ...]:
    # Looked up, not imported: what nobody has imported, nobody has raised.
    modules: tuple[Any, Any] = sys.modules.get("asyncio"), sys.modules.get("trio")
    return tuple(
        kind
        for module, name in zip(modules, ("CancelledError", "Cancelled"), strict=True)
        if (kind := getattr(module, name, None)) is not None
    )


def first_of(errors: Sequence[BaseException]) -> BaseException:
    """The exception to raise of several: the first one that is no `Exception`, as Ctrl-C, or else the first of all."""
    return min(errors, key=lambda error: is_a(error, Exception))


def outranks_cancellation(error: BaseException) -> bool:
    """Whether an exception takes precedence over a cancellation that arrived meanwhile.

    Ctrl-C and the like do, and what tells of a tool that was left to itself: more is left than a cancellation says.
    """
    return any(
        is_a(leaf, ToolIgnoredCancellation) or not (is_a(leaf, Exception) or is_cancellation(leaf))
        for leaf in leaves(error)
    )


def without_cancellations(group: BaseExceptionGroup[BaseException]) -> BaseExceptionGroup[BaseException]:
    """The exceptions of a group, of which there is one at least, without the cancellations; itself without any."""
    if not any(map(is_cancellation, leaves(group))):
        return group  # a split would make another one of it
    _, others = group.split(is_cancellation)
    assert others is not None
    return others


async def is_cut() -> bool:
    """Whether a scope around the current task is cancelled.

    Of the tasks that are made here nothing else is an order to stop: `Task.cancel` is for the task that awaits a run,
    which cancels the scope of its tasks. When all tasks are cancelled at once, that may be a turn of the loop later. At
    the end of an event loop it may be that nobody awaits the run any more.
    """
    if anyio.current_effective_deadline() == -math.inf or _is_loop_ending():
        return True
    await cancel_shielded_checkpoint()
    return anyio.current_effective_deadline() == -math.inf


def _is_loop_ending() -> bool:
    """Whether asyncio has cancelled all tasks because its loop ends."""
    asyncio: Any = sys.modules.get("asyncio")
    if asyncio is None or anyio.get_cancelled_exc_class() is not asyncio.CancelledError:
        return False
    return all(task.cancelling() for task in asyncio.all_tasks())


async def stop_if_cancelled() -> float:
    """Let a cancellation that is meant for the caller arrive; without one, go on at once.

    Returns:
        The nearest enclosing deadline, which had to be asked for.

    AnyIO's `checkpoint_if_cancelled` waits for it on asyncio, and where none is delivered any more, as in what an
    abandoned thread starts, for ever.
    """
    deadline = anyio.current_effective_deadline()
    if deadline == -math.inf:
        await checkpoint()
    return deadline


def leaves(error: BaseException) -> list[BaseException]:
    """The exceptions in a group, however deep; the exception itself if it is no group, or one error of ours."""
    if not is_a(error, BaseExceptionGroup) or is_a(error, RunError):
        return [error]
    members: tuple[BaseException, ...] = _members(error)  # not by its attribute, which a user's class may replace
    return [leaf for member in members for leaf in leaves(member)]


_members: Any = vars(BaseExceptionGroup)["exceptions"].__get__


def unexpected(error: BaseException) -> UnexpectedError:
    """The error that a run ends with for an exception of no known kind."""
    members = leaves(error)
    wrapped = UnexpectedError("; ".join(map(described, members)))
    wrapped.__cause__ = members[0] if len(members) == 1 else error
    return wrapped


class FaultOfTest(BaseException):
    """Carries an exception of a test's own code out of the run that met it.

    Like Ctrl-C it is no `Exception`: no retry, fallback, tool or run makes a result of it. What leaves the outermost
    run is the exception that it carries.

    Args:
        error: The exception.
    """

    def __init__(self, error: Exception) -> None:
        super().__init__(error)
        self.error = error

    def __str__(self) -> str:
        return described(self.error)


@contextmanager
def single_error() -> Generator[None]:
    """Let a group with one exception in it leave as that exception.

    Cancellations that came along with a real error are left out; a group of several errors stays a group, but for
    faults of a test. A group of the user's own leaves as it is, and not in one of ours.
    """
    try:
        yield
    except BaseExceptionGroup as group:
        cancelled = anyio.get_cancelled_exc_class()
        errors = [leaf for leaf in leaves(group) if not is_a(leaf, cancelled)]
        if len(errors) == 1 or (errors and all(is_a(each, FaultOfTest) for each in errors)):
            raise errors[0] from errors[0].__cause__
        real = [each for each in group.exceptions if not is_cancellation(each)]
        if len(real) == 1:
            raise real[0] from real[0].__cause__
        raise


@contextmanager
def raising(failures: Sequence[BaseException]) -> Generator[None]:
    """A block around a task group whose tasks hand over what they fail with; it raises that at its end, as one error.

    Args:
        failures: Where they put it. Not into the group, of whose errors trio takes the texts, which may raise, and
            where what is in `ENDS_A_LOOP` would end asyncio.

    Raises:
        BaseException: One that is no `Exception`, as Ctrl-C; else a cancellation from outside; else the first.
    """
    try:
        with single_error():
            yield
    except BaseException as met:
        if failures and is_cancellation(met) and outranks_cancellation(first := first_of(failures)):
            raise first from met
        raise
    if failures:
        raise first_of(failures)


def carried(error: BaseException) -> BaseException:
    """An exception as the waiting caller gets it: outside any run, a `FaultOfTest` is the exception it carries.

    Args:
        error: What a task of ours has raised.
    """
    if is_a(error, FaultOfTest) and current_run.get() is None and current_call.get() is None:
        return error.error
    return error
