"""One connection to an endpoint: HTTP/1.1 on a socket of AnyIO's.

This module loads httpx2, whose errors are raised here, so nothing imports it before the first request.
"""

from __future__ import annotations

import math
import select
import sys
from contextlib import suppress
from typing import TYPE_CHECKING, Any, Self, TypeAlias, cast

import anyio
import h11
import httpx2
from anyio.abc import SocketAttribute

from fractal._scopes import move_on_after
from fractal.models._incoming import Incoming

if TYPE_CHECKING:
    import socket
    import ssl
    from collections.abc import Awaitable, Callable, Mapping

    from anyio.abc import ByteStream

    from fractal.models._incoming import Head

__all__ = ["Answer", "Connection", "Origin", "Template"]

Origin: TypeAlias = tuple[str, str, int]
"""Scheme, host and port."""

_READ_AT_ONCE = 64 * 1024
_PORTS = {"http": 80, "https": 443}


class Template:
    """A request without its body: what httpx2 makes of a URL and headers, made once.

    Args:
        request: The request; its body is left out.

    Raises:
        httpx2.UnsupportedProtocol: It goes somewhere else than to an http or https URL.
        httpx2.LocalProtocolError: A header has characters that none may have.

    Attributes:
        request: The request.
        origin: Where it goes.
        has_answer_body: Whether there can be a body in the answer.
    """

    __slots__ = ("_head", "_timeouts", "has_answer_body", "origin", "request")

    def __init__(self, request: httpx2.Request) -> None:
        url = request.url
        if url.scheme not in _PORTS:
            raise httpx2.UnsupportedProtocol(f"the URL has no http:// or https://: {url}", request=request)
        self.request = request
        self.origin: Origin = (url.scheme, url.raw_host.decode("ascii"), url.port or _PORTS[url.scheme])
        self.has_answer_body = request.method != "HEAD"
        self._timeouts: Mapping[str, float | None] = request.extensions.get("timeout", {})
        headers = [header for header in request.headers.raw if header[0].lower() not in _OF_THE_BODY]
        try:
            head = h11.Request(method=request.method, target=url.raw_path, headers=headers)
            written = h11.Connection(h11.CLIENT).send(head)
        except h11.LocalProtocolError as error:
            raise httpx2.LocalProtocolError(str(error), request=request) from error
        assert written is not None
        self._head = written.removesuffix(b"\r\n")

    def with_body(self, body: bytes) -> bytes:
        """All of the request."""
        return b"%bContent-Length: %d\r\n\r\n%b" % (self._head, len(body), body)

    def timeout(self, what: str) -> float | None:
        """Seconds to `connect`, to `write`, or until there is something to `read`; None: as long as it takes."""
        return self._timeouts.get(what)


_OF_THE_BODY = (b"content-length", b"transfer-encoding")


