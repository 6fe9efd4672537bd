"""The tool calls of one reply, side by side: threads, deadlines, and one outcome for each."""

from __future__ import annotations

import inspect
import logging
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any

import anyio

from fractal._json import text_of
from fractal._run import current_call
from fractal._schema import ArgumentsFault
from fractal._scopes import cancellation_was_meant, leaves, stop_if_cancelled
from fractal._threads import ThreadCall
from fractal.approval import Allow, Deny, PendingCall
from fractal.errors import AnswerRejected, BudgetExceeded, RunError, ToolFailed
from fractal.events import ApprovalAnswered, ApprovalRequested, ToolFinished, ToolStarted
from fractal.results import Outcome, ToolResult

if TYPE_CHECKING:
    from anyio.abc import TaskGroup

    from fractal._run import Run
    from fractal._step import BoundCall
    from fractal.context import RunContext
    from fractal.toolkit import Tool

__all__ = ["answer_calls", "call_tools"]

logger = logging.getLogger("fractal")

_NO_SCOPE = _NO_GATE = nullcontext()

# What asyncio and trio say when a function of asyncio is called, or awaited, on trio. Used for a hint, nothing more.
_ASYNCIO_ON_TRIO = ("no running event loop", "framework like asyncio")


class _Call:
    """One call while it runs."""

    __slots__ = (
        "_told",
        "abandoned",
        "bound",
        "cut_at",
        "exception",
        "named",
        "needs_approval",
        "result",
        "run",
        "scope",
        "started",
        "text",
    )

    def __init__(self, run: Run, bound: BoundCall) -> None:
        self.run, self.bound = run, bound
        self.started = run.now()
        self.cut_at = math.inf  # when its scope ends it
        self.scope: anyio.CancelScope | None = None  # there is one where it has a time of its own
        self.result: ToolResult | None = None
        self.text = ""  # what the model sees
        self.exception: BaseException | None = None
        self.abandoned = False
        self.named = False  # already reported as not stopping
        self.needs_approval = bound.tool is not None and bound.tool.options.requires_approval
        self._told = 0  # of its two events

    def end(self, outcome: Outcome, content: Any = None, error: str | None = None) -> None:
        """Give the call its outcome; only the first counts."""
        if self.result is not None:
            return
        bound = self.bound
        self.result = result = ToolResult(
            content=content,
            tool_name=bound.name,
            metadata={
                "arguments": bound.arguments,
                "terminate": bound.tool is not None and bound.tool.options.terminate,
            },
            error=error,
            outcome=outcome,
            elapsed=self.run.now() - self.started,
            call_id=bound.call_id,
        )
        result._exception = self.exception  # pyright: ignore[reportPrivateUsage]
        if error is not None:
            self.text = f"Error: {error}"
        if outcome == "abandoned":
            self.run.note_abandoned(result)

    @property
    def ends_run(self) -> bool:
        """Whether its result is the run's."""
        tool, result = self.bound.tool, self.result
        return tool is not None and tool.options.terminate and result is not None and result.outcome == "ok"

    @property
    def is_out_of_time(self) -> bool:
        """Whether its own time is over, or that of its run."""
        return (self.scope is not None and self.scope.cancel_called) or self.run.is_out_of_time()

    async def tell(self) -> None:
        """Tell what there is to tell by now, at the pace of whoever reads it."""
        if not self.run.feeds:
            self.tell_now()
            return
        await self.run.pace()
        self.tell_now()
        await self.run.pace()

    def tell_now(self) -> None:
        """Tell it without waiting: the start, once, and the end, once there is one."""
        bound, run = self.bound, self.run
        if not run.is_heard:
            return
        if self._told == 0:
            self._told = 1
            run.emit(ToolStarted, tool_name=bound.name, call_id=bound.call_id, arguments=bound.arguments)
        if self._told == 1 and self.result is not None:
            self._told = 2
            run.emit(ToolFinished, tool_name=bound.name, call_id=bound.call_id, result=self.result)


