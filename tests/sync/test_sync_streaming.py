"""Runs watched from blocking code: from every place a caller can be, and left in every way."""

from __future__ import annotations

import contextvars
import gc
import itertools
import os
import signal
import subprocess
import sys
import textwrap
import threading
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import suppress
from functools import partial
from typing import Any

import anyio
import anyio.from_thread
import anyio.lowlevel
import pytest

from fractal import (
    BaseAgent,
    Event,
    InvalidArguments,
    InvalidMessages,
    Limits,
    RunContext,
    RunFinished,
    RunStarted,
    SyncInAsyncError,
    ToolStarted,
    sync,
    tool,
)
from fractal._engine import ask as _ask
from fractal.model import Delta, ModelRequest, Reply, Sink
from fractal.models import OpenAIModel
from fractal.testing import Endpoint, ScriptedModel, answers
from fractal.testing.answers import AnswerLike
from fractal.testing.endpoint import RecordedRequest
from tests.forking import forked
from tests.streams import Watch, assert_well_formed, text_of
from tests.support import assert_continuable, calls_then, in_thread, outcomes, portal_threads

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


@pytest.fixture(params=["shared", "asyncio", "trio", pytest.param("uvloop", marks=pytest.mark.slow)])
def portal(request: pytest.FixtureRequest) -> Iterator[object]:
    """The shared portal, and one of each kind for a block."""
    if request.param == "shared":
        yield None
        return
    if request.param == "uvloop":
        pytest.importorskip("uvloop")
    kind: dict[str, Any] = {"trio": {"backend": "trio"}, "uvloop": {"use_uvloop": True}}.get(request.param, {})
    with sync.portal(**kind) as own:
        yield own


def in_threads(*functions: Callable[[], object]) -> None:
    threads = [threading.Thread(target=function) for function in functions]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
        assert not thread.is_alive()


def wait_until(condition: Callable[[], bool]) -> None:
    give_up = time.monotonic() + 5
    while not condition():
        assert time.monotonic() < give_up
        time.sleep(0.005)


class Tidy(BaseAgent):
    """A tool that needs a moment to clean up."""

    def __init__(self, **options: Any) -> None:
        super().__init__("Tidy", "tidy", **options)
        self.began = threading.Event()
        self.cleaned_up = False
        self.completed = False

    @tool
    async def work(self) -> None:
        try:
            self.began.set()
            await anyio.sleep(5)
            self.completed = True
        finally:
            with anyio.CancelScope(shield=True):
                await anyio.sleep(0.1)
            self.cleaned_up = True


# ---- the same as the awaiting one


def test_events_and_text_are_those_of_the_run(portal: object, endpoint: StartEndpoint) -> None:
    endpoint([answers.calls(answers.call("double", {"n": 21}), text="Let me count. "), "It is 42."])
    watch = Watch()
    agent = BaseAgent("A", "a", observers=[watch]).add_tool(lambda n: 2 * n, name="double")
    with sync.stream(agent, "go") as stream:
        events = list(stream)
        run_id = stream.run_id
    assert events == watch
    assert_well_formed(events)
    assert {event.run_id for event in events} == {run_id}
    assert text_of(events, "A") == "Let me count. It is 42."
    result = stream.result()
    assert isinstance(events[-1], RunFinished)
    assert events[-1].result is result
    assert (result.content, result.usage.requests, outcomes(result)) == ("It is 42.", 2, ["ok"])


def test_text_is_the_runs_own_alone(portal: object, endpoint: StartEndpoint) -> None:
    def reply(request: RecordedRequest) -> AnswerLike:
        if request.body["messages"][0]["content"] == "expert":
            return "Not to be seen."
        is_asked = request.body["messages"][-1]["role"] == "user"
        return answers.calls(answers.call("delegate_to_expert", {"query": "?"})) if is_asked else SENTENCE

    endpoint(reply)
    boss = sync.BaseAgent("boss", "boss").register_delegate(BaseAgent("expert", "expert"))
    with boss.stream("go", buffer=0) as stream:
        assert "".join(stream.text()) == SENTENCE
    assert stream.result().tool_results[0].content == "Not to be seen."


