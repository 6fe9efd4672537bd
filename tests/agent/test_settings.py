"""Settings of an agent: each can be read, assigned and said in the body of a class, and is never passed over."""

from __future__ import annotations

import inspect
import os
from collections.abc import Awaitable, Callable
from typing import Any, Generic, TypeVar

import anyio
import pytest

from fractal import (
    AgentOptions,
    Around,
    BaseAgent,
    InvalidArguments,
    Limits,
    RunContext,
    run_many,
    sync,
    tool,
)
from fractal._agent.settings import FIXED, SETTINGS
from fractal.testing import ScriptedModel, answers
from tests.support import shown

KINDS: list[Any] = [BaseAgent, sync.BaseAgent]


def watch(event: object) -> None:
    """Do nothing."""


def agree(call: object) -> bool:
    return True


async def go_on(ctx: object, call: object, next: Any) -> Any:
    return await next()


async def go_on_and_on(next: Any) -> Any:
    """Take too little."""


def one_each(message: object) -> int:
    return 1


def sum_up(messages: object) -> str:
    return "short"


VALUES: dict[str, tuple[Any, Any]] = {  # what is given, and how a wrong one looks
    "name": ("Other", 3),
    "system_prompt": ("NEW", 3),
    "model": ("other-model", object()),
    "client": (ScriptedModel(lambda request: "mine"), 3),
    "temperature": (0.5, "hot"),
    "max_tokens": (5, 0),
    "reasoning_effort": ("low", 3),
    "extra_body": ({"top_p": 0.5}, {"messages": []}),
    "limits": (Limits(max_requests=7), [1, 2]),
    "timeout": (30.0, -1),
    "max_retries": (1, -1),
    "system_context": ({"who": "Ada"}, ["who"]),
    "observers": ((watch,), watch),
    "enable_tracing": (True, "yes"),
    "tracing_output_file": (os.path.abspath("trace.jsonl"), 5),
    "approve": (agree, 3),
    "around_tool": ((Around(go_on),), go_on_and_on),
    "around_model": ((Around(go_on, delegates=True),), 3),
    "guard": ((agree,), [3]),
    "output_type": (int, lambda: 0),
    "output_mode": ("prompt", "aloud"),
    "context_window": (500, 0),
    "count_tokens": (one_each, "one"),
    "compact": (sum_up, "short"),
}
each_setting = pytest.mark.parametrize("name", sorted(SETTINGS))


def make(kind: Any, **given: Any) -> Any:
    return kind(**{"name": "A", "system_prompt": "old", "client": ScriptedModel(lambda request: "ok"), **given})


async def assigned(kind: Any, name: str, value: object) -> Any:
    agent = make(kind)
    setattr(agent, name, value)
    return agent


async def constructed(kind: Any, name: str, value: object) -> Any:
    return make(kind, **{name: value})


async def said_in_the_body(kind: Any, name: str, value: object) -> Any:
    given = {"name": "A", "system_prompt": "old", "client": ScriptedModel(lambda request: "ok")}
    given.pop(name, None)
    return type("Mine", (kind,), {name: staticmethod(value) if inspect.isfunction(value) else value})(**given)


WAYS: list[Callable[..., Awaitable[Any]]] = [constructed, assigned, said_in_the_body]


@each_setting
@pytest.mark.parametrize("kind", KINDS, ids=shown)
@pytest.mark.parametrize("way", WAYS[:2], ids=shown)
async def test_a_setting_is_read_as_it_was_given(way: Callable[..., Awaitable[Any]], kind: Any, name: str):
    value = VALUES[name][0]
    assert getattr(await way(kind, name, value), name) == value


@each_setting
@pytest.mark.parametrize("way", WAYS[:2], ids=shown)
async def test_a_setting_that_cannot_be_meant_is_refused_by_name_in_each_way(
    way: Callable[..., Awaitable[Any]], name: str
):
    with pytest.raises(InvalidArguments, match=name):
        await way(BaseAgent, name, VALUES[name][1])


@pytest.mark.parametrize("name", ["model", "temperature", "name", "limits", "output_type", "client", "timeout"])
async def test_a_class_may_say_a_setting_in_its_body(name: str):
    value = VALUES[name][0]
    agent = await said_in_the_body(BaseAgent, name, value)
    assert getattr(agent, name) == getattr(type(agent), name) == value
    below = type("Below", (type(agent),), {})
    given = {"name": "A", "system_prompt": "p"}
    given.pop(name, None)
    assert getattr(below(**given), name) == value
    if name not in given:
        assert getattr(below(**given, **{name: None}), name) == value  # as a subclass passes on what it did not get


