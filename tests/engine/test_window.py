"""The context window: what a request leaves out, and that an endpoint accepts what is left."""

import functools
import inspect
import json
import math
from collections.abc import Awaitable, Callable, Coroutine
from dataclasses import replace
from typing import Any, TypeVar

import anyio
import pytest
from hypothesis import given, settings, strategies as st

from fractal import InvalidArguments, ModelRequest, errors, parts
from fractal._engine.window import Window, WindowView, count_tokens
from fractal._json import encode
from fractal.errors import BudgetExceeded, UnexpectedError
from fractal.messages import Message, Transcript
from fractal.model import ModelSettings, ToolSchemas
from fractal.testing import check_messages
from tests.support import shown

T = TypeVar("T")

SYSTEM = "You know the weather."
CONTEXT = object()
HEADING = "Summary of the earlier conversation: "


# ---- a conversation whose tokens are known: each message says in a field of its own what it counts


def said(role: str, tokens: int, content: Any = "x", **fields: Any) -> Message:
    return {"role": role, "content": content, "tokens": tokens, **fields}


def asks(tokens: int, *ids: str) -> Message:
    calls = [{"id": call_id, "type": "function", "function": {"name": "f", "arguments": "{}"}} for call_id in ids]
    return said("assistant", tokens, None, tool_calls=calls)


def answers(tokens: int, call_id: str) -> Message:
    return said("tool", tokens, tool_call_id=call_id)


def told(message: Message) -> int:
    """The tokens that a message says it has; a summary has as many as its text has characters after the heading."""
    if "tokens" in message:
        return message["tokens"]
    return len(str(message["content"]).removeprefix(HEADING))


async def at_once(function: Callable[..., Any], *arguments: Any, **by_name: Any) -> Any:
    answer = function(*arguments, **by_name)
    return await answer if inspect.isawaitable(answer) else answer


def now(coroutine: Coroutine[Any, Any, T]) -> T:
    """What a coroutine returns that waits for nothing: no event loop is needed."""
    try:
        coroutine.send(None)
    except StopIteration as stop:
        return stop.value
    raise AssertionError("it waits for something")


class Conversation:
    """A transcript, the view of it, and what the view says."""

    def __init__(self, *messages: Message, limit: int = 100, count: Any = told, compact: Any = None) -> None:
        self.transcript = Transcript(messages)
        self.warnings: list[str] = []
        window = Window(limit=limit, count=count, compact=compact)
        self.view = WindowView(window, self.transcript, context=lambda: CONTEXT, warn=self.warnings.append)

    def add(self, *messages: Message) -> None:
        for message in messages:
            self.transcript.append(message)

    def fit(self, other_tokens: int = 0) -> tuple[list[int] | None, Message | None]:
        return now(self.view.fit(other_tokens, at_once))

    def kept(self, other_tokens: int = 0) -> list[int]:
        kept, _ = self.fit(other_tokens)
        return kept if kept is not None else list(range(len(self.transcript)))

    def request(self, kept: list[int] | None, summary: Message | None) -> list[Message]:
        """The messages as they go over the wire, checked by rules that are not the library's."""
        request = ModelRequest(model="m", system=SYSTEM, transcript=self.transcript, kept=kept, summary=summary)
        messages = json.loads(request.body())["messages"]
        assert messages == json.loads(encode(request.parameters()["messages"]))
        check_messages(messages)
        # What stands for messages that are left out may be a part of the one system message.
        prompt, *summaries = messages[0]["content"].split("\n\n")
        assert (messages[0]["role"], prompt) == ("system", SYSTEM)
        system = [{"role": "system", "content": text} for text in (prompt, *summaries)]
        return [*system, *messages[1:]]


# ---- what goes first


def test_a_conversation_that_fits_is_sent_whole() -> None:
    talk = Conversation(said("user", 40), said("assistant", 40), said("user", 20))

    assert talk.fit() == (None, None)


def test_the_oldest_turns_go_first_and_whole() -> None:
    talk = Conversation(
        said("user", 10),
        asks(10, "a", "b"),
        answers(10, "a"),
        answers(10, "b"),
        said("assistant", 10),
        said("user", 30),
        said("assistant", 30),
        said("user", 30),
    )

    assert talk.kept() == [5, 6, 7]
    assert talk.kept(50) == [7]


