"""One run of a trace for the page: the spans that its events make, and what was said in each of them."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from itertools import islice
from typing import Any, Literal, get_args

from fractal._json import is_list, is_mapping, text_of
from fractal._texts import one_line
from fractal.results import Outcome
from fractal.tracing import TraceEvent
from fractal.tracing.events import run_of

__all__ = ["RunSpans", "Span", "count_of", "end_of_run", "number_of"]

LONGEST_TEXT = 200_000
"""Characters of one text in a page; a `TracingKit` cuts at a tenth of that."""

_LONGEST_LABEL = 160

_MOST_MARKS = 2000
"""Warnings, limits and the like that one run shows."""

UNFINISHED = "unfinished"
"""The outcome of a span whose end is not in the trace."""

_OUTCOMES = frozenset(get_args(Outcome))
_CUT = {"deadline": "timeout", "cancelled": "cancelled"}

Kind = Literal["run", "model", "tool", "wait"]

Message = list[Any]
"""A message of a conversation: its role, its text, and the calls it asks for, each a name and arguments."""


@dataclass(slots=True, kw_only=True, eq=False)
class Span:
    """A part of a run that took time.

    Attributes:
        kind: A run of an agent, a request to the model, a tool call, or a wait: for a retry or for approval.
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

    def close(self, at: float, outcome: str) -> None:
        """End the span; only the first end counts."""
        if self.end is None:
            self.end, self.outcome = max(at, self.start), outcome


