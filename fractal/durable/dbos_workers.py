"""Workers that look after each other: what one leaves behind that has died, others take over.

Each worker counts up a number in a table, and watches those of the others. One whose number stands still for a while is
dead, and DBOS puts its runs back into their queues: once, whoever asks. Nobody's clock is compared with another one's.
Should the worker only have been asleep, DBOS lets it record nothing more of those runs.
"""

from __future__ import annotations

import threading
import time
import uuid
from importlib import import_module
from typing import Any, NamedTuple

from fractal._concurrency.forks import our_threads
from fractal._log import log
from fractal.durable.dbos_journal import database_of_dbos

__all__ = ["Heart", "forget"]

_TABLE = "fractal_workers"


class _Seen(NamedTuple):
    """The number of another worker, and when it was first seen, by the clock of this process."""

    beat: str
    at: float


class _Table:
    """The table of workers, in the database of DBOS.

    Args:
        database: What DBOS knows of its database.
        app: Name of the application.
        code: Version of the code.
    """

    def __init__(self, database: Any, app: str, code: str) -> None:
        self._engine, self._facts = database.engine, {"app": app, "code": code}
        self._name = f'"{database.schema}".{_TABLE}' if database.schema else _TABLE

    def make(self) -> None:
        """Make the table, if there is none."""
        columns = "app TEXT, code TEXT, id TEXT, beat TEXT, PRIMARY KEY (app, code, id)"
        self._do(f"CREATE TABLE IF NOT EXISTS {self._name} ({columns})")

    def beats(self) -> dict[str, str]:
        """The count of each worker."""
        rows = self._do(f"SELECT id, beat FROM {self._name} WHERE app = :app AND code = :code")
        return {str(one): str(beat) for one, beat in rows}

    def beat(self, worker: str, beat: str) -> None:
        """Write the count of a worker."""
        values = f"INSERT INTO {self._name} (app, code, id, beat) VALUES (:app, :code, :id, :beat)"
        self._do(f"{values} ON CONFLICT (app, code, id) DO UPDATE SET beat = excluded.beat", id=worker, beat=beat)

    def forget(self, worker: str) -> None:
        """Forget a worker."""
        self._do(f"DELETE FROM {self._name} WHERE app = :app AND code = :code AND id = :id", id=worker)

    def _do(self, statement: str, **values: str) -> list[Any]:
        """Execute a statement in a transaction of its own; returns its rows."""
        text = import_module("sqlalchemy").text(statement)
        with self._engine.begin() as connection:
            result = connection.execute(text, {**self._facts, **values} if ":" in statement else {})
            return list(result.fetchall()) if result.returns_rows else []


class Heart:
    """The signs of life of a worker, and its eye on those of others; a thread, from `start` to `stop`.

    Made after DBOS was launched.

    Args:
        app: Name of the application.
        code: Version of the code: who has another one cannot take its runs.
        worker: Id of the worker.
        lease: Seconds without a sign of life after which a worker is dead.
    """

    def __init__(self, app: str, code: str, worker: str, lease: float) -> None:
        self._table = _Table(database_of_dbos(), app, code)
        self._worker, self._lease = worker, lease
        self._token, self._count, self._last = uuid.uuid4().hex, 0, ""
        self._others: dict[str, _Seen] = {}
        self._is_made = False
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._live, name="fractal worker's heart", daemon=True)

    def start(self) -> None:
        """Start the thread."""
        our_threads.add(self._thread)
        self._thread.start()

    def stop(self) -> None:
        """Give no more signs of life; the last one stays, until the worker is forgotten."""
        self._stopping.set()
        self._thread.join()

    def _live(self) -> None:
        while not self._stopping.is_set():
            try:
                if not self._is_made:
                    self._table.make()
                    self._is_made = True
                self._beat()
            except Exception as error:
                if not self._stopping.is_set():
                    log.failure("a worker could not give a sign of life", error)
            self._stopping.wait(self._lease / 3)

    def _beat(self) -> None:
        """Count on, and take over the runs of workers that do not."""
        beats, now = self._table.beats(), time.monotonic()
        if self._last and beats.get(self._worker, self._last) != self._last:
            log.warning(f"another worker has the id {self._worker!r}: give each an id of its own")
        self._count += 1
        self._last = f"{self._token} {self._count}"
        self._table.beat(self._worker, self._last)
        beats.pop(self._worker, None)
        before, self._others = self._others, {}
        for worker, beat in beats.items():
            seen = before.get(worker)
            self._others[worker] = seen = seen if seen is not None and seen.beat == beat else _Seen(beat, now)
            if now - seen.at > self._lease:
                self._take_over(worker)

    def _take_over(self, worker: str) -> None:
        runs = import_module("dbos").DBOS._recover_pending_workflows([worker])
        log.warning(f"worker {worker!r} has died: {len(runs)} of its runs go on elsewhere")
        self._table.forget(worker)


def forget(database: Any, app: str, code: str, worker: str) -> None:
    """Forget a worker that has ended, and handed back its runs.

    Args:
        database: What DBOS knows of its database.
        app: Name of its application.
        code: Version of its code.
        worker: Its id.
    """
    _Table(database, app, code).forget(worker)
