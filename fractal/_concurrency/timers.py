"""Timers of event loops, for what is started later without a task that waits until then."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from anyio.lowlevel import EventLoopToken

__all__ = ["after"]


def after(seconds: float, function: Callable[[], object], token: EventLoopToken) -> Callable[[], object]:
    """Call a function in some time, in the caller's context; at once where event loops have no timers, as on trio.

    Args:
        seconds: How long from now.
        function: What to call; that must neither raise nor wait.
        token: The event loop that runs here.

    Returns:
        What keeps the function from being called, if it has not been.
    """
    loop: Any = token.native_token
    if hasattr(loop, "call_later"):  # AnyIO has no timer, and asyncio must not be imported where trio runs
        cancel: Callable[[], object] = loop.call_later(seconds, function).cancel
        return cancel
    function()
    return lambda: None
