"""What was said, in the form that the semantic conventions for generative AI give to messages."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from fractal._json import decode, is_list, is_mapping
from fractal._texts import type_name

__all__ = ["instructions_of", "message_in_parts", "shown"]


def shown(content: object) -> Any:
    """A value to be written down; what can be read only once is not read."""
    is_read_once = type(content) is not str and hasattr(type(content), "__next__")
    return f"[{type_name(content)}]" if is_read_once else content


def message_in_parts(message: object, finish_reason: str | None = None) -> dict[str, Any]:
    """A chat message as a role and its parts.

    Args:
        message: The message, as endpoints take it; whatever a trace file has in its place is shown as text.
        finish_reason: Why the model stopped, of a message that it has written.
    """
    if not is_mapping(message):
        return {"role": "assistant", "parts": [_text(message)]}
    parts = [*_answers(message)] if message.get("role") == "tool" else [*_said(message), *_calls(message)]
    form = {"role": message.get("role") or "assistant", "parts": parts}
    return form if finish_reason is None else form | {"finish_reason": finish_reason}


def instructions_of(opening: object) -> list[dict[str, Any]]:
    """The messages before a conversation, as parts."""
    return [part for each in (opening if is_list(opening) else ()) if is_mapping(each) for part in _said(each)]


def _answers(message: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    yield {"type": "tool_call_response", "id": message.get("tool_call_id"), "response": message.get("content")}


def _said(message: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    reasoning = message.get("reasoning_content") or message.get("reasoning")
    if isinstance(reasoning, str):
        yield {"type": "reasoning", "content": reasoning}
    content = message.get("content") or message.get("refusal")
    for part in content if is_list(content) else [content] if content else ():
        is_other = is_mapping(part) and part.get("type") not in ("text", None)
        yield {**part} if is_mapping(part) and is_other else _text(part)


def _text(part: object) -> dict[str, Any]:
    return {"type": "text", "content": part.get("text") if is_mapping(part) else part}


def _calls(message: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    calls = message.get("tool_calls")
    for call in calls if is_list(calls) else ():
        function = call.get("function") if is_mapping(call) else None
        if is_mapping(call) and is_mapping(function):
            arguments = _object(function.get("arguments"))
            yield {"type": "tool_call", "id": call.get("id"), "name": function.get("name"), "arguments": arguments}


def _object(arguments: Any) -> Any:
    """The arguments of a call, as the object that they are JSON of, where they are."""
    try:
        return decode(arguments) if isinstance(arguments, str) else arguments
    except (ValueError, RecursionError):
        return arguments
