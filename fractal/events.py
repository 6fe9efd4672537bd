"""What a run tells the world: one frozen class per event, told apart by `kind`.

Observers, logs, traces and streams are all made from these. Events come in the order in which things happen; a tool
call that ends first is told first.

An event can be written as JSON, by `event.model_dump_json()`, and read again, by `TypeAdapter(Event).validate_json`;
it can be pickled, printed and logged, whatever a model or a tool has put into it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import field
from typing import Any, Literal

from fractal._event import RunEvent, event_class
from fractal._forms import AnyMessage, AnyObject, Count, Text
from fractal.limits import Limits
from fractal.results import AgentResult, ToolResult

__all__ = [
    "ApprovalAnswered",
    "ApprovalRequested",
    "DelegationFinished",
    "DelegationStarted",
    "Event",
    "LimitHit",
    "ModelRequested",
    "ModelResponded",
    "Observer",
    "ReasoningDelta",
    "RetryScheduled",
    "RunEvent",
    "RunFinished",
    "RunObserver",
    "RunStarted",
    "TextDelta",
    "ToolCallDelta",
    "ToolFinished",
    "ToolStarted",
    "WarningRaised",
]


@event_class
class RunStarted(RunEvent):
    """A run began.

    Attributes:
        message: The user's turn, as a chat message.
        call_id: Id of the tool call of the parent run that started this one, or None.
        history: The messages before that turn, where the run goes on with a conversation.
        limits: What the run may use.
        timeout: Seconds the run may take, or None.
    """

    kind: Literal["run_started"] = "run_started"
    message: AnyMessage
    call_id: Text | None = None
    history: list[AnyMessage] = field(default_factory=list[AnyMessage])
    limits: Limits | None = None
    timeout: float | None = None


@event_class
class RunFinished(RunEvent):
    """A run ended, in whatever way; always the last event of a run, also of one that was cancelled.

    Attributes:
        result: How it ended, with all it had done.
    """

    kind: Literal["run_finished"] = "run_finished"
    result: AgentResult


@event_class
class ModelRequested(RunEvent):
    """A request went to the model.

    Attributes:
        iteration: Turn of the run, from 1.
        attempt: Try of this request, from 1.
        message_count: Messages sent, without the system prompt.
        model: Name of the model that is asked, as the agent has it.
        opening: What stands before the conversation: the system prompt, and what stands for messages left out.
        added: Messages that have come to the conversation since the last request, or since the run began.
        kept: Positions of the conversation's messages that are sent; None for all.
        tools: Names of the tools on offer.
        parameters: What the agent sets of the request besides: `temperature`, `max_tokens` and the like.
        server: Host and port of the endpoint; None where they are not known.
    """

    kind: Literal["model_requested"] = "model_requested"
    iteration: int
    attempt: int
    message_count: int
    model: Text = ""
    opening: list[AnyMessage] = field(default_factory=list[AnyMessage])
    added: list[AnyMessage] = field(default_factory=list[AnyMessage])
    kept: list[int] | None = None
    tools: list[Text] = field(default_factory=list[Text])
    parameters: dict[str, Any] = field(default_factory=dict[str, Any])
    server: tuple[Text, int] | None = None


@event_class
class ModelResponded(RunEvent):
    """The model answered.

    Attributes:
        message: The assistant's message.
        finish_reason: The endpoint's word for why it stopped, or None.
        input_tokens: Prompt tokens, 0 if the endpoint did not say.
        output_tokens: Completion tokens, 0 if the endpoint did not say.
        elapsed: Seconds the request took.
        cached_input_tokens: Those of the prompt tokens that the endpoint's cache served.
        cache_write_input_tokens: Those of the prompt tokens that it put into its cache.
        reasoning_tokens: Those of the completion tokens that the model thought with.
        cost: What the reply cost, in the currency of the prices; None if that is not known.
        model: Name of the model that answered, in the endpoint's words, or None.
        response_id: The endpoint's id of the answer, or None.
        first_piece: Seconds until its first piece came; None in runs that are not streamed.
    """

    kind: Literal["model_responded"] = "model_responded"
    message: AnyMessage
    finish_reason: Text | None
    input_tokens: Count
    output_tokens: Count
    elapsed: float
    cached_input_tokens: Count = 0
    cache_write_input_tokens: Count = 0
    reasoning_tokens: Count = 0
    cost: float | None = None
    model: Text | None = None
    response_id: Text | None = None
    first_piece: float | None = None


@event_class
class TextDelta(RunEvent):
    """A piece of the model's text, while it is written; only in streamed runs.

    Attributes:
        text: The piece.
    """

    kind: Literal["text_delta"] = "text_delta"
    text: Text


@event_class
class ReasoningDelta(RunEvent):
    """A piece of what a model thinks before it answers, where the endpoint shows it; only in streamed runs.

    Attributes:
        text: The piece.
    """

    kind: Literal["reasoning_delta"] = "reasoning_delta"
    text: Text


@event_class
class ToolCallDelta(RunEvent):
    """A piece of the arguments of a tool call, while they are written; only in streamed runs.

    Attributes:
        index: Which of the reply's calls it belongs to, from 0.
        call_id: Id of the call, or None if the endpoint sends none; the call then gets one when it is whole.
        tool_name: The tool.
        arguments: The piece of JSON text; empty for the first, which tells the name.
    """

    kind: Literal["tool_call_delta"] = "tool_call_delta"
    index: int
    call_id: Text | None
    tool_name: Text
    arguments: Text


@event_class
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
    error: Text


@event_class
class ToolStarted(RunEvent):
    """A tool call began.

    Attributes:
        tool_name: The tool.
        call_id: Id of the call.
        arguments: What it will be called with, by name; what the model sent, where that does not fit.
    """

    kind: Literal["tool_started"] = "tool_started"
    tool_name: Text
    call_id: Text
    arguments: AnyObject


@event_class
class ApprovalRequested(RunEvent):
    """A tool call waits for approval.

    Attributes:
        tool_name: The tool.
        call_id: Id of the call.
        arguments: What it would be called with.
    """

    kind: Literal["approval_requested"] = "approval_requested"
    tool_name: Text
    call_id: Text
    arguments: AnyObject


@event_class
class ApprovalAnswered(RunEvent):
    """The approver has answered; a call that was denied, or got no answer, is not made.

    Attributes:
        tool_name: The tool.
        call_id: Id of the call.
        is_allowed: Whether the call is made.
        arguments: What it is called with: what was asked for, or what the answer put in its place.
        reason: Why not, as the model is told; None if it is made.
    """

    kind: Literal["approval_answered"] = "approval_answered"
    tool_name: Text
    call_id: Text
    is_allowed: bool
    arguments: AnyObject
    reason: Text | None


@event_class
class ToolFinished(RunEvent):
    """A tool call ended, well or badly; every started call has one.

    Attributes:
        tool_name: The tool.
        call_id: Id of the call.
        result: How it ended.
    """

    kind: Literal["tool_finished"] = "tool_finished"
    tool_name: Text
    call_id: Text
    result: ToolResult


@event_class
class DelegationStarted(RunEvent):
    """The run hands a question to another agent.

    Attributes:
        call_id: Id of the tool call that does so, or None.
        to_agent: Name of the other agent.
        query: What it is asked.
    """

    kind: Literal["delegation_started"] = "delegation_started"
    call_id: Text | None
    to_agent: Text
    query: AnyObject


@event_class
class DelegationFinished(RunEvent):
    """The other agent is done.

    Attributes:
        call_id: Id of the tool call that asked it, or None.
        to_agent: Name of the other agent.
        result: How its run ended; None if it was cut before it could say.
    """

    kind: Literal["delegation_finished"] = "delegation_finished"
    call_id: Text | None
    to_agent: Text
    result: AgentResult | None


@event_class
class LimitHit(RunEvent):
    """A limit ended the run, kept a tool call from being made, or let only a final answer through.

    Attributes:
        limit: Which: `"deadline"`, `"soft_deadline"`, `"max_iterations"`, `"depth"`, `"context_window"`, or the
            resource of the budget: `"requests"`, `"tool_calls"`, `"tokens"`, `"cost"`.
        message: What that means here.
    """

    kind: Literal["limit_hit"] = "limit_hit"
    limit: Text
    message: Text


@event_class
class WarningRaised(RunEvent):
    """Something was odd, but stopped nothing.

    Attributes:
        message: What.
    """

    kind: Literal["warning_raised"] = "warning_raised"
    message: Text


Event = (
    RunStarted
    | RunFinished
    | ModelRequested
    | TextDelta
    | ReasoningDelta
    | ToolCallDelta
    | ModelResponded
    | RetryScheduled
    | ToolStarted
    | ApprovalRequested
    | ApprovalAnswered
    | ToolFinished
    | DelegationStarted
    | DelegationFinished
    | LimitHit
    | WarningRaised
)
"""Any event; a `match` over its classes can be checked for completeness."""

Observer = Callable[[Event], object]
"""Called with every event, in the run's own task: it must not block. What it raises is logged, never passed on."""


