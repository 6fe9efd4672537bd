"""Traces as Chrome's JSON, which Perfetto shows: a process for each run that a user began, a lane for what overlaps."""

from __future__ import annotations

import heapq
from collections.abc import Iterable, Iterator
from typing import Any

import fractal.tracing.names as names
from fractal._json import encode
from fractal.tracing.exported import ExportedSpan, exported_spans
from fractal.tracing.record import TraceEvent
from fractal.tracing.spans import UNFINISHED

__all__ = ["perfetto_lines"]

_COLOURS = {
    "ok": "good",
    "error": "terrible",
    "timeout": "bad",
    "cancelled": "grey",
    "abandoned": "black",
    "skipped": "olive",
    "denied": "olive",
    UNFINISHED: "yellow",
}
"""Names of colours that the viewers have, by outcome."""

_MOST_SAID = 1000
"""Characters of each thing that was said; the viewers show them in a table."""


def perfetto_lines(events: Iterable[TraceEvent]) -> Iterator[str]:
    """A trace as the lines of a JSON object.

    In a lane nothing overlaps: a run, the requests and calls that it makes, and delegates are in lanes of their own,
    as many as there is going on at once.

    Args:
        events: Those of the trace.
    """
    drawn, before = _Lanes(), '{"displayTimeUnit":"ms","traceEvents":['
    for step, span in exported_spans(events):
        for event in drawn.begin(span) if step == "begin" else drawn.end(span):
            yield before
            before = encode(event).decode() + ","
    yield before.removesuffix(",")
    yield "]}"


class _Process:
    """The lanes of a run that a user began.

    Attributes:
        number: Of the process.
        open: How many spans go on in it.
        lanes: How many there are.
    """

    __slots__ = ("_free", "_free_from", "lanes", "number", "open")

    def __init__(self, number: int) -> None:
        self.number, self.open, self.lanes = number, 0, 0
        self._free: list[int] = []  # a heap
        self._free_from: dict[int, int] = {}  # the microsecond

    def take(self, at: int) -> int:
        """Take the first lane that is free then; it may be a new one."""
        self.open += 1
        taken: list[int] = []
        while self._free:
            lane = heapq.heappop(self._free)
            if self._free_from[lane] <= at:
                break
            taken.append(lane)
        else:
            self.lanes += 1
            lane = self.lanes
        for each in taken:
            heapq.heappush(self._free, each)
        return lane

    def leave(self, lane: int, at: int) -> None:
        """Leave a lane."""
        self.open -= 1
        self._free_from[lane] = at
        heapq.heappush(self._free, lane)


class _Lanes:
    def __init__(self) -> None:
        self._processes: dict[str, _Process] = {}
        self._lanes: dict[str, tuple[_Process, int]] = {}  # of the spans that go on
        self._count = self._arrows = 0

    def begin(self, exported: ExportedSpan) -> Iterator[dict[str, Any]]:
        """Give a span its lane, and draw the arrow that leads to it."""
        span = exported.span
        process = self._processes.get(span.root)
        if process is None:
            self._count += 1
            process = self._processes[span.root] = _Process(self._count)
            yield _named("process_name", process, 0, {"name": f"run {span.root[:8]}: {span.agent}"})
        lanes = process.lanes
        lane = process.take(_microseconds(span.begin))
        self._lanes[exported.span_id] = process, lane
        if lane > lanes:
            yield _named("thread_name", process, lane, {"name": f"lane {lane}"})
            yield _named("thread_sort_index", process, lane, {"sort_index": lane})
        above = self._lanes.get(exported.parent_id) if span.kind == "run" else None
        if above is not None:
            self._arrows += 1
            at = _microseconds(span.begin)
            yield self._arrow("s", above, at)
            yield self._arrow("f", (process, lane), at) | {"bp": "e"}

    def _arrow(self, phase: str, where: tuple[_Process, int], at: int) -> dict[str, Any]:
        """One end of an arrow, which belongs to what is in the lane then."""
        process, lane = where
        about = {"id": self._arrows, "cat": "delegation", "name": "delegation"}
        return {"ph": phase, "pid": process.number, "tid": lane, "ts": at, **about}

    def end(self, exported: ExportedSpan) -> Iterator[dict[str, Any]]:
        """Draw a span."""
        span = exported.span
        process, lane = self._lanes.pop(exported.span_id)
        begin, end = _microseconds(span.begin), _microseconds(span.begin if span.end is None else span.end)
        process.leave(lane, end)
        if not process.open:  # what comes later of this run has a process of its own
            del self._processes[span.root]
        yield {
            "ph": "X",
            "name": f"{exported.operation} {span.name}" if span.kind == "chat" else span.name,
            "cat": exported.operation,
            "pid": process.number,
            "tid": lane,
            "ts": begin,
            "dur": end - begin,
            "cname": _COLOURS.get(span.outcome, "terrible"),
            "args": {name: value for name, value in _facts(exported).items() if value is not None},
        }


def _facts(exported: ExportedSpan) -> dict[str, Any]:
    span = exported.span
    facts = {"outcome": span.outcome, "agent": span.agent, "error": span.error, **exported.facts}
    if span.attempts > 1:
        facts[names.ATTEMPTS] = span.attempts
    if not span.has_beginning:
        facts[names.NO_BEGINNING] = True
    return facts | {name: value[:_MOST_SAID] for name, value in exported.said.items()}


def _named(what: str, process: _Process, lane: int, facts: dict[str, Any]) -> dict[str, Any]:
    return {"ph": "M", "name": what, "pid": process.number, "tid": lane, "args": facts}


def _microseconds(at: float) -> int:
    return round(at * 1e6)
