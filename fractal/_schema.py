"""A function's signature as a JSON Schema for the model, and as a validator for what the model sends."""

from __future__ import annotations

import functools
import inspect
import json
import re
import types
import typing
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from itertools import islice
from typing import Annotated, Any, NotRequired, Required, Union, cast

from pydantic import ConfigDict, Field, PydanticSchemaGenerationError, PydanticUserError, TypeAdapter, ValidationError
from pydantic.errors import PydanticInvalidForJsonSchema
from pydantic.fields import FieldInfo
from pydantic.json_schema import GenerateJsonSchema
from pydantic_core import SchemaError, to_jsonable_python
from typing_extensions import TypedDict

from fractal._docstring import Documentation, ParameterText
from fractal._texts import clean_text, described, repr_of
from fractal.errors import InvalidTool

__all__ = [
    "ArgumentsFault",
    "Parameters",
    "PlainJsonSchema",
    "SignatureFault",
    "explain",
    "first_faults",
    "first_line",
    "is_async",
    "read_signature",
    "schema_of",
]

_EMPTY = inspect.Parameter.empty
_TYPE_WORDS: dict[str, Any] = {
    **{kind.__name__: kind for kind in (str, int, float, bool, list, dict, set, tuple, bytes)},
    **{"string": str, "integer": int, "number": float, "boolean": bool, "array": list, "object": dict},
    **{name: getattr(typing, name) for name in ("Any", "Optional", "Union", "List", "Dict", "Literal")},
}
_TYPE_TEXT = re.compile(r"[\w\s\[\],|'\"-]+")


class ArgumentsFault(ValueError):
    """Arguments do not fit; the text is short and meant for the model."""


class SignatureFault(ValueError):
    """A signature cannot be read; the text says why."""


class PlainJsonSchema(GenerateJsonSchema):
    """JSON Schema as a model needs it: no warnings on the way, no titles that repeat the names."""

    def emit_warning(self, kind: Any, detail: str) -> None:
        """Nobody needs to hear that a default which JSON cannot take is not shown."""

    def field_title_should_be_set(self, schema: Any) -> bool:
        """Titles repeat the names; a model does not need them twice."""
        return False


class Parameters:
    """The parameters of one function: what the model is told of them, and how its arguments are checked.

    Attributes:
        json_schema: JSON Schema of the arguments object.
        context_names: The parameters that get the run's context.
    """

    __slots__ = ("_defaults", "_names", "_positional", "_validator", "context_names", "json_schema")

    def __init__(
        self,
        validator: TypeAdapter[dict[str, Any]],
        json_schema: dict[str, Any],
        signature: list[inspect.Parameter],
        context_names: set[str],
    ) -> None:
        self._validator, self.json_schema, self.context_names = validator, json_schema, context_names
        self._names = [p.name for p in signature if p.name not in context_names and p.kind is not p.VAR_KEYWORD]
        self._positional = [p for p in signature if p.kind is p.POSITIONAL_ONLY]
        self._defaults = {p.name: p.default for p in signature if isinstance(p.default, FieldInfo)}

    def check(self, arguments: str | Mapping[str, Any]) -> dict[str, Any]:
        """The arguments as the function's own types, by name.

        Args:
            arguments: JSON text, as a model sends it, or values by name.

        Raises:
            ArgumentsFault: They do not fit; says what is wrong with which.
        """
        try:
            if isinstance(arguments, str):
                # No text at all is how many endpoints say "no arguments".
                return self._validator.validate_json(clean_text(arguments).strip() or "{}")
            return self._validator.validate_python(dict(arguments))
        except ValidationError as error:
            raise ArgumentsFault(explain(error, self._names)) from None
        except Exception as error:  # a validator of the user's own
            raise ArgumentsFault(described(error)) from error

    def bind(self, arguments: Mapping[str, Any], context: object) -> tuple[list[Any], dict[str, Any]]:
        """Checked arguments as they are passed in a call: positional ones, and the rest by name."""
        by_name = dict(arguments)
        for name, default in self._defaults.items():
            if name not in by_name:
                by_name[name] = default.get_default(call_default_factory=True, validated_data=by_name)
        by_name |= dict.fromkeys(self.context_names, context)
        positional: list[Any] = []
        for parameter in self._positional:
            if parameter.name in by_name:
                positional.append(by_name.pop(parameter.name))
            elif parameter.default is not _EMPTY:
                positional.append(parameter.default)
        return positional, by_name


