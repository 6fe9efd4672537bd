"""Answers as Python objects: what the model is asked for, and how its answer is read.

Pure: no I/O. The loop sends what is made here, and hands back what came.
"""

from __future__ import annotations

import functools
import inspect
import json
import re
from collections.abc import Container, Mapping
from typing import Annotated, Any, NoReturn, get_args, get_origin

from pydantic import PydanticSchemaGenerationError, PydanticUserError, TypeAdapter, ValidationError
from pydantic_core import SchemaError
from typing_extensions import TypedDict

from fractal._answers.json_text import (
    BLANK,
    NOT_JSON,
    OBJECT,
    OBJECT_OR_LIST,
    OutputFault,
    bounded,
    end_of_json,
    find_json,
    is_json,
    unfenced,
)
from fractal._answers.strict import strict_schema
from fractal._answers.ways import Way
from fractal._functions.types import PlainJsonSchema, adapter_for, explain, first_line, read_json
from fractal._json import encode, is_list, is_mapping
from fractal._texts import clean_text, described
from fractal.errors import InvalidArguments

__all__ = [
    "WRAPPER",
    "OutputFault",
    "OutputType",
    "free_tool_name",
    "output_for",
]

_THINKING = re.compile(r"\A(?:<(think(?:ing)?)>.*?</\1>|\[THINK\].*?\[/THINK\])", re.DOTALL | re.IGNORECASE)
_TOOL_NAME = "final_answer"
WRAPPER = "result"


