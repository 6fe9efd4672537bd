"""What a model is asked for when an object is wanted, how its answer is read, and in which way both are done."""

import dataclasses
import datetime as dt
import enum
import json
import re
import threading
import uuid
from collections.abc import Callable, Sequence
from contextlib import suppress
from decimal import Decimal
from typing import Annotated, Any, Final, Generic, Literal, NamedTuple, NewType, Optional, TypeVar, Union, get_args

import pytest
from hypothesis import given, settings, strategies as st
from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Field,
    Json,
    RootModel,
    TypeAdapter,
    ValidationError,
    field_validator,
)
from typing_extensions import TypedDict

from fractal import InvalidArguments
from fractal._answers.json_text import LONGEST_ANSWER, unfenced
from fractal._answers.output import OutputFault, OutputType, free_tool_name, output_for
from fractal._answers.strict import strict_schema
from fractal._answers.ways import OutputMemory, OutputMode, OutputPlan, Way
from fractal._functions.schema import explain
from fractal.errors import AuthenticationFailed, RateLimited, ServerError, StatusError
from fractal.models import _dialect
from tests.support import assert_linear, shown


class Address(BaseModel):
    """Where somebody lives."""

    street: str = Field(min_length=2, description="Street and number.")
    zip: str | None = None


class Person(BaseModel):
    name: str
    age: int = Field(ge=0, le=150)
    home: Address = Field(description="Main address.")
    others: list[Address] = []


class Node(BaseModel):
    value: int
    children: "list[Node]" = []


class Cat(BaseModel):
    kind: Literal["cat"] = "cat"
    lives: int


class Dog(BaseModel):
    kind: Literal["dog"] = "dog"
    tricks: list[str] = []


class Closed(BaseModel):
    model_config = ConfigDict(extra="forbid")
    a: int


class Open(BaseModel):
    model_config = ConfigDict(extra="allow")
    a: int


class Aliased(BaseModel):
    first: str = Field(alias="First name")


class Ids(BaseModel):
    id: uuid.UUID = Field(default_factory=uuid.uuid4)
    note: str = "none"


class Nothing(BaseModel):
    pass


class Names(RootModel[list[str]]):
    pass


Item = TypeVar("Item")


class Box(BaseModel, Generic[Item]):
    item: Item


@dataclasses.dataclass
class Point:
    """A place."""

    x: int
    y: int = 0
    next: "Point | None" = None


class Options(TypedDict, total=False):
    depth: int
    words: list[str]


class Pair(NamedTuple):
    a: int
    b: str = "x"


class Colour(enum.Enum):
    RED = "red"
    BLUE = "blue"


class Mixed(enum.Enum):
    ONE = 1
    TWO = "two"


UserId = NewType("UserId", int)
Pet = Annotated[Cat | Dog, Field(discriminator="kind")]
HOME = {"street": "High 1"}
ADA = {"name": "Ada", "age": 36, "home": HOME}


def output(kind: Any) -> OutputType:
    found = output_for(kind)
    assert found is not None
    return found


def fault_of(kind: Any, text: str) -> str:
    with pytest.raises(OutputFault) as caught:
        output(kind).parse_text(text)
    return str(caught.value)


# ---- types: whether the schema has an object at its root, whether it can be strict, JSON and what it becomes

