"""What several test modules need."""

from __future__ import annotations

import functools
import importlib.util
import re
import threading
import time
from collections.abc import Awaitable, Callable
from typing import Any, TypeVar

import anyio
import pytest

from fractal import AgentResult, BaseAgent, Delta, ModelRequest, Reply, run_many, sync
from fractal.testing import answers, check_messages
from fractal.testing.answers import AnswerLike, ToolCallAnswer
from fractal.testing.endpoint import RecordedRequest

T = TypeVar("T")

BACKENDS = [
    pytest.param(("asyncio", {}), id="asyncio"),
    pytest.param(("trio", {}), id="trio"),
]
if importlib.util.find_spec("uvloop"):
    # The same code as on asyncio, as far as it is ours: with the slow tests, and without counting its lines again.
    ON_UVLOOP = [pytest.mark.slow, pytest.mark.untraced]
    BACKENDS.append(pytest.param(("asyncio", {"use_uvloop": True}), id="asyncio+uvloop", marks=ON_UVLOOP))


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
    once = twice = float("inf")
    for _ in range(3):  # the machine may have been busy with something else
        once, twice = min(once, _seconds(work, size)), min(twice, _seconds(work, 2 * size))
        if twice < 3 * once + 0.05:
            return
    pytest.fail(f"{once:.3f} s, and twice as much {twice:.3f} s")


def _seconds(work: Callable[[int], object], size: int) -> float:
    began = time.process_time()
    work(size)
    return time.process_time() - began


async def in_thread(function: Callable[..., Any], *arguments: Any) -> Any:
    """Wait in a thread for something that blocks, so that the event loop goes on."""
    return await anyio.to_thread.run_sync(function, *arguments)


def portal_threads() -> list[threading.Thread]:
    """The threads in which blocking callers' event loops run."""
    return [thread for thread in threading.enumerate() if thread.name.startswith("fractal portal")]


def until(condition: Callable[[], bool]) -> None:
    """Block until something has come about."""
    deadline = time.monotonic() + 10
    while not condition():
        assert time.monotonic() < deadline, "it did not come to that"
        threading.Event().wait(0.002)


async def come_about(condition: Callable[[], object]) -> None:
    """Wait until something has come about, in virtual time or in real."""
    with anyio.fail_after(10):
        while not condition():  # noqa: ASYNC110
            await anyio.sleep(0.001)


async def with_turns(work: Callable[[], Awaitable[T]]) -> tuple[T, int]:
    """Do some work, and count the turns that another task has meanwhile."""
    turns = 0

    async def turn() -> None:
        nonlocal turns
        while True:
            await anyio.sleep(0)
            turns += 1

    async with anyio.create_task_group() as group:
        group.start_soon(turn)
        done = await work()
        group.cancel_scope.cancel()
    return done, turns


# ---- ways to begin a run, for agents whose script does not depend on the question


async def by_run(agent: BaseAgent) -> AgentResult:
    return await agent.run("go")


async def by_stream(agent: BaseAgent) -> AgentResult:
    async with agent.stream("go") as stream:
        return await stream.result()


async def by_run_many(agent: BaseAgent) -> AgentResult:
    return (await run_many(agent, ["go"]))[0]


async def by_sync_run(agent: BaseAgent) -> AgentResult:
    result: AgentResult = await in_thread(sync.run, agent, "go")
    return result


RUNS = [by_run, by_stream, by_run_many, by_sync_run]


# ---- what tools are made of


def plain(x: int) -> str:
    """Plain."""
    return f"got {x}"


async def coroutine(x: int) -> str:
    """Plain."""
    return f"got {x}"


def wrapped(function: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(function)
    def wrapper(*args: Any, **kwargs: Any) -> Any:
        return function(*args, **kwargs)

    return wrapper
