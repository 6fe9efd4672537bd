"""A function's signature as a JSON Schema for the model, and as a validator for what the model sends."""

from __future__ import annotations

import collections.abc
import inspect
import json
import re
import types
import typing
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, field, replace
from typing import Annotated, Any, NotRequired, Required, Union, cast, get_args, get_origin

import typing_extensions
from pydantic import ConfigDict, Field, PydanticSchemaGenerationError, PydanticUserError, TypeAdapter, ValidationError
from pydantic.errors import PydanticInvalidForJsonSchema
from pydantic.fields import FieldInfo
from pydantic_core import SchemaError, to_jsonable_python
from typing_extensions import TypedDict

from fractal._functions.arguments import object_text
from fractal._functions.callables import bound_names, fixed_names
from fractal._functions.docstring import Documentation, ParameterText
from fractal._functions.signature import SignatureFault, read_signature, type_hints, with_types
from fractal._functions.types import (
    PlainJsonSchema,
    Validator,
    adapter_for,
    explain,
    first_faults,
    first_line,
    fresh_validator,
    read_json,
    read_python,
)
from fractal._json import decode, is_mapping
from fractal._texts import clean_text, described
from fractal.errors import InvalidTool

__all__ = ["ArgumentsFault", "Parameters", "schema_of"]

_EMPTY = inspect.Parameter.empty
_TYPE_WORDS: dict[str, Any] = {
    **{kind.__name__: kind for kind in (str, int, float, bool, list, dict, set, tuple, bytes)},
    **{"string": str, "integer": int, "number": float, "boolean": bool, "array": list, "object": dict},
    **{name: getattr(typing, name) for name in ("Any", "Optional", "Union", "List", "Dict", "Literal")},
}
_TYPE_TEXT = re.compile(r"[\w\s\[\],|'\"-]+")
_UNPACK = {typing.Unpack, typing_extensions.Unpack}
_QUALIFIERS = {typing.Required, typing.NotRequired, typing_extensions.ReadOnly}


class ArgumentsFault(ValueError):
    """Arguments do not fit; the text is short and meant for the model."""


