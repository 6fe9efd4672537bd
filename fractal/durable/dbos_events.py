"""The events of runs that are workflows of DBOS: written into a stream of the workflow, for readers in any process.

Writing never holds a run up: events are gathered for a moment and written together. A process that goes on with a run
tells some of its events again; those that the stream has already are left out.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager, closing
from functools import cache, partial
from importlib import import_module
from typing import TYPE_CHECKING, Any

import anyio
from anyio.lowlevel import checkpoint
from pydantic import TypeAdapter

from fractal._concurrency.feed import Feed
from fractal._concurrency.scopes import is_cancellation, single_error
from fractal._concurrency.workers import run_in_thread
from fractal._engine.overrides import Adoption
from fractal._log import log
from fractal.durable.dbos_journal import DBOSJournal, database_of_dbos, outside
from fractal.errors import RunUnknown
from fractal.events import Event, ModelResponded, RunFinished, WarningRaised

if TYPE_CHECKING:
    from fractal._engine.run import Run

__all__ = ["events_after", "events_written"]

_STREAM = "fractal.events"

_GATHER = 0.25
"""Seconds in which events are gathered to be written together."""

_PAGE = 100
"""Writings that are read at a time."""

_FACTS = ("kind", "run_id", "call_id", "iteration", "attempt", "tool_name", "to_agent", "limit", "is_allowed", "reason")
"""What tells an event of a run from its others, in whatever process it is told; besides how something has ended."""


@asynccontextmanager
async def events_written(dbos: Any, agent: object, journal: DBOSJournal) -> AsyncGenerator[None]:
    """A block in which an agent's run begins and ends, while its events are written into the current workflow.

    Args:
        dbos: The class `DBOS`.
        agent: The agent.
        journal: The journal of the run.
    """
    writer = _Writer(dbos, journal)
    with Adoption(agent, None, writer.watch), single_error():
        async with anyio.create_task_group() as group:
            group.start_soon(writer.write)
            yield
            await writer.close()


class _Writer:
    """Writes the events of a run."""

    def __init__(self, dbos: Any, journal: DBOSJournal) -> None:
        self._dbos, self._journal = dbos, journal
        self._feed: Feed[Event] = Feed(0)
        self._inlet = self._feed.for_other_loop()  # delegates may be in other threads
        self._closing = anyio.Event()
        self._told_before: Counter[tuple[str, ...]] | None = None
        self._run_id = ""

    def watch(self, run: Run) -> None:
        """Take the events of a run that is about to begin."""
        self._run_id = run.run_id
        run.emitter.add_observer(self._inlet.put)

    async def close(self) -> None:
        """End the writing once all events so far are written."""
        for _ in range(2):  # turns of the loop, in which all that was put into the inlet arrives
            await checkpoint()
        self._closing.set()
        self._feed.close()

    async def write(self) -> None:
        """Write events until there are no more; a failure ends the writing, and not the run."""
        try:
            while events := await self._feed.take():
                with anyio.move_on_after(_GATHER):
                    await self._closing.wait()
                await self._keep(events if self._feed.is_empty else events + await self._feed.take())
        except Exception as error:
            log.failure(f"the events of run {self._run_id!r} are written no more", error)
        except BaseException as error:
            if is_cancellation(error):
                raise
            # DBOS has cancelled the workflow, or another process has it: the next record of the run says so.

    async def _keep(self, events: list[Event]) -> None:
        if self._told_before is None:
            self._told_before = Counter(map(_identity, await self._earlier()))
        new = [event.model_dump_json() for event in events if self._is_new(event, self._told_before)]
        if new:
            await run_in_thread(partial(self._write, f"[{','.join(new)}]"), abandon=False)

    def _write(self, text: str) -> None:
        # As `DBOS.write_stream` does in a step; a step for that alone would be a second transaction.
        form = import_module("dbos").WorkflowSerializationFormat.PORTABLE
        write = database_of_dbos().write_stream_from_step
        write(self._journal.workflows[-1], 0, _STREAM, text, serialization_type=form)

    def _is_new(self, event: Event, told_before: Counter[tuple[str, ...]]) -> bool:
        """Whether to write an event; the end of the run is in its result, which readers make it of."""
        if isinstance(event, RunFinished) and event.run_id == self._run_id:
            return False
        if not told_before or isinstance(event, ModelResponded):  # no reply is asked for again
            return True
        identity = _identity(event)
        if not told_before[identity]:
            return True
        told_before[identity] -= 1
        return False

    async def _earlier(self) -> list[Event]:
        """The events that the processes before this one have written."""
        events: list[Event] = []
        for workflow in self._journal.workflows if self._journal.is_taken_up else ():
            offset = 0
            while (page := await events_after(self._dbos, workflow, offset))[0]:
                events += page[0]
                offset = page[1]
        return events


def _identity(event: Event) -> tuple[str, ...]:
    result: Any = getattr(event, "result", None)
    end = str(getattr(result, "outcome", None) or getattr(result, "stop_reason", ""))
    warning = event.message if isinstance(event, WarningRaised) else ""
    return (*(str(getattr(event, name, "")) for name in _FACTS), end, warning)


@cache
def _adapter() -> TypeAdapter[list[Event]]:
    return TypeAdapter(list[Event])  # when it is first needed, as it takes long


async def events_after(dbos: Any, workflow: str, offset: int) -> tuple[list[Event], int, bool]:
    """The next events of a workflow: those that are written by now, and so many at a time.

    Args:
        dbos: The class `DBOS`.
        workflow: Its id.
        offset: Where in its stream to begin.

    Returns:
        The events, where in the stream the next ones will be, and whether the workflow has ended and these are all.

    Raises:
        RunUnknown: There is no such workflow.
    """

    def read() -> tuple[list[str], bool]:
        error: Any = import_module("dbos").error
        texts: list[str] = []
        try:
            with closing(dbos.read_stream(workflow, _STREAM, offset=offset, timeout_seconds=0)) as values:
                for text in values:
                    texts.append(text)
                    if len(texts) == _PAGE:
                        return texts, False
        except error.DBOSStreamTimeoutError:  # no more for now
            return texts, False
        except error.DBOSNonExistentWorkflowError:
            raise RunUnknown(workflow) from None
        return texts, True

    texts, has_ended = await outside(read)
    events = [event for text in texts for event in _adapter().validate_json(text)]
    return events, offset + len(texts), has_ended
