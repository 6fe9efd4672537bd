"""`fractal trace --follow` and directories: a file that grows while it is shown, and the runs of several files."""

from __future__ import annotations

import io
import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("rich")

from fractal._concurrency.owners import Owner, this_process
from fractal._views import flow
from fractal._views.terminal import UNICODE
from fractal.cli import trace, trace_follow
from fractal.cli.main import main
from fractal.cli.which_agent import WrongUse
from tests.pages import AT, told


def line(kind: str, at: float = 0.0, **values: Any) -> str:
    return told(kind, at, **values).to_json() + "\n"


STARTED = line("agent_start", arguments={"user_input": "go"})
ENDED = line("agent_end", 5, metadata={"success": True})


@pytest.fixture
def growing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Path]:
    """A file that gets the next of some pieces whenever somebody waits for more; Ctrl-C comes after the last one."""

    def grow(*pieces: str | Callable[[Path], object]) -> Path:
        path, waiting = tmp_path / "t.jsonl", iter(pieces)

        def sleep(seconds: float) -> None:
            piece = next(waiting, None)
            if piece is None:
                raise KeyboardInterrupt
            if isinstance(piece, str):
                with path.open("a") as file:
                    file.write(piece)
            else:
                piece(path)

        monkeypatch.setattr(trace_follow.time, "sleep", sleep)
        return path

    return grow


class Terminal(io.StringIO):
    """A terminal that keeps what it was sent."""

    def isatty(self) -> bool:
        return True


def kinds(path: Path, run_id: str = "") -> list[str]:
    found = list[str]()
    with suppress(KeyboardInterrupt):  # when there are no more pieces
        for event in trace_follow.followed(str(path), run_id):
            found.append(event.event_type)
    return found


def test_events_come_as_they_are_written_until_the_run_has_ended(growing: Callable[..., Path]) -> None:
    who: Any = {"agent_name": "B", "delegation_depth": 1, "metadata": {"run": "b"}}
    below = [line(kind, **who) for kind in ("agent_start", "agent_end")]
    call = line("tool_call", 1, tool_name="t")
    pieces = ["", STARTED[:20], STARTED[20:] + call[:-1], "\n" + "".join(below), ENDED, line("warning")]
    assert kinds(growing(*pieces)) == ["agent_start", "tool_call", "agent_start", "agent_end", "agent_end"]


def test_of_several_runs_the_last_end_is_waited_for(growing: Callable[..., Path]) -> None:
    other = [line(kind, run_id="s", metadata={"run": "s"}) for kind in ("agent_start", "agent_end")]
    assert len(kinds(growing(STARTED + other[0], ENDED, other[1], "never read"))) == 4


def test_only_the_runs_that_are_wanted_are_followed(growing: Callable[..., Path]) -> None:
    other = line("agent_start", run_id="s", metadata={"run": "s"})
    assert kinds(growing(STARTED + other, ENDED), run_id="r") == ["agent_start", "agent_end"]


def test_ctrl_c_ends_it_before(growing: Callable[..., Path], capsys: pytest.CaptureFixture[str]) -> None:
    path = growing(STARTED + line("tool_call", 1, tool_name="t"))
    assert main(["trace", str(path), "--follow"]) == 0
    told, complaints = capsys.readouterr()
    assert [text.split("→ ")[1] for text in told.splitlines()[1:]] == ["begins  go", "t"]
    assert complaints == ""


