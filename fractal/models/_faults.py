"""Every way an endpoint can fail, as one of our errors: told by class and status, never by words in a text."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Mapping
from contextlib import suppress
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

from fractal._json import decode, is_list, is_mapping
from fractal.errors import (
    AuthenticationFailed,
    BadReply,
    ConnectionFailed,
    ModelError,
    RateLimited,
    RequestTimedOut,
    RunError,
    ServerError,
    StatusError,
)
from fractal.models._masking import is_clean, mask, secrets_with
from fractal.models._secrets import NO_SECRETS, Secrets
from fractal.models.base import Reply

if TYPE_CHECKING:
    from types import TracebackType

    from fractal.models.bounds import ReplyBounds

__all__ = ["completion_from", "reply_from", "status_error", "translated"]

_UNWRITABLE = "the request cannot be written as HTTP: the key, or a header, has characters that no header can carry"

_TAGS = re.compile(r"<[^>]*>|\s+")


class translated:
    """A block that turns what clients and HTTP libraries raise into a `ModelError` without secrets; leaves the rest.

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
            fault = ModelError(f"{type(error).__name__}: {error}")
        mask(fault, secrets, _cause_of(fault, error))
        if self._secrets is None and is_clean(error, secrets):
            raise fault from error
        try:
            raise fault
        finally:
            fault.__context__ = None  # Python has set it to what must not be seen


def _cause_of(fault: RunError, error: Exception) -> BaseException | None:
    """What an error of ours came from, as far as it says more than the error itself."""
    if isinstance(fault, StatusError) or fault.args == (_UNWRITABLE,):
        return None
    openai: Any = sys.modules.get("openai")
    is_of_sdk = openai is not None and isinstance(error, openai.OpenAIError)
    cause = error.__cause__ if is_of_sdk else error  # the SDK's own has the request and the response
    return cause if cause is not fault else None


def reply_from(
    status: int, headers: Mapping[str, str], body: bytes, bounds: ReplyBounds, secrets: Secrets = NO_SECRETS
) -> Reply:
    """The reply in an HTTP answer.

    Raises:
        StatusError: The status says that it failed.
        BadReply: It is no chat completion.
    """
    return Reply.from_completion(completion_from(status, headers, body, secrets), bounds)


def completion_from(status: int, headers: Mapping[str, str], body: bytes, secrets: Secrets = NO_SECRETS) -> Any:
    """The JSON of an HTTP answer.

    Raises:
        StatusError: The status says that it failed.
        BadReply: It is not JSON.
    """
    if status >= 400:
        raise status_error(status, headers, body, secrets)
    try:
        return decode(body)
    except ValueError as error:
        is_page = "html" in headers.get("content-type", "")
        hint = ": is the base URL right?" if is_page else ""
        fault = BadReply(f"the endpoint answered {_shortened(body, secrets)!r}, which is not JSON{hint}", status=status)
        fault.retryable = not is_page  # a web page will still be one next time
        raise fault from error


def status_error(status: int, headers: Mapping[str, str], body: object, secrets: Secrets = NO_SECRETS) -> StatusError:
    """An HTTP error, with what the endpoint says of it.

    Args:
        status: HTTP status, 400 or above.
        headers: Headers of the answer; names in lower case, or a mapping that does not care.
        body: The answer: bytes, or the JSON value if somebody has read it already.
        secrets: What no text may repeat.
    """
    details = _error_object(body)
    said = details.get("message")
    text = secrets.quoted(said) if isinstance(said, str) and said else _shortened(body, secrets)
    error = _class_for(status)(
        f"HTTP {status}: {text}" if text else f"HTTP {status} without a word",
        status=status,
        code=_text(details.get("code")) or _text(details.get("type")),
        param=_text(details.get("param")),
        request_id=headers.get("x-request-id"),
        retry_after=_retry_after(headers),
    )
    match headers.get("x-should-retry"):
        case "true":
            error.retryable = True
        case "false":
            error.retryable = False
        case _:
            pass
    return error


def _class_for(status: int) -> type[StatusError]:
    if status in (401, 403):
        return AuthenticationFailed
    if status == 429:
        return RateLimited
    if status >= 500 or status in (408, 409):
        return ServerError
    return StatusError