@pytest.mark.parametrize("buffer", [0, 64])
def test_the_result_is_there_inside_the_block_after_it_and_as_often_as_wanted(
    buffer: int, portal: object, endpoint: StartEndpoint
) -> None:
    one = endpoint(SENTENCE)
    with sync.stream(BaseAgent("A", "a"), "go", buffer=buffer) as stream:
        for _ in stream.text():
            break
        if buffer:
            wait_until(lambda: stream._stream.ended is not None)  # and there are events that nobody has read
        inside = stream.result()
        assert inside.content == SENTENCE
        assert list(stream) == []
        assert list(stream.text()) == []
    assert stream.result() is stream.result() is inside
    assert list(stream) == []
    assert len(one.requests) == 1


class Wordy:
    """A model that streams words as fast as they are taken."""

    async def respond(self, request: ModelRequest) -> Reply:
        raise AssertionError("it can stream")

    async def stream(self, request: ModelRequest, sink: Sink) -> Reply:
        for number in range(40):
            await sink(Delta("text", f"{number} "))
        return Reply(text="done", finish_reason="stop")


@pytest.mark.parametrize("buffer", [0, 1, 5])
def test_a_reader_that_reads_nothing_holds_the_run_to_its_buffer_and_one_event(portal: object, buffer: int) -> None:
    watch = Watch()
    with sync.stream(BaseAgent("A", "a", client=Wordy(), observers=[watch]), "go", buffer=buffer) as stream:
        wait_until(lambda: len(watch) == buffer + 1)
        time.sleep(0.02)
        assert len(watch) == buffer + 1
        next(stream)
        wait_until(lambda: len(watch) == 2 * (buffer + 1))  # what waited is taken at once
        time.sleep(0.02)
        assert len(watch) == 2 * (buffer + 1)
        list(stream)
    assert stream.result().success


# ---- leaving


def by_break(stream: sync.RunStream, events: int) -> int:
    seen = 0
    with stream:
        for _ in stream:
            seen += 1
            if seen == events:
                break
    return seen


def by_exception(stream: sync.RunStream, events: int) -> int:
    seen = 0
    with suppress(ZeroDivisionError), stream:
        for _ in stream:
            seen += 1
            if seen == events:
                raise ZeroDivisionError
    return seen


@pytest.mark.parametrize("leave", [by_break, by_exception])
def test_left_after_any_event_the_run_has_ended_well_formed_and_says_so(
    leave: Callable[[sync.RunStream, int], int], portal: object, endpoint: StartEndpoint
) -> None:
    one = endpoint(calls_then(SENTENCE, answers.call("look"), answers.call("look_later")))
    watch = Watch()
    agent = BaseAgent("A", "a", observers=[watch]).add_tool(lambda: "seen", name="look")

    @agent.add_tool
    async def look_later() -> str:
        await anyio.lowlevel.checkpoint()
        return "seen later"

    asked = 0
    for events in itertools.count(1):
        watch.clear()
        stream = sync.stream(agent, "go", buffer=0)
        seen = leave(stream, events)
        told = list(watch)
        result = stream.result()
        assert_well_formed(watch)
        assert watch == told
        assert watch.results("A") == [result]
        assert_continuable(result)
        asked += watch.kinds.count("model_requested")
        assert len(one.requests) <= asked  # each is told before it is sent, and nothing is told after the end
        if seen < events:
            assert result.success
            break
    assert events > 20


def test_left_while_a_tool_sleeps_the_tool_has_cleaned_up_and_never_completes(
    portal: object, endpoint: StartEndpoint
) -> None:
    one = endpoint(calls_then("never", answers.call("work")))
    agent = Tidy()
    with sync.stream(agent, "go") as stream:
        for event in stream:
            if isinstance(event, ToolStarted):
                agent.began.wait(5)
                break
    assert (agent.cleaned_up, agent.completed, len(one.requests)) == (True, False, 1)
    result = stream.result()
    assert (result.stop_reason, outcomes(result)) == ("cancelled", ["cancelled"])


