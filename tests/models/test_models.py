"""Replies as endpoints send them, requests as they get them, and every way an endpoint can fail."""

import email.utils
import json
import time
import traceback
from collections.abc import Awaitable, Callable
from types import SimpleNamespace
from typing import Any
from unittest.mock import AsyncMock, MagicMock

import anyio
import httpx2
import openai
import pytest
from hypothesis import given, settings, strategies as st
from openai.types.chat import ChatCompletion
from pydantic import BaseModel

from fractal import (
    AuthenticationFailed,
    BadReply,
    ConnectionFailed,
    InvalidArguments,
    MissingCredentials,
    ModelError,
    ModelRequest,
    OpenAIModel,
    RateLimited,
    Refused,
    Reply,
    RequestTimedOut,
    ServerError,
    StatusError,
    ToolCall,
)
from fractal._engine.step import AskAgain, next_step
from fractal.messages import Transcript
from fractal.model import ModelSettings, ToolSchemas
from fractal.models._clients.object import ObjectWire
from fractal.models._clients.sdk import SdkWire
from fractal.models._faults import translated
from fractal.models._http.wire import HttpWire
from fractal.models._replies.reading import decoded, reply_from, reply_of
from fractal.models._replies.reported import status_error
from fractal.models._secrets import NO_SECRETS, Secrets
from fractal.models._wires import wire_for
from fractal.models.bounds import DEFAULT_BOUNDS
from fractal.testing import Endpoint, answers
from tests.support import shown

USER = {"role": "user", "content": "hi"}
KEY = "sk-secret-0123456789"


PARTS = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
ODD_PARTS = [{"type": "image_url"}, "c", None, {"text": None}, {"text": "a"}]
REFUSAL_PARTS = [{"type": "refusal", "refusal": "no"}]
UNKNOWN = {"reasoning_content": "hm", "x_y": {"z": 1}}


def completion(message: Any, **more: Any) -> dict[str, Any]:
    return {"choices": [{"message": message, **more}]}


def reply_to(message: Any, **more: Any) -> Reply:
    return reply_of(completion(message, **more))


# ---- replies


@pytest.mark.parametrize(
    ("answer", "reply"),
    [
        (completion({"content": "hi"}), Reply(text="hi")),
        (completion({"content": ""}), Reply(content="")),
        (completion({"content": None}), Reply()),
        (completion({}), Reply()),
        (completion({"content": 5}), Reply()),
        (completion({"content": {"text": "x"}}), Reply()),
        (completion({"content": PARTS}), Reply(text="ab", content=PARTS)),
        (completion({"content": ODD_PARTS}), Reply(text="a", content=ODD_PARTS)),
        (completion({"content": []}), Reply()),
        (completion({"content": None, "refusal": "no"}), Reply(refusal="no")),
        (completion({"content": "hi", "refusal": None}), Reply(text="hi")),
        (completion({"content": "hi", "refusal": ""}), Reply(text="hi")),
        (completion({"content": "hi", "refusal": False}), Reply(text="hi")),
        (completion({"content": REFUSAL_PARTS}), Reply(refusal="no", content=REFUSAL_PARTS)),
        (completion({"content": "hi", "tool_calls": None, "function_call": None, "audio": None}), Reply(text="hi")),
        (completion({"content": "hi", "tool_calls": []}), Reply(text="hi")),
        (completion({"content": "hi", "tool_calls": "x"}), Reply(text="hi")),
        (completion({"content": "hi"} | UNKNOWN), Reply(text="hi", extra=UNKNOWN)),
        (completion({"content": "hi"}, finish_reason="length", index=0), Reply(text="hi", finish_reason="length")),
        (completion({"content": "hi"}, finish_reason=None, logprobs=None), Reply(text="hi")),
        (completion({"content": "hi"}) | {"usage": None}, Reply(text="hi")),
        (completion({"content": "hi"}) | {"usage": {}}, Reply(text="hi")),
        (completion({"content": "hi"}) | {"usage": {"prompt_tokens": None}}, Reply(text="hi")),
        (
            completion({"content": "hi"}) | {"usage": {"prompt_tokens": 3, "completion_tokens": 4, "details": {}}},
            Reply(text="hi", input_tokens=3, output_tokens=4),
        ),
        (completion({"content": "hi"}) | {"error": None, "id": None, "object": "x", "provider": 5}, Reply(text="hi")),
        ({"choices": [{"message": {"content": "a"}}, {"message": {"content": "b"}}]}, Reply(text="a")),
    ],
    ids=str,
)
def test_an_odd_reply_is_read_for_what_is_in_it(answer: object, reply: Reply) -> None:
    assert reply_of(answer) == reply