class Parameters:
    """The parameters of one function: their JSON Schema for the model, and the check of arguments.

    Args:
        adapter: pydantic's view of the arguments, by name.
        json_schema: JSON Schema of the arguments object.
        signature: The parameters.
        context_names: Those that get the run's context.
        fixed_names: Names that only the function itself may give a value.

    Attributes:
        json_schema: JSON Schema of the arguments object.
        context_names: The parameters that get the run's context.
        shown_names: What the model calls each parameter.
    """

    __slots__ = (
        "_core",
        "_defaults",
        "_fixed",
        "_paths",
        "_positional",
        "_takes_others",
        "_validator",
        "context_names",
        "json_schema",
        "shown_names",
    )

    def __init__(
        self,
        adapter: TypeAdapter[dict[str, Any]],
        json_schema: dict[str, Any],
        signature: list[inspect.Parameter],
        context_names: set[str],
        fixed_names: set[str],
    ) -> None:
        self._core, self._validator = adapter.core_schema, cast("Validator", adapter.validator)
        self.json_schema, self.context_names = json_schema, context_names
        self.shown_names = shown_names(adapter)
        self._paths = _other_paths(adapter)
        self._takes_others = json_schema.get("additionalProperties") is not False
        self._fixed = fixed_names - self.shown_names.keys() - context_names
        self._positional = [p for p in signature if p.kind is p.POSITIONAL_ONLY]
        self._defaults = {p.name: p.default for p in signature if isinstance(p.default, FieldInfo)}

    def check(self, arguments: str | Mapping[str, Any]) -> dict[str, Any]:
        """The arguments as the function's own types, by name.

        Args:
            arguments: JSON text, as a model sends it, or values by name.

        Raises:
            ArgumentsFault: They do not fit; says what is wrong with which.
        """
        return self._checked(self._validator, arguments)

    def check_beside(self, known: Mapping[str, Any], arguments: Mapping[str, Any]) -> dict[str, Any]:
        """Some of the arguments by name, checked as `check` does, and others that have been checked before.

        Args:
            known: Those, by the function's names; they are taken as they are.
            arguments: All others.
        """
        return {**self._checked(self._validator_without(known), arguments), **known}

    def sent(self, arguments: object) -> Mapping[str, Any]:
        """The arguments as sent, by name, before any check or conversion."""
        if isinstance(arguments, str):
            with suppress(ValueError):
                arguments = decode(object_text(clean_text(arguments)) or "")
        return arguments if is_mapping(arguments) else {}

    def _checked(self, validator: Validator, arguments: str | Mapping[str, Any]) -> dict[str, Any]:
        checked: dict[str, Any]
        try:
            if isinstance(arguments, str):
                checked = self._read(validator, clean_text(arguments))
            else:
                checked = read_python(validator, dict(arguments), self.json_schema)
        except ValidationError as error:
            if self._fixed:
                self._refuse_fixed(fault["loc"][0] for fault in first_faults(error, 100) if fault["loc"])
            raise ArgumentsFault(explain(error, [*self.shown_names.values()], paths=self._paths)) from None
        except Exception as error:  # a validator of the user's own
            raise ArgumentsFault(described(error)) from error
        if self._takes_others:
            self._refuse_fixed(checked)
            for name in self.context_names & checked.keys():
                del checked[name]  # the run gives it
        return checked

    def _read(self, validator: Validator, text: str) -> dict[str, Any]:
        try:
            checked: dict[str, Any] = read_json(validator, text, self.json_schema)
        except ValidationError:
            written = object_text(text)
            if written is None or written == text.strip():
                raise
            checked = read_json(validator, written, self.json_schema)
        return checked

    def _refuse_fixed(self, names: Iterable[int | str]) -> None:
        """Refuse arguments that only the function itself sets, though it takes any names."""
        for name in self._fixed.intersection(names):
            there_are = ", ".join(self.shown_names.values()) or "none"
            raise ArgumentsFault(f"there is no parameter {name!r}, only {there_are}")

    def bind(self, arguments: Mapping[str, Any], context: object) -> tuple[list[Any], dict[str, Any]]:
        """Checked arguments in the form of a call: positional ones, and the rest by name."""
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

    def _validator_without(self, known: Mapping[str, Any]) -> Validator:
        """A validator of the other parameters alone."""
        core: Any = self._core
        inner = core["schema"] if core["type"] == "definitions" else core
        fields = {name: each for name, each in inner["fields"].items() if name not in known}
        less = inner | {"fields": fields}
        return fresh_validator(less if inner is core else core | {"schema": less})


def _aliases_of(adapter: TypeAdapter[Any]) -> dict[str, list[list[int | str]]]:
    """The ways in which each parameter may be given, as paths, the first before the others."""
    core: Any = adapter.core_schema
    fields = (core["schema"] if core["type"] == "definitions" else core)["fields"]
    return {name: _paths_in(field.get("validation_alias", name)) for name, field in fields.items()}


def _paths_in(alias: Any) -> list[list[int | str]]:
    if isinstance(alias, str):
        return [[alias]]
    return alias if isinstance(alias[0], list) else [alias]


def shown_names(adapter: TypeAdapter[Any]) -> dict[str, str]:
    """The name of each parameter in the JSON Schema: the first of its aliases that is not a path."""
    aliases = _aliases_of(adapter)
    return {name: next((str(path[0]) for path in paths if len(path) == 1), name) for name, paths in aliases.items()}


def _other_paths(adapter: TypeAdapter[Any]) -> dict[tuple[int | str, ...], str]:
    names, aliases = shown_names(adapter), _aliases_of(adapter)
    return {tuple(path): names[name] for name, paths in aliases.items() for path in paths if path != [names[name]]}


# ---- the schema of a signature


