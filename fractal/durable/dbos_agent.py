"""Agents whose runs are workflows of DBOS: another process goes on with them, and queues spread them over machines.

All that is asked of DBOS blocks, and is done in worker threads, so it works on asyncio and on trio, and in blocking
code through `fractal.sync.call`. The workflows themselves run on the event loop of DBOS.
"""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from functools import partial
from importlib import import_module
from typing import TYPE_CHECKING, Any, Generic, TypedDict, cast
from uuid import uuid4

import anyio
from typing_extensions import Unpack

from fractal._agent import verbs
from fractal._engine.journal_forms import approval_form, approval_of, result_form
from fractal._engine.journal_of_tree import Durable
from fractal._engine.taken_up import checked_answers, last_pause
from fractal._json import decode, encode
from fractal._log import log
from fractal._texts import in_brief, one_line
from fractal.agent import BaseAgent
from fractal.definition import AgentDefinition
from fractal.durable.dbos_events import events_written
from fractal.durable.dbos_journal import DBOSJournal, outside, part_id
from fractal.durable.dbos_run import DurableRun, last_part
from fractal.errors import (
    InvalidArguments,
    JournalMismatch,
    JournalNotWritten,
    NotPending,
    RunTakenOver,
    RunUnknown,
    StoreUnavailable,
)
from fractal.limits import Limits
from fractal.messages import user_message
from fractal.results import AgentResult, Content_co

if TYPE_CHECKING:
    from fractal._answers.ways import OutputMode
    from fractal.approval import Allow, Deny
    from fractal.durable.dbos_run import Part

__all__ = ["DurableAgent", "DurableOptions"]

PREFIX = "fractal."
"""What the names of our workflows begin with."""

_NAME = re.compile(r"[\w.-]{1,100}")
_OF_DBOS = "_dbos_"
"""What the names of queues begin with that are none of the user's."""

_TO_CANCEL = 5.0
"""Seconds to tell other processes that a run is cancelled."""


class DurableOptions(TypedDict, total=False):
    """The options of a run that may go on in another process; the others are the agent's.

    Attributes:
        max_iterations: Turns: a reply and the tool calls it asks for.
        max_retries: Times a failed request, and an empty reply, is tried again.
        messages: Conversation to continue.
        timeout: Seconds the run may take, wherever it goes on.
        limits: What this run may use.
        output_mode: How the model is made to give a typed answer.
    """

    max_iterations: int | None
    max_retries: int | None
    messages: Sequence[Mapping[str, Any]] | None
    timeout: float | None
    limits: Limits | None
    output_mode: OutputMode | None


