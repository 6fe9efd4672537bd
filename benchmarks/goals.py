"""What the numbers should be: the bounds that docs/benchmarks.md shows beside what was measured."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from benchmarks.adapters import BASE
from benchmarks.scenarios import PEERS

if TYPE_CHECKING:
    from benchmarks.report import Numbers


@dataclass(frozen=True)
class Goal:
    """A bound, and how the number is found.

    Args:
        title: What is bounded.
        bound: The bound.
        found: Gives the number, or None where it was not measured.
        unit: Of both.
        at_most: The number may not be more; otherwise, not less.
    """

    title: str
    bound: float
    found: Callable[[Numbers], float | None]
    unit: str = " ×"
    at_most: bool = True


def _ratio(scenario: str, name: str, other: str = BASE) -> Callable[[Numbers], float | None]:
    return lambda numbers: numbers.over(scenario, name, other)


def _grown(name: str, size: int) -> Callable[[Numbers], float | None]:
    def found(numbers: Numbers) -> float | None:
        small, large = (numbers.value(f"request-{each}", name, "cpu") for each in (2, size))
        return large / small if small and large else None

    return found


def _value(scenario: str, name: str, measure: str, factor: float = 1.0) -> Callable[[Numbers], float | None]:
    def found(numbers: Numbers) -> float | None:
        value = numbers.value(scenario, name, measure)
        return None if value is None else value * factor

    return found


def _cheapest_peer(numbers: Numbers) -> float | None:
    ratios = [numbers.over("fifty", name, "fractal") for name in PEERS]
    return min((each for each in ratios if each is not None), default=None)


def _memory_over_by_hand(numbers: Numbers) -> float | None:
    ours, theirs = (numbers.value("ten-thousand", name, "memory") for name in ("fractal", BASE))
    return (ours - theirs) / 1024 if ours and theirs else None


def _time_over_ideal(scenario: str, ideal: float) -> Callable[[Numbers], float | None]:
    """Seconds, less those of the CPU, for each second that there have to be."""

    def found(numbers: Numbers) -> float | None:
        total, cpu = (numbers.value(scenario, "fractal", each) for each in ("total", "cpu"))
        return (total - 10_000 * cpu) / ideal if total and cpu else None

    return found


def _import_over_parts(scenario: str) -> Callable[[Numbers], float | None]:
    def found(numbers: Numbers) -> float | None:
        ours, parts = (numbers.value(each, "fractal", "cpu") for each in (scenario, "import-parts"))
        return ours / parts if ours and parts else None

    return found


def _threads_over_tasks(numbers: Numbers) -> float | None:
    blocking, awaited = (
        numbers.value("facade-16-20ms", "fractal-sync", each) for each in ("blocking wall", "awaited wall")
    )
    return awaited / blocking if blocking and awaited else None


GOALS: tuple[Goal, ...] = (
    Goal("50 at a time: CPU against by hand, AsyncOpenAI", 0.35, _ratio("fifty", "fractal")),
    Goal("the same with a user's AsyncOpenAI", 0.65, _ratio("fifty", "fractal-openai")),
    Goal("the same on trio", 0.32, _ratio("fifty", "fractal-trio")),
    Goal("the same on uvloop", 0.12, _ratio("fifty", "fractal-uvloop")),
    Goal("500 at a time, 50 ms: CPU against by hand, AsyncOpenAI", 0.30, _ratio("five-hundred", "fractal")),
    Goal("50 at a time: CPU against by hand, httpx2", 1.0, _ratio("fifty", "fractal", "by-hand-httpx2")),
    Goal("500 at a time: CPU against by hand, httpx2", 1.0, _ratio("five-hundred", "fractal", "by-hand-httpx2")),
    Goal("50 at a time: CPU of the cheapest other framework against ours", 3.0, _cheapest_peer, at_most=False),
    Goal("500 streamed pieces: CPU against by hand, AsyncOpenAI", 0.20, _ratio("stream", "fractal")),
    Goal("a model call with 200 messages: CPU against create()", 0.05, _ratio("request-200", "fractal")),
    Goal("a model call with 200 messages against one with 2", 1.5, _grown("fractal", 200)),
    Goal("a model call with 800 messages against one with 2", 3.0, _grown("fractal", 800)),
    Goal("200 messages, a user's AsyncOpenAI: CPU against create()", 0.05, _ratio("request-200", "fractal-openai")),
    Goal("200 messages against 2, a user's AsyncOpenAI", 1.5, _grown("fractal-openai", 200)),
    Goal("800 messages against 2, a user's AsyncOpenAI", 3.0, _grown("fractal-openai", 800)),
    Goal("10 000 runs: memory of a run over that by hand", 40, _memory_over_by_hand, " KiB"),
    Goal("10 000 runs, 10 000 connections: time less CPU, over 1 s", 1.5, _time_over_ideal("ten-thousand", 1.0)),
    Goal("10 000 runs, default limit: time less CPU, over 10 s", 1.5, _time_over_ideal("ten-thousand-default", 10.0)),
    Goal("1 000 runs cancelled in the model: all back", 0.25, _value("cancel", "fractal", "total"), " s"),
    Goal("the same by one scope", 0.25, _value("cancel-scope", "fractal", "total"), " s"),
    Goal("the same on trio", 0.25, _value("cancel", "fractal-trio", "total"), " s"),
    Goal("1 000 runs cancelled in 3 tools each: all back", 0.25, _value("cancel-tools", "fractal", "total"), " s"),
    Goal("the same on trio", 0.25, _value("cancel-tools", "fractal-trio", "total"), " s"),
    Goal("tasks left", 0, _value("cancel", "fractal", "tasks"), ""),
    Goal("requests left at the endpoint", 0, _value("cancel", "fractal", "requests"), ""),
    Goal(
        "a blocking call: CPU over the awaited run", 0.15, _value("facade-1", "fractal-sync", "more cpu", 1000), " ms"
    ),
    Goal("`import fractal`: CPU against `import anyio, pydantic`", 1.25, _import_over_parts("import-package")),
    Goal("`from fractal import BaseAgent`: the same", 1.25, _import_over_parts("import")),
    Goal("16 threads: runs/s against 16 tasks, 20 ms of latency", 0.8, _threads_over_tasks, at_most=False),
)
