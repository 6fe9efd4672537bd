"""What a model may ask of tools, and what tools may do: every call has one outcome, and the run goes on."""

from __future__ import annotations

import asyncio
import dataclasses
import datetime
import threading
import time
from collections.abc import Callable
from typing import Any

import anyio
import pytest
import trio
from pydantic import BaseModel

from fractal import (
    AgentResult,
    AgentToolkit,
    BaseAgent,
    InvalidArguments,
    Limits,
    RunContext,
    RunError,
    ToolErrors,
    ToolFailed,
    UnexpectedError,
    abandoned_threads,
    tool,
)
from fractal.testing import Endpoint, ScriptedModel, answers
from tests.support import assert_continuable, calls_then, come_about, outcomes

StartEndpoint = Callable[..., Endpoint]


class Point(BaseModel):
    x: int
    y: int = 0


@dataclasses.dataclass
class Pair:
    left: str
    right: datetime.date


class Opaque:
    def __str__(self) -> str:
        return "opaque"


async def ask(function: Any, arguments: Any = "{}", **options: Any) -> AgentResult:
    """One run in which the model calls the one tool there is, then says "done"."""
    agent = BaseAgent("A", "a", **options)
    made = agent.add_tool(function)
    name = next(iter(made.get_tools()))
    model = ScriptedModel(lambda request: "done" if len(request.transcript) > 1 else answers.call(name, arguments))
    agent = BaseAgent("A", "a", client=model, **options).add_tool(function)
    result = await agent.run("go")
    assert_continuable(result)
    return result


def seen(result: AgentResult) -> str:
    """What the model was told of the first call."""
    return result.messages[2]["content"]


@pytest.mark.parametrize(
    ("value", "text"),
    [
        ("plain text", "plain text"),
        ("", ""),
        (None, "null"),
        (3, "3"),
        (2.5, "2.5"),
        (True, "true"),
        ({"a": [1]}, '{"a":[1]}'),
        (["é", 1], '["é",1]'),
        (Point(x=1), '{"x":1,"y":0}'),
        ([Point(x=1), Point(x=2)], '[{"x":1,"y":0},{"x":2,"y":0}]'),
        (Pair("l", datetime.date(2026, 1, 2)), '{"left":"l","right":"2026-01-02"}'),
        (datetime.date(2026, 1, 2), '"2026-01-02"'),
        ({1}, "[1]"),
        (b"text", "text"),
        (b"\xff\x00", "/wA="),
        (float("nan"), "NaN"),
        ("lone \ud800 surrogate\x00", "lone � surrogate\x00"),
        ({"k": "\ud800"}, '{"k": "�"}'),
    ],
    ids=repr,
)
@pytest.mark.parametrize("is_async", [True, False], ids=["async", "def"])
async def test_whatever_a_tool_returns_is_kept_and_shown_as_json(value: object, text: str, is_async: bool):
    async def asynchronous() -> Any:
        return value

    def plain() -> Any:
        return value

    result = await ask(asynchronous if is_async else plain)
    assert outcomes(result) == ["ok"]
    assert result.tool_results[0].content is value
    assert seen(result) == text


async def test_what_json_cannot_take_is_shown_by_its_str():
    loop: list[Any] = []
    loop.append(loop)
    for value, text in [(Opaque(), "opaque"), ({"o": Opaque()}, '{"o":"opaque"}'), (loop, "[[...]]")]:
        result = await ask(lambda value=value: value)
        assert outcomes(result) == ["ok"]
        assert seen(result) == text


async def test_a_plain_function_that_hands_out_a_coroutine_is_awaited():
    async def later() -> Point:
        await anyio.sleep(0)
        return Point(x=5)

    def outer():
        return later()

    result = await ask(outer)
    assert result.tool_results[0].content == Point(x=5)


