"""What an endpoint said comes back to it whole, from every client, streamed or not."""

from __future__ import annotations

import json
from typing import Any

import pytest

from fractal import BaseAgent, OpenAIModel, ReasoningDelta
from fractal.testing import Endpoint, answers
from tests.wires import DOUBLES, HTTP, Asked, ask, call, chunk, events
from tests.without_uvloop import anyio_backend  # noqa: F401

WIRES = [*HTTP, *DOUBLES]


def look(city: str) -> str:
    return "sunny"


LOOK = call("look", '{"city":"Rome"}')
DETAILS = [{"type": "reasoning.text", "text": "hm", "signature": "S", "format": "f", "index": 0}]
BLOCKS = [{"type": "thinking", "thinking": "hm", "signature": "S"}, {"type": "redacted_thinking", "data": "D"}]
SIGNED_INSIDE = {**LOOK, "function": {**LOOK["function"], "thought_signature": "S", "x": {"a": ["b"]}}}
SIGNED = {**LOOK, "extra_content": {"google": {"thought_signature": "S"}}}
PARTS = [
    {"type": "thinking", "thinking": [{"type": "text", "text": "I must look."}]},
    {"type": "text", "text": "Let me look."},
]

KEPT: dict[str, dict[str, Any]] = {
    "DeepSeek, Kimi": {"content": "", "reasoning_content": "I must look.", "tool_calls": [LOOK]},
    "vLLM": {"reasoning": "I must look.", "tool_calls": [LOOK]},
    "OpenRouter": {"reasoning": "hm", "reasoning_details": DETAILS, "tool_calls": [LOOK]},
    "LiteLLM": {"content": "Let me look.", "thinking_blocks": BLOCKS, "tool_calls": [LOOK]},
    "Gemini": {"tool_calls": [SIGNED, {**call("look", '{"city":"Oslo"}', "call_2"), "extra_content": {"google": {}}}]},
    "Gemini, inside the function": {"tool_calls": [SIGNED_INSIDE]},
    "Gemini, on the message": {"extra_content": {"google": {"thought_signature": "S"}}, "tool_calls": [LOOK]},
    "Mistral": {"content": PARTS, "tool_calls": [LOOK]},
    "somebody new": {
        "x_state": {"a": ["b", {"c": None, "d": 1.5}]},
        "x_token": "T",
        "tool_calls": [{**LOOK, "x": "y"}],
    },
}


def without_empty(value: Any) -> Any:
    """A value without the members that say nothing, which may be left out."""
    if isinstance(value, dict):
        return {name: without_empty(each) for name, each in value.items() if each is not None}
    return [without_empty(each) for each in value] if isinstance(value, list) else value


async def told_and_asked_again(said: dict[str, Any], wire: str, way: str) -> Asked:
    def script(body: dict[str, Any], number: int) -> Any:
        return {"content": "It is sunny."} if body["messages"][-1]["role"] == "tool" else said

    return await ask(wire, way, script, tools=[look])


@pytest.mark.parametrize("way", ["run", "stream"])
@pytest.mark.parametrize("wire", WIRES)
@pytest.mark.parametrize("name", KEPT)
async def test_what_came_with_a_call_goes_back_with_it(name: str, wire: str, way: str):
    asked = await told_and_asked_again(KEPT[name], wire, way)
    assert asked.result.content == "It is sunny."
    sent = asked.bodies[1]["messages"][2]
    assert without_empty(sent) == without_empty({"role": "assistant", **KEPT[name]})
    assert without_empty(asked.result.messages[1]) == without_empty({"role": "assistant", **KEPT[name]})


@pytest.mark.parametrize("way", ["run", "stream"])
async def test_it_goes_back_in_later_runs_too_however_they_are_stored(way: str):
    said = {"content": "Sunny.", "reasoning_content": "hm", "extra_content": {"google": {"thought_signature": "S"}}}
    first = await ask("own HTTP", way, lambda body, number: said)
    stored = json.loads(first.result.model_dump_json())["messages"]
    second = await ask("own HTTP", way, lambda body, number: said, run={"messages": stored})
    assert second.bodies[0]["messages"][2] == {"role": "assistant", **said}


@pytest.mark.parametrize("way", ["run", "stream"])
@pytest.mark.parametrize("content", ["", None])
async def test_no_content_goes_back_as_it_was_written(content: str | None, way: str):
    asked = await told_and_asked_again({"content": content, "tool_calls": [LOOK]}, "own HTTP", way)
    assert asked.bodies[1]["messages"][2]["content"] == content


async def test_what_says_nothing_is_left_out():
    said = {"annotations": [], "function_call": None, "audio": None, "refusal": None, "tool_calls": [LOOK]}
    asked = await told_and_asked_again(said, "own HTTP", "run")
    assert asked.bodies[1]["messages"][2].keys() == {"role", "content", "tool_calls"}


