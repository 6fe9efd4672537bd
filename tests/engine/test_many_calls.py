"""A deadline and a budget hold whatever number of things one reply asks for."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import anyio
import pytest
from pydantic import BaseModel

from fractal import AgentResult, BaseAgent, LimitHit, Limits, Reply, ToolFinished, run_many, sync
from fractal._engine.calls import CALLS_AT_A_TIME
from fractal.messages import Transcript
from fractal.models import ModelRequest, ToolCall
from tests.streams import Watch
from tests.support import assert_continuable, in_thread, outcomes, with_turns

BAD = {"no tool": ("nothing", "{}"), "unfit": ("look", '{"x": 1}'), "no JSON": ("look", "{bad")}
GOOD = {"async": ("look", "{}"), "plain": ("plain", "{}")}
MANY = 20_000


class Flood:
    """A model of the user's own, whose first reply asks for many things."""

    def __init__(self, name: str, arguments: str, count: int) -> None:
        calls = tuple(ToolCall(f"c{number}", name, arguments) for number in range(count))
        self.replies = Reply(tool_calls=calls), Reply(text="done")

    async def respond(self, request: ModelRequest) -> Reply:
        return self.replies[len(request.transcript) > 1]


def looker(name: str, arguments: str, count: int, **options: Any) -> BaseAgent:
    async def look() -> str:
        return "rain"

    def plain() -> str:
        return "rain"

    async def wait() -> None:
        await anyio.sleep(60)

    agent = BaseAgent("A", "a", client=Flood(name, arguments, count), **options)
    return agent.add_tool(look).add_tool(plain).add_tool(wait)


async def streamed(agent: BaseAgent, **options: Any) -> AgentResult:
    async with agent.stream("go", **options) as stream:
        return await stream.result()


async def in_a_batch(agent: BaseAgent, **options: Any) -> AgentResult:
    [result] = await run_many(agent, ["go"], **options)
    return result


async def blocking(agent: BaseAgent, **options: Any) -> AgentResult:
    result: AgentResult = await in_thread(lambda: sync.run(agent, "go", **options))
    return result


ENTRIES: dict[str, Callable[..., Any]] = {
    "run": lambda agent, **options: agent.run("go", **options),
    "stream": streamed,
    "run_many": in_a_batch,
    "sync.run": blocking,
}


# ---- deadlines


@pytest.mark.parametrize("kind", [*BAD, *GOOD, "wait"])
async def test_a_deadline_holds_while_many_calls_are_answered(kind: str) -> None:
    name, arguments = {**BAD, **GOOD, "wait": ("wait", "{}")}[kind]
    agent = looker(name, arguments, MANY)
    started = time.monotonic()
    result = await agent.run("go", timeout=0.1)
    seconds = time.monotonic() - started
    if result.stop_reason != "finished":  # a quick machine may answer what cannot be called in this time
        assert result.stop_reason == "deadline"
    assert seconds < 5
    Transcript([*result.messages, {"role": "user", "content": "go on"}])  # each call is answered, in call order


async def test_other_tasks_go_on_while_many_calls_are_answered() -> None:
    agent = looker("nothing", "{}", MANY)
    result, turns = await with_turns(lambda: agent.run("go"))
    assert len(result.tool_results) == MANY
    assert turns >= MANY / CALLS_AT_A_TIME  # at least one for each slice; in one piece it would be a handful


async def test_a_cancellation_from_outside_arrives_between_the_calls() -> None:
    watch = Watch()
    agent = looker("look", "{}", MANY, observers=[watch])
    with anyio.move_on_after(0.05) as scope:
        await agent.run("go")
    assert scope.cancelled_caught
    [*_, last] = watch
    assert last.kind == "run_finished"
    Transcript([*last.result.messages, {"role": "user", "content": "go on"}])


async def test_calls_that_a_cut_run_has_not_come_to_are_answered_too() -> None:
    watch = Watch()
    scope = anyio.CancelScope()

    async def look() -> str:
        scope.cancel()
        return "rain"

    count = 2 * CALLS_AT_A_TIME + 5
    with scope:
        await BaseAgent("A", "a", client=Flood("look", "{}", count), observers=[watch]).add_tool(look).run("go")
    assert scope.cancelled_caught
    result = watch[-1].result  # type: ignore[union-attr]
    Transcript([*result.messages, {"role": "user", "content": "go on"}])
    assert len(outcomes(result)) == count
    assert outcomes(result)[-CALLS_AT_A_TIME:] == ["skipped"] * CALLS_AT_A_TIME
    assert result.tool_results[-1].error == "not called: the run ended first"
    watch.assert_well_formed()


