"""The context window: what of a long conversation a request sends, and what a summary stands for.

The transcript itself is never changed. Counting goes message by message, once each, into running sums, so that a
request which fits costs its new messages, and the place to cut is a search in a sorted list.
"""

from __future__ import annotations

import os
from bisect import bisect_left
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, cast

from fractal._checks import is_count
from fractal._engine.hooks import Hook
from fractal._functions.callables import is_plain
from fractal._json import decode, encode, is_list, is_mapping
from fractal._texts import described, repr_of
from fractal.errors import ContextWindowExceeded, FractalError, InvalidArguments, UnexpectedError
from fractal.messages import Message, Transcript

if TYPE_CHECKING:
    from fractal.model import ModelRequest

__all__ = [
    "Compact",
    "TokenCounter",
    "Window",
    "WindowView",
    "checked_compact",
    "checked_counter",
    "checked_window",
    "count_tokens",
]

TokenCounter = Callable[[Message], int]
"""Tokens of one message, as the endpoint would count them or near it."""

Compact = Callable[..., str | Message | Awaitable[str | Message | None] | None]
"""Makes what stands for messages that are left out: text, a message, or None for nothing. Plain or async. It is called
with the messages, and with the run's `RunContext` if it has a second parameter without a default."""

_BYTES_PER_TOKEN = 4
_RESERVE = 4096
_RESERVED_PART = 4  # of a small window, no more than a quarter
_MEDIA_TOKENS = {"image_url": 765, "input_audio": 600, "file": 2000, "video_url": 2000}

_SYSTEM_ROLES = ("system", "developer")
_RESULT_ROLES = ("tool", "function")
_SUMMARY_ROLES = ("system", "developer", "user")  # an endpoint takes them before the user's first turn


def count_tokens(message: Message) -> int:
    """Estimate the tokens of a message, without a tokenizer.

    A rule of thumb: a token for 4 bytes of the message's JSON, where the JSON around the text stands for the few
    tokens that frame a message. Guides of OpenAI and others give 4 characters of English text; bytes of UTF-8 instead
    of characters bring other scripts nearer, as they have fewer characters to a token. An image, an audio piece, a
    file or a video counts a fixed amount, whatever its base64 takes: 765 for an image (1024 × 1024 in high detail, for
    GPT-4o), 600 for audio (a minute), 2000 for a file or a video (a few pages). Expect errors of a third either way,
    and give a counter of your own where the window is tight.

    Args:
        message: The chat-completions message.

    Example:
        >>> count_tokens({"role": "user", "content": "How far is it from Rome to Oslo?"})
        15
    """
    content, media = message.get("content"), 0
    if is_list(content):
        media = sum(map(_media_tokens, content))
        message = {**message, "content": [part for part in content if not _media_tokens(part)]}
    return media + _tokens_of_bytes(encode(message))


def _media_tokens(part: object) -> int:
    kind = part.get("type") if is_mapping(part) else None
    return _MEDIA_TOKENS.get(kind, 0) if isinstance(kind, str) else 0


