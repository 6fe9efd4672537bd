"""The door to standard output and standard error: everything that the command line writes goes through here.

What a model, a tool, an endpoint or a file says cannot steer a terminal, nor look like something else there. A pipe
gets it as it is; JSON has escapes for such characters wherever it goes, since they mean the same.
"""

from __future__ import annotations

import json
import logging
import sys
import threading
import traceback
import warnings
from collections.abc import Generator
from contextlib import contextmanager
from typing import TextIO

from fractal._json import decode, encode, jsonable
from fractal._texts import described, escaped, is_a, printable, repr_of

__all__ = [
    "is_terminal",
    "json_line",
    "json_text",
    "reports_shown",
    "say",
    "say_json",
    "show",
    "tell",
    "tell_traceback",
]


def say(text: str) -> None:
    """Write text of others to standard output."""
    _write(sys.stdout, (printable(text) if is_terminal(sys.stdout) else text) + "\n")


def say_json(text: str) -> None:
    """Write JSON to standard output."""
    text = escaped(text)
    try:
        text.encode(sys.stdout.encoding or "utf-8")  # what rich puts in the place of a terminal does not know its own
    except UnicodeEncodeError:
        text = escaped(json.dumps(decode(text)))  # with escapes for all that is not ASCII
    _write(sys.stdout, text + "\n")


def show(text: str, end: str = "\n", *, dim: bool = False) -> None:
    """Write to a terminal that standard output is."""
    text = printable(text)
    _write(sys.stdout, (f"\x1b[2m{text}\x1b[0m" if dim else text) + end)


def tell(text: str) -> None:
    """Write a message for the user to standard error."""
    _write(sys.stderr, printable(text) + "\n")


def tell_traceback(error: BaseException) -> None:
    """Show the traceback of an exception; its text has escapes, as code would have them."""
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
    """A value as one line of JSON, with characters escaped that a terminal would not show as they are."""
    return escaped(encode(jsonable(value)).decode())


def json_text(value: object) -> str:
    """A value as JSON for humans, on several lines."""
    # Without what UTF-8 or JSON cannot carry.
    return escaped(json.dumps(decode(encode(jsonable(value))), indent=2, ensure_ascii=False))


@contextmanager
def reports_shown(least: int = logging.WARNING) -> Generator[None]:
    """Escape what Python itself reports: logs without a handler, warnings, exceptions of threads.

    Args:
        least: Level from which on the package's own log is shown.
    """
    before = logging.lastResort, warnings.showwarning, threading.excepthook, sys.unraisablehook
    logging.lastResort = _LastResort(least)
    warnings.showwarning = _show_warning
    threading.excepthook = _show_end_of_thread
    sys.unraisablehook = _show_unraisable
    try:
        yield
    finally:
        logging.lastResort, warnings.showwarning, threading.excepthook, sys.unraisablehook = before


class _LastResort(logging.Handler):
    """A handler that writes to the present standard error, as the last resort of `logging` does."""

    def __init__(self, least: int) -> None:
        super().__init__(logging.WARNING)
        self._least = least

    def emit(self, record: logging.LogRecord) -> None:
        if record.name == "fractal" and record.levelno < self._least:
            return
        try:
            _write(sys.stderr, escaped(self.format(record)) + "\n")
        except Exception:
            self.handleError(record)


def _show_warning(
    message: Warning | str,
    category: type[Warning],
    filename: str,
    lineno: int,
    file: TextIO | None = None,
    line: str | None = None,
) -> None:
    _write(file or sys.stderr, escaped(warnings.formatwarning(message, category, filename, lineno, line)))


def _show_end_of_thread(ended: threading.ExceptHookArgs) -> None:
    if ended.exc_value is not None and not is_a(ended.exc_value, SystemExit):
        tell(f"in thread {ended.thread.name if ended.thread else '(unknown)'}:")
        tell_traceback(ended.exc_value)


def _show_unraisable(found: sys.UnraisableHookArgs) -> None:
    tell(f"{found.err_msg or 'ignored'}: {repr_of(found.object)}")
    if found.exc_value is not None:
        tell_traceback(found.exc_value)


def _write(stream: TextIO, text: str) -> None:
    stream.write(text)
    stream.flush()
