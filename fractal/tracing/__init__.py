"""Seeing what agents did: traces in memory and in files, and OpenTelemetry.

All of it is made from the events of runs, by observers. Nothing here is loaded before it is used.
"""

from typing import TYPE_CHECKING, Any

from fractal.tracing.kit import TracingKit as TracingKit
from fractal.tracing.read import TraceReader as TraceReader, TraceUnreadable as TraceUnreadable
from fractal.tracing.record import TraceEvent as TraceEvent

if TYPE_CHECKING:
    from fractal.tracing.otel import Instrumentation as Instrumentation
else:

    def __getattr__(name: str) -> Any:
        """`Instrumentation`, which needs a library that not everybody has."""
        if name != "Instrumentation":
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        try:
            from fractal.tracing.otel import Instrumentation
        except ModuleNotFoundError as missing:
            if missing.name is None or missing.name.partition(".")[0] != "opentelemetry":
                raise
            raise ImportError("Instrumentation needs OpenTelemetry: pip install opentelemetry-api") from missing
        return Instrumentation


__all__ = ["Instrumentation", "TraceEvent", "TraceReader", "TraceUnreadable", "TracingKit"]
