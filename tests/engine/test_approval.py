"""Tool calls that somebody has to approve, in real runs: a call that nobody allowed is never made."""

from __future__ import annotations

import asyncio
import dataclasses
import datetime
import functools
import logging
import sys
import threading
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

import anyio
import pytest
from pydantic import BaseModel

from fractal import (
    AgentResult,
    Allow,
    ApprovalAnswered,
    ApprovalRequested,
    BaseAgent,
    Deny,
    InvalidArguments,
    LimitHit,
    Limits,
    PendingCall,
    RunCancelled,
    RunContext,
    ToolFinished,
    ToolStarted,
    WarningRaised,
    sync,
    tool,
)
from fractal.models.openai import OpenAIModel
from fractal.testing import Endpoint, answers
from fractal.testing.answers import AnswerLike
from tests.streams import Watch, assert_well_formed
from tests.support import assert_continuable, in_thread, outcomes, shown
from tests.without_uvloop import anyio_backend  # noqa: F401

StartEndpoint = Callable[..., Endpoint]


@pytest.fixture(autouse=True, scope="module")
def _http_is_imported() -> None:
    """The first request of a process imports the HTTP library, which would take the time of a test."""
    with Endpoint("ok") as one:
        model = OpenAIModel(base_url=one.url, api_key="sk-test")
        sync.run(BaseAgent("A", "a", client=model), "go").raise_for_error()


@dataclasses.dataclass
class Shelf:
    """Files that are removed for good: what has been removed shows which calls were made."""

    removed: list[str] = dataclasses.field(default_factory=list)
    looked: list[str] = dataclasses.field(default_factory=list)

    def keeper(self, name: str = "Keeper", **options: Any) -> BaseAgent:
        @tool(requires_approval=True)
        async def remove(path: str, force: bool = False) -> str:
            """Remove a file."""
            self.removed.append(path)
            return f"removed {path}" + " by force" * force

        @tool(requires_approval=True)
        def shred(path: str) -> str:
            """Shred a file."""
            self.removed.append(path)
            return f"shredded {path}"

        async def look(path: str) -> str:
            self.looked.append(path)
            return f"{path} is there"

        keeper = BaseAgent(name, f"You are {name}.", **options)
        return keeper.add_tool(remove).add_tool(shred).add_tool(look)


@pytest.fixture
def shelf() -> Shelf:
    return Shelf()


def remove(path: str = "x", id: str = "c1", **more: Any) -> Any:
    return answers.call("remove", {"path": path, **more}, id=id)


def told(endpoint: Endpoint) -> list[str]:
    """What the model was told of its calls, by the last request."""
    messages = endpoint.requests[-1].body["messages"]
    return [message["content"] for message in messages if message["role"] == "tool"]


def allow(_: Any) -> bool:
    return True


def deny(_: Any) -> bool:
    return False


class Clerk:
    """A callable object, with a method that can be asked as well."""

    def __call__(self, call: PendingCall) -> bool:
        return True

    async def asked(self, call: PendingCall, ctx: RunContext) -> Allow:
        return Allow()


async def awaited(call: PendingCall) -> Allow:
    await anyio.sleep(0)
    return Allow()


def with_context(call: PendingCall, ctx: RunContext[str]) -> bool:
    return ctx.call_id == call.call_id


def of_another_name(function: PendingCall, *, warn: RunContext[Any]) -> bool:
    return warn.tool_name == function.tool_name


# ---- who says what


@pytest.mark.parametrize(
    "approve",
    [
        allow,
        awaited,
        with_context,
        of_another_name,
        Clerk(),
        Clerk().asked,
        functools.partial(with_context),
        lambda call: Allow(),
        lambda call: awaited(call),
    ],
    ids=["plain", "async", "context", "named", "object", "method", "partial", "lambda", "lambda of a coroutine"],
)
@pytest.mark.parametrize("where", ["agent", "run"])
@pytest.mark.parametrize("name", ["remove", "shred"])
async def test_a_call_that_is_allowed_is_made(
    approve: Any, where: str, name: str, shelf: Shelf, endpoint: StartEndpoint
):
    one = endpoint([answers.call(name, {"path": "x"}, id="c1"), "done"])
    agent = shelf.keeper(approve=approve if where == "agent" else deny)
    result = await agent.run("go", **({"approve": approve} if where == "run" else {}))
    assert (result.content, outcomes(result), shelf.removed) == ("done", ["ok"], ["x"])
    assert told(one)[0].endswith("x")
    assert result.warnings == []


DENIALS: dict[str, tuple[Any, str]] = {
    "False": (False, "denied: not approved"),
    "Deny": (Deny(), "denied: not approved"),
    "a reason": (Deny("not on Sundays"), "denied: not on Sundays"),
    "no reason": (Deny(None), "denied: not approved"),  # type: ignore[arg-type]
    "an empty reason": (Deny(""), "denied: not approved"),
    "nothing": (None, "denied: the approval was not understood"),
    "a word": ("yes", "denied: the approval was not understood"),
    "a number": (1, "denied: the approval was not understood"),
    "a class": (Allow, "denied: the approval was not understood"),
    "arguments": ({"path": "y"}, "denied: the approval was not understood"),
    "missing arguments": (Allow({}), "denied: it was approved with other arguments, which do not fit: 'path'"),
    "wrong arguments": (Allow({"path": 5}), "denied: it was approved with other arguments, which do not fit: 'path'"),
    "unknown arguments": (
        Allow({"path": "y", "all": True}),
        "denied: it was approved with other arguments, which do not fit: there is no parameter 'all'",
    ),
    "no arguments at all": (
        Allow(5),  # type: ignore[arg-type]
        "denied: it was approved with other arguments, which do not fit",
    ),
}


