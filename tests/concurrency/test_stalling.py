"""Functions that block the event loop are named, where somebody asks for it."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import threading
import time
from typing import Any

import anyio
import anyio.lowlevel
import pytest

from fractal import BaseAgent, InvalidArguments, tool
from fractal._concurrency import stall as _stall
from fractal.events import WarningRaised
from fractal.testing import ScriptedModel, answers, stall_guard

THRESHOLD = 0.06
LONG = 0.5
"""Seconds: long enough that the guard looks often enough on a busy machine too."""


def block() -> None:
    time.sleep(LONG)


def agent(*steps: Any, **options: Any) -> BaseAgent:
    return BaseAgent("A", "a", client=ScriptedModel([*steps, "done"]), **options)


async def stalls(one: BaseAgent) -> list[str]:
    events: list[Any] = []
    one.observers = (events.append,)
    with stall_guard(THRESHOLD) as told:
        result = await one.run("go")
    assert result.content is not None
    assert result.warnings == told
    assert [event.message for event in events if isinstance(event, WarningRaised)] == told
    return told


async def test_a_tool_that_blocks_is_named_with_its_line_once():
    async def look() -> str:
        await anyio.sleep(0)
        block()
        await anyio.sleep(0)
        return "seen"

    [told] = await stalls(agent(answers.calls(answers.call("look"))).add_tool(look))
    assert re.fullmatch(
        r"tool 'look' has blocked the event loop for more than [\d.]+ s, at test_stalling\.py:\d+ in block", told
    )
    assert float(told.split("more than ")[1].split(" s")[0]) >= 0.05


async def test_a_tool_that_computes_and_one_that_blocks_while_it_is_cancelled_are_named():
    async def compute() -> None:
        until = time.monotonic() + LONG
        while time.monotonic() < until:
            pass

    async def clean_up() -> None:
        try:
            await anyio.sleep_forever()
        finally:
            block()

    calls = answers.calls(answers.call("compute"))
    [told] = await stalls(agent(calls).add_tool(compute))
    assert told.startswith("tool 'compute'")
    cleaning = agent(answers.calls(answers.call("clean_up"))).add_tool(tool(timeout=0.1)(clean_up))
    [told] = await stalls(cleaning)
    assert told.startswith("tool 'clean_up'")


async def test_hooks_and_prompt_functions_are_watched_too():
    async def prompt() -> str:
        block()
        return "a"

    def plain_prompt() -> str:
        block()
        return "a"

    for source in (prompt, plain_prompt):
        [told] = await stalls(BaseAgent("A", source, client=ScriptedModel(["done"])))
        assert told.startswith(source.__name__)
    one = agent()

    @one.output_validator
    async def check(text: str) -> None:
        block()

    [told] = await stalls(one)
    assert told.startswith("check")


async def test_an_observer_is_watched_and_its_own_stall_is_no_event():
    def slow(event: Any) -> None:
        if event.kind == "run_started":
            block()

    with stall_guard(THRESHOLD) as told:
        result = await agent(observers=[slow]).run("go")
    assert len(told) == 1
    assert told[0].startswith("observer 'slow' has blocked")
    assert result.warnings == told


async def test_what_waits_as_it_should_and_what_blocks_a_thread_of_its_own_is_not_named():
    async def wait() -> str:
        await anyio.sleep(LONG)
        return "waited"

    def work() -> str:
        block()
        return "worked"

    both = agent(answers.calls(answers.call("wait"), answers.call("work"))).add_tool(wait).add_tool(work)
    assert await stalls(both) == []


async def test_the_inner_of_two_functions_is_blamed():
    child = BaseAgent("Child", lambda: time.sleep(LONG) or "a", client=ScriptedModel(["deep"]))
    parent = agent(answers.calls(answers.call("ask", {"query": "?"}))).register_delegate(child, "ask")
    with stall_guard(THRESHOLD) as told:
        await parent.run("go")
    assert len(told) == 1
    assert "<lambda>" in told[0]


async def test_a_tool_gives_and_raises_the_same_under_the_guard():
    async def fails() -> None:
        await anyio.sleep(0)
        raise LookupError("no")

    async def gives() -> list[int]:
        return [1, 2]

    with stall_guard():
        one = agent(answers.calls(answers.call("fails"), answers.call("gives"))).add_tool(fails).add_tool(gives)
        result = await one.run("go")
        with anyio.move_on_after(0.05):
            await agent(answers.calls(answers.call("hang"))).add_tool(anyio.sleep_forever, name="hang").run("go")
    assert [call.error for call in result.tool_results] == ["LookupError: no", None]
    assert result.tool_results[1].content == [1, 2]


def test_guards_nest_and_leave_no_thread_behind():
    before = threading.active_count()
    with stall_guard(5) as outer, stall_guard(5) as inner:
        anyio.run(agent(answers.calls(answers.call("f"))).add_tool(anyio.lowlevel.checkpoint, name="f").run, "x")
    assert outer == inner == []
    assert threading.active_count() == before


@pytest.mark.parametrize("threshold", [0, -1, True, "1", float("nan")])
def test_a_threshold_is_a_number_above_0(threshold: Any):
    with pytest.raises(InvalidArguments, match="threshold="), stall_guard(threshold):
        pass


PROGRAM = """
import time, anyio
from fractal import BaseAgent
from fractal.testing import ScriptedModel, answers

