"""Feeds, which hand things from tasks to a reader, and tasks that belong to whoever holds them."""

from __future__ import annotations

import asyncio
import contextvars
import gc
import threading
from collections.abc import Awaitable, Callable

import anyio
import anyio.lowlevel
import pytest

from fractal._concurrency.background import Background, end_all
from fractal._concurrency.feed import Feed
from tests.schedules import in_virtual_time

on_asyncio = pytest.mark.parametrize("anyio_backend", [pytest.param(("asyncio", {}), id="asyncio")])


async def settled() -> None:
    """Let everything happen that needs no time."""
    for _ in range(20):
        await anyio.lowlevel.checkpoint()


async def write(feed: Feed[int], *items: int, done: list[int] | None = None) -> None:
    """Hand items over as runs do."""
    for item in items:
        await feed.room()
        feed.put(item)
        await feed.room()
        if done is not None:
            done.append(item)


async def drain(feed: Feed[int]) -> list[int]:
    items: list[int] = []
    with anyio.fail_after(5):
        while True:
            try:
                items.append(await feed.next())
            except StopAsyncIteration:
                return items


# ---- feeds


async def test_items_come_in_order_and_then_the_end() -> None:
    feed: Feed[int] = Feed(0)
    for item in range(5):
        feed.put(item)  # whether there is room or not
    feed.close()
    assert await drain(feed) == [0, 1, 2, 3, 4]
    assert await drain(feed) == []
    assert await feed.take() == []


async def test_all_there_is_can_be_taken_at_once() -> None:
    feed: Feed[int] = Feed(5)
    feed.put(1)
    feed.put(2)
    assert await feed.take() == [1, 2]
    async with anyio.create_task_group() as group:
        group.start_soon(write, feed, 3)
        assert await feed.take() == [3]
    feed.put(4)
    feed.close()
    assert [await feed.take(), await feed.take()] == [[4], []]


@pytest.mark.parametrize("buffer", [0, 1, 5])
@pytest.mark.parametrize("writers", [1, 3])
async def test_writers_are_never_more_than_the_buffer_and_one_item_ahead(buffer: int, writers: int) -> None:
    feed: Feed[int] = Feed(buffer)
    done: list[int] = []
    total = 8 * writers

    async def write_eight() -> None:
        await write(feed, *range(8), done=done)

    async with anyio.create_task_group() as group:
        for _ in range(writers):
            group.start_soon(write_eight)
        for read in range(total):
            await settled()
            assert len(feed._items) == min(buffer + 1, total - read)
            assert feed.is_full == (total - read > buffer)
            assert len(done) <= read + buffer
            await feed.next()
    assert len(done) == total


async def test_a_reader_that_leaves_drops_what_is_there_and_lets_writers_go() -> None:
    feed: Feed[int] = Feed(0)
    done: list[int] = []
    async with anyio.create_task_group() as group:
        group.start_soon(lambda: write(feed, 1, 2, 3, done=done))
        await settled()
        assert done == []
        feed.stop_reading()
        assert await drain(feed) == []
        assert await feed.take() == []
    assert done == [1, 2, 3]
    assert not feed._items


async def test_a_waiting_reader_is_told_of_the_end() -> None:
    for end in (Feed.close, Feed.stop_reading):
        feed: Feed[int] = Feed(0)
        async with anyio.create_task_group() as group:
            group.start_soon(drain, feed)
            group.start_soon(feed.take)
            await settled()
            end(feed)


async def test_what_is_handed_over_after_the_end_is_dropped() -> None:
    feed: Feed[int] = Feed(5)
    feed.put(1)
    feed.close()
    feed.put(2)
    assert await drain(feed) == [1]


@pytest.mark.parametrize("read", [Feed.next, Feed.take])
async def test_a_reader_that_is_cancelled_loses_nothing(read: Callable[[Feed[int]], Awaitable[object]]) -> None:
    feed: Feed[int] = Feed(5)
    async with anyio.create_task_group() as group:
        group.start_soon(read, feed)
        await settled()
        feed.put(1)
        group.cancel_scope.cancel()  # when the item is there and the reader has not run yet
    feed.put(2)
    with anyio.CancelScope() as scope:
        scope.cancel()
        await read(feed)
        raise AssertionError("not reached")
    feed.close()
    assert await drain(feed) in ([1, 2], [2])
    assert scope.cancelled_caught


