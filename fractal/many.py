"""Many inputs for one agent."""

from __future__ import annotations

from collections.abc import Iterable, Sized
from typing import TYPE_CHECKING

import anyio
from typing_extensions import Unpack

from fractal._json import is_mapping
from fractal._scopes import single_error
from fractal.errors import InvalidArguments

if TYPE_CHECKING:
    from fractal.agent import AgentDefinition, RunOptions
    from fractal.results import AgentResult

__all__ = ["run_many"]


async def run_many(
    agent: AgentDefinition,
    inputs: Iterable[object],
    *,
    max_concurrency: int = 8,
    **options: Unpack[RunOptions],
) -> list[AgentResult]:
    """Answer many inputs, so many at a time.

    An input is taken only when there is room for it, so a generator may be of any length.

    Args:
        agent: The agent.
        inputs: What `run` takes as `user_input`, once for each run.
        max_concurrency: Runs at a time, 1 or more.
        **options: As `RunOptions` describes them, for each run.

    Returns:
        The results in the order of the inputs; a run that failed is a result with `success=False`.

    Raises:
        InvalidArguments: An argument cannot be what was meant; runs under way are cancelled.

    Example:
        ```python
        results = await run_many(agent, ["Rome?", "Oslo?"], max_concurrency=2)
        ```
    """
    if isinstance(inputs, (str, bytes)) or is_mapping(inputs):
        raise InvalidArguments(f"inputs is one {type(inputs).__name__}: put it into a list")
    if max_concurrency < 1:
        raise InvalidArguments(f"max_concurrency={max_concurrency!r}: give 1 or more")
    results: dict[int, AgentResult] = {}
    waiting = enumerate(inputs)

    async def work() -> None:
        for index, user_input in waiting:
            results[index] = await agent.drive(user_input, **options)

    workers = min(max_concurrency, len(inputs)) if isinstance(inputs, Sized) else max_concurrency
    with single_error():
        async with anyio.create_task_group() as group:
            for _ in range(workers):
                group.start_soon(work)
    return [results[index] for index in range(len(results))]
