"""`BaseAgent`: a name, a prompt, a model, some tools, and the verbs that make it answer."""

from __future__ import annotations

import inspect
import os
import re
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Self, TypedDict, TypeVar, get_args
from uuid import uuid4

from anyio.lowlevel import RunVar
from typing_extensions import Unpack

from fractal._answer import AnswerSettings
from fractal._calls import call_within
from fractal._current import current_run
from fractal._grace import answered
from fractal._hooks import Hook, Warn
from fractal._loop import call_alone, drive
from fractal._observers import checked_observers
from fractal._output import OutputMemory, OutputMode, output_for
from fractal._run import Run, RunSettings
from fractal._stall import timed, watched
from fractal._step import bind
from fractal._template import warn_of_format
from fractal._texts import name_of, repr_of
from fractal._window import Compact, TokenCounter, Window, count_tokens as estimate_tokens
from fractal.context import RunContext
from fractal.delegation import Delegate, delegate_tool, run_delegate
from fractal.errors import InvalidArguments
from fractal.limits import Limits, limit_of_iterations
from fractal.messages import Transcript, user_message
from fractal.models.base import ModelSettings
from fractal.models.combined import CombinedModel
from fractal.models.openai import OpenAIModel, model_for
from fractal.streaming import DEFAULT_BUFFER, RunStream
from fractal.toolkit import AgentToolkit, Tool

if TYPE_CHECKING:
    from types import TracebackType

    from fractal.approval import Approver
    from fractal.events import Observer
    from fractal.results import AgentResult, ToolResult

__all__ = ["AgentDefinition", "BaseAgent", "RunBounds", "RunOptions", "SystemPrompt"]

DEFAULT_MODEL = "gpt-4o-mini"

Validator = TypeVar("Validator", bound=Callable[..., Any])

SystemPrompt = str | Callable[..., str | Awaitable[str]]
"""Text, or a function that makes it: plain or async, with no parameter or with the run's `RunContext`."""

_PLACEHOLDER = re.compile(r"\{(\w+)\}")


class RunBounds(TypedDict, total=False):
    """What bounds one run and what its tools find; keyword arguments of every verb that starts one.

    Attributes:
        timeout: Seconds the run may take. None or left out: the agent's own.
        limits: What this run may use; fields left at None are the agent's.
        deps: What tools find as `ctx.deps`. None or left out: what the run above has.
        approve: Who answers for tools with `requires_approval`. None or left out: the agent's, or the run's above.
        output_type: What the answer has to be. None or left out: the agent's; `str` for text after all. The agent's
            output validators are for its own type alone.
        output_mode: How the model is made to give such an answer. None or left out: the agent's.
    """

    timeout: float | None
    limits: Limits | None
    deps: Any
    approve: Approver | None
    output_type: Any
    output_mode: OutputMode | None


class RunOptions(RunBounds, total=False):
    """All options of one run, the same for every verb that starts one.

    Attributes:
        max_iterations: Turns: a reply and the tool calls it asks for. None or left out: the agent's limit, or 10.
        max_retries: Times a failed request, and an empty reply, is tried again. Left out: 3.
        messages: Conversation to continue, as an earlier `AgentResult.messages` gave it.
    """

    max_iterations: int | None
    max_retries: int
    messages: Sequence[Mapping[str, Any]] | None


_RUN_OPTIONS = frozenset(RunOptions.__annotations__)


