"""What runs cost, counted and not timed: calls of functions, Python's and C's, which no busy machine changes.

The bounds leave a quarter and more to what was counted on Python 3.11 (the numbers beside them). One that fails says
that something is done twice, or for each message, which was not before.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import pytest

from fractal import BaseAgent, Reply, sync
from fractal.models import ModelRequest, ToolCall
from fractal.testing import Endpoint, ScriptedModel, answers
from fractal.tracing import Instrumentation
from tests.spans import Telemetry

StartEndpoint = Callable[..., Endpoint]


@pytest.fixture
def anyio_backend(backend: str) -> tuple[str, dict[str, object]]:
    """No uvloop: what is written in C makes no calls that could be counted."""
    return backend, {}


class Counted:
    """Counts the calls in a block, in this thread; coverage's own tracer is another, and makes none here."""

    def __init__(self) -> None:
        self.calls = 0

    def __enter__(self) -> Counted:
        self._before = sys.getprofile()
        sys.setprofile(self._count)
        return self

    def __exit__(self, *exc: object) -> None:
        sys.setprofile(self._before)

    def _count(self, frame: Any, event: str, argument: object) -> None:
        self.calls += event in ("call", "c_call")


class Looker:
    """A model that asks for three tools and then answers."""

    first = Reply(tool_calls=tuple(ToolCall(f"call_{n}", "look", json.dumps({"place": f"{n}"})) for n in range(3)))
    last = Reply(text="It rains.")

    async def respond(self, request: ModelRequest) -> Reply:
        return self.last if request.transcript.messages[-1]["role"] == "tool" else self.first


class Brief:
    """A model that answers at once."""

    reply = Reply(text="hello")

    async def respond(self, request: ModelRequest) -> Reply:
        return self.reply


async def look(place: str) -> str:
    """Look out of the window."""
    return f"rain in {place}"


async def calls_of(run: Callable[[], Any]) -> int:
    """The calls of one run, when all that is made once has been made."""
    for _ in range(2):
        await run()
    with Counted() as counted:
        await run()
    return counted.calls


def history(messages: int) -> list[dict[str, Any]]:
    return [{"role": ("user", "assistant")[n % 2], "content": f"message {n}"} for n in range(messages)]


async def test_a_run_of_two_requests_and_three_tools(backend: str) -> None:
    agent = BaseAgent("A", "a", client=Looker()).add_tool(look)
    calls = await calls_of(lambda: agent.run("go"))
    assert calls < {"asyncio": 1620, "trio": 2320}[backend]  # 1 295 and 1 850


@pytest.mark.parametrize("model", [Looker(), Brief()], ids=["tools", "smallest"])
async def test_opentelemetry_without_an_sdk_costs_a_fiftieth_at_most(model: Any) -> None:
    agents = [BaseAgent("A", "a", client=model, observers=given).add_tool(look) for given in ([], [Instrumentation()])]
    # The least of some: trio now and then has work of its own to do.
    without, with_it = [min([await calls_of(lambda a=a: a.run("go")) for _ in range(5)]) for a in agents]
    assert with_it - without < 12  # 9, of 427 in the smallest run


async def test_opentelemetry_with_an_sdk(backend: str) -> None:
    agent = BaseAgent("A", "a", client=Looker(), observers=[Telemetry().instrumentation]).add_tool(look)
    calls = await calls_of(lambda: agent.run("go"))
    assert calls < {"asyncio": 4600, "trio": 5100}[backend]


async def test_a_run_over_our_own_connections(backend: str, endpoint: StartEndpoint) -> None:
    endpoint(lambda request: "done" if request.body["messages"][-1]["role"] == "tool" else THREE_LOOKS)
    agent = BaseAgent("A", "a").add_tool(look)
    async with agent:
        calls = await calls_of(lambda: agent.run("go"))
    assert calls < {"asyncio": 2680, "trio": 3380}[backend]  # 2 140 and 2 702


THREE_LOOKS = answers.calls(*(answers.call("look", {"place": str(n)}) for n in range(3)))


