"""Settings of an agent that can be added to: its tools, and the hooks around what it does."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any, Never, Self, overload

from fractal._agent.core import AnyAgent, core_of
from fractal._agent.settings import Given, Held, Setting
from fractal._engine.around import Guards, Hooks
from fractal._texts import in_brief, kind_of
from fractal.around import Around, AroundHook, Guard
from fractal.errors import InvalidArguments
from fractal.toolkit import AgentToolkit

if TYPE_CHECKING:
    from fractal.model import ToolSchemas
    from fractal.toolkit import Tool

__all__ = ["AroundSetting", "GuardSetting", "ToolkitSetting", "checked_tools"]


class AgentTools(AgentToolkit):
    """The tools of one agent; a tool added here is added to the agent.

    Args:
        agent: The agent.
    """

    def __init__(self, agent: AnyAgent) -> None:
        self.__agent, self.__kit = agent, core_of(agent).toolkit

    def execute_tool(self, tool_name: str = "", /, **arguments: Any) -> Any:
        """Call one tool by the agent's own `execute_tool`, which may have to be awaited."""
        agent: Any = self.__agent  # awaiting or blocking
        return agent.execute_tool(tool_name, **arguments)

    def register_delegate(self, agent: AnyAgent, *arguments: Any, **options: Any) -> AgentTools:
        """Offer another agent as a tool; as the agent's own `register_delegate`."""
        self.__agent.register_delegate(agent, *arguments, **options)
        return self

    def remove_tool(self, name: str) -> Tool:
        """Remove a tool; as the agent's own `remove_tool`."""
        return self.__kit.remove_tool(name)

    def schemas(self) -> ToolSchemas:
        """The tools as the model sees them, built once."""
        return self.__kit.schemas()

    def _found(self) -> Mapping[str, Tool]:
        return self.__kit.tools

    def _add(self, new: Tool, may_replace: bool = False) -> Tool:
        return self.__kit.add_tool(new, replace=may_replace)


class ToolkitSetting(Setting["AgentToolkit | None", AgentTools]):
    """The setting `toolkit` of an agent, which is given once; later tools are added to the toolkit."""

    @overload
    def __get__(self, agent: None, kind: type[Any]) -> ToolkitSetting: ...

    @overload
    def __get__(self, agent: object, kind: type[Any]) -> AgentTools: ...

    def __get__(self, agent: Any, kind: type[Any]) -> Any:
        """The agent's tools."""
        return super().__get__(None, kind) if agent is None else AgentTools(agent)

    def __set__(self, agent: object, value: AgentToolkit | None) -> Never:
        """Refuse an assignment.

        Raises:
            InvalidArguments: Always.
        """
        raise InvalidArguments(
            "toolkit cannot be assigned: add to it by agent.add_tool(…), or give toolkit=… when the agent is made"
        )


class _HookSetting(Setting[Given, Held]):
    """A setting that holds functions, whose value is also a decorator that adds one."""

    _form: type[Any]

    @overload
    def __get__(self, agent: None, kind: type[Any]) -> Self: ...

    @overload
    def __get__(self, agent: object, kind: type[Any]) -> Held: ...

    def __get__(self, agent: Any, kind: type[Any]) -> Any:
        """The agent's functions."""
        if agent is None:
            return super().__get__(None, kind)
        core = core_of(agent)
        return self._form.of(core.read(self.name), partial(core.add_hook, self.name))

    def __call__(self, *given: Any, **options: Any) -> Never:
        """Refuse to decorate a method.

        Raises:
            InvalidArguments: Always.
        """
        raise InvalidArguments(
            f"@{self.name} is a decorator of an agent, not of its class: for a method of a class, call"
            f" self.{self.name}(self.method) in __init__"
        )


class AroundSetting(_HookSetting[AroundHook | Sequence[AroundHook | Around] | None, Hooks]):
    """A setting that holds the hooks around tool calls, or around requests."""

    _form = Hooks


class GuardSetting(_HookSetting[Guard | Sequence[Guard] | None, Guards]):
    """The setting that holds guards."""

    _form = Guards


def checked_tools(toolkit: Any) -> Iterable[Callable[..., Any] | Tool]:
    """The tools that an agent is made with, checked: a toolkit's, or a list of functions.

    Raises:
        InvalidArguments: It is neither.
    """
    if toolkit is None:
        return ()
    if isinstance(toolkit, AgentToolkit):
        return toolkit.tools.values()  # not by iterating over the kit: its class may give that another meaning
    if kind_of(toolkit) in (list, tuple):
        functions: list[Callable[..., Any]] = [*toolkit]
        return functions
    raise InvalidArguments(f"toolkit={in_brief(toolkit)}: give AgentToolkit(function, …), or a list of functions")
