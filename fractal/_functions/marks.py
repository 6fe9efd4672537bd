"""What `tool` says of a function, and what was said of whatever is offered in its place."""

from __future__ import annotations

import functools
import re
import types
from collections.abc import Callable, Iterable
from dataclasses import dataclass, fields, replace
from typing import Any, Literal, TypeVar, overload

from fractal._checks import is_count, is_number
from fractal._functions.callables import attribute_of, has_overridden, held_by, layers, name_of, unbound
from fractal.errors import InvalidArguments, InvalidTool

__all__ = ["TOOL_NAME", "ToolOptions", "is_marked", "options_of", "tool"]

Function = TypeVar("Function", bound=Callable[..., Any])

TOOL_NAME = re.compile(r"[a-zA-Z0-9_-]{1,64}")
"""The names that endpoints take."""

_MARK = "__fractal_tool__"
_MOST_HELD = 100  # callables that are looked at for one

_NOT_LOST = ("requires_approval", "after_crash")
"""Options that hold for what overrides a function, unless it says otherwise: None says nothing."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ToolOptions:
    """The options of a tool: the arguments of `tool`."""

    name: str | None = None
    description: str | None = None
    terminate: bool = False
    timeout: float | None = None
    on_cancel: Literal["abandon", "wait"] = "abandon"
    max_concurrency: int | None = None
    sequential: bool = False
    on_error: Literal["model", "raise"] = "model"
    requires_approval: bool | None = None
    idempotent: bool = False
    after_crash: Literal["repeat", "fail", "ask"] | None = None

    def __post_init__(self) -> None:
        if self.name is not None and (not isinstance(self.name, str) or not TOOL_NAME.fullmatch(self.name)):
            raise InvalidArguments(f"name={self.name!r}: endpoints take 1 to 64 letters, digits, _ and -")
        if self.description is not None and not isinstance(self.description, str):
            raise InvalidArguments(f"description={self.description!r}: give text")
        if self.timeout is not None and not (is_number(self.timeout) and self.timeout > 0):
            raise InvalidArguments(f"timeout={self.timeout!r}: give seconds above 0, or None for no limit")
        if self.max_concurrency is not None and not is_count(self.max_concurrency, 1):
            raise InvalidArguments(f"max_concurrency={self.max_concurrency!r}: give 1 or more, or None for no limit")
        if self.on_cancel not in ("abandon", "wait"):
            raise InvalidArguments(f'on_cancel={self.on_cancel!r}: it is "abandon" or "wait"')
        if self.after_crash not in (None, "repeat", "fail", "ask"):
            raise InvalidArguments(f'after_crash={self.after_crash!r}: it is "repeat", "fail" or "ask"')
        if self.on_error not in ("model", "raise"):
            raise InvalidArguments(f'on_error={self.on_error!r}: it is "model" or "raise"')
        for name in ("terminate", "sequential", "idempotent", "requires_approval"):
            value = getattr(self, name)
            if not isinstance(value, bool) and (value is not None or name != "requires_approval"):
                raise InvalidArguments(f"{name}={value!r}: give True or False")

    def over(self, other: ToolOptions) -> ToolOptions:
        """These options, and the other's where these are the defaults."""
        given = {f.name: value for f in fields(self) if (value := getattr(self, f.name)) != f.default}
        return replace(other, **given)


_OPTIONS = [each.name for each in fields(ToolOptions)]


class _Mark(dict[str, Any]):
    """The options that `tool` gave one callable, without defaults."""


@overload
def tool(function: Function, /) -> Function: ...


@overload
def tool(
    *,
    name: str | None = None,
    description: str | None = None,
    terminate: bool = False,
    timeout: float | None = None,
    on_cancel: Literal["abandon", "wait"] = "abandon",
    max_concurrency: int | None = None,
    sequential: bool = False,
    on_error: Literal["model", "raise"] = "model",
    requires_approval: bool | None = None,
    idempotent: bool = False,
    after_crash: Literal["repeat", "fail", "ask"] | None = None,
) -> Callable[[Function], Function]: ...


