"""The harness that cancels everywhere: what it visits, and what it does not let pass."""

from __future__ import annotations

import asyncio
import socket
import subprocess
import sys
import threading
from collections.abc import Awaitable, Callable
from contextlib import suppress
from typing import Any

import anyio
import pytest
import trio

from fractal import BaseAgent, InvalidArguments
from fractal._agent import verbs
from fractal._concurrency.current import current_run
from fractal._concurrency.gates import Gate
from fractal.testing import CancellationFaults, CancelReport, ScriptedModel, answers, cancel_everywhere

WAYS = {"asyncio": ["scope", "native", "native twice", "wait_for", "again"], "trio": ["scope", "native", "again"]}


async def two_steps() -> None:
    await anyio.sleep(0)
    await anyio.sleep(0)


def faults(scenario: Callable[[], Awaitable[object]], **options: Any) -> list[str]:
    with pytest.raises(CancellationFaults) as caught:
        cancel_everywhere(scenario, **options)
    assert str(caught.value).splitlines()[1:] == [
        line for each in caught.value.faults for line in str(each).splitlines()
    ]
    return [each.problem for each in caught.value.faults]


def test_each_step_of_each_task_is_visited_in_each_way():
    report = cancel_everywhere(two_steps)
    assert set(report.points) == {(backend, way) for backend, ways in WAYS.items() for way in ways}
    assert set(report.points.values()) <= {2, 3}  # some ways need a task that waits, whose step counts too
    assert report.total == sum(report.points.values())

    async def with_child() -> None:
        async with anyio.create_task_group() as group:
            group.start_soon(two_steps)

    assert cancel_everywhere(with_child, backends=["trio"], ways=["scope"]).total > 3


def test_the_report_is_one_line():
    points = {("asyncio", "scope"): 2, ("asyncio", "native"): 3, ("trio", "scope"): 4}
    assert str(CancelReport(points)) == "cancelled at 9 points: asyncio scope 2, native 3, trio scope 4"


@pytest.mark.parametrize(
    "options", [{"backends": ["curio"]}, {"ways": ["gently"]}, {"backends": "trio"}, {"ways": "scope"}]
)
def test_what_there_is_not_is_refused(options: Any):
    with pytest.raises(InvalidArguments, match=r"give some of '\w"):
        cancel_everywhere(two_steps, **options)


def test_a_scenario_that_fails_by_itself_is_raised_as_it_is(backend: str):
    async def fails() -> None:
        await anyio.sleep(0)
        raise LookupError("by itself")

    with pytest.raises(LookupError, match="by itself"):
        cancel_everywhere(fails, backends=[backend])


@pytest.mark.parametrize("way", ["native", "native twice", "wait_for"])
def test_a_native_cancellation_that_is_swallowed_is_a_fault(way: str):
    async def swallows() -> None:
        with suppress(asyncio.CancelledError):
            await asyncio.sleep(0)

    assert faults(swallows, backends=["asyncio"], ways=[way])[0] == (
        "the cancellation was swallowed: the scenario returned"
    )


def test_a_scopes_cancellation_that_is_swallowed_is_a_fault(backend: str):
    async def swallows() -> None:
        with suppress(BaseException):
            await anyio.sleep(0.001)

    assert "swallowed" in faults(swallows, backends=[backend], ways=["scope"])[0]


def test_a_cancellation_that_is_swallowed_once_a_shield_is_left_is_a_fault(backend: str):
    async def swallows_later() -> None:
        with anyio.CancelScope(shield=True):
            await anyio.sleep(0)
        with suppress(BaseException):
            await anyio.sleep(0.001)

    found = faults(swallows_later, backends=[backend], ways=["scope"])
    assert len(found) > 1  # in the shield, and after it
    assert set(found) == {"the cancellation was swallowed: the scenario returned"}


def test_an_error_in_place_of_the_cancellation_is_a_fault(backend: str):
    async def replaces() -> None:
        try:
            await anyio.sleep(0)
        except BaseException:
            raise ValueError("instead") from None

    assert set(faults(replaces, backends=[backend])) == {"ValueError took the place of the cancellation: instead"}


