"""JSON that is still being written: which of its values are complete, and which are open."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from typing import Any

from fractal._json import decode

__all__ = ["DEEPEST", "Frame", "Scanner"]

DEEPEST = 60
"""Values inside each other that anybody looks into while they are open; deeper ones are seen when they are complete."""

_READABLE = 255  # values inside each other; no reader of JSON takes so many
_LONGEST_NUMBER = 5000

# The end of a text in which JSON may begin, if the right thing follows; blanks in between may be any number.
_MAY_BEGIN = re.compile(r"([{\[])\s*(-?[a-z]{0,4})$")
_SPACE = re.compile(r"[ \t\n\r]*")
_STRING_STOP = re.compile(r'["\\]')
_SCALAR = re.compile(r"[-+.\w]*")
_VALID_SCALAR = re.compile(r"-?(?:0|[1-9]\d*)(?:\.\d+)?(?:[eE][-+]?\d+)?|true|false|null", re.ASCII)
# As much of a string as can be decoded: no half of an escape, and no half of a surrogate pair.
_DECODABLE = re.compile(
    r"(?:[^\\]+|\\[^u]|\\u[dD][89abAB][0-9a-fA-F]{2}\\u[dD][c-fC-F][0-9a-fA-F]{2}|\\u(?![dD][89abAB])[0-9a-fA-F]{4})*"
)

# What may come next; "s" stands for a number, true, false or null.
_VALUE, _VALUE_OR_END, _KEY, _KEY_OR_END, _COLON = '"{[s', '"{[s]', '"', '"}', ":"
_MORE_OF_OBJECT, _MORE_OF_LIST = ",}", ",]"


class _OpenString:
    """A string that is not closed yet.

    Attributes:
        start: Where it begins.
    """

    __slots__ = ("_at", "_is_valid", "_parts", "start")

    def __init__(self, start: int) -> None:
        self.start = start
        self._at = start + 1
        self._parts = [""]
        self._is_valid = True

    def grow(self, text: str) -> bool:
        """Read the text that has come; returns whether the visible part has changed."""
        part = _DECODABLE.match(text, self._at) if self._is_valid else None
        if part is None or part.end() == self._at:
            return False
        self._at = part.end()
        try:
            self._parts.append(json.loads(f'"{part[0]}"'))
        except ValueError:
            self._is_valid = False
        return True

    def value(self) -> str | None:
        """The string as far as it is written; None if it is not a valid one."""
        if not self._is_valid:
            return None
        self._parts = ["".join(self._parts)]
        return self._parts[0]


class Frame:
    """An object or a list that is not closed yet.

    Attributes:
        is_object: Whether it is an object.
        start: Where it begins.
        members: Its members that are complete: key, if it is an object, and JSON text.
        key: The newest key; None if there is none yet.
        seen: What shapes have made of the members.
    """

    __slots__ = ("_open", "is_object", "key", "members", "seen", "start")

    def __init__(self, is_object: bool, start: int) -> None:
        self.is_object, self.start = is_object, start
        self.members: list[tuple[str | None, str]] = []
        self.key: str | None = None
        self._open: Frame | _OpenString | None = None
        self.seen: dict[Any, Any] = {}

    @property
    def open(self) -> Frame | str | None:
        """The member that is open: a frame, what there is of a string, or None."""
        return self._open.value() if isinstance(self._open, _OpenString) else self._open

    @open.setter
    def open(self, member: Frame | _OpenString | None) -> None:
        self._open = member


class Scanner:
    """Follows a JSON text as it is written, from where it begins to where it ends or breaks.

    Attributes:
        root: The outermost value; None until it has begun.
        whole: The JSON text, once it is complete.
        is_over: Whether nothing that follows counts.
    """

    __slots__ = (
        "_expected",
        "_find_start",
        "_is_new",
        "_position",
        "_stack",
        "_string",
        "_text",
        "is_over",
        "root",
        "whole",
    )

    def __init__(self, find_start: Callable[[str], int | None]) -> None:
        self._find_start = find_start
        self._text, self._position = "", 0
        self._stack: list[Frame] = []
        self._string: _OpenString | None = None
        self._expected = _VALUE
        self._is_new = False
        self.root: Frame | None = None
        self.whole: str | None = None
        self.is_over = False

    def feed(self, text: str) -> bool:
        """Take a piece of text.

        Returns:
            Whether a value has begun, grown or been completed.
        """
        # Python makes a text longer in its place if nothing else holds it; an attribute would be copied each time.
        whole, self._text = self._text, ""
        whole += text
        self._text = whole
        self._is_new = False
        if self.root is None and not self._begin():
            return False
        while not self.is_over and self._advance():
            pass
        if self._string is not None and not self._is_key():
            self._is_new |= self._string.grow(self._text)
        return self._is_new

    @property
    def length(self) -> int:
        """Characters of the JSON text so far."""
        return len(self._text)

    def _begin(self) -> bool:
        start = self._find_start(self._text)
        if start is None:
            tail = _MAY_BEGIN.search(self._text)
            self._text = tail[1] + tail[2] if tail else ""
            return False
        self._text = self._text[start:]
        return True

    def _is_key(self) -> bool:
        return self._expected in (_KEY, _KEY_OR_END)

    def _advance(self) -> bool:
        """Take one token, or the rest of a string; whether to go on."""
        if self._string is not None:
            return self._read_string(self._string)
        space = _SPACE.match(self._text, self._position)
        start = self._position = space.end() if space else self._position
        if start == len(self._text):
            return False
        token = self._text[start] if self._text[start] in '"{}[],:' else "s"
        if token not in self._expected:
            return self._break_off()
        if token == "s":
            return self._read_scalar()
        self._position += 1
        match token:
            case '"':
                self._string = _OpenString(start)
                if not self._is_key():
                    self._stack[-1].open = self._string
                    self._is_new = True
            case "{" | "[":
                self._open(Frame(token == "{", start))
            case "}" | "]":
                self._close()
            case ":":
                self._expected = _VALUE
            case _:
                self._expected = _KEY if self._stack[-1].is_object else _VALUE
        return True

    def _break_off(self) -> bool:
        self.is_over = True
        return False

    def _read_string(self, string: _OpenString) -> bool:
        text = self._text
        while stop := _STRING_STOP.search(text, self._position):
            if text[stop.start()] == '"':
                self._position = stop.end()
                return self._end_string(string)
            if stop.end() == len(text):  # a backslash: what it stands for has not arrived
                self._position = stop.start()
                return False
            self._position = stop.end() + 1
        self._position = len(text)
        return False

    def _end_string(self, string: _OpenString) -> bool:
        self._string = None
        if not self._is_key():
            self._complete(string.start)
            return True
        try:
            self._stack[-1].key = decode(self._text[string.start : self._position])
        except ValueError:
            return self._break_off()
        self._is_new = True
        self._expected = _COLON
        return True

    def _read_scalar(self) -> bool:
        start = self._position
        found = _SCALAR.match(self._text, start)
        end = found.end() if found else start
        if end == len(self._text) and end - start < _LONGEST_NUMBER:  # "12" may become "120"
            return False
        if not _VALID_SCALAR.fullmatch(self._text, start, end):
            return self._break_off()
        self._position = end
        self._complete(start)
        return True

    def _open(self, frame: Frame) -> None:
        if len(self._stack) == _READABLE:
            self.is_over = True
            return
        if self._stack:
            self._stack[-1].open = frame
        else:
            self.root = frame
        self._stack.append(frame)
        self._is_new = True
        self._expected = _KEY_OR_END if frame.is_object else _VALUE_OR_END

    def _close(self) -> None:
        frame = self._stack.pop()
        if self._stack:
            self._complete(frame.start)
        else:
            self.whole = self._text[: self._position]
            self.is_over = self._is_new = True

    def _complete(self, start: int) -> None:
        frame = self._stack[-1]
        if len(self._stack) <= DEEPEST + 1:  # nobody looks into deeper ones, and each holds what is in all below it
            frame.members.append((frame.key, self._text[start : self._position]))
        frame.open = None
        self._is_new = True
        self._expected = _MORE_OF_OBJECT if frame.is_object else _MORE_OF_LIST
