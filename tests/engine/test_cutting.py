"""A run that is cut, by its own deadline or from outside: what returns, when, and what is left."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Awaitable, Callable
from typing import Any

import anyio
import pytest
import trio

from fractal import (
    AgentResult,
    BaseAgent,
    Event,
    InvalidArguments,
    Limits,
    RaceModel,
    RunContext,
    RunFinished,
    run_many,
    stream_many,
    tool,
)
from fractal.model import ModelRequest, Reply
from fractal.testing import Endpoint, ScriptedModel, answers
from tests.schedules import in_virtual_time
from tests.support import assert_continuable, calls_then, come_about, in_thread, outcomes

StartEndpoint = Callable[..., Endpoint]

CUT = 0.3
"""Seconds, where time itself cuts: enough for a thread to begin on a busy machine."""

SOON = 2.5
"""Seconds: half of what is cut."""


class Slow(BaseAgent):
    """Tools that take five seconds unless they are stopped."""

    def __init__(self, **options: object) -> None:
        super().__init__("Slow", "You are slow.", **options)
        self.release = threading.Event()
        self.began = threading.Event()
        self.ended = threading.Event()
        self.cleaned_up = False

    @tool
    async def in_loop(self) -> str:
        self.began.set()
        try:
            await anyio.sleep(5)
        finally:
            self.cleaned_up = True
        return "late"

    @tool
    def in_thread(self) -> str:
        self.began.set()
        self.release.wait(5)
        self.ended.set()
        return "late"

    @tool(on_cancel="wait")
    def to_the_end(self) -> str:
        self.began.set()
        self.release.wait(5)
        self.ended.set()
        return "done"


@pytest.fixture
def agent():
    agent = Slow()
    yield agent
    agent.release.set()


async def by_own_timeout(agent: BaseAgent, reached: Callable[[], object]) -> AgentResult | None:
    return await agent.run("go", timeout=CUT)


async def by_anyio_scope(agent: BaseAgent, reached: Callable[[], object]) -> AgentResult | None:
    async with anyio.create_task_group() as group:
        with pytest.raises(TimeoutError), anyio.fail_after(5) as scope:
            group.start_soon(at_once, scope, reached)
            await agent.run("go")
    return None


async def by_wait_for(agent: BaseAgent, reached: Callable[[], object]) -> AgentResult | None:
    with pytest.raises(TimeoutError):
        await asyncio.wait_for(agent.run("go"), CUT)
    return None


async def by_task_cancel(agent: BaseAgent, reached: Callable[[], object]) -> AgentResult | None:
    task = asyncio.ensure_future(agent.run("go"))
    await come_about(reached)
    task.cancel()
    await asyncio.sleep(0)
    task.cancel()  # a second one while the first is being obeyed
    with pytest.raises(asyncio.CancelledError):
        await task
    return None


async def by_trio_scope(agent: BaseAgent, reached: Callable[[], object]) -> AgentResult | None:
    async with trio.open_nursery() as nursery:
        with trio.move_on_after(5) as scope:
            nursery.start_soon(at_once, scope, reached)
            await agent.run("go")
    assert scope.cancelled_caught
    return None


async def at_once(scope: anyio.CancelScope | trio.CancelScope, reached: Callable[[], object]) -> None:
    """Let the time of a scope be over when something has come about."""
    await come_about(reached)
    scope.deadline = anyio.current_time()


CUTS = [by_own_timeout, by_anyio_scope, by_wait_for, by_task_cancel, by_trio_scope]
Cut = Callable[[BaseAgent, Callable[[], object]], Awaitable[AgentResult | None]]


@pytest.fixture(params=CUTS)
def cut(request: pytest.FixtureRequest, anyio_backend: tuple[str, object]) -> Cut:
    needs = {by_wait_for: "asyncio", by_task_cancel: "asyncio", by_trio_scope: "trio"}.get(request.param)
    if needs not in (None, anyio_backend[0]):
        pytest.skip(f"only on {needs}")
    return request.param


@pytest.fixture
def last_result(agent: Slow) -> list[AgentResult]:
    """What the run's last event says, which is all there is when the run is cancelled from outside."""
    results: list[AgentResult] = []
    agent.observers = (lambda event: results.append(event.result) if isinstance(event, RunFinished) else None,)
    return results


