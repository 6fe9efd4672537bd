"""Served runs as clients see them: the bodies of answers, and what the OpenAPI document says of these."""

from __future__ import annotations

import functools
from typing import Any

from pydantic import BaseModel, Field

from fractal._json import encode
from fractal.serving.record import RunRecord
from fractal.serving.wire import RunOutcome, RunState, event_schema

__all__ = ["PROBLEM_RESPONSES", "Health", "ProblemView", "RunPage", "RunView", "ToolView", "event_stream", "run_json"]


class RunView(BaseModel):
    """A run: its state, what is written so far, the calls that wait for approval, and how it ended."""

    id: str
    agent: str
    state: RunState
    created_at: float = Field(description="Seconds since the epoch.")
    ended_at: float | None
    text: str = Field(description="What the model has written of the reply that it is writing, or wrote last.")
    pending: list[dict[str, Any]] = Field(description="Calls that wait for approval, as the events tell of them.")
    problem: dict[str, Any] | None = Field(description="Why there is no answer.")
    result: RunOutcome | None = Field(description="How it ended; null before that, and if it never began.")


class RunPage(BaseModel):
    """Runs, the newest first."""

    runs: list[RunView] = Field(description="Without their texts and results.")
    next: str | None = Field(description="What to give as `before` to see older ones; null at the end.")


class ToolView(BaseModel):
    """The result of a tool call."""

    content: Any
    outcome: str
    elapsed: float


class Health(BaseModel):
    """The state of the service."""

    status: str
    agents: list[str]


class ProblemView(BaseModel):
    """Problem details, RFC 9457."""

    type: str
    title: str
    status: int
    detail: str
    reason: str
    retry_after: float | None = None
    run_id: str | None = None
    errors: list[dict[str, Any]] | None = None


def run_json(record: RunRecord, *, brief: bool = False) -> bytes:
    """The JSON of a `RunView`.

    Args:
        record: What is known of the run.
        brief: Whether to leave out its text and its result.
    """
    names = ("id", "agent", "state", "created_at", "ended_at", "text", "problem")
    facts = {name: getattr(record, name) for name in names}
    if brief:
        facts["text"] = ""
    head = encode({**facts, "pending": list(record.pending)})
    result = b"null" if brief or record.result_json is None else record.result_json
    return head[:-1] + b',"result":' + result + b"}"


_PROBLEM = {"description": "Problem details", "model": ProblemView}

PROBLEM_RESPONSES: dict[int | str, dict[str, Any]] = {"4XX": _PROBLEM, "5XX": _PROBLEM}
"""What the OpenAPI document says of answers that tell of problems."""


@functools.cache
def event_stream() -> dict[int | str, dict[str, Any]]:
    """The OpenAPI description of a stream."""
    data = {"type": "string", "contentMediaType": "application/json", "contentSchema": event_schema()}
    facts = {"event": {"type": "string"}, "id": {"type": "string"}, "data": data}
    item = {"type": "object", "properties": facts, "required": ["data"]}
    content = {"text/event-stream": {"itemSchema": item}}
    return {200: {"description": "The run's events, as they come", "content": content}}
