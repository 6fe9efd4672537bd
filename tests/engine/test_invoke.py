"""How one tool call comes to its outcome, at the edges."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator

import pytest

from fractal import BaseAgent, ToolIgnoredCancellation
from fractal._engine.invoke import _left_behind
from fractal.testing import ScriptedModel, answers


async def test_a_tool_that_cancels_its_own_task_and_returns_has_returned(anyio_backend_name: str):
    if anyio_backend_name != "asyncio":
        pytest.skip("asyncio's own")

    async def odd() -> str:
        task = asyncio.current_task()
        assert task is not None
        task.cancel()
        return "returned"

    agent = BaseAgent("A", "a", client=ScriptedModel([answers.call("odd"), "done"])).add_tool(odd)
    result = await agent.run("go")
    assert (result.content, [call.outcome for call in result.tool_results]) == ("done", ["ok"])


async def test_an_async_generator_is_read_in_the_event_loop():
    async def count() -> AsyncIterator[int]:
        for number in range(3):
            yield number

    agent = BaseAgent("A", "a", client=ScriptedModel([answers.call("count"), "done"])).add_tool(count)
    [call] = (await agent.run("go")).tool_results
    assert call.content == [0, 1, 2]


def test_a_keyboard_interrupt_goes_before_a_tool_that_was_left_behind():
    left = ToolIgnoredCancellation("pay", None, 5.0)
    assert _left_behind(BaseExceptionGroup("both", [left, ValueError()])) is left
    assert _left_behind(BaseExceptionGroup("both", [left, KeyboardInterrupt()])) is None
    assert _left_behind(ValueError()) is None
