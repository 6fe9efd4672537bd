"""Tools that go on after they were cancelled: named with the place, and waited for or left to themselves."""

from __future__ import annotations

import logging
import pickle
import re
import signal
from collections.abc import Awaitable, Callable
from functools import partial
from typing import Any

import anyio
import pytest
import trio
import trio.testing

import fractal.sync
from fractal import AgentResult, BaseAgent, Limits, ToolIgnoredCancellation, run_many, tool
from fractal._agent import verbs
from fractal.events import RunFinished, WarningRaised
from fractal.testing import ScriptedModel, answers
from tests.schedules import in_virtual_time
from tests.support import assert_continuable, outcomes

LEAVE = Limits(grace=0.2, on_stubborn="raise")


async def ignore_cancellation(seconds: float) -> None:
    ends = anyio.current_time() + seconds
    while anyio.current_time() < ends:
        try:
            await anyio.sleep(ends - anyio.current_time())
        except BaseException:  # just what no tool should do
            with anyio.CancelScope(shield=True):
                await anyio.sleep(0.01)


class Stubborn(BaseAgent):
    """An agent with a tool that does not stop, until it is let go."""

    def __init__(self, *replies: Any, limits: Limits = LEAVE, **options: Any) -> None:
        super().__init__("Stubborn", "You go on.", client=ScriptedModel([*replies, "done"]), limits=limits, **options)
        self.began, self.free, self.over = anyio.Event(), anyio.Event(), anyio.Event()
        self.holding = 0
        self.events: list[Any] = []
        self.observers = (self.events.append,)

    @tool
    async def hold(self) -> str:
        """Hold on."""
        self.began.set()
        self.holding += 1
        try:
            while not self.free.is_set():
                try:
                    await self.free.wait()
                except BaseException:
                    with anyio.CancelScope(shield=True):
                        await anyio.sleep(0.01)
        finally:
            self.holding -= 1
            if not self.holding:
                self.over.set()
        return "finally"

    async def let_go(self) -> None:
        self.free.set()
        with anyio.fail_after(5):
            await self.over.wait()
            await anyio.wait_all_tasks_blocked()  # what waited for it ends with it

    @property
    def last(self) -> AgentResult:
        return [event.result for event in self.events if isinstance(event, RunFinished)][-1]


HOLD = answers.calls(answers.call("hold"))
WHERE = r"test_stubborn\.py:\d+ in hold"


def assert_left(error: ToolIgnoredCancellation, agent: Stubborn) -> None:
    assert (error.tool_name, error.grace) == ("hold", 0.2)
    assert re.fullmatch(WHERE, str(error.where))
    assert "has not stopped 0.2 s after it was cancelled, stuck at test_stubborn.py:" in str(error)
    result = error.result
    assert result is not None
    assert outcomes(result) == ["abandoned"]
    assert [each.tool_name for each in result.abandoned] == ["hold"]
    assert (result.success, result.stop_reason) == (False, "tool_error")
    [warning] = result.warnings
    assert re.search(f"{WHERE}; the run ends without it", warning)
    assert [event.message for event in agent.events if isinstance(event, WarningRaised)] == [warning]
    assert_continuable(result)


@in_virtual_time
async def test_a_run_that_may_leave_a_tool_raises_when_its_grace_is_over():
    agent = Stubborn(HOLD)
    with anyio.fail_after(5), pytest.raises(ToolIgnoredCancellation) as caught:
        await agent.run("go", timeout=0.1)
    assert_left(caught.value, agent)
    assert caught.value.result is agent.last
    assert not agent.over.is_set()
    await agent.let_go()


@in_virtual_time
async def test_a_tool_past_its_own_timeout_ends_the_run_too():
    agent = Stubborn(HOLD, limits=Limits(grace=0.2, tool_timeout=0.1, on_stubborn="raise"))
    with anyio.fail_after(5), pytest.raises(ToolIgnoredCancellation) as caught:
        await agent.run("go")
    assert_left(caught.value, agent)
    await agent.let_go()


