"""Where our own requests go, and who signs them: what users pass, and what the environment says, as text."""

from __future__ import annotations

import base64
import functools
import inspect
import re
from collections.abc import Callable
from typing import Any, NoReturn, Protocol, TypeAlias, cast
from urllib.parse import SplitResult, unquote, urlsplit

from fractal._concurrency.gates import client_threads
from fractal._concurrency.threads import ThreadCall
from fractal._texts import plain_str
from fractal.errors import ConnectionFailed, InvalidArguments, MissingCredentials
from fractal.models._http.pool import Address
from fractal.models._secrets import Secrets, without_secrets

__all__ = [
    "DEFAULT_BASE_URL",
    "JSON",
    "ApiKey",
    "BaseUrl",
    "Key",
    "address_of",
    "ask_for_key",
    "plain_key",
    "plain_url",
    "server_of",
]

DEFAULT_BASE_URL = "https://api.openai.com/v1"
JSON = {"Content-Type": "application/json"}
"""What every request says of itself."""


class SecretText(Protocol):
    """A key that hides its text: pydantic's `SecretStr`, or another library's."""

    def get_secret_value(self) -> str | bytes:
        """The key."""
        ...


class Url(Protocol):
    """A URL of some library, whose text is the URL."""

    @property
    def scheme(self) -> str:
        """The scheme, such as `https`."""
        ...


ApiKey: TypeAlias = str | bytes | SecretText | Callable[[], Any] | None
"""What is taken as `api_key`."""

BaseUrl: TypeAlias = str | bytes | SecretText | Url | None
"""What is taken as `base_url`."""
Key: TypeAlias = str | Callable[[], Any] | None
"""A key, or a function that makes one for each request."""


def plain_key(value: object) -> Key:
    """The text of a key given as `api_key`.

    Args:
        value: Text, bytes, a `SecretStr` of pydantic's, or a function, plain or async, that returns one of these. None:
            nothing was given.

    Raises:
        InvalidArguments: It is something else.
    """
    text = _text(value)
    if text is not None or value is None:
        return text
    if callable(value) and not isinstance(value, type):
        return cast("Callable[[], Any]", value)
    # The value itself may be what nobody is to see.
    raise InvalidArguments(
        f"api_key is a {type(value).__name__}: give text, bytes, a SecretStr, or a function that returns one of them"
    )


def plain_url(value: object) -> str | None:
    """The text of a URL given as `base_url`.

    Args:
        value: Text, bytes, or a URL of some library. None: nothing was given.

    Raises:
        InvalidArguments: It is something else, or empty.
    """
    kind: Any = type(value)
    text = _text(value)
    if text is None and callable(getattr(kind, "geturl", None)):
        text = cast("Any", value).geturl()
    elif text is None and hasattr(kind, "scheme"):
        text = str(value)
    if text is None and value is not None:
        raise InvalidArguments(
            f"base_url is a {kind.__name__}: give text, such as 'http://127.0.0.1:8000/v1', or a URL"
        )
    if text is not None and not text.strip():  # the conversation would go to somebody else
        raise InvalidArguments("base_url is empty: give a URL, or None for OPENAI_BASE_URL or OpenAI's own")
    return text.strip() if text is not None else None


async def ask_for_key(function: Callable[[], Any]) -> Any:
    """The key that a user's function makes; a plain function is called in a worker thread."""
    if inspect.iscoroutinefunction(function):
        return await function()
    # In a list: a thread must not hand over a bare coroutine on trio.
    [made] = await ThreadCall(lambda: [function()], "the provider of a key", threads=client_threads, abandon=True).run()
    return await made if inspect.isawaitable(made) else made


def address_of(
    base_url: str, key: object, organization: str | None, project: str | None, *, is_key_given: bool
) -> Address:
    """The address of a request, with its headers.

    Args:
        base_url: The endpoint.
        key: The key, as text, bytes or a `SecretStr`; None or nothing: there is none.
        organization: Sent as a header, or None.
        project: Sent as a header, or None.
        is_key_given: Whether the key was given by whoever made the model, and does not come from the environment.

    Raises:
        MissingCredentials: There is no key that could be sent.
        ConnectionFailed: No request can go to this URL.
    """
    base_url, text = base_url.strip(), (_text(key) or "").strip()
    if key is not None and _text(key) is None:
        raise MissingCredentials(f"the function given as api_key returned a {type(key).__name__}, not text")
    if not text and base_url == DEFAULT_BASE_URL:
        raise MissingCredentials(
            "there is no API key: set OPENAI_API_KEY (and OPENAI_BASE_URL for another endpoint), or pass client="
        )
    if not (text.isascii() and text.isprintable()):
        raise MissingCredentials("the API key has characters that no HTTP header can carry: look for quotes or breaks")
    parts = _usable(base_url)
    user, at, host = parts.netloc.rpartition("@")
    if at and text and is_key_given:
        _refuse(base_url, "it has a user and password, and there is api_key= too: one request cannot be signed by both")
    signed = _basic(user) if at else f"Bearer {text}" if text else None
    named = {"Authorization": signed, "OpenAI-Organization": organization, "OpenAI-Project": project}
    headers = JSON | {name: value.strip() for name, value in named.items() if value}
    url = parts._replace(netloc=host, path=parts.path.rstrip("/") + "/chat/completions").geturl()
    return Address(url, headers, Secrets(text))


@functools.lru_cache(maxsize=64)
def server_of(base_url: str) -> tuple[str, int] | None:
    """Host and port of a URL, and nothing else that it may say; None if it is none of HTTP."""
    try:
        parts = urlsplit(base_url.strip())
        port = parts.port or {"http": 80, "https": 443}.get(parts.scheme)
        return (parts.hostname, port) if parts.hostname and port else None
    except ValueError:
        return None


def _usable(base_url: str) -> SplitResult:
    if not re.match(r"https?://", base_url, re.IGNORECASE):
        hint = "" if "://" in base_url else f", as in {without_secrets(f'http://{base_url}')!r}"
        _refuse(base_url, f"put http:// or https:// before it{hint}")
    try:
        parts = urlsplit(base_url)
        if not parts.hostname or parts.port == 0:
            _refuse(base_url, "it names no host, or a port that nobody can have")
    except ValueError:
        _refuse(base_url, "it names no host, or a port that nobody can have")
    if parts.fragment:
        _refuse(base_url, "what comes after # is never sent")
    return parts


def _refuse(base_url: str, why: str) -> NoReturn:
    fault = ConnectionFailed(f"the base URL cannot be used: {without_secrets(base_url)!r}: {why}")
    fault.retryable = False
    raise fault from None


def _basic(user: str) -> str:
    name, _, password = user.partition(":")
    return "Basic " + base64.b64encode(f"{unquote(name)}:{unquote(password)}".encode()).decode()


def _text(value: object) -> str | None:
    """The text of a value that is text in some form, else None."""
    kind: Any = type(value)
    if callable(getattr(kind, "get_secret_value", None)):  # SecretStr, SecretBytes
        value = cast("Any", value).get_secret_value()
    if isinstance(value, str):
        return plain_str(value)
    return value.decode("utf-8", "replace") if isinstance(value, (bytes, bytearray)) else None
