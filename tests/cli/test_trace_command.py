"""`fractal trace`: what a file of a trace looks like in a terminal, whatever is in the file."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import anyio
import pytest

from fractal import BaseAgent, TraceEvent
from fractal.cli.main import main
from fractal.cli.trace import MOST_PARTS, MOST_RUNS, show_summary
from fractal.testing import ScriptedModel, answers
from fractal.tracing import TraceReader, TraceUnreadable
from tests.pages import Scripts

pytest.importorskip("rich")

AT = 1_800_000_000.0


async def search(query: str) -> str:
    """Search."""
    if query == "nothing":
        raise LookupError("nothing there")
    return f"found {query}"


@pytest.fixture
def file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The trace of a run with a delegate."""
    monkeypatch.setenv("COLUMNS", "100")
    below = BaseAgent("Below", "b", "small", ScriptedModel([answers.call("search", {"query": "nothing"}), "deep"]))
    script = [answers.calls(answers.call("search", {"query": "x"}), answers.call("ask", {"query": "why?"})), "done"]
    agent = BaseAgent("Chief", "a", "large", ScriptedModel(script), tracing_output_file=tmp_path / "trace.jsonl")
    agent.add_tool(search).register_delegate(below.add_tool(search), tool_name="ask")
    assert anyio.run(agent.run, "go on").success
    return tmp_path / "trace.jsonl"


def line(kind: str, **values: Any) -> dict[str, Any]:
    given = {"timestamp": AT, "event_type": kind, "agent_name": "A", "run_id": "r", "metadata": {"run": "r"}}
    return {**given, **values}


def written(path: Path, *lines: object) -> str:
    path.write_text("".join(json.dumps(each) + "\n" for each in lines))
    return str(path)


# ---- what there is to see


def test_runs_are_drawn_as_a_tree_with_bars_of_time(file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["trace", str(file)]) == 0
    told, complaints = capsys.readouterr()
    tree, bars, *_ = told.split("\n\n")
    assert tree.startswith("run ")
    rows = [re.split(r"(?<=\w)  ", row)[0].strip() for row in tree.splitlines()[2:]]
    assert rows[:2] == ["✓ Chief", "├─ ✓ model"]
    assert rows[-1] == "└─ ✓ model"
    assert "│  ├─ ✗ search" in rows
    assert "├─ ✓ Below" in rows
    assert "LookupError: nothing there" in tree
    assert "░" in bars
    assert "█" in bars
    assert bars.splitlines()[1].startswith("Chief")
    assert complaints == ""


