"""Conversations in a file of SQLite, which any number of processes of one machine may share."""

from __future__ import annotations

import os
import sqlite3
import stat
from collections.abc import Generator, Iterable, Sequence
from contextlib import closing, contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import Any

from fractal._texts import repr_of
from fractal.durable.conversations import Conversations
from fractal.durable.conversations_access import Access
from fractal.durable.conversations_sql import LONGEST, VERSION, Busy, Rows
from fractal.errors import InvalidArguments, StoreError, StoreUnavailable, StoreUnreadable

__all__ = ["SQLiteConversations"]

_AT_A_STRETCH = 0.1
"""Seconds that a worker thread waits for others, until somebody looks whether the caller was cancelled."""

_PRIVATE = 0o600
_FLAGS: int = sum(getattr(os, name, 0) for name in ("O_NONBLOCK", "O_CLOEXEC"))  # not every system has each

_TABLES = {
    "fractal_conversations_version": "CREATE TABLE fractal_conversations_version (version INTEGER NOT NULL)",
    "fractal_conversations": (
        "CREATE TABLE fractal_conversations (id TEXT NOT NULL PRIMARY KEY, revision INTEGER NOT NULL,"
        " mark TEXT NOT NULL, length INTEGER NOT NULL, size INTEGER NOT NULL, created REAL NOT NULL,"
        " changed REAL NOT NULL) WITHOUT ROWID"
    ),
    "fractal_conversation_messages": (
        "CREATE TABLE fractal_conversation_messages (conversation TEXT NOT NULL, position INTEGER NOT NULL,"
        " message TEXT NOT NULL, run TEXT, PRIMARY KEY (conversation, position))"
    ),
}
_FOUND = (
    "SELECT type, name, sql FROM sqlite_master WHERE name NOT LIKE 'sqlite_%' AND tbl_name COLLATE NOCASE IN"
    f" ({', '.join(map(repr, _TABLES))})"
)


class SQLiteConversations(Conversations):
    """Conversations in a file of SQLite.

    Any number of processes and threads of one machine may use it at a time. A commit is on the disk when it returns.
    The file is made when it is missing, for its owner alone; it may be a database with tables of other things.

    Args:
        path: The file.
        patience: Seconds to wait while others write.

    Example:
        >>> store = SQLiteConversations("talks.db")
    """

    def __init__(self, path: str | os.PathLike[str], *, patience: float = 5.0) -> None:
        if not isinstance(path, (str, os.PathLike)) or not os.fspath(path) or ":memory:" in os.fspath(path):
            raise InvalidArguments(f"path={repr_of(path)}: give the path of a file, which may be missing")
        if "\0" in os.fspath(path):
            raise InvalidArguments(f"path={repr_of(path)}: no path has a null character")
        self._path = Path(path).expanduser().absolute()
        super().__init__(Access(str(self._path), partial(_SQLiteRows, self._path), patience))

    def __repr__(self) -> str:
        return f"SQLiteConversations({str(self._path)!r})"


