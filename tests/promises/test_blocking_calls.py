"""Blocking calls work where they are made: in any thread, in a notebook, inside a tool."""

from __future__ import annotations

import sys
import threading
import types
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import anyio
import pytest

from fractal import BaseAgent, Limits, sync
from fractal.testing import Endpoint, answers
from tests.support import calls_then

StartEndpoint = Callable[..., Endpoint]
pytestmark = pytest.mark.usefixtures("shared_portal")


@pytest.fixture(params=["asyncio", "trio"])
def loop(request: pytest.FixtureRequest) -> str:
    return request.param


def echo(request: Any) -> str:
    return f"you said {request.messages[-1]['content']}"


def test_any_number_of_threads_may_ask_one_agent_at_once(endpoint: StartEndpoint) -> None:
    endpoint(echo)
    agent = BaseAgent("Echo", "You repeat.")
    with ThreadPoolExecutor(8) as threads:
        results = list(threads.map(lambda n: sync.run(agent, f"number {n}"), range(24)))
    assert [result.content for result in results] == [f"you said number {n}" for n in range(24)]


async def test_a_cell_of_a_notebook_may_block(endpoint: StartEndpoint, monkeypatch: pytest.MonkeyPatch) -> None:
    endpoint(echo)
    notebook: Any = types.ModuleType("IPython")  # a cell runs on a thread whose event loop is running
    notebook.get_ipython = object
    monkeypatch.setitem(sys.modules, "IPython", notebook)
    assert sync.run(BaseAgent("Echo", "You repeat."), "hello").content == "you said hello"


def test_a_plain_tool_that_asks_an_agent_is_part_of_the_run_that_called_it(endpoint: StartEndpoint) -> None:
    one = endpoint(lambda request: calls_then("done", answers.call("ask"))(request) if request.tools else "help")
    helper = BaseAgent("Helper", "You help.")

    def ask() -> str:
        """Ask the helper."""
        return sync.run(helper, "help me").content

    chief = BaseAgent("Chief", "You ask.").add_tool(ask)
    result = sync.run(chief, "go")
    assert (result.content, result.usage.requests, len(one.requests)) == ("done", 3, 3)
    short = sync.run(chief, "go", limits=Limits(max_requests=1))
    assert (short.stop_reason, len(one.requests)) == ("budget", 4)


async def test_a_plain_tool_never_blocks_the_event_loop(endpoint: StartEndpoint) -> None:
    endpoint(calls_then("done", answers.call("wait")))
    released = threading.Event()

    def wait() -> str:
        """Wait for the event loop to go on."""
        assert released.wait(20)
        return "released"

    async def release() -> None:
        await anyio.sleep(0)
        released.set()

    async with anyio.create_task_group() as group:
        group.start_soon(release)
        result = await BaseAgent("Waiter", "You wait.").add_tool(wait).run("go")
    assert [call.content for call in result.tool_results] == ["released"]