@pytest.mark.parametrize("kind", ["in memory", "own wire"])
async def test_a_long_transcript_costs_a_run_next_to_nothing(kind: str, endpoint: StartEndpoint) -> None:
    endpoint("hello")
    agent = BaseAgent("A", "a", client=None if kind == "own wire" else ScriptedModel(lambda request: "hello"))
    calls: dict[int, int] = {}
    async with agent:
        for messages in (2, 200):
            start = history(messages)
            calls[messages] = await calls_of(lambda start=start: agent.run("go", messages=start))
    # A history that is handed in is looked at once, message by message; nothing else may ask for each of them.
    assert (calls[200] - calls[2]) / 198 < 12  # 6 in memory, 9 with the request


async def test_a_long_request_costs_no_more_than_a_short_one(backend: str, endpoint: StartEndpoint) -> None:
    endpoint("hello")
    agent = BaseAgent("A", "a")
    async with agent:
        short, long = [await calls_of(lambda size=size: agent.run("x" * size)) for size in (10, 100_000)]
    # While one waits for room, the answer is heard already, which takes a task: some 600 calls.
    assert long - short < 50  # 0


class Encoding(ScriptedModel):
    """A model in memory whose requests are written as for the wire."""

    async def respond(self, request: ModelRequest) -> Reply:
        assert request.body()
        return await super().respond(request)


async def test_a_turn_costs_the_same_however_long_the_conversation_is() -> None:
    turns = 100
    model = Encoding([answers.call("look", {"place": "here"})] * turns + ["done"])
    seen: list[int] = []
    counted = Counted()

    async def count(place: str) -> str:
        seen.append(counted.calls)
        return place

    agent = BaseAgent("A", "a", client=model).add_tool(count, name="look")
    with counted:
        assert (await agent.run("go", turns + 1)).success
    each = [after - before for before, after in pairwise(seen)]
    assert max(each[-10:]) < 1.1 * max(each[5:15])


async def test_a_piece_of_a_stream(endpoint: StartEndpoint) -> None:
    calls: dict[int, int] = {}
    for words in (20, 420):
        endpoint(answers.text("word " * words))
        agent = BaseAgent("A", "a")

        async def read(agent: BaseAgent = agent) -> None:
            async with agent.stream("go") as stream:
                async for _ in stream:
                    pass

        async with agent:
            calls[words] = await calls_of(read)
    # How many pieces come in one read is up to the machine, so this bound is for the most there can be.
    assert (calls[420] - calls[20]) / 400 < 200  # 67 to 122, by how many come in one


async def test_a_delegate_costs_a_run_and_a_tool_call(backend: str) -> None:
    calls: list[int] = []
    agent = BaseAgent("bottom", "a", client=ScriptedModel(lambda request: "done"))
    for depth in range(3):
        calls.append(await calls_of(lambda agent=agent: agent.run("go")))
        above = ScriptedModel(
            lambda r, to=agent.name: (
                "done" if len(r.transcript) > 1 else answers.call(f"delegate_to_{to}", {"query": "go"})
            )
        )
        agent = BaseAgent(f"agent{depth}", "a", client=above).register_delegate(agent)
    first, second = calls[1] - calls[0], calls[2] - calls[1]
    assert first < {"asyncio": 1650, "trio": 2200}[backend]  # 1 311 and 1 792
    assert second < 1.2 * first  # not more, the deeper it is


def test_a_blocking_call_costs_little_more_than_the_run() -> None:
    agent = BaseAgent("A", "a", client=ScriptedModel(lambda request: "done"))
    for _ in range(2):
        sync.run(agent, "go")
    with Counted() as here:  # what the event loop does is counted above, and is in another thread
        sync.run(agent, "go")
    assert here.calls < 110  # 82


def test_importing_the_agent_class_about_doubles_what_importing_its_requirements_costs() -> None:
    code = (
        "import sys; calls = 0\n"
        "def count(frame, event, argument):\n    global calls; calls += event in ('call', 'c_call')\n"
        "sys.setprofile(count)\nIMPORTS\nsys.setprofile(None)\nprint(calls)"
    )
    needed, ours = (
        int(
            subprocess.run(
                [sys.executable, "-c", code.replace("IMPORTS", imports)], capture_output=True, check=True
            ).stdout
        )
        for imports in ("import anyio; from pydantic import BaseModel, TypeAdapter", "from fractal import BaseAgent")
    )
    assert ours < 2.5 * needed  # 2.02, the requirements included
