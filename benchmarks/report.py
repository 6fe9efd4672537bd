"""Makes tables and plots of what was measured: text for a terminal, and what docs/benchmarks.md has between markers."""

from __future__ import annotations

import json
import math
import re
import statistics
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks import plots
from benchmarks.adapters import ADAPTERS, BASE
from benchmarks.goals import GOALS, Goal
from benchmarks.scenarios import SCENARIOS

Found = dict[str, Any]
RESULTS = Path(__file__).parent / "results" / "full.json"
DOCS = Path(__file__).parents[1] / "docs"
PAGE = DOCS / "benchmarks.md"


def added(found: Found, before: Found) -> Found:
    """What was measured, and of other scenarios what a file has had."""
    measured = {**before["measured"], **found["measured"]}
    in_order = {name: measured[name] for name in SCENARIOS if name in measured}
    rounds = min(found.get("rounds", 0), before.get("rounds", 0))
    return {**found, "rounds": rounds, "adapters": {**before["adapters"], **found["adapters"]}, "measured": in_order}


# ---- numbers


@dataclass(frozen=True)
class Numbers:
    """What a file has, by scenario, adapter and measure.

    Args:
        found: The file's content.
    """

    found: Found

    def has(self, scenario: str) -> bool:
        return scenario in self.found["measured"]

    def names(self, scenarios: Iterable[str]) -> list[str]:
        """The adapters that took part in one of them, in their order."""
        took_part = {name for each in scenarios if self.has(each) for name in self.found["measured"][each]}
        return [name for name in ADAPTERS if name in took_part]

    def reason(self, scenario: str, name: str) -> str | None:
        """Why there is no number, if somebody has said so."""
        one = self.found["measured"].get(scenario, {}).get(name, {})
        return f"failed: {one['failed']}" if "failed" in one else one.get("cannot")

    def value(self, scenario: str, name: str, measure: str) -> float | None:
        """The median of the rounds, in the measure's unit; `ratio` and `wall ratio` are to the base of each round."""
        if measure in ("ratio", "wall ratio"):
            return self._ratio(scenario, name, BASE, "cpu" if measure == "ratio" else "wall")
        rounds = self._rounds(scenario, name, measure)
        return statistics.median(rounds) if rounds else None

    def over(self, scenario: str, name: str, other: str) -> float | None:
        """How many times another adapter's CPU: the median of the rounds."""
        return self._ratio(scenario, name, other, "cpu")

    def _ratio(self, scenario: str, name: str, other: str, measure: str) -> float | None:
        pairs = zip(self._rounds(scenario, name, measure), self._rounds(scenario, other, measure), strict=False)
        ratios = [mine / theirs for mine, theirs in pairs]
        return statistics.median(ratios) if ratios else None

    def _rounds(self, scenario: str, name: str, measure: str) -> list[float]:
        rounds: list[float] = self.found["measured"].get(scenario, {}).get(name, {}).get(measure, [])
        return rounds


# ---- tables


@dataclass(frozen=True)
class Column:
    """One column: a measure of a scenario."""

    title: str
    scenario: str
    measure: str


def _cell(column: Column, value: float | None) -> str:
    return "–" if value is None else FORMATS[column.measure](value)


def _digits(value: float) -> str:
    """Three digits that count."""
    if not value:
        return "0"
    places = max(2 - math.floor(math.log10(abs(value))), 0)
    return f"{value:.{places}f}" if abs(value) < 1000 else f"{value:.0f}"


FORMATS: dict[str, Callable[[float], str]] = {
    "cpu": lambda value: _digits(value * 1000),
    "wall": lambda value: _digits(value * 1000),
    "awaited cpu": lambda value: _digits(value * 1000),
    "more cpu": lambda value: _digits(value * 1000),
    "awaited wall": lambda value: _digits(1 / value),  # runs in a second
    "blocking wall": lambda value: _digits(1 / value),
    "ratio": _digits,
    "wall ratio": _digits,
    "total": _digits,
    "memory": lambda value: _digits(value / 1024),
    "tasks": _digits,
    "requests": _digits,
}


