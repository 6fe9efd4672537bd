"""The page for the first hour: its files and its commands, in its order, show what it says that they show."""

from __future__ import annotations

import os
import re
import shlex
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx2
import pytest

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "first-hour.md").read_text(encoding="utf-8")
FENCE = re.compile(r"^```(\w+)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
SERVER = re.compile(r"fractal endpoint uvicorn (\S+) --port 8000")

pytestmark = [pytest.mark.slow, pytest.mark.skipif(os.name == "nt", reason="the page is for POSIX shells")]


def environment() -> dict[str, str]:
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("OPENAI_", "PYTEST_"))}
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    return kept | {"PATH": path, "PYTHONPATH": str(ROOT), "no_proxy": "127.0.0.1"}


@contextmanager
def served(arguments: list[str], port: int, folder: Path) -> Iterator[None]:
    with subprocess.Popen(arguments, cwd=folder, env=environment(), stderr=subprocess.DEVNULL) as process:
        try:
            deadline = time.monotonic() + 40
            while not answers_at(port):
                assert process.poll() is None
                assert time.monotonic() < deadline
                time.sleep(0.05)
            yield
        finally:
            process.terminate()  # reaches the server, too


def answers_at(port: int) -> bool:
    with socket.socket() as caller:
        return caller.connect_ex(("127.0.0.1", port)) == 0


def free_port() -> int:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        port: int = taken.getsockname()[1]
        return port


def shown(command: str, folder: Path) -> str:
    done = subprocess.run(
        shlex.split(command), cwd=folder, env=environment(), capture_output=True, text=True, timeout=50
    )
    assert done.returncode == 0, done.stderr
    return re.sub(r" in [\d.]+s", "", done.stdout).strip()


def test_the_page_shows_what_its_files_and_commands_show(tmp_path: Path):
    blocks = FENCE.findall(PAGE)
    commands: list[tuple[str, str]] = []
    for (kind, source), (next_kind, following) in zip(blocks, [*blocks[1:], ("", "")], strict=True):
        if kind == "python" and (named := re.match(r"# (\w+\.py)\n", source)):
            (tmp_path / named[1]).write_text(source, encoding="utf-8")
        elif kind == "sh":
            commands.append((source.strip(), following.strip() if next_kind == "text" else ""))
    assert len(commands) == 5
    port = free_port()
    for command, expected in commands:
        if command.startswith("curl "):
            url = shlex.split(command)[1].replace(":8000", f":{port}")
            with served(["fractal", "endpoint", "uvicorn", "app:app", "--port", f"{port}"], port, tmp_path):
                assert httpx2.get(url, trust_env=False).text == expected
        elif SERVER.fullmatch(command) is None:
            assert shown(command, tmp_path) == expected
    assert not answers_at(port)
