"""The base class of events: what all of them have, and how they are compared, shown, copied and written."""

from __future__ import annotations

import copy
import functools
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields, make_dataclass
from typing import Any, Literal, Self, TypeVar, dataclass_transform

from pydantic import TypeAdapter

from fractal._forms import Text, portable, shown

__all__ = ["RunEvent", "event_class", "event_of"]

_Kind = TypeVar("_Kind")


@dataclass_transform(frozen_default=True, kw_only_default=True, field_specifiers=(field,))
def event_class(kind: type[_Kind]) -> type[_Kind]:
    """Make a frozen dataclass; shared methods are in the base class, since compiling them for each takes time."""
    return dataclass(frozen=True, slots=True, kw_only=True, eq=False, repr=False)(kind)


@event_class
class RunEvent:
    """The facts that all events have.

    Attributes:
        run_id: The run it happened in.
        parent_id: The run that started this one, or None.
        agent_name: The agent that runs.
        depth: How many runs are above this one.
        at: Seconds since the epoch.
    """

    run_id: Text
    parent_id: Text | None
    agent_name: Text
    depth: int
    at: float = field(default_factory=time.time)

    def __eq__(self, other: object) -> bool:
        return _values(self) == _values(other) if isinstance(other, type(self)) else NotImplemented

    def __hash__(self) -> int:
        return hash((type(self), *_values(self)))

    def __repr__(self) -> str:
        facts = ", ".join(f"{name}={shown(value)}" for name, value in _facts(self).items())
        return f"{type(self).__qualname__}({facts})"

    def _repr_html_(self) -> str:
        from fractal._html import of_event

        return of_event(self)

    def __reduce__(self) -> tuple[Callable[..., RunEvent], tuple[Any, ...]]:
        return _made, (type(self), {name: portable(value) for name, value in _facts(self).items()})

    def __copy__(self) -> Self:
        return self

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        return type(self)(**copy.deepcopy(_facts(self), memo))

    def model_dump(self, *, mode: Literal["python", "json"] = "python") -> dict[str, Any]:
        """The event as a dict, as results give theirs.

        Args:
            mode: `"json"`: of JSON's own types alone.
        """
        dumped: dict[str, Any] = _adapter_of(type(self)).dump_python(self, mode=mode)
        return dumped

    def model_dump_json(self) -> str:
        """The event as JSON text, as results give theirs."""
        return _adapter_of(type(self)).dump_json(self).decode()


_Event = TypeVar("_Event", bound=RunEvent)


def event_of(kind: Callable[..., _Event], common: Mapping[str, Any], facts: Mapping[str, Any]) -> _Event:
    """Make an event as its class does, in half the time: that of a frozen class sets each field by a call.

    Args:
        kind: The class.
        common: The facts that the events of a run share, in the order of their fields.
        facts: Its own.
    """
    draft = _draft_of(kind)(*common.values(), **facts)
    draft.__class__ = kind  # and from now on it is frozen
    event: _Event = draft
    return event


@functools.cache
def _draft_of(kind: Any) -> Any:
    """A class of events that differ from those of another only in that their fields can be set."""
    shared = {each.name for each in fields(RunEvent)}  # given by position, which takes less time than by name
    given = [
        (
            each.name,
            Any,
            field(default=each.default, default_factory=each.default_factory, kw_only=each.name not in shared),
        )
        for each in fields(kind)
    ]
    plain: Any = make_dataclass(kind.__name__, given, eq=False, repr=False)
    named = {"__init__": plain.__init__, "__setattr__": object.__setattr__, "__delattr__": object.__delattr__}
    return type(kind.__name__, (kind,), {"__slots__": (), **named})


def _facts(event: RunEvent) -> dict[str, Any]:
    return {field.name: getattr(event, field.name) for field in fields(event)}


def _values(event: RunEvent) -> tuple[Any, ...]:
    return tuple(_facts(event).values())


def _made(kind: type[RunEvent], facts: dict[str, Any]) -> RunEvent:
    return kind(**facts)


_adapters: dict[type[RunEvent], TypeAdapter[Any]] = {}


def _adapter_of(kind: type[RunEvent]) -> TypeAdapter[Any]:
    if kind not in _adapters:  # when it is first needed: many events are never written
        _adapters[kind] = TypeAdapter(kind)
    return _adapters[kind]
