"""The connections of an event loop: how many, who gets one first, and when they are closed."""

from __future__ import annotations

import gzip
import json
import socket
import ssl
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any, NamedTuple

import anyio
import httpx2
import openai
import pytest

from fractal import (
    BaseAgent,
    ConnectionFailed,
    InvalidArguments,
    Limits,
    OpenAIModel,
    RequestTimedOut,
)
from fractal.messages import Transcript
from fractal.models import ModelRequest
from fractal.models._http import connection as _connection, connections as _connections, pool as _pool
from fractal.models._http.sending import current_sending
from fractal.testing import Endpoint, answers
from tests.support import in_thread

StartEndpoint = Callable[..., Endpoint]
MakeModel = Callable[..., OpenAIModel]


@pytest.fixture(params=["none", "AsyncOpenAI"])
def model(request: pytest.FixtureRequest) -> MakeModel:
    """Makes a model of each kind that has its connections from us; all for the endpoint of the environment."""

    def make(**options: Any) -> OpenAIModel:
        return OpenAIModel(openai.AsyncOpenAI() if request.param == "AsyncOpenAI" else None, **options)

    return make


class Server(NamedTuple):
    """A server that gives each connection one of its answers and then closes it, whatever the answer says."""

    url: str
    closed: threading.Semaphore
    """How many connections it has closed."""

    async def has_closed(self) -> None:
        """Wait for it: whoever asks on a connection that is being closed may get no answer."""
        assert await in_thread(self.closed.acquire, True, 5)


@contextmanager
def serving(*scripted: bytes, tls: ssl.SSLContext | None = None) -> Iterator[Server]:
    listener = socket.create_server(("127.0.0.1", 0))
    closed = threading.Semaphore(0)

    def serve() -> None:
        for answer in scripted:
            connection, _ = listener.accept()
            with connection, suppress(ssl.SSLError):
                stream = tls.wrap_socket(connection, server_side=True) if tls else connection
                with stream:
                    stream.recv(65536)
                    stream.sendall(answer)
            closed.release()

    thread = threading.Thread(target=serve, daemon=True)
    thread.start()
    try:
        yield Server(f"{'https' if tls else 'http'}://127.0.0.1:{listener.getsockname()[1]}/v1", closed)
    finally:
        thread.join(5)
        listener.close()


def whole(body: bytes, *headers: str, status: str = "200 OK") -> bytes:
    head = [f"HTTP/1.1 {status}", "Content-Type: application/json", f"Content-Length: {len(body)}", *headers]
    return "\r\n".join([*head, "", ""]).encode() + body


ALONE = current_sending.get()
"""What goes along with a request that no run has sent."""

HELLO = json.dumps(answers.text("hello").completion("m")).encode()


async def test_no_more_connections_are_opened_than_the_limit_says(model: MakeModel, endpoint: StartEndpoint):
    one = endpoint(lambda request: request.body["messages"][-1]["content"])
    agent = BaseAgent("A", "a", client=model(max_connections=10))

    async def ask(number: int) -> None:
        assert (await agent.run(str(number))).content == str(number)

    async with anyio.create_task_group() as group:
        for number in range(300):
            group.start_soon(ask, number)
    assert one.connections_opened <= 10
    assert one.max_in_flight <= 10


async def test_a_connection_goes_to_the_request_that_has_waited_longest(model: MakeModel, endpoint: StartEndpoint):
    one = endpoint(answers.text("hello", delay=0.02))
    agent = BaseAgent("A", "a", client=model(max_connections=1))
    async with anyio.create_task_group() as group:
        for number in range(6):
            group.start_soon(agent.run, str(number))
            await anyio.wait_all_tasks_blocked() if number else await in_thread(one.wait_for_requests, 1)
    assert [request.body["messages"][-1]["content"] for request in one.requests] == list("012345")


async def test_waiting_for_a_connection_is_no_time_of_the_request(model: MakeModel, endpoint: StartEndpoint):
    one = endpoint(answers.text("hello", delay=0.2))
    agent = BaseAgent("A", "a", client=model(max_connections=1), limits=Limits(request_timeout=0.5))
    async with anyio.create_task_group() as group:
        for _ in range(4):
            group.start_soon(agent.run, "go")
    assert len(one.requests) == 4  # none was sent again


