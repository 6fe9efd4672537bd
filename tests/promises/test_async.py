"""What is promised to code that awaits: tools, clients, inputs and prompts, against an endpoint, on every backend."""

from __future__ import annotations

import asyncio
import functools
import importlib.util
import os
import subprocess
import sys
import textwrap
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Literal

import anyio
import pytest
from pydantic import BaseModel

from fractal import AgentToolkit, BaseAgent, InvalidArguments, RunContext, ToolResult, tool
from fractal.testing import Endpoint, answers

ROOT = Path(__file__).parents[2]
EndpointFactory = Callable[..., Endpoint]

on_asyncio = pytest.mark.parametrize(
    "anyio_backend",
    [
        pytest.param(("asyncio", {}), id="asyncio"),
        pytest.param(
            ("asyncio", {"use_uvloop": True}),
            id="asyncio+uvloop",
            marks=pytest.mark.skipif(importlib.util.find_spec("uvloop") is None, reason="needs uvloop"),
        ),
    ],
)
"""For tests that use asyncio themselves, as users do."""


class Item(BaseModel):
    name: str
    count: int = 1


@dataclass
class Point:
    x: int
    y: int


class AsyncTestAgent(BaseAgent):
    """The agent of this suite, made as users make theirs."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**{"name": "AsyncTest", "system_prompt": "You are tested.", **options})

    @AgentToolkit.register_as_tool
    async def make_item(self, name: str, count: int = 1) -> Item:
        """Make an item.

        Args:
            name: What it is called.
            count: How many there are.
        """
        return Item(name=name, count=count)

    @AgentToolkit.register_as_tool
    def make_item_in_thread(self, name: str) -> Item:
        """Make an item, blocking.

        Args:
            name: What it is called.
        """
        return Item(name=name)

    @AgentToolkit.register_as_tool
    async def list_items(self, names: list[str]) -> list[Item]:
        """Make several items.

        Args:
            names: What they are called.
        """
        return [Item(name=name) for name in names]

    @AgentToolkit.register_as_tool
    def list_numbers(self, below: int) -> list[int]:
        """Count.

        Args:
            below: Where to stop.
        """
        return list(range(below))

    @AgentToolkit.register_as_tool
    async def to_dict(self, item: Item) -> dict[str, Any]:
        """Take an item apart.

        Args:
            item: The item.
        """
        assert isinstance(item, Item)
        return {"name": item.name, "count": item.count, "nested": {"list": [1, None, True]}}

    @AgentToolkit.register_as_tool
    def choose(self, color: Literal["red", "green"] = "red") -> dict[str, str]:
        """Choose a color."""
        return {"color": color}

    @AgentToolkit.register_as_tool
    def return_string(self) -> str:
        return "text, as it is"

    @AgentToolkit.register_as_tool
    async def point(self) -> Point:
        return Point(1, 2)

    @AgentToolkit.register_as_tool
    async def day(self) -> date:
        return date(2024, 2, 29)

    @AgentToolkit.register_as_tool
    def nothing(self) -> None:
        return None

    @AgentToolkit.register_as_tool
    def truth(self) -> bool:
        return True

    @AgentToolkit.register_as_tool
    async def ratio(self) -> float:
        return 0.5

    @AgentToolkit.register_as_tool
    async def wait(self, seconds: float) -> float:
        """Wait."""
        await anyio.sleep(seconds)
        return seconds

    @AgentToolkit.register_as_tool
    def wait_in_thread(self, seconds: float) -> float:
        """Wait, blocking."""
        time.sleep(seconds)
        return seconds

    @AgentToolkit.register_as_tool
    async def fail(self) -> None:
        raise LookupError("not here")


RETURNS = [
    pytest.param("make_item", {"name": "bolt", "count": 3}, Item(name="bolt", count=3), id="model, async"),
    pytest.param("make_item_in_thread", {"name": "bolt"}, Item(name="bolt"), id="model, plain"),
    pytest.param("list_items", {"names": ["a", "b"]}, [Item(name="a"), Item(name="b")], id="list of models"),
    pytest.param("list_numbers", {"below": 3}, [0, 1, 2], id="list"),
    pytest.param(
        "to_dict",
        {"item": {"name": "bolt"}},
        {"name": "bolt", "count": 1, "nested": {"list": [1, None, True]}},
        id="dict, async",
    ),
    pytest.param("choose", {"color": "green"}, {"color": "green"}, id="dict, plain"),
    pytest.param("return_string", {}, "text, as it is", id="text"),
    pytest.param("point", {}, Point(1, 2), id="dataclass"),
    pytest.param("day", {}, date(2024, 2, 29), id="date"),
    pytest.param("nothing", {}, None, id="None"),
    pytest.param("truth", {}, True, id="bool"),
    pytest.param("ratio", {}, 0.5, id="number"),
]

SEEN = {
    "make_item": '{"name":"bolt","count":3}',
    "make_item_in_thread": '{"name":"bolt","count":1}',
    "list_items": '[{"name":"a","count":1},{"name":"b","count":1}]',
    "list_numbers": "[0,1,2]",
    "to_dict": '{"name":"bolt","count":1,"nested":{"list":[1,null,true]}}',
    "choose": '{"color":"green"}',
    "return_string": "text, as it is",
    "point": '{"x":1,"y":2}',
    "day": '"2024-02-29"',
    "nothing": "null",
    "truth": "true",
    "ratio": "0.5",
}


def sent(endpoint: Endpoint, index: int = -1) -> list[dict[str, Any]]:
    """The messages of one request, as they arrived."""
    return endpoint.requests[index].body["messages"]


def system_of(endpoint: Endpoint, index: int = -1) -> str:
    [text] = [message["content"] for message in sent(endpoint, index) if message["role"] == "system"]
    return text


# ---- tools, called by hand


@pytest.mark.parametrize(("name", "arguments", "expected"), RETURNS)
async def test_a_tool_called_by_hand_returns_the_python_object(
    name: str, arguments: dict[str, Any], expected: object
) -> None:
    result = await AsyncTestAgent().execute_tool(name, **arguments)

    assert isinstance(result, ToolResult)
    assert (result.error, result.outcome, result.tool_name) == (None, "ok", name)
    assert result.content == expected
    assert type(result.content) is type(expected)


@pytest.mark.parametrize(("name", "arguments", "expected"), RETURNS)
async def test_the_model_sees_a_tools_result_as_json_and_the_caller_as_an_object(
    name: str, arguments: dict[str, Any], expected: object, endpoint: EndpointFactory
) -> None:
    started = endpoint([answers.call(name, arguments, id="c1"), "done"])

    result = await AsyncTestAgent().run("go")

    assert result.content == "done"
    assert sent(started)[-1] == {"role": "tool", "tool_call_id": "c1", "content": SEEN[name]}
    [called] = result.tool_results
    assert (called.content, type(called.content)) == (expected, type(expected))


async def test_arguments_arrive_as_the_annotated_types() -> None:
    agent = AsyncTestAgent()

    given_as_json = await agent.execute_tool("to_dict", item={"name": "bolt", "count": 2})
    given_as_object = await agent.execute_tool("to_dict", item=Item(name="bolt", count=2))

    assert given_as_json.content["count"] == given_as_object.content["count"] == 2
    assert given_as_json.metadata["arguments"] == {"item": Item(name="bolt", count=2)}


@pytest.mark.parametrize(
    ("name", "arguments", "told"),
    [
        pytest.param("no_such_tool", {}, "there is no tool 'no_such_tool'", id="unknown tool"),
        pytest.param("make_item", {}, "'name' is missing", id="missing argument"),
        pytest.param("make_item", {"name": "a", "colour": 1}, "no parameter 'colour'", id="unknown argument"),
        pytest.param("make_item", {"name": "a", "count": "many"}, "'count'", id="wrong type"),
        pytest.param("choose", {"color": "blue"}, "'red' or 'green'", id="none of the choices"),
        pytest.param("fail", {}, "LookupError: not here", id="raises"),
    ],
)
async def test_a_call_by_hand_that_goes_wrong_is_a_result_with_an_error(
    name: str, arguments: dict[str, Any], told: str
) -> None:
    result = await AsyncTestAgent().execute_tool(name, **arguments)

    assert result.outcome == "error"
    assert result.error is not None
    assert told in result.error
    assert result.content is None


async def test_a_tools_own_parameters_may_have_any_name() -> None:
    def echo(tool_name: str, name: str, messages: list[str], ctx: int, arguments: dict[str, int]) -> list[Any]:
        return [tool_name, name, messages, ctx, arguments]

    agent = AsyncTestAgent().add_tool(echo)

    result = await agent.execute_tool("echo", tool_name="a", name="b", messages=["c"], ctx=1, arguments={"d": 2})

    assert result.content == ["a", "b", ["c"], 1, {"d": 2}]


# ---- side by side


async def seconds(work: Awaitable[object]) -> float:
    started = time.monotonic()
    await work
    return time.monotonic() - started


async def one_after_the_other(agent: BaseAgent, name: str) -> None:
    for _ in range(3):
        await agent.execute_tool(name, seconds=0.2)


async def in_a_task_group(agent: BaseAgent, name: str) -> None:
    async with anyio.create_task_group() as group:
        for _ in range(3):
            group.start_soon(functools.partial(agent.execute_tool, name, seconds=0.2))


async def gathered(agent: BaseAgent, name: str) -> None:
    results = await asyncio.gather(*(agent.execute_tool(name, seconds=0.2) for _ in range(3)))
    assert [result.content for result in results] == [0.2] * 3


@pytest.mark.slow
@pytest.mark.parametrize("name", ["wait", "wait_in_thread"])
async def test_three_tools_in_a_task_group_take_the_time_of_one(name: str) -> None:
    agent = AsyncTestAgent()

    apart = await seconds(one_after_the_other(agent, name))
    together = await seconds(in_a_task_group(agent, name))

    assert apart >= 0.6
    assert together < 0.6 * apart


@on_asyncio
@pytest.mark.parametrize("name", ["wait", "wait_in_thread"])
async def test_three_gathered_tools_take_the_time_of_one(name: str) -> None:
    together = await seconds(gathered(AsyncTestAgent(), name))

    assert 0.2 <= together < 0.5


@pytest.mark.parametrize("names", [["wait"] * 3, ["wait_in_thread"] * 3, ["wait", "wait_in_thread", "wait"]])
async def test_the_tools_of_one_reply_take_the_time_of_one_and_answer_in_call_order(
    names: list[str], endpoint: EndpointFactory
) -> None:
    times = [0.3, 0.2, 0.1]
    calls = [answers.call(name, {"seconds": each}) for name, each in zip(names, times, strict=True)]
    started = endpoint([calls, "done"])

    result = await AsyncTestAgent().run("go")

    assert result.content == "done"
    assert [called.content for called in result.tool_results] == times
    assert [message["content"] for message in sent(started)[-3:]] == ["0.3", "0.2", "0.1"]
    between = started.requests[1].at - started.requests[0].at
    assert 0.3 <= between < 0.55, "the sum is 0.6"


async def test_a_tool_that_fails_disturbs_neither_its_siblings_nor_the_run(endpoint: EndpointFactory) -> None:
    started = endpoint([[answers.call("fail"), answers.call("wait", {"seconds": 0.05})], "done"])

    result = await AsyncTestAgent().run("go")

    assert result.success
    assert [called.outcome for called in result.tool_results] == ["error", "ok"]
    assert [message["content"] for message in sent(started)[-2:]] == ["Error: LookupError: not here", "0.05"]


def upper(request: Any) -> str:
    return request.body["messages"][-1]["content"].upper()


# ---- the agent's card


def test_an_agents_card_names_it_its_model_and_its_tools_with_parameters() -> None:
    card = str(AsyncTestAgent(name="Ada", model="some-model"))

    assert card.startswith("Ada (AsyncTestAgent)\n")
    assert "model: some-model" in card
    assert "make_item(name: string, count: integer = 1)\n        Make an item.\n" in card
    assert "return_string()" in card
    assert all(name in card for name in AsyncTestAgent().get_tools())


def test_an_agents_repr_is_one_line() -> None:
    assert repr(AsyncTestAgent(model="some-model")) == "<AsyncTestAgent 'AsyncTest' model='some-model' tools=15>"
    assert repr(BaseAgent("Bare", "none")) == "<BaseAgent 'Bare' model='gpt-4o-mini' tools=0>"


# ---- who answers


class Double:
    """What tests pass for a client: an object with `chat.completions.create`."""

    def __init__(self, create: Callable[..., Any]) -> None:
        self.chat = SimpleNamespace(completions=SimpleNamespace(create=create))


COMPLETION: dict[str, Any] = {"choices": [{"message": {"role": "assistant", "content": "from the double"}}]}


@asynccontextmanager
async def sdk_client(kind: str, url: str) -> AsyncIterator[Any]:
    """A client of the SDK as users make it, closed at the end."""
    import openai

    facts: dict[str, Any] = {"base_url": url, "api_key": "sk-test"}
    if "Azure" in kind:
        facts = {"azure_endpoint": url.removesuffix("/v1"), "api_key": "az-test", "api_version": "2024-10-21"}
    client = getattr(openai, kind)(**facts)
    try:
        yield client
    finally:
        closed = client.close()
        if closed is not None:
            await closed


@pytest.mark.parametrize("kind", ["AsyncOpenAI", "OpenAI"])
async def test_an_sdk_client_is_used_with_its_own_url_and_key(
    kind: str, endpoint: EndpointFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    started = endpoint([answers.call("list_numbers", {"below": 2}), "done"], api_key="sk-test")
    monkeypatch.delenv("OPENAI_BASE_URL")
    monkeypatch.delenv("OPENAI_API_KEY")

    async with sdk_client(kind, started.url) as client, AsyncTestAgent(client=client, temperature=0.1) as agent:
        result = await agent.run("go")

    assert result.raise_for_error().content == "done"
    assert [request.path for request in started.requests] == ["/v1/chat/completions"] * 2
    body = started.requests[0].body
    assert (body["model"], body["temperature"]) == ("gpt-4o-mini", 0.1)
    assert {each["function"]["name"] for each in body["tools"]} == set(agent.get_tools())


@pytest.mark.parametrize("kind", ["AsyncAzureOpenAI", "AzureOpenAI"])
async def test_an_azure_client_posts_to_its_deployment(kind: str, endpoint: EndpointFactory) -> None:
    started = endpoint("done", api_key="az-test")

    async with sdk_client(kind, started.url) as client, AsyncTestAgent(client=client, model="my-model") as agent:
        result = await agent.run("go")

    assert result.raise_for_error().content == "done"
    [request] = started.requests
    assert request.path == "/openai/deployments/my-model/chat/completions"
    assert request.query == "api-version=2024-10-21"
    assert request.headers["api-key"] == "az-test"


async def test_a_blocking_client_does_not_block_the_event_loop(endpoint: EndpointFactory) -> None:
    started = endpoint("done", latency=0.2)

    async with sdk_client("OpenAI", started.url) as client, AsyncTestAgent(client=client) as agent:

        async def three() -> None:
            async with anyio.create_task_group() as group:
                for _ in range(3):
                    group.start_soon(agent.run, "go")

        await three()  # opens the connections
        together = await seconds(three())

    assert started.max_in_flight == 3
    assert together < 0.5


async def test_a_run_on_a_blocking_client_can_be_cancelled(endpoint: EndpointFactory) -> None:
    started = endpoint(answers.hang())

    async with sdk_client("OpenAI", started.url) as client, AsyncTestAgent(client=client) as agent:
        with anyio.move_on_after(0.2) as scope:
            await agent.run("go")

    assert scope.cancelled_caught
    await anyio.to_thread.run_sync(started.wait_for_disconnects, 1)


async def test_without_a_client_the_environment_says_where_and_who(
    endpoint: EndpointFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    agent = AsyncTestAgent()  # built before there is a key
    started = endpoint("done", api_key="sk-environment")
    monkeypatch.setenv("OPENAI_API_KEY", "sk-environment")

    result = await agent.run("go")

    assert result.raise_for_error().content == "done"
    assert started.requests[0].headers["authorization"] == "Bearer sk-environment"


async def test_without_a_client_and_without_a_key_the_result_says_what_to_do() -> None:
    result = await AsyncTestAgent().run("go")

    assert not result.success
    assert "OPENAI_API_KEY" in str(result.error)
    assert result.metadata["error_type"] == "api_error"


async def test_the_model_falls_back_to_the_environment(
    endpoint: EndpointFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    started = endpoint("done")
    monkeypatch.setenv("OPENAI_MODEL", "from-environment")

    await AsyncTestAgent().run("go")
    await AsyncTestAgent(model="given").run("go")

    assert [request.body["model"] for request in started.requests] == ["from-environment", "given"]


async def test_a_double_with_an_async_create_is_awaited_with_the_whole_request() -> None:
    asked: list[dict[str, Any]] = []

    async def create(**request: Any) -> dict[str, Any]:
        asked.append(request)
        return COMPLETION

    result = await AsyncTestAgent(client=Double(create)).run("go")

    assert result.content == "from the double"
    [request] = asked
    assert request["model"] == "gpt-4o-mini"
    assert request["messages"] == [
        {"role": "system", "content": "You are tested."},
        {"role": "user", "content": "go"},
    ]


async def test_a_double_with_a_plain_create_and_attributes_in_place_of_json_works_too() -> None:
    message = SimpleNamespace(content="from the double", tool_calls=None, refusal=None)

    def create(**request: Any) -> Any:
        return SimpleNamespace(choices=[SimpleNamespace(message=message, finish_reason="stop")], usage=None)

    result = await AsyncTestAgent(client=Double(create)).run("go")

    assert result.raise_for_error().content == "from the double"


async def test_calling_the_agent_is_running_it(endpoint: EndpointFactory) -> None:
    endpoint(upper)
    agent = AsyncTestAgent()

    first = await agent("hello")
    second = await agent("again", 5, 2, first.messages, timeout=5)

    assert (first.content, second.content) == ("HELLO", "AGAIN")
    assert len(second.messages) == 4


# ---- opening and closing


class WithPool(AsyncTestAgent):
    """Opens something of its own, and knows nothing of what the base class does."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self.steps: list[str] = []

    async def __aenter__(self) -> WithPool:
        self.steps.append("opened")
        return self

    async def __aexit__(self, *error: object) -> None:
        self.steps.append("closed")

    @tool
    async def use(self) -> str:
        self.steps.append("used")
        return "used"


