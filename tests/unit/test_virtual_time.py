"""Deadlines, retries and the soft deadline, on trio's mock clock: hours in milliseconds."""

from __future__ import annotations

import anyio
import pytest
import trio.testing

from fractal import AgentResult, BaseAgent, DeadlineWouldPass, Limits, RunContext, tool
from fractal.testing import ScriptedModel, answers
from tests.support import assert_continuable, outcomes


@pytest.fixture
def anyio_backend():
    return ("trio", {"clock": trio.testing.MockClock(autojump_threshold=0)})


def agent(model: ScriptedModel, **options: object) -> BaseAgent:
    @tool
    async def work(seconds: float) -> str:
        await anyio.sleep(seconds)
        return "worked"

    return BaseAgent("A", "a", client=model, **options).add_tool(work)  # type: ignore[arg-type]


async def test_back_off_grows_to_its_longest_and_stays_there():
    model = ScriptedModel([answers.failure(500, "oops")] * 9 + ["done"])
    started = anyio.current_time()
    result = await agent(model).run("go", max_retries=9)
    waited = anyio.current_time() - started
    assert result.content == "done"
    full = 0.5 + 1 + 2 + 4 + 5 * 8
    assert 0.75 * full <= waited <= full


async def test_a_retry_after_is_waited_for_to_the_second_and_a_too_long_one_not_at_all():
    model = ScriptedModel([answers.failure(429, "slow", retry_after=90), "done"])
    started = anyio.current_time()
    assert (await agent(model).run("go")).success
    assert anyio.current_time() - started == 90
    started = anyio.current_time()
    model = ScriptedModel([answers.failure(429, "slow", retry_after=3600)])
    assert (await agent(model).run("go")).metadata["error_type"] == "rate_limit"
    assert anyio.current_time() == started


async def test_a_wait_that_does_not_fit_is_refused_at_its_beginning():
    model = ScriptedModel([answers.failure(429, "slow", retry_after=25)])
    started = anyio.current_time()
    result = await agent(model).run("go", timeout=10)
    assert anyio.current_time() == started
    with pytest.raises(DeadlineWouldPass) as caught:
        result.raise_for_error()
    assert (caught.value.wait, caught.value.remaining) == (25, 10)
    assert "HTTP 429: slow" in str(caught.value)


@pytest.mark.parametrize("what", ["tool", "model"])
async def test_a_run_of_an_hour_ends_on_the_second(what: str):
    slow = answers.call("work", {"seconds": 9e9}) if what == "tool" else answers.text("late", delay=9e9)
    started = anyio.current_time()
    result = await agent(ScriptedModel([slow])).run("go", timeout=3600)
    assert anyio.current_time() - started == 3600
    assert result.stop_reason == "deadline"
    assert_continuable(result)


def offered(model: ScriptedModel) -> list[bool]:
    return ["tools" in request for request in model.requests]


async def closing_run(*script: object) -> tuple[AgentResult, ScriptedModel, float]:
    model = ScriptedModel(script)  # type: ignore[arg-type]
    started = anyio.current_time()
    result = await agent(model).run("go", timeout=60, limits=Limits(reserve=10))
    assert_continuable(result)
    return result, model, anyio.current_time() - started


async def test_when_only_the_reserve_is_left_tools_are_cut_and_a_final_answer_is_asked_for():
    result, model, took = await closing_run(answers.call("work", {"seconds": 300}), "what I have")
    assert took == 50
    assert (result.success, result.content, result.stop_reason) == (True, "what I have", "soft_deadline")
    assert outcomes(result) == ["timeout"]
    assert offered(model) == [True, False]
    assert "final answer now" in model.requests[1]["messages"][-1]["content"]
    assert all("final answer now" not in str(message) for message in result.messages)


async def test_calls_asked_for_too_late_are_skipped():
    late = answers.calls(answers.call("work", {"seconds": 1}), delay=55)
    result, model, took = await closing_run(late, "short")
    assert took == 55
    assert outcomes(result) == ["skipped"]
    assert (result.stop_reason, offered(model)) == ("soft_deadline", [True, False])


async def test_the_hard_deadline_holds_after_the_soft_one():
    result, _, took = await closing_run(answers.call("work", {"seconds": 300}), answers.text("late", delay=30))
    assert took == 60
    assert (result.success, result.stop_reason) == (False, "deadline")


async def test_a_run_that_is_done_in_time_sees_nothing_of_the_reserve():
    result, model, took = await closing_run(answers.call("work", {"seconds": 20}), "done")
    assert (took, result.stop_reason, offered(model)) == (20, "finished", [True, True])


async def test_without_a_deadline_there_is_nothing_to_keep_back():
    model = ScriptedModel([answers.call("work", {"seconds": 1000}), "done"])
    result = await agent(model, limits=Limits(reserve=10)).run("go")
    assert result.stop_reason == "finished"


async def test_a_delegates_deadline_is_never_later_than_its_parents():
    left: list[float] = []

    @tool
    async def look(ctx: RunContext) -> None:
        left.append(ctx.remaining())

    for child_timeout, parent_timeout in [(100, 30), (20, 30), (None, 30), (20, None)]:
        child = BaseAgent(
            "child", "c", client=ScriptedModel([answers.call("look"), "ok"]), timeout=child_timeout
        ).add_tool(look)
        parent = BaseAgent(
            "parent", "p", client=ScriptedModel([answers.call("delegate_to_child", {"query": "?"}), "ok"])
        )
        assert (await parent.register_delegate(child).run("go", timeout=parent_timeout)).success
    assert left == [30, 20, 30, 20]


async def test_a_delegate_cut_with_its_parent_leaves_both_transcripts_whole():
    ended: list[AgentResult] = []
    child = agent(
        ScriptedModel([answers.call("work", {"seconds": 300})]),
        observers=[lambda e: ended.append(e.result) if e.kind == "run_finished" else None],
    )
    parent = BaseAgent("parent", "p", client=ScriptedModel([answers.call("delegate_to_A", {"query": "?"})]))
    result = await parent.register_delegate(child).run("go", timeout=30)
    assert [outcomes(result), outcomes(ended[0])] == [["timeout"], ["timeout"]]
    assert [result.stop_reason, ended[0].stop_reason] == ["deadline", "deadline"]
    assert_continuable(result)
    assert_continuable(ended[0])


async def test_a_tool_has_its_timeout_for_waiting_and_working_together():
    @tool(max_concurrency=1, timeout=10)
    async def one_at_a_time() -> None:
        await anyio.sleep(8)

    model = ScriptedModel([[answers.call("one_at_a_time"), answers.call("one_at_a_time")], "done"])
    started = anyio.current_time()
    result = await BaseAgent("A", "a", client=model).add_tool(one_at_a_time).run("go")
    assert sorted(outcomes(result)) == ["ok", "timeout"]
    assert anyio.current_time() - started == 10
