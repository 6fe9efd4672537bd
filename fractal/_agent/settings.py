"""The settings of an agent: what each may be, and how it is read and assigned."""

from __future__ import annotations

import copy
import os
from collections.abc import Callable, Mapping
from typing import Any, Generic, Protocol, Self, TypeVar, get_args, overload

from fractal._answers.output import output_for
from fractal._answers.ways import OutputMemory, OutputMode
from fractal._checks import is_count, is_number
from fractal._engine.around import checked_around, checked_guards
from fractal._engine.hooks import Hook
from fractal._engine.observers import checked_observers
from fractal._engine.pricing import Prices
from fractal._engine.request_fields import REQUEST_FIELDS, is_named
from fractal._engine.window import checked_compact, checked_counter, checked_window
from fractal._texts import in_brief
from fractal.errors import InvalidArguments
from fractal.limits import Limits, SharedBudget
from fractal.models.openai import model_for

__all__ = [
    "FIXED",
    "SETTINGS",
    "Given",
    "Held",
    "Setting",
    "checked",
    "checked_budget",
    "checked_limits",
    "checked_mode",
    "checked_retries",
    "checked_timeout",
]

Given = TypeVar("Given")
Held = TypeVar("Held")

DEFAULT_MODEL = "gpt-4o-mini"

_UNSET: Any = object()


class Holder(Protocol):
    """An object that holds the settings of an agent."""

    def read(self, name: str) -> Any:
        """The value of a setting."""
        ...

    def assign(self, name: str, value: object) -> None:
        """Check a value and set it, for runs that begin from now on."""
        ...


class Setting(Generic[Given, Held]):
    """One setting of an agent as an attribute; an assigned value holds for runs that begin from then on.

    Args:
        of: Finds what holds the settings of an agent.
        text: What the setting is.
    """

    def __init__(self, of: Callable[[object], Holder], text: str) -> None:
        self._of, self.__doc__ = of, text
        self.name = ""
        self.default: Any = _UNSET  # what a subclass says in its body

    def __set_name__(self, owner: type, name: str) -> None:
        self.name = name

    @overload
    def __get__(self, agent: None, kind: type[Any]) -> Self: ...

    @overload
    def __get__(self, agent: object, kind: type[Any]) -> Held: ...

    def __get__(self, agent: object, kind: type[Any]) -> Any:
        """The value; read from the class, the default of a subclass."""
        if agent is None:
            return self if self.default is _UNSET else self.default
        return self._of(agent).read(self.name)

    def __set__(self, agent: object, value: Given) -> None:
        """Set a value, for runs that begin from now on.

        Raises:
            InvalidArguments: It cannot be what was meant.
        """
        self._of(agent).assign(self.name, value)

    def with_default(self, default: object) -> Setting[Given, Held]:
        """The setting for a subclass that has a value for it in its body."""
        made = copy.copy(self)
        made.default = default
        return made


# ---- what each setting may be


def _name(value: object) -> str:
    if not isinstance(value, str) or not value:
        raise InvalidArguments(f"name={in_brief(value)}: give the agent a name")
    return value


def _system_prompt(value: Any) -> Any:
    if not isinstance(value, str) and not callable(value):
        raise InvalidArguments(f"system_prompt={in_brief(value)}: give text, or a function that returns it")
    return value


def _model(value: object) -> str:
    if value is not None and not isinstance(value, str):
        raise InvalidArguments(f"model={in_brief(value)}: give the model's name; clients and models go to client=")
    return value or os.environ.get("OPENAI_MODEL") or DEFAULT_MODEL


def _system_context(value: Any) -> dict[str, object]:
    if value is not None and not is_named(value):
        raise InvalidArguments(f"system_context={in_brief(value)}: give a dict of names to values, or None")
    return dict(value or {})


def _enable_tracing(value: object) -> bool | None:
    if value is not None and not isinstance(value, bool):
        raise InvalidArguments(f"enable_tracing={in_brief(value)}: give True or False, or None")
    return value


