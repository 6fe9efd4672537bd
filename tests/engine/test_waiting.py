"""Waits that may be too long: refused at once where that is known, and named where the time runs out over them."""

from __future__ import annotations

import pickle
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import anyio
import httpx2
import openai
import pytest
from trio.testing import wait_all_tasks_blocked

from fractal import (
    AgentResult,
    BaseAgent,
    DeadlineExceeded,
    DeadlineWouldPass,
    LimitedModel,
    Limits,
    OpenAIModel,
    RaceModel,
    ToolResult,
    tool,
)
from fractal._concurrency import gates as _gates
from fractal.testing import Endpoint, ScriptedModel, answers, virtual_time
from tests.support import in_thread, outcomes

StartEndpoint = Callable[..., Endpoint]

hours = virtual_time()

ITS_TURN = "its turn at the model (max_concurrency=1)"


def waited_for(result: AgentResult) -> str | None:
    """What a run was waiting for when its time was over."""
    assert (result.success, result.stop_reason) == (False, "deadline")
    error = result.exception
    assert type(error) is DeadlineExceeded
    at_last = f"; at last it waited for {error.waited_for}"
    assert str(error).endswith(at_last if error.waited_for else " s")
    return error.waited_for


def busy(*, hold: float = 9e9) -> LimitedModel:
    """A model with one place, whose answers take long."""
    return LimitedModel(ScriptedModel(lambda _: answers.text("ok", delay=hold)), max_concurrency=1)


# ---- in virtual time


@tool(max_concurrency=1)
async def one_at_a_time(seconds: float) -> None:
    await anyio.sleep(seconds)


@hours
async def test_a_run_whose_time_is_over_in_a_models_queue_says_so():
    agent = BaseAgent("A", "a", client=busy())
    async with anyio.create_task_group() as group:
        group.start_soon(agent.run, "first")
        await wait_all_tasks_blocked()
        result = await agent.run("second", timeout=3600)
        assert waited_for(result) == ITS_TURN
        assert waited_for(await BaseAgent("A", "a", client=busy()).run("alone", timeout=3600)) is None
        group.cancel_scope.cancel()
    assert str(pickle.loads(pickle.dumps(result.exception))) == result.error


@hours
async def test_a_wait_for_the_rate_that_does_not_fit_is_refused_at_once_with_its_facts():
    model = LimitedModel(ScriptedModel(["ok"]), rate=(1, 600.0))
    agent = BaseAgent("A", "a", client=model)
    assert (await agent.run("first")).success
    await anyio.sleep(100)
    began = anyio.current_time()
    error = (await agent.run("second", timeout=60)).exception
    assert anyio.current_time() == began
    assert isinstance(error, DeadlineWouldPass)
    assert (error.what, error.wait, error.remaining) == (
        "waiting for its turn at the model's rate (1 in 600 s)",
        pytest.approx(500, abs=1),
        60,
    )


@hours
async def test_what_only_one_of_several_models_waited_for_is_not_what_the_run_waited_for():
    taken = busy()
    race = RaceModel(taken, ScriptedModel([answers.call("one_at_a_time", {"seconds": 9e9})]))
    async with anyio.create_task_group() as group:
        group.start_soon(BaseAgent("A", "a", client=taken).run, "first")
        await wait_all_tasks_blocked()
        result = await BaseAgent("A", "a", client=race).add_tool(one_at_a_time).run("second", timeout=60)
        group.cancel_scope.cancel()
    assert outcomes(result) == ["timeout"]
    assert waited_for(result) is None


@hours
async def test_a_delegate_cut_with_its_parent_says_what_it_waited_for():
    ended: list[AgentResult] = []
    model = busy()
    child = BaseAgent("child", "c", client=model)
    child.observers = (lambda event: ended.append(event.result) if event.kind == "run_finished" else None,)
    script = ScriptedModel([answers.call("delegate_to_child", {"query": "?"})])
    parent = BaseAgent("parent", "p", client=script).register_delegate(child)
    async with anyio.create_task_group() as group:
        group.start_soon(BaseAgent("A", "a", client=model).run, "first")
        await wait_all_tasks_blocked()
        result = await parent.run("go", timeout=60)
        group.cancel_scope.cancel()
    assert waited_for(ended[0]) == ITS_TURN
    assert waited_for(result) is None


async def in_line(**options: Any) -> list[ToolResult]:
    calls = [answers.call("one_at_a_time", {"seconds": 9e9}) for _ in range(2)]
    agent = BaseAgent("A", "a", client=ScriptedModel([calls]))
    return (await agent.add_tool(one_at_a_time).run("go", **options)).tool_results


@hours
@pytest.mark.parametrize("options", [{"timeout": 60}, {"limits": Limits(tool_timeout=60, max_requests=1)}])
async def test_a_tool_call_whose_time_is_over_in_the_tools_queue_says_so(options: dict[str, Any]):
    results = await in_line(**options)
    assert {(result.outcome, result.error) for result in results} == {
        ("timeout", "timed out after 60 s"),
        ("timeout", "timed out after 60 s; it had not begun, and waited for its turn (max_concurrency=1)"),
    }


@hours
async def test_a_tool_call_cancelled_in_the_tools_queue_says_so():
    ended: list[AgentResult] = []
    agent = BaseAgent("A", "a", client=ScriptedModel([[answers.call("one_at_a_time", {"seconds": 9e9}) for _ in "12"]]))
    agent.observers = (lambda event: ended.append(event.result) if event.kind == "run_finished" else None,)
    with anyio.move_on_after(60):
        await agent.add_tool(one_at_a_time).run("go")
    assert {result.error for result in ended[0].tool_results} == {
        "the run was cancelled",
        "the run was cancelled; it had not begun, and waited for its turn (max_concurrency=1)",
    }


