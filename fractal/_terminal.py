"""Runs as pictures in a terminal, made from events with rich: a live view, a tree, a timeline.

All text that a model or a tool wrote goes through `one_line` or `printable` and into `Text`, never into markup: it can
neither colour the screen nor move the cursor.
"""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Awaitable, Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, TypeVar, cast

import anyio
from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.table import Table
from rich.text import Text

from fractal._json import text_of
from fractal._scopes import single_error
from fractal.events import (
    DelegationStarted,
    Event,
    ModelRequested,
    ModelResponded,
    RetryScheduled,
    RunFinished,
    RunStarted,
    ToolFinished,
    ToolStarted,
)

__all__ = [
    "Look",
    "Part",
    "RunTree",
    "is_live",
    "look_of",
    "one_line",
    "printable",
    "result_table",
    "timeline",
    "watch",
]

T = TypeVar("T")

WIDEST = 110
"""Columns: wider pictures are harder to read along a line."""

_REFRESH_SECONDS = 0.08


@dataclass(slots=True, kw_only=True)
class Part:
    """Something that took time: a run, a request to the model, or a tool call.

    Attributes:
        kind: Which of these.
        label: The agent's name, the tool's, or `model`.
        agent: Name of the agent whose run it is, or is in.
        detail: What it was about, in one line.
        started: Seconds since the epoch.
        ended: The same; None while it goes on.
        outcome: How it ended: a tool call's outcome or a run's stop reason, `ok` for success; empty while it goes on.
        requests: Requests to the endpoint, those of the runs below included; None for a tool call.
        tokens: Prompt and completion tokens, or None.
        parts: What it consists of, in the order of starting.
    """

    kind: Literal["run", "model", "tool"]
    label: str
    agent: str
    detail: str = ""
    started: float
    ended: float | None = None
    outcome: str = ""
    requests: int | None = None
    tokens: tuple[int, int] | None = None
    parts: list[Part] = field(default_factory=list["Part"])

    @property
    def seconds(self) -> float:
        """How long it took, so far if it goes on."""
        return (self.ended if self.ended is not None else time.time()) - self.started

    def end(self, at: float, outcome: str) -> None:
        """Give it its end; only the first counts."""
        if self.ended is None:
            self.ended, self.outcome = max(at, self.started), outcome

    def walk(self) -> Iterator[Part]:
        """It and everything in it."""
        yield self
        for part in self.parts:
            yield from part.walk()


