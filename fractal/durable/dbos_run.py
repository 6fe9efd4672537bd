"""Runs that are workflows of DBOS, as any process sees them: how they are, what happens in them, how they end."""

from __future__ import annotations

import json
from collections import deque
from collections.abc import AsyncIterator, Callable, Iterator
from functools import partial
from typing import TYPE_CHECKING, Any, Generic

import anyio

from fractal._agent.core import core_of
from fractal._engine.journal_forms import result_of
from fractal.durable.dbos_events import events_after
from fractal.durable.dbos_journal import outside, part_id
from fractal.errors import RunCancelled, RunUnknown, UnexpectedError
from fractal.events import Event, RunFinished
from fractal.results import AgentResult, Content_co
from fractal.sync import call

if TYPE_CHECKING:
    from fractal.definition import AgentDefinition

__all__ = ["DurableEvents", "DurableRun", "Part", "last_part"]

_ENDED = frozenset({"SUCCESS", "ERROR", "CANCELLED", "MAX_RECOVERY_ATTEMPTS_EXCEEDED"})


class _Pauses:
    """Ever longer pauses between two looks at a database."""

    _FIRST, _LONGEST = 0.05, 0.5

    def __init__(self) -> None:
        self._next = self._FIRST

    async def pause(self) -> None:
        """Wait for a while."""
        await anyio.sleep(self._next)
        self._next = min(self._next * 1.5, self._LONGEST)


class Part:
    """A workflow of a run, as DBOS has it; a run that has waited for approval has several.

    Args:
        number: Which it is, from 0.
        found: What DBOS says of it.

    Attributes:
        number: As given.
        found: As given.
    """

    def __init__(self, number: int, found: Any) -> None:
        self.number, self.found = number, found

    @property
    def has_ended(self) -> bool:
        """Whether the workflow has ended, in whatever way."""
        return self.found.status in _ENDED

    @property
    def waits_for_approval(self) -> bool:
        """Whether the workflow has ended for calls that wait for approval."""
        return bool(self.found.status == "SUCCESS" and self.result_form["stop_reason"] == "approval")

    @property
    def result_form(self) -> Any:
        """The form of the run's result."""
        return json.loads(self.found.output)


async def last_part(dbos: Any, run_id: str, first: int = 0) -> Part:
    """The last workflow of a run.

    Args:
        dbos: The class `DBOS`.
        run_id: Id of the run.
        first: One of its workflows that there is.

    Raises:
        RunUnknown: There is no such run.
    """
    number, part = first, None
    while (found := await outside(partial(dbos.get_workflow_status, part_id(run_id, number)))) is not None:
        part = Part(number, found)
        if not part.waits_for_approval:
            break
        number += 1
    if part is None:
        raise RunUnknown(run_id)
    return part


