"""`Task.cancel()` ends the task that awaits a run, whatever the run is about: nothing swallows it or hides it."""

from __future__ import annotations

import asyncio
import gc
import time
from collections.abc import Awaitable, Callable
from typing import Any

import anyio
import pytest

import fractal.sync
from fractal import BaseAgent, FallbackModel, LimitedModel, Limits, RaceModel, run_many, stream_many, tool
from fractal.errors import ConnectionFailed
from fractal.model import ModelRequest, Reply
from fractal.testing import ScriptedModel, answers
from tests.streams import Watch
from tests.support import BACKENDS

pytestmark = pytest.mark.usefixtures("anyio_backend")


@pytest.fixture(params=[each for each in BACKENDS if "asyncio" in str(each.id)])
def anyio_backend(request: pytest.FixtureRequest) -> tuple[str, dict[str, object]]:
    return request.param


class Point:
    """The point of a scenario at which the task that awaits it is cancelled."""

    def __init__(self) -> None:
        self.reached, self.passed = asyncio.Event(), asyncio.Event()

    async def wait(self) -> None:
        self.reached.set()
        await asyncio.sleep(60)

    async def in_groups(self) -> None:
        """Wait as a library might: in a task group of task groups."""

        async def part() -> None:
            async with anyio.create_task_group() as group:
                group.start_soon(asyncio.sleep, 60)
                await self.wait()

        async with anyio.create_task_group() as group:
            group.start_soon(part)
            group.start_soon(part)

    async def fail_in_cleanup(self) -> None:
        try:
            await self.wait()
        finally:
            raise ConnectionFailed("reset while closing")

    async def in_cleanup(self) -> None:
        """Wait until something else ends this, and reach the point while cleaning up."""
        try:
            await asyncio.sleep(60)
        finally:
            with anyio.CancelScope(shield=True):
                self.reached.set()
                await self.passed.wait()

    async def late(self) -> None:
        """Reach the point when the time of the run is over, which its event loop does not know yet."""
        time.sleep(0.1)  # noqa: ASYNC251
        self.reached.set()
        await asyncio.sleep(60)

    async def late_and_failing(self) -> None:
        try:
            await self.late()
        finally:
            raise ConnectionFailed("reset while closing")


class Doing:
    """A model that awaits something."""

    def __init__(self, function: Callable[[], Awaitable[None]]) -> None:
        self.function = function

    async def respond(self, request: ModelRequest) -> Reply:
        await self.function()
        return Reply(text="done")


async def hang() -> None:
    await asyncio.sleep(60)


HISTORY: list[dict[str, Any]] = [{"role": role, "content": "word " * 10} for role in ("user", "assistant") * 3]


def asking(function: Callable[[], Awaitable[None]], **options: Any) -> Awaitable[object]:
    return BaseAgent("A", "a", client=Doing(function)).run("go", **options)


def with_hook(kind: str, function: Callable[[], Awaitable[None]], **options: Any) -> Awaitable[object]:
    """A run with a function of the user's on its way."""

    async def hook(*_: object) -> Any:
        await function()
        return "x"

    @tool(requires_approval=True)
    async def pay() -> str:
        return "paid"

    model = ScriptedModel(lambda request: "done" if len(request.transcript) > 1 else answers.call("pay"))
    if kind == "prompt":

        async def prompt() -> str:
            await function()
            return "p"

        return BaseAgent("A", prompt, client=ScriptedModel(["done"])).run("go", **options)
    if kind == "approve":
        return BaseAgent("A", "a", client=model).add_tool(pay).run("go", approve=hook, **options)
    if kind == "compact":
        agent = BaseAgent("A", "a", client=ScriptedModel(["done"]), context_window=40, compact=hook)
        return agent.run("go", messages=HISTORY, **options)
    agent = BaseAgent("A", "a", client=ScriptedModel(["done"]))
    agent.output_validator(hook)
    return agent.run("go", **options)


HOOKS = ["prompt", "approve", "compact", "validator"]


async def assert_obeyed(point: Point, run: Awaitable[object]) -> None:
    """A task that awaits the run is cancelled at the point, and ends cancelled."""
    went_on: list[object] = []

    async def await_it() -> None:
        went_on.append(await run)

    task = asyncio.ensure_future(await_it())
    with anyio.fail_after(5):
        await point.reached.wait()
        assert task.cancel()
        await asyncio.sleep(0)
        point.passed.set()
        await asyncio.wait([task])
    assert went_on == []
    assert task.cancelled(), f"it ended with {task.exception()!r}"


# ---- while the run's own time is over


