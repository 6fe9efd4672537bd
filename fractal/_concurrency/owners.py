"""Processes that are at work on runs, and whether they still live."""

from __future__ import annotations

import hashlib
import os
import platform
from dataclasses import dataclass
from functools import cache
from pathlib import Path

__all__ = ["Owner", "this_process"]


@dataclass(frozen=True, slots=True)
class Owner:
    """A process that is at work on a run.

    Attributes:
        host: The machine, since it was started, and the processes on it that know each other's ids.
        pid: Id of the process there.
        born: When that process began, as the machine counts; empty where that is not known.
    """

    host: str
    pid: int
    born: str

    @property
    def is_here(self) -> bool:
        """Whether the process is one of this machine, where others can look for it."""
        return self.host == _host()

    def is_dead(self) -> bool:
        """Whether the process is known to have ended; False where nobody here can know it."""
        if not self.is_here:
            return False
        try:
            os.kill(self.pid, 0)
        except ProcessLookupError:
            return True
        except OSError:  # somebody else's
            pass
        state, born = _stat_of(self.pid)
        return state in ("Z", "X") or bool(self.born and born and self.born != born)

    def __str__(self) -> str:
        return f"process {self.pid}" + ("" if self.is_here else " of another machine")


def this_process() -> Owner:
    """The calling process."""
    return Owner(_host(), os.getpid(), _stat_of(os.getpid())[1])


@cache
def _host() -> str:
    """A digest that stands for the machine and reveals nothing of it, since traces are passed on."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        host = f"{boot} {os.readlink('/proc/self/ns/pid')}"
    except OSError:  # not on Linux
        host = platform.node()
    return hashlib.sha256(host.encode()).hexdigest()[:16]


def _stat_of(pid: int) -> tuple[str, str]:
    """State of a process, and when it began; empty where the system does not say."""
    try:
        # The name of the program, in brackets, may have anything in it.
        fields = Path(f"/proc/{pid}/stat").read_text("utf-8", "replace").rpartition(")")[2].split()
        return fields[0], fields[19]
    except (OSError, IndexError):
        return "", ""
