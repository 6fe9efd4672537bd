"""Tools: functions that a model may call, and the kit that holds them."""

from __future__ import annotations

import functools
import inspect
import re
import sys
import types
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal, Self, TypeVar, overload
from weakref import WeakKeyDictionary

from fractal._docstring import Documentation, read_docstring
from fractal._schema import Parameters, is_async, schema_of
from fractal._threads import Gate
from fractal.context import RunContext, is_context
from fractal.errors import InvalidArguments, InvalidTool, ToolNameTaken
from fractal.models.base import ToolSchemas

__all__ = ["AgentToolkit", "Tool", "ToolOptions", "tool"]

Function = TypeVar("Function", bound=Callable[..., Any])

_MARK = "__fractal_tool__"
_NAME = re.compile(r"[a-zA-Z0-9_-]{1,64}")


@dataclass(frozen=True, slots=True, kw_only=True)
class ToolOptions:
    """How a function is offered and called; the arguments of `tool`, kept with the function."""

    name: str | None = None
    description: str | None = None
    terminate: bool = False
    timeout: float | None = None
    on_cancel: Literal["abandon", "wait"] = "abandon"
    max_concurrency: int | None = None
    sequential: bool = False
    on_error: Literal["model", "raise"] = "model"
    requires_approval: bool = False
    idempotent: bool = False

    def __post_init__(self) -> None:
        if self.name is not None and (not isinstance(self.name, str) or not _NAME.fullmatch(self.name)):
            raise InvalidArguments(f"name={self.name!r}: endpoints take 1 to 64 letters, digits, _ and -")
        if self.description is not None and not isinstance(self.description, str):
            raise InvalidArguments(f"description={self.description!r}: give text")
        if self.timeout is not None and not (_is_number(self.timeout) and self.timeout > 0):
            raise InvalidArguments(f"timeout={self.timeout!r}: give seconds above 0, or None for no limit")
        if self.max_concurrency is not None and not (_is_count(self.max_concurrency) and self.max_concurrency > 0):
            raise InvalidArguments(f"max_concurrency={self.max_concurrency!r}: give 1 or more, or None for no limit")
        if self.on_cancel not in ("abandon", "wait"):
            raise InvalidArguments(f'on_cancel={self.on_cancel!r}: it is "abandon" or "wait"')
        if self.on_error not in ("model", "raise"):
            raise InvalidArguments(f'on_error={self.on_error!r}: it is "model" or "raise"')


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
    requires_approval: bool = False,
    idempotent: bool = False,
) -> Callable[[Function], Function]: ...


def tool(function: Callable[..., Any] | None = None, /, **options: Any) -> Any:  # noqa: D417  # see the overload
    """Mark a function or method as a tool that a model may call.

    The function itself is unchanged and can be called as before. Its annotations and defaults make the JSON Schema
    the model sees, its docstring the descriptions. A plain `def` runs in a worker thread, so it never blocks the
    event loop.

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
        requires_approval: Ask the run's `approve=` before each call; without one, no call is made.
        idempotent: A second call does no harm beside one that could not be stopped. If not, a call waits for those in
            the same run, and in those above and below it, that were abandoned and still go on.

    Returns:
        The function, marked; or a decorator, when called with options.

    Raises:
        InvalidArguments: An option has a value it cannot have.

    Example:
        >>> @tool(timeout=5)
        ... def add(a: int, b: int = 1) -> int:
        ...     '''Add two numbers.'''
        ...     return a + b
        >>> add(2)
        3
    """
    settings = ToolOptions(**options)

    def mark(target: Any) -> Any:
        # A static or class method is marked on its function, whichever decorator comes first.
        inner = _unwrapped(target)
        if not callable(inner):
            raise InvalidTool(repr(target), "it cannot be called: write @tool, or @tool(name=…)")
        try:
            setattr(inner, _MARK, settings)
        except AttributeError:
            raise InvalidTool(_name_of(inner), "it cannot be marked: wrap it in a function, or use add_tool") from None
        return target

    return mark if function is None else mark(function)


