"""Runs as pictures in a terminal, made from events with rich: a live view, a tree, a timeline.

Text that a model or a tool wrote goes into `Text`, never into markup; `_tree` has taken what could steer a terminal out
of it.
"""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Awaitable, Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Literal, TypeVar

import anyio
from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.table import Table
from rich.text import Text

from fractal._concurrency.scopes import single_error
from fractal._views.tree import Part, Tree

__all__ = [
    "WIDEST",
    "Look",
    "colour_of",
    "hierarchy",
    "is_live",
    "live_table",
    "look_of",
    "result_table",
    "style_of",
    "timeline",
    "watch",
]

T = TypeVar("T")

WIDEST = 110
"""Columns: wider pictures are harder to read along a line."""

_REFRESH_SECONDS = 0.08


@dataclass(frozen=True, slots=True, kw_only=True)
class Look:
    """The characters that pictures are made of.

    Attributes:
        guides: Lines of a tree: before a part, before the last one, below each of these.
        symbols: One for each outcome; that of the empty text stands for any other.
        begins: Stands before what begins.
        spinner: Shown one after the other while something runs.
        bars: What fills the time of a request, and of a tool call.
        span: Start, middle and end of a run's time.
        cut: End of the bar of what was cut.
        dot: Between two facts of a line.
        overflow: What happens to a line that is too long.
    """

    guides: tuple[str, str, str, str]
    symbols: Mapping[str, str]
    begins: str
    spinner: str
    bars: Mapping[str, str]
    span: tuple[str, str, str]
    cut: str
    dot: str
    overflow: Literal["ellipsis", "crop"]


UNICODE = Look(
    guides=("├─ ", "└─ ", "│  ", "   "),
    symbols={"ok": "✓", "timeout": "◷", "cancelled": "⊘", "abandoned": "↷", "skipped": "–", "": "✗"},
    begins="→",
    spinner="⠋⠙⠹⠸⠼⠴⠦⠧⠇⠏",
    bars={"model": "░", "tool": "█"},
    span=("├", "─", "┤"),
    cut="▌✗",
    dot="·",
    overflow="ellipsis",
)
ASCII = Look(
    guides=("|- ", "`- ", "|  ", "   "),
    symbols={"ok": "+", "timeout": "!", "cancelled": "!", "abandoned": "!", "skipped": "-", "": "x"},
    begins=">",
    spinner="|/-\\",
    bars={"model": ":", "tool": "#"},
    span=("|", "-", "|"),
    cut="x",
    dot="-",
    overflow="crop",
)

_COLOURS = ("cyan", "magenta", "bright_blue", "green")  # yellow and red mean something
_STYLES = {
    "ok": "green",
    "timeout": "yellow",
    "cancelled": "yellow",
    "abandoned": "yellow",
    "skipped": "dim",
    "": "red",
}


def look_of(console: Console) -> Look:
    """The characters that a console's encoding has."""
    return UNICODE if console.encoding.startswith("utf") else ASCII


def is_live(console: Console) -> bool:
    """Whether a console can show moving pictures: a terminal that is able to."""
    # A pipe may be given colours by the user's environment, but never a moving picture.
    return console.file.isatty() and console.is_terminal and not console.is_dumb_terminal


def colour_of(number: int) -> str:
    """The colour of an agent, by its number."""
    return _COLOURS[number % len(_COLOURS)]


def _colours(tree: Tree) -> dict[str, str]:
    agents = dict.fromkeys(part.agent for part in tree.walk())
    return {agent: colour_of(number) for number, agent in enumerate(agents)}


def style_of(outcome: str) -> str:
    """The style of an outcome, by which it stands out."""
    return _STYLES.get(outcome, _STYLES[""])


def _style(part: Part) -> str:
    return style_of(part.outcome) if part.outcome else "bold"


def _symbol(part: Part, look: Look) -> tuple[str, str]:
    if not part.outcome:
        return look.spinner[int(time.time() / _REFRESH_SECONDS) % len(look.spinner)], "bold"
    return look.symbols.get(part.outcome, look.symbols[""]), _style(part)


