"""The connections of one event loop, each lent to one request at a time.

The pools of HTTP libraries look through all their connections at each request, which with hundreds of them costs more
than the request itself. Here a request takes the one that was used last, however many there are.

This module loads httpx2, so nothing imports it before the first request.
"""

from __future__ import annotations

import time
from collections import deque
from typing import TYPE_CHECKING

import anyio
import httpx2

from fractal._threads import ThreadCall
from fractal.models._connection import Answer, Connection, Template

if TYPE_CHECKING:
    import ssl
    from collections.abc import AsyncIterator, Callable

    from fractal.models._connection import Origin

__all__ = ["Connections", "Exchange", "Transport", "as_httpx2"]

KEEP_ALIVE = 5.0
"""Seconds that a connection may wait for its next request: what httpx2 allows by default."""


class Connections:
    """Lends connections, opens them as they are needed, and closes those that nobody needs.

    Args:
        make_tls: Makes what https needs, when it is needed first; called in a thread.
        limit: How many may be open. Whoever sends sees to it that no more requests are on their way.
    """

    def __init__(self, make_tls: Callable[[], ssl.SSLContext], limit: int) -> None:
        self._make_tls, self._limit = make_tls, limit
        self._tls: ssl.SSLContext | None = None
        self._making_tls = anyio.Lock()
        self._open: set[Connection] = set()
        self._idle: dict[Origin, deque[Connection]] = {}  # the one used last is the last
        self._next_look = 0.0  # none of them expires sooner

    def __len__(self) -> int:
        """How many are open."""
        return len(self._open)

    def send(self, request: Template, body: bytes) -> Exchange:
        """Send a request, in a block to which its connection belongs."""
        return Exchange(self, request, body)

    async def tls(self) -> ssl.SSLContext:
        """What https needs."""
        async with self._making_tls:
            if self._tls is None:
                # Reading the machine's certificates takes a tenth of a second: no event loop should stand still for it.
                self._tls = await ThreadCall(self._make_tls, "the reading of certificates", abandon=True).run()
            return self._tls

    async def take(self, origin: Origin) -> Connection:
        """Lend a connection, the one that was used last if one is idle; `end` or `close` takes it back."""
        now = time.monotonic()
        if now >= self._next_look:
            await self._close_if_expired(now)
        idle = self._idle.get(origin)
        while idle:
            connection = idle.pop()
            if connection.idle_since >= now - KEEP_ALIVE and not connection.is_stale:
                return connection
            await self.close(connection)
        if len(self) >= self._limit:
            await self._close_longest_idle()
        connection = Connection(origin)
        self._open.add(connection)
        return connection

    async def end(self, connection: Connection) -> None:
        """Keep a connection for the next request if its answer has been read to the end, else close it."""
        if connection.is_idle:
            connection.idle_since = time.monotonic()
            self._idle.setdefault(connection.origin, deque()).append(connection)
        else:
            await self.close(connection)

    async def close(self, connection: Connection) -> None:
        """Close a connection that was lent."""
        self._open.discard(connection)
        # Closing a socket says nothing to the other side that it would have to wait for, so this ends at once.
        with anyio.CancelScope(shield=True):
            await connection.aclose()

    async def aclose(self) -> None:
        """Close all, those in use too."""
        self._idle.clear()
        for connection in list(self._open):
            await self.close(connection)

    async def _close_if_expired(self, now: float) -> None:
        # One at a request, so that the first one after a long pause need not wait for all of them to be closed.
        oldest = self._longest_idle()
        if oldest is not None and oldest.idle_since < now - KEEP_ALIVE:
            await self._close_longest_idle()
        else:
            self._next_look = (oldest.idle_since if oldest is not None else now) + KEEP_ALIVE

    async def _close_longest_idle(self) -> None:
        oldest = self._longest_idle()
        if oldest is not None:
            self._idle[oldest.origin].popleft()
            await self.close(oldest)

    def _longest_idle(self) -> Connection | None:
        return min((idle[0] for idle in self._idle.values() if idle), key=lambda each: each.idle_since, default=None)


class Exchange:
    """A request and its answer, as a block; no generator, since every request has one.

    Args:
        connections: Lends the connection.
        request: The request.
        body: Its body.
    """

    __slots__ = ("_body", "_connection", "_connections", "_request")

    def __init__(self, connections: Connections, request: Template, body: bytes) -> None:
        self._connections, self._request, self._body = connections, request, body
        self._connection: Connection | None = None

    async def __aenter__(self) -> Answer:
        """Send the request.

        Raises:
            httpx2.RequestError: There is no answer.
        """
        lender = self._connections
        self._connection = connection = await lender.take(self._request.origin)
        try:
            return await connection.send(self._request, self._body, lender.tls)
        except BaseException:
            await lender.close(connection)
            raise

    async def __aexit__(self, *exc: object) -> None:
        assert self._connection is not None
        await self._connections.end(self._connection)


class Transport(httpx2.AsyncBaseTransport):
    """The same connections for an `httpx2.AsyncClient`.

    Args:
        connections: The connections.
    """

    def __init__(self, connections: Connections) -> None:
        self._connections = connections

    async def handle_async_request(self, request: httpx2.Request) -> httpx2.Response:
        """Send a request of the client's."""
        exchange = self._connections.send(Template(request), await request.aread())
        return as_httpx2(await exchange.__aenter__(), exchange)

    async def aclose(self) -> None:
        """Close the connections, all of them."""
        await self._connections.aclose()


def as_httpx2(answer: Answer, exchange: Exchange | None = None) -> httpx2.Response:
    """An answer as httpx2 has it, which can decode it.

    Args:
        answer: The answer.
        exchange: A block that was entered for it, and is left when it is closed; or None.
    """
    head = answer.head
    facts = {"http_version": f"HTTP/{head.version}".encode(), "reason_phrase": head.reason}
    body = _Body(answer, exchange)
    return httpx2.Response(head.status_code, headers=head.headers, stream=body, extensions=facts)


class _Body(httpx2.AsyncByteStream):
    """The body of an answer; when it is closed, so is the exchange that it belongs to."""

    def __init__(self, answer: Answer, exchange: Exchange | None) -> None:
        self._answer, self._exchange = answer, exchange

    def __aiter__(self) -> AsyncIterator[bytes]:
        return self._answer

    async def aclose(self) -> None:
        exchange, self._exchange = self._exchange, None
        if exchange is not None:
            await exchange.__aexit__(None, None, None)
