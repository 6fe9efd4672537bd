"""Events as clients see them: the JSON of each, without what is no client's business.

A client sees what the agent does: its text, its tool calls, its delegates. It does not see system prompts, the names of
models and prices, warnings, transcripts of delegates, and what exceptions say.
"""

from __future__ import annotations

from collections.abc import Mapping
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
from fractal.results import AgentResult, Usage
from fractal.serving.problems import said_of

__all__ = ["RunOutcome", "RunState", "approval_json", "event_json", "event_schema", "result_json", "skipped_json"]

RunState = Literal["queued", "running", "finished", "failed", "cancelled"]
"""Where a run is: it waits for its turn, goes on, gave an answer, failed, or was cancelled."""

_HIDDEN: Mapping[type[RunEvent], dict[str, Any] | None] = {
    RunStarted: {"history": True, "limits": True},
    ModelRequested: {"model": True, "opening": True, "added": True, "kept": True, "tools": True},
    TextDelta: None,
    ReasoningDelta: None,
    ToolCallDelta: None,
    ModelResponded: {"message": True, "cost": True, "model": True, "response_id": True},
    RetryScheduled: {"error": True},
    ToolStarted: None,
    ApprovalAnswered: None,
    ToolFinished: {"result": {"metadata": True}},
    DelegationStarted: None,
    DelegationFinished: {"result": True},
    LimitHit: None,
}
"""The events that clients see, and what of each they do not. `WarningRaised` is for logs. The end of a run, and
calls that wait for approval, are told by what serves them, which knows more."""

_adapters: dict[type[RunEvent], TypeAdapter[Any]] = {}


def event_json(event: Event) -> bytes | None:
    """The JSON of an event for clients; None if they do not see it."""
    kind = type(event)
    if kind is RunFinished:
        return _end_of_delegate(event)
    if kind not in _HIDDEN:
        return None
    if (adapter := _adapters.get(kind)) is None:
        adapter = _adapters[kind] = TypeAdapter(kind)
    return adapter.dump_json(event, exclude=_HIDDEN[kind])


def _end_of_delegate(event: Any) -> bytes:
    facts = {name: getattr(event, name) for name in ("run_id", "parent_id", "agent_name", "depth", "at")}
    result: AgentResult[Any] = event.result
    usage = result.usage.model_dump(mode="json", exclude={"cost"})
    end = {"success": result.success, "stop_reason": result.stop_reason, "usage": usage, "elapsed": result.elapsed}
    return encode({**facts, "kind": "delegate_finished", **end})


# ---- what only a server tells


class RunOutcome(BaseModel):
    """How a run ended, for clients."""

    success: bool = Field(description="Whether there is an answer.")
    content: Any = Field(description="The answer: text, or an object; null if there is none.")
    stop_reason: StopReason = Field(description="Why the run ended.")
    error: str | None = Field(description="What went wrong, for a human; null after a success.")
    messages: list[dict[str, Any]] = Field(description="The conversation. Send it as `messages` to go on.")
    usage: Usage = Field(description="What was used, delegates included.")
    elapsed: float = Field(description="Seconds it took.")


_OF_RESULT = {"content", "messages", "usage", "elapsed", "success", "stop_reason"}


def result_json(result: AgentResult[Any]) -> bytes:
    """The result of a run for clients, as the JSON of a `RunOutcome`."""
    if result.success:
        shown = result.__pydantic_serializer__.to_json(
            result, include=_OF_RESULT, exclude={"usage": {"cost"}}, by_alias=True
        )
        return shown[:-1] + b',"error":null}'
    facts = result.model_dump(mode="json", include={"messages", "usage", "elapsed"}, exclude={"usage": {"cost"}})
    said = said_of(result.stop_reason)
    return encode({"content": None, "success": False, "stop_reason": result.stop_reason, "error": said, **facts})


class RunEnded(TypedDict):
    """The end of the run itself, after all of its tasks have ended; always the last event."""

    kind: Literal["run_finished"]
    run_id: str
    at: float
    state: RunState
    result: RunOutcome | None
    problem: dict[str, Any] | None


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
    """A gap: events that this reader has missed are no longer kept.

    `text` is what the model has written of the reply that it is writing, or wrote last.
    """

    kind: Literal["events_skipped"]
    run_id: str
    at: float
    skipped: int
    text: str


def approval_json(approval: ApprovalPending) -> bytes:
    """The JSON of a call that waits."""
    return encode(approval)


def skipped_json(gap: EventsSkipped) -> bytes:
    """The JSON of a gap."""
    return encode(gap)


# ---- what the OpenAPI document says of them


def event_schema() -> dict[str, Any]:
    """The JSON schema of the events of a stream, told apart by `kind`."""
    ours = (RunEnded, DelegateFinished, ApprovalPending, EventsSkipped)
    schemas = [_without(_schema_of(kind), hidden) for kind, hidden in _HIDDEN.items()]
    schemas += [_resolved(_schema_of(kind)) for kind in ours]
    return {"oneOf": schemas, "discriminator": {"propertyName": "kind"}}


def _schema_of(kind: Any) -> dict[str, Any]:
    return TypeAdapter(kind).json_schema(mode="serialization")


def _without(schema: dict[str, Any], hidden: Mapping[str, Any] | None) -> dict[str, Any]:
    inlined = _resolved(schema)
    for name, inner in (hidden or {}).items():
        if inner is True:
            inlined["properties"].pop(name)
            inlined["required"] = [each for each in inlined.get("required", ()) if each != name]
        else:
            inlined["properties"][name] = _without(inlined["properties"][name], inner)
    inlined["required"] = sorted({*inlined.get("required", ()), "kind"})
    return inlined


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
