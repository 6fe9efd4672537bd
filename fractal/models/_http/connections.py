"""The connections of one event loop, each lent to one request at a time.

The pools of HTTP libraries look through all their connections at each request, which with hundreds of them costs more
than the request itself. Here a request takes the one that was used last, however many there are.

This module loads httpx2, so nothing imports it before the first request.
"""

from __future__ import annotations

import time
from collections import OrderedDict, deque
from typing import TYPE_CHECKING

import anyio

from fractal._concurrency.threads import ThreadCall
from fractal.errors import ConnectionFailed
from fractal.models._http.connection import Answer, Connection, Template
from fractal.models._http.redirects import redirected

if TYPE_CHECKING:
    import ssl
    from collections.abc import Callable

    import httpx2

    from fractal.models._http.proxies import Proxies
    from fractal.models._http.sending import Sending

__all__ = ["Connections", "Exchange"]

KEEP_ALIVE = 5.0
"""Seconds that a connection may wait for its next request: what httpx2 allows by default."""


class Connections:
    """The connections of an event loop: lent, opened as needed, and closed when idle.

    Args:
        make_tls: Makes what https needs, when it is needed first; called in a thread.
        limit: How many may be open. Whoever sends sees to it that no more requests are on their way.
        proxies: Says which requests go through a proxy. None: no request does.
    """

    def __init__(self, make_tls: Callable[[], ssl.SSLContext], limit: int, proxies: Proxies | None = None) -> None:
        self._make_tls, self._limit, self._proxies = make_tls, limit, proxies
        self._tls: ssl.SSLContext | None = None
        self._making_tls = anyio.Lock()
        self._open: set[Connection] = set()
        self._idle: dict[object, deque[Connection]] = {}  # by lane; the one used last is the last
        self._waiting: OrderedDict[Connection, None] = OrderedDict()  # the idle ones of all lanes, the oldest first
        self._next_look = 0.0  # none of them expires sooner

    def __len__(self) -> int:
        """The number of open connections."""
        return len(self._open)

    def template(self, request: httpx2.Request) -> Template:
        """A request ready to be sent, but for its body.

        Raises:
            httpx2.RequestError: It cannot be sent.
            ConnectionFailed: There is a proxy for it that cannot be used.
        """
        return Template(request, self._proxies.for_url(request.url) if self._proxies is not None else None)

    def send(self, request: Template, body: bytes, sending: Sending, times: int = 0) -> Exchange:
        """Send a request, in a block to which its connection belongs.

        Args:
            request: The request.
            body: Its body.
            sending: What goes along with it.
            times: How often it was sent on before.
        """
        return Exchange(self, request, body, sending, times)

    async def tls(self) -> ssl.SSLContext:
        """The TLS context for https.

        Raises:
            ConnectionFailed: The certificates that the environment names cannot be read.
        """
        if self._tls is not None:
            return self._tls
        async with self._making_tls:
            if self._tls is None:
                # Reading the machine's certificates takes a tenth of a second: no event loop should stand still for it.
                try:
                    reading = ThreadCall(self._make_tls, "the reading of certificates", threads=None, abandon=True)
                    made = await reading.run()
                except OSError as error:  # those of TLS are among them
                    fault = ConnectionFailed(
                        f"the certificates of SSL_CERT_FILE or SSL_CERT_DIR are of no use: {error}"
                    )
                    fault.retryable = False
                    raise fault from None
                self._tls = made
            return self._tls

    async def take(self, lane: object) -> Connection:
        """Lend a connection, the one that was used last if one is idle; `end` or `close` takes it back.

        Args:
            lane: What it is for: `Template.lane`.
        """
        now = time.monotonic()
        if now >= self._next_look:
            await self._close_if_expired(now)
        while (connection := self._popped(lane)) is not None:
            if connection.idle_since >= now - KEEP_ALIVE and not connection.is_stale:
                return connection
            await self.close(connection)
        if len(self) >= self._limit:
            await self._close_longest_idle()
        connection = Connection(lane)
        self._open.add(connection)
        return connection

    async def end(self, connection: Connection) -> None:
        """Keep a connection for the next request if its answer has been read to the end, else close it."""
        if connection.is_idle:
            connection.idle_since = time.monotonic()
            self._idle.setdefault(connection.lane, deque()).append(connection)
            self._waiting[connection] = None
        else:
            await self.close(connection)

    async def close(self, connection: Connection) -> None:
        """Close a connection that was lent."""
        self._open.discard(connection)
        # Closing a socket says nothing to the other side that it would have to wait for, so this ends at once.
        with anyio.CancelScope(shield=True):
            await connection.aclose()

    async def aclose(self) -> None:
        """Close all connections, those in use too."""
        self._idle.clear()
        self._waiting.clear()
        for connection in list(self._open):
            await self.close(connection)

    def _popped(self, lane: object, *, oldest: bool = False) -> Connection | None:
        idle = self._idle.get(lane)
        if not idle:
            return None
        connection = idle.popleft() if oldest else idle.pop()
        if not idle:
            del self._idle[lane]  # keys come and go
        del self._waiting[connection]
        return connection

    async def _close_if_expired(self, now: float) -> None:
        # One at a request, so that the first one after a long pause need not wait for all of them to be closed.
        oldest = next(iter(self._waiting), None)
        if oldest is not None and oldest.idle_since < now - KEEP_ALIVE:
            await self._close_longest_idle()
        else:
            self._next_look = (oldest.idle_since if oldest is not None else now) + KEEP_ALIVE

    async def _close_longest_idle(self) -> None:
        oldest = next(iter(self._waiting), None)
        if oldest is not None:
            self._popped(oldest.lane, oldest=True)
            await self.close(oldest)


class Exchange:
    """A request and its answer, as a block; a class and no generator for speed, since every request makes one.

    Args:
        connections: Lends the connection.
        request: The request.
        body: Its body.
        sending: What goes along with it.
        times: How often it was sent on before.
    """

    __slots__ = ("_body", "_connection", "_connections", "_request", "_sending", "_times")

    def __init__(
        self, connections: Connections, request: Template, body: bytes, sending: Sending, times: int = 0
    ) -> None:
        self._connections, self._request, self._body = connections, request, body
        self._sending, self._times = sending, times
        self._connection: Connection | None = None

    async def __aenter__(self) -> Answer:
        """Send the request; if the endpoint redirects it, to the address it names.

        Raises:
            httpx2.RequestError: There is no answer.
            ConnectionFailed: There is no answer, or the endpoint sends it on to a place that is not its own.
            ReplyTooLarge: The head of the answer is longer than the bounds allow.
        """
        lender = self._connections
        self._connection = connection = await lender.take(self._request.lane)
        try:
            answer = await connection.send(self._request, self._body, lender.tls, self._sending)
        except BaseException:
            await lender.close(connection)
            raise
        return await self._sent_on(answer) if answer.is_elsewhere else answer

    async def __aexit__(self, *exc: object) -> None:
        assert self._connection is not None
        await self._connections.end(self._connection)

    async def _sent_on(self, answer: Answer) -> Answer:
        lender = self._connections
        await self.__aexit__()
        request = redirected(self._request.request, answer.status_code, answer.headers["location"], self._times)
        self._sending.charge()
        further = lender.send(lender.template(request), self._body, self._sending, self._times + 1)
        answer = await further.__aenter__()
        self._connection = further._connection
        return answer
