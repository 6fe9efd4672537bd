"""Objects from JSON that is still being written: what is shown of them, and that it only grows."""

import dataclasses
import datetime as dt
import enum
import itertools
import json
import uuid
from collections import deque
from collections.abc import Callable, Iterator
from decimal import Decimal
from typing import Annotated, Any, Literal, NamedTuple

import anyio
import pydantic.dataclasses
import pytest
from hypothesis import given, settings, strategies as st
from pydantic import (
    AfterValidator,
    AliasChoices,
    AliasPath,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Discriminator,
    Field,
    JsonValue,
    PrivateAttr,
    RootModel,
    Tag,
    TypeAdapter,
    ValidationInfo,
    field_validator,
    model_validator,
)
from typing_extensions import TypedDict

from fractal import BaseAgent, ModelRequest, Reply
from fractal._answers.output import OutputFault, OutputType, output_for
from fractal._answers.partial import NOTHING, PartialReader
from tests.support import assert_linear


class Address(BaseModel):
    street: str
    number: int = 1


class Person(BaseModel):
    name: str
    born: dt.date | None = None
    home: Address | None = None
    tags: list[str] = []


class Node(BaseModel):
    value: int
    children: "list[Node]" = []


class Cat(BaseModel):
    kind: Literal["cat"]
    name: str


class Dog(BaseModel):
    kind: Literal["dog"]
    name: str
    tricks: list[str] = []


class Circle(BaseModel):
    centre: str
    radius: float


class Square(BaseModel):
    centre: str
    side: float


@dataclasses.dataclass
class Point:
    x: int
    y: int = 0
    label: str = ""
    next: "Point | None" = None


@dataclasses.dataclass(frozen=True, slots=True)
class Frozen:
    a: int
    b: str


class Options(TypedDict, total=False):
    depth: int
    word: str
    inner: "Options"


class Pair(NamedTuple):
    a: int
    b: str = "x"


class Names(RootModel[list[str]]):
    pass


class Colour(enum.Enum):
    RED = "red"
    REDDER = "redder"


Pet = Annotated[Cat | Dog, Field(discriminator="kind")]


def output(kind: Any) -> OutputType:
    found = output_for(kind)
    assert found is not None
    return found


def looks(kind: Any, text: str, size: int = 1) -> Iterator[Any]:
    """What is shown while a text arrives in pieces."""
    reader = PartialReader(output(kind))
    for start in range(0, len(text), size):
        shown = reader.feed(text[start : start + size])
        if shown is not NOTHING:
            yield shown


def look(kind: Any, text: str) -> Any:
    """What is shown of a text that is not complete, fed in pieces of one character."""
    shown = [NOTHING, *looks(kind, text)][-1]
    # However the text is cut, what is shown of it is the same.
    assert plain(shown) == plain([NOTHING, *looks(kind, text, 7)][-1])
    assert plain(shown) == plain([NOTHING, *looks(kind, text, len(text) or 1)][-1])
    return shown


def plain(value: Any) -> Any:
    """A value that equals only one of the same types."""
    if isinstance(value, BaseModel):
        return type(value), {name: plain(inner) for name, inner in value.__dict__.items()}, value.model_fields_set
    if dataclasses.is_dataclass(value):
        return type(value), {f.name: plain(getattr(value, f.name)) for f in dataclasses.fields(value)}
    if isinstance(value, dict):
        return {key: plain(inner) for key, inner in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value), [plain(inner) for inner in value]
    return type(value), value


# ---- what is shown


def test_a_model_grows_field_by_field_and_letter_by_letter() -> None:
    text = '{"name": "Ad\\u00e9", "born": "2024-05-06", "home": {"street": "Hi", "number": 12}, "tags": ["a"]}'
    shown = list(looks(Person, text))

    assert [(one.name, one.born, one.home and (one.home.street, one.home.number), one.tags) for one in shown] == [
        (None, None, None, []),
        ("", None, None, []),
        ("A", None, None, []),
        ("Ad", None, None, []),
        ("Adé", None, None, []),
        ("Adé", dt.date(2024, 5, 6), None, []),
        ("Adé", dt.date(2024, 5, 6), (None, 1), []),
        ("Adé", dt.date(2024, 5, 6), ("", 1), []),
        ("Adé", dt.date(2024, 5, 6), ("H", 1), []),
        ("Adé", dt.date(2024, 5, 6), ("Hi", 1), []),
        ("Adé", dt.date(2024, 5, 6), ("Hi", 12), []),
        ("Adé", dt.date(2024, 5, 6), ("Hi", 12), [""]),
        ("Adé", dt.date(2024, 5, 6), ("Hi", 12), ["a"]),
        ("Adé", dt.date(2024, 5, 6), ("Hi", 12), ["a"]),  # complete, and validated as a whole
    ]
    assert {type(one) for one in shown} == {Person}


