"""Overridden verbs keep what runs promise: cancellation, grace, honest ends, one place in the tree of runs."""

from __future__ import annotations

import threading
import warnings
from copy import copy, deepcopy
from typing import Any

import anyio
import pytest

from fractal import (
    AgentResult,
    BaseAgent,
    InvalidArguments,
    Limits,
    RunCancelled,
    ToolIgnoredCancellation,
    ToolResult,
    run_many,
    sync,
    tool,
)
from fractal.events import RunStarted, ToolStarted
from fractal.testing import ScriptedModel, answers, record_events
from tests.support import outcomes

LEAVE = Limits(grace=0.2, on_stubborn="raise")


class Through(BaseAgent):
    """An agent whose verbs are its own and do what ours do."""

    def __init__(self, *replies: Any, **options: Any) -> None:
        super().__init__("Through", "p", client=ScriptedModel([*replies, "done"]), **options)
        self.asked: list[str] = []

    async def run(self, *arguments: Any, **options: Any) -> AgentResult:
        return await super().run(*arguments, **options)

    async def execute_tool(self, tool_name: str, /, **arguments: Any) -> ToolResult:
        self.asked.append(tool_name)
        return await super().execute_tool(tool_name, **arguments)


async def hold_on(free: anyio.Event) -> None:
    while not free.is_set():
        try:
            await free.wait()
        except BaseException:
            with anyio.CancelScope(shield=True):
                await anyio.sleep(0.01)


async def test_a_tool_that_does_not_stop_is_left_through_a_verb_of_the_agents_own() -> None:
    free, over = anyio.Event(), anyio.Event()

    async def hold() -> None:
        try:
            await hold_on(free)
        finally:
            over.set()

    agent = Through(answers.call("hold", {}), limits=LEAVE).add_tool(hold)
    with anyio.fail_after(10), pytest.raises(ToolIgnoredCancellation) as caught:
        await agent.run("go", timeout=0.1)
    assert (caught.value.tool_name, caught.value.through) == ("hold", None)
    assert caught.value.result is not None
    assert outcomes(caught.value.result) == ["abandoned"]
    assert len(caught.value.result.abandoned) == 1
    free.set()
    with anyio.fail_after(10):
        await over.wait()
        await anyio.wait_all_tasks_blocked()


async def test_a_verb_that_does_not_stop_is_left_and_that_is_told_once(caplog: pytest.LogCaptureFixture) -> None:
    free, over = anyio.Event(), anyio.Event()

    class Stubborn(Through):
        async def execute_tool(self, tool_name: str, /, **arguments: Any) -> ToolResult:
            try:
                await hold_on(free)
            finally:
                over.set()
            raise AssertionError("never")

    agent = Stubborn(answers.call("no_such_tool", {}), limits=LEAVE)
    with anyio.fail_after(10), pytest.raises(ToolIgnoredCancellation) as caught:
        await agent.run("go", timeout=0.1)
    assert caught.value.tool_name == "no_such_tool"
    assert "hold_on" in (caught.value.where or "")
    assert caplog.text.count("has not stopped") == 1
    free.set()
    with anyio.fail_after(10):
        await over.wait()
        await anyio.wait_all_tasks_blocked()


async def test_a_thread_that_is_waited_for_is_waited_for_through_a_verb_of_the_agents_own() -> None:
    free, ended = threading.Event(), threading.Event()

    def block() -> str:
        free.wait(10)
        ended.set()
        return "late"

    agent = Through(answers.call("block", {}), limits=LEAVE).add_tool(tool(block, on_cancel="wait"))
    async with anyio.create_task_group() as group:

        async def let_go() -> None:
            await anyio.sleep(0.6)
            free.set()

        group.start_soon(let_go)
        with anyio.fail_after(10):
            result = await agent.run("go", timeout=0.1)
    assert ended.is_set()
    assert not result.success


@pytest.mark.parametrize("way", ["run", "run_many", "handle", "stream"])
async def test_a_verb_of_the_agents_own_has_its_grace_when_it_is_cancelled(way: str) -> None:
    begun, cleaned = threading.Event(), threading.Event()

    class Tidy(Through):
        async def run(self, *arguments: Any, **options: Any) -> AgentResult:
            try:
                begun.set()
                await anyio.sleep_forever()
            finally:
                await anyio.sleep(0.01)
                cleaned.set()
            raise AssertionError("never")

    agent = Tidy()
    above = BaseAgent("Above", "a", client=ScriptedModel([answers.call("ask", {"query": "x"})]))
    above.register_delegate(agent, "ask")
    if way == "run":
        await above.run("x", timeout=0.1)
    elif way == "run_many":
        with anyio.move_on_after(0.1):
            await run_many(agent, ["x"])
    elif way == "stream":
        async with agent.stream("x"):
            assert await anyio.to_thread.run_sync(begun.wait, 10)
    else:
        handle = await anyio.to_thread.run_sync(sync.start, agent, "x")
        assert await anyio.to_thread.run_sync(begun.wait, 10)
        handle.cancel()
        with pytest.raises(RunCancelled):
            await anyio.to_thread.run_sync(handle.result, 10)
    assert cleaned.is_set()


