"""A batch of runs as a bar on standard error, or as a line of text now and then."""

from __future__ import annotations

import importlib
import importlib.util
import sys
import threading
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

import anyio

from fractal._concurrency.background import Background
from fractal._log import log

if TYPE_CHECKING:
    from rich.console import Console, RenderableType

__all__ = ["Progress", "described", "html_of", "shown"]

T = TypeVar("T")

_BAR_COLUMNS = 40  # at most


@dataclass(frozen=True, slots=True, kw_only=True)
class Progress:
    """The progress of a batch of runs.

    Attributes:
        total: Inputs there are; None if nobody knows, as with a generator.
        done: Runs that have ended, failed ones included.
        failed: Those of them without success.
        running: Runs under way.
        elapsed: Seconds since the start; at the end those the batch took.

    Example:
        >>> Progress(total=10, done=4, failed=1, running=2, elapsed=2.0).remaining
        3.0
    """

    total: int | None
    done: int
    failed: int
    running: int
    elapsed: float

    def _repr_html_(self) -> str:
        return html_of(self)

    @property
    def rate(self) -> float:
        """Runs that ended per second, since the start."""
        return self.done / self.elapsed if self.elapsed > 0 else 0.0

    @property
    def remaining(self) -> float | None:
        """Seconds left at the present rate; None if unknown."""
        if self.total is None:
            return None
        left = max(self.total - self.done, 0)
        if left == 0:
            return 0.0
        return left / self.rate if self.rate else None


async def shown(read: Callable[[], Progress], work: Callable[[], Awaitable[T]]) -> T:
    """Await some work and show its progress; the last picture stays.

    In a notebook a bar is shown below the cell. Elsewhere it is on standard error: a bar needs rich, a terminal, and
    that no other bar is drawn there; else there is a line every few seconds. What cannot be shown is no reason for the
    work to fail.

    Args:
        read: Says how far the work is.
        work: What to await.

    Returns:
        What the work returns.

    Raises:
        BaseException: What the work raises.
    """
    display = _Cell.made(read) or _Bar.made(read) or _Lines(read)
    drawing = Background(partial(_draw, display), "fractal progress")
    try:
        return await work()
    finally:
        try:
            await drawing.cancel_and_join()
        finally:
            _try(display.close)


class _Display(Protocol):
    seconds: float

    def open(self) -> None: ...

    def draw(self) -> None: ...

    def close(self) -> None: ...


async def _draw(display: _Display) -> None:
    is_shown = _try(display.open)
    while is_shown:
        await anyio.sleep(display.seconds)
        is_shown = _try(display.draw)


def _try(show: Callable[[], None]) -> bool:
    try:
        show()
    except Exception as error:  # the terminal has gone, say
        log.debug("progress cannot be shown", error)
        return False
    return True


class _Lines:
    seconds = 5.0

    def __init__(self, read: Callable[[], Progress]) -> None:
        self._read = read

    def open(self) -> None:
        pass  # nothing has happened yet

    def draw(self) -> None:
        sys.stderr.write(f"fractal: {described(self._read())}\n")
        sys.stderr.flush()

    def close(self) -> None:
        self.draw()


class _Cell:
    """A bar below a notebook's cell, which needs nothing but the notebook."""

    seconds = 0.2

    def __init__(self, read: Callable[[], Progress], display: Callable[..., Any]) -> None:
        self._read, self._display = read, display
        self._shown: Any = None

    @classmethod
    def made(cls, read: Callable[[], Progress]) -> _Cell | None:
        """A bar, if this is a notebook: a terminal's IPython has no kernel, and shows no HTML."""
        ipython: Any = sys.modules.get("IPython")
        shell = ipython.get_ipython() if ipython is not None else None
        if getattr(shell, "kernel", None) is None:
            return None
        return cls(read, importlib.import_module("IPython.display").display)

    def open(self) -> None:
        self._shown = self._display(self._picture(), raw=True, display_id=True)

    def draw(self) -> None:
        self._shown.update(self._picture(), raw=True)

    def close(self) -> None:
        self.draw()

    def _picture(self) -> dict[str, str]:
        progress = self._read()
        return {"text/plain": described(progress), "text/html": html_of(progress)}


_one_bar = threading.Lock()  # two would draw over each other


class _Bar:
    seconds = 0.1

    def __init__(self, console: Console, read: Callable[[], Progress]) -> None:
        from rich.live import Live

        self._live = Live(
            console=console,
            get_renderable=lambda: _picture(read(), console),
            auto_refresh=False,  # a task draws, not rich's thread
            # What tools print goes above the bar, but never from a pipe into the terminal.
            redirect_stdout=sys.stdout.isatty(),
            redirect_stderr=sys.stderr.isatty(),
        )

    @classmethod
    def made(cls, read: Callable[[], Progress]) -> _Bar | None:
        """A bar, if there can be one."""
        if importlib.util.find_spec("rich") is None:
            return None
        from rich.console import Console

        from fractal._views.terminal import is_live

        console = Console(stderr=True, highlight=False)
        return cls(console, read) if is_live(console) and _one_bar.acquire(blocking=False) else None

    def open(self) -> None:
        self._live.start(refresh=True)

    def draw(self) -> None:
        self._live.refresh()

    def close(self) -> None:
        try:
            self._live.stop()  # draws once more
        finally:
            _one_bar.release()


def _picture(progress: Progress, console: Console) -> RenderableType:
    from rich.progress_bar import ProgressBar
    from rich.table import Table
    from rich.text import Text

    text = described(progress)
    line = Table.grid(padding=(0, 1))
    columns = min(_BAR_COLUMNS, console.width - len(text) - 2)
    if columns >= _BAR_COLUMNS / 4:
        # Without a total the bar only moves.
        line.add_row(ProgressBar(progress.total, progress.done, columns), Text(text, no_wrap=True))
    else:
        line.add_row(Text(text, no_wrap=True))
    return line


def html_of(progress: Progress) -> str:
    """The progress of a batch, as a bar for a notebook."""
    from fractal._html import of_progress

    return of_progress(described(progress), progress.done, progress.total)


def described(progress: Progress) -> str:
    """The progress of a batch, as one line of text."""
    total = "" if progress.total is None else f" of {progress.total}"
    facts = [f"{progress.done}{total} done"]
    if progress.failed:
        facts.append(f"{progress.failed} failed")
    if progress.rate >= 1:
        facts.append(f"{progress.rate:.1f}/s")
    elif progress.rate:
        facts.append(f"{progress.rate * 60:.1f}/min")
    left = progress.remaining
    facts.append(f"{_clock(left)} left" if left else f"in {_clock(progress.elapsed)}")
    return ", ".join(facts)


def _clock(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"
