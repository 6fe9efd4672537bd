"""Agents as models: OpenAI's own client talks to them, on a real server."""

from __future__ import annotations

import json
import re
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import anyio
import httpx2
import openai
import pytest
from fastapi import Depends, FastAPI, HTTPException
from pydantic import BaseModel

from fractal import BaseAgent, InvalidArguments, Limits, Refused, RunContext, tool
from fractal.serving import ServedRuns, agent_router, serving_lifespan
from fractal.serving._openai import answering
from fractal.serving._openai.asked import chat_asked, response_asked
from fractal.serving._openai.faults import Fault
from fractal.serving.openai_routes import openai_router
from fractal.serving.registry import OnDisconnect
from fractal.testing import Endpoint, ScriptedModel, answers
from tests.on_uvicorn import on_uvicorn
from tests.visits import Visit, get, post

StartEndpoint = Callable[..., Endpoint]
HI: Any = [{"role": "user", "content": "hi"}]
USAGE = (7, 3)


@tool
async def look(what: str) -> str:
    """Look."""
    return f"saw {what}"


def agent_of(*script: Any, name: str = "Guide", **options: Any) -> BaseAgent:
    return BaseAgent(name, "You guide.", client=ScriptedModel(list(script)), **options)


@contextmanager
def served(agents: Any, **options: Any) -> Iterator[openai.OpenAI]:
    app = FastAPI()
    app.include_router(openai_router(agents, **options))
    with on_uvicorn(app) as url, client_of(url) as client:
        yield client


def client_of(url: str) -> openai.OpenAI:
    http = openai.DefaultHttpxClient(trust_env=False)
    return openai.OpenAI(base_url=f"{url}/v1", api_key="none", http_client=http, max_retries=0)


def text_of(chunks: Any) -> str:
    return "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)


# ---- chat completions


def test_the_client_gets_an_answer_with_what_it_used():
    with served(agent_of(answers.text("hello", usage=USAGE))) as client:
        answer = client.chat.completions.create(model="Guide", messages=HI)
    assert (answer.choices[0].message.content, answer.choices[0].finish_reason) == ("hello", "stop")
    assert (answer.model, answer.object) == ("Guide", "chat.completion")
    assert answer.usage is not None
    assert (answer.usage.prompt_tokens, answer.usage.completion_tokens, answer.usage.total_tokens) == (7, 3, 10)


def test_a_stream_is_the_answer_in_pieces_and_usage_comes_on_request(endpoint: StartEndpoint):
    endpoint(answers.text("one two three", usage=USAGE, chunk_delay=0.01))
    with served(BaseAgent("Guide", "g")) as client:
        plain = list(client.chat.completions.create(model="Guide", messages=HI, stream=True))
        counted = list(
            client.chat.completions.create(
                model="Guide", messages=HI, stream=True, stream_options={"include_usage": True}
            )
        )
    assert text_of(plain) == text_of(counted) == "one two three"
    assert len(plain) >= 4
    assert len({chunk.id for chunk in plain}) == 1
    assert plain[0].choices[0].delta.role == "assistant"
    assert plain[-1].choices[0].finish_reason == "stop"
    assert all("usage" not in chunk.model_fields_set for chunk in plain)
    assert [chunk.usage for chunk in counted[:-1]] == [None] * (len(counted) - 1)
    assert counted[-1].usage is not None
    assert counted[-1].usage.total_tokens == 10
    assert counted[-1].choices == []


async def test_the_awaiting_client_works_too(endpoint: StartEndpoint):
    endpoint("one two three")
    app = FastAPI()
    app.include_router(openai_router(BaseAgent("Guide", "g")))
    with on_uvicorn(app) as url:
        http = openai.DefaultAsyncHttpxClient(trust_env=False)
        async with openai.AsyncOpenAI(base_url=f"{url}/v1", api_key="none", http_client=http) as client:
            whole = await client.chat.completions.create(model="Guide", messages=HI)
            stream = await client.chat.completions.create(model="Guide", messages=HI, stream=True)
            text = "".join([chunk.choices[0].delta.content or "" async for chunk in stream])
            answer = await client.responses.create(model="Guide", input="hi")
            assert [each.id async for each in client.models.list()] == ["Guide"]
    assert whole.choices[0].message.content == text == answer.output_text == "one two three"


