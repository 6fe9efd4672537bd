"""Time to clean up for code of the user's that is cancelled.

AnyIO and trio cancel again at each `await`, so a `finally:` that awaits does not get far. Code that was written for
asyncio relies on the other way: one exception, and then peace. Here it has both: one cancellation, then `Limits.grace`
seconds in which it is left alone, and then cancellation at each `await`, but only so often that it costs nothing.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Awaitable, Generator
from functools import partial
from types import CoroutineType
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

import anyio

from fractal._concurrency.current import current_run
from fractal._concurrency.scopes import (
    is_cancellation,
    is_cut,
    outranks_cancellation,
    stop_if_cancelled,
    without_cancellations,
)
from fractal._concurrency.stuck import line_of
from fractal._texts import is_a
from fractal.errors import UnexpectedError

if TYPE_CHECKING:
    from collections.abc import Callable

    from anyio.lowlevel import EventLoopToken

__all__ = ["DEFAULT_GRACE", "answered", "graced", "settled"]

T = TypeVar("T")

DEFAULT_GRACE = 5.0
"""Seconds to clean up, where no run says how many."""

_COROUTINE: type = CoroutineType

_PAUSE = 0.01
"""Seconds between two cancellations of code that goes on after its grace: each costs, and it may hold out for long."""


class _Clock(Protocol):
    """The clock of a run, as far as cleaning up needs it."""

    token: EventLoopToken

    @property
    def is_here(self) -> bool:
        """Whether the current task is in the event loop of the run."""
        ...


class _Emitter(Protocol):
    """The emitter of a run, as far as cleaning up needs it."""

    def warn(self, text: str) -> None:
        """Warn the user of the run."""
        ...


class _Owner(Protocol):
    """A run, as far as cleaning up needs it."""

    clock: _Clock
    emitter: _Emitter

    @property
    def grace(self) -> float:
        """Seconds for cleaning up."""
        ...


async def graced(awaitable: Awaitable[T], name: str | None = None) -> T:
    """Await a user's awaitable, which gets its grace when it is cancelled.

    Args:
        awaitable: What the user's function gave.
        name: What to call it in the warning that it has not stopped in time; None: somebody else warns.

    Raises:
        BaseException: What it raises, or the cancellation.
    """
    run: _Owner | None = current_run.get()
    if run is not None and not run.clock.is_here:  # `sync.start` in a tool: the run above is in another event loop
        run = None
    scope = run.clock.token.backend_class.create_cancel_scope() if run is not None else anyio.CancelScope()
    try:
        with scope:
            return await _Watched(awaitable, name, run, scope)
    except anyio.get_cancelled_exc_class():
        await stop_if_cancelled()  # with the exception of the scope that is cancelled, which knows its own
        raise
    await stop_if_cancelled()
    raise AssertionError  # pragma: no cover - only a cancellation leaves the scope early


async def answered(awaitable: Awaitable[T], name: str) -> T:
    """Await a user's awaitable for a run: with its grace, and with failures told from cancellations.

    Args:
        awaitable: What the user's function gave.
        name: What to call it.

    Raises:
        BaseException: As `settled`.
    """
    return await settled(graced(awaitable, name), name)


async def settled(awaitable: Awaitable[T], name: str) -> T:
    """Await an awaitable, and tell its failures from a cancellation of the waiting task.

    A cancellation comes out as that, though a cleanup has raised something else meanwhile. A cancellation that nobody
    asked for, as of a task that the user's code has cancelled itself, is a failure.

    Args:
        awaitable: What to await.
        name: What to call it.

    Raises:
        UnexpectedError: It ended with a cancellation that was not meant for it.
        Exception: What it raised.
    """
    try:
        return await awaitable
    except BaseException as error:
        failure = error
    try:
        # Out here, for a cancellation not to refer to the failure: event loops look at that, and it may raise.
        await _tell_apart(failure, name)
        raise failure
    finally:
        del failure  # which refers to this frame


async def _tell_apart(error: BaseException, name: str) -> None:
    """Raise what an exception stands for: the waiting task's cancellation, or an error if nobody cancelled that."""
    if outranks_cancellation(error):
        return
    await stop_if_cancelled()
    if is_cancellation(error):
        if not await is_cut():
            raise UnexpectedError(f"{name} was cancelled from inside: something it awaited was cancelled") from error
        await stop_if_cancelled()
    elif is_a(error, BaseExceptionGroup):
        failures = without_cancellations(error)
        if failures is not error:
            raise failures from error.__cause__


