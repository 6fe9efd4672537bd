"""A journal of steps of DBOS: each record is a step of the workflow that the run is.

DBOS knows a step by its number. A record draws the next number when it is kept, and a process that goes on leaves out
the numbers that are taken, so the order in which parallel work ends does not matter: a record is found by its key,
which is the name of its step.
"""

from __future__ import annotations

import contextvars
from collections.abc import AsyncGenerator, Callable
from contextlib import asynccontextmanager
from typing import Any, TypeVar

from fractal._concurrency.workers import run_in_thread
from fractal.errors import JournalUnreadable
from fractal.journal import StepKey

__all__ = ["DBOSJournal", "outside"]

T = TypeVar("T")

PREFIX = "fractal: "
"""What the names of our steps begin with: a tool may have steps of its own."""


async def outside(function: Callable[[], T]) -> T:
    """Call a blocking function of DBOS in a worker thread, outside of any workflow, of which it would be a step."""
    return await run_in_thread(lambda: contextvars.Context().run(function), abandon=False)


class DBOSJournal:
    """The journal of the run that the current workflow of DBOS is.

    Args:
        dbos: The class `DBOS`.
    """

    def __init__(self, dbos: Any) -> None:
        self._dbos = dbos

    @asynccontextmanager
    async def open(self, run_id: str) -> AsyncGenerator[_OpenInDBOS]:
        """Open the journal of the workflow with that id; called inside of it.

        Raises:
            JournalUnreadable: A step is none of a journal.
        """
        steps = await outside(lambda: self._dbos.list_workflow_steps(run_id))
        opened = _OpenInDBOS(self._dbos, run_id)
        opened.take(steps)
        yield opened


class _OpenInDBOS:
    """The records of one run, in the process that executes its workflow."""

    def __init__(self, dbos: Any, run_id: str) -> None:
        self._dbos, self._run_id = dbos, run_id
        self._records: dict[str, str] = {}

    def take(self, steps: list[Any]) -> None:
        """Take the records of processes that have ended, and leave out the numbers of all steps that there are."""
        for step in steps:
            name, text = step["function_name"], step["output"]
            if not name.startswith(PREFIX):
                continue
            if not isinstance(text, str):
                raise JournalUnreadable(f"step {name!r} of workflow {self._run_id!r} has no text", run_id=self._run_id)
            self._records[name.removeprefix(PREFIX)] = text
        last = max((step["function_id"] for step in steps), default=0)
        while last and self._dbos.reserve_step().step_id < last:
            pass

    def recall(self, key: StepKey) -> str | None:
        """The record of that key, or None."""
        return self._records.get(str(key))

    async def record(self, key: StepKey, text: str) -> None:
        """Keep a record as the next step of the workflow."""

        async def keep() -> str:
            return text

        await self._dbos.reserve_step().run_async({"name": PREFIX + str(key)}, keep)
        self._records[str(key)] = text

    async def mark(self, key: StepKey, text: str) -> None:
        """Keep a record that takes the place of an earlier one: of steps with one name the last one holds."""
        await self.record(key, text)
