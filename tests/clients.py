"""Models of each kind of client that sends over HTTP."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Any

import httpx2
import openai

from fractal import OpenAIModel, ReplyBounds

OWN, ASYNC, BLOCKING = "own HTTP", "AsyncOpenAI", "OpenAI"
BOUND, THREADED = "AsyncOpenAI with http_client", "OpenAI with http_client"
KINDS = (OWN, ASYNC, BLOCKING, BOUND, THREADED)


class Models:
    """Makes models of one kind, and closes what they were made with.

    Args:
        kind: One of `KINDS`.
    """

    def __init__(self, kind: str) -> None:
        self.kind = kind
        self._closes: list[Callable[[], Awaitable[None] | None]] = []

    def __call__(
        self, url: str, key: Any = "sk-test", bounds: ReplyBounds | None = None, **options: Any
    ) -> OpenAIModel:
        """A model.

        Args:
            url: The endpoint.
            key: Its key.
            bounds: The most that is read of one answer.
            **options: For the client of the SDK.
        """
        if self.kind == OWN:
            assert not options, "own HTTP has none of them"
            return OpenAIModel(base_url=url, api_key=key, bounds=bounds)
        return OpenAIModel(self.client(base_url=url, api_key=key, **options), bounds=bounds)

    def client(self, **options: Any) -> Any:
        """A client of the SDK."""
        if self.kind in (ASYNC, BOUND):
            if self.kind == BOUND:
                options["http_client"] = http = httpx2.AsyncClient()
                self._closes.append(http.aclose)
            return openai.AsyncOpenAI(**options)
        if self.kind == THREADED:
            options["http_client"] = httpx2.Client()
        client = openai.OpenAI(**options)
        self._closes.append(client.close)
        return client

    async def aclose(self) -> None:
        """Close them."""
        for close in self._closes:
            closing = close()
            if closing is not None:
                await closing