@pytest.mark.parametrize("depth", [0, 1, 2])
async def test_it_is_obeyed_while_races_inside_each_other_clean_up(depth: int):
    point = Point()
    model: Any = Doing(point.in_cleanup)
    for _ in range(depth + 1):
        model = RaceModel(model, Doing(hang))
    await assert_obeyed(point, BaseAgent("A", "a", client=model).run("go", timeout=0.05))


@pytest.mark.parametrize(
    "combined",
    [lambda one: FallbackModel(one, Doing(hang)), lambda one: LimitedModel(one, max_concurrency=1)],
    ids=["fallback", "limited"],
)
async def test_it_is_obeyed_while_a_model_that_is_out_of_time_cleans_up(combined: Callable[[Any], Any]):
    point = Point()
    await assert_obeyed(point, BaseAgent("A", "a", client=combined(Doing(point.in_cleanup))).run("go", timeout=0.2))


@pytest.mark.parametrize("kind", HOOKS)
async def test_it_is_obeyed_while_a_hook_that_is_out_of_time_cleans_up(kind: str):
    point = Point()
    await assert_obeyed(point, with_hook(kind, point.in_cleanup, timeout=0.2))


@pytest.mark.parametrize("limits", [Limits(), Limits(tool_timeout=0.1), Limits(on_stubborn="raise")], ids=str)
async def test_it_is_obeyed_while_a_tool_that_is_out_of_time_cleans_up(limits: Limits):
    point = Point()
    agent = BaseAgent("A", "a", client=ScriptedModel([answers.call("in_cleanup"), "done"])).add_tool(point.in_cleanup)
    await assert_obeyed(point, agent.run("go", timeout=0.2, limits=limits))


@pytest.mark.parametrize("function", ["late", "late_and_failing"])
@pytest.mark.parametrize("kind", ["model", "tool", *HOOKS])
async def test_it_is_obeyed_in_the_turn_of_the_loop_in_which_the_runs_time_is_over(kind: str, function: str):
    point = Point()
    late = getattr(point, function)
    if kind == "model":
        run = asking(late, timeout=0.08)
    elif kind == "tool":
        run = BaseAgent("A", "a", client=ScriptedModel([answers.call(function)])).add_tool(late).run("go", timeout=0.08)
    else:
        run = with_hook(kind, late, timeout=0.08)
    await assert_obeyed(point, run)


# ---- whatever waits, and however it fails


@pytest.mark.parametrize("function", ["wait", "in_groups", "fail_in_cleanup"])
@pytest.mark.parametrize("kind", HOOKS)
async def test_it_is_obeyed_in_hooks_whatever_they_do(kind: str, function: str):
    point = Point()
    await assert_obeyed(point, with_hook(kind, getattr(point, function)))


@pytest.mark.parametrize("retries", [0, 3])
@pytest.mark.parametrize("function", ["wait", "in_groups", "fail_in_cleanup"])
async def test_it_is_obeyed_in_models_whatever_they_do(function: str, retries: int):
    point = Point()
    await assert_obeyed(point, asking(getattr(point, function), max_retries=retries))


@pytest.mark.parametrize("function", ["wait", "in_groups", "fail_in_cleanup"])
async def test_the_next_model_is_not_asked_when_one_fails_over_a_cancellation(function: str):
    point = Point()
    next_one = ScriptedModel(["second"])
    model = FallbackModel(Doing(getattr(point, function)), next_one)
    await assert_obeyed(point, BaseAgent("A", "a", client=model).run("go"))
    assert next_one.requests == []


@pytest.mark.parametrize("function", ["wait", "in_groups", "fail_in_cleanup"])
async def test_it_is_obeyed_in_tools_whatever_they_do(function: str):
    point = Point()
    work = getattr(point, function)
    agent = BaseAgent("A", "a", client=ScriptedModel([answers.call(function), "done"])).add_tool(work)
    await assert_obeyed(point, agent.run("go"))
    point = Point()
    agent = BaseAgent("A", "a").add_tool(getattr(point, function))
    await assert_obeyed(point, agent.execute_tool(function))


async def test_it_is_obeyed_in_a_race_that_a_hook_has_many_of():
    point = Point()
    racing = BaseAgent("Racing", "r", client=RaceModel(Doing(hang), Doing(point.wait)))

    async def ask() -> None:
        await run_many(racing, ["a", "b"])

    await assert_obeyed(point, with_hook("prompt", ask))


async def test_it_is_obeyed_in_a_delegate_of_a_delegate():
    point = Point()
    agent = BaseAgent("Bottom", "b", client=Doing(point.in_groups))
    for name in ("Middle", "Top"):
        call = answers.call("ask", {"query": "?"})
        agent = BaseAgent(name, "n", client=ScriptedModel([call, "done"])).register_delegate(agent, "ask")
    await assert_obeyed(point, agent.run("go"))


