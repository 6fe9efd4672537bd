"""`AgentDefinition`: what an agent is, apart from how it is called."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from types import FunctionType
from typing import TYPE_CHECKING, Any, Generic, Never, Self, SupportsIndex, TypeVar, overload

from typing_extensions import TypeForm, Unpack

from fractal._agent.card import card
from fractal._agent.clones import clone, deep_clone, no_pickle
from fractal._agent.constructor import answers_of, check_settings, constructor, known_setting, take_settings
from fractal._agent.core import AgentCore, Awaited, core_of
from fractal._agent.settings import SETTINGS, Setting
from fractal._agent.tools import AroundSetting, GuardSetting, ToolkitSetting, checked_tools
from fractal._answers.ways import OutputMode
from fractal._engine.hooks import Hook
from fractal._engine.overrides import check_overrides, verb
from fractal._engine.window import Compact, TokenCounter
from fractal.delegation import delegate_tool
from fractal.limits import Limits, SharedBudget
from fractal.options import PlainAgentOptions
from fractal.prompt import SystemPrompt
from fractal.results import Content_co
from fractal.toolkit import AgentToolkit

if TYPE_CHECKING:
    from pathlib import Path

    from fractal.approval import Approver
    from fractal.around import Around, AroundHook, Guard
    from fractal.events import Observer
    from fractal.prices import Price
    from fractal.tracing import TracingKit

__all__ = ["AgentDefinition"]

Validator = TypeVar("Validator", bound=Callable[..., Any])


class AgentDefinition(Generic[Content_co]):
    """An agent, apart from how it is called: `BaseAgent` awaits, `fractal.sync.BaseAgent` blocks.

    One object serves any number of runs at once, from any event loop and thread: no run changes it. Its settings are
    attributes of the same names. One that is assigned is checked as here, and holds for the runs that begin from then
    on. A subclass may also say it in its body, for agents whose constructor is not given it.

    Args:
        name: What the agent is called in results, events and delegation.
        system_prompt: Text; text with `{placeholders}` that `system_context` fills, other braces left alone; or a
            function, plain or async, called at each run, with the run's `RunContext` if it takes a parameter.
        model: Name of the model at the endpoint. None: `OPENAI_MODEL`, or `gpt-4o-mini`.
        client: Who answers: `AsyncOpenAI`, `OpenAI`, their Azure kinds, an object with `chat.completions.create`, or
            a `Model`. None: the endpoint of `OPENAI_BASE_URL` with `OPENAI_API_KEY`, looked up when a run needs them.
        toolkit: Tools to start with; the agent copies the list. Decorated methods of the agent come on top.
        temperature: Sampling temperature. None: the endpoint's default.
        max_tokens: Tokens a reply may have. None: the endpoint's default.
        reasoning_effort: How long a reasoning model thinks, such as `"low"`. None: the endpoint's default.
        extra_body: Further fields of each request, such as `{"top_p": 0.5}`.
        limits: What each run may use. None: the defaults of `Limits`.
        timeout: Seconds each run may take. None: no limit.
        max_retries: Times a failed request, and an empty reply, is tried again. None: 3.
        system_context: Values for the placeholders of the system prompt.
        observers: Called with every event of every run, and of the runs below: plain functions.
        enable_tracing: Whether `tracing` keeps what the agent's runs do, and all below them. None: if there is a file
            for it.
        tracing_output_file: File that it is written to as it happens, as lines of JSON; `{run_id}` and `{timestamp}` in
            its name make a file for each run. With `enable_tracing=False` nothing is written.
        approve: Answers for tools with `requires_approval`, with `Allow(…)`, `Deny(…)`, True or False: a function,
            plain or async, of the `PendingCall`, and of the run's `RunContext` if it has a second parameter.
            None: whom the run above asks; without any, such tools are not called.
        around_tool: Hooks around each tool call, the outermost first: functions `(ctx, call, next)`. The attribute is a
            decorator too: `@agent.around_tool`.
        around_model: Hooks around each request to the model, the outermost first: functions `(ctx, request, next)`. The
            attribute is a decorator too: `@agent.around_model`.
        guard: Who may stop each run by raising, while its model is asked first: a function of the `RunContext`, or a
            list. No tool starts, and no answer is given, before all have ended. The attribute is a decorator too:
            `@agent.guard`.
        output_type: What answers have to be: a pydantic model, a dataclass, a TypedDict, `list[…]`, a union, a number,
            anything that pydantic can validate. `result.content` is a value of it. None: text.
        output_mode: How the model is made to give such an answer: `"native"` by the request's `response_format`,
            `"tool"` by a tool that takes it, `"prompt"` by words. `"auto"`: the first of these that the endpoint takes.
        context_window: Tokens the model takes in one request, its reply included: before a request the oldest turns
            are left out so that it fits; `result.messages` keeps them. None: `CONTEXT_WINDOW`, or no limit.
        count_tokens: Counts the tokens of one chat message. None: an estimate, `fractal.count_tokens`.
        prices: What models cost, for `usage.cost` and `Limits(max_cost=…)`: `{"gpt-4o": Price(…)}`. None: the prices of
            the run above; without one, those that the library of the extra `cost` knows, in dollars.
        budget: A budget that all runs of this agent share with others that have it.
        compact: Sums up what the context window leaves out: a function, plain or async, of the messages, and of the
            run's `RunContext` if it has a second parameter, that returns text, a message or None. None: nothing
            stands for them.

    Raises:
        InvalidArguments: An argument cannot be what was meant.
        InvalidTool: A decorated method cannot be a tool.
        ToolNameTaken: Two tools have one name.
    """

    name = Setting[str, str](core_of, "What the agent is called in results, events and delegation.")
    system_prompt = Setting[SystemPrompt, SystemPrompt](
        core_of,
        "Text that runs send first, its placeholders filled. Of a plain function without parameters, what it returns"
        " now; any other function as it is.",
    )
    model = Setting[str | None, str](core_of, "Name of the model at the endpoint.")
    client = Setting[Any, Any](core_of, "Who answers, as it was given.")
    toolkit = ToolkitSetting(core_of, "The tools; what is added to it is added to the agent.")
    temperature = Setting[float | None, float | None](core_of, "Sampling temperature.")
    max_tokens = Setting[int | None, int | None](core_of, "Tokens a reply may have.")
    reasoning_effort = Setting[str | None, str | None](core_of, "How long a reasoning model thinks.")
    extra_body = Setting[Mapping[str, Any] | None, Mapping[str, Any]](core_of, "Further fields of each request.")
    limits = Setting[Limits | None, Limits](core_of, "What each run may use.")
    timeout = Setting[float | None, float | None](core_of, "Seconds each run may take.")
    max_retries = Setting[int | None, int](core_of, "Times a failed request, and an empty reply, is tried again.")
    system_context = Setting[Mapping[str, object] | None, dict[str, object]](
        core_of, "Values for the placeholders of the system prompt."
    )
    observers = Setting["Sequence[Observer]", "tuple[Observer, ...]"](core_of, "Called with every event of every run.")
    enable_tracing = Setting[bool | None, bool | None](core_of, "Whether runs are traced; None: if there is a file.")
    tracing_output_file = Setting["str | Path | None", "str | None"](core_of, "File that traces are written to.")
    approve = Setting["Approver | None", "Approver | None"](core_of, "Answers for tools with `requires_approval`.")
    around_tool = AroundSetting(core_of, "Hooks around each tool call, the outermost first; a decorator that adds one.")
    around_model = AroundSetting(
        core_of, "Hooks around each request to the model, the outermost first; a decorator that adds one."
    )
    guard = GuardSetting(core_of, "Who may stop each run; a decorator that adds one.")
    output_type = Setting[Any, Any](core_of, "What answers have to be.")
    output_mode = Setting[OutputMode, OutputMode](core_of, "How the model is made to give such an answer.")
    context_window = Setting[int | None, int | None](core_of, "Tokens the model takes in one request, with its reply.")
    count_tokens = Setting[TokenCounter | None, TokenCounter | None](core_of, "Counts the tokens of one message.")
    compact = Setting[Compact | None, Compact | None](core_of, "Sums up what the context window leaves out.")

    __core: AgentCore | None = None  # until `__init__` has made it

    def __init_subclass__(cls, **options: Any) -> None:
        super().__init_subclass__(**options)
        take_settings(cls)
        check_overrides(cls)

    @overload
    def __init__(
        self: AgentDefinition[Any],
        name: str,
        system_prompt: SystemPrompt,
        model: str | None = None,
        client: Any = None,
        *,
        output_type: None = None,
        **settings: Unpack[PlainAgentOptions],
    ) -> None: ...

    @overload
    def __init__(
        self,
        name: str,
        system_prompt: SystemPrompt,
        model: str | None = None,
        client: Any = None,
        *,
        output_type: TypeForm[Content_co],
        **settings: Unpack[PlainAgentOptions],
    ) -> None: ...

    @constructor
    def __init__(
        self,
        name: str,
        system_prompt: SystemPrompt,
        model: str | None = None,
        client: Any = None,
        *,
        toolkit: AgentToolkit | None = None,
        temperature: float | None = None,
        max_tokens: int | None = None,
        reasoning_effort: str | None = None,
        extra_body: Mapping[str, Any] | None = None,
        limits: Limits | None = None,
        timeout: float | None = None,
        max_retries: int | None = None,
        system_context: Mapping[str, object] | None = None,
        observers: Sequence[Observer] = (),
        enable_tracing: bool | None = None,
        tracing_output_file: str | Path | None = None,
        approve: Approver | None = None,
        around_tool: AroundHook | Sequence[AroundHook | Around] | None = None,
        around_model: AroundHook | Sequence[AroundHook | Around] | None = None,
        guard: Guard | Sequence[Guard] | None = None,
        output_type: Any = None,
        output_mode: OutputMode = "auto",
        context_window: int | None = None,
        count_tokens: TokenCounter | None = None,
        compact: Compact | None = None,
        prices: Mapping[str, Price] | None = None,
        budget: SharedBudget | None = None,
    ) -> None:
        given = {
            "name": name,
            "system_prompt": system_prompt,
            "model": model,
            "client": client,
            "temperature": temperature,
            "max_tokens": max_tokens,
            "reasoning_effort": reasoning_effort,
            "extra_body": extra_body,
            "limits": limits,
            "timeout": timeout,
            "max_retries": max_retries,
            "system_context": system_context,
            "observers": observers,
            "enable_tracing": enable_tracing,
            "tracing_output_file": tracing_output_file,
            "approve": approve,
            "around_tool": around_tool,
            "around_model": around_model,
            "guard": guard,
            "output_type": output_type,
            "output_mode": output_mode,
            "context_window": context_window,
            "count_tokens": count_tokens,
            "compact": compact,
            "prices": prices,
            "budget": budget,
        }
        tools = AgentToolkit()
        for inherited in checked_tools(toolkit):
            tools.add_tool(inherited)
        self.__core = AgentCore(given, tools, blocks=not isinstance(self, Awaited))
        tools.add_methods(self)

    @property
    def tracing(self) -> TracingKit | None:
        """The traces of the agent's runs; None if they are not traced."""
        return core_of(self).tracing()

    if not TYPE_CHECKING:  # type checkers would let through any name

        def __setattr__(self, name: str, value: Any) -> None:
            if name in SETTINGS:
                check_settings(type(self))
            super().__setattr__(name, value)

    def __set_form(self, form: object) -> None:
        if self.output_type is None and (answers := answers_of(form)) is not None:
            self.output_type = answers

    __orig_class__ = property(None, __set_form)
    """Is set by `typing`: `BaseAgent[Order](…)` says the output type."""

    def add_tool(
        self,
        function: Callable[..., Any],
        *,
        name: str | None = None,
        description: str | None = None,
        terminate: bool = False,
        replace: bool = False,
    ) -> Self:
        """Offer a function to the model; runs that have begun do not see it.

        To add the same function once more, with the same options, changes nothing: a notebook's cell can run twice.

        Args:
            function: Function, bound method, partial or callable object; options given to `tool` hold.
            name: Name the model sees. None: the function's own.
            description: What the model is told it does. None: the docstring.
            terminate: End a run with this tool's result as its content.
            replace: Take the place of a tool of that name.

        Returns:
            The agent, so that calls can be chained; as a decorator, it binds the function's name to the agent.

        Raises:
            InvalidTool: It cannot be a tool.
            ToolNameTaken: There is another of that name, and `replace` is False.
        """
        core_of(self).toolkit.add_tool(
            function, name=name, description=description, terminate=terminate, replace=replace
        )
        return self

    def remove_tool(self, name: str) -> Self:
        """Offer a tool no longer; runs that have begun keep it.

        Args:
            name: Name the model sees.

        Returns:
            The agent.

        Raises:
            InvalidArguments: There is no tool of that name.
        """
        core_of(self).toolkit.remove_tool(name)
        return self

    def register_delegate(
        self,
        agent: AgentDefinition[Any],
        tool_name: str | None = None,
        description: str | None = None,
        parameters: Mapping[str, Mapping[str, Any]] | None = None,
        *,
        replace: bool = False,
    ) -> Self:
        """Offer another agent as a tool: a run of it inside the caller's run, with its budget and deadline.

        Args:
            agent: The other agent.
            tool_name: Name the model sees. None: `delegate_to_` and the agent's name.
            description: What the model is told it is for. None: a sentence with the agent's name.
            parameters: Structured input, as `{"sql": {"type": "str", "description": "…", "required": False}}`; the
                delegate is asked with the dict. None: one text, `query`.
            replace: Take the place of a tool of that name.

        Returns:
            The agent.

        Raises:
            TypeError: `parameters` is not of that form; says where.
            ToolNameTaken: There is another tool of that name, and `replace` is False.
        """
        core_of(self).toolkit.add_tool(delegate_tool(agent, tool_name, description, parameters), replace=replace)
        return self

    def output_validator(self, function: Validator) -> Validator:
        """Add a function that checks each answer before it is the result; a decorator.

        It is called with the answer, a value of the agent's `output_type`, and with the run's `RunContext` if it has a
        second parameter. What it returns takes the answer's place; None keeps it. It may be plain or async, and there
        may be several, called in the order of their registration.

        Args:
            function: Raises `AnswerRejected(reason)` to have the model told why and asked again, `max_retries` times.

        Returns:
            The function.

        Raises:
            InvalidArguments: It cannot be called so.

        Example:
            >>> from fractal import AnswerRejected, BaseAgent
            >>> agent = BaseAgent("Cook", "You write recipes.", output_type=list[str])
            >>> @agent.output_validator
            ... def short(steps: list[str]) -> None:
            ...     if len(steps) > 5:
            ...         raise AnswerRejected("use at most five steps")
        """
        core_of(self).add_validator(Hook(function, "output_validator"))
        return function

    def register_agent(
        self,
        agent: AgentDefinition[Any],
        tool_name: str | None = None,
        description: str | None = None,
        parameters: Mapping[str, Mapping[str, Any]] | None = None,
    ) -> Self:
        """Old name of `register_delegate`; deprecated."""
        import warnings

        warnings.warn("register_agent is now register_delegate", DeprecationWarning, stacklevel=2)
        return self.register_delegate(agent, tool_name, description, parameters)

    @verb
    def get_tools(self) -> dict[str, Callable[..., Any]]:
        """The functions that the model may call, by the name it uses."""
        return core_of(self).toolkit.get_tools()

    @verb
    def get_tool_schemas(self) -> list[dict[str, Any]]:
        """The tools as the model sees them: chat-completions function schemas, in the order of registration."""
        return core_of(self).toolkit.get_tool_schemas()

    def update_system_context(self, **values: object) -> None:
        """Set values for the placeholders of the system prompt, from the next run on."""
        core_of(self).add_context(values)

    def replace(self, **changes: Any) -> Self:
        """Make a new agent like this one, with other settings.

        It is of the same class, and has the same tools: methods of this agent are bound to the new one. Further
        attributes are shared, and `__init__` is not called. `copy.copy` does the same, `copy.deepcopy` copies further
        attributes too.

        Args:
            **changes: Settings, by the names that the constructor gives them.

        Returns:
            The new agent.

        Raises:
            InvalidArguments: There is no such setting, or it cannot be what was meant.

        Example:
            >>> from fractal import BaseAgent
            >>> careful = BaseAgent("Guide", "You answer questions.").replace(temperature=0)
            >>> (careful.name, careful.temperature)
            ('Guide', 0)
        """
        made = clone(self)
        for name, value in changes.items():
            setattr(made, known_setting(name, type(self)), value)
        return made

    def __replace__(self, **changes: Any) -> Self:
        return self.replace(**changes)

    def __copy__(self) -> Self:
        return clone(self)

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        return deep_clone(self, memo)

    def __reduce_ex__(self, protocol: SupportsIndex) -> Never:
        raise no_pickle(self)

    def reset(self) -> None:
        """Do nothing: an agent keeps nothing between runs. For code that calls it; conversations are `messages=`."""

    def __repr__(self) -> str:
        if self.__core is None:
            return f"<{type(self).__name__}, not made yet>"
        return f"<{type(self).__name__} {self.name!r} model={self.model!r} tools={len(core_of(self).toolkit)}>"

    def _repr_html_(self) -> str:
        from fractal._html import of_agent

        return of_agent(self)

    def __str__(self) -> str:
        if self.__core is None:
            return repr(self)
        return card(self.name, type(self).__name__, self.model, core_of(self).toolkit)


for _name, _method in vars(AgentDefinition).items():
    if isinstance(_method, FunctionType):  # Python names it so where it is called with arguments that do not fit
        _method.__qualname__ = f"BaseAgent.{_name}"