@dataclass(frozen=True)
class Table:
    """Adapters in rows, measures in columns."""

    title: str
    columns: tuple[Column, ...]

    def cells(self, numbers: Numbers) -> tuple[list[str], list[list[str]], list[str]]:
        """The head, the rows, and notes on what is missing."""
        columns = [each for each in self.columns if numbers.has(each.scenario)]
        rows, notes = [], []
        for name in numbers.names(each.scenario for each in columns):
            values = [numbers.value(each.scenario, name, each.measure) for each in columns]
            rows.append([ADAPTERS[name].title, *(_cell(*each) for each in zip(columns, values, strict=True))])
            reasons = [numbers.reason(each.scenario, name) for each in columns]
            notes += [f"{ADAPTERS[name].title}: {reason}" for reason in dict.fromkeys(reasons) if reason]
        return ["", *(each.title for each in columns)], rows, notes

    def text(self, numbers: Numbers) -> str:
        """For a terminal."""
        head, rows, notes = self.cells(numbers)
        widths = [max(map(len, column)) for column in zip(head, *rows, strict=True)]
        lines = ["  ".join([row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])]) for row in (head, *rows)]
        return "\n".join([self.title, "", *lines, *(f"  – {note}" for note in notes), ""])

    def markdown(self, numbers: Numbers) -> str:
        """For the page."""
        head, rows, notes = self.cells(numbers)
        if not rows:
            return "Not measured."
        lines = [_row(head), _row(["---", *("--:" for _ in head[1:])]), *map(_row, rows)]
        return "\n".join(lines) + ("\n\n– " + "; ".join(notes) + "." if notes else "")


@dataclass(frozen=True)
class FacadeTable(Table):
    """One adapter's scenarios in rows."""

    rows: tuple[tuple[str, str], ...] = ()

    def cells(self, numbers: Numbers) -> tuple[list[str], list[list[str]], list[str]]:
        found = []
        for title, scenario in self.rows:
            if numbers.has(scenario):
                values = [numbers.value(scenario, "fractal-sync", each.measure) for each in self.columns]
                found.append([title, *(_cell(*each) for each in zip(self.columns, values, strict=True))])
        return ["", *(each.title for each in self.columns)], found, []


def _row(cells: list[str]) -> str:
    return "| " + " | ".join(cells) + " |"


def _costs(scenario: str, title: str = "") -> tuple[Column, ...]:
    title = f"{title}: " if title else ""
    return Column(f"{title}CPU ms", scenario, "cpu"), Column(f"{title}×", scenario, "ratio")


def _each(template: str, sizes: Iterable[int], measure: str = "cpu") -> tuple[Column, ...]:
    return tuple(Column(str(size), template.format(size), measure) for size in sizes)


def _cut(scenario: str, title: str) -> tuple[Column, ...]:
    return (
        Column(f"{title}: s", scenario, "total"),
        Column("tasks left", scenario, "tasks"),
        Column("requests left", scenario, "requests"),
    )


