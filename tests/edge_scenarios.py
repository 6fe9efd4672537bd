"""Runs at the edges of structured concurrency: what users begin, await, drop and cut in ways of their own.

They are cancelled at each of their points like the other scenarios, so that a cancellation from outside also comes
while a run's own time is over, a race ends, a batch fails, or something cleans up.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable
from contextlib import suppress
from contextvars import copy_context
from functools import partial
from typing import Any

import anyio
import anyio.to_thread
import sniffio
import trio

import fractal.sync
from fractal import BaseAgent, Limits, RaceModel, RunCancelled, RunError, run_many, stream_many, tool
from fractal.errors import ConnectionFailed
from fractal.model import ModelRequest, Reply
from fractal.testing import ScriptedModel, answers
from tests.scenarios import MOMENT, SCENARIOS, Scenario, agent, by_turn, calls, scenario
from tests.streams import Watch

__all__ = ["SCENARIOS"]


# ---- what they are made of


async def never_ending() -> None:
    """Two task groups in a task group; what a library's own code may look like."""

    async def part() -> None:
        async with anyio.create_task_group() as group:
            group.start_soon(anyio.sleep, MOMENT)
            await anyio.sleep(MOMENT)

    async with anyio.create_task_group() as group:
        group.start_soon(part)
        group.start_soon(part)


async def shielded_cleanup() -> None:
    try:
        await anyio.sleep(60)
    finally:
        with anyio.CancelScope(shield=True):
            await anyio.sleep(MOMENT)


async def failing_cleanup(seconds: float = MOMENT) -> str:
    try:
        await anyio.sleep(seconds)
    except BaseException:
        raise ConnectionFailed("reset while closing") from None
    return "closed"


class Doing(ScriptedModel):
    """A model that awaits something of its own before it answers."""

    def __init__(self, function: Callable[[], Awaitable[object]], answer: str = "done") -> None:
        super().__init__(lambda request: answer)
        self._work = function

    async def respond(self, request: ModelRequest) -> Reply:
        await self._work()
        return await super().respond(request)


def is_asyncio() -> bool:
    return sniffio.current_async_library() == "asyncio"


async def together(*functions: Callable[[], Awaitable[object]]) -> None:
    """Await all in tasks that no scope of a run encloses, where the event loop has such."""
    if is_asyncio():
        await asyncio.gather(*(function() for function in functions))
        return
    async with anyio.create_task_group() as group:
        for function in functions:
            group.start_soon(function)


# ---- a run's own deadline


@scenario
def races_in_a_race_that_is_out_of_time(watch: Watch) -> Scenario:
    hang = partial(anyio.sleep, 60)
    race = RaceModel(RaceModel(Doing(shielded_cleanup), Doing(hang)), Doing(hang))
    one = agent(watch, client=race)
    return lambda: one.run("go", timeout=MOMENT * 4)


@scenario
def tools_that_clean_up_after_the_time_is_over(watch: Watch) -> Scenario:
    async def slow() -> None:
        await shielded_cleanup()

    async def slower() -> None:
        try:
            await anyio.sleep(60)
        finally:
            await anyio.sleep(MOMENT)

    one = agent(watch, calls("slow", "slower", "buy"), "never", tools=[slow, slower])
    return lambda: one.run("go", timeout=MOMENT * 4)


@scenario
def a_deadline_in_the_turn_of_the_cancellation(watch: Watch) -> Scenario:
    async def block() -> str:
        time.sleep(MOMENT * 3)  # noqa: ASYNC251  # the time is over when this step ends, as is that of a scope around
        await anyio.sleep(0)
        return "blocked"

    async def block_in_a_model() -> None:
        time.sleep(MOMENT * 3)  # noqa: ASYNC251
        await anyio.sleep(0)

    tooled = agent(watch, calls("block", "look"), "done", tools=[block])
    modelled = agent(watch, client=Doing(block_in_a_model))

    async def go() -> None:
        await tooled.run("go", timeout=MOMENT * 2)
        await modelled.run("go", timeout=MOMENT * 2)
        with anyio.move_on_after(MOMENT * 2):
            await tooled.run("go")
        with anyio.move_on_after(MOMENT * 2):
            async with tooled.stream("go") as stream:
                await stream.result()

    return go


