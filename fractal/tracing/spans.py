"""The spans of a trace, made of its events as these are read: in the memory that what goes on at once takes.

Exports, the page and the pictures of a terminal are all made of them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple, get_args

from fractal._json import is_list, text_of
from fractal.results import Outcome
from fractal.tracing import names
from fractal.tracing.record import TraceEvent

__all__ = ["UNFINISHED", "RunEnd", "Span", "Spans", "Step", "end_of_call", "end_of_run", "run_of", "short_text"]

MOST_OPEN = 30_000
"""Spans that are open at once. Where there are more, as in a file of beginnings alone, the oldest run ends."""

_MOST_ENDED = 10_000
"""Runs that are known to have ended; what is emitted of one after that is passed over."""

_LONGEST = 500  # characters of a name

UNFINISHED = "unfinished"
"""The outcome of a span whose end is not in the file."""

_OUTCOMES = frozenset(get_args(Outcome))

Kind = Literal["run", "chat", "try", "wait", "tool"]


@dataclass(slots=True, kw_only=True, eq=False)
class Span:
    """A part of a trace that took time.

    Attributes:
        kind: A run of an agent; a request to the model with all its retries, and in the same place each try of it; a
            wait, for the next try or for approval; or a tool call.
        name: The agent, the model or the tool; of a wait what it is for. Empty for a model that is not known.
        agent: The agent it belongs to.
        root: Id of the run that the user began.
        run: Id of the run it belongs to, or is.
        above: Id of the run above, of a run that has one.
        call: Id of a tool call.
        group: The same for all calls of one reply, or empty.
        parent: The span that this one is part of, if it is in the file.
        begin: Seconds since the epoch.
        end: The same; None while it goes on.
        outcome: `"ok"`, another outcome of a tool call, or `"unfinished"`.
        error_type: The `error.type`, or None.
        error: What went wrong, or None.
        attempts: How often a request was sent; of a try, which one it is.
        before: How often a run began before: another process may go on with it.
        has_beginning: Whether its beginning is in the file.
    """

    kind: Kind
    name: str
    agent: str
    root: str
    run: str
    begin: float
    above: str | None = None
    call: str = ""
    group: str = ""
    parent: Span | None = None
    end: float | None = None
    outcome: str = UNFINISHED
    error_type: str | None = None
    error: str | None = None
    attempts: int = 1
    before: int = 0
    has_beginning: bool = True


class Step(NamedTuple):
    """A beginning or an end of a span, and the event that tells it; None where the file tells nothing more."""

    what: Literal["begin", "end"]
    span: Span
    event: TraceEvent | None


class Spans:
    """Beginnings and ends of spans, in the order of the file.

    A span that begins or ends later in the file than in time has its own times all the same. What has no end in the
    file ends with the last event of its run, as unfinished.

    Args:
        most_open: How many spans may be open at once.

    Attributes:
        open: How many are.
    """

    def __init__(self, most_open: int = MOST_OPEN) -> None:
        self.open = 0
        self._most_open = most_open
        self._runs: dict[str, _Run] = {}
        self._ended: dict[str, int] = {}  # how often each began

    def take(self, event: TraceEvent) -> Iterator[Step]:
        """Enter an event; gives what begins and ends with it."""
        yield from self._counted(self._take(event))
        while self.open > self._most_open:
            yield from self.give_up_oldest()

    def give_up_oldest(self) -> Iterator[Step]:
        """End the run that has gone on for longest, as unfinished."""
        return self._counted(self._give_up(next(iter(self._runs))))

    def finish(self) -> Iterator[Step]:
        """End all that goes on, as unfinished."""
        for run_id in reversed([*self._runs]):
            yield from self._counted(self._give_up(run_id))

    def call_of(self, event: TraceEvent) -> Span | None:
        """The tool call that an event tells something about, if it goes on."""
        run = self._runs.get(run_of(event)[0])
        return run.calls.get(event.tool_call_id or "") if run is not None else None

    def _counted(self, steps: Iterator[Step]) -> Iterator[Step]:
        for step in steps:
            self.open += 1 if step.what == "begin" else -1
            yield step

    def _take(self, event: TraceEvent) -> Iterator[Step]:
        steps_of, is_start = _STEPS.get(event.event_type), event.event_type == "agent_start"
        if steps_of is None:
            return
        run_id, above = run_of(event)
        run = self._runs.get(run_id)
        if run is not None and is_start:
            yield from self._give_up(run_id)
            run = None
        if run is None:
            if run_id in self._ended and not is_start:
                return
            run = self._begin(event, run_id, above)
            yield Step("begin", run.span, event)
        run.last = max(run.last, event.timestamp)
        if run.span.end is None or event.event_type == "tool_result":
            yield from steps_of(run, event)
        if run.span.end is not None and not run.calls:
            self._forget(run)

    def _begin(self, event: TraceEvent, run_id: str, above: str | None) -> _Run:
        is_start = event.event_type == "agent_start"
        over, call = self._runs.get(above or ""), text_of(event.metadata.get("call"))
        span = Span(
            kind="run",
            name=event.agent_name,
            agent=event.agent_name,
            root=event.run_id or "trace",
            run=run_id,
            above=above if above != run_id else None,
            parent=over.calls.get(call, over.span) if over is not None and above != run_id else None,
            begin=event.timestamp if is_start else _begin_of(event),
            before=self._ended.pop(run_id, 0),
            has_beginning=is_start,
        )
        run = self._runs[run_id] = _Run(span)
        return run

    def _give_up(self, run_id: str) -> Iterator[Step]:
        run = self._runs[run_id]
        self._forget(run)
        for part in (*run.parts(), *([run.span] if run.span.end is None else [])):
            yield _ended(part, run.last, None, UNFINISHED)

    def _forget(self, run: _Run) -> None:
        run_id = run.span.run
        del self._runs[run_id]
        self._ended[run_id] = run.span.before + 1
        if len(self._ended) > _MOST_ENDED:
            del self._ended[next(iter(self._ended))]


def run_of(event: TraceEvent) -> tuple[str, str | None]:
    """The ids of the run that an event is of, and of the run above.

    In traces that do not say which run it was, runs are told apart by agent and depth.
    """
    run, above = event.metadata.get("run"), event.metadata.get("parent_run")
    if run is None:
        run = f"{event.run_id}/{event.agent_name}/{event.delegation_depth}"
        above = f"{event.run_id}/{event.parent_agent}/{event.delegation_depth - 1}" if event.parent_agent else None
    return text_of(run), text_of(above) if above is not None else None


class RunEnd(NamedTuple):
    """How a run ended: its outcome, as for a tool call; why, in a word; and its `error.type`, None if it went well."""

    outcome: str
    reason: str
    error_type: str | None


def end_of_run(event: TraceEvent) -> RunEnd:
    """How a run ended, by the event that tells its end."""
    success = bool(event.metadata.get("success", event.error is None))
    reason, kind = (short_text(event.metadata.get(name)) for name in ("stop_reason", "error_type"))
    error = names.error_of_run(success, reason, kind, None)
    outcome = "ok" if error is None else error if error in (names.TIMEOUT, names.CANCELLED) else "error"
    return RunEnd(outcome, reason or ("finished" if success else "error"), error)


def end_of_call(event: TraceEvent) -> str:
    """The outcome of a tool call, by the event that tells its end."""
    outcome = event.metadata.get("outcome")
    if isinstance(outcome, str) and outcome in _OUTCOMES:
        return outcome
    return "ok" if event.error is None else "error"


@dataclass(slots=True, eq=False)
class _Run:
    """A run that goes on, with its open parts.

    Attributes:
        span: Its own.
        chat: The request that is on its way, or None.
        sent: The try of it.
        wait: The wait for the next one.
        iteration: The turn of the request.
        calls: The tool calls that go on.
        approvals: The calls that wait for approval.
        last: Time of its last event.
    """

    span: Span
    chat: Span | None = None
    sent: Span | None = None
    wait: Span | None = None
    iteration: Any = None
    calls: dict[str, Span] = field(default_factory=dict[str, Span])
    approvals: dict[str, Span] = field(default_factory=dict[str, Span])
    last: float = float("-inf")

    def part(self, kind: Kind, name: str, event: TraceEvent, *, has_beginning: bool = True) -> Span:
        """Make a part of it that begins with an event; or that ends with it, which is all that is in the file."""
        whole = self.span
        return Span(
            kind=kind,
            name=name,
            agent=whole.agent,
            root=whole.root,
            run=whole.run,
            call=_call_id(event) if kind == "tool" else "",
            group=event.parallel_group_id or "",
            parent=whole,
            begin=event.timestamp if has_beginning else _begin_of(event),
            has_beginning=has_beginning,
        )

    def parts(self, staying: object = ()) -> Iterator[Span]:
        """The parts that are open, which then are no more.

        Args:
            staying: Ids of the calls that go on all the same.
        """
        stay = {each for each in staying if isinstance(each, str)} if is_list(staying) else set[str]()
        parts = [*self.approvals.values(), self.wait, self.sent]
        parts += [call for call_id, call in self.calls.items() if call_id not in stay]
        parts.append(self.chat)
        self.calls = {call_id: call for call_id, call in self.calls.items() if call_id in stay}
        self.approvals.clear()
        self.wait = self.sent = self.chat = None
        return (part for part in parts if part is not None)


def _ended(
    span: Span,
    at: float,
    event: TraceEvent | None,
    outcome: str,
    error_type: str | None = None,
    error: str | None = None,
) -> Step:
    span.end, span.outcome = max(at, span.begin), outcome
    span.error_type, span.error = error_type, error
    return Step("end", span, event)


# ---- the steps of each type of event


def _agent_start(run: _Run, event: TraceEvent) -> Iterator[Step]:
    return iter(())


def _agent_end(run: _Run, event: TraceEvent) -> Iterator[Step]:
    outcome, _, error = end_of_run(event)
    for part in run.parts(event.metadata.get("abandoned")):
        yield _ended(part, event.timestamp, event, outcome if error else UNFINISHED, error, event.error)
    yield _ended(run.span, event.timestamp, event, outcome, error, event.error)


def _model_request(run: _Run, event: TraceEvent) -> Iterator[Step]:
    yield from _sent_again(run, event)
    iteration, model = event.metadata.get("iteration"), short_text(event.metadata.get("model")) or ""
    if run.chat is not None and run.iteration != iteration:  # it was given up for this one
        yield _ended(run.chat, event.timestamp, event, names.CANCELLED, names.CANCELLED)
        run.chat = None
    if run.chat is None:
        run.chat, run.iteration = run.part("chat", model, event), iteration
        yield Step("begin", run.chat, event)
    else:
        run.chat.attempts += 1
    run.sent = run.part("try", model, event)
    run.sent.attempts = run.chat.attempts
    yield Step("begin", run.sent, event)


def _sent_again(run: _Run, event: TraceEvent) -> Iterator[Step]:
    """The ends of the wait and of the try before."""
    if run.wait is not None:
        yield _ended(run.wait, event.timestamp, event, "ok")
    if run.sent is not None:
        yield _ended(run.sent, event.timestamp, event, "error")
    run.wait = run.sent = None


def _model_response(run: _Run, event: TraceEvent) -> Iterator[Step]:
    model = short_text(event.metadata.get("model")) or ""
    chat, sent = run.chat, run.sent
    run.chat = run.sent = None
    if chat is None:
        chat = run.part("chat", model, event, has_beginning=False)
        yield Step("begin", chat, event)
    if sent is None:
        sent = run.part("try", model, event, has_beginning=False)
        yield Step("begin", sent, event)
    yield _ended(sent, event.timestamp, event, "ok")
    yield _ended(chat, event.timestamp, event, "ok")


def _retry(run: _Run, event: TraceEvent) -> Iterator[Step]:
    sent, run.sent = run.sent, None
    if sent is None:
        sent = run.part("try", "", event, has_beginning=False)
        yield Step("begin", sent, event)
    why = text_of(event.metadata.get("message") or event.error or "")
    yield _ended(sent, event.timestamp, event, "error", error=why)
    if run.wait is not None:
        yield _ended(run.wait, event.timestamp, event, "ok")
    run.wait = run.part("wait", "before the next try", event)
    yield Step("begin", run.wait, event)


def _tool_call(run: _Run, event: TraceEvent) -> Iterator[Step]:
    call_id = _call_id(event)
    before = run.calls.pop(call_id, None)
    if before is not None:
        yield _ended(before, event.timestamp, event, UNFINISHED)
    run.calls[call_id] = call = run.part("tool", event.tool_name or "tool", event)
    yield Step("begin", call, event)


def _tool_result(run: _Run, event: TraceEvent) -> Iterator[Step]:
    call = run.calls.pop(_call_id(event), None)
    if call is None:
        if run.span.end is not None:  # only what could not be stopped ends after its run
            return
        call = run.part("tool", event.tool_name or "tool", event, has_beginning=False)
        yield Step("begin", call, event)
    call.group = call.group or event.parallel_group_id or ""
    outcome = end_of_call(event)
    yield _ended(call, event.timestamp, event, outcome, names.error_of_call(outcome), event.error)


def _approval_request(run: _Run, event: TraceEvent) -> Iterator[Step]:
    call_id = event.tool_call_id or ""
    before = run.approvals.pop(call_id, None)
    if before is not None:
        yield _ended(before, event.timestamp, event, UNFINISHED)
    run.approvals[call_id] = wait = run.part("wait", f"approval of {event.tool_name or 'a call'}", event)
    yield Step("begin", wait, event)


def _approval_answer(run: _Run, event: TraceEvent) -> Iterator[Step]:
    wait = run.approvals.pop(event.tool_call_id or "", None)
    if wait is not None:
        yield _ended(wait, event.timestamp, event, "ok" if event.metadata.get("is_allowed") is True else "denied")


_STEPS: dict[str, Callable[[_Run, TraceEvent], Iterator[Step]]] = {
    "agent_start": _agent_start,
    "agent_end": _agent_end,
    "model_request": _model_request,
    "model_response": _model_response,
    "retry": _retry,
    "tool_call": _tool_call,
    "tool_result": _tool_result,
    "approval_request": _approval_request,
    "approval_answer": _approval_answer,
}


def _begin_of(event: TraceEvent) -> float:
    """The beginning of a part of which only the end is there."""
    return event.timestamp - max(event.elapsed_time or 0.0, 0.0)


def _call_id(event: TraceEvent) -> str:
    return event.tool_call_id or event.tool_name or "tool"


def short_text(value: object) -> str | None:
    """The text of a fact of a trace, cut to the length of a name; None for null."""
    return text_of(value)[:_LONGEST] if value is not None else None
