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
from fractal.cli.main import main
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
        "        super(type(self), self).__init__('Ready', lambda: 'open' if self.opened else 1 / 0, 'm-2', model)\n"
        "    async def __aenter__(self):\n"
        "        self.opened = True\n"
        "    async def __aexit__(self, *error):\n"
        "        self.opened = False\n"
        "class ReadyBlocking(fractal.sync.BaseAgent):\n"
        "    __init__, __aenter__, __aexit__ = Ready.__init__, Ready.__aenter__, Ready.__aexit__\n"
        "    opened = False\n",
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


@pytest.mark.parametrize("agent", ["plain", "blocking", "Ready", "ReadyBlocking"])
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
    assert err == "fractal run-many: 1 of 2 runs gave no answer\n  1 x model_error: HTTP 400: odd\n"


def test_why_runs_failed_is_counted_and_the_rarest_reasons_are_only_counted(
    project: Path, endpoint: Endpoint, capsys: pytest.CaptureFixture[str]
):
    def answer(request: Any) -> Any:
        return answers.failure(400, request.body["messages"][-1]["content"].partition(" ")[0])

    endpoint._source = answer
    lines = "".join(f"{letter}\x1b[2J {n}\n" for letter in "abcdefg" for n in range(ord(letter) - ord("a") + 1))
    assert run_many(write(project, lines), "-q") == 1
    assert capsys.readouterr().err.splitlines() == [
        "fractal run-many: 28 of 28 runs gave no answer",
        *(f"  {n} x model_error: HTTP 400: {letter} [2J" for letter, n in zip("gfedc", (7, 6, 5, 4, 3), strict=True)),
        "  and for 2 other reasons",
    ]


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
        ("x", ["-o", "inputs"], "inputs is the file of inputs: name another file for the results"),
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


@pytest.mark.parametrize("source", ["inputs", "-"])
@pytest.mark.parametrize(
    ("line", "options", "words"),
    [
        (b"\xff\xfe", [], "line 2 of inputs cannot be read: 'utf-8' codec can't decode byte 0xff"),
        (b"not", ["--jsonl"], "line 2 is not JSON: "),
        (b"null", ["--jsonl"], "line 2 is null: give text, an object or a list"),
        (b"[" * 100_000, ["--jsonl"], "line 2 is not JSON: nested too deeply"),
        (b"9" * 5000, ["--jsonl"], "line 2 is not JSON: Exceeds the limit"),
        (b"x" * 3000, [], "line 2 has more than 2000 characters"),
        (b"x" * 2001 + b"y" * 2001, [], "line 2 has more than 2000 characters"),
    ],
    ids=lambda value: str(value)[:20],
)
def test_a_line_that_is_no_input_has_a_line_that_says_so_and_the_others_are_answered(
    source: str,
    line: bytes,
    options: list[str],
    words: str,
    project: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
):
    monkeypatch.setattr("fractal.cli.batch._LONGEST_LINE", 2000 if "2000" in words else 2**20)
    (project / "inputs").write_bytes(b'"one"\n' + line + b'\n"three"\n')
    if source == "-":
        words = words.replace("inputs", "-")
        descriptor = os.open(project / "inputs", os.O_RDONLY)
        before = os.dup(0)
        os.dup2(descriptor, 0)
        os.close(descriptor)
    try:
        assert run_many(source, "-q", *options) == 2
    finally:
        if source == "-":
            os.dup2(before, 0)
            os.close(before)
    out, err = capsys.readouterr()
    assert err.startswith(f"fractal run-many: {words}")
    found = records(out)
    assert [record["index"] for record in found] == [0, 1, 2]
    results = [AgentResult.model_validate(record["result"]) for record in found]
    assert [result.success for result in results] == [True, False, True]
    assert (results[1].error or "").startswith(words)
    assert (results[1].agent_name, results[1].stop_reason) == ("Plain", "error")


def test_a_line_that_is_no_input_may_end_it(project: Path, endpoint: Endpoint, capsys: pytest.CaptureFixture[str]):
    path = write(project, '"one"\nnot\n"three"\n')
    assert run_many(path, "-q", "--jsonl", "--on-error", "fail_fast", "--max-concurrency", "1") == 2
    out, err = capsys.readouterr()
    assert err.startswith("fractal run-many: line 2 is not JSON: ")
    assert [record["input"] for record in records(out)] == ["one"]