@scenario
def tools_past_their_own_time(watch: Watch) -> Scenario:
    @tool(timeout=MOMENT * 2)
    async def brief() -> None:
        await shielded_cleanup()

    @tool(timeout=MOMENT * 2)
    async def brief_and_wrong() -> None:
        await failing_cleanup(60)

    one = agent(watch, calls("brief", "brief_and_wrong", "look"), "done", tools=[brief, brief_and_wrong])
    return lambda: one.run("go")


# ---- hooks


@scenario
def hooks_with_task_groups(watch: Watch) -> Scenario:
    async def prompt() -> str:
        await never_ending()
        return "You try."

    async def approve(call: Any) -> bool:
        await never_ending()
        return True

    async def check(value: str) -> str:
        await never_ending()
        return value

    @tool(requires_approval=True)
    async def pay() -> str:
        return "paid"

    one = BaseAgent("A", prompt, client=by_turn(calls("pay"), "done"), toolkit=[pay], observers=[watch])
    one.output_validator(check)
    return lambda: one.run("go", approve=approve)


@scenario
def hooks_whose_cleanup_fails(watch: Watch) -> Scenario:
    async def prompt() -> str:
        return await failing_cleanup()

    async def check(value: str) -> str:
        await failing_cleanup()
        return value

    async def compact(messages: list[Any]) -> str:
        return await failing_cleanup()

    history = [{"role": role, "content": "x" * 200} for role in ("user", "assistant") * 4]
    one = BaseAgent("A", prompt, client=by_turn("done"), observers=[watch], context_window=300, compact=compact)
    one.output_validator(check)
    return lambda: one.run("go", messages=history)


@scenario
def models_with_task_groups_and_a_cleanup_that_fails(watch: Watch) -> Scenario:
    grouped, failing = agent(watch, client=Doing(never_ending)), agent(watch, client=Doing(failing_cleanup))

    async def go() -> None:
        await grouped.run("go")
        await failing.run("go")
        async with grouped.stream("go", buffer=0) as stream:
            async for _ in stream:
                pass

    return go


# ---- batches


@scenario
def a_batch_that_fails_while_others_clean_up(watch: Watch) -> Scenario:
    class Mixed(ScriptedModel):
        async def respond(self, request: ModelRequest) -> Reply:
            if request.transcript.messages[0]["content"] == "bad":
                await anyio.sleep(MOMENT)
                raise ConnectionFailed("no")
            await shielded_cleanup()
            return await super().respond(request)

    one = agent(watch, client=Mixed(lambda request: "never"))
    options: dict[str, Any] = {"max_concurrency": 3, "on_error": "fail_fast", "max_retries": 0}

    async def go() -> None:
        with suppress(RunError):
            await run_many(one, ["slow", "bad", "slow"], **options)
        with suppress(RunError):
            async with stream_many(one, ["slow", "bad"], **options) as batch:
                async for _ in batch:
                    pass

    return go


@scenario
def a_batch_in_a_hook(watch: Watch) -> Scenario:
    racing = agent(watch, client=RaceModel(by_turn(answers.hang()), by_turn(answers.text("won", delay=MOMENT))))

    async def prompt() -> str:
        return " ".join(str(result.content) for result in await run_many(racing, ["a", "b"]))

    one = BaseAgent("A", prompt, client=by_turn("done"), observers=[watch])
    return lambda: one.run("go")


# ---- runs below, however they are begun


@scenario
def child_runs_that_a_tool_gathers(watch: Watch) -> Scenario:
    quick, slow = agent(watch, "quick"), agent(watch, calls("tidy", "buy"), "slow")

    async def gather() -> str:
        await together(partial(quick.run, "?"), partial(slow.run, "?"))
        return "gathered"

    async def wait_for() -> str:
        if is_asyncio():
            return str((await asyncio.wait_for(slow.run("?"), 60)).content)
        with anyio.fail_after(60):
            return str((await slow.run("?")).content)

    one = agent(watch, calls("gather", "wait_for"), "done", tools=[gather, wait_for])
    return lambda: one.run("go")


@scenario
def child_runs_that_a_tool_forgets(watch: Watch) -> Scenario:
    slow = agent(watch, calls("tidy"), "slow")

    async def ask() -> None:
        with suppress(RunCancelled):
            await slow.run("?")

    async def forget() -> str:
        if is_asyncio():
            forgotten.append(asyncio.create_task(ask()))
        else:
            trio.lowlevel.spawn_system_task(ask, context=copy_context())
        await anyio.sleep(0)
        return "forgotten"

    forgotten: list[Any] = []
    one = agent(watch, calls("forget", "look"), "done", tools=[forget])

    async def go() -> None:
        try:
            await one.run("go")
        finally:
            forgotten.clear()

    return go


