"""`BaseAgent`: a name, a prompt, a model, some tools, and the verbs that make it answer."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Self, overload

from anyio.lowlevel import RunVar
from typing_extensions import TypeForm, Unpack

from fractal._agent import verbs
from fractal._agent.core import Awaited
from fractal._concurrency.current import current_run
from fractal._engine.overrides import override_of, verb
from fractal.definition import AgentDefinition
from fractal.delegation import run_delegate
from fractal.options import PlainBounds, ResumeOptions, RunBounds
from fractal.results import Content, Content_co
from fractal.streaming import DEFAULT_BUFFER, RunStream

if TYPE_CHECKING:
    from types import TracebackType

    from fractal.approval import Allow, Deny
    from fractal.journal import Journal
    from fractal.results import AgentResult, ToolResult

__all__ = ["BaseAgent"]


class BaseAgent(AgentDefinition[Content_co], Awaited):
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

    @overload
    async def run(
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
    async def run(
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
    async def run(
        self,
        user_input: object,
        max_iterations: int | None = None,
        max_retries: int | None = None,
        messages: Sequence[Mapping[str, Any]] | None = None,
        **options: Unpack[RunBounds],
    ) -> AgentResult[Any]:
        """Answer one input.

        The agent keeps nothing of it: go on with `messages=result.messages`. When the call returns, raises or is
        cancelled, nothing it started is running, but for the threads listed in the result's `abandoned`.

        Args:
            user_input: Text, a dict, a list or a pydantic model (sent as JSON), or a list of chat content parts.
            max_iterations: Turns: a reply and the tool calls it asks for. None: the agent's limit, or 10.
            max_retries: Times a failed request, and an empty reply, is tried again. None: the agent's, or 3.
            messages: Conversation to continue.
            **options: `timeout`, `limits`, `budget`, `deps`, `approve`, `around_tool`, `around_model`, `guard`,
                `output_type`, `output_mode`, `conversation`, `journal` and `run_id`: see `RunBounds`.

        Returns:
            How it ended. A failure of the model, a spent budget or the end of `timeout` is a result with
            `success=False`; `raise_for_error()` raises it.

        Raises:
            InvalidArguments: An argument cannot be what was meant.
            InvalidMessages: `messages` is no history that an endpoint accepts.
            StoreError: What is said cannot be kept in `conversation`, which somebody else has gone on with, say.
            JournalError: The run has a `journal`, and cannot go on with it: see `docs/durable-runs.md`.

        Example:
            ```python
            result = await agent.run("What is the weather in Rome?", timeout=30)
            print(result.content)
            ```
        """
        return await verbs.answer(
            self, user_input, max_iterations=max_iterations, max_retries=max_retries, messages=messages, **options
        )

    @overload
    async def __call__(
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
    async def __call__(
        self,
        user_input: object,
        max_iterations: int | None = None,
        max_retries: int | None = None,
        messages: Sequence[Mapping[str, Any]] | None = None,
        *,
        output_type: TypeForm[Content],
        **options: Unpack[PlainBounds],
    ) -> AgentResult[Content]: ...

    async def __call__(
        self,
        user_input: object,
        max_iterations: int | None = None,
        max_retries: int | None = None,
        messages: Sequence[Mapping[str, Any]] | None = None,
        **options: Unpack[RunBounds],
    ) -> AgentResult[Any]:
        """Answer one input; the same as `run`."""
        result: AgentResult[Any] = await self.run(user_input, max_iterations, max_retries, messages, **options)
        return result

    @overload
    def run_sync(
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
    def run_sync(
        self,
        user_input: object,
        max_iterations: int | None = None,
        max_retries: int | None = None,
        messages: Sequence[Mapping[str, Any]] | None = None,
        *,
        output_type: TypeForm[Content],
        **options: Unpack[PlainBounds],
    ) -> AgentResult[Content]: ...

    def run_sync(
        self,
        user_input: object,
        max_iterations: int | None = None,
        max_retries: int | None = None,
        messages: Sequence[Mapping[str, Any]] | None = None,
        **options: Unpack[RunBounds],
    ) -> AgentResult[Any]:
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
        return verbs.open_stream(
            self,
            user_input,
            buffer,
            shows_pieces=override_of(self, "stream") is not None,
            max_iterations=max_iterations,
            max_retries=max_retries,
            messages=messages,
            **options,
        )

    async def resume(
        self,
        journal: Journal,
        run_id: str,
        answers: Mapping[str, Allow | Deny | bool] | None = None,
        **options: Unpack[ResumeOptions],
    ) -> AgentResult[Any]:
        """Go on with a durable run that a journal has, in whatever process, and answer calls that wait for approval.

        Args:
            journal: The journal that the run began with.
            run_id: Its id there.
            answers: `Allow(…)`, `Deny(…)`, True or False, by the `call_id` of calls in the result's `pending`. A call
                that is not among them goes on waiting. None: no answers, for a run whose process has ended.
            **options: As in `run`, but for the input, the history and the journal.

        Returns:
            How it ended; with the stop reason `"approval"` if calls wait again.

        Raises:
            RunUnknown: The journal has no such run.
            NotPending: A call that is answered was never issued, or has been answered; nothing is recorded.
            RunInProgress: Another process is at work on the run.
            JournalError: The journal cannot be used.

        Example:
            ```python
            result = await agent.run("Pay it", journal=journal, run_id="invoice-17", approve=lambda call: Defer())
            answers = {call.call_id: Allow() for call in result.pending}
            result = await agent.resume(journal, "invoice-17", answers)
            ```
        """
        return await verbs.resume(self, journal, run_id, answers, **options)

    @verb
    async def execute_tool(self, tool_name: str = "", /, **arguments: Any) -> ToolResult:
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
        return await verbs.call_tool(self, tool_name, arguments)

    async def call_agent(self, other: AgentDefinition[Content], query: object) -> AgentResult[Content]:
        """Ask another agent; inside a tool it is a child of the run, with its deadline, budget and trace.

        Args:
            other: The other agent.
            query: What `run` takes as `user_input`.

        Returns:
            How the other agent's run ended.
        """
        return await run_delegate(other, query, current_run.get())

    async def aclose(self) -> None:
        """Close what the agent opened in the running event loop; a later run opens it again.

        Connections are shared by the agents of a loop: they stay while another agent that used them is there, and while
        somebody's request is on its way or waits for one. Of several blocks `async with agent:`, the last that is left
        closes them.
        """
        await verbs.release(self)

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
    """The numbers of open `async with agent:` blocks in this event loop, by the id of the agent."""
    try:
        return _blocks.get()
    except LookupError:
        _blocks.set({})
        return _blocks.get()
