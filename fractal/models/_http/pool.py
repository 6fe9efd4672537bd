"""The HTTP connections of an event loop, shared by every agent that is used from it.

HTTP connections belong to the loop that opened them; agents do not. So each running loop has a pool of its own, made
when the first request needs it. Nobody has to close it: event loops close their open async generators when they
end, which makes a generator that waits in `try: yield` the one end-of-loop hook that asyncio, uvloop and trio share.
"""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING, Any, Protocol
from weakref import WeakKeyDictionary, WeakSet, finalize, ref

import anyio
from anyio.lowlevel import RunVar, current_token

from fractal._concurrency.background import Background, is_loop_here, spawn_later
from fractal._concurrency.gates import Gate, Waiting
from fractal._concurrency.threads import ThreadCall

if TYPE_CHECKING:
    import ssl
    from collections.abc import AsyncGenerator, AsyncIterator, Iterator, Mapping

    import httpx2

    from fractal.model import ModelRequest
    from fractal.models._http.connection import Template
    from fractal.models._http.connections import Connections, Exchange
    from fractal.models._http.sending import Sending
    from fractal.models._secrets import Secrets

__all__ = [
    "CLOSING",
    "Address",
    "HttpAnswer",
    "Pool",
    "close_idle_pools",
    "leave_pool",
    "machine_tls",
    "pool_of_this_loop",
]

MOST_CONNECTIONS = 1000
READ_TIMEOUT = 600.0
"""Connections, and seconds: what the `openai` SDK's own HTTP client has by default."""

CLOSING = "fractal closes connections"
"""Name of tasks that close what somebody has left to the garbage collector, among others."""

CONNECT_TIMEOUT = 15.0
"""Seconds, three times the SDK's: with a thousand connects at once, our own loop can be the slow one."""


class Address:
    """The URL of a request, and its signature.

    Args:
        url: The URL.
        headers: The headers that say who asks.
        secrets: The key among them, for whoever has to leave it out of an error.
    """

    def __init__(self, url: str, headers: Mapping[str, str], secrets: Secrets) -> None:
        self.url, self.headers, self.secrets = url, headers, secrets


class HttpAnswer(Protocol):
    """The part of an HTTP answer that is read here; an `httpx2.Response` is one."""

    @property
    def status_code(self) -> int:
        """HTTP status."""
        ...

    @property
    def headers(self) -> Mapping[str, str]:
        """The headers, by names in lower case."""
        ...

    async def aread(self) -> bytes:
        """The whole body."""
        ...

    def aiter_bytes(self) -> AsyncIterator[bytes]:
        """The body in pieces, as they come."""
        ...


class Pool:
    """One loop's connections, and an httpx2 client that sends through them.

    Args:
        limit: Connections that may be open at a time; further requests wait their turn.

    Attributes:
        is_left: Whether nobody uses the pool any more, so that it closes after the last request.
    """

    def __init__(self, limit: int) -> None:
        self._limit, self._slots = limit, Gate(limit, f"a free connection (there may be {limit})")
        self._is_open = self.is_left = self._is_closing = False
        self._token = current_token()
        self._owner: finalize[Any, Any] | None = None
        self._opening = anyio.Lock()
        self._users: WeakSet[object] = WeakSet()
        self._keeper = self._keep()
        self._templates: WeakKeyDictionary[Address, Template] = WeakKeyDictionary()
        self._client: httpx2.AsyncClient | None = None
        self._connections: Connections | None = None

    def is_entered_by(self, user: object) -> bool:
        """Whether the pool is open and has noted a user."""
        return self._is_open and user in self._users

    @property
    def is_here(self) -> bool:
        """Whether the pool is that of the running event loop."""
        return is_loop_here(self._token)

    async def enter(self, user: object) -> None:
        """Note a user of the pool; the first time, open the pool and have the loop close it at its end."""
        if not self._is_open:
            await self._open_once()
        self._users.add(user)

    async def leave(self, user: object) -> None:
        """Forget a user; without any, close once the present requests have ended. Others open another pool."""
        self._users.discard(user)
        if not self._users:
            await self.end()

    def belong_to(self, owner: object) -> None:
        """Close the pool once an object is collected as garbage, which may happen in any thread."""
        self._owner = finalize(owner, _end_soon, ref(self))
        self._owner.atexit = False

    def end_soon(self) -> None:
        """Start, in any thread, a task of the pool's event loop that ends the pool."""
        spawn_later(self._token, self.end, CLOSING)

    async def end(self) -> None:
        """Close once no request is under way or waits; no more will come."""
        _forget(self)
        self.is_left = True
        await self.close_if_idle()

    async def close_if_idle(self) -> None:
        """Close, if no request is under way or waits."""
        if self._is_open and not (self._is_closing or self._slots.held or self._slots.waiting):
            self._is_closing = True
            await Background(self._keeper.aclose, CLOSING).result()

    def slot(self, request: ModelRequest) -> _Slot:
        """A slot among those of the requests, for a block; first come, first served.

        Waiting for it is not the endpoint's fault: it does not count as time of the request.
        """
        return _Slot(self, self._slots, request.paused)

    @property
    def client(self) -> httpx2.AsyncClient:
        """An HTTP client on these connections, for users' SDK clients."""
        assert self._client is not None, "the pool was not entered"
        return self._client

    def post(self, address: Address, body: bytes, sending: Sending) -> Exchange:
        """Send a body, in a block with the answer.

        Raises:
            httpx2.HTTPError: There is no answer.
            ModelError: There is none, and it is known why.
        """
        assert self._connections is not None, "the pool was not entered"
        return self._connections.send(self._template(address), body, sending)

    async def _open_once(self) -> None:
        async with self._opening:
            if not self._is_open:
                # Importing httpx2 takes a tenth of a second: no event loop should stand still for it.
                make = functools.partial(_new_client, self._limit)
                made = await ThreadCall(make, "the making of an HTTP client", threads=None, abandon=True).run()
                self._client, self._connections = made
                # Runs up to the `yield` and does not wait, so it cannot be cancelled.
                await self._keeper.__anext__()
                self._is_open = True

    async def _keep(self) -> AsyncGenerator[None, None]:
        try:
            yield
        finally:
            _forget(self)
            if self._owner is not None:
                self._owner.detach()
            await self.client.aclose()

    def _template(self, address: Address) -> Template:
        """The request without its body."""
        template = self._templates.get(address)
        if template is None:
            assert self._connections is not None
            request = self.client.build_request("POST", address.url, headers=address.headers)
            address.secrets.add_signed(request)
            template = self._templates[address] = self._connections.template(request)
            if template.proxy is not None:
                address.secrets.add(*template.proxy.secrets)
        return template


