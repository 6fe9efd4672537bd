"""What is said to a client of OpenAI's when there is no answer: a status, and an error in OpenAI's form."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from fractal._texts import said_by
from fractal.errors import (
    ContentFiltered,
    ContextWindowExceeded,
    DeadlineExceeded,
    DeadlineWouldPass,
    LimitReached,
    ModelError,
    RateLimited,
    RequestTimedOut,
    RunError,
)

__all__ = ["Fault", "fault_of", "wrong"]

_ANSWERED_ALREADY = {"x-should-retry": "false"}
"""The run has tried again where that could help: a client that does so too begins another run, three times over."""


@dataclass
class Fault(Exception):
    """The reason why there is no answer, as the client is told it.

    Attributes:
        status: HTTP status.
        message: What is wrong, for a human.
        kind: OpenAI's `type` of errors.
        code: A word for programs, or None.
        param: The field of the request that is meant, or None.
        headers: Further headers of the response.
    """

    status: int
    message: str
    kind: str
    code: str | None = None
    param: str | None = None
    headers: Mapping[str, str] = field(default_factory=dict[str, str])

    def __str__(self) -> str:
        return self.message

    def body(self) -> dict[str, Any]:
        """The error as JSON, in OpenAI's form."""
        facts = {"message": self.message, "type": self.kind, "param": self.param, "code": self.code}
        return {"error": facts}


def wrong(message: str, param: str | None = None, code: str | None = None, status: int = 400) -> Fault:
    """Make the fault of a request that cannot be answered."""
    return Fault(status, message, "invalid_request_error", code, param)


def fault_of(error: RunError | None) -> Fault:
    """The fault of a run that gave no answer; texts of endpoints and of users' code are not repeated."""
    match error:
        case ContentFiltered():
            return wrong("a filter of the model did not let the request through", "messages", "content_filter")
        case ContextWindowExceeded():
            return wrong(said_by(error), "messages", "context_length_exceeded")
        case RateLimited():
            return _failed(429, "the model has too much to do", "rate_limit_error", "rate_limit_exceeded", error)
        case DeadlineExceeded() | DeadlineWouldPass():
            return _failed(504, said_by(error), "timeout_error", error.stop_reason)
        case RequestTimedOut():
            return _failed(504, "the model did not answer in time", "timeout_error", error.error_type)
        case LimitReached():
            return _failed(503, said_by(error), "server_error", error.stop_reason)
        case ModelError():
            return _failed(502, "the model did not answer", "server_error", error.error_type, error)
        case _:
            pass
    reason = error.stop_reason if error is not None else None
    return _failed(500, "the agent gave no answer", "server_error", reason)


def _failed(status: int, message: str, kind: str, code: str | None, error: ModelError | None = None) -> Fault:
    wait = error.retry_after if error is not None else None
    headers = {"retry-after": f"{math.ceil(wait)}"} if wait is not None and math.isfinite(wait) else {}
    return Fault(status, message, kind, code, None, {**_ANSWERED_ALREADY, **headers})
