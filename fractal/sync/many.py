"""Many inputs for one agent, from blocking code."""

from __future__ import annotations

from collections.abc import AsyncIterable, Callable, Iterable
from typing import TYPE_CHECKING, Any, Generic, overload

from typing_extensions import TypeForm, Unpack

import fractal.many
from fractal.many import DEFAULT_BUFFER, DEFAULT_CONCURRENCY, BatchItem, OnError, OnQueues, Progress
from fractal.results import Content, Content_co
from fractal.sync._block import Block
from fractal.sync._portal import call_blocking

if TYPE_CHECKING:
    from fractal.definition import AgentDefinition
    from fractal.options import PlainOptions, RunOptions
    from fractal.results import AgentResult

__all__ = ["BatchStream", "run_many", "stream_many"]


@overload
def run_many(
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
def run_many(
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


def run_many(
    agent: AgentDefinition[Any] | OnQueues[Any],
    inputs: Iterable[object] | AsyncIterable[object],
    *,
    max_concurrency: int = DEFAULT_CONCURRENCY,
    on_error: OnError = "collect",
    on: str | None = None,
    progress: bool | Callable[[Progress], object] | None = None,
    **options: Unpack[RunOptions],
) -> list[AgentResult[Any]]:
    """Answer many inputs, so many at a time, and give all results at the end, blocking.

    Works wherever `run` does. An input is taken only when there is room for its run, in the thread of the event loop.

    Args:
        agent: The agent.
        inputs: What `run` takes as `user_input`, once for each run.
        max_concurrency: Runs at a time, 1 or more.
        on_error: `"collect"`: a run that failed is a result with `success=False`. `"fail_fast"`: the first one cancels
            the others and is raised.
        progress: True: show a bar on standard error, or now and then a line where there is no terminal. A function:
            call it after each run, in the thread of the event loop; it must not block. None or False: neither.
        on: Name of a queue of DBOS, for an agent that is a `DurableAgent`: its runs are done by whichever processes
            take them from there, and those that are cancelled here are cancelled there. None: they are done here.
        **options: As `RunOptions` describes them, for each run.

    Returns:
        The results in the order of the inputs.

    Raises:
        InvalidArguments: An argument cannot be what was meant; runs under way are cancelled.
        RunError: The first run that failed, with `on_error="fail_fast"`; the error's `result` is its result. Runs that
            failed in the same moment are in its notes.
        Exception: What the inputs raise; runs under way are cancelled.

    Example:
        ```python
        results = sync.run_many(agent, ["Rome?", "Oslo?"], max_concurrency=2)
        ```
    """
    return call_blocking(
        lambda: fractal.many.run_many(
            agent, inputs, max_concurrency=max_concurrency, on_error=on_error, on=on, progress=progress, **options
        )
    )


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
    """Answer many inputs, so many at a time, and give each result when it is there, blocking.

    Works wherever `run` does. Inputs are taken no faster than results are read, in the thread of the event loop.

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
        The batch, to be entered: `with sync.stream_many(…) as batch`. Leaving the block ends it.

    Raises:
        InvalidArguments: An argument cannot be what was meant.

    Example:
        ```python
        with sync.stream_many(agent, questions, max_concurrency=50) as batch:
            for item in batch:
                print(item.index, item.result.content)
        ```
    """
    return BatchStream(
        fractal.many.stream_many(
            agent, inputs, max_concurrency=max_concurrency, buffer=buffer, on_error=on_error, on=on, **options
        )
    )


class BatchStream(Block, Generic[Content_co]):
    """Runs of one agent on many inputs, as they end, for blocking code; made by `stream_many`.

    Open it, read it and close it in whatever thread; one opened in a plain `def` tool stays in the tool's thread.
    """

    _noun, _entered_by = "batch", "with sync.stream_many(…) as batch:"

    def __init__(self, batch: fractal.many.BatchStream[Content_co]) -> None:
        super().__init__(batch)
        self._batch = batch

    @property
    def progress(self) -> Progress:
        """The progress of the batch; runs whose result waits to be read count as ended."""
        return self._batch.progress

    def __next__(self) -> BatchItem[Content_co]:
        """The next run that has ended.

        Raises:
            StopIteration: There is none any more.
            RunError: A run failed, with `on_error="fail_fast"`; the error's `result` is its result.
            Exception: What the inputs raise.
        """
        item = self._caller(lambda: anext(self._batch, None))
        if item is None:
            raise StopIteration
        return item