async def test_two_readers_get_each_item_once() -> None:
    feed: Feed[int] = Feed(0)
    got: list[int] = []

    async def read() -> None:
        got.extend(await drain(feed))

    async with anyio.create_task_group() as group:
        group.start_soon(read)
        group.start_soon(read)
        await write(feed, *range(20))
        feed.close()
    assert sorted(got) == list(range(20))


async def test_a_writer_that_is_let_go_and_cancelled_at_once_takes_no_further_step() -> None:
    feed: Feed[int] = Feed(0)
    done: list[int] = []
    async with anyio.create_task_group() as group:
        group.start_soon(lambda: write(feed, 1, 2, done=done))
        assert await feed.next() == 1
        group.cancel_scope.cancel()
        feed.stop_reading()
    assert done == []


@pytest.mark.parametrize("other", ["asyncio", "trio"])
async def test_writers_in_another_event_loop_wait_for_nobody_and_lose_nothing(other: str) -> None:
    feed: Feed[int] = Feed(0)
    inlet = feed.for_other_loop()
    assert inlet.for_other_loop() is inlet

    async def write_far() -> None:
        for item in range(100):
            assert not inlet.is_full
            await inlet.room()
            inlet.put(item)

    thread = threading.Thread(target=lambda: anyio.run(write_far, backend=other))
    thread.start()
    with anyio.fail_after(5):
        assert [await feed.next() for _ in range(100)] == list(range(100))
    thread.join()


def test_what_comes_from_another_loop_when_the_readers_loop_has_ended_is_nobodys(backend: str) -> None:
    async def make() -> object:
        return Feed[int](0).for_other_loop()

    inlet = anyio.run(make, backend=backend)
    inlet.put(1)  # type: ignore[attr-defined]


# ---- tasks


class Work:
    """Something to do in the background: it waits to be cancelled, and needs a moment to clean up."""

    def __init__(self, raises: BaseException | None = None) -> None:
        self.began = anyio.Event()
        self.order: list[str] = []
        self._raises = raises

    async def __call__(self) -> None:
        try:
            self.began.set()
            await anyio.sleep(10)
        finally:
            self.order.append("cancelled")
            with anyio.CancelScope(shield=True):
                await anyio.sleep(0.05)
            self.order.append("cleaned up")
            if self._raises is not None:
                raise self._raises


async def begun(work: Work) -> Background:
    task = Background(work, "work")
    await work.began.wait()
    return task


async def test_a_task_outlives_the_task_that_started_it_and_is_not_lost_to_the_garbage_collector() -> None:
    release = anyio.Event()
    tasks: list[Background] = []

    async def start() -> None:
        tasks.append(Background(release.wait, "work"))

    async with anyio.create_task_group() as group:
        group.start_soon(start)
    gc.collect()
    await settled()
    assert not tasks[0].has_ended
    release.set()
    with anyio.fail_after(5):
        await tasks[0].wait()
    assert tasks[0].has_ended
    assert tasks[0].is_settled


async def test_a_task_has_the_context_of_its_starter() -> None:
    variable = contextvars.ContextVar("variable", default="unset")
    seen: list[str] = []

    async def look() -> None:
        seen.append(variable.get())
        variable.set("the task's")

    variable.set("mine")
    task = Background(look, "look")
    variable.set("changed later")
    await task.wait()
    assert (seen, variable.get()) == (["mine"], "changed later")


async def test_a_task_has_the_deadline_of_its_starter_and_may_be_given_more_but_not_less() -> None:
    left: list[float] = []

    async def look() -> None:
        left.append(anyio.current_effective_deadline() - anyio.current_time())
        await anyio.sleep(10)

    with anyio.CancelScope(deadline=anyio.current_time() + 0.1):  # noqa: ASYNC100  (they ask for its deadline)
        cut = Background(look, "cut")
        longer = Background(look, "longer")
    longer.allow_until(anyio.current_time() + 5)
    longer.allow_until(anyio.current_time() + 0.01)
    with anyio.fail_after(2):
        await cut.wait()
    assert 0 < min(left) < 0.2
    assert not longer.has_ended
    await longer.cancel_and_join()