class _Watched(Generator[Any, Any, T], Awaitable[T]):
    """An awaitable that gets one cancellation, and is then shielded for its grace.

    Whether a cancellation comes from outside is asked of the scopes: with ours shielded, it is gone if it does.

    What is thrown in on asyncio is not AnyIO's exception, but a plain one: scopes and groups that the user's code has
    open would take AnyIO's for their own, as nothing around them is cancelled behind the shield, and it would go on.
    Trio has no other exception. There the shield waits until no nursery is open.
    """

    __slots__ = (
        "_after_rest",
        "_held",
        "_is_late",
        "_name",
        "_rest",
        "_run",
        "_scope",
        "_step",
        "_steps",
        "_task",
        "cr_await",
    )

    cr_frame = None  # for who looks where a coroutine waits, and goes on with `cr_await`

    def __init__(self, awaitable: Awaitable[T], name: str | None, run: _Owner | None, scope: anyio.CancelScope) -> None:
        self.cr_await, self._name, self._run, self._scope = awaitable, name, run, scope
        self._steps: Any = _steps_of(awaitable)
        self._step: Callable[[Any], Any] = self._steps.send
        self._rest: Generator[Any, Any, None] | None = None  # what a cancellation waits for
        self._after_rest: Callable[[], Any] | None = None
        self._is_late = False  # told of the end of its grace
        self._held: Any = None  # on asyncio: what it waits for, which would keep a cancellation to itself
        self._task: Any = None  # on trio

    def __await__(self) -> Generator[Any, Any, T]:
        return self

    def __next__(self) -> Any:
        """Make a step; asyncio calls this, many times."""
        self._held = None
        return self._with_notice(self._step(None))

    def send(self, value: Any) -> Any:
        """Make a step with an outcome; trio calls this."""
        error = getattr(value, "error", None)
        if error is None or self._rest is not None or not is_a(error, anyio.get_cancelled_exc_class()):
            return self._step_on_trio(value)
        step = partial(self._step, value)
        return self._cancel(step, step)

    def _step_on_trio(self, value: Any) -> Any:
        """Make a step; one that leaves the last nursery may have been cancelled in there, unseen until now."""
        if self._task is None:
            self._task = sys.modules["trio"].lowlevel.current_task()
        nurseries = self._task.child_nurseries
        wanted = self._step(value)
        # A nursery whose wait is cancelled is so itself. In one that ends by itself nobody has been told yet.
        was_told = any(each.cancel_scope.cancel_called for each in nurseries)
        if was_told and not self._task.child_nurseries and not self._scope.cancel_called:
            self._shield_if_cut()
        return wanted

    def throw(self, kind: Any, value: Any = None, traceback: Any = None) -> Any:
        """Make a step that begins with an exception; asyncio calls this."""
        error = value if value is not None else kind if isinstance(kind, BaseException) else kind()
        if self._rest is not None:
            return self._end_rest()
        throw, held, self._held = self._steps.throw, self._held, None
        if not is_a(error, anyio.get_cancelled_exc_class()):
            return self._with_notice(throw(error))
        tell, tell_once = partial(throw, error), partial(throw, type(error)())
        if held is not None:
            tell, tell_once = partial(self._pass_on, held, tell), partial(self._pass_on, held, tell_once)
        return self._with_notice(self._cancel(tell, tell_once))

    def _with_notice(self, wanted: Any) -> Any:
        """The awaited future; for a task or a gathering, a stand-in that brings a cancellation here first.

        Those pass a cancellation on, and end when what they wait for has cleaned up. Until then AnyIO would cancel
        them in each turn of the event loop, and nobody would know that the grace has to begin.
        """
        if wanted is None or type(wanted) is _plain_future() or not hasattr(wanted, "add_done_callback"):
            return wanted
        self._held, wanted._asyncio_future_blocking = wanted, False
        stands_for_it = wanted.get_loop().create_future()
        wanted.add_done_callback(partial(_wake, stands_for_it))
        stands_for_it._asyncio_future_blocking = True
        return stands_for_it

    def _pass_on(self, held: Any, tell: Callable[[], Any]) -> Any:
        """Cancel the held future as asyncio does, and wait on; if that has ended, cancel the awaitable."""
        if not held.cancel():
            return tell()
        held._asyncio_future_blocking = True
        return held

    def close(self) -> None:
        """Close the awaitable."""
        self._steps.close()

    def _cancel(self, tell: Callable[[], Any], tell_once: Callable[[], Any]) -> Any:
        """Cancel the awaitable: as the cancellation came, or with the one from before its grace."""
        if not self._scope.cancel_called:
            wanted = (tell_once if self._shield_if_cut() else tell)()
            return self._shielded(wanted)
        if not self._is_late:
            self._is_late = True
            self._name_as_stuck()
            return tell()
        self._rest, self._after_rest = _rest().__await__(), tell
        self._step = self._wait
        return self._wait(None)

    def _shield_if_cut(self) -> bool:
        """Begin the grace, if the awaitable was cancelled from outside and the grace has yet to begin."""
        scope = self._scope
        if scope.shield or (anyio.current_effective_deadline() != -math.inf and not self._is_cut_behind_shield()):
            if self._step != self._step_out or not _has_cancelled_inside(scope):
                self._step = self._steps.send
            return False  # something it awaited was cancelled, or it is shielded in a scope of its own that is
        scope.shield = True
        if anyio.current_effective_deadline() == -math.inf or _has_open_nursery():
            # A scope of its own is cancelled, which has to see the others: once that is left it will have its grace.
            scope.shield = False
            self._step = self._step_out
            return False
        scope.deadline = anyio.current_time() + self._grace
        self._step = self._steps.send
        return True

    def _is_cut_behind_shield(self) -> bool:
        """Whether the awaitable was cancelled from outside, has left its own cancelled scope, and is shielded now."""
        # What came out of that scope was the cancellation, for AnyIO lets it out where there is one from outside.
        is_cut: bool = getattr(self._scope, "_effectively_cancelled", False)
        return is_cut and self._step == self._step_out and not _has_cancelled_inside(self._scope)

    def _step_out(self, value: Any) -> Any:
        return self._shielded(self._steps.send(value))

    def _shielded(self, wanted: Any) -> Any:
        """The awaited future, after the grace has begun if the task was cancelled."""
        if self._step == self._step_out:
            self._shield_if_cut()
        return wanted

    def _name_as_stuck(self) -> None:
        run, name = self._run, self._name
        if run is not None and name is not None:
            where = line_of(self.cr_await)
            stuck = f", stuck at {where}" if where else ""
            late = f"has not stopped {self._grace:g} s after it was cancelled"
            run.emitter.warn(f"{name} {late}{stuck}; the run waits for it")

    @property
    def _grace(self) -> float:
        return self._run.grace if self._run is not None else DEFAULT_GRACE

    def _wait(self, value: Any) -> Any:
        """Make a step of the pause before the next cancellation."""
        assert self._rest is not None
        try:
            return self._rest.send(value)
        except StopIteration:
            return self._end_rest()

    def _end_rest(self) -> Any:
        assert self._rest is not None
        assert self._after_rest is not None
        self._rest.close()
        self._rest, self._step = None, self._steps.send
        return self._after_rest()