def test_the_messages_are_the_history_and_the_last_is_the_question(endpoint: StartEndpoint):
    one = endpoint("well")
    history: Any = [
        {"role": "system", "content": "be brief"},
        {"role": "user", "content": "hi"},
        {"role": "assistant", "content": "hello"},
        {"role": "user", "content": [{"type": "text", "text": "and?"}]},
    ]
    with served(BaseAgent("Guide", "You guide.")) as client:
        client.chat.completions.create(model="Guide", messages=history)
    sent = one.requests[0].body["messages"]
    assert sent[0] == {"role": "system", "content": "You guide."}
    assert sent[1:] == history


def test_model_says_which_agent_is_asked():
    with served({"a": agent_of("I am a"), "b": agent_of("I am b")}) as client:
        said = [client.chat.completions.create(model=name, messages=HI).choices[0].message.content for name in "ab"]
        assert [each.id for each in client.models.list()] == ["a", "b"]
        assert client.models.retrieve("b").owned_by == "fractal"
        with pytest.raises(openai.NotFoundError, match="only a, b") as caught:
            client.chat.completions.create(model="c", messages=HI)
        with pytest.raises(openai.NotFoundError):
            client.models.retrieve("c")
    assert said == ["I am a", "I am b"]
    assert (caught.value.code, caught.value.param) == ("model_not_found", "model")


def test_tool_calls_are_made_and_not_shown(endpoint: StartEndpoint):
    endpoint([answers.calls(answers.call("look", {"what": "x"}), text="Let me look."), "It is x."] * 2)
    with served(BaseAgent("Guide", "g").add_tool(look)) as client:
        plain = client.chat.completions.create(model="Guide", messages=HI)
        streamed = list(client.chat.completions.create(model="Guide", messages=HI, stream=True))
    assert plain.choices[0].message.content == "It is x."
    assert plain.choices[0].message.tool_calls is None
    assert text_of(streamed) == "Let me look.\n\nIt is x."
    assert all(not chunk.choices[0].delta.tool_calls for chunk in streamed)


def test_delegates_work_unseen(endpoint: StartEndpoint):
    endpoint([answers.call("delegate_to_below", {"query": "why?"}), "the deep reason", "because"])
    agent = BaseAgent("Guide", "g").register_delegate(BaseAgent("Below", "b"))
    with served(agent) as client:
        assert text_of(client.chat.completions.create(model="Guide", messages=HI, stream=True)) == "because"


class Trip(BaseModel):
    city: str


def test_a_typed_answer_comes_as_json_in_one_piece():
    script = ['{"city": 1}', '{"city": "Rome"}']
    with served(agent_of(*script, *script, output_type=Trip, output_mode="prompt")) as client:
        plain = client.chat.completions.create(model="Guide", messages=HI)
        streamed = text_of(client.chat.completions.create(model="Guide", messages=HI, stream=True))
    assert json.loads(plain.choices[0].message.content or "") == json.loads(streamed) == {"city": "Rome"}


def test_what_a_validator_makes_of_an_answer_comes_at_last(endpoint: StartEndpoint):
    endpoint("draft")
    agent = BaseAgent("Guide", "g")
    agent.output_validator(lambda answer: answer.replace("draft", "final"))
    with served(agent) as client:
        assert text_of(client.chat.completions.create(model="Guide", messages=HI, stream=True)) == "draft\n\nfinal"


