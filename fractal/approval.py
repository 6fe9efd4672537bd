"""Tool calls before they are made, and the word of somebody who has to approve of one."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

__all__ = ["Allow", "Approval", "Approver", "Defer", "Deny", "PendingCall"]


@dataclass(frozen=True, slots=True, kw_only=True)
class PendingCall:
    """A tool call that has not been made yet: it waits for approval, or for a hook around it to go on.

    Attributes:
        tool_name: The tool.
        call_id: Id of the call, as in the transcript and the events; in a result's `pending`, a delegate's call has
            the delegate's position before it.
        arguments: What it will be called with: checked, as the function's own types, by name. A copy.
        description: What the model is told the tool does.
        is_interrupted: Whether a process ended while the call was at work: it may have taken effect already.
    """

    tool_name: str
    call_id: str
    arguments: Mapping[str, Any]
    description: str
    is_interrupted: bool = False

    def with_arguments(self, /, **changes: Any) -> PendingCall:
        """A copy of the call with some of its arguments changed.

        Args:
            **changes: The new values, by name.

        Example:
            >>> call = PendingCall(tool_name="find", call_id="1", arguments={"n": 50, "city": "Rome"}, description="")
            >>> call.with_arguments(n=5).arguments
            {'n': 5, 'city': 'Rome'}
        """
        return replace(self, arguments={**self.arguments, **changes})


@dataclass(frozen=True, slots=True)
class Allow:
    """Make the call.

    Args:
        arguments: What to call it with in place of what the model sent: all arguments. What was shown and is handed
            back unchanged is taken as it is, the rest is checked as the model's are. None: as they are.
    """

    arguments: Mapping[str, Any] | None = None


@dataclass(frozen=True, slots=True)
class Deny:
    """Do not make the call.

    Args:
        reason: What the model is told; it may then try something else.
    """

    reason: str = "not approved"


@dataclass(frozen=True, slots=True)
class Defer:
    """Answer later: a durable run ends with the stop reason `"approval"`, and goes on when `agent.resume` answers."""


Approval = Allow | Deny | Defer | bool
"""An answer; True is `Allow()`, False is `Deny()`."""

Approver = Callable[..., Approval | Awaitable[Approval]]
"""Answers for pending calls: plain or async, called with a `PendingCall`, and with the run's `RunContext` if it has a
second parameter. A plain one runs in a worker thread, so it may ask a human and wait."""
