"""Our own way to an endpoint, which needs no SDK."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

from fractal.errors import ConnectionFailed, MissingCredentials
from fractal.models._answer_reader import read_answer, read_body
from fractal.models._faults import translated
from fractal.models._pool import Address, pool_of_this_loop
from fractal.models._secrets import Secrets

if TYPE_CHECKING:
    from fractal.models.base import ModelRequest, Reply, Sink
    from fractal.models.bounds import ReplyBounds

__all__ = ["JSON", "HttpWire"]

DEFAULT_BASE_URL = "https://api.openai.com/v1"
JSON = {"Content-Type": "application/json"}
"""What every request says of itself."""


class HttpWire:
    """Our own: one POST on a connection of the loop's pool.

    Args:
        base_url: The endpoint. None: `OPENAI_BASE_URL`, or OpenAI's own.
        api_key: The key. None: `OPENAI_API_KEY`.
        bounds: The most that is read of one answer.
        max_connections: Connections of its own in each event loop. None: those that all share.
    """

    def __init__(
        self, base_url: str | None, api_key: str | None, bounds: ReplyBounds, max_connections: int | None = None
    ) -> None:
        self._base_url, self._api_key, self._max_connections = base_url, api_key, max_connections
        self._bounds = bounds
        self._known: tuple[_Facts, Address] | None = None

    async def respond(self, request: ModelRequest) -> Reply:
        """Send it as it is encoded, read what comes back."""
        address = self._address()
        with translated(address.secrets):
            pool = await pool_of_this_loop(self, self._max_connections)
            async with pool.place(request), pool.post(address, request.body()) as answer:
                body = await answer.aread()
            return await read_body(answer.status_code, answer.headers, body, self._bounds, address.secrets)

    async def stream(self, request: ModelRequest, sink: Sink) -> Reply:
        """Send it, read the reply as it comes."""
        address = self._address()
        with translated(address.secrets):
            pool = await pool_of_this_loop(self, self._max_connections)
            async with pool.place(request), pool.post(address, request.body()) as answer:
                return await read_answer(answer, sink, self._bounds, address.secrets)

    def _address(self) -> Address:
        """Where to send; the environment is read here and nowhere else, at each request."""
        facts: _Facts = (
            self._base_url or os.environ.get("OPENAI_BASE_URL") or DEFAULT_BASE_URL,
            (self._api_key or os.environ.get("OPENAI_API_KEY") or "").strip(),
            os.environ.get("OPENAI_ORG_ID"),
            os.environ.get("OPENAI_PROJECT_ID"),
        )
        if self._known is None or self._known[0] != facts:
            self._known = facts, _checked(*facts)
        return self._known[1]


_Facts = tuple[str, str, str | None, str | None]


def _checked(base_url: str, key: str, organization: str | None, project: str | None) -> Address:
    if not key and base_url == DEFAULT_BASE_URL:
        raise MissingCredentials(
            "there is no API key: set OPENAI_API_KEY (and OPENAI_BASE_URL for another endpoint), or pass client="
        )
    if not (key.isascii() and key.isprintable()):
        raise MissingCredentials("the API key has characters that no HTTP header can carry: look for quotes or breaks")
    _require_url(base_url)
    named = {
        "Authorization": f"Bearer {key}" if key else None,
        "OpenAI-Organization": organization,
        "OpenAI-Project": project,
    }
    headers = JSON | {name: value for name, value in named.items() if value}
    return Address(base_url.rstrip("/") + "/chat/completions", headers, Secrets(key))


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
