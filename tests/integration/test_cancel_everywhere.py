"""Runs of every kind, cancelled at each of their checkpoints in every way there is."""

from __future__ import annotations

import gc
import time
from collections.abc import Awaitable, Callable, Iterator
from typing import Any

import anyio
import pytest

import fractal.sync
from fractal import (
    AnswerRejected,
    BaseAgent,
    FallbackModel,
    LimitedModel,
    Limits,
    RaceModel,
    RunContext,
    _threads,
    run_many,
    stream_many,
    tool,
)
from fractal._run import Run, current_run
from fractal.events import RunFinished
from fractal.testing import Endpoint, ScriptedModel, answers, cancel_everywhere
from fractal.testing._leftovers import wait_until_empty
from tests.streams import Watch, assert_well_formed
from tests.support import assert_continuable

Scenario = Callable[["Watched"], Awaitable[object]]


class Watched(Watch):
    """What the runs of a scenario tell, and what they must have given back."""

    def __init__(self) -> None:
        super().__init__()
        self.runs: list[Run] = []

    def __call__(self, event: Any) -> None:
        super().__call__(event)
        run = current_run.get()
        if run is not None and run not in self.runs:
            self.runs.append(run)

    def check(self) -> None:
        """The events make sense, the transcripts can go on, and everything that was lent is back."""
        roots = [event.run_id for event in self if event.kind == "run_started" and event.parent_id is None]
        for root in roots:
            assert_well_formed(self.tree(root))
        for event in self:
            if isinstance(event, RunFinished) and event.result.messages:
                assert_continuable(event.result)
        for run in self.runs:
            budget = run.budget
            assert budget.used["tokens"] == budget.input_tokens + budget.output_tokens, "tokens that nobody used"
            assert budget.used["requests"] <= 20
        lost = wait_until_empty(lambda: [repr(gate) for gate in _threads._gates if gate.held or gate.waiting], 5)
        assert not lost, "a place in a limit is lost"  # a thread that was abandoned keeps its place until it ends
        self.clear()
        self.runs.clear()

    def tree(self, root: str) -> list[Any]:
        """The events of a run and of those below it."""
        ids = {root}
        for event in self:
            if event.parent_id in ids:
                ids.add(event.run_id)
        return [event for event in self if event.run_id in ids]


@tool
async def look(where: str = "here") -> str:
    """Look."""
    await anyio.sleep(0.0002)
    return where


@tool
def read(ctx: RunContext) -> str:
    """Read, in a thread."""
    time.sleep(0.0005)
    return f"{ctx.remaining() > 0}"


@tool(on_cancel="wait")
def buy() -> str:
    """Buy, in a thread that is waited for."""
    time.sleep(0.0005)
    return "bought"


def model(*steps: Any) -> ScriptedModel:
    return ScriptedModel(list(steps))


def agent(watched: Watched, *steps: Any, **options: Any) -> BaseAgent:
    """An agent that is used once."""
    options.setdefault("client", model(*steps))
    options.setdefault("limits", Limits(max_requests=20, max_tokens=1_000_000))
    return BaseAgent("A", "a", observers=[watched], **options).add_tool(look).add_tool(read).add_tool(buy)


ALL_TOOLS = answers.calls(answers.call("look"), answers.call("read"), answers.call("buy"), answers.call("look"))
SCENARIOS: dict[str, Scenario] = {}


def scenario(function: Scenario) -> Scenario:
    SCENARIOS[function.__name__] = function
    return function


@scenario
async def tools_in_tasks_and_threads(watched: Watched) -> None:
    await agent(watched, ALL_TOOLS, answers.calls(answers.call("look")), "done").run("go", timeout=60)


@scenario
async def a_run_with_every_limit(watched: Watched) -> None:
    bounds = Limits(max_requests=9, max_tokens=10_000, request_timeout=9, tool_timeout=9, grace=2, reserve=1)
    await agent(watched, ALL_TOOLS, "done", limits=bounds).run("go", timeout=60)


