"""Runs of every kind, short enough to be cancelled at each of their points.

Each scenario is made once, with its agents, and then called again and again; each call is told to the same watch.
"""

from __future__ import annotations

import time
from collections.abc import AsyncGenerator, Awaitable, Callable
from contextlib import aclosing, suppress
from typing import Any

import anyio

import fractal.sync
from fractal import (
    AnswerRejected,
    BaseAgent,
    FallbackModel,
    LimitedModel,
    Limits,
    OpenAIModel,
    RaceModel,
    RunContext,
    RunError,
    run_many,
    stream_many,
    tool,
)
from fractal.events import ToolStarted
from fractal.model import ModelRequest
from fractal.models._http import pool as _pool
from fractal.testing import ScriptedModel, answers
from fractal.testing._recording import assert_well_formed
from fractal.testing.answers import AnswerLike
from fractal.testing.endpoint import RecordedRequest
from tests.streams import Watch
from tests.support import assert_continuable

Scenario = Callable[[], Awaitable[object]]

SCENARIOS: dict[str, Callable[[Watch], Scenario]] = {}
OVER_HTTP: set[str] = set()
"""Names of those that need an endpoint, which answers with `answer_over_http`."""

MOMENT = 0.0005
"""Seconds: long enough that others take a step meanwhile."""


def scenario(make: Callable[[Watch], Scenario]) -> Callable[[Watch], Scenario]:
    SCENARIOS[make.__name__] = make
    return make


def over_http(make: Callable[[Watch], Scenario]) -> Callable[[Watch], Scenario]:
    OVER_HTTP.add(make.__name__)
    return scenario(make)


def check_events(watch: Watch) -> None:
    """What was told makes sense, and can go on from there; nothing of it is still in use. Forgets it."""
    assert_well_formed(watch)
    for result in watch.results():
        assert_continuable(result)
        assert "Cancelled" not in str(result.error), "a cancellation is no error of the run's"
    watch.clear()
    assert BUYING.begun == BUYING.ended, "a tool that must be waited for goes on"
    for pool in _pool._pools_here():
        opened = pool._connections._open if pool._connections is not None else ()
        assert all(connection.is_idle for connection in opened), "a connection is in use"


# ---- what they are made of


class BUYING:
    """How often it was begun and ended, over all runs."""

    begun = ended = 0


@tool
async def look(where: str = "here") -> str:
    """Look."""
    await anyio.sleep(0)
    return where


@tool
async def tidy() -> str:
    """Clean up at the end, for a moment."""
    try:
        await anyio.sleep(MOMENT)
    finally:
        with anyio.CancelScope(shield=True):
            await anyio.sleep(0)
    return "tidy"


@tool
def read(ctx: RunContext) -> str:
    """Read, in a thread that may be left."""
    time.sleep(MOMENT)
    return f"{ctx.remaining() > 0}"


@tool(on_cancel="wait")
def buy() -> str:
    """Buy, in a thread that is waited for."""
    BUYING.begun += 1
    time.sleep(MOMENT)
    BUYING.ended += 1
    return "bought"


def calls(*names: str) -> AnswerLike:
    return answers.calls(*(answers.call(name) for name in names))


def by_turn(*turns: AnswerLike) -> ScriptedModel:
    """A model that answers a conversation of so many of its own turns, and the next one in the same way."""

    def reply(request: ModelRequest) -> AnswerLike:
        said = sum(message["role"] == "assistant" for message in request.transcript.messages)
        return turns[min(said, len(turns) - 1)]

    return ScriptedModel(reply)


def agent(watch: Watch, *turns: AnswerLike, tools: Any = (), **options: Any) -> BaseAgent:
    options.setdefault("client", by_turn(*turns))
    options.setdefault("limits", Limits(max_requests=50, max_tokens=1_000_000))
    return BaseAgent("A", "You try.", toolkit=[look, tidy, read, buy, *tools], observers=[watch], **options)


# ---- in memory


@scenario
def async_tools_side_by_side(watch: Watch) -> Scenario:
    one = agent(watch, calls("look", "tidy", "look"), calls("tidy"), "done")
    return lambda: one.run("go", timeout=60)


@scenario
def tools_in_threads(watch: Watch) -> Scenario:
    one = agent(watch, calls("read", "buy", "look"), "done")
    return lambda: one.run("go")


