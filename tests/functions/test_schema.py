"""What a model is told of a function's parameters, and what becomes of what it sends."""

import dataclasses
import datetime as dt
import enum
import functools
import json
import math
import uuid
from collections.abc import AsyncIterator, Callable, Generator, Iterable, Iterator
from decimal import Decimal
from pathlib import Path
from typing import Annotated, Any, Generic, Literal, NamedTuple, NewType, Optional, Required, TypeVar, Union

import pytest
from pydantic import AfterValidator, AliasChoices, AliasPath, BaseModel, ConfigDict, Field, JsonValue
from typing_extensions import Doc, ReadOnly, TypedDict, Unpack

from fractal import AgentToolkit, InvalidTool, RunContext, Tool, tool
from fractal._functions.schema import ArgumentsFault, Parameters
from tests.support import shown


class Colour(enum.Enum):
    RED = "red"
    BLUE = "blue"


class Level(enum.IntEnum):
    LOW = 1


class Address(BaseModel):
    street: str
    number: int = 1


class Person(BaseModel):
    name: str = Field(description="Full name.")
    home: Address | None = None


class Exact(BaseModel):
    model_config = ConfigDict(extra="forbid")
    a: int


class Node(BaseModel):
    value: int
    children: "list[Node]" = []


@dataclasses.dataclass
class Point:
    x: int
    y: int = 0


class Options(TypedDict, total=False):
    depth: int


class Pair(NamedTuple):
    a: int
    b: str


class Stops(BaseModel):
    places: Iterable[str]


@dataclasses.dataclass
class Legs:
    lengths: Iterable[int]


class Mixed(enum.Enum):
    ONE = 1
    NO = "no"


class Shade(enum.Enum):
    """Members whose values JSON has other forms for."""

    RED = (255, 0, 0)
    DAY = dt.date(2026, 1, 1)
    HALF = Decimal("0.5")
    RAW = b"raw"
    TEXT = "text"


class Lenient(enum.Enum):
    ONE = (1,)
    OTHER = "other"

    @classmethod
    def _missing_(cls, value: object) -> "Lenient":
        return cls.OTHER


class Handles(enum.Enum):
    OPEN = object()


class Painted(BaseModel):
    shade: Shade
    others: dict[str, list[Shade]] = {}
    back: Shade = Shade.RED


class Red(BaseModel):
    kind: Literal[Colour.RED]


class Blue(BaseModel):
    kind: Literal[Colour.BLUE]


class Deps:
    pass


UserId = NewType("UserId", int)
T = TypeVar("T")
U = TypeVar("U")
MISSING: Any = object()


def parameters_of(function: Callable[..., Any]) -> Parameters:
    return Tool.from_function(function).parameters


def schema_of(function: Callable[..., Any]) -> dict[str, Any]:
    return parameters_of(function).json_schema


def taking(kind: Any, *default: Any) -> Callable[..., Any]:
    """A function with one parameter, `x`, that returns it."""

    def function(x):  # type: ignore[no-untyped-def]
        return x

    function.__annotations__ = {"x": kind}
    function.__defaults__ = default or None
    return function


def called(function: Callable[..., Any], arguments: Any, context: object = None) -> Any:
    """What the function returns for arguments as a model sends them."""
    parameters = parameters_of(function)
    positional, by_name = parameters.bind(parameters.check(arguments), context)
    return function(*positional, **by_name)


def fault_of(function: Callable[..., Any], arguments: Any) -> str:
    with pytest.raises(ArgumentsFault) as caught:
        parameters_of(function).check(arguments)
    return str(caught.value)


# ---- types

ADA = {"name": "Ada", "home": {"street": "High"}}
ADDRESS_SCHEMA = {
    "type": "object",
    "properties": {"street": {"type": "string"}, "number": {"type": "integer", "default": 1}},
    "required": ["street"],
}

