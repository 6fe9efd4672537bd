"""What a user sees of each failure at each way into the library; `docs/errors.md` shows the same table."""

from __future__ import annotations

import asyncio
import os
import re
import threading
import traceback
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import anyio
import httpx2
import pytest

import fractal._engine.ask
from fractal import (
    AgentResult,
    AgentToolkit,
    AuthenticationFailed,
    BadReply,
    BaseAgent,
    BudgetExceeded,
    ConnectionFailed,
    DeadlineExceeded,
    DeadlineWouldPass,
    DelegateFailed,
    DepthExceeded,
    InvalidArguments,
    InvalidOutput,
    IterationsExceeded,
    Limits,
    MissingCredentials,
    NoContent,
    RateLimited,
    Refused,
    RequestTimedOut,
    RunCancelled,
    RunError,
    ServerError,
    StatusError,
    ToolErrors,
    ToolFailed,
    UnexpectedError,
    UserError,
    run_many,
    sync,
    tool,
)
from fractal.testing import Endpoint, ScriptedModel, answers
from tests.support import assert_continuable, in_thread

StartEndpoint = Callable[..., Endpoint]
Build = Callable[[StartEndpoint], BaseAgent]


@pytest.fixture(params=["asyncio", "trio"])
def anyio_backend(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(autouse=True)
def _short_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fractal._engine.ask, "FIRST_BACK_OFF", 0.001)


# ---- the failures


@dataclass(frozen=True)
class Shape:
    """A way to fail, and what a user sees of it.

    Attributes:
        happens: What happens, as the documentation says it.
        build: Makes the agent whose run it happens to.
        error: Type of the error; None: the run goes on, and the model is told.
        cause: Type of its `__cause__`.
        text: Its text, with … for anything; or what the model is told.
    """

    happens: str
    build: Build = field(repr=False)
    error: type[Exception] | None
    cause: type[BaseException] | None
    text: str


def at_endpoint(*replies: Any, **options: Any) -> Build:
    """An agent that asks an endpoint, which gives these answers and then the last of them again and again."""

    def build(endpoint: StartEndpoint) -> BaseAgent:
        left = list(replies)
        endpoint(lambda _: left.pop(0) if len(left) > 1 else left[0])
        return BaseAgent("A", "a", **options)

    return build


def where_nobody_listens(endpoint: StartEndpoint) -> BaseAgent:
    one = endpoint([])
    one.close()
    return BaseAgent("A", "a")


def without_a_key(endpoint: StartEndpoint) -> BaseAgent:
    return BaseAgent("A", "a")


def scripted(*script: Any, prompt: Any = "a", then: Callable[[BaseAgent], object] = id, **options: Any) -> Build:
    def build(endpoint: StartEndpoint) -> BaseAgent:
        tools = AgentToolkit(search, look, sleep, gather, gather_one, ask_deeper, locked)
        agent = BaseAgent("A", prompt, client=ScriptedModel(list(script)), toolkit=tools, **options)
        then(agent)
        return agent

    return build


@tool(on_error="raise")
async def search(city: str = "Rome") -> str:
    raise ValueError("offline")


@tool
async def look() -> str:
    raise ValueError("offline")


@tool
async def sleep() -> None:
    await anyio.sleep_forever()


@tool(on_error="raise")
async def gather() -> None:
    raise ExceptionGroup("several", [ValueError("offline"), KeyError("Rome")])


@tool(on_error="raise")
async def gather_one() -> None:
    async with anyio.create_task_group() as group:
        group.start_soon(anyio.sleep_forever)
        raise ValueError("offline")


@tool(on_error="raise")
async def ask_deeper() -> str:
    return str((await BaseAgent("B", "b", client=ScriptedModel(["never"])).run("go")).raise_for_error())


@tool(requires_approval=True)
async def locked() -> str:
    return "open"


async def failing(*_: object) -> Any:
    raise LookupError("no such table")


async def failing_twice() -> str:
    async with anyio.create_task_group() as group:
        group.start_soon(failing)
        group.start_soon(failing)
    return "never"


def call(name: str, **arguments: Any) -> Any:
    return answers.call(name, arguments)


