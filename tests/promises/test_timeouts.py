"""A timeout leaves nothing running: the tasks of a run have ended when its call returns, and a thread is named."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Awaitable, Callable
from typing import Any

import anyio
import pytest

from fractal import AgentResult, BaseAgent
from fractal.testing import Endpoint, answers, assert_nothing_left
from tests.support import calls_then

StartEndpoint = Callable[..., Endpoint]
SOON = 0.3


class Team:
    """An agent whose delegate has a tool that goes on until it is cancelled."""

    def __init__(self) -> None:
        self.begun = self.ended = 0
        clerk = BaseAgent("Clerk", "You dig.").add_tool(self.dig)
        self.agent = BaseAgent("Team", "You ask the clerk.").register_delegate(clerk).add_tool(self.dig)

    async def dig(self) -> str:
        """Dig in the archive."""
        self.begun += 1
        try:
            await anyio.sleep_forever()
        finally:
            await anyio.sleep(0)  # a cleanup that awaits
            self.ended += 1
        return "nothing"


def play(request: Any) -> Any:
    """Call all tools that there are; without any, answer."""
    calls = [
        answers.call(name, {"query": "?"} if name.startswith("delegate") else {})
        for name in (tool["function"]["name"] for tool in request.tools)
    ]
    return answers.calls(*calls) if calls else "an answer"


async def by_its_own_timeout(run: Callable[..., Awaitable[AgentResult[Any]]]) -> None:
    result = await run("go", timeout=SOON)
    assert (result.success, result.stop_reason) == (False, "deadline")
    assert {call.outcome for call in result.tool_results} <= {"timeout"}


async def by_a_scope(run: Callable[..., Awaitable[AgentResult[Any]]]) -> None:
    with anyio.move_on_after(SOON) as scope:
        await run("go")
    assert scope.cancelled_caught


async def by_wait_for(run: Callable[..., Awaitable[AgentResult[Any]]]) -> None:
    with pytest.raises(TimeoutError):
        await asyncio.wait_for(run("go"), SOON)


@pytest.mark.parametrize("cut", [by_its_own_timeout, by_a_scope, by_wait_for])
async def test_the_tasks_of_a_run_have_ended_when_its_call_returns(
    cut: Callable[..., Awaitable[None]], endpoint: StartEndpoint, anyio_backend_name: str
) -> None:
    if cut is by_wait_for and anyio_backend_name == "trio":
        pytest.skip("asyncio's own")
    endpoint(play)
    await BaseAgent("Warm", "You warm the connection up.").run("go")
    team = Team()
    async with assert_nothing_left():
        await cut(team.agent.run)
        assert team.begun == team.ended  # at once, and not some time later


async def test_a_thread_that_goes_on_is_named_in_the_result(endpoint: StartEndpoint) -> None:
    endpoint(calls_then("done", answers.call("read")))
    begun, let_go = threading.Event(), threading.Event()

    def read() -> None:
        """Read for long."""
        begun.set()
        let_go.wait(30)

    agent = BaseAgent("Reader", "You read.").add_tool(read)
    try:
        result = await agent.run("go", timeout=1)
    finally:
        let_go.set()
    assert begun.is_set()
    assert [(call.tool_name, call.outcome) for call in result.abandoned] == [("read", "abandoned")]
