"""What runs cost, and budgets of money: reserved over the whole tree before a request, settled after it."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from typing import Any

import anyio
import openai
import pytest

from fractal import (
    BaseAgent,
    BudgetExceeded,
    FallbackModel,
    InvalidArguments,
    LimitHit,
    Limits,
    ModelResponded,
    OpenAIModel,
    Price,
    PriceUnknown,
    RaceModel,
    Reply,
    SharedBudget,
    run_many,
    sync,
)
from fractal._engine.pricing import prices_of_library
from fractal.models import ModelRequest
from fractal.testing import Endpoint, ScriptedModel, answers, record_events
from fractal.testing.endpoint import RecordedRequest
from tests.without_uvloop import anyio_backend  # noqa: F401

StartEndpoint = Callable[..., Endpoint]

OUTPUT_ONLY = {"m": Price(input=0, output=1_000_000)}  # one unit of money a token of a reply


@pytest.fixture(autouse=True)
def no_library(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The tests say what models cost."""
    monkeypatch.setitem(sys.modules, "genai_prices", None)
    prices_of_library.cache_clear()
    yield
    prices_of_library.cache_clear()


def costing(tokens: int, text: str = "hi", **more: Any) -> answers.Answer:
    return answers.text(text, usage=(1, tokens), **more)


# ---- what a run cost


CLIENTS: dict[str, Callable[[Endpoint], Any]] = {
    "own": lambda one: OpenAIModel(base_url=one.url, api_key="sk-test"),
    "AsyncOpenAI": lambda one: openai.AsyncOpenAI(base_url=one.url, api_key="sk-test"),
    "OpenAI": lambda one: openai.OpenAI(base_url=one.url, api_key="sk-test"),
}


@pytest.mark.parametrize("streamed", [False, True])
@pytest.mark.parametrize("client", CLIENTS)
async def test_all_kinds_of_tokens_and_the_cost_are_in_the_usage(
    client: str, streamed: bool, endpoint: StartEndpoint
) -> None:
    usage = {
        "prompt_tokens": 1000,
        "completion_tokens": 100,
        "total_tokens": 1100,
        "prompt_tokens_details": {"cached_tokens": 400, "cache_write_tokens": 100},
        "completion_tokens_details": {"reasoning_tokens": 60},
    }
    one = endpoint(answers.text("hi", usage=usage))
    prices = {"m": Price(input=2, output=10, cached=0.2, cache_write=2.5)}
    agent = BaseAgent("A", "a", "m", CLIENTS[client](one), prices=prices)
    async with agent:
        if streamed:
            async with agent.stream("go") as stream:
                result = await stream.result()
        else:
            result = await agent.run("go")
    told = result.usage
    assert (told.input_tokens, told.output_tokens) == (1000, 100)
    assert (told.cached_input_tokens, told.cache_write_input_tokens, told.reasoning_tokens) == (400, 100, 60)
    assert told.cost == pytest.approx((500 * 2 + 400 * 0.2 + 100 * 2.5 + 100 * 10) / 1e6)


async def test_the_cost_of_delegates_is_in_the_callers_and_their_prices_are_too() -> None:
    below = BaseAgent("Below", "b", "m", ScriptedModel([costing(5)]))
    script = [answers.calls(answers.call("delegate_to_below", {"query": "?"}), usage=(1, 2)), costing(3)]
    above = BaseAgent("Above", "a", "m", ScriptedModel(script), prices=OUTPUT_ONLY).register_delegate(below)
    with record_events() as events:
        assert (await above.run("go")).usage.cost == 10.0
    assert [event.cost for event in events if isinstance(event, ModelResponded)] == [2.0, 5.0, 3.0]


async def test_a_delegate_with_prices_of_its_own_is_counted_with_them() -> None:
    dear = {"m": Price(input=0, output=7_000_000)}
    below = BaseAgent("Below", "b", "m", ScriptedModel([costing(5)]), prices=dear)
    script = [answers.calls(answers.call("delegate_to_below", {"query": "?"}), usage=(1, 2)), costing(3)]
    above = BaseAgent("Above", "a", "m", ScriptedModel(script), prices=OUTPUT_ONLY).register_delegate(below)
    assert (await above.run("go")).usage.cost == 2 + 35 + 3


