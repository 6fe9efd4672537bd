"""The tree of what happened as HTML, for notebooks."""

from __future__ import annotations

from collections.abc import Iterable

from fractal._html import of_rows
from fractal._views.tree import RunTree
from fractal.events import Event

__all__ = ["of_events"]

_GUIDES = ("└ ", "└ ", "· ", "· ")  # blanks at the beginning would be none in HTML


def of_events(events: Iterable[Event]) -> str:
    """The runs that events tell of, with their requests and calls, as a table."""
    tree = RunTree()
    for event in events:
        tree(event)
    rows = (
        (guides + part.label, part.detail, f"{part.seconds:.2f}", part.outcome or "goes on")
        for guides, part in tree.rows(_GUIDES)
    )
    return of_rows(("what", "about", "seconds", "outcome"), rows)
