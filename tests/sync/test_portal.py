"""The portal at its edges: before it has begun, while it closes, after it has ended."""

from __future__ import annotations

import asyncio
import contextvars
import logging
import sys
import threading
import types
from collections.abc import AsyncGenerator, Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any
from weakref import WeakSet

import anyio
import anyio.lowlevel
import pytest

from fractal import FractalError, PortalClosed, RunCancelled, SyncInAsyncError, sync
from fractal._concurrency.crossing import Latch
from fractal.sync import _event_loop, _portal
from fractal.sync._event_loop import EventLoop
from fractal.sync._portal import Caller, Portal, PortalCall
from tests.support import LOOPS, portal_threads, until


@pytest.fixture
def portal(loop: str) -> Iterator[Portal]:
    one = Portal(**LOOPS[loop])
    yield one
    one.close()


async def seven() -> int:
    return 7


async def never() -> None:
    pytest.fail("it runs")


def thread_of(portal: Portal) -> threading.Thread:
    return portal.running()._thread


@contextmanager
def held(loop: EventLoop) -> Iterator[None]:
    """Have an event loop come to nothing else until the block ends."""
    is_held, release = threading.Event(), threading.Event()

    def hold() -> None:
        is_held.set()
        release.wait(10)

    loop._soon(hold)
    is_held.wait(10)
    try:
        yield
    finally:
        release.set()


# ---- beginning and end


def test_a_loop_that_is_to_end_before_it_is_there_ends(loop: str):
    options: dict[str, Any] = {"backend": "asyncio", "use_uvloop": False, **LOOPS[loop]}
    one = EventLoop(**options)
    one.ask_to_end()
    with suppress(FractalError):
        one.start()
    until(lambda: one.is_over)


def test_a_portal_that_has_not_begun_closes_at_once_and_a_call_of_it_can_be_cancelled(portal: Portal):
    call = PortalCall(never, portal)
    portal.close()
    assert not portal.is_running
    assert not portal.is_this_thread()
    call.cancel_from_thread()
    with pytest.raises(RunCancelled):
        call.result()


def test_a_portal_that_was_closed_starts_anew(portal: Portal):
    first = thread_of(portal)
    portal.close()
    portal.close()
    assert not first.is_alive()
    assert PortalCall(seven, portal).result_or_cancel() == 7


def test_a_portal_that_was_left_starts_no_more(portal: Portal):
    portal.start()
    portal.leave()
    with pytest.raises(PortalClosed, match=r"the block of this \w+ portal has been left") as caught:
        portal.start()
    assert caught.value.backend == portal.backend
    with pytest.raises(PortalClosed):
        PortalCall(never, portal).result_or_cancel()


def test_a_portal_that_nobody_has_any_more_ends(loop: str):
    thread = thread_of(Portal(**LOOPS[loop]))
    thread.join(10)
    assert not thread.is_alive()


def test_a_portal_does_not_start_while_the_program_ends(portal: Portal, monkeypatch: pytest.MonkeyPatch):
    with monkeypatch.context() as ending, pytest.raises(FractalError, match="the program is ending"):
        ending.setattr(sys, "is_finalizing", lambda: True)
        portal.start()


def test_all_portals_are_closed_when_the_program_ends(portal: Portal, monkeypatch: pytest.MonkeyPatch):
    thread = thread_of(portal)
    monkeypatch.setattr(_event_loop, "_loops", WeakSet([portal.running()]))
    _event_loop._end_all()
    assert not thread.is_alive()


@pytest.mark.parametrize("error", [RuntimeError("can't start new thread"), MemoryError()])
def test_without_a_thread_each_call_says_so_and_a_later_one_works(
    error: Exception, portal: Portal, monkeypatch: pytest.MonkeyPatch
):
    def refuse(_: object) -> None:
        raise error

    with monkeypatch.context() as patched:
        patched.setattr(threading.Thread, "start", refuse)
        for _ in range(2):
            with pytest.raises(FractalError, match=f"no {portal.backend} event loop") as caught:
                PortalCall(never, portal).result_or_cancel()
            assert caught.value.__cause__ is error
        portal.close()
    assert PortalCall(seven, portal).result_or_cancel() == 7


