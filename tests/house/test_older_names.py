"""Names that code for other frameworks brings along: they work, or say what to write."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import anyio
import pytest

import fractal
import fractal.models
from fractal import AgentToolkit, BaseAgent, InvalidArguments, ToolNameTaken, sync, tool
from fractal.testing import ScriptedModel, answers
from tests.support import shown

KINDS: list[Any] = [BaseAgent, sync.BaseAgent]


class Kit(AgentToolkit):
    @tool
    def double(self, n: int) -> int:
        return 2 * n


def test_the_version_is_said_in_one_place():
    assert re.fullmatch(r"\d+\.\d+\.\d+.*", fractal.__version__)
    project = Path(fractal.__file__).parents[1] / "pyproject.toml"
    if project.exists():
        assert "\nversion = " not in project.read_text(encoding="utf-8")


@pytest.mark.parametrize("kind", KINDS, ids=shown)
async def test_the_toolkit_of_an_agent_is_its_own(kind: Any):
    agent = kind("A", "p", toolkit=Kit()).add_tool(len, name="size")
    kit = agent.toolkit
    assert list(kit.get_tools()) == list(agent.get_tools()) == [each.name for each in kit] == ["double", "size"]
    assert kit.get_tool_schemas() == agent.get_tool_schemas()
    assert (len(kit), "size" in kit, kit.get("other")) == (2, True, None)
    kit.add_tool(len, name="most")
    kit.register_delegate(BaseAgent("B", "p"), tool_name="ask")
    assert list(agent.get_tools()) == ["double", "size", "most", "ask"]
    with pytest.raises(ToolNameTaken):
        kit.add_tool(abs, name="most")
    assert list(BaseAgent("C", "p", toolkit=kit).get_tools()) == ["double", "size", "most", "ask"]
    if kind is BaseAgent:
        result = await kit.execute_tool("double", n=2)
    else:
        result = await anyio.to_thread.run_sync(lambda: kit.execute_tool("double", n=2))
    assert result.content == 4


def test_the_toolkit_is_given_once():
    class Mine(BaseAgent):
        toolkit = Kit()  # type: ignore[assignment]

    assert list(Mine("A", "p").get_tools()) == ["double"]
    with pytest.raises(InvalidArguments, match="add_tool"):
        BaseAgent("A", "p").toolkit = Kit()
    with pytest.raises(InvalidArguments, match="give yours another name"):
        type("Other", (BaseAgent,), {"toolkit": lambda self: 1})
    with pytest.raises(InvalidArguments, match="marked methods"):
        AgentToolkit(target=object())  # type: ignore[arg-type]


async def test_a_result_names_its_model_and_the_tool_that_has_ended_it():
    def last() -> str:
        return "the end"

    agent = BaseAgent("A", "p", model="m", client=ScriptedModel(lambda request: answers.call("last", {})))
    agent.add_tool(last, terminate=True)
    ended = await agent.run("x")
    assert (ended.metadata["model"], ended.metadata["terminated_by_tool"]) == ("m", "last")
    agent.client = ScriptedModel(lambda request: "ok")
    assert (await agent.run("x")).metadata["terminated_by_tool"] is None
    agent.client = ScriptedModel(lambda request: answers.failure(400))
    failed = await agent.run("x")
    assert (failed.success, failed.metadata["model"]) == (False, "m")


@pytest.mark.parametrize(
    ("module", "name", "words"),
    [
        ("fractal", "Agent", "from fractal import BaseAgent"),
        ("fractal", "Runner", r"agent\.run"),
        ("fractal", "function_tool", "import tool"),
        ("fractal.models", "AgentResult", "from fractal import AgentResult"),
        ("fractal.models", "ToolReturnPart", "from fractal import ToolReturnPart"),
    ],
)
def test_a_name_that_is_elsewhere_says_where(module: str, name: str, words: str):
    with pytest.raises(ImportError, match=words):
        exec(f"from {module} import {name}", {})


@pytest.mark.parametrize("name", ["Agent", "AgentResult", "no_such_name"])
def test_other_names_are_no_attributes(name: str):
    assert not hasattr(fractal.models, name)
    assert hasattr(fractal, name) == (name == "AgentResult")
    assert getattr(fractal.models, name, None) is None


def test_the_nouns_of_models_are_found_where_they_were():
    from fractal.models import base

    assert base.Reply is fractal.model.Reply
    assert {"Model", "ModelRequest", "ModelSettings", "ToolCall"} <= {*dir(base)}
