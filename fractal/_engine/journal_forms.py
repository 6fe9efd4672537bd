"""The forms in which a journal keeps what a run has got and done: replies, results of calls, results of runs."""

from __future__ import annotations

import dataclasses
import hashlib
from typing import TYPE_CHECKING, Any

from fractal._answers.output import OutputFault
from fractal._checks import is_count, is_number
from fractal._engine.explain import explain
from fractal._json import encode, is_list, is_mapping, text_of
from fractal._lossless import Unreadable, from_lossless, is_lossless, to_lossless
from fractal._texts import one_line, repr_of
from fractal.approval import Allow, Defer, Deny, PendingCall
from fractal.errors import ApprovalPending, UnexpectedError
from fractal.model import Reply, ToolCall
from fractal.results import AgentResult, ToolResult, Usage

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence

    from fractal._answers.answer import AnswerSettings
    from fractal.messages import Message

__all__ = [
    "approval_form",
    "approval_of",
    "digest",
    "exception_form",
    "exception_of",
    "in_brief",
    "moment_of",
    "position_of",
    "reply_form",
    "reply_of",
    "result_form",
    "result_of",
    "spent_form",
    "spent_of",
]

_LONGEST = 200


def digest(value: object) -> str:
    """A short digest of a value of JSON's types."""
    return hashlib.sha256(encode(value)).hexdigest()[:16]


def moment_of(form: Any) -> float | None:
    """The seconds of a form; None where there are none.

    Raises:
        Unreadable: It is neither.
    """
    if form is None or is_number(form):
        moment: float | None = form
        return moment
    raise Unreadable(f"a stored time is no number: {repr_of(form)}")


def position_of(form: Any) -> int:
    """The number of a form that counts something.

    Raises:
        Unreadable: It is none.
    """
    if not is_count(form):
        raise Unreadable(f"a stored value is no whole number: {repr_of(form)}")
    number: int = form
    return number


def in_brief(messages: Iterable[Message]) -> list[str]:
    """Messages as short lines, for whoever reads a record."""
    return [one_line(f"{each['role']}: {text_of(each.get('content'))}", _LONGEST) for each in messages]


def spent_form(below: Sequence[Callable[[], Usage]]) -> dict[str, Any]:
    """The form of what runs below a step have spent, to stand among the facts of its record; empty without any.

    Args:
        below: Tells the usage of each of them.
    """
    return {"spent": sum((usage() for usage in below), Usage()).model_dump(mode="json")} if below else {}


def spent_of(form: dict[str, Any]) -> Usage | None:
    """What runs below the step of a record have spent; None without any."""
    spent = form.get("spent")
    return Usage(**spent) if spent is not None else None


_OF_REPLY = {each.name: each for each in dataclasses.fields(Reply)}


def reply_form(reply: Reply) -> dict[str, Any]:
    """The form of a reply; what it does not say is left out."""
    given = {name: getattr(reply, name) for name in _OF_REPLY}
    empty = Reply()
    form = {name: to_lossless(value) for name, value in given.items() if value != getattr(empty, name)}
    if reply.tool_calls:
        form["tool_calls"] = [
            {"id": call.id, "name": call.name, "arguments": call.arguments}
            | ({"extra": to_lossless(dict(call.extra))} if call.extra else {})
            | ({"is_object": True} if call.is_object else {})
            for call in reply.tool_calls
        ]
    return form


def reply_of(form: dict[str, Any]) -> Reply:
    """The reply of a form."""
    facts = {name: from_lossless(value) for name, value in form.items() if name != "tool_calls"}
    calls = [{**call, "extra": from_lossless(call.get("extra", {}))} for call in form.get("tool_calls", ())]
    reply = Reply(**facts, tool_calls=tuple(ToolCall(**call) for call in calls))
    if not (all(_is_fit(reply, name) for name in facts) and all(map(_is_whole, reply.tool_calls))):
        raise Unreadable("a stored reply has parts that no reply has")
    return reply


def _is_fit(reply: Reply, name: str) -> bool:
    """Whether a part of a reply is of the kind of such parts."""
    value = getattr(reply, name)
    if name == "content":
        return is_list(value) or isinstance(value, str)
    if name == "extra":
        return is_mapping(value)
    return is_count(value) if name.endswith("_tokens") else isinstance(value, str)


