"""What can be done with an agent, once for all who do it: both kinds of verbs, delegation, batches, the chat."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Generator, Iterable, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import replace
from functools import partial
from math import inf
from typing import TYPE_CHECKING, Any, cast
from uuid import uuid4

import anyio
from typing_extensions import Unpack

from fractal._agent.constructor import check_settings
from fractal._agent.core import core_of
from fractal._agent.settings import checked_budget, checked_limits, checked_mode, checked_retries, checked_timeout
from fractal._answers.output import output_for
from fractal._checks import is_count
from fractal._concurrency.current import current_run
from fractal._concurrency.scopes import unexpected
from fractal._engine.around import hooks_of
from fractal._engine.calls import call_inside, call_within
from fractal._engine.held_back import HeldBack
from fractal._engine.hooks import Hook
from fractal._engine.journal_of_tree import opened
from fractal._engine.loop import call_alone, drive
from fractal._engine.overrides import (
    Adoption,
    Offered,
    adopting,
    call_override,
    current_through,
    override_of,
    returned_as,
)
from fractal._engine.run import Run
from fractal._engine.run_settings import RunSettings
from fractal._engine.step import bind
from fractal._engine.taken_up import checked_answers, checked_durable, taken_up
from fractal._log import log
from fractal._texts import repr_of, said_by
from fractal.errors import InvalidArguments, RunError, UserError
from fractal.limits import Limits, limit_of_iterations
from fractal.messages import Transcript, user_message
from fractal.models.combined import CombinedModel
from fractal.models.openai import OpenAIModel
from fractal.options import RUN_OPTIONS, ResumeOptions, RunOptions
from fractal.results import AgentResult, ToolResult, Usage
from fractal.streaming import RunStream

if TYPE_CHECKING:
    from fractal._answers.answer import AnswerSettings
    from fractal._engine.call import Call
    from fractal._engine.keeper import Keeper

__all__ = [
    "answer",
    "ask",
    "begin",
    "call_tool",
    "check",
    "deps_of_calls",
    "open_stream",
    "release",
    "result_of",
    "resume",
    "use_tool",
]

deps_of_calls: ContextVar[Any] = ContextVar("fractal_deps_of_calls", default=None)
"""What tools find as `ctx.deps` that are called outside of runs, where all arguments are those of the tool."""


async def ask(agent: object, user_input: object, **options: Unpack[RunOptions]) -> AgentResult:
    """Have an agent answer one input, by its own `run` if it overrides that; every other verb calls this.

    Args:
        agent: The agent.
        user_input: As in `BaseAgent.run`.
        **options: As `RunOptions` describes them.

    Raises:
        InvalidArguments: Its own `run` has returned no result.
    """
    override = override_of(agent, "run")
    if override is None:
        return await answer(agent, user_input, **options)
    given = {name: value for name, value in options.items() if value is not None}
    blocks = core_of(agent).blocks
    with _held_back(agent) as let_out:
        result = await call_override(override, user_input, given, blocks=blocks, warn=log.warning)
        return let_out(returned_as(AgentResult, result, agent, "run"))


@contextmanager
def _held_back(agent: object) -> Generator[Callable[[AgentResult], AgentResult]]:
    """Hide the texts of runs that an agent's own `run` begins from streams of the run above.

    What is given lets out a result that `run` has returned. A stream of the agent itself sees to that.
    """
    above, adoption, inlets = current_run.get(), adopting.get(), list[HeldBack]()
    if above is None or not above.emitter.feeds or (adoption is not None and adoption.shows(agent, above)):
        yield lambda result: result
        return

    def take(run: Run) -> None:
        if adoption is not None:
            adoption.tell(run)
        inlets.extend(_hold_back(run))

    def let_out(result: AgentResult) -> AgentResult:
        for inlet in inlets[-len(above.emitter.feeds) :]:  # those of the last run
            inlet.let_out(result)
        return result

    try:
        with Adoption(agent, above, take, sees_to_streams=True):
            yield let_out
    finally:
        for inlet in inlets:
            inlet.let_out(None)


def _hold_back(run: Run) -> list[HeldBack]:
    inlets = [HeldBack(feed, run.run_id.__eq__) for feed in run.emitter.feeds]
    run.emitter.feeds = tuple(inlets)
    return inlets


async def result_of(agent: object, user_input: object, **options: Unpack[RunOptions]) -> AgentResult:
    """Have an agent answer one of several inputs by its own `run`, whose exceptions count as failures of the model."""
    try:
        return await ask(agent, user_input, **options)
    except UserError:
        raise
    except Exception as error:
        return _failure(agent, unexpected(error))


def _failure(agent: object, error: RunError) -> AgentResult:
    said = said_by(error)
    result = AgentResult.of_facts(
        error,
        content=said,
        agent_name=core_of(agent).read("name"),
        success=False,
        metadata={"reason": error.error_type, "error": said, "error_type": error.error_type},
        stop_reason=error.stop_reason,
        error=said,
        messages=[],
        usage=Usage(),
        run_id="",
        tool_results=[],
        abandoned=[],
        pending=[],
        warnings=[],
        elapsed=0.0,
    )
    error.result = result
    return result


def answer(agent: object, user_input: object, **options: Unpack[RunOptions]) -> Awaitable[AgentResult]:
    """Answer one input in the calling task; our own form of the verb `run`. What is returned is awaited at once.

    Args:
        agent: The agent.
        user_input: As in `BaseAgent.run`.
        **options: As `RunOptions` describes them.
    """
    run, adoption = begin(agent, user_input, **options), adopting.get()
    is_seen_to = adoption is not None and adoption.shows(agent, run.parent)
    if run.emitter.feeds and not is_seen_to and override_of(agent, "run") is not None:  # a tool has called that itself
        return _drive_held_back(run, _hold_back(run))
    return drive(run)


async def _drive_held_back(run: Run, inlets: list[HeldBack]) -> AgentResult:
    try:
        return await drive(run)
    finally:
        for inlet in inlets:
            inlet.let_out(None)


def begin(agent: object, user_input: object, **options: Unpack[RunOptions]) -> Run:
    """Make the run that `drive` takes to its end; called inside the event loop.

    Raises:
        InvalidArguments: An option cannot be what was meant.
        InvalidMessages: The conversation is none.
    """
    settings, transcript = _checked(agent, options)
    transcript.append(user_message(user_input))
    return _made(settings, transcript)


def _made(settings: RunSettings, transcript: Transcript) -> Run:
    run = Run(settings, transcript)
    if (adoption := adopting.get()) is not None:
        adoption.tell(run)
    return run


def check(agent: object, **options: Unpack[RunOptions]) -> None:
    """Raise the errors of wrong options that `begin` would raise, before there is an input."""
    if override_of(agent, "run") is not None:
        options = _known(options)
    _checked(agent, options)


def _known(options: RunOptions) -> RunOptions:
    """The options of a run among those given; the agent's own `run` may take others."""
    return cast("RunOptions", {name: value for name, value in options.items() if name in RUN_OPTIONS})


