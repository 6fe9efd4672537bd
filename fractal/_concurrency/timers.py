"""Timers of event loops, for what is started later without a task that waits until then."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from contextvars import Context, copy_context
from functools import partial
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary

if TYPE_CHECKING:
    from anyio.lowlevel import EventLoopToken

__all__ = ["Delay"]

_Waiting = OrderedDict[object, tuple[float, Context, Callable[[], object]]]


class Delay:
    """A delay after which functions are called; an event loop has one timer for all of them.

    So one that is stopped soon, as most are, costs an entry of a dict and no timer of its own.

    Args:
        seconds: How long it is.
    """

    def __init__(self, seconds: float) -> None:
        self._seconds = seconds
        self._waiting: WeakKeyDictionary[object, _Waiting] = WeakKeyDictionary()
        """What waits in each event loop whose timer runs, the oldest first."""

    def call(self, function: Callable[[], object], token: EventLoopToken) -> Callable[[], object]:
        """Call a function after the delay, in the caller's context; at once if event loops have no timers, as on trio.

        Args:
            function: What to call; that must neither raise nor wait.
            token: The event loop that runs here.

        Returns:
            What keeps the function from being called, if it has not been.
        """
        loop: Any = token.native_token
        if not hasattr(loop, "call_later"):  # AnyIO has no timer, and asyncio must not be imported where trio runs
            function()
            return lambda: None
        waiting = self._waiting.get(loop)
        if waiting is None:
            waiting = self._waiting[loop] = OrderedDict()
            loop.call_later(self._seconds, self._look, loop, context=Context())  # of none of those who wait
        key = object()
        waiting[key] = (loop.time() + self._seconds, copy_context(), function)
        return partial(waiting.pop, key, None)

    def _look(self, loop: Any) -> None:
        """Call the functions whose delay is over, and set the timer for the next one."""
        waiting, now = self._waiting[loop], loop.time()
        while waiting:
            key, (due, context, function) = next(iter(waiting.items()))
            if due > now:
                loop.call_at(due, self._look, loop, context=Context())
                return
            del waiting[key]
            context.run(function)
        del self._waiting[loop]
