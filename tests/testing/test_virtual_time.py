"""Deadlines, retries and every other wait, in virtual time: hours in milliseconds; and what virtual time refuses."""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import suppress

import anyio
import pytest
import trio
from trio.testing import wait_all_tasks_blocked

from fractal import (
    AgentResult,
    Allow,
    BaseAgent,
    DeadlineWouldPass,
    Event,
    FallbackModel,
    LimitedModel,
    Limits,
    OpenAIModel,
    PendingCall,
    RequestTimedOut,
    RunContext,
    run_many,
    tool,
)
from fractal._engine.pricing import prices_of_library
from fractal.testing import Endpoint, NotInVirtualTime, ScriptedModel, VirtualTime, answers, virtual_time
from tests.support import assert_continuable, outcomes

hours = virtual_time()


def agent(model: ScriptedModel, **options: object) -> BaseAgent:
    @tool
    async def work(seconds: float) -> str:
        await anyio.sleep(seconds)
        return "worked"

    return BaseAgent("A", "a", client=model, **options).add_tool(work)  # type: ignore[arg-type]


class Stopwatch:
    """Virtual seconds since it was made."""

    def __init__(self) -> None:
        self._started = anyio.current_time()

    def __call__(self) -> float:
        return anyio.current_time() - self._started


# ---- retries


@hours
async def test_back_off_grows_to_its_longest_and_stays_there():
    model = ScriptedModel([answers.failure(500, "oops")] * 9 + ["done"])
    waited = Stopwatch()
    result = await agent(model).run("go", max_retries=9)
    assert result.content == "done"
    full = 0.5 + 1 + 2 + 4 + 5 * 8
    assert 0.75 * full <= waited() <= full


@hours
async def test_a_prompt_function_can_tell_the_model_how_much_time_is_left():
    model = ScriptedModel(["done", "done"])

    async def prompt(ctx: RunContext) -> str:
        await anyio.sleep(600)
        return f"{ctx.remaining():.0f} s"

    for timeout, told in ((3600, "3000 s"), (None, "inf s")):
        await BaseAgent("A", prompt, client=model, timeout=timeout).run("go")
        assert model.requests[-1]["messages"][0]["content"] == told


@hours
async def test_a_retry_after_is_waited_for_to_the_second_and_a_too_long_one_not_at_all():
    model = ScriptedModel([answers.failure(429, "slow", retry_after=90), "done"])
    waited = Stopwatch()
    assert (await agent(model).run("go")).success
    assert waited() == 90
    waited = Stopwatch()
    model = ScriptedModel([answers.failure(429, "slow", retry_after=3600)])
    assert (await agent(model).run("go")).metadata["error_type"] == "rate_limit"
    assert waited() == 0


@hours
async def test_a_wait_that_does_not_fit_is_refused_at_its_beginning():
    model = ScriptedModel([answers.failure(429, "slow", retry_after=25)])
    waited = Stopwatch()
    result = await agent(model).run("go", timeout=10)
    assert waited() == 0
    with pytest.raises(DeadlineWouldPass) as caught:
        result.raise_for_error()
    assert (caught.value.wait, caught.value.remaining) == (25, 10)


# ---- requests


@hours
async def test_each_try_of_a_request_has_its_own_time():
    model = ScriptedModel([answers.text("late", delay=9e9)] * 3)
    waited = Stopwatch()
    result = await agent(model).run("go", max_retries=2, limits=Limits(request_timeout=600))
    assert 3 * 600 < waited() < 3 * 600 + 2
    with pytest.raises(RequestTimedOut):
        result.raise_for_error()


@hours
async def test_a_run_of_an_hour_ends_on_the_second():
    for slow in answers.call("work", {"seconds": 9e9}), answers.text("late", delay=9e9):
        waited = Stopwatch()
        result = await agent(ScriptedModel([slow])).run("go", timeout=3600)
        assert (waited(), result.stop_reason) == (3600, "deadline")
        assert_continuable(result)


@hours
async def test_waiting_for_a_place_of_a_limited_model_counts_for_the_run_and_not_for_the_request():
    model = LimitedModel(ScriptedModel(lambda _: answers.text("ok", delay=50)), max_concurrency=1)
    waited = Stopwatch()
    asking = BaseAgent("A", "a", client=model, limits=Limits(request_timeout=60))
    results = await run_many(asking, ["?"] * 4, max_concurrency=4)
    assert (waited(), [result.success for result in results]) == (200, [True] * 4)
    results = await run_many(asking, ["?"] * 4, max_concurrency=4, timeout=120)
    assert sorted(result.stop_reason for result in results) == ["deadline"] * 2 + ["finished"] * 2


