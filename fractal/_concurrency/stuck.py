"""The source lines at which coroutines and threads are that do not come to their ends."""

from __future__ import annotations

import os
import sys
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import threading
    from collections.abc import Set
    from types import FrameType

__all__ = ["line_above", "line_in_thread", "line_of"]

# Whoever reads of a stuck tool looks for a line of their own, not for the one at which an event loop waits.
LIBRARIES = sys.stdlib_module_names | {"anyio", "trio", "outcome", "sniffio", "uvloop", "fractal"}

# What each kind of suspended function calls its frame and what it waits for.
_KINDS = (("cr_frame", "cr_await"), ("gi_frame", "gi_yieldfrom"), ("ag_frame", "ag_await"))


def line_of(awaited: object, outside: Set[str] = LIBRARIES) -> str | None:
    """The source line at which a suspended coroutine waits, as `file.py:12 in f`; None if no line of a user's is known.

    Args:
        awaited: The coroutine, or whatever else is awaited.
        outside: Packages whose own lines do not count.
    """
    found: FrameType | None = None
    while awaited is not None:
        frame, awaited = _suspended(awaited)
        if frame is not None and _package(frame) not in outside:
            found = frame
    return _name(found)


def line_in_thread(thread: threading.Thread) -> str | None:
    """The source line that a thread is at, as `file.py:12 in f`; None if no line of a user's is known."""
    # Private only by its name: the standard library documents it.
    return line_above(sys._current_frames().get(thread.ident or 0))  # pyright: ignore[reportPrivateUsage]


def line_above(frame: FrameType | None) -> str | None:
    """The nearest line of a user's own among a frame and its callers; None if there is none."""
    while frame is not None and _package(frame) in LIBRARIES:
        frame = frame.f_back
    return _name(frame)


def _suspended(awaited: Any) -> tuple[FrameType | None, object]:
    for frame, next_awaited in _KINDS:
        if hasattr(awaited, frame):
            return getattr(awaited, frame), getattr(awaited, next_awaited)
    return None, None


def _package(frame: FrameType) -> str:
    return str(frame.f_globals.get("__name__", "")).partition(".")[0]


def _name(frame: FrameType | None) -> str | None:
    if frame is None:
        return None
    return f"{os.path.basename(frame.f_code.co_filename)}:{frame.f_lineno} in {frame.f_code.co_name}"