def test_ctrl_c_that_leaves_a_lock_of_the_thread_in_disorder_is_still_ctrl_c(monkeypatch: pytest.MonkeyPatch):
    def interrupted(_: object) -> None:  # what `threading.Thread.start` may come to
        try:
            raise KeyboardInterrupt
        finally:
            raise RuntimeError("release unlocked lock")

    monkeypatch.setattr(threading.Thread, "start", interrupted)
    with pytest.raises(KeyboardInterrupt):
        Portal().start()


ALARM = TimeoutError("alarm")


@pytest.mark.parametrize(("error", "when"), [(ALARM, "before"), (ALARM, "after"), (RuntimeError("r"), "after")])
def test_what_a_signal_handler_raises_while_the_loop_starts_is_raised_as_it_is(
    error: Exception, when: str, portal: Portal, monkeypatch: pytest.MonkeyPatch
):
    start = threading.Thread.start

    def interrupted(thread: threading.Thread) -> None:
        if when == "after":
            start(thread)
        raise error

    with monkeypatch.context() as patched:
        patched.setattr(threading.Thread, "start", interrupted)
        with pytest.raises(type(error)) as caught:
            PortalCall(never, portal).result_or_cancel()
    assert caught.value is error
    assert PortalCall(seven, portal).result_or_cancel() == 7


def ends_with(error: BaseException) -> Callable[..., None]:
    """`anyio.run`, with an event loop that fails when it has ended."""
    run = anyio.run

    def failing(*arguments: Any, **options: Any) -> None:
        run(*arguments, **options)
        raise error

    return failing


def test_what_an_event_loop_fails_with_after_all_was_closed_is_only_logged(
    portal: Portal, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
):
    monkeypatch.setattr(anyio, "run", ends_with(RuntimeError("no thread any more")))
    with caplog.at_level(logging.DEBUG, "fractal"):
        portal.start()
        portal.close()
    assert "did not close cleanly" in caplog.text
    assert "no thread any more" in caplog.text


def test_threads_that_call_at_once_start_one_event_loop(portal: Portal):
    before, together, threads = len(portal_threads()), threading.Barrier(8), list[threading.Thread]()

    def call() -> None:
        together.wait()
        assert PortalCall(seven, portal).result_or_cancel() == 7

    for _ in range(8):
        threads.append(threading.Thread(target=call))
        threads[-1].start()
    for thread in threads:
        thread.join()
    assert len(portal_threads()) == before + 1


@pytest.mark.parametrize("is_stuck", [False, True])
def test_who_stops_waiting_for_the_end_hears_what_goes_on(
    is_stuck: bool, portal: Portal, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
):
    def interrupted(_: object, until: float) -> None:
        if not is_stuck:
            release.set()
        raise KeyboardInterrupt

    release = threading.Event()
    loop = portal.running()
    loop._soon(release.wait, 10)  # else it may have ended before anybody waits for that
    if not is_stuck:
        monkeypatch.setattr(_event_loop, "MOMENT", 10.0)
    with monkeypatch.context() as patched:
        patched.setattr(EventLoop, "_wait_for_end", interrupted)
        with pytest.raises(KeyboardInterrupt):
            loop.end()
    assert ("nobody waits for it any more" in caplog.text) == is_stuck
    release.set()
    until(lambda: loop.is_over)


def test_what_has_ended_while_it_was_looked_at_is_not_said_to_go_on(portal: Portal, caplog: pytest.LogCaptureFixture):
    loop = portal.running()
    portal.close()
    loop._tell_what_goes_on("it is left to itself")
    assert caplog.text == ""


def test_an_interrupt_while_an_event_loop_closes_does_not_keep_it_open(loop: str, portal: Portal):
    if loop == "trio":
        pytest.skip("trio's loop has no such moment")
    kept: list[Any] = []

    async def interrupting() -> AsyncGenerator[None]:
        try:
            yield
        finally:
            raise KeyboardInterrupt

    async def leave_open() -> None:
        kept.append(interrupting())
        await anext(kept[0])

    PortalCall(leave_open, portal).result_or_cancel()
    portal.close()
    assert not portal.is_running
    assert PortalCall(seven, portal).result_or_cancel() == 7