def assert_cut(results: list[AgentResult], direct: AgentResult | None) -> AgentResult:
    [result] = results
    assert not result.success
    assert result.stop_reason == ("deadline" if direct is not None else "cancelled")
    assert direct is None or direct is result
    assert_continuable(result)
    return result


async def test_an_async_tool_is_stopped_in_time_and_has_cleaned_up(
    agent: Slow, cut: Cut, last_result: list[AgentResult], endpoint: StartEndpoint
):
    one = endpoint(calls_then("never", answers.call("in_loop")))
    started = time.monotonic()
    result = assert_cut(last_result, await cut(agent, agent.began.is_set))
    assert time.monotonic() - started < SOON
    assert agent.cleaned_up
    assert outcomes(result)[0] in ("timeout", "cancelled")
    assert len(one.requests) == 1


async def test_an_abandoned_thread_holds_nobody_up_and_is_named_in_the_result(
    agent: Slow, cut: Cut, last_result: list[AgentResult], endpoint: StartEndpoint
):
    one = endpoint(calls_then("never", answers.call("in_thread")))
    started = time.monotonic()
    result = assert_cut(last_result, await cut(agent, agent.began.is_set))
    assert time.monotonic() - started < SOON
    assert not agent.ended.is_set()
    assert outcomes(result) == ["abandoned"]
    assert [call.tool_name for call in result.abandoned] == ["in_thread"]
    assert "may still take effect" in result.messages[-1]["content"]
    assert len(one.requests) == 1
    agent.release.set()
    assert await in_thread(agent.ended.wait, 5)


async def test_a_tool_that_must_be_waited_for_is_waited_for(
    agent: Slow, cut: Cut, last_result: list[AgentResult], endpoint: StartEndpoint
):
    endpoint(calls_then("never", answers.call("to_the_end")))

    async def release() -> None:
        await come_about(agent.began.is_set)
        await anyio.sleep(CUT + 0.1)
        agent.release.set()

    async with anyio.create_task_group() as group:
        group.start_soon(release)
        result = assert_cut(last_result, await cut(agent, agent.began.is_set))
        assert agent.ended.is_set()
    assert outcomes(result) == ["ok"]
    assert result.tool_results[0].content == "done"
    assert result.messages[-1]["content"] == "done"


async def test_a_model_call_is_cut_and_its_connection_closed(
    agent: Slow, cut: Cut, last_result: list[AgentResult], endpoint: StartEndpoint
):
    one = endpoint(answers.text("late", delay=5))
    started = time.monotonic()
    result = assert_cut(last_result, await cut(agent, lambda: one.requests))
    assert time.monotonic() - started < SOON
    await in_thread(one.wait_for_disconnects, 1)
    assert result.messages == [{"role": "user", "content": "go"}]
    assert result.usage.requests == 1


async def test_a_run_cancelled_in_a_retry_pause_sends_nothing_more(
    agent: Slow, last_result: list[AgentResult], endpoint: StartEndpoint
):
    one = endpoint(lambda _: answers.failure(503, "busy", retry_after=0.2))
    async with anyio.create_task_group() as group:
        group.start_soon(agent.run, "go")
        await in_thread(one.wait_for_requests, 2)
        group.cancel_scope.cancel()
    [result] = last_result
    assert result.stop_reason == "cancelled"
    assert result.usage.requests == len(one.requests) == 2
    await anyio.sleep(0.3)
    assert len(one.requests) == 2


@pytest.mark.parametrize("kind", ["in_loop", "in_thread"])
async def test_a_tools_own_timeout_tells_the_model_and_the_run_goes_on(agent: Slow, kind: str, endpoint: StartEndpoint):
    quick = BaseAgent("Quick", "You try.", limits=Limits(tool_timeout=0.1))
    quick.add_tool(getattr(agent, kind))
    endpoint(calls_then("went on", answers.call(kind)))
    result = await quick.run("go")
    assert result.content == "went on"
    assert outcomes(result) == ["timeout" if kind == "in_loop" else "abandoned"]
    assert "timed out after 0.1" in result.messages[2]["content"]
    assert_continuable(result)