TABLES: dict[str, Table] = {
    "runs": Table(
        "CPU for one run of 2 model calls and 3 tool calls, and × that of the loop with AsyncOpenAI",
        (*_costs("one", "one at a time"), *_costs("fifty", "50"), *_costs("five-hundred", "500, 50 ms")),
    ),
    "plain": Table(
        "50 runs at a time whose 3 plain `def` tools block for 10 ms",
        (*_costs("plain-tools"), Column("wall ms", "plain-tools", "wall"), Column("×", "plain-tools", "wall ratio")),
    ),
    "turns": Table("CPU ms for one run of so many turns", _each("turns-{}", (1, 10, 50, 200, 500))),
    "growth": Table(
        "CPU ms for a model call with so many messages before it, and for a run that goes on from them",
        (
            *_each("request-{}", (2, 200, 800)),
            *(Column(f"run, {size}", f"history-{size}", "cpu") for size in (2, 200, 800)),
        ),
    ),
    "stream": Table(
        "A streamed answer of 500 pieces",
        (*_costs("stream", "at once"), *_costs("stream-paced", "one by one")),
    ),
    "object": Table("An answer as a checked object", _costs("object")),
    "delegation": Table("CPU ms for agents so many levels deep", _each("delegate-{}", range(1, 6))),
    "many": Table(
        "10 000 runs at once, each waiting 1 s on the model",
        (
            Column("10 000 connections: s", "ten-thousand", "total"),
            Column("CPU ms", "ten-thousand", "cpu"),
            Column("KiB a run", "ten-thousand", "memory"),
            Column("default limit: s", "ten-thousand-default", "total"),
            Column("CPU ms", "ten-thousand-default", "cpu"),
            Column("KiB a run", "ten-thousand-default", "memory"),
        ),
    ),
    "waiting": Table(
        "KiB for a run that waits",
        (
            Column("in the model", "waiting", "memory"),
            *(Column(f"in {n} tool{'s' * (n > 1)}", f"waiting-tools-{n}", "memory") for n in (1, 3, 10)),
            *(Column(f"{n} agents deep", f"waiting-deep-{n}", "memory") for n in (2, 3, 5)),
        ),
    ),
    "cancellation": Table(
        "Runs cancelled: seconds until all are back, and what is left then",
        (
            *_cut("cancel-50", "50 in the model"),
            *_cut("cancel", "1 000 in the model"),
            Column("by one scope: s", "cancel-scope", "total"),
            *_cut("cancel-tools", "1 000 in 3 tools each"),
        ),
    ),
    "facade": FacadeTable(
        "The blocking facade and the awaited run, with a model in memory",
        (
            Column("awaited: CPU ms", "facade-1", "awaited cpu"),
            Column("blocking: CPU ms more", "facade-1", "more cpu"),
            Column("awaited: runs/s", "facade-1", "awaited wall"),
            Column("blocking: runs/s", "facade-1", "blocking wall"),
        ),
        (
            ("1 thread, 0 ms", "facade-1"),
            ("16 threads, 0 ms", "facade-16"),
            ("16 threads, 20 ms", "facade-16-20ms"),
        ),
    ),
    "start": Table(
        "A new process: the import of the agent class, and all until the first answer",
        (
            Column("import: CPU ms", "import", "cpu"),
            Column("wall ms", "import", "wall"),
            Column("first answer: CPU ms", "first", "cpu"),
            Column("wall ms", "first", "wall"),
        ),
    ),
}


def as_text(found: Found) -> str:
    """Everything that was measured, for a terminal."""
    numbers = Numbers(found)
    wanted = [each for each in TABLES.values() if any(numbers.has(column.scenario) for column in each.columns)]
    return "\n".join(["", about(found), "", *(each.text(numbers) for each in wanted), goals_as_text(numbers)])


def about(found: Found) -> str:
    """Where the numbers come from, in a line."""
    facts = found["machine"]
    where = f"{facts['python']}, {facts['system']}, {facts['cores']} cores ({facts['processor']})"
    return f"{where}, load {facts['load']} before; medians of {found['rounds']} rounds"


# ---- what was promised


def _judged(goal: Goal, numbers: Numbers) -> list[str] | None:
    found = goal.found(numbers)
    if found is None:
        return None
    held = found <= goal.bound if goal.at_most else found >= goal.bound
    sign = "≤" if goal.at_most else "≥"
    return [
        goal.title,
        f"{sign} {goal.bound:g}{goal.unit}",
        f"{_digits(found)}{goal.unit}",
        "yes" if held else "**no**",
    ]