@pytest.mark.parametrize("is_async", [True, False], ids=["async", "def"])
@pytest.mark.parametrize(
    ("error", "text"),
    [
        (ValueError("no such city"), "Error: ValueError: no such city"),
        (KeyError("x"), "Error: KeyError: 'x'"),
        (RuntimeError(), "Error: RuntimeError"),
        (SystemExit(3), "Error: the tool called sys.exit(3)"),
        (ExceptionGroup("several", [ValueError("a"), TypeError("b")]), "Error: ValueError: a; TypeError: b"),
        (BaseExceptionGroup("exits", [SystemExit(1), ValueError("b")]), "Error: the tool called sys.exit(1); "),
        (StopIteration("stop"), "Error: "),
        (RecursionError("deep"), "Error: RecursionError: deep"),
        (ValueError("bad \ud800"), "Error: ValueError: bad �"),
    ],
    ids=lambda value: repr(value)[:30],
)
async def test_whatever_a_tool_raises_goes_to_the_model_and_the_run_goes_on(
    error: BaseException, text: str, is_async: bool
):
    async def asynchronous() -> None:
        raise error

    def plain() -> None:
        raise error

    result = await ask(asynchronous if is_async else plain)
    assert result.content == "done"
    assert outcomes(result) == ["error"]
    assert seen(result).startswith(text)
    assert result.tool_results[0].error is not None
    assert result.tool_results[0].exception is not None


async def test_a_failing_tool_does_not_disturb_its_siblings():
    async def fails() -> None:
        raise ValueError("at once")

    async def succeeds() -> str:
        await anyio.sleep(0.05)
        return "fine"

    model = ScriptedModel([[answers.call("fails"), answers.call("succeeds"), answers.call("fails")], "done"])
    agent = BaseAgent("A", "a", client=model).add_tool(fails).add_tool(succeeds)
    result = await agent.run("go")
    assert outcomes(result) == ["error", "ok", "error"]


async def test_a_tool_can_end_the_run_with_its_error_after_its_siblings():
    siblings: list[str] = []

    @tool(on_error="raise")
    async def fatal() -> None:
        raise ValueError("broken")

    async def sibling() -> str:
        await anyio.sleep(0.05)
        siblings.append("ended")
        return "fine"

    model = ScriptedModel([[answers.call("fatal"), answers.call("sibling")]])
    result = await BaseAgent("A", "a", client=model).add_tool(fatal).add_tool(sibling).run("go")
    assert siblings == ["ended"]
    assert not result.success
    assert result.stop_reason == "tool_error"
    assert outcomes(result) == ["error", "ok"]
    assert_continuable(result)
    with pytest.raises(ToolFailed, match="broken") as caught:
        result.raise_for_error()
    assert isinstance(caught.value.__cause__, ValueError)
    assert caught.value.result is result


async def test_all_that_failed_at_once_is_in_one_group_in_call_order_with_each_cause():
    second_has_failed = anyio.Event()

    @tool(on_error="raise")
    async def search() -> None:
        await second_has_failed.wait()
        raise ValueError("offline")

    @tool(on_error="raise")
    async def charge() -> None:
        second_has_failed.set()
        async with anyio.create_task_group():
            raise KeyError("card")

    async def told_to_the_model() -> None:
        raise OSError("disk")

    asked = ["search", "told_to_the_model", "charge", "search", "search"]
    model = ScriptedModel([[answers.call(name) for name in asked]])
    agent = BaseAgent("A", "a", client=model, toolkit=AgentToolkit(search, charge, told_to_the_model))
    result = await agent.run("go", limits=Limits(max_tool_calls=3))
    assert outcomes(result) == ["error", "error", "error", "skipped", "skipped"]
    assert_continuable(result)
    with pytest.raises(RunError) as caught:
        result.raise_for_error()
    assert type(caught.value) is ToolErrors
    assert caught.value.result is result
    assert [repr(error.__cause__) for error in caught.value.exceptions] == [
        "ValueError('offline')",
        "KeyError('card')",
        "None",
    ]
    assert result.stop_reason == "tool_error"
    assert result.error == (
        "3 failures at once:\n"
        "- tool 'search' failed: ValueError: offline\n"
        "- tool 'charge' failed: KeyError: 'card'\n"
        "- the budget of 3 tool calls is spent (3 used or reserved, over the whole tree)"
    )


async def test_of_an_answer_that_cannot_be_checked_beside_a_failing_tool_both_are_told():
    @tool(on_error="raise")
    async def search() -> None:
        raise ValueError("offline")

    def agent(fault: Exception) -> BaseAgent:
        model = ScriptedModel([[answers.call("final_answer", {"result": 7}), answers.call("search")]])
        agent = BaseAgent("A", "a", client=model, output_type=int, output_mode="tool").add_tool(search)

        @agent.output_validator
        async def check(number: int) -> None:
            raise fault

        return agent

    error = (await agent(LookupError("no table")).run("go")).exception
    assert isinstance(error, ToolErrors)
    assert [type(each) for each in error.exceptions] == [UnexpectedError, ToolFailed]
    assert [type(each.__cause__) for each in error.exceptions] == [LookupError, ValueError]
    # Wrong use is raised at once, whatever else went wrong.
    with pytest.raises(InvalidArguments, match="no agent"):
        await agent(InvalidArguments("no agent")).run("go")