def test_fields_that_have_not_arrived_are_not_set() -> None:
    assert look(Person, '{"name": "A').model_fields_set == {"name"}
    assert look(Person, '{"').model_fields_set == set()


@pytest.mark.parametrize(
    ("kind", "text", "shown"),
    [
        (Person, "", NOTHING),
        (Person, "Let me see", NOTHING),
        (Person, '"name', NOTHING),
        (list[Person], '{"res', NOTHING),
        (list[int], '{"result": [1, 2', [1]),
        (list[int], '{"result": [1, 2 ', [1, 2]),
        (list[int], '{"result": [1, 2, ', [1, 2]),
        (list[int], '{"result": [1, "x", 3,', [1, 3]),
        (list[int], "[1, 2,", [1, 2]),
        (list[str], '{"result": ["ab', ["ab"]),
        (list[str], '{"result": ["ab\\', ["ab"]),
        (list[str], '{"result": ["ab\\u00', ["ab"]),
        (list[str], '{"result": ["\\\\u00', ["\\u00"]),
        (list[str], '{"result": ["\\ud83d', [""]),
        (list[str], '{"result": ["\\ud83d\\ude0', [""]),
        (list[str], '{"result": ["\\ud83d\\ude00', ["😀"]),
        (list[str], '{"result": ["a\n', []),  # no valid JSON
        (list[bool], '{"result": [tru', []),
        (list[bool], '{"result": [true,', [True]),
        (list[None], '{"result": [null ', [None]),
        (list[float], '{"result": [1.5e', []),
        (list[Colour], '{"result": ["red', []),
        (list[Colour], '{"result": ["red"', [Colour.RED]),
        (list[Literal["a", "ab"]], '{"result": ["a', []),
        (list[dt.datetime], '{"result": ["2024-01-01T10:00', []),
        (list[Annotated[str, Field(pattern="^(a|abc)$")]], '{"result": ["a', []),
        (list[Annotated[str, Field(min_length=2)]], '{"result": ["a', []),
        (list[Annotated[str, Field(min_length=2)]], '{"result": ["ab', ["ab"]),
        (list[uuid.UUID], '{"result": ["00000000-0000', []),
        (list[Decimal], '{"result": ["1.5', []),
        (list[list[int]], '{"result": [[1, 2], [3, 4', [[1, 2], [3]]),
        (set[str], '{"result": ["ab", "c', {"ab"}),
        (frozenset[str], '{"result": ["ab", "c', frozenset({"ab"})),
        (tuple[int, ...], '{"result": [1, 2,', (1, 2)),
        (tuple[int, str], '{"result": [1, "a', (1, "a")),
        (tuple[int, str, int], '{"result": ["x", "a', ()),
        (Pair, '{"result": [1, "a', Pair(1, "a")),
        (Pair, '{"result": [1,', Pair(1, "x")),
        (Pair, '{"result": [', Pair(None, "x")),  # type: ignore[arg-type]
        (dict[str, int], '{"a": 1, "b": 2', {"a": 1}),
        (dict[str, int], '{"a": 1, "b', {"a": 1}),
        (dict[int, str], '{"1": "a", "2": "b', {1: "a", 2: "b"}),
        (dict[int, str], '{"x": "a", "2": "b', {2: "b"}),
        (dict[str, list[str]], '{"a": ["x', {"a": ["x"]}),
        (dict[str, list[int]], '{"a": {"b": 1, ', {}),
        (dict[str, set[int]], '{"a": {"b": 1, ', {}),
        (dict[str, dict[str, int]], '{"a": [1, ', {}),
        (dict[str, Pet], '{"a": [1, ', {}),
        (Options, '{"depth": 1, "word": "a', {"depth": 1, "word": "a"}),
        (Options, '{"inner": {"inner": {"word": "a', {"inner": {"inner": {"word": "a"}}}),
        (Point, "{", NOTHING),
        (Point, '{"x"', Point(None)),  # type: ignore[arg-type]
        (Point, '{"x": 1, "next": {"x": 2, "label": "a', Point(1, next=Point(2, label="a"))),
        (Frozen, '{"a": 1, "b": "x', Frozen(1, "x")),
        (Names, '{"result": ["a", "b', Names(["a", "b"])),
        (Any, '{"result": {"a": [1, {"b": "x', {"a": [1, {"b": "x"}]}),
        (dict[str, Any], '{"a": [1, {"b": "x', {"a": [1, {"b": "x"}]}),
        (JsonValue, '{"result": ["x', ["x"]),
        (Person | None, '{"result": {"name": "A', Person.model_construct({"name"}, name="A")),
        (Person | None, '{"result": nul', NOTHING),
        (str | None, '{"result": "a', "a"),
        (int | str, '{"result": "1', "1"),
        (int, '{"result": 12', NOTHING),
        (int, '{"result": 12 ', 12),
        (Colour, '{"result": "red', NOTHING),
        (Annotated[str, Field(max_length=9)], '{"result": "ab', "ab"),
    ],
    ids=repr,
)
def test_what_is_shown_of_a_text_that_is_not_complete(kind: Any, text: str, shown: Any) -> None:
    assert plain(look(kind, text)) == plain(shown)


