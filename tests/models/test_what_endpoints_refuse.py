"""What an endpoint refuses of what others take is left out once, and remembered; what is the user's never is."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import anyio
import openai
import pytest

from fractal import BaseAgent, BudgetExceeded, Limits, OpenAIModel, StatusError
from fractal.models import _dialect
from fractal.testing import Endpoint
from fractal.testing.endpoint import RecordedRequest
from tests.wires import HTTP, Refusal, as_answer, ask, call, refusal
from tests.without_uvloop import anyio_backend  # noqa: F401

WORDS = "I do not take that"
LOOK = call("look", '{"city":"Rome"}')
THINKING = {"reasoning": "hm", "tool_calls": [{**LOOK, "x_signature": "S"}]}


def look(city: str) -> str:
    return "sunny"


FORMS: dict[str, Refusal] = {
    "400": refusal(WORDS),
    "404": refusal(WORDS, 404),
    "405": refusal(WORDS, 405),
    "415": refusal(WORDS, 415),
    "422 of FastAPI": Refusal(422, {"detail": [{"msg": WORDS}]}),
    "422 of Mistral": Refusal(422, {"object": "error", "message": {"detail": [{"msg": WORDS}]}, "param": None}),
    "500": refusal(WORDS, 500),
    "501": refusal(WORDS, 501),
    "Gemini's list": Refusal(400, [{"error": {"code": 400, "message": WORDS, "status": "INVALID_ARGUMENT"}}]),
    "param as the text None": refusal(WORDS, param="None", code="400"),
    "an error in a 200": Refusal(200, {"error": {"message": WORDS, "code": 400}}),
    "a text": Refusal(400, {"error": WORDS}),
}


@dataclass(frozen=True)
class Feature:
    """Something that a request may have.

    Attributes:
        is_in: Whether the body of a request has it.
        param: What a refusal calls it that names it.
        first: What the first request is answered.
        agent: Options of the agent.
        streams: Whether only streamed requests have it.
    """

    is_in: Callable[[dict[str, Any]], bool]
    param: str
    first: dict[str, Any] | None = None
    agent: dict[str, Any] | None = None
    streams: bool = False


def any_message(is_one: Callable[[dict[str, Any]], bool]) -> Callable[[dict[str, Any]], bool]:
    return lambda body: any(map(is_one, body["messages"]))


FEATURES = {
    "usage": Feature(lambda body: "stream_options" in body, "stream_options", streams=True),
    "null content": Feature(
        any_message(lambda m: "tool_calls" in m and m["content"] is None), "messages[2].content", {"tool_calls": [LOOK]}
    ),
    "blank content": Feature(
        any_message(lambda m: "tool_calls" in m and m["content"] == ""),
        "messages.2.content",
        {"content": "", "tool_calls": [LOOK]},
    ),
    "fields of its own": Feature(
        any_message(lambda m: "reasoning" in m or any("x_signature" in c for c in m.get("tool_calls", ()))),
        "messages[2].reasoning",
        THINKING,
    ),
    "max_tokens": Feature(lambda body: "max_tokens" in body, "max_tokens", agent={"max_tokens": 99}),
}
CASES = [
    pytest.param(feature, way, id=f"{name}-{way}")
    for name, feature in FEATURES.items()
    for way in ("run", "stream")
    if way == "stream" or not feature.streams
]


def script(feature: Feature, form: Refusal) -> Callable[[dict[str, Any], int], Any]:
    def play(body: dict[str, Any], number: int) -> Any:
        if feature.is_in(body):
            return form
        is_first = feature.first is not None and body["messages"][-1]["role"] == "user"
        return feature.first if is_first else {"content": "Done."}

    return play


EVERY_FORM = [pytest.param("own HTTP", form, id=form) for form in FORMS]
EVERY_CLIENT = [pytest.param(wire, "400", id=wire) for wire in HTTP if wire != "own HTTP"]


@pytest.mark.parametrize(("feature", "way"), CASES)
@pytest.mark.parametrize(("wire", "form"), [*EVERY_FORM, *EVERY_CLIENT])
async def test_it_is_left_out_however_the_refusal_is_worded(wire: str, form: str, feature: Feature, way: str):
    asked = await ask(wire, way, script(feature, FORMS[form]), tools=[look], **(feature.agent or {}))
    assert asked.result.content == "Done."
    refused = sum(map(feature.is_in, asked.bodies))
    assert refused >= 1
    # One more request for each thing that may be meant.
    assert len(asked.bodies) <= (2 if feature.first else 1) + refused + 2
    assert asked.result.usage.requests == len(asked.bodies)


@pytest.mark.parametrize(("feature", "way"), CASES)
async def test_a_refusal_that_names_it_costs_one_more_request(feature: Feature, way: str):
    form = refusal(WORDS, param=feature.param)
    asked = await ask("own HTTP", way, script(feature, form), tools=[look], **(feature.agent or {}))
    assert asked.result.content == "Done."
    assert len(asked.bodies) == (2 if feature.first else 1) + sum(map(feature.is_in, asked.bodies))


@pytest.mark.parametrize(("feature", "way"), CASES)
@pytest.mark.parametrize("form", ["400", "500"])
async def test_what_is_refused_is_remembered(form: str, feature: Feature, way: str):
    def play(request: RecordedRequest) -> Any:
        said = script(feature, FORMS[form])(request.body, 0)
        return as_answer(said, streams=bool(request.body.get("stream")))

    with Endpoint(play) as endpoint:
        model = OpenAIModel(base_url=endpoint.url, api_key="any")
        agent = BaseAgent("A", "a", client=model, **(feature.agent or {})).add_tool(look)
        counts: list[int] = []
        for _ in range(3):
            before = len(endpoint.requests)
            if way == "run":
                assert (await agent.run("go", max_retries=0)).content == "Done."
            else:
                async with agent.stream("go", max_retries=0) as stream:
                    assert (await stream.result()).content == "Done."
            counts.append(sum(feature.is_in(request.body) for request in endpoint.requests[before:]))
    assert counts[0] > 0
    assert counts[1:] == [0, 0]


@pytest.mark.parametrize("wire", HTTP)
@pytest.mark.parametrize(("feature", "way"), CASES)
async def test_a_refusal_of_something_else_is_told_as_it_came(feature: Feature, way: str, wire: str):
    def play(body: dict[str, Any], number: int) -> Any:
        done = feature.first is None or body["messages"][-1]["role"] == "tool"
        return refusal("no such seed", param="seed") if done else feature.first

    asked = await ask(wire, way, play, tools=[look], **(feature.agent or {}))
    assert str(asked.result.error) == "HTTP 400: no such seed"
    assert len(asked.bodies) == (2 if feature.first else 1)


@pytest.mark.parametrize("way", ["run", "stream"])
@pytest.mark.parametrize(
    "form",
    [
        refusal("who are you?", 401),
        refusal("pay", 402),
        refusal("no", 403),
        refusal("slow down", 429, code="insufficient_quota"),
        refusal("too long", code="context_length_exceeded"),
        refusal("no such model", 404, code="model_not_found"),
        refusal("filtered", code="content_filter"),
        refusal("too large", 413),
    ],
    ids=lambda form: f"{form.status} {form.body['error']['code']}",
)
async def test_what_cannot_be_meant_is_asked_once(form: Refusal, way: str):
    asked = await ask("own HTTP", way, lambda body, number: form, max_tokens=5)
    assert (len(asked.bodies), asked.result.success) == (1, False)


@pytest.mark.parametrize("way", ["run", "stream"])
async def test_an_endpoint_that_refuses_everything_is_told_of_by_its_first_word(way: str):
    asked = await ask("own HTTP", way, lambda body, number: refusal(f"no {number}"), max_tokens=5)
    assert str(asked.result.error) == "HTTP 400: no 1"
    assert len(asked.bodies) <= 3


@pytest.mark.parametrize("way", ["run", "stream"])
async def test_two_refusals_at_once_are_found_one_after_the_other(way: str):
    def play(body: dict[str, Any], number: int) -> Any:
        if "max_tokens" in body:
            return refusal("use the other one")
        if any(message.get("content", "") is None for message in body["messages"]):
            return refusal("content is no text")
        return {"content": "Done."} if body["messages"][-1]["role"] == "tool" else {"tool_calls": [LOOK]}

    asked = await ask("own HTTP", way, play, tools=[look], max_tokens=7)
    assert asked.result.content == "Done."
    assert asked.bodies[-1]["max_completion_tokens"] == 7


async def test_what_was_taken_before_is_not_blamed():
    def play(request: RecordedRequest) -> Any:
        said = refusal("not today") if len(endpoint.requests) == 2 else {"content": "Done."}
        return as_answer(said, streams=True)

    with Endpoint(play) as endpoint:
        agent = BaseAgent("A", "a", client=OpenAIModel(base_url=endpoint.url, api_key="any"))
        for success in (True, False, True):
            async with agent.stream("go") as stream:
                assert (await stream.result()).success is success
        assert ["stream_options" in request.body for request in endpoint.requests] == [True] * 3


async def test_what_did_not_help_is_not_tried_again_until_there_is_an_answer():
    with Endpoint(lambda request: as_answer(refusal("oops", 500), streams=True)) as endpoint:
        agent = BaseAgent("A", "a", client=OpenAIModel(base_url=endpoint.url, api_key="any"))
        with anyio.fail_after(20):
            async with agent.stream("go", max_retries=1) as stream:
                await stream.result()
        assert len(endpoint.requests) == 3


async def test_a_failing_server_is_believed_for_some_minutes(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(_dialect, "_BELIEVED", 0.0)

    def play(request: RecordedRequest) -> Any:
        said = refusal("oops", 500) if len(endpoint.requests) == 1 else {"content": "Done."}
        return as_answer(said, streams=True)

    with Endpoint(play) as endpoint:
        agent = BaseAgent("A", "a", client=OpenAIModel(base_url=endpoint.url, api_key="any"))
        for _ in range(2):
            async with agent.stream("go") as stream:
                result = await stream.result()
        assert ["stream_options" in request.body for request in endpoint.requests] == [True, False, True]
        assert result.usage.output_tokens == 2


async def test_asking_in_another_form_keeps_to_the_budget():
    script = FEATURES["usage"]
    asked = await ask(
        "own HTTP",
        "stream",
        lambda body, number: refusal("no") if script.is_in(body) else {"content": "Done."},
        limits=Limits(max_requests=1),
    )
    assert len(asked.bodies) == 1
    assert isinstance(asked.result.exception, StatusError)
    assert not isinstance(asked.result.exception, BudgetExceeded)


async def test_each_model_of_an_endpoint_has_a_dialect_of_its_own():
    def play(request: RecordedRequest) -> Any:
        refuses = request.body["model"] == "old" and "stream_options" in request.body
        return as_answer(refusal("no") if refuses else {"content": "Done."}, streams=True)

    with Endpoint(play) as endpoint:
        model = OpenAIModel(base_url=endpoint.url, api_key="any")
        for name in ("old", "new", "old"):
            async with BaseAgent("A", "a", name, model).stream("go") as stream:
                assert (await stream.result()).success
        asked = [(request.body["model"], "stream_options" in request.body) for request in endpoint.requests]
    assert asked == [("old", True), ("old", False), ("new", True), ("old", False)]


async def test_what_the_user_asks_for_is_never_left_out():
    asked = await ask("own HTTP", "stream", lambda body, number: refusal("no"), extra_body={"seed": 5}, temperature=0.5)
    assert all((body["seed"], body["temperature"]) == (5, 0.5) for body in asked.bodies)


@pytest.mark.parametrize("way", ["run", "stream"])
async def test_fields_of_tools_are_sent_with_tools_only(way: str):
    extra = {"parallel_tool_calls": False, "tool_choice": "auto", "seed": 1}
    alone = await ask("own HTTP", way, lambda body, number: {"content": "Done."}, extra_body=extra)
    assert alone.bodies[0].keys() & extra.keys() == {"seed"}
    with_tools = await ask("own HTTP", way, lambda body, number: {"content": "Done."}, extra_body=extra, tools=[look])
    assert with_tools.bodies[0].keys() >= extra.keys()


@pytest.mark.parametrize("way", ["run", "stream"])
async def test_a_cut_run_goes_on_where_no_user_may_follow_a_tool(way: str):
    history = [
        {"role": "user", "content": "Look."},
        {"role": "assistant", "content": "", "tool_calls": [LOOK]},
        {"role": "tool", "tool_call_id": "call_1", "content": "sunny"},
    ]

    def play(body: dict[str, Any], number: int) -> Any:
        roles = [message["role"] for message in body["messages"]]
        follows = any(pair == ("tool", "user") for pair in itertools.pairwise(roles))
        return refusal("Unexpected role 'user' after role 'tool'") if follows else {"content": "Done."}

    asked = await ask("own HTTP", way, play, run={"messages": history})
    assert asked.result.content == "Done."
    assert [message["role"] for message in asked.bodies[-1]["messages"]][-3:] == ["tool", "assistant", "user"]
    assert [message["role"] for message in asked.result.messages] == ["user", "assistant", "tool", "user", "assistant"]


# ---- short of time


@pytest.mark.parametrize("way", ["run", "stream"])
@pytest.mark.parametrize("history", ["with calls", "without"])
async def test_the_closing_request_has_one_system_message_and_tools_that_may_not_be_called(history: str, way: str):
    def play(body: dict[str, Any], number: int) -> Any:
        if number == 1 and history == "with calls":
            return {"tool_calls": [call("slow")]}
        return {"content": "As far as I know, sunny."}

    async def slow() -> None:
        await anyio.sleep_forever()

    reserve = 2.7 if history == "with calls" else 3
    run = {"timeout": 3, "limits": Limits(reserve=reserve)}
    asked = await ask("own HTTP", way, play, tools=[slow], run=run)
    assert asked.result.stop_reason == "soft_deadline"
    last = asked.bodies[-1]
    assert [message["role"] for message in last["messages"]].count("system") == 1
    assert last["messages"][0]["content"].startswith("You help.\n\nTime is nearly up.")
    assert (last.get("tool_choice"), "tools" in last) == (("none", True) if history == "with calls" else (None, False))
    assert "Time is nearly up" not in str(asked.result.messages)


async def test_the_words_of_the_last_request_are_a_system_message_where_there_is_no_prompt():
    def play(request: RecordedRequest) -> Any:
        return as_answer({"content": "Done."}, streams=False)

    with Endpoint(play) as endpoint:
        agent = BaseAgent("A", "", client=openai.AsyncOpenAI(base_url=endpoint.url, api_key="any"))
        result = await agent.run("go", timeout=5, limits=Limits(reserve=5))
        assert result.stop_reason == "soft_deadline"
        [request] = endpoint.requests
    assert [message["role"] for message in request.body["messages"]] == ["system", "user"]


@pytest.mark.parametrize("way", ["run", "stream"])
@pytest.mark.parametrize("kind", [openai.AsyncOpenAI, openai.OpenAI])
async def test_what_one_endpoint_refuses_is_not_kept_from_the_next_one_of_a_client(kind: Any, way: str):
    def has_thoughts(request: RecordedRequest) -> bool:
        return "reasoning_content" in request.body["messages"][2]

    def refuses(request: RecordedRequest) -> Any:
        return as_answer(refusal(WORDS) if has_thoughts(request) else {"content": "a"}, streams=way == "stream")

    def wants(request: RecordedRequest) -> Any:
        return as_answer({"content": "b"} if has_thoughts(request) else refusal(WORDS), streams=way == "stream")

    said = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a", "reasoning_content": "hm"}]
    with Endpoint(refuses) as first, Endpoint(wants) as second:
        client = kind(base_url=first.url, api_key="k")
        agent = BaseAgent("A", "a", "m", client)
        for url, content in ((first.url, "a"), (second.url, "b"), (first.url, "a")):
            client.base_url = url
            if way == "run":
                result = await agent.run("go", messages=said, max_retries=0)
            else:
                async with agent.stream("go", messages=said, max_retries=0) as stream:
                    async for _ in stream:
                        pass
                result = await stream.result()
            assert result.content == content, result.error
