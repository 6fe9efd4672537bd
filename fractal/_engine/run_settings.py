"""The settings of a run: what its agent and the call that starts it say."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    from fractal._answers.answer import AnswerSettings
    from fractal._engine.around import RunHooks
    from fractal._engine.hooks import Hook, Warn
    from fractal._engine.journal_of_tree import Durable
    from fractal._engine.keeper import Keeper
    from fractal._engine.pricing import Prices
    from fractal._engine.window import Window
    from fractal.context import RunContext
    from fractal.events import Observer
    from fractal.limits import Limits, SharedBudget
    from fractal.model import Model, ModelSettings, ToolSchemas
    from fractal.toolkit import Tool

__all__ = ["RunSettings", "Toolkit"]


class Toolkit(Protocol):
    """Tools on offer, as far as a run needs them."""

    @property
    def tools(self) -> Mapping[str, Tool]:
        """The tools by name."""
        ...

    def schemas(self) -> ToolSchemas:
        """The schemas that the model sees."""
        ...


@dataclass(slots=True, kw_only=True, eq=False, repr=False)
class RunSettings:
    """The settings of a run, from its agent and from the call that starts it; never changed.

    Attributes:
        agent: The agent.
        agent_name: Its name.
        model: Who answers.
        model_name: Name of the model at the endpoint.
        model_settings: Fields of each request.
        toolkit: Tools on offer.
        system_prompt: Makes the system prompt, and warns of what is odd; an empty one is not sent.
        limits: What the run may use: the call's, over the agent's.
        timeout: Seconds the run may take, or None.
        max_retries: Times a failed request, and an empty reply, is tried again.
        observers: Who is told what happens.
        deps: What tools find in their context.
        approve: Who answers for tools that require approval, or None.
        answer: What an answer has to be; None for any text.
        window: How much of the conversation a request may send; None for all of it.
        hooks: The hooks around tool calls and requests, and the guards.
        execute_tool: Calls the verb of that name, if the agent has one of its own, for each call of the model.
        prices: What models cost; None for those of the run above, or of the library.
        budgets: Budgets that the run shares with other trees of runs.
        keeper: Who keeps what is said, or None.
        durable: Where the run is recorded; None: where the run above is, if it is.
    """

    agent: Any
    agent_name: str
    model: Model
    model_name: str
    model_settings: ModelSettings
    toolkit: Toolkit
    system_prompt: Callable[[RunContext[Any], Warn], Awaitable[str]]
    limits: Limits
    timeout: float | None
    max_retries: int
    observers: tuple[Observer, ...]
    deps: Any
    approve: Hook | None
    answer: AnswerSettings | None
    window: Window | None
    hooks: RunHooks
    execute_tool: Callable[..., Awaitable[Any]] | None
    prices: Prices | None
    budgets: tuple[SharedBudget, ...]
    keeper: Keeper | None = None
    durable: Durable | None = None