def test_what_the_constructor_is_given_goes_before_what_the_class_says():
    class Mine(BaseAgent):
        model = "a"
        max_retries = 5
        name = "Mine"

    agent = Mine(system_prompt="p", model="b", max_retries=3)  # type: ignore[call-arg]
    assert (agent.name, agent.model, agent.max_retries) == ("Mine", "b", 3)


def test_what_a_mixin_says_counts_as_said_by_the_class():
    class Quick:
        timeout = 5.0

    class Named:
        def limits(self) -> int:
            return 1

    assert type("Mine", (Quick, BaseAgent), {})("A", "p").timeout == 5.0
    assert type("Mine", (BaseAgent, Quick), {})("A", "p").timeout is None  # as Python looks for attributes
    with pytest.raises(InvalidArguments, match=r"Mine\.limits is a function"):
        type("Mine", (Named, BaseAgent), {})


@each_setting
@pytest.mark.parametrize("form", ["method", "property"])
def test_a_method_of_that_name_is_refused_when_the_class_is_made(name: str, form: str):
    def mine(self: object) -> int:
        return 1

    with pytest.raises(InvalidArguments, match=rf"Mine\.{name} is a .*give yours another name"):
        type("Mine", (BaseAgent,), {name: mine if form == "method" else property(mine)})


def test_the_constructor_says_what_is_wrong():
    wrong: list[tuple[tuple[Any, ...], dict[str, Any], str]] = [
        (("x",), {}, "system_prompt"),
        ((), {}, "name and system_prompt"),
        (("x", "p", "m", None, 0.5), {}, "by name"),
        (("x", "p"), {"name": "y"}, "twice"),
        (("x", "p"), {"base_url": "http://x"}, "OpenAIModel"),
        (("x", "p"), {"tools": [len]}, "add_tool"),
        (("x",), {"instructions": "p"}, "system_prompt="),
        (("x", "p"), {"middleware": []}, "around_tool="),
        (("x", "p"), {"input_guardrails": []}, "guard="),
        (("x", "p"), {"temprature": 1}, "did you mean temperature="),
    ]
    for kind in KINDS:
        for given, named, words in wrong:
            with pytest.raises(TypeError) as caught:
                kind(*given, **named)
            assert words in str(caught.value)
            assert "Definition" not in str(caught.value)


class OtherClient:
    chat = None


@pytest.mark.parametrize("given", [ScriptedModel(["x"]), OtherClient(), 5, b"gpt"], ids=shown)
def test_a_client_in_the_place_of_the_model_is_refused(given: Any):
    with pytest.raises(InvalidArguments, match=r"model=.*clients and models go to client="):
        BaseAgent("A", "p", given)
    with pytest.raises(InvalidArguments, match="client="):
        BaseAgent("A", "p").model = given


async def test_before_the_constructor_a_setting_is_refused_in_words():
    class Mine(BaseAgent):
        def __init__(self) -> None:
            self.timeout = 3
            super().__init__("A", "p")

    with pytest.raises(InvalidArguments, match=r"Mine\.__init__ has not called super"):
        Mine()


# ---- what runs make of them


SENT: dict[str, Callable[[dict[str, Any]], bool]] = {
    "temperature": lambda request: request.get("temperature") == 0.5,
    "max_tokens": lambda request: request.get("max_tokens") == 5,
    "reasoning_effort": lambda request: request.get("reasoning_effort") == "low",
    "extra_body": lambda request: request.get("top_p") == 0.5,
    "model": lambda request: request["model"] == "other-model",
    "system_prompt": lambda request: request["messages"][0]["content"] == "NEW",
    "output_type": lambda request: "response_format" in request,
    "system_context": lambda request: request["messages"][0]["content"] == "old Ada",
}


async def by_run(agent: Any) -> None:
    await agent.run("x")


async def by_stream(agent: Any) -> None:
    async with agent.stream("x") as stream:
        await stream.result()


async def by_many(agent: Any) -> None:
    await run_many(agent, ["x"])


