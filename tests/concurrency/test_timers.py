"""Timers: a function is called later, in the context of whoever asked for that, unless it is stopped."""

from __future__ import annotations

from contextvars import ContextVar

import anyio
from anyio.lowlevel import current_token

from fractal._concurrency.timers import after

_here: ContextVar[str] = ContextVar("here")


async def test_a_function_is_called_later_in_the_context_of_its_caller() -> None:
    called, context = anyio.Event(), list[str]()

    def call() -> None:
        context.append(_here.get())
        called.set()

    _here.set("caller")
    after(0.001, call, current_token())
    _here.set("later")
    with anyio.fail_after(5):
        await called.wait()
    assert context == ["caller"]


async def test_a_function_that_is_stopped_is_not_called_where_event_loops_have_timers() -> None:
    token, calls = current_token(), list[int]()
    after(0.0, lambda: calls.append(1), token)()
    await anyio.sleep(0.001)
    has_timers = hasattr(token.native_token, "call_later")
    assert calls == ([] if has_timers else [1])
