"""The transcript, which is always one that an endpoint accepts, and the user's turn."""

import dataclasses
import datetime as dt
import json
from types import MappingProxyType
from typing import Any

import pytest
from hypothesis import given, settings, strategies as st
from pydantic import BaseModel

from fractal import InvalidArguments, InvalidMessages, ModelRequest, parts
from fractal.messages import Transcript, user_message
from tests.support import shown

USER = {"role": "user", "content": "hi"}


def asks(*ids: Any) -> dict[str, Any]:
    function = {"name": "f", "arguments": "{}"}
    calls = [{"id": call_id, "type": "function", "function": function} for call_id in ids]
    return {"role": "assistant", "content": None, "tool_calls": calls}


def answers(call_id: Any) -> dict[str, Any]:
    return {"role": "tool", "tool_call_id": call_id, "content": "done"}


class Person(BaseModel):
    name: str


@dataclasses.dataclass
class Point:
    x: int


async def a_question() -> str:
    return "question"


@pytest.mark.parametrize(
    "history",
    [
        [],
        [USER],
        [{"role": "system", "content": "be kind"}, USER],
        [{"role": "developer", "content": "be kind"}, USER],
        [USER, {"role": "assistant", "content": "hello"}],
        [USER, asks("a"), answers("a")],
        [USER, asks("a", "b"), answers("a"), answers("b"), {"role": "assistant", "content": "x"}],
        [USER, asks("a"), answers("a"), asks("a"), answers("a")],
        [USER, {"role": "assistant", "content": "x", "tool_calls": None}, USER],
        [USER, {"role": "assistant", "content": "x", "refusal": None, "unknown_field": 5}],
        [USER, USER],
    ],
    ids=str,
)
def test_a_history_that_an_endpoint_accepts_is_kept_as_it_is(history: list[dict[str, Any]]) -> None:
    transcript = Transcript(history)

    assert transcript.messages == history
    assert len(transcript) == len(history)
    assert [json.loads(fragment) for fragment in transcript.encoded()] == history
    assert transcript.open_calls == ()


@pytest.mark.parametrize(
    ("history", "index", "fault"),
    [
        (["hi"], 0, "not str"),
        ([None], 0, "not NoneType"),
        ([USER, ("role", "user")], 1, "not tuple"),
        ([{}], 0, "unknown role None"),
        ([{"content": "hi"}], 0, "unknown role None"),
        ([USER, {"role": "robot", "content": "x"}], 1, "unknown role 'robot'"),
        ([{"role": ["user"], "content": "x"}], 0, "unknown role ['user']"),
        ([{"role": {}, "content": "x"}], 0, "unknown role {}"),
        ([{"role": "user"}], 0, "no content"),
        ([{"role": "user", "content": None}], 0, "no content"),
        ([USER, {"role": "assistant", "content": None}], 1, "no content"),
        ([USER, asks("a"), {"role": "tool", "tool_call_id": "a"}], 2, "no content"),
        ([USER, asks("a")], 1, "'a' has no result"),
        ([USER, asks("a", "b"), answers("a")], 2, "'b' has no result"),
        ([USER, asks("a"), USER], 2, "'a' must be answered before a user message"),
        ([USER, asks("a", "b"), answers("a"), asks("c")], 3, "'b' must be answered before a assistant message"),
        ([USER, asks("a"), {"role": "system", "content": "x"}], 2, "'a' must be answered"),
        ([USER, asks("a", "b"), answers("b")], 2, "'b' where 'a' comes first"),
        ([USER, asks("a"), answers("z")], 2, "'z' where 'a' comes first"),
        ([USER, asks("a"), answers(None)], 2, "None where 'a' comes first"),
        ([answers("a")], 0, "'a', which nobody made"),
        ([USER, asks("a"), answers("a"), answers("a")], 3, "'a', which nobody made"),
        ([USER, asks("a", "a")], 1, "two tool calls have the id 'a'"),
        ([USER, asks(None)], 1, "a tool call has no id"),
        ([USER, asks("")], 1, "a tool call has no id"),
        ([USER, asks(5)], 1, "a tool call has no id"),
        ([USER, {"role": "assistant", "tool_calls": "a"}], 1, "tool_calls is no list"),
        ([USER, {"role": "assistant", "tool_calls": {"id": "a"}}], 1, "tool_calls is no list"),
        ([USER, {"role": "assistant", "tool_calls": ["a"]}], 1, "a tool call has no id"),
        ([USER, {"role": "assistant", "content": "x", "tool_calls": []}], 1, "tool_calls"),
    ],
    ids=str,
)
def test_a_history_that_an_endpoint_would_refuse_is_refused_with_the_place_and_the_fault(
    history: list[Any], index: int, fault: str
) -> None:
    with pytest.raises(InvalidMessages) as caught:
        Transcript(history)

    assert caught.value.index == index
    assert fault in caught.value.fault


