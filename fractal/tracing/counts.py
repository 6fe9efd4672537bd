"""Counts of what a trace tells: of all of it, of a run, of whatever events are entered."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from fractal._json import is_mapping, text_of
from fractal._texts import one_line
from fractal.tracing.record import TraceEvent
from fractal.tracing.spans import UNFINISHED, end_of_run

__all__ = ["Counts", "RunCounts", "count_of", "number_of"]


@dataclass(slots=True, kw_only=True, eq=False)
class Counts:
    """Numbers of some events.

    Attributes:
        start: The time of the first one, in seconds since the epoch; None before there is one.
        last: The time of the last one.
        events: How many.
        runs: Runs that a user began.
        agents: Runs of agents, all.
        requests: Replies of models.
        tools: Tool calls.
        errors: Runs and calls that failed.
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
    tools: int = 0
    errors: int = 0
    input_tokens: int = 0
    output_tokens: int = 0
    cost: float | None = 0.0

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
                self.errors += end_of_run(event).outcome in ("error", "timeout")
            case "model_response":
                self._replied(event.metadata)
            case "tool_call":
                self.tools += 1
            case "tool_result":
                self.errors += event.error is not None and event.metadata.get("outcome") not in ("cancelled", "skipped")
            case _:
                pass

    @property
    def seconds(self) -> float:
        """From the first event to the last."""
        return self.last - self.start if self.start is not None and self.last is not None else 0.0

    def _replied(self, facts: dict[str, Any]) -> None:
        self.requests += 1
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