SHAPES = [
    Shape(
        "the endpoint answers 400",
        at_endpoint(answers.failure(400, "no such field")),
        StatusError, None, "HTTP 400: no such field",
    ),
    Shape(
        "401, 403",
        at_endpoint(answers.failure(401, "wrong key")),
        AuthenticationFailed, None, "HTTP 401: wrong key",
    ),
    Shape(
        "404",
        at_endpoint(answers.failure(404, "no such model")),
        StatusError, None, "HTTP 404: no such model",
    ),
    Shape(
        "429, again and again",
        at_endpoint(answers.failure(429, "slow down")),
        RateLimited, None, "HTTP 429: slow down",
    ),
    Shape(
        "500, again and again",
        at_endpoint(answers.failure(500, "out of order")),
        ServerError, None, "HTTP 500: out of order",
    ),
    Shape(
        "429, to be asked again after more than the time left",
        at_endpoint(answers.failure(429, "slow down", retry_after=90), timeout=60),
        DeadlineWouldPass, RateLimited,
        "after “HTTP 429: slow down”, waiting to ask the model again would take 90 s, and … are left of the run's time",
    ),
    Shape(
        "it answers with a web page",
        at_endpoint(answers.raw("<h1>Hello</h1>")),
        BadReply, None, "the endpoint answered 'Hello', which is not JSON: is the base URL right?",
    ),
    Shape(
        "it hangs up in the middle",
        at_endpoint(answers.cut()),
        ConnectionFailed, httpx2.RemoteProtocolError, "no whole answer from http://…",
    ),
    Shape(
        "it does not answer within `request_timeout`",
        at_endpoint(answers.hang(), limits=Limits(request_timeout=0.02)),
        RequestTimedOut, None, "the model did not answer within the 0.02 s that a request may take",
    ),
    Shape(
        "nobody listens there",
        where_nobody_listens,
        ConnectionFailed, httpx2.ConnectError, "no connection to http://…",
    ),
    Shape(
        "there is no key",
        without_a_key,
        MissingCredentials, None, "there is no API key: set OPENAI_API_KEY …",
    ),
    Shape(
        "the model declines",
        scripted(answers.refusal("I do not do that")),
        Refused, None, "I do not do that",
    ),
    Shape(
        "the model answers nothing, again and again",
        scripted(*[answers.empty()] * 4),
        NoContent, None, "the model gave 4 empty replies: no text and no tool call",
    ),
    Shape(
        "its answers never fit the output type",
        scripted(*["many"] * 4, output_type=int, output_mode="prompt"),
        InvalidOutput, None, "the model gave 4 answers, and none is valid; the last one: …",
    ),
    Shape(
        "a tool raises",
        scripted(call("look"), "done"),
        None, ValueError, "ValueError: offline",
    ),
    Shape(
        'a tool with `on_error="raise"` raises',
        scripted(call("search")),
        ToolFailed, ValueError, "tool 'search' failed: ValueError: offline",
    ),
    Shape(
        "several such tools at once",
        scripted([call("search"), call("search")]),
        ToolErrors, None,
        "2 failures at once:\n- tool 'search' failed: ValueError: offline\n- tool 'search' failed: ValueError: offline",
    ),
    Shape(
        "such a tool raises a group of one",
        scripted(call("gather_one")),
        ToolFailed, ValueError, "tool 'gather_one' failed: ValueError: offline",
    ),
    Shape(
        "such a tool raises a group of several",
        scripted(call("gather")),
        ToolFailed, ExceptionGroup, "tool 'gather' failed: ValueError: offline; KeyError: 'Rome'",
    ),
    Shape(
        "arguments do not fit the tool",
        scripted(call("search", city=7), "done"),
        None, None, "the call of 'search' does not fit: 'city': Input should be a valid string (got 7)",
    ),
    Shape(
        "a tool call needs approval and the approver raises",
        scripted(call("locked"), "done", approve=failing),
        None, LookupError, "denied: it could not be approved: LookupError: no such table",
    ),
    Shape(
        "the requests are spent",
        scripted(call("look"), limits=Limits(max_requests=1)),
        BudgetExceeded, None, "the budget of 1 requests is spent (1 used or reserved, over the whole tree)",
    ),
    Shape(
        "too many turns",
        scripted(call("look"), limits=Limits(max_iterations=1)),
        IterationsExceeded, None, "no final answer after 1 iterations: raise max_iterations, or look for a tool loop",
    ),
    Shape(
        "too many delegations inside each other",
        scripted(call("ask_deeper"), limits=Limits(max_depth=0)),
        ToolFailed, DepthExceeded, "tool 'ask_deeper' failed: delegation is … levels deep already: …",
    ),
    Shape(
        "the run's time is over",
        scripted(call("sleep"), timeout=0.1),
        DeadlineExceeded, None, "the run did not finish within 0.1 s",
    ),
    Shape(
        "the prompt function raises",
        scripted(prompt=failing),
        UnexpectedError, LookupError, "LookupError: no such table",
    ),
    Shape(
        "it raises a group of several",
        scripted(prompt=failing_twice),
        UnexpectedError, ExceptionGroup, "LookupError: no such table; LookupError: no such table",
    ),
    Shape(
        "an output validator raises, but `AnswerRejected`",
        scripted("3", output_type=int, output_mode="prompt", then=lambda agent: agent.output_validator(failing)),
        UnexpectedError, LookupError, "LookupError: no such table",
    ),
    Shape(
        "the prompt function returns no text",
        scripted(prompt=lambda: 7),
        InvalidArguments, None, "the system_prompt function of 'A' returned 7, not text",
    ),
]  # fmt: skip


