"""Files that the command line writes and reads: no other file is touched, nothing becomes more open, nothing is lost.

A link is never followed where something is written: it may lead to another's file. Nor is anything replaced or written
to that is no regular file.
"""

from __future__ import annotations

import errno
import os
import secrets
import stat
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path
from typing import TextIO

__all__ = ["LONGEST_FILE", "append_to", "check_writable", "create", "read_bounded", "replace"]

_PRIVATE = 0o600
# Not every system has each: follow no link, do not wait for a reader of a pipe, take bytes as they are.
_FLAGS: int = sum(getattr(os, name, 0) for name in ("O_NOFOLLOW", "O_NONBLOCK", "O_CLOEXEC", "O_BINARY"))

LONGEST_FILE = 64 * 2**20
"""Bytes of a file that is read as a whole."""


def check_writable(path: str) -> None:
    """Check that a file may be written or replaced, before it is needed.

    Raises:
        OSError: It may not: it is a link or no regular file, or there is no such directory.
    """
    target = Path(path).expanduser()
    if not target.absolute().parent.is_dir():
        raise FileNotFoundError(errno.ENOENT, "there is no such directory", path)
    _regular(target)


def replace(path: str, text: str | Iterable[str]) -> None:
    """Write a whole file in one step: it is the new one or, if it cannot be written, the old one.

    It keeps its mode and its owner; a new one is for its owner alone.

    Args:
        path: The file.
        text: What is to be in it, or its pieces, as they come.

    Raises:
        OSError: It cannot be written; what is there is as it was.
    """
    target = Path(path).expanduser()
    before = _regular(target)
    draft = target.with_name(f".fractal.{secrets.token_hex(12)}")
    descriptor = _open(draft, os.O_CREAT | os.O_EXCL)
    try:
        with _as_text(descriptor) as file:
            file.writelines([text] if isinstance(text, str) else text)
            file.flush()
            _take_over(descriptor, before)
            os.fsync(descriptor)
        _regular(target)  # since the last look somebody may have put something else there
        draft.replace(target)
    except BaseException:
        draft.unlink(missing_ok=True)
        raise


def create(path: str) -> TextIO:
    """Create a new file that only its owner can read.

    Raises:
        FileExistsError: It is there.
        OSError: It cannot be written.
    """
    return _as_text(_open(Path(path).expanduser(), os.O_CREAT | os.O_EXCL))


def append_to(path: str) -> TextIO:
    """Open a file to append whole lines; made if it is missing.

    Raises:
        OSError: It cannot be written, or is no regular file.
    """
    target = Path(path).expanduser()
    _regular(target)
    descriptor = _open(target, os.O_CREAT | os.O_APPEND)
    try:
        file = _as_text(descriptor)
        if _is_cut(descriptor):
            file.write("\n")  # whoever wrote the last line was interrupted
    except BaseException:
        os.close(descriptor)
        raise
    return file


def read_bounded(path: str) -> bytes:
    """Read a whole file.

    Raises:
        OSError: It cannot be read.
        ValueError: It is longer than anybody can mean.
    """
    with Path(path).expanduser().open("rb") as file:
        data = file.read(LONGEST_FILE + 1)
    if len(data) > LONGEST_FILE:
        raise ValueError(f"it has more than {LONGEST_FILE >> 20} MiB")
    return data


def _open(path: Path, flags: int) -> int:
    descriptor = os.open(path, os.O_RDWR | flags | _FLAGS, _PRIVATE)
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise OSError(errno.EINVAL, "it is no regular file", str(path))
    return descriptor


def _as_text(descriptor: int) -> TextIO:
    return open(descriptor, "w", encoding="utf-8", newline="\n")


def _regular(path: Path) -> os.stat_result | None:
    """The status of a regular file; None if there is no file.

    Raises:
        OSError: It is something else.
    """
    try:
        facts = path.lstat()
    except FileNotFoundError:
        return None
    if stat.S_ISLNK(facts.st_mode):
        raise OSError(errno.ELOOP, "it is a link: name the file that it leads to", str(path))
    if stat.S_ISDIR(facts.st_mode):
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(path))
    if not stat.S_ISREG(facts.st_mode):
        raise OSError(errno.EINVAL, "it is no regular file", str(path))
    return facts


def _take_over(descriptor: int, before: os.stat_result | None) -> None:
    """Give a new file the owner and the mode of the one that it replaces, or less."""
    if before is None or not hasattr(os, "fchmod"):  # Windows has neither
        return
    now, mode = os.fstat(descriptor), stat.S_IMODE(before.st_mode) & 0o777
    if (now.st_uid, now.st_gid) != (before.st_uid, before.st_gid):
        with suppress(OSError):
            os.fchown(descriptor, before.st_uid, before.st_gid)
        now = os.fstat(descriptor)
    if (now.st_uid, now.st_gid) != (before.st_uid, before.st_gid):
        mode &= 0o700  # another group must not get what was open to the former one
    os.fchmod(descriptor, mode)


def _is_cut(descriptor: int) -> bool:
    """Whether the last line of a file has no end."""
    size = os.fstat(descriptor).st_size
    if not size:
        return False
    os.lseek(descriptor, size - 1, os.SEEK_SET)
    return os.read(descriptor, 1) != b"\n"