def test_no_more_goes_than_has_to() -> None:
    talk = Conversation(said("user", 60), said("user", 60), said("user", 40))

    assert talk.kept() == [1, 2]


def test_system_messages_at_the_start_stay_and_others_go_with_their_turn() -> None:
    talk = Conversation(
        said("system", 10),
        said("developer", 10),
        said("user", 30),
        said("system", 30),
        said("assistant", 30),
        said("user", 30),
    )

    assert talk.kept() == [0, 1, 5]


def test_with_the_older_turns_gone_the_groups_after_the_question_go_oldest_first() -> None:
    talk = Conversation(said("user", 30), said("assistant", 30), said("user", 10))
    talk.add(asks(10, "a", "b"), answers(10, "a"), answers(10, "b"), asks(10, "c"), answers(10, "c"))

    assert talk.kept(30) == [2, 3, 4, 5, 6, 7]
    assert talk.kept(50) == [2, 6, 7]


def test_the_question_stays_when_someone_else_speaks_as_the_user_later() -> None:
    talk = Conversation(said("user", 10), said("user", 10))
    talk.add(said("assistant", 40), said("user", 40), said("assistant", 30))

    assert talk.kept() == [1, 3, 4]
    assert talk.kept(60) == [1, 4]


def test_results_of_functions_as_they_used_to_be_stay_with_their_call() -> None:
    call = said("assistant", 40, None, function_call={"name": "f", "arguments": "{}"})
    talk = Conversation(said("user", 10), call, said("function", 40, name="f"), said("assistant", 40), said("user", 1))
    within = Conversation(said("user", 10))
    within.add(call, said("function", 40, name="f"), said("assistant", 40))

    assert talk.kept() == [4]
    assert within.kept() == [0, 3]


def test_what_was_left_out_stays_out_when_there_is_room_again() -> None:
    talk = Conversation(said("user", 40), said("user", 40))
    assert talk.kept(30) == [1]

    assert talk.kept(0) == [1]
    talk.add(said("assistant", 40))
    assert talk.kept(0) == [1, 2]


def test_messages_that_count_nothing_are_left_out_with_their_neighbours_only() -> None:
    talk = Conversation(said("user", 0), said("assistant", 0), said("user", 80), said("user", 30))

    assert talk.kept() == [3]


@pytest.mark.parametrize(("limit", "fits"), [(60, True), (59, False)])
def test_what_cannot_be_left_out_fits_or_the_run_ends(limit: int, fits: bool) -> None:
    talk = Conversation(
        said("system", 10),
        said("user", 50),
        said("user", 10),
        asks(10, "a"),
        answers(10, "a"),
        asks(10, "b"),
        answers(10, "b"),
        limit=limit,
    )
    if fits:
        assert talk.kept(20) == [0, 2, 5, 6]
        return
    with pytest.raises(errors.ContextWindowExceeded) as caught:
        talk.fit(20)
    assert (caught.value.needed, caught.value.limit) == (60, 59)
    assert talk.kept(0) == [0, 2, 5, 6], "a failed try changes nothing"


def test_an_exceeded_window_changes_nothing() -> None:
    talk = Conversation(said("user", 10), said("user", 10))
    with pytest.raises(errors.ContextWindowExceeded):
        talk.fit(95)

    assert talk.fit(0) == (None, None)


def test_a_transcript_without_a_question_still_keeps_its_newest_group() -> None:
    talk = Conversation(said("system", 10), said("assistant", 60), said("assistant", 60))

    kept, _ = talk.fit()
    assert kept == [0, 2]
    assert Conversation().fit() == (None, None)
    assert Conversation(said("system", 60), said("system", 40)).fit() == (None, None)
    with pytest.raises(errors.ContextWindowExceeded) as caught:
        Conversation(said("system", 60), said("system", 60)).fit()
    assert caught.value.needed == 120


# ---- any conversation, any window

Structure = tuple[list[Message], list[list[list[Message]]]]

odd_text = st.text() | st.sampled_from(["", "\ud800", "NUL \x00", "😀 ü 中", '"]}', "x" * 300])
odd_content = odd_text | st.just([parts.text("look"), parts.image(b"GIF89a.")]) | st.just([{"type": "odd"}])
tokens = st.integers(0, 12) | st.integers(0, 200)


