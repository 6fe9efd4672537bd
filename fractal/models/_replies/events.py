"""Server-sent events, cut out of bytes that may be cut anywhere.

The format: https://html.spec.whatwg.org/multipage/server-sent-events.html
"""

from __future__ import annotations

from fractal.errors import ReplyTooLarge

__all__ = ["ErrorData", "EventReader"]

_BOM = b"\xef\xbb\xbf"


class ErrorData(bytes):
    """The data of an event whose name, or whose field, says that it is an error."""


class EventReader:
    """A parser of server-sent events.

    Args:
        longest: Bytes that one event may have.
    """

    __slots__ = ("_begun", "_data", "_is_error", "_longest", "_rest", "_size", "_skips_line_feed")

    def __init__(self, longest: int) -> None:
        self._longest = longest
        self._begun = False
        self._skips_line_feed = False
        self._rest: list[bytes] = []  # of a line that is not complete
        self._data: list[bytes] = []  # of an event that is not complete
        self._size = 0  # bytes of both
        self._is_error = False

    def read(self, data: bytes) -> list[bytes]:
        """The data of the events that these bytes complete.

        Raises:
            ReplyTooLarge: One is longer than an event may be.
        """
        whole, data = self._read_plain(data)
        data = self._with_plain_ends(data)
        first, *others = data.split(b"\n")
        self._rest.append(first)
        self._size += len(first)
        for line in others:
            self._take_line(b"".join(self._rest), whole)
            self._rest = [line]
            self._size += len(line)
        self._hold_bound()
        return whole

    def end(self) -> list[bytes]:
        """The data of the event that the end of the stream completes, if there is one."""
        whole: list[bytes] = []
        self._take_line(b"".join(self._rest), whole)
        self._take_line(b"", whole)
        self._rest = []
        return whole

    def _read_plain(self, data: bytes) -> tuple[list[bytes], bytes]:
        """The data of the events that these bytes complete, if each is one line, as most endpoints write them.

        Returns:
            The data; and what of the bytes is still to be read.
        """
        end = data.rfind(b"\n\n") + 2
        if end < 2 or self._data or self._is_error or self._skips_line_feed or b"\r" in data:
            return [], data
        if self._size + end > self._longest:  # one of them may be too long
            return [], data
        plain = _plain_events(b"".join((*self._rest, data[:end])))
        if plain is None:
            return [], data
        self._begun, self._rest, self._size = True, [], 0
        return plain, data[end:]

    def _with_plain_ends(self, data: bytes) -> bytes:
        """The bytes with a line feed at the end of each line, and without blanks and the mark at the beginning."""
        if not self._begun:  # a gateway may have written blanks to keep the connection open
            data = b"".join((*self._rest, data)).lstrip().removeprefix(_BOM).lstrip()
            self._rest, self._size = [], 0
            if _BOM.startswith(data):  # nothing yet, or a part of the mark
                self._rest, self._size = [data], len(data)
                return b""
            self._begun = True
        if self._skips_line_feed and data:
            data = data.removeprefix(b"\n")
            self._skips_line_feed = False
        if b"\r" in data:
            self._skips_line_feed = data.endswith(b"\r")
            data = data.replace(b"\r\n", b"\n").replace(b"\r", b"\n")
        return data

    def _take_line(self, line: bytes, whole: list[bytes]) -> None:
        if line.startswith(b"data:"):
            self._data.append(line[5:].strip())
        elif not line:
            self._end_event(whole)
        elif line.startswith(b"event:"):
            self._is_error = line[6:].strip() == b"error"
        elif line.startswith(b"error:"):  # a field that some servers have made up
            self._is_error = True
            self._data.append(line[6:].strip())

    def _hold_bound(self) -> None:
        if self._size > self._longest:
            raise ReplyTooLarge("line", self._longest)

    def _end_event(self, whole: list[bytes]) -> None:
        self._hold_bound()
        if self._data:
            data = b"\n".join(self._data)
            whole.append(ErrorData(data) if self._is_error else data)
            self._data = []
        self._is_error, self._size = False, 0


def _plain_events(data: bytes) -> list[bytes] | None:
    """The data of events that are one line each; None if one is something else."""
    events = data[:-2].split(b"\n\n")
    others = len(events) - 1
    is_plain = data.startswith(b"data:") and data.count(b"\n\ndata:") == others
    if not is_plain or data.count(b"\n") != 2 * others + 2:
        return None
    return [event[5:].strip() for event in events]
