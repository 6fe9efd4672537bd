"""A streamed completion, however it is cut and whatever an endpoint makes of the format, is the reply sent whole."""

from __future__ import annotations

import json
import random
from collections.abc import Coroutine, Iterable
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any, TypeVar

import pytest
from hypothesis import given, settings, strategies as st

from fractal._texts import clean_text
from fractal.errors import AuthenticationFailed, BadReply, ConnectionFailed, ModelError, RateLimited, ServerError
from fractal.model import Delta, Reply, ToolCall
from fractal.models._replies.reading import reply_of
from fractal.models._replies.stream_reader import ReplyReader
from fractal.models._secrets import Secrets
from fractal.models.bounds import DEFAULT_BOUNDS
from fractal.testing import answers
from fractal.testing.answers import Answer, ToolCallAnswer

T = TypeVar("T")

# Hypothesis leaves surrogates out of its texts unless told otherwise.
any_text = st.text(st.characters(codec=None, categories=None) | st.sampled_from("\ud83d\ude00\ud800\udfff\ufeff\x00é"))
names = st.text("abcdefgh_", min_size=1, max_size=8)


@dataclass
class Read:
    """What a reader made of a stream."""

    reader: ReplyReader
    deltas: list[Delta] = field(default_factory=list)

    @property
    def reply(self) -> Reply:
        return at_once(self.reader.end())

    @property
    def calls(self) -> list[tuple[str, str]]:
        return [(call.name, call.arguments) for call in self.reply.tool_calls]

    def shown(self, kind: str, index: int = 0) -> str:
        """The pieces that were handed out, joined."""
        return "".join(delta.text for delta in self.deltas if (delta.kind, delta.index) == (kind, index))


def at_once(coroutine: Coroutine[Any, Any, T]) -> T:
    """The value of a coroutine that never has to wait."""
    with pytest.raises(StopIteration) as end:
        coroutine.send(None)
    return end.value.value


def read(data: Iterable[bytes], secret: str | None = None) -> Read:
    """Have a stream read that comes in these pieces."""

    async def show(delta: Delta) -> None:
        one.deltas.append(delta)

    async def read_all() -> None:
        for piece in data:
            await one.reader.read(piece)

    one = Read(ReplyReader(show, DEFAULT_BOUNDS, Secrets(secret)))
    at_once(read_all())
    return one


def chunk(finish_reason: object = None, *, index: object = 0, usage: object = None, **delta: object) -> dict[str, Any]:
    return {"choices": [{"index": index, "delta": delta, "finish_reason": finish_reason}], "usage": usage}


def events(*payloads: object) -> bytes:
    """Payloads as events: text as it is, anything else as JSON."""
    texts = [payload if isinstance(payload, str) else json.dumps(payload) for payload in payloads]
    return "".join(f"data: {text}\n\n" for text in texts).encode()


def answered(*chunks: object) -> Read:
    """A whole stream of these chunks, with the end it should have."""
    return read([events(*chunks, chunk("stop"), "[DONE]")])


def called(*deltas: dict[str, Any]) -> Read:
    """A whole stream of one tool-call delta in each chunk."""
    return answered(*[chunk(tool_calls=[delta]) for delta in deltas])


def call(arguments: object = None, name: object = None, **more: object) -> dict[str, Any]:
    function = {"name": name, "arguments": arguments}
    return {**more, "function": {key: value for key, value in function.items() if value is not None}}


# ---- any split of the bytes, any shape of the deltas


tool_calls = st.builds(
    ToolCallAnswer,
    id=st.uuids().map(str),
    name=names,
    arguments=st.just("{}") | any_text | names.map('{{"a":"{}"}}'.format),
)
some_answers = st.builds(
    Answer,
    text=st.none() | any_text,
    tool_calls=st.lists(tool_calls, max_size=3, unique_by=lambda one: one.id).map(tuple),
    refusal=st.none() | any_text,
    finish_reason=st.none() | st.sampled_from(["stop", "length", "content_filter"]),
    usage=st.tuples(st.integers(0, 9999), st.integers(0, 9999)),
    message_extra=st.fixed_dictionaries({}, optional={"reasoning_content": any_text}),
)


