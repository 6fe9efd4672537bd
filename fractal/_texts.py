"""Texts of what others have made: taken where nothing can break, and cleaned for whoever reads them.

An object of a user's may raise when its text is asked for, return something else, or say that it is of another class.
What a model, an endpoint or a file says may hold characters that steer a terminal or forge a line of a log. So texts of
objects and exceptions are made here alone, and here are the two forms in which they are shown: `printable` is for
reading, `escaped` for looking closely.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any, TypeVar

from typing_extensions import TypeIs

__all__ = [
    "clean_text",
    "described",
    "escaped",
    "in_brief",
    "is_a",
    "kind_of",
    "log_line",
    "message_of",
    "name_of",
    "one_line",
    "plain_str",
    "printable",
    "repr_of",
    "said_by",
    "str_of",
    "text_by",
    "type_name",
]

Kind = TypeVar("Kind")


def clean_text(text: str) -> str:
    """Replace lone surrogates, which no UTF-8 wire can carry; every other character is kept, in a plain `str`."""
    if type(text) is not str:
        text = plain_str(text)
    if text.isascii():  # as most are, and the text knows it
        return text
    try:
        text.encode()
    except UnicodeEncodeError:
        # Going through UTF-16 joins the halves of a pair that came in as two characters.
        return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    return text


# ---- texts of objects

_NAME: Any = type.__dict__["__name__"]


kind_of: Callable[[object], type[Any]] = type
"""The class of an object, whatever it says itself of its `__class__`."""


def is_a(value: object, kind: type[Kind] | tuple[type[Kind], ...]) -> TypeIs[Kind]:
    """Whether an object is of a class, whatever it says itself; `isinstance` asks it, and it may raise."""
    return issubclass(type(value), kind)


def plain_str(text: str) -> str:
    """A text as a plain `str`: subclasses may behave in ways of their own. Of a member of an Enum, its value."""
    return str.__str__(text)


def type_name(value: object) -> str:
    """Name of the class of an object, whatever the object says of it."""
    # Not `type(value).__name__`, which a metaclass may have replaced.
    return clean_text(_NAME.__get__(type(value)))


def str_of(value: object) -> str:
    """Text of an object by its `str()`; the name of its class where that raises or is no text."""
    return text_by(str, value, type_name)


def repr_of(value: object) -> str:
    """Text of an object by its `repr()`; the name of its class in angle brackets where that raises or is no text."""
    return text_by(repr, value, lambda value: f"<{type_name(value)}>")


def message_of(error: BaseException) -> str:
    """Text of an exception; empty where it has none, or where that cannot be made."""
    return text_by(str, error, lambda _: "")


def said_by(error: BaseException) -> str:
    """Text of an exception; the name of its class where it has none, or where that cannot be made."""
    return message_of(error) or type_name(error)


def described(error: BaseException) -> str:
    """An exception by class and text, as in `ValueError: too long`; the class alone where there is no text."""
    text = message_of(error)
    return f"{type_name(error)}: {text}" if text else type_name(error)


def name_of(function: object) -> str:
    """Name of a function; text of a callable object that has none."""
    try:
        name: object = getattr(function, "__name__", None)
    except Exception:
        name = None
    return clean_text(name) if isinstance(name, str) else repr_of(function)


def text_by(make: Callable[[Any], str], value: object, otherwise: Callable[[Any], str]) -> str:
    """Text of an object by one function; by another one where that raises or gives no text."""
    try:
        return clean_text(make(value))
    except KeyboardInterrupt:
        raise
    except BaseException:  # no cancellation arrives here, where nothing is awaited
        return otherwise(value)


# ---- texts for whoever reads them

# What no eye sees though it counts as a letter, a mark or a sign; `str.isprintable` tells of controls, C1, formats such
# as U+202E, separators, surrogates and private use.
_BLANKS = re.compile("[\u034f\u115f\u1160\u17b4\u17b5\u180b-\u180d\u180f\u2800\u3164\uffa0]")
# Which of its shapes a character has: emoji need them, and names look alike with and without.
_SHAPES = re.compile("[\ufe00-\ufe0f\U000e0100-\U000e01ef]")


def printable(text: str) -> str:
    """Text for reading: blanks stand for what could steer a terminal and for what no eye sees; lines and tabs stay."""
    if text.isprintable() and not _BLANKS.search(text):
        return text
    return "".join(char if _is_seen(char) or char in "\n\t" else " " for char in text)


def escaped(text: str) -> str:
    r"""Text for looking closely, JSON too: escapes such as `\u202e` stand for the same; lines and tabs stay."""
    if text.isprintable() and not _BLANKS.search(text) and not _SHAPES.search(text):
        return text
    return "".join(char if _is_unescaped(char) or char in "\n\t" else _escape(char) for char in text)


def log_line(text: str) -> str:
    r"""Text as one line of a log: as `escaped`, and `\n` stands for the end of a line."""
    return escaped(text).replace("\n", "\\n").replace("\t", "\\t")


def in_brief(value: object, longest: int = 120) -> str:
    """The `repr` of a value in one line, for errors."""
    return one_line(repr_of(value), longest)


def one_line(text: str, longest: int = 200) -> str:
    """Text for reading in one line, cut to a length."""
    return " ".join(printable(text[: 4 * longest]).split())[:longest]


def _is_seen(char: str) -> bool:
    return char.isprintable() and not _BLANKS.match(char)


def _is_unescaped(char: str) -> bool:
    return _is_seen(char) and not _SHAPES.match(char)


def _escape(char: str) -> str:
    units = char.encode("utf-16-be", "surrogatepass").hex()
    return "".join(f"\\u{units[start : start + 4]}" for start in range(0, len(units), 4))