@hours
async def test_a_rate_is_kept_to_the_second():
    model = LimitedModel(ScriptedModel(lambda _: "ok"), rate=(10, 60.0))
    waited = Stopwatch()
    await run_many(BaseAgent("A", "a", client=model), ["?"] * 100, max_concurrency=100)
    assert round(waited(), 3) == 540


@hours
async def test_a_fallback_takes_over_without_a_pause():
    first, second = ScriptedModel([answers.failure(500, "oops")]), ScriptedModel(["from the second"])
    waited = Stopwatch()
    result = await BaseAgent("A", "a", client=FallbackModel(first, second)).run("go")
    assert (result.content, waited()) == ("from the second", 0)


# ---- tools


@hours
async def test_a_tool_has_its_timeout_for_waiting_and_working_together():
    @tool(max_concurrency=1, timeout=10)
    async def one_at_a_time() -> None:
        await anyio.sleep(8)

    model = ScriptedModel([[answers.call("one_at_a_time"), answers.call("one_at_a_time")], "done"])
    waited = Stopwatch()
    result = await BaseAgent("A", "a", client=model).add_tool(one_at_a_time).run("go")
    assert sorted(outcomes(result)) == ["ok", "timeout"]
    assert waited() == 10


@hours
async def test_a_tool_past_its_time_is_cut_and_the_run_goes_on():
    model = ScriptedModel([answers.call("work", {"seconds": 9e9}), answers.call("work", {"seconds": 899}), "done"])
    waited = Stopwatch()
    result = await agent(model, limits=Limits(tool_timeout=900)).run("go")
    assert (outcomes(result), result.content, waited()) == (["timeout", "ok"], "done", 1799)


@hours
async def test_calls_of_one_reply_take_as_long_as_the_longest():
    calls = answers.calls(*(answers.call("work", {"seconds": seconds}) for seconds in (10, 600, 60)))
    waited = Stopwatch()
    result = await agent(ScriptedModel([calls, "done"])).run("go")
    assert (outcomes(result), waited()) == (["ok"] * 3, 600)


def asked_after(seconds: float) -> tuple[BaseAgent, Callable[..., object]]:
    async def approve(call: PendingCall) -> Allow:
        await anyio.sleep(seconds)
        return Allow()

    @tool(requires_approval=True, timeout=30)
    async def pay() -> str:
        await anyio.sleep(20)
        return "paid"

    return BaseAgent("A", "a", client=ScriptedModel([answers.call("pay"), "done"])).add_tool(pay), approve


@hours
async def test_a_tools_own_time_begins_when_it_is_approved():
    asking, approve = asked_after(1800)
    waited = Stopwatch()
    result = await asking.run("go", approve=approve)
    assert (outcomes(result), waited()) == (["ok"], 1820)


@hours
async def test_an_approval_that_takes_longer_than_the_run_ends_with_it():
    asking, approve = asked_after(1800)
    waited = Stopwatch()
    result = await asking.run("go", approve=approve, timeout=600)
    assert (outcomes(result), result.stop_reason, waited()) == (["timeout"], "deadline", 600)
    assert_continuable(result)


@hours
async def test_a_tool_that_does_not_stop_is_named_when_its_grace_is_over():
    @tool
    async def stubborn() -> None:
        with anyio.CancelScope(shield=True):
            await anyio.sleep(1000)

    named: list[float] = []

    def note(event: Event) -> None:
        if event.kind == "warning_raised":
            named.append(waited())

    model = ScriptedModel([answers.call("stubborn")])
    asking = BaseAgent("A", "a", client=model, observers=[note]).add_tool(stubborn)
    waited = Stopwatch()
    await asking.run("go", timeout=100, limits=Limits(grace=30))
    assert (named, waited()) == ([130], 1000)


# ---- the soft deadline


def offered(model: ScriptedModel) -> list[bool]:
    return ["tools" in request and request.get("tool_choice") != "none" for request in model.requests]


async def closing_run(*script: object) -> tuple[AgentResult, ScriptedModel, float]:
    model = ScriptedModel(script)  # type: ignore[arg-type]
    waited = Stopwatch()
    result = await agent(model).run("go", timeout=60, limits=Limits(reserve=10))
    assert_continuable(result)
    return result, model, waited()


