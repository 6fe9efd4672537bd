"""A run with a journal: each step is recorded before another builds on it, and recalled where it is recorded already.

A step is known by its position: the number of the reply, that of the call in it, and the calls above, for a delegate.
Positions follow from what is recorded, whatever the order in which parallel work goes on.
"""

from __future__ import annotations

import hashlib
import math
import re
import time
from collections import Counter
from contextlib import nullcontext
from functools import partial
from typing import TYPE_CHECKING, Any, TypeVar

import anyio

from fractal._concurrency.current import current_run
from fractal._engine.journal_forms import digest, in_brief, moment_of, result_form, result_of
from fractal._engine.journal_of_tree import JournalOfTree
from fractal._engine.journaled_call import JournaledCall
from fractal._engine.journaled_replies import JournaledReplies
from fractal._lossless import to_lossless
from fractal.errors import ApprovalPending
from fractal.journal import StepKey

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Sequence

    from fractal._engine.journal_parties import CallParty, RunParty
    from fractal.journal import StepKind
    from fractal.results import AgentResult

__all__ = ["JournaledRun", "journaled", "step_here"]

Party = TypeVar("Party", bound="CallParty")

_ODD = re.compile(r"[^\w.-]+")


def journaled(run: RunParty) -> JournaledRun:
    """The recorder of a run that is being made, to which it gives the id in the journal."""
    durable, parent = run.settings.durable, run.parent
    if durable is not None:
        run.take_id(durable.run_id)
        # Half of what the calls have: a journal that hangs is told before they are.
        return JournaledRun(JournalOfTree(durable, run.grace / 2), "")
    above: JournaledRun = parent.journaled
    path = above.path_below(parent, run)
    run.take_id(hashlib.sha256(f"{above.tree.run_id}\0{path}".encode()).hexdigest()[:32])
    return JournaledRun(above.tree, path)