async def test_a_tools_timeout_over_a_tool_that_must_be_waited_for_keeps_what_it_returns(endpoint: StartEndpoint):
    """Telling the model "timeout" would have it done twice."""

    @tool(timeout=0.1, on_cancel="wait")
    def pay() -> str:
        time.sleep(0.3)
        return "paid"

    agent = BaseAgent("Payer", "You pay.", limits=Limits(grace=0.1)).add_tool(pay)
    endpoint(calls_then("thanks", answers.call("pay")))
    result = await agent.run("go")
    assert outcomes(result) == ["ok"]
    assert result.messages[2]["content"] == "paid"
    assert any("'pay' has not stopped" in warning for warning in result.warnings)


async def test_a_cooperative_plain_tool_stops_when_it_asks(endpoint: StartEndpoint):
    stopped = threading.Event()

    @tool(on_cancel="wait")
    def count(ctx: RunContext) -> str:
        try:
            for _ in range(500):
                ctx.check_cancelled()
                time.sleep(0.01)
        finally:
            stopped.set()
        return "counted"

    agent = BaseAgent("Counter", "You count.").add_tool(count)
    endpoint(calls_then("never", answers.call("count")))
    result = await agent.run("go", timeout=0.2)
    assert stopped.is_set()
    assert result.elapsed < 1
    assert outcomes(result) == ["timeout"]


@in_virtual_time
async def test_a_tool_that_swallows_cancellation_is_named_after_its_grace_and_waited_for():
    named_after: list[float] = []

    async def stubborn() -> str:
        ends = anyio.current_time() + 0.8
        while anyio.current_time() < ends:
            try:
                await anyio.sleep(0.05)
            except BaseException:  # just what no tool should do
                with anyio.CancelScope(shield=True):
                    await anyio.sleep(0.01)
        return "finally"

    model = ScriptedModel([answers.calls(answers.call("stubborn")), "never"])
    agent = BaseAgent("Stubborn", "You go on.", client=model, limits=Limits(grace=0.2)).add_tool(stubborn)
    agent.observers = (
        lambda event: named_after.append(anyio.current_time()) if event.kind == "warning_raised" else None,
    )
    started = anyio.current_time()
    result = await agent.run("go", timeout=0.3)
    assert [w for w in result.warnings if "'stubborn' has not stopped 0.2 s" in w]
    assert named_after[0] - started == pytest.approx(0.5, abs=0.02)
    assert result.elapsed >= 0.8
    assert_continuable(result)


async def test_the_deadline_of_a_run_is_its_parents_if_that_is_nearer(endpoint: StartEndpoint):
    child = BaseAgent("Child", "child", timeout=5)
    parent = BaseAgent("Parent", "parent").register_delegate(child)
    one = endpoint(
        lambda request: (
            answers.text("late", delay=5)
            if request.body["messages"][0]["content"] == "child"
            else answers.calls(answers.call("delegate_to_child", {"query": "?"}))
        )
    )
    result = await parent.run("go", timeout=0.3)
    assert result.stop_reason == "deadline"
    assert result.elapsed < SOON
    assert outcomes(result) == ["timeout"]
    await in_thread(one.wait_for_disconnects, 1)


async def test_calls_that_had_not_begun_when_the_run_was_cut_are_skipped(
    agent: Slow, cut: Cut, last_result: list[AgentResult], endpoint: StartEndpoint
):
    @tool(sequential=True)
    async def later() -> None:
        raise AssertionError("never called")

    agent.add_tool(later)
    endpoint(calls_then("never", answers.call("in_loop"), answers.call("later"), answers.call("in_loop")))
    result = assert_cut(last_result, await cut(agent, agent.began.is_set))
    assert outcomes(result)[1:] == ["skipped", "skipped"]
    assert result.messages[-1]["content"] == "Error: not called: the run ended first"


async def test_a_deadline_that_has_passed_already_sends_nothing(endpoint: StartEndpoint):
    one = endpoint("hello")
    result = await BaseAgent("A", "a").run("go", timeout=0)
    assert result.stop_reason == "deadline"
    assert one.requests == []


