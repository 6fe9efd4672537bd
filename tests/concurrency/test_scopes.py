"""What is told of a cancellation, and which of several errors comes out."""

from __future__ import annotations

import anyio
import pytest

from fractal import DeadlineWouldPass, ToolErrors, ToolFailed
from fractal._concurrency.scopes import (
    leaves,
    move_on_after,
    remaining,
    require_time,
    single_error,
    stop_if_cancelled,
    unexpected,
    waiting,
)


async def test_of_a_group_only_real_errors_come_out_and_one_of_them_alone():
    async def fail(error: Exception) -> None:
        raise error

    async def fail_beside_one_that_sleeps(*errors: Exception) -> None:
        with single_error():
            async with anyio.create_task_group() as group:
                group.start_soon(anyio.sleep_forever)
                for error in errors:
                    group.start_soon(fail, error)

    cause = OSError("disk")
    error = ValueError("one")
    error.__cause__ = cause
    with pytest.raises(ValueError, match="one") as one:
        await fail_beside_one_that_sleeps(error)
    assert one.value.__cause__ is cause
    with pytest.raises(ExceptionGroup) as both:
        await fail_beside_one_that_sleeps(ValueError("one"), KeyError("two"))
    assert {type(each) for each in both.value.exceptions} == {ValueError, KeyError}


def test_several_failures_of_a_run_count_as_one_error():
    failures = ToolErrors([ToolFailed("a", "x"), ToolFailed("b", "y")])
    deep = ExceptionGroup("outer", [ExceptionGroup("inner", [ValueError("one"), failures])])
    assert leaves(deep)[1] is failures
    assert str(unexpected(deep)).startswith("ValueError: one; ToolErrors: 2 failures at once:")
    assert unexpected(ExceptionGroup("outer", [failures])).__cause__ is failures


async def test_a_wait_is_refused_if_it_is_longer_than_the_time_left_and_only_then():
    require_time(9e9, "nothing bounds it")
    with move_on_after(1000):
        require_time(0, "it takes no time")
        require_time(10, "it fits")
        with pytest.raises(DeadlineWouldPass, match="the nap would take 1e\\+04 s") as refused:
            require_time(10_000, "the nap")
        assert 0 < refused.value.remaining <= 1000
        assert remaining() <= 1000


async def test_what_was_waited_for_is_noted_only_if_the_wait_was_cut():
    noted: list[str] = []
    with waiting("nothing", noted.append):
        await anyio.lowlevel.checkpoint()
    with pytest.raises(ValueError, match="own"), waiting("an error", noted.append):
        raise ValueError("its own")
    with anyio.CancelScope() as scope, waiting("for ever", noted.append):
        scope.cancel()
        await anyio.sleep_forever()
    assert noted == ["for ever"]


@pytest.mark.parametrize("seconds", [None, float("inf")])
async def test_without_a_limit_there_is_no_deadline(seconds: float | None):
    with move_on_after(seconds) as scope:
        assert await stop_if_cancelled() == float("inf")
    assert not scope.cancelled_caught
