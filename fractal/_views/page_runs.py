"""The runs of a page: all of them as rows, and the newest with all that was said, as many as there is room for."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from fractal._views.page_spans import RunSpans
from fractal.tracing import TraceEvent
from fractal.tracing.counts import RunCounts

__all__ = ["PageRuns", "Row"]

MOST_EVENTS = 100_000
"""Events of all runs that a page shows in detail."""

MOST_TEXT = 48 * 2**20
"""Characters of all texts in their details."""

MOST_ROWS = 10_000
"""Runs that have a row."""


@dataclass(slots=True, kw_only=True, eq=False)
class Row(RunCounts):
    """A row of the table of runs.

    Attributes:
        detail: All that was said; None if there was no room for it.
    """

    detail: RunSpans | None = None


class PageRuns:
    """The runs of one or more traces, in the memory that a page takes.

    Attributes:
        older: Runs that have no row.
        without_detail: Runs that have no more than a row.
    """

    def __init__(self) -> None:
        self._rows: dict[tuple[str, str], Row] = {}
        self._detailed: dict[tuple[str, str], Row] = {}
        self._events = self._size = 0  # of these
        self.older = self.without_detail = 0

    def __iter__(self) -> Iterator[Row]:
        return iter(sorted(self._rows.values(), key=lambda row: row.start or 0.0))

    def __len__(self) -> int:
        return len(self._rows)

    def take(self, event: TraceEvent, source: str = "") -> None:
        """Enter an event.

        Args:
            event: The event.
            source: Name of the file it is in.
        """
        key = source, event.run_id or ""
        row = self._rows.get(key)
        if row is None:
            row = self._begin(key, event)
        row.take(event)
        detail = row.detail
        if detail is None:
            return
        before, self._events = detail.size, self._events + 1
        detail.take(event)
        self._size += detail.size - before
        while (self._events > MOST_EVENTS or self._size > MOST_TEXT) and len(self._detailed) > 1:
            self._forget_detail(next(iter(self._detailed)))
        if len(self._detailed) == 1:
            detail.is_full, detail.is_long = self._events > MOST_EVENTS, self._size > MOST_TEXT

    def left_out(self) -> Iterator[str]:
        """Notes about what a page leaves out, a line each."""
        if self.older:
            yield f"{self.older} older runs are not in this page: it shows the newest {MOST_ROWS:,}"
        if self.without_detail:
            yield (
                f"{self.without_detail} older runs have a row and nothing more: a page holds the details of"
                f" {MOST_EVENTS:,} events or {MOST_TEXT >> 20} MB of text; make one of their file alone"
            )
        for row in self:
            if row.detail is not None and row.detail.left_out:
                lost = row.detail.left_out
                yield f"{lost} steps of run {row.run_id} are left out: a page holds {MOST_EVENTS:,} events"
            if row.detail is not None and row.detail.is_long:
                yield f"texts of run {row.run_id} are cut: a page holds {MOST_TEXT >> 20} MB of text"

    def _begin(self, key: tuple[str, str], event: TraceEvent) -> Row:
        row = Row(run_id=key[1], source=key[0], agent=event.agent_name)
        row.detail = RunSpans()
        self._rows[key] = self._detailed[key] = row
        if len(self._rows) > MOST_ROWS:
            oldest = next(iter(self._rows))
            if oldest in self._detailed:
                self._forget_detail(oldest)
            del self._rows[oldest]
            self.older += 1
            self.without_detail -= 1
        return row

    def _forget_detail(self, key: tuple[str, str]) -> None:
        row = self._detailed.pop(key)
        if row.detail is not None:
            self._size -= row.detail.size
        self._events -= row.events
        row.detail = None
        self.without_detail += 1
