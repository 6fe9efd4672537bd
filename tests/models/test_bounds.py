"""No endpoint fills the memory, or holds up an event loop, by how much it answers."""

from __future__ import annotations

import gzip
import time
import tracemalloc
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest

from fractal import (
    AgentResult,
    BadReply,
    BaseAgent,
    OpenAIModel,
    RateLimited,
    ReplyBounds,
    ReplyTooLarge,
    ServerError,
    StatusError,
)
from tests.clients import Models
from tests.raw_server import Wire, body_of, http, raw_server, refused, said
from tests.without_uvloop import anyio_backend  # noqa: F401

MIB = 1024 * 1024
HEAD = b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\n"
CHUNKED = HEAD + b"Transfer-Encoding: chunked\r\n\r\n"
SMALL = ReplyBounds(body=MIB, head=20_000, line=MIB)


async def asked(client: Any, timeout: float = 20) -> AgentResult:
    return await BaseAgent("A", "a", client=client).run("go", max_retries=0, timeout=timeout)


async def streamed(client: Any, timeout: float = 20) -> AgentResult:
    async with BaseAgent("A", "a", client=client).stream("go", max_retries=0, timeout=timeout) as stream:
        return await stream.result()


def answering(answer: bytes, for_ever: bytes = b"") -> Callable[[Wire], None]:
    def talk(wire: Wire) -> None:
        while wire.request():
            wire.send(answer)
            while for_ever:
                wire.send(for_ever)

    return talk


def bomb(megabytes: int, times: int = 1) -> bytes:
    """So many megabytes of spaces, compressed."""
    packer = zlib.compressobj(9, zlib.DEFLATED, 31)
    packed = b"".join(packer.compress(b" " * MIB) for _ in range(megabytes)) + packer.flush()
    for _ in range(times - 1):
        packed = gzip.compress(packed)
    return packed


ENDLESS: dict[str, tuple[bytes, bytes, str]] = {
    "a head": (HEAD, b"X-More: " + b"x" * 60_000 + b"\r\n", "head"),
    "a line of a head": (HEAD + b"X-More: ", b"x" * 60_000, "head"),
    "hints": (b"", b"HTTP/1.1 103 Early Hints\r\nLink: </x>\r\n\r\n" * 1000, "head"),
    "a body": (HEAD + b"\r\n", b" " * 65536, "body"),
    "chunks": (CHUNKED, b"10000\r\n" + b" " * 65536 + b"\r\n", "body"),
    "chunks of one byte": (CHUNKED, b"1\r\n \r\n" * 10_000, "body"),
    "the extension of a chunk": (CHUNKED + b"1;x=", b"x" * 60_000, "head"),
    "trailers": (CHUNKED + b"2\r\n{}\r\n0\r\n", b"A: b\r\n" * 9000, "head"),
    "a line of a trailer": (CHUNKED + b"2\r\n{}\r\n0\r\nA: ", b"x" * 60_000, "head"),
}


@pytest.mark.parametrize("what", ENDLESS)
async def test_what_does_not_end_is_too_large(what: str):
    answer, for_ever, bound = ENDLESS[what]
    with raw_server(answering(answer, for_ever)) as server:
        result = await asked(OpenAIModel(base_url=server.url, api_key="k", bounds=SMALL))
        error = result.exception
        assert isinstance(error, ReplyTooLarge), result.error
        assert (error.what, error.bound, error.retryable) == (bound, getattr(SMALL, bound), False)


@pytest.mark.parametrize("way", [asked, streamed], ids=["run", "stream"])
async def test_a_body_is_bounded_by_whatever_client_it_comes(way: Any, models: Models):
    with raw_server(answering(HEAD + b"\r\n", b" " * 65536)) as server:
        error = (await way(models(server.url, bounds=SMALL))).exception
        assert isinstance(error, ReplyTooLarge), repr(error)
        assert (error.what, error.bound) == ("body", MIB)


@pytest.mark.parametrize("way", [asked, streamed], ids=["run", "stream"])
async def test_a_compressed_body_is_bounded_by_what_it_becomes(way: Any, models: Models):
    packed = http(bomb(100), "Content-Encoding: gzip")
    with raw_server(answering(packed)) as server:
        client = models(server.url, bounds=ReplyBounds(body=2 * MIB))
        with most_memory() as peak:
            error = (await way(client)).exception
        assert isinstance(error, ReplyTooLarge), repr(error)
        assert peak[0] < 20 * MIB


@contextmanager
def most_memory() -> Iterator[list[int]]:
    """How many bytes are taken at most in a block, once it has ended."""
    peak: list[int] = []
    tracemalloc.start()
    try:
        yield peak
        peak.append(tracemalloc.get_traced_memory()[1])
    finally:
        tracemalloc.stop()


async def test_a_deadline_holds_while_a_bomb_is_decompressed(models: Models):
    packed = http(bomb(100), "Content-Encoding: gzip")
    with raw_server(answering(packed)) as server:
        client = models(server.url, bounds=ReplyBounds(body=1000 * MIB))
        began = time.monotonic()
        result = await asked(client, timeout=0.05)
        assert result.stop_reason == "deadline"
        assert time.monotonic() - began < 5


CODINGS = {
    "gzip": gzip.compress,
    "x-gzip": gzip.compress,
    "GZip": gzip.compress,
    "deflate": zlib.compress,
    "deflate, identity": zlib.compress,
    "identity": bytes,
    "": bytes,
}


def bare_deflate(data: bytes) -> bytes:
    packer = zlib.compressobj(6, zlib.DEFLATED, -15)
    return packer.compress(data) + packer.flush()


