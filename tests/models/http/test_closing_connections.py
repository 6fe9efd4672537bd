"""Connections are closed by the last who needs them, and by nobody before."""

from __future__ import annotations

import gc
from collections.abc import Callable
from typing import Any

import anyio
import openai
import pytest

from fractal import AgentResult, BaseAgent, Limits, OpenAIModel
from fractal.testing import Endpoint, answers
from fractal.testing.answers import AnswerLike
from tests.support import in_thread

StartEndpoint = Callable[..., Endpoint]

CLIENTS: dict[str, Callable[[str], Any]] = {
    "own": lambda url: OpenAIModel(base_url=url),
    "own pool": lambda url: OpenAIModel(base_url=url, max_connections=2),
    "sdk": lambda url: openai.AsyncOpenAI(base_url=url, api_key="any"),
}

ONCE = Limits(max_requests=1)

kinds = pytest.mark.parametrize("kind", CLIENTS)


def slow_or_quick(request: Any) -> AnswerLike:
    return answers.text("some words", delay=0.4 if request.body["messages"][-1]["content"] == "slow" else 0.0)


async def all_closed(one: Endpoint) -> None:
    with anyio.fail_after(5):
        while one.connections:  # noqa: ASYNC110  # nobody tells when the last one is gone
            await anyio.sleep(0.02)


@kinds
@pytest.mark.parametrize("way", ["block", "aclose"])
async def test_closing_in_one_task_does_not_cut_the_requests_of_another(kind: str, way: str, endpoint: StartEndpoint):
    one = endpoint(slow_or_quick)
    agent = BaseAgent("A", "a", client=CLIENTS[kind](one.url))
    results: list[AgentResult] = []

    async def handle(text: str) -> None:
        async with agent:
            results.append(await agent.run(text, limits=ONCE, max_retries=0))

    async with anyio.create_task_group() as group:
        group.start_soon(handle, "slow")
        await in_thread(one.wait_for_requests, 1)
        if way == "block":
            await handle("quick")
        else:
            await agent.aclose()
    assert all(result.success for result in results), [result.error for result in results]
    assert len(one.requests) == len(results)


@kinds
async def test_closing_in_one_task_does_not_cut_the_stream_of_another(kind: str, endpoint: StartEndpoint):
    one = endpoint(answers.text("some words of text", chunk_delay=0.05))
    agent = BaseAgent("A", "a", client=CLIENTS[kind](one.url))
    async with agent.stream("go", limits=ONCE, max_retries=0) as stream:
        await in_thread(one.wait_for_requests, 1)
        await agent.aclose()
        text = "".join([piece async for piece in stream.text()])
    assert (text, (await stream.result()).success) == ("some words of text", True)
    await agent.aclose()
    assert len(one.requests) == 1


@pytest.mark.parametrize("kind", ["own", "sdk"])
async def test_runs_that_wait_for_a_connection_while_the_pool_is_closed_are_answered(
    kind: str, endpoint: StartEndpoint
):
    one = endpoint(answers.text("ok", delay=0.15))
    client = None if kind == "own" else openai.AsyncOpenAI(base_url=one.url, api_key="any")
    agent = BaseAgent("A", "a", client=OpenAIModel(client, max_connections=1))
    results: list[AgentResult] = []

    async def run() -> None:
        results.append(await agent.run("go", max_retries=0))

    async with anyio.create_task_group() as group:
        for _ in range(3):
            group.start_soon(run)
        await in_thread(one.wait_for_requests, 1)
        await agent.aclose()
    assert [result.content for result in results] == ["ok"] * 3
    await agent.aclose()
    await all_closed(one)
    assert len(one.requests) == 3


async def test_a_model_that_nobody_has_any_more_gives_its_connections_back(endpoint: StartEndpoint):
    one = endpoint("ok")
    for _ in range(20):
        assert (await BaseAgent("A", "a", client=OpenAIModel(max_connections=2)).run("go")).success
    gc.collect()
    await all_closed(one)


@kinds
async def test_a_later_run_opens_connections_again(kind: str, endpoint: StartEndpoint):
    one = endpoint("ok")
    agent = BaseAgent("A", "a", client=CLIENTS[kind](one.url))
    for _ in range(3):
        async with agent:
            assert (await agent.run("go", limits=ONCE)).success
    await agent.aclose()
    await agent.aclose()
    assert len(one.requests) == 3