async def test_without_prices_the_cost_is_not_known() -> None:
    result = await BaseAgent("A", "a", "m", ScriptedModel(["hi"])).run("go")
    assert (result.usage.cost, result.warnings) == (None, [])


async def test_of_a_model_without_a_price_the_cost_is_not_known_and_that_is_said_once() -> None:
    agent = BaseAgent("A", "a", "other", ScriptedModel(["hi", "hi"]), prices=OUTPUT_ONLY)
    first, second = await agent.run("go"), await agent.run("go")
    assert first.usage.cost is second.usage.cost is None
    assert first.warnings == ["prices= has no price for the model 'other': what it costs is not known"]
    assert second.warnings == []


async def test_of_a_reply_without_usage_the_cost_is_not_known() -> None:
    agent = BaseAgent("A", "a", "m", ScriptedModel([answers.text("hi", usage={})]), prices=OUTPUT_ONLY)
    assert (await agent.run("go")).usage.cost is None


async def test_one_reply_of_unknown_cost_makes_the_whole_unknown() -> None:
    below = BaseAgent("Below", "b", "other", ScriptedModel([costing(5)]))
    script = [answers.call("delegate_to_below", {"query": "?"}), costing(3)]
    above = BaseAgent("Above", "a", "m", ScriptedModel(script), prices=OUTPUT_ONLY).register_delegate(below)
    assert (await above.run("go")).usage.cost is None


async def test_a_run_that_asks_nobody_costs_nothing() -> None:
    agent = BaseAgent("A", "a", "m", ScriptedModel([]), prices=OUTPUT_ONLY)
    assert (await agent.run("go", limits=Limits(max_requests=0))).usage.cost == 0.0


async def test_the_model_that_answered_counts_not_the_one_that_was_asked() -> None:
    prices = OUTPUT_ONLY | {"large": Price(input=0, output=9_000_000)}
    model = ScriptedModel([answers.text("hi", usage=(1, 2), extra={"model": "large-2026-01-01"})])
    assert (await BaseAgent("A", "a", "m", model, prices=prices).run("go")).usage.cost == 18.0


async def test_prices_of_the_library_are_used_where_it_is_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    prices_of_library.cache_clear()
    pytest.importorskip("genai_prices")
    model = ScriptedModel([answers.text("hi", usage=(1_000_000, 0))])
    result = await BaseAgent("A", "a", "gpt-4o-mini", model).run("go")
    assert result.usage.cost == pytest.approx(0.15)


@pytest.mark.parametrize("wrong", [{"m": 1.0}, [], "m"])
def test_prices_that_are_none_are_refused_when_the_agent_is_made(wrong: Any) -> None:
    with pytest.raises(InvalidArguments, match="prices="):
        BaseAgent("A", "a", prices=wrong)


def test_a_budget_that_is_none_is_refused() -> None:
    with pytest.raises(InvalidArguments, match="budget="):
        BaseAgent("A", "a", budget=5)  # type: ignore[arg-type]
    with pytest.raises(InvalidArguments, match="budget="):
        sync.run(BaseAgent("A", "a", client=ScriptedModel(["hi"])), "go", budget=Limits())  # type: ignore[arg-type]


# ---- a budget of money


def team(url: str, size: int, *, max_tokens: int | None, prices: Any = OUTPUT_ONLY) -> BaseAgent:
    """An agent that asks as many delegates at once, all of the model at an endpoint."""
    model = OpenAIModel(base_url=url, api_key="sk-test")
    above = BaseAgent("Team", "ask", "m", model, prices=prices, max_tokens=max_tokens)
    for number in range(size):
        above.register_delegate(BaseAgent(f"D{number}", "answer", "m", model, max_tokens=max_tokens))
    return above