@scenario
def sequential_tools_with_every_limit(watch: Watch) -> Scenario:
    @tool(sequential=True, timeout=9)
    async def first() -> str:
        await anyio.sleep(0)
        return "first"

    limits = Limits(max_requests=9, max_tokens=99_999, request_timeout=9, tool_timeout=9, grace=2, reserve=1)
    one = agent(watch, calls("look", "first", "buy"), "done", limits=limits, tools=[first])
    return lambda: one.run("go", timeout=60)


@scenario
def tools_that_may_be_left(watch: Watch) -> Scenario:
    one = agent(watch, calls("look", "tidy"), "done", limits=Limits(on_stubborn="raise", max_tokens=99_999))
    return lambda: one.run("go")


@scenario
def delegates_three_deep(watch: Watch) -> Scenario:
    deepest = agent(watch, calls("look", "buy"), "deep")
    ask = answers.call("down", {"query": "?"})
    middle = agent(watch, answers.calls(ask, answers.call("look")), "middle").register_delegate(deepest, "down")
    upper = agent(watch, answers.calls(ask, ask), "upper").register_delegate(middle, "down")
    top = agent(watch, answers.calls(ask), "top").register_delegate(upper, "down")
    return lambda: top.run("go", timeout=60)


@scenario
def agents_called_in_tools(watch: Watch) -> Scenario:
    child = agent(watch, calls("tidy"), "child")

    async def ask() -> str:
        return str(await top.call_agent(child, "?"))

    async def read_along() -> str:
        async with child.stream("?", buffer=0) as stream:
            return "".join([piece async for piece in stream.text()])

    top = agent(watch, calls("ask", "read_along"), "top", tools=[ask, read_along])
    return lambda: top.run("go")


@scenario
def the_facade_in_a_tool(watch: Watch) -> Scenario:
    child = agent(watch, calls("look"), "child")

    @tool(on_cancel="wait")
    def ask() -> str:
        return str(fractal.sync.run(child, "?").content)

    top = agent(watch, calls("ask", "look"), "top", tools=[ask])
    return lambda: top.run("go")


@scenario
def a_stream_to_its_end(watch: Watch) -> Scenario:
    one = agent(watch, calls("look", "read"), "some words of text")

    async def go() -> None:
        async with one.stream("go", buffer=1) as stream:
            async for _ in stream.text():
                pass
        await stream.result()

    return go


@scenario
def a_stream_that_is_left(watch: Watch) -> Scenario:
    one = agent(watch, calls("look", "buy"), "some words of text")

    async def go() -> None:
        async with one.stream("go", buffer=0) as stream:
            async for event in stream:
                if isinstance(event, ToolStarted):
                    break

    return go


@scenario
def retries_after_a_pause(watch: Watch) -> Scenario:
    failing = answers.failure(429, "slow down", retry_after=MOMENT)

    def go() -> Awaitable[object]:
        script = ScriptedModel([failing, failing, calls("look"), failing, "done"])
        return agent(watch, client=script).run("go", timeout=60)

    return go


@scenario
def places_for_one_call_at_a_time(watch: Watch) -> Scenario:
    async def go() -> None:
        # Made each time, with limits of their own: a place that one run has lost must not stop the next.
        @tool(max_concurrency=1)
        async def alone() -> str:
            await anyio.sleep(0)
            return "alone"

        @tool(max_concurrency=1, on_cancel="wait")
        def alone_in_a_thread() -> str:
            return "alone"

        one = agent(watch, calls(*["alone", "alone_in_a_thread"] * 2), "done", tools=[alone, alone_in_a_thread])
        async with anyio.create_task_group() as group:
            group.start_soon(one.run, "go")
            group.start_soon(one.run, "go")

    return go


@scenario
def a_model_with_a_queue(watch: Watch) -> Scenario:
    slow = ScriptedModel(lambda request: answers.text("done", delay=MOMENT))
    one = agent(watch, client=LimitedModel(slow, max_concurrency=1, rate=(2, MOMENT * 4)))
    return lambda: run_many(one, ["a", "b", "c"])


