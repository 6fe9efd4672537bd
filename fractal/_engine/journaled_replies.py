"""The replies of a run's model, as its journal has them, and how much of one the reader of a stream has been shown."""

from __future__ import annotations

import hashlib
from dataclasses import replace
from typing import TYPE_CHECKING, Any, NamedTuple

from fractal._engine.journal_forms import (
    digest,
    in_brief,
    position_of,
    reply_form,
    reply_of,
    spent_form,
    spent_of,
)
from fractal._lossless import Unreadable, from_lossless, to_lossless
from fractal.events import TextDelta
from fractal.journal import StepKey
from fractal.messages import Transcript

if TYPE_CHECKING:
    from collections.abc import Callable

    from fractal._engine.journal_of_tree import JournalOfTree
    from fractal._engine.journal_parties import RunParty
    from fractal.journal import StepKind
    from fractal.messages import Message
    from fractal.model import Delta, Reply
    from fractal.results import Usage

__all__ = ["JournaledReplies"]

_MODEL = "model"


class JournaledReplies:
    """The replies of one run's model.

    A request's position is the number of the turn, and that of the request in it where a hook sends several.

    Args:
        tree: The journal.
        path: Position of the run below the first.

    Attributes:
        below: Tells the usage of each run that has begun for the request that is being made: for its summary.
    """

    __slots__ = ("_asked", "_cut", "_given", "_iteration", "_path", "_seen", "_sent", "_shown", "_tree", "below")

    def __init__(self, tree: JournalOfTree, path: str) -> None:
        self._tree, self._path = tree, path
        self._iteration = self._asked = 0
        self._seen = 0  # messages that records have told of
        self._sent = 0  # tries of the request
        self._given: dict[str, Any] = {}
        self._cut = 0  # of the window, as it is recorded
        self._shown = _Shown(0, "")
        self.below: list[Callable[[], Usage]] = []

    async def recall(self, run: RunParty) -> Reply | None:
        """The recorded reply to the run's next request; None if the model is to be asked.

        Either way what the recorded tries have used is used, and the window is where it was.
        """
        self._next(run)
        self._sent = 0
        self._recall_window(run)
        while self._tree.recall(self.key("sent", try_=self._sent + 1)) is not None:
            self._sent += 1
            self._recall_window(run)
        run.budget.correct("requests", self._sent, is_recalled=True)
        kept = self._tree.recall(self.key("reply"), self._given)
        if kept is None:
            shown: Any = self._tree.recall(self.key("shown"))
            self._shown = self._tree.read(self.key("shown"), lambda: _Shown.of_form(shown))
            return None
        reply, facts = self._tree.read(self.key("reply"), lambda: (reply_of(kept["reply"]), _Facts.of_form(kept)))
        self._spend(run, reply, facts)
        if run.answer is not None:
            run.answer.take_way(facts.way)
            run.answer.accepted()
        if run.emitter.feeds and reply.text and not facts.shown:
            await run.emitter.emit_in_turn(TextDelta, text=reply.text)
        return reply

    def _next(self, run: RunParty) -> None:
        if run.iterations == self._iteration:
            self._asked += 1
        else:
            self._iteration, self._asked = run.iterations, 1
        self.below.clear()
        new = run.transcript.since(self._seen) if self._seen else []  # those it begins with are in its start
        self._seen = len(run.transcript)
        self._given = {"messages": self._seen, "new": in_brief(new), "sha256": digest(new)}

    @staticmethod
    def _spend(run: RunParty, reply: Reply, facts: _Facts) -> None:
        budget, cost = run.budget, facts.cost
        budget.correct("requests", facts.charged, is_recalled=True)
        budget.correct("tokens", reply.input_tokens + reply.output_tokens, is_recalled=True)
        if cost is not None and not budget.is_unlimited("cost"):
            budget.correct("cost", cost, is_recalled=True)
        budget.add_reply(reply, cost, is_recalled=True)

    def _recall_window(self, run: RunParty) -> None:
        kept = self._tree.recall(self.key("window", try_=self._sent + 1))
        if kept is not None and run.window is not None:
            key = self.key("window", try_=self._sent + 1)
            self._cut, summary, spent = self._tree.read(key, lambda: _window_of(kept, len(run.transcript)))
            run.window.restore(self._cut, summary)
            if spent is not None:
                run.budget.add_usage(spent)

    async def window(self, run: RunParty) -> None:
        """Record what the window leaves out, and what stands for that."""
        assert run.window is not None
        cut, summary = run.window.state
        if cut != self._cut:
            self._cut = cut
            value = {"cut": cut, "summary": to_lossless(summary), **spent_form(self.below)}
            self.below.clear()
            await self._tree.record(self.key("window", try_=self._sent + 1), None, value)

    async def sent(self) -> None:
        """Record that the request is sent, which spends it."""
        self._sent += 1
        await self._tree.mark(self.key("sent", try_=self._sent), True)

    async def record(self, run: RunParty, reply: Reply, cost: int | None, charged: int) -> None:
        """Record a reply.

        Args:
            run: The run.
            reply: Its model's reply.
            cost: What it cost, as ledgers count money; None if nobody knows.
            charged: Requests that the model has sent for it besides the first.
        """
        value = {
            "reply": reply_form(reply),
            "cost": cost,
            "charged": charged,
            "shown": bool(run.emitter.feeds),
            "way": run.answer.way if run.answer is not None else None,
        }
        await self._tree.record(self.key("reply"), self._given, value)
        if run.emitter.feeds and (late := self._shown.held_back()):
            await run.emitter.emit_in_turn(TextDelta, text=late)

    async def shown(self, run: RunParty, delta: Delta) -> Delta | None:
        """The part of a piece to show, recorded before it is shown; None if the reader has seen it."""
        if delta.kind != "text":
            return delta
        text = self._shown.rest_of(delta.text)
        if self._shown.is_another:
            self._shown.is_another = False
            said = "after a restart the model wrote another text than had been shown of it"
            run.emitter.warn(f"{said}: shown from its start")
        if not text:
            return None
        await self._tree.mark(self.key("shown"), self._shown.add(text))
        return delta if text == delta.text else replace(delta, text=text)

    def key(self, kind: StepKind, try_: int = 0) -> StepKey:
        """The key of a record of the request that is being answered."""
        position = str(self._iteration) + (f"+{self._asked}" if self._asked > 1 else "")
        return StepKey(self._path, f"{position} try {try_}" if try_ else position, kind, _MODEL)


