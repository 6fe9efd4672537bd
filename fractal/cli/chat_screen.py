"""What a chat writes: the answer, what happens on the way, and the words for calls and usage."""

from __future__ import annotations

import os
import sys
from typing import TYPE_CHECKING

from fractal._json import is_mapping, text_of
from fractal._texts import escaped, printable
from fractal.cli.door import json_line, say, show, tell
from fractal.events import (
    Event,
    LimitHit,
    ModelRequested,
    RetryScheduled,
    TextDelta,
    ToolFinished,
    ToolStarted,
    WarningRaised,
)

if TYPE_CHECKING:
    from fractal.results import AgentResult, Usage

__all__ = ["Screen", "call_text", "counted", "usage_text"]

_LONGEST_ASIDE = 100


class Screen:
    """The output of a chat: answers, with events in dim lines; without a terminal, answers alone."""

    def __init__(self, is_terminal: bool) -> None:
        self._is_terminal = is_terminal
        self._is_dim = is_terminal and not os.environ.get("NO_COLOR") and os.environ.get("TERM") != "dumb"
        has_arrows = (sys.stdout.encoding or "").lower().startswith("utf")
        self._begins, self._ends = ("→", "←") if has_arrows else ("->", "<-")
        self._ellipsis = "…" if has_arrows else "..."
        self._written: list[str] = []  # of the reply that is being written
        self._is_in_line = False

    def show(self, event: Event) -> None:
        """Show an event, if it is one to show."""
        if not self._is_terminal:
            return
        match event:
            case ModelRequested(depth=0):
                self._written = []
            case TextDelta(text=text, depth=0):
                self._write(text)
            case ToolStarted(tool_name=name, arguments=arguments):
                self._aside(event, f"{self._begins} {_agent(event)}{call_text(name, arguments)}")
            case ToolFinished(tool_name=name, result=result):
                why = f": {result.error}" if result.error else ""
                self._aside(event, f"{self._ends} {_agent(event)}{name} {result.outcome} {result.elapsed:.2f} s{why}")
            case RetryScheduled(wait=wait, error=error):
                self._aside(event, f"! {_agent(event)}again in {wait:.1f} s: {error}")
            case LimitHit(message=message) | WarningRaised(message=message):
                self._aside(event, f"! {_agent(event)}{message}")
            case _:
                pass

    def end(self, result: AgentResult) -> None:
        """Finish an answer: write its rest, or why there is none."""
        if result.success and not self._is_terminal:
            say(_text(result))
        elif result.success and not self._has_written(result):
            self.begin_line()
            self._write(_text(result))
        elif not result.success and result.stop_reason != "cancelled":
            self.note(f"no answer ({result.stop_reason}): {result.error}")
        self.begin_line()
        for call in result.abandoned:
            self.note(f"{call.tool_name} could not be stopped and may still take effect")

    def note(self, text: str) -> None:
        """Show the user a line that is not an answer."""
        self.begin_line()
        text = " ".join(text.split())
        if self._is_terminal:
            self._show_dim(text)
        else:
            tell(f"fractal chat: {text}")

    def note_key(self) -> None:
        """Note that the terminal has shown a key, `^C`, at the cursor."""
        self._is_in_line = self._is_terminal

    def begin_line(self) -> None:
        """Begin a new line, unless the cursor is at the beginning of one."""
        if self._is_in_line:
            show("")
        self._is_in_line = False

    def _has_written(self, result: AgentResult) -> bool:
        """Whether the answer has been written piece by piece already."""
        written = "".join(self._written)
        if isinstance(result.content, str):
            return result.content.strip() == written.strip()
        return bool(written) and result.stop_reason != "terminated"

    def _write(self, text: str) -> None:
        self._written.append(text)
        show(text, end="")
        self._is_in_line = not text.endswith("\n")

    def _aside(self, event: Event, text: str) -> None:
        text = " ".join(printable(text).split())
        if len(text) > _LONGEST_ASIDE:
            text = text[: _LONGEST_ASIDE - len(self._ellipsis)] + self._ellipsis
        self.begin_line()
        self._show_dim("  " * (event.depth + 1) + text)

    def _show_dim(self, text: str) -> None:
        show(text, dim=self._is_dim)


def _agent(event: Event) -> str:
    return f"{event.agent_name}: " if event.depth else ""


def _text(result: AgentResult) -> str:
    content = result.content
    return text_of(content) if isinstance(content, (str, bytes, bytearray)) else json_line(content)


def call_text(name: str, arguments: object) -> str:
    """A call as Python would write it, on one line; invisible characters are escaped."""
    if not is_mapping(arguments):
        return f"{escaped(name)}({json_line(arguments)})"
    named = ((_name(key), json_line(value)) for key, value in arguments.items())
    return f"{escaped(name)}({', '.join(f'{key}={value}' for key, value in named)})"


def _name(key: object) -> str:
    is_plain = isinstance(key, str) and key.isidentifier() and escaped(key) == key
    return str(key) if is_plain else json_line(key)


def usage_text(usage: Usage) -> str:
    """The usage of a run, in words."""
    requests, calls = counted(usage.requests, "request"), counted(usage.tool_calls, "tool call")
    return f"{requests}, {calls}, {usage.input_tokens} tokens in, {usage.output_tokens} out"


def counted(number: int, word: str) -> str:
    """A number of things, in words."""
    return f"{number} {word}" if number == 1 else f"{number} {word}s"
