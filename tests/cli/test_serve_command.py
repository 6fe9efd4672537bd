"""`fractal serve`: agents over HTTP from the command line."""

from __future__ import annotations

import os
import re
import signal
import socket
import subprocess
import sys
import textwrap
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx2
import openai
import pytest

from fractal.cli.main import main
from tests.support import until

AGENTS = """
from fractal import BaseAgent, sync
from fractal.testing import ScriptedModel

guide = BaseAgent("Guide", "g", client=ScriptedModel(["hello"] * 9))
cook = BaseAgent("Cook", "c", client=ScriptedModel(["soup"] * 9))
twin = BaseAgent("Guide", "g", client=ScriptedModel([]))
blocking = sync.BaseAgent("Blocking", "b", client=ScriptedModel([]))
"""


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "served_agents.py").write_text(textwrap.dedent(AGENTS))
    monkeypatch.chdir(tmp_path)
    return tmp_path


@contextmanager
def serving(folder: Path, *words: str, **variables: str) -> Iterator[tuple[subprocess.Popen[str], str]]:
    """A process of the command, and the first line that it prints."""
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)} | variables
    command = [sys.executable, "-W", "error", "-m", "fractal", *words]
    pipes: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    with subprocess.Popen(command, cwd=folder, env=environment, **pipes) as process:
        try:
            assert process.stdout is not None
            yield process, process.stdout.readline()
        finally:
            process.kill()


def read_and_end(process: subprocess.Popen[str]) -> tuple[int, str, str]:
    """End it by Ctrl-C: its status, the next line of what it has said, and its complaints."""
    assert process.stdout is not None
    line = process.stdout.readline()
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=20)
    return process.returncode, line, errors


def url_in(line: str) -> str:
    found = re.search(r"http://\S+", line)
    assert found, line
    return found[0]


@pytest.mark.slow
def test_it_serves_the_page_the_runs_and_openai_s_routes_until_ctrl_c(project: Path):
    agents = ["--agent", "served_agents:guide", "--agent", "served_agents:cook"]
    with serving(project, "serve", *agents, "--port", "0") as (process, line):
        assert line.startswith("Guide, Cook at http://127.0.0.1:")
        url = url_in(line)
        with httpx2.Client(base_url=url, trust_env=False) as client:
            assert 'content="[&quot;Guide&quot;, &quot;Cook&quot;]"' in client.get("/").text
            answer = client.post("/runs", json={"input": "hi", "agent": "Cook"})
            assert answer.json()["result"]["content"] == "soup"
            assert client.get("/", headers={"host": "rebound.test"}).status_code == 421
        http = openai.DefaultHttpxClient(trust_env=False)
        with openai.OpenAI(base_url=f"{url}v1", api_key="none", http_client=http) as one:
            said = one.chat.completions.create(model="Guide", messages=[{"role": "user", "content": "hi"}])
        assert said.choices[0].message.content == "hello"
        more = f"for OpenAI's clients {url}v1, for programs {url}runs, described by {url}openapi.json\n"
        assert read_and_end(process) == (0, more, "")


@pytest.mark.slow
def test_other_hosts_need_a_token_which_is_in_the_address_of_the_page(project: Path):
    words = ["serve", "--agent", "served_agents:guide", "--port", "0", "--host", "0.0.0.0"]
    with serving(project, *words, FRACTAL_TOKEN="a b") as (process, line):
        page = url_in(line)
        assert page.endswith("/?token=a%20b")
        with httpx2.Client(trust_env=False, follow_redirects=True) as client:
            assert client.get(page.partition("?")[0]).status_code == 401
            assert client.get(page).status_code == 200
        assert read_and_end(process)[0] == 0


@pytest.mark.slow
def test_who_lets_everybody_in_is_told_so(project: Path):
    words = ["serve", "--agent", "served_agents:guide", "--port", "0", "--host", "0.0.0.0", "--no-token"]
    with serving(project, *words) as (process, line):
        with httpx2.Client(trust_env=False) as client:
            assert client.get(url_in(line), headers={"host": "anything.test"}).status_code == 200
        status, _, errors = read_and_end(process)
    assert status == 0
    assert "everybody who reaches this address can use the agents" in errors


@pytest.mark.slow
def test_the_demo_is_served_with_its_three_agents(tmp_path: Path):
    pytest.importorskip("rich")
    with serving(tmp_path, "demo", "--serve", "--port", "0") as (process, line):
        assert line.startswith("Ask the Planner, say: One day in Rome")
        assert process.stdout is not None
        url = url_in(process.stdout.readline())
        with httpx2.Client(base_url=url, trust_env=False, timeout=20) as client:
            first = client.post("/runs", json={"input": "One day in Rome"}).json()["result"]
            assert first["content"].startswith("Morning  Colosseum")
            again = client.post("/runs", json={"input": "Another", "messages": first["messages"]}).json()["result"]
            assert again["content"] == first["content"]
        assert read_and_end(process)[0] == 0


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--host", "0.0.0.0"], "say with --token"),
        (["--host", "192.0.2.1"], "say with --token"),
        (["--token", "x", "--no-token"], "not both"),
        (["--agent", "served_agents:twin"], "two agents are called 'Guide'"),
        (["--host", "no.such.host.invalid", "--token", "x"], "--host no.such.host.invalid"),
    ],
)
def test_what_cannot_be_served_is_wrong_use(
    words: list[str], said: str, project: Path, capsys: pytest.CaptureFixture[str]
):
    assert main(["serve", "--agent", "served_agents:guide", *words]) == 2
    assert said in capsys.readouterr().err


def test_an_agent_whose_calls_block_is_not_served(project: Path, capsys: pytest.CaptureFixture[str]):
    assert main(["serve", "--agent", "served_agents:blocking"]) == 2
    assert "serve a fractal.BaseAgent" in capsys.readouterr().err


def test_a_port_that_is_taken_is_wrong_use(project: Path, capsys: pytest.CaptureFixture[str]):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        assert main(["serve", "--agent", "served_agents:guide", "--port", f"{port}"]) == 2
    assert "in use" in capsys.readouterr().err


def test_it_says_what_is_missing(project: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert main(["serve", "--agent", "served_agents:guide"]) == 2
    assert "pip install 'fractal-anyio[fastapi]'" in capsys.readouterr().err


def test_the_page_is_opened_when_it_can_be(project: Path, monkeypatch: pytest.MonkeyPatch):
    from fractal.cli import serve

    opened: list[str] = []
    monkeypatch.setattr(serve.webbrowser, "open", opened.append)
    monkeypatch.setattr(serve, "_server", lambda app, begun: Begun(begun))
    assert main(["serve", "--agent", "served_agents:guide", "--port", "0", "--open"]) == 0
    until(lambda: bool(opened))
    assert re.fullmatch(r"http://127\.0\.0\.1:\d+/", opened[0])


class Begun:
    """A server that has begun, and ends."""

    def __init__(self, begun: Any) -> None:
        self._begun = begun

    def run(self, sockets: list[socket.socket]) -> None:
        self._begun()
