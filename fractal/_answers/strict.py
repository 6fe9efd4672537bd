"""JSON Schema in the subset that endpoints can hold a model to, word by word (`strict: true`)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from fractal._json import encode, is_list, is_mapping

__all__ = ["strict_schema"]

Schema = dict[str, Any]

# Only what OpenAI documents for Structured Outputs; other endpoints take the same or more. How large a schema may be
# is not looked at: these limits grow, and an endpoint that has smaller ones says so.
_KEPT = {
    *("$ref", "anyOf", "const", "description", "enum", "format", "items", "pattern", "properties", "type"),
    *("maximum", "minimum", "exclusiveMaximum", "exclusiveMinimum", "multipleOf", "maxItems", "minItems"),
}
_FORMATS = {"date-time", "time", "date", "duration", "email", "hostname", "ipv4", "ipv6", "uuid"}
# Rules that cannot be enforced there. The model is told of them in words, and our own validation holds it to them.
_SAID_IN_WORDS = {"contentMediaType", "default", "format", "maxLength", "minLength", "pattern", "uniqueItems"}
# Rules about the form of the whole, which words alone would not make clear. What is in no list is a note to readers.
_BEYOND = {
    *(
        "allOf",
        "oneOf",
        "not",
        "if",
        "then",
        "else",
        "dependentRequired",
        "dependentSchemas",
        "contains",
        "prefixItems",
    ),
    *("patternProperties", "propertyNames", "unevaluatedProperties", "unevaluatedItems", "minProperties"),
}
_TYPE_NAMES: dict[Any, str] = {str: "string", bool: "boolean", int: "integer", float: "number", type(None): "null"}


class _NotStrictError(Exception):
    """A schema cannot be expressed in the strict subset."""


def strict_schema(schema: Mapping[str, Any]) -> Schema | None:
    """The schema in the strict subset: closed objects, in which every property is required.

    A property that may be left out becomes one that may be null; a rule that the subset does not know, such as a
    length, goes into the description.

    Args:
        schema: Schema of an object, with what it refers to in `$defs`.

    Returns:
        A new schema, or None if there is none that means the same: open objects (`dict`), tuples, anything at all.
    """
    definitions: Mapping[str, Any] = schema.get("$defs", {})
    try:
        strict = _convert({key: value for key, value in schema.items() if key != "$defs"})
        if definitions:
            strict["$defs"] = {name: _convert(inner) for name, inner in definitions.items()}
    except _NotStrictError:
        return None
    return strict


def _convert(schema: object) -> Schema:
    if not is_mapping(schema):  # `true`, say: anything at all
        raise _NotStrictError
    schema = _in_words(_as_any_of(schema))
    if schema.keys() & _BEYOND:
        raise _NotStrictError
    strict = {key: value for key, value in schema.items() if key in _KEPT}
    if "anyOf" in strict:
        strict["anyOf"] = [_convert(choice) for choice in strict["anyOf"]]
    if "$ref" in strict and len(strict) > 1:  # a reference stands alone
        strict["anyOf"] = [{"$ref": strict.pop("$ref")}]
    kind = strict.get("type", ())
    if kind == "object":
        _close(strict, schema)
    elif kind == "array":
        strict["items"] = _convert(schema.get("items"))
    elif "object" in kind or "array" in kind:  # one of several types
        raise _NotStrictError
    return _typed(strict)


def _close(strict: Schema, schema: Mapping[str, Any]) -> None:
    """Copy the properties of an object, and allow no others."""
    properties: Mapping[str, Any] | None = schema.get("properties")
    if schema.get("additionalProperties", properties is None) is not False:
        raise _NotStrictError  # it takes properties of any name
    required = schema.get("required", ())
    strict["properties"] = {
        name: _convert(inner) if name in required else _or_null(_convert(inner))
        for name, inner in (properties or {}).items()
    }
    strict["required"] = list(strict["properties"])
    strict["additionalProperties"] = False


def _or_null(strict: Schema) -> Schema:
    """An optional property, for which null stands for a missing value."""
    # A constant is what tells the members of a union apart; there is nothing to leave out.
    if "const" in strict or len(strict.get("enum", ())) == 1 or _takes_null(strict):
        return strict
    description = {"description": strict.pop("description")} if "description" in strict else {}
    choices = strict["anyOf"] if set(strict) == {"anyOf"} else [strict]
    return {"anyOf": [*choices, {"type": "null"}], **description}


def _takes_null(strict: Mapping[str, Any]) -> bool:
    return "null" in strict.get("type", ()) or any(_takes_null(choice) for choice in strict.get("anyOf", ()))


def _as_any_of(schema: Mapping[str, Any]) -> Schema:
    """The schema with `anyOf` in place of other compositions."""
    schema = dict(schema)
    if "anyOf" not in schema and "oneOf" in schema:
        schema["anyOf"] = schema.pop("oneOf")
    if is_list(every := schema.get("allOf")) and len(every) == 1 and is_mapping(every[0]):
        schema = {**every[0], **{key: value for key, value in schema.items() if key != "allOf"}}
    return schema


def _in_words(schema: Schema) -> Schema:
    said = {key: schema[key] for key in sorted(_SAID_IN_WORDS & schema.keys()) if not _is_enforced(key, schema[key])}
    if not said:
        return schema
    schema = {key: value for key, value in schema.items() if key not in said}
    if said.get("default", "") is None or "const" in schema:
        said.pop("default", None)  # "may be null", or the constant, says it already
    if said:
        words = ", ".join(f"{key}: {encode(value).decode()}" for key, value in said.items())
        schema["description"] = f"{schema['description']} ({words})" if schema.get("description") else words
    return schema


def _is_enforced(key: str, value: object) -> bool:
    if key == "pattern":  # engines differ in what may follow "(?"
        return isinstance(value, str) and "(?" not in value
    return key == "format" and value in _FORMATS


def _typed(strict: Schema) -> Schema:
    """The schema with its type; the type of its constants if it has nothing else."""
    if strict.keys() & {"type", "anyOf", "$ref"}:
        return strict
    constants: list[Any] = strict.get("enum", [strict["const"]] if "const" in strict else [])
    kinds = list(dict.fromkeys(_TYPE_NAMES.get(type(constant), "") for constant in constants))
    if not kinds or "" in kinds:
        raise _NotStrictError
    return {"type": kinds[0] if len(kinds) == 1 else kinds, **strict}
