"""Python values as readable JSON from which the same values come again: types, keys and odd numbers included.

JSON's own types stand for themselves. Anything else is an object with the one key `$`, and others that say what it is.
Classes are named, never imported: of a class that the process has not loaded there is no value, so that a file which
somebody has changed can make nothing run.
"""

from __future__ import annotations

import base64
import dataclasses
import datetime
import decimal
import enum
import json
import math
import pathlib
import sys
import uuid
import zoneinfo
from collections.abc import Callable
from contextlib import suppress
from typing import Any, cast

from pydantic import BaseModel

from fractal._json import is_list, is_mapping, jsonable
from fractal._texts import kind_of, said_by

__all__ = ["Unreadable", "compact", "from_lossless", "is_lossless", "to_lossless"]

_TAG = "$"
_SAFE_INTEGER = 2**63
_DEEPEST = 100
"""Values inside each other; readers of JSON take some more, and what is given stands inside others."""


class Unreadable(ValueError):
    """A stored value cannot be read: it is damaged, or of a class that is not loaded."""


class _HasNoForm(Exception):
    """A value has no lossless form."""


def compact(value: object) -> str:
    """JSON text of a value of JSON's own types, of one line."""
    text = json.dumps(value, ensure_ascii=False, separators=(",", ":"), allow_nan=False)
    # Half of a surrogate pair can stand in JSON only as an escape.
    return text if _is_encodable(text) else json.dumps(value, separators=(",", ":"), allow_nan=False)