def test_a_terminating_tool_gives_the_answer():
    @tool(terminate=True)
    def total() -> dict[str, int]:
        """Sum up."""
        return {"sum": 4}

    with served(agent_of(*[answers.call("total")] * 2).add_tool(total)) as client:
        assert text_of(client.chat.completions.create(model="Guide", messages=HI, stream=True)) == '{"sum":4}'
        assert client.chat.completions.create(model="Guide", messages=HI).choices[0].message.content == '{"sum":4}'


@pytest.mark.parametrize("is_streamed", [False, True])
def test_a_refusal_is_one(is_streamed: bool):
    with served(agent_of(Refused("not that"))) as client:
        if is_streamed:
            chunks = list(client.chat.completions.create(model="Guide", messages=HI, stream=True))
            assert [chunk.choices[0].delta.refusal for chunk in chunks][1] == "not that"
        else:
            message = client.chat.completions.create(model="Guide", messages=HI).choices[0].message
            assert (message.content, message.refusal) == (None, "not that")


# ---- responses


def test_a_response_is_text_in_and_text_out(endpoint: StartEndpoint):
    one = endpoint(answers.text("one two", usage=USAGE))
    with served(BaseAgent("Guide", "You guide.")) as client:
        first = client.responses.create(model="Guide", input="hi", instructions="be brief")
        turns: Any = [{"role": "user", "content": "hi"}, *first.output, {"role": "user", "content": "and?"}]
        second = client.responses.create(model="Guide", input=turns)
    assert (first.output_text, first.status) == ("one two", "completed")
    assert first.usage is not None
    assert first.usage.total_tokens == 10
    assert second.output_text == "one two"
    assert one.requests[0].body["messages"][1:] == [{"role": "system", "content": "be brief"}, *HI]
    assert [each["content"] for each in one.requests[1].body["messages"][1:]] == ["hi", "one two", "and?"]


def test_a_response_is_streamed_as_the_client_knows_it(endpoint: StartEndpoint):
    endpoint(answers.text("one two three", usage=USAGE, chunk_delay=0.01))
    with served(BaseAgent("Guide", "g")) as client:
        with client.responses.stream(model="Guide", input="hi") as stream:
            events = list(stream)
            final = stream.get_final_response()
        events_of_create = list(client.responses.create(model="Guide", input="hi", stream=True))
    assert final.output_text == "one two three"
    assert final.usage is not None
    assert final.usage.output_tokens == 3
    kinds = [event.type for event in events]
    assert kinds[:4] == [
        "response.created",
        "response.in_progress",
        "response.output_item.added",
        "response.content_part.added",
    ]
    assert kinds[-1] == "response.completed"
    assert [event.sequence_number for event in events_of_create] == list(range(len(events_of_create)))


def test_images_reach_the_model_in_the_form_of_chats(endpoint: StartEndpoint):
    one = endpoint("a cat")
    image = {"type": "input_image", "image_url": "https://pictures.test/cat", "detail": "low"}
    turn: Any = [{"role": "user", "content": [{"type": "input_text", "text": "what?"}, image]}]
    with served(BaseAgent("Guide", "g")) as client:
        client.responses.create(model="Guide", input=turn)
    text, picture = one.requests[0].body["messages"][1]["content"]
    assert text == {"type": "text", "text": "what?"}
    assert picture == {"type": "image_url", "image_url": {"url": "https://pictures.test/cat", "detail": "low"}}


def test_a_streamed_response_that_fails_late_says_so(endpoint: StartEndpoint):
    endpoint([answers.calls(answers.call("look", {"what": "x"}), text="Let me look."), answers.failure(400, "no")])
    with served(BaseAgent("Guide", "g").add_tool(look)) as client:
        last = list(client.responses.create(model="Guide", input="hi", stream=True))[-1]
    assert last.type == "response.failed"
    assert last.response.error is not None
    assert last.response.error.code == "server_error"
    assert last.response.output_text == "Let me look."


# ---- what is refused

FUNCTION = {"type": "function", "function": {"name": "f", "parameters": {"type": "object", "properties": {}}}}


