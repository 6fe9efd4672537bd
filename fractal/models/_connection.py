"""One connection to an endpoint: HTTP/1.1 by h11, on a socket of AnyIO's.

This module loads httpx2, whose errors are raised here, so nothing imports it before the first request.
"""

from __future__ import annotations

import select
import sys
from typing import TYPE_CHECKING, Any, Self, TypeAlias, cast

import anyio
import h11
import httpx2
from anyio.abc import SocketAttribute

from fractal._scopes import move_on_after

if TYPE_CHECKING:
    import socket
    import ssl
    from collections.abc import Mapping

    from anyio.abc import ByteStream

__all__ = ["Answer", "Connection", "Origin", "Template"]

Origin: TypeAlias = tuple[str, str, int]
"""Scheme, host and port."""

_READ_AT_ONCE = 64 * 1024
_LONGEST_HEAD = 100 * 1024
_PORTS = {"http": 80, "https": 443}


class Template:
    """A request without its body: what httpx2 makes of a URL and headers, made once.

    Args:
        request: The request; its body is left out.

    Raises:
        httpx2.UnsupportedProtocol: It goes somewhere else than to an http or https URL.

    Attributes:
        request: The request.
        origin: Where it goes.
    """

    __slots__ = ("_headers", "_method", "_target", "_timeouts", "origin", "request")

    def __init__(self, request: httpx2.Request) -> None:
        url = request.url
        if url.scheme not in _PORTS:
            raise httpx2.UnsupportedProtocol(f"the URL has no http:// or https://: {url}", request=request)
        self.request = request
        self.origin: Origin = (url.scheme, url.raw_host.decode("ascii"), url.port or _PORTS[url.scheme])
        self._method, self._target = request.method.encode("ascii"), url.raw_path
        self._headers = [header for header in request.headers.raw if header[0].lower() not in _OF_THE_BODY]
        self._timeouts: Mapping[str, float | None] = request.extensions.get("timeout", {})

    def head(self, length: int) -> h11.Request:
        """The head of the request, with a body of so many bytes."""
        headers = [*self._headers, (b"Content-Length", b"%d" % length)]
        return h11.Request(method=self._method, target=self._target, headers=headers)

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
        self._socket: socket.socket | None = None
        self._http = h11.Connection(h11.CLIENT, max_incomplete_event_size=_LONGEST_HEAD)

    @property
    def is_stale(self) -> bool:
        """Whether the endpoint has closed it, or said something that nobody has asked for."""
        return self._socket is None or _is_readable(self._socket)

    async def send(self, request: Template, body: bytes, tls: ssl.SSLContext) -> Answer:
        """Send a request, after connecting if need be, and wait for the head of the answer.

        Raises:
            httpx2.RequestError: There is none.
        """
        self.is_idle = False
        if self._stream is None:
            self._stream = await self._connected(request, tls)
            self._socket = self._stream.extra(SocketAttribute.raw_socket)
        await self._write(request, body)
        while True:
            event = await self.next_event(request)
            if isinstance(event, h11.Response):
                return Answer(self, request, event)

    async def next_event(self, request: Template) -> Any:
        """The next thing that comes, as h11 has it.

        Raises:
            httpx2.RequestError: Nothing does, or it is no HTTP.
        """
        while True:
            try:
                event = self._http.next_event()
            except h11.RemoteProtocolError as error:
                raise httpx2.RemoteProtocolError(str(error), request=request.request) from error
            if event is not h11.NEED_DATA:
                return event
            data = await self._read(request)
            if not data and self._http.their_state is h11.SEND_RESPONSE:
                said = "the server closed the connection and said nothing"
                raise httpx2.RemoteProtocolError(said, request=request.request)
            self._http.receive_data(data)

    def end(self) -> None:
        """Note that the answer has been read to its end."""
        http = self._http
        if http.our_state is h11.DONE and http.their_state is h11.DONE and not http.trailing_data[0]:
            http.start_next_cycle()
            self.is_idle = True

    async def aclose(self) -> None:
        """Close it."""
        self.is_idle = False
        if self._stream is not None:
            await self._stream.aclose()

    async def _connected(self, request: Template, tls: ssl.SSLContext) -> ByteStream:
        scheme, host, port = self.origin
        try:
            with move_on_after(request.timeout("connect")):
                if scheme == "http":
                    return await anyio.connect_tcp(host, port)
                # As in all of HTTP the end of an answer is told by its length, not by TLS.
                return await anyio.connect_tcp(host, port, tls=True, ssl_context=tls, tls_standard_compatible=False)
        except TimeoutError as error:  # the system's own
            raise httpx2.ConnectTimeout(str(error), request=request.request) from error
        except (OSError, anyio.BrokenResourceError, anyio.EndOfStream) as error:
            raise httpx2.ConnectError(str(error), request=request.request) from error
        raise httpx2.ConnectTimeout("", request=request.request)

    async def _write(self, request: Template, body: bytes) -> None:
        assert self._stream is not None
        http = self._http
        try:
            # In one piece: a second one would be another turn of the event loop, and another packet.
            parts = (http.send(request.head(len(body))), http.send(h11.Data(body)), http.send(h11.EndOfMessage()))
            data = b"".join(part for part in parts if part)
        except h11.LocalProtocolError as error:
            raise httpx2.LocalProtocolError(str(error), request=request.request) from error
        try:
            with move_on_after(request.timeout("write")):
                await self._stream.send(data)
                return
        except (anyio.BrokenResourceError, anyio.ClosedResourceError):
            return  # an endpoint that takes no more may have said why
        raise httpx2.WriteTimeout("", request=request.request)

    async def _read(self, request: Template) -> bytes:
        assert self._stream is not None
        try:
            with move_on_after(request.timeout("read")):
                return await self._stream.receive(_READ_AT_ONCE)
        except anyio.EndOfStream:
            return b""
        except (anyio.BrokenResourceError, anyio.ClosedResourceError) as error:
            raise httpx2.ReadError(str(error), request=request.request) from error
        raise httpx2.ReadTimeout("", request=request.request)


class Answer:
    """The answer to a request: as much of an `httpx2.Response` as is read here, with the same names.

    Its body is read once, as a whole or, as an iterator, piece by piece.

    Args:
        connection: Where it comes from.
        request: The request.
        head: Its head.

    Attributes:
        status_code: HTTP status.
        headers: The headers; names in lower case.
    """

    __slots__ = ("_connection", "_has_ended", "_request", "head", "headers", "status_code")

    def __init__(self, connection: Connection, request: Template, head: h11.Response) -> None:
        self._connection, self._request, self.head = connection, request, head
        self._has_ended = False
        self.status_code = head.status_code
        self.headers = {name.decode("latin-1"): value.decode("latin-1") for name, value in head.headers}

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
        if not self._has_ended:
            event = await self._connection.next_event(self._request)
            if isinstance(event, h11.Data):
                return bytes(event.data)
            self._has_ended = True
            if isinstance(event, h11.EndOfMessage):
                self._connection.end()
        raise StopAsyncIteration


def _is_readable(sock: socket.socket) -> bool:
    if sys.platform == "win32" or not hasattr(select, "poll"):
        return bool(select.select([sock], [], [], 0)[0])
    poll = cast("Any", select).poll()  # unlike `select`, it takes any number of a socket
    poll.register(sock, select.POLLIN)
    return bool(poll.poll(0))