def starting(monkeypatch: pytest.MonkeyPatch, meanwhile: Callable[[], object]) -> None:
    """Have something happen when the next event loop has started, and its portal does not know yet."""
    start, times = EventLoop.start, iter([meanwhile])

    def start_and_more(self: EventLoop) -> None:
        start(self)
        for happen in times:
            happen()

    monkeypatch.setattr(EventLoop, "start", start_and_more)


def test_of_two_event_loops_that_a_signal_handler_has_started_one_is_used(
    portal: Portal, monkeypatch: pytest.MonkeyPatch
):
    before = len(portal_threads())
    starting(monkeypatch, lambda: first.append(portal.running()))
    first: list[EventLoop] = []
    assert portal.running() is first[0]
    assert PortalCall(seven, portal).result_or_cancel() == 7
    until(lambda: len(portal_threads()) == before + 1)


def test_a_portal_that_is_left_while_it_starts_ends(portal: Portal, monkeypatch: pytest.MonkeyPatch):
    before = len(portal_threads())
    starting(monkeypatch, lambda: portal.leave(wait=False))
    with pytest.raises(PortalClosed):
        portal.start()
    until(lambda: len(portal_threads()) == before)


def test_a_block_of_which_nobody_knows_any_more_ends_its_portal(portal: Portal):
    block = _portal._Block(portal)
    thread = thread_of(portal)
    block.choice.make()
    assert _portal.here() is portal
    del block
    thread.join(10)
    assert not thread.is_alive()
    assert _portal.here() is _portal.shared_portal()


# ---- calls


def test_a_call_that_is_cancelled_before_its_event_loop_has_heard_of_it_never_runs(portal: Portal):
    loop = portal.running()
    with held(loop):
        call = PortalCall(never, portal).start()
        call.drop()
    with pytest.raises(RunCancelled):
        call.result()
    assert PortalCall(seven, portal).result_or_cancel() == 7
    until(lambda: not loop._calls)


def test_a_call_that_is_cancelled_in_the_moment_before_it_is_begun_never_runs(portal: Portal):
    call = PortalCall(never, portal)
    call._loop = portal.running()
    call.cancel_from_thread()
    with pytest.raises(RunCancelled):
        call.result()


def test_a_call_for_which_there_is_no_next_event_loop_is_told_why(portal: Portal):
    portal.leave()
    call = PortalCall(never, portal)
    call.start_anew()
    with pytest.raises(PortalClosed):
        call.result()
    call.drop()
    with pytest.raises(PortalClosed):
        call.result()


def test_what_ends_by_a_cancellation_while_its_event_loop_goes_on_is_told_so(portal: Portal):
    async def cancelled() -> None:
        raise RunCancelled("as somebody wanted")

    with pytest.raises(RunCancelled, match="as somebody wanted"):
        Caller(None, portal.running()).end(cancelled)


def test_a_call_that_comes_while_the_portal_closes_is_told_and_not_lost(portal: Portal):
    loop = portal.running()
    with held(loop):
        loop.ask_to_end()
        call = PortalCall(never, AlwaysHere(loop)).start()
    with pytest.raises(RunCancelled, match="has ended"):
        call.result()


class AlwaysHere:
    """Whoever asked in the last moment in which the answer was yes."""

    def __init__(self, loop: EventLoop) -> None:
        self._loop = loop

    def running(self) -> EventLoop:
        return self._loop


def test_a_call_on_an_event_loop_that_has_ended_is_told(portal: Portal):
    loop = portal.running()
    portal.close()
    with pytest.raises(RunCancelled, match="has ended"):
        PortalCall(never, loop).result_or_cancel()
    with pytest.raises(RunCancelled, match="has ended"):
        PortalCall(never, AlwaysHere(loop)).start().result()


def test_a_call_that_is_cancelled_before_it_is_started_never_runs(portal: Portal):
    portal.start()
    call = PortalCall(never, portal)
    call.cancel_from_thread()
    with pytest.raises(RunCancelled):
        call.start().result()
    assert PortalCall(seven, portal).result_or_cancel() == 7


