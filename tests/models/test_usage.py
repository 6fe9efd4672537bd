"""What answers tell of the tokens they took, of every kind, whole and streamed."""

from __future__ import annotations

import json
from types import SimpleNamespace
from typing import Any
from unittest.mock import Mock

import pytest

from fractal import Reply, Usage
from fractal.models._clients.object import plain
from fractal.models._replies.reading import reply_of
from fractal.models._replies.stream_reader import ReplyReader
from fractal.models.bounds import DEFAULT_BOUNDS
from tests.without_uvloop import anyio_backend  # noqa: F401

KINDS = ("input_tokens", "output_tokens", "cached_input_tokens", "cache_write_input_tokens", "reasoning_tokens")


def completion(usage: Any, **more: Any) -> dict[str, Any]:
    message = {"role": "assistant", "content": "hi"}
    return {"choices": [{"index": 0, "message": message, "finish_reason": "stop"}], "usage": usage, **more}


def told(reply: Reply) -> tuple[int, ...]:
    return tuple(getattr(reply, kind) for kind in KINDS)


async def streamed(*usages: Any) -> Reply:
    """A reply of which each chunk tells one of the usages."""
    reader = ReplyReader(None, DEFAULT_BOUNDS)
    for number, usage in enumerate(usages):
        reason = "stop" if number == len(usages) - 1 else None
        choice = {"index": 0, "delta": {"content": "a"}, "finish_reason": reason}
        await reader.add({"choices": [choice], "usage": usage, "model": "m-1", "id": f"id-{number}"})
    return await reader.end()


OPENAI = {
    "prompt_tokens": 100,
    "completion_tokens": 50,
    "total_tokens": 150,
    "prompt_tokens_details": {"cached_tokens": 60, "audio_tokens": 0},
    "completion_tokens_details": {"reasoning_tokens": 30, "accepted_prediction_tokens": 0},
}

WAYS: dict[str, tuple[dict[str, Any], tuple[int, ...]]] = {
    "OpenAI's": (OPENAI, (100, 50, 60, 0, 30)),
    "of the Responses API": (
        {
            "input_tokens": 100,
            "output_tokens": 50,
            "input_tokens_details": {"cached_tokens": 60},
            "output_tokens_details": {"reasoning_tokens": 30},
        },
        (100, 50, 60, 0, 30),
    ),
    "OpenRouter's": (
        {
            "prompt_tokens": 100,
            "completion_tokens": 5,
            "prompt_tokens_details": {"cached_tokens": 60, "cache_write_tokens": 30},
        },
        (100, 5, 60, 30, 0),
    ),
    "DeepSeek's": (
        {"prompt_tokens": 100, "completion_tokens": 5, "prompt_cache_hit_tokens": 64, "prompt_cache_miss_tokens": 36},
        (100, 5, 64, 0, 0),
    ),
    "Moonshot's": ({"prompt_tokens": 100, "completion_tokens": 5, "cached_tokens": 64}, (100, 5, 64, 0, 0)),
    "Anthropic's, which leaves the cache out": (
        {"input_tokens": 10, "output_tokens": 5, "cache_read_input_tokens": 70, "cache_creation_input_tokens": 20},
        (100, 5, 70, 20, 0),
    ),
    "LiteLLM's, which does not": (
        {
            "prompt_tokens": 100,
            "completion_tokens": 5,
            "cache_read_input_tokens": 70,
            "cache_creation_input_tokens": 20,
        },
        (100, 5, 70, 20, 0),
    ),
    "xAI's, which leaves the reasoning out": (
        {
            "prompt_tokens": 100,
            "completion_tokens": 5,
            "total_tokens": 135,
            "completion_tokens_details": {"reasoning_tokens": 30},
        },
        (100, 35, 0, 0, 30),
    ),
    "no details": ({"prompt_tokens": 100, "completion_tokens": 5, "total_tokens": 105}, (100, 5, 0, 0, 0)),
    "details of nothing": (
        {"prompt_tokens": 100, "completion_tokens": 5, "prompt_tokens_details": None, "completion_tokens_details": []},
        (100, 5, 0, 0, 0),
    ),
    "parts that are more than the whole": (
        {
            "prompt_tokens": 10,
            "completion_tokens": 5,
            "prompt_tokens_details": {"cached_tokens": 60, "cache_write_tokens": 60},
            "completion_tokens_details": {"reasoning_tokens": 2**70},
        },
        (10, 5, 10, 0, 0),
    ),
    "parts that are no numbers": (
        {
            "prompt_tokens": 10,
            "completion_tokens": 5,
            "prompt_tokens_details": {"cached_tokens": "6"},
            "cached_tokens": True,
        },
        (10, 5, 0, 0, 0),
    ),
    "nothing": ({}, (0, 0, 0, 0, 0)),
}


