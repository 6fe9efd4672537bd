"""Journals that are slow: those that somebody else has open, and those that do not come to an end with a record."""

from __future__ import annotations

import math
import subprocess
import sys
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import anyio
import pytest

from fractal import BaseAgent, InvalidArguments, JournalNotWritten, JournalUnreadable, Limits, RunInProgress, sync, tool
from fractal._engine.journal_of_tree import Durable, JournalOfTree
from fractal.durable import MemoryJournal, SQLiteJournal, StepKey
from fractal.testing import ScriptedModel, answers

JOURNALS = ["memory", "sqlite"]


def journal_of(kind: str, path: Path, wait: float) -> Any:
    return MemoryJournal(wait=wait) if kind == "memory" else SQLiteJournal(path / "runs.db", wait=wait)


class Slow:
    """An agent whose tool hangs until it is released, and what it has done."""

    def __init__(self) -> None:
        self.begun, self.released = anyio.Event(), anyio.Event()
        self.times = 0

        @tool(idempotent=True)
        async def work() -> str:
            """Work."""
            self.times += 1
            self.begun.set()
            await self.released.wait()
            return "done"

        def answer(request: Any) -> Any:
            return "all done" if request.messages[-1]["role"] == "tool" else answers.call("work", {}, id="w")

        self.agent = BaseAgent("Slow", "s", client=ScriptedModel(answer)).add_tool(work)


@pytest.mark.parametrize("kind", JOURNALS)
async def test_a_second_caller_waits_for_the_first_and_has_its_result(kind: str, tmp_path: Path) -> None:
    slow, journal, results = Slow(), journal_of(kind, tmp_path, 60), list[Any]()

    async def run() -> None:
        results.append(await slow.agent.run("go", journal=journal, run_id="one"))

    with anyio.fail_after(30):
        async with anyio.create_task_group() as group:
            group.start_soon(run)
            await slow.begun.wait()
            for _ in range(3):
                group.start_soon(run)
            with anyio.move_on_after(0.2):
                await anyio.sleep_forever()
            assert results == []
            slow.released.set()
    assert [result.content for result in results] == ["all done"] * 4
    assert slow.times == 1


@pytest.mark.parametrize("kind", JOURNALS)
async def test_a_second_caller_goes_on_where_the_first_was_cancelled(kind: str, tmp_path: Path) -> None:
    slow, journal, results = Slow(), journal_of(kind, tmp_path, 60), list[Any]()

    async def run() -> None:
        results.append(await slow.agent.run("go", journal=journal, run_id="one"))

    with anyio.fail_after(30):
        async with anyio.create_task_group() as group:
            with anyio.CancelScope() as scope:
                async with anyio.create_task_group() as first:
                    first.start_soon(run)
                    await slow.begun.wait()
                    group.start_soon(run)
                    slow.released.set() if slow.times > 1 else scope.cancel()
            slow.released.set()
    assert [result.content for result in results] == ["all done"]


@pytest.mark.parametrize("kind", JOURNALS)
async def test_the_wait_ends_with_its_seconds_the_timeout_or_a_cancellation(kind: str, tmp_path: Path) -> None:
    slow = Slow()
    for wait, timeout in ((0.0, None), (0.05, None), (60, 0.05)):
        journal = journal_of(kind, tmp_path, wait)
        async with journal.open("one"):
            with anyio.fail_after(30), pytest.raises(RunInProgress):
                await slow.agent.run("go", journal=journal, run_id="one", timeout=timeout)
            with anyio.fail_after(30), pytest.raises(RunInProgress):
                await slow.agent.resume(journal, "one", timeout=timeout)
    journal = journal_of(kind, tmp_path, 60)
    async with journal.open("one"):
        with anyio.fail_after(30):
            async with anyio.create_task_group() as group:
                group.start_soon(lambda: slow.agent.run("go", journal=journal, run_id="one"))
                await anyio.sleep(0.05)
                group.cancel_scope.cancel()
    assert slow.times == 0


