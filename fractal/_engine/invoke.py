"""How one tool call comes to its outcome: approved, in a task or in a thread, and cut if need be."""

from __future__ import annotations

import inspect
from contextlib import suppress
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any

import anyio
from anyio.lowlevel import checkpoint

from fractal._concurrency.background import Background
from fractal._concurrency.grace import graced
from fractal._concurrency.scopes import is_cancellation, is_cut, leaves
from fractal._concurrency.stall import timed
from fractal._concurrency.threads import ThreadCall
from fractal._copies import recorded
from fractal._engine.approve import is_approved
from fractal._engine.around_tool import go_around, take_answer
from fractal._engine.call import Call, ended_late
from fractal._engine.explain import explain
from fractal._engine.observers import enter_call
from fractal._engine.overrides import current_through, returned_as
from fractal._functions.returned import is_plain, read_in_thread, read_up
from fractal._json import text_of
from fractal._texts import is_a
from fractal.errors import ToolIgnoredCancellation
from fractal.results import ToolResult

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Coroutine

    from fractal._engine.around_tool import Inside
    from fractal.context import RunContext
    from fractal.results import Outcome
    from fractal.toolkit import Tool

__all__ = ["leave", "run_call"]

_CANCELLED_INSIDE = "the tool was cancelled from inside: something it awaited was cancelled"


async def run_call(call: Call, start_clock: Callable[[Call], None], inside: Inside) -> None:
    """Run one call to its outcome, in a task of its own; a cancelled one too, whose run raises the cancellation.

    Args:
        call: The call.
        start_clock: Called when somebody has approved it, and its own time begins.
        inside: Brings a call inside of it to its outcome, for the hooks around it.

    Raises:
        ToolIgnoredCancellation: Something in a run below it was left to itself.
        BaseException: Ctrl-C and the like.
    """
    assert call.scope is not None
    try:
        with call.scope:
            await _approve_and_invoke(call, start_clock, inside)
    except BaseException as error:
        # Outside the scope, so that the scope has taken its own cancellation out of a group already.
        with suppress(anyio.get_cancelled_exc_class()):  # asyncio's own, once more
            await _end_with(call, error)
    if call.result is None:  # the scope has caught the cancellation, or another has come on top of it
        call.end(*_cut(call, timed_out=call.is_out_of_time))
    if getattr(call.task, "_must_cancel", False):  # by which AnyIO, too, knows what asyncio has yet to tell
        with suppress(anyio.get_cancelled_exc_class()):
            await checkpoint()  # a tool has cancelled its own task: no matter of anybody else


def leave(call: Call) -> ToolIgnoredCancellation:
    """Leave a call that does not stop behind; returns the exception for that.

    Where else would it be told? Whoever cancels a run believes that nothing of it is left.
    """
    tool, run = call.bound.tool, call.run
    call.is_left = call.abandoned = True
    call.left_at = run.clock.now()
    if tool is not None:
        run.duplicates.gate(tool.function).take()
    run.below.leave(call.key)
    run.open_calls.pop(call.key, None)
    stuck, grace = call.innermost(), run.grace
    where = stuck.name_as_stuck(grace, "the run ends without it")
    error = ToolIgnoredCancellation(
        stuck.bound.name,
        where,
        grace,
        call_id=stuck.bound.call_id,
        through=call.bound.name if stuck.bound.call_id != call.bound.call_id else None,
    )
    call.exception = error
    call.end("abandoned", error=explain(error))
    call.tell_now()
    return error


async def _approve_and_invoke(call: Call, start_clock: Callable[[Call], None], inside: Inside) -> None:
    call.enter()
    if companions := call.run.emitter.companions:
        enter_call(companions, call.run.run_id, call.bound.call_id)
    if call.needs_approval:
        if not await is_approved(call):
            return
        # Whoever allows a call of a run that somebody cancels in this moment is late.
        await call.run.clock.let_cancellation_arrive()
        start_clock(call)
    if call.scope is not None and call.scope.cancel_called:  # nothing else is around the task
        await checkpoint()  # a tool would run as far as its first await, and a thread would begin
    if call.journaled is not None:
        await call.journaled.start()
    if call.through is not None:
        await _ask_agent(call)
    elif call.around:
        await go_around(call, inside)
    else:
        await _invoke(call)


async def _end_with(call: Call, error: BaseException) -> None:
    """Give a call the outcome that an exception stands for; re-raise what is not the tool's."""
    # Which way an exception takes, the first that fits; of a group all leaves count, its cancellations apart:
    # 1. Ctrl-C and the like, anywhere in it, are nobody's result: they leave as they came and end the run.
    # 2. Exceptions are the tool's, and its outcome, even if a cancellation came beside them: they say more.
    # 3. Nothing but a cancellation is ours if the call's scope, or one around it, is cancelled: a cut call. The
    #    cancellation ends here, for this task is the call's alone; the run's own task passes on what was meant for it.
    # 4. A cancellation that no scope has asked for came from inside, from a task that the tool awaited: an error.
    # A tool that was left behind in a run below goes on upwards in each of the ways but the first, which precedes it:
    # the call has its outcome, and whoever cancels must learn that something still runs.
    raised = [leaf for leaf in leaves(error) if not is_cancellation(leaf)]
    if not all(is_a(leaf, (Exception, SystemExit)) for leaf in raised):
        raise error
    if raised:
        call.exception = raised[0] if len(raised) == 1 else error
        outcome: Outcome = "abandoned" if call.abandoned else "timeout" if call.is_past_own_time else "error"
        call.end(outcome, error="; ".join(map(explain, raised)))
    elif (call.scope is not None and call.scope.cancel_called) or await is_cut():
        call.end(*_cut(call, timed_out=call.is_out_of_time))
    else:
        call.exception = error
        call.end("error", error=_CANCELLED_INSIDE)
    stubborn = _left_behind(error)
    if stubborn is not None:
        raise stubborn from stubborn.__cause__


