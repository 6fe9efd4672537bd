"""What a chat writes: the answer, what happens on the way, and the words for calls and usage."""

from __future__ import annotations

import os
import sys
from typing import TYPE_CHECKING

from fractal._json import encode, is_mapping, jsonable, text_of
from fractal._tree import printable
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

__all__ = ["Screen", "call_text", "counted", "json_text", "usage_text"]

_LONGEST_ASIDE = 100


class Screen:
    """Where the answer is written, with what happens on the way in dim lines; without a terminal, answers alone."""

    def __init__(self, is_terminal: bool) -> None:
        self._is_terminal = is_terminal
        self._is_dim = is_terminal and not os.environ.get("NO_COLOR") and os.environ.get("TERM") != "dumb"
        has_arrows = (sys.stdout.encoding or "").lower().startswith("utf")
        self._begins, self._ends = ("→", "←") if has_arrows else ("->", "<-")
        self._ellipsis = "…" if has_arrows else "..."
        self._written = ""  # of the reply that is being written
        self._is_in_line = False

    def show(self, event: Event) -> None:
        """Show an event, if it is one to show."""
        if not self._is_terminal:
            return
        match event:
            case ModelRequested(depth=0):
                self._written = ""
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
        """Finish an answer: what has not been written piece by piece, and why there is none."""
        if result.success and not self._is_terminal:
            print(text_of(result.content), flush=True)
        elif result.success and not self._has_written(result):
            self.begin_line()
            self._write(text_of(result.content))
        elif not result.success and result.stop_reason != "cancelled":
            self.note(f"no answer ({result.stop_reason}): {result.error}")
        self.begin_line()
        for call in result.abandoned:
            self.note(f"{call.tool_name} could not be stopped and may still take effect")

    def note(self, text: str) -> None:
        """Tell the user something that is no answer, in one line."""
        self.begin_line()
        text = printable(" ".join(text.split()))
        if self._is_terminal:
            print(self._dimmed(text), flush=True)
        else:
            print(f"fractal chat: {text}", file=sys.stderr)

    def note_key(self) -> None:
        """Know that the terminal has shown a key, `^C`, where the cursor was."""
        self._is_in_line = self._is_terminal

    def begin_line(self) -> None:
        """Be at the beginning of a line."""
        if self._is_in_line:
            print(flush=True)
        self._is_in_line = False

    def _has_written(self, result: AgentResult) -> bool:
        """Whether the answer is what has been written piece by piece."""
        if isinstance(result.content, str):
            return result.content.strip() == self._written.strip()
        return bool(self._written) and result.stop_reason != "terminated"

    def _write(self, text: str) -> None:
        self._written += text
        print(printable(text), end="", flush=True)
        self._is_in_line = not text.endswith("\n")

    def _aside(self, event: Event, text: str) -> None:
        text = " ".join(text.split())
        if len(text) > _LONGEST_ASIDE:
            text = text[: _LONGEST_ASIDE - len(self._ellipsis)] + self._ellipsis
        self.begin_line()
        print(self._dimmed("  " * (event.depth + 1) + printable(text)), flush=True)

    def _dimmed(self, text: str) -> str:
        return f"\x1b[2m{text}\x1b[0m" if self._is_dim else text


def _agent(event: Event) -> str:
    return f"{event.agent_name}: " if event.depth else ""


def call_text(name: str, arguments: object) -> str:
    """A call as Python would write it, on one line."""
    if not is_mapping(arguments):
        return f"{name}({json_text(arguments)})"
    named = ((key if key.isidentifier() else json_text(key), json_text(value)) for key, value in arguments.items())
    return f"{name}({', '.join(f'{key}={value}' for key, value in named)})"


def json_text(value: object) -> str:
    return encode(jsonable(value)).decode()


def usage_text(usage: Usage) -> str:
    requests, calls = counted(usage.requests, "request"), counted(usage.tool_calls, "tool call")
    return f"{requests}, {calls}, {usage.input_tokens} tokens in, {usage.output_tokens} out"


def counted(number: int, word: str) -> str:
    return f"{number} {word}" if number == 1 else f"{number} {word}s"