@pytest.mark.parametrize("is_async", [True, False], ids=["async", "plain"])
@pytest.mark.parametrize("name", DENIALS)
async def test_a_call_that_is_not_allowed_is_never_made(
    name: str, is_async: bool, shelf: Shelf, endpoint: StartEndpoint
):
    answer, reason = DENIALS[name]

    async def asynchronous(_: PendingCall) -> Any:
        return answer

    one = endpoint([remove(), "done"])
    watch = Watch()
    agent = shelf.keeper(approve=asynchronous if is_async else lambda call: answer, observers=[watch])
    result = await agent.run("go")
    assert shelf.removed == []
    assert (result.content, outcomes(result)) == ("done", ["denied"])
    assert told(one)[0].startswith(f"Error: {reason}")
    assert str(result.tool_results[0].error).startswith(reason)
    [answered] = [event for event in watch if isinstance(event, ApprovalAnswered)]
    assert (answered.is_allowed, f"denied: {answered.reason}".startswith(reason)) == (False, True)
    is_nonsense = "understood" in reason
    assert len(result.warnings) == is_nonsense
    if is_nonsense:
        assert repr(answer) in result.warnings[0]
    assert_continuable(result)


async def test_what_happens_is_told_in_this_order(shelf: Shelf, endpoint: StartEndpoint):
    one = endpoint([answers.calls(remove("a", "c1")), answers.calls(remove("b", "c2")), "done"])
    watch = Watch()
    agent = shelf.keeper(approve=lambda call: call.arguments["path"] == "a", observers=[watch])
    result = await agent.run("go")
    assert_well_formed(watch)
    middle = ["tool_started", "approval_requested", "approval_answered", "tool_finished"]
    asked = ["model_requested", "model_responded"]
    assert watch.kinds == ["run_started", *asked, *middle, *asked, *middle, *asked, "run_finished"]
    requested = [event for event in watch if isinstance(event, ApprovalRequested)]
    assert [(e.tool_name, e.call_id, e.arguments) for e in requested] == [
        ("remove", "c1", {"path": "a"}),
        ("remove", "c2", {"path": "b"}),
    ]
    answered = [event for event in watch if isinstance(event, ApprovalAnswered)]
    assert [(e.call_id, e.is_allowed, e.arguments, e.reason) for e in answered] == [
        ("c1", True, {"path": "a"}, None),
        ("c2", False, {"path": "b"}, "not approved"),
    ]
    assert (outcomes(result), shelf.removed) == (["ok", "denied"], ["a"])
    assert one.requests[-1].body["messages"][1:] == result.messages[:-1]
    assert [message for message in result.messages if message["role"] == "tool"] == [
        {"role": "tool", "tool_call_id": "c1", "content": "removed a"},
        {"role": "tool", "tool_call_id": "c2", "content": "Error: denied: not approved"},
    ]
    again = AgentResult.model_validate_json(result.model_dump_json())
    assert outcomes(again) == ["ok", "denied"]


async def test_who_is_asked_sees_the_call_and_the_run(shelf: Shelf, endpoint: StartEndpoint):
    endpoint([remove("x", force=True), "done"])
    seen: list[Any] = []

    async def approve(call: PendingCall, ctx: RunContext[str]) -> bool:
        seen.append((call, ctx.deps, ctx.tool_name, ctx.call_id, ctx.depth, 0 < ctx.remaining() <= 60))
        seen.append([message["role"] for message in ctx.messages])
        return True

    result = await shelf.keeper(approve=approve).run("go", deps="Ada", timeout=60)
    call = PendingCall(
        tool_name="remove", call_id="c1", arguments={"path": "x", "force": True}, description="Remove a file."
    )
    assert seen == [(call, "Ada", "remove", "c1", 0, True), ["user", "assistant"]]
    assert result.tool_results[0].content == "removed x by force"


async def test_a_plain_callback_knows_the_time_there_is(shelf: Shelf, endpoint: StartEndpoint):
    endpoint([remove(), "done"])
    seen: list[float] = []

    def approve(call: PendingCall, ctx: RunContext) -> bool:
        seen.append(ctx.remaining())
        ctx.check_cancelled()
        return True

    await shelf.keeper(approve=approve).run("go", timeout=60)
    assert 0 < seen[0] <= 60


# ---- other arguments


class Range(BaseModel):
    start: int
    end: int


@dataclasses.dataclass
class Owner:
    name: str


Edited = tuple[Range, datetime.date, set[str], Owner, str, list[Range], float]


