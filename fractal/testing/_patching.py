"""Functions of other libraries, replaced for as long as somebody needs that, and then given back."""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable
from types import TracebackType
from typing import Any, Self, cast

__all__ = ["Patch"]


class Patch:
    """A function in the place of another one, from the first block that is entered to the end of the last.

    Args:
        owner: The class or module that has the function.
        name: The function's name there.
        replacement: Called in its place: with the function, and then with what the function is called with.
    """

    def __init__(self, owner: Any, name: str, replacement: Callable[..., Any]) -> None:
        self._owner, self._name, self._replacement = owner, name, replacement
        self._lock = threading.Lock()
        self._blocks = 0
        self._original: Any = None
        self._ours: Any = None

    def __enter__(self) -> Self:
        with self._lock:
            # Of an earlier block ours may have been left in the hands of somebody else, who has given it back or not.
            if not self._blocks and (self._ours is None or self._own() is not self._ours):
                self._put()
            self._blocks += 1
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        with self._lock:
            self._blocks -= 1
            # Somebody else may have put theirs in the place of ours meanwhile, and be about to put ours back.
            if not self._blocks and self._own() is self._ours:
                self._give_back()

    def _own(self) -> Any:
        """The attribute of the owner itself, not of a class above."""
        return cast("dict[str, Any]", vars(self._owner)).get(self._name)

    def _put(self) -> None:
        original: Callable[..., Any] = getattr(self._owner, self._name)
        replacement = self._replacement

        @functools.wraps(original)
        def ours(*arguments: Any, **named: Any) -> Any:
            return replacement(original, *arguments, **named)

        self._original = self._own()
        self._ours = ours
        setattr(self._owner, self._name, ours)

    def _give_back(self) -> None:
        if self._original is None:  # the owner has it from a class above
            delattr(self._owner, self._name)
        else:
            setattr(self._owner, self._name, self._original)
        self._original = self._ours = None
