"""Whether the garbage collector is at work in the calling thread.

What it closes, such as a generator in the middle of a block, it closes between any two steps of any thread, whatever
that thread holds or has yet to do. There nobody may wait.
"""

from __future__ import annotations

import gc
import threading
from collections import OrderedDict
from typing import Any

__all__ = ["is_collecting"]

# The collector calls with a phase, "start" or "stop", and a dictionary of facts. It must find nothing there that is
# written in Python: Ctrl-C would be raised in it, and be lost.
_phases: OrderedDict[str, None] = OrderedDict.fromkeys(("start", "stop"))  # the one that it is in is the last
_facts: dict[str, object] = {}  # by phase
_facts_here = threading.local()  # the same, of collections in this thread

_move: Any = _phases.move_to_end
gc.callbacks += [_move, _facts.__setitem__, _facts_here.__setattr__]


def is_collecting() -> bool:
    """Whether the caller has been called by the garbage collector."""
    return next(reversed(_phases)) == "start" and getattr(_facts_here, "start", None) is _facts["start"]
