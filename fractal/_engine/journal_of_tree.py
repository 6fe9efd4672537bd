"""The journal of a tree of runs, as its runs use it: records are read, compared and written here, and nowhere else."""

from __future__ import annotations

import json
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar

import anyio

from fractal._json import is_mapping
from fractal._lossless import Unreadable, compact
from fractal._texts import described, one_line
from fractal.errors import JournalError, JournalMismatch, JournalNotWritten, JournalUnreadable
from fractal.journal import Journal, OpenJournal, StepKey

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, Awaitable, Callable

__all__ = ["Durable", "JournalOfTree"]

T = TypeVar("T")

VERSION = 1
"""Of the form of records."""


class Durable(NamedTuple):
    """The journal that a run is given, and the id that it has there.

    Attributes:
        journal: Where it is recorded.
        run_id: Its id.
        opened: The journal of the run, if it is open already.
    """

    journal: Journal
    run_id: str
    opened: OpenJournal | None = None


class JournalOfTree:
    """The journal of a run and of all the runs below it.

    Args:
        durable: Where the first of them is recorded.

    Attributes:
        run_id: Id of the first run.
        deferred: Path and position of the calls that wait for approval, by the ids that answers name.
    """

    def __init__(self, durable: Durable) -> None:
        self.run_id = durable.run_id
        self._journal, self._opened = durable.journal, durable.opened
        self._broken: JournalError | None = None
        self.deferred: dict[str, tuple[str, str]] = {}

    @asynccontextmanager
    async def open(self) -> AsyncGenerator[None]:
        """Open the journal, unless it is open."""
        if self._opened is not None:
            yield
            return
        async with self._journal.open(self.run_id) as self._opened:
            try:
                yield
            finally:
                self._opened = None

    def check(self) -> None:
        """Raise what has broken the journal, as nothing may go on without it.

        Raises:
            JournalError: A record could not be read or kept before.
        """
        if self._broken is not None:
            raise self._broken

    def recall(self, key: StepKey, given: Any = None) -> Any:
        """The value of a record; None without one.

        Args:
            key: Its key, with the name of what the run does there now; without one that does not matter.
            given: What the run gives it now; None if that does not matter.

        Raises:
            JournalMismatch: The record is of something else.
            JournalUnreadable: It is damaged, or of a newer version.
        """
        self.check()
        try:
            text = self._open_journal().recall(key)
            if text is None:
                return None
            record = self._read(key, text)
            if (key.name and key.name != record["name"]) or (given is not None and given != record["given"]):
                now = compact({"name": key.name, "given": given})
                recorded = compact({"name": record["name"], "given": record["given"]})
                raise JournalMismatch(self.run_id, str(key), one_line(recorded, 1000), one_line(now, 1000))
            return record["value"]
        except JournalError as error:
            self._broken = error
            raise

    def _read(self, key: StepKey, text: str) -> dict[str, Any]:
        try:
            record = json.loads(text, parse_constant=_refuse)
        except (ValueError, RecursionError):
            record = None
        if is_mapping(record) and isinstance(record.get("v"), int) and record["v"] > VERSION:
            raise self._unreadable(key, f"it is of version {record['v']}, and this is written for {VERSION}")
        if not is_mapping(record) or not _is_whole(record):
            raise self._unreadable(key, f"it is damaged: {one_line(text, 200)}")
        return dict(record)

    def _unreadable(self, key: StepKey, why: str) -> JournalUnreadable:
        text = f"the record {str(key)!r} of run {self.run_id!r} cannot be read: {why}"
        return JournalUnreadable(text, run_id=self.run_id)

    def read(self, key: StepKey, make: Callable[[], T]) -> T:
        """The object that a recorded value stands for.

        Raises:
            JournalUnreadable: The value is damaged.
        """
        try:
            return make()
        except (Unreadable, LookupError, TypeError, ValueError, AttributeError) as error:
            self._broken = self._unreadable(key, described(error))
            raise self._broken from error

    async def record(self, key: StepKey, given: Any, value: Any) -> None:
        """Keep a record; no cancellation comes between it and its end.

        Raises:
            JournalError: It could not be kept.
        """
        await self._write(self._open_journal().record, key, given, value)

    async def mark(self, key: StepKey, value: Any) -> None:
        """Keep a record that takes the place of an earlier one.

        Raises:
            JournalError: It could not be kept.
        """
        await self._write(self._open_journal().mark, key, None, value)

    async def _write(
        self, write: Callable[[StepKey, str], Awaitable[None]], key: StepKey, given: Any, value: Any
    ) -> None:
        self.check()
        text = compact({"v": VERSION, "name": key.name, "given": given, "value": value})
        try:
            with anyio.CancelScope(shield=True):
                await write(key, text)
        except JournalError as error:
            self._broken = error
            raise
        except Exception as error:
            self._broken = JournalNotWritten(
                f"the journal of run {self.run_id!r} failed: {described(error)}", run_id=self.run_id
            )
            raise self._broken from error

    def _open_journal(self) -> OpenJournal:
        if self._opened is None:
            raise JournalError(f"the journal of run {self.run_id!r} is closed: the run has ended", run_id=self.run_id)
        return self._opened


def _refuse(constant: str) -> None:
    """Refuse what is no JSON, though Python's reader takes it: NaN and the infinities."""
    raise ValueError(constant)


def _is_whole(record: Any) -> bool:
    return is_mapping(record) and record.keys() >= {"v", "name", "given", "value"} and isinstance(record["name"], str)
