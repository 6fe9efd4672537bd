"""Stores of conversations to test with: a file, and a PostgreSQL server of the tests' own."""

from __future__ import annotations

import os
import shutil
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

PLACES = ("/usr/local/bin", *map(str, sorted(Path("/usr/lib/postgresql").glob("*/bin"), reverse=True)))


def missing() -> str | None:
    """Why there is no server; None if there can be one."""
    try:
        import psycopg  # noqa: F401
    except ImportError:
        return "psycopg is not installed"
    if shutil.which("initdb", path=":".join((*PLACES, os.environ.get("PATH", "")))) is None:
        return "there is no PostgreSQL server on this machine"
    return None


@contextmanager
def postgres() -> Iterator[str]:
    """A server that only this process can reach, by a socket in a directory of its own; gives what to connect to."""
    with _server("-c listen_addresses=") as (folder, _):
        yield f"postgresql:///postgres?host={folder}&user=fractal"


@contextmanager
def restarting_postgres(port: int) -> Iterator[tuple[str, Callable[[], None]]]:
    """A server at a port of this machine; gives what to connect to, and what ends and begins it again."""
    with _server(f"-c listen_addresses=127.0.0.1 -p {port}") as (_, restart):
        yield f"postgresql://fractal@127.0.0.1:{port}/postgres", restart


@contextmanager
def _server(options: str) -> Iterator[tuple[str, Callable[[], None]]]:
    if (reason := missing()) is not None:
        pytest.skip(reason)
    path = ":".join((*PLACES, os.environ.get("PATH", "")))
    # It refuses to run as root, and the names of sockets are short.
    user = "postgres" if os.geteuid() == 0 else None
    with tempfile.TemporaryDirectory(prefix="fractal", dir="/tmp") as folder:
        if user is not None:
            shutil.chown(folder, user)
        data, options = f"{folder}/data", f"-k {folder} -c fsync=off {options}"

        def command(name: str, *words: str) -> None:
            program = shutil.which(name, path=path)
            assert program is not None
            done = subprocess.run(
                [program, *words], user=user, cwd=folder, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, timeout=50
            )
            assert done.returncode == 0, done.stderr.decode()

        def start() -> None:
            command("pg_ctl", "-D", data, "-o", options, "-l", f"{folder}/log", "-w", "start")

        def stop() -> None:
            command("pg_ctl", "-D", data, "-m", "immediate", "-w", "stop")

        def restart() -> None:
            stop()
            start()

        command("initdb", "-D", data, "-A", "trust", "-U", "fractal", "--no-sync", "-E", "UTF8")
        start()
        try:
            yield folder, restart
        finally:
            stop()
