"""One tool call while it runs: what is known of it, how it ended, and what is told of it."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

from fractal._copies import copied_arguments, with_own_content
from fractal._current import WeakVar
from fractal._json import is_mapping
from fractal._scopes import waiting
from fractal._stuck import place_in_thread, place_of
from fractal.events import ToolFinished, ToolStarted
from fractal.results import Outcome, ToolResult

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable
    from contextlib import AbstractContextManager

    import anyio

    from fractal._run import Run
    from fractal._step import BoundCall

__all__ = ["Call"]

_around: WeakVar[Call] = WeakVar("fractal_call_around")


class Call:
    """One call while it runs.

    Args:
        run: The run that it belongs to.
        bound: What is called.
        through: Calls the agent's own `execute_tool`, if it is to make the call.
        outer: The call that it is the inside of: what such a verb makes of it. That one is charged, approved and told.
    """

    __slots__ = (
        "__weakref__",
        "_above",
        "_below",
        "_told",
        "_where",
        "abandoned",
        "bound",
        "cut_at",
        "exception",
        "named",
        "needs_approval",
        "outer",
        "result",
        "run",
        "scope",
        "started",
        "text",
        "through",
        "waits_for",
        "work",
    )

    def __init__(
        self,
        run: Run,
        bound: BoundCall,
        *,
        through: Callable[..., Awaitable[Any]] | None = None,
        outer: Call | None = None,
    ) -> None:
        self.run, self.bound, self.outer = run, bound, outer
        is_whole = bound.fault is None or is_mapping(bound.arguments)
        self.through = through if is_whole and (bound.tool is None or not bound.tool.is_answer) else None
        self._above = above = _around.get()
        self._below: set[Call] = set()
        if above is not None:
            above._below.add(self)
        self.started = run.now()
        self.cut_at = math.inf  # when its scope ends it
        self.scope: anyio.CancelScope | None = None  # there is one where it has a time of its own
        self.result: ToolResult | None = None
        self.text = ""  # what the model sees
        self.exception: BaseException | None = None
        self.abandoned = False
        self.named = False  # already reported as not stopping
        self._where: str | None = None  # and where it was then
        self.work: object = None  # what it waits for: the tool's coroutine, or a `ThreadCall`
        self.waits_for: str | None = None  # what it was waiting for when it was cut before it began
        self.needs_approval = bound.tool is not None and bool(bound.tool.options.requires_approval) and outer is None
        self._told = 0 if run.is_heard and outer is None else 2  # of its two events

    def end(self, outcome: Outcome, content: Any = None, error: str | None = None) -> None:
        """Give the call its outcome; only the first counts."""
        if self.result is not None:
            return
        bound = self.bound
        self.result = result = ToolResult.of_facts(
            self.exception,
            content=content,
            tool_name=bound.name,
            metadata={
                "arguments": bound.arguments,
                "terminate": bound.tool is not None and bound.tool.options.terminate,
            },
            error=error,
            outcome=outcome,
            elapsed=self.run.now() - self.started,
            call_id=bound.call_id,
        )
        if error is not None:
            self.text = f"Error: {error}"
        if outcome == "abandoned" and self.outer is not None:
            self.outer.abandoned = True
        elif outcome == "abandoned":
            self.run.note_abandoned(result)
        elif self._above is not None:
            self._above._below.discard(self)

    def returned(self, content: Any, text: str) -> None:
        """Note what the tool returned, and how the model sees that; too late once the call has an outcome."""
        if self.result is None:
            self.text = text
            self.end("ok", content)

    def waiting(self, what: str) -> AbstractContextManager[None]:
        """A block around a wait before it can begin."""
        return waiting(what, self._note_wait)

    def _note_wait(self, what: str) -> None:
        self.waits_for = what

    def enter(self) -> None:
        """Be what later calls in this context belong to."""
        _around.set(self)

    def bottom(self) -> Call:
        """What does not stop if this does not: one of the calls that it waits for, in runs below, or itself."""
        return next((call.bottom() for call in self._below), self)

    def name_as_stuck(self, grace: float, then: str) -> str | None:
        """Warn, once, that it goes on after its grace; returns where it is, if that is known."""
        if self.named:
            return self._where
        self.named = True
        thread = getattr(self.work, "thread", None)
        self._where = where = place_in_thread(thread) if thread is not None else place_of(self.work)
        stuck = f", stuck at {where}" if where else ""
        self.run.warn(f"tool {self.bound.name!r} has not stopped {grace:g} s after it was cancelled{stuck}; {then}")
        return where

    @property
    def may_be_left(self) -> bool:
        """Whether the run goes on without it if it does not stop."""
        tool = self.bound.tool
        return tool is not None and tool.is_async and self.run.limits.on_stubborn == "raise"

    @property
    def ends_run(self) -> bool:
        """Whether its result is the run's."""
        tool, result = self.bound.tool, self.result
        return tool is not None and tool.options.terminate and result is not None and result.outcome == "ok"

    @property
    def is_out_of_time(self) -> bool:
        """Whether its own time is over, or that of its run."""
        return (self.scope is not None and self.scope.cancel_called) or self.run.is_out_of_time()

    async def tell(self) -> None:
        """Tell what there is to tell by now, at the pace of whoever reads it."""
        if self._told == 2:
            return
        if not self.run.feeds:
            self.tell_now()
            return
        await self.run.pace()
        self.tell_now()
        await self.run.pace()

    def tell_now(self) -> None:
        """Tell it without waiting: the start, once, and the end, once there is one."""
        bound, run = self.bound, self.run
        if self._told == 0:
            self._told = 1
            arguments = copied_arguments(bound.arguments)
            run.emit(ToolStarted, tool_name=bound.name, call_id=bound.call_id, arguments=arguments)
        if self._told == 1 and self.result is not None:
            self._told = 2
            result = self._shown(self.result)
            run.emit(ToolFinished, tool_name=bound.name, call_id=bound.call_id, result=result)

    def _shown(self, result: ToolResult) -> ToolResult:
        """The result for whoever listens: nothing that they do to it reaches what the run goes on with."""
        shown = with_own_content(result) if self.ends_run else result.model_copy()
        shown.metadata = {**result.metadata, "arguments": copied_arguments(self.bound.arguments)}
        return shown
