"""What a docstring says of a function and its parameters: Google, NumPy or Sphinx style, and what people make of them.

It is taken apart line by line. What describes parameters goes to the parameters, examples are left out, and all else is
prose for whoever reads it, headings and all.
"""

from __future__ import annotations

import inspect
import re
import types
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from fractal._functions.callables import is_object, path_of
from fractal._texts import kind_of

__all__ = ["Documentation", "ParameterText", "docstring_of", "read_docstring"]


@dataclass(frozen=True, slots=True)
class ParameterText:
    """The description of one parameter, and its type if the docstring has one."""

    description: str | None = None
    type: str | None = None


@dataclass(frozen=True, slots=True)
class Documentation:
    """A docstring, taken apart: the prose, and the parameters by name."""

    summary: str = ""
    parameters: dict[str, ParameterText] = field(default_factory=dict[str, ParameterText])


def read_docstring(docstring: str | None) -> Documentation:
    """Take a docstring apart; what cannot be read stays in the prose, and nothing is an error."""
    text = (docstring or "").replace("\r\n", "\n").replace("\r", "\n")
    reader = _Reader(inspect.cleandoc(text).split("\n"))
    reader.read()
    prose = re.sub(r"\n *\n(?: *\n)+", "\n\n", "\n".join(reader.prose))
    return Documentation(prose.strip(), reader.parameters)


def docstring_of(function: Any) -> str | None:
    """The docstring that a callable has itself, not one inherited from a class above.

    Python and libraries generate texts for dataclasses, named tuples and the like, with the values of defaults in them.
    """
    for layer in path_of(function):
        if inspect.isclass(layer):
            made_by = vars(layer).get("__init__")
            text = _docstring_of_class(layer)
            return text or (made_by.__doc__ if isinstance(made_by, types.FunctionType) else None)
        if inspect.isroutine(layer):
            return inspect.getdoc(layer)
        own = getattr(layer, "__dict__", {}).get("__doc__")
        if isinstance(own, str):
            return own
        if is_object(layer):
            return kind_of(layer).__call__.__doc__ or _docstring_of_class(kind_of(layer))
    return None


def _docstring_of_class(kind: type) -> str | None:
    text = vars(kind).get("__doc__")
    is_signature = isinstance(text, str) and text.startswith(f"{kind.__name__}(") and text.endswith(")")
    return None if is_signature else text


_OF_PARAMETERS = re.compile(r"(?:(?:keyword|other) )?(?:args|arguments|params|parameters)|kwargs", re.IGNORECASE)
_OF_EXAMPLES = re.compile(r"examples?", re.IGNORECASE)
# `Args:`, `Args :`, `**Args:**`, `### Args`; the last two with or without the colon
_HEADING = re.compile(r"(?P<mark>#+ ?|\*\*|__)?(?P<words>\w[\w ]*?) ?(?:\*\*|__)?(?P<colon>:)?(?:\*\*|__)?")
_UNDERLINE = re.compile(r"[-=~]{3,}")
# `:param int x: text`
_FIELD = re.compile(r"[:@](param|parameter|arg|argument|key|keyword|kwarg|type) +([^:]*[^: ]) *:(.*)")
_ANY_FIELD = re.compile(r"[:@]\w+[^:]*:")
_NAMES = r"[`*]*(?P<names>[^\W\d]\w*(?:\s*,\s*\*{0,2}[^\W\d]\w*)*)[`*]*"
# `x: text`, `x (int): text`, `- x: text`, "`x` -- text", `x, y : text`
_ITEM = re.compile(rf"(?:[-+*•] +)?{_NAMES}\s*(?:\((?P<type>.*?)\)\s*)?(?P<mark>:|\s(?:--?|–|—)\s)(?P<text>.*)")
_BARE_ITEM = re.compile(rf"(?:[-+*•] +)?{_NAMES}")
# `int`, `list of str`, `{'a', 'b'}`, `dict[str, int] or None`: no sentence
_TYPE = re.compile(r"(?:\{.*\}|[\w.]+(?:\[.*\])?)(?:(?:,| of| or| \|) ?[^.]*)?")
_NO_TYPE = re.compile(r",?\s*\b(?:optional|required)\b|,?\s*\bdefaults?\b.*")