@pytest.mark.parametrize(
    "change",
    [
        {},
        {"kind": "b"},
        {"span": Range(start=5, end=6), "day": datetime.date(2027, 1, 1), "tags": {"z"}, "owner": Owner("Bo")},
        {"span": {"start": 5, "end": 6}, "day": "2027-01-01", "tags": ["z"], "owner": {"name": "Bo"}},
        {"spans": [{"start": 0, "end": 1}], "share": 1},
    ],
    ids=["nothing", "a word", "objects", "JSON", "a list"],
)
async def test_other_arguments_are_checked_and_become_the_functions_own_types(
    change: Mapping[str, Any], endpoint: StartEndpoint
):
    sent = {
        "span": {"start": 1, "end": 2},
        "day": "2026-05-01",
        "tags": ["x"],
        "owner": {"name": "Ada"},
        "kind": "a",
        "spans": [{"start": 3, "end": 4}],
    }
    endpoint([answers.call("clear", sent), "done"])
    got: list[Edited] = []

    @tool(requires_approval=True)
    def clear(
        span: Range,
        day: datetime.date,
        tags: set[str],
        owner: Owner,
        kind: Literal["a", "b"],
        spans: list[Range],
        share: float = 0.5,
    ) -> None:
        got.append((span, day, tags, owner, kind, spans, share))

    agent = BaseAgent("A", "a", approve=lambda call: Allow({**call.arguments, **change})).add_tool(clear)
    result = await agent.run("go")
    assert outcomes(result) == ["ok"], result.tool_results[0].error
    is_new = "span" in change
    assert got == [
        (
            Range(start=5, end=6) if is_new else Range(start=1, end=2),
            datetime.date(2027, 1, 1) if is_new else datetime.date(2026, 5, 1),
            {"z"} if is_new else {"x"},
            Owner("Bo") if is_new else Owner("Ada"),
            change.get("kind", "a"),
            [Range(start=0, end=1)] if "spans" in change else [Range(start=3, end=4)],
            change.get("share", 0.5),
        )
    ]


async def test_other_arguments_show_in_events_and_result_and_not_in_what_the_model_said(
    shelf: Shelf, endpoint: StartEndpoint
):
    endpoint([remove("/etc"), "done"])
    watch = Watch()
    agent = shelf.keeper(approve=lambda call: Allow({"path": "/tmp"}), observers=[watch])
    result = await agent.run("go")
    assert shelf.removed == ["/tmp"]
    by_kind = {event.kind: event for event in watch}
    assert by_kind["tool_started"].arguments == {"path": "/etc"}
    assert by_kind["approval_requested"].arguments == {"path": "/etc"}
    assert by_kind["approval_answered"].arguments == {"path": "/tmp"}
    assert result.tool_results[0].metadata["arguments"] == {"path": "/tmp"}
    assert result.messages[1]["tool_calls"][0]["function"]["arguments"] == '{"path": "/etc"}'


# ---- whom a run asks


async def test_the_runs_own_callback_goes_before_the_agents(shelf: Shelf, endpoint: StartEndpoint):
    endpoint(lambda request: "done" if request.body["messages"][-1]["role"] == "tool" else remove())
    asked: list[str] = []
    agent = shelf.keeper(approve=lambda call: not asked.append("agent"))
    await agent.run("go", approve=lambda call: not asked.append("run"))
    await agent.run("go", approve=None)
    await agent.run("go")
    assert (asked, shelf.removed) == (["run", "agent", "agent"], ["x"] * 3)


@pytest.mark.parametrize("how", ["delegate", "call_agent", "sync.run", "execute_tool", "stream"])
@pytest.mark.parametrize("has_own", [False, True], ids=["asks above", "asks its own"])
async def test_a_run_below_asks_whom_the_run_above_asks(how: str, has_own: bool, shelf: Shelf, endpoint: StartEndpoint):
    def play(request: Any) -> AnswerLike:
        messages = request.body["messages"]
        if messages[-1]["role"] == "tool":
            return "done"
        if messages[0]["content"] == "You are Keeper.":
            return remove(id="inner")
        return (
            answers.call("ask", {}, id="outer")
            if how != "delegate"
            else answers.call("delegate_to_keeper", {"query": "go"}, id="outer")
        )

    endpoint(play)
    asked: list[str] = []
    watch = Watch()
    keeper = shelf.keeper(approve=(lambda call: not asked.append("keeper")) if has_own else None)
    boss = BaseAgent("Boss", "You ask.", approve=deny, observers=[watch])

    async def by_call() -> Any:
        return (await boss.call_agent(keeper, "go")).content

    async def by_tool() -> Any:
        return (await keeper.execute_tool("remove", path="x")).content

    async def by_stream() -> Any:
        async with keeper.stream("go") as stream:
            return (await stream.result()).content

    ways: dict[str, Callable[..., Any]] = {
        "call_agent": by_call,
        "sync.run": lambda: sync.run(keeper, "go").content,
        "execute_tool": by_tool,
        "stream": by_stream,
    }
    if how == "delegate":
        boss.register_delegate(keeper)
    else:
        boss.add_tool(ways[how], name="ask")
    result = await boss.run("go", approve=lambda call: not asked.append("run"))
    assert (result.content, shelf.removed) == ("done", ["x"])
    assert asked == ["keeper" if has_own else "run"]
    if how != "execute_tool":
        assert_well_formed(watch)


async def test_two_levels_down_the_same_is_asked(shelf: Shelf, endpoint: StartEndpoint):
    def play(request: Any) -> AnswerLike:
        messages = request.body["messages"]
        if messages[-1]["role"] == "tool":
            return "done"
        offered = request.body["tools"][0]["function"]["name"]
        return remove() if offered == "remove" else answers.call(offered, {"query": "go"})

    endpoint(play)
    seen: list[tuple[int, str]] = []

    def approve(call: PendingCall, ctx: RunContext) -> bool:
        seen.append((ctx.depth, ctx.agent.name))
        return True

    middle = BaseAgent("Middle", "You pass on.").register_delegate(shelf.keeper())
    boss = BaseAgent("Boss", "You ask.").register_delegate(middle)
    assert (await boss.run("go", approve=approve)).content == "done"
    assert (seen, shelf.removed) == ([(2, "Keeper")], ["x"])


