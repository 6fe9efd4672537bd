"""One agent object, any event loop, any client."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any
from unittest.mock import AsyncMock, MagicMock

import anyio
import httpx2
import openai
import pytest
import trio

from fractal import BaseAgent, ClientBoundToLoop, InvalidArguments, sync
from fractal.testing import Endpoint, ScriptedModel, answers
from tests.support import calls_then, in_thread, shown

StartEndpoint = Callable[..., Endpoint]


def azure_options() -> dict[str, Any]:
    return {"api_key": "sk-test", "api_version": "2026-01-01"}


CLIENTS: dict[str, Callable[[str], Any]] = {
    "none": lambda url: None,
    "AsyncOpenAI": lambda url: openai.AsyncOpenAI(),
    "OpenAI": lambda url: openai.OpenAI(),
    "AsyncAzureOpenAI": lambda url: openai.AsyncAzureOpenAI(base_url=f"{url}/openai", **azure_options()),
    "AzureOpenAI": lambda url: openai.AzureOpenAI(base_url=f"{url}/openai", **azure_options()),
    "OpenAI with its own http_client": lambda url: openai.OpenAI(http_client=httpx2.Client()),
    "ScriptedModel": lambda url: ScriptedModel(
        lambda request: "done" if len(request.transcript) > 1 else answers.call("add", {"a": 1, "b": 2})
    ),
}


@pytest.fixture(params=CLIENTS)
def agent(request: pytest.FixtureRequest, endpoint: StartEndpoint) -> BaseAgent:
    one = endpoint(calls_then("done", answers.call("add", {"a": 1, "b": 2})))
    agent = BaseAgent("A", "a", client=CLIENTS[request.param](one.url))
    agent.add_tool(lambda a, b: a + b, name="add")
    yield agent
    close = getattr(agent.client, "close", None)
    if close is not None and not asyncio.iscoroutinefunction(close):
        close()


def test_one_agent_object_works_from_any_number_of_event_loops_in_turn(agent: BaseAgent):
    results = [
        asyncio.run(agent.run("one")),
        asyncio.run(agent.run("two")),
        agent.run_sync("three"),
        trio.run(agent.run, "four"),
        sync.run(agent, "five"),
        anyio.run(agent.run, "six", backend="trio"),
        asyncio.run(agent.run("seven")),
    ]
    assert [result.content for result in results] == ["done"] * 7
    assert [result.tool_results[0].content for result in results] == [3] * 7


def test_one_agent_object_works_from_several_event_loops_at_once(agent: BaseAgent):
    results: list[object] = []

    def loop(backend: str) -> None:
        async def several() -> None:
            async with anyio.create_task_group() as group:
                for _ in range(5):
                    group.start_soon(one)

        async def one() -> None:
            results.append((await agent.run("go")).content)

        anyio.run(several, backend=backend)

    threads = [threading.Thread(target=loop, args=(name,)) for name in ("asyncio", "trio", "asyncio", "trio")]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(20)
    assert results == ["done"] * 20


@pytest.mark.parametrize("kind", ["none", "AsyncOpenAI", "OpenAI"])
def test_connections_are_closed_when_their_loop_ends(kind: str, endpoint: StartEndpoint, backend: str):
    one = endpoint("hello")
    agent = BaseAgent("A", "a", client=CLIENTS[kind](one.url))
    anyio.run(agent.run, "go", backend=backend)
    one.wait_until_closed()


@pytest.mark.parametrize("kind", ["none", "AsyncOpenAI", "OpenAI"])
async def test_leaving_the_agents_block_closes_what_it_opened(kind: str, endpoint: StartEndpoint):
    one = endpoint("hello")
    async with BaseAgent("A", "a", client=CLIENTS[kind](one.url)) as agent:
        await agent.run("go")
        assert one.connections == 1
    await in_thread(one.wait_until_closed)
    assert (await agent.run("again")).success
    await agent.aclose()


async def test_connections_stay_for_another_agent_that_has_used_them(endpoint: StartEndpoint):
    one = endpoint("hello")
    other = BaseAgent("B", "b")
    async with BaseAgent("A", "a") as agent:
        assert (await other.run("go")).success
        assert (await agent.run("go")).success
    assert (await other.run("again")).success
    assert one.connections_opened == 1
    await other.aclose()
    await in_thread(one.wait_until_closed)


async def test_runs_one_after_another_share_a_connection(endpoint: StartEndpoint):
    one = endpoint("hello")
    for client in (None, None, openai.AsyncOpenAI()):
        await BaseAgent("A", "a", client=client).run("go")
    assert one.connections_opened == 1


async def test_a_subclass_with_a_block_of_its_own_need_not_call_super(endpoint: StartEndpoint):
    class Pooled(BaseAgent):
        pool: list[str] | None = None

        async def __aenter__(self):
            self.pool = ["open"]
            return self

        async def __aexit__(self, *exc: object) -> None:
            self.pool = None

    endpoint("hello")
    async with Pooled("A", "a") as agent:
        assert agent.pool == ["open"]
        assert (await agent.run("go")).content == "hello"
    assert agent.pool is None


def test_an_http_client_that_cannot_be_copied_stays_with_its_first_loop(endpoint: StartEndpoint):
    endpoint("hello")

    async def use(agent: BaseAgent) -> None:
        assert (await agent.run("one")).success

    async def use_and_close() -> BaseAgent:
        async with httpx2.AsyncClient() as http:
            agent = BaseAgent("A", "a", client=openai.AsyncOpenAI(http_client=http))
            await use(agent)
            await use(agent)
            return agent

    agent = asyncio.run(use_and_close())
    with pytest.raises(ClientBoundToLoop, match="http_client"):
        asyncio.run(agent.run("two"))


@pytest.mark.parametrize("kind", ["AsyncOpenAI", "OpenAI"])
async def test_a_users_client_keeps_its_headers_url_query_and_key(kind: str, endpoint: StartEndpoint):
    one = endpoint("hello")
    client = getattr(openai, kind)(
        api_key="sk-mine",
        base_url=one.url,
        organization="org",
        project="proj",
        default_headers={"X-Mine": "yes"},
        default_query={"v": "7"},
    )
    await BaseAgent("A", "a", "some-model", client, temperature=0.5, max_tokens=9, extra_body={"top_p": 0.1}).run("go")
    [request] = one.requests
    assert request.headers["authorization"] == "Bearer sk-mine"
    assert (request.headers["openai-organization"], request.headers["openai-project"]) == ("org", "proj")
    assert request.headers["x-mine"] == "yes"
    assert request.query == "v=7"
    assert request.body == {
        "model": "some-model", "temperature": 0.5, "max_tokens": 9, "top_p": 0.1,
        "messages": [{"role": "system", "content": "a"}, {"role": "user", "content": "go"}],
    }  # fmt: skip
    if kind == "OpenAI":
        client.close()


@pytest.mark.parametrize("kind", ["AsyncOpenAI", "OpenAI"])
async def test_a_key_made_by_a_function_is_asked_for(kind: str, endpoint: StartEndpoint):
    one = endpoint("hello")

    async def make_key() -> str:
        return "sk-made"

    client = openai.AsyncOpenAI(api_key=make_key) if kind == "AsyncOpenAI" else openai.OpenAI(api_key=lambda: "sk-made")
    assert (await BaseAgent("A", "a", client=client).run("go")).success
    assert one.requests[0].headers["authorization"] == "Bearer sk-made"
    if isinstance(client, openai.OpenAI):
        client.close()


@pytest.mark.parametrize("kind", ["AsyncAzureOpenAI", "AzureOpenAI"])
@pytest.mark.parametrize("with_deployment", [True, False])
async def test_azure_clients_post_to_their_deployment(kind: str, with_deployment: bool, endpoint: StartEndpoint):
    one = endpoint("hello")
    root = one.url.removesuffix("/v1")
    more = {"azure_deployment": "dep"} if with_deployment else {}
    client = getattr(openai, kind)(azure_endpoint=root, **azure_options(), **more)
    assert (await BaseAgent("A", "a", "gpt x", client).run("go")).success
    deployment = "dep" if with_deployment else "gpt x"
    assert one.requests[0].path.replace("%20", " ") == f"/openai/deployments/{deployment}/chat/completions"
    assert one.requests[0].query == "api-version=2026-01-01"
    assert one.requests[0].headers["api-key"] == "sk-test"
    if kind == "AzureOpenAI":
        client.close()


async def test_a_blocking_client_never_blocks_the_loop(endpoint: StartEndpoint):
    endpoint(answers.text("hello", delay=0.3))
    turns = 0
    client = openai.OpenAI(http_client=httpx2.Client())
    async with anyio.create_task_group() as group:

        async def count() -> None:
            nonlocal turns
            while True:
                await anyio.sleep(0.01)
                turns += 1

        group.start_soon(count)
        assert (await BaseAgent("A", "a", client=client).run("go")).content == "hello"
        group.cancel_scope.cancel()
    assert turns > 10
    client.close()


def completion(text: str | None = "from a double", calls: Any = None) -> Any:
    message = SimpleNamespace(content=text, tool_calls=calls, refusal=None)
    return SimpleNamespace(choices=[SimpleNamespace(message=message, finish_reason="stop")], usage=None)


def double(create: Any) -> Any:
    return SimpleNamespace(chat=SimpleNamespace(completions=SimpleNamespace(create=create)))


async def test_any_object_with_create_is_a_client():
    async def create(**parameters: Any) -> Any:
        assert parameters["messages"][-1] == {"role": "user", "content": "go"}
        return completion()

    mock = MagicMock()
    mock.chat.completions.create = AsyncMock(return_value=completion())
    plain_mock = MagicMock()
    plain_mock.chat.completions.create.return_value = answers.text("from a double").completion("m")
    real = openai.AsyncOpenAI(api_key="sk-test")
    real.chat.completions.create = AsyncMock(return_value=completion())  # type: ignore[method-assign]
    for client in (double(create), double(lambda **_: completion()), mock, plain_mock, real):
        result = await BaseAgent("A", "a", client=client).run("go")
        assert result.content == "from a double", client


async def test_a_double_can_call_tools():
    call = SimpleNamespace(id="c1", function=SimpleNamespace(name="add", arguments='{"a": 1, "b": 2}'))
    create = AsyncMock(side_effect=[completion(None, [call]), completion("3")])
    result = await BaseAgent("A", "a", client=double(create)).add_tool(lambda a, b: a + b, name="add").run("go")
    assert (result.content, result.tool_results[0].content) == ("3", 3)
    assert create.await_args_list[1].kwargs["messages"][-1] == {"role": "tool", "tool_call_id": "c1", "content": "3"}


@pytest.mark.parametrize(
    ("error", "kind"),
    [
        (TimeoutError("slow"), "RequestTimedOut"),
        (ConnectionResetError("gone"), "ConnectionFailed"),
        (httpx2.ReadError("cut"), "ConnectionFailed"),
        (httpx2.ReadTimeout("slow"), "RequestTimedOut"),
        (openai.APIConnectionError(request=httpx2.Request("POST", "http://x")), "ConnectionFailed"),
        (openai.APITimeoutError(request=httpx2.Request("POST", "http://x")), "RequestTimedOut"),
        (openai.OpenAIError("no key"), "ModelError"),
        (ValueError("a bug in the double"), "UnexpectedError"),
    ],
    ids=lambda value: type(value).__name__,
)
async def test_what_a_client_raises_is_a_result_of_its_class(error: Exception, kind: str):
    client = double(AsyncMock(side_effect=error))
    result = await BaseAgent("A", "a", client=client).run("go", max_retries=0)
    assert type(result.exception).__name__ == kind
    assert result.messages == [{"role": "user", "content": "go"}]


@pytest.mark.parametrize("client", [object(), "sk-key", 3, SimpleNamespace(chat=None)], ids=shown)
def test_what_is_no_client_is_refused_when_the_agent_is_built(client: object):
    with pytest.raises(InvalidArguments, match="neither an openai client"):
        BaseAgent("A", "a", client=client)


@pytest.mark.parametrize("kind", ["none", "AsyncOpenAI", "ScriptedModel"])
async def test_two_hundred_runs_at_once_on_one_agent_are_not_mixed_up(kind: str, endpoint: StartEndpoint):
    def reply(messages: list[dict[str, Any]]) -> Any:
        number = next(m["content"] for m in messages if m["role"] == "user")
        if messages[-1]["role"] == "user":
            return [answers.call("double", {"n": int(number)}), answers.call("square", {"n": int(number)})]
        return f"{number}: {messages[-2]['content']} {messages[-1]['content']}"

    one = endpoint(lambda request: reply(request.body["messages"]))
    client = (
        ScriptedModel(lambda r: reply(r.transcript.messages)) if kind == "ScriptedModel" else CLIENTS[kind](one.url)
    )

    class Maths(BaseAgent):
        def double(self, n: int) -> int:
            return 2 * n

        async def square(self, n: int) -> int:
            await anyio.sleep(0.001)
            return n * n

    agent = Maths("A", "a", client=client)
    agent.add_tool(agent.double).add_tool(agent.square)
    results: dict[int, Any] = {}

    async def ask(n: int) -> None:
        results[n] = await agent.run(str(n))

    async with anyio.create_task_group() as group:
        for n in range(200):
            group.start_soon(ask, n)
    for n, result in results.items():
        assert result.content == f"{n}: {2 * n} {n * n}"
        assert [call.content for call in result.tool_results] == [2 * n, n * n]
        assert result.usage.requests == 2
    assert len({result.run_id for result in results.values()}) == 200
