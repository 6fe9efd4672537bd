"""How one tool call comes to its outcome: approved, in a task or in a thread, and cut if need be."""

from __future__ import annotations

import inspect
import math
from contextlib import nullcontext
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any

import anyio

from fractal._approve import is_approved
from fractal._background import Background
from fractal._copies import recorded
from fractal._current import current_call
from fractal._explain import explain
from fractal._json import text_of
from fractal._overrides import current_through, returned_as
from fractal._returned import is_plain, read_in_thread, read_up
from fractal._scopes import cancellation_was_meant, leaves
from fractal._stall import timed
from fractal._texts import is_a
from fractal._threads import ThreadCall
from fractal.errors import ToolIgnoredCancellation
from fractal.results import ToolResult

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    from anyio.abc import TaskGroup

    from fractal._call import Call
    from fractal.context import RunContext
    from fractal.results import Outcome
    from fractal.toolkit import Tool

__all__ = ["left_behind", "run_call"]

_NO_SCOPE = _NO_GATE = nullcontext()

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
            if not await is_approved(call):
                return
            start_clock(call)
        await call.run.stop_if_cancelled()  # a tool would run as far as its first await, and a thread would begin
        if call.through is not None:
            await _ask_agent(call)
        else:
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


async def _ask_agent(call: Call) -> None:
    """Make a call by the agent's own `execute_tool`, which calls ours for what is inside."""
    assert call.through is not None
    agent, bound, warn = call.run.agent, call.bound, call.run.warn
    within, record = current_through.set(call), recorded(bound.arguments)
    try:
        answer = await timed(call.through(bound.name, bound.arguments, warn=warn), "execute_tool", warn)
    finally:
        current_through.reset(within)
        call.bound = replace(bound, arguments=record)
    result = returned_as(ToolResult, answer, agent, "execute_tool")
    if result.error is not None:
        call.exception = result.exception
        call.end(result.outcome if result.outcome != "ok" else "error", error=result.error)
        return
    content = result.content
    if type(content) is not str and not is_plain(content):
        content = await timed(read_up(content), "execute_tool", warn)
    call.returned(content, text_of(content))


async def _invoke(call: Call, group: TaskGroup) -> None:
    tool = call.bound.tool
    assert tool is not None
    context: RunContext[Any] | None = None
    if tool.parameters.context_names:
        context = call.run.context(tool_name=tool.name, call_id=call.bound.call_id)
    positional, by_name = tool.parameters.bind(call.bound.arguments, context)
    record = recorded(call.bound.arguments)
    if record is not call.bound.arguments:
        call.bound = replace(call.bound, arguments=record)
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
        content: Any = work
        if not hasattr(work, "__anext__"):  # an async generator is not awaited, but read
            content = await timed(work, f"tool {call.bound.name!r}", call.run.warn)
        if type(content) is not str and not is_plain(content):
            content = await timed(read_up(content), f"tool {call.bound.name!r}", call.run.warn)
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
    def work() -> tuple[Any, str | None]:
        content = function()
        if inspect.isawaitable(content):
            return content, None
        content, is_whole = read_in_thread(content)
        return content, text_of(content) if is_whole else None

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
    if text is None:  # a plain function that hands out a coroutine, or what has to be read in the loop
        content = await read_up(await content if inspect.isawaitable(content) else content)
        text = text_of(content)
    return content, text


def _late(name: str, seconds: float) -> str:
    return f"tool {name!r}, abandoned earlier, has ended {seconds:.2g} s after that"
