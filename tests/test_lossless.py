"""Values as JSON, from which the same values come again."""

from __future__ import annotations

import dataclasses
import datetime
import decimal
import enum
import json
import math
import pathlib
import uuid
import zoneinfo
from typing import Any, NamedTuple

import pytest
from hypothesis import given, strategies as st
from pydantic import BaseModel, ConfigDict, PrivateAttr

from fractal import BudgetExceeded, ToolErrors, ToolFailed, UnexpectedError
from fractal._lossless import Unreadable, compact, from_lossless, is_lossless, to_lossless


class Color(enum.Enum):
    RED = "red"


class Bits(enum.Flag):
    A = 1
    B = 2


class Point(NamedTuple):
    x: int
    y: Any


@dataclasses.dataclass(frozen=True, slots=True)
class Place:
    name: str
    at: Point


class Order(BaseModel):
    model_config = ConfigDict(extra="allow")
    number: int
    items: list[Any] = []


def again(value: Any) -> Any:
    text = compact(to_lossless(value))
    assert "\n" not in text
    text.encode()
    return from_lossless(json.loads(text))


VALUES = [
    *(None, True, 1, 2**80, -(10**5000), 1.5, math.inf, "text", "ünï\ud800", b"\xff", bytearray(b"a"), 2 + 3j),
    *([1, [2]], (1, (2,)), {1, 2}, frozenset({"a"}), {"a": {"b": 1}}, {1: 2, (3,): None}, {"$": "int"}),
    *(decimal.Decimal("1.10"), uuid.UUID(int=5), datetime.date(2026, 1, 2), datetime.time(1, 2, 3)),
    *(datetime.timedelta(days=-1, microseconds=5), datetime.datetime(2026, 1, 2, 3, 4, 5, 6)),
    datetime.datetime(2026, 1, 2, tzinfo=datetime.timezone(datetime.timedelta(hours=2))),
    datetime.datetime(2026, 10, 25, 2, 30, fold=1, tzinfo=zoneinfo.ZoneInfo("Europe/Rome")),
    *(Color.RED, Bits.A | Bits.B, Point(1, [Color.RED]), Place("Rome", Point(1, 2)), pathlib.Path("/a/b")),
    *(Order(number=1), Order.model_construct(number="odd", items=[(1,)]), Order(number=1, more={"a": {1}})),
]


@pytest.mark.parametrize("value", VALUES, ids=lambda value: type(value).__name__)
def test_a_value_comes_again_as_it_was(value: Any) -> None:
    found = again(value)
    assert (type(found), found) == (type(value), value)
    assert is_lossless(value)


def test_what_equality_does_not_see_comes_again_too() -> None:
    assert math.isnan(again(math.nan))
    summer = datetime.datetime(2026, 10, 25, 2, 30, fold=1, tzinfo=zoneinfo.ZoneInfo("Europe/Rome"))
    assert (again(summer).fold, again(summer).tzinfo.key) == (1, "Europe/Rome")
    assert again(Order(number=1)).model_fields_set == {"number"}
    assert str(again(-0.0)) == "-0.0"


def test_exceptions_come_again_with_their_facts() -> None:
    spent = BudgetExceeded("requests", 2, 2)
    found = again(spent)
    assert (type(found), found.resource, str(found)) == (BudgetExceeded, "requests", str(spent))
    assert (type(again(ValueError("a", 1))), again(ValueError("a", 1)).args) == (ValueError, ("a", 1))
    group = again(ToolErrors([ToolFailed("a", "no"), UnexpectedError("b")]))
    assert [type(each) for each in group.exceptions] == [ToolFailed, UnexpectedError]


@given(
    st.recursive(
        st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text() | st.binary() | st.dates(),
        lambda inner: (
            st.lists(inner)
            | st.dictionaries(st.text(), inner)
            | st.tuples(inner, inner)
            | st.dictionaries(st.integers(), inner)
        ),
    )
)
def test_any_value_comes_again(value: Any) -> None:
    assert again(value) == value


def test_what_has_no_lossless_form_becomes_the_json_that_models_see() -> None:
    class Inside:
        def __repr__(self) -> str:
            return "an object"

    endless: list[Any] = []
    endless.append(endless)
    for value in (Inside(), [1, Inside()], endless, str.upper):
        assert not is_lossless(value)
        again(value)
    assert again([1, Inside()]) == [1, "an object"]


@pytest.mark.parametrize(
    "form",
    [
        {"$": "unknown"},
        {"$": "enum", "type": "os:system", "value": "true"},
        {"$": "dataclass", "type": "subprocess:Popen", "fields": {}},
        {"$": "dataclass", "type": f"{__name__}:Place", "fields": {"name": "Rome"}},
        {"$": "model", "type": "not_loaded:Order", "fields": {}, "set": [], "extra": None},
        {"$": "error", "type": "builtins:dict", "args": [], "facts": {}},
        {"$": "int", "hex": "no"},
        {"$": "set"},
        {"$": ["list"]},
    ],
    ids=str,
)
def test_what_is_damaged_or_of_no_such_class_is_told_and_makes_nothing_run(form: Any) -> None:
    with pytest.raises(Unreadable):
        from_lossless(form)


class Counted(BaseModel):
    """A model with attributes that are no fields."""

    name: str
    _count: int = PrivateAttr(default=0)
    _lock: Any = PrivateAttr(default=None)


def test_private_attributes_of_a_model_come_again_where_they_have_a_form() -> None:
    counted = Counted(name="one")
    counted._count = 3
    assert again(counted)._count == 3
    counted._lock = object()
    assert (again(counted)._count, again(counted)._lock) == (3, None)


@pytest.mark.parametrize(
    "error",
    [
        FileNotFoundError(2, "no such file", "/a/b"),
        OSError(18, "cross-device", "/a", None, "/b"),
        UnicodeDecodeError("utf8", b"\xff", 0, 1, "odd"),
        ExceptionGroup("two", [ValueError(1), KeyError("b")]),
        SystemExit(2),
    ],
    ids=lambda error: type(error).__name__,
)
def test_exceptions_of_pythons_own_come_again_with_their_text(error: BaseException) -> None:
    found = again(error)
    assert (type(found), str(found), repr(found.args)) == (type(error), str(error), repr(error.args))


@pytest.mark.parametrize("kind", [pathlib.PurePosixPath, pathlib.PureWindowsPath])
def test_a_path_of_another_kind_does_not_become_one_of_this_machine(kind: type[pathlib.PurePath]) -> None:
    assert not is_lossless(kind("a"))