class _Facts(NamedTuple):
    """What is recorded of a reply besides itself."""

    cost: int | None
    charged: int
    shown: bool
    way: Any

    @classmethod
    def of_form(cls, form: Any) -> _Facts:
        """The facts of a record's value."""
        cost = None if form["cost"] is None else position_of(form["cost"])
        return cls(cost, position_of(form["charged"]), bool(form["shown"]), form["way"])


def _window_of(form: Any, length: int) -> tuple[int, Message | None, Usage | None]:
    """The number of messages left out, the summary in their place, and the usage of writing it."""
    cut, summary = position_of(form["cut"]), from_lossless(form["summary"])
    if cut > length or (summary is not None and not Transcript([summary]).messages):
        raise Unreadable("a stored window is of another conversation")
    return cut, summary, spent_of(form)


class _Shown:
    """The text of a reply that a reader has been shown, in this process and before.

    Args:
        characters: How many characters of it were shown by a process that has ended.
        sha256: Digest of these.

    Attributes:
        is_another: Whether the text has turned out to be another one than that.
    """

    def __init__(self, characters: int, sha256: str) -> None:
        self._before, self._sha256 = characters, sha256
        self._held = ""  # back, until it is known to be the text that was shown
        self._digest, self._count = hashlib.sha256(), 0
        self.is_another = False

    @classmethod
    def of_form(cls, form: Any) -> _Shown:
        """The shown text that a record's value tells of; none without a record."""
        return cls(position_of(form["characters"]), str(form["sha256"])) if form is not None else cls(0, "")

    def rest_of(self, piece: str) -> str:
        """The part of the next piece, and of those held back, that has not been shown."""
        if not self._before:
            return piece
        self._held += piece
        if len(self._held) < self._before:
            return ""
        held, shown = self._held, self._held[: self._before]
        self._held, characters, self._before = "", self._before, 0
        if hashlib.sha256(_bytes(shown)).hexdigest() != self._sha256:
            self.is_another = True
            return held
        self.add(shown)
        return held[characters:]

    def add(self, text: str) -> dict[str, Any]:
        """Note text that is shown now; returns the record of all that was."""
        self._digest.update(_bytes(text))
        self._count += len(text)
        return {"characters": self._count, "sha256": self._digest.hexdigest()}

    def held_back(self) -> str:
        """The text held back so far, of a reply that ended before it was as long as the one shown."""
        held, self._held, self._before = self._held, "", 0
        return held


def _bytes(text: str) -> bytes:
    return text.encode("utf-8", "surrogatepass")
