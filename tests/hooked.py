"""Agents with hooks and guards: ways to register them, and ways to begin what they are around."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Any

import anyio

from fractal import AgentResult, Around, BaseAgent, ToolResult, run_many, stream_many, sync
from fractal.testing import ScriptedModel, answers

Setting = str
"""`"around_tool"`, `"around_model"` or `"guard"`."""


def looking(request: Any) -> Any:
    """Asks for one look, and then answers."""
    last = request.transcript.messages[-1]
    return "done" if last["role"] == "tool" else answers.call("look", {"n": 1}, id="c1")


class Looks:
    """What the tool of an agent was called with."""

    def __init__(self) -> None:
        self.calls: list[int] = []

    async def look(self, n: int) -> str:
        """Look."""
        self.calls.append(n)
        return f"seen {n}"


def agent_of(looks: Looks, kind: Any = BaseAgent, **options: Any) -> Any:
    options.setdefault("client", ScriptedModel(looking))
    return kind("A", "You look.", **options).add_tool(looks.look)


# ---- ways to register: each gives an agent, and options for its runs


def by_decorator(make: Callable[..., Any], setting: Setting, hook: Any) -> tuple[Any, dict[str, Any]]:
    agent = make()
    assert getattr(agent, setting)(hook) is hook
    return agent, {}


def by_decorator_with_options(make: Callable[..., Any], setting: Setting, hook: Any) -> tuple[Any, dict[str, Any]]:
    agent = make()
    assert getattr(agent, setting)(delegates=True)(hook) is hook
    return agent, {}


def by_constructor(make: Callable[..., Any], setting: Setting, hook: Any) -> tuple[Any, dict[str, Any]]:
    return make(**{setting: hook}), {}


def by_constructor_in_a_list(make: Callable[..., Any], setting: Setting, hook: Any) -> tuple[Any, dict[str, Any]]:
    return make(**{setting: [hook]}), {}


def by_assignment(make: Callable[..., Any], setting: Setting, hook: Any) -> tuple[Any, dict[str, Any]]:
    agent = make()
    setattr(agent, setting, (hook,))
    return agent, {}


def by_class(make: Callable[..., Any], setting: Setting, hook: Any) -> tuple[Any, dict[str, Any]]:
    kind = type(make())
    return make(type("Mine", (kind,), {setting: [hook]})), {}


def by_copy(make: Callable[..., Any], setting: Setting, hook: Any) -> tuple[Any, dict[str, Any]]:
    return make(**{setting: hook}).replace(temperature=0), {}


def by_run(make: Callable[..., Any], setting: Setting, hook: Any) -> tuple[Any, dict[str, Any]]:
    return make(), {setting: hook}


def by_run_in_a_list(make: Callable[..., Any], setting: Setting, hook: Any) -> tuple[Any, dict[str, Any]]:
    return make(), {setting: [hook]}


def by_run_marked(make: Callable[..., Any], setting: Setting, hook: Any) -> tuple[Any, dict[str, Any]]:
    return make(), {setting: [Around(hook)]}


OF_SETTINGS = [
    by_decorator,
    by_constructor,
    by_constructor_in_a_list,
    by_assignment,
    by_class,
    by_copy,
    by_run,
    by_run_in_a_list,
]
OF_HOOKS = [by_decorator_with_options, *OF_SETTINGS, by_run_marked]


# ---- ways to begin: each gives the result


async def in_thread(function: Callable[[], Any]) -> Any:
    return await anyio.to_thread.run_sync(function)


async def run(agent: Any, options: dict[str, Any]) -> AgentResult:
    result = agent.run("go", **options) if isinstance(agent, BaseAgent) else None
    return await (result or in_thread(lambda: agent.run("go", **options)))


async def stream(agent: Any, options: dict[str, Any]) -> AgentResult:
    if not isinstance(agent, BaseAgent):
        return await blocking_stream(agent, options)
    async with agent.stream("go", **options) as events:
        async for _ in events:
            pass
    return await events.result()


async def many(agent: Any, options: dict[str, Any]) -> AgentResult:
    return (await run_many(agent, ["go"], **options))[0]


async def streamed_many(agent: Any, options: dict[str, Any]) -> AgentResult:
    async with stream_many(agent, ["go"], **options) as batch:
        return [item async for item in batch].pop().result


async def below_another(agent: Any, options: dict[str, Any]) -> AgentResult:
    """As a delegate; what is given to a run is given to one that a tool of the other agent makes."""
    results: list[AgentResult] = []

    async def ask() -> str:
        results.append(await run(agent, options))
        return "asked"

    calls = ScriptedModel(
        [answers.call("ask" if options else "delegate_to_a", {} if options else {"query": "go"}), "x"]
    )
    above = BaseAgent("Above", "You ask.", client=calls).register_delegate(agent).add_tool(ask)
    asked = await above.run("go")
    [call] = asked.tool_results
    return results[0] if results else AgentResult(agent_name="A", content=call.content, error=call.error)


async def blocking_run(agent: Any, options: dict[str, Any]) -> AgentResult:
    return await in_thread(lambda: sync.run(agent, "go", **options))


async def blocking_stream(agent: Any, options: dict[str, Any]) -> AgentResult:
    def read() -> AgentResult:
        with sync.stream(agent, "go", **options) as events:
            for _ in events:
                pass
        return events.result()

    return await in_thread(read)


async def blocking_many(agent: Any, options: dict[str, Any]) -> AgentResult:
    return (await in_thread(lambda: sync.run_many(agent, ["go"], **options)))[0]


RUNS: list[Callable[[Any, dict[str, Any]], Awaitable[AgentResult]]] = [
    run,
    stream,
    many,
    streamed_many,
    below_another,
    blocking_run,
    blocking_stream,
    blocking_many,
]


async def direct(agent: Any, n: int) -> ToolResult:
    call = agent.execute_tool("look", n=n) if isinstance(agent, BaseAgent) else None
    return await (call or in_thread(lambda: agent.execute_tool("look", n=n)))


async def by_facade(agent: Any, n: int) -> ToolResult:
    return await in_thread(lambda: sync.execute_tool(agent, "look", n=n))


async def by_toolkit(agent: Any, n: int) -> ToolResult:
    call = agent.toolkit.execute_tool("look", n=n) if isinstance(agent, BaseAgent) else None
    return await (call or in_thread(lambda: agent.toolkit.execute_tool("look", n=n)))


async def inside_a_tool(agent: Any, n: int) -> ToolResult:
    """In a run of the same agent, of which only the inner call is looked at."""
    results: list[ToolResult] = []

    async def inner() -> None:
        results.append(await direct(agent, n))

    agent.add_tool(inner)
    agent.client = ScriptedModel([answers.call("inner", {}), "done"])
    await run(agent, {})
    return results[0]


DIRECT: list[Callable[[Any, int], Awaitable[ToolResult]]] = [direct, by_facade, by_toolkit, inside_a_tool]
