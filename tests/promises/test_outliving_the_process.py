"""A run can outlive its process: killed at any moment, it goes on in another one, and nothing is paid or done twice."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

import pytest

from fractal.testing import KillWorld, kill_everywhere
from tests.durable.kill_scenarios import SCENARIOS

IN_MEMORY = next((each for each in ("/dev/shm", None) if each is None or os.access(each, os.W_OK)), None)
"""Where files are quick."""

ALL = os.environ.get("KILL_POINTS") == "all"
"""Whether each point of each scenario is tried, on both event loops: that takes minutes."""

_BACKENDS = ["asyncio", "trio"]
CASES = [(name, backend) for n, name in enumerate(SCENARIOS) for backend in (_BACKENDS if ALL else [_BACKENDS[n % 2]])]


def killed(
    scenario: Callable[[KillWorld], Any],
    record_property: Callable[[str, object], None],
    points: int | None,
    backend: str = "asyncio",
) -> None:
    report = kill_everywhere(scenario, backend=backend, points=None if ALL else points, directory=IN_MEMORY)
    record_property("numbers", f"{scenario.__name__} on {backend}: {report}")


@pytest.mark.parametrize(
    ("name", "backend"),
    [("parallel_delegates", "trio"), ("deferred_approvals", "asyncio"), ("on_the_facade", "asyncio")],
)
def test_durable_runs_survive_the_end_of_their_process(
    name: str, backend: str, record_property: Callable[[str, object], None]
) -> None:
    killed(SCENARIOS[name], record_property, 6, backend)


@pytest.mark.slow
@pytest.mark.timeout(300)
@pytest.mark.parametrize(("name", "backend"), CASES)
def test_durable_runs_survive_the_end_of_their_process_at_many_points(
    name: str, backend: str, record_property: Callable[[str, object], None]
) -> None:
    killed(SCENARIOS[name], record_property, 10, backend)