async def answer_calls(run: Run, calls: Sequence[BoundCall]) -> list[ToolResult]:
    """Call the tools of the transcript's last message and enter their results, in call order.

    However this ends, cancelled too, each call is answered in the transcript.

    Returns:
        The results, in call order.

    Raises:
        ToolFailed: A tool with `on_error="raise"` raised.
        BudgetExceeded: The tool calls of the run are spent; the calls that fitted were made.
    """
    running = [_Call(run, call) for call in calls]
    try:
        await _call_all(run, running)
    finally:
        for call in running:
            assert call.result is not None
            run.transcript.answer(call.bound.call_id, call.text)
            run.tool_results.append(call.result)
    _raise_for_errors(running)
    return [call.result for call in running if call.result is not None]


async def call_tools(run: Run, calls: Sequence[BoundCall]) -> list[ToolResult]:
    """Call tools without a transcript.

    Returns:
        The results, in call order; what a tool raised is in its result.
    """
    running = [_Call(run, call) for call in calls]
    await _call_all(run, running)
    return [call.result for call in running if call.result is not None]


def _raise_for_errors(calls: Sequence[_Call]) -> None:
    has_end = any(call.ends_run for call in calls)
    for call in calls:
        tool, error = call.bound.tool, call.exception
        outcome = call.result.outcome if call.result is not None else None
        if isinstance(error, BudgetExceeded) and outcome == "skipped" and not has_end:
            raise error
        if tool is None or error is None or outcome == "denied":
            continue
        if tool.is_answer and not isinstance(error, AnswerRejected):
            raise error  # a validator failed: nothing that the model could mend
        if tool.options.on_error == "raise":
            raise ToolFailed(tool.name, _explain(error)) from error


async def _call_all(run: Run, calls: Sequence[_Call]) -> None:
    """Bring each call to its outcome, however this ends."""
    try:
        # On asyncio a cancellation may reach its task a turn of the loop later than it was made.
        await stop_if_cancelled()
        for call in calls:
            await call.tell()
            _admit(call)
            if call.result is not None:
                await call.tell()
        for batch in _batches([call for call in calls if call.result is None]):
            await _Batch(run, batch).run_all()
    finally:
        for call in calls:
            call.end("skipped", error="not called: the run ended first")
            call.tell_now()


def _admit(call: _Call) -> None:
    """Answer at once what cannot be called, and reserve what can."""
    if call.bound.fault is not None:
        call.end("error", error=call.bound.fault)
    elif call.bound.tool is not None and call.bound.tool.is_answer:
        pass  # none of the tools that limits are for
    elif call.run.is_closing():
        call.end("skipped", error="not called: the time for tools is over, answer with what there is")
    else:
        try:
            call.run.budget.spend("tool_calls")
        except BudgetExceeded as error:
            call.exception = error
            call.end("skipped", error=f"not called: {error}")
            call.run.note_limit(error)


def _batches(calls: Sequence[_Call]) -> Iterator[list[_Call]]:
    """Calls that may run together; a sequential tool is a batch of its own."""
    batch: list[_Call] = []
    for call in calls:
        if call.bound.tool is not None and call.bound.tool.options.sequential:
            if batch:
                yield batch
            yield [call]
            batch = []
        else:
            batch.append(call)
    if batch:
        yield batch


