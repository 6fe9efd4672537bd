"""Answers as Python objects, in real runs: what goes over the wire, what comes back, and what happens in between."""

from __future__ import annotations

import dataclasses
import datetime
import enum
import itertools
import json
import pickle
import threading
from collections.abc import Callable, Iterator, Sequence
from typing import Annotated, Any, Literal, NamedTuple

import anyio
import openai
import pytest
from pydantic import BaseModel, Field, TypeAdapter
from typing_extensions import TypedDict

from fractal import (
    AgentResult,
    AnswerRejected,
    BaseAgent,
    InvalidArguments,
    InvalidOutput,
    LimitHit,
    Limits,
    RetryScheduled,
    RunContext,
    RunFinished,
    ToolStarted,
    sync,
    tool,
)
from fractal._engine import ask as _ask
from fractal.models.openai import OpenAIModel
from fractal.testing import Endpoint, answers
from fractal.testing.answers import Answer, AnswerLike, ToolCallAnswer
from tests.streams import Watch, assert_well_formed
from tests.support import assert_continuable, in_thread, outcomes

StartEndpoint = Callable[..., Endpoint]

MODES = ("native", "tool", "prompt")
WAYS = ("run", "stream", "sync.run", "sync.stream")


# ---- types


class Mood(enum.Enum):
    CALM = "calm"
    WILD = "wild"


class City(BaseModel):
    name: str
    people: int


class Country(BaseModel):
    capital: City
    cities: list[City]
    mood: Mood
    leader: str | None = None


@dataclasses.dataclass
class Visit:
    city: str
    day: datetime.date
    nights: int = 1


class Row(TypedDict):
    key: str
    values: list[float]


class Pair(NamedTuple):
    left: str
    right: int


class Cat(BaseModel):
    kind: Literal["cat"]
    lives: int


class Dog(BaseModel):
    kind: Literal["dog"]
    tricks: list[str]


ROME = City(name="Rome", people=3)
OSLO = City(name="Oslo", people=1)


@dataclasses.dataclass(frozen=True)
class Kind:
    """A type, a value of it, and the value's JSON."""

    type: Any
    value: Any
    json: Any
    is_strict: bool = True

    @property
    def is_one_of_several(self) -> bool:
        """Whether what is shown before the end may be of another type."""
        return self.value is None or self.type == City | str

    @property
    def sent(self) -> dict[str, Any]:
        """The object that a model writes: the value itself, or the value in a wrapper."""
        return self.json if TypeAdapter(self.type).json_schema().get("type") == "object" else {"result": self.json}


KINDS: dict[str, Kind] = {
    "model": Kind(City, ROME, {"name": "Rome", "people": 3}),
    "nested model": Kind(
        Country,
        Country(capital=ROME, cities=[ROME, OSLO], mood=Mood.WILD),
        {
            "capital": {"name": "Rome", "people": 3},
            "cities": [{"name": "Rome", "people": 3}, {"name": "Oslo", "people": 1}],
            "mood": "wild",
            "leader": None,
        },
    ),
    "dataclass": Kind(
        Visit,
        Visit("Rome", datetime.date(2026, 5, 1), 2),
        {"city": "Rome", "day": "2026-05-01", "nights": 2},
    ),
    "TypedDict": Kind(Row, {"key": "a", "values": [1.5, 2.0]}, {"key": "a", "values": [1.5, 2.0]}),
    "NamedTuple": Kind(Pair, Pair("a", 1), ["a", 1], is_strict=False),
    "list of models": Kind(list[City], [ROME, OSLO], [{"name": "Rome", "people": 3}, {"name": "Oslo", "people": 1}]),
    "empty list": Kind(list[City], [], []),
    "union": Kind(Cat | Dog, Dog(kind="dog", tricks=["sit"]), {"kind": "dog", "tricks": ["sit"]}),
    "model or text": Kind(City | str, "no such city", "no such city"),
    "optional": Kind(City | None, ROME, {"name": "Rome", "people": 3}),
    "None of an optional": Kind(City | None, None, None),
    "Literal": Kind(Literal["yes", "no"], "yes", "yes"),
    "enum": Kind(Mood, Mood.CALM, "calm"),
    "int": Kind(int, 42, 42),
    "float": Kind(float, 0.5, 0.5),
    "bool": Kind(bool, True, True),
    "date": Kind(datetime.date, datetime.date(2026, 5, 1), "2026-05-01"),
    "annotated": Kind(Annotated[int, Field(ge=1, le=5)], 4, 4),
    "dict": Kind(dict[str, int], {"a": 1}, {"a": 1}, is_strict=False),
    "tuple": Kind(tuple[int, str], (1, "a"), [1, "a"], is_strict=False),
}


# ---- scripts and runs


@pytest.fixture(autouse=True, scope="module")
def _http_is_imported() -> None:
    """The first request of a process imports the HTTP library, which would take the time of a test."""
    with Endpoint("ok") as one:
        model = OpenAIModel(base_url=one.url, api_key="sk-test")
        sync.run(BaseAgent("A", "a", client=model), "go").raise_for_error()


@pytest.fixture(autouse=True)
def _short_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_ask, "FIRST_BACK_OFF", 0.01)


def final(arguments: dict[str, Any] | str, id: str = "f1") -> ToolCallAnswer:
    """A call of the tool that takes the answer."""
    return answers.call("final_answer", arguments, id=id)


def said(mode: str, value: dict[str, Any] | str, id: str = "f1") -> Answer:
    """The answer as a model gives it that has been asked in some way."""
    text = value if isinstance(value, str) else json.dumps(value)
    return answers.calls(final(text, id)) if mode == "tool" else answers.text(text)


RIGHT = {"name": "Rome", "people": 3}
WRONG = {"name": "Rome"}


def atlas(**options: Any) -> BaseAgent:
    return BaseAgent("Atlas", "You know cities.", **{"output_type": City, **options})


async def start(way: str, agent: BaseAgent, asked: Any = "Rome?", **options: Any) -> AgentResult:
    """One run, started in one of the ways there are; streams are read to their end."""
    match way:
        case "run":
            return await agent.run(asked, **options)
        case "stream":
            async with agent.stream(asked, **options) as stream:
                events = [event async for event in stream]
                assert_well_formed(events)
                return await stream.result()
        case "sync.run":
            return await in_thread(lambda: sync.run(agent, asked, **options))
        case _:

            def drain() -> AgentResult:
                with sync.stream(agent, asked, **options) as stream:
                    assert_well_formed(list(stream))
                    return stream.result()

            return await in_thread(drain)


def facts(result: AgentResult) -> dict[str, Any]:
    """What of a result is the same for each way to start the run."""
    shown = result.model_dump(mode="json", exclude={"run_id", "elapsed"})
    for call in shown["tool_results"]:
        del call["elapsed"]
    return shown


def bodies(endpoint: Endpoint) -> list[dict[str, Any]]:
    """The requests, without what only streams send."""
    return [
        {name: value for name, value in request.body.items() if not name.startswith("stream")}
        for request in endpoint.requests
    ]