@st.composite
def streams(draw: st.DrawFn) -> tuple[Answer, bytes]:
    """An answer as an endpoint may write it: its line ends, spaces, comments and other fields."""
    answer = draw(some_answers)
    end = draw(st.sampled_from(["\n", "\r\n"]))
    space = draw(st.sampled_from(["", " "]))
    between = draw(
        st.sampled_from(["", ": keep-alive", "event: message", "id: 7", "retry: 10", "unknown", f": a{end}{end}"])
    )
    payloads = [json.dumps(chunk) for chunk in answer.chunks("m", include_usage=True)]
    lines = [f"{between}{end}data:{space}{payload}{end}{end}" for payload in [*payloads, "[DONE]"]]
    return answer, "".join(lines).removeprefix(end).encode()


def in_pieces(data: bytes, cuts: Iterable[int]) -> list[bytes]:
    places = [0, *sorted(cut % (len(data) + 1) for cut in cuts), len(data)]
    return [data[start:end] for start, end in pairwise(places)]


@settings(deadline=None)
@given(streams(), st.lists(st.integers(0, 10_000), max_size=12))
def test_however_the_bytes_are_cut_the_pieces_and_the_reply_are_the_same(stream: tuple[Answer, bytes], cuts: list[int]):
    answer, data = stream
    whole, cut = read([data]), read(in_pieces(data, cuts))
    assert cut.deltas == whole.deltas
    assert cut.reply == whole.reply == reply_of(answer.completion("m"))
    assert cut.reader.is_done


def test_a_stream_may_come_byte_by_byte():
    answer = answers.calls(answers.call("add", {"a": "é😀"}, id="c1"), text="Let me see: 𝄞.")
    data = events(*answer.chunks("m", include_usage=True), "[DONE]")
    one = read(bytes([byte]) for byte in data)
    assert one.reply == reply_of(answer.completion("m"))
    assert one.deltas == read([data]).deltas


@dataclass
class Cut:
    """A completion, and the same in chunks cut at random."""

    completion: dict[str, Any]
    chunks: list[dict[str, Any]]


def halves(text: str) -> list[str]:
    """The characters, those above U+FFFF as the two halves that JSON writes."""
    units = text.encode("utf-16-be", "surrogatepass")
    return [units[at : at + 2].decode("utf-16-be", "surrogatepass") for at in range(0, len(units), 2)]


def cut_text(text: str, chance: random.Random) -> list[str]:
    pieces = [""]
    for character in halves(text):
        if chance.random() < 0.4:
            pieces.append("")
        pieces[-1] += character
    return pieces


def cut_call(index: int, one: ToolCallAnswer, chance: random.Random, names_again: bool) -> list[dict[str, Any]]:
    first, *rest = cut_text(one.arguments, chance)
    again = {"name": one.name} if names_again else {}
    return [
        {"tool_calls": [{"index": index, "id": one.id, "function": {"name": one.name, "arguments": first}}]},
        *({"tool_calls": [{"index": index, "function": {**again, "arguments": piece}}]} for piece in rest),
    ]


@st.composite
def completions(draw: st.DrawFn) -> Cut:
    """Text, reasoning, a refusal and parallel calls, the pieces of all in any order; calls begin in theirs."""
    # A half at the very end has nothing to wait for; it has a test of its own.
    texts = st.none() | any_text.filter(lambda text: not "\ud800" <= text[-1:] <= "\udbff")
    arguments = st.dictionaries(names, st.integers() | any_text, max_size=2).map(json.dumps)
    calls = draw(
        st.lists(st.builds(ToolCallAnswer, id=st.uuids().map(str), name=names, arguments=arguments), max_size=3)
    )
    message = {"content": draw(texts), "refusal": draw(texts), "reasoning_content": draw(texts)}
    usage = {"prompt_tokens": draw(st.integers(0, 99)), "completion_tokens": draw(st.integers(0, 99))}
    reason = draw(st.sampled_from(["stop", "length", "tool_calls"]))
    chance, names_again = draw(st.randoms(use_true_random=False)), draw(st.booleans())
    queues = [[{name: piece} for piece in cut_text(text, chance)] for name, text in message.items() if text is not None]
    waiting = [cut_call(index, one, chance, names_again) for index, one in enumerate(calls)]
    deltas: list[dict[str, Any]] = []
    while queues or waiting:
        turn = chance.randrange(len(queues) + bool(waiting))
        if turn == len(queues):
            queues.append(waiting.pop(0))
        deltas.append(queues[turn].pop(0))
        queues = [queue for queue in queues if queue]
    chunks = [chunk(**delta) for delta in deltas]
    chunks.insert(chance.randrange(len(chunks) + 1), {"choices": [], "usage": usage})
    message["tool_calls"] = [one.wire_form() for one in calls]
    return Cut({"choices": [{"message": message, "finish_reason": reason}], "usage": usage}, [*chunks, chunk(reason)])


