"""A batch at work: its inputs are taken one by one, and each run is a task."""

from __future__ import annotations

import time
from collections.abc import (
    AsyncGenerator,
    AsyncIterable,
    AsyncIterator,
    Awaitable,
    Callable,
    Generator,
    Iterable,
    Sized,
)
from contextlib import asynccontextmanager, contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, Generic, Literal, cast

import anyio
from pydantic import BaseModel

from fractal._agent import verbs
from fractal._checks import is_count
from fractal._concurrency.background import Unstarted
from fractal._concurrency.grace import settled
from fractal._concurrency.scopes import ENDS_A_LOOP, raising
from fractal._engine.below import Origin, origin_here
from fractal._engine.loop import conduct, converse
from fractal._engine.observers import note_unused
from fractal._engine.overrides import override_of
from fractal._functions.callables import is_plain
from fractal._json import is_mapping
from fractal._log import log
from fractal._texts import described, repr_of
from fractal._views.progress import Progress
from fractal.definition import AgentDefinition
from fractal.errors import InvalidArguments
from fractal.results import Content_co

if TYPE_CHECKING:
    from anyio.abc import TaskGroup

    from fractal._engine.run import Run
    from fractal.errors import RunError
    from fractal.options import RunOptions
    from fractal.results import AgentResult

__all__ = ["NAME", "Batch", "BatchItem", "OnError"]

_RUN_NAME = "fractal run of a batch"

_CLOSE_SECONDS = 5.0
"""Seconds that a generator of inputs has to clean up when the batch ends before it."""

OnError = Literal["collect", "fail_fast"]
"""What becomes of a run without success: it is a result like the others, or ends the batch."""


@dataclass(frozen=True, slots=True, kw_only=True)
class BatchItem(Generic[Content_co]):
    """One input and its result.

    Attributes:
        index: Origin of the input among all, from 0.
        input: The input.
        result: How its run ended.

    Example:
        >>> from fractal import AgentResult
        >>> BatchItem(index=0, input="Rome?", result=AgentResult(content="sunny", agent_name="Weather")).result.content
        'sunny'
    """

    index: int
    input: Any
    result: AgentResult[Content_co]

    def _repr_html_(self) -> str:
        from fractal._html import line, of_result

        return of_result(self.result, f"{self.index}: {line(self.input)} → ")


_END = object()


def _note_index(error: BaseException, index: int) -> None:
    """Note in an exception which input it is about; it may be of a user's class that takes no notes."""
    with suppress(Exception):
        error.add_note(f"this was input {index} of a batch, counted from 0")


NAME = "fractal batch"


