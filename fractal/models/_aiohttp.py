"""Connections by aiohttp, for who wants them to cost less and runs on asyncio; off the required path."""

from __future__ import annotations

import sys
from io import BytesIO
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit
from urllib.request import getproxies, proxy_bypass

import anyio

from fractal._threads import ThreadCall
from fractal.errors import ConnectionFailed, ModelError, RequestTimedOut, TransportUnavailable
from fractal.models._pool import CONNECT_TIMEOUT, READ_TIMEOUT, Pool, machine_tls

if TYPE_CHECKING:
    import ssl
    from collections.abc import AsyncIterator, Mapping
    from types import TracebackType

    import aiohttp

    from fractal.models._pool import Address

__all__ = ["AiohttpPool"]

KEEP_ALIVE = 5.0
_LONGEST_LINE = 100 * 1024
_LONGEST_CLOSE = 1.0
"""Seconds, and bytes; the first two as for our own connections."""

_LARGE = 2**20  # bytes that aiohttp does not want to send in one piece


class AiohttpPool(Pool):
    """One loop's aiohttp session."""

    _session: aiohttp.ClientSession
    _proxies: Mapping[str, str]

    async def _open(self) -> None:
        if anyio.get_cancelled_exc_class() is not getattr(sys.modules.get("asyncio"), "CancelledError", None):
            raise TransportUnavailable("aiohttp", "it needs asyncio, and this run is on another event loop")
        # Loading it, and the machine's certificates, takes a tenth of a second: no event loop should stand still.
        tls = await ThreadCall(_loaded, "the loading of aiohttp", abandon=True).run()
        import aiohttp

        self._proxies = {scheme: url for scheme, url in getproxies().items() if scheme in ("http", "https", "all")}
        self._session = aiohttp.ClientSession(
            # How many are open is seen to by the places that there are.
            connector=aiohttp.TCPConnector(limit=0, ssl=tls, keepalive_timeout=KEEP_ALIVE),
            timeout=aiohttp.ClientTimeout(total=None, sock_connect=CONNECT_TIMEOUT, sock_read=READ_TIMEOUT),
            cookie_jar=aiohttp.DummyCookieJar(),
            max_line_size=_LONGEST_LINE,
            max_field_size=_LONGEST_LINE,
        )

    async def _close(self) -> None:
        with anyio.move_on_after(_LONGEST_CLOSE, shield=True):  # it waits for what it has still to send
            await self._session.close()

    def post(self, address: Address, body: bytes) -> _Exchange:
        """Send a body.

        Raises:
            ModelError: There is no answer.
        """
        proxy = self._proxy_for(address.url) if self._proxies else None
        data = body if len(body) <= _LARGE else BytesIO(body)
        return _Exchange(self._session.post(address.url, data=data, headers=address.headers, proxy=proxy), address)

    def _proxy_for(self, url: str) -> str | None:
        parts = urlsplit(url)
        if proxy_bypass(parts.hostname or ""):
            return None
        return self._proxies.get(parts.scheme) or self._proxies.get("all")


def _loaded() -> ssl.SSLContext:
    import aiohttp  # noqa: F401  # pyright: ignore[reportUnusedImport]

    return machine_tls()


class _Exchange:
    """A request and its answer; the connection is free again, or closed, when the block is left."""

    __slots__ = ("_address", "_request", "_response")

    def __init__(self, request: Any, address: Address) -> None:
        self._request, self._address = request, address
        self._response: aiohttp.ClientResponse | None = None

    async def __aenter__(self) -> _Answer:
        try:
            self._response = response = await self._request
        except Exception as error:
            raise _translate(error, self._address) from error
        return _Answer(response)

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        response = self._response
        assert response is not None
        if error is None:
            response.release()
            return
        connection = response.connection
        if connection is not None and connection.transport is not None:
            connection.transport.abort()  # what is closed in good order goes on sending first
        response.close()
        if isinstance(error, Exception):
            fault = _translate(error, self._address)
            if fault is not error:
                raise fault from error


class _Answer:
    """The answer, with the names that all our answers have."""

    __slots__ = ("_response", "headers", "status_code")

    def __init__(self, response: aiohttp.ClientResponse) -> None:
        self._response = response
        self.status_code, self.headers = response.status, response.headers

    async def aread(self) -> bytes:
        """The whole body."""
        return await self._response.read()

    def aiter_bytes(self) -> AsyncIterator[bytes]:
        """The body as it comes."""
        return self._response.content.iter_any()


def _translate(error: Exception, address: Address) -> Exception:
    """What aiohttp raises, as an error of ours; any other as it is."""
    import aiohttp

    parts = urlsplit(address.url)
    where, text = f"{parts.scheme}://{parts.netloc.rpartition('@')[2]}", str(error) or type(error).__name__
    if isinstance(error, aiohttp.ConnectionTimeoutError):
        return ConnectionFailed(f"no connection to {where} in time: {text}")
    if isinstance(error, aiohttp.ClientConnectorError):
        return ConnectionFailed(f"no connection to {where}: {text}")
    if isinstance(error, TimeoutError):
        return RequestTimedOut(f"{where} did not answer in time: {text}")
    if isinstance(error, (aiohttp.InvalidURL, aiohttp.NonHttpUrlClientError)):
        fault = ConnectionFailed(f"the base URL cannot be used: {text}")
        fault.retryable = False
        return fault
    if isinstance(error, (aiohttp.ClientError, ConnectionError)) and not isinstance(error, ModelError):
        return ConnectionFailed(f"no whole answer from {where}: {text}")
    return error