def asking_all(tokens: int, delay: float = 0.0) -> Callable[[RecordedRequest], answers.Answer]:
    def reply(request: RecordedRequest) -> answers.Answer:
        tools = request.body.get("tools", ())
        is_first = request.body["messages"][-1]["role"] == "user"
        if tools and is_first:
            calls = [answers.call(each["function"]["name"], {"query": "?"}) for each in tools]
            return answers.calls(*calls, usage=(1, tokens), delay=delay)
        return costing(tokens, delay=delay)

    return reply


@pytest.mark.parametrize("streamed", [False, True])
async def test_8_parallel_delegates_with_room_for_3_requests_send_3(streamed: bool, endpoint: StartEndpoint) -> None:
    one = endpoint(asking_all(100, delay=0.02))
    above = team(one.url, 8, max_tokens=100)
    limits = Limits(max_cost=300.0)
    async with above:
        if streamed:
            async with above.stream("go", limits=limits) as stream:
                result = await stream.result()
        else:
            result = await above.run("go", limits=limits)
    # One of the team's own, two of delegates; then there is nothing left for its answer.
    assert len(one.requests) == 3
    assert result.stop_reason == "budget"
    assert isinstance(result.exception, BudgetExceeded)
    assert (result.exception.resource, result.exception.limit, result.exception.used) == ("cost", 300.0, 300.0)
    assert "the budget of 300 in money is spent (300 used" in (result.error or "")
    assert sorted(call.outcome for call in result.tool_results) == ["error"] * 6 + ["ok"] * 2
    assert result.usage.cost == 300.0


def test_through_the_facade_too(endpoint: StartEndpoint) -> None:
    one = endpoint(asking_all(100))
    result = sync.run(team(one.url, 8, max_tokens=100), "go", limits=Limits(max_cost=300.0))
    assert (len(one.requests), result.usage.cost) == (3, 300.0)


async def test_what_a_reply_did_not_take_is_there_for_the_next(endpoint: StartEndpoint) -> None:
    one = endpoint([answers.calls(answers.call("nothing", {}), usage=(1, 10)) for _ in range(4)] + [costing(10)])
    agent = BaseAgent("A", "a", "m", OpenAIModel(base_url=one.url, api_key="k"), prices=OUTPUT_ONLY, max_tokens=100)
    agent.add_tool(lambda: "nothing", name="nothing")
    async with agent:
        result = await agent.run("go", limits=Limits(max_cost=140.0))
    assert (result.success, result.usage.cost, len(one.requests)) == (True, 50.0, 5)


async def test_replies_without_a_bound_come_one_at_a_time_and_one_of_them_goes_over(endpoint: StartEndpoint) -> None:
    one = endpoint(asking_all(100, delay=0.01))
    above = team(one.url, 8, max_tokens=None)
    async with above:
        result = await above.run("go", limits=Limits(max_cost=250.0))
    # 100 by the team, 100 and 100 by two delegates: the third was sent with 50 left, and nothing after it.
    assert (len(one.requests), result.usage.cost) == (3, 300.0)
    assert one.max_in_flight == 1


async def test_replies_with_a_bound_come_side_by_side(endpoint: StartEndpoint) -> None:
    one = endpoint(asking_all(1, delay=0.2))
    above = team(one.url, 4, max_tokens=10)
    async with above:
        result = await above.run("go", limits=Limits(max_cost=100.0))
    assert result.success
    assert one.max_in_flight == 4


async def test_a_wait_for_other_replies_ends_with_the_run(endpoint: StartEndpoint) -> None:
    def reply(request: RecordedRequest) -> answers.Answer:
        return asking_all(1)(request) if request.body.get("tools") else answers.hang()

    one = endpoint(reply)
    above = team(one.url, 3, max_tokens=None)
    async with above:
        with anyio.fail_after(5):
            result = await above.run("go", limits=Limits(max_cost=100.0), timeout=0.3)
    assert result.stop_reason == "deadline"
    assert len(one.requests) == 2


