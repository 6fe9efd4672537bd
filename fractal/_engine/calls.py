"""The tool calls of one reply, side by side: threads, deadlines, and one outcome for each."""

from __future__ import annotations

import math
from contextlib import suppress
from functools import partial
from itertools import chain
from typing import TYPE_CHECKING, Any

import anyio
from anyio.lowlevel import checkpoint

from fractal._concurrency.background import spawn
from fractal._concurrency.scopes import first_of, unexpected
from fractal._engine.below import origin_here
from fractal._engine.call import Call
from fractal._engine.explain import explain
from fractal._engine.invoke import leave, run_call
from fractal._engine.step import bind
from fractal._texts import is_a
from fractal.errors import AnswerRejected, ApprovalPending, BudgetExceeded, RunError, ToolErrors, ToolFailed, UserError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence

    from fractal._engine.run import Run
    from fractal._engine.step import BoundCall
    from fractal.results import ToolResult
    from fractal.toolkit import Tool

__all__ = ["answer_calls", "call_inside", "call_within"]

CALLS_AT_A_TIME = 1000
"""Calls of one reply that are under way at once; more wait for these. Each takes a task, and time to be cancelled."""

_ENDED_FIRST = "not called: the run ended first"


async def answer_calls(run: Run, calls: Sequence[BoundCall]) -> list[ToolResult]:
    """Call the tools of the transcript's last message and enter their results, in call order.

    However this ends, cancelled too, each call is answered in the transcript.

    Returns:
        The results, in call order.

    Raises:
        ToolFailed: A tool with `on_error="raise"` raised.
        BudgetExceeded: The tool calls of the run are spent; the calls that fitted were made.
        ToolErrors: Several of these.
        ToolIgnoredCancellation: A tool was left to itself.
    """
    made: list[Call] = []
    through, around = run.settings.execute_tool, run.hooks.around_tool
    try:
        for start in range(0, len(calls), CALLS_AT_A_TIME):
            if made:
                await checkpoint()  # where deadlines are looked at
            some = calls[start : start + CALLS_AT_A_TIME]
            running = [Call(run, call, through=through, around=around) for call in some]
            if run.journaled is not None:
                run.journaled.take_calls(run, running, len(made))
            made += running
            await _call_all(run, running)
    finally:
        for call in chain(made, (_never_begun(run, call) for call in calls[len(made) :])):
            assert call.result is not None
            run.transcript.answer(call.bound.call_id, call.text)
            run.tool_results.append(call.result)
    if any(call.exception is not None for call in made):
        _raise_for_errors(made)
    return [call.result for call in made if call.result is not None]


async def call_within(run: Run, bound: BoundCall) -> ToolResult:
    """Call a tool for a user's function that works for a run; the call is no part of the run's transcript.

    Returns:
        How it ended; what the tool raised is in it.
    """
    return await _call_alone(Call(run, bound, around=run.hooks.around_tool))


async def call_inside(outer: Call, arguments: Mapping[str, Any], tools: Mapping[str, Tool]) -> ToolResult:
    """Call the tool of a call that went to the agent's own `execute_tool`.

    Args:
        outer: That call.
        arguments: What it is called with: as it was asked, or others.
        tools: The tools there are, by name.
    """
    bound = outer.bound
    if bound.fault is not None or not _is_same(arguments, bound.arguments):
        bound = bind(bound.call_id, bound.name, arguments, tools)
    return await _call_alone(Call(outer.run, bound, outer=outer, around=outer.run.hooks.around_tool))


async def _call_alone(call: Call) -> ToolResult:
    """Bring one call to its outcome in a task of its own, since the calling task is a user's function's."""
    await origin_here().do(partial(_call_all, call.run, [call]), f"fractal call of {call.bound.name}")
    assert call.result is not None
    return call.result


def _is_same(some: Mapping[str, Any], others: Mapping[str, Any]) -> bool:
    """Whether arguments are those that have been checked, by identity: `==` of a user's class may say anything."""
    return some.keys() == others.keys() and all(value is others[name] for name, value in some.items())


def _never_begun(run: Run, bound: BoundCall) -> Call:
    """A call that the run did not come to."""
    call = Call(run, bound)
    call.end("skipped", error=_ENDED_FIRST)
    call.tell_now()
    return call