async def scope(run: Callable[[], Awaitable[Any]]) -> None:
    with anyio.move_on_after(0.1):
        await run()


async def native(run: Callable[[], Awaitable[Any]], times: int = 1) -> None:
    import asyncio

    task = asyncio.ensure_future(run())
    await asyncio.sleep(0.1)
    for _ in range(times):
        task.cancel()
        await asyncio.sleep(0.05)
    await task


@in_virtual_time
@pytest.mark.parametrize("cut", [scope, native, partial(native, times=3)], ids=["scope", "native", "native thrice"])
async def test_it_takes_the_place_of_the_cancellation_that_the_tool_ignored(cut: Any, anyio_backend_name: str):
    if cut is not scope and anyio_backend_name != "asyncio":
        pytest.skip("asyncio's own")
    agent = Stubborn(HOLD)
    with anyio.fail_after(5), pytest.raises(ToolIgnoredCancellation) as caught:
        await cut(lambda: agent.run("go"))
    assert_left(caught.value, agent)
    assert isinstance(caught.value.__cause__, anyio.get_cancelled_exc_class())
    await agent.let_go()


def test_ctrl_c_in_the_task_that_awaits_the_run_goes_before_it():
    async def work() -> None:
        agent = Stubborn(HOLD)

        @trio.lowlevel.enable_ki_protection
        async def press() -> None:
            await agent.began.wait()
            signal.raise_signal(signal.SIGINT)  # which trio gives to its first task then

        async with trio.open_nursery() as nursery:
            nursery.start_soon(press)
            try:
                with pytest.raises(KeyboardInterrupt):
                    await agent.run("go")
            finally:
                await agent.let_go()

    trio.run(work)


@in_virtual_time
@pytest.mark.parametrize("times", [1, 2, 3])
async def test_one_that_is_waited_for_is_named_however_often_the_run_is_cancelled(times: int, anyio_backend_name: str):
    if anyio_backend_name != "asyncio":
        pytest.skip("asyncio's own")
    agent = Stubborn(HOLD, limits=Limits(grace=0.3))

    def let_go_once_it_is_named(event: Any) -> None:
        if isinstance(event, WarningRaised):
            agent.free.set()

    async def let_go_in_the_end() -> None:
        await anyio.sleep(5)
        agent.free.set()

    agent.observers = (agent.events.append, let_go_once_it_is_named)
    async with anyio.create_task_group() as group:
        group.start_soon(let_go_in_the_end)
        with pytest.raises(anyio.get_cancelled_exc_class()):
            await native(lambda: agent.run("go"), times=times)
        group.cancel_scope.cancel()
    [warning] = agent.last.warnings
    assert re.search(f"{WHERE}; the run waits for it", warning)
    assert outcomes(agent.last) == ["ok"]


@in_virtual_time
async def test_a_stream_raises_it_at_its_end():
    agent = Stubborn(HOLD)
    with anyio.fail_after(5), pytest.raises(ToolIgnoredCancellation) as caught:
        async with agent.stream("go", timeout=0.1) as stream:
            await stream.result()
    assert_left(caught.value, agent)
    await agent.let_go()
    agent = Stubborn(HOLD)
    with anyio.fail_after(5), pytest.raises(ToolIgnoredCancellation):
        async with agent.stream("go") as stream:
            async for event in stream:
                if event.kind == "tool_started":
                    await agent.began.wait()
                    break
    await agent.let_go()


@in_virtual_time
@pytest.mark.parametrize("on_error", ["collect", "fail_fast"])
async def test_a_batch_is_ended_by_it(on_error: Any):
    agent = Stubborn(HOLD)
    with anyio.fail_after(5), pytest.raises(ToolIgnoredCancellation):
        await run_many(agent, ["go"], on_error=on_error, timeout=0.1)
    await agent.let_go()


