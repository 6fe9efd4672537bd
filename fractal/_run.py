"""A run: everything that changes while an agent answers one input.

The agent itself is fixed, so one object serves any number of runs at once; a run belongs to one call and is gone with
it. `current_run` is how a call made inside a tool finds the run it belongs to.
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Awaitable, Callable, Generator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any
from uuid import uuid4

import anyio
from anyio.lowlevel import current_token

from fractal.context import RunContext
from fractal.errors import DepthExceeded, RunError, StopReason
from fractal.events import Event, Observer, RunEvent, RunFinished, RunStarted, WarningRaised
from fractal.limits import DEFAULT_LIMITS, Budget, Limits
from fractal.results import AgentResult, ToolResult, Usage

if TYPE_CHECKING:
    from fractal.messages import Message, Transcript
    from fractal.models.base import Model, ModelSettings, ToolSchemas
    from fractal.toolkit import AgentToolkit, Tool

__all__ = ["Run", "RunSettings", "current_call", "current_run"]

logger = logging.getLogger("fractal")

_CLOCK_SLACK = 0.002


@dataclass(frozen=True, slots=True, kw_only=True)
class RunSettings:
    """What a run takes from its agent and from the call that starts it.

    Attributes:
        agent: The agent.
        agent_name: Its name.
        model: Who answers.
        model_name: Name of the model at the endpoint.
        model_settings: Fields of each request.
        toolkit: Tools on offer.
        system_prompt: Makes the system prompt; an empty one is not sent.
        limits: What the run may use: the call's, over the agent's.
        timeout: Seconds the run may take, or None.
        max_retries: Times a failed request, and an empty reply, is tried again.
        observers: Who is told what happens.
        deps: What tools find in their context.
    """

    agent: Any
    agent_name: str
    model: Model
    model_name: str
    model_settings: ModelSettings
    toolkit: AgentToolkit
    system_prompt: Callable[[RunContext[Any]], Awaitable[str]]
    limits: Limits
    timeout: float | None
    max_retries: int
    observers: tuple[Observer, ...]
    deps: Any


current_run: ContextVar[Run | None] = ContextVar("fractal_run", default=None)
current_call: ContextVar[str | None] = ContextVar("fractal_call", default=None)
"""The run, and its tool call, that the current task works for."""


class Run:
    """One run of one agent.

    Args:
        settings: What the agent and the call say.
        transcript: The conversation, with the user's turn at its end.
    """

    def __init__(self, settings: RunSettings, transcript: Transcript) -> None:
        parent: Run | None = current_run.get()
        if parent is not None and parent.result is not None:
            parent = None  # the context was copied out of a run that has ended
        self.settings, self.transcript, self.parent = settings, transcript, parent
        self.run_id = uuid4().hex
        self.agent = settings.agent
        self.depth: int = parent.depth + 1 if parent else 0
        self.limits: Limits = settings.limits.over(DEFAULT_LIMITS)
        self.deps: Any = settings.deps if settings.deps is not None or parent is None else parent.deps
        self.budget: Budget = Budget(self.limits, parent.budget if parent else None)
        self.tools: Mapping[str, Tool] = settings.toolkit.tools
        self.tool_schemas: ToolSchemas = settings.toolkit.schemas()
        self.system: str | None = None
        self.iterations = self.empty_replies = 0
        self.tool_results: list[ToolResult] = []
        self.abandoned: list[ToolResult] = []
        self.warnings: list[str] = []
        self.result: AgentResult | None = None
        self._observers: tuple[Observer, ...] = _without_repeats(
            settings.observers + (parent._observers if parent else ())
        )
        self._depth_limit: float = self.depth + (self.limits.max_depth or 0)
        if parent is not None:
            self._depth_limit = min(self._depth_limit, parent._depth_limit)
        self._loop = current_token().native_token
        self.started = anyio.current_time()
        self._clock = time.monotonic()
        self.deadline = math.inf  # the nearest of all that enclose the run
        self.soft_deadline = math.inf
        self._own_deadline = math.inf  # the nearest of the runs' own

    @property
    def usage(self) -> Usage:
        """What this run and everything below it has used."""
        budget = self.budget
        return Usage(
            requests=budget.used["requests"],
            tool_calls=budget.used["tool_calls"],
            input_tokens=budget.input_tokens,
            output_tokens=budget.output_tokens,
        )

    @property
    def messages(self) -> list[Message]:
        """The transcript so far."""
        return self.transcript.messages

    def timeout(self) -> float | None:
        """Seconds this run has: its own, and what is left to a parent that runs in another event loop.

        A parent in the same loop encloses this run with its scope, and needs no telling.
        """
        timeout, parent = self.settings.timeout, self.parent
        if parent is None or parent._loop is self._loop or math.isinf(parent.deadline):
            return timeout
        left = parent.deadline - parent.started - (time.monotonic() - parent._clock)
        return max(min(left, timeout if timeout is not None else math.inf), 0.0)

    @contextmanager
    def entered(self) -> Generator[None]:
        """Be the current run, from the first event on; call it where the run's deadline already holds.

        Raises:
            DepthExceeded: The run is too deep below the first one.
        """
        self.deadline = anyio.current_effective_deadline()
        timeout = self.timeout()
        self._own_deadline = self.started + timeout if timeout is not None else math.inf
        if self.parent is not None and self.parent._loop is self._loop:
            self._own_deadline = min(self._own_deadline, self.parent._own_deadline)
        self.soft_deadline = self.deadline - self.limits.reserve if self.limits.reserve else math.inf
        token = current_run.set(self)
        try:
            call_id = current_call.get() if self.parent is not None else None
            self.emit(RunStarted, message=self.transcript.messages[-1], call_id=call_id)
            if self.parent is not None and self.depth > self.parent._depth_limit:
                raise DepthExceeded(int(self.parent._depth_limit))
            yield
        finally:
            current_run.reset(token)

    def is_out_of_time(self) -> bool:
        """Whether the time of this run, or of one above it, is over: its own timeout, not a scope of the caller's."""
        # A deadline fires by the loop's own clock, which may read a hair less than the deadline when we look at it.
        return anyio.current_time() + _CLOCK_SLACK >= self._own_deadline

    def is_closing(self) -> bool:
        """Whether only the time for a final answer is left."""
        return self.soft_deadline < math.inf and anyio.current_time() >= self.soft_deadline

    def context(self, *, tool_name: str | None = None, call_id: str | None = None) -> RunContext[Any]:
        """What a tool or a prompt function sees of this run."""
        return RunContext(self, tool_name=tool_name, call_id=call_id)

    def emit(self, kind: Callable[..., Event], **facts: Any) -> None:
        """Tell observers and the log; costs nothing when nobody listens."""
        is_logging = logger.isEnabledFor(logging.DEBUG)
        if not self._observers and not is_logging:
            return
        event = kind(
            run_id=self.run_id,
            parent_id=self.parent.run_id if self.parent else None,
            agent_name=self.settings.agent_name,
            depth=self.depth,
            **facts,
        )
        if is_logging:
            logger.debug("%s", _Brief(event))
        for observe in self._observers:
            try:
                observe(event)
            except Exception:
                logger.exception("observer %r failed on %s", observe, event.kind)

    def warn(self, message: str) -> None:
        """Note something odd, here and in the runs above."""
        logger.warning("%s", message)
        self.emit(WarningRaised, message=message)
        run: Run | None = self
        while run is not None:
            run.warnings.append(message)
            run = run.parent

    def note_abandoned(self, result: ToolResult) -> None:
        """Note a call whose thread goes on, here and in the runs above."""
        run: Run | None = self
        while run is not None:
            run.abandoned.append(result)
            run = run.parent

    def succeed(self, content: Any, stop_reason: StopReason) -> AgentResult:
        """End the run with an answer."""
        return self._end(AgentResult(content=content, stop_reason=stop_reason, **self._facts()))

    def fail(self, error: RunError) -> AgentResult:
        """End the run without one."""
        facts = self._facts()
        text = str(error)
        facts["metadata"] |= {"reason": error.error_type, "error": text, "error_type": error.error_type}
        result = AgentResult(content=text, success=False, error=text, stop_reason=error.stop_reason, **facts)
        result._exception = error  # pyright: ignore[reportPrivateUsage]
        error.result = result
        return self._end(result)

    def _facts(self) -> dict[str, Any]:
        messages = self.transcript.messages
        return {
            "agent_name": self.settings.agent_name,
            "messages": messages,
            "metadata": {"iterations": self.iterations, "messages": messages},
            "usage": self.usage,
            "run_id": self.run_id,
            "tool_results": self.tool_results,
            "abandoned": self.abandoned,
            "warnings": self.warnings,
            "elapsed": anyio.current_time() - self.started,
        }

    def _end(self, result: AgentResult) -> AgentResult:
        self.result = result
        self.emit(RunFinished, result=result)
        return result


class _Brief:
    """An event as one line of a log, made only if the line is written."""

    __slots__ = ("event",)

    def __init__(self, event: RunEvent) -> None:
        self.event = event

    def __str__(self) -> str:
        event: Any = self.event
        facts = " ".join(f"{name}={_shown(getattr(event, name))}" for name in event.__slots__ if name != "kind")
        return f"{event.kind} agent={event.agent_name!r} run={event.run_id[:8]} depth={event.depth} {facts}"


def _shown(value: object) -> str:
    if isinstance(value, float):
        return f"{value:.3g}"
    text = repr(value) if value is None or type(value) in (str, int, dict) else repr(str(value))
    return text if len(text) <= 200 else text[:200] + "…"


def _without_repeats(observers: tuple[Observer, ...]) -> tuple[Observer, ...]:
    unique: list[Observer] = []
    for observer in observers:
        if observer not in unique:
            unique.append(observer)
    return tuple(unique)