@settings(deadline=None)
@given(completions())
def test_however_a_completion_is_cut_into_chunks_it_is_the_same_reply_and_all_of_it_is_shown(cut: Cut):
    one = read([events(*cut.chunks)])
    assert one.reply == reply_of(cut.completion)
    assert one.shown("text") == (one.reply.text or "")
    assert one.shown("reasoning") == clean_text(cut.completion["choices"][0]["message"]["reasoning_content"] or "")
    for index, made in enumerate(one.reply.tool_calls):
        assert one.shown("tool_call", index) == made.arguments
        mine = [delta for delta in one.deltas if delta.kind == "tool_call" and delta.index == index]
        assert {(delta.call_id, delta.tool_name) for delta in mine} == {(made.id, made.name)}


# ---- events


@pytest.mark.parametrize(
    "data",
    [
        b'data: {"choices":[{"delta":{"content":"hi"},"finish_reason":"stop"}]}\n\n',
        b'data:{"choices":[{"delta":{"content":"hi"},"finish_reason":"stop"}]}\n\n',
        b'data:   {"choices":[{"delta":{"content":"hi"},"finish_reason":"stop"}]}  \r\n\r\n',
        b': hello\n\n:\n\ndata: {"choices":[{"delta":{"content":"hi"},"finish_reason":"stop"}]}\n: bye\n\n',
        b'event: chunk\nid: 1\ndata: {"choices":[{"delta":{"content":"hi"},"finish_reason":"stop"}]}\nretry: 9\n\n',
        b'data: {"choices":\ndata: [{"delta":{"content":"hi"},\nid: 1\ndata:"finish_reason":"stop"}]}\n\n',
        b'\n\n\r\n\ndata: {"choices":[{"delta":{"content":"hi"},"finish_reason":"stop"}]}\n\n\n\n',
        b'data\ndatum: 1\ndata: {"choices":[{"delta":{"content":"hi"},"finish_reason":"stop"}]}\n\n',
    ],
    ids=["plain", "no space", "spaces, CRLF", "comments", "other fields", "several lines", "empty lines", "unknown"],
)
def test_the_data_of_an_event_is_found_in_whatever_is_around_it(data: bytes):
    one = read([data])
    assert one.reply == Reply(text="hi", finish_reason="stop")
    assert one.deltas == [Delta("text", "hi")]
    assert not one.reader.is_done


@pytest.mark.parametrize(
    "end", ["data: [DONE]\n\n", "data:[DONE]\n\n", "data: [DONE] \r\n\r\n", "data:  [DONE]\ndata:\n\n"]
)
def test_the_end_is_seen_in_all_its_forms_and_nothing_after_it_counts(end: str):
    one = read(
        [events(chunk("stop", content="hi")) + end.encode() + events("no JSON", chunk(content=" there"), {"error": 1})]
    )
    assert one.reader.is_done
    assert one.reply.text == "hi"


def test_the_end_is_not_seen_before_its_event_is_whole():
    one = read([events(chunk("stop", content="hi")), b"data: [DONE]\n"])
    assert not one.reader.is_done
    assert one.reply.text == "hi"


def test_events_without_data_only_keep_the_line_open():
    data = (
        events(chunk(content="a")) + b"data:\n\ndata: \n\nevent: ping\ndata:\n\n" + events(chunk("stop", content="b"))
    )
    assert read([data]).reply.text == "ab"