async def in_each_way(
    start_endpoint: StartEndpoint,
    script: Sequence[AnswerLike],
    build: Callable[[], BaseAgent],
    **options: Any,
) -> tuple[AgentResult, list[dict[str, Any]]]:
    """The result and the requests of a run, which are the same in whatever way it is started."""
    seen: list[tuple[AgentResult, list[dict[str, Any]]]] = []
    for way in WAYS:
        one = start_endpoint(script)
        result = await start(way, build(), **options)
        assert_continuable(result)
        assert one.answers_left == 0
        seen.append((result, bodies(one)))
    for result, requests in seen[1:]:
        assert result.content == seen[0][0].content
        assert facts(result) == facts(seen[0][0])
        assert requests == seen[0][1]
    return seen[0]


def tool_names(body: dict[str, Any]) -> list[str]:
    return [each["function"]["name"] for each in body.get("tools", ())]


# ---- types and modes


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", KINDS)
async def test_an_answer_of_every_kind_is_a_value_of_it(name: str, mode: str, endpoint: StartEndpoint):
    kind = KINDS[name]
    one = endpoint(said(mode, kind.sent))
    agent = BaseAgent("A", "You answer.", output_type=kind.type, output_mode=mode)
    result = await agent.run("?")
    assert result.success, result.error
    assert (result.content, type(result.content)) == (kind.value, type(kind.value))
    assert result.stop_reason == "finished"
    assert_continuable(result)
    assert_goes_through_json(result, kind)
    if mode == "native":
        assert_strict_if_possible(one.requests[0].body["response_format"], kind)

    async with agent.stream("?") as stream:
        values = [value async for value in stream.partial()]
    assert facts(await stream.result()) == facts(result)
    assert (values[-1], type(values[-1])) == (kind.value, type(kind.value))
    assert kind.is_one_of_several or all(type(value) is type(kind.value) for value in values)
    first, second = bodies(one)
    assert first == second


def assert_goes_through_json(result: AgentResult, kind: Kind) -> None:
    text = result.model_dump_json()
    assert json.loads(text)["content"] == kind.json
    again = AgentResult.model_validate_json(text)
    assert TypeAdapter(kind.type).validate_python(again.content) == kind.value
    assert again.messages == result.messages
    assert again.model_dump_json() == text


def assert_strict_if_possible(response_format: dict[str, Any], kind: Kind) -> None:
    sent = response_format["json_schema"]
    assert (response_format["type"], sent.keys()) == ("json_schema", {"name", "schema", "strict"})
    assert sent["name"].replace("_", "").isalnum()
    assert sent["schema"]["type"] == "object"
    assert sent["strict"] is kind.is_strict
    for each in objects_in(sent["schema"]) if kind.is_strict else ():
        assert each["additionalProperties"] is False
        assert each["required"] == list(each["properties"])


def objects_in(schema: Any) -> Iterator[dict[str, Any]]:
    """Every schema of an object in a schema."""
    if isinstance(schema, dict):
        if schema.get("type") == "object":
            yield schema
        for inner in schema.values():
            yield from objects_in(inner)
    elif isinstance(schema, list):
        for inner in schema:
            yield from objects_in(inner)


@pytest.mark.parametrize("mode", [*MODES, "auto"])
async def test_text_is_text_in_whatever_mode(mode: Any, endpoint: StartEndpoint):
    result, requests = await in_each_way(
        endpoint, ['{"name": "Rome"}'], lambda: BaseAgent("A", "You talk.", output_type=str, output_mode=mode)
    )
    assert result.content == '{"name": "Rome"}'
    assert requests == [
        {
            "model": "gpt-4o-mini",
            "messages": [{"role": "system", "content": "You talk."}, {"role": "user", "content": "Rome?"}],
        }
    ]


CITY_SCHEMA = {
    "properties": {"name": {"type": "string"}, "people": {"type": "integer"}},
    "required": ["name", "people"],
    "type": "object",
}
ASKED = {"role": "user", "content": "Rome?"}
WIRE: dict[str, dict[str, Any]] = {
    "native": {
        "model": "gpt-4o-mini",
        "messages": [{"role": "system", "content": "You know cities."}, ASKED],
        "response_format": {
            "type": "json_schema",
            "json_schema": {
                "name": "City",
                "strict": True,
                "schema": CITY_SCHEMA | {"additionalProperties": False},
            },
        },
    },
    "tool": {
        "model": "gpt-4o-mini",
        "messages": [
            {
                "role": "system",
                "content": "You know cities.\n\nGive the final answer by calling the tool 'final_answer', not as text.",
            },
            ASKED,
        ],
        "tools": [
            {
                "type": "function",
                "function": {
                    "name": "final_answer",
                    "description": "Give the final answer. Call it once, when there is nothing left to find out.",
                    "parameters": CITY_SCHEMA,
                },
            }
        ],
    },
    "prompt": {
        "model": "gpt-4o-mini",
        "messages": [
            {
                "role": "system",
                "content": "You know cities.\n\nGive the final answer as JSON only: no other text, no code fence."
                " It must fit this JSON Schema:\n" + json.dumps(CITY_SCHEMA, separators=(",", ":")),
            },
            ASKED,
        ],
    },
}


@pytest.mark.parametrize("mode", MODES)
async def test_this_goes_over_the_wire(mode: str, endpoint: StartEndpoint):
    result, requests = await in_each_way(endpoint, [said(mode, RIGHT)], lambda: atlas(output_mode=mode))
    assert requests == [WIRE[mode]]
    assert result.content == ROME


async def test_an_agent_without_a_prompt_is_told_of_the_form_alone(endpoint: StartEndpoint):
    one = endpoint(json.dumps(RIGHT))
    await BaseAgent("A", "", output_type=City, output_mode="prompt").run("?")
    await BaseAgent("A", "", output_type=City, output_mode="native").run("?")
    first, second = (request.body["messages"] for request in one.requests)
    assert first[0]["content"].startswith("Give the final answer as JSON only")
    assert [message["role"] for message in second] == ["user"]


async def test_a_type_that_contains_itself_is_asked_for(endpoint: StartEndpoint):
    one = endpoint('{"name": "a", "parts": [{"name": "b", "parts": []}]}')
    result = await BaseAgent("A", "You sort.", output_type=Tree).run("?")
    assert result.content == Tree(name="a", parts=[Tree(name="b", parts=[])])
    schema = one.requests[0].body["response_format"]["json_schema"]["schema"]
    assert schema["type"] == "object"
    assert "parts" in schema["properties"]


class Tree(BaseModel):
    name: str
    parts: list[Tree]


async def test_a_run_may_bring_a_type_and_a_mode_of_its_own(endpoint: StartEndpoint):
    one = endpoint(['{"result": [1, 2]}', "Just text.", json.dumps(RIGHT), said("tool", RIGHT), json.dumps(RIGHT)])
    agent = atlas()
    assert (await agent.run("?", output_type=list[int])).content == [1, 2]
    assert (await agent.run("?", output_type=str)).content == "Just text."
    assert (await agent.run("?")).content == ROME
    assert (await agent.run("?", output_mode="tool")).content == ROME
    assert (await BaseAgent("A", "a").run("?", output_type=City, output_mode="prompt")).content == ROME
    formats = [request.body.get("response_format", {}).get("json_schema", {}).get("name") for request in one.requests]
    assert formats == ["list_int", None, "City", None, None]


@pytest.mark.parametrize("options", [{"output_mode": "json"}, {"output_type": object()}, {"output_type": "City"}])
@pytest.mark.parametrize("way", WAYS)
async def test_what_cannot_be_asked_for_is_told_at_once(way: str, options: dict[str, Any], endpoint: StartEndpoint):
    one = endpoint([])
    with pytest.raises(InvalidArguments, match=next(iter(options))):
        atlas(**options)
    with pytest.raises(InvalidArguments, match=next(iter(options))):
        await start(way, atlas(), **options)
    assert one.requests == []