@pytest.mark.parametrize(
    ("path", "given", "param"),
    [
        ("chat/completions", {"tools": [FUNCTION]}, "tools"),
        ("chat/completions", {"functions": [{"name": "f"}]}, "functions"),
        ("chat/completions", {"tool_choice": "required"}, "tool_choice"),
        ("chat/completions", {"web_search_options": {}}, "web_search_options"),
        ("chat/completions", {"n": 2}, "n"),
        ("chat/completions", {"logprobs": True}, "logprobs"),
        ("chat/completions", {"response_format": {"type": "json_object"}}, "response_format"),
        ("chat/completions", {"modalities": ["text", "audio"]}, "modalities"),
        ("chat/completions", {"stream": "yes"}, "stream"),
        ("chat/completions", {"stream_options": [1]}, "stream_options"),
        ("chat/completions", {"messages": None}, "messages"),
        ("chat/completions", {"messages": []}, "messages"),
        ("chat/completions", {"messages": ["hi"]}, "messages[0]"),
        ("chat/completions", {"messages": [*HI, {"role": "nobody", "content": "x"}]}, "messages[1]"),
        ("chat/completions", {"messages": [*HI, {"role": "assistant", "content": "x"}]}, "messages[1]"),
        ("chat/completions", {"messages": [{"role": "user", "content": ""}]}, "messages[0]"),
        ("chat/completions", {"model": None}, "model"),
        ("responses", {"tools": [{"type": "web_search"}]}, "tools"),
        ("responses", {"previous_response_id": "resp_1"}, "previous_response_id"),
        ("responses", {"conversation": "conv_1"}, "conversation"),
        ("responses", {"background": True}, "background"),
        ("responses", {"text": {"format": {"type": "json_schema"}}}, "text"),
        ("responses", {"include": ["message.output_text.logprobs"]}, "include"),
        ("responses", {"instructions": 1}, "instructions"),
        ("responses", {"input": None}, "input"),
        ("responses", {"input": [{"type": "item_reference", "id": "x"}]}, "input[0]"),
        ("responses", {"input": [{"role": "user", "content": [{"type": "input_file"}]}]}, "input[0].content[0]"),
    ],
)
def test_what_cannot_be_done_is_refused_by_name(path: str, given: dict[str, Any], param: str):
    read, asked = (response_asked, {"input": "hi"}) if path == "responses" else (chat_asked, {"messages": HI})
    with pytest.raises(Fault) as caught:
        read(json.dumps({"model": "Guide", **asked, **given}).encode(), {"Guide": agent_of()})
    assert (caught.value.status, caught.value.kind, caught.value.param) == (400, "invalid_request_error", param)


@pytest.fixture
def refusing() -> Iterator[openai.OpenAI]:
    with served(agent_of(), max_body=1000) as client:
        yield client


def test_the_client_says_why_tools_are_refused(refusing: openai.OpenAI):
    with pytest.raises(openai.BadRequestError, match="the agent has tools of its own") as caught:
        refusing.chat.completions.create(model="Guide", messages=HI, tools=[FUNCTION])  # type: ignore[list-item]
    assert (caught.value.code, caught.value.param) == ("unsupported_parameter", "tools")


@pytest.mark.parametrize("body", [b"", b"{", b"[]", b'"x"', b"\xff\xfe", b"[" * 900])
def test_a_body_that_is_no_object_is_refused(body: bytes):
    with pytest.raises(Fault, match="the body of the request is no") as caught:
        chat_asked(body, {"Guide": agent_of()})
    assert caught.value.status == 400


def test_a_body_that_is_too_large_is_refused(refusing: openai.OpenAI):
    with pytest.raises(openai.APIStatusError) as caught:
        refusing.chat.completions.create(model="Guide", messages=[{"role": "user", "content": "x" * 2000}])
    assert (caught.value.status_code, caught.value.code) == (413, "too_long")