@hours
async def test_when_only_the_reserve_is_left_tools_are_cut_and_a_final_answer_is_asked_for():
    result, model, took = await closing_run(answers.call("work", {"seconds": 300}), "what I have")
    assert took == 50
    assert (result.success, result.content, result.stop_reason) == (True, "what I have", "soft_deadline")
    assert outcomes(result) == ["timeout"]
    assert offered(model) == [True, False]
    assert "final answer now" in model.requests[1]["messages"][0]["content"]
    assert all("final answer now" not in str(message) for message in result.messages)


@hours
async def test_calls_asked_for_too_late_are_skipped():
    late = answers.calls(answers.call("work", {"seconds": 1}), delay=55)
    result, model, took = await closing_run(late, "short")
    assert took == 55
    assert outcomes(result) == ["skipped"]
    assert (result.stop_reason, offered(model)) == ("soft_deadline", [True, False])


@hours
async def test_the_hard_deadline_holds_after_the_soft_one():
    result, _, took = await closing_run(answers.call("work", {"seconds": 300}), answers.text("late", delay=30))
    assert took == 60
    assert (result.success, result.stop_reason) == (False, "deadline")


@hours
async def test_a_run_that_is_done_in_time_sees_nothing_of_the_reserve():
    result, model, took = await closing_run(answers.call("work", {"seconds": 20}), "done")
    assert (took, result.stop_reason, offered(model)) == (20, "finished", [True, True])


@hours
async def test_without_a_deadline_there_is_nothing_to_keep_back():
    model = ScriptedModel([answers.call("work", {"seconds": 1000}), "done"])
    result = await agent(model, limits=Limits(reserve=10)).run("go")
    assert result.stop_reason == "finished"


# ---- delegates


@hours
async def test_a_delegates_deadline_is_never_later_than_its_parents():
    left: list[float] = []

    @tool
    async def look(ctx: RunContext) -> None:
        left.append(ctx.remaining())

    for child_timeout, parent_timeout in [(100, 30), (20, 30), (None, 30), (20, None)]:
        child = BaseAgent(
            "child", "c", client=ScriptedModel([answers.call("look"), "ok"]), timeout=child_timeout
        ).add_tool(look)
        parent = BaseAgent(
            "parent", "p", client=ScriptedModel([answers.call("delegate_to_child", {"query": "?"}), "ok"])
        )
        assert (await parent.register_delegate(child).run("go", timeout=parent_timeout)).success
    assert left == [30, 20, 30, 20]


@hours
async def test_a_delegate_cut_with_its_parent_leaves_both_transcripts_whole():
    ended: list[AgentResult] = []
    child = agent(
        ScriptedModel([answers.call("work", {"seconds": 300})]),
        observers=[lambda e: ended.append(e.result) if e.kind == "run_finished" else None],
    )
    parent = BaseAgent("parent", "p", client=ScriptedModel([answers.call("delegate_to_a", {"query": "?"})]))
    result = await parent.register_delegate(child).run("go", timeout=30)
    assert [outcomes(result), outcomes(ended[0])] == [["timeout"], ["timeout"]]
    assert [result.stop_reason, ended[0].stop_reason] == ["deadline", "deadline"]
    assert_continuable(result)
    assert_continuable(ended[0])


# ---- many runs


@hours
async def test_a_batch_takes_as_many_rounds_as_its_limit_makes_of_it():
    model = ScriptedModel(lambda _: answers.text("ok", delay=60))
    waited = Stopwatch()
    results = await run_many(BaseAgent("A", "a", client=model), ["?"] * 100, max_concurrency=10)
    assert (len(results), waited()) == (100, 600)


# ---- the sum


def test_these_tests_cover_hours_in_seconds(record_property: Callable[[str, object], None]):
    tests = [test for name, test in globals().items() if name.startswith("test_") and hasattr(test, "__wrapped__")]
    assert len(tests) > 20
    began, virtual_began = time.perf_counter(), hours.elapsed
    for test in tests:
        test()
    took, virtual = time.perf_counter() - began, hours.elapsed - virtual_began
    record_property("virtual_hours", virtual / 3600)
    print(f"{virtual / 3600:.1f} hours of virtual time in {took:.2f} s")  # noqa: T201
    assert virtual > 3600
    assert took < 30  # under 2 s on a machine with nothing else to do


# ---- what virtual time refuses


@tool
def plain() -> str:
    """A function that needs a thread."""
    raise AssertionError("it is refused before it starts")


@pytest.fixture
def clock() -> VirtualTime:
    return virtual_time()