async def by_delegate(agent: Any) -> None:
    agent.name = "below"
    ask = ScriptedModel([answers.call("delegate_to_below", {"query": "x"}), "done"])
    await BaseAgent("Above", "a", client=ask).register_delegate(agent).run("x")


async def by_facade(agent: Any) -> None:
    await anyio.to_thread.run_sync(lambda: sync.run(agent, "x"))


RUNS: list[Callable[[Any], Awaitable[None]]] = [by_run, by_stream, by_many, by_delegate, by_facade]


@pytest.mark.parametrize("name", sorted(SENT))
@pytest.mark.parametrize("way", RUNS, ids=shown)
async def test_what_is_assigned_holds_from_the_next_run_on(way: Callable[[Any], Awaitable[None]], name: str):
    model = ScriptedModel(lambda request: '{"result": 1}')
    agent = make(BaseAgent, client=model, system_prompt="old {who}")
    await way(agent)
    setattr(agent, name, VALUES[name][0])
    await way(agent)
    first, second = (request for request in model.requests[:2])
    assert (SENT[name](first), SENT[name](second)) == (False, True)


async def test_a_run_keeps_what_it_began_with():
    model = ScriptedModel(lambda request: script())
    seen = model.requests

    def script() -> Any:
        if len(seen) > 1:
            return "done"
        agent.temperature, agent.model, agent.system_prompt = 0.9, "late", "late"
        agent.client, agent.timeout, agent.max_tokens = ScriptedModel(lambda request: "other"), 0.001, 3
        return answers.call("look", {})

    agent = make(BaseAgent, client=model, temperature=0.1, timeout=60, system_prompt="early {n}")
    agent.update_system_context(n=1)

    async def look() -> str:
        agent.system_context["n"] = 2
        return "seen"

    agent.add_tool(look)
    result = await agent.run("x")
    assert (result.content, [request["temperature"] for request in seen]) == ("done", [0.1, 0.1])
    assert [request["messages"][0]["content"] for request in seen] == ["early 1", "early 1"]
    agent.timeout = None
    assert (await agent.run("x")).content == "other"


async def test_values_for_placeholders_can_be_set_one_by_one():
    model = ScriptedModel(lambda request: "ok")
    agent = make(BaseAgent, client=model, system_prompt="{a}{b}", system_context={"a": 1})
    agent.system_context["b"] = 2
    context = agent.system_context
    agent.update_system_context(a=3)
    context["b"] = 4
    await agent.run("x")
    assert model.requests[0]["messages"][0]["content"] == agent.system_prompt == "34"
    with pytest.raises(TypeError):
        agent.extra_body["top_p"] = 1


def test_a_prompt_that_is_a_function_is_read_as_what_it_returns_now_if_it_needs_no_run():
    async def later() -> str:
        return "later"

    def of_run(ctx: RunContext) -> str:
        return ctx.run_id

    texts = iter(["one", "two"])
    agent = make(BaseAgent, system_prompt=lambda: next(texts))
    assert (agent.system_prompt, agent.system_prompt) == ("one", "two")
    for function in (later, of_run):
        agent.system_prompt = function
        assert agent.system_prompt is function


def test_a_subclass_may_call_its_helpers_by_any_name_that_no_page_knows():
    names = ("begin", "drive", "release", "check", "answer", "call_tool", "open_stream", "ask_agent", "core", "verbs")

    class Device(BaseAgent):
        @tool
        def release(self) -> str:
            return "released"

    for name in names:
        setattr(Device, name, getattr(Device, name, lambda self, speed: speed))

    async def use() -> Any:
        async with Device("D", "p", client=ScriptedModel(["ok"])) as agent:
            return (await agent.run("x")).content, (await agent.execute_tool("release")).content

    for backend in ("asyncio", "trio"):
        assert anyio.run(use, backend=backend) == ("ok", "released")


def test_options_of_an_agent_are_those_of_its_constructor():
    parameters = list(inspect.signature(BaseAgent.__init__).parameters.values())[3:]
    assert {parameter.name for parameter in parameters} == set(AgentOptions.__annotations__)
    assert set(AgentOptions.__annotations__) | {"name", "system_prompt"} == {*SETTINGS, *FIXED, "toolkit"}