class _Batch:
    """Calls that run side by side."""

    def __init__(self, run: Run, calls: Sequence[_Call]) -> None:
        self._run, self._calls = run, calls
        self._running = len(calls)
        self._news = anyio.Event()  # a call has got another deadline, or all are done

    async def run_all(self) -> None:
        """Bring each to its outcome."""
        # Every tool runs in a child task, a single one too: native asyncio cancellation hits only the task that called
        # `run()`, which then cancels the children and waits for them as it must.
        async with anyio.create_task_group() as group:
            for call in self._calls:
                call.started = self._run.now()
                call.cut_at = self._run.soft_deadline if call.needs_approval else self._cut_at(call)
                if call.cut_at < math.inf or call.needs_approval:
                    call.scope = anyio.CancelScope(deadline=call.cut_at)
                group.start_soon(self._run_one, call, group)
            try:
                await self._wait_and_name()
            except anyio.get_cancelled_exc_class():
                group.cancel_scope.cancel()
                for call in self._calls:
                    call.cut_at = min(call.cut_at, self._run.now())
                # The group would wait just as long; here those that do not stop are named.
                with anyio.CancelScope(shield=True):
                    await self._wait_and_name()
                raise

    def start_clock(self, call: _Call) -> None:
        """Let the time of a call begin that has waited for approval."""
        assert call.scope is not None
        call.scope.deadline = call.cut_at = self._cut_at(call)
        self._news.set()

    def _cut_at(self, call: _Call) -> float:
        if call.bound.tool is not None and call.bound.tool.is_answer:
            return math.inf  # what time was kept back for; the run's own deadline holds
        return min(self._run.now() + _timeout_of(call), self._run.soft_deadline)

    async def _run_one(self, call: _Call, group: TaskGroup) -> None:
        try:
            try:
                await _run_call(call, group, self)
            finally:
                await self._run.end_streams(call.bound.call_id)
            await call.tell()
        finally:
            call.tell_now()
            self._running -= 1
            if not self._running:
                self._news.set()

    async def _wait_and_name(self) -> None:
        """Wait for all calls, and name each that goes on for longer than its grace after it was cut."""
        grace = self._run.limits.grace or 0.0
        while self._running:
            unnamed = [call for call in self._calls if call.result is None and not call.named]
            await self._wait_for_news(min((call.cut_at + grace for call in unnamed), default=math.inf))
            for call in unnamed:
                if call.result is None and self._run.now() >= call.cut_at + grace:
                    call.named = True
                    self._run.warn(
                        f"tool {call.bound.name!r} has not stopped {grace:g} s after it was cancelled;"
                        " the run waits for it"
                    )

    async def _wait_for_news(self, until: float) -> None:
        if until == math.inf:
            await self._news.wait()
        else:
            with anyio.CancelScope(deadline=until):
                await self._news.wait()
        if self._running and self._news.is_set():
            self._news = anyio.Event()


def _timeout_of(call: _Call) -> float:
    tool = call.bound.tool
    timeout = tool.options.timeout if tool is not None else None
    timeout = timeout if timeout is not None else call.run.limits.tool_timeout
    return timeout if timeout is not None else math.inf


async def _run_call(call: _Call, group: TaskGroup, batch: _Batch) -> None:
    """Run one call to its outcome. Cancellation passes through; everything else becomes a result."""
    try:
        with call.scope or _NO_SCOPE:
            await _invoke_or_note_cut(call, group, batch)
        if call.result is None:  # only where the scope has caught a whole group of cancellations
            call.end(*_cut(call, timed_out=True))
    except (Exception, SystemExit, BaseExceptionGroup) as error:
        # Outside the scope, so that the scope has taken its own cancellation out of a group already.
        cancelled = anyio.get_cancelled_exc_class()
        raised = [leaf for leaf in leaves(error) if not isinstance(leaf, cancelled)]
        if not all(isinstance(leaf, (Exception, SystemExit)) for leaf in raised):
            raise  # Ctrl-C and the like are not the tool's
        if raised:
            call.exception = error
            was_cut = call.scope is not None and call.scope.cancel_called
            call.end("timeout" if was_cut else "error", error="; ".join(map(_explain, raised)))
        else:
            call.end(*_cut(call, timed_out=call.is_out_of_time))
        if isinstance(error, BaseExceptionGroup):
            meant, _ = error.split(cancelled)
            if meant is not None:
                raise meant from None


async def _invoke_or_note_cut(call: _Call, group: TaskGroup, batch: _Batch) -> None:
    current_call.set(call.bound.call_id)  # each call has a task, and so a context, of its own
    try:
        if call.needs_approval:
            if not await _is_approved(call):
                return
            batch.start_clock(call)
        await stop_if_cancelled()  # a tool would run as far as its first await, and a thread would begin
        await _invoke(call, group)
    except anyio.get_cancelled_exc_class() as error:
        if cancellation_was_meant():
            call.end(*_cut(call, timed_out=call.is_out_of_time))
            raise
        call.exception = error
        call.end("error", error="the tool was cancelled from inside: something it awaited was cancelled")


def _cut(call: _Call, timed_out: bool) -> tuple[Outcome, None, str]:
    """Outcome and text of a call that did not come to its own end."""
    seconds = call.run.now() - call.started
    waited_for = "approval" if call.needs_approval else "answer"
    why = f"no {waited_for} within {seconds:.2g} s" if timed_out else "the run was cancelled"
    if call.abandoned:
        return "abandoned", None, f"{why}; the call could not be stopped and may still take effect"
    return ("timeout", None, why) if timed_out else ("cancelled", None, why)


