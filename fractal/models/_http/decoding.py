"""Bodies of answers as they are read: decompressed in small steps, and never more than the bounds allow."""

from __future__ import annotations

import zlib
from typing import TYPE_CHECKING, Any, Self

from anyio.lowlevel import checkpoint

from fractal.errors import BadReply, ReplyTooLarge

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Iterator

    from fractal.models.bounds import ReplyBounds

__all__ = ["ACCEPTED_CODINGS", "LONGEST_ERROR", "DecodedPieces", "Decoder", "decoder_for"]

ACCEPTED_CODINGS = "gzip, deflate"
"""What a request says of the codings that its answer may have."""

LONGEST_ERROR = 20_000
"""Bytes that are read of the body of an HTTP error."""

_STEP = 256 * 1024  # bytes that are decompressed at a time, which takes about a millisecond


class Decoder:
    """The body of one answer: counts the bytes that come, and decompresses them.

    Args:
        coding: Its content coding: gzip or deflate; None if it has none.
        bounds: The most that it may be, as it comes and decompressed.
        is_error: Whether it is of an HTTP error. Of such a body the beginning is read, and whatever is wrong with it
            ends it.

    Attributes:
        is_error: The same.
        is_enough: Whether nothing more is read of it.
    """

    def __init__(self, coding: str | None, bounds: ReplyBounds, *, is_error: bool) -> None:
        self._coding, self._bounds, self.is_error = coding, bounds, is_error
        self._most = min(LONGEST_ERROR, bounds.body) if is_error else bounds.body
        self._come = self._made = 0
        self._packed = _Packed(coding) if coding in _WINDOWS else None
        self.is_enough = is_error and coding is not None and self._packed is None

    def feed(self, data: bytes) -> Iterator[bytes]:
        """The decoded bytes of a part of the body, in pieces of a quarter of a megabyte at most.

        Raises:
            ReplyTooLarge: The body is more than the bounds allow.
            BadReply: It is not compressed as it says.
        """
        self._come += len(data)
        if self.is_enough:
            return
        if self._packed is None:
            yield from self._counted(data)
        elif not self.is_error and self._come > self._most:
            raise ReplyTooLarge("body", self._bounds.body)
        else:
            try:
                for piece in self._packed.feed(data):
                    yield from self._counted(piece)
                    if self.is_enough:
                        return
            except zlib.error as error:
                self._fail(f"the endpoint's answer is not compressed with {self._coding}, as it says: {error}")

    def end(self) -> None:
        """Note the end of the body.

        Raises:
            BadReply: What is compressed is not whole.
        """
        if self._packed is not None and self._come and not self._packed.is_whole:
            self._fail(f"the endpoint's answer, compressed with {self._coding}, breaks off")

    def _counted(self, piece: bytes) -> Iterator[bytes]:
        room = self._most - self._made
        self._made += len(piece)
        if len(piece) > room and not self.is_error:
            raise ReplyTooLarge("body", self._bounds.body)
        self.is_enough |= self.is_error and len(piece) >= room
        if piece[:room]:
            yield piece[:room]

    def _fail(self, text: str) -> None:
        if not self.is_error:
            raise BadReply(text)
        self.is_enough = True


_WINDOWS = {"gzip": zlib.MAX_WBITS | 16, "deflate": zlib.MAX_WBITS}


class _Packed:
    """A decompressor for one encoding: members of gzip in sequence, or deflate with or without its frame."""

    def __init__(self, coding: str) -> None:
        self._coding = coding
        self._begun = b""  # too little to tell what it is
        self._unpacker: Any = None

    @property
    def is_whole(self) -> bool:
        """Whether the data is complete."""
        return self._unpacker is not None and self._unpacker.eof

    def feed(self, data: bytes) -> Iterator[bytes]:
        """The decompressed bytes, in pieces."""
        if self._unpacker is None:
            data = self._begun + data
            if len(data) < 2:
                self._begun = data
                return
            self._unpacker = zlib.decompressobj(self._window(data))
        is_full = False  # then there may be more, although no byte is left
        while data or (is_full and not self._unpacker.eof):
            if self._unpacker.eof:
                if self._coding != "gzip" or not data.startswith(b"\x1f"):
                    return  # what follows has nothing to say
                self._unpacker = zlib.decompressobj(_WINDOWS["gzip"])
            piece = self._unpacker.decompress(data, _STEP)
            data = self._unpacker.unconsumed_tail or self._unpacker.unused_data
            is_full = len(piece) == _STEP
            if piece:
                yield piece

    def _window(self, data: bytes) -> int:
        has_frame = data[0] & 0x0F == zlib.DEFLATED and int.from_bytes(data[:2], "big") % 31 == 0
        return _WINDOWS[self._coding] if self._coding == "gzip" or has_frame else -zlib.MAX_WBITS


class DecodedPieces:
    """The pieces of a body, decoded, as an async iterator.

    No generator: one that is left early has to be closed.

    Args:
        pieces: The body as it comes.
        decoder: Decodes it.
    """

    def __init__(self, pieces: AsyncIterator[bytes], decoder: Decoder) -> None:
        self._pieces, self._decoder = pieces, decoder
        self._steps: Iterator[bytes] = iter(())

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> bytes:
        decoder = self._decoder
        piece = next(self._steps, None)
        if piece is not None:
            await checkpoint()  # some thousand bytes can be gigabytes
        while piece is None:
            if decoder.is_enough:
                raise StopAsyncIteration
            try:
                self._steps = decoder.feed(await self._pieces.__anext__())
            except StopAsyncIteration:
                decoder.end()
                raise
            except Exception:
                if not decoder.is_error:
                    raise
                raise StopAsyncIteration from None  # that it failed is known without the rest
            piece = next(self._steps, None)
        return piece


def decoder_for(status: int, codings: str, bounds: ReplyBounds) -> Decoder:
    """The decoder for the body of an answer.

    Args:
        status: HTTP status of the answer.
        codings: Its header Content-Encoding; several are joined with commas.
        bounds: The most that is read of it.

    Raises:
        BadReply: It is compressed in a way that nobody has asked for.
    """
    names = [name.strip().lower().removeprefix("x-") for name in codings.split(",")]
    names = [name for name in names if name not in ("", "identity")]
    is_error = status >= 400
    if not is_error and (len(names) > 1 or not set(names) <= _WINDOWS.keys()):
        fault = BadReply(
            f"the endpoint's answer has the Content-Encoding {', '.join(names)!r}, which nobody has asked for:"
            " gzip or deflate is read, once",
            status=status,
        )
        fault.retryable = False
        raise fault
    return Decoder(", ".join(names) or None, bounds, is_error=is_error)
