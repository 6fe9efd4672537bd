"""What no trace and no log may hold: keys, passwords, tokens; and how much of a payload they hold at most.

A value is searched for the marks of a secret first, as text; only one that has such a mark is taken apart.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable, Iterable, Iterator
from typing import Any
from urllib.parse import quote, quote_plus

from pydantic_core import SchemaValidator, core_schema

from fractal._json import decode, encode, is_list, is_mapping, jsonable

__all__ = ["DEFAULT_TEXT", "REDACTED", "PayloadWriter", "Redactor", "capped", "redacted", "secrets_of_environment"]

REDACTED = "[redacted]"

DEFAULT_TEXT = 20_000
"""Characters of one text that is kept."""

_LONG = 1000

_TEXTS_OF_A_PAYLOAD = 10
"""The texts of one value together may be so many times as long as one of them."""

_SHORTEST_SECRET = 4  # characters: what is shorter is found in ordinary words
_SHORTEST_OF_ENVIRONMENT = 8
_LONGEST_WORD = 90  # characters; less than the least that a cut leaves of a text when there is too much of them all

_LONGEST_NAME = 400
"""Characters of a name that is kept; what says that it is cut has room below the most that readers take."""

_MOST_NAMES = 256
_NAMES_OF_SECRETS = re.compile(r"(KEY|TOKEN|SECRET|PASSWORD|PASSWD|CREDENTIALS?)$", re.IGNORECASE)


def _finder(pattern: str) -> Callable[[str], bool]:
    """A function that tells whether a pattern is in a text, ten times as fast as Python's, and in linear time."""
    return SchemaValidator(core_schema.str_schema(pattern=pattern, regex_engine="rust-regex")).isinstance_python


_has_long_number = _finder(f"[0-9]{{{_LONG}}}")
"""Whether there is what no reader of JSON takes, if it is a number."""

_has_mark = _finder(  # in whatever case
    "(?i)key|token|secret|passw|authorization|cookie|credential|bearer|basic |k-|k_live|k_test|gh[a-z]_|github_|xox"
    "|aiza|eyj|akia|asia|sig|://"
)
"""Whether there is what is in every text that has a secret of a form that is known."""

_SECRET_FIELD = re.compile(
    r"authorization|api_?key|access_?key|secret|passw(or)?d|token$|cookie|private_?key|credentials?$"
)

# Each repetition has a bound: text of a model may be made so that what has none takes quadratic time.
_NAMED = (
    r"(?:api[-_]?key|access[-_]?key|secret|passw(?:or)?d|token(?!s\b)|authorization|credential|signature|\bsig)\w{0,30}"
)
_TEXTS: tuple[tuple[re.Pattern[str], str], ...] = (
    (
        re.compile(r"-----BEGIN [A-Z ]{0,40}PRIVATE KEY-----.*?(-----END [A-Z ]{0,40}PRIVATE KEY-----|$)", re.DOTALL),
        REDACTED,
    ),
    # name=value, name: value, "name": "value", also as text inside of JSON inside of JSON
    (
        re.compile(
            rf"(?i)({_NAMED}[\\\"']{{0,9}}\s{{0,9}}[:=]\s{{0,9}}[\\\"']{{0,9}})"
            r"((?:bearer |basic )?[^\s\"'\\&,;}\]<>]{6,})"
        ),
        rf"\1{REDACTED}",
    ),
    (re.compile(r"(?i)([?&][\w-]{0,30}key=)[^&\s\"'\\]{6,}"), rf"\1{REDACTED}"),
    (re.compile(r"(?i)\b(bearer|basic)\s{1,9}[\w.~+/=-]{8,}"), rf"\1 {REDACTED}"),
    (re.compile(r"(?<![A-Za-z0-9])(sk|pk|rk)(-|_live_|_test_)[A-Za-z0-9_-]{12,}"), REDACTED),
    (re.compile(r"\b(gh[pousr]_|github_pat_)\w{16,}"), REDACTED),
    (re.compile(r"\bxox[abeoprs]-[\w-]{8,}"), REDACTED),
    (re.compile(r"\bAIza[\w-]{20,}"), REDACTED),
    (re.compile(r"\b(AKIA|ASIA)[0-9A-Z]{12,}"), REDACTED),
    (re.compile(r"\beyJ[\w-]{8,1000}\.[\w-]{8,4000}\.[\w-]*"), REDACTED),
    (re.compile(r"(?i)\b([a-z][a-z0-9+.-]{0,20}://[^/\s:@\"'\\]{0,200}):[^/\s@\"'\\]{1,500}@"), rf"\1:{REDACTED}@"),
)


def secrets_of_environment() -> list[str]:
    """The values of environment variables that are called keys, tokens, passwords and the like."""
    named = ((name, value.strip()) for name, value in os.environ.items() if _NAMES_OF_SECRETS.search(name))
    return [value for _, value in named if len(value) >= _SHORTEST_OF_ENVIRONMENT]


