"""What the caller of a run brings along, besides what its agent has: tools, and turns that have been had already."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping
    from typing import Any

    from fractal._engine.run import Run
    from fractal._engine.run_settings import Toolkit
    from fractal.model import ToolSchemas
    from fractal.toolkit import Tool

__all__ = ["bring_tools", "bring_turns"]


class _Both:
    """The tools of two toolkits, which share no name."""

    def __init__(self, first: Toolkit, second: Toolkit) -> None:
        self.tools: Mapping[str, Tool] = {**first.tools, **second.tools}
        self._schemas = first.schemas().plus(second.schemas())

    def schemas(self) -> ToolSchemas:
        """The schemas that the model sees."""
        return self._schemas


def bring_tools(run: Run, toolkit: Toolkit) -> None:
    """Offer more tools, to the model of this run alone; before it begins."""
    run.settings = replace(run.settings, toolkit=_Both(run.settings.toolkit, toolkit))
    run.offer_tools()


def bring_turns(run: Run, turns: Iterable[Mapping[str, Any]]) -> None:
    """Have a run go on after turns that have been had since the user's; before it begins.

    Raises:
        InvalidMessages: No endpoint would take them there.
    """
    run.seen = len(run.transcript)  # observers are told of them with the first request
    for turn in turns:
        run.transcript.append(turn)
    run.transcript.require_answered()
