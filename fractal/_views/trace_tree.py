"""The tree of a run of a trace: as `RunTree` shows a run that goes on, made of what a file has in it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from fractal._json import is_list, is_mapping, is_same, text_of
from fractal._texts import one_line
from fractal._views.tree import Part, Tree, brief, brief_reply
from fractal.tracing import TraceEvent
from fractal.tracing.counts import count_of
from fractal.tracing.spans import UNFINISHED, Span, Spans, Step, end_of_run

__all__ = ["TraceTree", "reply_in_brief"]

_DEEPEST = 100
"""Runs inside each other that are drawn so; what a file has further inside is left out."""


class TraceTree(Tree):
    """The tree of a run that a user began, and of all below it.

    Args:
        most: Events that are shown, the first ones, besides the ends of runs.

    Attributes:
        last: The time of its last event, in seconds since the epoch.
        left_out: Events that came after those that are shown.
    """

    def __init__(self, most: int) -> None:
        super().__init__()
        self.last = float("-inf")
        self._left, self.left_out = most, 0
        self._spans = Spans()
        self._parts: dict[Span, Part] = {}  # of the spans that go on
        self._depths: dict[Span, int] = {}  # of runs that go on
        self._arguments: dict[Span, object] = {}
        self._delegating: set[Span] = set()  # calls that are nothing but another agent's run

    def take(self, event: TraceEvent) -> None:
        """Enter an event."""
        self.last = max(self.last, event.timestamp)
        self._left -= 1
        if self._left < 0:
            self.left_out += 1
            if event.event_type != "agent_end":
                return
        if event.event_type == "agent_delegate":
            self._delegate(event)
        for step in self._spans.take(event):
            (self._begin if step.what == "begin" else self._end)(step)

    def finish(self) -> None:
        """End what goes on with the last event, as unfinished."""
        for part in self.walk():
            part.end(self.last, UNFINISHED)

    def _delegate(self, event: TraceEvent) -> None:
        # A tool of the user's may ask another agent among other things; one that hands on what it was given is the run.
        call = self._spans.call_of(event)
        if call is None or not is_mapping(event.arguments):
            return
        given, query = self._arguments.get(call), event.arguments.get("query")
        if is_same(given, query) or is_same(given, {"query": query}):
            self._delegating.add(call)

    def _begin(self, step: Step) -> None:
        span, event = step.span, step.event
        if event is None or span.kind not in ("run", "try", "tool"):
            return
        above = self._parts.get(span.parent) if span.parent is not None else None
        if span.kind == "run":
            self._begin_run(span, event, above)
        elif above is not None:
            self._parts[span] = part = _part_of(span)
            above.parts.append(part)
            if span.kind == "tool":
                part.detail, self._arguments[span] = brief(event.arguments or {}), event.arguments
            elif span.attempts > 1:
                part.detail = f"try {span.attempts}"

    def _begin_run(self, span: Span, event: TraceEvent, above: Part | None) -> None:
        over = span.parent if span.parent is None or span.parent.kind == "run" else span.parent.parent
        depth = self._depths.get(over, 0) + 1 if over is not None else 0
        self._depths[span] = depth
        if depth >= _DEEPEST:
            return
        if above is not None and span.parent in self._delegating:
            # The call that delegates and the run it starts are one thing to whoever looks.
            part = above
            part.kind, part.label, part.agent = "run", one_line(span.agent), span.agent
        else:
            part = _part_of(span)
            (above.parts if above is not None else self.roots).append(part)
        said = event.arguments.get("user_input") if is_mapping(event.arguments) else None
        part.detail = one_line(text_of(said or ""))
        self._parts[span] = part

    def _end(self, step: Step) -> None:
        span, event, part = step.span, step.event, self._parts.pop(step.span, None)
        self._depths.pop(span, None)
        self._arguments.pop(span, None)
        if part is None:
            return
        if span.kind == "run":
            self._end_run(part, span, event)
            return
        if part.kind == "run":  # a run tells its own end
            self._delegating.discard(span)
            return
        if span.kind == "try" and event is not None and event.event_type == "model_response":
            part.detail = reply_in_brief(event)
            part.tokens = count_of(event.metadata.get("input_tokens")), count_of(event.metadata.get("output_tokens"))
        elif span.outcome == "error" and span.error is not None:
            part.detail = one_line(span.error)
        part.end(span.end or span.begin, span.outcome)

    def _end_run(self, part: Part, span: Span, event: TraceEvent | None) -> None:
        outcome = span.outcome
        if event is not None and event.event_type == "agent_end":
            if outcome == "error":
                outcome = one_line(end_of_run(event).reason, 40)
            used = event.metadata.get("usage")
            usage: Mapping[str, Any] = used if is_mapping(used) else {}
            part.requests = count_of(usage.get("requests"))
            part.tokens = count_of(usage.get("input_tokens")), count_of(usage.get("output_tokens"))
        part.end(span.end or span.begin, outcome)


def _part_of(span: Span) -> Part:
    return Part(
        kind="run" if span.kind == "run" else "tool" if span.kind == "tool" else "model",
        label=one_line("model" if span.kind == "try" else span.name),
        agent=span.agent,
        started=span.begin,
        requests=1 if span.kind == "try" else None,
    )


def reply_in_brief(event: TraceEvent) -> str:
    """A model's message in one line, whatever a file has in its place."""
    message = event.result
    if not is_mapping(message):
        return one_line(text_of(message))
    calls = message.get("tool_calls")
    functions = [call.get("function") for call in (calls if is_list(calls) else ()) if is_mapping(call)]
    names = [text_of(each.get("name")) for each in functions if is_mapping(each)]
    return brief_reply(
        {
            "content": text_of(message.get("content") or message.get("refusal") or ""),
            "tool_calls": [{"function": {"name": name}} for name in names],
        }
    )
