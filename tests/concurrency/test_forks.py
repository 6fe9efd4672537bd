"""Forked children: of the parent's threads they have one, and none of its event loops."""

from __future__ import annotations

import gc
import multiprocessing
import os
import subprocess
import sys
import threading
import time
import warnings
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from contextlib import AbstractContextManager
from functools import partial
from pathlib import Path
from typing import Any

import anyio
import pytest

from fractal import BaseAgent, OtherProcess, RunCancelled, abandoned_threads, sync, tool
from fractal._concurrency import forks as _forks
from fractal._concurrency.gates import Gate, tool_threads
from fractal._concurrency.threads import ThreadCall
from fractal.sync import _portal
from fractal.sync._portal import Portal
from fractal.testing import ScriptedModel, answers, stall_guard
from tests.forking import end_of, fork, forked
from tests.support import LOOPS, Talkative, run_on

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="needs os.fork")


def agent(*steps: Any, **options: Any) -> BaseAgent:
    return BaseAgent("A", "a", client=ScriptedModel(list(steps) or (lambda _: "hello")), **options)


GOOD = agent()
TALKATIVE = BaseAgent("T", "t", client=Talkative())
ASK = answers.calls(answers.call("ask"))


def ask_in_child() -> bool:
    """Whether all verbs work, on an event loop of the child's own."""
    with sync.stream(GOOD, "go", timeout=5) as stream:
        text = "".join(stream.text())
    with sync.stream_many(GOOD, ["a", "b"], timeout=5) as batch:
        texts = [each.result.content for each in batch]
    many = [each.content for each in sync.run_many(GOOD, ["a"], timeout=5)]
    run = sync.run(GOOD, "go", timeout=5)
    # Of its parent's runs none is above it.
    return {text, run.content, sync.start(GOOD, "go").result(5).content, *texts, *many} == {"hello"}


# ---- in what a run calls


def in_process() -> bool:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        process = multiprocessing.get_context("fork").Process(target=lambda: sys.exit(0 if ask_in_child() else 1))
        process.start()
    process.join(10)
    return process.exitcode == 0


def in_pool() -> bool:
    with (
        warnings.catch_warnings(),
        ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("fork")) as pool,
    ):
        warnings.simplefilter("ignore", DeprecationWarning)
        return pool.submit(ask_in_child).result(10)


def in_fork() -> bool:
    return forked(ask_in_child) == 0


def in_grandchild() -> bool:
    return forked(lambda: ask_in_child() and forked(ask_in_child) == 0) == 0


def in_thread_of_child() -> bool:
    def work() -> bool:
        done: list[bool] = []
        thread = threading.Thread(target=lambda: done.append(ask_in_child()))
        thread.start()
        thread.join(10)
        return done == [True]

    return forked(work) == 0


WAYS: dict[str, Callable[[], bool]] = {
    "process": in_process,
    "pool": in_pool,
    "fork": in_fork,
    "grandchild": in_grandchild,
    "thread of a child": in_thread_of_child,
}


@pytest.mark.parametrize("way", WAYS)
def test_the_child_of_a_plain_tool_asks_on_an_event_loop_of_its_own(way: str, loop: str, shared_portal: Portal):
    done: list[bool] = []
    asking = [agent(ASK, "done").add_tool(lambda: done.append(WAYS[way]()), name="ask") for _ in range(3)]
    sync.run(asking[0], "go")
    run_on(loop, asking[1].run, "go")
    with sync.stream(asking[2], "go") as stream:
        stream.result()
    sync.execute_tool(asking[2], "ask")
    assert done == [True] * 4
    assert sync.run(GOOD, "go").content == "hello"


def validated(work: Callable[[], object]) -> BaseAgent:
    one = agent("done")
    one.output_validator(lambda _: work())
    return one


def approved(work: Callable[[], object]) -> BaseAgent:
    @tool(requires_approval=True)
    async def ask() -> None: ...

    return agent(ASK, "done", approve=lambda _: bool(work())).add_tool(ask)


def answered(work: Callable[[], object]) -> BaseAgent:
    class Client:
        def __init__(self) -> None:
            self.chat = self.completions = self

        def create(self, **_: object) -> dict[str, Any]:
            work()
            return {"choices": [{"message": {"content": "done"}, "finish_reason": "stop"}]}

    return BaseAgent("A", "a", client=Client())


def called_async(work: Callable[[], object]) -> BaseAgent:
    async def ask() -> None:
        work()

    return agent(ASK, "done").add_tool(ask)


def observed(work: Callable[[], object]) -> BaseAgent:
    return agent("done", observers=[lambda event: work() if event.kind == "run_started" else None])


@pytest.mark.parametrize("make", [validated, approved, answered, called_async, observed])
def test_the_child_of_whatever_a_run_calls_asks_on_an_event_loop_of_its_own(
    make: Callable[[Callable[[], object]], BaseAgent], loop: str, shared_portal: Portal
):
    done: list[bool] = []

    def work() -> bool:
        done.append(in_fork())
        return done[-1]

    sync.run(make(work), "go", timeout=20)
    run_on(loop, make(work).run, "go")
    assert done == [True, True]