@dataclass(frozen=True, slots=True)
class Tool:
    """A function as a model sees and calls it; made by a toolkit.

    Attributes:
        name: Name the model uses.
        description: What the model is told it does.
        function: What is called.
        parameters: The arguments: JSON Schema and validator.
        is_async: Whether the call is awaited in the event loop; if not, it runs in a worker thread.
        options: How it is called.
        gate: The limit of its own, or None.
        is_answer: Whether it is none of the agent's tools, but takes the answer of a run.
    """

    name: str
    description: str
    function: Callable[..., Any]
    parameters: Parameters
    is_async: bool
    options: ToolOptions
    gate: Gate | None = None
    is_answer: bool = False

    @property
    def schema(self) -> dict[str, Any]:
        """The tool as a chat-completions schema."""
        return {
            "type": "function",
            "function": {
                "name": self.name,
                "description": self.description,
                "parameters": self.parameters.json_schema,
            },
        }

    @classmethod
    def from_function(cls, function: Callable[..., Any], options: ToolOptions | None = None) -> Tool:
        """Make a tool of a function, bound method, partial or callable object.

        Args:
            function: What to call.
            options: How; None: as `tool` marked it, or the defaults.

        Raises:
            InvalidTool: It cannot be offered to a model.
        """
        if not callable(function):
            raise InvalidTool(repr(function), "it cannot be called")
        options = options or options_of(function) or ToolOptions()
        name = options.name or _name_of(function)
        documentation, parameters = _read(function, name)
        gate = _gate_of(function, options)
        description = options.description if options.description is not None else documentation.summary
        return cls(name, description, function, parameters, is_async(function), options, gate)


class AgentToolkit:
    """A set of tools. Subclass it and decorate methods, or add functions to an instance.

    Every agent has one; one made by hand can be given to several agents.

    Args:
        *functions: Functions to add, decorated or not.

    Raises:
        InvalidTool: One of them cannot be a tool.
        ToolNameTaken: Two have one name.

    Example:
        >>> class Numbers(AgentToolkit):
        ...     @tool
        ...     def double(self, n: int) -> int:
        ...         return 2 * n
        >>> [t.name for t in Numbers()]
        ['double']
    """

    register_as_tool = staticmethod(tool)

    def __new__(cls, *functions: Any, **named: Any) -> Self:
        """Set up what a subclass's own `__init__` may leave out."""
        kit = super().__new__(cls)
        kit.__tools = {}
        kit.__schemas = None
        kit.__has_methods = False
        return kit

    def __init__(self, *functions: Callable[..., Any]) -> None:
        self.__tools: dict[str, Tool]
        self.__schemas: ToolSchemas | None
        self.__has_methods: bool
        self._found()
        for function in functions:
            self.add_tool(function)

    def add_tool(
        self,
        function: Callable[..., Any] | Tool,
        *,
        name: str | None = None,
        description: str | None = None,
        terminate: bool = False,
    ) -> Tool:
        """Add a function.

        Args:
            function: Function, bound method, partial or callable object; options given to `tool` hold.
            name: Name the model sees. None: as `tool` said, or the function's own.
            description: What the model is told it does. None: as `tool` said, or the docstring.
            terminate: End a run with this tool's result, whatever `tool` said.

        Returns:
            The tool made of it.

        Raises:
            InvalidTool: It cannot be a tool.
            ToolNameTaken: There is one of that name.
        """
        options = function.options if isinstance(function, Tool) else options_of(function) or ToolOptions()
        options = replace(
            options,
            name=name or options.name,
            description=description if description is not None else options.description,
            terminate=terminate or options.terminate,
        )
        if not isinstance(function, Tool):
            return self._add(Tool.from_function(function, options))
        shown = description if description is not None else function.description
        return self._add(replace(function, name=name or function.name, description=shown, options=options))

    def add_methods(self, owner: object) -> None:
        """Add every method of an object that `tool` marked, inherited ones included, in the order of definition.

        Classes are read without touching the object, so no property of it is run. A method that a subclass overrides
        is the subclass's: a tool only if it is marked there.
        """
        names = dict.fromkeys(name for kind in reversed(type(owner).__mro__) for name in vars(kind))
        for name in names:
            if options_of(inspect.getattr_static(type(owner), name)) is None:
                continue
            if any(name in vars(kind) for kind in type(owner).__mro__ if _is_ours(kind)):
                raise InvalidTool(
                    name, f"{type(owner).__name__} has a method of that name itself: call yours otherwise"
                )
            self._add(Tool.from_function(getattr(owner, name)))

    def _add(self, new: Tool) -> Tool:
        tools = self._found()
        if new.name in tools:
            raise ToolNameTaken(new.name)
        # A new dictionary: runs that have begun keep the tools they began with.
        self.__tools = {**tools, new.name: new}
        self.__schemas = None
        return new

    def _found(self) -> dict[str, Tool]:
        """The tools, with the marked methods of the kit itself, looked for when first asked."""
        if not self.__has_methods:
            self.__has_methods = True
            self.add_methods(self)
        return self.__tools

    def get(self, name: str) -> Tool | None:
        """The tool of that name, or None."""
        return self._found().get(name)

    @property
    def tools(self) -> Mapping[str, Tool]:
        """The tools by name."""
        return types.MappingProxyType(self._found())

    def get_tools(self) -> dict[str, Callable[..., Any]]:
        """The functions that a model may call, by the name it uses."""
        return {tool.name: tool.function for tool in self}

    def get_tool_schemas(self) -> list[dict[str, Any]]:
        """The tools as a model sees them: chat-completions function schemas, in the order of registration."""
        return list(self.schemas().schemas)

    def schemas(self) -> ToolSchemas:
        """The tools as the model sees them, built once."""
        if self.__schemas is None:
            self.__schemas = ToolSchemas([tool.schema for tool in self])
        return self.__schemas

    def __iter__(self) -> Iterator[Tool]:
        return iter(self._found().values())

    def __len__(self) -> int:
        return len(self._found())

    def __contains__(self, name: object) -> bool:
        return name in self._found()


