"""Conversations in real runs: messages in and out, content parts, and windows on what has become too long to send."""

from __future__ import annotations

import asyncio
import base64
import json
import threading
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import anyio
import pytest
from pydantic import BaseModel

from fractal import (
    AgentResult,
    BaseAgent,
    ContextWindowExceeded,
    InvalidArguments,
    InvalidMessages,
    LimitHit,
    Limits,
    ModelRequested,
    RunContext,
    UnexpectedError,
    WarningRaised,
    count_tokens,
    parts,
    sync,
    tool,
)
from fractal.models.openai import OpenAIModel
from fractal.testing import Endpoint, answers, check_messages
from fractal.testing.answers import AnswerLike
from tests.streams import Watch, assert_well_formed
from tests.support import assert_continuable, in_thread, outcomes, shown
from tests.without_uvloop import anyio_backend  # noqa: F401

StartEndpoint = Callable[..., Endpoint]
Message = dict[str, Any]

WAYS = ("run", "stream", "sync.run", "sync.stream")

PNG = b"\x89PNG\r\n\x1a\n" + bytes(range(256)) * 4
WAV = b"RIFF\x24\x00\x00\x00WAVEfmt " + bytes(64)
PDF = b"%PDF-1.7\n" + bytes(range(256))


@pytest.fixture(autouse=True, scope="module")
def _http_is_imported() -> None:
    """The first request of a process imports the HTTP library, which would take the time of a test."""
    with Endpoint("ok") as one:
        model = OpenAIModel(base_url=one.url, api_key="sk-test")
        sync.run(BaseAgent("A", "a", client=model), "go").raise_for_error()


async def start(way: str, agent: BaseAgent, asked: Any, **options: Any) -> AgentResult:
    """One run, started in one of the ways there are; streams are read to their end."""
    match way:
        case "run":
            return await agent.run(asked, **options)
        case "stream":
            async with agent.stream(asked, **options) as stream:
                assert_well_formed([event async for event in stream])
                return await stream.result()
        case "sync.run":
            return await in_thread(lambda: sync.run(agent, asked, **options))
        case _:

            def drain() -> AgentResult:
                with sync.stream(agent, asked, **options) as stream:
                    assert_well_formed(list(stream))
                    return stream.result()

            return await in_thread(drain)


def sent(endpoint: Endpoint, number: int = -1) -> list[Message]:
    """The messages of a request, without the system prompt; what stands after it there is a message of its own."""
    first, *messages = endpoint.requests[number].body["messages"]
    prompt, *summary = first["content"].split("\n\n")
    assert (first["role"], prompt) == ("system", "You talk.")
    return [*({"role": "system", "content": text} for text in summary), *messages]


def roomy(tokens: int) -> int:
    """A window with so many tokens besides what is kept free for the reply."""
    window = tokens * 4 // 3
    assert window - window // 4 == tokens
    return window


def talker(**options: Any) -> BaseAgent:
    return BaseAgent("Talker", "You talk.", **options)


def words(role: str, number: int, text: str = "word") -> Message:
    return {"role": role, "content": " ".join([text] * number)}


def turns(number: int, length: int = 10) -> list[Message]:
    """A history of so many turns, each with a name of its own in both messages."""
    return [words(role, length, f"t{turn}") for turn in range(number) for role in ("user", "assistant")]


# ---- in and out


@pytest.mark.parametrize("way", WAYS)
async def test_a_conversation_goes_on_over_json_and_over_the_wire(way: str, endpoint: StartEndpoint):
    def play(request: Any) -> AnswerLike:
        number = len(one.requests)
        if number % 2:
            calls = [answers.call("look", {"n": number}, id=f"a{number}"), answers.call("fail", {}, id=f"b{number}")]
            return answers.calls(*calls, text="Let me look. 🔎" if number % 4 == 1 else None)
        return f"Answer {number} — «é» \u2028"

    def fail() -> None:
        raise ValueError("no")

    one = endpoint(play)
    agent = talker().add_tool(lambda n: {"seen": n}, name="look").add_tool(fail)
    stored = "[]"
    for turn in range(4):
        history = json.loads(stored)
        result = await start(way, agent, f"Question {turn}", messages=history)
        assert result.success
        assert result.metadata["messages"] == result.messages
        assert result.messages[: len(history)] == history
        assert sent(one, 2 * turn) == [*history, {"role": "user", "content": f"Question {turn}"}]
        assert sent(one, 2 * turn + 1) == result.messages[:-1]
        assert AgentResult.model_validate_json(result.model_dump_json()).messages == result.messages
        stored = json.dumps(result.messages)
    roles = [message["role"] for message in json.loads(stored)]
    assert roles == ["user", "assistant", "tool", "tool", "assistant"] * 4


HISTORY: list[Message] = [
    {"role": "system", "content": "Talk like a pirate.", "name": "captain"},
    {"role": "developer", "content": [{"type": "text", "text": "Be brief."}]},
    {"role": "user", "content": [{"type": "text", "text": "Hi 👋"}, parts.image(PNG, detail="low")], "name": "ada"},
    {
        "role": "assistant",
        "content": None,
        "refusal": None,
        "reasoning_content": "hm",
        "tool_calls": [
            {"id": "c1", "type": "function", "function": {"name": "look", "arguments": '{"n":  1}'}, "index": 0},
            {"id": "c2", "type": "function", "function": {"name": "gone", "arguments": "{broken"}},
        ],
    },
    {"role": "tool", "tool_call_id": "c1", "content": [{"type": "text", "text": "1"}], "name": "look"},
    {"role": "tool", "tool_call_id": "c2", "content": ""},
    {"role": "assistant", "content": "", "refusal": "No."},
    {"role": "user", "content": "x\u2028\u0000 😀"},
    {"role": "assistant", "content": "ok", "annotations": [], "audio": {"id": "a1"}, "x": {"y": [1.5, None, True]}},
]


