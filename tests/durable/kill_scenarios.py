"""Scenarios for `kill_everywhere`: durable runs of every kind, whose processes are killed."""

from __future__ import annotations

from typing import Any

import anyio
from pydantic import BaseModel

from fractal import AgentResult, Allow, BaseAgent, Defer, Deny, Limits, RunContext, sync, tool
from fractal.testing import KillWorld, answers

Result = AgentResult[Any]


def payer(world: KillWorld, **options: Any) -> Any:
    """A tool that pays."""

    @tool(name="pay", idempotent=True, **options)
    async def pay(order: int) -> str:
        """Pay an order."""
        await anyio.sleep(0.001 * (5 - order))  # the last begun ends first
        world.effect(f"pay {order}")
        return f"paid {order}"

    return pay


def pays(*orders: int) -> Any:
    return answers.calls(*(answers.call("pay", {"order": order}) for order in orders))


async def parallel_tools(world: KillWorld) -> Result:
    model = world.model([pays(1, 2, 3), pays(4), "done"])
    agent = BaseAgent("Clerk", "You pay.", client=model).add_tool(payer(world))
    return await agent.run("go", journal=world.journal, run_id="one")


async def plain_tools(world: KillWorld) -> Result:
    @tool(idempotent=True, sequential=True)
    def pay(order: int) -> str:
        """Pay an order."""
        world.effect(f"pay {order}")
        return f"paid {order}"

    model = world.model([pays(1, 2), "done"])
    agent = BaseAgent("Clerk", "You pay.", client=model).add_tool(pay)
    return await agent.run("go", journal=world.journal, run_id="one")


async def parallel_delegates(world: KillWorld) -> Result:
    lead = BaseAgent("Lead", "You lead.", client=world.model([_ask("a", "b"), "done"]))
    for name, orders in (("a", (1, 2)), ("b", (3,))):
        helper = BaseAgent(name, "You pay.", client=world.model([pays(*orders), f"{name} is done"]))
        lead.register_delegate(helper.add_tool(payer(world)))
    return await lead.run("go", journal=world.journal, run_id="one")


def _ask(*names: str) -> Any:
    return answers.calls(*(answers.call(f"delegate_to_{name}", {"query": "pay"}) for name in names))


async def delegates_in_a_tool(world: KillWorld) -> Result:
    helpers = [BaseAgent(f"h{n}", "You pay.", client=world.model([pays(n), "paid"])) for n in (1, 2)]
    for helper in helpers:
        helper.add_tool(payer(world))

    @tool(after_crash="repeat")
    async def both(ctx: RunContext[Any]) -> str:
        """Ask both at once."""
        async with anyio.create_task_group() as group:
            for helper in helpers:
                group.start_soon(ctx.agent.call_agent, helper, "pay")
        return "both"

    agent = BaseAgent("Lead", "You lead.", client=world.model([answers.call("both"), "done"])).add_tool(both)
    return await agent.run("go", journal=world.journal, run_id="one")


async def streams(world: KillWorld) -> Result:
    model = world.model([answers.calls(answers.call("pay", {"order": 1}), text="Let me pay."), "all is paid"])
    agent = BaseAgent("Clerk", "You pay.", client=model).add_tool(payer(world))
    async with agent.stream("go", journal=world.journal, run_id="one") as stream:
        async for _ in stream:
            pass
        return await stream.result()


async def retries(world: KillWorld) -> Result:
    failed = world.directory / "failed"

    def answer(request: Any) -> Any:
        if request["messages"][-1]["role"] == "user" and not failed.exists():
            failed.touch()
            return answers.failure(500, headers={"retry-after": "0"})
        return pays(1) if request["messages"][-1]["role"] == "user" else "done"

    agent = BaseAgent("Clerk", "You pay.", client=world.model(answer)).add_tool(payer(world))
    return await agent.run("go", journal=world.journal, run_id="one")


async def approvals(world: KillWorld) -> Result:
    def approve(call: Any) -> Any:
        return {1: Allow(), 2: Deny("too much"), 3: Allow({"order": 4})}[call.arguments["order"]]

    model = world.model([pays(1, 2, 3), "done"])
    agent = BaseAgent("Clerk", "You pay.", client=model).add_tool(payer(world, requires_approval=True))
    return await agent.run("go", journal=world.journal, run_id="one", approve=approve)


async def deferred_approvals(world: KillWorld) -> Result:
    model = world.model([pays(1, 2, 3), "done"])
    agent = BaseAgent("Clerk", "You pay.", client=model).add_tool(payer(world, requires_approval=True))

    def approve(call: Any) -> Any:
        return Allow() if call.arguments["order"] == 1 else Defer()

    result = await agent.run("go", journal=world.journal, run_id="one", approve=approve)
    while result.pending:
        call = result.pending[0]
        answer = Allow() if call.arguments["order"] == 2 else Deny("no")
        result = await agent.resume(world.journal, "one", {call.call_id: answer}, approve=approve)
    return result


class Bill(BaseModel):
    """What is owed."""

    total: int


async def structured_output(world: KillWorld) -> Result:
    model = world.model([pays(1), '{"total": "much"}', '{"total": 3}'])
    agent = BaseAgent("Clerk", "You pay.", client=model, output_type=Bill, output_mode="native")
    return await agent.add_tool(payer(world)).run("go", journal=world.journal, run_id="one")


async def answer_by_tool(world: KillWorld) -> Result:
    model = world.model([pays(1), answers.call("final_answer", {"total": 3})])
    agent = BaseAgent("Clerk", "You pay.", client=model, output_type=Bill, output_mode="tool")
    return await agent.add_tool(payer(world)).run("go", journal=world.journal, run_id="one")


async def limits(world: KillWorld) -> Result:
    model = world.model([pays(1, 2, 3), "done"])
    agent = BaseAgent("Clerk", "You pay.", client=model).add_tool(payer(world))
    bounds = Limits(max_tool_calls=2, max_tokens=100_000)
    return await agent.run("go", journal=world.journal, run_id="one", limits=bounds, timeout=60)


async def conversations(world: KillWorld) -> Result:
    agent = BaseAgent("Clerk", "You pay.", client=world.model([pays(1), "one is paid", pays(2), "two is paid"]))
    agent.add_tool(payer(world))
    first = await agent.run("pay 1", journal=world.journal, run_id="one")
    return await agent.run("pay 2", messages=first.messages, journal=world.journal, run_id="two")


async def windows(world: KillWorld) -> Result:
    def summed_up(messages: list[Any]) -> str:
        world.effect("sum up")
        return f"{len(messages)} messages"

    history = [{"role": ("user", "assistant")[n % 2], "content": "word " * 100} for n in range(20)]
    model = world.model(lambda request: "done" if request["messages"][-1]["role"] == "tool" else pays(1))
    agent = BaseAgent("Clerk", "You pay.", client=model, context_window=2000, compact=summed_up)
    return await agent.add_tool(payer(world)).run("go", messages=history, journal=world.journal, run_id="one")


def on_the_facade(world: KillWorld) -> Result:
    model = world.model([pays(1, 2, 3), "done"])
    agent = sync.BaseAgent("Clerk", "You pay.", client=model).add_tool(payer(world))
    return agent.run("go", journal=world.journal, run_id="one")


SCENARIOS = {
    each.__name__: each
    for each in (
        *(parallel_tools, plain_tools, parallel_delegates, delegates_in_a_tool, streams, retries, approvals),
        *(deferred_approvals, structured_output, answer_by_tool, limits, conversations, windows, on_the_facade),
    )
}