def test_left_in_the_middle_of_text_the_endpoint_sees_the_client_go(portal: object, endpoint: StartEndpoint) -> None:
    one = endpoint(answers.text(SENTENCE, chunk_delay=0.02))
    with sync.stream(BaseAgent("A", "a"), "go") as stream:
        for piece in stream.text():
            if piece == "three ":
                break
    left = time.monotonic()
    one.wait_for_disconnects(1)
    assert time.monotonic() - left < 3
    assert stream.result().stop_reason == "cancelled"


def test_an_exception_in_the_body_comes_out_as_it_is_after_the_cleanup(portal: object, endpoint: StartEndpoint) -> None:
    endpoint(calls_then("never", answers.call("work")))
    agent = Tidy()
    mine = ValueError("mine")
    with pytest.raises(ValueError, match="mine") as caught, sync.stream(agent, "go"):
        agent.began.wait(5)
        raise mine
    assert caught.value is mine
    assert agent.cleaned_up


def test_the_runs_own_timeout_is_a_result_and_its_last_events_can_be_read(
    portal: object, endpoint: StartEndpoint
) -> None:
    endpoint(calls_then("never", answers.call("work")))
    agent = Tidy()
    with sync.stream(agent, "go", timeout=0.3) as stream:
        events = list(stream)
    assert [event.kind for event in events][-4:] == ["tool_started", "tool_finished", "limit_hit", "run_finished"]
    assert (agent.cleaned_up, stream.result().stop_reason) == (True, "deadline")


def test_a_generator_around_a_stream_may_be_dropped(portal: object, endpoint: StartEndpoint) -> None:
    def pieces() -> Iterator[str]:
        with sync.stream(agent, "go") as stream:
            yield from stream.text()

    one = endpoint(answers.text(SENTENCE, chunk_delay=0.02))
    agent = BaseAgent("A", "a")
    for piece in pieces():
        assert piece == "One "
        break
    one.wait_for_disconnects(1)
    generator = pieces()
    cycle: dict[str, Any] = {"generator": generator}
    cycle["itself"] = cycle
    assert next(generator) == "One "
    del generator, cycle
    gc.collect()
    one.wait_for_disconnects(2)


# ---- where the caller is


def test_eight_threads_at_once_share_one_loop(endpoint: StartEndpoint) -> None:
    others = set(portal_threads())
    one = endpoint(lambda request: f"{request.body['messages'][-1]['content']} {SENTENCE}")
    agent = BaseAgent("A", "a")
    texts: dict[int, str] = {}

    def read(thread: int) -> None:
        for number in range(10 * thread, 10 * thread + 10):
            with sync.stream(agent, str(number), buffer=number % 3) as stream:
                if number % 5 == 4:
                    next(stream.text())
                    continue
                texts[number] = "".join(stream.text())

    in_threads(*[lambda thread=thread: read(thread) for thread in range(8)])
    assert texts == {number: f"{number} {SENTENCE}" for number in range(80) if number % 5 != 4}
    assert len(set(portal_threads()) - others) <= 1
    wait_until(lambda: one.in_flight == 0)


def test_a_stream_may_be_opened_read_and_closed_in_different_threads(portal: object, endpoint: StartEndpoint) -> None:
    endpoint(answers.text(SENTENCE, chunk_delay=0.02))
    stream = sync.stream(BaseAgent("A", "a"), "go", buffer=0)
    pieces: list[str] = []
    contexts = [contextvars.copy_context() for _ in range(3)]  # the choice of a portal is in it
    steps: list[Callable[[], object]] = [
        stream.__enter__,
        lambda: pieces.extend(itertools.islice(stream.text(), 3)),
        lambda: stream.__exit__(None, None, None),
    ]
    for context, step in zip(contexts, steps, strict=True):
        in_threads(lambda context=context, step=step: context.run(step))
    assert pieces == ["One ", "two ", "three "]
    assert stream.result().stop_reason == "cancelled"


