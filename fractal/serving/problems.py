"""What a client is told when something does not work: problem details, RFC 9457, without anything internal."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from fractal._json import encode
from fractal.errors import (
    ContentFiltered,
    FractalError,
    InvalidMessages,
    ModelError,
    RateLimited,
    Refused,
    RequestTimedOut,
    RunError,
    StopReason,
)

__all__ = ["PROBLEM_TYPE", "Problem", "problem_of", "said_of"]

PROBLEM_TYPE = "application/problem+json"
"""The media type of problem details."""

_TITLES = {
    400: "Bad request",
    401: "Unauthorized",
    403: "Forbidden",
    404: "Not found",
    408: "Request not received in time",
    409: "Conflict",
    413: "Content too large",
    415: "Unsupported media type",
    422: "Unprocessable content",
    429: "Too many requests",
    499: "Client closed request",
    500: "Internal error",
    502: "The model failed",
    503: "Unavailable",
    504: "Timed out",
}


class Problem(FractalError):
    """An answer to a request that cannot be met.

    Attributes:
        status: HTTP status.
        reason: What is the matter, in one word, for programs.
        detail: The same for humans; nothing internal.
        retry_after: Seconds after which the same request may succeed; None if that is not known.
        run_id: The run that it is about, or None.
        errors: Where the request is at fault: objects with `loc` and `msg`.
    """

    def __init__(
        self,
        status: int,
        reason: str,
        detail: str,
        *,
        retry_after: float | None = None,
        run_id: str | None = None,
        errors: list[dict[str, Any]] | None = None,
    ) -> None:
        self.status, self.reason, self.detail = status, reason, detail
        self.retry_after, self.run_id, self.errors = retry_after, run_id, errors
        super().__init__(f"{status} {reason}: {detail}")

    @classmethod
    def of_facts(cls, facts: Mapping[str, Any]) -> Problem:
        """The problem with the given members."""
        more = {name: facts.get(name) for name in ("retry_after", "run_id", "errors")}
        return cls(facts["status"], facts["reason"], facts["detail"], **more)

    @property
    def headers(self) -> dict[str, str]:
        """The headers of the answer."""
        if self.retry_after is None:
            return {}
        return {"Retry-After": f"{math.ceil(min(max(self.retry_after, 0), 86400))}"}

    def facts(self) -> dict[str, Any]:
        """The members of the problem details."""
        facts: dict[str, Any] = {
            "type": f"urn:fractal:problem:{self.reason}",
            "title": _TITLES.get(self.status, "Problem"),
            "status": self.status,
            "detail": self.detail,
            "reason": self.reason,
        }
        more = {"retry_after": self.retry_after, "run_id": self.run_id, "errors": self.errors}
        return facts | {name: value for name, value in more.items() if value is not None}

    def json(self) -> bytes:
        """The problem details as JSON."""
        return encode(self.facts())


_SAID: Mapping[StopReason, tuple[int, str]] = {
    "refusal": (422, "the model declined to answer"),
    "guard": (422, "the request was not let through"),
    "no_content": (502, "the model gave no answer"),
    "invalid_output": (502, "the model gave no answer of the form that is wanted"),
    "max_iterations": (503, "the run took all the turns that it may take"),
    "deadline": (504, "the run did not finish in time"),
    "budget": (503, "the run used up what it may use"),
    "context_window": (422, "the conversation is too long for the model"),
    "depth": (500, "agents asked agents too deep"),
    "model_error": (502, "the model could not answer"),
    "tool_error": (500, "a tool failed"),
    "cancelled": (409, "the run was cancelled"),
    "error": (500, "the run failed"),
}


def said_of(stop_reason: StopReason) -> str:
    """The words for a client about a run that did not succeed."""
    return _SAID[stop_reason][1] if stop_reason in _SAID else _SAID["error"][1]


def problem_of(error: BaseException, run_id: str | None = None) -> Problem:
    """The problem that a failure is for a client.

    Args:
        error: What went wrong. What is not known here is an internal error, of which nothing is told.
        run_id: The run that failed, or None.
    """
    if isinstance(error, Problem):
        return error
    if isinstance(error, InvalidMessages):  # of our own making: it says what is wrong with the client's list
        return Problem(422, "invalid_messages", str(error), run_id=run_id)
    if not isinstance(error, RunError):
        return Problem(500, "error", said_of("error"), run_id=run_id)
    status, said = _SAID.get(error.stop_reason, _SAID["error"])
    match error:
        case RateLimited():
            status, said = 429, "the model is asked too often"
        case RequestTimedOut():
            status, said = 504, "the model did not answer in time"
        case ContentFiltered() | Refused():
            status, said = 422, said_of("refusal")
        case _:
            pass
    wait = error.retry_after if isinstance(error, ModelError) else None
    return Problem(status, error.stop_reason, said, retry_after=wait, run_id=run_id)