def _end_soon(reference: ref[Pool]) -> None:
    pool = reference()
    if pool is not None:
        pool.end_soon()


class _Slot:
    """A slot for a request; its end closes a pool that nobody else uses any more."""

    __slots__ = ("_gate", "_pool", "_waiting")

    def __init__(self, pool: Pool, gate: Gate, waiting: Waiting) -> None:
        self._pool, self._gate, self._waiting = pool, gate, waiting

    async def __aenter__(self) -> None:
        if not self._gate.acquire_at_once():
            await self._gate.acquire(self._waiting)

    async def __aexit__(self, *exc: object) -> None:
        self._gate.release()
        if self._pool.is_left:  # and this may have been the last request
            await self._pool.close_if_idle()


@functools.cache
def machine_tls() -> ssl.SSLContext:
    """The machine's certificates, read once: a context is not bound to a loop."""
    import httpx2

    context = httpx2.create_ssl_context()
    context.set_alpn_protocols(["http/1.1"])
    return context


def _new_client(limit: int) -> tuple[httpx2.AsyncClient, Connections]:
    """An HTTP client, and the connections that it uses."""
    import httpx2

    from fractal.models._http.connections import Connections
    from fractal.models._http.decoding import ACCEPTED_CODINGS
    from fractal.models._http.proxies import Proxies
    from fractal.models._http.transport import Transport

    # Waiting for a slot is bounded by the run's own deadline; with a slot, there is a connection.
    timeout = httpx2.Timeout(READ_TIMEOUT, connect=CONNECT_TIMEOUT, pool=None)
    connections = Connections(machine_tls, limit, Proxies())
    headers = {"Accept-Encoding": ACCEPTED_CODINGS}
    return httpx2.AsyncClient(transport=Transport(connections), headers=headers, timeout=timeout), connections


class _Pools:
    """The pools of one event loop."""

    def __init__(self) -> None:
        self.shared: Pool | None = None
        self.own: WeakKeyDictionary[object, Pool] = WeakKeyDictionary()  # of those who want one for themselves

    def __iter__(self) -> Iterator[Pool]:
        return iter([*([self.shared] if self.shared is not None else ()), *self.own.values()])

    def for_user(self, user: object, max_connections: int | None) -> Pool:
        """The pool of a user, made if there is none; a pool of the user's own does not outlive the user."""
        if max_connections is None:
            self.shared = self.shared or Pool(default_limit())
            return self.shared
        pool = self.own.get(user)
        if pool is None:
            pool = self.own[user] = Pool(max_connections)
            pool.belong_to(user)
        return pool

    def forget(self, pool: Pool) -> None:
        """Drop a pool, so that the next request makes another."""
        if pool is self.shared:
            self.shared = None
        for user in [user for user, each in self.own.items() if each is pool]:
            del self.own[user]


_pools: RunVar[_Pools] = RunVar("fractal_http_pools")


async def pool_of_this_loop(user: object, max_connections: int | None = None) -> Pool:
    """The running loop's pool.

    Args:
        user: Who uses it; remembered, weakly, until `leave_pool`.
        max_connections: For a user who wants a pool of his own: its connections. None: the pool that all share.
    """
    pool = _pools_here().for_user(user, max_connections)
    if not pool.is_entered_by(user):
        await pool.enter(user)
    return pool


async def leave_pool(user: object) -> None:
    """Have a user leave; the last one closes the running loop's connections.

    Requests of others that are on their way, or wait, are let through to their end.
    """
    for pool in _pools_here():
        if pool.is_entered_by(user):
            await pool.leave(user)


async def close_idle_pools() -> None:
    """Close the idle pools of the running loop; the next request makes another."""
    for pool in _pools_here():
        await pool.close_if_idle()


@functools.cache
def default_limit() -> int:
    """The default number of connections of a loop: at most half of the files that the process may open."""
    try:
        import resource
    except ImportError:  # there is no such thing on Windows
        return MOST_CONNECTIONS
    files, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    return MOST_CONNECTIONS if files == resource.RLIM_INFINITY else max(min(MOST_CONNECTIONS, files // 2), 1)


def _pools_here() -> _Pools:
    try:
        return _pools.get()
    except LookupError:
        pools = _Pools()
        _pools.set(pools)
        return pools


def _forget(pool: Pool) -> None:
    _pools_here().forget(pool)
