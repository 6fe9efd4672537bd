"""Calls that could not be stopped, and later calls of the same function, which wait for them."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from fractal._concurrency.gates import Gate
from fractal._functions.callables import core_of, receiver_of

if TYPE_CHECKING:
    from collections.abc import Callable

__all__ = ["Twins"]


class Twins:
    """The functions of a tree of runs of which a call goes on though nobody waits for it."""

    __slots__ = ("_gates",)

    def __init__(self) -> None:
        self._gates: dict[tuple[int, int], Gate] = {}

    def __bool__(self) -> bool:
        return bool(self._gates)

    def gate(self, function: Callable[..., Any]) -> Gate:
        """Where a function's calls wait: each that could not be stopped holds a place until it ends."""
        # A bound method is another object each time that it is looked up, and so may a partial be.
        key = id(receiver_of(function)), id(core_of(function))
        return self._gates.setdefault(key, Gate(1, "an earlier call of this tool, which could not be stopped, to end"))
