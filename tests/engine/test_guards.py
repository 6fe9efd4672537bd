"""Guards: whoever registers them and however a run is begun, no tool starts and no answer is given before they end."""

from __future__ import annotations

import threading
from collections.abc import Awaitable, Callable
from typing import Any

import anyio
import pytest

from fractal import (
    AgentResult,
    BaseAgent,
    Delta,
    GuardRaised,
    InvalidArguments,
    Limits,
    ModelRequest,
    NextRequest,
    PendingRequest,
    Reply,
    RunContext,
    StatusError,
    UserError,
    sync,
)
from fractal.model import Sink
from fractal.testing import Endpoint, ScriptedModel, answers
from tests.hooked import OF_SETTINGS, RUNS, Looks, agent_of
from tests.support import assert_continuable, in_thread, shown, until
from tests.without_uvloop import anyio_backend  # noqa: F401

KINDS: list[Any] = [BaseAgent, sync.BaseAgent]
StartEndpoint = Callable[..., Endpoint]


async def refuse(ctx: RunContext[Any]) -> None:
    raise PermissionError(f"not {ctx.messages[-1]['content']}")


def refuse_plainly(ctx: RunContext[Any]) -> None:
    raise PermissionError(f"not {ctx.messages[-1]['content']}")


async def say_no(ctx: RunContext[Any]) -> bool:
    return False


class Refuse:
    async def __call__(self, ctx: RunContext[Any]) -> None:
        await refuse(ctx)


REFUSING: list[Any] = [refuse, refuse_plainly, lambda ctx: refuse(ctx), Refuse()]


# ---- whoever registers one, and however a run is begun


@pytest.mark.parametrize("begin", RUNS, ids=shown)
@pytest.mark.parametrize("register", OF_SETTINGS, ids=shown)
@pytest.mark.parametrize("kind", KINDS, ids=shown)
async def test_a_guard_that_raises_stops_every_run_before_any_tool(
    kind: Any, register: Callable[..., Any], begin: Callable[..., Awaitable[AgentResult]]
):
    looks = Looks()

    def make(of: Any = kind, **options: Any) -> Any:
        return agent_of(looks, of, **options)

    agent, options = register(make, "guard", refuse)
    with anyio.fail_after(30):
        result = await begin(agent, options)
    assert "guard 'refuse' stopped the run: PermissionError: not go" in (result.error or "")
    assert looks.calls == []


@pytest.mark.parametrize("begin", RUNS, ids=shown)
@pytest.mark.parametrize("guard", REFUSING, ids=shown)
async def test_a_guard_may_be_any_function(guard: Any, begin: Callable[..., Awaitable[AgentResult]]):
    looks = Looks()
    with anyio.fail_after(30):
        result = await begin(agent_of(looks, guard=guard), {})
    assert "stopped the run: PermissionError: not go" in (result.error or "")
    assert looks.calls == []


@pytest.mark.parametrize("begin", RUNS, ids=shown)
@pytest.mark.parametrize("verdict", [None, True])
async def test_a_guard_that_lets_a_run_pass_changes_nothing(
    verdict: bool | None, begin: Callable[..., Awaitable[AgentResult]]
):
    async def agree(ctx: RunContext[Any]) -> bool | None:
        await anyio.sleep(0.01)
        return verdict

    looks = Looks()
    with anyio.fail_after(30):
        result = await begin(agent_of(looks, guard=[agree, lambda ctx: verdict]), {})
    assert (result.content, looks.calls) == ("done", [1])


# ---- how a run ends that a guard stops


async def test_the_result_says_which_guard_it_was_and_why():
    result = await agent_of(Looks(), guard=refuse).run("steal")
    assert (result.success, result.stop_reason, result.metadata["error_type"]) == (False, "guard", "guard")
    error = result.exception
    assert isinstance(error, GuardRaised)
    assert (error.guard, error.reason) == ("refuse", "PermissionError: not steal")
    assert isinstance(error.__cause__, PermissionError)
    assert result.messages == [{"role": "user", "content": "steal"}]
    assert_continuable(result)
    assert AgentResult.model_validate_json(result.model_dump_json()).stop_reason == "guard"


async def test_a_guard_that_returns_false_stops_the_run():
    result = await agent_of(Looks(), guard=say_no).run("go")
    assert (result.stop_reason, result.error) == ("guard", "guard 'say_no' stopped the run: it returned False")


@pytest.mark.parametrize("verdict", ["no", 0, 1, []], ids=shown)
async def test_a_verdict_that_says_neither_is_refused_and_lets_nothing_pass(verdict: Any):
    looks = Looks()
    with pytest.raises(InvalidArguments, match="guard '<lambda>' returned"):
        await agent_of(looks, guard=lambda ctx: verdict).run("go")
    assert looks.calls == []