def _checked(agent: object, options: RunOptions) -> tuple[RunSettings, Transcript]:
    settings = _settings(agent, options)
    if "journal" in options or "run_id" in options:
        settings.durable = checked_durable(options.get("journal"), options.get("run_id"))
    if (override := override_of(agent, "execute_tool")) is not None:
        settings.execute_tool = partial(call_override, override, blocks=core_of(agent).blocks, is_tool_call=True)
    if (schemas := override_of(agent, "get_tool_schemas")) is not None:
        settings.toolkit = Offered(agent, core_of(agent).toolkit, schemas())
    messages: object = options.get("messages") or ()
    if (conversation := options.get("conversation")) is not None:
        if options.get("messages") is not None:
            raise InvalidArguments("messages= and conversation= are two histories: give one of them")
        settings.keeper = _keeper_of(conversation, options.get("run_id"))
        messages = settings.keeper.history
    if not isinstance(messages, Iterable):
        raise InvalidArguments(f"messages={messages!r}: give a list, such as an earlier result's messages")
    return settings, Transcript(messages)


def _keeper_of(conversation: object, run_id: str | None) -> Keeper:
    begin_turn = getattr(conversation, "begin_turn", None)
    if not callable(begin_turn):
        given = repr_of(conversation)
        raise InvalidArguments(f"conversation={given}: give one of `async with SQLiteConversations(path).open(id)`")
    return cast("Keeper", begin_turn(run_id))