async def test_on_a_thread_with_a_running_loop_it_works_and_warns(endpoint: StartEndpoint) -> None:
    endpoint(SENTENCE)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        with sync.stream(BaseAgent("A", "a"), "go") as stream:
            assert "".join(stream.text()) == SENTENCE
    [warning] = caught
    assert (warning.category, warning.filename) == (sync.LoopBlockedWarning, __file__)


def test_on_the_portals_own_loop_it_is_an_error_and_no_deadlock(portal: object) -> None:
    inner = BaseAgent("inner", "i", client=ScriptedModel(["never"]))

    async def nested() -> None:
        with sync.stream(inner, "hi"):
            raise AssertionError("not reached")

    agent = BaseAgent("A", "a", client=ScriptedModel([[answers.call("nested")], "done"])).add_tool(nested)
    with sync.stream(agent, "go", timeout=10) as stream:
        result = stream.result()
    assert outcomes(result) == ["error"]
    assert isinstance(result.tool_results[0].exception, SyncInAsyncError)


def test_context_variables_of_the_caller_reach_the_tools(portal: object) -> None:
    variable = contextvars.ContextVar("variable", default="unset")
    agent = BaseAgent("A", "a", client=ScriptedModel([[answers.call("look")], "done"]))
    agent.add_tool(lambda: variable.get(), name="look")
    variable.set("mine")
    with sync.stream(agent, "go") as stream:
        variable.set("changed later")
        assert stream.result().tool_results[0].content == "mine"


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs os.fork")
def test_after_a_fork_the_child_streams_on_a_loop_of_its_own(endpoint: StartEndpoint) -> None:
    endpoint(SENTENCE)
    agent = BaseAgent("A", "a")
    with sync.stream(agent, "parent") as stream:
        assert "".join(stream.text()) == SENTENCE

    def work() -> bool:
        with sync.stream(agent, "child") as stream:
            return "".join(stream.text()) == SENTENCE

    assert forked(work) == 0


# ---- in a plain tool


class Nesting(BaseAgent):
    """Plain tools that stream a child through the facade."""

    def __init__(self, child: BaseAgent, **options: Any) -> None:
        super().__init__("parent", "parent", **options)
        self.child = child
        self.seen: list[Event] = []
        self.ended = threading.Event()

    @tool
    def ask(self) -> str:
        try:
            with sync.stream(self.child, "?", buffer=0) as stream:
                for event in stream:
                    self.seen.append(event)
                return str(stream.result().content)
        finally:
            self.ended.set()

    @tool(on_cancel="wait")
    def ask_and_wait(self) -> str:
        return self.ask()

    @tool
    def ask_and_dawdle(self) -> str:
        """Stop reading, and be stuck."""
        try:
            with sync.stream(self.child, "?", buffer=0) as stream:
                next(stream)
                self.ended.wait(5)
                return "late"
        finally:
            self.ended.set()


class Slow:
    """A model that takes three seconds, and a moment to clean up."""

    def __init__(self) -> None:
        self.cleaned_up = 0

    async def respond(self, request: ModelRequest) -> Reply:
        try:
            await anyio.sleep(3)
        finally:
            with anyio.CancelScope(shield=True):
                await anyio.sleep(0.1)
            self.cleaned_up += 1
        return Reply(text="late")


def is_of(request: RecordedRequest, agent_name: str) -> bool:
    return bool(request.body["messages"][0]["content"] == agent_name)


@pytest.mark.parametrize("name", ["ask", "ask_and_wait"])
async def test_in_a_plain_tool_it_is_a_child_of_the_run_and_seen_in_its_stream(
    name: str, endpoint: StartEndpoint
) -> None:
    one = endpoint(
        lambda r: answers.call(name) if is_of(r, "parent") and r.body["messages"][-1]["role"] == "user" else SENTENCE
    )
    agent = Nesting(BaseAgent("child", "child"))
    before = len(portal_threads())
    async with agent.stream("go", buffer=0) as stream:
        events = [event async for event in stream]
    result = await stream.result()
    assert_well_formed(events)
    assert [event for event in events if event.depth == 1] == agent.seen
    assert isinstance(agent.seen[0], RunStarted)
    assert (agent.seen[0].parent_id, agent.seen[0].call_id) == (result.run_id, result.tool_results[0].call_id)
    assert (result.tool_results[0].content, result.usage.requests, len(one.requests)) == (SENTENCE, 3, 3)
    assert len(portal_threads()) == before  # no second loop


