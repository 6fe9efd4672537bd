"""A tool call inside the hooks around it, the outermost first: each goes on with those inside, or answers itself."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any

from fractal._concurrency.grace import graced
from fractal._concurrency.stall import timed
from fractal._copies import copied_arguments
from fractal._engine.approve import allowed
from fractal._engine.around import awaited_or_joined
from fractal._engine.call import Call
from fractal._engine.hooks import call_user
from fractal._functions.callables import is_async
from fractal._functions.returned import is_plain, read_up
from fractal._functions.schema import ArgumentsFault
from fractal._json import text_of
from fractal._texts import name_of, one_line, repr_of
from fractal.approval import Allow, Deny, PendingCall
from fractal.errors import InvalidArguments
from fractal.results import ToolResult

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    from fractal._engine.step import BoundCall
    from fractal.around import Around

    Inside = Callable[[Call], Awaitable[ToolResult]]
    """Brings a call inside of another to its outcome."""

__all__ = ["Inside", "go_around", "take_answer"]


async def go_around(call: Call, inside: Inside) -> None:
    """Make a call by the first of the hooks around it.

    Args:
        call: The call.
        inside: Brings what the hook goes on with to its outcome.
    """
    hook, bound = call.around[0], call.bound
    assert bound.tool is not None
    pending = PendingCall(
        tool_name=bound.name,
        call_id=bound.call_id,
        arguments=copied_arguments(bound.arguments),
        description=bound.tool.description,
    )
    next_call = _Next(call, pending, inside)
    call.work = work = _ask(hook, call, pending, next_call)
    try:
        answer = await work
    finally:
        next_call.is_over = True
    await _conclude(call, answer, next_call.last, name_of(hook.function))


async def _ask(hook: Around, call: Call, pending: PendingCall, next_call: _Next) -> Any:
    function, run = hook.function, call.run
    context = run.context(tool_name=call.bound.name, call_id=call.bound.call_id)
    context.started()
    if not is_async(function):
        return await call_user(run.emitter.warn, function, context, pending, next_call)
    return await graced(timed(function(context, pending, next_call), name_of(function), run.emitter.warn))


async def _conclude(call: Call, answer: Any, last: ToolResult | None, hook: str) -> None:
    """Give a call the outcome that a hook answers with."""
    if answer is None and last is None:
        raise InvalidArguments(
            f"hook {hook!r} returned None, and has not called next(…): return what the model gets, or ToolResult(…)"
        )
    if isinstance(answer, Allow):
        raise InvalidArguments(f"hook {hook!r} returned Allow(…), which is for approve=: return await next(…)")
    if isinstance(answer, Deny):
        call.end("denied", error=f"denied: {text_of(answer.reason or Deny().reason)}")
        return
    await take_answer(call, last if answer is None else answer, f"hook {hook!r}")


async def take_answer(call: Call, answer: Any, name: str) -> None:
    """Give a call the outcome of a `ToolResult`, or the content that something else is.

    Args:
        call: The call.
        answer: What somebody has answered who was asked about the call.
        name: What to call whoever that is.
    """
    content = answer
    if isinstance(answer, ToolResult):
        if answer.error is not None:
            call.exception = answer.exception
            call.end(answer.outcome if answer.outcome != "ok" else "error", error=answer.error)
            return
        content = answer.content
    if type(content) is not str and not is_plain(content):
        content = await graced(timed(read_up(content), name, call.run.emitter.warn))
    call.returned(content, text_of(content))


class _Next:
    """The callable that a hook goes on with (`NextCall`).

    Attributes:
        is_over: Whether the hook has ended.
        last: How the last call ended that it has made.
    """

    def __init__(self, call: Call, pending: PendingCall, inside: Inside) -> None:
        self._call, self._pending, self._inside = call, pending, inside
        self.is_over = False
        self.last: ToolResult | None = None

    def __call__(self, call: PendingCall | None = None, /) -> Any:
        return awaited_or_joined(partial(self._go, self._pending if call is None else call))

    async def _go(self, pending: object) -> ToolResult:
        call = self._call
        if self.is_over or call.result is not None:
            raise InvalidArguments(f"next(…) of a call of {call.bound.name!r} was called after its hook had ended")
        self.last = await self._inside(Call(call.run, self._bound(pending), outer=call, around=call.around[1:]))
        return self.last

    def _bound(self, pending: object) -> BoundCall:
        """The call as the hook wants it.

        Raises:
            InvalidArguments: It is another call, or has other arguments than somebody has approved.
        """
        bound = self._call.bound
        if not isinstance(pending, PendingCall):
            raise InvalidArguments(f"next({one_line(repr_of(pending), 100)}): give the call, or nothing")
        if (pending.tool_name, pending.call_id) != (bound.name, bound.call_id):
            raise InvalidArguments(
                f"next(…) of a call of {bound.name!r} takes that call, with other arguments at most; for another tool"
                " await ctx.agent.execute_tool(…)"
            )
        try:
            changed = allowed(bound, pending.arguments)
        except ArgumentsFault as fault:
            text = f"the call of {bound.name!r} does not fit: {fault}"
            return replace(bound, tool=None, arguments=pending.arguments, fault=text)
        if changed is not bound and bound.tool is not None and bound.tool.options.requires_approval:
            raise InvalidArguments(
                f"tool {bound.name!r} was approved with other arguments: change them where they are approved, by"
                " Allow(arguments)"
            )
        return changed