@pytest.mark.parametrize("size", [1, 3, 1000])
@pytest.mark.parametrize(
    "around", ["{}", "```json\n{}\n```", "Here it is [as said]: {} and {{more}}", "\ufeff\n{}\n", '{}{{"name": 1}}']
)
def test_only_the_json_counts_not_what_is_around_it(around: str, size: int) -> None:
    text = '{"name": "Ada", "tags": ["a"]}'
    shown = list(looks(Person, around.format(text) if "{}" in around else around, size))
    assert shown[-1] == Person(name="Ada", tags=["a"])
    assert all(one.name is None or "Ada".startswith(one.name) for one in shown)


def test_a_number_is_shown_when_it_cannot_go_on() -> None:
    assert list(looks(list[int], '{"result": [1, 120, -5]}')) == [[], [1], [1, 120], [1, 120, -5], [1, 120, -5]]


def test_a_field_that_does_not_fit_is_left_out_until_the_end() -> None:
    reader = PartialReader(output(Person))
    shown = reader.feed('{"born": "soon", "home": {"street": 5}, "name": "A')
    assert (shown.born, shown.home, shown.name) == (None, None, "A")
    assert reader.feed('da"}') is NOTHING


def test_a_string_that_is_too_long_is_not_shown_any_more() -> None:
    class Short(BaseModel):
        word: str = Field("none", max_length=2)

    assert [one.word for one in looks(Short, '{"word": "abc')] == ["none", "", "a", "ab", "none"]


def test_of_a_key_that_comes_twice_the_last_value_counts() -> None:
    assert look(dict[str, int], '{"a": 1, "a": 2, ') == {"a": 2}
    assert look(dict[str, int], '{"a": 1, "a": "x", ') == {}


def test_a_null_that_leaves_a_field_out_is_its_default() -> None:
    shown = list(looks(Address, '{"street": "High", "number": null}'))
    assert {one.number for one in shown} == {1}
    assert shown[-1] == Address(street="High")


def test_nothing_is_shown_twice() -> None:
    reader = PartialReader(output(Person))
    assert reader.feed('{"name": "A').name == "A"
    assert reader.feed("") is NOTHING
    assert reader.feed('", "bor') is NOTHING
    assert reader.feed('n": "2024-01-0') is NOTHING
    assert reader.feed('1"').born == dt.date(2024, 1, 1)


def test_what_was_shown_stays_as_it_was() -> None:
    reader = PartialReader(output(list[list[str]]))
    first = reader.feed('{"result": [["a", "b')
    second = reader.feed('c"], ["d')
    assert (first, second) == ([["a", "b"]], [["a", "bc"], ["d"]])


def test_after_the_end_nothing_comes() -> None:
    reader = PartialReader(output(list[int]))
    assert reader.feed('{"result": [1]} {"result": [2]}') == [1]
    assert reader.feed(' {"result": [3]}') is NOTHING