class RunTree:
    """An observer that keeps what happened as a tree of parts.

    Example:
        ```python
        tree = RunTree()
        agent = BaseAgent("Planner", "You plan.", observers=[tree])
        await agent.run("A day in Rome")
        Console().print(result_table(tree, UNICODE))
        ```

    Args:
        notes: A word to show with the calls of a tool, by the tool's name.
    """

    def __init__(self, notes: Mapping[str, str] | None = None) -> None:
        self.roots: list[Part] = []
        self._notes = dict(notes or {})
        self._runs: dict[str, Part] = {}
        self._open: dict[tuple[str, str], Part] = {}  # by run and call id; a model request's id is empty
        self._arguments: dict[tuple[str, str], object] = {}  # of open tool calls
        self._delegating: set[tuple[str | None, str | None]] = set()  # calls that are nothing but another agent's run

    def __call__(self, event: Event) -> None:
        """Enter one event."""
        match event:
            case RunStarted():
                self._run_started(event)
            case RunFinished():
                self._run_finished(event)
            case ModelRequested() | ToolStarted():
                self._part_started(event)
            case ModelResponded():
                self._responded(event)
            case RetryScheduled():
                self._retry(event)
            case ToolFinished():
                self._tool_finished(event)
            case DelegationStarted():
                self._delegation_started(event)
            case _:
                pass

    @property
    def work(self) -> float:
        """Seconds of all requests and tool calls added up, as if one had waited for the other."""
        return sum(part.seconds for part in self.walk() if not part.parts and part.kind != "run")

    @property
    def wall(self) -> float:
        """Seconds from the first start to the last end."""
        return max(root.started + root.seconds for root in self.roots) - self.start if self.roots else 0.0

    @property
    def start(self) -> float:
        """When the first run began, in seconds since the epoch."""
        return min((root.started for root in self.roots), default=time.time())

    def walk(self) -> Iterator[Part]:
        """All parts, those above first."""
        for root in self.roots:
            yield from root.walk()

    def rows(self, guides: tuple[str, str, str, str]) -> Iterator[tuple[str, Part]]:
        """All parts with the lines that lead to them, for drawing.

        Args:
            guides: What stands before a part, the last part, and below either of them.
        """
        for root in self.roots:
            yield "", root
            yield from _rows_below(root, "", guides)

    def _run_started(self, event: RunStarted) -> None:
        call = self._open.get((event.parent_id or "", event.call_id or ""))
        if call is not None and (event.parent_id, event.call_id) in self._delegating:
            # The call that delegates and the run it starts are one thing to whoever looks.
            run = call
            run.kind, run.label, run.agent = "run", event.agent_name, event.agent_name
        else:
            run = Part(kind="run", label=event.agent_name, agent=event.agent_name, started=event.at)
            parent = call or self._runs.get(event.parent_id or "")
            (parent.parts if parent else self.roots).append(run)
        run.detail = one_line(text_of(event.message.get("content") or ""))
        self._runs[event.run_id] = run

    def _run_finished(self, event: RunFinished) -> None:
        result, run = event.result, self._runs.get(event.run_id)
        if run is None:
            return
        ended = {"deadline": "timeout", "cancelled": "cancelled"}.get(result.stop_reason, "error")
        for part in run.parts:
            part.end(event.at, ended)
        run.end(event.at, "ok" if result.success else ended if ended != "error" else result.stop_reason)
        usage = result.usage
        run.requests, run.tokens = usage.requests, (usage.input_tokens, usage.output_tokens)

    def _part_started(self, event: ModelRequested | ToolStarted) -> None:
        run = self._runs.get(event.run_id)
        if run is None:  # a tool called without a run
            return
        if isinstance(event, ToolStarted):
            key, label = event.call_id, event.tool_name
            detail = _with_note(_brief(event.arguments), self._notes.get(label))
        else:
            key, label = "", "model"
            detail = "" if event.attempt == 1 else f"try {event.attempt}"
        part = Part(
            kind="tool" if isinstance(event, ToolStarted) else "model",
            label=one_line(label),
            agent=event.agent_name,
            detail=detail,
            started=event.at,
            requests=None if isinstance(event, ToolStarted) else 1,
        )
        run.parts.append(part)
        self._open[event.run_id, key] = part
        if isinstance(event, ToolStarted):
            self._arguments[event.run_id, key] = event.arguments

    def _responded(self, event: ModelResponded) -> None:
        part = self._open.pop((event.run_id, ""), None)
        if part is not None:
            part.detail = _brief_reply(event.message)
            part.tokens = (event.input_tokens, event.output_tokens)
            part.end(event.at, "ok")

    def _retry(self, event: RetryScheduled) -> None:
        part = self._open.pop((event.run_id, ""), None)
        if part is not None:
            part.detail = one_line(event.error)
            part.end(event.at, "error")

    def _tool_finished(self, event: ToolFinished) -> None:
        self._arguments.pop((event.run_id, event.call_id), None)
        part = self._open.pop((event.run_id, event.call_id), None)
        if part is None or part.kind == "run":  # a run tells its own end
            return
        part.end(event.at, event.result.outcome)
        if event.result.outcome == "error":
            part.detail = one_line(event.result.error or "")

    def _delegation_started(self, event: DelegationStarted) -> None:
        # A tool of the user's may ask another agent among other things; one that hands on what it was given is the run.
        given = self._arguments.get((event.run_id, event.call_id or ""))
        if given == event.query or given == {"query": event.query}:
            self._delegating.add((event.run_id, event.call_id))


def _rows_below(part: Part, before: str, guides: tuple[str, str, str, str]) -> Iterator[tuple[str, Part]]:
    inner, last, below_inner, below_last = guides
    for index, child in enumerate(part.parts):
        is_last = index == len(part.parts) - 1
        yield before + (last if is_last else inner), child
        yield from _rows_below(child, before + (below_last if is_last else below_inner), guides)


def printable(text: str) -> str:
    """Text without control characters, so that it cannot steer a terminal; line ends and tabs stay."""
    return "".join(char if char.isprintable() or char in "\n\t" else " " for char in text)


def one_line(text: str, longest: int = 200) -> str:
    """Text in one line, without control characters."""
    return " ".join(printable(text[: 4 * longest]).split())[:longest]


def _brief(arguments: object) -> str:
    if not isinstance(arguments, Mapping):
        return one_line(text_of(arguments))
    values = cast("Mapping[str, object]", arguments).values()
    return ", ".join(one_line(text_of(value), 60) for value in values)