class OutputType:
    """The type of answers: its JSON Schema, and the way from an answer to a value.

    Endpoints want an object at the root. A type whose JSON is something else (a list, a number, a union) is asked for
    as `{"result": …}`, and taken out of that again.

    Args:
        kind: The type, or any annotation that has a JSON Schema.

    Attributes:
        name: The type's name, as endpoints take names.
        adapter: pydantic's view of the type.
        is_wrapped: Whether it is asked for as `{"result": …}`.
        wrapper: pydantic's view of that, or None.
        json_schema: Schema of the object that is asked for.
        strict_schema: The same in the subset of `strict: true`, or None if it cannot be said there.

    Raises:
        InvalidArguments: No model can be asked for it.
    """

    __slots__ = (
        "_bare_schema",
        "_names",
        "_starts",
        "_takes_text",
        "adapter",
        "is_wrapped",
        "json_schema",
        "name",
        "strict_schema",
        "wrapper",
    )

    def __init__(self, kind: Any) -> None:
        self.adapter, schema = _read(kind)
        self._bare_schema = schema
        self.name = _name_of(kind)
        self.is_wrapped = schema.get("type") != "object"
        self.wrapper: TypeAdapter[Any] | None = None
        self._takes_text = self.is_wrapped and _takes(schema, "string", schema)
        self._starts = OBJECT_OR_LIST if self.is_wrapped and _takes(schema, "array", schema) else OBJECT
        if self.is_wrapped:
            self.wrapper, schema = _read(_wrapped(kind))
        schema.pop("title", None)
        self._names = list(schema.get("properties", ()))
        self.json_schema = schema
        self.strict_schema = strict_schema(schema)

    def request_fields(self, way: Way) -> dict[str, Any]:
        """The fields that a way of asking adds to a request."""
        if way != "native":
            return {}
        strict = self.strict_schema is not None
        schema = {"name": self.name, "schema": self.strict_schema or self.json_schema, "strict": strict}
        return {"response_format": {"type": "json_schema", "json_schema": schema}}

    def tool_schema(self, tool_name: str = _TOOL_NAME) -> dict[str, Any]:
        """The tool that takes the answer, as a chat-completions schema."""
        description = "Give the final answer. Call it once, when there is nothing left to find out."
        parameters: dict[str, Any] = {"properties": {}, **self.json_schema}
        return {
            "type": "function",
            "function": {"name": tool_name, "description": description, "parameters": parameters},
        }

    def instruction(self, way: Way, tool_name: str = _TOOL_NAME) -> str | None:
        """The instruction to the model about the form of its answer; None if the request has it."""
        match way:
            case "native":
                return None
            case "tool":
                return f"Give the final answer by calling the tool {tool_name!r}, not as text."
            case "prompt":
                return (
                    "Give the final answer as JSON only: no other text, no code fence. It must fit this JSON Schema:\n"
                    + self._shown_schema()
                )

    def correction(self, fault: str, way: Way, tool_name: str = _TOOL_NAME) -> str:
        """The text for the model about an answer that does not fit.

        Args:
            fault: What is wrong with it.
            way: The way in which it was asked for.
            tool_name: The tool that takes the answer.
        """
        match way:
            case "native":
                # There are endpoints that take a `response_format` and never look at it.
                again = f"Answer again, with JSON only, which must fit this JSON Schema:\n{self._shown_schema()}"
            case "tool":
                again = f"Give the whole answer again by calling the tool {tool_name!r}."
            case "prompt":
                again = "Give the whole answer again, as JSON only."
        return f"The answer was not accepted: {fault}. {again}"

    def parse_text(self, text: str) -> Any:
        """The answer in a reply's text.

        The text may begin with thinking in tags, be in a code fence, and have other text around one JSON value.

        Returns:
            A value of the type.

        Raises:
            OutputFault: It holds no answer, more than one, or one that does not fit.
        """
        # A draft in the thinking, which some servers leave before the answer, is no answer.
        text = _THINKING.sub("", clean_text(bounded(text)).strip(BLANK), count=1)
        text = unfenced(text.strip(BLANK))
        is_scalar = not text.startswith(("{", "[", '"'))
        try:
            return self.check(self._single_value(text))
        except OutputFault:
            if not (self._takes_text and is_scalar and find_json(text, self._starts) is None):
                raise
        # "yes" where Literal["yes", "no"] was asked for: the quotes are missing, and nothing else.
        return self.check(json.dumps(text))

    def parse_arguments(self, text: str) -> Any:
        """The answer in the arguments of the output tool.

        Returns:
            A value of the type.

        Raises:
            OutputFault: It does not fit.
        """
        return self.check(clean_text(bounded(text)).strip() or "{}")

    def check(self, text: str) -> Any:
        """The value of one JSON text, in which `{"result": …}` may be missing around a value that is no object.

        Raises:
            OutputFault: It does not fit.
        """
        text = text.strip()
        if self.wrapper is not None and text.startswith("{"):
            return self._checked(self.wrapper, text, self.json_schema)[WRAPPER]
        return self._checked(self.adapter, text, self._bare_schema)

    def start_of_json(self, text: str) -> int | None:
        """The position where the JSON of an incomplete answer begins; None if it has not begun."""
        return find_json(text, self._starts)

    def _checked(self, adapter: TypeAdapter[Any], text: str, schema: Mapping[str, Any]) -> Any:
        try:
            return read_json(adapter, text, schema)
        except ValidationError as error:
            raise OutputFault(explain(error, self._names, whole="the answer", part="field")) from None
        except Exception as error:  # a validator of the user's own
            raise OutputFault(described(error)) from error

    def _single_value(self, text: str) -> str:
        """The one JSON value in a text."""
        if is_json(text):
            return text
        start = find_json(text, self._starts)
        if start is None:
            raise OutputFault(f"{NOT_JSON}: there is no {'JSON value' if self.is_wrapped else 'JSON object'} in it")
        end = end_of_json(text, start)
        if find_json(text, self._starts, end) is not None:
            raise OutputFault("there is more than one JSON value in the answer: give one")
        return text[start:end]

    def _shown_schema(self) -> str:
        return encode(self.json_schema).decode()


@functools.lru_cache(maxsize=256)
def _known(kind: Any, shown: str) -> OutputType:
    return _made(kind)


