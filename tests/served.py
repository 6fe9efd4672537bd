"""Servers that somebody else wrote, as processes: started on a free port, waited for, and ended."""

from __future__ import annotations

import os
import socket
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from http.client import HTTPConnection, HTTPException
from typing import Any

STOP_SECONDS = 10.0
ATTEMPTS = 3  # another process may take the port between our look and its start

# Banners need UTF-8 whatever the locale is; and where no bytecode is kept, all that a server loads is compiled anew.
_OF_PYTHON = {"PYTHONIOENCODING": "utf-8", "PYTHONDONTWRITEBYTECODE": ""}


@contextmanager
def served(
    command: Callable[[int], Sequence[str]],
    path: str,
    *,
    environment: Mapping[str, str] | None = None,
    start_seconds: float = 30.0,
) -> Iterator[int]:
    """Start a server, and end it.

    Args:
        command: From a port to the program that serves there, with its arguments.
        path: Where it says that it is ready: any status but a failure.
        environment: Its environment. None: that of the tests.
        start_seconds: How long it may take to be ready.

    Yields:
        The port.
    """
    with tempfile.TemporaryFile() as log:
        process, port = _started(command, path, environment, start_seconds, log)
        try:
            yield port
        finally:
            process.terminate()
            try:
                process.wait(STOP_SECONDS)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


def _started(
    command: Callable[[int], Sequence[str]],
    path: str,
    environment: Mapping[str, str] | None,
    start_seconds: float,
    log: Any,
) -> tuple[subprocess.Popen[bytes], int]:
    for _ in range(ATTEMPTS):
        port = free_port()
        process = subprocess.Popen(
            command(port),
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            env={**(os.environ if environment is None else environment), **_OF_PYTHON},
        )
        try:
            if _is_ready(process, port, path, start_seconds):
                return process, port
        except BaseException:
            process.kill()
            process.wait()
            raise
    log.seek(0)
    raise AssertionError(f"the server did not start: {log.read().decode(errors='replace')[-4000:]}")


def _is_ready(process: subprocess.Popen[bytes], port: int, path: str, start_seconds: float) -> bool:
    """Wait for its first good answer; False if it has ended, as it does when its port is taken."""
    give_up = time.monotonic() + start_seconds
    while not answers(port, path):
        if process.poll() is not None:
            return False
        if time.monotonic() > give_up:
            process.kill()
            process.wait()
            return False
        time.sleep(0.05)
    # Somebody else may answer on a port that ours did not get.
    return process.poll() is None


def answers(port: int, path: str) -> bool:
    connection = HTTPConnection("127.0.0.1", port, timeout=10)
    try:
        connection.request("GET", path)
        return connection.getresponse().status < 500
    except (OSError, HTTPException):
        return False
    finally:
        connection.close()


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]
