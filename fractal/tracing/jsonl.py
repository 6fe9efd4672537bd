"""Files of lines, written by a thread: whoever has a line to write never waits for a disk.

Lines are appended whole, each batch of them with one call, so that several processes may write to one file and a crash
leaves at most the last line cut. The thread ends when there is nothing to write, and starts anew.
"""

from __future__ import annotations

import atexit
import os
import select
import stat
import sys
import threading
import time
from collections.abc import Iterable
from contextlib import suppress
from typing import TYPE_CHECKING

import anyio
from anyio.lowlevel import current_token

from fractal._concurrency.forks import in_child
from fractal._concurrency.loops import call_soon
from fractal._log import log

if TYPE_CHECKING:
    from anyio.lowlevel import EventLoopToken

__all__ = ["LineWriter", "writer"]

_PAUSE = 0.01
"""Seconds between two batches, so that a busy program writes many lines with one call."""

_LINGER = 0.1
"""Seconds that the thread stays without a line."""

MOST_WAITING = 64 * 2**20
"""Bytes that may wait for a disk that does not write; further lines are dropped, and that is said."""

_MOST_FILES = 32
"""Files that are kept open."""

_FRESH = 1.0
"""Seconds that they are; somebody may have moved or removed them meanwhile, to begin a new one."""

_FLUSH_AT_EXIT = 2.0
"""Seconds that the end of the program waits for the disk."""

MOMENT = 0.001
"""Seconds that an event loop may wait for a disk that has been quick so far."""

_PATIENCE = 0.5
"""Seconds after which a disk that has not written counts as stuck."""


class _Bell:
    """A bell that wakes one thread. An Event of `threading` would do; it takes ten times as long, twice in each run."""

    __slots__ = ("_silence",)

    def __init__(self) -> None:
        self._silence = threading.Lock()
        self._silence.acquire()

    def ring(self) -> None:
        """Wake the thread, or let it not fall asleep; to ring twice is to ring once."""
        with suppress(RuntimeError):
            self._silence.release()

    def wait(self, seconds: float) -> bool:
        """Sleep until the bell rings, for so long at most; returns whether it did."""
        return self._silence.acquire(timeout=seconds)


if sys.platform == "linux":

    class _QuietBell(_Bell):
        """A bell that whoever rings it rings without Python's global lock.

        A thread that a lock wakes finds the global lock taken and sleeps again, so it is woken twice.
        """

        __slots__ = ("_descriptor", "_poll")

        def __init__(self) -> None:
            self._descriptor = os.eventfd(0)
            self._poll = select.poll()
            self._poll.register(self._descriptor, select.POLLIN)

        def ring(self) -> None:
            os.eventfd_write(self._descriptor, 1)

        def wait(self, seconds: float) -> bool:
            if not self._poll.poll(seconds * 1000):
                return False
            os.eventfd_read(self._descriptor)
            return True

        def __del__(self) -> None:
            with suppress(AttributeError):  # there was none left
                os.close(self._descriptor)


def _bell_of_thread() -> _Bell:
    """The bell that takes the least time here."""
    if sys.platform == "linux":
        with suppress(OSError):  # no descriptor is left
            return _QuietBell()
    return _Bell()