def _raise_for_errors(calls: Sequence[Call]) -> None:
    failures = list(_failures(calls))
    raised = [call.exception for call in calls if call.exception is not None]
    waiting = [error for error in raised if is_a(error, ApprovalPending)]
    if waiting and not failures:
        raise ApprovalPending([pending for each in waiting for pending in each.pending])
    misuse = [failure for failure in failures if is_a(failure, UserError)]
    if len(failures) > 1 and not misuse:
        raise ToolErrors([each if is_a(each, RunError) else unexpected(each) for each in failures])
    for failure in misuse or failures:
        raise failure


def _failures(calls: Sequence[Call]) -> Iterator[BaseException]:
    """The exceptions that end the run, in call order."""
    spent = any(call.ends_run for call in calls)  # an answer is there: no matter what else the budget did not allow
    for call in calls:
        tool, error = call.bound.tool, call.exception
        outcome = call.result.outcome if call.result is not None else None
        if is_a(error, BudgetExceeded) and outcome == "skipped":
            if not spent:
                spent = True  # told once
                yield error
        elif tool is None or error is None or outcome == "denied" or is_a(error, ApprovalPending):
            continue
        elif tool.is_answer and not is_a(error, AnswerRejected):
            yield error  # a validator failed: nothing that the model could mend
        elif tool.options.on_error == "raise":
            failure = ToolFailed(tool.name, explain(error))
            failure.__cause__ = error
            yield failure


async def _call_all(run: Run, calls: Sequence[Call]) -> None:
    """Bring each call to its outcome, in whatever way this ends."""
    try:
        # On asyncio a cancellation may reach its task a turn of the loop later than it was made.
        await run.clock.stop_if_cancelled()
        has_listeners = run.emitter.has_listeners
        if has_listeners:
            await checkpoint()  # somebody who was told of the reply may have cancelled whoever has called the run
        spent: BudgetExceeded | None = None
        new = calls if run.journaled is None else await run.journaled.recall_calls(calls)
        for call in new:
            if has_listeners:
                await call.tell()
            spent = _admit(call, spent)
            if has_listeners and call.result is not None:
                await call.tell()
        for batch in _batches([call for call in new if call.result is None]):
            await _CallBatch(run, batch).run_all()
    finally:
        for call in calls:
            if call.result is None:
                call.end("skipped", error=_ENDED_FIRST)
            call.tell_now()


def _admit(call: Call, spent: BudgetExceeded | None) -> BudgetExceeded | None:
    """Charge a call, and answer one that cannot be made at once.

    Args:
        call: The call.
        spent: What an earlier call of the same reply was refused with, or None.

    Returns:
        What this one was refused with, or that.
    """
    run, bound = call.run, call.bound
    named = bound.tool or run.tools.get(bound.name)
    if call.outer is not None or (named is not None and named.is_answer):
        pass  # charged already; none of the tools that limits are for
    elif bound.fault is None and run.clock.is_closing():
        call.end("skipped", error="not called: the time for tools is over, answer with what there is")
    else:
        if spent is None:
            try:
                run.budget.spend("tool_calls")
            except BudgetExceeded as error:
                spent = error
        if spent is not None:
            call.exception = spent
            call.end("skipped", error=f"not called: {spent}")
            run.emitter.emit_limit(spent)
    if bound.fault is not None and call.through is None:
        call.end("error", error=bound.fault)
    return spent


def _batches(calls: Sequence[Call]) -> Iterator[list[Call]]:
    """The calls in groups that may run together; a call of a sequential tool is a group of its own."""
    batch: list[Call] = []
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


