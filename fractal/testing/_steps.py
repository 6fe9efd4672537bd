"""A scenario in an event loop of its own, cut after one of its steps; what `cancel_everywhere` is made of.

A step is what a task does between two suspensions, so the end of each is a checkpoint. asyncio's are counted by a task
factory, trio's by an instrument.
"""

from __future__ import annotations

import asyncio
import inspect
import sys
from collections.abc import Awaitable, Callable, Coroutine, Generator, Sequence
from contextlib import contextmanager
from importlib import import_module
from typing import Any

import anyio

from fractal._concurrency.current import current_run
from fractal._concurrency.scopes import leaves
from fractal._concurrency.stuck import line_of
from fractal.testing._leftovers import running_tasks

__all__ = ["WAYS", "Visit"]

_NEVER = 1e8
"""Seconds; a timer for so late a time is one that `Visit` fires by hand."""

_SECONDS = 4
"""Where there is a second cancellation, it comes 1, 2, 3 or 4 steps after the first, from point to point in turn."""


class Visit:
    """One run of a scenario.

    Args:
        scenario: An async function without arguments.
        backend: `"asyncio"` or `"trio"`.
        way: How it is cancelled; one of `WAYS` of the backend.
        point: After which of its steps, from 1; 0: not at all.
        checks: Called after it, in its event loop; may be async.

    Attributes:
        count: Steps that were made until the scenario ended.
        line: Where the task was that made the step after which the scenario was cancelled; None if it was not.
        error: What came out of the scenario though it had not been cancelled.
        faults: What was wrong with how it ended.
    """

    def __init__(
        self,
        scenario: Callable[[], Awaitable[object]],
        backend: str,
        way: str,
        point: int,
        checks: Sequence[Callable[[], object]] = (),
    ) -> None:
        self._scenario, self._checks = scenario, checks
        self.backend, self.way, self.point = backend, way, point
        self._second = point + 1 + point % _SECONDS
        self._is_on = self._got_cancellation = self._has_returned = False
        self._cuts: list[Callable[[], object]] = []
        self._is_ours: Callable[[str], bool] = lambda said: True
        self.main: Any = None  # the scenario's task
        self._before: set[int] = set()
        self.count = 0
        self.line: str | None = None
        self.error: BaseException | None = None
        self.faults: list[str] = []

    def run(self) -> None:
        """Run the scenario to its end, in this thread."""
        way = WAYS[self.backend][self.way]
        if self.backend == "trio":
            with _same_order():
                anyio.run(self._main, way, backend="trio", backend_options=_trio_options(self))
        else:
            options = {"loop_factory": lambda: _Loop(self)}
            anyio.run(self._main, way, backend="asyncio", backend_options=options)

    async def _main(self, way: Callable[[Visit], Awaitable[None]]) -> None:
        self._before = {task.id for task in running_tasks()}
        await way(self)
        if self._has_returned and self._got_cancellation:
            self.faults.append("the cancellation was swallowed: the scenario returned")
        for check in self._checks:
            await self._ask(check)
        # These would keep the scenario's exception, with what is in its frames, from being collected.
        self.main, self._cuts = None, []

    async def _ask(self, check: Callable[[], object]) -> None:
        try:
            answer = check()
            if inspect.isawaitable(answer):
                await answer
        except Exception as error:
            kind = "" if isinstance(error, AssertionError) else f"{type(error).__name__}: "
            self.faults.append(f"check() failed: {kind}{error}")

    def arm(self, *cuts: Callable[[], object], is_ours: Callable[[str], bool] = lambda said: True) -> None:
        """Set the functions that cancel the scenario: the first at its point, the second, if any, soon after.

        Args:
            *cuts: What cancels it.
            is_ours: Tells from what a cancellation of asyncio's says whether it is this one.
        """
        self._cuts, self._is_ours = list(cuts), is_ours

    async def scenario(self) -> None:
        """The scenario, watched."""
        self.main = _current_task()
        self._is_on = True
        run = current_run.get()
        try:
            await self._scenario()
            self._has_returned = True
        except BaseException as error:
            cancelled = anyio.get_cancelled_exc_class()
            if all(isinstance(leaf, cancelled) for leaf in leaves(error)):
                raise
            if self.is_cut:
                kinds = ", ".join(type(leaf).__name__ for leaf in leaves(error))
                self.faults.append(f"{kinds} took the place of the cancellation: {error}")
            else:
                self.error = error
        finally:
            self._is_on = False
            self._see_left()
            if current_run.get() is not run:
                self.faults.append("a run that has ended is still the current one")

    def _see_left(self) -> None:
        """Look for tasks in the moment in which the scenario ends: one turn of the loop later some would be gone."""
        here = anyio.get_current_task().id
        left = [task for task in running_tasks() if task.id not in self._before and task.id != here]
        if left:
            lines = (f"{task.name} at {_line_of(task.coro) or 'a place unknown'}" for task in left)
            self.faults.append(f"tasks left: {'; '.join(lines)}")

    def after_step(self, coroutine: object) -> None:
        """Count a step, and cancel the scenario after the chosen one."""
        if not self._is_on:
            return
        self.count += 1
        if self.count == self.point:
            self.line = _line_of(coroutine) or "its end"
            self._cuts[0]()
        elif self.line is not None and self.count == self._second and len(self._cuts) > 1:
            self._cuts[1]()

    def cancelled(self, task: object, said: str | None = None) -> None:
        """Note that a task has been cancelled; the scenario's own must not return after that.

        Args:
            task: The task.
            said: What asyncio's cancellation says; None: it is known to be ours.
        """
        if self._is_on and self.is_cut and task is self.main and (said is None or self._is_ours(said)):
            self._got_cancellation = True

    def whereabouts(self) -> str:
        """The line that the scenario is at, as far as another thread can see that."""
        coroutine = getattr(self.main, "coro", None) or (self.main.get_coro() if self.main is not None else None)
        return _line_of(coroutine) or "a place unknown"

    @property
    def is_cut(self) -> bool:
        """Whether the scenario has been cancelled."""
        return self.line is not None