async def test_the_sound_of_an_answer_stays_here_and_its_id_goes_back():
    audio = {"id": "a1", "data": "UklGRg==", "expires_at": 5, "transcript": "Hello"}
    first = await ask("own HTTP", "run", lambda body, number: {"content": "Hello", "audio": audio})
    assert first.result.messages[1]["audio"] == audio
    run = {"messages": first.result.messages}
    for wire in WIRES:
        second = await ask(wire, "run", lambda body, number: {"content": "Hello"}, run=run)
        assert second.bodies[0]["messages"][2]["audio"] == {"id": "a1"}


@pytest.mark.parametrize("way", ["run", "stream"])
async def test_halves_of_characters_in_what_is_kept_are_replaced(way: str):
    said = {"x_\ud83d": {"\ude00": "\ud83d"}, "tool_calls": [{**LOOK, "x": "\ud83d"}]}
    asked = await told_and_asked_again(said, "own HTTP", way)
    assert asked.result.content == "It is sunny."
    asked.result.model_dump_json()


async def test_two_halves_that_come_in_two_pieces_are_one_character_again():
    pieces = [chunk({"reasoning_content": "\ud83d"}), chunk({"reasoning_content": "\ude00", "content": "Hi"})]
    with Endpoint(answers.raw(events(*pieces, chunk({}, "stop")), content_type="text/event-stream")) as endpoint:
        agent = BaseAgent("A", "a", client=OpenAIModel(base_url=endpoint.url, api_key="any"))
        async with agent.stream("go") as stream:
            shown = "".join([event.text async for event in stream if isinstance(event, ReasoningDelta)])
        result = await stream.result()
    assert (shown, result.messages[1]["reasoning_content"]) == ("😀", "😀")


# ---- arguments


ARGUMENTS = ["", "null", '{"city": "Ro', "{'city': 'Rome'}", "[1]", '"Rome"', '{"city": "A"}{"city": "B"}', "\ud83d"]


@pytest.mark.parametrize("way", ["run", "stream"])
@pytest.mark.parametrize("wire", WIRES)
@pytest.mark.parametrize("arguments", ARGUMENTS)
async def test_arguments_that_are_no_object_go_back_as_one_and_the_model_is_told(arguments: str, wire: str, way: str):
    if wire in DOUBLES and arguments == "\ud83d":
        pytest.skip("the double itself writes JSON")
    asked = await told_and_asked_again({"tool_calls": [call("look", arguments)]}, wire, way)
    assert asked.result.content == "It is sunny."
    [sent] = asked.bodies[1]["messages"][2]["tool_calls"]
    assert isinstance(json.loads(sent["function"]["arguments"]), dict)
    [told] = asked.result.tool_results
    assert (told.outcome, "look" in str(told.error)) == ("error", True)


async def test_a_history_with_such_arguments_is_repaired_where_it_comes_in():
    history = [
        {"role": "user", "content": "Look."},
        {"role": "assistant", "content": None, "tool_calls": [call("look", "{'city'")]},
        {"role": "tool", "tool_call_id": "call_1", "content": "What?"},
    ]
    asked = await ask("own HTTP", "run", lambda body, number: {"content": "Hm."}, run={"messages": history})
    [sent] = asked.bodies[0]["messages"][2]["tool_calls"]
    assert isinstance(json.loads(sent["function"]["arguments"]), dict)
    assert history[1]["tool_calls"] == [call("look", "{'city'")]


CALLS = {
    "twice": [LOOK, LOOK],
    "spelled in another way": [LOOK, call("look", '{ "city" : "Rome" }')],
    "three times": [LOOK, LOOK, LOOK],
}


@pytest.mark.parametrize("way", ["run", "stream"])
@pytest.mark.parametrize("wire", WIRES)
@pytest.mark.parametrize("name", CALLS)
async def test_a_call_that_is_told_again_is_one_call(name: str, wire: str, way: str):
    asked = await told_and_asked_again({"tool_calls": CALLS[name]}, wire, way)
    assert [result.outcome for result in asked.result.tool_results] == ["ok"]
    assert len(asked.bodies[1]["messages"][2]["tool_calls"]) == 1


@pytest.mark.parametrize("way", ["run", "stream"])
@pytest.mark.parametrize(
    "calls",
    [
        [LOOK, call("look", '{"city":"Oslo"}')],
        [call("look", '{"city":"Rome"}', ""), call("look", '{"city":"Rome"}', "")],
        [LOOK, call("look", '{"city":"Rome"}', "call_2")],
    ],
    ids=["other arguments", "no ids", "other ids"],
)
async def test_calls_that_differ_in_what_they_say_are_all_made(calls: list[dict[str, Any]], way: str):
    asked = await told_and_asked_again({"tool_calls": calls}, "own HTTP", way)
    assert [result.outcome for result in asked.result.tool_results] == ["ok", "ok"]
    ids = [sent["id"] for sent in asked.bodies[1]["messages"][2]["tool_calls"]]
    assert len(set(ids)) == 2
