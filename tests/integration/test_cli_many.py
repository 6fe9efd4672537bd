"""`fractal run-many`: inputs line by line, results as JSON lines, a bar on standard error."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import fractal
from fractal import AgentResult
from fractal.cli import main
from fractal.testing import Endpoint, answers

ROOT = Path(fractal.__file__).parents[1]


def environment(**more: str) -> dict[str, str]:
    changing = ("OPENAI_", "NO_COLOR", "FORCE_COLOR", "COLUMNS", "TTY_COMPATIBLE", "TERM")
    kept = {name: value for name, value in os.environ.items() if not name.startswith(changing)}
    kept.pop("PYTHONUNBUFFERED", None)
    return {**kept, "PYTHONPATH": str(ROOT), "PYTHONIOENCODING": "utf-8", **more}


@pytest.fixture
def endpoint() -> Iterator[Endpoint]:
    def answer(request: Any) -> Any:
        text = request.body["messages"][-1]["content"]
        if "hang" in text:
            return answers.hang()
        return answers.failure(400, "odd") if "bad" in text else answers.text(f"heard: {text}")

    with Endpoint(answer) as endpoint:
        yield endpoint


@pytest.fixture
def project(tmp_path: Path, endpoint: Endpoint, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The current directory, with a module of agents in it."""
    (tmp_path / "many_agents.py").write_text(
        "import fractal.sync\n"
        "from fractal import BaseAgent, OpenAIModel\n"
        f"model = OpenAIModel(base_url={endpoint.url!r}, api_key='k')\n"
        "plain = BaseAgent('Plain', 'You repeat.', 'm-1', model)\n"
        "blocking = fractal.sync.BaseAgent('Blocking', 'You block.', 'm-1', model)\n"
        "class Ready(BaseAgent):\n"
        "    opened = False\n"
        "    def __init__(self):\n"
        "        super().__init__('Ready', lambda: 'open' if self.opened else 1 / 0, 'm-2', model)\n"
        "    async def __aenter__(self):\n"
        "        self.opened = True\n"
        "    async def __aexit__(self, *error):\n"
        "        self.opened = False\n",
        encoding="utf-8",
    )
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [entry for entry in sys.path if entry])
    yield tmp_path
    sys.modules.pop("many_agents", None)


def run_many(*arguments: str, agent: str = "plain") -> int:
    return main(["run-many", *arguments, "--agent", f"many_agents:{agent}"])


def command(*arguments: str) -> list[str]:
    return [sys.executable, "-m", "fractal", "run-many", *arguments, "--agent", "many_agents:plain"]


def write(project: Path, text: str) -> str:
    (project / "inputs").write_bytes(text.encode())
    return "inputs"


def records(text: str) -> list[dict[str, Any]]:
    return sorted(map(json.loads, text.splitlines()), key=lambda record: record["index"])


@pytest.mark.parametrize("agent", ["plain", "blocking", "Ready"])
@pytest.mark.parametrize("backend", ["asyncio", "trio"])
def test_each_line_is_answered_by_a_line_of_json(
    agent: str, backend: str, project: Path, capsys: pytest.CaptureFixture[str]
):
    path = write(project, "\ufeffone\r\n\n  \ntwo à\nthree")
    assert run_many(path, "--backend", backend, agent=agent) == 0
    out, err = capsys.readouterr()
    found = records(out)
    assert [(record["index"], record["input"]) for record in found] == [(0, "one"), (1, "two à"), (2, "three")]
    results = [AgentResult.model_validate(record["result"]) for record in found]
    assert [result.content for result in results] == ["heard: one", "heard: two à", "heard: three"]
    assert [message["role"] for message in results[0].messages] == ["user", "assistant"]
    assert "messages" not in found[0]["result"]["metadata"]
    assert re.fullmatch(r"fractal: 3 of 3 done, \S+, in 0:\d\d\n", err)


