"""Forked children of a test, which never go on with the tests themselves."""

from __future__ import annotations

import faulthandler
import os
import signal
import traceback
import warnings
from collections.abc import Callable

HANGS = 15
"""Seconds after which a child hangs."""


def fork() -> int:
    """Fork; the id of the child, or 0 in the child. That one ends when it hangs, and says where."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # Python warns of forks beside threads
        child = os.fork()
    if child == 0:
        signal.signal(signal.SIGALRM, signal.SIG_DFL)
        faulthandler.register(signal.SIGALRM, file=2, chain=True)
        signal.alarm(HANGS)
    return child


def end_of(child: int) -> int:
    """The exit status of a child, or a signal's number, negative; waits for it."""
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def forked(work: Callable[[], object]) -> int:
    """The exit status of a child that does some work: 0 if that came to something."""
    child = fork()
    if child == 0:
        status = 1
        try:
            status = 0 if work() else 2
        except BaseException:
            os.write(2, traceback.format_exc().encode())
        finally:
            os._exit(status)
    return end_of(child)
