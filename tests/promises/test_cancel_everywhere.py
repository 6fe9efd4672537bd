"""Runs of every kind, cancelled at each of their points in every way there is: nothing is left, and nothing is lost."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import pytest

from fractal.testing import Endpoint, cancel_everywhere
from tests.hook_scenarios import SCENARIOS
from tests.scenarios import OVER_HTTP, answer_over_http, check_events
from tests.streams import Watch

WAYS = [
    pytest.param(["scope"], id="by a scope"),
    pytest.param(
        ["native", "native twice", "wait_for", "again"],
        id="in other ways",
        marks=[pytest.mark.slow, pytest.mark.untraced, pytest.mark.timeout(240)],
    ),
]


@pytest.mark.parametrize("ways", WAYS)
@pytest.mark.parametrize("name", SCENARIOS)
def test_a_run_that_is_cancelled_anywhere_leaves_nothing_and_says_so(
    name: str,
    ways: Sequence[str],
    endpoint: Callable[..., Endpoint],
    record_property: Callable[[str, object], None],
):
    if name in OVER_HTTP:
        endpoint(answer_over_http)
    watch = Watch()
    report = cancel_everywhere(SCENARIOS[name](watch), ways=ways, check=lambda: check_events(watch), within=10)
    assert {backend for backend, _ in report.points} == {"asyncio", "trio"}
    assert min(report.points.values()) > 4
    record_property("points", [[name, *where, count] for where, count in report.points.items()])
