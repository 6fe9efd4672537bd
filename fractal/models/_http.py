"""Our own way to an endpoint, which needs no SDK; and how the answers of all HTTP ways are read."""

from __future__ import annotations

import math
import os
from typing import TYPE_CHECKING, Any

import anyio

from fractal.errors import MissingCredentials
from fractal.models._address import DEFAULT_BASE_URL, address_of, ask_for_key
from fractal.models._faults import reply_from, translated
from fractal.models._pool import pool_of_this_loop
from fractal.models._secrets import Secrets
from fractal.models._sending import Sending
from fractal.models._sse import ReplyReader
from fractal.models.base import show_whole

if TYPE_CHECKING:
    from fractal.models._address import Key
    from fractal.models._pool import Address, HttpAnswer
    from fractal.models.base import ModelRequest, Reply, Sink
    from fractal.models.bounds import ReplyBounds

__all__ = ["HttpWire", "is_stream", "read_answer", "read_whole"]

_LONGEST_END = 1.0  # seconds between the last word of a stream and the end of its body


class HttpWire:
    """Our own: one POST on a connection of the loop's pool.

    Args:
        base_url: The endpoint. None: `OPENAI_BASE_URL`, or OpenAI's own.
        api_key: The key, or a function that makes one for each request. None: `OPENAI_API_KEY`.
        bounds: The most that is read of one answer.
        max_connections: Connections of its own in each event loop. None: those that all share.
    """

    def __init__(
        self, base_url: str | None, api_key: Key, bounds: ReplyBounds, max_connections: int | None = None
    ) -> None:
        self._base_url, self._api_key, self._max_connections = base_url, api_key, max_connections
        self._bounds = bounds
        self._known: tuple[_Facts, Address] | None = None

    async def respond(self, request: ModelRequest) -> Reply:
        """Send it as it is encoded, read what comes back."""
        address = await self._address_asked() if callable(self._api_key) else self._address(self._api_key)
        sending = Sending(self._bounds, request.charge, address.secrets)
        with translated(address.secrets):
            pool = await pool_of_this_loop(self, self._max_connections)
            async with pool.place(request), pool.post(address, request.body(), sending) as answer:
                body = await answer.aread()
            return reply_from(answer.status_code, answer.headers, body, self._bounds, address.secrets)

    async def stream(self, request: ModelRequest, sink: Sink) -> Reply:
        """Send it, read the reply as it comes."""
        address = await self._address_asked() if callable(self._api_key) else self._address(self._api_key)
        sending = Sending(self._bounds, request.charge, address.secrets)
        with translated(address.secrets):
            pool = await pool_of_this_loop(self, self._max_connections)
            async with pool.place(request), pool.post(address, request.body(), sending) as answer:
                return await read_answer(answer, sink, self._bounds, address.secrets)

    async def _address_asked(self) -> Address:
        assert callable(self._api_key)
        key = await ask_for_key(self._api_key)
        if not key:
            raise MissingCredentials("the function given as api_key returned nothing")
        return self._address(key)

    def _address(self, key: object) -> Address:
        """Where to send; the environment is read here and nowhere else, at each request."""
        facts: _Facts = (
            self._base_url or os.environ.get("OPENAI_BASE_URL") or DEFAULT_BASE_URL,
            key or os.environ.get("OPENAI_API_KEY"),
            os.environ.get("OPENAI_ORG_ID"),
            os.environ.get("OPENAI_PROJECT_ID"),
        )
        if self._known is None or self._known[0] != facts:
            self._known = facts, address_of(*facts, is_key_given=bool(key))
        return self._known[1]


_Facts = tuple[str, object, str | None, str | None]


async def read_answer(response: HttpAnswer, sink: Sink, bounds: ReplyBounds, secrets: Secrets) -> Reply:
    """Read an answer that may come piece by piece.

    Args:
        response: The answer; its connection is the caller's.
        sink: Where the pieces go.
        bounds: The most that is read.
        secrets: What no error may repeat.

    Raises:
        ModelError: It is no whole answer.
    """
    if not is_stream(response):
        return await read_whole(response, await response.aread(), sink, bounds, secrets)
    reader = ReplyReader(sink, bounds, secrets)
    try:
        with anyio.CancelScope() as rest:
            async for data in response.aiter_bytes():
                await reader.read(data)
                if reader.is_done and rest.deadline == math.inf:
                    # The connection can be used again only when the body has ended; not every endpoint ends it.
                    rest.deadline = anyio.current_time() + _LONGEST_END
    except Exception as error:
        if not reader.can_do_without_the_rest(error):
            raise
    return reader.reply()


async def read_whole(response: HttpAnswer, body: bytes, sink: Sink, bounds: ReplyBounds, secrets: Secrets) -> Reply:
    """The reply in an answer that came whole: an error, or that of an endpoint that does not stream.

    Raises:
        ModelError: It is no reply.
    """
    reply = reply_from(response.status_code, response.headers, body, bounds, secrets)
    await show_whole(reply, sink)
    return reply


def is_stream(response: Any) -> bool:
    """Whether an answer comes piece by piece."""
    kind = response.headers.get("content-type", "")
    return response.status_code < 400 and "json" not in kind and "html" not in kind
