"""`Trace`: the events that a `TracingKit` gives."""

from __future__ import annotations

from fractal.tracing.record import TraceEvent

__all__ = ["Trace"]


class Trace(list[TraceEvent]):
    """Events of a trace: a list that a notebook shows as a tree of what happened, with a bar of time for each part."""

    def _repr_html_(self) -> str:
        from fractal.tracing.notebook import of_trace

        return of_trace(self)
