"""Models behind OpenAI-compatible endpoints."""

from __future__ import annotations

from typing import Any

from fractal.models._pool import leave_pool
from fractal.models._wires import wire_for
from fractal.models.base import Model, ModelRequest, Reply

__all__ = ["OpenAIModel", "model_for"]


class OpenAIModel:
    """Any endpoint that speaks chat completions.

    Made and used from any number of event loops: each has its own connections, closed when the loop ends.

    Args:
        client: `AsyncOpenAI`, `OpenAI`, their Azure kinds, or any object with `chat.completions.create`. None: our
            own HTTP, which needs no SDK.
        base_url: Without a client: the endpoint. None: `OPENAI_BASE_URL`, or OpenAI's own.
        api_key: Without a client: the key. None: `OPENAI_API_KEY`.

    Raises:
        InvalidArguments: `client` is something else.

    Example:
        >>> model = OpenAIModel(base_url="http://127.0.0.1:8000/v1")
    """

    def __init__(self, client: Any = None, *, base_url: str | None = None, api_key: str | None = None) -> None:
        self._wire = wire_for(client, base_url=base_url, api_key=api_key)

    async def respond(self, request: ModelRequest) -> Reply:
        """Answer one request.

        Raises:
            ModelError: The endpoint could not be reached, refused, or answered nonsense.
        """
        return await self._wire.respond(request)

    async def aclose(self) -> None:
        """Close what was opened for the running event loop; further requests open it again."""
        await leave_pool(self._wire)


def model_for(client: Any) -> Model:
    """The model behind what a user calls a client: a `Model` as it is, anything else as an endpoint's client."""
    # The class is asked, not the object: a mock has every attribute.
    kind: type[Any] = client.__class__
    model: Model = client if callable(getattr(kind, "respond", None)) else OpenAIModel(client)
    return model
