"""What it costs to watch a run: `python -m benchmarks.tracing`.

In one process agents that are watched in different ways take turns, a few runs each, in an order that is different each
time; what is told is the processor time of a run, threads included, and its ratio to that of a run which nobody watches
in the same turn. A run is two requests to an endpoint on the loopback interface and three tool calls side by side.
"""

from __future__ import annotations

import argparse
import importlib.util
import random
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import anyio

from benchmarks import work
from benchmarks.adapters.fractal import content
from benchmarks.endpoint import Play, running
from fractal import BaseAgent, TracingKit
from fractal.models.openai import OpenAIModel

_RUNS = 10
"""Runs of one turn: enough for a clock to tell them apart."""


def watched(url: str, folder: Path) -> dict[str, BaseAgent]:
    """An agent for each way to watch it, and one that nobody does."""

    def agent(*observers: object, **options: object) -> BaseAgent:
        model = OpenAIModel(base_url=url, api_key="none")
        made = BaseAgent("Looker", work.PROMPT, work.MODEL, model, observers=observers, **options)  # type: ignore[arg-type]
        return made.add_tool(work.look, name="look")

    ways: dict[str, Callable[[], BaseAgent]] = {
        "nobody": agent,
        "nobody, again": agent,
        "a function": lambda: agent(lambda event: None),
        "TracingKit": lambda: agent(enable_tracing=True),
        "TracingKit, file": lambda: agent(tracing_output_file=folder / "trace.jsonl"),
        "TracingKit, redact=": lambda: agent(TracingKit(folder / "redacted.jsonl", redact=lambda event: event)),
    }
    if importlib.util.find_spec("opentelemetry") is not None:
        ways["OpenTelemetry's API"] = lambda: agent(_instrumentation())
    return {name: make() for name, make in ways.items()}


def _instrumentation() -> object:
    from fractal.tracing import Instrumentation

    return Instrumentation()


async def turn(agent: BaseAgent) -> float:
    """Processor seconds of a run."""
    began = time.process_time()
    for _ in range(_RUNS):
        content(await agent.run(work.QUESTION))
    return (time.process_time() - began) / _RUNS


async def measured(agents: dict[str, BaseAgent], turns: int) -> dict[str, list[float]]:
    """Seconds of each turn, by how the agent is watched."""
    seconds: dict[str, list[float]] = {name: [] for name in agents}
    for number in range(turns + 3):
        for name in random.sample([*agents], len(agents)):
            spent = await turn(agents[name])
            if number >= 3:  # what comes before warms up
                seconds[name].append(spent)
    return seconds


def table(seconds: dict[str, list[float]]) -> str:
    """The medians, and those of the ratios in the same turn with the middle half of them."""
    lines = [f"{'watched by':<22}{'CPU µs a run':>14}{'ratio':>9}{'middle half':>17}"]
    for name, spent in seconds.items():
        ratios = sorted(mine / other for mine, other in zip(spent, seconds["nobody"], strict=True))
        low, middle, high = statistics.quantiles(ratios, n=4)
        lines.append(f"{name:<22}{statistics.median(spent) * 1e6:>14.0f}{middle:>9.3f}{low:>9.3f} – {high:.3f}")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description="What it costs to watch a run.")
    parser.add_argument("turns", nargs="?", type=int, default=60, help="turns of each agent; default: %(default)s")
    turns = parser.parse_args().turns
    work.pin(0)
    with running() as endpoint, tempfile.TemporaryDirectory() as folder:
        agents = watched(endpoint.url(endpoint.play(Play())), Path(folder))
        sys.stdout.write(table(anyio.run(measured, agents, turns)) + "\n")


if __name__ == "__main__":
    main()
