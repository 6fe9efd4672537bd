"""A trace line by line, as it happened, and its runs one on a line: for a terminal, with rich.

All text in it is for one line of a terminal: what a model or a tool wrote can neither colour a screen nor move the
cursor.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator
from typing import NamedTuple

from rich.table import Table
from rich.text import Text

from fractal._json import is_mapping, text_of
from fractal._texts import one_line
from fractal._views.terminal import Look, colour_of, style_of
from fractal._views.trace_tree import reply_in_brief
from fractal._views.tree import brief
from fractal.tracing import TraceEvent
from fractal.tracing.counts import RunCounts, count_of
from fractal.tracing.spans import UNFINISHED, end_of_call, end_of_run

__all__ = ["Flow", "runs_table"]

_MOST_RUNS = 10_000
"""Runs whose beginnings are known; the time of a line is counted from there."""

_MOST_AGENTS = 1000
"""Agents that have a colour of their own."""

_DEEPEST = 12
"""Runs inside each other that lines are moved to the right for."""

_TIMES = 12  # columns at the end of a line


class _Line(NamedTuple):
    """What a line says: the outcome, empty for a beginning; what it is about; more of it; and how long it took."""

    outcome: str
    what: str
    about: str = ""
    seconds: float | None = None


class Flow:
    """The lines of a trace, event by event, in the memory that its runs' beginnings take.

    Args:
        look: The characters that they are made of.
        width: Columns.
    """

    def __init__(self, look: Look, width: int) -> None:
        self._look, self._width = look, width
        self._began: dict[str, float] = {}
        self._agents: dict[str, int] = {}

    def lines(self, event: TraceEvent) -> Iterator[Text]:
        """The line of an event, if it has one, and before it that of a run which begins."""
        said = _LINES.get(event.event_type, _nothing)(event)
        if said is None:
            return
        root = event.run_id or ""
        if root not in self._began:
            self._began[root] = event.timestamp
            if len(self._began) > _MOST_RUNS:
                del self._began[next(iter(self._began))]
            yield Text(f"run {one_line(root)}, {_moment(event.timestamp)}", no_wrap=True, overflow=self._look.overflow)
        yield self._line(event, said, event.timestamp - self._began[root])

    def _line(self, event: TraceEvent, said: _Line, at: float) -> Text:
        look = self._look
        if len(self._agents) < _MOST_AGENTS:
            self._agents.setdefault(event.agent_name, len(self._agents))
        symbol = look.symbols.get(said.outcome, look.symbols[""]) if said.outcome else look.begins
        line = Text.assemble(
            (f"{one_line(event.run_id or '')[:6]:<6} {at:9.3f}  ", "dim"),
            "  " * min(event.delegation_depth, _DEEPEST),
            (one_line(event.agent_name, 40), colour_of(self._agents.get(event.agent_name, 0))),
            "  ",
            (symbol, style_of(said.outcome) if said.outcome else "bold"),
            f" {said.what}",
            (f"  {said.about}" if said.about else "", "dim"),
            no_wrap=True,
            overflow=look.overflow,
        )
        line.truncate(max(self._width - _TIMES, 20), overflow=look.overflow, pad=said.seconds is not None)
        return line.append(f"{said.seconds:10.3f} s", "dim") if said.seconds is not None else line


def _moment(at: float) -> str:
    return time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(at))


# ---- what each type of event says


def _nothing(event: TraceEvent) -> _Line | None:
    """No line: another event says all that this one does."""
    return None


def _agent_start(event: TraceEvent) -> _Line:
    said = event.arguments.get("user_input") if is_mapping(event.arguments) else None
    return _Line("", "begins", one_line(text_of("" if said is None else said)))


def _agent_end(event: TraceEvent) -> _Line:
    end = end_of_run(event)
    about = event.error if event.error is not None else text_of("" if event.result is None else event.result)
    return _Line(end.outcome, one_line(end.reason, 40), one_line(about), event.elapsed_time)


def _model_request(event: TraceEvent) -> _Line:
    attempt = count_of(event.metadata.get("attempt"))
    return _Line("", "asks the model", _joined(_model_of(event), f"try {attempt}" if attempt > 1 else ""))


def _model_response(event: TraceEvent) -> _Line:
    read, written = (count_of(event.metadata.get(f"{half}_tokens")) for half in ("input", "output"))
    about = _joined(f"{read} + {written} tokens", reply_in_brief(event))
    return _Line("ok", "has an answer", about, event.elapsed_time)


def _tool_call(event: TraceEvent) -> _Line:
    return _Line("", one_line(event.tool_name or "tool", 60), brief(event.arguments or {}))


def _tool_result(event: TraceEvent) -> _Line:
    outcome, name = end_of_call(event), one_line(event.tool_name or "tool", 60)
    about = event.error if event.error is not None else text_of("" if event.result is None else event.result)
    return _Line(outcome, name, _joined(outcome if outcome != "ok" else "", about), event.elapsed_time)


def _retry(event: TraceEvent) -> _Line:
    return _Line("timeout", "asks again", one_line(text_of(event.metadata.get("message") or event.error or "")))


def _warning(event: TraceEvent) -> _Line:
    return _Line("timeout", event.event_type, one_line(text_of(event.metadata.get("message") or "")))


def _approval_request(event: TraceEvent) -> _Line:
    return _Line("", f"needs approval of {one_line(event.tool_name or 'a call', 60)}", brief(event.arguments or {}))


def _approval_answer(event: TraceEvent) -> _Line:
    is_allowed = event.metadata.get("is_allowed") is True
    about = one_line(text_of(event.metadata.get("reason") or ""))
    return _Line("ok" if is_allowed else "skipped", "has it" if is_allowed else "does not get it", about)


_LINES: dict[str, Callable[[TraceEvent], _Line | None]] = {
    "agent_start": _agent_start,
    "agent_end": _agent_end,
    "model_request": _model_request,
    "model_response": _model_response,
    "tool_call": _tool_call,
    "tool_result": _tool_result,
    "retry": _retry,
    "limit": _warning,
    "warning": _warning,
    "approval_request": _approval_request,
    "approval_answer": _approval_answer,
}


def _model_of(event: TraceEvent) -> str:
    return one_line(text_of(event.metadata.get("model") or ""), 60)


def _joined(*parts: str) -> str:
    return "  ".join(one_line(part) for part in parts if part)


# ---- one line for each run


def runs_table(rows: Iterable[RunCounts], look: Look, width: int, *, has_files: bool) -> Table:
    """Runs as lines of a table: when, who, how it ended, how long it took, what it used, what it was about.

    Args:
        rows: The runs.
        look: The characters that it is made of.
        width: Columns.
        has_files: Whether they are of several files, which then are named.
    """
    is_wide = width >= (_WIDE_WITH_FILES if has_files else _WIDE)
    table = Table(box=None, padding=(0, 2, 0, 0), width=width, header_style="dim", pad_edge=False)
    for heading in ("began", "run", "agent", "ended"):
        table.add_column(heading, no_wrap=True, max_width=16, overflow=look.overflow)
    for heading in ("seconds", *(("requests", "calls") if is_wide else ()), "tokens", *(("cost",) if is_wide else ())):
        table.add_column(heading, justify="right", no_wrap=True)
    if has_files:
        table.add_column("file", no_wrap=True, max_width=16, overflow=look.overflow)
    table.add_column("asked", ratio=1, no_wrap=True, overflow=look.overflow)
    for row in rows:
        table.add_row(*_cells(row, look, is_wide=is_wide, has_file=has_files))
    return table


_WIDE, _WIDE_WITH_FILES = 100, 120
"""Columns from which on there is room for all numbers."""


def _cells(row: RunCounts, look: Look, *, is_wide: bool, has_file: bool) -> Iterator[Text]:
    yield Text(time.strftime("%m-%d %H:%M", time.localtime(row.start)), "dim")
    yield Text(one_line(row.run_id)[:8])
    yield Text(one_line(row.agent, 60))
    symbol = look.symbols.get(row.outcome, look.symbols[""])
    yield Text(f"{symbol} {row.reason or UNFINISHED}", style_of(row.outcome))
    yield Text(f"{row.seconds:.2f}")
    if is_wide:
        yield from (Text(str(row.requests)), Text(str(row.tools)))
    yield Text(str(row.input_tokens + row.output_tokens))
    if is_wide:
        yield Text(f"{row.cost:.4g}" if row.cost else "")
    if has_file:
        yield Text(one_line(row.source))
    yield Text(row.input, "dim")