@scenario
async def a_run_that_may_leave_its_tools(watched: Watched) -> None:
    bounds = Limits(max_tokens=10_000, on_stubborn="raise")
    await agent(watched, answers.calls(answers.call("look"), answers.call("look")), "done", limits=bounds).run("go")


@scenario
async def delegates_three_deep(watched: Watched) -> None:
    deepest = agent(watched, ALL_TOOLS, "deep")
    middle = agent(watched, answers.calls(answers.call("down", {"query": "?"}), answers.call("look")), "middle")
    top = agent(watched, answers.calls(answers.call("down", {"query": "?"}), answers.call("look")), "top")
    await top.register_delegate(middle.register_delegate(deepest, "down"), "down").run("go")


@scenario
async def agents_called_in_tools(watched: Watched) -> None:
    top = agent(watched, answers.calls(answers.call("ask"), answers.call("read_along")), "top")

    async def ask() -> str:
        return str(await top.call_agent(agent(watched, answers.calls(answers.call("look")), "child"), "?"))

    async def read_along() -> str:
        async with agent(watched, answers.calls(answers.call("look")), "child").stream("?", buffer=0) as stream:
            return "".join([piece async for piece in stream.text()])

    await top.add_tool(ask).add_tool(read_along).run("go")


@scenario
async def the_facade_in_a_tool(watched: Watched) -> None:
    child = agent(watched, answers.calls(answers.call("look")), "child")

    def ask() -> str:
        return fractal.sync.run(child, "?").content

    await agent(watched, answers.calls(answers.call("ask"), answers.call("look")), "top").add_tool(ask).run("go")


@scenario
async def a_stream_read_to_its_end(watched: Watched) -> None:
    async with agent(watched, ALL_TOOLS, "some text").stream("go", buffer=1) as stream:
        async for _ in stream:
            pass
    await stream.result()


@scenario
async def a_stream_that_is_left(watched: Watched) -> None:
    async with agent(watched, ALL_TOOLS, "some text").stream("go") as stream:
        async for event in stream:
            if event.kind == "tool_started":
                break


@scenario
async def retries(watched: Watched) -> None:
    fails = answers.failure(429, "slow down", retry_after=0.0002)
    await agent(watched, fails, fails, "done").run("go", timeout=60)


@scenario
async def waiting_for_a_place(watched: Watched) -> None:
    @tool(max_concurrency=1)
    async def alone() -> str:
        await anyio.sleep(0.0002)
        return "alone"

    @tool(max_concurrency=1, on_cancel="wait")
    def alone_in_a_thread() -> str:
        time.sleep(0.0002)
        return "alone"

    calls = answers.calls(*(answers.call(name) for name in ("alone", "alone_in_a_thread") for _ in range(3)))
    one = agent(watched, client=ScriptedModel(lambda request: "done" if len(request.transcript) > 1 else calls))
    one.add_tool(alone).add_tool(alone_in_a_thread)
    async with anyio.create_task_group() as group:
        group.start_soon(one.run, "go")
        group.start_soon(one.run, "go")


@scenario
async def a_model_that_has_to_wait(watched: Watched) -> None:
    limited = LimitedModel(model(*["done"] * 3), max_concurrency=1, rate=(2, 0.002))
    await run_many(agent(watched, client=limited), ["a", "b", "c"])


@scenario
async def approvals(watched: Watched) -> None:
    @tool(requires_approval=True)
    async def pay(amount: int) -> str:
        return f"paid {amount}"

    async def approve(call: Any) -> bool:
        await anyio.sleep(0)
        return call.arguments["amount"] < 3

    calls = answers.calls(*(answers.call("pay", {"amount": amount}) for amount in (1, 5)))
    await agent(watched, calls, "done", approve=approve).add_tool(pay).run("go")
    await agent(watched, calls, "done").add_tool(pay).run("go", approve=lambda call: True)


