"""What somebody may have left behind: tasks, threads, open files and sockets."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable, Iterator

import anyio

from fractal._stuck import place_in_thread

__all__ = ["Belongings", "running_tasks"]

# Other libraries' asynchronous generators that the garbage collector has found, and closes in a task.
_FOUND_BY_GC = tuple(f"close asyncgen {library}" for library in ("openai", "httpx2", "httpcore2"))

# Threads that their makers keep for the next call, while they have nothing to do; and the portals of `fractal.sync`.
_KEPT = ("AnyIO worker thread", "Trio thread", "asyncio_", "fractal portal")

_FILES = next((path for path in ("/proc/self/fd", "/dev/fd") if os.path.isdir(path)), None)


def running_tasks() -> list[anyio.TaskInfo]:
    """The tasks of the running event loop that somebody has started and nobody has joined.

    Not among them are those of the loop itself: for a generator that another library left to the garbage collector, and
    on trio for the last word of a thread that nobody waits for.
    """
    return [task for task in anyio.get_running_tasks() if not _is_the_loops_own(task)]


def _is_the_loops_own(task: anyio.TaskInfo) -> bool:
    name = str(task.name)
    kind = type(task.coro).__name__
    return kind == "async_generator_athrow" or name.startswith(_FOUND_BY_GC) or "run_sync_soon" in name


class Belongings:
    """The threads and open files of the process as they are now, to see later what has come to them."""

    def __init__(self) -> None:
        self._threads = set(threading.enumerate())
        self._files = set(_open_files())

    def left(self) -> list[str]:
        """What is there now and was not then, a line each."""
        threads = (thread for thread in threading.enumerate() if thread not in self._threads and not _is_kept(thread))
        lines = [f"thread {thread.name!r} at {place_in_thread(thread) or 'a place unknown'}" for thread in threads]
        return lines + [f"{what} (file descriptor {number})" for number, what in set(_open_files()) - self._files]

    def left_after(self, seconds: float) -> list[str]:
        """The same, once nothing of it is ending any more, or after so many seconds."""
        return wait_until_empty(self.left, seconds)


def wait_until_empty(look: Callable[[], list[str]], seconds: float) -> list[str]:
    """Look until there is nothing, or for so many seconds; what there is in the end."""
    until = time.monotonic() + seconds
    pause = threading.Event()
    while (found := look()) and time.monotonic() < until:
        pause.wait(0.005)
    return found


def _is_kept(thread: threading.Thread) -> bool:
    return thread.daemon and thread.name.startswith(_KEPT) and place_in_thread(thread) is None


def _open_files() -> Iterator[tuple[int, str]]:
    for name in os.listdir(_FILES) if _FILES is not None else ():
        try:
            what = os.readlink(f"{_FILES}/{name}")
        except OSError:  # the one by which we look
            continue
        if not what.startswith("/proc/"):
            yield int(name), what
