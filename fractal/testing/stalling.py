"""Find out what blocks the event loop."""

from __future__ import annotations

from collections.abc import Generator
from contextlib import contextmanager

from fractal._checks import is_number
from fractal._concurrency.stall import guarding
from fractal.errors import InvalidArguments

__all__ = ["stall_guard"]


@contextmanager
def stall_guard(threshold: float = 0.25) -> Generator[list[str]]:
    """Name each tool and callback that blocks its event loop, for as long as the block lasts.

    Watched are async tools and hooks, prompt functions and observers, in all runs and event loops of the process; plain
    tools and hooks run in threads and block nobody. A stall is a warning of its run: in the log, in the events and in
    `result.warnings`, with the line at which it was.

    Outside of such a block the guard is on in Python's development mode (`python -X dev`) and in asyncio's debug mode
    (`PYTHONASYNCIODEBUG=1`), or where `FRACTAL_STALL_GUARD` is set to a number of seconds; else it costs nothing.

    Args:
        threshold: Seconds that a function may keep the event loop from its other tasks.

    Returns:
        The stalls as they come, one text for each.

    Raises:
        InvalidArguments: The threshold is no number above 0.

    Example:
        ```python
        async def test_no_tool_blocks():
            with stall_guard() as stalls:
                await agent.run("What is the weather?")
            assert not stalls
        ```
    """
    if not is_number(threshold) or threshold <= 0:
        raise InvalidArguments(f"threshold={threshold!r}: give seconds above 0")
    with guarding(threshold) as messages:
        yield messages
