"""The ways a request takes to an endpoint: our own HTTP, a user's SDK client, or any object with `create`."""

from __future__ import annotations

import inspect
import os
import sys
from collections.abc import Awaitable, Callable
from typing import Any, Protocol, cast
from urllib.parse import quote, urlsplit

from anyio.lowlevel import current_token
from pydantic import BaseModel

from fractal._json import is_mapping
from fractal._threads import ThreadCall
from fractal.errors import ClientBoundToLoop, ConnectionFailed, InvalidArguments, MissingCredentials
from fractal.models._faults import reply_from, translated
from fractal.models._pool import pool_of_this_loop
from fractal.models.base import ModelRequest, Reply

__all__ = ["Wire", "wire_for"]

DEFAULT_BASE_URL = "https://api.openai.com/v1"
_JSON = {"Content-Type": "application/json"}


class Wire(Protocol):
    """Takes a request to an endpoint."""

    async def respond(self, request: ModelRequest) -> Reply:
        """The endpoint's reply.

        Raises:
            ModelError: There is none.
        """
        ...


def wire_for(client: Any, *, base_url: str | None = None, api_key: str | None = None) -> Wire:
    """Choose the way for a client.

    Args:
        client: None, an `openai` client of any kind, or an object with `chat.completions.create`.
        base_url: For no client: the endpoint. None: `OPENAI_BASE_URL`, or OpenAI's own.
        api_key: For no client: the key. None: `OPENAI_API_KEY`.

    Raises:
        InvalidArguments: The object is none of these.
    """
    if client is None:
        return HttpWire(base_url, api_key)
    openai: Any = sys.modules.get("openai")
    is_sdk = openai is not None and isinstance(client, (openai.AsyncOpenAI, openai.OpenAI))
    # Somebody who replaced `create` on a real client means that to be called.
    if openai is not None and is_sdk and "create" not in vars(client.chat.completions):
        if isinstance(client, openai.AsyncOpenAI):
            return SdkWire(client)
        twin = _async_twin_maker(client, openai)
        return SdkWire(client, twin) if twin else ThreadWire(client)
    create = getattr(getattr(getattr(client, "chat", None), "completions", None), "create", None)
    if not callable(create):
        raise InvalidArguments(
            f"client={client!r} is neither an openai client, nor a Model, nor an object with chat.completions.create"
        )
    return ObjectWire(create)


class HttpWire:
    """Our own: one POST through the loop's shared HTTP client."""

    def __init__(self, base_url: str | None, api_key: str | None) -> None:
        self._base_url, self._api_key = base_url, api_key

    async def respond(self, request: ModelRequest) -> Reply:
        """Send it as it is encoded, read what comes back."""
        url, key, headers = self._address()
        with translated(key):
            pool = await pool_of_this_loop(self)
            response = await pool.client.post(url, content=request.body(), headers=headers)
            return reply_from(response.status_code, response.headers, response.content, key)

    def _address(self) -> tuple[str, str | None, dict[str, str]]:
        """Where to send; the environment is read here and nowhere else, at each request."""
        base_url = self._base_url or os.environ.get("OPENAI_BASE_URL") or DEFAULT_BASE_URL
        key = (self._api_key or os.environ.get("OPENAI_API_KEY") or "").strip()
        if not key and base_url == DEFAULT_BASE_URL:
            raise MissingCredentials(
                "there is no API key: set OPENAI_API_KEY (and OPENAI_BASE_URL for another endpoint), or pass client="
            )
        named = {
            "Authorization": f"Bearer {key}" if key else None,
            "OpenAI-Organization": os.environ.get("OPENAI_ORG_ID"),
            "OpenAI-Project": os.environ.get("OPENAI_PROJECT_ID"),
        }
        if not (key.isascii() and key.isprintable()):
            raise MissingCredentials(
                "the API key has characters that no HTTP header can carry: look for quotes or breaks"
            )
        _require_url(base_url)
        headers = _JSON | {name: value for name, value in named.items() if value}
        return base_url.rstrip("/") + "/chat/completions", key or None, headers


def _require_url(base_url: str) -> None:
    """Name a base URL that no request can go to, which the layers below report in many ways."""
    try:
        parts = urlsplit(base_url)
        usable = parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
    except ValueError:
        usable = False
    if not usable:
        fault = ConnectionFailed(f"the base URL cannot be used: {base_url!r}")
        fault.retryable = False
        raise fault