def test_a_child_of_a_loop_of_the_users_own_asks_on_another_one(loop: str, recwarn: pytest.WarningsRecorder):
    async def main() -> bool:
        return in_fork()

    assert run_on(loop, main)
    assert not recwarn.list


def leave_by(how: str) -> None:
    match how:
        case "return":
            return
        case "error":
            raise LookupError("of the child")
        case "words":
            sys.exit("of the child")
        case _:
            sys.exit(int(how))


@pytest.mark.parametrize(("how", "status"), [("return", 0), ("error", 1), ("words", 1), ("0", 0), ("7", 7)])
def test_a_child_ends_with_the_plain_tool_in_which_it_was_forked(
    how: str, status: int, loop: str, shared_portal: Portal, capfd: pytest.CaptureFixture[str]
):
    children: list[int] = []

    def ask() -> str:
        child = fork()
        if child == 0:
            leave_by(how)
            return "the child's"
        children.append(end_of(child))
        return "the parent's"

    result = sync.run(agent(ASK, "done").add_tool(ask), "go")
    assert result.tool_results[0].content == "the parent's"
    assert children == [status]
    assert ("of the child" in capfd.readouterr().err) == (how in ("error", "words"))


@pytest.mark.parametrize("verb", ["facade", "loop"])
def test_a_child_that_goes_on_with_its_parents_event_loop_ends_and_says_so(
    verb: str, loop: str, shared_portal: Portal, capfd: pytest.CaptureFixture[str]
):
    children: list[int] = []

    async def ask() -> None:
        child = fork()
        if child:
            children.append(end_of(child))
        await anyio.sleep(0)

    one = agent(ASK, "done").add_tool(ask)
    result = sync.run(one, "go") if verb == "facade" else run_on(loop, one.run, "go")
    assert result.content == "done"
    assert children == [1]
    assert "a forked child ends here, since the event loop is its parent's" in capfd.readouterr().err


# ---- in blocks


BLOCKS: dict[str, Callable[[], AbstractContextManager[Any]]] = {
    "stream": lambda: sync.stream(TALKATIVE, "go"),
    "batch": lambda: sync.stream_many(TALKATIVE, ["a", "b", "c"], max_concurrency=1),
    "agent": lambda: sync.enter(agent()),
    "portal": lambda: sync.portal(),
}


def left_in_child(make: Callable[[], AbstractContextManager[Any]]) -> int:
    """The exit status of a child, forked in a block, that leaves the block."""
    with make():
        child = fork()
        if child:
            return end_of(child)
    os._exit(0)


@pytest.mark.parametrize("where", ["thread", "plain tool"])
@pytest.mark.parametrize("block", BLOCKS)
def test_a_child_has_nothing_to_wait_for_at_the_end_of_its_parents_block(
    block: str, where: str, loop: str, shared_portal: Portal
):
    ends: list[int] = []

    def ask() -> None:
        ends.append(left_in_child(BLOCKS[block]))

    if where == "thread":
        ask()
    else:
        sync.run(agent(ASK, "done").add_tool(ask), "go")
    assert ends == [0]


@pytest.mark.parametrize("block", BLOCKS)
def test_a_child_may_collect_its_parents_block(block: str, loop: str, shared_portal: Portal):
    opened: list[Any] = [BLOCKS[block]()]
    opened[0].__enter__()

    def collect() -> bool:
        opened.clear()
        gc.collect()
        return ask_in_child()

    assert forked(collect) == 0
    opened[0].__exit__(None, None, None)


def is_elsewhere(use: Callable[[], object]) -> bool:
    try:
        use()
    except OtherProcess as error:
        return error.pid == os.getppid() and str(error.pid) in str(error)
    return False


def test_what_runs_in_the_parent_is_told_to_do_so_in_the_child(loop: str, shared_portal: Portal):
    handle = sync.start(TALKATIVE, "go")
    with sync.stream(TALKATIVE, "go") as stream, sync.stream_many(TALKATIVE, ["a"]) as batch:
        next(stream)
        uses: list[Callable[[], object]] = [handle.result, lambda: handle.result(1), stream.result, batch.__next__]
        uses.append(lambda: list(stream))  # some of its events are here
        for use in uses:
            assert forked(partial(is_elsewhere, use)) == 0
        assert forked(lambda: (handle.cancel(), handle.done())) == 0
        assert not handle.done()
        assert next(stream)
    handle.cancel()
    with pytest.raises(RunCancelled):
        handle.result(5)


def test_what_a_tools_thread_has_opened_is_its_parents_too(loop: str, shared_portal: Portal):
    seen: list[int] = []

    def ask() -> None:
        with sync.stream(TALKATIVE, "go") as stream:
            next(stream)
            seen.append(forked(lambda: is_elsewhere(lambda: list(stream))))

    assert sync.run(agent(ASK, "done").add_tool(ask), "go").content == "done"
    assert seen == [0]


# ---- what others hold