def _tracing_output_file(file: Any) -> str | None:
    if file is None:
        return None
    try:
        return os.path.abspath(os.fsdecode(file))  # now: the program may go elsewhere
    except (TypeError, ValueError):
        raise InvalidArguments(f"tracing_output_file={in_brief(file)}: give a path, or None for no file") from None


def _approve(value: Any) -> Any:
    if value is not None:
        Hook(value, "approve")
    return value


def _output_type(value: Any) -> Any:
    output_for(value)
    return value


def checked_limits(limits: Any) -> Limits:
    """The limits that are given, checked, or limits without a bound.

    Raises:
        InvalidArguments: They are no `Limits`.
    """
    if limits is None:
        return Limits()
    if not isinstance(limits, Limits):
        raise InvalidArguments(f"limits={in_brief(limits)}: give Limits(…), or None")
    return limits


def checked_timeout(timeout: Any) -> float | None:
    """The timeout that is given, checked, in seconds.

    Raises:
        InvalidArguments: It is no number from 0 up, nor None.
    """
    if timeout is not None and (not is_number(timeout) or not timeout >= 0):
        raise InvalidArguments(f"timeout={in_brief(timeout)}: give seconds from 0 up, or None for no limit")
    seconds: float | None = timeout
    return seconds


def checked_retries(retries: Any) -> int:
    """The number of retries that is given, checked.

    Raises:
        InvalidArguments: It is no whole number from 0 up.
    """
    if not is_count(retries, 0):
        raise InvalidArguments(f"max_retries={in_brief(retries)}: give a whole number from 0 up")
    number: int = retries
    return number


def checked_mode(mode: Any) -> OutputMode:
    """The output mode that is given, checked.

    Raises:
        InvalidArguments: There is no such way.
    """
    modes = get_args(OutputMode)
    if mode not in modes:
        raise InvalidArguments(f"output_mode={in_brief(mode)}: give one of {', '.join(map(repr, modes))}")
    known: OutputMode = mode
    return known


def checked_budget(budget: Any) -> SharedBudget | None:
    """The budget that is given, checked.

    Raises:
        InvalidArguments: It is no `SharedBudget`, nor None.
    """
    if budget is not None and not isinstance(budget, SharedBudget):
        raise InvalidArguments(f"budget={in_brief(budget)}: give a SharedBudget(…), or None")
    return budget


def _prices(table: Any) -> Mapping[str, Any] | None:
    if table is None:
        return None
    Prices(table)
    return dict(table)


SETTINGS: Mapping[str, Callable[[Any], Any]] = {
    "name": _name,
    "system_prompt": _system_prompt,
    "model": _model,
    "client": lambda client: client,
    **REQUEST_FIELDS,
    "limits": checked_limits,
    "timeout": checked_timeout,
    "max_retries": lambda retries: checked_retries(3 if retries is None else retries),
    "system_context": _system_context,
    "observers": checked_observers,
    "enable_tracing": _enable_tracing,
    "tracing_output_file": _tracing_output_file,
    "approve": _approve,
    "around_tool": checked_around("around_tool"),
    "around_model": checked_around("around_model"),
    "guard": checked_guards,
    "output_type": _output_type,
    "output_mode": checked_mode,
    "context_window": checked_window,
    "count_tokens": checked_counter,
    "compact": checked_compact,
}
"""What makes of each setting, as it is given, the value that an agent holds."""

FIXED: Mapping[str, Callable[[Any], Any]] = {"prices": _prices, "budget": checked_budget}
"""The same of what only constructors are given: users' classes have attributes of these names."""


def checked(name: str, value: object) -> dict[str, Any]:
    """The value that an agent holds for a setting.

    Raises:
        InvalidArguments: It cannot be what was meant.
    """
    held = {name: (SETTINGS.get(name) or FIXED[name])(value)}
    if name == "client":  # what an endpoint is known to refuse says nothing of another
        held |= {"answers": model_for(value), "memory": OutputMemory()}
    return held