@pytest.mark.parametrize("how", ["delegate", "call_agent", "facade"])
async def test_it_passes_through_the_runs_above(how: str):
    child = Stubborn(HOLD)
    model = ScriptedModel([answers.calls(answers.call("ask", {"query": "?"})), "never"])
    events: list[Any] = []
    parent = BaseAgent("Parent", "You ask.", client=model, observers=[events.append])
    if how == "delegate":
        parent.register_delegate(child, "ask")
    elif how == "call_agent":

        async def ask(query: str) -> str:
            with anyio.move_on_after(0.1):
                return str(await parent.call_agent(child, query))
            return "never"

        parent.add_tool(ask)
    else:

        def ask_blocking(query: str) -> str:
            return fractal.sync.run(child, query, timeout=0.1).content

        parent.add_tool(ask_blocking, name="ask")
    with anyio.fail_after(5), pytest.raises(ToolIgnoredCancellation) as caught:
        await parent.run("go", timeout=0.1 if how == "delegate" else None)
    assert caught.value.tool_name == "hold"
    assert caught.value.result is events[-1].result
    assert caught.value.result.agent_name == "Parent"
    assert [each.tool_name for each in caught.value.result.abandoned] == ["hold"]
    await child.let_go()


@in_virtual_time
@pytest.mark.parametrize("below", [None, 0.2, 2.0], ids=["inherited", "same grace", "more grace"])
@pytest.mark.parametrize("how", ["delegate", "tool"])
@pytest.mark.parametrize("cut", [scope, native, partial(native, times=3)], ids=["scope", "native", "native thrice"])
async def test_the_run_above_names_the_innermost_tool(cut: Any, how: str, below: float | None, anyio_backend_name: str):
    if cut is not scope and anyio_backend_name != "asyncio":
        pytest.skip("asyncio's own")
    child = Stubborn(HOLD, limits=Limits() if below is None else Limits(grace=below, on_stubborn="raise"))
    model = ScriptedModel([answers.calls(answers.call("ask", {"query": "?"})), "never"])
    events: list[Any] = []
    parent = BaseAgent("Parent", "You ask.", client=model, limits=LEAVE, observers=[events.append])
    if how == "delegate":
        parent.register_delegate(child, "ask")
    else:

        async def ask(query: str) -> str:
            return str((await child.run(query)).content)

        parent.add_tool(ask)
    with anyio.fail_after(5), pytest.raises(ToolIgnoredCancellation) as caught:
        await cut(lambda: parent.run("go"))
    await child.let_go()
    error = caught.value
    [hold] = [event for event in child.events if event.kind == "tool_started"]
    assert (error.tool_name, error.call_id) == ("hold", hold.call_id)
    assert re.fullmatch(WHERE, str(error.where))
    if below is None or below > 0.2:
        assert error.through == "ask"
        assert "tool 'hold', called through 'ask', has not stopped" in str(error)
    warnings = [event.message for event in events if isinstance(event, WarningRaised)]
    assert len([each for each in warnings if re.search(f"tool 'hold' has not stopped .*{WHERE}", each)]) == 1
    assert not [each for each in warnings if "tool 'ask' has not stopped" in each]


@in_virtual_time
async def test_a_delegate_that_waits_for_its_tools_itself_is_left_by_the_run_above():
    child = Stubborn(HOLD, limits=Limits(on_stubborn="wait"))
    model = ScriptedModel([answers.calls(answers.call("ask", {"query": "?"})), "never"])
    parent = BaseAgent("Parent", "You ask.", client=model, limits=LEAVE).register_delegate(child, "ask")
    with anyio.fail_after(5), pytest.raises(ToolIgnoredCancellation) as caught:
        await parent.run("go", timeout=0.1)
    await child.let_go()
    assert (caught.value.tool_name, caught.value.through) == ("hold", "ask")