class _Reader:
    """Takes one docstring apart.

    Args:
        lines: The docstring, without its margin.
    """

    def __init__(self, lines: list[str]) -> None:
        self._lines, self._at = lines, 0
        self.prose: list[str] = []
        self.parameters: dict[str, ParameterText] = {}

    def read(self) -> None:
        """Read the whole docstring."""
        while self._at < len(self._lines):
            if not (self._literal() or self._section() or self._field()):
                self._keep(self._at + 1)

    def _keep(self, end: int) -> None:
        """Take the lines up to one for prose."""
        self.prose += self._lines[self._at : end]
        self._at = end

    def _literal(self) -> bool:
        """Keep a fenced or indented block of code, whatever it looks like."""
        line = self._lines[self._at].strip()
        if line.startswith(("```", "~~~")):
            self._keep(self._first(self._at + 1, lambda other: other.strip().startswith(line[:3])) + 1)
        elif line.endswith("::"):
            self._keep(self._end_of_deeper(self._at + 1))
        else:
            return False
        return True

    def _section(self) -> bool:
        """Read a section of parameters, or pass over one of examples."""
        words, start = self._heading(self._at)
        if words is None:
            return False
        is_numpy = start > self._at + 1
        if _OF_EXAMPLES.fullmatch(words):
            end = self._end_of_numpy(start) if is_numpy else self._end_of_deeper(start)
            if any(map(str.strip, self._lines[start:end])):
                self._at = end
                return True
        if _OF_PARAMETERS.fullmatch(words):
            end = self._end_of_deeper(start)
            if not any(map(str.strip, self._lines[start:end])):  # nothing is indented further
                end = self._end_of_numpy(start) if is_numpy else self._end_of_items(start)
            if self._take(self._lines[start:end], is_numpy):
                self._at = end
                return True
        self._keep(start)
        return True

    def _heading(self, at: int) -> tuple[str | None, int]:
        """The words of a heading, or None, and the first line below it."""
        found = _HEADING.fullmatch(self._lines[at].strip())
        if found is not None and at + 1 < len(self._lines) and _UNDERLINE.fullmatch(self._lines[at + 1].strip()):
            return found["words"], at + 2
        return (found["words"], at + 1) if found and (found["mark"] or found["colon"]) else (None, at)

    def _first(self, start: int, test: Callable[[str], object]) -> int:
        """The index of the first line, from another on, that passes a test; the end if none does."""
        return next((i for i in range(start, len(self._lines)) if test(self._lines[i])), len(self._lines))

    def _end_of_deeper(self, start: int) -> int:
        """The index of the first line, from another on, that is not indented further than this."""
        here = _indent(self._lines[self._at])
        return self._first(start, lambda line: line.strip() and _indent(line) <= here)

    def _end_of_numpy(self, start: int) -> int:
        """The index of the first line, from another on, that begins another section."""
        return next((i for i in range(start, len(self._lines)) if self._begins(i)), len(self._lines))

    def _end_of_items(self, start: int) -> int:
        """The index of the first line, from another on, that is no item, where items are not indented."""
        here = _indent(self._lines[self._at])
        items = self._first(start, lambda line: not (_indent(line) > here or _ITEM.fullmatch(line.strip())))
        return min(items, self._end_of_numpy(start))

    def _begins(self, at: int) -> bool:
        return self._heading(at)[0] is not None or bool(_ANY_FIELD.match(self._lines[at].strip()))

    def _field(self) -> bool:
        """Read a Sphinx field of a parameter, with the lines that go on with it."""
        found = _FIELD.fullmatch(self._lines[self._at].strip())
        if found is None:
            return False
        deeper, end = self._end_of_deeper(self._at + 1), self._at + 1
        while end < len(self._lines) and not self._begins(end):
            if end >= deeper and not (self._lines[end].strip() and self._lines[end - 1].strip()):
                break
            end += 1
        text = " ".join((found[3], *self._lines[self._at + 1 : end]))
        *kind, name = found[2].split()
        described = (None, text) if found[1] == "type" else (text, " ".join(kind))
        self._note(name.lstrip("*"), *described)
        self._at = end
        return True

    def _take(self, lines: Sequence[str], is_numpy: bool) -> bool:
        """Take the items of a section, leaving prose; returns whether there are any."""
        items = list(_items(lines, is_numpy))
        if not any(isinstance(item, _Item) for item in items):
            return False
        for item in items:
            if isinstance(item, str):
                self.prose.append(item)
            else:
                description, kind = item.read(is_numpy)
                for name in item.names.split(","):
                    self._note(name.strip(" *"), description, kind)
        return True

    def _note(self, name: str, description: str | None, kind: str | None) -> None:
        known = self.parameters.get(name, ParameterText())
        description = " ".join((description or "").split()) or known.description
        kind = _NO_TYPE.sub("", " ".join((kind or "").split())).strip(" ,") or known.type
        self.parameters[name] = ParameterText(description, kind)


@dataclass(slots=True)
class _Item:
    """A parameter in a section: its first line, and the lines that continue it."""

    names: str
    kind: str | None
    text: str
    is_spaced: bool
    more: list[str] = field(default_factory=list[str])

    def read(self, is_numpy: bool) -> tuple[str, str | None]:
        """The description, and the type."""
        text, more = self.text.strip(), " ".join(self.more).strip()
        if self.kind is None and text and self._is_type(text, more, is_numpy):
            return more, text
        return f"{text} {more}", self.kind

    def _is_type(self, text: str, more: str, is_numpy: bool) -> bool:
        """Whether what follows the name is its type, as in `x : int`, and no description."""
        is_said_so = self.is_spaced and bool(more)
        if is_numpy and is_said_so:
            return True
        return (is_numpy or is_said_so) and _TYPE.fullmatch(text) is not None


def _items(lines: Sequence[str], is_numpy: bool) -> Iterator[_Item | str]:
    """The items of a section, and the lines that are none."""
    margin = next((_indent(line) for line in lines if line.strip()), 0)
    item: _Item | None = None
    for number, line in enumerate(lines):
        head = _head(line.strip()) if line.strip() and _indent(line) <= margin else None
        if head is not None and head.text == "" and head.kind is None and not is_numpy:
            following = next((other for other in lines[number + 1 :] if other.strip()), "")
            head = head if _indent(following) > margin else None
        if head is not None:
            if item is not None:
                yield item
            item = head
        elif item is not None and (_indent(line) > margin or not line.strip() or lines[number - 1].strip()):
            item.more.append(line)
        else:
            if item is not None:
                yield item
            item = None
            yield line.strip()
    if item is not None:
        yield item


def _head(text: str) -> _Item | None:
    found = _ITEM.fullmatch(text)
    if found is not None:
        is_spaced = text[found.start("mark") - 1 : found.start("mark")] == " "
        return _Item(found["names"], found["type"], found["text"], is_spaced)
    bare = _BARE_ITEM.fullmatch(text)
    return _Item(bare["names"], None, "", is_spaced=False) if bare is not None else None


def _indent(line: str) -> int:
    return len(line) - len(line.lstrip())
