"""`fractal trace --follow`: a trace file while a program writes to it, until the runs in it have ended."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from typing import TYPE_CHECKING

from fractal._concurrency.owners import Owner
from fractal._json import is_mapping
from fractal.cli.door import tell
from fractal.cli.trace import Trees, draw
from fractal.cli.which_agent import WrongUse
from fractal.tracing import TraceEvent, TraceUnreadable
from fractal.tracing.read import TraceFollower

if TYPE_CHECKING:
    from rich.console import Console, RenderableType

__all__ = ["RunsLost", "follow", "followed"]

PAUSE = 0.1
"""Seconds between two looks at the file."""

QUIET = 30.0
"""Seconds without a line after which is said that nobody here knows whether more will come."""


class RunsLost(Exception):
    """The process that wrote to a trace has ended before its runs had."""


def followed(path: str, run_id: str, rest: Callable[[], None] | None = None) -> Iterator[TraceEvent]:
    """The events of a file as they come, until each run in it has ended.

    A file that is not there, or that has no run in it, is waited for.

    Args:
        path: The file.
        run_id: Beginning of the id of the runs that are wanted; empty for all.
        rest: Called while there is nothing new, before each look at the file.

    Raises:
        WrongUse: The file cannot be read.
        RunsLost: All runs have ended but those of processes that are gone.
    """
    runs, follower = _Runs(), TraceFollower(path)
    try:
        while not runs.are_over:
            gone = runs.of_gone_processes()  # known before the last lines of these are read
            for event in follower.new():
                if (event.run_id or "").startswith(run_id):
                    runs.take(event)
                    yield event
            runs.lose(gone)
            if rest is not None:
                rest()
            if not runs.are_over:
                runs.say_if_quiet()
                time.sleep(PAUSE)
    except TraceUnreadable as error:
        raise WrongUse(str(error)) from None
    finally:
        for complaint in follower.complaints():
            tell(f"fractal trace: {complaint}")
    runs.raise_for_lost()


class _Runs:
    """The runs of a file that somebody writes to."""

    def __init__(self) -> None:
        self._going: dict[str, Owner | None] = {}  # with the process that writes them, if the file tells
        self._ended = 0
        self._lost: dict[str, Owner] = {}
        self._news = time.monotonic()

    @property
    def are_over(self) -> bool:
        """Whether there have been runs, and none goes on."""
        return not self._going and bool(self._ended or self._lost)

    def take(self, event: TraceEvent) -> None:
        """Enter an event."""
        self._news, run_id = time.monotonic(), event.run_id or ""
        if event.delegation_depth == 0 and event.event_type == "agent_start":
            self._going[run_id] = _owner_of(event)
            self._lost.pop(run_id, None)  # another process goes on with it
        elif event.delegation_depth == 0 and event.event_type == "agent_end":
            self._going.pop(run_id, None)
            self._ended += 1

    def of_gone_processes(self) -> dict[str, Owner]:
        """The runs that go on, but for their processes."""
        return {run: owner for run, owner in self._going.items() if owner is not None and owner.is_dead()}

    def lose(self, runs: dict[str, Owner]) -> None:
        """Give up runs, unless their ends have come."""
        for run, owner in runs.items():
            if self._going.get(run) is owner:
                del self._going[run]
                self._lost[run] = owner

    def say_if_quiet(self) -> None:
        """Say, once, that nothing has come for long, if nobody here knows whether anything will."""
        is_known = all(owner is not None and owner.is_here for owner in self._going.values())
        if time.monotonic() - self._news > QUIET and self._going and not is_known:
            self._news = math.inf  # until something comes
            tell(
                f"fractal trace: nothing has come for {QUIET:g} s, and whether its program still runs is not known"
                " here: Ctrl-C ends this"
            )

    def raise_for_lost(self) -> None:
        """Raise an error that names the runs without an end.

        Raises:
            RunsLost: There is one.
        """
        if self._lost:
            named = ", ".join(f"{run[:12]} ({owner})" for run, owner in self._lost.items())
            raise RunsLost(f"the process that wrote the trace has ended before the run had: {named}")


def _owner_of(event: TraceEvent) -> Owner | None:
    """The process that writes a run, as its first line tells."""
    process = event.metadata.get("process")
    if not is_mapping(process):
        return None
    host, pid, born = process.get("host"), process.get("pid"), process.get("born")
    if not (isinstance(host, str) and type(pid) is int and isinstance(born, str) and 0 < pid < 2**31):
        return None
    return Owner(host, pid, born)


def follow(path: str, run_id: str, console: Console) -> None:
    """Draw the tree of the newest run while it grows, until all have ended or Ctrl-C; at last the trees of all."""
    from rich.live import Live

    from fractal._views.terminal import live_table, look_of, result_table, timeline
    from fractal._views.tree import Tree

    trees, look = Trees(), look_of(console)

    def picture() -> RenderableType:
        return live_table(trees.newest() or Tree(), look, console.width, console.height)

    moving = Live(console=console, get_renderable=picture, auto_refresh=False, transient=True)
    lost: RunsLost | None = None
    with suppress(KeyboardInterrupt), moving as live:
        try:
            for event in followed(path, run_id, live.refresh):
                trees.take(event)
        except RunsLost as error:
            lost = error
    draw(trees, console, result_table, timeline)
    if lost is not None:
        raise lost
