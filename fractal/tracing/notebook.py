"""What a notebook shows of a trace: a tree of what happened, with a bar of time for each part."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator

from fractal._html import Markup, bar, card, of_rows
from fractal._json import is_mapping, text_of
from fractal.tracing.record import TraceEvent
from fractal.tracing.spans import Span, Spans

__all__ = ["of_trace"]

_DEEPEST = 20
"""Spans inside each other that are moved to the right."""


def of_trace(events: list[TraceEvent]) -> str:
    """The card of a trace."""
    runs = sum(event.event_type == "agent_start" for event in events)
    spans = _spans_of(events)
    return card(f"<b>{len(events)} events</b>, {runs} agent runs", _timeline(spans) if spans else _table(events))


def _spans_of(events: Iterable[TraceEvent]) -> dict[Span, str]:
    """The runs, tries of requests and calls, each with what it was about."""
    made, about = Spans(), dict[Span, str]()
    for event in events:
        for what, span, _ in made.take(event):
            if span.kind not in ("run", "try", "tool"):
                continue
            if what == "begin":
                about[span] = _about(event)
            elif span.error is not None:
                about[span] = span.error
    for _ in made.finish():  # ends what goes on
        pass
    return about


def _about(event: TraceEvent) -> str:
    given = event.arguments
    if event.event_type == "agent_start" and is_mapping(given):
        return text_of(given.get("user_input"))
    return text_of(event.metadata.get("model") or "") if given is None else text_of(given)


def _timeline(about: dict[Span, str]) -> str:
    times = _times_of(about)
    rows = (
        (
            "· " * min(depth, _DEEPEST) + (span.name if span.kind != "try" else "model"),
            about[span],
            _bar(span, *times[span.root]),
            f"{_end(span) - span.begin:.3f}",
            span.outcome,
        )
        for depth, span in _in_order(about)
    )
    return of_rows(("what", "about", "when", "seconds", "outcome"), rows)


def _times_of(spans: Iterable[Span]) -> dict[str, tuple[float, float]]:
    """The beginning and the end of each run that a user began: each has a scale of its own."""
    times: dict[str, tuple[float, float]] = {}
    for span in spans:
        begin, end = times.get(span.root, (span.begin, _end(span)))
        times[span.root] = min(begin, span.begin), max(end, _end(span))
    return times


def _bar(span: Span, begin: float, end: float) -> Markup:
    whole = max(end - begin, 1e-6)
    return bar((span.begin - begin) / whole, (_end(span) - span.begin) / whole, span.outcome)


def _in_order(spans: Iterable[Span]) -> Iterator[tuple[int, Span]]:
    """The spans as a tree: each with its depth, those above first."""
    below = defaultdict[Span | None, list[Span]](list)
    for span in spans:
        below[span.parent].append(span)
    waiting = [(0, span) for span in reversed(below[None])]
    while waiting:
        depth, span = waiting.pop()
        yield depth, span
        waiting += [(depth + 1, each) for each in reversed(below.get(span, []))]


def _end(span: Span) -> float:
    return span.begin if span.end is None else span.end


def _table(events: list[TraceEvent]) -> str:
    """The events themselves, where none of them takes time."""
    start = events[0].timestamp if events else 0.0
    return of_rows(("seconds", "event", "agent", "said"), (_row_of(event, start) for event in events))


def _row_of(event: TraceEvent, start: float) -> tuple[object, ...]:
    said = event.error or event.metadata.get("message") or ""
    return f"{event.timestamp - start:.3f}", event.event_type, event.agent_name, said
