"""The HTTP endpoint of the test tools: what clients see of it, and what it sees of them."""

import http.client
import json
import socket
import threading
import urllib.parse
from collections.abc import Iterator
from contextlib import closing, contextmanager
from typing import Any

import anyio
import anyio.to_thread
import httpx2
import openai
import pytest

from fractal.testing import answers, check_messages
from fractal.testing.endpoint import Endpoint, EndpointError, RecordedRequest

HI = [{"role": "user", "content": "hi"}]


@contextmanager
def connected(endpoint: Endpoint) -> Iterator[http.client.HTTPConnection]:
    address = urllib.parse.urlsplit(endpoint.url)
    with closing(http.client.HTTPConnection(address.hostname or "", address.port, timeout=5)) as connection:
        yield connection


def send(connection: http.client.HTTPConnection, path: str = "/v1/chat/completions", **body: Any) -> None:
    given = {"model": "m", "messages": HI, **body}
    connection.request("POST", path, json.dumps(given), {"Content-Type": "application/json"})


def post(endpoint: Endpoint, path: str = "/v1/chat/completions", **body: Any) -> tuple[int, dict[str, Any]]:
    with connected(endpoint) as connection:
        send(connection, path, **body)
        response = connection.getresponse()
        return response.status, json.loads(response.read())


def client(endpoint: Endpoint, **options: Any) -> openai.AsyncOpenAI:
    return openai.AsyncOpenAI(base_url=endpoint.url, **{"api_key": "any", "max_retries": 0, **options})


def test_a_text_is_answered_as_a_chat_completion() -> None:
    with Endpoint(["hi there"]) as endpoint:
        status, completion = post(endpoint, model="gpt-test")

    assert status == 200
    assert completion["object"] == "chat.completion"
    assert completion["model"] == "gpt-test"
    assert completion["choices"][0]["message"] == {
        "role": "assistant",
        "content": "hi there",
        "refusal": None,
    }
    assert completion["choices"][0]["finish_reason"] == "stop"
    assert completion["usage"] == {"prompt_tokens": 10, "completion_tokens": 5, "total_tokens": 15}


def test_tool_calls_are_answered_with_ids_of_their_own_and_arguments_as_given() -> None:
    script = [answers.calls(answers.call("add", {"a": 1}), answers.call("add", '{"a": ', id="mine"))]
    with Endpoint(script) as endpoint:
        _, completion = post(endpoint)

    choice = completion["choices"][0]
    first, second = choice["message"]["tool_calls"]
    assert choice["finish_reason"] == "tool_calls"
    assert first["id"].startswith("call_")
    assert first["function"] == {"name": "add", "arguments": '{"a": 1}'}
    assert second == {"id": "mine", "type": "function", "function": {"name": "add", "arguments": '{"a": '}}


def test_unknown_fields_are_merged_into_the_completion_and_its_message() -> None:
    answer = answers.text("x", extra={"provider": "p"}, message_extra={"reasoning_content": "hm"})
    with Endpoint(answer) as endpoint:
        _, completion = post(endpoint)

    assert completion["provider"] == "p"
    assert completion["choices"][0]["message"]["reasoning_content"] == "hm"


def test_a_script_is_consumed_in_order_over_one_kept_connection() -> None:
    with (
        Endpoint(["one", answers.refusal("no"), answers.empty()]) as endpoint,
        connected(endpoint) as connection,
    ):
        messages = []
        for _ in range(3):
            send(connection)
            messages.append(json.load(connection.getresponse())["choices"][0]["message"])

        assert [message["content"] for message in messages] == ["one", None, None]
        assert messages[1]["refusal"] == "no"
        assert endpoint.connections_opened == 1
        assert endpoint.answers_left == 0


def test_a_used_up_script_is_answered_with_an_error_clients_do_not_retry() -> None:
    with Endpoint(["only"]) as endpoint:
        post(endpoint)
        status, body = post(endpoint)

    assert (status, body["error"]["code"]) == (400, "script_exhausted")


def test_a_function_answers_from_the_request() -> None:
    def shout(request: RecordedRequest) -> str:
        return str(request.body["messages"][-1]["content"]).upper()

    with Endpoint(shout) as endpoint:
        _, completion = post(endpoint)

    assert completion["choices"][0]["message"]["content"] == "HI"


