"""Everything that runs do with an endpoint, with servers that nobody of the project wrote.

They run where `scripts/test-endpoints` has installed them; docs/endpoints-tried.md has what each of them does oddly.
"""

from __future__ import annotations

import sys
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any, get_args

import anyio
import httpx2
import openai
import pytest
from pydantic import BaseModel

from fractal import (
    AgentResult,
    AuthenticationFailed,
    BaseAgent,
    DeadlineWouldPass,
    Limits,
    ModelError,
    RateLimited,
    RunFinished,
    ServerError,
    StatusError,
    TextDelta,
    run_many,
    sync,
)
from fractal._answers.ways import OutputMode
from tests.endpoints.conftest import Running
from tests.endpoints.servers import (
    BOTH,
    BREAK,
    CITY,
    CUT,
    CUT_CALL,
    FILTER,
    HANG_UP,
    KEY,
    LONG,
    LOOK,
    NOW,
    SAID,
    SAY,
    SLOW_DOWN,
    STORY,
    THINK,
)
from tests.support import assert_continuable, in_thread, outcomes
from tests.wires import HTTP, call

pytestmark = [pytest.mark.slow, pytest.mark.timeout(180)]  # a server starts in the time of its first test

WAYS = ["run", "stream"]
QUESTIONS = {"one": LOOK, "several": BOTH, "without arguments": NOW}
ANSWERS = {LOOK: ["rain in Rome"], BOTH: ["rain in Rome", "rain in Paris"], NOW: ["noon"]}


class City(BaseModel):
    """A city."""

    city: str
    rains: bool


def weather(city: str) -> str:
    """The weather of a city."""
    return f"rain in {city}"


async def now() -> str:
    """The time of the day."""
    return "noon"


def with_tools(agent: BaseAgent) -> BaseAgent:
    return agent.add_tool(weather).add_tool(now)


async def ask(agent: BaseAgent, way: str, question: str, **options: Any) -> AgentResult:
    """Run an agent; the pieces of a stream are those of the answer."""
    options = {"timeout": 30, **options}
    if way == "run":
        return await agent.run(question, **options)
    pieces: list[str] = []
    async with agent.stream(question, **options) as stream:
        async for event in stream:
            pieces += [event.text] if isinstance(event, TextDelta) else []
    result = await stream.result()
    if result.success and isinstance(result.content, str):
        assert "".join(pieces).endswith(result.content)
    return result


def asked_once_each(place: Running, result: AgentResult, turns: int) -> bool:
    """Whether a run has sent one request for each turn, as far as the server lets it."""
    sent = result.usage.requests
    return sent == turns or (sent > turns and not place.can("keep alive"))


# ---- answers


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("wire", HTTP)
async def test_a_question_is_answered(place: Running, wire: str, way: str):
    result = await ask(place.agent(wire), way, SAY)
    assert (result.error, result.content, result.warnings) == (None, SAID, [])
    assert asked_once_each(place, result, 1)
    if place.can("usage") and (way == "run" or place.can("usage in a stream")):
        assert (result.usage.input_tokens > 0, result.usage.output_tokens > 0) == (True, True)


async def test_parts_are_taken_in_place_of_a_text(place: Running):
    place.needs("parts")
    result = await place.agent().run([{"type": "text", "text": "Please."}, {"type": "text", "text": SAY}])
    assert (result.error, result.content) == (None, SAID)


@pytest.mark.parametrize("way", WAYS)
async def test_an_answer_that_is_cut_is_told(place: Running, way: str):
    place.needs("cut")
    result = await ask(place.agent(max_tokens=2), way, CUT)
    assert result.error is None
    assert (len(result.content) < len(SAID), SAID.startswith(result.content)) == (True, True)
    [warning] = result.warnings
    assert "max_tokens" in warning


# ---- tools


@pytest.mark.parametrize("question", QUESTIONS)
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("wire", HTTP)
async def test_tools_are_called_and_what_they_say_is_taken(place: Running, wire: str, way: str, question: str):
    place.needs(question)
    result = await ask(with_tools(place.agent(wire)), way, QUESTIONS[question])
    assert (result.error, result.content, result.warnings) == (None, SAID, [])
    assert asked_once_each(place, result, 2)
    assert [call.content for call in result.tool_results] == ANSWERS[QUESTIONS[question]]
    assert_continuable(result)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("wire", HTTP)
