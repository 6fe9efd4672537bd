"""What a number has to be: `bool` is an `int` for Python, and no user means it."""

from __future__ import annotations

from typing import TypeGuard

__all__ = ["is_count", "is_number"]


def is_count(value: object, least: int = 0) -> TypeGuard[int]:
    """Whether a value is a whole number, as large as the least one or larger, and no `bool`."""
    return isinstance(value, int) and not isinstance(value, bool) and value >= least


def is_number(value: object) -> TypeGuard[float]:
    """Whether a value is a number, whole or not; neither a `bool` nor NaN."""
    return isinstance(value, (int, float)) and not isinstance(value, bool) and value == value
