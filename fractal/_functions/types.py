"""Types as pydantic sees them: what a model is asked for is what is taken, and what is taken can be read again."""

from __future__ import annotations

import enum
import json
import operator
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from itertools import islice
from typing import Any, Protocol, cast

from pydantic import VERSION, PydanticUserError, TypeAdapter, ValidationError
from pydantic.json_schema import GenerateJsonSchema
from pydantic_core import PydanticSerializationError, SchemaValidator, to_jsonable_python

from fractal._copies import copied
from fractal._json import decode, encode, is_list, is_mapping, is_same
from fractal._texts import kind_of, repr_of

__all__ = [
    "PlainJsonSchema",
    "Validator",
    "adapter_for",
    "explain",
    "first_faults",
    "first_line",
    "fresh_validator",
    "read_json",
    "read_python",
]


class PlainJsonSchema(GenerateJsonSchema):
    """JSON Schema for models: no warnings, no titles that repeat the names."""

    def emit_warning(self, kind: Any, detail: str) -> None:
        """Drop pydantic's warning that a default which JSON cannot express is not shown."""

    def field_title_should_be_set(self, schema: Any) -> bool:
        """Leave titles out, which only repeat the names."""
        return False

    def is_subclass_schema(self, schema: Any) -> Any:
        """Refuse `type[…]`: no class comes in JSON, and pydantic would show that anything fits."""
        return self.handle_invalid_for_json_schema(schema, f"type[{schema['cls'].__name__}]")

    def dict_schema(self, schema: Any) -> Any:
        """Refuse keys that no text can be read as."""
        keys = schema.get("keys_schema", {}).get("type")
        if keys in _NO_KEYS:
            return self.handle_invalid_for_json_schema(schema, f"a dict whose keys are of the kind {keys}")
        return super().dict_schema(schema)


_NO_KEYS = {"tuple", "frozenset", "set", "list", "dict", "model", "dataclass", "typed-dict"}


def adapter_for(kind: Any) -> TypeAdapter[Any]:
    """Pydantic's view of a type, but that `Iterable[…]` is a checked list, and members of an Enum can be had by value.

    Raises:
        PydanticUserError: It cannot have one.
    """
    adapter: TypeAdapter[Any] = TypeAdapter(kind)
    core = _rewritten(adapter.core_schema)
    if core is not adapter.core_schema:
        if not _FRESH:  # pragma: no cover - as it was until pydantic 2.12
            fault = "Iterable[…], and Literal[…] of members of an Enum, need pydantic 2.13: take list[…], or the Enum"
            raise PydanticUserError(fault, code=None)
        adapter.core_schema, adapter.validator = core, fresh_validator(core)
    return adapter


def fresh_validator(core: Any) -> SchemaValidator:
    """A validator of a core schema in which models do not reuse the validators they were made with."""
    return SchemaValidator(core, **_FRESH)


_FRESH: dict[str, Any] = {"_use_prebuilt": False} if tuple(map(int, VERSION.split(".")[:2])) >= (2, 13) else {}


# Where a core schema has others inside it: one, a list of them, or a dictionary.
_INNER = {
    *("schema", "keys_schema", "values_schema", "extras_schema", "extras_keys_schema", "return_schema"),
    *("lax_schema", "strict_schema", "json_schema", "python_schema", "var_args_schema", "var_kwargs_schema"),
    *("items_schema", "arguments_schema", "choices", "fields", "steps", "definitions"),
}


def _rewritten(core: Any) -> Any:
    """A core schema without lazy parts that takes all that its JSON Schema shows; the same object if unchanged."""
    kind = kind_of(core)
    if kind is tuple:  # a choice that has a label
        new = _rewritten(core[0])
        return core if new is core[0] else (new, *core[1:])
    if kind is not dict:
        return core
    inner = {key: _rewritten_inside(core[key], key) for key in _INNER & core.keys()}
    if any(new is not core[key] for key, new in inner.items()):
        core = {**core, **inner}
    rule = _RULES.get(core.get("type", ""))
    return rule(core) if rule is not None else core


def _rewritten_inside(value: Any, key: str) -> Any:
    new: Any
    if is_list(value):
        new = [_rewritten(each) for each in value]
        is_changed = any(map(operator.is_not, new, value))
    elif key in ("choices", "fields"):
        new = {name: _rewritten(each) for name, each in value.items()}
        is_changed = any(map(operator.is_not, new.values(), value.values()))
    else:
        return _rewritten(value)
    return new if is_changed else value


