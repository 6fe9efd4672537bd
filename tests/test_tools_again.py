"""Tools and delegates that are added again, replaced and removed: a notebook's cell can run twice."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, Generic, TypeVar

import pytest

from fractal import AgentToolkit, BaseAgent, InvalidArguments, Tool, ToolNameTaken, sync, tool
from fractal.testing import ScriptedModel, answers
from tests.support import coroutine, plain, wrapped

T = TypeVar("T")


def agent(**options: Any) -> BaseAgent:
    return BaseAgent("A", "a", **options)


def named(name: str) -> BaseAgent:
    return BaseAgent(name, "a")


def names(kit: AgentToolkit) -> list[str]:
    return [one.name for one in kit]


class Counter:
    def count(self) -> int:
        return 1

    def __call__(self) -> int:
        return 2


COUNTER = Counter()
ONCE = partial(plain, 1)


@pytest.mark.parametrize(
    "again",
    [
        lambda to: to.add_tool(plain),
        lambda to: to.add_tool(tool(name="marked", terminate=True)(marked)),
        lambda to: to.add_tool(plain, name="other", description="Other.", terminate=True),
        lambda to: to.add_tool(COUNTER.count),
        lambda to: to.add_tool(COUNTER, name="counter"),
        lambda to: to.add_tool(ONCE, name="once"),
        lambda to: to.add_tool(MADE),
    ],
    ids=["function", "marked", "with options", "method", "object", "partial", "tool"],
)
@pytest.mark.parametrize("make", [AgentToolkit, lambda: agent(), lambda: sync.BaseAgent("A", "a")], ids=range(3))
def test_the_same_tool_added_again_is_nothing(make: Any, again: Callable[[Any], object]) -> None:
    to = make()
    again(to)
    before = to.get_tool_schemas()
    again(to)
    assert to.get_tool_schemas() == before
    assert len(before) == 1


def marked() -> None: ...


MADE = Tool.from_function(plain)


def test_the_same_delegate_registered_again_is_nothing() -> None:
    one, other, boss = named("one"), named("one"), named("boss")
    facts: dict[str, Any] = {"sql": {"type": "str"}}
    for _ in range(2):
        boss.register_delegate(one).register_delegate(one, "ask", parameters=facts)
    assert len(boss.get_tools()) == 2
    for wrong in ((other,), (one, "ask"), (one, None, "Otherwise.")):
        with pytest.raises(ToolNameTaken, match="replace=True"):
            boss.register_delegate(*wrong)
    boss.register_delegate(other, replace=True).register_delegate(one, "ask", replace=True)
    assert [list(schema["function"]["parameters"]["properties"]) for schema in boss.get_tool_schemas()] == [
        ["query"],
        ["query"],
    ]


def test_another_function_of_that_name_is_refused_until_it_may_replace() -> None:
    for one in (agent().add_tool(plain), sync.BaseAgent("A", "a").add_tool(plain)):
        with pytest.raises(ToolNameTaken, match="replace=True"):
            one.add_tool(wrapped(plain))
        assert one.add_tool(wrapped(plain), replace=True) is one
        assert list(one.get_tools().values()) != [plain]


@pytest.mark.parametrize(
    "changed", [{"terminate": True}, {"description": "Otherwise."}, {"name": "plain", "terminate": True}], ids=repr
)
def test_the_same_function_under_other_options_is_another_tool(changed: dict[str, Any]) -> None:
    kit = AgentToolkit(plain)
    with pytest.raises(ToolNameTaken, match="replace=True"):
        kit.add_tool(plain, **changed)
    assert kit.add_tool(plain, replace=True, **changed) is kit.get("plain")


async def test_a_tool_can_be_replaced_and_keeps_its_place() -> None:
    def second() -> str:
        return "old"

    one = agent(toolkit=AgentToolkit(plain, second)).add_tool(coroutine)
    with pytest.raises(ToolNameTaken, match="replace=True"):
        one.add_tool(lambda: "new", name="second")
    one.add_tool(lambda: "new", name="second", replace=True)
    assert list(one.get_tools()) == ["plain", "second", "coroutine"]
    assert (await one.execute_tool("second")).content == "new"


def test_a_tool_can_be_removed() -> None:
    one = agent(toolkit=AgentToolkit(plain)).add_tool(coroutine)
    assert list(one.remove_tool("plain").get_tools()) == ["coroutine"]
    assert [schema["function"]["name"] for schema in one.get_tool_schemas()] == ["coroutine"]
    one.add_tool(plain)
    for wrong in ("nothing", "", None, plain):
        with pytest.raises(InvalidArguments, match=r"there is no tool .* to remove, only coroutine, plain"):
            one.remove_tool(wrong)  # type: ignore[arg-type]


async def test_a_run_that_has_begun_keeps_the_tool_that_is_removed_or_replaced() -> None:
    one = agent(client=ScriptedModel([answers.call("change"), answers.call("plain", {"x": 1}), "done"]))

    @one.add_tool
    async def change() -> None:
        one.remove_tool("change")
        one.add_tool(lambda: "new", name="plain", replace=True)

    result = await one.add_tool(plain).run("go")
    assert [call.outcome for call in result.tool_results] == ["ok", "ok"]
    assert result.tool_results[1].content != "new"
    assert list(one.get_tools()) == ["plain"]


def test_methods_of_a_generic_kit_that_were_taken_out_stay_out() -> None:
    class Kit(AgentToolkit, Generic[T]):
        def __init__(self) -> None:
            super().__init__()
            self.remove_tool("first")
            self.add_tool(lambda: "new", name="second", replace=True)

        @tool
        def first(self) -> None: ...

        @tool
        def second(self) -> None: ...

        @tool
        def third(self, value: T) -> None: ...

    kit = Kit[int]()
    assert sorted(names(kit)) == ["second", "third"]
    assert kit.tools["second"].function() == "new"
