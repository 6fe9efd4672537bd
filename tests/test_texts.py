"""Texts of what others have made, and the forms in which they are shown."""

from __future__ import annotations

import json
import unicodedata
from typing import Any

import pytest
from hypothesis import given, settings, strategies as st

from fractal._texts import (
    described,
    escaped,
    is_a,
    log_line,
    message_of,
    name_of,
    one_line,
    plain_str,
    printable,
    repr_of,
    said_by,
    str_of,
    type_name,
)
from tests.odd import EXCEPTIONS, VALUES, Spent

STEERS = [chr(code) for code in range(0x110000) if unicodedata.category(chr(code)) in ("Cc", "Cf", "Zl", "Zp", "Cs")]
HIDDEN = [*"\u034f\u115f\u1160\u17b4\u17b5\u180b\u180c\u180d\u180f\u2800\u3164\uffa0"]
SHAPES = ["\ufe0f", "\ufe00", "\U000e0100"]
any_text = st.text(st.characters(codec=None, categories=None))


def test_what_steers_a_terminal_or_is_not_seen_reaches_none() -> None:
    for char in {*STEERS, *HIDDEN} - {*"\n\t"}:
        assert printable(f"a{char}b") == "a b"
        shown = escaped(f"a{char}b")
        assert char not in shown
        assert json.loads(f'"{shown}"') == f"a{char}b"
        assert log_line(f"a{char}b") == shown
    assert (printable("a\n\tb"), escaped("a\n\tb"), log_line("a\n\tb")) == ("a\n\tb", "a\n\tb", r"a\n\tb")


@pytest.mark.parametrize("char", SHAPES)
def test_emoji_keep_their_shapes_for_reading_and_show_them_for_looking_closely(char: str) -> None:
    assert printable(f"❤{char}") == f"❤{char}"
    assert char not in escaped(f"❤{char}")


@settings(deadline=None)
@given(any_text)
def test_escapes_mean_the_same_in_json(text: str) -> None:
    written = escaped(json.dumps(text, ensure_ascii=False))
    assert json.loads(written, strict=False) == text.encode("utf-16", "surrogatepass").decode("utf-16", "surrogatepass")
    assert written.isprintable()


def test_words_stay_as_they_are() -> None:
    text = "Ünï “quoted” 日本語 العربية עברית हिन्दी 😀 é\n\tnext"
    assert printable(text) is text or printable(text) == text
    assert escaped(text) == text
    assert log_line(text) == text.replace("\n", "\\n").replace("\t", "\\t")
    assert one_line(text + "\x1b" + "x" * 300)[-4:] == "xxxx"
    assert len(one_line(text * 100)) == 200


@pytest.mark.parametrize("make", VALUES.values(), ids=VALUES)
def test_every_value_has_texts(make: Any) -> None:
    value = make()
    for text in (str_of(value), repr_of(value), type_name(value), name_of(value)):
        assert type(text) is str
        text.encode()
    assert is_a(value, object)


@pytest.mark.parametrize("make", EXCEPTIONS.values(), ids=EXCEPTIONS)
def test_every_exception_has_texts(make: Any) -> None:
    error = make()
    for text in (message_of(error), said_by(error), described(error)):
        assert type(text) is str
    assert said_by(error)
    assert is_a(error, Exception)


def test_the_name_of_the_class_stands_for_a_text() -> None:
    assert (message_of(Spent()), said_by(Spent()), described(Spent())) == ("", "Spent", "Spent")
    assert (said_by(ValueError("odd")), described(ValueError("odd"))) == ("odd", "ValueError: odd")
    assert described(ValueError()) == "ValueError"
    assert repr_of(10**5000) == "<int>"
    assert (name_of(len), name_of(Spent)) == ("len", "Spent")


def test_a_text_of_a_class_of_its_own_is_plain() -> None:
    class Loud(str):
        __slots__ = ()

        def upper(self) -> Any:
            raise OSError

    assert type(plain_str(Loud("a"))) is str
    assert type(str_of(Loud("a"))) is str


def test_a_keyboard_interrupt_is_one() -> None:
    class Interrupting:
        def __str__(self) -> str:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        str_of(Interrupting())