def _as_list(core: dict[str, Any]) -> dict[str, Any]:
    """A list schema in place of an iterator's, whose items would be checked only when read."""
    return {**core, "type": "list"}


def _with_values(core: dict[str, Any]) -> dict[str, Any]:
    """A literal that takes the form that its values have in JSON, such as the value of an Enum's member."""
    return _taking_forms(core, core["expected"], _by_form(core["expected"]))


def _enum_with_values(core: dict[str, Any]) -> dict[str, Any]:
    """An Enum that takes the form that the values of its members have in JSON, such as a list for a tuple."""
    members: list[enum.Enum] = core["members"]
    by_form = [(form, member) for form, member in _by_form(members) if not is_same(form, member.value)]
    return _taking_forms(core, members, by_form)


def _taking_forms(core: dict[str, Any], values: list[Any], by_form: list[tuple[Any, Any]]) -> dict[str, Any]:
    """A schema that takes some of its values by their form in JSON, and names all in that form in its faults."""
    if not by_form:
        return core
    others = [value for value in values if all(value is not each for _, each in by_form)]

    def value_of(given: Any) -> Any:
        if any(is_same(given, each) for each in others):
            return given
        return next((value for form, value in by_form if is_same(form, given)), given)

    shown = ", ".join(repr(_json_form(each)) for each in values)
    error = {"custom_error_type": "enum_value", "custom_error_message": f"Input should be one of {shown}"}
    inner = {key: value for key, value in core.items() if key != "ref"}  # references lead to the whole
    checked = {"type": "custom-error", "schema": inner, **error}
    before = {"type": "function-before", "function": {"type": "no-info", "function": value_of}, "schema": checked}
    return before | ({"ref": core["ref"]} if "ref" in core else {})


def _by_form(values: list[Any]) -> list[tuple[Any, Any]]:
    """The values that have another form in JSON, each with that."""
    forms = [(_json_form(each), each) for each in values]
    return [(form, each) for form, each in forms if not is_same(form, each)]


def _json_form(value: Any) -> Any:
    """A value in JSON's own types.

    Raises:
        PydanticUserError: It has no form there.
    """
    try:
        return to_jsonable_python(value)
    except PydanticSerializationError:
        fault = f"{repr_of(value)} has no form in JSON: give it a value that has one"
        raise PydanticUserError(fault, code=None) from None


def _tagged_by_value(core: dict[str, Any]) -> dict[str, Any]:
    """A union whose members are told apart by an Enum's members, or by their values."""
    choices: dict[Any, Any] = core["choices"]
    by_value = {to_jsonable_python(tag): inner for tag, inner in choices.items() if isinstance(tag, enum.Enum)}
    return {**core, "choices": {**by_value, **choices}} if by_value else core


_RULES: dict[str, Callable[[dict[str, Any]], dict[str, Any]]] = {
    "enum": _enum_with_values,
    "generator": _as_list,
    "literal": _with_values,
    "tagged-union": _tagged_by_value,
}


# ---- reading


class Validator(Protocol):
    """A type adapter, or a validator of a core schema."""

    def validate_json(self, data: str | bytes, /) -> Any:
        """The value of a JSON text."""
        ...

    def validate_python(self, value: Any, /) -> Any:
        """The checked form of a value."""
        ...


def read_json(validator: Validator, text: str, schema: Mapping[str, Any]) -> Any:
    """The value of a JSON text; a null that does not fit counts as left out, where something may be.

    Args:
        validator: Of the type.
        text: The text.
        schema: The type's JSON Schema.

    Raises:
        ValidationError: It does not fit.
    """
    try:
        return validator.validate_json(text)
    except ValidationError as error:
        nulls = _nulls(error)
        value = _without(nulls, decode(text), schema) if nulls else None
        if value is None:
            raise
        try:
            return validator.validate_json(encode(value))
        except ValidationError:
            raise error from None


def read_python(validator: Validator, value: dict[str, Any], schema: Mapping[str, Any]) -> Any:
    """The checked form of Python values by name, read as `read_json` reads a text."""
    try:
        return validator.validate_python(value)
    except ValidationError as error:
        nulls = _nulls(error)
        less = _without(nulls, copied(value), schema) if nulls else None
        if less is None:
            raise
        try:
            return validator.validate_python(less)
        except ValidationError:
            raise error from None


