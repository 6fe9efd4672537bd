"""Runs watched as they happen: what is told, in which order and pace, and how every way to leave ends the run."""

from __future__ import annotations

import asyncio
import contextvars
import gc
import itertools
import json
import logging
import os
import signal
import socket
import subprocess
import sys
import textwrap
import threading
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager, suppress
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import anyio
import anyio.lowlevel
import httpx2
import openai
import pytest
import uvicorn
from fastapi import FastAPI
from starlette.responses import StreamingResponse

from fractal import (
    AgentResult,
    BaseAgent,
    DeadlineExceeded,
    Event,
    InvalidArguments,
    InvalidMessages,
    Limits,
    ModelRequested,
    ReasoningDelta,
    RetryScheduled,
    RunContext,
    RunFinished,
    RunStarted,
    RunStream,
    TextDelta,
    ToolCallDelta,
    ToolFinished,
    ToolStarted,
    stream_many,
    sync,
    tool,
)
from fractal._concurrency import gates as _gates
from fractal._engine import ask as _ask
from fractal.events import DelegationStarted, ModelResponded
from fractal.model import Delta, ModelRequest, Reply, Sink, ToolCall
from fractal.models import OpenAIModel
from fractal.models._replies.reading import reply_of
from fractal.testing import Endpoint, ScriptedModel, answers
from fractal.testing.answers import AnswerLike
from fractal.testing.endpoint import RecordedRequest
from tests.streams import Watch, assert_well_formed, call_delta, delta, sse, sse_bytes, text_of
from tests.support import Talkative, assert_continuable, calls_then, in_thread, outcomes

StartEndpoint = Callable[..., Endpoint]
SENTENCE = "One two three four five six seven eight nine ten."


@pytest.fixture(autouse=True)
def _short_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_ask, "FIRST_BACK_OFF", 0.01)


@pytest.fixture(autouse=True, scope="module")
def _http_is_imported() -> None:
    """The first request of a process imports the HTTP library, which takes longer than many a deadline here."""
    with Endpoint("ok") as one:
        sync.run(BaseAgent("A", "a", client=OpenAIModel(base_url=one.url, api_key="sk-test")), "go").raise_for_error()


async def drained(stream: RunStream) -> list[Event]:
    async with stream:
        return [event async for event in stream]


# ---- an agent with everything: an async tool, a plain one, a delegate with a tool of its own


def family_model(request: RecordedRequest) -> AnswerLike:
    system, *_, last = request.body["messages"]
    if system["content"] == "expert":
        dig = answers.calls(answers.call("dig", {"where": "here"}), text="I dig. ")
        return dig if last["role"] == "user" else "Found it."
    if last["role"] == "user":
        asked = answers.call("delegate_to_expert", {"query": "where?"})
        return answers.calls(answers.call("note", {"what": "a"}), answers.call("look"), asked, text="Let me see. ")
    return "All is well."


class Family:
    def __init__(self) -> None:
        self.watch = Watch()
        self.completed: list[str] = []
        self.cleaned: list[str] = []
        self.slow: str | None = None  # the tool that takes five seconds
        self.began = anyio.Event()
        self.expert = BaseAgent("expert", "expert").add_tool(self.dig)
        self.boss = BaseAgent("boss", "boss", observers=[self.watch]).add_tool(self.note).add_tool(self.look)
        self.boss.register_delegate(self.expert)

    async def _work(self, name: str) -> str:
        try:
            if self.slow == name:
                self.began.set()
                await anyio.sleep(5)
        finally:
            self.cleaned.append(name)
        self.completed.append(name)
        return name

    async def note(self, what: str) -> str:
        return await self._work("note")

    def look(self) -> str:
        return "look"

    async def dig(self, where: str) -> str:
        return await self._work("dig")


@pytest.fixture
def family() -> Family:
    return Family()


async def test_events_are_typed_and_tell_the_run_in_order(endpoint: StartEndpoint) -> None:
    call = answers.call("double", {"n": 21}, id="c1")
    endpoint([answers.calls(call, text="Let me count. "), answers.text("It is 42.", usage=(30, 7))])
    agent = BaseAgent("A", "a")

    @agent.add_tool
    async def double(n: int) -> int:
        return 2 * n

    async with agent.stream("go") as stream:
        events = [event async for event in stream]
        run_id = stream.run_id

    assert_well_formed(events)
    assert {event.run_id for event in events} == {run_id}
    started, requested, *middle, responded, finished = events
    assert isinstance(started, RunStarted)
    assert (started.message, started.call_id) == ({"role": "user", "content": "go"}, None)
    assert isinstance(requested, ModelRequested)
    assert (requested.iteration, requested.attempt, requested.message_count) == (1, 1, 1)
    assert [event.kind for event in middle] == [
        *["text_delta"] * 3,
        *["tool_call_delta"] * 3,
        "model_responded",
        "tool_started",
        "tool_finished",
        "model_requested",
        *["text_delta"] * 3,
    ]
    assert isinstance(responded, ModelResponded)
    assert (responded.finish_reason, responded.input_tokens, responded.output_tokens) == ("stop", 30, 7)
    assert isinstance(finished, RunFinished)
    assert finished.result is await stream.result()
    assert finished.result.content == "It is 42."
    assert finished.result.usage.input_tokens == 40
    tool_started, tool_finished = middle[7:9]
    assert isinstance(tool_started, ToolStarted)
    assert (tool_started.call_id, tool_started.arguments) == ("c1", {"n": 21})
    assert isinstance(tool_finished, ToolFinished)
    assert (tool_finished.call_id, tool_finished.result.outcome, tool_finished.result.content) == ("c1", "ok", 42)


async def test_the_arguments_of_calls_come_in_pieces_that_join_to_the_whole(endpoint: StartEndpoint) -> None:
    calls = [answers.call("put", {"what": "a" * 9}, id="c1"), answers.call("put", {"what": "b"}, id="c2")]
    endpoint([calls, "done"])
    agent = BaseAgent("A", "a").add_tool(lambda what: what, name="put")

    events = await drained(agent.stream("go"))

    for index, call in enumerate(calls):
        pieces = [event for event in events if isinstance(event, ToolCallDelta) and event.index == index]
        assert "".join(piece.arguments for piece in pieces) == call.arguments
        assert {(piece.call_id, piece.tool_name) for piece in pieces} == {(call.id, "put")}
        assert len(pieces) > 1


async def test_reasoning_is_told_apart_from_text(endpoint: StartEndpoint) -> None:
    endpoint(answers.text("Yes.", message_extra={"reasoning_content": "hmm, "}))

    async with BaseAgent("A", "a").stream("go") as stream:
        events = [event async for event in stream]

    assert [event.text for event in events if isinstance(event, ReasoningDelta)] == ["hmm, "]
    assert text_of(events, "A") == "Yes."


async def test_events_of_delegates_are_nested_by_run_depth_and_call(family: Family, endpoint: StartEndpoint) -> None:
    endpoint(family_model)

    events = await drained(family.boss.stream("go"))

    assert_well_formed(events)
    assert events == family.watch
    boss, expert = (event for event in events if isinstance(event, RunStarted))
    assert (boss.depth, boss.parent_id, boss.call_id) == (0, None, None)
    [asked] = [event for event in events if isinstance(event, DelegationStarted)]
    assert (expert.depth, expert.parent_id, expert.call_id) == (1, boss.run_id, asked.call_id)
    assert (asked.run_id, asked.to_agent, asked.query) == (boss.run_id, "expert", "where?")
    assert text_of(events, "boss") == "Let me see. All is well."
    assert text_of(events, "expert") == "I dig. Found it."


async def test_text_is_the_runs_own_alone_and_joins_to_what_it_said(family: Family, endpoint: StartEndpoint) -> None:
    endpoint(family_model)

    async with family.boss.stream("go") as stream:
        pieces = [piece async for piece in stream.text()]
        result = await stream.result()

    said = [message["content"] for message in result.messages if message["role"] == "assistant"]
    assert "".join(pieces) == "".join(said) == "Let me see. All is well."
    assert result.content == said[-1]
    assert len(pieces) == 6


async def test_a_batch_of_events_is_what_waits_and_empty_at_the_end(family: Family, endpoint: StartEndpoint) -> None:
    endpoint(family_model)
    events: list[Event] = []

    async with family.boss.stream("go") as stream:
        while batch := await stream.take():
            events += batch
        assert await stream.take() == []

    assert events == family.watch


# ---- leaving, at any moment


When = Callable[[Event], Awaitable[bool]]
"""Whether to leave after this event."""


async def by_break(stream: RunStream, when: When) -> None:
    async with stream:
        async for event in stream:
            if await when(event):
                break


async def by_exception(stream: RunStream, when: When) -> None:
    with suppress(ZeroDivisionError):
        async with stream:
            async for event in stream:
                if await when(event):
                    raise ZeroDivisionError


async def by_cancelled_scope(stream: RunStream, when: When) -> None:
    with anyio.CancelScope() as scope:
        async with stream:
            async for event in stream:
                if await when(event):
                    scope.cancel()


