"""The forms in which a journal keeps replies: what was written is read again, and what cannot be is refused."""

from __future__ import annotations

from typing import Any

import pytest

from fractal import Reply
from fractal._engine.journal_forms import reply_form, reply_of
from fractal._engine.journaled_replies import _window_of
from fractal._lossless import Unreadable

PARTS = [{"type": "text", "text": "hi"}, {"type": "image_url", "image_url": {"url": "https://example.com/a.png"}}]


@pytest.mark.parametrize(
    "reply",
    [Reply(text="hi"), Reply(text="hi", content=PARTS), Reply(text="hi", extra={"reasoning_content": "a greeting"})],
    ids=["text", "parts", "extra"],
)
def test_a_reply_is_read_as_it_was(reply: Reply):
    assert reply_of(reply_form(reply)) == reply


@pytest.mark.parametrize("wrong", [{"content": 1}, {"extra": []}, {"text": 1}, {"input_tokens": "many"}], ids=str)
def test_a_reply_with_parts_that_no_reply_has_is_refused(wrong: dict[str, Any]):
    with pytest.raises(Unreadable):
        reply_of(wrong)


@pytest.mark.parametrize(
    "wrong", [{"cut": 3, "summary": None}, {"cut": 1, "summary": {"role": "user"}}], ids=["longer", "no message"]
)
def test_a_window_of_another_conversation_is_refused(wrong: dict[str, Any]):
    with pytest.raises(Exception, match=r"conversation|says nothing|content"):
        _window_of(wrong, 2)
    assert _window_of({"cut": 2, "summary": None}, 2) == (2, None, None)
