"""Tasks of our own: one that whoever calls a function waits for, and one that goes on while its starter does others."""

from __future__ import annotations

import contextvars
import math
import sys
from abc import ABC, abstractmethod
from collections.abc import Coroutine, Generator
from contextlib import AbstractContextManager, nullcontext, suppress
from contextvars import ContextVar
from typing import TYPE_CHECKING, Any, Generic, TypeVar, cast

import anyio
from anyio.lowlevel import checkpoint, current_token

from fractal._concurrency.loops import call_soon
from fractal._concurrency.scopes import carried, is_cancellation, outranks_cancellation, remaining, stop_if_cancelled
from fractal._concurrency.workers import wait_out
from fractal._log import log
from fractal._texts import is_a
from fractal.errors import InvalidArguments, RunCancelled

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Sequence

    from anyio.lowlevel import EventLoopToken

__all__ = [
    "Background",
    "Joinable",
    "Unstarted",
    "current_task_of",
    "end_all",
    "is_loop_here",
    "spawn",
    "spawn_later",
    "task_here",
]

T = TypeVar("T")


class Unstarted(Coroutine[Any, Any, T]):
    """A call of an async function whose coroutine is made at its first step; for tasks of AnyIO's groups.

    Such a group makes the coroutine before the task begins. If asyncio cancels the task before its first step, as when
    all tasks are cancelled at once, Python warns of a coroutine that was never awaited.

    Args:
        function: The function.
        arguments: Its arguments.

    Example:
        >>> async def add(a: int, b: int) -> int:
        ...     return a + b
        >>> anyio.run(Unstarted, add, 1, 2)
        3
    """

    __slots__ = ("_arguments", "_begun", "_function")

    def __init__(self, function: Callable[..., Coroutine[Any, Any, T]], *arguments: Any) -> None:
        self._function, self._arguments = function, arguments
        self._begun: Coroutine[Any, Any, T] | None = None

    def __await__(self) -> Generator[Any, Any, T]:
        return self._function(*self._arguments).__await__()

    def send(self, value: Any) -> Any:
        """Make a step of the coroutine; where nobody awaits this, but steps it."""
        self._begun = self._begun or self._function(*self._arguments)
        return self._begun.send(value)

    def throw(self, *error: Any) -> Any:
        """Raise an exception where the coroutine is; before its first step, here."""
        if self._begun is None:
            raise error[0]
        return self._begun.throw(*error)

    def close(self) -> None:
        """End the coroutine."""
        if self._begun is not None:
            self._begun.close()


_MOMENT = 0.1
_SHORT = 0.01
"""Seconds."""

_NO_SCOPE = nullcontext()
_NOTHING = object()


class Joinable(ABC):
    """Work under way in an event loop, which other tasks, in other event loops too, may cancel and wait for.

    Args:
        token: The event loop.
    """

    __slots__ = ("__weakref__", "_ended", "_token", "_waiting")

    def __init__(self, token: EventLoopToken) -> None:
        self._token = token
        self._ended: anyio.Event = token.backend_class.create_event()
        self._waiting: tuple[Callable[[], object], ...] = ()

    @property
    def has_ended(self) -> bool:
        """Whether the work has ended, cleanup included."""
        return self._ended.is_set()

    @abstractmethod
    def cancel(self) -> None:
        """Cancel the work; returns at once, and works in any thread."""

    async def join(self) -> None:
        """Wait for the end, however often the waiting task is cancelled meanwhile; raises nothing of the work."""
        await wait_out(self._ended if self.is_here else self._end_for_other_loop())

    def when_ended(self, tell: Callable[[], object]) -> None:
        """Add a callback for the end, called in the event loop of the work."""
        self._waiting = (*self._waiting, tell)

    def _end_for_other_loop(self) -> anyio.Event:
        """An event of the event loop in this thread, set at the end of the work."""
        ended, here = anyio.Event(), current_token()

        def tell() -> None:
            call_soon(here, ended.set)  # where that loop has ended, nobody waits

        if not self.in_its_loop(lambda: tell() if self.has_ended else self.when_ended(tell)):
            ended.set()
        return ended

    def end(self, _: object = None) -> None:
        """Note the end; only the first call counts."""
        self._ended.set()
        waiting, self._waiting = self._waiting, ()
        for tell in waiting:
            tell()

    def in_its_loop(self, function: Callable[[], object]) -> bool:
        """Call a function in the event loop of the work; returns False if that loop has ended."""
        if self.is_here:
            function()
            return True
        return call_soon(self._token, function)

    @property
    def is_here(self) -> bool:
        """Whether the event loop of the work is that of this thread."""
        return is_loop_here(self._token)


