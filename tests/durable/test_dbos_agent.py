"""Agents as workflows of DBOS: runs that go on in another process, on SQLite and on PostgreSQL."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import anyio
import pytest

from fractal import (
    BaseAgent,
    InvalidArguments,
    JournalMismatch,
    Limits,
    RunCancelled,
    RunUnknown,
    StoreUnavailable,
    UnexpectedError,
    run_many,
    stream_many,
    sync,
)
from fractal.cli.main import main
from fractal.durable import DurableAgent
from fractal.testing import ScriptedModel, answers, check_messages
from tests.databases import postgres, restarting_postgres
from tests.served import free_port
from tests.support import BACKENDS, in_thread

dbos = pytest.importorskip("dbos", reason="the extra `durable` is not installed")

ROOT = Path(__file__).parents[2]


@pytest.fixture(params=BACKENDS[:2])
def anyio_backend(request: pytest.FixtureRequest) -> Any:
    """Without uvloop: the workflows run on the event loop of DBOS."""
    return request.param


@pytest.fixture(autouse=True)
def _nothing_left() -> None:
    """What DBOS keeps, threads, files and connections, stays until it is destroyed."""


@pytest.fixture(scope="module")
def server() -> Iterator[str]:
    with postgres() as conninfo:
        yield conninfo


def programme(tmp_path: Path, *words: str, pace: str = "0") -> subprocess.CompletedProcess[str]:
    """Run a function of `durable_clerk` in processes of its own."""
    command = [sys.executable, "-m", "tests.durable_clerk", *words]
    environment = {**os.environ, "EFFECTS": str(tmp_path / "effects"), "PACE": pace, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, env=environment, timeout=250)
    assert done.returncode == 0, done.stderr
    return done


def effects_in(tmp_path: Path) -> Counter[str]:
    return Counter((tmp_path / "effects").read_text("utf-8").splitlines())


def database(kind: str, tmp_path: Path, request: pytest.FixtureRequest) -> str:
    if kind == "sqlite":
        return f"sqlite:///{tmp_path / 'runs.db'}"
    import psycopg

    conninfo: str = request.getfixturevalue("server")
    name = f"runs_{tmp_path.name.replace('-', '_')}".lower()
    with psycopg.connect(conninfo, autocommit=True) as connection:
        connection.execute(f"CREATE DATABASE {name}")
    return conninfo.replace("/postgres?", f"/{name}?")


def check(order: str, result: dict[str, Any], effects: Counter[str], kills: int = 1) -> None:
    """A run is whole, and nothing was done twice; what was under way when its process died is told to the model.

    Args:
        order: The run.
        result: Its result.
        effects: What has happened.
        kills: How many of its processes may have died.
    """
    assert result["success"]
    assert result["content"] == f"{order} is done"
    check_messages([*result["messages"], {"role": "user", "content": "and now?"}])
    for n in range(6):
        done = effects[f"{order} booked {n}"]
        said = next(each["content"] for each in result["messages"] if each.get("tool_call_id") == f"c{n}")
        assert done == 1 if said == f"booked {n}" else done <= 1
    unknown = sum(each["outcome"] != "ok" for each in result["tool_results"])
    assert unknown <= 3 * kills
    # A reply that is recorded is not asked for again: of one process that died at most one request was lost.
    assert all(1 <= effects[f"{order} asked {n}"] <= 1 + kills for n in (0, 3, 6))
    assert sum(effects[f"{order} asked {n}"] for n in (0, 3, 6)) <= 3 + kills


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs many processes")
@pytest.mark.parametrize(("kind", "backend", "step"), [("sqlite", "asyncio", 6), ("postgres", "trio", 14)])
def test_wherever_its_process_is_killed_a_run_goes_on_in_another(
    kind: str, backend: str, step: int, tmp_path: Path, request: pytest.FixtureRequest
):
    step = int(os.environ.get("FRACTAL_KILL_STEP", step))
    done = programme(tmp_path, "everywhere", database(kind, tmp_path, request), backend, "1", str(step))
    results, effects = json.loads(done.stdout), effects_in(tmp_path)
    assert len(results) > 40 // step
    sys.stdout.write(f"killed at {len(results) - 1} moments on {kind}")
    for order, result in results.items():
        check(order, result, effects)


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs many processes")
def test_killed_wherever_it_is_resumed_a_run_goes_on_in_another_process(tmp_path: Path, request: pytest.FixtureRequest):
    step = os.environ.get("FRACTAL_KILL_STEP", "10")
    done = programme(tmp_path, "approved", database("sqlite", tmp_path, request), "asyncio", "1", step)
    results, effects = json.loads(done.stdout), effects_in(tmp_path)
    assert len(results) > 40 // int(step)
    sys.stdout.write(f"killed at {len(results) - 1} moments")
    for order, result in results.items():
        check(order, result, effects)


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs many processes")
@pytest.mark.parametrize(("kind", "backend"), [("sqlite", "trio"), ("postgres", "asyncio")])
def test_killed_at_random_moments_every_run_completes_with_each_effect_once(
    kind: str, backend: str, tmp_path: Path, request: pytest.FixtureRequest
):
    seed, number = os.environ.get("FRACTAL_SEED", "17"), int(os.environ.get("FRACTAL_KILLS", "20"))
    done = programme(tmp_path, "at_random", database(kind, tmp_path, request), backend, seed, str(number), pace="0.03")
    sys.stdout.write(f"killed with FRACTAL_SEED={seed} after {done.stderr} seconds on {kind}")
    results, effects = json.loads(done.stdout), effects_in(tmp_path)
    assert len(results) == number
    for order, result in results.items():
        check(order, result, effects, kills=number)


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs many processes")
def test_a_process_that_is_launched_again_goes_on_by_itself(tmp_path: Path, request: pytest.FixtureRequest):
    done = programme(tmp_path, "again_and_again", database("sqlite", tmp_path, request), "asyncio", "6,15")
    assert done.stderr.split() == ["-9", "-9", "0"]
    said, effects = json.loads(done.stdout), effects_in(tmp_path)
    result, events = said["result"], said["events"]
    assert result["content"] == "order is done"
    # Each event once, whatever process has told it; those of the last moment of one that was killed may be missing.
    facts = ("kind", "iteration", "attempt", "call_id")
    times = Counter(tuple(event.get(name) for name in facts) for event in events if event["kind"] != "model_responded")
    assert events[0]["kind"] == "run_started"
    assert set(times.values()) == {1}
    check_messages([*result["messages"], {"role": "user", "content": "and now?"}])
    assert max(effects[f"order booked {n}"] for n in range(6)) == 1


# ---- workers


class Worker:
    """`fractal worker`, in a process of its own."""

    def __init__(self, tmp_path: Path, database: str, one: str, *more: str, pace: str = "0.05") -> None:
        words = ["worker", "--agents", "clerks", "--name", "fractal-tests", "--database", database, "--id", one, *more]
        environment = {**os.environ, "EFFECTS": str(tmp_path / "effects"), "PACE": pace, "PYTHONPATH": str(ROOT)}
        self.process = subprocess.Popen(
            [sys.executable, "-m", "fractal", *words], cwd=tmp_path, env=environment, stderr=subprocess.PIPE, text=True
        )

    def wait_for(self, words: str) -> None:
        assert self.process.stderr is not None
        for line in self.process.stderr:
            if words in line:
                return
        pytest.fail(f"it has ended without {words!r}")

    def end(self, number: int) -> str:
        self.process.send_signal(number)
        _, told = self.process.communicate(timeout=40)
        return told


@pytest.mark.slow
@pytest.mark.skipif(sys.platform == "win32", reason="signals are others there")
@pytest.mark.parametrize("kind", ["postgres"])
def test_workers_share_a_queue_and_one_that_ends_loses_nothing(
    kind: str, tmp_path: Path, request: pytest.FixtureRequest
):
    (tmp_path / "clerks.py").write_text(CLERKS, encoding="utf-8")
    where, number = database(kind, tmp_path, request), int(os.environ.get("FRACTAL_RUNS", "24"))
    first = Worker(tmp_path, where, "first")
    first.wait_for("works on clerk")  # it makes the tables
    second = Worker(tmp_path, where, "second", "--grace", "0")
    command = [sys.executable, "-m", "tests.durable_clerk", "fill", where, str(number)]
    environment = {**os.environ, "EFFECTS": str(tmp_path / "effects"), "PYTHONPATH": str(ROOT)}
    filler = subprocess.Popen(command, cwd=tmp_path, env=environment, stdout=subprocess.PIPE, text=True)
    try:
        _wait_for(number // 6, tmp_path)
        first.end(signal.SIGKILL)
        first = Worker(tmp_path, where, "first")
        _wait_for(number // 3, tmp_path)
        handed_back = re.search(r"has ended; (\d+) handed back", second.end(signal.SIGTERM))
        assert handed_back
        sys.stdout.write(handed_back[0])
        assert second.process.returncode == 0
        out, _ = filler.communicate(timeout=250)
        assert "0 handed back" in first.end(signal.SIGTERM)
    finally:
        for each in (first.process, second.process, filler):
            each.kill()
            each.wait()
    results, effects = json.loads(out), effects_in(tmp_path)
    assert {*results} == {f"order-{order}" for order in range(number)}
    for order, result in results.items():
        assert result["content"] == f"{order} is done"
        assert max(effects[f"{order} booked {n}"] for n in range(6)) <= 1
    # But for what was under way, each effect was had.
    assert sum(count for what, count in effects.items() if " booked " in what) >= 6 * number - 4 * 3 * 2


@pytest.mark.slow
@pytest.mark.skipif(sys.platform == "win32", reason="signals are others there")
@pytest.mark.parametrize("kind", ["sqlite", "postgres"])
def test_the_runs_of_a_worker_that_was_killed_are_taken_over_by_another(
    kind: str, tmp_path: Path, request: pytest.FixtureRequest
):
    (tmp_path / "clerks.py").write_text(CLERKS, encoding="utf-8")
    where, number = database(kind, tmp_path, request), 9
    workers = [Worker(tmp_path, where, "first", "--lease", "2", pace="0.3")]
    workers[0].wait_for("works on clerk")  # it makes the tables
    workers.append(Worker(tmp_path, where, "second", "--lease", "2", pace="0.3"))
    workers[1].wait_for("works on clerk")
    command = [sys.executable, "-m", "tests.durable_clerk", "fill", where, str(number)]
    environment = {**os.environ, "EFFECTS": str(tmp_path / "effects"), "PYTHONPATH": str(ROOT)}
    filler = subprocess.Popen(command, cwd=tmp_path, env=environment, stdout=subprocess.PIPE, text=True)
    try:
        _wait_for(1, tmp_path)
        workers[0].end(signal.SIGKILL)  # and nobody starts it again
        workers[1].wait_for("worker 'first' has died: ")
        out, _ = filler.communicate(timeout=120)
        workers[1].end(signal.SIGTERM)
    finally:
        for each in (*(worker.process for worker in workers), filler):
            each.kill()
            each.wait()
    results, effects = json.loads(out), effects_in(tmp_path)
    assert {*results} == {f"order-{order}" for order in range(number)}
    assert all(result["content"] == f"{order} is done" for order, result in results.items())
    assert max(count for what, count in effects.items() if " booked " in what) == 1


CLERKS = """
from fractal.cli.main import main
from fractal.durable import DurableAgent
from tests.durable_clerk import clerk

