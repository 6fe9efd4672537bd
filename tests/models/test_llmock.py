"""Against an endpoint that somebody else wrote: it answers, fails in every way it knows, and judges its clients.

Its verdict lists what a client did wrong, by what it saw on the wire. Each test ends with that list.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, Literal

import anyio
import pytest
from openai import AsyncOpenAI
from pydantic import BaseModel, Field
from typing_extensions import TypedDict

from fractal import AgentResult, BaseAgent, InvalidOutput, Limits, RetryScheduled, StatusError, run_many, sync, tool
from fractal._engine import ask as _ask
from fractal.events import ToolCallDelta
from fractal.models.openai import OpenAIModel
from tests.llmock_server import LlmockServer, running_llmock
from tests.support import assert_continuable, in_thread, outcomes
from tests.without_uvloop import anyio_backend  # noqa: F401

pytest.importorskip("llmock", reason="llmock, the endpoint of these tests, comes with the dev extra")

pytestmark = pytest.mark.slow  # together: more than a minute

ANSWER = "Mock response from gpt-4o-mini."


@pytest.fixture(scope="module")
def process() -> Iterator[LlmockServer]:
    with running_llmock(["--response-style", "static"]) as server:
        yield server


@pytest.fixture(scope="module")
def paced_process() -> Iterator[LlmockServer]:
    """One that streams no faster than a model writes, so that it is still at it when its client hangs up."""
    with running_llmock(["--response-style", "static", "--stream-chunk-delay-ms", "50"]) as server:
        yield server


@pytest.fixture(scope="module", autouse=True)
def _processes(process: LlmockServer, paced_process: LlmockServer) -> None:
    """Start both before the first test: what one of them opens is none of what the test leaves."""


@pytest.fixture
def llmock_server(request: pytest.FixtureRequest) -> LlmockServer:
    """One of the processes, with nothing in its journal and no scenario."""
    server: LlmockServer = request.getfixturevalue(getattr(request, "param", "process"))
    server.reset()
    return server


@pytest.fixture(params=["own wire", "AsyncOpenAI"])
def client(request: pytest.FixtureRequest, llmock_server: LlmockServer) -> Any:
    """All ways to the wire."""
    kind = OpenAIModel if request.param == "own wire" else AsyncOpenAI
    return kind(base_url=llmock_server.url, api_key="sk-test")


@pytest.fixture
def short_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    """Back-off that still grows by more than the judge's tolerance, and more than a busy machine adds."""
    monkeypatch.setattr(_ask, "FIRST_BACK_OFF", 0.1)


class Weather(BaseAgent):
    """Counts the calls of its tools."""

    def __init__(self, client: Any, **options: Any) -> None:
        super().__init__("Helper", "Be brief.", client=client, **options)
        self.called: list[tuple[Any, ...]] = []

    @tool
    async def get_weather(self, city: str, days: int = 3) -> str:
        """The weather of a city."""
        self.called.append(("get_weather", city, days))
        return f"rain in {city}"

    @tool
    def convert_money(self, amount: float) -> float:
        """Turns money into other money."""
        self.called.append(("convert_money", amount))
        return amount * 2


async def findings(server: LlmockServer) -> list[str]:
    return await in_thread(server.findings)


async def journal(server: LlmockServer) -> list[dict[str, Any]]:
    return await in_thread(server.requests)


def waits(requests: list[dict[str, Any]]) -> list[float]:
    """Seconds from the end of each request to the next."""
    return [after["started_at"] - before["ended_at"] for before, after in pairwise(requests)]


# ---- plain runs


async def test_a_run_is_answered(llmock_server: LlmockServer, client: Any):
    result = await BaseAgent("A", "a", client=client, temperature=0.5).run("Hello there, endpoint!")
    assert result.content == ANSWER
    assert (result.usage.requests, result.usage.input_tokens > 0, result.usage.output_tokens > 0) == (1, True, True)
    [request] = await journal(llmock_server)
    assert request["body"] == {
        "model": "gpt-4o-mini",
        "temperature": 0.5,
        "messages": [{"role": "system", "content": "a"}, {"role": "user", "content": "Hello there, endpoint!"}],
    }
    assert await findings(llmock_server) == []


async def test_a_tool_is_called_with_arguments_the_endpoint_makes_from_its_schema(
    llmock_server: LlmockServer, client: Any
):
    agent = Weather(client)
    result = await agent.run("What is the weather in Paris?")
    assert result.content == ANSWER
    assert agent.called == [("get_weather", "mock-city", 3)]
    assert [message["role"] for message in result.messages] == ["user", "assistant", "tool", "assistant"]
    assert result.usage.requests == 2
    assert_continuable(result)
    assert await findings(llmock_server) == []


