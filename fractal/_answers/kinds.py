"""The kinds of types, each with what can be shown of a value of it that is still being written.

Which kind a type is says pydantic's description of it. A kind that this module does not know shows nothing before it is
complete.
"""

from __future__ import annotations

import dataclasses
import functools
import json
from collections.abc import Iterable, Mapping
from typing import Any, cast

from pydantic_core import CoreConfig, CoreSchema, SchemaValidator

from fractal._answers.scanner import Frame
from fractal._answers.shapes import NO_STRINGS, NOTHING, Container, Members, Schema, Shape, World, attempt
from fractal._json import decode

__all__ = ["shape_of"]


class _Text(Shape):
    """A string."""

    def open_string(self, value: str) -> Any:
        # By its own rules alone, such as a length: functions around it get to see it when it is complete.
        return attempt(self._plain.validate_python, value)

    @functools.cached_property
    def _plain(self) -> SchemaValidator:
        return SchemaValidator(cast("CoreSchema", self.core), self.config)


class _Fields(Container):
    """A model, dataclass or TypedDict: an object with fields."""

    def __init__(
        self, schema: Schema, core: Schema, config: CoreConfig | None, world: World, fields: Iterable[Schema]
    ) -> None:
        super().__init__(schema, core, config, world)
        self.fields = {field["name"]: field for field in fields}
        self._names = {key: name for name, field in self.fields.items() for key in _keys_of(field, config)}
        self._shapes: dict[str, Shape] = {}
        self._is_closed = (config or {}).get("extra_fields_behavior") == "forbid"

    def member(self, key: str | None, index: int) -> tuple[Any, Shape] | None:
        name = self._names.get(key) if key is not None else None
        return (name, self.shape(name)) if name is not None else None

    def shape(self, name: str) -> Shape:
        """The shape of a field."""
        if name not in self._shapes:
            self._shapes[name] = self.world.shape_of(self.fields[name]["schema"], self.config)
        return self._shapes[name]

    def score(self, frame: Frame) -> int | None:
        score = super().score(frame)
        if score != 0:
            return score
        keys = {key for key, _ in frame.members} | {frame.key} - {None}
        known = keys & self._names.keys()
        return -1 if self._is_closed and known != keys else len(known)

    def filled(self, values: dict[str, Any], members: Members) -> dict[str, Any]:
        """The values of all fields; of those that are not there, the defaults."""
        return {
            name: values[name] if name in values else members.default(name, self.shape(name)) for name in self.fields
        }


class _Model(_Fields):
    def build(self, values: dict[Any, Any], members: Members) -> Any:
        filled = self.filled(values, members)
        instance = self.core["cls"].model_construct(set(values), **filled)
        instance.__dict__.update(filled)  # an alias may be the name of another field
        return instance


class _Dataclass(_Fields):
    def build(self, values: dict[Any, Any], members: Members) -> Any:
        kind = self.core["cls"]
        filled = self.filled(values, members)
        instance = kind.__new__(kind)
        for field in dataclasses.fields(kind):
            object.__setattr__(instance, field.name, filled.get(field.name))  # it may be frozen
        return instance


class _TypedDict(_Fields):
    def build(self, values: dict[Any, Any], members: Members) -> Any:
        return values


class _RootModel(Shape):
    """A model that is one value of another type."""

    @functools.cached_property
    def inner(self) -> Shape:
        """The shape of that value."""
        return self.world.shape_of(self.core["schema"], self.core.get("config", self.config))

    def open_string(self, value: str) -> Any:
        return self._around(self.inner.open_string(value))

    def open_frame(self, frame: Frame, depth: int) -> Any:
        return self._around(self.inner.open_frame(frame, depth))

    def score(self, frame: Frame) -> int | None:
        return self.inner.score(frame)

    def _around(self, value: Any) -> Any:
        return NOTHING if value is NOTHING else attempt(self.core["cls"].model_construct, value)


class _Items(Container):
    """A list, or a tuple or set, whose items are all of one type."""

    takes_objects = False

    @functools.cached_property
    def item(self) -> Shape:
        """The shape of an item."""
        schema: Schema | list[Schema] = self.core.get("items_schema", {"type": "any"})
        return self.world.shape_of(schema[0] if isinstance(schema, list) else schema, self.config)

    def member(self, key: str | None, index: int) -> tuple[Any, Shape] | None:
        return index, self.item

    def build(self, values: dict[Any, Any], members: Members) -> Any:
        return tuple(values.values()) if self.core["type"] == "tuple" else list(values.values())


class _Set(_Items):
    """A set: an incomplete item is left out, since it would be another one when complete."""

    def open_frame(self, frame: Frame, depth: int) -> Any:
        if frame.is_object:
            return NOTHING
        kind = frozenset[Any] if self.core["type"] == "frozenset" else set[Any]
        return attempt(kind, self.look(frame).values.values())