class SdkWire:
    """A user's `AsyncOpenAI`, or the async twin of a blocking one, with its auth, headers, URL and time-outs.

    The public `post` is used in place of `chat.completions.create`, whose walk over all parameters costs more with
    each message. A client with the SDK's own HTTP client is copied once for each event loop; one with an HTTP client
    that the user made stays with the first loop it was used from.

    Args:
        client: The user's client.
        clone: Makes a copy that sends through the HTTP client it is given. None: the client's own `copy`.
    """

    def __init__(self, client: Any, clone: Callable[[Any], Any] | None = None) -> None:
        self._client = client
        self._clone = clone if clone is not None else _copier(client)
        self._loop: object = None

    async def respond(self, request: ModelRequest) -> Reply:
        """Send it through the SDK, read the raw answer."""
        client = await self._client_here()
        with translated(_key_of(client)):
            response = await _post(client, request.model, request.body())
            return reply_from(response.status_code, response.headers, response.content, _key_of(client))

    async def _client_here(self) -> Any:
        if self._clone is None:
            loop = current_token().native_token
            if self._loop is None:
                self._loop = loop
            if self._loop is not loop:
                raise ClientBoundToLoop(type(self._client).__name__)
            return self._client
        pool = await pool_of_this_loop(self)
        clone = pool.clones.get(self._client)
        if clone is None:
            clone = pool.clones[self._client] = self._clone(pool.client)
        return clone


class ThreadWire:
    """A blocking SDK client that cannot be copied: its calls run in worker threads."""

    def __init__(self, client: Any) -> None:
        self._client = client

    async def respond(self, request: ModelRequest) -> Reply:
        """Send it from a worker thread."""
        client, body = self._client, request.body()
        with translated(_key_of(client)):
            response = await ThreadCall(lambda: _post(client, request.model, body), abandon=True).run()
            return reply_from(response.status_code, response.headers, response.content, _key_of(client))


class ObjectWire:
    """Any object with `chat.completions.create`: a test's double, another library's client."""

    def __init__(self, create: Callable[..., Any]) -> None:
        self._create = create

    async def respond(self, request: ModelRequest) -> Reply:
        """Call `create`: awaited if it is a coroutine function, else from a worker thread."""
        create, parameters = self._create, request.parameters()
        with translated():
            if inspect.iscoroutinefunction(create):
                answer = await create(**parameters)
            else:
                # In a list: a thread must not hand over a bare coroutine on trio.
                [answer] = await ThreadCall(lambda: [create(**parameters)], abandon=True).run()
                if inspect.isawaitable(answer):
                    answer = await answer
            return Reply.from_completion(plain(answer))


def plain(answer: Any) -> Any:
    """A completion in JSON's own types, from a dict, a pydantic model, or objects with the same attributes."""
    if isinstance(answer, BaseModel):
        return answer.model_dump(mode="json", warnings=False)
    if answer is None:
        return None
    # Read by name, since a mock has every attribute and only those set to plain values count.
    choices = _field(answer, "choices")
    return {
        "choices": [_plain_choice(choice) for choice in cast("list[Any]", choices)]
        if isinstance(choices, (list, tuple))
        else [],
        "usage": _fields(_field(answer, "usage"), "prompt_tokens", "completion_tokens"),
        "error": _field(answer, "error"),
    }


def _plain_choice(choice: Any) -> dict[str, Any]:
    message = _field(choice, "message")
    plain_message = _fields(message, "content", "refusal")
    calls = _field(message, "tool_calls")
    if isinstance(calls, (list, tuple)):
        plain_message["tool_calls"] = [
            {**_fields(call, "id"), "function": _fields(_field(call, "function"), "name", "arguments")}
            for call in _items(cast("list[Any]", calls))
        ]
    return {"message": plain_message if message is not None else None, **_fields(choice, "finish_reason")}


def _items(value: object) -> list[Any]:
    return list(cast("list[Any]", value)) if isinstance(value, (list, tuple)) else []


def _fields(source: object, *names: str) -> dict[str, Any]:
    return {name: _field(source, name) for name in names}


def _field(source: Any, name: str) -> Any:
    if isinstance(source, BaseModel):
        source = source.model_dump(mode="json", warnings=False)
    return source.get(name) if is_mapping(source) else getattr(source, name, None)


def _post(client: Any, model: str, body: bytes) -> Any:
    """Have an SDK client post; what comes back is the HTTP response, or an awaitable of it."""
    import httpx2

    # Its own retries are off: ours look at the deadline and at the budget.
    options = {"headers": _JSON, "max_retries": 0}
    return client.post(_path(client, model), cast_to=httpx2.Response, content=body, options=options)


def _path(client: Any, model: str) -> str:
    """Where the SDK is to post; Azure has the deployment in the path, which the SDK adds only for JSON bodies."""
    azure = hasattr(client, "_api_version")
    if azure and "/deployments" not in client.base_url.path:
        return f"/deployments/{quote(model, safe='')}/chat/completions"
    return "/chat/completions"


def _key_of(client: Any) -> str | None:
    key = getattr(client, "api_key", None)
    return key if isinstance(key, str) and len(key) > 3 else None


def _has_default_http(client: Any) -> bool:
    """Whether the SDK made the HTTP client itself, so that another one serves as well."""
    http = getattr(client, "_client", None)
    return type(http).__name__ in ("AsyncHttpxClientWrapper", "SyncHttpxClientWrapper")


def _copier(client: Any) -> Callable[[Any], Any] | None:
    def copy(http: Any) -> Any:
        return client.copy(http_client=http)

    return copy if _has_default_http(client) else None


def _async_twin_maker(client: Any, openai: Any) -> Callable[[Any], Any] | None:
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
        return await ThreadCall(provider, abandon=True).run()

    return provide
