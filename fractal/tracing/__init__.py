"""Seeing what agents did: traces in memory and in files.

All of it is made from the events of runs, by observers. Nothing here is loaded before it is used.
"""

from fractal.tracing.kit import TracingKit as TracingKit
from fractal.tracing.read import TraceReader as TraceReader, TraceUnreadable as TraceUnreadable
from fractal.tracing.record import TraceEvent as TraceEvent

__all__ = ["TraceEvent", "TraceReader", "TraceUnreadable", "TracingKit"]