async def by_two_task_cancels(stream: RunStream, when: When) -> None:
    reached = asyncio.Event()

    async def read() -> None:
        async with stream:
            async for event in stream:
                if await when(event):
                    reached.set()
                    await asyncio.sleep(30)
        reached.set()

    task = asyncio.ensure_future(read())
    await reached.wait()
    task.cancel()
    await asyncio.sleep(0)
    task.cancel()
    with suppress(asyncio.CancelledError):
        await task


Leave = Callable[[RunStream, When], Awaitable[None]]


@pytest.fixture(params=[by_break, by_exception, by_cancelled_scope, by_two_task_cancels])
def leave(request: pytest.FixtureRequest, anyio_backend: tuple[str, object]) -> Leave:
    if request.param is by_two_task_cancels and anyio_backend[0] != "asyncio":
        pytest.skip("asyncio's own")
    return request.param


class After:
    """Leave after so many events; counts them, and knows when that was."""

    def __init__(self, events: int) -> None:
        self.events, self.seen = events, 0
        self.at = 0.0

    async def __call__(self, event: Event) -> bool:
        self.seen += 1
        if self.seen == self.events:
            self.at = time.monotonic()
        return self.seen == self.events


@pytest.mark.parametrize("buffer", [0, 64])
async def test_left_after_any_event_the_run_has_ended_well_formed_and_says_so(
    leave: Leave, buffer: int, family: Family, endpoint: StartEndpoint
) -> None:
    one = endpoint(family_model)
    asked = 0
    for events in itertools.count(1):
        family.watch.clear()
        stream = family.boss.stream("go", buffer=buffer)
        when = After(events)
        with anyio.fail_after(10):
            await leave(stream, when)
            told = list(family.watch)
            result = await stream.result()
        assert family.watch == told
        assert_well_formed(family.watch)
        assert family.watch.results("boss") == [result]
        assert_continuable(result)
        asked += family.watch.kinds.count("model_requested")
        assert len(one.requests) <= asked  # each is told before it is sent, and nothing is told after the end
        if buffer == 0 and leave in (by_break, by_exception):  # the others need a moment to be noticed
            assert result.success == (when.seen == len(family.watch))
        if when.seen < events:
            assert result.stop_reason == "finished"
            break
    assert events > 30


@pytest.mark.parametrize("slow", ["note", "dig"])
async def test_left_while_a_tool_sleeps_the_tool_never_completes_and_nothing_more_is_asked(
    slow: str, leave: Leave, family: Family, endpoint: StartEndpoint
) -> None:
    one = endpoint(family_model)
    family.slow = slow

    async def when(event: Event) -> bool:
        if isinstance(event, ToolStarted) and event.tool_name == slow:
            await family.began.wait()
        return family.began.is_set()

    stream = family.boss.stream("go")
    with anyio.fail_after(2):
        await leave(stream, when)
    told = list(family.watch)
    assert family.cleaned.count(slow) == 1
    assert slow not in family.completed
    result = await stream.result()
    assert result.stop_reason == "cancelled"
    assert_well_formed(family.watch)
    assert family.watch == told
    assert len(one.requests) <= family.watch.kinds.count("model_requested")


async def test_left_after_the_first_event_no_tool_is_called_and_nothing_more_is_asked(
    leave: Leave, family: Family, endpoint: StartEndpoint
) -> None:
    one = endpoint(family_model)
    family.slow = "note"
    stream = family.boss.stream("go")
    await leave(stream, After(1))
    told = list(family.watch)
    assert (family.completed, family.cleaned) == ([], [])
    assert (await stream.result()).stop_reason == "cancelled"
    assert family.watch == told
    assert len(one.requests) <= family.watch.kinds.count("model_requested") <= 1


async def test_a_tool_that_has_been_told_but_not_begun_is_not_called_after_the_break() -> None:
    called: list[str] = []

    async def pay() -> None:
        called.append("pay")

    for name in ("pay", "pay_in_thread"):
        agent = BaseAgent("A", "a", client=ScriptedModel([answers.call(name)]))
        agent.add_tool(pay).add_tool(lambda: called.append("thread"), name="pay_in_thread")
        async with agent.stream("go", buffer=0) as stream:
            async for event in stream:
                if isinstance(event, ToolStarted):
                    break
        assert called == []
        assert outcomes(await stream.result()) == ["skipped"]


async def test_left_in_the_moment_in_which_the_model_asks_for_a_tool_the_tool_is_not_called() -> None:
    called: list[str] = []
    go_on = anyio.Event()

    class Waiting:
        async def respond(self, request: ModelRequest) -> Reply:
            raise AssertionError("it can stream")

        async def stream(self, request: ModelRequest, sink: Sink) -> Reply:
            await sink(Delta("text", "Let me pay."))
            await go_on.wait()
            return Reply(tool_calls=(ToolCall("c1", "pay", "{}"),), finish_reason="tool_calls")

    async def pay() -> None:
        called.append("pay")

    async with BaseAgent("A", "a", client=Waiting()).add_tool(pay).stream("go") as stream:
        async for _ in stream.text():
            await settled()
            go_on.set()
            break
    assert called == []
    assert (await stream.result()).stop_reason == "cancelled"


async def test_entered_and_left_at_once_nothing_is_asked(endpoint: StartEndpoint) -> None:
    one = endpoint("never")
    watch = Watch()
    async with BaseAgent("A", "a", observers=[watch]).stream("go") as stream:
        pass
    result = await stream.result()
    assert (result.stop_reason, result.usage.requests, len(one.requests)) == ("cancelled", 0, 0)
    assert watch.kinds == ["run_started", "run_finished"]


class Tidy(BaseAgent):
    """A tool that needs a moment to clean up."""

    def __init__(self, **options: Any) -> None:
        super().__init__("Tidy", "tidy", **options)
        self.began = anyio.Event()
        self.cleaned_up = False

    @tool
    async def work(self) -> None:
        try:
            self.began.set()
            await anyio.sleep(5)
        finally:
            with anyio.CancelScope(shield=True):
                await anyio.sleep(0.1)
            self.cleaned_up = True


async def test_an_exception_in_the_body_comes_out_as_it_is_after_the_cleanup(endpoint: StartEndpoint) -> None:
    endpoint(calls_then("never", answers.call("work")))
    agent = Tidy()
    mine = ValueError("mine")
    with pytest.raises(ValueError, match="mine") as caught:
        async with agent.stream("go") as stream:
            await agent.began.wait()
            raise mine
    assert caught.value is mine
    assert agent.cleaned_up
    assert outcomes(await stream.result()) == ["cancelled"]


async def test_an_exception_in_the_body_is_not_lost_when_its_scope_is_cancelled(endpoint: StartEndpoint) -> None:
    endpoint(calls_then("never", answers.call("work")))
    agent = Tidy()
    with pytest.raises(ValueError, match="mine"), anyio.CancelScope() as scope:
        async with agent.stream("go"):
            await agent.began.wait()
            scope.cancel()
            raise ValueError("mine")
    assert agent.cleaned_up


async def left_by_fail_after(agent: Tidy, stream: RunStream) -> None:
    with pytest.raises(TimeoutError), anyio.fail_after(0.2):
        async with stream:
            async for _ in stream:
                pass


async def left_by_a_scope(agent: Tidy, stream: RunStream) -> None:
    async def read() -> None:
        with anyio.CancelScope() as scope:
            scopes.append(scope)
            async with stream:
                async for _ in stream:
                    pass

    scopes: list[anyio.CancelScope] = []
    async with anyio.create_task_group() as group:
        group.start_soon(read)
        await agent.began.wait()
        scopes[0].cancel()


async def left_by_wait_for(agent: Tidy, stream: RunStream) -> None:
    with pytest.raises(TimeoutError):
        await asyncio.wait_for(drained(stream), 0.2)


async def left_by_task_cancels(agent: Tidy, stream: RunStream) -> None:
    task = asyncio.ensure_future(drained(stream))
    await agent.began.wait()
    task.cancel()
    for _ in range(3):
        await asyncio.sleep(0.01)
        task.cancel()  # again, while the first is being obeyed
    with pytest.raises(asyncio.CancelledError):
        await task


async def left_by_an_idle_consumer(agent: Tidy, stream: RunStream) -> None:
    with pytest.raises(TimeoutError), anyio.fail_after(0.2):
        async with stream:
            await anyio.sleep_forever()


@pytest.mark.parametrize(
    "leave_by",
    [left_by_fail_after, left_by_a_scope, left_by_wait_for, left_by_task_cancels, left_by_an_idle_consumer],
)
async def test_cancelled_from_outside_the_run_has_cleaned_up_when_the_block_is_left(
    leave_by: Callable[[Tidy, RunStream], Awaitable[None]],
    anyio_backend: tuple[str, object],
    endpoint: StartEndpoint,
) -> None:
    if leave_by in (left_by_wait_for, left_by_task_cancels) and anyio_backend[0] != "asyncio":
        pytest.skip("asyncio's own")
    one = endpoint(calls_then("never", answers.call("work")))
    watch = Watch()
    agent = Tidy(observers=[watch])
    stream = agent.stream("go")
    started = time.monotonic()
    await leave_by(agent, stream)
    assert time.monotonic() - started < 3
    assert agent.cleaned_up
    result = await stream.result()
    assert (result.stop_reason, outcomes(result), len(one.requests)) == ("cancelled", ["cancelled"], 1)
    assert_well_formed(watch)


