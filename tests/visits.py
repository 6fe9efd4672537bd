"""Clients of an ASGI application, without a server between: they read while it answers, and can leave."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from contextlib import asynccontextmanager
from typing import Any

import anyio

App = Callable[..., Awaitable[None]]


class Visit:
    """One request.

    Args:
        method: Its method.
        path: Its path, with the query.
        json: Its body, as JSON; None for none.
        body: Its body, as bytes or in pieces.
        headers: More headers.
        spec_version: The version of ASGI's specification that the server claims.
    """

    def __init__(
        self,
        method: str,
        path: str,
        *,
        json: Any = None,
        body: bytes | list[bytes] = b"",
        headers: Mapping[str, str] | None = None,
        spec_version: str = "2.3",
    ) -> None:
        self._method, self._spec_version = method, spec_version
        self._path, _, self._query = path.partition("?")
        self._headers = {"content-type": "application/json", **(headers or {})}
        if json is not None:
            body = _written(json)
        self._pieces = [body] if isinstance(body, bytes) else [*body]
        self._left = anyio.Event()
        self._sent, self._news = list[Any](), anyio.Event()
        self.is_over = False

    async def to(self, app: App) -> Visit:
        """Make the request, and wait for its end."""
        scope = {
            "type": "http",
            "asgi": {"version": "3.0", "spec_version": self._spec_version},
            "http_version": "1.1",
            "method": self._method,
            "path": self._path,
            "raw_path": self._path.encode(),
            "query_string": self._query.encode(),
            "root_path": "",
            "scheme": "http",
            "headers": [(name.lower().encode(), value.encode()) for name, value in self._headers.items()],
        }
        try:
            await app(scope, self._receive, self._send)
        except OSError:  # what servers raise where the client has gone, as of version 2.4, and take back
            assert self._left.is_set()
        finally:
            self.is_over = True
            self._tell()
        return self

    @asynccontextmanager
    async def going_on(self, app: App) -> AsyncIterator[Visit]:
        """Make the request in the background; at the end of the block, wait for its end."""
        async with anyio.create_task_group() as group:
            group.start_soon(self.to, app)
            yield self

    def leave(self) -> None:
        """Close the connection."""
        self._left.set()

    async def _receive(self) -> dict[str, Any]:
        await anyio.lowlevel.checkpoint()
        if self._pieces and not self._left.is_set():
            piece = self._pieces.pop(0)
            return {"type": "http.request", "body": piece, "more_body": bool(self._pieces)}
        await self._left.wait()
        return {"type": "http.disconnect"}

    async def _send(self, message: Any) -> None:
        await anyio.lowlevel.checkpoint()
        if self._left.is_set() and self._spec_version >= "2.4":
            raise OSError
        self._sent.append(message)
        self._tell()

    def _tell(self) -> None:
        news, self._news = self._news, anyio.Event()
        news.set()

    @property
    def has_begun(self) -> bool:
        """Whether the status has gone out."""
        return bool(self._sent)

    @property
    def status(self) -> int:
        return self._sent[0]["status"]

    @property
    def headers(self) -> dict[str, str]:
        return {name.decode(): value.decode() for name, value in self._sent[0]["headers"]}

    @property
    def body(self) -> bytes:
        return b"".join(message["body"] for message in self._sent[1:])

    @property
    def json(self) -> Any:
        return json.loads(self.body)

    async def event(self, kind: str, number: int = 1) -> dict[str, Any]:
        """Wait for an event of a kind, the first or another."""
        while True:
            found = [each for each in self.events if each["event"] == kind]
            if len(found) >= number:
                return found[number - 1]
            assert not self.is_over, self.body
            await self._news.wait()

    async def has_told(self, piece: bytes) -> None:
        """Wait until the body has a piece."""
        while piece not in self.body:
            assert not self.is_over, self.body
            await self._news.wait()

    @property
    def events(self) -> list[dict[str, Any]]:
        """The server-sent events so far."""
        return events_in(self.body)

    @property
    def text(self) -> str:
        """The text that the events give, as a client puts it together."""
        return text_in(self.events)


def _written(value: Any) -> bytes:
    return json.dumps(value).encode()


def events_in(body: bytes) -> list[dict[str, Any]]:
    """The server-sent events of a body that may not be whole, with their data read."""
    events = []
    for block in body.decode().split("\n\n")[:-1]:
        lines = [line.split(": ", 1) for line in block.split("\n") if not line.startswith(":")]
        if lines:
            event = dict(lines)
            events.append({**event, "data": json.loads(event["data"])})
    return events


def text_in(events: list[dict[str, Any]]) -> str:
    """The text of the last reply, as a client puts it together from events."""
    text = ""
    for event in events:
        if event["event"] == "model_requested":
            text = ""
        elif event["event"] == "text_delta":
            text += event["data"]["text"]
        elif event["event"] == "events_skipped":
            text = event["data"]["text"]
    return text


async def get(app: App, path: str, **options: Any) -> Visit:
    return await Visit("GET", path, **options).to(app)


async def until(app: App, path: str, is_so: Callable[[Visit], Any], **options: Any) -> Visit:
    """Get something again and again, until it is as it should be."""
    while True:
        visit = await get(app, path, **options)
        if is_so(visit):
            return visit
        await anyio.sleep(0.005)


async def post(app: App, path: str, json: Any = None, **options: Any) -> Visit:
    return await Visit("POST", path, json=json, **options).to(app)


async def delete(app: App, path: str, **options: Any) -> Visit:
    return await Visit("DELETE", path, **options).to(app)
