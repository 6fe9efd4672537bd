"""How answers are read: from the bytes of a completion to a reply."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any
from uuid import uuid4

from pydantic_core import from_json

from fractal._functions.arguments import object_text
from fractal._json import decode, encode, is_list, is_mapping
from fractal._texts import clean_text
from fractal.errors import BadReply, ModelError, ReplyTooLarge
from fractal.model import Reply, ToolCall
from fractal.models._replies.reported import briefly, is_page, quoted_body, reported_error, status_error
from fractal.models._replies.usage import AnswerFacts
from fractal.models._secrets import NO_SECRETS, Secrets
from fractal.models.bounds import DEFAULT_BOUNDS, ReplyBounds
from fractal.reply import says_calls

if TYPE_CHECKING:
    from collections.abc import Iterable

__all__ = [
    "LONGEST_NAME",
    "broken_off",
    "decoded",
    "function_in",
    "reply_from",
    "reply_of",
    "reply_to_message",
    "text_in",
]

LONGEST_NAME = 200
"""Characters that are kept of a finish reason, or of the name of a tool: what can be shown and remembered."""

_READABLE_DEPTH = 200  # what is deeper, pydantic's `from_json` does not read

# What goes back in a form of its own, and what no endpoint takes back.
_READ = frozenset({"role", "content", "refusal", "tool_calls", "function_call"})
_READ_OF_CALL = frozenset({"id", "type", "function", "custom", "index"})
_READ_OF_FUNCTION = frozenset({"name", "arguments", "input"})

# Words of endpoints, in lower case, for an answer that broke off.
_BROKEN_OFF = frozenset(
    {
        "abort",
        "aborted",
        "canceled",
        "cancelled",
        "error",
        "failed",
        "insufficient_system_resource",
        "internal_error",
        "malformed_function_call",
        "network_error",
        "server_error",
        "timeout",
        "unexpected_tool_call",
    }
)


def reply_from(
    status: int, headers: Mapping[str, str], body: bytes, bounds: ReplyBounds, secrets: Secrets = NO_SECRETS
) -> Reply:
    """The reply in an HTTP answer that is one JSON value.

    Args:
        status: HTTP status.
        headers: Headers of the answer; names in lower case, or a mapping that does not care.
        body: The body.
        bounds: The most that is read.
        secrets: What no error may repeat.

    Raises:
        StatusError: The status, or the body, says that it failed.
        BadReply: It is no chat completion.
        ReplyTooLarge: It is over a bound.
    """
    if status >= 400:
        raise status_error(status, headers, body, secrets)
    try:
        completion = decoded(body, bounds)
    except ValueError:
        raise _no_json(status, headers, body, secrets) from None
    return reply_of(completion, bounds, secrets, headers)


def _no_json(status: int, headers: Mapping[str, str], body: bytes, secrets: Secrets) -> BadReply:
    page = is_page(headers, body)
    if not page and not body.strip():
        return BadReply(f"the endpoint answered {status} with an empty body", status=status)
    said, hint = quoted_body(body, secrets), ": is the base URL right?" if page else ""
    fault = BadReply(f"the endpoint answered {said!r}, which is not JSON{hint}", status=status)
    fault.retryable = not page  # a web page will still be one next time
    return fault


def decoded(data: bytes, bounds: ReplyBounds) -> Any:
    """The value of a JSON text, with texts that can be encoded again.

    Raises:
        ValueError: It is not JSON.
        ReplyTooLarge: It is over a bound.
    """
    may_be_deep = bounds.depth < _READABLE_DEPTH
    if len(data) > bounds.values and _opened(data) + data.count(b",") > bounds.values:
        raise ReplyTooLarge("values", bounds.values)
    try:
        value = from_json(data)
    except ValueError:
        value, may_be_deep = _slowly_decoded(data), True
    if may_be_deep and _opened(data) > bounds.depth and _is_deeper(value, bounds.depth):
        raise ReplyTooLarge("depth", bounds.depth)
    return value


def _opened(data: bytes) -> int:
    """The most lists and objects that a JSON text may have: brackets inside its strings count, too."""
    return data.count(b"[") + data.count(b"{")


def _slowly_decoded(data: bytes) -> Any:
    """The value of a JSON text that has half of a surrogate pair in it, a byte order mark, or a number without end."""
    try:
        return json.loads(data, parse_int=_number)
    except RecursionError:
        raise ValueError("nested too deeply") from None


def _number(digits: str) -> int | float:
    return int(digits) if len(digits) <= 400 else float(digits)


def _is_deeper(value: object, depth: int) -> bool:
    """Whether a JSON value is nested deeper than a number of levels."""
    level: list[Any] = [value]
    for _ in range(depth):
        level = [
            member
            for each in level
            for member in (each.values() if is_mapping(each) else each)
            if isinstance(member, (dict, list))
        ]
        if not level:
            return False
    return True


def reply_of(
    completion: Any,
    bounds: ReplyBounds = DEFAULT_BOUNDS,
    secrets: Secrets = NO_SECRETS,
    headers: Mapping[str, str] | None = None,
) -> Reply:
    """The reply in a `chat.completion` object.

    Args:
        completion: The object.
        bounds: The most that is read of it.
        secrets: What no error may repeat.
        headers: Headers of the HTTP answer, for an error that comes with status 200.

    Raises:
        ModelError: The endpoint reports an error in place of a message or beside it.
        BadReply: There is no message.
        ReplyTooLarge: It is over a bound.
    """
    choices = _choices_of(completion)
    if not choices or completion.get("error"):
        error = reported_error(completion, secrets, headers or {})
        if error is not None:
            raise error
    if not choices:
        said = secrets.quoted(briefly(completion, secrets), 200)
        raise BadReply(f"the endpoint's answer has no choices[0].message: {said}")
    facts = AnswerFacts()
    facts.read_origin(completion)
    facts.read_usage(completion)
    choice, *others = choices
    message = choice["message"]
    finish_reason = choice.get("finish_reason")
    if others and not message.get("tool_calls") and says_calls(finish_reason):
        message = _with_calls_of_others(message, [other["message"] for other in others])
    error = broken_off(finish_reason)
    if choice.get("error"):
        error = reported_error(choice, secrets, headers or {}) or error
    if error is not None:
        raise error
    return reply_to_message(message, finish_reason, facts, bounds)


def _choices_of(completion: Any) -> list[Mapping[str, Any]]:
    choices = completion.get("choices") if is_mapping(completion) else None
    return [one for one in choices if is_mapping(one) and is_mapping(one.get("message"))] if is_list(choices) else []


def _with_calls_of_others(message: Mapping[str, Any], others: Iterable[Mapping[str, Any]]) -> Mapping[str, Any]:
    """A message with the calls of another choice, into which some gateways put them."""
    calls = next((other["tool_calls"] for other in others if other.get("tool_calls")), None)
    return {**message, "tool_calls": calls} if calls else message


def broken_off(finish_reason: object) -> ModelError | None:
    """The error of an answer whose finish reason says that the endpoint broke it off; None for any other."""
    if not isinstance(finish_reason, str) or finish_reason.lower() not in _BROKEN_OFF:
        return None
    error = ModelError(f"the endpoint broke off its answer: the finish reason is {finish_reason!r}", code=finish_reason)
    error.retryable = True
    return error


def reply_to_message(
    message: Mapping[str, Any], finish_reason: object, facts: AnswerFacts, bounds: ReplyBounds
) -> Reply:
    """The reply in an assistant's message.

    Args:
        message: The message as the endpoint wrote it.
        finish_reason: Its word for why it stopped.
        facts: What the answer tells beside it.
        bounds: The most that is read.

    Raises:
        ReplyTooLarge: It is over a bound.
    """
    content, refusal = message.get("content"), message.get("refusal")
    extra = {} if message.keys() <= _READ else _extra_of(message)
    parts = content if is_list(content) and content else None
    refusal = text_in(refusal, "refusal") if refusal else _parts(parts, "refusal") if parts else ""
    return Reply(
        text=clean_text(text_in(content, "text")) or None if content else None,
        tool_calls=_calls_in(message, bounds),
        refusal=clean_text(refusal) or None if refusal else None,
        finish_reason=clean_text(finish_reason[:LONGEST_NAME]) or None if isinstance(finish_reason, str) else None,
        content=_writable(parts) if parts else "" if content == "" else None,
        extra=extra,
        model=facts.model,
        id=facts.id,
        **facts.tokens(),
    )


def _extra_of(message: Mapping[str, Any]) -> dict[str, Any]:
    """The unknown fields of a message."""
    extra = {name: value for name, value in message.items() if name not in _READ and value is not None}
    if extra.get("annotations") == []:  # OpenAI's own endpoint says it with every message
        del extra["annotations"]
    return _writable(extra) if extra else extra


def _writable(value: Any) -> Any:
    """A JSON value with the halves of surrogate pairs replaced, in its keys too."""
    return decode(encode(value))


def text_in(content: object, kind: str) -> str:
    """Text, also where an endpoint writes it in parts.

    Args:
        content: Text, a list of parts, or anything else for no text.
        kind: Field of a part that has the text.
    """
    return content if isinstance(content, str) else _parts(content, kind)


def _parts(content: object, kind: str) -> str:
    if not is_list(content):
        return ""
    pieces = [part.get(kind) for part in content if is_mapping(part)]
    return "".join(piece for piece in pieces if isinstance(piece, str))


def _calls_in(message: Mapping[str, Any], bounds: ReplyBounds) -> tuple[ToolCall, ...]:
    written = message.get("tool_calls")
    if not written and not message.get("function_call"):
        return ()
    if not is_list(written):
        function = message.get("function_call")  # what calls were called before they were `tool_calls`
        written = [{"function": function}] if is_mapping(function) and function.get("name") else []
    if len(written) > bounds.calls:
        raise ReplyTooLarge("calls", bounds.calls)
    calls: dict[str, ToolCall] = {}
    for raw in written:
        call = _call_of(raw if is_mapping(raw) else {}, bounds)
        known = calls.get(call.id)
        if known is not None and _is_repeated(call, known):
            continue
        # Some endpoints send no id, or one for all; a history needs an id of its own for each call.
        if not call.id or known is not None:
            call = ToolCall(f"call_{uuid4().hex[:24]}", call.name, call.arguments, call.extra)
        calls[call.id] = call
    return tuple(calls.values())


def _is_repeated(call: ToolCall, known: ToolCall) -> bool:
    """Whether a call with the id of an earlier one is that call again, which some gateways send twice."""
    if call.name != known.name:
        return False
    return call.arguments == known.arguments or _same_json(call.arguments, known.arguments)


def _same_json(one: str, other: str) -> bool:
    try:
        return bool(decode(one) == decode(other))
    except (ValueError, RecursionError):
        return False


def function_in(raw: Mapping[str, Any]) -> Mapping[str, Any]:
    """The name and arguments of a call's function."""
    for name in ("function", "custom"):
        function = raw.get(name)
        if is_mapping(function):
            return function
    return {}