class RunObserver:
    """A base class of observers that take part in what a run does, besides being called with its events.

    Each method may be left as it is. None of them may block, and what they raise is logged, never passed on.

    Example:
        ```python
        class Quiet(RunObserver):
            def __call__(self, event: Event) -> None:
                print(event.kind)

            def wants_run(self) -> bool:
                return logging.getLogger("app").isEnabledFor(logging.DEBUG)
        ```
    """

    def __call__(self, event: Event) -> object:
        """Take an event; called in the run's own task."""

    def wants_run(self) -> bool:
        """Whether to send the events of the run that is about to begin; asked in the run's own task.

        A run that nobody wants to be told of costs nothing.
        """
        return True

    def enter_call(self, run_id: str, call_id: str) -> None:
        """Prepare the context of a tool call; called in the call's own task, or before its thread begins.

        Context variables that are set here hold for the tool, and for nothing else.
        """

    def request_headers(self, run_id: str) -> Mapping[str, str]:
        """HTTP headers for the request that the last `ModelRequested` announced.

        They are for tracing, such as `traceparent`: those that sign a request, or say how long it is, are left out.
        """
        return {}

    def is_settled(self, run_id: str) -> bool:
        """Whether nothing is left to do for a run that has ended; `settle` is awaited only if something is."""
        return type(self).settle is RunObserver.settle

    async def settle(self, run_id: str) -> None:
        """Finish the work for a run that has ended; awaited before the run returns, cancelled or not.

        It has a second; then it is cancelled.
        """
