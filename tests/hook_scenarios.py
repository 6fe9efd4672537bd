"""Runs with hooks around tool calls and requests, and with guards; cancelled at each of their points like others."""

from __future__ import annotations

from contextlib import suppress
from typing import Any

import anyio

from fractal import Around, BaseAgent, Delta, Limits, ModelError, run_many, tool
from fractal.model import ModelRequest, Reply, Sink
from fractal.testing import ScriptedModel, answers
from tests.edge_scenarios import SCENARIOS, failing_cleanup, never_ending, shielded_cleanup
from tests.scenarios import MOMENT, Scenario, agent, by_turn, calls, scenario
from tests.streams import Watch

__all__ = ["SCENARIOS"]


async def waiting(ctx: Any, what: Any, next: Any) -> Any:
    await anyio.sleep(0)
    try:
        return await next()
    finally:
        await anyio.sleep(0)


def plain(ctx: Any, what: Any, next: Any) -> Any:
    return next()


async def again(ctx: Any, what: Any, next: Any) -> Any:
    await next()
    return await next()


async def in_a_group(ctx: Any, what: Any, next: Any) -> Any:
    await never_ending()
    async with anyio.create_task_group() as group:
        group.start_soon(anyio.sleep, MOMENT)
        return await next()


async def in_a_hurry(ctx: Any, what: Any, next: Any) -> Any:
    with anyio.move_on_after(MOMENT):
        return await next()
    return "too slow"


async def with_a_cleanup_that_fails(ctx: Any, what: Any, next: Any) -> Any:
    try:
        return await next()
    finally:
        await failing_cleanup()


@scenario
def hooks_around_tools(watch: Watch) -> Scenario:
    one = agent(watch, calls("look", "tidy"), "done", around_tool=[waiting, plain, waiting])
    return lambda: one.run("go", around_tool=in_a_group, timeout=60)


@scenario
def hooks_around_tools_in_threads(watch: Watch) -> Scenario:
    one = agent(watch, calls("read", "buy"), "done", around_tool=[waiting, plain])
    return lambda: one.run("go", around_tool=in_a_group, timeout=60)


@scenario
def hooks_that_call_their_tool_again(watch: Watch) -> Scenario:
    one = agent(watch, calls("tidy", "buy"), "done", around_tool=[again, waiting])

    async def go() -> None:
        await one.run("go")
        await one.execute_tool("tidy")

    return go


@scenario
def hooks_that_do_not_wait_for_their_tool(watch: Watch) -> Scenario:
    async def slow() -> None:
        await shielded_cleanup()

    one = agent(watch, calls("slow", "tidy"), "done", tools=[slow], around_tool=[in_a_hurry, waiting])
    left = agent(watch, calls("slow"), "done", tools=[slow], around_tool=in_a_hurry, limits=Limits(on_stubborn="raise"))

    async def go() -> None:
        await one.run("go")
        await left.run("go")

    return go


@scenario
def hooks_whose_cleanup_fails_around_tools_and_requests(watch: Watch) -> Scenario:
    one = agent(watch, calls("look"), "done", around_tool=with_a_cleanup_that_fails)
    other = agent(watch, "done", around_model=with_a_cleanup_that_fails)

    async def go() -> None:
        await one.run("go")
        await other.run("go")

    return go


@scenario
def hooks_around_tools_that_need_approval(watch: Watch) -> Scenario:
    @tool(requires_approval=True, max_concurrency=1)
    async def pay() -> str:
        await anyio.sleep(0)
        return "paid"

    one = agent(watch, calls("pay", "pay"), "done", tools=[pay], around_tool=[plain, waiting])
    return lambda: one.run("go", approve=lambda call: True)


@scenario
def hooks_that_hold_in_delegates(watch: Watch) -> Scenario:
    child = agent(watch, calls("look", "buy"), "child", around_tool=waiting)
    ask = answers.calls(answers.call("down", {"query": "?"}), answers.call("look"))
    hooks = [Around(waiting, delegates=True), Around(plain, delegates=True)]
    top = agent(watch, ask, "top", around_tool=hooks, around_model=hooks).register_delegate(child, "down")
    return lambda: top.run("go")