KINDS: list[tuple[Any, bool, bool, Any, Any]] = [  # type, wrapped, strict, JSON, value
    (Person, False, True, ADA, Person.model_validate(ADA)),
    (Node, False, True, {"value": 1, "children": [{"value": 2}]}, Node(value=1, children=[Node(value=2)])),
    (Closed, False, True, {"a": 1}, Closed(a=1)),
    (Open, False, False, {"a": 1, "b": 2}, Open.model_validate({"a": 1, "b": 2})),
    (Aliased, False, True, {"First name": "Ada"}, Aliased.model_validate({"First name": "Ada"})),
    (Nothing, False, True, {}, Nothing()),
    (Box[int], False, True, {"item": 1}, Box[int](item=1)),
    (Box[Person], False, True, {"item": ADA}, Box[Person](item=Person.model_validate(ADA))),
    (Point, False, True, {"x": 1, "next": {"x": 2}}, Point(1, next=Point(2))),
    (Options, False, True, {"depth": 3}, {"depth": 3}),
    (dict[str, int], False, False, {"a": 1}, {"a": 1}),
    (dict, False, False, {"a": [1]}, {"a": [1]}),
    (Names, True, True, ["a"], Names(["a"])),
    (Pair, True, False, [1, "b"], Pair(1, "b")),
    (tuple[int, str], True, False, [1, "b"], (1, "b")),
    (tuple[int, ...], True, True, [1, 2], (1, 2)),
    (list[Person], True, True, [ADA], [Person.model_validate(ADA)]),
    (list, True, False, [1, "a"], [1, "a"]),
    (Sequence[int], True, True, [1], [1]),
    (set[int], True, True, [1, 2], {1, 2}),
    (frozenset[str], True, True, ["a"], frozenset({"a"})),
    (Cat | Dog, True, True, {"kind": "dog", "tricks": ["sit"]}, Dog(tricks=["sit"])),
    (Pet, True, True, {"kind": "cat", "lives": 9}, Cat(lives=9)),
    (Union[Person, list[int]], True, True, [1], [1]),  # noqa: UP007  # as others write it
    (Optional[Person], True, True, None, None),  # noqa: UP045  # as others write it
    (Person | None, True, True, ADA, Person.model_validate(ADA)),
    (int | str, True, True, "a", "a"),
    (Colour, True, True, "red", Colour.RED),
    (Mixed, True, True, 1, Mixed.ONE),
    (Literal["a", 1, None], True, True, None, None),
    (Annotated[str, Field(max_length=3)], True, True, "abc", "abc"),
    (Annotated[int, Field(gt=1)], True, True, 2, 2),
    (UserId, True, True, 7, 7),
    (int, True, True, 5, 5),
    (float, True, True, 1, 1.0),
    (bool, True, True, True, True),
    (bytes, True, True, "ab", b"ab"),
    (dt.date, True, True, "2024-05-06", dt.date(2024, 5, 6)),
    (dt.timedelta, True, True, "PT1H", dt.timedelta(hours=1)),
    (uuid.UUID, True, True, str(uuid.UUID(int=5)), uuid.UUID(int=5)),
    (Decimal, True, True, "1.5", Decimal("1.5")),
    (Json[list[int]], True, True, "[1]", [1]),
    (Any, True, False, {"a": 1}, {"a": 1}),
    (object, True, False, [1], [1]),
]
IDS = [repr(kind) for kind, *_ in KINDS]


@pytest.mark.parametrize(("kind", "is_wrapped", "is_strict", "plain", "value"), KINDS, ids=IDS)
def test_a_type_is_asked_for_as_an_object_and_its_json_becomes_a_value(
    kind: Any, is_wrapped: bool, is_strict: bool, plain: Any, value: Any
) -> None:
    one = output(kind)
    answer = json.dumps({"result": plain} if is_wrapped else plain)

    assert one.is_wrapped is is_wrapped
    assert one.json_schema["type"] == "object"
    assert (one.strict_schema is not None) is is_strict
    for read in (one.parse_text, one.parse_arguments, one.check):
        assert read(answer) == value
        assert type(read(answer)) is type(value)


@pytest.mark.parametrize("kind", [str, None])
def test_plain_text_needs_no_schema(kind: Any) -> None:
    assert output_for(kind) is None


def a_function(x: int) -> int:
    return x


@pytest.mark.parametrize(
    ("kind", "words"),
    [
        (object(), ["pydantic-core schema"]),
        (5, ["5"]),
        ("Person", ["'Person'", "no type"]),
        (a_function, ["no type"]),
        (len, ["no type"]),
        (json, ["no type"]),
        (threading.Lock, ["lock"]),
        (threading.Thread, ["Thread"]),
        (Callable[[], int], ["Callable"]),
        (type[int], ["type[int]"]),
        (dict[tuple[int, int], str], ["keys"]),
        (enum.Enum("Handles", {"OPEN": object()}), ["no form in JSON"]),
        (list["Unknown"], ["Unknown"]),  # type: ignore[name-defined]  # noqa: F821
        (Annotated[str, Field(pattern="(")], ["regex"]),
    ],
    ids=shown,
)
def test_what_has_no_json_schema_is_refused_at_once(kind: Any, words: list[str]) -> None:
    with pytest.raises(InvalidArguments) as caught:
        output_for(kind)
    text = str(caught.value)
    assert text.startswith("output_type=")
    assert "give a pydantic model" in text
    assert all(word in text for word in words), text
    assert "\n" not in text


def test_a_type_is_read_once() -> None:
    assert output_for(Person) is output_for(Person)
    assert output_for(list[Person]) is output_for(list[Person])


def test_unions_that_are_equal_but_not_the_same_keep_their_order() -> None:
    assert (Cat | Dog) == (Dog | Cat)
    assert [output(kind).name for kind in (Cat | Dog, Dog | Cat)] == ["Cat_Dog", "Dog_Cat"]


def test_a_type_that_cannot_be_hashed_is_read_each_time() -> None:
    kind = Annotated[list[int], {"a": "note"}]
    with pytest.raises(TypeError):
        hash(kind)
    assert output(kind).parse_text("[1]") == [1]