def test_a_last_event_without_its_empty_line_counts_if_it_is_whole():
    data = events(chunk(content="a"), chunk("stop"))
    for end in (-1, -2):
        assert read([data[:end]]).reply == Reply(text="a", finish_reason="stop")
    for end in range(-3, -20, -1):
        with pytest.raises(ConnectionFailed, match="no finish reason"):
            _ = read([data[:end]]).reply


@pytest.mark.parametrize(
    "other",
    [
        {},
        {"type": "ping"},
        {"choices": []},
        {"choices": None},
        {"choices": {}},
        {"choices": [None, 1]},
        {"error": None},
    ],
    ids=str,
)
def test_chunks_that_say_nothing_of_the_reply_are_passed_over(other: dict[str, Any]):
    assert answered(chunk(content="a"), other, chunk(content="b")).reply.text == "ab"


@pytest.mark.parametrize(
    "delta", [None, "text", [], {"content": 3}, {"content": {}, "tool_calls": {}}, {"tool_calls": [1]}]
)
def test_fields_of_the_wrong_type_are_passed_over(delta: object):
    odd = {"choices": [{"index": 0, "delta": delta, "finish_reason": 5}], "usage": 3}
    one = answered(chunk(content="a"), odd)
    assert one.reply == Reply(text="a", finish_reason="stop")
    assert len(one.deltas) == 1


# ---- the end


def test_a_stream_without_a_finish_reason_is_cut_and_no_short_answer():
    for payloads in ([chunk(content="half")], [chunk(call=1)], [chunk(content=""), "[DONE]"], ["[DONE]"], []):
        with pytest.raises(ConnectionFailed, match="no finish reason") as caught:
            _ = read([events(*payloads)]).reply
        assert caught.value.retryable


def test_an_answer_with_the_last_word_and_without_a_finish_reason_is_one_that_says_so():
    one = read([events(chunk(content="all of it"), "[DONE]")])
    assert (one.reply.text, one.reply.finish_reason, one.reply.is_doubtful) == ("all of it", "unsaid", True)


@pytest.mark.parametrize("nothing", ["", None, 5])
def test_an_empty_finish_reason_is_none(nothing: object):
    with pytest.raises(ConnectionFailed):
        _ = read([events(chunk(nothing, content="a"), chunk(nothing))]).reply
    assert read([events(chunk(nothing, content="a"), chunk("length"), chunk(nothing))]).reply.finish_reason == "length"


@pytest.mark.parametrize("fault", [OSError("cut"), BadReply("no JSON"), ModelError("busy")], ids=repr)
@pytest.mark.parametrize(
    ("payloads", "after_the_reason", "after_the_end"),
    [([chunk(content="half")], False, False), ([chunk("stop")], True, False), ([chunk("stop"), "[DONE]"], True, True)],
    ids=["half", "finish reason", "end"],
)
def test_after_the_finish_reason_a_cut_costs_nothing_and_after_the_end_nothing_does(
    payloads: list[object], after_the_reason: bool, after_the_end: bool, fault: Exception
):
    expected = after_the_end if isinstance(fault, ModelError) else after_the_reason
    assert read([events(*payloads)]).reader.can_do_without_the_rest(fault) is expected


def test_the_finish_reason_may_come_with_the_last_words_or_before_them():
    assert read([events(chunk("stop", content="a"), chunk(content="b"))]).reply == Reply(
        text="ab", finish_reason="stop"
    )


@pytest.mark.parametrize("place", [0, 1, 2, 3])
def test_usage_is_found_wherever_it_is(place: int):
    chunks = [chunk(content="a", usage={}), chunk(content="b"), chunk("stop", usage={})]
    chunks.insert(place, {"choices": [], "usage": {"prompt_tokens": 7, "completion_tokens": 2}})
    reply = read([events(*chunks)]).reply
    assert (reply.input_tokens, reply.output_tokens) == (7, 2)


def test_of_a_usage_that_grows_the_last_one_counts():
    chunks = [chunk(content="a", usage={"prompt_tokens": 7, "completion_tokens": n}) for n in range(4)]
    reply = answered(*chunks).reply
    assert (reply.input_tokens, reply.output_tokens) == (7, 3)


