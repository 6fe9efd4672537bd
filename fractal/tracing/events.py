"""The events of a run, made again of those of a trace, as far as pictures need them; whatever a file has in it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, cast, get_args

from fractal._json import is_list, is_mapping, text_of
from fractal.errors import StopReason
from fractal.events import (
    DelegationStarted,
    Event,
    ModelRequested,
    ModelResponded,
    RetryScheduled,
    RunFinished,
    RunStarted,
    ToolFinished,
    ToolStarted,
)
from fractal.results import AgentResult, Outcome, ToolResult, Usage
from fractal.tracing.record import TraceEvent
from fractal.tracing.spans import run_of

__all__ = ["event_of"]

_OUTCOMES = frozenset(get_args(Outcome))
_STOP_REASONS = frozenset(get_args(StopReason))


def event_of(event: TraceEvent) -> Event | None:
    """The run's event for an event of a trace; None if that is about nothing that takes time."""
    make = _makers.get(event.event_type)
    return make(event, _who(event)) if make is not None else None


def _who(event: TraceEvent) -> dict[str, Any]:
    """The facts that every event has."""
    run, above = run_of(event)
    return {
        "run_id": run,
        "parent_id": above,
        "agent_name": event.agent_name,
        "depth": event.delegation_depth,
        "at": event.timestamp,
    }


def _started(event: TraceEvent, who: Mapping[str, Any]) -> Event:
    call = event.metadata.get("call")
    message = {"role": "user", "content": _argument(event, "user_input") or ""}
    return RunStarted(**who, message=message, call_id=text_of(call) if call is not None else None)


def _ended(event: TraceEvent, who: Mapping[str, Any]) -> Event:
    success = bool(event.metadata.get("success", event.error is None))
    reason = event.metadata.get("stop_reason")
    if not (isinstance(reason, str) and reason in _STOP_REASONS):
        reason = "finished" if success else "error"
    given = event.metadata.get("usage")
    usage: Mapping[str, Any] = given if is_mapping(given) else {}
    names = ("requests", "tool_calls", "input_tokens", "output_tokens")
    result = AgentResult(
        agent_name=event.agent_name,
        success=success,
        stop_reason=cast("StopReason", reason),
        usage=Usage(**{name: _count(usage.get(name)) for name in names}),
    )
    return RunFinished(**who, result=result)


def _requested(event: TraceEvent, who: Mapping[str, Any]) -> Event:
    iteration, attempt, messages = (_count(event.metadata.get(name)) for name in ("iteration", "attempt", "messages"))
    return ModelRequested(**who, iteration=iteration, attempt=attempt, message_count=messages)


def _responded(event: TraceEvent, who: Mapping[str, Any]) -> Event:
    return ModelResponded(
        **who,
        message=_message(event.result),
        finish_reason=None,
        input_tokens=_count(event.metadata.get("input_tokens")),
        output_tokens=_count(event.metadata.get("output_tokens")),
        elapsed=event.elapsed_time or 0.0,
    )


def _message(result: object) -> dict[str, Any]:
    """An assistant's message: its text, and the names of the tools that it calls."""
    if not is_mapping(result):
        return {"role": "assistant", "content": text_of(result)}
    calls = result.get("tool_calls")
    functions = [call.get("function") for call in (calls if is_list(calls) else ()) if is_mapping(call)]
    names = [text_of(each.get("name")) for each in functions if is_mapping(each)]
    return {
        "role": "assistant",
        "content": text_of(result.get("content") or result.get("refusal") or ""),
        "tool_calls": [{"function": {"name": name}} for name in names],
    }


def _retry(event: TraceEvent, who: Mapping[str, Any]) -> Event:
    error = text_of(event.metadata.get("message") or event.error or "")
    return RetryScheduled(**who, attempt=_count(event.metadata.get("attempt")), wait=0.0, error=error)


def _tool_started(event: TraceEvent, who: Mapping[str, Any]) -> Event:
    name = event.tool_name or "tool"
    return ToolStarted(**who, tool_name=name, call_id=event.tool_call_id or name, arguments=event.arguments)


def _tool_finished(event: TraceEvent, who: Mapping[str, Any]) -> Event:
    outcome = event.metadata.get("outcome")
    if not (isinstance(outcome, str) and outcome in _OUTCOMES):
        outcome = "ok" if event.error is None else "error"
    error = None if outcome == "ok" else event.error or outcome
    name = event.tool_name or "tool"
    result = ToolResult(tool_name=name, error=error, outcome=cast("Outcome", outcome))
    return ToolFinished(**who, tool_name=name, call_id=event.tool_call_id or name, result=result)


def _delegated(event: TraceEvent, who: Mapping[str, Any]) -> Event:
    to_agent, query = text_of(_argument(event, "to_agent") or ""), _argument(event, "query")
    return DelegationStarted(**who, call_id=event.tool_call_id, to_agent=to_agent, query=query)


def _argument(event: TraceEvent, name: str) -> Any:
    return event.arguments.get(name) if is_mapping(event.arguments) else None


def _count(value: object) -> int:
    return value if type(value) is int and 0 <= value < 2**63 else 0


_makers: dict[str, Callable[[TraceEvent, Mapping[str, Any]], Event]] = {
    "agent_start": _started,
    "agent_end": _ended,
    "model_request": _requested,
    "model_response": _responded,
    "retry": _retry,
    "tool_call": _tool_started,
    "tool_result": _tool_finished,
    "agent_delegate": _delegated,
}