async def test_a_delegate_does_as_the_run_above_unless_it_says_otherwise():
    def limits_of(agent: BaseAgent) -> Limits:
        return verbs.begin(agent, "go").limits

    def prompt() -> str:
        assert limits_of(BaseAgent("Below", "b")).on_stubborn == "raise"
        assert limits_of(BaseAgent("Below", "b", limits=Limits(on_stubborn="wait"))).on_stubborn == "wait"
        assert limits_of(BaseAgent("Below", "b")).grace == 5.0
        return "a"

    result = await BaseAgent("Above", prompt, client=ScriptedModel(["done"]), limits=LEAVE).run("go")
    assert result.success, result.error


def test_the_facade_raises_it(backend: str):
    async def hold() -> None:
        await ignore_cancellation(0.8)

    agent = BaseAgent("A", "a", client=ScriptedModel([HOLD] * 2), limits=LEAVE).add_tool(hold)
    with fractal.sync.portal(backend=backend):
        with pytest.raises(ToolIgnoredCancellation) as caught:
            fractal.sync.run(agent, "go", timeout=0.1)
        assert outcomes(caught.value.result) == ["abandoned"]
        with pytest.raises(ToolIgnoredCancellation), fractal.sync.stream(agent, "go", timeout=0.1) as stream:
            stream.result()


@in_virtual_time
async def test_a_sibling_is_cancelled_and_joined_first():
    agent = Stubborn(
        answers.calls(answers.call("hold"), answers.call("wait")),
        limits=Limits(grace=0.2, tool_timeout=0.1, on_stubborn="raise"),
    )
    cleaned: list[str] = []

    @tool(timeout=60)
    async def wait() -> None:
        try:
            await anyio.sleep_forever()
        finally:
            cleaned.append("wait")

    agent.add_tool(wait)
    with anyio.fail_after(5), pytest.raises(ToolIgnoredCancellation) as caught:
        await agent.run("go")
    assert cleaned == ["wait"]
    assert outcomes(caught.value.result) == ["abandoned", "cancelled"]
    await agent.let_go()


@in_virtual_time
async def test_several_that_do_not_stop_are_one_error_and_a_warning_each():
    agent = Stubborn(answers.calls(answers.call("hold"), answers.call("hold")))
    with anyio.fail_after(5), pytest.raises(ToolIgnoredCancellation) as caught:
        await agent.run("go", timeout=0.1)
    assert outcomes(caught.value.result) == ["abandoned", "abandoned"]
    assert len(caught.value.result.warnings) == 2
    await agent.let_go()


@in_virtual_time
async def test_a_tool_that_was_left_keeps_its_place_until_it_ends_and_that_is_logged(caplog: pytest.LogCaptureFixture):
    caplog.set_level(logging.INFO, "fractal")
    ended = anyio.Event()
    began: list[int] = []

    @tool(max_concurrency=1)
    async def one_at_a_time(number: int) -> str:
        began.append(number)
        if number == 1:
            await ignore_cancellation(0.6)
            ended.set()
        return "ok"

    call = [answers.calls(answers.call("one_at_a_time", {"number": number})) for number in (1, 2)]
    agent = BaseAgent("A", "a", client=ScriptedModel([*call, "done"]), limits=LEAVE).add_tool(one_at_a_time)
    with anyio.fail_after(5):
        with pytest.raises(ToolIgnoredCancellation):
            await agent.run("go", timeout=0.1)
        assert not ended.is_set()
        result = await agent.run("again")
    assert ended.is_set()
    assert (began, outcomes(result)) == ([1, 2], ["ok"])
    assert "tool 'one_at_a_time', abandoned earlier, has ended" in caplog.text


