"""What a sequence of events must be, whatever happens to the run that tells it; and streams written word for word."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

from fractal import (
    AgentResult,
    Event,
    ModelRequested,
    ReasoningDelta,
    RetryScheduled,
    RunFinished,
    RunStarted,
    TextDelta,
    ToolCallDelta,
    ToolFinished,
    ToolStarted,
)
from fractal.events import DelegationFinished, DelegationStarted, ModelResponded
from fractal.testing import answers
from fractal.testing.answers import Answer


class Watch(list[Event]):
    """An observer that keeps what it is told."""

    def __call__(self, event: Event) -> None:
        self.append(event)

    @property
    def kinds(self) -> list[str]:
        return [event.kind for event in self]

    def results(self, agent_name: str) -> list[AgentResult]:
        return [event.result for event in self if isinstance(event, RunFinished) and event.agent_name == agent_name]


def text_of(events: Sequence[Event], agent_name: str) -> str:
    return "".join(event.text for event in events if isinstance(event, TextDelta) and event.agent_name == agent_name)


def assert_well_formed(events: Sequence[Event]) -> None:
    """One tree of runs: each thing that starts ends once, inside what it is a part of, and nothing comes after."""
    tree = _Tree()
    for event in events:
        tree.see(event)
    assert not tree.parts, "what has started has ended"
    assert tree.ended == set(tree.starts)


class _Tree:
    def __init__(self) -> None:
        self.starts: dict[str, RunStarted] = {}
        self.ended: set[str] = set()
        self.parts: dict[tuple[str, ...], str] = {}  # what is open, with the run that it is a part of
        self.asking: set[str] = set()

    def see(self, event: Event) -> None:
        match event:
            case RunStarted():
                self._start_run(event)
            case ToolStarted() | DelegationStarted():
                assert _key(event) not in self.parts, "what has started does not start again"
                self.parts[_key(event)] = event.run_id
            case ToolFinished() | DelegationFinished():
                self._end_call(event)
            case RunFinished():
                self._end_run(event)
            case _:
                self._see_request(event)
        start = self.starts[event.run_id]
        assert (event.parent_id, event.depth, event.agent_name) == (start.parent_id, start.depth, start.agent_name)
        assert isinstance(event, RunFinished) or event.run_id not in self.ended, f"{event.kind} after its run's end"

    def _start_run(self, event: RunStarted) -> None:
        assert event.run_id not in self.starts, "a run starts once"
        if event.parent_id is None:
            assert (self.starts, event.depth) == ({}, 0), "one run is above all others"
        else:
            assert event.parent_id in self.starts.keys() - self.ended, "a child starts while its parent runs"
            assert event.depth == self.starts[event.parent_id].depth + 1
            assert event.call_id is None or ("tool", event.parent_id, event.call_id) in self.parts
            self.parts["run", event.run_id] = event.parent_id
        self.starts[event.run_id] = event

    def _end_run(self, event: RunFinished) -> None:
        self.parts.pop(("run", event.run_id), None)
        assert event.run_id not in self.parts.values(), f"{event.agent_name} ends last of all that is in it"
        assert event.run_id not in self.ended, "a run ends once"
        assert event.result.run_id == event.run_id
        self.ended.add(event.run_id)

    def _end_call(self, event: ToolFinished | DelegationFinished) -> None:
        assert self.parts.pop(_key(event), None) == event.run_id, "what ends has started, and not ended"
        for child in self.starts.values():
            if child.parent_id == event.run_id and child.call_id == event.call_id:
                assert child.run_id in self.ended, "a child ends before the call that began it"

    def _see_request(self, event: Event) -> None:
        match event:
            case ModelRequested():
                self.asking.add(event.run_id)
            case TextDelta() | ReasoningDelta() | ToolCallDelta():
                assert event.run_id in self.asking, "pieces come while the model is asked"
            case ModelResponded() | RetryScheduled():
                assert event.run_id in self.asking
                self.asking.remove(event.run_id)
            case _:
                pass


def _key(event: ToolStarted | ToolFinished | DelegationStarted | DelegationFinished) -> tuple[str, ...]:
    return event.kind.partition("_")[0], event.run_id, str(event.call_id)


# ---- streams, word for word


def delta(text: str | None = None, finish: str | None = None, **more: Any) -> dict[str, Any]:
    """A chunk with a piece of text."""
    said = {} if text is None else {"content": text}
    return {"choices": [{"index": 0, "delta": said | more, "finish_reason": finish}]}


def call_delta(index: int | None, call_id: str | None, name: str | None, arguments: str) -> dict[str, Any]:
    """A chunk with a piece of a tool call; None leaves a field out."""
    call: dict[str, Any] = {"function": {"arguments": arguments} | ({"name": name} if name is not None else {})}
    if index is not None:
        call["index"] = index
    if call_id is not None:
        call["id"] = call_id
    return delta(tool_calls=[call])


def sse_bytes(*chunks: dict[str, Any] | str, newline: str = "\n") -> bytes:
    said = [chunk if isinstance(chunk, str) else f"data: {json.dumps(chunk)}" for chunk in chunks]
    return "".join(line + newline * 2 for line in said).encode()


def sse(*chunks: dict[str, Any] | str, newline: str = "\n", done: bool = True) -> Answer:
    """An answer that streams these chunks and lines."""
    end = ("data: [DONE]",) if done else ()
    return answers.raw(sse_bytes(*chunks, *end, newline=newline), content_type="text/event-stream")
