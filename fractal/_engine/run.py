"""A run: everything that changes while an agent answers one input.

The agent itself is fixed, so one object serves any number of runs at once; a run belongs to one call and is gone with
it. `current_run` is how a call made inside a tool finds the run it belongs to.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, Protocol

from fractal._answers.answer import Answer, Offer
from fractal._concurrency.current import current_call, current_run
from fractal._copies import copied_messages, with_own_content
from fractal._engine.around import NO_HOOKS, RunHooks
from fractal._engine.below import Below, origin_of
from fractal._engine.clock import RunClock
from fractal._engine.duplicates import Duplicates
from fractal._engine.emitter import Emitter
from fractal._engine.journaled import JournaledRun, journaled
from fractal._engine.pricing import Prices, prices_of_library
from fractal._engine.run_result import result_of, sound
from fractal._engine.window import WindowView
from fractal._texts import said_by
from fractal.context import RunContext
from fractal.errors import DepthExceeded, LimitReached, RunError, StopReason
from fractal.events import LimitHit, RunFinished, RunStarted
from fractal.limits import DEFAULT_LIMITS, Budget, Limits, limits_below
from fractal.results import AgentResult, ToolResult, Usage

if TYPE_CHECKING:
    from fractal._concurrency.background import Joinable
    from fractal._engine.hooks import Hook
    from fractal._engine.run_settings import RunSettings
    from fractal.messages import Message, Transcript
    from fractal.model import ToolSchemas
    from fractal.toolkit import Tool

__all__ = ["Run", "run_watchers"]


class _OpenCall(Protocol):
    """A tool call at work, as far as its run needs it."""

    bound: Any
    is_out_of_grace: bool
    key: str
    task: object

    def follow(self) -> object:
        """Adapt the call's deadline to that of the run."""
        ...

    def stop(self, now: float, /) -> object:
        """Cancel the call with its run."""
        ...


run_watchers: list[Callable[[Run], object]] = []
"""Who is shown each run of the process when it is made; for tests."""


