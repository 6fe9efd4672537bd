"""The sending side of the HTTP clients that SDK clients are given: ours, or what a user's own HTTP client is behind.

Whatever comes through here is bounded, decoded and sent on by the same rules as what needs no SDK, and whatever a
request is signed with is noted. This module loads httpx2, so nothing imports it before the first request.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import httpx2

from fractal.models._http.connection import OF_THE_BODY
from fractal.models._http.decoding import ACCEPTED_CODINGS, DecodedPieces, decoder_for
from fractal.models._http.redirects import redirected, sends_on
from fractal.models._http.sending import Sending, current_sending

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Iterator

    from fractal.models._http.connections import Connections, Exchange
    from fractal.models._http.decoding import Decoder
    from fractal.models.bounds import ReplyBounds

__all__ = ["BlockingPassage", "Passage", "Transport"]

_OF_THE_WIRE = (b"content-encoding", b"content-length", b"transfer-encoding", b"set-cookie")
"""Headers of an answer that are not handed on: they are about bytes that were read already, or are kept by nobody."""


class Transport(httpx2.AsyncBaseTransport):
    """An httpx2 transport on the connections of an event loop.

    Args:
        connections: The connections.
    """

    def __init__(self, connections: Connections) -> None:
        self._connections = connections

    async def handle_async_request(self, request: httpx2.Request) -> httpx2.Response:
        """Send a request of the client."""
        sending = current_sending.get()
        sending.secrets.add_signed(request)
        _accept_what_is_read(request)
        template = self._connections.template(request)
        if template.proxy is not None:
            sending.secrets.add(*template.proxy.secrets)
        exchange = self._connections.send(template, await request.aread(), sending)
        answer = await exchange.__aenter__()
        try:
            head, pieces = answer.head, answer.aiter_bytes()
        except BaseException:
            await exchange.__aexit__(None, None, None)
            raise
        facts = {"http_version": f"HTTP/{head.version}".encode(), "reason_phrase": head.reason}
        return _response(head.status_code, head.headers, _Pieces(pieces, exchange), facts)

    async def aclose(self) -> None:
        """Close all connections."""
        await self._connections.aclose()


class Passage(httpx2.AsyncBaseTransport):
    """A transport around the HTTP client that a user has given to an SDK client.

    Args:
        client: An `AsyncClient` of httpx2, or of httpx.
    """

    def __init__(self, client: Any) -> None:
        self._client = client

    async def handle_async_request(self, request: httpx2.Request) -> httpx2.Response:
        """Send a request, again at each redirect."""
        sending = current_sending.get()
        body, times = await request.aread(), 0
        while True:
            _accept_what_is_read(request)
            theirs = _request_of(self._client, request, body, sending)
            sending.secrets.add_signed(theirs)
            response = await self._client.send(theirs, stream=True, follow_redirects=False)
            try:
                if not _is_sent_on(response):
                    return _response_of(response, _TheirPieces(response, sending.bounds))
            except BaseException:
                await response.aclose()
                raise
            await response.aclose()
            request = redirected(request, response.status_code, response.headers["location"], times)
            sending.charge()
            times += 1


class BlockingPassage(httpx2.BaseTransport):
    """A transport around the blocking HTTP client that a user has given to an SDK client.

    Args:
        client: A `Client` of httpx2, or of httpx.
    """

    def __init__(self, client: Any) -> None:
        self._client = client

    def handle_request(self, request: httpx2.Request) -> httpx2.Response:
        """Send a request, again at each redirect."""
        sending = current_sending.get()
        body, times = request.read(), 0
        while True:
            _accept_what_is_read(request)
            theirs = _request_of(self._client, request, body, sending)
            sending.secrets.add_signed(theirs)
            response = self._client.send(theirs, stream=True, follow_redirects=False)
            try:
                if not _is_sent_on(response):
                    return _response_of(response, _TheirBlockingPieces(response, sending.bounds))
            except BaseException:
                response.close()
                raise
            response.close()
            request = redirected(request, response.status_code, response.headers["location"], times)
            sending.charge()
            times += 1


class _Pieces(httpx2.AsyncByteStream):
    """The body of an answer; closing it closes the exchange that it belongs to."""

    def __init__(self, pieces: AsyncIterator[bytes], exchange: Exchange) -> None:
        self._pieces = pieces
        self._exchange: Exchange | None = exchange

    def __aiter__(self) -> AsyncIterator[bytes]:
        return self._pieces

    async def aclose(self) -> None:
        exchange, self._exchange = self._exchange, None
        if exchange is not None:
            await exchange.__aexit__(None, None, None)


class _TheirPieces(httpx2.AsyncByteStream):
    """The body of an answer that a user's HTTP client has brought."""

    def __init__(self, response: Any, bounds: ReplyBounds) -> None:
        self._response, self._decoder = response, _decoder_of(response, bounds)

    def __aiter__(self) -> AsyncIterator[bytes]:
        response = self._response
        # A hook of the user's may have read it, for a log say.
        return DecodedPieces(response.aiter_bytes() if response.is_closed else response.aiter_raw(), self._decoder)

    async def aclose(self) -> None:
        await self._response.aclose()


