"""One answer of a chat: a task on a portal's event loop that puts what happens into a queue.

A call that needs approval is a question in the same queue, put there by the approver, an async function of the run,
which then waits. So a question is read in its place between the events, only calls that the chat has to decide on are
asked about, and a run that ends takes its open questions along.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import suppress
from queue import Empty, SimpleQueue
from typing import TYPE_CHECKING, Any

import anyio
from anyio.lowlevel import current_token

from fractal import sync
from fractal._concurrency.loops import call_soon
from fractal._engine.hooks import Hook
from fractal.approval import Approval, Deny, PendingCall
from fractal.errors import RunCancelled
from fractal.events import Event
from fractal.streaming import RunStream
from fractal.sync._portal import PortalCall

if TYPE_CHECKING:
    from fractal._engine.run import Run
    from fractal.context import RunContext
    from fractal.results import AgentResult

__all__ = ["Question", "Turn"]

_LOOK_UP = 0.2
"""Seconds to wait at a stretch: Ctrl-C that comes just before a thread begins to wait does not wake it."""


class Question:
    """A call that the user has to decide on; made in the event loop of its run."""

    def __init__(self, call: PendingCall, context: RunContext[Any]) -> None:
        self.call, self.agent_name, self.depth = call, str(context.agent.name), context.depth
        self.is_open = True
        self._answer: Approval = False
        self._answered, self._token = anyio.Event(), current_token()

    async def wait(self) -> Approval:
        """Wait for the answer."""
        try:
            await self._answered.wait()
        finally:
            self.is_open = False
        return self._answer

    def answer(self, answer: Approval) -> None:
        """Give the answer, from another thread; one that comes too late is dropped."""
        self._answer = answer
        call_soon(self._token, self._answered.set)


class Turn:
    """One answer: a task in the event loop, whose events the main thread iterates.

    Args:
        stream: Makes the stream of the run, without a buffer; called with what prepares the run.
        portal: Where it runs.
        can_ask: Whether there is somebody to decide on calls that nobody else decides on.
    """

    def __init__(self, stream: Callable[..., RunStream], portal: sync.Portal, *, can_ask: bool) -> None:
        self._can_ask = can_ask
        self._stream = stream(prepare=self._answer_for)
        self._news: SimpleQueue[Event | Question | None] = SimpleQueue()
        self._call = PortalCall(self._tell_all, portal)

    def start(self) -> None:
        """Start the task; returns at once."""
        self._call.start()

    def __iter__(self) -> Iterator[Event | Question]:
        while True:
            try:
                news = self._news.get(timeout=_LOOK_UP)
            except Empty:
                continue
            if news is None:
                return
            yield news

    def cancel(self) -> None:
        """Cancel the task; returns at once."""
        self._call.cancel_from_thread()

    def wait(self) -> None:
        """Wait for the end of the task, cleanup included."""
        while not self.has_ended_within(_LOOK_UP):
            pass

    def has_ended_within(self, seconds: float) -> bool:
        """Wait a limited time for the end of the task, cleanup included; returns whether it came."""
        return self._call.wait(seconds)

    def result(self) -> AgentResult | None:
        """The result of the run, also of a cancelled one; None if it had not begun.

        Raises:
            UserError: It could not be carried out.
        """
        with suppress(RunCancelled):
            self._call.result()
        return self._stream.ended

    async def _tell_all(self) -> None:
        try:
            async with self._stream as stream:
                while events := await stream.take():
                    for event in events:
                        self._news.put(event)
        finally:
            self._news.put(None)

    def _answer_for(self, run: Run) -> None:
        run.approve = run.approve or Hook(self._approve, "approve")

    async def _approve(self, call: PendingCall, context: RunContext[Any]) -> Approval:
        if not self._can_ask:
            return Deny("there is nobody at a terminal to approve it")
        question = Question(call, context)
        self._news.put(question)
        return await question.wait()