class _Row(Container):
    """A tuple or named tuple: a list with a type for each index."""

    takes_objects = False

    def __init__(
        self, schema: Schema, core: Schema, config: CoreConfig | None, world: World, items: Iterable[Schema]
    ) -> None:
        super().__init__(schema, core, config, world)
        self._items = list(items)
        self._shapes: dict[int, Shape] = {}

    def member(self, key: str | None, index: int) -> tuple[Any, Shape] | None:
        return (index, self._shape(index)) if index < len(self._items) else None

    def _shape(self, index: int) -> Shape:
        if index not in self._shapes:
            self._shapes[index] = self.world.shape_of(self._items[index], self.config)
        return self._shapes[index]

    def build(self, values: dict[Any, Any], members: Members) -> Any:
        if self.core["type"] == "named-tuple":
            indices = range(len(self._items))
            return self.core["cls"](
                *(values[index] if index in values else members.default(index, self._shape(index)) for index in indices)
            )
        arrived: list[Any] = []
        while len(arrived) in values:  # what does not fit would move the others out of their places
            arrived.append(values[len(arrived)])
        return tuple(arrived)


class _Mapping(Container):
    """A dict of any keys."""

    @functools.cached_property
    def _key(self) -> Shape:
        return self.world.shape_of(self.core.get("keys_schema", {"type": "any"}), self.config)

    @functools.cached_property
    def _value(self) -> Shape:
        return self.world.shape_of(self.core.get("values_schema", {"type": "any"}), self.config)

    def member(self, key: str | None, index: int) -> tuple[Any, Shape] | None:
        name = self._key.whole(json.dumps(key))
        return None if name is NOTHING else (name, self._value)

    def build(self, values: dict[Any, Any], members: Members) -> Any:
        return values


class _Anything(Shape):
    """Any JSON: objects are dicts, lists are lists."""

    def open_string(self, value: str) -> Any:
        return value

    def open_frame(self, frame: Frame, depth: int) -> Any:
        shape = self._objects if frame.is_object else self._lists
        return shape.open_frame(frame, depth)

    def score(self, frame: Frame) -> int | None:
        return 0

    @functools.cached_property
    def _objects(self) -> Shape:
        return _Mapping(self.schema, {"type": "dict"}, self.config, self.world)

    @functools.cached_property
    def _lists(self) -> Shape:
        return _Items(self.schema, {"type": "list"}, self.config, self.world)


class _Union(Shape):
    """One of several types. An open value is shown once it can be only one of them, or fits one of them best."""

    @functools.cached_property
    def choices(self) -> list[Shape]:
        """The types, without unions in unions."""
        found: list[Shape] = []
        for choice in self._schemas():
            shape = self.world.shape_of(choice, self.config)
            found += shape.choices if type(shape) is _Union else [shape]
        return found

    def _schemas(self) -> list[Schema]:
        choices: list[Any] = self.core["choices"]  # some with a label
        return [choice[0] if isinstance(choice, tuple) else choice for choice in choices]

    def open_string(self, value: str) -> Any:
        may_be_strings = [shape for shape in self.choices if not self._is_never_string(shape)]
        return may_be_strings[0].open_string(value) if len(may_be_strings) == 1 else NOTHING

    def _is_never_string(self, shape: Shape) -> bool:
        # Numbers are read from strings too, but not where `str` itself is an alternative and the best one counts.
        by_type = {"none"} if self.core.get("mode") == "left_to_right" else NO_STRINGS
        return isinstance(shape, (Container, _TaggedUnion)) or shape.core["type"] in by_type

    def open_frame(self, frame: Frame, depth: int) -> Any:
        shape = self.pick(frame)
        return shape.open_frame(frame, depth) if shape is not None else NOTHING

    def score(self, frame: Frame) -> int | None:
        shape = self.pick(frame)
        return shape.score(frame) if shape is not None else None

    def pick(self, frame: Frame) -> Shape | None:
        """The type that the value is of; None if that cannot be told yet."""
        scores = [(shape.score(frame), shape) for shape in self.choices]
        known = [(score, shape) for score, shape in scores if score is not None and score >= 0]
        if not known or any(score is None for score, _ in scores):
            return None
        best = max(score for score, _ in known)
        fitting = [shape for score, shape in known if score == best]
        return fitting[0] if len(fitting) == 1 else None