async def test_what_a_task_raises_is_told_once_to_whoever_waits_or_closes() -> None:
    async def fail() -> None:
        raise ValueError("mine")

    for first in (Background.wait, Background.cancel_and_join):
        task = Background(fail, "fail")
        await settled()
        assert (task.has_ended, task.is_settled) == (True, False)
        with pytest.raises(ValueError, match="mine"):
            await first(task)
        assert task.is_settled
        await task.wait()
        await task.cancel_and_join()


async def test_closing_waits_for_the_cleanup_and_raises_nothing() -> None:
    work = Work()
    task = await begun(work)
    await task.cancel_and_join()
    assert work.order == ["cancelled", "cleaned up"]
    await task.wait()
    await task.cancel_and_join()


async def test_closing_under_a_cancelled_scope_waits_for_the_cleanup_and_hides_nothing() -> None:
    work = Work()
    with pytest.raises(ZeroDivisionError), anyio.CancelScope() as scope:
        task = await begun(work)
        scope.cancel()
        try:
            raise ZeroDivisionError
        finally:
            await task.cancel_and_join()
    assert work.order == ["cancelled", "cleaned up"]


async def test_what_the_cleanup_raises_comes_out_of_closing() -> None:
    task = await begun(Work(ValueError("in the cleanup")))
    with pytest.raises(ValueError, match="in the cleanup"):
        await task.cancel_and_join()


async def test_a_task_that_is_closed_before_its_first_step_has_ended() -> None:
    work = Work()
    task = Background(work, "work")
    with anyio.fail_after(5):
        await task.cancel_and_join()
    assert task.is_settled


async def test_waiting_may_be_given_up_and_the_task_goes_on() -> None:
    work = Work()
    task = await begun(work)
    with anyio.move_on_after(0.01) as scope:
        await task.wait()
    assert (scope.cancelled_caught, task.has_ended) == (True, False)
    await task.cancel_and_join()


def native(name: str) -> asyncio.Task[object]:
    [task] = [task for task in asyncio.all_tasks() if task.get_name() == name]
    return task


@on_asyncio
async def test_closing_waits_however_often_the_closer_is_cancelled_and_is_then_cancelled() -> None:
    work = Work()
    background = await begun(work)
    closer = asyncio.ensure_future(background.cancel_and_join())
    for _ in range(5):
        await asyncio.sleep(0.005)
        closer.cancel()
    with pytest.raises(asyncio.CancelledError):
        await closer
    assert work.order == ["cancelled", "cleaned up"]


@on_asyncio
async def test_a_task_that_asyncio_cancels_has_ended_whether_it_had_begun_or_not() -> None:
    for steps in (0, 1, 5):
        work = Work()
        background = Background(work, "work")
        for _ in range(steps):
            await asyncio.sleep(0)
        native("work").cancel()
        with anyio.fail_after(5):
            await background.wait()
        assert background.is_settled
        assert work.order == (["cancelled", "cleaned up"] if steps else [])


@in_virtual_time
async def test_several_are_cancelled_before_any_is_waited_for_and_what_they_raise_is_dropped() -> None:
    works = [Work(ValueError()), *(Work() for _ in range(19))]
    tasks = [await begun(work) for work in works]
    started = anyio.current_time()
    await end_all(tasks)
    assert anyio.current_time() - started == pytest.approx(0.05)  # which one cleanup takes
    assert [work.order for work in works] == [["cancelled", "cleaned up"]] * 20
    assert [task.has_ended for task in tasks] == [True] * 20


async def test_several_are_waited_for_under_a_cancelled_scope() -> None:
    works = [Work(), Work()]
    with anyio.CancelScope() as scope:
        tasks = [await begun(work) for work in works]
        scope.cancel()
        await end_all(tasks)
        assert [work.order for work in works] == [["cancelled", "cleaned up"]] * 2


@on_asyncio
async def test_several_are_waited_for_however_often_the_waiter_is_cancelled() -> None:
    works = [Work(), Work(), Work()]
    tasks = [await begun(work) for work in works]
    waiter = asyncio.ensure_future(end_all(tasks))
    for _ in range(3):
        await asyncio.sleep(0.01)
        waiter.cancel()
    with pytest.raises(asyncio.CancelledError):
        await waiter
    assert [work.order for work in works] == [["cancelled", "cleaned up"]] * 3
