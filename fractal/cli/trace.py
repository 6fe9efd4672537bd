"""`fractal trace`: what trace files tell, as trees with bars of time, as lines, as numbers, as errors."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Hashable, Iterable, Iterator
from dataclasses import asdict
from typing import TYPE_CHECKING, TypeVar

from fractal._texts import one_line
from fractal._views.trace_tree import TraceTree
from fractal.cli.door import json_line, json_text, say, say_json
from fractal.cli.files import replace
from fractal.cli.trace_files import reading
from fractal.cli.which_agent import WrongUse
from fractal.tracing import TraceEvent
from fractal.tracing.counts import Counts, RunCounts
from fractal.tracing.otlp import otlp_lines
from fractal.tracing.perfetto import perfetto_lines
from fractal.tracing.summary import Row, Summary, numbers_of

if TYPE_CHECKING:
    from rich.console import Console, RenderableType

    from fractal._views.terminal import Look

__all__ = [
    "Trees",
    "draw",
    "export",
    "show_errors",
    "show_flow",
    "show_hierarchy",
    "show_runs",
    "show_summary",
    "show_trees",
    "wanted",
]

MOST_RUNS = 20
"""Runs that are drawn, the newest of a file."""

MOST_PARTS = 2000
"""Events of a run that are drawn, the first ones."""

MOST_ROWS = 1000
"""Runs that are listed, the newest."""

_MOST_GONE = 10_000
"""Older runs whose ids are known."""


def wanted(events: Iterable[TraceEvent], run_id: str, path: str) -> Iterator[TraceEvent]:
    """The events of the runs whose ids begin with a text.

    Raises:
        WrongUse: There is none.
    """
    found = False
    for event in events:
        if (event.run_id or "").startswith(run_id):
            found = True
            yield event
    if not found:
        raise WrongUse(f"{path}: there is no run in it whose id begins with {run_id!r}")


_Key = TypeVar("_Key", bound=Hashable)
_Value = TypeVar("_Value")


class _Newest(dict[_Key, _Value]):
    """Values by run, for so many of the newest runs of a trace.

    Attributes:
        dropped: The number of older runs, which were dropped.
    """

    def __init__(self, most: int) -> None:
        super().__init__()
        self.dropped = 0
        self._most = most
        self._gone: dict[_Key, None] = {}

    def is_new(self, key: _Key) -> bool:
        """Whether a run is not known to be one of the older ones."""
        return key not in self._gone

    def add(self, key: _Key, value: _Value) -> _Value:
        """Add a run, in the room of the oldest one."""
        self[key] = value
        if len(self) > self._most:
            oldest = next(iter(self))
            del self[oldest]
            self.dropped += 1
            self._gone[oldest] = None
            if len(self._gone) > _MOST_GONE:
                del self._gone[next(iter(self._gone))]
        return value


class Trees:
    """The trees of the newest runs in a trace, within a bound on memory."""

    def __init__(self) -> None:
        self._trees = _Newest[str, TraceTree](MOST_RUNS)

    def take(self, event: TraceEvent) -> None:
        """Enter an event."""
        root = event.run_id or ""
        tree = self._trees.get(root)
        if tree is None and self._trees.is_new(root):
            tree = self._trees.add(root, TraceTree(MOST_PARTS))
        if tree is not None:
            tree.take(event)

    @property
    def dropped(self) -> int:
        """The number of older runs, which were dropped."""
        return self._trees.dropped

    def newest(self) -> TraceTree | None:
        """The tree of the run that began last, as far as it has come."""
        return next(reversed(self._trees.values()), None)

    def finished(self) -> Iterator[tuple[str, TraceTree]]:
        """The id and tree of each run; parts without an end are unfinished."""
        for root, tree in self._trees.items():
            tree.finish()
            if tree.roots:
                yield root, tree


def show_trees(events: Iterable[TraceEvent], console: Console) -> None:
    """Draw the newest runs as trees, with a bar of time for each part."""
    from fractal._views.terminal import result_table, timeline

    draw(_trees_of(events), console, result_table, timeline)


def show_hierarchy(events: Iterable[TraceEvent], console: Console) -> None:
    """Draw the agents of the newest runs: who asked whom, with a bar of time for each."""
    from fractal._views.terminal import hierarchy

    draw(_trees_of(events), console, hierarchy)


def _trees_of(events: Iterable[TraceEvent]) -> Trees:
    trees = Trees()
    for event in events:
        trees.take(event)
    return trees


def draw(trees: Trees, console: Console, *pictures: Callable[[TraceTree, Look, int], RenderableType]) -> None:
    """Draw some pictures of each of the newest runs."""
    from fractal._views.terminal import look_of

    if trees.dropped:
        say(f"{trees.dropped} older runs are not shown: --summary counts them, --run ID shows one\n")
    look = look_of(console)
    for root, tree in trees.finished():
        say(f"run {one_line(root)}, {time.strftime('%Y-%m-%d %H:%M:%S', time.localtime(tree.start))}")
        for number, picture in enumerate(pictures):
            if number:
                console.print()
            console.print(picture(tree, look, console.width))
        say(f"{tree.left_out} more events of this run are not shown\n" if tree.left_out else "")


def show_flow(events: Iterable[TraceEvent], console: Console) -> None:
    """Show a trace line by line, as it happened."""
    from fractal._views.flow import Flow
    from fractal._views.terminal import look_of

    flow = Flow(look_of(console), console.width)
    for event in events:
        for line in flow.lines(event):
            console.print(line)


def show_runs(named: Iterable[tuple[str, TraceEvent]], console: Console | None, *, has_files: bool) -> None:
    """List the newest runs, one on a line.

    Args:
        named: Events, each with the name of its file.
        console: Where to list them; None: as lines of JSON.
        has_files: Whether there are several files.
    """
    rows = _Newest[tuple[str, str], RunCounts](MOST_ROWS)
    for source, event in named:
        key = source, event.run_id or ""
        row = rows.get(key)
        if row is None and rows.is_new(key):
            row = rows.add(key, RunCounts(run_id=key[1], source=source, agent=event.agent_name))
        if row is not None:
            row.take(event)
    newest = sorted(rows.values(), key=lambda row: row.start or 0.0)
    if console is None:
        for row in newest:
            say_json(json_line(asdict(row) | {"seconds": row.seconds}))
        return
    from fractal._views.flow import runs_table
    from fractal._views.terminal import look_of

    if rows.dropped:
        say(f"{rows.dropped} older runs are not shown: --summary counts them\n")
    console.print(runs_table(newest, look_of(console), console.width, has_files=has_files))


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
    if os.path.isdir(path):
        raise WrongUse(f"{path}: Is a directory")
    with reading(path) as files:
        lines = (otlp_lines if form == "otlp" else perfetto_lines)(files)
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
    counted = f"{counts.runs} runs, {counts.events} events, {counts.errors} errors, {counts.seconds:.2f} s"
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