def _left_behind(error: BaseException) -> ToolIgnoredCancellation | None:
    """The exception for a tool that was left behind, if there is one; no run may turn it into a mere result."""
    found: ToolIgnoredCancellation | None = None
    for leaf in leaves(error):
        if is_a(leaf, ToolIgnoredCancellation):
            found = found or leaf
        elif not (is_a(leaf, (Exception, SystemExit)) or is_cancellation(leaf)):
            return None  # Ctrl-C and the like come first
    return found


def _cut(call: Call, timed_out: bool) -> tuple[Outcome, None, str]:
    """Outcome, result and error of a call that was cut."""
    seconds = call.run.clock.now() - call.started
    what = "no approval within" if call.needs_approval else "timed out after"
    why = f"{what} {seconds:.2g} s" if timed_out else "the run was cancelled"
    if call.waits_for is not None:
        why += f"; it had not begun, and waited for {call.waits_for}"
    if call.abandoned:
        return "abandoned", None, f"{why}; the call could not be stopped and may still take effect"
    return ("timeout", None, why) if timed_out else ("cancelled", None, why)


async def _ask_agent(call: Call) -> None:
    """Make a call through the agent's own `execute_tool`, which calls ours inside."""
    assert call.through is not None
    agent, bound, warn = call.run.agent, call.bound, call.run.emitter.warn
    within, record = current_through.set(call), recorded(bound.arguments)
    try:
        call.work = work = call.through(bound.name, bound.arguments, warn=warn)
        answer = await work
    finally:
        current_through.reset(within)
        call.bound = replace(bound, arguments=record)
    await take_answer(call, returned_as(ToolResult, answer, agent, "execute_tool"), "execute_tool")


async def _invoke(call: Call) -> None:
    tool = call.bound.tool
    assert tool is not None
    context: RunContext[Any] | None = None
    if tool.parameters.context_names:
        context = call.run.context(tool_name=tool.name, call_id=call.bound.call_id)
    positional, by_name = tool.parameters.bind(call.bound.arguments, context)
    record = recorded(call.bound.arguments)
    if record is not call.bound.arguments:
        call.bound = replace(call.bound, arguments=record)
    if call.run.duplicates and not tool.options.idempotent:
        await _wait_for_duplicates(call, tool)
    function = partial(tool.function, *positional, **by_name)
    if not tool.is_async:
        if context is not None:
            context.started()
        call.returned(*await _in_thread(call, tool, function))
    elif tool.gate is None:
        await _in_loop(call, function, context)
    else:
        async with tool.gate.slot(call.waiting):
            await _in_loop(call, function, context)


async def _wait_for_duplicates(call: Call, tool: Tool) -> None:
    """Wait for abandoned calls of the same function to end: two at once may do harm."""
    async with call.run.duplicates.gate(tool.function).slot(call.waiting):
        pass


async def _in_loop(call: Call, function: Callable[[], Awaitable[Any]], context: RunContext[Any] | None) -> None:
    if context is not None:
        context.started()
    call.work = work = function()
    content: Any = work
    if not hasattr(work, "__anext__"):  # an async generator is not awaited, but read
        content = await graced(timed(work, f"tool {call.bound.name!r}", call.run.emitter.warn))
    if type(content) is not str and not is_plain(content):
        content = await graced(timed(read_up(content), f"tool {call.bound.name!r}", call.run.emitter.warn))
    call.returned(content, text_of(content))


class _Joining:
    """Starts tasks, for the thread of a call, in the event loop; they end with the call.

    Args:
        call: The call.
    """

    def __init__(self, call: Call) -> None:
        self._call = call

    def start_soon(self, function: Callable[..., Coroutine[Any, Any, None]], /, *arguments: Any) -> Background[None]:
        """Start a task and return it; called in the event loop, and in the context of the thread."""
        task = Background(partial(function, *arguments), f"fractal call in tool {self._call.bound.name}")
        self._call.run.note_below(task, is_reached=False)
        return task


async def _in_thread(call: Call, tool: Tool, function: Callable[[], Any]) -> tuple[Any, str]:
    def work() -> tuple[Any, str | None]:
        content = function()
        if inspect.isawaitable(content):
            return content, None
        content, is_whole = read_in_thread(content)
        return content, text_of(content) if is_whole else None

    def tell_late(seconds: float) -> None:
        call.run.emitter.warn_late(ended_late(tool.name, seconds))

    gates = (tool.gate,) if tool.gate is not None else ()
    abandon = tool.options.on_cancel == "abandon"
    call.work = thread = ThreadCall(
        work,
        f"tool {tool.name!r}",
        gates=gates,
        waiting=call.waiting,
        abandon=abandon,
        group=_Joining(call),
        duplicates=partial(call.run.duplicates.gate, tool.function),
        on_late_end=tell_late,
    )
    try:
        content, text = await thread.run()
    finally:
        call.abandoned = thread.abandoned
    if text is None:  # a plain function that hands out a coroutine, or what has to be read in the loop
        content = await graced(_read(content))
        text = text_of(content)
    return content, text


async def _read(content: Any) -> Any:
    return await read_up(await content if inspect.isawaitable(content) else content)