def test_parameters_without_effect_are_named(endpoint: StartEndpoint):
    one = endpoint("well")
    with served(BaseAgent("Guide", "g")) as client:
        raw = client.chat.completions.with_raw_response.create(
            model="Guide", messages=HI, temperature=1.5, user="u", tools=[], extra_body={"odd\r\nname": 1, "stop": None}
        )
        whole: Any = {"format": {"type": "text"}}
        given: Any = [
            {"include": ["reasoning.encrypted_content"], "text": {**whole, "verbosity": "low"}, "truncation": "auto"},
            {"text": whole, "include": None},
        ]
        answered = [client.responses.with_raw_response.create(model="Guide", input="hi", **each) for each in given]
    named = [{*filter(None, each.headers.get("x-fractal-ignored", "").split(", "))} for each in answered]
    assert named == [{"include", "text", "truncation"}, set()]
    assert raw.headers["x-fractal-ignored"] == "temperature, user"
    assert "temperature" not in one.requests[0].body


@pytest.mark.parametrize("given", [{}, [], 3, {"a": "no agent"}, {"": agent_of()}])
def test_only_agents_with_names_are_served(given: Any):
    with pytest.raises(InvalidArguments):
        openai_router(given)


# ---- errors of runs


@pytest.mark.parametrize("is_streamed", [False, True])
@pytest.mark.parametrize(
    ("answer", "status", "code"),
    [
        (answers.failure(429, "slow down", retry_after=7), 429, "rate_limit_exceeded"),
        (answers.failure(503, "the secret host db.internal failed"), 502, "model_error"),
        (answers.failure(401, "wrong key sk-secret"), 502, "model_error"),
    ],
    ids=["busy", "broken", "no key"],
)
def test_an_error_before_the_first_word_is_a_status_and_not_asked_again(
    answer: Any, status: int, code: str, is_streamed: bool, endpoint: StartEndpoint
):
    one = endpoint(answer)
    with served(BaseAgent("Guide", "g", max_retries=0)) as client, pytest.raises(openai.APIStatusError) as caught:
        client.with_options(max_retries=2).chat.completions.create(model="Guide", messages=HI, stream=is_streamed)
    assert (caught.value.status_code, caught.value.code) == (status, code)
    assert len(one.requests) == 1
    assert "secret" not in str(caught.value)
    assert caught.value.response.headers["x-run-id"].startswith("run_")
    assert caught.value.response.headers.get("retry-after") == ("7" if status == 429 else None)


@pytest.mark.parametrize("is_streamed", [False, True])
def test_a_run_that_somebody_has_cancelled_is_not_asked_again(is_streamed: bool):
    asked = list[str]()

    @tool
    async def work(ctx: RunContext) -> None:
        """Work."""
        asked.append(ctx.run_id)
        run = runs.live(ctx.run_id)
        assert run is not None
        run.cancel()
        await anyio.sleep_forever()

    runs = ServedRuns(agent_of(*[answers.call("work")] * 3).add_tool(work))
    with served(runs) as client, pytest.raises(openai.ConflictError):
        client.with_options(max_retries=2).chat.completions.create(model="Guide", messages=HI, stream=is_streamed)
    assert len(asked) == 1


def finished_or_failed() -> Iterator[None]:
    yield
    raise HTTPException(418, "no tea")


@pytest.mark.parametrize(
    ("path", "asked"), [("/v1/chat/completions", {"messages": HI}), ("/v1/responses", {"input": "hi"})]
)
@pytest.mark.parametrize("is_streamed", [False, True])
async def test_a_request_that_fails_before_its_answer_is_sent_begins_no_run(path: str, asked: Any, is_streamed: bool):
    runs = ServedRuns(agent_of("hi"))
    app = FastAPI()
    app.include_router(openai_router(runs), dependencies=[Depends(finished_or_failed, scope="function")])
    assert (await post(app, path, {"model": "Guide", "stream": is_streamed, **asked})).status == 418
    assert await runs.page(None, None, 9) == []