async def test_a_subclass_may_open_and_close_its_own_things_without_super(endpoint: EndpointFactory) -> None:
    endpoint([answers.call("use"), "done"])

    async with WithPool() as agent:
        result = await agent.run("go")

    assert result.content == "done"
    assert agent.steps == ["opened", "used", "closed"]


def test_what_such_a_subclass_left_open_is_closed_when_the_event_loop_ends(
    backend: str, endpoint: EndpointFactory
) -> None:
    started = endpoint("done")

    async def main() -> None:
        async with WithPool() as agent:
            await agent.run("go")

    anyio.run(main, backend=backend)

    started.wait_until_closed()
    assert started.connections_opened == 1


async def test_leaving_an_agent_closes_its_connections(endpoint: EndpointFactory) -> None:
    started = endpoint("done")

    async with AsyncTestAgent() as agent:
        await agent.run("go")
        await agent.run("go")
        assert started.connections == 1
    await anyio.to_thread.run_sync(started.wait_until_closed)

    assert (await agent.run("go")).success, "a later run opens them again"
    assert started.connections_opened == 2
    await agent.aclose()


# ---- what goes in


async def test_a_conversation_goes_on_with_the_messages_of_a_result(endpoint: EndpointFactory) -> None:
    started = endpoint([answers.call("list_numbers", {"below": 2}, id="c1"), "two numbers", "yes, two"])
    agent = AsyncTestAgent()

    first = await agent.run("count")
    kept = [dict(message) for message in first.messages]
    second = await agent.run("really?", messages=first.messages)

    assert [message["role"] for message in sent(started)] == [
        "system",
        "user",
        "assistant",
        "tool",
        "assistant",
        "user",
    ]
    assert sent(started)[1:-1] == first.messages
    assert first.messages == kept, "the history that was given is left alone"
    assert second.messages == [
        *kept,
        {"role": "user", "content": "really?"},
        {"role": "assistant", "content": "yes, two"},
    ]


