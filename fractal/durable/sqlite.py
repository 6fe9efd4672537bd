"""A journal in a file, for any number of processes of one machine."""

from __future__ import annotations

import os
import sqlite3
import threading
import time
import uuid
from collections.abc import AsyncGenerator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any, TypeVar

import anyio

from fractal._checks import is_number
from fractal._concurrency.forks import lock, our_threads
from fractal._concurrency.owners import Owner, this_process
from fractal._concurrency.workers import run_in_thread
from fractal._log import log
from fractal._texts import in_brief, said_by
from fractal.durable._database import Database, Write
from fractal.durable._waiting import checked_wait
from fractal.errors import (
    InvalidArguments,
    JournalError,
    JournalUnreadable,
    RunInProgress,
    RunTakenOver,
)
from fractal.journal import StepKey

__all__ = ["SQLiteJournal"]

T = TypeVar("T")

DEFAULT_LEASE = 15.0
"""Seconds after its last sign of life in which a process counts as alive that nobody can look for."""

_IF_OURS = "FROM fractal_leases WHERE run_id = ?1 AND token = ?4"
_RECORD = f"INSERT INTO fractal_steps (run_id, key, text) SELECT ?1, ?2, ?3 {_IF_OURS}"
_MARK = f"{_RECORD} ON CONFLICT (run_id, key) DO UPDATE SET text = excluded.text"


_held: set[str] = set()
"""The leases of this process, whatever file they are in: one in a file that is not among them was not given back."""


class SQLiteJournal:
    """A journal in a SQLite file, which any number of processes and threads of one machine may use at once.

    What is recorded is on the disk when the run goes on. While a process is at work on a run it holds a lease: another
    one that begins the run gets `RunInProgress`. The lease of a process that has ended is taken over at once; of one
    that nobody can look for, in another container say, when it has given no sign of life for so many seconds.

    The file is opened while runs use it. Not for a network's file system: SQLite's locks do not hold there.

    Args:
        path: The file; it is made, readable for its owner alone, if there is none.
        lease: Seconds without a sign of life after which a process counts as dead.
        wait: Seconds that a run waits while somebody else is at work on it, to return the result of that, or to go on
            with it; no longer than its timeout. 0: it gets `RunInProgress` at once.

    Attributes:
        wait: As given.

    Raises:
        InvalidArguments: An argument cannot be what was meant.

    Example:
        ```python
        journal = SQLiteJournal("runs.db")
        result = await agent.run("Send order 17", journal=journal, run_id="order-17")
        ```
    """

    def __init__(self, path: str | os.PathLike[str], *, lease: float = DEFAULT_LEASE, wait: float = 0.0) -> None:
        try:
            self._path = Path(os.path.abspath(os.fsdecode(path)))  # now: the program may go elsewhere
        except TypeError:
            raise InvalidArguments(f"path={in_brief(path)}: give the path of a file") from None
        if "\0" in str(self._path):
            raise InvalidArguments(f"path={in_brief(path)}: no path has a zero byte in it")
        if not is_number(lease) or not 0 < lease < 1e9:
            raise InvalidArguments(f"lease={in_brief(lease)}: give seconds above 0")
        self._lease, self.wait = float(lease), checked_wait(wait)
        self._database = Database(self._path)
        self._heart = _Heart(self._database, self._lease)

    def __repr__(self) -> str:
        return f"SQLiteJournal({str(self._path)!r})"

    @asynccontextmanager
    async def open(self, run_id: str) -> AsyncGenerator[_OpenInFile]:
        """Open the journal of a run for the caller alone.

        Raises:
            RunInProgress: Somebody else has it open.
            JournalError: It cannot be read.
        """
        opened = _OpenInFile(self._database, self._heart, run_id, self._lease)
        try:
            await run_in_thread(opened.take, abandon=False)
            yield opened
        finally:
            await _done(opened.give_back)

    async def runs(self) -> list[str]:
        """The ids of all runs in the journal, in the order in which they began.

        Raises:
            JournalError: It cannot be read.
        """
        query = "SELECT run_id FROM fractal_steps GROUP BY run_id ORDER BY min(number)"
        return [row[0] for row in await self._read(query)]

    async def records(self, run_id: str) -> dict[str, str]:
        """The records of a run, in the order of writing: JSON texts by the texts of their keys.

        Raises:
            JournalError: It cannot be read.
        """
        query = "SELECT key, text FROM fractal_steps WHERE run_id = ? ORDER BY number"
        return {key: text for key, text in await self._read(query, run_id)}

    async def delete(self, run_id: str) -> bool:
        """Forget a run; returns whether there was one.

        Raises:
            RunInProgress: Somebody is at work on it.
            JournalError: It cannot be written.
        """
        async with self.open(run_id):
            statement = "DELETE FROM fractal_steps WHERE run_id = ?"

            def deleted(connection: sqlite3.Connection) -> bool:
                return connection.execute(statement, (run_id,)).rowcount > 0

            return await self._do(deleted)

    async def _read(self, query: str, *values: str) -> list[Any]:
        def rows(connection: sqlite3.Connection) -> list[Any]:
            return connection.execute(query, values).fetchall()

        return await self._do(rows)

    async def _do(self, work: Callable[[sqlite3.Connection], T]) -> T:
        def inside() -> T:
            self._database.enter()
            try:
                return self._database.transaction(work)
            finally:
                self._database.leave()

        return await run_in_thread(inside, abandon=False)


