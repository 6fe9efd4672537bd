"""The ways a request takes to an endpoint: our own HTTP, a user's SDK client, or any object with `create`."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Any, Protocol

from fractal.errors import InvalidArguments
from fractal.models._http.address import plain_key, plain_url
from fractal.models._http.wire import HttpWire
from fractal.models.bounds import DEFAULT_BOUNDS

if TYPE_CHECKING:
    from fractal.model import ModelRequest, Reply, Sink
    from fractal.models.bounds import ReplyBounds

__all__ = ["wire_for"]


_SHORTEST_KEY = 8  # characters; the name of a model is often shorter, and worth to be seen


class Wire(Protocol):
    """A way to send requests to an endpoint."""

    async def respond(self, request: ModelRequest) -> Reply:
        """The endpoint's reply.

        Raises:
            ModelError: There is none.
        """
        ...

    async def stream(self, request: ModelRequest, sink: Sink) -> Reply:
        """The endpoint's reply, handed out piece by piece while it comes.

        Raises:
            ModelError: There is none, or it broke off.
        """
        ...


def wire_for(
    client: Any,
    *,
    base_url: object = None,
    api_key: object = None,
    max_connections: int | None = None,
    bounds: ReplyBounds = DEFAULT_BOUNDS,
) -> Wire:
    """The wire for a client.

    Args:
        client: None, an `openai` client of any kind, or an object with `chat.completions.create`.
        base_url: For no client: the endpoint. None: `OPENAI_BASE_URL`, or OpenAI's own.
        api_key: For no client: the key, or a function that makes it. None: `OPENAI_API_KEY`.
        max_connections: Connections of its own in each event loop. None: those that all share.
        bounds: The most that is read of one answer.

    Raises:
        InvalidArguments: The object is none of these; it makes its connections itself and a number is given; it has a
            key and a URL, and others are given.
    """
    url, key = plain_url(base_url), plain_key(api_key)
    if client is None:
        return HttpWire(url, key, bounds, max_connections)
    for name, value in (("base_url", url), ("api_key", key)):
        if value is not None:
            raise InvalidArguments(f"{name} is given, and a client too, which has its own: give one of the two")
    # Nobody else needs them.
    from fractal.models._clients.object import ObjectWire
    from fractal.models._clients.sdk import BoundSdkWire, SdkWire, ThreadWire, async_copy_maker, copier

    openai: Any = sys.modules.get("openai")
    is_sdk = openai is not None and isinstance(client, (openai.AsyncOpenAI, openai.OpenAI))
    # Somebody who replaced `create` on a real client means that to be called.
    if openai is not None and is_sdk and "create" not in vars(client.chat.completions):
        copy = copier(client) if isinstance(client, openai.AsyncOpenAI) else async_copy_maker(client, openai)
        if copy is not None:
            return SdkWire(copy, bounds, max_connections)
        _require_no_limit(client, max_connections)
        return BoundSdkWire(client, bounds) if isinstance(client, openai.AsyncOpenAI) else ThreadWire(client, bounds)
    create = getattr(getattr(getattr(client, "chat", None), "completions", None), "create", None)
    if not callable(create):
        raise InvalidArguments(
            f"client={_shown(client)} is neither an openai client, nor a Model, nor an object with"
            " chat.completions.create"
        )
    _require_no_limit(client, max_connections)
    return ObjectWire(create, bounds)


def _shown(client: object) -> str:
    """The text for a wrong client: only its kind, if it may be or hold a key."""
    is_harmless = client is None or isinstance(client, (bool, int, float))
    is_short = isinstance(client, str) and len(client) < _SHORTEST_KEY
    return repr(client) if is_harmless or is_short else f"<a {type(client).__name__}>"


def _require_no_limit(client: object, max_connections: int | None) -> None:
    if max_connections is not None:
        raise InvalidArguments(
            f"max_connections={max_connections!r}: {type(client).__name__} makes its connections itself; set it there"
        )
