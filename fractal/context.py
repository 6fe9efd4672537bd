"""`RunContext`: what a tool may know and do about the run it is called in."""

from __future__ import annotations

import hashlib
import math
import time
import types
from typing import TYPE_CHECKING, Annotated, Any, Generic, Protocol, Union, get_args, get_origin

import anyio
import anyio.from_thread
from typing_extensions import TypeVar

from fractal._concurrency.scopes import remaining
from fractal._copies import copied

if TYPE_CHECKING:
    from fractal.messages import Message
    from fractal.results import Usage

__all__ = ["RunContext", "is_context"]

Deps = TypeVar("Deps", default=Any)


class _RunFacts(Protocol):
    """The part of a run that its context shows."""

    run_id: str
    agent: Any
    deps: Any
    depth: int
    iterations: int

    @property
    def usage(self) -> Usage: ...

    @property
    def messages(self) -> list[Message]: ...


class RunContext(Generic[Deps]):
    """The view that a tool has of the run that calls it.

    A tool asks for it by annotating a parameter with it, under any name; the model is not shown that parameter.

    Attributes:
        deps: What the caller gave as `deps=`: a database pool, the current user.
        run_id: Id of the run, as in its events and its result.
        agent: The agent that runs.
        depth: How many runs are above this one.
        tool_name: Name of the tool, as the model called it; None in a prompt function.
        call_id: Id of the tool call; None in a prompt function.

    Example:
        >>> from fractal import tool
        >>> @tool
        ... def whoami(ctx: RunContext[dict]) -> str:
        ...     return ctx.deps["user"]
    """

    __slots__ = ("_clock", "_deadline", "_run", "_turn", "agent", "call_id", "deps", "depth", "run_id", "tool_name")

    def __init__(self, run: _RunFacts, *, tool_name: str | None = None, call_id: str | None = None) -> None:
        self._run = run
        self.deps: Deps = run.deps
        self.run_id, self.agent, self.depth = run.run_id, run.agent, run.depth
        self.tool_name, self.call_id, self._turn = tool_name, call_id, run.iterations
        # For worker threads, which cannot ask the loop: the time left at the start, on a clock of their own.
        self._deadline, self._clock = math.inf, 0.0

    def started(self) -> None:
        """Note the deadline of the call that begins now; the engine calls this where the call runs."""
        self._deadline, self._clock = remaining(), time.monotonic()

    @property
    def idempotency_key(self) -> str:
        """The key of the tool call for whatever it changes outside: the same each time that this call is made.

        That is so when a hook makes it again, and when another process makes it again for a durable run, as it has the
        same `run_id`. Two calls have two keys, with the same arguments too.
        """
        position = f"{self.run_id}\0{self._turn}\0{self.call_id}"
        return hashlib.sha256(position.encode()).hexdigest()[:32]

    @property
    def usage(self) -> Usage:
        """The usage of the run, with everything below it, so far."""
        return self._run.usage

    @property
    def messages(self) -> list[Message]:
        """The transcript so far: a copy of its chat-completions messages, without the system prompt."""
        messages: list[Message] = copied(self._run.messages)
        return messages

    def remaining(self) -> float:
        """Seconds left until the nearest deadline: the tool's, the run's, or one that encloses the run.

        Returns:
            Infinity if there is no deadline, 0 if it has passed.
        """
        try:
            return remaining()
        except RuntimeError:  # in a worker thread
            return max(self._deadline - (time.monotonic() - self._clock), 0.0)

    def check_cancelled(self) -> None:
        """End a plain `def` tool here if the run does not want its answer any more.

        Call it between the steps of a long computation in a worker thread. In an `async def` tool every `await` does
        this already, and the call does nothing.

        Raises:
            BaseException: The event loop's own cancellation exception; let it pass.
        """
        try:
            anyio.get_cancelled_exc_class()
        except RuntimeError:
            anyio.from_thread.check_cancelled()


def is_context(hint: Any) -> bool:
    """Whether an annotation asks for the run's context, alone or among other types."""
    if get_origin(hint) is Annotated:
        hint = get_args(hint)[0]
    if get_origin(hint) in (types.UnionType, Union):
        return any(is_context(argument) for argument in get_args(hint))
    return (get_origin(hint) or hint) is RunContext