def _is_ours(kind: type) -> bool:
    """Whether a class is the package's own, whose methods a tool must not replace."""
    module = sys.modules.get(kind.__module__)
    return kind.__module__.startswith("fractal.") and getattr(module, kind.__name__, None) is kind


def options_of(function: object) -> ToolOptions | None:
    """What `tool` said of a function, method, or static or class method; None if it is not marked."""
    options = inspect.getattr_static(_unwrapped(function), _MARK, None)  # static: no property of an object is run
    return options if isinstance(options, ToolOptions) else None


def _unwrapped(function: Any) -> Any:
    """The function inside a method, whichever decorator comes first; anything else as it is."""
    if isinstance(function, (staticmethod, classmethod, types.MethodType)):
        method: Any = function  # pyright: ignore[reportUnknownVariableType]
        return method.__func__
    return function


def _is_count(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _name_of(function: Callable[..., Any]) -> str:
    inner = function.func if isinstance(function, functools.partial) else function
    name = getattr(inner, "__name__", None)
    return name if isinstance(name, str) and name.isidentifier() else type(inner).__name__


def _documentation_of(function: Callable[..., Any]) -> Documentation:
    inner = function.func if isinstance(function, functools.partial) else function
    if not inspect.isroutine(inner) and not inspect.isclass(inner):
        call = type(inner).__call__
        return read_docstring(call.__doc__ or type(inner).__doc__)
    return read_docstring(inspect.getdoc(inner))


_known: WeakKeyDictionary[Any, dict[bool, tuple[Documentation, Parameters]]] = WeakKeyDictionary()
_known_gates: WeakKeyDictionary[Any, Gate] = WeakKeyDictionary()


def _identity(function: Callable[..., Any]) -> Any:
    """What bound methods of all instances share; None for what cannot be remembered."""
    inner = _unwrapped(function)
    return inner if isinstance(inner, types.FunctionType) else None


def _read(function: Callable[..., Any], name: str) -> tuple[Documentation, Parameters]:
    """What a function's docstring and signature say, read once per function: making agents stays cheap."""
    identity, is_bound = _identity(function), inspect.ismethod(function)
    known = _known.setdefault(identity, {}) if identity is not None else {}
    if is_bound not in known:
        documentation = _documentation_of(function)
        parameters = schema_of(
            function,
            name=name,
            documentation=documentation,
            is_context=is_context,
            known_names={"RunContext": RunContext},
        )
        known[is_bound] = documentation, parameters
    return known[is_bound]


def _gate_of(function: Callable[..., Any], options: ToolOptions) -> Gate | None:
    if options.max_concurrency is None:
        return None
    identity = _identity(function)
    gate = Gate(options.max_concurrency, f"its turn (max_concurrency={options.max_concurrency})")
    return gate if identity is None else _known_gates.setdefault(identity, gate)
