"""Each promise of the README has one file of tests."""

from __future__ import annotations

import re
from pathlib import Path

ROOT = Path(__file__).parents[2]

# By how the promise begins in the README.
PROOFS = {
    "A timeout leaves nothing running.": "test_timeouts",
    "Leaving a stream ends its run.": "test_leaving_a_stream",
    "Blocking calls work where they are made": "test_blocking_calls",
    "One agent object serves all requests.": "test_one_agent_many_runs",
    "A budget of 2 requests sends 2.": "test_budgets",
    "A client that goes away ends its run, or does not, as you say.": "test_clients_that_go",
    "A run can outlive its process.": "test_outliving_the_process",
    "You can prove it for your own agents.": "test_proof",
    "It costs less than the loop by hand.": "test_cost",
    "asyncio and trio are equals.": "test_both_backends",
}


def test_each_promise_of_the_readme_has_a_file_of_tests():
    section = (ROOT / "README.md").read_text("utf-8").partition("## What it promises")[2].partition("\n## ")[0]
    assert re.findall(r"^- \*\*(.+?)\*\*", section, re.MULTILINE) == [*PROOFS]
    files = {path.stem for path in (ROOT / "tests" / "promises").glob("test_*.py")}
    assert set(PROOFS.values()) <= files