def holding(lock: Any) -> tuple[threading.Thread, threading.Event]:
    held, release = threading.Event(), threading.Event()

    def hold() -> None:
        with lock:
            held.set()
            release.wait(10)

    thread = threading.Thread(target=hold)
    thread.start()
    held.wait(5)
    return thread, release


@pytest.mark.parametrize("what", ["portal", "threads", "memory"])
def test_locks_that_other_threads_held_are_free_in_the_child(what: str, shared_portal: Portal):
    one = agent(answers.call("ask"), '{"n": 1}', output_type=dict[str, int]).add_tool(lambda: None, name="ask")
    lock = {
        "portal": shared_portal._starting,
        "threads": tool_threads._lock,
        "memory": next(each for each in list(_forks._locks)),
    }[what]
    thread, release = holding(lock)
    try:
        assert forked(lambda: sync.run(one, "go", timeout=5).success) == 0
    finally:
        release.set()
        thread.join()


def test_places_that_threads_of_the_parent_hold_are_free_in_the_child(
    shared_portal: Portal, monkeypatch: pytest.MonkeyPatch
):
    gate = Gate(1, "a place")
    gate.take()
    monkeypatch.setattr(tool_threads, "_limit", 1)
    release = threading.Event()

    @tool(timeout=0.05)
    def ask() -> None:
        release.wait(10)

    one = agent(ASK, "done").add_tool(ask)
    assert sync.run(one, "go").abandoned
    works = agent(ASK, "done").add_tool(lambda: "worked", name="ask")

    def work() -> bool:
        is_new = gate.held == tool_threads.held == 0 and abandoned_threads() == ()
        return is_new and sync.run(works, "go", timeout=5).tool_results[0].content == "worked"

    assert forked(work) == 0
    assert tool_threads.held == 1
    release.set()
    while abandoned_threads():
        release.wait(0.01)


async def test_threads_of_the_parent_are_not_given_work_in_the_child():
    await ThreadCall(lambda: None, "work", abandon=True).run()  # and is idle now

    def work() -> bool:
        return anyio.run(ThreadCall(lambda: "worked", "work", abandon=True).run) == "worked"

    def in_child() -> bool:
        done: list[bool] = []
        thread = threading.Thread(target=lambda: done.append(work()))  # where no event loop runs
        thread.start()
        thread.join(10)
        return done == [True]

    assert forked(in_child) == 0


IMPORTING = """
import os, sys, threading, time
from fractal import BaseAgent, sync
from fractal.testing import ScriptedModel, answers, stall_guard

agent = BaseAgent("A", "a", client=ScriptedModel([answers.call("load"), "done"])).add_tool(
    lambda: __import__("slow_module"), name="load"
)
handle = sync.start(agent, "go")
while "slow_module" not in sys.modules:
    time.sleep(0.001)
child = os.fork()
if child == 0:
    import signal
    signal.alarm(10)
    import slow_module
    os._exit(0 if slow_module.is_there else 1)
print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
handle.result(10)
"""


def test_a_module_that_a_thread_of_the_library_was_importing_can_be_imported_in_the_child(tmp_path: Path):
    (tmp_path / "slow_module.py").write_text("import time\ntime.sleep(0.5)\nis_there = True\n")
    command = [sys.executable, "-W", "ignore", "-c", IMPORTING]
    done = subprocess.run(command, capture_output=True, text=True, timeout=30, cwd=tmp_path)
    assert (done.stdout, done.stderr) == ("0\n", "")


def test_a_fork_waits_for_imports_no_longer_than_it_must(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(_forks, "IMPORTS_TAKE", 0.05)
    monkeypatch.setattr(_forks, "_is_importing", lambda frame: True)
    thread, release = holding(threading.Lock())
    _forks.our_threads.add(thread)
    try:
        began = time.monotonic()
        assert forked(lambda: True) == 0
        assert time.monotonic() - began >= 0.05
    finally:
        release.set()
        thread.join()


def test_a_portal_of_the_parent_starts_anew_in_the_child(loop: str):
    with sync.portal(**LOOPS[loop]) as portal:
        sync.run(GOOD, "go")
        assert forked(lambda: not portal.is_running and ask_in_child() and portal.is_running) == 0
        assert portal.is_running
    assert _portal.here() is not portal


def test_the_guard_against_stalls_is_at_work_in_the_child(shared_portal: Portal):
    async def ask(seconds: float) -> None:
        time.sleep(seconds)  # noqa: ASYNC251  # as it should not

    def asking(seconds: float) -> BaseAgent:
        return agent(answers.calls(answers.call("ask", {"seconds": seconds})), "done").add_tool(ask)

    with stall_guard(0.1) as stalls:
        assert sync.run(asking(0), "go").success  # the guard's thread has begun
        assert forked(lambda: sync.run(asking(1), "go").success and stalls) == 0
    assert stalls == []


def test_a_thread_is_known_to_import_by_a_frame_of_the_import_system():
    space: dict[str, Any] = {"sys": sys}
    exec(compile("frame = sys._getframe()", "<frozen importlib._bootstrap>", "exec"), space)
    assert _forks._is_importing(space["frame"])
    assert not _forks._is_importing(sys._getframe())
    assert not _forks._is_importing(None)