# ---- text


def test_content_in_parts_is_the_text_of_the_parts():
    parts = [
        {"type": "thinking", "thinking": []},
        {"type": "text", "text": "one "},
        "no part",
        {"type": "text", "text": 2},
    ]
    one = answered(chunk(content=parts), chunk(content=[{"type": "text", "text": "two"}]), chunk(content=[]))
    assert one.reply.text == "one two"
    assert one.deltas == [Delta("text", "one "), Delta("text", "two")]


def test_a_refusal_comes_in_pieces_or_parts_and_is_not_shown():
    for deltas in (
        [{"refusal": "I would "}, {"refusal": "rather not"}],
        [{"content": [{"type": "refusal", "refusal": "I would rather not"}]}],
        [{"content": None, "refusal": None}, {"refusal": ""}, {"refusal": "I would rather not"}],
    ):
        one = answered(*[chunk(**delta) for delta in deltas])
        assert (one.reply.text, one.reply.refusal) == (None, "I would rather not")
        assert one.deltas == []


@pytest.mark.parametrize(
    "deltas",
    [
        [{"reasoning_content": "let me "}, {"reasoning_content": "think"}],
        [{"reasoning": "let me "}, {"reasoning": "think"}],
        [{"reasoning": "let me ", "reasoning_content": "let me "}, {"reasoning_content": None, "reasoning": "think"}],
        [{"reasoning": [{"type": "text", "text": "let me "}], "content": ""}, {"reasoning_content": "think"}],
    ],
    ids=["reasoning_content", "reasoning", "both", "parts"],
)
def test_reasoning_is_shown_once_under_either_name_and_is_no_part_of_the_text(deltas: list[dict[str, Any]]):
    one = answered(*[chunk(**delta) for delta in deltas], chunk(content="yes"))
    assert one.deltas == [Delta("reasoning", "let me "), Delta("reasoning", "think"), Delta("text", "yes")]
    assert one.reply.text == "yes"


def test_only_the_first_of_several_choices_counts():
    second = {
        "index": 1,
        "delta": {"content": "B", "tool_calls": [call("{}", "b", index=0)]},
        "finish_reason": "length",
    }
    both = {"choices": [{"index": 0, "delta": {"content": "a"}, "finish_reason": None}, second]}
    one = answered({"choices": [second]}, both, {"choices": [second]})
    assert one.reply == Reply(text="a", finish_reason="stop")
    assert one.deltas == [Delta("text", "a")]


@pytest.mark.parametrize("index", [None, 0])
def test_a_choice_without_a_number_is_the_first(index: int | None):
    assert answered(chunk(index=index, content="a")).reply.text == "a"


def test_the_halves_of_a_surrogate_pair_are_shown_together():
    one = answered(chunk(content="a\ud83d"), chunk(content="\ude00"), chunk(content="\ud83d"), chunk(content="b\ude00"))
    assert one.reply.text == "a😀\ufffdb\ufffd"
    assert [delta.text for delta in one.deltas] == ["a", "😀", "\ufffdb\ufffd"]
    one = called(call('{"a":"\ud83d', "f", index=0, id="c"), call("", index=0), call('\ude00"}', index=0))
    assert one.calls == [("f", '{"a":"😀"}')]
    assert [delta.text for delta in one.deltas] == ['{"a":"', '😀"}']


def test_a_half_that_waits_does_not_hold_up_what_is_of_another_kind():
    deltas = [{"content": "a\ud83d"}, {"reasoning": "b\ud83d"}, {"reasoning": "c"}, {"content": "\ude00"}]
    one = answered(*[chunk(**delta) for delta in deltas])
    assert (one.shown("text"), one.shown("reasoning")) == ("a😀", "b\ufffdc")


def test_half_a_pair_at_the_very_end_is_in_the_reply_though_nobody_was_shown_it():
    one = answered(chunk(content="a\ud83d"))
    assert (one.reply.text, one.shown("text")) == ("a\ufffd", "a")


# ---- tool calls


