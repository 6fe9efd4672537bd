"""The gate and the worker threads behind plain tools."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Callable
from contextvars import ContextVar
from typing import Any

import anyio
import anyio.from_thread
import anyio.to_thread
import pytest

from fractal import RunCancelled
from fractal._concurrency import workers as _workers
from fractal._concurrency.gates import Gate, approval_threads, client_threads, hook_threads, tool_threads
from fractal._concurrency.threads import ThreadCall, abandoned_threads
from tests.support import run_on


async def test_a_gate_lets_tasks_in_in_the_order_in_which_they_came():
    gate, order = Gate(1, "its turn"), list[int]()

    async def enter(n: int) -> None:
        await gate.acquire()
        order.append(n)
        await anyio.sleep(0.001)
        assert gate.held == 1
        gate.release()

    await gate.acquire()
    async with anyio.create_task_group() as group:
        for n in range(10):
            group.start_soon(enter, n)
            await anyio.wait_all_tasks_blocked()
        gate.release()
    assert order == list(range(10))
    assert gate.held == 0


async def test_a_place_is_taken_at_once_only_if_one_is_free_and_nobody_waits():
    gate = Gate(1, "its turn")
    assert gate.acquire_at_once()
    assert not gate.acquire_at_once()
    assert gate.held == 1
    async with anyio.create_task_group() as group:
        group.start_soon(gate.acquire)
        await anyio.wait_all_tasks_blocked()
        gate.release()
        assert not gate.acquire_at_once()
    gate.release()
    assert gate.held == 0


async def test_a_cancelled_wait_takes_no_place():
    gate = Gate(1, "its turn")
    await gate.acquire()
    with anyio.move_on_after(0.01):
        await gate.acquire()
    gate.release()
    assert gate.held == 0
    with anyio.fail_after(1):
        await gate.acquire()
    gate.release()


async def test_a_place_given_to_a_task_in_the_moment_it_is_cancelled_goes_to_the_next():
    gate = Gate(1, "its turn")
    await gate.acquire()
    got_it = anyio.Event()

    async def second(scope: anyio.CancelScope) -> None:
        with scope:
            await gate.acquire()
            gate.release()

    async def third() -> None:
        await gate.acquire()
        got_it.set()
        gate.release()

    scope = anyio.CancelScope()
    async with anyio.create_task_group() as group:
        group.start_soon(second, scope)
        await anyio.sleep(0.01)
        group.start_soon(third)
        await anyio.sleep(0.01)
        gate.release()  # given to the second …
        scope.cancel()  # … which does not want it any more
        with anyio.fail_after(1):
            await got_it.wait()
    assert gate.held == 0


def test_a_gate_is_shared_by_event_loops_of_both_kinds():
    gate, lock = Gate(3, "its turn"), threading.Lock()
    state = {"now": 0, "most": 0, "entered": 0}

    def step(by: int) -> None:
        with lock:
            state["now"] += by
            state["most"] = max(state["most"], state["now"])
            state["entered"] += by > 0

    async def enter() -> None:
        for _ in range(10):
            await gate.acquire()
            step(1)
            await anyio.sleep(0.001)
            step(-1)
            gate.release()

    async def loop() -> None:
        async with anyio.create_task_group() as group:
            for _ in range(4):
                group.start_soon(enter)

    threads = [threading.Thread(target=anyio.run, args=(loop,), kwargs={"backend": b}) for b in ("asyncio", "trio") * 2]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(20)
    assert state == {"now": 0, "most": 3, "entered": 160}


def test_a_place_is_not_given_to_a_loop_that_has_ended(backend: str):
    gate = Gate(1, "its turn")

    async def take() -> None:
        await gate.acquire()

    async def wait_and_leave() -> None:
        with anyio.move_on_after(0.01):
            await gate.acquire()

    anyio.run(take, backend=backend)
    anyio.run(wait_and_leave, backend=backend)
    gate.release()
    anyio.run(take, backend=backend)
    assert gate.held == 1


async def test_plain_tools_leave_anyios_own_threads_alone():
    begun, free = threading.Semaphore(0), threading.Event()

    def hold() -> None:
        begun.release()
        free.wait(10)

    async with anyio.create_task_group() as group:
        for _ in range(60):
            group.start_soon(ThreadCall(hold, "hold", abandon=False).run)
        with anyio.fail_after(10):
            for _ in range(60):
                await anyio.to_thread.run_sync(begun.acquire)
        free.set()
    assert tool_threads.held == 0


@pytest.mark.parametrize("abandon", [True, False])
async def test_a_call_cancelled_before_its_thread_began_is_not_made(abandon: bool):
    called: list[int] = []
    with anyio.CancelScope() as scope:
        scope.cancel()
        await ThreadCall(lambda: called.append(1), "call", abandon=abandon).run()
    assert tool_threads.held == 0
    assert called == []


async def test_an_abandoned_call_tells_when_it_ends_and_gives_its_places_back_then():
    began, release, ended = threading.Event(), threading.Event(), threading.Event()
    gate = Gate(1, "its turn")

    def report(seconds: float) -> None:
        assert gate.held == 0
        assert seconds > 0
        ended.set()

    def wait() -> None:
        began.set()
        release.wait(5)

    call = ThreadCall(wait, "wait", gates=[gate], abandon=True, on_late_end=report)
    async with anyio.create_task_group() as group:
        group.start_soon(call.run)
        assert await anyio.to_thread.run_sync(began.wait, 5)
        group.cancel_scope.cancel()
    assert call.abandoned
    assert (gate.held, tool_threads.held) == (1, 1)
    [listed] = abandoned_threads()
    assert (listed.name, listed.thread) == ("wait", call.thread)
    assert "test_threads.py" in str(listed.where)
    assert 0 < listed.seconds < 5
    release.set()
    assert await anyio.to_thread.run_sync(ended.wait, 5)
    assert abandoned_threads() == ()


@pytest.mark.parametrize("make", [lambda: 7, lambda: "text"])
async def test_a_call_gives_back_what_the_function_returns_and_raises(make: Callable[[], object]):
    assert await ThreadCall(make, "make", abandon=True).run() == make()

    def fail() -> None:
        raise LookupError("no")

    with pytest.raises(LookupError, match="no"):
        await ThreadCall(fail, "fail", abandon=True).run()
    assert tool_threads.held == 0


# ---- the threads themselves


def test_a_worker_thread_keeps_no_process_alive(loop: str):
    async def thread_of_a_call() -> threading.Thread:
        return await ThreadCall(threading.current_thread, "look", abandon=True).run()

    assert not threading.current_thread().daemon
    assert run_on(loop, thread_of_a_call).daemon


async def test_a_worker_thread_is_used_again():
    async def thread_of_a_call() -> threading.Thread:
        return await ThreadCall(threading.current_thread, "look", abandon=True).run()

    assert len({await thread_of_a_call() for _ in range(20)}) <= 2  # the last one may not be idle yet


def test_a_worker_thread_ends_when_nobody_needs_it(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(_workers, "IDLE_TIME", 0.01)
    _workers._idle.clear()

    async def thread_of_a_call() -> threading.Thread:
        return await ThreadCall(threading.current_thread, "look", abandon=True).run()

    thread = anyio.run(thread_of_a_call)
    thread.join(10)
    assert not thread.is_alive()
    assert not _workers._idle


def test_a_function_in_a_thread_may_use_what_anyio_has_for_threads(loop: str):
    variable: ContextVar[str] = ContextVar("variable")

    async def answer() -> str:
        await anyio.sleep(0)
        return f"{variable.get()} in the loop"

    def work() -> str:
        anyio.from_thread.check_cancelled()
        with pytest.raises(RuntimeError):
            anyio.get_cancelled_exc_class()
        return anyio.from_thread.run(answer)

    async def call() -> str:
        variable.set("told")
        return await ThreadCall(work, "work", abandon=True).run()

    assert run_on(loop, call) == "told in the loop"


def test_a_function_in_a_thread_may_run_an_event_loop_of_its_own(loop: str):
    async def seven() -> int:
        return 7

    def work() -> list[int]:
        return [anyio.run(seven, backend=backend) for backend in ("asyncio", "trio")]

    assert run_on(loop, ThreadCall(work, "work", abandon=True).run) == [7, 7]


def test_a_function_in_a_thread_can_ask_whether_it_is_cancelled(loop: str):
    ended = threading.Event()
    began = threading.Event()

    def work() -> None:
        began.set()
        try:
            while True:
                anyio.from_thread.check_cancelled()
                ended.wait(0.001)
        finally:
            ended.set()

    async def cancel() -> None:
        async with anyio.create_task_group() as group:
            group.start_soon(ThreadCall(work, "work", abandon=False).run)
            await anyio.to_thread.run_sync(began.wait)
            group.cancel_scope.cancel()
        assert ended.is_set()

    run_on(loop, cancel)


def test_without_a_thread_each_call_fails_and_a_later_one_works(loop: str, monkeypatch: pytest.MonkeyPatch):
    def refuse(*_: object, **__: object) -> None:
        raise RuntimeError("can't start new thread")

    async def call() -> str:
        with monkeypatch.context() as patched:
            patched.setattr(threading, "_start_new_thread", refuse, raising=False)
            patched.setattr(threading, "_start_joinable_thread", refuse, raising=False)
            for _ in range(2):
                with pytest.raises(RuntimeError, match="can't start new thread"):
                    await ThreadCall(lambda: None, "work", abandon=True).run()
        assert tool_threads.held == 0
        return await ThreadCall(lambda: "worked", "work", abandon=True).run()

    _workers._idle.clear()
    trio_threads().clear()
    assert run_on(loop, call) == "worked"


def trio_threads() -> Any:
    from trio._core import _thread_cache

    return _thread_cache.THREAD_CACHE._idle_workers


@pytest.mark.parametrize("times", [1, 3])
def test_a_call_that_is_to_be_waited_for_is_so_when_all_tasks_are_cancelled_natively(times: int):
    release, began = threading.Event(), threading.Event()

    def work() -> str:
        began.set()
        release.wait(10)
        return "worked"

    async def call() -> bool:
        asking = asyncio.create_task(ThreadCall(work, "work", abandon=False).run())
        await anyio.to_thread.run_sync(began.wait)
        for _ in range(times):
            asking.cancel()
            await asyncio.sleep(0.01)
        was_waited_for = not asking.done()
        release.set()
        with pytest.raises(asyncio.CancelledError):
            await asking
        return was_waited_for

    assert anyio.run(call)


# ---- kinds


KINDS = {"tools": tool_threads, "hooks": hook_threads, "approvals": approval_threads, "clients": client_threads}


@pytest.mark.parametrize("hung", KINDS)
async def test_what_hangs_of_one_kind_keeps_none_of_another_kind_waiting(hung: str, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(KINDS[hung], "_limit", 1)
    KINDS[hung].take()
    with anyio.fail_after(5):
        for name, threads in [*KINDS.items(), ("the library itself", None)]:
            if name != hung:
                await ThreadCall(lambda: None, "work", threads=threads, abandon=True).run()
    with anyio.move_on_after(0.05) as patience:
        await ThreadCall(lambda: None, "work", threads=KINDS[hung], abandon=True).run()
    assert patience.cancelled_caught
    KINDS[hung].release()


# ---- joining


async def test_what_a_call_leaves_running_in_the_loop_ends_with_it():
    ended: list[str] = []

    async def go_on() -> None:
        try:
            await anyio.sleep_forever()
        finally:
            ended.append("joined")

    def work() -> str:
        assert call.call(go_on).start().wait(0.05) is False
        return "worked"

    async with anyio.create_task_group() as group:
        call: ThreadCall[str] = ThreadCall(work, "work", abandon=True, group=group)
        assert await call.run() == "worked"
        assert ended == ["joined"]


async def test_what_joins_a_call_that_has_been_left_never_runs():
    began, release, told = threading.Event(), threading.Event(), list[object]()

    async def fail() -> None:
        pytest.fail("it runs")

    def work() -> None:
        began.set()
        release.wait(5)
        for _ in range(2):
            try:
                call.join(fail)
            except RunCancelled as error:
                told.append(str(error))

    async with anyio.create_task_group() as group:
        call = ThreadCall(work, "work", abandon=True, group=group)
        with anyio.CancelScope() as scope:
            group.start_soon(cancel_when, began, scope)
            await call.run()
    release.set()
    await anyio.to_thread.run_sync(wait_until, told, 2)
    assert told == ["the run that called this tool is over"] * 2


async def cancel_when(event: threading.Event, scope: anyio.CancelScope) -> None:
    await anyio.to_thread.run_sync(event.wait)
    scope.cancel()


def wait_until(found: list[object], number: int) -> None:
    deadline = time.monotonic() + 5
    while len(found) < number:
        assert time.monotonic() < deadline
        threading.Event().wait(0.005)


async def test_what_a_thread_begins_in_the_moment_in_which_its_call_is_left_never_runs():
    call = ThreadCall(lambda: None, "call", abandon=True)
    begun = call.call(anyio.sleep_forever)
    call._has_left = True
    call._start(begun)
    assert begun.has_ended
    with pytest.raises(RunCancelled):
        begun.result()


def test_a_function_whose_call_was_dropped_before_its_thread_began_is_not_called():
    called = list[int]()
    call = ThreadCall(lambda: called.append(1), "call", abandon=True)
    call._leave()
    with pytest.raises(RuntimeError, match="dropped before it began"):
        call._work()
    assert called == []
