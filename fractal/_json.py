"""JSON in one place: how values are written for the wire, and what a model sees of any Python value."""

from __future__ import annotations

import base64
import json
from collections.abc import Mapping
from typing import Any, TypeGuard

from pydantic_core import from_json, to_json, to_jsonable_python

__all__ = [
    "clean_text",
    "decode",
    "encode",
    "is_list",
    "is_mapping",
    "is_same",
    "jsonable",
    "text_of",
    "text_of_error",
    "words_of",
]


def clean_text(text: str) -> str:
    """Replace lone surrogates, which no UTF-8 wire can carry; every other character is kept."""
    try:
        text.encode()
    except UnicodeEncodeError:
        # Going through UTF-16 joins the halves of a pair that came in as two characters.
        return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    return text


def encode(value: object) -> bytes:
    """One JSON value as compact UTF-8; lone surrogates are replaced, never an error."""
    try:
        # JSON has no NaN and no infinity.
        return to_json(value, fallback=str, bytes_mode="base64", inf_nan_mode="null")
    except (ValueError, RecursionError):  # lone surrogates, or a value that contains itself or goes too deep
        pass
    try:
        text = json.dumps(value, ensure_ascii=False, separators=(",", ":"), default=jsonable, allow_nan=False)
    except ValueError:
        value = to_jsonable_python(value, fallback=str, bytes_mode="base64", inf_nan_mode="null")
        text = json.dumps(value, ensure_ascii=False, separators=(",", ":"))
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
    return isinstance(value, (dict, Mapping))  # nearly all are dicts, and that is asked sooner


def is_list(value: object) -> TypeGuard[list[Any]]:
    """Whether a value is a JSON array."""
    return isinstance(value, list)


def is_same(one: object, other: object) -> bool:
    """Whether two values are of one type and equal, whatever the `==` of a user's type does."""
    try:
        return type(one) is type(other) and bool(one == other)
    except Exception:
        return False


def jsonable(value: object) -> Any:
    """The value in JSON's own types; what JSON has no form for becomes its text."""
    plain = to_jsonable_python(value, fallback=str, bytes_mode="base64", inf_nan_mode="constants")
    try:
        json.dumps(plain, ensure_ascii=False).encode()
    except UnicodeEncodeError:
        return decode(encode(plain))
    return plain


def text_of(value: object) -> str:
    """What a model sees of a Python value: text as it is, anything else as JSON.

    Models, dataclasses, dates, sets, enums and the like have a JSON form; bytes are text if they are UTF-8 and
    base64 if not; an object without a JSON form is shown by its `str()`.
    """
    if isinstance(value, str):
        return clean_text(value)
    if isinstance(value, (bytes, bytearray)):
        return _text_of_bytes(bytes(value))
    try:
        return to_json(value, fallback=str, bytes_mode="base64", inf_nan_mode="constants").decode()
    except (ValueError, RecursionError):  # lone surrogates, or a value that contains itself or goes too deep
        pass
    try:
        return clean_text(json.dumps(value, ensure_ascii=False, default=jsonable))
    except (ValueError, TypeError, RecursionError):
        pass
    try:
        return clean_text(repr(value))
    except RecursionError:
        return f"a {type(value).__name__} that is nested too deeply to be shown"


def _text_of_bytes(value: bytes) -> str:
    try:
        return value.decode()
    except UnicodeDecodeError:
        return base64.b64encode(value).decode()


def text_of_error(error: BaseException) -> str:
    """An exception in words: its class, and its text if it has one."""
    text = words_of(error)
    return f"{type(error).__name__}: {text}" if text else type(error).__name__


def words_of(error: BaseException) -> str:
    """The text of an exception; nothing where its own code fails to make one."""
    try:
        return clean_text(str(error))
    except Exception:
        return ""