def _is_whole(call: ToolCall) -> bool:
    texts = (call.id, call.name, call.arguments)
    return all(isinstance(each, str) for each in texts) and is_mapping(call.extra)


def approval_form(answer: Allow | Deny | Defer) -> dict[str, Any]:
    """The form of the answer of somebody who approves."""
    if isinstance(answer, Defer):
        return {"answer": "defer"}
    if isinstance(answer, Deny):
        return {"answer": "deny", "reason": text_of(answer.reason)}
    return {"answer": "allow", "arguments": to_lossless(answer.arguments and dict(answer.arguments))}


def approval_of(form: dict[str, Any]) -> Allow | Deny | Defer:
    """The answer of a form."""
    if form["answer"] == "allow":
        return Allow(from_lossless(form["arguments"]))
    return Deny(form["reason"]) if form["answer"] == "deny" else Defer()


_OF_CALL = ("content", "tool_name", "metadata", "error", "outcome", "elapsed", "call_id")


def _call_form(result: ToolResult) -> dict[str, Any]:
    form = {name: to_lossless(getattr(result, name)) for name in _OF_CALL}
    return {**form, "exception": exception_form(result.exception)}


def _call_of(form: dict[str, Any]) -> ToolResult:
    facts = {name: from_lossless(form[name]) for name in _OF_CALL}
    return ToolResult.of_facts(exception_of(form["exception"]), **facts)


def exception_form(error: BaseException | None) -> Any:
    """The form of an exception; of one that has no lossless form that of another with its text."""
    if error is None or is_lossless(error):
        return to_lossless(error)
    return to_lossless(UnexpectedError(explain(error)))


def exception_of(form: Any) -> Any:
    """The exception of a form; None where it had no lossless one."""
    error = from_lossless(form)
    return error if isinstance(error, BaseException) else None


def _pending_form(call: PendingCall) -> dict[str, Any]:
    facts = {field.name: getattr(call, field.name) for field in dataclasses.fields(call)}
    return {**facts, "arguments": to_lossless(dict(call.arguments))}


def _pending_of(form: dict[str, Any]) -> PendingCall:
    return PendingCall(**{**form, "arguments": from_lossless(form["arguments"])})


_AS_THEY_ARE = ("agent_name", "success", "stop_reason", "error", "warnings", "elapsed", "run_id", "messages", "content")
_OF_METADATA = ("iterations", "model", "terminated_by_tool", "reason", "error", "error_type")


def result_form(result: AgentResult) -> dict[str, Any]:
    """The form of the result of a run."""
    metadata = {name: result.metadata[name] for name in _OF_METADATA if name in result.metadata}
    return {
        **{name: to_lossless(getattr(result, name)) for name in _AS_THEY_ARE},
        "metadata": to_lossless(metadata),
        "usage": result.usage.model_dump(mode="json"),
        "tool_results": [_call_form(each) for each in result.tool_results],
        "abandoned": [_call_form(each) for each in result.abandoned],
        "pending": [_pending_form(each) for each in result.pending],
        "exception": exception_form(result.exception),
    }


def result_of(form: dict[str, Any], answer: AnswerSettings | None) -> AgentResult:
    """The result of a form.

    Args:
        form: The form.
        answer: What the answer has to be, for one that had no lossless form.
    """
    facts = {name: from_lossless(form[name]) for name in _AS_THEY_ARE}
    facts["content"] = _content_of(form["content"], answer) if facts["success"] else facts["content"]
    facts["metadata"] = {**from_lossless(form["metadata"]), "messages": facts["messages"]}
    facts["usage"] = Usage(**form["usage"])
    facts["tool_results"] = [_call_of(each) for each in form["tool_results"]]
    facts["abandoned"] = [_call_of(each) for each in form["abandoned"]]
    facts["pending"] = [_pending_of(each) for each in form.get("pending", ())]  # few results have any
    error = ApprovalPending(facts["pending"]) if facts["pending"] else exception_of(form["exception"])
    names = AgentResult.model_fields
    result = AgentResult.of_facts(error, **{name: facts.get(name, []) for name in names})
    if error is not None:
        error.result = result
    return result


def _content_of(form: Any, answer: AnswerSettings | None) -> Any:
    content = from_lossless(form)
    is_lossy = is_mapping(form) and form.get("$") == "lossy"
    if not is_lossy or answer is None or answer.type is None:
        return content
    try:
        return answer.type.parse_text(text_of(content))
    except OutputFault:
        return content
