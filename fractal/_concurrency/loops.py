"""Event loops as other threads and loops see them."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import anyio

if TYPE_CHECKING:
    from anyio.lowlevel import EventLoopToken

__all__ = ["call_soon"]


def call_soon(token: EventLoopToken, function: Callable[..., object], *arguments: object) -> bool:
    """Have an event loop call a plain function soon; works in any thread, and never waits.

    Args:
        token: The event loop.
        function: The function.
        arguments: Its arguments.

    Returns:
        Whether the loop takes it; one that has ended does not.
    """
    try:
        token.backend_class.run_sync_soon(function, arguments, token.native_token)
    except anyio.RunFinishedError:  # not any RuntimeError: a signal handler may raise one in here
        return False
    return True
