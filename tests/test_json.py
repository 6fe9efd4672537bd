"""How Python values are written for the wire, and what a model sees of them."""

import dataclasses
import datetime as dt
import enum
import json
import math
import re
import uuid
from collections import deque
from decimal import Decimal
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from hypothesis import given, settings, strategies as st
from pydantic import BaseModel

from fractal._json import decode, encode, jsonable, text_of
from fractal._texts import clean_text
from tests.support import shown

# Hypothesis leaves surrogates out of its texts unless told otherwise.
any_text = st.text(st.characters(codec=None, categories=None) | st.sampled_from("\ud83d\ude00\ud800\udfff\ufeff\x00"))
json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | any_text,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(any_text, inner, max_size=3),
    max_leaves=8,
)


class Colour(enum.Enum):
    RED = "red"


class Word(enum.StrEnum):
    YES = "yes"


class Person(BaseModel):
    name: str
    born: dt.date | None = None


class Pair(NamedTuple):
    a: int
    b: str


@dataclasses.dataclass
class Point:
    x: int
    y: int = 2


class Opaque:
    def __str__(self) -> str:
        return "an opaque thing"


class Lines:
    def __str__(self) -> str:
        return "city people\nRome 2800000"


class Unspeakable:
    def __str__(self) -> str:
        raise AttributeError("nobody has set it")


class Text(str):
    __slots__ = ()

    def __str__(self) -> str:
        return "something else"


class TextColour(str, enum.Enum):  # noqa: UP042  # not as StrEnum: its str() is no value
    RED = "red"


@dataclasses.dataclass
class Held:
    it: Any


class HeldByModel(BaseModel):
    it: Any


def strict(data: bytes | str) -> Any:
    """Read JSON that has nothing in it that JSON has not."""

    def refuse(word: str) -> None:
        pytest.fail(f"{word} is not JSON")

    return json.loads(data, parse_constant=refuse)


def expected_clean(text: str) -> str:
    paired = re.sub(
        "[\ud800-\udbff][\udc00-\udfff]",
        lambda m: chr(0x10000 + ((ord(m[0][0]) - 0xD800) << 10) + ord(m[0][1]) - 0xDC00),
        text,
    )
    return re.sub("[\ud800-\udfff]", "\ufffd", paired)


@settings(deadline=None)
@given(any_text)
def test_only_lone_surrogates_are_replaced(text: str) -> None:
    assert clean_text(text) == expected_clean(text)


def test_text_without_surrogates_is_not_copied() -> None:
    text = "plain \x00 text 😀" * 10
    assert clean_text(text) is text


@pytest.mark.parametrize(
    ("text", "clean"),
    [
        ("\ud83d\ude00", "😀"),
        ("\ud83d", "\ufffd"),
        ("\ude00a", "\ufffda"),
        ("\ud83dab", "\ufffdab"),
        ("\ufeff\ud800", "\ufeff\ufffd"),
        ("\x00\ud800\x00", "\x00\ufffd\x00"),
        ("😀\ud83d\ud83d\ude00", "😀\ufffd😀"),
    ],
)
def test_halves_of_a_pair_are_joined_and_what_is_alone_is_replaced(text: str, clean: str) -> None:
    assert clean_text(text) == clean


@settings(deadline=None)
@given(json_values)
def test_what_is_encoded_is_json_in_utf_8_and_comes_back_but_for_lone_surrogates(value: Any) -> None:
    def cleaned(value: Any) -> Any:
        match value:
            case str():
                return clean_text(value)
            case list():
                return [cleaned(item) for item in value]
            case dict():
                return {clean_text(key): cleaned(item) for key, item in value.items()}
            case _:
                return value

    assert decode(encode(value)) == cleaned(value)


def test_what_is_encoded_is_compact() -> None:
    assert encode({"a": [1, 2], "ü": None}) == '{"a":[1,2],"ü":null}'.encode()


def test_values_that_are_not_json_are_encoded_in_their_json_form() -> None:
    value = {"p": Person(name="Ada"), "d": dt.date(2024, 5, 6), "s": {1}, "o": Opaque(), "point": Point(1)}
    assert strict(encode(value)) == {
        "p": {"name": "Ada", "born": None},
        "d": "2024-05-06",
        "s": [1],
        "o": "an opaque thing",
        "point": {"x": 1, "y": 2},
    }


@pytest.mark.parametrize("number", [math.inf, -math.inf, math.nan])
def test_a_number_that_json_does_not_have_never_reaches_the_wire(number: float) -> None:
    assert isinstance(strict(encode({"x": number}))["x"], str | None)


@pytest.mark.parametrize("text", ["", "{", "nope", "{'a': 1}", b"\xff\xfe\xfa"])
def test_what_is_not_json_is_a_value_error(text: str | bytes) -> None:
    with pytest.raises(ValueError):  # noqa: PT011  # JSONDecodeError or UnicodeDecodeError
        decode(text)


def test_json_too_deep_to_read_is_a_value_error_too() -> None:
    with pytest.raises(ValueError):  # noqa: PT011
        decode("[" * 100_000)


