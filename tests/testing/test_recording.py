"""The recorder of events, and what it takes for well formed."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import pytest

from fractal import (
    AgentResult,
    BaseAgent,
    Event,
    ModelRequested,
    RunFinished,
    RunStarted,
    TextDelta,
    ToolFinished,
    ToolResult,
    ToolStarted,
    sync,
    tool,
)
from fractal.events import DelegationFinished, DelegationStarted, ModelResponded, Observer, ReasoningDelta
from fractal.testing import EventRecorder, ScriptedModel, answers, record_events

TOP: dict[str, Any] = {"run_id": "top", "parent_id": None, "agent_name": "Top", "depth": 0}
BELOW: dict[str, Any] = {"run_id": "below", "parent_id": "top", "agent_name": "Below", "depth": 1}
RESPONDED: dict[str, Any] = {"finish_reason": "stop", "input_tokens": 0, "output_tokens": 0, "elapsed": 0.1}


def start(facts: dict[str, Any], call_id: str | None = None) -> RunStarted:
    return RunStarted(**facts, message={"role": "user", "content": "?"}, call_id=call_id)


def end(facts: dict[str, Any], run_id: str | None = None) -> RunFinished:
    result = AgentResult(
        content="x", agent_name=facts["agent_name"], stop_reason="finished", run_id=run_id or facts["run_id"]
    )
    return RunFinished(**facts, result=result)


def begin_call(facts: dict[str, Any], call_id: str = "c1") -> ToolStarted:
    return ToolStarted(**facts, tool_name="t", call_id=call_id, arguments={})


def end_call(facts: dict[str, Any], call_id: str = "c1") -> ToolFinished:
    result = ToolResult(content="x", tool_name="t", outcome="ok")
    return ToolFinished(**facts, tool_name="t", call_id=call_id, result=result)


def ask(facts: dict[str, Any]) -> ModelRequested:
    return ModelRequested(**facts, iteration=1, attempt=1, message_count=1)


def say(facts: dict[str, Any]) -> TextDelta:
    return TextDelta(**facts, text="x")


def answered(facts: dict[str, Any]) -> ModelResponded:
    return ModelResponded(**facts, message={"role": "assistant", "content": "x"}, **RESPONDED)


def delegate(facts: dict[str, Any]) -> DelegationStarted:
    return DelegationStarted(**facts, call_id="c1", to_agent="Below", query="?")


def delegated(facts: dict[str, Any]) -> DelegationFinished:
    return DelegationFinished(**facts, call_id="c1", to_agent="Below", result=None)


def recorded(events: Iterable[Event]) -> EventRecorder:
    recorder = record_events()
    for event in events:
        recorder(event)
    return recorder


WELL_FORMED = {
    "nothing": [],
    "a run": [start(TOP), ask(TOP), say(TOP), answered(TOP), end(TOP)],
    "a text of a hook's own": [start(TOP), say(TOP), end(TOP)],
    "a request without an answer": [start(TOP), ask(TOP), end(TOP)],
    "a delegation": [
        *(start(TOP), begin_call(TOP), delegate(TOP), start(BELOW, "c1"), end(BELOW), delegated(TOP)),
        *(end_call(TOP), end(TOP)),
    ],
    "a child that no call began": [start(TOP), start(BELOW), end(BELOW), end(TOP)],
    "a child of whom nobody hears the parent": [start(BELOW, "c1"), begin_call(BELOW), end_call(BELOW), end(BELOW)],
    "two runs side by side": [start(TOP), start(TOP | {"run_id": "other"}), end(TOP), end(TOP | {"run_id": "other"})],
    "a call id used by two runs": [
        *(start(TOP), start(BELOW), begin_call(TOP), begin_call(BELOW)),
        *(end_call(BELOW), end(BELOW), end_call(TOP), end(TOP)),
    ],
}


@pytest.mark.parametrize("what", WELL_FORMED)
def test_a_whole_story_is_well_formed(what: str):
    recorded(WELL_FORMED[what]).assert_well_formed()


ILL_FORMED = {
    "a run of Top": [start(TOP)],
    "tool call c1 of Top": [start(TOP), begin_call(TOP)],
    r"event 3, run_finished of Top \(run top\): in it there still goes on: tool call c1 of Top": [
        *(start(TOP), begin_call(TOP), end(TOP))
    ],
    "in it there still goes on: delegation call c1 of Top": [start(TOP), delegate(TOP), end(TOP)],
    "in it there still goes on: a run of Below": [start(TOP), start(BELOW), end(TOP)],
    "its run has not started": [begin_call(TOP)],
    "it starts a second time": [start(TOP), begin_call(TOP), begin_call(TOP)],
    "the run starts a second time": [start(TOP), start(TOP)],
    "it has not started, or has ended before": [start(TOP), begin_call(TOP), end_call(TOP), end_call(TOP)],
    "the run ends a second time": [start(TOP), end(TOP), end(TOP)],
    "it comes after its run's end": [start(TOP), end(TOP), begin_call(TOP)],
    "the run above it has ended": [start(TOP), end(TOP), start(BELOW)],
    "a run below it has started before": [start(BELOW), start(TOP)],
    "the tool call that began it is not open": [start(TOP), start(BELOW, "c1")],
    "the run of Below that it began goes on": [start(TOP), begin_call(TOP), start(BELOW, "c1"), end_call(TOP)],
    "its depth is 2, that of the run above 0": [start(TOP), start(BELOW | {"depth": 2})],
    "its depth is 1": [start(TOP | {"depth": 1})],
    "it says something else of its run": [start(TOP), begin_call(TOP | {"agent_name": "Another"})],
    "its result is that of another run": [start(TOP), end(TOP, run_id="other")],
    "the model is not being asked": [start(TOP), ReasoningDelta(**TOP, text="x")],
    "the model was not asked": [start(TOP), ask(TOP), answered(TOP), answered(TOP)],
}


@pytest.mark.parametrize("fault", ILL_FORMED)
def test_what_is_no_whole_story_is_named(fault: str):
    with pytest.raises(AssertionError, match=fault):
        recorded(ILL_FORMED[fault]).assert_well_formed()


@tool
async def nod() -> str:
    return "yes"


def team(*observers: Observer) -> BaseAgent:
    child = BaseAgent("Child", "c", client=ScriptedModel([answers.call("nod"), "done"])).add_tool(nod)
    calls = answers.calls(answers.call("delegate_to_child", {"query": "?"}), answers.call("nod"))
    model = ScriptedModel([calls, "all done"])
    return BaseAgent("Team", "t", client=model, observers=observers).add_tool(nod).register_delegate(child)


async def test_a_block_records_every_run_in_it_and_nothing_after_it():
    with record_events() as events:
        await team().run("go")
    before = list(events)
    await team().run("go")
    assert events == before
    events.assert_well_formed()
    assert [result.agent_name for result in events.results()] == ["Child", "Team"]
    assert [result.content for result in events.results("Child")] == ["done"]


def test_a_block_records_what_runs_in_another_thread():
    with record_events() as events:
        sync.run(team(), "go")
    events.assert_well_formed()
    assert events.kinds.count("run_finished") == 2


async def test_an_observer_records_its_agent_and_what_runs_below():
    events = record_events()
    await team(events).run("go")
    await team().run("go")
    assert events.kinds.count("run_finished") == 2
    events.assert_well_formed()


async def test_two_recorders_of_one_run_hear_the_same_and_each_hears_it_once():
    with record_events() as outer, record_events() as inner:
        await team().run("go")
    assert outer.kinds == inner.kinds
    assert outer.kinds.count("run_started") == 2
    assert outer != inner
    assert outer == list(inner)


async def test_what_a_cancelled_run_tells_is_well_formed_too():
    with record_events() as events:
        result = await BaseAgent("Slow", "s", client=ScriptedModel([answers.hang()]), timeout=0.01).run("go")
    assert result.stop_reason == "deadline"
    events.assert_well_formed()