@pytest.mark.parametrize(
    ("kind", "name"),
    [
        (Person, "Person"),
        (list[Person], "list_Person"),
        (Cat | Dog, "Cat_Dog"),
        (Pet, "Cat_Dog"),
        (Box[int], "Box_int"),
        (dict[str, list[Person]], "dict_str_list_Person"),
        (int, "int"),
        (dt.date, "date"),
        (Literal["ü"], "Literal"),
        (type("Ünï", (BaseModel,), {}), "n"),
        (type("Ü", (BaseModel,), {}), "answer"),
        (type("A" * 80, (BaseModel,), {}), "A" * 64),
    ],
    ids=repr,
)
def test_a_type_has_a_name_that_endpoints_take(kind: Any, name: str) -> None:
    assert output(kind).name == name


@pytest.mark.parametrize("kind", [kind for kind, *_ in KINDS], ids=IDS)
def test_every_name_has_the_form_that_endpoints_ask_for(kind: Any) -> None:
    assert re.fullmatch(r"[a-zA-Z0-9_-]{1,64}", output(kind).name)


# ---- the request


def test_the_native_way_sends_the_strict_schema() -> None:
    one = output(Cat)
    assert one.request_fields("native") == {
        "response_format": {
            "type": "json_schema",
            "json_schema": {"name": "Cat", "schema": one.strict_schema, "strict": True},
        }
    }
    assert one.instruction("native") is None


def test_a_type_that_cannot_be_strict_sends_its_plain_schema_and_says_so() -> None:
    one = output(dict[str, int])
    assert one.request_fields("native")["response_format"]["json_schema"] == {
        "name": "dict_str_int",
        "schema": {"type": "object", "additionalProperties": {"type": "integer"}},
        "strict": False,
    }


def test_the_tool_way_offers_a_tool_that_takes_the_answer() -> None:
    one = output(list[int])
    assert one.request_fields("tool") == {}
    schema = one.tool_schema("give_it")
    assert schema["type"] == "function"
    assert schema["function"]["name"] == "give_it"
    assert schema["function"]["parameters"]["required"] == ["result"]
    assert one.tool_schema()["function"]["name"] == "final_answer"
    assert "'give_it'" in str(one.instruction("tool", "give_it"))


def test_the_tool_of_a_type_without_fields_has_properties_too() -> None:
    assert output(dict[str, int]).tool_schema()["function"]["parameters"]["properties"] == {}


def test_the_prompt_way_describes_the_json_in_words() -> None:
    one = output(Person)
    text = one.instruction("prompt")
    assert one.request_fields("prompt") == {}
    assert text is not None
    assert "JSON only" in text
    assert json.loads(text.split("\n", 1)[1]) == one.json_schema


@pytest.mark.parametrize(("way", "words"), [("native", "JSON Schema"), ("tool", "'final_answer'"), ("prompt", "JSON")])
def test_a_correction_names_the_fault_and_the_way_to_answer(way: Way, words: str) -> None:
    text = output(Person).correction("'age' is missing", way)
    assert "'age' is missing" in text
    assert words in text


@pytest.mark.parametrize(
    ("taken", "name"),
    [
        ([], "final_answer"),
        (["final_answer"], "final_answer_2"),
        (["final_answer", "final_answer_2"], "final_answer_3"),
    ],
)
def test_the_output_tool_gets_a_name_that_no_other_tool_has(taken: list[str], name: str) -> None:
    assert free_tool_name(taken) == name


# ---- strict schemas, held against the rules that OpenAI documents

TYPES = {"string", "number", "boolean", "integer", "object", "array", "null"}
KEYWORDS = {
    *("type", "properties", "required", "additionalProperties", "items", "anyOf", "enum", "const", "$ref", "$defs"),
    *("description", "pattern", "format", "multipleOf", "maximum", "exclusiveMaximum", "minimum", "exclusiveMinimum"),
    *("minItems", "maxItems"),
}
FORMATS = {"date-time", "time", "date", "duration", "email", "hostname", "ipv4", "ipv6", "uuid"}


def breaches(schema: Any, path: str = "#", root: Any = None) -> list[str]:
    """What is against the documented subset, with the place where it is."""
    if not isinstance(schema, dict):
        return [f"{path}: not a schema"]
    root = root if root is not None else schema
    found = [f"{path}: keyword {key}" for key in schema.keys() - KEYWORDS]
    if root is schema and schema.get("type") != "object":
        found.append("the root is no object")
    if "$ref" in schema:
        name = schema["$ref"].removeprefix("#/$defs/")
        found += [f"{path}: beside $ref: {key}" for key in schema.keys() - {"$ref"}]
        found += [] if name in root["$defs"] else [f"{path}: {name} is nowhere"]
    kinds = schema.get("type", [])
    kinds = kinds if isinstance(kinds, list) else [kinds]
    found += [f"{path}: type {kind}" for kind in kinds if kind not in TYPES]
    if not kinds and not schema.keys() & {"anyOf", "$ref"}:
        found.append(f"{path}: no type")
    if schema.get("format", "date") not in FORMATS or "(?" in schema.get("pattern", ""):
        found.append(f"{path}: format or pattern")
    if "object" in kinds:
        properties = schema.get("properties", {})
        if schema.get("additionalProperties") is not False or schema.get("required") != list(properties):
            found.append(f"{path}: open, or not all required")
    if "array" in kinds and "items" not in schema:
        found.append(f"{path}: array of anything")
    inner = {
        **{f"{path}/properties/{name}": value for name, value in schema.get("properties", {}).items()},
        **{f"{path}/$defs/{name}": value for name, value in schema.get("$defs", {}).items()},
        **{f"{path}/anyOf/{index}": value for index, value in enumerate(schema.get("anyOf", []))},
        **({f"{path}/items": schema["items"]} if "items" in schema else {}),
    }
    return found + [breach for place, value in inner.items() for breach in breaches(value, place, root)]


