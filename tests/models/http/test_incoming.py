"""How the answers of HTTP are read, whatever pieces they come in; h11, an independent reader, is the judge."""

from __future__ import annotations

import itertools
import time
from typing import NamedTuple

import h11
import pytest
from hypothesis import given, strategies as st

from fractal import ReplyBounds, ReplyTooLarge
from fractal.models._http.incoming import Incoming


class Read(NamedTuple):
    """An answer, as somebody has read it."""

    status: int
    reason: bytes
    headers: list[tuple[bytes, bytes]]
    body: bytes
    may_go_on: bool


def ours(data: bytes, cuts: list[int], *, closes: bool = False) -> Read:
    incoming = Incoming()
    for piece in pieces(data, cuts):
        incoming.feed(piece)
    if closes:
        incoming.feed(b"")
    assert incoming.fault is None
    assert incoming.is_whole
    assert incoming.head is not None
    head = incoming.head
    headers = [(name.lower(), value) for name, value in head.headers]
    return Read(head.status_code, head.reason, headers, b"".join(incoming.pieces), not incoming.is_last)


def of_h11(data: bytes, *, closes: bool = False) -> Read:
    connection = h11.Connection(h11.CLIENT, max_incomplete_event_size=1_000_000)
    connection.send(h11.Request(method="POST", target="/", headers=[("Host", "a"), ("Content-Length", "0")]))
    connection.send(h11.EndOfMessage())
    connection.receive_data(data)
    if closes:
        connection.receive_data(b"")
    head: h11.Response | None = None
    body = b""
    while not isinstance(event := connection.next_event(), h11.EndOfMessage):
        if isinstance(event, h11.Response):
            head = event
        elif isinstance(event, h11.Data):
            body += event.data
        else:
            assert isinstance(event, h11.InformationalResponse)
    assert head is not None
    may_go_on = connection.their_state is h11.DONE and not connection.trailing_data[0]
    return Read(head.status_code, bytes(head.reason), list(head.headers), body, may_go_on)


def pieces(data: bytes, cuts: list[int]) -> list[bytes]:
    ends = sorted({cut % len(data) for cut in cuts} | {0, len(data)})
    return [data[start:end] for start, end in itertools.pairwise(ends)]


HEAD = b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\n"
ANSWERS = {
    "length": HEAD + b"Content-Length: 5\r\n\r\nhello",
    "nothing": HEAD + b"Content-Length: 0\r\n\r\n",
    "chunks": HEAD + b"Transfer-Encoding: chunked\r\n\r\n3;a=1\r\nhel\r\n2\r\nlo\r\n0\r\n\r\n",
    "trailers": HEAD + b"Transfer-Encoding: chunked\r\n\r\n5\r\nhello\r\n0\r\nContent-Type: text/html\r\n\r\n",
    "hints": b"HTTP/1.1 103 Early Hints\r\nLink: </x>\r\n\r\n" + HEAD + b"Content-Length: 5\r\n\r\nhello",
    "go on": b"HTTP/1.1 100 Continue\r\n\r\n" + HEAD + b"Content-Length: 5\r\n\r\nhello",
    "close": HEAD + b"Connection: close\r\nContent-Length: 5\r\n\r\nhello",
    "old": b"HTTP/1.0 200 OK\r\nContent-Length: 5\r\n\r\nhello",
    "no content": b"HTTP/1.1 204 No Content\r\n\r\n",
    "not modified": b"HTTP/1.1 304 Not Modified\r\nContent-Length: 5\r\n\r\n",
    "no reason": b"HTTP/1.1 200 \r\nContent-Length: 5\r\n\r\nhello",
    "a failure": b"HTTP/1.1 503 Service Unavailable\r\nRetry-After: 1\r\nContent-Length: 2\r\n\r\n{}",
    "line feeds": b"HTTP/1.1 200 OK\nContent-Length: 5\n\nhello",
    "empty value": HEAD + b"X-Empty:\r\nX-Spaces:   a b  \r\nContent-Length: 5\r\n\r\nhello",
    "high bytes": HEAD + b"X-Name: caf\xe9\r\nContent-Length: 5\r\n\r\nhello",
    "folded": HEAD + b"X-Fold: a\r\n b\r\nContent-Length: 5\r\n\r\nhello",
    "control": HEAD + b"X-Control: a\x01b\r\nContent-Length: 5\r\n\r\nhello",
    "spaces": HEAD + b"Transfer-Encoding: chunked\r\n\r\n5  \r\nhello\r\n0\r\n\r\n",
    "both lengths": HEAD + b"Transfer-Encoding: chunked\r\nContent-Length: 5\r\n\r\n5\r\nhello\r\n0\r\n\r\n",
    "equal lengths": HEAD + b"Content-Length: 5\r\nX-A: b\r\ncontent-length: 5\r\n\r\nhello",
    "equal lengths in one": HEAD + b"Content-Length: 5, 5\r\n\r\nhello",
    "three equal lengths": HEAD + b"Content-Length: 5\r\n" * 3 + b"\r\nhello",
    "hints and equal lengths": b"HTTP/1.1 103 Early Hints\r\nLink: </x>\r\n\r\n"
    + HEAD
    + b"Content-Length: 5\r\nContent-Length: 5\r\n\r\nhello",
    "equal lengths and more": HEAD + b"Content-Length: 5\r\n" * 2 + b"\r\nhello" + HEAD + b"Content-Length: 0\r\n\r\n",
    "a later version": HEAD.replace(b"1.1", b"1.9") + b"Content-Length: 5\r\n\r\nhello",
    "more than asked": HEAD + b"Content-Length: 5\r\n\r\nhello" + HEAD + b"Content-Length: 3\r\n\r\nbye",
}


