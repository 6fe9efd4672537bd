"""What happens in runs that are workflows of DBOS, told to whoever asks; and runs that wait there for approval."""

from __future__ import annotations

import tempfile
from collections import Counter
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any
from uuid import uuid4

import anyio
import pytest

from fractal import Allow, BaseAgent, Defer, Deny, NotPending, RunTakenOver, RunUnknown, tool
from fractal.durable import DurableAgent, StepKey
from fractal.durable.dbos_journal import DBOSJournal, _OpenInDBOS
from fractal.events import Event, RunFinished
from fractal.testing import ScriptedModel, answers
from tests.support import BACKENDS, in_thread

dbos = pytest.importorskip("dbos", reason="the extra `durable` is not installed")

Launched = dict[str, Any]


@pytest.fixture(params=BACKENDS[:2])
def anyio_backend(request: pytest.FixtureRequest) -> Any:
    """Without uvloop: the workflows run on the event loop of DBOS."""
    return request.param


@pytest.fixture(autouse=True)
def _nothing_left() -> None:
    """What DBOS keeps, threads, files and connections, stays until it is destroyed."""


refunded: list[str] = []


@tool(requires_approval=True)
async def refund(order: int) -> str:
    """Refund an order."""
    refunded.append(str(order))
    return f"order {order} is refunded"


def answer(request: Any) -> Any:
    """Two calls that need approval, then two more, then the answer."""
    results = sum(each["role"] == "tool" for each in request.messages)
    if results == 4:
        return "all is done"
    return [answers.call("refund", {"order": n}, id=f"c{n}") for n in (results, results + 1)]


def count(request: Any) -> Any:
    results = sum(each["role"] == "tool" for each in request.messages)
    return "done" if results == 3 else [answers.call("step", {"n": results}, id=f"s{results}")]


@pytest.fixture(scope="module")
def launched() -> Iterator[Launched]:
    def step(n: int) -> str:
        return f"step {n}"

    refunder = BaseAgent("Refunder", "r", client=ScriptedModel(answer), approve=lambda _: Defer())
    agents = {
        "refunder": refunder.add_tool(refund),
        "counter": BaseAgent("Counter", "c", client=ScriptedModel(count)).add_tool(step),
    }
    agents["asker"] = BaseAgent("Asker", "a", client=ScriptedModel(_ask))
    agents["asker"].register_delegate(agents["counter"])
    with tempfile.TemporaryDirectory() as folder:
        config: Any = {
            "name": "fractal-tests",
            "system_database_url": f"sqlite:///{folder}/runs.db",
            "application_version": "1",
            "log_level": "CRITICAL",
        }
        dbos.DBOS(config=config)
        made: Launched = {name: DurableAgent(agent, name=name) for name, agent in agents.items()}
        made["asleep"] = dbos.DBOS.workflow(name="asleep")(keep_what_is_kept)
        made["keep"] = dbos.DBOS.workflow(name="keep")(keep)
        dbos.DBOS.launch()
        dbos.DBOS.register_queue("orders", worker_concurrency=2, polling_interval_sec=0.1)
        yield made
        dbos.DBOS.destroy(destroy_registry=True)


def _ask(request: Any) -> Any:
    if request.messages[-1]["role"] == "tool":
        return "it is done"
    return [answers.call("delegate_to_counter", {"query": "go"}, id="d")]


async def keep(run_id: str) -> None:
    """A workflow that keeps a record, and three that come at the same time."""
    async with DBOSJournal(dbos.DBOS, run_id, 0).open(run_id) as journal, anyio.create_task_group() as group:
        await journal.record(StepKey("", "", "start"), "first")
        for number in range(3):
            group.start_soon(journal.record, StepKey("", f"1.{number}", "finished"), str(number))


async def keep_what_is_kept(run_id: str) -> str:
    """A workflow that was asleep: another process has made the step with the number that was drawn here."""
    step: Any = dbos.DBOS.reserve_step()
    theirs = type(step)(step._step_ctx)
    await in_thread(lambda: theirs.run({"name": "fractal: start"}, lambda: "theirs"))
    journal = _OpenInDBOS(SimpleNamespace(reserve_step=lambda: step), run_id, {})
    try:
        await journal.record(StepKey("", "", "start"), "ours")
    except RunTakenOver:
        return "taken over"
    return "kept"


async def test_a_record_that_another_process_has_made_stops_the_one_that_was_asleep(launched: Launched):
    handle = await in_thread(lambda: dbos.DBOS.start_workflow(launched["asleep"], "one"))
    assert await in_thread(handle.get_result) == "taken over"


async def test_records_that_come_at_the_same_time_are_one_step_and_are_read_again(launched: Launched):
    run_id = uuid4().hex
    with dbos.SetWorkflowID(run_id):
        handle = await in_thread(lambda: dbos.DBOS.start_workflow(launched["keep"], run_id))
    await in_thread(handle.get_result)
    steps = await in_thread(lambda: dbos.DBOS.list_workflow_steps(run_id))
    assert [step["function_name"] for step in steps] == ["fractal: start", "fractal: 1.2 finished +2"]
    journal = await DBOSJournal(dbos.DBOS, run_id, 0).read()
    assert journal.recall(StepKey("", "", "start")) == "first"
    assert [journal.recall(StepKey("", f"1.{number}", "finished")) for number in range(3)] == ["0", "1", "2"]


