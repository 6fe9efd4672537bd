"""How one tool call comes to its outcome: approved, in a task or in a thread, and cut if need be."""

from __future__ import annotations

import inspect
import math
from contextlib import nullcontext
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any

import anyio

from fractal._background import Background
from fractal._current import current_call
from fractal._json import text_of
from fractal._schema import ArgumentsFault
from fractal._scopes import cancellation_was_meant, leaves
from fractal._stall import timed
from fractal._texts import described, is_a, message_of, repr_of, said_by
from fractal._threads import ThreadCall
from fractal.approval import Allow, Deny, PendingCall
from fractal.errors import AnswerRejected, RunError, ToolIgnoredCancellation
from fractal.events import ApprovalAnswered, ApprovalRequested

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    from anyio.abc import TaskGroup

    from fractal._call import Call
    from fractal.context import RunContext
    from fractal.results import Outcome
    from fractal.toolkit import Tool

__all__ = ["explain", "left_behind", "run_call"]

_NO_SCOPE = _NO_GATE = nullcontext()

# What asyncio and trio say when a function of asyncio is called, or awaited, on trio. Used for a hint, nothing more.
_ASYNCIO_ON_TRIO = ("no running event loop", "framework like asyncio")

_CANCELLED_INSIDE = "the tool was cancelled from inside: something it awaited was cancelled"


async def run_call(call: Call, group: TaskGroup, start_clock: Callable[[Call], None]) -> None:
    """Run one call to its outcome. Cancellation passes through; everything else becomes a result.

    Args:
        call: The call.
        group: Where its thread, if it needs one, may start tasks.
        start_clock: Called when somebody has approved it, and its own time begins.

    Raises:
        ToolIgnoredCancellation: It has not stopped, or something in a run below it has not, and was left to itself.
    """
    try:
        with call.scope or _NO_SCOPE:
            await _invoke_or_note_cut(call, group, start_clock)
        if call.result is None:  # only where the scope has caught a whole group of cancellations
            call.end(*_cut(call, timed_out=True))
    except (Exception, SystemExit, BaseExceptionGroup) as error:
        # Outside the scope, so that the scope has taken its own cancellation out of a group already.
        cancelled = anyio.get_cancelled_exc_class()
        raised = [leaf for leaf in leaves(error) if not is_a(leaf, cancelled)]
        if not all(is_a(leaf, (Exception, SystemExit)) for leaf in raised):
            raise  # Ctrl-C and the like are not the tool's
        if raised:
            call.exception = raised[0] if len(raised) == 1 else error
            was_cut = call.scope is not None and call.scope.cancel_called
            outcome: Outcome = "abandoned" if call.abandoned else "timeout" if was_cut else "error"
            call.end(outcome, error="; ".join(map(explain, raised)))
        else:
            call.end(*_cut(call, timed_out=call.is_out_of_time))
        stubborn = left_behind(error)
        if stubborn is not None:
            raise stubborn from stubborn.__cause__
        if is_a(error, BaseExceptionGroup):
            meant, _ = error.split(cancelled)
            if meant is not None:
                raise meant from None


async def _invoke_or_note_cut(call: Call, group: TaskGroup, start_clock: Callable[[Call], None]) -> None:
    current_call.set(call.bound.call_id)  # each call has a task, and so a context, of its own
    call.enter()
    try:
        if call.needs_approval:
            if not await _is_approved(call):
                return
            start_clock(call)
        await call.run.stop_if_cancelled()  # a tool would run as far as its first await, and a thread would begin
        await _invoke(call, group)
    except anyio.get_cancelled_exc_class() as error:
        if cancellation_was_meant(error):
            call.end(*_cut(call, timed_out=call.is_out_of_time))
            raise
        call.exception = error
        call.end("error", error=_CANCELLED_INSIDE)


def left_behind(error: BaseException) -> ToolIgnoredCancellation | None:
    """What tells of a tool that was left to itself, if anything does; no run makes a mere result of that."""
    found: ToolIgnoredCancellation | None = None
    for leaf in leaves(error):
        if is_a(leaf, ToolIgnoredCancellation):
            found = found or leaf
        elif not is_a(leaf, (Exception, SystemExit, anyio.get_cancelled_exc_class())):
            return None  # Ctrl-C and the like come first
    return found


def _cut(call: Call, timed_out: bool) -> tuple[Outcome, None, str]:
    """Outcome and text of a call that did not come to its own end."""
    seconds = call.run.now() - call.started
    waited_for = "approval" if call.needs_approval else "answer"
    why = f"no {waited_for} within {seconds:.2g} s" if timed_out else "the run was cancelled"
    if call.waits_for is not None:
        why += f"; it had not begun, and waited for {call.waits_for}"
    if call.abandoned:
        return "abandoned", None, f"{why}; the call could not be stopped and may still take effect"
    return ("timeout", None, why) if timed_out else ("cancelled", None, why)


async def _is_approved(call: Call) -> bool:
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
    reason = text_of(answer.reason or Deny().reason) if isinstance(answer, Deny) else None
    await run.tell(ApprovalAnswered, is_allowed=reason is None, arguments=call.bound.arguments, reason=reason, **facts)
    if reason is not None:
        call.end("denied", error=f"denied: {reason}")
        return False
    call.needs_approval = False
    call.started = call.run.now()
    return True


