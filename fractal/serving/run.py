"""`ServedRun`: one run that was asked for over a network; it knows nothing of HTTP."""

from __future__ import annotations

import secrets
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from threading import get_ident
from typing import TYPE_CHECKING, Any

import anyio

from fractal._agent import verbs
from fractal._concurrency.loops import call_soon
from fractal._engine.brought import bring_tools, bring_turns
from fractal._engine.hooks import Hook
from fractal._engine.overrides import Adoption
from fractal._json import is_list, is_mapping
from fractal._log import log
from fractal.errors import RunCancelled
from fractal.events import (
    Event,
    ModelRequested,
    ModelResponded,
    RunFinished,
    TextDelta,
)
from fractal.options import RunOptions
from fractal.serving.approvals import PendingApprovals
from fractal.serving.event_log import EventLog
from fractal.serving.problems import Problem, problem_of
from fractal.serving.record import RunRecord
from fractal.serving.wire import RunState, approval_json, end_json, event_json, result_json

if TYPE_CHECKING:
    from anyio.lowlevel import EventLoopToken

    from fractal._concurrency.gates import Gate
    from fractal._engine.run import Run
    from fractal._engine.run_settings import Toolkit
    from fractal.agent import BaseAgent
    from fractal.approval import Approval
    from fractal.context import RunContext
    from fractal.limits import Limits
    from fractal.results import AgentResult
    from fractal.serving.wire import ApprovalPending

__all__ = ["RunAsked", "ServedRun", "wait_for"]

EVENTS_AT_ONCE = 64
"""Events that may wait between a run and its log, which takes them at once."""


@dataclass(frozen=True, kw_only=True)
class RunAsked:
    """What a client asks for.

    Attributes:
        input: The user's turn, as `BaseAgent.run` takes it.
        messages: The conversation to go on with.
        timeout: Seconds it may take, the wait for its turn included; None: as long as the server allows.
        is_streamed: Whether the model is to show its answer piece by piece.
        owner: Whose it is; None where everybody is the same.
        deps: What tools find as `ctx.deps`.
        options: More options of the run.
        turns: What the model and the tools have said since the user's turn, in an earlier run.
        tools: Tools of the client, which are offered beside the agent's own; None for none.
        key: The client's own name of the request, so that a second one begins no second run; None without.
        fingerprint: What two requests of the same name must have in common.
        request_id: Id of the request.
    """

    input: object
    messages: Sequence[Mapping[str, Any]] = ()
    timeout: float | None = None
    is_streamed: bool = False
    owner: str | None = None
    deps: Any = None
    options: RunOptions = field(default_factory=lambda: RunOptions())
    turns: Sequence[Mapping[str, Any]] = ()
    tools: Toolkit | None = None
    key: str | None = None
    fingerprint: str = ""
    request_id: str | None = None


