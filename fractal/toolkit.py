"""Tools: functions that a model may call, and the kit that holds them."""

from __future__ import annotations

import dataclasses
import functools
import inspect
import sys
import types
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Never, cast
from weakref import WeakKeyDictionary

from fractal._concurrency.gates import Gate
from fractal._functions.callables import core_of, hides_receiver, is_async, is_async_generator, name_of, unbound
from fractal._functions.docstring import Documentation, docstring_of, read_docstring
from fractal._functions.marks import TOOL_NAME, ToolOptions, is_marked, options_of, tool
from fractal._functions.schema import Parameters, schema_of
from fractal._functions.signature import type_arguments
from fractal._texts import is_a, kind_of, repr_of
from fractal.context import RunContext, is_context
from fractal.errors import InvalidArguments, InvalidTool, ToolNameTaken
from fractal.model import ToolSchemas

__all__ = ["DELEGATE", "FOR_ANOTHER", "AgentToolkit", "Tool", "ToolOptions", "options_of", "tool"]

_FUNCTIONS = (types.FunctionType, staticmethod, classmethod)
_NOT_CALLED: tuple[type[Any], ...] = (property, functools.cached_property, functools.singledispatchmethod)

DELEGATE = "__fractal_delegate__"
"""Attribute of the function that asks an agent: the agent."""

FOR_ANOTHER = "__fractal_for_another__"
"""Attribute of the function that asks an agent: makes one that asks another agent in the same way."""

_OF_AGENTS = {
    "execute_tool": "an agent calls tools: BaseAgent(…, toolkit=…), then await agent.execute_tool(…)",
    "register_delegate": "agents are tools of an agent: agent.register_delegate(other)",
    "register_agent": "agents are tools of an agent: agent.register_delegate(other)",
}
"""What toolkits of the older framework did, and where it is done."""


