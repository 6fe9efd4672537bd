"""Copies of agents have tools, settings and attributes of their own, or are refused in words."""

from __future__ import annotations

import copy
import functools
import pickle
import threading
from collections.abc import Callable
from typing import Any

import anyio
import pytest

from fractal import AnswerRejected, BaseAgent, InvalidArguments, sync, tool
from fractal.testing import ScriptedModel, answers
from tests.support import shown


class Notes:
    def __init__(self: Any, **options: Any) -> None:
        self.notes: list[str] = []
        given = {"name": "N", "system_prompt": "s", "client": ScriptedModel(lambda request: "ok"), **options}
        super().__init__(**given)
        self.add_tool(functools.partial(self.repeat, times=2), name="twice")

    @tool
    def note(self: Any, text: str) -> str:
        """Keep a text."""
        self.notes.append(text)
        return f"noted by {self.name}"

    def repeat(self: Any, text: str, times: int) -> str:
        self.notes.extend([text] * times)
        return self.name

    def prompt(self: Any) -> str:
        return f"prompt of {self.name}"

    def watch(self: Any, event: Any) -> None:
        self.notes.append(event.kind)

    def not_empty(self: Any, answer: str) -> None:
        if answer == self.name:
            raise AnswerRejected("say more")


class Notebook(Notes, BaseAgent):
    pass


class BlockingNotebook(Notes, sync.BaseAgent):
    pass


class Slotted(Notebook):
    __slots__ = ("slot",)


KINDS: list[Any] = [Notebook, BlockingNotebook, Slotted]
WAYS: list[Callable[[Any], Any]] = [copy.copy, copy.deepcopy, lambda agent: agent.replace(name="N")]
each_way = pytest.mark.parametrize("way", WAYS, ids=["copy", "deepcopy", "replace"])


async def execute(agent: Any, name: str, **arguments: Any) -> Any:
    if isinstance(agent, BaseAgent):
        return await agent.execute_tool(name, **arguments)
    return await anyio.to_thread.run_sync(lambda: agent.execute_tool(name, **arguments))


@each_way
@pytest.mark.parametrize("kind", KINDS, ids=shown)
async def test_a_copy_has_tools_and_settings_of_its_own(way: Callable[[Any], Any], kind: Any):
    original = kind(system_context={"a": 1}, temperature=0.5)
    if kind is Slotted:
        original.slot = 7
    cloned = way(original)
    assert type(cloned) is kind
    assert cloned.client is original.client
    cloned.notes, cloned.name, cloned.temperature, cloned.system_context["a"] = [], "T", 0.1, 2
    cloned.add_tool(len, name="size")
    assert (await execute(cloned, "note", text="hello")).content == "noted by T"
    assert (await execute(cloned, "twice", text="x")).content == "T"
    assert (cloned.notes, original.notes) == (["hello", "x", "x"], [])
    assert (await execute(original, "note", text="here")).content == "noted by N"
    assert list(original.get_tools()) == ["note", "twice"]
    assert list(cloned.get_tools()) == ["note", "twice", "size"]
    assert (original.temperature, original.system_context, original.name) == (0.5, {"a": 1}, "N")
    assert getattr(cloned, "slot", None) == (7 if kind is Slotted else None)


@each_way
async def test_functions_among_the_settings_are_bound_to_the_copy(way: Callable[[Any], Any]):
    original = Notebook()
    original.system_prompt, original.observers = original.prompt, [original.watch]
    original.output_validator(original.not_empty)
    cloned = way(original)
    cloned.name, cloned.notes = "ok", []
    model = cloned.client = ScriptedModel(["ok", "more"])
    assert (await cloned.run("x")).content == "more"
    assert model.requests[0]["messages"][0]["content"] == "prompt of ok"
    assert "run_finished" in cloned.notes
    assert original.notes == []


@pytest.mark.parametrize("share", [True, False])
def test_other_attributes_are_shared_or_copied_deeply(share: bool):
    original = Notebook()
    cloned = copy.copy(original) if share else copy.deepcopy(original)
    assert (cloned.notes is original.notes) is share
    pair = copy.deepcopy([original, original])
    assert pair[0] is pair[1]
    original.me = original  # type: ignore[attr-defined]
    again = copy.deepcopy(original)
    assert again.me is again  # type: ignore[attr-defined]


