"""Server-sent events, cut anywhere."""

from __future__ import annotations

import itertools
import time

import pytest
from hypothesis import given, strategies as st

from fractal.errors import ReplyTooLarge
from fractal.models._replies.events import ErrorData, EventReader


def events(*pieces: bytes, longest: int = 1 << 20) -> list[bytes]:
    reader = EventReader(longest)
    return [event for piece in pieces for event in reader.read(piece)]


STREAMS = [
    b"data: a\n\ndata: b\n\n",
    b"data:a\r\n\r\ndata:b\r\n\r\n",
    b"data: a\r\rdata: b\r\r",
    b"\xef\xbb\xbfdata: a\n\ndata: b\n\n",
    b": ping\n\nid: 1\nevent: message\nretry: 5\ndata: a\n\n\n\nunknown\ndata: b\n\n",
    b"  \t data: a\n\ndata: b\n\n",
    b" \xef\xbb\xbf  data: a\r\n\r\ndata: b\n\n",
    b"\n\ndata: a\n: in between\n\ndata: b\r\n\n",
]


@pytest.mark.parametrize("stream", STREAMS, ids=str)
def test_events_are_the_same_however_the_bytes_are_cut(stream: bytes):
    assert events(stream) == [b"a", b"b"]
    assert events(*[bytes([byte]) for byte in stream]) == [b"a", b"b"]
    for cut in range(len(stream)):
        assert events(stream[:cut], stream[cut:]) == [b"a", b"b"], cut


PIECES = [b"data: x\n", b"\n", b"\r", b"\r\n", b" ", b"data", b": \n", b"\xef", b"\xbb"]


@given(st.lists(st.sampled_from(PIECES), max_size=12))
def test_any_bytes_give_the_same_events_whole_and_byte_by_byte(pieces: list[bytes]):
    stream = b"".join(pieces)
    assert events(stream) == events(*[bytes([byte]) for byte in stream])


def test_the_lines_of_an_event_are_joined():
    assert events(b'data: {"a":\ndata: 1}\n\n') == [b'{"a":\n1}']


@pytest.mark.parametrize(
    "stream", [b"event: error\ndata: oops\n\n", b"error: oops\n\n", b"event:error\r\ndata:oops\r\n\r\n"]
)
def test_an_event_says_that_it_is_an_error_by_its_name_or_its_field(stream: bytes):
    for cut in range(len(stream)):
        reader = EventReader(1000)
        found = [*reader.read(stream[:cut]), *reader.read(stream[cut:]), *reader.read(b"data: fine\n\n")]
        assert [(bytes(event), isinstance(event, ErrorData)) for event in found] == [(b"oops", True), (b"fine", False)]


def test_the_end_of_the_stream_ends_an_event():
    reader = EventReader(1000)
    assert reader.read(b"data: a\n\ndata: b") == [b"a"]
    assert reader.end() == [b"b"]
    assert reader.end() == []


@pytest.mark.parametrize("piece", [b"data: " + b"x" * 500, b"data: x\n", b": ping\n", b"x" * 99])
def test_an_event_beyond_the_bound_is_an_error_that_names_it(piece: bytes):
    reader = EventReader(1000)
    with pytest.raises(ReplyTooLarge) as caught:
        for _ in itertools.repeat(None, 2000):
            reader.read(piece)
    assert (caught.value.what, caught.value.bound, caught.value.retryable) == ("line", 1000, False)


@pytest.mark.parametrize("end", [b"\n\n", b"\r\n\r\n", b"\n: ping\n\n"], ids=str)
@pytest.mark.parametrize("size", [1, 700, 1 << 20])
def test_an_event_beyond_the_bound_is_an_error_however_the_bytes_are_cut(end: bytes, size: int):
    fine, long = b"data: " + b"x" * 900 + end, b"data: " + b"x" * 1000 + end

    def read(stream: bytes) -> list[bytes]:
        return events(*(stream[begin : begin + size] for begin in range(0, len(stream), size)), longest=1000)

    assert read(fine * 5) == [b"x" * 900] * 5
    with pytest.raises(ReplyTooLarge):
        read(fine * 2 + long + fine)


def test_a_stream_of_short_events_has_no_bound():
    reader = EventReader(100)
    for _ in range(1000):
        reader.read(b"event: message\ndata: x\n\n")


@pytest.mark.parametrize("size", [1, 1000, 65536])
def test_a_long_line_costs_time_in_proportion(size: int):
    line = b"data: " + b"x" * (size * 20_000 if size == 1 else 16_000_000) + b"\n\n"
    reader = EventReader(1 << 30)
    started = time.perf_counter()
    for begin in range(0, len(line), size):
        reader.read(line[begin : begin + size])
    assert time.perf_counter() - started < 3