@scenario
def approvals(watch: Watch) -> Scenario:
    @tool(requires_approval=True)
    async def pay(amount: int) -> str:
        return f"paid {amount}"

    async def approve(call: Any) -> bool:
        await anyio.sleep(0)
        return call.arguments["amount"] < 3

    one = agent(watch, answers.calls(*(answers.call("pay", {"amount": n}) for n in (1, 5))), "done", tools=[pay])

    async def go() -> None:
        await one.run("go", approve=approve)
        await one.run("go", approve=lambda call: True)

    return go


@scenario
def an_answer_that_is_asked_for_again(watch: Watch) -> Scenario:
    one = agent(watch, "[1", "[7]", "[3]", output_type=list[int], output_mode="prompt")

    @one.output_validator
    async def small(value: list[int]) -> None:
        await anyio.sleep(0)
        if value[0] > 5:
            raise AnswerRejected("too big")

    @one.output_validator
    def fine(value: list[int]) -> list[int]:
        return value

    return lambda: one.run("go")


@scenario
def a_conversation_that_is_summed_up(watch: Watch) -> Scenario:
    async def compact(messages: list[Any]) -> str:
        await anyio.sleep(0)
        return f"{len(messages)} messages"

    history = [{"role": role, "content": "x" * 200} for role in ("user", "assistant") * 4]

    def reply(request: ModelRequest) -> AnswerLike:
        return "done" if request.transcript.messages[-1]["role"] == "tool" else calls("look")

    one = agent(watch, client=ScriptedModel(reply), context_window=700, compact=compact)
    return lambda: one.run("go", messages=history)


@scenario
def many_runs(watch: Watch) -> Scenario:
    one = agent(watch, calls("look"), "done")

    async def go() -> None:
        await run_many(one, range(3), max_concurrency=2)
        async with stream_many(one, range(3), max_concurrency=2, buffer=0) as batch:
            async for _ in batch:
                break

    return go


@scenario
def one_model_after_the_other(watch: Watch) -> Scenario:
    bad, hanging = by_turn(answers.failure(400, "no")), by_turn(answers.hang())
    failing = agent(watch, client=FallbackModel(bad, by_turn("done")))
    slow = agent(watch, client=FallbackModel(hanging, by_turn("done"), after=MOMENT))

    async def go() -> None:
        await failing.run("go")
        await slow.run("go")

    return go


@scenario
def models_in_a_race(watch: Watch) -> Scenario:
    late = by_turn(answers.text("late", delay=60))
    one = agent(watch, client=RaceModel(late, by_turn(answers.text("done", delay=MOMENT)), by_turn(answers.empty())))

    async def go() -> None:
        await one.run("go")
        async with one.stream("go") as stream:
            async for _ in stream:
                pass

    return go


@scenario
def models_in_front_of_models(watch: Watch) -> Scenario:
    hanging, bad = by_turn(answers.hang()), by_turn(answers.failure(500, "busy", retry_after=MOMENT))
    one = agent(watch, client=FallbackModel(hanging, bad, by_turn("done well"), after=MOMENT))
    race = RaceModel(by_turn("one two three"), by_turn(answers.text("late", delay=MOMENT)))
    other = agent(watch, client=LimitedModel(race, max_concurrency=1))

    async def go() -> None:
        async with one.stream("go", buffer=0) as stream:
            async for _ in stream:
                pass
        async with other.stream("go", buffer=0) as first, other.stream("go", buffer=0) as second:
            async for _ in first:
                break
            async for _ in second:
                pass

    return go


@scenario
def delegates_side_by_side(watch: Watch) -> Scenario:
    child = agent(watch, calls("look", "buy", "read"), "child", limits=Limits(max_tokens=10_000))
    ask = answers.call("down", {"query": "?"})
    one = agent(watch, answers.calls(ask, ask, answers.call("look")), "done").register_delegate(child, "down")
    return lambda: one.run("go")


@scenario
def tools_with_tasks_of_their_own(watch: Watch) -> Scenario:
    async def grouped() -> str:
        async with anyio.create_task_group() as group:
            group.start_soon(anyio.sleep, MOMENT)
            with anyio.move_on_after(MOMENT):
                await anyio.sleep(60)
        return "grouped"

    async def failing() -> str:
        async with anyio.create_task_group() as group:
            group.start_soon(anyio.sleep, 60)
            await anyio.sleep(0)
            raise ValueError("failed")

    one = agent(watch, calls("grouped", "failing", "grouped"), "done", tools=[grouped, failing])
    return lambda: one.run("go")


