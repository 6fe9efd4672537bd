"""Async functions, and async context managers such as agents with pools, for code that never awaits."""

from __future__ import annotations

import inspect
from collections.abc import Awaitable, Callable
from contextlib import AbstractAsyncContextManager
from functools import partial
from typing import TYPE_CHECKING, Any, Generic, ParamSpec, TypeVar, cast

import anyio

from fractal._concurrency.scopes import single_error
from fractal._log import log
from fractal._texts import repr_of
from fractal.errors import InvalidArguments, RunCancelled
from fractal.sync._portal import Caller, call_blocking

if TYPE_CHECKING:
    from types import TracebackType

    from fractal._concurrency.threads import JoinedCall
    from fractal.sync._event_loop import PortalCall

__all__ = ["Entered", "call", "enter"]

P = ParamSpec("P")
T = TypeVar("T")

GRACE = 5.0
"""Seconds that leaving a context manager may take when its block is cancelled, or its event loop is to end."""

_Reason = tuple["type[BaseException] | None", "BaseException | None", "TracebackType | None"]


def call(function: Callable[P, Awaitable[T]], /, *args: P.args, **kwargs: P.kwargs) -> T:
    """Call an async function, blocking, in the event loop that runs the caller's agents.

    Works wherever `run` does, by the same rules: in a plain `def` tool the call ends with the run at the latest, and
    Ctrl-C cancels it, waits for its cleanup and is then raised.

    Args:
        function: The function.
        *args: What it is called with, by position.
        **kwargs: What it is called with, by name.

    Returns:
        What the function returns.

    Raises:
        InvalidArguments: It is no async function.
        RunCancelled: The call was cancelled, by the end of its event loop say.
        Exception: What the function raises.

    Example:
        ```python
        pool = sync.call(asyncpg.create_pool, dsn)
        ```
    """
    if not callable(function):
        if inspect.iscoroutine(function):
            function.close()
        raise InvalidArguments(f"sync.call({repr_of(function)}): give an async function, and then its arguments")

    def begin() -> Awaitable[T]:
        awaitable = function(*args, **kwargs)
        if not inspect.isawaitable(awaitable):
            raise InvalidArguments(f"sync.call({repr_of(function)}): it is no async function: call it yourself")
        return awaitable

    return call_blocking(begin)


def enter(manager: AbstractAsyncContextManager[T, bool | None]) -> Entered[T]:
    """Enter an async context manager from blocking code, for a block: an agent that opens a pool, the pool itself.

    It is entered and left in one task of the event loop that runs the caller's agents, so what it opens can be used by
    their tools. It is left however the block ends. Works wherever `run` does.

    Args:
        manager: An agent, or anything else for `async with`.

    Returns:
        The block: `with sync.enter(agent) as agent:`. What follows `as` is what it would be after `async with`.

    Raises:
        InvalidArguments: It is no async context manager.

    Example:
        ```python
        with sync.enter(Shop()) as shop:
            result = sync.run(shop, "Which orders are late?")
        ```
    """
    return Entered(manager)


class Entered(Generic[T]):
    """An async context manager as a block of blocking code; made by `enter`."""

    _call: JoinedCall[bool] | PortalCall[bool] | None = None  # here: Ctrl-C may end `__init__` before it is set

    def __init__(self, manager: AbstractAsyncContextManager[T, bool | None]) -> None:
        kind = cast("type[Any]", type(manager))
        if not (hasattr(kind, "__aenter__") and hasattr(kind, "__aexit__")):
            raise InvalidArguments(f"sync.enter({repr_of(manager)}): give something for `async with`")
        self._hold = _Hold(manager)
        self._caller: Caller | None = None

    def __enter__(self) -> T:
        if self._call is not None:
            raise InvalidArguments("this block is entered once: call sync.enter(…) for another one")
        self._caller = caller = Caller.here()
        self._call = call = caller.call(self._hold.run)
        try:
            call.start()
            caller(self._hold.entered)
            if not self._hold.is_in:
                call.result()  # raises what was raised there
            return self._hold.value[0]
        except BaseException:
            call.cancel_from_thread()
            call.wait()
            raise

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> bool:
        call, caller = self._call, self._caller
        if call is None or caller is None:
            raise InvalidArguments("the block has not begun: write `with sync.enter(…):`")
        if call.has_ended:  # with its event loop
            return False
        try:
            caller.end(partial(self._hold.leave, (kind, error, traceback)))
        except BaseException:
            call.cancel_from_thread()
            call.wait()
            raise
        try:
            return call.result() if call.has_ended or not caller.must_not_wait else False
        except RunCancelled:
            if caller.is_over:
                return False
            raise

    def __del__(self) -> None:
        call = self._call
        if call is not None and not call.has_ended:  # not left: by Ctrl-C in the moment of leaving, say
            call.cancel_from_thread()


class _Hold(Generic[T]):
    """A task that enters and leaves a context manager, since cancel scopes demand one task for both."""

    def __init__(self, manager: AbstractAsyncContextManager[T, bool | None]) -> None:
        self._manager = manager
        self._made: tuple[anyio.Event, anyio.Event, anyio.Event] | None = None
        self._reason: _Reason = (None, None, None)
        self._goes_no_further = False
        self.value: list[T] = []

    @property
    def is_in(self) -> bool:
        """Whether the context manager has been entered."""
        return bool(self.value)

    async def run(self) -> bool:
        """Enter the context manager and leave it on request; returns whether it suppresses the block's exception.

        When this is cancelled, the context manager is left with that, and has `GRACE` for it.
        """
        # No scope may be opened around `__aexit__` alone: those that `__aenter__` has opened are to be left in it.
        scope = anyio.CancelScope()
        with single_error():
            async with anyio.create_task_group() as group:
                group.start_soon(self._keep, scope)
                await self._until_left(scope)
        return self._goes_no_further

    async def entered(self) -> None:
        """Wait until the context manager has been entered, or has failed to be."""
        await self._events()[0].wait()

    async def leave(self, reason: _Reason) -> None:
        """Leave the context manager, and wait for its end.

        Args:
            reason: What ended the block, as for `__aexit__`.
        """
        self._reason = reason
        _, leaving, left = self._events()
        leaving.set()
        await left.wait()

    async def _until_left(self, scope: anyio.CancelScope) -> None:
        _, leaving, left = self._events()
        try:
            await left.wait()
        except BaseException as error:
            if not leaving.is_set():
                self._reason = type(error), error, error.__traceback__
            scope.deadline = anyio.current_time() + GRACE
            leaving.set()
            raise

    async def _keep(self, scope: anyio.CancelScope) -> None:
        entered, _, left = self._events()
        try:
            with scope:
                try:
                    self.value.append(await self._manager.__aenter__())
                    scope.shield = True
                finally:
                    entered.set()
                await self._wait_and_leave()
            if scope.cancelled_caught:
                log.warning(f"{repr_of(self._manager)} had to be left, and has not been in {GRACE:g} s")
        finally:
            left.set()

    async def _wait_and_leave(self) -> None:
        try:
            await self._events()[1].wait()
        except BaseException as error:  # asyncio's own cancellation, which no shield keeps out
            await self._manager.__aexit__(type(error), error, error.__traceback__)
            raise
        self._goes_no_further = bool(await self._manager.__aexit__(*self._reason))

    def _events(self) -> tuple[anyio.Event, anyio.Event, anyio.Event]:
        # Made in the event loop, by whichever task is first there.
        if self._made is None:
            self._made = anyio.Event(), anyio.Event(), anyio.Event()
        return self._made
