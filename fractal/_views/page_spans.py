"""One run of a trace for the page: its spans with what was said in each of them."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from itertools import islice
from typing import Any, Literal

from fractal._json import is_list, is_mapping, text_of
from fractal._texts import one_line
from fractal.tracing import TraceEvent
from fractal.tracing.counts import count_of, number_of
from fractal.tracing.spans import UNFINISHED, Span, Spans, Step, end_of_run, run_of

__all__ = ["PageSpan", "RunSpans"]

LONGEST_TEXT = 200_000
"""Characters of one text in a page; a `TracingKit` cuts at a tenth of that."""

_LONGEST_LABEL = 160

_MOST_MARKS = 2000
"""Warnings, limits and the like that one run shows."""

_MOST_OPEN = 100_000
"""Spans that are open at once, of which there are no more than events in a page."""

Kind = Literal["run", "model", "tool", "wait"]

Message = list[Any]
"""A message of a conversation: its role, its text, and the calls it asks for, each a name and arguments."""


@dataclass(slots=True, kw_only=True, eq=False)
class PageSpan:
    """A part of a run that took time, as the page shows it.

    Attributes:
        kind: A run of an agent, a try of a request to the model, a tool call, or a wait: for a try or for approval.
        name: Name of the agent, of the model or of the tool.
        agent: Name of the agent it belongs to.
        parent: Position of the span that it is in, among the spans of the run; -1 for none.
        start: Seconds since the epoch.
        end: Seconds since the epoch; None if its end is not in the trace.
        outcome: How it ended, as for a tool call.
        label: What it was about, in one line.
        group: The same for all calls of one reply, or empty.
        input_tokens: Prompt tokens, for a request.
        output_tokens: Completion tokens, for a request.
        cost: What the reply cost, or None.
        detail: What was said, as texts, and further facts.
    """

    kind: Kind
    name: str
    agent: str
    parent: int
    start: float
    end: float | None = None
    outcome: str = UNFINISHED
    label: str = ""
    group: str = ""
    input_tokens: int = 0
    output_tokens: int = 0
    cost: float | None = None
    detail: dict[str, Any] = field(default_factory=dict[str, Any])


@dataclass(slots=True, eq=False)
class _Talk:
    """What was said in a run.

    Attributes:
        span: Position of its span; -1 if there was no room for that.
        said: Messages; a number for what is said in that span.
        openings: What stood before it, each time that changed.
        tools: The tools on offer, likewise.
        asked: The calls of the last reply, in their order.
        results: Of these: which, and its span.
    """

    span: int
    said: list[Message | int] = field(default_factory=list["Message | int"])
    openings: list[list[Message]] = field(default_factory=list[list[Message]])
    tools: list[list[str]] = field(default_factory=list[list[str]])
    asked: dict[str, int] = field(default_factory=dict[str, int])
    results: list[tuple[int, int]] = field(default_factory=list[tuple[int, int]])

    def settle(self) -> None:
        """Move the results of tools into the conversation, in the order of the calls."""
        self.said += [span for _, span in sorted(self.results)]
        self.results.clear()


class RunSpans:
    """The spans of a run that a user began, and of all below it.

    Attributes:
        spans: All of them; those above come first.
        marks: Moments: seconds since the epoch, the kind, a text, and the span it belongs to.
        first: The time of the first event.
        last: The time of the last one.
        size: Characters of all texts.
        is_full: Set from outside: no further span is begun, but those that go on get their ends.
        is_long: Set from outside: further texts are left out.
        left_out: Spans that are not shown because of that.
        limits: What the run that the user began may use, by name.
    """

    def __init__(self) -> None:
        self.spans: list[PageSpan] = []
        self.marks: list[tuple[float, str, str, int]] = []
        self.first, self.last = float("inf"), float("-inf")
        self.size = self.left_out = 0
        self.is_full = self.is_long = False
        self.limits: dict[str, float] = {}
        self._steps = Spans(_MOST_OPEN)
        self._open: dict[Span, int] = {}  # positions
        self._talks: dict[str, _Talk] = {}
        self._former: list[_Talk] = []  # of runs that have begun again

    def take(self, event: TraceEvent) -> None:
        """Enter an event."""
        self.first, self.last = min(self.first, event.timestamp), max(self.last, event.timestamp)
        call = self._steps.call_of(event) if event.event_type == "error" else None
        for step in self._steps.take(event):
            (self._begin if step.what == "begin" else self._end)(step)
        if (said := _MARKS.get(event.event_type)) is not None:
            self._mark(event, said(event), call)

    def settle(self) -> None:
        """Put each run's conversation into the details of its span."""
        for talk in (*self._former, *self._talks.values()):
            talk.settle()
            if talk.span >= 0:
                detail = {"talk": talk.said, "openings": talk.openings, "tools": talk.tools}
                self.spans[talk.span].detail |= detail

    def _mark(self, event: TraceEvent, text: str, call: Span | None) -> None:
        if len(self.marks) < _MOST_MARKS:
            talk = self._talks.get(run_of(event)[0])
            where = talk.span if talk is not None else -1
            where = self._open.get(call, where) if call is not None else where
            self.marks.append((event.timestamp, event.event_type, self._said(text[: 2 * _LONGEST_LABEL]), where))

    # ---- beginnings

    def _begin(self, step: Step) -> None:
        span, event = step.span, step.event
        assert event is not None
        if span.kind == "chat":  # its tries are shown
            return
        at = self._enter(span, event)
        match span.kind:
            case "run":
                self._begin_run(at, span, event)
            case "try":
                self._begin_try(at, span, event)
            case "tool" if at >= 0:
                self.spans[at].detail["call"] = span.call
            case "wait" if at >= 0 and event.event_type == "retry":
                self.spans[at].detail["facts"] = self._facts(event, ("wait", "attempt"))
            case _:
                pass

    def _enter(self, span: Span, event: TraceEvent) -> int:
        """Show a span; gives its position, -1 if there is no room for it."""
        if self.is_full:
            self.left_out += 1
            return -1
        parent = self._open.get(span.parent, -1) if span.parent is not None else -1
        kind = _KINDS[span.kind]
        name = one_line(span.name) or "model" if kind == "model" else span.name
        shown = PageSpan(kind=kind, name=name, agent=span.agent, parent=parent, start=span.begin, group=span.group)
        if event.arguments is not None and kind != "run":
            shown.label = _brief(event.arguments)
            shown.detail["arguments"] = self._said(event.arguments)
        self.spans.append(shown)
        self._open[span] = len(self.spans) - 1
        self.first = min(self.first, span.begin)
        return len(self.spans) - 1

    def _begin_run(self, at: int, span: Span, event: TraceEvent) -> None:
        if (former := self._talks.get(span.run)) is not None:
            self._former.append(former)
        talk = self._talks[span.run] = _Talk(at)
        if not span.has_beginning:
            if at >= 0:
                self.spans[at].detail["facts"] = [["beginning", "not in the trace"]]
            return
        history, given = event.metadata.get("history"), event.arguments
        said = given.get("user_input") if is_mapping(given) else None
        talk.said += [self._message(each) for each in (history if is_list(history) else ())]
        talk.said.append(self._message({"role": "user", "content": said}))
        if at >= 0:
            shown = self.spans[at]
            shown.label = one_line(_content(said), _LONGEST_LABEL)
            shown.detail["facts"] = self._facts(event, ("timeout", "limits"))
            if shown.parent < 0:
                self._note_limits(event.metadata)

    def _note_limits(self, facts: Mapping[str, Any]) -> None:
        given = facts.get("limits")
        named = {**(given if is_mapping(given) else {}), "timeout": facts.get("timeout")}
        for name in ("max_cost", "max_tokens", "max_requests", "max_tool_calls", "timeout"):
            if (value := number_of(named.get(name))) is not None:
                self.limits[name] = value

    def _begin_try(self, at: int, span: Span, event: TraceEvent) -> None:
        if not span.has_beginning:
            return
        talk, facts = self._talks[span.run], event.metadata
        talk.settle()
        if is_list(opening := facts.get("opening")):
            talk.openings.append([self._message(each) for each in opening])
        if is_list(tools := facts.get("tools")):
            talk.tools.append([one_line(text_of(each)) for each in tools])
        added = facts.get("added")
        talk.said += [self._message(each) for each in (added if is_list(added) else ())]
        if at < 0:
            return
        sees: dict[str, Any] = {"upto": len(talk.said), "opening": len(talk.openings) - 1, "tools": len(talk.tools) - 1}
        if is_list(kept := facts.get("kept")):
            sees["kept"] = [position for position in kept if type(position) is int]
        shown = self.spans[at]
        shown.detail = {"sees": sees, "facts": self._facts(event, ("iteration", "attempt", "messages"))}
        if count_of(facts.get("attempt")) > 1:
            shown.label = f"try {facts['attempt']}"

    # ---- ends

    def _end(self, step: Step) -> None:
        span, event, at = step.span, step.event, self._open.pop(step.span, -1)
        if at >= 0:
            self.spans[at].end, self.spans[at].outcome = span.end, span.outcome
        match span.kind, event.event_type if event is not None else "":
            case "run", "agent_end":
                self._end_run(at, step)
            case "try", "model_response":
                self._end_try(at, step)
            case "try", "retry" if at >= 0:
                error = self._said(span.error or "")
                self.spans[at].label, self.spans[at].detail["error"] = one_line(error, _LONGEST_LABEL), error
            case "tool", "tool_result" if at >= 0:
                self._end_call(at, step)
            case "wait", "approval_answer" if at >= 0 and event is not None:
                self.spans[at].detail["facts"] = self._facts(event, ("is_allowed", "reason"))
            case _:
                pass

    def _end_run(self, at: int, step: Step) -> None:
        event = step.event
        if at < 0 or event is None:
            return
        shown = self.spans[at]
        shown.detail["reason"] = one_line(end_of_run(event).reason, 40)
        shown.detail.setdefault("facts", []).extend(self._facts(event, ("iterations", "error_type", "usage")))
        self._say_end(shown, event)

    def _end_try(self, at: int, step: Step) -> None:
        event, talk = step.event, self._talks[step.span.run]
        assert event is not None
        facts, reply = event.metadata, self._message(event.result, "assistant")
        talk.settle()
        talk.asked = {call_id: order for order, (_, _, call_id) in enumerate(reply[2])}
        talk.said.append(at if at >= 0 else reply)
        if at < 0:
            return
        last = self.spans[at]
        last.label = _brief_reply(reply)
        last.input_tokens, last.output_tokens = (count_of(facts.get(f"{half}_tokens")) for half in ("input", "output"))
        last.cost = number_of(facts.get("cost"))
        last.detail["reply"] = reply
        names = ("finish_reason", "model", "response_id", "first_piece")
        counts = ("input_tokens", "output_tokens", "cached_input_tokens", "cache_write_input_tokens")
        last.detail.setdefault("facts", []).extend(self._facts(event, (*names, *counts, "reasoning_tokens", "cost")))

    def _end_call(self, at: int, step: Step) -> None:
        event, call, talk = step.event, step.span.call, self._talks[step.span.run]
        assert event is not None
        last = self.spans[at]
        last.group = step.span.group
        self._say_end(last, event)
        if event.error is not None:
            last.label = one_line(event.error, _LONGEST_LABEL)
        if call in talk.asked:
            talk.results.append((talk.asked[call], at))

    # ---- texts

    def _say_end(self, span: PageSpan, event: TraceEvent) -> None:
        if event.result is not None:
            span.detail["result"] = self._said(event.result)
        if event.error is not None:
            span.detail["error"] = self._said(event.error)

    def _facts(self, event: TraceEvent, names: tuple[str, ...]) -> list[list[str]]:
        given = ((name, event.metadata.get(name)) for name in names)
        return [[name, self._said(_in_short(value))] for name, value in given if value is not None]

    def _message(self, value: object, role: str = "user") -> Message:
        if not is_mapping(value):
            return [role, self._said(value), []]
        calls = value.get("tool_calls")
        text = value.get("content")
        if text is None:
            text = value.get("refusal") or ""
        return [
            one_line(text_of(value.get("role") or role), 40),
            self._said(_content(text)),
            [self._call(each) for each in islice(calls if is_list(calls) else (), 1000)],
        ]

    def _call(self, call: object) -> list[str]:
        function = call.get("function") if is_mapping(call) else None
        given: Mapping[str, Any] = function if is_mapping(function) else {}
        call_id = call.get("id") if is_mapping(call) else None
        return [one_line(text_of(given.get("name") or "?")), self._said(given.get("arguments") or ""), text_of(call_id)]

    def _said(self, value: object) -> str:
        """The text of a value, bounded."""
        text = value if isinstance(value, str) else _pretty(value)
        if self.is_long and len(text) > _LONGEST_LABEL:
            text = f"{text[:_LONGEST_LABEL]}… [the rest is left out: there is too much text for one page]"
        elif len(text) > LONGEST_TEXT:
            text = f"{text[:LONGEST_TEXT]}… [cut: {len(text) - LONGEST_TEXT} more characters]"
        self.size += len(text)
        return text


