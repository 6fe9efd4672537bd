"""`Access`: who may talk to an application, and by which name."""

from __future__ import annotations

import hashlib
import hmac
from collections.abc import Collection
from typing import TYPE_CHECKING
from urllib.parse import parse_qs, urlsplit

from starlette.datastructures import Headers
from starlette.requests import cookie_parser
from starlette.responses import RedirectResponse, Response

from fractal.serving._openai.answering import fault_response
from fractal.serving._openai.faults import Fault
from fractal.serving.problems import Problem
from fractal.serving.route import problem_response

if TYPE_CHECKING:
    from starlette.types import ASGIApp, Receive, Scope, Send

__all__ = ["Access"]

_COOKIE = "fractal_access"
_MONTH = 30 * 24 * 3600


class Access:
    """An ASGI middleware that lets through who knows a token, and requests to names that are ours.

    Programs send the token as `Authorization: Bearer …`. A browser is given a cookie for it where it opens the page
    with `?token=…`. Where there is no token, the names of the host are what keeps other web pages out that somebody
    has open: a name of theirs may lead to this machine, and then they would count as the same site.

    Args:
        app: The application.
        token: What is to be known; None: nothing.
        hosts: Names in the `Host` header that are ours; None: any.
    """

    def __init__(self, app: ASGIApp, *, token: str | None = None, hosts: Collection[str] | None = None) -> None:
        self._app, self._token = app, token
        self._hosts = None if hosts is None else {each.lower() for each in hosts}
        self._cookie = "" if token is None else hashlib.sha256(f"fractal cookie {token}".encode()).hexdigest()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass a request on, or refuse it."""
        refusal = self._refusal(scope) if scope["type"] in ("http", "websocket") else None
        await (self._app if refusal is None else refusal)(scope, receive, send)

    def _refusal(self, scope: Scope) -> Response | None:
        headers = Headers(scope=scope)
        if self._hosts is not None and _name_of(headers.get("host", "")) not in self._hosts:
            return problem_response(Problem(421, "unknown_host", "this server does not answer to that name"))
        if self._token is None:
            return None
        if self._is_given(scope):  # also to who has been here before: it must not stay in the address
            return self._with_cookie(scope)
        if self._knows(headers):
            return None
        said = "send the token: Authorization: Bearer …, or open the page with ?token=…"
        if "/v1/" in scope["path"]:
            return fault_response(Fault(401, said, "invalid_request_error", "invalid_api_key"))
        return problem_response(Problem(401, "token", said))

    def _knows(self, headers: Headers) -> bool:
        kind, _, given = headers.get("authorization", "").partition(" ")
        if kind.lower() == "bearer" and _is_same(given.strip(), self._token or ""):
            return True
        # Read as browsers write them: cookies of other programs on this machine come along, and may hold anything.
        return _is_same(cookie_parser(headers.get("cookie", "")).get(_COOKIE, ""), self._cookie)

    def _is_given(self, scope: Scope) -> bool:
        query = parse_qs(scope["query_string"].decode("latin-1"))
        given = query.get("token", [""])[0]
        return scope["type"] == "http" and scope["method"] == "GET" and _is_same(given, self._token or "")

    def _with_cookie(self, scope: Scope) -> Response:
        """A redirection to the page without the token in its address, where it would be seen and kept."""
        response = RedirectResponse("./" + scope["path"].rpartition("/")[2], 303, {"cache-control": "no-store"})
        is_safe = scope.get("scheme") == "https"
        response.set_cookie(_COOKIE, self._cookie, _MONTH, httponly=True, samesite="lax", secure=is_safe)
        return response


def _is_same(given: str, known: str) -> bool:
    return hmac.compare_digest(given.encode("utf-8", "replace"), known.encode("utf-8", "replace"))


def _name_of(host: str) -> str:
    try:
        return (urlsplit(f"//{host}").hostname or "").lower()
    except ValueError:
        return ""
