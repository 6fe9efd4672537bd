"""You can prove it for your own agents: cancelled at every checkpoint, what one leaves is named."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import anyio
import pytest

from fractal import BaseAgent
from fractal.testing import CancellationFaults, ScriptedModel, answers, cancel_everywhere

PAGE = (Path(__file__).parents[2] / "docs" / "prove-it-stops.md").read_text(encoding="utf-8")


async def look() -> str:
    """Look out of the window."""
    await anyio.sleep(0)
    return "rain"


def test_an_agent_that_leaves_nothing_passes_on_both_backends():
    async def scenario() -> None:
        await BaseAgent("A", "a", client=ScriptedModel([answers.call("look"), "done"])).add_tool(look).run("go")

    report = cancel_everywhere(scenario, ways=["scope"])
    assert {backend for backend, _ in report.points} == {"asyncio", "trio"}
    assert min(report.points.values()) > 4


def test_what_a_tool_leaves_is_named(backend: str):
    async def leaky() -> str:
        """Look out of the window, and forget to wait for that."""
        look()  # type: ignore[unused-coroutine]
        return "rain"

    async def scenario() -> None:
        await BaseAgent("A", "a", client=ScriptedModel([answers.call("leaky"), "done"])).add_tool(leaky).run("go")

    with pytest.raises(CancellationFaults, match="look"):
        cancel_everywhere(scenario, backends=[backend], ways=["scope"])


# ---- the how-to "Prove that your agent stops": whoever copies its test file finds a leak, and nothing where none is


def blocks(section: str) -> str:
    """The Python of a section of the page."""
    text = PAGE.partition(f"\n## {section}\n")[2].partition("\n## ")[0]
    return "\n\n".join(re.findall(r"```python\n(.*?)```", text, re.DOTALL))


def run(folder: Path, source: str) -> subprocess.CompletedProcess[str]:
    (folder / "test_weather.py").write_text(source, encoding="utf-8")
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "-s",
        "-p",
        "no:cacheprovider",
        "-p",
        "no:xdist",
        "test_weather.py",
    ]
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=200)


@pytest.mark.slow
@pytest.mark.timeout(240)
def test_the_test_file_of_the_page_passes_for_the_agent_of_the_page(tmp_path: Path):
    done = run(tmp_path, blocks("The agent") + blocks("The test file"))
    assert done.returncode == 0, done.stdout
    assert "5 passed" in done.stdout
    assert re.search(r"cancelled at \d\d+ points: asyncio scope", done.stdout)


@pytest.mark.slow
@pytest.mark.timeout(240)
def test_it_fails_for_the_leaky_tool_of_the_page_and_names_what_it_leaves(tmp_path: Path):
    leaky = blocks("What a leak looks like").partition("import threading")[0]
    source = blocks("The agent") + blocks("The test file") + "\n\n" + leaky
    source = source.replace(".add_tool(forecast)", '.add_tool(leaky_forecast, name="forecast")')
    done = run(tmp_path, source)
    assert done.returncode == 1, done.stdout
    failed = re.findall(r"^FAILED test_weather.py::(\w+)", done.stdout, re.MULTILINE)
    assert "test_it_stops_wherever_it_is_cancelled" in failed
    assert re.search(r"test_weather\.py:\d+ in refresh_the_map", done.stdout)
