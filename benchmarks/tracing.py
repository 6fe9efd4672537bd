"""What it costs to watch a run: `python -m benchmarks.tracing`.

In one process agents that are watched in different ways take turns, a few runs each, in an order that is different each
time; what is told is the processor time of a run, threads included, and its ratio to that of a run which nobody watches
in the same turn; and the ratio of the time that passes. A run is two requests and three tool calls side by side.
`--model` says who answers: an endpoint on the loopback interface, which is asked by our own HTTP or by the client of
the SDK, or a model in memory, where there is nothing but the run.
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
from typing import Any

import anyio

from benchmarks import work
from benchmarks.adapters.fractal import content
from benchmarks.endpoint import Play, running
from fractal import BaseAgent, TracingKit
from fractal.model import ModelRequest
from fractal.models.openai import OpenAIModel
from fractal.reply import Reply, ToolCall

_RUNS = 10
"""Runs of one turn: enough for a clock to tell them apart."""


def _of_sdk(url: str) -> object:
    from openai import AsyncOpenAI

    return AsyncOpenAI(base_url=url, api_key="none")


class _InMemory:
    """A model that answers as the endpoint does."""

    async def respond(self, request: ModelRequest) -> Reply:
        if len(request.transcript) > 1:
            return Reply(text=work.ANSWER, input_tokens=60, output_tokens=7)
        calls = (ToolCall(f"call_{number}", "look", f'{{"place":"place {number}"}}') for number in range(3))
        return Reply(tool_calls=tuple(calls), input_tokens=40, output_tokens=30)


MODELS: dict[str, Callable[[str], Any]] = {
    "own": lambda url: OpenAIModel(base_url=url, api_key="none"),
    "sdk": _of_sdk,
    "memory": lambda url: _InMemory(),
}
"""Who answers, by the URL of the endpoint."""


def watched(model: Callable[[str], Any], url: str, folder: Path) -> dict[str, BaseAgent]:
    """An agent for each way to watch it, and one that nobody does."""

    def agent(*observers: object, **options: object) -> BaseAgent:
        made = BaseAgent("Looker", work.PROMPT, work.MODEL, model(url), observers=observers, **options)  # type: ignore[arg-type]
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


async def turn(agent: BaseAgent) -> tuple[float, float]:
    """Processor seconds of a run, and seconds that it takes."""
    began, began_at = time.process_time(), time.perf_counter()
    for _ in range(_RUNS):
        content(await agent.run(work.QUESTION))
    return (time.process_time() - began) / _RUNS, (time.perf_counter() - began_at) / _RUNS


async def measured(agents: dict[str, BaseAgent], turns: int) -> dict[str, list[tuple[float, float]]]:
    """The seconds of each turn, by how the agent is watched."""
    seconds: dict[str, list[tuple[float, float]]] = {name: [] for name in agents}
    for number in range(turns + 3):
        for name in random.sample([*agents], len(agents)):
            spent = await turn(agents[name])
            if number >= 3:  # what comes before warms up
                seconds[name].append(spent)
    return seconds


def table(seconds: dict[str, list[tuple[float, float]]]) -> str:
    """The medians, and those of the ratios in the same turn with the middle half of them."""
    lines = [f"{'watched by':<22}{'CPU µs a run':>14}{'ratio':>9}{'middle half':>17}{'ratio of time':>15}"]
    for name, spent in seconds.items():
        low, middle, high = _ratios(spent, seconds["nobody"], 0)
        took = _ratios(spent, seconds["nobody"], 1)[1]
        median = statistics.median(cpu for cpu, _ in spent) * 1e6
        lines.append(f"{name:<22}{median:>14.0f}{middle:>9.3f}{low:>9.3f} – {high:.3f}{took:>15.3f}")
    return "\n".join(lines)


def _ratios(spent: list[tuple[float, float]], others: list[tuple[float, float]], which: int) -> list[float]:
    """The quartiles of the ratios of turns."""
    return statistics.quantiles((mine[which] / other[which] for mine, other in zip(spent, others, strict=True)), n=4)


def main() -> None:
    parser = argparse.ArgumentParser(description="What it costs to watch a run.")
    parser.add_argument("turns", nargs="?", type=int, default=60, help="turns of each agent; default: %(default)s")
    parser.add_argument("--model", choices=MODELS, default="own", help="who answers; default: %(default)s")
    given = parser.parse_args()
    work.pin(0)
    with running() as endpoint, tempfile.TemporaryDirectory() as folder:
        agents = watched(MODELS[given.model], endpoint.url(endpoint.play(Play())), Path(folder))
        sys.stdout.write(table(anyio.run(measured, agents, given.turns)) + "\n")


if __name__ == "__main__":
    main()