def test_what_an_answer_function_raises_is_answered_500_and_raised_at_close() -> None:
    def broken(_: RecordedRequest) -> str:
        raise KeyError("lost")

    endpoint = Endpoint(broken).start()
    status, _ = post(endpoint)

    with pytest.raises(EndpointError, match="lost") as caught:
        endpoint.close()
    assert status == 500
    assert isinstance(caught.value.__cause__, KeyError)
    endpoint.close()


def test_a_failing_test_keeps_its_own_exception_and_notes_the_endpoints() -> None:
    with pytest.raises(ZeroDivisionError) as caught, Endpoint(lambda _: 1 / 0) as endpoint:  # type: ignore[arg-type,return-value]
        post(endpoint)
        raise ZeroDivisionError("of the test")

    assert caught.value.args == ("of the test",)
    assert any("the endpoint failed" in note for note in caught.value.__notes__)


def test_an_answer_of_the_wrong_type_is_refused_when_the_endpoint_is_made() -> None:
    with pytest.raises(TypeError, match="not 3"):
        Endpoint(["fine", 3])  # type: ignore[list-item]
    with pytest.raises(TypeError, match="item 1 is 'x'"):
        answers.as_answer([answers.call("a"), "x"])  # type: ignore[list-item]


def test_requests_are_recorded_as_they_arrived() -> None:
    with Endpoint() as endpoint:
        post(endpoint, "/v1/chat/completions?trace=1", temperature=0.5)
        endpoint.wait_for_requests(1)
        (request,) = endpoint.requests

    assert (request.method, request.path, request.query) == ("POST", "/v1/chat/completions", "trace=1")
    assert request.body["temperature"] == 0.5
    assert json.loads(request.raw) == request.body
    assert request.headers["content-type"] == "application/json"


@pytest.mark.anyio
async def test_openais_client_streams_a_text_with_its_usage() -> None:
    with Endpoint(answers.text("it rains  in Turin", chunk_delay=0.001)) as endpoint:
        async with client(endpoint) as model:
            stream = await model.chat.completions.create(
                model="m",
                messages=[{"role": "user", "content": "hi"}],
                stream=True,
                stream_options={"include_usage": True},
            )
            chunks = [chunk async for chunk in stream]
        await anyio.to_thread.run_sync(endpoint.wait_until_closed)

    pieces = [chunk.choices[0].delta.content for chunk in chunks if chunk.choices]
    assert [piece for piece in pieces if piece] == ["it ", "rains  ", "in ", "Turin"]
    assert [chunk.choices[0].finish_reason for chunk in chunks[-2:] if chunk.choices] == ["stop"]
    assert chunks[-1].usage is not None
    assert chunks[-1].usage.total_tokens == 15
    assert endpoint.disconnects == 0


@pytest.mark.anyio
async def test_openais_client_joins_streamed_tool_calls() -> None:
    made = (answers.call("add", {"a": 1}), answers.call("sub", {"b": 22}))
    with Endpoint(answers.calls(*made)) as endpoint:
        async with (
            client(endpoint) as model,
            model.chat.completions.stream(model="m", messages=[{"role": "user", "content": "hi"}]) as stream,
        ):
            completion = await stream.get_final_completion()

    calls = completion.choices[0].message.tool_calls or []
    assert [(call.id, call.function.name, call.function.arguments) for call in calls] == [
        (each.id, each.name, each.arguments) for each in made
    ]
    assert completion.choices[0].finish_reason == "tool_calls"


@pytest.mark.anyio
async def test_a_stream_that_is_cut_breaks_off_in_the_client() -> None:
    with Endpoint(answers.cut("one two three four")) as endpoint:
        async with client(endpoint) as model:
            stream = await model.chat.completions.create(
                model="m", messages=[{"role": "user", "content": "hi"}], stream=True
            )
            seen = []
            with pytest.raises((openai.APIConnectionError, httpx2.RemoteProtocolError)):
                async for chunk in stream:
                    seen.append(chunk.choices[0].delta.content)  # noqa: PERF401 - a comprehension loses all when it raises
            await stream.close()

    assert seen == [None, "one ", "two "]