class Batch:
    """A batch of runs, of `run_many` or `stream_many`: inputs are taken one by one, each run is a task."""

    def __init__(
        self,
        agent: AgentDefinition[Any],
        inputs: Iterable[object] | AsyncIterable[object],
        max_concurrency: int,
        on_error: OnError,
        options: RunOptions,
        on_progress: Callable[[Progress], object] | None = None,
    ) -> None:
        _check(agent, inputs, max_concurrency, on_error, on_progress)
        if options.get("conversation") is not None:
            raise InvalidArguments("conversation= is for one run after the other: leave it out of a batch")
        self.max_concurrency = max_concurrency
        self._agent, self._inputs, self._options = agent, inputs, options
        self._fails_fast, self._on_progress = on_error == "fail_fast", on_progress
        # The length of what can be read both ways, as a query of a database, is better not asked for in an event loop.
        self._total = len(inputs) if isinstance(inputs, Sized) and not isinstance(inputs, AsyncIterable) else None
        self._done = self._failed = self._running = 0
        self._started_at: float | None = None
        self._ended_at: float | None = None
        self._errors: list[BaseException] = []
        self.origin: Origin
        self._runs: set[Run] = set()
        self._slots: anyio.Semaphore
        self._group: TaskGroup

    @property
    def progress(self) -> Progress:
        """The progress of the batch; read from any thread."""
        started, ended = self._started_at, self._ended_at
        elapsed = 0.0 if started is None else (ended or time.monotonic()) - started
        return Progress(total=self._total, done=self._done, failed=self._failed, running=self._running, elapsed=elapsed)

    def check_options(self) -> None:
        """Raise the errors of wrong options before the first input."""
        verbs.check(self._agent, **self._options)

    async def run(self, deliver: Callable[[BatchItem[Any]], None]) -> None:
        """Take the inputs to their end, as `go`, in a task of its own.

        Raises:
            RunCancelled: The run above has ended, which does not wait for what somebody else awaits.
        """
        self.origin = origin_here()
        await self.origin.do(partial(self.go, deliver), NAME, on_cancel=self.cut, on_more_time=self.has_until)

    def cut(self) -> None:
        """Stop the work of the runs."""
        for run in self._runs:
            run.cut()

    def has_until(self, deadline: float) -> None:
        """Note that the deadline around the batch has moved to a later time."""
        for run in self._runs:
            run.allow_until(deadline)

    async def go(self, deliver: Callable[[BatchItem[Any]], None], room: anyio.Semaphore | None = None) -> None:
        """Take the inputs to their end.

        Args:
            deliver: Called with each result.
            room: Acquired once before each input is taken; None: there is always room for one more result.

        Raises:
            Exception: The first error of the inputs, of the use of the agent, or with `fail_fast` of a run; alone.
        """
        self._started_at = time.monotonic()
        self._slots = anyio.Semaphore(self.max_concurrency)  # here, since it belongs to a backend
        try:
            with raising(self._errors):
                async with anyio.create_task_group() as self._group:
                    with self._errors_end_it():
                        await self._begin_runs(deliver, room)
        finally:
            self._ended_at = time.monotonic()

    async def _begin_runs(self, deliver: Callable[[BatchItem[Any]], None], room: anyio.Semaphore | None) -> None:
        index = 0
        async with _source(self._inputs) as take:
            while True:
                await self._slots.acquire()
                if room is not None:
                    await room.acquire()
                user_input = await settled(take(), "the iterator of inputs")
                if user_input is _END:
                    return
                self._group.start_soon(Unstarted, self._run, index, user_input, deliver, name=_RUN_NAME)
                index += 1

    async def _run(self, index: int, user_input: object, deliver: Callable[[BatchItem[Any]], None]) -> None:
        with self._errors_end_it(index):
            self._running += 1
            try:
                result = await self._result(index, user_input)
            finally:
                self._running -= 1
            self._done += 1
            self._failed += not result.success
            if self._fails_fast and result.exception is not None:
                self._fail_with(result.exception, index)
            elif not self._errors:
                deliver(BatchItem(index=index, input=user_input, result=result))
            self._tell_progress()
            self._slots.release()

    async def _result(self, index: int, user_input: object) -> AgentResult[Any]:
        options = self._options
        if (run_id := options.get("run_id")) is not None:
            options = cast("RunOptions", {**options, "run_id": f"{run_id}/{index}"})
        if override_of(self._agent, "run") is not None:
            return await verbs.result_of(self._agent, user_input, **options)
        run = verbs.begin(self._agent, user_input, **options)
        run.origin = self.origin
        run.start_clock(anyio.current_effective_deadline())
        self._runs.add(run)
        try:
            return await conduct(run, converse)
        finally:
            self._runs.remove(run)

    @contextmanager
    def _errors_end_it(self, index: int | None = None) -> Generator[None]:
        # Several tasks may fail before the first has cancelled the others, and nobody wants a group of the same error.
        try:
            yield
        except (Exception, *ENDS_A_LOOP) as error:
            if index is not None and not self._errors:
                _note_index(error, index)
            self._end_with(error)

    def _fail_with(self, error: RunError, index: int) -> None:
        if not self._errors:
            _note_index(error, index)
        else:  # it failed before the first failure could cancel it
            self._errors[0].add_note(f"input {index} failed as well: {described(error)}")
        self._end_with(error)

    def _end_with(self, error: BaseException) -> None:
        self._errors.append(error)
        self._group.cancel_scope.cancel()

    def _tell_progress(self) -> None:
        if self._on_progress is not None:
            try:
                answer = self._on_progress(self.progress)
                if answer is not None:
                    note_unused("progress=", answer, log.warning)
            except Exception as error:
                log.failure(f"progress={repr_of(self._on_progress)} failed", error)


@asynccontextmanager
async def _source(inputs: Iterable[object] | AsyncIterable[object]) -> AsyncGenerator[Callable[[], Awaitable[object]]]:
    """A function whose result is awaited for the next input, or for `_END`."""
    if isinstance(inputs, AsyncIterable):
        later: AsyncIterator[object] = aiter(inputs)
        async with _closed_here(later):
            yield lambda: anext(later, _END)
    else:
        now = iter(inputs)

        async def take() -> object:
            return next(now, _END)

        yield take


@asynccontextmanager
async def _closed_here(inputs: AsyncIterator[object]) -> AsyncGenerator[None]:
    """Close a generator in this task: the garbage collector would close its scopes in another one."""
    # Around all of the generator's life: scopes that it holds open while it waits at a `yield` have to be inside.
    with anyio.CancelScope() as scope:
        try:
            yield
        finally:
            if isinstance(inputs, AsyncGenerator):
                scope.shield, scope.deadline = True, anyio.current_time() + _CLOSE_SECONDS
                try:
                    await cast("AsyncGenerator[object]", inputs).aclose()
                finally:
                    if scope.cancel_called:
                        log.warning(f"the generator of inputs has not cleaned up within {_CLOSE_SECONDS:g} s")


def _check(agent: object, inputs: object, max_concurrency: object, on_error: object, on_progress: object) -> None:
    if not isinstance(agent, AgentDefinition):
        raise InvalidArguments(f"agent={agent!r}: give an agent, then the inputs")
    if isinstance(inputs, (str, bytes, bytearray, BaseModel)) or is_mapping(inputs):
        raise InvalidArguments(f"inputs is one {type(inputs).__name__}: put it into a list")
    if not isinstance(inputs, (Iterable, AsyncIterable)):
        raise InvalidArguments(f"inputs={inputs!r}: give a list, a generator or another iterable, async or not")
    if not is_count(max_concurrency, 1):
        raise InvalidArguments(f"max_concurrency={max_concurrency!r}: give 1 or more")
    if on_error not in ("collect", "fail_fast"):
        raise InvalidArguments(f'on_error={on_error!r}: give "collect" or "fail_fast"')
    if on_progress is not None and (not callable(on_progress) or not is_plain(on_progress)):
        raise InvalidArguments(f"progress={on_progress!r}: give True, or a plain function that takes a Progress")
