"""What endpoints answer, and what a run makes of it."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

import pytest
from openai import AsyncOpenAI

from fractal import BaseAgent, RetryScheduled
from fractal._engine import ask as _ask
from fractal.testing import Endpoint, answers
from fractal.testing.answers import AnswerLike
from tests.support import assert_continuable, calls_then

StartEndpoint = Callable[..., Endpoint]


@pytest.fixture(autouse=True)
def _short_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_ask, "FIRST_BACK_OFF", 0.01)


@pytest.fixture(params=["own wire", "AsyncOpenAI"])
def client(request: pytest.FixtureRequest) -> Callable[[], Any]:
    """All ways to the wire meet the same faults; an SDK client is made when the endpoint is there."""
    return (lambda: None) if request.param == "own wire" else AsyncOpenAI


FINAL = [  # answer, error class, error_type, words of the text
    (answers.failure(400, "bad request", code="bad"), "StatusError", "api_error", "HTTP 400: bad request"),
    (answers.failure(401, "who are you"), "AuthenticationFailed", "api_error", "HTTP 401: who are you"),
    (answers.failure(403, "not you"), "AuthenticationFailed", "api_error", "HTTP 403: not you"),
    (answers.failure(404, "no such model"), "StatusError", "api_error", "HTTP 404: no such model"),
    (answers.failure(413, "too long"), "StatusError", "api_error", "HTTP 413: too long"),
    (answers.failure(422, "odd"), "StatusError", "api_error", "HTTP 422: odd"),
    (answers.failure(429, "pay", code="insufficient_quota"), "RateLimited", "rate_limit", "HTTP 429: pay"),
    (answers.failure(429, "later", retry_after=500), "RateLimited", "rate_limit", "HTTP 429: later"),
    (answers.raw("<html><h1>Hello</h1></html>"), "BadReply", "json_decode_error", "is the base URL right?"),
    (answers.raw("<h1>Gone</h1>", status=410), "StatusError", "api_error", "HTTP 410: Gone"),
]
PASSING = [
    answers.failure(408, "slow"),
    answers.failure(409, "conflict"),
    answers.failure(429, "busy"),
    answers.failure(429, "busy", retry_after=0.02),
    answers.failure(500, "oops"),
    answers.failure(503, "busy", headers={"retry-after-ms": "5"}),
    answers.failure(529, "overloaded"),
    answers.failure(400, "try again", headers={"x-should-retry": "true"}),
    answers.raw('{"choices": [', content_type="application/json"),
    answers.raw("{}", content_type="application/json"),
    answers.raw("", content_type="application/json"),
    answers.raw("null", content_type="application/json"),
    answers.nothing(),
    answers.cut(answers.text("half an answer")),
]


@pytest.mark.parametrize(("answer", "kind", "error_type", "words"), FINAL, ids=lambda v: str(v)[:30])
async def test_an_error_that_will_not_pass_ends_the_run_at_once(
    answer: AnswerLike, kind: str, error_type: str, words: str, endpoint: StartEndpoint, client: Callable[[], Any]
):
    one = endpoint(answer)
    result = await BaseAgent("A", "a", client=client()).run("go")
    assert len(one.requests) == 1
    assert (result.success, result.stop_reason) == (False, "model_error")
    assert type(result.exception).__name__ == kind
    assert result.metadata["error_type"] == result.metadata["reason"] == error_type
    assert words in str(result.error)
    assert result.content == result.error == result.metadata["error"]
    assert_continuable(result)


@pytest.mark.parametrize("answer", PASSING, ids=lambda a: f"{a.status} {a.wire} {a.body or dict(a.headers)}"[:40])
async def test_an_error_that_may_pass_is_tried_again(
    answer: AnswerLike, endpoint: StartEndpoint, client: Callable[[], Any]
):
    one = endpoint([answer, answer, "there you are"])
    retries: list[RetryScheduled] = []
    agent = BaseAgent(
        "A", "a", client=client(), observers=[lambda e: retries.append(e) if isinstance(e, RetryScheduled) else None]
    )
    result = await agent.run("go")
    assert result.content == "there you are"
    assert len(one.requests) == result.usage.requests == 3
    assert [retry.attempt for retry in retries] == [1, 2]


@pytest.mark.parametrize("retries", [0, 2])
async def test_retries_are_bounded_and_all_ours(retries: int, endpoint: StartEndpoint, client: Callable[[], Any]):
    one = endpoint(lambda _: answers.failure(500, "oops"))
    result = await BaseAgent("A", "a", client=client()).run("go", max_retries=retries)
    assert len(one.requests) == 1 + retries
    assert type(result.exception).__name__ == "ServerError"
    assert result.exception is not None
    assert result.exception.status == 500


@pytest.mark.parametrize("name", ["retry-after", "Llm_provider-Retry-After"])
async def test_retry_after_is_obeyed(endpoint: StartEndpoint, client: Callable[[], Any], name: str):
    one = endpoint([answers.failure(429, "slow down", headers={name: "0.3"}), "ok"])
    assert (await BaseAgent("A", "a", client=client()).run("go")).success
    assert one.requests[1].at - one.requests[0].at >= 0.3


async def test_an_empty_reply_is_asked_again_and_a_refusal_ends_the_run(endpoint: StartEndpoint):
    one = endpoint([answers.empty(), answers.text(""), "words"])
    result = await BaseAgent("A", "a").run("go")
    assert (result.content, len(one.requests), result.metadata["iterations"]) == ("words", 3, 1)

    one = endpoint(lambda _: answers.empty())
    result = await BaseAgent("A", "a").run("go", max_retries=2)
    assert len(one.requests) == 3
    assert (result.stop_reason, result.metadata["reason"]) == ("no_content", "no_content_after_retries")

    one = endpoint(lambda _: answers.refusal("I would rather not"))
    result = await BaseAgent("A", "a").run("go")
    assert (result.stop_reason, result.metadata["reason"], result.error) == (
        "refusal", "refusal", "I would rather not",
    )  # fmt: skip
    assert len(one.requests) == 1
    assert_continuable(result)


async def test_a_reply_that_asks_for_tools_for_ever_ends_after_the_last_iteration(endpoint: StartEndpoint):
    one = endpoint(lambda _: answers.call("again"))
    agent = BaseAgent("A", "a").add_tool(lambda: "more", name="again")
    result = await agent.run("go", 3)
    assert len(one.requests) == 3
    assert (result.stop_reason, result.metadata["reason"]) == ("max_iterations", "max_iterations_reached")
    assert result.metadata["iterations"] == 3
    assert len(result.tool_results) == 3
    assert_continuable(result)
    assert (await agent.run("go")).metadata["iterations"] == 10


async def test_unknown_fields_and_poor_tool_calls_of_an_endpoint_do_no_harm(endpoint: StartEndpoint):
    poor = answers.calls(
        answers.call("add", '{"a": 1}', id=""),
        answers.call("add", '{"a": 2}', id="same"),
        answers.call("add", "", id="same"),
        text="thinking aloud",
        extra={"service_tier": "x", "choices_v2": [1]},
        message_extra={"reasoning_content": "hm", "annotations": [], "audio": None, "function_call": None},
    )
    endpoint([poor, "done"])
    result = await BaseAgent("A", "a").add_tool(lambda a=0: a, name="add").run("go")
    assert result.content == "done"
    assert [call.content for call in result.tool_results] == [1, 2, 0]
    assert set(result.messages[1]) == {"role", "content", "tool_calls", "reasoning_content"}
    assert_continuable(result)


async def test_an_answer_cut_at_the_token_limit_is_kept_with_a_warning(endpoint: StartEndpoint):
    endpoint(answers.text("half a sent", finish_reason="length"))
    result = await BaseAgent("A", "a", max_tokens=3).run("go")
    assert result.content == "half a sent"
    assert any("token limit" in warning for warning in result.warnings)


async def test_without_a_key_the_result_says_what_to_do():
    result = await BaseAgent("A", "a").run("go")
    assert type(result.exception).__name__ == "MissingCredentials"
    assert "OPENAI_API_KEY" in str(result.error)
    assert result.messages == [{"role": "user", "content": "go"}]


@pytest.mark.parametrize(
    ("url", "words"),
    [
        ("http://127.0.0.1:1/v1", "http://127.0.0.1:1"),
        ("not a url", "base URL cannot be used"),
        ("ftp://127.0.0.1/v1", "base URL cannot be used"),
        ("http://127.0.0.1:99999/v1", "base URL cannot be used"),
    ],
)
async def test_a_wrong_base_url_is_named(url: str, words: str, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("OPENAI_BASE_URL", url)
    monkeypatch.setenv("OPENAI_API_KEY", "sk-test")
    result = await BaseAgent("A", "a").run("go", max_retries=1)
    assert type(result.exception).__name__ == "ConnectionFailed"
    assert words in str(result.error)


@pytest.mark.parametrize("text", ["", "x" * 2_000_000, "lone \ud800 surrogate", "NUL \x00 and \u2028"], ids=len)
async def test_odd_and_huge_inputs_reach_the_endpoint(text: str, endpoint: StartEndpoint, client: Callable[[], Any]):
    one = endpoint("ok")
    result = await BaseAgent("A", "a", client=client()).run(text)
    assert result.success
    assert one.requests[0].body["messages"][-1]["content"] == text.replace("\ud800", "\ufffd")
    assert_continuable(result)


async def test_a_failed_run_is_continued_where_it_stopped(endpoint: StartEndpoint):
    agent = BaseAgent("A", "a").add_tool(lambda: 1, name="one")
    endpoint(calls_then(answers.failure(400, "no"), answers.call("one")))
    failed = await agent.run("go")
    assert not failed.success
    one = endpoint("now it works")
    result = await agent.run("try again", messages=failed.messages)
    assert result.content == "now it works"
    assert [m["role"] for m in one.requests[0].body["messages"]] == ["system", "user", "assistant", "tool", "user"]
    assert failed.messages == result.messages[:3]


async def test_the_debug_log_tells_the_run_and_never_the_key(
    endpoint: StartEndpoint,
    caplog: pytest.LogCaptureFixture,
    client: Callable[[], Any],
    monkeypatch: pytest.MonkeyPatch,
):
    monkeypatch.setenv("OPENAI_API_KEY", "sk-very-secret")
    one = endpoint([answers.failure(500, "bad key sk-very-secret"), answers.call("one"), "done"])
    monkeypatch.setenv("OPENAI_API_KEY", "sk-very-secret")
    with caplog.at_level(logging.DEBUG):
        result = await BaseAgent("A", "a", client=client()).add_tool(lambda: 1, name="one").run("go")
    assert result.content == "done"
    assert one.requests[0].headers["authorization"] == "Bearer sk-very-secret"
    ours = "\n".join(record.getMessage() for record in caplog.records if record.name == "fractal")
    for kind in ["run_started", "model_requested", "retry_scheduled", "tool_started", "tool_finished", "run_finished"]:
        assert kind in ours
    assert "sk-very-secret" not in caplog.text