def explain(
    error: ValidationError, names: Sequence[str], *, whole: str = "the arguments", part: str = "parameter"
) -> str:
    """What is wrong with a value, as a short text for the model: at most ten faults.

    Args:
        error: What the validator says.
        names: The names that a top-level object may have.
        whole: What the value is called.
        part: What a member of it is called.
    """
    return "; ".join(_explain_one(fault, names, whole, part) for fault in first_faults(error, 10))


def first_faults(error: ValidationError, most: int) -> list[dict[str, Any]]:
    """The first faults of a value; there may be as many as it has members, and each costs something to look at."""
    if error.error_count() > _FEW:
        with suppress(Exception):  # something in it has no form in JSON
            return list(islice(_members(error.json(include_url=False)), most))
    return cast("list[dict[str, Any]]", error.errors(include_url=False)[:most])


_FEW = 100
_DECODER = json.JSONDecoder()


def _members(text: str) -> Iterator[Any]:
    """The members of a list in JSON, each read when it is asked for."""
    end = 0
    while text[end] != "]":
        member, end = _DECODER.raw_decode(text, end + 1)
        yield member


def _explain_one(fault: dict[str, Any], names: Sequence[str], whole: str, part: str) -> str:
    where = ".".join(str(step) for step in fault["loc"])
    match fault["type"]:
        case "json_invalid":
            return f"{whole}: not valid JSON ({fault['msg'].removeprefix('Invalid JSON: ')})"
        case "dict_type" | "model_type" | "dataclass_type" if not where:
            return f"{whole} must be a JSON object"
        case "missing":
            return f"{where!r} is missing"
        case "extra_forbidden" if len(fault["loc"]) == 1:
            return f"there is no {part} {where!r}, only {', '.join(names) or 'none'}"
        case _:
            return f"{repr(where) if where else whole}: {fault['msg']} (got {repr_of(fault['input'])[:60]})"


def is_async(function: Callable[..., Any]) -> bool:
    """Whether calling a function, a partial of one, or a callable object gives something to await."""
    inner: Any = function
    while isinstance(inner, functools.partial):
        inner = cast("Any", inner.func)
    if inspect.iscoroutinefunction(inner):
        return True
    return not inspect.isroutine(inner) and inspect.iscoroutinefunction(type(inner).__call__)


def schema_of(
    function: Callable[..., Any],
    *,
    name: str,
    documentation: Documentation,
    is_context: Callable[[Any], bool],
    known_names: Mapping[str, Any] | None = None,
) -> Parameters:
    """Read the parameters of a function.

    Args:
        function: The function as it will be called: bound, if it is a method.
        name: The tool's name, for errors.
        documentation: Its docstring, for descriptions and for types that the signature leaves out.
        is_context: Tells the annotation of the parameter that gets the run's context.
        known_names: Names that annotations may use even if their module has imported them for type checkers only.

    Raises:
        InvalidTool: The signature cannot be offered to a model.
    """
    try:
        signature, hints = read_signature(function, known_names)
    except SignatureFault as error:
        raise InvalidTool(name, str(error)) from None
    fields: dict[str, Any] = {}
    context_names: set[str] = set()
    extra = "forbid"
    bound = function.keywords if isinstance(function, functools.partial) else {}
    signature = [parameter for parameter in signature if parameter.name not in bound]
    for parameter in signature:
        hint = hints.get(parameter.name, _EMPTY)
        if parameter.kind is parameter.VAR_POSITIONAL:
            raise InvalidTool(name, f"*{parameter.name} has no form in JSON: take a list instead")
        if parameter.kind is parameter.VAR_KEYWORD:
            extra = "allow"
        elif is_context(hint):
            context_names.add(parameter.name)
        else:
            text = documentation.parameters.get(parameter.name, ParameterText())
            fields[parameter.name] = _field(parameter, hint, text)
    validator = _validator(name, fields, extra)
    schema = _json_schema(validator, name, signature)
    return Parameters(validator, schema, signature, context_names)


def read_signature(
    function: Callable[..., Any], known_names: Mapping[str, Any] | None = None
) -> tuple[list[inspect.Parameter], dict[str, Any]]:
    """The parameters of a function, and their annotations as types, by name.

    Args:
        function: The function as it will be called: bound, if it is a method.
        known_names: Names that annotations may use even if their module has imported them for type checkers only.

    Raises:
        SignatureFault: It has no signature, or an annotation is no type.
    """
    try:
        signature = list(inspect.signature(function).parameters.values())
    except (ValueError, TypeError) as error:
        raise SignatureFault(f"its signature cannot be read ({error}): wrap it in a function") from None
    except NameError as error:  # annotations are evaluated late from Python 3.14 on
        raise SignatureFault(_unknown_name(error)) from None
    return signature, _type_hints(function, signature, known_names or {})


