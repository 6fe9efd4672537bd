"""The arguments of tool calls: what can be read in them, and the form in which they go back."""

from __future__ import annotations

import json
import time
import tracemalloc
from typing import Any

import pytest
from hypothesis import given, strategies as st
from pydantic import BaseModel

from fractal import Tool, tool
from fractal._functions.arguments import object_text, with_object_arguments
from fractal._functions.schema import ArgumentsFault


@pytest.mark.parametrize(
    ("written", "read"),
    [
        ("", "{}"),
        ("  \n", "{}"),
        ("null", "{}"),
        ("{}", "{}"),
        (' {"a": 1}\n', '{"a": 1}'),
        ('{"a":1}{"a": 1}', '{"a": 1}'),
        ('{"a":1}\n{"a":1}\n{"a":1}', '{"a":1}'),
        ('{}{"a":1}', '{"a":1}'),
        ('{"a":1}{}', '{"a":1}'),
        ("{}{}", "{}"),
        ('{"a":1}\n ' * 500, '{"a":1}'),
        ('"{\\"a\\": 1}"', '{"a": 1}'),
        ('{"a":1}<|im_end|>', '{"a":1}'),
        ('{"a":1} <|tool_call_end|><|im_end|>\n', '{"a":1}'),
        ('{"a":"<|im_end|>"}', '{"a":"<|im_end|>"}'),
        ('{"a":"\\ud83d"}', '{"a":"\\ud83d"}'),
    ],
)
def test_an_object_is_found_where_it_can_be_read_in_one_way_only(written: str, read: str):
    assert object_text(written) == read


@pytest.mark.parametrize(
    "written",
    [
        '{"a": 1}{"a": 2}',
        '{"a": 1} or so',
        '{"a": ',
        "{'a': 1}",
        "[1]",
        "[]",
        "5",
        "true",
        '"text"',
        '"null"',
        '"[1]"',
        '{"a":1}[1]',
        '{"a":1}null',
        "<|im_end|>",
        "{}" * 5000,
        '{"a":' * 50_000,
    ],
    ids=lambda written: written[:20],
)
def test_what_can_be_read_in_no_way_or_in_two_is_no_object(written: str):
    assert object_text(written) is None


def message(arguments: Any) -> dict[str, Any]:
    call = {"id": "c", "type": "function", "function": {"name": "f", "arguments": arguments}, "extra_content": {"s": 1}}
    return {"role": "assistant", "content": None, "tool_calls": [call]}


@given(st.text() | st.sampled_from(["", "null", "[1]", '{"a":', "{'a': 1}", '{"a": 1}{"a": 2}', "\ud83d"]))
def test_whatever_a_model_writes_goes_back_as_the_text_of_an_object(written: str):
    [call] = with_object_arguments(message(written))["tool_calls"]
    assert isinstance(json.loads(call["function"]["arguments"]), dict)
    assert call["extra_content"] == {"s": 1}
    call["function"]["arguments"].encode()


def test_arguments_that_are_no_object_are_kept_in_one():
    [call] = with_object_arguments(message("{'a': 1}"))["tool_calls"]
    assert json.loads(call["function"]["arguments"]) == {"invalid_arguments": "{'a': 1}"}


def test_arguments_that_are_the_object_itself_become_its_text():
    [call] = with_object_arguments(message({"a": 1}))["tool_calls"]
    assert call["function"]["arguments"] == '{"a":1}'


def test_a_message_that_needs_no_change_stays_the_same_object():
    for kept in (message('{"a": 1}'), {"role": "user", "content": "x"}, {"tool_calls": None}, {"tool_calls": [5, {}]}):
        assert with_object_arguments(kept) is kept


@pytest.mark.parametrize("part", ["{}", '{"a":1}', "<|a|>", '"', "[", " ", "\\"])
def test_reading_takes_time_in_proportion(part: str):
    def seconds(size: int) -> float:
        text = part * (size // len(part))
        started = time.perf_counter()
        with_object_arguments(message(text))
        return time.perf_counter() - started

    seconds(1000)
    assert seconds(2_000_000) < 2


class Node(BaseModel):
    name: str
    child: Node | None = None
    text: str = ""


@tool
def walk(node: Node, places: list[int] | None = None) -> None:
    pass


def nodes(depth: int, text: str) -> str:
    node: dict[str, Any] = {"text": text}
    for _ in range(depth):
        node = {"child": node}
    return json.dumps({"node": node})


BAD = {
    "deep, without names, around a long text": nodes(150, "x" * 1_000_000),
    "wrong items": json.dumps({"places": ["x"] * 50_000}),
    "nulls": json.dumps({"places": [None] * 50_000}),
}


@pytest.mark.parametrize("name", BAD)
def test_what_is_told_of_bad_arguments_takes_no_more_room_than_pydantic_needs(name: str):
    parameters = Tool.from_function(walk).parameters
    tracemalloc.start()
    try:
        with pytest.raises(ArgumentsFault) as caught:
            parameters.check(BAD[name])
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert len(str(caught.value)) < 2000
    assert peak < 220_000_000  # each fault has its input, here 150 times the text
