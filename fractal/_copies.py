"""Copies for whoever looks, so that looking is not touching; and whether a copy has been touched."""

from __future__ import annotations

import copy
import datetime
import decimal
import uuid
from collections.abc import Collection, Iterable
from typing import Any, TypeVar

from pydantic import BaseModel

from fractal._json import is_mapping, is_same
from fractal._texts import kind_of

__all__ = ["copied", "copied_arguments", "copied_messages", "is_untouched", "recorded", "with_own_content"]

Result = TypeVar("Result", bound=BaseModel)

_UNCHANGING = {
    *(str, int, float, complex, bool, bytes, type(None), decimal.Decimal, uuid.UUID),
    *(datetime.date, datetime.datetime, datetime.time, datetime.timedelta),
}


def copied(value: Any) -> Any:
    """A deep copy; parts that cannot be copied, such as locks, are shared."""
    if type(value) in _UNCHANGING:
        return value
    try:
        return copy.deepcopy(value)
    except Exception:  # also where it is nested too deeply
        return value


def copied_arguments(arguments: Any) -> Any:
    """A copy of arguments for listeners, which they may change."""
    if not is_mapping(arguments):
        return copied(arguments)
    return {name: value if type(value) in _UNCHANGING else copied(value) for name, value in arguments.items()}


def with_own_content(result: Result) -> Result:
    """A result for listeners with its own copy of the content, which is still needed elsewhere."""
    return result.model_copy(update={"content": copied(getattr(result, "content", None))})


def recorded(arguments: dict[str, Any]) -> dict[str, Any]:
    """Arguments as they are now, for the record: a tool may change the lists and dicts that it is given.

    Objects are shared: to copy them costs, and nobody may ever look.

    Returns:
        The arguments themselves where nothing in them can change.
    """
    if _UNCHANGING.issuperset(map(type, arguments.values())):
        return arguments
    try:
        recorded: dict[str, Any] = _recorded(arguments)
    except RecursionError:
        return arguments
    return recorded


def copied_messages(messages: Iterable[Any]) -> list[Any]:
    """A copy of chat messages for listeners: their lists and dicts are copied."""
    try:
        return [_recorded(message) for message in messages]
    except RecursionError:
        return list(messages)


def _recorded(value: Any) -> Any:
    kind = kind_of(value)
    if kind is dict:
        made = value.copy()
        for name, each in value.items():
            if type(each) not in _UNCHANGING:
                made[name] = _recorded(each)
        return made
    if kind is list:
        return [each if type(each) in _UNCHANGING else _recorded(each) for each in value]
    return set(value) if kind is set else value


def is_untouched(value: Any, original: Any) -> bool:
    """Whether a value equals another in all parts, types included."""
    try:
        return _is_untouched(value, original)
    except RecursionError:
        return False


def _is_untouched(value: Any, original: Any) -> bool:
    kind = kind_of(value)
    if value is original:
        return True
    if kind is not type(original):
        return False
    if issubclass(kind, dict):
        same_names = value.keys() == original.keys()
        return same_names and all(_is_untouched(each, original[name]) for name, each in value.items())
    if issubclass(kind, (list, tuple)):
        return len(value) == len(original) and all(map(_is_untouched, value, original))
    if issubclass(kind, (set, frozenset)):
        return _with_kinds(value) == _with_kinds(original)
    if getattr(kind, "__eq__", None) is object.__eq__:  # each is equal to itself alone: compare what is in them
        state = _state_of(value)
        return state is not None and _is_untouched(state, _state_of(original))
    return is_same(value, original) or (kind is float and value != value and original != original)


def _with_kinds(values: Collection[Any]) -> set[tuple[type, Any]]:
    return {(type(each), each) for each in values}


def _state_of(value: object) -> Any:
    """The state that a pickle of an object would hold; None if it cannot be pickled."""
    try:
        return value.__reduce_ex__(4)[1:]
    except Exception:
        return None