@pytest.mark.parametrize(
    ("answer", "words"),
    [
        (None, "no choices[0].message"),
        ([], "no choices[0].message"),
        ("text", "text"),
        ({}, "no choices[0].message"),
        ({"choices": None}, "no choices[0].message"),
        ({"choices": []}, "no choices[0].message"),
        ({"choices": {}}, "no choices[0].message"),
        ({"choices": [None]}, "no choices[0].message"),
        ({"choices": [{}]}, "no choices[0].message"),
        ({"choices": [{"message": None}]}, "no choices[0].message"),
        ({"choices": [{"message": "hi"}]}, "no choices[0].message"),
        ({"choices": [{"delta": {"content": "x"}}]}, "no choices[0].message"),
        ({"choices": "x" * 10_000}, "xxx"),
    ],
    ids=lambda value: str(value)[:40],
)
def test_a_reply_without_a_message_is_a_bad_reply_that_says_what_came(answer: object, words: str) -> None:
    with pytest.raises(BadReply) as caught:
        reply_of(answer)

    assert words in str(caught.value)
    assert len(str(caught.value)) < 500


def calls_of(*raw: Any) -> tuple[ToolCall, ...]:
    return reply_to({"content": None, "tool_calls": list(raw)}).tool_calls


@pytest.mark.parametrize(
    ("raw", "name", "arguments"),
    [
        ({"id": "c", "function": {"name": "f", "arguments": '{"a": 1}'}}, "f", '{"a": 1}'),
        ({"id": "c", "function": {"name": "f", "arguments": "{broken"}}, "f", "{broken"),
        ({"id": "c", "function": {"name": "f", "arguments": {"a": [1]}}}, "f", '{"a":[1]}'),
        ({"id": "c", "function": {"name": "f", "arguments": {}}}, "f", "{}"),
        ({"id": "c", "function": {"name": "f", "arguments": None}}, "f", "{}"),
        ({"id": "c", "function": {"name": "f"}}, "f", "{}"),
        ({"id": "c", "type": "function", "index": 0, "function": {"name": "f"}}, "f", "{}"),
        ({"id": "c", "function": {"name": None, "arguments": "{}"}}, "unnamed", "{}"),
        ({"id": "c", "function": {"name": "", "arguments": "{}"}}, "unnamed", "{}"),
        ({"id": "c", "function": None}, "unnamed", "{}"),
        ({"id": "c"}, "unnamed", "{}"),
        ({"id": "c", "type": "custom", "custom": {"name": "f", "input": "raw"}}, "f", "raw"),
    ],
    ids=str,
)
def test_a_tool_call_is_read_for_what_is_in_it(raw: object, name: str, arguments: str) -> None:
    assert calls_of(raw) == (ToolCall("c", name, arguments),)


def test_calls_without_an_id_or_with_one_that_is_taken_get_one_of_their_own() -> None:
    given = enumerate(("a", "a", "", None, 5, "b", "a"))
    raw = [{"function": {"name": "f", "arguments": f'{{"n":{n}}}'}, "id": call_id} for n, call_id in given]
    reply = reply_to({"content": None, "tool_calls": [*raw, {"function": {"name": "f", "arguments": "{}"}}]})

    ids = [call.id for call in reply.tool_calls]
    assert (ids[0], ids[5]) == ("a", "b")
    assert len(set(ids)) == len(ids) == 8
    assert all(ids)
    transcript = Transcript([USER])
    transcript.append(reply.message())
    assert list(transcript.open_calls) == ids


def test_entries_of_tool_calls_that_are_no_calls_are_answered_all_the_same() -> None:
    assert [call.name for call in calls_of(None, 5, {})] == ["unnamed"] * 3


def test_a_reply_is_an_assistants_message_that_can_be_sent_back() -> None:
    call = {"id": "c", "type": "function", "function": {"name": "f", "arguments": "{}"}}
    assert Reply(text="hi").message() == {"role": "assistant", "content": "hi"}
    assert Reply(refusal="no").message() == {"role": "assistant", "content": "no"}
    assert Reply(tool_calls=(ToolCall("c", "f", "{}"),)).message() == {
        "role": "assistant",
        "content": None,
        "tool_calls": [call],
    }
    both = reply_to({"content": "let me see", "tool_calls": [call]})
    assert both.message() == {"role": "assistant", "content": "let me see", "tool_calls": [call]}


def test_lone_surrogates_of_an_endpoint_end_at_the_door() -> None:
    body = rb'{"choices": [{"message": {"content": "cut \ud83d", "tool_calls": [{"id": "c", "function": {"name": "f", "arguments": "{\"a\": \"\ud83d\"}"}}]}}]}'  # fmt: skip  # noqa: E501
    reply = reply_from(200, {}, body, DEFAULT_BOUNDS)

    assert reply.text == "cut \ufffd"
    assert reply.tool_calls[0].arguments == '{"a": "\ufffd"}'


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=3),
    lambda inner: st.lists(inner, max_size=3)
    | st.dictionaries(
        st.sampled_from(
            ["choices", "message", "content", "tool_calls", "id", "function", "name", "arguments", "refusal", "usage",
             "prompt_tokens", "error", "text", "finish_reason"]
        ),
        inner,
        max_size=5,
    ),
    max_leaves=25,
)  # fmt: skip