@st.composite
def groups(draw: st.DrawFn) -> list[Message]:
    kind = draw(st.sampled_from(["text", "calls", "calls", "calls", "system", "refusal", "developer"]))
    if kind == "calls":
        ids = draw(st.lists(st.sampled_from("abcdef"), min_size=1, max_size=4, unique=True))
        return [asks(draw(tokens), *ids), *(answers(draw(tokens), call_id) for call_id in ids)]
    if kind == "refusal":
        return [said("assistant", draw(tokens), None, refusal="no")]
    return [said("assistant" if kind == "text" else kind, draw(tokens), draw(odd_content))]


@st.composite
def turns(draw: st.DrawFn) -> list[list[Message]]:
    question = said("user", draw(tokens), draw(odd_content))
    return [[question], *draw(st.lists(groups(), max_size=4))]


leading = st.lists(st.builds(said, st.sampled_from(["system", "developer"]), tokens), max_size=2)
conversations = st.tuples(leading, st.lists(turns(), min_size=1, max_size=5))


def flat(structure: list[Any]) -> list[Message]:
    return [message for item in structure for message in (flat(item) if isinstance(item, list) else [item])]


def ways(structure: Structure) -> list[list[Message]]:
    """What may be sent, from all of it to what has to stay; written down without a thought of how it is found."""
    head, conversation = structure
    *older, [question, *later] = conversation
    without_turns = [head + flat(older[gone:]) + question + flat(later) for gone in range(len(older) + 1)]
    without_groups = [head + question + flat(later[gone:]) for gone in range(1, len(later))]
    return without_turns + without_groups


@settings(deadline=None, max_examples=300)
@given(conversations, st.integers(1, 400), st.integers(0, 100))
def test_a_trimmed_request_is_valid_and_fits_and_keeps_what_it_must(
    structure: Structure, limit: int, other_tokens: int
) -> None:
    talk = Conversation(*flat([*structure]), limit=limit)
    may_be_sent = [way for way in ways(structure) if sum(map(told, way)) + other_tokens <= limit]
    if not may_be_sent:
        with pytest.raises(errors.ContextWindowExceeded) as caught:
            talk.fit(other_tokens)
        assert caught.value.needed == sum(map(told, ways(structure)[-1])) + other_tokens
        return
    kept, summary = talk.fit(other_tokens)

    sent = talk.request(kept, summary)[1:]
    assert sent == json.loads(encode(may_be_sent[0])), "the longest that fits"
    assert summary is None
    assert talk.transcript.messages == flat([*structure])


steps = st.lists(st.tuples(groups(), st.integers(0, 60)), max_size=8)


def wordy(length: int | None) -> Callable[[list[Message]], str | None]:
    return lambda messages: None if length is None else "s" * length


@settings(deadline=None, max_examples=300)
@given(conversations, steps, st.integers(1, 400), st.none() | st.sampled_from([0, 1, 20, 90, 300]), st.booleans())
def test_a_growing_conversation_is_valid_and_fits_at_every_request(
    structure: Structure, later: list[tuple[list[Message], int]], limit: int, length: int | None, has_hook: bool
) -> None:
    counted: list[Message] = []
    told_of: list[Message] = []

    def count(message: Message) -> int:
        counted.append(message)
        return told(message)

    def compact(messages: list[Message]) -> str | None:
        had_summary = bool(messages) and "tokens" not in messages[0]
        told_of.extend(messages[had_summary:])
        return wordy(length)(messages)

    head, conversation = structure
    question = conversation[-1][0][0]
    talk = Conversation(*flat([*structure]), limit=limit, count=count, compact=compact if has_hook else None)
    newest = conversation[-1][-1]
    for group, other_tokens in [([], 0), *later]:
        talk.add(*group)
        newest = group or newest
        must_stay = sum(map(told, head + (newest if newest[0] is question else [question, *newest]))) + other_tokens
        if must_stay > limit:
            with pytest.raises(errors.ContextWindowExceeded):
                talk.fit(other_tokens)
            continue
        kept, summary = talk.fit(other_tokens)
        sent = talk.request(kept, summary)[1:]
        assert sum(map(told, sent)) + other_tokens <= limit
        positions = range(len(talk.transcript)) if kept is None else kept
        kept_messages = [talk.transcript.messages[position] for position in positions]
        assert kept_messages[: len(head)] == head
        assert question in kept_messages
        assert kept_messages[-len(newest) :] == newest
        if has_hook:
            # Everything is either sent, or was shown to the function, once and in order.
            left_out = [i for i in range(len(talk.transcript)) if i not in {*positions}]
            assert told_of == json.loads(encode([talk.transcript.messages[i] for i in left_out]))
    counted_of_it = [message for message in counted if "tokens" in message]
    assert list(map(id, counted_of_it)) == list(map(id, talk.transcript.messages)), "each message is counted once"


