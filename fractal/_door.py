"""The door to standard output and standard error: everything that the command line writes goes through here.

What a model, a tool, an endpoint or a file says cannot steer a terminal, nor look like something else there. A pipe
gets it as it is; JSON has escapes for such characters wherever it goes, since they mean the same.
"""

from __future__ import annotations

import json
import logging
import sys
import traceback
from collections.abc import Generator
from contextlib import contextmanager
from typing import TextIO

from fractal._json import decode, encode, jsonable
from fractal._texts import described, escaped, printable

__all__ = ["is_terminal", "json_line", "json_text", "logs_shown", "say", "say_json", "show", "tell", "tell_traceback"]


def say(text: str) -> None:
    """Write what somebody else wrote to standard output."""
    _write(sys.stdout, (printable(text) if is_terminal(sys.stdout) else text) + "\n")


def say_json(text: str) -> None:
    """Write JSON to standard output."""
    text = escaped(text)
    try:
        text.encode(sys.stdout.encoding or "utf-8")  # what rich puts in the place of a terminal does not know its own
    except UnicodeEncodeError:
        text = json.dumps(decode(text))  # with escapes for all that is not ASCII
    _write(sys.stdout, text + "\n")


def show(text: str, end: str = "\n", *, dim: bool = False) -> None:
    """Write to a terminal that standard output is."""
    text = printable(text)
    _write(sys.stdout, (f"\x1b[2m{text}\x1b[0m" if dim else text) + end)


def tell(text: str) -> None:
    """Tell the user something on standard error, which humans read, terminal or not."""
    _write(sys.stderr, printable(text) + "\n")


def tell_traceback(error: BaseException) -> None:
    """Show where an exception came from; its text has escapes, as code would have them."""
    try:
        text = "".join(traceback.format_exception(error))
    except Exception:  # of a user's class, whose attributes raise
        text = described(error) + "\n"
    _write(sys.stderr, escaped(text))


def is_terminal(stream: TextIO) -> bool:
    """Whether a terminal shows what is written."""
    # What rich puts in the place of a stream while it draws says no before rich 15.
    return getattr(stream, "rich_proxied_file", stream).isatty()


def json_line(value: object) -> str:
    """A value as one line of JSON, in which escapes stand for what a terminal would not show as it is."""
    return escaped(encode(jsonable(value)).decode())


def json_text(value: object) -> str:
    """A value as JSON for humans, on several lines."""
    # Without what UTF-8 or JSON cannot carry.
    return escaped(json.dumps(decode(encode(jsonable(value))), indent=2, ensure_ascii=False))


@contextmanager
def logs_shown(level: int) -> Generator[None]:
    """Show what the package logs from a level on, on standard error, if nobody has said where it goes."""
    logger, handler = logging.getLogger("fractal"), _Handler(level)
    others = [each for each in logger.handlers if isinstance(each, _Handler)]  # this one takes their place
    for other in others:
        logger.removeHandler(other)
    if not logger.hasHandlers():
        logger.addHandler(handler)
    try:
        yield
    finally:
        logger.removeHandler(handler)
        for other in others:
            logger.addHandler(other)


class _Handler(logging.Handler):
    """Writes to what is standard error at the time."""

    def emit(self, record: logging.LogRecord) -> None:
        try:
            _write(sys.stderr, escaped(self.format(record)) + "\n")
        except Exception:
            self.handleError(record)


def _write(stream: TextIO, text: str) -> None:
    stream.write(text)
    stream.flush()