def test_prices_and_budgets_are_for_constructors_and_leave_the_names_to_users() -> None:
    class Shop(BaseAgent):
        prices = {"bread": 3}  # noqa: RUF012

        def __init__(self) -> None:
            super().__init__("Shop", "You sell.")
            self.budget = 5

    shop = Shop()
    assert (shop.prices, shop.budget) == ({"bread": 3}, 5)
    for wrong in ({"prices": {"m": 1}}, {"budget": 5}):
        with pytest.raises(InvalidArguments, match="give a"):
            BaseAgent("A", "a", **wrong)


@pytest.mark.parametrize("kind", [BaseAgent, sync.BaseAgent])
def test_a_class_of_agents_may_say_its_output_type_in_its_base(kind: Any):
    class Counts(kind[int]): ...

    class More(Counts): ...

    class Otherwise(kind[int]):
        output_type = str

    class Unsaid(kind[Any]): ...

    agents = [Counts("A", "p"), More("A", "p"), Otherwise("A", "p"), Unsaid("A", "p"), kind[int]("A", "p")]
    assert [agent.output_type for agent in agents] == [int, int, str, None, int]
    assert Counts("A", "p", output_type=float).output_type is float
    assert kind[int]("A", "p", output_type=float).output_type is float
    assert kind("A", "p").output_type is None


@pytest.mark.parametrize("kind", [BaseAgent, sync.BaseAgent])
def test_a_generic_class_of_agents_says_its_output_type_only_by_the_parameter_that_it_passes_on(kind: Any):
    Deps, Answer = TypeVar("Deps"), TypeVar("Answer")

    class Needs(kind[str], Generic[Deps]): ...

    class Passes(kind[Answer], Generic[Answer]): ...

    class Lists(Passes[list[Answer]], Generic[Deps, Answer]): ...

    class Orders(Passes[int]): ...

    class Prices(Lists[str, float]): ...

    classes = [Needs, Needs[int], Passes, Passes[int], Passes[Any], Orders, Lists[int, str], Prices]
    assert [one("A", "p").output_type for one in classes] == [str, str, None, int, None, int, list[str], list[float]]


def test_an_output_type_that_is_only_named_is_refused_like_any_other():
    class Named(BaseAgent["NoSuchType"]): ...  # type: ignore[name-defined]

    with pytest.raises(InvalidArguments, match="NoSuchType"):
        Named("A", "p")


def given_later(kind: Any, name: str, value: Any) -> tuple[Any, Any]:
    """An agent of a class of its own, and that class, which has been given an attribute after the agent was made."""

    class Mine(kind): ...

    class Below(Mine): ...

    agent = Below("A", "p", client=ScriptedModel(["ok"]))
    setattr(Mine, name, value)
    return agent, Below


@pytest.mark.parametrize("kind", KINDS, ids=shown)
@pytest.mark.parametrize("name", [*SETTINGS, "toolkit"])
def test_a_setting_that_a_class_is_given_after_it_was_made_is_refused_wherever_it_would_be_passed_over(
    kind: Any, name: str
):
    agent, made_of = given_later(kind, name, "later")
    uses: list[Callable[[], object]] = [
        lambda: sync.run(agent, "x"),
        lambda: agent.run_sync("x"),
        lambda: sync.run_many(agent, ["x"]),
        lambda: sync.stream(agent, "x").__enter__(),
        lambda: sync.execute_tool(agent, "x"),
        lambda: agent.replace(temperature=0.5),
        lambda: setattr(agent, "temperature", 0.5),
        lambda: made_of("A", "p"),
    ]
    for use in uses:
        with pytest.raises(InvalidArguments, match=f"Mine.{name} = 'later' was said after the class was made"):
            use()
    assert vars(agent).keys() == {"_AgentDefinition__core"}


def test_what_a_mixin_says_below_what_the_class_says_hides_nothing():
    class Mixin:
        temperature = 0.1

    class Mine(Mixin, BaseAgent):
        model = "gpt"

    agent = Mine("A", "p", client=ScriptedModel(["ok"]))
    assert (sync.run(agent, "x").content, agent.temperature, agent.model) == ("ok", 0.1, "gpt")


@pytest.mark.parametrize("wrong", [3, ["top_p"], {1: 2}], ids=str)
def test_further_fields_of_a_request_are_a_dict_of_names(wrong: Any):
    with pytest.raises(InvalidArguments, match=r"extra_body=.*: give a dict of fields"):
        BaseAgent("A", "a", extra_body=wrong)