async def test_wait_for_raises_its_timeout_error_over_a_hook_with_task_groups():
    with pytest.raises(TimeoutError):
        await asyncio.wait_for(with_hook("prompt", Point().in_groups), 0.05)
    with pytest.raises(TimeoutError):
        async with asyncio.timeout(0.05):
            await with_hook("validator", Point().fail_in_cleanup)


# ---- batches


class Failing:
    """A model that fails for one input, and cleans up for the others."""

    def __init__(self, point: Point) -> None:
        self.point = point

    async def respond(self, request: ModelRequest) -> Reply:
        if request.transcript.messages[-1]["content"] == "bad":
            await asyncio.sleep(0.02)
            raise ConnectionFailed("no")
        await self.point.in_cleanup()
        raise AssertionError


@pytest.mark.parametrize("inputs", [["slow", "bad"], ["bad", "slow", "slow"]], ids=len)
async def test_it_is_obeyed_while_a_batch_that_has_failed_cleans_up(inputs: list[str]):
    point = Point()
    agent = BaseAgent("A", "a", client=Failing(point))
    await assert_obeyed(point, run_many(agent, inputs, on_error="fail_fast", max_retries=0))
    point = Point()
    agent = BaseAgent("A", "a", client=Failing(point))

    async def read() -> None:
        async with stream_many(agent, inputs, on_error="fail_fast", max_retries=0) as batch:
            async for _ in batch:
                pass

    await assert_obeyed(point, read())


# ---- the task's own count of cancellations is nobody else's


@pytest.mark.parametrize("times", [1, 3])
async def test_whoever_has_caught_a_cancellation_before_is_not_taken_for_cancelled(times: int):
    async def caught_some() -> object:
        task = asyncio.current_task()
        assert task is not None
        for _ in range(times):
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await asyncio.sleep(1)
        return await with_hook("prompt", Point().in_groups, timeout=0.05)

    result: Any = await asyncio.ensure_future(caught_some())
    assert result.stop_reason == "deadline"


async def test_a_run_leaves_the_count_of_cancellations_of_its_task_alone():
    async def count() -> list[int]:
        task = asyncio.current_task()
        assert task is not None
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await asyncio.sleep(1)
        before = task.cancelling()
        await asking(Point().in_groups, timeout=0.05)
        return [before, task.cancelling()]

    assert await asyncio.ensure_future(count()) == [1, 1]


# ---- all tasks at once


@pytest.mark.parametrize("again", [0, 2])
async def test_a_tool_that_must_be_waited_for_is_also_when_all_tasks_are_cancelled(again: int):
    done: list[str] = []

    @tool(on_cancel="wait")
    def buy() -> None:
        time.sleep(0.2)
        done.append("bought")

    agent = BaseAgent("A", "a", client=ScriptedModel([answers.call("buy"), "done"])).add_tool(buy)
    before = asyncio.all_tasks()
    task = asyncio.ensure_future(agent.run("go"))
    await asyncio.sleep(0.05)
    for _ in range(again + 1):
        for each in asyncio.all_tasks() - before:
            each.cancel()
        await asyncio.sleep(0.01)
    with anyio.fail_after(5):
        await asyncio.wait([task])
    assert (done, task.cancelled()) == (["bought"], True)


def test_a_tool_that_must_be_waited_for_is_also_at_the_end_of_the_event_loop():
    done: list[str] = []

    @tool(on_cancel="wait")
    def buy() -> None:
        time.sleep(0.2)
        done.append("bought")

    agent = BaseAgent("A", "a", client=ScriptedModel([answers.call("buy"), "done"])).add_tool(buy)
    kept: list[object] = []

    async def leave() -> None:
        kept.append(asyncio.ensure_future(agent.run("go")))
        await asyncio.sleep(0.05)

    asyncio.run(leave())
    assert done == ["bought"]


@pytest.mark.parametrize("kind", ["hook", "model", "tool", "many"])
async def test_all_tasks_cancelled_at_once_end_cancelled(kind: str):
    point = Point()
    agent = BaseAgent("A", "a", client=ScriptedModel([answers.call("wait"), "done"])).add_tool(point.wait)
    run: Awaitable[object] = {
        "hook": lambda: with_hook("prompt", point.in_groups),
        "model": lambda: asking(point.fail_in_cleanup),
        "tool": lambda: agent.run("go"),
        "many": lambda: run_many(BaseAgent("A", "a", client=Doing(point.wait)), ["a", "b"]),
    }[kind]()

    async def await_it() -> object:
        return await run

    before = asyncio.all_tasks()
    task = asyncio.ensure_future(await_it())
    with anyio.fail_after(5):
        await point.reached.wait()
        await asyncio.sleep(0.01)  # what it has started has begun
        for each in asyncio.all_tasks() - before:
            each.cancel()
        await asyncio.wait([task])
    assert task.cancelled()