async def test_a_run_without_messages_knows_nothing_of_the_one_before(endpoint: EndpointFactory) -> None:
    started = endpoint("done")
    agent = AsyncTestAgent()

    await agent.run("first")
    agent.reset()
    await agent.run("second")

    assert [message["content"] for message in sent(started)] == ["You are tested.", "second"]


PARTS = [
    {"type": "text", "text": "What is this?"},
    {"type": "image_url", "image_url": {"url": "data:image/png;base64,iVBORw0KGgo="}},
]


@pytest.mark.parametrize(
    ("given", "seen"),
    [
        pytest.param("Grüße, 世界 🎉", "Grüße, 世界 🎉", id="text"),
        pytest.param({"city": "Köln", "days": [1, 2]}, '{"city":"Köln","days":[1,2]}', id="dict"),
        pytest.param([1, "two", None], '[1,"two",null]', id="list"),
        pytest.param([{"type": "report", "n": 1}], '[{"type":"report","n":1}]', id="list of dicts"),
        pytest.param(Item(name="bolt"), '{"name":"bolt","count":1}', id="pydantic model"),
        pytest.param([Item(name="bolt")], '[{"name":"bolt","count":1}]', id="list of models"),
        pytest.param({"item": Item(name="bolt")}, '{"item":{"name":"bolt","count":1}}', id="model in a dict"),
        pytest.param(PARTS, PARTS, id="content parts"),
    ],
)
async def test_an_input_arrives_at_the_endpoint_as_text_json_or_parts(
    given: object, seen: object, endpoint: EndpointFactory
) -> None:
    started = endpoint("done")

    result = await AsyncTestAgent().run(given)

    assert sent(started)[-1] == {"role": "user", "content": seen}
    assert result.messages[0] == {"role": "user", "content": seen}