class AgentDefinition:
    """What an agent is, apart from how it is called: `BaseAgent` awaits, `fractal.sync.BaseAgent` blocks.

    Fixed once built, so one object serves any number of runs at once, from any event loop and thread.

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
        system_context: Values for the placeholders of the system prompt.
        observers: Called with every event of every run, and of the runs below: plain functions.
        approve: Answers for tools with `requires_approval`, with `Allow(…)`, `Deny(…)`, True or False: a function,
            plain or async, of the `PendingCall`, and of the run's `RunContext` if it has a second parameter.
            None: whom the run above asks; without any, such tools are not called.
        output_type: What answers have to be: a pydantic model, a dataclass, a TypedDict, `list[…]`, a union, a number,
            anything that pydantic can validate. `result.content` is a value of it. None: text.
        output_mode: How the model is made to give such an answer: `"native"` by the request's `response_format`,
            `"tool"` by a tool that takes it, `"prompt"` by words. `"auto"`: the first of these that the endpoint takes.
        context_window: Tokens the model takes in one request, its reply included: before a request the oldest turns
            are left out so that it fits; `result.messages` keeps them. None: `CONTEXT_WINDOW`, or no limit.
        count_tokens: Counts the tokens of one chat message. None: an estimate, `fractal.count_tokens`.
        compact: Sums up what the context window leaves out: a function, plain or async, of the messages, and of the
            run's `RunContext` if it has a second parameter, that returns text, a message or None. None: nothing
            stands for them.

    Raises:
        InvalidArguments: An argument cannot be what was meant.
        InvalidTool: A decorated method cannot be a tool.
        ToolNameTaken: Two tools have one name.
    """

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
        system_context: Mapping[str, object] | None = None,
        observers: Sequence[Observer] = (),
        approve: Approver | None = None,
        output_type: Any = None,
        output_mode: OutputMode = "auto",
        context_window: int | None = None,
        count_tokens: TokenCounter | None = None,
        compact: Compact | None = None,
    ) -> None:
        if not isinstance(name, str) or not name:
            raise InvalidArguments(f"name={name!r}: give the agent a name")
        if not isinstance(system_prompt, str) and not callable(system_prompt):
            raise InvalidArguments(f"system_prompt={system_prompt!r}: give text, or a function that returns it")
        # Doubly underscored below: a subclass may well have a `_model` or `_settings` of its own.
        self.name = name
        self.model = model or os.environ.get("OPENAI_MODEL") or DEFAULT_MODEL
        self.client = client
        self.limits = _checked_limits(limits)
        self.timeout = _checked_timeout(timeout)
        self.observers = checked_observers(observers)
        self.__system_prompt = system_prompt
        self.__system_context = dict(system_context or {})
        warn_of_format(system_prompt, self.__system_context)
        self.__settings = ModelSettings(
            temperature=temperature,
            max_tokens=max_tokens,
            reasoning_effort=reasoning_effort,
            extra=dict(extra_body or {}),
        )
        self.__approve = Hook(approve, "approve") if approve is not None else None
        self.__answer = AnswerSettings(
            type=output_for(output_type), mode=_checked_mode(output_mode), validators=(), memory=OutputMemory()
        )
        self.__window = _window_of(context_window, count_tokens, compact)
        self.__model = model_for(client)
        self.__toolkit = AgentToolkit()
        # Not by iterating over the kit: its class may give that another meaning.
        for inherited in toolkit.tools.values() if isinstance(toolkit, AgentToolkit) else toolkit or ():
            self.__toolkit.add_tool(inherited)
        self.__toolkit.add_methods(self)

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
        self.__toolkit.add_tool(function, name=name, description=description, terminate=terminate, replace=replace)
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
        self.__toolkit.remove_tool(name)
        return self

    def register_delegate(
        self,
        agent: Delegate,
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
        self.__toolkit.add_tool(delegate_tool(agent, tool_name, description, parameters), replace=replace)
        return self

    def output_validator(self, function: Validator) -> Validator:
        """Have a function look at each answer before it is the result; a decorator.

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
        hook = Hook(function, "output_validator")
        self.__answer = replace(self.__answer, validators=(*self.__answer.validators, hook))
        return function

    def register_agent(self, agent: Delegate, tool_name: str | None = None, description: str | None = None) -> Self:
        """Old name of `register_delegate`; deprecated."""
        import warnings

        warnings.warn("register_agent is now register_delegate", DeprecationWarning, stacklevel=2)
        return self.register_delegate(agent, tool_name, description)

    def get_tools(self) -> dict[str, Callable[..., Any]]:
        """The functions that the model may call, by the name it uses."""
        return self.__toolkit.get_tools()

    def get_tool_schemas(self) -> list[dict[str, Any]]:
        """The tools as the model sees them: chat-completions function schemas, in the order of registration."""
        return self.__toolkit.get_tool_schemas()

    def update_system_context(self, **values: object) -> None:
        """Set values for the placeholders of the system prompt, from the next run on."""
        if values.keys() - self.__system_context.keys():
            warn_of_format(self.__system_prompt, {**self.__system_context, **values})
        # A new dictionary: a run that is just making its prompt sees all of the old values or all of the new ones.
        self.__system_context = {**self.__system_context, **values}

    def reset(self) -> None:
        """Do nothing: an agent keeps nothing between runs. For code that calls it; conversations are `messages=`."""

    async def drive(self, user_input: object, **options: Unpack[RunOptions]) -> AgentResult:
        """Answer one input in the calling task; what every verb, delegation and the blocking facade call.

        Args:
            user_input: As in `BaseAgent.run`.
            **options: As `RunOptions` describes them.
        """
        return await drive(self.begin(user_input, **options))

    def begin(self, user_input: object, **options: Unpack[RunOptions]) -> Run:
        """Make the run that `drive` takes to its end; call it inside the event loop."""
        settings, transcript = self.__checked(options)
        transcript.append(user_message(user_input))
        return Run(settings, transcript)

    def check(self, **options: Unpack[RunOptions]) -> None:
        """Raise what `begin` would raise because of the options, before there is an input."""
        self.__checked(options)

    def __checked(self, options: RunOptions) -> tuple[RunSettings, Transcript]:
        if not options.keys() <= _RUN_OPTIONS:
            unknown = sorted(options.keys() - _RUN_OPTIONS)
            raise InvalidArguments(f"a run has no options {unknown}, only {sorted(_RUN_OPTIONS)}")
        max_iterations, max_retries = options.get("max_iterations"), options.get("max_retries", 3)
        given = options.get("limits")
        limits = self.limits if given is None else _checked_limits(given).over(self.limits)
        if max_iterations is not None:
            limits = limit_of_iterations(max_iterations).over(limits)
        if not isinstance(max_retries, int) or max_retries < 0:
            raise InvalidArguments(f"max_retries={max_retries!r}: give a whole number from 0 up")
        return self.__run_settings(limits, options, max_retries), Transcript(options.get("messages") or ())

    def open_stream(self, user_input: object, buffer: int, **options: Unpack[RunOptions]) -> RunStream:
        """Make the stream of a run; what every `stream` calls."""
        return RunStream(lambda: self.begin(user_input, **options), buffer)

    async def call_tool(self, tool_name: str, arguments: Mapping[str, Any]) -> ToolResult:
        """Call one tool as the model would; what every `execute_tool` calls."""
        call = bind(f"direct_{uuid4().hex[:24]}", tool_name, arguments, self.__toolkit.tools)
        run = current_run.get()
        if run is not None and run.agent is self and run.is_here and not run.is_over:
            return await call_within(run, call)
        transcript = Transcript([user_message(f"Call {tool_name}.")])
        return await call_alone(Run(self.__run_settings(self.limits, {}, 0), transcript), call)

    async def ask_agent(self, other: Delegate, query: object) -> AgentResult:
        """Ask another agent; what every `call_agent` calls."""
        return await run_delegate(other, query, current_run.get())

    async def release(self) -> None:
        """Close what the agent opened in the running event loop, once nobody's requests need it any more."""
        if isinstance(self.__model, (OpenAIModel, CombinedModel)):
            await self.__model.aclose()

    def __run_settings(self, limits: Limits, options: RunOptions, max_retries: int) -> RunSettings:
        timeout, approve = options.get("timeout"), options.get("approve")
        return RunSettings(
            agent=self,
            agent_name=self.name,
            model=self.__model,
            model_name=self.model,
            model_settings=self.__settings,
            toolkit=self.__toolkit,
            system_prompt=self.__make_prompt,
            limits=limits,
            timeout=_checked_timeout(timeout) if timeout is not None else self.timeout,
            max_retries=max_retries,
            observers=self.observers,
            deps=options.get("deps"),
            approve=Hook(approve, "approve") if approve is not None else self.__approve,
            answer=self.__answer_settings(options.get("output_type"), options.get("output_mode")),
            window=self.__window,
        )

    def __answer_settings(self, kind: Any, mode: OutputMode | None) -> AnswerSettings | None:
        settings = self.__answer
        if kind is not None:
            settings = replace(settings, type=output_for(kind), validators=())
        if mode is not None:
            settings = replace(settings, mode=_checked_mode(mode))
        return settings if settings.type is not None or settings.validators else None

    async def __make_prompt(self, context: RunContext[Any], warn: Warn) -> str:
        source = self.__system_prompt
        if isinstance(source, str):
            if "{" not in source:
                return source
            values = self.__system_context
            return _PLACEHOLDER.sub(lambda match: str(values.get(match[1], match[0])), source)
        name = name_of(source)
        with watched(name, warn):
            prompt = source(context) if _takes_context(source) else source()
        prompt = await answered(timed(prompt, name, warn), name) if inspect.isawaitable(prompt) else prompt
        if not isinstance(prompt, str):
            raise InvalidArguments(f"the system_prompt function of {self.name!r} returned {repr_of(prompt)}, not text")
        return prompt

    def __repr__(self) -> str:
        return f"<{type(self).__name__} {self.name!r} model={self.model!r} tools={len(self.__toolkit)}>"

    def _repr_html_(self) -> str:
        from fractal._html import of_agent

        return of_agent(self)

    def __str__(self) -> str:
        lines = [
            f"{self.name} ({type(self).__name__})",
            f"  model: {self.model}",
            f"  tools: {len(self.__toolkit) or 'none'}",
        ]
        for tool in self.__toolkit:
            lines.append(f"    {_signature_line(tool)}")
            summary = tool.description.strip().partition("\n")[0]
            if summary:
                lines.append(f"        {summary}")
        return "\n".join(lines)


class BaseAgent(AgentDefinition):
    """An agent for code that awaits, on asyncio and on trio.

    Use it directly and add tools, or subclass it and decorate methods. All arguments are those of
    `AgentDefinition`; nothing is opened, and no key is looked for, before the first run.

    Example:
        >>> from fractal import BaseAgent, tool
        >>> class Weather(BaseAgent):
        ...     def __init__(self, **options):
        ...         super().__init__(name="Weather", system_prompt="You know the weather.", **options)
        ...
        ...     @tool
        ...     async def forecast(self, city: str) -> str:
        ...         '''Tell tomorrow's weather.'''
        ...         return f"sunny in {city}"
        >>> list(Weather().get_tools())
        ['forecast']
    """

    async def run(
        self,
        user_input: object,
        max_iterations: int | None = None,
        max_retries: int = 3,
        messages: Sequence[Mapping[str, Any]] | None = None,
        **options: Unpack[RunBounds],
    ) -> AgentResult:
        """Answer one input.

        The agent keeps nothing of it: go on with `messages=result.messages`. When the call returns, raises or is
        cancelled, nothing it started is running, but for the threads listed in the result's `abandoned`.

        Args:
            user_input: Text, a dict, a list or a pydantic model (sent as JSON), or a list of chat content parts.
            max_iterations: Turns: a reply and the tool calls it asks for. None: the agent's limit, or 10.
            max_retries: Times a failed request, and an empty reply, is tried again.
            messages: Conversation to continue.
            **options: `timeout`, `limits`, `deps`, `approve`, `output_type` and `output_mode`: see `RunBounds`.

        Returns:
            How it ended. A failure of the model, a spent budget or the end of `timeout` is a result with
            `success=False`; `raise_for_error()` raises it.

        Raises:
            InvalidArguments: An argument cannot be what was meant.
            InvalidMessages: `messages` is no history that an endpoint accepts.

        Example:
            ```python
            result = await agent.run("What is the weather in Rome?", timeout=30)
            print(result.content)
            ```
        """
        return await self.drive(
            user_input, max_iterations=max_iterations, max_retries=max_retries, messages=messages, **options
        )

    async def __call__(
        self,
        user_input: object,
        max_iterations: int | None = None,
        max_retries: int = 3,
        messages: Sequence[Mapping[str, Any]] | None = None,
        **options: Unpack[RunBounds],
    ) -> AgentResult:
        """Answer one input; the same as `run`."""
        return await self.run(user_input, max_iterations, max_retries, messages, **options)

    def run_sync(
        self,
        user_input: object,
        max_iterations: int | None = None,
        max_retries: int = 3,
        messages: Sequence[Mapping[str, Any]] | None = None,
        **options: Unpack[RunBounds],
    ) -> AgentResult:
        """Answer one input, blocking: `fractal.sync.run` for whoever has only the agent. Arguments as in `run`."""
        from fractal import sync

        return sync.run(
            self,
            user_input,
            max_iterations=max_iterations,
            max_retries=max_retries,
            messages=messages,
            **options,
        )

    def stream(
        self,
        user_input: object,
        max_iterations: int | None = None,
        max_retries: int = 3,
        messages: Sequence[Mapping[str, Any]] | None = None,
        *,
        buffer: int = DEFAULT_BUFFER,
        **options: Unpack[RunBounds],
    ) -> RunStream:
        """Answer one input, and watch it happen: the run of `run`, as its events.

        Args:
            user_input: As in `run`.
            max_iterations: As in `run`.
            max_retries: As in `run`; a request is not sent again once a piece of its reply has been handed out.
            messages: As in `run`.
            buffer: Events that may wait for the reader while the run goes on. 0: it waits for each to be read.
            **options: As in `run`.

        Returns:
            The run, to be entered: `async with agent.stream(…) as stream`. Leaving the block ends the run.

        Example:
            ```python
            async with agent.stream("What is the weather in Rome?") as stream:
                async for text in stream.text():
                    print(text, end="", flush=True)
            result = await stream.result()
            ```
        """
        return self.open_stream(
            user_input, buffer, max_iterations=max_iterations, max_retries=max_retries, messages=messages, **options
        )

    async def execute_tool(self, tool_name: str, /, **arguments: Any) -> ToolResult:
        """Call one registered tool, as the model would.

        Args:
            tool_name: Name as the model sees it.
            **arguments: The tool's own parameters; checked first.

        Returns:
            How it ended. An unknown tool, arguments that do not fit and what the tool raises are in `error`.

        Example:
            ```python
            result = await agent.execute_tool("forecast", city="Rome")
            ```
        """
        return await self.call_tool(tool_name, arguments)

    async def call_agent(self, other: Delegate, query: object) -> AgentResult:
        """Ask another agent; inside a tool it is a child of the run, with its deadline, budget and trace.

        Args:
            other: The other agent.
            query: What `run` takes as `user_input`.

        Returns:
            How the other agent's run ended.
        """
        return await self.ask_agent(other, query)

    async def aclose(self) -> None:
        """Close what the agent opened in the running event loop; a later run opens it again.

        Connections are shared by the agents of a loop: they stay while another agent that used them is there, and while
        somebody's request is on its way or waits for one. Of several blocks `async with agent:`, the last that is left
        closes them.
        """
        await self.release()

    async def __aenter__(self) -> Self:
        blocks = _blocks_here()
        blocks[id(self)] = blocks.get(id(self), 0) + 1
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        blocks = _blocks_here()
        blocks[id(self)] -= 1
        if not blocks[id(self)]:
            del blocks[id(self)]
            await self.aclose()


_blocks: RunVar[dict[int, int]] = RunVar("fractal_blocks")


def _blocks_here() -> dict[int, int]:
    """How many blocks `async with agent:` are open in this event loop, by the id of the agent."""
    try:
        return _blocks.get()
    except LookupError:
        _blocks.set({})
        return _blocks.get()


def _takes_context(function: Callable[..., Any]) -> bool:
    """Whether a prompt function has a parameter for the context: its first, if nothing else gives it a value."""
    first = next(iter(inspect.signature(function).parameters.values()), None)
    return (
        first is not None and first.kind not in (first.KEYWORD_ONLY, first.VAR_KEYWORD) and first.default is first.empty
    )


def _checked_mode(mode: OutputMode) -> OutputMode:
    modes = get_args(OutputMode)
    if mode not in modes:
        raise InvalidArguments(f"output_mode={mode!r}: give one of {', '.join(map(repr, modes))}")
    return mode


def _window_of(limit: int | None, count: TokenCounter | None, compact: Compact | None) -> Window | None:
    if limit is None:
        named = os.environ.get("CONTEXT_WINDOW")
        if not named:
            # What cannot be called is told on a machine without a window too.
            Window(limit=1, count=count or estimate_tokens, compact=compact)
            return None
        if not named.strip().isdecimal():
            raise InvalidArguments(f"CONTEXT_WINDOW is {named!r}: give a whole number of tokens, or unset it")
        limit = int(named)
    return Window(limit=limit, count=count or estimate_tokens, compact=compact)


def _checked_limits(limits: Limits | None) -> Limits:
    if limits is None:
        return Limits()
    if not isinstance(limits, Limits):
        raise InvalidArguments(f"limits={limits!r}: give Limits(…), or None")
    return limits


def _checked_timeout(timeout: float | None) -> float | None:
    if timeout is not None and (isinstance(timeout, bool) or not isinstance(timeout, (int, float)) or not timeout >= 0):
        raise InvalidArguments(f"timeout={timeout!r}: give seconds from 0 up, or None for no limit")
    return timeout


def _signature_line(tool: Tool) -> str:
    schema = tool.parameters.json_schema
    required = schema.get("required", ())
    parameters: list[str] = []
    for name, facts in schema["properties"].items():
        kind = facts.get("type", "any")
        parameters.append(f"{name}: {kind}" + ("" if name in required else " = …"))
    notes = {" → needs approval": tool.options.requires_approval, " → ends the run": tool.options.terminate}
    return f"{tool.name}({', '.join(parameters)})" + "".join(note for note, is_so in notes.items() if is_so)