@dataclass(frozen=True, slots=True)
class Tool:
    """A function as a model sees and calls it; made by a toolkit.

    Attributes:
        name: Name the model uses.
        description: What the model is told it does.
        function: What is called.
        parameters: The arguments: JSON Schema and validator.
        is_async: Whether the call is awaited in the event loop; if not, it runs in a worker thread.
        options: How it is called; what is left at its default is as `tool` said of the function.
        gate: The limit of its own. None: that of the function, if `max_concurrency` asks for one.
        is_answer: Whether it is none of the agent's tools, but takes the answer of a run.

    Raises:
        InvalidTool: No endpoint takes its name.
    """

    name: str
    description: str
    function: Callable[..., Any]
    parameters: Parameters
    is_async: bool
    options: ToolOptions
    gate: Gate | None = None
    is_answer: bool = False

    def __post_init__(self) -> None:
        if self.is_answer:
            return
        if not TOOL_NAME.fullmatch(self.name):
            raise InvalidTool(self.name, "endpoints take names of 1 to 64 letters, digits, _ and -: give it name=…")
        # However a tool is made, a guard of its function is not lost.
        object.__setattr__(self, "options", self.options.over(options_of(self.function) or ToolOptions()))
        object.__setattr__(self, "gate", self.gate or _gate_of(self.function, self.options))

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
            options: How; what is left at its default, or None, is as `tool` said of the function.

        Raises:
            InvalidTool: It cannot be offered to a model.
        """
        if not callable(function):
            if is_a(function, AgentToolkit):
                fault = "it is a toolkit: give an agent toolkit=…, or add the methods of the toolkit one by one"
                raise InvalidTool(type(function).__name__, fault)
            raise InvalidTool(repr_of(function), "it cannot be called")
        if (agent := _agent_behind(function)) is not None:
            raise InvalidTool(agent, "it is an agent: offer it by register_delegate(agent)")
        options = (options or ToolOptions()).over(options_of(function) or ToolOptions())
        name = options.name or name_of(function)
        documentation, parameters = _read(function, name)
        description = options.description if options.description is not None else documentation.summary
        in_loop = is_async(function) or is_async_generator(function)
        return cls(name, description, function, parameters, in_loop, options)


class AgentToolkit:
    """A set of tools. Subclass it and decorate methods, or add functions to an instance.

    Every agent has one; one made by hand can be given to several agents.

    Args:
        *functions: Functions to add, decorated or not.
        target: Nothing; refused with a word for code that gives it.

    Raises:
        InvalidArguments: A `target` is given.
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

    # Defaults of the class: a subclass may leave `__init__` out. `__keep` sets them: it may be frozen.
    __tools: Mapping[str, Tool] = types.MappingProxyType({})
    __schemas: ToolSchemas | None = None
    __own: frozenset[str] | None = None  # the names of its methods; None until they are looked for
    __hidden: frozenset[str] = frozenset()  # those of its methods that were taken out or replaced
    __alias: object = None  # what type arguments it had then

    def __init__(self, *functions: Callable[..., Any] | Tool, target: None = None) -> None:
        if target is not None:
            raise InvalidArguments(
                "AgentToolkit(target=…): an agent finds its own marked methods. For those of another object, mark them"
                " with @tool and add them: AgentToolkit(target.method, …)"
            )
        self._found()
        for function in functions:
            self.add_tool(function)

    def __keep(self, **values: object) -> None:
        for name, value in values.items():
            object.__setattr__(self, f"_AgentToolkit__{name}", value)

    if not TYPE_CHECKING:  # type checkers would let through any name

        def __getattr__(self, name: str) -> Never:
            elsewhere = _OF_AGENTS.get(name)
            hint = f": {elsewhere}" if elsewhere is not None else ""
            raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}{hint}")

    def add_tool(
        self,
        function: Callable[..., Any] | Tool,
        *,
        name: str | None = None,
        description: str | None = None,
        terminate: bool = False,
        replace: bool = False,
    ) -> Tool:
        """Add a function; to add the same one once more, with the same options, changes nothing.

        Args:
            function: Function, bound method, partial or callable object; options given to `tool` hold.
            name: Name the model sees. None: as `tool` said, or the function's own.
            description: What the model is told it does. None: as `tool` said, or the docstring.
            terminate: End a run with this tool's result, whatever `tool` said.
            replace: Take the place of a tool of that name.

        Returns:
            The tool made of it.

        Raises:
            InvalidTool: It cannot be a tool.
            InvalidArguments: An option has a value it cannot have.
            ToolNameTaken: There is another of that name, and `replace` is False.
        """
        given = ToolOptions(name=name, description=description, terminate=terminate)
        if not isinstance(function, Tool):
            return self._add(Tool.from_function(function, given), replace)
        if given == ToolOptions():
            return self._add(function, replace)
        shown = description if description is not None else function.description
        options = given.over(function.options)
        changed = dataclasses.replace(function, name=name or function.name, description=shown, options=options)
        return self._add(changed, replace)

    def remove_tool(self, name: str) -> Tool:
        """Remove a tool.

        Args:
            name: Name the model sees.

        Returns:
            The tool.

        Raises:
            InvalidArguments: There is no tool of that name.
        """
        tools = dict(self._found())
        if not isinstance(name, str) or name not in tools:
            raise InvalidArguments(f"there is no tool {name!r} to remove, only {', '.join(tools) or 'none'}")
        removed = tools.pop(name)
        self.__hide(name)
        self.__keep(tools=tools, schemas=None)
        return removed

    def add_methods(self, owner: object) -> None:
        """Add every method of an object that `tool` marked, inherited ones included, in the order of definition.

        Classes are read without touching the object, so no property of it is run. A method that a subclass overrides
        is the subclass's: a tool only if it is marked there. Partials and callable objects that a class holds are tools
        too, if what they end in is marked, under the name that the class gives them.
        """
        attributes = {name: value for kind in reversed(type(owner).__mro__) for name, value in vars(kind).items()}
        for name, attribute in attributes.items():
            if not is_marked(attribute):
                continue
            if any(name in vars(kind) for kind in type(owner).__mro__ if _is_ours(kind)):
                raise InvalidTool(
                    name, f"{type(owner).__name__} has a method of that name itself: give yours another name"
                )
            kind = kind_of(attribute)
            if issubclass(kind, _NOT_CALLED):
                raise InvalidTool(name, f"a {kind.__name__} cannot be called by name: write a method")
            above = [vars(kind)[name] for kind in type(owner).__mro__ if name in vars(kind)]
            options = options_of(attribute, overridden=above) or ToolOptions()
            if options.name is None and not issubclass(kind, _FUNCTIONS):
                options = dataclasses.replace(options, name=name)
            method = getattr(owner, name)
            if hides_receiver(method, attribute):
                raise InvalidTool(name, "its signature shows 'self', which its decorator gives: call it in a method")
            self._add(Tool.from_function(method, options))

    def _add(self, new: Tool, may_replace: bool = False) -> Tool:
        tools = self._found()
        there = tools.get(new.name)
        if there is not None:
            if _is_same(there, new):
                return there
            if not may_replace:
                raise ToolNameTaken(new.name)
            self.__hide(new.name)
        # A new dictionary: runs that have begun keep the tools they began with.
        self.__keep(tools={**tools, new.name: new}, schemas=None)
        return new

    def __hide(self, name: str) -> None:
        if name in (self.__own or ()):
            self.__keep(own=(self.__own or frozenset[str]()) - {name}, hidden=self.__hidden | {name})

    def _found(self) -> Mapping[str, Tool]:
        """The tools, with the marked methods of the kit itself, looked for when first asked.

        Of a generic kit, `Kit[int]()`, once more: Python tells an object its type arguments only when it is made.
        """
        alias = vars(self).get("__orig_class__")
        if self.__own is None or alias is not self.__alias:
            added = [each for each in self.__tools.values() if each.name not in (self.__own or ())]
            self.__keep(tools={}, own=frozenset[str](), alias=alias)
            self.add_methods(self)
            own = {name: each for name, each in self.__tools.items() if name not in self.__hidden}
            self.__keep(tools=own, own=frozenset(own))
            for each in added:
                self._add(each)
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
        return {name: tool.function for name, tool in self._found().items()}

    def get_tool_schemas(self) -> list[dict[str, Any]]:
        """The tools as a model sees them: chat-completions function schemas, in the order of registration."""
        return list(self.schemas().schemas)

    def schemas(self) -> ToolSchemas:
        """The tools as the model sees them, built once."""
        if self.__schemas is None:
            self.__keep(schemas=ToolSchemas([tool.schema for tool in self._found().values()]))
        return cast("ToolSchemas", self.__schemas)

    def __iter__(self) -> Iterator[Tool]:
        return iter(self._found().values())

    def __len__(self) -> int:
        return len(self._found())

    def __contains__(self, name: object) -> bool:
        return name in self._found()


