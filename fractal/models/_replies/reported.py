"""What endpoints say of a fault, wherever they say it, as one of our errors.

Told apart by status and by codes, never by words in a text.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from datetime import UTC, datetime
from html import unescape
from reprlib import Repr
from typing import Any, NamedTuple

from fractal._checks import is_number
from fractal._json import decode, is_list, is_mapping
from fractal._texts import clean_text
from fractal.errors import (
    AuthenticationFailed,
    ContentFiltered,
    ModelError,
    RateLimited,
    ServerError,
    StatusError,
)
from fractal.models._secrets import NO_SECRETS, Secrets

__all__ = ["briefly", "is_page", "quoted_body", "reported_error", "status_error"]

_LONGEST_BODY = 20_000  # characters of a body that are looked through for a sentence
_LONGEST_QUOTE = 300
_LONGEST_CODE = 200
_DEEPEST = 4  # errors inside each other: gateways wrap what they were told

_TAG = re.compile(r"<[^<>]*>")
_SECONDS = re.compile(r"(\d{1,9}(?:\.\d{1,9})?)s")
_STATUS = re.compile(r"(?:HTTP(?:/[\d.]+)? ?)?([45]\d\d)(?:[ :].*)?")  # "429", "429 Too Many Requests", "HTTP 429"
_NO_LETTERS = re.compile(r"[^a-z]+")

_MESSAGES = ("message", "msg", "error_msg", "error_message", "error_description", "status_msg", "detail", "title")
_STATUSES = ("status", "code", "status_code", "statusCode", "http_code", "httpCode")
_CODES = ("code", "type", "status")

# By their letters alone: the same code is written rate_limit_exceeded, RateLimitExceeded and rate-limit-exceeded.
_STATUS_OF_CODE = {
    "accessdeniedexception": 403,
    "apierror": 500,
    "authenticationerror": 401,
    "badgateway": 502,
    "badrequest": 400,
    "badrequesterror": 400,
    "billingerror": 402,
    "contentfilter": 400,
    "contextlengthexceeded": 400,
    "deadlineexceeded": 504,
    "forbidden": 403,
    "gatewaytimeout": 504,
    "insufficientquota": 429,
    "internal": 500,
    "internalerror": 500,
    "internalservererror": 500,
    "invalidapikey": 401,
    "invalidargument": 400,
    "invalidrequesterror": 400,
    "modelnotfound": 404,
    "notfound": 404,
    "notfounderror": 404,
    "overloadederror": 529,
    "paymentrequired": 402,
    "permissiondenied": 403,
    "permissionerror": 403,
    "ratelimiterror": 429,
    "ratelimitexceeded": 429,
    "requesttoolarge": 413,
    "resourceexhausted": 429,
    "servererror": 500,
    "serviceunavailable": 503,
    "throttling": 429,
    "throttlingexception": 429,
    "timeouterror": 504,
    "toomanyrequests": 429,
    "unauthenticated": 401,
    "unauthorized": 401,
    "unavailable": 503,
    "validationexception": 400,
}
# Headers as they come, and as LiteLLM names those of the endpoint behind it.
_PREFIXES = ("", "llm_provider-")
_IDS = ("x-request-id", "request-id", "apim-request-id", "x-litellm-call-id")
_FILTERS = ("content_filter", "content_policy_violation", "responsibleaipolicyviolation")


class _Brief(Repr):
    """The `repr` of a JSON value, cut in many places, each time after secrets were removed: no half of one stays."""

    def __init__(self, secrets: Secrets) -> None:
        super().__init__()
        self._secrets = secrets
        self.maxlevel, self.maxdict, self.maxlist = 4, 8, 8
        self.maxstring, self.maxother = _LONGEST_QUOTE, 100

    def repr_str(self, x: str, level: int) -> str:
        """The `repr` of a text."""
        return super().repr_str(self._secrets.removed_from(x), level)


def briefly(value: object, secrets: Secrets) -> str:
    """The beginning of a JSON value as text without secrets; the whole of a large one is never written out."""
    return secrets.beginning(value, _LONGEST_BODY) if isinstance(value, str) else _Brief(secrets).repr(value)


class _Said(NamedTuple):
    """The facts of an error object, under whatever names it has them."""

    message: str | None = None
    status: int | None = None
    code: str | None = None
    param: str | None = None
    retry_after: float | None = None
    is_filter: bool = False


def status_error(status: int, headers: Mapping[str, str], body: object, secrets: Secrets = NO_SECRETS) -> StatusError:
    """The error for an HTTP status, with the endpoint's own facts and text.

    Args:
        status: HTTP status, 400 or above.
        headers: Headers of the answer; names in lower case, or a mapping that does not care.
        body: The answer: bytes, or the JSON value if somebody has read it already.
        secrets: What no text may repeat.
    """
    value = _value_of(body)
    said = _said(value)
    text = secrets.quoted(clean_text(said.message)) if said.message else quoted_body(body, secrets)
    if status == 404 and not (is_mapping(value) and is_mapping(value.get("error"))):  # nothing speaks chat completions
        text += ": is the base URL right? Most end in /v1"
    return _made(said._replace(message=text), status, headers, secrets)


def reported_error(
    value: object, secrets: Secrets = NO_SECRETS, headers: Mapping[str, str] | None = None, *, is_certain: bool = False
) -> ModelError | None:
    """The error that an endpoint reports with status 200: in a completion, a choice, or an event of a stream.

    Args:
        value: The JSON value.
        secrets: What no text may repeat.
        headers: Headers of the answer.
        is_certain: Whether it is known already that the value is an error.

    Returns:
        An error of the class that the same HTTP status would have, or None if the value reports none.
    """
    if not is_certain and not _reports(value):
        return None
    said = _said(value)
    body = value.get("error") or value if is_mapping(value) else value
    text = secrets.quoted(clean_text(said.message)) if said.message else quoted_body(body, secrets)
    status = said.status or _STATUS_OF_CODE.get(_NO_LETTERS.sub("", (said.code or "")[:_LONGEST_CODE].lower()))
    if status is not None:
        return _made(said._replace(message=text), status, headers or {}, secrets)
    error = ModelError(
        f"the endpoint broke off: {text}" if text else "the endpoint broke off without a word",
        code=_fact(said.code, secrets),
        param=_fact(said.param, secrets),
        retry_after=said.retry_after,
    )
    error.retryable = True
    return error


def is_page(headers: Mapping[str, str], body: bytes) -> bool:
    """Whether an answer is a web page."""
    return "html" in headers.get("content-type", "").lower() or body[:200].lstrip()[:1] == b"<"


def quoted_body(body: object, secrets: Secrets) -> str:
    """The beginning of an answer in one line, without the tags, styles and scripts of a page."""
    if body is None:
        return ""
    text = body[:_LONGEST_BODY].decode(errors="replace") if isinstance(body, bytes) else briefly(body, secrets)
    for name in ("style", "script"):
        text = _without_element(text, name)
    text = unescape(_TAG.sub(" ", secrets.beginning(text, _LONGEST_BODY)))
    return secrets.quoted(clean_text(" ".join(text.split())), _LONGEST_QUOTE)


def _without_element(text: str, name: str) -> str:
    lower, kept, position = text.lower(), list[str](), 0
    while (begin := lower.find(f"<{name}", position)) >= 0:
        kept.append(text[position:begin])
        end = lower.find(f"</{name}", begin)
        if end < 0:
            return "".join(kept)
        position = end
    return "".join((*kept, text[position:]))


def _made(said: _Said, status: int, headers: Mapping[str, str], secrets: Secrets) -> StatusError:
    error = _class_for(status, said)(
        f"HTTP {status}: {said.message}" if said.message else f"HTTP {status} without a word",
        status=status,
        code=_fact(said.code, secrets),
        param=_fact(said.param, secrets),
        request_id=_fact(_first(headers, *_IDS), secrets),
        retry_after=_retry_after(headers, said.retry_after),
    )
    match _first(headers, *(f"{prefix}x-should-retry" for prefix in _PREFIXES)):
        case "true":
            error.retryable = True
        case "false":
            error.retryable = False
        case _:
            pass
    return error


def _first(headers: Mapping[str, str], *names: str) -> str | None:
    return next((headers[name] for name in names if name in headers), None)


def _class_for(status: int, said: _Said) -> type[StatusError]:
    if said.is_filter and status in (400, 403):
        return ContentFiltered
    if status in (401, 403):
        return AuthenticationFailed
    if status == 429:
        return RateLimited
    if status >= 500 or status in (408, 409):
        return ServerError
    return StatusError


def _fact(value: str | None, secrets: Secrets) -> str | None:
    return secrets.quoted(clean_text(value), _LONGEST_CODE) if value else None


# ---- error objects


def _reports(value: object) -> bool:
    """Whether a JSON value is an error, or has one where endpoints put it beside a message."""
    if is_list(value):
        return bool(value) and _reports(value[0])
    if not is_mapping(value):
        return False
    error = value.get("error")
    if error and not (is_mapping(error) and not any(error.values())):  # some send an empty one with every answer
        return not isinstance(error, str) or not error.isspace()
    if "error" in (value.get("object"), value.get("type")) or value.get("success") is False:
        return True
    has_none = not (value.get("choices") or "delta" in value or ("message" in value and is_mapping(value["message"])))
    return has_none and "usage" not in value and _said(value).status is not None


def _said(value: object, depth: int = 0) -> _Said:
    """The facts of an error object, wherever an endpoint or a gateway has put them."""
    if depth > _DEEPEST:
        return _Said()
    if is_list(value):
        faults = _faults_of(value)
        return faults or (_said(value[0], depth + 1) if value else _Said())
    if isinstance(value, str):
        return _said_in_text(value, depth)
    if not is_mapping(value):
        return _Said()
    inner = _inner(value, depth)
    return _Said(
        message=inner.message or _message_of(value, depth),
        status=inner.status or _status_of(value),
        code=inner.code or _code_of(value),
        param=inner.param or _text(value.get("param")),
        retry_after=inner.retry_after if inner.retry_after is not None else _wait_of(value),
        is_filter=inner.is_filter or _is_filter(value),
    )


def _inner(value: Mapping[str, Any], depth: int) -> _Said:
    """The facts one level deeper, in the first member that has any."""
    found = _Said()
    for name in ("error", "errors", "message", "detail", "base_resp"):
        inner = value.get(name)
        if inner and (name == "error" or not isinstance(inner, str)):
            found = _said(inner, depth + 1)
            if found != _Said():
                break
    metadata = value.get("metadata")
    raw = metadata.get("raw") if is_mapping(metadata) else None  # a gateway's word for what it was told
    return _joined(found, _said(raw, depth + 1), value) if raw else found


def _joined(found: _Said, raw: _Said, value: Mapping[str, Any]) -> _Said:
    own = _text(value.get("message"))
    message = f"{own}: {raw.message}" if own and raw.message else own or raw.message
    return found._replace(message=message, retry_after=raw.retry_after, is_filter=found.is_filter or raw.is_filter)


def _said_in_text(text: str, depth: int) -> _Said:
    """The facts in a text that is a sentence, or JSON as gateways quote it."""
    if text[:1] in ("{", "[") and len(text) <= _LONGEST_BODY:
        try:
            return _said(decode(text), depth + 1)
        except ValueError:
            pass
    return _Said(message=text or None)


def _message_of(value: Mapping[str, Any], depth: int) -> str | None:
    for name in _MESSAGES:
        said = value.get(name)
        if isinstance(said, str) and said.strip():
            return _said_in_text(said, depth).message or said
    return None


def _faults_of(detail: list[Any]) -> _Said | None:
    """The faults of a request as FastAPI lists them, with their places."""
    faults = [fault for fault in detail[:20] if is_mapping(fault) and "msg" in fault]
    if not faults:
        return None
    paths = [_path_of(fault) for fault in faults]
    said = [f"{path or 'body'}: {fault.get('msg')}" for path, fault in zip(paths, faults, strict=True)]
    return _Said(message="; ".join(said), param=paths[0] or None)


def _path_of(fault: Mapping[str, Any]) -> str:
    steps = fault.get("loc")
    return ".".join(str(step) for step in steps if step != "body") if is_list(steps) else ""


def _status_of(value: Mapping[str, Any]) -> int | None:
    for name in _STATUSES:
        said = value.get(name)
        if isinstance(said, str) and (match := _STATUS.fullmatch(said[:_LONGEST_CODE])):
            return int(match[1])
        if isinstance(said, (int, float)) and 400 <= said < 600:
            return int(said)
    return None


def _code_of(value: Mapping[str, Any]) -> str | None:
    """The code that says most: a word before a number."""
    said = [text for name in _CODES if (text := _text(value.get(name)))]
    return next((text for text in said if not text.isdecimal()), None) or next(iter(said), None)


def _is_filter(value: Mapping[str, Any]) -> bool:
    inner = value.get("innererror")
    codes = (value.get("code"), value.get("type"), inner.get("code") if is_mapping(inner) else None)
    return any(isinstance(code, str) and code.lower() in _FILTERS for code in codes)


def _text(value: object) -> str | None:
    if isinstance(value, bool) or not isinstance(value, (str, int)):
        return None
    text = str(value) if not isinstance(value, int) or abs(value) < 10**20 else ""
    return text if text not in ("", "None", "null") else None


# ---- waits


def _wait_of(value: Mapping[str, Any]) -> float | None:
    """Seconds that an error object asks to wait: Google's `retryDelay`, or `retry_after`."""
    details = value.get("details")
    for detail in details[:20] if is_list(details) else ():
        said = detail.get("retryDelay") if is_mapping(detail) else None
        if isinstance(said, str) and (match := _SECONDS.fullmatch(said)):
            return float(match[1])
    said = value.get("retry_after")
    return _number(str(said)) if is_number(said) or isinstance(said, str) else None


def _retry_after(headers: Mapping[str, str], otherwise: float | None) -> float | None:
    """Seconds to wait by the headers; the other number, if they have none."""
    for prefix in _PREFIXES:
        seconds, milliseconds = headers.get(f"{prefix}retry-after"), headers.get(f"{prefix}retry-after-ms")
        if seconds is not None or milliseconds is not None:
            return _wait_in(seconds, milliseconds)
    return otherwise


def _wait_in(value: str | None, in_milliseconds: str | None) -> float | None:
    milliseconds = _number(in_milliseconds)
    if milliseconds is not None:
        return milliseconds / 1000
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


def _value_of(body: object) -> object:
    """The JSON value of a body that is bytes or decoded already."""
    if not isinstance(body, (bytes, str)):
        return body
    try:
        return decode(body)
    except ValueError:
        return None