class _SQLiteRows(Rows):
    """A connection to a file."""

    def __init__(self, path: Path) -> None:
        self.name = str(path)
        self._process = os.getpid()
        with self._translated():
            is_new = _make(path)
            self._connection = sqlite3.connect(
                path, timeout=_AT_A_STRETCH, isolation_level=None, check_same_thread=False
            )
        try:
            with self._translated():
                self._set_up(is_new)
        except BaseException:
            self.close()
            raise

    @property
    def is_lost(self) -> bool:
        """Whether this is a forked child, where the connection is its parent's."""
        return os.getpid() != self._process

    def close(self) -> None:
        """Close the connection, however often."""
        if not self.is_lost:
            self._connection.close()

    def execute(self, statement: str, values: Sequence[Any] = ()) -> sqlite3.Cursor:
        """Execute one statement."""
        return self._connection.execute(statement, values)

    def execute_many(self, statement: str, values: Iterable[Sequence[Any]]) -> None:
        """Execute one statement for each set of values."""
        self._connection.executemany(statement, values)

    def roll_back(self) -> None:
        """Undo the transaction, if there is one."""
        with suppress(sqlite3.Error):
            self._connection.rollback()

    @contextmanager
    def transaction(self, *, writes: bool) -> Generator[None]:
        """A block that happens as a whole or not at all."""
        with self._translated(), self.whole("BEGIN IMMEDIATE" if writes else "BEGIN"):
            yield

    def _set_up(self, is_new: bool) -> None:
        # What somebody else has put into the file must not run here.
        self._connection.setlimit(sqlite3.SQLITE_LIMIT_LENGTH, 4 * LONGEST)
        self.execute("PRAGMA trusted_schema = OFF")
        self.execute("PRAGMA synchronous = FULL")
        if is_new:
            self.execute("PRAGMA journal_mode = WAL")  # readers and a writer do not wait for each other
        if not self._has_tables():
            with self.whole("BEGIN IMMEDIATE"):
                if not self._has_tables():  # nobody was faster
                    for statement in _TABLES.values():
                        self.execute(statement)
                    self.execute("INSERT INTO fractal_conversations_version VALUES (?)", (VERSION,))

    def _has_tables(self) -> bool:
        """Whether our tables are there.

        Raises:
            StoreUnreadable: They are, and are others than ours.
        """
        found = {(kind, name): sql for kind, name, sql in self.execute(_FOUND)}
        if not found:
            return False
        if ("table", "fractal_conversations_version") in found:
            versions = [version for (version,) in self.execute("SELECT * FROM fractal_conversations_version LIMIT 2")]
            if len(versions) == 1 and isinstance(versions[0], int) and versions[0] > VERSION:
                raise StoreUnreadable(
                    self.name, f"it is of version {versions[0]}, and this Fractal knows {VERSION}: take a newer one"
                )
            if versions == [VERSION] and found == {("table", name): sql for name, sql in _TABLES.items()}:
                return True
        raise StoreUnreadable(self.name, "its tables of conversations are not those that Fractal makes")

    @contextmanager
    def _translated(self) -> Generator[None]:
        """A block in which what SQLite raises becomes an error of ours."""
        try:
            yield
        except sqlite3.Error as error:
            raise self._error_of(error) from error
        except OSError as error:
            raise StoreUnavailable(self.name, error.strerror or type(error).__name__) from error

    def _error_of(self, error: sqlite3.Error) -> StoreError | Busy:
        code = getattr(error, "sqlite_errorcode", None)
        kind = code & 0xFF if isinstance(code, int) else None
        if kind in (sqlite3.SQLITE_BUSY, sqlite3.SQLITE_LOCKED):
            return Busy()
        if kind in _AWAY:
            return StoreUnavailable(self.name, str(error))
        return StoreUnreadable(self.name, str(error))


_AWAY = {
    *(sqlite3.SQLITE_FULL, sqlite3.SQLITE_IOERR, sqlite3.SQLITE_READONLY, sqlite3.SQLITE_CANTOPEN),
    *(sqlite3.SQLITE_PERM, sqlite3.SQLITE_AUTH, sqlite3.SQLITE_NOMEM, sqlite3.SQLITE_PROTOCOL),
}


def _make(path: Path) -> bool:
    """Make a file that is missing, for its owner alone; returns whether there is nothing in it yet.

    Raises:
        StoreUnreadable: It is no regular file.
        OSError: It cannot be made or read.
    """
    try:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | _FLAGS, _PRIVATE)
    except IsADirectoryError:
        raise StoreUnreadable(str(path), "it is a directory") from None
    with closing(os.fdopen(descriptor, "rb", closefd=True)) as file:
        facts = os.fstat(file.fileno())
    if not stat.S_ISREG(facts.st_mode):
        raise StoreUnreadable(str(path), "it is no regular file")
    return facts.st_size == 0