KINDS: list[tuple[Any, Any, Any, dict[str, Any] | None]] = [  # annotation, JSON value, what arrives, schema
    (str, "a\x00ü😀", "a\x00ü😀", {"type": "string"}),
    (int, 5, 5, {"type": "integer"}),
    (int, 10**40, 10**40, {"type": "integer"}),
    (float, 1, 1.0, {"type": "number"}),
    (bool, True, True, {"type": "boolean"}),
    (None, None, None, {"type": "null"}),
    (Any, {"a": [1]}, {"a": [1]}, {}),
    (object, "x", "x", {}),
    (list, [1, "a"], [1, "a"], {"type": "array", "items": {}}),
    (list[int], [1, 2], [1, 2], {"type": "array", "items": {"type": "integer"}}),
    (dict, {"a": 1}, {"a": 1}, {"type": "object", "additionalProperties": True}),
    (dict[str, int], {"a": 1}, {"a": 1}, {"type": "object", "additionalProperties": {"type": "integer"}}),
    (set[int], [1, 1, 2], {1, 2}, {"type": "array", "items": {"type": "integer"}, "uniqueItems": True}),
    (frozenset[str], ["a"], frozenset({"a"}), None),
    (tuple[int, str], [1, "a"], (1, "a"), None),
    (tuple[int, ...], [1, 2], (1, 2), {"type": "array", "items": {"type": "integer"}}),
    (Pair, [1, "a"], Pair(1, "a"), None),
    (Literal["a", "b"], "b", "b", {"type": "string", "enum": ["a", "b"]}),
    (Literal["only"], "only", "only", {"type": "string", "const": "only"}),
    (Literal[1, "a", None], None, None, {"enum": [1, "a", None]}),
    (Optional[int], None, None, {"anyOf": [{"type": "integer"}, {"type": "null"}]}),  # noqa: UP045
    (Union[int, str], "five", "five", {"anyOf": [{"type": "integer"}, {"type": "string"}]}),  # noqa: UP007
    (int | None, 5, 5, {"anyOf": [{"type": "integer"}, {"type": "null"}]}),
    (Colour, "red", Colour.RED, {"$ref": "#/$defs/Colour"}),
    (Level, 1, Level.LOW, {"$ref": "#/$defs/Level"}),
    (dt.date, "2024-05-06", dt.date(2024, 5, 6), {"type": "string", "format": "date"}),
    (dt.datetime, "2024-05-06T07:08:00Z", dt.datetime(2024, 5, 6, 7, 8, tzinfo=dt.UTC), None),
    (dt.time, "07:08", dt.time(7, 8), {"type": "string", "format": "time"}),
    (dt.timedelta, "PT90S", dt.timedelta(seconds=90), {"type": "string", "format": "duration"}),
    (Decimal, "1.50", Decimal("1.50"), None),
    (Decimal, 1.5, Decimal("1.5"), None),
    (uuid.UUID, str(uuid.UUID(int=1)), uuid.UUID(int=1), {"type": "string", "format": "uuid"}),
    (bytes, "ab", b"ab", {"type": "string", "format": "binary"}),
    (Path, "/tmp", Path("/tmp"), {"type": "string", "format": "path"}),
    (UserId, 5, 5, {"type": "integer"}),
    (JsonValue, [1, None], [1, None], None),
    (Point, {"x": 1}, Point(1), {"$ref": "#/$defs/Point"}),
    (Options, {"depth": 1}, {"depth": 1}, {"$ref": "#/$defs/Options"}),
    (Person, ADA, Person(name="Ada", home=Address(street="High")), {"$ref": "#/$defs/Person"}),
    (list[Person], [{"name": "Ada"}], [Person(name="Ada")], {"type": "array", "items": {"$ref": "#/$defs/Person"}}),
    (Person | None, ADA, Person(name="Ada", home=Address(street="High")), None),
    (Node, {"value": 1, "children": [{"value": 2}]}, Node(value=1, children=[Node(value=2)]), None),
    (Annotated[int, Field(ge=1, le=9)], 5, 5, {"type": "integer", "minimum": 1, "maximum": 9}),
    (Annotated[str, "Said beside it."], "a", "a", {"type": "string", "description": "Said beside it."}),
    (Annotated[str, Doc("Said there.")], "a", "a", {"type": "string", "description": "Said there."}),
    (Annotated[int, 5, object()], 5, 5, {"type": "integer"}),
    (Iterable[int], [1, 2], [1, 2], {"type": "array", "items": {"type": "integer"}}),
    (Iterable, [1, "a"], [1, "a"], {"type": "array", "items": {}}),
    (list[Iterable[int]], [[1], [2]], [[1], [2]], None),
    (Optional[Iterable[int]], [1], [1], None),  # noqa: UP045
    (dict[str, Iterable[int]], {"a": [1]}, {"a": [1]}, None),
    (Stops, {"places": ["a"]}, Stops.model_construct(places=["a"]), {"$ref": "#/$defs/Stops"}),
    (list[Stops], [{"places": ["a"]}], [Stops.model_construct(places=["a"])], None),
    (Legs, {"lengths": [1]}, Legs([1]), None),
    (Literal[Colour.RED], "red", Colour.RED, {"type": "string", "const": "red"}),
    (Literal[Colour.RED, "x", 1], "red", Colour.RED, {"enum": ["red", "x", 1]}),
    (Literal[Colour.RED, "x", 1], "x", "x", None),
    (Literal[Colour.RED, "red"], "red", "red", None),
    (Literal[Level.LOW], 1, Level.LOW, None),
    (Literal[Mixed.ONE, Mixed.NO], 1, Mixed.ONE, None),
    (Literal[Mixed.ONE, Mixed.NO], "no", Mixed.NO, None),
    (list[Literal[Colour.BLUE]], ["blue"], [Colour.BLUE], None),
    (Red, {"kind": "red"}, Red(kind=Colour.RED), None),
    (dict[str, Red | None], {"a": {"kind": "red"}}, {"a": Red(kind=Colour.RED)}, None),
    (Annotated[Red | Blue, Field(discriminator="kind")], {"kind": "blue"}, Blue(kind=Colour.BLUE), None),
    (Annotated[str, Field(description="Said here.")], "a", "a", {"type": "string", "description": "Said here."}),
    (Annotated[int, AfterValidator(lambda n: n + 1)], 5, 6, {"type": "integer"}),
    ("list[Person]", [{"name": "Ada"}], [Person(name="Ada")], None),
    (list["Person"], [{"name": "Ada"}], [Person(name="Ada")], None),
]