def test_lines_may_be_json(project: Path, capsys: pytest.CaptureFixture[str]):
    assert run_many(write(project, '"one"\n{"a": 1}\n'), "--jsonl", "--quiet") == 0
    out, err = capsys.readouterr()
    assert [record["input"] for record in records(out)] == ["one", {"a": 1}]
    assert [record["result"]["content"] for record in records(out)] == ["heard: one", 'heard: {"a":1}']
    assert err == ""


def test_results_go_to_a_file(project: Path, capsys: pytest.CaptureFixture[str]):
    assert run_many(write(project, "one\n"), "-q", "-o", "results.jsonl") == 0
    assert capsys.readouterr() == ("", "")
    assert records((project / "results.jsonl").read_text(encoding="utf-8"))[0]["result"]["content"] == "heard: one"


def test_runs_without_an_answer_are_results_and_tell_the_status(project: Path, capsys: pytest.CaptureFixture[str]):
    assert run_many(write(project, "one\nbad\n"), "-q") == 1
    out, err = capsys.readouterr()
    assert [record["result"]["success"] for record in records(out)] == [True, False]
    assert err == "fractal run-many: 1 of 2 runs gave no answer\n"


def test_the_first_failure_may_end_it(project: Path, endpoint: Endpoint, capsys: pytest.CaptureFixture[str]):
    path = write(project, "one\nbad\nthree\n")
    assert run_many(path, "-q", "--on-error", "fail_fast", "--max-concurrency", "1") == 1
    out, err = capsys.readouterr()
    assert [record["input"] for record in records(out)] == ["one"]
    assert err == "fractal run-many: StatusError: HTTP 400: odd; this was input 1 of a batch, counted from 0\n"
    assert len(endpoint.requests) == 2


def test_so_many_run_at_a_time(project: Path, endpoint: Endpoint, capsys: pytest.CaptureFixture[str]):
    endpoint._latency = 0.05
    assert run_many(write(project, "x\n" * 12), "-q", "--max-concurrency", "3") == 0
    assert endpoint.max_in_flight == 3


def test_options_are_those_of_each_run(project: Path, capsys: pytest.CaptureFixture[str]):
    assert run_many(write(project, "hang\n"), "-q", "--timeout", "0.1") == 1
    assert records(capsys.readouterr().out)[0]["result"]["stop_reason"] == "deadline"


@pytest.mark.parametrize(
    ("text", "options", "words"),
    [
        (None, [], "inputs: No such file or directory"),
        ("x", ["-o", "no/such/place"], "no/such/place: No such file or directory"),
        ("x", ["-o", "inputs"], "inputs is read: name another file for the results"),
        ('"x"\nnot\n', ["--jsonl"], "line 2 is not JSON: "),
        ("\nnull\n", ["--jsonl"], "line 2 is null: give text, an object or a list"),
    ],
)
def test_wrong_use_is_told(
    text: str | None, options: list[str], words: str, project: Path, capsys: pytest.CaptureFixture[str]
):
    if text is not None:
        write(project, text)
    assert run_many("inputs", "-q", *options) == 2
    assert capsys.readouterr().err.startswith(f"fractal run-many: {words}")
    if text is not None:
        assert (project / "inputs").read_text() == text


def test_what_is_no_text_is_told(project: Path, capsys: pytest.CaptureFixture[str]):
    (project / "inputs").write_bytes(b"\xff\xfe\n")
    assert run_many("inputs", "-q") == 2
    assert "inputs cannot be read: 'utf-8' codec can't decode" in capsys.readouterr().err
    assert run_many(".", "-q") == 2
    assert "Is a directory" in capsys.readouterr().err


@pytest.mark.parametrize("count", ["0", "-1", "x"])
def test_the_number_of_runs_is_one_or_more(count: str, project: Path, capsys: pytest.CaptureFixture[str]):
    with pytest.raises(SystemExit) as ended:
        run_many("inputs", "--max-concurrency", count)
    assert ended.value.code == 2
    assert "--max-concurrency" in capsys.readouterr().err