def test_the_checker_of_these_tests_finds_breaches() -> None:
    assert breaches(Person.model_json_schema())
    assert breaches({"type": "object", "properties": {"a": {"type": "string"}}, "additionalProperties": False})
    assert breaches({"anyOf": [{"type": "string"}]})


@pytest.mark.parametrize("kind", [kind for kind, _, is_strict, *_ in KINDS if is_strict], ids=repr)
def test_a_strict_schema_keeps_the_documented_rules(kind: Any) -> None:
    assert breaches(output(kind).strict_schema) == []


class Everything(BaseModel):
    """Every rule that pydantic can write down."""

    model_config = ConfigDict(json_schema_extra={"examples": [{"a": 1}], "x-note": "n"})

    short: str = Field(min_length=1, max_length=9, title="Short", examples=["a"], deprecated=True)
    code: str = Field(pattern="^[a-z]+$")
    flagged: Annotated[str, Field(json_schema_extra={"pattern": "(?i)a"})]
    number: float = Field(gt=0, lt=9, multiple_of=0.5)
    few: list[int] = Field(min_length=1, max_length=3)
    different: set[str]
    link: Annotated[str, Field(json_schema_extra={"format": "uri"})]
    when: dt.datetime
    place: Address = Field(Address(street="High"), description="Place.")
    pet: Pet
    pick: Literal["a"] = "a"
    choice: Literal["a", "b"] = "b"
    maybe: int | None = None
    either: int | bool = 1


def test_every_rule_is_enforced_or_said_in_words() -> None:
    strict = output(Everything).strict_schema
    assert strict is not None
    assert breaches(strict) == []
    shown = strict["properties"]
    assert shown["short"]["description"] == "maxLength: 9, minLength: 1"
    assert shown["code"]["pattern"] == "^[a-z]+$"
    assert shown["flagged"]["description"] == 'pattern: "(?i)a"'
    assert (shown["number"]["exclusiveMinimum"], shown["number"]["multipleOf"]) == (0, 0.5)
    assert (shown["few"]["minItems"], shown["few"]["maxItems"]) == (1, 3)
    assert shown["different"]["description"] == "uniqueItems: true"
    assert shown["link"]["description"] == 'format: "uri"'
    assert shown["when"]["format"] == "date-time"
    assert "Place. (default: " in shown["place"]["description"]
    assert strict["$defs"]["Address"]["properties"]["street"]["description"] == "Street and number. (minLength: 2)"


def test_what_may_be_left_out_may_be_null_but_a_constant_stays() -> None:
    strict = output(Everything).strict_schema
    assert strict is not None
    shown = strict["properties"]
    assert shown["choice"]["anyOf"] == [{"enum": ["a", "b"], "type": "string"}, {"type": "null"}]
    assert shown["pick"] == {"const": "a", "type": "string"}
    assert shown["maybe"] == {"anyOf": [{"type": "integer"}, {"type": "null"}]}
    assert shown["either"]["anyOf"] == [{"type": "integer"}, {"type": "boolean"}, {"type": "null"}]


@pytest.mark.parametrize(
    "inner",
    [
        {},
        True,
        {"description": "anything"},
        {"type": "object"},
        {"type": "object", "additionalProperties": True},
        {"type": "object", "properties": {}, "additionalProperties": {"type": "string"}},
        {"type": "object", "patternProperties": {"^a": {"type": "string"}}, "additionalProperties": False},
        {"type": ["object", "null"], "properties": {}},
        {"type": "array"},
        {"type": "array", "prefixItems": [{"type": "string"}]},
        {"type": "string", "not": {"const": "a"}},
        {"allOf": [{"type": "string"}, {"minLength": 1}]},
        {"anyOf": [{"type": "string"}], "oneOf": [{"type": "string"}]},
        {"anyOf": [{"type": "string"}, {}]},
        {"enum": [["a"]]},
    ],
    ids=repr,
)
def test_what_the_subset_has_no_words_for_is_not_strict(inner: Any) -> None:
    root = {"type": "object", "properties": {"a": inner}, "required": ["a"]}
    before = json.dumps(root)
    assert strict_schema(root) is None
    assert strict_schema({"type": "object", "properties": {}, "$defs": {"a": inner}}) is None
    assert json.dumps(root) == before