def test_deadlines_hold():
    @tool
    async def sleep() -> None:
        """Sleep."""
        await anyio.sleep(30)

    agent = agent_of(answers.call("sleep")).add_tool(sleep)
    timed_out = pytest.raises(openai.APIStatusError, match=r"did not finish in time")
    with served(agent, timeout=0.1) as client, timed_out as caught:
        client.chat.completions.create(model="Guide", messages=HI)
    assert (caught.value.status_code, caught.value.code) == (504, "deadline")


def test_limits_hold():
    agent = agent_of(answers.call("look", {"what": "x"})).add_tool(look)
    spent = pytest.raises(openai.APIStatusError, match="used up what it may use")
    with served(agent, limits=Limits(max_requests=1)) as client, spent as caught:
        client.chat.completions.create(model="Guide", messages=HI)
    assert (caught.value.status_code, caught.value.code) == (503, "budget")


def test_a_stream_that_fails_after_its_first_word_says_so(endpoint: StartEndpoint):
    endpoint([answers.calls(answers.call("look", {"what": "x"}), text="Let me look."), answers.failure(400, "secret")])
    with served(BaseAgent("Guide", "g").add_tool(look)) as client:
        stream = client.chat.completions.create(model="Guide", messages=HI, stream=True)
        with pytest.raises(openai.APIError, match="the model could not answer"):
            list(stream)


@pytest.mark.parametrize("is_streamed", [False, True])
@pytest.mark.parametrize("returned", ["no result", LookupError("the secret word")], ids=["wrong", "raises"])
def test_an_agent_whose_own_run_is_broken_is_a_500_without_its_reason(returned: object, is_streamed: bool):
    class Broken(BaseAgent):
        async def run(self, user_input: object, **options: Any) -> Any:
            if isinstance(returned, Exception):
                raise returned
            return returned

    with served(Broken("Guide", "g")) as client, pytest.raises(openai.InternalServerError) as caught:
        client.chat.completions.create(model="Guide", messages=HI, stream=is_streamed)
    assert not {"Broken", "secret"} & {*re.findall(r"\w+", str(caught.value))}


# ---- time


