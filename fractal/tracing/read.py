"""Trace files, read line by line: broken, foreign and huge ones too, in the memory that one line takes."""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator
from typing import IO, Any

from fractal._json import decode, is_mapping, text_of
from fractal.errors import FractalError
from fractal.tracing.record import TYPES, TraceEvent

__all__ = ["TraceFollower", "TraceReader", "TraceUnreadable", "event_of"]

_LONGEST_LINE = 16 * 2**20
"""Bytes; the lines of a `TracingKit` are shorter by far."""

_FAR = 1e12
"""Seconds since the epoch that no trace has, or a number of them; NaN is not below it either."""

_OF_AN_ARRAY = frozenset((b"", b"[", b"]"))
"""Lines besides the events in a file that `TracingKit.export_json` has made."""

_LONGEST_NAME = 500
"""Characters of a name or an id."""


class TraceUnreadable(FractalError):
    """A file is no trace, or there is none.

    Attributes:
        path: The file.
        reason: Why it cannot be read.
    """

    def __init__(self, path: str, reason: str) -> None:
        self.path, self.reason = path, reason
        super().__init__(f"{path}: {reason}")


class TraceReader:
    """Reads the events of a trace file, also of one that is a JSON array with an event on each line.

    What is no event is counted and passed over.

    Args:
        path: The file.

    Attributes:
        events: Events read so far.
        broken: Lines that were no JSON.
        foreign: Lines that were JSON, but no event.
        is_cut: Whether the last line is half a line, as a crash leaves it.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = os.fspath(path)
        self.events = self.broken = self.foreign = 0
        self.is_cut = False
        self._first = b""

    def __iter__(self) -> Iterator[TraceEvent]:
        """The events, in the order of the file.

        Raises:
            TraceUnreadable: The file cannot be read, or there is no event in it.
        """
        try:
            with open(self.path, "rb") as file:
                yield from self._events(file)
        except OSError as error:
            raise TraceUnreadable(self.path, error.strerror or str(error)) from None
        if not self.events:
            raise TraceUnreadable(self.path, self._why_empty())

    def complaints(self) -> list[str]:
        """The oddities of the file, a line each."""
        said: list[str] = []
        if self.broken:
            said.append(f"{_counted(self.broken, 'line')} not JSON, passed over")
        if self.foreign:
            said.append(f"{_counted(self.foreign, 'line')} no event of a trace, passed over")
        if self.is_cut:
            said.append("the last line is cut: the program was stopped while it wrote, or is writing now")
        return said

    def _events(self, file: IO[bytes]) -> Iterator[TraceEvent]:
        for line in _lines(file):
            event = self._event(line)
            if event is not None:
                yield event

    def _event(self, line: bytes) -> TraceEvent | None:
        text = line.strip()
        if text in _OF_AN_ARRAY:
            return None
        self._first = self._first or line[:200]
        try:
            values = decode(text.removesuffix(b","))
        except (ValueError, RecursionError):
            if line.endswith(b"\n"):
                self.broken += 1
            else:
                self.is_cut = True
            return None
        event = event_of(values)
        if event is None:
            self.foreign += 1
        else:
            self.events += 1
        return event

    def _why_empty(self) -> str:
        if not self._first:
            return "the file is empty"
        begin = self._first[:60].decode(errors="replace").strip()
        return f"no line of it is an event of a trace; it begins with {begin!r}"


class TraceFollower(TraceReader):
    """Reads the events of a trace file that grows, as they come; a file that is not there yet may come, too.

    Args:
        path: The file.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        super().__init__(path)
        self._which: tuple[int, int] | None = None
        self._position = 0  # that is read from next
        self._rest = b""  # of a line that is not whole yet

    def new(self) -> Iterator[TraceEvent]:
        """The events that have come since the last call.

        Raises:
            TraceUnreadable: The file cannot be read, or is no regular file.
        """
        try:
            status = os.stat(self.path)
            if not stat.S_ISREG(status.st_mode):
                raise TraceUnreadable(self.path, "it is no regular file, so that it cannot be followed")
            if (which := (status.st_dev, status.st_ino)) != self._which or status.st_size < self._position:
                self._which, self._position, self._rest = which, 0, b""  # another one has come in its stead
            if status.st_size > self._position:
                with open(self.path, "rb") as file:
                    file.seek(self._position)
                    yield from self._come(file)
        except FileNotFoundError:
            return
        except OSError as error:
            raise TraceUnreadable(self.path, error.strerror or str(error)) from None

    def _come(self, file: IO[bytes]) -> Iterator[TraceEvent]:
        while piece := file.readline(_LONGEST_LINE):
            self._position += len(piece)
            self._rest += piece
            if piece.endswith(b"\n"):
                line, self._rest = self._rest, b""
                event = self._event(line)
                if event is not None:
                    yield event
            elif len(self._rest) >= _LONGEST_LINE:
                self._rest = self._rest[:200]  # no line of a trace: its beginning is no JSON


def _lines(file: IO[bytes]) -> Iterator[bytes]:
    """The lines of a file; one that is too long for a trace is cut, so that it is no JSON."""
    while line := file.readline(_LONGEST_LINE):
        if len(line) == _LONGEST_LINE and not line.endswith(b"\n"):
            while (more := file.readline(_LONGEST_LINE)) and not more.endswith(b"\n"):
                pass
            line = line[:200] + b"\n"
        yield line


def event_of(values: Any) -> TraceEvent | None:
    """The event of a line, with values of the types that all readers expect; None if it is none."""
    if not is_mapping(values):
        return None
    at, kind, agent = (values.get(name) for name in ("timestamp", "event_type", "agent_name"))
    if not _is_number(at) or kind not in TYPES or not isinstance(agent, str):
        return None
    event = TraceEvent.of(values)
    depth = event.delegation_depth
    event.delegation_depth = min(max(depth, 0), 1000) if type(depth) is int else 0
    event.metadata = dict(event.metadata) if is_mapping(event.metadata) else {}
    event.elapsed_time = event.elapsed_time if _is_number(event.elapsed_time) else None
    for name in ("agent_name", "run_id", "parent_agent", "tool_name", "tool_call_id", "parallel_group_id"):
        value = getattr(event, name)
        if value is not None:
            setattr(event, name, text_of(value)[:_LONGEST_NAME])
    event.error = text_of(event.error) if event.error is not None else None
    return event


def _is_number(value: Any) -> bool:
    return type(value) in (int, float) and bool(-_FAR < value < _FAR)


def _counted(number: int, word: str) -> str:
    return f"1 {word} is" if number == 1 else f"{number} {word}s are"
