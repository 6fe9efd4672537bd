"""When an answer is whole, half, a stream, a page or an error: told by what it says, whatever its headers say."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import anyio
import openai
import pytest

from fractal import (
    AuthenticationFailed,
    BadReply,
    BaseAgent,
    ContentFiltered,
    FallbackModel,
    ModelError,
    NoContent,
    OpenAIModel,
    RaceModel,
    RateLimited,
    ReasoningDelta,
    ReplyBounds,
    ReplyTooLarge,
    ServerError,
    StatusError,
    TextDelta,
)
from fractal.testing import Endpoint, answers
from fractal.testing.answers import Answer
from tests.wires import DOUBLES, HTTP, as_answer, ask, call, chunk, completion, events
from tests.without_uvloop import anyio_backend  # noqa: F401

WAYS = ["run", "stream"]
HALF = "The capital of It"


def look(city: str = "Rome") -> str:
    return "sunny"


def sse(*payloads: Any, done: bool = True, kind: str = "text/event-stream", **more: Any) -> Answer:
    return answers.raw(events(*payloads, done=done), content_type=kind, **more)


def body(value: Any, kind: str = "application/json") -> Answer:
    return answers.raw(value if isinstance(value, str) else json.dumps(value), content_type=kind)


async def answered(
    answer: Answer | Callable[..., Answer],
    way: str = "run",
    *,
    model: Any = None,
    wire: str = "own HTTP",
    **run: Any,
) -> Any:
    """How a run ends that is answered so, and how many requests it took."""
    with Endpoint(answer) as endpoint:
        client = HTTP[wire](endpoint.url) if model is None else model(base_url=endpoint.url, api_key="any")
        agent = BaseAgent("A", "You help.", "m", client).add_tool(look)
        run = {"max_retries": 0, "timeout": 20, **run}
        if way == "run":
            return await agent.run("go", **run), len(endpoint.requests)
        async with agent.stream("go", **run) as stream:
            async for _ in stream:
                pass
        return await stream.result(), len(endpoint.requests)


# ---- finish reasons


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("wire", [*HTTP, *DOUBLES])
@pytest.mark.parametrize("reason", ["error", "network_error", "abort", "insufficient_system_resource"])
async def test_an_answer_that_broke_off_is_an_error_that_can_be_tried_again(reason: str, wire: str, way: str):
    asked = await ask(wire, way, lambda body, number: {"content": HALF, "finish": reason})
    error = asked.result.exception
    assert (type(error), error.retryable, reason in str(error)) == (ModelError, True, True)


@pytest.mark.usefixtures("brief_pauses")
@pytest.mark.parametrize("wire", ["own HTTP", "objects"])
async def test_before_anything_was_shown_it_is_tried_again(wire: str):
    def play(body: dict[str, Any], number: int) -> Any:
        return {"content": HALF, "finish": "error"} if number == 1 else {"content": "Rome"}

    asked = await ask(wire, "run", play, run={"max_retries": 1})
    assert (asked.result.content, len(asked.bodies)) == ("Rome", 2)


@pytest.mark.parametrize("way", WAYS)
async def test_an_error_beside_the_choice_has_its_status_and_words(way: str):
    choice = {"index": 0, "finish_reason": "error", "error": {"code": 502, "message": "upstream died"}}
    whole = {"choices": [{**choice, "message": {"content": HALF}}]}
    streamed = sse(chunk({"content": HALF}), {"choices": [{**choice, "delta": {}}]})
    result, _ = await answered(body(whole) if way == "run" else streamed, way)
    assert isinstance(result.exception, ServerError)
    assert (result.exception.status, "upstream died" in str(result.error)) == (502, True)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("reason", ["content_filter", "SAFETY", "sensitive"])
async def test_a_filter_in_the_middle_of_an_answer_makes_it_a_refusal(reason: str, way: str):
    asked = await ask("own HTTP", way, lambda body, number: {"content": HALF, "finish": reason})
    assert (asked.result.success, asked.result.stop_reason) == (False, "refusal")
    assert asked.result.messages[-1] == {"role": "assistant", "content": HALF}


@pytest.mark.parametrize("way", WAYS)
async def test_a_call_that_a_filter_has_cut_is_not_made(way: str):
    said = {"tool_calls": [call("look")], "finish": "content_filter"}
    asked = await ask("own HTTP", way, lambda body, number: said, tools=[look])
    assert (asked.result.stop_reason, asked.result.tool_results) == ("refusal", [])


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("reason", ["eos", "end_turn", "STOP", "stop_sequence", "function_call"])
async def test_usual_words_for_a_normal_end_are_no_reason_to_warn(reason: str, way: str):
    asked = await ask("own HTTP", way, lambda body, number: {"content": "Rome", "finish": reason})
    assert asked.result.success
    assert asked.result.warnings == [] or reason == "function_call"


@pytest.mark.parametrize("way", WAYS)
async def test_a_word_that_nobody_knows_is_a_warning(way: str):
    asked = await ask("own HTTP", way, lambda body, number: {"content": "Rome", "finish": "tired"})
    assert asked.result.content == "Rome"
    [warning] = asked.result.warnings
    assert "'tired'" in warning


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("reason", ["length", "max_tokens", "MAX_TOKENS", "model_length"])
async def test_an_answer_cut_at_the_token_limit_is_a_warning_and_none_at_all_is_not_asked_for_again(
    reason: str, way: str
):
    asked = await ask("own HTTP", way, lambda body, number: {"content": HALF, "finish": reason})
    assert (asked.result.content, "max_tokens" in asked.result.warnings[0]) == (HALF, True)

    said = {"content": "", "reasoning_content": "hm " * 50, "finish": reason}
    asked = await ask("own HTTP", way, lambda body, number: said, run={"max_retries": 3})
    assert len(asked.bodies) == 1
    assert isinstance(asked.result.exception, NoContent)
    assert asked.result.exception.is_cut
    assert "reasoning_effort" in str(asked.result.error)


@pytest.mark.parametrize("way", WAYS)
async def test_the_model_and_the_user_are_told_of_a_call_that_was_cut(way: str):
    def play(body: dict[str, Any], number: int) -> Any:
        if body["messages"][-1]["role"] == "tool":
            return {"content": body["messages"][-1]["content"]}
        return {"tool_calls": [call("look", '{"city": "Ro')], "finish": "length"}

    asked = await ask("own HTTP", way, play, tools=[look])
    assert "token limit" in str(asked.result.content)
    assert any("max_tokens" in warning for warning in asked.result.warnings)


@pytest.mark.parametrize("way", WAYS)
async def test_a_call_that_was_whole_before_the_cut_is_made(way: str):
    def play(body: dict[str, Any], number: int) -> Any:
        is_done = body["messages"][-1]["role"] == "tool"
        return {"content": "Done."} if is_done else {"tool_calls": [call("look")], "finish": "length"}

    asked = await ask("own HTTP", way, play, tools=[look])
    assert [result.content for result in asked.result.tool_results] == ["sunny"]


# ---- choices


CALLING = ["tool_calls", "TOOL_CALLS", "tool_use", "function_call"]


def in_two_choices(request: Any, word: str) -> Answer:
    """The text of a model in one choice, its calls in the next."""
    if request.body["messages"][-1]["role"] == "tool":
        return answers.text("It is sunny.")
    messages = [{"content": "Let me look."}, {"tool_calls": [call("look")]}]
    if not request.body.get("stream"):
        choices = [{"index": n, "finish_reason": word, "message": each} for n, each in enumerate(messages)]
        return body({"choices": choices})
    messages[1]["tool_calls"][0]["index"] = 0
    pieces = [{"choices": [{"index": n, "delta": each}]} for n, each in enumerate(messages)]
    ends = [{"choices": [{"index": n, "delta": {}, "finish_reason": word}]} for n in (0, 1)]
    return sse(*pieces, *ends)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("word", CALLING)
async def test_calls_in_another_choice_are_found(word: str, way: str):
    result, _ = await answered(partial(in_two_choices, word=word), way)
    assert (result.content, [one.outcome for one in result.tool_results]) == ("It is sunny.", ["ok"])
    assert result.messages[1]["content"] == "Let me look."


async def test_calls_of_another_choice_are_not_mixed_with_those_of_the_first():
    choices = [
        {"index": 0, "finish_reason": "stop", "message": {"content": "a"}},
        {"index": 1, "finish_reason": "tool_calls", "message": {"tool_calls": [call("look")]}},
    ]
    result, _ = await answered(body({"choices": choices}))
    assert (result.content, result.tool_results) == ("a", [])


@pytest.mark.parametrize("word", CALLING)
async def test_promised_calls_that_are_nowhere_are_asked_for_once_more_and_then_warned_of(word: str):
    for way, requests in (("run", 2), ("stream", 1)):
        said = {"content": "Let me look.", "finish": word}
        asked = await ask("own HTTP", way, lambda body, number, said=said: said, tools=[look])
        assert (asked.result.content, len(asked.bodies)) == ("Let me look.", requests)
        assert "sent no call" in asked.result.warnings[0]

    def play(body: dict[str, Any], number: int) -> Any:
        return {"content": "Let me look.", "finish": word} if number == 1 else {"content": "Sunny."}

    asked = await ask("own HTTP", "run", play, tools=[look], run={"max_iterations": 1})
    assert (asked.result.content, asked.result.warnings) == ("Sunny.", [])
    assert len(asked.result.messages) == 2


@pytest.mark.parametrize("way", WAYS)
async def test_the_only_choice_is_the_answer_whatever_its_number(way: str):
    whole = {"choices": [{"index": 3, "message": {"content": "Rome"}, "finish_reason": "stop"}]}
    streamed = [{"choices": [{"index": 3, "delta": {"content": piece}}]} for piece in ("Ro", "me")]
    ends = {"choices": [{"index": 3, "delta": {}, "finish_reason": "stop"}]}
    result, _ = await answered(body(whole) if way == "run" else sse(*streamed, ends), way)
    assert result.content == "Rome"


async def test_of_several_choices_the_one_with_number_0_is_the_answer_and_is_shown():
    def choices(*pieces: tuple[int, str]) -> list[Any]:
        return [{"choices": [{"index": n, "delta": {"content": text}}]} for n, text in pieces]

    ends = [{"choices": [{"index": n, "delta": {}, "finish_reason": "stop"}]} for n in (1, 0)]
    with Endpoint(sse(*choices((1, "b"), (0, "a"), (1, "b"), (0, "a")), *ends)) as endpoint:
        agent = BaseAgent("A", "a", client=OpenAIModel(base_url=endpoint.url, api_key="any"))
        async with agent.stream("go") as stream:
            shown = "".join([event.text async for event in stream if isinstance(event, TextDelta)])
        assert (shown, (await stream.result()).content) == ("aa", "aa")


# ---- errors where endpoints put them


REPORTED: dict[str, tuple[Any, type[ModelError], int | None, int]] = {
    "a number": ({"error": {"message": "no", "code": 400}}, StatusError, 400, 1),
    "a number as text": ({"error": {"message": "no", "code": "401"}}, AuthenticationFailed, 401, 1),
    "a status": ({"error": {"message": "slow", "status": 429}}, RateLimited, 429, 2),
    "a word": ({"error": {"message": "slow", "type": "rate_limit_error"}}, RateLimited, 429, 2),
    "a quota": ({"error": {"message": "pay", "code": "insufficient_quota"}}, RateLimited, 429, 1),
    "a word of Google's": ({"error": {"message": "no", "status": "INVALID_ARGUMENT"}}, StatusError, 400, 1),
    "a word in capitals": ({"error": {"message": "slow", "code": "RateLimitExceeded"}}, RateLimited, 429, 2),
    "a phrase": ({"error": {"message": "slow", "code": "429 Too Many Requests"}}, RateLimited, 429, 2),
    "a gateway's status": ({"statusCode": 400.0, "message": "no"}, StatusError, 400, 1),
    "beside the error": ({"error": "no", "code": 403}, AuthenticationFailed, 403, 1),
    "in a list": ([{"error": {"message": "no", "code": 400}}], StatusError, 400, 1),
    "no error object": ({"object": "error", "message": "no", "code": 404}, StatusError, 404, 1),
    "Anthropic's": ({"type": "error", "error": {"type": "overloaded_error", "message": "busy"}}, ServerError, 529, 2),
    "MiniMax's": ({"base_resp": {"status_code": 401, "status_msg": "no"}}, AuthenticationFailed, 401, 1),
    "Cloudflare's": ({"success": False, "errors": [{"code": 7003, "message": "no route"}]}, ModelError, None, 2),
    "only a text": ({"error": "something"}, ModelError, None, 2),
    "filtered": ({"error": {"message": "no", "code": "content_filter"}}, ContentFiltered, 400, 1),
}


@pytest.mark.usefixtures("brief_pauses")
@pytest.mark.parametrize("where", ["whole", "whole, streamed", "first event", "event: error", "error:"])
@pytest.mark.parametrize("name", REPORTED)
async def test_an_error_with_status_200_is_that_of_the_same_http_status(name: str, where: str):
    value, kind, status, requests = REPORTED[name]
    text = json.dumps(value)
    written = {
        "whole": body(text),
        "whole, streamed": body(text),
        "first event": sse(value),
        "event: error": sse(f"event: error\ndata: {text}\n\n"),
        "error:": sse(f"error: {text}\n\n"),
    }
    result, asked = await answered(written[where], "run" if where == "whole" else "stream", max_retries=1)
    assert (type(result.exception), result.exception.status) == (kind, status)
    # A refusal may be one of the usage at the end of a stream.
    extra = where != "whole" and kind is StatusError
    assert asked == requests + extra


@pytest.mark.parametrize("error", [None, {}, "", {"code": 0, "message": ""}])
@pytest.mark.parametrize("way", WAYS)
async def test_an_empty_error_beside_an_answer_is_none(error: Any, way: str):
    whole = {**completion({"content": "Rome"}, "stop"), "error": error}
    streamed = sse(chunk({"content": "Ro"}, error=error), chunk({"content": "me"}, "stop", error=error))
    result, _ = await answered(body(whole) if way == "run" else streamed, way)
    assert result.content == "Rome"


# ---- what kind of answer it is


CHUNKS = [chunk({"content": "Hello "}), chunk({"content": "world"}), chunk({}, "stop")]
WHOLE = completion({"content": "Hello world"}, "stop")


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("kind", ["application/json", "Application/JSON", "text/plain", "text/event-stream", "x/y", ""])
@pytest.mark.parametrize(
    "text",
    [
        events(*CHUNKS),
        "\ufeff" + events(*CHUNKS),
        "\n\n" + events(*CHUNKS),
        "\n" + " " * 2000 + events(*CHUNKS),
        ": hello\n\nevent: message\n" + events(*CHUNKS),
        json.dumps(WHOLE),
        "\ufeff \n" + json.dumps(WHOLE),
        json.dumps(WHOLE, indent=1),
    ],
    ids=["stream", "stream, BOM", "stream, blank", "padding", "stream, comment", "whole", "whole, BOM", "indented"],
)
async def test_an_answer_is_read_for_what_it_is_whatever_it_is_labelled(text: str, kind: str, way: str):
    result, requests = await answered(body(text, kind), way)
    assert (result.content, requests) == ("Hello world", 1)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("kind", ["text/html", "Text/HTML; charset=x", "application/json", "text/event-stream"])
async def test_a_page_is_not_asked_for_again_and_hints_at_the_base_url(kind: str, way: str):
    result, requests = await answered(body("<!doctype html><title>Hi</title>", kind), way, max_retries=3)
    assert (type(result.exception), requests) == (BadReply, 1)
    assert "base URL" in str(result.error)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("wire", HTTP)
async def test_a_404_of_something_else_hints_at_v1_and_one_that_names_the_model_does_not(wire: str, way: str):
    unknown_model = {"error": {"message": "no", "code": "model_not_found"}}
    for said, hint in (({"detail": "Not Found"}, True), (unknown_model, False)):
        answer = answers.raw(json.dumps(said), status=404, content_type="application/json")
        result, _ = await answered(answer, way, wire=wire)
        assert ("/v1" in str(result.error)) is hint


BODIES_OF_ERRORS: dict[str, Any] = {
    "an error": {"error": {"message": "no", "type": "t", "code": "c", "param": "p"}},
    "facts beside it": {"error": {"message": "no"}, "code": "c", "param": "p", "retry_after": 7, "status": 429},
    "a text": {"error": "no", "code": "c"},
    "a text that is JSON": {"error": {"message": '{"error": {"message": "no", "code": "c"}}'}},
    "nothing": {"error": None, "message": "no"},
    "a list": [{"error": {"message": "no", "code": 400, "details": [{"retryDelay": "7s"}]}}],
    "no error": {"message": "no", "detail": [{"msg": "that"}]},
    "no object": "no",
    "a page": "<html><title>no</title></html>",
}


@pytest.mark.parametrize("name", BODIES_OF_ERRORS)
@pytest.mark.parametrize("way", WAYS)
async def test_an_error_is_the_same_for_every_client(way: str, name: str):
    said = BODIES_OF_ERRORS[name]
    text = said if name == "a page" else json.dumps(said)

    async def seen(wire: str) -> Any:
        answer = answers.raw(text, status=400, content_type="text/html" if name == "a page" else "application/json")
        result, requests = await answered(answer, way, wire=wire)
        error: Any = result.exception
        assert "no" in str(error) or name == "no error"
        facts = (error.status, error.code, error.param, error.retry_after, error.retryable)
        return type(error), str(error), facts, requests

    first, *others = [await seen(wire) for wire in HTTP]
    assert others == [first] * 2


@pytest.mark.parametrize("text", ["", " \r\n\n"])
@pytest.mark.parametrize("kind", ["text/event-stream", "application/json"])
@pytest.mark.parametrize("way", WAYS)
async def test_an_answer_of_nothing_is_called_that_and_can_be_tried_again(way: str, kind: str, text: str):
    result, _ = await answered(answers.raw(text, content_type=kind), way)
    assert isinstance(result.exception, BadReply)
    assert (str(result.exception), result.exception.retryable) == ("the endpoint answered 200 with an empty body", True)


# ---- the end of a stream


@pytest.mark.parametrize("usage", [True, False])
async def test_after_the_finish_reason_the_end_is_not_waited_for(usage: bool):
    tokens = [{"choices": [], "usage": {"prompt_tokens": 1, "completion_tokens": 2}}] if usage else []
    text = events(*CHUNKS, *tokens, done=False).encode()
    release = anyio.Event()

    async def serve(stream: Any) -> None:
        async with stream:
            await stream.receive()
            await stream.send(b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\n\r\n" + text)
            await release.wait()

    listener = await anyio.create_tcp_listener(local_host="127.0.0.1")
    port = listener.extra(anyio.abc.SocketAttribute.local_port)
    async with listener, anyio.create_task_group() as group:
        group.start_soon(listener.serve, serve)
        agent = BaseAgent("A", "a", client=OpenAIModel(base_url=f"http://127.0.0.1:{port}/v1", api_key="any"))
        started = time.perf_counter()
        async with agent.stream("go", timeout=15) as stream:
            result = await stream.result()
        assert (result.content, result.usage.output_tokens) == ("Hello world", 2 if usage else 0)
        assert time.perf_counter() - started < 10
        release.set()
        group.cancel_scope.cancel()


async def test_a_stream_that_ends_with_the_last_word_alone_is_an_answer_with_a_warning():
    result, _ = await answered(sse(chunk({"content": "Rome"})), "stream")
    assert (result.content, "unsaid" in result.warnings[0]) == ("Rome", True)


# ---- usage


USAGE = {"prompt_tokens": 100, "completion_tokens": 7}
TOLD: dict[str, list[Any]] = {
    "at the end": [chunk({"content": "a"}, "stop"), {"choices": [], "usage": USAGE}],
    "in the last chunk": [chunk({"content": "a"}, "stop", usage=USAGE)],
    "Groq": [chunk({"content": "a"}, "stop", x_groq={"id": "x", "usage": USAGE})],
    "Moonshot": [{"choices": [{"index": 0, "delta": {"content": "a"}, "finish_reason": "stop", "usage": USAGE}]}],
    "in halves": [
        chunk({"content": "a"}, usage={"prompt_tokens": 100}),
        chunk({}, "stop", usage={"prompt_tokens": 0, "completion_tokens": 7}),
    ],
    "growing": [
        chunk({"content": "a"}, usage={"prompt_tokens": 100, "completion_tokens": 1}),
        chunk({}, "stop", usage={"prompt_tokens": 100, "completion_tokens": 7}),
    ],
    "as fractions": [chunk({"content": "a"}, "stop", usage={"prompt_tokens": 100.0, "completion_tokens": 7.0})],
    "other names": [chunk({"content": "a"}, "stop", usage={"input_tokens": 100, "output_tokens": 7})],
    "both names": [chunk({"content": "a"}, "stop", usage={**USAGE, "input_tokens": 100, "output_tokens": 7})],
}


@pytest.mark.parametrize("name", TOLD)
async def test_tokens_are_found_wherever_they_are_told(name: str):
    result, _ = await answered(sse(*TOLD[name]), "stream")
    assert (result.usage.input_tokens, result.usage.output_tokens) == (100, 7)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize(
    "count", [-1, -(10**9), 2**63 + 1, 10**4000, True, "7", None, [7], float("nan"), float("inf"), 1e300], ids=repr
)
async def test_what_can_be_no_number_of_tokens_is_none(count: Any, way: str):
    usage = {"prompt_tokens": count, "completion_tokens": 7}
    whole = body({**completion({"content": "a"}, "stop"), "usage": usage})
    result, _ = await answered(whole if way == "run" else sse(*CHUNKS[:1], chunk({}, "stop", usage=usage)), way)
    assert (result.usage.input_tokens, result.usage.output_tokens) == (0, 7)
    repr(result)
    result.model_dump_json()


@pytest.mark.parametrize("way", WAYS)
async def test_a_number_without_end_is_no_reason_to_lose_the_answer(way: str):
    text = json.dumps(completion({"content": "a"}, "stop")).replace('"created": 0', '"created": ' + "9" * 10_000)
    streamed = events(*CHUNKS).replace('"created": 0', '"created": ' + "9" * 10_000)
    result, _ = await answered(body(text if way == "run" else streamed), way)
    assert result.success


# ---- bounds


@pytest.mark.parametrize("way", WAYS)
async def test_words_that_are_remembered_are_kept_in_a_length_that_names_have(way: str):
    long = "x" * 100_000

    def play(body: dict[str, Any], number: int) -> Any:
        said = {"tool_calls": [call(long)]} if number == 1 else {"content": "Rome"}
        return {**said, "finish": long}

    asked = await ask("own HTTP", way, play, tools=[look])
    assert asked.result.content == "Rome"
    assert len(json.dumps(asked.bodies[1])) < 3000
    assert len(asked.result.model_dump_json()) < 5000


def calls(count: int) -> list[dict[str, Any]]:
    return [call("look", call_id=f"c{n}") for n in range(count)]


def nested(depth: int, inner: str = "1") -> str:
    return '{"a":' * depth + inner + "}" * depth


TOO_LARGE: dict[str, tuple[dict[str, int], dict[str, Any]]] = {
    "calls": ({"calls": 10}, {"tool_calls": calls(11)}),
    "arguments": ({"arguments": 100}, {"tool_calls": [call("look", '{"city": "' + "x" * 100 + '"}')]}),
    "depth": ({"depth": 50}, {"x": json.loads(nested(60))}),
    "depth of arguments": ({"depth": 50}, {"tool_calls": [call("look", nested(60))]}),
    "values": ({"values": 500}, {"x": [0] * 600}),
    "body": ({"body": 5000}, {"content": "x" * 6000}),
}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("wire", HTTP)
@pytest.mark.parametrize("name", TOO_LARGE)
async def test_an_answer_over_a_bound_is_an_error_that_names_it_and_is_not_asked_for_again(
    name: str, wire: str, way: str
):
    bounds, said = TOO_LARGE[name]

    def model(**options: Any) -> OpenAIModel:
        if wire == "own HTTP":
            return OpenAIModel(bounds=ReplyBounds(**bounds), **options)
        return OpenAIModel(getattr(openai, wire)(**options), bounds=ReplyBounds(**bounds))

    def play(request: Any) -> Answer:
        return as_answer(said, streams=bool(request.body.get("stream")))

    result, requests = await answered(play, way, model=model, max_retries=2)
    assert isinstance(result.exception, ReplyTooLarge)
    assert (result.exception.what, requests) == (next(iter(bounds)), 1)
    assert next(iter(bounds)) in str(result.error)


@pytest.mark.parametrize("way", WAYS)
async def test_a_thousand_calls_are_within_the_bounds_and_more_are_not(way: str):
    for count, is_error in ((1000, False), (1001, True)):

        def play(body: dict[str, Any], number: int, count: int = count) -> Any:
            return {"content": "Done."} if body["messages"][-1]["role"] == "tool" else {"tool_calls": calls(count)}

        asked = await ask("own HTTP", way, play)
        assert isinstance(asked.result.exception, ReplyTooLarge) is is_error


@pytest.mark.parametrize("bound", ["body", "line", "head", "values", "depth", "calls", "arguments"])
@pytest.mark.parametrize("value", [0, -1, True, 1.5, "5", None])
def test_a_bound_that_is_no_number_is_refused(bound: str, value: Any):
    with pytest.raises(TypeError, match=bound):
        ReplyBounds(**{bound: value})


@pytest.mark.parametrize("way", WAYS)
async def test_a_deep_answer_within_the_bounds_is_kept_and_can_be_stored(way: str):
    said = {"content": "a", "x": json.loads(nested(190))}
    asked = await ask("own HTTP", way, lambda body, number: said)
    assert asked.result.success
    asked.result.model_dump_json()


# ---- thinking in the text


def thinking(**options: Any) -> OpenAIModel:
    return OpenAIModel(thinking_tags=("<think>", "</think>"), **options)


TEXTS = {
    "thinking first": ("<think>Hm.\n</think>\n\nRome", "Hm.\n", "Rome"),
    "blank first": ("\n <think>Hm.</think>Rome", "Hm.", "Rome"),
    "none": ("Rome, <think>not</think>.", "", "Rome, <think>not</think>."),
    "empty": ("<think></think>Rome", "", "Rome"),
    "something like it": ("<thin>Rome", "", "<thin>Rome"),
}


@pytest.mark.parametrize("size", [1, 3, 100])
@pytest.mark.parametrize("name", TEXTS)
async def test_thinking_between_tags_is_reasoning_and_the_rest_is_the_answer(name: str, size: int):
    text, thought, answer = TEXTS[name]
    pieces = [chunk({"content": text[at : at + size]}) for at in range(0, len(text), size)]
    with Endpoint(sse(*pieces, chunk({}, "stop"))) as endpoint:
        agent = BaseAgent("A", "a", client=thinking(base_url=endpoint.url, api_key="any"))
        async with agent.stream("go") as stream:
            seen = [event async for event in stream]
        result = await stream.result()
    if name != "none":
        assert "".join(event.text for event in seen if isinstance(event, ReasoningDelta)) == thought
        assert "".join(event.text for event in seen if isinstance(event, TextDelta)) == answer
        assert result.content == answer
    assert result.messages[-1]["content"] == text

    whole, _ = await answered(body(completion({"content": text}, "stop")), model=thinking)
    assert whole.content == result.content


async def test_a_text_with_the_closing_tag_alone_has_its_thinking_before_it():
    whole, _ = await answered(body(completion({"content": "Hm.</think>\nRome"}, "stop")), model=thinking)
    assert (whole.content, whole.messages[-1]["content"]) == ("Rome", "Hm.</think>\nRome")


async def test_thinking_without_an_answer_is_an_empty_reply():
    result, _ = await answered(body(completion({"content": "<think>Hm.</think>"}, "stop")), model=thinking)
    assert isinstance(result.exception, NoContent)


@pytest.mark.parametrize(
    ("said", "held"),
    [
        ({"content": [{"type": "image_url", "image_url": {"url": "data:,x"}}]}, ("image_url",)),
        ({"content": None, "audio": {"id": "a", "data": "UklGRg=="}}, ("audio",)),
        ({"content": "", "images": [{"type": "image_url", "image_url": {"url": "data:,x"}}]}, ("images",)),
        ({"content": ""}, ()),
    ],
    ids=str,
)
async def test_an_answer_of_pictures_or_sound_alone_is_said_to_be_one(said: Any, held: tuple[str, ...]):
    result, _ = await answered(body(completion(said, "stop")))
    assert isinstance(result.exception, NoContent)
    assert result.exception.held == held
    assert all(kind in str(result.error) for kind in held)


@pytest.mark.parametrize("tags", ["<think>", ("<think>",), ("", "</think>"), (1, 2), ("a", "b", "c"), 5])
def test_tags_that_are_no_two_texts_are_refused(tags: Any):
    with pytest.raises(TypeError, match="thinking_tags"):
        OpenAIModel(thinking_tags=tags)


# ---- models behind models


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize(
    "said",
    [
        {"content": HALF, "finish": "error"},
        {"content": "", "finish": "content_filter"},
        {"content": None, "finish": "content_filter"},
    ],
    ids=["broken off", "filtered", "filtered, null"],
)
async def test_the_next_model_is_asked_where_one_gave_half_an_answer(said: dict[str, Any], way: str):
    if way == "stream" and said["content"]:
        said = {**said, "content": ""}  # what was shown cannot be said by another one
    with (
        Endpoint(lambda request: as_answer(said, streams=way == "stream")) as bad,
        Endpoint(lambda request: as_answer({"content": "Rome"}, streams=way == "stream")) as good,
    ):
        models = [OpenAIModel(base_url=one.url, api_key="any") for one in (bad, good)]
        for model in (FallbackModel(*models), RaceModel(*models)):
            agent = BaseAgent("A", "a", client=model)
            async with agent.stream("go", max_retries=0) as stream:
                result = await (stream.result() if way == "stream" else agent.run("go", max_retries=0))
            assert result.content == "Rome"


async def test_where_every_model_filters_the_run_is_a_refusal():
    filtered = {"content": None, "finish": "content_filter"}
    with Endpoint(lambda request: as_answer(filtered, streams=False)) as endpoint:
        models = [OpenAIModel(base_url=endpoint.url, api_key="any") for _ in range(2)]
        for model in (FallbackModel(*models), RaceModel(*models)):
            result = await BaseAgent("A", "a", client=model).run("go", max_retries=0)
            assert result.stop_reason == "refusal"