async def test_wrong_use_in_a_guard_is_raised_out_of_the_run():
    async def wrong(ctx: RunContext[Any]) -> None:
        await ctx.agent.run(None)

    with pytest.raises(UserError, match="user_input is None"):
        await agent_of(Looks(), guard=wrong).run("go")


async def takes_nothing() -> None: ...


async def takes_two(ctx: object, messages: object) -> None: ...


def generates(ctx: object) -> Any:
    yield 1


@pytest.mark.parametrize("guard", [takes_nothing, takes_two, generates, 3, [3], "no"], ids=shown)
async def test_what_cannot_be_a_guard_is_refused_where_it_is_given(guard: Any):
    agent = BaseAgent("A", "a", client=ScriptedModel(["x"]))
    with pytest.raises(InvalidArguments, match="guard"):
        BaseAgent("A", "a", guard=guard)
    with pytest.raises(InvalidArguments, match="guard"):
        agent.guard = guard
    with pytest.raises(InvalidArguments, match="guard"):
        agent.guard(guard)
    with pytest.raises(InvalidArguments, match="guard"):
        await agent.run("go", guard=guard)
    assert agent.guard == ()


async def test_the_guards_of_a_run_stand_beside_those_of_the_agent():
    seen: list[str] = []

    async def own(ctx: RunContext[Any]) -> None:
        seen.append("own")

    async def of_run(ctx: RunContext[Any]) -> None:
        seen.append("of run")

    agent = agent_of(Looks(), guard=own)
    assert agent.guard == (own,)
    assert (await agent.run("go", guard=[of_run, own, of_run])).success
    assert sorted(seen) == ["of run", "own"]


# ---- beside the model


class Waiting:
    """A model that answers when it is let."""

    def __init__(self, reply: Reply | None = None) -> None:
        self.reply = reply or Reply(text="done")
        self.asked, self.let, self.ended = anyio.Event(), anyio.Event(), list[str]()

    async def respond(self, request: ModelRequest) -> Reply:
        self.asked.set()
        try:
            await self.let.wait()
        except BaseException:
            self.ended.append("cancelled")
            raise
        return self.reply


async def test_a_guard_works_while_the_model_is_asked_and_cancels_it():
    model = Waiting()

    async def guard(ctx: RunContext[Any]) -> None:
        await model.asked.wait()
        raise ValueError("no")

    with anyio.fail_after(10):
        result = await agent_of(Looks(), client=model, guard=guard).run("go")
    assert (result.stop_reason, model.ended) == ("guard", ["cancelled"])


async def test_a_guard_that_is_slower_than_the_model_is_waited_for():
    answered = anyio.Event()

    def reply(request: Any) -> Any:
        answered.set()
        return answers.call("look", {"n": 1})

    async def guard(ctx: RunContext[Any]) -> None:
        await answered.wait()
        await anyio.sleep(0.02)
        raise ValueError("no")

    looks = Looks()
    with anyio.fail_after(10):
        result = await agent_of(looks, client=ScriptedModel(reply), guard=guard).run("go")
    assert (result.stop_reason, looks.calls) == ("guard", [])
    assert_continuable(result)


async def test_guards_work_side_by_side_and_the_first_that_raises_cancels_the_others():
    ended: list[str] = []
    begun = anyio.Event()

    async def slow(ctx: RunContext[Any]) -> None:
        begun.set()
        try:
            await anyio.sleep(60)
        finally:
            ended.append("slow")

    async def quick(ctx: RunContext[Any]) -> None:
        await begun.wait()
        raise ValueError("no")

    with anyio.fail_after(10):
        result = await agent_of(Looks(), guard=[slow, quick]).run("go")
    assert (result.error, ended) == ("guard 'quick' stopped the run: ValueError: no", ["slow"])


async def test_a_model_that_fails_ends_the_run_and_its_guards():
    ended: list[str] = []

    async def slow(ctx: RunContext[Any]) -> None:
        try:
            await anyio.sleep(60)
        finally:
            ended.append("slow")

    script = ScriptedModel([answers.failure(400, "no")])
    with anyio.fail_after(10):
        result = await agent_of(Looks(), client=script, guard=slow).run("go")
    assert isinstance(result.exception, StatusError)
    assert ended == ["slow"]


async def test_a_guard_looks_once_and_not_at_each_request():
    seen: list[int] = []

    async def guard(ctx: RunContext[Any]) -> None:
        seen.append(len(ctx.messages))

    script = ScriptedModel([answers.empty(), answers.call("look", {"n": 1}), "done"])
    assert (await agent_of(Looks(), client=script, guard=guard).run("go")).content == "done"
    assert seen == [1]