@pytest.mark.parametrize(
    ("kind", "sent", "arrives", "schema"), KINDS, ids=[f"{shown(k[0])}-{str(k[1])[:20]}" for k in KINDS]
)
def test_an_annotation_is_in_the_schema_and_arrives_as_that_type(
    kind: Any, sent: Any, arrives: Any, schema: dict[str, Any] | None
) -> None:
    function = taking(kind)
    shown = schema_of(function)

    assert (shown["type"], shown["required"], shown["additionalProperties"]) == ("object", ["x"], False)
    if schema is not None:
        assert shown["properties"] == {"x": schema}
    for arguments in (json.dumps({"x": sent}), {"x": sent}):
        received = called(function, arguments)
        assert received == arrives
        assert type(received) is type(arrives)


def test_python_objects_can_be_passed_as_they_are() -> None:
    person = Person(name="Ada")
    assert called(taking(Person), {"x": person}) is person
    assert called(taking(Colour), {"x": Colour.RED}) is Colour.RED


def test_nested_models_are_defined_once_with_their_descriptions() -> None:
    def f(who: Person, others: list[Person], where: Address) -> None: ...

    shown = schema_of(f)
    assert set(shown["$defs"]) == {"Person", "Address"}
    assert ADDRESS_SCHEMA.items() <= shown["$defs"]["Address"].items()
    assert shown["$defs"]["Person"]["properties"]["name"] == {"type": "string", "description": "Full name."}
    assert shown["required"] == ["who", "others", "where"]


def test_an_enum_shows_its_values() -> None:
    shown = schema_of(taking(Colour))["$defs"]["Colour"]
    assert (shown["type"], shown["enum"]) == ("string", ["red", "blue"])


def test_names_are_not_repeated_as_titles() -> None:
    def f(who: Person, options: Options, point: Point, colour: Colour, plain: int = 5) -> None: ...

    shown = schema_of(f)
    assert "title" not in shown
    assert "title" not in json.dumps(shown["properties"])
    assert all("title" not in json.dumps(kind.get("properties")) for kind in shown["$defs"].values())


def test_no_parameters_are_an_empty_object() -> None:
    def f() -> None: ...

    assert schema_of(f) == {"type": "object", "properties": {}, "additionalProperties": False}
    assert called(f, "{}") is None


@pytest.mark.parametrize("arguments", ["", "   ", "\n", "{}", " {} ", "null", " null\n", '"{}"', '" {} "'])
def test_every_way_to_say_no_arguments_means_it(arguments: str) -> None:
    assert called(taking(int, 5), arguments) == 5


# ---- defaults and Field


DEFAULTS: list[tuple[Any, Any]] = [
    (int, 5),
    (str, ""),
    (bool, False),
    (float, 1.5),
    (list[int], [1]),
    (tuple[int, str], (1, "a")),
    (set[int], {1}),
    (dict[str, int], {"a": 1}),
    (int | None, None),
    (Literal["a", "b"], "b"),
    (Colour, Colour.RED),
    (dt.date, dt.date(2024, 5, 6)),
    (dt.timedelta, dt.timedelta(seconds=90)),
    (Decimal, Decimal("1.50")),
    (uuid.UUID, uuid.UUID(int=1)),
    (Path, Path("/tmp")),
    (Person, Person(name="Ada", home=Address(street="High"))),
    (Point, Point(1, 2)),
    (bytes, b"ab"),
    (Any, None),
    (int, None),
    (str, None),
    (list[str], None),
]


@pytest.mark.parametrize(("kind", "default"), DEFAULTS, ids=[f"{kind}-{default}" for kind, default in DEFAULTS])
def test_a_default_is_shown_and_is_accepted_when_a_model_sends_it_back(kind: Any, default: Any) -> None:
    function = taking(kind, default)
    shown = schema_of(function)

    assert "required" not in shown
    assert called(function, "{}") is default
    assert called(function, json.dumps({"x": shown["properties"]["x"]["default"]})) == default


@pytest.mark.parametrize(
    "default",
    [MISSING, math.inf, -math.inf, math.nan, [math.nan], {1: MISSING}, print],
    ids=["object", "inf", "-inf", "nan", "[nan]", "{1: object}", "function"],
)
def test_a_default_that_json_has_no_form_for_is_not_shown_but_holds(default: Any) -> None:
    function = taking(Any, default)

    assert schema_of(function)["properties"] == {"x": {}}
    assert called(function, "{}") is default


def test_a_mutable_default_is_the_functions_own_business() -> None:
    default: list[int] = []
    assert called(taking(list, default), "{}") is default


@pytest.mark.parametrize(
    ("default", "required", "schema", "value"),
    [
        (Field(description="D", ge=1), True, {"type": "integer", "description": "D", "minimum": 1}, None),
        (Field(...), True, {"type": "integer"}, None),
        (Field(3), False, {"type": "integer", "default": 3}, 3),
        (Field(default=3, description="D"), False, {"type": "integer", "default": 3, "description": "D"}, 3),
        (Field(default_factory=lambda: 4), False, {"type": "integer"}, 4),
    ],
    ids=str,
)
def test_a_pydantic_field_as_default_says_what_it_says_in_a_model(
    default: Any, required: bool, schema: dict[str, Any], value: Any
) -> None:
    function = taking(int, default)

    assert schema_of(function)["properties"]["x"] == schema
    assert ("required" in schema_of(function)) is required
    assert called(function, '{"x": 7}') == 7
    if required:
        assert "'x' is missing" in fault_of(function, "{}")
    else:
        assert called(function, "{}") == value