@pytest.mark.parametrize("backend", ["asyncio", "trio"])
def test_an_answer_is_written_while_standard_input_goes_on_and_ctrl_c_ends_it(
    backend: str, project: Path, endpoint: Endpoint
):
    process = subprocess.Popen(
        command("-", "--backend", backend, "-q"),
        env=environment(),
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        encoding="utf-8",
    )
    assert process.stdin is not None
    assert process.stdout is not None
    try:
        for text in ("one", "two"):
            process.stdin.write(f"{text}\n")
            process.stdin.flush()
            assert json.loads(process.stdout.readline())["result"]["content"] == f"heard: {text}"
        process.stdin.write("hang\n")
        process.stdin.flush()
        endpoint.wait_for_requests(3)
        if sys.platform != "win32":
            # Nothing says that there are no more lines, and still it ends.
            process.send_signal(signal.SIGINT)
            process.wait(10)
            assert process.stderr is not None
            assert (process.returncode, process.stderr.read()) == (130, "fractal run-many: interrupted\n")
            endpoint.wait_for_disconnects(1)
    finally:
        process.kill()
        process.communicate()


def test_whoever_is_slow_to_read_the_output_holds_no_run_that_is_under_way(project: Path, endpoint: Endpoint):
    write(project, f"{'x' * 300_000}\n" + "short\n" * 5)  # more than a pipe takes
    process = subprocess.Popen(
        command("inputs", "-q", "--max-concurrency", "1"), env=environment(), stdout=subprocess.PIPE, encoding="utf-8"
    )
    try:
        endpoint.wait_for_requests(6, timeout=20)
        assert process.stdout is not None
        assert [record["index"] for record in records(process.stdout.read())] == list(range(6))
        assert process.wait(10) == 0
    finally:
        process.kill()
        process.communicate()


def test_standard_input_that_ends_ends_it(project: Path):
    done = subprocess.run(
        command("-"), env=environment(), input="one\ntwo\n", capture_output=True, encoding="utf-8", timeout=30
    )
    assert [record["input"] for record in records(done.stdout)] == ["one", "two"]
    assert re.fullmatch(r"fractal: 2 done, \S+, in 0:\d\d\n", done.stderr)
    assert done.returncode == 0


def test_an_output_that_lacks_a_character_gets_json_all_the_same(project: Path):
    write(project, "à € 😀\n")
    done = subprocess.run(
        command("inputs", "-q"), env=environment(PYTHONIOENCODING="latin-1"), capture_output=True, timeout=30
    )
    assert done.stderr == b""
    assert json.loads(done.stdout.decode("ascii"))["input"] == "à € 😀"


@pytest.mark.skipif(sys.platform == "win32", reason="there are no pseudo terminals")
def test_on_a_terminal_there_is_a_bar_and_results_go_above_it(project: Path):
    pytest.importorskip("rich")
    import fcntl
    import pty
    import struct
    import termios

    write(project, "one\nesc\x1b[2J\x9b2J\n")
    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 50, 500, 0, 0))
    process = subprocess.Popen(
        command("inputs"), env=environment(TERM="xterm-256color"), stdin=theirs, stdout=theirs, stderr=theirs
    )
    os.close(theirs)
    pieces = bytearray()
    try:
        while piece := os.read(ours, 65536):
            pieces += piece
    except OSError:  # how Linux says that nobody writes any more
        pass
    os.close(ours)
    assert process.wait(10) == 0
    shown = re.sub(r"\x1b\[[\d;]*m", "", pieces.decode())
    assert '"content":"heard: one"' in shown
    assert "\x1b[2J" not in shown
    assert "\x9b" not in shown
    assert re.search(r"━━━ 2 of 2 done, \S+, in 0:\d\d\r\n", shown)
