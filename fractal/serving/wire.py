"""Events as clients see them: the JSON of each, without what is no client's business.

A client sees what the agent does: its text, its tool calls, its delegates. It does not see system prompts, the names of
models and prices, warnings, transcripts of delegates, and what exceptions say.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import fields
from operator import attrgetter
from typing import Any, Literal

from pydantic import BaseModel, Field, TypeAdapter
from typing_extensions import TypedDict

from fractal._json import encode, is_list, is_mapping
from fractal.errors import StopReason
from fractal.events import (
    ApprovalAnswered,
    DelegationFinished,
    DelegationStarted,
    Event,
    LimitHit,
    ModelRequested,
    ModelResponded,
    ReasoningDelta,
    RetryScheduled,
    RunEvent,
    RunFinished,
    RunStarted,
    TextDelta,
    ToolCallDelta,
    ToolFinished,
    ToolStarted,
)
from fractal.results import AgentResult, Outcome, ToolResult, Usage
from fractal.serving.problems import said_of

__all__ = [
    "RunOutcome",
    "RunState",
    "approval_json",
    "end_json",
    "event_json",
    "event_schema",
    "result_json",
    "skipped_json",
]

RunState = Literal["queued", "running", "finished", "failed", "cancelled"]
"""Where a run is: it waits for its turn, goes on, gave an answer, failed, or was cancelled."""


class _Shown:
    """Some attributes of things of a kind, as a dict; two at least."""

    def __init__(self, *names: str) -> None:
        self._names, self._values = names, attrgetter(*names)

    def __call__(self, thing: object) -> dict[str, Any]:
        return dict(zip(self._names, self._values(thing), strict=True))


_HIDDEN: Mapping[type[RunEvent], Collection[str]] = {
    RunStarted: ("history", "limits"),
    ModelRequested: ("model", "opening", "added", "kept", "tools"),
    TextDelta: (),
    ReasoningDelta: (),
    ToolCallDelta: (),
    ModelResponded: ("message", "cost", "model", "response_id"),
    RetryScheduled: ("error",),
    ToolStarted: (),
    ApprovalAnswered: (),
    ToolFinished: ("result",),
    DelegationStarted: (),
    DelegationFinished: ("result",),
    LimitHit: (),
}
"""The events that clients see, and what of each they do not. `WarningRaised` is for logs. The end of a run, and
calls that wait for approval, are told by what serves them, which knows more."""

_SHOWN = {
    kind: _Shown(*(field.name for field in fields(kind) if field.name not in hidden))
    for kind, hidden in _HIDDEN.items()
}

_OF_EVENT = ("run_id", "parent_id", "agent_name", "depth", "at")
_OF_CALL = _Shown("content", "outcome", "elapsed")
_TOOL_FAILED = "the tool failed"


def event_json(event: Event) -> bytes | None:
    """The JSON of an event for clients; None if they do not see it."""
    match event:
        case RunFinished():
            return encode(_end_of_delegate(event))
        case ToolFinished(result=result):
            of_call = {**_OF_CALL(result), "error": _TOOL_FAILED if _has_raised(result) else result.error}
            return encode({**_SHOWN[ToolFinished](event), "result": of_call})
        case _:
            shown = _SHOWN.get(type(event))
            return encode(shown(event)) if shown is not None else None


def _has_raised(result: ToolResult) -> bool:
    """Whether a call is told of in the words of an exception, which may say anything."""
    return result.outcome == "error" and result.exception is not None


def _end_of_delegate(event: RunFinished) -> DelegateFinished:
    result = event.result
    return {
        "kind": "delegate_finished",
        "run_id": event.run_id,
        "parent_id": event.parent_id,
        "agent_name": event.agent_name,
        "depth": event.depth,
        "at": event.at,
        "success": result.success,
        "stop_reason": result.stop_reason,
        "usage": usage_facts(result.usage),
        "elapsed": result.elapsed,
    }


# ---- what only a server tells


class RunOutcome(BaseModel):
    """How a run ended, for clients."""

    success: bool = Field(description="Whether there is an answer.")
    content: Any = Field(description="The answer: text, or an object; null if there is none.")
    stop_reason: StopReason = Field(description="Why the run ended.")
    error: str | None = Field(description="What went wrong, for a human; null after a success.")
    messages: list[dict[str, Any]] = Field(description="The conversation. Send it as `messages` to go on.")
    usage: dict[str, int] = Field(description="What was used, delegates included.")
    elapsed: float = Field(description="Seconds it took.")


def usage_facts(usage: Usage) -> dict[str, int]:
    """The usage without its price."""
    return {name: value for name, value in vars(usage).items() if name != "cost"}


def result_json(result: AgentResult[Any]) -> bytes:
    """The result of a run for clients, as the JSON of a `RunOutcome`."""
    return encode(
        {
            "success": result.success,
            "content": result.content if result.success else None,
            "stop_reason": result.stop_reason,
            "error": None if result.success else said_of(result.stop_reason),
            "messages": _without_exceptions(result),
            "usage": usage_facts(result.usage),
            "elapsed": result.elapsed,
        }
    )


def _without_exceptions(result: AgentResult[Any]) -> list[dict[str, Any]]:
    """The conversation, without what exceptions of tools say: the model was told, and a client is not."""
    raised = {each.call_id for each in result.tool_results if _has_raised(each)}
    if not raised:
        return result.messages
    instead = {"content": f"error: {_TOOL_FAILED}"}
    return [
        {**message, **instead} if message.get("role") == "tool" and message.get("tool_call_id") in raised else message
        for message in result.messages
    ]


class RunEnded(TypedDict):
    """The end of the run itself, after all of its tasks have ended; always the last event."""

    kind: Literal["run_finished"]
    run_id: str
    at: float
    state: RunState
    result: RunOutcome | None
    problem: dict[str, Any] | None


class CallResult(TypedDict):
    """How a tool call ended."""

    content: Any
    error: str | None
    outcome: Outcome
    elapsed: float


class DelegateFinished(TypedDict):
    """The end of a run that an agent below has made."""

    kind: Literal["delegate_finished"]
    run_id: str
    parent_id: str | None
    agent_name: str
    depth: int
    at: float
    success: bool
    stop_reason: StopReason
    usage: dict[str, int]
    elapsed: float


class ApprovalPending(TypedDict):
    """A tool call that waits for somebody's approval.

    `approval_id` is what an answer names: `POST /runs/{id}/approvals/{approval_id}`. It is the call's id, unless the
    run had a call of that id before.
    """

    kind: Literal["approval_requested"]
    run_id: str
    agent_name: str
    at: float
    approval_id: str
    call_id: str
    tool_name: str
    description: str
    arguments: dict[str, Any]


class EventsSkipped(TypedDict):
    """A gap: events that this reader has missed are not kept, or not any more.

    `skipped` is their number; null where nobody looked at the run, and none were counted. `text` is what the model has
    written, up to here, of the reply that it is writing, or wrote last.
    """

    kind: Literal["events_skipped"]
    run_id: str
    at: float
    skipped: int | None
    text: str


def approval_json(approval: ApprovalPending) -> bytes:
    """The JSON of a call that waits."""
    return encode(approval)


def skipped_json(run_id: str, at: float | None, skipped: int | None, text: str) -> bytes:
    """The JSON of an `EventsSkipped`."""
    return encode({"kind": "events_skipped", "run_id": run_id, "at": at, "skipped": skipped, "text": text})


def end_json(
    run_id: str, at: float | None, state: RunState, result: bytes | None, problem: Mapping[str, Any] | None
) -> bytes:
    """The JSON of a `RunEnded`, with the JSON of its result."""
    head = encode({"kind": "run_finished", "run_id": run_id, "at": at, "state": state, "problem": problem})
    return head[:-1] + b',"result":' + (result or b"null") + b"}"


# ---- what the OpenAPI document says of them


def event_schema() -> dict[str, Any]:
    """The JSON schema of the events of a stream, told apart by `kind`."""
    ours = (RunEnded, DelegateFinished, ApprovalPending, EventsSkipped)
    schemas = [_schema_of(kind, hidden) for kind, hidden in _HIDDEN.items()]
    schemas += [_schema_of(kind) for kind in ours]
    return {"oneOf": schemas, "discriminator": {"propertyName": "kind"}}


def _schema_of(kind: Any, hidden: Collection[str] = ()) -> dict[str, Any]:
    schema = _resolved(TypeAdapter(kind).json_schema(mode="serialization"))
    for name in hidden:
        schema["properties"].pop(name)
    if kind is ToolFinished:
        schema["properties"]["result"] = _schema_of(CallResult)
    required = {*schema.get("required", ()), "kind", *_OF_EVENT} & schema["properties"].keys()
    return {**schema, "required": sorted(required)}


def _resolved(schema: dict[str, Any]) -> dict[str, Any]:
    """A schema without references: what they lead to stands in their places."""
    definitions: dict[str, Any] = schema.pop("$defs", {})

    def inlined(part: Any) -> Any:
        if is_list(part):
            return [inlined(each) for each in part]
        if not is_mapping(part):
            return part
        if isinstance(reference := part.get("$ref"), str):
            return inlined(definitions[reference.rpartition("/")[2]])
        return {name: inlined(each) for name, each in part.items()}

    resolved: dict[str, Any] = inlined(schema)
    return resolved
