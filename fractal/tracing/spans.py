"""The spans of a trace, made of its events as these are read: in the memory that what goes on at once takes."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any, Literal, get_args

import fractal.tracing.names as names
from fractal._json import encode, is_list, is_mapping, text_of
from fractal.results import Outcome
from fractal.tracing.content import instructions_of, message_in_parts
from fractal.tracing.events import run_of
from fractal.tracing.record import TraceEvent

__all__ = ["Span", "Step", "steps_of"]

MOST_OPEN = 64 * 2**20
"""Bytes that open spans take, roughly. Where there are more, as in a file of beginnings alone, the oldest run ends."""

_BYTES_OF_A_SPAN = 2000  # besides what was said

_MOST_FRESH = 2**20
"""Bytes of messages that a request is shown to have brought; further ones are left out."""

_MOST_ENDED = 10_000
"""Runs that are known to have ended; what is emitted of one after that is passed over."""

Step = tuple[Literal["begin", "end"], "Span"]

UNFINISHED = "unfinished"
"""The outcome of a span whose end is not in the file."""

_OUTCOMES = frozenset(get_args(Outcome))


@dataclass(slots=True, kw_only=True, eq=False)
class Span:
    """A run, a request with its retries, or a tool call.

    Attributes:
        kind: The operation, as the conventions call it.
        name: The agent, the model or the tool.
        agent: The agent it belongs to.
        root: Id of the run that the user began.
        run: Id of the run it belongs to, or is.
        trace_id: 32 digits, those of `root` if it has that form; the same whenever the file is read.
        span_id: 16 digits, likewise.
        parent: The span that this one is part of, if it is in the file.
        parent_id: The id of that span; empty if there is none.
        begin: Seconds since the epoch.
        end: The same.
        outcome: `"ok"`, another outcome of a tool call, or `"unfinished"`.
        error_type: The `error.type`, or None.
        error: What went wrong, or None.
        attempts: How often a request was sent.
        has_beginning: Whether its beginning is in the file.
        facts: Attributes.
        said: Attributes with what was said, as JSON.
        weight: Bytes that it takes while it is open, roughly.
    """

    kind: str
    name: str
    agent: str
    root: str
    run: str
    trace_id: str
    span_id: str
    begin: float
    parent: Span | None = None
    parent_id: str = ""
    end: float = 0.0
    outcome: str = UNFINISHED
    error_type: str | None = None
    error: str | None = None
    attempts: int = 1
    has_beginning: bool = True
    facts: dict[str, Any] = field(default_factory=dict[str, Any])
    said: dict[str, str] = field(default_factory=dict[str, str])
    weight: int = field(init=False)

    def __post_init__(self) -> None:
        self.weight = _BYTES_OF_A_SPAN + sum(map(len, self.said.values()))


class _Run:
    """A run that goes on, with its open parts.

    Attributes:
        span: Its own.
        chat: The request that is on its way, or None.
        calls: The tool calls that go on.
        count: How many parts it has had.
        iteration: The turn of the request.
        fresh: Messages that have come since the last request, as JSON.
        usage: What its replies used.
        last: Time of its last event.
        weight: Bytes that all this takes, roughly.
    """

    __slots__ = ("_size", "calls", "chat", "count", "fresh", "iteration", "last", "span", "usage", "weight")

    def __init__(self, span: Span, fresh: Iterable[object]) -> None:
        self.span, self.last, self.weight = span, span.begin, span.weight
        self.chat: Span | None = None
        self.calls: dict[str, Span] = {}
        self.count = 0
        self.iteration: Any = None
        self.fresh: list[str] = []
        self._size = 0  # of these
        self.usage: dict[str, int] = {}
        self.bring(fresh)

    def bring(self, messages: Iterable[object]) -> None:
        """Take messages that the next request will have."""
        for message in messages:
            if self._size < _MOST_FRESH:
                self.fresh.append(_json(message_in_parts(message)))
                self._size += len(self.fresh[-1])
                self.weight += len(self.fresh[-1])

    def take_fresh(self) -> str:
        """The messages that have come, which are not fresh any more, as JSON."""
        fresh, self.fresh = self.fresh, []
        self.weight -= self._size
        self._size = 0
        return f"[{','.join(fresh)}]"

    def open(self, kind: str, name: str, at: float, facts: dict[str, Any], said: dict[str, str]) -> Span:
        """Make a part of it."""
        self.count += 1
        whole = self.span
        part = Span(
            kind=kind,
            name=name,
            agent=whole.agent,
            root=whole.root,
            run=whole.run,
            trace_id=whole.trace_id,
            span_id=_digits(8, whole.root, whole.run, str(self.count)),
            parent=whole,
            parent_id=whole.span_id,
            begin=at,
            facts={names.AGENT_NAME: whole.agent, names.RUN_ID: whole.run, **facts},
            said=said,
        )
        self.weight += part.weight
        return part

    def close_all(self) -> Iterator[Span]:
        """The parts that are open, which then are no more."""
        parts = [*self.calls.values(), *([self.chat] if self.chat is not None else [])]
        self.calls.clear()
        self.chat = None
        return map(self.close, parts)

    def close(self, part: Span) -> Span:
        """Note that a part has ended."""
        self.weight -= part.weight
        return part


def steps_of(events: Iterable[TraceEvent]) -> Iterator[Step]:
    """Beginnings and ends of spans, in the order of the file.

    A span that begins or ends later in the file than in time has its own times all the same. What has no end in the
    file ends with the last event of its run, as unfinished.
    """
    return _Steps().of(events)


class _Steps:
    def __init__(self) -> None:
        self._runs: dict[str, _Run] = {}
        self._ended: dict[str, None] = {}
        self._weight = 0

    def of(self, events: Iterable[TraceEvent]) -> Iterator[Step]:
        for event in events:
            if event.event_type == "agent_start" or event.event_type in _OF_PARTS:
                yield from self._take(event)
            while self._weight > MOST_OPEN:
                yield from self._give_up(next(iter(self._runs)))
        for run_id in reversed([*self._runs]):
            yield from self._give_up(run_id)

    def _take(self, event: TraceEvent) -> Iterator[Step]:
        run_id, above = run_of(event)
        run, is_start = self._runs.get(run_id), event.event_type == "agent_start"
        if run is not None and is_start:
            yield from self._give_up(run_id)
        if run is None and not is_start and run_id in self._ended:
            return
        if run is None or is_start:
            run = self._begin(event, run_id, above)
            yield "begin", run.span
        before = run.weight
        run.last = max(run.last, event.timestamp)
        if not is_start:
            yield from _OF_PARTS[event.event_type](run, event)
        self._weight += run.weight - before
        if event.event_type == "agent_end":
            self._forget(run)

    def _begin(self, event: TraceEvent, run_id: str, above: str | None) -> _Run:
        root, is_start = event.run_id or "trace", event.event_type == "agent_start"
        brought = [*_brought(event)] if is_start else []
        span = Span(
            kind=names.AGENT,
            name=event.agent_name,
            agent=event.agent_name,
            root=root,
            run=run_id,
            trace_id=root if _IS_TRACE_ID(root) and root.strip("0") else _digits(16, root),
            span_id=_digits(8, root, run_id),
            begin=event.timestamp if is_start else _begin_of(event),
            has_beginning=is_start,
            facts={names.AGENT_NAME: event.agent_name, names.RUN_ID: run_id},
            said={names.INPUT_MESSAGES: _messages(brought[-1:])} if brought else {},
        )
        if above is not None and above != run_id:
            over = self._runs.get(above)
            call = text_of(event.metadata.get("call"))
            span.parent = over.calls.get(call, over.span) if over is not None else None
            span.parent_id = span.parent.span_id if span.parent is not None else _digits(8, root, above)
        run = self._runs[run_id] = _Run(span, brought)
        self._ended.pop(run_id, None)
        self._weight += run.weight
        return run

    def _give_up(self, run_id: str) -> Iterator[Step]:
        """End what is open of a run, as unfinished."""
        run = self._runs[run_id]
        self._weight -= run.weight
        parts = [*run.close_all()]
        self._weight += run.weight
        self._forget(run)
        for part in (*parts, run.span):
            yield _ended(part, run.last, UNFINISHED)

    def _forget(self, run: _Run) -> None:
        self._weight -= run.weight
        run_id = run.span.run
        del self._runs[run_id]
        self._ended[run_id] = None
        if len(self._ended) > _MOST_ENDED:
            del self._ended[next(iter(self._ended))]


def _brought(event: TraceEvent) -> Iterator[object]:
    """The messages that a run begins with."""
    history = event.metadata.get("history")
    yield from history if is_list(history) else ()
    yield {"role": "user", "content": event.arguments.get("user_input") if is_mapping(event.arguments) else None}


def _begin_of(event: TraceEvent) -> float:
    """When that began of which only the end is there."""
    return event.timestamp - max(event.elapsed_time or 0.0, 0.0)


def _ended(span: Span, at: float, outcome: str, error_type: str | None = None, error: str | None = None) -> Step:
    span.end, span.outcome = max(at, span.begin), outcome
    span.error_type, span.error = error_type, error
    return "end", span


# ---- what each type of event does


def _agent_end(run: _Run, event: TraceEvent) -> Iterator[Step]:
    facts, span = event.metadata, run.span
    reason, kind = (_text(facts.get(name)) for name in ("stop_reason", "error_type"))
    error = names.error_of_run(bool(facts.get("success", event.error is None)), reason, kind, None)
    outcome = "ok" if error is None else error if error in (names.TIMEOUT, names.CANCELLED) else "error"
    for part in run.close_all():
        yield _ended(part, event.timestamp, outcome if error else UNFINISHED, error, event.error)
    span.facts[names.STOP_REASON] = reason
    span.facts |= {name: run.usage.get(name) for name in (names.INPUT_TOKENS, names.OUTPUT_TOKENS)}
    if event.result is not None:
        span.said[names.OUTPUT_MESSAGES] = _messages([{"role": "assistant", "content": event.result}])
    yield _ended(span, event.timestamp, outcome, error, event.error)


def _model_request(run: _Run, event: TraceEvent) -> Iterator[Step]:
    facts = event.metadata
    iteration, added = facts.get("iteration"), facts.get("added")
    run.bring(added if is_list(added) else ())
    if run.chat is not None and run.iteration == iteration:
        run.chat.attempts += 1
        return
    if run.chat is not None:  # it was given up for this one
        yield _ended(run.close(run.chat), event.timestamp, names.CANCELLED, names.CANCELLED)
    model, run.iteration = _text(facts.get("model")) or "", iteration
    said = {names.INPUT_MESSAGES: run.take_fresh()}
    if "opening" in facts:
        said[names.INSTRUCTIONS] = _json(instructions_of(facts["opening"]))
    run.chat = run.open(names.CHAT, model, event.timestamp, {names.REQUEST_MODEL: model or None}, said)
    yield "begin", run.chat


def _model_response(run: _Run, event: TraceEvent) -> Iterator[Step]:
    facts, chat = event.metadata, run.chat
    if chat is None:
        chat = run.open(names.CHAT, _text(facts.get("model")) or "", _begin_of(event), {}, {})
        chat.has_beginning = False
        yield "begin", chat
    run.chat = None
    usage = names.usage_of_reply(facts)
    for name, count in usage.items():
        run.usage[name] = run.usage.get(name, 0) + count
    reason = _text(facts.get("finish_reason"))
    chat.facts |= usage | {
        names.RESPONSE_MODEL: _text(facts.get("model")),
        names.RESPONSE_ID: _text(facts.get("response_id")),
        names.FINISH_REASONS: [reason] if reason else None,
        names.FIRST_CHUNK: _number(facts.get("first_piece")),
        names.COST: _number(facts.get("cost")),
    }
    chat.said[names.OUTPUT_MESSAGES] = _messages([event.result])
    yield _ended(run.close(chat), event.timestamp, "ok")


def _tool_call(run: _Run, event: TraceEvent) -> Iterator[Step]:
    call_id = _call_id(event)
    before = run.calls.pop(call_id, None)
    if before is not None:
        yield _ended(run.close(before), event.timestamp, UNFINISHED)
    said = {names.TOOL_ARGUMENTS: _json(event.arguments)}
    run.calls[call_id] = call = run.open(names.TOOL, event.tool_name or "tool", event.timestamp, _of_call(event), said)
    yield "begin", call


def _tool_result(run: _Run, event: TraceEvent) -> Iterator[Step]:
    call = run.calls.pop(_call_id(event), None)
    if call is None:
        call = run.open(names.TOOL, event.tool_name or "tool", _begin_of(event), _of_call(event), {})
        call.has_beginning = False
        yield "begin", call
    outcome = _text(event.metadata.get("outcome")) or ""
    if outcome not in _OUTCOMES:
        outcome = "ok" if event.error is None else "error"
    call.facts[names.OUTCOME] = outcome
    if event.result is not None:
        call.said[names.TOOL_RESULT] = _json(event.result)
    content = event.result if event.error is None else event.error
    run.bring([{"role": "tool", "tool_call_id": event.tool_call_id, "content": content}])
    yield _ended(run.close(call), event.timestamp, outcome, names.error_of_call(outcome), event.error)


def _call_id(event: TraceEvent) -> str:
    return event.tool_call_id or event.tool_name or "tool"


def _of_call(event: TraceEvent) -> dict[str, Any]:
    return {
        names.TOOL_NAME: event.tool_name or "tool",
        names.TOOL_TYPE: "function",
        names.TOOL_CALL_ID: event.tool_call_id,
        names.GROUP: event.parallel_group_id,
    }


_OF_PARTS = {
    "agent_end": _agent_end,
    "model_request": _model_request,
    "model_response": _model_response,
    "tool_call": _tool_call,
    "tool_result": _tool_result,
}

_LONGEST = 500  # characters of a name


def _text(value: object) -> str | None:
    return text_of(value)[:_LONGEST] if value is not None else None


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
