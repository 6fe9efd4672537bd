"""What the current task works for.

A context is copied for each task, timer and callback, and lives as long as they are remembered: asyncio keeps the timer
of a request for minutes after the request has ended. So what belongs to one run is named in it, but not kept by it.
"""

from __future__ import annotations

from contextvars import ContextVar, Token
from typing import Any, Generic, TypeVar
from weakref import ReferenceType, ref

from fractal._concurrency.forks import in_child

__all__ = ["WeakVar", "current_call", "current_run"]

T = TypeVar("T")


_Named = tuple[ReferenceType[T], object]
"""A thing, and the process it is in."""

_process = object()  # which costs nothing to ask for, as the number of a process does


@in_child
def _note_process() -> None:
    global _process
    _process = object()


class WeakVar(Generic[T]):
    """A `ContextVar` that refers weakly: it reads None once the object is gone.

    It is None in a forked child as well: runs, and the threads of their tools, stay in the parent.
    """

    def __init__(self, name: str) -> None:
        self._var: ContextVar[_Named[T] | None] = ContextVar(name, default=None)

    def get(self) -> T | None:
        """The object set in this context, if it still exists."""
        named = self._var.get()
        return named[0]() if named is not None and named[1] is _process else None

    @property
    def is_in_parent(self) -> bool:
        """Whether this context was set, before a fork, to an object of the parent process."""
        named = self._var.get()
        return named is not None and named[1] is not _process

    def set(self, value: T | None) -> Token[_Named[T] | None]:
        """Set an object in this context."""
        return self._var.set((ref(value), _process) if value is not None else None)

    def reset(self, token: Token[_Named[T] | None]) -> None:
        """Restore the value from before `set`."""
        self._var.reset(token)


current_run: WeakVar[Any] = WeakVar("fractal_run")
"""The run that the current task works for; what is asked of it, its class says, which is made above this module."""
current_call: ContextVar[str | None] = ContextVar("fractal_call", default=None)
"""The key of that run's tool call that the current task works for."""
