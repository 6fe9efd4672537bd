"""Ways to an endpoint through a user's `openai` client, with its auth, headers, URL and time-outs.

The public `post` is used in place of `chat.completions.create`, whose walk over all parameters costs more with each
message.
"""

from __future__ import annotations

from contextlib import aclosing, closing
from functools import partial
from typing import TYPE_CHECKING, Any
from urllib.parse import quote

import anyio
from anyio.lowlevel import current_token

from fractal._scopes import cancellation_noted, single_error
from fractal._threads import ThreadCall
from fractal.errors import ClientBoundToLoop
from fractal.models._answer_reader import AnswerReader, read_answer, read_body
from fractal.models._faults import translated
from fractal.models._http import JSON
from fractal.models._pool import Pool, pool_of_this_loop
from fractal.models._secrets import NO_SECRETS, Secrets

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    from fractal.models.base import ModelRequest, Reply, Sink
    from fractal.models.bounds import ReplyBounds

__all__ = ["BoundSdkWire", "SdkWire", "ThreadWire", "async_twin_maker", "copier"]

_REQUEST = "a request by a blocking client"


class BoundSdkWire:
    """A user's `AsyncOpenAI` with an HTTP client of his own; it stays with the first event loop it was used from.

    Args:
        client: The user's client.
        bounds: The most that is read of one answer.
    """

    def __init__(self, client: Any, bounds: ReplyBounds) -> None:
        self._client, self._bounds = client, bounds
        self._loop: object = None

    async def respond(self, request: ModelRequest) -> Reply:
        """Send it through the SDK, read the raw answer."""
        return await _respond(self._client_here(), request, self._bounds)

    async def stream(self, request: ModelRequest, sink: Sink) -> Reply:
        """Send it through the SDK, read the raw stream."""
        return await _stream(self._client_here(), request, sink, self._bounds)

    def _client_here(self) -> Any:
        loop = current_token().native_token
        if self._loop is None:
            self._loop = loop
        if self._loop is not loop:
            raise ClientBoundToLoop(type(self._client).__name__)
        return self._client


class SdkWire:
    """A user's `AsyncOpenAI`, or the async twin of a blocking one, as a copy for each event loop.

    Args:
        client: The user's client.
        clone: Makes a copy that sends through the HTTP client it is given.
        bounds: The most that is read of one answer.
        max_connections: Connections of its own in each event loop. None: those that all share.
    """

    def __init__(
        self, client: Any, clone: Callable[[Any], Any], bounds: ReplyBounds, max_connections: int | None = None
    ) -> None:
        self._bounds = bounds
        self._client, self._clone, self._max_connections = client, clone, max_connections

    async def respond(self, request: ModelRequest) -> Reply:
        """Send it through the SDK, read the raw answer."""
        pool = await pool_of_this_loop(self, self._max_connections)
        async with pool.place(request):
            return await _respond(self._client_in(pool), request, self._bounds)

    async def stream(self, request: ModelRequest, sink: Sink) -> Reply:
        """Send it through the SDK, read the raw stream."""
        pool = await pool_of_this_loop(self, self._max_connections)
        async with pool.place(request):
            return await _stream(self._client_in(pool), request, sink, self._bounds)

    def _client_in(self, pool: Pool) -> Any:
        clone = pool.clones.get(self._client)
        if clone is None:
            clone = pool.clones[self._client] = self._clone(pool.client)
        return clone


async def _respond(client: Any, request: ModelRequest, bounds: ReplyBounds) -> Reply:
    secrets = _secrets_of(client)
    with translated(secrets):
        response = await _post(client, request.model, request.body())
        return await read_body(response.status_code, response.headers, response.content, bounds, secrets)


async def _stream(client: Any, request: ModelRequest, sink: Sink, bounds: ReplyBounds) -> Reply:
    secrets = _secrets_of(client)
    with translated(secrets):
        response = await _post(client, request.model, request.body(), stream=True)
        async with aclosing(response):
            return await read_answer(response, sink, bounds, secrets)