class JournaledRun:
    """The steps of one run, as its journal has them.

    Args:
        tree: The journal.
        path: Position of the run below the first.

    Attributes:
        tree: The journal.
        replies: The replies of its model.
    """

    __slots__ = ("_begun", "_path", "_pauses", "_scope", "replies", "tree")

    def __init__(self, tree: JournalOfTree, path: str) -> None:
        self.tree, self._path = tree, path
        self.replies = JournaledReplies(tree, path)
        self._begun: Counter[str] = Counter()  # runs below, by their positions
        self._scope = anyio.CancelScope()  # around that of the run
        self._pauses = 0

    def path_below(self, run: RunParty, child: RunParty) -> str:
        """Position of a run that begins below this one: the call it works for, its agent, and what that is asked.

        Of several in one call the order may be another the next time, where they are parallel; what they are asked
        is not.

        Args:
            run: This run.
            child: The one that begins.
        """
        call = _call_around(run)
        where = call.position if call is not None else str(run.iterations)
        (self.replies if call is None else call).below.append(child.budget.usage)
        name = _ODD.sub("_", child.settings.agent_name)
        part = f"{where}:{name}:{digest(child.transcript.since(0))[:8]}"
        self._begun[part] += 1
        part += f"+{self._begun[part]}" if self._begun[part] > 1 else ""
        return f"{self._path}/{part}" if self._path else part

    def take_calls(self, run: RunParty, calls: Sequence[CallParty], first: int) -> None:
        """Have calls of a reply recorded.

        Args:
            run: The run.
            calls: The calls.
            first: Index of the first of them in the reply.
        """
        for index, call in enumerate(calls, first):
            if call.bound.tool is None or not call.bound.tool.is_answer:
                call.journaled = JournaledCall(self.tree, self._path, f"{run.iterations}.{index}", call.bound)

    async def recall_calls(self, calls: Sequence[Party]) -> list[Party]:
        """Give the calls that the journal has an end of that end; returns those that are still to be made."""
        return [call for call in calls if call.journaled is None or not await call.journaled.recall(call)]

    async def conduct(self, run: RunParty, work: Callable[[], Awaitable[AgentResult]]) -> AgentResult:
        """Take a run from where its journal ends to its end; one that has ended gives its result.

        Args:
            run: The run.
            work: Takes it to its end.

        Raises:
            JournalError: The journal cannot be used, or another process is at work on the run.
        """
        with self._scope:
            async with nullcontext() if self._path else self.tree.open(run.clock.deadline):
                with anyio.CancelScope(deadline=run.clock.deadline):
                    run.result = await self._begin(run)
                self.tree.check()
                if run.result is None:
                    result = await work()
                    with anyio.CancelScope(deadline=run.clock.deadline):
                        await self._end(run, result)
        self.tree.check()
        return run.result or await work()  # which ends at once, if the run was cut before

    def cut(self) -> None:
        """Stop waiting for the journal, since the run is cancelled."""
        self._scope.cancel()

    async def _begin(self, run: RunParty) -> AgentResult | None:
        """Record the beginning, or set the recorded deadline; returns the result of a run that has ended."""
        *history, message = run.transcript.messages
        key = self._key("start", name=run.settings.agent_name)
        given = {"input": in_brief([message])[0], "messages": len(history), "sha256": digest([history, message])}
        start = self.tree.recall(key, given)
        if start is None:
            start = _clock(_left(run))
            said = {"message": to_lossless(message), "history": to_lossless(history)}
            await self.tree.record(key, given, start | said)
        end = self._key("end", name=run.settings.agent_name)
        kept = self.tree.recall(end)
        if kept is None:
            deadline = await self._deadline(key, start)
            if deadline is not None:
                run.clock.keep_deadline(deadline - time.time())
            return None
        result = self.tree.read(end, lambda: result_of(kept, run.settings.answer))
        if self._path:
            run.budget.add_usage(result.usage)
        return result

    async def _deadline(self, key: StepKey, start: Any) -> float | None:
        """The recorded deadline, in seconds since the epoch; the time of waiting for approval does not count."""
        while (pause := self.tree.recall(pause_key := self._key("pause", f"pause {self._pauses + 1}"))) is not None:
            self._pauses += 1
            key = self._key("start", f"pause {self._pauses}")
            start = self.tree.recall(key)
            if start is None:
                start = _clock(self.tree.read(pause_key, partial(_left_at, pause)))
                await self.tree.record(key, None, start)
        return self.tree.read(key, lambda: moment_of(start["deadline"]))

    async def _end(self, run: RunParty, result: AgentResult) -> None:
        self.tree.check()
        if isinstance(result.exception, ApprovalPending):
            pending = {} if self._path else {name: [*where] for name, where in self.tree.deferred.items()}
            await self.tree.record(
                self._key("pause", f"pause {self._pauses + 1}"), None, {"left": _left(run), "pending": pending}
            )
        elif result.stop_reason != "cancelled":  # which is no end of its own: the run can go on
            await self.tree.record(self._key("end", name=run.settings.agent_name), None, result_form(result))

    def _key(self, kind: StepKind, position: str = "", name: str = "") -> StepKey:
        return StepKey(self._path, position, kind, name)


def _left_at(pause: Any) -> float | None:
    return moment_of(pause["left"])


def _left(run: RunParty) -> float | None:
    """Seconds until the deadline of a run; None without one. A caller's scope goes with the process."""
    deadline = run.clock.own_deadline
    return None if deadline == math.inf else max(deadline - anyio.current_time(), 0.0)


def _clock(left: float | None) -> dict[str, Any]:
    """The moment, and the deadline that is so many seconds away, on the clock that all processes share."""
    now = time.time()
    return {"at": now, "deadline": None if left is None else now + left}


def step_here() -> str | None:
    """The run and the position of the step that the current task works for: a tool call, or else a reply."""
    run = current_run.get()
    if run is None or run.journaled is None:
        return None
    call = _call_around(run)
    key = StepKey(call.path, call.position, "started") if call is not None else run.journaled.replies.key("reply")
    return f"{run.journaled.tree.run_id}: {str(key).rpartition(' ')[0]}"


def _call_around(run: RunParty) -> JournaledCall | None:
    """The recorded call of a run that the current task works for."""
    call: Any = run.open_call()
    while call is not None and call.journaled is None:
        call = call.outer or call.above
    return call.journaled if call is not None and call.run is run else None