async def test_several_failures_stay_one_error_on_their_way_through_tasks_and_tools():
    @tool(on_error="raise")
    async def fails() -> None:
        raise ValueError("broken")

    below = ScriptedModel([[answers.call("fails"), answers.call("fails")]] * 2)
    inner = BaseAgent("inner", "i", client=below).add_tool(fails)

    @tool(on_error="raise")
    async def ask_inner() -> None:
        async with anyio.create_task_group():
            (await inner.run("go")).raise_for_error()

    async def prompt() -> str:
        await ask_inner()
        return "never"

    outer = BaseAgent("outer", "o", client=ScriptedModel([answers.call("ask_inner")])).add_tool(ask_inner)
    for agent in (outer, BaseAgent("prompted", prompt, client=ScriptedModel([]))):
        error = (await agent.run("go")).exception
        assert error is not None
        assert type(error.__cause__) is ToolErrors
        assert "2 failures at once:\n- tool 'fails' failed: ValueError: broken" in str(error)


async def test_a_tool_whose_own_task_was_cancelled_has_failed_and_nothing_else_is_cancelled(
    anyio_backend_name: str,
):
    async def cancels_itself() -> None:
        if anyio_backend_name == "asyncio":
            task = asyncio.ensure_future(asyncio.sleep(5))
            await asyncio.sleep(0)
            task.cancel()
            await task
        else:
            raise RuntimeError("cancelled from inside")

    result = await ask(cancels_itself)
    assert result.content == "done"
    assert outcomes(result) == ["error"]
    assert "cancelled from inside" in seen(result)


async def test_a_model_whose_own_task_was_cancelled_has_failed_and_the_caller_is_not_cancelled(anyio_backend_name: str):
    class Model:
        async def respond(self, request: object) -> Any:
            task = asyncio.ensure_future(asyncio.sleep(5))
            await asyncio.sleep(0)
            task.cancel()
            await task

    if anyio_backend_name == "asyncio":
        result = await BaseAgent("A", "a", client=Model()).run("go")
        assert (result.success, result.metadata["error_type"]) == (False, "unexpected_error")


async def test_a_tool_that_fails_while_it_is_timed_out_disturbs_nobody():
    async def messy() -> None:
        async with anyio.create_task_group() as group:
            group.start_soon(anyio.sleep, 5)
            try:
                await anyio.sleep(5)
            finally:
                raise ValueError("cleanup failed")

    result = await ask(messy, limits=Limits(tool_timeout=0.05))
    assert result.content == "done"
    assert outcomes(result) == ["timeout"]
    assert "cleanup failed" in seen(result)


async def native_children(anyio_backend_name: str) -> None:
    """A tool that opens a task group of the event loop's own."""
    if anyio_backend_name == "trio":
        async with trio.open_nursery() as nursery:
            nursery.start_soon(trio.sleep, 5)
            nursery.start_soon(trio.sleep, 5)
            await trio.sleep(5)
    else:
        async with asyncio.TaskGroup() as group:
            group.create_task(asyncio.sleep(5))
            await asyncio.sleep(5)


async def test_a_tool_with_native_child_tasks_is_cut_like_any_other(anyio_backend_name: str):
    async def children() -> None:
        await native_children(anyio_backend_name)

    result = await ask(children, limits=Limits(tool_timeout=0.05))
    assert (result.content, outcomes(result)) == ("done", ["timeout"])
    ended: list[Any] = []
    model = ScriptedModel([answers.call("children")])
    one = BaseAgent("A", "a", client=model, observers=[lambda e: ended.append(e) if e.kind == "run_finished" else None])
    with anyio.move_on_after(0.05) as scope:
        await one.add_tool(children).run("go")
    assert scope.cancelled_caught
    assert outcomes(ended[0].result) == ["cancelled"]
    assert_continuable(ended[0].result)


