"""Conversations as rows: one set of statements for all databases, and what each database adds to them."""

from __future__ import annotations

import secrets
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any, NamedTuple, Protocol

from fractal.errors import ConversationConflict, ConversationExists, ConversationNotFound, StoreError, StoreUnreadable

__all__ = ["VERSION", "Busy", "ConversationInfo", "Head", "Row", "Rows"]

VERSION = 1
"""Of the tables. A store of a newer one is refused, as nobody here knows what it means."""

LONGEST = 64 * 2**20
"""Characters of JSON that one conversation may have."""

_LAST = "\U0010ffff"


@dataclass(frozen=True, slots=True)
class ConversationInfo:
    """What is known of a conversation without reading it.

    Attributes:
        id: Its id.
        revision: Number of times that something was kept.
        length: Number of messages.
        created: When it was made, in UTC.
        changed: When something was kept last, in UTC.
    """

    id: str
    revision: int
    length: int
    created: datetime
    changed: datetime


class Head(NamedTuple):
    """The state of a conversation that a change builds on.

    Attributes:
        revision: A number, for people.
        mark: A text that no other state has had, not even of a conversation with the same id that was deleted.
    """

    revision: int
    mark: str


class Row(NamedTuple):
    """A message as it is kept.

    Attributes:
        text: Its JSON.
        run: Id of the durable run that has said it, or None.
    """

    text: str
    run: str | None


class Busy(Exception):
    """Others write; it may work in a moment."""


class Cursor(Protocol):
    """The cursor of any database."""

    @property
    def rowcount(self) -> int:
        """The number of rows that were changed."""
        ...

    def __iter__(self) -> Iterator[Any]:
        """The rows that were found."""
        ...


