"""What the current task works for.

A context is copied for each task, timer and callback, and lives as long as they are remembered: asyncio keeps the timer
of a request for minutes after the request has ended. So what belongs to one run is named in it, but not kept by it.
"""

from __future__ import annotations

from contextvars import ContextVar, Token
from typing import TYPE_CHECKING, Generic, TypeVar
from weakref import ReferenceType, ref

if TYPE_CHECKING:
    from fractal._run import Run

__all__ = ["WeakVar", "current_call", "current_run"]

T = TypeVar("T")


class WeakVar(Generic[T]):
    """Like a `ContextVar` of something or None; None, too, once nobody else has that something any more."""

    def __init__(self, name: str) -> None:
        self._var: ContextVar[ReferenceType[T] | None] = ContextVar(name, default=None)

    def get(self) -> T | None:
        """What was set in this context, if it is still there."""
        reference = self._var.get()
        return reference() if reference is not None else None

    def set(self, value: T | None) -> Token[ReferenceType[T] | None]:
        """Set it in this context."""
        return self._var.set(ref(value) if value is not None else None)

    def reset(self, token: Token[ReferenceType[T] | None]) -> None:
        """Set it back to what it was before `set`."""
        self._var.reset(token)


current_run: WeakVar[Run] = WeakVar("fractal_run")
current_call: ContextVar[str | None] = ContextVar("fractal_call", default=None)
"""The run, and its tool call, that the current task works for."""