async def test_a_conversation_goes_on_after_tools(place: Running, wire: str, way: str):
    place.needs("several")
    agent = with_tools(place.agent(wire))
    first = await ask(agent, way, BOTH)
    second = await ask(agent, way, LOOK, messages=first.messages)
    third = await ask(agent, way, SAY, messages=second.messages)
    assert [result.error for result in (first, second, third)] == [None] * 3
    assert [result.content for result in (first, second, third)] == [SAID] * 3
    assert [len(result.tool_results) for result in (first, second, third)] == [2, 1, 0]
    assert all(map(asked_once_each, [place] * 3, (first, second, third), (2, 2, 1)))


@pytest.mark.parametrize("content", [None, "", "Let me look."])
@pytest.mark.parametrize("way", WAYS)
async def test_a_conversation_from_elsewhere_goes_on(place: Running, way: str, content: str | None):
    calls = [call("weather", '{"city": "Rome"}', "call_1"), call("now", "", "call_2")]
    messages = [
        {"role": "user", "content": "How is Rome?"},
        {"role": "assistant", "content": content, "tool_calls": calls},
        {"role": "tool", "tool_call_id": "call_1", "content": "rain in Rome"},
        {"role": "tool", "tool_call_id": "call_2", "content": ""},
        {"role": "assistant", "content": SAID},
    ]
    agent = with_tools(place.agent())
    for _ in range(2):
        result = await ask(agent, way, SAY, messages=messages)
        assert (result.error, result.content) == (None, SAID)
    assert asked_once_each(place, result, 1)


@pytest.mark.parametrize("way", WAYS)
async def test_what_a_model_thought_goes_back_with_its_calls(place: Running, way: str):
    place.needs("thinking")
    result = await ask(with_tools(place.agent()), way, THINK)
    assert (result.error, result.content) == (None, SAID)
    assert result.messages[1]["reasoning_content"].strip() == "I have to look."
    if place.place.model == "claude":
        assert result.messages[1]["thinking_blocks"][0]["signature"] == "SIGNED"
    # llama.cpp refuses calls without it; and aimock tells what it got, in its own dialect.
    if place.place.server == "aimock" or place.place.model == "openai":
        sent = (await in_thread(place.journal))[-1]["messages"]
        assert [message.get("reasoning_content") for message in sent if "tool_calls" in message] == ["I have to look."]


@pytest.mark.parametrize("way", WAYS)
async def test_a_call_that_was_cut_spoils_nothing(place: Running, way: str):
    place.needs("cut call")
    result = await ask(with_tools(place.agent(max_tokens=4)), way, CUT_CALL, max_iterations=2)
    assert result.exception is None or not isinstance(result.exception, StatusError), result.error
    assert_continuable(result)
    after = await ask(place.agent(), way, SAY, messages=result.messages)
    assert (after.error, after.content) == (None, SAID)


@pytest.mark.parametrize("way", WAYS)
async def test_a_model_that_calls_no_tool_that_there_is_is_told_so(place: Running, way: str):
    place.needs("unknown tool")
    result = await ask(place.agent().add_tool(now), way, LOOK)
    assert (result.error, result.content, outcomes(result)) == (None, SAID, ["error"])


@pytest.mark.parametrize("way", WAYS)
async def test_a_last_answer_is_given_when_time_is_short(place: Running, way: str):
    place.needs("one")

    async def weather(city: str) -> str:
        """The weather of a city."""
        await anyio.sleep_forever()
        raise AssertionError

    agent = place.agent().add_tool(weather)
    result = await ask(agent, way, LOOK, timeout=32, limits=Limits(reserve=30))
    assert (result.error, result.content, result.stop_reason) == (None, SAID, "soft_deadline")
    assert outcomes(result) == ["timeout"]
    assert asked_once_each(place, result, 2)
    after = await ask(with_tools(place.agent()), way, LOOK, messages=result.messages)
    assert (after.error, after.content) == (None, SAID)


# ---- objects


@pytest.mark.parametrize("mode", get_args(OutputMode))
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("wire", HTTP)
async def test_an_object_is_answered(place: Running, wire: str, way: str, mode: OutputMode):
    place.needs(mode)
    agent = place.agent(wire, output_type=City, output_mode=mode)
    for _ in range(2):
        result = await ask(agent, way, CITY)
        assert (result.error, result.content) == (None, City(city="Rome", rains=True))
    assert asked_once_each(place, result, 1)