@pytest.mark.parametrize(
    "rest", ["]", "x", '": ', ",,", '"\x01"}', ": }", "NaN, ", "01, ", "+1, ", "tru, ", '"a" "b"}']
)
def test_after_a_mistake_in_the_json_nothing_comes(rest: str) -> None:
    reader = PartialReader(output(dict[str, Any]))
    assert reader.feed('{"a": 1, "b": ') == {"a": 1}
    reader.feed(rest)
    assert reader.feed('"c": 2, "d": {"e": 1}') is NOTHING
    assert reader.feed("}") is NOTHING


def test_defaults_are_made_once_and_stay_the_same() -> None:
    class Ids(BaseModel):
        id: uuid.UUID = Field(default_factory=uuid.uuid4)
        seen: list[str] = Field(default_factory=list)
        name: str = ""

    shown = list(looks(Ids, '{"name": "Ada'))
    assert len({one.id for one in shown}) == 1
    assert shown[-1].seen == []


def test_a_default_that_cannot_be_made_is_none() -> None:
    def fails() -> int:
        raise OSError("no")

    class Failing(BaseModel):
        number: int = Field(default_factory=fails)
        name: str

    assert plain(look(Failing, '{"name": "A')) == plain(Failing.model_construct({"name"}, number=None, name="A"))


# ---- unions


def test_a_member_of_a_tagged_union_is_shown_once_the_tag_is_there() -> None:
    assert look(list[Pet], '{"result": [{"name": "Tom", "kind": "ca') == []
    assert look(list[Pet], '{"result": [{"name": "Tom", "kind": "cat"') == [Cat(kind="cat", name="Tom")]
    assert look(list[Pet], '{"result": [{"kind": "dog", "name": "R')[0].name == "R"
    assert look(list[Pet], '{"result": [{"kind": "cow", "name": "R') == []
    assert look(list[Pet], '{"result": [{"kind": ' + "1" * 6000 + ', "name": "R') == []
    assert look(list[Pet], '{"result": [{"kind": [], "name": "R') == []
    assert look(list[Pet], '{"result": [{"kind": "dog", "name": "R"}, {"kind": "cat", "na')[1].kind == "cat"


def test_a_tag_may_be_an_enum() -> None:
    class Red(BaseModel):
        colour: Literal[Colour.RED]
        a: str

    class Redder(BaseModel):
        colour: Literal[Colour.REDDER]
        a: str

    kind = Annotated[Red | Redder, Field(discriminator="colour")]
    assert isinstance(look(kind, '{"result": {"colour": "redder", "a": "x'), Redder)


def test_a_member_of_a_plain_union_is_shown_once_it_can_be_only_one() -> None:
    kind = Circle | Square
    assert look(kind, '{"result": {"centre": "a"') is NOTHING
    assert isinstance(look(kind, '{"result": {"centre": "a", "side": 1'), Square)
    assert look(kind, '{"result": {"centre": "a", "side": 1').side is None
    assert look(Cat | Dog, '{"result": {"kind": "dog", "name": "Re').name == "Re"
    assert look(Cat | Dog, '{"result": {"name": "Re') is NOTHING


def test_a_union_of_different_kinds_of_json_is_told_by_its_first_letter() -> None:
    kind = Person | list[str] | int | str | None
    assert look(kind, '{"result": {"').name is None
    assert look(kind, '{"result": ["a') == ["a"]
    assert look(kind, '{"result": "a') == "a"
    assert look(kind, '{"result": 1') is NOTHING


def test_a_string_that_may_become_something_else_is_not_shown() -> None:
    assert look(dt.date | str, '{"result": "2024') is NOTHING
    assert look(Colour | str, '{"result": "re') is NOTHING
    assert look(str | Colour, '{"result": "re') is NOTHING
    assert look(Pet | str, '{"result": "re') == "re"
    assert look(Annotated[Person | Address, Field(description="d")] | str, '{"result": "re') == "re"
    assert look(Annotated[int | str, Field(union_mode="left_to_right")], '{"result": "1') is NOTHING
    assert look(Person | str, '{"result": "re') == "re"