@dataclass(slots=True)
class _Arguments:
    """The arguments of a signature by name, while it is read."""

    tool_name: str
    documentation: Documentation
    is_context: Callable[[Any], bool]
    bound: set[str]
    fields: dict[str, Any] = field(default_factory=dict[str, Any])
    defaults: dict[str, Any] = field(default_factory=dict[str, Any])  # that can be shown
    context_names: set[str] = field(default_factory=set[str])
    others: Any = None  # the type of what has any other name; None if there is no other

    def add(self, name: str, hint: Any, default: Any) -> None:
        """Take one parameter."""
        if self.is_context(hint):
            self.context_names.add(name)
            return
        if any((get_origin(each) or each) is kind for each in _parts_of(hint) for kind in _READ_ONCE):
            raise InvalidTool(self.tool_name, f"{name!r}: an iterator can be read only once: take list[…]")
        self.fields[name] = _field(hint, default, self.documentation.parameters.get(name, ParameterText()))
        if default is not _EMPTY and not isinstance(default, FieldInfo):
            self.defaults[name] = default

    def add_others(self, name: str, hint: Any) -> None:
        """Take the arguments that `**` stands for."""
        if get_origin(hint) in _UNPACK:
            self._add_unpacked(name, get_args(hint)[0])
        else:
            text = self.documentation.parameters.get(name, ParameterText())
            self.others = _described(_type_from_text(text.type) if hint is _EMPTY else hint, text)

    def _add_unpacked(self, name: str, unpacked: Any) -> None:
        kind = get_origin(unpacked) or unpacked
        if not typing_extensions.is_typeddict(kind):
            raise InvalidTool(self.tool_name, f"**{name}: Unpack[…] takes a TypedDict")
        hints = _hints_of(kind, dict(zip(getattr(kind, "__parameters__", ()), get_args(unpacked), strict=False)))
        for key, hint in hints.items():
            if key not in self.bound:
                self.add(key, hint, _EMPTY if key in kind.__required_keys__ else _LEFT_OUT)
        others = getattr(kind, "__extra_items__", typing_extensions.NoExtraItems)
        if others not in (None, typing_extensions.NoExtraItems):
            self.others = others

    def adapter(self) -> TypeAdapter[dict[str, Any]]:
        """Pydantic's type adapter for the arguments; it raises one of `_NOT_OFFERED` if there can be none."""
        make: Any = TypedDict  # the functional form wants names known beforehand; these are the function's
        more = {} if self.others in (None, Any) else {"extra_items": self.others}
        arguments: Any = make("Arguments", self.fields, **more)
        arguments.__pydantic_config__ = ConfigDict(
            extra="forbid" if self.others is None else "allow", arbitrary_types_allowed=False, validate_by_name=True
        )
        return adapter_for(arguments)

    def why_not(self, error: Exception) -> str:
        """The reason why the arguments cannot be offered: the parameter at fault, and what to do about it."""
        for name, hint in self.fields.items():
            try:
                replace(self, fields={name: hint}, others=None).adapter().json_schema(schema_generator=PlainJsonSchema)
            except _NOT_OFFERED as fault:
                return f"{name!r}: {_words(fault)}"
        return _words(error)


_NO_FORM = (PydanticSchemaGenerationError, PydanticInvalidForJsonSchema)
_NOT_OFFERED = (*_NO_FORM, PydanticUserError, SchemaError, TypeError, NameError)


def _words(fault: Exception) -> str:
    if not isinstance(fault, _NO_FORM):
        return first_line(fault)
    # The rest of pydantic's text is about settings of models, which a function has none of.
    what = first_line(fault).split(". ")[0]
    return f"{what}: no model can send that; leave it to ctx.deps or functools.partial, or take what JSON can say"


_LEFT_OUT: Any = object()  # the default of what need not be given, where nobody says what it is then
_READ_ONCE = (
    *(collections.abc.Iterator, collections.abc.Generator),
    *(collections.abc.AsyncIterable, collections.abc.AsyncIterator, collections.abc.AsyncGenerator),
)


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
    arguments = _Arguments(name, documentation, is_context, bound_names(function))
    try:
        signature, hints = read_signature(function, known_names)
        for parameter in signature:
            hint = hints.get(parameter.name, _EMPTY)
            if parameter.kind is parameter.VAR_POSITIONAL:
                raise InvalidTool(name, f"*{parameter.name} has no form in JSON: take a list instead")
            if parameter.kind is parameter.VAR_KEYWORD:
                arguments.add_others(parameter.name, hint)
            else:
                arguments.add(parameter.name, hint, parameter.default)
    except SignatureFault as error:
        raise InvalidTool(name, str(error)) from None
    try:
        adapter, schema = _shown_to_models(arguments)
    except _NOT_OFFERED as error:
        raise InvalidTool(name, arguments.why_not(error)) from None
    return Parameters(adapter, schema, signature, arguments.context_names, fixed_names(function))


