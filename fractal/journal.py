"""Journals: where durable runs are recorded, step by step, so that another process can go on with them."""

from __future__ import annotations

from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass, field
from typing import Literal, Protocol, runtime_checkable

__all__ = ["Journal", "OpenJournal", "StepKey", "StepKind"]

StepKind = Literal[
    "start",
    "sent",
    "shown",
    "window",
    "reply",
    "approval",
    "answer",
    "started",
    "finished",
    "pause",
    "end",
]
"""What a record says of a step: a run's `start` and `end`, and its `pause` while calls wait for approval; that a
request was `sent`, the `window` it was cut to, how much of its reply was `shown` to the reader of a stream, and the
`reply`; a tool call's `approval`, the later `answer` to one that was deferred, that it was `started`, and how it
`finished`."""


@dataclass(frozen=True, slots=True)
class StepKey:
    """The key of one record: the position of a step in its run, which is the same in each process.

    Its text is the key: `str(key)`. The name is not part of it, so that another step in the same position is noticed.

    Attributes:
        path: Position of the run below the first one, empty for that itself; one part for each delegate.
        position: Position in the run: the number of the reply, and that of the call in it; empty for all of the run.
        kind: What the record says of the step.
        name: What the step is about: the agent, the tool, the model.

    Example:
        >>> str(StepKey("", "2.0", "finished", "search"))
        '2.0 finished'
    """

    path: str
    position: str
    kind: StepKind
    name: str = field(default="", compare=False)

    def __str__(self) -> str:
        where = "/".join(filter(None, (self.path, self.position)))
        return f"{where} {self.kind}".strip()


class OpenJournal(Protocol):
    """The journal of one run, while one process is at work on it."""

    def recall(self, key: StepKey) -> str | None:
        """The record of that key, of a process that has ended or of this one; None if there is none."""
        ...

    async def record(self, key: StepKey, text: str) -> None:
        """Keep a record; when this returns, no end of the process can lose it. No key is recorded twice.

        Calls may be made side by side, by the parallel tools and delegates of a run.

        Args:
            key: Its key.
            text: JSON, of one line.

        Raises:
            JournalError: It could not be kept, or another process has taken the run over; nothing was kept.
        """
        ...

    async def mark(self, key: StepKey, text: str) -> None:
        """Keep a record that takes the place of an earlier one of its key; the end of the machine may lose it.

        Called before each request, and before each piece of text that the reader of a stream is shown.

        Raises:
            JournalError: As `record`.
        """
        ...


@runtime_checkable
class Journal(Protocol):
    """A store of durable runs; given to `agent.run` as `journal=`, with a `run_id=`.

    It may have an attribute `wait`: the seconds in which a run looks again and again while somebody else has it open.
    Without one the run gets `RunInProgress` at once.
    """

    def open(self, run_id: str) -> AbstractAsyncContextManager[OpenJournal]:
        """Open the journal of a run for the caller alone, until the block is left.

        Nothing is kept of a run that has no record yet.

        Args:
            run_id: Id of the run; a new one begins a run.

        Raises:
            RunInProgress: Somebody else has it open.
            JournalError: It cannot be read.
        """
        ...
