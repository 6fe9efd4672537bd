"""`SQLiteJournal`: one runner for each run, whatever processes there are, and clear errors for what cannot be used."""

from __future__ import annotations

import json
import os
import signal
import sqlite3
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import anyio
import pytest

from fractal import (
    AgentResult,
    BaseAgent,
    Defer,
    InvalidArguments,
    JournalError,
    JournalNotWritten,
    JournalUnreadable,
    RunInProgress,
    RunTakenOver,
    sync,
    tool,
)
from fractal._concurrency import owners
from fractal.durable import Journal, MemoryJournal, SQLiteJournal, StepKey, _database, sqlite as sqlite_module
from fractal.testing import ScriptedModel, answers

END = StepKey("", "", "end")


def greeter(*answers_: Any) -> BaseAgent[Any]:
    return BaseAgent("Greeter", "You greet.", client=ScriptedModel(answers_ or ["hello"]))


def files_beside(path: Path) -> dict[str, int]:
    """The files in the directory of a file, and who may do what with them."""
    return {each.name: each.stat().st_mode & 0o777 for each in path.parent.iterdir()}


def cut(path: Path, to: Path, *, part: float = 1.0, less: int = 0) -> bytes:
    """Write a part of a file to another; returns what that has in it."""
    data = path.read_bytes()
    to.parent.mkdir(exist_ok=True)
    to.write_bytes(data[: int(len(data) * part) - less])
    return to.read_bytes()


def die(process: subprocess.Popen[str], *, is_waited_for: bool) -> None:
    """End a process; one that nobody waits for is a zombie, whose id still is one."""
    process.send_signal(signal.SIGKILL)
    if is_waited_for:
        process.wait()
    else:
        os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "runs.db"


async def test_a_run_is_kept_in_the_file_and_its_result_comes_from_there(path: Path) -> None:
    first = await greeter().run("hi", journal=SQLiteJournal(path), run_id="one")
    again = await greeter(TimeoutError()).run("hi", journal=SQLiteJournal(str(path)), run_id="one")
    assert again.model_dump() == first.model_dump()
    assert await SQLiteJournal(path).runs() == ["one"]
    assert [*await SQLiteJournal(path).records("one")] == ["start", "1 try 1 sent", "1 reply", "end"]
    assert all(json.loads(text)["v"] == 1 for text in (await SQLiteJournal(path).records("one")).values())
    assert files_beside(path) == {"runs.db": 0o600}  # closed


async def test_a_run_that_is_deleted_begins_anew(path: Path) -> None:
    journal = SQLiteJournal(path)
    await greeter().run("hi", journal=journal, run_id="one")
    assert await journal.delete("one")
    assert not await journal.delete("one")
    assert await journal.runs() == []
    assert (await greeter("good day").run("another", journal=journal, run_id="one")).content == "good day"


@pytest.mark.parametrize("kind", ["memory", "file"])
async def test_one_of_several_tasks_runs_and_the_others_are_told(kind: str, path: Path) -> None:
    journal: Journal = MemoryJournal() if kind == "memory" else SQLiteJournal(path)
    release = anyio.Event()

    async def wait() -> str:
        """Wait."""
        await release.wait()
        return "waited"

    agent = greeter(answers.call("wait"), "done").add_tool(wait)
    refused: list[RunInProgress] = []
    results: list[AgentResult[Any]] = []

    async def run() -> None:
        try:
            results.append(await agent.run("hi", journal=journal, run_id="one"))
        except RunInProgress as error:
            refused.append(error)
            if len(refused) == 4:
                release.set()

    with anyio.fail_after(20):
        async with anyio.create_task_group() as group:
            for _ in range(5):
                group.start_soon(run)
    assert [result.content for result in results] == ["done"]
    assert (len(refused), {error.run_id for error in refused}) == (4, {"one"})


HOLD = """
import sys, time, anyio
from fractal.durable import SQLiteJournal
async def main():
    async with SQLiteJournal(sys.argv[1], lease=float(sys.argv[2])).open("one"):
        print("held", flush=True)
        sys.stdin.read(1)
anyio.run(main)
"""