@pytest.mark.parametrize("mode", get_args(OutputMode))
async def test_an_object_is_answered_beside_tools(place: Running, mode: OutputMode):
    place.needs(mode)
    place.needs("object beside tools")
    agent = with_tools(place.agent(output_type=City, output_mode=mode))
    result = await agent.run(CITY)
    assert (result.error, result.content) == (None, City(city="Rome", rains=True))


# ---- refusals


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("wire", HTTP)
async def test_a_wrong_key_is_told_at_once(place: Running, wire: str, way: str):
    place.needs("key")
    result = await ask(place.agent(wire, key="sk-this-is-a-wrong-key"), way, SAY)
    assert isinstance(result.exception, AuthenticationFailed), result.error
    assert (result.exception.status, result.usage.requests) == (401, 1)
    assert "wrong-key" not in str(result.exception)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("wire", HTTP)
async def test_an_unknown_model_is_told(place: Running, wire: str, way: str):
    place.needs("model")
    result = await ask(place.agent(wire, model="no-such-model"), way, SAY)
    assert isinstance(result.exception, StatusError)
    assert "no-such-model" in str(result.exception)
    assert result.usage.requests <= (1 if way == "run" else 2)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("wire", HTTP)
async def test_a_prompt_that_is_too_long_is_told(place: Running, wire: str, way: str):
    if way == "stream":
        place.needs("long prompt in a stream")
    result = await ask(place.agent(wire), way, LONG)
    assert isinstance(result.exception, StatusError), result.error
    assert (result.exception.status, result.exception.retryable) == (400, False)
    assert "long" in str(result.exception) or "context" in str(result.exception)
    assert result.usage.requests <= (1 if way == "run" else 2)
    after = await ask(place.agent(wire), way, SAY)
    assert after.content == SAID


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("wire", HTTP)
async def test_a_wait_that_the_server_asks_for_is_kept(place: Running, wire: str, way: str):
    place.needs("limit")
    result = await ask(place.agent(wire), way, SLOW_DOWN, timeout=1)
    assert isinstance(result.exception, DeadlineWouldPass), result.error
    assert (result.exception.wait, result.usage.requests) == (2, 1)
    assert isinstance(result.exception.__cause__, RateLimited)
    assert "Slow down." in str(result.exception.__cause__)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("wire", HTTP)
async def test_a_server_that_is_out_of_order_is_told(place: Running, wire: str, way: str):
    place.needs("break down")
    result = await ask(place.agent(wire), way, BREAK, max_retries=0)
    assert isinstance(result.exception, ServerError)
    assert (result.exception.status, result.exception.retryable, result.usage.requests) == (503, True, 1)
    assert "It is out of order." in str(result.exception)


@pytest.mark.parametrize("wire", HTTP)
async def test_half_a_stream_is_no_answer(place: Running, wire: str):
    place.needs("break down")
    shown = ""
    async with place.agent(wire).stream(HANG_UP, max_retries=0) as stream:
        async for text in stream.text():
            shown += text
    result = await stream.result()
    assert isinstance(result.exception, ModelError)
    assert (shown.startswith("Once upon"), result.usage.requests) == (True, 1)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("wire", HTTP)
async def test_what_a_filter_cuts_is_a_refusal(place: Running, wire: str, way: str):
    place.needs("filter")
    result = await ask(place.agent(wire), way, FILTER)
    assert (result.success, result.stop_reason) == (False, "refusal")


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("kind", [openai.AsyncAzureOpenAI, openai.AzureOpenAI])
async def test_azure_clients_find_their_deployment(place: Running, kind: Any, way: str):
    place.needs("azure")
    client = kind(azure_endpoint=place.server.url, api_key=KEY, api_version="2024-10-21")
    agent = with_tools(BaseAgent("Helper", "You help.", place.place.model, client))
    result = await ask(agent, way, LOOK)
    assert (result.error, result.content, result.usage.requests) == (None, SAID, 2)


# ---- many, and those that end early


@pytest.mark.parametrize("wire", HTTP)
async def test_many_runs_go_side_by_side(place: Running, wire: str):
    place.needs("several")
    results = await run_many(with_tools(place.agent(wire)), [BOTH, LOOK] * 8, max_concurrency=8)
    assert [result.error for result in results] == [None] * 16
    assert [result.content for result in results] == [SAID] * 16
    assert all(asked_once_each(place, result, 2) for result in results)