# ---- the ways in


@dataclass
class Seen:
    """What came of a run.

    Attributes:
        result: The result, where there is one.
        error: What was raised, or is in the result.
        is_raised: Whether it was raised.
    """

    result: AgentResult | None = None
    error: BaseException | None = None
    is_raised: bool = False


Entry = Callable[[BaseAgent], Awaitable[Seen]]


def of(result: AgentResult) -> Seen:
    return Seen(result, result.exception)


async def awaited(function: Callable[[], Awaitable[AgentResult]]) -> Seen:
    try:
        return of(await function())
    except Exception as error:
        return Seen(getattr(error, "result", None), error, is_raised=True)


def called(function: Callable[[], AgentResult]) -> Seen:
    try:
        return of(function())
    except Exception as error:
        return Seen(getattr(error, "result", None), error, is_raised=True)


async def run(agent: BaseAgent) -> Seen:
    return await awaited(partial(agent.run, "go"))


async def stream(agent: BaseAgent) -> Seen:
    async def work() -> AgentResult:
        async with agent.stream("go") as events:
            async for _ in events:
                pass
        return await events.result()

    return await awaited(work)


async def stream_result(agent: BaseAgent) -> Seen:
    async def work() -> AgentResult:
        async with agent.stream("go") as events:
            return await events.result()

    return await awaited(work)


async def call_agent(agent: BaseAgent) -> Seen:
    seen: list[Seen] = []

    async def ask() -> str:
        seen.append(await awaited(partial(outer.call_agent, agent, "go")))
        return "asked"

    outer = BaseAgent("outer", "o", client=ScriptedModel([call("ask"), "done"])).add_tool(ask)
    assert (await outer.run("go")).content == "done"
    return seen[0]


async def delegate(agent: BaseAgent) -> Seen:
    model = ScriptedModel([call("delegate_to_a", query="go"), "done"])
    outer = BaseAgent("outer", "o", client=model).register_delegate(agent)
    ended: list[AgentResult] = []
    agent.observers += (lambda event: ended.append(event.result) if event.kind == "run_finished" else None,)
    result = await outer.run("go")
    assert result.content == "done"
    [told] = result.tool_results
    if isinstance(told.exception, DelegateFailed):
        inner = told.exception.result
        assert told.exception.__cause__ is inner.exception
        assert str(inner.exception) in str(told.exception) == told.error
        return of(inner)
    return of(ended[-1]) if told.exception is None else Seen(None, told.exception, is_raised=True)


async def many(agent: BaseAgent, **options: Any) -> Seen:
    async def work() -> AgentResult:
        [result] = await run_many(agent, ["go"], **options)
        return result

    return await awaited(work)


