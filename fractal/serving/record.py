"""`RunRecord` and `RunStore`: what is kept of runs that have ended."""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

from fractal._checks import is_count
from fractal.errors import InvalidArguments
from fractal.serving.event_log import EventLog, LoggedEvent
from fractal.serving.wire import end_json, skipped_json

if TYPE_CHECKING:
    from collections.abc import Iterator

    from fractal.serving.wire import ApprovalPending, RunState

__all__ = ["MemoryStore", "RunRecord", "RunStore"]


@dataclass(frozen=True, slots=True, kw_only=True)
class RunRecord:
    """What is known of a served run: of one that has ended all there is, of one that goes on how far it is.

    Attributes:
        id: Its id.
        agent: Name by which the agent is served.
        state: Where it is.
        owner: Whose it is; None where everybody is the same.
        created_at: When it was asked for, in seconds since the epoch.
        ended_at: When it ended, or None.
        text: What the model has written of the reply that it is writing, or wrote last.
        pending: Its calls that wait for approval.
        result_json: How it ended, as the JSON of a `RunOutcome`; None before that, or if it never began.
        problem: Why there is no answer, as problem details; None before the end, and after a success.
        events: Its events, as far as they are kept; none before it has ended, and where nobody watched it.
        key: The client's own name of the request that began it; None without, and if its turn never came.
        fingerprint: What another request of that name must have in common with it.
        request_id: Id of the request that began it, or None.
    """

    id: str
    agent: str
    state: RunState
    owner: str | None
    created_at: float
    ended_at: float | None
    text: str
    pending: tuple[ApprovalPending, ...]
    result_json: bytes | None
    problem: dict[str, Any] | None
    events: tuple[LoggedEvent, ...]
    key: str | None
    fingerprint: str
    request_id: str | None

    @property
    def size(self) -> int:
        """The size of the record in bytes, about."""
        return len(self.text) + len(self.result_json or b"") + sum(len(event.json) + 100 for event in self.events)

    @property
    def log(self) -> EventLog:
        """The log of the run's events, for readers: where nobody watched it, a gap and its end."""
        return EventLog.of_events(self.id, self.events or tuple(self._unwatched()), self.text)

    def _unwatched(self) -> Iterator[LoggedEvent]:
        number = 0
        if self.result_json is not None:
            number += 1
            yield LoggedEvent(number, "events_skipped", skipped_json(self.id, self.ended_at, None, self.text))
        end = end_json(self.id, self.ended_at, self.state, self.result_json, self.problem)
        yield LoggedEvent(number + 1, "run_finished", end)

    @property
    def position(self) -> tuple[float, str]:
        """The position of the record among others, by time."""
        return self.created_at, self.id


class RunStore(Protocol):
    """Where runs are kept that have ended; implement it to keep them longer than the process lives."""

    async def save(self, record: RunRecord) -> None:
        """Keep a run that has ended."""
        ...

    async def load(self, run_id: str) -> RunRecord | None:
        """The run of an id; None if it is not kept."""
        ...

    async def find(self, owner: str | None, key: str) -> RunRecord | None:
        """The run that an owner's request of that name began; None if it is not kept."""
        ...

    async def page(self, owner: str | None, before: tuple[float, str] | None, limit: int) -> list[RunRecord]:
        """The newest runs of an owner, the newest first.

        Args:
            owner: Whose.
            before: Only those whose `position` is less; None for all.
            limit: How many at most.
        """
        ...


class MemoryStore:
    """A store in memory, which forgets those that ended first.

    Args:
        max_runs: Runs that are kept.
        max_bytes: Bytes that they may take together, about; the newest run is kept in any case.
    """

    def __init__(self, *, max_runs: int = 1000, max_bytes: int = 64 * 2**20) -> None:
        for name, value in (("max_runs", max_runs), ("max_bytes", max_bytes)):
            if not is_count(value) or not value:
                raise InvalidArguments(f"{name}={value!r}: give a whole number from 1 up")
        self._max_runs, self._max_bytes = max_runs, max_bytes
        self._records: OrderedDict[str, RunRecord] = OrderedDict()
        self._by_key: dict[tuple[str | None, str], str] = {}
        self._bytes = 0

    async def save(self, record: RunRecord) -> None:
        """Keep a run that has ended, and forget the oldest if there are too many."""
        self.keep(record)

    def keep(self, record: RunRecord) -> None:
        """Keep a run as `save` does; where nobody has to await that."""
        self._records[record.id] = record
        self._bytes += record.size
        if record.key is not None:
            self._by_key[record.owner, record.key] = record.id
        while len(self._records) > 1 and (len(self._records) > self._max_runs or self._bytes > self._max_bytes):
            _, oldest = self._records.popitem(last=False)
            self._bytes -= oldest.size
            if oldest.key is not None:
                self._by_key.pop((oldest.owner, oldest.key), None)

    async def load(self, run_id: str) -> RunRecord | None:
        """The run of an id; None if it is not kept."""
        return self._records.get(run_id)

    async def find(self, owner: str | None, key: str) -> RunRecord | None:
        """The run that an owner's request of that name began; None if it is not kept."""
        run_id = self._by_key.get((owner, key))
        return self._records.get(run_id) if run_id is not None else None

    async def page(self, owner: str | None, before: tuple[float, str] | None, limit: int) -> list[RunRecord]:
        """The newest runs of an owner, the newest first."""
        own = (
            each
            for each in self._records.values()
            if each.owner == owner and (before is None or each.position < before)
        )
        return sorted(own, key=lambda each: each.position, reverse=True)[:limit]
