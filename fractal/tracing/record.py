"""`TraceEvent`: one line of a trace."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from typing import Any, Self

from fractal._json import encode

__all__ = ["TYPES", "TraceEvent"]

TYPES = (
    "agent_start",
    "agent_end",
    "agent_delegate",
    "delegation_end",
    "tool_call",
    "tool_result",
    "error",
    "model_request",
    "model_response",
    "retry",
    "approval_request",
    "approval_answer",
    "limit",
    "warning",
)
"""What `TraceEvent.event_type` may be."""


@dataclass(slots=True)
class TraceEvent:
    """An event of a run, as a trace holds it.

    Attributes:
        timestamp: When, in seconds since the epoch.
        event_type: What: one of `TYPES`.
        agent_name: The agent it happened to.
        run_id: Id of the run that the user began: all that happened below it has the same.
        parent_agent: Name of the agent that delegated to this one, or None.
        delegation_depth: How many runs are above this one.
        tool_name: The tool, where it is about one.
        tool_call_id: Id of its call.
        parallel_group_id: The same for all calls of one reply of the model, which run side by side; None for a call
            that no model asked for.
        arguments: What a tool is called with, a delegate is asked, or a run was given.
        result: What came back.
        error: What went wrong, or None.
        elapsed_time: Seconds it took, where it is an end.
        metadata: What else there is, by name: `run`, the id of the run itself, `parent_run`, that of the run above,
            and more by type.
    """

    timestamp: float
    event_type: str
    agent_name: str
    run_id: str | None = None
    parent_agent: str | None = None
    delegation_depth: int = 0
    tool_name: str | None = None
    tool_call_id: str | None = None
    parallel_group_id: str | None = None
    arguments: dict[str, Any] | None = None
    result: Any = None
    error: str | None = None
    elapsed_time: float | None = None
    metadata: dict[str, Any] = field(default_factory=dict[str, Any])

    def to_dict(self) -> dict[str, Any]:
        """The fields."""
        return asdict(self)

    def to_json(self) -> str:
        """The line in a file, without its end."""
        return encode(self).decode()

    @classmethod
    def of(cls, values: Mapping[str, Any]) -> Self:
        """Make one of the values of a line; those with names that are not known are left out."""
        return cls(**{name: values[name] for name in _NAMES & values.keys()})


_NAMES = {each.name for each in fields(TraceEvent)}