def test_a_default_factory_makes_a_new_value_for_each_call_and_may_look_at_the_others() -> None:
    def f(
        a: int,
        b: list[int] = Field(default_factory=list),  # noqa: B008
        c: int = Field(default_factory=lambda d: d["a"] + 1),
    ) -> Any:
        return a, b, c

    first, second = called(f, '{"a": 1}'), called(f, '{"a": 1}')
    assert first == second == (1, [], 2)
    assert first[1] is not second[1]


def test_a_default_inside_annotated_holds_when_the_argument_is_left_out() -> None:
    function = taking(Annotated[int, Field(default=3)])
    assert "required" not in schema_of(function)
    assert called(function, "{}") == 3


def test_an_alias_is_the_name_for_the_model_and_the_parameters_name_for_the_function() -> None:
    function = taking(Annotated[int, Field(alias="from")])
    assert list(schema_of(function)["properties"]) == ["from"]
    assert called(function, '{"from": 1}') == 1


def alias(kind: Any, *default: Any, **options: Any) -> Callable[..., Any]:
    return taking(Annotated[kind, Field(**options)], *default)


@pytest.mark.parametrize(
    ("options", "name", "sent"),
    [
        ({"alias": "from"}, "from", {"from": 1}),
        ({"validation_alias": "from"}, "from", {"from": 1}),
        ({"alias": "other", "validation_alias": "from"}, "from", {"from": 1}),
        ({"validation_alias": AliasChoices("from", "of")}, "from", {"of": 1}),
        ({"validation_alias": AliasChoices(AliasPath("start", 0), "from")}, "from", {"start": [1]}),
        ({"validation_alias": AliasPath("start", 0)}, "x", {"start": [1]}),
        ({"serialization_alias": "from"}, "x", {"x": 1}),
    ],
    ids=str,
)
def test_one_name_is_shown_taken_and_told_however_it_is_given(
    options: dict[str, Any], name: str, sent: dict[str, Any]
) -> None:
    function, optional = alias(int, **options), alias(int, 5, **options)
    assert schema_of(function)["required"] == list(schema_of(function)["properties"]) == [name]
    assert schema_of(optional)["properties"][name]["default"] == 5
    for arguments in ({name: 1}, json.dumps({name: 1}), sent, {"x": 1}):
        assert called(function, arguments) == 1
    assert called(optional, "{}") == 5
    assert fault_of(function, '{"z": 1}') == f"{name!r} is missing; there is no parameter 'z', only {name}"
    assert fault_of(function, json.dumps({name: "many"})).startswith(f"{name!r}: ")


def test_a_description_in_the_annotation_goes_before_the_docstrings() -> None:
    def f(a: Annotated[int, Field(description="A here.")], b: int = Field(description="B here."), c: int = 1) -> None:
        """Sum.

        Args:
            a: A there.
            b: B there.
            c: C there.
        """

    shown = schema_of(f)["properties"]
    assert [shown[name]["description"] for name in "abc"] == ["A here.", "B here.", "C there."]


def test_a_description_beside_a_reference_to_a_model_is_kept() -> None:
    def f(who: Person) -> None:
        """Sum.

        Args:
            who: The one.
        """

    assert schema_of(f)["properties"]["who"] == {"$ref": "#/$defs/Person", "description": "The one."}


def test_without_annotation_and_docstring_anything_goes() -> None:
    def f(x, y=5):  # type: ignore[no-untyped-def]
        return x, y

    assert schema_of(f)["properties"] == {"x": {}, "y": {"default": 5}}
    assert called(f, '{"x": [1]}') == ([1], 5)


# ---- kinds of parameters


def test_positional_only_parameters_are_passed_by_position() -> None:
    def f(a: int, b: int = 2, /, c: int = 3, *, d: int = 4) -> tuple[int, ...]:
        return a, b, c, d

    assert called(f, '{"a": 1}') == (1, 2, 3, 4)
    assert called(f, '{"a": 1, "d": 9}') == (1, 2, 3, 9)
    assert called(f, '{"d": 9, "c": 8, "b": 7, "a": 6}') == (6, 7, 8, 9)
    assert schema_of(f)["required"] == ["a"]


def test_a_positional_only_default_in_between_is_filled() -> None:
    def f(a: int = 1, b: int = Field(default=2), c: int = 3, /) -> tuple[int, ...]:
        return a, b, c

    assert called(f, '{"c": 9}') == (1, 2, 9)


def test_further_keywords_reach_a_function_that_takes_them() -> None:
    def f(a: int, **more: Any) -> Any:
        return a, more

    assert called(f, '{"a": 1, "b": [2], "self": 3}') == (1, {"b": [2], "self": 3})
    assert list(schema_of(f)["properties"]) == ["a"]
    assert schema_of(f)["additionalProperties"] is True


def points(**points: int) -> Any:
    """Note points.

    Args:
        **points: By name.
    """
    return points


def days(first: int, **days: dt.date) -> Any:
    return first, days


def people(**people: Person) -> Any:
    return people


def untyped(**more):  # type: ignore[no-untyped-def]
    """Take more.

    Args:
        **more (int): Numbers.
    """
    return more


def test_what_is_written_at_keywords_is_shown_checked_and_converted() -> None:
    assert schema_of(points)["additionalProperties"] == {"type": "integer", "description": "By name."}
    assert called(points, '{"ada": "7"}') == {"ada": 7}
    assert "'ada': Input should be a valid integer" in fault_of(points, '{"ada": "many"}')
    assert "'ada': Input should be a valid integer" in fault_of(points, '{"ada": null}')
    assert called(days, '{"first": 1, "x": "2026-05-01"}') == (1, {"x": dt.date(2026, 5, 1)})
    assert called(people, json.dumps({"a": ADA})) == {"a": Person(name="Ada", home=Address(street="High"))}
    assert set(schema_of(people)["$defs"]) == {"Person", "Address"}
    assert called(untyped, '{"a": "1"}') == {"a": 1}


