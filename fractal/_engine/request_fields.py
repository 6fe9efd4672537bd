"""What fields of a request to a model may be, whoever gives them: an agent, one run, a hook."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any

from fractal._checks import is_count, is_number
from fractal._json import is_mapping
from fractal._texts import in_brief
from fractal.errors import InvalidArguments
from fractal.model import ModelSettings

__all__ = ["REQUEST_FIELDS", "is_named"]


def _temperature(value: Any) -> Any:
    if value is not None and (not is_number(value) or not 0 <= value < math.inf):
        raise InvalidArguments(f"temperature={in_brief(value)}: give a number from 0 up, or None")
    return value


def _max_tokens(value: Any) -> Any:
    if value is not None and not is_count(value, 1):
        raise InvalidArguments(f"max_tokens={in_brief(value)}: give a whole number from 1 up, or None")
    return value


def _reasoning_effort(value: object) -> str | None:
    if value is not None and not isinstance(value, str):
        raise InvalidArguments(f'reasoning_effort={in_brief(value)}: give text, such as "low", or None')
    return value


def _extra_body(value: Any) -> Mapping[str, Any]:
    if value is not None and not is_named(value):
        raise InvalidArguments(
            f'extra_body={in_brief(value)}: give a dict of fields, such as {{"top_p": 0.5}}, or None'
        )
    fields = MappingProxyType[str, Any](dict(value or {}))  # what is put into it later would be put into runs under way
    ModelSettings(extra=fields)  # which fields are the agent's own
    return fields


def is_named(value: Any) -> bool:
    """Whether a value is a dict with names as keys."""
    return is_mapping(value) and all(isinstance(key, str) for key in value)


REQUEST_FIELDS: Mapping[str, Callable[[Any], Any]] = {
    "temperature": _temperature,
    "max_tokens": _max_tokens,
    "reasoning_effort": _reasoning_effort,
    "extra_body": _extra_body,
}
"""What makes of each field, as it is given, the value that a request gets, or raises `InvalidArguments`."""