def task_here() -> object:
    """The current task of the backend, which AnyIO would wrap anew at each call."""
    return current_task_of(current_token())()


def is_loop_here(token: EventLoopToken) -> bool:
    """Whether an event loop is the one of this thread."""
    try:
        # Not AnyIO's function of that name, which looks for the backend first.
        return bool(token.backend_class.current_token() is token.native_token)
    except RuntimeError:  # another backend's loop, or none
        return False


def current_task_of(token: EventLoopToken) -> Callable[[], object]:
    """A function that returns the current task of an event loop."""
    # The backends are looked up, not imported: the one that runs here is there.
    if hasattr(token.native_token, "call_later"):
        current_task: Callable[[], object] = sys.modules["asyncio"].current_task
    else:
        current_task = sys.modules["trio"].lowlevel.current_task
    return current_task


class Background(Joinable, Generic[T]):
    """A task tied to no scope of its starter's, owned by the holder of this object, who must wait for it.

    It starts with the context and the deadline of its starter.

    Args:
        function: What it runs. What that raises is for whoever waits.
        name: Name of the task.
        scope: What cancels it, which the function enters. None: one around the function.
        token: The event loop that runs here, if that is known.
        deadline: Deadline of the starter; to be given where that is a callback of the event loop and no task.

    Attributes:
        on_cancel: Called when it is cancelled, in its event loop, before it hears of that itself.
        on_more_time: Called with its deadline when it is given more time.
    """

    __slots__ = ("_error", "_limit", "_starters", "_value", "on_cancel", "on_more_time", "scope")

    def __init__(
        self,
        function: Callable[[], Awaitable[T]],
        name: str,
        scope: anyio.CancelScope | None = None,
        token: EventLoopToken | None = None,
        deadline: float | None = None,
    ) -> None:
        token = token or current_token()
        backend = token.backend_class
        super().__init__(token)
        self.scope = scope if scope is not None else backend.create_cancel_scope()
        self._limit = self.scope.deadline  # of its own
        self._starters = deadline = backend.current_effective_deadline() if deadline is None else deadline
        if deadline < self._limit:
            self.scope.deadline = deadline
        self.on_cancel: Callable[[], object] | None = None
        self.on_more_time: Callable[[float], object] | None = None
        self._value: Any = _NOTHING
        self._error: BaseException | None = None
        # The function is not kept: contexts that were copied in the task may live long, and know this.
        spawn(token, self._main(function, self.scope if scope is None else _NO_SCOPE), name, self.end)

    async def _main(self, function: Callable[[], Awaitable[T]], scope: AbstractContextManager[Any]) -> None:
        _around.set((*_around.get(), self))
        try:
            with scope:
                self._value = await function()
        except BaseException as error:
            # Nobody is above this task to raise to; a native cancellation, as when the loop ends, is an end like any.
            if not is_a(error, anyio.get_cancelled_exc_class()):
                self._error = error
        finally:
            self.end()

    def cancel(self) -> None:
        """Cancel the task; returns at once, and works in any thread."""
        self.in_its_loop(self._cancel)

    def _cancel(self) -> None:
        if self.scope.cancel_called:
            return
        self.scope.cancel()
        if self.on_cancel is not None:
            self.on_cancel()

    def end(self, _: object = None) -> None:
        """Note the end; only the first call counts."""
        self.on_cancel = self.on_more_time = None  # which are a run's, and this may be remembered for longer
        super().end()

    @property
    def is_settled(self) -> bool:
        """Whether the task has ended and its exception has been raised to somebody: closing need not wait."""
        return self._ended.is_set() and self._error is None

    @property
    def is_around_caller(self) -> bool:
        """Whether the caller works for this task, and would wait for itself."""
        return self in _around.get() and not self.has_ended

    def deadline_here(self, noun: str) -> float:
        """The nearest deadline around the current task.

        Args:
            noun: What to call this one in an error.

        Raises:
            InvalidArguments: The current task is in another event loop, where nobody would wake it.
        """
        if not is_loop_here(self._token):
            raise InvalidArguments(f"the {noun} was entered in another event loop: read it there")
        return self._token.backend_class.current_effective_deadline()  # AnyIO looks for the backend each time

    def allow_until(self, deadline: float) -> None:
        """Extend the deadline beyond what the starter had, as far as the task may go; never shorten it."""
        deadline = min(deadline, self._limit)
        if deadline > self.scope.deadline:
            self.scope.deadline = deadline
            if self.on_more_time is not None:
                self.on_more_time(self.scope.deadline)

    async def result(self) -> T:
        """Wait for the end in the task that started this one, and return its result; every verb does so.

        No code of the user's runs in the task that calls a verb, and no scope of ours is open there. So whatever
        cancellation arrives here is meant for that task: it waits for nothing that anybody else could cancel, and no
        count of cancellations has to be asked, nor is one changed. What the user's code makes of a cancellation, an
        error or nothing at all, is seen by the task inside alone.

        Raises:
            RunCancelled: The task was cancelled, and the caller was not.
            BaseException: The caller's cancellation, whatever has come of it inside but what goes before it, such as
                Ctrl-C; else what the function raised.
        """
        try:
            if self._starters != math.inf:
                await self._follow_to_end()
            await self._ended.wait()
            if self.scope.cancel_called:
                await self._stop_if_late()
        except BaseException as met:
            self.cancel()
            with suppress(anyio.get_cancelled_exc_class()):  # another one, told by the first
                await self.join()
            if self._error is not None and is_cancellation(met) and outranks_cancellation(self._error):
                raise carried(self._error) from met
            raise
        if self._error is not None:
            self._tell()
        if self._value is _NOTHING:
            raise RunCancelled
        return cast("T", self._value)

    async def _follow_to_end(self) -> None:
        """Wait for the end, or nearly until the deadline, and pass on more time that the caller gets."""
        while not self._ended.is_set() and (left := remaining()) > _SHORT:
            with anyio.move_on_after(left / 2):
                await self._ended.wait()
            self.allow_until(anyio.current_effective_deadline())

    async def wait(self) -> None:
        """Wait for the end.

        Raises:
            BaseException: What it raised; told once.
        """
        await self._ended.wait()
        if self.scope.cancel_called:
            await self._stop_if_late()
        self._tell()

    async def _stop_if_late(self) -> None:
        # The task had the deadline of whoever waits, and may have met it a little sooner.
        while -math.inf < anyio.current_effective_deadline() <= anyio.current_time():
            await checkpoint()
        await stop_if_cancelled()

    async def cancel_and_join(self) -> None:
        """Cancel the task and wait for its end, however often the waiting task is cancelled meanwhile.

        Raises:
            BaseException: What it raised, if nobody has been told yet.
        """
        self.cancel()
        await self.join()
        # Without one more checkpoint, whose cancellation would replace the exception that made the caller leave.
        self._tell()

    def _tell(self) -> None:
        error, self._error = self._error, None
        if error is not None:
            raise carried(error)


