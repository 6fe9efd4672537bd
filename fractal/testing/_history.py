"""A strict reading of the chat-completions rules for a history, independent of the engine that it judges."""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping
from typing import Any

from fractal._json import is_list, is_mapping

__all__ = ["check_messages"]


def check_messages(messages: object) -> None:
    """Check that messages are a chat history an OpenAI-compatible provider accepts.

    The first message that is not the system's is the user's. Every tool call of an assistant's message is
    answered by one tool message, in the order of the calls and directly after it; no tool message stands
    without its call. An assistant's message has content, tool calls or a refusal.

    Example:
        ```python
        check_messages([{"role": "user", "content": "hi"}])
        ```

    Args:
        messages: The `messages` of a request, as read from JSON.

    Raises:
        ValueError: They are not; the text names the index and the fault, as in "messages[2]: …".
    """
    if not is_list(messages) or not messages:
        raise ValueError("messages: a list of at least one message is required")
    open_calls: deque[str] = deque()
    started = False
    for index, message in enumerate(messages):
        try:
            role = _check_message(message)
            _check_order(message, role, open_calls, started)
        except ValueError as fault:
            raise ValueError(f"messages[{index}]: {fault}") from None
        started = started or role not in _SYSTEM_ROLES
    if open_calls:
        raise ValueError(f"messages[{len(messages)}]: the result of call {open_calls[0]!r} is missing")


_SYSTEM_ROLES = ("system", "developer")
_ROLES = (*_SYSTEM_ROLES, "user", "assistant", "tool")


def _check_message(message: object) -> str:
    """Check a message by itself and return its role."""
    if not is_mapping(message):
        raise ValueError(f"a message is an object, not {message!r}")
    role = message.get("role")
    if not isinstance(role, str) or role not in _ROLES:
        raise ValueError(f"the role {role!r} is unknown")
    content = message.get("content")
    if content is None:
        if role != "assistant":
            raise ValueError(f"a {role} message needs content")
    elif not isinstance(content, str) and not _is_parts(content):
        raise ValueError(f"content is a string or a list of parts with a type, not {content!r}")
    if role == "assistant":
        _check_assistant(message)
    elif "tool_calls" in message:
        raise ValueError(f"a {role} message makes no tool calls")
    return role


def _check_assistant(message: Mapping[str, Any]) -> None:
    calls: object = message.get("tool_calls")
    if calls is not None and (not is_list(calls) or not calls):
        raise ValueError("tool_calls is a list of at least one call, or left out")
    if message.get("content") is None and calls is None and not message.get("refusal"):
        raise ValueError("an assistant message needs content, tool_calls or a refusal")
    seen: set[str] = set()
    for call in calls if is_list(calls) else []:
        identity = _check_call(call)
        if identity in seen:
            raise ValueError(f"the call id {identity!r} is used twice")
        seen.add(identity)


def _check_call(call: object) -> str:
    """Check an entry of tool_calls and return its id."""
    function: object = call.get("function") if is_mapping(call) else None
    if not is_mapping(call) or call.get("type") != "function" or not is_mapping(function):
        raise ValueError(f"a tool call has an id, the type 'function' and a function, not {call!r}")
    identity = call.get("id")
    if not isinstance(identity, str) or not identity:
        raise ValueError(f"the id of a tool call is a string that is not empty, not {identity!r}")
    name, arguments = function.get("name"), function.get("arguments")
    if not isinstance(name, str) or not name or not isinstance(arguments, str):
        raise ValueError(f"the function of call {identity!r} has a name and its arguments as a string")
    return identity


def _check_order(message: Mapping[str, Any], role: str, open_calls: deque[str], started: bool) -> None:
    """Check a message against what came before, and keep the calls that have no result yet."""
    if role == "tool":
        answered = message.get("tool_call_id")
        if not open_calls:
            raise ValueError(f"a tool message for {answered!r} without an open call")
        if answered != open_calls[0]:
            raise ValueError(f"a tool message for {answered!r} where {open_calls[0]!r} is next")
        open_calls.popleft()
        return
    if open_calls:
        raise ValueError(f"the result of call {open_calls[0]!r} is missing before this {role} message")
    if role == "assistant":
        if not started:
            raise ValueError("the first message after the system's is the user's, not the assistant's")
        open_calls.extend(call["id"] for call in message.get("tool_calls") or ())


def _is_parts(value: object) -> bool:
    return is_list(value) and bool(value) and all(is_mapping(part) and "type" in part for part in value)
