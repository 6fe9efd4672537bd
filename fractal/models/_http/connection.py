"""One connection to an endpoint: HTTP/1.1 on a stream of AnyIO's.

This module loads httpx2, whose errors are raised here, so nothing imports it before the first request.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Self

import anyio
import h11
import httpx2
from anyio.lowlevel import checkpoint, current_token

from fractal._concurrency.background import Unstarted
from fractal._concurrency.scopes import move_on_after, single_error
from fractal.errors import ReplyTooLarge
from fractal.models._http.connecting import LAST_PORT, PORTS, WRITTEN_AT_ONCE, connect
from fractal.models._http.decoding import DecodedPieces, decoder_for
from fractal.models._http.incoming import Incoming
from fractal.models._http.redirects import sends_on
from fractal.models._secrets import identity_of

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Mapping

    from fractal.models._http.connecting import MakeTls, Origin, Wired
    from fractal.models._http.incoming import Head
    from fractal.models._http.proxies import Proxy
    from fractal.models._http.sending import Sending
    from fractal.models.bounds import ReplyBounds

__all__ = ["OF_THE_BODY", "Answer", "Connection", "Template"]

_READ_AT_ONCE = 64 * 1024


class Template:
    """A request without its body: what httpx2 makes of a URL and headers, made once.

    Args:
        request: The request; its body is left out.
        proxy: Whom to send it to; None: to the endpoint itself.

    Raises:
        httpx2.UnsupportedProtocol: It goes somewhere else than to an http or https URL.
        httpx2.LocalProtocolError: A header has characters that none may have.

    Attributes:
        request: The request.
        proxy: Whom to send it to, or None.
        origin: The endpoint.
        lane: What its connection may be shared with: requests to the same endpoint, by the same way, signed alike.
            Whatever an endpoint holds against a connection, or says on it unasked, stays with those who have the key.
        has_answer_body: Whether there can be a body in the answer.
    """

    __slots__ = ("_head", "_timeouts", "has_answer_body", "lane", "origin", "proxy", "request")

    def __init__(self, request: httpx2.Request, proxy: Proxy | None = None) -> None:
        url = request.url
        if url.scheme not in PORTS:
            raise httpx2.UnsupportedProtocol("the URL has no http:// or https://", request=request)
        port = PORTS[url.scheme] if url.port is None else url.port
        if not 0 < port <= LAST_PORT:
            raise httpx2.UnsupportedProtocol(f"nobody can have the port {port}", request=request)
        self.request, self.proxy = request, proxy
        self.origin: Origin = (url.scheme, url.raw_host.decode("ascii"), port)
        self.lane: object = (self.origin, proxy, identity_of(request))
        self.has_answer_body = request.method != "HEAD"
        self._timeouts: Mapping[str, float | None] = request.extensions.get("timeout", {})
        headers = [header for header in request.headers.raw if header[0].lower() not in OF_THE_BODY]
        target = url.raw_path
        if proxy is not None and proxy.forwards(url.scheme):
            target = b"%b://%b%b" % (url.raw_scheme, url.netloc, target)
            if proxy.authorization is not None:
                headers.append((b"Proxy-Authorization", proxy.authorization))
        try:
            head = h11.Request(method=request.method, target=target, headers=headers)
            written = h11.Connection(h11.CLIENT).send(head)
        except h11.LocalProtocolError as error:
            raise httpx2.LocalProtocolError(str(error), request=request) from error
        assert written is not None
        self._head = written.removesuffix(b"\r\n")

    def with_body(self, body: bytes, headers: Mapping[str, str]) -> bytes:
        """All of the request.

        Args:
            body: Its body.
            headers: Further headers, of ASCII without breaks.
        """
        more = "".join(f"{name}: {value}\r\n" for name, value in headers.items()).encode() if headers else b""
        return b"%b%bContent-Length: %d\r\n\r\n%b" % (self._head, more, len(body), body)

    def timeout(self, what: str) -> float | None:
        """Seconds to `connect`, to `write`, or until there is something to `read`; None: as long as it takes."""
        return self._timeouts.get(what)


OF_THE_BODY = (b"content-length", b"transfer-encoding")


class Connection:
    """An HTTP/1.1 connection, for one request after another.

    Args:
        lane: What it is for: `Template.lane` of its requests.

    Attributes:
        lane: The same.
        is_idle: Whether another request may be sent: the last answer has been read to its end, and nothing follows.
        idle_since: For whoever keeps it: when that was.
    """

    def __init__(self, lane: object) -> None:
        self.lane = lane
        self.is_idle = False
        self.idle_since = 0.0
        self._wired: Wired | None = None
        self._is_cut = False  # not all of a request was sent
        self._incoming = Incoming()
        self._backend = current_token().backend_class  # AnyIO looks for it each time

    @property
    def is_stale(self) -> bool:
        """Whether the endpoint has closed the connection, or sent bytes that nobody asked for."""
        wired = self._wired
        return wired is None or wired.has_read_ahead() or wired.is_readable()

    async def send(self, request: Template, body: bytes, make_tls: MakeTls, sending: Sending) -> Answer:
        """Send a request, after connecting if need be, and wait for the head of the answer.

        Raises:
            httpx2.RequestError: There is none.
            ReplyTooLarge: It is longer than the bounds allow.
        """
        self.is_idle = False
        if self._wired is None:
            self._wired = await self._connected(request, make_tls)
        incoming = self._incoming
        incoming.expect(has_body=request.has_answer_body, bounds=sending.bounds)
        data = await self._send_at_once(request.with_body(body, sending.headers))
        if len(data) > WRITTEN_AT_ONCE or self._wired.link.is_full:
            await self._exchange_long(request, data)
        elif data:
            self._feed(request, await self._exchange(request, data))
        while incoming.head is None:
            self._feed(request, await self._read(request))
        assert incoming.head is not None
        return Answer(self, request, incoming.head, sending.bounds)

    async def next_piece(self, request: Template) -> bytes:
        """The next bytes of the body, as soon as there are any; empty at the end.

        Raises:
            httpx2.RequestError: Nothing comes, or it is no HTTP.
            ReplyTooLarge: More comes than the bounds allow.
        """
        incoming = self._incoming
        while not incoming.pieces and not incoming.is_whole:
            self._feed(request, b"" if incoming.fault else await self._read(request))
        if incoming.pieces:
            data = b"".join(incoming.pieces)
            incoming.pieces.clear()
            return data
        wired = self._wired
        assert wired is not None
        self.is_idle = not (incoming.is_last or self._is_cut or wired.link.is_cut or wired.has_read_ahead())
        return b""

    async def aclose(self) -> None:
        """Close the connection."""
        self.is_idle = False
        self._incoming.close()
        if self._wired is not None:
            await self._wired.stream.aclose()

    async def _connected(self, request: Template, make_tls: MakeTls) -> Wired:
        if request.origin[0] == "https":
            await make_tls()  # now, since it is no time of the connecting
        try:
            with move_on_after(request.timeout("connect")):
                return await connect(request.origin, request.proxy, make_tls)
        except TimeoutError as error:  # the system's own
            raise httpx2.ConnectTimeout(str(error), request=request.request) from error
        except (OSError, ValueError, anyio.BrokenResourceError, anyio.EndOfStream) as error:  # ValueError: the host
            raise httpx2.ConnectError(str(error), request=request.request) from error
        raise httpx2.ConnectTimeout("", request=request.request)

    async def _send_at_once(self, data: bytes) -> bytes:
        """Write what can be written without a wait, mostly all of it; returns the rest. With TLS the rest is all."""
        assert self._wired is not None
        link = self._wired.link
        if self._wired.patient is not link:
            return data
        if self._backend.current_effective_deadline() == -math.inf:
            await checkpoint()
        return link.send_at_once(data)

    async def _exchange(self, request: Template, data: bytes) -> bytes:
        """Write a request, and read the first bytes; under one scope, since one costs as much as the parsing."""
        assert self._wired is not None
        late: type[httpx2.TimeoutException] = httpx2.WriteTimeout
        with move_on_after(request.timeout("write")) as scope:
            # In one piece: a second one would be another turn of the event loop, and another packet. If it fails, the
            # endpoint may have said why.
            try:
                await self._wired.stream.send(data)
            except (anyio.BrokenResourceError, anyio.ClosedResourceError):
                self._is_cut = True
            late, seconds = httpx2.ReadTimeout, request.timeout("read")
            seconds = math.inf if seconds is None else seconds
            now = anyio.current_time()
            if not 0.99 * seconds <= scope.deadline - now <= seconds:  # mostly it is right, and to change it costs too
                scope.deadline = now + seconds
            return await self._receive(request)
        raise late("", request=request.request)

    async def _exchange_long(self, request: Template, data: bytes) -> None:
        """Write a long request and read meanwhile, since an endpoint that takes no more says why."""
        assert self._wired is not None
        has_come = anyio.Event()
        late: type[httpx2.TimeoutException] = httpx2.WriteTimeout
        with single_error():
            async with anyio.create_task_group() as group:
                group.start_soon(Unstarted, self._hear, request, has_come, name="fractal answer")
                with move_on_after(request.timeout("write")):
                    await self._wired.patient.send(data)
                    late = httpx2.ReadTimeout
                if late is httpx2.ReadTimeout:
                    with move_on_after(request.timeout("read")):
                        await has_come.wait()
                        return
                raise late("", request=request.request)

    async def _hear(self, request: Template, has_come: anyio.Event) -> None:
        """Read the head of an answer, and stop the writing if it is a refusal."""
        assert self._wired is not None
        while self._incoming.head is None:
            self._feed(request, await self._receive(request))
        has_come.set()
        if self._incoming.head.status_code >= 300:
            self._wired.link.give_up()

    async def _read(self, request: Template) -> bytes:
        """The next bytes; empty if the endpoint has closed the connection."""
        backend, seconds = self._backend, request.timeout("read")
        deadline = math.inf if seconds is None else backend.current_time() + seconds
        with backend.create_cancel_scope(deadline=deadline):
            return await self._receive(request)
        raise httpx2.ReadTimeout("", request=request.request)

    async def _receive(self, request: Template) -> bytes:
        assert self._wired is not None
        try:
            return await self._wired.stream.receive(_READ_AT_ONCE)
        except anyio.EndOfStream:
            return b""
        except (OSError, anyio.BrokenResourceError, anyio.ClosedResourceError) as error:
            raise httpx2.ReadError(str(error), request=request.request) from error

    def _feed(self, request: Template, data: bytes) -> None:
        incoming = self._incoming
        if incoming.fault is None:
            incoming.feed(data)
        if incoming.fault is not None and not incoming.pieces:
            if isinstance(incoming.fault, ReplyTooLarge):
                raise incoming.fault
            raise httpx2.RemoteProtocolError(incoming.fault, request=request.request)


class Answer:
    """The answer to a request: the part of an `httpx2.Response` that is needed here, under the same names.

    Its body is read once, as a whole or, as an iterator, piece by piece, and it is decompressed. Of an HTTP error the
    beginning is read, and if the rest does not come, it is an error all the same.

    Args:
        connection: Where it comes from.
        request: The request.
        head: Its head.
        bounds: The most that is read of it.

    Attributes:
        head: Its head.
        status_code: HTTP status.
        headers: The headers; names in lower case.
    """

    __slots__ = ("_bounds", "_connection", "_request", "_room", "head", "headers", "status_code")

    def __init__(self, connection: Connection, request: Template, head: Head, bounds: ReplyBounds) -> None:
        self._connection, self._request, self.head, self._bounds = connection, request, head, bounds
        self.status_code = head.status_code
        self.headers = {name.decode("latin-1").lower(): value.decode("latin-1") for name, value in head.headers}
        self._room = bounds.body

    @property
    def is_elsewhere(self) -> bool:
        """Whether the answer is a redirect."""
        return sends_on(self.status_code, "location" in self.headers)

    async def aread(self) -> bytes:
        """The whole body.

        Raises:
            httpx2.RequestError: It breaks off.
            ReplyTooLarge: It is more than the bounds allow.
            BadReply: It cannot be decompressed.
        """
        pieces = self.aiter_bytes()
        whole = bytearray()  # a list of what comes would be much longer, if it comes byte by byte
        if pieces is self:  # as nearly always
            while piece := await self._connection.next_piece(self._request):
                self._take(len(piece))
                whole += piece
        else:
            async for piece in pieces:
                whole += piece
        return bytes(whole)

    def _take(self, size: int) -> None:
        """Count bytes of the body."""
        self._room -= size
        if self._room < 0:
            raise ReplyTooLarge("body", self._bounds.body)

    def aiter_bytes(self) -> AsyncIterator[bytes]:
        """The body as it comes."""
        if self.status_code < 400 and "content-encoding" not in self.headers:
            return self
        codings = [value.decode("latin-1") for name, value in self.head.headers if name.lower() == b"content-encoding"]
        decoder = decoder_for(self.status_code, ",".join(codings), self._bounds)
        return DecodedPieces(self, decoder)

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> bytes:
        # No generator: one that is left early has to be closed, and each piece has to pass through it.
        piece = await self._connection.next_piece(self._request)
        if not piece:
            raise StopAsyncIteration
        self._take(len(piece))
        return piece
