"""Fixtures of the tests against real servers."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import httpx2
import pytest

from fractal import BaseAgent, OpenAIModel
from tests.endpoints.servers import KEY, Place, Servers, Started, asked_for, why_missing
from tests.wires import HTTP as CLIENTS


@functools.cache
def _client(wire: str, url: str, key: str) -> Any:
    """The SDK's clients live on: one that is thrown away starts a task, in whatever event loop runs then."""
    return CLIENTS[wire](url, key)


@dataclass(frozen=True)
class Running:
    """A model behind a server that runs.

    Attributes:
        place: What it is.
        server: The server.
    """

    place: Place
    server: Started

    @property
    def url(self) -> str:
        """Its base URL."""
        return self.server.url + self.place.path

    def agent(self, wire: str = "own HTTP", *, key: str = KEY, **options: Any) -> BaseAgent:
        """An agent that asks it."""
        client = OpenAIModel(base_url=self.url, api_key=key) if wire == "own HTTP" else _client(wire, self.url, key)
        return BaseAgent("Helper", "You help.", client=client, **{"model": self.place.model, **options})

    def journal(self) -> list[dict[str, Any]]:
        """The bodies of the requests that aimock got, which is the server or stands behind it."""
        assert self.server.journal is not None
        response = httpx2.get(self.server.journal, headers={"Authorization": f"Bearer {KEY}"})
        return [entry["body"] for entry in response.json()]

    def needs(self, ability: str) -> None:
        """Skip the test where the server cannot do that."""
        if ability in self.place.cannot:
            pytest.skip(f"{self.place.server} {self.place.cannot[ability]}")

    def can(self, ability: str) -> bool:
        """Whether the server can do that."""
        return ability not in self.place.cannot


@pytest.fixture(params=["asyncio", "trio"])
def anyio_backend(request: pytest.FixtureRequest) -> str:
    """Both backends; what uvloop does to connections is tested elsewhere."""
    return request.param


@pytest.fixture(scope="session")
def servers() -> Iterator[Servers]:
    """The servers, which run until the last test has ended."""
    with Servers() as running:
        yield running


# For the session, so that a server is no part of what a test opens.
@pytest.fixture(scope="session", params=asked_for())
def place(request: pytest.FixtureRequest, servers: Servers) -> Running:
    """A model behind a real server."""
    wanted: Place = request.param
    reason = why_missing(wanted)
    if reason is not None:
        pytest.skip(reason)
    return Running(wanted, servers.started(wanted.server))


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leave out the clients that would show nothing new at a place."""
    unneeded = [item for item in items if _is_unneeded(item)]
    if unneeded:
        config.hook.pytest_deselected(items=unneeded)
        items[:] = [item for item in items if item not in set(unneeded)]


def _is_unneeded(item: pytest.Item) -> bool:
    parameters = item.callspec.params if isinstance(item, pytest.Function) and hasattr(item, "callspec") else {}
    place, wire = parameters.get("place"), parameters.get("wire", parameters.get("kind"))
    return isinstance(place, Place) and place.wires is not None and wire is not None and wire not in place.wires