async def test_two_calls_of_one_reply_are_answered_in_call_order(llmock_server: LlmockServer, client: Any):
    calls = [
        {"name": "get_weather", "arguments": {"city": "Rome", "days": 1}},
        {"name": "convert_money", "arguments": {"amount": 4}},
    ]
    llmock_server.scenario({"type": "reply", "tool_calls": calls})
    agent = Weather(client)
    result = await agent.run("go")
    assert sorted(agent.called) == [("convert_money", 4.0), ("get_weather", "Rome", 1)]
    assert [tool_result.content for tool_result in result.tool_results] == ["rain in Rome", 8.0]
    _, last = await journal(llmock_server)
    assert [message["content"] for message in last["body"]["messages"][-2:]] == ["rain in Rome", "8.0"]
    assert await findings(llmock_server) == []


async def test_a_delegate_is_asked_and_its_answer_goes_back(llmock_server: LlmockServer, client: Any):
    child = Weather(client, model="child-model")
    parent = BaseAgent("Parent", "You ask others.", "parent-model", client).register_delegate(child)
    result = await parent.run("go")
    assert result.content == "Mock response from parent-model."
    assert result.tool_results[0].content == "Mock response from child-model."
    assert child.called == [("get_weather", "mock-city", 3)]
    assert result.usage.requests == 4
    models = [request["model"] for request in await journal(llmock_server)]
    assert models == ["parent-model", "child-model", "child-model", "parent-model"]
    assert await findings(llmock_server) == []


async def test_a_conversation_goes_on_after_a_run_with_tools(llmock_server: LlmockServer, client: Any):
    agent = Weather(client)
    first = await agent.run("What is the weather in Paris?")
    second = await agent.run("And the money?", messages=first.messages)
    assert second.success
    assert [name for name, *_ in agent.called] == ["get_weather", "get_weather"]
    assert [message["role"] for message in second.messages] == ["user", "assistant", "tool", "assistant"] * 2
    assert await findings(llmock_server) == []


async def test_equal_questions_side_by_side_are_no_retries(llmock_server: LlmockServer, client: Any):
    results = await run_many(Weather(client), ["What is the weather?"] * 24, max_concurrency=8)
    assert [result.content for result in results] == [ANSWER] * 24
    assert len(await journal(llmock_server)) == 48
    assert await findings(llmock_server) == []


def test_blocking_callers_get_the_same(llmock_server: LlmockServer, client: Any, backend: str):
    agent = Weather(client)
    with sync.portal(backend=backend):
        result = sync.run(agent, "What is the weather in Paris?")
        results = sync.run_many(agent, ["weather?", "money?"], max_concurrency=2)
    assert [r.content for r in (result, *results)] == [ANSWER] * 3
    assert sorted(name for name, *_ in agent.called) == ["convert_money", "get_weather", "get_weather"]
    assert llmock_server.findings() == []


# ---- faults, before there is an answer


async def test_retry_after_is_waited_for(llmock_server: LlmockServer, client: Any):
    llmock_server.scenario({"type": "fail", "status": 429, "retry_after": 0.3, "times": 2})
    retries: list[RetryScheduled] = []
    agent = Weather(client, observers=[lambda e: retries.append(e) if isinstance(e, RetryScheduled) else None])
    result = await agent.run("What is the weather?")
    assert result.content == ANSWER
    assert result.usage.requests == 4
    assert [retry.wait for retry in retries] == [0.3, 0.3]
    assert [request["status"] for request in await journal(llmock_server)] == [429, 429, 200, 200]
    assert min(waits(await journal(llmock_server))[:2]) >= 0.3
    assert await findings(llmock_server) == []


async def test_no_try_is_made_that_could_not_end_in_time(llmock_server: LlmockServer, client: Any):
    llmock_server.scenario({"type": "fail", "status": 429, "retry_after": 30})
    with anyio.fail_after(5):
        result = await Weather(client).run("What is the weather?", timeout=10)
    assert (result.success, result.stop_reason) == (False, "deadline")
    assert "30" in str(result.error)
    assert len(await journal(llmock_server)) == 1
    # The judge cannot see a deadline: “or make sure the caller handles the error on purpose” is its advice.
    assert await findings(llmock_server) == ["gave_up"]


@pytest.mark.usefixtures("short_pauses")
async def test_an_outage_ends_the_run_after_a_few_tries(llmock_server: LlmockServer, client: Any):
    llmock_server.scenario({"type": "fail", "status": 500, "times": None})
    result = await Weather(client).run("What is the weather?")
    assert (result.success, result.stop_reason, result.metadata["error_type"]) == (False, "model_error", "api_error")
    assert type(result.exception).__name__ == "ServerError"
    assert "Internal server error." in str(result.error)
    assert len(waits(await journal(llmock_server))) == 3
    assert_continuable(result)
    assert await findings(llmock_server) == []