class _TheirBlockingPieces(httpx2.SyncByteStream):
    """The body of an answer that a user's blocking HTTP client has brought."""

    def __init__(self, response: Any, bounds: ReplyBounds) -> None:
        self._response, self._decoder = response, _decoder_of(response, bounds)

    def __iter__(self) -> Iterator[bytes]:
        response, decoder = self._response, self._decoder
        try:
            for data in response.iter_bytes() if response.is_closed else response.iter_raw():
                yield from decoder.feed(data)
                if decoder.is_enough:
                    return
            decoder.end()
        except Exception:
            if not decoder.is_error:
                raise

    def close(self) -> None:
        self._response.close()


def _accept_what_is_read(request: httpx2.Request) -> None:
    if request.headers.get("accept-encoding") != "identity":
        request.headers["accept-encoding"] = ACCEPTED_CODINGS


def _request_of(client: Any, request: httpx2.Request, body: bytes, sending: Sending) -> Any:
    """A request in the form of the user's client, with that client's own headers and cookies."""
    headers = [
        (name.decode("latin-1"), value.decode("latin-1"))
        for name, value in request.headers.raw
        if name.lower() not in OF_THE_BODY
    ]
    headers += sending.headers.items()
    return client.build_request(
        request.method, str(request.url), headers=headers, content=body, extensions=dict(request.extensions)
    )


def _is_sent_on(response: Any) -> bool:
    return sends_on(response.status_code, "location" in response.headers)


def _decoder_of(response: Any, bounds: ReplyBounds) -> Decoder:
    codings = "" if response.is_closed else response.headers.get("content-encoding", "")
    return decoder_for(response.status_code, codings, bounds)


def _response_of(response: Any, stream: httpx2.AsyncByteStream | httpx2.SyncByteStream) -> httpx2.Response:
    facts = {
        name: response.extensions[name] for name in ("http_version", "reason_phrase") if name in response.extensions
    }
    return _response(response.status_code, response.headers.raw, stream, facts)


def _response(
    status: int,
    headers: list[tuple[bytes, bytes]],
    stream: httpx2.AsyncByteStream | httpx2.SyncByteStream,
    facts: dict[str, Any],
) -> httpx2.Response:
    """A response whose body has been decoded, and that sets no cookie."""
    kept = [header for header in headers if header[0].lower() not in _OF_THE_WIRE]
    response = httpx2.Response(status, headers=kept, stream=stream, extensions=facts)
    kind = response.headers.get("content-type", "")
    if ";" in kind:  # a charset, which is that of JSON, or one that not even Python has
        response.headers["content-type"] = kind.partition(";")[0]
    return response
