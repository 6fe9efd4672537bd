"""A journal of steps of DBOS: each record is a step of the workflow that the run is.

DBOS knows a step by its number. A record draws the next number when it is kept, and a process that goes on leaves out
the numbers that are taken, so the order in which parallel work ends does not matter: a record is found by its key,
which is the name of its step.

A run that has ended to wait for approval goes on in another workflow, whose journal has the records of those before it.
"""

from __future__ import annotations

import contextvars
import sys
from collections.abc import AsyncGenerator, Callable, Iterable, Sequence
from contextlib import asynccontextmanager
from importlib import import_module
from typing import Any, TypeVar

from fractal._concurrency.forks import lock
from fractal._concurrency.workers import run_in_thread
from fractal._json import is_mapping
from fractal._texts import described, one_line
from fractal.durable._together import Queued, Together
from fractal.errors import JournalUnreadable, RunTakenOver, StoreUnavailable
from fractal.journal import StepKey

__all__ = ["DBOSJournal", "database_of_dbos", "outside", "part_id"]

T = TypeVar("T")

PREFIX = "fractal: "
"""What the names of our steps begin with: a tool may have steps of its own."""

_LONGEST_REASON = 300


async def outside(function: Callable[[], T], *, abandon: bool = True) -> T:
    """Call a blocking function of DBOS in a worker thread, outside of any workflow, of which it would be a step.

    Args:
        function: The function; it blocks for as long as the database cannot be reached.
        abandon: Whether a cancellation leaves it to itself: what changes something is waited for.

    Raises:
        StoreUnavailable: The database does not do it.
    """
    try:
        return await run_in_thread(lambda: contextvars.Context().run(function), abandon=abandon)
    except Exception as error:
        sqlalchemy: Any = sys.modules.get("sqlalchemy")
        if sqlalchemy is None or not isinstance(error, sqlalchemy.exc.SQLAlchemyError):
            raise
        reason = described(getattr(error, "orig", None) or error)  # without the statement and its values
        raise StoreUnavailable("the database of DBOS", one_line(reason, _LONGEST_REASON)) from error


def database_of_dbos() -> Any:
    """What DBOS knows of its database, in this process."""
    return import_module("dbos._dbos")._get_dbos_instance()._sys_db


def part_id(run_id: str, part: int) -> str:
    """The id of the workflow that goes on with a run after so many times of waiting for approval."""
    return f"{run_id}/resumed {part}" if part else run_id


class DBOSJournal:
    """The journal of a run, in the current workflow of DBOS.

    Args:
        dbos: The class `DBOS`.
        run_id: Id of the run.
        part: How many times it has waited for approval, and gone on in another workflow.

    Attributes:
        workflows: Ids of its workflows, of which the current one is the last.
        is_taken_up: Whether it was begun by a workflow or a process before this one; known when it is open.
    """

    def __init__(self, dbos: Any, run_id: str, part: int) -> None:
        self._dbos = dbos
        self.workflows = [part_id(run_id, number) for number in range(part + 1)]
        self.is_taken_up = False

    @asynccontextmanager
    async def open(self, run_id: str) -> AsyncGenerator[_OpenInDBOS]:
        """Open the journal; called inside of the workflow.

        Raises:
            JournalUnreadable: A step is none of a journal.
        """
        *earlier, own = self.workflows
        records = await self._records_of(earlier)
        steps = await self._steps_of(own)
        records |= _texts_of(own, steps)
        self.is_taken_up = bool(records)
        last = max((step["function_id"] for step in steps), default=0)
        while last and self._dbos.reserve_step().step_id < last:  # those numbers are taken
            pass
        yield _OpenInDBOS(self._dbos, run_id, records)

    async def read(self) -> _OpenInDBOS:
        """Read the records of the run's workflows, from outside of them.

        Raises:
            JournalUnreadable: A step is none of a journal.
        """
        return _OpenInDBOS(self._dbos, self.workflows[0], await self._records_of(self.workflows))

    async def _records_of(self, workflows: Iterable[str]) -> dict[str, str]:
        records: dict[str, str] = {}
        for workflow in workflows:
            records |= _texts_of(workflow, await self._steps_of(workflow))
        return records

    async def _steps_of(self, workflow: str) -> list[Any]:
        return await outside(lambda: self._dbos.list_workflow_steps(workflow))


def _texts_of(workflow: str, steps: list[Any]) -> dict[str, str]:
    """The records among the steps of a workflow; of records with one key the last one holds."""
    texts: dict[str, str] = {}
    for step in steps:
        name, text = step["function_name"], step["output"]
        if not name.startswith(PREFIX):
            continue
        records = text if is_mapping(text) else {name.removeprefix(PREFIX): text}
        if not all(isinstance(each, str) for each in records.values()):
            raise JournalUnreadable(f"step {name!r} of workflow {workflow!r} has no text", run_id=workflow)
        texts |= records
    return texts


class _Write(Queued):
    """A record to be kept, and the number that was drawn for it; that of what others write is left out."""

    __slots__ = ("key", "reservation", "text")

    def __init__(self, reservation: Any, key: str, text: str) -> None:
        super().__init__()
        self.reservation, self.key, self.text = reservation, key, text


class _OpenInDBOS:
    """The records of one run, in the process that executes its workflow.

    What parallel calls bring while another record is kept is kept as one step.

    Args:
        dbos: The class `DBOS`.
        run_id: Id of the run.
        records: What has been recorded.
    """

    def __init__(self, dbos: Any, run_id: str, records: dict[str, str]) -> None:
        self._dbos, self._run_id, self._records = dbos, run_id, records
        self._together = Together(lock(), self._keep_all, is_for_all=lambda _: True)

    def recall(self, key: StepKey) -> str | None:
        """The record of that key, or None."""
        return self._records.get(str(key))

    async def record(self, key: StepKey, text: str) -> None:
        """Keep a record in a step of the workflow."""
        one = _Write(self._dbos.reserve_step(), str(key), text)
        await self._together.write(one)
        self._records[one.key] = text

    async def mark(self, key: StepKey, text: str) -> None:
        """Keep a record that takes the place of an earlier one: of steps with one name the last one holds."""
        await self.record(key, text)

    def _keep_all(self, writes: Sequence[_Write]) -> None:
        """Keep records as one step; a single one as its text, by which it was kept before there were several."""
        *others, last = writes
        records = {each.key: each.text for each in writes}
        is_kept = False

        def keep() -> object:
            nonlocal is_kept
            is_kept = True
            return records if others else last.text

        last.reservation.run({"name": f"{PREFIX}{last.key} +{len(others)}" if others else PREFIX + last.key}, keep)
        if not is_kept:  # another process has made this step while this one was asleep, and DBOS gives what it has kept
            raise RunTakenOver(self._run_id)