def test_only_the_runs_that_are_wanted_are_drawn(file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run_id = next(iter(TraceReader(file))).run_id or ""
    assert main(["trace", str(file), "--run", run_id[:8]]) == 0
    assert run_id in capsys.readouterr().out
    assert main(["trace", str(file), "--run", "none"]) == 2
    assert "no run in it" in capsys.readouterr().err


def test_the_numbers_are_told(file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["trace", str(file), "--summary"]) == 0
    told = capsys.readouterr().out
    assert told.startswith("1 runs, ")
    assert "ended: finished 2" in told
    assert [words[:4] for words in map(str.split, told.splitlines()) if words[:2] == ["Below:", "search"]] == [
        ["Below:", "search", "1", "1"]
    ]
    assert "first errors\n  Below: LookupError: nothing there" in told


def test_the_errors_are_told_one_on_a_line(file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["trace", str(file), "--errors"]) == 0
    assert capsys.readouterr().out[10:] == "Below search: LookupError: nothing there\n"


def test_numbers_and_errors_can_be_had_as_json(file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for arguments in (["--json"], ["--json", "--summary"]):
        assert main(["trace", str(file), *arguments]) == 0
        assert json.loads(capsys.readouterr().out)["agent_runs"] == 2
    assert main(["trace", str(file), "--errors", "--json"]) == 0
    [error] = map(json.loads, capsys.readouterr().out.splitlines())
    assert TraceEvent(**error).tool_name == "search"
    assert main(["trace", str(file), "--run", "none", "--json"]) == 2
    assert main(["trace", str(file), "--run", str(error["run_id"]), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["runs"] == 1
    assert main(["trace", str(file), "--compact", "--json"]) == 0
    [run] = map(json.loads, capsys.readouterr().out.splitlines())
    assert (run["agent"], run["agents"], run["tools"], run["reason"]) == ("Chief", 2, 3, "finished")
    for view in ("--flow", "--hierarchy"):
        assert main(["trace", str(file), view, "--json"]) == 2


def test_of_many_runs_the_newest_are_drawn(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    runs = [
        line(kind, run_id=f"r{n}", metadata={"run": f"r{n}", "success": True}, timestamp=AT + n + at)
        for n in range(100)
        for at, kind in ((0, "agent_start"), (0.5, "agent_end"))
    ]
    assert main(["trace", written(tmp_path / "t", *runs)]) == 0
    told = capsys.readouterr().out
    assert told.startswith(f"{100 - MOST_RUNS} older runs are not shown")
    assert [text.split(",")[0] for text in told.splitlines() if text.startswith("run ")] == [
        f"run r{n}" for n in range(100 - MOST_RUNS, 100)
    ]


def test_of_a_long_run_the_beginning_is_drawn_and_its_end(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    calls = [line("tool_call", tool_name=f"t{n}", tool_call_id=f"{n}", timestamp=AT + n) for n in range(MOST_PARTS + 9)]
    end = line("agent_end", metadata={"run": "r", "success": True}, timestamp=AT + 1e5)
    assert main(["trace", written(tmp_path / "t", line("agent_start"), *calls, end)]) == 0
    told = capsys.readouterr().out
    assert "11 more events of this run are not shown" in told
    assert "✓ A" in told


# ---- whatever is in the file


@pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="nobody is killed like that here")
def test_what_a_killed_program_was_doing_is_unfinished(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code = (
        "import anyio, os, signal\nfrom fractal import BaseAgent\nfrom fractal.testing import ScriptedModel, answers\n"
        "async def wait() -> None:\n    'Wait.'\n    agent.tracing.flush()\n    os.kill(os.getpid(), signal.SIGKILL)\n"
        "model = ScriptedModel([answers.call('wait', {})])\n"
        "agent = BaseAgent('A', 'a', client=model, tracing_output_file='trace.jsonl').add_tool(wait)\n"
        "anyio.run(agent.run, 'go')\n"
    )
    assert subprocess.run([sys.executable, "-c", code], cwd=tmp_path, timeout=60).returncode == -signal.SIGKILL
    with open(tmp_path / "trace.jsonl", "ab") as file:
        file.write(b'{"timestamp":17')
    assert main(["trace", str(tmp_path / "trace.jsonl")]) == 0
    told, complaints = capsys.readouterr()
    assert [row.split()[-2] for row in told.splitlines() if "wait" in row and "unfinished" in row] == ["unfinished"]
    assert "✓ model" in told
    assert "the last line is cut" in complaints
    assert main(["visualize", str(tmp_path / "trace.jsonl"), "-o", str(tmp_path / "out.html")]) == 0
    page = Scripts((tmp_path / "out.html").read_text()).data
    run, names = page["run-0"]["spans"], page["run-0"]["names"]
    ended = {names[name]: names[outcome] for name, outcome in zip(run["name"], run["outcome"], strict=True)}
    assert (ended["A"], ended["wait"]) == ("unfinished", "unfinished")
    assert "the last line is cut" in page["page"]["notes"][0]
    for view in ("--flow", "--hierarchy", "--compact"):
        assert main(["trace", str(tmp_path / "trace.jsonl"), view]) == 0
    assert capsys.readouterr().out.count("unfinished") == 2


@pytest.mark.parametrize(
    ("content", "why"),
    [
        (b"", "the file is empty"),
        (b"\n\n", "the file is empty"),
        (b"{}\n", "no line of it is an event"),
        (b"hello\n", "no line of it is an event"),
        (b"\x00\xff\n" * 10, "no line of it is an event"),
        (b"[" * 100_000, "no line of it is an event"),
        (b"x" * 20_000_000, "no line of it is an event"),
        (b'{"resourceSpans":[]}\n', "no line of it is an event"),
    ],
    ids=["empty", "blank", "object", "text", "binary", "deep", "one long line", "foreign"],
)
@pytest.mark.parametrize("view", [[], ["--summary"], ["--errors"], ["--json"], ["--flow"], ["--compact"]], ids=str)
def test_what_is_no_trace_is_wrong_use(
    content: bytes, why: str, view: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "t").write_bytes(content)
    assert main(["trace", str(tmp_path / "t"), *view]) == 2
    assert why in capsys.readouterr().err


def test_a_file_that_is_not_there_is_wrong_use(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for path, why in ((tmp_path / "none", "No such file"), (tmp_path, "there is no .jsonl file in it")):
        assert main(["trace", str(path)]) == 2
        assert why in capsys.readouterr().err
    with pytest.raises(TraceUnreadable) as caught:
        list(TraceReader(tmp_path / "none"))
    assert caught.value.path == str(tmp_path / "none")


STEERING = "\x1b]0;owned\x07\x1b[2J\u202e\r\n\x00[bold]"


VIEWS = [[], ["--summary"], ["--errors"], ["--json"], ["--errors", "--json"], ["--compact", "--json"]]
VIEWS += [["--flow"], ["--hierarchy"], ["--compact"], ["--flow", "--follow"], ["--errors", "--follow"], ["--follow"]]


@pytest.mark.parametrize("view", VIEWS, ids=str)
def test_nothing_in_a_file_steers_the_terminal(view: list[str], tmp_path: Path, monkeypatch: Any, capsys: Any) -> None:
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    monkeypatch.setenv("COLUMNS", "120")
    monkeypatch.setenv("TERM", "dumb")  # so that there are no colours of our own
    names = {"agent_name": STEERING, "run_id": STEERING, "tool_name": STEERING, "tool_call_id": STEERING}
    metadata = {"run": STEERING, "outcome": STEERING, "stop_reason": STEERING, "model": STEERING, "call": STEERING}
    lines = [
        line(kind, **names, metadata=metadata, error=STEERING, result=STEERING, arguments={"user_input": STEERING})
        for kind in ("agent_start", "model_request", "model_response", "tool_call", "error", "tool_result", "agent_end")
    ]
    assert main(["trace", written(tmp_path / "t", *lines), *view]) == 0
    told = capsys.readouterr().out
    assert not {"\x1b", "\x07", "\u202e", "\r", "\x00"} & set(told)
    assert "[b" in told


ODD: list[Any] = [None, 5, -1, 1e308, True, "x", [], [1], {}, {"a": 1}, [{"function": 5}], "\ud800", 10**400, [[[]]]]


@pytest.mark.parametrize("odd", ODD, ids=lambda odd: repr(odd)[:12])
def test_values_of_any_type_stop_nothing(odd: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    lines: list[object] = [line("agent_start")]
    fields = ("timestamp", "agent_name", "run_id", "parent_agent", "delegation_depth", "tool_name", "tool_call_id")
    names = ("run", "parent_run", "call", "model", "usage", "cost", "outcome", "success", "stop_reason", "input_tokens")
    kinds = ("agent_start", "model_request", "model_response", "retry", "tool_call", "tool_result", "agent_delegate")
    for kind in (*kinds, "delegation_end", "error", "limit", "warning", "agent_end", odd):
        more = ("arguments", "result", "error", "elapsed_time", "metadata", "parallel_group_id")
        lines += [line(kind, **{name: odd}) for name in (*fields, *more)]
        lines += [line(kind, metadata={"run": "r", name: odd}) for name in names]
        lines.append(line(kind, result={"content": odd, "tool_calls": odd}))
    path = written(tmp_path / "t", *lines, odd)
    for view in VIEWS[:-3]:
        assert main(["trace", path, *view]) == 0, capsys.readouterr().err
        capsys.readouterr()


def test_runs_inside_each_other_without_end_are_drawn(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    chain = [line("agent_start", metadata={"run": f"r{n}", "parent_run": f"r{n - 1}"}) for n in range(1500)]
    assert main(["trace", written(tmp_path / "t", *chain)]) == 0
    assert "unfinished" in capsys.readouterr().out


@pytest.mark.parametrize("at", [0, -1e11, 9e11, 1.5])
def test_any_moment_can_be_shown(at: float, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    lines = [line("agent_start", timestamp=at), line("error", timestamp=at, error="e"), line("agent_end")]
    for view in VIEWS:
        assert main(["trace", written(tmp_path / "t", *lines), *view]) == 0
        capsys.readouterr()


@pytest.mark.parametrize("view", [[], ["--hierarchy"]])
def test_parts_before_the_beginning_of_their_run_are_drawn_at_its_beginning(
    view: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    below = {"agent_name": "Below", "metadata": {"run": "b", "parent_run": "r"}}
    lines = [
        line("agent_start"),
        *(line(kind, timestamp=AT - 1e11, **below) for kind in ("agent_start", "agent_end")),
        line("tool_call", timestamp=AT - 1e11, tool_name="early", tool_call_id="c"),
        line("tool_result", timestamp=AT - 1e11 + 1, tool_name="early", tool_call_id="c"),
        line("agent_end", timestamp=AT + 0.001),
    ]
    assert main(["trace", written(tmp_path / "t", *lines), *view]) == 0
    assert max(map(len, capsys.readouterr().out.splitlines())) <= 120


def test_a_trace_that_does_not_tell_runs_apart_is_drawn_by_agents(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    below = {"agent_name": "Below", "parent_agent": "A", "delegation_depth": 1, "metadata": {}}
    lines = [
        line("agent_start", metadata={}),
        line("tool_call", tool_name="ask", tool_call_id="c", metadata={}),
        line("agent_start", **below),
        line("agent_end", **below, result="x"),
        line("tool_result", tool_name="ask", tool_call_id="c", metadata={}),
        line("agent_end", metadata={}, error="no"),
    ]
    assert main(["trace", written(tmp_path / "t", *lines)]) == 0
    rows = [row.split("  ")[0].rstrip() for row in capsys.readouterr().out.splitlines()[2:5]]
    assert rows == ["✗ A", "├─ ✓ ask", "└─ ✓ Below"]


@pytest.mark.parametrize(
    "show",
    [
        lambda reader: show_summary(reader, as_json=True),
        lambda reader: main(["trace", reader.path]),
        lambda reader: main(["trace", reader.path, "--compact"]),
    ],
    ids=["numbers", "trees", "runs"],
)
def test_the_memory_it_takes_does_not_grow_with_the_file(
    show: Callable[[TraceReader], object],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr("fractal.cli.trace.MOST_ROWS", 50)

    def peak(runs: int) -> int:
        path = tmp_path / f"{runs}"
        with open(path, "w") as file:
            for n in range(runs):
                for kind in ("agent_start", "tool_call", "tool_result", "agent_end"):
                    who = {"run_id": f"r{n}", "metadata": {"run": f"r{n}"}, "tool_name": "t", "tool_call_id": "c"}
                    file.write(json.dumps(line(kind, **who, result="x" * 500)) + "\n")
        tracemalloc.start()
        show(TraceReader(path))
        _, most = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        capsys.readouterr()
        return most

    peak(100)  # what is loaded once
    assert peak(1500) < peak(300) + 300_000


def test_a_reader_that_goes_away_is_no_error(file: Path) -> None:
    command = f"{sys.executable} -m fractal trace {file} --json | head -c 1"
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}
    done = subprocess.run(command, shell=True, capture_output=True, text=True, env=environment, timeout=60)
    assert (done.stdout, done.stderr) == ("{", "")
