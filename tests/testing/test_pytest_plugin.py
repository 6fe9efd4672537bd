"""The fixtures of the pytest plugin, in test files of their own, under each plugin that runs async tests."""

from __future__ import annotations

import re

import pytest

pytest_plugins = ["pytester"]

FIXTURES = """
import anyio
import pytest

from fractal import BaseAgent, OpenAIModel, tool
from fractal.testing import RealRequestBlocked, ScriptedModel, answers


def test_an_endpoint(fractal_endpoint):
    from fractal import sync

    endpoint = fractal_endpoint(["hello", "again"])
    assert sync.run(BaseAgent("A", "a"), "hi").content == "hello"
    assert endpoint.answers_left == 1
    other = fractal_endpoint("other", api_key="sk-other")
    assert sync.run(BaseAgent("A", "a"), "hi").content == "other"


def test_no_requests(fractal_no_requests):
    from fractal import sync

    agent = BaseAgent("A", "a", client=OpenAIModel(base_url="https://models.example/v1", api_key="any"))
    with pytest.raises(RealRequestBlocked):
        sync.run(agent, "hi")
    assert fractal_no_requests == ["https://models.example/v1/chat/completions"]


def test_virtual_time(fractal_virtual_time):
    fractal_virtual_time.run(anyio.sleep, 3600)
    assert fractal_virtual_time.elapsed == 3600


def test_cancelled_everywhere(fractal_cancel_everywhere):
    agent = BaseAgent("A", "a", client=ScriptedModel(lambda request: "ok"))

    async def scenario():
        await agent.run("hi")

    assert fractal_cancel_everywhere(scenario, backends=["trio"], ways=["scope"]).total > 0


def test_events(fractal_events):
    agent = BaseAgent("A", "a", client=ScriptedModel(["ok"]))
    anyio.run(agent.run, "hi")
    assert fractal_events.kinds[-1] == "run_finished"


def test_events_that_are_not_well_formed(fractal_events):
    test_events(fractal_events)
    fractal_events.pop()  # the end of the run


def test_a_stall(fractal_no_stalls):
    import time

    @tool
    async def block():
        time.sleep(0.8)

    agent = BaseAgent("A", "a", client=ScriptedModel([answers.call("block"), "ok"])).add_tool(block)
    anyio.run(agent.run, "hi")
"""

LEFT = """
import socket
import threading
import unittest

import anyio
import pytest

from fractal import BaseAgent, OpenAIModel
from fractal.testing import Endpoint, ScriptedModel

pytestmark = pytest.mark.usefixtures("fractal_nothing_left")
kept = []


@pytest.fixture(scope="module", autouse=True)
def end():
    over = threading.Event()
    kept.append(over)
    yield
    over.set()
    kept.clear()


def test_nothing():
    anyio.run(BaseAgent("A", "a", client=ScriptedModel(["ok"])).run, "hi")


def test_a_socket():
    kept.append(socket.create_server(("127.0.0.1", 0)))


class TestInAClass:
    def test_a_thread(self):
        def forgotten():
            kept[0].wait()

        threading.Thread(target=forgotten).start()


class TestOfUnittest(unittest.TestCase):
    def test_nothing_here(self):
        pass


async def test_nothing_async(fractal_endpoint):
    agent = BaseAgent("A", "a", client=OpenAIModel(base_url=fractal_endpoint("ok").url))
    assert (await agent.run("hi")).content == "ok"


async def test_a_task_async():
    async def outlive():
        await anyio.sleep(3600)

    START(outlive)
    await anyio.sleep(0)
"""
ON_ASYNCIO = "import asyncio; kept.append(asyncio.get_running_loop().create_task(outlive()))"
ON_TRIO = "import trio; trio.lowlevel.spawn_system_task(outlive)"
ON_BOTH = f"""
    import sniffio
    if sniffio.current_async_library() == "trio":
        {ON_TRIO}
    else:
        {ON_ASYNCIO}
"""

# How each plugin is told to run async tests, how a task of its event loop is left, and how often each test runs.
PLUGINS = {
    "anyio": ("anyio_mode = auto", ON_BOTH, 2),
    "asyncio": ("asyncio_mode = auto", ON_ASYNCIO, 1),
    "trio": ("trio_mode = true", ON_TRIO, 1),
}


def run(pytester: pytest.Pytester, source: str, plugin: str) -> pytest.RunResult:
    pytester.makeini(f"[pytest]\n{PLUGINS[plugin][0]}\n")
    pytester.makepyfile(source)
    others = [argument for name in PLUGINS if name != plugin for argument in ("-p", f"no:{name}")]
    return pytester.runpytest_subprocess("-p", "no:cacheprovider", "-p", "no:timeout", "-v", *others, timeout=100)


@pytest.mark.slow
@pytest.mark.timeout(240)
def test_each_fixture_does_what_its_tool_does(pytester: pytest.Pytester):
    result = run(pytester, FIXTURES, "anyio")
    result.assert_outcomes(passed=7, errors=2)  # what is wrong with events and the event loop is found at the end
    result.stdout.fnmatch_lines_random(
        [
            "E *AssertionError: what has started has not ended: a run of A",
            "E *AssertionError: the event loop was blocked:*",
        ]
    )


@pytest.mark.slow
@pytest.mark.timeout(240)
@pytest.mark.parametrize("plugin", PLUGINS)
def test_what_a_test_leaves_is_found_under_every_plugin(pytester: pytest.Pytester, plugin: str):
    _, start, times = PLUGINS[plugin]
    result = run(pytester, LEFT.replace("    START(outlive)", f"    {start.strip()}"), plugin)
    result.assert_outcomes(passed=2 + times, failed=2 + times)
    told = result.stdout.str()
    for name, found in {
        "test_a_socket": r"socket:.* at 127.0.0.1:\d+ ",
        "test_a_thread": r"thread 'Thread-.*' at test_what_a_test_leaves.*.py:\d+ in forgotten",
        "test_a_task_async": r"task .* at test_what_a_test_leaves.*.py:\d+ in outlive",
    }.items():
        assert re.search(rf"FAILED .*{name}", told), name
        assert re.search(rf"^[E|\s]+{found}", told, re.MULTILINE), found


@pytest.mark.slow
@pytest.mark.timeout(240)
def test_a_session_that_uses_no_fixture_loads_neither_the_tools_nor_an_event_loop(pytester: pytest.Pytester):
    pytester.makeconftest(
        """
        import sys

        def pytest_sessionfinish():
            assert "fractal.pytest_plugin" in sys.modules
            assert not sys.modules.keys() & {"fractal.testing", "trio", "openai", "httpx2"}
        """
    )
    pytester.makepyfile("def test_something(): pass")
    others = [
        argument for name in ("trio", "asyncio", "anyio", "hypothesispytest") for argument in ("-p", f"no:{name}")
    ]
    result = pytester.runpytest_subprocess("-p", "no:cacheprovider", *others, "-p", "no:llmock", timeout=100)
    result.assert_outcomes(passed=1)
    assert result.ret == 0