def tool(function: Callable[..., Any] | None = None, /, **options: Any) -> Any:  # noqa: D417  # see the overload
    """Mark a function or method as a tool that a model may call.

    The function itself is unchanged and can be called as before. Its annotations and defaults make the JSON Schema
    the model sees, its docstring the descriptions. A plain `def` runs in a worker thread, so it never blocks the
    event loop.

    What is said holds for every callable that ends in the function: a partial, a bound method, what `functools.wraps`
    and `functools.lru_cache` make of it, an object whose `__call__` it is. What is said again, of the function or of
    one of these, goes before; what is not said stays as it was.

    Args:
        function: The function, when used without parentheses.
        name: Name the model sees. None: the function's own.
        description: What the model is told it does. None: the docstring.
        terminate: End the run with this tool's result as its content.
        timeout: Seconds one call may take, waiting for a free place included. None: `Limits.tool_timeout`.
        on_cancel: What happens to a plain `def` tool whose call is cancelled or timed out. `"abandon"` returns at once
            and leaves the thread to itself: the result's `abandoned` names it. `"wait"` returns when it has ended: for
            tools with effects that must not happen unseen. An `async def` tool is always cancelled and waited for.
        max_concurrency: Calls of this tool at a time, over all runs of the process. None: no limit of its own.
        sequential: Never run it beside another tool call of the same reply.
        on_error: `"model"` tells the model what went wrong, `"raise"` ends the run.
        requires_approval: Ask the run's `approve=` before each call; without one, no call is made. None: as it was said
            before, of what the function overrides too. Only False takes it back.
        idempotent: A second call does no harm beside one that could not be stopped. If not, a call waits for those in
            the same run, and in those above and below it, that were abandoned and still go on.
        after_crash: What becomes of a call that was at work when the process of a durable run ended, so that nobody
            knows whether it took effect. `"repeat"` makes it again, with the same `ctx.idempotency_key`; `"fail"` tells
            the model that it is unknown; `"ask"` asks the run's `approve=`. None: as it was said before, or else
            `"repeat"` for an idempotent tool and `"fail"` for any other.

    Returns:
        The function, marked; or a decorator, when called with options.

    Raises:
        InvalidArguments: There is no such option, or it has a value it cannot have.

    Example:
        >>> @tool(timeout=5)
        ... def add(a: int, b: int = 1) -> int:
        ...     '''Add two numbers.'''
        ...     return a + b
        >>> add(2)
        3
    """
    unknown = options.keys() - _OPTIONS
    if unknown:
        raise InvalidArguments(f"tool has no option {min(unknown)}=: it has {', '.join(_OPTIONS)}")
    ToolOptions(**options)  # refuses what cannot be
    for name in _NOT_LOST:
        if options.get(name, True) is None:
            del options[name]

    def marked(target: Any) -> Any:
        # A static or class method is marked on its function, whichever decorator comes first.
        inner = unbound(target)
        if isinstance(inner, functools.partialmethod):  # one of a partialmethod forgets what that was
            raise InvalidTool(name_of(inner), "mark the function that the partialmethod calls, or write a method")
        if not callable(inner):
            raise InvalidTool(repr(target), "it cannot be called: write @tool, or @tool(name=…)")
        try:
            setattr(inner, _MARK, mark := _Mark(_mark_of(inner) or {}, **options))
            is_kept = _mark_of(inner) is mark
        except Exception:  # whatever a class of the user's does about attributes
            is_kept = False
        if not is_kept:
            raise InvalidTool(name_of(inner), "it cannot be marked: wrap it in a function, or use add_tool")
        return target

    return marked if function is None else marked(function)


def options_of(function: object, overridden: Iterable[object] = ()) -> ToolOptions | None:
    """The options that `tool` gave a callable and its layers; None without any.

    Args:
        function: Function, method, partial or object, or what a class holds.
        overridden: What it takes the place of: approval that was asked for there is not lost in silence, nor what
            becomes of a call after a crash.
    """
    said = _said_of(function)
    for name in _NOT_LOST:
        if name not in (said or ()):
            for other in (*overridden, *(above for layer in layers(function) for above in has_overridden(layer))):
                before = _said_of(other)
                if before is not None and name in before:
                    said = {**(said or {}), name: before[name]}
                    break
    if "requires_approval" not in (said or ()) and _holds_a_guarded_one(function, is_marked=said is not None):
        said = dict[str, Any](said or {}, requires_approval=True)
    return None if said is None else ToolOptions(**said)


def _holds_a_guarded_one(function: object, *, is_marked: bool) -> bool:
    """Whether a callable has one in hand that requires approval: it is a wrapper, most likely, of another make.

    Whoever marks a function that has another one in its closure has said what holds for its calls.
    """
    passed = [layer for layer in layers(function) if not is_marked or type(layer) is not types.FunctionType]
    pending, seen = [held for layer in passed for held in held_by(layer)], list[Any]()
    while pending and len(seen) < _MOST_HELD:
        held = pending.pop()
        if any(held is each for each in seen):
            continue
        seen.append(held)
        said = _said_of(held, asks=False) or {}
        if said.get("requires_approval"):
            return True
        if "requires_approval" not in said:
            pending += [each for layer in layers(held, asks=False) for each in held_by(layer)]
    return False


def is_marked(attribute: object) -> bool:
    """Whether `tool` has marked an attribute of a class, or the function that it leads to."""
    return type(attribute) not in _NEVER_MARKED and _said_of(attribute, asks=False) is not None


_NEVER_MARKED = {  # most of what a class has
    *(str, int, float, bool, bytes, dict, list, tuple, set, frozenset, type(None)),
    *(types.WrapperDescriptorType, types.MethodDescriptorType, types.ClassMethodDescriptorType),
    *(types.BuiltinFunctionType, types.GetSetDescriptorType, types.MemberDescriptorType),
}


def _said_of(function: object, *, asks: bool = True) -> dict[str, Any] | None:
    """The options of a callable and its layers; an outer layer's take precedence."""
    found = layers(function, asks=asks)
    marks = [mark for layer in found if (mark := _mark_of(layer, asks=asks)) is not None]
    return {name: value for mark in reversed(marks) for name, value in mark.items()} if marks else None


def _mark_of(layer: object, *, asks: bool = True) -> _Mark | None:
    mark = attribute_of(layer, _MARK, asks=asks)
    return mark if isinstance(mark, _Mark) else None
