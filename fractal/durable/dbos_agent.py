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
from fractal._agent.core import core_of
from fractal._engine.journal_forms import result_form, result_of
from fractal._json import decode, encode
from fractal._log import log
from fractal._texts import in_brief, one_line
from fractal.agent import BaseAgent
from fractal.definition import AgentDefinition
from fractal.durable.dbos_journal import DBOSJournal, outside
from fractal.errors import InvalidArguments, JournalMismatch, RunCancelled, RunUnknown, UnexpectedError
from fractal.limits import Limits
from fractal.messages import user_message
from fractal.results import AgentResult, Content_co

if TYPE_CHECKING:
    from fractal._answers.ways import OutputMode

__all__ = ["DurableAgent", "DurableOptions", "DurableRun"]

PREFIX = "fractal."
"""What the names of our workflows begin with."""

_NAME = re.compile(r"[\w.-]{1,100}")
_FIRST_PAUSE, _LONGEST_PAUSE = 0.01, 0.5
_TO_CANCEL = 5.0
"""Seconds to tell other processes that a run is cancelled."""

_ENDED = frozenset({"SUCCESS", "ERROR", "CANCELLED", "MAX_RECOVERY_ATTEMPTS_EXCEEDED"})


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

    def on(self, queue: str) -> BaseAgent[Content_co]:
        """An agent for this process whose runs go into a queue, and are done by whichever process takes them.

        Everything that takes an agent takes it: `run_many(clerk.on("orders"), inputs)` spreads a batch over workers,
        with its results, order and progress as they are at home. A run that is cancelled here is cancelled there.

        Args:
            queue: Name of the queue.

        Raises:
            InvalidArguments: That can be none.
        """
        return _OnQueue(self, _checked_queue(queue))

    def find(self, run_id: str) -> DurableRun[Content_co]:
        """The run of an id, begun in whatever process; that there is one shows when it is asked.

        Args:
            run_id: Its id.
        """
        return DurableRun(self._dbos.DBOS, _checked_id(run_id), self.agent)

    async def _begin(
        self, begin: Any, user_input: object, run_id: str | None, options: DurableOptions
    ) -> DurableRun[Content_co]:
        asked = self._written(user_input, options)
        given = self._dbos.SetWorkflowID(_checked_id(run_id)) if run_id is not None else nullcontext()

        def begun() -> tuple[str, Any]:
            with given:
                handle = begin(asked)
            return handle.workflow_id, handle.get_status()

        found, status = await outside(begun)
        recorded = _asked_in(status)
        if recorded != asked:
            raise JournalMismatch(found, "start", one_line(str(recorded), 1000), one_line(asked, 1000))
        return DurableRun(self._dbos.DBOS, found, self.agent)

    def _written(self, user_input: object, options: DurableOptions) -> str:
        """What is asked, as JSON that another process reads."""
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
            options = said["options"]
            if "limits" in options:
                options["limits"] = Limits(**options["limits"])
            run_id, journal = self._dbos.DBOS.workflow_id, DBOSJournal(self._dbos.DBOS)
            result = await verbs.ask(self.agent, said["content"], journal=journal, run_id=run_id, **options)
            return json.dumps(result_form(result))

        return work


class DurableRun(Generic[Content_co]):
    """A run of a `DurableAgent`, in whatever process it goes on.

    Attributes:
        run_id: Its id.
    """

    def __init__(self, dbos: Any, run_id: str, agent: AgentDefinition[Content_co]) -> None:
        self._dbos, self.run_id, self._agent = dbos, run_id, agent

    def __repr__(self) -> str:
        return f"DurableRun({self.run_id!r})"

    async def status(self) -> str:
        """What DBOS says of the run: `ENQUEUED`, `PENDING`, `SUCCESS`, `ERROR`, `CANCELLED` or another word of its.

        Raises:
            RunUnknown: There is no such run.
        """
        return str((await self._look()).status)

    async def result(self) -> AgentResult[Content_co]:
        """Wait for the end of the run, and return its result.

        Returns:
            As in `BaseAgent.run`.

        Raises:
            RunUnknown: There is no such run.
            RunCancelled: Somebody has cancelled it.
            UnexpectedError: It has raised something, as wrong use does.
        """
        pause = _FIRST_PAUSE
        while (found := await self._look()).status not in _ENDED:
            await anyio.sleep(pause)
            pause = min(pause * 1.5, _LONGEST_PAUSE)
        if found.status == "SUCCESS":
            answer = core_of(self._agent).facts()["answer"]
            return result_of(json.loads(found.output), answer)
        if found.status == "CANCELLED":
            raise RunCancelled
        error = found.error
        reason = f"{getattr(error, 'name', type(error).__name__)}: {error}" if error is not None else found.status
        raise UnexpectedError(f"run {self.run_id!r} has failed: {reason}")

    async def cancel(self) -> None:
        """Cancel the run: its next step is not made, and a queue does not start it. A step under way goes on.

        Raises:
            RunUnknown: There is no such run.
        """
        await self._look()
        await outside(lambda: self._dbos.cancel_workflow(self.run_id))

    async def _look(self) -> Any:
        found = await outside(lambda: self._dbos.get_workflow_status(self.run_id))
        if found is None:
            raise RunUnknown(self.run_id)
        return found


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
    """What a run was asked, as its workflow has it; None if it is no run of ours."""
    given: Any = status.input
    try:
        [asked] = given["args"]
    except (TypeError, LookupError, ValueError):
        return None
    return asked