async def _approval(call: Call, pending: PendingCall) -> Allow | Deny:
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
        return Deny(f"it could not be approved: {explain(error)}")
    if isinstance(answer, bool):
        return Allow() if answer else Deny()
    if isinstance(answer, (Allow, Deny)):
        return answer
    run.warn(
        f"approve() answered {repr_of(answer)} for tool {pending.tool_name!r}: return Allow(…), Deny(…), True or False"
    )
    return Deny("the approval was not understood")


async def _invoke(call: Call, group: TaskGroup) -> None:
    tool = call.bound.tool
    assert tool is not None
    context: RunContext[Any] | None = None
    if tool.parameters.context_names:
        context = call.run.context(tool_name=tool.name, call_id=call.bound.call_id)
    positional, by_name = tool.parameters.bind(call.bound.arguments, context)
    if call.run.twins and not tool.options.idempotent:
        await _wait_for_twins(call, tool)
    function = partial(tool.function, *positional, **by_name)
    if tool.is_async:
        if call.may_be_left:
            await _in_task_of_its_own(call, partial(_in_loop, call, function, context))
        else:
            await _in_loop(call, function, context)
    else:
        if context is not None:
            context.started()
        call.returned(*await _in_thread(call, tool, function, group))


async def _wait_for_twins(call: Call, tool: Tool) -> None:
    """Let calls of the same function come to their end that nobody could stop: two at once may do harm."""
    async with call.run.twins.gate(tool.function).place(call.waiting):
        pass


async def _in_loop(call: Call, function: Callable[[], Awaitable[Any]], context: RunContext[Any] | None) -> None:
    assert call.bound.tool is not None
    gate = call.bound.tool.gate
    async with gate.place(call.waiting) if gate is not None else _NO_GATE:
        if context is not None:
            context.started()
        call.work = work = function()
        content = await timed(work, f"tool {call.bound.name!r}", call.run.warn)
    call.returned(content, text_of(content))


async def _in_task_of_its_own(call: Call, make_call: Callable[[], Awaitable[None]]) -> None:
    """Call a tool where no task group waits for it, so that it can be left to itself if it does not stop."""
    assert call.bound.tool is not None
    twins, function = call.run.twins, call.bound.tool.function

    async def work() -> None:
        try:
            await make_call()
        finally:
            if call.abandoned:
                twins.gate(function).release()
                call.run.warn_late(_late(call.bound.name, call.run.now() - abandoned_at))

    abandoned_at = math.inf
    task = Background(work, f"fractal tool {call.bound.name}")
    try:
        await task.wait()
    except anyio.get_cancelled_exc_class() as cancellation:
        grace = call.run.limits.grace or 0.0
        try:
            await task.cancel_and_join(call.run.now() + grace)
        finally:
            if not task.has_ended:
                call.abandoned, abandoned_at = True, call.run.now()
                twins.gate(function).take()
                stuck = call.bottom()
                where = stuck.name_as_stuck(grace, "the run ends without it")
                through = call.bound.name if stuck is not call else None
                # Where else would it be told? Who cancels a run believes that nothing of it is left.
                raise ToolIgnoredCancellation(
                    stuck.bound.name, where, grace, call_id=stuck.bound.call_id, through=through
                ) from cancellation
        raise
    if call.result is None:
        call.end("error", error=_CANCELLED_INSIDE)


async def _in_thread(call: Call, tool: Tool, function: Callable[[], Any], group: TaskGroup) -> tuple[Any, str]:
    def work() -> tuple[Any, str]:
        content = function()
        return content, "" if inspect.isawaitable(content) else text_of(content)

    def ended_late(seconds: float) -> None:
        call.run.warn_late(_late(tool.name, seconds))

    gates = (tool.gate,) if tool.gate is not None else ()
    abandon = tool.options.on_cancel == "abandon"
    call.work = thread = ThreadCall(
        work,
        f"tool {tool.name!r}",
        gates=gates,
        waiting=call.waiting,
        abandon=abandon,
        group=group,
        twins=partial(call.run.twins.gate, tool.function),
        on_late_end=ended_late,
    )
    try:
        content, text = await thread.run()
    finally:
        call.abandoned = thread.abandoned
    if inspect.isawaitable(content):  # a plain function that hands out a coroutine
        content = await content
        text = text_of(content)
    return content, text


def _late(name: str, seconds: float) -> str:
    return f"tool {name!r}, abandoned earlier, has ended {seconds:.2g} s after that"


_exit_code: Any = vars(SystemExit)["code"].__get__  # not by the attribute, which a user's class may replace


def explain(error: BaseException) -> str:
    """What a tool raised, for the model: one phrase for each exception of a group."""
    members = leaves(error)
    if members != [error]:
        return "; ".join(map(explain, members))
    if is_a(error, SystemExit):
        return f"the tool called sys.exit({repr_of(_exit_code(error))})"
    if is_a(error, (RunError, AnswerRejected)):  # written for the model already
        return said_by(error)
    text, hint = message_of(error), ""
    if is_a(error, (RuntimeError, TypeError)) and any(words in text for words in _ASYNCIO_ON_TRIO):
        hint = ": the tool uses asyncio, and this run is on another event loop; use anyio in it"
    return described(error) + hint
