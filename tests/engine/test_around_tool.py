"""Hooks around tool calls: whoever registers them and however a call is made, none is made without them."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Awaitable, Callable
from typing import Any

import anyio
import pytest
import sniffio

from fractal import (
    AgentResult,
    Allow,
    Around,
    BaseAgent,
    Deny,
    InvalidArguments,
    Limits,
    NextCall,
    PendingCall,
    Reply,
    RunContext,
    ToolFailed,
    ToolIgnoredCancellation,
    ToolResult,
    sync,
    tool,
)
from fractal.testing import ScriptedModel, answers
from tests.engine.test_stubborn import HOLD, Stubborn
from tests.hooked import DIRECT, OF_HOOKS, RUNS, Looks, agent_of, by_decorator, in_thread
from tests.support import assert_continuable, outcomes, shown
from tests.without_uvloop import anyio_backend  # noqa: F401

KINDS: list[Any] = [BaseAgent, sync.BaseAgent]


def async_hook(seen: list[Any]) -> Any:
    async def hook(ctx: RunContext[Any], call: PendingCall, next: NextCall) -> ToolResult:
        seen.append((call.tool_name, dict(call.arguments)))
        result = await next(call.with_arguments(n=call.arguments["n"] + 10) if call.tool_name == "look" else None)
        seen.append(result.content)
        return result

    return hook


def plain_hook(seen: list[Any]) -> Any:
    def hook(ctx: RunContext[Any], call: PendingCall, next: Any) -> ToolResult:
        seen.append((call.tool_name, dict(call.arguments)))
        result: ToolResult = next(call.with_arguments(n=call.arguments["n"] + 10) if call.tool_name == "look" else None)
        seen.append(result.content)
        return result

    return hook


def handed_on_hook(seen: list[Any]) -> Any:
    inner = async_hook(seen)
    return lambda ctx, call, next: inner(ctx, call, next)  # nobody can see that it has to be awaited


def partial_hook(seen: list[Any]) -> Any:
    async def hook(first: str, ctx: RunContext[Any], call: PendingCall, next: NextCall) -> ToolResult:
        return await async_hook(seen)(ctx, call, next)

    return functools.partial(hook, "first")


class MethodHook:
    def __init__(self, seen: list[Any]) -> None:
        self._hook = async_hook(seen)

    async def __call__(self, ctx: RunContext[Any], call: PendingCall, next: NextCall) -> ToolResult:
        result: ToolResult = await self._hook(ctx, call, next)
        return result


FORMS: list[Callable[[list[Any]], Any]] = [async_hook, plain_hook, handed_on_hook, partial_hook, MethodHook]


# ---- whoever registers one, and however a call is made


@pytest.mark.parametrize("begin", RUNS, ids=shown)
@pytest.mark.parametrize("register", OF_HOOKS, ids=shown)
@pytest.mark.parametrize("kind", KINDS, ids=shown)
async def test_a_hook_is_around_the_calls_of_every_run(
    kind: Any, register: Callable[..., Any], begin: Callable[..., Awaitable[AgentResult]]
):
    looks, seen = Looks(), list[Any]()

    def make(of: Any = kind, **options: Any) -> Any:
        return agent_of(looks, of, **options)

    agent, options = register(make, "around_tool", async_hook(seen))
    with anyio.fail_after(30):
        result = await begin(agent, options)
    assert result.content == "done"
    assert seen == [("look", {"n": 1}), "seen 11"]
    assert looks.calls == [11]


@pytest.mark.parametrize("call", DIRECT, ids=shown)
@pytest.mark.parametrize("register", [each for each in OF_HOOKS if "run" not in each.__name__], ids=shown)
@pytest.mark.parametrize("kind", KINDS, ids=shown)
async def test_a_hook_is_around_calls_that_no_model_asks_for(
    kind: Any, register: Callable[..., Any], call: Callable[..., Awaitable[ToolResult]]
):
    looks, seen = Looks(), list[Any]()

    def make(of: Any = kind, **options: Any) -> Any:
        return agent_of(looks, of, **options)

    agent, _ = register(make, "around_tool", async_hook(seen))
    with anyio.fail_after(30):
        result = await call(agent, 2)
    assert (result.content, looks.calls) == ("seen 12", [12])
    assert [each for each in seen if each is not None and each[0] != "inner"] == [("look", {"n": 2}), "seen 12"]


@pytest.mark.parametrize("begin", RUNS, ids=shown)
@pytest.mark.parametrize("form", FORMS, ids=shown)
async def test_a_hook_may_be_any_function(form: Callable[..., Any], begin: Callable[..., Awaitable[AgentResult]]):
    looks, seen = Looks(), list[Any]()
    with anyio.fail_after(30):
        result = await begin(agent_of(looks, around_tool=form(seen)), {})
    assert (result.content, looks.calls, len(seen)) == ("done", [11], 2)


async def test_hooks_are_in_each_other_the_agents_outside():
    seen: list[str] = []

    def named(name: str) -> Any:
        async def hook(ctx: RunContext[Any], call: PendingCall, next: NextCall) -> ToolResult:
            seen.append(f"{name} in")
            result = await next()
            seen.append(f"{name} out")
            return result

        return hook

    agent = agent_of(Looks(), around_tool=named("first"))
    agent.around_tool(named("second"))
    await agent.run("go", around_tool=[named("third")])
    assert seen == ["first in", "second in", "third in", "third out", "second out", "first out"]


async def test_a_hook_that_is_added_twice_is_there_once():
    seen: list[Any] = []
    hook = async_hook(seen)
    agent = agent_of(Looks(), around_tool=[hook, hook])
    agent.around_tool(hook)
    await agent.run("go", around_tool=hook)
    assert (len(agent.around_tool), len(seen)) == (1, 2)


class Audited(BaseAgent):
    """An agent whose hook is a method of it."""

    def __init__(self, **options: Any) -> None:
        super().__init__("Audited", "You look.", client=ScriptedModel([answers.call("look", {}), "done"]), **options)
        self.seen: list[str] = []
        self.around_tool(self.audit)

    async def audit(self, ctx: RunContext[Any], call: PendingCall, next: NextCall) -> ToolResult:
        self.seen.append(call.tool_name)
        return await next()

    @tool
    def look(self) -> str:
        return "seen"


async def test_a_copy_of_an_agent_has_its_hooks_bound_to_itself():
    agent = Audited()
    copy = agent.replace(temperature=0)
    copy.seen = []
    await copy.run("go")
    assert (agent.seen, copy.seen) == ([], ["look"])


async def test_a_run_keeps_the_hooks_that_it_began_with():
    looks = Looks()
    agent = agent_of(looks)

    async def add(ctx: RunContext[Any]) -> str:
        agent.around_tool = [async_hook([])]
        return "You look."

    agent.system_prompt = add
    await agent.run("go")
    assert looks.calls == [1]
    await agent.run("go")
    assert looks.calls == [1, 11]


async def test_a_hook_that_is_given_again_for_delegates_holds_there_too():
    seen: list[Any] = []
    hook = async_hook(seen)
    above, _ = above_and_below(Looks(), around_tool=hook)
    above.around_tool(hook)
    above.around_tool(delegates=True)(hook)
    assert above.around_tool == (Around(hook, delegates=True),)
    await above.run("go")
    assert [each[0] for each in seen if isinstance(each, tuple)] == ["delegate_to_a", "look"]


# ---- delegates


def above_and_below(looks: Looks, **below: Any) -> tuple[BaseAgent, BaseAgent]:
    child = agent_of(looks, **below)
    ask = ScriptedModel([answers.call("delegate_to_a", {"query": "go"}), "done"])
    return BaseAgent("Above", "You ask.", client=ask).register_delegate(child), child


@pytest.mark.parametrize("where", ["agent", "run"])
@pytest.mark.parametrize("delegates", [False, True])
async def test_a_hook_holds_in_delegates_by_choice(delegates: bool, where: str):
    looks, seen = Looks(), list[str]()

    async def hook(ctx: RunContext[Any], call: PendingCall, next: NextCall) -> ToolResult:
        seen.append(f"{call.tool_name} at {ctx.depth}")
        return await next()

    above, _ = above_and_below(looks)
    options: dict[str, Any] = {}
    if where == "agent":
        above.around_tool(delegates=delegates)(hook)
    else:
        options["around_tool"] = Around(hook, delegates=delegates)
    await above.run("go", **options)
    assert seen == ["delegate_to_a at 0", *(["look at 1"] if delegates else [])]


async def test_a_hook_from_above_is_outside_of_a_delegates_own_and_both_reach_a_direct_call():
    looks, seen = Looks(), list[str]()

    def named(name: str) -> Any:
        async def hook(ctx: RunContext[Any], call: PendingCall, next: NextCall) -> ToolResult:
            seen.append(f"{name}: {call.tool_name}")
            return await next()

        return hook

    outer = named("above")
    above, child = above_and_below(looks, around_tool=[named("own"), outer])
    above.around_tool(delegates=True)(outer)

    async def ask_tool() -> Any:
        return (await child.execute_tool("look", n=3)).content

    above.add_tool(ask_tool)
    await above.run("go")
    assert seen == ["above: delegate_to_a", "above: look", "own: look"]
    seen.clear()
    assert (await above.execute_tool("ask_tool")).content == "seen 3"
    assert seen == ["above: ask_tool", "above: look", "own: look"]


# ---- what a hook may do


async def one_call(hook: Any, *, function: Any = None, **options: Any) -> AgentResult:
    looks = Looks()
    agent = agent_of(looks, around_tool=hook, **options)
    if function is not None:
        agent.add_tool(function, name="look", replace=True)
    result: AgentResult = await agent.run("go")
    assert_continuable(result)
    return result


class Point:
    def __init__(self, x: int) -> None:
        self.x = x

    def __str__(self) -> str:
        return f"point {self.x}"


def pieces() -> Any:
    yield "a"
    yield "b"


@pytest.mark.parametrize(
    ("answer", "content", "told"),
    [
        ("text", "text", "text"),
        ({"a": 1}, {"a": 1}, '{"a":1}'),
        (pieces, ["a", "b"], '["a","b"]'),
        (ToolResult(tool_name="x", content=7), 7, "7"),
        (ToolResult(tool_name="x", content=None), None, "null"),
        (ToolResult(tool_name="x", error="closed"), None, "Error: closed"),
        (ToolResult(tool_name="x", error="late", outcome="timeout"), None, "Error: late"),
        (Deny("not today"), None, "Error: denied: not today"),
    ],
    ids=shown,
)
async def test_a_hook_may_answer_in_the_place_of_the_tool(answer: Any, content: Any, told: str):
    async def hook(ctx: RunContext[Any], call: PendingCall, next: NextCall) -> Any:
        return answer() if answer is pieces else answer

    called: list[int] = []
    result = await one_call(hook, function=lambda n: called.append(n))
    assert (result.tool_results[0].content, result.messages[-2]["content"], called) == (content, told, [])
    assert result.tool_results[0].outcome == (
        "denied" if isinstance(answer, Deny) else answer.outcome if isinstance(answer, ToolResult) else "ok"
    )


async def test_a_hook_may_change_what_a_tool_returned_and_returns_it_unchanged_if_it_says_nothing():
    async def shout(ctx: RunContext[Any], call: PendingCall, next: NextCall) -> str:
        return (await next()).content.upper()

    async def look_on(ctx: RunContext[Any], call: PendingCall, next: NextCall) -> None:
        await next()

    assert (await one_call(shout)).messages[-2]["content"] == "SEEN 1"
    assert (await one_call([look_on, shout, look_on])).messages[-2]["content"] == "SEEN 1"


async def test_a_hook_may_call_again_until_it_works():
    tried: list[int] = []

    def shaky(n: int) -> str:
        tried.append(n)
        if len(tried) < 3:
            raise ConnectionError("offline")
        return "at last"

    async def again(ctx: RunContext[Any], call: PendingCall, next: NextCall) -> ToolResult:
        result = await next()
        while result.error is not None:
            assert isinstance(result.exception, ConnectionError)
            result = await next()
        return result

    result = await one_call(again, function=tool(on_error="raise")(shaky), limits=Limits(max_tool_calls=1))
    assert (result.content, tried, outcomes(result)) == ("done", [1, 1, 1], ["ok"])
    assert result.usage.tool_calls == 1


async def test_side_by_side_calls_of_next_are_calls_of_their_own():
    async def twice(ctx: RunContext[Any], call: PendingCall, next: NextCall) -> list[Any]:
        results: list[Any] = []

        async def one(n: int) -> None:
            results.append((await next(call.with_arguments(n=n))).content)

        async with anyio.create_task_group() as group:
            group.start_soon(one, 5)
            group.start_soon(one, 6)
        return sorted(results)

    assert (await one_call(twice)).tool_results[0].content == ["seen 5", "seen 6"]


@pytest.mark.parametrize("form", ["async", "plain"])
@pytest.mark.parametrize("on_error", ["model", "raise"])
async def test_what_a_hook_raises_is_the_failure_of_that_call(on_error: Any, form: str):
    async def refuse(ctx: RunContext[Any], call: PendingCall, next: NextCall) -> None:
        raise PermissionError("not allowed")

    def refuse_plainly(ctx: RunContext[Any], call: PendingCall, next: Any) -> None:
        raise PermissionError("not allowed")

    called: list[int] = []
    function = tool(on_error=on_error)(lambda n: called.append(n))
    result = await one_call(refuse if form == "async" else refuse_plainly, function=function)
    assert (outcomes(result), called) == (["error"], [])
    assert result.tool_results[0].error == "PermissionError: not allowed"
    if on_error == "raise":
        assert isinstance(result.exception, ToolFailed)
        assert isinstance(result.exception.__cause__, PermissionError)
    else:
        assert result.content == "done"


async def test_what_a_tool_raised_that_a_hook_hands_on_ends_a_run_by_the_tools_own_rule():
    @tool(on_error="raise")
    def broken(n: int) -> None:
        raise ValueError("broken")

    async def hand_on(ctx: RunContext[Any], call: PendingCall, next: NextCall) -> ToolResult:
        return await next()

    result = await one_call([hand_on, hand_on], function=broken)
    assert isinstance(result.exception, ToolFailed)
    assert isinstance(result.exception.__cause__, ValueError)


# ---- what a hook may not do


async def returns_nothing(ctx: RunContext[Any], call: PendingCall, next: NextCall) -> None: ...


async def allows(ctx: RunContext[Any], call: PendingCall, next: NextCall) -> Any:
    return Allow()


async def renames(ctx: RunContext[Any], call: PendingCall, next: NextCall) -> Any:
    return await next(PendingCall(tool_name="other", call_id=call.call_id, arguments={}, description=""))


async def gives_a_name(ctx: RunContext[Any], call: PendingCall, next: Any) -> Any:
    return await next("look")


@pytest.mark.parametrize(
    ("hook", "words"),
    [
        (returns_nothing, "returned None, and has not called next"),
        (allows, "which is for approve="),
        (renames, "takes that call"),
        (gives_a_name, "give the call, or nothing"),
    ],
    ids=shown,
)
async def test_a_hook_that_cannot_be_meant_is_told_so_and_the_call_is_not_made(hook: Any, words: str):
    called: list[int] = []
    result = await one_call(hook, function=lambda n: called.append(n))
    [made] = result.tool_results
    assert (made.outcome, called) == ("error", [])
    assert isinstance(made.exception, InvalidArguments)
    assert words in (made.error or "")


async def test_next_cannot_be_called_after_the_hook_has_ended():
    kept: list[NextCall] = []

    async def keep(ctx: RunContext[Any], call: PendingCall, next: NextCall) -> str:
        kept.append(next)
        return "kept"

    await one_call(keep)
    with pytest.raises(InvalidArguments, match="after its hook had ended"):
        await kept[0]()


@pytest.mark.parametrize("setting", ["around_tool", "around_model", "guard"])
def test_a_method_is_no_hook_of_its_class_and_says_where_to_make_it_one(setting: str):
    with pytest.raises(InvalidArguments, match=rf"self\.{setting}\(self\.method\) in __init__"):
        getattr(BaseAgent, setting)(takes_two)


async def takes_two(ctx: object, call: object) -> None: ...


async def takes_names(*, ctx: object, call: object, next: object) -> None: ...


def generates(ctx: object, call: object, next: object) -> Any:
    yield 1


async def generates_later(ctx: object, call: object, next: object) -> Any:
    yield 1


@pytest.mark.parametrize("hook", [takes_two, takes_names, generates, generates_later, 3, "x", [3], {}], ids=shown)
@pytest.mark.parametrize("setting", ["around_tool", "around_model"])
async def test_what_cannot_be_a_hook_is_refused_where_it_is_given(setting: str, hook: Any):
    if hook == {}:
        hook = {"a": 1}
    agent = BaseAgent("A", "a", client=ScriptedModel(["x"]))
    with pytest.raises(InvalidArguments, match=setting):
        BaseAgent("A", "a", **{setting: hook})
    with pytest.raises(InvalidArguments, match=setting):
        setattr(agent, setting, hook)
    with pytest.raises(InvalidArguments, match=setting):
        await agent.run("go", **{setting: hook})
    with pytest.raises(InvalidArguments):
        getattr(agent, setting)(hook)
    with pytest.raises(InvalidArguments, match="delegates"):
        getattr(agent, setting)(delegates="yes")(async_hook([]))
    assert agent.around_tool == agent.around_model == ()


def test_a_hook_of_which_nobody_knows_what_it_takes_may_be_one():
    assert Around(min).function is min  # it has no signature


# ---- arguments


async def test_changed_arguments_are_checked_as_the_models_are():
    async def change(ctx: RunContext[Any], call: PendingCall, next: NextCall) -> ToolResult:
        result = await next(call.with_arguments(n="many"))
        assert result.error is not None
        assert "does not fit: 'n'" in result.error
        return await next(call.with_arguments(n="4"))

    assert (await one_call(change)).tool_results[0].content == "seen 4"


async def test_arguments_that_a_hook_only_looks_at_arrive_as_they_were():
    async def look_on(ctx: RunContext[Any], call: PendingCall, next: NextCall) -> ToolResult:
        return await next(call)

    async def add(ctx: RunContext[Any], call: PendingCall, next: NextCall) -> ToolResult:
        call.arguments["points"].append(3)  # of a copy, that is handed on
        return await next(call)

    async def measure(points: list[int], at: set[int]) -> str:
        return f"{points} {sorted(at)}"

    model = ScriptedModel([answers.call("measure", {"points": [1, 2], "at": [5]}), "done"])
    agent = BaseAgent("A", "a", client=model, around_tool=[look_on, add, look_on]).add_tool(measure)
    result = await agent.run("go")
    assert result.tool_results[0].content == "[1, 2, 3] [5]"
    assert result.tool_results[0].metadata["arguments"] == {"points": [1, 2], "at": {5}}


async def test_hooks_in_each_other_change_parts_of_one_argument():
    def put(name: str) -> Any:
        async def hook(ctx: RunContext[Any], call: PendingCall, next: NextCall) -> ToolResult:
            return await next(call.with_arguments(options={**call.arguments["options"], name: len(name)}))

        return hook

    async def configure(options: dict[str, int]) -> str:
        return str(options)

    model = ScriptedModel([answers.call("configure", {"options": {"a": 0, "bb": 0}}), "done"])
    agent = BaseAgent("A", "a", client=model, around_tool=[put("a"), put("bb")]).add_tool(configure)
    assert (await agent.run("go")).tool_results[0].content == "{'a': 1, 'bb': 2}"


async def test_calls_that_do_not_fit_and_the_tool_that_takes_the_answer_have_no_hooks():
    seen: list[Any] = []
    script = [answers.call("look", {"n": "x"}), answers.call("nothing"), answers.call("final_answer", {"result": 3})]
    agent = agent_of(Looks(), client=ScriptedModel(script), around_tool=async_hook(seen), output_mode="tool")
    result = await agent.run("go", output_type=int)
    assert (result.content, seen) == (3, [])


# ---- where a hook stands


@pytest.mark.parametrize("change", [False, True])
async def test_a_hook_is_inside_of_the_approval_and_changes_nothing_that_was_approved(change: bool):
    order: list[str] = []

    async def hook(ctx: RunContext[Any], call: PendingCall, next: NextCall) -> ToolResult:
        order.append(f"hook {call.arguments['n']}")
        return await next(call.with_arguments(n=100) if change else call)

    async def pay(n: int) -> str:
        order.append(f"pay {n}")
        return "paid"

    def approve(call: PendingCall) -> Allow:
        order.append(f"approve {call.arguments['n']}")
        return Allow({"n": 2})

    result = await one_call(hook, function=tool(requires_approval=True)(pay), approve=approve)
    if change:
        assert order == ["approve 1", "hook 2"]
        assert "was approved with other arguments" in (result.tool_results[0].error or "")
    else:
        assert order == ["approve 1", "hook 2", "pay 2"]


async def test_no_hook_is_around_a_call_that_was_denied_or_is_over_the_budget():
    seen: list[Any] = []
    looks = Looks()
    pay = tool(requires_approval=True)(lambda n: looks.calls.append(n))
    result = await one_call(async_hook(seen), function=pay, approve=lambda call: False)
    assert (outcomes(result), seen) == (["denied"], [])
    result = await one_call(async_hook(seen), limits=Limits(max_tool_calls=0))
    assert (outcomes(result), seen) == (["skipped"], [])


async def test_the_time_of_a_call_is_that_of_all_its_hooks_and_tries():
    async def try_for_ever(ctx: RunContext[Any], call: PendingCall, next: NextCall) -> Any:
        assert ctx.remaining() < 60
        while True:
            await next()

    @tool(timeout=0.05)
    async def wait(n: int) -> None:
        await anyio.sleep(0.02)

    result = await one_call(try_for_ever, function=wait)
    assert outcomes(result) == ["timeout"]
    assert result.content == "done"


async def test_a_place_of_a_tool_with_a_limit_is_held_by_the_tool_alone():
    async def next_to_each_other(ctx: RunContext[Any], call: PendingCall, next: NextCall) -> Any:
        result = await next()
        arrived.append(call.call_id)
        if len(arrived) == 2:
            both.set()
        await both.wait()
        return result

    @tool(max_concurrency=1)
    async def look(n: int) -> int:
        return n

    arrived, both = list[str](), anyio.Event()
    script = ScriptedModel([[answers.call("look", {"n": 1}), answers.call("look", {"n": 2})], "done"])
    agent = BaseAgent("A", "a", client=script, around_tool=next_to_each_other).add_tool(look)
    with anyio.fail_after(10):
        assert [each.content for each in (await agent.run("go")).tool_results] == [1, 2]


async def test_an_overridden_execute_tool_is_outside_of_the_hooks():
    order: list[str] = []

    class Own(BaseAgent):
        async def execute_tool(self, tool_name: str, /, **arguments: Any) -> ToolResult:
            order.append("verb")
            return await super().execute_tool(tool_name, **arguments)

    async def hook(ctx: RunContext[Any], call: PendingCall, next: NextCall) -> ToolResult:
        order.append("hook")
        return await next()

    looks = Looks()
    agent = agent_of(looks, Own, around_tool=hook)
    assert (await agent.run("go")).content == "done"
    assert (await agent.execute_tool("look", n=2)).content == "seen 2"
    assert (order, looks.calls) == (["verb", "hook"] * 2, [1, 2])


async def test_a_call_with_hooks_is_told_of_once():
    events: list[Any] = []
    agent = agent_of(Looks(), around_tool=[async_hook([]), plain_hook([])], observers=[events.append])
    await agent.run("go")
    kinds = [event.kind for event in events]
    assert (kinds.count("tool_started"), kinds.count("tool_finished")) == (1, 1)
    assert next(event for event in events if event.kind == "tool_started").arguments == {"n": 1}
    assert next(event for event in events if event.kind == "tool_finished").result.content == "seen 21"


async def test_the_context_of_a_hook_is_that_of_the_call():
    async def hook(ctx: RunContext[Any], call: PendingCall, next: NextCall) -> Any:
        assert ctx.call_id == call.call_id == "c1"
        return [ctx.tool_name, ctx.deps, ctx.agent.name, call.description, ctx.messages[-1]["role"]]

    agent = agent_of(Looks(), around_tool=hook)
    result = await agent.run("go", deps=5)
    assert result.tool_results[0].content == ["look", 5, "A", "Look.", "assistant"]


# ---- cancellation


async def test_a_hook_that_does_not_wait_for_its_tool_has_cancelled_it():
    ended: list[str] = []

    async def hurry(ctx: RunContext[Any], call: PendingCall, next: NextCall) -> Any:
        with anyio.move_on_after(0.01):
            return await next()
        return "too slow"

    async def slow(n: int) -> None:
        try:
            await anyio.sleep(60)
        finally:
            ended.append("cleaned up")

    result = await one_call(hurry, function=slow)
    assert (result.tool_results[0].content, ended) == ("too slow", ["cleaned up"])


async def test_a_thread_that_a_hook_does_not_wait_for_is_listed():
    import threading

    go_on = threading.Event()

    async def hurry(ctx: RunContext[Any], call: PendingCall, next: NextCall) -> Any:
        with anyio.move_on_after(0.05):
            return await next()
        return "too slow"

    try:
        result = await one_call([hurry, async_hook([])], function=lambda n: go_on.wait(20))
        assert result.tool_results[0].content == "too slow"
        assert [each.tool_name for each in result.abandoned] == ["look"]
    finally:
        go_on.set()


@pytest.mark.parametrize("form", ["async", "plain"])
async def test_a_run_that_is_cancelled_cancels_the_tool_inside_of_the_hooks(form: str):
    ended, begun = list[str](), anyio.Event()

    async def slow(n: int) -> None:
        begun.set()
        try:
            await anyio.sleep(60)
        finally:
            ended.append("tool")

    async def hook(ctx: RunContext[Any], call: PendingCall, next: NextCall) -> Any:
        try:
            return await next()
        finally:
            ended.append("hook")

    def hook_plainly(ctx: RunContext[Any], call: PendingCall, next: Any) -> Any:
        return next()

    agent = agent_of(Looks(), around_tool=hook if form == "async" else hook_plainly)
    agent.add_tool(slow, name="look", replace=True)
    with anyio.fail_after(10):
        async with anyio.create_task_group() as group:
            group.start_soon(agent.run, "go")
            await begun.wait()
            group.cancel_scope.cancel()
    assert ended == (["tool", "hook"] if form == "async" else ["tool"])


async def test_plain_hooks_of_many_calls_do_not_use_up_the_threads():
    from fractal._concurrency.gates import WORKER_THREADS

    def hook(ctx: RunContext[Any], call: PendingCall, next: Any) -> Any:
        return next()

    asked = [answers.call("look", {"n": n}) for n in range(WORKER_THREADS + 20)]
    agent = agent_of(Looks(), client=ScriptedModel([asked, "done"]), around_tool=[hook])
    agent.around_tool(lambda ctx, call, next: next())
    with anyio.fail_after(60):
        result = await agent.run("go")
    assert {each.outcome for each in result.tool_results} == {"ok"}


async def test_a_blocking_agent_has_the_same_hooks():
    looks, seen = Looks(), list[Any]()
    agent = agent_of(looks, sync.BaseAgent)

    @agent.around_tool
    def hook(ctx: RunContext[Any], call: PendingCall, next: Any) -> Any:
        seen.append(call.tool_name)
        return next()

    result = await in_thread(lambda: agent.run("go"))
    assert (result.content, seen, looks.calls) == ("done", ["look"], [1])
    assert by_decorator(lambda: agent, "around_tool", hook)[0] is agent


@pytest.mark.parametrize("form", ["async", "plain"])
async def test_a_tool_that_does_not_stop_is_named_through_its_hooks_and_left(form: str):
    async def hook(ctx: RunContext[Any], call: PendingCall, next: NextCall) -> Any:
        return await next()

    def hook_plainly(ctx: RunContext[Any], call: PendingCall, next: Any) -> Any:
        return next()

    agent = Stubborn(HOLD, limits=Limits(grace=0.05, on_stubborn="raise"))
    agent.around_tool(hook if form == "async" else hook_plainly)
    with anyio.fail_after(10), pytest.raises(ToolIgnoredCancellation, match=r"'hold'.*test_stubborn\.py") as caught:
        await agent.run("go", timeout=0.05)
    assert [each.tool_name for each in caught.value.result.abandoned] == ["hold"]
    await agent.let_go()


async def test_what_a_hook_makes_of_a_terminating_tool_is_the_answer():
    async def double(ctx: RunContext[Any], call: PendingCall, next: NextCall) -> Any:
        return (await next()).content * 2

    result = await one_call(double, function=tool(terminate=True)(lambda n: [n]))
    assert (result.content, result.stop_reason) == ([1, 1], "terminated")


@pytest.mark.parametrize("setting", ["around_tool", "around_model"])
async def test_a_hook_may_await_next_as_asyncio_does(setting: str):
    if sniffio.current_async_library() != "asyncio":
        pytest.skip("asyncio's own")
    import asyncio

    ended: list[str] = []

    async def slow(n: int) -> str:
        try:
            await asyncio.sleep(60 if len(ended) < 2 else 0)
        finally:
            await asyncio.sleep(0)
            ended.append("cleaned up")
        return "at last"

    class Slow:
        async def respond(self, request: Any) -> Reply:
            return Reply(text=await slow(1))

    async def hurry(ctx: RunContext[Any], call: Any, next: Any) -> Any:
        with contextlib.suppress(asyncio.TimeoutError):
            return await asyncio.wait_for(next(), 0.02)
        task = asyncio.ensure_future(next())
        await asyncio.sleep(0.02)
        task.cancel()
        await asyncio.wait([task])
        assert task.cancelled()
        [result] = await asyncio.gather(next())
        return result

    if setting == "around_tool":
        result = (await one_call(hurry, function=slow)).tool_results[0]
    else:
        result = await agent_of(Looks(), client=Slow(), around_model=hurry).run("go")
    assert (result.content, ended) == ("at last", ["cleaned up"] * 3)
