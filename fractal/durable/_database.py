"""The SQLite file of a journal: opened while it is used, written by one transaction at a time, errors by name."""

from __future__ import annotations

import os
import sqlite3
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, TypeVar

from fractal._concurrency.forks import lock
from fractal.durable._together import Queued, Together
from fractal.errors import JournalError, JournalNotWritten, JournalUnreadable

__all__ = ["Database", "Write"]

T = TypeVar("T")

VERSION = 1
"""Of the tables."""

BUSY_SECONDS = 10.0
"""Seconds that a write waits for those of other processes."""

_SCHEMA = (
    "CREATE TABLE IF NOT EXISTS fractal_meta (name TEXT PRIMARY KEY, version INTEGER NOT NULL)",
    "CREATE TABLE IF NOT EXISTS fractal_leases (run_id TEXT PRIMARY KEY, token TEXT NOT NULL, host TEXT NOT NULL,"
    " pid INTEGER NOT NULL, born TEXT NOT NULL, expires REAL NOT NULL)",
    "CREATE TABLE IF NOT EXISTS fractal_steps (number INTEGER PRIMARY KEY, run_id TEXT NOT NULL, key TEXT NOT NULL,"
    " text TEXT NOT NULL, UNIQUE (run_id, key))",
)

_DAMAGED = {sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB}


class Write(Queued):
    """One statement, written with others in one transaction.

    Args:
        statement: The statement; it changes one row, or fails the write.
        values: Its values.
        is_durable: Whether the disk has to have it when it is done.
    """

    __slots__ = ("is_durable", "is_refused", "statement", "values")

    def __init__(self, statement: str, values: Sequence[Any], *, is_durable: bool) -> None:
        super().__init__()
        self.statement, self.values, self.is_durable = statement, values, is_durable
        self.is_refused = False  # it has changed nothing


class Database:
    """The file of a journal, used from any thread.

    Args:
        path: The file.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._lock = lock()
        self._together = Together(self._lock, self._write_together, _is_for_all)
        self._users = 0
        self._connection: sqlite3.Connection | None = None
        self._process = os.getpid()
        self._synchronous = ""
        self._of_parent: list[sqlite3.Connection | None] = []  # which a forked child must not close

    def enter(self) -> None:
        """Open the file for one more user.

        Raises:
            JournalError: It cannot be opened, or is no journal.
        """
        with self._lock:
            if self._process != os.getpid():
                self._of_parent.append(self._connection)
                self._connection, self._users, self._process = None, 0, os.getpid()
                self._together.forget()
            if self._connection is None:
                self._connection = self._named_errors(self._opened)
            self._users += 1

    def leave(self) -> None:
        """Close the file after its last user."""
        with self._lock:
            self._users -= 1
            if not self._users and self._connection is not None:
                connection, self._connection, self._synchronous = self._connection, None, ""
                with suppress(sqlite3.Error):
                    connection.close()

    def transaction(self, work: Callable[[sqlite3.Connection], T]) -> T:
        """Do something in a transaction of its own.

        Raises:
            JournalError: It could not be done; nothing was changed.
        """
        with self._lock:
            return self._named_errors(lambda: self._within(work, "FULL"))

    async def write(self, one: Write) -> None:
        """Write a statement, in one transaction with those that come at the same time.

        Raises:
            JournalError: It could not be written.
        """
        await self._together.write(one)

    def _write_together(self, writes: Sequence[Write]) -> None:
        level = "FULL" if any(each.is_durable for each in writes) else "NORMAL"
        self._named_errors(lambda: self._within(lambda connection: _write_all(connection, writes), level))

    def _within(self, work: Callable[[sqlite3.Connection], T], synchronous: str) -> T:
        connection = self._connection
        if connection is None:
            raise JournalError(f"the journal {str(self.path)!r} is closed")
        if self._synchronous != synchronous:
            connection.execute(f"PRAGMA synchronous={synchronous}")
            self._synchronous = synchronous
        connection.execute("BEGIN IMMEDIATE")
        try:
            result = work(connection)
            connection.execute("COMMIT")
        except BaseException:
            with suppress(sqlite3.Error):  # SQLite has rolled back by itself, where the disk is full
                connection.execute("ROLLBACK")
            raise
        return result

    def _opened(self) -> sqlite3.Connection:
        with suppress(FileExistsError):  # conversations are nobody else's business
            os.close(os.open(self.path, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o600))
        connection = sqlite3.connect(self.path, timeout=BUSY_SECONDS, isolation_level=None, check_same_thread=False)
        try:
            _prepare(connection)
            self._require_version(connection)
        except BaseException:
            connection.close()
            raise
        return connection

    def _require_version(self, connection: sqlite3.Connection) -> None:
        found = connection.execute("SELECT version FROM fractal_meta WHERE name = 'journal'").fetchone()
        if found is None or not isinstance(found[0], int) or found[0] > VERSION:
            newer = f"of version {found[0]}, and this is written for {VERSION}" if found else "no journal"
            raise JournalUnreadable(f"the journal {str(self.path)!r} cannot be read: it is {newer}")

    def _named_errors(self, work: Callable[[], T]) -> T:
        try:
            return work()
        except JournalError:
            raise
        except (sqlite3.Error, OSError) as error:
            code = getattr(error, "sqlite_errorcode", 0) & 0xFF
            if code in _DAMAGED or isinstance(error, sqlite3.DataError):
                raise JournalUnreadable(
                    f"the journal {str(self.path)!r} is damaged, or not a journal: {error}"
                ) from error
            raise JournalNotWritten(f"the journal {str(self.path)!r} cannot be written: {error}") from error


def _prepare(connection: sqlite3.Connection) -> None:
    until = time.monotonic() + BUSY_SECONDS
    while True:
        try:
            connection.execute("PRAGMA journal_mode=WAL")
            break
        except sqlite3.OperationalError as error:  # another process does so in this moment: SQLite does not wait then
            if (error.sqlite_errorcode & 0xFF) not in (sqlite3.SQLITE_BUSY, sqlite3.SQLITE_LOCKED):
                raise
            if time.monotonic() > until:
                raise
            time.sleep(0.01)
    tables = "SELECT count(*) FROM sqlite_master WHERE name IN ('fractal_meta', 'fractal_leases', 'fractal_steps')"
    if connection.execute(tables).fetchone()[0] == len(_SCHEMA):
        return
    connection.execute("BEGIN IMMEDIATE")
    for statement in _SCHEMA:
        connection.execute(statement)
    connection.execute("INSERT OR IGNORE INTO fractal_meta VALUES ('journal', ?)", (VERSION,))
    connection.execute("COMMIT")


def _write_all(connection: sqlite3.Connection, writes: Sequence[Write]) -> None:
    for each in writes:
        each.is_refused = connection.execute(each.statement, each.values).rowcount != 1


def _is_for_all(error: BaseException) -> bool:
    """Whether an error is one of the file, and not of the statement that was to be written."""
    return isinstance(error.__cause__, (sqlite3.OperationalError, OSError))