async def test_a_timeout_error_of_a_tool_is_the_tools_own(endpoint: StartEndpoint):
    async def flaky() -> str:
        raise TimeoutError("the database is slow")

    endpoint(calls_then("went on", answers.call("flaky")))
    result = await BaseAgent("A", "a").add_tool(flaky).run("go", timeout=5)
    assert result.success
    assert outcomes(result) == ["error"]
    assert result.messages[2]["content"] == "Error: TimeoutError: the database is slow"


async def test_a_request_has_a_timeout_of_its_own_and_is_tried_again(endpoint: StartEndpoint):
    one = endpoint([answers.text("late", delay=5), "in time"])
    result = await BaseAgent("A", "a", limits=Limits(request_timeout=0.2)).run("go")
    assert result.content == "in time"
    assert len(one.requests) == 2


async def test_waiting_longer_than_there_is_time_is_not_begun(endpoint: StartEndpoint):
    one = endpoint(lambda _: answers.failure(429, "slow down", retry_after=25))
    result = await BaseAgent("A", "a").run("go", timeout=10)
    assert result.elapsed < 1
    assert result.stop_reason == "deadline"
    assert result.exception is not None
    assert type(result.exception).__name__ == "DeadlineWouldPass"
    assert result.exception.wait == 25
    assert 8 < result.exception.remaining <= 10
    assert len(one.requests) == 1


@pytest.mark.parametrize("tool_timeout", [None, 0.01])
async def test_a_native_cancellation_is_obeyed_while_a_run_that_is_out_of_time_cleans_up(
    tool_timeout: float | None, anyio_backend: tuple[str, object]
):
    if anyio_backend[0] != "asyncio":
        pytest.skip("trio has none")
    out_of_time, may_end = anyio.Event(), anyio.Event()

    async def tidy() -> None:
        try:
            await anyio.sleep(5)
        finally:
            with anyio.CancelScope(shield=True):
                await anyio.sleep(0.3)  # longer than the run has
                out_of_time.set()
                await may_end.wait()

    agent = BaseAgent("A", "a", client=ScriptedModel([answers.calls(answers.call("tidy"))])).add_tool(tidy)
    task = asyncio.ensure_future(agent.run("go", timeout=0.2, limits=Limits(tool_timeout=tool_timeout)))
    await out_of_time.wait()
    task.cancel()
    await anyio.lowlevel.checkpoint()
    may_end.set()
    with pytest.raises(asyncio.CancelledError):
        await task


class Quit(BaseException):
    """No `Exception`, as Ctrl-C is none."""


async def by_run(agent: BaseAgent) -> None:
    await agent.run("go")


async def by_direct_call(agent: BaseAgent) -> None:
    await agent.execute_tool("leave")


async def by_delegate(agent: BaseAgent) -> None:
    above = ScriptedModel([answers.call("delegate_to_Leaving", {"query": "go"}), "done"])
    await BaseAgent("Above", "a", client=above).register_delegate(agent).run("go")


async def by_stream(agent: BaseAgent) -> None:
    async with agent.stream("go") as stream:
        async for _ in stream:
            pass


async def by_batch(agent: BaseAgent) -> None:
    await run_many(agent, ["go"])


@pytest.mark.parametrize("kind", [KeyboardInterrupt, Quit])
@pytest.mark.parametrize("call", [by_run, by_direct_call, by_delegate, by_stream, by_batch])
async def test_ctrl_c_in_a_cleanup_goes_before_the_cancellation_that_caused_the_cleanup(
    call: Callable[[BaseAgent], Awaitable[None]], kind: type[BaseException]
):
    cut = anyio.Event()

    async def leave() -> str:
        """Wait, and be interrupted in the cleanup."""
        try:
            cut.set()
            await anyio.sleep(60)
        finally:
            raise kind
        return "late"

    agent = BaseAgent("Leaving", "a", client=ScriptedModel([answers.call("leave"), "done"])).add_tool(leave)
    caught: list[type[BaseException]] = []

    async def ask() -> None:
        try:  # pytest itself would end at Ctrl-C
            await call(agent)
        except BaseException as error:
            caught.append(type(error))

    with anyio.fail_after(5):
        async with anyio.create_task_group() as group:
            group.start_soon(ask)
            await cut.wait()
            group.cancel_scope.cancel()
    assert caught == [kind]