def test_blocking_callers_wait_too(tmp_path: Path, backend: str) -> None:
    with sync.portal(backend=backend):
        journal = SQLiteJournal(tmp_path / "runs.db", wait=60)
        agent = BaseAgent("Greeter", "g", client=ScriptedModel(["hello"]))
        handles = [sync.start(agent, "hi", journal=journal, run_id="one") for _ in range(3)]
        assert [handle.result().content for handle in handles] == ["hello"] * 3


@pytest.mark.parametrize("wait", [-1, "3", None, True, float("nan")])
def test_a_wait_is_a_number_of_seconds(wait: Any) -> None:
    with pytest.raises(InvalidArguments, match="wait="):
        MemoryJournal(wait=wait)
    with pytest.raises(InvalidArguments, match="wait="):
        SQLiteJournal("x.db", wait=wait)


# ---- records without an end


class Hanging(MemoryJournal):
    """A journal that never comes to an end with a record of some kind, whatever cancels it."""

    def __init__(self, kind: str, *, is_deaf: bool = False) -> None:
        super().__init__()
        self.kinds, self.is_deaf = {kind, "end"}, is_deaf  # the latter, if a busy machine comes no further in time
        self.reached, self.released = anyio.Event(), anyio.Event()

    @asynccontextmanager
    async def open(self, run_id: str) -> AsyncGenerator[Any]:
        async with super().open(run_id) as opened:
            yield _OpenHanging(self, opened)


class _OpenHanging:
    def __init__(self, journal: Hanging, opened: Any) -> None:
        self.journal, self.opened, self.recall = journal, opened, opened.recall

    async def record(self, key: StepKey, text: str) -> None:
        if key.kind in self.journal.kinds:
            self.journal.reached.set()
            with anyio.CancelScope(shield=self.journal.is_deaf):
                await self.journal.released.wait()
        await self.opened.record(key, text)

    async def mark(self, key: StepKey, text: str) -> None:
        await self.record(key, text)


class _OpenRefusing:
    def __init__(self, opened: Any) -> None:
        self.record, self.mark = opened.record, opened.mark

    def recall(self, key: StepKey) -> str | None:
        raise JournalUnreadable("the disk is gone")


async def test_what_a_journal_says_of_itself_when_it_cannot_be_read_is_passed_on():
    class Refusing(MemoryJournal):
        @asynccontextmanager
        async def open(self, run_id: str) -> AsyncGenerator[Any]:
            async with super().open(run_id) as opened:
                yield _OpenRefusing(opened)

    with pytest.raises(JournalUnreadable, match=r"^the disk is gone$"):
        await quick().run("go", journal=Refusing(), run_id="one")


KINDS = ["start", "sent", "reply", "started", "finished", "end"]


def quick() -> BaseAgent[Any]:
    slow = Slow()
    slow.released.set()
    slow.agent.limits = Limits(grace=0.2)
    return slow.agent


@pytest.mark.parametrize("kind", KINDS)
async def test_a_record_without_an_end_is_cut_with_the_run_and_told(kind: str) -> None:
    with anyio.fail_after(30), pytest.raises(JournalNotWritten, match=r"has not kept a record within 0\.1 s"):
        await quick().run("go", journal=Hanging(kind), run_id="one", timeout=0.1)


@pytest.mark.parametrize("kind", KINDS)
async def test_a_cancellation_is_none_the_less_one(kind: str) -> None:
    journal = Hanging(kind)
    with anyio.fail_after(30):
        with anyio.CancelScope() as scope:
            async with anyio.create_task_group() as group:
                group.start_soon(lambda: quick().run("go", journal=journal, run_id="one"))
                await journal.reached.wait()
                scope.cancel()
    assert scope.cancelled_caught


async def test_a_record_that_hears_no_cancellation_is_left_to_itself() -> None:
    journal = Hanging("reply", is_deaf=True)
    with anyio.fail_after(30), pytest.raises(JournalNotWritten):
        await quick().run("go", journal=journal, run_id="one", timeout=0.1)
    journal.released.set()
    await anyio.sleep(0.05)  # for nothing to be left


