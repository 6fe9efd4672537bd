"""The command line: what it prints, where, and with which exit status."""

import io
import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Literal

import anyio
import pydantic
import pytest

import fractal
from fractal import AgentResult, BaseAgent, OpenAIModel
from fractal.cli.main import main
from fractal.testing import answers
from fractal.testing.endpoint import Endpoint

pytest.importorskip("rich")

from rich.console import Console

from fractal._views.terminal import UNICODE, live_table, timeline
from fractal._views.tree import Part, RunTree
from tests.odd import EXCEPTIONS

BACKENDS = ["asyncio", "trio"]
ROOT = Path(fractal.__file__).parents[1]
CHANGES_THE_OUTPUT = {"NO_COLOR", "FORCE_COLOR", "COLUMNS", "TTY_COMPATIBLE", "TERM"}


def clean_environment(**more: str) -> dict[str, str]:
    kept = {
        name: value
        for name, value in os.environ.items()
        if not name.startswith("OPENAI_") and name not in CHANGES_THE_OUTPUT
    }
    return {**kept, "PYTHONPATH": str(ROOT), "PYTHONIOENCODING": "utf-8", **more}


def fractal_command(*arguments: str, cwd: Path | None = None, stdin: str = "", **more: str):
    return subprocess.run(
        [sys.executable, "-m", "fractal", *arguments],
        cwd=cwd,
        input=stdin,
        env=clean_environment(**more),
        capture_output=True,
        encoding="utf-8",
        timeout=50,
    )


@pytest.fixture
def endpoint() -> Iterator[Endpoint]:
    def answer(request):
        last = request.body["messages"][-1]
        if request.body.get("tools") and last["role"] == "user":
            return answers.call("shout", {"text": last["content"]})
        return f"{request.body['model']} heard: {last['content']}"

    with Endpoint(answer) as endpoint:
        yield endpoint


@pytest.fixture
def project(tmp_path: Path, endpoint: Endpoint) -> Path:
    """A directory with a module of agents, as a user would have one."""
    (tmp_path / "project_agents.py").write_text(
        f"""
import dataclasses
import fractal.sync
from fractal import BaseAgent, OpenAIModel, tool

model = OpenAIModel(base_url={endpoint.url!r})

@tool(terminate=True)
def shout(text: str) -> dict:
    return {{"loud": text.upper()}}

plain = BaseAgent("Plain", "You repeat.", "m-1", model)
loud = BaseAgent("Loud", "You shout.", "m-1", model).add_tool(shout)

class Ready(BaseAgent):
    opened = False

    def __init__(self):
        super(type(self), self).__init__("Ready", lambda: "open" if self.opened else 1 / 0, "m-2", model)

    async def __aenter__(self):
        self.opened = True

    async def __aexit__(self, *error):
        self.opened = False

class ReadyBlocking(fractal.sync.BaseAgent):
    __init__, __aenter__, __aexit__ = Ready.__init__, Ready.__aenter__, Ready.__aexit__
    opened = False

class Needy(BaseAgent):
    def __init__(self, pool):
        raise AssertionError

def make():
    return plain

def broken_factory():
    raise LookupError("no such pool")

class Blocking(fractal.sync.BaseAgent):
    def __init__(self):
        super().__init__("Blocking", "You block.", "m-3", model)

async def make_async():
    return plain

def make_number():
    return 3

number = 3
""",
        encoding="utf-8",
    )
    (tmp_path / "project_broken.py").write_text("import no_such_thing\n", encoding="utf-8")
    return tmp_path


# ---- demo


@pytest.fixture(scope="module", params=BACKENDS)
def demo(request) -> tuple[str, subprocess.CompletedProcess[str]]:
    return request.param, fractal_command("demo", "--backend", request.param)


@pytest.mark.slow
class TestDemo:
    def test_runs_without_a_key(self, demo):
        _, done = demo
        assert (done.returncode, done.stderr) == (0, "")

    def test_shows_who_did_what(self, demo):
        _, done = demo
        for name in ("Planner", "Guide", "Gourmet", "opening_hours", "walking_time", "free_tables", "menu_today"):
            assert name in done.stdout
        assert "calls delegate_to_guide" in done.stdout

    def test_the_slow_tool_times_out_and_the_answer_says_so(self, demo):
        _, done = demo
        assert re.search(r"queue_camera .* timeout +0\.7\d", done.stdout)
        assert "Its camera is silent" in done.stdout

    def test_work_takes_less_time_than_its_parts(self, demo):
        backend, done = demo
        found = re.search(rf"{backend} · (\d+\.\d) s of work in (\d+\.\d) s", done.stdout)
        assert found, done.stdout
        assert float(found[1]) > 1.5 * float(found[2])

    def test_nothing_is_left(self, demo):
        _, done = demo
        assert done.stdout.endswith("tasks left: 0, threads left: 0, connections left: 0\n")

    def test_a_pipe_gets_plain_text_that_fits(self, demo):
        _, done = demo
        assert "\x1b" not in done.stdout
        assert max(map(len, done.stdout.splitlines())) <= 80


