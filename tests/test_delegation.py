"""Agents that ask agents: one ledger, one deadline, and a parent that survives its delegates."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import anyio
import pytest

from fractal import (
    BaseAgent,
    DelegationFinished,
    DelegationStarted,
    Event,
    Limits,
    RunContext,
    RunFinished,
    RunStarted,
    ToolFinished,
    ToolStarted,
    run_many,
    sync,
    tool,
)
from fractal.testing import Endpoint, ScriptedModel, answers
from fractal.testing.answers import AnswerLike
from fractal.testing.endpoint import RecordedRequest
from tests.schedules import in_any_order as anyio_backend  # noqa: F401
from tests.support import assert_continuable, outcomes

StartEndpoint = Callable[..., Endpoint]


def by_agent(**replies: Callable[[list[dict[str, Any]]], AnswerLike]) -> Callable[[RecordedRequest], AnswerLike]:
    """Answers each agent by its system prompt, which here is its name."""

    def reply(request: RecordedRequest) -> AnswerLike:
        messages = request.body["messages"]
        return replies[messages[0]["content"]](messages[1:])

    return reply


def delegating(*calls: Any, then: str = "done") -> Callable[[list[dict[str, Any]]], AnswerLike]:
    return lambda messages: list(calls) if messages[-1]["role"] == "user" else then


def agent(name: str, **options: Any) -> BaseAgent:
    return BaseAgent(name, name, **options)


async def test_a_delegate_answers_as_a_tool(endpoint: StartEndpoint):
    endpoint(
        by_agent(
            parent=delegating(answers.call("delegate_to_child", {"query": "6 x 7?"})),
            child=lambda messages: f"you asked {messages[-1]['content']}",
        )
    )
    result = await agent("parent").register_delegate(agent("child")).run("go")
    assert result.content == "done"
    assert result.tool_results[0].content == "you asked 6 x 7?"
    assert result.usage.requests == 3


async def test_structured_input_arrives_as_the_dict_it_is(endpoint: StartEndpoint):
    one = endpoint(
        by_agent(
            parent=delegating(answers.call("query_db", {"sql": "select 1", "limit": 5})),
            child=lambda messages: messages[-1]["content"],
        )
    )
    parent = agent("parent").register_delegate(
        agent("child"),
        tool_name="query_db",
        description="Runs SQL.",
        parameters={
            "sql": {"type": "str", "description": "The query."},
            "limit": {"type": "int", "required": False},
            "mode": {"type": "string", "default": "fast"},
        },
    )
    result = await parent.run("go")
    assert result.tool_results[0].content == '{"mode":"fast","sql":"select 1","limit":5}'
    [schema] = one.requests[0].body["tools"]
    assert schema["function"]["description"] == "Runs SQL."
    assert schema["function"]["parameters"]["required"] == ["sql"]
    assert schema["function"]["parameters"]["properties"]["sql"] == {"type": "string", "description": "The query."}


@pytest.mark.parametrize(
    ("parameters", "words"),
    [
        (["sql"], "not list"),
        ({3: {}}, "3 is no parameter name"),
        ({"sql": "str"}, r"parameters\['sql'\] is a dict"),
        ({"sql": {"type": "text"}}, "'text'"),
        ({"sql": {"type": "str", "optional": True}}, "optional"),
        ({"sql": {"required": "no"}}, "True or False"),
        ({"sql": {"description": 3}}, "give text"),
    ],
)
def test_wrong_parameters_raise_a_type_error_that_names_the_fault(parameters: Any, words: str):
    with pytest.raises(TypeError, match=words):
        agent("parent").register_delegate(agent("child"), parameters=parameters)


def test_the_old_name_of_register_delegate_still_works():
    with pytest.warns(DeprecationWarning, match="register_delegate"):
        made = agent("parent").register_agent(agent("child"))
    assert list(made.get_tools()) == ["delegate_to_child"]


async def test_a_delegate_that_fails_tells_the_parents_model_what_is_known(endpoint: StartEndpoint):
    endpoint(
        by_agent(
            parent=delegating(
                answers.call("delegate_to_refuses", {"query": "?"}),
                answers.call("delegate_to_loops", {"query": "?"}),
                answers.call("delegate_to_broken", {"query": "?"}),
            ),
            refuses=lambda _: answers.refusal("not that"),
            loops=lambda _: answers.calls(answers.call("step"), text="half way there"),
            broken=lambda _: answers.failure(400, "no such model"),
        )
    )
    parent = agent("parent")
    for name in ("refuses", "loops", "broken"):
        child = agent(name, limits=Limits(max_iterations=2)).add_tool(lambda: 1, name="step")
        parent.register_delegate(child)
    result = await parent.run("go")
    assert result.content == "done"
    assert outcomes(result) == ["error"] * 3
    told = [m["content"] for m in result.messages if m["role"] == "tool"]
    assert "(refusal): not that" in told[0]
    assert "max_iterations" in told[1]
    assert "half way there" in told[1]
    assert "HTTP 400: no such model" in told[2]
    assert_continuable(result)


async def test_a_delegate_with_a_timeout_of_its_own_is_cut_and_its_siblings_are_not(endpoint: StartEndpoint):
    endpoint(
        by_agent(
            parent=delegating(
                answers.call("delegate_to_slow", {"query": "?"}), answers.call("delegate_to_quick", {"query": "?"})
            ),
            slow=lambda _: answers.text("late", delay=5),
            quick=lambda _: answers.text("here", delay=0.3),
        )
    )
    parent = agent("parent").register_delegate(agent("slow", timeout=0.15)).register_delegate(agent("quick"))
    result = await parent.run("go", timeout=10)
    assert result.content == "done"
    assert outcomes(result) == ["error", "ok"]
    assert "(deadline)" in result.messages[2]["content"]


async def test_a_budget_of_tool_calls_makes_those_that_fit_and_skips_the_rest():
    made: list[int] = []
    model = ScriptedModel([[answers.call("count", {"n": n}) for n in range(5)]])
    one = agent("A", client=model).add_tool(lambda n: made.append(n), name="count")
    result = await one.run("go", limits=Limits(max_tool_calls=3))
    assert sorted(made) == [0, 1, 2]
    assert outcomes(result) == ["ok", "ok", "ok", "skipped", "skipped"]
    assert result.stop_reason == "budget"
    assert result.usage.tool_calls == 3
    assert_continuable(result)


async def test_a_budget_of_tokens_is_corrected_by_what_the_endpoint_reports():
    model = ScriptedModel(lambda _: answers.text("words", usage=(60, 30)))
    one = agent("A", client=model)

    @tool
    async def ask_again(ctx: RunContext) -> int:
        await one.run("nested")
        return ctx.usage.total_tokens

    outer = agent("B", client=ScriptedModel([[answers.call("ask_again")], [answers.call("ask_again")], "never"]))
    result = await outer.add_tool(ask_again).run("go", limits=Limits(max_tokens=200))
    assert result.tool_results[0].content == 15 + 90
    assert result.stop_reason == "budget"
    assert result.usage.total_tokens <= 215


async def test_a_delegates_own_limits_hold_inside_its_parents(endpoint: StartEndpoint):
    one = endpoint(
        by_agent(
            parent=delegating(answers.call("delegate_to_child", {"query": "?"})),
            child=delegating(answers.call("step")),
        )
    )
    child = agent("child", limits=Limits(max_requests=1)).add_tool(lambda: 1, name="step")
    result = await agent("parent").register_delegate(child).run("go", limits=Limits(max_requests=10))
    assert result.content == "done"
    assert outcomes(result) == ["error"]
    assert len(one.requests) == 3


async def test_agents_that_ask_each_other_for_ever_are_stopped_by_depth(endpoint: StartEndpoint):
    one = endpoint(by_agent(echo=delegating(answers.call("delegate_to_echo", {"query": "?"}), then="back")))
    echo = agent("echo", limits=Limits(max_depth=3))
    echo.register_delegate(echo)
    result = await echo.run("go")
    assert result.content == "back"
    assert max(len(request.body["messages"]) for request in one.requests) == 4
    assert result.usage.requests == 4 * 2  # depth 0 to 3 answer; depth 4 is refused before it asks


async def test_deps_and_observers_reach_the_delegates(endpoint: StartEndpoint):
    events: list[Event] = []
    endpoint(
        by_agent(
            parent=delegating(answers.call("delegate_to_child", {"query": "?"})), child=delegating(answers.call("who"))
        )
    )

    def who(ctx: RunContext[str]) -> str:
        return f"{ctx.deps} {ctx.depth}"

    child = agent("child", observers=[events.append]).add_tool(who)
    parent = agent("parent", observers=[events.append]).register_delegate(child)
    result = await parent.run("go", deps="the user")
    child_result = next(e.result for e in events if isinstance(e, RunFinished) and e.depth == 1)
    assert child_result.tool_results[0].content == "the user 1"
    kinds = [(e.depth, e.kind) for e in events]
    assert kinds == [
        (0, "run_started"),
        (0, "model_requested"),
        (0, "model_responded"),
        (0, "tool_started"),
        (0, "delegation_started"),
        (1, "run_started"),
        (1, "model_requested"),
        (1, "model_responded"),
        (1, "tool_started"),
        (1, "tool_finished"),
        (1, "model_requested"),
        (1, "model_responded"),
        (1, "run_finished"),
        (0, "delegation_finished"),
        (0, "tool_finished"),
        (0, "model_requested"),
        (0, "model_responded"),
        (0, "run_finished"),
    ]
    started = [e for e in events if isinstance(e, RunStarted)]
    [delegation] = [e for e in events if isinstance(e, DelegationStarted)]
    [call] = [e for e in events if isinstance(e, ToolStarted) and e.depth == 0]
    assert started[1].parent_id == result.run_id
    assert started[1].call_id == delegation.call_id == call.call_id
    assert started[0].call_id is None


async def test_parallel_delegations_to_one_agent_are_told_apart(endpoint: StartEndpoint):
    events: list[Event] = []
    endpoint(
        by_agent(
            parent=delegating(*[answers.call("delegate_to_child", {"query": str(n)}) for n in range(4)]),
            child=lambda messages: f"answer {messages[-1]['content']}",
        ),
        latency=0.02,
    )
    parent = agent("parent", observers=[events.append]).register_delegate(agent("child"))
    result = await parent.run("go")
    assert [call.content for call in result.tool_results] == [f"answer {n}" for n in range(4)]
    for finished in [e for e in events if isinstance(e, DelegationFinished)]:
        assert finished.result is not None
        call = next(e for e in events if isinstance(e, ToolFinished) and e.call_id == finished.call_id)
        assert call.result.content == finished.result.content
    ids = {e.run_id for e in events if isinstance(e, RunStarted)}
    assert ids == {e.run_id for e in events if isinstance(e, RunFinished)}
    assert len(ids) == 5


async def test_an_agent_called_in_a_tool_by_any_verb_is_a_child_of_the_run(endpoint: StartEndpoint):
    depths: list[int] = []
    child = agent("child", observers=[lambda e: depths.append(e.depth) if isinstance(e, RunStarted) else None])

    class Parent(BaseAgent):
        @tool
        async def by_run(self) -> object:
            return (await child.run("?")).content

        @tool
        async def by_call(self) -> object:
            return (await self.call_agent(child, "?")).content

        @tool
        async def by_many(self) -> object:
            return [r.content for r in await run_many(child, ["?", "?"])]

        @tool
        def by_facade(self) -> object:
            return sync.run(child, "?").content

        @tool
        def by_run_sync(self) -> object:
            return child.run_sync("?").content

    names = ["by_run", "by_call", "by_many", "by_facade", "by_run_sync"]
    one = endpoint(by_agent(parent=delegating(*map(answers.call, names)), child=lambda _: "yes"))
    result = await Parent("parent", "parent").run("go", limits=Limits(max_requests=8))
    assert outcomes(result) == ["ok"] * 5
    assert depths == [1] * 6
    assert len(one.requests) == result.usage.requests == 8


async def test_outside_a_run_call_agent_is_a_run_of_the_other(endpoint: StartEndpoint):
    endpoint(by_agent(child=lambda messages: messages[-1]["content"]))
    result = await agent("parent").call_agent(agent("child"), {"a": 1})
    assert (result.content, result.agent_name) == ('{"a":1}', "child")


async def test_a_task_that_outlives_its_run_starts_runs_of_its_own(endpoint: StartEndpoint):
    endpoint(by_agent(parent=delegating(answers.call("detach")), child=lambda _: "later"))
    depths: list[int] = []
    child = agent("child", observers=[lambda e: depths.append(e.depth)])
    run_is_over = anyio.Event()

    async with anyio.create_task_group() as background:

        async def later() -> None:
            await run_is_over.wait()
            assert (await child.run("?")).success

        async def detach() -> None:
            background.start_soon(later)

        result = await agent("parent").add_tool(detach).run("go", limits=Limits(max_requests=2))
        assert result.success
        run_is_over.set()
    assert set(depths) == {0}