_Location = tuple[int | str, ...]
_MOST_NULLS = 1000  # a model that writes null for what it leaves out does so in so many places at most


def _nulls(error: ValidationError) -> list[_Location]:
    """The locations of nulls that are not allowed there."""
    if error.error_count() > _MOST_NULLS:
        return []
    return [fault["loc"] for fault in first_faults(error, _MOST_NULLS) if fault["input"] is None and fault["loc"]]


def _without(nulls: Iterable[_Location], value: Any, schema: Mapping[str, Any]) -> Any:
    """A value without the nulls that stand for missing members in strict schemas; None if there are none."""
    optional = [location for location in nulls if _may_be_left_out(location, value, schema)]
    for location in optional:
        _leave_out(value, location)
    return value if optional else None


def _may_be_left_out(location: _Location, value: Any, root: Mapping[str, Any]) -> bool:
    """Whether a location is that of a field with a default, as far as the schema says."""
    here, is_optional = _alternatives(root, root), False
    for step in location:
        if not _is_key(step, value):  # it names a member of a union
            continue
        fields = [each for each in here if step in each.get("properties", ())]
        inner = [each["properties"][step] for each in fields] or [each["items"] for each in here if "items" in each]
        is_optional = any(step not in each.get("required", ()) for each in fields)
        here, value = [schema for each in inner for schema in _alternatives(each, root)], value[step]
    return is_optional


def _is_key(step: int | str, value: Any) -> bool:
    return (is_mapping(value) and step in value) or (is_list(value) and isinstance(step, int) and step < len(value))


def _alternatives(schema: object, root: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """The schemas that a schema may stand for: behind references, and each member of a union."""
    if not is_mapping(schema):
        return []
    if "$ref" in schema:
        return _alternatives(root.get("$defs", {}).get(schema["$ref"].removeprefix("#/$defs/")), root)
    members = [*schema.get("anyOf", ()), *schema.get("oneOf", ()), *schema.get("allOf", ())]
    return [schema, *(each for member in members for each in _alternatives(member, root))]


def _leave_out(value: Any, location: _Location) -> None:
    """Take the member that a location leads to out of its object, if it is null there."""
    holder, key = value, None
    for step in location:
        if _is_key(step, value):
            within: Any = value
            holder, key, value = within, step, within[step]
    if value is None and isinstance(holder, dict):
        del holder[key]


# ---- faults


def explain(
    error: ValidationError,
    names: Sequence[str],
    *,
    whole: str = "the arguments",
    part: str = "parameter",
    paths: Mapping[tuple[int | str, ...], str] | None = None,
) -> str:
    """The faults of a value as a short text for the model: at most ten.

    Args:
        error: What the validator says.
        names: The names that a top-level object may have.
        whole: What the value is called.
        part: What a member of it is called.
        paths: Other places where a member may be found, and its name.
    """
    faults = first_faults(error, 10)
    for fault in faults:
        for path, name in (paths or {}).items():
            if fault["loc"][: len(path)] == path:
                fault["loc"] = (name, *fault["loc"][len(path) :])
    return "; ".join(_explain_one(fault, names, whole, part) for fault in faults)


def first_faults(error: ValidationError, most: int) -> list[dict[str, Any]]:
    """The first faults of a value; there may be as many as members, and each costs time.

    Very many are had from their JSON, which is made sooner. But there each fault has its whole input, which may be all
    of the value: where something is missing, it is what that is missing in.
    """
    if error.error_count() > _MANY:
        with suppress(Exception):  # something in it has no form in JSON
            return list(islice(_members(error.json(include_url=False)), most))
    return cast("list[dict[str, Any]]", error.errors(include_url=False)[:most])


_MANY = 10_000
_DECODER = json.JSONDecoder()


def _members(text: str) -> Iterator[dict[str, Any]]:
    """The faults in their JSON, each decoded on demand."""
    end = 0
    while text[end] != "]":
        member, end = _DECODER.raw_decode(text, end + 1)
        yield {**member, "loc": tuple(member["loc"])}


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


def first_line(error: Exception) -> str:
    """The part of an error's text that names the fault."""
    return str(error).splitlines()[0]