def _type_hints(
    function: Callable[..., Any], signature: list[inspect.Parameter], known_names: Mapping[str, Any]
) -> dict[str, Any]:
    annotations = {p.name: p.annotation for p in signature if p.annotation is not _EMPTY}
    inner = inspect.unwrap(function.func if isinstance(function, functools.partial) else function)
    if not inspect.isroutine(inner):
        inner = type(inner).__call__  # a callable object
    namespace = {**known_names, **getattr(getattr(inner, "__func__", inner), "__globals__", {})}
    holder = types.SimpleNamespace(__annotations__=annotations)
    try:
        return typing.get_type_hints(holder, globalns=namespace, include_extras=True)
    except NameError as error:
        raise SignatureFault(_unknown_name(error)) from None
    except (TypeError, SyntaxError) as error:
        raise SignatureFault(f"an annotation is no type: {error}") from None


def _unknown_name(error: NameError) -> str:
    return f"an annotation names {error.name!r}, which its module does not know: define or import it at module level"


def _field(parameter: inspect.Parameter, hint: Any, text: ParameterText) -> Any:
    if hint is _EMPTY:
        hint = _type_from_text(text.type)
    if parameter.default is None:
        hint = Union[hint, None]  # noqa: UP007  # a hint need not be a type that knows `|`
    extras: list[Any] = []
    if isinstance(parameter.default, FieldInfo):
        extras.append(parameter.default)
    if text.description and not _has_description(hint, parameter.default):
        extras.append(Field(description=text.description))
    annotated = Annotated[(hint, *extras)] if extras else hint
    is_required = parameter.default is _EMPTY or (
        isinstance(parameter.default, FieldInfo) and parameter.default.is_required()
    )
    return Required[annotated] if is_required else NotRequired[annotated]


def _has_description(hint: Any, default: Any) -> bool:
    metadata = getattr(hint, "__metadata__", ())
    return any(isinstance(item, FieldInfo) and item.description for item in (*metadata, default))


def _type_from_text(text: str | None) -> Any:
    """The type a docstring names, if it is one of the plain ones; else anything goes."""
    text = re.sub(r"\bor\b", "|", text or "")
    if not _TYPE_TEXT.fullmatch(text) or re.search(r"\b(and|not|if|else|in|is|for|lambda)\b", text):
        return Any
    try:
        # Only the words of the table are known here, and the pattern lets no call through.
        found = eval(text, {"__builtins__": {}}, _TYPE_WORDS)
        TypeAdapter(found)
    except Exception:
        return Any
    return found


def _validator(name: str, fields: dict[str, Any], extra: str) -> TypeAdapter[dict[str, Any]]:
    make: Any = TypedDict  # the functional form wants names known beforehand; these are the function's
    arguments: Any = make(name, fields)
    arguments.__pydantic_config__ = ConfigDict(extra=cast("Any", extra), arbitrary_types_allowed=False)
    try:
        return TypeAdapter(arguments)
    except (PydanticSchemaGenerationError, PydanticUserError, SchemaError, TypeError) as error:
        raise InvalidTool(name, first_line(error)) from None


def _json_schema(
    validator: TypeAdapter[dict[str, Any]], name: str, signature: list[inspect.Parameter]
) -> dict[str, Any]:
    try:
        schema = validator.json_schema(schema_generator=PlainJsonSchema)
    except PydanticInvalidForJsonSchema as error:
        raise InvalidTool(name, first_line(error)) from None
    for parameter in signature:
        shown = schema["properties"].get(parameter.name) if "properties" in schema else None
        if shown is None or parameter.default is _EMPTY or isinstance(parameter.default, FieldInfo):
            continue
        with suppress(ValueError):
            shown["default"] = _shown_default(parameter.default)
    schema.pop("title", None)
    # Endpoints differ in what they make of an object schema without properties.
    return {"type": "object", "properties": {}, **schema}


def _shown_default(default: object) -> Any:
    """A default in JSON's own types.

    Raises:
        ValueError: It has no form there: it is not shown.
    """
    shown = to_jsonable_python(default)
    json.dumps(shown, allow_nan=False)
    return shown


def first_line(error: Exception) -> str:
    """The part of an error's text that says what it is."""
    return str(error).splitlines()[0]
