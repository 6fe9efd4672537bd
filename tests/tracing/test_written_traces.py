"""What people who come from the older framework write about traces, line by line, and what comes of it."""

from __future__ import annotations

import json
import logging
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import anyio
import pytest

from fractal import BaseAgent, TraceEvent, TracingKit
from fractal.cli.main import main
from fractal.testing import ScriptedModel, answers

pytestmark = pytest.mark.anyio


async def look(place: str) -> str:
    """Look at a place."""
    if place == "nowhere":
        raise LookupError("there is no such place")
    return f"rain in {place}"


def team(**options: Any) -> BaseAgent:
    """An agent that asks two others at once and calls a tool that fails."""
    scripts = [[answers.call("look", {"place": place}), f"{place} is wet"] for place in ("Rome", "Oslo")]
    below = [
        BaseAgent(f"Scout {number}", "You look.", client=ScriptedModel(script)).add_tool(look)
        for number, script in enumerate(scripts)
    ]
    asked = [answers.call(f"delegate_to_scout_{number}", {"query": "Rain?"}) for number in range(2)]
    script = [answers.calls(*asked, answers.call("look", {"place": "nowhere"})), "Take an umbrella."]
    chief = BaseAgent("Chief", "You decide.", client=ScriptedModel(script), **options).add_tool(look)
    for agent in below:
        chief.register_delegate(agent)
    return chief


async def test_enable_tracing_keeps_a_trace() -> None:
    agent = team(enable_tracing=True)
    assert isinstance(agent.tracing, TracingKit)
    await agent.run("Where does it rain?")
    trace = agent.tracing.get_trace()
    assert all(isinstance(event, TraceEvent) for event in trace)
    assert {event.run_id for event in trace} == {trace[0].run_id}


async def test_the_types_of_events_are_those_that_are_named_and_some_more() -> None:
    agent = team(enable_tracing=True)
    await agent.run("Where does it rain?")
    assert agent.tracing is not None
    named = {"agent_start", "agent_end", "agent_delegate", "delegation_end", "tool_call", "tool_result", "error"}
    assert named <= {event.event_type for event in agent.tracing.get_trace()}


async def test_each_field_of_an_event_has_what_its_name_says() -> None:
    agent = team(enable_tracing=True)
    result = await agent.run("Where does it rain?")
    assert agent.tracing is not None
    trace = agent.tracing.get_trace()
    first, last = trace[0], trace[-1]
    assert (first.event_type, first.agent_name, first.arguments) == (
        *("agent_start", "Chief"),
        {"user_input": "Where does it rain?"},
    )
    assert (last.event_type, last.result, last.run_id) == ("agent_end", "Take an umbrella.", result.run_id)
    assert first.timestamp <= last.timestamp
    assert last.elapsed_time == pytest.approx(result.elapsed)
    [failed] = [event for event in trace if event.event_type == "tool_result" and event.error]
    assert (failed.tool_name, failed.error) == ("look", "LookupError: there is no such place")
    assert failed.tool_call_id
    [call] = [event for event in trace if event.event_type == "tool_call" and event.tool_call_id == failed.tool_call_id]
    assert (call.arguments, call.metadata["run"]) == ({"place": "nowhere"}, result.run_id)
    assert first.parent_agent is None
    assert first.delegation_depth == 0


async def test_delegates_are_in_the_trace_of_the_caller_with_parent_and_depth_parallel_ones_too() -> None:
    agent = team(enable_tracing=True)
    await agent.run("Where does it rain?")
    assert agent.tracing is not None
    trace = agent.tracing.get_trace()
    below = {event.agent_name: (event.parent_agent, event.delegation_depth) for event in trace if event.parent_agent}
    assert below == {"Scout 0": ("Chief", 1), "Scout 1": ("Chief", 1)}
    calls = [event for event in trace if event.event_type == "tool_call" and event.agent_name == "Chief"]
    assert [event.tool_name for event in calls] == ["delegate_to_scout_0", "delegate_to_scout_1", "look"]
    assert len({event.parallel_group_id for event in calls}) == 1
    assert calls[0].parallel_group_id is not None


async def test_run_id_and_timestamp_in_a_files_name_are_filled_in(tmp_path: Path) -> None:
    agent = team(tracing_output_file=str(tmp_path / "trace_{run_id}_{timestamp}.jsonl"))
    result = await agent.run("Where does it rain?")
    [name] = os.listdir(tmp_path)
    assert re.fullmatch(rf"trace_{result.run_id}_\d{{8}}_\d{{6}}\.jsonl", name)


async def test_without_them_runs_append(tmp_path: Path) -> None:
    for _ in range(2):
        await team(tracing_output_file=tmp_path / "trace.jsonl").run("Where does it rain?")
    events = [TraceEvent(**json.loads(line)) for line in (tmp_path / "trace.jsonl").read_text().splitlines()]
    assert len({event.run_id for event in events}) == 2


async def test_a_trace_can_be_summed_up_exported_and_cleared(tmp_path: Path) -> None:
    agent = team(enable_tracing=True)
    await agent.run("Where does it rain?")
    assert agent.tracing is not None
    summary = agent.tracing.get_summary()
    assert (summary["agent_runs"], summary["tool_calls"], summary["delegations"], summary["errors"]) == (3, 5, 2, 1)
    agent.tracing.export_json(tmp_path / "trace.json")
    exported = json.loads((tmp_path / "trace.json").read_text())
    assert [TraceEvent(**each) for each in exported] == agent.tracing.get_trace()
    agent.tracing.clear()
    assert agent.tracing.get_trace() == []


@pytest.fixture
def file(tmp_path: Path) -> Path:
    anyio.run(team(tracing_output_file=tmp_path / "trace.jsonl").run, "Where does it rain?")
    return tmp_path / "trace.jsonl"


@pytest.mark.parametrize("view", [[], ["--summary"], ["--flow"], ["--hierarchy"], ["--compact"]], ids=str)
def test_a_file_can_be_viewed(view: list[str], file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("rich")
    assert main(["view", str(file), *view]) == 0
    assert "Chief" in capsys.readouterr().out


def test_a_file_can_be_visualized(file: Path) -> None:
    assert main(["visualize", str(file), "-o", str(file.with_name("out.html"))]) == 0
    assert "Take an umbrella." in file.with_name("out.html").read_text()


def test_the_package_is_the_command(file: Path) -> None:
    command = [sys.executable, "-m", "fractal", "view", str(file), "--summary"]
    assert "Scout 0: look" in subprocess.run(command, capture_output=True, text=True, timeout=60, check=True).stdout


async def test_debug_logs_say_what_a_run_does(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.DEBUG):
        result = await team().run("Where does it rain?")
    said = [record.getMessage() for record in caplog.records if record.name == "fractal"]
    assert [line.split()[0] for line in said][:2] == ["run_started", "model_requested"]
    assert all("run=" in line for line in said)
    assert any(f"run={result.run_id[:8]}" in line and line.startswith("run_finished") for line in said)