class Redactor:
    """Takes secrets out of JSON.

    Args:
        secrets: Values that are known to be secret.

    Attributes:
        has_known: Whether there is one.
    """

    def __init__(self, secrets: Iterable[str] = ()) -> None:
        known = {each for each in map(str.strip, secrets) if len(each) >= _SHORTEST_SECRET}
        # The longest first: one secret may be a part of another. As JSON, without its quotes.
        spellings = {encode(each)[1:-1] for secret in known for each in _spellings(secret)}
        self._known = sorted(spellings, key=len, reverse=True)
        self.has_known = bool(known)

    def without_known(self, text: bytes) -> bytes:
        """JSON without the values that are known to be secret."""
        for secret in self._known:
            if secret in text:
                text = text.replace(secret, REDACTED.encode())
        return text


def _spellings(secret: str) -> Iterator[str]:
    """A secret as it stands in texts: most have one form in all of them."""
    yield from (secret, repr(secret)[1:-1], quote(secret), quote(secret, safe=""), quote_plus(secret))
    for is_ascii in (True, False):  # the arguments of a call are JSON as text, and may have JSON in them
        inside = secret
        for _ in range(2):
            inside = json.dumps(inside, ensure_ascii=is_ascii)[1:-1]
            yield inside


class PayloadWriter:
    """Writes values that a user, a tool or a model made: as JSON, of bounded size, without secrets.

    Args:
        secrets: Values that are known to be secret, besides those of the environment.
        max_text: Characters of one text; longer ones are cut, and the cut is marked.
    """

    def __init__(self, secrets: Iterable[str] = (), max_text: int = DEFAULT_TEXT) -> None:
        self._secrets, self._max_text = tuple(secrets), max_text
        self._redactor: Redactor | None = None
        self._names: dict[str, bytes] = {}

    def name(self, name: str | None) -> bytes:
        """Write a name or an id, if there is one; a model may have made it up."""
        if name is None:
            return b"null"
        try:
            return self._names[name]
        except KeyError:
            pass
        if len(name) > _LONGEST_NAME:
            return self(_cut(name, _LONGEST_NAME))
        if len(self._names) >= _MOST_NAMES:
            self._names.clear()
        written = self._names[name] = self(name)
        return written

    def __call__(self, value: Any) -> bytes:
        """Write a value."""
        if self._redactor is None:  # the environment may be set after this is made
            self._redactor = Redactor((*self._secrets, *secrets_of_environment()))
        text = encode(value)
        if len(text) >= _LONG and _has_long_number(text.decode()):
            text = encode(jsonable(value))
        if self._redactor.has_known:
            text = self._redactor.without_known(text)
        if len(text) > self._max_text:
            text = encode(capped(decode(text), self._max_text, self._max_text * _TEXTS_OF_A_PAYLOAD))
        return encode(redacted(decode(text))) if _has_mark(text.decode()) else text


def redacted(value: Any) -> Any:
    """A JSON value without secrets, as far as their form or the name of their field tells."""
    if isinstance(value, str):
        for pattern, instead in _TEXTS:
            value = pattern.sub(instead, value)
        return value
    if is_list(value):
        return [redacted(each) for each in value]
    if is_mapping(value):
        return {redacted(name): _redacted_field(name, each) for name, each in value.items()}
    return value


def _redacted_field(name: str, value: Any) -> Any:
    if value is None or isinstance(value, bool) or not _SECRET_FIELD.search(name.lower().replace("-", "_")):
        return redacted(value)
    if is_list(value):
        return [_redacted_field(name, each) for each in value]
    return redacted(value) if is_mapping(value) else REDACTED


def capped(value: Any, longest: int, most: int) -> Any:
    """A JSON value of bounded size, with the cuts marked.

    Args:
        value: The value.
        longest: Characters of one text.
        most: Characters of all texts together, and so of lists and objects too, roughly.
    """
    return _Cap(longest, most).cut(value)


def _cut(text: str, room: int) -> str:
    # Between two words, if there are some: half of a key would not be found.
    least = max(room - _LONGEST_WORD, 0)
    end = max(text.rfind(" ", least, room), text.rfind("\n", least, room), 0) or room
    return f"{text[:end]}… [cut: {len(text) - end} more characters]"


class _Cap:
    def __init__(self, longest: int, left: int) -> None:
        self._longest, self._left = longest, left

    def cut(self, value: Any) -> Any:
        self._left -= 8
        if isinstance(value, str):
            room = min(self._longest, max(self._left, 100))
            self._left -= min(len(value), room)
            return value if len(value) <= room else _cut(value, room)
        if is_list(value):
            items: list[Any] = []
            for position, each in enumerate(value):
                if self._left <= 0:
                    return [*items, f"… [cut: {len(value) - position} more]"]
                items.append(self.cut(each))
            return items
        if is_mapping(value):
            fields: dict[str, Any] = {}
            for name, each in value.items():
                if self._left <= 0:
                    return {**fields, "…": f"[cut: {len(value) - len(fields)} more fields]"}
                fields[name[: self._longest]] = self.cut(each)
            return fields
        return value
