"""The loop: ask the model, see what it wants, call the tools, again. There is no other."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from functools import partial
from typing import TYPE_CHECKING, Any

from anyio.lowlevel import checkpoint

from fractal._answers.output import OutputFault
from fractal._concurrency.scopes import is_cancellation, stop_if_cancelled, unexpected
from fractal._engine.around import NO_HOOKS
from fractal._engine.around_model import Asking
from fractal._engine.ask import ask
from fractal._engine.calls import answer_calls
from fractal._engine.keeping import keep, kept
from fractal._engine.step import AskAgain, CallTools, Decline, Finish, bound_calls, next_step
from fractal._functions.arguments import written_object
from fractal._json import text_of
from fractal._log import log
from fractal._texts import is_a, said_by
from fractal.errors import (
    RAISE_LIMIT,
    AnswerRejected,
    DeadlineExceeded,
    IterationsExceeded,
    NoContent,
    Refused,
    RunCancelled,
    RunError,
    StopReason,
    StoreError,
    ToolFailed,
    ToolIgnoredCancellation,
    UserError,
)

if TYPE_CHECKING:
    from collections.abc import Sequence

    from fractal._engine.keeper import Keeper
    from fractal._engine.run import Run
    from fractal._engine.step import BoundCall, Step
    from fractal.model import Reply
    from fractal.results import AgentResult, ToolResult

__all__ = ["call_alone", "conduct", "converse", "drive"]

BOUND_AT_A_TIME = 250
"""Calls whose arguments are checked before other tasks, and clocks, have their turn."""

_End = tuple[Any, StopReason]
_Work = Callable[["Run"], Awaitable[_End]]


async def drive(run: Run, work: _Work | None = None) -> AgentResult:
    """Take a run from its first event to its last, in a task of its own.

    Args:
        run: The run.
        work: What it does between them. None: it asks its model, and calls tools.

    Returns:
        How it ended. Failures of the run are in the result, as is the end of its own time.

    Raises:
        UserError: The package was used in a way that cannot work.
        ToolIgnoredCancellation: A tool that does not stop was left to itself.
        RunCancelled: The run above has ended, and with it this one, which a task of the user's own still awaited.
        BaseException: Cancellation from outside, after the cleanup; the run's last event has the partial result.
    """
    run.start_clock()
    result = await run.origin.do(
        partial(conduct, run, work or converse),
        run.task_name,
        run.clock.scope,
        run.clock.token,
        on_cancel=run.cut,
        on_more_time=run.allow_until,
    )
    if result.stop_reason == "cancelled":
        result.raise_for_error()
    return result


def conduct(run: Run, work: _Work) -> Awaitable[AgentResult]:
    """Take a run from its first event to its last, in the calling task, which is ours and the run's alone.

    Its observers finish then, too.

    Args:
        run: The run.
        work: What it does between them.

    Returns:
        As `drive`.

    Raises:
        BaseException: As `drive`.
    """
    if (keeper := run.settings.keeper) is not None:
        work = partial(_kept, keeper, work)
    if run.journaled is None:
        conducted = _conduct_in_scope(run, work)
    else:
        conducted = run.journaled.conduct(run, partial(_conduct_in_scope, run, work))
    return run.emitter.let_observers_finish(conducted) if run.emitter.own_companions else conducted


async def _kept(keeper: Keeper, work: _Work, run: Run) -> _End:
    return await kept(run, keeper, work)


async def _conduct_in_scope(run: Run, work: _Work) -> AgentResult:
    run.enter()
    was_cancelled = False
    with run.clock.scope:
        try:
            await run.open()
            try:
                content, stop_reason = await work(run)
            finally:
                await run.below.end()
            await run.emitter.pace_in_time()
            run.succeed(content, stop_reason)
        except BaseException as error:
            if _fail(run, error):
                raise
            was_cancelled = is_cancellation(error)
    if was_cancelled:
        await stop_if_cancelled()  # by what is around it
    assert run.result is not None
    return run.result


def _fail(run: Run, error: BaseException) -> bool:
    """End a run with an error; returns whether the error is raised, too, and not told by the result alone."""
    # Asked of its class: a user's exception may say of itself that it is another's.
    if is_a(error, RunError):
        run.fail(error)
        return is_a(error, ToolIgnoredCancellation)
    if is_cancellation(error):
        run.fail(_why_cancelled(run))
        return False
    is_raised = is_a(error, (UserError, StoreError)) or not is_a(error, Exception)
    if not is_raised:
        log.debug(f"run {run.run_id} failed", error)
    result = run.fail(unexpected(error))
    if is_a(error, StoreError):
        error.result = result
    return is_raised


async def call_alone(run: Run, call: BoundCall) -> ToolResult:
    """Call one tool, in a run that does nothing else.

    Returns:
        How it ended; what the tool raised is in it, and in the result of the run.

    Raises:
        DepthExceeded: It is too deep below the first run.
        BaseException: As `drive`.
    """

    async def work(run: Run) -> _End:
        function = {"name": call.name, "arguments": written_object(text_of(call.arguments))}
        asked = {"id": call.call_id, "type": "function", "function": function}
        run.transcript.append({"role": "assistant", "content": None, "tool_calls": [asked]})
        [result] = await answer_calls(run, [call])
        if result.error is not None:
            raise ToolFailed(call.name, result.error) from result.exception
        return result.content, "terminated"

    ended = await drive(run, work)
    if not run.tool_results:  # it has not come so far
        ended.raise_for_error()
    [result] = run.tool_results
    return result


async def converse(run: Run) -> _End:
    """Ask the model of a run, and call the tools that it asks for, until it has answered."""
    run.system = await run.settings.system_prompt(run.context(), run.emitter.warn)
    end: _End | None = None
    asked = ask if run.hooks is NO_HOOKS else Asking(run)
    keeper = run.settings.keeper
    while end is None:
        if keeper is not None:
            await keep(run, keeper)
        _next_iteration(run)
        final_reason = run.final_reason()
        reply = await asked(run)
        match await _next_step(run, reply):
            case CallTools(calls):
                end = await _call(run, reply, calls, final_reason)
            case Finish(text):
                end = await _finish(run, reply, text, final_reason)
            case Decline(reason):
                run.transcript.append({"role": "assistant", "content": reply.text or reason})
                raise Refused(reason)
            case AskAgain():  # pragma: no branch - a step is nothing else
                run.iterations -= 1  # an empty reply is not a turn
                run.empty_replies += 1
                if reply.is_cut or run.empty_replies > run.settings.max_retries:
                    raise NoContent(run.empty_replies, is_cut=reply.is_cut, held=reply.media)
    return end


async def _next_step(run: Run, reply: Reply) -> Step:
    """Decide what a reply asks for; many calls are bound so many at a time, as deadlines hold meanwhile."""
    tools = run.tools
    if run.offered is not None:
        tools = {name: tool for name, tool in tools.items() if name in run.offered}
    if len(reply.tool_calls) <= BOUND_AT_A_TIME or reply.is_filtered:
        return next_step(reply, tools)
    calls: list[BoundCall] = []
    for start in range(0, len(reply.tool_calls), BOUND_AT_A_TIME):
        await checkpoint()
        some = reply.tool_calls[start : start + BOUND_AT_A_TIME]
        calls += bound_calls(some, tools, is_cut=reply.is_cut)
    return CallTools(tuple(calls))


async def _call(run: Run, reply: Reply, calls: Sequence[BoundCall], final_reason: StopReason) -> _End | None:
    """Call tools; one of them may end the run."""
    run.transcript.append(reply.message(), is_reply=True)
    if reply.is_cut:
        run.emitter.warn(f"a reply with tool calls was cut at the token limit: {RAISE_LIMIT}")
    rejected: tuple[str, str] | None = None
    results = await answer_calls(run, calls)
    for call, result in zip(reply.tool_calls, results, strict=True):
        tool = run.tools.get(result.tool_name)
        if tool is not None and tool.options.terminate and result.outcome == "ok":
            return result.content, final_reason if tool.is_answer else "terminated"
        if tool is not None and tool.is_answer and result.outcome == "error":
            rejected = result.error or "", call.arguments
    if rejected is not None and run.answer is not None:
        run.answer.reject(*rejected)  # the model has been told by the result of its call
    await run.clock.stop_if_late()
    return None


async def _finish(run: Run, reply: Reply, text: str, final_reason: StopReason) -> _End | None:
    """Take a text as the answer, or tell the model why not."""
    if reply.promises_calls and run.empty_replies == 0 and not run.emitter.feeds:
        run.iterations -= 1
        run.empty_replies += 1
        return None
    run.transcript.append(reply.message(), is_reply=True)
    _warn_of_end(run, reply)
    if run.answer is None:
        return text, final_reason
    try:
        return await run.answer.read(text), final_reason
    except (OutputFault, AnswerRejected) as error:
        correction = run.answer.reject(said_by(error), text)
    run.transcript.append({"role": "user", "content": correction})
    return None


def _warn_of_end(run: Run, reply: Reply) -> None:
    """Warn of an answer that may not be whole."""
    if reply.is_cut:
        run.emitter.warn(f"the answer was cut at the token limit: {RAISE_LIMIT}")
    elif reply.promises_calls:
        said = "the endpoint says that the model calls tools, and sent no call"
        run.emitter.warn(f"{said}: the answer may not be the last word")
    elif reply.is_doubtful:
        run.emitter.warn(f"the endpoint ended the answer with {reply.finish_reason!r}: it may not be whole")


def _next_iteration(run: Run) -> None:
    limit = run.limits.max_iterations
    if limit is not None and run.iterations >= limit:
        raise IterationsExceeded(int(limit))
    run.iterations += 1


def _why_cancelled(run: Run) -> RunError:
    # The deadline of a run above is the reason here too, though that run's scope has caused the cancellation.
    clock, seconds = run.clock, run.settings.timeout
    if not clock.is_out_of_time():
        return RunCancelled()
    if seconds is None or clock.started + seconds > clock.deadline:
        seconds = max(min(clock.now(), clock.own_deadline) - clock.started, 0.0)  # it may have been over before
    return DeadlineExceeded(seconds, clock.waited_for)
