"""Spans that are open, while a run goes on: what is known of them until they end."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import TYPE_CHECKING, Any

from fractal.tracing.content import message_in_parts

if TYPE_CHECKING:
    from opentelemetry.context import Context
    from opentelemetry.trace import Span

__all__ = ["Conversation", "Open", "OpenChat", "OpenRun"]


class Open:
    """A span that has begun.

    Attributes:
        span: The span.
        context: The context in which it is the current one.
        began: When, in seconds since the epoch.
        since: The same by a clock that nobody sets: how long it takes is counted from there.
    """

    __slots__ = ("began", "context", "since", "span")

    def __init__(self, span: Span, context: Context, began: float, since: float) -> None:
        self.span, self.context, self.began, self.since = span, context, began, since


class OpenChat:
    """A request to the model, with its retries.

    Attributes:
        part: Its span.
        about: What its metrics are about.
        iteration: The turn of the run that it belongs to.
        attempts: How often it was sent.
    """

    __slots__ = ("about", "attempts", "iteration", "part")

    def __init__(self, part: Open, about: dict[str, Any], iteration: int) -> None:
        self.part, self.about, self.iteration, self.attempts = part, about, iteration, 1


class OpenRun:
    """A run.

    Attributes:
        part: Its span.
        about: What its metrics are about, and those of its parts.
        chat: The request that is on its way, or None.
        calls: The tool calls that go on, by their ids.
        requests: How many requests it has made.
        tool_calls: How many calls.
        usage: Tokens that its own requests have used.
        offered: Names of the tools that its last request had on offer.
        conversation: What was said, where spans have that.
    """

    __slots__ = ("about", "calls", "chat", "conversation", "offered", "part", "requests", "tool_calls", "usage")

    def __init__(self, part: Open, about: dict[str, str]) -> None:
        self.part, self.about = part, about
        self.chat: OpenChat | None = None
        self.calls: dict[str, Open] = {}
        self.requests = self.tool_calls = 0
        self.usage: dict[str, int] = {}
        self.offered: frozenset[str] = frozenset()
        self.conversation: Conversation | None = None

    def use(self, usage: Mapping[str, int]) -> None:
        """Add what a reply used."""
        for name, count in usage.items():
            self.usage[name] = self.usage.get(name, 0) + count


class Conversation:
    """The messages of a run, each written once.

    Args:
        payload: Writes a message.
        messages: Those that the run begins with.
    """

    def __init__(self, payload: Callable[[Any], bytes], messages: Iterable[object]) -> None:
        self._payload = payload
        self._written: list[str] = []
        self.add(messages)

    def add(self, messages: Iterable[object]) -> None:
        """Take further messages."""
        self._written.extend(self._payload(message_in_parts(message)).decode() for message in messages)

    def sent(self, kept: list[int] | None) -> str:
        """The messages that a request has, as JSON.

        Args:
            kept: Their positions; None for all.
        """
        written = self._written
        return f"[{','.join(written if kept is None else [written[n] for n in kept if n < len(written)])}]"

    def last(self) -> str:
        """The last message alone, as JSON."""
        return f"[{self._written[-1]}]"
