"""The JSON in the text of an answer: found, told from what is around it, and read in time that grows with the text."""

from __future__ import annotations

import functools
import json
import re
from typing import NoReturn

from pydantic_core import from_json

__all__ = [
    "BLANK",
    "LONGEST_ANSWER",
    "NOT_JSON",
    "OBJECT",
    "OBJECT_OR_LIST",
    "OutputFault",
    "bounded",
    "end_of_json",
    "find_json",
    "is_json",
    "unfenced",
]

LONGEST_ANSWER = 1_000_000
"""Characters of an answer that is to be an object, which models write half of at most. It is read in one go, a fraction
of a second for what is worst, while the event loop stands still."""

NOT_JSON = "the answer is not valid JSON"


class OutputFault(ValueError):
    """The fault of an answer that does not fit; its text is short and meant for the model."""


BLANK = " \t\r\n\ufeff"
"""What is around an answer and means nothing."""

_FENCE = "```"
_OPENING = re.compile(r"```[\w-]*[ \t]*\r?\n")
# What looks like the beginning of JSON, and not like a bracket in a sentence.
OBJECT = re.compile(r"\{(?=\s*[\"}])")
OBJECT_OR_LIST = re.compile(r"\{(?=\s*[\"}])|\[(?=\s*(?:[\[\]{\"\d-]|(?:true|false|null)\b))")


def bounded(text: str) -> str:
    """The text of an answer, unless reading it would take too long.

    Raises:
        OutputFault: It is longer than `LONGEST_ANSWER`.
    """
    if len(text) > LONGEST_ANSWER:
        raise OutputFault(f"the answer has {len(text)} characters: no more than {LONGEST_ANSWER} are read")
    return text


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(f"JSON has no {name}")


_DECODER = json.JSONDecoder(parse_constant=_refuse_constant)


def is_json(text: str) -> bool:
    """Whether a text is one JSON value and nothing else."""
    for read in (_read_fast, _DECODER.decode):  # the fast one gives up at half of a surrogate pair, and deep inside
        try:
            read(text)
        except (ValueError, TypeError, RecursionError):
            continue
        return True
    return False


_read_fast = functools.partial(from_json, allow_inf_nan=False)


def unfenced(text: str) -> str:
    """The text inside a code fence; the text itself if it is not fenced."""
    opening, end = _OPENING.match(text), len(text) - len(_FENCE)
    if opening is None or not text.endswith(_FENCE) or end < opening.end():
        return text
    return text[opening.end() : end].rstrip().strip(BLANK)


def find_json(text: str, starts: re.Pattern[str], position: int = 0) -> int | None:
    """The position where a JSON value seems to begin, from another position on."""
    found = starts.search(text, position)
    return found.start() if found else None


def end_of_json(text: str, start: int) -> int:
    """The end of the JSON value that begins at a position.

    Raises:
        OutputFault: There is none.
    """
    try:
        return _DECODER.raw_decode(text, start)[1]
    except ValueError as error:
        raise OutputFault(f"{NOT_JSON}: {error}") from None
    except RecursionError:
        raise OutputFault(f"{NOT_JSON}: nested too deeply") from None