def _has_cancelled_inside(scope: Any) -> bool:
    """Whether a cancelled scope is open inside of a scope, in the same task; AnyIO has no public way to ask."""
    # Its backend for trio keeps none, and there the answer is no.
    inside = [each for each in getattr(scope, "_child_scopes", ()) if each._host_task is scope._host_task]
    return any(each.cancel_called or _has_cancelled_inside(each) for each in inside)


def _plain_future() -> Any:
    return getattr(sys.modules.get("asyncio"), "Future", None)


def _wake(future: Any, _: object) -> None:
    if not future.done():
        future.set_result(None)


async def _rest() -> None:
    with anyio.CancelScope(shield=True):
        await anyio.sleep(_PAUSE)


def _steps_of(awaitable: Any) -> Any:
    # A coroutine, as nearly always, makes its steps itself: one object less.
    steps: Any = awaitable if type(awaitable) is _COROUTINE else awaitable.__await__()
    return steps if hasattr(steps, "throw") else _awaiting(awaitable)


async def _awaiting(awaitable: Awaitable[T]) -> T:
    return await awaitable


def _has_open_nursery() -> bool:
    trio: Any = sys.modules.get("trio")
    if trio is None or anyio.get_cancelled_exc_class() is not trio.Cancelled:
        return False
    return bool(trio.lowlevel.current_task().child_nurseries)