def test_a_plain_tool_is_refused_by_name_before_its_thread_starts(clock: VirtualTime):
    model = ScriptedModel([answers.call("plain"), "done"])
    with pytest.raises(NotInVirtualTime, match="the plain tool 'plain' needs a thread; virtual time would jump over"):
        clock.run(BaseAgent("A", "a", client=model).add_tool(plain).run, "go")


def test_a_plain_hook_is_refused(clock: VirtualTime):
    def approve(call: PendingCall) -> bool:
        raise AssertionError("it is refused before it starts")

    @tool(requires_approval=True)
    async def pay() -> None: ...

    asking = BaseAgent("A", "a", client=ScriptedModel([answers.call("pay"), "done"]), approve=approve).add_tool(pay)
    with pytest.raises(NotInVirtualTime, match="the plain function 'approve' needs a thread"):
        clock.run(asking.run, "go")


def test_a_thread_of_any_library_is_refused_and_the_place_is_named(clock: VirtualTime):
    with pytest.raises(NotInVirtualTime, match=r"what is at test_virtual_time.py:\d+ in in_a_thread needs a thread"):
        clock.run(in_a_thread)


async def in_a_thread() -> None:
    await anyio.to_thread.run_sync(pytest.fail, "it is refused before it starts")


def test_a_refusal_cannot_be_swallowed(clock: VirtualTime):
    async def swallow() -> str:
        with suppress(NotInVirtualTime):
            await in_a_thread()
        return "as if nothing had happened"

    with pytest.raises(NotInVirtualTime):
        clock.run(swallow)


def test_a_model_at_an_endpoint_is_refused_before_anything_is_sent(clock: VirtualTime):
    with Endpoint() as endpoint:
        asking = BaseAgent("A", "a", client=OpenAIModel(base_url=endpoint.url))
        with pytest.raises(NotInVirtualTime, match="a request to an endpoint needs a thread"):
            clock.run(asking.run, "go")
        assert not endpoint.requests


async def listen() -> None:
    async with await anyio.create_tcp_listener(local_host="127.0.0.1") as listener:
        await listener.serve(lambda _: anyio.sleep(0))


async def connect() -> None:
    with trio.socket.socket() as listening, trio.socket.socket() as one:
        await listening.bind(("127.0.0.1", 0))
        listening.listen()
        await one.connect(listening.getsockname())
        await one.recv(1)


@pytest.mark.parametrize("wait", [listen, connect])
def test_whatever_waits_for_a_socket_is_refused(clock: VirtualTime, wait: Callable[..., object]):
    async def scenario() -> None:
        with anyio.fail_after(3600):
            await wait()

    with pytest.raises(NotInVirtualTime, match="a socket or a pipe is waited for at "):
        clock.run(scenario)
    assert clock.elapsed == 0


def test_a_scenario_in_which_nothing_more_will_happen_is_refused(clock: VirtualTime):
    async def wait_for_nobody() -> None:
        await anyio.sleep(5)
        await anyio.Event().wait()

    with pytest.raises(NotInVirtualTime, match="every task waits, without a deadline"):
        clock.run(wait_for_nobody)


def test_who_waits_until_all_others_wait_is_not_refused(clock: VirtualTime):
    async def scenario() -> str:
        for cushion in 0.0, 0.001:
            await wait_all_tasks_blocked(cushion)
        await anyio.sleep(60)
        return "done"

    assert clock.run(scenario) == "done"
    assert clock.elapsed == 60


def test_what_a_scenario_raises_comes_out_as_it_is(clock: VirtualTime):
    async def fail(reason: str) -> None:
        raise ValueError(reason)

    with pytest.raises(ValueError, match=r"^mine$"):
        clock.run(fail, "mine")


def test_real_time_has_its_threads_beside_virtual_time(clock: VirtualTime):
    async def in_real_time() -> int:
        return await anyio.to_thread.run_sync(clock.run, anyio.sleep, 60) or await anyio.to_thread.run_sync(lambda: 7)

    assert anyio.run(in_real_time, backend="trio") == 7
    assert clock.elapsed == 60


def test_the_prices_of_models_are_loaded_in_real_time(clock: VirtualTime, monkeypatch: pytest.MonkeyPatch):
    pytest.importorskip("genai_prices")
    monkeypatch.setattr(prices_of_library(), "is_loaded", False)
    result = clock.run(agent(ScriptedModel(["done"])).run, "go")
    assert (result.content, clock.elapsed) == ("done", 0)


def test_a_decorated_test_takes_arguments_by_name(clock: VirtualTime):
    @clock
    async def doubled(*, number: int) -> int:
        await anyio.sleep(number)
        return 2 * number

    assert (doubled(number=4), clock.elapsed) == (8, 4)