async def test_in_a_plain_tool_it_shares_the_budget(endpoint: StartEndpoint) -> None:
    one = endpoint(lambda r: answers.call("ask") if is_of(r, "parent") else "done")
    async with Nesting(BaseAgent("child", "child")).stream("go", limits=Limits(max_requests=2)) as stream:
        result = await stream.result()
    assert (result.stop_reason, result.usage.requests, len(one.requests)) == ("budget", 2, 2)


async def test_in_a_plain_tool_the_deadline_of_the_run_holds_for_the_child_and_its_tools(
    endpoint: StartEndpoint,
) -> None:
    endpoint(lambda r: answers.call("ask") if is_of(r, "parent") else answers.call("look"))
    left: list[float] = []
    child = BaseAgent("child", "child")

    @child.add_tool
    def look(ctx: RunContext) -> None:
        left.append(ctx.remaining())
        gave_up.wait(5)

    gave_up = threading.Event()
    watch = Watch()
    agent = Nesting(child, observers=[watch])
    started = time.monotonic()
    async with agent.stream("go", timeout=0.3) as stream:
        result = await stream.result()
    gave_up.set()
    assert time.monotonic() - started < 3
    assert 0 < left[0] < 0.3
    assert [each.stop_reason for each in watch.results("child")] == [result.stop_reason] == ["deadline"]
    assert_well_formed(watch)
    await in_thread(agent.ended.wait, 5)


@pytest.mark.parametrize("name", ["ask", "ask_and_wait", "ask_and_dawdle"])
async def test_a_tool_that_is_timed_out_has_not_ended_before_the_run_that_it_streams(name: str) -> None:
    slow, watch = Slow(), Watch()
    agent = Nesting(
        BaseAgent("child", "child", client=slow),
        client=ScriptedModel([[answers.call(name), answers.call(name)], "went on"]),
        limits=Limits(tool_timeout=0.2),
        observers=[watch],
    )
    try:
        result = await agent.run("go")
    finally:
        agent.ended.set()
    assert_well_formed(watch)
    assert (result.content, slow.cleaned_up) == ("went on", 0 if name == "ask_and_dawdle" else 2)
    expected = "timeout" if name == "ask_and_wait" else "abandoned"
    assert outcomes(result) == [expected] * 2
    assert [each.stop_reason for each in watch.results("child")] == ["cancelled"] * 2


@pytest.mark.parametrize("how", ["timeout", "scope"])
@pytest.mark.parametrize("name", ["ask", "ask_and_wait", "ask_and_dawdle"])
async def test_when_a_run_has_been_cut_all_runs_that_its_tools_stream_have_ended(how: str, name: str) -> None:
    slow, watch = Slow(), Watch()
    agent = Nesting(
        BaseAgent("child", "child", client=slow),
        client=ScriptedModel([[answers.call(name) for _ in range(3)]]),
        observers=[watch],
    )
    began = anyio.Event()

    def three_ask(event: Event) -> None:
        if event.depth == 1 and watch.kinds.count("model_requested") == 4:
            began.set()

    agent.observers = (watch, three_ask)
    if name == "ask_and_dawdle":  # held at its first event
        began.set()
    started = time.monotonic()
    try:
        with anyio.CancelScope() as scope:
            async with anyio.create_task_group() as group:

                async def cut() -> None:
                    await began.wait()
                    await anyio.sleep(0.1)
                    scope.cancel()

                if how == "scope":
                    group.start_soon(cut)
                await agent.run("go", timeout=0.3 if how == "timeout" else None)
    finally:
        agent.ended.set()
    assert time.monotonic() - started < 3
    assert_well_formed(watch)
    [result] = watch.results("parent")
    assert result.stop_reason == ("deadline" if how == "timeout" else "cancelled")
    assert len(watch.results("child")) == 3
    told = len(watch)
    await anyio.sleep(0.05)
    assert len(watch) == told


