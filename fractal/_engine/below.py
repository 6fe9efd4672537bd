"""What a run has begun, in whatever task or thread, and must not leave behind: runs, streams, batches, calls."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Protocol, TypeVar

import anyio

from fractal._concurrency.background import Background, Joinable, end_all, task_here
from fractal._concurrency.current import current_run
from fractal._concurrency.loops import call_soon
from fractal._concurrency.threads import refuse_abandoned

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    from anyio.lowlevel import EventLoopToken

    from fractal._engine.clock import RunClock

__all__ = ["Below", "Errand", "Origin", "origin_here", "origin_of"]

T = TypeVar("T")


class Below:
    """The tasks begun below a run that go on, with the tool calls that began them.

    Attributes:
        is_over: Whether nothing can begin below the run any more.
    """

    __slots__ = ("_tasks", "is_over")

    def __init__(self) -> None:
        self._tasks: dict[Joinable, tuple[str | None, bool]] = {}
        self.is_over = False

    def __bool__(self) -> bool:
        return bool(self._tasks)

    def note(self, task: Joinable, key: str | None, *, is_reached: bool) -> None:
        """Note a task that begins, so that it cannot outlive the run or the call; works in any thread.

        Args:
            task: What is begun.
            key: Of the tool call that begins it; None: the run's own functions.
            is_reached: Whether the scopes of the run reach whoever waits for it: then it is left to those.
        """
        self._tasks[task] = key, is_reached
        task.when_ended(lambda: self._tasks.pop(task, None))
        if self.is_over:
            task.cancel()

    def cancel(self) -> None:
        """Cancel all tasks."""
        for task in self._begun_by(None):
            task.cancel()

    def cancel_unreached(self, key: str) -> None:
        """Cancel the tasks that a tool call has begun and that its scopes do not reach."""
        for task, (_, is_reached) in self._begun_by(key).items():
            if not is_reached:
                task.cancel()

    async def end(self, key: str | None = None) -> None:
        """Cancel the tasks that a tool call has begun and not awaited, and wait for them.

        Args:
            key: Of the call. None: all that there is; the run is over then.
        """
        if self._tasks:
            await self._join(key)
        if key is None:
            self.is_over = True
            if self._tasks:
                await self._join(None)  # what another thread has noted in this moment

    async def _join(self, key: str | None) -> None:
        interrupted: BaseException | None = None
        while tasks := self._begun_by(key):
            try:
                await end_all([*tasks])
            except anyio.get_cancelled_exc_class() as error:
                interrupted = error  # meanwhile a thread may have begun more
            for task in tasks:  # in an event loop that has ended it does not say so
                self._tasks.pop(task, None)
        if interrupted is not None:
            raise interrupted

    def leave(self, key: str) -> None:
        """Cancel the tasks that a tool call has begun, without waiting for them."""
        for task in self._begun_by(key):
            task.cancel()
            self._tasks.pop(task, None)

    def _begun_by(self, key: str | None) -> dict[Joinable, tuple[str | None, bool]]:
        tasks = self._tasks.copy()  # at once: other threads may note something
        return {task: facts for task, facts in tasks.items() if key in (None, facts[0])}


class Above(Protocol):
    """A run, as far as the tasks begun below it need it."""

    clock: RunClock

    @property
    def is_over(self) -> bool:
        """Whether the run has ended, so that nothing can become part of it."""
        ...

    def note_below(self, task: Joinable, *, is_reached: bool) -> None:
        """Note a task that the current one begins."""
        ...


class Origin:
    """The run, if any, that something begun belongs to, and whether the scopes of that run reach it.

    Args:
        run: The run that the calling task works for; None outside of any.
        is_enclosed: Whether the scopes of that run, or of its tool call, reach the calling task.
    """

    __slots__ = ("is_enclosed", "run")

    def __init__(self, run: Any, *, is_enclosed: bool) -> None:
        self.run, self.is_enclosed = run, is_enclosed

    def do(
        self,
        function: Callable[[], Awaitable[T]],
        name: str,
        scope: anyio.CancelScope | None = None,
        token: EventLoopToken | None = None,
        on_cancel: Callable[[], object] | None = None,
        on_more_time: Callable[[float], object] | None = None,
    ) -> Awaitable[T]:
        """Run a function in a task of its own, which the run above ends and joins. What is returned is awaited at once.

        Args:
            function: What to run.
            name: Name of the task.
            scope: What cancels it, which the function enters. None: one around the function.
            token: The event loop that runs here, if that is known.
            on_cancel: As in `Background`.
            on_more_time: As in `Background`.

        Raises:
            BaseException: As `Background.result`.
        """
        task = Background(function, name, scope, token)
        task.on_cancel, task.on_more_time = on_cancel, on_more_time
        if self.run is not None:
            self.run.note_below(task, is_reached=self.is_enclosed)
        return task.result()


_OUTSIDE = Origin(None, is_enclosed=False)


def origin_of(task: object) -> Origin:
    """The origin of what the current task, which is given, begins.

    Raises:
        RunCancelled: It works for a thread that its run has left to itself.
    """
    refuse_abandoned()
    run = current_run.get()
    if run is None or run.is_over:  # the context was copied out of a run that has ended
        return _OUTSIDE
    return Origin(run, is_enclosed=run.is_task(task))


def origin_here() -> Origin:
    """The origin of what the current task begins.

    Raises:
        RunCancelled: It works for a thread that its run has left to itself.
    """
    return origin_of(task_here())


class Errand(Joinable):
    """A call that a thread of a run makes in any event loop, noted below the run before it begins.

    Args:
        run: The run, which waits for it.
        cancel: Cancels the call; in any thread.
    """

    __slots__ = ("_cancel",)

    def __init__(self, run: Above, cancel: Callable[[], object]) -> None:
        super().__init__(run.clock.token)
        self._cancel = cancel
        run.note_below(self, is_reached=False)

    @classmethod
    def begun_here(cls, cancel: Callable[[], object]) -> Errand | None:
        """An errand for the run that the calling thread works for; None if there is no such run."""
        run = current_run.get()
        return cls(run, cancel) if run is not None and not run.is_over else None

    def cancel(self) -> None:
        """Cancel the call; returns at once, and works in any thread."""
        self._cancel()

    def over(self) -> None:
        """Note the end of the call; works in any thread."""
        call_soon(self._token, self.end)
