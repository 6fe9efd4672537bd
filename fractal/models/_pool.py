"""The connections of one event loop, shared by every agent that is used from it.

HTTP connections belong to the loop that opened them; agents do not. So each running loop has one HTTP client, made
when the first request needs it. Nobody has to close it: event loops close their open async generators when they
end, which makes a generator that waits in `try: yield` the one end-of-loop hook that asyncio, uvloop and trio share.
"""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary, WeakSet

import anyio
from anyio.lowlevel import RunVar

from fractal._threads import ThreadCall

if TYPE_CHECKING:
    import ssl
    from collections.abc import AsyncGenerator

    import httpx2
    from anyio.lowlevel import RunvarToken

__all__ = ["Pool", "leave_pool", "pool_of_this_loop"]

MAX_CONNECTIONS = 1000
MAX_IDLE_CONNECTIONS = 100
READ_TIMEOUT = 600.0
"""Connections, and seconds: what the `openai` SDK's own HTTP client has by default."""

CONNECT_TIMEOUT = 15.0
"""Seconds, three times the SDK's: with a thousand connects at once, our own loop can be the slow one."""


class Pool:
    """One loop's HTTP client.

    Attributes:
        clones: SDK clients of users, as copies that send through `client`.
    """

    def __init__(self) -> None:
        self.clones: WeakKeyDictionary[object, Any] = WeakKeyDictionary()
        self._client: httpx2.AsyncClient | None = None
        self._making = anyio.Lock()
        self._users: WeakSet[object] = WeakSet()
        self._var_token: RunvarToken[Pool | None] = _pool.set(self)
        self._keeper = self._keep()

    @property
    def client(self) -> httpx2.AsyncClient:
        """The HTTP client."""
        assert self._client is not None, "the pool was not entered"
        return self._client

    async def enter(self, user: object) -> None:
        """Note who uses the pool; the first time, make the client and have the loop close it at its end."""
        if self._client is None:
            await self._make_client()
        self._users.add(user)

    async def leave(self, user: object) -> None:
        """Forget a user; without any, close."""
        self._users.discard(user)
        if not self._users:
            await self._keeper.aclose()

    async def _make_client(self) -> None:
        async with self._making:
            if self._client is None:
                # Importing httpx2 and reading the machine's certificates takes a tenth of a second: no event loop
                # should stand still for it.
                self._client = await ThreadCall(_new_client, abandon=True).run()
                # Runs up to the `yield` and does not wait, so it cannot be cancelled.
                await self._keeper.__anext__()

    async def _keep(self) -> AsyncGenerator[None, None]:
        try:
            yield
        finally:
            _pool.reset(self._var_token)
            await self.client.aclose()


@functools.cache
def _tls() -> ssl.SSLContext:
    """The machine's certificates, read once: a context is not bound to a loop."""
    import httpx2

    return httpx2.create_ssl_context()


def _new_client() -> httpx2.AsyncClient:
    import httpx2

    return httpx2.AsyncClient(
        verify=_tls(),
        follow_redirects=True,
        limits=httpx2.Limits(max_connections=MAX_CONNECTIONS, max_keepalive_connections=MAX_IDLE_CONNECTIONS),
        # Waiting for a free connection is not the endpoint's fault: the run's own deadline bounds it.
        timeout=httpx2.Timeout(READ_TIMEOUT, connect=CONNECT_TIMEOUT, pool=None),
    )


_pool: RunVar[Pool | None] = RunVar("fractal_http_pool")


async def pool_of_this_loop(user: object) -> Pool:
    """The running loop's pool.

    Args:
        user: Who uses it; remembered, weakly, until `leave_pool`.
    """
    pool = _pool.get(None) or Pool()
    await pool.enter(user)
    return pool


async def leave_pool(user: object) -> None:
    """Say that this user is done; the last one closes the running loop's connections."""
    pool = _pool.get(None)
    if pool is not None:
        await pool.leave(user)
