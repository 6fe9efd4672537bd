"""A run joins the runs below it however they were begun: in tasks, threads and groups of the user's own."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Awaitable, Callable
from contextlib import suppress
from contextvars import copy_context
from functools import partial
from typing import Any

import anyio
import anyio.to_thread
import pytest
import trio

import fractal.sync
from fractal import AgentResult, BaseAgent, DepthExceeded, Limits, RunCancelled, run_many, stream_many, tool
from fractal._concurrency.background import Background
from fractal._concurrency.current import current_run
from fractal._engine import below as engine_below
from fractal.events import RunFinished, RunStarted
from fractal.testing import ScriptedModel, answers
from tests.schedules import VIRTUAL, in_virtual_time
from tests.support import BACKENDS, come_about, in_thread

CLEANUP = 0.05
"""Seconds that the tool of each run below takes to clean up."""


class Below:
    """An agent whose runs go on until they are cut, and how many there are."""

    def __init__(self) -> None:
        self.begun = self.ended = 0
        self.under_way = threading.Event()
        self.results: list[AgentResult] = []
        model = ScriptedModel(lambda request: "done" if len(request.transcript) > 1 else answers.call("work"))
        self.agent = BaseAgent("Below", "b", client=model, observers=[self._observe]).add_tool(self.work)

    async def work(self) -> None:
        """Work until somebody cancels this."""
        self.under_way.set()
        self.begun += 1
        try:
            await anyio.sleep(60)
        finally:
            with anyio.CancelScope(shield=True):
                await anyio.sleep(CLEANUP)
            self.ended += 1

    def _observe(self, event: Any) -> None:
        if isinstance(event, RunFinished):
            self.results.append(event.result)

    def run(self) -> Awaitable[AgentResult]:
        return self.agent.run("?")

    def assert_joined(self, *reasons: str) -> None:
        assert self.begun > 0, "nothing has begun"
        assert self.ended == self.begun, "a run below goes on"
        assert {result.stop_reason for result in self.results if result.agent_name == "Below"} <= {*reasons}


# ---- ways to begin a run in a tool


async def gathered(below: Below) -> None:
    await asyncio.gather(below.run(), below.run())


async def gathered_with_one_that_fails(below: Below) -> None:
    async def fail() -> None:
        await asyncio.sleep(0.1)
        raise ValueError

    await asyncio.gather(below.run(), fail())


async def waited_for(below: Below) -> None:
    await asyncio.wait_for(below.run(), 50)


async def in_a_task(below: Below) -> None:
    await asyncio.ensure_future(below.run())


async def in_a_task_that_is_shielded(below: Below) -> None:
    await asyncio.shield(asyncio.ensure_future(quietly(below.run)))


async def in_a_task_that_is_forgotten(below: Below) -> None:
    asyncio.ensure_future(quietly(below.run))  # noqa: RUF006
    await come_about(below.under_way.is_set)


async def in_a_native_group(below: Below) -> None:
    async with asyncio.TaskGroup() as group:
        group.create_task(below.agent.run("?"))


async def in_a_native_timeout(below: Below) -> None:
    async with asyncio.timeout(50):
        await below.run()


async def in_a_native_thread(below: Below) -> None:
    await asyncio.to_thread(fractal.sync.run, below.agent, "?")


async def in_a_group(below: Below) -> None:
    async with anyio.create_task_group() as group:
        group.start_soon(below.run)
        group.start_soon(below.run)


async def in_a_shield(below: Below) -> None:
    with anyio.move_on_after(0.3, shield=True):
        await below.run()


async def in_a_thread(below: Below) -> None:
    await anyio.to_thread.run_sync(partial(fractal.sync.run, below.agent, "?"))


async def in_a_thread_that_is_left(below: Below) -> None:
    await anyio.to_thread.run_sync(partial(fractal.sync.run, below.agent, "?"), abandon_on_cancel=True)


async def as_a_delegate(below: Below) -> None:
    await BaseAgent("Other", "o").call_agent(below.agent, "?")


async def as_a_stream(below: Below) -> None:
    async with below.agent.stream("?") as stream:
        async for _ in stream:
            pass


async def as_a_stream_that_is_left_open(below: Below) -> None:
    await below.agent.stream("?").__aenter__()
    await come_about(below.under_way.is_set)


async def as_a_batch(below: Below) -> None:
    await run_many(below.agent, ["a", "b"])


async def as_a_batch_in_a_group(below: Below) -> None:
    async with anyio.create_task_group() as group:
        group.start_soon(run_many, below.agent, ["a", "b"])


async def as_a_streamed_batch(below: Below) -> None:
    async with stream_many(below.agent, ["a", "b"]) as batch:
        async for _ in batch:
            pass


async def as_a_called_tool(below: Below) -> None:
    await below.agent.execute_tool("work")


async def as_a_called_tool_in_a_group(below: Below) -> None:
    async with anyio.create_task_group() as group:
        group.start_soon(below.agent.execute_tool, "work")


async def in_a_system_task(below: Below) -> None:
    trio.lowlevel.spawn_system_task(quietly, below.run, context=copy_context())
    await come_about(below.under_way.is_set)


async def in_a_nursery(below: Below) -> None:
    async with trio.open_nursery() as nursery:
        nursery.start_soon(below.agent.run, "?")


async def quietly(function: Callable[[], Awaitable[object]]) -> None:
    with suppress(RunCancelled):  # which asyncio would tell of, where nobody asks for it
        await function()


ASYNCIO = [
    gathered,
    gathered_with_one_that_fails,
    waited_for,
    in_a_task,
    in_a_task_that_is_shielded,
    in_a_task_that_is_forgotten,
    in_a_native_group,
    in_a_native_timeout,
    in_a_native_thread,
]
TRIO = [in_a_system_task, in_a_nursery]
BOTH = [
    in_a_group,
    in_a_shield,
    in_a_thread,
    in_a_thread_that_is_left,
    as_a_delegate,
    as_a_stream,
    as_a_stream_that_is_left_open,
    as_a_batch,
    as_a_batch_in_a_group,
    as_a_streamed_batch,
    as_a_called_tool,
    as_a_called_tool_in_a_group,
]

IN_THREADS = [in_a_thread, in_a_thread_that_is_left, in_a_native_thread]


def begun_by(*ways: Callable[[Below], Awaitable[None]]) -> pytest.MarkDecorator:
    """Each way on its backends: in virtual time, unless it takes threads."""
    return pytest.mark.parametrize(
        ("begin", "anyio_backend"),
        [
            pytest.param(way, *backend.values, id=f"{way.__name__}-{backend.id}", marks=backend.marks)
            for way in ways
            for backend in (BACKENDS if way in IN_THREADS else VIRTUAL)
            if is_of(way, backend.values[0][0])
        ],
    )


def is_of(way: object, backend: str) -> bool:
    return way not in (TRIO if backend == "asyncio" else ASYNCIO)


begun = begun_by(*BOTH, *ASYNCIO, *TRIO)


# ---- ways to end the run above


async def by_its_timeout(agent: BaseAgent, below: Below) -> None:
    result = await agent.run("go", timeout=0.25)
    assert result.stop_reason in ("deadline", "finished")


async def by_a_scope(agent: BaseAgent, below: Below) -> None:
    with anyio.move_on_after(0.25):
        await agent.run("go")


async def by_its_group(agent: BaseAgent, below: Below) -> None:
    async with anyio.create_task_group() as group:
        group.start_soon(agent.run, "go")
        await come_about(below.under_way.is_set)
        group.cancel_scope.cancel()


async def by_leaving_its_stream(agent: BaseAgent, below: Below) -> None:
    async with agent.stream("go") as stream:
        async for event in stream:
            if isinstance(event, RunStarted) and event.depth:
                await come_about(below.under_way.is_set)
                break


async def natively(agent: BaseAgent, below: Below) -> None:
    task = asyncio.ensure_future(agent.run("go"))
    await come_about(below.under_way.is_set)
    task.cancel()
    await asyncio.wait([task])


async def by_wait_for(agent: BaseAgent, below: Below) -> None:
    with suppress(TimeoutError):
        await asyncio.wait_for(agent.run("go"), 0.25)


ENDS = [by_its_timeout, by_a_scope, by_its_group, by_leaving_its_stream, natively, by_wait_for]


def above(begin: Callable[[Below], Awaitable[None]], below: Below, **options: Any) -> BaseAgent:
    async def work() -> str:
        await begin(below)
        return "begun"

    model = ScriptedModel(lambda request: "done" if len(request.transcript) > 1 else answers.call("work"))
    return BaseAgent("Above", "a", client=model, **options).add_tool(work)


@begun
@pytest.mark.parametrize("end", ENDS, ids=lambda each: each.__name__)
async def test_what_a_tool_begins_has_ended_when_the_run_returns(
    begin: Callable[[Below], Awaitable[None]],
    end: Callable[[BaseAgent, Below], Awaitable[None]],
    anyio_backend_name: str,
):
    if anyio_backend_name == "trio" and end in (natively, by_wait_for):
        pytest.skip("asyncio's own")
    below = Below()
    with anyio.fail_after(10):
        await end(above(begin, below), below)
        below.assert_joined("cancelled", "deadline")
        await anyio.sleep(0.02)  # tasks of the user's own end a turn later


@begun
async def test_what_a_tool_begins_has_ended_when_the_tool_is_past_its_time(
    begin: Callable[[Below], Awaitable[None]],
):
    below = Below()
    with anyio.fail_after(10):
        result = await above(begin, below, limits=Limits(tool_timeout=0.25)).run("go")
        below.assert_joined("cancelled", "deadline")
        assert result.content == "done"
        await anyio.sleep(0.02)


@pytest.mark.parametrize(
    "begin",
    [in_a_group, in_a_shield, *IN_THREADS, as_a_stream_that_is_left_open, as_a_batch, in_a_task_that_is_forgotten],
    ids=lambda each: each.__name__,
)
def test_what_a_tool_begins_has_ended_when_a_blocking_run_returns(
    begin: Callable[[Below], Awaitable[None]], backend: Any
):
    if not is_of(begin, backend):
        pytest.skip("asyncio's own")
    below = Below()
    with fractal.sync.portal(backend=backend):
        fractal.sync.run(above(begin, below), "go", timeout=0.25)
        below.assert_joined("cancelled", "deadline")
        time.sleep(0.05)


@begun_by(in_a_group, as_a_batch, as_a_batch_in_a_group, gathered, in_a_task, waited_for)
@pytest.mark.parametrize("hook", ["prompt", "validator", "approve", "compact"])
async def test_what_a_hook_begins_has_ended_when_the_run_returns(hook: str, begin: Any):
    below = Below()

    async def ask(*_: object) -> Any:
        await begin(below)
        return "x"

    async def prompt() -> str:
        return str(await ask())

    @tool(requires_approval=True)
    async def pay() -> None:
        raise AssertionError

    model = ScriptedModel(lambda request: answers.call("pay") if hook == "approve" else "done")
    options: dict[str, Any] = {"context_window": 40, "compact": ask} if hook == "compact" else {}
    agent = BaseAgent("A", prompt if hook == "prompt" else "a", client=model, **options)
    if hook == "approve":
        agent.add_tool(pay)
    if hook == "validator":
        agent.output_validator(ask)
    history = [{"role": role, "content": "word " * 10} for role in ("user", "assistant") * 3]
    with anyio.fail_after(10):
        messages = history if hook == "compact" else None
        result = await agent.run("go", timeout=0.25, approve=ask, messages=messages)
        below.assert_joined("cancelled", "deadline")
        assert result.stop_reason == "deadline"
        await anyio.sleep(0.02)


# ---- plain tools, and what they start in other event loops


@pytest.mark.parametrize("waits", [False, True], ids=["left", "waited for"])
@pytest.mark.parametrize("where", ["awaited", "blocking"])
def test_a_handle_that_a_plain_tool_starts_has_ended_when_the_run_returns(where: str, waits: bool, backend: Any):
    below = Below()
    handles: list[fractal.sync.Handle] = []

    @tool
    def start() -> str:
        handles.append(fractal.sync.start(below.agent, "?"))
        if waits:
            return str(handles[0].result().content)
        below.under_way.wait(5)
        return "started"

    model = ScriptedModel(lambda request: "done" if len(request.transcript) > 1 else answers.call("start"))
    agent = BaseAgent("Above", "a", client=model).add_tool(start)
    if where == "blocking":
        with fractal.sync.portal(backend=backend):
            fractal.sync.run(agent, "go", timeout=0.3)
            below.assert_joined("cancelled", "deadline")
    else:
        anyio.run(partial(agent.run, "go", timeout=0.3), backend=backend)
        below.assert_joined("cancelled", "deadline")
    assert handles[0].done() or handles[0].result(5) is not None


def test_a_handle_that_has_not_begun_when_its_tool_ends_is_joined_too(backend: Any):
    below = Below()
    began: list[str] = []
    below.agent.observers = (lambda event: began.append(event.kind),)

    @tool
    def start() -> str:
        fractal.sync.start(below.agent, "?")
        return "started"

    model = ScriptedModel(lambda request: "done" if len(request.transcript) > 1 else answers.call("start"))
    agent = BaseAgent("Above", "a", client=model).add_tool(start)
    for _ in range(20):
        assert anyio.run(agent.run, "go", backend=backend).success
        assert began.count("run_started") == began.count("run_finished")
        assert below.begun == below.ended


def test_a_handle_of_nobodys_is_nobodys_concern():
    quick = BaseAgent("Quick", "q", client=ScriptedModel(["done"]))
    assert fractal.sync.start(quick, "?").result(5).success


# ---- what the tool gets


async def test_a_task_that_awaits_a_run_that_is_ended_is_told(anyio_backend_name: str):
    below = Below()
    told: list[RunCancelled] = []

    async def ask() -> None:
        try:
            await below.run()
        except RunCancelled as error:
            told.append(error)

    async def forget() -> str:
        if anyio_backend_name == "asyncio":
            tasks.append(asyncio.ensure_future(ask()))
        else:
            trio.lowlevel.spawn_system_task(ask, context=copy_context())
        await come_about(below.under_way.is_set)
        return "forgotten"

    tasks: list[object] = []
    model = ScriptedModel([answers.call("forget"), "done"])
    assert (await BaseAgent("A", "a", client=model).add_tool(forget).run("go")).success
    await anyio.sleep(0.02)
    [error] = told
    assert error.result is not None
    assert (error.result.stop_reason, [each.outcome for each in error.result.tool_results]) == (
        "cancelled",
        ["cancelled"],
    )


async def test_what_begins_in_a_task_below_a_run_that_is_over_is_a_run_of_its_own(anyio_backend_name: str):
    if anyio_backend_name != "asyncio":
        pytest.skip("asyncio's own")
    above_has_ended = asyncio.Event()
    quick = BaseAgent("Quick", "q", client=ScriptedModel(["done"]))
    tasks: list[asyncio.Task[AgentResult]] = []

    async def ask() -> AgentResult:
        await above_has_ended.wait()
        return await quick.run("?")

    async def forget() -> str:
        tasks.append(asyncio.ensure_future(ask()))
        return "forgotten"

    model = ScriptedModel([answers.call("forget"), "done"])
    assert (await BaseAgent("A", "a", client=model).add_tool(forget).run("go")).success
    above_has_ended.set()
    assert (await tasks[0]).success


@begun_by(gathered, in_a_task, in_a_native_thread, in_a_thread, in_a_group, as_a_batch)
async def test_what_is_begun_in_tasks_of_the_users_own_has_the_time_that_is_left(begin: Any):
    below = Below()
    left: list[float] = []

    async def prompt(ctx: Any) -> str:
        left.append(ctx.remaining())
        return "b"

    below.agent.system_prompt = prompt  # type: ignore[assignment]
    with anyio.fail_after(10):
        await above(begin, below).run("go", timeout=0.25)
        below.assert_joined("cancelled", "deadline")
        await anyio.sleep(0.02)
    assert left
    assert max(left) <= 0.25


# ---- execute_tool


@pytest.mark.parametrize("how", ["run", "stream", "batch"])
@pytest.mark.parametrize("cut", ["scope", "tool timeout", "wait_for"])
async def test_a_tool_that_is_called_directly_leaves_nothing_of_what_it_begins(
    how: str, cut: str, anyio_backend_name: str
):
    if cut == "wait_for" and anyio_backend_name != "asyncio":
        pytest.skip("asyncio's own")
    below = Below()
    ended = threading.Event()

    @tool(timeout=0.2 if cut == "tool timeout" else None)
    def reads() -> None:
        try:
            if how == "stream":
                with fractal.sync.stream(below.agent, "?") as stream:
                    for _ in stream:
                        pass
            elif how == "batch":
                with fractal.sync.stream_many(below.agent, ["a", "b"]) as batch:
                    for _ in batch:
                        pass
            else:
                fractal.sync.run(below.agent, "?")
        finally:
            ended.set()

    agent = BaseAgent("A", "a").add_tool(reads)
    with anyio.fail_after(10):
        if cut == "scope":
            with anyio.move_on_after(0.2):
                await agent.execute_tool("reads")
        elif cut == "wait_for":
            with pytest.raises(TimeoutError):
                await asyncio.wait_for(agent.execute_tool("reads"), 0.2)
        else:
            assert (await agent.execute_tool("reads")).outcome in ("timeout", "abandoned")
        below.assert_joined("cancelled", "deadline")
        await in_thread(ended.wait, 5)


async def test_a_tool_that_is_called_directly_tells_a_whole_story():
    kinds: list[tuple[str, int]] = []
    child = BaseAgent("Child", "c", client=ScriptedModel(lambda request: "yes"))

    async def ask() -> str:
        return str((await child.run("?")).content)

    agent = BaseAgent("A", "a", observers=[lambda event: kinds.append((event.kind, event.depth))]).add_tool(ask)
    assert (await agent.execute_tool("ask")).content == "yes"
    assert kinds[:3] == [("run_started", 0), ("tool_started", 0), ("run_started", 1)]
    assert kinds[-3:] == [("run_finished", 1), ("tool_finished", 0), ("run_finished", 0)]


async def test_a_tool_that_is_called_too_deep_is_not_called():
    called: list[str] = []
    other = BaseAgent("Other", "o").add_tool(lambda: called.append("x"), name="note", description="Note.")

    async def ask() -> None:
        await other.execute_tool("note")

    model = ScriptedModel([answers.call("ask"), "done"])
    agent = BaseAgent("A", "a", client=model, limits=Limits(max_depth=0)).add_tool(ask)
    result = await agent.run("go")
    assert (called, [type(each.exception) for each in result.tool_results]) == ([], [DepthExceeded])


@in_virtual_time
@pytest.mark.parametrize("apart", [False, True], ids=["awaited", "in a task of its own"])
async def test_a_run_that_a_cleanup_begins_after_the_time_is_over_has_the_grace(apart: bool, anyio_backend_name: str):
    if apart and anyio_backend_name != "asyncio":
        pytest.skip("asyncio's own")
    told: list[str] = []
    reporter = BaseAgent("Reporter", "r", client=ScriptedModel([answers.text("told", delay=0.05)]))

    async def work() -> None:
        try:
            await anyio.sleep(60)
        finally:
            run = reporter.run("it was cut")
            told.append(str((await (asyncio.ensure_future(run) if apart else run)).content))

    model = ScriptedModel([answers.call("work"), "done"])
    result = await BaseAgent("A", "a", client=model).add_tool(work).run("go", timeout=0.1)
    assert (told, result.stop_reason) == (["told"], "deadline")


@pytest.mark.parametrize("anyio_backend", [("asyncio", {})], ids=["asyncio"])
async def test_a_deadline_that_the_clock_lets_fire_early_is_over_for_what_a_cleanup_begins(
    monkeypatch: pytest.MonkeyPatch,
):
    reporter = BaseAgent("Reporter", "r", client=ScriptedModel([answers.text("told", delay=0.05)]))
    told: list[str] = []
    loop = asyncio.get_running_loop()
    real = loop.time

    async def work() -> None:
        try:
            await anyio.sleep(60)
        finally:
            late = real() - current_run.get().clock.deadline + 0.001  # type: ignore[union-attr]
            monkeypatch.setattr(loop, "time", lambda: real() - late)  # as uvloop's may read
            told.append(str((await asyncio.ensure_future(reporter.run("it was cut"))).content))

    model = ScriptedModel([answers.call("work"), "done"])
    await BaseAgent("A", "a", client=model).add_tool(work).run("go", timeout=0.1)
    assert told == ["told"]


@pytest.mark.parametrize("anyio_backend", [("asyncio", {})], ids=["asyncio"])
async def test_what_is_begun_while_a_join_is_cancelled_is_joined_as_well():
    below, ended = engine_below.Below(), list[str]()

    async def first() -> None:
        try:
            await anyio.sleep_forever()
        finally:
            with anyio.CancelScope(shield=True):
                joining.cancel()
                await anyio.sleep(0.01)
                below.note(Background(second, "second"), "call", is_reached=False)

    async def second() -> None:
        try:
            await anyio.sleep_forever()
        finally:
            ended.append("second")

    below.note(Background(first, "first"), "call", is_reached=False)
    await anyio.sleep(0.01)
    joining = asyncio.ensure_future(below.end("call"))
    with anyio.fail_after(5), pytest.raises(asyncio.CancelledError):
        await joining
    assert ended == ["second"]
    assert not below


# ---- how deep


@pytest.mark.parametrize(("limit", "answered"), [(None, 9), (3, 4), (12, 12), (20, 12)])
async def test_how_deep_the_tree_may_be_is_what_the_run_at_the_top_says(limit: int | None, answered: int):
    depths: set[int] = set()
    agent = BaseAgent("L0", "bottom", client=ScriptedModel(lambda request: "done"))
    for level in range(1, 12):
        call = answers.call("down", {"query": "?"})
        model = ScriptedModel(lambda request, call=call: "done" if len(request.transcript) > 1 else call)
        agent = BaseAgent(f"L{level}", "n", client=model).register_delegate(agent, "down")
    agent.observers = (lambda event: depths.add(event.depth) if event.kind == "model_requested" else None,)
    result = await agent.run("go", limits=Limits(max_depth=limit) if limit is not None else None)
    assert result.success
    assert len(depths) == answered


async def test_a_run_below_can_only_have_a_nearer_limit_of_depth():
    depths: set[int] = set()
    bottom = BaseAgent("Bottom", "b", client=ScriptedModel(lambda request: "done"))
    agent = bottom
    for name, limits in (("C", Limits(max_depth=5)), ("B", Limits(max_depth=1)), ("A", Limits(max_depth=9))):
        model = ScriptedModel(
            lambda request: "done" if len(request.transcript) > 1 else answers.call("down", {"query": "?"})
        )
        agent = BaseAgent(name, "n", client=model, limits=limits).register_delegate(agent, "down")
    agent.observers = (lambda event: depths.add(event.depth) if event.kind == "model_requested" else None,)
    assert (await agent.run("go")).success
    assert depths == {0, 1, 2}


@pytest.mark.parametrize("seconds", [0.15, 0.3])
async def test_what_a_plain_tool_begins_after_its_grace_is_ended_too(seconds: float):
    below = Below()

    @tool(on_cancel="wait")
    def start() -> None:
        time.sleep(seconds)
        fractal.sync.start(below.agent, "?").result()

    model = ScriptedModel(lambda request: "done" if len(request.transcript) > 1 else answers.call("start"))
    agent = BaseAgent("Above", "a", client=model, limits=Limits(tool_timeout=0.05, grace=0.05)).add_tool(start)
    with anyio.fail_after(10):
        result = await agent.run("go")
    assert (result.content, below.ended) == ("done", below.begun)
