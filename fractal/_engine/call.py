"""One tool call while it runs: what is known of it, how it ended, and what is told of it."""

from __future__ import annotations

import math
from itertools import count
from typing import TYPE_CHECKING, Any

from fractal._concurrency.current import WeakVar, current_call
from fractal._concurrency.scopes import waiting
from fractal._concurrency.stuck import line_in_thread, line_of
from fractal._copies import copied, copied_arguments
from fractal._json import is_mapping
from fractal.events import ToolFinished, ToolStarted
from fractal.results import Outcome, ToolResult

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable
    from contextlib import AbstractContextManager

    import anyio

    from fractal._engine.journaled_call import JournaledCall
    from fractal._engine.run import Run
    from fractal._engine.step import BoundCall
    from fractal.around import Around

__all__ = ["Call", "ended_late"]

_LAST_CHANCE = 0.005
"""Seconds in which a tool may stop that is cancelled for good at the end of its grace."""

_around: WeakVar[Call] = WeakVar("fractal_call_around")

_inside = count()


class Call:
    """One tool call while it runs.

    Args:
        run: The run that it belongs to.
        bound: What is called.
        through: Calls the agent's own `execute_tool`, if it is to make the call.
        outer: The call that it is the inside of: what such a verb, or a hook around that, makes of it. That one is
            charged, approved and told.
        around: The hooks around it, inside of such a verb.
    """

    __slots__ = (
        "__weakref__",
        "_above",
        "_below",
        "_emitted",
        "_left_inside",
        "_stopped_at",
        "_where",
        "abandoned",
        "around",
        "bound",
        "cut_at",
        "exception",
        "is_left",
        "is_out_of_grace",
        "is_over",
        "is_stopped",
        "journaled",
        "key",
        "left_at",
        "look_at",
        "named",
        "needs_approval",
        "outer",
        "result",
        "run",
        "scope",
        "started",
        "task",
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
        around: tuple[Around, ...] = (),
    ) -> None:
        self.run, self.bound, self.outer = run, bound, outer
        # What the run knows it by while it is at work; both have the id that the model gave.
        self.key = bound.call_id if outer is None else f"{bound.call_id} inside {next(_inside)}"
        is_whole = bound.fault is None or is_mapping(bound.arguments)
        self.through = through if is_whole and (bound.tool is None or not bound.tool.is_answer) else None
        self.around: tuple[Around, ...] = around if bound.tool is not None and not bound.tool.is_answer else ()
        self._above = above = _around.get()
        self._below: set[Call] = set()
        self._left_inside: ToolResult | None = None  # of a call inside, whose thread goes on
        if above is not None:
            above._below.add(self)
        self.started = run.clock.now()
        self.cut_at = math.inf  # when its own time is over
        self.look_at = math.inf  # when the run has to see to it
        self._stopped_at = math.inf  # when it was cut, by its own time or with the run
        self.is_stopped = False  # with the run
        self.is_over = False  # and its task has ended
        self.is_out_of_grace = False  # and goes on: what it begins now is cut at once
        self.is_left = False  # to itself, with all that it has begun
        self.left_at = 0.0
        self.scope: anyio.CancelScope | None = None  # in which its task works
        self.task: object = None
        self.result: ToolResult | None = None
        self.text = ""  # what the model sees
        self.exception: BaseException | None = None
        self.abandoned = False
        self.named = False  # already reported as not stopping
        self._where: str | None = None  # and where it was then
        self.work: object = None  # what it waits for: the tool's coroutine, or a `ThreadCall`
        self.waits_for: str | None = None  # what it was waiting for when it was cut before it began
        self.journaled: JournaledCall | None = None  # what records it
        self.needs_approval = bound.tool is not None and bool(bound.tool.options.requires_approval) and outer is None
        self._emitted = 0 if run.emitter.has_listeners and outer is None else 2  # of its two events

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
            elapsed=self.run.clock.now() - self.started,
            call_id=bound.call_id,
        )
        if error is not None:
            self.text = f"Error: {error}"
        left = result if outcome == "abandoned" else self._left_inside
        if left is not None and self.outer is not None:
            self.outer.abandoned, self.outer._left_inside = True, left
        elif left is not None:
            self.run.note_abandoned(left)
        if self._above is not None and outcome != "abandoned":
            self._above._below.discard(self)

    def returned(self, content: Any, text: str) -> None:
        """Note the tool's result, and its text for the model; ignored once the call has an outcome."""
        if self.result is None:
            self.text = text
            self.end("ok", content)

    def waiting(self, what: str) -> AbstractContextManager[None]:
        """A block around a wait before the call can begin."""
        return waiting(what, self._note_wait)

    def _note_wait(self, what: str) -> None:
        self.waits_for = what

    def enter(self) -> None:
        """Make this the call that later calls and runs in the current context belong to."""
        _around.set(self)
        current_call.set(self.key)
        self.task = self.run.clock.current_task()

    def start_clock(self, cut_at: float) -> None:
        """Start the clock of the call.

        Args:
            cut_at: When its own is over; infinity: never.
        """
        run = self.run
        self.cut_at = self.look_at = cut_at
        self.started = run.clock.now()
        if self.scope is None:
            self.new_scope(min(cut_at, run.clock.deadline))
        else:
            self.follow()

    def new_scope(self, deadline: float) -> anyio.CancelScope:
        """Make the scope in which the call's task works from now on."""
        self.scope = scope = self.run.clock.token.backend_class.create_cancel_scope(deadline=deadline)
        return scope

    def follow(self) -> None:
        """Adapt the call's deadline to a changed one of the run."""
        assert self.scope is not None
        self.scope.deadline = min(self.cut_at, self.run.clock.deadline)

    def stop(self, now: float) -> None:
        """Cancel the call with its run."""
        assert self.scope is not None
        self.is_stopped = True
        self._stopped_at = self.look_at = min(self._stopped_at, self.cut_at, now)
        self.scope.cancel()

    def see_to_it(self, now: float) -> bool:
        """Cancel what a cut call has begun, and name the call if it goes on after its grace.

        Returns:
            Whether it is to be left to itself then.
        """
        run = self.run
        run.below.cancel_unreached(self.key)
        self._stopped_at = min(self._stopped_at, self.cut_at)
        grace = run.grace
        self.look_at = self._stopped_at + grace + (_LAST_CHANCE if self.may_be_left else 0.0)
        if now < self.look_at:
            return False
        self.look_at = math.inf
        self.is_out_of_grace = True
        run.below.cancel_unreached(self.bound.call_id)  # what another thread has begun in this moment
        if self.may_be_left:
            return True
        self.name_as_stuck(grace, "the run waits for it")
        return False

    def end_late(self) -> None:
        """Note the end of the call's task, long after the run went on without it."""
        bound, run = self.bound, self.run
        if bound.tool is not None:
            run.duplicates.gate(bound.tool.function).release()
        run.emitter.warn_late(ended_late(bound.name, run.clock.now() - self.left_at))

    @property
    def above(self) -> Call | None:
        """The call whose function has made this one."""
        return self._above

    def innermost(self) -> Call:
        """The deepest call, in runs below, that this one waits for; itself if there is none."""
        return next((call.innermost() for call in self._below), self)

    def name_as_stuck(self, grace: float, then: str) -> str | None:
        """Warn, once, that the call goes on after its grace; returns the line it is at, if that is known."""
        if self.named:
            return self._where
        self.named = True
        thread = getattr(self.work, "thread", None)
        self._where = where = line_in_thread(thread) if thread is not None else line_of(self.work)
        stuck = f", stuck at {where}" if where else ""
        late = f"has not stopped {grace:g} s after it was cancelled"
        self.run.emitter.warn(f"tool {self.bound.name!r} {late}{stuck}; {then}")
        return where

    @property
    def may_be_left(self) -> bool:
        """Whether the run goes on without the call if it does not stop."""
        tool = self.bound.tool
        if self.work is None or self.run.limits.on_stubborn != "raise":
            return False
        if self.through is not None or self.around:
            # A thread that is waited for is waited for by whatever way it was begun.
            return all(call.may_be_left for call in self._below if call.outer is self)
        return tool is not None and tool.is_async

    @property
    def ends_run(self) -> bool:
        """Whether the call's result is that of the run."""
        tool, result = self.bound.tool, self.result
        return tool is not None and tool.options.terminate and result is not None and result.outcome == "ok"

    @property
    def is_out_of_time(self) -> bool:
        """Whether the time of the call, or of its run, is over."""
        return self.is_past_own_time or self.run.clock.is_out_of_time()

    @property
    def is_past_own_time(self) -> bool:
        """Whether the call's own time has ended it."""
        is_cut = self.scope is not None and self.scope.cancel_called and not self.is_stopped
        return is_cut and self.run.clock.has_come(self.cut_at)

    async def tell(self) -> None:
        """Emit the events that are due, at the pace of a stream's reader."""
        if self._emitted == 2:
            return
        if not self.run.emitter.feeds:
            self.tell_now()
            return
        await self.run.emitter.pace()
        self.tell_now()
        await self.run.emitter.pace()

    def tell_now(self) -> None:
        """Emit the events that are due without waiting: the start, once, and the end, once there is one."""
        bound, run = self.bound, self.run
        if self._emitted == 0:
            self._emitted = 1
            arguments = copied_arguments(bound.arguments)
            run.emitter.emit(ToolStarted, tool_name=bound.name, call_id=bound.call_id, arguments=arguments)
        if self._emitted == 1 and self.result is not None:
            self._emitted = 2
            result = self._shown(self.result)
            run.emitter.emit(ToolFinished, tool_name=bound.name, call_id=bound.call_id, result=result)

    def tell_never(self) -> None:
        """Emit no events of the call: it has ended in another process."""
        self._emitted = 2

    def _shown(self, result: ToolResult) -> ToolResult:
        """A copy of the result for listeners, whose changes do not reach the run."""
        metadata = {**result.metadata, "arguments": copied_arguments(self.bound.arguments)}
        return result.changed(metadata=metadata, content=copied(result.content) if self.ends_run else result.content)


def ended_late(name: str, seconds: float) -> str:
    """The warning for the end of a call that nobody waits for any more."""
    return f"tool {name!r}, abandoned earlier, has ended {seconds:.2g} s after that"