@pytest.mark.anyio
async def test_openais_client_retries_a_429_after_the_time_it_names() -> None:
    with Endpoint([answers.failure(429, "slow down", retry_after=0.01), "at last"]) as endpoint:
        async with client(endpoint, max_retries=1) as model:
            completion = await model.chat.completions.create(model="m", messages=[{"role": "user", "content": "hi"}])

    assert completion.choices[0].message.content == "at last"
    assert len(endpoint.requests) == 2


def test_a_failure_carries_retry_after_and_an_error_object() -> None:
    with Endpoint([answers.failure(429, "slow down", code="rate_limit_exceeded", retry_after=2)]) as endpoint:
        response = httpx2.post(f"{endpoint.url}/chat/completions", json={"messages": HI})

    assert response.status_code == 429
    assert response.headers["retry-after"] == "2"
    assert response.json()["error"] == {
        "message": "slow down",
        "type": "invalid_request_error",
        "code": "rate_limit_exceeded",
        "param": None,
    }


def test_a_raw_body_is_sent_as_it_is() -> None:
    with Endpoint([answers.raw("<h1>Bad gateway</h1>", status=502)]) as endpoint:
        response = httpx2.post(f"{endpoint.url}/chat/completions", json={"messages": HI, "stream": True})

    assert (response.status_code, response.text) == (502, "<h1>Bad gateway</h1>")
    assert response.headers["content-type"] == "text/html"


def test_a_cut_answer_promises_its_length_and_sends_half() -> None:
    with Endpoint([answers.cut("x" * 100)]) as endpoint, connected(endpoint) as connection:
        send(connection)
        response = connection.getresponse()
        promised = int(response.headers["content-length"])
        with pytest.raises(http.client.IncompleteRead) as caught:
            response.read()
        endpoint.wait_until_closed()

    assert len(caught.value.partial) == promised // 2
    assert endpoint.disconnects == 0


def test_nothing_closes_the_connection_without_a_byte() -> None:
    with Endpoint([answers.nothing()]) as endpoint, connected(endpoint) as connection:
        send(connection)
        with pytest.raises(http.client.RemoteDisconnected):
            connection.getresponse()


@pytest.mark.parametrize("answer", [answers.hang(), answers.text("late", delay=60)], ids=["hang", "delay"])
def test_a_client_that_leaves_before_its_answer_is_noticed_at_once(answer: answers.Answer) -> None:
    with Endpoint(answer) as endpoint:
        with connected(endpoint) as connection:
            send(connection)
            endpoint.wait_for_requests(1)
            assert (endpoint.in_flight, endpoint.connections, endpoint.disconnects) == (1, 1, 0)
        endpoint.wait_for_disconnects(1)
        endpoint.wait_until_closed()

        assert (endpoint.in_flight, endpoint.connections, endpoint.disconnects) == (0, 0, 1)


@pytest.mark.anyio
async def test_a_cancelled_request_of_openais_client_is_a_disconnect() -> None:
    with Endpoint(answers.hang()) as endpoint:
        async with client(endpoint) as model, anyio.create_task_group() as tasks:

            async def ask() -> None:
                await model.chat.completions.create(model="m", messages=[{"role": "user", "content": "hi"}])

            tasks.start_soon(ask)
            await anyio.to_thread.run_sync(endpoint.wait_for_requests, 1)
            tasks.cancel_scope.cancel()
        await anyio.to_thread.run_sync(endpoint.wait_for_disconnects, 1)
        await anyio.to_thread.run_sync(endpoint.wait_until_closed)

    assert endpoint.disconnects == 1


def test_a_client_that_leaves_in_the_middle_of_a_stream_is_a_disconnect() -> None:
    with Endpoint(answers.text("one two three", chunk_delay=60)) as endpoint:
        with connected(endpoint) as connection:
            send(connection, stream=True)
            response = connection.getresponse()
            assert response.readline().startswith(b"data: ")
            response.close()
        endpoint.wait_for_disconnects(1)


def test_waits_time_out_and_say_how_far_it_came() -> None:
    with Endpoint() as endpoint:
        with pytest.raises(TimeoutError, match="2 requests, there are 0"):
            endpoint.wait_for_requests(2, timeout=0)
        with pytest.raises(TimeoutError, match="1 disconnects, there are 0"):
            endpoint.wait_for_disconnects(1, timeout=0)
        with connected(endpoint) as connection:
            send(connection)
            connection.getresponse().read()
            with pytest.raises(TimeoutError, match="there are 1"):
                endpoint.wait_until_closed(timeout=0)