async def test_a_direct_call_that_is_cancelled_still_ends_in_the_events():
    events: list[Any] = []

    @tool(sequential=True)
    async def slow() -> None:
        await anyio.sleep(5)

    one = BaseAgent("A", "a", observers=[events.append])
    with anyio.move_on_after(0.05):
        await one.add_tool(slow).execute_tool("slow")
    assert [event.kind for event in events] == ["run_started", "tool_started", "tool_finished", "run_finished"]
    assert events[2].result.outcome == "cancelled"
    assert events[3].result.stop_reason == "cancelled"
    assert_continuable(events[3].result)


async def test_a_tool_that_uses_asyncio_on_trio_is_told_what_is_wrong(anyio_backend_name: str):
    async def uses_asyncio() -> str:
        await asyncio.sleep(0)
        await asyncio.get_running_loop().run_in_executor(None, time.sleep, 0)
        return "ok"

    result = await ask(uses_asyncio)
    if anyio_backend_name == "trio":
        assert outcomes(result) == ["error"]
        assert "use anyio" in seen(result)
    else:
        assert outcomes(result) == ["ok"]


@pytest.mark.parametrize(
    ("arguments", "fault"),
    [
        ('{"n": ', "not valid JSON"),
        ("[1]", "must be a JSON object"),
        ("null", "'n' is missing"),
        ("{}", "'n' is missing"),
        ('{"n": 1, "m": 2}', "there is no parameter 'm', only n"),
        ('{"n": "abc"}', "'n': Input should be a valid integer"),
        ('{"n": "\\ud800"}', "not valid JSON"),
        ('{"n": ' + "[" * 5000 + "]" * 5000 + "}", "fit"),
    ],
    ids=lambda value: value[:20],
)
async def test_arguments_that_do_not_fit_go_back_to_the_model_and_nothing_is_called(arguments: str, fault: str):
    called: list[int] = []

    def count(n: int) -> None:
        called.append(n)

    result = await ask(count, arguments)
    assert result.content == "done"
    assert outcomes(result) == ["error"]
    assert fault in seen(result)
    assert called == []


async def test_an_unknown_tool_is_answered_with_the_names_there_are():
    model = ScriptedModel([[answers.call("nope", {"a": 1})], "done"])
    agent = BaseAgent("A", "a", client=model).add_tool(len, name="show")
    result = await agent.run("go")
    assert result.content == "done"
    assert result.messages[2]["content"] == "Error: there is no tool 'nope'. Tools: show"


async def test_argument_names_never_collide_with_ours():
    def odd(self: str, name: str, tool_name: str, messages: str, ctx: str, context: RunContext) -> dict[str, Any]:
        return {"self": self, "name": name, "tool": tool_name, "all": messages + ctx, "called": context.tool_name}

    names = dict(self="s", name="n", tool_name="t", messages="m", ctx="c")
    expected = {"self": "s", "name": "n", "tool": "t", "all": "mc", "called": "odd"}
    result = await ask(odd, names)
    assert result.tool_results[0].content == expected
    direct = await BaseAgent("A", "a").add_tool(odd).execute_tool("odd", **names)
    assert direct.content == expected


