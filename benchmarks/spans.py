"""What spans and metrics cost a run, here and in another framework: `python -m benchmarks.spans`.

OpenTelemetry's SDK with exporters in memory, so that what is measured is what a framework does for its spans. Each
framework has a process and an environment of its own; in it agents without and with instrumentation take turns, a few
runs each, and what is told is the processor time of a run and its ratio to that of the plain one in the same turn. A
run is two requests to an endpoint on the loopback interface and three tool calls side by side.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import statistics
import subprocess
import sys
import time
from typing import Any

from benchmarks import work
from benchmarks.adapters import ADAPTERS, One, Spans, Task
from benchmarks.endpoint import Play, running

NAMES = ("fractal", "fractal-openai", "pydantic-ai")
WAYS = ("nothing", "spans", "spans with content")

_RUNS = 10
"""Runs of one turn: enough for a clock to tell them apart."""

_WARM_UP = 3
"""Turns that come before."""


def providers() -> tuple[Any, Any, Any]:
    """Providers of spans and metrics whose exporters keep them in memory, and that of the spans."""
    from opentelemetry.sdk.metrics import MeterProvider
    from opentelemetry.sdk.metrics.export import InMemoryMetricReader
    from opentelemetry.sdk.trace import TracerProvider
    from opentelemetry.sdk.trace.export import SimpleSpanProcessor
    from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

    exporter, tracers = InMemorySpanExporter(), TracerProvider()
    tracers.add_span_processor(SimpleSpanProcessor(exporter))
    return tracers, MeterProvider([InMemoryMetricReader()]), exporter


async def measured(name: str, url: str, turns: int) -> dict[str, Any]:
    """The seconds of each turn by what is watched, and the number of spans of a run."""
    adapter, task = ADAPTERS[name].load(), Task("tools", url)
    tracers, meters, exporter = providers()
    ways: dict[str, One] = {"nothing": adapter.tools(task)}
    for way, has_content in (("spans", False), ("spans with content", True)):
        ways[way] = adapter.watched_tools(task, Spans(tracers, meters, has_content))
    seconds: dict[str, list[float]] = {way: [] for way in ways}
    spans = dict.fromkeys(ways, 0)
    for number in range(turns + _WARM_UP):
        for way in random.sample([*ways], len(ways)):
            began = time.process_time()
            for _ in range(_RUNS):
                assert await ways[way]() == work.ANSWER
            if number >= _WARM_UP:
                seconds[way].append((time.process_time() - began) / _RUNS)
            spans[way] = len(exporter.get_finished_spans()) // _RUNS
            exporter.clear()
    return {"seconds": seconds, "spans": spans}


def table(found: dict[str, dict[str, Any]]) -> str:
    """The medians, and those of the ratios in the same turn with the middle half of them."""
    lines = [f"{'':<16}{'watched by':<20}{'spans':>6}{'CPU µs a run':>14}{'more':>7}{'ratio':>8}{'middle half':>17}"]
    for name, facts in found.items():
        plain = facts["seconds"]["nothing"]
        for way, spent in facts["seconds"].items():
            ratios = (mine / other for mine, other in zip(spent, plain, strict=True))
            low, middle, high = statistics.quantiles(ratios, n=4)
            cpu, more = (1e6 * (statistics.median(spent) - than) for than in (0, statistics.median(plain)))
            numbers = f"{facts['spans'][way]:>6}{cpu:>14.0f}{more:>7.0f}{middle:>8.2f}{low:>9.2f} – {high:.2f}"
            lines.append(f"{name:<16}{way:<20}{numbers}")
    return "\n".join(lines)


def main() -> None:
    from benchmarks.run import ROOT, environment, is_installed, python_of

    parser = argparse.ArgumentParser(description="What spans and metrics cost a run, here and in another framework.")
    parser.add_argument("turns", nargs="?", type=int, default=40, help="turns of each agent; default: %(default)s")
    turns = parser.parse_args().turns
    quiet = {name: value for name, value in environment().items() if name != "OTEL_SDK_DISABLED"}
    found = dict[str, dict[str, Any]]()
    with running() as endpoint:
        for name in filter(is_installed, NAMES):
            url = endpoint.url(endpoint.play(Play()))
            command = [str(python_of(ADAPTERS[name])), "-m", "benchmarks.spans", "--child", name, url, str(turns)]
            done = subprocess.run(command, cwd=ROOT, env=quiet, check=True, stdout=subprocess.PIPE)
            found[name] = json.loads(done.stdout)
    sys.stdout.write(table(found) + "\n")


def _child(name: str, url: str, turns: str) -> None:
    work.pin(0)
    sys.stdout.write(json.dumps(asyncio.run(measured(name, url, int(turns)))))


if __name__ == "__main__":
    if sys.argv[1:2] == ["--child"]:
        _child(*sys.argv[2:])
    else:
        main()
