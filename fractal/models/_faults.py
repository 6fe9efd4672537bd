"""Every way an endpoint can fail, as one of our errors: told by class and status, never by words in a text."""

from __future__ import annotations

import json
import sys
from typing import TYPE_CHECKING, Any

from fractal._json import is_mapping
from fractal.errors import (
    BadReply,
    ConnectionFailed,
    ModelError,
    RequestTimedOut,
)
from fractal.models._reported import status_error
from fractal.models._secrets import NO_SECRETS, Secrets

if TYPE_CHECKING:
    from types import TracebackType

__all__ = ["translated"]

_UNWRITABLE = "the request cannot be written as HTTP: the key, or a header, has characters that no header can carry"


class translated:
    """A block that turns what clients and HTTP libraries raise into a `ModelError` without secrets; leaves the rest.

    Args:
        secrets: What no error may repeat.
    """

    __slots__ = ("_secrets",)

    def __init__(self, secrets: Secrets = NO_SECRETS) -> None:
        self._secrets = secrets

    def __enter__(self) -> None:
        pass

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if isinstance(error, ModelError):
            error.args = _clean(error.args, self._secrets)
        elif isinstance(error, Exception):
            mapped = _translate(error, self._secrets)
            if mapped is not None:
                mapped.args = _clean(mapped.args, self._secrets)
                raise mapped from error


def _translate(error: Exception, secrets: Secrets = NO_SECRETS) -> ModelError | None:
    openai: Any = sys.modules.get("openai")
    if openai is not None and isinstance(error, openai.OpenAIError):
        return _translate_sdk(error, openai, secrets)
    for name in ("httpx2", "httpx"):
        http: Any = sys.modules.get(name)
        if http is not None and isinstance(error, (http.HTTPError, http.InvalidURL)):
            return _translate_http(error, http)
    if isinstance(error, UnicodeEncodeError):
        return ModelError(_UNWRITABLE)
    if isinstance(error, TimeoutError):
        return RequestTimedOut(str(error) or "the request timed out")
    if isinstance(error, json.JSONDecodeError):
        return BadReply(f"the endpoint's answer is not JSON: {error}")
    if isinstance(error, ConnectionError):
        return ConnectionFailed(f"no connection to the endpoint: {error}")
    return None


def _translate_sdk(error: Any, openai: Any, secrets: Secrets) -> ModelError:
    if isinstance(error, openai.APIStatusError):
        body = {"error": error.body} if is_mapping(error.body) else error.body  # the client takes it out of there
        return status_error(error.status_code, error.response.headers, body, secrets)
    if isinstance(error, openai.APIConnectionError):
        cause = error.__cause__
        if isinstance(cause, Exception) and not isinstance(cause, openai.OpenAIError):
            mapped = _translate(cause)
            if mapped is not None:
                return mapped
        kind = RequestTimedOut if isinstance(error, openai.APITimeoutError) else ConnectionFailed
        return kind(str(error))
    if isinstance(error, openai.APIResponseValidationError):
        return BadReply(str(error))
    return ModelError(str(error), code=getattr(error, "code", None))


def _translate_http(error: Any, http: Any) -> ModelError:
    text = str(error) or type(error).__name__
    try:
        where = f"{error.request.url.scheme}://{error.request.url.netloc.decode()}"
    except (AttributeError, RuntimeError):
        where = "the endpoint"
    if isinstance(error, http.ConnectTimeout):
        return ConnectionFailed(f"no connection to {where} in time: {text}")
    if isinstance(error, http.TimeoutException):
        return RequestTimedOut(f"{where} did not answer in time: {text}")
    if isinstance(error, http.LocalProtocolError):
        return ModelError(_UNWRITABLE)  # its own text repeats the header
    if isinstance(error, (http.InvalidURL, http.UnsupportedProtocol)):
        fault = ConnectionFailed(f"the base URL cannot be used: {text}")
        fault.retryable = False
        return fault
    what = "no connection to" if isinstance(error, http.ConnectError) else "no whole answer from"
    return ConnectionFailed(f"{what} {where}: {text}")


def _clean(texts: tuple[Any, ...], secrets: Secrets) -> tuple[str, ...]:
    return tuple(map(secrets.quoted, texts))