@scenario
def batches_and_tool_calls_in_tasks_of_a_tool(watch: Watch) -> Scenario:
    child = agent(watch, "child")

    async def all_at_once() -> str:
        async def read() -> None:
            async with child.stream("?", buffer=0) as stream:
                async for _ in stream.text():
                    pass

        await together(partial(run_many, child, ["a", "b"]), partial(one.execute_tool, "tidy"), read)
        return "done"

    one = agent(watch, calls("all_at_once"), "done", tools=[all_at_once])
    return lambda: one.run("go")


@scenario
def the_facade_in_threads_that_a_tool_starts(watch: Watch) -> Scenario:
    child = agent(watch, calls("look"), "child")

    async def in_a_thread() -> str:
        return str((await anyio.to_thread.run_sync(lambda: fractal.sync.run(child, "?"))).content)

    one = agent(watch, calls("in_a_thread"), "done", tools=[in_a_thread])
    return lambda: one.run("go")


@scenario
def handles_that_a_plain_tool_leaves(watch: Watch) -> Scenario:
    child = agent(watch, calls("tidy"), "child")

    @tool(on_cancel="wait")
    def start() -> str:
        fractal.sync.start(child, "?")
        return "started"

    one = agent(watch, calls("start", "look"), "done", tools=[start])
    return lambda: one.run("go")


# ---- cancellations of somebody else's, and cleanups


@scenario
def cancellations_that_are_no_orders(watch: Watch) -> Scenario:
    async def own_way() -> str:
        """Await what it has cancelled itself, as code for asyncio may end."""
        if not is_asyncio():
            with anyio.CancelScope() as scope:
                scope.cancel()
                await anyio.sleep(1)
            return "caught"
        worker = asyncio.create_task(asyncio.sleep(MOMENT))
        try:
            await asyncio.wait([worker], timeout=MOMENT / 2)
        finally:
            worker.cancel()
        return str(await worker)

    async def prompt() -> str:
        with suppress(asyncio.CancelledError):
            await own_way()
        return "You try."

    async def check(value: str) -> str:
        await own_way()
        return value

    one = agent(watch, calls("own_way", "look", "own_way"), "done", tools=[own_way])
    one.output_validator(check)
    other = BaseAgent("A", prompt, client=by_turn("done"), observers=[watch])

    async def go() -> None:
        await one.run("go")
        await other.run("go")

    return go


@scenario
def cleanups_that_await(watch: Watch) -> Scenario:
    cleaned: list[str] = []

    async def session() -> str:
        """Roll back as code for asyncio does: with awaits that nothing shields."""
        try:
            await anyio.sleep(MOMENT)
        except BaseException:
            cleaned.append("begun")
            await anyio.sleep(0)
            await anyio.sleep(MOMENT)
            cleaned.append("done")
            raise
        return "committed"

    async def session_in_a_task() -> None:
        if is_asyncio():
            await asyncio.ensure_future(session())

    async def check(value: str) -> str:
        await session()
        return value

    one = agent(watch, calls("session", "session_in_a_task"), "done", tools=[session, session_in_a_task])
    one.output_validator(check)

    async def go() -> None:
        cleaned.clear()
        try:
            await one.run("go")
        finally:
            assert cleaned.count("begun") == cleaned.count("done"), "a cleanup that awaits was cut"

    return go


@scenario
def cleanups_that_fail(watch: Watch) -> Scenario:
    async def broken() -> str:
        return await failing_cleanup()

    async def broken_in_a_group() -> str:
        async with anyio.create_task_group() as group:
            group.start_soon(failing_cleanup)
            group.start_soon(failing_cleanup)
        return "closed"

    tools = [broken, broken_in_a_group]
    one = agent(watch, calls("broken", "broken_in_a_group", "tidy"), "done", tools=tools)
    left = agent(watch, calls("broken", "look"), "done", tools=tools, limits=Limits(on_stubborn="raise"))

    async def go() -> None:
        await one.run("go")
        await left.run("go")

    return go


@scenario
def a_called_tool_that_streams(watch: Watch) -> Scenario:
    child = agent(watch, calls("look"), "some words of text")

    @tool(on_cancel="wait")
    def read_along() -> str:
        with fractal.sync.stream(child, "?") as stream:
            return "".join(stream.text())

    one = agent(watch, "done", tools=[read_along])
    return lambda: one.execute_tool("read_along")