def test_a_call_is_shown_piece_by_piece_with_its_id_and_name():
    one = called(call("", "add", index=0, id="c1"), call('{"a"', index=0), call(":1}", index=0))
    assert one.reply.tool_calls == (ToolCall("c1", "add", '{"a":1}'),)
    assert one.deltas == [
        Delta("tool_call", "", 0, "c1", "add"),
        Delta("tool_call", '{"a"', 0, "c1", "add"),
        Delta("tool_call", ":1}", 0, "c1", "add"),
    ]


CALLS = {
    "one after the other": [
        call('{"a":1', "f", index=0, id="1"), call("}", index=0),
        call("", "g", index=1, id="2"), call('{"b":2}', index=1),
    ],
    "interleaved by index": [
        call("", "f", index=0, id="1"), call("", "g", index=1, id="2"),
        call('{"a"', index=0), call('{"b"', index=1), call(":1}", index=0), call(":2}", index=1),
    ],
    "interleaved by an index that is text": [
        call('{"a"', "f", index="0", id="1"), call('{"b"', "g", index="1", id="2"),
        call(":1}", index="0"), call(":2}", index="1"),
    ],
    "an index that numbers the pieces": [
        call('{"a"', "f", index=0, id="1"), call(":1}", index=1, id="1"),
        call('{"b"', "g", index=2, id="2"), call(":2", index=3, id="2"), call("}", index=4, id="2"),
    ],
    "numbers with gaps": [
        call('{"a":1', "f", index=3, id="1"), call('{"b":2}', "g", index=7, id="2"), call("}", index=3),
    ],
    "names repeated": [
        call("", "f", index=0, id="1"), call('{"a"', "f", index=0), call(":1}", "f", index=0),
        call('{"b"', "g", index=1, id="2"), call(":2}", "g", index=1),
    ],
    "names and ids repeated": [
        call('{"a"', "f", index=0, id="1"), call(":1}", "f", index=0, id="1"), call("", "f", index=0, id="1"),
        call('{"b":2}', "g", index=1, id="2"), call("\n", "g", index=1, id="2"),
    ],
    "the name after the arguments": [
        call('{"a":1}', index=0, id="1"), call(None, "f", index=0),
        call('{"b":2}', index=1, id="2"), call("", "g", index=1),
    ],
    "names empty after the first": [
        call("", "f", index=0, id="1"), call('{"a":1}', "", index=0),
        call("", "g", index=1, id="2"), call('{"b":2}', "", index=1),
    ],
    "ids empty after the first": [
        call('{"a"', "f", index=0, id="1"), call(":1}", index=0, id=""), call('{"b":2}', "g", index=1, id="2"),
    ],
    "ids that come late": [
        call('{"a"', "f", index=0), call(":1}", index=0, id="1"), call('{"b":2}', "g", index=1, id="2"),
    ],
    "ids that change": [
        call('{"a"', "f", index=0, id="1"), call(":1", index=0, id="x"), call("}", index=0, id="y"),
        call('{"b"', "g", index=1, id="2"), call(":2}", index=1, id="z"),
    ],
    "no index, told apart by id": [
        call('{"a"', "f", id="1"), call('{"b"', "g", id="2"), call(":1}", id="1"), call(":2}", id="2"),
    ],
    "no index, ids at the start": [
        call('{"a"', "f", id="1"), call(":1}"), call('{"b"', "g", id="2"), call(":2"), call("}"),
    ],
    "no index, ids that change": [call('{"a"', "f", id="1"), call(":1}", id="x"), call('{"b":2}', "g", id="2")],
    "index 0 for all, whole": [call('{"a":1}', "f", index=0, id="1"), call('{"b":2}', "g", index=0, id="2")],
    "index 0 for all, in pieces": [
        call('{"a"', "f", index=0, id="1"), call(":1}", index=0),
        call('{"b"', "g", index=0, id="2"), call(":2}", index=0),
    ],
    "one id for all": [call('{"a":1}', "f", index=0, id="1"), call('{"b":2}', "g", index=1, id="1")],
    "an object in place of text": [call({"a": 1}, "f", index=0, id="1"), call({"b": 2}, "g", index=1, id="2")],
    "an index at the start alone": [
        call('{"a"', "f", index=0, id="1"), call(":1}"), call('{"b"', "g", index=1, id="2"), call(":2}"),
    ],
    "an index that is no number": [call('{"a":1}', "f", index="0", id="1"), call('{"b":2}', "g", index=None, id="2")],
    "custom tools": [
        {"index": 0, "id": "1", "custom": {"name": "f", "input": '{"a"'}}, {"index": 0, "custom": {"input": ":1}"}},
        {"index": 1, "id": "2", "type": "custom", "custom": {"name": "g", "input": '{"b":2}'}},
    ],
}  # fmt: skip