def test_a_single_all_of_is_what_is_in_it() -> None:
    strict = strict_schema(
        {"type": "object", "properties": {"a": {"allOf": [{"type": "string"}], "title": "A"}}, "required": ["a"]}
    )
    assert strict is not None
    assert strict["properties"] == {"a": {"type": "string"}}


# ---- reading text

DUMPED = json.dumps(ADA)


@pytest.mark.parametrize(
    "text",
    [
        DUMPED,
        f"  \n{DUMPED}\n",
        f"\ufeff{DUMPED}",
        f"```json\n{DUMPED}\n```",
        f"```\n{DUMPED}\n```",
        f"Here you are:\n```json\n{DUMPED}\n```\nAnything else?",
        f"The answer is {DUMPED}.",
        f"Of {{the}} two [names] I {{ took }} this: {DUMPED} (see [1])",
        json.dumps(ADA, indent=2),
        f"{DUMPED}}}",
    ],
)
def test_json_is_found_in_fences_and_between_words(text: str) -> None:
    assert output(Person).parse_text(text) == Person.model_validate(ADA)


@pytest.mark.parametrize(
    ("kind", "text", "value"),
    [
        (list[int], "[1, 2]", [1, 2]),
        (list[int], "```json\n[1, 2]\n```", [1, 2]),
        (list[int], "Here: [1, 2].", [1, 2]),
        (list[int], 'Here: {"result": [1, 2]}.', [1, 2]),
        (list[Person], f"[{DUMPED}]", [Person.model_validate(ADA)]),
        (int, "42", 42),
        (int, "```\n42\n```", 42),
        (bool, "true", True),
        (Person | None, "null", None),
        (Colour, '"red"', Colour.RED),
        (Colour, "red", Colour.RED),
        (Colour, "```\nred\n```", Colour.RED),
        (Literal["1", "2"], "1", "1"),
        (Literal["true"], "true", "true"),
        (dt.date, "2024-05-06", dt.date(2024, 5, 6)),
        (Annotated[str, Field(max_length=20)], 'say "hi"\nnow', 'say "hi"\nnow'),
        (Person | Annotated[str, Field(min_length=1)], "I do not know [yet].", "I do not know [yet]."),
    ],
    ids=repr,
)
def test_what_is_no_object_may_come_without_one(kind: Any, text: str, value: Any) -> None:
    assert output(kind).parse_text(text) == value


@pytest.mark.parametrize(
    ("kind", "text", "words"),
    [
        (Person, "", ["not valid JSON"]),
        (Person, "I cannot say.", ["not valid JSON", "no JSON object"]),
        (Person, "{name: Ada}", ["no JSON object"]),
        (Person, '{"name": "Ada", "age": 36', ["not valid JSON", "delimiter"]),
        (Person, '{"name": "Ada" "age": 36}', ["not valid JSON", "delimiter"]),
        (Person, f"{DUMPED} or {DUMPED}", ["more than one"]),
        (Person, f"{DUMPED} or {{}}", ["more than one"]),
        (Person, f"[{DUMPED}]", ["JSON object"]),
        (Person, "[]", ["JSON object"]),
        (Point, "[]", ["JSON object"]),
        (Options, "[]", ["JSON object"]),
        (Person, "null", ["JSON object"]),
        (Person, '{"name": "Ada", "age": NaN}', ["not valid JSON"]),
        (Person, '{"name": "\ud800", "age": "\\ud800"}', ["not valid JSON"]),
        (Person, '{"a": ' + "[" * 100_000, ["not valid JSON"]),
        (Person, '{"a": ' + "[" * 5000 + "]" * 5000 + "}", ["not valid JSON"]),
        (Box[float], '{"item": NaN}', ["not valid JSON", "NaN"]),
        (float, "NaN", ["not valid JSON"]),
        (int, "forty-two", ["not valid JSON"]),
        (list[int], '{"results": [1]}', ["'result' is missing"]),
        (Cat | Dog, '{"lives": 9}', ["'result' is missing"]),
        (Colour, "green", ["'red'"]),
        (Colour, "{red}", ["not valid JSON"]),
        (Person | Annotated[str, Field(min_length=1)], '{"name": "Ada', ["not valid JSON"]),
        (Person | Annotated[str, Field(min_length=1)], 'It is {"name": "Ada', ["not valid JSON"]),
        (dt.date, "tomorrow", ["date"]),
        (Closed, '{"a": 1, "b": 2}', ["no field 'b'", "only a"]),
    ],
    ids=repr,
)
def test_an_answer_that_does_not_fit_is_told_in_words_for_the_model(kind: Any, text: str, words: list[str]) -> None:
    fault = fault_of(kind, text)
    assert all(word in fault for word in words), fault
    assert len(fault) < 400


