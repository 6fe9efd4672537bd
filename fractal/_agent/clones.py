"""Copies of agents: of the same class, with tools and settings of their own."""

from __future__ import annotations

import copy
import functools
import types
from collections.abc import Mapping
from typing import Any, TypeVar, cast

from fractal._agent.core import CORE, core_of
from fractal._engine.hooks import Hook
from fractal._texts import described, kind_of, type_name
from fractal.around import Around
from fractal.toolkit import DELEGATE, FOR_ANOTHER

__all__ = ["clone", "deep_clone", "no_pickle"]

Agent = TypeVar("Agent")


def clone(agent: Agent) -> Agent:
    """A copy of an agent, which shares the settings and values of the other.

    What is bound to the agent, tools and functions among its settings, is bound to the new one; other attributes are
    shared. `__init__` is not called.
    """
    made = _bare(agent)
    for name, value in _state(agent).items():
        object.__setattr__(made, name, value)
    return made


def deep_clone(agent: Agent, memo: dict[int, Any]) -> Agent:
    """A copy of an agent with deep copies of its attributes; clients and other settings are shared.

    Raises:
        TypeError: An attribute cannot be copied so.
    """
    made = memo[id(agent)] = _bare(agent)
    for name, value in _state(agent).items():
        try:
            copied = copy.deepcopy(value, memo)
        except TypeError as error:
            raise TypeError(
                f"{type_name(agent)}.{name} cannot be copied deeply ({described(error)}): agent.replace() and"
                " copy.copy(agent) share it"
            ) from error
        object.__setattr__(made, name, copied)
    return made


def no_pickle(agent: object) -> TypeError:
    """The error for pickling an agent."""
    return TypeError(
        f"{type_name(agent)} cannot be pickled: agents hold functions, and clients with their keys. Make the agent"
        " where it is needed: give a function that makes it, and what that takes"
    )


def _bare(agent: Agent) -> Agent:
    """A new agent with the settings and tools of another, and nothing else."""
    made = object.__new__(type(agent))
    object.__setattr__(made, CORE, core_of(agent).copied(functools.partial(_rebound, agent, made)))
    return made


def _state(agent: object) -> dict[str, Any]:
    """The attributes of an agent, those in slots too, but for its core."""
    state: Any = object.__getstate__(agent)
    parts = cast("tuple[Mapping[str, Any] | None, ...]", state if isinstance(state, tuple) else (state,))
    return {name: value for part in parts for name, value in (part or {}).items() if name != CORE}


def _rebound(old: object, new: object, value: Any) -> Any:
    """A function that is bound to an agent, or asks it, for another agent; any other function as it is."""
    if isinstance(value, types.MethodType):
        return types.MethodType(value.__func__, new) if value.__self__ is old else value
    kind = kind_of(value)
    if kind is types.FunctionType:
        marks: Mapping[str, Any] = vars(cast("types.FunctionType", value))
        return marks[FOR_ANOTHER](new) if marks.get(DELEGATE) is old else value
    if kind is functools.partial:
        return _rebound_partial(old, new, value)
    if isinstance(value, Hook):
        function = _rebound(old, new, value.function)
        return value if function is value.function else Hook(function, "output_validator")
    if kind is Around:
        function = _rebound(old, new, value.function)
        return value if function is value.function else Around(function, value.delegates)
    if kind is tuple:
        return tuple(_rebound(old, new, each) for each in value)
    return value


def _rebound_partial(old: object, new: object, value: functools.partial[Any]) -> Any:
    function = _rebound(old, new, value.func)
    is_given = any(each is old for each in (*value.args, *value.keywords.values()))
    if function is value.func and not is_given:
        return value
    named = {name: new if each is old else each for name, each in value.keywords.items()}
    arguments = [new if each is old else each for each in value.args]
    made: functools.partial[Any] = functools.partial(function, *arguments, **named)
    return made
