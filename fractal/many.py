"""Many inputs for one agent: all results at the end, or each as it comes."""

from __future__ import annotations

from collections.abc import AsyncIterable, Callable, Iterable
from typing import TYPE_CHECKING, Any, Generic, Protocol, cast, overload

import anyio
from typing_extensions import TypeForm, TypeVar, Unpack

from fractal._batch import NAME, Batch, BatchItem, OnError
from fractal._concurrency.background import Background
from fractal._concurrency.feed import Feed
from fractal._concurrency.feed_block import FeedBlock
from fractal._engine.below import origin_here
from fractal._texts import repr_of
from fractal._views.progress import Progress, html_of, shown
from fractal.definition import AgentDefinition
from fractal.errors import InvalidArguments
from fractal.results import Content, Content_co

if TYPE_CHECKING:
    from fractal.options import PlainOptions, RunOptions
    from fractal.results import AgentResult

__all__ = ["BatchItem", "BatchStream", "OnError", "OnQueues", "Progress", "run_many", "stream_many"]

Answer = TypeVar("Answer", default=Any)
"""What the answers of a batch have to be."""


class OnQueues(Protocol[Content_co]):
    """An agent whose runs other processes can take from a queue, as `fractal.durable.DurableAgent` is."""

    def __on_queue__(self, queue: str, /) -> AgentDefinition[Content_co]:
        """An agent for this process whose runs go into a queue."""
        ...


DEFAULT_CONCURRENCY = 8
"""Runs at a time."""

DEFAULT_BUFFER = 16
"""Results that may wait for their reader."""


@overload
async def run_many(
    agent: AgentDefinition[Content] | OnQueues[Content],
    inputs: Iterable[object] | AsyncIterable[object],
    *,
    max_concurrency: int = DEFAULT_CONCURRENCY,
    on_error: OnError = "collect",
    on: str | None = None,
    progress: bool | Callable[[Progress], object] | None = None,
    output_type: None = None,
    **options: Unpack[PlainOptions],
) -> list[AgentResult[Content]]: ...


@overload
async def run_many(
    agent: AgentDefinition[Any] | OnQueues[Any],
    inputs: Iterable[object] | AsyncIterable[object],
    *,
    max_concurrency: int = DEFAULT_CONCURRENCY,
    on_error: OnError = "collect",
    on: str | None = None,
    progress: bool | Callable[[Progress], object] | None = None,
    output_type: TypeForm[Content],
    **options: Unpack[PlainOptions],
) -> list[AgentResult[Content]]: ...


async def run_many(
    agent: AgentDefinition[Any] | OnQueues[Any],
    inputs: Iterable[object] | AsyncIterable[object],
    *,
    max_concurrency: int = DEFAULT_CONCURRENCY,
    on_error: OnError = "collect",
    on: str | None = None,
    progress: bool | Callable[[Progress], object] | None = None,
    **options: Unpack[RunOptions],
) -> list[AgentResult[Any]]:
    """Answer many inputs, so many at a time, and give all results at the end.

    An input is taken only when there is room for its run, so a generator may be of any length. What comes from it is
    taken in the event loop: one that has to wait should be asynchronous. An async generator is closed at the end.

    Args:
        agent: The agent.
        inputs: What `run` takes as `user_input`, once for each run.
        max_concurrency: Runs at a time, 1 or more.
        on_error: `"collect"`: a run that failed is a result with `success=False`. `"fail_fast"`: the first one cancels
            the others and is raised.
        progress: True: show a bar on standard error, or now and then a line where there is no terminal. A function:
            call it in the event loop after each run; it must not block. None or False: neither.
        on: Name of a queue of DBOS, for an agent that is a `DurableAgent`: its runs are done by whichever processes
            take them from there, and those that are cancelled here are cancelled there. None: they are done here.
        **options: As `RunOptions` describes them, for each run; with `run_id="day-7"` the runs are `day-7/0`, `day-7/1`
            and so on, so that the same batch goes on where it was.

    Returns:
        The results in the order of the inputs.

    Raises:
        InvalidArguments: An argument cannot be what was meant; runs under way are cancelled.
        RunError: The first run that failed, with `on_error="fail_fast"`; the error's `result` is its result. Runs that
            failed in the same moment are in its notes.
        Exception: What the inputs raise; runs under way are cancelled.

    Example:
        ```python
        results = await run_many(agent, ["Rome?", "Oslo?"], max_concurrency=2)
        ```
    """
    on_progress = None if isinstance(progress, bool) else progress
    batch = Batch(_placed(agent, on), inputs, max_concurrency, on_error, options, on_progress)
    results: dict[int, AgentResult[Any]] = {}

    def keep(item: BatchItem[Any]) -> None:
        results[item.index] = item.result

    async def work() -> None:
        await batch.run(keep)

    batch.check_options()
    await (shown(lambda: batch.progress, work) if progress is True else work())
    return [results[index] for index in range(len(results))]