durable = DurableAgent(clerk(), name="clerk")
"""


def _wait_for(number: int, tmp_path: Path) -> None:
    """Wait until so many runs have come to their last request."""
    deadline, file = time.monotonic() + 60, tmp_path / "effects"
    while not file.exists() or file.read_text("utf-8").count(" asked 6\n") < number:
        assert time.monotonic() < deadline, "they did not come so far"
        time.sleep(0.02)


def test_a_worker_says_what_is_missing(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: Any):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "nothing_there.py").write_text("", encoding="utf-8")
    for module, words in (("nothing_there", "there is no DurableAgent"), ("no_such_module", "there is no module")):
        arguments = ["worker", "--agents", module, "--name", "fractal-tests", "--database", "sqlite:///x.db"]
        assert main(arguments) == 2
        assert words in capsys.readouterr().err


# ---- in one process


@pytest.fixture(scope="module")
def launched(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, DurableAgent[Any]]]:
    """Agents of this process: a process has one DBOS."""

    def shout(text: str) -> str:
        return text.upper()

    def model(request: Any) -> Any:
        last = request.messages[-1]
        if last["role"] == "tool":
            return f"it said {last['content']}"
        if last["content"] == "fail":
            return answers.failure(400, "no")
        return [answers.call("shout", {"text": str(last["content"])}, id="c")]

    async def hang() -> None:
        await anyio.sleep_forever()

    hanging = ScriptedModel(lambda _: [answers.call("hang", {}, id="h")])
    folder = tmp_path_factory.mktemp("dbos")
    config: Any = {
        "name": "fractal-tests",
        "system_database_url": f"sqlite:///{folder / 'runs.db'}",
        "application_version": "1",
        "log_level": "CRITICAL",
    }
    dbos.DBOS(config=config)
    agents = {
        "shouter": BaseAgent("Shouter", "You shout.", client=ScriptedModel(model)).add_tool(shout),
        "counter": BaseAgent("Counter", "You count.", client=ScriptedModel(lambda _: "[1, 2]"), output_type=list[int]),
        "hanger": BaseAgent("Hanger", "You hang.", client=hanging).add_tool(hang),
    }
    made = {name: DurableAgent(agent, name=name) for name, agent in agents.items()}
    dbos.DBOS.launch()
    dbos.DBOS.register_queue("orders", worker_concurrency=2, polling_interval_sec=0.1)
    yield made
    dbos.DBOS.destroy(destroy_registry=True)


Launched = dict[str, DurableAgent[Any]]


async def test_a_run_is_begun_and_gives_its_result(launched: Launched):
    run = await launched["shouter"].start("hello")
    result = await run.result()
    assert (result.content, result.success, result.run_id) == ("it said HELLO", True, run.run_id)
    assert [each.content for each in result.tool_results] == ["HELLO"]
    assert await run.status() == "SUCCESS"
    counted = await (await launched["counter"].start("count")).result()
    assert counted.content == [1, 2]


async def test_a_failure_is_a_result(launched: Launched):
    result = await (await launched["shouter"].start("fail", max_retries=0)).result()
    assert (result.success, result.stop_reason) == (False, "model_error")
    limited = await (await launched["shouter"].start("hi", limits=Limits(max_requests=1))).result()
    assert limited.stop_reason == "budget"
    timed = await (await launched["hanger"].start("hi", timeout=0.3)).result()
    assert timed.stop_reason == "deadline"


def test_blocking_code_begins_one_too(launched: Launched):
    run = sync.call(launched["shouter"].start, "hello")
    assert sync.call(run.result).content == "it said HELLO"


async def test_one_id_is_one_run(launched: Launched, anyio_backend_name: str):
    shouter, one = launched["shouter"], f"one of {anyio_backend_name}"
    first = await (await shouter.start("hello", run_id=one)).result()
    again = await (await shouter.start("hello", run_id=one)).result()
    assert (await shouter.find(one).result()).messages == first.messages == again.messages
    for other in (("hello you", {}), ("hello", {"timeout": 5})):
        with pytest.raises(JournalMismatch) as caught:
            await shouter.start(other[0], run_id=one, **other[1])  # type: ignore[arg-type]
        assert '"hello"' in caught.value.recorded
    with pytest.raises(RunUnknown):
        await shouter.find("nobody").result()


async def test_a_queue_takes_runs_and_all_of_them_end(launched: Launched):
    runs = [await launched["shouter"].enqueue("orders", f"n{number}") for number in range(5)]
    results: dict[int, str] = {}

    async def collect(number: int) -> None:
        results[number] = (await runs[number].result()).content

    async with anyio.create_task_group() as group:
        for number in range(5):
            group.start_soon(collect, number)
    assert results == {number: f"it said N{number}" for number in range(5)}


async def test_a_queue_begins_no_more_runs_than_its_limiter_allows(launched: Launched, anyio_backend_name: str):
    name, limit, period = f"limited on {anyio_backend_name}", 2, 1.0
    limiter = {"limit": limit, "period": period}
    await in_thread(lambda: dbos.DBOS.register_queue(name, limiter=limiter, polling_interval_sec=0.05))
    results = await run_many(launched["shouter"], [f"n{number}" for number in range(4)], on=name)
    assert [each.content for each in results] == [f"it said N{number}" for number in range(4)]
    found = await in_thread(lambda: dbos.DBOS.list_workflows(queue_name=name))
    begun = sorted(each.dequeued_at / 1000 for each in found)
    # A busy machine begins them later, and never sooner; without the limiter all of them begin at once.
    assert all(later - sooner > period / 2 for sooner, later in zip(begun, begun[limit:], strict=False))


async def test_a_batch_is_spread_over_a_queue_with_its_order_and_progress(launched: Launched):
    seen: list[int] = []
    inputs = [*(f"n{number}" for number in range(5)), "fail"]
    results = await run_many(
        launched["shouter"], inputs, on="orders", progress=lambda at: seen.append(at.done), max_retries=0
    )
    assert [each.content for each in results[:5]] == [f"it said N{number}" for number in range(5)]
    assert (results[5].success, results[5].stop_reason) == (False, "model_error")
    assert seen[-1] == 6
    async with stream_many(launched["shouter"], ["a", "b"], on="orders") as batch:
        assert {item.index: item.result.content async for item in batch} == {0: "it said A", 1: "it said B"}


async def test_a_batch_for_a_queue_refuses_what_cannot_go_there(launched: Launched):
    shouter = launched["shouter"]
    with pytest.raises(InvalidArguments, match="deps"):
        await run_many(shouter, ["hi"], on="orders", deps=1)
    with pytest.raises(InvalidArguments, match="queue="):
        await run_many(shouter, ["hi"], on="")
    with pytest.raises(InvalidArguments, match="only the runs of a DurableAgent"):
        await run_many(shouter.agent, ["hi"], on="orders")
    with pytest.raises(InvalidArguments, match="say with on= which queue"):
        stream_many(shouter, ["hi"])


def test_blocking_code_spreads_a_batch_too(launched: Launched):
    results = sync.run_many(launched["shouter"], ["a", "b"], on="orders")
    assert [each.content for each in results] == ["it said A", "it said B"]
    with sync.stream_many(launched["shouter"], ["c"], on="orders") as batch:
        assert [item.result.content for item in batch] == ["it said C"]


async def test_a_run_on_a_queue_that_is_cancelled_here_is_cancelled_there(launched: Launched):
    def runs_there() -> dict[str, Any]:
        dbos.DBOS.register_queue("slow", worker_concurrency=1)
        return {each.workflow_id: each for each in dbos.DBOS.list_workflows(name="fractal.hanger")}

    before = await in_thread(runs_there)
    with anyio.move_on_after(0.5) as scope:
        await run_many(launched["hanger"], ["hi"], on="slow", timeout=3)
    assert scope.cancelled_caught
    [status] = [each.status for one, each in (await in_thread(runs_there)).items() if one not in before]
    assert status == "CANCELLED"


async def test_a_run_that_is_cancelled_says_so(launched: Launched):
    hanger = launched["hanger"]
    await in_thread(lambda: dbos.DBOS.register_queue("slow", worker_concurrency=1))
    run = await hanger.enqueue("slow", "hi", timeout=2)
    await run.cancel()
    assert await run.status() == "CANCELLED"
    with pytest.raises(RunCancelled):
        await run.result()


async def test_what_a_run_raises_is_told(launched: Launched, monkeypatch: pytest.MonkeyPatch):
    shouter = launched["shouter"]
    monkeypatch.setattr("fractal.durable.dbos_agent.result_form", lambda _: 1 / 0)
    run = await shouter.start("hello")
    with pytest.raises(UnexpectedError, match="ZeroDivisionError: division by zero"):
        await run.result()


async def test_wrong_use_is_refused_before_anything_begins(launched: Launched):
    shouter = launched["shouter"]
    for options in ({"deps": 1}, {"approve": print}, {"timeout": "x"}, {"max_iterations": -1}, {"output_type": int}):
        with pytest.raises(InvalidArguments):
            await shouter.start("hello", **options)  # type: ignore[arg-type]
    for one in ("", "x" * 201, "a\nb", 7):
        with pytest.raises(InvalidArguments, match="run_id="):
            await shouter.start("hello", run_id=one)  # type: ignore[arg-type]
    with pytest.raises(InvalidArguments, match="queue="):
        await shouter.enqueue("", "hello")
    for name in ("", "a b", "x" * 101, 7, "shouter"):
        with pytest.raises(InvalidArguments, match="name="):
            DurableAgent(shouter.agent, name=name)  # type: ignore[arg-type]
    with pytest.raises(InvalidArguments, match="agent="):
        DurableAgent("Clerk")  # type: ignore[arg-type]


@pytest.mark.parametrize("name", ["start_workflow", "get_workflow_status"])
async def test_what_the_database_does_not_do_is_told(name: str, launched: Launched, monkeypatch: pytest.MonkeyPatch):
    import sqlalchemy.exc

    async def ask() -> None:
        await (await launched["shouter"].start("hello")).result()

    def refuse(*arguments: Any, **options: Any) -> None:
        cause = OSError("attempt to write a readonly database")
        raise sqlalchemy.exc.OperationalError("INSERT INTO x VALUES (?)", {"secret": 1}, cause)

    monkeypatch.setattr(dbos.DBOS, name, refuse)
    with pytest.raises(StoreUnavailable, match="the database of DBOS: OSError: attempt to write a readonly") as caught:
        await ask()
    assert "secret" not in str(caught.value)


@pytest.mark.slow
def test_a_run_survives_a_database_that_goes_away_in_its_middle(tmp_path: Path):
    with restarting_postgres(free_port()) as (url, restart):
        command = [sys.executable, "-m", "tests.durable_clerk", "again_and_again", url, "asyncio", ""]
        environment = {**os.environ, "EFFECTS": str(tmp_path / "effects"), "PACE": "0.5", "PYTHONPATH": str(ROOT)}
        process = subprocess.Popen(command, cwd=tmp_path, env=environment, stdout=subprocess.PIPE, text=True)
        try:
            while not (tmp_path / "effects").exists():
                assert process.poll() is None
                time.sleep(0.02)
            restart()
            out, _ = process.communicate(timeout=120)
        finally:
            process.kill()
            process.wait()
    assert json.loads(out)["result"]["content"] == "order is done"
    assert sorted(what for what in effects_in(tmp_path).elements() if "booked" in what) == [
        f"order booked {n}" for n in range(6)
    ]


@pytest.mark.slow
def test_a_run_is_not_lost_with_a_process_that_ends_without_a_word(tmp_path: Path):
    where = f"sqlite:///{tmp_path / 'runs.db'}"
    began = programme(tmp_path, "leave", where, pace="0.1")
    assert began.stdout == "PENDING"
    done = programme(tmp_path, "again_and_again", where, "trio", "")
    assert json.loads(done.stdout)["result"]["content"] == "order is done"
    assert max(count for what, count in effects_in(tmp_path).items() if " booked " in what) == 1


class Elsewhere:
    """A durable agent, as far as its form for a queue needs it: what it is asked hangs, and cancelling may fail."""

    def __init__(self, hangs_in: str, cancelling: Exception | None) -> None:
        self.agent = BaseAgent("far", "You are far away.", client=ScriptedModel([]))
        self.hangs_in, self.cancelling = hangs_in, cancelling
        self.asked, self.begun, self.cancelled = anyio.Event(), list[str](), list[str]()

    async def enqueue(self, queue: str, user_input: object, *, run_id: str) -> Elsewhere:
        self.begun.append(run_id)
        await self.hang("enqueue")
        return self

    async def result(self) -> None:
        await self.hang("result")

    async def hang(self, where: str) -> None:
        if where == self.hangs_in:
            self.asked.set()
            await anyio.sleep_forever()

    def find(self, run_id: str) -> Elsewhere:
        self.cancelled.append(run_id)
        return self

    async def cancel(self) -> None:
        if self.cancelling is not None:
            raise self.cancelling


@pytest.mark.parametrize(
    "cancelling", [None, RunUnknown("r"), OSError("no database")], ids=["works", "unknown", "fails"]
)
@pytest.mark.parametrize("hangs_in", ["enqueue", "result"])
async def test_a_run_in_a_queue_is_cancelled_with_its_caller_wherever_that_waits(
    hangs_in: str, cancelling: Exception | None
):
    elsewhere: Any = Elsewhere(hangs_in, cancelling)
    agent = DurableAgent.__on_queue__(elsewhere, "orders")
    with anyio.fail_after(10):
        with anyio.CancelScope() as scope:
            async with anyio.create_task_group() as group:
                group.start_soon(agent.run, "go")
                await elsewhere.asked.wait()
                scope.cancel()
    assert scope.cancelled_caught
    assert elsewhere.cancelled == elsewhere.begun != []