async def test_no_input_is_wrong_use_and_raises_at_once(endpoint: EndpointFactory) -> None:
    started = endpoint("done")

    with pytest.raises(InvalidArguments, match="user_input is None"):
        await AsyncTestAgent().run(None)

    assert started.requests == []


# ---- the system prompt


async def test_a_system_prompt_is_the_first_message_and_no_part_of_the_transcript(endpoint: EndpointFactory) -> None:
    started = endpoint("done")

    result = await AsyncTestAgent(system_prompt="Be brief.").run("go")

    assert sent(started)[0] == {"role": "system", "content": "Be brief."}
    assert [message["role"] for message in result.messages] == ["user", "assistant"]


async def test_placeholders_are_filled_and_other_braces_are_left_alone(endpoint: EndpointFactory) -> None:
    started = endpoint("done")
    prompt = 'You are {name}, {age}. Answer as {"name": "…", "list": [{}]} or {{name}} or {unknown} {name'

    with pytest.warns(UserWarning, match="doubled braces"):
        agent = AsyncTestAgent(system_prompt=prompt, system_context={"name": "{age}", "age": 36})
    await agent.run("go")

    assert system_of(started) == (
        'You are {age}, 36. Answer as {"name": "…", "list": [{}]} or {{age}} or {unknown} {name'
    )