async def test_without_anybody_to_ask_the_call_is_denied_with_a_warning(
    shelf: Shelf, endpoint: StartEndpoint, caplog: pytest.LogCaptureFixture
):
    one = endpoint([answers.calls(remove(), answers.call("look", {"path": "x"}, id="c2")), "done"])
    watch = Watch()
    with caplog.at_level(logging.WARNING, logger="fractal"):
        result = await shelf.keeper(observers=[watch]).run("go")
    assert (outcomes(result), shelf.removed, shelf.looked) == (["denied", "ok"], [], ["x"])
    assert told(one)[0] == "Error: denied: there is nobody to approve it"
    warning = "tool 'remove' requires approval and there is nobody to ask: pass approve="
    assert result.warnings == [warning]
    assert [event.message for event in watch if isinstance(event, WarningRaised)] == [warning]
    assert warning in caplog.text


@pytest.mark.parametrize("approve", [5, True, False, "yes", lambda: True, lambda a, b, c: True], ids=shown)
async def test_who_cannot_be_asked_is_refused_at_once(approve: Any, shelf: Shelf, endpoint: StartEndpoint):
    one = endpoint([])
    with pytest.raises(InvalidArguments, match="approve="):
        shelf.keeper(approve=approve)
    with pytest.raises(InvalidArguments, match="approve="):
        await shelf.keeper().run("go", approve=approve)
    assert one.requests == []


# ---- callbacks that fail


class BrokenError(Exception):
    pass


async def raise_in_group(_: PendingCall) -> bool:
    async with anyio.create_task_group() as group:
        group.start_soon(fail)
    return True


async def fail() -> None:
    raise BrokenError("nobody at home")


def raise_plainly(_: PendingCall) -> bool:
    raise BrokenError("nobody at home")


async def raise_asynchronously(_: PendingCall) -> bool:
    raise BrokenError("nobody at home")


@pytest.mark.parametrize("on_error", ["model", "raise"])
@pytest.mark.parametrize("approve", [raise_plainly, raise_asynchronously, raise_in_group])
async def test_a_callback_that_fails_lets_nothing_through(approve: Any, on_error: Any, endpoint: StartEndpoint):
    one = endpoint([answers.call("burn", {}), "done"])
    made: list[int] = []

    @tool(requires_approval=True, on_error=on_error)
    def burn() -> None:
        made.append(1)

    result = await BaseAgent("A", "a", approve=approve).add_tool(burn).run("go")
    assert (result.content, outcomes(result), made) == ("done", ["denied"], [])
    assert told(one) == ["Error: denied: it could not be approved: BrokenError: nobody at home"]
    assert isinstance(result.tool_results[0].exception, BrokenError | ExceptionGroup)


async def test_a_callback_that_leaves_the_program_lets_nothing_through(shelf: Shelf, endpoint: StartEndpoint):
    one = endpoint([remove(), "done"])
    result = await shelf.keeper(approve=lambda call: sys.exit(3)).run("go")
    assert (result.content, shelf.removed) == ("done", [])
    assert "sys.exit(3)" in told(one)[0]


async def test_a_callback_whose_own_task_is_cancelled_lets_nothing_through(
    shelf: Shelf, endpoint: StartEndpoint, anyio_backend_name: str
):
    if anyio_backend_name != "asyncio":
        pytest.skip("asyncio's own")
    endpoint([remove(), "done"])

    async def approve(_: PendingCall) -> bool:
        task = asyncio.create_task(asyncio.sleep(10))
        asyncio.get_running_loop().call_soon(task.cancel)
        await task
        return True

    result = await shelf.keeper(approve=approve).run("go")
    assert (result.content, outcomes(result), shelf.removed) == ("done", ["denied"], [])
    assert "it could not be approved: approve was cancelled from inside" in result.messages[2]["content"]


# ---- what is not asked about


async def test_nobody_is_asked_about_a_call_that_cannot_be_made(shelf: Shelf, endpoint: StartEndpoint):
    asked: list[str] = []
    calls = [
        answers.call("remove", '{"path": ', id="c1"),
        answers.call("remove", {"file": "x"}, id="c2"),
        answers.call("reboot", {}, id="c3"),
    ]
    endpoint([answers.calls(*calls), "done"])
    result = await shelf.keeper(approve=lambda call: not asked.append(call.tool_name)).run("go")
    assert (outcomes(result), asked, shelf.removed) == (["error"] * 3, [], [])


async def test_nobody_is_asked_about_a_call_that_the_budget_forbids(shelf: Shelf, endpoint: StartEndpoint):
    asked: list[str] = []
    endpoint([answers.calls(remove("a", "c1"), remove("b", "c2"))])
    agent = shelf.keeper(approve=lambda call: not asked.append(call.arguments["path"]))
    result = await agent.run("go", limits=Limits(max_tool_calls=1))
    assert (result.stop_reason, outcomes(result)) == ("budget", ["ok", "skipped"])
    assert (asked, shelf.removed) == (["a"], ["a"])


async def test_other_tools_need_nobody(shelf: Shelf, endpoint: StartEndpoint):
    endpoint([answers.call("look", {"path": "x"}), "done"])
    watch = Watch()
    result = await shelf.keeper(approve=raise_plainly, observers=[watch]).run("go")
    assert (outcomes(result), shelf.looked) == (["ok"], ["x"])
    assert not [event for event in watch if isinstance(event, (ApprovalRequested, ApprovalAnswered))]