def open_stream(
    agent: object,
    user_input: object,
    buffer: int,
    *,
    prepare: Callable[[Run], None] | None = None,
    shows_pieces: bool = False,
    **options: Unpack[RunOptions],
) -> RunStream:
    """Make the stream of a run.

    Args:
        agent: The agent.
        user_input: As in `BaseAgent.run`.
        buffer: Events that may wait for the reader.
        prepare: Called with the run before it begins.
        shows_pieces: Whether to show what the model writes while the agent's own `run`, if it has one, goes on.
        **options: As `RunOptions` describes them.
    """

    def made() -> Run:
        # Of one that goes through the agent's own `run`, a run that never begins: it knows the run above.
        run = begin(agent, "", **_known(options)) if through else begin(agent, user_input, **options)
        if prepare is not None:
            prepare(run)
        return run

    def asked() -> Awaitable[AgentResult]:
        return ask(agent, user_input, **options)

    through = asked if override_of(agent, "run") is not None else None
    return RunStream(made, buffer, through=through, prepare=prepare, is_held_back=not shows_pieces)


async def use_tool(agent: object, tool_name: str, arguments: Mapping[str, Any]) -> ToolResult:
    """Call one tool, by the agent's own `execute_tool` if it overrides that; every other verb calls this."""
    override = override_of(agent, "execute_tool")
    if override is None:
        return await call_tool(agent, tool_name, arguments)
    blocks = core_of(agent).blocks
    result = await call_override(override, tool_name, arguments, blocks=blocks, warn=log.warning)
    return returned_as(ToolResult, result, agent, "execute_tool")


async def call_tool(agent: object, tool_name: str, arguments: Mapping[str, Any]) -> ToolResult:
    """Call one tool as the model would; our own form of the verb `execute_tool`."""
    if not isinstance(tool_name, str) or not tool_name:
        raise InvalidArguments('execute_tool takes the name of the tool first, by position: execute_tool("size", …)')
    tools, through = core_of(agent).toolkit.tools, _asked_about(agent, tool_name)
    within = current_through.set(None)  # what the tool calls in its turn is none of the call around
    try:
        if through is not None:
            return await call_inside(through, arguments, tools)
        call, run = bind(f"direct_{uuid4().hex[:24]}", tool_name, arguments, tools), current_run.get()
        if run is not None and run.agent is agent and run.clock.is_here and not run.is_over:
            return await call_within(run, call)
        transcript = Transcript([user_message(f"Call {tool_name}.")])
        options: RunOptions = {"deps": deps_of_calls.get()} if run is None else {}
        return await call_alone(Run(_settings(agent, options), transcript), call)
    finally:
        current_through.reset(within)


def _asked_about(agent: object, tool_name: str) -> Call | None:
    """The open tool call that the agent's own `execute_tool` is working on in this context."""
    call = current_through.get()
    if call is None or call.run.agent is not agent or call.bound.name != tool_name or call.result is not None:
        return None
    return call if call.run.clock.is_here and not call.run.is_over else None