class Leaving:
    """Raises, in a task beside others, what ends event loops.

    Args:
        kind: That.
        is_cut: Whether it does so when it is cancelled, as another one has failed.
    """

    def __init__(self, kind: type[BaseException], *, is_cut: bool) -> None:
        self.kind, self.is_cut = kind, is_cut
        self.is_at_work = anyio.Event()

    async def leave(self, *_: object) -> None:
        self.is_at_work.set()
        try:
            await anyio.sleep(60 if self.is_cut else 0)
        finally:
            raise self.kind

    async def fail(self, *_: object) -> None:
        await self.is_at_work.wait()
        if self.is_cut:
            raise InvalidArguments("no")
        await anyio.sleep(60)

    async def respond(self, request: ModelRequest) -> Reply:
        await (self.fail if request.transcript.messages[-1]["content"] == "fail" else self.leave)()
        return Reply(text="never")

    async def by_guard(self) -> None:
        await BaseAgent("A", "a", client=ScriptedModel([answers.hang()]), guard=[self.fail, self.leave]).run("go")

    async def by_race(self) -> None:
        class Failing(ScriptedModel):
            respond = staticmethod(self.fail)

        await BaseAgent("A", "a", client=RaceModel(Failing([]), self)).run("go")

    async def by_batch(self) -> None:
        await run_many(BaseAgent("A", "a", client=self), ["fail", "go", "go"])

    async def by_streamed_batch(self) -> None:
        async with stream_many(BaseAgent("A", "a", client=self), ["fail", "go", "go"]) as batch:
            async for _ in batch:
                pass


@pytest.mark.parametrize("is_cut", [False, True])
@pytest.mark.parametrize("kind", [KeyboardInterrupt, SystemExit])
@pytest.mark.parametrize("way", ["by_guard", "by_race", "by_batch", "by_streamed_batch"])
def test_ctrl_c_and_sys_exit_in_a_task_beside_others_are_for_whoever_awaits_them_all(
    way: str, kind: type[BaseException], is_cut: bool, backend: str
):
    async def ask() -> type[BaseException] | None:
        with anyio.fail_after(5):
            try:
                await getattr(Leaving(kind, is_cut=is_cut), way)()
            except BaseException as error:
                return type(error)
        return None

    try:
        caught = anyio.run(ask, backend=backend)
    except BaseException as error:  # which has ended the event loop, and would end pytest
        caught = error
    assert caught is kind


def closed(**options: Any) -> BaseAgent:
    async def leave() -> str:
        await anyio.lowlevel.checkpoint()
        raise GeneratorExit

    return closed_by(leave, **options)


def closed_in_thread(**options: Any) -> BaseAgent:
    def leave() -> str:
        raise GeneratorExit

    return closed_by(leave, **options)


def closed_by_its_hook(**options: Any) -> BaseAgent:
    async def hook(*_: object) -> str:
        raise GeneratorExit

    async def leave() -> str:
        return "left"

    return closed_by(leave, around_tool=hook, **options)


def closed_by_its_approver(**options: Any) -> BaseAgent:
    async def approve(*_: object) -> bool:
        raise GeneratorExit

    @tool(requires_approval=True)
    async def leave() -> str:
        return "left"

    return closed_by(leave, approve=approve, **options)


def closed_by(leave: Callable[..., Any], **options: Any) -> BaseAgent:
    model = ScriptedModel([answers.call("leave"), "done"])
    return BaseAgent("Leaving", "a", client=model, **options).add_tool(leave)


@pytest.mark.parametrize("call", [by_run, by_direct_call, by_delegate, by_stream, by_batch])
@pytest.mark.parametrize("make", [closed, closed_in_thread, closed_by_its_hook, closed_by_its_approver])
async def test_a_tool_that_raises_what_ends_generators_was_called_and_its_run_raises_that(
    make: Callable[..., BaseAgent], call: Callable[[BaseAgent], Awaitable[None]]
):
    seen: list[Event] = []
    caught: list[type[BaseException]] = []
    try:
        await call(make(observers=[seen.append]))
    except BaseException as error:
        caught.append(type(error))
    await anyio.lowlevel.checkpoint()  # the event loop goes on
    assert caught == [GeneratorExit]
    assert [each.kind for each in seen].count("run_finished") == 1