class _CallBatch:
    """Calls that run side by side, each in a task of its own; also for a single call."""

    __slots__ = ("_calls", "_fatal", "_news", "_run", "_running")

    def __init__(self, run: Run, calls: Sequence[Call]) -> None:
        self._run, self._calls = run, calls
        self._running = len(calls)
        self._news = anyio.Event()  # a call has got another deadline, or all are done
        self._fatal: list[BaseException] = []  # what no outcome of a call stands for

    async def run_all(self) -> None:
        """Bring each call to its outcome.

        Raises:
            ToolIgnoredCancellation: One was left to itself, and with it the run.
            BaseException: Ctrl-C and the like.
        """
        run, start_clock, note_end = self._run, self._start_clock, self._note_end
        for call in self._calls:
            call.start_clock(run.clock.soft_deadline if call.needs_approval else self._cut_at(call))
            run.open_calls[call.key] = call
        # All have a scope by now: of an event loop with eager tasks one may cut the others before they are started.
        for call in self._calls:
            spawn(run.clock.token, self._run_one(call, start_clock), call.bound.name, partial(note_end, call))
        try:
            await self._wait_and_name()
        except anyio.get_cancelled_exc_class():
            self._stop()
            await self._wait_and_name_all()
            if not self._fatal:
                raise
        if self._fatal:
            raise first_of(self._fatal)

    def _start_clock(self, call: Call) -> None:
        """Start the clock of a call that has waited for approval."""
        call.start_clock(self._cut_at(call))
        self._news.set()

    def _cut_at(self, call: Call) -> float:
        if call.bound.tool is not None and call.bound.tool.is_answer:
            return math.inf  # what time was kept back for; the run's own deadline holds
        return min(self._run.clock.now() + _timeout_of(call), self._run.clock.soft_deadline)

    async def _run_one(self, call: Call, start_clock: Callable[[Call], None]) -> None:
        run = self._run
        try:
            try:
                await run_call(call, start_clock, _call_alone)
                if call.journaled is not None and not call.is_left:
                    with call.new_scope(run.clock.deadline) as scope:
                        if call.is_stopped:
                            scope.cancel()  # which leaves time to record it
                        await call.journaled.finish(call)
            except BaseException as error:
                if not run.clock.is_here:  # pragma: no cover - an event loop that was closed: nothing can be awaited
                    raise
                self._fail(error)
            if run.below and not call.is_left:
                await run.below.end(call.key)
            # Whatever begins later belongs to the run alone.
            run.open_calls.pop(call.key, None)
            if run.emitter.feeds and not call.is_stopped:
                with call.new_scope(run.clock.deadline):
                    await call.tell()
        finally:
            self._note_end(call)

    def _note_end(self, call: Call, _: object = None) -> None:
        """Note the end of a call's task; asyncio may cancel that before its first step, when it cannot do so itself."""
        if call.is_over:
            return
        call.is_over = True
        if call.is_left:
            call.end_late()
            return
        call.tell_now()
        self._count_down()

    def _count_down(self) -> None:
        self._running -= 1
        if not self._running:
            self._news.set()

    def _fail(self, error: BaseException) -> None:
        """End the calls, and the run with them."""
        self._fatal.append(error)
        self._stop()

    def _stop(self) -> None:
        now = self._run.clock.now()
        for call in self._calls:
            if not call.is_over:
                call.stop(now)
        self._news.set()

    async def _wait_and_name_all(self) -> None:
        """Wait for calls that are all stopped, however often the run is cancelled meanwhile."""
        while self._running:
            with suppress(anyio.get_cancelled_exc_class()):  # asyncio's own, which no shield keeps out
                with anyio.CancelScope(shield=True):
                    await self._wait_and_name()

    async def _wait_and_name(self) -> None:
        """Wait for all calls, and see to those that are cut."""
        while self._running:
            until = min([call.look_at for call in self._calls if call.result is None], default=math.inf)
            await self._wait_for_news(until)
            if until != math.inf:
                self._see_to_cut_calls()

    async def _wait_for_news(self, until: float) -> None:
        if until == math.inf:
            await self._news.wait()
        else:
            with anyio.CancelScope(deadline=until):
                await self._news.wait()
        if self._running and self._news.is_set():
            self._news = anyio.Event()

    def _see_to_cut_calls(self) -> None:
        """End what cut calls have begun; name those that go on after their grace, or leave them behind."""
        # A call wakes the waiting run at its `look_at`, which moves on: first to the moment in which it is cut, by its
        # own time or with the run; then to the end of its grace. Until that, each look only cancels what the call has
        # begun where its scopes do not reach, and whoever began it may begin more. At the end of the grace it is named
        # as stuck, once, and the run waits on, with no further looks: it cannot end before its calls. Only where
        # `on_stubborn="raise"` and nothing but async code is stuck is it left behind: then it has an outcome at once,
        # is counted as done though its task goes on, and `_note_end` must not count it again when that ends.
        now = self._run.clock.now()
        for call in self._calls:
            if call.result is None and now >= call.look_at and call.see_to_it(now):
                self._fail(leave(call))
                self._count_down()


def _timeout_of(call: Call) -> float:
    tool = call.bound.tool
    timeout = tool.options.timeout if tool is not None else None
    timeout = timeout if timeout is not None else call.run.limits.tool_timeout
    return timeout if timeout is not None else math.inf