def test_a_stream_of_long_work_begins_before_its_first_word_and_is_kept_alive(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(answering, "PATIENCE", 0.02)
    monkeypatch.setattr(answering, "KEEP_ALIVE", 0.02)
    go_on = threading.Event()

    @tool
    def work() -> None:
        """Work."""
        assert go_on.wait(10)

    with served(agent_of(answers.call("work"), "done").add_tool(work)) as client:
        body = {"model": "Guide", "messages": HI, "stream": True}
        with httpx2.stream("POST", f"{client.base_url}chat/completions", json=body, trust_env=False) as answer:
            seen = ""
            for piece in answer.iter_text():
                seen += piece
                if seen.count(": the run goes on") == 2:
                    go_on.set()
    assert seen.endswith("data: [DONE]\n\n")


@pytest.mark.parametrize("is_streamed", [False, True])
def test_a_client_that_goes_away_cancels(is_streamed: bool):
    began, ended = threading.Event(), threading.Event()

    @tool
    async def work() -> None:
        """Work."""
        try:
            began.set()
            await anyio.sleep(30)
        finally:
            ended.set()

    with served(agent_of(answers.call("work")).add_tool(work)) as client:
        body = json.dumps({"model": "Guide", "messages": HI, "stream": is_streamed}).encode()
        kind = f"Content-Type: application/json\r\nContent-Length: {len(body)}"
        head = f"POST /v1/chat/completions HTTP/1.1\r\nHost: here\r\n{kind}\r\n\r\n".encode()
        with socket.create_connection((client.base_url.host, client.base_url.port or 0), 10) as connection:
            connection.sendall(head + body)
            assert began.wait(5)
            assert not ended.is_set()
        assert ended.wait(2)


def test_a_client_that_breaks_off_a_stream_closes_the_connection_to_the_model(endpoint: StartEndpoint):
    one = endpoint(answers.text("word " * 500, chunk_delay=0.02))
    with served(BaseAgent("Guide", "g")) as client:
        stream = client.chat.completions.create(model="Guide", messages=HI, stream=True)
        for _ in range(3):
            next(stream)
        stream.close()
        one.wait_for_disconnects(1)


# ---- on both backends, without a server


@tool
async def who(ctx: RunContext[str]) -> str:
    """Tell who asks."""
    return ctx.deps


async def test_tools_find_what_the_application_gives_and_runs_have_their_owner():
    runs = ServedRuns(agent_of(answers.call("who"), "well").add_tool(who))
    app = FastAPI()
    app.include_router(openai_router(runs, owner=lambda: "ann", deps=lambda: "a friend"))
    app.include_router(agent_router(runs, owner=lambda x_user: x_user), prefix="/api")
    visit = await post(app, "/v1/chat/completions", {"model": "Guide", "messages": HI})
    run_id = visit.headers["x-run-id"]
    assert (await get(app, f"/api/runs/{run_id}?x_user=bob")).status == 404
    kept = (await get(app, f"/api/runs/{run_id}?x_user=ann")).json
    told = [each["content"] for each in kept["result"]["messages"] if each["role"] == "tool"]
    assert told == ["a friend"]


@pytest.mark.parametrize("is_streamed", [False, True])
@pytest.mark.parametrize("on_disconnect", ["cancel", "detach"])
async def test_a_client_that_leaves_ends_its_run_on_each_backend(on_disconnect: OnDisconnect, is_streamed: bool):
    began, ended = anyio.Event(), anyio.Event()

    @tool
    async def work() -> None:
        """Work."""
        try:
            began.set()
            await anyio.sleep_forever()
        finally:
            ended.set()

    runs = ServedRuns(agent_of(answers.call("work")).add_tool(work), on_disconnect=on_disconnect)
    app = FastAPI()
    app.include_router(openai_router(runs))
    visit = Visit("POST", "/v1/chat/completions", json={"model": "Guide", "messages": HI, "stream": is_streamed})
    with anyio.fail_after(5):
        async with serving_lifespan(runs)(app), visit.going_on(app):
            await began.wait()
            visit.leave()
            await ended.wait()


async def test_a_call_that_needs_approval_is_denied_where_nobody_can_be_asked():
    @tool(requires_approval=True)
    def pay() -> str:
        """Pay."""
        raise AssertionError("nobody has approved of that")

    model = ScriptedModel([answers.call("pay"), "well"])
    app = FastAPI()
    app.include_router(openai_router(BaseAgent("Guide", "g", client=model).add_tool(pay)))
    with anyio.fail_after(5):
        visit = await post(app, "/v1/chat/completions", {"model": "Guide", "messages": HI})
    assert visit.json["choices"][0]["message"]["content"] == "well"
    assert "there is nobody to approve it" in model.requests[1].messages[-1]["content"]


async def test_a_run_that_finds_no_room_is_a_429_that_may_be_sent_again():
    runs = ServedRuns(agent_of(answers.call("wait"), "well"), max_concurrency=1, max_queue=0)
    began, go_on = anyio.Event(), anyio.Event()

    async def wait() -> None:
        """Wait."""
        began.set()
        await go_on.wait()

    runs.agents["Guide"].add_tool(wait)
    app = FastAPI()
    app.include_router(openai_router(runs))
    first = Visit("POST", "/v1/chat/completions", json={"model": "Guide", "messages": HI})
    with anyio.fail_after(5):
        async with first.going_on(app):
            await began.wait()
            second = await post(app, "/v1/chat/completions", {"model": "Guide", "messages": HI})
            go_on.set()
    assert (first.status, second.status) == (200, 429)
    assert second.json["error"]["type"] == "rate_limit_error"
    assert "x-should-retry" not in second.headers
