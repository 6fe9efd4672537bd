"""What a run tells the world: one frozen class per event, told apart by `kind`.

Observers, logs, traces and streams are all made from these. Events come in the order in which things happen; a tool
call that ends first is told first.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    from fractal.results import AgentResult, ToolResult

__all__ = [
    "DelegationFinished",
    "DelegationStarted",
    "Event",
    "ModelRequested",
    "ModelResponded",
    "Observer",
    "RetryScheduled",
    "RunEvent",
    "RunFinished",
    "RunStarted",
    "ToolFinished",
    "ToolStarted",
    "WarningRaised",
]


@dataclass(frozen=True, slots=True, kw_only=True)
class RunEvent:
    """What every event says.

    Attributes:
        run_id: The run it happened in.
        parent_id: The run that started this one, or None.
        agent_name: The agent that runs.
        depth: How many runs are above this one.
        at: Seconds since the epoch.
    """

    run_id: str
    parent_id: str | None
    agent_name: str
    depth: int
    at: float = field(default_factory=time.time)


@dataclass(frozen=True, slots=True, kw_only=True)
class RunStarted(RunEvent):
    """A run began.

    Attributes:
        message: The user's turn, as a chat message.
        call_id: Id of the tool call of the parent run that started this one, or None.
    """

    kind: Literal["run_started"] = "run_started"
    message: dict[str, Any]
    call_id: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class RunFinished(RunEvent):
    """A run ended, in whatever way; always the last event of a run, also of one that was cancelled.

    Attributes:
        result: How it ended, with all it had done.
    """

    kind: Literal["run_finished"] = "run_finished"
    result: AgentResult


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelRequested(RunEvent):
    """A request went to the model.

    Attributes:
        iteration: Turn of the run, from 1.
        attempt: Try of this request, from 1.
        message_count: Messages sent, without the system prompt.
    """

    kind: Literal["model_requested"] = "model_requested"
    iteration: int
    attempt: int
    message_count: int


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelResponded(RunEvent):
    """The model answered.

    Attributes:
        message: The assistant's message.
        finish_reason: The endpoint's word for why it stopped, or None.
        input_tokens: Prompt tokens, 0 if the endpoint did not say.
        output_tokens: Completion tokens, 0 if the endpoint did not say.
        elapsed: Seconds the request took.
    """

    kind: Literal["model_responded"] = "model_responded"
    message: dict[str, Any]
    finish_reason: str | None
    input_tokens: int
    output_tokens: int
    elapsed: float


@dataclass(frozen=True, slots=True, kw_only=True)
class RetryScheduled(RunEvent):
    """A request failed and will be sent again.

    Attributes:
        attempt: The try that failed, from 1.
        wait: Seconds until the next one.
        error: What went wrong.
    """

    kind: Literal["retry_scheduled"] = "retry_scheduled"
    attempt: int
    wait: float
    error: str


@dataclass(frozen=True, slots=True, kw_only=True)
class ToolStarted(RunEvent):
    """A tool call began.

    Attributes:
        tool_name: The tool.
        call_id: Id of the call.
        arguments: What the model sent, parsed where that was possible.
    """

    kind: Literal["tool_started"] = "tool_started"
    tool_name: str
    call_id: str
    arguments: Any


@dataclass(frozen=True, slots=True, kw_only=True)
class ToolFinished(RunEvent):
    """A tool call ended, well or badly; every started call has one.

    Attributes:
        tool_name: The tool.
        call_id: Id of the call.
        result: How it ended.
    """

    kind: Literal["tool_finished"] = "tool_finished"
    tool_name: str
    call_id: str
    result: ToolResult


@dataclass(frozen=True, slots=True, kw_only=True)
class DelegationStarted(RunEvent):
    """The run hands a question to another agent.

    Attributes:
        call_id: Id of the tool call that does so, or None.
        to_agent: Name of the other agent.
        query: What it is asked.
    """

    kind: Literal["delegation_started"] = "delegation_started"
    call_id: str | None
    to_agent: str
    query: Any


@dataclass(frozen=True, slots=True, kw_only=True)
class DelegationFinished(RunEvent):
    """The other agent is done.

    Attributes:
        call_id: Id of the tool call that asked it, or None.
        to_agent: Name of the other agent.
        result: How its run ended; None if it was cut before it could say.
    """

    kind: Literal["delegation_finished"] = "delegation_finished"
    call_id: str | None
    to_agent: str
    result: AgentResult | None


@dataclass(frozen=True, slots=True, kw_only=True)
class WarningRaised(RunEvent):
    """Something was odd, but stopped nothing.

    Attributes:
        message: What.
    """

    kind: Literal["warning_raised"] = "warning_raised"
    message: str


Event = (
    RunStarted
    | RunFinished
    | ModelRequested
    | ModelResponded
    | RetryScheduled
    | ToolStarted
    | ToolFinished
    | DelegationStarted
    | DelegationFinished
    | WarningRaised
)
"""Any event; a `match` over its classes can be checked for completeness."""

Observer = Callable[[Event], object]
"""Called with every event, in the run's own task: it must not block. What it raises is logged, never passed on."""
