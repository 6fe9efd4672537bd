"""A run costs less than the loop by hand: calls of functions are counted, which no busy machine changes."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from typing import Any

import pytest
from openai import AsyncOpenAI

from fractal import BaseAgent
from fractal.testing import Endpoint, answers
from tests.support import calls_then

StartEndpoint = Callable[..., Endpoint]
CALLS = [answers.call("look", {"place": str(number)}) for number in range(3)]
PROMPT = "You look out of the window."


async def look(place: str) -> str:
    """Look out of the window.

    Args:
        place: Which window.
    """
    return f"rain in {place}"


async def by_hand(client: AsyncOpenAI, tools: list[Any]) -> str:
    """The loop that one would write without a framework, with no limits, deadlines, checks or events."""
    messages: list[Any] = [{"role": "system", "content": PROMPT}, {"role": "user", "content": "go"}]
    while True:
        reply = await client.chat.completions.create(model="gpt-4o", messages=messages, tools=tools)
        message = reply.choices[0].message
        messages.append(message.model_dump(exclude_none=True))
        if not message.tool_calls:
            return message.content or ""
        for call in message.tool_calls:
            found = await look(**json.loads(call.function.arguments))  # type: ignore[union-attr]
            messages.append({"role": "tool", "tool_call_id": call.id, "content": found})


async def calls_of(run: Callable[[], Any]) -> int:
    """The calls of one run in this thread, when all that is made once has been made."""
    for _ in range(2):
        await run()
    calls, before = 0, sys.getprofile()

    def count(frame: Any, event: str, argument: object) -> None:
        nonlocal calls
        calls += event in ("call", "c_call")

    sys.setprofile(count)
    try:
        await run()
    finally:
        sys.setprofile(before)
    return calls


@pytest.mark.untraced
async def test_a_run_with_three_tools_makes_a_fraction_of_the_calls_of_the_loop_by_hand(
    endpoint: StartEndpoint, anyio_backend_name: str
) -> None:
    one = endpoint(calls_then("done", *CALLS))
    agent = BaseAgent("Looker", PROMPT).add_tool(look)
    async with agent, AsyncOpenAI(base_url=one.url, api_key="sk-test", max_retries=0) as client:
        ours = await calls_of(lambda: agent.run("go"))
        theirs = await calls_of(lambda: by_hand(client, agent.get_tool_schemas()))
    # Though a run has limits, deadlines, checked arguments and events, and its tools run side by side.
    assert ours < theirs / 2
