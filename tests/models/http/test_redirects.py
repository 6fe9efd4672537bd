"""Where a conversation goes is decided by its user alone."""

from __future__ import annotations

import ssl
from collections.abc import Callable
from typing import Any

import pytest

from fractal import AgentResult, BaseAgent, ConnectionFailed, Limits
from tests.clients import Models
from tests.raw_server import Wire, body_of, http, raw_server, said
from tests.without_uvloop import anyio_backend  # noqa: F401

SECRET, TOKEN = "PRIVATE-CONVERSATION", "TOKEN-0123456789"


async def asked(model: Any, *, streamed: bool = False, **options: Any) -> AgentResult:
    agent = BaseAgent("A", "a", client=model, **options)
    if not streamed:
        return await agent.run(SECRET, max_retries=2, timeout=20)
    async with agent.stream(SECRET, max_retries=2, timeout=20) as stream:
        return await stream.result()


def moved(status: int, location: str) -> bytes:
    return http(b"", f"Location: {location}", status=f"{status} Moved")


def sends_on(status: int, location: Callable[[bytes], str]) -> Callable[[Wire], None]:
    """Sends each request on, unless it is for /moved."""

    def talk(wire: Wire) -> None:
        while request := wire.request():
            path = request.split(b" ")[1]
            wire.send(said("moved") if path.startswith(b"/moved") else moved(status, location(request)))

    return talk


def answers_all(wire: Wire) -> None:
    while wire.request():
        wire.send(said("from elsewhere"))


@pytest.mark.parametrize("streamed", [False, True])
@pytest.mark.parametrize("status", [307, 308])
@pytest.mark.parametrize("location", ["/moved", "//{host}/moved", "http://{host}/moved?a=1", "../../moved"])
async def test_a_request_is_sent_on_within_its_origin(status: int, location: str, streamed: bool, models: Models):
    def where(request: bytes) -> str:
        return location.format(host=server.url.partition("//")[2].removesuffix("/v1"))

    with raw_server(sends_on(status, where)) as server:
        result = await asked(models(server.url), streamed=streamed)
        assert result.content == "moved", result.error
        first, second = server.requests
        assert second.startswith(b"POST /moved")
        assert body_of(first) == body_of(second)
        assert b"Bearer sk-test" in second
        assert result.usage.requests == 2


@pytest.mark.parametrize("status", [301, 302, 303, 307, 308])
async def test_a_conversation_goes_to_no_other_host(status: int, models: Models):
    with raw_server(answers_all) as other, raw_server(sends_on(status, lambda _: f"{other.url}/x")) as server:
        options = {} if models.kind == "own HTTP" else {"default_headers": {"X-Token": TOKEN}}
        error = (await asked(models(server.url, **options))).exception
        assert isinstance(error, ConnectionFailed)
        assert (error.retryable, error.status) == (False, status)
        assert other.url.removesuffix("/v1") in str(error)
        assert other.requests == []
        assert len(server.requests) == 1


@pytest.mark.parametrize("status", [301, 302, 303])
async def test_a_request_does_not_become_another_one(status: int, models: Models):
    with raw_server(sends_on(status, lambda _: "/moved")) as server:
        error = (await asked(models(server.url))).exception
        assert isinstance(error, ConnectionFailed)
        assert not error.retryable
        assert len(server.requests) == 1


@pytest.mark.parametrize(
    "location",
    [
        "file:///secrets", "javascript:alert(1)", "gopher://127.0.0.1/", "http://127.0.0.1:99999/", "http://[::1",
        "https://user:hunter22@elsewhere.invalid/?key=hunter22", "//elsewhere.invalid", "http://\x7f/",
    ],
)  # fmt: skip
async def test_an_address_of_no_use_is_a_clear_error_that_shows_no_secret(location: str, models: Models):
    with raw_server(sends_on(307, lambda _: location)) as server:
        error = (await asked(models(server.url))).exception
        assert isinstance(error, ConnectionFailed), repr(error)
        assert "hunter22" not in str(error)
        if "http_client" not in models.kind:  # some versions of httpx2 refuse it themselves
            assert not error.retryable
            assert len(server.requests) == 1


async def test_a_request_that_is_sent_on_for_ever_is_given_up(models: Models):
    with raw_server(sends_on(307, lambda _: "/v1/again")) as server:
        result = await asked(models(server.url))
        assert isinstance(result.exception, ConnectionFailed)
        assert not result.exception.retryable
        assert result.usage.requests == len(server.requests) == 6


async def test_each_time_that_a_request_is_sent_on_counts_in_the_budget(models: Models):
    with raw_server(sends_on(307, lambda _: "/v1/again")) as server:
        result = await asked(models(server.url), limits=Limits(max_requests=3))
        assert result.stop_reason == "budget", result.error
        assert len(server.requests) == 3


async def test_a_request_may_be_sent_on_to_https_of_its_host_and_not_back(tls: ssl.SSLContext, models: Models):
    urls: list[str] = []

    def upgrade(wire: Wire) -> None:
        sends_on(308, lambda _: f"{urls[0]}/moved")(wire)

    def secured(wire: Wire) -> None:
        while request := wire.request():
            back = b" /v1/moved " not in request
            wire.send(moved(307, f"{urls[1]}/moved") if back else said("moved"))

    with raw_server(secured, tls) as safe, raw_server(upgrade) as plain:
        urls.extend((safe.url, plain.url))
        assert (await asked(models(plain.url))).content == "moved"
        asked_before = len(plain.requests)
        error = (await asked(models(safe.url))).exception
        assert isinstance(error, ConnectionFailed), repr(error)
        assert len(plain.requests) == asked_before


async def test_an_answer_that_sends_nobody_on_is_read_as_it_is(models: Models):
    def talk(wire: Wire) -> None:
        while wire.request():
            wire.send(http(b"", status="304 Not Modified"))

    with raw_server(talk) as server:
        result = await asked(models(server.url))
        assert type(result.exception).__name__ in ("BadReply", "StatusError"), repr(result.exception)