def _tokens_of_bytes(data: bytes) -> int:
    return -(-len(data) // _BYTES_PER_TOKEN)


@dataclass(frozen=True, slots=True, kw_only=True)
class Window:
    """The limit of a request's length, and what replaces the messages that are left out.

    Args:
        limit: Tokens of the context window: the whole request and the reply.
        count: Counts the tokens of one message.
        compact: Makes what stands for messages that are left out, plain or async. When more of them are left out, it
            gets what it made before as the first message. Each run begins without. None: nothing stands for them.

    Raises:
        InvalidArguments: A setting cannot be what was meant.

    Example:
        >>> Window(limit=8000, compact=lambda messages: f"{len(messages)} messages about the weather").limit
        8000
    """

    limit: int
    count: TokenCounter = count_tokens
    compact: Compact | None = None

    def __post_init__(self) -> None:
        _check_limit(self.limit)
        checked_counter(self.count)
        checked_compact(self.compact)

    def tokens(self, message: Message) -> int:
        """The tokens of one message, by the counter.

        Raises:
            InvalidArguments: The counter gave no number of tokens.
            UnexpectedError: It raised; the original is `__cause__`.
        """
        try:
            tokens = self.count(message)
        except Exception as error:
            raise UnexpectedError(
                f"the token counter failed on a {message['role']} message: {described(error)}"
            ) from error
        if not is_count(tokens):
            raise InvalidArguments(
                f"the token counter returned {repr_of(tokens)} for a {message['role']} message:"
                " give a whole number from 0 up"
            )
        return tokens


def checked_window(limit: Any) -> int | None:
    """The tokens of the context window, from the environment if none are given; None for no limit.

    Raises:
        InvalidArguments: It is no number of tokens.
    """
    if limit is not None:
        _check_limit(limit)
        tokens: int = limit
        return tokens
    named = os.environ.get("CONTEXT_WINDOW", "").strip()
    if named and not named.isdecimal():
        raise InvalidArguments(
            f"CONTEXT_WINDOW is {named!r}: give a whole number of tokens, 0 for no limit, or unset it"
        )
    return int(named or 0) or None


def checked_counter(count: Any) -> TokenCounter | None:
    """The function that counts the tokens of a message, checked.

    Raises:
        InvalidArguments: It cannot be called so.
    """
    if count is not None and not _is_function(count):
        raise InvalidArguments(f"count_tokens={repr_of(count)}: give a plain function of one message, or None")
    counter: TokenCounter | None = count
    return counter


def checked_compact(compact: object) -> Compact | None:
    """The function that sums up messages that are left out, checked.

    Raises:
        InvalidArguments: It cannot be called so.
    """
    if compact is not None:
        if not callable(compact):
            raise InvalidArguments(f"compact={repr_of(compact)}: give a function of the messages left out, or None")
        Hook(compact, "compact")
    return cast("Compact | None", compact)


def _is_function(value: object) -> bool:
    return callable(value) and is_plain(value)


def _check_limit(limit: object) -> None:
    if not is_count(limit, 1):
        raise InvalidArguments(
            f"context_window={repr_of(limit)}: give a whole number of tokens from 1 up, or None for no limit"
        )


class WindowView:
    """The part of one run's transcript that is sent; follows the transcript as it grows.

    What has been left out stays out. The system messages at the start of the transcript stay, as do the run's question
    and the newest group; a group is a message with tool calls and their results, or any other message by itself. Of
    the rest, whole turns go first, oldest first: a user message with all up to the next. When no turn before the
    question is left, groups after it go, oldest first.

    Args:
        window: The agent's settings.
        transcript: The run's transcript, with the run's question as its last user message.
        context: Makes the `RunContext` that a `compact` function may ask for.
        warn: Told what a user should know.
    """

    def __init__(
        self,
        window: Window,
        transcript: Transcript,
        *,
        context: Callable[[], Any],
        warn: Callable[[str], None],
    ) -> None:
        self._window, self._transcript = window, transcript
        self._context, self._warn = context, warn
        messages = transcript.messages
        roles = [message["role"] for message in messages]
        self._head = next((i for i, role in enumerate(roles) if role not in _SYSTEM_ROLES), len(roles))
        self._question = max((i for i, role in enumerate(roles) if role == "user"), default=-1)
        self._sums = [0]  # tokens of all messages before each position
        self._cuts: list[int] = []  # positions before which all that may go can go
        self._cut = self._head  # everything from the head to here is left out, but for the question
        self._summary: Message | None = None
        self._summary_tokens = 0
        self._texts: dict[str, int] = {}  # tokens of the system prompt and of instructions

    @property
    def state(self) -> tuple[int, Message | None]:
        """The position up to which messages are left out, and what stands for them."""
        return self._cut, self._summary

    def restore(self, cut: int, summary: Message | None) -> None:
        """Leave out what a process that has ended left out.

        Args:
            cut: The position up to which messages are left out.
            summary: What stands for them.
        """
        self._cut, self._summary = cut, summary
        self._summary_tokens = self._window.tokens(summary) if summary is not None else 0

    def other_tokens(self, request: ModelRequest) -> int:
        """Tokens of a request apart from the transcript and the summaries in it.

        System prompt, tools, instruction and further fields such as a response format, and the room that the reply
        may take: `max_tokens`, where the request says it.

        Raises:
            InvalidArguments: The counter gave no number of tokens.
            UnexpectedError: It raised.
        """
        texts = sum(map(self._text_tokens, filter(None, (request.system, request.instruction))))
        fields = {**request.settings.fields(), **request.fields}
        tools = _tokens_of_bytes(request.tools.encoded()) if request.tools is not None and request.tools.schemas else 0
        return texts + tools + _tokens_of_bytes(encode(fields)) + request.reply_tokens

    def reserve(self, request: ModelRequest) -> int:
        """Tokens to keep free for the reply of a request that does not say how long it may be."""
        return 0 if request.reply_tokens else min(_RESERVE, self._window.limit // _RESERVED_PART)

    async def fit(
        self, other_tokens: int, call: Callable[..., Awaitable[Any]], *, reserve: int = 0
    ) -> tuple[list[int] | None, Message | None]:
        """Choose what the next request sends.

        With a `compact` function, more is left out than has to be: down to half of what the window has for the
        transcript, so that the function is not called at every request.

        Args:
            other_tokens: Tokens that the rest of the request needs, with the room for the reply.
            call: Awaited with a `compact` function and its arguments; calls it where it does not block.
            reserve: Tokens that are kept free for a reply of unknown length, as far as what has to stay leaves them.

        Returns:
            The positions in the transcript that are sent, None for all of them; and the message that stands for the
            others, or None. They are what `ModelRequest` takes as `kept` and `summary`.

        Raises:
            ContextWindowExceeded: What has to stay does not fit; nothing was left out.
            InvalidArguments: The counter or the `compact` function returned something it must not.
            UnexpectedError: One of them raised; the original is `__cause__`.
        """
        self._count_new()
        room = self._window.limit - other_tokens
        if self._tokens_from(self._cut) + self._summary_tokens > room - reserve:
            await self._make_room(room, reserve, call)
        return self._kept(), self._summary

    def _count_new(self) -> None:
        for position, message in enumerate(self._transcript.since(len(self._sums) - 1), len(self._sums) - 1):
            self._sums.append(self._sums[-1] + self._window.tokens(message))
            if self._may_start_at(position, message["role"]):
                self._cuts.append(position)

    def _may_start_at(self, position: int, role: str) -> bool:
        if position <= self._question:
            return role == "user"
        # To cut right after what stays would leave out nothing.
        return role not in _RESULT_ROLES and position > max(self._question + 1, self._head)

    def _tokens_from(self, cut: int) -> int:
        """Tokens of the transcript if everything that may go before a position has gone."""
        asked = 0 <= self._question < cut and self._sums[self._question + 1] - self._sums[self._question]
        return self._sums[self._head] + asked + self._sums[-1] - self._sums[cut]

    async def _make_room(self, room: int, reserve: int, call: Callable[..., Awaitable[Any]]) -> None:
        last = self._cuts[-1] if self._cuts else self._cut
        least = self._tokens_from(last)
        if least > room:
            raise ContextWindowExceeded(self._window.limit - room + least, self._window.limit)
        room = room - reserve if least <= room - reserve else room
        target = room
        if self._window.compact is not None:
            target = min(room // 2, room - self._summary_tokens)
        found = bisect_left(self._cuts, True, key=lambda cut: self._tokens_from(cut) <= target)
        cut = self._cuts[found] if found < len(self._cuts) else last
        if cut == self._cut and self._tokens_from(cut) + self._summary_tokens <= room:
            return  # what has to stay leaves less for the reply
        summary, tokens = None, 0
        if cut > self._cut and self._window.compact is not None:
            summary = await self._summarise(self._window.compact, cut, call)
            tokens = self._window.tokens(summary) if summary is not None else 0
        if cut == self._cut or self._tokens_from(cut) + tokens > room:
            self._warn("the summary of the earlier conversation does not fit into the context window: it is left out")
            summary, tokens = None, 0
        # Only now, so that a cancelled or failed call leaves all as it was.
        self._cut, self._summary, self._summary_tokens = cut, summary, tokens

    async def _summarise(self, compact: Compact, cut: int, call: Callable[..., Awaitable[Any]]) -> Message | None:
        encoded = self._transcript.encoded()
        # Read anew from the JSON: what the function does to them does not reach the transcript.
        left_out = [decode(encoded[position]) for position in range(self._cut, cut) if position != self._question]
        if self._summary is not None:
            left_out.insert(0, dict(self._summary))
        positional, by_name = Hook(compact, "compact").arguments(left_out, self._context())
        try:
            return _summary_message(await call(compact, *positional, **by_name))
        except FractalError:
            raise
        except Exception as error:
            raise UnexpectedError(f"the compact function failed: {described(error)}") from error

    def _kept(self) -> list[int] | None:
        if self._cut <= self._head:
            return None
        asked = [self._question] if 0 <= self._question < self._cut else []
        return [*range(self._head), *asked, *range(self._cut, len(self._sums) - 1)]

    def _text_tokens(self, text: str) -> int:
        if text not in self._texts:
            self._texts[text] = self._window.tokens({"role": "system", "content": text})
        return self._texts[text]


def _summary_message(answer: object) -> Message | None:
    if answer is None:
        return None
    if isinstance(answer, str):
        text = f"Summary of the earlier conversation: {answer}"
        return {"role": "system", "content": text} if answer.strip() else None
    if is_mapping(answer) and answer.get("role") in _SUMMARY_ROLES and "tool_calls" not in answer:
        content = answer.get("content")
        if content and (isinstance(content, str) or (is_list(content) and all(map(is_mapping, content)))):
            return dict(answer)
    raise InvalidArguments(
        f"the compact function returned {repr_of(answer):.200}: return text, a system or user message with content, or"
        " None"
    )