# ---- counting


def test_a_request_that_fits_looks_at_the_new_messages_only() -> None:
    class Watched(Transcript):
        __slots__ = ("looked_at",)

        def since(self, position: int) -> list[Message]:
            found = super().since(position)
            self.looked_at.extend(found)
            return found

    transcript = Watched(said("user", 0) for _ in range(500))
    transcript.looked_at = []
    view = WindowView(Window(limit=10, count=told), transcript, context=object, warn=print)
    assert now(view.fit(0, at_once)) == (None, None)
    assert len(transcript.looked_at) == 500
    transcript.append(said("assistant", 1))

    assert now(view.fit(0, at_once)) == (None, None)
    assert transcript.looked_at[500:] == [said("assistant", 1)]


def test_leaving_out_little_by_little_costs_little_each_time() -> None:
    calls = 0
    original = WindowView._tokens_from

    def counted(view: WindowView, cut: int) -> int:
        nonlocal calls
        calls += 1
        return original(view, cut)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(WindowView, "_tokens_from", counted)
        talk = Conversation(said("user", 1), limit=1000)
        for _ in range(2000):
            talk.add(said("assistant", 1))
            kept = talk.kept()
    assert len(kept) == 1000
    assert calls < 2000 * (4 + math.log2(2000))


@pytest.mark.parametrize("nonsense", [-1, 1.5, "3", None, True, math.nan])
def test_a_counter_that_returns_nonsense_is_wrong_use(nonsense: Any) -> None:
    talk = Conversation(said("user", 1), count=lambda message: nonsense)

    with pytest.raises(InvalidArguments, match=f"counter returned {nonsense!r} for a user message: .* from 0 up"):
        talk.fit()


def test_a_counter_that_raises_ends_the_run_with_its_own_error_as_the_cause() -> None:
    def count(message: Message) -> int:
        return len(message["content"])

    talk = Conversation(said("user", 1), count=count)
    talk.add(asks(1, "a"), answers(1, "a"))

    for _ in range(2):  # asked again, it fails again
        with pytest.raises(UnexpectedError, match="counter failed on a assistant message: TypeError: ") as caught:
            talk.fit()
        assert isinstance(caught.value.__cause__, TypeError)


@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        ({"limit": 0}, "from 1 up"),
        ({"limit": -5}, "from 1 up"),
        ({"limit": 8000.0}, "whole number"),
        ({"limit": True}, "whole number"),
        ({"limit": "8000"}, "whole number"),
        ({"limit": None}, "whole number"),
        ({"count": 4}, "plain function"),
        ({"count": at_once}, "plain function"),
        ({"compact": "short"}, "a function of the messages left out"),
        ({"compact": lambda: "x"}, "a function of one value"),
        ({"compact": lambda a, b, c: "x"}, "a function of one value"),
        ({"compact": lambda messages, *, must: "x"}, "a function of one value"),
    ],
    ids=shown,
)
def test_settings_that_cannot_be_meant_are_wrong_use(wrong: dict[str, Any], words: str) -> None:
    with pytest.raises(InvalidArguments) as caught:
        Window(**({"limit": 100} | wrong))

    assert words in str(caught.value)


def test_text_is_estimated_by_its_length_and_media_by_a_fixed_amount() -> None:
    short, long = ({"role": "user", "content": "a" * length} for length in (40, 4040))
    assert count_tokens(long) - count_tokens(short) == 1000
    assert [count_tokens({"role": "user", "content": "a" * length}) for length in (0, 1, 4, 5)] == [7, 8, 8, 9]

    def of(*content: Any) -> int:
        return count_tokens({"role": "user", "content": list(content)})

    small, large = (parts.image(b"GIF89a" + b"x" * size) for size in (10, 100_000))
    assert of(small) == of(large)
    assert of(small, small) - of(small) == of(small) - of() > 500
    assert of(parts.text("a" * 4000)) > 1000
    assert of(small, parts.text("a" * 4000)) - of(small) > 1000
    assert of(parts.audio(b"ID3" + b"x" * 100_000)) < 1000
    assert of(parts.file(b"%PDF-" + b"x" * 100_000, "a.pdf")) < 3000
    assert of({"type": ["odd"]}, {}, "text", None) > of()
    assert large["image_url"]["url"].startswith("data:"), "the message itself is not changed"