async def end_all(tasks: Sequence[Joinable]) -> None:
    """Cancel tasks and wait for them, however often the waiting task is cancelled; what they raise is dropped."""
    for task in tasks:
        task.cancel()
    interrupted: BaseException | None = None
    for task in tasks:
        try:
            await task.join()
        except anyio.get_cancelled_exc_class() as error:
            interrupted = error
    if interrupted is not None:
        raise interrupted


_around: ContextVar[tuple[Background[Any], ...]] = ContextVar("fractal_background", default=())

_tasks: dict[Any, Callable[[object], object]] = {}
"""What to call at the end of each task of asyncio's, whose loop remembers them only weakly."""


def spawn_later(token: EventLoopToken, function: Callable[[], Coroutine[Any, Any, None]], name: str) -> None:
    """Have an event loop, if it still runs, start a task for a function soon; works in any thread.

    Args:
        token: The event loop.
        function: What to run; what it raises is logged.
        name: Name of the task.
    """
    loop: Any = token.native_token

    async def run() -> None:
        try:
            await function()
        except Exception as error:
            log.failure(f"{name}: failed", error)

    def begin() -> None:
        spawn(token, run(), name, lambda _: None)

    def start() -> None:
        if hasattr(loop, "call_later"):  # asyncio, which does not wait for what begins while it ends: then not at all
            loop.call_later(_MOMENT, begin)
        else:
            sys.modules["trio"].lowlevel.spawn_system_task(run, name=name)

    call_soon(token, start)


def spawn(
    token: EventLoopToken, main: Coroutine[Any, Any, None], name: str, on_end: Callable[[object], object]
) -> None:
    """Start a task that no scope of the calling task reaches.

    Args:
        token: The event loop that runs here.
        main: What it does; that must raise nothing.
        name: Name of the task.
        on_end: Called at its end on asyncio, for a task that is cancelled before its first step never runs there.
    """
    loop: Any = token.native_token
    # AnyIO has no task without a group. The backends are looked up, not imported: the one that runs here is there.
    if hasattr(loop, "create_task"):
        task = loop.create_task(main, name=name)
        _tasks[task] = on_end
        task.add_done_callback(_end)
    else:
        sys.modules["trio"].lowlevel.spawn_system_task(lambda: main, name=name, context=contextvars.copy_context())


def _end(task: object) -> None:
    """Forget a task that has ended, and call back; in one, since each callback takes a turn of the event loop."""
    _tasks.pop(task)(task)
