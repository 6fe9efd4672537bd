"""Threads that go on after their calls have ended: listed, reported, and waited for by calls of the same tool."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Iterator
from typing import Any

import anyio
import openai
import pytest

from fractal import (
    AgentResult,
    BaseAgent,
    Limits,
    OpenAIModel,
    RunCancelled,
    abandoned_threads,
    run_many,
    stream_many,
    sync,
    tool,
)
from fractal._concurrency.gates import tool_threads
from fractal.events import RunFinished, WarningRaised
from fractal.testing import ScriptedModel, answers
from tests.support import in_thread, outcomes, run_on, until

ITS_TIME = 0.3
"""Seconds until a call is abandoned: enough for a thread to begin on a busy machine."""


class Held:
    """A blocking function that goes on until it is let go, and notes who is in it at a time."""

    def __init__(self) -> None:
        self.free = threading.Event()
        self.lock = threading.Lock()
        self.inside = self.most = self.calls = 0

    def __call__(self, *, stays: bool = True) -> str:
        with self.lock:
            self.calls += 1
            self.inside += 1
            self.most = max(self.most, self.inside)
        if stays:
            self.free.wait(10)
        with self.lock:
            self.inside -= 1
        return f"call {self.calls}"

    def let_go(self) -> None:
        self.free.set()


@pytest.fixture
def held() -> Iterator[Held]:
    one = Held()
    yield one
    one.let_go()
    until(lambda: not abandoned_threads())


def agent(*steps: Any, **options: Any) -> BaseAgent:
    return BaseAgent("A", "a", client=ScriptedModel(list(steps)), **options)


PAY = answers.calls(answers.call("pay"))


async def test_a_thread_that_goes_on_is_listed_with_its_place_until_it_ends(held: Held):
    def pay() -> str:
        return held()

    result = await agent(PAY).add_tool(pay).run("go", timeout=ITS_TIME)
    assert outcomes(result) == ["abandoned"]
    [one] = abandoned_threads()
    assert one.name == "tool 'pay'"
    assert one.where is not None
    assert one.where.startswith("test_abandoned.py:")
    assert one.where.endswith(" in __call__")
    assert one.thread.is_alive()
    assert one.seconds < 10
    held.let_go()
    await in_thread(until, lambda: not abandoned_threads())


async def test_a_thread_that_goes_on_tells_which_run_called_it(held: Held):
    @tool(timeout=ITS_TIME)
    def pay() -> str:
        return held()

    payer = BaseAgent("Payer", "p", client=ScriptedModel([PAY, "paid"])).add_tool(pay)
    events: list[Any] = []
    boss = agent(answers.call("delegate_to_payer", {"query": "Pay!"}), "done", observers=[events.append])
    await boss.register_delegate(payer).run("go")
    [below] = {event.run_id for event in events if event.depth == 1}
    [one] = abandoned_threads()
    assert (one.run_id, one.agent_name) == (below, "Payer")
    held.let_go()
    await in_thread(until, lambda: not abandoned_threads())


async def test_a_thread_of_a_tool_that_was_called_directly_names_the_run_of_that_call(held: Held):
    @tool(timeout=ITS_TIME)
    def pay() -> str:
        return held()

    events: list[Any] = []
    assert (await agent(observers=[events.append]).add_tool(pay).execute_tool("pay")).outcome == "abandoned"
    [one] = abandoned_threads()
    assert (one.run_id, one.agent_name) == (events[0].run_id, "A")
    held.let_go()
    await in_thread(until, lambda: not abandoned_threads())


async def read(other: BaseAgent) -> None:
    async with other.stream("?") as stream:
        await stream.result()


async def read_many(other: BaseAgent) -> None:
    async with stream_many(other, ["?"]) as batch:
        async for _ in batch:
            pass


BEGINNING: list[Callable[[BaseAgent], object]] = [
    lambda other: sync.run(other, "?"),
    lambda other: sync.start(other, "?"),
    lambda other: sync.stream(other, "?").__enter__(),
    lambda other: sync.run_many(other, ["?"]),
    lambda other: anyio.run(other.run, "?"),
    lambda other: anyio.run(other.run, "?", backend="trio"),
    lambda other: anyio.run(other.execute_tool, "look"),
    lambda other: anyio.run(run_many, other, ["?"]),
    lambda other: anyio.run(read, other),
    lambda other: anyio.run(read_many, other, backend="trio"),
]


@pytest.mark.parametrize("options", [{"timeout": ITS_TIME}, {"limits": Limits(tool_timeout=ITS_TIME)}], ids=list)
async def test_a_thread_that_goes_on_begins_no_more_runs(options: Any, held: Held):
    other = agent("never").add_tool(lambda: "never", name="look")
    raised: list[BaseException] = []

    def pay() -> None:
        held()
        for begin in BEGINNING:
            try:
                begin(other)
            except BaseException as error:
                raised.append(error)

    assert outcomes(await agent(PAY, "done").add_tool(pay).run("go", **options)) == ["abandoned"]
    held.let_go()
    await in_thread(until, lambda: not abandoned_threads())
    assert [type(each) for each in raised] == [RunCancelled] * len(BEGINNING)
    assert isinstance(other.client, ScriptedModel)
    assert other.client.requests == []


async def test_its_late_end_is_a_warning_of_the_run_that_still_goes_on(held: Held):
    @tool(timeout=ITS_TIME)
    def pay() -> str:
        return held()

    @tool
    async def wait() -> str:
        await in_thread(until, abandoned_threads)
        held.let_go()
        await in_thread(until, lambda: not abandoned_threads())
        await anyio.wait_all_tasks_blocked()
        return "waited"

    events: list[Any] = []
    both = answers.calls(answers.call("pay"), answers.call("wait"))
    one = agent(both, "done", observers=[events.append])
    result = await one.add_tool(pay).add_tool(wait).run("go")
    assert outcomes(result) == ["abandoned", "ok"]
    [warning] = result.warnings
    assert warning.startswith("tool 'pay', abandoned earlier, has ended ")
    assert [event.message for event in events if isinstance(event, WarningRaised)] == [warning]
    assert isinstance(events[-1], RunFinished)


async def test_a_late_end_after_the_run_is_in_the_log(held: Held, caplog: pytest.LogCaptureFixture):
    caplog.set_level(logging.INFO, "fractal")

    def pay() -> str:
        return held()

    result = await agent(PAY).add_tool(pay).run("go", timeout=ITS_TIME)
    held.let_go()
    await in_thread(until, lambda: "tool 'pay', abandoned earlier, has ended" in caplog.text)
    assert result.warnings == []


def test_a_late_end_after_the_event_loop_is_in_the_log(held: Held, caplog: pytest.LogCaptureFixture, backend: str):
    caplog.set_level(logging.INFO, "fractal")

    def pay() -> str:
        return held()

    anyio.run(lambda: agent(PAY).add_tool(pay).run("go", timeout=ITS_TIME), backend=backend)
    assert len(abandoned_threads()) == 1
    held.let_go()
    until(lambda: "tool 'pay', abandoned earlier, has ended" in caplog.text)


# ---- duplicates


@pytest.mark.parametrize("idempotent", [False, True])
async def test_a_call_waits_for_an_abandoned_one_of_the_same_tool_unless_that_does_no_harm(
    held: Held, idempotent: bool
):
    @tool(timeout=0.2, idempotent=idempotent)
    def pay(stays: bool) -> str:
        if not stays and idempotent:
            held(stays=False)
            return "paid beside it"
        return held(stays=stays)

    @tool
    async def let_go_soon() -> None:
        group.start_soon(let_go)

    async def let_go() -> None:
        await anyio.sleep(0.05)
        held.let_go()

    first, second = (answers.call("pay", {"stays": stays}) for stays in (True, False))
    one = agent(answers.calls(first), answers.calls(second, answers.call("let_go_soon")), "done")
    async with anyio.create_task_group() as group:
        result = await one.add_tool(pay).add_tool(let_go_soon).run("go")
    assert outcomes(result)[:2] == ["abandoned", "ok"]
    assert held.most == (2 if idempotent else 1)


async def test_a_call_that_waited_too_long_for_an_earlier_one_was_never_made_and_says_so(held: Held):
    @tool(timeout=ITS_TIME)
    def pay() -> str:
        return held()

    result = await agent(PAY, PAY, "done").add_tool(pay).run("go")
    assert outcomes(result) == ["abandoned", "timeout"]
    assert held.calls == 1
    assert str(result.tool_results[1].error).endswith(
        " s; it had not begun, and waited for an earlier call of this tool, which could not be stopped, to end"
    )


async def test_a_delegates_call_waits_too_and_that_of_another_run_does_not(held: Held):
    class Cashier(BaseAgent):
        @tool(timeout=ITS_TIME)
        def pay(self, stays: bool = True) -> str:
            return held(stays=stays)

    shared = Cashier("A", "a")
    again = answers.calls(answers.call("pay", {"stays": False}))
    child = agent(again, "child").add_tool(shared.pay)
    parent = agent(PAY, answers.calls(answers.call("ask", {"query": "?"})), "done").add_tool(shared.pay)
    results: list[AgentResult] = []
    child.observers = (lambda event: results.append(event.result) if isinstance(event, RunFinished) else None,)
    await parent.register_delegate(child, "ask").run("go")
    assert outcomes(results[0]) == ["timeout"]
    assert held.calls == 1
    assert outcomes(await agent(again, "other").add_tool(shared.pay).run("go")) == ["ok"]


async def test_an_async_tool_that_was_left_is_waited_for_too():
    free, over, inside, most = anyio.Event(), anyio.Event(), 0, 0

    @tool(timeout=0.1)
    async def pay(stays: bool) -> str:
        nonlocal inside, most
        inside += 1
        most = max(most, inside)
        while stays and not free.is_set():
            try:
                await free.wait()
            except BaseException:
                with anyio.CancelScope(shield=True):
                    await anyio.sleep(0.01)
        inside -= 1
        over.set()
        return "paid"

    stubborn = agent(
        answers.calls(answers.call("pay", {"stays": True})), limits=Limits(grace=0.05, on_stubborn="raise")
    )
    results: list[AgentResult] = []
    again = agent(answers.calls(answers.call("pay", {"stays": False})), "done").add_tool(pay)
    stubborn.add_tool(pay)

    @tool
    async def both() -> None:
        try:
            await stubborn.run("go")
        except Exception:
            results.append(await again.run("go"))

    result = await agent(answers.calls(answers.call("both")), "done").add_tool(both).run("go")
    free.set()
    with anyio.fail_after(5):
        await over.wait()
    assert outcomes(result) == ["ok"]
    assert outcomes(results[0]) == ["timeout"]
    assert most == 1


@pytest.mark.parametrize("times", [1, 2])
async def test_a_tool_that_is_to_be_waited_for_is_so_for_native_cancellation(
    held: Held, times: int, anyio_backend_name: str
):
    if anyio_backend_name != "asyncio":
        pytest.skip("asyncio's own")
    import asyncio

    @tool(on_cancel="wait")
    def pay() -> str:
        return held()

    events: list[Any] = []
    task = asyncio.ensure_future(agent(PAY, observers=[events.append]).add_tool(pay).run("go"))
    await in_thread(until, lambda: held.inside == 1)
    for _ in range(times):
        task.cancel()
        await asyncio.sleep(0.02)
    assert not task.done()
    held.let_go()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert (held.inside, abandoned_threads()) == (0, ())
    assert outcomes(events[-1].result) == ["ok"]


# ---- who needs threads beside them


class Blocking:
    """A blocking client."""

    def __init__(self) -> None:
        self.chat = self.completions = self

    def create(self, **_: object) -> dict[str, Any]:
        return {"choices": [{"message": {"content": "ok"}, "finish_reason": "stop"}]}


def validated(url: str) -> BaseAgent:
    one = BaseAgent("A", "a", client=ScriptedModel(["ok"]))
    one.output_validator(lambda text: text)
    return one


def approved(url: str) -> BaseAgent:
    @tool(requires_approval=True)
    async def pay() -> str:
        return "paid"

    return BaseAgent("A", "a", client=ScriptedModel([PAY, "ok"]), approve=lambda call: True).add_tool(pay)


NEEDS: dict[str, Callable[[str], BaseAgent]] = {
    "an HTTP client": lambda url: BaseAgent("A", "a", client=OpenAIModel(base_url=url, api_key="any")),
    "a key provider": lambda url: BaseAgent("A", "a", client=openai.OpenAI(base_url=url, api_key=lambda: "any")),
    "a blocking client": lambda url: BaseAgent("A", "a", client=Blocking()),
    "a validator": validated,
    "an approver": approved,
}


@pytest.mark.parametrize("needs", NEEDS)
def test_hung_tools_of_the_whole_process_keep_nothing_else_from_a_thread(
    needs: str, loop: str, held: Held, endpoint: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
):
    url = endpoint("ok").url
    monkeypatch.setattr(tool_threads, "_limit", 2)

    @tool(idempotent=True, timeout=ITS_TIME)
    def pay() -> str:
        return held()

    hung = agent(answers.calls(answers.call("pay"), answers.call("pay")), "done").add_tool(pay)
    assert outcomes(run_on(loop, hung.run, "go")) == ["abandoned"] * 2
    assert tool_threads.held == 2

    async def ask() -> AgentResult:
        return await NEEDS[needs](url).run("go", timeout=5)

    assert run_on(loop, ask).content == "ok"
