"""Numbers as options of the command line: read, and refused with what to give."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from contextlib import suppress
from typing import TypeVar

__all__ = ["count", "number", "port", "seconds"]

Number = TypeVar("Number", int, float)


def seconds(text: str) -> float:
    """The seconds that something may take."""
    return number(float, text, "seconds, a number above 0", lambda given: 0 < given < float("inf"))


def count(text: str) -> int:
    """The count of something of which there has to be one."""
    return number(int, text, "a whole number from 1 up", lambda given: given >= 1)


def port(text: str) -> int:
    """The number of a port; 0 for a free one."""
    return number(int, text, "a whole number from 0 to 65535", lambda given: 0 <= given < 1 << 16)


def number(kind: Callable[[str], Number], text: str, what: str, is_meant: Callable[[Number], bool]) -> Number:
    """Read a number.

    Args:
        kind: Reads it, and raises ValueError if it cannot.
        text: What was given.
        what: What to give.
        is_meant: Whether a number is within the bounds.

    Raises:
        ArgumentTypeError: It is no such number; says what to give.
    """
    with suppress(ValueError):
        given = kind(text)
        if is_meant(given):
            return given
    raise argparse.ArgumentTypeError(f"{text!r}: give {what}")