def test_a_result_that_cannot_be_written_ends_nothing(
    project: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    dump = AgentResult.model_dump

    def fail(result: AgentResult, **options: Any) -> Any:
        if "two" in str(result.content):
            raise OSError("it is broken")
        return dump(result, **options)

    monkeypatch.setattr(AgentResult, "model_dump", fail)
    assert run_many(write(project, "one\ntwo\nthree\n"), "-q") == 0
    found = records(capsys.readouterr().out)
    assert [record["result"]["success"] for record in found] == [True, False, True]
    assert found[1]["result"]["error"] == "the result cannot be written: it is broken"


# ---- a file of answers that is there


def test_a_file_of_answers_is_never_overwritten(project: Path, endpoint: Endpoint, capsys: pytest.CaptureFixture[str]):
    path = write(project, "one\n")
    (project / "results").write_text("precious")
    assert run_many(path, "-q", "-o", "results") == 2
    assert "results is there already: --append adds to it, --resume leaves out" in capsys.readouterr().err
    assert (project / "results").read_text() == "precious"
    for flag in ("--append", "--resume"):
        assert run_many(path, "-q", flag) == 2
        assert f"{flag} is for a file: name it with -o" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        run_many(path, "-o", "results", "--append", "--resume")
    assert not endpoint.requests


def inputs_of(path: Path) -> list[tuple[int, Any, bool]]:
    found = [json.loads(line) for line in path.read_text("utf-8").splitlines() if line.endswith("}")]
    return [(record["index"], record["input"], record["result"]["success"]) for record in found]


@pytest.mark.parametrize("flag", ["--append", "--resume"])
def test_a_file_that_is_not_there_is_made(flag: str, project: Path):
    assert run_many(write(project, "one\n"), "-q", "-o", "results", flag) == 0
    assert inputs_of(project / "results") == [(0, "one", True)]


def test_results_are_added(project: Path):
    path = write(project, "one\n")
    assert run_many(path, "-q", "-o", "results") == 0
    assert run_many(path, "-q", "-o", "results", "--append") == 0
    assert inputs_of(project / "results") == [(0, "one", True)] * 2


def test_a_batch_goes_on_where_it_was_interrupted(
    project: Path, endpoint: Endpoint, capsys: pytest.CaptureFixture[str]
):
    path, order = write(project, "one\nbad\ntwo\ntwo\n"), ("--max-concurrency", "1")
    assert run_many(path, "-q", "-o", "results", *order) == 1
    lines = (project / "results").read_text("utf-8").splitlines(keepends=True)
    (project / "results").write_text("".join(lines[:3]) + lines[3][:40], "utf-8")  # it was cut in the fourth
    endpoint._source = lambda request: answers.text("now")
    asked = len(endpoint.requests)
    write(project, "new\none\nbad\ntwo\ntwo\n")
    assert run_many(path, "-o", "results", "--resume", *order) == 0
    assert re.search(r"^fractal: 3 of 3 done", capsys.readouterr().err, re.MULTILINE)
    assert [request.body["messages"][-1]["content"] for request in endpoint.requests[asked:]] == ["new", "bad", "two"]
    assert inputs_of(project / "results")[:3] == [(0, "one", True), (1, "bad", False), (2, "two", True)]
    assert inputs_of(project / "results")[-3:] == [(0, "new", True), (2, "bad", True), (4, "two", True)]
    asked = len(endpoint.requests)
    assert run_many(path, "-q", "-o", "results", "--resume") == 0
    assert len(endpoint.requests) == asked  # the cut line disturbs nobody


def test_inputs_are_known_by_what_they_are_and_not_by_how_they_are_written(project: Path, endpoint: Endpoint):
    path = write(project, '{"a": 1, "b": "\u202eé"}\n"\\ud800"\n')
    assert run_many(path, "-q", "-o", "results", "--jsonl") == 0
    write(project, '{"b":"\\u202e\\u00e9","a":1}\n"\\ud800"\n[1]\n')
    assert run_many(path, "-q", "-o", "results", "--jsonl", "--resume") == 0
    assert len(endpoint.requests) == 3
    assert inputs_of(project / "results")[-1][:2] == (2, [1])


def test_a_file_with_something_else_is_not_gone_on_with(project: Path, capsys: pytest.CaptureFixture[str]):
    path = write(project, "one\n")
    (project / "results").write_text('my diary\n{"input": 1}')
    assert run_many(path, "-q", "-o", "results", "--resume") == 2
    assert "results holds no results of run-many" in capsys.readouterr().err
    assert (project / "results").read_text() == 'my diary\n{"input": 1}'


@pytest.mark.skipif(sys.platform == "win32", reason="modes and links are others there")
def test_answers_are_for_their_owner_and_go_through_no_link(project: Path, capsys: pytest.CaptureFixture[str]):
    path = write(project, "one\n")
    assert run_many(path, "-q", "-o", "results") == 0
    assert (project / "results").stat().st_mode & 0o777 == 0o600
    (project / "results").chmod(0o640)
    assert run_many(path, "-q", "-o", "results", "--append") == 0
    assert (project / "results").stat().st_mode & 0o777 == 0o640
    (project / "victim").write_text("precious")
    os.mkfifo(project / "pipe")
    for name, to in (("link", "victim"), ("dangling", "nowhere"), ("source", "inputs")):
        (project / name).symlink_to(to)
    for name, words in (("link", "it is a link"), ("dangling", "it is a link"), ("pipe", "it is no regular file")):
        for flag in ([], ["--append"], ["--resume"]):
            assert run_many(path, "-q", "-o", name, *flag) == 2
            err = capsys.readouterr().err
            assert (words if flag else "is there already") in err
    assert run_many(path, "-q", "-o", "source", "--append") == 2
    assert "is the file of inputs: name another file" in capsys.readouterr().err
    assert (project / "victim").read_text() == "precious"
    assert not (project / "nowhere").exists()


def test_json_has_escapes_for_what_steers_a_terminal_wherever_it_goes(
    project: Path, capsys: pytest.CaptureFixture[str]
):
    path = write(project, "a\x1b[2J\x9b\u202e\u200b\x7f é\n")
    assert run_many(path, "-q", "-o", "results") == 0
    assert run_many(path, "-q") == 0
    for text in (capsys.readouterr().out, (project / "results").read_text("utf-8")):
        assert text[:-1].isprintable()
        assert json.loads(text)["input"] == "a\x1b[2J\x9b\u202e\u200b\x7f é"


def test_what_cannot_be_read_is_told(project: Path, capsys: pytest.CaptureFixture[str]):
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
    write(project, "à € 😀\x7f\n")
    done = subprocess.run(
        command("inputs", "-q"), env=environment(PYTHONIOENCODING="latin-1"), capture_output=True, timeout=30
    )
    assert done.stderr == b""
    assert json.loads(done.stdout.decode("ascii"))["input"] == "à € 😀\x7f"
    assert b"\x7f" not in done.stdout


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
