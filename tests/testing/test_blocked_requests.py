"""`block_real_requests`: what is blocked, on each way to an endpoint, and what passes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import aiohttp
import anyio
import httpx
import httpx2
import openai
import pytest

from fractal import BaseAgent, FallbackModel, InvalidArguments, ModelRequest, OpenAIModel, Reply, sync, tool
from fractal.testing import Endpoint, RealRequestBlocked, ScriptedModel, answers, block_real_requests
from tests.support import in_thread

REAL = "https://models.example/v1"

# Each way to an endpoint that an agent knows, as a client for a base URL.
WAYS: dict[str, Callable[[str], Any]] = {
    "own": lambda url: OpenAIModel(base_url=url, api_key="any"),
    "SDK": lambda url: openai.AsyncOpenAI(base_url=url, api_key="any"),
    "SDK, blocking": lambda url: openai.OpenAI(base_url=url, api_key="any"),
    "SDK, own HTTP": lambda url: openai.AsyncOpenAI(base_url=url, api_key="any", http_client=httpx2.AsyncClient()),
    "SDK, blocking, own HTTP": lambda url: openai.OpenAI(base_url=url, api_key="any", http_client=httpx2.Client()),
    "SDK, legacy HTTP": lambda url: openai.AsyncOpenAI(base_url=url, api_key="any", http_client=httpx.AsyncClient()),
}


@pytest.fixture(params=WAYS)
def client_for(request: pytest.FixtureRequest) -> Callable[[str], Any]:
    """Makes a client of each kind for a base URL."""
    return WAYS[request.param]


async def close(client: Any) -> None:
    if isinstance(client, openai.AsyncOpenAI):
        await client.close()
    elif isinstance(client, openai.OpenAI):
        client.close()


async def test_a_request_to_elsewhere_is_blocked_at_once_on_every_way(client_for: Callable[[str], Any]):
    client = client_for(REAL)
    with block_real_requests() as blocked, pytest.raises(RealRequestBlocked) as caught:
        await BaseAgent("A", "a", client=client).run("hi")
    await close(client)
    assert caught.value.url == f"{REAL}/chat/completions"
    assert str(caught.value) == (
        f"a request to {REAL}/chat/completions was blocked: here only loopback addresses may be reached"
    )
    assert blocked == [f"{REAL}/chat/completions"], "it was not tried again"


async def test_a_stream_from_elsewhere_is_blocked_on_every_way(client_for: Callable[[str], Any]):
    client = client_for(REAL)
    with block_real_requests(), pytest.raises(RealRequestBlocked):
        async with BaseAgent("A", "a", client=client).stream("hi") as stream:
            await stream.result()
    await close(client)


async def test_an_endpoint_on_this_machine_is_reached_on_every_way(client_for: Callable[[str], Any]):
    with await in_thread(Endpoint("hello").start) as endpoint:
        client = client_for(endpoint.url)
        for allow in "loopback", "endpoints":
            with block_real_requests(allow=allow) as blocked:  # type: ignore[arg-type]
                assert (await BaseAgent("A", "a", client=client).run("hi")).content == "hello"
            assert blocked == []
        await close(client)


@pytest.mark.parametrize("host", ["localhost", "127.0.0.1", "[::1]", "127.8.9.10", "api.localhost"])
def test_every_name_of_this_machine_may_be_reached(host: str):
    with block_real_requests():
        result = sync.run(BaseAgent("A", "a", client=OpenAIModel(base_url=f"http://{host}:1/v1")), "hi", max_retries=0)
    assert result.metadata["error_type"] == "api_error"


@pytest.mark.parametrize("host", ["10.0.0.1", "0.0.0.0", "models.example", "localhost.example"])
def test_other_addresses_may_not(host: str):
    with block_real_requests(), pytest.raises(RealRequestBlocked):
        sync.run(BaseAgent("A", "a", client=OpenAIModel(base_url=f"http://{host}:1/v1")), "hi")


def test_other_servers_of_this_machine_can_be_blocked_too():
    with Endpoint() as endpoint:
        url = endpoint.url
    agent = BaseAgent("A", "a", client=OpenAIModel(base_url=url))
    with block_real_requests(allow="endpoints"), pytest.raises(RealRequestBlocked, match="only endpoints of fractal"):
        sync.run(agent, "hi")


def test_a_request_that_an_endpoint_sends_on_is_blocked_where_it_would_go():
    away = replace(answers.raw("", status=307), headers={"location": "https://127.0.0.1:1/v1/chat/completions"})
    blocking = block_real_requests(allow="endpoints")
    with Endpoint(away) as endpoint, blocking, pytest.raises(RealRequestBlocked) as caught:
        sync.run(BaseAgent("A", "a", client=OpenAIModel(base_url=endpoint.url)), "hi")
    assert caught.value.url == "https://127.0.0.1:1/v1/chat/completions"


async def test_no_fallback_and_no_tool_makes_an_answer_of_it():
    away = OpenAIModel(base_url=REAL, api_key="any")
    with block_real_requests(), pytest.raises(RealRequestBlocked):
        await BaseAgent("A", "a", client=FallbackModel(away, ScriptedModel(["an answer"]))).run("hi")

    team = BaseAgent("Team", "t", client=ScriptedModel([answers.call("delegate_to_a", {"query": "?"}), "an answer"]))
    team.register_delegate(BaseAgent("A", "a", client=away))
    with block_real_requests(), pytest.raises(RealRequestBlocked):
        await team.run("hi")


def test_a_plain_tool_that_asks_a_model_is_blocked(backend: str):
    @tool
    def ask() -> str:
        return str(sync.run(BaseAgent("A", "a", client=OpenAIModel(base_url=REAL, api_key="any")), "hi"))

    agent = BaseAgent("Outer", "o", client=ScriptedModel([answers.call("ask"), "an answer"])).add_tool(ask)
    with block_real_requests(), pytest.raises(RealRequestBlocked):
        anyio.run(agent.run, "hi", backend=backend)


class ByAiohttp:
    """A model of the user's own, with a client that is none of ours."""

    async def respond(self, request: ModelRequest) -> Reply:
        async with aiohttp.ClientSession() as session, session.post(f"{REAL}/chat/completions", data=request.body()):
            return Reply(text="not blocked")


