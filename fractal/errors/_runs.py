"""Why runs fail, but for their models: answers, tools, limits."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Self

from fractal.errors._base import RunError

if TYPE_CHECKING:
    from fractal.approval import PendingCall

__all__ = [
    "RAISE_LIMIT",
    "ApprovalPending",
    "BudgetExceeded",
    "ContextWindowExceeded",
    "DeadlineExceeded",
    "DeadlineWouldPass",
    "DelegateFailed",
    "DepthExceeded",
    "GuardRaised",
    "InvalidOutput",
    "IterationsExceeded",
    "LimitReached",
    "NoContent",
    "Refused",
    "RunCancelled",
    "ToolErrors",
    "ToolFailed",
    "ToolIgnoredCancellation",
    "ToolInterrupted",
    "UnexpectedError",
]


class Refused(RunError):
    """The model declined to answer; the text is its reason."""

    stop_reason = "refusal"
    error_type = "refusal"


class GuardRaised(RunError):
    """A guard stopped the run: what it raised is `__cause__`.

    Attributes:
        guard: Name of the guard.
        reason: What it raised, as text.
    """

    stop_reason = "guard"
    error_type = "guard"

    def __init__(self, guard: str, reason: str) -> None:
        self.guard, self.reason = guard, reason
        super().__init__(f"guard {guard!r} stopped the run: {reason}")


RAISE_LIMIT = "raise max_tokens, or lower reasoning_effort"


class NoContent(RunError):
    """The model answered nothing, again and again, or its reply was cut at the token limit before it said anything.

    Attributes:
        replies: How many empty replies there were.
        is_cut: Whether the last one was cut at the token limit; asked again, it would be cut there again.
        held: What the last one held that is no text, such as `image_url` or `audio`.
    """

    stop_reason = "no_content"
    error_type = "no_content_after_retries"

    def __init__(self, replies: int, *, is_cut: bool = False, held: Sequence[str] = ()) -> None:
        self.replies, self.is_cut, self.held = replies, is_cut, tuple(held)
        only = f", only what is not read as an answer: {', '.join(held)}" if held else ""
        super().__init__(
            f"the reply was cut at the token limit before it said anything: {RAISE_LIMIT}"
            if is_cut
            else f"the model gave {replies} empty replies: no text and no tool call{only}"
        )


class InvalidOutput(RunError):
    """The model's answers did not fit the output type, or were rejected, again and again.

    Attributes:
        attempts: How many answers there were.
        fault: What is wrong with the last one.
        answer: The last one, as the model wrote it.
    """

    stop_reason = "invalid_output"
    error_type = "json_decode_error"

    def __init__(self, attempts: int, fault: str, answer: str) -> None:
        self.attempts, self.fault, self.answer = attempts, fault, answer
        answers = "1 answer" if attempts == 1 else f"{attempts} answers"
        super().__init__(f"the model gave {answers}, and none is valid; the last one: {fault}")


class ToolFailed(RunError):
    """A tool with `on_error="raise"` raised; the original is `__cause__`.

    Attributes:
        tool_name: The tool's name.
    """

    stop_reason = "tool_error"

    def __init__(self, tool_name: str, message: str) -> None:
        self.tool_name = tool_name
        super().__init__(f"tool {tool_name!r} failed: {message}")


class ToolErrors(RunError, ExceptionGroup[RunError]):
    """Several tool calls of one reply failed in different ways, all of which are kept.

    A group, so that `except* ToolFailed` finds every failed tool whether there is one or more. Its text has a line for
    each member.

    Args:
        errors: Two or more, in call order: `ToolFailed` for a tool with `on_error="raise"`, `BudgetExceeded` for
            calls that were not made any more, `UnexpectedError` for an output validator that failed.

    Example:
        >>> try:
        ...     raise ToolErrors([ToolFailed("search", "offline"), ToolFailed("charge", "card declined")])
        ... except* ToolFailed as group:
        ...     [error.tool_name for error in group.exceptions]
        ['search', 'charge']
    """

    stop_reason = "tool_error"

    def __new__(cls, errors: Sequence[RunError]) -> Self:
        """Make the group; a group takes its members here."""
        return super().__new__(cls, f"{len(errors)} failures at once", errors)

    def __init__(self, errors: Sequence[RunError]) -> None:
        self.args = (tuple(errors),)  # what pickling makes it from

    def derive(self, errors: Sequence[RunError], /) -> ToolErrors:  # type: ignore[override]
        """A group of some of the members, for `split`, `subgroup` and `except*`."""
        part = ToolErrors(errors)
        part.result = self.result
        return part

    def __str__(self) -> str:
        return "\n- ".join((f"{self.message}:", *map(str, self.exceptions)))


class ToolIgnoredCancellation(RunError):
    """An async tool was cancelled and did not stop; with `Limits(on_stubborn="raise")` the run went on without it.

    It is raised out of the run, and of the runs above, in place of a result or of a cancellation: something is still
    at work that nobody waits for.

    Attributes:
        tool_name: The tool's name.
        where: Where it is stuck, as `file.py:12 in function`; None if no line of a user's own is known.
        grace: Seconds it had.
        call_id: Id of its call, or None.
        through: The tool of the run that ended without it that waits for it, if that is another: a delegate, say.
    """

    stop_reason = "tool_error"

    def __init__(
        self,
        tool_name: str,
        where: str | None,
        grace: float,
        *,
        call_id: str | None = None,
        through: str | None = None,
    ) -> None:
        self.tool_name, self.where, self.grace, self.call_id, self.through = tool_name, where, grace, call_id, through
        stuck = f", stuck at {where}" if where else ""
        called = f", called through {through!r}," if through else ""
        super().__init__(
            f"tool {tool_name!r}{called} has not stopped {grace:g} s after it was cancelled{stuck}; the run ended"
            " without it. Let it pass the cancellation on, or give it more time: Limits(grace=…)"
        )


class ToolInterrupted(RunError):
    """A process ended while a tool was at work, so that nobody knows whether it took effect.

    Attributes:
        tool_name: The tool.
    """

    stop_reason = "tool_error"

    def __init__(self, tool_name: str) -> None:
        self.tool_name = tool_name
        super().__init__("the process ended while the tool was at work: it is unknown whether it took effect")


class ApprovalPending(RunError):
    """Calls wait for the answer of somebody who has deferred it: `agent.resume(journal, run_id, answers=…)` gives it.

    Attributes:
        pending: The calls.
    """

    stop_reason = "approval"
    error_type = "approval_pending"

    def __init__(self, pending: Sequence[PendingCall]) -> None:
        self.pending = tuple(pending)
        names = ", ".join(call.tool_name for call in self.pending[:10])
        super().__init__(f"{len(self.pending)} calls wait for approval: {names}")


class DelegateFailed(RunError):
    """An agent that was asked as a tool ended without an answer; the text is what the asking model is told.

    Attributes:
        agent_name: The agent that was asked.
    """

    stop_reason = "tool_error"

    def __init__(self, agent_name: str, message: str) -> None:
        self.agent_name = agent_name
        super().__init__(message)


class LimitReached(RunError):
    """A limit that the caller set ended the run."""


class DeadlineExceeded(LimitReached):
    """The run's time was over.

    Attributes:
        seconds: The time it had.
        waited_for: What its request was waiting for then, before it could be sent; None if it was not.
    """

    stop_reason = "deadline"
    error_type = "timeout"

    def __init__(self, seconds: float, waited_for: str | None = None) -> None:
        self.seconds, self.waited_for = seconds, waited_for
        at_last = f"; at last it waited for {waited_for}" if waited_for else ""
        super().__init__(f"the run did not finish within {seconds:g} s{at_last}")


class DeadlineWouldPass(LimitReached):
    """Something had to be waited for longer than there was time left, so the run gave up at once.

    Attributes:
        what: What takes so long.
        wait: Seconds the wait would have taken.
        remaining: Seconds there were.
    """

    stop_reason = "deadline"
    error_type = "timeout"

    def __init__(self, what: str, wait: float, remaining: float) -> None:
        self.what, self.wait, self.remaining = what, wait, remaining
        super().__init__(f"{what} would take {wait:.3g} s, and {max(remaining, 0):.3g} s are left of the run's time")


class IterationsExceeded(LimitReached):
    """The model still wanted to go on after the last turn it was allowed.

    Attributes:
        limit: Turns allowed.
    """

    stop_reason = "max_iterations"
    error_type = "max_iterations_reached"

    def __init__(self, limit: int) -> None:
        self.limit = limit
        super().__init__(f"no final answer after {limit} iterations: raise max_iterations, or look for a tool loop")


class BudgetExceeded(LimitReached):
    """A budget of the run, or of a run above it, is spent.

    Attributes:
        resource: `"requests"`, `"tool_calls"`, `"tokens"` or `"cost"`.
        limit: What was allowed; of cost, in the currency of the prices.
        used: What is used or reserved already, in the same.
    """

    stop_reason = "budget"
    error_type = "budget_exceeded"

    def __init__(self, resource: str, limit: float, used: float) -> None:
        self.resource, self.limit, self.used = resource, limit, used
        words = f"{limit:.0f} {resource.replace('_', ' ')}" if resource != "cost" else f"{limit:.10g} in money"
        super().__init__(f"the budget of {words} is spent ({used:.10g} used or reserved, over the whole tree)")


class ContextWindowExceeded(LimitReached):
    """The parts that a request cannot do without are longer than the context window.

    That is all of the request but the transcript, and of the transcript the system messages at its start, the
    question, and the newest message with what belongs to it.

    Attributes:
        needed: Tokens it would take, as they are counted.
        limit: Tokens there are.
    """

    stop_reason = "context_window"
    error_type = "context_window_exceeded"

    def __init__(self, needed: int, limit: int) -> None:
        self.needed, self.limit = needed, limit
        super().__init__(
            f"system prompt, tools, room for the reply, the question and the newest messages alone take {needed} tokens"
            f" of a context window of {limit}: raise context_window, lower max_tokens, or send less"
        )


class DepthExceeded(LimitReached):
    """Agents delegate to agents deeper than allowed.

    Attributes:
        limit: Levels allowed below the first run.
    """

    stop_reason = "depth"
    error_type = "depth_exceeded"

    def __init__(self, limit: int) -> None:
        self.limit = limit
        super().__init__(f"delegation is {limit} levels deep already: raise Limits.max_depth if that is meant")


class RunCancelled(RunError):
    """The run was cancelled, and whoever awaits it was not, so there is no answer; `result` has what was done.

    It was cancelled from another thread, or the run above it has ended.
    """

    stop_reason = "cancelled"
    error_type = "cancelled"

    def __init__(self, message: str = "the run was cancelled") -> None:
        super().__init__(message)


class UnexpectedError(RunError):
    """Something failed that is neither the endpoint nor a tool: the original is `__cause__`."""
