"""The tool calls of one reply, side by side: threads, deadlines, and one outcome for each."""

from __future__ import annotations

import inspect
import logging
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from functools import partial
from typing import TYPE_CHECKING, Any

import anyio

from fractal._json import text_of
from fractal._run import current_call
from fractal._scopes import cancellation_was_meant, leaves
from fractal._threads import ThreadCall
from fractal.errors import BudgetExceeded, RunError, ToolFailed
from fractal.events import ToolFinished, ToolStarted
from fractal.results import Outcome, ToolResult

if TYPE_CHECKING:
    from anyio.abc import TaskGroup

    from fractal._run import Run
    from fractal._step import BoundCall
    from fractal.toolkit import Tool

__all__ = ["answer_calls", "call_tools"]

logger = logging.getLogger("fractal")

# What asyncio and trio say when a function of asyncio is called, or awaited, on trio. Used for a hint, nothing more.
_ASYNCIO_ON_TRIO = ("no running event loop", "framework like asyncio")


class _Call:
    """One call while it runs."""

    __slots__ = ("abandoned", "bound", "cut_at", "exception", "named", "result", "run", "started", "text")

    def __init__(self, run: Run, bound: BoundCall) -> None:
        self.run, self.bound = run, bound
        self.started = anyio.current_time()
        self.cut_at = math.inf  # when its scope ends it
        self.result: ToolResult | None = None
        self.text = ""  # what the model sees
        self.exception: BaseException | None = None
        self.abandoned = False
        self.named = False  # already reported as not stopping

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
            elapsed=anyio.current_time() - self.started,
            call_id=bound.call_id,
        )
        result._exception = self.exception  # pyright: ignore[reportPrivateUsage]
        if error is not None:
            self.text = f"Error: {error}"
        if outcome == "abandoned":
            self.run.note_abandoned(result)
        self.run.emit(ToolFinished, tool_name=bound.name, call_id=bound.call_id, result=result)


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
    for call in calls:
        tool, error = call.bound.tool, call.exception
        if isinstance(error, BudgetExceeded) and call.result is not None and call.result.outcome == "skipped":
            raise error
        if tool is not None and error is not None and tool.options.on_error == "raise":
            raise ToolFailed(tool.name, _explain(error)) from error


async def _call_all(run: Run, calls: Sequence[_Call]) -> None:
    """Bring each call to its outcome, however this ends."""
    try:
        for call in calls:
            run.emit(ToolStarted, tool_name=call.bound.name, call_id=call.bound.call_id, arguments=call.bound.arguments)
            _admit(call)
        for batch in _batches([call for call in calls if call.result is None]):
            await _side_by_side(run, batch)
    finally:
        for call in calls:
            call.end("skipped", error="not called: the run ended first")


def _admit(call: _Call) -> None:
    """Answer at once what cannot be called, and reserve what can."""
    if call.bound.fault is not None:
        call.end("error", error=call.bound.fault)
    elif call.run.is_closing():
        call.end("skipped", error="not called: the time for tools is over, answer with what there is")
    else:
        try:
            call.run.budget.spend("tool_calls")
        except BudgetExceeded as error:
            call.exception = error
            call.end("skipped", error=f"not called: {error}")


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


async def _side_by_side(run: Run, calls: list[_Call]) -> None:
    all_done = anyio.Event()
    running = len(calls)

    # Every tool runs in a child task, a single one too: native asyncio cancellation hits only the task that called
    # `run()`, which then cancels the children and waits for them as it must.
    async def run_one(call: _Call) -> None:
        nonlocal running
        try:
            await _run_call(call, group)
        finally:
            running -= 1
            if not running:
                all_done.set()

    async with anyio.create_task_group() as group:
        for call in calls:
            call.cut_at = min(anyio.current_time() + _timeout_of(call), run.soft_deadline)
            group.start_soon(run_one, call)
        try:
            await _wait_and_name(run, calls, all_done)
        except anyio.get_cancelled_exc_class():
            group.cancel_scope.cancel()
            for call in calls:
                call.cut_at = min(call.cut_at, anyio.current_time())
            # The group would wait just as long; here those that do not stop are named.
            with anyio.CancelScope(shield=True):
                await _wait_and_name(run, calls, all_done)
            raise


