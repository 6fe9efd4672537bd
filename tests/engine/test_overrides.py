"""What a subclass overrides of the verbs is called by everybody who does the same thing, or refused with a word."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Any

import anyio
import pytest

from fractal import (
    AgentResult,
    BaseAgent,
    InvalidArguments,
    Limits,
    RunContext,
    ToolResult,
    UserError,
    run_many,
    stream_many,
    sync,
    tool,
)
from fractal.testing import ScriptedModel, answers
from tests.support import shown
from tests.without_uvloop import anyio_backend  # noqa: F401


def script(request: Any) -> Any:
    last = request.transcript.messages[-1]
    return "done" if last["role"] == "tool" else answers.call("delete", {"path": "/"})


class Deleting:
    """What both kinds of guarded agents do."""

    def note(self: Any, what: str) -> None:
        vars(self).setdefault("called", []).append(what)

    @tool
    def delete(self: Any, path: str, force: bool = False) -> str:
        self.note(f"delete {path}")
        return f"DELETED {path}"


class Guarded(Deleting, BaseAgent):
    async def execute_tool(self, tool_name: str, /, **arguments: Any) -> ToolResult:
        self.note(f"execute_tool {tool_name}")
        if arguments.get("path") == "/":
            raise PermissionError("not allowed")
        return await super().execute_tool(tool_name, **arguments)

    async def run(self, *arguments: Any, **options: Any) -> AgentResult:
        self.note("run")
        result = await super().run(*arguments, **options)
        return result.model_copy(update={"content": f"audited {result.content}"})


class Blocking(Deleting, sync.BaseAgent):
    def execute_tool(self, tool_name: str, /, **arguments: Any) -> ToolResult:
        self.note(f"execute_tool {tool_name}")
        if arguments.get("path") == "/":
            raise PermissionError("not allowed")
        return super().execute_tool(tool_name, **arguments)

    def run(self, *arguments: Any, **options: Any) -> AgentResult:
        self.note("run")
        result = super().run(*arguments, **options)
        return result.model_copy(update={"content": f"audited {result.content}"})


KINDS: list[Any] = [Guarded, Blocking]


async def in_thread(function: Callable[[], Any]) -> Any:
    return await anyio.to_thread.run_sync(function)


async def by_verb(agent: Any) -> AgentResult:
    return await (agent.run("x") if isinstance(agent, BaseAgent) else in_thread(lambda: agent.run("x")))


async def by_call(agent: Any) -> AgentResult:
    return await (agent("x") if isinstance(agent, BaseAgent) else in_thread(lambda: agent("x")))


async def by_run_sync(agent: Any) -> AgentResult:
    return await in_thread(lambda: agent.run_sync("x"))


async def by_facade(agent: Any) -> AgentResult:
    return await in_thread(lambda: sync.run(agent, "x"))


async def by_handle(agent: Any) -> AgentResult:
    return await in_thread(lambda: sync.start(agent, "x").result(20))


async def by_many(agent: Any) -> AgentResult:
    return (await run_many(agent, ["x"]))[0]


async def by_stream_many(agent: Any) -> AgentResult:
    async with stream_many(agent, ["x"]) as batch:
        return [item async for item in batch].pop().result


async def by_blocking_many(agent: Any) -> AgentResult:
    return (await in_thread(lambda: sync.run_many(agent, ["x"])))[0]


async def by_stream(agent: Any) -> AgentResult:
    if not isinstance(agent, BaseAgent):
        return await by_blocking_stream(agent)
    async with agent.stream("x") as stream:
        events = [event async for event in stream]
    assert (events[0].kind, events[0].run_id) == ("run_started", stream.run_id)
    result = await stream.result()
    assert events[-1].kind == "run_finished"
    assert events[-1].result == result
    return result


async def by_blocking_stream(agent: Any) -> AgentResult:
    def read() -> AgentResult:
        with sync.stream(agent, "x") as stream:
            text = "".join(stream.text())
        assert text == stream.result().content
        return stream.result()

    return await in_thread(read)


async def by_delegation(agent: Any) -> AgentResult:
    ask = ScriptedModel([answers.call("ask", {"query": "x"}), "done"])
    above = BaseAgent("Above", "a", client=ask).register_delegate(agent, tool_name="ask")
    return AgentResult(agent_name="x", content=(await above.run("x")).tool_results[0].content)


async def by_call_agent(agent: Any) -> AgentResult:
    return await BaseAgent("Above", "a").call_agent(agent, "x")


WAYS: list[Callable[[Any], Awaitable[AgentResult]]] = [
    by_verb,
    by_call,
    by_run_sync,
    by_facade,
    by_handle,
    by_many,
    by_stream_many,
    by_blocking_many,
    by_stream,
    by_blocking_stream,
    by_delegation,
    by_call_agent,
]


@pytest.mark.parametrize("way", WAYS, ids=shown)
@pytest.mark.parametrize("kind", KINDS, ids=shown)
async def test_overridden_verbs_are_called_in_every_way(kind: Any, way: Callable[[Any], Awaitable[AgentResult]]):
    agent = kind("G", "p", client=ScriptedModel(script))
    with anyio.fail_after(30):
        result = await way(agent)
    assert agent.called == ["run", "execute_tool delete"]
    assert result.content == "audited done"
    if result.tool_results:
        [refused] = result.tool_results
        assert (refused.outcome, refused.error) == ("error", "PermissionError: not allowed")


@pytest.mark.parametrize("kind", KINDS, ids=shown)
async def test_what_a_guard_lets_through_is_one_call_in_every_respect(kind: Any):
    events: list[Any] = []
    model = ScriptedModel(
        lambda r: (
            "done" if r.transcript.messages[-1]["role"] == "tool" else answers.call("delete", {"path": "/a"}, id="c1")
        )
    )
    agent = kind("G", "p", client=model, observers=[events.append], limits=Limits(max_tool_calls=1))
    result = await by_verb(agent)
    assert agent.called == ["run", "execute_tool delete", "delete /a"]
    [made] = result.tool_results
    assert (made.content, made.call_id, made.outcome) == ("DELETED /a", "c1", "ok")
    assert made.metadata == {"arguments": {"path": "/a"}, "terminate": False}
    assert result.usage.tool_calls == 1
    kinds = [event.kind for event in events]
    assert (kinds.count("tool_started"), kinds.count("tool_finished")) == (1, 1)
    assert result.messages[-2]["content"] == "DELETED /a"


@pytest.mark.parametrize("way", ["verb", "facade", "toolkit", "tool", "thread"])
async def test_a_direct_call_goes_through_the_guard_once(way: str):
    agent: Any = Guarded("G", "p")

    async def call() -> Any:
        arguments = {"path": "/a"}
        match way:
            case "verb":
                return await agent.execute_tool("delete", **arguments)
            case "toolkit":
                return await agent.toolkit.execute_tool("delete", **arguments)
            case _:
                return await in_thread(lambda: sync.execute_tool(agent, "delete", **arguments))

    if way == "tool":  # of the same agent, in a run of it

        async def clean() -> Any:
            return (await agent.execute_tool("delete", path="/a")).content

        agent.add_tool(clean)
        agent.client = ScriptedModel([answers.call("clean", {}), "done"])
        result = await agent.run("x")
        assert result.tool_results[0].content == "DELETED /a"
        assert agent.called == ["run", "execute_tool clean", "execute_tool delete", "delete /a"]
        return
    assert (await call()).content == "DELETED /a"
    assert agent.called == ["execute_tool delete", "delete /a"]


async def test_a_tool_that_calls_itself_by_the_verb_goes_through_the_guard_each_time():
    class Deep(BaseAgent):
        depths: list[int]

        @tool
        async def dig(self, depth: int) -> str:
            return "gold" if depth == 0 else (await self.execute_tool("dig", depth=depth - 1)).content

        async def execute_tool(self, tool_name: str, /, **arguments: Any) -> ToolResult:
            self.depths.append(arguments["depth"])
            return await super().execute_tool(tool_name, **arguments)

    agent = Deep("D", "p", client=ScriptedModel([answers.call("dig", {"depth": 2}), "done"]))
    agent.depths = []
    result = await agent.run("x")
    assert (agent.depths, result.tool_results[0].content) == ([2, 1, 0], "gold")


async def test_a_guard_may_change_what_goes_in_and_what_comes_out():
    class Changing(Deleting, BaseAgent):
        async def execute_tool(self, tool_name: str, /, **arguments: Any) -> ToolResult:
            path = "/safe" + arguments.pop("path")
            wrong = await super().execute_tool(tool_name, path=[])
            assert "does not fit" in (wrong.error or "")
            result = await super().execute_tool(tool_name, path=path, **arguments)
            return result.model_copy(update={"content": result.content.lower()})

    agent: Any = Changing("C", "p", client=ScriptedModel(script))
    result = await agent.run("x")
    assert agent.called == ["delete /safe/"]
    assert (result.tool_results[0].content, result.messages[-2]["content"]) == ("deleted /safe/", "deleted /safe/")


async def test_parameters_of_a_tool_may_have_the_names_of_ours():
    class Plain(BaseAgent):
        @tool
        def use(self, blocks: int, warn: int, override: int, argument: int, call: int, name: int) -> int:
            return blocks + warn + override + argument + call + name

        async def execute_tool(self, tool_name: str, /, **arguments: Any) -> ToolResult:
            return await super().execute_tool(tool_name, **arguments)

    names = dict.fromkeys(("blocks", "warn", "override", "argument", "call", "name"), 1)
    agent = Plain("P", "p", client=ScriptedModel([answers.call("use", names), "done"]))
    assert (await agent.run("x")).tool_results[0].content == 6
    assert (await in_thread(lambda: sync.execute_tool(agent, "use", **names))).content == 6


async def test_calls_of_unknown_tools_and_with_wrong_arguments_go_through_the_guard_too():
    class Dynamic(BaseAgent):
        def get_tool_schemas(self) -> list[dict[str, Any]]:
            function = {"name": "made_up", "description": "", "parameters": {"type": "object", "properties": {}}}
            return [*super().get_tool_schemas(), {"type": "function", "function": function}]

        async def execute_tool(self, tool_name: str, /, **arguments: Any) -> ToolResult:
            if tool_name == "made_up":
                return ToolResult(tool_name=tool_name, content={"got": arguments})
            return await super().execute_tool(tool_name, **arguments)

    async def size(text: str) -> int:
        return len(text)

    calls = answers.calls(
        answers.call("made_up", {"a": 1}),
        answers.call("size", {"text": [1]}),
        answers.call("nothing", {}),
        answers.call("size", {"text": "abc"}),
    )
    model = ScriptedModel([calls, "done"])
    result = await Dynamic("D", "p", client=model).add_tool(size).run("x")
    assert [each.content for each in result.tool_results] == [{"got": {"a": 1}}, None, None, 3]
    assert "does not fit" in (result.tool_results[1].error or "")
    assert "no tool 'nothing'" in (result.tool_results[2].error or "")
    assert [each["function"]["name"] for each in model.requests[0]["tools"]] == ["size", "made_up"]


async def test_a_tool_that_is_not_offered_is_not_called():
    class Shy(Deleting, BaseAgent):
        def get_tool_schemas(self) -> list[dict[str, Any]]:
            return [each for each in super().get_tool_schemas() if each["function"]["name"] != "delete"]

    agent: Any = Shy("S", "p", client=ScriptedModel(script))
    agent.add_tool(len, name="size")
    result = await agent.run("x")
    assert "no tool 'delete'" in (result.tool_results[0].error or "")
    assert not hasattr(agent, "called")


class Hiding:
    """What both kinds of agents do that choose what a model is offered."""

    def get_tool_schemas(self: Any) -> list[dict[str, Any]]:
        found: list[dict[str, Any]] = super().get_tool_schemas()  # type: ignore[misc]
        return [each for each in found if each["function"]["name"] != "delete"]


class HidesAwaiting(Hiding, Deleting, BaseAgent):
    pass


class HidesBlocking(Hiding, Deleting, sync.BaseAgent):
    pass


@pytest.mark.parametrize("way", WAYS, ids=shown)
@pytest.mark.parametrize("kind", [HidesAwaiting, HidesBlocking], ids=shown)
async def test_what_is_not_offered_is_in_no_request_and_not_called_in_every_way(
    kind: Any, way: Callable[[Any], Awaitable[AgentResult]]
):
    model = ScriptedModel(script)
    agent = kind("H", "p", client=model)
    agent.add_tool(len, name="size")
    with anyio.fail_after(30):
        result = await way(agent)
    assert result.content == "done"
    offered = [[each["function"]["name"] for each in request["tools"]] for request in model.requests]
    assert offered == [["size"], ["size"]]
    assert not hasattr(agent, "called")


class Waiting:
    @tool
    async def wait(self: Any) -> str:
        self.begun = True
        await anyio.sleep_forever()
        return ""


class Slow(Waiting, BaseAgent):
    async def execute_tool(self, tool_name: str, /, **arguments: Any) -> ToolResult:
        return await super().execute_tool(tool_name, **arguments)


class SlowBlocking(Waiting, sync.BaseAgent):
    def execute_tool(self, tool_name: str, /, **arguments: Any) -> ToolResult:
        return super().execute_tool(tool_name, **arguments)


@pytest.mark.parametrize("kind", [Slow, SlowBlocking], ids=shown)
async def test_a_guard_that_waits_is_cut_with_its_run(kind: Any):
    agent = kind("S", "p", client=ScriptedModel(lambda request: answers.call("wait", {})), timeout=0.2)
    with anyio.fail_after(20):
        result = await by_verb(agent)
    assert (result.stop_reason, result.tool_results[0].outcome, agent.begun) == ("deadline", "timeout", True)
    assert result.abandoned == []
    if kind is Slow:
        agent.timeout = None
        with anyio.move_on_after(0.2) as scope:
            await agent.run("x")
        assert scope.cancelled_caught


async def test_a_terminating_tool_ends_the_run_through_a_guard():
    class Last(BaseAgent):
        @tool(terminate=True)
        def last(self) -> str:
            return "the end"

        async def execute_tool(self, tool_name: str, /, **arguments: Any) -> ToolResult:
            return await super().execute_tool(tool_name, **arguments)

    result = await Last("L", "p", client=ScriptedModel([answers.call("last", {})])).run("x")
    assert (result.content, result.stop_reason) == ("the end", "terminated")


async def test_what_is_replaced_on_an_agent_counts_as_overridden(monkeypatch: pytest.MonkeyPatch):
    called: list[str] = []
    agent: Any = Deleted("D", "p", client=ScriptedModel(script))
    execute_tool = agent.execute_tool

    async def watched(tool_name: str, /, **arguments: Any) -> ToolResult:
        called.append("object")
        return await execute_tool(tool_name, **arguments)

    agent.execute_tool = watched
    assert (await agent.run("x")).tool_results[0].content == "DELETED /"
    of_class = BaseAgent.execute_tool

    async def everywhere(self: Any, tool_name: str, /, **arguments: Any) -> ToolResult:
        called.append("class")
        return await of_class(self, tool_name, **arguments)

    monkeypatch.setattr(BaseAgent, "execute_tool", everywhere)
    assert (await Deleted("D", "p", client=ScriptedModel(script)).run("x")).tool_results[0].content == "DELETED /"
    assert called == ["object", "class"]


class Deleted(Deleting, BaseAgent):
    pass


async def test_a_run_that_raises_is_a_failure_of_its_input_alone():
    class Picky(BaseAgent):
        async def run(self, user_input: Any, **options: Any) -> AgentResult:
            if user_input == "bad":
                raise PermissionError("not you")
            if user_input == "wrong":
                return "text"  # type: ignore[return-value]
            return await super().run(user_input, **options)

    agent = Picky("P", "p", client=ScriptedModel(lambda request: "ok"))
    results = await run_many(agent, ["a", "bad", "b"])
    assert [result.success for result in results] == [True, False, True]
    assert isinstance(results[1].exception.__cause__, PermissionError)  # type: ignore[union-attr]
    for ask in (lambda: agent.run("bad"), lambda: in_thread(lambda: sync.run(agent, "bad"))):
        with pytest.raises(PermissionError):
            await ask()
    with pytest.raises(InvalidArguments, match=r"Picky\.run returned 'text'"):
        await run_many(agent, ["wrong"])
    async with agent.stream("bad") as stream:
        with pytest.raises(PermissionError):
            await stream.result()


async def test_a_stream_of_an_overridden_run_that_asks_twice_or_never():
    class Often(BaseAgent):
        times = 2

        async def run(self, user_input: Any, **options: Any) -> AgentResult:
            result = AgentResult(agent_name="cache", content="cached")
            for _ in range(self.times):
                result = await super().run(user_input, **options)
            return result

    agent = Often("O", "p", client=ScriptedModel(lambda request: "ok"))
    async with agent.stream("x") as stream:
        assert [text async for text in stream.text()] == ["ok"]
    assert (await stream.result()).run_id == stream.run_id
    agent.times = 0
    async with agent.stream("x") as stream:
        assert [event async for event in stream] == []
    assert (await stream.result()).content == "cached"
    assert stream.ended is not None


def redacted(base: type[Any], **further: Any) -> Any:
    """An agent whose own `run` takes a secret out of what it lets out."""

    def clean(result: AgentResult) -> AgentResult:
        content = result.content
        clean: Any = content.replace("hunter2", "***") if isinstance(content, str) else "***"
        return result.model_copy(update={"content": clean, "messages": [], "metadata": {}, "tool_results": []})

    class Redacts(base):  # type: ignore[misc]
        if base is BaseAgent:

            async def run(self, *arguments: Any, **options: Any) -> AgentResult:
                return clean(await super().run(*arguments, **options))
        else:

            def run(self, *arguments: Any, **options: Any) -> AgentResult:
                return clean(super().run(*arguments, **options))

    for name, value in further.items():
        setattr(Redacts, name, value)
    model = ScriptedModel(
        [answers.calls(answers.call("look"), text="it is hunter2"), answers.text("the word is hunter2")]
    )
    agent = Redacts("R", "p", client=model)

    @agent.add_tool
    def look() -> str:
        return "looked"

    return agent


@pytest.mark.parametrize("base", [BaseAgent, sync.BaseAgent], ids=shown)
@pytest.mark.parametrize("way", ["events", "text", "taken", "blocking"])
async def test_a_stream_shows_nothing_that_an_overridden_run_takes_out(base: Any, way: str):
    agent = redacted(base)

    def read_blocking() -> tuple[str, Any]:
        with sync.stream(agent, "x", buffer=0) as stream:
            return repr(list(stream)), stream.result()

    if way == "blocking" or base is sync.BaseAgent:
        told, result = await in_thread(read_blocking)
    else:
        async with agent.stream("x", buffer=0 if way == "taken" else 64) as stream:
            if way == "text":
                told = "".join([text async for text in stream.text()])
                assert told == "the word is ***"
            elif way == "taken":
                told = ""
                while events := await stream.take():
                    told += repr(events)
            else:
                told = repr([event async for event in stream])
        result = await stream.result()
    assert "hunter2" not in told
    assert "***" in told
    assert way == "text" or "ToolStarted" in told
    assert result.content == "the word is ***"


@pytest.mark.parametrize("base", [BaseAgent, sync.BaseAgent], ids=shown)
@pytest.mark.parametrize("way", ["delegate", "call_agent", "run in a tool", "batch in a tool", "handle in a tool"])
async def test_a_stream_shows_nothing_that_the_run_of_a_delegate_takes_out(base: Any, way: str):
    below = redacted(base)

    async def ask() -> Any:
        if way == "call_agent":
            return (await above.call_agent(below, "x")).content
        if way == "batch in a tool":
            return [result.content for result in await run_many(below, ["x"])]
        if way == "handle in a tool":
            return (await in_thread(lambda: sync.start(below, "x").result(10))).content
        return (await below.run("x") if base is BaseAgent else await in_thread(lambda: below.run("x"))).content

    model = ScriptedModel([answers.call("ask", {"query": "x"} if way == "delegate" else {}), "done"])
    above = BaseAgent("Above", "a", client=model)
    if way == "delegate":
        above.register_delegate(below, "ask")
    else:
        above.add_tool(ask)
    async with above.stream("x") as stream:
        events = [event async for event in stream]
    assert "hunter2" not in repr(events)
    assert "the word is ***" in repr(events)
    assert [event.depth for event in events if event.kind == "run_finished"] == [1, 0]


@pytest.mark.parametrize("base", [BaseAgent, sync.BaseAgent], ids=shown)
async def test_a_class_that_overrides_run_and_stream_shows_pieces_as_they_come(base: Any):
    def stream(self: Any, *arguments: Any, **options: Any) -> Any:
        return base.stream(self, *arguments, **options)

    agent = redacted(base, stream=stream)

    def read() -> list[str]:
        with sync.stream(agent, "x") as stream:
            return list(stream.text())

    assert "hunter2" in "".join(await in_thread(read))


async def test_an_overridden_run_that_raises_lets_nothing_out():
    class Raises(BaseAgent):
        async def run(self, *arguments: Any, **options: Any) -> AgentResult:
            await super().run(*arguments, **options)
            raise PermissionError("there was a secret in it")

    events: list[Any] = []
    async with Raises("R", "p", client=ScriptedModel(["hunter2"])).stream("x") as stream:
        with pytest.raises(PermissionError):
            async for event in stream:
                events.append(event)  # noqa: PERF401 - those before it raises
    assert "hunter2" not in repr(events)
    assert [event.kind for event in events if event.kind.startswith("run_")] == ["run_started", "run_finished"]


async def test_the_growing_answer_of_an_overridden_run_is_what_it_returns():
    class Older(BaseAgent):
        async def run(self, *arguments: Any, **options: Any) -> AgentResult:
            result = await super().run(*arguments, **options)
            return result.model_copy(update={"content": [0, *result.content[1:]]})

    agent = Older("O", "p", client=ScriptedModel(['{"result": [42, 7]}']), output_type=list[int])
    async with agent.stream("x") as stream:
        assert [value async for value in stream.partial()] == [[0, 7]]


async def test_leaving_a_stream_ends_an_overridden_run():
    ended = anyio.Event()

    class Waits(BaseAgent):
        async def run(self, user_input: Any, **options: Any) -> AgentResult:
            try:
                return await super().run(user_input, **options)
            finally:
                ended.set()

    async def wait() -> None:
        await anyio.sleep_forever()

    agent = Waits("W", "p", client=ScriptedModel([answers.call("wait", {})])).add_tool(wait)
    async with agent.stream("x") as stream:
        async for event in stream:
            if event.kind == "tool_started":
                break
    assert ended.is_set()
    assert (await stream.result()).stop_reason == "cancelled"


async def test_runs_below_are_not_taken_for_the_run_of_a_stream():
    class Twice(BaseAgent):
        async def run(self, user_input: Any, **options: Any) -> AgentResult:
            return await super().run(user_input, **options)

        @tool
        async def again(self, ctx: RunContext) -> Any:
            return (await self.run("deeper")).content

    model = ScriptedModel([answers.call("again", {}), "below", "above"])
    async with Twice("T", "p", client=model).stream("x") as stream:
        events = [event async for event in stream]
    assert [event.depth for event in events if event.kind == "run_finished"] == [1, 0]
    assert len({event.run_id for event in events}) == 2
    assert (await stream.result()).content == "above"


def test_an_overridden_stream_is_called_by_the_facade():
    class Terse(BaseAgent):
        def stream(self, user_input: Any, **options: Any) -> Any:
            return super().stream(f"{user_input}, in one word", **options)

    class TerseBlocking(sync.BaseAgent):
        def stream(self, user_input: Any, **options: Any) -> Any:
            return super().stream(f"{user_input}, in one word", **options)

    class Wrong(BaseAgent):
        def stream(self, *arguments: Any, **options: Any) -> Any:
            return ["text"]

    for kind in (Terse, TerseBlocking):
        model = ScriptedModel(["ok"])
        with sync.stream(kind("T", "p", client=model), "x", timeout=30) as stream:
            assert list(stream.text()) == ["ok"]
        assert model.requests[0]["messages"][-1]["content"] == "x, in one word"
    with pytest.raises(InvalidArguments, match=r"Wrong\.stream returned"):
        sync.stream(Wrong("W", "p"), "x")


class Speed(BaseAgent):
    """Has a helper of its own."""

    def speed(self) -> int:
        return 1


@pytest.mark.parametrize("base", [Speed, sync.BaseAgent], ids=shown)
@pytest.mark.parametrize(
    ("name", "value", "words"),
    [
        ("run", lambda self, speed, direction: speed, r"run\(self, speed, direction\) hides the verb run"),
        ("run", lambda self: 1, "hides the verb run"),
        ("run", 5, "hides the verb run"),
        ("execute_tool", lambda self, tool_name, path: 1, "hides the verb execute_tool"),
        ("get_tool_schemas", lambda self, kind: 1, "hides the verb get_tool_schemas"),
        ("get_tools", lambda self: {}, "Override get_tool_schemas"),
        ("stream", lambda self, user_input: 1, "hides the verb stream"),
        ("stream", lambda self, speed: speed, "hides the verb stream"),
    ],
    ids=shown,
)
def test_what_cannot_be_called_as_a_verb_is_refused_when_the_class_is_made(
    base: Any, name: str, value: Any, words: str
):
    with pytest.raises(UserError, match=words):
        type("Device", (base,), {name: value})
    with pytest.raises(UserError, match=words):
        type("Device", (type("Mixin", (), {name: value}), base), {})


class Audit:
    """A mixin that knows of no agent."""

    async def run(self: Any, *arguments: Any, **options: Any) -> AgentResult:
        vars(self)["audited"] = True
        return await super().run(*arguments, **options)  # type: ignore[misc]


async def test_a_verb_of_a_mixin_is_called():
    agent: Any = type("Audited", (Audit, BaseAgent), {})("A", "p", client=ScriptedModel(["ok"]))
    [result] = await run_many(agent, ["x"])
    assert (result.content, agent.audited) == ("ok", True)


async def test_a_list_of_tools_that_is_none_is_refused():
    class Odd(BaseAgent):
        def get_tool_schemas(self) -> Any:
            return ["look"]

    with pytest.raises(InvalidArguments, match=r"Odd\.get_tool_schemas returned"):
        await Odd("O", "p", client=ScriptedModel(["ok"])).run("x")


def test_the_facade_calls_what_a_blocking_agent_has_in_the_place_of_execute_tool() -> None:
    class Counting(sync.BaseAgent):
        called = 0

        @tool
        def add(self, a: int, b: int) -> int:
            return a + b

        def execute_tool(self, tool_name: str, /, **arguments: Any) -> ToolResult:
            self.called += 1
            return super().execute_tool(tool_name, **arguments)

    agent = Counting("C", "c")
    assert sync.execute_tool(agent, "add", a=1, b=2).content == 3
    assert agent.called == 1


def test_a_verb_that_nobody_awaits_cannot_be_async():
    with pytest.raises(InvalidArguments, match=r"get_tool_schemas is async, and called where nobody awaits: use def"):

        class Late(BaseAgent):
            async def get_tool_schemas(self) -> Any:  # type: ignore[override]
                return []


async def test_an_override_whose_signature_cannot_be_read_is_called_all_the_same():
    class Unread:
        """A callable that says nothing of its parameters."""

        __signature__ = "none"

        def __call__(self, *arguments: Any, **options: Any) -> AgentResult[Any]:  # and gives nothing to await
            return AgentResult(agent_name="Odd", content="mine")

    class Odd(BaseAgent):
        run = Unread()  # type: ignore[assignment]

    above = BaseAgent("Above", "a", client=ScriptedModel([answers.call("ask", {"query": "x"}), "done"]))
    result = await above.register_delegate(Odd("Odd", "o"), tool_name="ask").run("go")
    assert [call.content for call in result.tool_results] == ["mine"]