class Rows(ABC):
    """A connection to a store, for one thread at a time."""

    name: str
    """The store, as errors name it."""

    @property
    @abstractmethod
    def is_lost(self) -> bool:
        """Whether the connection is of no use any more."""

    @abstractmethod
    def close(self) -> None:
        """Close the connection, however often."""

    @abstractmethod
    def execute(self, statement: str, values: Sequence[Any] = ()) -> Cursor:
        """Execute one statement, with a `?` for each value."""

    @abstractmethod
    def execute_many(self, statement: str, values: Iterable[Sequence[Any]]) -> None:
        """Execute one statement for each set of values."""

    @abstractmethod
    def transaction(self, *, writes: bool) -> AbstractContextManager[None]:
        """Make a block that happens as a whole or not at all, and that sees one state of the store.

        Raises:
            Busy: Others write.
            StoreError: The database does not do it.
        """

    # ---- reading

    def load(self, one: str) -> tuple[Head | None, list[Row]]:
        """Read a conversation; its messages as JSON, and None if there is none."""
        with self.transaction(writes=False):
            row = self._row(one)
            return (Head(row[0], row[1]), self._rows(one, row[2])) if row is not None else (None, [])

    def export(self, one: str) -> tuple[ConversationInfo, list[Row]]:
        """Read a conversation with what is known of it."""
        with self.transaction(writes=False):
            info = self._info(one)
            if info is None:
                raise ConversationNotFound(one)
            return info, self._rows(one, info.length)

    def listed(self, prefix: str, after: str, limit: int) -> list[ConversationInfo]:
        """List conversations by id."""
        wanted = f"{_INFO} WHERE id > ? AND id >= ? AND id < ? ORDER BY id LIMIT ?"
        with self.transaction(writes=False):
            found = self.execute(wanted, (after, prefix, prefix + _LAST, limit))
            return [self._info_of(row) for row in found]

    def require(self, one: str, head: Head | None) -> None:
        """Raise `ConversationConflict` if a conversation is in another state."""
        with self.transaction(writes=False):
            self._require(one, head, self._row(one))

    # ---- writing

    def append(self, one: str, head: Head | None, rows: Sequence[Row]) -> Head:
        """Add messages to a conversation that is in a certain state; returns the next one."""
        new, now = Head((head.revision if head else 0) + 1, secrets.token_hex(16)), time.time()
        with self.transaction(writes=True):
            row = self._row(one)
            self._require(one, head, row)
            length, size = (row[2], row[3]) if row is not None else (0, 0)
            size += sum(len(each.text) for each in rows)
            if size > LONGEST:
                raise StoreError(
                    f"conversation {one!r} would have more than {LONGEST >> 20} Mi characters: begin another, with a"
                    " summary of this one"
                )
            if head is None:
                done = self.execute(_INSERT, (one, *new, len(rows), size, now, now))
            else:
                done = self.execute(_UPDATE, (*new, length + len(rows), size, now, one, head.mark))
            if done.rowcount != 1:  # of two that write at once, the second finds this
                self._require(one, head, self._row(one))
                raise Busy
            self.execute_many(_INSERT_MESSAGE, ((one, length + n, *each) for n, each in enumerate(rows)))
        return new

    def fork(
        self, one: str, other: str, length: int | None, check: Callable[[Sequence[Row]], None]
    ) -> ConversationInfo:
        """Copy the first messages of a conversation, which `check` may refuse, into a new one."""
        with self.transaction(writes=True):
            row = self._row(one)
            if row is None:
                raise ConversationNotFound(one)
            rows = self._rows(one, row[2])
            check(rows)
            rows, now = rows[:length], time.time()
            mark, size = secrets.token_hex(16), sum(len(each.text) for each in rows)
            if self.execute(_INSERT, (other, 1, mark, len(rows), size, now, now)).rowcount != 1:
                raise ConversationExists(other)
            self.execute_many(_INSERT_MESSAGE, ((other, n, each.text, None) for n, each in enumerate(rows)))
        moment = datetime.fromtimestamp(now, UTC)
        return ConversationInfo(other, 1, len(rows), moment, moment)

    def delete(self, one: str) -> bool:
        """Delete a conversation; returns whether there was one."""
        with self.transaction(writes=True):
            self.execute("DELETE FROM fractal_conversation_messages WHERE conversation = ?", (one,))
            return self.execute("DELETE FROM fractal_conversations WHERE id = ?", (one,)).rowcount > 0

    # ---- rows, which anybody may have written

    @contextmanager
    def whole(self, begin: str) -> Generator[None]:
        """A block between a statement that begins a transaction and its end."""
        self.execute(begin)
        try:
            yield
        except BaseException:
            self.roll_back()
            raise
        self.execute("COMMIT")

    @abstractmethod
    def roll_back(self) -> None:
        """Undo the transaction, if there is one; never an error."""

    def _row(self, one: str) -> tuple[int, str, int, int] | None:
        found = [*self.execute("SELECT revision, mark, length, size FROM fractal_conversations WHERE id = ?", (one,))]
        if not found:
            return None
        revision, mark, length, size = found[0]
        if not (_is_count(revision) and _is_count(length) and _is_count(size) and isinstance(mark, str)):
            raise StoreUnreadable(self.name, f"what is known of conversation {one!r} is damaged")
        return revision, mark, length, size

    def _info(self, one: str) -> ConversationInfo | None:
        found = [*self.execute(f"{_INFO} WHERE id = ?", (one,))]
        return self._info_of(found[0]) if found else None

    def _info_of(self, row: Sequence[Any]) -> ConversationInfo:
        one, revision, length, created, changed = row
        try:
            if isinstance(one, str) and _is_count(revision) and _is_count(length):
                moments = [datetime.fromtimestamp(moment, UTC) for moment in (created, changed)]
                return ConversationInfo(one, revision, length, *moments)
        except (TypeError, ValueError, OverflowError, OSError):  # no such moment
            pass
        raise StoreUnreadable(self.name, "what is known of a conversation is damaged")

    def _rows(self, one: str, length: int) -> list[Row]:
        rows, size = list[Row](), 0
        for position, text, run in self.execute(_MESSAGES, (one,)):
            if position != len(rows) or not isinstance(text, str) or not isinstance(run, str | None):
                break
            size += len(text)
            if size > LONGEST:
                raise StoreUnreadable(self.name, f"conversation {one!r} has more than {LONGEST >> 20} Mi characters")
            rows.append(Row(text, run))
        if len(rows) != length:
            raise StoreUnreadable(self.name, f"messages of conversation {one!r} are missing, or too many")
        return rows

    def _require(self, one: str, head: Head | None, row: tuple[int, str, int, int] | None) -> None:
        if (row[1] if row is not None else None) != (head.mark if head is not None else None):
            raise ConversationConflict(one, head.revision if head else 0, row[0] if row else 0)


_INFO = "SELECT id, revision, length, created, changed FROM fractal_conversations"
_INSERT = (
    "INSERT INTO fractal_conversations (id, revision, mark, length, size, created, changed)"
    " VALUES (?, ?, ?, ?, ?, ?, ?) ON CONFLICT DO NOTHING"
)
_UPDATE = (
    "UPDATE fractal_conversations SET revision = ?, mark = ?, length = ?, size = ?, changed = ?"
    " WHERE id = ? AND mark = ?"
)
_MESSAGES = "SELECT position, message, run FROM fractal_conversation_messages WHERE conversation = ? ORDER BY position"
_INSERT_MESSAGE = "INSERT INTO fractal_conversation_messages (conversation, position, message, run) VALUES (?, ?, ?, ?)"


def _is_count(value: object) -> bool:
    return isinstance(value, int) and value >= 0