class LineWriter:
    """Appends lines to files.

    Attributes:
        dropped: Lines that were not written, since the disk did not take them.
    """

    def __init__(self) -> None:
        self._begin()

    def _begin(self) -> None:
        self._lock = threading.Lock()
        self._lines: dict[str, list[bytes]] = {}  # of each file
        self._waiting = self._taken = self._done = self.dropped = 0
        self._bell: _Bell | None = None  # of the thread, while there is one
        self._waiters: dict[EventLoopToken, anyio.Event] = {}  # of each event loop where somebody waits
        self._sleepers: list[_Bell] = []  # of the threads that do
        self._is_idle = False  # whether the thread had nothing to write when it last looked
        self._is_slow = False  # whether the last batch took, or takes, longer than a moment
        self._stuck_at = -1  # lines that were written when nobody waited any longer for more
        self._files: dict[str, int] = {}
        self._troubled: set[str] = set()

    def begin_anew(self) -> None:
        """Reset the writer in a forked process, which has no thread: waiting lines are the parent's."""
        _close_all(self._files.values())
        self._begin()

    def write(self, path: str, line: bytes) -> None:
        """Append a line to a file; returns at once.

        Args:
            path: The file; it is made, and its folder too, if need be.
            line: The line, without its end.
        """
        with self._lock:
            if self._waiting > MOST_WAITING:
                self._drop(1)
                return
            if (lines := self._lines.get(path)) is None:
                lines = self._lines[path] = []
            lines.append(line)
            self._waiting += len(line)
            self._taken += 1
            if self._bell is None:
                self._bell = self._start()
            elif self._is_idle:
                self._is_idle = False
                self._bell.ring()

    async def settle(self) -> None:
        """Wait until all lines so far are written, without blocking the event loop.

        For a disk that somebody has waited for in vain nobody else waits until it writes again.
        """
        with self._lock:
            if self._done >= self._taken or self._done == self._stuck_at:
                return
            event, bell = self._waiters.setdefault(current_token(), anyio.Event()), self._bell
        if bell is not None:
            bell.ring()
        began = time.monotonic()
        try:
            await event.wait()
        except BaseException:
            if time.monotonic() - began > _PATIENCE:
                self._stuck_at = self._done
            raise

    def flush(self, timeout: float = _FLUSH_AT_EXIT) -> bool:
        """Wait, blocking, until all lines so far are written.

        Args:
            timeout: Seconds to wait.

        Returns:
            Whether they are.
        """
        until, done = time.monotonic() + timeout, _Bell()
        with self._lock:
            count = self._taken
            if self._done >= count:
                return True
            self._sleepers.append(done)
            bell = self._bell
        if bell is not None:  # without the lock, which the thread takes at once
            bell.ring()
        while self._done < count and (left := until - time.monotonic()) > 0:
            done.wait(left)
        return self._done >= count

    def catch_up(self) -> bool:
        """Wait a moment, blocking, until all lines so far are written.

        A disk that works takes a tenth of that. To have the event loop woken by the thread instead takes thrice the
        work, so only a disk that has been slow is waited for in that way, by `settle`.

        Returns:
            Whether they are.
        """
        if self._is_slow:
            return self._done >= self._taken
        self._is_slow = not self.flush(MOMENT)
        return not self._is_slow

    def _start(self) -> _Bell:
        bell = _bell_of_thread()
        threading.Thread(target=self._work, args=(bell,), name="fractal trace writer", daemon=True).start()
        return bell  # before the thread asks for it: it waits for our lock

    def _drop(self, count: int) -> None:
        if not self.dropped:
            log.warning("the trace is not whole: the disk does not keep up, or does not take what is written")
        self.dropped += count

    def _work(self, bell: _Bell) -> None:
        opened = time.monotonic()
        while True:
            batch, count, waiters, sleepers = self._take()
            if time.monotonic() - opened > _FRESH:
                files, self._files = self._files, {}
                _close_all(files.values())
                opened = time.monotonic()
            began = time.monotonic()
            for path, lines in batch.items():
                self._append(path, lines)
            self._is_slow = time.monotonic() - began > MOMENT
            self._done = count
            for sleeper in sleepers:
                sleeper.ring()
            _wake(waiters)
            if batch:
                bell.wait(_PAUSE)
            elif not bell.wait(_LINGER) and self._may_end():
                return

    def _take(self) -> tuple[dict[str, list[bytes]], int, dict[EventLoopToken, anyio.Event], list[_Bell]]:
        """The lines to be written now, how many there have been then, and the event loops and threads that wait."""
        with self._lock:
            taken = self._lines, self._taken, self._waiters, self._sleepers
            self._lines, self._waiters, self._sleepers, self._waiting = {}, {}, [], 0
            self._is_idle = not taken[0]
        return taken

    def _may_end(self) -> bool:
        with self._lock:
            if self._lines or self._waiters or self._sleepers:
                return False
            self._bell = None
            files, self._files = self._files, {}
        _close_all(files.values())
        return True

    def _append(self, path: str, lines: list[bytes]) -> None:
        try:
            descriptor = self._files.get(path)
            if descriptor is None:
                descriptor = self._open(path)
            data = b"\n".join([*lines, b""])
            written = os.write(descriptor, data)
            while written < len(data):
                written += os.write(descriptor, data[written:])
            self._troubled.discard(path)
        except Exception as error:
            self._drop(len(lines))
            self._close(path)
            if path not in self._troubled:
                self._troubled.add(path)
                log.warning(f"the trace file {path} cannot be written: {error}")

    def _open(self, path: str) -> int:
        if len(self._files) >= _MOST_FILES:
            self._close(next(iter(self._files)))
        os.makedirs(os.path.dirname(path) or ".", exist_ok=True)
        flags = os.O_WRONLY | os.O_APPEND | os.O_CREAT | getattr(os, "O_CLOEXEC", 0)
        descriptor = self._files[path] = os.open(path, flags, 0o600)
        if _ends_within_a_line(path, descriptor):
            os.write(descriptor, b"\n")
        return descriptor

    def _close(self, path: str) -> None:
        descriptor = self._files.pop(path, None)
        if descriptor is not None:
            _close_all([descriptor])


def _close_all(descriptors: Iterable[int]) -> None:
    for descriptor in descriptors:
        with suppress(OSError):
            os.close(descriptor)


def _wake(waiters: dict[EventLoopToken, anyio.Event]) -> None:
    for token, event in waiters.items():
        call_soon(token, event.set)  # where its event loop has ended, nobody waits


def _ends_within_a_line(path: str, descriptor: int) -> bool:
    """Whether a crash has left half a line at the end of a file, which the next one would be glued to."""
    status = os.fstat(descriptor)
    if not stat.S_ISREG(status.st_mode) or not status.st_size:
        return False
    with open(path, "rb") as file:
        file.seek(-1, os.SEEK_END)
        return file.read() != b"\n"


writer = LineWriter()
"""The one of the process."""

atexit.register(writer.flush)
in_child(writer.begin_anew)
