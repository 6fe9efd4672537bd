"""A tool call of a run with a journal: recalled if it has ended, settled if a process ended in it, and recorded."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

from fractal._copies import copied_arguments
from fractal._engine.journal_forms import (
    approval_form,
    approval_of,
    exception_form,
    exception_of,
    spent_form,
    spent_of,
)
from fractal._json import jsonable
from fractal._lossless import Unreadable, compact, from_lossless, is_lossless, to_lossless
from fractal._texts import is_a, repr_of
from fractal.approval import Allow, Defer, PendingCall
from fractal.errors import ApprovalPending, ToolInterrupted
from fractal.journal import StepKey
from fractal.toolkit import ToolOptions

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    from fractal._engine.journal_of_tree import JournalOfTree
    from fractal._engine.journal_parties import CallParty
    from fractal._engine.step import BoundCall
    from fractal.approval import Deny
    from fractal.journal import StepKind
    from fractal.results import ToolResult, Usage

    _Ask = Callable[[Any], Awaitable[Allow | Deny | Defer]]

__all__ = ["JournaledCall"]

_CUT_WITH_RUN = frozenset({"cancelled", "timeout", "abandoned"})


class JournaledCall:
    """One call of a reply, as the journal has it.

    Args:
        tree: The journal.
        path: Position of the run below the first.
        position: The number of the reply, and that of the call in it.
        bound: What is called.

    Attributes:
        path: As given.
        position: As given.
        below: Tells the usage of each run that has begun below the call: in its tool, or in what approves of it.
    """

    __slots__ = (
        *("_changed", "_given", "_name", "_round", "_started", "_tree", "below"),
        *("is_deferred", "is_interrupted", "path", "position"),
    )

    def __init__(self, tree: JournalOfTree, path: str, position: str, bound: BoundCall) -> None:
        self._tree, self.path, self.position = tree, path, position
        self._name = bound.name
        sent = bound.sent
        self._given = {"arguments": sent if isinstance(sent, str) else compact(jsonable(sent))}
        self._started = 0  # times that a process has begun it
        self._round = 0  # of asking; above 0 after a crash
        self._changed: Any = None  # the arguments that somebody has approved in place of those
        self.is_interrupted = False
        self.is_deferred = False
        self.below: list[Callable[[], Usage]] = []

    # ---- before it

    async def recall(self, call: CallParty) -> bool:
        """Give a call the end that the journal has of it; returns whether there is one.

        One that a process began, and did not bring to its end, is treated as its tool's `after_crash` says.
        """
        is_vain = call.bound.fault is not None and call.through is None  # now: the tool was another when it was made
        given = None if is_vain else self._given
        kept = self._tree.recall(self._key("finished"), given)
        if kept is not None:
            self._tree.read(self._key("finished"), lambda: self._end(call, kept))
            return True
        while self._tree.recall(self._key("started", self._started + 1), given) is not None:
            self._started += 1
        self.is_interrupted = self._started > 0
        if self.is_interrupted:
            return await self._settle(call, "fail" if is_vain else _after_crash(call))
        if is_vain:
            call.journaled = None
        return False

    async def _settle(self, call: CallParty, policy: str) -> bool:
        if policy == "ask":
            call.needs_approval, self._round = True, self._started + 1
        if policy != "fail":
            return False
        call.run.budget.correct("tool_calls", 1, is_recalled=True)
        call.exception = ToolInterrupted(call.bound.name)
        call.end("error", error=str(call.exception))
        await self.finish(call)
        await call.tell()
        return True

    def _end(self, call: CallParty, kept: dict[str, Any]) -> None:
        call.run.budget.correct("tool_calls", 1, is_recalled=True)
        self._spend(call, kept)
        call.tell_never()
        call.exception = exception_of(kept["exception"])
        call.end(kept["outcome"], from_lossless(kept["content"]), kept["error"])
        call.text = _text_in(kept)
        assert call.result is not None
        call.result.elapsed = kept["elapsed"]
        if kept["changed"] is not None:
            call.result.metadata["arguments"] = from_lossless(kept["changed"])

    def _spend(self, call: CallParty, kept: dict[str, Any]) -> None:
        """Take what runs below had spent when a record was made from the budget: they do not run again."""
        if (spent := spent_of(kept)) is not None:
            call.run.budget.add_usage(spent)
            self.below.append(lambda: spent)

    async def approval(self, call: CallParty, ask: _Ask) -> Allow | Deny | Defer:
        """The answer to whether a call may be made: the recorded one, or that of whoever is asked now."""
        kept = self._tree.recall(self._key("approval", self._round), self._given)
        if kept is None:
            answer = await ask(call)
            value = {**approval_form(answer), **spent_form(self.below)}
            await self._tree.record(self._key("approval", self._round), self._given, value)
        else:
            answer = self._tree.read(self._key("approval"), lambda: self._approved(call, kept))
        if isinstance(answer, Defer):
            key = replace(self._key("answer", self._round), name="")
            given = self._tree.recall(key)
            answer = answer if given is None else self._tree.read(key, lambda: approval_of(given))
        if isinstance(answer, Defer):
            self._defer(call)
        elif isinstance(answer, Allow):
            self._changed = answer.arguments
        return answer

    def _approved(self, call: CallParty, kept: dict[str, Any]) -> Allow | Deny | Defer:
        self._spend(call, kept)
        return approval_of(kept)

    def _defer(self, call: CallParty) -> None:
        """End a call that waits for an answer, and with it, after the calls beside it, the run."""
        bound, tool = call.bound, call.bound.tool
        assert tool is not None
        call_id = f"{self.path}/{bound.call_id}" if self.path else bound.call_id
        key = self._key("answer", self._round)
        self._tree.deferred[call_id] = (key.path, key.position)
        self.is_deferred = True
        pending = PendingCall(
            tool_name=bound.name,
            call_id=call_id,
            arguments=copied_arguments(bound.arguments),
            description=tool.description,
            is_interrupted=self.is_interrupted,
        )
        call.exception = ApprovalPending([pending])

    async def start(self) -> None:
        """Record that the tool begins: from now on it may have taken effect."""
        self._started += 1
        await self._tree.record(self._key("started", self._started), self._given, True)

    # ---- after it

    async def finish(self, call: CallParty) -> None:
        """Record how a call has ended, unless it was cut with its run or waits for approval: then it has no end yet.

        Raises:
            JournalError: It could not be recorded, or the journal was broken below the call.
        """
        self._tree.check()
        result = call.result
        assert result is not None
        if self.is_deferred or is_a(call.exception, ApprovalPending):
            call.run.budget.correct("tool_calls", -1)  # which is spent when it goes on
            return
        if call.is_stopped and result.outcome in _CUT_WITH_RUN:
            return
        await self._tree.record(self._key("finished"), self._given, self._form(call, result))

    def _form(self, call: CallParty, result: ToolResult) -> dict[str, Any]:
        if not is_lossless(result.content):
            call.run.emitter.warn(
                f"the result of tool {call.bound.name!r} is of a class that a journal cannot keep: after a restart it"
                " is the JSON that the model sees"
            )
        changed = self._changed is not None
        return {
            "outcome": result.outcome,
            "content": to_lossless(result.content),
            "text": call.text,
            "error": result.error,
            "exception": exception_form(call.exception),
            "elapsed": result.elapsed,
            "changed": to_lossless(dict(call.bound.arguments)) if changed else None,
            **spent_form(self.below),
        }

    def _key(self, kind: StepKind, number: int = 0) -> StepKey:
        position = f"{self.position} time {number}" if number else self.position
        return StepKey(self.path, position, kind, self._name)


def _after_crash(call: CallParty) -> str:
    """What becomes of a call that was at work when a process ended."""
    options = call.bound.tool.options if call.bound.tool is not None else ToolOptions()
    return options.after_crash or ("repeat" if options.idempotent else "fail")


def _text_in(kept: dict[str, Any]) -> str:
    """What the model was told of a call."""
    text = kept["text"]
    if not isinstance(text, str):
        raise Unreadable(f"what the model was told of a call is no text: {repr_of(text)}")
    return text