async def test_an_updated_context_holds_from_the_next_run_on(endpoint: EndpointFactory) -> None:
    started = endpoint([answers.call("rename"), "done", "done"])

    def rename() -> None:
        agent.update_system_context(name="Grace")

    agent = AsyncTestAgent(system_prompt="{name} at {place}", system_context={"name": "Ada", "place": "home"})
    agent.add_tool(rename)

    await agent.run("go")
    await agent.run("go")

    assert [system_of(started, index) for index in range(3)] == ["Ada at home", "Ada at home", "Grace at home"]


async def test_the_agent_has_a_context_of_its_own_and_leaves_the_callers_alone(endpoint: EndpointFactory) -> None:
    started = endpoint("done")
    values = {"name": "Ada", "place": "home"}
    agent = AsyncTestAgent(system_prompt="{name} at {place}", system_context=values)

    values["place"] = "nowhere"
    agent.update_system_context(name="Grace")
    await agent.run("go")

    assert system_of(started) == "Grace at home"
    assert values == {"name": "Ada", "place": "nowhere"}


class Prompt:
    """A prompt function in each of its forms, which counts its calls."""

    def __init__(self) -> None:
        self.calls = 0

    def plain(self) -> str:
        self.calls += 1
        return f"call {self.calls}"

    async def awaited(self) -> str:
        await anyio.sleep(0)
        return self.plain()

    def with_context(self, ctx: RunContext[str]) -> str:
        return f"{self.plain()} for {ctx.deps}, depth {ctx.depth}"

    async def awaited_with_context(self, context: RunContext[str]) -> str:
        await anyio.sleep(0)
        return self.with_context(context)