_EVENT_LOOPS = sys.stdlib_module_names | {"anyio", "trio", "outcome", "sniffio"}


def _line_of(coroutine: object) -> str | None:
    return line_of(coroutine, outside=_EVENT_LOOPS)


def _current_task() -> Any:
    trio: Any = sys.modules.get("trio")
    try:
        return asyncio.current_task()
    except RuntimeError:
        return trio.lowlevel.current_task()


# ---- the ways of cancelling


async def _by_scope(visit: Visit) -> None:
    with anyio.CancelScope() as scope:
        visit.arm(scope.cancel, is_ours=_said_by(scope))
        await visit.scenario()


def _said_by(scope: anyio.CancelScope) -> Callable[[str], bool]:
    return lambda said: f"{id(scope):x}" in said


def _is_native(said: str) -> bool:
    return not said.startswith("Cancelled via cancel scope")


async def _by_task(visit: Visit, times: int = 1) -> None:
    def cancel() -> None:
        for _ in range(times):
            task.cancel()

    task = asyncio.ensure_future(visit.scenario())
    visit.arm(cancel, is_ours=_is_native)
    await asyncio.wait([task])
    if not task.cancelled():
        task.result()


async def _by_task_twice(visit: Visit) -> None:
    await _by_task(visit, times=2)


async def _by_wait_for(visit: Visit) -> None:
    loop = asyncio.get_running_loop()
    assert isinstance(loop, _Loop)
    visit.arm(loop.fire, is_ours=_is_native)
    try:
        await asyncio.wait_for(visit.scenario(), _NEVER)
    except TimeoutError:
        if not visit.is_cut:
            raise


async def _by_scope_and_task(visit: Visit) -> None:
    async def scoped() -> None:
        with anyio.CancelScope() as scope:
            visit.arm(scope.cancel, task.cancel, is_ours=_said_by(scope))
            await visit.scenario()

    task = asyncio.ensure_future(scoped())
    await asyncio.wait([task])
    if not task.cancelled():
        task.result()


async def _by_trio_scope(visit: Visit) -> None:
    import trio

    with trio.CancelScope() as scope:
        visit.arm(scope.cancel)
        await visit.scenario()