class ServedRun:
    """A run on its way: its state, its events, the calls that wait for approval, and the means to end it.

    Somebody's task has to `drive` it: that of the request, or one that outlives the request.

    Attributes:
        id: Its id, as in its events.
        agent_name: Name by which the agent is served.
        asked: What was asked for.
        state: Where it is.
        log: Its events.
        approvals: Its calls that wait for approval.
        result: How it ended, if it has begun and ended.
        problem: Why there is no answer; None before the end, and after a success.
        created_at: When it was asked for, in seconds since the epoch.
        ended_at: When it ended, or None.
        ended: Set when it has ended, and all of its tasks have.
        token: The event loop that it is in, with those who wait for it.
        limits: What it may use, over the agent's own limits.
        clients: How many clients wait for it.
        ends_with_clients: Whether to cancel it when the last client that waits for it has gone.
    """

    def __init__(
        self, agent_name: str, agent: BaseAgent[Any], asked: RunAsked, log_: EventLog, token: EventLoopToken
    ) -> None:
        self.id, self.agent_name, self.asked, self.log = log_.run_id, agent_name, asked, log_
        self._agent = agent
        self.state: RunState = "queued"
        self.result: AgentResult[Any] | None = None
        self.problem: Problem | None = None
        self.created_at = time.time()
        self.ended_at: float | None = None
        self.limits: Limits | None = None
        self.ends_with_clients = False
        self.clients = 0
        self._thread, self.token = get_ident(), token
        backend = token.backend_class  # which AnyIO looks for at each `Event()` and `CancelScope()`
        self.ended, self._scope = backend.create_event(), backend.create_cancel_scope()
        # Nothing that the run holds knows the run, so that it goes, with all of its messages, when nobody knows it.
        self.approvals = PendingApprovals(partial(_tell_approval, log_, self._thread, self.token))
        self._why_cancelled = "the run was cancelled"
        self._had_its_turn = self._has_its_id = self._has_shown_text = False
        self._is_watched = asked.is_streamed
        self._run: Run | None = None
        self._result_json: bytes | None = None
        self._record: RunRecord | None = None

    @staticmethod
    def new_id() -> str:
        """An id that nobody can guess."""
        return f"run_{secrets.token_hex(16)}"

    # ---- for those who wait for it

    @property
    def is_over(self) -> bool:
        """Whether the run has ended."""
        return self.ended.is_set()

    def cancel(self, why: str = "the run was cancelled") -> None:
        """Begin to end the run; `ended` is set when its tasks have ended.

        Args:
            why: What clients are told.
        """
        if not self.is_over:
            self._why_cancelled = why
            self._scope.cancel()

    def attach(self) -> None:
        """Count one more client that waits for the run."""
        self.clients += 1

    def detach(self) -> None:
        """Count one client less."""
        self.clients -= 1
        if not self.clients and self.ends_with_clients:
            self.cancel("its client has gone")

    def watch(self) -> None:
        """Keep the events of the run from now on; those of a run that was asked for as a stream are kept anyway."""
        if self._is_watched:
            return
        self._is_watched = True
        if self.is_over:
            self.log = self.record().log
        elif self._run is not None:
            self._note_text(self._run.messages)
            self.log.note_gap()
            self._run.emitter.add_observer(self.tell)

    def _note_text(self, messages: Sequence[Mapping[str, Any]]) -> None:
        """Note the text that events have told which have not been kept, if the model wrote last."""
        if messages and messages[-1].get("role") == "assistant":
            self.log.add_text(_text_of(messages[-1]))

    def record(self) -> RunRecord:
        """What is known of the run now."""
        if self._record is not None:
            return self._record
        record = self._known()
        if self.is_over:
            self._record = record
        return record

    def _known(self) -> RunRecord:
        return RunRecord(
            id=self.id,
            agent=self.agent_name,
            state=self.state,
            owner=self.asked.owner,
            created_at=self.created_at,
            ended_at=self.ended_at,
            text=self.log.text,
            pending=tuple(self.approvals.pending),
            result_json=self._result_json,
            problem=self.problem.facts() if self.problem else None,
            events=self.log.to_keep if self.is_over else (),
            key=self.asked.key if self._had_its_turn or not self.is_over else None,  # it has done nothing
            fingerprint=self.asked.fingerprint,
            request_id=self.asked.request_id,
        )

    # ---- for the task that drives it

    async def drive(self, turn: Gate, timeout: float) -> None:
        """Carry the run out, to whatever end; only Ctrl-C and a cancellation from outside are raised again.

        Args:
            turn: Where it waits for its turn.
            timeout: Seconds it may take, that wait included.
        """
        try:
            with self._scope:
                left = await wait_for(turn, timeout)
                try:
                    self.state, self._had_its_turn = "running", True
                    await (self._stream(left) if self.asked.is_streamed else self._ask(left))
                finally:
                    turn.release()
        except (Exception, SystemExit) as error:  # a hook may have exited: no matter of the server's
            self.problem = problem_of(error, self.id)
            if self.problem.status == 500:
                log.failure(f"run {self.id} failed", error)

    def end(self) -> None:
        """Note that the run has ended; called by whoever drives it, last of all."""
        if self.is_over:
            return
        self.ended_at = time.time()
        self._conclude()
        if not self._is_watched:
            if self.result is not None:
                self._note_text(self.result.messages)
            if self.log.last:  # of calls that have waited for approval, which are told in any case
                self.log.note_gap()
        if self._is_watched or self.log.last:
            problem = self.problem.facts() if self.problem else None
            self.log.add("run_finished", end_json(self.id, self.ended_at, self.state, self._result_json, problem))
        self.log.close()
        self.ended.set()

    def _conclude(self) -> None:
        result = self.result
        if result is not None:
            self._result_json = result_json(result)
        if self.problem is None and result is not None and not result.success and result.exception is not None:
            self.problem = problem_of(result.exception, self.id)
        if result is not None and result.success and self.problem is None:
            self.state = "finished"
        elif self.problem is None or self.problem.reason == RunCancelled.stop_reason:
            self.problem = Problem(409, "cancelled", self._why_cancelled, run_id=self.id)
            self.state = "cancelled"
        else:
            self.state = "failed"

    def _options(self, timeout: float) -> RunOptions:
        options: RunOptions = {**self.asked.options, "messages": self.asked.messages, "timeout": timeout}
        if self.limits is not None:
            options["limits"] = self.limits
        if self.asked.deps is not None:
            options["deps"] = self.asked.deps
        return options

    async def _ask(self, timeout: float) -> None:
        try:
            with Adoption(self._agent, None, self._take_unwatched):
                self.result = await verbs.ask(self._agent, self.asked.input, **self._options(timeout))
        finally:
            run, self._run = self._run, None
            if self.result is None and run is not None:
                self.result = run.result

    async def _stream(self, timeout: float) -> None:
        stream = self._agent.stream(self.asked.input, buffer=EVENTS_AT_ONCE, **self._options(timeout))
        try:
            # The agent's own `run`, if it has one, begins its runs while the stream is read.
            with Adoption(self._agent, None, self._take):
                async with stream:
                    while events := await stream.take():
                        for event in events:
                            self.tell(event)
                    await stream.result()
        finally:
            self.result = stream.ended

    def _take(self, run: Run) -> None:
        if not self._has_its_id:
            run.take_id(self.id)
            self._has_its_id = True
        if self.asked.turns:
            bring_turns(run, self.asked.turns)
        if self.asked.tools is not None:
            bring_tools(run, self.asked.tools)
        if run.approve is None:  # nobody else has been named to be asked
            run.approve = _AskClients(self.approvals)

    def _take_unwatched(self, run: Run) -> None:
        self._take(run)
        self._run = run
        if self._is_watched:
            run.emitter.add_observer(self.tell)

    # ---- its events

    def tell(self, event: Event) -> None:
        """Take an event of the run, or of one below it that may be in another event loop, into the log."""
        if get_ident() != self._thread:
            call_soon(self.token, self.tell, event)
            return
        if event.run_id == self.id:
            self._note_own(event)
            if isinstance(event, RunFinished):  # told at the very end, when all tasks have ended
                self.result = event.result
                return
        json = event_json(event)
        if json is not None:
            self.log.add(event.kind, json)

    def _note_own(self, event: Event) -> None:
        match event:
            case ModelRequested():
                self.log.begin_reply()
                self._has_shown_text = False
            case TextDelta(text=text):
                self.log.add_text(text)
                self._has_shown_text = True
            case ModelResponded(message=message) if not self._has_shown_text and (text := _text_of(message)):
                # A model that was not asked to stream shows its text whole.
                self.tell(TextDelta(run_id=self.id, parent_id=None, agent_name=event.agent_name, depth=0, text=text))
            case _:
                pass