@pytest.mark.parametrize("way", WAYS)
async def test_a_history_from_somewhere_else_arrives_unchanged(way: str, endpoint: StartEndpoint):
    one = endpoint("aye")
    as_it_was = json.loads(json.dumps(HISTORY))
    result = await start(way, talker(), "Go on", messages=tuple(HISTORY))
    assert as_it_was == HISTORY
    # But for arguments that no endpoint can read.
    as_it_was[3]["tool_calls"][1]["function"]["arguments"] = '{"invalid_arguments":"{broken"}'
    assert sent(one)[:-1] == as_it_was
    assert result.messages[:-2] == as_it_was


async def test_a_run_leaves_the_history_it_was_given_alone(endpoint: StartEndpoint):
    endpoint("fine")
    history = turns(2)
    as_it_was = json.loads(json.dumps(history))
    first = await talker().run("a", messages=history)
    second = await talker().run("b", messages=first.messages)
    assert history == as_it_was
    assert len(first.messages) == 6
    assert len(second.messages) == 8


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize(
    ("history", "fault"),
    [
        ([{"role": "assistant", "tool_calls": []}], r"messages\[0\]"),
        ([words("user", 1), {"role": "tool", "tool_call_id": "c1", "content": "x"}], r"messages\[1\].*nobody made"),
        ([words("user", 1), {"role": "robot", "content": "x"}], r"messages\[1\].*robot"),
        ([HISTORY[2], HISTORY[3], HISTORY[4]], r"messages\[2\].*'c2' has no result"),
        (["hi"], r"messages\[0\]"),
    ],
    ids=["nothing said", "no call", "role", "open call", "text"],
)
async def test_a_history_that_no_endpoint_takes_is_refused_at_once(
    way: str, history: Any, fault: str, endpoint: StartEndpoint
):
    one = endpoint("ok")
    with pytest.raises(InvalidMessages, match=fault):
        await start(way, talker(), "go", messages=history)
    assert one.requests == []


async def hang() -> None:
    await anyio.sleep_forever()


def reply_with(*calls: str) -> AnswerLike:
    return answers.calls(*[answers.call(name, {}, id=f"c{number}") for number, name in enumerate(calls)])


ENDINGS: dict[str, tuple[Any, dict[str, Any], str]] = {
    "deadline": (reply_with("hang", "quick", "unknown"), {"timeout": 0.2}, "deadline"),
    "tool calls spent": (reply_with("quick", "quick"), {"limits": Limits(max_tool_calls=1)}, "budget"),
    "requests spent": (reply_with("quick"), {"limits": Limits(max_requests=1)}, "budget"),
    "iterations": (reply_with("quick"), {"max_iterations": 1}, "max_iterations"),
    "refusal": (answers.refusal("no"), {}, "refusal"),
    "nothing": (answers.empty(), {"max_retries": 1}, "no_content"),
    "invalid output": ("text", {"output_type": int, "max_retries": 1}, "invalid_output"),
    "terminated": (reply_with("stop", "quick"), {}, "terminated"),
    "a tool that must not fail": (reply_with("fatal", "quick"), {}, "tool_error"),
    "model error": (answers.failure(401), {}, "model_error"),
    "context window": (reply_with("long", "quick"), {}, "context_window"),
}


@pytest.mark.parametrize("name", ENDINGS)
async def test_however_a_run_ends_the_conversation_can_go_on(name: str, endpoint: StartEndpoint):
    answer, options, stop_reason = ENDINGS[name]

    @tool(on_error="raise")
    def fatal() -> None:
        raise ValueError("no")

    endpoint(lambda _: answer)
    agent = talker(context_window=1000 if name == "context window" else None)
    agent.add_tool(hang).add_tool(fatal).add_tool(lambda: "done", name="quick")
    agent.add_tool(lambda: "word " * 5000, name="long").add_tool(lambda: 1, name="stop", terminate=True)
    result = await agent.run("go", messages=turns(1), **options)
    assert result.stop_reason == stop_reason
    assert_continuable(result)
    assert result.messages[:3] == [*turns(1), {"role": "user", "content": "go"}]

    one = endpoint("of course")
    again = await talker().run("Go on?", messages=json.loads(json.dumps(result.messages)))
    assert again.content == "of course"
    assert sent(one)[:-1] == result.messages


@pytest.mark.parametrize("where", ["text", "tool"])
async def test_a_stream_that_is_left_can_go_on(where: str, endpoint: StartEndpoint):
    endpoint([reply_with("hang", "quick")] if where == "tool" else [answers.text("word " * 50, chunk_delay=0.02)])
    agent = talker().add_tool(hang).add_tool(lambda: "done", name="quick")
    async with agent.stream("go") as stream:
        async for event in stream:
            if event.kind == ("tool_started" if where == "tool" else "text_delta"):
                break
    result = await stream.result()
    assert result.stop_reason == "cancelled"
    assert_continuable(result)
    endpoint("of course")
    assert (await talker().run("Go on?", messages=result.messages)).content == "of course"


class Question(BaseModel):
    text: str
    tags: list[str] = []