@pytest.mark.parametrize("way", WAYS)
def test_the_kinds_of_tokens_are_found_wherever_an_endpoint_tells_them(way: str) -> None:
    usage, expected = WAYS[way]
    assert told(reply_of(completion(usage))) == expected


@pytest.mark.parametrize("way", WAYS)
async def test_in_a_stream_they_are_the_same(way: str) -> None:
    usage, expected = WAYS[way]
    assert told(await streamed(None, {}, usage)) == expected


@pytest.mark.parametrize("way", ["OpenAI's", "OpenRouter's", "no details"])
def test_from_objects_of_a_double_they_are_the_same(way: str) -> None:
    usage, expected = WAYS[way]
    text = json.dumps(completion(usage, model="m-1", id="id-1"))
    answer = json.loads(text, object_hook=lambda named: SimpleNamespace(**named))
    reply = reply_of(plain(answer))
    assert (told(reply), reply.model, reply.id) == (expected, "m-1", "id-1")


def test_a_mock_tells_none_of_them() -> None:
    answer = Mock()
    answer.choices = [Mock(message=Mock(content="hi", tool_calls=None, refusal=None), finish_reason="stop")]
    reply = reply_of(plain(answer))
    assert (told(reply), reply.model, reply.id) == ((0,) * 5, None, None)


async def test_halves_that_come_in_several_chunks_are_put_together() -> None:
    first = {"input_tokens": 10, "cache_read_input_tokens": 70, "cache_creation_input_tokens": 20, "output_tokens": 1}
    assert told(await streamed(first, {"output_tokens": 3}, {"output_tokens": 5})) == (100, 5, 70, 20, 0)


async def test_of_what_is_told_again_the_last_counts_and_nothing_is_added_twice() -> None:
    growing = [{**OPENAI, "completion_tokens": 30 + n, "total_tokens": 130 + n} for n in (0, 10, 20)]
    assert told(await streamed(*growing)) == (100, 50, 60, 0, 30)


async def test_a_detail_that_only_the_first_chunk_tells_is_kept() -> None:
    assert told(await streamed(OPENAI, {"prompt_tokens": 100, "completion_tokens": 50})) == (100, 50, 60, 0, 30)


async def test_the_model_and_the_id_are_those_of_the_first_chunk() -> None:
    reply = await streamed(None, None)
    assert (reply.model, reply.id) == ("m-1", "id-0")


@pytest.mark.parametrize("wrong", [None, "", 5, ["m"], {"name": "m"}])
def test_a_model_that_is_no_name_is_none(wrong: object) -> None:
    reply = reply_of(completion({}, model=wrong, id=wrong))
    assert (reply.model, reply.id) == (None, None)


def test_names_that_an_endpoint_makes_up_are_bounded_and_can_be_written() -> None:
    reply = reply_of(completion({}, model="x" * 10_000, id="\ud800y"))
    assert reply.model == "x" * 200
    assert reply.id is not None
    reply.id.encode()


def test_usages_can_be_added() -> None:
    one = Usage(requests=1, tool_calls=2, input_tokens=3, output_tokens=4, cached_input_tokens=2, cost=0.25)
    both = one + Usage(requests=1, cache_write_input_tokens=5, reasoning_tokens=1, cost=0.5)
    assert both == Usage(
        requests=2,
        tool_calls=2,
        input_tokens=3,
        output_tokens=4,
        cached_input_tokens=2,
        cache_write_input_tokens=5,
        reasoning_tokens=1,
        cost=0.75,
    )


def test_a_sum_with_an_unknown_cost_has_an_unknown_cost() -> None:
    assert (Usage(cost=1.0) + Usage(cost=None)).cost is None
