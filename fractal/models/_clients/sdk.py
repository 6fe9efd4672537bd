"""Ways to an endpoint through a user's `openai` client, with its auth, headers, URL and time-outs.

Each request is sent by a copy of the client, which says what the client says at that time, and which has another HTTP
client. The public `post` is used in place of `chat.completions.create`, whose walk over all parameters costs more with
each message.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import aclosing, closing
from functools import partial
from typing import TYPE_CHECKING, Any, TypeAlias, TypeVar
from urllib.parse import quote

import anyio
from anyio.lowlevel import current_token

from fractal._concurrency.gates import client_threads
from fractal._concurrency.scopes import single_error
from fractal._concurrency.threads import ThreadCall
from fractal.errors import ClientBoundToLoop, InvalidArguments
from fractal.models._faults import translated
from fractal.models._http.address import JSON, ask_for_key
from fractal.models._http.pool import pool_of_this_loop
from fractal.models._http.sending import Sending, current_sending
from fractal.models._replies.answer_reader import AnswerReader, read_answer, read_body
from fractal.models._secrets import Secrets

if TYPE_CHECKING:
    from fractal.model import ModelRequest, Reply, Sink
    from fractal.models.bounds import ReplyBounds

__all__ = ["BoundSdkWire", "SdkWire", "ThreadWire", "async_copy_maker", "copier"]

T = TypeVar("T")

_REQUEST = "a request by a blocking client"

Copy: TypeAlias = Callable[[Any], Any]
"""Makes a client that says what the user's says now, and sends through the HTTP client it is given."""


class BoundSdkWire:
    """A user's `AsyncOpenAI` with an HTTP client of its own, bound to the first event loop it was used from.

    Args:
        client: The user's client.
        bounds: The most that is read of one answer.
    """

    def __init__(self, client: Any, bounds: ReplyBounds) -> None:
        self._client, self._bounds = client, bounds
        self._loop: object = None
        self._http: Any = None
        self._copy = Copies(client)

    async def respond(self, request: ModelRequest) -> Reply:
        """Send the request through the SDK, and read the raw answer."""
        return await _respond(self._client_here(), request, self._bounds)

    async def stream(self, request: ModelRequest, sink: Sink) -> Reply:
        """Send the request through the SDK, and read the raw stream."""
        return await _stream(self._client_here(), request, sink, self._bounds)

    def _client_here(self) -> Any:
        loop = current_token().native_token
        if self._loop is None:
            self._loop = loop
        if self._loop is not loop:
            raise ClientBoundToLoop(type(self._client).__name__)
        if self._http is None:
            import httpx2

            from fractal.models._http.transport import Passage

            self._http = httpx2.AsyncClient(transport=Passage(self._client._client))
        return self._copy(self._http)


class SdkWire:
    """A user's `AsyncOpenAI`, or the async copy of a blocking one, on the connections of each event loop.

    Args:
        copy: Makes the client that sends a request.
        bounds: The most that is read of one answer.
        max_connections: Connections of its own in each event loop. None: those that all share.
    """

    def __init__(self, copy: Copy, bounds: ReplyBounds, max_connections: int | None = None) -> None:
        self._copy, self._bounds, self._max_connections = copy, bounds, max_connections

    async def respond(self, request: ModelRequest) -> Reply:
        """Send the request through the SDK, and read the raw answer."""
        pool = await pool_of_this_loop(self, self._max_connections)
        async with pool.slot(request):
            return await _respond(self._copy(pool.client), request, self._bounds)

    async def stream(self, request: ModelRequest, sink: Sink) -> Reply:
        """Send the request through the SDK, and read the raw stream."""
        pool = await pool_of_this_loop(self, self._max_connections)
        async with pool.slot(request):
            return await _stream(self._copy(pool.client), request, sink, self._bounds)


async def _respond(client: Any, request: ModelRequest, bounds: ReplyBounds) -> Reply:
    sending = _sending(client, request, bounds)
    with translated(sending.secrets), current_sending(sending):
        response = await _post(client, request.model, request.body())
        async with aclosing(response):
            body = await response.aread()
        return await read_body(response.status_code, response.headers, body, bounds, sending.secrets)


async def _stream(client: Any, request: ModelRequest, sink: Sink, bounds: ReplyBounds) -> Reply:
    sending = _sending(client, request, bounds)
    with translated(sending.secrets), current_sending(sending):
        response = await _post(client, request.model, request.body())
        async with aclosing(response):
            return await read_answer(response, sink, bounds, sending.secrets)