async def test_the_runs_own_timeout_is_a_result_and_its_last_events_can_be_read(endpoint: StartEndpoint) -> None:
    endpoint(calls_then("never", answers.call("work")))
    agent = Tidy()
    async with agent.stream("go", timeout=0.3) as stream:
        events = [event async for event in stream]
        assert agent.cleaned_up
    result = await stream.result()
    assert (result.stop_reason, outcomes(result)) == ("deadline", ["timeout"])
    assert isinstance(result.exception, DeadlineExceeded)
    assert [event.kind for event in events][-4:] == ["tool_started", "tool_finished", "limit_hit", "run_finished"]


@pytest.mark.parametrize("buffer", [0, 3])
async def test_a_consumer_that_stops_reading_does_not_keep_the_run_beyond_its_deadline(
    buffer: int, endpoint: StartEndpoint
) -> None:
    one = endpoint(answers.text(SENTENCE, chunk_delay=0.01))
    watch = Watch()
    agent = BaseAgent("A", "a", observers=[watch])
    ended = anyio.Event()
    agent.observers = (watch, lambda event: ended.set() if event.kind == "run_finished" else None)
    with anyio.fail_after(5):
        async with agent.stream("go", timeout=0.2, buffer=buffer) as stream:
            started = time.monotonic()
            await ended.wait()
            assert time.monotonic() - started < 3
            await in_thread(one.wait_until_closed)
            left = [event async for event in stream]
    assert left == watch
    assert (await stream.result()).stop_reason == "deadline"


async def test_a_deadline_that_the_body_moves_on_moves_for_the_run_too(endpoint: StartEndpoint) -> None:
    endpoint(answers.text(SENTENCE, chunk_delay=0.05))
    with anyio.fail_after(0.5) as idle:
        async with BaseAgent("A", "a").stream("go") as stream:
            pieces: list[str] = []
            async for piece in stream.text():
                pieces.append(piece)
                idle.deadline = anyio.current_time() + 0.4
            result = await stream.result()
    assert (result.stop_reason, "".join(pieces)) == ("finished", SENTENCE)
    assert result.elapsed > 0.5


# ---- the connection


async def test_left_in_the_middle_of_text_the_endpoint_sees_the_client_go(
    leave: Leave, client: Any, endpoint: StartEndpoint
) -> None:
    one = endpoint(answers.text(SENTENCE, chunk_delay=0.02))
    agent = BaseAgent("A", "a", client=client())
    for streams in range(1, 4):
        stream, when = agent.stream("go", buffer=0), After(5)
        await leave(stream, when)
        await in_thread(one.wait_for_disconnects, streams)
        seconds = time.monotonic() - when.at
        assert (await stream.result()).stop_reason == "cancelled"
        assert len(one.requests) == streams
        if seconds < 0.2:  # a millisecond, where the machine has nothing else to do
            return
    pytest.fail(f"the endpoint saw it {seconds:.3f} s later, and not sooner the times before")


CLIENTS: dict[str, Callable[[], Any]] = {
    "own HTTP": lambda: None,
    "AsyncOpenAI": openai.AsyncOpenAI,
    "OpenAI": openai.OpenAI,
}


@pytest.fixture(params=CLIENTS)
def client(request: pytest.FixtureRequest) -> Callable[[], Any]:
    """The ways to an endpoint that stop at once; made when the endpoint is there."""
    return CLIENTS[request.param]


# ---- a plain generator around a stream, as web frameworks step and drop it


async def pieces_of(agent: BaseAgent, question: str = "go") -> AsyncIterator[str]:
    async with agent.stream(question) as stream:
        async for piece in stream.text():
            yield piece


def blocking_pieces_of(agent: BaseAgent, question: str = "go") -> Iterator[str]:
    with sync.stream(agent, question) as stream:
        yield from stream.text()


# trio reminds of the *user's* generator, and rightly so: it was not closed.
dropped_on_purpose = pytest.mark.filterwarnings(r"ignore:Async generator '[\w.]*pieces_of' was garb:ResourceWarning")


def assert_nothing_complained(caplog: pytest.LogCaptureFixture) -> None:
    assert [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING] == []
    for words in ("different task", "different Context", "Traceback", "never retrieved", "was destroyed"):
        assert words not in caplog.text


async def until(condition: Callable[[], bool]) -> None:
    with anyio.fail_after(5):
        while not condition():  # noqa: ASYNC110  (what is waited for has no event)
            await anyio.sleep(0.001)


async def drop_by_break(agent: BaseAgent) -> None:
    async for _ in pieces_of(agent):
        break


async def drop_in_a_cycle(agent: BaseAgent) -> None:
    generator = pieces_of(agent)
    cycle: dict[str, Any] = {"generator": generator}
    cycle["itself"] = cycle
    assert await generator.__anext__() == "One "
    del generator, cycle
    gc.collect()


async def drop_in_another_task(agent: BaseAgent) -> None:
    generators = [pieces_of(agent)]

    async def begin() -> None:
        assert await generators[0].__anext__() == "One "

    async def drop() -> None:
        assert await generators[0].__anext__() == "two "
        generators.clear()

    for step in (begin, drop):
        async with anyio.create_task_group() as group:
            group.start_soon(step)


async def close_under_a_deadline(agent: BaseAgent) -> None:
    generator = pieces_of(agent)
    assert await generator.__anext__() == "One "
    with anyio.fail_after(5):
        await generator.aclose()  # type: ignore[attr-defined]


async def close_in_another_task(agent: BaseAgent) -> None:
    generator = pieces_of(agent)
    assert await generator.__anext__() == "One "
    async with anyio.create_task_group() as group:
        group.start_soon(generator.aclose)  # type: ignore[attr-defined]


@dropped_on_purpose
@pytest.mark.parametrize(
    "drop",
    [drop_by_break, drop_in_a_cycle, drop_in_another_task, close_under_a_deadline, close_in_another_task],
)
async def test_a_generator_around_a_stream_may_be_dropped_or_closed_anywhere(
    drop: Callable[[BaseAgent], Awaitable[None]], endpoint: StartEndpoint, caplog: pytest.LogCaptureFixture
) -> None:
    one = endpoint(answers.text(SENTENCE, chunk_delay=0.02))
    watch = Watch()
    before = len(anyio.get_running_tasks())
    await drop(BaseAgent("A", "a", observers=[watch]))
    dropped = time.monotonic()
    await in_thread(one.wait_for_disconnects, 1)
    assert time.monotonic() - dropped < 3
    await until(lambda: len(anyio.get_running_tasks()) <= before)
    assert_well_formed(watch)
    [result] = watch.results("A")
    assert result.stop_reason == "cancelled"
    assert_nothing_complained(caplog)


@dropped_on_purpose
async def test_a_generator_dropped_while_a_tool_sleeps_ends_the_tool(
    endpoint: StartEndpoint, caplog: pytest.LogCaptureFixture
) -> None:
    one = endpoint([answers.calls(answers.call("work"), text="Let me work."), "never"])
    watch = Watch()
    agent = Tidy(observers=[watch])
    before = len(anyio.get_running_tasks())
    async for _ in pieces_of(agent):
        await agent.began.wait()
        break
    await until(lambda: len(anyio.get_running_tasks()) <= before)
    assert agent.cleaned_up
    assert_well_formed(watch)
    assert outcomes(watch.results("Tidy")[0]) == ["cancelled"]
    assert len(one.requests) == 1
    assert_nothing_complained(caplog)


@pytest.mark.parametrize("backend", ["asyncio", "trio"])
@dropped_on_purpose
def test_a_generator_that_is_left_open_when_the_event_loop_ends_is_no_trouble(
    backend: str, endpoint: StartEndpoint, caplog: pytest.LogCaptureFixture
) -> None:
    one = endpoint(answers.text(SENTENCE, chunk_delay=0.02))
    watch = Watch()
    kept: list[Any] = []

    async def main() -> None:
        generator = pieces_of(BaseAgent("A", "a", observers=[watch]))
        kept.append(generator)
        assert await generator.__anext__() == "One "

    anyio.run(main, backend=backend)
    one.wait_for_disconnects(1)
    assert_well_formed(watch)
    assert [result.stop_reason for result in watch.results("A")] == ["cancelled"]
    assert_nothing_complained(caplog)


class Served:
    """A web application whose responses are streams of an agent, served on the loopback interface."""

    def __init__(self, agent: BaseAgent, loop: str) -> None:
        app = FastAPI()

        @app.get("/awaiting")
        async def awaiting() -> StreamingResponse:
            return StreamingResponse(pieces_of(agent), media_type="text/plain")

        @app.get("/blocking")
        def blocking() -> StreamingResponse:
            return StreamingResponse(blocking_pieces_of(agent), media_type="text/plain")

        @app.get("/tasks")
        async def tasks() -> int:
            return len(asyncio.all_tasks())

        # No websockets: some versions warn of what they use of other people's.
        options = {"log_config": None, "loop": loop, "timeout_graceful_shutdown": 5, "lifespan": "off", "ws": "none"}
        config = uvicorn.Config(app, host="127.0.0.1", port=0, **options)
        self._server = uvicorn.Server(config)
        self._thread = threading.Thread(target=self._server.run, name="server")

    def __enter__(self) -> Served:
        self._thread.start()
        give_up = time.monotonic() + 10
        while not self._server.started:
            assert self._thread.is_alive()
            assert time.monotonic() < give_up
            time.sleep(0.005)
        self.port: int = self._server.servers[0].sockets[0].getsockname()[1]
        return self

    def __exit__(self, *exc: object) -> None:
        self._server.should_exit = True
        self._thread.join(15)
        assert not self._thread.is_alive()

    @contextmanager
    def reading(self, path: str) -> Iterator[Any]:
        """A client that has sent its request and reads; it goes away at the end of the block."""
        with socket.create_connection(("127.0.0.1", self.port), 10) as connection:
            connection.sendall(f"GET {path} HTTP/1.1\r\nHost: here\r\n\r\n".encode())
            with connection.makefile("rb") as lines:
                yield lines

    def tasks(self) -> int:
        """Tasks of the server's event loop when it is asked for them."""
        return int(httpx2.get(f"http://127.0.0.1:{self.port}/tasks", trust_env=False).text)


