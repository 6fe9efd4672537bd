"""`llmock`, an endpoint that somebody else wrote, as a process: it answers, fails as told, and judges its clients."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from http.client import HTTPConnection
from typing import Any

from tests.served import served


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
    # Settings of its own would come from LLMOCK_*.
    environment = {name: value for name, value in os.environ.items() if not name.startswith("LLMOCK_")}
    command = [sys.executable, "-m", "llmock.cli", "serve", "--host", "127.0.0.1", "--log-level", "warning", *options]
    with served(lambda port: [*command, "--port", str(port)], "/health", environment=environment) as port:
        yield LlmockServer(port)
