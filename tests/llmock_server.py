"""`llmock`, an endpoint that somebody else wrote, as a process: it answers, fails as told, and judges its clients."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from http.client import HTTPConnection
from typing import Any

START_SECONDS = 30.0
STOP_SECONDS = 10.0
ATTEMPTS = 3  # another process may take the port between our look and its start


@dataclass(frozen=True)
class LlmockServer:
    """A running one, and what it is told and asked beside the requests.

    All calls block; from an event loop they go through a thread, since the server may be waiting for that very loop
    to close a connection.
    """

    port: int

    @property
    def url(self) -> str:
        """Base URL of its OpenAI-compatible side."""
        return f"http://127.0.0.1:{self.port}/v1"

    def scenario(self, *behaviours: dict[str, Any]) -> None:
        """Queue what it does to the next requests."""
        self._call("POST", "/_llmock/scenario", {"behaviors": behaviours})

    def requests(self) -> list[dict[str, Any]]:
        """Every request since the last reset, in order, with its body and how it ended."""
        return self._call("GET", "/_llmock/requests")["requests"]

    def bodies(self) -> list[dict[str, Any]]:
        """The bodies of the requests since the last reset."""
        return [request["body"] for request in self.requests()]

    def findings(self) -> list[str]:
        """What its verdict holds against us, errors and warnings: a code for each."""
        return [finding["code"] for finding in self._call("GET", "/_llmock/verdict")["findings"]]

    def reset(self) -> None:
        """Forget the requests and the scenario."""
        self._call("POST", "/_llmock/reset")

    def is_up(self) -> bool:
        """Whether it answers."""
        try:
            return self._call("GET", "/health")["status"] == "ok"
        except OSError:
            return False

    def _call(self, method: str, path: str, body: Any = None) -> Any:
        connection = HTTPConnection("127.0.0.1", self.port, timeout=10)
        try:
            connection.request(method, path, None if body is None else json.dumps(body))
            response = connection.getresponse()
            content = response.read()
            assert response.status < 300, f"{method} {path}: {response.status} {content!r}"
            return json.loads(content)
        finally:
            connection.close()


@contextmanager
def running_llmock(options: Sequence[str] = ()) -> Iterator[LlmockServer]:
    """Start it on a free port, and end it.

    Args:
        options: Further arguments of `llmock serve`.
    """
    with tempfile.TemporaryFile() as log:
        process, server = _started(options, log)
        try:
            yield server
        finally:
            process.terminate()
            try:
                process.wait(STOP_SECONDS)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


def _started(options: Sequence[str], log: Any) -> tuple[subprocess.Popen[bytes], LlmockServer]:
    for _ in range(ATTEMPTS):
        server = LlmockServer(_free_port())
        process = _spawn(["--port", str(server.port), *options], log)
        try:
            if _answers(process, server):
                return process, server
        except BaseException:
            process.kill()
            process.wait()
            raise
    log.seek(0)
    raise AssertionError(f"llmock did not start: {log.read().decode(errors='replace')}")


def _spawn(arguments: Sequence[str], log: Any) -> subprocess.Popen[bytes]:
    # Settings of its own would come from LLMOCK_*; its banner needs UTF-8 whatever the locale is.
    environment = {name: value for name, value in os.environ.items() if not name.startswith("LLMOCK_")}
    return subprocess.Popen(
        [sys.executable, "-m", "llmock.cli", "serve", "--host", "127.0.0.1", "--log-level", "warning", *arguments],
        stdin=subprocess.DEVNULL,
        stdout=log,
        stderr=subprocess.STDOUT,
        env=environment | {"PYTHONIOENCODING": "utf-8"},
    )


def _answers(process: subprocess.Popen[bytes], server: LlmockServer) -> bool:
    """Wait for its first answer; False if it has ended, as it does when its port is taken."""
    give_up = time.monotonic() + START_SECONDS
    while not server.is_up():
        if process.poll() is not None:
            return False
        if time.monotonic() > give_up:
            process.kill()
            process.wait()
            return False
        time.sleep(0.05)
    # Somebody else may answer on a port that ours did not get.
    return process.poll() is None


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]
