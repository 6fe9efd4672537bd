"""Small words about cancellation that the engine needs in more than one place."""

from __future__ import annotations

import math
import sys
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import anyio
from anyio.lowlevel import checkpoint

from fractal._texts import described, is_a
from fractal.errors import DeadlineWouldPass, RunError, UnexpectedError

if TYPE_CHECKING:
    from collections.abc import Callable, Generator, Iterator

__all__ = [
    "cancellation_noted",
    "cancellation_was_meant",
    "leaves",
    "move_on_after",
    "remaining",
    "require_time",
    "single_error",
    "stop_if_cancelled",
    "time_limit",
    "unexpected",
    "waiting",
]


def move_on_after(seconds: float | None) -> anyio.CancelScope:
    """A scope that ends after so many seconds; None or infinity: never by itself."""
    if seconds is None or math.isinf(seconds):
        return anyio.CancelScope()
    return anyio.move_on_after(seconds)


@contextmanager
def time_limit(seconds: float | None) -> Generator[anyio.CancelScope]:
    """The same, but that it keeps no cancellation for itself that is not its own.

    AnyIO tells a native one of asyncio's from its own by how many asyncio has counted, which can be too few: see
    `cancellation_was_meant`. What is out of time and cleans up, and then is cancelled natively, would not notice.
    """
    native: BaseException | None = None
    with move_on_after(seconds) as scope:
        try:
            yield scope
        except anyio.get_cancelled_exc_class() as error:
            if scope.cancel_called and _is_native(error):
                native = error
            raise
    if native is not None:
        raise native


def remaining() -> float:
    """Seconds until the nearest enclosing deadline; infinity without one, 0 when it has passed."""
    return max(anyio.current_effective_deadline() - anyio.current_time(), 0.0)


def require_time(seconds: float, what: str) -> None:
    """Give up a wait at its beginning that cannot end before the deadline does.

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
    """Have it noted what was waited for, where nobody can know how long it takes, if the wait is cut."""
    try:
        yield
    except anyio.get_cancelled_exc_class():
        note(what)
        raise


def cancellation_was_meant(error: BaseException) -> bool:
    """Whether a cancellation that was just caught is meant for the current task.

    On asyncio a task also meets `CancelledError` when something it awaited was cancelled on its own, such as a task
    that a tool started itself. That is a failure of the tool, not an order to stop.

    A yes is kept with the exception. Ask for it inside a task group, not only around it: when children of the group
    were cancelled for a reason of their own meanwhile, AnyIO takes back more of the task's cancellations than it has
    made, and asyncio does not count a native one any more.
    """
    if any(_is_marked(leaf, _MEANT) for leaf in leaves(error)):
        return True
    meant = _is_cancelled()
    if meant:
        for leaf in leaves(error):
            setattr(leaf, _MEANT, True)
            setattr(leaf, _NATIVE, not _is_of_anyio(leaf))
    return meant


def _is_native(error: BaseException) -> bool:
    """Whether a cancellation is asyncio's own, and meant."""
    if _is_marked(error, _NATIVE):
        return True
    return not any(map(_is_of_anyio, _contexts(error))) and cancellation_was_meant(error) and _is_marked(error, _NATIVE)


_MEANT, _NATIVE = "__fractal_meant__", "__fractal_native__"


def _is_marked(error: BaseException, mark: str) -> bool:
    return any(getattr(each, mark, False) for each in _contexts(error))


def _is_of_anyio(error: BaseException) -> bool:
    """Whether a scope has made a cancellation; on trio nothing else can."""
    asyncio: Any = sys.modules.get("asyncio")
    if asyncio is None or not is_a(error, asyncio.CancelledError):
        return True
    return str(error).startswith("Cancelled via cancel scope ")  # so does AnyIO itself


def _contexts(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:  # a second cancellation takes the place of the first
        yield error
        error = error.__context__


@contextmanager
def cancellation_noted() -> Generator[None]:
    """Keep in mind of a cancellation that passes by here whether it was meant."""
    try:
        yield
    except anyio.get_cancelled_exc_class() as error:
        cancellation_was_meant(error)
        raise


def _is_cancelled() -> bool:
    if anyio.current_effective_deadline() == -math.inf:
        return True
    # A native `Task.cancel()` leaves no mark on AnyIO's scopes. asyncio is looked up, not imported: if nobody has
    # imported it, this is not its loop.
    asyncio: Any = sys.modules.get("asyncio")
    if asyncio is None or anyio.get_cancelled_exc_class() is not asyncio.CancelledError:
        return True
    return bool(asyncio.current_task().cancelling())


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
    """The exceptions of a group, however deep; the exception itself if it is no group, or one error of ours."""
    if not is_a(error, BaseExceptionGroup) or is_a(error, RunError):
        return [error]
    members: tuple[BaseException, ...] = _members(error)  # not by its attribute, which a user's class may replace
    return [leaf for member in members for leaf in leaves(member)]


_members: Any = vars(BaseExceptionGroup)["exceptions"].__get__


def unexpected(error: BaseException) -> UnexpectedError:
    """What a run ends with that met an error of nobody's making."""
    members = leaves(error)
    wrapped = UnexpectedError("; ".join(map(described, members)))
    wrapped.__cause__ = members[0] if len(members) == 1 else error
    return wrapped


@contextmanager
def single_error() -> Generator[None]:
    """Let a group with one exception in it leave as that exception.

    Cancellations that came along with a real error are left out; a group of several errors stays a group.
    """
    try:
        yield
    except BaseExceptionGroup as group:
        cancelled = anyio.get_cancelled_exc_class()
        errors = [leaf for leaf in leaves(group) if not is_a(leaf, cancelled)]
        if len(errors) == 1:
            raise errors[0] from errors[0].__cause__
        raise