@pytest.mark.parametrize("deltas", CALLS.values(), ids=CALLS)
@pytest.mark.parametrize("together", [False, True], ids=["each in a chunk", "all in one"])
def test_two_calls_are_told_apart_in_all_the_ways_endpoints_number_and_name_them(
    deltas: list[dict[str, Any]], together: bool
):
    one = answered(chunk(tool_calls=deltas)) if together else called(*deltas)
    assert [(name, json.loads(arguments)) for name, arguments in one.calls] == [("f", {"a": 1}), ("g", {"b": 2})]
    assert one.reply.tool_calls[0].id == "1"
    assert len({call.id for call in one.reply.tool_calls}) == 2
    for index, made in enumerate(one.reply.tool_calls):
        assert one.shown("tool_call", index) == made.arguments
        mine = [delta for delta in one.deltas if delta.index == index]
        assert mine[-1].tool_name == made.name


NAMELESS = {
    "no index and no id": {},
    "index 0 and no id": {"index": 0},
    "index 0 and an empty id": {"index": 0, "id": ""},
    "one index and one id": {"index": 0, "id": "same"},
}


@pytest.mark.parametrize("marks", NAMELESS.values(), ids=NAMELESS)
def test_calls_of_one_tool_that_nothing_tells_apart_are_told_apart_by_complete_arguments(marks: dict[str, Any]):
    parts = ['{"city":"Rome"}', '{"city":', '"Oslo"}', '{"city":"Bonn"}']
    one = called(*[call(part, "weather", **marks) for part in parts])
    assert one.calls == [("weather", f'{{"city":"{city}"}}') for city in ("Rome", "Oslo", "Bonn")]
    ids = [made.id for made in one.reply.tool_calls]
    assert all(ids)
    assert len(set(ids)) == 3


@pytest.mark.parametrize("marks", NAMELESS.values(), ids=NAMELESS)
def test_calls_without_arguments_that_nothing_tells_apart_are_told_apart_by_their_names(marks: dict[str, Any]):
    one = called(call("", "f", **marks), call("", "f", **marks), call(None, "g", **marks))
    assert one.calls == [("f", ""), ("g", "{}")]


@pytest.mark.parametrize(
    "function",
    [
        {"name": "f"},
        {"name": "f", "arguments": None},
        {"name": "f", "arguments": ""},
        {"name": "f", "arguments": {}},
        None,
        {},
    ],
    ids=str,
)
def test_what_a_call_leaves_out_is_read_as_in_a_whole_completion(function: dict[str, Any] | None):
    sent = {"index": 0, "id": "c", "function": function}
    whole = {"choices": [{"message": {"content": None, "tool_calls": [sent]}, "finish_reason": "stop"}]}
    assert called(sent).reply == reply_of(whole)


def test_calls_of_one_tool_without_arguments_are_told_apart_by_their_ids():
    one = called(call("", "f", index=0, id="1"), call("", "f", index=0, id="2"), call("", index=0, id="2"))
    assert [(made.id, made.name) for made in one.reply.tool_calls] == [("1", "f"), ("2", "f")]


def test_a_name_that_is_repeated_with_nothing_else_is_not_shown_again():
    one = called(call("{}", "f", index=0, id="1"), call("", "f", index=0, id="1"), call(None, "f", index=0))
    assert one.deltas == [Delta("tool_call", "{}", 0, "1", "f")]


def test_halves_of_pairs_in_a_name_are_no_trouble():
    one = called(call("{}", "f\ud800", index=0, id="c"))
    assert one.deltas[0].tool_name == one.reply.tool_calls[0].name == "f\ufffd"


# ---- faults


