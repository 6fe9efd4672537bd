"""`fractal visualize`: a page of HTML that shows traces in a browser."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterable
from pathlib import Path

from fractal._texts import one_line
from fractal._views.page import PageRuns, page_of
from fractal.cli.door import is_terminal, tell
from fractal.cli.files import check_writable, replace
from fractal.cli.which_agent import WrongUse
from fractal.tracing import TraceEvent, TraceReader, TraceUnreadable

__all__ = ["check_output", "visualize", "write_page"]

MOST_FILES = 10_000
"""Files of a directory that are read, the newest."""

_MOST_COMPLAINTS = 20


def visualize(trace: str, output: str | None) -> None:
    """Write the page of a trace.

    Args:
        trace: A file, or a directory of files.
        output: File to write. None: standard output.

    Raises:
        WrongUse: There is no trace, or the page cannot be written; what was in its place is as it was.
    """
    if output is None and is_terminal(sys.stdout):
        raise WrongUse("say with -o FILE where to write the page, or hand it on to another program")
    files = _files_of(trace)
    if output is not None:
        check_output("-o", output, files)
    runs, complaints = PageRuns(), list[str]()
    for file in files:
        complaints += _read(runs, file, is_alone=not os.path.isdir(trace))
    if not len(runs):
        raise WrongUse("\n  ".join([f"{trace}: no file in it is a trace", *complaints[:_MOST_COMPLAINTS]]))
    for complaint in complaints:
        tell(f"fractal visualize: {complaint}")
    more = len(complaints) - _MOST_COMPLAINTS
    complaints[_MOST_COMPLAINTS:] = [f"and {more} more"] if more > 0 else []
    pieces = page_of(runs, one_line(os.path.basename(os.path.abspath(trace))), complaints)
    if output is not None:
        _write(pieces, "-o", output)
        return
    for piece in pieces:
        sys.stdout.buffer.write(piece.encode())
    sys.stdout.flush()


def write_page(events: Iterable[TraceEvent], output: str, title: str) -> None:
    """Write the page of events that are in memory.

    Raises:
        WrongUse: It cannot be written.
    """
    runs = PageRuns()
    for event in events:
        runs.take(event)
    _write(page_of(runs, title), "--trace", output)


def check_output(flag: str, output: str, files: Iterable[str] = ()) -> None:
    """See whether a page may be written to a file.

    Raises:
        WrongUse: It may not, or it is one of those that are read.
    """
    try:
        check_writable(output)
    except OSError as error:
        raise WrongUse(f"{flag} {output}: {error.strerror or error}") from None
    target = Path(output).expanduser()
    if target.exists() and any(os.path.samefile(target, file) for file in files if os.path.exists(file)):
        raise WrongUse(f"{flag} {output}: that is the trace itself")


def _write(pieces: Iterable[str], flag: str, output: str) -> None:
    try:
        replace(output, pieces)
    except OSError as error:
        raise WrongUse(f"{flag} {output}: {error.strerror or error}") from None


def _files_of(trace: str) -> list[str]:
    """The file, or those of a directory, the oldest first."""
    if not os.path.isdir(trace):
        return [trace]
    try:
        files = [(each.stat().st_mtime, each.path) for each in os.scandir(trace) if _is_trace(each)]
    except OSError as error:
        raise WrongUse(f"{trace}: {error.strerror or error}") from None
    if not files:
        raise WrongUse(f"{trace}: there is no .jsonl file in it")
    if len(files) > MOST_FILES:
        tell(f"fractal visualize: of {len(files)} files the newest {MOST_FILES} are read")
    return [path for _, path in sorted(files)[-MOST_FILES:]]


def _is_trace(entry: os.DirEntry[str]) -> bool:
    return entry.name.endswith(".jsonl") and entry.is_file()


def _read(runs: PageRuns, file: str, *, is_alone: bool) -> list[str]:
    """Enter the events of a file; returns what was odd about it."""
    reader, name = TraceReader(file), one_line(os.path.basename(file))
    try:
        for event in reader:
            runs.take(event, name)
    except TraceUnreadable as error:
        if is_alone:
            raise WrongUse(str(error)) from None
        return [f"{name}: {error.reason}"]
    return [f"{name}: {complaint}" for complaint in reader.complaints()]