@pytest.mark.parametrize("form", ["plain", "awaited", "with_context", "awaited_with_context"])
async def test_a_prompt_function_is_called_once_per_run_and_never_at_build(
    form: str, endpoint: EndpointFactory
) -> None:
    started = endpoint([answers.call("return_string"), "done", "done"])
    prompt = Prompt()

    agent = AsyncTestAgent(system_prompt=getattr(prompt, form))
    str(agent), repr(agent), agent.get_tool_schemas()
    assert prompt.calls == 0
    await agent.run("go", deps="Ada")
    assert prompt.calls == 1, "one run of two requests"
    await agent.run("go", deps="Grace")

    tails = [" for Ada, depth 0", " for Ada, depth 0", " for Grace, depth 0"] if "context" in form else [""] * 3
    expected = [f"call {number}{tail}" for number, tail in zip((1, 1, 2), tails, strict=True)]
    assert [system_of(started, index) for index in range(3)] == expected


async def test_braces_in_what_a_prompt_function_returns_are_text(endpoint: EndpointFactory) -> None:
    started = endpoint("done")

    await AsyncTestAgent(system_prompt=lambda: "{name}", system_context={"name": "Ada"}).run("go")

    assert system_of(started) == "{name}"


async def test_a_prompt_function_that_raises_fails_the_run_and_asks_no_model(endpoint: EndpointFactory) -> None:
    started = endpoint("done")

    def prompt() -> str:
        raise LookupError("no prompt today")

    result = await AsyncTestAgent(system_prompt=prompt).run("go")

    assert not result.success
    assert "LookupError: no prompt today" in str(result.error)
    assert started.requests == []