@settings(max_examples=300, deadline=None)
@given(json_values | json_values.map(completion) | json_values.map(lambda v: completion({"tool_calls": v})))
def test_any_json_is_a_reply_that_can_be_sent_back_or_an_error_of_ours(answer: object) -> None:
    try:
        reply = reply_of(answer)
    except ModelError:
        return
    if next_step(reply, {}) == AskAgain():
        return
    transcript = Transcript([USER])
    transcript.append(reply.message())
    for call in reply.tool_calls:
        transcript.answer(call.id, "x")
    transcript.require_answered()
    transcript.encoded()


# ---- requests


def request(**options: Any) -> ModelRequest:
    return ModelRequest(**{"model": "m", "system": None, "transcript": Transcript([USER]), **options})


TOOL = {"type": "function", "function": {"name": "f", "description": "ü", "parameters": {"type": "object"}}}
REQUESTS = [
    request(),
    request(system="be kind"),
    request(system=""),
    request(instruction="now"),
    request(system="be kind \ud83d\ude00", instruction="now ü", model="a/b:c \x00"),
    request(tools=ToolSchemas([TOOL, TOOL])),
    request(tools=ToolSchemas()),
    request(transcript=Transcript()),
    request(transcript=Transcript([USER] * 50), system="s"),
    request(settings=ModelSettings(temperature=0.0, max_tokens=5, reasoning_effort="low", extra={"top_p": 0.5})),
    request(settings=ModelSettings(temperature=1, extra={"temperature": 2, "metadata": {"a": [None]}})),
    request(system="s", instruction="i", tools=ToolSchemas([TOOL]), settings=ModelSettings(temperature=1)),
]