class Settings(TypedDict, total=False):
    count: Required[int]
    size: Annotated[int, "How big."]
    day: ReadOnly[dt.date]


class OpenSettings(TypedDict, extra_items=int):
    count: int


class Sized(TypedDict, Generic[T]):
    size: T


def configure(first: int = 0, **settings: Unpack[Settings]) -> Any:
    """Set up.

    Args:
        count: How many.
        day: Which day.
    """
    return first, settings


def test_an_unpacked_typed_dict_is_shown_and_checked_field_by_field() -> None:
    shown = schema_of(configure)
    assert (shown["required"], shown["additionalProperties"]) == (["count"], False)
    assert {name: facts.get("description") for name, facts in shown["properties"].items()} == {
        "first": None,
        "count": "How many.",
        "size": "How big.",
        "day": "Which day.",
    }
    assert called(configure, '{"count": "3", "day": "2026-05-01"}') == (
        0,
        {"count": 3, "day": dt.date(2026, 5, 1)},
    )
    assert called(configure, '{"count": 3, "size": null}') == (0, {"count": 3})
    assert "'count' is missing" in fault_of(configure, "{}")
    assert "there is no parameter 'colour'" in fault_of(configure, '{"count": 3, "colour": "red"}')


def test_an_unpacked_typed_dict_may_be_open_or_generic_and_nothing_else_is_unpacked() -> None:
    def opened(**settings: Unpack[OpenSettings]) -> Any:
        return settings

    def sized(**settings: Unpack[Sized[int]]) -> Any:
        return settings

    def wrong(**settings: Any) -> Any:
        return settings

    wrong.__annotations__["settings"] = Unpack[tuple[int]]  # type: ignore[misc]
    assert called(opened, '{"count": 1, "a": "2"}') == {"count": 1, "a": 2}
    assert called(sized, '{"size": "2"}') == {"size": 2}
    with pytest.raises(InvalidTool, match=r"\*\*settings: Unpack\[…\] takes a TypedDict"):
        parameters_of(wrong)


def test_the_context_may_be_in_an_unpacked_typed_dict() -> None:
    class WithContext(TypedDict):
        ctx: RunContext[Any]
        count: int

    def f(**named: Any) -> Any:
        return named

    f.__annotations__["named"] = Unpack[WithContext]  # type: ignore[misc]
    assert list(schema_of(f)["properties"]) == ["count"]
    assert called(f, '{"count": 1}', CONTEXT) == {"count": 1, "ctx": CONTEXT}


@pytest.mark.parametrize("source", ["*args", "a, *rest: int", "*args, **kwargs"])
def test_a_star_parameter_is_refused_with_its_name_and_a_way_out(source: str) -> None:
    namespace: dict[str, Any] = {}
    exec(f"def f({source}): pass", namespace)
    with pytest.raises(InvalidTool) as caught:
        parameters_of(namespace["f"])

    assert caught.value.tool_name == "f"
    assert f"*{source.partition('*')[2].split(',')[0].split(':')[0]}" in caught.value.fault
    assert "list" in caught.value.fault


NAMES = [
    "self", "cls", "name", "tool_name", "messages", "ctx", "context", "schema", "copy", "json", "dict", "model_config",
    "model_fields", "validate", "function", "func", "arguments", "args", "kwargs", "call", "fields", "items", "keys",
    "extra", "type", "id", "_private", "__dunder__", "größe", "agent", "run", "timeout", "deps",
]  # fmt: skip


@pytest.mark.parametrize("name", NAMES)
def test_a_parameter_may_have_any_name(name: str) -> None:
    namespace: dict[str, Any] = {}
    exec(f"def f({name}: int, other: int = 1): return {name}, other", namespace)
    function = namespace["f"]

    assert list(schema_of(function)["properties"]) == [name, "other"]
    assert called(function, json.dumps({name: 5})) == (5, 1)
    assert called(functools.partial(function, other=2), {name: 5}) == (5, 2)


# ---- the run's context

CONTEXT = object()


def plain(ctx: RunContext, x: int) -> Any:
    return ctx, x


def with_deps(x: int, anything: RunContext[Deps]) -> Any:
    return anything, x


def optional(x: int, ctx: Optional[RunContext] = None) -> Any:  # noqa: UP045
    return ctx, x


def either(x: int, ctx: RunContext[Deps] | None = None) -> Any:
    return ctx, x


def as_text(x: int, ctx: "RunContext[Deps]") -> Any:
    return ctx, x


def by_keyword(x: int, *, ctx: RunContext) -> Any:
    return ctx, x


def by_position(ctx: RunContext, x: int, /) -> Any:
    return ctx, x


def in_between(x: int, ctx: RunContext, /, y: int = 1) -> Any:
    return ctx, x


def annotated(x: int, ctx: Annotated[RunContext[Deps], "the run"]) -> Any:
    return ctx, x