def test_a_call_that_has_ended_is_remembered_by_no_event_loop(portal: Portal):
    loop = portal.running()
    for _ in range(3):
        PortalCall(seven, portal).result_or_cancel()
        call = PortalCall(anyio.sleep_forever, portal).start()
        call.cancel_from_thread()
        call.wait()
        call.cancel_from_thread()
    until(lambda: not loop._calls)


def test_a_call_that_is_waited_for_in_its_own_event_loop_is_an_error(portal: Portal):
    async def wait_for_others() -> None:
        call = PortalCall(seven, portal).start()
        with pytest.raises(SyncInAsyncError):
            call.wait()
        assert call.wait(0) is False
        while not call.has_ended:  # noqa: ASYNC110  # nobody tells the event loop
            await anyio.sleep(0.001)
        assert call.result() == 7

    PortalCall(wait_for_others, portal).result_or_cancel()


# ---- what ends an event loop, and what does not


async def raised(error: BaseException) -> None:
    async def child() -> None:
        raise error

    async with anyio.create_task_group() as group:
        group.start_soon(child)


@pytest.mark.parametrize("error", [KeyboardInterrupt(), SystemExit(3)], ids=repr)
def test_what_a_task_raises_is_told_to_its_caller_and_to_nobody_else(error: BaseException, portal: Portal):
    thread, ended = thread_of(portal), threading.Event()

    async def go_on() -> str:
        while not ended.is_set():  # noqa: ASYNC110  # an event of threads
            await anyio.sleep(0.002)
        return "went on"

    other = PortalCall(go_on, portal).start()
    with pytest.raises((BaseExceptionGroup, KeyboardInterrupt, SystemExit)) as caught:
        PortalCall(lambda: raised(error), portal).result_or_cancel()
    assert error in getattr(caught.value, "exceptions", (caught.value,))
    assert PortalCall(seven, portal).result_or_cancel() == 7
    ended.set()
    assert other.result() == "went on"
    assert thread_of(portal) is thread


@pytest.mark.parametrize("how", ["stop", "callback", "task", "all tasks"])
def test_what_ends_an_asyncio_loop_elsewhere_does_not_end_the_portal(how: str, loop: str, portal: Portal):
    if loop == "trio":
        pytest.skip("asyncio's own")

    async def end() -> None:
        running = asyncio.get_running_loop()
        if how == "stop":
            running.stop()
        elif how == "callback":
            running.call_soon(sys.exit)
        else:
            for task in {asyncio.current_task()} if how == "task" else asyncio.all_tasks():
                assert task is not None
                task.cancel()
        await anyio.sleep(0.01)

    call = PortalCall(end, portal).start()
    if how in ("task", "all tasks"):
        with pytest.raises(RunCancelled):
            call.result()
    else:
        call.result()
    assert PortalCall(seven, portal).result_or_cancel() == 7


def test_a_call_of_which_nothing_has_happened_when_its_event_loop_ends_is_made_on_the_next(portal: Portal):
    first = portal.running()
    group, asked = first._group, threading.Event()

    def end() -> None:
        first._group = None  # as at the end of `_hold`
        asked.set()

    first._soon(end)
    asked.wait(10)
    call = PortalCall(seven, portal)
    first.begin(call)  # by who has just seen that it takes calls
    assert call.result() == 7
    assert portal.running() is not first
    first._group = group
    first.end()


def kill() -> None:
    """End the loop as a library might that has lost its way."""
    import trio

    async def fail() -> None:
        raise ValueError("a system task that fails ends trio's loop")

    trio.lowlevel.spawn_system_task(fail)


def test_an_event_loop_that_is_killed_says_so_and_the_next_call_has_another(
    loop: str, portal: Portal, caplog: pytest.LogCaptureFixture
):
    if loop != "trio":
        pytest.skip("asyncio's do not end by what tasks do")
    first = portal.running()
    under_way = PortalCall(anyio.sleep_forever, portal).start()
    first._soon(kill)
    with pytest.raises(RunCancelled):
        under_way.result()
    until(lambda: first.is_over)
    assert PortalCall(seven, portal).result_or_cancel() == 7
    assert "event loop of a portal has ended: TrioInternalError" in caplog.text