async def test_a_limit_in_money_is_told(endpoint: StartEndpoint) -> None:
    model = ScriptedModel([])
    with record_events() as events:
        await BaseAgent("A", "a", "m", model, prices=OUTPUT_ONLY).run("go", limits=Limits(max_cost=0))
    [hit] = [event for event in events if isinstance(event, LimitHit)]
    assert hit.limit == "cost"
    assert model.requests == []


async def test_a_limit_in_money_and_a_model_without_a_price_are_refused(endpoint: StartEndpoint) -> None:
    one = endpoint("hi")
    model = OpenAIModel(base_url=one.url, api_key="k")
    for agent in (
        BaseAgent("A", "a", "m", model, limits=Limits(max_cost=1)),
        BaseAgent("A", "a", "other", model, limits=Limits(max_cost=1), prices=OUTPUT_ONLY),
        BaseAgent("A", "a", "m", model, budget=SharedBudget(max_cost=1)),
    ):
        with pytest.raises(PriceUnknown, match=r"max_cost needs the price of the model '(m|other)'") as caught:
            await agent.run("go")
        assert caught.value.model in ("m", "other")
        await agent.aclose()
    assert one.requests == []


async def test_the_price_of_each_member_of_a_combination_has_to_be_known(endpoint: StartEndpoint) -> None:
    one = endpoint("hi")
    small, large = (OpenAIModel(base_url=one.url, api_key="k", model=name) for name in ("m", "large"))
    agent = BaseAgent("A", "a", "x", FallbackModel(small, large), prices=OUTPUT_ONLY, limits=Limits(max_cost=1))
    with pytest.raises(PriceUnknown, match="'large'"):
        await agent.run("go")
    await agent.aclose()


@pytest.mark.parametrize("kind", [FallbackModel, RaceModel])
async def test_each_request_of_a_combination_is_set_aside_at_the_dearest_price(
    kind: Any, endpoint: StartEndpoint
) -> None:
    prices = OUTPUT_ONLY | {"large": Price(input=0, output=10_000_000)}
    for budget, expected in ((1999.0, 1), (2000.0, 2)):
        one = endpoint(lambda request: answers.failure(400, "no"))
        small, large = (OpenAIModel(base_url=one.url, api_key="k", model=name) for name in ("m", "large"))
        agent = BaseAgent("A", "a", "x", kind(small, large), prices=prices, max_tokens=100)
        async with agent:
            result = await agent.run("go", limits=Limits(max_cost=budget), max_retries=0)
        assert (len(one.requests), result.success) == (expected, False)


async def test_a_failed_request_costs_nothing_and_a_cut_one_its_prompt(endpoint: StartEndpoint) -> None:
    one = endpoint(lambda request: answers.failure(500) if len(one.requests) < 3 else answers.hang())
    prices = {"m": Price(input=1_000_000, output=0)}
    shared = SharedBudget(max_cost=1e6)
    agent = BaseAgent("A", "a", "m", OpenAIModel(base_url=one.url, api_key="k"), prices=prices, budget=shared)
    async with agent:
        await agent.run("go", limits=Limits(request_timeout=0.2), max_retries=0)
        assert shared.used["cost"] == 0
        await agent.run("go", limits=Limits(request_timeout=0.2), max_retries=0)
        assert shared.used["cost"] == 0
        await agent.run("go", limits=Limits(request_timeout=0.2), max_retries=0)
        first = shared.used["cost"]
        assert first > 0
        with anyio.move_on_after(0.2):
            await agent.run("go")
    assert shared.used["cost"] == 2 * first
    assert shared.usage().cost == 0.0


async def test_a_reply_without_usage_takes_all_that_was_set_aside() -> None:
    shared = SharedBudget(max_cost=1000)
    model = ScriptedModel([answers.text("hi", usage={})])
    await BaseAgent("A", "a", "m", model, prices=OUTPUT_ONLY, max_tokens=100, budget=shared).run("go")
    assert repr(shared) == "<SharedBudget cost=100 of 1000>"
    assert shared.usage().cost is None


