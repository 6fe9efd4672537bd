"""What OpenTelemetry is told, kept for tests; and what it should have been told, by the events of runs."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from typing import Any

from opentelemetry.sdk.metrics import MeterProvider
from opentelemetry.sdk.metrics.export import InMemoryMetricReader
from opentelemetry.sdk.trace import ReadableSpan, TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

from fractal import Event
from fractal.tracing import Instrumentation
from fractal.tracing.names import AGENT, CHAT, OPERATION, RUN_ID, TOOL, TOOL_CALL_ID

Tree = Any
"""A name, and what is below it: `(name, {tree: how often})`, with the latter as a frozen set of items."""


class Telemetry:
    """Keeps the spans and metrics of one Instrumentation, and the events of runs beside them.

    Args:
        options: For the Instrumentation.
    """

    def __init__(self, **options: Any) -> None:
        self._exporter, self._reader = InMemorySpanExporter(), InMemoryMetricReader()
        self.tracer_provider = TracerProvider(shutdown_on_exit=False)
        self.tracer_provider.add_span_processor(SimpleSpanProcessor(self._exporter))
        self.meter_provider = MeterProvider([self._reader], shutdown_on_exit=False)
        self.instrumentation = Instrumentation(self.tracer_provider, self.meter_provider, **options)
        self.tracer = self.tracer_provider.get_tracer("user")
        self.events: list[Event] = []

    @property
    def observers(self) -> list[Any]:
        return [self.instrumentation, self.events.append]

    @property
    def spans(self) -> tuple[ReadableSpan, ...]:
        """Those that have ended, in this order."""
        return self._exporter.get_finished_spans()

    def named(self, name: str) -> ReadableSpan:
        [span] = [each for each in self.spans if each.name == name]
        return span

    def metrics(self) -> dict[str, list[tuple[dict[str, Any], Any]]]:
        """By name: what each point is about, and the point."""
        data = self._reader.get_metrics_data()
        return {
            metric.name: [(dict(point.attributes or {}), point) for point in metric.data.data_points]
            for resource in (data.resource_metrics if data is not None else ())
            for scope in resource.scope_metrics
            for metric in scope.metrics
        }


def parent_of(span: ReadableSpan) -> int | None:
    return span.parent.span_id if span.parent is not None else None


def tree_of_spans(spans: Iterable[ReadableSpan], top: int | None = None) -> frozenset[Any]:
    """The spans below another one, with what is below them; each span has one place in it, or is missing."""
    below: dict[int | None, list[ReadableSpan]] = {}
    for span in spans:
        below.setdefault(parent_of(span), []).append(span)

    def within(above: int | None) -> frozenset[Any]:
        found = below.get(above, [])
        return _counted((each.name, within(each.context.span_id)) for each in found if each.context is not None)

    return within(top)


def tree_of_events(events: Iterable[Event]) -> frozenset[Any]:
    """What the spans of runs should be, by their events."""
    runs: dict[str, dict[str, Any]] = {}
    top: list[dict[str, Any]] = []
    for event in events:
        run = runs.get(event.run_id)
        if event.kind == "run_started":
            run = runs[event.run_id] = _part(f"invoke_agent {event.agent_name}") | {"calls": {}, "iteration": None}
            above = runs.get(event.parent_id or "")
            call = above["calls"].get(event.call_id, above) if above is not None else None
            (top if call is None else call["below"]).append(run)
        elif run is None:
            continue
        elif event.kind == "model_requested" and run["iteration"] != event.iteration:
            run["iteration"] = event.iteration
            run["below"].append(_part(f"chat {event.model}"))
        elif event.kind == "model_responded":
            run["iteration"] = None
        elif event.kind == "tool_started":
            call = run["calls"][event.call_id] = _part(f"execute_tool {event.tool_name}")
            run["below"].append(call)
    return _counted(map(_frozen, top))


def _part(name: str) -> dict[str, Any]:
    return {"name": name, "below": []}


def _frozen(part: dict[str, Any]) -> Tree:
    return part["name"], _counted(map(_frozen, part["below"]))


def _counted(trees: Iterable[Tree]) -> frozenset[Any]:
    return frozenset(Counter(trees).items())


def size_of(tree: frozenset[Any]) -> int:
    """How many spans are in it."""
    return sum(count * (1 + size_of(below)) for (_, below), count in tree)


def assert_parents(spans: Iterable[ReadableSpan], events: Iterable[Event]) -> None:
    """Each part is in its run, and each run in the call that began it or, if that had ended, in its run."""
    facts = {span.context.span_id: (span, dict(span.attributes or {})) for span in spans if span.context}

    def around(span: ReadableSpan, *operations: str) -> dict[str, Any]:
        """What is told of the nearest span around one that is of such an operation."""
        above = facts.get(parent_of(span) or 0)
        if above is None:
            return {}
        return above[1] if above[1].get(OPERATION) in operations else around(above[0], *operations)

    runs: dict[str, ReadableSpan] = {}
    for span, about in facts.values():
        if about[OPERATION] == AGENT:
            assert about[RUN_ID] not in runs
            runs[about[RUN_ID]] = span
        elif about[OPERATION] == CHAT:
            assert around(span, AGENT, TOOL) == facts[parent_of(span) or 0][1]
            assert around(span, AGENT)[RUN_ID] == about[RUN_ID]
    for event in events:
        # One that nobody waits for, begun where a call was left behind after its run, is below nothing but its context.
        if event.kind == "run_started" and event.parent_id is not None:
            above = around(runs[event.run_id], AGENT, TOOL)
            if event.call_id is not None:
                assert (above[RUN_ID], above[TOOL_CALL_ID]) == (event.parent_id, event.call_id)
            assert around(runs[event.run_id], AGENT).get(RUN_ID) == event.parent_id