async def _done(give_back: Callable[[], None]) -> None:
    """Call a function in a worker thread, or here if the task is cancelled before that begins."""
    try:
        with anyio.CancelScope(shield=True):
            await run_in_thread(give_back, abandon=False)
    finally:
        give_back()


class _OpenInFile:
    """The records of one run, while this process is at work on it."""

    def __init__(self, database: Database, heart: _Heart, run_id: str, lease: float) -> None:
        self._database, self._heart, self._run_id, self._lease = database, heart, run_id, lease
        self._token = uuid.uuid4().hex
        self._records: dict[str, str] = {}
        self._is_entered = self._is_taken = False

    def recall(self, key: StepKey) -> str | None:
        """The record of that key, or None."""
        return self._records.get(str(key))

    async def record(self, key: StepKey, text: str) -> None:
        """Keep a record."""
        await self._write(_RECORD, key, text, is_durable=True)
        self._records[str(key)] = text

    async def mark(self, key: StepKey, text: str) -> None:
        """Keep a record in the place of an earlier one."""
        await self._write(_MARK, key, text, is_durable=False)

    async def _write(self, statement: str, key: StepKey, text: str, *, is_durable: bool) -> None:
        values = (self._run_id, str(key), text, self._token)
        one = Write(statement, values, is_durable=is_durable)
        await self._database.write(one)
        if one.is_refused:
            raise RunTakenOver(self._run_id)

    # ---- in worker threads

    def take(self) -> None:
        """Take the lease, and read the records.

        Raises:
            JournalError: Somebody else has the lease, or the file cannot be read.
        """
        self._database.enter()
        self._is_entered = True
        _held.add(self._token)
        for key, text in self._database.transaction(self._take):
            if not isinstance(key, str) or not isinstance(text, str):
                raise JournalUnreadable(f"the record {key!r} of run {self._run_id!r} is no text", run_id=self._run_id)
            self._records[key] = text
        self._is_taken = True
        self._heart.beat_for(self._token)

    def _take(self, connection: sqlite3.Connection) -> list[tuple[Any, Any]]:
        owner = this_process()
        query = "SELECT host, pid, born, expires, token FROM fractal_leases WHERE run_id = ?"
        for host, pid, born, expires, token in connection.execute(query, (self._run_id,)):
            holder = Owner(host, pid, born)
            if not is_number(expires):
                raise JournalUnreadable(f"the lease of run {self._run_id!r} is damaged", run_id=self._run_id)
            is_left = holder == owner and token not in _held
            if expires > time.time() and not is_left and not holder.is_dead():
                raise RunInProgress(self._run_id, str(holder))
        lease = (self._run_id, self._token, owner.host, owner.pid, owner.born, time.time() + self._lease)
        connection.execute("INSERT OR REPLACE INTO fractal_leases VALUES (?, ?, ?, ?, ?, ?)", lease)
        rows = "SELECT key, text FROM fractal_steps WHERE run_id = ? ORDER BY number"
        return connection.execute(rows, (self._run_id,)).fetchall()

    def give_back(self) -> None:
        """Give the lease back, once."""
        if self._is_taken:
            self._is_taken = False
            self._heart.rest(self._token)
            statement = "DELETE FROM fractal_leases WHERE run_id = ? AND token = ?"
            try:
                self._database.transaction(lambda c: c.execute(statement, (self._run_id, self._token)))
            except JournalError as error:  # it ends by itself
                log.warning(f"the lease of run {self._run_id!r} was not given back: {said_by(error)}")
        if self._is_entered:
            self._is_entered = False
            _held.discard(self._token)
            self._database.leave()


class _Heart:
    """The signs of life of a process: a thread that lengthens its leases while it has some.

    Args:
        database: The file of the journal.
        lease: Seconds from one sign of life to the end of the lease.
    """

    def __init__(self, database: Database, lease: float) -> None:
        self._database, self._lease = database, lease
        self._lock = lock()
        self._tokens: set[str] = set()
        self._beating: tuple[threading.Event, threading.Thread] | None = None
        self._process = os.getpid()

    def beat_for(self, token: str) -> None:
        """Keep a lease alive."""
        with self._lock:
            if self._process != os.getpid():  # threads stay in the parent of a fork
                self._tokens, self._beating, self._process = set(), None, os.getpid()
            self._tokens.add(token)
            if self._beating is None:
                stop = threading.Event()
                thread = threading.Thread(target=self._beat, args=(stop,), name="fractal journal", daemon=True)
                self._beating = stop, thread
                our_threads.add(thread)
                thread.start()

    def rest(self, token: str) -> None:
        """Keep a lease alive no longer; the thread ends with the last."""
        with self._lock:
            self._tokens.discard(token)
            beating = self._beating
            if self._tokens or beating is None:
                return
            self._beating = None
        stop, thread = beating
        stop.set()
        thread.join()

    def _beat(self, stop: threading.Event) -> None:
        statement = "UPDATE fractal_leases SET expires = ? WHERE token = ?"
        while not stop.wait(self._lease / 3):
            until = time.time() + self._lease
            values = [(until, token) for token in list(self._tokens)]

            def live_on(connection: sqlite3.Connection, values: list[tuple[float, str]] = values) -> None:
                connection.executemany(statement, values)

            try:
                self._database.transaction(live_on)
            except JournalError as error:
                log.warning(f"a journal gave no sign of life: {said_by(error)}")