def test_a_failed_demo_says_why_and_shows_how_far_it_came(capsys, monkeypatch):
    for name in ("OPENAI_API_KEY", "OPENAI_BASE_URL"):
        monkeypatch.delenv(name, raising=False)
    assert main(["demo", "--timeout", "0.1"]) == 1
    out, err = capsys.readouterr()
    assert err == "fractal demo: Planner gave no answer (deadline): the run did not finish within 0.1 s\n"
    assert re.search(r"Planner .* timeout", out)
    assert "left: 0" in out


def test_the_demo_talks_to_a_real_endpoint(capsys, monkeypatch):
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    with Endpoint("Stay at home.") as endpoint:
        assert main(["demo", "--base-url", endpoint.url, "--model", "m-7"]) == 0
        assert [request.body["model"] for request in endpoint.requests] == ["m-7"]
    out, _ = capsys.readouterr()
    assert "Stay at home." in out
    assert out.endswith("tasks left: 0, threads left: 0\n")  # the connections are not ours to count


def test_the_demo_fails_if_something_is_left(capsys, monkeypatch):
    monkeypatch.setattr("fractal.cli.demo._threads_since", lambda before: 2)
    with Endpoint("Stay at home.") as endpoint:
        assert main(["demo", "--base-url", endpoint.url]) == 1
    assert "threads left: 2" in capsys.readouterr().err


def test_a_thread_that_goes_on_is_counted(monkeypatch):
    from fractal.cli import demo as _demo

    monkeypatch.setattr(_demo, "_LONGEST_WAIT", 0.05)
    before, stop = set(threading.enumerate()), threading.Event()
    thread = threading.Thread(target=stop.wait)
    thread.start()
    try:
        assert _demo._threads_since(before) == 1
    finally:
        stop.set()
        thread.join()
    assert _demo._threads_since(before) == 0


def test_a_proxy_is_not_asked_for_the_demo_and_stays_set(monkeypatch):
    for name in ("OPENAI_API_KEY", "OPENAI_BASE_URL", "NO_PROXY"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("no_proxy", "example.org")
    from fractal.cli.demo import _endpoint

    with _endpoint(None):
        assert os.environ["no_proxy"] == "example.org,127.0.0.1"
        assert os.environ["NO_PROXY"] == "127.0.0.1"
    assert os.environ["no_proxy"] == "example.org"
    assert "NO_PROXY" not in os.environ


@pytest.mark.skipif(sys.platform == "win32", reason="SIGINT is not sent to one process there")
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("wait", [0.2, pytest.param(1.2, marks=pytest.mark.slow)])
def test_ctrl_c_ends_the_demo(backend, wait):
    process = subprocess.Popen(
        [sys.executable, "-m", "fractal", "demo", "--backend", backend],
        env=clean_environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        encoding="utf-8",
    )
    with process:
        assert process.stdout is not None
        process.stdout.readline()
        time.sleep(wait)
        process.send_signal(signal.SIGINT)
        _, err = process.communicate(timeout=10)
    assert (process.returncode, err) == (130, "fractal demo: interrupted\n")


@pytest.mark.skipif(sys.platform == "win32", reason="there are no pseudo terminals")
class TestTerminal:
    def shown(self, *arguments: str, cwd: Path | None = None, status: int = 0, **more: str) -> str:
        return self.shown_by(["-m", "fractal", *arguments], cwd, status, **more)

    def shown_in_turn(self, commands: Sequence[Sequence[str]], cwd: Path) -> list[tuple[int, str]]:
        """The status of each command and what it shows, each in a child of a process that has loaded the library."""
        text = self.shown_by(["-c", IN_TURN, json.dumps(commands)], cwd, 0)
        shown = [(int(status), part) for part, status in re.findall(r"(?s)(.*?)ended with status (\d+)\r\n", text)]
        assert len(shown) == len(commands)
        return shown

    def shown_by(self, program: Sequence[str], cwd: Path | None, status: int, **more: str) -> str:
        import fcntl
        import pty
        import struct
        import termios

        ours, theirs = pty.openpty()
        fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 50, 100, 0, 0))
        process = subprocess.Popen(
            [sys.executable, *program],
            cwd=cwd,
            env=clean_environment(TERM="xterm-256color", **more),
            stdin=theirs,
            stdout=theirs,
            stderr=theirs,
        )
        os.close(theirs)
        pieces = bytearray()
        try:
            while piece := os.read(ours, 65536):
                pieces += piece
        except OSError:  # how Linux says that nobody writes any more
            pass
        os.close(ours)
        assert process.wait(10) == status
        return pieces.decode()

    @pytest.mark.slow
    def test_the_demo_moves(self):
        shown = self.shown("demo")
        assert re.search("side by side now: [5-9]", shown)
        assert "\x1b[1A" in shown
        assert shown.endswith("\x1b[32mtasks left: 0, threads left: 0, connections left: 0\x1b[0m\r\n")

    def test_the_tree_is_shown_after_the_answer(self, project):
        shown = self.shown("run", "hi", "--agent", "project_agents:plain", cwd=project)
        *_, answer, tree = shown.partition("m-1 heard: hi\r\n")
        assert answer
        assert "who did what" in tree

    def test_without_colour(self, project):
        shown = self.shown("run", "hi", "--agent", "project_agents:plain", cwd=project, NO_COLOR="1")
        codes = {code for found in re.findall(r"\x1b\[([\d;]*)m", shown) for code in found.split(";")}
        assert codes <= {"0", "1", "2"}

    def test_a_model_cannot_steer_the_terminal(self, project, endpoint):
        shown = self.shown("run", "a\x1b[2Jb", "--agent", "project_agents:plain", cwd=project)
        assert "a [2Jb" in shown
        assert "\x1b[2J" not in shown

    @pytest.mark.parametrize("options", [[], ["--json"], ["-v"]], ids=str)
    def test_nothing_that_anybody_wrote_steers_the_terminal(self, options, evil_project):
        agents = ["text", "typed", "model", "failing", "raising", "refusing", "noting", "watched", "spreading"]
        commands = [["run", "hi", *options, "--agent", f"evil_agents:{agent}"] for agent in agents]
        for agent, (_, shown) in zip(agents, self.shown_in_turn(commands, evil_project), strict=True):
            assert "\\u009b" in shown or "b [2J 31mc" in shown, (agent, ascii(shown))
            assert not STEERS.search(OURS.sub("", shown)), (agent, ascii(shown))

    def test_the_name_of_a_file_and_words_of_the_user_do_not_either(self, evil_project):
        commands = [
            ["run", "hi", "--agent", f"evil{EVIL}:x".replace("/", "")],
            ["run", "hi", "--agent", f"evil_agents:{EVIL}"],
            ["run", "hi", "--base-url", f"http{EVIL}"],
            ["run-many", f"no{EVIL}".replace("/", "")],
            ["chat", "--continue", f"no{EVIL}".replace("/", "")],
            ["run", "hi", "--agent", "evil_module:x"],
            ["run", "hi", f"--{EVIL}"],
            [EVIL],
        ]
        for status, shown in self.shown_in_turn(commands, evil_project):
            assert status == 2
            assert not STEERS.search(OURS.sub("", shown)), ascii(shown)


