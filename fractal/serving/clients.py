"""`Client`: whoever waits for a run, and whether it has gone."""

from __future__ import annotations

import math
from collections.abc import Awaitable, Callable
from typing import TYPE_CHECKING

from fractal._concurrency.background import Background
from fractal._concurrency.timers import Delay

if TYPE_CHECKING:
    import anyio

    from fractal.serving.run import ServedRun

__all__ = ["Client", "Gone"]

Gone = Callable[[], Awaitable[object]]
"""Returns when a client has closed its connection."""

_UNWATCHED = Delay(0.1)
"""The delay after which a client is watched: by a task, which costs a third of what a short run does."""


class Client:
    """A client that waits for a run, until it leaves.

    Args:
        run: The run.
        gone: Returns when the client has closed its connection.

    Attributes:
        has_gone: Whether it has closed its connection.
    """

    def __init__(self, run: ServedRun, gone: Gone) -> None:
        self._run, self._gone = run, gone
        self._scope: anyio.CancelScope | None = None
        self.has_gone = self._has_left = False
        self._watcher: Background[None] | None = None
        run.attach()
        self._stop_timer = _UNWATCHED.call(self._watch, run.token)

    @property
    def scope(self) -> anyio.CancelScope:
        """A scope that is cancelled when it has gone; made where somebody needs it."""
        if self._scope is None:
            self._scope = self._run.token.backend_class.create_cancel_scope()
            if self.has_gone:
                self._scope.cancel()
        return self._scope

    def _watch(self) -> None:
        name = f"client of {self._run.id}"
        self._watcher = Background(self._note_going, name, token=self._run.token, deadline=math.inf)

    async def _note_going(self) -> None:
        await self._gone()
        self.leave(has_gone=True)

    def leave(self, *, has_gone: bool = False) -> None:
        """Wait for the run no longer.

        Args:
            has_gone: Whether it has closed its connection.
        """
        if self._has_left:
            return
        self._has_left = True
        self._stop_timer()
        if has_gone:
            self.has_gone = True
            if self._scope is not None:
                self._scope.cancel()
        self._run.detach()

    async def left(self) -> None:
        """Leave, and wait until nothing watches any more."""
        self.leave()
        if self._watcher is not None:
            await self._watcher.cancel_and_join()