@pytest.mark.parametrize(
    "function", [plain, with_deps, optional, either, as_text, by_keyword, by_position, in_between, annotated]
)
def test_the_context_is_passed_and_hidden_from_the_model(function: Callable[..., Any]) -> None:
    parameters = parameters_of(function)

    assert "x" in parameters.json_schema["properties"]
    assert parameters.context_names
    assert not parameters.context_names & set(parameters.json_schema["properties"])
    assert "RunContext" not in json.dumps(parameters.json_schema)
    assert called(function, '{"x": 1}', CONTEXT) == (CONTEXT, 1)


def test_a_model_cannot_pass_a_context_of_its_own() -> None:
    assert "there is no parameter 'ctx', only x" in fault_of(plain, '{"x": 1, "ctx": {}}')

    def open_to_all(ctx: RunContext, **more: Any) -> Any:
        return ctx

    assert called(open_to_all, '{"ctx": "forged"}', CONTEXT) is CONTEXT


def test_a_parameter_called_ctx_is_like_any_other() -> None:
    parameters = parameters_of(taking(int))
    assert not parameters.context_names

    def f(ctx: int) -> int:
        return ctx

    assert called(f, '{"ctx": 1}', CONTEXT) == 1


def test_two_contexts_are_both_passed_or_refused_at_once() -> None:
    def f(a: RunContext, b: RunContext) -> Any:
        return a, b

    try:
        parameters_of(f)
    except InvalidTool:
        return
    assert called(f, "{}", CONTEXT) == (CONTEXT, CONTEXT)


# ---- what cannot be a tool


class Plain:
    pass


@pytest.mark.parametrize(
    ("kind", "fault"),
    [
        ("Nowhere", "'Nowhere'"),
        ("list[Nowhere]", "'Nowhere'"),
        ("1 +", "no type"),
        ("5", ""),
        (Plain, "Plain"),
        (Callable[[], int], ""),
        (type, ""),
        (type[int], "type[int]"),
        (dict[tuple[int, int], str], "keys"),
        (list[dict[frozenset[str], str]], "keys"),
        (Handles, "no form in JSON"),
        (Literal[Handles.OPEN], "no form in JSON"),
        (Annotated[str, Field(pattern="(")], ""),
        (Annotated[list[int], Field(min_length="x")], ""),  # type: ignore[arg-type]
        (5, ""),
    ],
    ids=shown,
)
def test_an_annotation_that_cannot_be_offered_is_an_invalid_tool_with_one_line_of_why(kind: Any, fault: str) -> None:
    with pytest.raises(InvalidTool) as caught:
        parameters_of(taking(kind))

    assert caught.value.tool_name == "function"
    assert fault in caught.value.fault
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("kind", [Plain, Plain | None, list[Plain], Callable[[], int], type[int]], ids=shown)
def test_a_parameter_that_no_model_can_give_is_named_with_a_way_out(kind: Any) -> None:
    def f(query: str, store: Any = None, **more: int) -> None: ...

    f.__annotations__["store"] = kind
    with pytest.raises(InvalidTool) as caught:
        parameters_of(f)

    assert caught.value.fault.startswith("'store': ")
    assert "ctx.deps or functools.partial" in caught.value.fault
    assert "arbitrary_types_allowed" not in caught.value.fault


def test_a_type_that_no_model_can_give_at_other_keywords_is_told_too() -> None:
    def f(query: str, **more: Plain) -> None: ...

    with pytest.raises(InvalidTool, match=r"Plain.*ctx\.deps or functools\.partial"):
        parameters_of(f)


def test_a_return_annotation_is_nobodys_concern() -> None:
    def f(x: int) -> "Nowhere":  # type: ignore[name-defined]  # noqa: F821
        return x

    assert called(f, '{"x": 1}') == 1


def test_what_is_no_function_is_an_invalid_tool() -> None:
    for wrong in (5, "text", None):
        with pytest.raises(InvalidTool, match="cannot be called"):
            Tool.from_function(wrong)  # type: ignore[arg-type]


def test_a_class_of_a_module_that_is_gone_knows_no_names() -> None:
    class Stray:
        def __init__(self, call: "FunctionType") -> None:  # type: ignore[name-defined]  # noqa: F821
            self.call = call

    Stray.__module__ = "gone"
    with pytest.raises(InvalidTool, match="names 'FunctionType', which its module does not know"):
        schema_of(Stray)


def test_a_function_without_a_signature_is_an_invalid_tool() -> None:
    with pytest.raises(InvalidTool, match="wrap it in a function"):
        Tool.from_function(dict)
    with pytest.raises(InvalidTool):
        Tool.from_function(print)


# ---- arguments that do not fit


class Sized2(BaseModel):
    size: int = 1
    kinds: dict[str, int] = {}


@pytest.mark.parametrize(
    ("function", "sent", "received"),
    [
        (taking(int, 5), {"x": None}, 5),
        (taking(list[int], [1]), {"x": None}, [1]),
        (taking(Sized2), {"x": {"size": None}}, Sized2()),
        (taking(list[Sized2]), {"x": [{"size": None}, {"size": 2}]}, [Sized2(), Sized2(size=2)]),
        (taking(Sized2 | str), {"x": {"size": None}}, Sized2()),
        (taking(int | None, 5), {"x": None}, None),
    ],
    ids=["default", "list", "field", "field in a list", "field in a union", "nullable"],
)
def test_null_for_what_has_a_default_means_that_it_is_left_out(
    function: Callable[..., Any], sent: dict[str, Any], received: Any
) -> None:
    for arguments in (json.dumps(sent), sent):
        assert called(function, arguments) == received