class ThreadWire:
    """A blocking SDK client that cannot be copied: its calls run in worker threads.

    Args:
        client: The user's client.
        bounds: The most that is read of one answer.
    """

    def __init__(self, client: Any, bounds: ReplyBounds) -> None:
        self._client, self._bounds = client, bounds

    async def respond(self, request: ModelRequest) -> Reply:
        """Send it from a worker thread."""
        client, body = self._client, request.body()
        secrets = _secrets_of(client)
        with translated(secrets):
            call = ThreadCall(
                lambda: _post(client, request.model, body), _REQUEST, waiting=request.paused, abandon=True
            )
            response = await call.run()
            return await read_body(response.status_code, response.headers, response.content, self._bounds, secrets)

    async def stream(self, request: ModelRequest, sink: Sink) -> Reply:
        """Send it from a worker thread, which hands over what comes until nobody wants it any more."""
        client, body, secrets = self._client, request.body(), _secrets_of(self._client)
        reader: AnswerReader | None = None

        def work() -> None:
            nonlocal reader
            with closing(_post(client, request.model, body, stream=True)) as response:
                reader = AnswerReader(response.status_code, response.headers, sink, self._bounds, secrets)
                for data in response.iter_bytes():
                    call.join(partial(reader.read, data))  # raises when nobody wants it any more
                    if reader.is_done:
                        break

        with translated(secrets):
            try:
                with single_error():
                    async with anyio.create_task_group() as group:
                        call = ThreadCall(work, _REQUEST, waiting=request.paused, abandon=True, group=group)
                        with cancellation_noted():
                            await call.run()
            except Exception as error:
                if reader is None or not reader.can_do_without_the_rest(error):
                    raise
            assert reader is not None
            return await reader.end()


def _post(client: Any, model: str, body: bytes, *, stream: bool = False) -> Any:
    """Have an SDK client post; what comes back is the HTTP response, or an awaitable of it."""
    import httpx2

    # Its own retries are off: ours look at the deadline and at the budget.
    options = {"headers": JSON, "max_retries": 0}
    path = _path(client, model)
    return client.post(path, cast_to=httpx2.Response, content=body, options=options, stream=stream)


def _path(client: Any, model: str) -> str:
    """Where the SDK is to post; Azure has the deployment in the path, which the SDK adds only for JSON bodies."""
    azure = hasattr(client, "_api_version")
    if azure and "/deployments" not in client.base_url.path:
        return f"/deployments/{quote(model, safe='')}/chat/completions"
    return "/chat/completions"


def _secrets_of(client: Any) -> Secrets:
    key = getattr(client, "api_key", None)
    return Secrets(key) if isinstance(key, str) else NO_SECRETS


def _has_default_http(client: Any) -> bool:
    """Whether the SDK made the HTTP client itself, so that another one serves as well."""
    http = getattr(client, "_client", None)
    return type(http).__name__ in ("AsyncHttpxClientWrapper", "SyncHttpxClientWrapper")


def copier(client: Any) -> Callable[[Any], Any] | None:
    """How to copy an async client for another HTTP client; None if its own has to stay."""

    def copy(http: Any) -> Any:
        return client.copy(http_client=http)

    return copy if _has_default_http(client) else None


def async_twin_maker(client: Any, openai: Any) -> Callable[[Any], Any] | None:
    """How to make the async twin of a blocking client; None if something of it would be lost."""
    is_azure = type(client) is openai.AzureOpenAI
    if not (is_azure or type(client) is openai.OpenAI) or not _has_default_http(client):
        return None
    if getattr(client, "workload_identity", None) or getattr(client, "_provider", None):
        return None
    facts: dict[str, Any] = {
        "api_key": _awaited(client._api_key_provider) or client.api_key,
        "organization": client.organization,
        "project": client.project,
        "base_url": client.base_url,
        "timeout": client.timeout,
        "default_headers": client._custom_headers,
        "default_query": client._custom_query,
    }
    if is_azure:
        facts |= {
            "api_version": client._api_version,
            "azure_ad_token": client._azure_ad_token,
            "azure_ad_token_provider": _awaited(client._azure_ad_token_provider),
        }
        if client._azure_ad_token or client._azure_ad_token_provider:
            del facts["api_key"]
    kind = openai.AsyncAzureOpenAI if is_azure else openai.AsyncOpenAI
    return lambda http: kind(http_client=http, **facts)


def _awaited(provider: Callable[[], str] | None) -> Callable[[], Awaitable[str]] | None:
    """A blocking key provider, called in a worker thread."""
    if provider is None:
        return None

    async def provide() -> str:
        return await ThreadCall(provider, "the provider of a key", abandon=True).run()

    return provide