def test_scripts_with_fewer_characters_to_a_token_count_more_for_each() -> None:
    latin, chinese = ({"role": "user", "content": letter * 1000} for letter in ("a", "中"))

    assert count_tokens(chinese) > 2.5 * count_tokens(latin)


def test_lone_surrogates_and_numbers_that_json_has_not_can_be_counted() -> None:
    assert count_tokens({"role": "user", "content": "\ud800", "odd": math.nan}) > 0


def test_tool_calls_and_unknown_fields_count() -> None:
    assert count_tokens(asks(1, "a", "b")) > count_tokens(asks(1, "a")) + 10
    assert count_tokens(said("user", 1, more="x" * 400)) > count_tokens(said("user", 1)) + 100


# ---- the rest of the request


def other_tokens(view: WindowView | None = None, **changes: Any) -> int:
    talk = Conversation(said("user", 1), count=count_tokens)
    request = ModelRequest(model="m", system=None, transcript=talk.transcript)
    return (view or talk.view).other_tokens(replace(request, **changes))


def test_everything_else_of_a_request_counts() -> None:
    schema = {"type": "function", "function": {"name": "f", "description": "d" * 4000}}
    nothing = other_tokens()

    assert nothing < 5
    assert other_tokens(system="s" * 4000) - nothing > 1000
    assert other_tokens(instruction="i" * 4000) - nothing > 1000
    assert other_tokens(tools=ToolSchemas([schema])) - nothing > 1000
    assert other_tokens(tools=ToolSchemas()) == nothing
    assert other_tokens(fields={"response_format": {"schema": "r" * 4000}}) - nothing > 1000
    assert other_tokens(settings=ModelSettings(extra={"response_format": "r" * 4000})) - nothing > 1000


@pytest.mark.parametrize(
    "settings_",
    [
        ModelSettings(max_tokens=5000),
        ModelSettings(extra={"max_completion_tokens": 5000}),
        ModelSettings(max_tokens=1, extra={"max_completion_tokens": 5000}),
    ],
    ids=str,
)
def test_room_for_the_reply_counts(settings_: ModelSettings) -> None:
    assert 5000 <= other_tokens(settings=settings_) < 5030


def test_the_system_prompt_is_counted_once() -> None:
    counted: list[str] = []

    def count(message: Message) -> int:
        counted.append(message["content"])
        return 7

    talk = Conversation(said("user", 1), count=count)
    for instruction in (None, None, "now", "now"):
        assert other_tokens(talk.view, system=SYSTEM, instruction=instruction) >= (14 if instruction else 7)
    assert counted == [SYSTEM, "now"]


# ---- summaries


class Summaries:
    """A `compact` function that notes what it was called with."""

    def __init__(self, *replies: Any) -> None:
        self.replies, self.calls = list(replies), []

    def __call__(self, messages: list[Message]) -> Any:
        self.calls: list[list[Message]]
        self.calls.append(messages)
        return self.replies.pop(0)


def long_talk(compact: Any, limit: int = 100) -> Conversation:
    """Ten turns of ten tokens, and a question of ten."""
    return Conversation(*(said("user", 10, str(i)) for i in range(11)), limit=limit, compact=compact)


def test_a_summary_stands_for_what_is_left_out_and_half_the_window_is_made_free() -> None:
    compact = Summaries("rain")
    talk = long_talk(compact)
    kept, summary = talk.fit()

    assert kept == [6, 7, 8, 9, 10]
    assert compact.calls == [talk.transcript.messages[:6]]
    assert summary == {"role": "system", "content": f"{HEADING}rain"}
    assert [message["content"] for message in talk.request(kept, summary)[:3]] == [SYSTEM, f"{HEADING}rain", "6"]
    assert talk.warnings == []


def test_a_function_is_not_called_where_everything_fits() -> None:
    compact = Summaries()
    talk = Conversation(said("user", 50), said("user", 50), compact=compact)

    assert talk.fit() == (None, None)
    assert compact.calls == []


