"""JSON in one place: how values are written for the wire, and what a model sees of any Python value."""

from __future__ import annotations

import base64
import dataclasses
import json
from collections import deque
from collections.abc import Callable, Collection, ItemsView, Iterator, KeysView, Mapping, ValuesView
from typing import Any, Literal, TypeGuard, cast

from pydantic import BaseModel
from pydantic_core import from_json, to_json, to_jsonable_python

from fractal._texts import clean_text, is_a, repr_of, str_of

__all__ = ["decode", "encode", "is_list", "is_mapping", "is_same", "jsonable", "text_of"]

_DEEPEST = 100
"""Values inside each other that `jsonable` keeps. Readers of JSON take 200, and what it gives stands inside others."""


def encode(value: object) -> bytes:
    """One JSON value as compact UTF-8; lone surrogates are replaced, never an error."""
    try:
        # JSON has no NaN and no infinity.
        return to_json(value, fallback=_form_of, bytes_mode="base64", inf_nan_mode="null")
    except Exception:  # lone surrogates, a value that contains itself or goes too deep, or an object's own code
        pass
    try:
        text = json.dumps(value, ensure_ascii=False, separators=(",", ":"), default=_leaf, allow_nan=False)
    except Exception:
        return _written(_by_parts(value), "null")
    return clean_text(text).encode()


def decode(data: bytes | str) -> Any:
    """The value of a JSON text.

    Raises:
        ValueError: It is not JSON.
    """
    try:
        return from_json(data)
    except (ValueError, TypeError):  # half of a surrogate pair, or nested deeply: the slower one reads on
        pass
    try:
        return json.loads(data)
    except RecursionError:
        raise ValueError("nested too deeply") from None


def is_mapping(value: object) -> TypeGuard[Mapping[str, Any]]:
    """Whether a value is a JSON object."""
    kind = type(value)  # an object may say that it is of another
    return kind is dict or issubclass(kind, Mapping)  # nearly all are dicts, and that is asked sooner


def is_list(value: object) -> TypeGuard[list[Any]]:
    """Whether a value is a JSON array."""
    kind = type(value)
    return kind is list or issubclass(kind, list)


def is_same(one: object, other: object) -> bool:
    """Whether two values are of one type and equal, whatever the `==` of a user's type does."""
    try:
        return type(one) is type(other) and bool(one == other)
    except Exception:
        return False


def jsonable(value: object) -> Any:
    """The value in JSON's own types; never an error, and no deeper than whatever reads JSON can take.

    What JSON has no form for becomes its text, and so does what is too deep inside; where that cannot be made, the name
    of its class. Lone surrogates are replaced.
    """
    try:
        return _read_inside(_written(value, "constants"))
    except Exception:
        pass
    try:
        return _by_parts(value)
    except Exception:  # the stack has no room left, say
        return repr_of(value)


def text_of(value: object) -> str:
    """The text of a Python value for a model: text as it is, anything else as JSON; never an error.

    Models, dataclasses, dates, sets, ranges, enums and the like have a JSON form; bytes are text if they are UTF-8 and
    base64 if not; an object without a JSON form is shown by its `str()`. All this holds at every depth.
    """
    kind = type(value)  # an object may say that it is of another
    if issubclass(kind, str):
        return clean_text(cast("str", value))
    if issubclass(kind, _BYTES):
        return _text_of_bytes(cast("bytes", value))
    texts: list[str] = []

    def shown(part: object) -> Any:
        form = _form_of(part)
        if part is value and isinstance(form, str):
            texts.append(form)  # no JSON: at the top a text is text
        return form

    try:
        text = to_json(value, fallback=shown, bytes_mode="utf8", inf_nan_mode="constants").decode()
    except Exception:  # bytes, halves of surrogate pairs, a value that goes too deep, or an object's own code
        text = _loose_text(value) or _loose_text(_by_parts(value)) or repr_of(value)
    return texts[0] if texts else text


def _written(value: object, nan: Literal["constants", "null"]) -> bytes:
    return to_json(value, fallback=_form_of, bytes_mode="base64", inf_nan_mode=nan)


def _read_inside(text: bytes) -> Any:
    """The value of a JSON text, read inside so many lists that there is room around it."""
    value = from_json(b"[" * _DEEPEST + text + b"]" * _DEEPEST)
    for _ in range(_DEEPEST):
        [value] = value
    return value


_BYTES = (bytes, bytearray, memoryview)
_VIEWS = (range, KeysView, ValuesView, ItemsView)
_LISTS = (set, frozenset, deque, *_VIEWS)


def _form_of(part: object) -> Any:
    """The JSON form of a value that pydantic has none for."""
    kind = type(part)
    if issubclass(kind, _VIEWS):
        return [*cast("Collection[Any]", part)]
    return _text_of_bytes(cast("memoryview", part)) if issubclass(kind, memoryview) else str_of(part)


def _text_of_bytes(value: bytes | bytearray | memoryview) -> str:
    raw = bytes(memoryview(value))  # a subclass of bytes may have a `__bytes__` of its own
    try:
        return raw.decode()
    except UnicodeDecodeError:
        return base64.b64encode(raw).decode()


def _loose_text(value: object) -> str | None:
    """The text of a value that is JSON but for a few things; None where there is none."""
    try:
        return clean_text(json.dumps(value, ensure_ascii=False, default=_leaf))
    except TypeError:  # a key that is none of JSON's: part by part there is more to show
        return None
    except Exception:  # it contains itself, or goes too deep
        pass
    try:
        return clean_text(repr(value))
    except Exception:
        return None


def _leaf(value: object) -> Any:
    """The JSON form of an object that is none of JSON's own types; bytes in it may be left for another look."""
    try:
        return to_jsonable_python(value, fallback=_form_of, bytes_mode="utf8", inf_nan_mode="constants")
    except Exception:
        pass
    try:
        return _inside(value)
    except Exception:
        return repr_of(value)


def _inside(value: Any) -> Any:
    """The members of an object, one level down."""
    if is_a(value, _BYTES):
        return _text_of_bytes(cast("bytes", value))
    if is_a(value, BaseModel):
        return value.model_dump()
    if dataclasses.is_dataclass(value):
        return {each.name: getattr(value, each.name) for each in dataclasses.fields(value)}
    return [*value] if is_a(value, _LISTS) else repr_of(value)


# What a subclass makes of it does not count: it may raise.
_ITERATE: dict[type, Callable[[Any], Iterator[Any]]] = {
    kind: vars(kind)["__iter__"] for kind in (list, tuple, set, frozenset)
}


def _by_parts(value: object, above: frozenset[int] = frozenset()) -> Any:
    """A value that has no JSON form as a whole: what is odd in it becomes text, and the rest stays.

    Args:
        value: The value.
        above: The values that it is in.
    """
    kind = type(value)
    if issubclass(kind, str):
        return text_of(value)
    inside = above | {id(value)}
    if id(value) in above or len(above) == _DEEPEST:
        return _loose_text(value) or repr_of(value)
    if issubclass(kind, dict):
        members = cast("dict[Any, Any]", value)
        return {text_of(key): _by_parts(member, inside) for key, member in dict[Any, Any].items(members)}
    for sequence, iterate in _ITERATE.items():
        if issubclass(kind, sequence):
            return [_by_parts(item, inside) for item in iterate(value)]
    try:
        return _read_inside(_written(value, "constants"))
    except Exception:
        form = _leaf(value)
    return _by_parts(form, inside) if issubclass(type(form), (dict, list)) else text_of(form)
