"""What a fork does to threads: the child has only the one that forked, and locks that the others held stay held."""

from __future__ import annotations

import os
import sys
import threading
import time
import traceback
from contextlib import suppress
from typing import TYPE_CHECKING, Any, NoReturn
from weakref import WeakSet

from anyio.lowlevel import EventLoopToken, current_token

if TYPE_CHECKING:
    from collections.abc import Callable
    from types import FrameType

__all__ = ["end_child_with_this_step", "in_child", "leave_child", "lock", "loop_of_fork", "our_threads"]

IMPORTS_TAKE = 5.0
"""Seconds that a fork waits for imports of our threads; longer than any of them takes."""

our_threads: WeakSet[threading.Thread] = WeakSet()
"""The threads that the library has started and that may import something."""

_locks: WeakSet[Any] = WeakSet()
_loop_of_fork: EventLoopToken | None = None


def loop_of_fork() -> EventLoopToken | None:
    """The event loop of the parent process in which a child was forked; None if it was forked elsewhere."""
    return _loop_of_fork


def in_child(function: Callable[[], object]) -> Callable[[], object]:
    """Register a function for each forked child, to be called before other code runs there; a decorator."""
    if hasattr(os, "register_at_fork"):  # pragma: no branch - there is no such thing on Windows
        os.register_at_fork(after_in_child=function)
    return function


def lock() -> threading.Lock:
    """A lock that is free in a forked child, whoever held it in the parent."""
    one = threading.Lock()
    _locks.add(one)
    return one


@in_child
def _free_locks() -> None:
    for one in list(_locks):
        one._at_fork_reinit()  # what the standard library calls for its own
    our_threads.clear()


def _before_fork() -> None:
    global _loop_of_fork
    _wait_for_imports()
    try:
        _loop_of_fork = current_token()
    except RuntimeError:
        _loop_of_fork = None


def _wait_for_imports() -> None:
    """Let our threads finish their imports: a child could never get the lock of a module that they hold."""
    until = time.monotonic() + IMPORTS_TAKE
    while any(map(_is_importing, _frames_of_others())) and time.monotonic() < until:
        time.sleep(0.002)


def _frames_of_others() -> list[FrameType | None]:
    # Private only by its name: the standard library documents it.
    frames = sys._current_frames()  # pyright: ignore[reportPrivateUsage]
    current = threading.get_ident()
    return [frames.get(thread.ident or 0) for thread in list(our_threads) if thread.ident != current]


def _is_importing(frame: FrameType | None) -> bool:
    while frame is not None:
        if frame.f_code.co_filename == "<frozen importlib._bootstrap>":
            return True
        frame = frame.f_back
    return False


if hasattr(os, "register_at_fork"):  # pragma: no branch - there is no such thing on Windows
    os.register_at_fork(before=_before_fork)


# ---- the end of a child


def end_child_with_this_step() -> None:
    """End a forked child that returns to its parent's event loop, from an async tool say.

    There it would go on with the run, beside its parent, on the same sockets.
    """
    token = loop_of_fork()
    if token is None:
        return
    # Without a lock of the loop's, which another thread may have held.
    loop: Any = token.native_token
    if hasattr(loop, "call_soon"):
        loop.call_soon(_refuse_child)
    else:
        sys.modules["trio"].lowlevel.add_instrument(_ChildRefusal())


class _ChildRefusal:
    def after_task_step(self, task: object) -> None:
        """End the child once the task that has forked waits for something."""
        _refuse_child()


def _refuse_child() -> NoReturn:
    with suppress(Exception):
        sys.stderr.write("a forked child ends here, since the event loop is its parent's: leave it by os._exit()\n")
    _exit(1)


def leave_child(error: BaseException | None) -> NoReturn:
    """End a forked child that returns from the plain tool that has forked: nobody waits for it there.

    Args:
        error: What the tool has raised.
    """
    status = 0 if error is None else 1
    if isinstance(error, SystemExit) and (error.code is None or isinstance(error.code, int)):
        status = error.code or 0
    elif error is not None:
        with suppress(Exception):
            words = [f"{error}\n"] if isinstance(error, SystemExit) else traceback.format_exception(error)
            sys.stderr.write("".join(words))
    _exit(status)


def _exit(status: int) -> NoReturn:
    for stream in (sys.stdout, sys.stderr):
        with suppress(Exception):
            stream.flush()
    os._exit(status)