def _shown_to_models(arguments: _Arguments) -> tuple[TypeAdapter[dict[str, Any]], dict[str, Any]]:
    """Pydantic's view of arguments, and their JSON Schema: what that does not show is not taken from anybody."""
    adapter = arguments.adapter()
    schema = adapter.json_schema(schema_generator=PlainJsonSchema)
    properties = schema.setdefault("properties", {})
    hidden = [name for name, shown in shown_names(adapter).items() if shown not in properties]
    if hidden:
        for name in hidden:
            if get_origin(arguments.fields.pop(name)) is Required:
                raise InvalidTool(arguments.tool_name, f"{name!r} is hidden from models: give it a default")
        adapter = arguments.adapter()
    for name, shown in shown_names(adapter).items():
        if name in arguments.defaults:
            with suppress(ValueError):
                properties[shown]["default"] = _shown_default(arguments.defaults[name])
    schema.pop("title", None)
    # Endpoints differ in what they make of an object schema without properties.
    return adapter, {"type": "object", "properties": properties, **schema}


def _field(hint: Any, default: Any, text: ParameterText) -> Any:
    if hint is _EMPTY:
        hint = _type_from_text(text.type)
    if default is None and not _takes_none(hint):  # around a `Field(alias=…)`, a union would hide the alias
        hint = Union[hint, None]  # noqa: UP007  # a hint need not be a type that knows `|`
    hint = _described(hint, text, default)
    if isinstance(default, FieldInfo):
        hint = Annotated[hint, default]
        return Required[hint] if default.is_required() else NotRequired[hint]
    return Required[hint] if default is _EMPTY else NotRequired[hint]


def _takes_none(hint: Any) -> bool:
    inner = get_args(hint)[0] if get_origin(hint) is Annotated else hint
    return get_origin(inner) in (Union, types.UnionType) and type(None) in get_args(inner)


def _described(hint: Any, text: ParameterText, default: Any = None) -> Any:
    """A type with a description: its own, that of the default, the docstring's, or a text that is annotated."""
    notes = [note for each in _members_of(hint) for note in getattr(each, "__metadata__", ())]
    if any(isinstance(note, FieldInfo) and note.description for note in (*notes, default)):
        return hint
    texts = (getattr(note, "documentation", note) for note in notes)
    description = text.description or next((each for each in texts if isinstance(each, str) and each.strip()), None)
    return Annotated[hint, Field(description=description)] if description else hint


def _members_of(hint: Any) -> Iterator[Any]:
    """A type, or the members of a union."""
    if get_origin(hint) in (types.UnionType, Union):
        for each in get_args(hint):
            yield from _members_of(each)
    else:
        yield hint


def _parts_of(hint: Any) -> Generator[Any]:
    """A type, and all types inside it."""
    yield hint
    for each in get_args(hint):
        yield from _parts_of(each)


def _hints_of(kind: Any, arguments: Mapping[Any, Any]) -> dict[str, Any]:
    """The types of a TypedDict's keys."""
    hints = type_hints(kind, None)
    return {name: with_types(_unqualified(hint), arguments) for name, hint in hints.items()}


def _unqualified(hint: Any) -> Any:
    while get_origin(hint) in _QUALIFIERS:
        hint = get_args(hint)[0]
    return hint


def _type_from_text(text: str | None) -> Any:
    """The type that a docstring names, if it is a plain one; else Any."""
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


def _shown_default(default: object) -> Any:
    """A default in JSON's own types.

    Raises:
        ValueError: It has no form there: it is not shown.
    """
    shown = to_jsonable_python(default)
    json.dumps(shown, allow_nan=False)
    return shown
