"""Conversations in PostgreSQL, for many machines; needs psycopg 3, which the extra `postgres` brings."""

from __future__ import annotations

from collections.abc import Generator, Iterable, Sequence
from contextlib import contextmanager, suppress
from functools import partial
from importlib import import_module
from typing import Any

from fractal.durable.conversations import Conversations
from fractal.durable.conversations_access import Access
from fractal.durable.conversations_sql import VERSION, Busy, Cursor, Rows
from fractal.errors import InvalidArguments, StoreError, StoreUnavailable, StoreUnreadable

__all__ = ["PostgresConversations"]

_LONGEST_STATEMENT = 30
"""Seconds after which the server gives up a statement."""

_LOCK = 0x66726163
"""Held while the tables are made, so that only one makes them."""

_TABLES = (
    # If somebody was faster, they are there by now.
    "CREATE TABLE IF NOT EXISTS fractal_conversations_version (version integer NOT NULL)",
    'CREATE TABLE IF NOT EXISTS fractal_conversations (id text COLLATE "C" PRIMARY KEY, revision bigint NOT NULL,'
    " mark text NOT NULL, length bigint NOT NULL, size bigint NOT NULL, created float8 NOT NULL,"
    " changed float8 NOT NULL)",
    'CREATE TABLE IF NOT EXISTS fractal_conversation_messages (conversation text COLLATE "C" NOT NULL,'
    " position bigint NOT NULL, message text NOT NULL, run text, PRIMARY KEY (conversation, position))",
)

_INSERT_VERSION = (
    "INSERT INTO fractal_conversations_version SELECT ? WHERE NOT EXISTS (SELECT 1 FROM fractal_conversations_version)"
)


class PostgresConversations(Conversations):
    """Conversations in a PostgreSQL database.

    The tables are made when they are missing. It works on asyncio and on trio: psycopg 3 does its work in worker
    threads, as its own async connections know asyncio alone.

    Args:
        conninfo: What to connect to, as psycopg takes it: `"postgresql://user@host/database"`. It is never shown.
        patience: Seconds to wait for a connection, and while others write.

    Raises:
        InvalidArguments: psycopg is not installed, or that is no connection string.
    """

    def __init__(self, conninfo: str, *, patience: float = 5.0) -> None:
        try:
            psycopg: Any = import_module("psycopg")
        except ImportError as error:
            raise InvalidArguments(f"psycopg 3 is needed: pip install 'fractal-anyio[postgres]' ({error})") from error
        try:
            psycopg.conninfo.conninfo_to_dict(conninfo)
        except (psycopg.Error, TypeError):
            # Its text repeats what was given, in which there may be a password.
            raise InvalidArguments("conninfo: give what psycopg takes: postgresql://user@host/database") from None
        connect = partial(_PostgresRows, psycopg, conninfo, patience)
        super().__init__(Access(_PostgresRows.name, connect, patience))

    def __repr__(self) -> str:
        return "PostgresConversations(…)"


class _PostgresRows(Rows):
    """A connection to a server."""

    name = "PostgreSQL"

    def __init__(self, psycopg: Any, conninfo: str, patience: float) -> None:
        self._psycopg, seconds = psycopg, max(2, round(patience))  # fewer than 2 it does not take
        with self._translated():
            self._connection = psycopg.connect(
                conninfo, autocommit=True, connect_timeout=seconds, application_name="fractal"
            )
        try:
            with self._translated():
                self._set_up(seconds)
        except BaseException:
            self.close()
            raise

    @property
    def is_lost(self) -> bool:
        """Whether the connection is broken."""
        return bool(self._connection.closed)

    def close(self) -> None:
        """Close the connection, however often."""
        self._connection.close()

    def execute(self, statement: str, values: Sequence[Any] = ()) -> Cursor:
        """Execute one statement."""
        cursor: Cursor = self._connection.execute(statement.replace("?", "%s"), values)
        return cursor

    def execute_many(self, statement: str, values: Iterable[Sequence[Any]]) -> None:
        """Execute one statement for each set of values."""
        with self._connection.cursor() as cursor:
            cursor.executemany(statement.replace("?", "%s"), list(values))

    def roll_back(self) -> None:
        """Undo the transaction, if there is one."""
        with suppress(self._psycopg.Error):
            self._connection.rollback()

    @contextmanager
    def transaction(self, *, writes: bool) -> Generator[None]:
        """A block that happens as a whole or not at all."""
        mode = "READ WRITE" if writes else "READ ONLY"
        with self._translated(), self.whole(f"BEGIN ISOLATION LEVEL REPEATABLE READ {mode}"):
            yield

    def _set_up(self, seconds: int) -> None:
        self.execute(f"SET statement_timeout = '{_LONGEST_STATEMENT}s'")
        self.execute(f"SET lock_timeout = '{seconds}s'")
        self.execute(f"SET idle_in_transaction_session_timeout = '{_LONGEST_STATEMENT}s'")
        if not self._has_tables():
            with self.whole("BEGIN"):
                self.execute("SELECT pg_advisory_xact_lock(?)", (_LOCK,))
                for statement in _TABLES:
                    self.execute(statement)
                self.execute(_INSERT_VERSION, (VERSION,))

    def _has_tables(self) -> bool:
        """Whether our tables are there.

        Raises:
            StoreUnreadable: They are of a newer version.
        """
        [(found,)] = self.execute("SELECT to_regclass('fractal_conversations_version')")
        if found is None:
            return False
        versions = [version for (version,) in self.execute("SELECT version FROM fractal_conversations_version LIMIT 2")]
        if versions != [VERSION]:
            raise StoreUnreadable(
                self.name, f"its tables are of version {versions}, and this Fractal knows {VERSION}: take a newer one"
            )
        return True

    @contextmanager
    def _translated(self) -> Generator[None]:
        """A block in which what psycopg raises becomes an error of ours."""
        try:
            yield
        except self._psycopg.Error as error:
            raise self._error_of(error) from error

    def _error_of(self, error: Any) -> StoreError | Busy:
        errors, state = self._psycopg.errors, error.sqlstate
        if isinstance(error, (errors.SerializationFailure, errors.DeadlockDetected, errors.LockNotAvailable)):
            return Busy()
        said = error.diag.message_primary or str(error).splitlines()[0] if str(error) else type(error).__name__
        if state is None or isinstance(error, (self._psycopg.OperationalError, errors.InsufficientPrivilege)):
            return StoreUnavailable(self.name, said)
        return StoreUnreadable(self.name, said)
