"""Traces as OTLP JSON lines: the format of OpenTelemetry's file exporter, which Jaeger, Grafana and collectors read."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from typing import Any

import fractal.tracing.names as names
from fractal._json import encode, is_list
from fractal.tracing.exported import ExportedSpan, exported_spans
from fractal.tracing.record import TraceEvent
from fractal.tracing.spans import UNFINISHED

__all__ = ["otlp_lines"]

_SPANS_OF_A_LINE = 100
_LONGEST_LINE = 2**20  # bytes; one span may have more

_KINDS = {names.AGENT: 1, names.CHAT: 3, names.TOOL: 1}  # internal, client
_ERROR = 2
_LAST_SECOND = 2**64 / 1e9


def otlp_lines(events: Iterable[TraceEvent]) -> Iterator[str]:
    """A trace as lines, each of which is an `ExportTraceServiceRequest` with some of its spans.

    Args:
        events: Those of the trace.
    """
    spans: list[bytes] = []
    size = 0
    for step, span in exported_spans(events):
        if step == "end":
            spans.append(encode(_written(span)))
            size += len(spans[-1])
        if len(spans) >= _SPANS_OF_A_LINE or size >= _LONGEST_LINE:
            yield _line(spans)
            spans, size = [], 0
    if spans:
        yield _line(spans)


def _line(spans: list[bytes]) -> str:
    from fractal import __version__

    resource = encode({"attributes": _attributes({"service.name": "fractal"})})
    scope = encode({"name": "fractal", "version": __version__})
    parts = resource, scope, b",".join(spans)
    return (b'{"resourceSpans":[{"resource":%b,"scopeSpans":[{"scope":%b,"spans":[%b]}]}]}' % parts).decode()


def _written(exported: ExportedSpan) -> dict[str, Any]:
    span, operation = exported.span, exported.operation
    written: dict[str, Any] = {
        "traceId": exported.trace_id,
        "spanId": exported.span_id,
        "name": f"{operation} {span.name}" if span.name else operation,
        "kind": _KINDS[operation],
        "startTimeUnixNano": _nanoseconds(span.begin),
        "endTimeUnixNano": _nanoseconds(span.begin if span.end is None else span.end),
        "attributes": _attributes(_facts(exported)),
    }
    if exported.parent_id:
        written["parentSpanId"] = exported.parent_id
    if span.error_type is not None:
        written["status"] = {"code": _ERROR, "message": span.error or ""}
    return written


def _facts(exported: ExportedSpan) -> dict[str, Any]:
    span = exported.span
    facts: dict[str, Any] = {names.OPERATION: exported.operation, **exported.facts, names.ERROR_TYPE: span.error_type}
    if span.kind == "chat":
        facts |= {names.PROVIDER: names.ANY_PROVIDER, names.ATTEMPTS: span.attempts}
    if span.outcome == UNFINISHED:
        facts[names.UNFINISHED] = True
    if not span.has_beginning:
        facts[names.NO_BEGINNING] = True
    return facts | exported.said


def _attributes(facts: dict[str, Any]) -> list[dict[str, Any]]:
    written = ((name, _value(value)) for name, value in facts.items())
    return [{"key": name, "value": value} for name, value in written if value is not None]


def _value(value: Any) -> dict[str, Any] | None:
    """A value in the form that OTLP gives it; None for one that has none there."""
    if isinstance(value, bool):
        return {"boolValue": value}
    if isinstance(value, int):
        return {"intValue": str(value)} if -(2**63) <= value < 2**63 else None
    if isinstance(value, float):
        return {"doubleValue": value} if math.isfinite(value) else None
    if isinstance(value, str):
        return {"stringValue": value}
    if is_list(value):
        return {"arrayValue": {"values": [each for each in map(_value, value) if each is not None]}}
    return None


def _nanoseconds(at: float) -> str:
    # Through microseconds, which is what the times of a trace are exact to.
    return str(round(min(max(at, 0.0), _LAST_SECOND - 1) * 1e6) * 1000)
