"""How long a run waits for whoever is at work on it."""

from __future__ import annotations

from fractal._checks import is_number
from fractal._texts import in_brief
from fractal.errors import InvalidArguments

__all__ = ["checked_wait"]


def checked_wait(wait: object) -> float:
    """The seconds to wait for whoever is at work on a run, checked.

    Raises:
        InvalidArguments: It is no number from 0 up.
    """
    if not is_number(wait) or wait < 0:
        raise InvalidArguments(f"wait={in_brief(wait)}: give seconds from 0 up")
    return float(wait)