# ---- other people's test plugins and notebooks


def python(*arguments: str, cwd: Path, **extra: str) -> subprocess.CompletedProcess[str]:
    """Run this interpreter; the environment's endpoint goes along."""
    environment = dict(os.environ) | {"PYTHONPATH": str(ROOT), "IPYTHONDIR": str(cwd / "ipython")} | extra
    return subprocess.run(
        [sys.executable, *arguments], capture_output=True, text=True, timeout=50, cwd=cwd, env=environment
    )


def needs(module: str) -> Any:
    return pytest.mark.skipif(importlib.util.find_spec(module) is None, reason=f"needs {module}")


AGENT_OF_THE_TESTS = """
from fractal import BaseAgent, tool

@tool
async def wait(seconds: float = 0.01) -> str:
    await {library}.sleep(seconds)
    return "waited"

agent = BaseAgent("Shared", "One object for all tests, each with an event loop of its own.").add_tool(wait)
"""

ASYNCIO_TESTS = """
import asyncio
import pytest
import pytest_asyncio

@pytest_asyncio.fixture
async def opened():
    async with agent:
        yield agent

@pytest.mark.asyncio
@pytest.mark.parametrize("number", range(3))
async def test_a_run(number):
    assert (await agent.run(f"word {number}")).content == f"WORD {number}"

@pytest.mark.asyncio
async def test_an_async_fixture(opened):
    assert (await opened.execute_tool("wait")).content == "waited"
    results = await asyncio.gather(*(opened.run(word) for word in ("a", "b")))
    assert [result.content for result in results] == ["A", "B"]

@pytest.mark.asyncio
async def test_wait_for():
    with pytest.raises(TimeoutError):
        await asyncio.wait_for(agent.execute_tool("wait", seconds=60), 0.05)
    assert asyncio.all_tasks() == {asyncio.current_task()}
"""