class Connection:
    """A connection, for one request after another.

    Args:
        origin: Where it goes.

    Attributes:
        is_idle: Whether another request may be sent: the last answer has been read to its end.
        idle_since: For whoever keeps it: when that was.
    """

    def __init__(self, origin: Origin) -> None:
        self.origin = origin
        self.is_idle = False
        self.idle_since = 0.0
        self._stream: ByteStream | None = None
        self._has_news: Callable[[], bool] | None = None
        self._incoming = Incoming()

    @property
    def is_stale(self) -> bool:
        """Whether the endpoint has closed it, or said something that nobody has asked for."""
        return self._has_news is None or self._has_news()

    async def send(self, request: Template, body: bytes, make_tls: Callable[[], Awaitable[ssl.SSLContext]]) -> Answer:
        """Send a request, after connecting if need be, and wait for the head of the answer.

        Raises:
            httpx2.RequestError: There is none.
        """
        self.is_idle = False
        if self._stream is None:
            tls = await make_tls() if self.origin[0] == "https" else None
            self._stream = await self._connected(request, tls)
            self._has_news = _readable(self._stream.extra(SocketAttribute.raw_socket))
        incoming = self._incoming
        incoming.expect(has_body=request.has_answer_body)
        self._feed(request, await self._exchange(request, request.with_body(body)))
        while incoming.head is None:
            self._feed(request, await self._read(request))
        return Answer(self, request, incoming.head)

    async def next_piece(self, request: Template) -> bytes:
        """As much of the body as has come, as soon as there is any; nothing at its end.

        Raises:
            httpx2.RequestError: Nothing comes, or it is no HTTP.
        """
        incoming = self._incoming
        while not incoming.pieces and not incoming.is_whole:
            self._feed(request, b"" if incoming.fault else await self._read(request))
        if incoming.pieces:
            data = b"".join(incoming.pieces)
            incoming.pieces.clear()
            return data
        self.is_idle = not incoming.is_last
        return b""

    async def aclose(self) -> None:
        """Close it."""
        self.is_idle = False
        self._incoming.close()
        if self._stream is not None:
            await self._stream.aclose()

    async def _connected(self, request: Template, tls: ssl.SSLContext | None) -> ByteStream:
        _, host, port = self.origin
        try:
            with move_on_after(request.timeout("connect")):
                if tls is None:
                    return await anyio.connect_tcp(host, port)
                # As in all of HTTP the end of an answer is told by its length, not by TLS.
                return await anyio.connect_tcp(host, port, tls=True, ssl_context=tls, tls_standard_compatible=False)
        except TimeoutError as error:  # the system's own
            raise httpx2.ConnectTimeout(str(error), request=request.request) from error
        except (OSError, anyio.BrokenResourceError, anyio.EndOfStream) as error:
            raise httpx2.ConnectError(str(error), request=request.request) from error
        raise httpx2.ConnectTimeout("", request=request.request)

    async def _exchange(self, request: Template, data: bytes) -> bytes:
        """Write a request, and read the first that comes; under one scope, which costs as much as the parsing."""
        assert self._stream is not None
        late: type[httpx2.TimeoutException] = httpx2.WriteTimeout
        with move_on_after(request.timeout("write")) as scope:
            with suppress(anyio.BrokenResourceError, anyio.ClosedResourceError):
                # In one piece: a second one would be another turn of the event loop, and another packet.
                await self._stream.send(data)
            # An endpoint that takes no more may have said why.
            late, seconds = httpx2.ReadTimeout, request.timeout("read")
            seconds = math.inf if seconds is None else seconds
            now = anyio.current_time()
            if not 0.99 * seconds <= scope.deadline - now <= seconds:  # mostly it is right, and to change it costs too
                scope.deadline = now + seconds
            return await self._receive(request)
        raise late("", request=request.request)

    async def _read(self, request: Template) -> bytes:
        """What comes next; nothing, if the endpoint has closed the connection."""
        with move_on_after(request.timeout("read")):
            return await self._receive(request)
        raise httpx2.ReadTimeout("", request=request.request)

    async def _receive(self, request: Template) -> bytes:
        assert self._stream is not None
        try:
            return await self._stream.receive(_READ_AT_ONCE)
        except anyio.EndOfStream:
            return b""
        except (anyio.BrokenResourceError, anyio.ClosedResourceError) as error:
            raise httpx2.ReadError(str(error), request=request.request) from error

    def _feed(self, request: Template, data: bytes) -> None:
        incoming = self._incoming
        if incoming.fault is None:
            incoming.feed(data)
        if incoming.fault is not None and not incoming.pieces:
            raise httpx2.RemoteProtocolError(incoming.fault, request=request.request)


class Answer:
    """The answer to a request: as much of an `httpx2.Response` as is read here, with the same names.

    Its body is read once, as a whole or, as an iterator, piece by piece.

    Args:
        connection: Where it comes from.
        request: The request.
        head: Its head.

    Attributes:
        head: Its head.
        status_code: HTTP status.
        headers: The headers; names in lower case.
    """

    __slots__ = ("_connection", "_request", "head", "headers", "status_code")

    def __init__(self, connection: Connection, request: Template, head: Head) -> None:
        self._connection, self._request, self.head = connection, request, head
        self.status_code = head.status_code
        self.headers = {name.decode("latin-1").lower(): value.decode("latin-1") for name, value in head.headers}

    @property
    def is_encoded(self) -> bool:
        """Whether the body has to be decoded."""
        return "content-encoding" in self.headers

    @property
    def is_elsewhere(self) -> bool:
        """Whether it says to ask somewhere else."""
        return 300 <= self.status_code < 400 and "location" in self.headers

    async def aread(self) -> bytes:
        """The whole body."""
        return b"".join([part async for part in self])

    def aiter_bytes(self) -> Self:
        """The body as it comes."""
        return self

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> bytes:
        # No generator: one that is left early has to be closed, and each piece has to pass through it.
        piece = await self._connection.next_piece(self._request)
        if not piece:
            raise StopAsyncIteration
        return piece


def _readable(sock: socket.socket) -> Callable[[], bool]:
    """Tells whether there is something to read, the end of it too."""
    if sys.platform == "win32" or not hasattr(select, "poll"):
        return lambda: bool(select.select([sock], [], [], 0)[0])
    poll = cast("Any", select).poll()  # unlike `select`, it takes any number of a socket
    poll.register(sock, select.POLLIN)
    return lambda: bool(poll.poll(0))