@pytest.mark.parametrize(
    ("asked", "content"),
    [
        ("Hi", "Hi"),
        ({"q": [1, None, "é"]}, '{"q":[1,null,"é"]}'),
        (["a", "b"], '["a","b"]'),
        ([{"q": 1}], '[{"q":1}]'),
        (Question(text="Why?"), '{"text":"Why?","tags":[]}'),
        (5, "5"),
        (
            ["What is this?", parts.image("https://example.org/cat.png")],
            [
                {"type": "text", "text": "What is this?"},
                {"type": "image_url", "image_url": {"url": "https://example.org/cat.png"}},
            ],
        ),
    ],
    ids=repr,
)
@pytest.mark.parametrize("way", WAYS)
async def test_a_turn_is_text_parts_or_json(way: str, asked: Any, content: Any, endpoint: StartEndpoint):
    one = endpoint("ok")
    result = await start(way, talker(), asked)
    assert sent(one) == [{"role": "user", "content": content}]
    assert result.messages[0] == {"role": "user", "content": content}


# ---- content parts


def encoded(data: bytes) -> str:
    return base64.b64encode(data).decode()


PARTS: dict[str, tuple[Callable[[Path], Any], Any]] = {
    "text": (lambda folder: parts.text("Hi"), {"type": "text", "text": "Hi"}),
    "image by URL": (
        lambda folder: parts.image("https://example.org/cat.png", detail="high"),
        {"type": "image_url", "image_url": {"url": "https://example.org/cat.png", "detail": "high"}},
    ),
    "image of bytes": (
        lambda folder: parts.image(PNG),
        {"type": "image_url", "image_url": {"url": f"data:image/png;base64,{encoded(PNG)}"}},
    ),
    "image on disk": (
        lambda folder: parts.image(folder / "cat.png"),
        {"type": "image_url", "image_url": {"url": f"data:image/png;base64,{encoded(PNG)}"}},
    ),
    "audio of bytes": (
        lambda folder: parts.audio(WAV),
        {"type": "input_audio", "input_audio": {"data": encoded(WAV), "format": "wav"}},
    ),
    "audio on disk": (
        lambda folder: parts.audio(folder / "talk.wav", "flac"),
        {"type": "input_audio", "input_audio": {"data": encoded(WAV), "format": "flac"}},
    ),
    "file by id": (lambda folder: parts.file("file-abc123"), {"type": "file", "file": {"file_id": "file-abc123"}}),
    "file of bytes": (
        lambda folder: parts.file(PDF, "r.pdf"),
        {"type": "file", "file": {"filename": "r.pdf", "file_data": f"data:application/pdf;base64,{encoded(PDF)}"}},
    ),
    "file on disk": (
        lambda folder: parts.file(folder / "report.pdf"),
        {
            "type": "file",
            "file": {"filename": "report.pdf", "file_data": f"data:application/pdf;base64,{encoded(PDF)}"},
        },
    ),
}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for name, data in (("cat.png", PNG), ("talk.wav", WAV), ("report.pdf", PDF)):
        (tmp_path / name).write_bytes(data)
    return tmp_path


@pytest.mark.parametrize("name", PARTS)
async def test_a_part_arrives_as_it_was_made(name: str, folder: Path, endpoint: StartEndpoint):
    make, wire_form = PARTS[name]
    one = endpoint("seen")
    result = await talker().run(["Look:", make(folder)])
    content = [{"type": "text", "text": "Look:"}, wire_form]
    assert sent(one) == [{"role": "user", "content": content}]
    stored = json.loads(result.model_dump_json())["messages"]
    assert stored[0]["content"] == content
    await talker().run("And again?", messages=stored)
    assert sent(one)[0]["content"] == content


@pytest.mark.parametrize("way", WAYS)
async def test_all_parts_of_one_turn_arrive_in_their_order(way: str, folder: Path, endpoint: StartEndpoint):
    one = endpoint("seen")
    made = [make(folder) for make, _ in PARTS.values()]
    await start(way, talker(), made)
    assert sent(one)[0]["content"] == [wire_form for _, wire_form in PARTS.values()]


async def test_parts_go_through_delegation(endpoint: StartEndpoint):
    def play(request: Any) -> AnswerLike:
        if request.body["messages"][0]["content"] == "You talk.":
            return "a cat"
        return "done" if request.body["messages"][-1]["role"] == "tool" else answers.call("ask", {})

    one = endpoint(play)
    boss = BaseAgent("Boss", "You ask.")

    async def ask() -> Any:
        return (await boss.call_agent(talker(), ["What is this?", parts.image(PNG)])).content

    assert (await boss.add_tool(ask).run("go")).content == "done"
    assert sent(one, 1)[0]["content"][1] == PARTS["image of bytes"][1]


# ---- windows


def by_words(message: Mapping[str, Any]) -> int:
    """A counter of our own: the words of a message, and of what it calls."""
    text = message.get("content") or ""
    return len(str(text).split()) + sum(
        len(call["function"]["arguments"].split()) + 1 for call in message.get("tool_calls") or ()
    )