TRIO_TESTS = """
import pytest
import trio

@pytest.fixture
async def opened():
    async with agent:
        yield agent

@pytest.mark.trio
@pytest.mark.parametrize("number", range(3))
async def test_a_run(number):
    assert (await agent.run(f"word {number}")).content == f"WORD {number}"

@pytest.mark.trio
async def test_an_async_fixture_and_a_nursery(opened, nursery):
    nursery.start_soon(opened.run, "beside")
    assert (await opened.execute_tool("wait")).content == "waited"

@pytest.mark.trio
async def test_virtual_time(autojump_clock):
    with trio.move_on_after(1000) as scope:
        await agent.execute_tool("wait", seconds=5000)
    assert scope.cancelled_caught
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    ("library", "tests", "options"),
    [
        pytest.param(
            "asyncio",
            ASYNCIO_TESTS,
            ("-p", "no:trio", "-o", "asyncio_default_fixture_loop_scope=function"),
            marks=needs("pytest_asyncio"),
        ),
        pytest.param("trio", TRIO_TESTS, ("-p", "no:asyncio"), marks=needs("pytest_trio")),
    ],
)
def test_an_agent_works_in_the_tests_of_another_plugin(
    library: str, tests: str, options: tuple[str, ...], endpoint: EndpointFactory, tmp_path: Path
) -> None:
    started = endpoint(upper)
    (tmp_path / "test_users.py").write_text(f"import {library}\n" + AGENT_OF_THE_TESTS.format(library=library) + tests)
    strict = ("-W", "error", "-W", "ignore:Async generator:ResourceWarning")

    done = python("-m", "pytest", "-q", "-p", "no:cacheprovider", *options, *strict, cwd=tmp_path)

    assert done.returncode == 0, done.stdout + done.stderr
    assert "5 passed" in done.stdout
    assert "warning" not in done.stdout
    assert len(started.requests) >= 3


CELLS = {
    "await": """
        print((await agent.run("in a cell")).content)
    """,
    "await on trio": """
        import sniffio
        get_ipython().run_line_magic("autoawait", "trio")
        get_ipython().run_cell('print((await agent.run("in a cell")).content, sniffio.current_async_library())')
    """,
    "blocking": """
        print(sync.run(agent, "in a cell").content)
    """,
    "blocking beside a running loop": """
        import asyncio
        await asyncio.sleep(0)
        print(sync.run(agent, "in a cell").content)
    """,
    "run_sync beside a running loop": """
        import asyncio
        await asyncio.sleep(0)
        print(agent.run_sync("in a cell").content)
    """,
}


@pytest.mark.slow
@needs("IPython")
@pytest.mark.parametrize("cell", CELLS)
def test_an_agent_answers_in_an_ipython_cell(cell: str, endpoint: EndpointFactory, tmp_path: Path) -> None:
    started = endpoint(upper)
    code = "from fractal import BaseAgent, sync\nagent = BaseAgent('Cell', 'You are in a notebook.')\n"
    code += textwrap.dedent(CELLS[cell])

    done = python("-m", "IPython", "--no-banner", "--colors=NoColor", "-c", code, cwd=tmp_path)

    assert (done.returncode, done.stderr) == (0, "")
    assert "IN A CELL trio" in done.stdout if "trio" in cell else "IN A CELL" in done.stdout
    assert "Warning" not in done.stdout
    assert len(started.requests) == 1
