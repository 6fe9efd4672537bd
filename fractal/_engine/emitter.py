"""The emitter of a run: who is told of it, and what it says."""

from __future__ import annotations

from operator import attrgetter
from typing import TYPE_CHECKING, Any, TypeVar

import anyio

from fractal._concurrency.loops import call_soon
from fractal._engine.clock import CLOCK_SLACK
from fractal._engine.observers import Brief, companions_of, helpers_among, interested, settle_all, tell_all
from fractal._event import event_of
from fractal._log import log
from fractal._texts import said_by
from fractal.errors import BudgetExceeded, LimitReached
from fractal.events import LimitHit, WarningRaised

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    from fractal._concurrency.feed import Inlet
    from fractal._engine.clock import RunClock
    from fractal.events import Event, Observer, RunObserver

__all__ = ["Emitter"]

T = TypeVar("T")

_is_full = attrgetter("is_full")


class Emitter:
    """The emitter of one run's events and warnings.

    Args:
        clock: The clock of the run.
        above: The emitter of the run above, whose listeners hear of this run too; None without one.
        observers: The observers of this run.
        identity: What every event says.

    Attributes:
        feeds: The streams that show the run.
        companions: The observers that prepare its calls or give its requests headers, those of the runs above included.
        own_companions: Those of this run that take part in it, be it only at its end.
        warnings: What was odd, here and in the runs below.
        has_ended: Whether the run has its result, so that a warning comes too late for it.
    """

    __slots__ = (
        "_above",
        "_clock",
        "_identity",
        "_observers",
        "companions",
        "feeds",
        "has_ended",
        "own_companions",
        "warnings",
    )

    def __init__(
        self, clock: RunClock, above: Emitter | None, observers: tuple[Observer, ...], identity: dict[str, Any]
    ) -> None:
        self._clock, self._above, self._identity = clock, above, identity
        self._observers: tuple[Observer, ...] = above._observers if above else ()
        self.companions: tuple[RunObserver, ...] = above.companions if above else ()
        self.own_companions: tuple[RunObserver, ...] = ()
        if observers:
            self._add(observers)
        self.feeds: tuple[Inlet[Event], ...] = ()
        if above is not None:
            is_same_loop = above._clock.is_same_loop(clock)
            self.feeds = above.feeds if is_same_loop else tuple(feed.for_other_loop() for feed in above.feeds)
        self.warnings: list[str] = []
        self.has_ended = False

    def add_observer(self, observer: Observer) -> None:
        """Add an observer of this run and of those below it."""
        self._add((observer,))

    def _add(self, observers: tuple[Observer, ...]) -> None:
        own = interested(observers, self._observers)
        if not own:
            return
        taking_part = companions_of(own)
        self._observers = (*own, *self._observers)
        self.own_companions += taking_part
        self.companions = (*helpers_among(taking_part), *self.companions)

    def take_id(self, run_id: str) -> None:
        """Say another id of the run in all events; before the first."""
        self._identity["run_id"] = run_id

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

    async def emit_in_turn(self, kind: Callable[..., Event], **facts: Any) -> None:
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
            with anyio.CancelScope(deadline=anyio.current_effective_deadline() - 2 * CLOCK_SLACK):
                await self.pace()

    @property
    def is_held(self) -> bool:
        """Whether a reader's feed is full."""
        return any(map(_is_full, self.feeds))

    async def let_observers_finish(self, work: Awaitable[T]) -> T:
        """Do the work of the run, then let its own observers finish theirs for it, however the work ends."""
        try:
            result = await work
        except BaseException:
            if not self._clock.is_here:  # pragma: no cover - an event loop that was closed: nothing can be awaited
                raise
            await settle_all(self.own_companions, self._identity["run_id"])
            raise
        await settle_all(self.own_companions, self._identity["run_id"])
        return result

    def emit_limit(self, error: LimitReached) -> None:
        """Emit that a limit was hit."""
        limit = error.resource if isinstance(error, BudgetExceeded) else error.stop_reason
        self.emit(LimitHit, limit=limit, message=said_by(error))

    def warn(self, message: str) -> None:
        """Warn of something odd, here and in the runs above."""
        log.warning(message)
        self.emit(WarningRaised, message=message)
        emitter: Emitter | None = self
        while emitter is not None:
            emitter.warnings.append(message)
            emitter = emitter._above

    def warn_late(self, message: str) -> None:
        """Warn, in any thread, in the nearest run upwards that has not ended, of what comes after this one's end.

        With none left, or no event loop, the log alone has it.
        """
        emitter: Emitter | None = self
        while emitter is not None and emitter.has_ended:
            emitter = emitter._above
        if emitter is None or not call_soon(emitter._clock.token, emitter._warn_or_pass_on, message):
            log.info(message)

    def _warn_or_pass_on(self, message: str) -> None:
        if self.has_ended:
            self.warn_late(message)
        else:
            self.warn(message)

    def _warn_of_observer(self, message: str) -> None:
        """Note a warning about an observer, once and without an event, which would go to that observer too."""
        if message not in self.warnings:
            log.warning(message)
            self.warnings.append(message)
