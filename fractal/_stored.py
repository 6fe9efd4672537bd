"""Results from outside, by hand or from a store of an older form: what they lack follows from what they say."""

from __future__ import annotations

from typing import Any

from fractal._json import is_mapping
from fractal.errors import (
    SUCCESSES,
    BadReply,
    BudgetExceeded,
    ContextWindowExceeded,
    DepthExceeded,
    GuardRaised,
    IterationsExceeded,
    ModelError,
    NoContent,
    RateLimited,
    Refused,
    RequestTimedOut,
    RunCancelled,
    RunError,
    StopReason,
)

__all__ = ["complete_call", "complete_run", "without_nulls"]

_HAVE_EMPTY_FORMS = frozenset({"metadata", "messages", "tool_results", "abandoned", "pending", "warnings", "usage"})

# Several errors share a word. These are what stored results of the older form mean by it: no run had a deadline there.
_ERRORS: tuple[type[RunError], ...] = (
    *(RequestTimedOut, BadReply, RateLimited, ModelError, Refused, NoContent, IterationsExceeded, BudgetExceeded),
    *(ContextWindowExceeded, DepthExceeded, GuardRaised, RunCancelled, RunError),
)
_STOP_REASONS: dict[str, StopReason] = {error.error_type: error.stop_reason for error in _ERRORS}


def without_nulls(given: Any) -> Any:
    """The fields that are given, without those of lists, dicts and models that are null; they have an empty form."""
    if not is_mapping(given):
        return given
    return {name: value for name, value in given.items() if value is not None or name not in _HAVE_EMPTY_FORMS}


def complete_run(result: Any) -> None:
    """Fill in facts of a run that were not given: success, and the reason and text of a failure.

    Raises:
        ValueError: It is said to have succeeded, and to have failed.
    """
    reason = _reason_in(result.metadata)
    has_failed = result.stop_reason not in SUCCESSES or bool(result.error)
    if "success" not in result.model_fields_set:
        result.success = not has_failed and reason is None
    if result.success:
        if has_failed:
            raise ValueError(f"success=True contradicts stop_reason={result.stop_reason!r} and error={result.error!r}")
        return
    if result.stop_reason in SUCCESSES:
        result.stop_reason = reason or "error"
    result.error = result.error or _text_of_failure(result) or result.stop_reason


def complete_call(result: Any) -> None:
    """Fill in facts of a tool call that were not given: its outcome, and the text of one that is not `ok`.

    Raises:
        ValueError: It is said to be `ok`, and has an error.
    """
    if result.error and "outcome" not in result.model_fields_set:
        result.outcome = "error"
    if result.outcome != "ok":
        result.error = result.error or result.outcome
    elif result.error:
        raise ValueError(f"outcome='ok' contradicts error={result.error!r}")


def _reason_in(metadata: dict[str, Any]) -> StopReason | None:
    """The reason of a failure in metadata of the older form."""
    names = (metadata.get("reason"), metadata.get("error_type"))
    return next((_STOP_REASONS[name] for name in names if isinstance(name, str) and name in _STOP_REASONS), None)


def _text_of_failure(result: Any) -> str | None:
    said = (result.metadata.get("error"), result.content)
    return next((text for text in said if isinstance(text, str) and text), None)