def test_an_attribute_that_cannot_be_copied_is_named():
    original = Notebook()
    original.lock = threading.Lock()  # type: ignore[attr-defined]
    with pytest.raises(TypeError, match=r"Notebook\.lock cannot be copied deeply .*replace\(\)"):
        copy.deepcopy(original)
    assert copy.copy(original).lock is original.lock  # type: ignore[attr-defined]


@pytest.mark.parametrize("kind", [BaseAgent, Notebook, sync.BaseAgent], ids=shown)
def test_pickling_is_refused_in_words(kind: Any):
    agent = kind(name="N", system_prompt="s")
    for dump in (pickle.dumps, lambda agent: pickle.dumps({"agent": agent}), lambda agent: pickle.dumps(agent, 0)):
        with pytest.raises(TypeError, match=r"cannot be pickled: .* a function that makes it"):
            dump(agent)


async def test_replace_changes_settings_and_checks_them():
    model = ScriptedModel(lambda request: "ok")
    agent = Notebook().replace(temperature=0.2, client=model, model="m", output_type=None, system_prompt="new {a}")
    await agent.run("x")
    [request] = model.requests
    assert (request["temperature"], request["model"], request["messages"][0]["content"]) == (0.2, "m", "new {a}")
    for changes, words in [
        ({"temprature": 1}, "did you mean temperature="),
        ({"timeout": -1}, "timeout=-1"),
        ({"toolkit": None}, "toolkit cannot be assigned"),
        ({"tools": []}, "add_tool"),
    ]:
        with pytest.raises(InvalidArguments, match=words):
            agent.replace(**changes)


async def test_delegates_stay_and_a_copy_can_be_one():
    below = BaseAgent("Below", "p", client=ScriptedModel(lambda request: "deep"))
    ask = ScriptedModel(
        lambda r: "done" if len(r.transcript) > 1 else answers.call("delegate_to_below", {"query": "?"})
    )
    above = copy.copy(BaseAgent("Above", "p", client=ask).register_delegate(below))
    assert (await above.run("x")).tool_results[0].content == "deep"
    other = BaseAgent("Other", "p", client=ask).register_delegate(copy.deepcopy(below))
    assert (await other.run("x")).tool_results[0].content == "deep"


WAYS_TO_COPY: list[Callable[[Any], Any]] = [lambda agent: agent.replace(), copy.copy, copy.deepcopy]


@pytest.mark.parametrize("kind", [BaseAgent, sync.BaseAgent], ids=shown)
@pytest.mark.parametrize("way", WAYS_TO_COPY, ids=["replace", "copy", "deepcopy"])
@pytest.mark.parametrize("parameters", [None, {"max-rows": {"type": "int", "default": 3}}], ids=["a query", "fields"])
async def test_a_copy_that_is_its_own_delegate_asks_itself(
    kind: Any, way: Callable[[Any], Any], parameters: dict[str, Any] | None
):
    arguments = {"query": "deeper"} if parameters is None else {"max-rows": 7}
    model = ScriptedModel([answers.call("ask", arguments), "below", "above"])
    agent = kind("A", "the original", client=model)
    agent.register_delegate(agent, "ask", parameters=parameters)
    copied = way(agent)
    copied.system_prompt = "the copy"
    if kind is BaseAgent:
        result = await copied.run("x")
    else:
        result = await anyio.to_thread.run_sync(lambda: copied.run("x"))
    assert result.content == "above"
    assert [request["messages"][0]["content"] for request in model.requests] == ["the copy"] * 3
    assert copied.get_tool_schemas() == agent.get_tool_schemas()
    copied.register_delegate(copied, "ask", parameters=parameters)  # the same once more is nothing
    assert len(agent.get_tools()) == len(copied.get_tools()) == 1


@pytest.mark.parametrize("way", WAYS_TO_COPY, ids=["replace", "copy", "deepcopy"])
def test_a_copy_has_delegates_that_are_others_and_functions_that_were_given_the_agent(way: Callable[[Any], Any]):
    def whose(agent: Any, mark: str, *, by: Any = None) -> str:
        return f"{agent.name} {by.name} {mark}"

    other = BaseAgent("Other", "o", client=ScriptedModel(["from the other"]))
    agent = BaseAgent("A", "a", client=ScriptedModel([])).register_delegate(other, "ask")
    agent.add_tool(functools.partial(whose, agent, by=agent), name="whose")
    copied = way(agent)
    copied.name = "B"
    assert sync.execute_tool(copied, "ask", query="x").content == "from the other"
    assert sync.execute_tool(copied, "whose", mark="!").content == "B B !"
    assert sync.execute_tool(agent, "whose", mark="!").content == "A A !"
