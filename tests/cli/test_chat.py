"""`fractal chat`, in a terminal and through a pipe."""

from __future__ import annotations

import errno
import io
import json
import os
import re
import select
import signal
import stat
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

import fractal
from fractal.cli.chat import _Interrupts, save_messages
from fractal.cli.main import main
from fractal.testing import Endpoint, answers, check_messages

ROOT = Path(fractal.__file__).parents[1]
TEXT_OF_LONG = "la " * 400

AGENTS = """
import time
import anyio
from fractal import BaseAgent, Deny, Limits, OpenAIModel, sync, tool

model = OpenAIModel(base_url=URL, api_key="k")

@tool(requires_approval=True)
def remove(path: str) -> str:
    "Remove a file."
    return f"removed {path}"

@tool
async def look(at: str) -> str:
    return f"seen {at}"

@tool
async def tidy() -> str:
    try:
        print("at work", flush=True)
        await anyio.sleep_forever()
    finally:
        with anyio.CancelScope(shield=True):
            print("tidying", flush=True)
            await anyio.sleep(0.3)
            print("tidied", flush=True)

@tool
def grind() -> str:
    print("grinding", flush=True)
    time.sleep(2)

@tool(on_cancel="wait")
def hold() -> str:
    print("holding", flush=True)
    time.sleep(2)

@tool(on_cancel="wait", timeout=0.05)
def lag() -> str:
    time.sleep(0.3)

@tool(requires_approval=True)
def note(**words: str) -> str:
    return "noted"

@tool(terminate=True)
def tally() -> list:
    return ["it", 1]

@tool(terminate=True)
def close() -> str:
    return "closed for today"

def keeper(name="Keeper", kind=BaseAgent, **options):
    agent = kind(name, "You keep files.", "m-1", model, limits=Limits(grace=0.1), **options)
    for each in (remove, look, tidy, grind, hold, lag, note, tally, close):
        agent.add_tool(each)
    return agent

agent = keeper()
strict = keeper(approve=lambda call: Deny("never"))
counting = BaseAgent("Counter", "You count.", "m-1", model, output_type=list[int])
lead = BaseAgent("Lead", "You lead.", "m-1", model)
lead.register_delegate(keeper("Helper"), "ask_helper")
lead.register_delegate(keeper("Guarded", approve=lambda call: Deny("never")), "ask_guarded")

class Ready(BaseAgent):
    is_open = False
    def __init__(self):
        super().__init__("Ready", lambda: "open" if self.is_open else 1 / 0, "m-1", model)
    async def __aenter__(self):
        self.is_open = True
    async def __aexit__(self, *error):
        self.is_open = False

class Blocking(sync.BaseAgent):
    is_open = False
    def __init__(self):
        super().__init__("Blocking", lambda: "open" if self.is_open else 1 / 0, "m-1", model)
    def __enter__(self):
        self.is_open = True
    def __exit__(self, *error):
        self.is_open = False

class Locked(BaseAgent):
    def __init__(self):
        super().__init__("Locked", "You are locked.", "m-1", model)
    async def __aenter__(self):
        raise LookupError("no pool")
"""


def answer(request: Any) -> Any:
    messages = request.body["messages"]
    last = messages[-1]
    if any("bad" in str(message["content"]) for message in messages):
        return answers.failure(400, "odd\nvery odd")
    if last["role"] == "tool":
        return f"the tool said: {last['content']}"
    text = last["content"]
    if text == "long":
        return answers.text(TEXT_OF_LONG, chunk_delay=0.02)
    if text == "hang":
        return answers.hang()
    if text == "count":
        return "[1, 2, 3]"
    if text == "remove two":
        return answers.calls(*(answers.call("remove", {"path": path}) for path in "xy"))
    if found := re.fullmatch(r"(?:after (\S+) )?call (\w+) ?(.*)", text):
        return answers.calls(answers.call(found[2], found[3] or "{}"), delay=float(found[1] or 0), text="Let me see.")
    return f"heard {text} well"


@pytest.fixture
def endpoint() -> Iterator[Endpoint]:
    with Endpoint(answer) as endpoint:
        yield endpoint


