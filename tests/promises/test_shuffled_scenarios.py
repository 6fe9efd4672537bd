"""The scenarios that are cancelled everywhere, in random orders of their tasks: each ends as in any other."""

from __future__ import annotations

from collections.abc import Callable

import anyio
import pytest

from fractal.testing import Endpoint
from fractal.testing._leftovers import running_tasks
from tests.hook_scenarios import SCENARIOS
from tests.scenarios import OVER_HTTP, answer_over_http, check_events
from tests.schedules import run_shuffled
from tests.streams import Watch

FEW, MANY = range(2), range(2, 10)


@pytest.mark.parametrize("seeds", [pytest.param(FEW, id="few"), pytest.param(MANY, id="many", marks=pytest.mark.slow)])
@pytest.mark.parametrize("name", SCENARIOS)
def test_a_run_does_not_depend_on_the_order_in_which_tasks_take_turns(
    name: str, seeds: range, backend: str, endpoint: Callable[..., Endpoint]
):
    if name in OVER_HTTP:
        endpoint(answer_over_http)
    watch = Watch()
    scenario = SCENARIOS[name](watch)

    async def main() -> None:
        before = {task.id for task in running_tasks()}
        with anyio.fail_after(30):
            await scenario()
        check_events(watch)
        left = [task for task in running_tasks() if task.id not in before]
        assert not left, f"tasks left: {left}"

    for seed in seeds:
        try:
            run_shuffled(main, backend=backend, seed=seed)
        except BaseException as error:
            error.add_note(f"in the order of seed {seed}")
            raise
