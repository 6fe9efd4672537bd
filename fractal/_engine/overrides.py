"""Verbs that a subclass overrides, or that somebody has replaced on an agent: called wherever the verb is meant.

Asked when a run begins, by looking at the agent: an agent that overrides nothing pays nothing for it.
"""

from __future__ import annotations

import inspect
import types
from collections.abc import Callable, Mapping
from contextvars import ContextVar
from typing import TYPE_CHECKING, Any, TypeVar

from fractal._concurrency.current import WeakVar
from fractal._concurrency.grace import answered, graced
from fractal._concurrency.stall import timed
from fractal._engine.hooks import Warn, call_user
from fractal._functions.callables import is_async
from fractal._functions.marks import is_marked
from fractal._json import is_list, is_mapping
from fractal._texts import name_of, one_line, repr_of, type_name
from fractal.errors import InvalidArguments
from fractal.model import ToolSchemas

if TYPE_CHECKING:
    from fractal._engine.call import Call
    from fractal._engine.run import Run
    from fractal.toolkit import AgentToolkit, Tool

__all__ = [
    "Adoption",
    "Offered",
    "adopting",
    "call_override",
    "check_overrides",
    "current_through",
    "is_tool_schema",
    "override_of",
    "returned_as",
    "verb",
]

Verb = TypeVar("Verb", bound=Callable[..., Any])
Kind = TypeVar("Kind")

_own: set[object] = set()
"""The verbs as the package has them."""

current_through: WeakVar[Call] = WeakVar("fractal_through")
"""The tool call that an overridden `execute_tool` is asked about in this context."""


def verb(function: Verb) -> Verb:
    """Mark a method of ours as a verb that may be overridden; a decorator."""
    _own.add(function)
    return function


def override_of(agent: object, name: str) -> Callable[..., Any] | None:
    """The agent's override of a verb; None if there is none."""
    method = getattr(agent, name, None)
    return None if getattr(method, "__func__", None) in _own or not callable(method) else method


async def call_override(
    override: Callable[..., Any],
    argument: object,
    named: Mapping[str, Any],
    *,
    blocks: bool,
    warn: Warn,
    is_tool_call: bool = False,
) -> Any:
    """Call an overridden verb as a user of the agent would; cancelled, it has its grace.

    Args:
        override: What the agent has in the place of the verb.
        argument: What it is given by position.
        named: What it is given by name.
        blocks: Whether it is the verb of a blocking agent, which has to be called in a thread.
        warn: Told of what is odd.
        is_tool_call: Whether a tool call is made by it, which itself sees to what does not stop or is cancelled.
    """
    if blocks:
        return await call_user(warn, override, argument, **named)
    answer, name = override(argument, **named), name_of(override)
    if not inspect.isawaitable(answer):
        return answer
    answer = timed(answer, name, warn)
    return await (graced(answer) if is_tool_call else answered(answer, name))


def returned_as(kind: type[Kind], value: object, agent: object, name: str) -> Kind:
    """The checked return value of an overridden verb.

    Raises:
        InvalidArguments: It is something else than the verb returns.
    """
    if isinstance(value, kind):
        return value
    raise InvalidArguments(
        f"{type_name(agent)}.{name} returned {one_line(repr_of(value), 100)}: whoever calls it needs the"
        f" {kind.__name__} of super().{name}(…), or one of your own"
    )


# ---- what a class overrides


_OURS: Any = object()

_CALLED: Mapping[str, tuple[tuple[Any, ...], dict[str, Any], str]] = {
    "run": (("input",), {}, "(user_input, **options)"),
    "stream": (("input",), {"buffer": 1, "timeout": 1}, "(user_input, *, buffer, **options)"),
    "execute_tool": (("tool",), {"any_name": 1}, "(tool_name, /, **arguments)"),
    "get_tool_schemas": ((), {}, "()"),
}


def check_overrides(kind: type[Any]) -> None:
    """Refuse a new class of agents whose override of a verb cannot be called as the verb.

    Raises:
        InvalidArguments: It cannot; says how it is called, or what to override instead.
    """
    if _found(kind, "get_tools") is not _OURS:
        raise InvalidArguments(
            f"{kind.__name__}.get_tools: no run asks it. Override get_tool_schemas to choose what a model is offered,"
            " or execute_tool to do something about each call"
        )
    for name in _CALLED:
        method = _found(kind, name)
        if method is not _OURS and not is_marked(method):  # a tool of that name is refused with a word of its own
            _check(kind, name, method)


