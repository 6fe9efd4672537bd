"""What a stream shows of runs whose answer the agent's own `run` has still to let out."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

from fractal._concurrency.feed import Inlet
from fractal.events import Event, ModelRequested, ModelResponded, ReasoningDelta, RunFinished, TextDelta, ToolCallDelta
from fractal.results import AgentResult

__all__ = ["HeldBack"]

_WRITTEN = (TextDelta, ReasoningDelta, ToolCallDelta, ModelResponded)


class HeldBack:
    """A feed's inlet that lets events of runs through, but none of the texts that their models write.

    Args:
        inlet: The writers' end of the feed.
        is_own: Whether a run, by its id, is one that the agent's own `run` has begun.
    """

    def __init__(self, inlet: Inlet[Event], is_own: Callable[[str], bool]) -> None:
        self._inlet, self._is_own = inlet, is_own
        self._finished: RunFinished | None = None

    def put(self, item: Event) -> None:
        """Hand an event over, unless it holds text that has still to be let out."""
        if not self._is_own(item.run_id):
            self._inlet.put(item)
        elif isinstance(item, RunFinished):
            self.let_out(None)
            self._finished = item
        elif isinstance(item, ModelRequested):
            self._inlet.put(replace(item, opening=[], added=[]))
        elif not isinstance(item, _WRITTEN):
            self._inlet.put(item)

    def let_out(self, result: AgentResult[Any] | None) -> None:
        """Emit the end of the last run.

        Args:
            result: What the agent's own `run` has returned; None if it has not, or not of that run.
        """
        finished, self._finished = self._finished, None
        if finished is None:
            return
        if result is not None and result.success and isinstance(result.content, str):
            known = {name: getattr(finished, name) for name in ("run_id", "parent_id", "agent_name", "depth")}
            self._inlet.put(TextDelta(**known, text=result.content))
        self._inlet.put(replace(finished, result=result or _bare(finished.result)))

    @property
    def is_full(self) -> bool:
        """Whether the feed has no room for another event."""
        return self._inlet.is_full

    async def room(self) -> None:
        """Wait until the feed has room for another event."""
        await self._inlet.room()

    def for_other_loop(self) -> Inlet[Event]:
        """The inner inlet's end for another event loop; events of runs below are not held back."""
        return self._inlet.for_other_loop()


def _bare(result: AgentResult[Any]) -> AgentResult[Any]:
    """A result without texts of models and tools."""
    nothing: dict[str, Any] = {"content": None, "messages": [], "tool_results": [], "abandoned": [], "metadata": {}}
    return result.model_copy(update=nothing)