def test_ctrl_c_ends_a_tree_too_wherever_it_comes(
    growing: Callable[..., Path], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from rich.console import Console

    console = Console(file=Terminal(), force_terminal=True, width=80, color_system=None)
    trace_follow.follow(str(growing(STARTED)), "", console)
    assert "unfinished" in console.file.getvalue()  # type: ignore[attr-defined]

    def interrupted(*_: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(trace.Trees, "take", interrupted)
    trace_follow.follow(str(growing()), "", console)
    assert capsys.readouterr().err == ""


def test_a_file_in_its_place_is_read_from_the_beginning(growing: Callable[..., Path]) -> None:
    other = STARTED.replace('"go"', '"other"')
    replaced = growing(STARTED + line("warning"), lambda path: path.write_text(other), ENDED)
    assert kinds(replaced) == ["agent_start", "warning", "agent_start", "agent_end"]


def test_lines_that_are_no_events_are_passed_over(
    growing: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("fractal.tracing.read._LONGEST_LINE", 5000)
    endless = "x" * 20_000
    assert kinds(growing("no json\n", STARTED, endless, endless, "\n{}\n" + ENDED)) == ["agent_start", "agent_end"]


def test_in_a_terminal_the_tree_grows(
    growing: Callable[..., Path], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from rich.console import Console

    monkeypatch.setenv("TERM", "xterm")
    console = Console(file=Terminal(), force_terminal=True, width=80, height=24, highlight=False, color_system=None)
    hostile = "\x1b[2Jgone [bold]x"
    call = line("tool_call", 1, tool_name=hostile, tool_call_id="c")
    done = line("tool_result", 2, tool_name=hostile, tool_call_id="c", result="x")
    trace_follow.follow(str(growing(STARTED, call, done, ENDED)), "", console)
    sent = console.file.getvalue()  # type: ignore[attr-defined]
    assert "side by side now: 1" in sent
    assert "✓ A  go" in sent.splitlines()[-7]
    assert "\x1b[2J" not in sent
    assert "[bold]x" in sent
    assert capsys.readouterr().out.startswith("run r, ")


def test_errors_are_told_as_they_come(growing: Callable[..., Path], capsys: pytest.CaptureFixture[str]) -> None:
    path = growing(STARTED, line("error", error="Boom"), ENDED)
    assert main(["trace", str(path), "--follow", "--errors", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["error"] == "Boom"


@pytest.mark.parametrize("view", ["--summary", "--compact", "--hierarchy", "--json"])
def test_what_has_no_end_cannot_be_followed(view: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["trace", str(tmp_path), "--follow", view]) == 2
    assert "--follow" in capsys.readouterr().err


def test_a_directory_or_a_pipe_cannot_be_followed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["trace", str(tmp_path), "--follow", "--flow"]) == 2
    assert "this is a directory" in capsys.readouterr().err
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(WrongUse, match="no regular file"):
        kinds(tmp_path / "pipe")


# ---- programs that have ended


def of_process(owner: Owner, **values: Any) -> str:
    metadata = {"process": asdict(owner), "run": values.get("run_id", "r")}
    return line("agent_start", arguments={"user_input": "go"}, metadata=metadata, **values)


@pytest.fixture
def ended_process() -> Owner:
    process = subprocess.Popen([sys.executable, "-c", ""])
    process.wait()
    return replace(this_process(), pid=process.pid, born="1")


def test_a_run_whose_process_is_gone_is_waited_for_no_longer(
    growing: Callable[..., Path], ended_process: Owner, capsys: pytest.CaptureFixture[str]
) -> None:
    path = growing(of_process(ended_process), line("tool_call", 1, tool_name="t"), "never read")
    assert main(["trace", str(path), "--follow"]) == 1
    told, complaints = capsys.readouterr()
    assert told.splitlines()[1].endswith("begins  go")
    assert f"has ended before the run had: r (process {ended_process.pid})" in complaints


def test_in_a_terminal_its_tree_is_drawn_all_the_same(growing: Callable[..., Path], ended_process: Owner) -> None:
    from rich.console import Console

    console = Console(file=Terminal(), force_terminal=True, width=80, color_system=None)
    with pytest.raises(trace_follow.RunsLost):
        trace_follow.follow(str(growing(of_process(ended_process), "")), "", console)
    assert "unfinished" in console.file.getvalue()  # type: ignore[attr-defined]


def test_the_other_runs_are_waited_for(growing: Callable[..., Path], ended_process: Owner) -> None:
    other = of_process(this_process(), run_id="s")
    path = growing(of_process(ended_process) + other, "", ENDED.replace('"r"', '"s"'), "never read")
    with pytest.raises(trace_follow.RunsLost, match=r"the run had: r \("):
        kinds(path)


def test_a_run_that_another_process_goes_on_with_is_not_lost(
    growing: Callable[..., Path], ended_process: Owner
) -> None:
    other = of_process(this_process(), run_id="s")
    path = growing(
        of_process(ended_process) + other, "", of_process(this_process()), ENDED + ENDED.replace('"r"', '"s"')
    )
    assert len(kinds(path)) == 5


def test_the_last_lines_of_a_process_that_is_gone_count(growing: Callable[..., Path], ended_process: Owner) -> None:
    assert kinds(growing(of_process(ended_process) + ENDED)) == ["agent_start", "agent_end"]


@pytest.mark.parametrize("host", ["here", "elsewhere", "not told"])
def test_that_nothing_comes_is_said_once_where_nobody_knows_why(
    host: str, growing: Callable[..., Path], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(trace_follow, "QUIET", -1.0)
    elsewhere = replace(this_process(), host="elsewhere")
    start = {"here": of_process(this_process()), "elsewhere": of_process(elsewhere), "not told": STARTED}[host]
    assert main(["trace", str(growing(start, "", "")), "--follow"]) == 0
    assert capsys.readouterr().err.count("nothing has come") == (host != "here")


@pytest.mark.parametrize("process", [7, {}, {"host": "a", "pid": -1, "born": ""}, {"host": 1, "pid": 1, "born": "1"}])
def test_a_process_that_makes_no_sense_is_none(process: Any, growing: Callable[..., Path]) -> None:
    path = growing(line("agent_start", metadata={"process": process}), ENDED)
    assert kinds(path) == ["agent_start", "agent_end"]


KILLED = """
import os, signal, sys
from fractal import BaseAgent
from fractal.testing import ScriptedModel, answers

def die() -> str:
    agent.tracing.flush()
    os.kill(os.getpid(), signal.SIGKILL)

agent = BaseAgent("A", "a", client=ScriptedModel([answers.call("die")]), tracing_output_file=sys.argv[1])
agent.add_tool(die).run_sync("go")
"""


@pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="nothing is killed so here")
def test_a_killed_program_is_told_from_one_that_thinks_and_all_viewers_show_where_it_was(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path, page = str(tmp_path / "t.jsonl"), tmp_path / "t.html"
    subprocess.run([sys.executable, "-c", KILLED, path], check=False, timeout=60)
    command = [sys.executable, "-m", "fractal", "trace", path, "--follow", "--flow"]
    done = subprocess.run(command, check=False, timeout=60, capture_output=True, encoding="utf-8")
    assert (done.returncode, "→ die" in done.stdout) == (1, True)
    assert "has ended before the run had" in done.stderr
    for view in (["trace", path], ["trace", path, "--hierarchy"], ["trace", "export", "--format", "perfetto", path]):
        assert main(view) == 0
        assert "unfinished" in capsys.readouterr().out
    assert main(["trace", "export", "--format", "otlp", path]) == 0
    assert capsys.readouterr().out.count("fractal.unfinished") == 2
    assert main(["visualize", path, "-o", str(page)]) == 0
    [run] = re.findall(r'id="run-0">(.*?)</script>', page.read_text())
    spans, names = (json.loads(run)[part] for part in ("spans", "names"))
    ends = {names[name]: names[outcome] for name, outcome in zip(spans["name"], spans["outcome"], strict=True)}
    assert (ends["A"], ends["die"]) == ("unfinished", "unfinished")


# ---- directories


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for n, name in enumerate(("old", "new")):
        run = {"run_id": f"{name}-run", "metadata": {"run": f"{name}-run"}}
        start = line("agent_start", n, arguments={"user_input": f"a {name} question"}, **run)
        (tmp_path / f"{name}.jsonl").write_text(start + line("error", n, error=f"{name} error", **run))
        os.utime(tmp_path / f"{name}.jsonl", (AT + n, AT + n))
    (tmp_path / "foreign.jsonl").write_text("hello\n")
    (tmp_path / "other.txt").write_text("hello\n")
    return tmp_path


def test_the_runs_of_a_directory_are_listed(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["trace", str(folder)]) == 0
    told, complaints = capsys.readouterr()
    assert [row.split()[2] for row in told.splitlines()[1:]] == ["old-run", "new-run"]
    assert ["old.jsonl" in row and "a old" in row for row in told.splitlines()] == [False, True, False]
    assert complaints.startswith("fractal trace: foreign.jsonl: no line of it is an event of a trace")


def test_other_views_take_all_its_files(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["trace", str(folder), "--errors"]) == 0
    assert [row.partition("A: ")[2] for row in capsys.readouterr().out.splitlines()] == ["old error", "new error"]
    assert main(["trace", str(folder), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["runs"] == 2
    assert main(["trace", str(folder), "--hierarchy", "--run", "new"]) == 0
    assert capsys.readouterr().out.startswith("run new-run")
    assert main(["trace", str(folder), "--compact", "--json"]) == 0
    assert [json.loads(row)["source"] for row in capsys.readouterr().out.splitlines()] == ["old.jsonl", "new.jsonl"]


def test_of_very_many_runs_the_newest_are_listed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(trace, "MOST_ROWS", 3)
    runs = [line("agent_start", n, run_id=f"r{n}", metadata={"run": f"r{n}"}) for n in range(9)]
    (tmp_path / "t.jsonl").write_text("".join([*runs, line("warning", 10, run_id="r0", metadata={"run": "r0"})]))
    assert main(["trace", str(tmp_path / "t.jsonl"), "--compact"]) == 0
    told = capsys.readouterr().out
    assert told.startswith("6 older runs are not shown")
    assert [row.split()[2] for row in told.splitlines()[3:]] == ["r6", "r7", "r8"]


def test_a_directory_without_a_trace_is_wrong_use(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "foreign.jsonl").write_text("hello\n")
    assert main(["trace", str(tmp_path)]) == 2
    assert "no file in it is a trace\n  foreign.jsonl: no line" in capsys.readouterr().err


def test_lines_of_any_number_of_runs_take_bounded_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(flow, "_MOST_RUNS", 3)
    lines = flow.Flow(UNICODE, 80)
    shown = [str(each) for n in range(9) for each in lines.lines(told("agent_start", n, run_id=f"r{n}"))]
    assert len(shown) == 18
    assert [*lines._began] == ["r6", "r7", "r8"]