@pytest.mark.parametrize("read", [False, True])
async def test_what_an_abandoned_thread_begins_in_the_event_loop_does_not_keep_it_busy(read: bool) -> None:
    child = BaseAgent("child", "c", client=ScriptedModel(lambda _: "hi"))
    abandoned, ended = threading.Event(), threading.Event()

    async def read_all() -> None:
        async with child.stream("?", buffer=0) as stream:
            async for _ in stream:
                pass

    def late() -> None:
        try:
            abandoned.wait(5)
            anyio.from_thread.run(read_all if read else partial(child.run, "?"))
        finally:
            ended.set()

    model = ScriptedModel([[answers.call("late")], "went on"])
    agent = BaseAgent("A", "a", client=model, limits=Limits(tool_timeout=0.3)).add_tool(late)
    result = await agent.run("go")
    assert (result.content, outcomes(result)) == ("went on", ["abandoned"])
    abandoned.set()
    assert await in_thread(ended.wait, 3)


async def test_a_plain_tool_cannot_hand_its_stream_to_another_thread() -> None:
    child = BaseAgent("child", "c", client=ScriptedModel(lambda _: "hi"))
    raised: list[BaseException] = []

    def lend() -> str:
        with sync.stream(child, "?") as stream:

            def read() -> None:
                try:
                    next(stream)
                except Exception as error:
                    raised.append(error)

            in_threads(read)
            return "".join(stream.text())

    agent = BaseAgent("A", "a", client=ScriptedModel([[answers.call("lend")], "done"])).add_tool(lend)
    result = await agent.run("go")
    assert [call.content for call in result.tool_results] == ["hi"]
    assert isinstance(raised[0], InvalidArguments)
    assert "thread" in str(raised[0])


async def test_a_failure_of_a_streamed_child_is_the_tools_to_deal_with() -> None:
    child = BaseAgent("child", lambda: 7, client=ScriptedModel([]))  # type: ignore[arg-type,return-value]

    def ask() -> str:
        with sync.stream(child, "?") as stream:
            return "".join(stream.text())

    agent = BaseAgent("A", "a", client=ScriptedModel([[answers.call("ask")], "went on"])).add_tool(ask)
    result = await agent.run("go")
    assert (result.content, outcomes(result)) == ("went on", ["error"])
    assert "not text" in str(result.tool_results[0].error)


# ---- wrong use


def test_a_stream_that_has_not_begun_says_how_to_begin_it() -> None:
    stream = sync.stream(BaseAgent("A", "a", client=ScriptedModel(["hi"])), "go")
    for use in (lambda: next(stream), lambda: next(stream.text()), stream.result, lambda: stream.run_id):
        with pytest.raises(InvalidArguments, match="with "):
            use()
    with stream:
        assert stream.result().content == "hi"


def test_a_stream_is_entered_once_and_the_first_goes_on() -> None:
    with sync.stream(BaseAgent("A", "a", client=ScriptedModel(["hi"])), "go") as stream:
        with pytest.raises(InvalidArguments, match="entered once"):
            stream.__enter__()
        assert "".join(stream.text()) == "hi"


@pytest.mark.parametrize(
    ("options", "error", "words"),
    [
        ({"messages": [{"role": "tool", "content": "x"}]}, InvalidMessages, "tool"),
        ({"timeout": -1}, InvalidArguments, "timeout"),
        ({"buffer": -1}, InvalidArguments, "buffer"),
    ],
    ids=str,
)
def test_what_cannot_be_run_is_refused(
    options: dict[str, Any], error: type[Exception], words: str, portal: object
) -> None:
    with pytest.raises(error, match=words), sync.stream(BaseAgent("A", "a"), "go", **options):
        raise AssertionError("not reached")


