"""Counts of what a trace tells: of all of it, of a run, of whatever events are entered."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from fractal._json import is_mapping, text_of
from fractal._texts import one_line
from fractal.tracing.record import TraceEvent
from fractal.tracing.spans import UNFINISHED, end_of_call, end_of_run, run_of

__all__ = ["Counts", "RunCounts", "count_of", "number_of"]

_MOST_RUNS = 10_000
"""Runs whose parts are known to have been cut."""


@dataclass(slots=True, kw_only=True, eq=False)
class Counts:
    """Numbers of some events.

    Attributes:
        start: The time of the first one, in seconds since the epoch; None before there is one.
        last: The time of the last one.
        events: How many.
        runs: Runs that a user began.
        agents: Runs of agents, all.
        requests: Requests to models, each try of them.
        replies: Replies of models.
        tools: Tool calls.
        errors: Runs and calls that failed; what was cut since the time of its run was over is no failure of its own.
        input_tokens: Prompt tokens.
        output_tokens: Completion tokens.
        cost: What the replies cost; None if that is not known of each.
    """

    start: float | None = None
    last: float | None = None
    events: int = 0
    runs: int = 0
    agents: int = 0
    requests: int = 0
    replies: int = 0
    tools: int = 0
    errors: int = 0
    input_tokens: int = 0
    output_tokens: int = 0
    cost: float | None = 0.0
    _cut: dict[str, int] = field(default_factory=dict[str, int])  # parts of a run, since its last request

    def take(self, event: TraceEvent) -> None:
        """Count one more event."""
        self.events += 1
        self.start = event.timestamp if self.start is None else min(self.start, event.timestamp)
        self.last = event.timestamp if self.last is None else max(self.last, event.timestamp)
        match event.event_type:
            case "agent_start":
                self.agents += 1
                self.runs += event.delegation_depth == 0
            case "agent_end":
                self._ended(event)
            case "model_request":
                self.requests += 1
                self._cut.pop(run_of(event)[0], None)
            case "model_response":
                self._replied(event.metadata)
            case "tool_call":
                self.tools += 1
            case "tool_result":
                self._called(event)
            case _:
                pass

    @property
    def seconds(self) -> float:
        """Seconds from the first event to the last."""
        return self.last - self.start if self.start is not None and self.last is not None else 0.0

    def _ended(self, event: TraceEvent) -> None:
        outcome, (run, above) = end_of_run(event).outcome, run_of(event)
        cut = self._cut.pop(run, 0)
        self.errors += outcome in ("error", "timeout")
        if outcome == "timeout":
            self.errors -= cut
            self._note_cut(above or "")

    def _called(self, event: TraceEvent) -> None:
        outcome = end_of_call(event)
        self.errors += outcome in ("error", "timeout", "abandoned")
        if outcome == "timeout":
            self._note_cut(run_of(event)[0])

    def _note_cut(self, run: str) -> None:
        if len(self._cut) < _MOST_RUNS:
            self._cut[run] = self._cut.get(run, 0) + 1

    def _replied(self, facts: dict[str, Any]) -> None:
        self.replies += 1
        self.input_tokens += count_of(facts.get("input_tokens"))
        self.output_tokens += count_of(facts.get("output_tokens"))
        cost = number_of(facts.get("cost"))
        self.cost = self.cost + cost if self.cost is not None and cost is not None else None


@dataclass(slots=True, kw_only=True, eq=False)
class RunCounts(Counts):
    """Numbers of a run that a user began, with what it was about.

    Attributes:
        run_id: Its id, which all runs below it have in a trace.
        source: Name of the file.
        agent: Name of the agent.
        input: What it was asked, in one line.
        reason: Why it ended; empty while it has not.
        outcome: How, as for a tool call.
    """

    run_id: str
    source: str = ""
    agent: str
    input: str = ""
    reason: str = ""
    outcome: str = UNFINISHED

    def take(self, event: TraceEvent) -> None:
        """Count one more event of the run."""
        Counts.take(self, event)
        if event.event_type == "agent_start" and self.agents == 1:
            said = event.arguments.get("user_input") if is_mapping(event.arguments) else None
            self.agent, self.input = event.agent_name, one_line(text_of("" if said is None else said), 160)
        elif event.event_type == "agent_end" and event.delegation_depth == 0:
            end = end_of_run(event)
            self.outcome, self.reason = end.outcome, one_line(end.reason, 40)


def count_of(value: object) -> int:
    """A number of tokens or the like; 0 for anything else."""
    return value if type(value) is int and 0 <= value < 2**53 else 0


def number_of(value: object) -> float | None:
    """A number of money, seconds or the like; None for anything else."""
    if not isinstance(value, int | float) or isinstance(value, bool):
        return None
    return float(value) if 0 <= value < 1e15 else None
