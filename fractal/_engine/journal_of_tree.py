"""The journal of a tree of runs, as its runs use it: records are read, compared and written here, and nowhere else."""

from __future__ import annotations

import json
import math
from contextlib import AsyncExitStack, asynccontextmanager
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar

import anyio

from fractal._checks import is_number
from fractal._concurrency.background import Background
from fractal._concurrency.grace import DEFAULT_GRACE
from fractal._json import is_mapping
from fractal._lossless import Unreadable, compact
from fractal._texts import described, in_brief, one_line
from fractal.errors import JournalError, JournalMismatch, JournalNotWritten, JournalUnreadable, RunInProgress
from fractal.journal import Journal, OpenJournal, StepKey

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, Awaitable, Callable

__all__ = ["Durable", "JournalOfTree", "opened"]

T = TypeVar("T")

VERSION = 1
"""Of the form of records."""

_FIRST_PAUSE, _LONGEST_PAUSE = 0.01, 0.25
"""Seconds between two looks whether somebody else is still at work on a run."""

_MOMENT = 1.0
"""Seconds that a write may take to end when it is cancelled."""


class Durable(NamedTuple):
    """The journal that a run is given, and the id that it has there.

    Attributes:
        journal: Where it is recorded.
        run_id: Its id.
        opened: The journal of the run, if it is open already.
    """

    journal: Journal
    run_id: str
    opened: OpenJournal | None = None


class JournalOfTree:
    """The journal of a run and of all the runs below it.

    Args:
        durable: Where the first of them is recorded.
        grace: Seconds that a record has to be kept after it was cancelled, since nothing cuts it in the middle.

    Attributes:
        run_id: Id of the first run.
        deferred: Path and position of the calls that wait for approval, by the ids that answers name.
    """

    def __init__(self, durable: Durable, grace: float = DEFAULT_GRACE) -> None:
        self.run_id = durable.run_id
        self._durable, self._opened, self._grace = durable, durable.opened, grace
        self._broken: JournalError | None = None
        self.deferred: dict[str, tuple[str, str]] = {}

    @asynccontextmanager
    async def open(self, deadline: float) -> AsyncGenerator[None]:
        """Open the journal, unless it is open.

        Args:
            deadline: Until when to wait, at most, for somebody else who is at work on the run.
        """
        if self._opened is not None:
            yield
            return
        async with opened(self._durable, deadline) as self._opened:
            try:
                yield
            finally:
                self._opened = None

    def check(self) -> None:
        """Raise the error that has broken the journal: nothing may go on without it.

        Raises:
            JournalError: A record could not be read or kept before.
        """
        if self._broken is not None:
            raise self._broken

    def recall(self, key: StepKey, given: Any = None) -> Any:
        """The value of a record; None without one.

        Args:
            key: Its key, with the name of what the run does there now; without one that does not matter.
            given: What the run gives it now; None if that does not matter.

        Raises:
            JournalMismatch: The record is of something else.
            JournalUnreadable: It is damaged, or of a newer version.
        """
        self.check()
        try:
            text = self._recalled(key)
            if text is None:
                return None
            record = self._read(key, text)
            if (key.name and key.name != record["name"]) or (given is not None and given != record["given"]):
                now = compact({"name": key.name, "given": given})
                recorded = compact({"name": record["name"], "given": record["given"]})
                raise JournalMismatch(self.run_id, str(key), one_line(recorded, 1000), one_line(now, 1000))
            return record["value"]
        except JournalError as error:
            self._broken = error
            raise

    def _recalled(self, key: StepKey) -> str | None:
        opened = self._open_journal()
        try:
            text: object = opened.recall(key)
        except JournalError:
            raise
        except Exception as error:
            raise self._unreadable(key, described(error)) from error
        if text is not None and not isinstance(text, str):
            raise self._unreadable(key, f"it is no text: {in_brief(text)}")
        return text

    def _read(self, key: StepKey, text: str) -> dict[str, Any]:
        try:
            record = json.loads(text, parse_constant=_refuse)
        except (ValueError, RecursionError):
            record = None
        if is_mapping(record) and isinstance(record.get("v"), int) and record["v"] > VERSION:
            raise self._unreadable(key, f"it is of version {record['v']}, and this is written for {VERSION}")
        if not is_mapping(record) or not _is_whole(record):
            raise self._unreadable(key, f"it is damaged: {one_line(text, 200)}")
        return dict(record)

    def _unreadable(self, key: StepKey, why: str) -> JournalUnreadable:
        text = f"the record {str(key)!r} of run {self.run_id!r} cannot be read: {why}"
        return JournalUnreadable(text, run_id=self.run_id)

    def read(self, key: StepKey, make: Callable[[], T]) -> T:
        """The object that a recorded value stands for.

        Raises:
            JournalUnreadable: The value is damaged.
        """
        try:
            return make()
        except (Unreadable, LookupError, TypeError, ValueError, AttributeError) as error:
            self._broken = self._unreadable(key, described(error))
            raise self._broken from error

    async def record(self, key: StepKey, given: Any, value: Any) -> None:
        """Keep a record; a cancellation waits for that, as long as there is grace.

        Raises:
            JournalError: It could not be kept.
        """
        await self._write(self._open_journal().record, key, given, value)

    async def mark(self, key: StepKey, value: Any) -> None:
        """Keep a record that takes the place of an earlier one.

        Raises:
            JournalError: It could not be kept.
        """
        await self._write(self._open_journal().mark, key, None, value)

    async def _write(
        self, write: Callable[[StepKey, str], Awaitable[None]], key: StepKey, given: Any, value: Any
    ) -> None:
        self.check()
        text = compact({"v": VERSION, "name": key.name, "given": given, "value": value})
        writing = Background(partial(write, key, text), "fractal journal", deadline=math.inf)
        try:
            await writing.wait()
        except anyio.get_cancelled_exc_class():
            await self._let_end(writing)
            if self._broken is None and anyio.current_effective_deadline() == -math.inf:
                return  # a scope is cancelled, which says so again at the next checkpoint
            raise
        except Exception as error:
            self._break(error)
            self.check()

    async def _let_end(self, writing: Background[None]) -> None:
        """Wait for a write whose waiting task was cancelled, as long as there is grace."""
        try:
            with anyio.move_on_after(self._grace, shield=True):
                await writing.wait()
            if not writing.has_ended:
                self._break(TimeoutError(f"it has not kept a record within {self._grace:g} s after the run was cut"))
                writing.cancel()
                with anyio.move_on_after(_MOMENT, shield=True):
                    await writing.wait()
        except Exception as error:
            self._break(error)

    def _break(self, error: Exception) -> None:
        """Note why nothing may go on without the journal."""
        if self._broken is not None:
            return
        if isinstance(error, JournalError):
            self._broken = error
            return
        text = f"the journal of run {self.run_id!r} failed: {described(error)}"
        self._broken = JournalNotWritten(text, run_id=self.run_id)
        self._broken.__cause__ = error

    def _open_journal(self) -> OpenJournal:
        if self._opened is None:
            raise JournalError(f"the journal of run {self.run_id!r} is closed: the run has ended", run_id=self.run_id)
        return self._opened


