"""What goes wrong with what outlives its process: journals and conversations."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from fractal.errors._base import FractalError, UserError

if TYPE_CHECKING:
    from collections.abc import Sequence

__all__ = [
    "ConversationConflict",
    "ConversationExists",
    "ConversationNotFound",
    "JournalError",
    "JournalMismatch",
    "JournalNotWritten",
    "JournalUnreadable",
    "NotPending",
    "RunInProgress",
    "RunTakenOver",
    "RunUnknown",
    "StorageFailed",
    "StoreError",
    "StoreUnavailable",
    "StoreUnreadable",
]


class StoreError(FractalError):
    """Something is not kept, or cannot be read again.

    Attributes:
        result: Of a run that could not keep what it has said: its `AgentResult`, with all of that; else None.
    """

    result: Any = None


class ConversationConflict(StoreError):
    """Somebody else has gone on with a conversation, or has deleted it, since it was read; nothing was written.

    Attributes:
        conversation_id: Its id.
        expected: The revision that was read; 0 for a conversation that there was not yet.
        found: The revision that there is now; 0 if there is none.
    """

    def __init__(self, conversation_id: str, expected: int, found: int) -> None:
        self.conversation_id, self.expected, self.found = conversation_id, expected, found
        super().__init__(
            f"conversation {conversation_id!r} was read at revision {expected}, and is now at revision {found}: await"
            " its reload(), and ask again, or append() what was said to another one"
        )


class ConversationNotFound(StoreError, LookupError):
    """There is no conversation with that id.

    Attributes:
        conversation_id: The id.
    """

    def __init__(self, conversation_id: str) -> None:
        self.conversation_id = conversation_id
        super().__init__(f"there is no conversation {conversation_id!r}")


class ConversationExists(StoreError, ValueError):
    """A conversation was to get an id that another one has.

    Attributes:
        conversation_id: The id.
    """

    def __init__(self, conversation_id: str) -> None:
        self.conversation_id = conversation_id
        super().__init__(f"there is a conversation {conversation_id!r} already: give another id, or delete that one")


class StorageFailed(FractalError):
    """A second base class of the errors of files and databases, for journals and conversations alike."""


class _AboutStore(Exception):
    def __init__(self, store: str, reason: str) -> None:
        self.store, self.reason = store, reason
        super().__init__(f"{store}: {reason}")


class StoreUnavailable(_AboutStore, StoreError, StorageFailed):
    """A store cannot be reached, read or written now: it is locked, full, read-only or away. Nothing was torn.

    Attributes:
        store: Which: a path, or the kind of database.
        reason: What is in the way.
    """


class StoreUnreadable(_AboutStore, StoreError, StorageFailed):
    """A store is damaged, of a newer version, or something else: `reason` says what, and `store` says which."""


class JournalError(UserError, RuntimeError):
    """A durable run cannot go on with its journal; raised out of the run, which can be taken up again.

    Attributes:
        run_id: Id of the run; None where it is about all of the journal.
    """

    def __init__(self, message: str, *, run_id: str | None = None) -> None:
        self.run_id = run_id
        super().__init__(message)


class JournalMismatch(JournalError):
    """A journal records something else of a step than the run does now: another input, another tool or arguments.

    Attributes:
        step: The step, by its position in the run.
        recorded: What the journal has.
        now: What the run does.
    """

    def __init__(self, run_id: str, step: str, recorded: str, now: str) -> None:
        self.step, self.recorded, self.now = step, recorded, now
        super().__init__(
            f"run {run_id!r} does something else at step {step!r} than its journal records: recorded was {recorded};"
            f" now it is {now}. Go on with the code and the input it began with, or begin anew with another run_id",
            run_id=run_id,
        )


class JournalUnreadable(JournalError, StorageFailed):
    """A journal, or a record in it, is damaged, of a newer version, or none."""


class JournalNotWritten(JournalError, StorageFailed):
    """A journal could not be written: the disk is full, the file may not be written, or others keep it locked."""


class RunInProgress(JournalError):
    """Another process, or another task of this one, is at work on the run.

    Attributes:
        owner: Who that is.
    """

    def __init__(self, run_id: str, owner: str) -> None:
        self.owner = owner
        super().__init__(f"run {run_id!r} is in progress: {owner} is at work on it", run_id=run_id)


class RunTakenOver(JournalError):
    """Another process has gone on with the run, since this one gave no sign of life for too long."""

    def __init__(self, run_id: str) -> None:
        super().__init__(
            f"run {run_id!r} was taken over: this process gave no sign of life for longer than its lease", run_id=run_id
        )


class RunUnknown(JournalError, LookupError):
    """A journal has no run of that id."""

    def __init__(self, run_id: str) -> None:
        super().__init__(f"the journal has no run {run_id!r}", run_id=run_id)


class NotPending(JournalError, LookupError):
    """An answer was given for a call that does not wait for one: it was never issued, or has been answered.

    Attributes:
        call_id: Id of the call.
    """

    def __init__(self, run_id: str, call_id: str, pending: Sequence[str]) -> None:
        self.call_id = call_id
        waiting = ", ".join(map(repr, pending)) or "none"
        super().__init__(
            f"call {call_id!r} of run {run_id!r} does not wait for an answer; those that do: {waiting}", run_id=run_id
        )