@pytest.mark.parametrize("turns", [[1, 0, 1], [1, 1, 1], [1, 2, 3], [0, 1, 2], [1, 3, 0]], ids=str)
async def test_a_tool_that_was_called_is_not_told_as_skipped_however_often_all_tasks_are_cancelled(turns: list[int]):
    point, told = Point(), Watch()
    model = ScriptedModel([answers.call("wait"), "done"])
    agent = BaseAgent("A", "a", client=model, observers=[told]).add_tool(point.wait)
    before = asyncio.all_tasks()
    task = asyncio.ensure_future(agent.run("go"))
    with anyio.fail_after(5):
        await point.reached.wait()
        for pause in turns:
            for each in asyncio.all_tasks() - before:
                each.cancel()
            for _ in range(pause):
                await asyncio.sleep(0)
        await asyncio.wait([task])
    assert task.cancelled()
    [end] = [event for event in told if event.kind == "tool_finished"]
    assert end.result.outcome in ("cancelled", "error")


@pytest.mark.parametrize("kind", ["prompt", "model", "tool"])
def test_a_stream_that_is_open_at_the_end_of_the_event_loop_was_cancelled(kind: str):
    results: list[Any] = []
    kept: list[object] = []

    def note(event: Any) -> None:
        if event.kind == "run_finished":
            results.append(event.result)

    async def leave() -> None:
        point = Point()

        async def prompt() -> str:
            await point.wait()
            return "p"

        script = ScriptedModel([answers.call("wait"), "done"])
        model: Any = Doing(point.wait) if kind == "model" else script
        agent = BaseAgent("A", prompt if kind == "prompt" else "a", client=model, observers=[note])
        stream = agent.add_tool(point.wait).stream("go")
        kept.append(stream)
        await stream.__aenter__()
        await point.reached.wait()

    asyncio.run(leave())
    assert [(result.stop_reason, result.error) for result in results] == [("cancelled", "the run was cancelled")]


@pytest.mark.parametrize("verb", [fractal.sync.run, fractal.sync.run_many], ids=["run", "run_many"])
async def test_a_call_out_of_a_tools_thread_that_is_cancelled_before_its_first_step_ends(verb: Any):
    child = BaseAgent("B", "b", client=ScriptedModel(lambda request: "done"))
    loop = asyncio.get_running_loop()

    def cancelled_at_once(loop: Any, coroutine: Any, **options: Any) -> asyncio.Task[Any]:
        task = asyncio.Task(coroutine, loop=loop, **options)
        # Its name is set only later.
        if "_run_joined" in repr(coroutine.cr_frame.f_locals.get("function")):
            task.cancel()
        return task

    @tool(on_cancel="wait")
    def ask() -> None:
        verb(child, "?")

    agent = BaseAgent("A", "a", client=ScriptedModel([answers.call("ask"), "done"])).add_tool(ask)
    loop.set_task_factory(cancelled_at_once)
    try:
        with anyio.fail_after(5):
            result = await agent.run("go")
    finally:
        loop.set_task_factory(None)
    [told] = result.tool_results
    assert (told.outcome, result.content) == ("error", "done")


@pytest.mark.parametrize("kind", ["batch", "race"])
async def test_a_part_that_is_cancelled_before_its_first_step_is_no_coroutine_that_nobody_awaits(kind: str):
    loop = asyncio.get_running_loop()

    def cancelled_at_once(loop: Any, coroutine: Any, **options: Any) -> asyncio.Task[Any]:
        task = asyncio.Task(coroutine, loop=loop, **options)
        if coroutine.__qualname__ == "TaskHandle._run_coro":  # of a group of AnyIO's
            task.cancel()
        return task

    models = [ScriptedModel(lambda request: "done") for _ in range(2)]
    agent = BaseAgent("A", "a", client=RaceModel(*models) if kind == "race" else models[0])
    loop.set_task_factory(cancelled_at_once)
    try:
        with anyio.fail_after(5):
            await asyncio.gather(
                agent.run("?", max_retries=0) if kind == "race" else run_many(agent, ["?"]), return_exceptions=True
            )
    finally:
        loop.set_task_factory(None)
    gc.collect()  # which would warn of it