class DurableRun(Generic[Content_co]):
    """A run of a `DurableAgent`, in whatever process it goes on.

    Attributes:
        run_id: Its id.
    """

    def __init__(self, dbos: Any, run_id: str, agent: AgentDefinition[Content_co]) -> None:
        self._dbos, self.run_id, self._agent = dbos, run_id, agent
        self._part = 0  # that there is

    def __repr__(self) -> str:
        return f"DurableRun({self.run_id!r})"

    async def status(self) -> str:
        """What DBOS says of the run: `ENQUEUED`, `PENDING`, `SUCCESS`, `ERROR`, `CANCELLED` or another word of its.

        Raises:
            RunUnknown: There is no such run.
        """
        return str((await self._look()).found.status)

    async def result(self) -> AgentResult[Content_co]:
        """Wait for the end of the run, and return its result.

        Returns:
            As in `BaseAgent.run`. Of a run that waits for approval the result that says so, until it is resumed.

        Raises:
            RunUnknown: There is no such run.
            StoreUnavailable: The database cannot be asked.
            RunCancelled: Somebody has cancelled it.
            UnexpectedError: It has raised something, as wrong use does.
        """
        pauses = _Pauses()
        while not (part := await self._look()).has_ended:
            await pauses.pause()
        found = part.found
        if found.status == "SUCCESS":
            return self._result_of(part)
        if found.status == "CANCELLED":
            raise RunCancelled
        error = found.error
        reason = f"{getattr(error, 'name', type(error).__name__)}: {error}" if error is not None else found.status
        raise UnexpectedError(f"run {self.run_id!r} has failed: {reason}")

    def events(self) -> DurableEvents:
        """The events of the run from its first on, in whatever process it goes on, until it ends.

        Iterate them by `async for`, or by `for` in blocking code. Each event comes once, in the order in which things
        happened, a moment after it: also where the run has gone on in another process. Pieces of text, as a stream has
        them, are not among them, and what a process has not written in its last moment before it died is missing.
        The last event is `RunFinished`, if the run has a result. It may be read again at any time, and by many.

        Raises:
            RunUnknown: There is no such run; raised to whoever iterates.

        Example:
            ```python
            async for event in run.events():
                match event:
                    case ToolStarted(tool_name=name):
                        print(f"[{name}]")
            ```
        """
        return DurableEvents(self._dbos, self.run_id, self._result_of)

    def _result_of(self, part: Part) -> AgentResult[Content_co]:
        return result_of(part.result_form, core_of(self._agent).facts()["answer"])

    async def cancel(self) -> None:
        """Cancel the run: its next step is not made, and a queue does not start it. A step under way goes on.

        Raises:
            RunUnknown: There is no such run.
        """
        workflow = part_id(self.run_id, (await self._look()).number)
        await outside(lambda: self._dbos.cancel_workflow(workflow))

    async def _look(self) -> Part:
        part = await last_part(self._dbos, self.run_id, self._part)
        self._part = part.number
        return part


class DurableEvents(AsyncIterator[Event], Iterator[Event]):
    """The events of a durable run, for `async for`, or for `for` in blocking code; made by `DurableRun.events`.

    It reads some at a time, and holds nothing open: it may be left at any moment.
    """

    def __init__(self, dbos: Any, run_id: str, result_of: Callable[[Part], AgentResult[Any]]) -> None:
        self._dbos, self._run_id, self._result_of = dbos, run_id, result_of
        self._waiting: deque[Event] = deque()
        self._part = self._offset = 0  # of what is read next
        self._is_at_end = False
        self._at = 0.0  # of the last event

    async def __anext__(self) -> Event:
        """The next event.

        Raises:
            StopAsyncIteration: The run has ended.
            RunUnknown: There is no such run.
        """
        pauses = _Pauses()
        while not self._waiting and not self._is_at_end:
            before = self._part, self._offset
            await self._read()
            if before == (self._part, self._offset) and not self._is_at_end:
                await pauses.pause()
        if not self._waiting:
            raise StopAsyncIteration
        event = self._waiting.popleft()
        self._at = max(self._at, event.at)
        return event

    async def _read(self) -> None:
        """Read the next events that there are now."""
        workflow = part_id(self._run_id, self._part)
        events, self._offset, has_ended = await events_after(self._dbos, workflow, self._offset)
        self._waiting.extend(events)
        if not has_ended:
            return
        last = await last_part(self._dbos, self._run_id, self._part)
        if last.number > self._part:
            self._part, self._offset = self._part + 1, 0
            return
        self._is_at_end = True
        if last.found.status == "SUCCESS":
            self._waiting.append(self._finished(last))

    def _finished(self, part: Part) -> RunFinished:
        result = self._result_of(part)
        # SQLite keeps whole seconds of it.
        at = max(part.found.updated_at / 1000, *(event.at for event in self._waiting), self._at)
        return RunFinished(
            run_id=self._run_id, parent_id=None, agent_name=result.agent_name, depth=0, at=at, result=result
        )

    def __iter__(self) -> DurableEvents:
        return self

    def __next__(self) -> Event:
        """The next event, blocking.

        Raises:
            StopIteration: The run has ended.
            RunUnknown: There is no such run.
        """
        event = call(anext, self, None)
        if event is None:
            raise StopIteration
        return event