def test_as_long_as_one_member_cannot_be_told_none_is_shown() -> None:
    def same(value: Any) -> Any:
        return value

    changed = Annotated[dict[str, Any], BeforeValidator(same)]
    assert look(Pet | Person, '{"result": {"name": "Tom", ') is NOTHING
    assert look(Pet | Person, '{"result": {"name": "Tom", "kind": "cat", ').kind == "cat"
    assert look(changed | Person, '{"result": {"name": "Tom", ') is NOTHING
    assert look(changed, '{"result": {"name": "Tom", ') is NOTHING


def test_a_union_told_by_a_function_is_shown_when_it_is_complete() -> None:
    kind = Annotated[Annotated[Cat, Tag("c")] | Annotated[Dog, Tag("d")], Discriminator(lambda value: value["kind"][0])]
    text = '[{"kind": "dog", "name": "Rex"}, {"kind": "cat", "name": "T'
    assert look(list[kind], text) == [Dog(kind="dog", name="Rex")]


def test_a_model_that_forbids_others_fields_is_out_when_one_comes() -> None:
    class Closed(BaseModel):
        model_config = ConfigDict(extra="forbid")
        a: int
        b: int = 0

    class Wide(BaseModel):
        a: int
        c: str

    assert look(Closed | Wide, '{"result": {"a": 1, ') is NOTHING
    assert isinstance(look(Closed | Wide, '{"result": {"a": 1, "d"'), Wide)


# ---- models with minds of their own


def test_aliases_are_the_keys() -> None:
    class Aliased(BaseModel):
        first: str = Field(alias="First name")
        second: str = Field("s", validation_alias=AliasChoices("b", "B", AliasPath("c", 0)))
        third: str = Field("t", validation_alias=AliasPath("e", 1))

    shown = look(Aliased, '{"First name": "A", "B": "x", "c": ["y", "z"], "d')
    assert (shown.first, shown.second, shown.third) == ("A", "x", "t")
    assert shown.model_fields_set == {"first", "second"}
    assert look(Aliased, '{"first": "A').first is None


def test_names_are_keys_too_where_the_model_says_so() -> None:
    class Both(BaseModel):
        model_config = ConfigDict(validate_by_name=True, validate_by_alias=True)
        first: str = Field(alias="1st")

    class ByName(BaseModel):
        model_config = ConfigDict(validate_by_name=True, validate_by_alias=False)
        first: str = Field(alias="1st")

    assert [look(kind, '{"first": "A').first for kind in (Both, ByName)] == ["A", "A"]
    assert [look(kind, '{"1st": "A').first for kind in (Both, ByName)] == ["A", None]


def test_an_alias_may_be_the_name_of_another_field() -> None:
    class Crossed(BaseModel):
        a: int = Field(alias="b")
        b: int = Field(alias="a")
        c: str = "c"

    shown = look(Crossed, '{"a": 1, "b": 2, "c": "')
    assert (shown.a, shown.b) == (2, 1)


def test_settings_of_a_model_hold_for_its_fields() -> None:
    class Strict(BaseModel):
        model_config = ConfigDict(strict=True, str_to_upper=True, frozen=True)
        number: int
        name: str

    shown = look(Strict, '{"number": "5", "name": "ab')
    assert (shown.number, shown.name) == (None, "AB")


def test_validators_see_values_that_are_complete() -> None:
    seen: list[Any] = []

    def note(value: str) -> str:
        seen.append(value)
        return value.upper()

    class Watched(BaseModel):
        name: Annotated[str, AfterValidator(note)]
        raw: Annotated[str, BeforeValidator(note)] = ""
        number: int = 0

        @field_validator("number")
        @classmethod
        def double(cls, value: int) -> int:
            return 2 * value

    assert look(Watched, '{"name": "ab').name == "ab"
    assert look(Watched, '{"raw": "ab').raw == ""
    assert seen == []
    shown = look(Watched, '{"name": "ab", "raw": "cd", "number": 4, ')
    assert (shown.name, shown.raw, shown.number) == ("AB", "CD", 8)
    assert set(seen) == {"ab", "cd"}


def test_a_complete_value_is_validated_once_for_each_value_around_it() -> None:
    seen: list[str] = []

    class Inner(BaseModel):
        name: Annotated[str, AfterValidator(seen.append)]
        more: str

    class Outer(BaseModel):
        inner: Inner
        more: str

    list(looks(Outer, '{"inner": {"name": "ab", "more": "and more"}, "more": "and more"}'))
    assert seen == ["ab", "ab", "ab"]