@given(name=st.sampled_from(sorted(ANSWERS)), cuts=st.lists(st.integers(0, 500)))
def test_an_answer_is_the_same_in_whatever_pieces_it_comes(name: str, cuts: list[int]):
    assert ours(ANSWERS[name], cuts) == of_h11(ANSWERS[name])


@given(cuts=st.lists(st.integers(0, 100)))
def test_an_answer_without_a_length_ends_with_its_connection(cuts: list[int]):
    answer = b"HTTP/1.1 200 OK\r\nX: 1\r\n\r\nhello"
    read = ours(answer, cuts, closes=True)
    assert read[:4] == of_h11(answer, closes=True)[:4]
    assert not read.may_go_on


@given(
    body=st.binary(max_size=300),
    sizes=st.lists(st.integers(1, 50), min_size=1),
    cuts=st.lists(st.integers(0, 1000)),
)
def test_chunks_of_any_size_are_the_body(body: bytes, sizes: list[int], cuts: list[int]):
    answer, rest = HEAD + b"Transfer-Encoding: chunked\r\n\r\n", body
    while rest:
        for size in sizes:
            if rest:
                answer += b"%x\r\n%b\r\n" % (len(rest[:size]), rest[:size])
                rest = rest[size:]
    assert ours(answer + b"0\r\n\r\n", cuts).body == body


def test_one_answer_follows_another():
    incoming = Incoming()
    for body in (b"hello", b"again"):
        incoming.expect(has_body=True)
        assert incoming.head is None
        incoming.feed(HEAD + b"Content-Length: 5\r\n\r\n" + body)
        assert incoming.is_whole
        assert not incoming.is_last
        assert incoming.pieces == [body]


def test_an_answer_to_head_has_no_body_whatever_length_it_tells():
    incoming = Incoming()
    incoming.expect(has_body=False)
    incoming.feed(HEAD + b"Content-Length: 5\r\n\r\n")
    assert incoming.is_whole
    assert incoming.is_last
    assert incoming.pieces == []


def test_what_came_before_a_fault_is_still_there():
    incoming = Incoming()
    incoming.feed(HEAD + b"Transfer-Encoding: chunked\r\n\r\n5\r\nhello\r\nno chunk\r\n")
    assert incoming.pieces == [b"hello"]
    assert incoming.fault is not None
    assert not incoming.is_whole


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (b"SSH-2.0-OpenSSH_9.2\r\n\r\n", "is no HTTP"),
        (b"HTTP/1.1 xyz OK\r\n\r\n", "is no HTTP"),
        (b"HTTP/1.1 101 Switching Protocols\r\nUpgrade: x\r\nConnection: upgrade\r\n\r\n", "is no HTTP"),
        (HEAD + b"Content-Length: five\r\n\r\n", "is no HTTP"),
        (HEAD + b"Content-Length: 5\r\nContent-Length: 6\r\n\r\n", "is no HTTP"),
        (HEAD + b"Content-Length: 5, 6\r\n\r\n", "is no HTTP"),
        (HEAD + b"Content-Length: 5\r\nContent-Length: 5\r\nContent-Length: 6\r\n\r\nhello", "is no HTTP"),
        (HEAD + b"Content-Length: 5\r\nContent-Length: 5", "said nothing"),
        (HEAD + b"Transfer-Encoding: gzip\r\n\r\n", "Transfer-Encoding other than chunked"),
        (HEAD + b"Transfer-Encoding: gzip, chunked\r\n\r\n0\r\n\r\n", "Transfer-Encoding other than chunked"),
        (HEAD + b"X-Long: " + b"x" * 200_000, "too large: head"),
        (b"", "said nothing"),
        (b"HTTP/1.1 200", "said nothing"),
        (HEAD + b"Content-Length: 5\r\n\r\nhell", "complete message body"),
        (HEAD + b"Transfer-Encoding: chunked\r\n\r\n5\r\nhello\r\n", "complete message body"),
    ],
)
def test_what_is_no_whole_answer_is_a_fault(data: bytes, words: str):
    incoming = Incoming()
    incoming.feed(data)
    if data and incoming.fault is None:
        incoming.feed(b"")
    assert words in str(incoming.fault)
    assert not incoming.is_whole