@pytest.mark.parametrize("is_allowed", [True, False])
async def test_a_terminating_tool_ends_the_run_if_it_is_allowed(is_allowed: bool, endpoint: StartEndpoint):
    @tool(requires_approval=True, terminate=True)
    def stop() -> str:
        return "stopped"

    endpoint([answers.call("stop", {}), "denied, so I go on"])
    result = await BaseAgent("A", "a", approve=lambda call: is_allowed).add_tool(stop).run("go")
    assert result.content == ("stopped" if is_allowed else "denied, so I go on")
    assert result.stop_reason == ("terminated" if is_allowed else "finished")


# ---- side by side


class Desk:
    """Calls that wait until the test answers them."""

    def __init__(self) -> None:
        self.pending: set[str] = set()
        self._answers: dict[str, Any] = {}
        self._events: dict[str, anyio.Event] = {}
        self._arrived = anyio.Event()

    async def __call__(self, call: PendingCall) -> Any:
        self.pending.add(call.call_id)
        self._arrived.set()
        try:
            await self._event(call.call_id).wait()
        finally:
            self.pending.remove(call.call_id)
        return self._answers[call.call_id]

    async def until_pending(self, *call_ids: str) -> None:
        while self.pending != set(call_ids):
            self._arrived = anyio.Event()
            await self._arrived.wait()

    def answer(self, call_id: str, answer: Any) -> None:
        self._answers[call_id] = answer
        self._event(call_id).set()

    def _event(self, call_id: str) -> anyio.Event:
        return self._events.setdefault(call_id, anyio.Event())


async def test_several_calls_wait_at_once_while_other_tools_run(shelf: Shelf, endpoint: StartEndpoint):
    calls = [remove("a", "c1"), answers.call("look", {"path": "l"}, id="c2"), remove("b", "c3"), remove("c", "c4")]
    endpoint([answers.calls(*calls), "done"])
    desk, watch = Desk(), Watch()
    looked, ended = anyio.Event(), anyio.Event()
    results: list[AgentResult] = []

    def observe(event: Any) -> None:
        watch(event)
        if isinstance(event, ToolFinished):
            (looked if event.call_id == "c2" else ended).set()

    async def go() -> None:
        results.append(await shelf.keeper(approve=desk, observers=[observe]).run("go"))

    with anyio.fail_after(10):
        async with anyio.create_task_group() as group:
            group.start_soon(go)
            await desk.until_pending("c1", "c3", "c4")
            await looked.wait()
            assert (shelf.looked, shelf.removed) == (["l"], [])
            desk.answer("c4", True)
            await ended.wait()
            assert shelf.removed == ["c"]
            desk.answer("c3", Deny("no"))
            desk.answer("c1", Allow({"path": "z"}))
    [result] = results
    assert outcomes(result) == ["ok", "ok", "denied", "ok"]
    assert sorted(shelf.removed) == ["c", "z"]
    assert [m["content"] for m in result.messages if m["role"] == "tool"] == [
        "removed z",
        "l is there",
        "Error: denied: no",
        "removed c",
    ]
    assert_well_formed(watch)
    assert [e.call_id for e in watch if isinstance(e, ToolFinished)][:2] == ["c2", "c4"]


async def test_a_sequential_tool_is_asked_for_when_its_turn_has_come(endpoint: StartEndpoint):
    order: list[str] = []

    @tool(requires_approval=True, sequential=True)
    async def step(n: int) -> int:
        order.append(f"step {n}")
        return n

    async def approve(call: PendingCall) -> bool:
        order.append(f"ask {call.arguments['n']}")
        await anyio.sleep(0.01)
        return call.arguments["n"] != 2

    endpoint([[answers.call("step", {"n": n}, id=f"c{n}") for n in (1, 2, 3)], "done"])
    result = await BaseAgent("A", "a", approve=approve).add_tool(step).run("go")
    assert order == ["ask 1", "step 1", "ask 2", "ask 3", "step 3"]
    assert outcomes(result) == ["ok", "denied", "ok"]


# ---- time


@pytest.mark.parametrize("whose", ["tool", "limits"])
async def test_the_tools_own_time_begins_when_it_is_allowed(whose: str, endpoint: StartEndpoint):
    timeout = 0.3 if whose == "tool" else None

    @tool(requires_approval=True, timeout=timeout)
    async def work() -> str:
        await anyio.sleep(0.05)
        return "worked"

    @tool(requires_approval=True, timeout=timeout)
    async def hang() -> None:
        await anyio.sleep_forever()

    def slowly(_: PendingCall) -> bool:
        threading.Event().wait(0.35)
        return True

    async def slowly_awaited(_: PendingCall) -> bool:
        await anyio.sleep(0.35)
        return True

    endpoint([answers.calls(answers.call("work", {}, id="c1"), answers.call("hang", {}, id="c2")), "done"])
    approve = slowly if whose == "tool" else slowly_awaited
    agent = BaseAgent("A", "a", approve=approve).add_tool(work).add_tool(hang)
    with anyio.fail_after(10):
        result = await agent.run("go", limits=Limits(tool_timeout=0.3) if whose == "limits" else None)
    assert outcomes(result) == ["ok", "timeout"]
    assert str(result.tool_results[1].error).startswith("timed out after")
    assert result.tool_results[0].elapsed < 0.3