ERRORS = {  # the chunk: class, words, code, retryable
    "status": ({"error": {"message": "busy", "code": 429}}, RateLimited, "HTTP 429: busy", "429", True),
    "status beside a word": (
        {"error": {"message": "full", "status": 503, "code": "full"}}, ServerError, "HTTP 503: full", "full", True,
    ),
    "word beside a status": (
        {"error": {"message": "full", "status": "DOWN", "code": 503}}, ServerError, "HTTP 503: full", "DOWN", True,
    ),
    "status that says all is well": (
        {"error": {"message": "busy", "status": 200, "code": 429}}, RateLimited, "HTTP 429: busy", "429", True,
    ),
    "key": ({"error": {"message": "no", "code": 401}}, AuthenticationFailed, "HTTP 401: no", "401", False),
    "word": ({"error": {"message": "oops", "code": "broken"}}, ModelError, "broke off: oops", "broken", True),
    "nothing but a message": ({"error": {"message": "oops"}}, ModelError, "broke off: oops", None, True),
    "no message": ({"error": {"message": None, "type": "odd"}}, ModelError, "'type': 'odd'", "odd", True),
    "text": ({"error": "oops"}, ModelError, "broke off: oops", None, True),
    "list": ({"error": ["oops", 1]}, ModelError, "broke off: oops", None, True),
    "number": ({"error": 17}, ModelError, "broke off: 17", None, True),
    "beside a chunk": ({**chunk("error", content="x"), "error": {"message": "oops"}}, ModelError, "oops", None, True),
    "not under error": ({"object": "error", "message": "no", "code": 400}, ModelError, "HTTP 400: no", "400", False),
    "not under error, a word": ({"object": "error", "message": "no"}, ModelError, "broke off: no", None, True),
}  # fmt: skip


@pytest.mark.parametrize(("sent", "kind", "words", "code", "retryable"), ERRORS.values(), ids=ERRORS)
def test_an_error_in_the_stream_is_raised_in_whatever_form_it_comes(
    sent: object, kind: type[ModelError], words: str, code: str | None, retryable: bool
):
    shown: list[Delta] = []

    async def show(delta: Delta) -> None:
        shown.append(delta)

    reader = ReplyReader(show, DEFAULT_BOUNDS)
    with pytest.raises(kind) as caught:
        at_once(reader.read(events(chunk(content="half"), sent, chunk("stop"), "[DONE]")))
    assert words in str(caught.value)
    assert (caught.value.code, caught.value.retryable) == (code, retryable)
    assert shown == [Delta("text", "half")]


@pytest.mark.parametrize("payload", ["<html>", "{", '{"choices": [', "upstream timed out", "{city: 1}", "[" * 5000])
def test_what_is_not_json_is_a_bad_reply_that_quotes_it(payload: str):
    with pytest.raises(BadReply, match="not JSON") as caught:
        read([events(payload)])
    assert payload[:20] in str(caught.value)
    assert len(str(caught.value)) < 300
    assert caught.value.retryable


def test_bytes_that_are_no_utf_8_are_a_bad_reply():
    with pytest.raises(BadReply, match="not JSON"):
        read([b'data: {"choices":[{"delta":{"content":"\xff"}}]}\n\n'])


@pytest.mark.parametrize("payload", ["null", "1", "true", '"text"', "[]", "[{}]"])
def test_json_that_is_no_object_is_a_bad_reply(payload: str):
    with pytest.raises(BadReply, match="no chunk of a completion"):
        read([events(payload)])


@pytest.mark.parametrize(
    "payload",
    [
        "x" * 195 + "sk-secret",
        json.dumps("x" * 195 + "sk-secret"),
        {"error": "x" * 996 + "sk-secret"},
        {"error": {"message": "x" * 996 + "sk-secret"}},
        {"error": {"message": "your key sk-secret", "code": 401}},
    ],
    ids=["not JSON", "no chunk", "text", "message", "status"],
)
def test_no_error_repeats_the_key_or_a_part_of_it(payload: object):
    with pytest.raises(ModelError) as caught:
        read([events(payload)], secret="sk-secret")
    assert "sk-" not in str(caught.value)
