"""A run: everything that changes while an agent answers one input.

The agent itself is fixed, so one object serves any number of runs at once; a run belongs to one call and is gone with
it. `current_run` is how a call made inside a tool finds the run it belongs to.
"""

from __future__ import annotations

import math
import os
import time
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from operator import attrgetter
from typing import TYPE_CHECKING, Any, Protocol

import anyio
from anyio.lowlevel import checkpoint, current_token

from fractal._answers.answer import Answer, Offer
from fractal._concurrency.background import current_task_of
from fractal._concurrency.current import current_call, current_run
from fractal._concurrency.feed import Inlet
from fractal._concurrency.scopes import waiting
from fractal._copies import copied_messages, with_own_content
from fractal._engine.around import NO_HOOKS, RunHooks
from fractal._engine.below import Below, origin_of
from fractal._engine.duplicates import Duplicates
from fractal._engine.journaled import JournaledRun, journaled
from fractal._engine.observers import Brief, companions_of, interested, tell_all
from fractal._engine.pricing import Prices, prices_of_library
from fractal._engine.run_result import result_of, sound
from fractal._engine.window import WindowView
from fractal._event import event_of
from fractal._log import log
from fractal._texts import said_by
from fractal.context import RunContext
from fractal.errors import BudgetExceeded, DepthExceeded, LimitReached, RunError, StopReason
from fractal.events import Event, LimitHit, Observer, RunFinished, RunObserver, RunStarted, WarningRaised
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

_CLOCK_SLACK = 0.002
"""Seconds by which a deadline may fire early: uvloop's clock counts whole milliseconds."""

_A_TURN = 0.1
"""Seconds after its time in which an event loop has long seen to a deadline, if it sees to anything."""