@overload
def stream_many(
    agent: AgentDefinition[Content] | OnQueues[Content],
    inputs: Iterable[object] | AsyncIterable[object],
    *,
    max_concurrency: int = DEFAULT_CONCURRENCY,
    buffer: int = DEFAULT_BUFFER,
    on_error: OnError = "collect",
    on: str | None = None,
    output_type: None = None,
    **options: Unpack[PlainOptions],
) -> BatchStream[Content]: ...


@overload
def stream_many(
    agent: AgentDefinition[Any] | OnQueues[Any],
    inputs: Iterable[object] | AsyncIterable[object],
    *,
    max_concurrency: int = DEFAULT_CONCURRENCY,
    buffer: int = DEFAULT_BUFFER,
    on_error: OnError = "collect",
    on: str | None = None,
    output_type: TypeForm[Content],
    **options: Unpack[PlainOptions],
) -> BatchStream[Content]: ...


def stream_many(
    agent: AgentDefinition[Any] | OnQueues[Any],
    inputs: Iterable[object] | AsyncIterable[object],
    *,
    max_concurrency: int = DEFAULT_CONCURRENCY,
    buffer: int = DEFAULT_BUFFER,
    on_error: OnError = "collect",
    on: str | None = None,
    **options: Unpack[RunOptions],
) -> BatchStream[Any]:
    """Answer many inputs, so many at a time, and give each result when it is there.

    Inputs are taken as by `run_many`, and no faster than results are read: memory holds what is under way and what
    waits to be read, however many inputs there are.

    Args:
        agent: The agent.
        inputs: What `run` takes as `user_input`, once for each run.
        max_concurrency: Runs at a time, 1 or more.
        buffer: Results that may wait for their reader while `max_concurrency` runs go on; each result more that waits
            takes the place of a run. 0 or more.
        on_error: `"collect"`: a run that failed is a result with `success=False`. `"fail_fast"`: the first one cancels
            the others and is raised to the reader, after the results before it.
        on: Name of a queue of DBOS, for an agent that is a `DurableAgent`: its runs are done by whichever processes
            take them from there, and those that are cancelled here are cancelled there. None: they are done here.
        **options: As `RunOptions` describes them, for each run.

    Returns:
        The batch, to be entered: `async with stream_many(…) as batch`. Leaving the block ends it.

    Raises:
        InvalidArguments: An argument cannot be what was meant.

    Example:
        ```python
        async with stream_many(agent, questions, max_concurrency=50) as batch:
            async for item in batch:
                print(item.index, item.result.content, batch.progress.rate)
        ```
    """
    return BatchStream(Batch(_placed(agent, on), inputs, max_concurrency, on_error, options), buffer)


def _placed(agent: object, queue: object) -> AgentDefinition[Any]:
    """The agent whose runs are done where they are to be.

    Raises:
        InvalidArguments: Its runs cannot be done there.
    """
    on_queue: Callable[[object], Any] | None = getattr(agent, "__on_queue__", None)
    if queue is not None and on_queue is None:
        raise InvalidArguments(f"on={repr_of(queue)}: only the runs of a DurableAgent can go into a queue")
    if queue is None and on_queue is not None:
        raise InvalidArguments(f"agent={repr_of(agent)}: say with on= which queue its runs go into")
    return cast("AgentDefinition[Any]", agent if on_queue is None else on_queue(queue))


class BatchStream(FeedBlock[BatchItem[Answer]], Generic[Answer]):
    """Runs of one agent on many inputs, as they end; an async context manager that `stream_many` makes.

    Iterate it for a `BatchItem` for each input, in the order in which the runs end. Leaving the block, in whatever way,
    cancels the runs under way and waits for their cleanup before the next line runs.

    Example:
        ```python
        async with stream_many(agent, questions) as batch:
            async for item in batch:
                if item.result.success:
                    break
        ```
    """

    _noun, _entered_by = "batch", "async with stream_many(…) as batch:"

    def __init__(self, batch: Batch, buffer: int) -> None:
        super().__init__(buffer)
        self._batch = batch
        # For runs under way and results that nobody has read, taken before an input and given back by the reader.
        self._slots = batch.max_concurrency + buffer
        self._room: anyio.Semaphore | None = None

    def _start(self, feed: Feed[BatchItem[Answer]]) -> Background[None]:
        room = self._room = anyio.Semaphore(self._slots)
        batch = self._batch
        batch.check_options()
        origin = batch.origin = origin_here()

        async def go() -> None:
            try:
                await batch.go(feed.put, room)
            finally:
                feed.close()

        task = Background(go, NAME)
        task.on_cancel, task.on_more_time = batch.cut, batch.has_until
        if origin.run is not None:
            origin.run.note_below(task, is_reached=origin.is_enclosed)
        return task

    def _inner_html(self) -> str:
        return html_of(self.progress)

    @property
    def progress(self) -> Progress:
        """The progress of the batch; runs whose result waits to be read count as ended."""
        return self._batch.progress

    async def __anext__(self) -> BatchItem[Answer]:
        """The next run that has ended.

        Raises:
            StopAsyncIteration: There is none any more.
            RunError: A run failed, with `on_error="fail_fast"`; the error's `result` is its result.
            Exception: What the inputs raise.
        """
        item = await self._next()
        assert self._room is not None
        self._room.release()
        return item