def test_what_comes_after_an_answer_that_says_close_does_no_harm_to_it():
    incoming = Incoming()
    incoming.feed(HEAD + b"Connection: close\r\nContent-Length: 5\r\n\r\nhelloGARBAGE")
    assert incoming.fault is None
    assert incoming.is_whole
    assert incoming.is_last
    assert incoming.pieces == [b"hello"]


@pytest.mark.parametrize("step", [1, 7, 1000])
@pytest.mark.parametrize("first", [True, False])
def test_no_coding_is_one_that_is_called_identity(step: int, first: bool):
    lines = [b"Transfer-Encoding: identity\r\n", b"Content-Length: 5\r\n"]
    data = HEAD + b"".join(lines if first else reversed(lines)) + b"\r\nhello"
    incoming = Incoming()
    for start in range(0, len(data), step):
        incoming.feed(data[start : start + step])
    assert (incoming.fault, incoming.is_whole, incoming.is_last) == (None, True, False)
    assert b"".join(incoming.pieces) == b"hello"


def test_a_connection_goes_on_after_a_head_that_was_written_anew():
    incoming = Incoming()
    for body in (b"hello", b"again"):
        incoming.expect(has_body=True)
        incoming.feed(HEAD + b"Content-Length: 5\r\nContent-Length: 5\r\n\r\n" + body)
        assert (incoming.fault, incoming.is_whole, incoming.is_last) == (None, True, False)
        assert incoming.pieces == [body]


TWICE = b"Content-Length: 5\r\nContent-Length: 5\r\n"
LONG_HEADS = {
    "a long line": HEAD + TWICE + b"X-More: " + b"x" * 90_000,
    "many lines": HEAD + TWICE + b"A: b\r\n" * 10_000 + b"X: y",
    "many hints": (b"HTTP/1.1 103 Early\r\n" + TWICE + b"\r\n") * 800 + HEAD + TWICE + b"X: y",
}


@pytest.mark.parametrize("name", LONG_HEADS)
def test_a_head_that_is_written_anew_costs_time_in_proportion(name: str):
    incoming, started = Incoming(), time.perf_counter()
    for byte in LONG_HEADS[name] + b"\r\n\r\nhello":
        incoming.feed(bytes((byte,)))
    assert time.perf_counter() - started < 5
    assert (incoming.fault, incoming.is_whole, b"".join(incoming.pieces)) == (None, True, b"hello")


BOUNDS = ReplyBounds(head=200, body=1000)


@pytest.mark.parametrize("step", [1, 100, 10_000])
@pytest.mark.parametrize(
    ("data", "bound"),
    [
        (HEAD + b"X-More: " + b"x" * 200 + b"\r\nContent-Length: 2\r\n\r\n{}", "head"),
        (HEAD + b"X-More: xxxxxxxxxxxxxxxx\r\n" * 10 + b"Content-Length: 2\r\n\r\n{}", "head"),
        (b"HTTP/1.1 103 Early Hints\r\nLink: </x>\r\n\r\n" * 10, "head"),
        (HEAD + b"Content-Length: 5\r\nContent-Length: 5\r\nX-More: " + b"x" * 400 + b"\r\n\r\nhello", "head"),
    ],
)
def test_a_head_that_is_too_long_is_refused_in_whatever_pieces_it_comes(data: bytes, bound: str, step: int):
    incoming = Incoming()
    incoming.expect(has_body=True, bounds=BOUNDS)
    for start in range(0, len(data), step):
        incoming.feed(data[start : start + step])
        if incoming.fault is not None:
            break
    assert isinstance(incoming.fault, ReplyTooLarge)
    assert (incoming.fault.what, incoming.head, incoming.pieces) == (bound, None, [])


def test_trailers_that_are_too_long_are_refused():
    incoming = Incoming()
    incoming.expect(has_body=True, bounds=BOUNDS)
    incoming.feed(HEAD + b"Transfer-Encoding: chunked\r\n\r\n2\r\n{}\r\n0\r\n")
    while incoming.fault is None:
        incoming.feed(b"A: b\r\n")
    assert isinstance(incoming.fault, ReplyTooLarge)
    assert incoming.pieces == [b"{}"]


def test_what_is_kept_of_a_head_is_let_go():
    incoming = Incoming()
    incoming.feed(HEAD + b"Content-Length: 50000\r\n\r\n" + b"x" * 50_000)
    assert incoming._begun == []
