"""What a run, and an agent, can be given by keyword: typed dictionaries, for functions that pass `**options` on."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, TypedDict

from fractal._answers.ways import OutputMode
from fractal.limits import Limits, SharedBudget

if TYPE_CHECKING:
    from pathlib import Path

    from fractal._engine.keeper import Kept
    from fractal._engine.window import Compact, TokenCounter
    from fractal.approval import Approver
    from fractal.around import Around, AroundHook, Guard
    from fractal.events import Observer
    from fractal.journal import Journal
    from fractal.prices import Price
    from fractal.toolkit import AgentToolkit

__all__ = [
    "RUN_OPTIONS",
    "AgentOptions",
    "PlainAgentOptions",
    "PlainBounds",
    "PlainOptions",
    "ResumeBounds",
    "ResumeOptions",
    "RunBounds",
    "RunOptions",
]


class ResumeBounds(TypedDict, total=False):
    """The bounds of one run and of what its tools find, wherever it is recorded and whatever its answer has to be.

    Attributes:
        timeout: Seconds the run may take. None or left out: the agent's own.
        limits: What this run may use; fields left at None are the agent's.
        deps: What tools find as `ctx.deps`. None or left out: what the run above has.
        approve: Who answers for tools with `requires_approval`. None or left out: the agent's, or the run's above.
        around_tool: Hooks around each tool call, inside of the agent's: a function or a list of them.
        around_model: Hooks around each request to the model, inside of the agent's.
        guard: Who may stop the run while its model is asked first, beside the agent's: a function or a list.
        output_mode: How the model is made to give such an answer. None or left out: the agent's.
        budget: A budget that this run, with all below it, shares with others; besides the agent's.
        conversation: A conversation to go on with that is kept, in place of `messages`.
    """

    timeout: float | None
    limits: Limits | None
    budget: SharedBudget | None
    conversation: Kept | None
    deps: Any
    approve: Approver | None
    around_tool: AroundHook | Sequence[AroundHook | Around] | None
    around_model: AroundHook | Sequence[AroundHook | Around] | None
    guard: Guard | Sequence[Guard] | None
    output_mode: OutputMode | None


class PlainBounds(ResumeBounds, total=False):
    """The bounds of one run and of what its tools find, whatever its answer has to be.

    Attributes:
        journal: Where the run is recorded, step by step, so that the same call goes on with it after its process has
            ended, and returns its result once there is one. Needs `run_id`.
        run_id: Id of the run in the journal: text of up to 200 characters, such as `"order-17"`.
    """

    journal: Journal | None
    run_id: str | None


class RunBounds(PlainBounds, total=False):
    """The bounds of one run, of what its tools find and of its answer; for every verb that starts one.

    Attributes:
        output_type: What the answer has to be. None or left out: the agent's; `str` for text after all. The agent's
            output validators are for its own type alone.
    """

    output_type: Any


class PlainOptions(PlainBounds, total=False):
    """The options of one run, whatever its answer has to be.

    Attributes:
        max_iterations: Turns: a reply and the tool calls it asks for. None or left out: the agent's limit, or 10.
        max_retries: Times a failed request, and an empty reply, is tried again. None or left out: the agent's, or 3.
        messages: Conversation to continue, as an earlier `AgentResult.messages` gave it.
    """

    max_iterations: int | None
    max_retries: int | None
    messages: Sequence[Mapping[str, Any]] | None


class RunOptions(RunBounds, PlainOptions, total=False):
    """All options of one run, the same for every verb that starts one."""


class ResumeOptions(ResumeBounds, total=False):
    """The options of a run that goes on with what its journal has.

    Attributes:
        output_type: As in `RunBounds`.
        max_iterations: As in `PlainOptions`.
        max_retries: As in `PlainOptions`.
    """

    output_type: Any
    max_iterations: int | None
    max_retries: int | None


RUN_OPTIONS = frozenset(RunOptions.__annotations__)


class PlainAgentOptions(TypedDict, total=False):
    """The keyword arguments of `BaseAgent(…)`, whatever its answers have to be."""

    toolkit: AgentToolkit | None
    temperature: float | None
    max_tokens: int | None
    reasoning_effort: str | None
    extra_body: Mapping[str, Any] | None
    limits: Limits | None
    timeout: float | None
    max_retries: int | None
    system_context: Mapping[str, object] | None
    observers: Sequence[Observer]
    enable_tracing: bool | None
    tracing_output_file: str | Path | None
    approve: Approver | None
    around_tool: AroundHook | Sequence[AroundHook | Around] | None
    around_model: AroundHook | Sequence[AroundHook | Around] | None
    guard: Guard | Sequence[Guard] | None
    output_mode: OutputMode
    context_window: int | None
    count_tokens: TokenCounter | None
    compact: Compact | None
    prices: Mapping[str, Price] | None
    budget: SharedBudget | None


class AgentOptions(PlainAgentOptions, total=False):
    """The arguments of `BaseAgent(…)` besides `name` and `system_prompt`; for `__init__` methods that pass them on.

    The arguments of `BaseAgent` say what each is.

    Example:
        >>> from typing_extensions import Unpack
        >>> from fractal import AgentOptions, BaseAgent
        >>> class Weather(BaseAgent):
        ...     def __init__(self, **options: Unpack[AgentOptions]) -> None:
        ...         super().__init__("Weather", "You know the weather.", **options)
        >>> Weather(temperature=0.2).temperature
        0.2
    """

    model: str | None
    client: Any
    output_type: Any