def blocking(function: Callable[[BaseAgent], AgentResult]) -> Entry:
    async def entry(agent: BaseAgent) -> Seen:
        def work() -> Seen:
            with sync.portal(backend):
                return called(partial(function, agent))

        backend: Any = "asyncio" if anyio.get_cancelled_exc_class() is asyncio.CancelledError else "trio"
        return await in_thread(work)

    return entry


def sync_stream(agent: BaseAgent) -> AgentResult:
    with sync.stream(agent, "go") as events:
        for _ in events:
            pass
        return events.result()


async def in_plain_tool(agent: BaseAgent) -> Seen:
    seen: list[Seen] = []

    def ask() -> str:
        seen.append(called(partial(sync.run, agent, "go")))
        return "asked"

    outer = BaseAgent("outer", "o", client=ScriptedModel([call("ask"), "done"])).add_tool(ask)
    assert (await outer.run("go")).content == "done"
    return seen[0]


RESULTS: dict[str, Entry] = {
    "run": run,
    "stream": stream,
    "stream and result": stream_result,
    "call_agent": call_agent,
    "delegate": delegate,
    "run_many": many,
    "sync.run": blocking(lambda agent: sync.run(agent, "go")),
    "sync.run in a tool": in_plain_tool,
    "sync.stream": blocking(sync_stream),
    "sync.start": blocking(lambda agent: sync.start(agent, "go").result()),
    "sync.run_many": blocking(lambda agent: sync.run_many(agent, ["go"])[0]),
}
RAISING: dict[str, Entry] = {
    "run_many, fail_fast": partial(many, on_error="fail_fast"),
    "sync.run_many, fail_fast": blocking(lambda agent: sync.run_many(agent, ["go"], on_error="fail_fast")[0]),
}
ENTRIES = RESULTS | RAISING
QUICK = ("run", "stream", "delegate", "run_many, fail_fast", "sync.run")
WAYS = [pytest.param(way, marks=[] if way in QUICK else [pytest.mark.slow]) for way in ENTRIES]


# ---- the matrix


def matches(text: str, pattern: str) -> bool:
    return re.fullmatch(".*".join(map(re.escape, pattern.split("…"))), text, re.DOTALL) is not None


def chain(error: BaseException | None) -> list[BaseException]:
    """What a traceback of an error would show: the error, its causes, and their members."""
    if error is None:
        return []
    rest = error.__cause__ or (None if error.__suppress_context__ else error.__context__)
    members = list(error.exceptions) if isinstance(error, BaseExceptionGroup) else []
    return [error, *chain(rest), *(each for member in members for each in chain(member))]


def is_noise(filename: str) -> bool:
    return any(f"site-packages{os.sep}{package}{os.sep}" in filename for package in ("anyio", "trio"))


@pytest.mark.parametrize("shape", SHAPES, ids=lambda shape: shape.happens)
@pytest.mark.parametrize("way", WAYS)
async def test_a_failure_looks_the_same_from_wherever_it_is_seen(shape: Shape, way: str, endpoint: StartEndpoint):
    with anyio.fail_after(30):
        seen = await ENTRIES[way](shape.build(endpoint))
    error = seen.error
    if shape.error is None:
        assert seen.result is not None
        assert (seen.result.success, seen.result.content, error) == (True, "done", None)
        [told] = seen.result.tool_results
        assert matches(str(told.error), shape.text), told.error
        assert type(told.exception) is (shape.cause or type(None))
        return
    assert type(error) is shape.error, error
    assert type(error.__cause__) is (shape.cause or type(None))
    assert matches(str(error), shape.text), str(error)
    assert seen.is_raised == (way in RAISING or issubclass(shape.error, UserError))
    if isinstance(error, RunError):
        result = seen.result
        assert result is not None
        assert error.result is result
        assert (result.success, result.error, result.stop_reason) == (False, str(error), error.stop_reason)
        assert_continuable(result)
        with pytest.raises(shape.error) as raised:
            result.raise_for_error()
        assert raised.value is error
        noise = [frame.filename for frame in traceback.extract_tb(error.__traceback__) if is_noise(frame.filename)]
        assert not noise, "an event loop's own lines"
    for each in chain(error):
        assert not isinstance(each, anyio.get_cancelled_exc_class())
        assert not isinstance(each, BaseExceptionGroup) or len(each.exceptions) > 1, repr(each)