def test_wrong_use_that_shows_on_the_way_comes_out_once(portal: object) -> None:
    def unrunnable() -> sync.RunStream:
        agent = BaseAgent("A", lambda: 7, client=ScriptedModel([]))  # type: ignore[arg-type,return-value]
        return sync.stream(agent, "go")

    with unrunnable() as stream:
        with pytest.raises(InvalidArguments, match="not text"):
            list(stream)
        assert stream.result().stop_reason == "error"
    with unrunnable() as stream, pytest.raises(InvalidArguments, match="not text"):
        stream.result()
    assert stream.result().stop_reason == "error"
    with pytest.raises(InvalidArguments, match="not text"), unrunnable() as stream:
        wait_until(lambda: stream._stream._here()[1].has_ended)
    assert stream.result().stop_reason == "error"


# ---- Ctrl-C, and the end of the program

SCRIPT = """
import anyio, sys, time
from fractal import BaseAgent, sync, tool

class Slow(BaseAgent):
    @tool
    async def slow(self):
        print("started", flush=True)
        try:
            await anyio.sleep(30)
        finally:
            with anyio.CancelScope(shield=True):
                await anyio.sleep(0.2)
            print("cleaned up", flush=True)

with sync.portal(backend=sys.argv[1]):
    try:
        with sync.stream(Slow("Slow", "slow"), "go") as stream:
            for event in stream:
                if sys.argv[2] == "body" and event.kind == "tool_started":
                    time.sleep(0.2)
                    print("sleeping", flush=True)
                    time.sleep(30)
                if sys.argv[2] == "text" and event.kind == "text_delta":
                    print(event.text, flush=True)
    except KeyboardInterrupt:
        print("interrupted", flush=True)
    print(stream.result().stop_reason)
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform == "win32", reason="needs SIGINT")
@pytest.mark.parametrize("while_doing", ["tool", "text", "body"])
def test_ctrl_c_ends_the_run_waits_for_the_cleanup_and_is_raised(
    while_doing: str, endpoint: StartEndpoint, backend: str, tmp_path: Any
) -> None:
    text = answers.text("One two", chunk_delay=0.1) if while_doing != "text" else None
    one = endpoint(text or answers.text("One " + "two " * 300, chunk_delay=0.1))
    if while_doing != "text":
        one = endpoint(answers.calls(answers.call("slow")))
    program = tmp_path / "program.py"
    program.write_text(textwrap.dedent(SCRIPT))
    with subprocess.Popen(
        [sys.executable, program, backend, while_doing], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        wanted = {"tool": "started", "text": "One ", "body": "sleeping"}[while_doing]
        while (line := process.stdout.readline().rstrip("\n")) != wanted:
            assert line, process.communicate(timeout=20)
        interrupted = time.monotonic()
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=20)
    lines = [line for line in out.splitlines() if line.strip() != "two"]
    cleanup = ["cleaned up"] if while_doing != "text" else []
    assert (lines, err, process.returncode) == ([*cleanup, "interrupted", "cancelled"], "", 0)
    assert time.monotonic() - interrupted < 5
    one.wait_until_closed()


@pytest.mark.slow
def test_a_program_that_ends_in_the_middle_of_a_stream_ends_cleanly(endpoint: StartEndpoint, backend: str) -> None:
    one = endpoint(answers.text("One " + "two " * 300, chunk_delay=0.05))
    code = f"""
from fractal import BaseAgent, sync
own = sync.portal(backend={backend!r}); own.__enter__()
agent = BaseAgent("A", "a")
def pieces():
    with sync.stream(agent, "go", buffer=0) as stream:
        yield from stream.text()
generator = pieces()
print(next(generator))
open_for_ever = sync.stream(agent, "go").__enter__()
print(next(open_for_ever.text()))
"""
    warn = ["-W", "error", "-W", "ignore:Async generator:ResourceWarning"]  # on trio, HTTP libraries leave some
    done = subprocess.run([sys.executable, *warn, "-c", code], capture_output=True, text=True, timeout=20)
    assert (done.stdout, done.stderr, done.returncode) == ("One \nOne \n", "", 0)
    one.wait_until_closed()