# ---- tools beside the answer


@pytest.mark.parametrize("mode", MODES)
async def test_tools_are_called_before_the_answer(mode: str, endpoint: StartEndpoint):
    def build() -> BaseAgent:
        return atlas(output_mode=mode).add_tool(lambda city: f"{city} has 3", name="look")

    script = [answers.call("look", {"city": "Rome"}, id="c1"), said(mode, RIGHT)]
    result, requests = await in_each_way(endpoint, script, build)
    assert result.content == ROME
    assert [call.tool_name for call in result.tool_results if call.tool_name == "look"] == ["look"]
    assert result.usage.tool_calls == 1
    assert requests[1]["messages"][-1] == {"role": "tool", "tool_call_id": "c1", "content": "Rome has 3"}
    for body in requests:
        assert tool_names(body) == ["look"] + ["final_answer"] * (mode == "tool")
        assert ("response_format" in body) is (mode == "native")


@pytest.mark.parametrize("is_first", [True, False], ids=["answer first", "answer last"])
async def test_an_answer_beside_other_calls_waits_for_them_and_leaves_none_open(
    is_first: bool, endpoint: StartEndpoint
):
    ended: list[str] = []

    async def asynchronous() -> str:
        await anyio.sleep(0.02)
        ended.append("asynchronous")
        return "a"

    def plain() -> str:
        ended.append("plain")
        return "p"

    def failing() -> str:
        raise ValueError("no")

    def build() -> BaseAgent:
        ended.clear()
        return atlas(output_mode="tool").add_tool(asynchronous).add_tool(plain).add_tool(failing)

    others = [answers.call(name, {}, id=name) for name in ("asynchronous", "plain", "failing", "unknown")]
    calls = [final(RIGHT), *others] if is_first else [*others, final(RIGHT)]
    result, requests = await in_each_way(endpoint, [answers.calls(*calls)], build)
    assert result.content == ROME
    assert sorted(ended) == ["asynchronous", "plain"]
    assert len(requests) == 1
    assert {call.call_id: call.outcome for call in result.tool_results} == {
        "f1": "ok",
        "asynchronous": "ok",
        "plain": "ok",
        "failing": "error",
        "unknown": "error",
    }
    assert [m["tool_call_id"] for m in result.messages if m["role"] == "tool"] == [call.id for call in calls]


async def test_a_wrong_answer_beside_other_calls_is_told_with_their_results(endpoint: StartEndpoint):
    def build() -> BaseAgent:
        return atlas(output_mode="tool").add_tool(lambda: "seen", name="look")

    script = [answers.calls(final(WRONG), answers.call("look", {}, id="c1")), said("tool", RIGHT, id="f2")]
    result, requests = await in_each_way(endpoint, script, build)
    assert result.content == ROME
    told = [message["content"] for message in requests[1]["messages"] if message["role"] == "tool"]
    assert "'people' is missing" in told[0]
    assert told[1] == "seen"


@pytest.mark.parametrize("is_right_first", [True, False])
async def test_of_two_answers_in_one_reply_a_valid_one_is_taken(is_right_first: bool, endpoint: StartEndpoint):
    both = [final(RIGHT, id="f1"), final(WRONG, id="f2")]
    endpoint([answers.calls(*(both if is_right_first else reversed(both)))])
    result = await atlas(output_mode="tool").run("?", max_retries=0)
    assert result.content == ROME
    assert_continuable(result)


async def test_two_wrong_answers_in_one_reply_are_one_failed_try(endpoint: StartEndpoint):
    one = endpoint([answers.calls(final(WRONG, id="f1"), final({}, id="f2")), said("tool", RIGHT, id="f3")])
    assert (await atlas(output_mode="tool").run("?", max_retries=1)).content == ROME
    assert len(one.requests) == 2


@pytest.mark.parametrize("mode", MODES)
async def test_a_tool_of_the_users_may_have_the_name_of_the_answers(mode: str, endpoint: StartEndpoint):
    def build() -> BaseAgent:
        return atlas(output_mode=mode).add_tool(lambda name: f"noted {name}", name="final_answer")

    end = answers.calls(answers.call("final_answer_2", RIGHT, id="c2")) if mode == "tool" else said(mode, RIGHT)
    result, requests = await in_each_way(endpoint, [final({"name": "x"}), end], build)
    assert result.content == ROME
    assert requests[1]["messages"][-1]["content"] == "noted x"
    assert tool_names(requests[0]) == ["final_answer"] + ["final_answer_2"] * (mode == "tool")
    if mode == "tool":
        assert "'final_answer_2'" in requests[0]["messages"][0]["content"]
    endpoint([final({"name": "not the answer"}), end])
    values, _ = await values_of("stream", build())
    assert values[-1] == ROME
    assert not any((value.name or "").startswith("not") for value in values)


@pytest.mark.parametrize("mode", MODES)
async def test_a_terminating_tool_still_ends_the_run_with_its_own_result(mode: str, endpoint: StartEndpoint):
    @tool(terminate=True)
    def give_up(reason: str) -> str:
        if not reason:
            raise ValueError("say why")
        return f"gave up: {reason}"

    script = [answers.call("give_up", {"reason": ""}, id="c1"), answers.call("give_up", {"reason": "tired"}, id="c2")]
    result, _ = await in_each_way(endpoint, script, lambda: atlas(output_mode=mode).add_tool(give_up))
    assert (result.content, result.stop_reason) == ("gave up: tired", "terminated")


async def test_of_an_answer_and_a_terminating_tool_the_first_call_counts(endpoint: StartEndpoint):
    stop = answers.call("stop", {}, id="c1")
    contents: list[Any] = []
    for calls in ([stop, final(RIGHT)], [final(RIGHT), stop], [final(WRONG), stop]):
        endpoint([answers.calls(*calls)])
        agent = atlas(output_mode="tool").add_tool(lambda: "stopped", name="stop", terminate=True)
        result = await agent.run("?")
        assert_continuable(result)
        contents.append((result.content, result.stop_reason))
    assert contents == [("stopped", "terminated"), (ROME, "finished"), ("stopped", "terminated")]


async def test_answers_are_none_of_the_tool_calls_that_are_limited(endpoint: StartEndpoint):
    script = [said("tool", WRONG), said("tool", RIGHT, id="f2")]
    result, _ = await in_each_way(endpoint, script, lambda: atlas(output_mode="tool", limits=Limits(max_tool_calls=0)))
    assert result.content == ROME
    assert result.usage.tool_calls == 0


async def test_an_answer_is_not_lost_to_a_call_beside_it_that_the_budget_forbids(endpoint: StartEndpoint):
    called: list[int] = []

    def build() -> BaseAgent:
        return atlas(output_mode="tool").add_tool(lambda: called.append(1), name="look")

    script = [answers.calls(answers.call("look", {}, id="c1"), final(RIGHT))]
    result, _ = await in_each_way(endpoint, script, build, limits=Limits(max_tool_calls=0))
    assert result.content == ROME
    assert (outcomes(result), called) == (["skipped", "ok"], [])


# ---- text where a call was wanted