@pytest.mark.parametrize("answer", [answers.hang(), answers.cut(), answers.text("a b c d e", chunk_delay=5)], ids=repr)
@pytest.mark.parametrize("streamed", [False, True])
async def test_a_cut_request_gives_its_place_back_and_closes_its_connection(
    model: MakeModel, answer: Any, streamed: bool, endpoint: StartEndpoint
):
    if not streamed:
        answer = answers.text("hello", delay=5) if answer.chunk_delay else answer
    one = endpoint([answer, "hello"])
    agent = BaseAgent("A", "a", client=model(max_connections=1))

    async def ask() -> None:
        if not streamed:
            await agent.run("go", max_retries=0)
            return
        async with agent.stream("go", max_retries=0) as stream:
            await stream.result()

    async with anyio.create_task_group() as group:
        group.start_soon(ask)
        await in_thread(one.wait_for_requests, 1)
        group.cancel_scope.cancel()
    await in_thread(one.wait_until_closed)
    with anyio.fail_after(5):
        assert (await agent.run("go")).content == "hello"


@pytest.mark.parametrize("how", ["read", "left unread", "an error", "cancelled"])
async def test_a_connection_is_kept_only_if_its_answer_was_read_to_the_end(how: str, endpoint: StartEndpoint):
    one = endpoint("hello")
    connections = _connections.Connections(httpx2.create_ssl_context, 5)
    template = _connection.Template(httpx2.Request("POST", f"{one.url}/chat/completions"))
    with anyio.CancelScope() as scope, suppress(LookupError):
        async with connections.send(template, b'{"messages": []}', ALONE) as answer:
            assert answer.status_code == 400  # an error that is read is an answer like any
            if how == "read":
                await answer.aread()
            elif how == "an error":
                raise LookupError
            elif how == "cancelled":
                scope.cancel()
                await anyio.sleep(1)
    assert len(connections) == (1 if how == "read" else 0)
    await connections.aclose()
    await in_thread(one.wait_until_closed)


async def test_a_request_cut_while_it_waits_takes_no_place(model: MakeModel, endpoint: StartEndpoint):
    one = endpoint([answers.text("hello", delay=0.2), "hello"])
    agent = BaseAgent("A", "a", client=model(max_connections=1))
    async with anyio.create_task_group() as group:
        group.start_soon(agent.run, "first")
        await in_thread(one.wait_for_requests, 1)
        with anyio.move_on_after(0.05) as scope:
            await agent.run("cut")
        assert scope.cancelled_caught
    with anyio.fail_after(5):
        assert (await agent.run("second")).content == "hello"
    assert [request.body["messages"][-1]["content"] for request in one.requests] == ["first", "second"]
    assert one.connections_opened == 1


@pytest.mark.parametrize("size", [1, 100_000])
async def test_a_request_that_is_cancelled_before_it_is_written_is_not_sent(size: int, endpoint: StartEndpoint):
    one, model = endpoint("hello"), OpenAIModel()
    request = ModelRequest(model="m", system=None, transcript=Transcript([{"role": "user", "content": "x" * size}]))
    await model.respond(request)  # there is a connection then, and nothing to wait for
    with anyio.CancelScope() as scope:
        scope.cancel()
        await model.respond(request)
    assert scope.cancelled_caught
    await model.aclose()
    assert len(one.requests) == 1


async def test_a_request_cut_while_it_connects_gives_its_place_back(endpoint: StartEndpoint):
    # A server that takes the connection and never says a word of TLS.
    with socket.create_server(("127.0.0.1", 0)) as listener:
        silent = f"https://127.0.0.1:{listener.getsockname()[1]}/v1"
        model = OpenAIModel(base_url=silent, api_key="sk-test", max_connections=1)
        agent = BaseAgent("A", "a", client=model)
        for _ in range(2):  # the second would wait for ever if the first had kept its place
            async with anyio.create_task_group() as group:
                group.start_soon(agent.run, "go")
                connection, _ = await in_thread(listener.accept)
                group.cancel_scope.cancel()
            with connection:
                connection.settimeout(5)
                while await in_thread(connection.recv, 65536):
                    pass  # what it had sent, and then its end


