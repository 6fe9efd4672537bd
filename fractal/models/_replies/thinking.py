"""A model's thinking where an endpoint leaves it in the text, before the answer."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from fractal.model import Delta

if TYPE_CHECKING:
    from collections.abc import Iterator

    from fractal.model import Reply, Sink

__all__ = ["ThinkingSink", "without_thinking"]


def without_thinking(reply: Reply, tags: tuple[str, str]) -> Reply:
    """A reply whose text is the answer alone; the message that goes back to the endpoint stays as it was written.

    Args:
        reply: The reply.
        tags: What stands before the thinking and after it. Servers that write the first one themselves may send a text
            that has only the other.
    """
    before, closing, answer = (reply.text or "").partition(tags[1])
    if not closing and not before.lstrip().startswith(tags[0]):
        return reply
    content = reply.content if reply.content is not None else reply.text
    return replace(reply, text=answer.lstrip() or None, content=content)


_LONGEST_BLANK = 1000  # characters of white space before a tag


class ThinkingSink:
    """A sink that hands thinking at the start of a text on as reasoning, and the rest as text.

    Args:
        sink: Where the pieces go.
        tags: What stands before the thinking and after it.
    """

    def __init__(self, sink: Sink, tags: tuple[str, str]) -> None:
        self._sink = sink
        self._opening, self._closing = tags
        self._kept = ""  # what may be the beginning of a tag
        self._state = "before"  # "thinking", "after" its end, "answer"

    async def __call__(self, delta: Delta) -> None:
        """Take the next piece of a reply."""
        if delta.kind != "text" or self._state == "answer":
            await self._sink(delta)
            return
        self._kept += delta.text
        for piece in list(self._pieces()):
            await self._sink(piece)

    async def end(self) -> None:
        """Hand on what was kept, since it is no tag."""
        kept, self._kept = self._kept, ""
        if kept and self._state != "after":
            await self._sink(Delta("reasoning" if self._state == "thinking" else "text", kept))

    def _pieces(self) -> Iterator[Delta]:
        if self._state == "before":
            begin = self._kept.lstrip()
            if begin.startswith(self._opening):
                self._state, self._kept = "thinking", begin[len(self._opening) :]
            elif not self._opening.startswith(begin) or len(self._kept) > _LONGEST_BLANK:
                self._state = "answer"
        if self._state == "thinking":
            thought, closing, rest = self._kept.partition(self._closing)
            if closing:
                self._state, self._kept = "after", rest
            else:
                length = len(thought) - _length_of_begin(thought, self._closing)
                thought, self._kept = thought[:length], thought[length:]
            if thought:
                yield Delta("reasoning", thought)
        if self._state == "after":
            self._kept = self._kept.lstrip()
            self._state = "answer" if self._kept else "after"
        if self._state == "answer" and self._kept:
            text, self._kept = self._kept, ""
            yield Delta("text", text)


def _length_of_begin(text: str, tag: str) -> int:
    """The number of characters at the end of a text that may begin a tag."""
    return next((length for length in range(len(tag) - 1, 0, -1) if text.endswith(tag[:length])), 0)