@pytest.fixture(params=["asyncio", pytest.param("uvloop", marks=pytest.mark.slow)])
def served_on(request: pytest.FixtureRequest) -> str:
    if request.param == "uvloop":
        pytest.importorskip("uvloop")
    return request.param


def read_until(lines: Any, word: bytes) -> None:
    while word not in (line := lines.readline()):
        assert line, "the response ended first"


@pytest.mark.parametrize("path", ["/awaiting", "/blocking"])
def test_a_web_client_that_goes_away_in_the_middle_of_text_ends_the_run(
    path: str, served_on: str, endpoint: StartEndpoint, caplog: pytest.LogCaptureFixture, capfd: Any
) -> None:
    one = endpoint(answers.text(" ".join([SENTENCE] * 10), chunk_delay=0.03))
    watch = Watch()
    with Served(BaseAgent("A", "a", observers=[watch]), served_on) as served:
        idle = served.tasks()
        for clients in range(1, 4):
            with served.reading(path) as lines:
                read_until(lines, b"two")
            left = time.monotonic()
            if path == "/blocking":  # the framework drops plain generators without closing them
                wait_until(lambda clients=clients: gc.collect() >= 0 and one.disconnects == clients)
            one.wait_for_disconnects(clients)
            assert time.monotonic() - left < 3
        wait_until(lambda: len(watch.results("A")) == 3)
        wait_until(lambda: served.tasks() == idle)
    for result in watch.results("A"):
        assert result.stop_reason == "cancelled"
        assert_well_formed([event for event in watch if event.run_id == result.run_id])
    assert_nothing_complained(caplog)
    assert capfd.readouterr().err == ""


def test_a_web_client_that_goes_away_while_a_tool_sleeps_ends_the_tool(
    served_on: str, endpoint: StartEndpoint, caplog: pytest.LogCaptureFixture, capfd: Any
) -> None:
    one = endpoint([answers.calls(answers.call("work"), text="Let me work."), "never"])
    watch = Watch()
    began, cleaned_up = threading.Event(), threading.Event()
    agent = BaseAgent("A", "a", observers=[watch])

    @agent.add_tool
    async def work() -> None:
        try:
            began.set()
            await anyio.sleep(10)
        finally:
            cleaned_up.set()

    with Served(agent, served_on) as served:
        idle = served.tasks()
        with served.reading("/awaiting") as lines:
            read_until(lines, b"work.")
            assert began.wait(5)
        assert cleaned_up.wait(1)
        wait_until(lambda: served.tasks() == idle)
    assert_well_formed(watch)
    assert (outcomes(watch.results("A")[0]), len(one.requests)) == (["cancelled"], 1)
    assert_nothing_complained(caplog)
    assert capfd.readouterr().err == ""


@pytest.mark.parametrize("path", ["/awaiting", "/blocking"])
def test_a_web_client_that_stays_gets_all_of_the_text(path: str, served_on: str, endpoint: StartEndpoint) -> None:
    endpoint(answers.text(SENTENCE))
    with Served(BaseAgent("A", "a"), served_on) as served:
        assert httpx2.get(f"http://127.0.0.1:{served.port}{path}", trust_env=False).text == SENTENCE


def wait_until(condition: Callable[[], bool]) -> None:
    give_up = time.monotonic() + 5
    while not condition():
        assert time.monotonic() < give_up
        time.sleep(0.005)