COUNTED = [
    "run_started",
    *["model_requested", "model_responded", "tool_started", "tool_finished"] * 3,
    *["model_requested", "model_responded", "run_finished"],
]


async def test_the_events_of_a_run_come_in_order_and_end_with_its_result(launched: Launched):
    run = await launched["counter"].start("go")
    events = [event async for event in run.events()]
    assert [event.kind for event in events] == COUNTED
    assert {event.run_id for event in events} == {run.run_id}
    assert [event.at for event in events] == sorted(event.at for event in events)
    assert isinstance(events[-1], RunFinished)
    assert events[-1].result.model_dump() == (await run.result()).model_dump()
    again = [event async for event in launched["counter"].find(run.run_id).events()]
    assert [event.model_dump_json() for event in again] == [event.model_dump_json() for event in events]


async def test_events_of_delegates_are_among_them(launched: Launched):
    run = await launched["asker"].start("go")
    events = [event async for event in run.events()]
    assert Counter(event.depth for event in events)[1] == len(COUNTED)
    assert [event.kind for event in events if event.depth == 1] == COUNTED
    assert [event.kind for event in events if event.depth == 0][-1] == "run_finished"


def test_blocking_code_iterates_events_too(launched: Launched):
    from fractal import sync

    run = sync.call(launched["counter"].start, "go")
    assert [event.kind for event in run.events()] == COUNTED


async def test_readers_that_leave_or_are_cancelled_hold_nothing(launched: Launched):
    run = await launched["counter"].enqueue("nobody's", "go")
    with anyio.move_on_after(0.2) as scope:
        async for _ in run.events():
            pytest.fail("it has not begun")
    assert scope.cancelled_caught
    with pytest.raises(RunUnknown):
        await anext(launched["counter"].find("nobody").events())
    await run.cancel()
    assert [event async for event in run.events()] == []


# ---- approval


def kinds(events: list[Event]) -> Counter[str]:
    return Counter(event.kind for event in events)


async def test_a_run_that_waits_for_approval_goes_on_with_the_answers(launched: Launched, anyio_backend_name: str):
    refunder, one = launched["refunder"], f"approval on {anyio_backend_name}"
    refunded.clear()
    run = await refunder.start("Refund them.", run_id=one)
    waits = await run.result()
    assert (waits.stop_reason, [call.call_id for call in waits.pending]) == ("approval", ["c0", "c1"])
    assert waits.pending[0].arguments == {"order": 0}
    with pytest.raises(NotPending) as caught:
        await refunder.resume(one, {"c0": True, "c7": True})
    assert (caught.value.call_id, refunded) == ("c7", [])
    half = await (await refunder.resume(one, {"c0": True})).result()  # the other one waits on
    assert ([call.call_id for call in half.pending], refunded) == (["c1"], ["0"])
    with pytest.raises(NotPending):
        await refunder.resume(one, {"c0": True})
    second = await (await refunder.resume(one, {"c1": Deny("no")})).result()
    assert [call.call_id for call in second.pending] == ["c2", "c3"]
    resumed = await refunder.resume(one, {"c2": Allow({"order": 22}), "c3": True})
    result = await resumed.result()
    assert (result.content, result.run_id, sorted(refunded)) == ("all is done", one, ["0", "22", "3"])
    assert [call.outcome for call in result.tool_results] == ["ok", "denied", "ok", "ok"]
    assert (await run.result()).content == "all is done"  # which is one run, whoever has begun the rest
    with pytest.raises(NotPending):
        await refunder.resume(one, {"c2": True})
    events = [event async for event in run.events()]
    told = kinds(events)
    assert (told["run_started"], told["run_finished"], told["model_responded"], told["tool_started"]) == (1, 1, 3, 4)


async def test_a_run_of_a_queue_goes_on_in_that_queue(launched: Launched):
    refunder = launched["refunder"]
    run = await refunder.enqueue("orders", "Refund them.")
    waits = await run.result()
    await refunder.resume(run.run_id, {call.call_id: True for call in waits.pending})
    assert [call.call_id for call in (await run.result()).pending] == ["c2", "c3"]
    [found] = await in_thread(lambda: dbos.DBOS.list_workflows(workflow_ids=[f"{run.run_id}/resumed 1"]))
    assert found.queue_name == "orders"


async def test_two_who_answer_at_once_answer_once(launched: Launched):
    refunder = launched["refunder"]
    refunded.clear()
    run = await refunder.start("Refund them.")
    waits = await run.result()
    said: list[str] = []

    async def say(yes: bool) -> None:
        try:
            await refunder.resume(run.run_id, {call.call_id: yes for call in waits.pending})
            said.append("answered")
        except NotPending:
            said.append("too late")

    async with anyio.create_task_group() as group:
        group.start_soon(say, True)
        group.start_soon(say, False)
    result = await run.result()
    assert sorted(said) == ["answered", "too late"]
    assert {call.outcome for call in result.tool_results[:2]} in ({"ok"}, {"denied"})
    assert len(refunded) in (0, 2)


async def test_a_run_that_does_not_wait_cannot_be_answered(launched: Launched):
    run = await launched["counter"].start("go")
    await run.result()
    with pytest.raises(NotPending):
        await launched["counter"].resume(run.run_id, {"s0": True})
    assert (await (await launched["counter"].resume(run.run_id)).result()).content == "done"
    with pytest.raises(RunUnknown):
        await launched["counter"].resume("nobody", {})
