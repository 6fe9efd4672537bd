"""The world of a scenario of `kill_everywhere`: a journal at which its process ends, and a list of what it has done."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import AsyncGenerator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager
from functools import partial
from pathlib import Path
from typing import Any

from fractal._engine.journaled import step_here
from fractal.durable import SQLiteJournal
from fractal.journal import OpenJournal, StepKey
from fractal.model import ModelRequest, Reply
from fractal.testing._requests import ScriptedRequest
from fractal.testing.answers import AnswerLike
from fractal.testing.scripted import ScriptedModel

__all__ = ["KillWorld"]


class KillWorld:
    """The world of a scenario of `kill_everywhere`: its journal, and what it does outside.

    Args:
        order: Where its files are, which of its processes this is, and when that is to be killed.

    Attributes:
        journal: The journal that its runs are given.
        directory: A directory that all its processes share.
    """

    def __init__(self, order: dict[str, Any]) -> None:
        self.directory = Path(order["directory"])
        self._process: int = order["process"]
        self.journal = _KillingJournal(self, order["kill"], order["when"])

    def effect(self, name: str) -> None:
        """Note that something was done outside, which must not be done twice.

        Args:
            name: What it was.
        """
        self.note("effects", step=step_here() or ": ", name=name)

    def model(
        self, script: Sequence[AnswerLike | BaseException] | Callable[[ScriptedRequest], AnswerLike | BaseException]
    ) -> ScriptedModel:
        """A model whose replies are effects.

        Args:
            script: The answers of a conversation, in order, as `ScriptedModel` takes them: which is next follows from
                the number of replies that the conversation has. Or a function from the request to the answer.
        """
        return _CountedModel(self, script if callable(script) else _by_turn(script))

    def note(self, file: str, **facts: str) -> None:
        """Add a line to a file that outlives the process."""
        line = json.dumps(facts).encode() + b"\n"
        path = self.directory / f"{file}-{self._process}"
        descriptor = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600)
        try:
            os.write(descriptor, line)
        finally:
            os.close(descriptor)


def _by_turn(
    script: Sequence[AnswerLike | BaseException],
) -> Callable[[ScriptedRequest], AnswerLike | BaseException]:
    return lambda request: script[sum(message["role"] == "assistant" for message in request["messages"])]


class _CountedModel(ScriptedModel):
    def __init__(self, world: KillWorld, script: Callable[[ScriptedRequest], AnswerLike | BaseException]) -> None:
        super().__init__(script)
        self._world = world

    async def respond(self, request: ModelRequest) -> Reply:
        self._world.effect("reply")
        return await super().respond(request)


class _KillingJournal:
    """A journal that ends its process at a write.

    Args:
        world: Notes what is written.
        kill: The number of the write; 0: none.
        when: `"before"` or `"after"` it is committed.
    """

    def __init__(self, world: KillWorld, kill: int, when: str) -> None:
        self._world, self._kill, self._when = world, kill, when
        self._journal = SQLiteJournal(world.directory / "journal.db")
        self._writes = 0

    @asynccontextmanager
    async def open(self, run_id: str) -> AsyncGenerator[OpenJournal]:
        """Open the journal of a run."""
        async with self._journal.open(run_id) as opened:
            yield _KillingOpen(opened, partial(self.write, run_id))

    async def write(self, run_id: str, write: Callable[[StepKey, str], Any], key: StepKey, text: str) -> None:
        """Write, and end the process if this is the one."""
        self._writes += 1
        is_last = self._writes == self._kill
        name = f"{run_id}: {key}"
        self._world.note("writes-begun", key=name)
        if is_last and self._when == "before":
            os.kill(os.getpid(), signal.SIGKILL)
        await write(key, text)
        self._world.note("writes-done", key=name)
        if is_last:
            os.kill(os.getpid(), signal.SIGKILL)


class _KillingOpen:
    def __init__(self, opened: OpenJournal, write: Callable[..., Awaitable[None]]) -> None:
        self._opened, self._write = opened, write

    def recall(self, key: StepKey) -> str | None:
        return self._opened.recall(key)

    async def record(self, key: StepKey, text: str) -> None:
        await self._write(self._opened.record, key, text)

    async def mark(self, key: StepKey, text: str) -> None:
        await self._write(self._opened.mark, key, text)