def test_a_fault_names_each_field_what_is_wrong_with_it_and_what_was_there() -> None:
    fault = fault_of(Person, '{"age": "old", "home": {"street": "A"}, "others": [{"street": 5}]}')
    assert fault == (
        "'name' is missing; "
        "'age': Input should be a valid integer, unable to parse string as an integer (got 'old'); "
        "'home.street': String should have at least 2 characters (got 'A'); "
        "'others.0.street': Input should be a valid string (got 5)"
    )


def test_at_most_ten_faults_are_told() -> None:
    assert fault_of(list[int], json.dumps(["x"] * 30)).count("valid integer") == 10


def test_validators_of_a_model_speak_to_the_model_whatever_they_raise() -> None:
    class Picky(BaseModel):
        a: int
        b: int = 0

        @field_validator("a")
        @classmethod
        def small(cls, value: int) -> int:
            if value > 5:
                raise ValueError("at most 5")
            return value

        @field_validator("b")
        @classmethod
        def broken(cls, value: int) -> int:
            raise KeyError("oh")

    assert "at most 5" in fault_of(Picky, '{"a": 6}')
    assert "KeyError" in fault_of(Picky, '{"a": 1, "b": 1}')


def test_no_arguments_at_all_are_an_empty_object() -> None:
    assert output(Nothing).parse_arguments("") == Nothing()
    with pytest.raises(OutputFault, match="'value' is missing"):
        output(Node).parse_arguments("")


def test_arguments_are_json_and_nothing_else() -> None:
    with pytest.raises(OutputFault, match="not valid JSON"):
        output(Person).parse_arguments(f"```\n{DUMPED}\n```")


def test_a_null_that_a_field_does_not_take_leaves_the_field_out() -> None:
    found = output(Ids).parse_text('{"id": null, "note": null}')
    assert isinstance(found.id, uuid.UUID)
    assert found.note == "none"
    assert output(Options).parse_text('{"depth": null}') == {}
    assert output(Pet).parse_text('{"result": {"kind": "dog", "tricks": null}}') == Dog()
    assert output(Cat | Dog).parse_text('{"result": {"kind": "dog", "tricks": null}}') == Dog()
    assert output(list[Ids]).parse_text('{"result": [{"note": null}, {"note": "a"}]}')[0].note == "none"


def test_a_null_that_no_member_of_a_union_takes_is_left_out_once() -> None:
    class Left(BaseModel):
        a: str
        size: int = 1

    class Right(BaseModel):
        b: str
        size: int = 1

    assert output(Left | Right).parse_text('{"result": {"size": null, "b": "x"}}') == Right(b="x")


def test_a_null_that_a_field_takes_stays() -> None:
    assert output(dict[str, int | None]).parse_text('{"a": null}') == {"a": None}
    assert output(Address).parse_text('{"street": "High", "zip": null}').model_fields_set == {"street", "zip"}


def test_a_null_for_a_field_that_must_be_there_is_told_as_such() -> None:
    assert fault_of(Person, '{"name": null, "age": 1, "home": {"street": "High"}}') == (
        "'name': Input should be a valid string (got None)"
    )
    assert fault_of(list[int], '{"result": null}').startswith("'result': Input should be a valid array")


@settings(deadline=None)
@given(st.text(alphabet='{}[]":,\\ntrue0123abc `\n') | st.text())
def test_no_text_does_more_than_not_fit(text: str) -> None:
    for kind in (Person, list[Person], dict[str, Any], Person | None, Colour, dt.date, int):
        try:
            value = output(kind).parse_text(text)
        except OutputFault:
            continue
        TypeAdapter(kind).validate_python(value)


@settings(deadline=None)
@given(st.dictionaries(st.text(), st.integers() | st.text() | st.none()), st.text(alphabet="abc .,:;()\n"))
def test_json_is_found_whatever_the_words_around_it(value: dict[str, Any], words: str) -> None:
    assert output(dict[str, Any]).parse_text(f"{words}{json.dumps(value)}{words}") == value


# ---- the way

MODEL = "m"


def status(code: int, param: str | None = None, kind: type[StatusError] = StatusError) -> StatusError:
    return kind(f"HTTP {code}", status=code, param=param)


def plan(mode: OutputMode = "auto", memory: OutputMemory | None = None) -> OutputPlan:
    return OutputPlan(mode, MODEL, memory or OutputMemory())


def test_auto_goes_from_native_to_a_tool_to_the_prompt() -> None:
    one = plan()
    assert one.way == "native"
    assert one.refused(status(400, "response_format"))
    assert one.way == "tool"
    assert one.refused(status(400, "tools[0].function"))
    assert one.way == "prompt"


@pytest.mark.parametrize("code", [400, 404, 415, 422, 501])
@pytest.mark.parametrize(
    "param", [None, "response_format", "response_format.json_schema.strict", "response_format[type]"]
)
def test_a_status_about_the_field_of_the_way_or_about_no_field_is_a_refusal(code: int, param: str | None) -> None:
    assert plan().refused(status(code, param))


