"""A budget of 2 requests sends 2: it is reserved before it is spent, and holds for the whole tree of agents."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from fractal import BaseAgent, Limits, SharedBudget, run_many
from fractal.testing import Endpoint, answers

StartEndpoint = Callable[..., Endpoint]


def ask_everybody(request: Any) -> Any:
    """Call all tools that there are; without any, answer."""
    calls = [answers.call(tool["function"]["name"], {"query": "?"}) for tool in request.tools]
    return answers.calls(*calls) if calls else "an answer"


@pytest.mark.parametrize("limit", [1, 2, 3, 4, 5])
async def test_parallel_delegates_spend_what_there_is_and_no_more(limit: int, endpoint: StartEndpoint) -> None:
    one = endpoint(ask_everybody)
    team = BaseAgent("Team", "You ask everybody.")
    for number in range(4):
        team.register_delegate(BaseAgent(f"Specialist{number}", "You know one thing."))
    result = await team.run("Ask all four.", limits=Limits(max_requests=limit))
    assert result.stop_reason == "budget"
    assert (len(one.requests), result.usage.requests) == (limit, limit)
    assert [call.outcome for call in result.tool_results].count("ok") == limit - 1


@pytest.mark.parametrize("limit", [0, 1, 3, 7])
async def test_retries_are_paid_for(limit: int, endpoint: StartEndpoint) -> None:
    one = endpoint(lambda request: answers.failure(500, headers={"retry-after-ms": "1"}))
    result = await BaseAgent("A", "a").run("go", max_retries=4, limits=Limits(max_requests=limit))
    sent = min(limit, 5)
    assert (result.success, len(one.requests), result.usage.requests) == (False, sent, sent)


async def test_a_budget_that_runs_share_is_never_overspent(endpoint: StartEndpoint) -> None:
    one = endpoint("hello")
    budget = SharedBudget(max_requests=5)
    results = await run_many(BaseAgent("A", "a", budget=budget), ["go"] * 12, max_concurrency=12)
    assert sorted(result.stop_reason for result in results) == ["budget"] * 7 + ["finished"] * 5
    assert (len(one.requests), budget.usage().requests) == (5, 5)
