"""Types as they are seen from JSON that is not complete: what can be shown of a value that is still being written.

Complete values go through pydantic's own validators; open ones are put together from pydantic's description of the
type. What is common to all types is here; the kinds of types are in `fractal._answers.kinds`.
"""

from __future__ import annotations

import enum
import functools
from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any, Final, cast

from pydantic_core import CoreConfig, CoreSchema, SchemaValidator

from fractal._answers.scanner import DEEPEST, Frame

__all__ = ["NOTHING", "NO_STRINGS", "Container", "Members", "Schema", "Shape", "World", "attempt"]


class _Nothing(enum.Enum):
    NOTHING = "nothing"

    def __repr__(self) -> str:
        return "NOTHING"


NOTHING: Final = _Nothing.NOTHING
"""There is no object yet, or none that is new; None is a value."""

Schema = dict[str, Any]

# Types whose JSON is never an object or a list, and among them those whose JSON is never a string if `str` is an
# alternative.
NO_STRINGS = {"bool", "float", "int", "none"}
_SCALARS = NO_STRINGS | {
    *("bytes", "complex", "date", "datetime", "decimal", "enum", "json", "literal", "multi-host-url", "str", "time"),
    *("timedelta", "url", "uuid"),
}


class World:
    """The schemas that others refer to, and the shapes made so far.

    Args:
        make_shape: Makes the shape of a schema that none was made of yet.
    """

    def __init__(self, make_shape: Callable[[Schema, CoreConfig | None, World], Shape]) -> None:
        self._make_shape = make_shape
        self.definitions: dict[str, Schema] = {}
        self.shapes: dict[tuple[str, int], Shape] = {}

    def shape_of(self, schema: Schema, config: CoreConfig | None) -> Shape:
        """The shape of a type that is part of another."""
        reference = schema.get("schema_ref")
        if reference is None:
            return self._make_shape(schema, config, self)
        key = (reference, id(config))
        if key not in self.shapes:
            self.shapes[key] = self._make_shape(schema, config, self)
        return self.shapes[key]

    def validator_of(self, schema: Schema, config: CoreConfig | None) -> SchemaValidator:
        """The validator of complete values of a type."""
        if self.definitions:
            schema = {"type": "definitions", "schema": schema, "definitions": list(self.definitions.values())}
        return SchemaValidator(cast("CoreSchema", schema), config)


class Shape:
    """A type that shows nothing of a value that is not complete; others derive from it.

    Args:
        schema: pydantic's schema of the type, for values that are complete.
        core: The same without validators, defaults and the like around it.
        config: Settings of the model it belongs to.
        world: Where to find the rest.
    """

    def __init__(self, schema: Schema, core: Schema, config: CoreConfig | None, world: World) -> None:
        self.schema, self.core, self.config, self.world = schema, core, config, world

    @functools.cached_property
    def validator(self) -> SchemaValidator:
        """The validator of complete values, made when it is first needed."""
        return self.world.validator_of(self.schema, self.config)

    def whole(self, text: str) -> Any:
        """The value of a JSON text that is complete; NOTHING if it does not fit."""
        return attempt(self.validator.validate_json, text)

    def open(self, value: Frame | str | None, depth: int) -> Any:
        """The visible part of an incomplete value; NOTHING if there is none."""
        if value is None or depth > DEEPEST:
            return NOTHING
        return self.open_string(value) if isinstance(value, str) else self.open_frame(value, depth)

    def open_string(self, value: str) -> Any:
        """A string as far as it is written, or NOTHING."""
        return NOTHING

    def open_frame(self, frame: Frame, depth: int) -> Any:
        """An object or list as far as it is written, or NOTHING."""
        return NOTHING

    def score(self, frame: Frame) -> int | None:
        """How well an open object or list fits, below 0 if not at all; None if that cannot be told."""
        return -1 if self.core["type"] in _SCALARS else None

    def default(self) -> Any:
        """The default of the type; None without one."""
        found = attempt(self.validator.get_default_value)
        return None if found is None or found is NOTHING else found.value


def attempt(function: Callable[..., Any], *arguments: Any) -> Any:
    """Call a function that may lead to a user's code, which may raise anything, most of all on half an object."""
    try:
        return function(*arguments)
    except Exception:
        return NOTHING


class Members:
    """What a shape has made of the complete members of a frame."""

    __slots__ = ("_defaults", "count", "failed", "values")

    def __init__(self) -> None:
        self.count = 0
        self.values: dict[Any, Any] = {}
        self.failed = False
        self._defaults: dict[Any, Any] = {}

    def default(self, name: Any, shape: Shape) -> Any:
        """A member's default, made once, so that it does not change from look to look."""
        if name not in self._defaults:
            self._defaults[name] = shape.default()
        return self._defaults[name]


class Container(Shape, ABC):
    """An object or list of any kind."""

    takes_objects = True

    @abstractmethod
    def member(self, key: str | None, index: int) -> tuple[Any, Shape] | None:
        """The name under which a member is kept, and its shape; None if there is no such member."""

    @abstractmethod
    def build(self, values: dict[Any, Any], members: Members) -> Any:
        """The container with the members there are."""

    def open_frame(self, frame: Frame, depth: int) -> Any:
        if frame.is_object is not self.takes_objects:
            return NOTHING
        members = self.look(frame)
        values = dict(members.values)
        found = self.member(frame.key, len(frame.members)) if frame.open is not None else None
        if found is not None:
            name, shape = found
            value = shape.open(frame.open, depth + 1)
            if value is not NOTHING:
                values[name] = value
        return attempt(self.build, values, members)

    def look(self, frame: Frame) -> Members:
        """Validate what has been completed since the last look."""
        members: Members = frame.seen.setdefault(self, Members())
        for index in range(members.count, len(frame.members)):
            key, text = frame.members[index]
            found = self.member(key, index)
            if found is None:
                continue
            name, shape = found
            value = shape.whole(text)
            if value is NOTHING:
                members.failed = True
                members.values.pop(name, None)
            else:
                members.values[name] = value
        members.count = len(frame.members)
        return members

    def score(self, frame: Frame) -> int | None:
        if frame.is_object is not self.takes_objects or self.look(frame).failed:
            return -1
        return 0