async def test_text_in_tool_mode_is_asked_again_with_the_tool_forced_once(endpoint: StartEndpoint):
    script = ["Rome is nice.", said("tool", WRONG), said("tool", RIGHT, id="f2")]
    result, requests = await in_each_way(endpoint, script, lambda: atlas(output_mode="tool"))
    assert result.content == ROME
    forced = {"type": "function", "function": {"name": "final_answer"}}
    assert [body.get("tool_choice") for body in requests] == [None, forced, forced]
    assert requests[1]["messages"][-2:] == [
        {"role": "assistant", "content": "Rome is nice."},
        {
            "role": "user",
            "content": "The answer was not accepted: the answer is not valid JSON: there is no JSON object in it."
            " Give the whole answer again by calling the tool 'final_answer'.",
        },
    ]


async def test_only_the_next_reply_has_to_call_the_tool(endpoint: StartEndpoint):
    one = endpoint(["Hm.", answers.call("look", {}, id="c1"), said("tool", RIGHT)])
    agent = atlas(output_mode="tool").add_tool(lambda: "seen", name="look")
    assert (await agent.run("?")).content == ROME
    assert ["tool_choice" in body for body in bodies(one)] == [False, True, False]


async def test_an_answer_that_is_given_as_text_is_an_answer_in_tool_mode_too(endpoint: StartEndpoint):
    result, requests = await in_each_way(
        endpoint, [f"```json\n{json.dumps(RIGHT)}\n```"], lambda: atlas(output_mode="tool")
    )
    assert result.content == ROME
    assert len(requests) == 1


def refusing(status: int, param: str | None = None) -> Answer:
    """An endpoint's own error."""
    error = {"message": f"no {param}", "type": "invalid_request_error", "code": None, "param": param}
    return Answer(status=status, error=error)


def fastapi(*place: str) -> Answer:
    """A fault as FastAPI reports it."""
    detail = [{"type": "extra_forbidden", "loc": ["body", *place], "msg": "Extra inputs are not permitted"}]
    return answers.raw(json.dumps({"detail": detail}), status=422, content_type="application/json")


@pytest.mark.parametrize(
    "refusal",
    [refusing(400), refusing(400, "tool_choice"), refusing(404), refusing(422), fastapi("tool_choice")],
    ids=["400", "400 tool_choice", "404", "422", "FastAPI"],
)
async def test_where_a_forced_call_is_refused_the_run_goes_on_without(refusal: Answer, endpoint: StartEndpoint):
    script = ["Hm.", refusal, "Hm, hm.", said("tool", RIGHT)]
    events: list[Any] = []
    result, requests = await in_each_way(endpoint, script, lambda: atlas(output_mode="tool", observers=[events.append]))
    assert result.content == ROME
    assert ["tool_choice" in body for body in requests] == [False, True, False, False]
    assert sum(isinstance(event, RetryScheduled) for event in events) == len(WAYS)


async def test_another_fault_of_a_request_with_a_forced_call_ends_the_run(endpoint: StartEndpoint):
    one = endpoint(["Hm.", refusing(400, "messages")])
    result = await atlas(output_mode="tool").run("?")
    assert (result.stop_reason, len(one.requests)) == ("model_error", 2)
    assert_continuable(result)


# ---- auto: the first way that the endpoint takes


REFUSALS: dict[str, Callable[[str], Answer]] = {
    "400": lambda field: refusing(400),
    "400 with the field": lambda field: refusing(400, field),
    "400 with a path": lambda field: refusing(400, f"{field}.json_schema" if field != "tools" else "tools[0].function"),
    "404": lambda field: refusing(404),
    "415": lambda field: refusing(415),
    "422": lambda field: refusing(422, field),
    "501": lambda field: refusing(501),
    "FastAPI": fastapi,
}


def way_of(body: dict[str, Any]) -> str:
    if "response_format" in body:
        return "native"
    return "tool" if "final_answer" in tool_names(body) else "prompt"


@pytest.mark.parametrize("name", REFUSALS)
async def test_a_way_that_is_refused_gives_place_to_the_next_and_is_remembered(name: str, endpoint: StartEndpoint):
    refuse = REFUSALS[name]
    events: list[Any] = []

    def build() -> BaseAgent:
        events.clear()
        return atlas(observers=[events.append])

    result, requests = await in_each_way(endpoint, [refuse("response_format"), said("tool", RIGHT)], build)
    assert result.content == ROME
    assert list(map(way_of, requests)) == ["native", "tool"]
    [retry] = [event for event in events if isinstance(event, RetryScheduled)]
    assert (retry.attempt, retry.wait) == (1, 0.0)

    one = endpoint([refuse("response_format"), refuse("tools"), json.dumps(RIGHT), json.dumps(RIGHT)])
    agent = build()
    for _ in range(2):
        result = await agent.run("?")
        assert result.content == ROME
    assert list(map(way_of, bodies(one))) == ["native", "tool", "prompt", "prompt"]
    assert result.usage.requests == 1


async def test_what_one_run_has_learnt_streams_and_blocking_runs_know_too(endpoint: StartEndpoint):
    one = endpoint([refusing(400), *[said("tool", RIGHT)] * len(WAYS)])
    agent = atlas()
    for way in WAYS:
        assert (await start(way, agent)).content == ROME
    assert list(map(way_of, bodies(one))) == ["native"] + ["tool"] * len(WAYS)


@pytest.mark.parametrize(
    "error", [refusing(400, "model"), refusing(400, "messages"), fastapi("temperature"), refusing(401), refusing(403)]
)
async def test_a_fault_somewhere_else_is_no_refusal(error: Answer, endpoint: StartEndpoint):
    one = endpoint(lambda _: error)
    agent = atlas()
    for _ in range(2):
        result = await agent.run("?")
        assert result.stop_reason == "model_error"
    assert list(map(way_of, bodies(one))) == ["native", "native"]


@pytest.mark.parametrize("status", [429, 500, 503])
async def test_a_busy_endpoint_refuses_nothing(status: int, endpoint: StartEndpoint):
    busy = answers.failure(status, "busy", headers={"retry-after-ms": "1"})
    one = endpoint([busy, busy, json.dumps(RIGHT)])
    assert (await atlas().run("?")).content == ROME
    assert list(map(way_of, bodies(one))) == ["native"] * 3


async def test_a_busy_endpoint_that_refuses_as_well(endpoint: StartEndpoint):
    busy = answers.failure(503, "busy", headers={"retry-after-ms": "1"})
    one = endpoint([busy, refusing(400), busy, said("tool", RIGHT)])
    events: list[Any] = []
    assert (await atlas(observers=[events.append]).run("?", max_retries=2)).content == ROME
    assert list(map(way_of, bodies(one))) == ["native", "native", "tool", "tool"]
    assert sum(isinstance(event, RetryScheduled) for event in events) == 3


@pytest.mark.parametrize("status", [400, 501])
@pytest.mark.parametrize("way", WAYS)
async def test_a_refusal_of_every_way_is_the_first_error_and_is_not_remembered(
    way: str, status: int, endpoint: StartEndpoint
):
    one = endpoint(lambda request: answers.failure(status, f"no {len(one.requests)}") if refuses else json.dumps(RIGHT))
    agent, refuses = atlas(), True
    result = await start(way, agent, max_retries=0)
    assert (result.stop_reason, result.error) == ("model_error", f"HTTP {status}: no 1")
    assert [note.partition(": HTTP")[0] for note in result.exception.__notes__] == [
        "asked again with output_mode='tool'",
        "asked again with output_mode='prompt'",
    ]
    assert_continuable(result)
    refuses = False
    assert (await start(way, agent)).content == ROME
    # A stream is asked for once more in each way, without the usage at its end.
    ways = [kind for kind, _ in itertools.groupby(map(way_of, bodies(one)))]
    assert ways == ["native", "tool", "prompt", "native"]
    assert len(one.requests) == (6 if "stream" in way else 4)