def _goals(numbers: Numbers) -> list[list[str]]:
    return [row for row in (_judged(goal, numbers) for goal in GOALS) if row is not None]


def goals_as_text(numbers: Numbers) -> str:
    rows = _goals(numbers)
    width = max((len(row[0]) for row in rows), default=0)
    lines = [f"{title:{width}}  {bound:>10}  {found:>10}  {held.strip('*')}" for title, bound, found, held in rows]
    return "\n".join(["Goals", "", *lines])


# ---- the page


def write(found: Found, page: Path = PAGE) -> list[Path]:
    """Bring the page's numbers and plots up to date; gives what was written."""
    numbers = Numbers(found)
    pictures = {page.parent / name: drawing for name, drawing in drawn(numbers).items()}
    for path, drawing in pictures.items():
        path.write_text(drawing)
    page.write_text(filled(page.read_text(), numbers))
    return [page, *pictures]


def filled(text: str, numbers: Numbers) -> str:
    """The page's text with these numbers between its markers."""

    def fill(match: re.Match[str]) -> str:
        return f"{match[1]}\n{_part(match[2], numbers)}\n{match[3]}"

    return re.sub(r"(<!-- numbers: ([\w-]+) -->)\n.*?(<!-- end -->)", fill, text, flags=re.DOTALL)


def _part(name: str, numbers: Numbers) -> str:
    if name == "about":
        return about(numbers.found) + "."
    if name == "versions":
        return _versions(numbers.found)
    if name == "goals":
        head = [_row(["", "wanted", "measured", "held"]), _row(["---", "--:", "--:", "---"])]
        return "\n".join([*head, *map(_row, _goals(numbers))])
    return TABLES[name].markdown(numbers)


def _versions(found: Found) -> str:
    versions: dict[str, str] = {}
    for facts in found["adapters"].values():
        versions |= {name: version for name, version in facts["versions"].items() if name not in versions}
    return ", ".join(f"{name} {version}" for name, version in sorted(versions.items())) + "."


def drawn(numbers: Numbers) -> dict[str, str]:
    """The plots, by file name."""
    bars = [
        (ADAPTERS[name].title, value * 1000, name.startswith("fractal"))
        for name in numbers.names(["fifty"])
        if (value := numbers.value("fifty", name, "cpu")) is not None
    ]
    sizes = (1, 10, 50, 200, 500)
    lines = {
        ADAPTERS[name].title: points
        for name in numbers.names(f"turns-{size}" for size in sizes)
        if name in SCENARIOS["turns-500"].who
        if (points := _points(numbers, name, sizes))
    }
    return {
        "benchmarks-runs.svg": plots.bars("CPU ms for one run: 2 model calls, 3 tool calls; 50 at a time", bars),
        "benchmarks-turns.svg": plots.lines("CPU ms for one run of so many turns", lines),
    }


def _points(numbers: Numbers, name: str, sizes: Iterable[int]) -> list[tuple[float, float]]:
    values = [(size, numbers.value(f"turns-{size}", name, "cpu")) for size in sizes]
    return [(size, value * 1000) for size, value in values if value is not None]


def to_json(found: Found) -> str:
    """As a file: a line for each adapter in a scenario, so that it can be read and compared."""
    parts = [f' "{name}": {json.dumps(value)}' for name, value in found.items() if name not in ("adapters", "measured")]
    parts.append(f' "adapters": {_lines(found["adapters"], 2)}')
    scenarios = (f'  "{name}": {_lines(by_name, 3)}' for name, by_name in found["measured"].items())
    parts.append(' "measured": {\n' + ",\n".join(scenarios) + "\n }")
    return "{\n" + ",\n".join(parts) + "\n}\n"


def _lines(facts: Found, depth: int) -> str:
    lines = (f'{" " * depth}"{name}": {json.dumps(value, ensure_ascii=False)}' for name, value in facts.items())
    return "{\n" + ",\n".join(lines) + "\n" + " " * (depth - 1) + "}"
