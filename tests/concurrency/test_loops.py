"""What other threads and event loops have an event loop do."""

from __future__ import annotations

import anyio
from anyio.lowlevel import EventLoopToken, current_token

from fractal._concurrency.loops import call_soon
from tests.support import in_thread


async def test_a_loop_calls_a_function_that_another_thread_gives_it() -> None:
    called = anyio.Event()
    assert await in_thread(call_soon, current_token(), called.set)
    with anyio.fail_after(10):
        await called.wait()


def test_a_loop_that_has_ended_takes_nothing(backend: str) -> None:
    async def token() -> EventLoopToken:
        return current_token()

    called: list[int] = []
    assert not call_soon(anyio.run(token, backend=backend), called.append, 1)
    assert called == []
