"""A fault of a test fails the test: what its script raises comes out of every verb, and is no result."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Any

import anyio
import pytest

from fractal import (
    BaseAgent,
    ConnectionFailed,
    FallbackModel,
    OpenAIModel,
    RaceModel,
    run_many,
    stream_many,
    sync,
    tool,
)
from fractal.testing import Endpoint, ScriptedModel, ScriptedRequest, answers, record_events
from tests.without_uvloop import anyio_backend  # noqa: F401


class Misspelt(Exception):
    """What the script of a test raises."""


def broken(request: ScriptedRequest) -> answers.AnswerLike:
    raise Misspelt(request.messages[-1]["content"])


def boss_of(one: Any) -> BaseAgent:
    call = answers.call(f"delegate_to_{one.name}", {"query": "go"})
    return BaseAgent("Boss", "b", client=ScriptedModel([answers.calls(call, call), "never"])).register_delegate(one)


def boss_by_tool(one: Any, *, blocking: bool = False) -> BaseAgent:
    boss = BaseAgent("Boss", "b", client=ScriptedModel([answers.call("ask"), "never"]))

    async def ask() -> Any:
        return (await boss.call_agent(one, "go")).content

    def ask_blocking() -> Any:
        return sync.run(one, "go").content

    return boss.add_tool(ask_blocking if blocking else ask, name="ask")


def agents() -> dict[str, Callable[[ScriptedModel], Any]]:
    return {
        "alone": lambda model: BaseAgent("A", "a", client=model),
        "delegate": lambda model: boss_of(BaseAgent("a", "a", client=model)),
        "delegate of a delegate": lambda model: boss_by_tool(
            boss_of(BaseAgent("a", "a", client=model)), blocking=False
        ),
        "in a tool": lambda model: boss_by_tool(BaseAgent("a", "a", client=model), blocking=False),
        "in a blocking tool": lambda model: boss_by_tool(BaseAgent("a", "a", client=model), blocking=True),
        "fallback": lambda model: BaseAgent("A", "a", client=FallbackModel(model, ScriptedModel(["never"]))),
        "race": lambda model: BaseAgent("A", "a", client=RaceModel(model, ScriptedModel([answers.hang()]))),
    }


async def by_stream(agent: BaseAgent) -> None:
    async with agent.stream("go") as stream:
        async for _ in stream:
            pass
    await stream.result()


async def by_stream_many(agent: BaseAgent) -> None:
    async with stream_many(agent, ["go"]) as batch:
        async for _ in batch:
            pass


VERBS: dict[str, Callable[[BaseAgent], Awaitable[object]]] = {
    "run": lambda agent: agent.run("go"),
    "call": lambda agent: agent("go"),
    "call_agent": lambda agent: BaseAgent("Other", "o").call_agent(agent, "go"),
    "stream": by_stream,
    "run_many": lambda agent: run_many(agent, ["go"]),
    "stream_many": by_stream_many,
}


def blocking_stream(agent: BaseAgent) -> None:
    with sync.stream(agent, "go") as stream:
        for _ in stream:
            pass
    stream.result()


BLOCKING_VERBS: dict[str, Callable[[BaseAgent], object]] = {
    "run": lambda agent: sync.run(agent, "go"),
    "run_sync": lambda agent: agent.run_sync("go"),
    "start": lambda agent: sync.start(agent, "go").result(timeout=10),
    "stream": blocking_stream,
    "run_many": lambda agent: sync.run_many(agent, ["go"]),
}


@pytest.mark.parametrize("make", agents().values(), ids=agents())
@pytest.mark.parametrize("verb", VERBS.values(), ids=VERBS)
async def test_what_a_script_raises_comes_out_of_every_verb(verb: Any, make: Any) -> None:
    with anyio.fail_after(10), record_events() as events, pytest.raises(Misspelt, match=r"^go$"):
        await verb(make(ScriptedModel(broken)))
    events.assert_well_formed()


@pytest.mark.parametrize("make", agents().values(), ids=agents())
@pytest.mark.parametrize("verb", BLOCKING_VERBS.values(), ids=BLOCKING_VERBS)
def test_what_a_script_raises_comes_out_of_every_blocking_verb(verb: Any, make: Any) -> None:
    with pytest.raises(Misspelt, match=r"^go$"):
        verb(make(ScriptedModel(broken)))


@pytest.mark.parametrize("blocking", [False, True], ids=["awaited", "blocking"])
async def test_what_a_script_raises_comes_out_of_execute_tool(blocking: bool) -> None:
    boss = boss_by_tool(BaseAgent("a", "a", client=ScriptedModel(broken)), blocking=blocking)
    with anyio.fail_after(10), pytest.raises(Misspelt):
        await boss.execute_tool("ask")


@pytest.mark.parametrize(
    ("script", "kind"),
    [
        (lambda request: request.no_such_field, AttributeError),
        (lambda request: request["no such field"], KeyError),
        (lambda request: 5, TypeError),
        (lambda request: [], TypeError),
        ([5], TypeError),
        ([], AssertionError),
        (lambda: "no parameter", TypeError),
    ],
    ids=range(7),
)
async def test_every_fault_of_a_script_is_raised_as_what_it_is(script: Any, kind: type[Exception]) -> None:
    with pytest.raises(kind) as caught:
        await BaseAgent("A", "a", client=ScriptedModel(script)).run("go")
    assert type(caught.value) is kind


@pytest.mark.parametrize(
    "script",
    [[ValueError("odd")], lambda request: ValueError("odd"), [ConnectionFailed("odd")]],
    ids=["a list", "a function", "of ours"],
)
async def test_exceptions_that_a_script_plays_are_the_models(script: Any) -> None:
    result = await BaseAgent("A", "a", client=ScriptedModel(script)).run("go", max_retries=0)
    assert not result.success
    assert "odd" in (result.error or "")


async def test_a_run_error_that_a_function_raises_is_the_models() -> None:
    def failing(request: ScriptedRequest) -> answers.AnswerLike:
        raise ConnectionFailed("odd")

    result = await BaseAgent("A", "a", client=ScriptedModel(failing)).run("go", max_retries=0)
    assert isinstance(result.exception, ConnectionFailed)


async def test_faults_of_two_delegates_at_once_leave_as_one() -> None:
    both = anyio.Event()
    waiting: list[str] = []

    async def ask(name: str) -> Any:
        waiting.append(name)
        if len(waiting) == 2:
            both.set()
        await both.wait()
        return (await BaseAgent("a", "a", client=ScriptedModel(broken)).run(name)).content

    calls = answers.calls(answers.call("ask", {"name": "one"}), answers.call("ask", {"name": "two"}))
    boss = BaseAgent("Boss", "b", client=ScriptedModel([calls])).add_tool(ask)
    with anyio.fail_after(10), pytest.raises(Misspelt):
        await boss.run("go")


# ---- one shape of a request


@tool
def add(a: int, b: int) -> int:
    return a + b


async def test_a_request_has_one_shape_in_scripts_models_and_endpoints() -> None:
    seen: list[Any] = []

    def script(request: Any) -> str:
        seen.append(request)
        return "done"

    model = ScriptedModel(script)
    with Endpoint(script) as endpoint:
        for client in (model, OpenAIModel(base_url=endpoint.url, api_key="x")):
            agent = BaseAgent("A", "Be brief.", client=client, temperature=0.5).add_tool(add)
            assert (await agent.run("go")).success
        asked = [*seen, *model.requests, *endpoint.requests]
    assert len(asked) == 4
    for request in asked:
        assert [message["role"] for message in request.messages] == ["system", "user"]
        assert [each["function"]["name"] for each in request.tools] == ["add"]
        assert request.body["messages"] == request.messages
        assert request.body["temperature"] == 0.5
    assert model.requests[0]["messages"] == model.requests[0].messages
    assert len(seen[0].transcript) >= 1


async def test_a_request_without_tools_has_none() -> None:
    model = ScriptedModel(["done"])
    await BaseAgent("A", "", client=model).run("go")
    assert model.requests[0].tools == []


# ---- tools that are called without a run


async def test_execute_tool_outside_of_a_run_is_seen_and_well_formed() -> None:
    one = BaseAgent("a", "a", client=ScriptedModel(["done"]))
    agent = BaseAgent("A", "a").add_tool(add).register_delegate(one)
    with record_events() as events:
        assert (await agent.execute_tool("add", a=1, b=2)).content == 3
        assert (await agent.execute_tool("delegate_to_a", query="go")).content == "done"
        assert (await agent.execute_tool("nothing")).error
    assert events.kinds[:4] == ["run_started", "tool_started", "tool_finished", "run_finished"]
    assert [result.content for result in events.results()][:3] == [3, "done", "done"]
    events.assert_well_formed()


async def test_a_direct_call_that_does_not_end_is_a_fault() -> None:
    agent = BaseAgent("A", "a").add_tool(add)
    with record_events() as events:
        await agent.execute_tool("add", a=1, b=2)
    with pytest.raises(AssertionError, match="has not ended: a run of A, tool call direct_"):
        type(events)(events[:2]).assert_well_formed()
    with pytest.raises(AssertionError, match="its run has not started"):
        type(events)(events[1:]).assert_well_formed()
