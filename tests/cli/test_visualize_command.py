"""`fractal visualize`: which page it writes, of which files, and what it says of others."""

from __future__ import annotations

import json
import os
import stat
import subprocess
import sys
from pathlib import Path
from typing import Any

import anyio
import pytest

from fractal import BaseAgent
from fractal.cli import trace_files
from fractal.cli.main import main
from fractal.testing import ScriptedModel
from tests.pages import Scripts, told


def data_of(path: Path) -> dict[str, Any]:
    return Scripts(path.read_text(encoding="utf-8")).data


def written(path: Path, *kinds: str, run: str = "r") -> Path:
    lines = [told(kind, n, run_id=run, metadata={"run": run}).to_json() for n, kind in enumerate(kinds)]
    path.write_text("".join(f"{line}\n" for line in lines))
    return path


def test_a_page_is_written_for_its_owner(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    agent = BaseAgent("A", "a", client=ScriptedModel(["done"]), tracing_output_file=tmp_path / "trace.jsonl")
    assert anyio.run(agent.run, "go").success
    assert main(["visualize", str(tmp_path / "trace.jsonl"), "-o", str(tmp_path / "out.html")]) == 0
    assert capsys.readouterr() == ("", "")
    page = data_of(tmp_path / "out.html")["page"]
    assert page["title"] == "trace.jsonl"
    assert [(row["agent"], row["input"], row["block"]) for row in page["rows"]] == [("A", "go", 0)]
    assert stat.S_IMODE((tmp_path / "out.html").stat().st_mode) == 0o600


def test_without_a_file_the_page_goes_to_standard_output(tmp_path: Path):
    file = written(tmp_path / "t.jsonl", "agent_start", "agent_end")
    command = [sys.executable, "-m", "fractal", "visualize", str(file)]
    done = subprocess.run(command, capture_output=True, timeout=60, env={**os.environ, "PYTHONIOENCODING": "latin-1"})
    assert (done.returncode, done.stderr) == (0, b"")
    assert Scripts(done.stdout.decode()).data["page"]["rows"][0]["run_id"] == "r"


def test_a_terminal_gets_no_page(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    assert main(["visualize", str(written(tmp_path / "t.jsonl", "agent_start"))]) == 2
    assert "-o FILE" in capsys.readouterr().err


def test_a_directory_shows_the_runs_of_all_its_files(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    for name in "abc":
        written(tmp_path / f"{name}.jsonl", "agent_start", "agent_end")
    (tmp_path / "foreign.jsonl").write_text("hello\n")
    (tmp_path / "other.txt").write_text("hello\n")
    (tmp_path / "folder.jsonl").mkdir()
    os.mkfifo(tmp_path / "pipe.jsonl")
    assert main(["visualize", str(tmp_path), "-o", str(tmp_path / "out.html")]) == 0
    page = data_of(tmp_path / "out.html")["page"]
    assert sorted(row["source"] for row in page["rows"]) == ["a.jsonl", "b.jsonl", "c.jsonl"]
    [note] = page["notes"]
    assert note.startswith("foreign.jsonl: no line of it is an event of a trace")
    assert note in capsys.readouterr().err


def test_of_many_files_the_newest_are_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    monkeypatch.setattr(trace_files, "MOST_FILES", 2)
    for n in range(4):
        os.utime(written(tmp_path / f"{n}.jsonl", "agent_start"), (n, n))
    assert main(["visualize", str(tmp_path), "-o", str(tmp_path / "out.html")]) == 0
    assert {row["source"] for row in data_of(tmp_path / "out.html")["page"]["rows"]} == {"2.jsonl", "3.jsonl"}
    assert "of 4 files the newest 2 are read" in capsys.readouterr().err


def test_what_was_odd_about_a_file_is_said_and_stands_in_the_page(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    file = written(tmp_path / "t.jsonl", "agent_start")
    with file.open("a") as more:
        more.write('no json\n{"foreign": 1}\n{"timestamp": 17')
    assert main(["visualize", str(file), "-o", str(tmp_path / "out.html")]) == 0
    said = capsys.readouterr().err
    for note in data_of(tmp_path / "out.html")["page"]["notes"]:
        assert f"fractal visualize: {note}" in said
    assert "the last line is cut" in said


@pytest.mark.parametrize(
    ("content", "said"), [("", "the file is empty"), ("hello\n", "no line of it is an event"), (None, "No such file")]
)
def test_what_is_no_trace_is_wrong_use(
    content: str | None, said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    if content is not None:
        (tmp_path / "t.jsonl").write_text(content)
    assert main(["visualize", str(tmp_path / "t.jsonl"), "-o", str(tmp_path / "out.html")]) == 2
    assert said in capsys.readouterr().err
    assert not (tmp_path / "out.html").exists()


def test_a_directory_without_a_trace_is_wrong_use(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    assert main(["visualize", str(tmp_path), "-o", str(tmp_path / "out.html")]) == 2
    assert "no .jsonl file in it" in capsys.readouterr().err
    (tmp_path / "a.jsonl").write_text("")
    assert main(["visualize", str(tmp_path), "-o", str(tmp_path / "out.html")]) == 2
    assert "a.jsonl: the file is empty" in capsys.readouterr().err


def test_a_page_is_never_written_where_it_must_not_be(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    file = written(tmp_path / "t.jsonl", "agent_start")
    (tmp_path / "link").symlink_to(tmp_path / "elsewhere")
    before = file.read_text()
    for to, said in (
        (file, "that is the trace itself"),
        (tmp_path, "directory"),
        (tmp_path / "none" / "out.html", "no such directory"),
        (tmp_path / "link", "it is a link"),
    ):
        assert main(["visualize", str(file), "-o", str(to)]) == 2
        assert said in capsys.readouterr().err
    assert main(["visualize", str(tmp_path), "-o", str(file)]) == 2
    assert file.read_text() == before
    assert not (tmp_path / "elsewhere").exists()


def test_view_is_another_name_of_trace(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    file = written(tmp_path / "t.jsonl", "agent_start", "agent_end")
    told = []
    for name in ("view", "trace"):
        assert main([name, str(file), "--summary", "--json"]) == 0
        told.append(json.loads(capsys.readouterr().out))
    assert told[0] == told[1]
    assert main(["view", str(tmp_path / "none")]) == 2
    assert capsys.readouterr().err.startswith("fractal view: ")


def test_the_demo_writes_a_page_of_its_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    pytest.importorskip("rich")
    assert main(["demo", "--trace", str(tmp_path / "none" / "out.html")]) == 2
    assert "no such directory" in capsys.readouterr().err
    assert main(["demo", "--trace", str(tmp_path / "out.html")]) == 0
    assert "out.html" in capsys.readouterr().out.replace("\n", "")
    [row] = data_of(tmp_path / "out.html")["page"]["rows"]
    assert (row["agent"], row["agents"], row["reason"]) == ("Planner", 3, "finished")
