"""A process that makes runs for long holds no more in the end than after its first ones."""

from __future__ import annotations

import sys

import pytest

from benchmarks.soak import soak


@pytest.mark.slow
@pytest.mark.timeout(300)
@pytest.mark.skipif(sys.platform != "linux", reason="what a process holds is read in /proc")
def test_what_a_process_holds_does_not_grow_with_its_runs(backend: str):
    _, _, warm, *later = soak(3000, backend)
    for held in later:
        assert held.threads <= warm.threads + 8  # idle ones, which end some seconds later
        assert held.files <= warm.files + 2
        assert held.objects < warm.objects + 500  # those of before the test are not counted
        assert held.memory < warm.memory + 8 * 2**20
