"""A journal in memory, for tests."""

from __future__ import annotations

from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager

from anyio.lowlevel import checkpoint

from fractal._concurrency.forks import lock
from fractal.durable._waiting import checked_wait
from fractal.errors import RunInProgress
from fractal.journal import StepKey

__all__ = ["MemoryJournal"]


class MemoryJournal:
    """A journal that lasts as long as its object: for tests, and to see what is recorded.

    Args:
        wait: As that of `SQLiteJournal`.

    Attributes:
        wait: As given.
        runs: The records of each run, by its id: JSON texts by the texts of their keys, in the order of writing.

    Example:
        >>> import anyio
        >>> from fractal import BaseAgent
        >>> from fractal.testing import ScriptedModel
        >>> journal = MemoryJournal()
        >>> async def greet():
        ...     agent = BaseAgent("Greeter", "You greet.", client=ScriptedModel(["hello"]))
        ...     return [await agent.run("hi", journal=journal, run_id="first") for _ in range(2)]
        >>> [result.content for result in anyio.run(greet)]
        ['hello', 'hello']
    """

    def __init__(self, *, wait: float = 0.0) -> None:
        self.wait = checked_wait(wait)
        self.runs: dict[str, dict[str, str]] = {}
        self._open: set[str] = set()
        self._lock = lock()

    @asynccontextmanager
    async def open(self, run_id: str) -> AsyncGenerator[_OpenInMemory]:
        """Open the journal of a run, for the caller alone.

        Raises:
            RunInProgress: Somebody else has it open.
        """
        with self._lock:
            if run_id in self._open:
                raise RunInProgress(run_id, "another task of this process")
            self._open.add(run_id)
        try:
            yield _OpenInMemory(self.runs, run_id)
        finally:
            self._open.discard(run_id)


class _OpenInMemory:
    """The records of one run, while somebody is at work on it."""

    def __init__(self, runs: dict[str, dict[str, str]], run_id: str) -> None:
        self._runs, self._run_id = runs, run_id

    def recall(self, key: StepKey) -> str | None:
        """The record of that key, or None."""
        return self._runs.get(self._run_id, {}).get(str(key))

    async def record(self, key: StepKey, text: str) -> None:
        """Keep a record."""
        await checkpoint()
        records = self._runs.setdefault(self._run_id, {})
        assert str(key) not in records, f"{key} is recorded twice"
        records[str(key)] = text

    async def mark(self, key: StepKey, text: str) -> None:
        """Keep a record in the place of an earlier one."""
        await checkpoint()
        self._runs.setdefault(self._run_id, {})[str(key)] = text
