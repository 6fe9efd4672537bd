"""What an agent holds: its settings, and the tools it offers.

One object behind one attribute, so that a subclass may give its own attributes and methods any name.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from threading import Lock
from typing import TYPE_CHECKING, Any, Protocol

from fractal._agent.settings import checked
from fractal._agent.template import warn_of_format
from fractal._answers.answer import AnswerSettings
from fractal._answers.output import output_for
from fractal._engine.around import hooks_of
from fractal._engine.hooks import Hook
from fractal._engine.pricing import Prices
from fractal._engine.window import Window, count_tokens
from fractal._texts import repr_of
from fractal.errors import InvalidArguments
from fractal.model import ModelSettings
from fractal.prompt import Prompt
from fractal.toolkit import AgentToolkit

if TYPE_CHECKING:
    from fractal.around import Around, Guard
    from fractal.tracing import TracingKit

__all__ = ["CORE", "AgentCore", "AnyAgent", "Awaited", "core_of"]

CORE = "_AgentDefinition__core"
"""The attribute of an agent that holds its core."""


class AnyAgent(Protocol):
    """An agent, as far as the modules that its class is made of need it."""

    name: Any  # a setting: text where it is read

    def register_delegate(self, agent: Any, /, *arguments: Any, **options: Any) -> Any:
        """Offer another agent as a tool."""
        ...


class Awaited:
    """Agents whose verbs are awaited; those of others block."""

    __slots__ = ()


class AgentCore:
    """The settings of an agent, which may change between runs, and its tools.

    Args:
        given: The settings, by the names that `BaseAgent` gives them.
        toolkit: The tools.
        blocks: Whether the agent's verbs block.

    Raises:
        InvalidArguments: A setting cannot be what was meant.

    Attributes:
        entered: Blocks `with agent:` of a blocking agent that have not been left.
    """

    __slots__ = ("_kit", "_lock", "_made", "_values", "blocks", "entered", "toolkit")

    def __init__(self, given: Mapping[str, object], toolkit: AgentToolkit, *, blocks: bool) -> None:
        self.toolkit, self.blocks = toolkit, blocks
        self._lock = Lock()
        self._kit: tuple[object, TracingKit] | None = None  # with what it was made for
        self._values: dict[str, Any] = {"validators": ()}
        self._made: tuple[object, dict[str, Any]] = None, {}  # facts for runs, with the values that they were made of
        for name, value in given.items():
            self._values |= checked(name, value)
        self.entered: list[Any] = []
        self._warn_of_prompt()

    def copied(self, rebound: Callable[[Any], Any]) -> AgentCore:
        """A copy of the settings and tools, for another agent.

        Args:
            rebound: Makes of a function that is bound to this agent one that is bound to the other.
        """
        made = AgentCore({}, AgentToolkit(), blocks=self.blocks)
        made._values = {name: rebound(value) for name, value in self._values.items()}
        made._values["system_context"] = dict(self._values["system_context"])
        for tool in self.toolkit.tools.values():
            function = rebound(tool.function)
            made.toolkit.add_tool(tool if function is tool.function else replace(tool, function=function))
        return made

    def read(self, name: str) -> Any:
        """The value of a setting, as a user may see it."""
        if name == "system_prompt":
            return self._prompt().shown()
        return self._values[name]

    def assign(self, name: str, value: object) -> None:
        """Check a value and set it, for runs that begin from now on.

        Raises:
            InvalidArguments: It cannot be what was meant.
        """
        self._change(lambda _: checked(name, value))
        if name in ("system_prompt", "system_context"):
            self._warn_of_prompt()

    def add_validator(self, validator: Hook) -> None:
        """Add a validator of answers, for runs that begin from now on."""
        self._change(lambda values: {"validators": (*values["validators"], validator)})

    def add_hook(self, name: str, hook: Around | Guard) -> None:
        """Add a hook around tool calls or requests, or a guard, for runs that begin from now on.

        Args:
            name: The setting that holds it.
            hook: The hook, or the guard.
        """
        self._change(lambda values: checked(name, (*values[name], hook)))

    def add_context(self, values: Mapping[str, object]) -> None:
        """Set values for placeholders of the system prompt, for runs that begin from now on."""
        held = self._values["system_context"]
        is_new = bool(values.keys() - held.keys())
        held.update(values)  # in place: whoever has read `system_context` holds this very dictionary
        if is_new:
            self._warn_of_prompt()

    def facts(self) -> dict[str, Any]:
        """The fields of `RunSettings` that come from the agent, made anew after each change."""
        values, (made_of, facts) = self._values, self._made
        if made_of is not values:
            facts = self._made_of(values)
            self._made = values, facts
        return facts

    def tracing(self) -> TracingKit | None:
        """The object that keeps the agent's traces; None if runs are not traced."""
        return self._tracing_of(self._values)

    def _tracing_of(self, values: Mapping[str, Any]) -> TracingKit | None:
        is_on, file = values["enable_tracing"], values["tracing_output_file"]
        if not (file is not None if is_on is None else is_on):
            return None
        key = _key_of(values["client"])
        with self._lock:
            if self._kit is None or self._kit[0] != (file, key):
                from fractal.tracing import TracingKit  # nothing of it is loaded by agents without

                self._kit = (file, key), TracingKit(file, secrets=(key,) if key else ())
            return self._kit[1]

    def _change(self, change: Callable[[dict[str, Any]], dict[str, Any]]) -> None:
        with self._lock:
            # A new dictionary: a run that begins meanwhile takes all of the old settings or all of the new ones.
            self._values = {**self._values, **change(self._values)}

    def _warn_of_prompt(self) -> None:
        warn_of_format(self._values.get("system_prompt"), self._values.get("system_context", ()))

    def _prompt(self) -> Prompt:
        return _prompt_of(self._values)

    def _made_of(self, values: Mapping[str, Any]) -> dict[str, Any]:
        approve, limit = values["approve"], values["context_window"]
        count, compact = values["count_tokens"] or count_tokens, values["compact"]
        kit = self._tracing_of(values)
        return {
            "agent_name": values["name"],
            "deps": None,
            "model": values["answers"],
            "model_name": values["model"],
            "model_settings": ModelSettings(
                temperature=values["temperature"],
                max_tokens=values["max_tokens"],
                reasoning_effort=values["reasoning_effort"],
                extra=values["extra_body"],
            ),
            "toolkit": self.toolkit,
            "system_prompt": _prompt_of(values),
            "limits": values["limits"],
            "timeout": values["timeout"],
            "max_retries": values["max_retries"],
            "observers": values["observers"] if kit is None else (*values["observers"], kit),
            "approve": Hook(approve, "approve") if approve is not None else None,
            "answer": AnswerSettings(
                type=output_for(values["output_type"]),
                mode=values["output_mode"],
                validators=values["validators"],
                memory=values["memory"],
            ),
            "hooks": hooks_of(values),
            "execute_tool": None,
            "prices": Prices(values["prices"]) if values["prices"] is not None else None,
            "budgets": (values["budget"],) if values["budget"] is not None else (),
            "window": Window(limit=limit, count=count, compact=compact) if limit is not None else None,
        }


def _key_of(client: object) -> str | None:
    """The key of a client, if the client shows one."""
    try:
        key = getattr(client, "api_key", None)
    except Exception:  # of a user's class, whose attributes raise
        return None
    return key if isinstance(key, str) else None


def _prompt_of(values: Mapping[str, Any]) -> Prompt:
    return Prompt(values["system_prompt"], values["system_context"], values["name"])


def core_of(agent: object) -> AgentCore:
    """The core of an agent.

    Raises:
        InvalidArguments: It is no agent, or has not been made whole.
    """
    core = getattr(agent, CORE, None)
    if isinstance(core, AgentCore):
        return core
    if hasattr(type(agent), CORE):
        name = type(agent).__name__
        raise InvalidArguments(f"{name}.__init__ has not called super().__init__(name=…, system_prompt=…) yet")
    hint = ": give an agent of that class, not the class" if hasattr(agent, CORE) else ""
    raise InvalidArguments(f"{repr_of(agent)} is no agent{hint}")
