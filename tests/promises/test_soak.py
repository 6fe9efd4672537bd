"""A process that makes runs for long holds no more in the end than after its first ones."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

from benchmarks.soak import Held

# In a process of its own: what other tests have left is not counted, and does not end on the way.
SOAK = """
import dataclasses, json, sys
from benchmarks.soak import soak
print(json.dumps([dataclasses.asdict(held) for held in soak(int(sys.argv[1]), sys.argv[2])]))
"""


@pytest.mark.slow
@pytest.mark.timeout(300)
@pytest.mark.skipif(sys.platform != "linux", reason="what a process holds is read in /proc")
def test_what_a_process_holds_does_not_grow_with_its_runs(backend: str):
    command = [sys.executable, "-c", SOAK, "3000", backend]
    done = subprocess.run(command, capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stderr
    _, _, warm, *later = [Held(**held) for held in json.loads(done.stdout)]
    for held in later:
        assert held.threads <= warm.threads + 8  # idle ones, which end some seconds later
        assert held.files <= warm.files + 2
        assert held.objects < warm.objects + 500  # a thread more holds some
        assert held.memory < warm.memory + 8 * 2**20
