"""Tool calls of a served run that wait for somebody's approval, which comes in another request."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from typing import Any, Literal

import anyio
from anyio.lowlevel import current_token

from fractal._concurrency.loops import call_soon
from fractal._json import jsonable
from fractal.approval import Allow, Approval, Deny, PendingCall
from fractal.context import RunContext
from fractal.serving.problems import Problem
from fractal.serving.wire import ApprovalPending

__all__ = ["PendingApprovals"]


class _Waiting:
    def __init__(self, shown: ApprovalPending) -> None:
        self.shown = shown
        self._answer: Approval = False
        self._answered, self._token = anyio.Event(), current_token()

    async def wait(self) -> Approval:
        await self._answered.wait()
        return self._answer

    def answer(self, answer: Approval) -> None:
        """Note the answer; a delegate may wait for it in an event loop of its own."""
        self._answer = answer
        call_soon(self._token, self._answered.set)


class PendingApprovals:
    """The calls of one run that wait for approval. A call is answered once, and no id is used twice.

    Args:
        tell: Told of each call that begins to wait.
    """

    def __init__(self, tell: Callable[[ApprovalPending], object]) -> None:
        self._tell = tell
        self._waiting: dict[str, _Waiting] = {}
        self._used: set[str] = set()

    @property
    def pending(self) -> list[ApprovalPending]:
        """The calls that wait now."""
        return [each.shown for each in self._waiting.values()]

    async def ask(self, call: PendingCall, context: RunContext[Any]) -> Approval:
        """Wait for the answer about a call: the approver of the run, bounded by the run's deadline."""
        approval_id = self._unused(call.call_id)
        waiting = self._waiting[approval_id] = _Waiting(
            {
                "kind": "approval_requested",
                "run_id": context.run_id,
                "agent_name": context.agent.name,
                "at": time.time(),
                "approval_id": approval_id,
                "call_id": call.call_id,
                "tool_name": call.tool_name,
                "description": call.description,
                "arguments": jsonable(dict(call.arguments)),
            }
        )
        try:
            self._tell(waiting.shown)
            return await waiting.wait()
        finally:
            self._waiting.pop(approval_id, None)

    def _unused(self, call_id: str) -> str:
        """An id that no call of the run has had: endpoints begin to count anew at each reply."""
        approval_id, number = call_id, 1
        while approval_id in self._used:
            number += 1
            approval_id = f"{call_id}~{number}"
        self._used.add(approval_id)
        return approval_id

    def answer(
        self,
        approval_id: str,
        decision: Literal["allow", "deny"],
        *,
        reason: str | None = None,
        arguments: Mapping[str, Any] | None = None,
    ) -> None:
        """Answer about a call that waits.

        Args:
            approval_id: Which.
            decision: Whether it is made.
            reason: Why it is not, as the model is told.
            arguments: What to call it with in place of what the model sent: all arguments.

        Raises:
            Problem: No such call waits: 404, or 409 if it has had an answer.
        """
        waiting = self._waiting.pop(approval_id, None)
        if waiting is None:
            if approval_id in self._used:
                raise Problem(409, "already_answered", "that call does not wait any more")
            raise Problem(404, "unknown_approval", "no such call waits for approval")
        if decision == "allow":
            waiting.answer(Allow(arguments))
        else:
            waiting.answer(Deny(reason) if reason else Deny())