def test_validators_of_the_whole_see_the_whole_only() -> None:
    class Checked(BaseModel):
        a: str
        b: int

        @model_validator(mode="before")
        @classmethod
        def before(cls, data: Any) -> Any:
            assert set(data) == {"a", "b"}
            return data

        @model_validator(mode="after")
        def after(self) -> "Checked":
            assert self.b > 0
            return self

    assert [(one.a, one.b) for one in looks(Checked, '{"a": "x", "b": 1}')] == [
        (None, None),
        ("", None),
        ("x", None),
        ("x", 1),
    ]


def test_a_validator_that_needs_the_other_fields_waits_for_the_end() -> None:
    class Dependent(BaseModel):
        low: int
        high: int

        @field_validator("high")
        @classmethod
        def above(cls, value: int, info: ValidationInfo) -> int:
            assert value > info.data["low"]
            return value

    assert [(one.low, one.high) for one in looks(Dependent, '{"low": 1, "high": 2}')] == [
        (None, None),
        (1, None),
        (1, 2),
    ]


def test_a_model_that_cannot_be_half_is_shown_when_it_is_whole() -> None:
    class Eager(BaseModel):
        name: str
        _length: int = PrivateAttr(0)

        def model_post_init(self, context: Any) -> None:
            self._length = len(self.name)

    shown = list(looks(Eager, '{"name": "ab"}'))
    assert shown[-1]._length == 2
    assert [one.name for one in shown] == ["", "a", "ab", "ab"]


def test_private_attributes_have_their_defaults() -> None:
    class Private(BaseModel):
        name: str
        _count: int = PrivateAttr(3)

    assert look(Private, '{"name": "a')._count == 3


def test_a_dataclass_is_put_together_without_its_init() -> None:
    @pydantic.dataclasses.dataclass
    class Loud:
        name: str
        size: int = dataclasses.field(init=False)

        def __post_init__(self) -> None:
            self.size = len(self.name)

    shown = list(looks(Loud, '{"name": "ab"}'))
    assert [(one.name, one.size) for one in shown] == [(None, None), ("", None), ("a", None), ("ab", None), ("ab", 2)]


def test_comparing_may_fail() -> None:
    class Touchy(BaseModel):
        name: str

        def __eq__(self, other: object) -> bool:
            raise RuntimeError("no")

    assert [one.name for one in looks(Touchy, '{"name": "a"}')][-1] == "a"


def test_very_deep_values_are_shown_as_far_as_it_is_safe() -> None:
    text = '{"a": ' + "[" * 5000 + "1, "
    reader = PartialReader(output(dict[str, Any]))
    shown = reader.feed(text)["a"]
    depth = 0
    while shown:
        (shown,), depth = shown, depth + 1
    assert 20 < depth < 200
    assert reader.feed("]" * 5000) is NOTHING


def test_a_number_without_end_is_not_waited_for() -> None:
    reader = PartialReader(output(dict[str, Any]))
    assert reader.feed('{"a": ') == {}
    for _ in range(200):
        assert reader.feed("1" * 100) is NOTHING
    assert reader.feed(', "b": "x') is NOTHING


# ---- whatever comes