async def test_a_record_that_is_slow_is_kept_though_the_run_is_cancelled() -> None:
    journal, reached, released = MemoryJournal(), anyio.Event(), anyio.Event()

    class Slowly(_OpenHanging):
        async def record(self, key: StepKey, text: str) -> None:
            if key.kind == "finished":
                reached.set()
                await released.wait()
            await self.opened.record(key, text)

    class Journal(MemoryJournal):
        @asynccontextmanager
        async def open(self, run_id: str) -> AsyncGenerator[Any]:
            async with journal.open(run_id) as opened:
                yield Slowly(self, opened)  # type: ignore[arg-type]

    slow = Slow()
    slow.released.set()
    with anyio.fail_after(30):
        async with anyio.create_task_group() as group:
            group.start_soon(lambda: slow.agent.run("go", journal=Journal(), run_id="one"))
            await reached.wait()
            group.cancel_scope.cancel()
            with anyio.CancelScope(shield=True):
                await anyio.sleep(0.05)
                released.set()
    assert "1.0 finished" in journal.runs["one"]
    result = await slow.agent.run("go", journal=journal, run_id="one")
    assert (result.content, slow.times) == ("all done", 1)


INTERRUPTED = """
import os, signal, sys, threading
from fractal import BaseAgent, sync, tool
from fractal.durable import SQLiteJournal
from fractal.testing import ScriptedModel, answers
import anyio

def interrupt():
    os.kill(os.getpid(), signal.SIGINT)

@tool(idempotent=True)
async def work() -> str:
    "Work."
    threading.Thread(target=interrupt).start()
    await anyio.sleep(60)

def answer(request):
    return "done" if request["messages"][-1]["role"] == "tool" else answers.call("work", {}, id="w")

agent = BaseAgent("Worker", "w", client=ScriptedModel(answer)).add_tool(work)
journal = SQLiteJournal(sys.argv[1], wait=60)
with sync.portal(backend=sys.argv[2]):
    try:
        sync.run(agent, "go", journal=journal, run_id="one")
    except KeyboardInterrupt:
        print(*sync.call(journal.records, "one"), sep=", ")
    with sync.enter(journal.open("one")):  # which was given back
        threading.Timer(0.2, interrupt).start()
        try:
            sync.run(agent, "go", journal=journal, run_id="one")
        except KeyboardInterrupt:
            print("interrupted while it waited")
"""


@pytest.mark.skipif(sys.platform == "win32", reason="signals are others there")
def test_ctrl_c_ends_a_blocking_run_with_a_journal_that_can_go_on(tmp_path: Path, backend: str) -> None:
    command = [sys.executable, "-c", INTERRUPTED, str(tmp_path / "runs.db"), backend]
    done = subprocess.run(command, capture_output=True, text=True, timeout=50)
    assert done.stdout.splitlines() == [
        "start, 1 try 1 sent, 1 reply, 1.0 time 1 started",
        "interrupted while it waited",
    ], done.stderr


async def test_records_that_fail_after_a_cancellation_break_the_journal_by_the_first_of_them() -> None:
    begun, released = anyio.Event(), anyio.Event()

    class Failing(MemoryJournal):
        @asynccontextmanager
        async def open(self, run_id: str) -> AsyncGenerator[Any]:
            async with super().open(run_id) as found:

                async def record(key: StepKey, text: str) -> None:
                    begun.set()
                    await released.wait()
                    raise OSError(f"the disk is gone at {key.kind}")

                found.record = record  # type: ignore[method-assign]
                yield found

    tree = JournalOfTree(Durable(Failing(), "one"), 10)
    async with tree.open(math.inf):
        async with anyio.create_task_group() as group:
            for kind in ("sent", "reply"):
                group.start_soon(tree.record, StepKey("", "1", kind), None, None)  # type: ignore[arg-type]
            await begun.wait()
            group.cancel_scope.cancel()
            released.set()
        with pytest.raises(JournalNotWritten, match="the disk is gone at") as broken:
            tree.check()
        assert isinstance(broken.value.__cause__, OSError)