IN_TURN = """
import gc, importlib, json, os, runpy, sys
from contextlib import suppress
for name in ("anyio._backends._asyncio", "fractal.cli.main", "fractal.cli.run_tree", "genai_prices", "httpx2"):
    with suppress(ImportError):
        importlib.import_module(name)
gc.freeze()
for arguments in json.loads(sys.argv[1]):
    if os.fork() == 0:
        sys.argv = ["fractal", *arguments]
        runpy.run_module("fractal", run_name="__main__", alter_sys=True)
    print("ended with status", os.waitstatus_to_exitcode(os.wait()[1]), flush=True)
"""

EVIL = "a\x1b]0;title\x07b\x1b[2J\x9b31mc\u202ed\u200be\x7ff\u2028g\U000e0041h"
# What steers a terminal, or is not seen; and what rich and we ourselves write.
STEERS = re.compile(
    "[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\u200b-\u200f\u2028-\u202e\u2060-\u206f\ufeff\U000e0000-\U000e007f]"
)
OURS = re.compile(r"\x1b\[(?:[\d;]*m|\?25[lh]|2K|1A)|\r")


@pytest.fixture
def evil_project(tmp_path: Path) -> Path:
    (tmp_path / "evil_agents.py").write_text(
        f"""
import json
import logging
import threading
import warnings
from pydantic import BaseModel
from fractal import BaseAgent, tool
from fractal.testing import ScriptedModel, answers

EVIL = {EVIL!r}

class City(BaseModel):
    name: str

def agent(*replies, **options):
    return BaseAgent(EVIL, "a", EVIL, ScriptedModel(list(replies)), **options)

@tool(on_error="raise")
def fail() -> str:
    raise ValueError(EVIL)

@tool(terminate=True)
def city() -> City:
    return City(name=EVIL)

@tool
def note(text: str) -> str:
    logging.getLogger("fractal").error(text)
    raise RuntimeError(text)

def broken(event):
    raise RuntimeError(EVIL)

@tool
def spread() -> str:
    def end():
        raise RuntimeError(EVIL)
    thread = threading.Thread(target=end, name=EVIL)
    thread.start()
    thread.join()
    class Dropped:
        def __del__(self):
            raise RuntimeError(EVIL)
        def __repr__(self):
            return EVIL
    Dropped()
    warnings.warn(EVIL)
    logging.getLogger("others").error(EVIL)
    return EVIL

def raise_it():
    raise LookupError(EVIL)

text = agent(EVIL)
typed = agent(json.dumps({{"name": EVIL}}), output_type=City)
model = agent(answers.call("city", {{}})).add_tool(city)
failing = agent(answers.call("fail", {{}})).add_tool(fail)
raising = BaseAgent(EVIL, raise_it, EVIL, ScriptedModel(["x"]))
refusing = agent(answers.failure(400, EVIL, code=EVIL))
noting = agent(answers.call("note", {{"text": EVIL}}, id=EVIL), answers.text(EVIL, finish_reason="length"))
noting.add_tool(note)
watched = agent(EVIL, observers=[broken])
spreading = agent(answers.call("spread", {{}}), EVIL).add_tool(spread)
""",
        encoding="utf-8",
    )
    (tmp_path / "evil_module.py").write_text(f"raise ImportError({EVIL!r})", encoding="utf-8")
    return tmp_path