async def _by_two_scopes(visit: Visit) -> None:
    with anyio.CancelScope() as outer, anyio.CancelScope() as inner:
        visit.arm(inner.cancel, outer.cancel)
        await visit.scenario()


WAYS: dict[str, dict[str, Callable[[Visit], Awaitable[None]]]] = {
    "asyncio": {
        "scope": _by_scope,
        "native": _by_task,
        "native twice": _by_task_twice,
        "wait_for": _by_wait_for,
        "again": _by_scope_and_task,
    },
    "trio": {"scope": _by_scope, "native": _by_trio_scope, "again": _by_two_scopes},
}
"""How a scenario is cancelled, by backend: `again` is a second time, a few steps after the first."""


# ---- asyncio


class _Loop(asyncio.SelectorEventLoop):
    """An event loop that counts the steps of its tasks."""

    def __init__(self, visit: Visit) -> None:
        super().__init__()
        self._visit = visit
        self._latest: asyncio.TimerHandle | None = None
        self.set_task_factory(self._stepped)
        self.set_exception_handler(self._note_fault)

    def _stepped(self, loop: Any, coroutine: Any, **options: Any) -> Any:
        return _Task(_Stepped(coroutine, self._visit), self._visit, loop=loop, **options)

    def call_at(  # type: ignore[override]  # the types of the arguments, which are only passed on
        self, when: float, callback: Any, *args: Any, context: Any = None
    ) -> asyncio.TimerHandle:
        handle = super().call_at(when, callback, *args, context=context)
        if self._latest is None and when - self.time() > _NEVER / 2:  # the scenario may wait for ever, but later
            self._latest = handle
        return handle

    def _note_fault(self, _: object, context: dict[str, Any]) -> None:
        self._visit.faults.append(": ".join(str(context[key]) for key in ("message", "exception") if key in context))

    def fire(self) -> None:
        """Let the first timer go off that was set for the end of time."""
        if self._latest is not None and not self._latest.cancelled():
            self._latest._run()


class _Task(asyncio.Task[Any]):
    """A task that reports its cancellations."""

    def __init__(self, coroutine: Any, visit: Visit, **options: Any) -> None:
        self._visit = visit
        super().__init__(coroutine, **options)

    def cancel(self, msg: Any = None) -> bool:
        was_possible = super().cancel(msg)
        if was_possible:
            self._visit.cancelled(self, str(msg or ""))
        return was_possible


class _Stepped(Coroutine[Any, Any, Any]):
    """A coroutine that reports each of its steps."""

    def __init__(self, coroutine: Coroutine[Any, Any, Any], visit: Visit) -> None:
        self._coroutine, self._visit = coroutine, visit

    def send(self, value: Any) -> Any:
        try:
            return self._coroutine.send(value)
        finally:
            self._visit.after_step(self._coroutine)

    def throw(self, *error: Any) -> Any:
        try:
            return self._coroutine.throw(*error)
        finally:
            self._visit.after_step(self._coroutine)

    def close(self) -> None:
        self._coroutine.close()

    def __await__(self) -> Generator[Any, Any, Any]:
        return self._coroutine.__await__()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._coroutine, name)  # `cr_frame` and the like, by which libraries look at a task


# ---- trio


@contextmanager
def _same_order() -> Generator[None]:
    """Have trio run tasks in the same order each time, as for hypothesis, and not in a random one."""
    inside: Any = import_module("trio._core._run")
    was_on, state = inside._ALLOW_DETERMINISTIC_SCHEDULING, inside._r.getstate()
    inside._ALLOW_DETERMINISTIC_SCHEDULING = True
    inside._r.seed(0)
    try:
        yield
    finally:
        inside._ALLOW_DETERMINISTIC_SCHEDULING = was_on
        inside._r.setstate(state)


def _trio_options(visit: Visit) -> dict[str, Any]:
    import trio

    class Steps(trio.abc.Instrument):
        def after_task_step(self, task: Any) -> None:
            visit.after_step(task.coro)

        def task_scheduled(self, task: Any) -> None:
            # What it is woken with is an outcome, which nothing public shows.
            if isinstance(getattr(task._next_send, "error", None), trio.Cancelled):
                visit.cancelled(task)

    return {"instruments": [Steps()]}