async def _is_approved(call: _Call) -> bool:
    """Have somebody say whether a call may be made, and with what; ends it if not."""
    run, bound = call.run, call.bound
    assert bound.tool is not None
    facts: dict[str, Any] = {"tool_name": bound.name, "call_id": bound.call_id}
    await run.tell(ApprovalRequested, arguments=bound.arguments, **facts)
    answer = await _approval(call, PendingCall(arguments=bound.arguments, description=bound.tool.description, **facts))
    if isinstance(answer, Allow) and answer.arguments is not None:
        try:
            call.bound = bound = replace(bound, arguments=bound.tool.parameters.check(answer.arguments))
        except ArgumentsFault as fault:
            answer = Deny(f"it was approved with other arguments, which do not fit: {fault}")
    # Not by the reason alone: somebody may deny without one.
    reason = str(answer.reason or Deny().reason) if isinstance(answer, Deny) else None
    await run.tell(ApprovalAnswered, is_allowed=reason is None, arguments=call.bound.arguments, reason=reason, **facts)
    if reason is not None:
        call.end("denied", error=f"denied: {reason}")
        return False
    call.needs_approval = False
    call.started = call.run.now()
    return True


async def _approval(call: _Call, pending: PendingCall) -> Allow | Deny:
    """Somebody's word; a call that nobody can answer for, or whose approver fails, is not made."""
    run = call.run
    if run.approve is None:
        run.warn(f"tool {pending.tool_name!r} requires approval and there is nobody to ask: pass approve=")
        return Deny("there is nobody to approve it")
    context = run.context(tool_name=pending.tool_name, call_id=pending.call_id)
    context.started()
    try:
        answer = await run.approve(pending, context, run.warn)
    except Exception as error:
        call.exception = error
        return Deny(f"it could not be approved: {_explain(error)}")
    if isinstance(answer, bool):
        return Allow() if answer else Deny()
    if isinstance(answer, (Allow, Deny)):
        return answer
    run.warn(f"approve() answered {answer!r} for tool {pending.tool_name!r}: return Allow(…), Deny(…), True or False")
    return Deny("the approval was not understood")


async def _invoke(call: _Call, group: TaskGroup) -> None:
    tool = call.bound.tool
    assert tool is not None
    context: RunContext[Any] | None = None
    if tool.parameters.context_names:
        context = call.run.context(tool_name=tool.name, call_id=call.bound.call_id)
    positional, by_name = tool.parameters.bind(call.bound.arguments, context)
    if tool.is_async:
        async with tool.gate or _NO_GATE:
            if context is not None:
                context.started()
            content = await tool.function(*positional, **by_name)
        text = text_of(content)
    else:
        if context is not None:
            context.started()
        content, text = await _in_thread(call, tool, partial(tool.function, *positional, **by_name), group)
    call.text = text
    call.end("ok", content)


async def _in_thread(call: _Call, tool: Tool, function: Callable[[], Any], group: TaskGroup) -> tuple[Any, str]:
    def work() -> tuple[Any, str]:
        content = function()
        return content, "" if inspect.isawaitable(content) else text_of(content)

    def ended_late() -> None:
        logger.info("tool %r, abandoned earlier, has ended", tool.name)

    gates = (tool.gate,) if tool.gate is not None else ()
    abandon = tool.options.on_cancel == "abandon"
    thread = ThreadCall(work, gates=gates, abandon=abandon, group=group, on_late_end=ended_late)
    try:
        content, text = await thread.run()
    finally:
        call.abandoned = thread.abandoned
    if inspect.isawaitable(content):  # a plain function that hands out a coroutine
        content = await content
        text = text_of(content)
    return content, text


def _explain(error: BaseException) -> str:
    """What a tool raised, for the model: one phrase for each exception of a group."""
    members = leaves(error)
    if members != [error]:
        return "; ".join(map(_explain, members))
    if isinstance(error, SystemExit):
        return f"the tool called sys.exit({error.code!r})"
    text = text_of(str(error))
    if isinstance(error, (RunError, AnswerRejected)):  # written for the model already
        return text
    hint = ""
    if isinstance(error, (RuntimeError, TypeError)) and any(words in text for words in _ASYNCIO_ON_TRIO):
        hint = ": the tool uses asyncio, and this run is on another event loop; use anyio in it"
    return f"{type(error).__name__}: {text}{hint}" if text else type(error).__name__
