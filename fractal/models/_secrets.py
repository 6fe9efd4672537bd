"""The secrets of a request, and texts without them."""

from __future__ import annotations

import base64
import json
import re
from collections.abc import Iterable, Iterator
from html import escape
from typing import Any, Protocol
from urllib.parse import quote, quote_plus, unquote

from fractal._texts import str_of

__all__ = ["NO_SECRETS", "Secrets", "identity_of", "without_secrets"]

_SHORTEST = 4  # characters; what is shorter would be found in ordinary words
_SHORTEST_NAMED = 6  # characters of a header that only by its name may be a secret
_SHORTEST_UNNAMED = 8  # characters, where nothing says that it is a secret
_LONGEST_TEXT = 1000  # characters that are quoted of what an endpoint says

_TELLS_NOTHING = frozenset(
    b"accept accept-charset accept-encoding accept-language baggage cache-control connection content-encoding"
    b" content-length content-type date expect host http-referer idempotency-key origin pragma referer te traceparent"
    b" tracestate trailer transfer-encoding upgrade user-agent via x-request-id x-title".split()
)
"""Headers that say nothing of who asks; neither do those that begin with the next."""
_OF_THE_SDK = b"x-stainless-"
_TELLS_NO_SECRET = frozenset((b"openai-organization", b"openai-project", b"openai-beta"))
_NAMES_OF_SECRETS = re.compile(r"auth|key|token|secret|passw|pwd|sig|cred|session|cookie|code", re.IGNORECASE)
_SEPARATORS = re.compile(r"[\s,;=\"']+")
_ESCAPE = re.compile("%[0-9A-F]{2}")
_USER_OF_A_URL = re.compile(r"^([^/]*//)?.*@", re.DOTALL)


class SignedRequest(Protocol):
    """An HTTP request as httpx2 and httpx have it."""

    @property
    def url(self) -> Any:
        """The URL."""
        ...

    @property
    def headers(self) -> Any:
        """The headers, with `raw` names and values."""
        ...


class Secrets:
    """Keys, tokens and passwords that no error, event or log line may repeat.

    Args:
        *values: The secrets; those of fewer than four characters are left out, since they are found in ordinary words.
    """

    __slots__ = ("_forms", "_requests", "_values")

    def __init__(self, *values: str | None) -> None:
        self._values = {value for value in values if value}
        self._requests: list[SignedRequest] = []
        self._forms: list[str] | None = None

    def add(self, *values: str | None) -> None:
        """Add further secrets."""
        self._values.update(value for value in values if value)
        self._forms = None

    def add_signed(self, request: SignedRequest) -> None:
        """Add the secrets that sign a request: in its headers, in its query, before its host."""
        self._requests.append(request)  # most requests go well, and nobody has to look for secrets in them
        self._forms = None

    def plus(self, request: SignedRequest) -> Secrets:
        """A copy of these secrets, with those that sign a request."""
        both = Secrets(*self._values)
        both._requests = [*self._requests, request]
        return both

    def are_in(self, text: str) -> bool:
        """Whether a text contains one of the secrets."""
        return any(form in text for form in self._all_forms())

    def removed_from(self, text: str) -> str:
        """The text with `[key]` in place of each secret."""
        for form in self._all_forms():
            text = text.replace(form, "[key]")
        return text

    def beginning(self, text: str, longest: int) -> str:
        """The beginning of a text without the secrets, also of one that was cut within a secret before."""
        text = self.removed_from(text[:longest])
        for form in self._all_forms():
            for length in range(min(len(form) - 1, len(text)), _SHORTEST - 1, -1):
                if text.endswith(form[:length]):
                    return text[:-length] + "[key]"
        return text

    def quoted(self, text: object, longest: int = _LONGEST_TEXT) -> str:
        """The text of a value without the secrets, and only then cut, so that no half of a secret stays."""
        clean = self.removed_from(str_of(text))
        return clean if len(clean) <= longest else clean[:longest] + "…"

    def _all_forms(self) -> list[str]:
        if self._forms is None:
            found = self._values.union(*map(_secrets_of, self._requests))
            forms = {form for value in found for form in _forms_of(value) if len(form) >= _SHORTEST}
            # The longest first: one secret may be a part of another.
            self._forms = sorted(forms, key=len, reverse=True)
        return self._forms


NO_SECRETS = Secrets()
"""Those of a request that was not signed, as far as is known."""


def identity_of(request: SignedRequest) -> tuple[object, ...]:
    """The identity of a request's sender: all headers but those that every sender sends alike, and the query."""
    return (*_telling(request), request.url.query)


def without_secrets(url: object) -> str:
    """A URL, or what was meant as one, without user, password, query and fragment."""
    text = _USER_OF_A_URL.sub(lambda found: found[1] or "", str(url))
    return re.split(r"[?#]", text, maxsplit=1)[0]


def _telling(request: SignedRequest) -> list[tuple[bytes, bytes]]:
    """The headers that may identify the sender, by names in lower case."""
    return [
        (lower, value)
        for name, value in request.headers.raw
        if (lower := name.lower()) not in _TELLS_NOTHING and not lower.startswith(_OF_THE_SDK)
    ]


def _secrets_of(request: SignedRequest) -> Iterator[str]:
    for name, value in _telling(request):
        if name not in _TELLS_NO_SECRET:
            yield from _secrets_in_header(name.decode("latin-1"), value.decode("latin-1"))
    yield from _secrets_in_url(request.url)


def _secrets_in_header(name: str, value: str) -> Iterator[str]:
    scheme, _, token = value.partition(" ")
    if scheme.lower() == "basic":
        yield token
        user, _, password = _decoded(token).partition(":")
        yield password or user
    elif _NAMES_OF_SECRETS.search(name):
        yield from (each for each in (value, token) if len(each) >= _SHORTEST_NAMED)
    yield from (part for part in (value, *_SEPARATORS.split(value)) if len(part) >= _SHORTEST_UNNAMED)


def _secrets_in_url(url: Any) -> Iterator[str]:
    userinfo = _text(url.userinfo)
    if userinfo:
        user, _, password = userinfo.partition(":")
        yield from (password or user, unquote(password or user))
    for pair in _text(url.query).split("&"):
        name, _, value = pair.partition("=")
        if _NAMES_OF_SECRETS.search(name) or (len(value) >= 2 * _SHORTEST_UNNAMED and name != "api-version"):
            yield from (value, unquote(value.replace("+", " ")))


def _forms_of(value: str) -> Iterable[str]:
    """The forms in which a secret may be written: as it is, in JSON, in a URL, in a page, in Python."""
    value = value.strip()
    data = value.encode("utf-8", "surrogatepass")
    escaped = json.dumps(value)[1:-1]
    in_url = (quote(data, safe=""), quote(data), quote_plus(data))
    return {
        value,
        escaped,
        escaped.replace("/", "\\/"),
        *in_url,
        *(_ESCAPE.sub(lambda found: found[0].lower(), each) for each in in_url),
        escape(value),
        repr(value)[1:-1],
    }


def _decoded(token: str) -> str:
    try:
        return base64.b64decode(token).decode()
    except ValueError:
        return ""


def _text(value: bytes | str) -> str:
    return value.decode("latin-1") if isinstance(value, bytes) else value
