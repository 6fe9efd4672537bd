"""The ways a request takes to an endpoint: our own HTTP, a user's SDK client, or any object with `create`."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Any, Protocol

from fractal.errors import InvalidArguments
from fractal.models._http import HttpWire
from fractal.models.bounds import DEFAULT_BOUNDS

if TYPE_CHECKING:
    from fractal.models.base import ModelRequest, Reply, Sink
    from fractal.models.bounds import ReplyBounds

__all__ = ["Wire", "wire_for"]


class Wire(Protocol):
    """Takes a request to an endpoint."""

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
    base_url: str | None = None,
    api_key: str | None = None,
    max_connections: int | None = None,
    bounds: ReplyBounds = DEFAULT_BOUNDS,
) -> Wire:
    """Choose the way for a client.

    Args:
        client: None, an `openai` client of any kind, or an object with `chat.completions.create`.
        base_url: For no client: the endpoint. None: `OPENAI_BASE_URL`, or OpenAI's own.
        api_key: For no client: the key. None: `OPENAI_API_KEY`.
        max_connections: Connections of its own in each event loop. None: those that all share.
        bounds: The most that is read of one answer.

    Raises:
        InvalidArguments: The object is none of these, or it makes its connections itself and a number is given.
    """
    if client is None:
        return HttpWire(base_url, api_key, bounds, max_connections)
    # Nobody else needs them.
    from fractal.models._object import ObjectWire
    from fractal.models._sdk import BoundSdkWire, SdkWire, ThreadWire, async_twin_maker, copier

    openai: Any = sys.modules.get("openai")
    is_sdk = openai is not None and isinstance(client, (openai.AsyncOpenAI, openai.OpenAI))
    # Somebody who replaced `create` on a real client means that to be called.
    if openai is not None and is_sdk and "create" not in vars(client.chat.completions):
        clone = copier(client) if isinstance(client, openai.AsyncOpenAI) else async_twin_maker(client, openai)
        if clone is not None:
            return SdkWire(client, clone, bounds, max_connections)
        _require_no_limit(client, max_connections)
        return BoundSdkWire(client, bounds) if isinstance(client, openai.AsyncOpenAI) else ThreadWire(client, bounds)
    create = getattr(getattr(getattr(client, "chat", None), "completions", None), "create", None)
    if not callable(create):
        raise InvalidArguments(
            f"client={client!r} is neither an openai client, nor a Model, nor an object with chat.completions.create"
        )
    _require_no_limit(client, max_connections)
    return ObjectWire(create, bounds)


def _require_no_limit(client: object, max_connections: int | None) -> None:
    if max_connections is not None:
        raise InvalidArguments(
            f"max_connections={max_connections!r}: {type(client).__name__} makes its connections itself; set it there"
        )
