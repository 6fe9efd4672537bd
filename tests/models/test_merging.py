"""Fields that nobody here knows, put together from the pieces of a stream."""

from __future__ import annotations

import time
from typing import Any

import pytest

from fractal.models._replies.merging import Merged


def merged(*pieces: dict[str, Any]) -> dict[str, Any]:
    whole = Merged()
    for piece in pieces:
        whole.add(piece)
    return whole.value()


def test_texts_grow_and_objects_are_filled():
    assert merged({"cot": "I ", "x": {"a": "b", "n": 1}}, {"cot": "must", "x": {"a": "c", "n": 2}}) == {
        "cot": "I must",
        "x": {"a": "bc", "n": 2},
    }


def test_the_parts_of_openrouter_are_told_apart_by_their_index_and_type():
    assert merged(
        {"reasoning_details": [{"type": "reasoning.text", "text": "I ", "format": "f", "index": 0}]},
        {"reasoning_details": [{"type": "reasoning.text", "text": "must", "format": "f", "index": 0}]},
        {"reasoning_details": [{"type": "reasoning.text", "signature": "S", "format": "f", "index": 0}]},
        {"reasoning_details": [{"type": "reasoning.encrypted", "data": "D", "format": "f", "index": 0}]},
        {"reasoning_details": [{"type": "reasoning.text", "text": "again", "format": "f", "index": 1}]},
    ) == {
        "reasoning_details": [
            {"type": "reasoning.text", "text": "I must", "format": "f", "index": 0, "signature": "S"},
            {"type": "reasoning.encrypted", "data": "D", "format": "f", "index": 0},
            {"type": "reasoning.text", "text": "again", "format": "f", "index": 1},
        ]
    }


def test_the_blocks_of_litellm_end_with_their_signature():
    def thinking(text: str, signature: str | None = None) -> dict[str, Any]:
        return {"thinking_blocks": [{"type": "thinking", "thinking": text, "signature": signature}]}

    assert merged(thinking("I "), thinking("must"), thinking("", "S1"), thinking("More"), thinking("", "S2")) == {
        "thinking_blocks": [
            {"type": "thinking", "thinking": "I must", "signature": "S1"},
            {"type": "thinking", "thinking": "More", "signature": "S2"},
        ]
    }
    assert merged(thinking("a", "S1"), {"thinking_blocks": [{"type": "redacted_thinking", "data": "D"}]}) == {
        "thinking_blocks": [
            {"type": "thinking", "thinking": "a", "signature": "S1"},
            {"type": "redacted_thinking", "data": "D"},
        ]
    }


def test_the_chunks_of_mistral_are_filled_inside_their_lists():
    def thinking(text: str) -> dict[str, Any]:
        return {"content": [{"type": "thinking", "thinking": [{"type": "text", "text": text}]}]}

    assert merged(thinking("I "), thinking("must"), {"content": [{"type": "text", "text": "Yes."}]}) == {
        "content": [
            {"type": "thinking", "thinking": [{"type": "text", "text": "I must"}]},
            {"type": "text", "text": "Yes."},
        ]
    }


def test_a_signature_that_comes_with_every_piece_is_one():
    piece = {"extra_content": {"google": {"thought_signature": "S"}}}
    assert merged(piece, piece, piece) == piece


def test_what_is_constant_is_not_joined_to_itself():
    piece = {"item": {"id": "r1", "type": "reasoning", "status": "done", "text": "a"}}
    assert merged(piece, piece)["item"] == {"id": "r1", "type": "reasoning", "status": "done", "text": "aa"}


def test_parts_of_one_piece_are_parts_of_the_whole():
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    assert merged({"content": parts}) == {"content": parts}


@pytest.mark.parametrize(
    "pieces",
    [
        [{"x": 1}, {"x": "a"}, {"x": [1]}, {"x": {"a": 1}}, {"x": None}, {"x": True}],
        [{"x": [1, None, "a", [2]]}, {"x": [{"index": "one"}]}, {"x": [{"type": 5, "index": True}]}],
        [{"x": [{"type": ["odd"], "index": 0}]}, {"x": [{"type": {"a": 1}, "index": 0}]}],
        [{"x": [{"type": ["odd"], "a": "1"}]}, {"x": [{"type": ["odd"], "a": "2"}]}],
        [{"x": []}, {"x": {}}, {"x": ""}],
        [{}],
    ],
)
def test_pieces_of_any_kind_do_no_harm(pieces: list[dict[str, Any]]):
    merged(*pieces)


@pytest.mark.parametrize(
    "piece",
    [{"a": "xx"}, {"a": [{"type": "t", "text": "xx"}]}, {"a": [{"type": "t", "index": 0, "text": "x"}]}, {"a": [1]}],
    ids=str,
)
def test_a_piece_costs_the_same_however_much_there_is(piece: dict[str, Any]):
    started = time.perf_counter()
    merged(*[piece] * 100_000)
    assert time.perf_counter() - started < 5


@pytest.mark.parametrize("pieces", [["a", "b"], ["", "a"]], ids=str)
def test_what_closes_an_item_costs_the_same_however_it_comes(pieces: list[str]):
    started = time.perf_counter()
    merged(*[{"x": [{"type": "t", "index": 0, "signature": each}]} for each in pieces * 35_000])
    assert time.perf_counter() - started < 5
