"""What goes wrong with models and their endpoints."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any, ClassVar

from fractal._texts import said_by
from fractal.errors._base import RunError, StopReason

if TYPE_CHECKING:
    from collections.abc import Sequence

__all__ = [
    "AllModelsFailed",
    "AuthenticationFailed",
    "BadReply",
    "ConnectionFailed",
    "ContentFiltered",
    "MissingCredentials",
    "ModelError",
    "RateLimited",
    "ReplyTooLarge",
    "RequestTimedOut",
    "ServerError",
    "StatusError",
]


class ModelError(RunError):
    """The endpoint did not give a usable answer.

    Attributes:
        status: HTTP status, or None if there was no HTTP answer.
        code: The endpoint's own error code, such as `"insufficient_quota"`, or None.
        param: The request field the endpoint complains of, or None.
        request_id: The endpoint's id of the request, or None.
        retryable: Whether the same request may succeed later.
        retry_after: Seconds the endpoint asked us to wait, or None if it did not say.
    """

    stop_reason: ClassVar[StopReason] = "model_error"
    error_type = "api_error"
    retryable: bool = False

    def __init__(
        self,
        message: str,
        *,
        status: int | None = None,
        code: str | None = None,
        param: str | None = None,
        request_id: str | None = None,
        retry_after: float | None = None,
    ) -> None:
        self.status, self.code, self.param = status, code, param
        self.request_id, self.retry_after = request_id, retry_after
        super().__init__(message)


class MissingCredentials(ModelError):
    """There is no client and no key to make one with."""


class ConnectionFailed(ModelError):
    """The endpoint could not be reached, or closed the connection before the answer was whole."""

    retryable = True


class RequestTimedOut(ModelError):
    """The endpoint did not answer within the time one request may take."""

    error_type = "timeout"
    retryable = True


class BadReply(ModelError):
    """The endpoint answered, but not with a chat completion: HTML, half a body, a missing field."""

    error_type = "json_decode_error"
    retryable = True


class ReplyTooLarge(BadReply):
    """The endpoint answered more than the model's `ReplyBounds` allow; reading ended where the bound is.

    Attributes:
        what: Field of `ReplyBounds` that was passed, such as `"body"`.
        bound: Its value.
    """

    retryable = False

    def __init__(self, what: str, bound: int) -> None:
        self.what, self.bound = what, bound
        super().__init__(f"the answer is too large: {what} over {bound:,}; OpenAIModel(bounds=ReplyBounds({what}=…))")


class AllModelsFailed(ModelError):
    """None of the models of a `FallbackModel` or a `RaceModel` gave a usable answer.

    It can be asked again if that may help with one of them, after the shortest wait that one of those asked for.

    Attributes:
        errors: Why each did not, in the order of the models: a `ModelError`, or a limit of the run.
    """

    def __init__(self, errors: Sequence[RunError]) -> None:
        self.errors = tuple(errors)
        reasons = "; ".join(f"({number}) {said_by(error)}" for number, error in enumerate(self.errors, 1))
        again = [error for error in self.errors if isinstance(error, ModelError) and error.retryable]
        waits = [error.retry_after for error in again if error.retry_after is not None]
        super().__init__(
            f"none of {len(self.errors)} models answered: {reasons}",
            # One that asked for no wait at all need not wait for the others.
            retry_after=min(waits) if waits and len(waits) == len(again) else None,
        )
        self.retryable = bool(again)


_REFUSALS = frozenset({400, 404, 405, 406, 415, 422, 500, 501})
# What these say is said of something else than the form of a request.
_NO_REFUSALS = frozenset(
    {
        "content_filter",
        "context_length_exceeded",
        "insufficient_quota",
        "invalid_api_key",
        "model_not_found",
        "not_found_error",
        "string_above_max_length",
    }
)


class StatusError(ModelError):
    """The endpoint answered with an HTTP error; `status`, `code` and the text are its own."""

    @property
    def is_refusal(self) -> bool:
        """Whether the endpoint, by status and code, may not take requests of this form."""
        is_busy = self.status == 500 and self.retry_after is not None
        return self.status in _REFUSALS and self.code not in _NO_REFUSALS and not is_busy

    @property
    def names(self) -> frozenset[str]:
        """The names in `param`, such as `messages` and `content` in `messages.[1].content`."""
        return frozenset(re.findall(r"[a-zA-Z_]+", self.param or ""))


class AuthenticationFailed(StatusError):
    """The endpoint does not accept the key (401) or does not allow this (403)."""


class ContentFiltered(StatusError):
    """The endpoint's filter did not let the request through; the text says what it says of it."""

    stop_reason: ClassVar[StopReason] = "refusal"
    error_type = "refusal"


class RateLimited(StatusError):
    """The endpoint asked us to slow down (429), or says that the account's quota is used up."""

    error_type = "rate_limit"

    def __init__(self, message: str, **facts: Any) -> None:
        super().__init__(message, **facts)
        # A used-up quota is a 429 too, and waiting does not help then.
        self.retryable = self.code != "insufficient_quota"


class ServerError(StatusError):
    """The endpoint failed or is overloaded (5xx), gave up waiting (408), or met a conflict (409)."""

    retryable = True
