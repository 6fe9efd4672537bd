"""A run at its edges: in another event loop than its parent, after its end, and where nobody is left to be told."""

from __future__ import annotations

import contextvars
import gc
import logging
import time
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import anyio
import anyio.lowlevel
import pytest

from fractal import (
    AgentResult,
    BaseAgent,
    DeadlineExceeded,
    Limits,
    Price,
    RunCancelled,
    SharedBudget,
    run_many,
    sync,
    tool,
)
from fractal._agent import verbs
from fractal._concurrency.background import Background
from fractal._engine.below import Below
from fractal._engine.loop import drive
from fractal._engine.run import Run, run_watchers
from fractal.testing import ScriptedModel, answers


async def test_a_run_in_another_event_loop_has_no_more_time_than_its_parent():
    child = BaseAgent("child", "c", client=ScriptedModel([answers.text("late", delay=60)]), timeout=50)
    results: list[AgentResult] = []

    @tool
    async def ask() -> None:
        with pytest.warns(sync.LoopBlockedWarning):
            results.append(sync.run(child, "go"))

    parent = BaseAgent("parent", "p", client=ScriptedModel([answers.call("ask")])).add_tool(ask)
    assert (await parent.run("go", timeout=0.5)).stop_reason == "deadline"
    [result] = results
    assert isinstance(result.exception, DeadlineExceeded)
    assert 0 < result.exception.seconds <= 0.5


async def test_a_run_whose_time_a_tool_has_taken_without_a_pause_asks_nothing_more() -> None:
    model = ScriptedModel(lambda request: answers.call("block") if len(request.transcript) == 1 else "too late")

    async def block() -> None:
        time.sleep(0.15)  # noqa: ASYNC251

    result = await BaseAgent("A", "a", client=model).add_tool(block).run("go", timeout=0.1)
    assert (result.stop_reason, len(model.requests)) == ("deadline", 1)


async def test_what_begins_below_a_run_that_is_over_is_cancelled() -> None:
    below = Below()
    await below.end()
    task = Background(anyio.sleep_forever, "late")
    below.note(task, None, is_reached=False)
    with anyio.fail_after(5):
        await task.join()
    assert not below


async def test_what_a_call_begins_after_its_grace_is_cancelled_at_once() -> None:
    """Nobody looks any more at what it has begun; as where a thread of its tool begins something that late."""

    class Late:
        below = Below()

        def open_call(self) -> Any:
            return SimpleNamespace(key="call_1", is_out_of_grace=True)

    task = Background(anyio.sleep_forever, "late")
    Run.note_below(Late(), task, is_reached=False)  # type: ignore[arg-type]
    with anyio.fail_after(5):
        await task.join()
    assert task.scope.cancel_called


def late_words(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.message for record in caplog.records if record.levelno >= logging.INFO]


def test_what_comes_after_the_event_loop_has_ended_is_logged(backend: Any, caplog: pytest.LogCaptureFixture):
    caplog.set_level(logging.INFO, "fractal")

    async def begin() -> Run:
        return verbs.begin(BaseAgent("A", "a"), "go")

    run = anyio.run(begin, backend=backend)
    run.emitter.warn_late("the tool has ended")
    assert (late_words(caplog), run.emitter.warnings) == (["the tool has ended"], [])


async def test_what_comes_while_a_run_ends_is_logged(caplog: pytest.LogCaptureFixture):
    caplog.set_level(logging.INFO, "fractal")
    run = verbs.begin(BaseAgent("A", "a"), "go")
    with anyio.fail_after(5):
        run.emitter.warn_late("in time")
        while not run.emitter.warnings:  # there is no event for it
            await anyio.lowlevel.checkpoint()
        run.emitter.warn_late("too late")
        run.fail(RunCancelled())
        while len(late_words(caplog)) < 2:
            await anyio.lowlevel.checkpoint()
    assert (late_words(caplog), run.emitter.warnings) == (["in time", "too late"], ["in time"])


class Stop(BaseException):
    """No Exception, like Ctrl-C."""


