"""How the package speaks of itself: docstrings that name their object, and identifiers in the field's terms."""

from __future__ import annotations

import ast
import io
import re
import tokenize
from collections.abc import Iterator
from pathlib import Path

import pytest

import fractal

PACKAGE = Path(fractal.__file__).parent
SOURCES = {path.relative_to(PACKAGE).as_posix(): path.read_text("utf-8") for path in sorted(PACKAGE.rglob("*.py"))}

HIDES_ITS_SUBJECT = re.compile(r"(The same|Same|It|Its|They|Those|Like above|As above)\b")

# Each says something that another word says better: listeners, other loop, same loop, duplicates, stop reading,
# innermost, emitted.
HOME_MADE = re.compile(
    r"_*(is_heard|from_afar|is_near|twins?|desert|is_deserted|bottom|told|told_by|told_of|last_word)"
)

# A slot, a source line, an index and an origin have names of their own.
PLACE = re.compile(r"_*places?(_\w+)?|_*Places?", re.ASCII)
# A public field.
WITH_PLACE = {"testing/cancelling.py"}


def first_lines(source: str) -> Iterator[tuple[str, str]]:
    """Name and first docstring line of each function and class."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            docstring = ast.get_docstring(node)
            if docstring:
                yield node.name, docstring.splitlines()[0]


def hidden_subjects(source: str) -> list[str]:
    return [f"{name}: {line}" for name, line in first_lines(source) if HIDES_ITS_SUBJECT.match(line)]


def names_like(pattern: re.Pattern[str], source: str) -> set[str]:
    tokens = tokenize.generate_tokens(io.StringIO(source).readline)
    return {token.string for token in tokens if token.type == tokenize.NAME and pattern.fullmatch(token.string)}


def test_docstrings_name_their_object_first():
    found = {name: hidden_subjects(source) for name, source in SOURCES.items()}
    assert {name: lines for name, lines in found.items() if lines} == {}


def test_identifiers_are_not_home_made():
    found = {name: names_like(HOME_MADE, source) for name, source in SOURCES.items()}
    assert {name: names for name, names in found.items() if names} == {}


def test_no_place_is_a_slot_a_line_or_an_index():
    found = {name: names_like(PLACE, source) for name, source in SOURCES.items() if name not in WITH_PLACE}
    assert {name: names for name, names in found.items() if names} == {}


@pytest.mark.parametrize("line", ["The same for hooks.", "It is sent.", "Same as `run`.", "Like above, later."])
def test_a_line_without_its_object_is_found(line: str):
    assert hidden_subjects(f'class A:\n    def b(self):\n        """{line}"""\n') == [f"b: {line}"]


@pytest.mark.parametrize("name", ["is_heard", "_twins", "place_here", "_told", "Place"])
def test_a_home_made_name_is_found(name: str):
    assert names_like(HOME_MADE, f"x = {name}") | names_like(PLACE, f"x = {name}") == {name}


@pytest.mark.parametrize("line", ["Items of a feed.", "Sameness of two values.", "Iterate it."])
def test_words_that_only_begin_alike_are_let_through(line: str):
    assert hidden_subjects(f'def b():\n    """{line}"""\n') == []


def test_the_house_has_few_words_of_its_own():
    page = (PACKAGE.parent / "docs" / "architecture.md").read_text("utf-8")
    words = re.findall(r"^\| \*\*(\w+)\*\* \|", page.partition("## Words")[2].partition("\n## ")[0], re.MULTILINE)
    assert 5 <= len(words) <= 15
    assert words == sorted(words)
