"""Agents as tools: what their tools are called, what they take, and what is no agent."""

from __future__ import annotations

from dataclasses import dataclass
from json import loads
from typing import Any, Literal

import anyio
import pytest

from fractal import AgentToolkit, BaseAgent, InvalidArguments, InvalidTool, sync, tool
from fractal.testing import ScriptedModel, answers
from tests.support import shown


@dataclass
class Place:
    city: str


class Helper(BaseAgent):
    @tool
    def size(self, text: str) -> int:
        return len(text)

    def own(self, text: str) -> str:
        return text.upper()


@pytest.mark.parametrize(
    ("name", "tool_name"),
    [
        ("Data Analyst", "delegate_to_data_analyst"),
        ("Guide", "delegate_to_guide"),
        ("SQL-Writer 2", "delegate_to_sql-writer_2"),
        ("a.b/c", "delegate_to_a_b_c"),
        ("Müller", "delegate_to_m_ller"),
        ("X" * 80, "delegate_to_" + "x" * 52),
    ],
)
def test_the_tool_of_a_delegate_is_named_in_lower_case(name: str, tool_name: str):
    assert list(BaseAgent("A", "p").register_delegate(BaseAgent(name, "p")).get_tools()) == [tool_name]


NAMES = [
    "class",
    "from",
    "max-rows",
    "with blank",
    "größe",
    "_hidden",
    "1st",
    "class_",
    "query",
    "$",
    "self",
    "tool_name",
]


@pytest.mark.parametrize("way", ["model", "direct"])
async def test_parameters_of_a_delegate_may_have_any_name(way: str):
    asked = ScriptedModel(lambda request: request.transcript.messages[-1]["content"])
    parameters = {name: {"type": "str", "description": f"what {name} is"} for name in NAMES}
    parameters |= {"le fuel": {"type": "int", "required": False}, "if": {"type": "int", "default": 3}}  # type: ignore[dict-item]
    given = {name: f"<{name}>" for name in NAMES}
    model = ScriptedModel([answers.call("ask", given), "done"])
    agent = BaseAgent("A", "p", client=model)
    agent.register_delegate(BaseAgent("H", "p", client=asked), tool_name="ask", parameters=parameters)
    schema = agent.get_tool_schemas()[0]["function"]["parameters"]
    assert list(schema["properties"]) == [*NAMES, "le fuel", "if"]
    assert schema["required"] == NAMES
    assert schema["properties"]["max-rows"]["description"] == "what max-rows is"
    if way == "model":
        result = (await agent.run("x")).tool_results[0]
    else:
        result = await agent.execute_tool("ask", **given)
    assert result.error is None
    assert loads(str(result.content)) == {**given, "if": 3}


@pytest.mark.parametrize(
    "parameters",
    [
        *(["sql"], {3: {}}, {"": {}}, {"a": "str"}, {"a": {"type": "nonsense"}}, {"a": {"type": ["string", "null"]}}),
        {"a": {"type": "int", "default": "many"}},
    ],
    ids=shown,
)
def test_wrong_parameters_are_a_type_error(parameters: Any):
    with pytest.raises(TypeError, match="parameters"):
        BaseAgent("A", "p").register_delegate(BaseAgent("H", "p"), parameters=parameters)


def test_the_old_name_takes_parameters_too():
    agent = BaseAgent("A", "p")
    with pytest.warns(DeprecationWarning, match="register_delegate"):
        agent.register_agent(BaseAgent("B", "p"), parameters={"x": {"type": "str"}})
    assert list(agent.get_tool_schemas()[0]["function"]["parameters"]["properties"]) == ["x"]


HELPER = Helper("Helper", "p")


@pytest.mark.parametrize(
    "given", [HELPER, Helper, HELPER.run, HELPER.execute_tool, HELPER.stream, sync.BaseAgent("S", "p").run], ids=shown
)
def test_an_agent_that_is_given_as_a_tool_is_refused(given: Any):
    for add in (
        BaseAgent("A", "p").add_tool,
        AgentToolkit,
        AgentToolkit().add_tool,
        BaseAgent("A", "p").toolkit.add_tool,
    ):
        with pytest.raises(InvalidTool, match="register_delegate"):
            add(given)


def test_methods_of_another_agent_are_tools_like_any():
    agent = BaseAgent("A", "p").add_tool(HELPER.size).add_tool(HELPER.own)
    assert list(agent.get_tools()) == ["size", "own"]


@pytest.mark.parametrize("other", ["x", None, Helper, len], ids=shown)
async def test_what_is_no_agent_is_refused_in_words(other: Any):
    agent = BaseAgent("A", "p")
    with pytest.raises(InvalidArguments, match="is no agent"):
        agent.register_delegate(other)
    with pytest.raises(InvalidArguments, match="is no agent"):
        await agent.call_agent(other, "q")
    with pytest.raises(InvalidArguments, match="is no agent"):
        await anyio.to_thread.run_sync(lambda: sync.run(other, "q"))

    async def ask() -> str:
        with pytest.raises(InvalidArguments, match="is no agent"):
            await agent.call_agent(other, "q")
        return "asked"

    agent.client = ScriptedModel([answers.call("ask", {}), "done"])
    assert (await agent.add_tool(ask).run("x")).tool_results[0].content == "asked"


async def test_the_name_of_a_tool_goes_first():
    for call in (
        lambda: HELPER.execute_tool(tool_name="size", text="x"),
        lambda: HELPER.execute_tool(text="x"),
        lambda: HELPER.execute_tool(3, text="x"),  # type: ignore[arg-type]
        lambda: anyio.to_thread.run_sync(lambda: sync.execute_tool(HELPER, tool_name="size", text="x")),
    ):
        with pytest.raises(InvalidArguments, match="first, by position"):
            await call()


@pytest.mark.parametrize("number", [2.5, "3", True, -1, float("nan")])
async def test_counts_are_whole_numbers(number: Any):
    agent = BaseAgent("A", "p", client=ScriptedModel(["ok"]))
    with pytest.raises(InvalidArguments, match="max_iterations"):
        await agent.run("x", max_iterations=number)


def test_the_card_shows_defaults_and_choices():
    def find(place: Place, unit: Literal["km", "mi"] = "km", limit: int | None = None, n: int = 1) -> str:
        return ""

    card = str(BaseAgent("A", "p").add_tool(find))
    assert 'find(place: Place, unit: "km" | "mi" = "km", limit: integer | null = null, n: integer = 1)' in card