# ---- contexts


def held_portal(**options: Any) -> Iterator[Portal]:
    with sync.portal(**options) as one:
        yield one


def test_a_block_that_is_left_in_another_context_is_left(loop: str):
    block = held_portal(**LOOPS[loop])
    portal = contextvars.copy_context().run(next, block)
    thread = thread_of(portal)
    contextvars.copy_context().run(next, block, None)
    assert not thread.is_alive()
    assert _portal.here() is _portal.shared_portal()


def test_a_context_that_has_entered_a_block_that_was_left_elsewhere_chooses_again_what_it_chose_before(loop: str):
    with sync.portal(**LOOPS[loop]) as outer:
        block = held_portal()
        inner = next(block)
        assert _portal.here() is inner
        contextvars.copy_context().run(next, block, None)
        assert _portal.here() is outer
    assert _portal.here() is _portal.shared_portal()


def test_a_context_that_was_copied_after_a_block_was_left_elsewhere_is_not_refused(loop: str):
    block = held_portal(**LOOPS[loop])
    next(block)
    contextvars.copy_context().run(next, block, None)
    assert contextvars.copy_context().run(_portal.here) is _portal.shared_portal()
    assert _portal.here() is _portal.shared_portal()


def test_a_context_that_was_copied_in_a_block_is_refused_when_the_block_has_been_left(loop: str):
    with sync.portal(**LOOPS[loop]) as portal:
        thread, copy = thread_of(portal), contextvars.copy_context()
    with pytest.raises(PortalClosed):
        copy.run(sync.call, never)
    with pytest.raises(PortalClosed):
        copy.run(Caller.here)
    assert not thread.is_alive()
    assert not portal.is_running


def test_a_block_that_is_collected_in_its_own_event_loop_ends_and_hangs_nobody(loop: str):
    def opened() -> Iterator[Portal]:
        with sync.portal(**LOOPS[loop]) as portal:
            yield portal

    block = opened()
    portal = next(block)
    thread = thread_of(portal)

    async def close() -> None:
        block.close()  # type: ignore[attr-defined]

    with suppress(RunCancelled):  # if it has not returned by then
        PortalCall(close, portal).result_or_cancel()
    thread.join(10)
    assert not thread.is_alive()


# ---- the latch


def test_a_latch_lets_all_go_on_and_counts_the_time():
    latch, through = Latch(), list[bool]()
    threads = [threading.Thread(target=lambda: through.append(latch.wait(10))) for _ in range(3)]
    for thread in threads:
        thread.start()
    assert latch.wait(0) is False
    assert latch.wait(0.01) is False
    until(lambda: len(latch._waiters) == 3)
    latch.open()
    latch.open()
    for thread in threads:
        thread.join(10)
    assert through == [True] * 3
    assert latch.wait() is True
    assert latch._waiters == []


def test_a_latch_that_is_opened_while_somebody_comes_lets_them_go_on():
    latch = Latch()

    class Late(list[Any]):
        def append(self, waiter: Any) -> None:
            super().append(waiter)
            latch.open()

    latch._waiters = Late()
    assert latch.wait() is True


async def test_a_cell_of_a_notebook_is_not_warned_that_its_loop_is_blocked(monkeypatch: pytest.MonkeyPatch):
    notebook: Any = types.ModuleType("IPython")
    notebook.get_ipython = lambda: None
    monkeypatch.setitem(sys.modules, "IPython", notebook)
    with pytest.warns(sync.LoopBlockedWarning):
        _portal.here()
    notebook.get_ipython = object
    _portal.here()


def test_a_block_that_was_undone_and_is_then_interrupted_ends_its_portal(portal: Portal):
    block = _portal._Block(portal)
    thread = thread_of(portal)
    block.choice.make()
    block._undo()  # Ctrl-C comes before the portal is left
    del block
    thread.join(10)
    assert not thread.is_alive()