async def test_a_way_that_was_taken_before_is_dropped_for_one_type_and_not_for_all(endpoint: StartEndpoint):
    one = endpoint(
        [
            json.dumps(RIGHT),
            refusing(400),  # says nothing of the way, which the endpoint is known to take
            refusing(400, "response_format"),  # this one schema, then
            said("tool", RIGHT),
            json.dumps(RIGHT),
        ]
    )
    agent = atlas()
    assert (await agent.run("?")).content == ROME
    assert (await agent.run("?")).stop_reason == "model_error"
    assert (await agent.run("?")).content == ROME
    assert (await agent.run("?")).content == ROME
    assert list(map(way_of, bodies(one))) == ["native", "native", "native", "tool", "native"]


def own_async(url: str) -> Any:
    return openai.AsyncOpenAI(base_url=url, api_key="sk-test")


def own_blocking(url: str) -> Any:
    return openai.OpenAI(base_url=url, api_key="sk-test")


class Double:
    """An object with `chat.completions.create`, as tests have them."""

    def __init__(self, url: str) -> None:
        self.chat = self.completions = self
        self._client = openai.AsyncOpenAI(base_url=url, api_key="sk-test", max_retries=0)

    async def create(self, **fields: Any) -> Any:
        return await self._client.chat.completions.create(**fields)

    async def aclose(self) -> None:
        await self._client.close()


@pytest.mark.parametrize("way", ["run", "stream"])
@pytest.mark.parametrize("client", [own_async, own_blocking, Double])
async def test_clients_of_the_users_are_asked_in_the_same_ways(client: Any, way: str, endpoint: StartEndpoint):
    one = endpoint([fastapi("response_format"), refusing(400, "tools"), json.dumps(WRONG), json.dumps(RIGHT)])
    users = client(one.url)
    async with atlas(client=users) as agent:
        result = await start(way, agent)
    assert result.content == ROME
    assert list(map(way_of, bodies(one))) == ["native", "tool", "prompt", "prompt"]
    if isinstance(users, Double):
        await users.aclose()


async def test_a_way_that_a_run_has_begun_with_it_keeps(endpoint: StartEndpoint):
    one = endpoint([answers.call("look", {}), refusing(400, "response_format"), json.dumps(RIGHT)])
    agent = atlas().add_tool(lambda: "seen", name="look")
    result = await agent.run("?")
    assert (result.stop_reason, result.error) == ("model_error", "HTTP 400: no response_format")
    assert_continuable(result)
    assert (await agent.run("?")).content == ROME
    assert list(map(way_of, bodies(one))) == ["native"] * 3


async def test_each_agent_learns_for_itself(endpoint: StartEndpoint):
    one = endpoint([refusing(400), said("tool", RIGHT), json.dumps(RIGHT)])
    assert (await atlas().run("?")).content == ROME
    assert (await atlas().run("?")).content == ROME
    assert list(map(way_of, bodies(one))) == ["native", "tool", "native"]


@pytest.mark.parametrize("mode", MODES)
async def test_a_mode_that_was_asked_for_is_the_only_one(mode: str, endpoint: StartEndpoint):
    one = endpoint(lambda _: refusing(400))
    result = await atlas(output_mode=mode).run("?")
    assert (result.stop_reason, len(one.requests)) == ("model_error", 1)


@pytest.mark.parametrize("allowed", [1, 2])
async def test_no_way_is_tried_that_the_budget_does_not_allow(allowed: int, endpoint: StartEndpoint):
    one = endpoint(lambda _: refusing(400))
    result = await atlas(limits=Limits(max_requests=allowed)).run("?")
    assert (result.stop_reason, len(one.requests), result.usage.requests) == ("budget", allowed, allowed)


async def test_runs_side_by_side_find_the_way_together(endpoint: StartEndpoint):
    def play(request: Any) -> AnswerLike:
        return refusing(400) if "response_format" in request.body else said("tool", RIGHT)

    one = endpoint(play)
    agent = atlas()
    results: list[AgentResult] = []

    async def go() -> None:
        results.append(await agent.run("?"))

    async with anyio.create_task_group() as group:
        for _ in range(10):
            group.start_soon(go)
    assert [result.content for result in results] == [ROME] * 10
    assert len(one.requests) <= 20
    before = len(one.requests)
    assert (await agent.run("?")).content == ROME
    assert len(one.requests) == before + 1


# ---- wrong answers


@pytest.mark.parametrize("mode", MODES)
async def test_a_wrong_answer_twice_then_a_right_one(mode: str, endpoint: StartEndpoint):
    script = [said(mode, WRONG, "f1"), said(mode, {"name": 5, "people": "x"}, "f2"), said(mode, RIGHT, "f3")]
    result, requests = await in_each_way(endpoint, script, lambda: atlas(output_mode=mode))
    assert result.content == ROME
    assert result.metadata["iterations"] == 3
    assert "'people' is missing" in requests[1]["messages"][-1]["content"]
    last = requests[2]["messages"][-1]["content"]
    assert "'name'" in last
    assert "'people'" in last
    assert requests[2]["messages"][: len(requests[1]["messages"])] == requests[1]["messages"]
    role = "tool" if mode == "tool" else "user"
    assert [body["messages"][-1]["role"] for body in requests] == ["user", role, role]


@pytest.mark.parametrize("max_retries", [0, 2])
@pytest.mark.parametrize("mode", MODES)
async def test_answers_that_never_fit_end_the_run_after_so_many(mode: str, max_retries: int, endpoint: StartEndpoint):
    script = [said(mode, WRONG, f"f{n}") for n in range(max_retries + 1)]
    result, requests = await in_each_way(endpoint, script, lambda: atlas(output_mode=mode), max_retries=max_retries)
    assert len(requests) == max_retries + 1
    assert (result.success, result.stop_reason) == (False, "invalid_output")
    assert result.metadata["reason"] == "json_decode_error"
    error = result.exception
    assert isinstance(error, InvalidOutput)
    assert error.attempts == max_retries + 1
    assert "'people' is missing" in error.fault
    assert json.loads(error.answer) == WRONG
    assert error.result is result
    assert str(error) == result.content == result.error
    again = pickle.loads(pickle.dumps(error))
    assert (again.attempts, again.fault, again.answer) == (error.attempts, error.fault, error.answer)
    with pytest.raises(InvalidOutput):
        result.raise_for_error()

    one = endpoint([said(mode, RIGHT, "last")])
    assert (await atlas(output_mode=mode).run("Once more?", messages=result.messages)).content == ROME
    assert one.answers_left == 0


FAULTS: dict[str, tuple[str, str]] = {
    "words": ("I cannot say.", "there is no JSON object in it"),
    "broken JSON": ('{"name": "Rome", "people": }', "not valid JSON"),
    "two answers": (f"{json.dumps(RIGHT)} or {json.dumps(RIGHT)}", "more than one JSON value"),
    "a list": ('[{"name": "Rome", "people": 3}]', "must be a JSON object"),
    "a wrong type": ('{"name": "Rome", "people": "many"}', "'people'"),
    "NaN": ('{"name": "Rome", "people": NaN}', "not valid JSON"),
}