@pytest.mark.parametrize("sent", REQUESTS, ids=range(len(REQUESTS)))
def test_the_body_is_the_json_of_the_parameters(sent: ModelRequest) -> None:
    def no_repeats(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        assert len(dict(pairs)) == len(pairs), "a key comes twice"
        return dict(pairs)

    body = json.loads(sent.body(), object_pairs_hook=no_repeats)
    parameters = json.dumps(sent.parameters()).encode("utf-8", "surrogatepass")
    assert body == json.loads(parameters)


@pytest.mark.parametrize("name", ["model", "messages", "tools", "stream"])
def test_fields_that_are_the_agents_own_cannot_be_extra(name: str) -> None:
    with pytest.raises(InvalidArguments, match=name):
        ModelSettings(extra={name: "mine"})


def test_a_body_is_joined_from_what_was_encoded_before() -> None:
    transcript = Transcript([USER])
    first = transcript.encoded()[0]
    sent = request(transcript=transcript, tools=ToolSchemas([TOOL]))

    assert first in sent.body()
    assert sent.body() == sent.body()
    assert transcript.encoded()[0] is first


def test_settings_that_are_not_given_are_not_sent() -> None:
    assert ModelSettings().fields() == {}
    assert ModelSettings(temperature=0.0).fields() == {"temperature": 0.0}


# ---- HTTP errors


@pytest.mark.parametrize(
    ("status", "kind", "retryable"),
    [
        (400, StatusError, False),
        (401, AuthenticationFailed, False),
        (402, StatusError, False),
        (403, AuthenticationFailed, False),
        (404, StatusError, False),
        (408, ServerError, True),
        (409, ServerError, True),
        (413, StatusError, False),
        (422, StatusError, False),
        (429, RateLimited, True),
        (500, ServerError, True),
        (502, ServerError, True),
        (503, ServerError, True),
        (529, ServerError, True),
        (599, ServerError, True),
    ],
)
def test_a_status_decides_the_class_and_whether_to_ask_again(status: int, kind: type, retryable: bool) -> None:
    error = status_error(status, {"x-request-id": "r"}, b'{"error": {"message": "said"}}')

    assert type(error) is kind
    assert (error.status, error.request_id, error.retryable) == (status, "r", retryable)
    assert str(error) == f"HTTP {status}: said"
    for told, meant in {"true": True, "false": False, "maybe": retryable}.items():
        assert status_error(status, {"x-should-retry": told}, b"").retryable is meant
        assert status_error(status, {"llm_provider-x-should-retry": told}, b"").retryable is meant


@pytest.mark.parametrize("name", ["x-request-id", "request-id", "apim-request-id", "x-litellm-call-id"])
def test_the_id_of_a_request_is_found_under_the_name_that_an_endpoint_gives_it(name: str) -> None:
    assert status_error(400, {name: "r"}, b"").request_id == "r"
    assert status_error(400, {"x-other-id": "r"}, b"").request_id is None


def test_a_used_up_quota_is_not_worth_asking_again() -> None:
    for field in ("code", "type"):
        error = status_error(429, {}, {"error": {"message": "m", field: "insufficient_quota"}})
        assert (type(error), error.retryable, error.code) == (RateLimited, False, "insufficient_quota")


@pytest.mark.parametrize(
    ("body", "text", "code", "param"),
    [
        (b'{"error": {"message": "m", "code": "c", "type": "t", "param": "p"}}', "m", "c", "p"),
        (b'{"error": {"message": "m", "code": null, "type": "t", "param": null}}', "m", "t", None),
        (b'{"error": {"message": "m", "code": 42}}', "m", "42", None),
        (b'{"error": "m"}', "m", None, None),
        (b'{"error": null, "message": "m", "code": "c"}', "m", "c", None),
        (b'{"message": "m"}', "m", None, None),
        (b'{"detail": "m"}', "m", None, None),
        (b'{"detail": [{"loc": ["body", "a"], "msg": "m"}, {"msg": "n"}]}', "a: m; body: n", None, "a"),
        (b'{"error": {"message": {"text": "m"}}}', '"text": "m"', None, None),
        (b'{"error": {"message": ""}}', '"message"', None, None),
        (b'[{"error": "m"}]', "m", None, None),
        (b'"m"', "m", None, None),
        (b"m", "m", None, None),
        ("m", "m", None, None),
        ({"message": "m", "code": "c", "param": "p"}, "m", "c", "p"),
        (["m"], "m", None, None),
        (b"<html>\n<head><title>502 Bad</title></head><p>m&amp;</p>", "502 Bad m", None, None),
        ("mü".encode("latin-1"), "m", None, None),
        (b"\xff\xfe\x00", "", None, None),
        (b"", "without a word", None, None),
        (None, "without a word", None, None),
        (b"  \n ", "without a word", None, None),
        (b"<br><hr>", "without a word", None, None),
        (b"[" * 100_000, "[[[", None, None),
        (b"x" * 1_000_000, "xxx", None, None),
        ({"error": {"message": "m" * 100_000}}, "mmm", None, None),
    ],
    ids=lambda value: str(value)[:30],
)
def test_a_body_of_any_shape_gives_the_endpoints_own_words(
    body: object, text: str, code: str | None, param: str | None
) -> None:
    error = status_error(400, {}, body)

    assert text in str(error)
    assert str(error).startswith("HTTP 400")
    assert (error.code, error.param) == (code, param)
    assert "<" not in str(error)
    assert len(str(error)) < 5000


@pytest.mark.parametrize(
    ("headers", "seconds"),
    [
        ({}, None),
        ({"retry-after": "5"}, 5),
        ({"retry-after": " 5 "}, 5),
        ({"retry-after": "0"}, 0),
        ({"retry-after": "0.25"}, 0.25),
        ({"retry-after": "-5"}, None),
        ({"retry-after": "nan"}, None),
        ({"retry-after": "inf"}, None),
        ({"retry-after": "1e999"}, None),
        ({"retry-after": ""}, None),
        ({"retry-after": "soon"}, None),
        ({"retry-after": "5, 6"}, None),
        ({"retry-after-ms": "1500"}, 1.5),
        ({"retry-after-ms": "1500", "retry-after": "9"}, 1.5),
        ({"retry-after-ms": "soon", "retry-after": "9"}, 9),
        ({"retry-after-ms": "-1", "retry-after": "9"}, 9),
        ({"retry-after": "Wed, 21 Oct 2015 07:28:00 +99999999999999"}, None),
        ({"retry-after": "Wed, 99 Oct 2015 07:28:00 GMT"}, None),
        ({"llm_provider-retry-after": "37"}, 37),
        ({"llm_provider-retry-after-ms": "1500"}, 1.5),
        ({"llm_provider-retry-after": "37", "retry-after": "5"}, 5),
    ],
    ids=str,
)
def test_retry_after_is_understood_in_seconds_and_milliseconds(headers: dict[str, str], seconds: float | None) -> None:
    assert status_error(429, headers, b"").retry_after == seconds


def test_retry_after_as_a_date_is_the_time_until_then_and_never_negative() -> None:
    for offset, zone, expected in (
        (3600, "GMT", 3600),
        (3600, "-0000", 3600),
        (3600, "+0000", 3600),
        (-3600, "GMT", 0),
    ):
        date = email.utils.formatdate(time.time() + offset, usegmt=True).replace("GMT", zone)
        assert status_error(429, {"retry-after": date}, b"").retry_after == pytest.approx(expected, abs=30)


@settings(deadline=None)
@given(st.text(max_size=30) | st.from_regex(r"\w{3}, \d{1,6} \w{3} \d{1,6} \d\d:\d\d:\d\d [+-]\d{1,20}"))
def test_no_retry_after_is_an_error(value: str) -> None:
    found = status_error(429, {"retry-after": value, "retry-after-ms": value}, b"").retry_after
    assert found is None or found >= 0


def test_headers_may_be_of_any_case() -> None:
    error = status_error(429, httpx2.Headers({"Retry-After": "5", "X-Request-Id": "r", "X-Should-Retry": "false"}), b"")
    assert (error.retry_after, error.request_id, error.retryable) == (5, "r", False)


@pytest.mark.parametrize("body", [b'{"a": "\xc3\xbc"}', b'\xef\xbb\xbf{"a": "\xc3\xbc"}', b' {"a":"\\u00fc"}\n'])
def test_a_body_that_is_json_is_read(body: bytes) -> None:
    assert decoded(body, DEFAULT_BOUNDS) == {"a": "ü"}


@pytest.mark.parametrize("body", [b"", b'{"a": ', b"\xff\xff", b"[" * 100_000])
@pytest.mark.parametrize(("content_type", "retryable"), [("application/json", True), ("text/html; charset=x", False)])
def test_a_body_that_is_not_is_a_bad_reply(body: bytes, content_type: str, retryable: bool) -> None:
    with pytest.raises(BadReply) as caught:
        reply_from(200, {"content-type": content_type}, body, DEFAULT_BOUNDS)

    assert (caught.value.status, caught.value.retryable) == (200, retryable)
    assert ("base URL" in str(caught.value)) is not retryable
    assert len(str(caught.value)) < 500


# ---- exceptions of other libraries

POST = httpx2.Request("POST", "http://host:1/v1/chat/completions?key=hidden")


def response(status: int, **options: Any) -> httpx2.Response:
    return httpx2.Response(status, request=POST, **options)


def translation_of(error: BaseException, secrets: Secrets = NO_SECRETS) -> ModelError:
    with pytest.raises(ModelError) as caught, translated(secrets):
        raise error
    made = caught.value
    assert made.__context__ is None
    # A cause is a copy without the request: that has the key.
    assert made.__cause__ is None or type(made.__cause__) in (type(error), type(error.__cause__))
    assert made.__cause__ is not error
    return made


def caused_by(error: Exception, cause: Exception) -> Exception:
    error.__cause__ = cause
    return error


TRANSLATIONS: list[tuple[Exception, type[ModelError], bool, str]] = [
    (httpx2.ConnectTimeout("x", request=POST), ConnectionFailed, True, "http://host:1"),
    (httpx2.ReadTimeout("", request=POST), RequestTimedOut, True, "http://host:1"),
    (httpx2.WriteTimeout("x"), RequestTimedOut, True, "the endpoint"),
    (httpx2.PoolTimeout("x"), RequestTimedOut, True, "x"),
    (httpx2.ConnectError("refused", request=POST), ConnectionFailed, True, "refused"),
    (httpx2.ReadError("reset"), ConnectionFailed, True, "reset"),
    (httpx2.RemoteProtocolError("closed", request=POST), ConnectionFailed, True, "closed"),
    (httpx2.DecodingError("gzip"), ConnectionFailed, True, "gzip"),
    (httpx2.InvalidURL("no host"), ConnectionFailed, False, "base URL"),
    (httpx2.UnsupportedProtocol("ftp"), ConnectionFailed, False, "base URL"),
    (TimeoutError(), RequestTimedOut, True, "timed out"),
    (TimeoutError("slow"), RequestTimedOut, True, "slow"),
    (ConnectionResetError("reset"), ConnectionFailed, True, "reset"),
    (BrokenPipeError("pipe"), ConnectionFailed, True, "pipe"),
    (json.JSONDecodeError("no", "doc", 0), BadReply, True, "not JSON"),
    (openai.APITimeoutError(POST), RequestTimedOut, True, ""),
    (openai.APIConnectionError(request=POST), ConnectionFailed, True, ""),
    (caused_by(openai.APIConnectionError(request=POST), httpx2.InvalidURL("no host")), ConnectionFailed, False, "URL"),
    (caused_by(openai.APIConnectionError(request=POST), httpx2.ReadTimeout("x")), RequestTimedOut, True, "in time"),
    (caused_by(openai.APITimeoutError(POST), httpx2.ConnectTimeout("x")), ConnectionFailed, True, "in time"),
    (caused_by(openai.APIConnectionError(request=POST), ValueError("odd")), ConnectionFailed, True, ""),
    (openai.APIResponseValidationError(response(200), None), BadReply, True, "schema"),
    (openai.OpenAIError("no api_key"), ModelError, False, "no api_key"),
    (openai.APIError("odd", POST, body={"code": "c"}), ModelError, False, "odd"),
    (openai.BadRequestError("m", response=response(400), body={"message": "said"}), StatusError, False, "said"),
    (openai.AuthenticationError("m", response=response(401), body=None), AuthenticationFailed, False, "HTTP 401"),
    (openai.RateLimitError("m", response=response(429), body={"code": "insufficient_quota"}), RateLimited, False, ""),
    (
        openai.RateLimitError("m", response=response(429, headers={"retry-after": "7"}), body="x"),
        RateLimited,
        True,
        "x",
    ),
    (openai.InternalServerError("m", response=response(503), body="<b>down</b>"), ServerError, True, "HTTP 503: down"),
    (openai.ConflictError("m", response=response(409), body=None), ServerError, True, "HTTP 409"),
]


@pytest.mark.parametrize(
    ("error", "kind", "retryable", "words"),
    TRANSLATIONS,
    ids=[f"{i}-{t[0]!r}"[:40] for i, t in enumerate(TRANSLATIONS)],
)
def test_what_libraries_raise_becomes_one_of_our_errors(
    error: Exception, kind: type[ModelError], retryable: bool, words: str
) -> None:
    made = translation_of(error)

    assert type(made) is kind
    assert made.retryable is retryable
    assert words in str(made)
    assert "hidden" not in str(made)


def test_retry_after_and_code_of_an_sdk_error_are_kept() -> None:
    headers = {"retry-after": "7", "x-request-id": "r"}
    error = translation_of(
        openai.RateLimitError("m", response=response(429, headers=headers), body={"code": "c", "param": "p"})
    )
    assert (error.status, error.retry_after, error.request_id, error.code, error.param) == (429, 7, "r", "c", "p")


@pytest.mark.parametrize(
    "error", [ValueError("v"), KeyError("k"), AttributeError("a"), Refused("r"), KeyboardInterrupt()], ids=repr
)
def test_what_is_no_fault_of_an_endpoint_passes(error: BaseException) -> None:
    with pytest.raises(type(error)) as caught, translated(Secrets("secret")):
        raise error
    assert caught.value is error


@pytest.mark.parametrize(
    "error",
    [
        openai.OpenAIError(f"bad key {KEY}"),
        openai.AuthenticationError("m", response=response(401), body={"message": f"bad key {KEY}"}),
        httpx2.ConnectError(f"bad header {KEY}"),
        TimeoutError(KEY),
        BadReply(f"it said {KEY}"),
        ModelError(f"it said {KEY}"),
    ],
    ids=repr,
)
def test_a_key_is_not_repeated_in_any_text(error: Exception) -> None:
    made = translation_of(error, Secrets(KEY))
    assert KEY not in str(made)
    assert "[key]" in str(made)


class OfHost(ConnectionRefusedError):
    def __init__(self, *, host: str) -> None:
        super().__init__(f"{host} refuses {KEY}")


class OfProxy(httpx2.ConnectError):
    def __init__(self, *, host: str) -> None:
        super().__init__(f"{host} refuses {KEY}")


class Renamed(ConnectionResetError):
    def __init__(self, host: str) -> None:
        super().__init__(f"{host} is down")


class Mute(TimeoutError):
    def __str__(self) -> str:
        raise RuntimeError("it has no text")

    __repr__ = __str__


class OfRequests(ConnectionError):
    request = SimpleNamespace(url=f"http://host/?key={KEY}", headers={"Authorization": KEY})


class Guarded(ConnectionError):
    @property
    def request(self) -> object:
        raise KeyError("request")


@pytest.mark.parametrize(
    ("error", "kind"),
    [
        (OfHost(host="h"), ConnectionFailed),
        (OfProxy(host="h"), ConnectionFailed),
        (Renamed("h"), ConnectionFailed),
        (Mute(KEY), RequestTimedOut),
        (OfRequests("refused"), ConnectionFailed),
        (Guarded("refused"), ConnectionFailed),
        (caused_by(ModelError("odd"), Mute()), ModelError),
        (openai.APIConnectionError(request=MagicMock()), ConnectionFailed),
    ],
    ids=lambda each: type(each).__name__ if isinstance(each, Exception) else "",
)
def test_an_error_of_an_odd_class_is_told_like_any_other(error: Exception, kind: type[ModelError]) -> None:
    made = translation_of(error, Secrets(KEY))

    assert type(made) is kind
    assert KEY not in "".join(traceback.format_exception(made))


def test_an_error_that_could_only_be_copied_with_another_text_is_no_cause() -> None:
    assert translation_of(Renamed("h")).__cause__ is None
    assert str(translation_of(ConnectionResetError("h is down")).__cause__) == "h is down"


def test_an_error_with_a_note_that_cannot_be_shown_passes() -> None:
    error = ValueError("v")
    error.__notes__ = [Mute()]  # type: ignore[list-item]
    with pytest.raises(Exception) as caught, translated(Secrets(KEY)):  # noqa: PT011  # a `match` looks at notes
        raise error
    assert caught.value is error


def own_http(url: str, key: str) -> OpenAIModel:
    return OpenAIModel(base_url=url, api_key=key)


def sdk(url: str, key: str) -> OpenAIModel:
    return OpenAIModel(openai.AsyncOpenAI(base_url=url, api_key=key))


def blocking_sdk(url: str, key: str) -> OpenAIModel:
    return OpenAIModel(openai.OpenAI(base_url=url, api_key=key))


@pytest.mark.parametrize("make", [own_http, sdk, blocking_sdk])
@pytest.mark.parametrize(
    "answer",
    [
        answers.failure(401, f"Incorrect API key provided: {KEY}"),
        answers.failure(500, f"cannot use {KEY}"),
        answers.failure(400, "x" * 280 + KEY),
        answers.raw(json.dumps({"error": {"message": f"bad key {KEY}"}}), content_type="application/json"),
        answers.raw(json.dumps({"hint": f"bad key {KEY}"}), content_type="application/json"),
        answers.raw(f"your key {KEY} is bad"),
        answers.raw("x" * 290 + KEY),
        answers.raw("x" * 285 + KEY, status=500),
    ],
    ids=["401", "500", "400 long", "error in 200", "object in 200", "page", "long page", "long 500"],
)
def test_an_endpoint_that_repeats_the_key_does_not_get_it_into_an_error(make: Any, answer: Any) -> None:
    with Endpoint(answer) as endpoint, pytest.raises(ModelError) as caught:
        anyio.run(make(endpoint.url, KEY).respond, request())

    assert KEY[:8] not in str(caught.value)


@pytest.mark.parametrize(
    ("make", "stray"), [(own_http, "’"), (own_http, "\x00"), (own_http, "\nb"), (sdk, "\n"), (sdk, "’"), (sdk, "\x00")]
)
def test_a_key_that_cannot_be_a_header_is_a_clear_error_that_does_not_show_it(make: Any, stray: str) -> None:
    with Endpoint("hi") as endpoint, pytest.raises(ModelError) as caught:
        anyio.run(make(endpoint.url, KEY + stray).respond, request())

    assert KEY[:8] not in str(caught.value)
    assert not caught.value.retryable


def test_the_line_end_of_a_key_read_from_a_file_is_no_part_of_it() -> None:
    with Endpoint("hi", api_key=KEY) as endpoint:
        assert anyio.run(own_http(endpoint.url, KEY + "\r\n").respond, request()).text == "hi"


# ---- the way a client is used


@pytest.mark.parametrize("client", [object(), "text", 5, SimpleNamespace(chat=None), {"chat": 1}], ids=shown)
def test_what_is_no_client_is_refused_at_once(client: object) -> None:
    with pytest.raises(InvalidArguments, match="client="):
        OpenAIModel(client)


def test_a_client_decides_its_way() -> None:
    assert isinstance(wire_for(None), HttpWire)
    assert isinstance(wire_for(openai.AsyncOpenAI(api_key="k")), SdkWire)
    assert isinstance(wire_for(openai.OpenAI(api_key="k")), SdkWire)
    assert isinstance(wire_for(MagicMock()), ObjectWire)
    patched = openai.AsyncOpenAI(api_key="k")
    patched.chat.completions.create = AsyncMock()  # type: ignore[method-assign]
    assert isinstance(wire_for(patched), ObjectWire)


async def test_without_a_key_and_a_url_there_is_nobody_to_ask() -> None:
    with pytest.raises(MissingCredentials, match="OPENAI_API_KEY"):
        await OpenAIModel().respond(request())


class Choice(BaseModel):
    message: dict[str, Any]
    finish_reason: str | None = None


class Completion(BaseModel):
    choices: list[Choice]
    usage: dict[str, int] | None = None


FULL: dict[str, Any] = {
    "choices": [
        {
            "message": {
                "content": "hi",
                "refusal": None,
                "tool_calls": [{"id": "c", "type": "function", "function": {"name": "f", "arguments": "{}"}}],
            },
            "finish_reason": "tool_calls",
        }
    ],
    "usage": {"prompt_tokens": 3, "completion_tokens": 4},
}
EXPECTED = Reply(
    text="hi", tool_calls=(ToolCall("c", "f", "{}"),), finish_reason="tool_calls", input_tokens=3, output_tokens=4
)


def as_namespace(value: Any) -> Any:
    return json.loads(json.dumps(value), object_hook=lambda fields: SimpleNamespace(**fields))


def as_mock(value: Any) -> Any:
    def mock_of(fields: dict[str, Any]) -> MagicMock:
        mock = MagicMock()
        for name, field in fields.items():
            setattr(mock, name, field)
        return mock

    return json.loads(json.dumps(value), object_hook=mock_of)


SHAPES: dict[str, Callable[[], Any]] = {
    "dict": lambda: FULL,
    "pydantic": lambda: Completion(**FULL),
    "sdk": lambda: ChatCompletion.model_construct(**FULL),
    "namespace": lambda: as_namespace(FULL),
    "mock": lambda: as_mock(FULL),
    "dict of namespaces": lambda: {"choices": [as_namespace(FULL["choices"][0])], "usage": as_namespace(FULL["usage"])},
    "namespace of dicts": lambda: SimpleNamespace(choices=FULL["choices"], usage=FULL["usage"]),
    "tuples": lambda: SimpleNamespace(choices=tuple(as_namespace(FULL["choices"])), usage=as_namespace(FULL["usage"])),
}


def client_with(create: Any) -> Any:
    return SimpleNamespace(chat=SimpleNamespace(completions=SimpleNamespace(create=create)))


def blocking(answer: Any) -> Any:
    return lambda **_: answer


def coroutine_function(answer: Any) -> Any:
    async def create(**_: Any) -> Any:
        return answer

    return create


class CallableObject:
    def __init__(self, answer: Any) -> None:
        self.answer = answer

    async def __call__(self, **_: Any) -> Any:
        return self.answer


WAYS: dict[str, Callable[[Any], Any]] = {
    "plain function": blocking,
    "coroutine function": coroutine_function,
    "callable object": CallableObject,
    "MagicMock": lambda answer: MagicMock(return_value=answer),
    "AsyncMock": lambda answer: AsyncMock(return_value=answer),
}


@pytest.mark.parametrize("shape", SHAPES)
async def test_a_double_may_answer_in_any_shape(shape: str) -> None:
    assert await OpenAIModel(client_with(blocking(SHAPES[shape]()))).respond(request()) == EXPECTED


@pytest.mark.parametrize("way", WAYS)
async def test_a_double_may_be_called_in_any_way(way: str) -> None:
    assert await OpenAIModel(client_with(WAYS[way](FULL))).respond(request()) == EXPECTED


async def test_a_mock_of_a_whole_client_needs_only_the_content() -> None:
    for client in (MagicMock(), AsyncMock()):
        client.chat.completions.create.return_value.choices = [MagicMock()]
        client.chat.completions.create.return_value.choices[0].message.content = "hi"
        assert await OpenAIModel(client).respond(request()) == Reply(text="hi")


async def test_a_double_is_called_with_the_parameters_of_the_request() -> None:
    create = MagicMock(return_value=FULL)
    sent = request(system="s", tools=ToolSchemas([TOOL]), settings=ModelSettings(temperature=0.5))
    await OpenAIModel(client_with(create)).respond(sent)

    create.assert_called_once_with(
        model="m", messages=[{"role": "system", "content": "s"}, USER], temperature=0.5, tools=[TOOL]
    )


async def test_a_replaced_create_of_a_real_client_is_called() -> None:
    async with openai.AsyncOpenAI(api_key="k") as client:  # one left open makes a task of its own when it is collected
        client.chat.completions.create = AsyncMock(  # type: ignore[method-assign]
            return_value=ChatCompletion.model_construct(**FULL)
        )
        assert await OpenAIModel(client).respond(request()) == EXPECTED


@pytest.mark.parametrize(
    "answer", [None, "text", 5, [], SimpleNamespace(), MagicMock()], ids=lambda v: type(v).__name__
)
async def test_a_double_that_answers_nothing_useful_is_a_bad_reply(answer: Any) -> None:
    with pytest.raises(BadReply):
        await OpenAIModel(client_with(blocking(answer))).respond(request())


@pytest.mark.parametrize("way", ["plain function", "coroutine function"])
async def test_what_a_double_raises_is_translated_like_the_real_thing(way: str) -> None:
    error = openai.RateLimitError("m", response=response(429, headers={"retry-after": "7"}), body=None)

    async def create_async(**_: Any) -> Awaitable[Any]:
        raise error

    def create(**_: Any) -> Any:
        raise error

    with pytest.raises(RateLimited) as caught:
        await OpenAIModel(client_with(create if way == "plain function" else create_async)).respond(request())
    assert caught.value.retry_after == 7


async def test_a_double_whose_script_is_used_up_is_an_error_and_no_hang() -> None:
    for create in (MagicMock(side_effect=[FULL]), AsyncMock(side_effect=[FULL])):
        model = OpenAIModel(client_with(create))
        assert await model.respond(request()) == EXPECTED
        with pytest.raises((StopIteration, StopAsyncIteration, RuntimeError)):
            await model.respond(request())