def test_the_summary_counts_and_the_next_one_is_made_from_it_and_what_goes_then() -> None:
    compact = Summaries("s" * 30, "second")
    talk = long_talk(compact)
    first = talk.fit()[1]
    talk.add(said("assistant", 20))
    assert talk.fit() == ([6, 7, 8, 9, 10, 11], first), "50 + 30 + 20 fit"
    assert len(compact.calls) == 1
    talk.add(said("assistant", 1))
    kept, summary = talk.fit()

    assert kept == [9, 10, 11, 12]
    assert compact.calls[1] == [first, *talk.transcript.messages[6:9]]
    assert summary == {"role": "system", "content": f"{HEADING}second"}


def test_a_long_summary_has_room_made_for_it_when_the_conversation_grows() -> None:
    compact = Summaries("s" * 70, "s" * 70)
    talk = Conversation(said("user", 80), said("user", 20), compact=compact)
    talk.fit(1)
    talk.add(said("assistant", 5), said("assistant", 6), said("assistant", 5))
    kept, summary = talk.fit()

    assert kept == [1, 4]
    assert told(summary or {}) == 70
    assert len(compact.calls) == 2
    assert talk.warnings == []


def test_a_summary_that_does_not_fit_is_left_out_with_a_warning() -> None:
    compact = Summaries("s" * 51)
    talk = long_talk(compact)

    assert talk.fit() == ([6, 7, 8, 9, 10], None)
    assert len(talk.warnings) == 1
    assert "summary" in talk.warnings[0]
    assert talk.fit() == ([6, 7, 8, 9, 10], None)
    assert len(talk.warnings) == 1


def test_a_summary_for_which_there_is_no_room_any_more_is_left_out_with_a_warning() -> None:
    compact = Summaries("s" * 20)
    talk = Conversation(said("user", 90), said("user", 20), compact=compact)
    assert talk.fit()[1] is not None
    talk.add(said("assistant", 1))

    assert talk.fit(70) == ([1, 2], None)
    assert len(talk.warnings) == 1
    assert len(compact.calls) == 1, "there was nothing to call it with"
    assert talk.fit(0) == ([1, 2], None)


@pytest.mark.parametrize("nothing", [None, "", " \n"])
def test_nothing_may_stand_for_what_is_left_out(nothing: str | None) -> None:
    talk = long_talk(Summaries(nothing))

    assert talk.fit() == ([6, 7, 8, 9, 10], None)
    assert talk.warnings == []


@pytest.mark.parametrize(
    "message",
    [
        {"role": "system", "content": "rain"},
        {"role": "developer", "content": "rain"},
        {"role": "user", "content": "rain", "name": "archive"},
        {"role": "user", "content": [parts.text("rain")]},
    ],
    ids=str,
)
def test_a_message_may_stand_for_what_is_left_out(message: Message) -> None:
    talk = long_talk(Summaries(message))
    kept, summary = talk.fit()

    assert summary == message
    assert summary is not message
    assert talk.request(kept, summary)[1] == message


@pytest.mark.parametrize(
    "nonsense",
    [
        5,
        b"rain",
        ["rain"],
        {},
        {"role": "user"},
        {"role": "user", "content": ""},
        {"role": "user", "content": ["rain"]},
        {"role": "assistant", "content": "rain"},
        {"role": "tool", "content": "rain", "tool_call_id": "a"},
        {"role": ["user"], "content": "rain"},
        {"role": "user", "content": "rain", "tool_calls": []},
        "rain".split,
    ],
    ids=shown,
)
def test_a_function_that_returns_something_else_is_wrong_use(nonsense: Any) -> None:
    talk = long_talk(Summaries(nonsense))

    with pytest.raises(InvalidArguments, match=r"compact function returned .*: return text"):
        talk.fit()


def test_the_function_cannot_change_the_transcript() -> None:
    def compact(messages: list[Message]) -> str:
        for message in messages:
            message["content"][0]["text"] = "changed"
        messages.clear()
        return "rain"

    history = [said("user", 60, [parts.text("asked")]), said("user", 60)]
    talk = Conversation(*history, compact=compact)

    assert talk.kept() == [1]
    assert talk.transcript.messages == history
    assert talk.transcript.messages[0]["content"][0]["text"] == "asked"