@pytest.mark.parametrize("coding", CODINGS)
async def test_the_codings_that_are_asked_for_are_read(coding: str, models: Models):
    body = CODINGS[coding](body_of(said("hello", 300_000)))
    with raw_server(answering(http(body, f"Content-Encoding: {coding}"))) as server:
        result = await asked(models(server.url))
        assert str(result.content).rstrip("x") == "hello", result.error
        assert accepted(server.requests[0]) == "gzip, deflate"


def accepted(request: bytes) -> str:
    head = request.decode("latin-1").partition("\r\n\r\n")[0].lower()
    return head.partition("accept-encoding: ")[2].partition("\r\n")[0]


async def test_deflate_without_its_frame_and_gzip_in_members_are_read(models: Models):
    body = body_of(said("hello"))
    answers = [
        http(bare_deflate(body), "Content-Encoding: deflate"),
        http(gzip.compress(body[:20]) + gzip.compress(body[20:]) + b"\0\0", "Content-Encoding: gzip"),
    ]
    for answer in answers:
        with raw_server(answering(answer)) as server:
            assert (await asked(models(server.url))).content == "hello"


@pytest.mark.parametrize("coding", ["br", "zstd", "compress", "gzip, gzip", "gzip, gzip, gzip", "gzip, br", "made-up"])
async def test_a_coding_that_nobody_has_asked_for_is_refused_by_name(coding: str, models: Models):
    headers = [f"Content-Encoding: {each}" for each in coding.split(", ")] if "made" in coding else []
    answer = http(gzip.compress(b"{}"), *(headers or [f"Content-Encoding: {coding}"]))
    with raw_server(answering(answer)) as server:
        error = (await asked(models(server.url))).exception
        assert type(error) is BadReply
        assert coding in str(error)
        assert not error.retryable


async def test_codings_in_several_headers_are_several(models: Models):
    with raw_server(answering(http(b"{}", "Content-Encoding: gzip", "Content-Encoding: gzip"))) as server:
        error = (await asked(models(server.url))).exception
        assert type(error) is BadReply
        assert "'gzip, gzip'" in str(error)


@pytest.mark.parametrize(
    "body", [gzip.compress(b"{}" * 50)[:-9], b"\x1f", b"no gzip at all"], ids=["cut", "a byte", "text"]
)
async def test_what_is_not_compressed_as_it_says_is_a_bad_reply(body: bytes, models: Models):
    with raw_server(answering(http(body, "Content-Encoding: gzip"))) as server:
        error = (await asked(models(server.url))).exception
        assert type(error) is BadReply
        assert "gzip" in str(error)


@pytest.mark.parametrize("way", [asked, streamed], ids=["run", "stream"])
async def test_of_an_error_the_beginning_is_read(way: Any, models: Models):
    head = b"HTTP/1.1 503 Out\r\nContent-Type: text/plain\r\n\r\nout of order "
    with raw_server(answering(head, b"x" * 65536)) as server:
        result = await way(models(server.url))
        assert isinstance(result.exception, ServerError), result.error
        assert str(result.error).startswith("HTTP 503: out of order xxx")


ERRORS = {
    "a bomb": http(bomb(100), "Content-Encoding: gzip", status="429 Slow"),
    "in br": http(b"\x8b\x01\x80", "Content-Encoding: br", status="429 Slow"),
    "twice": http(gzip.compress(gzip.compress(b"no")), "Content-Encoding: gzip, gzip", status="429 Slow"),
    "no gzip": http(b"slow down", "Content-Encoding: gzip", status="429 Slow"),
    "cut": http(gzip.compress(b"slow down")[:-3], "Content-Encoding: gzip", status="429 Slow"),
    "a charset that is none": http(b"slow", status="429 Slow", kind="text/plain; charset=undefined"),
    "a charset of bytes": http(b"slow", status="429 Slow", kind="application/json; charset=base64"),
    "too short": http(b"slow down", status="429 Slow")[:-3],
}


@pytest.mark.parametrize("name", ERRORS)
async def test_an_error_is_that_error_whatever_is_wrong_with_its_body(name: str, models: Models):
    def talk(wire: Wire) -> None:
        if wire.request():
            wire.send(ERRORS[name])

    with raw_server(talk) as server:
        result = await asked(models(server.url))
        assert type(result.exception) is RateLimited, repr(result.exception)


async def test_errors_that_were_read_leave_their_connection(models: Models):
    with raw_server(answering(refused("400 Bad Request", "no"))) as server:
        client = models(server.url)
        for _ in range(2):
            assert type((await asked(client)).exception) is StatusError
        assert len(server.wires) == 1


@pytest.mark.parametrize("size", [MIB, MIB - 1])
async def test_a_body_of_just_the_bound_is_read(size: int, models: Models):
    body = body_of(said("hello", size + len(said("")) - len(body_of(said("")))))
    assert len(body) == size
    with raw_server(answering(http(body))) as server:
        result = await asked(models(server.url, bounds=SMALL))
        assert str(result.content).rstrip("x") == "hello", result.error


async def test_a_body_in_chunks_of_one_byte_is_read(models: Models):
    chunks = b"".join(b"1\r\n%c\r\n" % each for each in body_of(said("hello", 20_000)))
    with raw_server(answering(CHUNKED + chunks + b"0\r\n\r\n")) as server:
        result = await asked(models(server.url, bounds=ReplyBounds(body=20_000, head=70_000)))
        assert str(result.content).rstrip("x") == "hello", result.error