@asynccontextmanager
async def opened(durable: Durable, deadline: float = math.inf) -> AsyncGenerator[OpenJournal]:
    """The journal of a run, open for the caller alone; waits for somebody else as long as its `wait` says.

    Args:
        durable: The journal, and the id of the run.
        deadline: Until when to wait at most.

    Raises:
        RunInProgress: Somebody else is at work on the run, for longer than that.
        JournalError: It cannot be opened.
    """
    wait = getattr(durable.journal, "wait", None)  # a journal of a user's own may have such a name for something else
    until = min(anyio.current_time() + (wait if is_number(wait) else 0.0), deadline)
    # No scope is open while it is entered, since it may open some itself that are closed later.
    async with AsyncExitStack() as stack:
        pause = _FIRST_PAUSE
        while True:
            try:
                found = await _entered(stack, durable)
                break
            except RunInProgress:
                if (left := until - anyio.current_time()) <= 0:
                    raise
                await anyio.sleep(min(pause, left))
                pause = min(pause * 1.5, _LONGEST_PAUSE)
        yield found


async def _entered(stack: AsyncExitStack, durable: Durable) -> OpenJournal:
    try:
        found: Any = await stack.enter_async_context(durable.journal.open(durable.run_id))
    except JournalError:
        raise
    except Exception as error:
        text = f"the journal of run {durable.run_id!r} cannot be opened: {described(error)}"
        raise JournalError(text, run_id=durable.run_id) from error
    if found is None:
        raise JournalError(f"the journal of run {durable.run_id!r} cannot be opened: its open() gives None")
    entered: OpenJournal = found
    return entered


def _refuse(constant: str) -> None:
    """Refuse what is no JSON, though Python's reader takes it: NaN and the infinities."""
    raise ValueError(constant)


def _is_whole(record: Any) -> bool:
    return is_mapping(record) and record.keys() >= {"v", "name", "given", "value"} and isinstance(record["name"], str)