@pytest.mark.parametrize("agent", ["text", "model", "failing"])
def test_a_pipe_gets_text_as_it_is_and_json_with_escapes(agent, evil_project):
    done = fractal_command("run", "hi", "--json", "--agent", f"evil_agents:{agent}", cwd=evil_project)
    assert not STEERS.search(done.stdout.replace("\n", ""))
    result = AgentResult.model_validate_json(done.stdout)
    assert result.agent_name == EVIL
    done = fractal_command("run", "hi", "--agent", f"evil_agents:{agent}", cwd=evil_project)
    if agent == "text":
        assert done.stdout == EVIL + "\n"
    elif agent == "model":
        assert not STEERS.search(done.stdout.replace("\n", ""))
        assert json.loads(done.stdout) == {"name": EVIL}


# ---- run


@pytest.mark.parametrize("backend", BACKENDS)
def test_run_prints_the_answer_and_nothing_else(project, backend):
    done = fractal_command("run", "hi", "--agent", "project_agents:plain", "--backend", backend, cwd=project)
    assert (done.returncode, done.stdout, done.stderr) == (0, "m-1 heard: hi\n", "")


@pytest.fixture
def in_project(project, monkeypatch) -> Iterator[None]:
    monkeypatch.chdir(project)
    monkeypatch.setattr(sys, "path", [entry for entry in sys.path if entry])
    yield
    for name in ("project_agents", "project_broken", "project_loop"):
        sys.modules.pop(name, None)