def test_a_model_that_sends_with_aiohttp_is_blocked():
    with block_real_requests() as blocked, pytest.raises(RealRequestBlocked):
        anyio.run(BaseAgent("A", "a", client=ByAiohttp()).run, "hi")
    assert blocked == [f"{REAL}/chat/completions"]


async def test_a_transport_that_only_plays_an_endpoint_is_let_alone():
    def play(_: httpx2.Request) -> httpx2.Response:
        message = {"role": "assistant", "content": "played"}
        return httpx2.Response(200, json={"choices": [{"index": 0, "message": message, "finish_reason": "stop"}]})

    async with httpx2.AsyncClient(transport=httpx2.MockTransport(play)) as http:
        client = openai.AsyncOpenAI(base_url=REAL, api_key="any", http_client=http)
        with block_real_requests() as blocked:
            assert (await BaseAgent("A", "a", client=client).run("hi")).content == "played"
    assert blocked == []


def test_after_the_block_nothing_is_blocked():
    with block_real_requests():
        pass
    with block_real_requests():
        pass
    agent = BaseAgent("A", "a", client=OpenAIModel(base_url="http://models.invalid/v1"))
    assert sync.run(agent, "hi", max_retries=0).metadata["error_type"] == "api_error"


def test_only_what_there_is_can_be_allowed():
    with pytest.raises(InvalidArguments, match='"loopback" or "endpoints"'), block_real_requests(allow="all"):  # type: ignore[arg-type]
        pass