# ---- with threads and sockets


@pytest.fixture
def no_free_thread(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """All worker threads are taken; yields the words for them."""
    kinds = (_gates.tool_threads, _gates.hook_threads, _gates.approval_threads, _gates.client_threads)
    for gate in kinds:
        monkeypatch.setattr(gate, "_limit", 1)
        monkeypatch.setattr(gate, "_what", "a free worker thread (there is 1)")
        gate.take()
    yield "a free worker thread (there is 1)"
    for gate in kinds:
        gate.release()
        assert (gate.held, gate.waiting) == (0, 0)


async def test_a_plain_tool_whose_time_is_over_without_a_thread_says_so(no_free_thread: str):
    @tool(timeout=0.1)
    def work() -> None:
        pytest.fail("it has a thread")

    result = await BaseAgent("A", "a", client=ScriptedModel([answers.call("work"), "done"])).add_tool(work).run("go")
    [call] = result.tool_results
    assert (call.outcome, result.abandoned) == ("timeout", [])
    assert str(call.error).endswith(f" s; it had not begun, and waited for {no_free_thread}")


@pytest.mark.parametrize("what", ["output_validator", "approve"])
async def test_a_plain_function_of_the_users_that_gets_no_thread_in_time_is_named(what: str, no_free_thread: str):
    def judge(value: object) -> None:
        pytest.fail("it has a thread")

    @tool(requires_approval=True)
    async def work() -> None:
        pytest.fail("it is approved")

    model = ScriptedModel(["done"] if what == "output_validator" else [answers.call("work")])
    agent = BaseAgent("A", "a", client=model, approve=judge if what == "approve" else None).add_tool(work)
    if what == "output_validator":
        agent.output_validator(judge)
    result = await agent.run("go", timeout=0.5)
    assert result.stop_reason == "deadline"
    assert f"judge had not begun: it waited for {no_free_thread}" in result.warnings


async def test_a_plain_tools_own_queue_is_told_from_that_of_the_threads():
    release = threading.Event()

    @tool(timeout=0.3, max_concurrency=1)
    def work() -> None:
        release.wait(10)

    model = ScriptedModel([[answers.call("work") for _ in range(2)], "done"])
    try:
        result = await BaseAgent("A", "a", client=model).add_tool(work).run("go")
    finally:
        release.set()
    assert sorted(outcomes(result)) == ["abandoned", "timeout"]
    [waited] = [call for call in result.tool_results if call.outcome == "timeout"]
    assert str(waited.error).endswith("; it had not begun, and waited for its turn (max_concurrency=1)")


@pytest.mark.parametrize("kind", ["SDK client", "double"])
async def test_waiting_for_the_thread_of_a_blocking_client_is_no_time_of_the_request(
    kind: str, no_free_thread: str, endpoint: StartEndpoint
):
    class Double:
        def __init__(self) -> None:
            self.chat = self.completions = self

        def create(self, **parameters: object) -> None:
            pytest.fail("it has a thread")

    endpoint([])
    with httpx2.Client() as http:
        client: Any = openai.OpenAI(http_client=http) if kind == "SDK client" else Double()
        agent = BaseAgent("A", "a", client=client, limits=Limits(request_timeout=0.1))
        assert waited_for(await agent.run("go", timeout=0.5)) == no_free_thread


async def test_a_run_whose_time_is_over_without_a_connection_says_so(endpoint: StartEndpoint):
    one = endpoint(answers.hang())
    agent = BaseAgent("A", "a", client=OpenAIModel(max_connections=1), limits=Limits(request_timeout=30))
    async with anyio.create_task_group() as group:
        group.start_soon(agent.run, "first")
        await in_thread(one.wait_for_requests, 1)
        assert waited_for(await agent.run("second", timeout=0.5)) == "a free connection (there may be 1)"
        group.cancel_scope.cancel()
    assert len(one.requests) == 1


async def test_a_run_whose_time_is_over_because_nobody_reads_it_says_so(endpoint: StartEndpoint):
    endpoint("a b c d e f g h i j")
    over = anyio.Event()
    agent = BaseAgent("A", "a", observers=[lambda event: over.set() if event.kind == "run_finished" else None])
    async with agent.stream("go", buffer=4, timeout=0.5) as stream:
        await over.wait()
    assert waited_for(await stream.result()) == "its reader"


@contextmanager
def deaf_socket() -> Iterator[int]:
    """A port where connections are never made: as many wait to be accepted as it takes."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen(0)
        waiting: list[socket.socket] = []
        try:
            for _ in range(3):
                waiting.append(socket.socket())
                waiting[-1].setblocking(False)
                waiting[-1].connect_ex(listener.getsockname())
            yield listener.getsockname()[1]
        finally:
            for each in waiting:
                each.close()


@pytest.mark.parametrize("client", ["ours", "AsyncOpenAI"])
async def test_connecting_takes_no_longer_than_there_is_time(client: str):
    with deaf_socket() as port, anyio.fail_after(10):
        url = f"http://127.0.0.1:{port}/v1"
        model: Any = OpenAIModel(base_url=url) if client == "ours" else openai.AsyncOpenAI(base_url=url, api_key="sk")
        result = await BaseAgent("A", "a", client=model).run("go", timeout=0.3)
    assert waited_for(result) is None