class Run:
    """One run of one agent.

    Args:
        settings: What the agent and the call say.
        transcript: The conversation, with the user's turn at its end.
    """

    __slots__ = (  # a dictionary of so many names would be a tenth of what a waiting run needs
        "__weakref__",
        "_begun_by",
        "_depth_limit",
        "_offer",
        "_task",
        "_was_closing",
        "abandoned",
        "agent",
        "answer",
        "approve",
        "below",
        "budget",
        "clock",
        "deps",
        "depth",
        "duplicates",
        "emitter",
        "empty_replies",
        "hooks",
        "iterations",
        "journaled",
        "limits",
        "offered",
        "open_calls",
        "origin",
        "parent",
        "prices",
        "result",
        "run_id",
        "seen",
        "settings",
        "system",
        "tool_results",
        "transcript",
        "window",
    )

    def __init__(self, settings: RunSettings, transcript: Transcript) -> None:
        self.clock = clock = RunClock()
        self.origin = origin = origin_of(clock.current_task())
        parent: Run | None = origin.run
        self.settings, self.agent, self.transcript, self.parent = settings, settings.agent, transcript, parent
        self.duplicates: Duplicates = parent.duplicates if parent else Duplicates()
        self.run_id = os.urandom(16).hex()
        self.depth: int = parent.depth + 1 if parent else 0
        self.limits: Limits = settings.limits.over(limits_below(parent.limits) if parent else DEFAULT_LIMITS)
        self.deps: Any = settings.deps if settings.deps is not None or parent is None else parent.deps
        self.hooks: RunHooks = (
            parent.hooks.below(settings.hooks) if parent and parent.hooks is not NO_HOOKS else settings.hooks
        )
        self.approve: Hook | None = settings.approve or (parent.approve if parent else None)
        self.budget: Budget = Budget(self.limits, parent.budget if parent else None, settings.budgets)
        identity = {
            "run_id": self.run_id,
            "parent_id": parent.run_id if parent else None,
            "agent_name": settings.agent_name,
            "depth": self.depth,
        }
        self.emitter: Emitter = Emitter(clock, parent.emitter if parent else None, settings.observers, identity)
        self.prices: Prices | None = settings.prices or (parent.prices if parent else prices_of_library())
        self.offered: frozenset[str] | None = None  # names, where a hook has changed what one request offers
        self.offer_tools()
        self.window: WindowView | None = None
        if settings.window is not None:
            warn = self.emitter.warn
            self.window = WindowView(settings.window, transcript, context=self.hook_context, warn=warn)
        self.system: str | None = None
        self.iterations = self.empty_replies = self.seen = 0  # seen: messages that observers have been told of
        self.tool_results: list[ToolResult] = []
        self.abandoned: list[ToolResult] = []
        depth_limit: float = self.depth + (self.limits.max_depth or 0)
        self._depth_limit: float = min(depth_limit, parent._depth_limit) if parent is not None else depth_limit
        self.result: AgentResult | None = None
        self.open_calls: dict[str, _OpenCall] = {}  # of tools that are at work
        self._task: object = None
        self._was_closing = False
        self.below = Below()
        self._begun_by: str | None = None  # the call of the run above
        is_journaled = settings.durable is not None or (parent is not None and parent.journaled is not None)
        self.journaled: JournaledRun | None = journaled(self) if is_journaled else None
        for watch in run_watchers:
            watch(self)

    def offer_tools(self) -> None:
        """Offer the tools of the settings, and what takes the answer; before the run begins."""
        settings = self.settings
        self.answer: Answer | None = None
        self._offer = Offer(settings.toolkit.tools, settings.toolkit.schemas())
        if settings.answer is not None:
            self.answer = Answer(
                settings.answer,
                self._offer,
                model_name=settings.model_name,
                max_retries=settings.max_retries,
                context=self.hook_context,
                warn=self.emitter.warn,
            )

    @property
    def task_name(self) -> str:
        """The name of the run's task."""
        return f"fractal run {self.run_id[:8]} of {self.settings.agent_name}"

    @property
    def tools(self) -> Mapping[str, Tool]:
        """The tools that the model may call, by name."""
        return (self._offer if self.answer is None else self.answer.offer).tools

    @property
    def tool_schemas(self) -> ToolSchemas:
        """The schemas that the model sees."""
        return (self._offer if self.answer is None else self.answer.offer).schemas

    @property
    def grace(self) -> float:
        """Seconds for the cleanup of what is cancelled."""
        return self.limits.grace or 0.0

    @property
    def usage(self) -> Usage:
        """The usage of this run and of everything below it."""
        return self.budget.usage()

    @property
    def messages(self) -> list[Message]:
        """The transcript so far."""
        return self.transcript.messages

    @property
    def has_begun(self) -> bool:
        """Whether the run has begun, and so will have an end."""
        return self._task is not None

    def start_clock(self, deadline_around: float = math.inf) -> None:
        """Start the run's clock; called in the task that begins the run.

        Args:
            deadline_around: The nearest deadline around its scope. A task of the run's own has none.
        """
        parent, is_enclosed = self.parent, self.origin.is_enclosed
        above = parent.clock if parent is not None else None
        self.clock.start(self.settings.timeout, above, deadline_around, is_enclosed=is_enclosed)
        if parent is not None:
            self._begun_by = parent.open_call_id()

    def enter(self) -> None:
        """Make this the current run of its task; `scope` is entered next."""
        clock = self.clock
        if self.limits.reserve:
            clock.soft_deadline = clock.deadline - self.limits.reserve
        self._task = clock.current_task()
        current_run.set(self)
        current_call.set(None)  # what this run's own functions start is begun by none of the calls above it

    def open_call(self) -> _OpenCall | None:
        """The tool call of this run that the current task works for, unless that has ended."""
        key = current_call.get()
        return self.open_calls.get(key) if key is not None else None

    def open_call_id(self) -> str | None:
        """Id of the open tool call, as the model gave it."""
        call = self.open_call()
        return call.bound.call_id if call is not None else None

    async def open(self) -> None:
        """Emit that the run begins.

        Raises:
            DepthExceeded: It is too deep below the first one.
        """
        emitter = self.emitter
        if emitter.has_listeners:
            try:
                await emitter.pace()
            finally:
                self._tell_beginning()  # also a run that is cancelled here has a beginning
            await emitter.pace()
        if self.parent is not None and self.depth > self.parent._depth_limit:
            raise DepthExceeded(int(self.parent._depth_limit))

    def _tell_beginning(self) -> None:
        *history, message = copied_messages(self.transcript.messages[: self.seen or None])
        self.seen = len(history) + 1
        facts = {"call_id": self._begun_by, "limits": self.limits, "timeout": self.settings.timeout}
        self.emitter.emit(RunStarted, message=message, history=history, **facts)

    def cut(self) -> None:
        """Stop the run's calls, and what is below it, when it is cancelled and has yet to notice."""
        for call in self.open_calls.values():
            call.stop(self.clock.now())
        self.below.cancel()
        if self.journaled is not None:
            self.journaled.cut()

    def cancel(self) -> None:
        """Cancel the run, and what is below it."""
        self.clock.scope.cancel()
        self.cut()

    def allow_until(self, deadline: float) -> None:
        """Note that the deadline around the run has moved to a later time."""
        self.clock.allow_until(deadline)
        for call in self.open_calls.values():
            call.follow()

    def final_reason(self) -> StopReason:
        """The stop reason of a run that the next reply answers; emits an event when it changes."""
        if self.clock.is_closing() and not self._was_closing:
            self._was_closing = True
            self.emitter.emit(LimitHit, limit="soft_deadline", message="only the time for a final answer is left")
        return "soft_deadline" if self._was_closing else "finished"

    def context(self, *, tool_name: str | None = None, call_id: str | None = None) -> RunContext[Any]:
        """The context that tools and prompt functions get."""
        return RunContext(self, tool_name=tool_name, call_id=call_id)

    def hook_context(self) -> RunContext[Any]:
        """The context that a hook called now gets."""
        context = self.context()
        context.started()
        return context

    def take_id(self, run_id: str) -> None:
        """Take an id that is known already; before the run begins."""
        self.run_id = run_id
        self.emitter.take_id(run_id)

    @property
    def is_over(self) -> bool:
        """Whether the run has ended, so that nothing can become part of it."""
        return self.below.is_over or self.result is not None

    def is_task(self, task: object) -> bool:
        """Whether a task is that of the run or of its open call, whose scopes reach what it awaits."""
        call = self.open_call()
        return task is (self._task if call is None else call.task)

    def note_below(self, task: Joinable, *, is_reached: bool) -> None:
        """Note a task that the current one begins, so that it cannot outlive the run; see `Below.note`."""
        call = self.open_call()
        self.below.note(task, call.key if call is not None else None, is_reached=is_reached)
        if call is not None and call.is_out_of_grace and not is_reached:
            task.cancel()  # nobody looks any more at what the call has begun

    def note_abandoned(self, result: ToolResult) -> None:
        """Note a call whose thread goes on, in this run and those above."""
        run: Run | None = self
        while run is not None:
            run.abandoned.append(result)
            run = run.parent

    def succeed(self, content: Any, stop_reason: StopReason) -> AgentResult:
        """End the run with an answer."""
        return self._end(result_of(self, content, stop_reason))

    def fail(self, error: RunError) -> AgentResult:
        """End the run without an answer."""
        if isinstance(error, LimitReached):
            self.emitter.emit_limit(error)
        error = sound(error)
        error.result = result = result_of(self, said_by(error), error.stop_reason, error)
        return self._end(result)

    def _end(self, result: AgentResult) -> AgentResult:
        self.result, emitter = result, self.emitter
        emitter.has_ended = True
        # The run above is still to be told of the answer.
        shown = with_own_content(result) if self.parent is not None and emitter.has_listeners else result
        emitter.emit(RunFinished, result=shown)
        return result
