"""Tasks of our own: calls that are made at their first step, and work that other threads and event loops wait for."""

from __future__ import annotations

import logging
import time
import types
from collections.abc import Callable, Generator
from typing import Any

import anyio
import pytest
from anyio.lowlevel import current_token

from fractal import RunCancelled
from fractal._concurrency.background import Background, Joinable, Unstarted, spawn_later
from tests.support import in_thread


@types.coroutine
def _paused() -> Generator[str, str, str]:
    return (yield "waits")


async def _echo(log: list[str], word: str) -> str:
    try:
        return f"{word} {await _paused()}"
    finally:
        log.append("ended")


def test_a_call_that_is_stepped_is_the_coroutine_that_it_makes():
    log = list[str]()
    call = Unstarted(_echo, log, "hello")
    assert call.send(None) == "waits"
    with pytest.raises(StopIteration) as ended:
        call.send("world")
    assert (ended.value.value, log) == ("hello world", ["ended"])


def test_an_exception_is_raised_where_the_call_is_or_before_its_first_step():
    log = list[str]()
    call = Unstarted(_echo, log, "hello")
    call.send(None)
    with pytest.raises(LookupError):
        call.throw(LookupError())
    with pytest.raises(LookupError):
        Unstarted(_echo, log, "hello").throw(LookupError())
    assert log == ["ended"]


def test_a_call_can_be_ended_begun_or_not():
    log = list[str]()
    begun, other = Unstarted(_echo, log, "hello"), Unstarted(_echo, log, "hello")
    begun.send(None)
    begun.close()
    other.close()
    assert log == ["ended"]


class Work(Joinable):
    """Work that goes on until it is told that it has ended."""

    cancelled = 0

    def cancel(self) -> None:
        self.in_its_loop(self._cancel)

    def _cancel(self) -> None:
        self.cancelled += 1
        self.end()


async def _work() -> Work:
    return Work(current_token())


async def test_work_is_cancelled_in_its_own_event_loop_from_any_thread():
    work = await _work()
    await in_thread(work.cancel)
    with anyio.fail_after(10):
        await work.join()
    assert (work.cancelled, work.has_ended) == (1, True)


@pytest.mark.parametrize("has_ended", [True, False])
async def test_another_event_loop_waits_for_work_too(has_ended: bool, backend: str):
    work = await _work()
    if has_ended:
        work.end()
    async with anyio.create_task_group() as group:

        async def wait_elsewhere() -> None:
            await anyio.to_thread.run_sync(lambda: anyio.run(work.join, backend=backend))

        group.start_soon(wait_elsewhere)
        await anyio.wait_all_tasks_blocked()
        work.end()


def test_nobody_waits_for_work_whose_event_loop_has_ended(backend: str):
    work = anyio.run(_work, backend=backend)
    work.cancel()  # in a thread without an event loop

    async def wait() -> None:
        with anyio.fail_after(10):
            await work.join()

    anyio.run(wait, backend=backend)
    assert work.cancelled == 0


async def test_a_task_that_somebody_else_has_cancelled_has_no_result():
    task = Background(anyio.sleep_forever, "sleeper")
    task.cancel()
    with pytest.raises(RunCancelled):
        await task.result()


async def test_what_a_later_task_raises_is_logged():
    logged, records = anyio.Event(), list[logging.LogRecord]()

    class Handler(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            records.append(record)
            logged.set()

    async def fail() -> None:
        raise LookupError("no luck")

    handler, logger = Handler(), logging.getLogger("fractal")
    logger.addHandler(handler)
    try:
        spawn_later(current_token(), fail, "a later task")
        with anyio.fail_after(10):
            await logged.wait()
    finally:
        logger.removeHandler(handler)
    assert records[0].getMessage().startswith("a later task: failed")


def test_nothing_is_begun_later_in_an_event_loop_that_has_ended(backend: str):
    async def token() -> Any:
        return current_token()

    function: Callable[..., Any] = _echo
    spawn_later(anyio.run(token, backend=backend), function, "a later task")


async def test_ctrl_c_inside_goes_before_a_cancellation_from_outside():
    async def interrupted() -> None:
        try:
            await anyio.sleep_forever()
        except anyio.get_cancelled_exc_class():
            raise KeyboardInterrupt from None

    task = Background(interrupted, "interrupted")
    await anyio.wait_all_tasks_blocked()
    with pytest.raises(KeyboardInterrupt), anyio.CancelScope() as scope:
        scope.cancel()
        await task.result()


async def test_a_caller_whose_deadline_has_passed_is_cancelled_and_not_told_of_a_cancelled_task():
    task = Background(anyio.sleep_forever, "sleeper")
    with anyio.CancelScope(deadline=anyio.current_time() + 0.01) as scope:
        time.sleep(0.03)  # noqa: ASYNC251 - the event loop gets no turn to notice
        await task._stop_if_late()
    assert scope.cancelled_caught
    await task.cancel_and_join()