async def test_an_outage_that_says_when_to_come_back_is_believed(llmock_server: LlmockServer, client: Any):
    llmock_server.scenario({"type": "fail", "status": 503, "retry_after": 0.1, "times": None})
    result = await Weather(client).run("What is the weather?", max_retries=2)
    assert (result.success, result.usage.requests) == (False, 3)
    assert min(waits(await journal(llmock_server))) >= 0.1
    assert await findings(llmock_server) == []


@pytest.mark.slow
async def test_the_judge_has_nothing_against_the_back_off_as_it_is(llmock_server: LlmockServer, client: Any):
    llmock_server.scenario({"type": "fail", "status": 502, "times": 3})
    result = await Weather(client).run("What is the weather?")
    assert (result.content, result.usage.requests) == (ANSWER, 5)
    assert await findings(llmock_server) == []


async def test_runs_side_by_side_come_through_a_bad_phase(
    llmock_server: LlmockServer, client: Any, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(_ask, "FIRST_BACK_OFF", 0.1)  # twelve answers at once hold each other up
    llmock_server.scenario(
        {"type": "fail", "status": 429, "retry_after": 0.2, "times": 6},
        {"type": "fail", "status": 500, "times": 6},
    )
    results = await run_many(Weather(client), [f"What is the weather on day {n}?" for n in range(12)], max_retries=8)
    assert [result.content for result in results] == [ANSWER] * 12
    assert len(await journal(llmock_server)) == 24 + 12
    assert await findings(llmock_server) == []


@pytest.mark.parametrize("status", [400, 401, 403, 404, 413, 422])
async def test_what_will_not_pass_is_not_sent_again(llmock_server: LlmockServer, client: Any, status: int):
    llmock_server.scenario({"type": "fail", "status": status, "message": "no way", "code": "nope", "times": None})
    result = await Weather(client).run("What is the weather?")
    assert (result.success, result.error) == (False, f"HTTP {status}: no way")
    assert len(await journal(llmock_server)) == 1
    assert await findings(llmock_server) == []


async def test_a_prompt_too_long_for_the_endpoint_is_told_as_it_says(llmock_server: LlmockServer, client: Any):
    message = "This model's maximum context length was exceeded."
    llmock_server.scenario({"type": "fail", "status": 400, "code": "context_length_exceeded", "message": message})
    result = await Weather(client).run("What is the weather?")
    assert message in str(result.error)
    assert isinstance(result.exception, StatusError)
    assert result.exception.code == "context_length_exceeded"
    assert await findings(llmock_server) == []


@pytest.mark.parametrize(
    ("kind", "words"),
    [("malformed_arguments", "does not fit"), ("unknown_tool", "there is no tool 'llmock_unknown_tool'")],
)
async def test_a_bad_tool_call_goes_back_to_the_model(llmock_server: LlmockServer, client: Any, kind: str, words: str):
    llmock_server.scenario({"type": "tool_fault", "kind": kind})
    agent = Weather(client)
    result = await agent.run("What is the weather?")
    assert result.content == ANSWER
    assert agent.called == []
    assert outcomes(result) == ["error"]
    _, second = await journal(llmock_server)
    assert words in second["body"]["messages"][-1]["content"]
    assert_continuable(result)
    assert await findings(llmock_server) == []


async def test_a_model_that_only_makes_bad_calls_is_stopped(llmock_server: LlmockServer, client: Any):
    llmock_server.scenario({"type": "tool_fault", "kind": "malformed_arguments", "times": None})
    agent = Weather(client)
    result = await agent.run("What is the weather?", max_iterations=4)
    assert (result.stop_reason, result.usage.requests, agent.called) == ("max_iterations", 4, [])
    assert_continuable(result)
    assert await findings(llmock_server) == []


@pytest.mark.slow
async def test_a_slow_answer_is_cut_at_the_deadline(llmock_server: LlmockServer, client: Any):
    llmock_server.scenario({"type": "delay", "seconds": 1.5})
    with anyio.fail_after(1.2):
        result = await Weather(client).run("What is the weather?", timeout=0.3)
    assert (result.success, result.stop_reason, result.metadata["error_type"]) == (False, "deadline", "timeout")
    assert len(await journal(llmock_server)) == 1
    assert await findings(llmock_server) == []


@pytest.mark.slow
async def test_a_slow_answer_is_asked_for_again_within_the_time_of_a_request(
    llmock_server: LlmockServer, client: Any, short_pauses: None
):
    llmock_server.scenario({"type": "delay", "seconds": 1.5})
    with anyio.fail_after(1.4):
        result = await Weather(client, limits=Limits(request_timeout=0.4)).run("What is the weather?")
    assert (result.content, result.usage.requests) == (ANSWER, 3)
    assert len(await journal(llmock_server)) == 3
    assert await findings(llmock_server) == []


@pytest.mark.slow
async def test_a_quota_is_kept_to_by_what_the_endpoint_says(tmp_path: Any):
    with running_llmock(["--rpm", "60", "--response-style", "static"]) as strict:
        agent = BaseAgent("A", "a", client=OpenAIModel(base_url=strict.url, api_key="sk-test"))
        results = await run_many(agent, [f"{n}?" for n in range(63)], max_concurrency=16)
        assert [result.content for result in results] == [ANSWER] * 63
        assert any(request["status"] == 429 for request in await journal(strict))
        assert await findings(strict) == []


# ---- streams

WORDS = ["Mock ", "response ", "from ", "gpt-4o-mini."]
# Events of that answer: 0 the role, 1 to 4 the words, 5 the finish reason, 6 the usage, 7 [DONE].
BREAKS = {  # fault: what it is to us, what the judge says if the same question does not come again
    "disconnect": ("ConnectionFailed", "gave_up"),
    "truncate": ("ConnectionFailed", "truncated_stream_accepted"),
    "malformed": ("BadReply", "malformed_chunk_ignored"),
}
each_break = pytest.mark.parametrize(
    ("llmock_server", "kind"),
    # After its one bad event the stream goes on to its end. If that is already under way when the client hangs up, the
    # judge takes the stream for whole and the next request for another question.
    [("process", "disconnect"), ("process", "truncate"), ("paced_process", "malformed")],
    indirect=["llmock_server"],
)


def fault(kind: str, after_chunks: int, **facts: Any) -> dict[str, Any]:
    return {"type": "stream_fault", "kind": kind, "after_chunks": after_chunks, **facts}


async def read(agent: BaseAgent, question: str = "go", **options: Any) -> tuple[list[str], AgentResult]:
    """The pieces of text in the order they came, and how the run ended."""
    async with agent.stream(question, **options) as stream:
        pieces = [piece async for piece in stream.text()]
        return pieces, await stream.result()


def plain_agent(client: Any, **options: Any) -> BaseAgent:
    return BaseAgent("A", "a", client=client, **options)


async def test_a_stream_brings_the_text_word_by_word(llmock_server: LlmockServer, client: Any):
    pieces, result = await read(plain_agent(client), "Hello there, endpoint!")
    assert (pieces, result.content) == (WORDS, ANSWER)
    assert (result.usage.requests, result.usage.input_tokens > 0, result.usage.output_tokens > 0) == (1, True, True)
    [body] = await in_thread(llmock_server.bodies)
    assert body["stream"] is True
    assert await findings(llmock_server) == []


async def test_a_streamed_tool_call_is_put_together(llmock_server: LlmockServer, client: Any):
    agent = Weather(client)
    async with agent.stream("What is the weather in Paris?") as stream:
        events = [event async for event in stream]
        result = await stream.result()
    deltas = [event for event in events if isinstance(event, ToolCallDelta)]
    assert len(deltas) > 2
    assert "".join(delta.arguments for delta in deltas) == '{"city": "mock-city", "days": 3}'
    assert {delta.tool_name for delta in deltas} == {"get_weather"}
    assert agent.called == [("get_weather", "mock-city", 3)]
    assert result.content == ANSWER
    assert_continuable(result)
    assert await findings(llmock_server) == []


async def test_a_stream_ends_as_the_run_does(llmock_server: LlmockServer, client: Any):
    child = Weather(client, model="child-model")
    parent = BaseAgent("Parent", "You ask others.", client=client).register_delegate(child)
    ran = await parent.run("go")
    pieces, streamed = await read(parent)
    assert "".join(pieces) == streamed.content == ran.content
    assert streamed.usage == ran.usage
    assert outcomes(streamed) == outcomes(ran)
    assert streamed.tool_results[0].content == ran.tool_results[0].content
    assert [m["role"] for m in streamed.messages] == [m["role"] for m in ran.messages]
    assert child.called == [("get_weather", "mock-city", 3)] * 2
    assert await findings(llmock_server) == []


async def test_a_stream_that_is_refused_is_asked_for_again(llmock_server: LlmockServer, client: Any):
    llmock_server.scenario({"type": "fail", "status": 429, "retry_after": 0.2, "times": 2})
    pieces, result = await read(plain_agent(client))
    assert (pieces, result.usage.requests) == (WORDS, 3)
    assert min(waits(await journal(llmock_server))) >= 0.2
    assert await findings(llmock_server) == []


@pytest.mark.usefixtures("short_pauses")
async def test_an_outage_ends_a_stream_after_a_few_tries(llmock_server: LlmockServer, client: Any):
    llmock_server.scenario({"type": "fail", "status": 503, "times": None})  # 500 may mean an unknown field, too
    pieces, result = await read(plain_agent(client))
    assert (pieces, result.success, result.stop_reason) == ([], False, "model_error")
    assert len(await journal(llmock_server)) == 4
    assert await findings(llmock_server) == []


@pytest.mark.usefixtures("short_pauses")
@pytest.mark.parametrize("after", [0, 1])
@each_break
async def test_a_stream_that_breaks_before_the_first_word_is_asked_for_again(
    llmock_server: LlmockServer, client: Any, kind: str, after: int
):
    llmock_server.scenario(fault(kind, after))
    pieces, result = await read(plain_agent(client))
    assert (pieces, result.content, result.usage.requests) == (WORDS, ANSWER, 2)
    assert await findings(llmock_server) == []


@pytest.mark.parametrize("after", [3, 5])
@each_break
async def test_a_stream_that_breaks_later_is_an_error_and_no_word_comes_twice(
    llmock_server: LlmockServer, client: Any, kind: str, after: int
):
    error, code = BREAKS[kind]
    llmock_server.scenario(fault(kind, after))
    agent = plain_agent(client)
    pieces, result = await read(agent)
    assert pieces == WORDS[: after - 1]
    assert (result.success, result.stop_reason, type(result.exception).__name__) == (False, "model_error", error)
    assert len(await journal(llmock_server)) == 1
    assert_continuable(result)
    # The judge sees only whether the same question comes again; here that is for whoever was told the error.
    assert await findings(llmock_server) == [code]
    pieces, result = await read(agent)
    assert (pieces, result.content) == (WORDS, ANSWER)
    assert await findings(llmock_server) == []


@pytest.mark.usefixtures("short_pauses")
async def test_streams_that_always_break_are_given_up(llmock_server: LlmockServer, client: Any):
    llmock_server.scenario(fault("truncate", 1, times=4))
    agent = plain_agent(client)
    pieces, result = await read(agent)
    assert (pieces, result.success, result.usage.requests) == ([], False, 4)
    assert await findings(llmock_server) == ["truncated_stream_accepted"]
    pieces, result = await read(agent)
    assert (pieces, result.success) == (WORDS, True)
    assert await findings(llmock_server) == []


@each_break
async def test_a_tool_call_that_breaks_off_is_not_made(llmock_server: LlmockServer, client: Any, kind: str):
    error, code = BREAKS[kind]
    llmock_server.scenario(fault(kind, 3))
    agent = Weather(client)
    _, result = await read(agent, "What is the weather?")
    assert (result.success, type(result.exception).__name__, agent.called) == (False, error, [])
    assert_continuable(result)
    assert await findings(llmock_server) == [code]
    _, result = await read(agent, "What is the weather?")
    assert (result.content, agent.called) == (ANSWER, [("get_weather", "mock-city", 3)])
    assert await findings(llmock_server) == []


async def test_a_stream_that_stalls_is_cut_at_the_time_of_a_request(llmock_server: LlmockServer, client: Any):
    llmock_server.scenario(fault("stall", 3, stall_seconds=30))
    with anyio.fail_after(3):
        pieces, result = await read(plain_agent(client, limits=Limits(request_timeout=0.3)))
    assert pieces == WORDS[:2]
    assert (result.success, type(result.exception).__name__) == (False, "RequestTimedOut")
    [request] = await journal(llmock_server)
    assert request["completed"] is False
    assert request["stall_waited"] < 1.5
    assert await findings(llmock_server) == []


@pytest.mark.usefixtures("short_pauses")
@pytest.mark.parametrize(
    "trouble",
    [fault("stall", 1, stall_seconds=30), {"type": "slow_first_token", "seconds": 30}],
    ids=lambda t: t["type"],
)
async def test_a_first_word_that_does_not_come_is_asked_for_again(
    llmock_server: LlmockServer, client: Any, trouble: dict[str, Any]
):
    llmock_server.scenario(trouble)
    with anyio.fail_after(3):
        pieces, result = await read(plain_agent(client, limits=Limits(request_timeout=0.3)))
    assert (pieces, result.usage.requests) == (WORDS, 2)
    assert await findings(llmock_server) == []


@pytest.mark.parametrize(
    "trouble",
    [fault("stall", 3, stall_seconds=30), {"type": "slow_first_token", "seconds": 30}],
    ids=lambda t: t["type"],
)
async def test_a_stream_is_cut_at_the_deadline_of_the_run(
    llmock_server: LlmockServer, client: Any, trouble: dict[str, Any]
):
    llmock_server.scenario(trouble)
    with anyio.fail_after(3):
        pieces, result = await read(plain_agent(client), timeout=0.3)
    assert pieces == (WORDS[:2] if trouble["type"] == "stream_fault" else [])
    assert (result.success, result.stop_reason) == (False, "deadline")
    [request] = await journal(llmock_server)
    assert request["duration"] < 1.5
    assert await findings(llmock_server) == []


async def test_the_endpoint_sees_at_once_that_a_reader_has_left(llmock_server: LlmockServer, client: Any):
    llmock_server.scenario(fault("stall", 2, stall_seconds=30))
    with anyio.fail_after(3):
        async with plain_agent(client).stream("go") as stream:
            async for piece in stream.text():
                assert piece == WORDS[0]
                break
        result = await stream.result()
    assert (result.success, result.stop_reason) == (False, "cancelled")
    [request] = await journal(llmock_server)
    assert request["completed"] is False
    assert request["duration"] < 1.5
    assert await findings(llmock_server) == []


@pytest.mark.parametrize("kind", ["malformed_arguments", "unknown_tool"])
async def test_a_bad_tool_call_in_a_stream_goes_back_to_the_model(llmock_server: LlmockServer, client: Any, kind: str):
    llmock_server.scenario({"type": "tool_fault", "kind": kind})
    agent = Weather(client)
    pieces, result = await read(agent, "What is the weather?")
    assert (pieces, result.content, agent.called, outcomes(result)) == (WORDS, ANSWER, [], ["error"])
    assert_continuable(result)
    assert await findings(llmock_server) == []


@pytest.mark.usefixtures("short_pauses")
def test_blocking_streams_meet_the_same_faults(llmock_server: LlmockServer, client: Any, backend: str):
    def read_blocking() -> tuple[list[str], AgentResult]:
        with sync.stream(Weather(client), "What is the weather?") as stream:
            return list(stream.text()), stream.result()

    with sync.portal(backend=backend):
        llmock_server.scenario(fault("disconnect", 1), fault("truncate", 0))
        assert read_blocking()[0] == WORDS
        assert llmock_server.findings() == []
        llmock_server.reset()

        llmock_server.scenario({"type": "reply", "text": "one two three"}, fault("truncate", 2))
        pieces, result = read_blocking()
        assert (pieces, result.success) == (["one "], False)
        assert read_blocking()[0] == WORDS
        assert llmock_server.findings() == []


# ---- structured output


class City(BaseModel):
    """A town."""

    name: str
    population: int = Field(ge=1, le=40_000_000)


@dataclass
class River:
    length: float
    city: City | None


class Trip(TypedDict):
    city: City
    days: int


CITY = City(name="mock-name", population=1)
TYPES = [  # output type, the example that the endpoint makes from its schema, as an object
    (City, CITY),
    (list[City], [CITY]),
    (River, River(1.0, CITY)),
    (Trip, {"city": CITY, "days": 1}),
    (City | River, CITY),
    (Literal["rain", "sun"], "rain"),
    (int, 1),
    (bool, True),
]
ROME = City(name="Rome", population=2_800_000)
RIGHT, NOT_FITTING = {"name": "Rome", "population": 2_800_000}, {"name": "Rome", "population": 0}
NOT_JSON = "no JSON"
FINAL_ANSWER = "final_answer"  # the tool that takes the answer
WAYS = ["native", "tool", "prompt"]


def answering(way: str, *steps: Any, times: int | None = 1) -> list[dict[str, Any]]:
    """Has the model give these answers, each in a way's own form."""
    behaviours: list[dict[str, Any]] = []
    for step in steps:
        if way != "tool":
            text = step if isinstance(step, str) else json.dumps(step)
            behaviours.append({"type": "reply", "text": text, "times": times})
            continue
        arguments = RIGHT if step == NOT_JSON else step
        calls = [{"name": FINAL_ANSWER, "arguments": arguments}]
        behaviours.append({"type": "reply", "tool_calls": calls, "times": times})
        if step == NOT_JSON:
            behaviours.append({"type": "tool_fault", "kind": "malformed_arguments", "times": times})
    return behaviours


def refusing(way: str, times: int | None = 1) -> dict[str, Any]:
    """Has the endpoint refuse a way of an agent without tools of its own: only the tool's way offers one then."""
    words = "tools are not supported" if way == "tool" else "response_format json_schema is not supported"
    return {"type": "fail", "status": 400, "message": words, "times": times, "match": {"tools": way == "tool"}}


def ways(bodies: list[dict[str, Any]]) -> list[str]:
    """The way in which each request asks for its answer."""
    return ["native" if "response_format" in body else "tool" if "tools" in body else "prompt" for body in bodies]


def geographer(client: Any, mode: str, **options: Any) -> BaseAgent:
    return BaseAgent("Geographer", "Be brief.", client=client, output_type=City, output_mode=mode, **options)


@pytest.mark.parametrize("mode", ["native", "tool", "auto"])
async def test_an_answer_comes_as_the_type_that_was_asked_for(llmock_server: LlmockServer, client: Any, mode: str):
    agent = BaseAgent("A", "a", client=client, output_mode=mode)
    for kind, expected in TYPES:
        result = await agent.run("go", output_type=kind)
        assert result.raise_for_error().content == expected
        assert_continuable(result)
    assert ways(await in_thread(llmock_server.bodies)) == ["tool" if mode == "tool" else "native"] * len(TYPES)
    assert await findings(llmock_server) == []


@pytest.mark.parametrize("text", [json.dumps(RIGHT), f"Here it is:\n```json\n{json.dumps(RIGHT)}\n```"])
async def test_an_answer_that_was_asked_for_in_words_is_found_in_the_text(
    llmock_server: LlmockServer, client: Any, text: str
):
    llmock_server.scenario(*answering("prompt", text))
    result = await geographer(client, "prompt").run("Rome?")
    assert result.raise_for_error().content == ROME
    bodies = await in_thread(llmock_server.bodies)
    assert ways(bodies) == ["prompt"]
    assert "population" in json.dumps(bodies[0]["messages"])
    assert await findings(llmock_server) == []


@pytest.mark.parametrize("way", WAYS)
async def test_an_answer_that_is_wrong_twice_is_asked_for_again(llmock_server: LlmockServer, client: Any, way: str):
    llmock_server.scenario(*answering(way, NOT_JSON, NOT_FITTING, RIGHT))
    result = await geographer(client, way).run("Rome?")
    assert result.raise_for_error().content == ROME
    bodies = await in_thread(llmock_server.bodies)
    assert ways(bodies) == [way] * 3
    assert "population" in bodies[2]["messages"][-1]["content"]
    assert_continuable(result)
    assert await findings(llmock_server) == []


@pytest.mark.parametrize("wrong", [NOT_JSON, NOT_FITTING], ids=["no JSON", "does not fit"])
@pytest.mark.parametrize("way", WAYS)
async def test_an_answer_that_is_never_right_ends_the_run(
    llmock_server: LlmockServer, client: Any, way: str, wrong: Any
):
    llmock_server.scenario(*answering(way, wrong, times=None))
    result = await geographer(client, way).run("Rome?")
    assert isinstance(result.exception, InvalidOutput)
    assert len(await journal(llmock_server)) == 4
    assert_continuable(result)
    assert await findings(llmock_server) == []


@pytest.mark.parametrize("mode", ["native", "auto"])
async def test_tools_are_called_before_the_answer_is_given(llmock_server: LlmockServer, client: Any, mode: str):
    agent = Weather(client, output_type=City, output_mode=mode)
    result = await agent.run("What is the weather in Paris?")
    assert result.raise_for_error().content == CITY
    assert agent.called == [("get_weather", "mock-city", 3)]
    assert_continuable(result)
    assert await findings(llmock_server) == []


async def test_a_model_that_answers_in_words_is_made_to_call_the_tool_for_it(llmock_server: LlmockServer, client: Any):
    # After the result of a tool this model always answers in words, unless it has to call another.
    llmock_server.scenario({"type": "reply", "tool_calls": [{"name": "get_weather", "arguments": {"city": "Rome"}}]})
    agent = Weather(client, output_type=City, output_mode="tool")
    result = await agent.run("What is the weather in Rome?")
    assert result.raise_for_error().content == CITY
    assert agent.called == [("get_weather", "Rome", 3)]
    bodies = await in_thread(llmock_server.bodies)
    forced = {"type": "function", "function": {"name": FINAL_ANSWER}}
    assert [body.get("tool_choice") for body in bodies] == [None, None, forced]
    assert_continuable(result)
    assert await findings(llmock_server) == []


async def test_a_way_that_the_endpoint_refuses_is_left_and_not_tried_again(llmock_server: LlmockServer, client: Any):
    llmock_server.scenario(refusing("native"))
    agent = geographer(client, "auto")
    results = [await agent.run("Rome?"), await agent.run("Rome?")]
    assert [result.raise_for_error().content for result in results] == [CITY, CITY]
    assert ways(await in_thread(llmock_server.bodies)) == ["native", "tool", "tool"]
    assert await findings(llmock_server) == []


async def test_an_endpoint_that_knows_no_way_is_asked_in_words(llmock_server: LlmockServer, client: Any):
    llmock_server.scenario(refusing("native"), refusing("tool", None), *answering("prompt", RIGHT, RIGHT))
    agent = geographer(client, "auto")
    results = [await agent.run("Rome?"), await agent.run("Rome?")]
    assert [result.raise_for_error().content for result in results] == [ROME, ROME]
    assert ways(await in_thread(llmock_server.bodies)) == ["native", "tool", "prompt", "prompt"]
    assert await findings(llmock_server) == []


async def test_an_endpoint_that_refuses_everything_is_asked_once_in_each_way(llmock_server: LlmockServer, client: Any):
    llmock_server.scenario(refusing("native", None), refusing("tool", None))
    result = await geographer(client, "auto").run("Rome?")
    assert (result.success, result.error) == (False, "HTTP 400: response_format json_schema is not supported")
    assert ways(await in_thread(llmock_server.bodies)) == WAYS
    assert await findings(llmock_server) == []


@pytest.mark.parametrize("way", WAYS)
async def test_a_way_that_was_chosen_is_kept_to(llmock_server: LlmockServer, client: Any, way: str):
    llmock_server.scenario(refusing(way, None))
    result = await geographer(client, way).run("Rome?")
    assert (result.success, result.stop_reason) == (False, "model_error")
    assert ways(await in_thread(llmock_server.bodies)) == [way]
    assert await findings(llmock_server) == []


@pytest.mark.parametrize("way", WAYS)
async def test_an_object_grows_while_it_is_streamed(llmock_server: LlmockServer, client: Any, way: str):
    llmock_server.scenario(*answering(way, NOT_FITTING, RIGHT))
    async with geographer(client, way).stream("Rome?") as stream:
        partials = [partial async for partial in stream.partial()]
        result = await stream.result()
    assert partials[-1] == result.raise_for_error().content == ROME
    # Names without a number, then with it; the number that does not fit is never shown.
    numbers = [partial.population for partial in partials if partial.name == "Rome"]
    assert list(dict.fromkeys(numbers)) == [None, 2_800_000]
    assert await findings(llmock_server) == []


@pytest.mark.parametrize("way", WAYS)
async def test_a_streamed_answer_that_is_wrong_is_asked_for_again(llmock_server: LlmockServer, client: Any, way: str):
    llmock_server.scenario(*answering(way, NOT_JSON, NOT_FITTING, RIGHT))
    _, result = await read(geographer(client, way), "Rome?")
    assert result.raise_for_error().content == ROME
    assert ways(await in_thread(llmock_server.bodies)) == [way] * 3
    assert await findings(llmock_server) == []


async def test_a_refused_way_is_left_in_a_stream_too(llmock_server: LlmockServer, client: Any):
    llmock_server.scenario(refusing("native"))
    agent = geographer(client, "auto")
    results = [(await read(agent, "Rome?"))[1] for _ in range(2)]
    assert [result.raise_for_error().content for result in results] == [CITY, CITY]
    assert ways(await in_thread(llmock_server.bodies)) == ["native", "tool", "tool"]
    assert await findings(llmock_server) == []


@each_break
async def test_half_an_object_is_no_answer(llmock_server: LlmockServer, client: Any, kind: str):
    error, code = BREAKS[kind]
    llmock_server.scenario(*answering("native", RIGHT, RIGHT), fault(kind, 3))
    agent = geographer(client, "native")
    pieces, result = await read(agent, "Rome?")
    assert (pieces, result.success, type(result.exception).__name__) == (['{"name": ', '"Rome", '], False, error)
    assert await findings(llmock_server) == [code]
    _, result = await read(agent, "Rome?")
    assert result.raise_for_error().content == ROME
    assert await findings(llmock_server) == []


def test_blocking_callers_get_objects_too(llmock_server: LlmockServer, client: Any, backend: str):
    llmock_server.scenario(refusing("native"))
    agent = geographer(client, "auto")
    with sync.portal(backend=backend):
        result = sync.run(agent, "Rome?")
        with sync.stream(agent, "Rome?") as stream:
            streamed = stream.result()
    assert result.content == streamed.content == CITY
    assert ways(llmock_server.bodies()) == ["native", "tool", "tool"]
    assert llmock_server.findings() == []


@pytest.mark.parametrize("after", [6, 7])
async def test_a_connection_that_breaks_after_the_answer_breaks_nothing(
    llmock_server: LlmockServer, client: Any, after: int
):
    llmock_server.scenario(fault("disconnect", after))

    pieces, result = await read(plain_agent(client))

    assert (pieces, result.content) == (WORDS, ANSWER)
