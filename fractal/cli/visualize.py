"""`fractal visualize`: a page of HTML that shows traces in a browser."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterable
from pathlib import Path

from fractal._texts import one_line
from fractal._views.page import PageRuns, page_of
from fractal.cli.door import is_terminal
from fractal.cli.files import check_writable, replace
from fractal.cli.trace_files import TraceFiles
from fractal.cli.which_agent import WrongUse
from fractal.tracing import TraceEvent

__all__ = ["check_output", "visualize", "write_page"]


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
    files, runs = TraceFiles(trace, "visualize"), PageRuns()
    if output is not None:
        check_output("-o", output, files.paths)
    for name, event in files.with_names():
        runs.take(event, name)
    files.complain()
    pieces = page_of(runs, one_line(os.path.basename(os.path.abspath(trace))), files.first_complaints())
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
