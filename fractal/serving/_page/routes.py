"""`page_router`: the routes of the chat page and of the files that it is made of."""

from __future__ import annotations

import html
import json
from collections.abc import Iterable
from functools import cache
from pathlib import Path

from fastapi import APIRouter
from starlette.responses import Response

__all__ = ["page_router"]

_KINDS = {"css": "text/css; charset=utf-8", "js": "text/javascript; charset=utf-8"}
_FILES = ("page.css", "page.js", "text.js", "events.js", "turn.js", "approval.js")

_POLICY = "; ".join(
    (
        "default-src 'none'",
        "script-src 'self'",
        "style-src 'self'",
        "connect-src 'self'",
        "img-src data:",
        "base-uri 'none'",
        "form-action 'none'",
        "frame-ancestors 'none'",
    )
)
HEADERS = {
    "content-security-policy": _POLICY,
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
    "cross-origin-opener-policy": "same-origin",
    "cache-control": "no-cache",
}


def page_router(agents: Iterable[str]) -> APIRouter:
    """Make the routes of the chat page: `GET /` and what it loads.

    Everything it loads comes from this server, and it talks with `agent_router`, which has to be beside it.

    Args:
        agents: Names of the agents that can be chosen, the first of which is at first.
    """
    router = APIRouter(include_in_schema=False)
    page = _page(json.dumps(list(agents)))

    @router.get("/")
    async def show_page() -> Response:
        return Response(page, media_type="text/html; charset=utf-8", headers=HEADERS)

    @router.get("/chat/{name}")
    async def show_file(name: str) -> Response:
        if name not in _FILES:
            return Response(status_code=404)
        return Response(_read(name), media_type=_KINDS[name.rpartition(".")[2]], headers=HEADERS)

    return router


def _page(agents: str) -> str:
    return _read("page.html").replace("@agents@", html.escape(agents))


@cache
def _read(name: str) -> str:
    return Path(__file__).with_name(name).read_text("utf-8")