def _brief_reply(message: Mapping[str, Any]) -> str:
    calls = [one_line(call["function"]["name"]) for call in message.get("tool_calls") or ()]
    if not calls:
        return one_line(text_of(message.get("content") or message.get("refusal") or ""))
    counted = [f"{name} x{calls.count(name)}" if calls.count(name) > 1 else name for name in dict.fromkeys(calls)]
    return f"calls {', '.join(counted)}"


def _with_note(detail: str, note: str | None) -> str:
    return f"{note}  {detail}" if note else detail


@dataclass(frozen=True, slots=True, kw_only=True)
class Look:
    """The characters that pictures are made of.

    Attributes:
        guides: Lines of a tree: before a part, before the last one, below each of these.
        symbols: One for each outcome; that of the empty text stands for any other.
        spinner: Shown one after the other while something runs.
        bars: What fills the time of a request, and of a tool call.
        span: Start, middle and end of a run's time.
        cut: End of the bar of what was cut.
        dot: Between two facts of a line.
        overflow: What happens to a line that is too long.
    """

    guides: tuple[str, str, str, str]
    symbols: Mapping[str, str]
    spinner: str
    bars: Mapping[str, str]
    span: tuple[str, str, str]
    cut: str
    dot: str
    overflow: Literal["ellipsis", "crop"]


UNICODE = Look(
    guides=("├─ ", "└─ ", "│  ", "   "),
    symbols={"ok": "✓", "timeout": "◷", "cancelled": "⊘", "abandoned": "↷", "skipped": "–", "": "✗"},
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
    """Whether a picture on it can move: it is a terminal, and one that knows how."""
    # A pipe may be given colours by the user's environment, but never a moving picture.
    return console.file.isatty() and console.is_terminal and not console.is_dumb_terminal


def _colours(tree: RunTree) -> dict[str, str]:
    agents = dict.fromkeys(part.agent for part in tree.walk())
    return {agent: _COLOURS[index % len(_COLOURS)] for index, agent in enumerate(agents)}


def _style(part: Part) -> str:
    return _STYLES.get(part.outcome, _STYLES[""]) if part.outcome else "bold"


def _symbol(part: Part, look: Look) -> tuple[str, str]:
    if not part.outcome:
        return look.spinner[int(time.time() / _REFRESH_SECONDS) % len(look.spinner)], "bold"
    return look.symbols.get(part.outcome, look.symbols[""]), _style(part)


def _name(guides: str, part: Part, look: Look, colours: Mapping[str, str]) -> Text:
    label = (part.label, f"bold {colours[part.agent]}" if part.kind == "run" else "")
    line = Text.assemble((guides, "dim"), _symbol(part, look), " ", label, no_wrap=True, overflow=look.overflow)
    return line.append(f"  {part.detail}", "dim") if part.detail else line


def result_table(tree: RunTree, look: Look, width: int = WIDEST) -> RenderableType:
    """The tree at its end: who did what, how it ended, how long it took and what it used."""
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


def live_table(tree: RunTree, look: Look, width: int, height: int) -> RenderableType:
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


def timeline(tree: RunTree, look: Look, width: int = WIDEST) -> RenderableType:
    """What ran at the same time: a bar to scale for each part, below a scale in seconds."""
    colours, wall = _colours(tree), max(tree.wall, 1e-3)
    width = min(width, WIDEST)
    names = min(max((len(guides) + len(part.label) for guides, part in tree.rows(look.guides)), default=0), width // 3)
    columns = max(width - names - 10, 10)
    lines = [Text(" " * (names + 2) + _scale(wall, columns), "dim", no_wrap=True, overflow="crop")]
    for guides, part in tree.rows(look.guides):
        name = Text.assemble((guides, "dim"), (part.label, colours[part.agent]), no_wrap=True)
        name.truncate(names, overflow=look.overflow, pad=True)
        start = min(int((part.started - tree.start) / wall * columns), columns - 1)
        end = min(max(math.ceil((part.started + part.seconds - tree.start) / wall * columns), start + 1), columns)
        bar = _bar(part, look, end - start)
        style = _style(part) if part.outcome != "ok" else colours[part.agent]
        gap = " " * (columns - end)
        lines.append(name.append(f"  {' ' * start}").append(bar, style).append(f"{gap} {part.seconds:5.2f} s", "dim"))
    bars = look.bars
    legend = f"{bars['model'] * 2} waits for the model   {bars['tool'] * 2} tool   {look.cut[-1]} cut off"
    return Group(*lines, Text(" " * (names + 2) + legend, "dim"))


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


async def watch(console: Console, tree: RunTree, work: Callable[[], Awaitable[T]]) -> T:
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
