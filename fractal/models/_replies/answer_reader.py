"""How an HTTP answer is read, whether it comes whole or as a stream: its first bytes tell, whatever its headers say."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING

import anyio

from fractal.errors import ReplyTooLarge
from fractal.model import show_whole
from fractal.models._replies.reading import reply_from
from fractal.models._replies.stream_reader import ReplyReader

if TYPE_CHECKING:
    from fractal.model import Reply, Sink
    from fractal.models._http.pool import HttpAnswer
    from fractal.models._secrets import Secrets
    from fractal.models.bounds import ReplyBounds

__all__ = ["AnswerReader", "read_answer", "read_body"]

_LONGEST_END = 1.0  # seconds between the last word of a stream and the end of its body
_LONGEST_USAGE = 2.0  # seconds between the finish reason and the usage, which some endpoints send after it
_BOM = b"\xef\xbb\xbf"
_FIELDS = (b"data:", b"event:", b"id:", b"retry:", b"error:", b":")
_LONGEST_FIELD = max(map(len, _FIELDS))
_NO_FIELD = (b"{", b"[", b"<", b'"')


class AnswerReader:
    """A reader that takes the body of an answer as it comes, and makes a reply of it.

    Args:
        status: HTTP status.
        headers: Headers of the answer; names in lower case, or a mapping that does not care.
        sink: Where the pieces of the reply go; None keeps the whole alone.
        bounds: The most that is read.
        secrets: What no error may repeat.
    """

    def __init__(
        self, status: int, headers: Mapping[str, str], sink: Sink | None, bounds: ReplyBounds, secrets: Secrets
    ) -> None:
        self._status, self._headers = status, headers
        self._sink, self._bounds, self._secrets = sink, bounds, secrets
        self._whole: list[bytes] = []  # until it is known to be a stream
        self._begin = b""
        self._stream: ReplyReader | None = None
        self._is_known = status >= 400  # to be no stream
        self._is_labelled = "event-stream" in headers.get("content-type", "").lower()
        self._size = 0

    @property
    def is_done(self) -> bool:
        """Whether a stream has sent its final event."""
        return self._stream is not None and self._stream.is_done

    @property
    def patience(self) -> float:
        """Seconds that the rest of the body is worth waiting for."""
        if self.is_done:
            return _LONGEST_END
        return _LONGEST_USAGE if self._stream is not None and self._stream.is_finished else math.inf

    async def read(self, data: bytes) -> None:
        """Take the next bytes.

        Raises:
            ModelError: A stream reports an error, or is none of a completion.
            ReplyTooLarge: There are more of them than there may be.
        """
        self._size += len(data)
        if self._size > self._bounds.body:
            raise ReplyTooLarge("body", self._bounds.body)
        if self._stream is None:
            self._whole.append(data)
            if self._is_known or not self._begins_stream(data):
                return
            data = b"".join(self._whole)
            self._whole.clear()
            self._stream = ReplyReader(self._sink, self._bounds, self._secrets)
        await self._stream.read(data)

    async def end(self) -> Reply:
        """Take the end of the body.

        Returns:
            The reply.

        Raises:
            ModelError: The answer is none, or not whole.
        """
        if self._stream is not None:
            return await self._stream.end()
        reply = reply_from(self._status, self._headers, b"".join(self._whole), self._bounds, self._secrets)
        if self._sink is not None:
            await show_whole(reply, self._sink)
        return reply

    def can_do_without_the_rest(self, error: Exception) -> bool:
        """Whether the reply is whole, though reading the body ended with an error."""
        return self._stream is not None and self._stream.can_do_without_the_rest(error)

    def _begins_stream(self, data: bytes) -> bool:
        """Whether the bytes so far begin a stream; notes it if they do not."""
        self._begin = begin = (self._begin + data).lstrip().removeprefix(_BOM).lstrip()[:_LONGEST_FIELD]
        if begin.startswith(_FIELDS):
            return True
        is_undecided = any(field.startswith(begin) for field in (*_FIELDS, _BOM))
        if self._is_labelled and not is_undecided and not begin.startswith(_NO_FIELD):
            return True
        self._is_known = not is_undecided
        return False


async def read_answer(response: HttpAnswer, sink: Sink, bounds: ReplyBounds, secrets: Secrets) -> Reply:
    """Read an answer that may come piece by piece.

    Args:
        response: The answer; its connection is the caller's.
        sink: Where the pieces go.
        bounds: The most that is read.
        secrets: What no error may repeat.

    Raises:
        ModelError: It is no whole answer.
    """
    reader = AnswerReader(response.status_code, response.headers, sink, bounds, secrets)
    patience = math.inf
    try:
        with anyio.CancelScope() as rest:
            async for data in response.aiter_bytes():
                await reader.read(data)
                if reader.patience < patience:
                    # The connection can be used again only when the body has ended; not every endpoint ends it.
                    patience = reader.patience
                    rest.deadline = anyio.current_time() + patience
    except Exception as error:
        if not reader.can_do_without_the_rest(error):
            raise
    return await reader.end()


async def read_body(
    status: int, headers: Mapping[str, str], body: bytes, bounds: ReplyBounds, secrets: Secrets
) -> Reply:
    """The reply in an answer that has come whole; an endpoint that always streams may have written events.

    Raises:
        ModelError: It is no reply.
    """
    if len(body) > bounds.body:
        raise ReplyTooLarge("body", bounds.body)
    if body.startswith(b"{") or status >= 400:  # as nearly all are
        return reply_from(status, headers, body, bounds, secrets)
    reader = AnswerReader(status, headers, None, bounds, secrets)
    await reader.read(body)
    return await reader.end()