async def test_a_connection_that_waited_too_long_is_not_used_again(
    model: MakeModel, endpoint: StartEndpoint, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(_connections, "KEEP_ALIVE", 0.0)
    one = endpoint("hello")
    async with BaseAgent("A", "a", client=model(max_connections=5)) as agent:
        for opened in (1, 2, 3):
            assert (await agent.run("go")).success
            assert one.connections_opened == opened
        await in_thread(wait_until, lambda: one.connections == 1)


async def test_a_connection_that_the_endpoint_has_closed_is_not_used_again():
    with serving(whole(HELLO), whole(HELLO), whole(HELLO)) as server:
        agent = BaseAgent("A", "a", client=OpenAIModel(base_url=server.url, api_key="sk-test"))
        for _ in range(3):
            result = await agent.run("go", max_retries=0)
            assert result.content == "hello"
            await server.has_closed()


async def test_an_endpoint_behind_tls_is_asked(model: MakeModel, tls: ssl.SSLContext, monkeypatch: pytest.MonkeyPatch):
    with serving(whole(HELLO), whole(HELLO), tls=tls) as server:
        monkeypatch.setenv("OPENAI_BASE_URL", server.url)
        monkeypatch.setenv("OPENAI_API_KEY", "sk-test")
        for _ in range(2):
            assert (await BaseAgent("A", "a", client=model()).run("go", max_retries=0)).content == "hello"
            await server.has_closed()


async def test_certificates_are_read_once_in_a_thread_and_for_https_alone(
    endpoint: StartEndpoint, tls: ssl.SSLContext, monkeypatch: pytest.MonkeyPatch
):
    read_by: list[threading.Thread] = []

    def read() -> ssl.SSLContext:
        read_by.append(threading.current_thread())
        return httpx2.create_ssl_context()

    endpoint("hello")
    with monkeypatch.context() as patched:
        patched.setattr(_pool, "machine_tls", read)
        assert (await BaseAgent("A", "a").run("go")).content == "hello"
        assert read_by == []
        with serving(whole(HELLO), whole(HELLO), tls=tls) as server:
            agent = BaseAgent("A", "a", client=OpenAIModel(base_url=server.url, api_key="sk-test"))
            results = await anyio.gather(*(agent.run("go", max_retries=0) for _ in range(2)))
            assert [result.content for result in results] == ["hello", "hello"]
    assert len(read_by) == 1
    assert read_by != [threading.current_thread()]


async def test_an_endpoint_that_nobody_vouches_for_is_not_asked(tls: ssl.SSLContext, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.delenv("SSL_CERT_FILE")
    with serving(whole(HELLO), tls=tls) as server:
        agent = BaseAgent("A", "a", client=OpenAIModel(base_url=server.url, api_key="sk-test", max_connections=1))
        result = await agent.run("go", max_retries=0)
    assert isinstance(result.exception, ConnectionFailed)
    assert "certificate verify failed" in str(result.exception)


CHUNKED = b"".join(b"%x;extension=1\r\n%b\r\n" % (len(part), part) for part in (HELLO[:7], HELLO[7:]))


@pytest.mark.parametrize(
    "answer",
    [
        whole(HELLO),
        b"HTTP/1.1 103 Early Hints\r\nLink: </x>\r\n\r\n" + whole(HELLO, "Connection: close"),
        b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n" + CHUNKED + b"0\r\nX-Trailer: 1\r\n\r\n",
        b"HTTP/1.0 200 OK\r\n\r\n" + HELLO,  # as far as the connection goes
    ],
    ids=["length", "hints and close", "chunks", "to the end"],
)
async def test_an_answer_is_read_in_each_form_that_http_has(answer: bytes):
    with serving(answer, answer) as server:
        agent = BaseAgent("A", "a", client=OpenAIModel(base_url=server.url, api_key="sk-test"))
        for _ in range(2):
            assert (await agent.run("go", max_retries=0)).content == "hello"
            await server.has_closed()


@pytest.mark.parametrize(
    ("answer", "words"),
    [
        (b"", "said nothing"),
        (b"SSH-2.0-OpenSSH_9.2\r\n\r\n", "is no HTTP"),
        (whole(HELLO)[:-5], "without sending complete message body"),
    ],
    ids=["nothing", "another protocol", "half of it"],
)
async def test_what_is_no_answer_is_named_and_may_be_asked_again(answer: bytes, words: str):
    with serving(answer, answer) as server:
        agent = BaseAgent("A", "a", client=OpenAIModel(base_url=server.url, api_key="sk-test"))
        for _ in range(2):
            error = (await agent.run("go", max_retries=0)).exception
            assert isinstance(error, ConnectionFailed)
            assert error.retryable
            assert words in str(error)
            await server.has_closed()


async def test_a_connection_on_which_more_came_than_was_asked_for_is_not_used_again(endpoint: StartEndpoint):
    connections = _connections.Connections(httpx2.create_ssl_context, 5)
    with serving(whole(HELLO) + whole(b"not asked for")) as server:
        template = _connection.Template(httpx2.Request("POST", server.url))
        async with connections.send(template, b"{}", ALONE) as answer:
            assert await answer.aread() == HELLO
    assert len(connections) == 0


async def test_an_endpoint_that_says_nothing_for_too_long_is_given_up(
    endpoint: StartEndpoint, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(_pool, "READ_TIMEOUT", 0.2)
    endpoint(answers.hang())
    client = openai.AsyncOpenAI(timeout=0.2)
    for each in (OpenAIModel(max_connections=1), client):
        result = await BaseAgent("A", "a", client=each).run("go", max_retries=0)
        assert isinstance(result.exception, RequestTimedOut), result
    with socket.create_server(("127.0.0.1", 0)) as silent:  # never a word of TLS
        monkeypatch.setattr(_pool, "CONNECT_TIMEOUT", 0.2)
        url = f"https://127.0.0.1:{silent.getsockname()[1]}/v1"
        agent = BaseAgent("A", "a", client=OpenAIModel(base_url=url, api_key="sk-test", max_connections=1))
        result = await agent.run("go", max_retries=0)
        assert isinstance(result.exception, ConnectionFailed)
        assert "in time" in str(result.exception)


async def test_a_full_pool_closes_an_idle_connection_to_make_room_for_another_endpoint(endpoint: StartEndpoint):
    one, two = endpoint("one"), endpoint("two")
    shared = OpenAIModel(max_connections=2)
    agent = BaseAgent("A", "a", client=shared)

    async def ask(at: Endpoint, monkeypatch: pytest.MonkeyPatch) -> Any:
        monkeypatch.setenv("OPENAI_BASE_URL", at.url)
        return (await agent.run("go")).content

    with pytest.MonkeyPatch.context() as patch:
        for at in (one, two, one, two):
            assert await ask(at, patch) == ("one" if at is one else "two")
        assert (one.connections_opened, two.connections_opened) == (1, 1)
        three = endpoint("three")
        assert await ask(three, patch) == "three"
    await in_thread(one.wait_until_closed)  # the one that was idle longest
    assert two.connections == 1


async def test_models_without_a_number_share_the_loops_connections_and_others_do_not(endpoint: StartEndpoint):
    one = endpoint("hello")
    for client in (None, OpenAIModel(), openai.AsyncOpenAI()):
        await BaseAgent("A", "a", client=client).run("go")
    assert one.connections_opened == 1
    for _ in range(2):
        await BaseAgent("A", "a", client=OpenAIModel(max_connections=1000)).run("go")
    assert one.connections_opened == 3


def test_the_default_leaves_half_of_the_files_to_the_program(monkeypatch: pytest.MonkeyPatch):
    resource = pytest.importorskip("resource")
    for soft, connections in ((256, 128), (1024, 512), (20_000, 1000), (resource.RLIM_INFINITY, 1000), (1, 1)):
        monkeypatch.setattr(resource, "getrlimit", lambda kind, soft=soft: (soft, soft))
        _pool.default_limit.cache_clear()
        assert _pool.default_limit() == connections
    monkeypatch.undo()
    _pool.default_limit.cache_clear()


@pytest.mark.parametrize("number", [0, -1, True, 1.5, "10"])
def test_a_number_of_connections_is_one_from_one_up(number: Any):
    with pytest.raises(InvalidArguments, match="max_connections"):
        OpenAIModel(max_connections=number)


async def test_a_client_that_makes_its_connections_itself_takes_no_number():
    async with httpx2.AsyncClient() as http:
        for client in (openai.AsyncOpenAI(api_key="k", http_client=http), FakeClient()):
            with pytest.raises(InvalidArguments, match=type(client).__name__):
                OpenAIModel(client, max_connections=5)


class FakeClient:
    class chat:
        class completions:
            @staticmethod
            def create() -> None: ...


async def test_a_proxy_of_the_environment_is_asked_except_for_what_is_exempt(
    model: MakeModel, endpoint: StartEndpoint, monkeypatch: pytest.MonkeyPatch
):
    direct, proxy = endpoint("direct"), endpoint("by proxy")
    monkeypatch.setenv("http_proxy", proxy.url.removesuffix("/v1"))
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    for url, answer in (("http://elsewhere.invalid/v1", "by proxy"), (direct.url, "direct")):
        monkeypatch.setenv("OPENAI_BASE_URL", url)
        assert (await BaseAgent("A", "a", client=model(max_connections=3)).run("go")).content == answer
    assert [request.path for request in proxy.requests] == ["http://elsewhere.invalid/v1/chat/completions"]


async def test_a_compressed_answer_is_read():
    chunk = {"choices": [{"delta": {"content": "hello"}, "finish_reason": "stop"}]}
    events = gzip.compress(b"data: %b\n\ndata: [DONE]\n\n" % json.dumps(chunk).encode())
    headers = "Content-Encoding: gzip", "Connection: close"
    streamed = whole(events, *headers).replace(b"application/json", b"text/event-stream")
    with serving(whole(gzip.compress(HELLO), *headers), streamed) as server:
        agent = BaseAgent("A", "a", client=OpenAIModel(base_url=server.url, api_key="sk-test"))
        assert (await agent.run("go", max_retries=0)).content == "hello"
        await server.has_closed()
        async with agent.stream("go", max_retries=0) as stream:
            assert [piece async for piece in stream.text()] == ["hello"]


def wait_until(condition: Callable[[], bool]) -> None:
    for _ in range(500):
        if condition():
            return
        threading.Event().wait(0.01)
    raise AssertionError("it did not come to that")