async def look():
    time.sleep(1.5)

async def main():
    model = ScriptedModel([answers.calls(answers.call("look")), "done"])
    print(len((await BaseAgent("A", "a", client=model).add_tool(look).run("go")).warnings))

anyio.run(main)
"""


# What is set, Python's flags, and how many warnings there are.
SWITCHES: dict[str, tuple[dict[str, str], list[str], str]] = {
    "off": ({}, [], "0"),
    "dev mode": ({}, ["-X", "dev"], "1"),
    "asyncio's debug mode": ({"PYTHONASYNCIODEBUG": "1"}, [], "1"),
    "by variable": ({"FRACTAL_STALL_GUARD": "0.2"}, [], "1"),
    "not by variable": ({"FRACTAL_STALL_GUARD": "0"}, ["-X", "dev"], "0"),
    "no number": ({"FRACTAL_STALL_GUARD": "soon"}, [], "0"),
}


def test_the_guard_is_on_in_debug_and_by_a_variable():
    started = {  # all at once, since they mostly wait
        name: subprocess.Popen(
            [sys.executable, *flags, "-W", "ignore", "-c", PROGRAM],
            env={**os.environ, **environment},
            stdout=subprocess.PIPE,
            text=True,
        )
        for name, (environment, flags, _) in SWITCHES.items()
    }
    told = {name: process.communicate()[0].strip() for name, process in started.items()}
    assert told == {name: expected for name, (_, _, expected) in SWITCHES.items()}


async def test_of_functions_inside_each_other_the_one_that_blocks_is_named_and_no_other():
    told = list[str]()
    with _stall._Guard(60.0) as guard:
        outer, inner = guard.begin("outer"), guard.begin("inner")
        outer.ticks = inner.ticks = _stall._TICKS
        guard.end(inner, told.append)
        guard.end(outer, told.append)
    assert [message.partition(" has")[0] for message in told] == ["inner"]


async def test_an_awaitable_that_is_watched_can_be_ended():
    ended = list[str]()

    async def wait() -> None:
        try:
            await anyio.sleep_forever()
        finally:
            ended.append("here")

    with _stall._Guard(60.0) as guard:
        timed: Any = _stall._Timed(wait(), guard, "wait", print)
        timed.send(None)
        timed.close()
    assert ended == ["here"]


@pytest.mark.parametrize(
    ("named", "debug", "pause"), [("0.5", "", 0.5), ("soon", "", None), ("0", "1", None), ("", "1", _stall.IN_DEBUG)]
)
def test_the_environment_asks_for_it(named: str, debug: str, pause: float | None, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv(_stall.ENVIRONMENT, named)
    monkeypatch.setenv("PYTHONASYNCIODEBUG", debug)
    guard = _stall._asked_for()
    assert (guard and guard._pause * _stall._TICKS) == pause