def _pretty(value: object) -> str:
    if not (is_mapping(value) or is_list(value)):
        return text_of(value)
    try:
        return json.dumps(value, indent=2, ensure_ascii=False)
    except (TypeError, ValueError, RecursionError):
        return text_of(value)


def _in_short(value: object) -> object:
    """Names and values of an object in one line, without zeros and nulls; other values as they are."""
    if not is_mapping(value):
        return value
    return ", ".join(f"{name} {text_of(each)}" for name, each in value.items() if each not in (0, None))


def _content(content: object) -> str:
    """The text of a message's content, of parts too; what is no text as JSON."""
    if not is_list(content):
        return text_of(content if content is not None else "")
    texts = (part.get("text") if is_mapping(part) else part for part in content)
    return "\n".join(
        text if isinstance(text, str) else text_of(part) for text, part in zip(texts, content, strict=True)
    )


def _brief(arguments: object) -> str:
    values = islice(arguments.values(), 10) if is_mapping(arguments) else [arguments]
    return one_line(", ".join(one_line(text_of(value), 60) for value in values), _LONGEST_LABEL)


def _brief_reply(reply: Message) -> str:
    names = [name for name, _, _ in reply[2]]
    if not names:
        return one_line(reply[1], _LONGEST_LABEL)
    counted = (f"{name} ×{names.count(name)}" if names.count(name) > 1 else name for name in dict.fromkeys(names[:50]))
    return one_line(f"calls {', '.join(counted)}", _LONGEST_LABEL)


def _of_metadata(*names: str) -> Callable[[TraceEvent], str]:
    return lambda event: text_of(next((value for name in names if (value := event.metadata.get(name))), ""))


_KINDS: dict[str, Kind] = {"run": "run", "try": "model", "wait": "wait", "tool": "tool"}

_MARKS: dict[str, Callable[[TraceEvent], str]] = {
    "error": lambda event: event.error or "",
    "limit": _of_metadata("message", "limit"),
    "warning": _of_metadata("message"),
    "retry": lambda event: text_of(event.metadata.get("message") or event.error or ""),
}
"""What the page marks the moment of, and the text of the mark."""