def _translate(error: Exception, secrets: Secrets = NO_SECRETS) -> RunError | None:
    openai: Any = sys.modules.get("openai")
    if openai is not None and isinstance(error, openai.OpenAIError):
        return _translate_sdk(error, openai, secrets)
    for name in ("httpx2", "httpx"):
        http: Any = sys.modules.get(name)
        if http is not None and isinstance(error, (http.HTTPError, http.InvalidURL)):
            return _translate_http(error, http, secrets)
    if isinstance(error, UnicodeEncodeError):
        return ModelError(_UNWRITABLE)
    if isinstance(error, TimeoutError):
        return RequestTimedOut(str(error) or "the request timed out")
    if isinstance(error, json.JSONDecodeError):
        return BadReply(f"the endpoint's answer is not JSON: {error}")
    if isinstance(error, ConnectionError):
        return ConnectionFailed(f"no connection to the endpoint: {error}")
    return None


def _translate_sdk(error: Any, openai: Any, secrets: Secrets) -> RunError:
    if isinstance(error, openai.APIStatusError):
        return status_error(error.status_code, error.response.headers, error.body, secrets)
    if isinstance(error, openai.APIConnectionError):
        cause = error.__cause__
        if isinstance(cause, RunError):  # one of ours that the SDK has wrapped
            return cause
        if isinstance(cause, Exception) and not isinstance(cause, openai.OpenAIError):
            mapped = _translate(cause, secrets)
            if mapped is not None:
                return mapped
        kind = RequestTimedOut if isinstance(error, openai.APITimeoutError) else ConnectionFailed
        return kind(str(error))
    if isinstance(error, openai.APIResponseValidationError):
        return BadReply(str(error))
    return ModelError(str(error), code=_text(getattr(error, "code", None)))


def _translate_http(error: Any, http: Any, secrets: Secrets) -> ModelError:
    if isinstance(error, http.HTTPStatusError):  # a hook of a user's HTTP client has looked at the status
        answer, body = error.response, b""
        with suppress(http.ResponseNotRead):
            body = answer.content
        return status_error(answer.status_code, answer.headers, body, secrets)
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


def _error_object(body: object) -> Mapping[str, Any]:
    """The endpoint's error object, wherever it put it."""
    value = body
    if isinstance(value, (bytes, str)):
        try:
            value = decode(value)
        except ValueError:
            return {}
    if not is_mapping(value):
        return {}
    inner = value.get("error")
    if is_mapping(inner):
        return inner
    if isinstance(inner, str):
        return {"message": inner}
    return _fastapi_error(value.get("detail")) or value


def _fastapi_error(detail: object) -> Mapping[str, Any] | None:
    """FastAPI's ways to say what is wrong: a text, or a list of faults with their places."""
    if isinstance(detail, str):
        return {"message": detail}
    faults = [fault for fault in detail if is_mapping(fault)] if is_list(detail) else []
    if not faults:
        return None
    places = [_place_of(fault) for fault in faults]
    said = [f"{place or 'body'}: {fault.get('msg')}" for place, fault in zip(places, faults, strict=True)]
    return {"message": "; ".join(said), "param": places[0]}


def _place_of(fault: Mapping[str, Any]) -> str:
    steps = fault.get("loc")
    return ".".join(str(step) for step in steps if step != "body") if is_list(steps) else ""


def _retry_after(headers: Mapping[str, str]) -> float | None:
    milliseconds = _number(headers.get("retry-after-ms"))
    if milliseconds is not None:
        return milliseconds / 1000
    value = headers.get("retry-after")
    seconds = _number(value)
    if seconds is not None or value is None:
        return seconds
    from email.utils import parsedate_to_datetime  # loads much, and dates are rare

    try:
        moment = parsedate_to_datetime(value)
    except (ValueError, OverflowError):
        return None
    if moment.tzinfo is None:
        moment = moment.replace(tzinfo=UTC)
    try:
        return max((moment - datetime.now(UTC)).total_seconds(), 0.0)
    except OverflowError:
        return None


def _number(value: str | None) -> float | None:
    try:
        number = float(value) if value is not None else None
    except ValueError:
        return None
    return number if number is not None and 0 <= number < float("inf") else None


def _text(value: object) -> str | None:
    return str(value) if isinstance(value, (str, int)) and value != "" else None


def _shortened(body: object, secrets: Secrets) -> str:
    text = body.decode(errors="replace") if isinstance(body, bytes) else "" if body is None else str(body)
    return secrets.quoted(" ".join(_TAGS.sub(" ", text[:20_000]).split()))[:300]
