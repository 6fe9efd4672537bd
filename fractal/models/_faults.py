"""Every way an endpoint can fail, as one of our errors: told by class and status, never by words in a text."""

from __future__ import annotations

import json
import sys
from contextlib import suppress
from typing import TYPE_CHECKING, Any

from fractal._texts import described, message_of, said_by
from fractal.errors import (
    BadReply,
    ConnectionFailed,
    ModelError,
    RequestTimedOut,
    RunError,
    StatusError,
)
from fractal.models._masking import http_libraries, is_clean, mask, secrets_with
from fractal.models._replies.reported import status_error
from fractal.models._secrets import NO_SECRETS, Secrets

if TYPE_CHECKING:
    from types import TracebackType

__all__ = ["translated"]

_UNWRITABLE = "the request cannot be written as HTTP: the key, or a header, has characters that no header can carry"


class translated:
    """A block that turns exceptions of clients and HTTP libraries into a `ModelError` without secrets.

    Args:
        secrets: What no error may repeat, in no text, attribute or cause. None: nobody can know it, as with a client
            that is only an object; then the cause is what the object raised.
    """

    __slots__ = ("_secrets",)

    def __init__(self, secrets: Secrets | None = None) -> None:
        self._secrets = secrets

    def __enter__(self) -> None:
        pass

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if not isinstance(error, Exception):
            return
        secrets = secrets_with(error, self._secrets or NO_SECRETS)
        if isinstance(error, ModelError):
            mask(error, secrets, error.__cause__)
            return
        fault = _translate(error, secrets)
        if fault is None:
            if is_clean(error, secrets):
                return
            fault = ModelError(described(error))
        mask(fault, secrets, _cause_of(fault, error))
        if self._secrets is None and is_clean(error, secrets):
            raise fault from error
        try:
            raise fault
        finally:
            fault.__context__ = None  # Python has set it to what must not be seen


def _cause_of(fault: RunError, error: Exception) -> BaseException | None:
    """The cause of an error of ours, if it says more than the error itself."""
    if isinstance(fault, StatusError) or fault.args == (_UNWRITABLE,):
        return None
    openai: Any = sys.modules.get("openai")
    is_of_sdk = openai is not None and isinstance(error, openai.OpenAIError)
    cause = error.__cause__ if is_of_sdk else error  # the SDK's own has the request and the response
    return cause if cause is not fault else None


def _translate(error: Exception, secrets: Secrets = NO_SECRETS) -> RunError | None:
    openai: Any = sys.modules.get("openai")
    if openai is not None and isinstance(error, openai.OpenAIError):
        return _translate_sdk(error, openai, secrets)
    for http in http_libraries():
        if isinstance(error, (http.HTTPError, http.InvalidURL)):
            return _translate_http(error, http, secrets)
    if isinstance(error, UnicodeEncodeError):
        return ModelError(_UNWRITABLE)
    if isinstance(error, TimeoutError):
        return RequestTimedOut(message_of(error) or "the request timed out")
    if isinstance(error, json.JSONDecodeError):
        return BadReply(f"the endpoint's answer is not JSON: {said_by(error)}")
    if isinstance(error, ConnectionError):
        return ConnectionFailed(f"no connection to the endpoint: {said_by(error)}")
    return None


def _translate_sdk(error: Any, openai: Any, secrets: Secrets) -> RunError:
    if isinstance(error, openai.APIStatusError):
        return status_error(error.status_code, error.response.headers, _body_of(error), secrets)
    if isinstance(error, openai.APIConnectionError):
        cause = error.__cause__
        if isinstance(cause, RunError):  # one of ours that the SDK has wrapped
            return cause
        if isinstance(cause, Exception) and not isinstance(cause, openai.OpenAIError):
            mapped = _translate(cause, secrets)
            if mapped is not None:
                return mapped
        kind = RequestTimedOut if isinstance(error, openai.APITimeoutError) else ConnectionFailed
        return kind(message_of(error))
    if isinstance(error, openai.APIResponseValidationError):
        return BadReply(message_of(error))
    return ModelError(message_of(error), code=getattr(error, "code", None))


def _body_of(error: Any) -> object:
    """The body of the answer behind an SDK's error, of which `error.body` is only what `error` has in it."""
    try:
        return error.response.content or error.body
    except Exception:  # it has not been read, or the response is a stand-in
        return error.body


def _translate_http(error: Any, http: Any, secrets: Secrets) -> ModelError:
    if isinstance(error, http.HTTPStatusError):  # a hook of a user's HTTP client has looked at the status
        answer, body = error.response, b""
        with suppress(http.ResponseNotRead):
            body = answer.content
        return status_error(answer.status_code, answer.headers, body, secrets)
    text = said_by(error)
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
    fault = ConnectionFailed(f"{what} {where}: {text}")
    fault.retryable = not _is_refused_certificate(error)
    return fault


def _is_refused_certificate(error: BaseException | None) -> bool:
    ssl: Any = sys.modules.get("ssl")
    while error is not None and ssl is not None:
        if isinstance(error, ssl.SSLCertVerificationError):
            return True
        error = error.__cause__ or error.__context__
    return False
