"""Copies of arguments for whoever looks, and whether a copy has been touched."""

from __future__ import annotations

import copy
import dataclasses
import datetime
import enum
import math
import threading
from collections import OrderedDict, deque
from typing import Any, NamedTuple

import pytest
from pydantic import BaseModel

from fractal._copies import copied, copied_arguments, is_untouched, recorded


class Colour(enum.Enum):
    RED = "red"


class Model(BaseModel):
    items: list[int] = []


@dataclasses.dataclass
class Point:
    x: int
    tags: list[str] = dataclasses.field(default_factory=list)


class Pair(NamedTuple):
    a: int
    b: list[int]


class Plain:
    """Equal to itself alone."""

    def __init__(self, *items: Any) -> None:
        self.items = items


class Slotted:
    __slots__ = ("items",)

    def __init__(self, *items: Any) -> None:
        self.items = items


class Touchy:
    def __eq__(self, other: object) -> bool:
        raise RuntimeError("nobody may compare this")

    __hash__ = None  # type: ignore[assignment]


VALUES: list[Any] = [
    "text", 5, 1.5, math.nan, True, None, b"ab", Colour.RED, datetime.date(2026, 5, 1),
    [1, [2]], {"a": {"b": [1]}}, {1, 2}, frozenset({1}), (1, [2]), Pair(1, [2]), deque([1, 2]), OrderedDict(a=1),
    Model(items=[1]), Point(1, ["a"]), Plain(1, [2]), Slotted(1, [2]), [Model(), Plain("x")],
]  # fmt: skip


@pytest.mark.parametrize("value", VALUES, ids=lambda value: type(value).__name__)
def test_a_copy_is_untouched_until_it_is_touched(value: Any) -> None:
    other = copied(value)
    assert is_untouched(other, value)
    assert is_untouched(value, value)
    assert is_untouched(copied_arguments({"x": value}), {"x": value})


@pytest.mark.parametrize(
    ("value", "other"),
    [
        ([1, [2]], [1, [2, 3]]),
        ([1], [True]),
        ([1], [1.0]),
        ({"a": 1}, {"a": 1, "b": 2}),
        ({"a": [1]}, {"a": [True]}),
        ({1}, {True}),
        ((1,), [1]),
        ("red", Colour.RED),
        (Model(items=[1]), Model(items=[2])),
        (Point(1), Point(2)),
        (Plain(1, [2]), Plain(1, [3])),
        (Plain(1), Slotted(1)),
        (Slotted([1]), Slotted([2])),
        (Pair(1, [2]), Pair(1, [3])),
        (Pair(1, [2]), (1, [2])),
        (Touchy(), Touchy()),
        (math.nan, 1.0),
        (threading.Lock(), threading.Lock()),
    ],
    ids=lambda value: type(value).__name__,
)
def test_what_was_touched_or_has_another_type_is_known(value: Any, other: Any) -> None:
    assert not is_untouched(value, other)
    assert not is_untouched([value], [other])


def test_copies_share_nothing_that_can_change() -> None:
    value = {"list": [1, {"a": [2]}], "model": Model(items=[1]), "point": Point(1, ["a"]), "set": {1}}
    kept = copy.deepcopy(value)
    other = copied_arguments(value)
    other["list"][1]["a"].append(3)
    other["model"].items.append(2)
    other["point"].tags.clear()
    other["set"].add(2)
    del other["list"]
    assert value == kept


def test_what_cannot_be_copied_is_the_thing_itself_and_spoils_nothing_beside_it() -> None:
    lock, items = threading.Lock(), [1]
    other = copied_arguments({"lock": lock, "items": items})
    assert other["lock"] is lock
    assert other["items"] == items
    assert other["items"] is not items
    assert copied_arguments("no arguments at all") == "no arguments at all"


def test_a_record_copies_containers_and_shares_objects() -> None:
    model = Model()
    value: dict[str, Any] = {"items": [1, [2]], "more": {"a": [1]}, "kinds": {1}, "model": model, "models": [model]}
    record = recorded(value)
    value["items"][1].append(3)
    value["more"]["a"].clear()
    value["kinds"].clear()
    assert record == {"items": [1, [2]], "more": {"a": [1]}, "kinds": {1}, "model": model, "models": [model]}
    assert record["models"][0] is record["model"] is model


def test_arguments_that_cannot_change_are_their_own_record() -> None:
    value = {"text": "a", "number": 5, "day": datetime.date(2026, 5, 1), "nothing": None}
    assert recorded(value) is value


def test_what_contains_itself_is_no_error() -> None:
    loop: list[Any] = []
    loop.append(loop)
    assert recorded({"x": loop}) == {"x": loop}
    other = copied(loop)
    assert other is not loop
    assert other[0] is other
    assert not is_untouched(loop, other), "rather checked once more than compared for ever"