def test_a_refused_message_leaves_the_transcript_as_it_was() -> None:
    transcript = Transcript([USER])
    transcript.append(asks("a", "b"))
    for wrong in (USER, answers("b"), "text", {"role": "?"}):
        with pytest.raises(InvalidMessages):
            transcript.append(wrong)  # type: ignore[arg-type]

    assert transcript.messages == [USER, asks("a", "b")]
    assert transcript.open_calls == ("a", "b")


def test_calls_are_answered_in_order_and_then_something_else_may_be_said() -> None:
    transcript = Transcript([USER])
    transcript.append(asks("a", "b"))
    assert transcript.open_calls == ("a", "b")
    transcript.answer("a", "1")
    assert transcript.open_calls == ("b",)
    with pytest.raises(InvalidMessages, match="'b' has no result"):
        transcript.require_answered()
    transcript.answer("b", "2")

    transcript.require_answered()
    transcript.append(USER)
    assert transcript.messages[2:4] == [
        {"role": "tool", "tool_call_id": "a", "content": "1"},
        {"role": "tool", "tool_call_id": "b", "content": "2"},
    ]


def test_each_message_is_encoded_once() -> None:
    transcript = Transcript([USER])
    transcript.append(asks("a"))
    before = list(transcript.encoded())
    transcript.answer("a", "ü")
    after = transcript.encoded()

    assert len(after) == 3
    assert all(old is new for old, new in zip(before, after[:2], strict=True))
    assert after[2] == '{"role":"tool","tool_call_id":"a","content":"ü"}'.encode()
    assert transcript.encoded()[2] is after[2]


def test_the_callers_list_and_dicts_are_not_the_transcripts() -> None:
    history = [dict(USER)]
    transcript = Transcript(history)
    history[0]["content"] = "changed"
    history.append(dict(USER))
    transcript.messages.clear()

    assert transcript.messages == [USER]
    assert transcript.encoded() == [b'{"role":"user","content":"hi"}']


def test_a_history_can_come_from_a_generator_and_from_any_mapping() -> None:
    transcript = Transcript(MappingProxyType(message) for message in (USER, USER))
    assert transcript.messages == [USER, USER]
    assert all(type(message) is dict for message in transcript.messages)


def test_the_messages_from_a_position_on_are_a_list_of_their_own() -> None:
    transcript = Transcript([USER, asks("a"), answers("a")])

    assert transcript.since(1) == [asks("a"), answers("a")]
    assert transcript.since(3) == []
    transcript.since(0).clear()
    assert len(transcript) == 3


# Text that UTF-8 can carry: lone surrogates are replaced on the way out, on purpose.
texts = st.text(st.characters(codec="utf-8"))
any_json = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | texts,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(texts, inner, max_size=3),
    max_leaves=6,
)
part = st.one_of(
    st.builds(lambda text: {"type": "text", "text": text}, texts),
    st.builds(lambda data: parts.image(b"GIF89a" + data, detail="low"), st.binary()),
    st.builds(lambda data: parts.audio(b"ID3" + data), st.binary()),
    st.builds(lambda data, name: parts.file(b"%PDF-" + data, name), st.binary(), texts.filter(bool)),
    st.builds(lambda kind, value: {"type": kind, kind: value}, texts, any_json),
)
content = texts | st.lists(part, min_size=1, max_size=3)
unknown = st.dictionaries(
    texts.filter(lambda name: name not in ("role", "content", "tool_calls")), any_json, max_size=2
)


@st.composite
def turns(draw: st.DrawFn) -> list[dict[str, Any]]:
    def say(role: str, **fields: Any) -> dict[str, Any]:
        return {**draw(unknown), "role": role, "content": draw(content), **fields}

    messages = [say(draw(st.sampled_from(["system", "developer", "user", "assistant"])), name=draw(texts))]
    ids = draw(st.lists(texts.filter(bool), max_size=3, unique=True))
    if ids:
        function = {"name": draw(texts), "arguments": json.dumps(draw(st.dictionaries(texts, any_json, max_size=2)))}
        calls = [{**draw(unknown), "id": call_id, "type": "function", "function": function} for call_id in ids]
        messages.append({"role": "assistant", "content": draw(st.none() | content), "tool_calls": calls})
        messages += [say("tool", tool_call_id=call_id) for call_id in ids]
    return messages


@settings(deadline=None)
@given(st.lists(turns(), max_size=3))
def test_a_conversation_comes_back_from_json_as_it_was(conversation: list[list[dict[str, Any]]]) -> None:
    history = [message for turn in conversation for message in turn]
    transcript = Transcript(history)

    assert transcript.messages == history
    assert [json.loads(fragment) for fragment in transcript.encoded()] == history
    stored = json.dumps(transcript.messages)
    assert Transcript(json.loads(stored)).encoded() == transcript.encoded()
    assert json.loads(ModelRequest(model="m", system=None, transcript=transcript).body())["messages"] == history