@scenario
def a_tool_that_ends_the_run(watch: Watch) -> Scenario:
    @tool(on_error="raise")
    async def failing() -> str:
        await anyio.sleep(0)
        raise ValueError("failed")

    one = agent(watch, calls("failing", "tidy", "buy"), "never", tools=[failing])
    return lambda: one.run("go")


@scenario
def tools_that_take_a_few_cancellations(watch: Watch) -> Scenario:
    async def stubborn() -> str:
        for _ in range(3):
            with suppress(BaseException):
                await anyio.sleep(0)
        return "finally"

    waited_for = agent(watch, calls("stubborn", "look"), "done", tools=[stubborn])
    left = agent(watch, calls("stubborn", "look"), "done", tools=[stubborn], limits=Limits(on_stubborn="raise"))

    async def go() -> None:
        await waited_for.run("go")
        await left.run("go")

    return go


@scenario
def a_stream_that_a_tool_leaves_open(watch: Watch) -> Scenario:
    child = agent(watch, calls("tidy"), "some words")

    async def open_one() -> str:
        stream = child.stream("?")
        await stream.__aenter__()
        await stream.__anext__()
        return "left open"

    one = agent(watch, calls("open_one", "look"), "done", tools=[open_one])
    return lambda: one.run("go")


@scenario
def a_generator_around_a_stream(watch: Watch) -> Scenario:
    one = agent(watch, calls("look", "buy"), "some words of text")

    async def words() -> AsyncGenerator[str]:
        async with one.stream("go") as stream:
            async for piece in stream.text():
                yield piece

    async def go() -> None:
        async with aclosing(words()) as pieces:
            async for _ in pieces:
                pass

    return go


@scenario
def a_batch_that_fails_fast(watch: Watch) -> Scenario:
    def reply(request: ModelRequest) -> AnswerLike:
        return answers.failure(400, "no") if request.transcript.messages[0]["content"] == "bad" else "fine"

    one = agent(watch, client=ScriptedModel(reply))

    async def go() -> None:
        with suppress(RunError):
            await run_many(one, ["good", "bad", "good"], max_concurrency=2, on_error="fail_fast")

    return go


@scenario
def the_facade_in_hooks(watch: Watch) -> Scenario:
    child = agent(watch, "yes")

    @tool(requires_approval=True)
    async def pay() -> str:
        return "paid"

    one = agent(watch, calls("pay"), "[1]", "[2]", tools=[pay], output_type=list[int], output_mode="prompt")

    @one.output_validator
    def other_than_one(value: list[int]) -> None:
        if fractal.sync.run(child, "?").success and value == [1]:
            raise AnswerRejected("another")

    return lambda: one.run("go", approve=lambda call: fractal.sync.run(child, "may it?").success)


@scenario
def a_tool_called_without_a_run(watch: Watch) -> Scenario:
    one = agent(watch, "done")

    async def go() -> None:
        await one.execute_tool("tidy")
        await one.execute_tool("buy")

    return go


# ---- over a real connection


def answer_over_http(request: RecordedRequest) -> AnswerLike:
    last = request.body["messages"][-1]
    return "some words of text" if last["role"] == "tool" else calls("look", "buy")


@over_http
def requests_over_http(watch: Watch) -> Scenario:
    one = agent(watch, client=None)
    return lambda: one.run("go")


@over_http
def more_requests_than_connections(watch: Watch) -> Scenario:
    one = agent(watch, client=OpenAIModel(max_connections=1))
    return lambda: run_many(one, ["a", "b"])


@over_http
def a_long_request_over_http(watch: Watch) -> Scenario:
    one = agent(watch, client=None)
    return lambda: one.run("go " + "x" * 100_000)


@over_http
def a_stream_over_http(watch: Watch) -> Scenario:
    one = agent(watch, client=None)

    async def go() -> None:
        async with one.stream("go", buffer=0) as stream:
            async for _ in stream:
                pass

    return go


@over_http
def delegates_over_http(watch: Watch) -> Scenario:
    child = agent(watch, client=None)
    ask = answers.calls(answers.call("delegate_to_a", {"query": "?"}), answers.call("look"))
    top = agent(watch, ask, "top").register_delegate(child)
    return lambda: top.run("go")
