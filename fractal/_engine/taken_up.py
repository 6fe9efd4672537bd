"""Durable runs that are taken up again: what they began with, and the answers to the calls that they wait for."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from fractal._engine.journal_forms import approval_form
from fractal._engine.journal_of_tree import Durable, JournalOfTree
from fractal._json import is_mapping
from fractal._lossless import from_lossless
from fractal._texts import in_brief, is_a, kind_of
from fractal.approval import Allow, Deny
from fractal.errors import InvalidArguments, NotPending, RunUnknown
from fractal.journal import Journal, StepKey
from fractal.messages import Transcript

if TYPE_CHECKING:
    from fractal.messages import Message

__all__ = ["checked_answers", "checked_durable", "last_pause", "taken_up"]

_LONGEST_ID = 200


def checked_durable(journal: Any, run_id: Any) -> Durable | None:
    """The journal and the id that a run is given, checked; None without any.

    Raises:
        InvalidArguments: One of them is missing, or cannot be what was meant.
    """
    if journal is None and run_id is None:
        return None
    if journal is None or run_id is None:
        raise InvalidArguments(
            "a durable run needs both: journal=, which keeps it, and run_id=, by which the same call finds it again"
        )
    if isinstance(journal, type) or not is_a(journal, Journal):
        raise InvalidArguments(f"journal={in_brief(journal)}: give a journal, such as SQLiteJournal(path)")
    if not isinstance(run_id, str) or not 0 < len(run_id) <= _LONGEST_ID or not run_id.isprintable():
        raise InvalidArguments(f"run_id={in_brief(run_id)}: give text of 1 to {_LONGEST_ID} printable characters")
    return Durable(journal, str(run_id))


def checked_answers(answers: Any) -> dict[str, Allow | Deny]:
    """The answers to calls, checked, by the ids of the calls.

    Raises:
        InvalidArguments: They cannot be what was meant.
    """
    if answers is not None and not is_mapping(answers):
        raise InvalidArguments(f"answers={in_brief(answers)}: give a dict of call ids to Allow(…) or Deny(…)")
    given: Mapping[str, Any] = answers or {}
    checked: dict[str, Allow | Deny] = {}
    for call_id, answer in given.items():
        answer = (Allow() if answer else Deny()) if isinstance(answer, bool) else answer
        if kind_of(answer) not in (Allow, Deny):
            raise InvalidArguments(
                f"the answer to {call_id!r} is {in_brief(answer)}: give Allow(…), Deny(…), True or False"
            )
        checked[call_id] = answer
    return checked


def last_pause(durable: Durable) -> int:
    """How many times a run has ended to wait for answers; its journal is open."""
    tree, number = JournalOfTree(durable), 0
    while tree.recall(_pause(number + 1)) is not None:
        number += 1
    return number


async def taken_up(
    durable: Durable, answers: Mapping[str, Allow | Deny], pause: int | None = None
) -> tuple[list[Message], Message]:
    """Record the answers to calls of a run that waits for them.

    Args:
        durable: Where the run is recorded; its journal is open.
        answers: The answers, by the ids of the calls.
        pause: Which of the run's pauses they belong to, from 1, where a process before this one may have recorded them
            already, some or all. None: the last one, and they are new.

    Returns:
        The history with which the run began, and its input.

    Raises:
        RunUnknown: There is no such run.
        NotPending: A call does not wait for an answer; nothing is recorded.
        JournalError: The journal cannot be used.
    """
    tree = JournalOfTree(durable)
    key = StepKey("", "", "start")
    start = tree.recall(key)
    if start is None:
        raise RunUnknown(durable.run_id)
    asked = _asked(tree, last_pause(durable) if pause is None else pause)
    pending = [call_id for call_id, key in asked.items() if tree.recall(key) is None]
    for call_id in answers:
        if call_id not in (pending if pause is None else asked):
            raise NotPending(durable.run_id, call_id, pending)
    for call_id in pending:
        if call_id in answers:
            await tree.record(asked[call_id], None, approval_form(answers[call_id]))
    return tree.read(key, lambda: _messages_of(start))


def _messages_of(start: Any) -> tuple[list[Message], Message]:
    *history, message = Transcript([*from_lossless(start["history"]), from_lossless(start["message"])]).messages
    return history, message


def _pause(number: int) -> StepKey:
    return StepKey("", f"pause {number}", "pause")


def _asked(tree: JournalOfTree, pause: int) -> dict[str, StepKey]:
    """The keys of the answers that a pause is for, by the ids of the calls; none for a run without a pause."""
    kept = tree.recall(_pause(pause)) if pause else None
    return {} if kept is None else tree.read(_pause(pause), lambda: _answer_keys(kept))


def _answer_keys(pause: Any) -> dict[str, StepKey]:
    return {call_id: StepKey(path, position, "answer") for call_id, (path, position) in pause["pending"].items()}