async def _wait_and_name(run: Run, calls: Sequence[_Call], all_done: anyio.Event) -> None:
    """Wait for all calls, and name each that goes on for longer than its grace after it was cut."""
    grace = run.limits.grace or 0.0
    while not all_done.is_set():
        unnamed = [call for call in calls if call.result is None and not call.named]
        with anyio.CancelScope(deadline=min((call.cut_at + grace for call in unnamed), default=math.inf)):
            await all_done.wait()
        for call in unnamed:
            if call.result is None and anyio.current_time() >= call.cut_at + grace:
                call.named = True
                run.warn(
                    f"tool {call.bound.name!r} has not stopped {grace:g} s after it was cancelled; the run waits for it"
                )


def _timeout_of(call: _Call) -> float:
    tool = call.bound.tool
    timeout = tool.options.timeout if tool is not None else None
    timeout = timeout if timeout is not None else call.run.limits.tool_timeout
    return timeout if timeout is not None else math.inf


async def _run_call(call: _Call, group: TaskGroup) -> None:
    """Run one call to its outcome. Cancellation passes through; everything else becomes a result."""
    scope = anyio.CancelScope(deadline=call.cut_at)
    try:
        with scope:
            await _invoke_or_note_cut(call, scope, group)
        # Only a scope that has caught a whole group of cancellations gets here without an outcome.
        call.end(*_cut(call, timed_out=True))
    except (Exception, SystemExit, BaseExceptionGroup) as error:
        # Outside the scope, so that the scope has taken its own cancellation out of a group already.
        cancelled = anyio.get_cancelled_exc_class()
        raised = [leaf for leaf in leaves(error) if not isinstance(leaf, cancelled)]
        if not all(isinstance(leaf, (Exception, SystemExit)) for leaf in raised):
            raise  # Ctrl-C and the like are not the tool's
        if raised:
            call.exception = error
            call.end("timeout" if scope.cancel_called else "error", error="; ".join(map(_explain, raised)))
        else:
            call.end(*_cut(call, timed_out=scope.cancel_called or call.run.is_out_of_time()))
        if isinstance(error, BaseExceptionGroup):
            meant, _ = error.split(cancelled)
            if meant is not None:
                raise meant from None


async def _invoke_or_note_cut(call: _Call, scope: anyio.CancelScope, group: TaskGroup) -> None:
    try:
        await _invoke(call, group)
    except anyio.get_cancelled_exc_class() as error:
        if cancellation_was_meant():
            call.end(*_cut(call, timed_out=scope.cancel_called or call.run.is_out_of_time()))
            raise
        call.exception = error
        call.end("error", error="the tool was cancelled from inside: something it awaited was cancelled")


def _cut(call: _Call, timed_out: bool) -> tuple[Outcome, None, str]:
    """Outcome and text of a call that did not come to its own end."""
    seconds = anyio.current_time() - call.started
    why = f"no answer within {seconds:.2g} s" if timed_out else "the run was cancelled"
    if call.abandoned:
        return "abandoned", None, f"{why}; the call could not be stopped and may still take effect"
    return ("timeout", None, why) if timed_out else ("cancelled", None, why)


async def _invoke(call: _Call, group: TaskGroup) -> None:
    tool = call.bound.tool
    assert tool is not None
    current_call.set(call.bound.call_id)  # each call has a task, and so a context, of its own
    context = call.run.context(tool_name=tool.name, call_id=call.bound.call_id)
    positional, by_name = tool.parameters.bind(call.bound.arguments, context)
    if tool.is_async:
        async with tool.gate or nullcontext():
            context.started()
            content = await tool.function(*positional, **by_name)
        text = text_of(content)
    else:
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
    if isinstance(error, RunError):  # a delegate's word, already written for the model
        return text
    hint = ""
    if isinstance(error, (RuntimeError, TypeError)) and any(words in text for words in _ASYNCIO_ON_TRIO):
        hint = ": the tool uses asyncio, and this run is on another event loop; use anyio in it"
    return f"{type(error).__name__}: {text}{hint}" if text else type(error).__name__
