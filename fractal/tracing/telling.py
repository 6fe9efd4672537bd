"""How the events of a run are told in a trace: for each kind of event the lines it makes.

A run has a dozen events, so lines are joined of parts that are encoded once and of the payloads, which are encoded as
they are told.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any

from pydantic_core import to_json

from fractal._concurrency.owners import this_process
from fractal._json import decode, encode, is_mapping
from fractal.events import (
    ApprovalAnswered,
    ApprovalRequested,
    DelegationFinished,
    DelegationStarted,
    LimitHit,
    ModelRequested,
    ModelResponded,
    RetryScheduled,
    RunFinished,
    RunStarted,
    ToolFinished,
    ToolStarted,
    WarningRaised,
)
from fractal.tracing.content import shown

if TYPE_CHECKING:
    from fractal._redact import PayloadWriter
    from fractal.limits import Limits

__all__ = ["RunFacts", "lines_by_kind"]

_NULL, _TRUE, _FALSE = b"null", b"true", b"false"
_LINE = (
    b'{"timestamp":%b,"event_type":"%b"%b%b,"arguments":%b,"result":%b,"error":%b,"elapsed_time":%b,"metadata":{%b%b'
)
_NO_CALL = b',"tool_name":null,"tool_call_id":null,"parallel_group_id":null'


@dataclass(slots=True, kw_only=True)
class RunFacts:
    """The known facts of a run while it goes on.

    Attributes:
        run_id: Its id.
        root: Id of the run that the user began.
        parent_id: Id of the run above, or None.
        parent_agent: Name of its agent, if it is traced.
        agent: Name of its own agent.
        depth: How many runs are above it.
        path: File that it is written to, or None.
        name: Writes a name, as `PayloadWriter.name` does.
    """

    run_id: str
    root: str
    parent_id: str | None
    parent_agent: str | None
    agent: str
    depth: int
    path: str | None
    name: Callable[[str | None], bytes]
    _head: bytes = field(init=False)
    _tail: bytes = field(init=False)
    _group: bytes = _NULL  # of the calls of the last reply
    _asked: frozenset[str] = frozenset()  # their ids
    _calls: dict[str, bytes] = field(default_factory=dict[str, bytes])  # those that go on
    _delegations: dict[str | None, float] = field(default_factory=dict[str | None, float])
    _iteration: int = 0  # of the last request
    _opening: Any = None
    _tools: Any = None

    def __post_init__(self) -> None:
        above = b',"parent_run":%b' % encode(self.parent_id) if self.parent_id is not None else b""
        named = self.name(self.agent), encode(self.root), self.name(self.parent_agent), self.depth
        self._head = b',"agent_name":%b,"run_id":%b,"parent_agent":%b,"delegation_depth":%d' % named
        self._tail = b'"run":%b%b}}' % (encode(self.run_id), above)

    def line(
        self,
        at: float,
        kind: bytes,
        metadata: bytes = b"",
        *,
        call: bytes = _NO_CALL,
        arguments: bytes = _NULL,
        result: bytes = _NULL,
        error: bytes = _NULL,
        elapsed: float | None = None,
    ) -> bytes:
        """One line of the trace."""
        took = _NULL if elapsed is None else to_json(elapsed)
        parts = to_json(at), kind, self._head, call, arguments, result, error, took, metadata, self._tail
        return _LINE % parts

    def replied(self, calls: Any) -> None:
        """Note the calls that a reply asks for."""
        if calls:
            self._asked = frozenset(call["id"] for call in calls)
            # By the turn, which a run that another process goes on with goes on to count.
            self._group = encode(f"{self.run_id}-{self._iteration}")

    def call(self, name: str, call_id: str, *, is_last: bool = False) -> bytes:
        """The facts of a tool call for each of its lines."""
        part = self._calls.pop(call_id, None) if is_last else self._calls.get(call_id)
        if part is None:
            group = self._group if call_id in self._asked else _NULL
            named = self.name(name), self.name(call_id), group
            part = b',"tool_name":%b,"tool_call_id":%b,"parallel_group_id":%b' % named
            if not is_last:
                self._calls[call_id] = part
        return part

    def delegation(self, call_id: str | None) -> bytes:
        """The facts of a delegation for each of its lines: the call that makes it, if there is one."""
        return self._calls.get(call_id or "", _NO_CALL)

    def is_first(self, request: ModelRequested) -> bool:
        """Whether a request, which is noted, is the first one that is told."""
        before, self._iteration = self._iteration, request.iteration
        return before == 0

    def changed(self, request: ModelRequested, payload: PayloadWriter) -> bytes:
        """The parts of a request beside the conversation that differ from those of the one before."""
        said = b""
        if request.opening != self._opening:
            self._opening = request.opening
            said += b'"opening":%b,' % payload(request.opening)
        if request.tools != self._tools:
            self._tools = request.tools
            said += b'"tools":%b,' % payload(request.tools)
        return said

    def delegated(self, call_id: str | None, at: float) -> None:
        """Note when another agent was asked."""
        self._delegations[call_id] = at

    def since_delegated(self, call_id: str | None, at: float) -> float:
        """Seconds since another agent was asked."""
        return at - self._delegations.pop(call_id, at)


def _fields(values: Mapping[str, Any]) -> bytes:
    """Facts that are not empty, as part of a JSON object."""
    return encode(values)[1:-1] + b","


Lines = tuple[bytes, ...]


def _run_started(event: RunStarted, run: RunFacts, payload: PayloadWriter) -> Lines:
    metadata = b'"call":%b,' % payload.name(event.call_id)
    if run.run_id == run.root:
        metadata += _said_process(os.getpid())
    if event.timeout is not None:
        metadata += b'"timeout":%b,' % encode(event.timeout)
    if event.limits is not None:
        metadata += _said_limits(event.limits)
    if event.history:
        metadata += b'"history":%b,' % payload(event.history)
    arguments = payload({"user_input": event.message.get("content")})
    return (run.line(event.at, b"agent_start", metadata, arguments=arguments),)


@functools.lru_cache(maxsize=1)
def _said_process(pid: int) -> bytes:
    return _fields({"process": asdict(this_process())})


@functools.lru_cache(maxsize=64)
def _said_limits(limits: Limits) -> bytes:
    named = {name: value for name, value in asdict(limits).items() if name.startswith("max_") and value is not None}
    return b'"limits":%b,' % encode(named)


def _run_finished(event: RunFinished, run: RunFacts, payload: PayloadWriter) -> Lines:
    result = event.result
    metadata: dict[str, Any] = {
        "success": result.success,
        "stop_reason": result.stop_reason,
        "iterations": result.metadata.get("iterations"),
        "usage": vars(result.usage),
    }
    if result.abandoned:
        metadata["abandoned"] = [decode(payload.name(each.call_id)) for each in result.abandoned]
    if result.success:
        content = payload(shown(result.content))
        return (run.line(event.at, b"agent_end", _fields(metadata), result=content, elapsed=result.elapsed),)
    error = payload(result.error)
    metadata["error_type"] = kind = result.metadata.get("error_type")
    ended = run.line(event.at, b"agent_end", _fields(metadata), error=error, elapsed=result.elapsed)
    if result.stop_reason == "cancelled":
        return (ended,)
    return (run.line(event.at, b"error", _fields({"error_type": kind}), error=error), ended)


def _requested(event: ModelRequested, run: RunFacts, payload: PayloadWriter) -> Lines:
    metadata = b'"iteration":%d,"attempt":%d,"messages":%d,"model":%b,' % (
        event.iteration,
        event.attempt,
        event.message_count,
        payload.name(event.model),
    )
    # Replies and results have lines of their own, but for those that a run has been brought, or goes on after.
    added = event.added
    if not run.is_first(event):
        added = [each for each in added if each.get("role") not in ("assistant", "tool")]
    metadata += run.changed(event, payload)
    if event.parameters:
        metadata += b'"parameters":%b,' % payload(event.parameters)
    if event.server is not None:
        metadata += b'"server":%b,' % encode(event.server)
    if event.kept is not None:
        metadata += b'"kept":%b,' % encode(event.kept)
    if added:
        metadata += b'"added":%b,' % payload(added)
    return (run.line(event.at, b"model_request", metadata),)


_OF_REPLIES = ("cached_input_tokens", "cache_write_input_tokens", "reasoning_tokens")


def _responded(event: ModelResponded, run: RunFacts, payload: PayloadWriter) -> Lines:
    metadata = b'"finish_reason":%b,"input_tokens":%d,"output_tokens":%d,"cost":%b,' % (
        payload.name(event.finish_reason),
        event.input_tokens,
        event.output_tokens,
        _NULL if event.cost is None else to_json(event.cost),
    )
    if rest := {name: value for name in _OF_REPLIES if (value := getattr(event, name))}:
        metadata += _fields(rest)
    if event.model:
        metadata += b'"model":%b,' % payload.name(event.model)
    if event.response_id:
        metadata += b'"response_id":%b,' % payload.name(event.response_id)
    if event.first_piece is not None:
        metadata += b'"first_piece":%b,' % to_json(event.first_piece)
    run.replied(event.message.get("tool_calls"))
    result = payload(event.message)
    return (run.line(event.at, b"model_response", metadata, result=result, elapsed=event.elapsed),)


def _retry(event: RetryScheduled, run: RunFacts, payload: PayloadWriter) -> Lines:
    said = event.attempt, event.wait, payload(event.error)
    return (run.line(event.at, b"retry", b'"attempt":%d,"wait":%a,"message":%b,' % said),)


def _tool_started(event: ToolStarted, run: RunFacts, payload: PayloadWriter) -> Lines:
    call = run.call(event.tool_name, event.call_id)
    return (run.line(event.at, b"tool_call", call=call, arguments=payload(_arguments(event.arguments))),)


_FAILURES = ("error", "timeout", "abandoned")
"""Outcomes that are told as errors, too; a call that is cancelled or skipped is so because of something else."""


def _tool_finished(event: ToolFinished, run: RunFacts, payload: PayloadWriter) -> Lines:
    result = event.result
    call = run.call(event.tool_name, event.call_id, is_last=True)
    error = payload(result.error) if result.error is not None else _NULL
    ended = run.line(
        event.at,
        b"tool_result",
        b'"success":%b,"outcome":"%b",' % (_FALSE if error is not _NULL else _TRUE, result.outcome.encode()),
        call=call,
        result=payload(shown(result.content)) if result.content is not None else _NULL,
        error=error,
        elapsed=result.elapsed,
    )
    if result.outcome not in _FAILURES:
        return (ended,)
    return (run.line(event.at, b"error", b'"outcome":"%b",' % result.outcome.encode(), call=call, error=error), ended)


def _approval_requested(event: ApprovalRequested, run: RunFacts, payload: PayloadWriter) -> Lines:
    call = run.call(event.tool_name, event.call_id)
    return (run.line(event.at, b"approval_request", call=call, arguments=payload(_arguments(event.arguments))),)


def _approval_answered(event: ApprovalAnswered, run: RunFacts, payload: PayloadWriter) -> Lines:
    call = run.call(event.tool_name, event.call_id)
    metadata = b'"is_allowed":%b,"reason":%b,' % (encode(event.is_allowed), payload(event.reason))
    return (
        run.line(event.at, b"approval_answer", metadata, call=call, arguments=payload(_arguments(event.arguments))),
    )


def _delegation_started(event: DelegationStarted, run: RunFacts, payload: PayloadWriter) -> Lines:
    run.delegated(event.call_id, event.at)
    arguments = payload({"to_agent": event.to_agent, "query": event.query})
    return (run.line(event.at, b"agent_delegate", call=run.delegation(event.call_id), arguments=arguments),)


def _delegation_finished(event: DelegationFinished, run: RunFacts, payload: PayloadWriter) -> Lines:
    result = event.result
    success = _TRUE if result is not None and result.success else _FALSE
    error = result.error if result is not None else "it was cut before it could say how it ended"
    return (
        run.line(
            event.at,
            b"delegation_end",
            b'"to_agent":%b,"success":%b,' % (payload.name(event.to_agent), success),
            call=run.delegation(event.call_id),
            result=payload(shown(result.content)) if result is not None and result.success else _NULL,
            error=payload(error) if error is not None else _NULL,
            elapsed=run.since_delegated(event.call_id, event.at),
        ),
    )


def _limit(event: LimitHit, run: RunFacts, payload: PayloadWriter) -> Lines:
    metadata = b'"limit":%b,"message":%b,' % (encode(event.limit), payload(event.message))
    return (run.line(event.at, b"limit", metadata),)


def _warning(event: WarningRaised, run: RunFacts, payload: PayloadWriter) -> Lines:
    return (run.line(event.at, b"warning", b'"message":%b,' % payload(event.message)),)


def _arguments(arguments: object) -> Any:
    """The arguments of a tool: by name, or as the model wrote them where that does not fit."""
    return arguments if is_mapping(arguments) else {"arguments": arguments}


lines_by_kind: dict[type, Callable[[Any, RunFacts, PayloadWriter], Lines]] = {
    RunStarted: _run_started,
    RunFinished: _run_finished,
    ModelRequested: _requested,
    ModelResponded: _responded,
    RetryScheduled: _retry,
    ToolStarted: _tool_started,
    ToolFinished: _tool_finished,
    ApprovalRequested: _approval_requested,
    ApprovalAnswered: _approval_answered,
    DelegationStarted: _delegation_started,
    DelegationFinished: _delegation_finished,
    LimitHit: _limit,
    WarningRaised: _warning,
}
"""The lines that an event makes, by its class; pieces of streams make none."""