class _AskClients(Hook):
    """The approver of runs that have none of their own: whoever answers over the network."""

    def __init__(self, approvals: PendingApprovals) -> None:
        self._approvals = approvals  # nothing of a user's has to be looked at

    async def __call__(self, value: Any, context: RunContext[Any], warn: object = None) -> Approval:
        """Wait for the answer."""
        return await self._approvals.ask(value, context)


def _tell_approval(log_: EventLog, thread: int, token: EventLoopToken, approval: ApprovalPending) -> None:
    """Take a call that waits into the log of a run; from the event loop of a delegate, too."""
    if get_ident() != thread:
        call_soon(token, _tell_approval, log_, thread, token, approval)
        return
    log_.add("approval_requested", approval_json(approval))


async def wait_for(turn: Gate, seconds: float) -> float:
    """Wait for a turn, and take it.

    Returns:
        The seconds that are left, a thousandth at least.

    Raises:
        Problem: It has not come in time.
    """
    if turn.acquire_at_once():
        return seconds
    deadline = anyio.current_time() + seconds
    with anyio.move_on_after(seconds) as scope:
        await turn.acquire()
    if scope.cancelled_caught:
        raise Problem(503, "queue_timeout", "the run did not have its turn in time", retry_after=1)
    return max(deadline - anyio.current_time(), 0.001)


def _text_of(message: Mapping[str, Any]) -> str:
    """The text of an assistant's message, which may be in parts."""
    content = message.get("content")
    parts = content if is_list(content) else [{"text": content}]
    texts = [part.get("text") for part in parts if is_mapping(part)]
    return "".join(text for text in texts if isinstance(text, str))