TEXTS = st.text(max_size=8)
ADDRESSES = st.builds(Address, street=TEXTS, number=st.integers())
PEOPLE = st.builds(
    Person, name=TEXTS, born=st.none() | st.dates(), home=st.none() | ADDRESSES, tags=st.lists(TEXTS, max_size=3)
)
NODES: st.SearchStrategy[Node] = st.recursive(
    st.builds(Node, value=st.integers()),
    lambda inner: st.builds(Node, value=st.integers(), children=st.lists(inner, max_size=2)),
    max_leaves=5,
)
POINTS: st.SearchStrategy[Point] = st.recursive(
    st.builds(Point, x=st.integers(), label=TEXTS),
    lambda inner: st.builds(Point, x=st.integers(), next=inner),
    max_leaves=3,
)
CATS = st.builds(Cat, kind=st.just("cat"), name=TEXTS)
DOGS = st.builds(Dog, kind=st.just("dog"), name=TEXTS, tricks=st.lists(TEXTS, max_size=2))
FLOATS = st.floats(allow_nan=False, allow_infinity=False)
JSON: st.SearchStrategy[Any] = st.recursive(
    st.none() | st.booleans() | st.integers() | FLOATS | TEXTS,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TEXTS, inner, max_size=3),
    max_leaves=8,
)
VALUES: dict[Any, st.SearchStrategy[Any]] = {
    Person: PEOPLE,
    Node: NODES,
    Point: POINTS,
    Frozen: st.builds(Frozen, a=st.integers(), b=TEXTS),
    list[Person]: st.lists(PEOPLE, max_size=2),
    list[Pet]: st.lists(CATS | DOGS, max_size=3),
    Cat | Dog: CATS | DOGS,
    Circle | Square: st.builds(Circle, centre=TEXTS, radius=FLOATS) | st.builds(Square, centre=TEXTS, side=FLOATS),
    Person | list[str] | int | str | None: PEOPLE | st.lists(TEXTS, max_size=2) | st.integers() | TEXTS | st.none(),
    dict[str, list[int]]: st.dictionaries(TEXTS, st.lists(st.integers(), max_size=3), max_size=3),
    dict[str, Any]: st.dictionaries(TEXTS, JSON, max_size=3),
    Any: JSON,
    Pair: st.builds(Pair, a=st.integers(), b=TEXTS),
    Names: st.builds(Names, st.lists(TEXTS, max_size=3)),
    tuple[int, str]: st.tuples(st.integers(), TEXTS),
    set[int]: st.sets(st.integers(), max_size=4),
    list[dt.datetime | None]: st.lists(st.none() | st.datetimes(), max_size=3),
    list[Decimal]: st.lists(st.decimals(allow_nan=False, allow_infinity=False), max_size=3),
    bool: st.booleans(),
    int: st.integers(),
    float: FLOATS,
    Colour: st.sampled_from(Colour),
}


def grows(before: Any, after: Any) -> bool:
    """Whether all that was shown is in what is shown next."""
    if isinstance(before, BaseModel) and not isinstance(before, RootModel):
        return (
            type(before) is type(after)
            and before.model_fields_set <= after.model_fields_set
            and all(grows(getattr(before, name), getattr(after, name)) for name in before.model_fields_set)
        )
    if isinstance(before, RootModel):
        return type(before) is type(after) and grows(before.root, after.root)
    if isinstance(before, Point):
        pairs = [(getattr(before, f.name), getattr(after, f.name), f.default) for f in dataclasses.fields(before)]
        return type(after) is Point and all(one in (None, default) or grows(one, two) for one, two, default in pairs)
    if isinstance(before, Pair):
        return type(after) is Pair and before.a in (None, after.a) and (before.b == "x" or grows(before.b, after.b))
    if isinstance(before, Frozen):
        return type(after) is Frozen and before.a in (None, after.a) and (before.b is None or grows(before.b, after.b))
    if isinstance(before, str):
        return type(before) is type(after) and after.startswith(before)
    if isinstance(before, (list, tuple)):
        return type(before) is type(after) and len(before) <= len(after) and all(map(grows, before, after))
    if isinstance(before, dict):
        return isinstance(after, dict) and all(
            key in after and grows(inner, after[key]) for key, inner in before.items()
        )
    return type(before) is type(after) and (before <= after if isinstance(before, set) else before == after)


def test_the_measure_of_growth_can_tell() -> None:
    assert grows([1, "a"], [1, "ab", 2])
    assert not grows([1, "ab"], [1, "a"])
    assert not grows(Address(street="a"), Address(street="b"))
    assert not grows({"a": 1}, {"a": 12})
    assert not grows(1, True)


@pytest.mark.parametrize("kind", VALUES, ids=repr)
@settings(deadline=None, max_examples=60)
@given(data=st.data())
def test_every_prefix_shows_something_that_grows_into_the_validated_object(kind: Any, data: st.DataObject) -> None:
    one, adapter = output(kind), TypeAdapter(kind)
    dumped = adapter.dump_json(data.draw(VALUES[kind]), by_alias=True, ensure_ascii=data.draw(st.booleans())).decode()
    spaced = json.dumps(json.loads(dumped), indent=data.draw(st.sampled_from([None, 1])))
    text = f'{{"result": {spaced}}}' if one.is_wrapped else spaced
    shown = list(looks(kind, text, data.draw(st.integers(1, 5))))

    assert plain(shown[-1]) == plain(one.parse_text(text))
    for before, after in itertools.pairwise(shown):
        assert grows(before, after), (before, after)


