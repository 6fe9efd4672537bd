"""The gate and the worker threads behind plain tools."""

from __future__ import annotations

import threading
from collections.abc import Callable

import anyio
import anyio.to_thread
import pytest

from fractal._threads import Gate, ThreadCall, abandoned_threads, worker_gate


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
    assert worker_gate.held == 0


@pytest.mark.parametrize("abandon", [True, False])
async def test_a_call_cancelled_before_its_thread_began_is_not_made(abandon: bool):
    called: list[int] = []
    with anyio.CancelScope() as scope:
        scope.cancel()
        await ThreadCall(lambda: called.append(1), "call", abandon=abandon).run()
    assert worker_gate.held == 0
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
    assert (gate.held, worker_gate.held) == (1, 1)
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
    assert worker_gate.held == 0