async def ask_often(endpoint: Endpoint, count: int) -> list[int]:
    statuses: list[int] = []
    limits = httpx2.Limits(max_connections=None, max_keepalive_connections=None)
    async with httpx2.AsyncClient(limits=limits, timeout=30) as http, anyio.create_task_group() as tasks:

        async def ask() -> None:
            response = await http.post(f"{endpoint.url}/chat/completions", json={"messages": HI})
            statuses.append(response.status_code)

        for _ in range(count):
            tasks.start_soon(ask)
    return statuses


@pytest.mark.anyio
async def test_three_hundred_requests_at_once_are_each_answered_once() -> None:
    with Endpoint(["ok"] * 300) as endpoint:
        statuses = await ask_often(endpoint, 300)
        await anyio.to_thread.run_sync(endpoint.wait_until_closed)

    assert statuses == [200] * 300
    assert len(endpoint.requests) == 300
    assert (endpoint.answers_left, endpoint.disconnects) == (0, 0)


@pytest.mark.anyio
async def test_three_hundred_requests_are_in_flight_at_once_and_each_disconnect_is_counted() -> None:
    with Endpoint(answers.hang()) as endpoint:
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(ask_often, endpoint, 300)
            await anyio.to_thread.run_sync(endpoint.wait_for_requests, 300, 30)
            assert endpoint.in_flight == endpoint.max_in_flight == endpoint.connections == 300
            tasks.cancel_scope.cancel()
        await anyio.to_thread.run_sync(endpoint.wait_for_disconnects, 300, 30)
        await anyio.to_thread.run_sync(endpoint.wait_until_closed)

    assert (endpoint.in_flight, endpoint.disconnects) == (0, 300)


def test_close_does_not_wait_for_hanging_requests_and_leaves_no_thread() -> None:
    before = set(threading.enumerate())
    endpoint = Endpoint(answers.hang()).start()
    with connected(endpoint) as connection:
        send(connection)
        endpoint.wait_for_requests(1)
        endpoint.close()
        with pytest.raises(ConnectionError):
            connection.getresponse()

    assert set(threading.enumerate()) == before
    assert (endpoint.connections, endpoint.in_flight, endpoint.disconnects) == (0, 0, 0)
    endpoint.close()
    with pytest.raises(RuntimeError, match="cannot be started again"):
        endpoint.start()


def test_start_is_idempotent_and_the_address_is_free_after_close() -> None:
    endpoint = Endpoint()
    with pytest.raises(RuntimeError, match="before it is started"):
        _ = endpoint.url
    assert endpoint.start().url == endpoint.start().url
    port = urllib.parse.urlsplit(endpoint.url).port
    endpoint.close()

    with pytest.raises(ConnectionRefusedError):
        socket.create_connection(("127.0.0.1", port or 0), timeout=5)


@pytest.mark.anyio
async def test_azures_client_is_served_at_its_deployment() -> None:
    with Endpoint("hi", api_key="secret") as endpoint:
        model = openai.AsyncAzureOpenAI(
            azure_endpoint=endpoint.url.removesuffix("/v1"), api_key="secret", api_version="2024-10-21"
        )
        async with model:
            completion = await model.chat.completions.create(model="mine", messages=[{"role": "user", "content": "hi"}])

    (request,) = endpoint.requests
    assert completion.model == "mine"
    assert request.path == "/openai/deployments/mine/chat/completions"
    assert request.query == "api-version=2024-10-21"


def test_a_wrong_or_missing_key_is_answered_401() -> None:
    with Endpoint(api_key="secret") as endpoint:
        url = f"{endpoint.url}/models"
        assert httpx2.get(url).status_code == 401
        assert httpx2.get(url, headers={"Authorization": "Bearer other"}).status_code == 401
        assert httpx2.get(url, headers={"Authorization": "Bearer secret"}).status_code == 200
        assert httpx2.get(url, headers={"api-key": "secret"}).status_code == 200


def test_models_are_listed_and_other_paths_are_not_found() -> None:
    with Endpoint() as endpoint:
        assert httpx2.get(f"{endpoint.url}/models").json()["data"][0]["object"] == "model"
        assert post(endpoint, "/v1/embeddings")[1]["error"]["code"] == "not_found"
        assert httpx2.get(f"{endpoint.url}/chat/completions").status_code == 404