@scenario
async def an_answer_that_is_asked_for_again(watched: Watched) -> None:
    one = agent(watched, "[1", "[7]", "[3]", output_type=list[int], output_mode="prompt")

    @one.output_validator
    async def small(value: list[int]) -> None:
        await anyio.sleep(0)
        if value[0] > 5:
            raise AnswerRejected("too big")

    @one.output_validator
    def fine(value: list[int]) -> list[int]:
        return value

    await one.run("go")


@scenario
async def a_conversation_that_is_summed_up(watched: Watched) -> None:
    async def compact(messages: list[Any]) -> str:
        await anyio.sleep(0)
        return f"{len(messages)} messages"

    history: list[Any] = [{"role": role, "content": "x" * 200} for role in ("user", "assistant") * 4]
    one = agent(watched, answers.calls(answers.call("look")), "done", context_window=600, compact=compact)
    await one.run("go", messages=history)


@scenario
async def many_runs(watched: Watched) -> None:
    one = agent(watched, client=ScriptedModel(lambda request: answers.text("done", delay=0.0001)))
    await run_many(one, range(5), max_concurrency=2)
    async with stream_many(one, range(3), max_concurrency=2, buffer=0) as batch:
        async for _ in batch:
            pass


@scenario
async def models_in_combination(watched: Watched) -> None:
    slow, bad = model(answers.text("slow", delay=5)), model(answers.failure(400, "no"))
    await agent(watched, client=FallbackModel(bad, model("done"))).run("go")
    await agent(watched, client=FallbackModel(slow, model("done"), after=0.0005)).run("go")
    await agent(watched, client=RaceModel(model(answers.text("slow", delay=5)), model("done"))).run("go")


# Those that need an endpoint


def answer_over_http(request: Any) -> Any:
    last = request.body["messages"][-1]
    if last["role"] == "tool":
        return "some words of text"
    return answers.failure(503, "busy", retry_after=0.0002) if last["content"] == "fail" else ALL_TOOLS


@scenario
async def requests_over_http(watched: Watched) -> None:
    await agent(watched, client=None).run("go")


@scenario
async def more_requests_than_connections(watched: Watched) -> None:
    from fractal import OpenAIModel

    one = agent(watched, client=OpenAIModel(max_connections=1))
    await run_many(one, ["a", "b", "c"])


@scenario
async def a_stream_over_http(watched: Watched) -> None:
    async with agent(watched, client=None).stream("go", buffer=0) as stream:
        async for _ in stream:
            pass


WAYS = {"asyncio": ["scope", "native", "native twice", "wait_for", "again"], "trio": ["scope", "native", "again"]}
BACKENDS_AND_WAYS = [
    pytest.param(backend, way, marks=pytest.mark.slow if way != "scope" else (), id=f"{backend}-{way}")
    for backend, ways in WAYS.items()
    for way in ways
]


@pytest.fixture
def in_process(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """An endpoint for the scenarios that need one, and a collector that looks only at what they make."""
    gc.collect()
    gc.freeze()
    with Endpoint(answer_over_http) as one:
        monkeypatch.setenv("OPENAI_BASE_URL", one.url)
        monkeypatch.setenv("OPENAI_API_KEY", "sk-test")
        yield
    gc.unfreeze()


def visit(function: Scenario, **options: Any) -> Any:
    watched = Watched()

    async def go() -> None:
        await function(watched)

    return cancel_everywhere(go, check=watched.check, within=10, **options)


@pytest.mark.parametrize(("backend", "way"), BACKENDS_AND_WAYS)
@pytest.mark.parametrize("name", SCENARIOS)
def test_a_run_that_is_cancelled_anywhere_leaves_nothing_and_says_so(
    name: str, way: str, backend: str, in_process: None, record_property: Any
):
    report = visit(SCENARIOS[name], backends=[backend], ways=[way])
    record_property("points", report.total)
    assert report.total > 3