@pytest.mark.parametrize("name", FAULTS)
async def test_the_model_is_told_what_is_wrong(name: str, endpoint: StartEndpoint):
    text, fault = FAULTS[name]
    one = endpoint([text, json.dumps(RIGHT)])
    assert (await atlas(output_mode="prompt").run("?")).content == ROME
    assert fault in one.requests[1].body["messages"][-1]["content"]


@pytest.mark.parametrize(
    "text",
    [
        json.dumps(RIGHT),
        f"```json\n{json.dumps(RIGHT, indent=2)}\n```",
        f"Here you are: {json.dumps(RIGHT)}. Anything else?",
        f"\ufeff  {json.dumps(RIGHT)}\n",
    ],
)
@pytest.mark.parametrize("mode", ["native", "prompt"])
async def test_what_stands_around_an_answer_is_passed_over(mode: str, text: str, endpoint: StartEndpoint):
    endpoint([text])
    result = await atlas(output_mode=mode).run("?")
    assert result.content == ROME
    assert result.messages[-1] == {"role": "assistant", "content": text}


@pytest.mark.parametrize("mode", MODES)
async def test_an_answer_that_is_cut_at_the_token_limit_is_asked_for_again(mode: str, endpoint: StartEndpoint):
    half = dataclasses.replace(said(mode, '{"name": "Ro'), finish_reason="length")
    result, _ = await in_each_way(endpoint, [half, said(mode, RIGHT, "f2")], lambda: atlas(output_mode=mode))
    assert result.content == ROME


async def test_wrong_answers_are_turns(endpoint: StartEndpoint):
    script = [said("native", WRONG)] * 2
    result, requests = await in_each_way(endpoint, script, atlas, max_iterations=2)
    assert (result.stop_reason, len(requests)) == ("max_iterations", 2)


async def test_the_budget_bounds_wrong_answers_too(endpoint: StartEndpoint):
    one = endpoint(lambda _: json.dumps(WRONG))
    result = await atlas(limits=Limits(max_requests=2)).run("?", max_retries=9)
    assert (result.stop_reason, len(one.requests)) == ("budget", 2)
    assert_continuable(result)


@pytest.mark.parametrize("mode", MODES)
async def test_empty_replies_and_refusals_are_what_they_always_are(mode: str, endpoint: StartEndpoint):
    result, requests = await in_each_way(
        endpoint, [answers.empty(), said(mode, RIGHT)], lambda: atlas(output_mode=mode), max_retries=1
    )
    assert (result.content, len(requests), result.metadata["iterations"]) == (ROME, 2, 1)
    result, _ = await in_each_way(endpoint, [answers.refusal("I would rather not")], lambda: atlas(output_mode=mode))
    assert (result.stop_reason, result.error) == ("refusal", "I would rather not")


# ---- validators


@pytest.mark.parametrize("mode", MODES)
async def test_validators_have_a_say_in_their_order(mode: str, endpoint: StartEndpoint):
    seen: list[Any] = []

    def build() -> BaseAgent:
        seen.clear()
        agent = atlas(output_mode=mode)

        @agent.output_validator
        def plain(function: City) -> None:
            city = function
            seen.append(("plain", city, threading.current_thread() is threading.main_thread()))
            if city.people < 0:
                raise AnswerRejected("people cannot be negative")

        @agent.output_validator
        async def rename(city: City, ctx: RunContext[str]) -> City:
            seen.append(("rename", city, ctx.deps))
            return city.model_copy(update={"name": ctx.deps})

        @agent.output_validator
        def last(ctx: RunContext[str], city: City) -> None:
            seen.append(("last", city, ctx.remaining() < 60))

        return agent

    script = [said(mode, {"name": "Rome", "people": -1}, "f1"), said(mode, RIGHT, "f2")]
    result, requests = await in_each_way(endpoint, script, build, deps="Roma", timeout=60)
    assert result.content == City(name="Roma", people=3)
    assert "people cannot be negative" in requests[1]["messages"][-1]["content"]
    assert seen == [
        ("plain", City(name="Rome", people=-1), False),
        ("plain", ROME, False),
        ("rename", ROME, "Roma"),
        ("last", City(name="Roma", people=3), True),
    ]
    written = result.messages[-2]["tool_calls"][0]["function"]["arguments"] if mode == "tool" else None
    assert json.loads(written or result.messages[-1]["content"]) == RIGHT, "the transcript has what the model wrote"


@pytest.mark.parametrize("mode", MODES)
async def test_answers_that_a_validator_never_takes_end_the_run(mode: str, endpoint: StartEndpoint):
    def build() -> BaseAgent:
        agent = atlas(output_mode=mode)

        @agent.output_validator
        async def never(city: City) -> None:
            async with anyio.create_task_group() as group:  # which raises groups
                group.start_soon(reject, city)

        return agent

    async def reject(city: City) -> None:
        raise AnswerRejected(f"{city.name} is too small")

    script = [said(mode, RIGHT, f"f{n}") for n in range(2)]
    result, requests = await in_each_way(endpoint, script, build, max_retries=1)
    assert len(requests) == 2
    assert "Rome is too small" in requests[1]["messages"][-1]["content"]
    error = result.exception
    assert isinstance(error, InvalidOutput)
    assert (error.attempts, error.fault) == (2, "Rome is too small")
    assert json.loads(error.answer) == RIGHT


@pytest.mark.parametrize("is_async", [True, False], ids=["async", "plain"])
@pytest.mark.parametrize("mode", MODES)
async def test_a_validator_that_fails_is_an_unexpected_error(mode: str, is_async: bool, endpoint: StartEndpoint):
    def build() -> BaseAgent:
        agent = atlas(output_mode=mode)

        async def asynchronous(city: City) -> None:
            raise KeyError(city.name)

        def plain(city: City) -> None:
            raise KeyError(city.name)

        agent.output_validator(asynchronous if is_async else plain)
        return agent

    result, requests = await in_each_way(endpoint, [said(mode, RIGHT)], build)
    assert (result.stop_reason, result.error, len(requests)) == ("error", "KeyError: 'Rome'", 1)
    assert isinstance(result.exception.__cause__, KeyError)


async def test_validators_may_be_had_for_text_too(endpoint: StartEndpoint):
    def build() -> BaseAgent:
        agent = BaseAgent("A", "You shout.")

        @agent.output_validator
        def loud(text: str) -> str:
            if not text.isupper():
                raise AnswerRejected("shout")
            return text + "!"

        return agent

    result, requests = await in_each_way(endpoint, ["hello", "HELLO"], build)
    assert result.content == "HELLO!"
    assert requests[1]["messages"][-1]["content"] == (
        "The answer was not accepted: shout. Give the whole answer again."
    )


async def test_validators_are_for_the_agents_own_type_in_whatever_mode(endpoint: StartEndpoint):
    endpoint(['{"result": 5}', "text", json.dumps(RIGHT)])
    agent = atlas()
    calls: list[Any] = []
    agent.output_validator(calls.append)
    assert (await agent.run("?", output_type=int)).content == 5
    assert (await agent.run("?", output_type=str)).content == "text"
    assert calls == []
    assert (await agent.run("?", output_mode="prompt")).content == ROME
    assert calls == [ROME]