@pytest.fixture
def project(tmp_path: Path, endpoint: Endpoint, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The current directory, with a module of agents in it."""
    (tmp_path / "chat_agents.py").write_text(f"URL = {endpoint.url!r}\n{AGENTS}", encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [entry for entry in sys.path if entry])
    yield tmp_path
    sys.modules.pop("chat_agents", None)


def environment(**more: str) -> dict[str, str]:
    changing = ("OPENAI_", "NO_COLOR", "TERM", "INPUTRC")
    kept = {name: value for name, value in os.environ.items() if not name.startswith(changing)}
    return {**kept, "PYTHONPATH": str(ROOT), "PYTHONIOENCODING": "utf-8", "TERM": "dumb", "INPUTRC": os.devnull, **more}


def command(*arguments: str, agent: str = "agent") -> list[str]:
    return [sys.executable, "-m", "fractal", "chat", "--agent", f"chat_agents:{agent}", *arguments]


def told_by_users(endpoint: Endpoint) -> list[str]:
    """What the user had said by the last request."""
    return [message["content"] for message in endpoint.requests[-1].body["messages"] if message["role"] == "user"]


class Terminal:
    """`fractal chat` in a terminal of its own, whose keys send signals."""

    _OWN_THE_TERMINAL = (
        "import fcntl, os, sys, termios; fcntl.ioctl(0, termios.TIOCSCTTY, 0); os.execv(sys.argv[1], sys.argv[1:])"
    )

    def __init__(self, *arguments: str, agent: str = "agent", **more: str) -> None:
        import fcntl
        import pty
        import struct
        import termios

        self._ours, theirs = pty.openpty()
        fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 50, 200, 0, 0))
        self._process = subprocess.Popen(
            [sys.executable, "-ISc", self._OWN_THE_TERMINAL, *command(*arguments, agent=agent)],
            env=environment(**more),
            stdin=theirs,
            stdout=theirs,
            stderr=theirs,
            start_new_session=True,
        )
        os.close(theirs)
        self.text = ""  # all of it
        self._seen = 0

    def type(self, text: str) -> None:
        os.write(self._ours, text.encode())

    def wait_for(self, words: str, seconds: float = 20) -> str:
        """Read until the words come, after those of the last time; returns what came before them."""
        deadline = time.monotonic() + seconds
        while (found := self.text.find(words, self._seen)) < 0:
            assert time.monotonic() < deadline, f"no {words!r} in {self.text[self._seen :]!r}"
            assert self._read(deadline - time.monotonic()), f"it ended without {words!r}: {self.text[self._seen :]!r}"
        before = self.text[self._seen : found]
        self._seen = found + len(words)
        return before

    def interrupt(self, prompt: str, words: str) -> None:
        """Press Ctrl-C at a prompt, and once more if Python was not quite waiting for keys: that has one effect."""
        self.wait_for(prompt)
        with suppress(AssertionError):
            self.type(CTRL_C)
            self.wait_for(words, 1)
            return
        self.type(CTRL_C)
        self.wait_for(words)

    def ask(self, line: str) -> None:
        self.wait_for("\n> ")
        self.type(f"{line}\n")
        self.wait_for(f"{line}\r\n")

    def says(self, line: str, *words: str) -> None:
        """Ask, and wait for what is said to it."""
        self.ask(line)
        for each in words:
            self.wait_for(each)

    def pause(self, seconds: float) -> None:
        """Type nothing for a while, as a person does; reads on meanwhile."""
        until = time.monotonic() + seconds
        while (left := until - time.monotonic()) > 0:
            self._read(left)

    def end(self, seconds: float = 20) -> int:
        """Read to its end; returns its status."""
        deadline = time.monotonic() + seconds
        while self._read(deadline - time.monotonic()):
            assert time.monotonic() < deadline, self.text[self._seen :]
        return self._process.wait(10)

    def _read(self, seconds: float) -> bool:
        if not select.select([self._ours], [], [], max(seconds, 0))[0]:
            return True
        try:
            piece = os.read(self._ours, 65536).decode(errors="replace")
        except OSError:  # how Linux says that nobody writes any more
            piece = ""
        self.text += piece
        return bool(piece)

    def __enter__(self) -> Terminal:
        return self

    def __exit__(self, *error: object) -> None:
        self._process.kill()
        self._process.wait(10)
        os.close(self._ours)


CTRL_C, CTRL_D, CTRL_U, UP = "\x03", "\x04", "\x15", "\x1b[A"

# ---- in a terminal


@pytest.mark.skipif(sys.platform == "win32", reason="there are no pseudo terminals")
@pytest.mark.usefixtures("project")
class TestTerminal:
    def test_text_comes_as_it_is_written_and_ctrl_c_stops_it_but_not_the_program(
        self, endpoint: Endpoint, backend: str
    ):
        with Terminal("--backend", backend) as terminal:
            terminal.wait_for("Keeper listens")
            terminal.ask("long")
            terminal.wait_for("la la la")
            assert endpoint.in_flight == 1
            terminal.type(CTRL_C)
            assert "la la" * 300 not in terminal.wait_for("^C\r\nstopped\r\n")
            endpoint.wait_for_disconnects(1)
            terminal.ask("me")
            terminal.wait_for("heard me well\r\n")
            assert told_by_users(endpoint) == ["long", "me"]
            terminal.wait_for("\n> ")
            terminal.type(CTRL_D)
            assert terminal.end() == 0

    def test_calls_are_shown_as_they_run_and_those_of_delegates_further_in(self, backend: str):
        with Terminal("--backend", backend, agent="lead") as terminal:
            terminal.ask('call ask_helper {"query": "call look {\\"at\\": \\"it\\"}"}')
            shown = terminal.wait_for("> ").replace("\r", "")
        assert re.sub(r"\d\.\d\d s", "0 s", shown) == (
            "Let me see.\n"
            '  → ask_helper(query="call look {\\"at\\": \\"it\\"}")\n'
            '    → Helper: look(at="it")\n'
            "    ← Helper: look ok 0 s\n"
            "  ← ask_helper ok 0 s\n"
            "the tool said: the tool said: seen it\n\n"
        )

    def test_a_call_is_approved_edited_or_denied(self, endpoint: Endpoint, backend: str):
        with Terminal("--backend", backend) as terminal:
            for words, said in (
                (["y"], "removed a b"),
                (["", "Yes"], "removed a b"),
                (["n"], "Error: denied: not approved"),
                (["not that one"], "Error: denied: not that one"),
                (["e", CTRL_U + "{", "e", CTRL_U + '{"path": "other"}'], "removed other"),
            ):
                terminal.ask('call remove {"path": "a b"}')
                assert "→ remove" in terminal.wait_for('Call remove(path="a b")?\r\n')
                for word in words:
                    terminal.wait_for("as JSON: " if word.startswith(CTRL_U) else "why not: ")
                    terminal.type(f"{word}\n")
                terminal.wait_for(f"the tool said: {said}\r\n")
            terminal.ask('call remove {"path": "x"}')
            terminal.interrupt("why not: ", "stopped\r\n")
            terminal.ask('call remove {"path": "x"}')
            terminal.wait_for("why not: ")
            terminal.type(CTRL_D)
            terminal.wait_for("stopped\r\n")
            terminal.ask("me")
            terminal.wait_for("heard me well")
        cancelled = [m["content"] for m in endpoint.requests[-1].body["messages"] if m["role"] == "tool"][-2:]
        assert cancelled == ["Error: the run was cancelled"] * 2

    def test_ctrl_c_cancels_tools_and_waits_for_their_cleanup(self, endpoint: Endpoint, backend: str):
        with Terminal("--backend", backend) as terminal:
            terminal.ask("call tidy")
            terminal.wait_for("at work")
            terminal.type(CTRL_C)
            terminal.wait_for("tidying")
            terminal.type(CTRL_C)  # in haste: means the same
            terminal.wait_for("tidied")
            terminal.wait_for("stopped\r\n")
            terminal.ask("call grind")
            terminal.wait_for("grinding")
            terminal.type(CTRL_C)
            terminal.wait_for("grind could not be stopped and may still take effect\r\n")
            terminal.ask("me")
            terminal.wait_for("heard me well\r\n")
            terminal.wait_for("> ")
            terminal.type("/exit\n")
            assert terminal.end() == 0
            assert "once more" not in terminal.text
        messages = endpoint.requests[-1].body["messages"]
        assert [m["role"] for m in messages][1:] == ["user", "assistant", "tool", "user", "assistant", "tool", "user"]

    def test_a_second_ctrl_c_leaves_what_cannot_be_stopped(self):
        with Terminal() as terminal:
            terminal.ask("call hold")
            terminal.wait_for("holding")
            terminal.type(CTRL_C)
            terminal.wait_for("waiting for what does not stop at once")
            terminal.type(CTRL_C)
            terminal.wait_for("fractal chat: interrupted")
            assert terminal.end() == 130

    def test_a_line_typed_before_a_question_is_no_answer_to_it(self):
        with Terminal() as terminal:
            terminal.ask('after 2 call remove {"path": "x"}')
            terminal.pause(1)  # what is there at once was pasted with the question
            terminal.type("y\n")
            terminal.wait_for("why not: ")
            terminal.type("certainly not\n")
            terminal.wait_for("denied: certainly not")
            assert "the tool said: removed" not in terminal.text

    @pytest.mark.parametrize(
        ("agent", "line", "asked"),
        [
            ("strict", 'call remove {"path": "x"}', False),
            ("lead", 'call ask_guarded {"query": "call remove {\\"path\\": \\"x\\"}"}', False),
            ("lead", 'call ask_helper {"query": "call remove {\\"path\\": \\"x\\"}"}', True),
        ],
    )
    def test_only_calls_that_nobody_else_decides_on_are_asked_about(self, agent: str, line: str, asked: bool):
        with Terminal(agent=agent) as terminal:
            terminal.ask(line)
            if asked:
                terminal.wait_for('Call Helper: remove(path="x")?')
                terminal.wait_for("why not: ")
                terminal.type("never\n")
            terminal.wait_for("the tool said: Error: denied: never")
            assert ("why not: " in terminal.text) is asked

    @pytest.mark.slow
    def test_questions_end_with_the_time_of_their_run(self):
        with Terminal("--timeout", "2") as terminal:
            terminal.ask("remove two")
            terminal.wait_for("why not: ")
            time.sleep(2.1)  # the user takes too long
            terminal.type("y\n")
            assert "why not: " not in terminal.wait_for("no answer (deadline): the run did not finish within 2 s\r\n")
            terminal.ask("me")
            terminal.wait_for("heard me well")

    def test_answers_that_were_not_written_as_text_are_shown_once(self):
        with Terminal() as terminal:
            terminal.ask("call close")
            assert "closed for today" not in terminal.wait_for("← close ok")
            terminal.wait_for("closed for today\r\n")
            terminal.ask("call tally")
            terminal.wait_for('["it",1]\r\n')
        with Terminal(agent="counting") as terminal:
            terminal.ask("count")
            assert terminal.wait_for("> ").split() == ["[1,", "2,", "3]"]

    def test_an_answer_that_failed_says_why_and_the_conversation_goes_on(self, endpoint: Endpoint):
        with Terminal() as terminal:
            terminal.ask("me")
            terminal.says("bad", "no answer (model_error): HTTP 400: odd very odd\r\nthe question is not kept\r\n")
            terminal.says("you", "heard you well")
        assert told_by_users(endpoint) == ["me", "you"]

    def test_commands(self, project: Path, endpoint: Endpoint):
        with Terminal("--save", "kept.json") as terminal:
            says = terminal.says
            says("/help", "/usage")
            says('call look {"at": "it"}', "said: seen it", "\n> ")
            assert len(json.loads((project / "kept.json").read_text("utf-8"))) == 4  # at once, not at the end
            terminal.type("//exit\n")
            terminal.wait_for("heard /exit well")
            says("/nonsense", "there is no /nonsense; /help tells what there is")
            says("/tools", "remove(path: string) → needs approval\r\n", "Remove a file.")
            says("/usage", "last answer: 1 request, 0 tool calls, 10 tokens in, 5 out")
            terminal.wait_for("in all:      3 requests, 1 tool call, 30 tokens in, 15 out")
            says("/save", "saved in kept.json: 6 messages")
            says("/save other.json", "saved in other.json: 6 messages")
            says("/save no/such", "not saved: ")
            says("/new", "a new conversation")
            says("me", "heard me well")
            assert told_by_users(endpoint) == ["me"]
            says("/load", "name the file")
            says("/load no-such", "not loaded: ")
            says("/load chat_agents.py", "not loaded: ")
            says("/load other.json", "loaded from other.json: 6 messages")
            says("again", "heard again well")
            assert told_by_users(endpoint)[1:] == ["/exit", "again"]
            terminal.interrupt("> ", "Ctrl-C once more, Ctrl-D or /exit leaves")
            says("you", "heard you well")
            terminal.interrupt("> ", "once more")
            terminal.interrupt("> ", "\r\n")
            assert terminal.end() == 0
        saved = json.loads((project / "kept.json").read_text("utf-8"))
        check_messages(saved)
        assert saved[-1]["content"] == "heard you well"
        assert sorted(path.name for path in project.iterdir() if path.is_file()) == [
            "chat_agents.py",
            "kept.json",
            "other.json",
        ]

    def test_lines_can_be_fetched_again_and_what_happens_on_the_way_is_dim(self):
        pytest.importorskip("readline")
        with Terminal(TERM="xterm-256color") as terminal:
            terminal.ask('call remove {"path": "x"}')
            terminal.wait_for('\x1b[2m  → remove(path="x")\x1b[0m\r\n')
            terminal.wait_for("why not: ")
            terminal.type("n\n")
            terminal.wait_for("denied: not approved\r\n")
            terminal.wait_for("> ")
            terminal.type(UP)
            terminal.wait_for('call remove {"path": "x"}')  # and not the "n"
            terminal.type("\n")
            terminal.wait_for("why not: ")
            terminal.type("e\n")
            terminal.wait_for('{"path":"x"}')  # there to be edited
            terminal.type("\x02\x02y\n")  # two to the left
            terminal.wait_for("removed xy")
        with Terminal(TERM="xterm-256color", NO_COLOR="1") as terminal:
            terminal.ask('call look {"at": "x"}')
            terminal.wait_for("\n  → look")

    def test_neither_model_nor_tool_can_steer_the_terminal(self):
        with Terminal() as terminal:
            terminal.ask(r'call remove {"path": "a\u001b[2J\u009b2Jb\u202e"}')
            terminal.wait_for(r'Call remove(path="a\u001b[2J\u009b2Jb\u202e")?')
            terminal.wait_for("why not: ")
            terminal.type("y\n")
            terminal.wait_for("removed a [2J 2Jb ")
            terminal.ask(r'call note {"a?\nCall b": "c"}')
            terminal.wait_for(r'Call note("a?\nCall b"="c")?')
            assert not {"\x1b", "\x9b", "\u202e"} & {*terminal.text}

    @pytest.mark.parametrize("term", ["dumb", "xterm-256color"])
    def test_pasted_lines_are_one_question(self, term: str, endpoint: Endpoint):
        with Terminal(TERM=term, NO_COLOR="1") as terminal:
            terminal.wait_for("\n> ")
            if "\x1b[?2004h" in terminal.text:
                terminal.type("\x1b[200~one\ntwo\n/three\x1b[201~\r")
            else:
                terminal.type("one\ntwo\n/three\n")
            terminal.wait_for("well\r\n")
            terminal.says("you", "heard you well")
        assert told_by_users(endpoint) == ["one\ntwo\n/three", "you"]

    def test_a_line_may_go_on_in_the_next(self, endpoint: Endpoint):
        with Terminal() as terminal:
            terminal.wait_for("\n> ")
            terminal.type("one\\\n")
            terminal.wait_for(". ")
            terminal.type("two\n")
            terminal.wait_for("well\r\n")
        assert told_by_users(endpoint) == ["one\ntwo"]

    def test_what_is_approved_is_what_is_shown(self):
        odd = r"/srv/\u202etxt.seton\u200b\u3164\ufe0f\u00a0\u0007\u007f\udb40\udc41"
        with Terminal() as terminal:
            terminal.ask(f'call remove {{"path": "{odd}"}}')
            assert f'→ remove(path="{odd}")\r\n' in terminal.wait_for(f'Call remove(path="{odd}")?\r\n')
            terminal.wait_for("why not: ")
            terminal.type("e\n")
            terminal.wait_for(f'{{"path":"{odd}"}}')  # there to be edited
            terminal.type("\n")
            terminal.wait_for("the tool said: removed /srv/ txt.seton")
            assert not {"\x1b", "\u202e", "\u200b", "\u3164", "\x07", "\x7f"} & {*terminal.text}

    def test_warnings_are_told_once(self):
        # Python itself writes a library's warnings to standard error where nobody has set up logging.
        with Terminal() as terminal:
            terminal.ask("call lag")
            terminal.wait_for("the tool said: ")
            assert len(re.findall("'lag' has not stopped", terminal.text)) == 1


def test_ctrl_c_is_an_exception_only_where_it_is_welcome():
    before = signal.getsignal(signal.SIGINT)
    interrupts = _Interrupts()
    with interrupts:
        with pytest.raises(KeyboardInterrupt), interrupts.welcome():
            signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGINT)
        with pytest.raises(KeyboardInterrupt), interrupts.welcome():
            pytest.fail("the one before was not noted")
        signal.raise_signal(signal.SIGINT)
        interrupts.forget()
        with interrupts.welcome():
            pass
    assert signal.getsignal(signal.SIGINT) is before


# ---- through a pipe


@pytest.fixture
def chat(
    project: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Callable[..., tuple[int, str, str]]:
    def run(lines: str, *arguments: str, agent: str = "agent") -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "stdin", io.StringIO(lines))
        status = main(["chat", "--agent", f"chat_agents:{agent}", *arguments])
        return status, *capsys.readouterr()

    return run


Chat = Callable[..., tuple[int, str, str]]


def test_through_a_pipe_each_line_is_a_turn_and_only_answers_are_printed(chat: Chat, endpoint: Endpoint, backend: str):
    lines = 'me\n\n//you\ncall look {"at": "it"}\nand last'
    assert chat(lines, "--backend", backend) == (
        0,
        "heard me well\nheard /you well\nthe tool said: seen it\nheard and last well\n",
        "",
    )
    assert len(told_by_users(endpoint)) == 4
    assert chat("call close\n")[:2] == (0, "closed for today\n")
    assert chat("count\n", agent="counting")[:2] == (0, "[1,2,3]\n")


def test_through_a_pipe_the_last_answer_tells_the_status(chat: Chat):
    why = "fractal chat: no answer (model_error): HTTP 400: odd very odd\n"
    assert chat("me\nbad\n") == (1, "heard me well\n", why)
    assert chat("bad\nme\n") == (0, "heard me well\n", why)
    assert chat("") == (0, "", "")


def test_through_a_pipe_nobody_approves(chat: Chat):
    line = 'call remove {"path": "x"}\n'
    assert chat(line)[1] == "the tool said: Error: denied: there is nobody at a terminal to approve it\n"
    assert chat(line, agent="strict")[1] == "the tool said: Error: denied: never\n"


def test_a_pipe_gets_what_the_model_wrote(chat: Chat):
    assert chat("a\x1bb\n")[1] == "heard a\x1bb well\n"


@pytest.mark.parametrize("agent", ["Ready", "Blocking"])
def test_an_agent_is_open_all_the_time_and_its_conversation_goes_on_where_it_was_saved(
    agent: str, chat: Chat, endpoint: Endpoint, backend: str
):
    options = ("--backend", backend, "--save", "a.json")
    assert chat("one\n", *options, agent=agent) == (0, "heard one well\n", "")
    assert chat("two\nthree\n", *options, "--continue", "a.json", agent=agent)[0] == 0
    sent = [message["content"] for message in endpoint.requests[-1].body["messages"]]
    assert sent == ["open", "one", "heard one well", "two", "heard two well", "three"]


def test_a_result_of_run_can_be_continued(chat: Chat, project: Path, endpoint: Endpoint, capsys):
    pytest.importorskip("rich")
    assert main(["run", "one", "--json", "--agent", "chat_agents:agent"]) == 0
    (project / "result.json").write_text(capsys.readouterr().out, encoding="utf-8")
    assert chat("two\n", "--continue", "result.json")[0] == 0
    assert told_by_users(endpoint) == ["one", "two"]


def test_an_agent_that_cannot_be_opened_is_told(chat: Chat, backend: str):
    assert chat("one\n", "--backend", backend, agent="Locked") == (1, "", "fractal chat: LookupError: no pool\n")


def test_a_conversation_is_saved_without_what_utf8_cannot_carry(chat: Chat, project: Path):
    assert chat("é \ud800\n/save\n", "--save", "a.json")[0] == 0
    assert json.loads((project / "a.json").read_text("utf-8"))[0]["content"] == "é \ufffd"


@pytest.mark.skipif(sys.platform == "win32", reason="modes and links are others there")
class TestFiles:
    def test_a_conversation_is_for_its_owner_and_a_file_that_is_there_keeps_its_mode(self, chat: Chat, project: Path):
        for name, mode in (("open.json", 0o644), ("private.json", 0o600), ("odd.json", 0o4640)):
            (project / name).write_text("[]", encoding="utf-8")
            (project / name).chmod(mode)
            assert chat("one\n", "--save", name)[0] == 0
            assert (project / name).stat().st_mode & 0o7777 == mode & 0o777
        before = os.umask(0)
        try:
            assert chat("one\n", "--save", "new.json")[0] == 0
        finally:
            os.umask(before)
        assert (project / "new.json").stat().st_mode & 0o7777 == 0o600
        assert [path.name for path in project.iterdir() if path.name.startswith(".")] == []

    @pytest.mark.parametrize("to", ["real.json", "missing.json", "."])
    def test_a_link_is_not_followed_and_that_is_told_before_anything_is_paid_for(
        self, to: str, chat: Chat, project: Path, endpoint: Endpoint
    ):
        (project / "real.json").write_text("precious", encoding="utf-8")
        (project / "a.json").symlink_to(to)
        words = "it is a link: name the file that it leads to\n"
        assert chat("one\n", "--save", "a.json") == (2, "", f"fractal chat: --save a.json: {words}")
        assert not endpoint.requests
        assert f"not saved: [Errno {errno.ELOOP}] {words[:-1]}" in chat("one\n/save a.json\n")[2]
        assert (project / "real.json").read_text("utf-8") == "precious"
        assert (project / "a.json").is_symlink()
        assert not (project / "missing.json").exists()

    def test_what_is_no_file_is_not_replaced(self, chat: Chat, project: Path):
        os.mkfifo(project / "pipe")
        assert chat("one\n", "--save", "pipe")[::2] == (2, "fractal chat: --save pipe: it is no regular file\n")
        assert "it is no regular file" in chat("one\n/save pipe\n/save /dev/null\n")[2]
        assert stat.S_ISFIFO((project / "pipe").stat().st_mode)
        assert not os.path.isfile("/dev/null")

    def test_what_cannot_be_written_loses_nothing(self, project: Path, monkeypatch: pytest.MonkeyPatch):
        (project / "a.json").write_text("before", encoding="utf-8")

        def fail(descriptor: int) -> None:
            raise OSError(errno.ENOSPC, "no space")

        monkeypatch.setattr(os, "fsync", fail)
        with pytest.raises(OSError, match="no space"):
            save_messages("a.json", [{"role": "user", "content": "x"}])
        assert (project / "a.json").read_text("utf-8") == "before"
        assert {path.name for path in project.iterdir()} == {"a.json", "chat_agents.py"}

    def test_a_draft_is_not_where_somebody_could_put_something(self, project: Path, monkeypatch: pytest.MonkeyPatch):
        drafts: list[str] = []
        replace = Path.replace
        monkeypatch.setattr(Path, "replace", lambda path, to: (drafts.append(path.name), replace(path, to))[1])
        for _ in range(2):
            save_messages("a.json", [])
        assert len(set(drafts)) == 2
        monkeypatch.setattr("secrets.token_hex", lambda size: "guessed")
        (project / ".fractal.guessed").symlink_to("a.json")
        with pytest.raises(FileExistsError):
            save_messages("a.json", [{"role": "user", "content": "x"}])
        assert json.loads((project / "a.json").read_text("utf-8")) == []
        assert (project / ".fractal.guessed").is_symlink()  # it is not ours to remove

    def test_a_file_of_another_group_is_not_opened_to_the_own_one(self, project: Path, monkeypatch: pytest.MonkeyPatch):
        (project / "a.json").write_text("[]", encoding="utf-8")
        (project / "a.json").chmod(0o664)
        monkeypatch.setattr(os, "fchown", lambda *facts: (_ for _ in ()).throw(PermissionError("no")))
        facts = (project / "a.json").lstat()
        other = os.stat_result((*facts[:5], facts.st_gid + 1, *facts[6:]))
        monkeypatch.setattr("fractal.cli.files._regular", lambda path: other)
        save_messages("a.json", [])
        assert (project / "a.json").stat().st_mode & 0o777 == 0o600


def test_what_is_saved_has_escapes_for_what_steers_a_terminal(chat: Chat, project: Path):
    assert chat("a\x1b[2J\u202e\u200b é\n", "--save", "a.json")[0] == 0
    text = (project / "a.json").read_text("utf-8")
    assert r"a\u001b[2J\u202e\u200b é" in text
    assert json.loads(text)[0]["content"] == "a\x1b[2J\u202e\u200b é"


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (b"[" * 100_000, "nested too deeply"),
        (b'[{"role": "user", "content": ' + b"9" * 5000 + b"}]", "Exceeds the limit"),
        (b"\xff\xfe\x00", "codec can't decode"),
        (b"", "Expecting value"),
        (b"null", "it holds no list of messages"),
        (b'{"messages": {}}', "it holds no list of messages"),
        (b"[1]", "messages[0]: a message is a dict with a role, not int"),
        (b'[{"role": ["user"]}]', "messages[0]: unknown role"),
        (b'[{"role": "tool", "tool_call_id": "x", "content": "y"}]', "messages[0]: a result for tool call 'x'"),
        (b'[{"role": "assistant", "tool_calls": [{"id": "\\ud800"}]}]', "has no result"),
        (b'[{"role": "\\u001b[2J\\u202e"}]', r"messages[0]: unknown role '\x1b[2J\u202e'"),
    ],
    ids=lambda value: str(value)[:30],
)
def test_a_file_that_is_no_conversation_is_told(data: bytes, words: str, chat: Chat, project: Path):
    (project / "odd.json").write_bytes(data)
    status, out, err = chat("one\n", "--continue", "odd.json")
    assert (status, out) == (2, "")
    assert err.startswith("fractal chat: --continue odd.json: ")
    assert words in err
    assert words in chat("/load odd.json\n")[2]


@pytest.mark.skipif(sys.platform == "win32", reason="there is no such device")
def test_a_file_without_an_end_is_not_read(chat: Chat, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("fractal.cli.files.LONGEST_FILE", 2**20)
    assert chat("one\n", "--continue", "/dev/zero")[2] == "fractal chat: --continue /dev/zero: it has more than 1 MiB\n"


def test_a_conversation_that_could_not_be_saved_fails(chat: Chat, project: Path):
    status, out, err = chat("one\n", "--save", ".")
    assert (status, out) == (1, "heard one well\n")
    assert err.startswith("fractal chat: not saved: ")
    assert not [*project.parent.glob(f".{project.name}*")]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--continue", "none.json"], "--continue none.json: No such file or directory"),
        (["--continue", "odd.json"], "--continue odd.json: messages[0]: unknown role 'nobody'"),
        (["--continue", "text.json"], "--continue text.json: it holds no list of messages"),
        (["--continue", "chat_agents.py"], "--continue chat_agents.py: Expecting value"),
        (["--save", "none/a.json"], "--save none/a.json: there is no such directory"),
        (["--model", "m"], "--model is for the default agent"),
    ],
)
def test_wrong_use_is_told(options: list[str], message: str, chat: Chat, project: Path):
    (project / "odd.json").write_text('[{"role": "nobody"}]', encoding="utf-8")
    (project / "text.json").write_text('"hi"', encoding="utf-8")
    status, out, err = chat("one\n", *options)
    assert (status, out) == (2, "")
    assert err.startswith(f"fractal chat: {message}")


def test_it_needs_no_rich(chat: Chat, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(sys.modules, "rich", None)
    assert chat("one\n") == (0, "heard one well\n", "")


@pytest.mark.skipif(sys.platform == "win32", reason="SIGINT is not sent to one process there")
@pytest.mark.usefixtures("project")
def test_ctrl_c_ends_it_where_there_is_no_terminal(endpoint: Endpoint, backend: str):
    process = subprocess.Popen(
        command("--backend", backend),
        env=environment(),
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        encoding="utf-8",
    )
    try:
        assert process.stdin is not None
        process.stdin.write("hang\n")
        process.stdin.flush()
        endpoint.wait_for_requests(1, timeout=20)
        process.send_signal(signal.SIGINT)
        endpoint.wait_for_disconnects(1)
        assert process.communicate(timeout=10) == ("", "fractal chat: interrupted\n")
        assert process.returncode == 130
    finally:
        process.kill()
        process.communicate()
