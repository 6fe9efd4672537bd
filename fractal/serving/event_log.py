"""`EventLog`: the events of a run as far as they are kept, for readers that come late, leave and come back."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import AsyncGenerator, Iterable
from typing import Any, NamedTuple

import anyio

from fractal._json import decode
from fractal.serving.wire import skipped_json

__all__ = ["EventLog", "LoggedEvent"]

BYTES_AT_ONCE = 2**16
"""Bytes of events that a reader takes at a time, unless one event is longer."""


class LoggedEvent(NamedTuple):
    """One event of a run, as clients see it.

    Attributes:
        number: Its position among the events of the run, from 1.
        kind: What it is.
        json: All of it.
    """

    number: int
    kind: str
    json: bytes

    @property
    def data(self) -> dict[str, Any]:
        """The event as a dict."""
        data: dict[str, Any] = decode(self.json)
        return data


_ANEW = frozenset({"model_requested", "events_skipped"})
"""Events with which the text of a reply begins, or that tell all of it so far."""

_OF_TEXT = _ANEW | {"text_delta"}


class EventLog:
    """A bounded log that many readers read, each at its own pace; writing never waits.

    Args:
        run_id: Whose events these are.
        max_events: Events that are kept.
        max_bytes: Bytes of JSON that are kept; the last event is kept in any case.

    Attributes:
        run_id: Whose events these are.
    """

    def __init__(self, run_id: str, *, max_events: int, max_bytes: int) -> None:
        self.run_id, self._max_events, self._max_bytes = run_id, max_events, max_bytes
        self._events: deque[LoggedEvent] = deque()
        self._news: anyio.Event | None = None
        self._last = self._bytes = 0
        self._anew = 0
        """Number of the newest event that tells the text from its beginning."""
        self._text_dropped = 0
        """Characters of the text that are told by no event any more, since one that told it from its beginning."""
        self._is_closed = False
        self._pieces: list[str] = []

    @classmethod
    def of_events(cls, run_id: str, events: Iterable[LoggedEvent], text: str) -> EventLog:
        """The log of a run that has ended.

        Args:
            run_id: The run.
            events: Those that were kept.
            text: What the model wrote last.
        """
        log = cls(run_id, max_events=0, max_bytes=0)
        log._events.extend(events)
        log._last, log._pieces, log._is_closed = log._events[-1].number if log._events else 0, [text], True
        return log

    @property
    def last(self) -> int:
        """Number of the newest event; 0 before the first."""
        return self._last

    @property
    def events(self) -> tuple[LoggedEvent, ...]:
        """The events that are kept now."""
        return tuple(self._events)

    @property
    def to_keep(self) -> tuple[LoggedEvent, ...]:
        """The events for a reader from the beginning, for the time after the run: a gap, if there is one, and these."""
        return (*self._gap_before(0), *self._events)

    @property
    def text(self) -> str:
        """What the model has written of the reply that it is writing, or wrote last."""
        if len(self._pieces) > 1:
            self._pieces = ["".join(self._pieces)]
        return self._pieces[0] if self._pieces else ""

    def begin_reply(self) -> None:
        """Note that the text of another reply begins."""
        self._pieces = []

    def add_text(self, text: str) -> None:
        """Note a piece of the reply's text."""
        self._pieces.append(text)

    def add(self, kind: str, json: bytes) -> None:
        """Add an event, and drop the oldest if there are too many."""
        self._last += 1
        event = LoggedEvent(self._last, kind, json)
        self._events.append(event)
        if kind in _ANEW and self._is_own(event):
            self._anew = self._last
        self._bytes += len(json)
        while len(self._events) > 1 and (len(self._events) > self._max_events or self._bytes > self._max_bytes):
            self._drop()
        self._tell()

    def _drop(self) -> None:
        event = self._events.popleft()
        self._bytes -= len(event.json)
        if event.kind in _OF_TEXT and self._is_own(event):  # noted now, so that no reader has it counted
            before = 0 if event.kind in _ANEW else self._text_dropped
            self._text_dropped = before + len(event.data.get("text", ""))

    def _is_own(self, event: LoggedEvent) -> bool:
        """Whether an event is of the run itself, and not of one below it."""
        return bool(event.data["run_id"] == self.run_id)

    def close(self) -> None:
        """Mark the end: no more events will come."""
        self._is_closed = True
        self._tell()

    def _tell(self) -> None:
        news, self._news = self._news, None
        if news is not None:
            news.set()

    def after(self, number: int) -> list[LoggedEvent]:
        """The next events after one, one at least if there is any, and no more bytes than are written at once.

        A gap is the first of them if some are no longer kept.
        """
        if not self._events or number >= self._last:
            return []
        if gap := self._gap_before(number):
            return gap
        oldest = self._events[0].number
        taken, size = list[LoggedEvent](), 0
        for index in range(max(number + 1 - oldest, 0), len(self._events)):  # quick near both ends, where readers are
            event = self._events[index]
            size += len(event.json)
            if taken and size > BYTES_AT_ONCE:
                break
            taken.append(event)
        return taken

    def note_gap(self) -> None:
        """Add that events before have not been kept, and nobody has counted them, with the text so far."""
        self.add("events_skipped", skipped_json(self.run_id, time.time(), None, self.text))

    def _gap_before(self, number: int) -> list[LoggedEvent]:
        """The gap between an event and those that are kept; one that is kept stands for itself."""
        if not self._events:
            return []
        oldest, kind, _ = self._events[0]
        if number + 1 >= oldest or kind == "events_skipped":
            return []
        # Where an event that is kept tells the text from its beginning, what stood before belongs to another reply.
        text = "" if self._anew >= oldest else self.text[: self._text_dropped]
        gap = skipped_json(self.run_id, time.time(), oldest - 1 - number, text)
        return [LoggedEvent(oldest - 1, "events_skipped", gap)]

    async def wait(self, number: int) -> bool:
        """Wait for an event after one; False if none will come."""
        while number >= self._last:
            if self._is_closed:
                return False
            self._news = self._news or anyio.Event()
            await self._news.wait()
        return True

    async def read(self, after: int = 0) -> AsyncGenerator[list[LoggedEvent]]:
        """The events after one, as they come, several at a time.

        Args:
            after: Number of the last event that the reader knows; 0 for all.
        """
        while await self.wait(after):
            events = self.after(after)
            after = events[-1].number
            yield events
