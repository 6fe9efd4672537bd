"""Spans with what other viewers show of them: ids, attributes, and what was said, named as OpenTelemetry does."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any, Literal

import fractal.tracing.names as names
from fractal._json import encode, is_list, is_mapping
from fractal.tracing.content import instructions_of, message_in_parts
from fractal.tracing.record import TraceEvent
from fractal.tracing.spans import Span, Spans, Step, short_text

__all__ = ["ExportedSpan", "exported_spans"]

MOST_HELD = 64 * 2**20
"""Bytes that open spans take, roughly. Where there are more, as in a file of beginnings alone, the oldest run ends."""

_BYTES_OF_A_SPAN = 2000  # besides what was said

_MOST_FRESH = 2**20
"""Bytes of messages that a request is shown to have brought; further ones are left out."""


@dataclass(slots=True, kw_only=True, eq=False)
class ExportedSpan:
    """A run, a request with its retries, or a tool call.

    Attributes:
        span: When it was, and how it ended.
        operation: What the conventions call it.
        trace_id: 32 digits, those of the run that the user began if its id has that form; the same whenever the file
            is read.
        span_id: 16 digits, likewise.
        parent_id: The id of the span that it is part of; empty if there is none.
        facts: Attributes.
        said: Attributes with what was said, as JSON.
    """

    span: Span
    operation: str
    trace_id: str
    span_id: str
    parent_id: str
    facts: dict[str, Any] = field(default_factory=dict[str, Any])
    said: dict[str, str] = field(default_factory=dict[str, str])


def exported_spans(events: Iterable[TraceEvent]) -> Iterator[tuple[Literal["begin", "end"], ExportedSpan]]:
    """Beginnings and ends of spans, in the order of the file.

    Args:
        events: Those of the trace.
    """
    spans, exported = Spans(), _Exported()
    for event in events:
        for step in spans.take(event):
            yield from exported.take(step)
        while spans.open and spans.open * _BYTES_OF_A_SPAN + exported.held > MOST_HELD:
            for step in spans.give_up_oldest():
                yield from exported.take(step)
    for step in spans.finish():
        yield from exported.take(step)


class _Talk:
    """What is said in a run that goes on.

    Args:
        span: Its span.
        key: What its id and those of its parts are made of.

    Attributes:
        span: Its span.
        count: How many parts it has had.
        fresh: Messages that have come since the last request, as JSON.
        size: Bytes of these.
        usage: What its replies used.
    """

    __slots__ = ("_key", "count", "fresh", "size", "span", "usage")

    def __init__(self, span: ExportedSpan, key: tuple[str, ...]) -> None:
        self.span, self._key = span, key
        self.count = self.size = 0
        self.fresh: list[str] = []
        self.usage: dict[str, int] = {}

    def next_id(self) -> str:
        """The id of its next part."""
        self.count += 1
        return _digits(8, *self._key, str(self.count))

    def bring(self, messages: object) -> None:
        """Take messages that the next request will have."""
        for message in messages if is_list(messages) else ():
            if self.size < _MOST_FRESH:
                self.fresh.append(_json(message_in_parts(message)))
                self.size += len(self.fresh[-1])

    def take_fresh(self) -> str:
        """The messages that have come, which are not fresh any more, as JSON."""
        fresh, self.fresh, self.size = self.fresh, [], 0
        return f"[{','.join(fresh)}]"


class _Exported:
    """Spans that are open, and what is said in their runs.

    Attributes:
        held: Bytes of what was said in them.
    """

    def __init__(self) -> None:
        self.held = 0
        self._talks: dict[str, _Talk] = {}
        self._open: dict[Span, ExportedSpan] = {}

    def take(self, step: Step) -> Iterator[tuple[Literal["begin", "end"], ExportedSpan]]:
        """Enter a beginning or an end, and give it with what belongs to it; tries and waits are in their requests."""
        span, talk = step.span, self._talks.get(step.span.run)
        before = talk.size if talk is not None else 0
        if span.kind in _OPERATIONS:
            yield step.what, self._begin(step) if step.what == "begin" else self._end(step)
        elif span.kind == "try" and step.what == "begin" and span.attempts > 1 and talk and step.event:
            talk.bring(step.event.metadata.get("added"))
        talk = self._talks.get(span.run)
        self.held += (talk.size if talk is not None else 0) - before

    def _begin(self, step: Step) -> ExportedSpan:
        span, event = step.span, step.event
        assert event is not None
        begun = self._begin_run(span, event) if span.kind == "run" else self._begin_part(span, event)
        self._open[span] = begun
        self.held += _size_of(begun)
        return begun

    def _end(self, step: Step) -> ExportedSpan:
        ended = self._open.pop(step.span)
        self.held -= _size_of(ended)
        talk = self._talks.pop(step.span.run, None) if step.span.kind == "run" else self._talks.get(step.span.run)
        if step.event is not None:
            _ENDS.get((step.span.kind, step.event.event_type), _say_nothing)(ended, talk, step.event)
        return ended

    def _begin_run(self, span: Span, event: TraceEvent) -> ExportedSpan:
        above, parent_id = self._open.get(span.parent) if span.parent is not None else None, ""
        if span.above is not None:
            parent_id = above.span_id if above is not None else _digits(8, span.root, span.above)
        key = (span.root, span.run, *([f"again {span.before}"] if span.before else []))
        begun = ExportedSpan(
            span=span,
            operation=names.AGENT,
            trace_id=span.root if _IS_TRACE_ID(span.root) and span.root.strip("0") else _digits(16, span.root),
            span_id=_digits(8, *key),
            parent_id=parent_id,
            facts={names.AGENT_NAME: span.agent, names.RUN_ID: span.run},
        )
        talk = self._talks[span.run] = _Talk(begun, key)
        if span.has_beginning:
            given = event.arguments.get("user_input") if is_mapping(event.arguments) else None
            user = {"role": "user", "content": given}
            begun.said[names.INPUT_MESSAGES] = _messages([user])
            talk.bring(event.metadata.get("history"))
            talk.bring([user])
        return begun

    def _begin_part(self, span: Span, event: TraceEvent) -> ExportedSpan:
        talk = self._talks[span.run]
        facts, said = (_begin_chat if span.kind == "chat" else _begin_call)(span, talk, event)
        return ExportedSpan(
            span=span,
            operation=_OPERATIONS[span.kind],
            trace_id=talk.span.trace_id,
            span_id=talk.next_id(),
            parent_id=talk.span.span_id,
            facts={names.AGENT_NAME: span.agent, names.RUN_ID: span.run, **facts},
            said=said,
        )


_OPERATIONS = {"run": names.AGENT, "chat": names.CHAT, "tool": names.TOOL}


def _size_of(span: ExportedSpan) -> int:
    return sum(map(len, span.said.values()))


# ---- the beginnings and ends of each kind


def _begin_chat(span: Span, talk: _Talk, event: TraceEvent) -> tuple[dict[str, Any], dict[str, str]]:
    if not span.has_beginning:
        return {}, {}
    talk.bring(event.metadata.get("added"))
    said = {names.INPUT_MESSAGES: talk.take_fresh()}
    if "opening" in event.metadata:
        said[names.INSTRUCTIONS] = _json(instructions_of(event.metadata["opening"]))
    sent = names.of_parameters(event.metadata.get("parameters")) | names.of_server(event.metadata.get("server"))
    return {names.REQUEST_MODEL: span.name or None, **sent}, said


def _begin_call(span: Span, talk: _Talk, event: TraceEvent) -> tuple[dict[str, Any], dict[str, str]]:
    facts = {
        names.TOOL_NAME: span.name,
        names.TOOL_TYPE: "function",
        names.TOOL_CALL_ID: event.tool_call_id,
        names.GROUP: event.parallel_group_id,
    }
    return facts, {names.TOOL_ARGUMENTS: _json(event.arguments)} if span.has_beginning else {}


def _end_run(ended: ExportedSpan, talk: _Talk | None, event: TraceEvent) -> None:
    ended.facts[names.STOP_REASON] = short_text(event.metadata.get("stop_reason"))
    usage = talk.usage if talk is not None else {}
    ended.facts |= {name: usage.get(name) for name in (names.INPUT_TOKENS, names.OUTPUT_TOKENS)}
    if event.result is not None:
        ended.said[names.OUTPUT_MESSAGES] = _messages([{"role": "assistant", "content": event.result}])


def _end_chat(ended: ExportedSpan, talk: _Talk | None, event: TraceEvent) -> None:
    facts = event.metadata
    usage, reason = names.usage_of_reply(facts), short_text(facts.get("finish_reason"))
    if talk is not None:
        for name, count in usage.items():
            talk.usage[name] = talk.usage.get(name, 0) + count
    ended.facts |= usage | {
        names.RESPONSE_MODEL: short_text(facts.get("model")),
        names.RESPONSE_ID: short_text(facts.get("response_id")),
        names.FINISH_REASONS: [reason] if reason else None,
        names.FIRST_CHUNK: _number(facts.get("first_piece")),
        names.COST: _number(facts.get("cost")),
    }
    ended.said[names.OUTPUT_MESSAGES] = _messages([event.result])


def _end_call(ended: ExportedSpan, talk: _Talk | None, event: TraceEvent) -> None:
    ended.facts[names.OUTCOME] = ended.span.outcome
    if event.result is not None:
        ended.said[names.TOOL_RESULT] = _json(event.result)
    if talk is not None and event.parallel_group_id:  # else no reply has asked for it
        content = event.result if event.error is None else event.error
        talk.bring([{"role": "tool", "tool_call_id": event.tool_call_id, "content": content}])


def _say_nothing(ended: ExportedSpan, talk: _Talk | None, event: TraceEvent) -> None:
    """Say nothing: the part was ended by the end of another one."""


_ENDS = {("run", "agent_end"): _end_run, ("chat", "model_response"): _end_chat, ("tool", "tool_result"): _end_call}


def _number(value: object) -> float | None:
    return value if isinstance(value, (int, float)) and not isinstance(value, bool) else None


def _messages(messages: Iterable[object]) -> str:
    return _json([message_in_parts(message) for message in messages])


def _json(value: object) -> str:
    return encode(value).decode()


_IS_TRACE_ID = re.compile("[0-9a-f]{32}").fullmatch


def _digits(size: int, *of: str) -> str:
    """An id of so many bytes that is always the same for the same texts."""
    return hashlib.blake2b("\0".join(of).encode(), digest_size=size).hexdigest()