class _TaggedUnion(_Union):
    """One of several types, told by a field."""

    def pick(self, frame: Frame) -> Shape | None:
        if self not in frame.seen:
            tag = next((text for key, text in frame.members if key == self.core["discriminator"]), None)
            if tag is None:
                return None
            frame.seen[self] = self._by_tag(attempt(decode, tag))
        found: Shape | None = frame.seen[self]
        return found

    def _schemas(self) -> list[Schema]:
        choices: Mapping[Any, Schema] = self.core["choices"]
        return list(choices.values())

    def _by_tag(self, tag: Any) -> Shape | None:
        choices: Mapping[Any, Schema] = self.core["choices"]
        schema = next((schema for each, schema in choices.items() if getattr(each, "value", each) == tag), None)
        return self.world.shape_of(schema, self.config) if schema is not None else None


def shape_of(schema: CoreSchema) -> Shape:
    """The shape of a type, from pydantic's schema of it."""
    return World(_make_shape).shape_of(cast("Schema", schema), None)


_AROUND = {"default": "schema", "nullable": "schema", "json-or-python": "json_schema", "lax-or-strict": "lax_schema"}
_FUNCTIONS = ("function-before", "function-wrap", "function-after")


def _make_shape(schema: Schema, config: CoreConfig | None, world: World) -> Shape:
    core, is_changed = schema, False
    while True:
        kind: str = core["type"]
        if kind == "definitions":
            world.definitions |= {definition["ref"]: definition for definition in core["definitions"]}
            core = schema = core["schema"]
        elif kind == "definition-ref":
            core = world.definitions[core["schema_ref"]]
        elif kind in _AROUND:
            core = core[_AROUND[kind]]
        elif kind in _FUNCTIONS:
            is_changed |= kind != "function-after"  # what arrives may not be what is validated
            core = core["schema"]
        else:
            break
    shape = _with_fields(schema, core, config, world)
    if shape is None and not is_changed:
        shape = _without_fields(schema, core, config, world)
    return shape or Shape(schema, core, config, world)


def _with_fields(schema: Schema, core: Schema, config: CoreConfig | None, world: World) -> Shape | None:
    config = core.get("config", config)
    if core.get("root_model"):
        return _RootModel(schema, core, config, world)
    kind, holder = _OF_FIELDS.get(core["type"], (None, ""))
    inner = core
    while inner["type"] in (*_FUNCTIONS, "model", "dataclass"):
        inner = inner["schema"]
    if kind is None or inner["type"] != holder:
        return None
    fields: Any = inner["fields"]
    if isinstance(fields, dict):
        fields = [{"name": name, **field} for name, field in cast("dict[str, Schema]", fields).items()]
    return kind(schema, core, config, world, fields)


def _without_fields(schema: Schema, core: Schema, config: CoreConfig | None, world: World) -> Shape | None:
    match core:
        case {"type": "tuple", "items_schema": items} if "variadic_item_index" not in core:
            return _Row(schema, core, config, world, items)  # one type for each index
        case {"type": "tuple", "items_schema": [_]}:
            return _Items(schema, core, config, world)
        case {"type": "named-tuple", "fields": fields}:
            return _Row(schema, core, config, world, [field["schema"] for field in fields])
        case {"type": "call", "function": type() as kind, "arguments_schema": {"arguments_schema": fields}}:
            core = {"type": "named-tuple", "cls": kind}  # as it was until pydantic 2.13
            return _Row(schema, core, config, world, [field["schema"] for field in fields])
        case {"type": "str", "pattern": str()}:
            return None  # half of it may fit, and a little more of it not
        case _:
            plain = _PLAIN.get(core["type"])
            return plain(schema, core, config, world) if plain is not None else None


_OF_FIELDS: dict[str, tuple[type[_Fields], str]] = {
    "dataclass": (_Dataclass, "dataclass-args"),
    "model": (_Model, "model-fields"),
    "typed-dict": (_TypedDict, "typed-dict"),
}
_PLAIN: dict[str, type[Shape]] = {
    "any": _Anything,
    "dict": _Mapping,
    "frozenset": _Set,
    "list": _Items,
    "set": _Set,
    "str": _Text,
    "tagged-union": _TaggedUnion,
    "union": _Union,
}


def _keys_of(field: Schema, config: CoreConfig | None) -> list[str]:
    """The keys under which a field may come; one that is taken from deeper inside is shown when all is complete."""
    settings: Any = config or {}
    alias: Any = field.get("validation_alias")
    if alias is None:
        return [field["name"]]
    paths: list[Any] = [alias] if isinstance(alias, str) or isinstance(alias[0], (str, int)) else alias
    steps = [[path] if isinstance(path, str) else path for path in paths]
    keys = [path[0] for path in steps if len(path) == 1 and settings.get("validate_by_alias", True)]
    return [*keys, field["name"]] if settings.get("validate_by_name", False) else keys
