"""For endpoints of FastAPI and Starlette: runs that end when the client has gone.

A web server tells an endpoint that its client has gone only if the endpoint asks. One that awaits `agent.run` does not,
so that run goes on, and is paid for, to its end.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager, suppress

import anyio

from fractal._concurrency.scopes import single_error

try:
    from starlette.exceptions import HTTPException
    from starlette.requests import ClientDisconnect, Request
except ImportError as missing:  # pragma: no cover - installed wherever the tests run
    raise ImportError("fractal.fastapi needs Starlette, which FastAPI brings: pip install fastapi") from missing

__all__ = ["CLIENT_HAS_GONE", "ends_with_client"]

CLIENT_HAS_GONE = 499
"""HTTP status of requests whose client did not wait for the answer, as nginx writes it; nobody reads it but the log."""


@asynccontextmanager
async def ends_with_client(request: Request) -> AsyncGenerator[None]:
    """Cancel what the block runs as soon as the client closes its connection.

    The request's body is read first, and kept: `await request.json()` works in the block. An upload that is read piece
    by piece has to be read before the block.

    Args:
        request: The request, an argument of the endpoint.

    Raises:
        HTTPException: The client has gone, with status 499; after everything in the block has ended.

    Example:
        ```python
        @app.get("/weather/{city}")
        async def weather(city: str, request: Request) -> str:
            async with ends_with_client(request):
                result = await agent.run(f"How is the weather in {city}?", timeout=30)
                return result.raise_for_error().content
        ```
    """
    has_gone = False

    async def watch() -> None:
        nonlocal has_gone
        while (await request.receive())["type"] != "http.disconnect":
            pass
        has_gone = True
        group.cancel_scope.cancel()

    try:
        with suppress(RuntimeError):  # the endpoint has read it already, piece by piece
            await request.body()
        with single_error():
            async with anyio.create_task_group() as group:
                group.start_soon(watch)
                yield
                group.cancel_scope.cancel()
    except ClientDisconnect:
        has_gone = True
    if has_gone:
        raise HTTPException(CLIENT_HAS_GONE, "the client has gone")