def _name(guides: str, part: Part, look: Look, colours: Mapping[str, str]) -> Text:
    label = (part.label, f"bold {colours[part.agent]}" if part.kind == "run" else "")
    line = Text.assemble((guides, "dim"), _symbol(part, look), " ", label, no_wrap=True, overflow=look.overflow)
    return line.append(f"  {part.detail}", "dim") if part.detail else line


def result_table(tree: Tree, look: Look, width: int = WIDEST) -> RenderableType:
    """The tree of an ended run: agents, outcomes, times and usage."""
    colours = _colours(tree)
    table = Table(box=None, padding=(0, 2, 0, 0), width=min(width, WIDEST), header_style="dim", pad_edge=False)
    table.add_column("who did what", ratio=1, no_wrap=True)
    table.add_column("outcome", no_wrap=True)
    for heading in ("seconds", "requests", "tokens"):
        table.add_column(heading, justify="right", no_wrap=True)
    for guides, part in tree.rows(look.guides):
        table.add_row(
            _name(guides, part, look, colours),
            Text(part.outcome, _style(part)),
            f"{part.seconds:.2f}",
            "" if part.requests is None else str(part.requests),
            "" if part.tokens is None else str(sum(part.tokens)),
        )
    return table


def live_table(tree: Tree, look: Look, width: int, height: int) -> RenderableType:
    """The tree while it grows; of a tall one the newest rows."""
    colours = _colours(tree)
    table = Table(box=None, padding=(0, 2, 0, 0), width=min(width, WIDEST), show_header=False, pad_edge=False)
    table.add_column(ratio=1, no_wrap=True)
    table.add_column(min_width=max(map(len, _STYLES)), no_wrap=True)  # so that nothing jumps when one is cut
    table.add_column(justify="right", no_wrap=True)
    rows = list(tree.rows(look.guides))
    room = max(height - 4, 1)
    if len(rows) > room:
        table.add_row(Text(f"{len(rows) - room} more above", "dim"))
    for guides, part in rows[-room:]:
        outcome = "" if part.outcome == "ok" else part.outcome
        name = _name(guides, part, look, colours)
        table.add_row(name, Text(outcome, _style(part)), f"{part.seconds:.1f} s")
    now = sum(not part.outcome and part.kind != "run" for part in tree.walk())
    return Group(table, Text(f"{tree.wall:.1f} s {look.dot} side by side now: {now}", "dim"))


