"""Bodies of answers, decompressed: the same in whatever pieces they come, and never more than is allowed."""

from __future__ import annotations

import gzip
import itertools
import zlib
from collections.abc import Callable

import pytest
from hypothesis import given, strategies as st

from fractal import BadReply, ReplyBounds, ReplyTooLarge
from fractal.models._http.decoding import LONGEST_ERROR, decoder_for

BOUNDS = ReplyBounds(body=1_000_000)


def bare(data: bytes) -> bytes:
    packer = zlib.compressobj(6, zlib.DEFLATED, -15)
    return packer.compress(data) + packer.flush()


def in_members(data: bytes) -> bytes:
    half = len(data) // 2
    return gzip.compress(data[:half]) + gzip.compress(data[half:])


CODINGS: list[tuple[str, Callable[[bytes], bytes]]] = [
    ("gzip", gzip.compress),
    ("gzip", in_members),
    ("x-gzip", lambda data: gzip.compress(data) + b"\0\0"),
    ("deflate", zlib.compress),
    ("deflate", bare),
    ("identity", bytes),
    ("", bytes),
]


def decoded(packed: bytes, coding: str, cuts: list[int], *, status: int = 200, bounds: ReplyBounds = BOUNDS) -> bytes:
    ends = sorted({cut % (len(packed) + 1) for cut in cuts} | {0, len(packed)})
    decoder = decoder_for(status, coding, bounds)
    body = b""
    for start, end in itertools.pairwise(ends):
        for piece in decoder.feed(packed[start:end]):
            assert len(piece) <= max(256 * 1024, end - start)
            body += piece
    decoder.end()
    return body


@pytest.mark.parametrize(("coding", "pack"), CODINGS)
@given(body=st.binary(max_size=200), repeat=st.sampled_from([1, 1, 50, 4000]), cuts=st.lists(st.integers(0, 10_000)))
def test_a_body_is_the_same_in_whatever_pieces_it_comes(
    coding: str, pack: Callable[[bytes], bytes], body: bytes, repeat: int, cuts: list[int]
):
    assert decoded(pack(body * repeat), coding, cuts) == body * repeat


@pytest.mark.parametrize("size", [262_143, 262_144, 262_145, 524_288, 999_999, 1_000_000])
def test_a_body_up_to_the_bound_is_decompressed_and_one_byte_more_is_not(size: int):
    for coding, pack in CODINGS:
        for cuts in ([], [1], [10, 500]):
            assert len(decoded(pack(b"x" * size), coding, cuts)) == size
            with pytest.raises(ReplyTooLarge):
                decoded(pack(b"x" * 1_000_001), coding, cuts)


@pytest.mark.parametrize(("coding", "pack"), [CODINGS[0], CODINGS[3], CODINGS[4]])
@given(cut=st.integers(1, 10_000))
def test_what_breaks_off_is_no_body(coding: str, pack: Callable[[bytes], bytes], cut: int):
    packed = pack(b"some text that is long enough, " * 3)
    kept = packed[: 1 + cut % (len(packed) - 1)]
    with pytest.raises(BadReply, match="breaks off"):
        decoded(kept, coding, [cut])


@pytest.mark.parametrize("coding", ["br", "zstd", "gzip, gzip", "gzip,deflate", "deflate , br", "compress", "x"])
def test_other_codings_are_refused_and_of_an_error_left_unread(coding: str):
    with pytest.raises(BadReply, match="which nobody has asked for") as caught:
        decoder_for(200, coding, BOUNDS)
    assert not caught.value.retryable
    assert decoded(b"whatever", coding, [], status=500) == b""


@given(st.binary(max_size=100))
def test_any_bytes_are_a_body_or_a_bad_reply(data: bytes):
    for coding, _ in CODINGS:
        try:
            decoded(data, coding, [3])
        except BadReply:
            assert coding in ("gzip", "x-gzip", "deflate")
        assert len(decoded(data, coding, [3], status=500)) <= LONGEST_ERROR


@pytest.mark.parametrize(("coding", "pack"), CODINGS)
def test_of_an_error_the_beginning_is_read(coding: str, pack: Callable[[bytes], bytes]):
    body = b"".join(b"%06d " % number for number in range(50_000))
    assert decoded(pack(body), coding, [5, 100, 30_000], status=400) == body[:LONGEST_ERROR]
    small = ReplyBounds(body=100)
    assert decoded(pack(body), coding, [5], status=400, bounds=small) == body[:100]