async def test_what_is_no_exception_leaves_a_tool_and_its_run_as_itself():
    ended: list[AgentResult] = []

    @tool
    async def stop() -> None:
        raise Stop

    agent = BaseAgent("A", "a", client=ScriptedModel([answers.call("stop")])).add_tool(stop)
    agent.observers = (lambda event: ended.append(event.result) if event.kind == "run_finished" else None,)
    with pytest.raises(Stop) as raised:
        await agent.run("go")
    assert type(raised.value) is Stop
    assert [(result.success, result.stop_reason) for result in ended] == [(False, "error")]


@contextmanager
def runs_made() -> Iterator[weakref.WeakSet[Run]]:
    """The runs that somebody still keeps, of those that are made in the block."""
    runs: weakref.WeakSet[Run] = weakref.WeakSet()
    run_watchers.append(runs.add)
    try:
        yield runs
    finally:
        run_watchers.remove(runs.add)


class Contexts:
    """Contexts that somebody remembers, as an event loop does for its timers."""

    def __init__(self) -> None:
        self.kept: list[contextvars.Context] = []

    def answer(self, _: Any) -> str:
        self.kept.append(contextvars.copy_context())
        return "ok"

    def agent(self) -> BaseAgent:
        return BaseAgent("A", "a", client=ScriptedModel(self.answer))


def garbage() -> set[str]:
    """Names of the classes of ours whose objects only the garbage collector finds now."""
    gc.set_debug(gc.DEBUG_SAVEALL)
    try:
        gc.collect()
        return {type(each).__qualname__ for each in gc.garbage if type(each).__module__.startswith("fractal")}
    finally:
        gc.set_debug(0)
        gc.garbage.clear()


@pytest.mark.parametrize("is_limited", [False, True])
@pytest.mark.parametrize("way", ["run", "stream", "run_many"])
async def test_a_run_leaves_the_garbage_collector_nothing_to_do(way: str, is_limited: bool):
    @tool
    async def look() -> str:
        return "rain"

    child = BaseAgent("child", "c", "m", ScriptedModel(lambda _: "done"))
    both = answers.calls(answers.call("look"), answers.call("delegate_to_child", {"query": "go"}))
    agent = BaseAgent("parent", "p", "m", ScriptedModel([both, "done"]), prices={"m": Price(input=1.0, output=2.0)})
    agent.add_tool(look).register_delegate(child)
    options: dict[str, Any] = {}
    if is_limited:
        limits = Limits(max_cost=1.0, max_tokens=1000, request_timeout=9.0, tool_timeout=9.0, reserve=1.0)
        options = {"limits": limits, "budget": SharedBudget(max_requests=9), "timeout": 20.0}
    gc.collect()
    gc.disable()
    try:
        if way == "stream":
            async with agent.stream("go", **options) as stream:
                assert (await stream.result()).success
            del stream
        elif way == "run":
            assert (await agent.run("go", **options)).success
        else:
            assert (await run_many(agent, ["go"], **options))[0].success
        await anyio.wait_all_tasks_blocked()
        assert garbage() == set()
    finally:
        gc.enable()


async def test_contexts_that_outlive_a_run_do_not_keep_it():
    contexts = Contexts()
    with runs_made() as runs:
        assert (await contexts.agent().run("go")).success
        async with contexts.agent().stream("go") as stream:
            assert (await stream.result()).success
        del stream
        gc.collect()
        assert (len(contexts.kept), len(runs)) == (2, 0)


async def test_contexts_of_a_run_below_do_not_keep_the_run_whose_plain_tool_began_it():
    contexts = Contexts()
    child = contexts.agent()

    @tool
    def ask() -> str:
        return str(sync.run(child, "go").content)

    parent = BaseAgent("parent", "p", client=ScriptedModel([answers.call("ask"), "done"])).add_tool(ask)
    with runs_made() as runs:
        assert (await parent.run("go")).content == "done"
        # The worker thread hands its result over before it lets go of the context that it has called in.
        with anyio.fail_after(30):
            while runs:
                await anyio.sleep(0.001)
                gc.collect()
        assert len(contexts.kept) == 1


async def test_what_begins_in_a_context_that_outlives_a_run_is_not_below_it():
    contexts = Contexts()
    run = verbs.begin(contexts.agent(), "go")
    await drive(run)
    [context] = contexts.kept
    assert context.run(verbs.begin, contexts.agent(), "go").parent is None