@pytest.mark.usefixtures("in_project")
class TestRun:
    @pytest.mark.parametrize(
        ("attribute", "answer"),
        [
            ("plain", "m-1 heard: hi\n"),
            ("make", "m-1 heard: hi\n"),
            ("Ready", "m-2 heard: hi\n"),
            ("ReadyBlocking", "m-2 heard: hi\n"),
            ("Blocking", "m-3 heard: hi\n"),
        ],
    )
    def test_takes_an_agent_a_factory_or_a_class(self, attribute, answer, capsys):
        assert main(["run", "hi", "--agent", f"project_agents:{attribute}"]) == 0
        assert capsys.readouterr() == (answer, "")

    def test_what_is_no_text_is_printed_as_json(self, capsys):
        assert main(["run", "hi", "--agent", "project_agents:loud"]) == 0
        assert capsys.readouterr().out == '{\n  "loud": "HI"\n}\n'

    def test_json_is_the_whole_result(self, capsys):
        assert main(["run", "hi", "--agent", "project_agents:loud", "--json"]) == 0
        result = AgentResult.model_validate_json(capsys.readouterr().out)
        assert (result.content, result.stop_reason, result.agent_name) == ({"loud": "HI"}, "terminated", "Loud")
        assert result.tool_results[0].outcome == "ok"

    def test_the_question_may_come_from_standard_input(self, project):
        done = fractal_command("run", "-", "--agent", "project_agents:plain", cwd=project, stdin="from a pipe: é")
        assert (done.returncode, done.stdout) == (0, "m-1 heard: from a pipe: é\n")

    def test_verbose_shows_the_tree_on_standard_error(self, capsys):
        assert main(["run", "hi", "-v", "--agent", "project_agents:loud"]) == 0
        out, err = capsys.readouterr()
        assert out == '{\n  "loud": "HI"\n}\n'
        assert re.search(r"Loud .* ok .*\n.*model  calls shout .*\n.*shout  hi +ok ", err)

    def test_the_default_agent_takes_model_and_endpoint(self, endpoint, capsys):
        assert main(["run", "hi", "--base-url", endpoint.url, "--model", "m-3"]) == 0
        assert capsys.readouterr().out == "m-3 heard: hi\n"

    def test_limits_reach_the_run(self, project, capsys):
        with Endpoint(answers.hang()) as stuck:
            assert main(["run", "hi", "--base-url", stuck.url, "--timeout", "0.2"]) == 1
        out, err = capsys.readouterr()
        assert (out, err) == (
            "",
            "fractal run: assistant gave no answer (deadline): the run did not finish within 0.2 s\n",
        )
        (project / "project_loop.py").write_text(
            "from project_agents import BaseAgent, model\n"
            "def shout(text: str) -> str: return text\n"
            "agent = BaseAgent('Loop', 'You loop.', client=model).add_tool(shout)\n",
            encoding="utf-8",
        )
        assert main(["run", "hi", "--agent", "project_loop:agent", "--max-iterations", "1"]) == 1
        assert "(max_iterations)" in capsys.readouterr().err

    def test_a_failed_run_as_json_is_a_failure_too(self, capsys):
        with Endpoint(answers.failure(400, "no such model", code="model_not_found")) as refusing:
            assert main(["run", "hi", "--base-url", refusing.url, "--json"]) == 1
        out, err = capsys.readouterr()
        assert json.loads(out)["success"] is False
        assert "gave no answer (model_error)" in err
        assert "no such model" in err

    def test_nothing_is_left_running(self):
        main(["run", "hi", "--agent", "project_agents:plain"])  # a first run may load what keeps a thread at hand
        before = set(threading.enumerate())
        main(["run", "hi", "--agent", "project_agents:plain"])
        for thread in set(threading.enumerate()) - before:
            thread.join(5)  # it may be on its last line
            assert not thread.is_alive()

    def test_a_failing_factory_fails_without_a_traceback(self, capsys):
        assert main(["run", "hi", "--agent", "project_agents:broken_factory"]) == 1
        assert capsys.readouterr().err == "fractal run: LookupError: no such pool\n"
        assert main(["run", "hi", "-v", "--agent", "project_agents:broken_factory"]) == 1
        assert "Traceback" in capsys.readouterr().err

    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            (["--agent", "project_agents"], "write module:attribute"),
            (["--agent", "project_agents:"], "write module:attribute"),
            (["--agent", "no_such_module:agent"], "there is no module 'no_such_module'"),
            (["--agent", "no.such.module:agent"], "there is no module 'no.such.module'"),
            (["--agent", "project_broken:agent"], "No module named 'no_such_thing'"),
            (["--agent", "project_agents:plane"], "has no 'plane'; its agents: plain, loud"),
            (["--agent", "project_agents:number"], "project_agents:number is of type int, not an agent"),
            (["--agent", "project_agents:fractal"], "is of type module, not an agent"),
            (["--agent", "project_agents:OpenAIModel"], "is the class OpenAIModel, not an agent"),
            (["--agent", "project_agents:make_number"], "project_agents:make_number() is of type int, not an agent"),
            (["--agent", "project_agents:make_async"], "is an async function"),
            (["--agent", "project_agents:Needy"], "the class Needy that cannot be called without arguments"),
            (["--agent", "project_agents:plain", "--model", "m"], "--model is for the default agent"),
            (["--agent", "project_agents:plain", "--base-url", "u"], "--base-url is for the default agent"),
        ],
    )
    def test_wrong_use_is_told(self, arguments, message, capsys):
        assert main(["run", "hi", *arguments]) == 2
        out, err = capsys.readouterr()
        assert out == ""
        assert message in err
        assert err.startswith("fractal run: ")
        assert "Traceback" not in err

    def test_no_question(self, capsys):
        assert main(["run", " ", "--agent", "project_agents:plain"]) == 2
        assert capsys.readouterr().err == "fractal run: there is no question\n"

    def test_no_key(self, monkeypatch, capsys):
        for name in ("OPENAI_API_KEY", "OPENAI_BASE_URL"):
            monkeypatch.delenv(name, raising=False)
        for command in (["run", "hi"], ["chat"], ["run-many", "-"]):
            assert main(command) == 2
            words = capsys.readouterr().err
            assert words.startswith(f"fractal {command[0]}: there is no API key: set OPENAI_API_KEY; ")
            assert "`fractal endpoint` starts one" in words

    def test_a_key_that_is_missing_only_then_is_wrong_use_too(self, project, monkeypatch, capsys):
        for name in ("OPENAI_API_KEY", "OPENAI_BASE_URL"):
            monkeypatch.delenv(name, raising=False)
        (project / "project_loop.py").write_text("from fractal import BaseAgent\nagent = BaseAgent('A', 'a')\n")
        assert main(["run", "hi", "--agent", "project_loop:agent"]) == 2
        assert "there is no API key" in capsys.readouterr().err

    @pytest.mark.parametrize(
        ("url", "words"),
        [
            ("localhost:8000", "localhost:8000: a URL begins with http:// or https://: write http://localhost:8000"),
            ("htps://u:secret@host/v1", "htps://host/v1: a URL begins with http:// or https://: write http://host/v1"),
            ("u:secret@host:1", "host:1: a URL begins with http:// or https://: write http://host:1"),
            ("http://", "http://: write it with host and port"),
            ("http://127.0.0.1:99999/v1", "http://127.0.0.1:99999/v1: Port out of range"),
            ("http://[::1/v1", "Invalid IPv6 URL"),
        ],
    )
    def test_a_base_url_that_is_none_is_told(self, url, words, monkeypatch, capsys):
        assert main(["run", "hi", "--base-url", url]) == 2
        err = capsys.readouterr().err
        assert err.startswith("fractal run: --base-url ")
        assert words in err
        assert "secret" not in err
        monkeypatch.setenv("OPENAI_BASE_URL", url)
        for command in (["run", "hi"], ["chat"], ["run-many", "-"], ["demo"]):
            assert main(command) == 2
            err = capsys.readouterr().err
            assert err.startswith(f"fractal {command[0]}: OPENAI_BASE_URL ")
            assert words in err

    @pytest.mark.parametrize(
        ("given", "meant"),
        [
            ("project_agents.py:plain", "project_agents:plain"),
            ("./project_agents.py:plain", "project_agents:plain"),
            ("app/agents.py:planner", "app.agents:planner"),
            ("app/agents:planner", "app.agents:planner"),
            ("travel.py", "travel:agent"),
        ],
    )
    def test_a_file_in_place_of_a_module_is_told(self, given, meant, capsys):
        assert main(["run", "hi", "--agent", given]) == 2
        assert f"--agent {given}: give the module and not its file: write {meant}\n" in capsys.readouterr().err

    def test_wrong_use_of_the_library_is_wrong_use(self, project, capsys):
        (project / "project_loop.py").write_text(
            "from fractal import BaseAgent, ScriptedModel\n"
            if False
            else "from fractal import BaseAgent\nagent = BaseAgent('A', lambda: 5)\n"
        )
        assert main(["run", "hi", "--agent", "project_loop:agent"]) == 2
        assert "returned 5, not text" in capsys.readouterr().err

    def test_a_factory_that_exits_says_so(self, project, capsys):
        (project / "project_loop.py").write_text("import sys\ndef make(): sys.exit('no\x1b[2J table')\n")
        assert main(["run", "hi", "--agent", "project_loop:make"]) == 1
        assert capsys.readouterr().err == "fractal run: no [2J table\n"
        (project / "project_loop.py").write_text("import sys\ndef make(): sys.exit(7)\n")
        sys.modules.pop("project_loop")
        with pytest.raises(SystemExit) as ended:
            main(["run", "hi", "--agent", "project_loop:make"])
        assert ended.value.code == 7

    def test_an_exception_without_a_text_is_told(self, project, monkeypatch, capsys):
        (project / "project_loop.py").write_text(
            "import os\nfrom tests.odd import EXCEPTIONS\ndef make(): raise EXCEPTIONS[os.environ['KIND']]()\n"
        )
        for name in EXCEPTIONS:
            monkeypatch.setenv("KIND", name)
            assert main(["run", "hi", "-v", "--agent", "project_loop:make"]) == 1
            assert "fractal run: " in capsys.readouterr().err