async def test_many_calls_are_all_made_and_their_results_are_in_call_order() -> None:
    names: list[str] = []

    async def look(place: int) -> int:
        names.append(str(place))
        return place

    calls = tuple(ToolCall(f"c{n}", "look", f'{{"place": {n}}}') for n in range(2500))
    model = Flood("look", "{}", 0)
    model.replies = Reply(tool_calls=calls), Reply(text="done")
    result = await BaseAgent("A", "a", client=model).add_tool(look).run("go")
    assert [each.content for each in result.tool_results] == list(range(2500))
    assert len(names) == 2500


async def test_no_more_than_so_many_calls_are_under_way_at_once() -> None:
    running, most = 0, 0

    async def look() -> None:
        nonlocal running, most
        running += 1
        most = max(most, running)
        await anyio.sleep(0)
        running -= 1

    count = CALLS_AT_A_TIME + 500
    result = await BaseAgent("A", "a", client=Flood("look", "{}", count)).add_tool(look).run("go")
    assert outcomes(result) == ["ok"] * count
    assert most == CALLS_AT_A_TIME


def test_answering_a_transcript_costs_the_same_for_each_call() -> None:
    """Linear, and not quadratic: the answer of the last call looks at no other."""

    def seconds(count: int) -> float:
        function = {"name": "f", "arguments": "{}"}
        calls = [{"id": f"c{n}", "type": "function", "function": function} for n in range(count)]
        transcript = Transcript()
        transcript.append({"role": "assistant", "content": None, "tool_calls": calls})
        started = time.process_time()
        for n in range(count):
            transcript.answer(f"c{n}", "x")
        return time.process_time() - started

    small, large = min(seconds(10_000) for _ in range(3)), seconds(100_000)
    assert large < 10 * small * 4


# ---- budgets


@pytest.mark.parametrize("entry", ENTRIES)
@pytest.mark.parametrize("kind", [*BAD, *GOOD])
async def test_every_call_is_charged_whether_it_can_be_made_or_not(kind: str, entry: str) -> None:
    agent = looker(*{**BAD, **GOOD}[kind], 50)
    result = await ENTRIES[entry](agent, limits=Limits(max_tool_calls=10))
    made = "error" if kind in BAD else "ok"
    assert outcomes(result) == [made] * 10 + ["skipped"] * 40
    assert (result.success, result.stop_reason, result.usage.tool_calls) == (False, "budget", 10)
    assert_continuable(result)


async def test_calls_of_a_delegate_that_cannot_be_made_are_charged_to_all_above() -> None:
    inner = looker("nothing", "{}", 20)
    outer = BaseAgent("Boss", "b", client=Flood("ask", '{"query": "go"}', 1))
    outer.register_delegate(inner, tool_name="ask")
    result = await outer.run("go", limits=Limits(max_tool_calls=5))
    assert result.usage.tool_calls == 5


async def test_execute_tool_with_what_does_not_fit_is_charged_to_the_run_around_it() -> None:
    agent = looker("try_all", "{}", 1, limits=Limits(max_tool_calls=3))
    seen: list[str] = []

    async def try_all() -> None:
        seen.extend([(await agent.execute_tool("nothing")).outcome for _ in range(4)])

    await agent.add_tool(try_all).run("go")
    assert seen == ["error", "error", "skipped", "skipped"]


class Answer(BaseModel):
    number: int


async def test_an_answer_is_no_tool_call_whether_it_fits_or_not() -> None:
    class Answering:
        replies = iter(['{"number": "x"}', '{"number": 5}'])

        async def respond(self, request: ModelRequest) -> Reply:
            return Reply(tool_calls=(ToolCall("c1", "final_answer", next(self.replies)),))

    agent = BaseAgent("A", "a", client=Answering(), output_type=Answer, output_mode="tool")
    result = await agent.run("go", limits=Limits(max_tool_calls=0))
    assert result.content == Answer(number=5)
    assert result.usage.tool_calls == 0


async def test_a_spent_budget_is_told_of_each_call_that_it_does_not_allow() -> None:
    watch = Watch()
    agent = looker("nothing", "{}", 5, observers=[watch])
    await agent.run("go", limits=Limits(max_tool_calls=2))
    assert [event.limit for event in watch if isinstance(event, LimitHit)] == ["tool_calls"] * 3 + ["tool_calls"]
    told = [event.result.outcome for event in watch if isinstance(event, ToolFinished)]
    assert told == ["error", "error", "skipped", "skipped", "skipped"]