async def test_leaving_a_stream_starts_no_tool_of_an_overridden_run() -> None:
    called: list[str] = []

    def act() -> None:
        called.append("act")

    for seen in range(1, 3):  # of what the model writes nothing is shown
        agent = Through(answers.call("act", {})).add_tool(act)
        async with agent.stream("x", buffer=0) as stream:
            for _ in range(seen):
                event = await stream.__anext__()
                assert not isinstance(event, ToolStarted)
        assert (await stream.result()).stop_reason == "cancelled"
    assert called == []


async def test_a_direct_call_goes_through_the_verb_once_and_is_a_run_of_its_own() -> None:
    agent = Through().add_tool(lambda: "x" * 3, name="text")
    with record_events() as events:
        assert (await agent.execute_tool("text")).content == "xxx"
    assert agent.asked == ["text"]
    assert events.kinds == ["run_started", "tool_started", "tool_finished", "run_finished"]


async def test_runs_below_a_call_through_the_verb_say_the_id_that_the_model_gave() -> None:
    below = BaseAgent("Below", "b", client=ScriptedModel(["deep"]))
    agent = Through(answers.call("ask", {"query": "x"}, id="call_1")).register_delegate(below, "ask")
    with record_events() as events:
        result = await agent.run("go")
    assert result.success, result.error
    assert [each.call_id for each in events if isinstance(each, RunStarted)] == [None, "call_1"]
    events.assert_well_formed()


async def test_what_a_call_inside_has_begun_ends_with_it_and_what_the_verb_has_begun_with_that() -> None:
    below = BaseAgent("Below", "b", client=ScriptedModel([answers.hang()] * 4))
    ended: list[str] = []

    async def ask(name: str) -> None:  # in a task that nobody awaits who has begun it
        try:
            await below.run("x")
        except RunCancelled:
            ended.append(name)

    class Starting(Through):
        async def execute_tool(self, tool_name: str, /, **arguments: Any) -> ToolResult:
            group.start_soon(ask, "verb")
            await anyio.sleep(0.05)
            result = await super().execute_tool(tool_name, **arguments)
            self.asked.append(",".join(ended))
            await anyio.sleep(0.05)
            self.asked.append(",".join(ended))
            return result

    async def begin() -> str:
        group.start_soon(ask, "tool")
        await anyio.sleep(0.05)
        return "begun"

    agent = Starting(answers.call("begin", {})).add_tool(begin)
    with anyio.fail_after(10):
        async with anyio.create_task_group() as group:
            result = await agent.run("go")
    assert result.success, result.error
    assert sorted(ended) == ["tool", "verb"]
    assert agent.asked[-1] == "tool"


async def test_tools_are_replaced_and_removed_by_the_toolkit_that_an_agent_shows() -> None:
    agent = BaseAgent("A", "a").add_tool(lambda: 1, name="one")
    agent.toolkit.add_tool(lambda: 2, name="one", replace=True)
    assert (await agent.execute_tool("one")).content == 2
    assert agent.toolkit.remove_tool("one").name == "one"
    assert agent.get_tools() == {}
    with pytest.raises(InvalidArguments, match="there is no tool"):
        agent.toolkit.remove_tool("one")


def test_a_prompt_that_is_assigned_is_looked_at_as_one_that_is_given() -> None:
    agent = BaseAgent("A", "a", system_context={"price": 1})
    with pytest.warns(UserWarning, match="reaches the model as it is"):
        agent.system_prompt = "{price:.2f}"
    with pytest.warns(UserWarning, match="reaches the model as it is"):
        agent.replace(system_prompt="{price!r}")
    late = BaseAgent("A", "{price:.2f}")
    with pytest.warns(UserWarning, match="reaches the model as it is"):
        late.update_system_context(price=1)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        late.update_system_context(price=2)
        copy(late)


def test_a_copy_of_an_agent_in_a_block_is_in_none() -> None:
    with sync.BaseAgent("A", "a") as agent:
        for made in (copy(agent), deepcopy(agent), agent.replace(name="B")):
            with made as entered:
                assert entered is made