# ---- the tree


async def test_parallel_delegates_with_one_query_keep_their_own_times():
    def answer(request):
        if "You lead." in request.body["messages"][0]["content"]:
            if request.body["messages"][-1]["role"] == "tool":
                return "done"
            return [answers.call("first", {"query": "same"}), answers.call("second", {"query": "same"})]
        slow = "You are slow." in request.body["messages"][0]["content"]
        return answers.text("here", delay=0.4 if slow else 0.1)

    with Endpoint(answer) as endpoint:
        tree, model = RunTree(), OpenAIModel(base_url=endpoint.url)
        lead = BaseAgent("Lead", "You lead.", client=model, observers=[tree])
        lead.register_delegate(BaseAgent("Slow", "You are slow.", client=model), "first")
        lead.register_delegate(BaseAgent("Quick", "You are quick.", client=model), "second")
        (await lead.run("go")).raise_for_error()
    [root] = tree.roots
    runs = {part.label: part for part in root.parts if part.kind == "run"}
    assert [part.kind for part in root.parts] == ["model", "run", "run", "model"]
    assert runs["Slow"].seconds > 0.35 > runs["Quick"].seconds
    assert [part.outcome for part in tree.walk()] == ["ok"] * 7
    assert root.requests == 4


async def test_a_retry_and_an_agent_called_by_a_tool_show_in_the_tree():
    script = [
        answers.failure(503, "busy\x1b[31m", retry_after=0),
        answers.call("consult", {"topic": "Rome"}),
        "from the other",
        "done",
    ]
    with Endpoint(script) as endpoint:
        tree, model = RunTree(), OpenAIModel(base_url=endpoint.url)
        other = BaseAgent("Other", "You know.", client=model)
        lead = BaseAgent("Lead", "You lead.", client=model, observers=[tree])

        async def consult(topic: str) -> str:
            return str((await lead.call_agent(other, f"about {topic}")).content)

        (await lead.add_tool(consult).run("go")).raise_for_error()
    found = [(part.kind, part.label, part.outcome) for part in tree.walk()]
    assert found == [
        ("run", "Lead", "ok"),
        ("model", "model", "error"),
        ("model", "model", "ok"),
        ("tool", "consult", "ok"),
        ("run", "Other", "ok"),
        ("model", "model", "ok"),
        ("model", "model", "ok"),
    ]
    failed = tree.roots[0].parts[0]
    assert "busy" in failed.detail
    assert "\x1b" not in failed.detail


async def test_a_cancelled_run_leaves_nothing_open_in_the_tree():
    with Endpoint(answers.hang()) as endpoint:
        tree = RunTree()
        agent = BaseAgent("Stuck", "You wait.", client=OpenAIModel(base_url=endpoint.url), observers=[tree])
        with anyio.move_on_after(0.1):
            await agent.run("go")
    assert [part.outcome for part in tree.walk()] == ["cancelled", "cancelled"]


def test_of_a_tall_tree_the_newest_rows_are_shown():
    tree = RunTree()
    root = Part(kind="run", label="Long", agent="Long", started=0.0, ended=9.0, outcome="ok")
    root.parts = [
        Part(kind="tool", label=f"step_{n}", agent="Long", started=n, ended=n + 1, outcome="ok") for n in range(9)
    ]
    tree.roots.append(root)
    console = Console(width=60, file=io.StringIO(), record=True)
    console.print(live_table(tree, UNICODE, 60, 8))
    lines = console.export_text().splitlines()
    assert lines[0].strip() == "6 more above"
    assert [line.split()[2] for line in lines[1:-1]] == ["step_5", "step_6", "step_7", "step_8"]


@pytest.mark.parametrize("wall", [0.0, 0.004, 0.9, 2.5, 61.0, 4000.0])
def test_a_timeline_fits_at_any_scale(wall):
    tree = RunTree()
    root = Part(kind="run", label="Long " * 20, agent="Long", started=5.0, ended=5.0 + wall, outcome="ok")
    root.parts = [Part(kind="model", label="model", agent="Long", started=5.0, ended=5.0 + wall, outcome="cancelled")]
    tree.roots.append(root)
    console = Console(width=80, file=io.StringIO(), record=True)
    console.print(timeline(tree, UNICODE, 80))
    lines = console.export_text().splitlines()
    assert len(lines) == 4
    assert max(map(len, lines)) <= 80


