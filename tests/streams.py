"""What a sequence of events must be, whatever happens to the run that tells it; and streams written word for word."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from typing import Any

from fractal import Event, TextDelta
from fractal.testing import EventRecorder as Watch, answers
from fractal.testing.answers import Answer

__all__ = ["Watch", "assert_well_formed", "call_delta", "delta", "sse", "sse_bytes", "text_of"]


def text_of(events: Sequence[Event], agent_name: str) -> str:
    return "".join(event.text for event in events if isinstance(event, TextDelta) and event.agent_name == agent_name)


def assert_well_formed(events: Iterable[Event]) -> None:
    """One tree of runs: each thing that starts ends once, inside what it is a part of, and nothing comes after."""
    recorder = Watch()
    for event in events:
        recorder(event)
    recorder.assert_well_formed()
    assert [event.depth for event in recorder if event.kind == "run_started"].count(0) == 1


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
