"""Events of a served run in the words of AG-UI."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ag_ui.core import (
    BaseEvent,
    CustomEvent,
    Interrupt,
    ReasoningEndEvent,
    ReasoningMessageContentEvent,
    ReasoningMessageEndEvent,
    ReasoningMessageStartEvent,
    ReasoningStartEvent,
    RunErrorEvent,
    RunFinishedCancelledOutcome,
    RunFinishedEvent,
    RunFinishedInterruptOutcome,
    RunFinishedSuccessOutcome,
    RunStartedEvent,
    SubagentErrorEvent,
    SubagentFinishedEvent,
    SubagentFinishedSuccessOutcome,
    SubagentFinishedSuspendedOutcome,
    SubagentStartedEvent,
    TextMessageContentEvent,
    TextMessageEndEvent,
    TextMessageStartEvent,
    TokenUsage,
    ToolCallArgsEvent,
    ToolCallEndEvent,
    ToolCallResultEvent,
    ToolCallStartEvent,
)

from fractal._json import encode, text_of
from fractal.serving._agui.asked import DECISION, interrupt_id
from fractal.serving.problems import said_of
from fractal.serving.wire import ApprovalPending

__all__ = ["Translator"]

_VERSION = "1.0"

Facts = Mapping[str, Any]


@dataclass
class _Reply:
    """What the model of a run is saying: the message that is open, if there is one."""

    message_id: str
    text: str = ""
    has_text: bool = False
    has_thoughts: bool = False


class Translator:
    """A translator of one run's events, in their order.

    Args:
        run_id: The run.
        thread_id: What the client calls the conversation.
        client_run_id: What it calls this run.
        after: Number of the last event that streams before this one have told; 0 for none.
    """

    def __init__(self, run_id: str, thread_id: str, client_run_id: str, after: int = 0) -> None:
        self._run_id, self._after = run_id, after
        self._ids: dict[str, Any] = {"thread_id": thread_id, "run_id": client_run_id}
        self._replies: dict[str, _Reply] = {}
        self._calls: dict[tuple[str, str], str] = {}  # the ids of open calls, as the client knows them
        self._used: set[str] = set()
        self._below: dict[str, SubagentStartedEvent] = {}  # runs of delegates that go on
        self._busy: set[tuple[str, str]] = set()
        self._waiting: set[tuple[str, str]] = set()  # calls that need approval; that may be known before they begin
        self._number = 0

    @property
    def is_idle(self) -> bool:
        """Whether nothing is under way but calls that wait for approval."""
        return not self._busy - self._waiting

    # ---- the ends of a stream

    def opening(self) -> list[BaseEvent]:
        """The first events of a stream: the run, and delegates that a stream before has left waiting."""
        return [RunStartedEvent(**self._ids, protocol_version=_VERSION), *self._below.values()]

    def interrupted(self, pending: Sequence[ApprovalPending], after: int) -> list[BaseEvent]:
        """The last events of a stream when nothing goes on before somebody has approved.

        Args:
            pending: The calls that wait.
            after: Number of the last event that the client has seen.
        """
        interrupts = [self._interrupt(each, after) for each in pending]
        left = [
            SubagentFinishedEvent(
                subagent_run_id=run_id,
                outcome=SubagentFinishedSuspendedOutcome(
                    interrupt_ids=[each.id for each in interrupts if each.subagent_run_id == run_id]
                ),
            )
            for run_id in reversed(self._below)
        ]
        outcome = RunFinishedInterruptOutcome(interrupts=interrupts)
        return [*self._all_closed(), *left, RunFinishedEvent(**self._ids, outcome=outcome)]

    def _interrupt(self, pending: ApprovalPending, after: int) -> Interrupt:
        run_id, call_id = pending["run_id"], pending["call_id"]
        said = f"{pending['tool_name']}: {pending['description']}" if pending["description"] else pending["tool_name"]
        return Interrupt(
            id=interrupt_id(self._run_id, after, pending["approval_id"]),
            reason="tool_approval",
            message=f"May the agent call {said}",
            tool_call_id=self._calls.get((run_id, call_id), call_id),
            subagent_run_id=self._below_id(run_id),
            response_schema=DECISION,
            metadata={"toolName": pending["tool_name"], "arguments": pending["arguments"]},
        )

    # ---- events

    def take(self, event: Facts) -> list[BaseEvent]:
        """An event in the words of the protocol: any number of its events."""
        take: Callable[[Facts], Iterator[BaseEvent]] | None = getattr(self, f"_of_{event['kind']}", None)
        return [] if take is None else list(take(event))

    def _of_run_started(self, event: Facts) -> Iterator[BaseEvent]:
        run_id, parent_id, call_id = event["run_id"], event["parent_id"], event["call_id"]
        if run_id == self._run_id or parent_id is None:
            return
        self._busy.discard((parent_id, call_id))  # what goes on is the run below
        self._below[run_id] = SubagentStartedEvent(
            subagent_run_id=run_id,
            name=event["agent_name"],
            parent_subagent_run_id=self._below_id(parent_id),
            parent_tool_call_id=self._calls.get((parent_id, call_id)),
        )
        yield self._below[run_id]

    def _of_delegate_finished(self, event: Facts) -> Iterator[BaseEvent]:
        run_id = event["run_id"]
        yield from self._closed(run_id)
        if self._below.pop(run_id, None) is None:
            return
        if event["success"]:
            yield SubagentFinishedEvent(subagent_run_id=run_id, outcome=SubagentFinishedSuccessOutcome())
        else:
            reason = event["stop_reason"]
            yield SubagentErrorEvent(subagent_run_id=run_id, message=said_of(reason), code=reason)

    def _of_model_requested(self, event: Facts) -> Iterator[BaseEvent]:
        run_id = event["run_id"]
        yield from self._closed(run_id)
        self._replies[run_id] = _Reply(self._new_id())
        self._busy.add((run_id, "model"))

    def _of_model_responded(self, event: Facts) -> Iterator[BaseEvent]:
        self._busy.discard((event["run_id"], "model"))
        yield from self._closed(event["run_id"])

    def _of_text_delta(self, event: Facts) -> Iterator[BaseEvent]:
        yield from self._written(event["run_id"], event["text"])

    def _of_reasoning_delta(self, event: Facts) -> Iterator[BaseEvent]:
        run_id = event["run_id"]
        reply = self._reply(run_id)
        thoughts: dict[str, Any] = {"message_id": f"{reply.message_id}-reasoning", **self._about(run_id)}
        if not reply.has_thoughts:
            reply.has_thoughts = True
            yield ReasoningStartEvent(**thoughts)
            yield ReasoningMessageStartEvent(**thoughts)
        if event["text"]:
            yield ReasoningMessageContentEvent(**thoughts, delta=event["text"])

    def _of_tool_started(self, event: Facts) -> Iterator[BaseEvent]:
        self._busy.add((event["run_id"], event["call_id"]))
        yield from self._called(event)

    def _of_approval_requested(self, event: Facts) -> Iterator[BaseEvent]:
        self._waiting.add((event["run_id"], event["call_id"]))
        yield from self._called(event)

    def _of_approval_answered(self, event: Facts) -> Iterator[BaseEvent]:
        self._waiting.discard((event["run_id"], event["call_id"]))
        yield from ()

    def _of_tool_finished(self, event: Facts) -> Iterator[BaseEvent]:
        run_id, result = event["run_id"], event["result"]
        self._busy.discard((run_id, event["call_id"]))
        self._waiting.discard((run_id, event["call_id"]))
        yield from self._called({**event, "arguments": {}})
        call_id = self._calls.pop((run_id, event["call_id"]))
        content = f"Error: {result['error']}" if result["error"] is not None else text_of(result["content"])
        yield ToolCallResultEvent(
            message_id=self._new_id(), tool_call_id=call_id, content=content, role="tool", **self._about(run_id)
        )

    def _of_events_skipped(self, event: Facts) -> Iterator[BaseEvent]:
        yield CustomEvent(name="events_skipped", value={"skipped": event["skipped"]})
        yield from self._missing(event["text"])

    def _of_run_finished(self, event: Facts) -> Iterator[BaseEvent]:
        result: dict[str, Any] = event["result"] or {}
        problem: dict[str, Any] = event["problem"] or {}
        content, usage = result.get("content"), _usage(result.get("usage"))
        if event["state"] == "finished" and isinstance(content, str):
            yield from self._missing(content)
        yield from self._all_closed()
        for run_id in reversed(self._below):
            yield SubagentErrorEvent(subagent_run_id=run_id, message=said_of("cancelled"), code="cancelled")
        if event["state"] == "finished":
            outcome = RunFinishedSuccessOutcome()
            yield RunFinishedEvent(**self._ids, result=content, outcome=outcome, usage=usage)
        elif event["state"] == "cancelled":
            yield RunFinishedEvent(**self._ids, outcome=RunFinishedCancelledOutcome(), usage=usage)
        else:
            said, code = problem.get("detail", said_of("error")), problem.get("reason", "error")
            yield RunErrorEvent(message=said, code=code, usage=usage)

    # ---- what they share

    def _new_id(self) -> str:
        self._number += 1
        # With the number of the stream: events of one before may not be kept, and then counting would begin too low.
        return f"{self._run_id}-{self._after}-{self._number}"

    def _reply(self, run_id: str) -> _Reply:
        if run_id not in self._replies:
            self._replies[run_id] = _Reply(self._new_id())
        return self._replies[run_id]

    def _below_id(self, run_id: str) -> str | None:
        return None if run_id == self._run_id else run_id

    def _about(self, run_id: str) -> dict[str, Any]:
        return {"subagent_run_id": self._below_id(run_id)}

    def _written(self, run_id: str, text: str) -> Iterator[BaseEvent]:
        reply = self._reply(run_id)
        if not text:
            return
        message: dict[str, Any] = {"message_id": reply.message_id, **self._about(run_id)}
        if not reply.has_text:
            yield from self._closed(run_id)
            reply.has_text = True
            yield TextMessageStartEvent(**message, role="assistant")
        reply.text += text
        yield TextMessageContentEvent(**message, delta=text)

    def _missing(self, text: str) -> Iterator[BaseEvent]:
        """The part of the run's text that the client has not seen; all of it, as a new message, if it is another."""
        shown = self._reply(self._run_id).text
        if text.strip() == shown.strip():
            return
        if not shown or not text.startswith(shown) or not self._reply(self._run_id).has_text:
            yield from self._closed(self._run_id)
            self._replies[self._run_id] = _Reply(self._new_id())
            shown = ""
        yield from self._written(self._run_id, text.removeprefix(shown))

    def _called(self, event: Facts) -> Iterator[BaseEvent]:
        """A call, unless the client knows it; its id is a new one where the model has used that before."""
        run_id, key = event["run_id"], (event["run_id"], event["call_id"])
        if key in self._calls:
            return
        yield from self._closed(run_id)
        call_id, number = event["call_id"], 1
        while call_id in self._used:
            number += 1
            call_id = f"{event['call_id']}~{number}"
        self._used.add(call_id)
        self._calls[key] = call_id
        call: dict[str, Any] = {"tool_call_id": call_id, **self._about(run_id)}
        parent = self._reply(run_id).message_id
        yield ToolCallStartEvent(**call, tool_call_name=event["tool_name"], parent_message_id=parent)
        yield ToolCallArgsEvent(**call, delta=encode(event["arguments"]).decode())
        yield ToolCallEndEvent(**call)

    def _closed(self, run_id: str) -> Iterator[BaseEvent]:
        """The ends of what a run's model has begun to say."""
        reply = self._replies.get(run_id)
        if reply is None:
            return
        below = self._about(run_id)
        if reply.has_thoughts:
            reply.has_thoughts = False
            yield ReasoningMessageEndEvent(message_id=f"{reply.message_id}-reasoning", **below)
            yield ReasoningEndEvent(message_id=f"{reply.message_id}-reasoning", **below)
        if reply.has_text:
            reply.has_text = False
            yield TextMessageEndEvent(message_id=reply.message_id, **below)

    def _all_closed(self) -> list[BaseEvent]:
        return [event for run_id in self._replies for event in self._closed(run_id)]


def _usage(usage: Mapping[str, Any] | None) -> list[TokenUsage] | None:
    if usage is None:
        return None
    names = ("input_tokens", "output_tokens", "reasoning_tokens", "cached_input_tokens", "cache_write_input_tokens")
    counts = {name: usage[name] for name in names}
    return [TokenUsage(**counts, total_tokens=usage["input_tokens"] + usage["output_tokens"])]
