"""What can be done with an agent, once for all who do it: both kinds of verbs, delegation, batches, the chat."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any
from uuid import uuid4

from typing_extensions import Unpack

from fractal._calls import call_tools
from fractal._core import core_of
from fractal._current import current_run
from fractal._hooks import Hook
from fractal._loop import drive
from fractal._output import output_for
from fractal._run import Run, RunSettings
from fractal._scopes import single_error
from fractal._settings import checked_limits, checked_mode, checked_retries, checked_timeout
from fractal._step import bind
from fractal.errors import InvalidArguments
from fractal.limits import limit_of_iterations
from fractal.messages import Transcript, user_message
from fractal.models.combined import CombinedModel
from fractal.models.openai import OpenAIModel
from fractal.options import RUN_OPTIONS, RunOptions
from fractal.streaming import RunStream

if TYPE_CHECKING:
    from fractal._answer import AnswerSettings
    from fractal._output import OutputMode
    from fractal.results import AgentResult, ToolResult

__all__ = ["answer", "begin", "call_tool", "open_stream", "release"]


async def answer(agent: object, user_input: object, **options: Unpack[RunOptions]) -> AgentResult:
    """Answer one input in the calling task.

    Args:
        agent: The agent.
        user_input: As in `BaseAgent.run`.
        **options: As `RunOptions` describes them.
    """
    return await drive(begin(agent, user_input, **options))


def begin(agent: object, user_input: object, **options: Unpack[RunOptions]) -> Run:
    """Make the run that `drive` takes to its end; call it inside the event loop.

    Raises:
        InvalidArguments: An option cannot be what was meant.
        InvalidMessages: The conversation is none.
    """
    settings = _settings(agent, options)
    transcript = Transcript(options.get("messages") or ())
    transcript.append(user_message(user_input))
    return Run(settings, transcript)


def open_stream(agent: object, user_input: object, buffer: int, **options: Unpack[RunOptions]) -> RunStream:
    """Make the stream of a run."""
    return RunStream(lambda: begin(agent, user_input, **options), buffer)


async def call_tool(agent: object, tool_name: str, arguments: Mapping[str, Any]) -> ToolResult:
    """Call one tool as the model would."""
    run = current_run.get()
    if run is None or run.agent is not agent or run.result is not None:
        run = Run(_settings(agent, {}), Transcript())
    call = bind(f"direct_{uuid4().hex[:24]}", tool_name, arguments, core_of(agent).toolkit.tools)
    with single_error():
        [result] = await call_tools(run, [call])
    return result


async def release(agent: object) -> None:
    """Close what an agent opened in the running event loop."""
    model = core_of(agent).facts()["model"]
    if isinstance(model, (OpenAIModel, CombinedModel)):
        await model.aclose()


def _settings(agent: object, options: RunOptions) -> RunSettings:
    if not options.keys() <= RUN_OPTIONS:
        unknown = sorted(options.keys() - RUN_OPTIONS)
        raise InvalidArguments(f"a run has no options {unknown}, only {sorted(RUN_OPTIONS)}")
    facts: dict[str, Any] = {**core_of(agent).facts(), "agent": agent, "deps": options.get("deps")}
    facts["system_prompt"] = facts["system_prompt"].now()
    facts["answer"] = _answer_settings(facts["answer"], options.get("output_type"), options.get("output_mode"))
    limits, max_iterations = options.get("limits"), options.get("max_iterations")
    if limits is not None:
        facts["limits"] = checked_limits(limits).over(facts["limits"])
    if max_iterations is not None:
        facts["limits"] = limit_of_iterations(max_iterations).over(facts["limits"])
    if (timeout := options.get("timeout")) is not None:
        facts["timeout"] = checked_timeout(timeout)
    if (max_retries := options.get("max_retries")) is not None:
        facts["max_retries"] = checked_retries(max_retries)
    if (approve := options.get("approve")) is not None:
        facts["approve"] = Hook(approve, "approve")
    return RunSettings(**facts)


def _answer_settings(settings: AnswerSettings, kind: Any, mode: OutputMode | None) -> AnswerSettings | None:
    if kind is not None:
        settings = replace(settings, type=output_for(kind), validators=())
    if mode is not None:
        settings = replace(settings, mode=checked_mode(mode))
    return settings if settings.type is not None or settings.validators else None
