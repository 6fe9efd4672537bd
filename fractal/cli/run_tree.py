"""`fractal run` with rich: the tree of what is done, growing while it is done, and what became of it."""

from __future__ import annotations

import sys
from collections.abc import Awaitable, Callable
from typing import TYPE_CHECKING

import anyio
from rich.console import Console

from fractal._views.terminal import look_of, result_table, watch
from fractal._views.tree import RunTree

if TYPE_CHECKING:
    from fractal.definition import AgentDefinition
    from fractal.results import AgentResult

__all__ = ["asked_and_drawn"]


def asked_and_drawn(
    agent: AgentDefinition,
    ask: Callable[[], Awaitable[AgentResult]],
    backend: str,
    *,
    is_wanted: bool,
    say: Callable[[AgentResult], None],
) -> AgentResult:
    """Ask an agent, and show its answer and the tree of its run.

    Args:
        agent: The agent.
        ask: Asks it.
        backend: Event loop to run on.
        is_wanted: Whether the tree is shown where there is no terminal, too.
        say: Writes the answer.

    Returns:
        How the run ended.
    """
    console, tree = Console(stderr=True, highlight=False), RunTree()
    agent.observers = (*agent.observers, tree)

    async def ask_and_watch() -> AgentResult:
        return await watch(console, tree, ask)

    result = anyio.run(ask_and_watch, backend=backend)
    say(result)
    if is_wanted or sys.stderr.isatty():
        console.print()
        console.print(result_table(tree, look_of(console), console.width))
    return result
