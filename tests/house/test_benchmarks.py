"""The benchmarks run, and all who take part do the same work; the numbers are for a quiet machine."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from benchmarks import report
from benchmarks.adapters import ADAPTERS, BASE
from benchmarks.run import is_installed
from benchmarks.scenarios import SCENARIOS

ROOT = Path(__file__).parents[2]
OURS_OR_BY_HAND = ("fractal", "by-hand")
INSTALLED = [name for name in ADAPTERS if is_installed(name)]


def bench(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "benchmarks", *arguments]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=240)


@pytest.mark.slow
@pytest.mark.timeout(300)
@pytest.mark.parametrize("name", INSTALLED)
def test_an_adapter_does_the_work_of_each_scenario(name: str, tmp_path: Path):
    found = tmp_path / "found.json"
    wanted = _scenarios_of(name)
    chosen = [word for scenario in wanted for word in ("--scenario", scenario)]

    ended = bench("run", "--tiny", "--rounds", "1", "--adapter", name, "--out", str(found), *chosen)

    assert ended.returncode == 0, ended.stderr
    measured: dict[str, dict[str, Any]] = json.loads(found.read_text())["measured"]
    assert list(measured) == wanted
    results = {scenario: by_name[name] for scenario, by_name in measured.items()}
    assert not {scenario: each["failed"] for scenario, each in results.items() if "failed" in each}
    if name.startswith("fractal"):
        assert not [scenario for scenario, each in results.items() if "cannot" in each]
        left = {scenario: (each["tasks"], each["requests"]) for scenario, each in results.items() if "tasks" in each}
        assert not {scenario: each for scenario, each in left.items() if each != ([0], [0])}


def _scenarios_of(name: str) -> list[str]:
    """Those it takes part in; but for our own, one of those whose tiny forms are the same work."""
    tiny = {each.name: each.tiny() for each in SCENARIOS.values() if name in each.who}
    if name != "fractal":
        tiny = {each.name: each for each in {repr((each.job, each.play)): each for each in tiny.values()}.values()}
    return [scenario for scenario in SCENARIOS if scenario in tiny]


@pytest.mark.slow
def test_what_it_costs_to_watch_a_run_is_measured():
    command, environment = [sys.executable, "-m", "benchmarks.tracing", "2"], {**os.environ, "PYTHONPATH": str(ROOT)}
    ended = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=60)
    assert ended.returncode == 0, ended.stderr
    assert [line.split()[0] for line in ended.stdout.splitlines()[:3]] == ["watched", "nobody", "nobody,"]


@pytest.mark.slow
def test_what_spans_of_an_sdk_cost_is_measured():
    pytest.importorskip("opentelemetry.sdk")
    command, environment = [sys.executable, "-m", "benchmarks.spans", "2"], {**os.environ, "PYTHONPATH": str(ROOT)}
    ended = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=120)
    assert ended.returncode == 0, ended.stderr
    counted = [re.match(r"fractal +([a-z ]+?)  +(\d+) ", line) for line in ended.stdout.splitlines()]
    assert [found.groups() for found in counted if found] == [
        ("nothing", "0"),
        ("spans", "6"),
        ("spans with content", "6"),
    ]


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_a_round_takes_turns_and_gives_ratios(tmp_path: Path):
    found = tmp_path / "found.json"
    ended = bench(
        *("run", "--tiny", "--rounds", "2", "--scenario", "fifty", "--out", str(found)),
        *("--adapter", "fractal", "--adapter", BASE),
    )

    assert ended.returncode == 0, ended.stderr
    numbers = report.Numbers(json.loads(found.read_text()))
    assert numbers.value("fifty", BASE, "ratio") == 1
    assert len(numbers.found["measured"]["fifty"]["fractal"]["cpu"]) == 2
    assert "50: CPU ms" in ended.stdout
    assert "round 2 of 2: fifty" in ended.stderr


def test_an_adapter_that_does_other_work_has_no_number():
    from benchmarks.run import checked

    scenario = SCENARIOS["one"]
    runs = scenario.job["at_once"] * (scenario.job["each"] + scenario.job["warm"])

    def result(requests: int, looks: float) -> dict[str, Any]:
        return checked(scenario, {"cpu": 1.0, "looks": looks}, {"served": requests * runs, "waiting": 0})

    assert result(2, 3.0) == {"cpu": 1.0}
    assert result(3, 3.0) == {"failed": "3 requests and 3 tool calls in a run, not 2 and 3"}
    assert result(2, 2.5) == {"failed": "2 requests and 2.5 tool calls in a run, not 2 and 3"}


def test_each_table_and_goal_is_about_a_scenario_and_its_adapters():
    for table in report.TABLES.values():
        for column in table.columns:
            assert column.scenario in SCENARIOS
            assert column.measure in report.FORMATS
    for name, scenario in SCENARIOS.items():
        assert set(scenario.who) <= set(ADAPTERS), name
    assert all(goal.found(report.Numbers({"measured": {}})) is None for goal in report.GOALS)


def test_what_is_measured_anew_takes_the_place_of_its_scenario_alone():
    def found(scenario: str, cpu: float) -> dict[str, Any]:
        return {"adapters": {BASE: {}}, "measured": {scenario: {BASE: {"cpu": [cpu]}}}}

    both = report.added(found("fifty", 2.0), found("one", 1.0))
    anew = report.added(found("one", 3.0), both)

    assert list(anew["measured"]) == ["one", "fifty"]
    assert report.Numbers(anew).value("one", BASE, "cpu") == 3.0
    assert report.Numbers(anew).value("fifty", BASE, "cpu") == 2.0


def test_a_file_of_results_has_a_line_for_each_adapter_and_loses_nothing():
    by_name = {BASE: {"cpu": [0.5, 0.25]}, "agno": {"cannot": "it – cannot"}}
    found = {
        "machine": {"cores": 2},
        "adapters": {BASE: {"title": "x"}},
        "measured": {"one": by_name, "fifty": by_name},
    }

    text = report.to_json(found)

    assert json.loads(text) == found
    assert text.count('   "agno": {"cannot": "it – cannot"}\n') == 2


def test_a_ratio_is_of_each_round_by_itself():
    slow_then_quick = {BASE: {"cpu": [4.0, 1.0, 1.0]}, "fractal": {"cpu": [2.0, 0.5, 0.5]}, "agno": {"cpu": [8.0]}}
    numbers = report.Numbers({"measured": {"fifty": slow_then_quick}})

    assert numbers.value("fifty", "fractal", "ratio") == 0.5
    assert numbers.value("fifty", "agno", "ratio") == 2.0  # it was there in the first round only


@pytest.mark.skipif(not report.RESULTS.exists(), reason="nothing has been measured yet")
def test_the_page_has_the_numbers_that_were_measured():
    numbers = report.Numbers(json.loads(report.RESULTS.read_text()))
    page = report.PAGE.read_text()
    assert report.filled(page, numbers) == page, "run: python -m benchmarks report"
    for name, drawing in report.drawn(numbers).items():
        assert (report.DOCS / name).read_text() == drawing


@pytest.mark.skipif(not report.RESULTS.exists(), reason="nothing has been measured yet")
def test_the_readme_has_the_numbers_that_were_measured():
    numbers = report.Numbers(json.loads(report.RESULTS.read_text()))
    others = [numbers.over("fifty", name, "fractal") for name in ADAPTERS if not name.startswith(OURS_OR_BY_HAND)]
    cheapest = min(one for one in others if one is not None)
    readme = " ".join((ROOT / "README.md").read_text("utf-8").split())
    assert (
        f"a run with three tools took {numbers.value('fifty', 'fractal', 'ratio'):.2f} of the processor time" in readme
    )
    assert f"the cheapest other framework that was measured {int(cheapest)} times ours" in readme