SERVER = """
import sys, uvicorn
from fastapi import FastAPI
from fastapi.responses import StreamingResponse
from fractal import BaseAgent

app, agent = FastAPI(), BaseAgent("A", "a")

async def gen():
    async with agent.stream("go") as stream:
        async for piece in stream.text():
            yield piece

@app.get("/")
async def get():
    return StreamingResponse(gen(), media_type="text/plain")

uvicorn.run(app, host="127.0.0.1", port=int(sys.argv[1]), loop=sys.argv[2], access_log=False)
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform == "win32", reason="needs SIGINT")
def test_a_server_whose_clients_leave_has_nothing_to_say_on_standard_error(
    served_on: str, endpoint: StartEndpoint, tmp_path: Any
) -> None:
    one = endpoint(answers.text(SENTENCE, chunk_delay=0.02))
    program = tmp_path / "server.py"
    program.write_text(textwrap.dedent(SERVER))
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    with subprocess.Popen(
        [sys.executable, "-W", "error", "-X", "dev", program, str(port), served_on],
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)},
    ) as process:
        assert process.stderr is not None
        head = ""
        while "running on" not in head:
            head += process.stderr.readline()
            assert process.poll() is None, head
        for clients in range(1, 6):
            with socket.create_connection(("127.0.0.1", port), 10) as connection:
                connection.sendall(b"GET / HTTP/1.1\r\nHost: here\r\n\r\n")
                with connection.makefile("rb") as lines:
                    read_until(lines, b"two")
            one.wait_for_disconnects(clients)
        process.send_signal(signal.SIGINT)
        _, tail = process.communicate(timeout=20)
    assert [line.split(":")[0] for line in tail.splitlines()] == ["INFO"] * 4, tail


# ---- pace


async def settled() -> None:
    """Let everything happen that needs neither time nor the wire."""
    for _ in range(50):
        await anyio.lowlevel.checkpoint()


class Wordy:
    """A model that streams words as fast as they are taken."""

    def __init__(self, words: int) -> None:
        self.words = words

    async def respond(self, request: ModelRequest) -> Reply:
        raise AssertionError("it can stream")

    async def stream(self, request: ModelRequest, sink: Sink) -> Reply:
        for number in range(self.words):
            await sink(Delta("text", f"{number} "))
        return Reply(text="".join(f"{number} " for number in range(self.words)), finish_reason="stop")


def busy_agent(watch: Watch) -> BaseAgent:
    expert = BaseAgent("expert", "e", client=Wordy(3))
    calls = [answers.call("work", {"n": n}) for n in range(4)]
    asked = [answers.call("delegate_to_expert", {"query": "?"}) for _ in range(3)]
    agent = BaseAgent("A", "a", client=ScriptedModel([[*calls, *asked, *calls], "done"]), observers=[watch])

    @agent.add_tool
    async def work(n: int) -> int:
        await anyio.lowlevel.checkpoint()
        return n

    return agent.register_delegate(expert)


def wordy_agent(watch: Watch) -> BaseAgent:
    return BaseAgent("A", "a", client=Wordy(40), observers=[watch])


@pytest.mark.parametrize("buffer", [0, 1, 5])
@pytest.mark.parametrize("build", [busy_agent, wordy_agent])
async def test_the_run_is_never_more_than_its_buffer_and_one_event_ahead_of_its_reader(
    build: Callable[[Watch], BaseAgent], buffer: int
) -> None:
    watch = Watch()
    assert (await drained(build(watch).stream("go"))) == watch
    total = len(watch)
    assert total > 40

    watch.clear()
    async with build(watch).stream("go", buffer=buffer) as stream:
        for seen in range(total + 1):
            await settled()
            assert len(watch) == min(seen + buffer + 1, total)
            if seen < total:
                await stream.__anext__()
    assert_well_formed(watch)


async def test_a_long_answer_that_nobody_reads_stays_at_the_endpoint(
    client: Callable[[], Any], endpoint: StartEndpoint
) -> None:
    chunk = {"choices": [{"index": 0, "delta": {"content": "x" * 8000}}]}
    long = sse(*[chunk] * 4000)  # 32 MB, more than the sockets of both sides hold
    one = endpoint(long)
    async with BaseAgent("A", "a", client=client()).stream("go", buffer=2) as stream:
        await in_thread(one.wait_for_requests, 1)
        pieces = stream.text()
        assert len(await pieces.__anext__()) == 8000
        await anyio.sleep(0.5)
        assert one.in_flight == 1
    await in_thread(one.wait_for_disconnects, 1)


# ---- what comes over the wire


async def text_and_result(agent: BaseAgent, **options: Any) -> tuple[str, AgentResult]:
    async with agent.stream("go", **options) as stream:
        text = "".join([piece async for piece in stream.text()])
    return text, await stream.result()


PASSING = {
    "429": answers.failure(429, "busy", retry_after=0.02),
    "503": answers.failure(503, "oops"),
    "502 and a page": answers.raw("<h1>Bad gateway</h1>", status=502),
    "closed without a byte": answers.nothing(),
    "cut before any text": replace(sse(*[delta(role="assistant")] * 4), wire="cut"),
    "an error object first": sse({"error": {"message": "overloaded", "code": 503}}, done=False),
    "a malformed chunk first": sse('data: {"choices": [', done=False),
    "no finish reason, no text": sse(delta(role="assistant")),
    "not an event at all": sse("event: nothing", done=False),
}


@pytest.mark.parametrize("name", PASSING)
async def test_before_the_first_piece_a_failure_is_tried_again_and_text_comes_once(
    name: str, client: Callable[[], Any], endpoint: StartEndpoint
) -> None:
    one = endpoint([PASSING[name], SENTENCE])
    async with BaseAgent("A", "a", client=client()).stream("go") as stream:
        events = [event async for event in stream]
    assert_well_formed(events)
    assert text_of(events, "A") == SENTENCE
    assert (await stream.result()).content == SENTENCE
    assert len(one.requests) == 2
    [retry] = [event for event in events if isinstance(event, RetryScheduled)]
    kinds = [event.kind for event in events]
    assert kinds[:4] == ["run_started", "model_requested", "retry_scheduled", "model_requested"]
    assert (retry.attempt, bool(retry.error)) == (1, True)


BROKEN = {
    "cut": answers.cut(answers.text("Half of it, and no more.")),
    "no finish reason": sse(delta("Half of it, "), done=False),
    "an error object": sse(delta("Half of it, "), {"error": {"message": "overloaded", "code": 503}}, done=False),
    "an error in words": sse(delta("Half of it, "), {"error": "overloaded"}, done=False),
    "a malformed chunk": sse(delta("Half of it, "), 'data: {"choices": [', delta(None, "stop")),
    "no JSON object": sse(delta("Half of it, "), "data: 7", delta(None, "stop")),
    "cut after reasoning": replace(sse(delta(reasoning_content="Half of it, "), *[delta()] * 9), wire="cut"),
    "cut in a tool call": replace(sse(call_delta(0, "c1", "work", "{"), *[delta()] * 9), wire="cut"),
}


@pytest.mark.parametrize("name", BROKEN)
async def test_after_the_first_piece_nothing_is_tried_again(
    name: str, client: Callable[[], Any], endpoint: StartEndpoint
) -> None:
    one = endpoint([BROKEN[name], "never"])
    watch = Watch()
    text, result = await text_and_result(BaseAgent("A", "a", client=client(), observers=[watch]))
    assert_well_formed(watch)
    assert text in ("", "Half of it, ", "Half of it, and ")
    assert (result.stop_reason, len(one.requests), result.usage.requests) == ("model_error", 1, 1)
    assert "retry_scheduled" not in watch.kinds
    assert_continuable(result)


FINAL = {
    "400": (answers.failure(400, "bad request"), "HTTP 400: bad request"),
    "401": (answers.failure(401, "who are you"), "HTTP 401: who are you"),
    "404": (answers.failure(404, "no such model"), "HTTP 404: no such model"),
    "422": (answers.failure(422, "odd"), "HTTP 422: odd"),
    "quota": (answers.failure(429, "pay", code="insufficient_quota"), "HTTP 429: pay"),
    "a page": (answers.raw("<html><h1>Hello</h1></html>"), "is the base URL right?"),
}


@pytest.mark.parametrize("name", FINAL)
async def test_a_streaming_request_that_is_refused_ends_the_run_with_what_the_endpoint_says(
    name: str, client: Callable[[], Any], endpoint: StartEndpoint
) -> None:
    answer, words = FINAL[name]
    one = endpoint(answer)
    text, result = await text_and_result(BaseAgent("A", "a", client=client()))
    # What may refuse the usage at the end of a stream is asked once more, without.
    requests = 2 if name in ("400", "404", "422") else 1
    assert (text, result.stop_reason, len(one.requests)) == ("", "model_error", requests)
    assert words in str(result.error)


async def test_an_endpoint_that_does_not_stream_gives_its_text_in_one_piece(
    client: Callable[[], Any], endpoint: StartEndpoint
) -> None:
    def whole(request: RecordedRequest) -> AnswerLike:
        body = answers.calls(answers.call("work", id="c1"), text="Let me work.")
        body = answers.text(SENTENCE) if request.body["messages"][-1]["role"] == "tool" else body
        return answers.raw(json.dumps(body.completion("m")), content_type="application/json; charset=utf-8")

    endpoint(whole)
    agent = BaseAgent("A", "a", client=client()).add_tool(lambda: "worked", name="work")
    async with agent.stream("go") as stream:
        pieces = [piece async for piece in stream.text()]
    result = await stream.result()
    assert (pieces, result.content, outcomes(result)) == (["Let me work.", SENTENCE], SENTENCE, ["ok"])
    assert result.usage.total_tokens == 30


QUIRKS = {
    "the name in every delta": [
        call_delta(0, "c1", "add", '{"a": '),
        call_delta(0, "c1", "add", "1, "),
        call_delta(0, "c1", "add", '"b": 2}'),
    ],
    "an empty name afterwards": [call_delta(0, "c1", "add", '{"a": 1, '), call_delta(0, "", "", '"b": 2}')],
    "no index": [call_delta(None, "c1", "add", '{"a": 1, '), call_delta(None, None, None, '"b": 2}')],
    "no index, the id each time": [call_delta(None, "c1", "add", '{"a": 1, '), call_delta(None, "c1", None, '"b": 2}')],
    "no id": [call_delta(0, None, "add", '{"a": 1, '), call_delta(0, None, None, '"b": 2}')],
    "all at once": [call_delta(0, "c1", "add", '{"a": 1, "b": 2}')],
}


@pytest.mark.parametrize("newline", ["\n", "\r\n"])
@pytest.mark.parametrize("name", QUIRKS)
async def test_calls_are_understood_however_an_endpoint_writes_them(
    name: str, newline: str, endpoint: StartEndpoint
) -> None:
    chunks = [delta("Let me add."), ": keep-alive", *QUIRKS[name], delta(None, "tool_calls")]
    one = endpoint([sse(*chunks, newline=newline), sse(delta("3"), delta(None, "stop"), newline=newline)])
    agent = BaseAgent("A", "a").add_tool(lambda a, b: a + b, name="add")
    events = await drained(agent.stream("go"))
    assert_well_formed(events)
    pieces = [event for event in events if isinstance(event, ToolCallDelta)]
    assert "".join(piece.arguments for piece in pieces) == '{"a": 1, "b": 2}'
    assert {(piece.index, piece.tool_name) for piece in pieces} == {(0, "add")}
    [started] = [event for event in events if isinstance(event, ToolStarted)]
    assert (started.tool_name, started.arguments) == ("add", {"a": 1, "b": 2})
    assert one.requests[1].body["messages"][-1] == {"role": "tool", "tool_call_id": started.call_id, "content": "3"}


@asynccontextmanager
async def speaking(*talk: bytes | float, times: int = 1) -> AsyncIterator[tuple[OpenAIModel, list[bytes]]]:
    """An endpoint that answers any request with these bytes, waits so long between them, and hangs up."""
    requests: list[bytes] = []

    async def answer(stream: anyio.abc.SocketStream) -> None:
        async with stream:
            with suppress(anyio.EndOfStream, anyio.BrokenResourceError):
                requests.append(await stream.receive())
                for part in talk:
                    await (anyio.sleep(part) if isinstance(part, float) else stream.send(part))

    async with await anyio.create_tcp_listener(local_host="127.0.0.1") as listener:
        port = listener.extra(anyio.abc.SocketAttribute.local_port)
        async with anyio.create_task_group() as group:
            group.start_soon(listener.serve, answer)
            yield OpenAIModel(base_url=f"http://127.0.0.1:{port}/v1", api_key="sk-test"), requests
            group.cancel_scope.cancel()


HEAD = b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\ntransfer-encoding: chunked\r\n\r\n"


def chunked(data: bytes) -> bytes:
    return b"%x\r\n%b\r\n" % (len(data), data)


async def test_a_stream_may_come_byte_by_byte() -> None:
    body = sse_bytes(delta("Grüß "), delta("Gott 👋"), delta(None, "stop"), "data: [DONE]", newline="\r\n")
    parts = [chunked(body[at : at + 1]) for at in range(len(body))]
    async with speaking(HEAD, *parts, chunked(b"")) as (model, requests):
        text, result = await text_and_result(BaseAgent("A", "a", client=model))
        await model.aclose()
    assert (text, result.content, len(requests)) == ("Grüß Gott 👋", "Grüß Gott 👋", 1)


async def test_a_connection_that_breaks_after_the_last_word_has_said_it_all() -> None:
    body = sse_bytes(delta(SENTENCE), delta(None, "stop"), "data: [DONE]")
    async with speaking(HEAD, chunked(body)) as (model, requests):
        text, result = await text_and_result(BaseAgent("A", "a", client=model))
        await model.aclose()
    assert (text, result.content, result.error, len(requests)) == (SENTENCE, SENTENCE, None, 1)


async def test_a_body_that_does_not_end_after_the_last_word_holds_nobody_up_for_long() -> None:
    body = sse_bytes(delta(SENTENCE), delta(None, "stop"), "data: [DONE]")
    started = time.monotonic()
    async with speaking(HEAD, chunked(body), 30.0) as (model, requests):
        text, result = await text_and_result(BaseAgent("A", "a", client=model))
        await model.aclose()
    assert (text, result.content, len(requests)) == (SENTENCE, SENTENCE, 1)
    assert time.monotonic() - started < 3


async def test_an_endpoint_that_never_says_done_may_end_its_body() -> None:
    body = sse_bytes(delta(SENTENCE), delta(None, "stop"))
    async with speaking(HEAD, chunked(body), chunked(b"")) as (model, _):
        text, result = await text_and_result(BaseAgent("A", "a", client=model))
        await model.aclose()
    assert (text, result.content, result.success) == (SENTENCE, SENTENCE, True)


# ---- usage


async def test_usage_is_asked_for_and_counted(client: Callable[[], Any], endpoint: StartEndpoint) -> None:
    one = endpoint(answers.text("Hi.", usage=(100, 20)))
    _, result = await text_and_result(BaseAgent("A", "a", client=client()))
    assert one.requests[0].body["stream"] is True
    assert one.requests[0].body["stream_options"] == {"include_usage": True}
    assert (result.usage.input_tokens, result.usage.output_tokens) == (100, 20)


def unknown_field(*, fastapi: bool) -> Callable[[RecordedRequest], AnswerLike]:
    """An endpoint that knows no `stream_options`."""
    detail = [{"type": "extra_forbidden", "loc": ["body", "stream_options"], "msg": "Extra inputs are not permitted"}]
    error = {"message": "Unrecognized request argument", "param": "stream_options.include_usage", "code": None}
    body = {"detail": detail} if fastapi else {"error": error}
    refused = answers.raw(json.dumps(body), status=422 if fastapi else 400, content_type="application/json")
    return lambda request: refused if "stream_options" in request.body else SENTENCE


@pytest.mark.parametrize("fastapi", [True, False])
async def test_an_endpoint_that_knows_no_usage_option_is_asked_without_it_and_remembered(
    fastapi: bool, client: Callable[[], Any], endpoint: StartEndpoint
) -> None:
    one = endpoint(unknown_field(fastapi=fastapi))
    watch = Watch()
    agent = BaseAgent("A", "a", client=client(), observers=[watch])
    text, result = await text_and_result(agent)
    assert_well_formed(watch)
    assert (text, result.usage.requests, len(one.requests)) == (SENTENCE, 2, 2)
    assert "stream_options" not in one.requests[1].body
    text, result = await text_and_result(agent)
    assert (text, result.usage.requests, len(one.requests)) == (SENTENCE, 1, 3)


async def test_asking_without_the_usage_option_keeps_to_the_budget(endpoint: StartEndpoint) -> None:
    one = endpoint(unknown_field(fastapi=True))
    text, result = await text_and_result(BaseAgent("A", "a", limits=Limits(max_requests=1)))
    assert (text, result.stop_reason, len(one.requests)) == ("", "model_error", 1)


# ---- every client


def _object(fields: dict[str, Any]) -> SimpleNamespace:
    return SimpleNamespace(**fields)


class Completions:
    """A double of `client.chat.completions` that adds and then says so."""

    def __init__(self, form: str) -> None:
        self.form = form
        self.closed = 0

    def chunks(self, parameters: dict[str, Any]) -> list[Any]:
        answer = answers.text(SENTENCE)
        if parameters["messages"][-1]["role"] != "tool":
            answer = answers.calls(answers.call("add", {"a": 1, "b": 2}), text="Let me add. ")
        if self.form == "whole":
            return [answer.completion("m")]
        chunks = answer.chunks("m", include_usage=True)
        if self.form == "pydantic":
            return [openai.types.chat.ChatCompletionChunk.model_validate(chunk) for chunk in chunks]
        if self.form == "objects":
            return [
                json.loads(json.dumps(chunk), object_hook=lambda named: SimpleNamespace(**named)) for chunk in chunks
            ]
        return chunks

    def generate(self, parameters: dict[str, Any]) -> Iterator[Any]:
        try:
            yield from self.chunks(parameters)
        finally:
            self.closed += 1

    async def agenerate(self, parameters: dict[str, Any]) -> AsyncIterator[Any]:
        try:
            for chunk in self.chunks(parameters):
                await anyio.lowlevel.checkpoint()
                yield chunk
        finally:
            self.closed += 1


def double(form: str, kind: str) -> Any:
    completions = Completions(form)

    async def create(**parameters: Any) -> Any:
        return completions.chunks(parameters)[0] if form == "whole" else completions.agenerate(parameters)

    def create_blocking(**parameters: Any) -> Any:
        return completions.chunks(parameters)[0] if form == "whole" else completions.generate(parameters)

    def create_list(**parameters: Any) -> Any:
        return completions.chunks(parameters)

    completions.create = {"async": create, "plain": create_blocking, "list": create_list}[kind]  # type: ignore[attr-defined]
    return SimpleNamespace(chat=SimpleNamespace(completions=completions))


class Plain:
    """A `Model` that cannot stream."""

    async def respond(self, request: ModelRequest) -> Reply:
        await anyio.lowlevel.checkpoint()
        answer = answers.text(SENTENCE)
        if request.transcript.messages[-1]["role"] != "tool":
            answer = answers.calls(answers.call("add", {"a": 1, "b": 2}), text="Let me add. ")
        return reply_of(answer.completion("m"))


ALL_CLIENTS: dict[str, Callable[[], Any]] = {
    **CLIENTS,
    "AsyncOpenAI with its own http_client": lambda: openai.AsyncOpenAI(http_client=httpx2.AsyncClient()),
    "OpenAI with its own http_client": lambda: openai.OpenAI(http_client=httpx2.Client()),
    **{
        f"a double, {kind}, {form}": lambda kind=kind, form=form: double(form, kind)
        for kind in ("async", "plain", "list")
        for form in ("dicts", "pydantic", "objects", "whole")
        if (kind, form) != ("list", "whole")
    },
    "a Model": Plain,
}


@asynccontextmanager
async def any_client(name: str) -> AsyncIterator[Any]:
    client = ALL_CLIENTS[name]()
    try:
        yield client
    finally:
        if "http_client" in name:
            closed = client.close()
            if closed is not None:
                await closed


def adding(request: RecordedRequest) -> AnswerLike:
    if request.body["messages"][-1]["role"] == "tool":
        return SENTENCE
    return answers.calls(answers.call("add", {"a": 1, "b": 2}), text="Let me add. ")


@pytest.mark.parametrize("name", ALL_CLIENTS)
async def test_every_client_streams_text_and_calls(name: str, endpoint: StartEndpoint) -> None:
    endpoint(adding)
    async with any_client(name) as client:
        agent = BaseAgent("A", "a", client=client).add_tool(lambda a, b: a + b, name="add")
        async with agent.stream("go", buffer=0) as stream:
            events = [event async for event in stream]
        result = await stream.result()
    assert_well_formed(events)
    assert text_of(events, "A") == "Let me add. " + SENTENCE
    assert (result.content, [call.content for call in result.tool_results]) == (SENTENCE, [3])
    assert result.usage.total_tokens == 30
    pieces = [event for event in events if isinstance(event, TextDelta)]
    is_whole = "whole" in name or name == "a Model"
    assert len(pieces) == (2 if is_whole else 13)
    assert bool([event for event in events if isinstance(event, ToolCallDelta)]) != is_whole


@pytest.mark.parametrize("leave_by", [by_break, by_cancelled_scope])
@pytest.mark.parametrize("name", ALL_CLIENTS)
async def test_every_client_may_be_left_after_any_event(name: str, leave_by: Leave, endpoint: StartEndpoint) -> None:
    endpoint(adding)
    async with any_client(name) as client:
        watch = Watch()
        agent = BaseAgent("A", "a", client=client, observers=[watch]).add_tool(lambda a, b: a + b, name="add")
        for events in range(1, 9):
            watch.clear()
            stream = agent.stream("go", buffer=0)
            await leave_by(stream, After(events))
            assert (await stream.result()).stop_reason == "cancelled"
            assert_well_formed(watch)
            told = len(watch)
            await settled()
            assert len(watch) == told, "nothing comes after the end"


@pytest.mark.parametrize("way", ["break", "timeout", "scope"])
async def test_a_blocking_client_of_the_users_own_is_left_at_once_and_hangs_up_with_the_next_bytes(
    way: str, endpoint: StartEndpoint
) -> None:
    # Everything comes in one piece of data, so that most of it is still to be told when the reader leaves.
    endpoint([sse(*(delta(f"{n} ") for n in range(200)), delta(None, "stop"))])
    watch = Watch()
    async with any_client("OpenAI with its own http_client") as client:
        agent = BaseAgent("A", "a", client=client, observers=[watch])
        timeout = 0.2 if way == "timeout" else None
        with anyio.move_on_after(0.2 if way == "scope" else 10):
            async with agent.stream("go", buffer=0, timeout=timeout) as stream:
                async for piece in stream.text():
                    if piece == "3 ":
                        if way == "break":
                            break
                        await stream.result() if way == "timeout" else await anyio.sleep(5)
        result = await stream.result()
        told = len(watch)
        await until(lambda: _gates.client_threads.held == 0)
        await settled()
    assert result.stop_reason == ("finished" if way == "timeout" else "cancelled")
    assert_well_formed(watch)
    assert len(watch) == told


@pytest.mark.parametrize("way", ["break", "timeout"])
async def test_a_blocking_double_that_is_stuck_is_left_and_does_not_hide_why(way: str) -> None:
    release = threading.Event()

    def create(**parameters: Any) -> Iterator[Any]:
        yield delta("One ")
        release.wait(5)
        yield delta("two", "stop")

    client = SimpleNamespace(chat=SimpleNamespace(completions=SimpleNamespace(create=create)))
    agent = BaseAgent("A", "a", client=client)
    try:
        async with agent.stream("go", timeout=0.2 if way == "timeout" else None) as stream:
            async for _ in stream.text():
                if way == "break":
                    await anyio.wait_all_tasks_blocked()
                    break
        result = await stream.result()
    finally:
        release.set()
    assert (result.stop_reason, result.elapsed < 3) == ("cancelled" if way == "break" else "deadline", True)


# ---- the time of a request


async def test_a_slow_reader_does_not_make_a_request_time_out(
    client: Callable[[], Any], endpoint: StartEndpoint
) -> None:
    one = endpoint(answers.text("One two three."))
    agent = BaseAgent("A", "a", client=client(), limits=Limits(request_timeout=0.2))
    pieces: list[str] = []
    async with agent.stream("go", buffer=0) as stream:
        async for piece in stream.text():
            pieces.append(piece)
            await anyio.sleep(0.25)
    result = await stream.result()
    assert (pieces, result.error, len(one.requests)) == (["One ", "two ", "three."], None, 1)


async def test_an_endpoint_that_says_nothing_makes_a_request_time_out(
    client: Callable[[], Any], endpoint: StartEndpoint
) -> None:
    one = endpoint([answers.hang(), SENTENCE])
    agent = BaseAgent("A", "a", client=client(), limits=Limits(request_timeout=0.2))
    text, result = await text_and_result(agent)
    assert (text, result.success, len(one.requests)) == (SENTENCE, True, 2)


async def test_an_endpoint_that_falls_silent_makes_a_request_time_out_and_is_not_asked_again() -> None:
    async with speaking(HEAD, chunked(sse_bytes(delta("One "))), 30.0) as (model, requests):
        agent = BaseAgent("A", "a", client=model, limits=Limits(request_timeout=0.2))
        text, result = await text_and_result(agent)
        await model.aclose()
    assert (text, result.stop_reason, type(result.exception).__name__) == ("One ", "model_error", "RequestTimedOut")
    assert (len(requests), result.elapsed < 3) == (1, True)


# ---- the result, and wrong use


async def test_the_result_is_there_inside_the_block_after_it_and_as_often_as_wanted(endpoint: StartEndpoint) -> None:
    one = endpoint(SENTENCE)
    async with BaseAgent("A", "a").stream("go", buffer=0) as stream:
        inside = await stream.result()  # nothing has been read
        assert inside.content == SENTENCE
        assert await stream.result() is inside
        assert [event async for event in stream] == []
    assert await stream.result() is inside
    assert await stream.result() is inside
    assert len(one.requests) == 1


async def test_the_result_after_a_break_inside_the_block_is_that_of_the_whole_run(endpoint: StartEndpoint) -> None:
    endpoint(SENTENCE)
    async with BaseAgent("A", "a").stream("go", buffer=0) as stream:
        async for _ in stream.text():
            break
        result = await stream.result()
    assert (result.content, result.stop_reason) == (SENTENCE, "finished")


async def test_the_result_after_the_block_says_how_far_a_run_came_that_was_left(endpoint: StartEndpoint) -> None:
    endpoint([answers.calls(answers.call("work", id="c1"), text="Let me work."), "never"])
    agent = Tidy()
    async with agent.stream("go") as stream:
        await agent.began.wait()
    result = await stream.result()
    assert (result.success, result.stop_reason, result.error) == (False, "cancelled", "the run was cancelled")
    assert [message["role"] for message in result.messages] == ["user", "assistant", "tool"]
    assert result.run_id == stream.run_id
    assert result.usage.requests == 1
    assert_continuable(result)


async def test_iterating_after_the_end_stops_at_once(endpoint: StartEndpoint) -> None:
    endpoint(SENTENCE)
    async with BaseAgent("A", "a").stream("go") as stream:
        assert len([event async for event in stream]) > 10
        assert [event async for event in stream] == []
        assert [piece async for piece in stream.text()] == []
        assert await stream.take() == []
    assert [event async for event in stream] == []
    left = BaseAgent("A", "a").stream("go")
    async with left:
        pass
    assert [event async for event in left] == []


async def test_waiting_for_the_result_can_be_cancelled_and_the_run_goes_on(endpoint: StartEndpoint) -> None:
    endpoint(answers.text(SENTENCE, chunk_delay=0.03))
    async with BaseAgent("A", "a").stream("go") as stream:
        with anyio.move_on_after(0.05) as scope:
            await stream.result()
        assert scope.cancelled_caught
        assert (await stream.result()).content == SENTENCE


async def test_a_piece_that_one_reader_gave_up_waiting_for_is_there_for_the_next(endpoint: StartEndpoint) -> None:
    endpoint(answers.text(SENTENCE, chunk_delay=0.03))
    pieces: list[str] = []
    waits = 0
    async with BaseAgent("A", "a").stream("go", buffer=0) as stream:
        text = stream.text()
        while True:
            with anyio.move_on_after(0.01) as scope:
                try:
                    pieces.append(await text.__anext__())
                except StopAsyncIteration:
                    break
            waits += scope.cancelled_caught
        result = await stream.result()
    assert ("".join(pieces), result.stop_reason) == (SENTENCE, "finished")
    assert waits > 5


async def test_a_stream_that_has_not_begun_says_how_to_begin_it() -> None:
    stream = BaseAgent("A", "a", client=ScriptedModel(["hi"])).stream("go")
    for use in (stream.__anext__, stream.take, stream.result, stream.text().__anext__, lambda: anext(stream)):
        with pytest.raises(InvalidArguments, match="async with"):
            await use()
    with pytest.raises(InvalidArguments, match="async with"):
        print(stream.run_id)  # noqa: T201
    await stream.aclose()  # nothing to close
    assert (await drained(stream))[-1].kind == "run_finished"


async def test_a_stream_is_entered_once() -> None:
    stream = BaseAgent("A", "a", client=ScriptedModel(["hi"])).stream("go")
    async with stream:
        with pytest.raises(InvalidArguments, match="entered once"):
            await stream.__aenter__()
        assert (await stream.result()).content == "hi"
    with pytest.raises(InvalidArguments, match="entered once"):
        await stream.__aenter__()


@pytest.mark.parametrize("buffer", [-1, 1.5, None, True, "many"])
async def test_a_buffer_that_is_no_number_is_refused_at_once(buffer: Any) -> None:
    with pytest.raises(InvalidArguments, match="buffer"):
        BaseAgent("A", "a").stream("go", buffer=buffer)


@pytest.mark.parametrize(
    ("options", "error", "words"),
    [
        ({"messages": [{"role": "tool", "content": "x"}]}, InvalidMessages, "tool"),
        ({"timeout": -1}, InvalidArguments, "timeout"),
        ({"max_retries": -1}, InvalidArguments, "max_retries"),
        ({"limits": 7}, InvalidArguments, "limits"),
    ],
    ids=str,
)
async def test_what_cannot_be_run_is_refused_when_the_block_is_entered(
    options: dict[str, Any], error: type[Exception], words: str, endpoint: StartEndpoint
) -> None:
    one = endpoint("never")
    watch = Watch()
    with pytest.raises(error, match=words):
        async with BaseAgent("A", "a", observers=[watch]).stream("go", **options):
            raise AssertionError("not reached")
    assert (watch, one.requests) == ([], [])


def unrunnable(watch: Watch) -> RunStream:
    """A run that finds out on its way that it cannot be carried out."""
    return BaseAgent("A", lambda: 7, client=ScriptedModel([]), observers=[watch]).stream("go")  # type: ignore[arg-type,return-value]


async def test_wrong_use_that_shows_on_the_way_comes_out_of_the_iteration_once() -> None:
    watch = Watch()
    async with unrunnable(watch) as stream:
        with pytest.raises(InvalidArguments, match="not text") as caught:
            async for _ in stream:
                pass
        assert [event async for event in stream] == []
        assert (await stream.result()).stop_reason == "error"
    assert caught.value.__context__ is None
    assert_well_formed(watch)


async def test_wrong_use_that_shows_on_the_way_comes_out_of_the_result_once() -> None:
    async with unrunnable(Watch()) as stream:
        with pytest.raises(InvalidArguments, match="not text"):
            await stream.result()
    assert (await stream.result()).stop_reason == "error"


async def test_wrong_use_that_shows_on_the_way_comes_out_of_the_block_if_nobody_was_told() -> None:
    with pytest.raises(InvalidArguments, match="not text"):
        async with unrunnable(Watch()) as stream:
            await anyio.wait_all_tasks_blocked()
    assert (await stream.result()).stop_reason == "error"


async def test_wrong_use_that_shows_on_the_way_does_not_hide_an_exception_of_the_body() -> None:
    with pytest.raises(ZeroDivisionError) as caught:
        async with unrunnable(Watch()):
            await anyio.wait_all_tasks_blocked()
            raise ZeroDivisionError
    assert "not text" in caught.value.__notes__[0]


async def test_a_tool_can_end_its_own_run_but_not_wait_for_it() -> None:
    streams: list[RunStream] = []

    async def stop() -> str:
        await streams[0].aclose()
        await anyio.sleep(5)
        return "not reached"

    async def ask() -> object:
        return await streams[0].result()

    agent = BaseAgent("A", "a", client=ScriptedModel([[answers.call("ask")], [answers.call("stop")]]))
    agent.add_tool(stop).add_tool(ask)
    with anyio.fail_after(2):
        async with agent.stream("go") as stream:
            streams.append(stream)
            async for _ in stream:
                pass
    result = await stream.result()
    assert (result.stop_reason, outcomes(result)) == ("cancelled", ["error", "cancelled"])
    assert "wait for its own end" in str(result.tool_results[0].error)


# ---- runs inside runs


class Parent(BaseAgent):
    """A tool that streams another agent."""

    def __init__(self, child: BaseAgent, **options: Any) -> None:
        super().__init__("parent", "parent", **options)
        self.child = child
        self.seen: list[Event] = []
        self.streams: list[RunStream] = []

    @tool
    async def ask(self) -> str:
        async with self.child.stream("?", buffer=0) as stream:
            self.streams.append(stream)
            async for event in stream:
                self.seen.append(event)
            return str((await stream.result()).content)


async def test_a_tool_that_streams_another_agent_shows_it_in_its_own_stream_too(endpoint: StartEndpoint) -> None:
    endpoint(lambda r: answers.call("ask") if len(r.body["messages"]) == 2 and is_of(r, "parent") else SENTENCE)
    agent = Parent(BaseAgent("child", "child"))
    async with agent.stream("go", buffer=0) as stream:
        events = [event async for event in stream]
    assert_well_formed(events)
    result = await stream.result()
    assert (result.content, result.tool_results[0].content, result.usage.requests) == (SENTENCE, SENTENCE, 3)
    assert [event for event in events if event.depth == 1] == agent.seen
    [tool_started] = [event for event in events if isinstance(event, ToolStarted)]
    child = agent.seen[0]
    assert isinstance(child, RunStarted)
    assert (child.parent_id, child.call_id) == (result.run_id, tool_started.call_id)


def is_of(request: RecordedRequest, agent_name: str) -> bool:
    return bool(request.body["messages"][0]["content"] == agent_name)


async def test_the_parents_deadline_reaches_a_streamed_child_and_its_tools(endpoint: StartEndpoint) -> None:
    one = endpoint(lambda r: answers.call("ask" if is_of(r, "parent") else "look"))
    left: list[float] = []
    watch = Watch()
    child = BaseAgent("child", "child")

    @child.add_tool
    async def look(ctx: RunContext) -> None:
        left.append(ctx.remaining())
        await anyio.sleep(5)

    agent = Parent(child, observers=[watch])
    started = time.monotonic()
    async with agent.stream("go", timeout=0.3) as stream:
        events = [event async for event in stream]
    assert time.monotonic() - started < 3
    assert 0 < left[0] < 0.3
    assert events == watch
    assert_well_formed(watch)
    assert [result.stop_reason for result in (*watch.results("child"), *watch.results("parent"))] == ["deadline"] * 2
    assert len(one.requests) == 2


async def test_a_streamed_child_shares_the_budget(endpoint: StartEndpoint) -> None:
    one = endpoint(lambda r: answers.call("ask") if is_of(r, "parent") else "done")
    text, result = await text_and_result(Parent(BaseAgent("child", "child")), limits=Limits(max_requests=2))
    assert (result.stop_reason, result.usage.requests, len(one.requests), text) == ("budget", 2, 2, "")


async def test_a_stream_that_a_tool_leaves_open_ends_with_its_run(endpoint: StartEndpoint) -> None:
    endpoint(
        lambda r: (
            answers.text(SENTENCE, chunk_delay=0.05)
            if is_of(r, "child")
            else "done"
            if r.body["messages"][-1]["role"] == "tool"
            else answers.call("leak")
        )
    )
    watch = Watch()
    child = BaseAgent("child", "child")
    agent = BaseAgent("parent", "parent", observers=[watch])
    kept: list[RunStream] = []

    @agent.add_tool
    async def leak() -> str:
        for _ in range(3):
            kept.append(child.stream("?"))
            await kept[-1].__aenter__()
        return "three streams are open"

    async with agent.stream("go") as stream:
        result = await stream.result()
    assert result.content == "done"
    assert_well_formed(watch)
    assert [(await each.result()).stop_reason for each in kept] == ["cancelled"] * 3


@pytest.mark.parametrize("order", [(0, 1), (1, 0)])
async def test_two_streams_in_one_task_may_be_read_in_turn_and_closed_in_any_order(
    order: tuple[int, int], endpoint: StartEndpoint
) -> None:
    one = endpoint(answers.text(SENTENCE, chunk_delay=0.01))
    watch = Watch()
    agent = BaseAgent("A", "a", observers=[watch])
    streams = [agent.stream("first", buffer=0), agent.stream("second", buffer=0)]
    for stream in streams:
        await stream.__aenter__()
    texts = [stream.text() for stream in streams]
    for _ in range(3):
        assert await texts[0].__anext__() == await texts[1].__anext__()
    for index in order:
        await streams[index].__aexit__(None, None, None)
        assert (await streams[index].result()).stop_reason == "cancelled"
    await in_thread(one.wait_for_disconnects, 2)
    for stream in streams:
        assert_well_formed([event for event in watch if event.run_id == stream.run_id])


async def test_context_variables_of_the_caller_reach_the_tools_and_come_not_back() -> None:
    variable = contextvars.ContextVar("variable", default="unset")
    agent = BaseAgent("A", "a", client=ScriptedModel([[answers.call("look"), answers.call("look_in_thread")], "done"]))

    async def look() -> str:
        value = variable.get()
        variable.set("the tool's")
        return value

    agent.add_tool(look).add_tool(lambda: variable.get(), name="look_in_thread")
    variable.set("mine")
    async with agent.stream("go") as stream:
        variable.set("changed later")
        result = await stream.result()
    assert [call.content for call in result.tool_results] == ["mine", "mine"]
    assert variable.get() == "changed later"


@pytest.mark.parametrize("other", ["asyncio", "trio"])
async def test_a_child_in_another_event_loop_is_seen_in_the_stream(other: str, endpoint: StartEndpoint) -> None:
    endpoint(lambda r: answers.call("ask") if is_of(r, "parent") and len(r.body["messages"]) == 2 else SENTENCE)
    child = BaseAgent("child", "child")
    agent = BaseAgent("parent", "parent")
    watch = Watch()
    agent.observers = (watch,)

    @agent.add_tool
    def ask() -> object:
        answer: list[AgentResult] = []
        context = contextvars.copy_context()
        thread = threading.Thread(
            target=lambda: answer.append(context.run(lambda: anyio.run(child.run, "?", backend=other)))
        )
        thread.start()
        thread.join()
        return answer[0].content

    async with agent.stream("go", buffer=0) as stream:
        events = [event async for event in stream]
    assert_well_formed(events)
    assert text_of(events, "child") == text_of(events, "parent") == SENTENCE
    assert [event.depth for event in events].count(1) == len([e for e in watch if e.agent_name == "child"])


async def test_many_streams_at_once_keep_apart(endpoint: StartEndpoint) -> None:
    endpoint(lambda request: f"{request.body['messages'][-1]['content']} {SENTENCE}")
    agent = BaseAgent("A", "a")
    texts: dict[int, str] = {}

    async def read(number: int) -> None:
        async with agent.stream(str(number), buffer=number % 3) as stream:
            texts[number] = "".join([piece async for piece in stream.text()])

    async with anyio.create_task_group() as group:
        for number in range(50):
            group.start_soon(read, number)
    assert texts == {number: f"{number} {SENTENCE}" for number in range(50)}


READING: dict[str, Callable[[Any], Awaitable[object]]] = {
    "an event": lambda stream: stream.__anext__(),
    "the result": lambda stream: stream.result(),
    "an item of a batch": lambda batch: batch.__anext__(),
}


@pytest.mark.parametrize("other", ["asyncio", "trio"])
@pytest.mark.parametrize("what", READING)
async def test_what_is_read_in_another_event_loop_is_refused_there_and_may_be_closed_from_there(
    what: str, other: str
) -> None:
    async def elsewhere(function: Callable[[], Awaitable[Any]]) -> Any:
        async def in_time() -> Any:
            with anyio.fail_after(5):
                return await function()

        return await in_thread(lambda: anyio.run(in_time, backend=other))

    agent = BaseAgent("A", "a", client=Talkative())
    stream = agent.stream("go", buffer=0)
    block: Any = stream_many(agent, ["a"]) if what == "an item of a batch" else stream
    async with block:
        with pytest.raises(InvalidArguments, match="was entered in another event loop: read it there"):
            await elsewhere(lambda: READING[what](block))
        if block is stream:
            assert isinstance(await stream.__anext__(), RunStarted)
        await elsewhere(block.aclose)
        assert "has ended" in repr(block)
    if block is stream:
        assert (await elsewhere(stream.result)).stop_reason == "cancelled"