@pytest.mark.parametrize("param", ["tools", "tools[0].function.parameters", "tool_choice"])
def test_the_fields_of_the_tool_way_are_its_own(param: str) -> None:
    one = plan()
    assert not one.refused(status(400, param))
    assert one.refused(status(400, "response_format"))
    assert one.refused(status(400, param))


@pytest.mark.parametrize(
    "error",
    [
        status(400, "messages"),
        status(400, "messages[0].response_format"),
        status(400, "response_formats"),
        status(401, kind=AuthenticationFailed),
        status(403, kind=AuthenticationFailed),
        status(429, kind=RateLimited),
        status(408, kind=ServerError),
        status(409, kind=ServerError),
        status(413),
        status(503, kind=ServerError),
        StatusError("no status"),
    ],
    ids=lambda error: f"{error.status} {error.param}",
)
def test_other_errors_are_no_refusals(error: StatusError) -> None:
    one = plan()
    assert not one.refused(error)
    assert one.way == "native"
    assert one.failure(error) is error


@pytest.mark.parametrize("mode", ["native", "tool", "prompt"])
def test_a_fixed_mode_falls_back_to_nothing(mode: Way) -> None:
    one = plan(mode)
    error = status(400)
    assert one.way == mode
    assert not one.refused(error)
    assert one.failure(error) is error
    assert not hasattr(error, "__notes__")


def test_a_mode_that_does_not_exist_is_wrong_use() -> None:
    with pytest.raises(InvalidArguments, match="output_mode='json'"):
        plan("json")  # type: ignore[arg-type]
    assert set(get_args(OutputMode)) == {"auto", *get_args(Way)}


def test_a_refusal_is_remembered_for_the_model_once_another_way_was_taken() -> None:
    memory = OutputMemory()
    one = plan(memory=memory)
    assert one.refused(status(400))
    assert plan(memory=memory).way == "native"  # nothing is certain yet
    one.accepted()
    assert plan(memory=memory).way == "tool"
    assert OutputPlan("auto", "another", memory).way == "native"
    assert plan("native", memory).way == "native"


@pytest.mark.parametrize(("seconds", "way"), [(600.0, "tool"), (0.0, "native")])
def test_a_server_that_has_failed_is_asked_in_the_better_way_again_after_a_while(
    seconds: float, way: Way, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_dialect, "_BELIEVED", seconds)
    memory = OutputMemory()
    one = plan(memory=memory)
    assert one.refused(status(500, kind=ServerError))
    one.accepted()
    assert plan(memory=memory).way == way


def test_if_every_way_is_refused_the_first_error_is_raised_and_nothing_remembered() -> None:
    memory = OutputMemory()
    one, errors = plan(memory=memory), [status(400), status(422), status(404)]
    assert [one.refused(error) for error in errors] == [True, True, False]
    failure = one.failure(errors[-1])

    assert failure is errors[0]
    assert failure.__notes__ == [
        "asked again with output_mode='tool': HTTP 422",
        "asked again with output_mode='prompt': HTTP 404",
    ]
    assert plan(memory=memory).way == "native"


def test_an_error_of_another_kind_on_the_way_down_is_the_error() -> None:
    one, last = plan(), status(503, kind=ServerError)
    assert one.refused(status(400))
    assert not one.refused(last)
    assert one.failure(last) is last


def test_after_an_answer_in_a_way_nothing_is_a_refusal_of_it() -> None:
    one = plan()
    one.accepted()
    one.accepted()
    assert not one.refused(status(400, "response_format"))
    assert one.way == "native"


def test_where_a_way_was_taken_before_an_error_that_names_no_field_is_about_something_else() -> None:
    memory = OutputMemory()
    plan(memory=memory).accepted()
    assert not plan(memory=memory).refused(status(400))


def test_a_schema_that_is_refused_where_others_were_taken_is_not_the_end_of_the_way() -> None:
    memory = OutputMemory()
    plan(memory=memory).accepted()
    one = plan(memory=memory)
    assert one.refused(status(400, "response_format"))
    one.accepted()
    assert plan(memory=memory).way == "native"


