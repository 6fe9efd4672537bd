"""The files of traces that commands read: one, or those of a directory."""

from __future__ import annotations

import os
from collections.abc import Generator, Iterator
from contextlib import contextmanager

from fractal._texts import one_line
from fractal.cli.door import tell
from fractal.cli.which_agent import WrongUse
from fractal.tracing import TraceEvent, TraceReader, TraceUnreadable

__all__ = ["TraceFiles", "reading"]

MOST_FILES = 10_000
"""Files of a directory that are read, the newest."""

_MOST_COMPLAINTS = 20


class TraceFiles:
    """The events of a trace file, or of all in a directory, one file after the other.

    Args:
        trace: The file or the directory.
        command: Who reads, for messages.

    Attributes:
        paths: The files.
        complaints: What was odd about them, a line each.

    Raises:
        WrongUse: There is none, or the directory cannot be read.
    """

    def __init__(self, trace: str, command: str) -> None:
        self._trace, self._command = trace, command
        self.paths = _files_of(trace, command)
        self.complaints: list[str] = []

    def __iter__(self) -> Iterator[TraceEvent]:
        return (event for _, event in self.with_names())

    def with_names(self) -> Iterator[tuple[str, TraceEvent]]:
        """The events, each with the name of its file.

        Raises:
            WrongUse: No file is a trace.
        """
        is_alone, count = not os.path.isdir(self._trace), 0
        for path in self.paths:
            reader, name = TraceReader(path), one_line(os.path.basename(path))
            try:
                for event in reader:
                    yield name, event
                count += 1
            except TraceUnreadable as error:
                if is_alone:
                    raise WrongUse(str(error)) from None
                self.complaints.append(f"{name}: {error.reason}")
            finally:
                self.complaints += (f"{name}: {complaint}" for complaint in reader.complaints() if reader.events)
        if not count:
            raise WrongUse("\n  ".join([f"{self._trace}: no file in it is a trace", *self.first_complaints()]))

    def complain(self) -> None:
        """Tell the user what was odd about the files."""
        for complaint in self.first_complaints():
            tell(f"fractal {self._command}: {complaint}")

    def first_complaints(self) -> list[str]:
        """What was odd about the files, as many lines as anybody reads."""
        more = len(self.complaints) - _MOST_COMPLAINTS
        return [*self.complaints[:_MOST_COMPLAINTS], *([f"and {more} more"] if more > 0 else [])]


@contextmanager
def reading(trace: str) -> Generator[TraceFiles]:
    """Read the events of a file or a directory, and tell what was odd about them.

    Raises:
        WrongUse: There is no trace.
    """
    files = TraceFiles(trace, "trace")
    try:
        yield files
    finally:
        files.complain()


def _files_of(trace: str, command: str) -> list[str]:
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
        tell(f"fractal {command}: of {len(files)} files the newest {MOST_FILES} are read")
    return [path for _, path in sorted(files)[-MOST_FILES:]]


def _is_trace(entry: os.DirEntry[str]) -> bool:
    return entry.name.endswith(".jsonl") and entry.is_file()