def _is_encodable(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def is_lossless(value: object) -> bool:
    """Whether a value has a form that it can be read from again."""
    try:
        _form(value, 0)
    except _HasNoForm:
        return False
    return True


def to_lossless(value: object) -> Any:
    """The form of a value in JSON's own types; of one without a lossless form the JSON that a model would see."""
    try:
        return _form(value, 0)
    except _HasNoForm:
        return {_TAG: "lossy", "value": jsonable(value)}


def from_lossless(form: Any) -> Any:
    """The value of a form that `to_lossless` has made.

    Raises:
        Unreadable: It is damaged, or of a class that is not loaded.
    """
    try:
        return _value(form)
    except Unreadable:
        raise
    except Exception as error:
        raise Unreadable(f"a stored value cannot be read: {said_by(error)}") from error


# ---- from values to JSON

_PATH = type(pathlib.Path())
_PLAIN = (str, bool, type(None))


def _form(value: Any, depth: int) -> Any:
    kind = kind_of(value)
    if kind in _PLAIN:
        return value
    if depth > _DEEPEST:
        raise _HasNoForm
    make = _FORMS.get(kind)
    if make is not None:
        return make(value, depth + 1)
    if kind is _PATH:
        return {_TAG: "path", "value": str(value)}
    return _form_of_object(value, kind, depth + 1)


def _form_of_int(value: int, depth: int) -> Any:
    return value if -_SAFE_INTEGER < value < _SAFE_INTEGER else {_TAG: "int", "hex": hex(value)}


def _form_of_float(value: float, depth: int) -> Any:
    return value if math.isfinite(value) else {_TAG: "float", "value": repr(value)}


def _form_of_dict(value: dict[Any, Any], depth: int) -> Any:
    if _TAG not in value and all(type(key) is str for key in value):
        return {key: _form(each, depth) for key, each in value.items()}
    return {_TAG: "dict", "items": [[_form(key, depth), _form(each, depth)] for key, each in value.items()]}


def _form_of_items(name: str) -> Callable[[Any, int], Any]:
    return lambda value, depth: {_TAG: name, "items": [_form(each, depth) for each in value]}


def _form_of_text(name: str, write: Callable[[Any], str]) -> Callable[[Any, int], Any]:
    return lambda value, depth: {_TAG: name, "value": write(value)}


def _base64(value: Any) -> str:
    return base64.b64encode(value).decode()


def _is_named_zone(zone: Any) -> bool:
    return isinstance(zone, zoneinfo.ZoneInfo) and bool(zone.key)


_FORMS: dict[type, Callable[[Any, int], Any]] = {
    int: _form_of_int,
    float: _form_of_float,
    list: lambda value, depth: [_form(each, depth) for each in value],
    dict: _form_of_dict,
    tuple: _form_of_items("tuple"),
    set: _form_of_items("set"),
    frozenset: _form_of_items("frozenset"),
    bytes: _form_of_text("bytes", _base64),
    bytearray: _form_of_text("bytearray", _base64),
    complex: _form_of_text("complex", repr),
    decimal.Decimal: _form_of_text("decimal", str),
    uuid.UUID: _form_of_text("uuid", str),
    datetime.date: _form_of_text("date", datetime.date.isoformat),
    datetime.time: _form_of_text("time", datetime.time.isoformat),
    datetime.timedelta: lambda value, depth: {
        _TAG: "timedelta",
        "value": [value.days, value.seconds, value.microseconds],
    },
    datetime.datetime: lambda value, depth: {
        _TAG: "datetime",
        "value": value.isoformat(),
        **({"zone": value.tzinfo.key} if _is_named_zone(value.tzinfo) else {}),
    },
}


def _form_of_object(value: Any, kind: Any, depth: int) -> Any:
    named = f"{kind.__module__}:{kind.__qualname__}"
    if _class_named(named) is not kind:  # a class inside a function, say, which nobody can find again
        raise _HasNoForm
    try:
        for base, name, parts in _KINDS:
            if base(kind):
                return {_TAG: name, "type": named, **parts(value, depth)}
    except _HasNoForm:
        raise
    except Exception as error:  # whatever a class of the user's does about its attributes
        raise _HasNoForm from error
    raise _HasNoForm


def _parts_of_enum(value: Any, depth: int) -> dict[str, Any]:
    return {"value": _form(value.value, depth)}


def _parts_of_error(value: Any, depth: int) -> dict[str, Any]:
    held: Any = value.__dict__
    facts = {name: held[name] for name in held if name != "result"}  # which leads back to all of the run
    # Those of Python's own have more than `args`, such as the file of an OSError, which what copies them gives.
    args = value.__reduce__()[1] if _is_pythons(kind_of(value)) else value.args
    return {"args": _form(args, depth), "facts": _form(facts, depth)}


def _is_pythons(kind: Any) -> bool:
    return bool(kind.__module__ == "builtins")


def _parts_of_model(value: BaseModel, depth: int) -> dict[str, Any]:
    state = BaseModel.__getstate__(value)
    return {
        "fields": _form(state["__dict__"], depth),
        "set": sorted(state["__pydantic_fields_set__"]),
        "extra": _form(state["__pydantic_extra__"], depth),
        "private": _form_of_private(state["__pydantic_private__"] or {}, depth),
    }


def _form_of_private(attributes: dict[str, Any], depth: int) -> dict[str, Any]:
    """The private attributes that have a form; others, a lock say, are as they are when the model is made."""
    forms = dict[str, Any]()
    for name, value in attributes.items():
        with suppress(_HasNoForm):
            forms[name] = _form(value, depth)
    return forms


def _parts_of_dataclass(value: Any, depth: int) -> dict[str, Any]:
    facts = {each.name: getattr(value, each.name) for each in dataclasses.fields(value)}
    return {"fields": _form_of_dict(facts, depth)}


def _parts_of_tuple(value: Any, depth: int) -> dict[str, Any]:
    return {"items": [_form(each, depth) for each in tuple[Any, ...](value)]}


_KINDS: list[tuple[Callable[[Any], bool], str, Callable[[Any, int], dict[str, Any]]]] = [
    (lambda kind: issubclass(kind, enum.Enum), "enum", _parts_of_enum),
    (lambda kind: issubclass(kind, BaseException), "error", _parts_of_error),
    (lambda kind: issubclass(kind, BaseModel), "model", _parts_of_model),
    (lambda kind: dataclasses.is_dataclass(kind), "dataclass", _parts_of_dataclass),
    (lambda kind: hasattr(kind, "_fields") and issubclass(kind, tuple), "namedtuple", _parts_of_tuple),
]


# ---- and back


def _value(form: Any) -> Any:
    if is_list(form):
        return [_value(each) for each in form]
    if not is_mapping(form):
        return form
    if _TAG not in form:
        return {key: _value(each) for key, each in form.items()}
    read = _READERS.get(form[_TAG])
    if read is None:
        raise Unreadable(f"a stored value is of the unknown kind {form[_TAG]!r}")
    return read(form)


def _class_named(named: str) -> Any:
    module, _, path = named.partition(":")
    found: Any = sys.modules.get(module)
    for part in path.split("."):
        found = getattr(found, "__dict__", {}).get(part)
    is_class = isinstance(found, type)
    return found if is_class else None


def _class_of(form: Any, base: type | None = None) -> Any:
    kind = _class_named(form["type"])
    if kind is None or (base is not None and not issubclass(kind, base)):
        raise Unreadable(f"a stored value is of the class {form['type']!r}, which is not loaded")
    return kind


def _read_error(form: Any) -> BaseException:
    kind, arguments = _class_of(form, BaseException), _value(form["args"])
    if _is_pythons(kind):
        error = cast("BaseException", kind(*arguments))
    else:
        error = cast("BaseException", kind.__new__(kind, *arguments))
        error.args = arguments
    vars(error).update(_value(form["facts"]))
    return error


def _read_model(form: Any) -> BaseModel:
    kind = _class_of(form, BaseModel)
    made = cast("BaseModel", kind.model_construct())  # which makes the private attributes that are not stored
    state = BaseModel.__getstate__(made)
    fields, extra = _value(form["fields"]), _value(form["extra"])
    given = {"__dict__": fields, "__pydantic_fields_set__": set(form["set"]), "__pydantic_extra__": extra}
    if private := {name: _value(each) for name, each in form.get("private", {}).items()}:
        given["__pydantic_private__"] = {**(state["__pydantic_private__"] or {}), **private}
    BaseModel.__setstate__(made, {**state, **given})
    return made


def _read_dataclass(form: Any) -> Any:
    kind = _class_of(form)
    known = {each.name for each in dataclasses.fields(kind)}
    facts = _value(form["fields"])
    if facts.keys() != known:
        raise Unreadable(f"a stored value of the class {form['type']!r} has other fields than the class has now")
    made = object.__new__(kind)
    for name, each in facts.items():
        object.__setattr__(made, name, each)
    return made


def _read_namedtuple(form: Any) -> Any:
    kind = _class_of(form, tuple)
    return kind._make(map(_value, form["items"]))


def _read_enum(form: Any) -> Any:
    return _class_of(form, enum.Enum)(_value(form["value"]))


def _read_datetime(form: Any) -> datetime.datetime:
    value = datetime.datetime.fromisoformat(form["value"])
    return value.astimezone(zoneinfo.ZoneInfo(form["zone"])) if "zone" in form else value


def _items(make: Callable[[Any], Any]) -> Callable[[Any], Any]:
    return lambda form: make(map(_value, form["items"]))


def _of_text(make: Callable[[Any], Any]) -> Callable[[Any], Any]:
    return lambda form: make(form["value"])


_READERS: dict[Any, Callable[[Any], Any]] = {
    "int": lambda form: int(form["hex"], 16),
    "float": _of_text(float),
    "dict": lambda form: {_value(key): _value(each) for key, each in form["items"]},
    "tuple": _items(tuple),
    "set": _items(set),
    "frozenset": _items(frozenset),
    "bytes": _of_text(base64.b64decode),
    "bytearray": lambda form: bytearray(base64.b64decode(form["value"])),
    "complex": _of_text(complex),
    "decimal": _of_text(decimal.Decimal),
    "uuid": _of_text(uuid.UUID),
    "date": _of_text(datetime.date.fromisoformat),
    "time": _of_text(datetime.time.fromisoformat),
    "datetime": _read_datetime,
    "timedelta": lambda form: datetime.timedelta(*form["value"]),
    "path": _of_text(pathlib.Path),
    "lossy": lambda form: form["value"],
    "enum": _read_enum,
    "error": _read_error,
    "model": _read_model,
    "dataclass": _read_dataclass,
    "namedtuple": _read_namedtuple,
}