@in_virtual_time
@pytest.mark.parametrize("policy", ["wait", "raise"])
async def test_a_tool_that_stops_within_its_grace_makes_no_difference(policy: Any):
    cleaned: list[float] = []

    async def clean_up() -> None:
        started = anyio.current_time()
        try:
            await anyio.sleep_forever()
        finally:
            with anyio.CancelScope(shield=True):
                await anyio.sleep(0.1)
            cleaned.append(anyio.current_time() - started)

    async def say_no() -> None:
        try:
            await anyio.sleep_forever()
        finally:
            raise ValueError("no")

    async def fine() -> str:
        return "fine"

    async def swallow() -> str:
        try:
            await anyio.sleep_forever()
        except BaseException:
            return "swallowed"
        return ""

    tools = [clean_up, say_no, fine, swallow]
    model = ScriptedModel([answers.calls(*(answers.call(each.__name__) for each in tools)), "never"])
    agent = BaseAgent("A", "a", client=model, limits=Limits(grace=4, on_stubborn=policy))
    for each in tools:
        agent.add_tool(each)
    with anyio.fail_after(5):
        result = await agent.run("go", timeout=0.1)
    assert outcomes(result) == ["timeout", "error", "ok", "ok"]
    assert (result.stop_reason, result.warnings, result.abandoned) == ("deadline", [], [])
    assert [call.error for call in result.tool_results][1] == "ValueError: no"
    assert len(cleaned) == 1


@pytest.mark.parametrize("policy", ["wait", "raise"])
async def test_a_tool_that_is_cancelled_from_inside_is_an_error(policy: Any, anyio_backend_name: str):
    async def inside() -> None:
        if anyio_backend_name == "asyncio":
            import asyncio

            future = asyncio.get_running_loop().create_future()
            future.cancel()
            await future
        raise anyio.get_cancelled_exc_class()

    if anyio_backend_name == "trio":
        pytest.skip("trio makes its cancellations itself")
    agent = BaseAgent("A", "a", client=ScriptedModel([answers.calls(answers.call("inside")), "done"]))
    agent.add_tool(inside)
    result = await agent.run("go", limits=Limits(on_stubborn=policy))
    assert result.content == "done"
    assert [call.error for call in result.tool_results] == [
        "the tool was cancelled from inside: something it awaited was cancelled"
    ]


def test_the_error_survives_pickling():
    error = ToolIgnoredCancellation("hold", "a.py:1 in hold", 2.0)
    copy = pickle.loads(pickle.dumps(error))
    assert (copy.tool_name, copy.where, copy.grace, str(copy)) == ("hold", "a.py:1 in hold", 2.0, str(error))


class TestInVirtualTime:
    """On trio's mock clock, where seconds are exact."""

    @pytest.fixture
    def anyio_backend(self) -> Any:
        return "trio", {"clock": trio.testing.MockClock(autojump_threshold=0)}

    def agent(self, warned: list[float]) -> BaseAgent:
        async def stubborn() -> str:
            await ignore_cancellation(10 + 3)
            return "ended"

        def note(event: Any) -> None:
            if isinstance(event, WarningRaised):
                warned.append(anyio.current_time() - self.started)

        self.started = anyio.current_time()
        model = ScriptedModel([answers.calls(answers.call("stubborn")), "done"])
        return BaseAgent("A", "a", client=model, observers=[note]).add_tool(stubborn)

    async def test_one_that_ignores_it_for_3_s_is_warned_of_after_1_s_and_waited_for(self):
        warned: list[float] = []
        agent = self.agent(warned)
        result = await agent.run("go", timeout=10, limits=Limits(grace=1))
        assert warned == [pytest.approx(11, abs=0.02)]
        assert result.elapsed == pytest.approx(13, abs=0.05)  # it is cancelled again only now and then
        assert re.search(
            r"'stubborn' .* stuck at test_stubborn.py:\d+ in ignore_cancellation; the run waits", result.warnings[0]
        )
        assert outcomes(result) == ["ok"]

    async def test_with_raise_it_is_raised_then(self):
        warned: list[float] = []
        agent = self.agent(warned)
        with pytest.raises(ToolIgnoredCancellation) as caught:
            await agent.run("go", timeout=10, limits=Limits(grace=1, on_stubborn="raise"))
        assert anyio.current_time() - self.started == pytest.approx(11, abs=0.02)
        assert warned == [pytest.approx(11, abs=0.02)]
        assert "in ignore_cancellation" in str(caught.value.where)
        await anyio.sleep(3)