def timeline(tree: Tree, look: Look, width: int = WIDEST) -> RenderableType:
    """The parts of a run in time: a bar to scale for each part, below a scale in seconds."""
    colours, wall = _colours(tree), max(tree.wall, 1e-3)
    width = min(width, WIDEST)
    names = min(max((len(guides) + len(part.label) for guides, part in tree.rows(look.guides)), default=0), width // 3)
    columns = max(width - names - 10, 10)
    lines = [Text(" " * (names + 2) + _scale(wall, columns), "dim", no_wrap=True, overflow="crop")]
    for guides, part in tree.rows(look.guides):
        name = Text.assemble((guides, "dim"), (part.label, colours[part.agent]), no_wrap=True)
        name.truncate(names, overflow=look.overflow, pad=True)
        bar = _bar_in_time(part, tree.start, wall, columns, look, colours)
        lines.append(name.append("  ").append_text(bar).append(f" {part.seconds:5.2f} s", "dim"))
    bars = look.bars
    legend = f"{bars['model'] * 2} waits for the model   {bars['tool'] * 2} tool   {look.cut[-1]} cut off"
    return Group(*lines, Text(" " * (names + 2) + legend, "dim"))


def hierarchy(tree: Tree, look: Look, width: int = WIDEST) -> RenderableType:
    """The agents of an ended run: who asked whom, how that ended, and when it was, as a bar to scale."""
    colours, wall, width = _colours(tree), max(tree.wall, 1e-3), min(width, WIDEST)
    columns = max(width // 3 - 6, 10)
    table = Table(box=None, padding=(0, 2, 0, 0), width=width, header_style="dim", pad_edge=False)
    table.add_column("who asked whom", ratio=1, no_wrap=True)
    table.add_column("outcome", no_wrap=True)
    table.add_column("when", no_wrap=True, width=columns)
    for heading in ("seconds", "tokens"):
        table.add_column(heading, justify="right", no_wrap=True)
    runs = Tree()
    runs.roots = [_only_runs(root) for root in tree.roots]
    for guides, part in runs.rows(look.guides):
        table.add_row(
            _name(guides, part, look, colours),
            Text(part.outcome, _style(part)),
            _bar_in_time(part, tree.start, wall, columns, look, colours),
            f"{part.seconds:.2f}",
            "" if part.tokens is None else str(sum(part.tokens)),
        )
    return table


def _only_runs(run: Part) -> Part:
    """A run with the runs below it alone."""
    return replace(run, parts=[_only_runs(below) for below in _runs_below(run)])


def _runs_below(part: Part) -> Iterator[Part]:
    for below in part.parts:
        if below.kind == "run":
            yield below
        else:
            yield from _runs_below(below)


def _bar_in_time(part: Part, begin: float, wall: float, columns: int, look: Look, colours: Mapping[str, str]) -> Text:
    """The bar of a part where its time is, in so many columns for the whole time."""
    # A clock that was set back puts parts before the beginning, by any number of columns.
    start = min(max(int((part.started - begin) / wall * columns), 0), columns - 1)
    end = min(max(math.ceil((part.started + part.seconds - begin) / wall * columns), start + 1), columns)
    style = style_of(part.outcome) if part.outcome != "ok" else colours[part.agent]
    return Text(" " * start, no_wrap=True).append(_bar(part, look, end - start), style).append(" " * (columns - end))


def _bar(part: Part, look: Look, length: int) -> str:
    if part.kind == "run":
        first, middle, last = look.span
        return middle if length < 2 else first + middle * (length - 2) + last
    cut = look.cut if part.outcome in ("timeout", "cancelled", "abandoned") else ""
    return (look.bars[part.kind] * length)[: max(length - len(cut), 0)] + cut[-length:]


def _scale(wall: float, columns: int) -> str:
    """Numbers above the bars, at round seconds and not too close."""
    magnitude = 10.0 ** math.floor(math.log10(wall))
    steps = [magnitude * factor for factor in (0.1, 0.2, 0.5, 1, 2, 5)]
    step = next((step for step in steps if step / wall * columns >= 8), steps[-1])
    line = ""
    for index in range(math.floor(wall / step) + 1):
        start, number = int(index * step / wall * columns), f"{index * step:g}"
        if start + len(number) <= columns:
            line = line.ljust(start) + number
    return line.ljust(columns) + "seconds".rjust(8)


async def watch(console: Console, tree: Tree, work: Callable[[], Awaitable[T]]) -> T:
    """Await some work and show the tree growing meanwhile, if the console can; nothing of it stays on the screen.

    Args:
        console: Where to show it.
        tree: An observer of the work.
        work: What to await.

    Returns:
        What the work returns.

    Raises:
        BaseException: What the work raises.
    """
    if not is_live(console):
        return await work()
    look = look_of(console)

    def picture() -> RenderableType:
        return live_table(tree, look, console.width, console.height)

    async def refresh(live: Live) -> None:
        while True:
            live.refresh()
            await anyio.sleep(_REFRESH_SECONDS)

    results: list[T] = []
    moving = Live(
        console=console,
        get_renderable=picture,
        auto_refresh=False,  # a task draws, not rich's thread: the tree cannot change under a picture being made
        transient=True,
        # What tools print goes above the picture, but never from a pipe into the terminal.
        redirect_stdout=sys.stdout.isatty(),
        redirect_stderr=sys.stderr.isatty(),
    )
    with single_error(), moving as live:
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(refresh, live)
            results.append(await work())
            tasks.cancel_scope.cancel()
    return results[0]
