"""What comes on a connection: the heads and bodies of HTTP/1.1 answers, read by httptools."""

from __future__ import annotations

from typing import NamedTuple

from httptools import HttpParserError, HttpParserUpgrade, HttpResponseParser

__all__ = ["Head", "Incoming"]

_LONGEST_HEAD = 100 * 1024

_LENGTHS = (b"content-length", b"transfer-encoding")


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
    """Reads answers out of the bytes of a connection, one after another.

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
        "_has_body",
        "_headers",
        "_parser",
        "_reason",
        "_size",
        "fault",
        "head",
        "is_last",
        "is_whole",
        "pieces",
    )

    def __init__(self) -> None:
        self._parser: HttpResponseParser | None = HttpResponseParser(self)
        # What h11 forgives too. Strict rules are against smuggling, for which somebody in between has to read by
        # other rules.
        self._parser.set_dangerous_leniencies(
            lenient_headers=True,
            lenient_chunked_length=True,
            lenient_optional_cr_before_lf=True,
            lenient_spaces_after_chunk_size=True,
        )
        self.fault: str | None = None
        self.is_last = False
        self.expect(has_body=True)

    def expect(self, *, has_body: bool) -> None:
        """Make ready for the answer to the next request.

        Args:
            has_body: Whether there can be one: not in an answer to HEAD.
        """
        self._has_body = has_body
        self._size = 0
        self._reason, self._headers = b"", list[tuple[bytes, bytes]]()
        self.head: Head | None = None
        self.pieces: list[bytes] = []
        self.is_whole = False

    def feed(self, data: bytes) -> None:
        """Read what has come; nothing: the server has closed the connection."""
        if not data:
            self._end()
            return
        assert self._parser is not None
        if self.head is None:
            self._size += len(data)
        try:
            self._parser.feed_data(data)
        except (HttpParserError, HttpParserUpgrade) as error:
            self.is_last = True
            if not self.is_whole:
                self.fault = f"the answer is no HTTP: {error}"
        if self.head is None and self._size > _LONGEST_HEAD:
            self.fault = "the head of the answer is too long"

    def close(self) -> None:
        """Forget the parser, which holds on to this object."""
        self._parser = None

    def _end(self) -> None:
        self.is_last = True
        if self.head is None:
            self.fault = "the server closed the connection and said nothing"
        elif any(name.lower() in _LENGTHS for name, _ in self.head.headers):
            self.fault = "the server closed the connection without sending complete message body"
        else:
            self.is_whole = True

    def on_message_begin(self) -> None:
        """Something begins: the answer, or what nobody has asked for."""
        self.is_last |= self.is_whole

    def on_status(self, reason: bytes) -> None:
        """A piece of the reason; mostly all of it."""
        self._reason += reason

    def on_header(self, name: bytes, value: bytes) -> None:
        """A header, or a trailer, which nobody reads."""
        self._headers.append((name, value.rstrip(b" \t")))  # those before it are no part of it to httptools either

    def on_headers_complete(self) -> None:
        """All of a head."""
        assert self._parser is not None
        status = self._parser.get_status_code()
        if status >= 200 and not self.is_whole:
            self.head = Head(status, self._reason, self._parser.get_http_version(), self._headers)
            if not self._has_body:
                self.is_whole = self.is_last = True
        self._reason, self._headers = b"", []

    def on_body(self, data: bytes) -> None:
        """A piece of the body."""
        if not self.is_whole:
            self.pieces.append(data)

    def on_message_complete(self) -> None:
        """The end of the answer, or of a hint."""
        assert self._parser is not None
        if self.head is not None:
            self.is_whole = True
            self.is_last |= not self._parser.should_keep_alive()
