"""What was abandoned holds up nobody: no process, however it ends, and whatever has abandoned it."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from tests.support import LOOPS

HANGS = 20
"""Seconds that what hangs would hold up a process that waited for it; half of them is what a busy machine gets."""

PROGRAM = f"""
import asyncio, socket, sys, threading, time
import anyio
from fractal import BaseAgent, OpenAIModel, sync, tool
from fractal.testing import ScriptedModel, answers

kind, loop, end = sys.argv[1:]

def hang(*_, **__):
    print("hangs", flush=True)
    time.sleep({HANGS})

def tool_that_hangs():
    def pay() -> None:
        hang()
    return BaseAgent("A", "a", client=ScriptedModel([answers.call("pay")])).add_tool(pay)

def approver_that_hangs():
    @tool(requires_approval=True)
    async def pay() -> None: ...
    return BaseAgent("A", "a", client=ScriptedModel([answers.call("pay")]), approve=lambda call: hang()).add_tool(pay)

def validator_that_hangs():
    agent = BaseAgent("A", "a", client=ScriptedModel(["done"]))
    agent.output_validator(lambda text: hang())
    return agent

def client_that_hangs():
    class Double:
        def __init__(self):
            self.chat = self.completions = self
        def create(self, **_):
            hang()
    return BaseAgent("A", "a", client=Double())

def name_that_is_looked_up():
    look_up = socket.getaddrinfo
    def slow(host, *more, **named):
        at_once = host != "slow.invalid" or socket.AI_NUMERICHOST in (named.get("flags"), *more[4:])
        return look_up(host, *more, **named) if at_once else hang()
    socket.getaddrinfo = slow
    return BaseAgent("A", "a", client=OpenAIModel(base_url="http://slow.invalid/v1", api_key="any"))

agent = globals()[kind]()
timeout = None if end == "Ctrl-C" else 1.0
# What a first run imports, a busy machine may take longer for than the run has time.
anyio.run(BaseAgent("W", "w", client=ScriptedModel(["warm"])).run, "go")
import httpx2

async def main() -> None:
    await agent.run("go", timeout=timeout)
    if end == "exception":
        raise LookupError
    if end == "sys.exit":
        sys.exit(3)

def go() -> None:
    if loop == "sync":
        sync.run(agent, "go", timeout=timeout)
    elif loop == "uvloop":
        anyio.run(main, backend_options={{"use_uvloop": True}})
    else:
        anyio.run(main, backend=loop)

if end == "thread":
    one = threading.Thread(target=go)
    one.start()
    one.join()
else:
    go()
"""


def seconds_of_the_end(*arguments: str) -> float:
    """How long a program goes on after something in it began to hang."""
    with subprocess.Popen(
        [sys.executable, "-c", PROGRAM, *arguments], stdout=subprocess.PIPE, stderr=subprocess.PIPE
    ) as process:
        assert process.stdout is not None
        try:
            assert process.stdout.readline() == b"hangs\n"
            began = time.monotonic()
            if arguments[-1] == "Ctrl-C":
                time.sleep(0.3)
                process.send_signal(signal.SIGINT)  # once
            process.communicate(timeout=2 * HANGS)
        finally:
            process.kill()
    return time.monotonic() - began


def at_a_time(look: Callable[..., Any], cases: Sequence[tuple[str, ...]]) -> dict[tuple[str, ...], Any]:
    """What is seen of each case: of a few programs side by side, which mostly wait."""
    with ThreadPoolExecutor(4) as pool:
        return dict(zip(cases, pool.map(lambda case: look(*case), cases), strict=True))


def assert_none_goes_on(*cases: tuple[str, ...]) -> None:
    took = at_a_time(seconds_of_the_end, cases)
    assert {case: seconds for case, seconds in took.items() if seconds > HANGS / 2} == {}


def test_an_abandoned_tool_does_not_keep_its_process_alive():
    assert_none_goes_on(*(("tool_that_hangs", loop, "return") for loop in ("sync", *(LOOPS))))


@pytest.mark.skipif(sys.platform == "win32", reason="needs SIGINT")
def test_one_ctrl_c_ends_a_program_with_a_tool_that_hangs():
    assert_none_goes_on(*(("tool_that_hangs", loop, "Ctrl-C") for loop in ("asyncio", "trio", "sync")))


def test_a_process_ends_at_once_however_it_ends():
    assert_none_goes_on(*(("tool_that_hangs", "asyncio", end) for end in ("exception", "sys.exit", "thread")))


@pytest.mark.parametrize("loop", ["asyncio", pytest.param("sync", marks=pytest.mark.slow)])
def test_whatever_is_abandoned_does_not_keep_the_process_alive(loop: str):
    kinds = ["approver_that_hangs", "validator_that_hangs", "client_that_hangs", "name_that_is_looked_up"]
    assert_none_goes_on(*((kind, loop, "return") for kind in kinds))


AGENT = f"""
import time
from fractal import BaseAgent
from fractal.testing import ScriptedModel, answers

def pay() -> None:
    time.sleep({HANGS})

agent = BaseAgent("Payer", "p", client=ScriptedModel([answers.call("pay")])).add_tool(pay)
"""


def seconds_and_end_of_the_command(folder: Path, command: str, backend: str) -> tuple[float, int, str]:
    asked = "inputs" if command == "run-many" else "one"
    options = [command, asked, "--agent", "payer:agent", "--timeout", "2", "--backend", backend]
    began = time.monotonic()
    done = subprocess.run(
        [sys.executable, "-m", "fractal", *options], capture_output=True, text=True, cwd=folder, timeout=2 * HANGS
    )
    return time.monotonic() - began, done.returncode, done.stderr.splitlines()[-1]


def test_the_command_line_ends_at_once_and_says_what_may_still_take_effect(tmp_path: Path):
    (tmp_path / "payer.py").write_text(AGENT)
    (tmp_path / "inputs").write_text("one\n")
    cases = [(command, backend) for command in ("run", "run-many") for backend in ("asyncio", "trio")]
    for (command, _), seen in at_a_time(partial(seconds_and_end_of_the_command, tmp_path), cases).items():
        seconds, status, said = seen
        assert seconds < HANGS / 2
        assert status == 1
        assert said == (
            f"fractal {command}: tool 'pay' could not be stopped and may still take effect;"
            " as the program ends it is at payer.py:7 in pay"
        )