@pytest.mark.parametrize(
    ("function", "sent"),
    [
        (taking(int), {"x": None}),
        (taking(int, 5), {"x": 1, "y": None}),
        (taking(dict[str, int]), {"x": {"a": None}}),
        (taking(list[int]), {"x": [None]}),
        (taking(Sized2), {"x": {"kinds": {"a": None}}}),
        (taking(Person), {"x": {"name": None}}),
        (taking(Sized2), {"x": {"size": None, "kinds": {"a": "many"}}}),
    ],
    ids=["no default", "unknown", "key", "item", "key of a field", "required field", "and another fault"],
)
def test_null_for_anything_else_is_a_fault_and_nothing_is_lost(
    function: Callable[..., Any], sent: dict[str, Any]
) -> None:
    before = json.dumps(sent)
    assert fault_of(function, json.dumps(sent)) == fault_of(function, sent)
    assert json.dumps(sent) == before


def test_arguments_in_a_json_string_are_read_once() -> None:
    assert called(taking(int), json.dumps(json.dumps({"x": 1}))) == 1
    assert "must be a JSON object" in fault_of(taking(int), json.dumps(json.dumps(json.dumps({"x": 1}))))


@pytest.mark.parametrize("kind", [Iterator[int], Generator[int], AsyncIterator[int], list[Iterator[int]]], ids=str)
def test_what_can_be_read_only_once_is_refused(kind: Any) -> None:
    with pytest.raises(InvalidTool, match=r"'x': an iterator can be read only once: take list\[…\]"):
        parameters_of(taking(kind))


def test_a_list_in_place_of_an_iterable_is_checked_whole_and_can_be_read_twice() -> None:
    def f(numbers: Iterable[int], stops: Stops) -> Any:
        return list(numbers), list(numbers), list(stops.places)

    assert called(f, '{"numbers": ["1", 2], "stops": {"places": ["a"]}}') == ([1, 2], [1, 2], ["a"])
    assert "'numbers.1'" in fault_of(f, '{"numbers": [1, "x"], "stops": {"places": []}}')
    assert "'stops.places.0'" in fault_of(f, '{"numbers": [], "stops": {"places": [5]}}')


def test_a_fault_names_the_values_that_the_schema_shows() -> None:
    assert "Input should be one of 'red', 'x' (got 'green')" in fault_of(
        taking(Literal[Colour.RED, "x"]), {"x": "green"}
    )


SHADES = [[255, 0, 0], "2026-01-01", "0.5", "raw", "text"]


@pytest.mark.parametrize("kind", [Shade, Shade | None, Literal[*Shade], Literal[Shade.RED, b"raw"]], ids=shown)
def test_every_value_that_the_schema_shows_is_taken(kind: Any) -> None:
    schema = schema_of(taking(kind))
    parts = [schema["properties"]["x"], *schema.get("$defs", {}).values()]
    values = [value for part in parts for value in part.get("enum", [])]
    assert values == (SHADES if kind != Literal[Shade.RED, b"raw"] else [[255, 0, 0], "raw"])

    taken = [called(taking(kind), sent) for value in values for sent in ({"x": value}, json.dumps({"x": value}))]
    expected = [Shade(value) for value in (each.value for each in Shade)]
    if kind == Literal[Shade.RED, b"raw"]:
        expected = [Shade.RED, b"raw"]
    assert taken == [value for value in expected for _ in range(2)]


def test_members_with_such_values_are_taken_inside_of_models_and_shown_in_faults() -> None:
    sent = {"shade": "2026-01-01", "others": {"a": [[255, 0, 0], "0.5"]}}
    painted = called(taking(Painted), json.dumps({"x": sent}))
    assert painted == Painted(shade=Shade.DAY, others={"a": [Shade.RED, Shade.HALF]})
    assert called(taking(Painted), {"x": painted}) is painted
    assert called(taking(Shade), {"x": Shade.RAW}) is Shade.RAW
    assert "Input should be one of [255, 0, 0], '2026-01-01', '0.5', 'raw', 'text' (got [0, 0, 0])" in fault_of(
        taking(Shade), {"x": [0, 0, 0]}
    )


def test_an_enum_that_takes_other_values_too_still_does() -> None:
    assert [called(taking(Lenient), {"x": each}) for each in ([1], "other", "anything")] == [
        Lenient.ONE,
        Lenient.OTHER,
        Lenient.OTHER,
    ]


class Repo(AgentToolkit, Generic[T]):
    @tool
    def add(self, item: T, others: list[T] | None = None, *, more: "dict[str, T] | None" = None) -> Any:
        return item, others, more

    @tool
    def count(self, number: int) -> int:
        return number


class Addresses(Repo[Address]):
    pass


class Renamed(Repo[U], Generic[U]):
    pass


class Numbers(Renamed[int]):
    pass


class Late(Repo["Person"]):
    pass


