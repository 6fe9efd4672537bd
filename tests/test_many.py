"""Many inputs for one agent: order, limits, failures, cancellation, progress, and what memory holds."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import io
import os
import re
import signal
import subprocess
import sys
import textwrap
import threading
import time
import weakref
from collections import Counter
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path
from typing import Any

import anyio
import anyio.lowlevel
import anyio.to_thread
import pydantic
import pytest

from fractal import (
    AgentResult,
    BaseAgent,
    InvalidArguments,
    Limits,
    Refused,
    RunCancelled,
    RunError,
    RunFinished,
    RunStarted,
    sync,
    tool,
)
from fractal._views.progress import described
from fractal.many import BatchItem, BatchStream, Progress, run_many, stream_many
from fractal.model import Reply
from fractal.models.openai import OpenAIModel
from fractal.testing import Endpoint, ScriptedModel, answers
from tests.support import in_thread, outcomes, shown

StartEndpoint = Callable[..., Endpoint]


def question(request: Any) -> str:
    return request.transcript.messages[-1]["content"]


def echo(request: Any) -> Any:
    """Repeats the question; one that hangs is never answered, one that is bad fails."""
    text = question(request)
    if "hang" in text:
        return answers.hang()
    return answers.failure(400, "odd") if "bad" in text else text


class Runs:
    """An observer that counts runs."""

    def __init__(self) -> None:
        self.begun = self.ended = 0
        self.depths: list[int] = []

    def __call__(self, event: object) -> None:
        if isinstance(event, RunStarted):
            self.begun += 1
            self.depths.append(event.depth)
        self.ended += isinstance(event, RunFinished)


def agent(reply: Any = echo, **options: Any) -> BaseAgent:
    return BaseAgent("A", "a", client=ScriptedModel(reply), **options)


class Counted:
    """Inputs without end that say how many have been taken."""

    def __init__(self, text: str = "{}") -> None:
        self.text, self.taken = text, 0

    def __iter__(self) -> Iterator[str]:
        while True:
            self.taken += 1
            yield self.text.format(self.taken - 1)


def contents(results: list[AgentResult]) -> list[object]:
    return [result.content if result.success else result.stop_reason for result in results]


async def later(*inputs: object) -> AsyncIterator[object]:
    for each in inputs:
        await anyio.lowlevel.checkpoint()
        yield each


# ---- results


async def test_results_are_in_the_order_of_the_inputs_whatever_order_the_runs_end_in():
    ended: list[str] = []
    may_end = [anyio.Event() for _ in range(5)]

    async def last_first(n: int) -> str:
        if n < 4:
            await may_end[n].wait()
        return str(n)

    def note(event: object) -> None:
        if isinstance(event, RunFinished):
            ended.append(event.result.content)
            may_end[int(event.result.content) - 1].set()

    def reply(request: Any) -> Any:
        last = request.transcript.messages[-1]
        return answers.call("last_first", {"n": int(last["content"])}) if last["role"] == "user" else last["content"]

    one = agent(reply, observers=[note]).add_tool(last_first)
    with anyio.fail_after(10):
        results = await run_many(one, map(str, range(5)), max_concurrency=5)
    assert contents(results) == ["0", "1", "2", "3", "4"]
    assert ended == ["4", "3", "2", "1", "0"]


async def test_failed_runs_are_results_in_their_places():
    results = await run_many(agent(), ["a", "bad", "c"])
    assert contents(results) == ["a", "model_error", "c"]


@pytest.mark.parametrize("inputs", [[], (), range(0), iter(())], ids=shown)
async def test_no_inputs_no_results(inputs: Any):
    assert await run_many(agent(), inputs) == []
    async with stream_many(agent(), inputs) as batch:
        assert [item async for item in batch] == []


async def test_inputs_are_whatever_a_run_takes():
    class Question(pydantic.BaseModel):
        city: str

    inputs = [{"a": 1}, [1], Question(city="Rome"), 7, ""]
    assert contents(await run_many(agent(lambda r: f"<{question(r)}>"), inputs)) == [
        '<{"a":1}>',
        "<[1]>",
        '<{"city":"Rome"}>',
        "<7>",
        "<>",
    ]


async def test_options_are_those_of_each_run(endpoint: StartEndpoint):
    endpoint(answers.text("late", delay=30))
    history = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "yes?"}]
    results = await run_many(BaseAgent("A", "a"), ["x", "y"], timeout=0.1, messages=history)
    assert [(result.stop_reason, len(result.messages)) for result in results] == [("deadline", 3)] * 2


async def test_results_come_as_the_runs_end_with_their_inputs():
    gates = {name: anyio.Event() for name in "abc"}

    async def wait(name: str) -> str:
        await gates[name].wait()
        return name.upper()

    def reply(request: Any) -> Any:
        last = request.transcript.messages[-1]
        return answers.call("wait", {"name": last["content"]}) if last["role"] == "user" else last["content"]

    with anyio.fail_after(10):
        async with stream_many(agent(reply).add_tool(wait), ["a", "b", "c"], max_concurrency=3) as batch:
            seen: list[tuple[int, object, object]] = []
            for name in "cab":
                gates[name].set()
                item = await anext(batch)
                seen.append((item.index, item.input, item.result.content))
            assert seen == [(2, "c", "C"), (0, "a", "A"), (1, "b", "B")]
            with pytest.raises(StopAsyncIteration):
                await anext(batch)


async def test_an_answer_is_there_while_the_next_input_is_waited_for():
    send, receive = anyio.create_memory_object_stream[str]()
    with anyio.fail_after(10):
        async with send, receive, stream_many(agent(), receive) as batch:
            for text in ("one", "two"):
                await send.send(text)
                assert (await anext(batch)).result.content == text


# ---- how much at a time


@pytest.mark.parametrize("max_concurrency", [1, 3])
async def test_no_more_inputs_are_taken_than_may_run(max_concurrency: int, endpoint: StartEndpoint):
    one = endpoint(answers.hang())
    inputs, runs = Counted(), Runs()
    with anyio.move_on_after(30) as scope:
        async with anyio.create_task_group() as group:
            group.start_soon(
                lambda: run_many(BaseAgent("A", "a", observers=[runs]), inputs, max_concurrency=max_concurrency)
            )
            await in_thread(one.wait_for_requests, max_concurrency)
            await anyio.wait_all_tasks_blocked()
            assert inputs.taken == len(one.requests) == max_concurrency
            group.cancel_scope.cancel()
    assert not scope.cancelled_caught
    assert runs.begun == runs.ended == max_concurrency
    await in_thread(one.wait_for_disconnects, max_concurrency)


async def test_so_many_run_at_a_time_and_no_more(endpoint: StartEndpoint):
    one = endpoint("ok", latency=0.05)
    results = await run_many(BaseAgent("A", "a"), map(str, range(24)), max_concurrency=6)
    assert len(results) == 24
    assert one.max_in_flight == 6


@pytest.mark.parametrize(("max_concurrency", "buffer"), [(1, 0), (3, 0), (2, 5)])
async def test_a_reader_that_stops_holds_the_runs(max_concurrency: int, buffer: int):
    inputs = Counted()
    async with stream_many(agent(), inputs, max_concurrency=max_concurrency, buffer=buffer) as batch:
        for read in range(4):
            await anyio.wait_all_tasks_blocked()
            assert inputs.taken == max_concurrency + buffer + read
            assert batch.progress.done == inputs.taken
            assert batch.progress.running == 0
            assert (await anext(batch)).result.success


# ---- failures


async def test_an_input_that_is_none_is_told_with_its_place(endpoint: StartEndpoint):
    endpoint(lambda request: "ok")
    with pytest.raises(InvalidArguments, match="user_input is None") as raised:
        await run_many(BaseAgent("A", "a"), ["a", None, "b"])
    assert raised.value.__notes__ == ["this was input 1 of a batch, counted from 0"]


async def test_the_first_failure_cancels_the_others_and_is_raised(endpoint: StartEndpoint):
    one = endpoint(
        lambda request: (
            answers.failure(400, "odd") if request.body["messages"][-1]["content"] == "2" else answers.hang()
        )
    )
    inputs, runs = Counted(), Runs()

    async def patient() -> AsyncIterator[str]:
        for text in inputs:
            if text == "2":
                await in_thread(one.wait_for_requests, 2)  # the others are under way
            yield text

    with anyio.fail_after(20), pytest.raises(RunError, match="odd") as raised:
        await run_many(BaseAgent("A", "a", observers=[runs]), patient(), max_concurrency=3, on_error="fail_fast")
    assert raised.value.result is not None
    assert raised.value.result.stop_reason == "model_error"
    assert raised.value.__notes__ == ["this was input 2 of a batch, counted from 0"]
    assert (inputs.taken, runs.begun, runs.ended) == (3, 3, 3)
    await in_thread(one.wait_for_disconnects, 2)


async def test_of_several_failures_at_once_the_first_is_raised_alone():
    with pytest.raises(RunError, match="odd"):
        await run_many(agent(), ["bad"] * 5, max_concurrency=5, on_error="fail_fast")


async def test_a_failure_in_the_same_moment_is_a_note_of_the_first():
    waiting: list[object] = []
    go = anyio.Event()

    class Refuses:
        async def respond(self, request: object) -> Reply:
            waiting.append(request)
            if len(waiting) == 3:
                go.set()
            await go.wait()
            return Reply(refusal="no")

    with pytest.raises(Refused) as raised:
        await run_many(BaseAgent("A", "a", client=Refuses()), list("abc"), on_error="fail_fast")
    [own, *others] = raised.value.__notes__
    assert own.startswith("this was input ")
    assert others  # all three on trio; asyncio cancels the last one in time
    assert all(re.fullmatch(r"input \d failed as well: Refused: no", note) for note in others)


async def test_without_a_failure_fail_fast_changes_nothing():
    assert contents(await run_many(agent(), ["a", "b"], on_error="fail_fast")) == ["a", "b"]


async def test_a_failure_reaches_the_reader_once_and_after_the_results_before_it():
    seen: list[object] = []
    async with stream_many(agent(), ["a", "b", "bad", "c"], max_concurrency=1, on_error="fail_fast") as batch:
        with pytest.raises(RunError, match="odd") as raised:
            while True:
                seen.append((await anext(batch)).result.content)
        with pytest.raises(StopAsyncIteration):
            await anext(batch)
    assert seen == ["a", "b"]
    assert raised.value.result is not None
    assert (batch.progress.done, batch.progress.failed, batch.progress.running) == (3, 1, 0)


async def test_a_failure_that_nobody_has_read_is_raised_at_the_end_of_the_block():
    with pytest.raises(RunError, match="odd"):
        async with stream_many(agent(), ["bad"], on_error="fail_fast"):
            await anyio.wait_all_tasks_blocked()


async def test_an_error_in_the_block_comes_out_and_knows_of_the_failure():
    with pytest.raises(ZeroDivisionError) as raised:
        async with stream_many(agent(), ["bad"], on_error="fail_fast"):
            await anyio.wait_all_tasks_blocked()
            raise ZeroDivisionError
    assert "the batch ended with StatusError: HTTP 400: odd" in raised.value.__notes__


def broken_at(place: int) -> Iterator[str]:
    for n in range(place):
        yield f"hang {n}"
    raise LookupError("no more")


async def broken_later(place: int) -> AsyncIterator[str]:
    for text in broken_at(place):
        await anyio.lowlevel.checkpoint()
        yield text


@pytest.mark.parametrize("inputs", [broken_at, broken_later])
@pytest.mark.parametrize("place", [0, 3])
async def test_inputs_that_raise_cancel_the_runs_and_the_error_comes_out_alone(inputs: Any, place: int):
    runs = Runs()
    one = agent(observers=[runs])
    with anyio.fail_after(10):
        with pytest.raises(LookupError, match="no more"):
            await run_many(one, inputs(place))
        assert runs.begun == runs.ended
        async with stream_many(one, inputs(place)) as batch:
            with pytest.raises(LookupError, match="no more"):
                await anext(batch)
    assert runs.begun == runs.ended


class Quit(BaseException):
    """No `Exception`, as Ctrl-C is none."""


@pytest.mark.parametrize("where", ["inputs", "model"])
async def test_a_group_that_ends_a_batch_comes_out_as_it_is(where: str):
    group = BaseExceptionGroup("of the user's own", [LookupError("one"), Quit("other")])

    class Model:
        async def respond(self, request: object) -> Any:
            raise group

    def inputs() -> Iterator[str]:
        yield "one"
        raise group

    one = agent() if where == "inputs" else BaseAgent("A", "a", client=Model())
    caught: list[tuple[object, ...]] = []
    try:
        await run_many(one, inputs() if where == "inputs" else ["one"])
    except BaseExceptionGroup as error:  # trio makes it anew
        caught.append((error.message, *error.exceptions))
    assert caught == [(group.message, *group.exceptions)]


async def test_an_input_that_cannot_be_one_cancels_the_runs_and_is_told_alone():
    runs = Runs()
    with pytest.raises(InvalidArguments, match="user_input is None"):
        await run_many(agent(observers=[runs]), ["hang", None, None], max_concurrency=3)
    assert runs.begun == runs.ended == 1


# ---- wrong use


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"max_concurrency": 0}, "max_concurrency=0: give 1 or more"),
        ({"max_concurrency": 1.5}, "max_concurrency=1.5"),
        ({"max_concurrency": True}, "max_concurrency=True"),
        ({"max_concurrency": "8"}, "max_concurrency='8'"),
        ({"on_error": "raise"}, "on_error='raise': give \"collect\""),
        ({"timout": 1}, r"\['timout'\]"),
        ({"limits": 3}, "give Limits"),
    ],
    ids=str,
)
async def test_options_that_cannot_be_meant_are_told_before_an_input_is_taken(options: dict[str, Any], words: str):
    inputs = Counted()
    with pytest.raises(InvalidArguments, match=words):
        await run_many(agent(), inputs, **options)
    with pytest.raises(InvalidArguments, match=words):
        async with stream_many(agent(), inputs, **options):
            pass
    with pytest.raises(InvalidArguments, match=words):
        await anyio.to_thread.run_sync(lambda: sync.run_many(agent(), inputs, **options))
    assert inputs.taken == 0


@pytest.mark.parametrize("buffer", [-1, 1.5, True, None])
def test_a_buffer_is_a_number_of_results(buffer: Any):
    with pytest.raises(InvalidArguments, match="buffer="):
        stream_many(agent(), [], buffer=buffer)
    with pytest.raises(InvalidArguments, match="buffer="):
        sync.stream_many(agent(), [], buffer=buffer)


async def after(progress: Progress) -> None:
    pass


@pytest.mark.parametrize("progress", ["bar", 1, after], ids=["text", "number", "async function"])
async def test_what_is_told_of_progress_is_a_plain_function(progress: Any):
    with pytest.raises(InvalidArguments, match="a plain function that takes a Progress"):
        await run_many(agent(), ["a"], progress=progress)


class Model(pydantic.BaseModel):
    a: int = 1


@pytest.mark.parametrize("inputs", ["ab", b"ab", bytearray(b"ab"), {"a": 1}, Model()], ids=lambda i: type(i).__name__)
def test_one_input_is_not_taken_for_many(inputs: Any):
    with pytest.raises(InvalidArguments, match="put it into a list"):
        stream_many(agent(), inputs)


@pytest.mark.parametrize("inputs", [3, None, object()], ids=lambda i: type(i).__name__)
def test_what_is_no_iterable_is_refused(inputs: Any):
    with pytest.raises(InvalidArguments, match="give a list, a generator"):
        stream_many(agent(), inputs)


def test_what_is_no_agent_is_refused():
    with pytest.raises(InvalidArguments, match="give an agent, then the inputs"):
        stream_many(["a"], agent())  # type: ignore[arg-type]


async def test_a_batch_is_entered_before_it_is_read_and_only_once():
    batch = stream_many(agent(), ["a"])
    with pytest.raises(InvalidArguments, match="async with stream_many"):
        await anext(batch)
    assert batch.progress == Progress(total=1, done=0, failed=0, running=0, elapsed=0.0)
    await batch.aclose()  # there is nothing to close
    async with batch:
        assert len([item async for item in batch]) == 1
    with pytest.raises(InvalidArguments, match="once"):
        await batch.__aenter__()


# ---- inputs that have to wait


async def test_inputs_may_come_from_an_async_iterator():
    assert contents(await run_many(agent(), later("a", "b", "c"), max_concurrency=2)) == ["a", "b", "c"]


async def test_what_can_be_read_both_ways_is_read_without_blocking():
    class Query:
        def __len__(self) -> int:
            raise AssertionError("this would wait")

        def __iter__(self) -> Any:
            raise AssertionError("this would wait")

        def __aiter__(self) -> Any:
            return later("a")

    assert contents(await run_many(agent(), Query())) == ["a"]


@pytest.mark.parametrize("end", ["break", "failure", "cancel"])
async def test_an_async_generator_is_stepped_and_closed_in_one_task(end: str):
    tasks: list[int] = []

    async def inputs() -> AsyncIterator[str]:
        # A scope that another task leaves raises, and takes down whatever runs there.
        with anyio.CancelScope():
            try:
                while True:
                    tasks.append(anyio.get_current_task().id)
                    yield "bad" if len(tasks) == 2 and end == "failure" else "hang" if len(tasks) > 2 else "ok"
            finally:
                await anyio.lowlevel.checkpoint_if_cancelled()
                await anyio.sleep(0)
                tasks.append(anyio.get_current_task().id)

    one = agent()
    on_error: Any = "fail_fast" if end == "failure" else "collect"
    with anyio.fail_after(10):
        if end == "cancel":
            with anyio.move_on_after(0.05):
                await run_many(one, inputs(), max_concurrency=2)
        else:
            with contextlib.suppress(RunError):
                async with stream_many(one, inputs(), max_concurrency=2, on_error=on_error) as batch:
                    async for _ in batch:
                        if end == "break":
                            break
    assert len(set(tasks)) == 1


async def test_a_generator_that_does_not_end_is_left_and_named(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr("fractal._batch._CLOSE_SECONDS", 0.05)

    async def inputs() -> AsyncIterator[str]:
        try:
            yield "bad"
            yield "hang"
        finally:
            await anyio.sleep(30)

    with anyio.fail_after(10):
        with pytest.raises(RunError, match="odd"):
            await run_many(agent(), inputs(), max_concurrency=2, on_error="fail_fast")
        with anyio.CancelScope() as scope:
            async with anyio.create_task_group() as group:
                group.start_soon(lambda: run_many(agent(lambda _: answers.hang()), inputs(), max_concurrency=2))
                await anyio.wait_all_tasks_blocked()
                scope.cancel()
    assert scope.cancelled_caught
    assert caplog.text.count("has not cleaned up within 0.05 s") == 2


async def test_a_generator_that_does_not_end_swallows_no_cancellation(
    anyio_backend_name: str, monkeypatch: pytest.MonkeyPatch
):
    if anyio_backend_name != "asyncio":
        pytest.skip("asyncio's own, which is told once")
    monkeypatch.setattr("fractal._batch._CLOSE_SECONDS", 0.05)

    async def inputs() -> AsyncIterator[str]:
        try:
            yield "hang"
        finally:
            await anyio.sleep(30)

    runs = Runs()
    task = asyncio.ensure_future(run_many(agent(observers=[runs]), inputs(), max_concurrency=1))
    await anyio.wait_all_tasks_blocked()
    task.cancel()
    with anyio.fail_after(10), pytest.raises(asyncio.CancelledError):
        await task
    assert runs.begun == runs.ended == 1


# ---- leaving early, and cancellation


async def test_leaving_early_cancels_what_runs_and_waits_for_it(endpoint: StartEndpoint):
    one = endpoint(lambda r: "ok" if r.body["messages"][-1]["content"] == "0" else answers.hang())
    inputs, runs = Counted(), Runs()
    with anyio.fail_after(20):
        async with stream_many(BaseAgent("A", "a", observers=[runs]), inputs, max_concurrency=4, buffer=1) as batch:
            async for item in batch:
                assert item.index == 0
                await in_thread(one.wait_for_requests, 5)
                break
        assert batch.progress.running == 0
        assert runs.begun == runs.ended == inputs.taken == 5
        await in_thread(one.wait_for_disconnects, 4)


async def test_an_error_in_the_block_comes_out_alone():
    runs = Runs()
    with pytest.raises(ZeroDivisionError), anyio.fail_after(10):
        async with stream_many(agent(observers=[runs]), Counted("hang {}")):
            await anyio.wait_all_tasks_blocked()
            raise ZeroDivisionError
    assert runs.begun == runs.ended == 8


@pytest.mark.parametrize("way", ["all at the end", "as they come"])
@pytest.mark.parametrize("by", ["scope", "wait_for", "task"])
async def test_cancellation_leaves_no_task_and_no_unfinished_run(way: str, by: str, anyio_backend_name: str):
    if by != "scope" and anyio_backend_name != "asyncio":
        pytest.skip("asyncio's own")
    under_way = cleaned = 0

    async def slow() -> None:
        nonlocal under_way, cleaned
        under_way += 1
        if under_way == 3:
            began.set()
        try:
            await anyio.sleep(30)
        finally:
            with anyio.CancelScope(shield=True):
                await anyio.sleep(0.02)
                cleaned += 1

    began, runs = anyio.Event(), Runs()
    one = agent(calls_then_done("slow"), observers=[runs]).add_tool(slow)

    async def go() -> None:
        if way == "as they come":
            async with stream_many(one, Counted(), max_concurrency=3) as batch:
                await anext(batch)
        else:
            await run_many(one, Counted(), max_concurrency=3)

    started = time.monotonic()
    if by == "scope":
        with pytest.raises(TimeoutError), anyio.fail_after(0.2):
            await go()
    elif by == "wait_for":
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(go(), 0.2)
    else:
        task = asyncio.ensure_future(go())
        await began.wait()
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
    assert time.monotonic() - started < 5
    assert (cleaned, runs.begun, runs.ended) == (3, 3, 3)


def calls_then_done(name: str) -> Callable[[Any], Any]:
    def reply(request: Any) -> Any:
        return answers.call(name) if request.transcript.messages[-1]["role"] == "user" else "done"

    return reply


async def test_a_batch_may_sit_in_a_generator_that_somebody_drops_in_another_task(caplog: pytest.LogCaptureFixture):
    runs = Runs()

    async def each() -> AsyncIterator[object]:
        async with stream_many(agent(observers=[runs]), Counted("{} hang"), max_concurrency=2) as batch:
            yield batch
            async for item in batch:
                yield item

    generators = [each(), each()]
    batches: list[BatchStream] = []

    async def step(generator: Any) -> None:
        batches.append(await anext(generator))

    with anyio.fail_after(10):
        for generator in generators:
            async with anyio.create_task_group() as group:
                group.start_soon(step, generator)
        await anyio.wait_all_tasks_blocked()
        for generator in generators:
            await generator.aclose()
    assert [batch.progress.running for batch in batches] == [0, 0]
    assert runs.begun == runs.ended == 4
    assert caplog.text == ""


async def test_a_reader_who_was_given_more_time_gets_all():
    with anyio.fail_after(0.05) as scope:
        async with stream_many(agent(lambda r: answers.text("ok", delay=0.2)), ["a", "b"], max_concurrency=1) as batch:
            scope.deadline += 20
            assert len([item async for item in batch]) == 2


async def test_what_belongs_to_a_batch_can_end_it_but_not_wait_for_it():
    batches: list[BatchStream] = []

    async def stop() -> None:
        await batches[0].aclose()
        await anyio.sleep(30)

    async def inputs() -> AsyncIterator[str]:
        yield "a"
        await batches[1].aclose()
        await anyio.sleep(30)

    runs = Runs()
    one = agent(calls_then_done("stop"), observers=[runs]).add_tool(stop)
    with anyio.fail_after(10):
        async with stream_many(one, Counted(), max_concurrency=1) as batch:
            batches.append(batch)
            assert [item async for item in batch] == []
        async with stream_many(agent(), inputs(), max_concurrency=2) as batch:
            batches.append(batch)
            assert len([item async for item in batch]) <= 1
    assert runs.begun == runs.ended == 1


# ---- inside a run


class Parent(BaseAgent):
    """Asks its child many times, by each verb."""

    def __init__(self, child: BaseAgent, *calls: str, **options: Any) -> None:
        super().__init__("Parent", "p", client=ScriptedModel(self.reply), **options)
        self.child, self.calls = child, calls
        self.began = threading.Event()
        self.release = threading.Event()
        self.ended = threading.Event()

    def reply(self, request: Any) -> Any:
        last = request.transcript.messages[-1]
        return answers.calls(*map(answers.call, self.calls)) if last["role"] == "user" else "done"

    @tool
    async def all_at_once(self) -> list[object]:
        return contents(await run_many(self.child, map(str, range(4)), max_concurrency=2))

    @tool
    async def as_they_come(self) -> list[object]:
        async with stream_many(self.child, map(str, range(4)), max_concurrency=2) as batch:
            return sorted([item.result.content async for item in batch])

    @tool
    def blocking(self) -> list[object]:
        return contents(sync.run_many(self.child, map(str, range(4)), max_concurrency=2))

    @tool
    def blocking_stream(self) -> list[object]:
        with sync.stream_many(self.child, map(str, range(4)), max_concurrency=2) as batch:
            return sorted(item.result.content for item in batch)

    @tool
    def stuck(self) -> None:
        try:
            with sync.stream_many(self.child, Counted("hang {}"), max_concurrency=3):
                self.began.set()
                self.release.wait(30)
        finally:
            self.ended.set()

    @tool(timeout=0.1)
    async def with_a_timeout(self) -> None:
        await run_many(self.child, Counted("hang {}"), max_concurrency=3)


VERBS = ["all_at_once", "as_they_come", "blocking", "blocking_stream"]


@pytest.mark.parametrize("verb", VERBS)
async def test_in_a_tool_the_runs_are_children_of_the_run(verb: str, endpoint: StartEndpoint):
    one = endpoint(lambda request: request.body["messages"][-1]["content"], latency=0.02)
    runs = Runs()
    result = await Parent(BaseAgent("Child", "c", observers=[runs]), verb).run("go", limits=Limits(max_requests=20))
    assert result.tool_results[0].content == ["0", "1", "2", "3"]
    assert runs.depths == [1] * 4
    assert one.max_in_flight == 2
    assert result.usage.requests == 4 + 2


@pytest.mark.parametrize("verb", VERBS)
async def test_in_a_tool_the_runs_share_the_budget_of_the_run(verb: str, endpoint: StartEndpoint):
    one = endpoint(lambda request: request.body["messages"][-1]["content"])
    result = await Parent(BaseAgent("Child", "c"), verb).run("go", limits=Limits(max_requests=3))
    [called] = result.tool_results
    assert len(one.requests) == 2
    assert called.outcome == "ok"
    # The verbs that come as they end are sorted, and what went wrong is a sentence there.
    assert Counter(len(str(content)) == 1 for content in called.content) == {True: 2, False: 2}


async def test_a_tools_deadline_ends_the_runs_inside():
    runs = Runs()
    result = await Parent(agent(observers=[runs]), "with_a_timeout").run("go")
    assert outcomes(result) == ["timeout"]
    assert runs.begun == runs.ended == 3


async def test_a_run_that_is_cut_ends_the_batch_that_its_thread_cannot_close():
    runs = Runs()
    parent = Parent(agent(observers=[runs]), "stuck")
    try:
        async with anyio.create_task_group() as group:
            group.start_soon(parent.run, "go")
            await in_thread(parent.began.wait, 10)
            await anyio.wait_all_tasks_blocked()
            assert runs.begun == 3
            group.cancel_scope.cancel()
        assert runs.begun == runs.ended == 3
    finally:
        parent.release.set()
        await in_thread(parent.ended.wait, 10)


# ---- progress


@pytest.mark.parametrize(
    ("progress", "rate", "remaining", "text"),
    [
        ((10, 4, 1, 2, 2.0), 2.0, 3.0, "4 of 10 done, 1 failed, 2.0/s, 0:03 left"),
        ((10, 0, 0, 2, 2.0), 0.0, None, "0 of 10 done, in 0:02"),
        ((10, 0, 0, 0, 0.0), 0.0, None, "0 of 10 done, in 0:00"),
        ((10, 10, 0, 0, 4.0), 2.5, 0.0, "10 of 10 done, 2.5/s, in 0:04"),
        ((None, 3, 0, 1, 90.0), 1 / 30, None, "3 done, 2.0/min, in 1:30"),
        ((2, 3, 0, 0, 3.0), 1.0, 0.0, "3 of 2 done, 1.0/s, in 0:03"),
        ((0, 0, 0, 0, 0.0), 0.0, 0.0, "0 of 0 done, in 0:00"),
        ((8001, 1, 0, 2, 1.0), 1.0, 8000.0, "1 of 8001 done, 1.0/s, 2:13:20 left"),
    ],
    ids=str,
)
def test_progress_says_how_fast_and_how_long(progress: Any, rate: float, remaining: float | None, text: str):
    total, done, failed, running, elapsed = progress
    one = Progress(total=total, done=done, failed=failed, running=running, elapsed=elapsed)
    assert (one.rate, one.remaining, described(one)) == (pytest.approx(rate), remaining, text)


async def test_a_function_is_told_of_each_run_that_ends():
    told: list[Progress] = []
    await run_many(agent(), ["a", "bad", "c"], max_concurrency=1, progress=told.append)
    assert [(p.total, p.done, p.failed, p.running) for p in told] == [(3, 1, 0, 0), (3, 2, 1, 0), (3, 3, 1, 0)]
    assert 0 < told[0].elapsed <= told[1].elapsed <= told[2].elapsed
    told.clear()
    inputs = (text for text in ["a", "bad", "c"])
    with pytest.raises(RunError):
        await run_many(agent(), inputs, max_concurrency=1, progress=told.append, on_error="fail_fast")
    assert [(p.total, p.done, p.failed) for p in told] == [(None, 1, 0), (None, 2, 1)]


async def test_a_function_that_raises_is_logged_and_disturbs_nobody(caplog: pytest.LogCaptureFixture):
    def broken(progress: Progress) -> None:
        raise LookupError("told too much")

    assert contents(await run_many(agent(), ["a", "b"], progress=broken)) == ["a", "b"]
    assert caplog.text.count("LookupError: told too much") == 2


async def test_progress_of_a_stream_is_there_at_any_time_and_stands_still_at_the_end():
    async with stream_many(agent(), ["a", "bad", "hang"], max_concurrency=3) as batch:
        await anyio.wait_all_tasks_blocked()
        progress = batch.progress
        assert (progress.total, progress.done, progress.failed, progress.running) == (3, 2, 1, 1)
        assert progress.remaining is not None
    ended = batch.progress
    assert (ended.done, ended.running) == (2, 0)
    await anyio.sleep(0.01)
    assert batch.progress == ended


@pytest.mark.parametrize("progress", [None, False])
async def test_nothing_is_shown_unasked(progress: Any, capsys: pytest.CaptureFixture[str]):
    await run_many(agent(), ["a"], progress=progress)
    assert capsys.readouterr() == ("", "")


class Paper(io.StringIO):
    """A standard error that is no terminal, and tells when something is written on it."""

    def __init__(self) -> None:
        super().__init__()
        self.awaited: dict[str, anyio.Event] = {}

    def write(self, text: str) -> int:
        written = super().write(text)
        for words, event in self.awaited.items():
            if words in self.getvalue():
                event.set()
        return written

    async def wait_for(self, words: str) -> None:
        await self.awaited.setdefault(words, anyio.Event()).wait()


async def test_without_a_terminal_there_is_a_line_now_and_then(monkeypatch: pytest.MonkeyPatch):
    paper = Paper()
    monkeypatch.setattr(sys, "stderr", paper)
    monkeypatch.setattr("fractal._views.progress._Lines.seconds", 0.01)

    async def inputs() -> AsyncIterator[str]:
        await paper.wait_for("fractal: 0 done, in 0:00\n")
        yield "a"
        await paper.wait_for("fractal: 1 done, ")
        yield "bad"

    with anyio.fail_after(10):
        await run_many(agent(), inputs(), progress=True)
    assert re.fullmatch(r"fractal: 2 done, 1 failed, \S+, in 0:\d\d", paper.getvalue().splitlines()[-1])


async def test_the_last_line_is_shown_also_after_a_failure(capsys: pytest.CaptureFixture[str]):
    with pytest.raises(RunError):
        await run_many(agent(), ["bad", "b"], max_concurrency=1, progress=True, on_error="fail_fast")
    with pytest.raises(InvalidArguments):
        await run_many(agent(), ["a"], progress=True, limits=3)  # type: ignore[arg-type]  # nothing has begun
    assert re.fullmatch(r"fractal: 1 of 2 done, 1 failed, \S+, 0:\d\d left\n", capsys.readouterr().err)


class Terminal(io.StringIO):
    encoding = "utf-8"

    def isatty(self) -> bool:
        return True


@pytest.fixture
def terminal(monkeypatch: pytest.MonkeyPatch) -> Callable[[], Terminal]:
    """Puts a terminal in the place of standard error; pytest puts its own there when a test begins."""

    def put() -> Terminal:
        monkeypatch.setattr(sys, "stderr", Terminal())
        return sys.stderr  # type: ignore[return-value]

    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.setenv("COLUMNS", "100")
    return put


async def test_on_a_terminal_there_is_a_bar(terminal: Callable[[], Terminal]):
    pytest.importorskip("rich")

    def reply(request: Any) -> Any:
        sys.stderr.write("said on the way\n")
        return echo(request)

    screen = terminal()
    await run_many(agent(reply), ["a", "bad"], max_concurrency=1, progress=True)
    assert sys.stderr is screen  # whatever stood in for it has gone
    shown = screen.getvalue()
    assert "━━━" in shown
    assert shown.count("said on the way") == 2
    assert re.search(r" 2 of 2 done, 1 failed, \S+, in 0:\d\d\r?\n", shown)


async def test_a_second_bar_would_draw_over_the_first_and_is_lines(terminal: Callable[[], Terminal]):
    pytest.importorskip("rich")
    screen = terminal()
    async with anyio.create_task_group() as group:
        for _ in range(2):
            group.start_soon(lambda: run_many(agent(), ["a"], progress=True))
    shown = screen.getvalue()
    assert len(re.findall(r"fractal: 1 of 1 done", shown)) == 1
    assert "━━━ 1 of 1 done" in re.sub(r"\x1b\[[\d;]*m", "", shown)


async def test_without_rich_a_terminal_gets_lines(terminal: Callable[[], Terminal], monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    screen = terminal()
    await run_many(agent(), ["a"], progress=True)
    assert re.fullmatch(r"fractal: 1 of 1 done, \S+, in 0:\d\d\n", screen.getvalue())


async def test_a_terminal_that_has_gone_is_no_reason_to_fail(
    terminal: Callable[[], Terminal], monkeypatch: pytest.MonkeyPatch
):
    def gone(text: str) -> int:
        raise OSError("input/output error")

    screen = terminal()
    monkeypatch.setattr(screen, "write", gone)
    monkeypatch.setattr("fractal._views.progress._Lines.seconds", 0.01)
    one = agent(lambda r: answers.text("ok", delay=0.05))
    assert len(await run_many(one, ["a"], progress=True)) == 1
    monkeypatch.setattr(screen, "isatty", lambda: False)
    assert len(await run_many(one, ["a"], progress=True)) == 1


# ---- from blocking code


@pytest.fixture(params=["shared", "asyncio", "trio", pytest.param("uvloop", marks=pytest.mark.slow)])
def portal(request: pytest.FixtureRequest) -> Iterator[object]:
    """The shared portal, and one of each kind for a block."""
    kinds: dict[str, Any] = {"asyncio": {}, "trio": {"backend": "trio"}, "uvloop": {"use_uvloop": True}}
    if request.param == "uvloop":
        pytest.importorskip("uvloop")
    with sync.portal(**kinds[request.param]) if request.param in kinds else contextlib.nullcontext() as own:
        yield own


def test_the_facade_gives_the_same(portal: object, capsys: pytest.CaptureFixture[str]):
    told: list[int] = []
    results = sync.run_many(agent(), ["a", "bad", "c"], progress=lambda p: told.append(p.done))
    assert (contents(results), told) == (["a", "model_error", "c"], [1, 2, 3])
    assert contents(sync.run_many(agent(), later("a", "b"), progress=True)) == ["a", "b"]
    assert capsys.readouterr().err.startswith("fractal: 2 done")
    with pytest.raises(RunError, match="odd") as raised:
        sync.run_many(agent(), ["a", "bad", "c"], on_error="fail_fast", max_concurrency=1)
    assert raised.value.result is not None


def test_the_facade_streams(portal: object):
    runs = Runs()
    with sync.stream_many(agent(observers=[runs]), map(str, range(20)), max_concurrency=3, buffer=0) as batch:
        items = list(batch)
        assert next(batch, None) is None
    assert sorted((item.index, item.input, item.result.content) for item in items) == [
        (n, str(n), str(n)) for n in range(20)
    ]
    assert (batch.progress.done, runs.begun, runs.ended) == (20, 20, 20)
    with pytest.raises(InvalidArguments, match="once"):
        batch.__enter__()
    with pytest.raises(InvalidArguments, match=r"with sync\.stream_many"):
        next(sync.stream_many(agent(), ["a"]))


def test_breaking_out_of_a_blocking_stream_ends_the_runs(portal: object, endpoint: StartEndpoint):
    one = endpoint(lambda r: "ok" if r.body["messages"][-1]["content"] == "0" else answers.hang())
    runs, inputs = Runs(), Counted()
    with sync.stream_many(BaseAgent("A", "a", observers=[runs]), inputs, max_concurrency=3, buffer=0) as batch:
        for item in batch:
            assert item.result.content == "ok"
            break
        one.wait_for_requests(4)
    assert runs.begun == runs.ended == inputs.taken == 4
    assert batch.progress.running == 0
    one.wait_for_disconnects(3)


def test_a_failure_is_raised_in_the_readers_thread(portal: object):
    with sync.stream_many(agent(), ["a", "bad"], max_concurrency=1, on_error="fail_fast") as batch:
        assert next(batch).index == 0
        with pytest.raises(RunError, match="odd"):
            next(batch)


def test_a_batch_may_be_read_by_several_threads(portal: object):
    seen: list[BatchItem] = []
    with sync.stream_many(agent(), map(str, range(100)), max_concurrency=8) as batch:
        threads = [threading.Thread(target=lambda: seen.extend(batch)) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert sorted(item.index for item in seen) == list(range(100))


async def test_a_batch_made_beside_a_running_loop_works_on_another_kind_of_loop(anyio_backend_name: str):
    other: Any = "trio" if anyio_backend_name == "asyncio" else "asyncio"
    batch = sync.stream_many(agent(), ["a", "b"], max_concurrency=1)
    with sync.portal(backend=other), pytest.warns(sync.LoopBlockedWarning), batch:
        assert [item.result.content for item in batch] == ["a", "b"]


def test_a_portal_that_closes_ends_the_batch(endpoint: StartEndpoint, backend: Any):
    one = endpoint(answers.hang())
    runs = Runs()
    with contextlib.ExitStack() as stack, sync.portal(backend=backend):
        batch = stack.enter_context(contextlib.suppress(RunCancelled))
        batch = sync.stream_many(BaseAgent("A", "a", observers=[runs]), Counted(), max_concurrency=2)
        stack.push(batch.__exit__)
        batch.__enter__()
        one.wait_for_requests(2)
    assert runs.begun == runs.ended == 2
    one.wait_until_closed()


@pytest.mark.skipif(sys.platform == "win32", reason="needs SIGINT")
@pytest.mark.parametrize("verb", ["run_many", "stream_many"])
def test_ctrl_c_cancels_the_runs_and_is_raised(verb: str, endpoint: StartEndpoint, backend: str, tmp_path: Any):
    one = endpoint(answers.hang())
    program = tmp_path / "program.py"
    program.write_text(
        textwrap.dedent(
            """
            import itertools, sys
            from fractal import BaseAgent, sync
            verb, backend = sys.argv[1:]
            ended = []
            agent = BaseAgent("A", "a", observers=[lambda e: ended.append(e) if e.kind == "run_finished" else None])
            with sync.portal(backend=backend):
                try:
                    inputs = map(str, itertools.count())
                    if verb == "run_many":
                        sync.run_many(agent, inputs, max_concurrency=3)
                    with sync.stream_many(agent, inputs, max_concurrency=3) as batch:
                        next(batch)
                except KeyboardInterrupt:
                    print("interrupted", len(ended), flush=True)
            """
        )
    )
    process = subprocess.Popen(
        [sys.executable, program, verb, backend], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    try:
        one.wait_for_requests(3, timeout=20)
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=20)
    finally:
        process.kill()
    assert (out, err, process.returncode) == ("interrupted 3\n", "", 0)
    one.wait_until_closed()


# ---- memory


class Question(str):
    """An input that can be watched going."""

    __slots__ = ("__weakref__",)


SIZE = 1000


def resident_bytes() -> int:
    """What the process has in memory, where the system says so."""
    try:
        pages = int(Path("/proc/self/statm").read_text().split()[1])
    except FileNotFoundError:
        return 0
    return pages * os.sysconf("SC_PAGE_SIZE")


@pytest.mark.slow
@pytest.mark.timeout(240)
@pytest.mark.parametrize(
    ("anyio_backend", "count"),
    [
        pytest.param(("asyncio", {}), 10_000, id="asyncio"),
        pytest.param(("trio", {}), 2_000, id="trio"),
    ],
)
async def test_memory_does_not_grow_with_the_number_of_inputs_waiting(count: int, endpoint: StartEndpoint):
    one = endpoint("ok")
    waiting: weakref.WeakSet[Question] = weakref.WeakSet()
    objects: list[int] = []
    resident: list[int] = []
    concurrency, buffer, read, most = 100, 16, 0, 0

    def inputs() -> Iterator[str]:
        for n in range(count):
            text = Question(f"{n} {'x' * SIZE}")
            waiting.add(text)
            yield text

    # So few connections that all are open at the first mark: they are objects too, and a slow machine opens them late.
    asked = BaseAgent("A", "a", client=OpenAIModel(max_connections=10))
    async with asked, stream_many(asked, inputs(), max_concurrency=concurrency, buffer=buffer) as batch:
        async for item in batch:
            assert item.result.success
            del item
            read += 1
            most = max(most, len(waiting))
            one.requests.clear()  # the endpoint remembers what it was asked
            if read >= (len(objects) + 1) * count // 10:
                # This reader holds the runs until all places are taken, so there is the same to be counted each time.
                while batch.progress.done < min(read + concurrency + buffer, count):  # noqa: ASYNC110
                    await anyio.sleep(0.01)
                gc.collect()
                objects.append(len(gc.get_objects()))
                resident.append(resident_bytes())
    assert batch.progress.done == count
    # Those that run or wait to be read, the one in the hand of the loop that takes them, and the last one read.
    assert most <= concurrency + buffer + 2
    # The first tenth fills caches. Of the other runs nothing may stay, which is some hundred objects each, nor their
    # text. At the last mark no result waits.
    assert len(objects) == len(resident) == 10
    assert min(objects[5:9]) - min(objects[:5]) < count / 10
    assert resident[-1] - resident[0] < count * SIZE / 2