@pytest.mark.parametrize("is_async", [True, False], ids=["async", "plain"])
async def test_nobody_waits_for_approval_longer_than_the_run_has(is_async: bool, shelf: Shelf, endpoint: StartEndpoint):
    one = endpoint([remove()])
    released, cleaned_up, late = threading.Event(), anyio.Event(), threading.Event()

    async def never(_: PendingCall) -> bool:
        try:
            await anyio.sleep_forever()
        finally:
            cleaned_up.set()
        return True

    def never_plainly(_: PendingCall) -> bool:
        released.wait(10)
        late.set()
        return True

    watch = Watch()
    try:
        with anyio.fail_after(5):
            agent = shelf.keeper(approve=never if is_async else never_plainly, observers=[watch])
            result = await agent.run("go", timeout=0.3)
    finally:
        released.set()
    assert (result.stop_reason, outcomes(result)) == ("deadline", ["timeout"])
    assert str(result.tool_results[0].error).startswith("no approval within 0.")
    assert cleaned_up.is_set() is is_async
    await in_thread(late.wait, 0 if is_async else 5)
    assert (shelf.removed, len(one.requests), result.abandoned) == ([], 1, [])
    assert watch.kinds[-3:] == ["tool_finished", "limit_hit", "run_finished"]
    assert ["never_plainly could not be stopped" in warning for warning in result.warnings] == [True] * (not is_async)
    assert_well_formed(watch)
    assert_continuable(result)


async def test_when_time_runs_short_the_wait_ends_and_an_answer_is_asked_for(shelf: Shelf, endpoint: StartEndpoint):
    one = endpoint([answers.calls(remove("a", "c1"), remove("b", "c2")), "without removing"])
    desk, watch = Desk(), Watch()
    result = await shelf.keeper(approve=desk, observers=[watch]).run("go", timeout=20.2, limits=Limits(reserve=20))
    assert (result.content, result.stop_reason) == ("without removing", "soft_deadline")
    assert (outcomes(result), shelf.removed) == (["timeout", "timeout"], [])
    assert all(text.startswith("Error: no approval within 0.") for text in told(one))
    assert [event.limit for event in watch if isinstance(event, LimitHit)] == ["soft_deadline"]


@pytest.mark.parametrize("is_async", [True, False], ids=["async", "plain"])
@pytest.mark.parametrize("how", ["scope", "native"])
async def test_a_run_that_is_cancelled_waits_for_nobody(
    how: str, is_async: bool, shelf: Shelf, endpoint: StartEndpoint, anyio_backend_name: str
):
    if how == "native" and anyio_backend_name != "asyncio":
        pytest.skip("asyncio's own")
    one = endpoint([answers.calls(remove(), answers.call("look", {"path": "x"}, id="c2"))])
    asked = threading.Event()
    released = threading.Event()
    watch = Watch()

    async def never(_: PendingCall) -> bool:
        asked.set()
        await anyio.sleep_forever()
        return True

    def never_plainly(_: PendingCall) -> bool:
        asked.set()
        released.wait(10)
        return True

    agent = shelf.keeper(approve=never if is_async else never_plainly, observers=[watch])
    try:
        with anyio.fail_after(5):
            if how == "scope":
                async with anyio.create_task_group() as group:
                    group.start_soon(agent.run, "go")
                    await in_thread(asked.wait, 5)
                    group.cancel_scope.cancel()
            else:
                with pytest.raises(TimeoutError):
                    await asyncio.wait_for(agent.run("go"), 0.3)
                assert asked.is_set()
    finally:
        released.set()
    [result] = watch.results("Keeper")
    assert (result.stop_reason, outcomes(result)[0]) == ("cancelled", "cancelled")
    assert (shelf.removed, len(one.requests)) == ([], 1)
    assert_well_formed(watch)
    assert_continuable(result)


@pytest.mark.parametrize("is_word_first", [True, False])
async def test_a_call_that_is_allowed_in_the_moment_its_run_is_cancelled_is_not_made(
    is_word_first: bool, shelf: Shelf, endpoint: StartEndpoint
):
    endpoint([remove()])
    desk, watch = Desk(), Watch()
    agent = shelf.keeper(approve=desk, observers=[watch])
    with anyio.fail_after(5):
        async with anyio.create_task_group() as group:
            group.start_soon(agent.run, "go")
            await desk.until_pending("c1")
            if is_word_first:
                desk.answer("c1", True)
            group.cancel_scope.cancel()
            desk.answer("c1", True)
    [result] = watch.results("Keeper")
    assert (outcomes(result), shelf.removed) == (["cancelled"], [])
    assert_continuable(result)


async def test_a_late_word_reaches_nobody(shelf: Shelf, endpoint: StartEndpoint):
    """The run has ended; what the callback still does in its thread joins nothing and allows nothing."""
    one = endpoint([remove()])
    released, ended = threading.Event(), threading.Event()
    errors: list[BaseException] = []
    other = BaseAgent("Other", "You are late.")

    def approve(_: PendingCall) -> bool:
        released.wait(10)
        try:
            sync.run(other, "may I?")
        except BaseException as error:
            errors.append(error)
        ended.set()
        return True

    with anyio.fail_after(10):
        result = await shelf.keeper(approve=approve).run("go", timeout=0.3)
        released.set()
        await in_thread(ended.wait, 5)
    assert result.stop_reason == "deadline"
    assert [type(error) for error in errors] == [RunCancelled]
    assert (shelf.removed, len(one.requests)) == ([], 1)