# ---- cancellation, which is no failure


def waiting() -> tuple[BaseAgent, anyio.Event, list[AgentResult]]:
    """An agent whose tool waits for ever; it tells when it does, and how its run ended."""
    began, ended = anyio.Event(), list[AgentResult]()

    @tool
    async def wait() -> None:
        began.set()
        await anyio.sleep_forever()

    agent = BaseAgent("A", "a", client=ScriptedModel([call("wait")])).add_tool(wait)
    agent.observers = (lambda event: ended.append(event.result) if event.kind == "run_finished" else None,)
    return agent, began, ended


def assert_cancelled(result: AgentResult) -> None:
    assert (result.success, result.stop_reason) == (False, "cancelled")
    assert type(result.exception) is RunCancelled
    assert [each.outcome for each in result.tool_results] == ["cancelled"]
    assert_continuable(result)


@pytest.mark.parametrize("how", ["scope", "task"])
@pytest.mark.parametrize("way", [name for name in ENTRIES if not name.startswith("sync.")])
async def test_cancellation_comes_out_as_itself_and_the_run_says_how_far_it_came(
    how: str, way: str, anyio_backend_name: str
):
    if how == "task" and anyio_backend_name == "trio":
        pytest.skip("asyncio's own")
    raised: list[BaseException] = []

    async def work() -> None:
        try:
            await ENTRIES[way](agent)
        except BaseException as error:
            raised.append(error)
            raise

    with anyio.fail_after(30):
        agent, began, ended = waiting()
        if how == "scope":
            async with anyio.create_task_group() as group:
                group.start_soon(work)
                await began.wait()
                group.cancel_scope.cancel()
        else:
            task = asyncio.ensure_future(work())
            await began.wait()
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
    assert [type(error) for error in raised] == [anyio.get_cancelled_exc_class()]
    assert_cancelled(ended[0])


@pytest.mark.parametrize("way", [name for name in ENTRIES if not name.startswith("sync.")])
async def test_a_timeout_of_the_callers_is_a_bare_timeout_error(way: str, anyio_backend_name: str):
    agent, began, ended = waiting()

    async def cut() -> None:
        await began.wait()
        scope.deadline = anyio.current_time()

    async with anyio.create_task_group() as group:
        with pytest.raises(TimeoutError) as raised, anyio.fail_after(30) as scope:
            group.start_soon(cut)
            await ENTRIES[way](agent)
    assert type(raised.value) is TimeoutError
    if anyio_backend_name == "asyncio":
        agent, _, _ = waiting()
        with pytest.raises(TimeoutError) as raised:
            await asyncio.wait_for(ENTRIES[way](agent), 0.1)
        assert type(raised.value) is TimeoutError
    assert_cancelled(ended[0])


async def test_a_run_cancelled_by_its_handle_is_raised_with_what_it_had_done():
    agent, _, _ = waiting()
    began = threading.Event()
    agent.observers = (lambda event: began.set() if event.kind == "tool_started" else None,)

    def work() -> None:
        handle = sync.start(agent, "go")
        assert began.wait(10)
        handle.cancel()
        with pytest.raises(RunCancelled, match="the run was cancelled") as raised:
            handle.result(10)
        assert_cancelled(raised.value.result)
        assert raised.value.__cause__ is None

    await in_thread(work)


# ---- the documentation


def row(shape: Shape) -> str:
    error = f"`{shape.error.__name__}`" if shape.error else "none: the model is told"
    cause = f"`{shape.cause.__name__}`" if shape.cause else ""
    text = "<br>".join(f"`{line}`" for line in shape.text.splitlines())
    return f"| {shape.happens} | {error} | {cause} | {text} |"


def test_the_table_of_the_documentation_is_this_one():
    page = (Path(__file__).parents[2] / "docs" / "errors.md").read_text()
    table = ["| what happens | error | its `__cause__` | its text |", "|---|---|---|---|", *map(row, SHAPES)]
    assert "\n".join(table) in page, "\n".join(table)
