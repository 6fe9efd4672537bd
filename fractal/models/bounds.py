"""How much an endpoint may answer."""

from __future__ import annotations

from dataclasses import dataclass, fields

from fractal._checks import is_count
from fractal.errors import InvalidArguments

__all__ = ["DEFAULT_BOUNDS", "ReplyBounds"]

_MIB = 1024 * 1024


@dataclass(frozen=True, slots=True, kw_only=True)
class ReplyBounds:
    """The most that is read of one answer, so that no endpoint can fill the memory or hold up the event loop.

    An answer beyond a bound is `ReplyTooLarge`, and reading it ends where the bound is.

    Args:
        body: Bytes of the body after decompression, whole or streamed.
        line: Bytes of one event of a stream.
        head: Bytes of the status line and headers, and of the trailers.
        values: Commas and opening brackets in the JSON of one body or event: about as many as its values.
        depth: Lists and objects inside each other.
        calls: Tool calls in one reply.
        arguments: Characters of the arguments of one tool call.

    Raises:
        InvalidArguments: A bound is no whole number from 1 up.

    Example:
        >>> from fractal import OpenAIModel
        >>> model = OpenAIModel(bounds=ReplyBounds(calls=20))
    """

    body: int = 64 * _MIB
    line: int = 16 * _MIB
    head: int = 100 * 1024
    values: int = 1_000_000
    depth: int = 200
    calls: int = 1000
    arguments: int = 4 * _MIB

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            if not is_count(value, 1):
                raise InvalidArguments(f"{field.name}={value!r}: give a whole number from 1 up")


DEFAULT_BOUNDS = ReplyBounds()
