"""Our own way to an endpoint, which needs no SDK."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING
from weakref import ref

from fractal.errors import MissingCredentials
from fractal.models._faults import translated
from fractal.models._http.address import DEFAULT_BASE_URL, address_of, ask_for_key
from fractal.models._http.pool import pool_of_this_loop
from fractal.models._http.sending import Sending
from fractal.models._replies.answer_reader import read_answer, read_body

if TYPE_CHECKING:
    from collections.abc import Callable

    from fractal.model import ModelRequest, Reply, Sink
    from fractal.models._http.address import Key
    from fractal.models._http.pool import Address, Pool
    from fractal.models.bounds import ReplyBounds

__all__ = ["HttpWire"]


class HttpWire:
    """The wire of our own: one POST on a connection of the loop's pool.

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
        self._last_pool: Callable[[], Pool | None] = _no_pool

    @property
    def base_url(self) -> str:
        """The endpoint, as it is now."""
        return self._base_url or os.environ.get("OPENAI_BASE_URL") or DEFAULT_BASE_URL

    async def respond(self, request: ModelRequest) -> Reply:
        """Send the request and read the answer."""
        address = await self._address_asked() if callable(self._api_key) else self._address(self._api_key)
        sending = Sending(self._bounds, request.charge, address.secrets, request.headers)
        with translated(address.secrets):
            pool = self._pool_here() or await pool_of_this_loop(self, self._max_connections)
            self._last_pool = ref(pool)
            async with pool.slot(request), pool.post(address, request.body(), sending) as answer:
                body = await answer.aread()
            return await read_body(answer.status_code, answer.headers, body, self._bounds, address.secrets)

    async def stream(self, request: ModelRequest, sink: Sink) -> Reply:
        """Send the request and read the reply as it comes."""
        address = await self._address_asked() if callable(self._api_key) else self._address(self._api_key)
        sending = Sending(self._bounds, request.charge, address.secrets, request.headers)
        with translated(address.secrets):
            pool = self._pool_here() or await pool_of_this_loop(self, self._max_connections)
            self._last_pool = ref(pool)
            async with pool.slot(request), pool.post(address, request.body(), sending) as answer:
                return await read_answer(answer, sink, self._bounds, address.secrets)

    def _pool_here(self) -> Pool | None:
        """The pool of the last request, if that was sent in this event loop: to look for it costs more."""
        pool = self._last_pool()
        return pool if pool is not None and pool.is_here and pool.is_entered_by(self) else None

    async def _address_asked(self) -> Address:
        assert callable(self._api_key)
        key = await ask_for_key(self._api_key)
        if not key:
            raise MissingCredentials("the function given as api_key returned nothing")
        return self._address(key)

    def _address(self, key: object) -> Address:
        """The address of a request; the environment is read here and nowhere else, at each request."""
        facts: _Facts = (
            self.base_url,
            os.environ.get("OPENAI_API_KEY") if key is None else key,
            os.environ.get("OPENAI_ORG_ID"),
            os.environ.get("OPENAI_PROJECT_ID"),
        )
        if self._known is None or self._known[0] != facts:
            self._known = facts, address_of(*facts, is_key_given=bool(key))
        return self._known[1]


def _no_pool() -> None:
    return None


_Facts = tuple[str, object, str | None, str | None]
