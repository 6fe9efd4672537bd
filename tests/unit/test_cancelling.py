"""The harness that cancels everywhere: what it visits, and what it does not let pass."""

from __future__ import annotations

import asyncio
import socket
import threading
from collections.abc import Awaitable, Callable
from contextlib import suppress
from typing import Any

import anyio
import pytest
import trio

from fractal import InvalidArguments
from fractal.testing import CancellationFaults, CancelReport, cancel_everywhere

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

    def let_go() -> None:
        free.set()

    timer = threading.Timer(0.6, let_go)
    timer.start()
    free.clear()

    async def hangs_when_cancelled() -> None:
        try:
            await anyio.sleep(0)
        except BaseException:
            await hangs()
            raise

    [found] = faults(hangs_when_cancelled, backends=[backend], ways=["scope"], within=0.2)
    timer.join()
    assert found.startswith("it has not come back after 0.2 s: test_cancelling.py")
    for thread in threading.enumerate():
        if thread.name == "cancel_everywhere":
            thread.join(5)


def test_a_check_that_fails_is_a_fault_and_no_more_than_ten_are_looked_for():
    async def steps() -> None:
        for _ in range(30):
            await anyio.sleep(0)

    def check() -> None:
        raise AssertionError("not as it should be")

    found = faults(steps, check=check, backends=["trio"], ways=["scope"])
    assert len(found) == 10
    assert set(found) == {"check() failed: not as it should be"}
