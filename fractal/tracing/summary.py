"""Numbers about a trace, gathered event by event: of any length, in the memory that a page of them takes."""

from __future__ import annotations

import heapq
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

from fractal.tracing.counts import Counts
from fractal.tracing.record import TYPES, TraceEvent
from fractal.tracing.spans import end_of_run

__all__ = ["Row", "Summary", "numbers_of", "summary_of"]

_MOST_ROWS = 1000
"""Different agents, tools and models that are told apart."""

_SLOWEST = 10

_LONGEST = 500
"""Characters of a text that is kept."""

_OTHERS = "(others)"


@dataclass(slots=True)
class Row:
    """Numbers about one agent, tool or model.

    Attributes:
        count: How often.
        failed: How often without success.
        seconds: How long together.
        longest: How long the longest took.
    """

    count: int = 0
    failed: int = 0
    seconds: float = 0.0
    longest: float = 0.0

    def add(self, seconds: float | None, failed: bool) -> None:
        """Count one more that has ended."""
        self.count += 1
        self.failed += failed
        self.seconds += seconds or 0.0
        self.longest = max(self.longest, seconds or 0.0)

    def plus(self, other: Row) -> None:
        """Count those of another row."""
        self.count += other.count
        self.failed += other.failed
        self.seconds += other.seconds
        self.longest = max(self.longest, other.longest)

    def times(self) -> dict[str, Any]:
        """The count and the time."""
        return {"count": self.count, "failed": self.failed, "seconds": self.seconds, "longest": self.longest}


@dataclass(slots=True)
class Summary:
    """The contents of a trace, in numbers.

    Attributes:
        counts: Of all of it.
        agents: By agent: its runs.
        tools: By agent and tool: its calls.
        models: By model: its replies.
        reasons: Why agents' runs ended, and how often.
        texts: The first texts of errors.
        slowest: The slowest calls and replies: seconds, what, and the agent.
    """

    counts: Counts = field(default_factory=Counts)
    delegations: int = 0
    retries: int = 0
    warnings: int = 0
    limits: int = 0
    agents: dict[str, Row] = field(default_factory=dict[str, Row])
    tools: dict[tuple[str, str], Row] = field(default_factory=dict[tuple[str, str], Row])
    models: dict[str, Row] = field(default_factory=dict[str, Row])
    reasons: dict[str, int] = field(default_factory=dict[str, int])
    texts: list[str] = field(default_factory=list[str])
    slowest: list[tuple[float, str, str]] = field(default_factory=list[tuple[float, str, str]])
    _asked: dict[str, str] = field(default_factory=dict[str, str])  # the model of a run's last request

    def take(self, event: TraceEvent) -> None:
        """Count one more event."""
        self.counts.take(event)
        count = getattr(self, f"_{event.event_type}", None) if event.event_type in TYPES else None
        if count is not None:
            count(event)

    def _agent_end(self, event: TraceEvent) -> None:
        end = end_of_run(event)
        _row(self.agents, event.agent_name).add(event.elapsed_time, end.outcome != "ok")
        reason = end.reason
        if reason in self.reasons or len(self.reasons) < _MOST_ROWS:
            self.reasons[reason] = self.reasons.get(reason, 0) + 1
        self._asked.pop(_run(event), None)

    def _tool_result(self, event: TraceEvent) -> None:
        name = event.tool_name or ""
        _row(self.tools, (event.agent_name, name)).add(event.elapsed_time, event.error is not None)
        self._note_slow(event, name)

    def _model_request(self, event: TraceEvent) -> None:
        if len(self._asked) < 100 * _MOST_ROWS:
            self._asked[_run(event)] = str(event.metadata.get("model") or "")[:_LONGEST]

    def _model_response(self, event: TraceEvent) -> None:
        facts = event.metadata
        model = str(facts.get("model") or self._asked.get(_run(event)) or "model")[:_LONGEST]
        _row(self.models, model).add(event.elapsed_time, False)
        self._note_slow(event, model)

    def _agent_delegate(self, event: TraceEvent) -> None:
        self.delegations += 1

    def _retry(self, event: TraceEvent) -> None:
        self.retries += 1

    def _warning(self, event: TraceEvent) -> None:
        self.warnings += 1

    def _limit(self, event: TraceEvent) -> None:
        self.limits += 1

    def _error(self, event: TraceEvent) -> None:
        if len(self.texts) < _SLOWEST:
            self.texts.append(f"{event.agent_name}: {event.error}"[:_LONGEST])

    def _note_slow(self, event: TraceEvent, what: str) -> None:
        heapq.heappush(self.slowest, (event.elapsed_time or 0.0, what, event.agent_name))
        if len(self.slowest) > _SLOWEST:
            heapq.heappop(self.slowest)


def summary_of(events: Iterable[TraceEvent]) -> dict[str, Any]:
    """The numbers that `TracingKit.get_summary` gives."""
    summary = Summary()
    for event in events:
        summary.take(event)
    return numbers_of(summary)


def numbers_of(summary: Summary) -> dict[str, Any]:
    """A summary as a dict of numbers."""
    calls = sum(row.count for row in summary.tools.values())
    failed = sum(row.failed for row in summary.tools.values())
    counts = summary.counts
    return {
        "total_events": counts.events,
        "runs": counts.runs,
        "agent_runs": counts.agents,
        "model_calls": counts.replies,
        "tool_calls": counts.tools,
        "delegations": summary.delegations,
        "retries": summary.retries,
        "warnings": summary.warnings,
        "errors": counts.errors,
        "input_tokens": counts.input_tokens,
        "output_tokens": counts.output_tokens,
        "cost": counts.cost,
        "total_time": counts.seconds,
        "average_tool_time": sum(row.seconds for row in summary.tools.values()) / calls if calls else 0.0,
        "success_rate": (calls - failed) / calls if calls else 1.0,
        "stop_reasons": summary.reasons,
        "agents": {name: row.times() for name, row in summary.agents.items()},
        "tools": _tools(summary.tools),
        "models": {name: row.times() for name, row in summary.models.items()},
    }


def _tools(rows: dict[tuple[str, str], Row]) -> dict[str, dict[str, Any]]:
    """The numbers of each tool, whichever agents have it."""
    tools: dict[str, Row] = {}
    for (_, name), row in rows.items():
        tools.setdefault(name, Row()).plus(row)
    return {name: row.times() for name, row in tools.items()}


def _row(rows: dict[Any, Row], name: Any) -> Row:
    row = rows.get(name)
    if row is None:
        if len(rows) >= _MOST_ROWS:
            name = (_OTHERS, _OTHERS) if isinstance(name, tuple) else _OTHERS
        row = rows.setdefault(name, Row())
    return row


def _run(event: TraceEvent) -> str:
    return str(event.metadata.get("run") or event.run_id)