@dataclass(slots=True, eq=False)
class _Run:
    """State of a run while its events are read: positions of spans, and its conversation."""

    span: int
    talk: list[Message | int] = field(default_factory=list["Message | int"])  # a number: what is said in that span
    openings: list[list[Message]] = field(default_factory=list[list[Message]])
    tools: list[list[str]] = field(default_factory=list[list[str]])
    model: int = -1
    wait: int = -1
    calls: dict[str, int] = field(default_factory=dict[str, int])
    approvals: dict[str, int] = field(default_factory=dict[str, int])
    asked: dict[str, int] = field(default_factory=dict[str, int])  # the calls of the last reply, in their order
    results: list[tuple[int, int]] = field(default_factory=list[tuple[int, int]])  # of these: which, and the span

    def settle(self) -> None:
        """Move the results of tools into the conversation, in the order of the calls."""
        self.talk += [span for _, span in sorted(self.results)]
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
        left_out: Events that no span was made of because of that.
        limits: What the run that the user began may use, by name.
    """

    def __init__(self) -> None:
        self.spans: list[Span] = []
        self.marks: list[tuple[float, str, str, int]] = []
        self.first, self.last = float("inf"), float("-inf")
        self.size = self.left_out = 0
        self.is_full = self.is_long = False
        self.limits: dict[str, float] = {}
        self._runs: dict[str, _Run] = {}

    def take(self, event: TraceEvent) -> None:
        """Enter an event."""
        self.first, self.last = min(self.first, event.timestamp), max(self.last, event.timestamp)
        take = getattr(self, f"_{event.event_type}", None)
        if take is None:
            return
        run_id, above = run_of(event)
        run = self._runs.get(run_id)
        if run is None or event.event_type == "agent_start":
            run = self._begin(event, run_id, above)
        take(run, event)

    def settle(self) -> None:
        """Put each run's conversation into the details of its span."""
        for run in self._runs.values():
            run.settle()
            if run.span >= 0:
                self.spans[run.span].detail |= {"talk": run.talk, "openings": run.openings, "tools": run.tools}

    # ---- runs

    def _begin(self, event: TraceEvent, run_id: str, above: str | None) -> _Run:
        over = self._runs.get(above or "")
        parent = -1
        if over is not None and above != run_id:
            parent = over.calls.get(text_of(event.metadata.get("call")), over.span)
        run = self._runs[run_id] = _Run(self._open("run", event.agent_name, event, parent))
        if run.span >= 0 and event.event_type != "agent_start":
            self.spans[run.span].detail["facts"] = [["beginning", "not in the trace"]]
        return run

    def _agent_start(self, run: _Run, event: TraceEvent) -> None:
        history, given = event.metadata.get("history"), event.arguments
        said = given.get("user_input") if is_mapping(given) else None
        run.talk += [self._message(each) for each in (history if is_list(history) else ())]
        run.talk.append(self._message({"role": "user", "content": said}))
        if run.span >= 0:
            span = self.spans[run.span]
            span.label = one_line(_content(said), _LONGEST_LABEL)
            span.detail["facts"] = self._facts(event, ("timeout", "limits"))
            if span.parent < 0:
                self._note_limits(event.metadata)

    def _note_limits(self, facts: Mapping[str, Any]) -> None:
        given = facts.get("limits")
        named = {**(given if is_mapping(given) else {}), "timeout": facts.get("timeout")}
        for name in ("max_cost", "max_tokens", "max_requests", "max_tool_calls", "timeout"):
            if (value := number_of(named.get(name))) is not None:
                self.limits[name] = value

    def _agent_end(self, run: _Run, event: TraceEvent) -> None:
        outcome, reason = end_of_run(event)
        cut = "error" if outcome == "ok" else outcome
        for part in (run.model, run.wait, *run.calls.values(), *run.approvals.values()):
            if part >= 0 and not self._goes_on(event, part):
                self.spans[part].close(event.timestamp, cut)
        if run.span < 0:
            return
        span = self.spans[run.span]
        span.close(event.timestamp, outcome)
        span.detail["reason"] = reason
        span.detail.setdefault("facts", []).extend(self._facts(event, ("iterations", "error_type", "usage")))
        self._say_end(span, event)

    def _goes_on(self, event: TraceEvent, part: int) -> bool:
        """Whether a call could not be stopped, and its end may come yet."""
        abandoned = event.metadata.get("abandoned")
        return self.spans[part].detail.get("call") in (abandoned if is_list(abandoned) else ())

    # ---- requests

    def _model_request(self, run: _Run, event: TraceEvent) -> None:
        run.settle()
        facts = event.metadata
        if is_list(opening := facts.get("opening")):
            run.openings.append([self._message(each) for each in opening])
        if is_list(tools := facts.get("tools")):
            run.tools.append([one_line(text_of(each)) for each in tools])
        added = facts.get("added")
        run.talk += [self._message(each) for each in (added if is_list(added) else ())]
        self._close(run.wait, event, "ok")
        self._close(run.model, event, "error")
        run.model = self._open("model", one_line(text_of(facts.get("model") or "model")), event, run.span)
        if run.model < 0:
            return
        kept = facts.get("kept")
        sees: dict[str, Any] = {"upto": len(run.talk), "opening": len(run.openings) - 1, "tools": len(run.tools) - 1}
        if is_list(kept):
            sees["kept"] = [position for position in kept if type(position) is int]
        span = self.spans[run.model]
        span.detail = {"sees": sees, "facts": self._facts(event, ("iteration", "attempt", "messages"))}
        if count_of(facts.get("attempt")) > 1:
            span.label = f"try {facts['attempt']}"

    def _model_response(self, run: _Run, event: TraceEvent) -> None:
        facts, reply = event.metadata, self._message(event.result, "assistant")
        run.settle()
        run.asked = {call_id: at for at, (_, _, call_id) in enumerate(reply[2])}
        span = self._ended(run.model, event, "ok", "model", one_line(text_of(facts.get("model") or "model")), run.span)
        run.model = -1
        if span is None:
            run.talk.append(reply)
            return
        at, last = span
        last.label = _brief_reply(reply)
        last.input_tokens, last.output_tokens = (count_of(facts.get(f"{half}_tokens")) for half in ("input", "output"))
        last.cost = number_of(facts.get("cost"))
        last.detail["reply"] = reply
        names = ("finish_reason", "model", "response_id", "first_piece")
        counts = ("input_tokens", "output_tokens", "cached_input_tokens", "cache_write_input_tokens")
        last.detail.setdefault("facts", []).extend(self._facts(event, (*names, *counts, "reasoning_tokens", "cost")))
        run.talk.append(at)

    def _retry(self, run: _Run, event: TraceEvent) -> None:
        why = self._said(event.metadata.get("message") or event.error or "")
        span = self._ended(run.model, event, "error", "model", "model", run.span)
        run.model = -1
        if span is not None:
            span[1].label, span[1].detail["error"] = one_line(why, _LONGEST_LABEL), why
        self._mark(run, event, "retry", why)
        run.wait = self._open("wait", "before the next try", event, run.span)
        if run.wait >= 0:
            self.spans[run.wait].detail["facts"] = self._facts(event, ("wait", "attempt"))

    # ---- tools

    def _tool_call(self, run: _Run, event: TraceEvent) -> None:
        name = event.tool_name or "tool"
        call = event.tool_call_id or name
        at = run.calls[call] = self._open("tool", name, event, run.span)
        if at >= 0:
            self.spans[at].detail["call"] = call

    def _tool_result(self, run: _Run, event: TraceEvent) -> None:
        name = event.tool_name or "tool"
        call = event.tool_call_id or name
        outcome = event.metadata.get("outcome")
        if not (isinstance(outcome, str) and outcome in _OUTCOMES):
            outcome = "ok" if event.error is None else "error"
        span = self._ended(run.calls.pop(call, -1), event, outcome, "tool", name, run.span)
        if span is None:
            return
        at, last = span
        last.group = last.group or event.parallel_group_id or ""
        last.detail["call"] = call
        self._say_end(last, event)
        if event.error is not None:
            last.label = one_line(event.error, _LONGEST_LABEL)
        if call in run.asked:
            run.results.append((run.asked[call], at))

    def _approval_request(self, run: _Run, event: TraceEvent) -> None:
        call = event.tool_call_id or ""
        run.approvals[call] = self._open("wait", f"approval of {event.tool_name or 'a call'}", event, run.span)

    def _approval_answer(self, run: _Run, event: TraceEvent) -> None:
        given = event.metadata.get("is_allowed") is True
        at = run.approvals.pop(event.tool_call_id or "", -1)
        self._close(at, event, "ok" if given else "denied")
        if at >= 0:
            self.spans[at].detail["facts"] = self._facts(event, ("is_allowed", "reason"))

    # ---- moments

    def _error(self, run: _Run, event: TraceEvent) -> None:
        self._mark(run, event, "error", event.error or "", run.calls.get(event.tool_call_id or "", run.span))

    def _limit(self, run: _Run, event: TraceEvent) -> None:
        self._mark(run, event, "limit", text_of(event.metadata.get("message") or event.metadata.get("limit") or ""))

    def _warning(self, run: _Run, event: TraceEvent) -> None:
        self._mark(run, event, "warning", text_of(event.metadata.get("message") or ""))

    def _mark(self, run: _Run, event: TraceEvent, kind: str, text: str, span: int | None = None) -> None:
        if len(self.marks) < _MOST_MARKS:
            where = run.span if span is None else span
            self.marks.append((event.timestamp, kind, self._said(text[: 2 * _LONGEST_LABEL]), where))

    # ---- spans

    def _open(self, kind: Kind, name: str, event: TraceEvent, parent: int) -> int:
        """Begin a span; -1 if there is no room for it."""
        if self.is_full:
            self.left_out += 1
            return -1
        group = event.parallel_group_id or ""
        span = Span(kind=kind, name=name, agent=event.agent_name, parent=parent, start=event.timestamp, group=group)
        if event.arguments is not None and kind != "run":
            span.label = _brief(event.arguments)
            span.detail["arguments"] = self._said(event.arguments)
        self.spans.append(span)
        return len(self.spans) - 1

    def _close(self, at: int, event: TraceEvent, outcome: str) -> None:
        if at >= 0:
            self.spans[at].close(event.timestamp, outcome)

    def _ended(
        self, at: int, event: TraceEvent, outcome: str, kind: Kind, name: str, parent: int
    ) -> tuple[int, Span] | None:
        """End a span; one whose beginning is not in the trace is made for that."""
        if at < 0:
            at = self._open(kind, name, event, parent)
            if at < 0:
                return None
            self.spans[at].start -= max(event.elapsed_time or 0.0, 0.0)
            self.first = min(self.first, self.spans[at].start)
        self._close(at, event, outcome)
        return at, self.spans[at]

    # ---- texts

    def _say_end(self, span: Span, event: TraceEvent) -> None:
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


def end_of_run(event: TraceEvent) -> tuple[str, str]:
    """The outcome of a run, as for a tool call, and its stop reason."""
    success = bool(event.metadata.get("success", event.error is None))
    reason = one_line(text_of(event.metadata.get("stop_reason") or ("finished" if success else "error")), 40)
    return "ok" if success else _CUT.get(reason, "error"), reason


def count_of(value: object) -> int:
    """A number of tokens or the like; 0 for anything else."""
    return value if type(value) is int and 0 <= value < 2**53 else 0


def number_of(value: object) -> float | None:
    """A number of money, seconds or the like; None for anything else."""
    if not isinstance(value, int | float) or isinstance(value, bool):
        return None
    return float(value) if 0 <= value < 1e15 else None


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