def test_many_threads_may_learn_at_once() -> None:
    memory = OutputMemory()

    def learn(number: int) -> None:
        for turn in range(200):
            one = OutputPlan("auto", f"{number}-{turn}", memory)
            one.refused(status(400))
            one.accepted()
            memory.refused(f"{number}-{turn}")

    threads = [threading.Thread(target=learn, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(memory.refused(f"{number}-{turn}") == {"native"} for number in range(4) for turn in range(200))


def test_an_annotated_type_keeps_its_validators() -> None:
    def even(value: int) -> int:
        if value % 2:
            raise ValueError("must be even")
        return value

    kind = Annotated[int, AfterValidator(even)]
    assert output(kind).parse_text("4") == 4
    assert "must be even" in fault_of(kind, "3")


# ---- how long it takes

# What once took time that grew with the square, or might.
LONG = {
    "line ends in an open fence": lambda n: "```json\n" + "\n" * n + "x",
    "blanks in an open fence": lambda n: "```json\n" + " " * n + "x",
    "fences in a fence": lambda n: "```\n" * (n // 4) + "x",
    "a word after a fence": lambda n: "```" + "a" * n,
    "braces": lambda n: "{" * n,
    "braces and blanks": lambda n: "{ " * (n // 2),
    "a brace and blanks": lambda n: "{" + " " * n,
    "brackets": lambda n: "[" * n,
    "closed brackets": lambda n: "[" * (n // 2) + "]" * (n // 2),
    "objects in prose": lambda n: 'a {" ' * (n // 5),
    "digits": lambda n: "[" + "1" * n,
    "half pairs": lambda n: '{"name": "' + "\\ud83d" * (n // 6),
    "backslashes": lambda n: '{"name": "' + "\\\\" * (n // 2),
    "members that do not fit": lambda n: "[" + "{}," * (n // 3) + "{}]",
    "nulls": lambda n: "[" + "null," * (n // 5) + "null]",
}


@pytest.mark.parametrize("make", LONG.values(), ids=LONG)
@pytest.mark.parametrize("kind", [Person, list[int], list[Address], Cat | Dog])
def test_an_answer_is_read_in_time_that_grows_with_its_length(kind: Any, make: Callable[[int], str]) -> None:
    def read(size: int) -> None:
        with suppress(OutputFault):
            output(kind).parse_text(make(size))

    assert_linear(read, 1 << 16)


def test_of_a_million_faults_the_first_are_told() -> None:
    with pytest.raises(OutputFault) as caught:
        output(list[int]).parse_text("[" + '"a",' * 200_000 + '"b"]')
    told = str(caught.value).split("; ")
    assert told[0] == "'0': Input should be a valid integer, unable to parse string as an integer (got 'a')"
    assert len(told) == 10


def test_what_has_no_form_in_json_is_told_of_too() -> None:
    with pytest.raises(ValidationError) as caught:
        TypeAdapter(list[int]).validate_python(["\ud800"] * 1000)
    assert explain(caught.value, []).count(r"(got '\ud800')") == 10


def test_a_longer_answer_is_not_read() -> None:
    text = json.dumps({"result": ["a" * LONGEST_ANSWER]})
    for read in (output(list[str]).parse_text, output(list[str]).parse_arguments):
        with pytest.raises(OutputFault, match=rf"the answer has {len(text)} characters: no more than 1000000 are read"):
            read(text)
        assert read(json.dumps({"result": ["a" * (LONGEST_ANSWER - 100)]}))


@pytest.mark.parametrize(
    ("text", "inside"),
    [
        ("```json\n{}\n```", "{}"),
        ("```\n{}```", "{}"),
        ("```json  \r\n{}\r\n\r\n```", "{}"),
        ("```\n```", ""),
        ("```\n{}\n```\n```\n{}\n```", "{}\n```\n```\n{}"),
        ("```\n``", "```\n``"),
        ("```json {}```", "```json {}```"),
        ("{}", "{}"),
    ],
)
def test_what_is_in_a_fence(text: str, inside: str) -> None:
    assert unfenced(text) == inside


@pytest.mark.parametrize(
    "text",
    [
        '<think>Maybe {"name": "Rome", "people": 1}? No.</think>\n{"name": "Rome", "people": 28}',
        '[THINK]{"name": "R"}[/THINK]{"name": "Rome", "people": 28}',
        '<think>{"name": "R"}</think>\n```json\n{"name": "Rome", "people": 28}\n```',
    ],
)
def test_a_draft_in_the_thinking_is_no_answer(text: str):
    output = output_for(dict[str, str | int])
    assert output is not None
    assert output.parse_text(text) == {"name": "Rome", "people": 28}


@pytest.mark.parametrize(
    "text",
    [
        '<think>Maybe {"name": "Rome", "people": 1}?</think>\nI cannot say.',
        '{"notes": ["</think>"]}\n{"name": "Oslo", "people": 1}',
    ],
    ids=["a draft alone", "a tag in a string"],
)
def test_no_answer_is_made_of_what_is_only_thought_or_quoted(text: str):
    output = output_for(dict[str, str | int])
    assert output is not None
    with pytest.raises(OutputFault):
        output.parse_text(text)


@pytest.mark.parametrize("kind", [{}, Literal[()], Final[int], {"type": "object"}], ids=repr)
def test_what_is_no_type_is_refused_by_an_error_of_ours(kind: Any):
    with pytest.raises(InvalidArguments, match="output_type="):
        output_for(kind)
