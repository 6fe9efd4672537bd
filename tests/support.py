"""What several test modules need."""

from __future__ import annotations

import importlib.util
import re
import time
from collections.abc import Awaitable, Callable
from typing import Any

import anyio
import pytest

from fractal import AgentResult, Delta, ModelRequest, Reply
from fractal.testing import answers, check_messages
from fractal.testing.answers import AnswerLike, ToolCallAnswer
from fractal.testing.endpoint import RecordedRequest

BACKENDS = [
    pytest.param(("asyncio", {}), id="asyncio"),
    pytest.param(("trio", {}), id="trio"),
]
if importlib.util.find_spec("uvloop"):
    # The same code as on asyncio, as far as it is ours: with the slow tests.
    BACKENDS.append(pytest.param(("asyncio", {"use_uvloop": True}), id="asyncio+uvloop", marks=pytest.mark.slow))


# How `sync.portal` and, with other names, `anyio.run` are told of each event loop that there is.
LOOPS: dict[str, dict[str, Any]] = {"asyncio": {}, "uvloop": {"use_uvloop": True}, "trio": {"backend": "trio"}}
if not importlib.util.find_spec("uvloop"):
    del LOOPS["uvloop"]


def run_on(loop: str, function: Callable[..., Any], *arguments: Any) -> Any:
    """Run an async function on one of `LOOPS`."""
    if loop == "uvloop":
        return anyio.run(function, *arguments, backend_options={"use_uvloop": True})
    return anyio.run(function, *arguments, backend=loop)


class Talkative:
    """A model whose answer does not end."""

    async def respond(self, request: ModelRequest) -> Reply:
        return await self.stream(request, _to_nobody)

    async def stream(self, request: ModelRequest, sink: Callable[[Delta], Awaitable[None]]) -> Reply:
        while True:
            await sink(Delta("text", "word "))
            await anyio.sleep(0.002)


async def _to_nobody(delta: Delta) -> None: ...


def calls_then(answer: AnswerLike, *calls: ToolCallAnswer) -> Callable[[RecordedRequest], AnswerLike]:
    """Answers a user's turn with tool calls, and everything after it with the answer."""

    def reply(request: RecordedRequest) -> AnswerLike:
        return answers.calls(*calls) if request.body["messages"][-1]["role"] == "user" else answer

    return reply


def assert_continuable(result: AgentResult) -> None:
    """The transcript is one that an endpoint accepts, and so is the next turn of it."""
    check_messages([*result.messages, {"role": "user", "content": "go on"}])
    for message in result.messages:
        for call in message.get("tool_calls") or ():
            assert any(m.get("tool_call_id") == call["id"] for m in result.messages)


def outcomes(result: AgentResult) -> list[str]:
    return [tool.outcome for tool in result.tool_results]


def shown(value: object) -> str:
    """An id for a test's parameter that is the same in every process, which an object's address is not."""
    return re.sub(r" at 0x[0-9a-f]+", "", ascii(value))


def assert_linear(work: Callable[[int], object], size: int) -> None:
    """Twice as much takes about twice as long; what grows with the square takes four times."""

    def seconds(size: int) -> float:
        best = float("inf")
        for _ in range(3):
            began = time.process_time()
            work(size)
            best = min(best, time.process_time() - began)
        return best

    once, twice = seconds(size), seconds(2 * size)
    assert twice < 3 * once + 0.05, f"{once:.3f} s, and twice as much {twice:.3f} s"


async def in_thread(function: Callable[..., Any], *arguments: Any) -> Any:
    """Wait in a thread for something that blocks, so that the event loop goes on."""
    return await anyio.to_thread.run_sync(function, *arguments)
