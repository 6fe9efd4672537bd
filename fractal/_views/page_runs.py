"""The runs of a page: all of them as rows, and the newest with all that was said, as many as there is room for."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from fractal._json import is_mapping, text_of
from fractal._texts import one_line
from fractal._views.page_spans import RunSpans, count_of, end_of_run, number_of
from fractal.tracing import TraceEvent

__all__ = ["PageRuns", "Row"]

MOST_EVENTS = 100_000
"""Events of all runs that a page shows in detail."""

MOST_TEXT = 48 * 2**20
"""Characters of all texts in their details."""

MOST_ROWS = 10_000
"""Runs that have a row."""


@dataclass(slots=True, kw_only=True, eq=False)
class Row:
    """A row of the table of runs.

    Attributes:
        run_id: Its id, which all runs below it have in a trace.
        source: Name of the file.
        agent: Name of the agent.
        input: What it was asked, in one line.
        reason: Why it ended; empty while it has not.
        outcome: How, as for a tool call.
        start: Seconds since the epoch.
        last: The time of its last event.
        events: How many there are.
        agents: Runs of agents in it.
        requests: Replies of models.
        tools: Tool calls.
        errors: Runs and calls that failed.
        input_tokens: Prompt tokens.
        output_tokens: Completion tokens.
        cost: What the replies cost; None if that is not known of each.
        detail: All that was said; None if there was no room for it.
    """

    run_id: str
    source: str
    agent: str
    start: float
    last: float
    input: str = ""
    reason: str = ""
    outcome: str = "unfinished"
    events: int = 0
    agents: int = 0
    requests: int = 0
    tools: int = 0
    errors: int = 0
    input_tokens: int = 0
    output_tokens: int = 0
    cost: float | None = 0.0
    detail: RunSpans | None = None

    def take(self, event: TraceEvent) -> None:
        """Count an event."""
        self.events += 1
        self.start, self.last = min(self.start, event.timestamp), max(self.last, event.timestamp)
        match event.event_type:
            case "agent_start":
                self.agents += 1
                if self.agents == 1:
                    said = event.arguments.get("user_input") if is_mapping(event.arguments) else None
                    self.agent, self.input = event.agent_name, one_line(text_of("" if said is None else said), 160)
            case "agent_end":
                self._ended(event)
            case "model_response":
                self._replied(event.metadata)
            case "tool_call":
                self.tools += 1
            case "tool_result":
                self.errors += event.error is not None and event.metadata.get("outcome") not in ("cancelled", "skipped")
            case _:
                pass

    def _ended(self, event: TraceEvent) -> None:
        outcome, reason = end_of_run(event)
        self.errors += outcome in ("error", "timeout")
        if event.delegation_depth == 0:
            self.outcome, self.reason = outcome, reason

    def _replied(self, facts: dict[str, Any]) -> None:
        self.requests += 1
        self.input_tokens += count_of(facts.get("input_tokens"))
        self.output_tokens += count_of(facts.get("output_tokens"))
        cost = number_of(facts.get("cost"))
        self.cost = self.cost + cost if self.cost is not None and cost is not None else None


class PageRuns:
    """The runs of one or more traces, in the memory that a page takes.

    Attributes:
        older: Runs that have no row.
        without_detail: Runs that have no more than a row.
    """

    def __init__(self) -> None:
        self._rows: dict[tuple[str, str], Row] = {}
        self._detailed: dict[tuple[str, str], Row] = {}
        self._events = self._size = 0  # of these
        self.older = self.without_detail = 0

    def __iter__(self) -> Iterator[Row]:
        return iter(sorted(self._rows.values(), key=lambda row: row.start))

    def __len__(self) -> int:
        return len(self._rows)

    def take(self, event: TraceEvent, source: str = "") -> None:
        """Enter an event.

        Args:
            event: The event.
            source: Name of the file it is in.
        """
        key = source, event.run_id or ""
        row = self._rows.get(key)
        if row is None:
            row = self._begin(key, event)
        row.take(event)
        detail = row.detail
        if detail is None:
            return
        before, self._events = detail.size, self._events + 1
        detail.take(event)
        self._size += detail.size - before
        while (self._events > MOST_EVENTS or self._size > MOST_TEXT) and len(self._detailed) > 1:
            self._forget_detail(next(iter(self._detailed)))
        if len(self._detailed) == 1:
            detail.is_full, detail.is_long = self._events > MOST_EVENTS, self._size > MOST_TEXT

    def left_out(self) -> Iterator[str]:
        """Notes about what a page leaves out, a line each."""
        if self.older:
            yield f"{self.older} older runs are not in this page: it shows the newest {MOST_ROWS:,}"
        if self.without_detail:
            yield (
                f"{self.without_detail} older runs have a row and nothing more: a page holds the details of"
                f" {MOST_EVENTS:,} events or {MOST_TEXT >> 20} MB of text; make one of their file alone"
            )
        for row in self:
            if row.detail is not None and row.detail.left_out:
                lost = row.detail.left_out
                yield f"{lost} steps of run {row.run_id} are left out: a page holds {MOST_EVENTS:,} events"
            if row.detail is not None and row.detail.is_long:
                yield f"texts of run {row.run_id} are cut: a page holds {MOST_TEXT >> 20} MB of text"

    def _begin(self, key: tuple[str, str], event: TraceEvent) -> Row:
        row = Row(run_id=key[1], source=key[0], agent=event.agent_name, start=event.timestamp, last=event.timestamp)
        row.detail = RunSpans()
        self._rows[key] = self._detailed[key] = row
        if len(self._rows) > MOST_ROWS:
            oldest = next(iter(self._rows))
            if oldest in self._detailed:
                self._forget_detail(oldest)
            del self._rows[oldest]
            self.older += 1
            self.without_detail -= 1
        return row

    def _forget_detail(self, key: tuple[str, str]) -> None:
        row = self._detailed.pop(key)
        if row.detail is not None:
            self._size -= row.detail.size
        self._events -= row.events
        row.detail = None
        self.without_detail += 1