@pytest.mark.parametrize("wire", HTTP)
async def test_a_stream_that_is_left_hangs_up(place: Running, wire: str):
    place.needs("story")
    agent = place.agent(wire)
    async with hanging_up(place), agent.stream(STORY) as stream:
        async for text in stream.text():
            assert text
            break
    assert (await stream.result()).stop_reason == "cancelled"
    assert (await agent.run(SAY)).content == SAID


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("wire", HTTP)
async def test_a_run_that_is_cut_hangs_up(place: Running, wire: str, way: str):
    place.needs("story")
    if way == "run":
        place.needs("slow answer")
    async with hanging_up(place):
        result = await ask(place.agent(wire), way, STORY, timeout=0.15)
    assert result.stop_reason == "deadline"


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("wire", HTTP)
async def test_a_cancelled_run_can_be_continued(place: Running, wire: str, way: str):
    place.needs("several")
    finished: list[RunFinished] = []
    agent = place.agent(wire, observers=[lambda e: finished.append(e) if isinstance(e, RunFinished) else None])
    was_called = anyio.Event()

    async def weather(city: str) -> str:
        """The weather of a city."""
        if city == "Paris":
            was_called.set()
            await anyio.sleep_forever()
        return f"rain in {city}"

    agent.add_tool(weather)
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(ask, agent, way, BOTH)
        await was_called.wait()
        tasks.cancel_scope.cancel()
    [event] = finished
    assert (event.result.stop_reason, outcomes(event.result)) == ("cancelled", ["ok", "cancelled"])
    after = await ask(agent, way, SAY, messages=event.result.messages)
    assert (after.error, after.content) == (None, SAID)


# ---- blocking


@pytest.mark.parametrize("wire", HTTP)
def test_blocking_callers_get_the_same(place: Running, wire: str, backend: str):
    place.needs("several")
    agent, plain = with_tools(place.agent(wire)), place.agent(wire)
    with sync.portal(backend=backend):
        assert sync.run(agent, BOTH).content == SAID
        assert [result.content for result in sync.run_many(agent, [LOOK, NOW], max_concurrency=2)] == [SAID] * 2
        with sync.stream(plain, SAY) as stream:
            assert "".join(stream.text()) == SAID
        answer = sync.run(place.agent(wire, output_type=City), CITY)
        assert answer.content == City(city="Rome", rains=True)
        with sync.stream(plain, STORY) as stream:
            next(iter(stream.text()))
        assert sync.run(plain, SAY).content == SAID


# ---- what the server sees


@asynccontextmanager
async def hanging_up(place: Running) -> AsyncIterator[None]:
    """See that the block leaves no connection open, and does not wait for the end of a story."""
    if not sys.platform.startswith("linux"):
        pytest.skip("the open connections of a server are read from /proc/net/tcp")
    port = int(place.server.url.rpartition(":")[2])
    assert open_connections(port) == 0
    start = time.monotonic()
    yield
    await in_thread(wait_until, lambda: open_connections(port) == 0)
    assert time.monotonic() - start < 9  # the story has ten seconds, where it is told slowly


def wait_until(is_so: Callable[[], bool], seconds: float = 30) -> None:
    give_up = time.monotonic() + seconds
    while not is_so():
        assert time.monotonic() < give_up
        time.sleep(0.01)


def open_connections(port: int) -> int:
    """Connections to a port of this machine of which neither side has hung up, as the server has them."""
    lines = Path("/proc/net/tcp").read_text().splitlines()[1:]
    entries = [line.split() for line in lines]
    return sum(entry[1].endswith(f":{port:04X}") and entry[3] == "01" for entry in entries)


async def test_a_server_stops_writing_when_its_client_has_hung_up(place: Running):
    place.needs("slots")
    # Whole answers that others have given up are written to their end, as often as not.
    await in_thread(wait_until, lambda: not is_busy(place), 120)
    before = await in_thread(tokens_written, place)
    async with place.agent().stream(STORY) as stream:
        async for _ in stream.text():
            break
    await in_thread(wait_until, lambda: not is_busy(place))
    written = await in_thread(tokens_written, place) - before
    assert 0 < written < 3000  # the whole story has four thousand


def is_busy(place: Running) -> bool:
    return any(slot["is_processing"] for slot in told_by(place, "/slots").json())


def tokens_written(place: Running) -> float:
    lines = told_by(place, "/metrics").text.splitlines()
    return next(float(line.split()[-1]) for line in lines if line.startswith("llamacpp:tokens_predicted_total"))


def told_by(place: Running, path: str) -> httpx2.Response:
    return httpx2.get(f"{place.server.url}{path}", headers={"Authorization": f"Bearer {KEY}"}, timeout=30)
