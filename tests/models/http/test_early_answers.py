"""What an endpoint says before it has read a request: it is read, and nothing is sent again."""

from __future__ import annotations

import socket
import ssl
import time
from collections.abc import Callable
from typing import Any

import openai
import pytest

from fractal import AgentResult, BaseAgent, ConnectionFailed, OpenAIModel, StatusError
from tests.raw_server import RawServer, TlsWire, Wire, raw_server, refused, said

TOO_LARGE = refused("413 Content Too Large", "too large")
LONG = "x" * (8 << 20)


def raw(wire: Wire, *pieces: bytes) -> bytes:
    return wire.records(*pieces) if isinstance(wire, TlsWire) else b"".join(pieces)


def says_it_and_closes(wire: Wire) -> None:
    wire.read()
    wire.send(TOO_LARGE)


def says_it_unasked(wire: Wire) -> None:
    wire.send(TOO_LARGE)


def says_it_and_half_closes(wire: Wire) -> None:
    wire.read()
    wire.send(TOO_LARGE)
    wire.sock.shutdown(socket.SHUT_WR)
    time.sleep(0.2)


def says_it_and_is_silent(wire: Wire) -> None:
    wire.read()
    wire.send(TOO_LARGE)
    wire.said_all.wait(5)


def says_it_in_pieces(wire: Wire) -> None:
    wire.read()
    data = raw(wire, TOO_LARGE[:30], TOO_LARGE[30:-20], TOO_LARGE[-20:])
    for start in range(0, len(data), 40):
        wire.sock.sendall(data[start : start + 40])
        time.sleep(0.005)


def hints_first(wire: Wire) -> None:
    wire.send(b"HTTP/1.1 100 Continue\r\n\r\n", b"HTTP/1.1 103 Early Hints\r\nLink: </x>\r\n\r\n")
    wire.read()
    wire.send(TOO_LARGE)


def says_it_and_resets(wire: Wire) -> None:
    wire.read()
    wire.send(TOO_LARGE)
    time.sleep(0.1)
    wire.reset()


def breaks_off_in_the_body(wire: Wire) -> None:
    wire.read()
    wire.send(TOO_LARGE[:-10])
    time.sleep(0.05)


WAYS = [
    says_it_and_closes, says_it_unasked, says_it_and_half_closes, says_it_and_is_silent, says_it_in_pieces, hints_first,
    says_it_and_resets, breaks_off_in_the_body,
]  # fmt: skip


async def asked(server: RawServer, text: str, client: Any = None, **options: Any) -> AgentResult:
    agent = BaseAgent("A", "a", client=client or OpenAIModel(base_url=server.url, api_key="k"))
    try:
        return await agent.run(text, max_retries=1, timeout=20, **options)
    finally:
        for wire in server.wires:
            wire.said_all.set()


@pytest.mark.parametrize("way", WAYS, ids=lambda way: way.__name__)
@pytest.mark.parametrize("text", ["x", "x" * 30_000, LONG], ids=["short", "30 KB", "8 MB"])
async def test_a_refusal_that_comes_early_is_read_and_the_request_is_sent_once(
    way: Callable[[Wire], None], text: str, maybe_tls: ssl.SSLContext | None
):
    with raw_server(way, maybe_tls) as server:
        result = await asked(server, text)
        assert isinstance(result.exception, StatusError), result.error
        assert result.exception.status == 413
        assert ("too large" in str(result.error)) is (way is not breaks_off_in_the_body)
        assert len(server.wires) == 1


async def test_that_holds_for_a_client_of_the_sdk(maybe_tls: ssl.SSLContext | None):
    with raw_server(says_it_and_closes, maybe_tls) as server:
        result = await asked(server, LONG, openai.AsyncOpenAI(base_url=server.url, api_key="k"))
        assert isinstance(result.exception, StatusError)
        assert (result.exception.status, len(server.wires)) == (413, 1)


async def test_that_holds_for_a_stream(maybe_tls: ssl.SSLContext | None):
    with raw_server(says_it_and_closes, maybe_tls) as server:
        agent = BaseAgent("A", "a", client=OpenAIModel(base_url=server.url, api_key="k"))
        async with agent.stream(LONG, max_retries=1, timeout=20) as stream:
            result = await stream.result()
        assert isinstance(result.exception, StatusError)
        assert (result.exception.status, len(server.wires)) == (413, 1)


async def test_a_connection_that_was_not_sent_all_is_not_used_again(maybe_tls: ssl.SSLContext | None):
    def talk(wire: Wire) -> None:
        if wire.number == 0:
            says_it_and_is_silent(wire)
        elif wire.request():
            wire.send(said("second"))

    with raw_server(talk, maybe_tls) as server:
        assert not (await asked(server, LONG)).success
        assert (await asked(server, "go")).content == "second"


async def test_an_answer_that_is_no_refusal_does_not_stop_the_request(maybe_tls: ssl.SSLContext | None):
    def talk(wire: Wire) -> None:
        data = wire.read()
        wire.send(said("early")[:-10])
        while len(data) < len(LONG):
            data += wire.read()
        wire.send(said("early")[-10:])

    with raw_server(talk, maybe_tls) as server:
        result = await asked(server, LONG)
        assert result.content == "early", result.error


async def test_an_endpoint_that_takes_nothing_and_says_nothing_is_given_up_in_time(maybe_tls: ssl.SSLContext | None):
    def talk(wire: Wire) -> None:
        wire.said_all.wait(5)

    with raw_server(talk, maybe_tls) as server:
        agent = BaseAgent("A", "a", client=OpenAIModel(base_url=server.url, api_key="k"))
        began = time.monotonic()
        result = await agent.run(LONG, timeout=0.5)
        assert result.stop_reason == "deadline"
        assert time.monotonic() - began < 3
        for wire in server.wires:
            wire.said_all.set()


async def test_a_long_request_leaves_its_connection_to_the_next_one(maybe_tls: ssl.SSLContext | None):
    def talk(wire: Wire) -> None:
        while wire.request():
            wire.send(said("hello"))

    with raw_server(talk, maybe_tls) as server:
        agent = BaseAgent("A", "a", client=OpenAIModel(base_url=server.url, api_key="k"))
        for text in ("x" * 30_000, "x" * 300_000, "x", "x" * 3_000_000):
            assert (await agent.run(text, max_retries=0)).content == "hello"
        assert len(server.wires) == 1


@pytest.mark.parametrize("make", [OpenAIModel, openai.AsyncOpenAI])
async def test_a_certificate_that_is_refused_is_not_asked_for_again(
    make: Any, tls: ssl.SSLContext, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.delenv("SSL_CERT_FILE")
    with raw_server(lambda wire: wire.request(), tls) as server:
        agent = BaseAgent("A", "a", client=make(base_url=server.url, api_key="k"))
        result = await agent.run("go", max_retries=3)
        assert isinstance(result.exception, ConnectionFailed)
        assert not result.exception.retryable
        assert result.usage.requests == 1
        assert "certificate verify failed" in str(result.error)
