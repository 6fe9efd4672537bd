"""One agent object serves all requests: runs side by side do not see each other."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import anyio

from fractal import AgentResult, BaseAgent, RunContext, run_many
from fractal.testing import Endpoint, answers

StartEndpoint = Callable[..., Endpoint]
RUNS = 20


def play(request: Any) -> Any:
    """Have the input looked up, and repeat what was found."""
    last = request.messages[-1]
    if last["role"] == "tool":
        return answers.text(f"found {last['content']}")
    return answers.call("look_up", {"word": last["content"]})


async def look_up(word: str, ctx: RunContext[str]) -> str:
    """Look a word up."""
    await anyio.sleep(0)
    return f"{word} for {ctx.deps}"


async def test_runs_at_once_have_messages_usage_ids_and_deps_of_their_own(endpoint: StartEndpoint) -> None:
    one = endpoint(play, latency=0.1)
    agent = BaseAgent("Dictionary", "You look words up.").add_tool(look_up)
    results: dict[int, AgentResult[Any]] = {}

    async def ask(number: int) -> None:
        results[number] = await agent.run(f"word {number}", deps=f"user {number}")

    async with agent, anyio.create_task_group() as group:
        for number in range(RUNS):
            group.start_soon(ask, number)
    for number, result in results.items():
        assert result.content == f"found word {number} for user {number}"
        assert [message["role"] for message in result.messages] == ["user", "assistant", "tool", "assistant"]
        texts = json.dumps(result.messages)
        assert not [other for other in range(RUNS) if other != number and f"word {other} " in texts]
        assert (result.usage.requests, len(result.tool_results)) == (2, 1)
    assert len({result.run_id for result in results.values()}) == RUNS
    assert one.max_in_flight > 4  # side by side they were indeed


async def test_a_run_that_fails_disturbs_none_beside_it(endpoint: StartEndpoint) -> None:
    endpoint(lambda request: answers.failure(400) if request.messages[-1]["content"] == "1" else "fine")
    results = await run_many(BaseAgent("A", "a"), map(str, range(4)), max_concurrency=4)
    assert [result.success for result in results] == [True, False, True, True]


async def test_what_an_agent_is_given_meanwhile_holds_for_later_runs(endpoint: StartEndpoint) -> None:
    one = endpoint(play)
    agent = BaseAgent("Dictionary", "You look words up.")

    async def look_up(word: str) -> str:
        """Look a word up."""
        if "later" not in agent.get_tools():
            agent.add_tool(lambda: None, name="later")
        return word

    agent.add_tool(look_up)
    await agent.run("one")
    await agent.run("two")
    offered = [[tool["function"]["name"] for tool in request.tools] for request in one.requests]
    assert offered == [["look_up"], ["look_up"], ["look_up", "later"], ["look_up", "later"]]
