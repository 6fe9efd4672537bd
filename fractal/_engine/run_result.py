"""The result of a run: what its caller, its observers and the run above are told of its end."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Protocol, get_args

from fractal._concurrency.scopes import unexpected
from fractal._texts import is_a
from fractal.errors import SUCCESSES, ApprovalPending, RunError, StopReason
from fractal.results import AgentResult

if TYPE_CHECKING:
    from fractal._engine.clock import RunClock
    from fractal._engine.emitter import Emitter
    from fractal._engine.run_settings import RunSettings
    from fractal.messages import Transcript
    from fractal.results import ToolResult, Usage

__all__ = ["result_of", "sound"]

_FAILURES = frozenset(get_args(StopReason)) - SUCCESSES


class _Ended(Protocol):
    """A run, as far as its result tells of it."""

    @property
    def usage(self) -> Usage:
        """The usage of the run and of everything below it."""
        ...

    abandoned: list[ToolResult]
    clock: RunClock
    emitter: Emitter
    iterations: int
    run_id: str
    settings: RunSettings
    tool_results: list[ToolResult]
    transcript: Transcript


def result_of(run: _Ended, content: Any, stop_reason: StopReason, error: RunError | None = None) -> AgentResult:
    """The result of a run that ends now.

    Args:
        run: The run.
        content: The answer; the text of the error if there is none.
        stop_reason: Why it ends.
        error: Why it failed; None if it has not.
    """
    messages = run.transcript.messages
    metadata: dict[str, Any] = {
        "iterations": run.iterations,
        "messages": messages,
        "model": run.settings.model_name,
        "terminated_by_tool": _last_tool(run) if stop_reason == "terminated" else None,
    }
    if error is not None:
        metadata |= {"reason": error.error_type, "error": content, "error_type": error.error_type}
    return AgentResult.of_facts(
        error,
        content=content,
        agent_name=run.settings.agent_name,
        success=error is None,
        metadata=metadata,
        stop_reason=stop_reason,
        error=content if error is not None else None,
        messages=messages,
        usage=run.usage,
        run_id=run.run_id,
        tool_results=run.tool_results.copy(),
        abandoned=run.abandoned.copy(),
        pending=list(error.pending) if error is not None and is_a(error, ApprovalPending) else [],
        warnings=run.emitter.warnings.copy(),
        elapsed=run.clock.elapsed,
    )


def _last_tool(run: _Ended) -> str | None:
    """Name of the tool that has ended a run."""
    ended = (each for each in run.tool_results if each.outcome == "ok" and each.metadata["terminate"])
    return next((each.tool_name for each in ended), None)


def sound(error: RunError) -> RunError:
    """The error; or a substitute, if it is of a user's class whose attributes cannot be read."""
    try:
        error.result = None
        is_sound = error.stop_reason in _FAILURES and isinstance(error.error_type, str)
    except Exception:
        is_sound = False
    return error if is_sound else unexpected(error)