_is_full = attrgetter("is_full")


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
        "_clock",
        "_deadline_around",
        "_depth_limit",
        "_identity",
        "_observers",
        "_offer",
        "_own_deadline",
        "_task",
        "_was_closing",
        "abandoned",
        "agent",
        "answer",
        "approve",
        "below",
        "budget",
        "companions",
        "current_task",
        "deps",
        "depth",
        "duplicates",
        "empty_replies",
        "feeds",
        "hooks",
        "iterations",
        "journaled",
        "limits",
        "now",
        "offered",
        "open_calls",
        "origin",
        "own_companions",
        "parent",
        "prices",
        "result",
        "run_id",
        "scope",
        "seen",
        "settings",
        "soft_deadline",
        "started",
        "system",
        "token",
        "tool_results",
        "transcript",
        "waited_for",
        "warnings",
        "window",
    )

    def __init__(self, settings: RunSettings, transcript: Transcript) -> None:
        self._join_loop()
        self.origin = origin = origin_of(self.current_task())
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
        self.prices: Prices | None = settings.prices or (parent.prices if parent else prices_of_library())
        self.offered: frozenset[str] | None = None  # names, where a hook has changed what one request offers
        self.offer_tools()
        window = settings.window
        self.window = WindowView(window, transcript, context=self.hook_context, warn=self.warn) if window else None
        self.system: str | None = None
        self.iterations = self.empty_replies = self.seen = 0  # seen: messages that observers have been told of
        self.tool_results: list[ToolResult] = []
        self.abandoned: list[ToolResult] = []
        self.warnings: list[str] = []
        self._join_listeners(settings, parent)
        depth_limit: float = self.depth + (self.limits.max_depth or 0)
        self._depth_limit: float = min(depth_limit, parent._depth_limit) if parent is not None else depth_limit
        self.result: AgentResult | None = None
        self.open_calls: dict[str, _OpenCall] = {}  # of tools that are at work
        self._task: object = None
        self.below = Below()
        self._begun_by: str | None = None  # the call of the run above
        is_journaled = settings.durable is not None or (parent is not None and parent.journaled is not None)
        self.journaled: JournaledRun | None = journaled(self) if is_journaled else None
        for watch in run_watchers:
            watch(self)

    def _join_loop(self) -> None:
        self.token = token = current_token()
        # Asked many times in each run. AnyIO looks for the backend each time, and its backend for the loop, which has a
        # clock itself on asyncio.
        self.now: Callable[[], float] = getattr(token.native_token, "time", token.backend_class.current_time)
        self.current_task = current_task_of(token)
        self.started, self._clock = self.now(), time.monotonic()
        self.scope = token.backend_class.create_cancel_scope()  # around all that the run does
        self._deadline_around = math.inf  # the nearest around that
        self.soft_deadline = self._own_deadline = math.inf  # the latter: the nearest of the runs' own
        self._was_closing = False
        self.waited_for: str | None = None  # what it was waiting for when its time was over

    def _join_listeners(self, settings: RunSettings, parent: Run | None) -> None:
        self._observers: tuple[Observer, ...] = parent._observers if parent else ()
        self.companions: tuple[RunObserver, ...] = parent.companions if parent else ()  # those that take part in it
        self.own_companions: tuple[RunObserver, ...] = ()
        if settings.observers:
            self._add_observers(settings.observers)
        self.feeds: tuple[Inlet[Event], ...] = ()
        if parent is not None:
            is_same_loop = parent.is_same_loop(self)
            self.feeds = parent.feeds if is_same_loop else tuple(feed.for_other_loop() for feed in parent.feeds)
        self._identity: dict[str, Any] = {  # what every event says
            "run_id": self.run_id,
            "parent_id": parent.run_id if parent else None,
            "agent_name": settings.agent_name,
            "depth": self.depth,
        }

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
                warn=self.warn,
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
    def elapsed(self) -> float:
        """Seconds since the run was made."""
        return self.now() - self.started

    @property
    def messages(self) -> list[Message]:
        """The transcript so far."""
        return self.transcript.messages

    @property
    def deadline(self) -> float:
        """The nearest of the deadlines of the run and around it."""
        return min(self.scope.deadline, self._deadline_around)

    @property
    def own_deadline(self) -> float:
        """The nearest of the deadlines of the run and of those above it; a caller's scope does not count."""
        return self._own_deadline

    def time_left(self) -> float:
        """Seconds until the deadline of the run or of the run above; infinity without one.

        The scopes of the run above need not reach it: a task of the user's own has begun it, or another event loop. If
        that run's time is over already, it is in what cleans up after it, which has its grace.
        """
        left = self.settings.timeout if self.settings.timeout is not None else math.inf
        parent = self.parent
        if parent is not None and not self.origin.is_enclosed and (deadline := parent.deadline) != math.inf:
            now = self.now() if parent.is_same_loop(self) else parent.started + time.monotonic() - parent._clock
            if deadline > now + _CLOCK_SLACK:
                left = min(left, deadline - now)
        return left

    @property
    def has_begun(self) -> bool:
        """Whether the run has begun, and so will have an end."""
        return self._task is not None

    def start_clock(self, deadline_around: float = math.inf) -> None:
        """Start the run's clock; called in the task that begins the run.

        Args:
            deadline_around: The nearest deadline around its scope. A task of the run's own has none.
        """
        self._deadline_around = deadline_around
        left, timeout, parent = self.time_left(), self.settings.timeout, self.parent
        if left != math.inf:
            self.scope.deadline = self.started + left
            self._own_deadline = self.started + timeout if timeout is not None else math.inf
        if parent is not None:
            above = parent._own_deadline if parent.is_same_loop(self) else self.scope.deadline
            self._own_deadline = min(self._own_deadline, above)
            self._begun_by = parent.open_call_id()

    def keep_deadline(self, left: float) -> None:
        """Keep the deadline that the run had in a process that has ended, if it is nearer; before the run begins.

        Args:
            left: Seconds until then.
        """
        deadline = self.now() + left
        self.scope.deadline = min(self.scope.deadline, deadline)
        self._own_deadline = min(self._own_deadline, deadline)

    def enter(self) -> None:
        """Make this the current run of its task; `scope` is entered next."""
        if self.limits.reserve:
            self.soft_deadline = self.deadline - self.limits.reserve
        self._task = self.current_task()
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
        if self.has_listeners:
            try:
                await self.pace()
            finally:
                self._tell_beginning()  # also a run that is cancelled here has a beginning
            await self.pace()
        if self.parent is not None and self.depth > self.parent._depth_limit:
            raise DepthExceeded(int(self.parent._depth_limit))

    def _tell_beginning(self) -> None:
        *history, message = copied_messages(self.transcript.messages[: self.seen or None])
        self.seen = len(history) + 1
        facts = {"call_id": self._begun_by, "limits": self.limits, "timeout": self.settings.timeout}
        self.emit(RunStarted, message=message, history=history, **facts)

    @property
    def is_cut(self) -> bool:
        """Whether a scope around the current task is cancelled."""
        return self.token.backend_class.current_effective_deadline() == -math.inf

    async def stop_if_cancelled(self) -> None:
        """Let a cancellation that is meant for the caller arrive; without one, go on at once."""
        # As the function of that name, which looks for the backend each time.
        if self.token.backend_class.current_effective_deadline() == -math.inf:
            await checkpoint()

    async def hear_clock(self) -> None:
        """Let the deadline cancel the run if it has passed: a tool may have blocked the event loop until now."""
        deadline = self.deadline
        if self.now() >= deadline:
            while not self.is_cut and self.now() < deadline + _A_TURN:
                await checkpoint()
            await checkpoint()

    async def hear(self) -> None:
        """Let a cancellation of the calling task arrive that was made before this call."""
        for _ in range(2):  # turns of the loop: one until that task hears of it, one until this one does
            await checkpoint()

    def cut(self) -> None:
        """Stop the run's calls, and what is below it, when it is cancelled and has yet to notice."""
        for call in self.open_calls.values():
            call.stop(self.now())
        self.below.cancel()
        if self.journaled is not None:
            self.journaled.cut()

    def cancel(self) -> None:
        """Cancel the run, and what is below it."""
        self.scope.cancel()
        self.cut()

    def is_out_of_time(self) -> bool:
        """Whether the timeout of this run, or of one above it, is over; a caller's scope does not count."""
        return self.has_come(self._own_deadline)

    def has_come(self, moment: float) -> bool:
        """Whether a deadline has passed."""
        return self.now() + _CLOCK_SLACK >= moment

    def has_until(self, deadline: float) -> None:
        """Note that the deadline around the run has moved to a later time."""
        self._deadline_around = max(self._deadline_around, deadline)
        self.scope.deadline = min(self.scope.deadline, self._own_deadline)  # which may be that of an earlier process
        for call in self.open_calls.values():
            call.follow()

    def delay(self, seconds: float) -> None:
        """Make the run's own deadlines so much later; a negative number makes them earlier."""
        self._own_deadline += seconds
        self.scope.deadline += seconds
        self.soft_deadline += seconds

    def waiting(self, what: str) -> AbstractContextManager[None]:
        """A block around a wait, for the error to say so if the run's time is over meanwhile."""
        return waiting(what, self._note_wait)

    def _note_wait(self, what: str) -> None:
        if self.is_out_of_time():  # not if only one of several models was cut
            self.waited_for = what

    def is_closing(self) -> bool:
        """Whether only the time for a final answer is left."""
        return self.soft_deadline < math.inf and self.now() >= self.soft_deadline

    def final_reason(self) -> StopReason:
        """The stop reason of a run that the next reply answers; emits an event when it changes."""
        if self.is_closing() and not self._was_closing:
            self._was_closing = True
            self.emit(LimitHit, limit="soft_deadline", message="only the time for a final answer is left")
        return "soft_deadline" if self._was_closing else "finished"

    def context(self, *, tool_name: str | None = None, call_id: str | None = None) -> RunContext[Any]:
        """The context that tools and prompt functions get."""
        return RunContext(self, tool_name=tool_name, call_id=call_id)

    def hook_context(self) -> RunContext[Any]:
        """The context that a hook called now gets."""
        context = self.context()
        context.started()
        return context

    async def tell(self, kind: Callable[..., Event], **facts: Any) -> None:
        """Emit an event, and wait before and after it for whoever reads the run as a stream."""
        if not self.feeds:
            self.emit(kind, **facts)
            return
        await self.pace()
        self.emit(kind, **facts)
        await self.pace()

    async def pace(self) -> None:
        """Wait until whoever reads the run as a stream has room for one more event."""
        while self.is_held:
            for feed in self.feeds:
                await feed.room()

    async def pace_in_time(self) -> None:
        """Wait as `pace` does, but no longer than there is time: a slow reader must not lose what has been found."""
        if self.is_held:
            with anyio.CancelScope(deadline=anyio.current_effective_deadline() - 2 * _CLOCK_SLACK):
                await self.pace()

    @property
    def is_held(self) -> bool:
        """Whether a reader's feed is full."""
        return any(map(_is_full, self.feeds))

    @property
    def has_listeners(self) -> bool:
        """Whether an observer, a stream or the log takes events; those that cost something are made only then."""
        return bool(self._observers or self.feeds) or log.is_debugging()

    def emit(self, kind: Callable[..., Event], **facts: Any) -> None:
        """Hand an event to observers, streams and the log without waiting; costs nothing without listeners."""
        is_logging = log.is_debugging()
        if not self._observers and not self.feeds and not is_logging:
            return
        event = event_of(kind, self._identity, facts)
        if is_logging:
            log.debug(Brief(event))
        tell_all(self._observers, event, self._warn_of_observer)
        for feed in self.feeds:
            feed.put(event)

    def _warn_of_observer(self, message: str) -> None:
        """Note a warning about an observer, once and without an event, which would go to that observer too."""
        if message not in self.warnings:
            log.warning(message)
            self.warnings.append(message)

    def add_observer(self, observer: Observer) -> None:
        """Add an observer of this run and of those below it."""
        self._add_observers((observer,))

    def _add_observers(self, observers: tuple[Observer, ...]) -> None:
        own = interested(observers, self._observers)
        if not own:
            return
        taking_part = companions_of(own)
        self._observers = (*own, *self._observers)
        self.own_companions += taking_part
        self.companions = (*taking_part, *self.companions)

    def note_limit(self, error: LimitReached) -> None:
        """Emit that a limit was hit."""
        limit = error.resource if isinstance(error, BudgetExceeded) else error.stop_reason
        self.emit(LimitHit, limit=limit, message=said_by(error))

    def warn(self, message: str) -> None:
        """Note something odd, here and in the runs above."""
        log.warning(message)
        self.emit(WarningRaised, message=message)
        run: Run | None = self
        while run is not None:
            run.warnings.append(message)
            run = run.parent

    def take_id(self, run_id: str) -> None:
        """Take an id that is known already; before the run begins."""
        self.run_id = self._identity["run_id"] = run_id

    def is_same_loop(self, other: Run) -> bool:
        """Whether another run is in the event loop of this one."""
        return self.token.native_token is other.token.native_token

    @property
    def is_here(self) -> bool:
        """Whether the event loop of the run is that of this thread."""
        token = self.token
        try:
            # Not AnyIO's function of that name, which looks for the backend first.
            return bool(token.backend_class.current_token() is token.native_token)
        except RuntimeError:  # another backend's loop
            return False

    def warn_late(self, message: str) -> None:
        """Warn, in any thread, in the nearest run upwards that has not ended, of what comes after this one's end.

        With none left, or no event loop, the log alone has it.
        """
        run: Run | None = self
        while run is not None and run.result is not None:
            run = run.parent
        try:
            if run is None:
                log.info(message)
            else:
                run.token.backend_class.run_sync_soon(run._warn_or_pass_on, (message,), run.token.native_token)
        except anyio.RunFinishedError:  # the loop has ended
            log.info(message)

    def _warn_or_pass_on(self, message: str) -> None:
        if self.result is None:
            self.warn(message)
        else:
            self.warn_late(message)

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
            self.note_limit(error)
        error = sound(error)
        error.result = result = result_of(self, said_by(error), error.stop_reason, error)
        return self._end(result)

    def _end(self, result: AgentResult) -> AgentResult:
        self.result = result
        # The run above is still to be told of the answer.
        shown = with_own_content(result) if self.parent is not None and self.has_listeners else result
        self.emit(RunFinished, result=shown)
        return result