@pytest.fixture
def holder(path: Path) -> Iterator[subprocess.Popen[str]]:
    """Another process that is at work on run one."""
    pipes: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    with subprocess.Popen([sys.executable, "-c", HOLD, str(path), "600"], **pipes) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "held\n"
        yield process
        process.kill()


async def test_another_process_holds_a_run_until_it_is_dead(path: Path, holder: subprocess.Popen[str]) -> None:
    journal = SQLiteJournal(path)
    with pytest.raises(RunInProgress, match=f"process {holder.pid} is at work"):
        await greeter().run("hi", journal=journal, run_id="one")
    with pytest.raises(RunInProgress):
        await journal.delete("one")
    assert (await greeter().run("hi", journal=journal, run_id="two")).content == "hello"
    die(holder, is_waited_for=False)
    assert (await greeter().run("hi", journal=journal, run_id="one")).content == "hello"


async def test_a_process_that_nobody_can_look_for_holds_a_run_as_long_as_its_lease(
    path: Path, holder: subprocess.Popen[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(owners, "_host", lambda: "another machine")
    die(holder, is_waited_for=True)
    with pytest.raises(RunInProgress, match="of another machine"):
        await greeter().run("hi", journal=SQLiteJournal(path), run_id="one")
    with sqlite3.connect(path) as connection:
        connection.execute("UPDATE fractal_leases SET expires = ?", (time.time() - 1,))
    connection.close()
    assert (await greeter().run("hi", journal=SQLiteJournal(path), run_id="one")).content == "hello"


async def test_a_clock_that_is_set_forward_moves_a_run_at_most_and_does_nothing_twice(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real, ahead, effects = time.time, 0.0, list[str]()
    begun, released = anyio.Event(), anyio.Event()
    monkeypatch.setattr(sqlite_module.time, "time", lambda: real() + ahead)

    @tool
    async def ship() -> str:
        """Ship."""
        effects.append("shipped")
        begun.set()
        await released.wait()
        return "shipped"

    def answer(request: Any) -> Any:
        return "done" if request["messages"][-1]["role"] == "tool" else answers.call("ship", {}, id="s")

    agent, told = BaseAgent("Shipper", "s", client=ScriptedModel(answer)).add_tool(ship), list[str]()

    async def first() -> None:
        with pytest.raises(RunTakenOver):
            await agent.run("hi", journal=SQLiteJournal(path, lease=1000), run_id="one")
        told.append("taken over")

    with anyio.fail_after(30):
        async with anyio.create_task_group() as group:
            group.start_soon(first)
            await begun.wait()
            ahead = 3600
            result = await agent.run("hi", journal=SQLiteJournal(path), run_id="one")
            released.set()
    assert (effects, told) == (["shipped"], ["taken over"])
    assert "unknown whether it took effect" in str(result.tool_results[0].error)
    assert (await agent.run("hi", journal=SQLiteJournal(path), run_id="one")).messages == result.messages


async def test_a_clock_that_is_set_back_keeps_no_run_of_a_dead_process(
    path: Path, holder: subprocess.Popen[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    real = time.time
    monkeypatch.setattr(sqlite_module.time, "time", lambda: real() - 3600)
    with pytest.raises(RunInProgress):
        await greeter().run("hi", journal=SQLiteJournal(path), run_id="one")
    die(holder, is_waited_for=True)
    assert (await greeter().run("hi", journal=SQLiteJournal(path), run_id="one")).content == "hello"


async def test_a_process_gives_signs_of_life_while_it_is_at_work(path: Path) -> None:
    def expires() -> float:
        connection = sqlite3.connect(path)
        try:
            [[moment]] = connection.execute("SELECT expires FROM fractal_leases").fetchall()
        finally:
            connection.close()
        return float(moment)

    async with SQLiteJournal(path, lease=0.3).open("one"):
        first = expires()
        with anyio.fail_after(20):
            while expires() <= first:  # noqa: ASYNC110  # nobody tells of it
                await anyio.sleep(0.05)


async def test_whoever_was_taken_over_records_nothing_any_more(path: Path) -> None:
    done: list[str] = []

    @tool
    def steal() -> str:
        """Let another process take the run over."""
        connection = sqlite3.connect(path)
        with connection:
            connection.execute("UPDATE fractal_leases SET token = 'another'")
        connection.close()
        return "stolen"

    @tool(sequential=True)
    def late() -> str:
        """Come too late."""
        done.append("late")
        return "done"

    agent = greeter(answers.call("steal"), answers.call("late"), "done").add_tool(steal).add_tool(late)
    with pytest.raises(RunTakenOver, match="run 'one' was taken over"):
        await agent.run("hi", journal=SQLiteJournal(path), run_id="one")
    assert done == []
    assert "1.0 finished" not in await SQLiteJournal(path).records("one")


SLEEP = """
import sys, anyio
from fractal import BaseAgent, RunTakenOver, tool
from fractal.durable import SQLiteJournal
from fractal.testing import ScriptedModel, answers

@tool
async def ship() -> str:
    print("shipped", flush=True)
    sys.stdin.readline()
    return "shipped"

def answer(request):
    return "late" if request["messages"][-1]["role"] == "tool" else answers.call("ship", {}, id="s")

async def main():
    agent = BaseAgent("Shipper", "s", client=ScriptedModel(answer)).add_tool(ship)
    try:
        await agent.run("go", journal=SQLiteJournal(sys.argv[1], lease=0.3), run_id="one")
    except RunTakenOver:
        print("taken over", flush=True)
anyio.run(main, backend="trio")
"""


def stop(process: subprocess.Popen[str], path: Path) -> None:
    """Put a process to sleep, at a moment when it does not hold the lock of a file."""
    connection = sqlite3.connect(path, isolation_level=None)
    connection.execute("BEGIN IMMEDIATE")
    process.send_signal(signal.SIGSTOP)
    os.waitid(os.P_PID, process.pid, os.WSTOPPED)
    connection.execute("ROLLBACK")
    connection.close()


def test_a_process_that_slept_while_another_one_went_on_records_nothing(path: Path) -> None:
    def answer(request: Any) -> Any:
        return str(request["messages"][-1]["content"])

    agent = BaseAgent("Shipper", "s", client=ScriptedModel(answer)).add_tool(tool(name="ship")(lambda: "shipped twice"))
    pipes: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    with subprocess.Popen([sys.executable, "-c", SLEEP, str(path)], **pipes) as sleeper:
        assert sleeper.stdout is not None
        assert sleeper.stdout.readline() == "shipped\n"
        try:
            stop(sleeper, path)
            result = sync.run(agent, "go", journal=SQLiteJournal(path, wait=30), run_id="one")
            kept = anyio.run(SQLiteJournal(path).records, "one")
            sleeper.send_signal(signal.SIGCONT)
            assert sleeper.communicate("wake up\n", timeout=30)[0] == "taken over\n"
        finally:
            sleeper.kill()  # which ends one that is asleep, too
    assert "unknown whether it took effect" in str(result.content)
    assert anyio.run(SQLiteJournal(path).records, "one") == kept


RACE = """
import sys, anyio
from fractal import BaseAgent, RunInProgress
from fractal.durable import SQLiteJournal
from fractal.testing import ScriptedModel

def answer(request):
    with open(sys.argv[2], "a") as file:
        file.write(f"{request['messages'][-1]['content']}\\n")
    return "hello"

async def main():
    agent, refused = BaseAgent("G", "g", client=ScriptedModel(answer)), 0
    journal = SQLiteJournal(sys.argv[1])
    print("ready", flush=True)
    for n in map(int, iter(sys.stdin.readline, "")):
        try:
            result = await agent.run(str(n), journal=journal, run_id=str(n))
            print(result.content, flush=True)
        except RunInProgress:
            print("in progress", flush=True)
anyio.run(main)
"""


@pytest.mark.parametrize("times", [10, pytest.param(100, marks=pytest.mark.slow)])
def test_two_processes_race_and_each_time_there_is_one_runner(times: int, path: Path, tmp_path: Path) -> None:
    asked = tmp_path / "asked"
    pipes: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True, "bufsize": 1}
    command = [sys.executable, "-c", RACE, str(path), str(asked)]
    with subprocess.Popen(command, **pipes) as one, subprocess.Popen(command, **pipes) as other:
        for each in (one, other):
            assert each.stdout is not None
            assert each.stdout.readline() == "ready\n"
        for n in range(times):
            for each in (one, other):
                assert each.stdin is not None
                each.stdin.write(f"{n}\n")
                each.stdin.flush()
            said = sorted(each.stdout.readline().strip() for each in (one, other) if each.stdout)
            assert said in (["hello", "hello"], ["hello", "in progress"])
        for each in (one, other):
            assert each.stdin is not None
            each.stdin.close()
    assert sorted(map(int, asked.read_text().split())) == [*range(times)]  # each was asked once, by one of them


# ---- what cannot be used


async def test_a_file_that_is_no_journal_is_told_and_left_alone(path: Path) -> None:
    notes = path.parent / "notes"
    await anyio.Path(notes).write_bytes(b"some notes of mine, which are long enough to be no header" * 50)
    before = cut(notes, path)
    with pytest.raises(JournalUnreadable, match=r"runs\.db' is damaged, or not a journal"):
        await greeter().run("hi", journal=SQLiteJournal(path), run_id="one")
    assert cut(path, path) == before


async def test_a_torn_file_is_told(path: Path) -> None:
    await greeter("hello " * 10_000).run("hi", journal=SQLiteJournal(path), run_id="one")
    cut(path, path, part=0.5)
    with pytest.raises(JournalError, match=r"runs\.db"):
        await greeter().run("hi", journal=SQLiteJournal(path), run_id="one")


async def test_a_torn_log_beside_the_file_loses_what_was_not_committed_alone(path: Path) -> None:
    async with SQLiteJournal(path).open("one") as opened:
        await opened.record(StepKey("", "", "start"), "first")
        await opened.record(END, "second")
        copy = path.parent / "torn"
        cut(path, copy / "runs.db")
        cut(path.parent / "runs.db-wal", copy / "runs.db-wal", less=100)
    assert await SQLiteJournal(copy / "runs.db").records("one") == {"start": "first"}


NO_RESULT = '{"v":1,"name":"Greeter","given":null,"value":{"no":"result"}}'


@pytest.mark.parametrize("text", ["{", "[]", '{"v":1}', NO_RESULT])
async def test_a_damaged_record_is_told(path: Path, text: str) -> None:
    await greeter().run("hi", journal=SQLiteJournal(path), run_id="one")
    with sqlite3.connect(path) as connection:
        connection.execute("UPDATE fractal_steps SET text = ? WHERE key = 'end'", (text,))
    connection.close()
    with pytest.raises(JournalUnreadable, match="record 'end' of run 'one' cannot be read"):
        await greeter().run("hi", journal=SQLiteJournal(path), run_id="one")


async def test_a_damaged_lease_is_told(path: Path) -> None:
    async with SQLiteJournal(path).open("one"):
        with sqlite3.connect(path) as connection:
            connection.execute("UPDATE fractal_leases SET expires = 'never'")
        connection.close()
        with pytest.raises(JournalUnreadable, match="the lease of run 'one' is damaged"):
            await greeter().run("hi", journal=SQLiteJournal(path), run_id="one")


async def test_a_record_of_a_newer_version_is_told(path: Path) -> None:
    await greeter().run("hi", journal=SQLiteJournal(path), run_id="one")
    with sqlite3.connect(path) as connection:
        connection.execute("""UPDATE fractal_steps SET text = '{"v":2}' WHERE key = 'end'""")
    connection.close()
    with pytest.raises(JournalUnreadable, match="it is of version 2, and this is written for 1"):
        await greeter().run("hi", journal=SQLiteJournal(path), run_id="one")


async def test_a_journal_of_a_newer_version_is_told(path: Path) -> None:
    await greeter().run("hi", journal=SQLiteJournal(path), run_id="one")
    with sqlite3.connect(path) as connection:
        connection.execute("UPDATE fractal_meta SET version = 7")
    connection.close()
    with pytest.raises(JournalUnreadable, match="it is of version 7, and this is written for 1"):
        await greeter().run("hi", journal=SQLiteJournal(path), run_id="one")


async def test_a_directory_that_is_not_there_or_may_not_be_written_is_told(path: Path, tmp_path: Path) -> None:
    with pytest.raises(JournalNotWritten, match="No such file"):
        await greeter().run("hi", journal=SQLiteJournal(tmp_path / "nowhere" / "runs.db"), run_id="one")
    with pytest.raises(JournalNotWritten, match="cannot be written"):
        await greeter().run("hi", journal=SQLiteJournal("/proc/runs.db"), run_id="one")


async def test_a_file_that_may_only_be_read_is_told(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    await greeter().run("hi", journal=SQLiteJournal(path), run_id="one")
    connect = sqlite3.connect

    def read_only(file: object, **options: Any) -> sqlite3.Connection:
        return connect(f"file:{file}?mode=ro", uri=True, **options)  # what permissions do to others than root

    monkeypatch.setattr(_database.sqlite3, "connect", read_only)
    with pytest.raises(JournalNotWritten, match="readonly"):
        await greeter().run("hi", journal=SQLiteJournal(path), run_id="two")


async def test_a_full_disk_ends_the_run_and_loses_nothing(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    connect, done = sqlite3.connect, list[str]()

    def with_little_room(*arguments: Any, **options: Any) -> sqlite3.Connection:
        connection = connect(*arguments, **options)
        connection.execute("PRAGMA max_page_count = 15")
        return connection

    @tool(idempotent=True)
    def work(n: int) -> str:
        """Work."""
        done.append(str(n))
        return "result " * 1000

    def agent() -> BaseAgent[Any]:
        def answer(request: Any) -> Any:
            n = sum(message["role"] == "assistant" for message in request["messages"])
            return answers.call("work", {"n": n}) if n < 6 else "done"

        return BaseAgent("A", "a", client=ScriptedModel(answer)).add_tool(work)

    with monkeypatch.context() as patched:
        patched.setattr(_database.sqlite3, "connect", with_little_room)
        with pytest.raises(JournalNotWritten, match="full"):
            await agent().run("go", journal=SQLiteJournal(path), run_id="one")
    kept = sum(key.endswith("finished") for key in await SQLiteJournal(path).records("one"))
    before = len(done)
    assert 0 < kept <= before
    result = await agent().run("go", journal=SQLiteJournal(path), run_id="one")
    assert result.content == "done"
    assert len(done) - before == 6 - kept


@pytest.mark.parametrize("given", [{"path": 3}, {"path": "a\0b", "lease": 1}, {"path": "a", "lease": 0}])
def test_a_journal_refuses_what_it_cannot_be(given: Any) -> None:
    with pytest.raises(InvalidArguments):
        SQLiteJournal(**given)


@pytest.mark.parametrize(
    "given",
    [{"journal": MemoryJournal()}, {"run_id": "one"}, {"journal": MemoryJournal, "run_id": "one"}]
    + [{"journal": MemoryJournal(), "run_id": each} for each in ("", "x" * 201, "a\nb", 3)],
    ids=["no id", "no journal", "a class", "an empty id", "a long id", "two lines", "a number"],
)
async def test_a_run_refuses_half_of_what_it_needs(given: Any) -> None:
    with pytest.raises(InvalidArguments):
        await greeter().run("hi", **given)


# ---- cancellation, and what it costs


async def test_a_cancelled_run_can_go_on_and_its_lease_is_given_back(path: Path) -> None:
    journal, begun = SQLiteJournal(path), anyio.Event()

    @tool(idempotent=True)
    async def hang() -> str:
        """Hang, the first time."""
        if begun.is_set():
            return "done"
        begun.set()
        await anyio.sleep_forever()
        raise AssertionError

    agent = greeter(answers.call("hang"), "done").add_tool(hang)
    async with anyio.create_task_group() as group:
        group.start_soon(lambda: agent.run("hi", journal=journal, run_id="one"))
        await begun.wait()
        group.cancel_scope.cancel()
    assert "end" not in await journal.records("one")
    result = await agent.run("hi", journal=journal, run_id="one")
    assert (result.content, [call.outcome for call in result.tool_results]) == ("done", ["ok"])


def test_the_facade_runs_with_a_file(path: Path, backend: str) -> None:
    with sync.portal(backend=backend):
        journal = SQLiteJournal(path)
        assert sync.run(greeter(), "hi", journal=journal, run_id="one").content == "hello"
        batch = sync.run_many(greeter("a", "b"), ["x", "y"], journal=journal, run_id="day", max_concurrency=1)
        again = sync.run_many(greeter("c", "d"), ["x", "y"], journal=journal, run_id="day")
    assert [result.content for result in batch] == [result.content for result in again] == ["a", "b"]


async def test_a_long_run_recovers_in_time_that_grows_with_its_steps(path: Path) -> None:
    def answer(turns: int) -> Any:
        def said(request: Any) -> Any:
            n = len(request["messages"]) // 2
            return answers.call("look", {}, id=f"call_{n}") if n < turns else "done"

        return said

    async def look() -> str:
        """Look."""
        return "nothing"

    seconds: dict[int, float] = {}
    for turns in (50, 500):
        journal = MemoryJournal()
        agent = BaseAgent("A", "a", client=ScriptedModel(answer(turns))).add_tool(look)
        await agent.run("go", max_iterations=1000, journal=journal, run_id="one")
        del journal.runs["one"]["end"]
        began = time.process_time()
        result = await agent.run("go", max_iterations=1000, journal=journal, run_id="one")
        seconds[turns] = time.process_time() - began
        assert result.metadata["iterations"] == turns
    assert seconds[500] < 10 * seconds[50] * 3 + 0.2


def test_a_blocking_agent_takes_a_run_up(path: Path, backend: str) -> None:
    def answer(request: Any) -> Any:
        return "done" if request["messages"][-1]["role"] == "tool" else answers.call("pay", id="pay_1")

    @tool(requires_approval=True)
    def pay() -> str:
        """Pay."""
        return "paid"

    journal = SQLiteJournal(path)
    with sync.portal(backend=backend):
        agent = sync.BaseAgent("Clerk", "You pay.", client=ScriptedModel(answer), approve=lambda call: Defer())
        agent.add_tool(pay)
        waits = agent.run("go", journal=journal, run_id="one")
        result = agent.resume(journal, "one", {call.call_id: True for call in waits.pending})
    assert (waits.stop_reason, result.content) == ("approval", "done")


@pytest.mark.parametrize("first", [True, False], ids=["first", "last"])
@pytest.mark.parametrize("value", [None, "\ud800"], ids=["refused by the file", "refused before it"])
async def test_a_write_that_fails_takes_none_of_those_beside_it_with_it(path: Path, value: Any, first: bool) -> None:
    database = _database.Database(path)
    database.enter()
    statement = "INSERT INTO fractal_steps (run_id, key, text) VALUES ('one', ?, 'x')"
    good = [_database.Write(statement, (f"key {number}",), is_durable=True) for number in range(3)]
    bad = _database.Write(statement, (value,), is_durable=True)
    failed: list[Any] = []

    async def write(one: _database.Write) -> None:
        try:
            await database.write(one)
        except (JournalError, ValueError):
            failed.append(one)

    async with anyio.create_task_group() as group:
        for one in [bad, *good] if first else [*good, bad]:
            group.start_soon(write, one)
    rows = database.transaction(lambda connection: connection.execute("SELECT key FROM fractal_steps").fetchall())
    database.leave()
    assert failed == [bad]
    assert sorted(key for (key,) in rows) == ["key 0", "key 1", "key 2"]


async def test_a_lease_that_could_not_be_given_back_keeps_nobody_of_its_process_out(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: Any) -> None:
        raise JournalNotWritten("the disk is full")

    async with SQLiteJournal(path).open("one") as opened:
        await opened.record(StepKey("", "", "start"), "begun")
        monkeypatch.setattr(_database.Database, "transaction", full)
    monkeypatch.undo()
    async with SQLiteJournal(path).open("one") as opened:
        assert opened.recall(StepKey("", "", "start")) == "begun"
        with pytest.raises(RunInProgress):
            await SQLiteJournal(path).open("one").__aenter__()