@pytest.mark.parametrize("is_async", [True, False], ids=["async", "plain"])
@pytest.mark.parametrize("mode", MODES)
async def test_a_validator_may_ask_another_agent(mode: str, is_async: bool, endpoint: StartEndpoint):
    def play(request: Any) -> AnswerLike:
        return "looks good" if request.body["messages"][0]["content"] == "judge" else said(mode, RIGHT)

    one = endpoint(play)
    watch = Watch()
    agent = atlas(output_mode=mode, observers=[watch])
    judge = BaseAgent("judge", "judge")
    verdicts: list[Any] = []

    async def asynchronous(city: City) -> None:
        verdicts.append((await agent.call_agent(judge, city)).content)

    def plain(city: City) -> None:
        verdicts.append(sync.run(judge, city).content)

    agent.output_validator(asynchronous if is_async else plain)
    result = await agent.run("?", limits=Limits(max_requests=2))
    assert (result.content, verdicts) == (ROME, ["looks good"])
    assert (len(one.requests), result.usage.requests) == (2, 2)
    assert_well_formed(watch)
    assert watch.results("judge")[0].success


@pytest.mark.parametrize("mode", MODES)
async def test_no_tools_time_holds_for_a_validator(mode: str, endpoint: StartEndpoint):
    one = endpoint(lambda _: said(mode, RIGHT))
    agent = atlas(output_mode=mode)

    @agent.output_validator
    async def thorough(city: City) -> None:
        await anyio.sleep(0.1)

    result = await agent.run("?", limits=Limits(tool_timeout=0.02))
    assert (result.content, len(one.requests)) == (ROME, 1)


@pytest.mark.parametrize("mode", MODES)
async def test_a_validator_that_cannot_be_cut_is_told(mode: str, endpoint: StartEndpoint):
    endpoint([said(mode, RIGHT)])
    agent = atlas(output_mode=mode)
    released = threading.Event()

    @agent.output_validator
    def stubborn(city: City) -> None:
        released.wait(10)

    try:
        with anyio.fail_after(5):
            result = await agent.run("?", timeout=0.3)
    finally:
        released.set()
    assert result.stop_reason == "deadline"
    assert result.warnings == ["stubborn could not be stopped: it goes on in its thread, and nobody waits for it"]
    assert_continuable(result)


@pytest.mark.parametrize("cut", ["timeout", "scope"])
@pytest.mark.parametrize("mode", MODES)
async def test_a_validator_is_cut_with_its_run(mode: str, cut: str, endpoint: StartEndpoint):
    endpoint([said(mode, RIGHT)])
    watch = Watch()
    agent = atlas(output_mode=mode, observers=[watch])
    asked, cleaned_up = anyio.Event(), anyio.Event()

    @agent.output_validator
    async def forever(city: City) -> None:
        asked.set()
        try:
            await anyio.sleep_forever()
        finally:
            cleaned_up.set()

    with anyio.fail_after(10):
        if cut == "timeout":
            await agent.run("?", timeout=0.3)
        else:
            async with anyio.create_task_group() as group:
                group.start_soon(agent.run, "?")
                await asked.wait()
                group.cancel_scope.cancel()
    assert asked.is_set()
    assert cleaned_up.is_set()
    [result] = watch.results("Atlas")
    assert result.stop_reason == ("deadline" if cut == "timeout" else "cancelled")
    assert_continuable(result)


# ---- short of time


@pytest.mark.parametrize("mode", MODES)
async def test_when_time_runs_short_the_answer_is_asked_for_in_its_form(mode: str, endpoint: StartEndpoint):
    one = endpoint([answers.call("slow", {}, id="c1"), said(mode, WRONG, "f1"), said(mode, RIGHT, "f2")])
    events: list[Any] = []
    agent = atlas(output_mode=mode, observers=[events.append]).add_tool(anyio.sleep_forever, name="slow")
    # Both give the event loop a chance to cut them with the tools.
    agent.output_validator(lambda city: None)

    @agent.output_validator
    async def checked(city: City) -> None:
        await anyio.sleep(0.01)

    result = await agent.run("?", timeout=20.3, limits=Limits(reserve=20))
    assert (result.content, result.stop_reason) == (ROME, "soft_deadline")
    assert outcomes(result)[0] == "timeout"
    for body in bodies(one)[1:]:
        assert tool_names(body) == ["final_answer" if mode == "tool" else "slow"]
        assert body.get("tool_choice") != "auto" if mode == "tool" else body["tool_choice"] == "none"
        assert ("response_format" in body) is (mode == "native")
        assert "Time is nearly up" in body["messages"][0]["content"]
    assert [event.limit for event in events if isinstance(event, LimitHit)] == ["soft_deadline"]
    assert_continuable(result)


async def test_an_answer_beside_a_tool_is_taken_when_time_cuts_the_tool(endpoint: StartEndpoint):
    endpoint([answers.calls(answers.call("slow", {}, id="c1"), final(RIGHT))])
    agent = atlas(output_mode="tool").add_tool(anyio.sleep_forever, name="slow")
    result = await agent.run("?", timeout=20.3, limits=Limits(reserve=20))
    assert (result.content, outcomes(result)) == (ROME, ["timeout", "ok"])


# ---- delegates


@pytest.mark.parametrize("mode", MODES)
async def test_a_delegates_object_reaches_the_model_above_as_json(mode: str, endpoint: StartEndpoint):
    def play(request: Any) -> AnswerLike:
        messages = request.body["messages"]
        if messages[0]["content"].startswith("You know"):
            tries = sum(message["role"] == "assistant" for message in messages)
            value = {"result": [RIGHT]} if tries else {"result": [WRONG]}
            return said(mode, value, f"f{tries}")
        return "done" if messages[-1]["role"] == "tool" else answers.call("delegate_to_atlas", {"query": "?"}, id="c1")

    for way in WAYS:
        one = endpoint(play)
        boss = BaseAgent("Boss", "You ask.").register_delegate(atlas(output_type=list[City], output_mode=mode))
        result = await start(way, boss)
        assert result.content == "done"
        assert result.tool_results[0].content == [ROME]
        assert one.requests[-1].body["messages"][-1]["content"] == '[{"name":"Rome","people":3}]'
        assert len(one.requests) == 4


async def test_a_delegate_that_finds_no_valid_answer_is_an_error_of_its_call(endpoint: StartEndpoint):
    def play(request: Any) -> AnswerLike:
        messages = request.body["messages"]
        if messages[0]["content"].startswith("You know"):
            return json.dumps(WRONG)
        return "so be it" if messages[-1]["role"] == "tool" else answers.call("delegate_to_atlas", {"query": "?"})

    one = endpoint(play)
    result = await BaseAgent("Boss", "You ask.").register_delegate(atlas()).run("?")
    assert (result.content, outcomes(result)) == ("so be it", ["error"])
    told = one.requests[-1].body["messages"][-1]["content"]
    assert "'Atlas' gave no answer (invalid_output)" in told
    assert "'people' is missing" in told


async def test_an_agent_with_a_type_of_its_own_may_delegate(endpoint: StartEndpoint):
    def play(request: Any) -> AnswerLike:
        messages = request.body["messages"]
        if messages[0]["content"] == "You measure.":
            return '{"result": 3}'
        asked = answers.call("delegate_to_meter", {"query": "?"}, id="c1")
        return json.dumps(RIGHT) if messages[-1]["role"] == "tool" else asked

    one = endpoint(play)
    meter = BaseAgent("Meter", "You measure.", output_type=int)
    result = await atlas().register_delegate(meter).run("?")
    assert (result.content, result.tool_results[0].content) == (ROME, 3)
    names = [body["response_format"]["json_schema"]["name"] for body in bodies(one)]
    assert names == ["City", "int", "City"]


