"""Later calls of a function that an abandoned call is still in: they wait for it, since two at once may do harm."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from fractal._concurrency.gates import Gate
from fractal._functions.callables import core_of, receiver_of

if TYPE_CHECKING:
    from collections.abc import Callable

__all__ = ["Duplicates"]


class Duplicates:
    """The gates of the functions that abandoned calls are still in; one object for a whole tree of runs."""

    __slots__ = ("_gates",)

    def __init__(self) -> None:
        self._gates: dict[tuple[int, int], Gate] = {}

    def __bool__(self) -> bool:
        return bool(self._gates)

    def gate(self, function: Callable[..., Any]) -> Gate:
        """The gate at which a function's later calls wait; an abandoned call holds its slot until it ends."""
        # A bound method is another object each time that it is looked up, and so may a partial be.
        key = id(receiver_of(function)), id(core_of(function))
        return self._gates.setdefault(key, Gate(1, "an earlier call of this tool, which could not be stopped, to end"))