class Asking:
    """A model that asks another agent for its answer."""

    def __init__(self, agent: BaseAgent) -> None:
        self.agent = agent

    async def respond(self, request: ModelRequest) -> Reply:
        result = await self.agent.run("go")
        return Reply(text=str(result.content), input_tokens=1, output_tokens=1)


async def test_a_model_that_runs_an_agent_does_not_wait_for_itself() -> None:
    inner = BaseAgent("Inner", "i", "m", ScriptedModel([costing(5)]))
    outer = BaseAgent("Outer", "o", "m", Asking(inner), prices=OUTPUT_ONLY)
    with anyio.fail_after(5):
        result = await outer.run("go", limits=Limits(max_cost=100))
    assert (result.content, result.usage.cost) == ("hi", 6.0)


# ---- a budget that several hold


async def test_runs_of_several_agents_hold_one_budget() -> None:
    tenant = SharedBudget(max_cost=350.0, max_requests=100)
    agents = [
        BaseAgent(f"A{n}", "a", "m", ScriptedModel(lambda r: costing(100)), prices=OUTPUT_ONLY, budget=tenant)
        for n in range(5)
    ]
    results = [await agent.run("go", limits=Limits(max_cost=1000)) for agent in agents]
    assert [result.stop_reason for result in results] == ["finished"] * 4 + ["budget"]
    assert tenant.usage().cost == 400.0  # each may go over by one reply without max_tokens
    assert tenant.usage().requests == 4
    assert repr(tenant) == "<SharedBudget requests=4 of 100, cost=400 of 350>"


async def test_runs_side_by_side_hold_it_too(endpoint: StartEndpoint) -> None:
    one = endpoint(lambda request: costing(100, delay=0.02))
    model = OpenAIModel(base_url=one.url, api_key="k")
    agent = BaseAgent("A", "a", "m", model, prices=OUTPUT_ONLY, max_tokens=100)
    day = SharedBudget(max_cost=300.0)
    async with agent:
        results = await run_many(agent, range(8), budget=day)
    assert sorted(result.stop_reason for result in results) == ["budget"] * 5 + ["finished"] * 3
    assert len(one.requests) == 3


async def test_a_budget_of_the_agent_and_one_of_the_run_both_hold() -> None:
    tenant, day = SharedBudget(max_requests=5), SharedBudget(max_requests=1)
    agent = BaseAgent("A", "a", "m", ScriptedModel(lambda r: "hi"), budget=tenant)
    assert (await agent.run("go", budget=day)).success
    assert (await agent.run("go", budget=day)).stop_reason == "budget"
    assert (await agent.run("go")).success
    assert (tenant.usage().requests, day.usage().requests) == (2, 1)


async def test_a_delegate_with_the_same_budget_is_counted_once() -> None:
    tenant = SharedBudget(max_requests=10)
    below = BaseAgent("Below", "b", "m", ScriptedModel(["deep"]), budget=tenant)
    script = [answers.call("delegate_to_below", {"query": "?"}), "done"]
    above = BaseAgent("Above", "a", "m", ScriptedModel(script), budget=tenant).register_delegate(below)
    assert (await above.run("go", budget=tenant)).success
    assert tenant.usage().requests == 3


def test_threads_and_event_loops_hold_it_together(endpoint: StartEndpoint) -> None:
    one = endpoint("hi")
    agent = BaseAgent("A", "a", "m", OpenAIModel(base_url=one.url, api_key="k"))
    day = SharedBudget(max_requests=5)

    def work(backend: str) -> None:
        anyio.run(main, backend=backend)

    async def main() -> None:
        async with agent:
            for _ in range(4):
                await agent.run("go", budget=day)

    async def both() -> None:
        async with anyio.create_task_group() as tasks:
            for backend in ("asyncio", "trio"):
                tasks.start_soon(anyio.to_thread.run_sync, work, backend)

    anyio.run(both)
    assert len(one.requests) == 5


def test_a_shared_budget_says_what_cannot_be() -> None:
    with pytest.raises(InvalidArguments, match=r"Limits\.max_cost is -1"):
        SharedBudget(max_cost=-1)