async def resume(
    agent: object,
    journal: Any,
    run_id: Any,
    answers: Any = None,
    *,
    pause: int | None = None,
    **options: Unpack[ResumeOptions],
) -> AgentResult:
    """Go on with a run that a journal has, after the answers to calls that wait for approval.

    Args:
        agent: The agent that ran.
        journal: The journal.
        run_id: Id of the run.
        answers: `Allow(…)`, `Deny(…)`, True or False, by the ids of calls in `result.pending`. None: none.
        pause: Which of the run's pauses they belong to, where a process before this one may have recorded them already.
            None: the last one, and they are new.
        **options: As `ResumeOptions` describes them.

    Raises:
        RunUnknown: The journal has no such run.
        NotPending: A call that is answered does not wait for that.
        JournalError: The journal cannot be used, or another process is at work on the run.
    """
    durable = checked_durable(journal, run_id)
    if durable is None:
        raise InvalidArguments("resume needs a journal, and the id of a run that it has")
    if "messages" in options:
        raise InvalidArguments("resume takes no messages=: the run goes on with those it began with")
    given = checked_answers(answers)
    # Before the answers are recorded, which is done once.
    settings, transcript = _checked(agent, cast("RunOptions", {**options, "journal": journal, "run_id": run_id}))
    timeout = settings.timeout
    async with opened(durable, inf if timeout is None else anyio.current_time() + timeout) as journal_of_run:
        settings.durable = durable._replace(opened=journal_of_run)
        history, message = await taken_up(settings.durable, given, pause)
        if settings.keeper is None:
            transcript = Transcript(history)
        transcript.append(message)
        return await drive(_made(settings, transcript))


async def release(agent: object) -> None:
    """Close what an agent opened in the running event loop."""
    model = core_of(agent).facts()["model"]
    if isinstance(model, (OpenAIModel, CombinedModel)):
        await model.aclose()


def _settings(agent: object, options: RunOptions) -> RunSettings:
    if not options.keys() <= RUN_OPTIONS:
        unknown = sorted(options.keys() - RUN_OPTIONS)
        raise InvalidArguments(f"a run has no options {unknown}, only {sorted(RUN_OPTIONS)}")
    check_settings(type(agent))
    facts: dict[str, Any] = {**core_of(agent).facts(), "agent": agent}
    facts["system_prompt"] = facts["system_prompt"].now()
    given = {name: value for name, value in options.items() if value is not None}
    if given:
        _take_options(facts, given)
    answer: AnswerSettings = facts["answer"]
    if answer.type is None and not answer.validators:
        facts["answer"] = None
    return RunSettings(**facts)


def _take_options(facts: dict[str, Any], given: Mapping[str, Any]) -> None:
    """Let the options of a run, none of which is None, replace what its agent says."""
    facts["deps"] = given.get("deps")
    if "output_type" in given:
        facts["answer"] = replace(facts["answer"], type=output_for(given["output_type"]), validators=())
    if "output_mode" in given:
        facts["answer"] = replace(facts["answer"], mode=checked_mode(given["output_mode"]))
    if "limits" in given:
        facts["limits"] = checked_limits(given["limits"]).over(facts["limits"])
    if "max_iterations" in given:
        facts["limits"] = _limit_of_iterations(given["max_iterations"]).over(facts["limits"])
    if "timeout" in given:
        facts["timeout"] = checked_timeout(given["timeout"])
    if "max_retries" in given:
        facts["max_retries"] = checked_retries(given["max_retries"])
    if "approve" in given:
        facts["approve"] = Hook(given["approve"], "approve")
    if "budget" in given:
        facts["budgets"] = (*facts["budgets"], checked_budget(given["budget"]))
    if "around_tool" in given or "around_model" in given or "guard" in given:
        facts["hooks"] = facts["hooks"].plus(hooks_of(given))


def _limit_of_iterations(max_iterations: Any) -> Limits:
    if not is_count(max_iterations) and max_iterations != inf:
        raise InvalidArguments(f"max_iterations={max_iterations!r}: give a whole number, or None for the agent's")
    return limit_of_iterations(max_iterations)