def test_a_task_that_is_left_is_a_fault_with_its_place(backend: str):
    async def runaway() -> None:
        await anyio.sleep(0.01)

    async def leaves_a_task() -> None:
        if backend == "asyncio":
            tasks.append(asyncio.ensure_future(runaway()))
        else:
            trio.lowlevel.spawn_system_task(runaway)
        await anyio.sleep(0)

    tasks: list[Any] = []
    found = faults(leaves_a_task, backends=[backend], ways=["scope"])
    assert "tasks left: " in found[0]
    assert "test_cancelling.py" in found[-1] or "runaway" in found[-1]


def test_a_thread_that_goes_on_is_a_fault_with_its_place(backend: str):
    free = threading.Event()

    async def leaves_a_thread() -> None:
        with anyio.CancelScope() as scope:
            scope.cancel()
            await anyio.to_thread.run_sync(free.wait, abandon_on_cancel=True)
        started = anyio.Event()
        threading.Thread(target=free.wait, name="runaway").start()
        started.set()
        await started.wait()

    try:
        found = faults(leaves_a_thread, backends=[backend], ways=["scope"], within=0.1)
    finally:
        free.set()
    assert "thread 'runaway' at" in found[0]


def test_a_socket_that_is_left_open_is_a_fault(backend: str):
    kept: list[socket.socket] = []

    async def leaves_a_socket() -> None:
        kept.append(socket.socket())
        await anyio.sleep(0)
        kept.pop().close()

    found = faults(leaves_a_socket, backends=[backend], ways=["scope"], within=0.1)
    for one in kept:
        one.close()
    assert "left: socket:" in found[0]


def test_a_run_that_does_not_come_back_is_a_fault_and_ends_the_search(backend: str):
    free = threading.Event()

    async def hangs() -> None:
        try:
            await anyio.sleep(0)
        finally:
            while not free.is_set():
                with anyio.CancelScope(shield=True):
                    await anyio.sleep(0.01)

    async def hangs_when_cancelled() -> None:
        try:
            await anyio.sleep(0)
        except BaseException:
            await hangs()
            raise

    try:
        [found] = faults(hangs_when_cancelled, backends=[backend], ways=["scope"], within=0.2)
    finally:
        free.set()
    assert found.startswith("it has not come back after 0.2 s: test_cancelling.py")
    for thread in threading.enumerate():
        if thread.name == "cancel_everywhere":
            thread.join(5)


def test_a_check_that_fails_is_a_fault_and_no_more_than_ten_are_looked_for():
    async def steps() -> None:
        for _ in range(30):
            await anyio.sleep(0)

    def check() -> None:
        calls.append(1)
        assert len(calls) == 1, "not as it should be"

    calls: list[int] = []

    found = faults(steps, check=check, backends=["trio"], ways=["scope"])
    assert len(found) == 10
    assert all(problem.startswith("check() failed: not as it should be") for problem in found)


def test_a_scenario_may_wait_for_what_never_comes():
    async def waits() -> None:
        with anyio.move_on_after(0.001):
            await anyio.sleep(float("inf"))

    assert cancel_everywhere(waits, backends=["asyncio"], ways=["wait_for"]).total > 0


def test_a_check_may_be_async_and_is_called_in_the_event_loop(backend: str):
    async def check() -> None:
        await anyio.sleep(0)
        raise LookupError("asked")

    assert faults(two_steps, backends=[backend], ways=["scope"], check=check) == ["check() failed: LookupError: asked"]


def test_what_goes_wrong_without_a_cancellation_ends_the_search(backend: str):
    found = faults(two_steps, backends=[backend], check=lambda: 1 / 0)
    assert len(found) == len(WAYS[backend])
    assert set(found) == {"check() failed: ZeroDivisionError: division by zero"}


