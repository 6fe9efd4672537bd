"""Runs and calls, as far as what records them needs them."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    from collections.abc import Callable

    from fractal._answers.answer import Answer
    from fractal._engine.step import BoundCall
    from fractal._engine.window import WindowView
    from fractal.events import Event
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
    feeds: Any
    result: AgentResult | None

    @property
    def grace(self) -> float:
        """Seconds for the cleanup of what is cancelled."""
        ...

    @property
    def deadline(self) -> float:
        """The nearest of the deadlines of the run and around it."""
        ...

    @property
    def own_deadline(self) -> float:
        """The nearest of the deadlines of the run and of those above it."""
        ...

    def take_id(self, run_id: str) -> None:
        """Take an id that is known already."""
        ...

    def keep_deadline(self, left: float) -> None:
        """Keep the deadline that the run had in a process that has ended."""
        ...

    def open_call(self) -> Any:
        """The tool call that the current task works for."""
        ...

    async def tell(self, kind: Callable[..., Event], **facts: Any) -> None:
        """Emit an event."""
        ...

    def warn(self, message: str) -> None:
        """Note something odd."""
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

    def tell_never(self) -> None:
        """Emit no events of the call."""
        ...