def test_a_body_that_is_no_json_object_is_answered_400() -> None:
    with Endpoint() as endpoint:
        response = httpx2.post(f"{endpoint.url}/chat/completions", content=b"[1]")

    assert (response.status_code, response.json()["error"]["code"]) == (400, "invalid_json")


def test_an_invalid_history_is_answered_400_and_consumes_no_answer() -> None:
    with Endpoint(["fine"]) as endpoint:
        status, body = post(endpoint, messages=[{"role": "assistant", "content": "hi"}])
        assert (status, body["error"]["code"]) == (400, "invalid_messages")
        assert "messages[0]" in body["error"]["message"]
        assert post(endpoint)[0] == 200

    with Endpoint(strict=False) as endpoint:
        assert post(endpoint, messages=[{"role": "assistant", "content": "hi"}])[0] == 200


USER = {"role": "user", "content": "hi"}


def calling(*ids: str) -> dict[str, Any]:
    calls = [answers.call("f", id=each).wire_form() for each in ids]
    return {"role": "assistant", "content": None, "tool_calls": calls}


def result(call: str) -> dict[str, Any]:
    return {"role": "tool", "tool_call_id": call, "content": "done"}


@pytest.mark.parametrize(
    "messages",
    [
        [USER],
        [{"role": "system", "content": "be kind"}, USER, {"role": "assistant", "content": "hi"}],
        [USER, calling("a", "b"), result("a"), result("b"), calling("a"), result("a"), USER],
        [USER, {"role": "assistant", "content": None, "refusal": "no"}],
        [{"role": "user", "content": [{"type": "text", "text": "hi"}]}],
    ],
)
def test_a_valid_history_passes(messages: list[dict[str, Any]]) -> None:
    check_messages(messages)


@pytest.mark.parametrize(
    ("messages", "fault"),
    [
        (None, "at least one message"),
        ([], "at least one message"),
        (["hi"], r"\[0\]: a message is an object"),
        ([{"role": "robot", "content": "hi"}], r"\[0\]: the role 'robot' is unknown"),
        ([{"role": "user", "content": None}], r"\[0\]: a user message needs content"),
        ([{"role": "user", "content": 3}], r"\[0\]: content is a string or a list"),
        ([{"role": "user", "content": []}], r"\[0\]: content is a string or a list"),
        ([USER | {"tool_calls": []}], r"\[0\]: a user message makes no tool calls"),
        ([{"role": "system", "content": "s"}, calling("a")], r"\[1\]: the first message after the system's"),
        ([result("a")], r"\[0\]: a tool message for 'a' without an open call"),
        ([USER, {"role": "assistant", "content": None}], r"\[1\]: an assistant message needs content"),
        ([USER, {"role": "assistant", "content": "x", "tool_calls": []}], r"\[1\]: tool_calls is a list"),
        ([USER, calling("a", "a")], r"\[1\]: the call id 'a' is used twice"),
        ([USER, calling("")], r"\[1\]: the id of a tool call"),
        ([USER, {"role": "assistant", "tool_calls": [{"id": "a"}]}], r"\[1\]: a tool call has an id"),
        ([USER, calling("a")], r"\[2\]: the result of call 'a' is missing"),
        ([USER, calling("a"), USER], r"\[2\]: the result of call 'a' is missing before this user"),
        ([USER, calling("a", "b"), result("b"), result("a")], r"\[2\]: .* where 'a' is next"),
        ([USER, calling("a"), result("a"), result("a")], r"\[3\]: .* without an open call"),
    ],
)
def test_an_invalid_history_is_refused_with_its_index_and_fault(messages: object, fault: str) -> None:
    with pytest.raises(ValueError, match=fault):
        check_messages(messages)


def test_it_listens_where_it_is_told():
    with Endpoint("one") as first:
        port = int(first.url.rpartition(":")[2].partition("/")[0])
        with pytest.raises(EndpointError) as caught:
            Endpoint("two", port=port).start()
        assert isinstance(caught.value.__cause__, OSError)
    with Endpoint("two", port=port) as second:
        assert second.url == f"http://127.0.0.1:{port}/v1"
