"""Heads of answers that a strict parser refuses and others read without doubt, written anew.

Chained proxies repeat a length, old servers say that a body is not encoded. h11 is the judge of what can be read in
one way only.
"""

from __future__ import annotations

import re

import h11

__all__ = ["after_hints", "forgiven"]

_END = re.compile(rb"\r?\n\r?\n")
_HINT = re.compile(rb"HTTP/\d\.\d 1(?!01)\d\d")
_NO_CODING = re.compile(rb"^transfer-encoding[ \t]*:[ \t]*identity[ \t]*\r?\n", re.IGNORECASE | re.MULTILINE)


def after_hints(data: bytes) -> bytes:
    """What comes behind the hints before an answer, of which the last one may not have come as a whole."""
    start = 0
    while _HINT.match(data, start) and (end := _END.search(data, start)) is not None:
        start = end.end()
    return data[start:]


def forgiven(data: bytes) -> bytes | None:
    """The bytes of an answer from its beginning, with a head that every parser takes.

    Args:
        data: All that has come of it, without the hints before it.

    Returns:
        The answer; None if its head has not come as a whole.

    Raises:
        h11.RemoteProtocolError: The head cannot be read in one way only.
    """
    end = _END.search(data)
    if end is None or _HINT.match(data):
        return None
    head = _NO_CODING.sub(b"", data[: end.end()])
    return _written(_read(head)) + data[end.end() :]


def _read(head: bytes) -> h11.Response:
    connection = h11.Connection(h11.CLIENT, max_incomplete_event_size=len(head))
    connection.send(h11.Request(method="POST", target="/", headers=[("Host", "a"), ("Content-Length", "0")]))
    connection.send(h11.EndOfMessage())
    connection.receive_data(head)
    event = connection.next_event()
    if not isinstance(event, h11.Response):
        raise h11.RemoteProtocolError("it has no head")
    return event


def _written(head: h11.Response) -> bytes:
    version = b"1.0" if head.http_version < b"1.1" else b"1.1"
    lines = [b"HTTP/%b %d %b" % (version, head.status_code, head.reason)]
    lines += [b"%b: %b" % (name, value) for name, value in head.headers]
    return b"\r\n".join((*lines, b"", b""))