async def test_a_direct_call_of_a_tool_never_raises():
    agent = BaseAgent("A", "a").add_tool(lambda n: 1 // n, name="divide")
    assert (await agent.execute_tool("nope")).error == "there is no tool 'nope'. Tools: divide"
    assert "'n' is missing" in str((await agent.execute_tool("divide")).error)
    failed = await agent.execute_tool("divide", n=0)
    assert failed.outcome == "error"
    assert "ZeroDivisionError" in str(failed.error)
    good = await agent.execute_tool("divide", n=1)
    assert (good.content, good.error, good.metadata) == (1, None, {"arguments": {"n": 1}, "terminate": False})


async def test_a_terminating_tool_ends_the_run_with_its_result_after_its_siblings(endpoint: StartEndpoint):
    ended: list[str] = []

    @tool(terminate=True)
    def report(x: int) -> Point:
        return Point(x=x)

    async def sibling() -> None:
        await anyio.sleep(0.05)
        ended.append("sibling")

    one = endpoint(calls_then("never", answers.call("report", {"x": 7}), answers.call("sibling")))
    result = await BaseAgent("A", "a").add_tool(report).add_tool(sibling).run("go")
    assert result.content == Point(x=7)
    assert (result.success, result.stop_reason) == (True, "terminated")
    assert ended == ["sibling"]
    assert len(one.requests) == 1
    assert_continuable(result)


async def test_a_terminating_tool_that_fails_does_not_end_the_run():
    @tool(terminate=True)
    def report(x: int) -> Point:
        return Point(x=x)

    result = await ask(report, {"x": "many"})
    assert result.content == "done"


async def test_plain_tools_run_at_the_same_time_and_never_block_the_loop(endpoint: StartEndpoint):
    stalls: list[float] = []

    async def watch_the_loop() -> None:
        while True:
            before = time.perf_counter()
            await anyio.sleep(0.005)
            stalls.append(time.perf_counter() - before - 0.005)

    def blocks(n: int) -> int:
        time.sleep(0.5)
        return n

    endpoint(calls_then("done", *[answers.call("blocks", {"n": n}) for n in range(3)]))
    agent = BaseAgent("A", "a").add_tool(blocks)
    await agent.run("warm up")
    stalls.clear()
    async with anyio.create_task_group() as group:
        group.start_soon(watch_the_loop)
        result = await agent.run("go")
        group.cancel_scope.cancel()
    assert [call.content for call in result.tool_results] == [0, 1, 2]
    took = max(call.elapsed for call in result.tool_results)
    assert 0.5 <= took < 1  # one after another would be 1.5
    assert max(stalls) < 0.25


async def test_sequential_tools_never_run_beside_another_call():
    running: set[str] = set()
    beside: list[set[str]] = []

    async def busy(name: str) -> None:
        running.add(name)
        beside.append(set(running))
        await anyio.sleep(0.02)
        running.discard(name)

    @tool(sequential=True)
    async def alone() -> None:
        await busy("alone")

    async def together(n: int) -> None:
        await busy(f"together {n}")

    calls = [answers.call("together", {"n": 1}), answers.call("together", {"n": 2}), answers.call("alone")]
    calls += [answers.call("alone"), answers.call("together", {"n": 3})]
    agent = BaseAgent("A", "a", client=ScriptedModel([calls, "done"])).add_tool(alone).add_tool(together)
    result = await agent.run("go")
    assert outcomes(result) == ["ok"] * 5
    assert {"together 1", "together 2"} in beside
    assert all(group == {"alone"} for group in beside if "alone" in group)


@pytest.mark.parametrize("is_async", [True, False], ids=["async", "def"])
async def test_a_tool_with_a_limit_of_its_own_keeps_it_over_all_runs(is_async: bool):
    lock = threading.Lock()
    state = {"now": 0, "most": 0}

    def enter(step: int) -> None:
        with lock:
            state["now"] += step
            state["most"] = max(state["most"], state["now"])

    @tool(max_concurrency=2)
    async def asynchronous() -> None:
        enter(1)
        await anyio.sleep(0.02)
        enter(-1)

    @tool(max_concurrency=2)
    def plain() -> None:
        enter(1)
        time.sleep(0.02)
        enter(-1)

    limited = asynchronous if is_async else plain
    name = limited.__name__
    model = ScriptedModel(
        lambda request: "done" if len(request.transcript) > 1 else [answers.call(name), answers.call(name)]
    )
    agent = BaseAgent("A", "a", client=model).add_tool(limited)
    async with anyio.create_task_group() as group:
        for _ in range(4):
            group.start_soon(agent.run, "go")
    assert state == {"now": 0, "most": 2}


async def test_an_abandoned_call_keeps_its_place_until_its_thread_ends():
    release, began = threading.Event(), []

    @tool(max_concurrency=1, timeout=0.3)
    def slow() -> str:
        began.append(1)
        release.wait(5)
        return "late"

    agent = BaseAgent("A", "a").add_tool(slow)
    first = await agent.execute_tool("slow")
    second = await agent.execute_tool("slow")
    assert (first.outcome, second.outcome) == ("abandoned", "timeout")
    assert len(began) == 1
    release.set()
    await come_about(lambda: not abandoned_threads())
    assert (await agent.execute_tool("slow")).outcome == "ok"


async def test_two_hundred_calls_in_one_reply_are_all_answered_in_call_order(endpoint: StartEndpoint):
    def plain(n: int) -> int:
        return n

    async def asynchronous(n: int) -> int:
        await anyio.sleep(0.001 * (n % 7))
        return n

    calls = [answers.call("plain" if n % 2 else "asynchronous", {"n": n}) for n in range(200)]
    endpoint(calls_then("done", *calls))
    result = await BaseAgent("A", "a").add_tool(plain).add_tool(asynchronous).run("go")
    assert [call.content for call in result.tool_results] == list(range(200))
    assert [m["content"] for m in result.messages if m["role"] == "tool"] == [str(n) for n in range(200)]
    assert_continuable(result)


async def test_a_tool_sees_the_run_it_is_called_in():
    seen_by_tool: dict[str, Any] = {}

    def look(ctx: RunContext[dict[str, str]], n: int) -> str:
        seen_by_tool.update(
            deps=ctx.deps, run_id=ctx.run_id, name=ctx.agent.name, tool=ctx.tool_name, left=ctx.remaining(),
            requests=ctx.usage.requests, roles=[m["role"] for m in ctx.messages], depth=ctx.depth,
        )  # fmt: skip
        ctx.check_cancelled()
        return "seen"

    async def look_async(ctx: RunContext) -> float:
        ctx.check_cancelled()
        with anyio.fail_after(1):
            await anyio.sleep(0)
            return ctx.remaining()

    model = ScriptedModel([[answers.call("look", {"n": 1}), answers.call("look_async")], "done"])
    agent = BaseAgent("A", "a", client=model).add_tool(look).add_tool(look_async)
    result = await agent.run("go", timeout=30, deps={"user": "u"})
    assert 29 < seen_by_tool.pop("left") <= 30
    assert seen_by_tool == {
        "deps": {"user": "u"}, "run_id": result.run_id, "name": "A", "tool": "look",
        "requests": 1, "roles": ["user", "assistant"], "depth": 0,
    }  # fmt: skip
    assert 0.9 < result.tool_results[1].content <= 1


async def test_a_tool_without_a_deadline_has_all_the_time_there_is():
    def left(ctx: RunContext) -> bool:
        return ctx.remaining() == float("inf")

    async def left_async(ctx: RunContext) -> bool:
        return ctx.remaining() == float("inf")

    agent = BaseAgent("A", "a").add_tool(left).add_tool(left_async)
    assert (await agent.execute_tool("left")).content is True
    assert (await agent.execute_tool("left_async")).content is True


async def test_tools_called_inside_tools_count_and_are_cut_with_the_run():
    class Nested(BaseAgent):
        @tool
        async def outer(self) -> object:
            return (await self.execute_tool("inner")).outcome

        @tool
        async def inner(self) -> None:
            await anyio.sleep(5)

    model = ScriptedModel([[answers.call("outer")]])
    result = await Nested("A", "a", client=model).run("go", timeout=0.2)
    assert result.stop_reason == "deadline"
    assert outcomes(result) == ["timeout"]
    assert result.usage.tool_calls == 2


def test_a_toolkit_serves_several_agents_and_is_not_changed_by_them():
    kit = AgentToolkit()
    kit.add_tool(len, name="length")
    one, two = BaseAgent("1", "", toolkit=kit), BaseAgent("2", "", toolkit=kit)
    one.add_tool(len, name="show")
    assert list(one.get_tools()) == ["length", "show"]
    assert list(two.get_tools()) == ["length"]
    assert list(kit.get_tools()) == ["length"]


@pytest.mark.skipif(not hasattr(asyncio, "eager_task_factory"), reason="Python 3.12 has such tasks")
def test_where_tasks_begin_at_once_a_call_that_ends_the_run_stops_those_after_it():
    begun: list[str] = []

    async def interrupted() -> None:
        raise KeyboardInterrupt

    async def pay() -> None:
        begun.append("pay")

    model = ScriptedModel([[answers.call("look"), answers.call("interrupted"), answers.call("pay")], "done"])
    agent = BaseAgent("A", "a", client=model, toolkit=[interrupted, pay, tool(lambda: "rain", name="look")])

    async def ask() -> type[BaseException] | None:
        asyncio.get_running_loop().set_task_factory(vars(asyncio)["eager_task_factory"])
        try:
            await agent.run("go", timeout=5)
        except BaseException as error:
            return type(error)
        return None

    assert asyncio.run(ask()) is KeyboardInterrupt
    assert begun == []
