"""Timers: a function is called later, in the context of whoever asked for that, unless it is stopped."""

from __future__ import annotations

from contextvars import ContextVar

import anyio
from anyio.lowlevel import current_token

from fractal._concurrency.timers import Delay

_here: ContextVar[str] = ContextVar("here")


async def test_a_function_is_called_later_in_the_context_of_its_caller() -> None:
    called, context = anyio.Event(), list[str]()

    def call() -> None:
        context.append(_here.get())
        called.set()

    _here.set("caller")
    Delay(0.001).call(call, current_token())
    _here.set("later")
    with anyio.fail_after(5):
        await called.wait()
    assert context == ["caller"]


async def test_a_function_that_is_stopped_is_not_called_where_event_loops_have_timers() -> None:
    token, calls, last = current_token(), list[int](), anyio.Event()
    delay = Delay(0.001)
    delay.call(lambda: calls.append(1), token)()
    delay.call(last.set, token)
    with anyio.fail_after(5):
        await last.wait()
    has_timers = hasattr(token.native_token, "call_later")
    assert calls == ([] if has_timers else [1])


async def test_functions_are_called_in_the_order_in_which_they_were_given_and_none_before_its_time() -> None:
    token, calls, last = current_token(), list[tuple[int, float]](), anyio.Event()
    delay, begun = Delay(0.02), list[float]()
    for number in range(3):
        begun.append(anyio.current_time())
        delay.call(lambda number=number: calls.append((number, anyio.current_time())), token)
        await anyio.sleep(0.005)
    delay.call(last.set, token)
    with anyio.fail_after(5):
        await last.wait()
    assert [number for number, _ in calls] == [0, 1, 2]
    if hasattr(token.native_token, "call_later"):
        assert all(at - begun[number] >= 0.015 for number, at in calls)


def test_each_event_loop_has_a_timer_of_its_own() -> None:
    delay, calls = Delay(0.001), list[int]()

    async def left_behind() -> None:
        delay.call(lambda: calls.append(0), current_token())

    async def waited_for() -> None:
        called = anyio.Event()
        delay.call(called.set, current_token())
        with anyio.fail_after(5):
            await called.wait()

    anyio.run(left_behind)
    anyio.run(waited_for)
    assert calls in ([], [0])
