"""`fractal trace`: what a trace file tells, as trees with bars of time, as numbers, as errors."""

from __future__ import annotations

import os
import time
from collections.abc import Generator, Iterable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from fractal._texts import one_line
from fractal._views.trace_tree import TraceTree
from fractal.cli.door import json_line, json_text, say, say_json, tell
from fractal.cli.files import replace
from fractal.cli.which_agent import WrongUse
from fractal.tracing import TraceEvent, TraceReader, TraceUnreadable
from fractal.tracing.counts import Counts
from fractal.tracing.otlp import otlp_lines
from fractal.tracing.perfetto import perfetto_lines
from fractal.tracing.summary import Row, Summary, numbers_of

if TYPE_CHECKING:
    from rich.console import Console

__all__ = ["Trees", "export", "reading", "show_errors", "show_summary", "show_trees"]

MOST_RUNS = 20
"""Runs that are drawn, the newest of a file."""

MOST_PARTS = 2000
"""Events of a run that are drawn, the first ones."""


class Trees:
    """The trees of the newest runs in a trace, within a bound on memory.

    Args:
        run_id: Beginning of the id of the runs that are wanted; empty for all.

    Attributes:
        dropped: Runs that were older.
    """

    def __init__(self, run_id: str = "") -> None:
        self._run_id = run_id
        self._trees: dict[str, TraceTree] = {}
        self._events: dict[str, int] = {}
        self.dropped = 0

    def take(self, event: TraceEvent) -> None:
        """Enter an event."""
        root = event.run_id or ""
        if not root.startswith(self._run_id):
            return
        tree = self._trees.get(root)
        if tree is None:
            if event.event_type != "agent_start":
                return  # of a run that is dropped, or that was begun in another file
            tree = self._trees[root] = TraceTree()
            self._events[root] = 0
            if len(self._trees) > MOST_RUNS:
                self._drop(next(iter(self._trees)))
        self._events[root] += 1
        if self._events[root] <= MOST_PARTS or event.event_type == "agent_end":
            tree.take(event)

    def __iter__(self) -> Iterator[tuple[str, TraceTree, int]]:
        """The id and tree of each run, with the number of its events left out; parts without an end are unfinished."""
        for root, tree in self._trees.items():
            tree.finish()
            yield root, tree, max(self._events[root] - MOST_PARTS, 0)

    def _drop(self, root: str) -> None:
        del self._trees[root], self._events[root]
        self.dropped += 1


def show_trees(reader: TraceReader, console: Console, run_id: str) -> bool:
    """Draw the newest runs as trees, with a bar of time for each part; returns whether there was one."""
    from fractal._views.terminal import look_of, result_table, timeline

    trees = Trees(run_id)
    for event in reader:
        trees.take(event)
    found = False
    if trees.dropped:
        say(f"{trees.dropped} older runs are not shown: --summary counts them, --run ID shows one\n")
    for root, tree, left_out in trees:
        found = True
        began = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(tree.start))
        say(f"run {one_line(root)}, {began}")
        look = look_of(console)
        console.print(result_table(tree, look, console.width))
        console.print()
        console.print(timeline(tree, look, console.width))
        say(f"{left_out} more events of this run are not shown\n" if left_out else "")
    return found


def show_errors(events: Iterable[TraceEvent], *, as_json: bool) -> None:
    """Show each error on a line."""
    for event in events:
        if event.event_type != "error":
            continue
        if as_json:
            say_json(json_line(event.to_dict()))
            continue
        at = time.strftime("%H:%M:%S", time.localtime(event.timestamp))
        where = one_line(event.agent_name) + (f" {one_line(event.tool_name)}" if event.tool_name else "")
        say(f"{at}  {where}: {one_line(event.error or '', 1000)}")


def export(path: str, form: str, to: str | None) -> None:
    """Write a trace in the form that other viewers read.

    Args:
        path: The file.
        form: `"otlp"` or `"perfetto"`.
        to: File to write; None: standard output.

    Raises:
        WrongUse: There is no trace, or the other file cannot be written; what was there is as it was.
    """
    with reading(path) as reader:
        lines = (otlp_lines if form == "otlp" else perfetto_lines)(reader)
        if to is None:
            for line in lines:
                say_json(line)
            return
        try:
            if os.path.samefile(path, os.path.expanduser(to)):
                raise WrongUse(f"-o {to}: that is the trace itself")
        except OSError:
            pass  # one of them is not there
        try:
            replace(to, (line + "\n" for line in lines))
        except OSError as error:
            raise WrongUse(f"-o {to}: {error.strerror or error}") from None


@contextmanager
def reading(path: str) -> Generator[TraceReader]:
    """Read a trace file, and tell what was odd about it.

    Raises:
        WrongUse: It is no trace.
    """
    reader = TraceReader(path)
    try:
        yield reader
    except TraceUnreadable as error:
        raise WrongUse(str(error)) from None
    finally:
        for complaint in reader.complaints():
            tell(f"fractal trace: {complaint}")


def show_summary(events: Iterable[TraceEvent], *, as_json: bool) -> None:
    """Show the numbers of a trace."""
    summary = Summary()
    for event in events:
        summary.take(event)
    if as_json:
        say_json(json_text(numbers_of(summary)))
        return
    for line in _lines_of(summary):
        say(line)


def _lines_of(summary: Summary) -> Iterator[str]:
    counts = summary.counts
    counted = f"{counts.runs} runs, {counts.events} events, {summary.errors} errors, {counts.seconds:.2f} s"
    yield f"{counted}, {counts.input_tokens} + {counts.output_tokens} tokens{_cost(counts)}"
    yield f"ended: {', '.join(f'{one_line(why)} {count}' for why, count in summary.reasons.items()) or 'none'}"
    yield from _table("agents", dict(summary.agents))
    yield from _table("tools", {f"{agent}: {tool}": row for (agent, tool), row in summary.tools.items()})
    yield from _table("models", dict(summary.models))
    if summary.slowest:
        yield "slowest"
        for seconds, what, agent in sorted(summary.slowest, reverse=True):
            yield f"  {seconds:10.3f} s  {one_line(what, 60)}  ({one_line(agent, 60)})"
    if summary.texts:
        yield "first errors"
        yield from (f"  {one_line(text)}" for text in summary.texts)


def _table(title: str, rows: dict[str, Row]) -> Iterator[str]:
    if not rows:
        return
    yield f"{title:<42}{'count':>8}{'failed':>8}{'seconds':>12}{'longest':>12}"
    for name, row in sorted(rows.items(), key=lambda each: -each[1].seconds):
        yield f"  {one_line(name, 38):<40}{row.count:>8}{row.failed:>8}{row.seconds:>12.3f}{row.longest:>12.3f}"


def _cost(counts: Counts) -> str:
    return f", cost {counts.cost:.6g}" if counts.cost else ""