def _found(kind: type[Any], name: str) -> object:
    """The override of a verb in a class, its own or a mixin's; `_OURS` if it has none."""
    first = next((vars(each)[name] for each in kind.__mro__ if name in vars(each)), _OURS)
    return _OURS if isinstance(first, types.FunctionType) and first in _own else first


def _check(kind: type[Any], name: str, method: object) -> None:
    arguments, named, form = _CALLED[name]
    function = getattr(kind, name)
    if not callable(function):
        raise InvalidArguments(f"{kind.__name__}.{name} hides the verb {name}: give yours another name")
    if name in ("get_tool_schemas", "stream") and is_async(function):
        raise InvalidArguments(f"{kind.__name__}.{name} is async, and called where nobody awaits: use def")
    try:
        signature = inspect.signature(function)
    except (ValueError, TypeError):
        return
    of_object = () if isinstance(method, (staticmethod, classmethod)) else (None,)
    try:
        signature.bind(*of_object, *arguments, **named)
    except TypeError:
        raise InvalidArguments(
            f"{kind.__name__}.{name}{signature} hides the verb {name}, which delegation, batches, streams and the"
            f" blocking facade call as {name}{form}: take these, or give yours another name"
        ) from None


# ---- what a run is offered


class Offered:
    """The tools that an overridden `get_tool_schemas` offers; no others can be called.

    Args:
        agent: Whose it is.
        toolkit: The agent's tools.
        schemas: What it returned.

    Raises:
        InvalidArguments: That is no list of tools.
    """

    def __init__(self, agent: object, toolkit: AgentToolkit, schemas: Any) -> None:
        if not is_list(schemas) or not all(map(is_tool_schema, schemas)):
            raise InvalidArguments(
                f"{type_name(agent)}.get_tool_schemas returned {one_line(repr_of(schemas), 100)}: return a list of"
                ' {"type": "function", "function": {"name": …, "description": …, "parameters": {…}}}'
            )
        names = [schema["function"]["name"] for schema in schemas]
        tools = toolkit.tools
        self.tools: Mapping[str, Tool] = {name: tools[name] for name in names if name in tools}
        self._schemas = ToolSchemas(schemas)

    def schemas(self) -> ToolSchemas:
        """The schemas that the model sees."""
        return self._schemas


def is_tool_schema(schema: Any) -> bool:
    """Whether something is a chat-completions function schema."""
    function = schema.get("function") if is_mapping(schema) else None
    return is_mapping(function) and isinstance(function.get("name"), str)


# ---- the run inside an overridden `run`


class Adoption:
    """A callback for each run that begins in a block, called before that run begins.

    Args:
        agent: The agent whose `run` is called.
        above: The run above, or None.
        take: Called with each.
        sees_to_streams: Whether `take` says what streams are shown of it.
    """

    def __init__(
        self, agent: object, above: Run | None, take: Callable[[Run], None], *, sees_to_streams: bool = False
    ) -> None:
        self._agent, self._above = agent, above
        self._take: Callable[[Run], None] | None = take
        self._sees_to_streams = sees_to_streams
        self.is_over = False

    def __enter__(self) -> None:
        self._outer = adopting.set(self)

    def __exit__(self, *_: object) -> None:
        self.end()
        adopting.reset(self._outer)
        del self._outer  # which knows the context

    def tell(self, run: Run) -> None:
        """Call back for a run, unless it is below another or comes after the end."""
        if run.agent is self._agent and run.parent is self._above and self._take is not None:
            self._take(run)

    def end(self) -> None:
        """Call back no more, and forget what was called: contexts that know this may live long."""
        self.is_over, self._take = True, None

    def shows(self, agent: object, above: Run | None) -> bool:
        """Whether this adoption decides what streams show of the runs that an agent begins below a run."""
        return self._sees_to_streams and agent is self._agent and above is self._above and not self.is_over


adopting: ContextVar[Adoption | None] = ContextVar("fractal_adopting", default=None)