# ---- callbacks that do something


async def test_a_plain_callback_stops_nobody_else(shelf: Shelf, endpoint: StartEndpoint):
    endpoint([answers.calls(remove(), answers.call("look", {"path": "x"}, id="c2")), "done"])
    looked = threading.Event()
    threads: list[threading.Thread] = []

    def approve(_: PendingCall) -> bool:
        threads.append(threading.current_thread())
        return looked.wait(5)

    def observe(event: Any) -> None:
        if isinstance(event, ToolFinished) and event.call_id == "c2":
            looked.set()

    result = await shelf.keeper(approve=approve, observers=[observe]).run("go")
    assert (outcomes(result), shelf.removed) == (["ok", "ok"], ["x"])
    assert threading.current_thread() not in threads


@pytest.mark.parametrize("how", ["sync.run", "sync.stream", "run", "call_agent"])
async def test_a_callback_may_ask_another_agent_inside_the_run(how: str, shelf: Shelf, endpoint: StartEndpoint):
    def play(request: Any) -> AnswerLike:
        messages = request.body["messages"]
        if messages[0]["content"] == "You judge.":
            return "yes" if "harmless" in messages[-1]["content"] else "no"
        return "done" if messages[-1]["role"] == "tool" else [remove("harmless", "c1"), remove("precious", "c2")]

    one = endpoint(play)
    judge = BaseAgent("Judge", "You judge.")
    watch = Watch()
    keeper = shelf.keeper(observers=[watch])

    def plain(call: PendingCall) -> bool:
        return sync.run(judge, call.arguments["path"]).content == "yes"

    def streaming(call: PendingCall) -> bool:
        with sync.stream(judge, call.arguments["path"]) as stream:
            return "".join(stream.text()) == "yes"

    async def awaited(call: PendingCall) -> bool:
        return (await judge.run(call.arguments["path"])).content == "yes"

    async def by_call(call: PendingCall, ctx: RunContext) -> bool:
        return (await ctx.agent.call_agent(judge, call.arguments["path"])).content == "yes"

    ways: dict[str, Any] = {"sync.run": plain, "sync.stream": streaming, "run": awaited, "call_agent": by_call}
    result = await keeper.run("go", approve=ways[how], timeout=30, limits=Limits(max_requests=4))
    assert (result.content, outcomes(result), shelf.removed) == ("done", ["ok", "denied"], ["harmless"])
    assert (len(one.requests), result.usage.requests) == (4, 4), "they are in the same budget"
    assert_well_formed(watch)
    children = [event for event in watch if event.kind == "run_started" and event.agent_name == "Judge"]
    assert sorted(child.call_id for child in children) == ["c1", "c2"]
    assert {child.parent_id for child in children} == {result.run_id}


async def test_an_agent_that_a_callback_asks_has_no_more_time_than_the_run(shelf: Shelf, endpoint: StartEndpoint):
    def play(request: Any) -> AnswerLike:
        return answers.hang() if request.body["messages"][0]["content"] == "You judge." else remove()

    one = endpoint(play)
    judge = BaseAgent("Judge", "You judge.")
    with anyio.fail_after(5):
        result = await shelf.keeper(approve=lambda call: sync.run(judge, "?").success).run("go", timeout=0.4)
    assert (result.stop_reason, outcomes(result), shelf.removed) == ("deadline", ["timeout"], [])
    await in_thread(one.wait_for_disconnects, 1)


async def test_an_agent_with_tools_that_need_approval_may_be_asked_by_a_callback(shelf: Shelf, endpoint: StartEndpoint):
    """The run that a callback starts asks the same callback, which can tell by the depth."""

    def play(request: Any) -> AnswerLike:
        messages = request.body["messages"]
        if messages[-1]["role"] == "tool":
            return "done"
        return remove("inner" if messages[0]["content"] == "You are Helper." else "outer")

    endpoint(play)
    inner = Shelf()
    helper = inner.keeper("Helper")

    async def approve(call: PendingCall, ctx: RunContext) -> bool:
        return ctx.depth > 0 or (await helper.run("?")).content == "done"

    result = await shelf.keeper().run("go", approve=approve)
    assert (result.content, shelf.removed, inner.removed) == ("done", ["outer"], ["inner"])


# ---- execute_tool


@pytest.mark.parametrize("way", ["await", "sync"])
@pytest.mark.parametrize(
    ("approve", "outcome", "removed"),
    [(allow, "ok", ["x"]), (awaited, "ok", ["x"]), (deny, "denied", []), (None, "denied", [])],
    ids=["plain", "async", "denied", "nobody"],
)
async def test_a_direct_call_needs_approval_too(
    way: str, approve: Any, outcome: str, removed: Sequence[str], shelf: Shelf, endpoint: StartEndpoint
):
    endpoint([])
    agent = shelf.keeper(approve=approve)
    if way == "await":
        result = await agent.execute_tool("remove", path="x")
    else:
        result = await in_thread(lambda: sync.execute_tool(agent, "remove", path="x"))
    assert (result.outcome, shelf.removed) == (outcome, removed)
    assert (result.error is None) is (outcome == "ok")