@settings(deadline=None)
@given(st.lists(st.sampled_from(["user", "ask", "ask2", "a", "b", "c"]), max_size=12))
def test_whatever_is_appended_the_transcript_stays_acceptable(moves: list[str]) -> None:
    transcript = Transcript()
    for move in moves:
        message = {"user": USER, "ask": asks("a"), "ask2": asks("b", "c")}.get(move) or answers(move)
        try:
            transcript.append(message)
        except InvalidMessages:
            continue
    for call_id in transcript.open_calls:
        transcript.answer(call_id, "x")

    history = transcript.messages
    assert Transcript(history).messages == history
    asked = [call["id"] for message in history for call in message.get("tool_calls", ())]
    assert asked == [message["tool_call_id"] for message in history if message["role"] == "tool"]


# ---- the user's turn

PART = {"type": "text", "text": "look"}
IMAGE = {"type": "image_url", "image_url": {"url": "data:image/png;base64,AA=="}}


@pytest.mark.parametrize(
    ("given_input", "content"),
    [
        ("hi", "hi"),
        ("", ""),
        ('{"a": 1}', '{"a": 1}'),
        ({"a": 1}, '{"a":1}'),
        ({"type": "text", "text": "one part alone is a dict"}, '{"type":"text","text":"one part alone is a dict"}'),
        ([1, "two"], '[1,"two"]'),
        ([], "[]"),
        ([{"a": 1}], '[{"a":1}]'),
        (["only", "texts"], '["only","texts"]'),
        ([PART, {"a": 1}], '[{"type":"text","text":"look"},{"a":1}]'),
        ([PART, "look", 5], '[{"type":"text","text":"look"},"look",5]'),
        ((PART, "no list"), '[{"type":"text","text":"look"},"no list"]'),
        ([{"type": "unknown"}], '[{"type":"unknown"}]'),
        ([{"type": ["string", "null"]}], '[{"type":["string","null"]}]'),
        ([{"type": {}}], '[{"type":{}}]'),
        (Person(name="Ada"), '{"name":"Ada"}'),
        ([Person(name="Ada")], '[{"name":"Ada"}]'),
        (Point(1), '{"x":1}'),
        (5, "5"),
        (True, "true"),
        (0, "0"),
        (1.5, "1.5"),
        (b"bytes", "bytes"),
        (dt.date(2024, 5, 6), '"2024-05-06"'),
        ("lone \ud800", "lone \ufffd"),
        ("NUL \x00", "NUL \x00"),
    ],
    ids=repr,
)
def test_input_is_sent_as_text_or_as_json(given_input: Any, content: str) -> None:
    message = user_message(given_input)

    assert message["role"] == "user"
    assert message["content"] == content
    assert json.loads(Transcript([message]).encoded()[0])["content"] == content


@pytest.mark.parametrize(
    "parts", [[PART], [PART, IMAGE], [{"type": "input_audio", "input_audio": {"data": "", "format": "wav"}}]], ids=str
)
def test_content_parts_are_sent_as_parts(parts: list[dict[str, Any]]) -> None:
    message = user_message(parts)

    assert message == {"role": "user", "content": parts}
    assert json.loads(Transcript([message]).encoded()[0]) == message


def test_texts_among_content_parts_are_parts_too() -> None:
    given_input = ["Look:", IMAGE, "", PART, "lone \ud800"]

    assert user_message(given_input)["content"] == [
        {"type": "text", "text": "Look:"},
        IMAGE,
        {"type": "text", "text": ""},
        PART,
        {"type": "text", "text": "lone \ufffd"},
    ]
    assert given_input[0] == "Look:"


def test_lone_surrogates_in_content_parts_do_not_stop_the_request() -> None:
    [fragment] = Transcript([user_message([{"type": "text", "text": "a\ud800b"}])]).encoded()
    assert json.loads(fragment)["content"][0]["text"] == "a\ufffdb"


def test_lone_surrogates_inside_json_input_are_replaced() -> None:
    content = user_message({"k": ["\ud800", "\ud83d\ude00"]})["content"]
    assert json.loads(content) == {"k": ["\ufffd", "😀"]}


def test_no_input_is_wrong_use() -> None:
    with pytest.raises(InvalidArguments, match="user_input is None"):
        user_message(None)


@pytest.mark.parametrize("wrong", [Person, len, "".join, lambda: "question", a_question], ids=shown)
def test_a_function_in_the_place_of_what_it_returns_is_wrong_use(wrong: object) -> None:
    with pytest.raises(InvalidArguments, match=r"user_input is .*: call it, and pass what it returns"):
        user_message(wrong)


def test_a_coroutine_in_the_place_of_what_it_gives_is_wrong_use() -> None:
    coroutine = a_question()
    with pytest.raises(InvalidArguments, match=r"user_input is <coroutine .*a_question.*>: await it, and pass what it"):
        user_message(coroutine)
    coroutine.close()


def test_data_that_can_be_called_is_input() -> None:
    class Recipe(Person):
        def __call__(self) -> str:
            return self.name

    assert user_message(Recipe(name="Ada"))["content"] == '{"name":"Ada"}'


def test_huge_input_is_sent_whole() -> None:
    text = "ü" * 3_000_000
    [fragment] = Transcript([user_message(text)]).encoded()
    assert len(fragment) == len('{"role":"user","content":""}') + 2 * len(text)