def test_a_fault_says_which_of_how_many_points_and_where(backend: str):
    async def swallows() -> None:
        with suppress(BaseException):
            await anyio.sleep(0)
            await anyio.sleep(0.001)

    with pytest.raises(CancellationFaults) as caught:
        cancel_everywhere(swallows, backends=[backend], ways=["scope"])
    last = caught.value.faults[-1]
    assert last.point == last.points
    assert str(last).startswith(f"{backend}, scope, point {last.point} of {last.points} (test_cancelling.py:")
    assert "in swallows): the cancellation was swallowed" in str(last)


def test_a_socket_that_only_the_garbage_collector_closes_is_a_fault(backend: str):
    async def drops_a_socket() -> None:
        one = socket.socket()
        await anyio.sleep(0)
        one.close()

    found = faults(drops_a_socket, backends=[backend], ways=["scope"])
    assert found
    assert all("unclosed <socket.socket" in problem for problem in found)


def test_a_coroutine_that_nobody_awaits_is_a_fault(backend: str):
    async def forgets() -> None:
        coroutine = rest()
        await anyio.sleep(0)
        await coroutine

    async def rest() -> None:
        pass

    found = faults(forgets, backends=[backend], ways=["scope"])
    assert set(found) == {"coroutine 'test_a_coroutine_that_nobody_awaits_is_a_fault.<locals>.rest' was never awaited"}


def test_what_the_loop_complains_of_is_a_fault():
    async def fails_elsewhere() -> None:
        try:
            await anyio.sleep(0)
        except BaseException:
            asyncio.get_running_loop().call_soon(lambda: 1 / 0)
            raise

    found = faults(fails_elsewhere, backends=["asyncio"], ways=["native"])
    assert "division by zero" in found[0]


def test_a_place_in_a_limit_that_is_kept_is_a_fault(backend: str):
    gate = Gate(3, "its turn")

    async def keeps_a_place() -> None:
        gate.take()
        await anyio.sleep(0)
        gate.release()

    found = faults(keeps_a_place, backends=[backend], ways=["scope"], within=0.1)
    assert found[0] == "left: a limit has 1 more places taken and 0 more tasks waiting"


def test_a_run_that_keeps_a_reservation_is_a_fault(backend: str):
    agent = BaseAgent("Keeper", "You keep.", client=ScriptedModel(lambda _: answers.calls(answers.call("keep"))))

    @agent.add_tool
    async def keep() -> None:
        run = current_run.get()
        assert run is not None
        kept = run.budget.reserve("tokens", 5)
        await anyio.sleep(0.001)
        with kept:
            pass

    found = faults(lambda: agent.run("go", max_iterations=1), backends=[backend], ways=["scope"])
    assert found[0] == "the ledger of Keeper holds 20 tokens where 15 were used: a reservation was not given back"


def test_a_task_that_would_have_ended_a_turn_of_the_loop_later_is_left_all_the_same():
    async def leaves_a_task() -> None:
        task = asyncio.ensure_future(asyncio.sleep(0))
        await asyncio.sleep(0)
        await task

    found = faults(leaves_a_task, backends=["asyncio"], ways=["native twice"])
    assert found[0].startswith("tasks left: ")


def test_a_run_that_stays_the_current_one_is_a_fault(backend: str):
    async def stays() -> None:
        await anyio.sleep(0)
        current_run.set(None)

    async def enters() -> None:
        run = verbs.begin(BaseAgent("A", "a"), "go")
        current_run.set(run)
        await stays()

    found = faults(enters, backends=[backend], ways=["scope"])
    assert set(found) == {"a run that has ended is still the current one"}


def test_what_its_user_has_frozen_stays_frozen_and_nothing_else():
    code = (
        "import anyio, gc, sys; from fractal.testing import cancel_everywhere\n"
        "begun = gc.get_freeze_count(); cancel_everywhere(lambda: anyio.sleep(0), backends=['trio'])\n"
        "print(gc.get_freeze_count() <= begun); gc.freeze()\n"
        "frozen = gc.get_freeze_count(); cancel_everywhere(lambda: anyio.sleep(0), backends=['trio'])\n"
        "print(gc.get_freeze_count() >= frozen)"
    )
    said = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert said.split() == ["True", "True"]
