"""Models behind OpenAI-compatible endpoints."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from fractal.errors import InvalidArguments, StatusError
from fractal.models._address import ApiKey, BaseUrl
from fractal.models._pool import leave_pool
from fractal.models._wires import streamed, wire_for
from fractal.models.base import Model, ModelRequest, Reply, Sink
from fractal.models.bounds import DEFAULT_BOUNDS, ReplyBounds

__all__ = ["OpenAIModel", "model_for"]


class OpenAIModel:
    """Any endpoint that speaks chat completions.

    Made and used from any number of event loops: each has its own connections, closed when the loop ends.

    Args:
        client: `AsyncOpenAI`, `OpenAI`, their Azure kinds, or any object with `chat.completions.create`. None: our
            own HTTP, which needs no SDK.
        base_url: Without a client: the endpoint, as text or a URL of some library. None: `OPENAI_BASE_URL`, or OpenAI's
            own.
        api_key: Without a client: the key, as text, bytes or a `SecretStr`, or a function, plain or async, that makes
            it for each request. None: `OPENAI_API_KEY`.
        model: Name of the model, in place of the agent's: for one of several models in combination. None: the
            agent's.
        max_connections: Connections that this model may have open in each event loop, besides those of other models;
            further requests wait their turn, in their order. None: it shares the loop's connections with all other
            models that say nothing: 1000, or half of the files that the process may open if that is less.
        bounds: The most that is read of one answer. None: the defaults of `ReplyBounds`.

    Raises:
        InvalidArguments: `client` is something else, or makes its connections itself and `max_connections` is
            given, or comes with a `base_url` or `api_key`; one of these is of no use; or `model` is no name,
            `max_connections` no number from 1 up, or `bounds` no `ReplyBounds`.

    Example:
        >>> model = OpenAIModel(base_url="http://127.0.0.1:8000/v1")
    """

    def __init__(
        self,
        client: Any = None,
        *,
        base_url: BaseUrl = None,
        api_key: ApiKey = None,
        model: str | None = None,
        max_connections: int | None = None,
        bounds: ReplyBounds | None = None,
    ) -> None:
        if model is not None and (not isinstance(model, str) or not model):
            raise InvalidArguments(f"model={model!r}: give the name of a model, or None")
        if max_connections is not None and not _is_count(max_connections):
            raise InvalidArguments(f"max_connections={max_connections!r}: give a whole number from 1 up, or None")
        if bounds is not None and not isinstance(bounds, ReplyBounds):
            raise InvalidArguments(f"bounds={bounds!r}: give ReplyBounds(…), or None")
        self._wire = wire_for(
            client,
            base_url=base_url,
            api_key=api_key,
            max_connections=max_connections,
            bounds=bounds or DEFAULT_BOUNDS,
        )
        self._model = model
        self._tells_usage = True  # until the endpoint says that it does not know the field

    async def respond(self, request: ModelRequest) -> Reply:
        """Answer one request.

        Raises:
            ModelError: The endpoint could not be reached, refused, or answered nonsense.
        """
        return await self._wire.respond(self._named(request))

    async def stream(self, request: ModelRequest, sink: Sink) -> Reply:
        """Answer one request, handing out each piece as it comes.

        Raises:
            ModelError: As in `respond`; also when the stream breaks off before the answer is whole.
        """
        request = self._named(request)
        if self._tells_usage:
            try:
                return await self._wire.stream(streamed(request, include_usage=True), sink)
            except StatusError as error:
                if not (error.param or "").startswith("stream_options"):
                    raise
                self._tells_usage = False
                request.charge()
        return await self._wire.stream(streamed(request, include_usage=False), sink)

    async def aclose(self) -> None:
        """Close what was opened for the running event loop; further requests open it again."""
        await leave_pool(self._wire)

    def _named(self, request: ModelRequest) -> ModelRequest:
        return request if self._model is None else replace(request, model=self._model)


def _is_count(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value > 0


def model_for(client: Any) -> Model:
    """The model behind what a user calls a client: a `Model` as it is, anything else as an endpoint's client."""
    # The class is asked, not the object: a mock has every attribute.
    kind: type[Any] = client.__class__
    model: Model = client if callable(getattr(kind, "respond", None)) else OpenAIModel(client)
    return model
