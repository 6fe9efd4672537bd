"""Observers that take part in a run: asked whether they want it, let into its calls, heard on headers, waited for."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from contextvars import ContextVar
from types import SimpleNamespace
from typing import Any

import anyio
import openai
import pytest

from fractal import BaseAgent, Event, InvalidArguments, ModelRequested, OpenAIModel, RunObserver, RunStarted, sync
from fractal._engine import observers as _observers
from fractal.testing import Endpoint, ScriptedModel, answers

StartEndpoint = Callable[..., Endpoint]

place: ContextVar[str] = ContextVar("place", default="outside")


class Companion(RunObserver):
    """Notes all that it is asked."""

    def __init__(self, wants: bool = True) -> None:
        self.wants = wants
        self.asked = 0
        self.events: list[Event] = []
        self.settled: list[str] = []

    def __call__(self, event: Event) -> None:
        self.events.append(event)

    def wants_run(self) -> bool:
        self.asked += 1
        return self.wants

    def enter_call(self, run_id: str, call_id: str) -> None:
        place.set(f"in {call_id}")

    def request_headers(self, run_id: str) -> Mapping[str, str]:
        return {"X-Run": run_id, "X-Events": str(len(self.events))}

    async def settle(self, run_id: str) -> None:
        await anyio.sleep(0.01)
        self.settled.append(run_id)


class Broken(RunObserver):
    """Fails at all that it is asked."""

    def __call__(self, event: Event) -> None:
        raise RuntimeError("no")

    def wants_run(self) -> bool:
        raise RuntimeError("no")

    def enter_call(self, run_id: str, call_id: str) -> None:
        raise RuntimeError("no")

    def request_headers(self, run_id: str) -> Mapping[str, str]:
        raise RuntimeError("no")

    async def settle(self, run_id: str) -> None:
        raise RuntimeError("no")


class BrokenLater(Broken):
    def wants_run(self) -> bool:
        return True


async def here() -> str:
    """Say where it runs."""
    return place.get()


def here_in_a_thread() -> str:
    """Say where it runs."""
    return place.get()


def two_calls() -> list[Any]:
    calls = answers.call("here", {}, id="a"), answers.call("here_in_a_thread", {}, id="b")
    return [answers.calls(*calls), "done"]


async def test_a_tool_runs_in_the_context_that_an_observer_has_prepared_and_nothing_else_does() -> None:
    agent = BaseAgent("A", "a", client=ScriptedModel(two_calls()), observers=[Companion()])
    result = await agent.add_tool(here).add_tool(here_in_a_thread).run("go")
    assert [call.content for call in result.tool_results] == ["in a", "in b"]
    assert place.get() == "outside"


async def test_a_run_that_no_observer_wants_has_no_events() -> None:
    uninterested = Companion(wants=False)
    below = BaseAgent("Below", "b", client=ScriptedModel(["deep"]))
    script = [answers.call("delegate_to_below", {"query": "?"}), "done"]
    agent = BaseAgent("A", "a", client=ScriptedModel(script), observers=[uninterested]).register_delegate(below)
    assert (await agent.run("go")).success
    assert (uninterested.asked, uninterested.events, uninterested.settled) == (1, [], [])


async def test_an_observer_of_a_delegate_that_the_caller_has_too_is_told_once() -> None:
    both = Companion()
    below = BaseAgent("Below", "b", client=ScriptedModel(["deep"]), observers=[both])
    script = [answers.call("delegate_to_below", {"query": "?"}), "done"]
    agent = BaseAgent("A", "a", client=ScriptedModel(script), observers=[both, both]).register_delegate(below)
    result = await agent.run("go")
    assert [event.agent_name for event in both.events if isinstance(event, RunStarted)] == ["A", "Below"]
    assert both.settled == [result.run_id]


async def test_before_a_run_returns_its_observers_have_finished() -> None:
    watch, other = Companion(), Companion()
    below = BaseAgent("Below", "b", client=ScriptedModel(["deep"]), observers=[other])
    script = [answers.call("delegate_to_below", {"query": "?"}), "done"]
    agent = BaseAgent("A", "a", client=ScriptedModel(script), observers=[watch]).register_delegate(below)
    result = await agent.run("go")
    assert watch.settled == [result.run_id]
    [inner] = other.settled
    assert inner != result.run_id


async def test_they_finish_after_a_cancelled_run_and_a_stream_that_is_left_too() -> None:
    watch = Companion()
    agent = BaseAgent("A", "a", client=ScriptedModel(lambda r: answers.hang()), observers=[watch])
    with anyio.move_on_after(0.05) as scope:
        await agent.run("go")
    assert scope.cancelled_caught
    assert len(watch.settled) == 1
    async with agent.stream("go") as stream:
        async for _ in stream:
            break
    assert len(watch.settled) == 2


def test_they_finish_in_the_facade_too() -> None:
    watch = Companion()
    result = sync.run(BaseAgent("A", "a", client=ScriptedModel(["hi"]), observers=[watch]), "go")
    assert watch.settled == [result.run_id]


@pytest.mark.parametrize("has_failed", [False, True])
async def test_one_that_has_finished_is_not_awaited(has_failed: bool) -> None:
    class Quick(Companion):
        def is_settled(self, run_id: str) -> bool:
            if has_failed:
                raise RuntimeError("no")
            return True

    watch = Quick()
    await BaseAgent("A", "a", client=ScriptedModel(["hi"]), observers=[watch]).run("go")
    assert bool(watch.settled) is has_failed


def test_one_that_finishes_nothing_is_settled_by_itself() -> None:
    class Plain(RunObserver):
        pass

    assert Plain().is_settled("run")
    assert not Companion().is_settled("run")


async def test_one_that_never_finishes_is_named_and_left(caplog: pytest.LogCaptureFixture) -> None:
    class Endless(RunObserver):
        async def settle(self, run_id: str) -> None:
            await anyio.sleep_forever()

    with anyio.fail_after(5):
        assert (await BaseAgent("A", "a", client=ScriptedModel(["hi"]), observers=[Endless()]).run("go")).success
    assert "has not finished 1 s after the run" in caplog.text


@pytest.mark.parametrize("kind", [Broken, BrokenLater])
async def test_what_they_raise_is_logged_and_never_passed_on(kind: type[Broken], caplog: Any) -> None:
    with caplog.at_level(logging.ERROR, "fractal"):
        agent = BaseAgent("A", "a", client=ScriptedModel(two_calls()), observers=[kind()])
        result = await agent.add_tool(here).add_tool(here_in_a_thread).run("go")
    assert [call.content for call in result.tool_results] == ["outside", "outside"]
    assert caplog.records


# ---- headers


CLIENTS: dict[str, Callable[[Endpoint], Any]] = {
    "own": lambda one: OpenAIModel(base_url=one.url, api_key="sk-test"),
    "AsyncOpenAI": lambda one: openai.AsyncOpenAI(base_url=one.url, api_key="sk-test"),
    "OpenAI": lambda one: openai.OpenAI(base_url=one.url, api_key="sk-test"),
}


@pytest.mark.parametrize("streamed", [False, True])
@pytest.mark.parametrize("client", CLIENTS)
async def test_a_request_gets_the_headers_its_observers_give(
    client: str, streamed: bool, endpoint: StartEndpoint
) -> None:
    one = endpoint("hi")
    watch = Companion()
    agent = BaseAgent("A", "a", client=CLIENTS[client](one), observers=[watch])
    async with agent:
        if streamed:
            async with agent.stream("go") as stream:
                result = await stream.result()
        else:
            result = await agent.run("go")
    [request] = one.requests
    assert request.headers["x-run"] == result.run_id
    assert request.headers["x-events"] == "2"  # asked for when the request had been told of
    assert request.headers["authorization"] == "Bearer sk-test"


@pytest.mark.parametrize("client", ["own", "AsyncOpenAI"])
async def test_requests_with_other_headers_share_a_connection(client: str, endpoint: StartEndpoint) -> None:
    one = endpoint(["one", "two", "three"])
    agent = BaseAgent("A", "a", client=CLIENTS[client](one), observers=[Companion()])
    async with agent:
        for _ in range(3):
            await agent.run("go")
    assert len({request.headers["x-run"] for request in one.requests}) == 3
    assert one.connections_opened == 1


@pytest.mark.parametrize(
    "headers",
    [
        {"Authorization": "Bearer other"},
        {"Content-Length": "0"},
        {"Transfer-Encoding": "chunked"},
        {"Host": "elsewhere"},
        {"X-Api-Key": "other"},
        {"Cookie": "a=b"},
        {"X-A": "1\r\nX-B: 2"},
        {"X-A\r\nX-B": "2"},
        {"X-A": "höher"},
        {"X-A": 1},
        {1: "x"},
        None,
        ["X-A"],
    ],
    ids=str,
)
@pytest.mark.parametrize("client", CLIENTS)
async def test_a_header_that_could_make_another_request_of_it_is_left_out(
    client: str, headers: Any, endpoint: StartEndpoint, caplog: Any
) -> None:
    class Odd(Companion):
        def request_headers(self, run_id: str) -> Any:
            return headers

    one = endpoint("hi")
    agent = BaseAgent("A", "a", client=CLIENTS[client](one), observers=[Odd()])
    async with agent:
        assert (await agent.run("go")).success
    [request] = one.requests
    assert request.headers["authorization"] == "Bearer sk-test"
    assert not {"x-a", "x-b", "x-api-key", "cookie"} & set(request.headers)
    assert "observer" in caplog.text


def test_methods_of_the_wrong_kind_are_refused_when_the_agent_is_made() -> None:
    class Blocking(RunObserver):
        def settle(self, run_id: str) -> Any:  # type: ignore[override]
            return None

    class Waiting(RunObserver):
        async def wants_run(self) -> bool:  # type: ignore[override]
            return True

    class Unsure(RunObserver):
        async def is_settled(self, run_id: str) -> bool:  # type: ignore[override]
            return True

    for observer in (Blocking(), Waiting(), Unsure()):
        with pytest.raises(InvalidArguments, match="has to be a"):
            BaseAgent("A", "a", observers=[observer])


async def test_a_double_gets_them_as_the_sdk_would() -> None:
    seen: list[Any] = []

    async def create(**parameters: Any) -> Any:
        seen.append(parameters)
        return answers.text("hi").completion("m")

    double = SimpleNamespace(chat=SimpleNamespace(completions=SimpleNamespace(create=create)))
    for observers in ([], [Companion()]):
        assert (await BaseAgent("A", "a", client=double, observers=observers).run("go")).success
    assert "extra_headers" not in seen[0]
    assert set(seen[1]["extra_headers"]) == {"X-Run", "X-Events"}


# ---- what events say of what a model sees


async def test_a_request_says_what_the_model_sees() -> None:
    watch = Companion()
    history = [{"role": "user", "content": "one"}, {"role": "assistant", "content": "two"}]
    agent = BaseAgent("A", "Be brief.", "m", ScriptedModel(two_calls()), observers=[watch])
    await agent.add_tool(here).add_tool(here_in_a_thread).run("three", messages=history)
    [started] = [event for event in watch.events if isinstance(event, RunStarted)]
    assert (started.limits.max_iterations, started.timeout) == (10, None) if started.limits else False
    assert started.history == history
    assert started.message == {"role": "user", "content": "three"}
    first, second = (event for event in watch.events if isinstance(event, ModelRequested))
    assert (first.model, first.opening, first.kept) == ("m", [{"role": "system", "content": "Be brief."}], None)
    assert first.tools == ["here", "here_in_a_thread"]
    assert (first.added, first.message_count) == ([], 3)
    assert [message["role"] for message in second.added] == ["assistant", "tool", "tool"]
    assert second.message_count == 6


async def test_whoever_spoils_what_an_event_says_spoils_nothing_else() -> None:
    def spoil(event: Event) -> None:
        if isinstance(event, RunStarted):
            event.history[0]["content"][0]["text"] = "****"
            event.history.clear()
        if isinstance(event, ModelRequested):
            event.opening[0]["content"] = "****"
            for message in event.added:
                message.clear()
            event.tools.clear()

    history = [{"role": "user", "content": [{"type": "text", "text": "one"}]}, {"role": "assistant", "content": "two"}]
    model = ScriptedModel(two_calls())
    agent = BaseAgent("A", "Be brief.", "m", model, observers=[spoil]).add_tool(here).add_tool(here_in_a_thread)
    result = await agent.run("three", messages=history)
    assert result.messages[0]["content"][0]["text"] == "one"
    for request in model.requests:
        assert "****" not in str(request)
        assert len(request["tools"]) == 2
    assert [message["role"] for message in result.messages[3:6]] == ["assistant", "tool", "tool"]


async def test_a_request_says_which_messages_the_window_keeps() -> None:
    watch = Companion()
    history = [{"role": ("user", "assistant")[n % 2], "content": f"{n} " + "word " * 50} for n in range(20)]
    agent = BaseAgent("A", "a", "m", ScriptedModel(["hi"]), observers=[watch], context_window=300)
    await agent.run("three", messages=history)
    [request] = [event for event in watch.events if isinstance(event, ModelRequested)]
    assert request.kept is not None
    assert request.kept[-1] == 20
    assert request.message_count == len(request.kept) < 21


async def test_the_first_piece_of_a_stream_has_a_time(endpoint: StartEndpoint) -> None:
    endpoint(answers.text("one two three", delay=0.05, chunk_delay=0.05))
    watch = Companion()
    agent = BaseAgent("A", "a", observers=[watch])
    async with agent:
        async with agent.stream("go") as stream:
            await stream.result()
        await agent.run("go")
    streamed, whole = (event for event in watch.events if event.kind == "model_responded")
    assert streamed.first_piece is not None
    assert 0.04 < streamed.first_piece < streamed.elapsed - 0.05
    assert whole.first_piece is None


def test_a_keyboard_interrupt_of_an_observer_is_no_failure_of_the_observer():
    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        _observers._asked(interrupt)
    event: Any = SimpleNamespace(kind="run_started")
    with pytest.raises(KeyboardInterrupt):
        _observers.tell_all([interrupt], event, print)