@pytest.mark.parametrize(
    ("kit", "shown", "sent", "received"),
    [
        (Addresses, {"$ref": "#/$defs/Address"}, {"street": "High"}, Address(street="High")),
        (Numbers, {"type": "integer"}, "5", 5),
        (Late, {"$ref": "#/$defs/Person"}, {"name": "Ada"}, Person(name="Ada")),
        (Repo, {}, "5", "5"),
        (Repo[int], {"type": "integer"}, "5", 5),
        (Renamed[int], {"type": "integer"}, "5", 5),
    ],
    ids=str,
)
def test_a_type_variable_of_a_generic_toolkit_is_what_its_class_says(
    kit: Any, shown: dict[str, Any], sent: Any, received: Any
) -> None:
    found = kit().get("add")
    parameters = found.parameters
    assert parameters.json_schema["properties"]["item"] == shown
    checked = parameters.check({"item": sent, "others": [sent], "more": {"a": sent}})
    assert checked == {"item": received, "others": [received], "more": {"a": received}}


def test_functions_that_a_generic_toolkit_was_made_with_stay() -> None:
    kit = Repo[int](search)
    assert list(kit.tools) == ["add", "count", "search"]
    found = kit.get("add")
    assert found is not None
    assert found.parameters.json_schema["properties"]["item"] == {"type": "integer"}


def test_two_classes_of_one_generic_toolkit_do_not_share_what_they_take() -> None:
    kinds = [Numbers().get("add"), Addresses().get("add"), Numbers().get("add")]
    shown = [each.parameters.json_schema["properties"]["item"] for each in kinds if each is not None]
    assert shown == [{"type": "integer"}, {"$ref": "#/$defs/Address"}, {"type": "integer"}]


def search(query: str, limit: int = 5, who: Person | None = None) -> Any:
    return query, limit, who


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ("{", ["not valid JSON", "line 1"]),
        ("nope", ["not valid JSON"]),
        ("{'query': 'x'}", ["not valid JSON"]),
        ('{"query": "x"', ["not valid JSON"]),
        ('{"query": "x"} trailing', ["not valid JSON"]),
        ('{"query": "\\ud800"}', ["not valid JSON"]),
        ("null", ["'query' is missing"]),
        ('"[]"', ["must be a JSON object"]),
        ("[]", ["must be a JSON object"]),
        ('["query"]', ["must be a JSON object"]),
        ('"query"', ["must be a JSON object"]),
        ("5", ["must be a JSON object"]),
        ("{}", ["'query' is missing"]),
        ('{"limit": 1}', ["'query' is missing"]),
        ('{"query": "x", "size": 1}', ["there is no parameter 'size', only query, limit, who"]),
        ('{"Query": "x"}', ["'query' is missing", "there is no parameter 'Query'"]),
        ('{"query": 5}', ["'query'", "valid string", "(got 5)"]),
        ('{"query": null}', ["'query'", "valid string", "(got None)"]),
        ('{"query": "x", "limit": "many"}', ["'limit'", "integer", "'many'"]),
        ('{"query": "x", "limit": 1.5}', ["'limit'", "integer", "1.5"]),
        ('{"query": "x", "limit": [], "who": 5}', ["'limit'", "'who'"]),
        ('{"query": "x", "who": {}}', ["'who.name' is missing"]),
        ('{"query": "x", "who": {"name": "A", "home": {"street": 1}}}', ["'who.home.street'", "valid string"]),
        ("[" * 100_000, ["not valid JSON"]),
        ('{"query": ' + "[" * 5000 + "]" * 5000 + "}", ["not valid JSON"]),
        ('{"query": "x", "limit": ' + "1" * 5000 + "}", ["not valid JSON"]),
        ("\x00", ["not valid JSON"]),
    ],
    ids=lambda value: str(value)[:40],
)
def test_arguments_that_do_not_fit_are_refused_with_the_place_and_the_reason(arguments: str, words: list[str]) -> None:
    said = fault_of(search, arguments)

    assert all(word in said for word in words), said
    assert len(said) < 500
    said.encode()


def test_what_was_sent_is_quoted_only_in_part() -> None:
    assert len(fault_of(search, json.dumps({"query": ["x" * 10_000]}))) < 200


def test_only_the_first_ten_of_many_faults_are_told() -> None:
    said = fault_of(taking(list[int]), json.dumps({"x": ["no"] * 1000}))
    assert said.count("valid integer") == 10


def test_an_extra_field_of_a_nested_model_is_not_taken_for_a_parameter() -> None:
    said = fault_of(taking(Exact), '{"x": {"a": 1, "b": 2}}')
    assert "'x.b'" in said
    assert "only x" not in said


def test_a_lone_surrogate_in_the_text_itself_is_replaced() -> None:
    assert called(taking(str), '{"x": "a\ud800b"}') == "a\ufffdb"
    assert called(taking(str), '{"x": "\ud83d\ude00"}') == "😀"


def test_an_escaped_pair_of_surrogates_is_one_character() -> None:
    assert called(taking(str), '{"x": "\\ud83d\\ude00"}') == "😀"


@pytest.mark.parametrize(
    "error", [ValueError("odd"), AssertionError("odd"), KeyError("odd"), TypeError("odd")], ids=repr
)
def test_a_validator_of_the_user_that_raises_is_a_fault_of_the_arguments(error: Exception) -> None:
    def check(value: int) -> int:
        raise error

    assert "odd" in fault_of(taking(Annotated[int, AfterValidator(check)]), '{"x": 1}')


def test_the_arguments_that_were_given_are_not_changed() -> None:
    arguments = {"query": "x"}
    parameters = parameters_of(search)
    checked = parameters.check(arguments)
    parameters.bind(checked, None)
    assert (arguments, checked) == ({"query": "x"}, {"query": "x"})
