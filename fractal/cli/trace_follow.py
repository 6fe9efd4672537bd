"""`fractal trace --follow`: a trace file while a program writes to it, until the runs in it have ended."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from typing import TYPE_CHECKING

from fractal.cli.door import tell
from fractal.cli.trace import Trees, draw
from fractal.cli.which_agent import WrongUse
from fractal.tracing import TraceEvent, TraceUnreadable
from fractal.tracing.read import TraceFollower

if TYPE_CHECKING:
    from rich.console import Console, RenderableType

__all__ = ["follow", "followed"]

PAUSE = 0.1
"""Seconds between two looks at the file."""


def followed(path: str, run_id: str, rest: Callable[[], None] | None = None) -> Iterator[TraceEvent]:
    """The events of a file as they come, until each run in it has ended.

    A file that is not there, or that has no run in it, is waited for.

    Args:
        path: The file.
        run_id: Beginning of the id of the runs that are wanted; empty for all.
        rest: Called while there is nothing new, before each look at the file.

    Raises:
        WrongUse: The file cannot be read.
    """
    going, ended, follower = set[str](), 0, TraceFollower(path)
    try:
        while going or not ended:
            for event in follower.new():
                if not (event.run_id or "").startswith(run_id):
                    continue
                if event.delegation_depth == 0 and event.event_type in ("agent_start", "agent_end"):
                    ended += event.event_type == "agent_end"
                    (going.add if event.event_type == "agent_start" else going.discard)(event.run_id or "")
                yield event
            if rest is not None:
                rest()
            if going or not ended:
                time.sleep(PAUSE)
    except TraceUnreadable as error:
        raise WrongUse(str(error)) from None
    finally:
        for complaint in follower.complaints():
            tell(f"fractal trace: {complaint}")


def follow(path: str, run_id: str, console: Console) -> None:
    """Draw the tree of the newest run while it grows, until all have ended or Ctrl-C; at last the trees of all."""
    from rich.live import Live

    from fractal._views.terminal import live_table, look_of, result_table, timeline
    from fractal._views.tree import Tree

    trees, look = Trees(), look_of(console)

    def picture() -> RenderableType:
        return live_table(trees.newest() or Tree(), look, console.width, console.height)

    moving = Live(console=console, get_renderable=picture, auto_refresh=False, transient=True)
    with suppress(KeyboardInterrupt), moving as live:
        for event in followed(path, run_id, live.refresh):
            trees.take(event)
    draw(trees, console, result_table, timeline)