def test_the_question_is_never_given_to_the_function() -> None:
    compact = Summaries("rain")
    talk = Conversation(said("user", 40), said("user", 10), compact=compact)
    talk.add(said("assistant", 40), said("assistant", 40))

    assert talk.kept() == [1, 3]
    assert compact.calls == [[talk.transcript.messages[0], talk.transcript.messages[2]]]


async def asks_for_context(messages: list[Message], context: object) -> str:
    return "with" if context is CONTEXT else "without"


def has_a_default(messages: list[Message], context: object = None) -> str:
    return "with" if context is not None else "without"


class Summariser:
    def method(self, messages: list[Message], context: object) -> str:
        return "with" if context is CONTEXT else "without"

    def __call__(self, messages: list[Message]) -> str:
        return "without"


def keyword_only(messages: list[Message], *, context: object = None) -> str:
    return "with" if context is not None else "without"


@pytest.mark.parametrize(
    ("compact", "expected"),
    [
        (asks_for_context, "with"),
        (Summariser().method, "with"),
        (functools.partial(asks_for_context), "with"),
        (has_a_default, "without"),
        (keyword_only, "without"),
        (Summariser(), "without"),
        (lambda *messages: "with" if len(messages) == 2 else "without", "without"),
        (functools.partial(asks_for_context, context=None), "without"),
        (functools.partial(has_a_default), "without"),
    ],
    ids=shown,
)
def test_a_second_parameter_that_needs_a_value_is_the_runs_context(compact: Any, expected: str) -> None:
    _, summary = long_talk(compact).fit()

    assert summary == {"role": "system", "content": HEADING + expected}


def test_the_function_is_called_by_whom_the_view_is_told() -> None:
    calls: list[tuple[Any, ...]] = []

    async def call(function: Callable[..., Any], *arguments: Any, **by_name: Any) -> str:
        calls.append((function, *arguments, *by_name.values()))
        return "called"

    talk = long_talk(has_a_default)
    _, summary = now(talk.view.fit(0, call))

    assert calls == [(has_a_default, talk.transcript.messages[:6])]
    assert summary == {"role": "system", "content": f"{HEADING}called"}


def test_a_function_that_raises_ends_the_run_and_leaves_the_view_as_it_was() -> None:
    def compact(messages: list[Message]) -> str:
        raise KeyError("gone")

    talk = long_talk(compact)
    with pytest.raises(UnexpectedError, match="compact function failed: KeyError: 'gone'") as caught:
        talk.fit()

    assert isinstance(caught.value.__cause__, KeyError)
    assert talk.fit(-10) == (None, None)


@pytest.mark.parametrize("error", [BudgetExceeded("requests", 1, 1), InvalidArguments("wrong")], ids=repr)
def test_an_error_of_the_library_passes_through_as_it_is(error: Exception) -> None:
    def compact(messages: list[Message]) -> str:
        raise error

    with pytest.raises(type(error)) as caught:
        long_talk(compact).fit()
    assert caught.value is error


async def test_the_function_is_awaited() -> None:
    called = anyio.Event()

    async def compact(messages: list[Message]) -> str:
        called.set()
        await anyio.lowlevel.checkpoint()
        return "rain"

    talk = long_talk(compact)
    with anyio.fail_after(5):
        _, summary = await talk.view.fit(0, at_once)

    assert called.is_set()
    assert summary == {"role": "system", "content": f"{HEADING}rain"}


async def test_cancellation_passes_through_the_function_and_leaves_the_view_as_it_was() -> None:
    cancelled: list[bool] = []

    async def waits(messages: list[Message]) -> str:
        scope.cancel()
        try:
            await anyio.sleep_forever()
        except anyio.get_cancelled_exc_class():
            cancelled.append(True)
            raise
        raise AssertionError

    replies: list[Callable[[list[Message]], Awaitable[str] | str]] = [waits, lambda messages: str(len(messages))]
    talk = long_talk(lambda messages: replies.pop(0)(messages))
    with anyio.fail_after(5):
        with anyio.CancelScope() as scope:
            await talk.view.fit(0, at_once)
        assert scope.cancelled_caught
        assert cancelled == [True]
        kept, summary = await talk.view.fit(0, at_once)

    assert kept == [6, 7, 8, 9, 10]
    assert summary == {"role": "system", "content": f"{HEADING}6"}