class ThreadWire:
    """A blocking SDK client that cannot be copied for an event loop: its calls run in worker threads.

    Args:
        client: The user's client.
        bounds: The most that is read of one answer.
    """

    def __init__(self, client: Any, bounds: ReplyBounds) -> None:
        self._client, self._bounds = client, bounds
        self._http: Any = None
        self._copy = Copies(client)

    async def respond(self, request: ModelRequest) -> Reply:
        """Send the request from a worker thread."""
        client, body = self._client_now(), request.body()
        sending = _sending(client, request, self._bounds)

        def work(call: ThreadCall[Any]) -> tuple[Any, bytes]:
            with closing(_post(client, request.model, body)) as response:
                return response, response.read()

        with translated(sending.secrets):
            response, data = await _called(work, request, sending)
            return await read_body(response.status_code, response.headers, data, self._bounds, sending.secrets)

    async def stream(self, request: ModelRequest, sink: Sink) -> Reply:
        """Send the request from a worker thread, which hands over what comes until nobody wants any more."""
        client, body = self._client_now(), request.body()
        sending = _sending(client, request, self._bounds)
        reader: AnswerReader | None = None

        def work(call: ThreadCall[Any]) -> None:
            nonlocal reader
            with closing(_post(client, request.model, body)) as response:
                reader = AnswerReader(response.status_code, response.headers, sink, self._bounds, sending.secrets)
                for data in response.iter_bytes():
                    call.join(partial(reader.read, data))  # raises when nobody wants it any more
                    if reader.is_done:
                        break

        with translated(sending.secrets):
            try:
                await _called(work, request, sending)
            except Exception as error:
                if reader is None or not reader.can_do_without_the_rest(error):
                    raise
            assert reader is not None
            return await reader.end()

    def _client_now(self) -> Any:
        if self._http is None:
            import httpx2

            from fractal.models._http.transport import BlockingPassage

            self._http = httpx2.Client(transport=BlockingPassage(self._client._client))
        return self._copy(self._http)


async def _called(work: Callable[[ThreadCall[Any]], T], request: ModelRequest, sending: Sending) -> T:
    """The return value of a function called in a worker thread, which may call back from there."""
    made: list[T] = []

    async def charge() -> None:
        request.charge()

    with single_error(), current_sending(sending):
        async with anyio.create_task_group() as group:
            call = ThreadCall(
                lambda: work(call),
                _REQUEST,
                threads=client_threads,
                waiting=request.paused,
                abandon=True,
                group=group,
            )
            sending.charge = lambda: call.join(charge)
            made.append(await call.run())
    return made[0]


def _sending(client: Any, request: ModelRequest, bounds: ReplyBounds) -> Sending:
    known = (getattr(client, name, None) for name in ("api_key", "_azure_ad_token"))
    secrets = Secrets(*(secret for secret in known if isinstance(secret, str)))
    return Sending(bounds, request.charge, secrets, request.headers)


def _post(client: Any, model: str, body: bytes) -> Any:
    """Have an SDK client post; returns the HTTP response, its body not yet read, or an awaitable of it."""
    import httpx2

    # Its own retries are off: ours look at the deadline and at the budget.
    options = {"headers": JSON, "max_retries": 0}
    path = _path(client, model)
    return client.post(path, cast_to=httpx2.Response, content=body, options=options, stream=True)


def _path(client: Any, model: str) -> str:
    """The path that the SDK posts to; Azure's holds the deployment, which the SDK adds only for JSON bodies."""
    azure = hasattr(client, "_api_version")
    if azure and "/deployments" not in client.base_url.path:
        if model.strip(".") == "":
            raise InvalidArguments(f"model={model!r}: Azure can have no deployment of that name")
        return f"/deployments/{quote(model, safe='')}/chat/completions"
    return "/chat/completions"


def _has_default_http(client: Any) -> bool:
    """Whether the SDK made the HTTP client itself, so that another one serves as well."""
    http = getattr(client, "_client", None)
    return type(http).__name__ in ("AsyncHttpxClientWrapper", "SyncHttpxClientWrapper")


def copier(client: Any) -> Copy | None:
    """A function that copies an async client for another HTTP client; None if its own has to stay."""
    return Copies(client) if _has_default_http(client) else None


def async_copy_maker(client: Any, openai: Any) -> Copy | None:
    """A function that makes the async copy of a blocking client; None if some of its settings would be lost."""
    kinds = {openai.OpenAI: openai.AsyncOpenAI, openai.AzureOpenAI: openai.AsyncAzureOpenAI}
    kind = kinds.get(type(client))
    if kind is None or not _has_default_http(client):
        return None
    if getattr(client, "workload_identity", None) or getattr(client, "_provider", None):
        return None

    copies = Copies(client, kind)

    def copy(http: Any) -> Any:
        made = copies(http)
        for name in ("_api_key_provider", "_azure_ad_token_provider"):
            provider = getattr(made, name, None)
            if provider is not None:
                setattr(made, name, partial(ask_for_key, provider))
        return made

    return copy


class Copies:
    """A maker of clients that have a user's client's present settings, and send through another HTTP client.

    The SDK's own `copy` makes it from what it was made of, so that what has changed since, or what a class of the
    user's has added, would be lost. The blocking kind and the async one know themselves by the same names.

    Args:
        client: The user's client.
        kind: The class of the copies. None: that of the client.
    """

    def __init__(self, client: Any, kind: Any = None) -> None:
        self._client, self._kind = client, kind or client.__class__
        self._last = client

    def __call__(self, http: Any) -> Any:
        """Make a client."""
        # What kind of machine this is, the SDK finds out in a thread at the first request of each client.
        known = {"_client": http, "_platform": getattr(self._last, "_platform", None)}
        copy = self._kind.__new__(self._kind)
        copy.__dict__ = {**self._client.__dict__, **known}
        self._last = copy
        return copy