async def test_a_guard_holds_when_a_hook_answers_in_the_place_of_the_model():
    async def cached(ctx: RunContext[Any], request: PendingRequest, next: NextRequest) -> str:
        return "cached"

    async def guard(ctx: RunContext[Any]) -> None:
        await anyio.sleep(0.01)
        raise ValueError("no")

    result = await agent_of(Looks(), guard=guard, around_model=cached).run("go")
    assert result.stop_reason == "guard"


async def test_a_delegates_guard_guards_its_own_run_and_the_run_above_goes_on():
    looks = Looks()
    child = agent_of(looks, guard=refuse)
    ask = ScriptedModel([answers.call("delegate_to_a", {"query": "steal"}), "sorry"])
    above = BaseAgent("Above", "You ask.", client=ask).register_delegate(child)
    result = await above.run("go")
    assert (result.content, looks.calls) == ("sorry", [])
    assert "(guard): guard 'refuse' stopped the run: PermissionError: not steal" in (result.tool_results[0].error or "")


async def test_a_direct_tool_call_asks_no_model_and_so_no_guard():
    assert (await agent_of(Looks(), guard=refuse).execute_tool("look", n=3)).content == "seen 3"


async def test_a_guard_may_ask_a_model_of_its_own_with_the_budget_of_the_run():
    judge = BaseAgent("Judge", "You judge.", client=ScriptedModel(lambda request: "unsafe"))

    async def guard(ctx: RunContext[Any]) -> None:
        verdict = await judge.run(ctx.messages[-1]["content"])
        if verdict.content != "safe":
            raise ValueError(verdict.content)

    result = await agent_of(Looks(), client=Waiting(), guard=guard).run("go")
    assert (result.stop_reason, result.usage.requests) == ("guard", 2)
    result = await agent_of(Looks(), client=Waiting(), guard=guard, limits=Limits(max_requests=1)).run("go", timeout=5)
    assert result.stop_reason in ("guard", "budget")


# ---- streams


async def test_text_is_streamed_while_guards_look_and_the_run_ends_when_one_raises():
    class Speaking:
        async def respond(self, request: ModelRequest) -> Reply:
            raise AssertionError("it is streamed")

        async def stream(self, request: ModelRequest, sink: Sink) -> Reply:
            await sink(Delta("text", "so "))
            said.set()
            await anyio.sleep(60)
            raise AssertionError

    async def guard(ctx: RunContext[Any]) -> None:
        await said.wait()
        raise ValueError("no")

    said = anyio.Event()
    with anyio.fail_after(10):
        async with agent_of(Looks(), client=Speaking(), guard=guard).stream("go") as stream:
            events = [event async for event in stream]
    kinds = [event.kind for event in events]
    assert kinds == ["run_started", "model_requested", "text_delta", "run_finished"]
    assert events[-1].result.stop_reason == "guard"


async def test_a_guard_over_the_wire_closes_the_request(endpoint: StartEndpoint):
    server = endpoint(lambda request: answers.hang())

    async def guard(ctx: RunContext[Any]) -> None:
        await in_thread(until, lambda: bool(server.requests))
        raise ValueError("no")

    agent = BaseAgent("A", "a", guard=guard)
    async with agent:
        with anyio.fail_after(10):
            assert (await agent.run("go")).stop_reason == "guard"


# ---- time and cancellation


async def test_a_guard_that_hangs_has_the_time_of_the_run():
    async def hang(ctx: RunContext[Any]) -> None:
        assert ctx.remaining() < 1
        await anyio.sleep(60)

    result = await agent_of(Looks(), guard=hang).run("go", timeout=0.05)
    assert result.stop_reason == "deadline"
    assert "at last it waited for its guards" in (result.error or "")


async def test_a_run_that_is_cancelled_cancels_its_guards():
    ended, begun = list[str](), anyio.Event()

    async def slow(ctx: RunContext[Any]) -> None:
        begun.set()
        try:
            await anyio.sleep(60)
        finally:
            ended.append("guard")

    model = Waiting()
    with anyio.fail_after(10):
        async with anyio.create_task_group() as group:
            group.start_soon(agent_of(Looks(), client=model, guard=slow).run, "go")
            await begun.wait()
            await model.asked.wait()
            group.cancel_scope.cancel()
    assert (ended, model.ended) == (["guard"], ["cancelled"])


async def test_a_plain_guard_that_cannot_be_stopped_is_told_of():
    go_on, begun = threading.Event(), threading.Event()

    def slow(ctx: RunContext[Any]) -> None:
        begun.set()
        go_on.wait(20)

    async def quick(ctx: RunContext[Any]) -> None:
        await in_thread(begun.wait, 10)
        raise ValueError("no")

    try:
        with anyio.fail_after(10):
            result = await agent_of(Looks(), guard=[slow, quick]).run("go")
        assert result.stop_reason == "guard"
        assert [warning for warning in result.warnings if "slow could not be stopped" in warning]
    finally:
        go_on.set()
