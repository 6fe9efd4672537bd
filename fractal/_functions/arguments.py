"""The arguments of tool calls, as models write them and as endpoints take them back."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from typing import Any

from pydantic_core import from_json

from fractal._json import decode, encode, is_list, is_mapping
from fractal._texts import clean_text

__all__ = ["object_text", "with_object_arguments", "written_object"]

_NOTHING = ("", "null")
_DECODER = json.JSONDecoder()
_BLANK = " \t\r\n"
_BLANKS = re.compile(f"[{_BLANK}]*")
# Tokens of a model's own template that some servers leave at the end of what the model wrote.
_SPECIAL_TOKENS = re.compile(r"(?:\s*<\|[\w-]{1,40}\|>)+\s*$")
_LONGEST_TAIL = 200  # characters in which such tokens are looked for
_MOST_REPEATS = 1000
_LONGEST_QUOTE = 2000  # characters


def object_text(arguments: str) -> str | None:
    """The JSON object that a text of arguments stands for, as JSON; None if there is none, or more than one.

    Empty text and `null` are an object without members. Servers have been seen to write the object twice, to write it
    into a JSON string, and to leave special tokens of a template behind it.

    Example:
        >>> object_text('{"a": 1}{"a": 1}')
        '{"a": 1}'
        >>> object_text('{"a": 1}{"a": 2}')
    """
    text = arguments.strip(_BLANK)
    if text.startswith("{"):  # as nearly all do
        try:
            from_json(text)
        except ValueError:
            pass
        else:
            return text
    if text in _NOTHING:
        return "{}"
    value = _value_of(text)
    if is_mapping(value):
        return text
    if isinstance(value, str) and is_mapping(_value_of(value)):
        return value
    return _repeated(text[:-_LONGEST_TAIL] + _SPECIAL_TOKENS.sub("", text[-_LONGEST_TAIL:]))


def _value_of(text: str) -> Any:
    try:
        return decode(text)
    except ValueError:
        return None


def _repeated(text: str) -> str | None:
    """The last of several objects behind each other, if all that have members are the same one."""
    known: Any = {}
    written, position = "{}", 0
    for _ in range(_MOST_REPEATS):
        try:
            value, end = _DECODER.raw_decode(text, position)
        except (ValueError, RecursionError):
            return None
        if not is_mapping(value) or (value and known and known != value):
            return None
        if value:
            known, written = value, text[position:end]
        blanks = _BLANKS.match(text, end)
        position = blanks.end() if blanks is not None else end
        if position == len(text):
            return written
    return None


def written_object(arguments: str) -> str:
    """The text of a JSON object for any text of arguments: the object in it, or one that holds the text."""
    return object_text(arguments) or encode({"invalid_arguments": clean_text(arguments[:_LONGEST_QUOTE])}).decode()


def with_object_arguments(message: Mapping[str, Any]) -> Mapping[str, Any]:
    """An assistant's message in which the arguments of each call are the text of a JSON object.

    Servers parse the arguments of a history: one call that they cannot read would make every later request fail.
    Arguments that are no object go into one, as `{"invalid_arguments": "…"}`.

    Args:
        message: The message; one that needs no change is given back as it is.
    """
    calls = message.get("tool_calls")
    if not is_list(calls):
        return message
    repaired = [_with_object_arguments(call) for call in calls]
    if all(one is other for one, other in zip(calls, repaired, strict=True)):
        return message
    return {**message, "tool_calls": repaired}


def _with_object_arguments(call: Any) -> Any:
    function = call.get("function") if is_mapping(call) else None
    if not is_mapping(function):
        return call
    arguments = function.get("arguments")
    written = written_object(arguments if isinstance(arguments, str) else encode(arguments).decode())
    if written is arguments:
        return call
    return {**call, "function": {**function, "arguments": written}}
