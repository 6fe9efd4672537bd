"""A connection carries one answer to one request: whatever lies behind it, no other request sees it."""

from __future__ import annotations

import ssl
import threading
from collections.abc import Callable
from typing import Any

import openai
import pytest

from fractal import BaseAgent, OpenAIModel
from tests.raw_server import RawServer, TlsWire, Wire, raw_server, said
from tests.support import in_thread

SIZES = [
    0, 16 * 1024 - 1, 16 * 1024, 16 * 1024 + 1, 16 * 1024 + 300, 32 * 1024,
    64 * 1024 - 1, 64 * 1024, 64 * 1024 + 1, 128 * 1024, 128 * 1024 + 1, 256 * 1024, 256 * 1024 + 1,
]  # fmt: skip
"""Bytes of an answer, around what TLS, AnyIO and we read at a time."""


def own_http(url: str, key: str) -> OpenAIModel:
    return OpenAIModel(base_url=url, api_key=key)


def sdk(url: str, key: str) -> openai.AsyncOpenAI:
    return openai.AsyncOpenAI(base_url=url, api_key=key)


def first_then(first: Callable[[Wire], object]) -> Callable[[Wire], None]:
    """The first connection says what it wants and keeps silent then; each other one says "second"."""

    def talk(wire: Wire) -> None:
        if wire.number == 0 and wire.request():
            first(wire)
            wire.said_all.set()
            wire.read()
            return
        while wire.request():
            wire.send(said("second"))

    return talk


async def asked_twice(server: RawServer, make: Callable[[str, str], Any] = own_http) -> list[object]:
    """What is told to one request and then to another, when all that was sent to the first has come."""
    agent = BaseAgent("A", "a", client=make(server.url, "sk-alice"))
    told: list[object] = []
    for _ in range(2):
        result = await agent.run("go", max_retries=0, timeout=20)
        told.append(str(result.content).rstrip("x") if result.success else result.error)
        await in_thread(server.wires[0].said_all.wait, 5)
    return told


@pytest.mark.parametrize("size", SIZES)
async def test_what_comes_behind_an_answer_is_no_answer_to_the_next_request(
    size: int, maybe_tls: ssl.SSLContext | None
):
    with raw_server(first_then(lambda wire: wire.send(said("first", size), said("unasked"))), maybe_tls) as server:
        assert await asked_twice(server) == ["first", "second"]


@pytest.mark.parametrize("size", [0, 64 * 1024, 128 * 1024 + 1])
async def test_that_holds_for_clients_of_the_sdk(size: int, maybe_tls: ssl.SSLContext | None):
    with raw_server(first_then(lambda wire: wire.send(said("first", size), said("unasked"))), maybe_tls) as server:
        assert await asked_twice(server, sdk) == ["first", "second"]


@pytest.mark.parametrize("size", SIZES)
async def test_an_end_behind_an_answer_does_not_fail_the_next_request(size: int, maybe_tls: ssl.SSLContext | None):
    with raw_server(first_then(lambda wire: wire.send(said("first", size), goodbye=True)), maybe_tls) as server:
        assert await asked_twice(server) == ["first", "second"]


@pytest.mark.parametrize("missing", [1, 100, 16_000])
@pytest.mark.parametrize("size", [0, 64 * 1024])
async def test_a_part_of_a_record_behind_an_answer_is_no_part_of_the_next_one(
    size: int, missing: int, tls: ssl.SSLContext
):
    def send(wire: Wire) -> None:
        assert isinstance(wire, TlsWire)
        records = wire.records(said("first", size), said("unasked", 16_200))
        wire.sock.sendall(records[:-missing])

    with raw_server(first_then(send), tls) as server:
        assert await asked_twice(server) == ["first", "second"]


async def test_a_line_end_behind_an_answer_does_no_harm(maybe_tls: ssl.SSLContext | None):
    def talk(wire: Wire) -> None:
        if wire.number == 0 and wire.request():
            wire.send(said("first"), b"\r\n")
        wire.said_all.set()
        while wire.request():
            wire.send(said("second"))

    with raw_server(talk, maybe_tls) as server:
        assert await asked_twice(server) == ["first", "second"]


async def test_what_comes_while_a_connection_waits_closes_it(maybe_tls: ssl.SSLContext | None):
    is_waiting = threading.Event()

    def talk(wire: Wire) -> None:
        wire.send(said("first"))
        is_waiting.wait(5)
        wire.send(said("unasked"))

    with raw_server(first_then(talk), maybe_tls) as server:
        agent = BaseAgent("A", "a", client=own_http(server.url, "sk-alice"))
        assert (await agent.run("go", max_retries=0)).content == "first"
        is_waiting.set()
        await in_thread(server.wires[0].said_all.wait, 5)
        assert (await agent.run("go", max_retries=0)).content == "second"


async def test_a_connection_without_anything_on_it_is_used_again(maybe_tls: ssl.SSLContext | None):
    def talk(wire: Wire) -> None:
        while wire.request():
            for size in SIZES:
                wire.send(said("again", size))
                if not wire.request():
                    return

    with raw_server(talk, maybe_tls) as server:
        agent = BaseAgent("A", "a", client=own_http(server.url, "sk-alice"))
        for _ in SIZES:
            assert (await agent.run("go", max_retries=0)).success
        assert len(server.wires) == 1
