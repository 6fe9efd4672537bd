"""The clock of a run: its event loop, its cancel scope and its deadlines."""

from __future__ import annotations

import math
import time
from typing import TYPE_CHECKING

from anyio.lowlevel import checkpoint, current_token

from fractal._concurrency.background import current_task_of, is_loop_here
from fractal._concurrency.scopes import waiting

if TYPE_CHECKING:
    from collections.abc import Callable
    from contextlib import AbstractContextManager

    import anyio
    from anyio.lowlevel import EventLoopToken

__all__ = ["CLOCK_SLACK", "RunClock"]

CLOCK_SLACK = 0.002
"""Seconds by which a deadline may fire early: uvloop's clock counts whole milliseconds."""

_A_TURN = 0.1
"""Seconds after its time in which an event loop has long seen to a deadline, if it sees to anything."""


class RunClock:
    """The clock of one run, made in the event loop that runs it.

    Attributes:
        token: The event loop.
        now: Tells the time of that loop in seconds.
        current_task: Tells the task that runs now.
        started: When the run was made.
        scope: The cancel scope around all that the run does.
        soft_deadline: From when on only the time for a final answer is left.
        own_deadline: The nearest of the deadlines of the run and of those above it; a caller's scope does not count.
        waited_for: What the run was waiting for when its time was over; None if it was not, or was at work.
    """

    __slots__ = (
        "_around",
        "_monotonic",
        "current_task",
        "now",
        "own_deadline",
        "scope",
        "soft_deadline",
        "started",
        "token",
        "waited_for",
    )

    def __init__(self) -> None:
        self.token: EventLoopToken = (token := current_token())
        # Asked many times in each run. AnyIO looks for the backend each time, and its backend for the loop, which has a
        # clock itself on asyncio.
        self.now: Callable[[], float] = getattr(token.native_token, "time", token.backend_class.current_time)
        self.current_task = current_task_of(token)
        self.started, self._monotonic = self.now(), time.monotonic()
        self.scope: anyio.CancelScope = token.backend_class.create_cancel_scope()
        self.soft_deadline = self.own_deadline = self._around = math.inf  # the last: the nearest around the scope
        self.waited_for: str | None = None

    @property
    def elapsed(self) -> float:
        """Seconds since the run was made."""
        return self.now() - self.started

    @property
    def deadline(self) -> float:
        """The nearest of the deadlines of the run and around it."""
        return min(self.scope.deadline, self._around)

    def start(self, timeout: float | None, above: RunClock | None, around: float, *, is_enclosed: bool) -> None:
        """Start the clock; called in the task that begins the run.

        The scopes of the run above need not reach this one: a task of the user's own has begun it, or another event
        loop. If that run's time is over already, it is in what cleans up after it, which has its grace.

        Args:
            timeout: Seconds that the run may take; None: no limit of its own.
            above: The clock of the run above; None without one.
            around: The nearest deadline around the scope. A task of the run's own has none.
            is_enclosed: Whether the scopes of the run above reach this one.
        """
        self._around = around
        left = timeout if timeout is not None else math.inf
        if above is not None and not is_enclosed:
            left = min(left, above._left_for(self))
        if left != math.inf:
            self.scope.deadline = self.started + left
            self.own_deadline = self.started + timeout if timeout is not None else math.inf
        if above is not None:
            its_own = above.own_deadline if above.is_same_loop(self) else self.scope.deadline
            self.own_deadline = min(self.own_deadline, its_own)

    def _left_for(self, below: RunClock) -> float:
        """Seconds that a run below has until this one's deadline; infinity without one, and after it."""
        deadline = self.deadline
        if deadline == math.inf:
            return math.inf
        now = below.now() if self.is_same_loop(below) else self.started + time.monotonic() - self._monotonic
        return deadline - now if deadline > now + CLOCK_SLACK else math.inf

    def keep_deadline(self, left: float) -> None:
        """Keep the deadline that the run had in a process that has ended, if it is nearer; before the run begins.

        Args:
            left: Seconds until then.
        """
        deadline = self.now() + left
        self.scope.deadline = min(self.scope.deadline, deadline)
        self.own_deadline = min(self.own_deadline, deadline)

    def allow_until(self, deadline: float) -> None:
        """Note that the deadline around the run has moved to a later time."""
        self._around = max(self._around, deadline)
        self.scope.deadline = min(self.scope.deadline, self.own_deadline)  # which may be that of an earlier process

    def delay(self, seconds: float) -> None:
        """Make the run's own deadlines so much later; a negative number makes them earlier."""
        self.own_deadline += seconds
        self.scope.deadline += seconds
        self.soft_deadline += seconds

    def is_out_of_time(self) -> bool:
        """Whether the timeout of this run, or of one above it, is over; a caller's scope does not count."""
        return self.has_come(self.own_deadline)

    def has_come(self, moment: float) -> bool:
        """Whether a deadline has passed."""
        return self.now() + CLOCK_SLACK >= moment

    def is_closing(self) -> bool:
        """Whether only the time for a final answer is left."""
        return self.soft_deadline < math.inf and self.now() >= self.soft_deadline

    @property
    def is_cut(self) -> bool:
        """Whether a scope around the current task is cancelled."""
        return self.token.backend_class.current_effective_deadline() == -math.inf

    async def stop_if_cancelled(self) -> None:
        """Let a cancellation that is meant for the caller arrive; without one, go on at once."""
        # As the function of that name, which looks for the backend each time.
        if self.token.backend_class.current_effective_deadline() == -math.inf:
            await checkpoint()

    async def stop_if_late(self) -> None:
        """Let the deadline cancel the run if it has passed: a tool may have blocked the event loop until now."""
        deadline = self.deadline
        if self.now() >= deadline:
            while not self.is_cut and self.now() < deadline + _A_TURN:
                await checkpoint()
            await checkpoint()

    async def let_cancellation_arrive(self) -> None:
        """Let a cancellation of the calling task arrive that was made before this call."""
        for _ in range(2):  # turns of the loop: one until that task hears of it, one until this one does
            await checkpoint()

    def waiting(self, what: str) -> AbstractContextManager[None]:
        """A block around a wait, for the error to say so if the run's time is over meanwhile."""
        return waiting(what, self._note_wait)

    def _note_wait(self, what: str) -> None:
        if self.is_out_of_time():  # not if only one of several models was cut
            self.waited_for = what

    def is_same_loop(self, other: RunClock) -> bool:
        """Whether another run is in the event loop of this one."""
        return self.token.native_token is other.token.native_token

    @property
    def is_here(self) -> bool:
        """Whether the event loop of the run is that of this thread."""
        return is_loop_here(self.token)