class DurableAgent(Generic[Content_co]):
    """An agent whose runs are workflows of DBOS, and outlive their process.

    Each step of a run is a step of the workflow. A process that is launched with the same agents under the same names
    goes on with the runs of one that has ended; what is recorded is not done again. An agent crosses the border of a
    process by its name.

    Make it before `DBOS.launch()`, in each process that works on its runs.

    Args:
        agent: The agent.
        name: Its name for other processes: up to 100 letters, digits, `_`, `.` and `-`. None: the agent's own.

    Raises:
        InvalidArguments: DBOS is not installed, that can be no name, or another agent of this process has it.

    Example:
        ```python
        DBOS(config={"name": "shop-agents", "system_database_url": "sqlite:///runs.db", "application_version": "1"})
        clerk = DurableAgent(BaseAgent("Clerk", "You handle orders."))
        DBOS.launch()

        run = await clerk.start("Send order 17.", run_id="order-17")
        result = await run.result()
        ```
    """

    def __init__(self, agent: AgentDefinition[Content_co], *, name: str | None = None) -> None:
        if not isinstance(cast("object", agent), AgentDefinition):
            raise InvalidArguments(f"agent={in_brief(agent)}: give an agent")
        self._dbos = _dbos_module()
        self.agent, self.name = agent, _checked_name(name, agent.name)
        # Of two functions from one place in a file DBOS takes the second, and says nothing. Only there it is known.
        registry: Any = import_module("dbos._dbos")._get_or_create_dbos_registry()
        if PREFIX + self.name in registry.workflow_info_map:
            raise InvalidArguments(f"name={self.name!r}: another durable agent of this process has it")
        form = self._dbos.WorkflowSerializationFormat.PORTABLE
        self._workflow = self._dbos.DBOS.workflow(name=PREFIX + self.name, serialization_type=form)(self._work())

    def __repr__(self) -> str:
        return f"DurableAgent({self.agent!r}, name={self.name!r})"

    async def start(
        self, user_input: object, *, run_id: str | None = None, **options: Unpack[DurableOptions]
    ) -> DurableRun[Content_co]:
        """Begin a run in this process.

        Args:
            user_input: As in `BaseAgent.run`; it has to have a form in JSON.
            run_id: Id of the run. If there is one of that id, that is what is returned. None: a new one.
            **options: See `DurableOptions`.

        Raises:
            InvalidArguments: An argument cannot be what was meant.
            JournalMismatch: There is a run of that id, with another input or other options.
            StoreUnavailable: The database does not keep it.
        """
        return await self._begin(partial(self._dbos.DBOS.start_workflow, self._workflow), user_input, run_id, options)

    async def enqueue(
        self, queue: str, user_input: object, *, run_id: str | None = None, **options: Unpack[DurableOptions]
    ) -> DurableRun[Content_co]:
        """Put a run into a queue of DBOS, for whichever process takes it.

        Args:
            queue: Name of the queue, which `DBOS.register_queue` has made.
            user_input: As in `start`.
            run_id: As in `start`.
            **options: As in `start`.

        Raises:
            InvalidArguments: An argument cannot be what was meant.
            JournalMismatch: There is a run of that id, with another input or other options.
        """
        begin = partial(self._dbos.DBOS.enqueue_workflow, _checked_queue(queue), self._workflow)
        return await self._begin(begin, user_input, run_id, options)

    async def resume(
        self, run_id: str, answers: Mapping[str, Allow | Deny | bool] | None = None
    ) -> DurableRun[Content_co]:
        """Answer calls of a run that waits for approval, and let it go on, in the queue that it came from.

        Args:
            run_id: Id of the run.
            answers: `Allow(…)`, `Deny(…)`, True or False, by the ids of calls in `result.pending`. None: none.

        Returns:
            The run. Calls that are not answered yet wait on, in its next result.

        Raises:
            RunUnknown: There is no such run.
            NotPending: A call that is answered does not wait for that; nothing is answered.
        """
        given, run = checked_answers(answers), self.find(run_id)
        part = await last_part(self._dbos.DBOS, run_id)
        form = part.result_form if part.waits_for_approval else {"pending": ()}
        pending = [call["call_id"] for call in form["pending"]]
        for call_id in given:
            if call_id not in pending:
                raise NotPending(run_id, call_id, pending)
        if given:
            await self._go_on(run_id, part, given)
        return run

    async def _go_on(self, run_id: str, part: Part, given: Mapping[str, Allow | Deny]) -> None:
        """Begin the next workflow of a run that waits for approval.

        Raises:
            NotPending: Somebody has begun it with other answers.
        """
        dbos, number = self._dbos.DBOS, part.number + 1
        journal = DBOSJournal(dbos, run_id, part.number)
        said = {
            **json.loads(cast("str", _asked_in(part.found))),
            "run_id": run_id,
            "part": number,
            "pause": last_pause(Durable(journal, run_id, await journal.read())),
            "answers": {call_id: approval_form(answer) for call_id, answer in given.items()},
        }
        queue = part.found.queue_name
        if queue is None or queue.startswith(_OF_DBOS):
            begin = partial(dbos.start_workflow, self._workflow)
        else:
            begin = partial(dbos.enqueue_workflow, queue, self._workflow)
        asked = json.dumps(said, sort_keys=True)
        _, recorded = await self._begun(begin, asked, part_id(run_id, number))
        if recorded != asked:
            raise NotPending(run_id, next(iter(given)), [])

    def __on_queue__(self, queue: str, /) -> BaseAgent[Content_co]:
        """An agent for this process whose runs go into a queue; `run_many(clerk, inputs, on=queue)` asks for it."""
        return _OnQueue(self, _checked_queue(queue))

    def find(self, run_id: str) -> DurableRun[Content_co]:
        """The run of an id, begun in whatever process; whether there is one shows when it is first used.

        Args:
            run_id: Its id.
        """
        return DurableRun(self._dbos.DBOS, _checked_id(run_id), self.agent)

    async def _begin(
        self, begin: Any, user_input: object, run_id: str | None, options: DurableOptions
    ) -> DurableRun[Content_co]:
        asked = self._written(user_input, options)
        found, recorded = await self._begun(begin, asked, None if run_id is None else _checked_id(run_id))
        if recorded != asked:
            raise JournalMismatch(found, "start", one_line(str(recorded), 1000), one_line(asked, 1000))
        return DurableRun(self._dbos.DBOS, found, self.agent)

    async def _begun(self, begin: Any, asked: str, workflow: str | None) -> tuple[str, object]:
        """Begin a workflow, if there is none of that id; returns the id, and what the workflow of that id is asked."""
        given = self._dbos.SetWorkflowID(workflow) if workflow is not None else nullcontext()

        def begun() -> tuple[str, object]:
            with given:
                handle = begin(asked)
            return handle.workflow_id, asked if workflow is None else _asked_in(handle.get_status())

        return await outside(begun, abandon=False)

    def _written(self, user_input: object, options: DurableOptions) -> str:
        """The input and the options, as JSON that another process reads."""
        if unknown := options.keys() - DurableOptions.__annotations__.keys():
            raise InvalidArguments(
                f"a run that may go on in another process has no options {sorted(unknown)}, only"
                f" {sorted(DurableOptions.__annotations__)}: give the agent what else it needs"
            )
        given: dict[str, Any] = {name: value for name, value in options.items() if value is not None}
        verbs.check(self.agent, **given)
        if "limits" in given:
            limits = dataclasses.asdict(given["limits"])
            given["limits"] = {name: value for name, value in limits.items() if value is not None}
        if "messages" in given:
            given["messages"] = decode(encode(list(given["messages"])))
        content = decode(encode(user_message(user_input)["content"]))
        return json.dumps({"content": content, "options": given}, sort_keys=True)

    def _work(self) -> Any:
        """The function that DBOS calls, wherever the run goes on."""

        async def work(asked: str) -> str:
            said = json.loads(asked)
            dbos = self._dbos.DBOS
            run_id, part = said.get("run_id", dbos.workflow_id), said.get("part", 0)
            journal = DBOSJournal(dbos, run_id, part)
            try:
                async with events_written(dbos, self.agent, journal):
                    result = await self._answered(said, journal, run_id)
            except (JournalNotWritten, RunTakenOver, StoreUnavailable) as error:
                log.failure(f"run {run_id!r} is left as it is recorded, for the next process of this id", error)
                raise _LeftAsItIs from error
            return json.dumps(result_form(result))

        return work

    async def _answered(self, said: dict[str, Any], journal: DBOSJournal, run_id: str) -> AgentResult[Any]:
        options = said["options"]
        if "limits" in options:
            options["limits"] = Limits(**options["limits"])
        if "answers" not in said:
            return await verbs.ask(self.agent, said["content"], journal=journal, run_id=run_id, **options)
        options.pop("messages", None)
        answers = {call_id: approval_of(form) for call_id, form in said["answers"].items()}
        return await verbs.resume(self.agent, journal, run_id, answers, pause=said["pause"], **options)


