"""Writes that come at the same time: one thread does them all, and each is told of its own."""

from __future__ import annotations

import threading
from collections.abc import Sequence

import anyio
import pytest

from fractal.durable._together import Queued, Together

WORDS = ("one", "two", "three")


class Word(Queued):
    def __init__(self, word: str) -> None:
        super().__init__()
        self.word = word


class Book:
    """What is written, in the groups in which it came; a word may be refused, and so may all."""

    def __init__(self, refused: str = "", error: type[BaseException] = ValueError) -> None:
        self.groups: list[list[str]] = []
        self.told: dict[str, str] = {}
        self._refused, self._error = refused, error
        self._together = Together(threading.Lock(), self._write, lambda error: not isinstance(error, ValueError))

    def _write(self, words: Sequence[Word]) -> None:
        group = [each.word for each in words]
        if self._refused == "all" or self._refused in group:
            raise self._error
        self.groups.append(group)

    async def bring(self, word: str) -> None:
        try:
            await self._together.write(Word(word))
            self.told[word] = "written"
        except self._error:
            self.told[word] = "refused"

    async def bring_all(self) -> None:
        async with anyio.create_task_group() as group:
            for word in WORDS:
                group.start_soon(self.bring, word)


async def test_what_comes_at_the_same_time_is_written_at_once():
    book = Book()
    await book.bring_all()
    await book.bring("four")
    assert [sorted(group) for group in book.groups] == [sorted(WORDS), ["four"]]
    assert book.told == dict.fromkeys((*WORDS, "four"), "written")


@pytest.mark.parametrize("word", WORDS)
async def test_what_is_refused_takes_nothing_with_it(word: str):
    book = Book(refused=word)
    await book.bring_all()
    assert book.told == {each: "refused" if each == word else "written" for each in WORDS}
    assert sorted(each for group in book.groups for each in group) == sorted({*WORDS} - {word})


class Ended(BaseException):
    """What is no `Exception`, as that which DBOS raises in a workflow that was cancelled."""


@pytest.mark.parametrize("error", [OSError, Ended])
async def test_nothing_counts_as_written_where_nothing_can_be(error: type[BaseException]):
    book = Book(refused="all", error=error)
    await book.bring_all()
    assert (book.told, book.groups) == (dict.fromkeys(WORDS, "refused"), [])