def tokens_of(body: Mapping[str, Any], count: Callable[[Any], int]) -> int:
    """What a request takes of the window: counted anew from what has arrived."""
    around = {name: value for name, value in body.items() if name not in ("model", "messages", "tools")}
    around = {name: value for name, value in around.items() if not name.startswith("stream")}
    tools = json.dumps(body["tools"], separators=(",", ":"), ensure_ascii=False) if "tools" in body else ""
    encoded_fields = json.dumps(around, separators=(",", ":"), ensure_ascii=False)
    in_bytes = -(-len(tools.encode()) // 4) + -(-len(encoded_fields.encode()) // 4)
    return sum(map(count, body["messages"])) + in_bytes + body.get("max_tokens", 0)


def assert_fits(endpoint: Endpoint, window: int, count: Callable[[Any], int]) -> None:
    for request in endpoint.requests:
        check_messages(request.body["messages"])
        assert tokens_of(request.body, count) <= window


@pytest.mark.parametrize("count", [count_tokens, by_words])
@pytest.mark.parametrize("way", WAYS)
async def test_each_request_of_a_long_run_is_valid_and_fits(
    way: str, count: Callable[[Any], int], endpoint: StartEndpoint
):
    window = 700 if count is count_tokens else 400
    sizes = [3, 40, 0, 17, 60, 5, 25, 1, 50, 8, 33, 2]

    def play(request: Any) -> AnswerLike:
        number = len(one.requests) - 1
        if number == len(sizes):
            return "done"
        calls = [
            answers.call("look", {"size": sizes[number], "name": f"n{number}"}, id=f"c{number}-{n}")
            for n in range(number % 3 + 1)
        ]
        return answers.calls(*calls, text="thinking " * (number % 4) or None)

    def look(size: int, name: str) -> str:
        return f"{name} " * size or "-"

    one = endpoint(play)
    agent = talker(context_window=window, count_tokens=count, max_tokens=50).add_tool(look)
    result = await start(way, agent, "Look at all.", messages=turns(12), max_iterations=20)
    assert (result.content, len(one.requests)) == ("done", len(sizes) + 1)
    assert_fits(one, window, count)
    asked = {"role": "user", "content": "Look at all."}
    calls = sum(number % 3 + 1 for number in range(len(sizes)))
    assert len(result.messages) == 24 + 1 + len(sizes) + calls + 1
    assert result.messages[:25] == [*turns(12), asked]
    assert_continuable(result)
    for number in range(len(one.requests)):
        messages = sent(one, number)
        assert asked in messages
        newest = [message for message in messages if message.get("tool_call_id", "").startswith(f"c{number - 1}-")]
        assert len(newest) == ((number - 1) % 3 + 1 if number else 0), "the newest group is whole"
        assert is_subsequence(messages, result.messages)
    assert any(len(sent(one, number)) < 25 + number for number in range(len(one.requests)))


def is_subsequence(some: Sequence[Message], all_of_them: Sequence[Message]) -> bool:
    remaining = iter(all_of_them)
    return all(message in remaining for message in some)


async def test_the_oldest_turns_go_first_and_no_more_than_must(endpoint: StartEndpoint):
    one = endpoint("ok")
    window = 2 + 1 + 1 + 5 * 20  # prompt, the empty fields, question, five turns
    result = await talker(context_window=roomy(window), count_tokens=by_words).run("go", messages=turns(9))
    assert sent(one) == [*turns(9)[8:], {"role": "user", "content": "go"}]
    assert result.messages[:-2] == turns(9)
    await talker(context_window=roomy(window - 1), count_tokens=by_words).run("go", messages=turns(9))
    assert sent(one) == [*turns(9)[10:], {"role": "user", "content": "go"}]


async def test_system_messages_at_the_start_of_a_history_stay(endpoint: StartEndpoint):
    one = endpoint("ok")
    head = [{"role": "system", "content": "be kind"}, {"role": "developer", "content": "be brief"}]
    await talker(context_window=40, count_tokens=by_words).run("go", messages=[*head, *turns(5)])
    assert sent(one) == [*head, *turns(5)[8:], {"role": "user", "content": "go"}]


async def test_a_window_keeps_room_for_the_reply_and_for_tools(endpoint: StartEndpoint):
    one = endpoint("ok")
    window = 200
    for options in ({}, {"max_tokens": 100}, {"extra_body": {"max_completion_tokens": 100}}):
        given = roomy(window) if not options else window
        await talker(context_window=given, count_tokens=by_words, **options).run("go", messages=turns(9))
    with_tools = talker(context_window=roomy(window), count_tokens=by_words).add_tool(lambda city: city, name="look")
    await with_tools.run("go", messages=turns(9))
    assert_fits(one, window, by_words)
    lengths = [len(request.body["messages"]) for request in one.requests]
    assert lengths == [20, 10, 10, 16]


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("window", [40, 400, 4000, 9000])
async def test_room_is_kept_for_a_reply_of_unknown_length(window: int, way: str, endpoint: StartEndpoint):
    one = endpoint("ok")
    for compact in (None, lambda messages: "short"):
        result = await start(
            way, talker(context_window=window, count_tokens=by_words, compact=compact), "go", messages=turns(700)
        )
        assert result.success
        used = sum(map(by_words, one.requests[-1].body["messages"]))
        assert window - used >= min(4096, window // 4)


async def test_what_has_to_stay_may_take_the_room_of_the_reply(endpoint: StartEndpoint):
    one = endpoint("ok")
    result = await talker(context_window=100, count_tokens=by_words).run("word " * 90, messages=turns(2))
    assert (result.success, len(sent(one)), result.warnings) == (True, 1, [])
    refused = await talker(context_window=100, count_tokens=by_words).run("word " * 100)
    assert isinstance(refused.exception, ContextWindowExceeded)


async def test_pictures_count_a_fixed_amount(endpoint: StartEndpoint):
    one = endpoint("ok")
    picture = parts.image(PNG * 50)
    history = [{"role": "user", "content": [picture]}, words("assistant", 3)] * 3
    await talker(context_window=roomy(1700)).run("go", messages=history)
    assert len(sent(one)) == 5
    assert_fits(one, 1700, count_tokens)


@pytest.mark.parametrize("own", [None, 60])
async def test_the_window_may_come_from_the_environment(
    own: int | None, endpoint: StartEndpoint, monkeypatch: pytest.MonkeyPatch
):
    one = endpoint("ok")
    monkeypatch.setenv("CONTEXT_WINDOW", f" {roomy(100)} ")
    agent = talker(context_window=own, count_tokens=by_words)
    monkeypatch.setenv("CONTEXT_WINDOW", "1")
    await agent.run("go", messages=turns(9))
    assert len(sent(one)) == (9 if own is None else 5)


@pytest.mark.parametrize("value", ["-5", "8k", "1e5", "8000.0"])
def test_a_window_in_the_environment_that_is_no_number_is_told_at_once(value: str, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("CONTEXT_WINDOW", value)
    with pytest.raises(InvalidArguments, match=r"(?i)context.window"):
        talker()


@pytest.mark.parametrize("value", ["", " ", "0", "00"])
def test_an_empty_window_in_the_environment_is_none(value: str, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("CONTEXT_WINDOW", value)
    assert talker().context_window is None


@pytest.mark.parametrize(
    "options",
    [
        {"context_window": 0},
        {"context_window": "8000"},
        {"context_window": True},
        {"context_window": 99, "count_tokens": 5},
        {"context_window": 99, "compact": "short"},
        {"context_window": 99, "compact": lambda: "short"},
        {"count_tokens": 5},
        {"compact": "short"},
    ],
    ids=shown,
)
def test_a_window_that_cannot_be_meant_is_told_at_once(options: dict[str, Any]):
    with pytest.raises(InvalidArguments):
        talker(**options)


async def test_one_agent_keeps_the_windows_of_its_runs_apart(endpoint: StartEndpoint):
    one = endpoint(lambda request: f"{len(request.body['messages'])}")
    agent = talker(context_window=60, count_tokens=by_words)
    results: dict[int, AgentResult] = {}

    async def go(number: int) -> None:
        results[number] = await agent.run(f"q{number}", messages=turns(number))

    async with anyio.create_task_group() as group:
        for number in range(8):
            group.start_soon(go, number)
    for number, result in results.items():
        assert result.content == str(2 + 2 * min(number, 2))
        assert len(result.messages) == 2 * number + 2
    assert_fits(one, 60, by_words)


async def test_a_delegate_has_a_window_of_its_own(endpoint: StartEndpoint):
    def play(request: Any) -> AnswerLike:
        messages = request.body["messages"]
        if messages[0]["content"] == "You talk.":
            tools = sum(message["role"] == "tool" for message in messages)
            return answers.call("look", {}, id=f"c{len(one.requests)}") if len(one.requests) < 8 else f"{tools} kept"
        return "done" if messages[-1]["role"] == "tool" else answers.call("delegate_to_talker", {"query": "go"})

    one = endpoint(play)
    child = talker(context_window=80, count_tokens=by_words).add_tool(lambda: "seen " * 20, name="look")
    result = await BaseAgent("Boss", "You ask.").register_delegate(child).run("go")
    assert result.content == "done"
    assert result.tool_results[0].content == "1 kept"


async def test_an_object_that_is_asked_for_again_keeps_the_question(endpoint: StartEndpoint):
    one = endpoint(lambda _: "word " * 30 if len(one.requests) < 6 else '{"result": 5}')
    agent = talker(context_window=150, count_tokens=by_words, output_type=int)
    result = await agent.run("How many?", messages=turns(3), max_retries=9)
    assert result.content == 5
    assert_fits(one, 150, by_words)
    for number in range(6):
        assert {"role": "user", "content": "How many?"} in sent(one, number)
    assert "not accepted" in sent(one)[-1]["content"]
    assert len(sent(one)) < len(result.messages) - 1


async def test_an_event_says_how_many_messages_were_sent(endpoint: StartEndpoint):
    one = endpoint("ok")
    watch = Watch()
    agent = talker(context_window=60, count_tokens=by_words, observers=[watch], compact=lambda messages: "short")
    await agent.run("go", messages=turns(9))
    [requested] = [event for event in watch if isinstance(event, ModelRequested)]
    assert requested.message_count == len(one.requests[0].body["messages"]) - 1


# ---- what does not fit


@pytest.mark.parametrize("way", WAYS)
async def test_a_question_that_does_not_fit_is_a_result(way: str, endpoint: StartEndpoint):
    one = endpoint([])
    watch = Watch()
    agent = talker(context_window=50, count_tokens=by_words, observers=[watch])
    result = await start(way, agent, "word " * 100, messages=turns(2))
    assert (result.success, result.stop_reason) == (False, "context_window")
    assert result.metadata["reason"] == "context_window_exceeded"
    error = result.exception
    assert isinstance(error, ContextWindowExceeded)
    assert (error.needed, error.limit) == (103, 50)
    assert "context window of 50" in str(error)
    assert [event.limit for event in watch if isinstance(event, LimitHit)] == ["context_window"]
    assert (one.requests, result.usage.requests) == ([], 0)
    assert len(result.messages) == 5
    assert_continuable(result)
    with pytest.raises(ContextWindowExceeded):
        result.raise_for_error()


@pytest.mark.parametrize("way", WAYS)
async def test_a_tools_result_that_does_not_fit_ends_the_run(way: str, endpoint: StartEndpoint):
    one = endpoint([reply_with("long", "short")])
    watch = Watch()
    agent = talker(context_window=200, count_tokens=by_words, observers=[watch])
    agent.add_tool(lambda: "word " * 300, name="long").add_tool(lambda: "ok", name="short")
    result = await start(way, agent, "go", messages=turns(2))
    assert (result.stop_reason, outcomes(result), len(one.requests)) == ("context_window", ["ok", "ok"], 1)
    assert watch.kinds[-2:] == ["limit_hit", "run_finished"]
    assert_continuable(result)


async def test_a_prompt_that_does_not_fit_is_a_result(endpoint: StartEndpoint):
    one = endpoint([])
    result = await BaseAgent("A", "word " * 100, context_window=50, count_tokens=by_words).run("go")
    assert (result.stop_reason, one.requests) == ("context_window", [])


# ---- counters


async def test_each_message_is_counted_once(endpoint: StartEndpoint):
    counted: list[str] = []

    def count(message: Message) -> int:
        counted.append(json.dumps(message))
        return by_words(message)

    endpoint([reply_with("look"), reply_with("look"), "done"])
    agent = talker(context_window=90, count_tokens=count).add_tool(lambda: "seen", name="look")
    result = await agent.run("go", messages=turns(3))
    assert result.content == "done"
    expected = [{"role": "system", "content": "You talk."}, *result.messages[:-1]]
    assert sorted(counted) == sorted(map(json.dumps, expected))


@pytest.mark.parametrize("way", ["run", "stream"])
async def test_a_counter_that_fails_is_an_unexpected_error(way: str, endpoint: StartEndpoint):
    one = endpoint([])

    def count(message: Message) -> int:
        raise KeyError("x")

    result = await start(way, talker(context_window=90, count_tokens=count), "go")
    assert (result.stop_reason, one.requests) == ("error", [])
    assert "the token counter failed" in str(result.error)
    assert isinstance(result.exception.__cause__, KeyError)


@pytest.mark.parametrize("answer", [None, -1, 1.5, "3", True])
async def test_a_counter_that_gives_no_number_is_wrong_use(answer: Any, endpoint: StartEndpoint):
    one = endpoint([])
    with pytest.raises(InvalidArguments, match="token counter returned"):
        await talker(context_window=90, count_tokens=lambda message: answer).run("go")
    assert one.requests == []


# ---- summaries


SUMMARY = {"role": "system", "content": "Summary of the earlier conversation: short"}


def compacting(compact: Any, **options: Any) -> BaseAgent:
    return talker(**{"context_window": roomy(100), "count_tokens": by_words, "compact": compact, **options})


@pytest.mark.parametrize("is_async", [True, False], ids=["async", "plain"])
@pytest.mark.parametrize("way", WAYS)
async def test_a_summary_stands_for_what_is_left_out(way: str, is_async: bool, endpoint: StartEndpoint):
    one = endpoint("ok")
    seen: list[list[Message]] = []
    threads: list[threading.Thread] = []

    def plain(messages: list[Message]) -> str:
        seen.append(messages)
        threads.append(threading.current_thread())
        return "short"

    async def awaited(messages: list[Message]) -> str:
        await anyio.sleep(0)
        return plain(messages)

    result = await start(way, compacting(awaited if is_async else plain), "go", messages=turns(9))
    question = {"role": "user", "content": "go"}
    assert sent(one) == [SUMMARY, *turns(9)[14:], question]
    assert seen == [turns(9)[:14]]
    assert result.messages == [*turns(9), question, {"role": "assistant", "content": "ok"}]
    assert_fits(one, 100, by_words)
    if way in ("run", "stream"):
        assert (threading.current_thread() in threads) is is_async


async def test_what_fits_needs_no_summary(endpoint: StartEndpoint):
    one = endpoint("ok")
    calls: list[Any] = []
    await compacting(calls.append).run("go", messages=turns(4))
    assert (calls, len(sent(one))) == ([], 9)


async def test_a_context_shows_the_run(endpoint: StartEndpoint):
    endpoint("ok")
    seen: list[Any] = []

    def plain(messages: list[Message], ctx: RunContext[str]) -> str:
        seen.append((ctx.deps, ctx.depth, ctx.tool_name, len(ctx.messages), 0 < ctx.remaining() <= 60))
        ctx.check_cancelled()
        return "short"

    async def awaited(ctx: RunContext[str], function: list[Message]) -> str:
        return plain(function, ctx)

    for compact in (plain, awaited):
        await compacting(compact).run("go", messages=turns(9), deps="Ada", timeout=60)
    assert seen == [("Ada", 0, None, 19, True)] * 2


async def test_a_summary_is_handed_on_to_the_next(endpoint: StartEndpoint):
    one = endpoint(lambda _: reply_with("look") if len(one.requests) < 20 else "done")
    seen: list[list[Message]] = []

    def compact(messages: list[Message]) -> str:
        seen.append(messages)
        return f"number {len(seen)}"

    agent = compacting(compact, context_window=150).add_tool(lambda: "seen " * 10, name="look")
    result = await agent.run("go", messages=turns(9), max_iterations=30)
    assert result.content == "done"
    assert_fits(one, 150, by_words)
    assert 1 < len(seen) < 10, "it is not called at every request"
    for number, messages in enumerate(seen[1:], 1):
        assert messages[0]["content"] == f"Summary of the earlier conversation: number {number}"
    said = [message for messages in seen for message in messages if not str(message["content"]).startswith("Summary")]
    assert is_subsequence(said, result.messages), "each message is summed up once"
    assert {"role": "user", "content": "go"} not in said
    assert all({"role": "user", "content": "go"} in sent(one, n) for n in range(len(one.requests)))
    assert sent(one)[0]["content"] == f"Summary of the earlier conversation: number {len(seen)}"
    assert len(result.messages) == 18 + 1 + 2 * 19 + 1


@pytest.mark.parametrize(
    ("answer", "stands_for_them"),
    [
        ("short", [SUMMARY]),
        ("", []),
        ("  ", []),
        (None, []),
        ({"role": "user", "content": "Before: short"}, [{"role": "user", "content": "Before: short"}]),
        (
            {"role": "developer", "content": [{"type": "text", "text": "short"}]},
            [{"role": "developer", "content": [{"type": "text", "text": "short"}]}],
        ),
    ],
    ids=repr,
)
async def test_a_summary_is_text_a_message_or_nothing(
    answer: Any, stands_for_them: list[Message], endpoint: StartEndpoint
):
    one = endpoint("ok")
    await compacting(lambda messages: answer).run("go", messages=turns(9))
    assert sent(one) == [*stands_for_them, *turns(9)[14:], {"role": "user", "content": "go"}]
    check_messages(one.requests[0].body["messages"])


@pytest.mark.parametrize(
    "answer",
    [5, ["short"], {"content": "x"}, {"role": "assistant", "content": "x"}, {"role": "user", "content": ""}, object()],
)
@pytest.mark.parametrize("way", ["run", "stream"])
async def test_a_summary_of_another_kind_is_wrong_use(way: str, answer: Any, endpoint: StartEndpoint):
    one = endpoint([])
    with pytest.raises(InvalidArguments, match="compact function returned"):
        await start(way, compacting(lambda messages: answer), "go", messages=turns(9))
    assert one.requests == []


async def test_a_summary_that_is_too_long_is_left_out_with_a_warning(endpoint: StartEndpoint):
    one = endpoint("ok")
    watch = Watch()
    result = await compacting(lambda messages: "word " * 200, observers=[watch]).run("go", messages=turns(9))
    assert sent(one) == [*turns(9)[14:], {"role": "user", "content": "go"}]
    [warning] = result.warnings
    assert "does not fit" in warning
    assert [event.message for event in watch if isinstance(event, WarningRaised)] == [warning]
    assert_fits(one, 100, by_words)


async def test_what_a_summary_function_does_to_messages_reaches_nobody(endpoint: StartEndpoint):
    endpoint("ok")

    def vandal(messages: list[Message]) -> str:
        for message in messages:
            message["content"] = "gone"
        messages.clear()
        return "short"

    result = await compacting(vandal).run("go", messages=turns(9))
    assert result.messages[:-2] == turns(9)


async def fail() -> None:
    raise KeyError("x")


async def raise_in_group(messages: list[Message]) -> str:
    async with anyio.create_task_group() as group:
        group.start_soon(fail)
    return ""


async def raise_asynchronously(messages: list[Message]) -> str:
    raise KeyError("x")


def raise_plainly(messages: list[Message]) -> str:
    raise KeyError("x")


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("compact", [raise_plainly, raise_asynchronously, raise_in_group])
async def test_a_summary_that_fails_is_an_unexpected_error(way: str, compact: Any, endpoint: StartEndpoint):
    one = endpoint([])
    result = await start(way, compacting(compact), "go", messages=turns(9))
    assert (result.stop_reason, one.requests) == ("error", [])
    assert result.error == "the compact function failed: KeyError: 'x'"
    assert isinstance(result.exception, UnexpectedError)
    assert isinstance(result.exception.__cause__, KeyError)
    assert_continuable(result)


@pytest.mark.parametrize("how", ["run", "stream", "call_agent", "sync.run", "sync.stream"])
async def test_a_summary_may_be_written_by_another_agent(how: str, endpoint: StartEndpoint):
    def play(request: Any) -> AnswerLike:
        return "short" if request.body["messages"][0]["content"] == "You sum up." else "ok"

    one = endpoint(play)
    editor = BaseAgent("Editor", "You sum up.")
    watch = Watch()

    async def by_run(messages: list[Message]) -> Any:
        return (await editor.run(messages)).content

    async def by_stream(messages: list[Message]) -> str:
        async with editor.stream(messages) as stream:
            return "".join([text async for text in stream.text()])

    async def by_call(messages: list[Message], ctx: RunContext) -> Any:
        return (await ctx.agent.call_agent(editor, messages)).content

    def by_sync(messages: list[Message]) -> Any:
        return sync.run(editor, messages).content

    def by_sync_stream(messages: list[Message]) -> str:
        with sync.stream(editor, messages) as stream:
            return "".join(stream.text())

    ways: dict[str, Any] = {
        "run": by_run,
        "stream": by_stream,
        "call_agent": by_call,
        "sync.run": by_sync,
        "sync.stream": by_sync_stream,
    }
    agent = compacting(ways[how], observers=[watch])
    async with agent.stream("go", messages=turns(9), limits=Limits(max_requests=2), timeout=30) as stream:
        shown = [text async for text in stream.text()]
        result = await stream.result()
    assert (result.content, shown) == ("ok", ["ok"]), "what the other one writes is not the answer's"
    assert sent(one, 1)[0] == SUMMARY
    assert (len(one.requests), result.usage.requests) == (2, 2)
    assert_well_formed(watch)
    [child] = [event for event in watch if event.kind == "run_started" and event.agent_name == "Editor"]
    assert (child.parent_id, child.call_id) == (result.run_id, None)


async def test_what_the_summary_of_a_delegate_starts_is_begun_by_no_call_above_it(endpoint: StartEndpoint):
    def play(request: Any) -> AnswerLike:
        messages = request.body["messages"]
        if messages[0]["content"] == "You sum up.":
            return "short"
        if messages[0]["content"] == "You talk.":
            return answers.call("look", {}) if len(one.requests) < 4 else "ok"
        return "done" if messages[-1]["role"] == "tool" else answers.call("delegate_to_talker", {"query": "go"}, id="d")

    one = endpoint(play)
    editor = BaseAgent("Editor", "You sum up.")
    watch = Watch()

    async def compact(messages: list[Message]) -> Any:
        return (await editor.run(messages)).content

    child = compacting(compact, context_window=150).add_tool(lambda: "seen " * 60, name="look")
    boss = BaseAgent("Boss", "You ask.", observers=[watch]).register_delegate(child)
    assert (await boss.run("go")).content == "done"
    assert_well_formed(watch)
    started = [event for event in watch if event.kind == "run_started"]
    assert [(event.agent_name, event.call_id) for event in started] == [
        ("Boss", None),
        ("Talker", "d"),
        ("Editor", None),
    ]


async def test_a_summary_by_an_agent_spends_the_runs_budget(endpoint: StartEndpoint):
    one = endpoint("short")
    editor = BaseAgent("Editor", "You sum up.")

    async def compact(messages: list[Message]) -> Any:
        return (await editor.run(messages)).content

    result = await compacting(compact).run("go", messages=turns(9), limits=Limits(max_requests=1))
    assert (result.stop_reason, len(one.requests)) == ("budget", 1)


@pytest.mark.parametrize("is_async", [True, False], ids=["async", "plain"])
@pytest.mark.parametrize("cut", ["timeout", "scope", "native"])
async def test_a_summary_is_cut_with_its_run(
    cut: str, is_async: bool, endpoint: StartEndpoint, anyio_backend_name: str
):
    if cut == "native" and anyio_backend_name != "asyncio":
        pytest.skip("asyncio's own")
    one = endpoint([])
    asked, released = threading.Event(), threading.Event()
    watch = Watch()

    async def awaited(messages: list[Message]) -> str:
        asked.set()
        await anyio.sleep_forever()
        return ""

    def plain(messages: list[Message]) -> str:
        asked.set()
        released.wait(10)
        return ""

    agent = compacting(awaited if is_async else plain, observers=[watch])
    try:
        with anyio.fail_after(5):
            if cut == "timeout":
                await agent.run("go", messages=turns(9), timeout=0.25)
            elif cut == "native":
                with pytest.raises(TimeoutError):
                    await asyncio.wait_for(agent.run("go", messages=turns(9)), 0.25)
            else:
                async with anyio.create_task_group() as group:
                    group.start_soon(lambda: agent.run("go", messages=turns(9)))
                    await in_thread(asked.wait, 5)
                    group.cancel_scope.cancel()
    finally:
        released.set()
    [result] = watch.results("Talker")
    assert asked.is_set()
    assert result.stop_reason == ("deadline" if cut == "timeout" else "cancelled")
    assert one.requests == []
    assert result.messages == [*turns(9), {"role": "user", "content": "go"}]
    assert ["plain could not be stopped" in warning for warning in result.warnings] == [True] * (not is_async)


async def test_a_summary_that_asks_for_too_long_is_cut_with_its_agent(endpoint: StartEndpoint):
    one = endpoint([answers.hang()])
    editor = BaseAgent("Editor", "You sum up.")
    with anyio.fail_after(5):
        result = await compacting(lambda messages: sync.run(editor, messages).content).run(
            "go", messages=turns(9), timeout=0.4
        )
    assert result.stop_reason == "deadline"
    await in_thread(one.wait_for_disconnects, 1)


async def test_when_the_summary_of_one_run_fails_the_next_run_begins_anew(endpoint: StartEndpoint):
    one = endpoint("ok")
    is_broken = True

    def compact(messages: list[Message]) -> str:
        if is_broken:
            raise KeyError("x")
        return "short"

    agent = compacting(compact)
    assert (await agent.run("go", messages=turns(9))).stop_reason == "error"
    is_broken = False
    assert (await agent.run("go", messages=turns(9))).content == "ok"
    assert sent(one)[0] == SUMMARY


# ---- streamed


async def test_a_streamed_run_with_a_window_is_the_same_run(endpoint: StartEndpoint):
    def play(request: Any) -> AnswerLike:
        return reply_with("look", "look") if len(one.requests) < 8 else "That is all there is."

    bodies: dict[str, list[Any]] = {}
    results: dict[str, AgentResult] = {}
    for way in WAYS:
        one = endpoint(play)
        agent = compacting(lambda messages: f"{len(messages)} messages", context_window=200)
        agent.add_tool(lambda: "seen " * 12, name="look")
        results[way] = await start(way, agent, "go", messages=turns(9))
        bodies[way] = [request.body["messages"] for request in one.requests]
        assert_fits(one, 200, by_words)
    assert results["run"].content == "That is all there is."
    for way in WAYS:
        assert bodies[way] == bodies["run"]
        assert results[way].messages == results["run"].messages


@pytest.mark.parametrize("buffer", [0, 64])
async def test_text_is_streamed_while_the_window_trims(buffer: int, endpoint: StartEndpoint):
    one = endpoint([reply_with("look"), "one two three"])
    agent = talker(context_window=60, count_tokens=by_words).add_tool(lambda: "seen " * 10, name="look")
    async with agent.stream("go", messages=turns(9), buffer=buffer) as stream:
        assert [text async for text in stream.text()] == ["one ", "two ", "three"]
        result = await stream.result()
    assert len(result.messages) == 18 + 4
    assert_fits(one, 60, by_words)