class _LeftAsItIs(BaseException):
    """An exception that DBOS does not take for the end of a workflow, as it does any `Exception`."""


class _OnQueue(BaseAgent[Content_co]):
    """An agent whose runs are done by whichever process takes them from a queue."""

    def __init__(self, durable: DurableAgent[Content_co], queue: str) -> None:
        super().__init__(durable.agent.name, "")
        self._durable, self._queue = durable, queue

    async def run(self, user_input: object, **options: Any) -> AgentResult[Any]:  # type: ignore[override]
        """Put the input into the queue, and wait for the result."""
        run_id = options.pop("run_id", None)
        if run_id is None:
            run_id = uuid4().hex  # ours, and known before: a cancellation may come while it is put into the queue
        try:
            run = await self._durable.enqueue(self._queue, user_input, run_id=run_id, **options)
            return await run.result()
        except anyio.get_cancelled_exc_class():
            with anyio.move_on_after(_TO_CANCEL, shield=True):
                await self._cancel(run_id)
            raise

    async def _cancel(self, run_id: str) -> None:
        """Cancel a run elsewhere; a failure must not take the place of the cancellation here."""
        try:
            await self._durable.find(run_id).cancel()
        except RunUnknown:
            pass  # it was not put into the queue
        except Exception as error:
            log.failure(f"run {run_id} could not be cancelled", error)


def _dbos_module() -> Any:
    try:
        return import_module("dbos")
    except ImportError as error:
        raise InvalidArguments(f"DBOS is needed: pip install 'fractal-anyio[durable]' ({error})") from error


def _checked_name(name: object, own: object) -> str:
    name = own if name is None else name
    if not isinstance(name, str) or not _NAME.fullmatch(name):
        raise InvalidArguments(f"name={in_brief(name)}: give up to 100 letters, digits, '_', '.' and '-'")
    return name


def _checked_queue(queue: object) -> str:
    if not isinstance(queue, str) or not queue:
        raise InvalidArguments(f"queue={in_brief(queue)}: give the name of a queue")
    return queue


def _checked_id(run_id: object) -> str:
    if not isinstance(run_id, str) or not 0 < len(run_id) <= 200 or not run_id.isprintable():
        raise InvalidArguments(f"run_id={in_brief(run_id)}: give text of 1 to 200 printable characters")
    return run_id


def _asked_in(status: Any) -> object:
    """The input and the options of a run, as its workflow has them; None if it is no run of ours."""
    given: Any = status.input
    try:
        [asked] = given["args"]
    except (TypeError, LookupError, ValueError):
        return None
    return asked
