"""What is said to a client of OpenAI's when there is no answer: a status, and an error in OpenAI's form."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from fractal.serving.problems import Problem

__all__ = ["Fault", "fault_of", "wrong"]

_NOT_BEGUN = frozenset({"too_many_runs", "shutting_down", "queue_timeout"})
"""Nothing has been done yet. Any other run has tried again where that could help: a client that does so too, as
OpenAI's do, would begin it anew, three times over."""

_IN_OPENAI_WORDS = {"refusal": "content_filter", "context_window": "context_length_exceeded"}


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


def fault_of(problem: Problem) -> Fault:
    """The fault that a problem is for a client of OpenAI's."""
    status, code = problem.status, problem.reason
    if code in _IN_OPENAI_WORDS:
        status, code = 400, _IN_OPENAI_WORDS[code]
    elif status == 429:
        code = "rate_limit_exceeded"
    headers = {name.lower(): value for name, value in problem.headers.items()}
    if problem.reason not in _NOT_BEGUN and (status == 409 or status >= 429):  # what those clients send again
        headers["x-should-retry"] = "false"
    return Fault(status, problem.detail, _kind_of(status), code, None, headers)


def _kind_of(status: int) -> str:
    if status == 429:
        return "rate_limit_error"
    if status == 504:
        return "timeout_error"
    return "invalid_request_error" if status < 500 else "server_error"
