"""Leaving a stream ends its run: before the next line its tools are cancelled and its connection is closed."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Any

import anyio
import pytest

from fractal import BaseAgent, RunStream
from fractal.events import TextDelta, ToolStarted
from fractal.testing import Endpoint, answers
from tests.support import calls_then, in_thread

StartEndpoint = Callable[..., Endpoint]
IsTime = Callable[[Any], Awaitable[bool]]


class _LeftError(Exception):
    pass


async def by_break(stream: RunStream[Any], is_time: IsTime) -> None:
    async with stream:
        async for event in stream:
            if await is_time(event):
                break


async def by_an_exception(stream: RunStream[Any], is_time: IsTime) -> None:
    with pytest.raises(_LeftError):
        async with stream:
            async for event in stream:
                if await is_time(event):
                    raise _LeftError


async def by_a_cancelled_scope(stream: RunStream[Any], is_time: IsTime) -> None:
    with anyio.CancelScope() as scope:
        async with stream:
            async for event in stream:
                if await is_time(event):
                    scope.cancel()
    assert scope.cancelled_caught


WAYS = pytest.mark.parametrize("leave", [by_break, by_an_exception, by_a_cancelled_scope])
Leave = Callable[[RunStream[Any], IsTime], Awaitable[None]]


@WAYS
async def test_tools_are_cancelled_before_the_next_line_runs(leave: Leave, endpoint: StartEndpoint) -> None:
    one = endpoint(calls_then("done", answers.call("dig"), answers.call("dig")))
    begun, digging = anyio.Event(), {"begun": 0, "ended": 0}

    async def dig() -> None:
        """Dig for long."""
        digging["begun"] += 1
        begun.set()
        try:
            await anyio.sleep_forever()
        finally:
            digging["ended"] += 1

    async def one_digs(event: Any) -> bool:
        if isinstance(event, ToolStarted):
            await begun.wait()
        return begun.is_set()

    stream = BaseAgent("Digger", "You dig.").add_tool(dig).stream("go")
    with anyio.fail_after(20):
        await leave(stream, one_digs)
        assert digging["begun"] == digging["ended"]
        result = await stream.result()
    assert (result.stop_reason, len(one.requests)) == ("cancelled", 1)
    assert {call.outcome for call in result.tool_results} <= {"cancelled", "skipped"}


@WAYS
async def test_the_connection_is_closed_before_the_reply_is_whole(leave: Leave, endpoint: StartEndpoint) -> None:
    one = endpoint(answers.text("word " * 200, chunk_delay=0.05))
    stream = BaseAgent("Talker", "You talk.").stream("go")

    async def one_talks(event: Any) -> bool:
        return isinstance(event, TextDelta)

    with anyio.fail_after(20):
        await leave(stream, one_talks)
        await in_thread(one.wait_for_disconnects, 1)
    assert (await stream.result()).stop_reason == "cancelled"


async def test_no_text_comes_twice(endpoint: StartEndpoint) -> None:
    one = endpoint([answers.failure(503), answers.text("one two three"), answers.cut("one two three four")])
    agent = BaseAgent("Talker", "You talk.")
    async with agent.stream("go") as stream:  # before the first piece a request is sent again
        assert "".join([text async for text in stream.text()]) == "one two three"
    async with agent.stream("go") as stream:  # after the first piece it is not
        shown = "".join([text async for text in stream.text()])
    result = await stream.result()
    assert "one two three four".startswith(shown)
    assert (result.stop_reason, len(one.requests)) == ("model_error", 3)