CASES: list[tuple[Any, Any]] = [
    (None, None),
    (True, True),
    (5, 5),
    (1.5, 1.5),
    ([1, "a", None], [1, "a", None]),
    ((1, 2), [1, 2]),
    ({"a": {"b": []}}, {"a": {"b": []}}),
    ({1: "a"}, {"1": "a"}),
    ({dt.date(2024, 5, 6): 1}, {"2024-05-06": 1}),
    ({3}, [3]),
    (frozenset({3}), [3]),
    (Person(name="Ada", born=dt.date(1815, 12, 10)), {"name": "Ada", "born": "1815-12-10"}),
    ([Person(name="Ada")], [{"name": "Ada", "born": None}]),
    ({"who": Person(name="Ada")}, {"who": {"name": "Ada", "born": None}}),
    (Point(1), {"x": 1, "y": 2}),
    (Pair(1, "b"), [1, "b"]),
    (Colour.RED, "red"),
    (dt.date(2024, 5, 6), "2024-05-06"),
    (dt.datetime(2024, 5, 6, 7, 8, tzinfo=dt.UTC), "2024-05-06T07:08:00Z"),
    (dt.timedelta(seconds=90), "PT1M30S"),
    (Decimal("1.50"), "1.50"),
    (uuid.UUID(int=1), "00000000-0000-0000-0000-000000000001"),
    (Path("/tmp/x"), "/tmp/x"),
    ({"o": [Opaque()]}, {"o": ["an opaque thing"]}),
    (10**30, 10**30),
    ("ü😀\x00\n", "ü😀\x00\n"),
]


BYTES = [b"hello", b"caf\xc3\xa9", b"\xff\xfe", b"", bytearray(b"\xff"), memoryview(b"ab"), memoryview(b"\xff\x00")]


@pytest.mark.parametrize(
    "around",
    [
        lambda it: {"a": it},
        lambda it: [1, it],
        lambda it: (it, "x"),
        lambda it: {"a": [{"b": it}]},
        lambda it: deque([it]),
        lambda it: Held(it),
        lambda it: [Held(it), b"\xff"],
        lambda it: HeldByModel(it=it),
        lambda it: Pair(1, it),
        lambda it: {"a": it, "lone": "\ud800"},
        lambda it: {"a": it, "b": Opaque(), "c": dt.date(2024, 5, 6)},
    ],
    ids=["dict", "list", "tuple", "deep", "deque", "dataclass", "beside", "model", "named", "surrogate", "others"],
)
@pytest.mark.parametrize("value", BYTES, ids=lambda value: f"{type(value).__name__} {bytes(value)!r}")
def test_bytes_are_shown_by_one_rule_wherever_they_stand(value: Any, around: Any) -> None:
    text = text_of(value)
    assert text == text_of(bytes(value))

    def found(part: Any) -> bool:
        inner = part.values() if isinstance(part, dict) else part if isinstance(part, list) else ()
        return part == text or any(map(found, inner))

    assert found(strict(text_of(around(value)))), text_of(around(value))


def test_keys_of_any_kind_are_text() -> None:
    assert strict(text_of({b"\xff": 1, b"a": 2, None: 3, (1, 2): 4, 5: 6})) == {
        "/w==": 1,
        "a": 2,
        "null": 3,
        "[1,2]": 4,
        "5": 6,
    }


@pytest.mark.parametrize(("value", "form"), CASES, ids=shown)
def test_a_value_has_the_same_json_form_for_results_and_for_the_model(value: Any, form: Any) -> None:
    assert jsonable(value) == form
    assert strict(text_of(value) if not isinstance(form, str) or value != form else json.dumps(value)) == form


@pytest.mark.parametrize(
    ("value", "text"),
    [
        ("as it is", "as it is"),
        ('{"already": "json"}', '{"already": "json"}'),
        ("", ""),
        ("NUL \x00", "NUL \x00"),
        ("lone \ud800", "lone \ufffd"),
        (Word.YES, "yes"),
        (b"caf\xc3\xa9", "café"),
        (bytearray(b"ab"), "ab"),
        (memoryview(b"ab"), "ab"),
        (memoryview(b"\xff\xfe"), "//4="),
        (Opaque(), "an opaque thing"),
        (Lines(), "city people\nRome 2800000"),
        ([Lines()], '["city people\\nRome 2800000"]'),
        (Text("a"), "a"),
        (TextColour.RED, "red"),
        ({"a": Text("b"), Text("c"): TextColour.RED}, '{"a":"b","c":"red"}'),
        (range(3), "[0,1,2]"),
        ({"a": range(2)}, '{"a":[0,1]}'),
        ({1: 2}.items(), "[[1,2]]"),
        ([{1: 2}.keys(), {1: 2}.values()], "[[1],[2]]"),
        (Unspeakable(), "Unspeakable"),
        ([Unspeakable(), 1], '["Unspeakable",1]'),
        ({"a": Unspeakable(), "b": b"\xff\xfe"}, '{"a": "Unspeakable", "b": "//4="}'),
        (b"\xff\xfe", "//4="),
        (None, "null"),
        (True, "true"),
        ({"ü": "😀"}, '{"ü":"😀"}'),
        ([], "[]"),
    ],
)
def test_the_model_sees_text_as_it_is_and_the_rest_as_json(value: Any, text: str) -> None:
    assert text_of(value) == text


def test_a_value_with_lone_surrogates_inside_is_shown_without_them() -> None:
    shown = text_of({"who": Person(name="Ada"), "text": "\ud800"})
    assert strict(shown) == {"who": {"name": "Ada", "born": None}, "text": "\ufffd"}


def test_a_value_that_contains_itself_is_shown_somehow() -> None:
    loop: list[Any] = [1]
    loop.append(loop)
    assert text_of(loop) == "[1, [...]]"


def test_a_value_nested_too_deep_for_json_is_shown_somehow() -> None:
    deep: list[Any] = []
    for _ in range(100_000):
        deep = [deep]
    assert isinstance(text_of(deep), str)


@settings(deadline=None)
@given(json_values)
def test_whatever_the_model_is_shown_can_be_sent(value: Any) -> None:
    text_of(value).encode()


def test_a_huge_text_is_not_copied() -> None:
    text = "x" * 5_000_000
    assert text_of(text) is text