def output_for(kind: Any) -> OutputType | None:
    """The output type for answers of a type, built once for each.

    Args:
        kind: A pydantic model, dataclass, TypedDict, NamedTuple, enum, `list[…]`, union, primitive: anything that has a
            JSON Schema. `str` or None: answers are text, as the model writes it.

    Returns:
        The type, or None for plain text.

    Raises:
        InvalidArguments: There is no JSON Schema for it.
    """
    if kind is None or kind is str:
        return None
    try:
        hash(kind)
    except TypeError:  # annotations with unhashable notes in them
        return _made(kind)
    # `A | B` equals `B | A`; their schemas differ, and so do their texts.
    return _known(kind, repr(kind))


def _made(kind: Any) -> OutputType:
    try:
        return OutputType(kind)
    except InvalidArguments:
        raise
    except Exception as error:  # what pydantic and typing make of what is no type at all
        _refuse(kind, f"it is no type ({described(error)})")


def _read(kind: Any) -> tuple[TypeAdapter[Any], dict[str, Any]]:
    if isinstance(kind, str) or inspect.isroutine(kind) or inspect.ismodule(kind):
        _refuse(kind, "it is no type")
    try:
        adapter = adapter_for(kind)
        schema = adapter.json_schema(schema_generator=PlainJsonSchema)
    except SchemaError as error:  # a pattern that is none, say
        _refuse(kind, " ".join(str(error).split())[:200])
    except (PydanticSchemaGenerationError, PydanticUserError, TypeError, NameError) as error:
        _refuse(kind, first_line(error).split(". ")[0].rstrip("."))
    return adapter, _without_root_reference(schema)


def _refuse(kind: Any, why: str) -> NoReturn:
    raise InvalidArguments(
        f"output_type={kind!r}: a model cannot be asked for it: {why}; give a pydantic model, a dataclass, a TypedDict,"
        " list[…], a union, an enum, or a primitive type"
    ) from None


def _without_root_reference(schema: dict[str, Any]) -> dict[str, Any]:
    """A schema without a reference at its root, which a recursive type has and endpoints refuse."""
    reference = schema.get("$ref")
    if reference is None:
        return schema
    name = reference.removeprefix("#/$defs/")
    return {"$defs": schema["$defs"], **schema["$defs"][name]}


def _wrapped(kind: Any) -> Any:
    make: Any = TypedDict
    return make("Answer", {WRAPPER: kind})


def _takes(schema: object, word: str, root: Mapping[str, Any]) -> bool:
    """Whether a schema allows JSON of a type, as far as can be told without a value."""
    if not is_mapping(schema):
        return schema is True
    reference = schema.get("$ref")
    if reference is not None:
        return _takes(root["$defs"].get(reference.removeprefix("#/$defs/")), word, root)
    choices: Any = schema.get("anyOf", schema.get("oneOf"))
    if is_list(choices):
        return any(_takes(choice, word, root) for choice in choices)
    if "type" in schema:
        return word in (schema["type"] if is_list(schema["type"]) else [schema["type"]])
    constants: Any = schema.get("enum", [schema["const"]] if "const" in schema else None)
    return constants is None or (word == "string" and any(isinstance(constant, str) for constant in constants))


def _name_of(kind: Any) -> str:
    """The name of a type, as endpoints take names: 1 to 64 letters, digits, _ and -."""
    while get_origin(kind) is Annotated:
        kind = get_args(kind)[0]
    shown = kind.__name__ if isinstance(kind, type) else re.sub(r"[\w.<>]+\.(?=\w)", "", repr(kind))
    return re.sub(r"[^a-zA-Z0-9]+", "_", shown).strip("_")[:64] or "answer"


def free_tool_name(taken: Container[str]) -> str:
    """A name for the output tool that no other tool has."""
    name, number = _TOOL_NAME, 1
    while name in taken:
        number += 1
        name = f"{_TOOL_NAME}_{number}"
    return name
