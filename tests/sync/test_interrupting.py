"""Ctrl-C at each step of the blocking facade: it is raised, nothing goes on, and the next call works."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable

import pytest

from tests.interrupting import SCENARIOS
from tests.support import LOOPS

QUICK = {("asyncio", "run"), ("asyncio", "enter"), ("trio", "stream")}

CASES = [
    pytest.param(loop, scenario, marks=[] if (loop, scenario) in QUICK else pytest.mark.slow)
    for loop in LOOPS
    for scenario in SCENARIOS
]


@pytest.mark.skipif(sys.implementation.name != "cpython", reason="goes by its bytecode")
@pytest.mark.timeout(150)
@pytest.mark.parametrize(("loop", "scenario"), CASES)
def test_ctrl_c_at_any_step_ends_what_runs_and_breaks_nothing(
    loop: str, scenario: str, record_property: Callable[[str, object], None]
):
    command = [sys.executable, "-m", "tests.interrupting", loop, scenario]
    done = subprocess.run(command, capture_output=True, text=True, timeout=140)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip().isdecimal(), done.stdout  # how many there were
    assert int(done.stdout) > 100
    record_property("numbers", f"Ctrl-C, {scenario} on {loop}: {int(done.stdout)} points")
