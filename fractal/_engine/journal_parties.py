"""Runs and calls, as far as what records them needs them."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    from fractal._answers.answer import Answer
    from fractal._engine.clock import RunClock
    from fractal._engine.emitter import Emitter
    from fractal._engine.step import BoundCall
    from fractal._engine.window import WindowView
    from fractal.limits import Budget
    from fractal.messages import Transcript
    from fractal.results import AgentResult, Outcome, ToolResult

__all__ = ["CallParty", "RunParty"]


class RunParty(Protocol):
    """A run, as far as what records it needs it."""

    settings: Any
    parent: Any
    journaled: Any
    transcript: Transcript
    budget: Budget
    answer: Answer | None
    window: WindowView | None
    iterations: int
    result: AgentResult | None
    clock: RunClock
    emitter: Emitter

    @property
    def grace(self) -> float:
        """Seconds for the cleanup of what is cancelled."""
        ...

    def take_id(self, run_id: str) -> None:
        """Take an id that is known already."""
        ...

    def open_call(self) -> Any:
        """The tool call that the current task works for."""
        ...


class CallParty(Protocol):
    """A tool call, as far as what records it needs it."""

    bound: BoundCall
    run: Any
    through: Any
    journaled: Any
    exception: BaseException | None
    result: ToolResult | None
    text: str
    needs_approval: bool
    is_stopped: bool

    def end(self, outcome: Outcome, content: Any = None, error: str | None = None) -> None:
        """Give the call its outcome."""
        ...

    async def tell(self) -> None:
        """Emit the events that are due."""
        ...

    def tell_never(self) -> None:
        """Emit no events of the call."""
        ...
