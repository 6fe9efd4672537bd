"""What somebody may have left behind: tasks, threads, open files and sockets, and what nobody closed or awaited."""

from __future__ import annotations

import gc
import os
import socket
import sys
import threading
import time
import warnings
from collections.abc import Callable, Generator, Iterator
from contextlib import contextmanager, suppress
from typing import Any, cast

import anyio

from fractal._concurrency.stuck import line_in_thread
from fractal._concurrency.threads import abandoned_threads
from fractal._concurrency.workers import THREAD_NAME
from fractal.models._http.pool import CLOSING

__all__ = ["Belongings", "Complaints", "running_tasks", "wait_until_empty"]

# Other libraries' asynchronous generators that the garbage collector has found, and closes in a task.
_FOUND_BY_GC = tuple(f"close asyncgen {library}" for library in ("openai", "httpx2", "httpcore2"))

# Threads that their makers keep for the next call, while they have nothing to do; and the portals of `fractal.sync`.
_KEPT = (
    THREAD_NAME,
    "AnyIO worker thread",
    "Trio thread",
    "asyncio_",
    "uvloop_",
    "fractal portal",
    "fractal stall guard",
)

# By the first of them we look, and the others libraries open once and hold for good, as uvloop does.
_NOBODYS = ("/proc/", "/dev/null", "/dev/urandom")

_FROZEN_BY_PYTHON = gc.get_freeze_count()  # in 3.12 not 0

_FILES = next((path for path in ("/proc/self/fd", "/dev/fd") if os.path.isdir(path)), None)


def running_tasks() -> list[anyio.TaskInfo]:
    """The tasks of the running event loop that were started and not joined.

    Not among them are those of the loop itself: for what others have left to the garbage collector, a generator of
    another library or a model of the user's, and on trio for the last word of a thread that nobody waits for.
    """
    return [task for task in anyio.get_running_tasks() if not _is_the_loops_own(task)]


def _is_the_loops_own(task: anyio.TaskInfo) -> bool:
    name = str(task.name)
    kind = type(task.coro).__name__
    return kind == "async_generator_athrow" or name.startswith((*_FOUND_BY_GC, CLOSING)) or "run_sync_soon" in name


class Belongings:
    """The threads and open files of the process at one time, to find later ones."""

    def __init__(self) -> None:
        self._threads = set(threading.enumerate())
        self._files = set(_open_files())

    def left(self, *, in_loop: bool = False) -> list[str]:
        """The threads and files that have come since, a line each; threads listed as abandoned do not count.

        Args:
            in_loop: Whether an event loop goes on, which keeps its idle threads.
        """
        known = {*self._threads, *(abandoned.thread for abandoned in abandoned_threads())}
        threads = (thread for thread in threading.enumerate() if thread not in known and not _is_kept(thread, in_loop))
        lines = [f"thread {thread.name!r} at {line_in_thread(thread) or 'a place unknown'}" for thread in threads]
        files = set(_open_files()) - self._files
        return lines + [f"{_described(number, what)} (file descriptor {number})" for number, what in files]


def wait_until_empty(look: Callable[[], list[str]], seconds: float) -> list[str]:
    """Look until there is nothing, or for so many seconds; what there is in the end."""
    until = time.monotonic() + seconds
    pause = threading.Event()
    while (found := look()) and time.monotonic() < until:
        pause.wait(0.005)
    return found


def _is_kept(thread: threading.Thread, in_loop: bool) -> bool:
    return (thread.daemon or in_loop) and thread.name.startswith(_KEPT) and line_in_thread(thread) is None


def _open_files() -> Iterator[tuple[int, str]]:
    for name in os.listdir(_FILES) if _FILES is not None else ():
        try:
            what = os.readlink(f"{_FILES}/{name}")
        except OSError:  # the one by which we look
            continue
        if not what.startswith(_NOBODYS):
            yield int(name), what


class Complaints:
    """Python's warnings of objects that nobody closed or awaited, while `watched` is on."""

    def __init__(self) -> None:
        self._warnings: list[warnings.WarningMessage] = []
        self._unraisable: list[str] = []

    @contextmanager
    def watched(self) -> Generator[None]:
        """Take the warnings here, and not where they would go otherwise."""
        hook, sys.unraisablehook = sys.unraisablehook, self._note_unraisable
        is_frozen_by_others = gc.get_freeze_count() > _FROZEN_BY_PYTHON
        gc.collect()
        gc.freeze()  # what is collected after each run is then what that run has made, which is quick
        try:
            with warnings.catch_warnings(record=True) as self._warnings:
                # Python hides them by default; what the user hides by name stays hidden.
                filters: Any = warnings.filters
                filters[:] = [entry for entry in filters if not _hides_leaks(entry)]
                warnings.simplefilter("always", ResourceWarning, append=True)
                yield
        finally:
            if not is_frozen_by_others:  # there is no other way back than to unfreeze everything
                gc.unfreeze()
            sys.unraisablehook = hook

    def taken(self) -> list[str]:
        """Collect the garbage, and take the warnings since the last time."""
        gc.collect()
        said = [str(each.message) for each in self._warnings if _is_of_a_leak(each)] + self._unraisable
        self._warnings.clear()
        self._unraisable = []
        return said

    def _note_unraisable(self, unraisable: Any) -> None:
        error = unraisable.exc_value  # a warning, where warnings are errors
        self._unraisable.append(str(error) if isinstance(error, Warning) else f"{error!r} in {unraisable.object!r}")


def _hides_leaks(entry: Any) -> bool:
    action, message, category, module, _ = entry
    return action == "ignore" and category is ResourceWarning and message is None and module is None


def _is_of_a_leak(warning: warnings.WarningMessage) -> bool:
    return issubclass(warning.category, ResourceWarning) or "was never awaited" in str(warning.message)


def _described(number: int, what: str) -> str:
    """An open object in words: of a socket its addresses, unless it has been closed."""
    ends: list[str] = []
    if what.startswith("socket:"):
        with suppress(OSError), socket.socket(fileno=os.dup(number)) as copy:
            ends.append(f"at {_address(copy.getsockname())}")
            ends.append(f"to {_address(copy.getpeername())}")
    return " ".join([what, *ends])


def _address(address: object) -> str:
    parts = cast("tuple[object, ...]", address) if isinstance(address, tuple) else ()
    return f"{parts[0]}:{parts[1]}" if len(parts) > 1 else "an address of this machine"
