"""What comes on a connection: the heads and bodies of HTTP/1.1 answers, read by httptools."""

from __future__ import annotations

from typing import NamedTuple

from httptools import HttpParserError, HttpParserUpgrade, HttpResponseParser

from fractal.errors import ReplyTooLarge
from fractal.models.bounds import DEFAULT_BOUNDS, ReplyBounds

__all__ = ["Head", "Incoming"]

_LENGTHS = (b"content-length", b"transfer-encoding")
_CODING = b"transfer-encoding"
_BEGIN = b"HTTP/1."
_ENDS = (b"\n\n", b"\n\r\n")  # of a head


class Head(NamedTuple):
    """The head of an answer.

    Attributes:
        status_code: HTTP status.
        reason: What the server calls it.
        version: Of HTTP, such as "1.1".
        headers: Names and values, as they came.
    """

    status_code: int
    reason: bytes
    version: str
    headers: list[tuple[bytes, bytes]]


class Incoming:
    """A parser of the answers on a connection, one after another.

    The parser calls the methods whose names begin with `on_`. It does not know what was asked, only what comes: hints
    before the answer, which have heads of their own, and, after it, what nobody has asked for.

    Attributes:
        head: The head of the answer; None until all of it has come.
        pieces: Those of its body that nobody has taken.
        is_whole: Whether all of it has come.
        is_last: Whether no other answer can follow it on this connection.
        fault: What is wrong with what has come, or None; what came before is still good.
    """

    __slots__ = (
        "_begun",
        "_bounds",
        "_has_body",
        "_headers",
        "_is_coded",
        "_most",
        "_parser",
        "_reason",
        "_seam",
        "_size",
        "_unread",
        "fault",
        "head",
        "is_last",
        "is_whole",
        "pieces",
    )

    def __init__(self) -> None:
        self._parser: HttpResponseParser | None = self._new_parser()
        self.fault: ReplyTooLarge | str | None = None
        self.is_last = False
        self.expect(has_body=True)

    def expect(self, *, has_body: bool, bounds: ReplyBounds = DEFAULT_BOUNDS) -> None:
        """Make ready for the answer to the next request.

        Args:
            has_body: Whether there can be one: not in an answer to HEAD.
            bounds: The most that is read of it.
        """
        self._has_body, self._bounds = has_body, bounds
        self._size = self._unread = 0  # bytes in all; bytes since there was a piece of the body, or the beginning
        self._most = bounds.head + 2 * bounds.body  # chunks need bytes of their own
        self._begun: list[bytes] = []  # what has come of a head that is not whole
        self._seam = b""  # the last bytes of that, where its end is waited for
        self._reason, self._headers = b"", list[tuple[bytes, bytes]]()
        self._is_coded = False
        self.head: Head | None = None
        self.pieces: list[bytes] = []
        self.is_whole = False

    def feed(self, data: bytes) -> None:
        """Parse bytes; empty bytes mean that the server has closed the connection."""
        if not data:
            self._end()
            return
        head = self.head
        self._size += len(data)
        self._unread += len(data)
        if head is None:
            self._begun.append(data)
        if self._parser is not None:
            self._parse(data)
        if self.head is None and self.is_last:
            self._forgive(data)
        if self._size > self._bounds.head and self.fault is None:
            self._hold_bounds(is_beginning=head is None)

    def close(self) -> None:
        """Drop the parser, which refers back to this object."""
        self._parser = None

    def _new_parser(self) -> HttpResponseParser:
        parser = HttpResponseParser(self)
        # What h11 forgives too. Strict rules are against smuggling, for which somebody in between has to read by
        # other rules.
        parser.set_dangerous_leniencies(
            lenient_headers=True,
            lenient_chunked_length=True,
            lenient_optional_cr_before_lf=True,
            lenient_spaces_after_chunk_size=True,
        )
        return parser

    def _parse(self, data: bytes) -> None:
        assert self._parser is not None
        try:
            self._parser.feed_data(data)
        except (HttpParserError, HttpParserUpgrade) as error:
            self.is_last = True
            if not self.is_whole:
                why = "another protocol" if isinstance(error, HttpParserUpgrade) else error.__context__ or error
                self.fault = f"the answer is no HTTP: {why}"

    def _forgive(self, data: bytes) -> None:
        """Parse a head that the parser refuses, if there is only one way to read it."""
        if self._parser is None:  # the end of the head was waited for, and most bytes do not bring it
            seam = self._seam + data
            self._seam = seam[-3:]
            if not any(end in seam for end in _ENDS):
                return
        from h11 import RemoteProtocolError  # most heads need none of it

        from fractal.models._http.heads import after_hints, forgiven

        begun = after_hints(b"".join(self._begun))
        self._begun, self._seam = [begun], begun[-3:]
        try:
            answer = forgiven(begun)
        except RemoteProtocolError as error:
            self.fault = self.fault or f"the answer is no HTTP: {error}"
            return
        if answer is not None:
            self._parser, self.fault, self.is_last = self._new_parser(), None, False
            self._reason, self._headers, self._is_coded = b"", [], False
            self._parse(answer)
        elif begun[: len(_BEGIN)] == _BEGIN[: len(begun)]:
            self._parser = self.fault = None  # until the rest of the head has come

    def _hold_bounds(self, *, is_beginning: bool) -> None:
        is_long = self.head is None or (is_beginning and _length_of(self.head) > self._bounds.head)
        if is_long:
            self.head, self.pieces = None, []  # nothing of it is of use
        if is_long or self._unread > self._bounds.head:
            self.fault = ReplyTooLarge("head", self._bounds.head)
        elif self._size > self._most:
            self.fault = ReplyTooLarge("body", self._bounds.body)

    def _end(self) -> None:
        self.is_last = True
        if self.head is None:
            self.fault = "the server closed the connection and said nothing"
        elif any(name.lower() in _LENGTHS for name, _ in self.head.headers):
            self.fault = "the server closed the connection without sending complete message body"
        else:
            self.is_whole = True

    def on_message_begin(self) -> None:
        """Note the beginning of a message: the answer, or bytes that nobody asked for."""
        self.is_last |= self.is_whole

    def on_status(self, reason: bytes) -> None:
        """Take a piece of the reason phrase, mostly all of it."""
        self._reason += reason

    def on_header(self, name: bytes, value: bytes) -> None:
        """Take a header, or a trailer, which is ignored."""
        if self.head is None:
            value = value.rstrip(b" \t")  # those before it are no part of it to httptools either
            self._headers.append((name, value))
            if len(name) == len(_CODING) and name.lower() == _CODING:
                self._is_coded |= value.lower() != b"chunked"

    def on_headers_complete(self) -> None:
        """Take the end of a head."""
        assert self._parser is not None
        status = self._parser.get_status_code()
        if self._is_coded:
            raise ValueError("it has a Transfer-Encoding other than chunked, which nobody has asked for")
        if status >= 200 and not self.is_whole:
            self.head = Head(status, self._reason, self._parser.get_http_version(), self._headers)
            self._begun.clear()
            if not self._has_body:
                self.is_whole = self.is_last = True
        self._reason, self._headers = b"", []

    def on_body(self, data: bytes) -> None:
        """Take a piece of the body."""
        if not self.is_whole:
            self.pieces.append(data)
            self._unread = 0

    def on_message_complete(self) -> None:
        """Note the end of the answer, or of an informational one."""
        assert self._parser is not None
        if self.head is not None:
            self.is_whole = True
            self.is_last |= not self._parser.should_keep_alive()


def _length_of(head: Head) -> int:
    """Bytes of a head, but for the spaces in it."""
    return len(head.reason) + 15 + sum(len(name) + len(value) + 4 for name, value in head.headers)
