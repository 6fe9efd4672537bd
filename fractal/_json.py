"""JSON in one place: how values are written for the wire, and what a model sees of any Python value."""

from __future__ import annotations

import base64
import dataclasses
import json
from collections import deque
from collections.abc import Callable, Collection, ItemsView, KeysView, Mapping, ValuesView
from typing import Any, TypeGuard, cast

from pydantic import BaseModel
from pydantic_core import from_json, to_json, to_jsonable_python

from fractal._callables import kind_of

__all__ = [
    "clean_text",
    "decode",
    "encode",
    "is_list",
    "is_mapping",
    "is_same",
    "jsonable",
    "repr_of",
    "text_of",
    "text_of_error",
    "words_of",
]


def clean_text(text: str) -> str:
    """Replace lone surrogates, which no UTF-8 wire can carry; every other character is kept, in a plain `str`."""
    if type(text) is not str:
        text = str.__str__(text)  # of a member of an Enum that is text, its value
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

    Models, dataclasses, dates, sets, ranges, enums and the like have a JSON form; bytes are text if they are UTF-8 and
    base64 if not; an object without a JSON form is shown by its `str()`. All this holds at every depth.
    """
    if isinstance(value, str):
        return clean_text(value)
    if issubclass(kind_of(value), _BYTES):
        return _text_of_bytes(cast("bytes", value))
    texts: list[str] = []

    def shown(part: object) -> Any:
        form = _form_of(part)
        if part is value and isinstance(form, str):
            texts.append(form)  # no JSON: at the top a text is text
        return form

    try:
        text = to_json(value, fallback=shown, bytes_mode="utf8", inf_nan_mode="constants").decode()
    except (ValueError, RecursionError):  # bytes, or halves of surrogate pairs, or a value that goes too deep
        text = _text_of_odd(value)
    return texts[0] if texts else text


_BYTES = (bytes, bytearray, memoryview)
_VIEWS = (range, KeysView, ValuesView, ItemsView)


def _form_of(part: object) -> Any:
    """The form of what pydantic has none for."""
    kind = kind_of(part)
    if issubclass(kind, _VIEWS):
        return [*cast("Collection[Any]", part)]
    return _text_of_bytes(cast("memoryview", part)) if issubclass(kind, memoryview) else _words_of(part, str)


def _words_of(value: object, words: Callable[[object], str]) -> str:
    """What an object says of itself; the name of its class where its own code fails to say it."""
    try:
        return clean_text(words(value))
    except RecursionError:
        return f"a {type(value).__name__} that is nested too deeply to be shown"
    except Exception:
        return type(value).__name__


def repr_of(value: object) -> str:
    """The `repr()` of an object; the name of its class where its own code fails to make one."""
    return _words_of(value, repr)


def _text_of_odd(value: object) -> str:
    try:
        return clean_text(json.dumps(_plain(value), ensure_ascii=False))
    except (ValueError, TypeError, RecursionError):
        return repr_of(value)


def _plain(value: Any) -> Any:
    """The value in JSON's own types, by the same rules, part by part."""
    kind = kind_of(value)
    if issubclass(kind, _BYTES):
        return _text_of_bytes(value)
    if isinstance(value, BaseModel):
        return _plain(value.model_dump())
    if dataclasses.is_dataclass(kind):
        return {each.name: _plain(getattr(value, each.name)) for each in dataclasses.fields(kind)}
    if is_mapping(value):
        return {key if isinstance(key, _KEYS) else text_of(key): _plain(each) for key, each in value.items()}
    if issubclass(kind, (list, tuple, set, frozenset, deque, *_VIEWS)):
        return [_plain(each) for each in value]
    return value if isinstance(value, _ATOMS) else to_jsonable_python(value, fallback=_form_of, bytes_mode="utf8")


_ATOMS = (str, int, float, bool, type(None))
_KEYS = (str, int, float, bool)


def _text_of_bytes(value: bytes | bytearray | memoryview) -> str:
    raw = bytes(value)
    try:
        return raw.decode()
    except UnicodeDecodeError:
        return base64.b64encode(raw).decode()


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