def _call_of(raw: Mapping[str, Any], bounds: ReplyBounds) -> ToolCall:
    """A tool call as an endpoint wrote it; its id is empty where the endpoint sent none.

    Raises:
        ReplyTooLarge: It is over a bound.
    """
    function = function_in(raw)
    arguments = function.get("arguments", function.get("input"))
    if not isinstance(arguments, str):  # some endpoints send the object itself
        arguments = encode(arguments).decode() if arguments is not None else "{}"
    _require_bounded(arguments, bounds)
    arguments = clean_text(arguments)
    readable, written = object_text(arguments), arguments.strip()
    if readable is not None and written and written != readable:
        arguments = readable
    call_id, name = raw.get("id"), function.get("name")
    return ToolCall(
        clean_text(call_id) if isinstance(call_id, str) else "",
        (clean_text(name[:LONGEST_NAME]) if isinstance(name, str) else "") or "unnamed",
        arguments,
        _extra_of_call(raw, function),
        is_object=readable is not None and bool(written),
    )


def _extra_of_call(raw: Mapping[str, Any], function: Mapping[str, Any]) -> dict[str, Any]:
    """The unknown fields of a call."""
    if raw.keys() <= _READ_OF_CALL and function.keys() <= _READ_OF_FUNCTION:
        return {}
    extra = {key: value for key, value in raw.items() if key not in _READ_OF_CALL and value is not None}
    inner = {key: value for key, value in function.items() if key not in _READ_OF_FUNCTION and value is not None}
    if inner:
        extra["function"] = inner
    return _writable(extra) if extra else extra


def _require_bounded(arguments: str, bounds: ReplyBounds) -> None:
    if len(arguments) > bounds.arguments:
        raise ReplyTooLarge("arguments", bounds.arguments)
    if arguments.count("{") + arguments.count("[") > bounds.depth:
        try:
            value = decode(arguments)
        except ValueError:
            return  # the model is told, as of all that is no JSON
        if _is_deeper(value, bounds.depth):
            raise ReplyTooLarge("depth", bounds.depth)