def _is_same(one: Tool, other: Tool) -> bool:
    """Whether two tools of one name are the same function, or ask the same agent, in the same way."""
    if (one.options, one.description) != (other.options, other.description):
        return False
    first, second = one.function, other.function
    if isinstance(first, types.MethodType) and isinstance(second, types.MethodType):  # made anew at each look
        return first.__func__ is second.__func__ and first.__self__ is second.__self__
    if first is second:
        return True
    asks = [vars(each).get(DELEGATE) if type(each) is types.FunctionType else None for each in (first, second)]
    is_same_agent = asks[0] is not None and asks[0] is asks[1]
    return is_same_agent and one.parameters.json_schema == other.parameters.json_schema


def _agent_behind(function: Callable[..., Any]) -> str | None:
    """The name of an agent that is given as a function: itself, its class, or one of its verbs."""
    owner = function.__self__ if isinstance(function, types.MethodType) else function
    kind: Any = owner if isinstance(owner, type) else kind_of(owner)
    if not hasattr(kind, "register_delegate") or issubclass(kind, AgentToolkit):
        return None
    is_verb = any(name_of(function) in vars(each) for each in kind.__mro__ if _is_ours(each))
    return repr_of(owner) if owner is function or is_verb else None


def _is_ours(kind: type) -> bool:
    """Whether a class is the package's own, whose methods a tool must not replace."""
    module = sys.modules.get(kind.__module__)
    return kind.__module__.startswith("fractal.") and getattr(module, kind.__name__, None) is kind


_known: WeakKeyDictionary[Any, dict[bool, tuple[Documentation, Parameters]]] = WeakKeyDictionary()
_known_gates: WeakKeyDictionary[Any, dict[int, Gate]] = WeakKeyDictionary()


def _read(function: Callable[..., Any], name: str) -> tuple[Documentation, Parameters]:
    """The docstring and signature of a function, read once per function, so that making agents stays cheap."""
    # Bound methods of all instances share it.
    inner, is_bound = unbound(function), inspect.ismethod(function)
    is_kept = kind_of(inner) is types.FunctionType and not type_arguments(function)
    known = _known.setdefault(inner, {}) if is_kept else {}
    if is_bound not in known:
        documentation = read_docstring(docstring_of(function))
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
    """The gate of a function: one for all partials, instances and tools that end in it with the same limit."""
    limit = options.max_concurrency
    if limit is None:
        return None
    try:
        gates = _known_gates.setdefault(core_of(function), {})
    except TypeError:  # what has no hash, or cannot be referred to weakly, is remembered by nobody
        gates = {}
    if limit not in gates:
        gates[limit] = Gate(limit, f"its turn (max_concurrency={limit})")
    return gates[limit]