# ---- the command itself


@pytest.mark.parametrize(
    "arguments",
    [
        ["juggle"],
        ["run"],
        ["run", "hi", "--timeout", "0"],
        ["run", "hi", "--timeout", "nan"],
        ["run", "hi", "--max-iterations", "0"],
        ["demo", "--backend", "curio"],
        ["chat", "hi"],
        ["chat", "--timeout", "0"],
        ["chat", "--save"],
    ],
)
def test_arguments_that_cannot_be_read(arguments, capsys):
    with pytest.raises(SystemExit) as exit:
        main(arguments)
    assert exit.value.code == 2
    assert "usage: fractal" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["run", "what", "is", "it?"], "is it?: the question is one argument; put it in quotes"),
        (["run", "travel:guide", "hi"], "hi: an agent is given by name, as in --agent travel:guide"),
        (["chat", "app.agents:guide"], "app.agents:guide: an agent is given by name, as in --agent app.agents:guide"),
        (["serve", "travel:guide"], "travel:guide: an agent is given by name, as in --agent travel:guide"),
        (["--color"], "unrecognized arguments: --color\n"),
        (["run", "hi", "--color"], "unrecognized arguments: --color\n"),
        (["trace", "a.jsonl", "b.jsonl"], "unrecognized arguments: b.jsonl\n"),
        (["run", "hi", "--timeout", "-1"], "--timeout: '-1': give seconds, a number above 0"),
        (["run", "hi", "--timeout", "5s"], "--timeout: '5s': give seconds, a number above 0"),
        (["run-many", "f", "--max-concurrency", "0"], "--max-concurrency: '0': give a whole number from 1 up"),
        (["serve", "--port", "70000"], "--port: '70000': give a whole number from 0 to 65535"),
        (["worker", "--grace", "-1"], "--grace: '-1': give seconds, a number from 0 to 999999"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_arguments_that_cannot_be_read_are_told_with_what_to_write(arguments, words, capsys):
    with pytest.raises(SystemExit) as exit:
        main(arguments)
    assert exit.value.code == 2
    err = capsys.readouterr().err
    assert words in err
    command = arguments[0] if not arguments[0].startswith("-") else "[-h]"
    assert err.startswith(f"usage: fractal {command} ")


@pytest.mark.parametrize("closed", ["stdin", "stdout", "stderr", "stdin stdout stderr"])
def test_a_process_without_standard_streams_is_no_fault(closed, endpoint, tmp_path, monkeypatch, capsys):
    """As of a service, a desktop's launcher, or `>&-` in a shell."""
    for name, value in (("URL", endpoint.url), ("KEY", "any")):
        monkeypatch.setenv(f"OPENAI_{'BASE' if name == 'URL' else 'API'}_{name}", value)
    (tmp_path / "questions").write_text("hi\n", encoding="utf-8")
    for arguments in (["run", "hi", "-v"], ["chat"], ["run-many", str(tmp_path / "questions")]):
        monkeypatch.setattr(sys, "stdin", io.StringIO("hi\n"))
        with monkeypatch.context() as patch:
            for name in closed.split():
                patch.setattr(sys, name, None)
            status = main(arguments)
            for name in closed.split():
                getattr(sys, name).close()
        out, err = capsys.readouterr()
        assert (status, "Error" in err) == (0, False)
        is_asked = arguments[0] != "chat" or "stdin" not in closed
        assert ("heard: hi" in out) == (is_asked and "stdout" not in closed)


def test_a_question_from_standard_input_that_is_closed_is_told(monkeypatch, capsys):
    monkeypatch.setenv("OPENAI_API_KEY", "any")
    monkeypatch.setattr(sys, "stdin", None)
    assert main(["run", "-"]) == 2
    sys.stdin.close()
    assert capsys.readouterr().err == "fractal run: there is no question on standard input\n"


@pytest.mark.skipif(os.name != "posix", reason="a shell closes them")
def test_a_shell_may_close_them_all(endpoint):
    done = subprocess.run(
        ["sh", "-c", '"$0" -m fractal run hi <&- >&- 2>&-', sys.executable],
        env=clean_environment(OPENAI_BASE_URL=endpoint.url, OPENAI_API_KEY="any"),
        timeout=50,
    )
    assert done.returncode == 0
    endpoint.wait_for_requests(1)


def test_version():
    done = fractal_command("--version")
    assert done.returncode == 0
    assert done.stdout.startswith("fractal ")


def test_alone_it_says_which_commands_there_are(capsys):
    with pytest.raises(SystemExit) as exit:
        main([])
    assert exit.value.code == 2
    out, err = capsys.readouterr()
    assert out == ""
    for command in ("demo", "run", "chat", "run-many", "endpoint"):
        assert re.search(rf"^    {command} +\w+", err, re.MULTILINE)


WITHOUT_RICH = "import sys; sys.modules['rich'] = None; from fractal.cli.main import main; sys.exit(main())"


def without_rich(*arguments: str, cwd: Path | None = None):
    command = [sys.executable, "-c", WITHOUT_RICH, *arguments]
    return subprocess.run(command, cwd=cwd, env=clean_environment(), capture_output=True, encoding="utf-8", timeout=50)


def test_without_rich_the_demo_says_what_to_install():
    done = without_rich("demo")
    assert done.returncode == 2
    assert done.stderr == "fractal demo: the demo draws with rich, which is not here: pip install rich\n"


def test_without_rich_the_other_commands_work(project):
    agent = ("--agent", "project_agents:plain")
    done = without_rich("run", "hi", *agent, cwd=project)
    assert (done.returncode, done.stdout, done.stderr) == (0, "m-1 heard: hi\n", "")
    done = without_rich("run", "hi", "-v", "--json", *agent, cwd=project)
    assert (done.returncode, done.stderr) == (0, "")
    assert AgentResult.model_validate_json(done.stdout).content == "m-1 heard: hi"
    (project / "inputs").write_text("one\n")
    done = without_rich("run-many", "inputs", *agent, cwd=project)
    assert done.returncode == 0
    assert json.loads(done.stdout)["result"]["content"] == "m-1 heard: one"


# ---- the stand-in


def test_a_command_finds_the_stand_in_while_it_runs(tmp_path):
    (tmp_path / "ask.py").write_text(
        "import os, sys\n"
        "from fractal import BaseAgent, sync, tool\n"
        "@tool\n"
        "def forecast(city: str) -> str:\n"
        "    return f'sunny in {city}'\n"
        "agent = BaseAgent('Weather', 'You know the weather.').add_tool(forecast)\n"
        "print(sync.run(agent, 'What is the weather in Rome?').content, *sys.argv[1:])\n"
        "sys.exit(3)\n"
    )
    for words in (["--"], []):
        done = fractal_command("endpoint", *words, sys.executable, "ask.py", "--more", cwd=tmp_path)
        assert (done.returncode, done.stdout, done.stderr) == (3, "sunny in Rome --more\n", "")


def test_the_thirty_seconds_of_the_readme_run_without_a_key(tmp_path):
    text = (ROOT / "README.md").read_text("utf-8").partition("## Thirty seconds")[2].partition("\n## ")[0]
    (tmp_path / "thirty.py").write_text("\n".join(re.findall(r"```python\n(.*?)```", text, re.DOTALL)))
    done = fractal_command("endpoint", sys.executable, "thirty.py", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    expected = re.findall(r"^ *#> (.*)$", text, re.MULTILINE)
    assert len(expected) > 5
    assert [line for line in expected if line not in done.stdout] == []


@pytest.mark.skipif(sys.platform == "win32", reason="SIGINT is not sent to one process there")
def test_the_stand_in_serves_until_ctrl_c():
    process = subprocess.Popen(
        [sys.executable, "-m", "fractal", "endpoint"],
        env=clean_environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        encoding="utf-8",
    )
    with process:
        assert process.stdout is not None
        line = process.stdout.readline()
        assert re.fullmatch(r"export OPENAI_BASE_URL=http://127\.0\.0\.1:\d+/v1\n", line)
        url = line.strip().partition("=")[2]
        done = fractal_command("run", "How are you?", OPENAI_BASE_URL=url)
        assert (done.returncode, done.stdout) == (0, "You asked: How are you?\n")
        taken = fractal_command("endpoint", "--port", url.rpartition(":")[2].partition("/")[0])
        assert taken.returncode == 2
        assert "in use" in taken.stderr
        process.send_signal(signal.SIGINT)
        _, err = process.communicate(timeout=10)
    assert process.returncode == 0
    assert err == f"a stand-in for a model answers at {url}; Ctrl-C ends it. In another terminal:\n"


@pytest.mark.skipif(sys.platform == "win32", reason="Windows ends processes in another way")
def test_a_command_ends_with_the_stand_in_that_runs_it():
    process = subprocess.Popen(
        [sys.executable, "-m", "fractal", "endpoint", "sh", "-c", "echo $$; exec sleep 60"],
        env=clean_environment(),
        stdout=subprocess.PIPE,
        encoding="utf-8",
    )
    with process:
        assert process.stdout is not None
        command = int(process.stdout.readline())
        process.terminate()
        assert process.wait(timeout=20) == 128 + signal.SIGTERM
        with pytest.raises(ProcessLookupError):
            os.kill(command, 0)


def test_a_command_that_is_not_there_is_told(capsys):
    assert main(["endpoint", "no-such-command"]) == 2
    assert capsys.readouterr().err == "fractal endpoint: no-such-command: No such file or directory\n"


def test_the_stand_in_writes_what_a_schema_wants():
    from fractal.cli.stand_in import play
    from fractal.testing.endpoint import RecordedRequest

    class Tree(pydantic.BaseModel):
        name: str
        size: int
        kind: Literal["oak", "elm"]
        is_old: bool
        above: "Tree | None"
        beside: "list[Tree]"

    schema = {"schema": Tree.model_json_schema()}
    body = {
        "messages": [{"role": "user", "content": "Trees of Rome, 7 of them"}],
        "response_format": {"json_schema": schema},
    }
    tree = Tree.model_validate_json(play(RecordedRequest(method="POST", path="/", body=body)).text)
    assert (tree.name, tree.size, tree.kind, tree.is_old) == ("Rome", 7, "oak", True)


def test_a_terminal_without_unicode():
    done = fractal_command("demo", "--timeout", "0.5", PYTHONIOENCODING="ascii")
    assert done.returncode == 1
    assert "`- " in done.stdout
    assert "\\u" not in done.stdout