# ---- while it grows


async def values_of(way: str, agent: BaseAgent, **options: Any) -> tuple[list[Any], AgentResult]:
    """All that a stream shows of the answer, and the result."""
    if way == "stream":
        async with agent.stream("?", **options) as stream:
            return [value async for value in stream.partial()], await stream.result()

    def read() -> tuple[list[Any], AgentResult]:
        with sync.stream(agent, "?", **options) as stream:
            return list(stream.partial()), stream.result()

    return await in_thread(read)


STREAMS = ("stream", "sync.stream")
LONG = {"name": "Rome on the Tiber", "people": 3}
LONG_ROME = City(**LONG)


@pytest.mark.parametrize("way", STREAMS)
@pytest.mark.parametrize("mode", MODES)
async def test_values_grow(mode: str, way: str, endpoint: StartEndpoint):
    endpoint([said(mode, LONG)])
    values, result = await values_of(way, atlas(output_mode=mode))
    assert result.content == LONG_ROME
    names = [value.name for value in values]
    assert len(names) > 1, "there was something to see before the end"
    for earlier, later in itertools.pairwise(names):
        assert later.startswith(earlier or "")
    assert all(value.people in (None, 3) for value in values)
    assert values[-1] == LONG_ROME


@pytest.mark.parametrize("way", STREAMS)
@pytest.mark.parametrize("mode", MODES)
async def test_values_begin_anew_when_the_model_has_to_answer_again(mode: str, way: str, endpoint: StartEndpoint):
    script = [
        answers.calls(answers.call("look", {"name": "nowhere"}, id="c1"), text="Let me look."),
        said(mode, {"name": "Paris on the Seine"}, "f1"),
        "Well, I do not know." if mode == "tool" else said(mode, {"people": 7}),
        said(mode, LONG, "f2"),
    ]
    one = endpoint(script)
    agent = atlas(output_mode=mode).add_tool(lambda name: "seen", name="look")
    values, result = await values_of(way, agent)
    assert (result.content, one.answers_left) == (LONG_ROME, 0)
    assert all(isinstance(value, City) for value in values)
    assert "nowhere" not in {value.name for value in values}
    last_of_paris = max(n for n, value in enumerate(values) if value.name and value.name.startswith("Par"))
    later = values[last_of_paris + 1 :]
    assert any(value.name and value.name != LONG_ROME.name for value in later), "it grows from the beginning again"
    assert all(LONG_ROME.name.startswith(value.name or "") for value in later)
    assert later[-1] == LONG_ROME


@pytest.mark.parametrize("way", STREAMS)
@pytest.mark.parametrize("mode", MODES)
async def test_the_last_value_is_the_one_that_validators_have_made(mode: str, way: str, endpoint: StartEndpoint):
    endpoint([said(mode, LONG)])
    agent = atlas(output_mode=mode)
    agent.output_validator(lambda city: city.model_copy(update={"people": 99}))
    values, result = await values_of(way, agent)
    assert values[-1] is result.content or values[-1] == result.content
    assert (values[-1].people, values[-2]) == (99, LONG_ROME)


@pytest.mark.parametrize("way", STREAMS)
@pytest.mark.parametrize("mode", MODES)
async def test_a_run_without_an_answer_shows_none_at_the_end(mode: str, way: str, endpoint: StartEndpoint):
    endpoint(lambda _: said(mode, {"name": "Rome", "people": "many"}))
    values, result = await values_of(way, atlas(output_mode=mode), max_retries=0)
    assert result.stop_reason == "invalid_output"
    assert all(isinstance(value, City) and value.people is None for value in values)


@pytest.mark.parametrize("way", STREAMS)
async def test_a_way_that_is_refused_shows_nothing(way: str, endpoint: StartEndpoint):
    endpoint([refusing(400), refusing(400), json.dumps(LONG)])
    values, _ = await values_of(way, atlas())
    assert (len(values) > 1, values[-1]) == (True, LONG_ROME)


@pytest.mark.parametrize("way", STREAMS)
async def test_an_endpoint_that_cannot_stream_shows_the_answer_alone(way: str, endpoint: StartEndpoint):
    whole = json.dumps(answers.text(json.dumps(LONG)).completion("m"))
    endpoint([answers.raw(whole, content_type="application/json")])
    values, _ = await values_of(way, atlas())
    assert values == [LONG_ROME]


@pytest.mark.parametrize("way", STREAMS)
async def test_what_delegates_answer_is_not_among_the_values(way: str, endpoint: StartEndpoint):
    def play(request: Any) -> AnswerLike:
        messages = request.body["messages"]
        if messages[0]["content"] == "child":
            return '{"name": "Oslo", "people": 1}'
        if messages[-1]["role"] == "tool":
            return json.dumps(LONG)
        return answers.call("delegate_to_child", {"query": "?"})

    endpoint(play)
    agent = atlas().register_delegate(BaseAgent("child", "child", output_type=City))
    values, result = await values_of(way, agent)
    assert result.tool_results[0].content == OSLO
    assert not any("Oslo".startswith(value.name or "-") for value in values)
    assert values[-1] == LONG_ROME


async def test_who_has_seen_enough_of_an_answer_may_leave(endpoint: StartEndpoint):
    one = endpoint([answers.text(json.dumps({"name": "word " * 200, "people": 3}), chunk_delay=0.05)])
    with anyio.fail_after(5):
        async with atlas().stream("?") as stream:
            async for city in stream.partial():
                assert city.people is None
                break
    result = await stream.result()
    assert (result.stop_reason, result.success) == ("cancelled", False)
    assert_continuable(result)
    await in_thread(one.wait_for_disconnects, 1)


@pytest.mark.parametrize("options", [{}, {"output_type": str}])
async def test_text_has_no_growing_values(options: dict[str, Any], endpoint: StartEndpoint):
    endpoint("hello")
    agent = atlas() if options else BaseAgent("A", "a")
    async with agent.stream("?", **options) as stream:
        with pytest.raises(InvalidArguments, match="output_type"):
            stream.partial()
        assert (await stream.result()).content == "hello"


async def test_a_stream_shows_the_type_of_its_own_run(endpoint: StartEndpoint):
    endpoint(['{"result": [1, 22, 333]}'])
    async with BaseAgent("A", "a").stream("?", output_type=list[int]) as stream:
        values = [value async for value in stream.partial()]
    assert values[-1] == [1, 22, 333]
    assert all(value == [1, 22, 333][: len(value)] for value in values)


async def test_events_of_a_run_with_an_answer_tool_are_well_formed(endpoint: StartEndpoint):
    endpoint([said("tool", WRONG), said("tool", RIGHT, "f2")])
    watch = Watch()
    result = await atlas(output_mode="tool", observers=[watch]).run("?")
    assert_well_formed(watch)
    assert watch.kinds == [
        "run_started",
        *["model_requested", "model_responded", "tool_started", "tool_finished"] * 2,
        "run_finished",
    ]
    assert isinstance(watch[-1], RunFinished)
    assert watch[-1].result is result
    assert [event.arguments for event in watch if isinstance(event, ToolStarted)] == [WRONG, RIGHT]
    assert [call.metadata["arguments"] for call in result.tool_results] == [WRONG, RIGHT]
