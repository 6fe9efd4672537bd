"""Models behind OpenAI-compatible endpoints."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import Any

from fractal._checks import is_count
from fractal._json import is_same
from fractal._texts import str_of
from fractal.errors import InvalidArguments
from fractal.model import Delta, Model, ModelRequest, Reply, Sink
from fractal.models._dialect import Dialect
from fractal.models._http.address import ApiKey, BaseUrl, server_of
from fractal.models._http.pool import leave_pool
from fractal.models._http.wire import HttpWire
from fractal.models._replies.thinking import ThinkingSink, without_thinking
from fractal.models._wires import wire_for
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
        thinking_tags: What stands before and after a model's thinking where the endpoint leaves it in the text, such as
            `("<think>", "</think>")`: it is shown as reasoning, then, and is no part of the answer. None: text is text.

    Attributes:
        name: Name of the model, or None for the agent's.

    Raises:
        InvalidArguments: `client` is something else, or makes its connections itself and `max_connections` is
            given, or comes with a `base_url` or `api_key`; one of these is of no use; or `model` is no name,
            `max_connections` no number from 1 up, `bounds` no `ReplyBounds`, or `thinking_tags` no two texts.

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
        thinking_tags: tuple[str, str] | None = None,
    ) -> None:
        if model is not None and (not isinstance(model, str) or not model):
            raise InvalidArguments(f"model={model!r}: give the name of a model, or None")
        if max_connections is not None and not is_count(max_connections, 1):
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
        self._client = client
        self.name = model
        self._dialect = Dialect()
        self._endpoint: object = _endpoint_of(client)
        self._tags = _checked_tags(thinking_tags)
        self.needs_no_grace = client is None  # our own HTTP closes a connection without a wait

    @property
    def server(self) -> tuple[str, int] | None:
        """Host and port of the endpoint; None where a client does not say them."""
        url = self._wire.base_url if isinstance(self._wire, HttpWire) else getattr(self._client, "base_url", None)
        return server_of(str_of(url)) if url is not None else None

    async def respond(self, request: ModelRequest) -> Reply:
        """Answer one request.

        Raises:
            ModelError: The endpoint could not be reached, refused, or answered nonsense.
        """
        dialect = self._dialect if self._client is None else self._dialect_here()
        reply = await dialect.ask(self._named(request), self._wire.respond)
        return reply if self._tags is None else without_thinking(reply, self._tags)

    async def stream(self, request: ModelRequest, sink: Sink) -> Reply:
        """Answer one request, handing out each piece as it comes.

        Raises:
            ModelError: As in `respond`; also when the stream breaks off before the answer is whole.
        """
        if self._tags is None:
            return await self._stream(request, sink)
        split = ThinkingSink(sink, self._tags)
        reply = await self._stream(request, split)
        await split.end()
        return without_thinking(reply, self._tags)

    async def _stream(self, request: ModelRequest, sink: Sink) -> Reply:
        request = self._named(request)
        fields = {**request.fields, "stream": True, "stream_options": {"include_usage": True}}
        request = replace(request, fields=fields)
        dialect = self._dialect if self._client is None else self._dialect_here()
        if dialect.is_known(request):
            return await dialect.ask(request, partial(self._wire.stream, sink=sink), _is_final)
        was_shown = False

        async def show(delta: Delta) -> None:
            nonlocal was_shown
            was_shown = True
            await sink(delta)

        return await dialect.ask(request, partial(self._wire.stream, sink=show), lambda: was_shown)

    async def aclose(self) -> None:
        """Close what was opened for the running event loop; further requests open it again."""
        await leave_pool(self._wire)

    def _dialect_here(self) -> Dialect:
        """What is known of the endpoint; nothing yet, if the client has been given another URL."""
        endpoint = _endpoint_of(self._client)
        if endpoint is not self._endpoint and not is_same(endpoint, self._endpoint):
            self._dialect, self._endpoint = Dialect(), endpoint
        return self._dialect

    def _named(self, request: ModelRequest) -> ModelRequest:
        return request if self.name is None else replace(request, model=self.name)


def _endpoint_of(client: Any) -> object:
    try:
        return client.base_url
    except Exception:  # a double has none
        return None


def _checked_tags(tags: Any) -> tuple[str, str] | None:
    if tags is None:
        return None
    match tags:
        case (str() as opening, str() as closing) if opening and closing:
            return opening, closing
        case _:
            raise InvalidArguments(f'thinking_tags={tags!r}: give two texts, such as ("<think>", "</think>"), or None')


def _is_final() -> bool:
    """Whether a failure is final: where all of a request has been taken before, it is no refusal of a part of it."""
    return True


def model_for(client: Any) -> Model:
    """The model behind what a user calls a client: a `Model` as it is, anything else as an endpoint's client."""
    # The class is asked, not the object: a mock has every attribute.
    kind: type[Any] = client.__class__
    model: Model = client if callable(getattr(kind, "respond", None)) else OpenAIModel(client)
    return model
