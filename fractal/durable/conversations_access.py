"""The way from an event loop to a store that blocks: worker threads, and patience with others."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import TypeVar

import anyio

from fractal._concurrency.workers import run_in_thread
from fractal.durable.conversations_sql import Busy, Rows
from fractal.errors import InvalidArguments, StoreUnavailable

__all__ = ["Access"]

T = TypeVar("T")

_PAUSE = 0.02


class Access:
    """The way to a store.

    Args:
        name: The store, as errors name it.
        connect: Opens a connection; called in worker threads.
        patience: Seconds to wait while others write.
    """

    def __init__(self, name: str, connect: Callable[[], Rows], patience: float) -> None:
        if isinstance(patience, bool) or not isinstance(patience, (int, float)) or not 0 <= patience < float("inf"):
            raise InvalidArguments(f"patience={patience!r}: give seconds")
        self.name, self.connect, self._patience = name, connect, patience

    async def once(self, operation: Callable[[Rows], T]) -> T:
        """Do something with a connection of its own."""

        def opened() -> T:
            rows = self.connect()
            try:
                return operation(rows)
            finally:
                rows.close()

        return await self.patiently(opened)

    async def patiently(self, operation: Callable[[], T]) -> T:
        """Do something in a worker thread, again while others write.

        Raises:
            StoreUnavailable: They have not let go in time.
            StoreError: What the operation raises.
        """
        deadline = anyio.current_time() + self._patience
        while True:
            try:
                return await run_in_thread(operation, abandon=False)
            except Busy as error:
                if anyio.current_time() >= deadline:
                    reason = f"others write, and have not let go within {self._patience:g} s"
                    raise StoreUnavailable(self.name, reason) from error
            await anyio.sleep(_PAUSE * random.uniform(0.5, 1.5))