def hooked_requests(watch: Watch) -> BaseAgent:
    return agent(watch, calls("look"), "some words of text", around_model=[waiting, plain, in_a_group])


@scenario
def hooks_around_requests(watch: Watch) -> Scenario:
    one = hooked_requests(watch)
    return lambda: one.run("go")


@scenario
def hooks_around_requests_of_a_stream(watch: Watch) -> Scenario:
    one = hooked_requests(watch)

    async def go() -> None:
        async with one.stream("go", buffer=0) as stream:
            async for _ in stream.text():
                pass

    return go


@scenario
def hooks_around_requests_of_a_batch(watch: Watch) -> Scenario:
    one = hooked_requests(watch)
    return lambda: run_many(one, ["a", "b"])


@scenario
def hooks_around_requests_that_fail_and_are_cut(watch: Watch) -> Scenario:
    class Slow(ScriptedModel):
        async def stream(self, request: ModelRequest, sink: Sink) -> Reply:
            await sink(Delta("text", "so "))
            await shielded_cleanup()
            return await self.respond(request)

    async def insist(ctx: Any, request: Any, next: Any) -> Any:
        with suppress(ModelError):
            return await next()
        return await next(request.replace(model="small"))

    def reply(request: ModelRequest) -> Any:
        return "done" if request.model == "small" else answers.failure(429, "slow down", retry_after=MOMENT)

    failing = agent(watch, client=ScriptedModel(reply), around_model=insist, max_retries=1)
    slow = agent(watch, client=Slow(lambda request: "done"), around_model=in_a_hurry)

    async def go() -> None:
        await failing.run("go")
        async with slow.stream("go") as stream:
            await stream.result()

    return go


@scenario
def guards_that_let_a_run_pass(watch: Watch) -> Scenario:
    async def look(ctx: Any) -> None:
        await anyio.sleep(0)

    async def look_longer(ctx: Any) -> bool:
        await never_ending()
        return True

    def look_plainly(ctx: Any) -> None: ...

    one = agent(watch, calls("look"), "done", guard=[look, look_longer, look_plainly])

    async def go() -> None:
        await one.run("go")
        async with one.stream("go", buffer=0) as stream:
            async for _ in stream:
                pass

    return go


@scenario
def guards_that_stop_a_run(watch: Watch) -> Scenario:
    async def refuse(ctx: Any) -> None:
        await anyio.sleep(MOMENT)
        raise ValueError("no")

    async def clean_up(ctx: Any) -> None:
        await shielded_cleanup()

    async def clean_up_badly(ctx: Any) -> None:
        await failing_cleanup(60)

    slow = answers.text("never", delay=60)
    one = agent(watch, slow, guard=[refuse, clean_up, clean_up_badly])
    quick = agent(watch, calls("buy"), "never", guard=refuse)

    async def go() -> None:
        assert (await one.run("go")).stop_reason == "guard"
        assert (await quick.run("go", timeout=60)).stop_reason == "guard"
        async with one.stream("go") as stream:
            async for _ in stream:
                pass

    return go


@scenario
def guards_that_ask_agents(watch: Watch) -> Scenario:
    judge = agent(watch, calls("tidy"), "safe")

    async def ask(ctx: Any) -> bool:
        return bool((await judge.run("safe?")).content == "safe")

    async def ask_by_delegation(ctx: Any) -> None:
        (await ctx.agent.call_agent(judge, "safe?")).raise_for_error()

    one = agent(watch, calls("look"), "done", guard=[ask, ask], around_model=waiting)
    other = agent(watch, calls("look"), "done", guard=ask_by_delegation)

    async def go() -> None:
        await one.run("go")
        await other.run("go")

    return go


@scenario
def a_guard_that_hangs_until_the_time_is_over(watch: Watch) -> Scenario:
    async def hang(ctx: Any) -> None:
        await shielded_cleanup()

    one = BaseAgent("A", "You try.", client=by_turn("done"), observers=[watch], guard=hang)
    return lambda: one.run("go", timeout=MOMENT * 4)