@settings(deadline=None)
@given(
    st.lists(
        st.text(alphabet='{}[]":,\\nu0123.-etrfalsx `\n') | st.text() | st.sampled_from(['{"a', '{"result":', '["'])
    )
)
def test_no_text_makes_it_fail_and_what_fits_comes_last(pieces: list[str]) -> None:
    for kind in (dict[str, Any], Person, list[Pet], Any):
        reader = PartialReader(output(kind))
        shown = [value for value in map(reader.feed, pieces) if value is not NOTHING]
        try:
            whole = output(kind).parse_text("".join(pieces))
        except OutputFault:
            continue
        if output(kind).start_of_json("".join(pieces)) is not None and kind is dict[str, Any]:
            assert plain(shown[-1]) == plain(whole)


@settings(deadline=None)
@given(JSON, st.data())
def test_json_that_is_cut_and_broken_anywhere_does_no_harm(value: Any, data: st.DataObject) -> None:
    text = json.dumps({"result": value})
    at = data.draw(st.integers(0, len(text)))
    broken = text[:at] + data.draw(st.text(alphabet='{}[]":,\\x01', min_size=1, max_size=2)) + text[at:]
    for kind in (Any, JsonValue, list[Person], Person | None):
        list(looks(kind, broken))


# ---- how long it takes

LONG = {
    "numbers": (lambda n: "[" + "1," * (n // 2), 1),
    "keys": (lambda n: "{" + ",".join(f'"{i}": 1' for i in range(n // 8)), 3),
    "line ends in a list": (lambda n: "[" + "\n" * n, 1),
    "line ends in an object": (lambda n: "{" + "\n" * n, 1),
    "blanks before the answer": (lambda n: "see [ " + " " * n, 1),
    "a string": (lambda n: '{"name": "' + "a" * n, 1),
    "escapes": (lambda n: '{"name": "' + "\\n" * (n // 2), 1),
    "a key": (lambda n: '{"' + "a" * n, 1),
    "digits": (lambda n: "[" + "1" * n, 1),
    "objects": (lambda n: "[" + '{"street": "a"},' * (n // 16), 3),
    "brackets": (lambda n: "[" * n, 1),
    "closed brackets": (lambda n: ("[" * 200 + "]" * 200 + ",") * (n // 400), 3),
    "prose": (lambda n: "la { " * (n // 5), 1),
}


@pytest.mark.parametrize(("make", "size"), LONG.values(), ids=LONG)
@pytest.mark.parametrize("kind", [Person, list[int], list[Cat | Dog], dict[str, Any], set[int], Any])
def test_it_takes_time_that_grows_with_the_length(kind: Any, make: Callable[[int], str], size: int) -> None:
    assert_linear(lambda length: deque(looks(kind, make(length), size), 0), 1 << 13)


def test_a_long_answer_is_shown_again_when_it_has_grown_by_a_little() -> None:
    text = "[" + ",".join(map(str, range(100_000)))
    shown = [len(value) for value in looks(list[int], text, 6)]
    assert 1000 < len(shown) < 5000
    assert all(later - earlier <= earlier // 100 + 3 for earlier, later in itertools.pairwise(shown))
    assert shown[-1] > 99_000


class Whole:
    """A model that cannot stream."""

    def __init__(self, text: str) -> None:
        self._text = text

    async def respond(self, request: ModelRequest) -> Reply:
        return Reply(text=self._text)


async def test_what_comes_in_one_piece_is_read_in_steps_between_which_others_run() -> None:
    text = json.dumps({"result": [1] * 200_000})
    turns = 0

    async def take_turns() -> None:
        nonlocal turns
        while True:
            turns += 1
            await anyio.lowlevel.checkpoint()

    async with anyio.create_task_group() as group:
        async with BaseAgent("A", "a", client=Whole(text), output_type=list[int]).stream("go") as stream:
            partial = aiter(stream.partial())
            group.start_soon(take_turns)
            before = turns
            assert len(await anext(partial)) == 200_000
        group.cancel_scope.cancel()
    assert turns - before >= len(text) // 16_384