async def test_a_direct_call_in_a_tool_asks_whom_the_run_asks(shelf: Shelf, endpoint: StartEndpoint):
    endpoint([answers.call("tidy", {}), "done"])
    keeper = shelf.keeper()
    asked: list[PendingCall] = []

    async def tidy() -> str:
        return (await keeper.execute_tool("remove", path="inner")).outcome

    keeper.add_tool(tidy)
    result = await keeper.run("go", approve=lambda call: not asked.append(call))
    assert (result.tool_results[0].content, shelf.removed) == ("ok", ["inner"])
    assert [call.arguments for call in asked] == [{"path": "inner"}]


# ---- streams


@pytest.mark.parametrize("buffer", [0, 64])
async def test_who_reads_a_stream_may_be_the_one_who_is_asked(buffer: int, shelf: Shelf, endpoint: StartEndpoint):
    endpoint([answers.calls(remove("a", "c1"), remove("b", "c2")), "done"])
    desk = Desk()
    with anyio.fail_after(10):
        async with shelf.keeper().stream("go", buffer=buffer, approve=desk) as stream:
            events: list[Any] = []
            async for event in stream:
                events.append(event)
                if isinstance(event, ApprovalRequested):
                    desk.answer(event.call_id, event.arguments["path"] == "a")
            result = await stream.result()
    assert_well_formed(events)
    assert (outcomes(result), shelf.removed) == (["ok", "denied"], ["a"])


def test_a_blocking_reader_may_be_the_one_who_is_asked(shelf: Shelf, endpoint: StartEndpoint):
    endpoint([answers.calls(remove("a", "c1"), remove("b", "c2")), "done"])
    words: dict[str, bool] = {}
    said = threading.Condition()

    def approve(call: PendingCall) -> bool:
        with said:
            assert said.wait_for(lambda: call.call_id in words, 5)
            return words[call.call_id]

    with sync.stream(shelf.keeper(), "go", approve=approve) as stream:
        for event in stream:
            if isinstance(event, ApprovalRequested):
                with said:
                    words[event.call_id] = event.arguments["path"] == "b"
                    said.notify_all()
        result = stream.result()
    assert (outcomes(result), shelf.removed) == (["denied", "ok"], ["b"])


@pytest.mark.parametrize("is_async", [True, False], ids=["async", "plain"])
async def test_who_leaves_a_stream_at_the_question_has_not_allowed_it(
    is_async: bool, shelf: Shelf, endpoint: StartEndpoint
):
    one = endpoint([remove()])
    released = threading.Event()

    async def never(_: PendingCall) -> bool:
        await anyio.sleep_forever()
        return True

    def late(_: PendingCall) -> bool:
        released.wait(5)
        return True

    try:
        with anyio.fail_after(5):
            async with shelf.keeper(approve=never if is_async else late).stream("go", buffer=0) as stream:
                async for event in stream:
                    if isinstance(event, ApprovalRequested):
                        break
    finally:
        released.set()
    result = await stream.result()
    assert (result.stop_reason, outcomes(result)) == ("cancelled", ["cancelled"])
    assert (shelf.removed, len(one.requests)) == ([], 1)
    assert_continuable(result)


async def test_who_leaves_a_stream_when_the_word_is_given_stops_the_call(shelf: Shelf, endpoint: StartEndpoint):
    """The last chance: the call has been allowed, and has not begun."""
    endpoint([remove()])
    async with shelf.keeper(approve=awaited).stream("go", buffer=0) as stream:
        async for event in stream:
            if isinstance(event, ApprovalAnswered):
                assert event.is_allowed
                break
    assert (outcomes(await stream.result()), shelf.removed) == (["cancelled"], [])


@pytest.mark.parametrize("way", ["run", "stream", "sync.run", "sync.stream"])
async def test_every_way_to_run_asks_alike(way: str, shelf: Shelf, endpoint: StartEndpoint):
    one = endpoint([answers.calls(remove("a", "c1"), remove("b", "c2")), "done"])
    agent = shelf.keeper(approve=lambda call: call.arguments["path"] == "a")
    watch = Watch()
    agent.observers = (watch,)
    if way == "run":
        result = await agent.run("go")
    elif way == "stream":
        async with agent.stream("go") as stream:
            result = await stream.result()
    elif way == "sync.run":
        result = await in_thread(lambda: sync.run(agent, "go"))
    else:

        def drain() -> AgentResult:
            with sync.stream(agent, "go") as stream:
                return stream.result()

        result = await in_thread(drain)
    assert (outcomes(result), shelf.removed) == (["ok", "denied"], ["a"])
    assert told(one) == ["removed a", "Error: denied: not approved"]
    assert [event.call_id for event in watch if isinstance(event, ToolStarted)] == ["c1", "c2"]
    assert_well_formed(watch)


async def test_runs_side_by_side_ask_each_for_themselves(shelf: Shelf, endpoint: StartEndpoint):
    def play(request: Any) -> AnswerLike:
        messages = request.body["messages"]
        return "done" if messages[-1]["role"] == "tool" else remove(messages[-1]["content"])

    endpoint(play)
    agent = shelf.keeper()
    results: dict[str, AgentResult] = {}

    async def go(path: str) -> None:
        results[path] = await agent.run(path, approve=lambda call: call.arguments["path"] == path and path > "5")

    async with anyio.create_task_group() as group:
        for n in range(10):
            group.start_soon(go, str(n))
    assert sorted(shelf.removed) == ["6", "7", "8", "9"]
    assert all(outcomes(result) == ["ok" if path > "5" else "denied"] for path, result in results.items())
