"""Which view of a trace `fractal trace` shows."""

from __future__ import annotations

import os
from contextlib import suppress
from typing import TYPE_CHECKING

from fractal.cli.trace import show_errors, show_flow, show_hierarchy, show_runs, show_summary, show_trees, wanted
from fractal.cli.trace_files import reading
from fractal.cli.trace_follow import follow, followed
from fractal.cli.which_agent import WrongUse

if TYPE_CHECKING:
    from rich.console import Console

__all__ = ["show_trace"]


def show_trace(trace: str, view: str | None, *, run_id: str, is_followed: bool, as_json: bool, has_rich: bool) -> None:
    """Show a trace.

    Args:
        trace: A file, or a directory of files.
        view: What to show of it; None: of a file trees, of a directory the list of its runs.
        run_id: Beginning of the id of the runs that are wanted; empty for all.
        is_followed: Whether to show the file while it grows.
        as_json: Whether to show it as JSON.
        has_rich: Whether there is the library that draws.

    Raises:
        WrongUse: There is no trace, or no such view of it.
    """
    if as_json and view in (None, "summary"):
        view = "summary"
    elif as_json and view not in ("errors", "compact"):
        raise WrongUse(f"--json is for numbers, errors and the list of runs: leave out --{view}")
    elif view is None:
        view = "compact" if os.path.isdir(trace) else "trees"
    if not has_rich and not as_json and view not in ("summary", "errors"):
        raise WrongUse("this is drawn with rich, which is not here: pip install rich, or use --summary or --errors")
    if is_followed:
        with suppress(KeyboardInterrupt):
            _follow(trace, view, run_id, as_json)
    else:
        _show(trace, view, run_id, as_json)


def _show(trace: str, view: str, run_id: str, as_json: bool) -> None:
    with reading(trace) as files:
        if view == "compact":
            console = None if as_json else _console()
            named = ((name, event) for name, event in files.with_names() if (event.run_id or "").startswith(run_id))
            show_runs(named, console, has_files=os.path.isdir(trace))
            return
        events = wanted(files, run_id, trace) if run_id else files
        match view:
            case "summary":
                show_summary(events, as_json=as_json)
            case "errors":
                show_errors(events, as_json=as_json)
            case "flow":
                show_flow(events, _console())
            case "hierarchy":
                show_hierarchy(events, _console())
            case _:
                show_trees(events, _console())


def _follow(trace: str, view: str, run_id: str, as_json: bool) -> None:
    if view not in ("trees", "flow", "errors"):
        raise WrongUse(f"--follow shows a tree, --flow or --errors, and no --{view}")
    if os.path.isdir(trace):
        raise WrongUse(f"{trace}: --follow is for a file, and this is a directory")
    if view == "errors":
        show_errors(followed(trace, run_id), as_json=as_json)
        return
    from fractal._views.terminal import is_live

    console = _console()
    if view == "trees" and is_live(console):
        follow(trace, run_id, console)
    else:
        show_flow(followed(trace, run_id), console)


def _console() -> Console:
    from rich.console import Console

    return Console(highlight=False)
