"""The blocking verbs: the same runs as `BaseAgent`'s, for code that never awaits."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Callable, Mapping, Sequence
from contextlib import asynccontextmanager
from threading import get_ident
from typing import TYPE_CHECKING, Any, Self, TypeVar, overload

from typing_extensions import TypeForm, Unpack

from fractal._agent import verbs
from fractal._agent.core import core_of
from fractal._concurrency.current import current_run
from fractal._engine.overrides import override_of, returned_as, verb
from fractal.definition import AgentDefinition
from fractal.delegation import run_delegate
from fractal.options import PlainBounds, PlainOptions, ResumeOptions, RunBounds, RunOptions
from fractal.results import AgentResult, Content, Content_co, ToolResult
from fractal.streaming import DEFAULT_BUFFER
from fractal.sync._entered import Entered, enter
from fractal.sync._portal import call_blocking
from fractal.sync.streaming import RunStream

if TYPE_CHECKING:
    from types import TracebackType

    from fractal.approval import Allow, Deny
    from fractal.journal import Journal

__all__ = ["BaseAgent", "execute_tool", "resume", "run"]

Agent = TypeVar("Agent", bound="BaseAgent[Any]")

_Entry = tuple[int, Entered[Any]]
"""The thread that has entered an agent, and the block."""


@overload
def run(
    agent: AgentDefinition[Content],
    user_input: object,
    *,
    output_type: None = None,
    **options: Unpack[PlainOptions],
) -> AgentResult[Content]: ...


@overload
def run(
    agent: AgentDefinition[Any],
    user_input: object,
    *,
    output_type: TypeForm[Content],
    **options: Unpack[PlainOptions],
) -> AgentResult[Content]: ...


def run(
    agent: AgentDefinition[Any],
    user_input: object,
    **options: Unpack[RunOptions],
) -> AgentResult[Any]:
    """Answer one input, blocking.

    Works from any thread, any number at once: they share one event loop and its connections. In a plain `def` tool it
    joins the run that called the tool: same deadline, same budget. Ctrl-C cancels the run, waits for its cleanup and
    is then raised.

    Args:
        agent: The agent.
        user_input: As in `BaseAgent.run`.
        **options: As `RunOptions` describes them.

    Returns:
        How the run ended.

    Raises:
        SyncInAsyncError: The caller is on the very event loop that would have to answer.

    Example:
        ```python
        from fractal import BaseAgent, sync

        result = sync.run(BaseAgent("Helper", "You help."), "hello", timeout=30)
        ```
    """
    if (override := _blocking_override(agent, "run")) is not None:
        given = {name: value for name, value in options.items() if value is not None}
        return returned_as(AgentResult, override(user_input, **given), agent, "run")
    return call_blocking(lambda: verbs.ask(agent, user_input, **options))


def execute_tool(agent: AgentDefinition[Any], tool_name: str = "", /, **arguments: Any) -> ToolResult:
    """Call one tool of an agent, as the model would, blocking.

    Args:
        agent: The agent.
        tool_name: Name as the model sees it.
        **arguments: The tool's own parameters; checked first.

    Returns:
        How it ended; what went wrong is in its `error`.

    Example:
        ```python
        result = sync.execute_tool(agent, "search", query="x")
        ```
    """
    if (override := _blocking_override(agent, "execute_tool")) is not None:
        return returned_as(ToolResult, override(tool_name, **arguments), agent, "execute_tool")
    return call_blocking(lambda: verbs.use_tool(agent, tool_name, arguments))


def _blocking_override(agent: AgentDefinition[Any], name: str) -> Callable[..., Any] | None:
    """A blocking agent's override of a verb, called in the caller's thread, as a direct call would be."""
    return override_of(agent, name) if core_of(agent).blocks else None


def resume(
    agent: AgentDefinition[Any],
    journal: Journal,
    run_id: str,
    answers: Mapping[str, Allow | Deny | bool] | None = None,
    **options: Unpack[ResumeOptions],
) -> AgentResult[Any]:
    """Go on with a durable run that a journal has, blocking.

    Args:
        agent: The agent.
        journal: The journal that the run began with.
        run_id: Its id there.
        answers: As in `BaseAgent.resume`.
        **options: As `ResumeOptions` describes them.

    Returns:
        How the run ended.

    Raises:
        JournalError: As in `BaseAgent.resume`.
    """
    return call_blocking(lambda: verbs.resume(agent, journal, run_id, answers, **options))


class BaseAgent(AgentDefinition[Content_co]):
    """An agent for code that never awaits: the same class as `fractal.BaseAgent`, with blocking verbs.

    All arguments are those of `AgentDefinition`. Its tools may be plain or async, and it can be a delegate of awaiting
    agents, and they of it.

    Example:
        >>> from fractal import sync, tool
        >>> class Legacy(sync.BaseAgent):
        ...     @tool
        ...     def lookup(self, key: str) -> str:
        ...         return key.upper()
        >>> Legacy("Legacy", "You look things up.").execute_tool("lookup", key="a").content
        'A'
    """

    @overload
    def run(
        self,
        user_input: object,
        max_iterations: int | None = None,
        max_retries: int | None = None,
        messages: Sequence[Mapping[str, Any]] | None = None,
        *,
        output_type: None = None,
        **options: Unpack[PlainBounds],
    ) -> AgentResult[Content_co]: ...

    @overload
    def run(
        self,
        user_input: object,
        max_iterations: int | None = None,
        max_retries: int | None = None,
        messages: Sequence[Mapping[str, Any]] | None = None,
        *,
        output_type: TypeForm[Content],
        **options: Unpack[PlainBounds],
    ) -> AgentResult[Content]: ...

    @verb
    def run(
        self,
        user_input: object,
        max_iterations: int | None = None,
        max_retries: int | None = None,
        messages: Sequence[Mapping[str, Any]] | None = None,
        **options: Unpack[RunBounds],
    ) -> AgentResult[Any]:
        """Answer one input, blocking; see `fractal.sync.run`."""
        given = RunOptions(max_iterations=max_iterations, max_retries=max_retries, messages=messages, **options)
        return call_blocking(lambda: verbs.answer(self, user_input, **given))

    @overload
    def __call__(
        self,
        user_input: object,
        max_iterations: int | None = None,
        max_retries: int | None = None,
        messages: Sequence[Mapping[str, Any]] | None = None,
        *,
        output_type: None = None,
        **options: Unpack[PlainBounds],
    ) -> AgentResult[Content_co]: ...

    @overload
    def __call__(
        self,
        user_input: object,
        max_iterations: int | None = None,
        max_retries: int | None = None,
        messages: Sequence[Mapping[str, Any]] | None = None,
        *,
        output_type: TypeForm[Content],
        **options: Unpack[PlainBounds],
    ) -> AgentResult[Content]: ...

    def __call__(self, user_input: object, *arguments: Any, **options: Any) -> AgentResult[Any]:
        """Answer one input, blocking; the same as `run`."""
        result: AgentResult[Any] = self.run(user_input, *arguments, **options)
        return result

    run_sync = __call__

    @overload
    def stream(
        self,
        user_input: object,
        max_iterations: int | None = None,
        max_retries: int | None = None,
        messages: Sequence[Mapping[str, Any]] | None = None,
        *,
        buffer: int = DEFAULT_BUFFER,
        output_type: None = None,
        **options: Unpack[PlainBounds],
    ) -> RunStream[Content_co]: ...

    @overload
    def stream(
        self,
        user_input: object,
        max_iterations: int | None = None,
        max_retries: int | None = None,
        messages: Sequence[Mapping[str, Any]] | None = None,
        *,
        buffer: int = DEFAULT_BUFFER,
        output_type: TypeForm[Content],
        **options: Unpack[PlainBounds],
    ) -> RunStream[Content]: ...

    @verb
    def stream(
        self,
        user_input: object,
        max_iterations: int | None = None,
        max_retries: int | None = None,
        messages: Sequence[Mapping[str, Any]] | None = None,
        *,
        buffer: int = DEFAULT_BUFFER,
        **options: Unpack[RunBounds],
    ) -> RunStream[Any]:
        """Answer one input, and watch it happen, blocking; see `fractal.sync.stream`."""
        given = RunOptions(max_iterations=max_iterations, max_retries=max_retries, messages=messages, **options)
        is_open = override_of(self, "stream") is not None
        return RunStream(verbs.open_stream(self, user_input, buffer, shows_pieces=is_open, **given))

    @verb
    def execute_tool(self, tool_name: str = "", /, **arguments: Any) -> ToolResult:
        """Call one registered tool, blocking; see `fractal.sync.execute_tool`."""
        return call_blocking(lambda: verbs.call_tool(self, tool_name, arguments))

    def resume(
        self,
        journal: Journal,
        run_id: str,
        answers: Mapping[str, Allow | Deny | bool] | None = None,
        **options: Unpack[ResumeOptions],
    ) -> AgentResult[Any]:
        """Go on with a durable run that a journal has, blocking; see `fractal.sync.resume`."""
        return resume(self, journal, run_id, answers, **options)

    def call_agent(self, other: AgentDefinition[Content], query: object) -> AgentResult[Content]:
        """Ask another agent, blocking; in a plain `def` tool it is a child of the run that called the tool."""
        return call_blocking(lambda: run_delegate(other, query, current_run.get()))

    def close(self) -> None:
        """Close what the agent opened; a later run opens it again.

        Connections are shared by the agents of an event loop, which blocking callers share: they stay while another
        agent that used them is there.
        """
        call_blocking(lambda: verbs.release(self))

    async def __aenter__(self) -> Self:
        """Open what the agent needs for more than one run: for classes that override it; it is called by `with` too."""
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> bool | None:
        await verbs.release(self)
        return None

    def __enter__(self) -> Self:
        block = enter(_opened(self))
        entry = get_ident(), block
        self.__entered.append(entry)
        try:
            return block.__enter__()
        except BaseException:
            self.__entered.remove(entry)
            raise

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> bool:
        entry: _Entry | None = None
        try:
            entry = self.__last_entered()
            return entry[1].__exit__(kind, error, traceback)
        finally:  # whatever came between: a block that nobody has any more is left
            self.__entered.remove(entry or self.__last_entered())

    def __last_entered(self) -> _Entry:
        # Several threads may have entered it, each to leave its own block; one may also be left in another thread.
        blocks = self.__entered
        return next((entry for entry in reversed(blocks) if entry[0] == get_ident()), blocks[-1])

    @property
    def __entered(self) -> list[_Entry]:
        return core_of(self).entered


@asynccontextmanager
async def _opened(agent: Agent) -> AsyncGenerator[Agent]:
    """An agent, opened and closed as its class does; its connections are closed in any case."""
    try:
        async with agent as opened:
            yield opened
    finally:
        await verbs.release(agent)
