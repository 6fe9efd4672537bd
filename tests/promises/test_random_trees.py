"""Random trees of runs, in virtual time, under random schedules: whatever happens, what was promised holds."""

from __future__ import annotations

import pytest
from hypothesis import HealthCheck, Phase, given, settings

from tests.trees import Grown, Tree, check, trees

on_both = pytest.mark.parametrize("backend", ["asyncio", "trio"])


def grow_and_check(backend: str, tree: Tree) -> None:
    check(Grown(tree).run(backend))


@on_both
@settings(max_examples=40, phases=[Phase.explicit, Phase.generate], suppress_health_check=[HealthCheck.too_slow])
@given(trees)
def test_a_random_tree_keeps_to_its_limits_and_leaves_nothing(backend: str, tree: Tree):
    grow_and_check(backend, tree)


@pytest.mark.slow
@pytest.mark.untraced
@pytest.mark.timeout(600)
@on_both
@settings(max_examples=1000, suppress_health_check=[HealthCheck.too_slow])
@given(trees)
def test_a_thousand_random_trees_keep_to_their_limits_and_leave_nothing(backend: str, tree: Tree):
    grow_and_check(backend, tree)
