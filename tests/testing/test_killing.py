"""`kill_everywhere` finds what does not survive the end of its process, and refuses what proves nothing."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from fractal import AgentResult, BaseAgent
from fractal._engine.journaled import JournaledRun
from fractal._engine.journaled_call import JournaledCall
from fractal.durable.sqlite import _OpenInFile
from fractal.testing import KillFaults, KillWorld, kill_everywhere
from tests.durable.kill_scenarios import SCENARIOS, payer, pays

IN_MEMORY = next((each for each in ("/dev/shm", None) if each is None or os.access(each, os.W_OK)), None)
"""Where files are quick."""


async def two_calls(world: KillWorld) -> AgentResult[Any]:
    agent = BaseAgent("Clerk", "You pay.", client=world.model([pays(1, 2), "done"])).add_tool(payer(world))
    return await agent.run("go", journal=world.journal, run_id="one")


async def recorded_before_the_effect(world: KillWorld) -> AgentResult[Any]:
    start, finish = JournaledCall.start, JournaledCall.finish

    async def start_and_finish(self: JournaledCall, call: Any = None) -> None:
        await start(self)
        value = {"outcome": "ok", "content": None, "text": "", "error": None, "exception": None, "elapsed": 0.0}
        await self._tree.record(self._key("finished"), self._given, value | {"changed": None})

    async def do_nothing(self: JournaledCall, call: Any) -> None: ...

    JournaledCall.start, JournaledCall.finish = start_and_finish, do_nothing  # type: ignore[method-assign]
    try:
        return await two_calls(world)
    finally:
        JournaledCall.start, JournaledCall.finish = start, finish  # type: ignore[method-assign]


async def known_by_the_order_of_starting(world: KillWorld) -> AgentResult[Any]:
    take_calls = JournaledRun.take_calls
    is_second = (world.directory / "journal.db").exists()

    def in_another_order(self: JournaledRun, run: Any, calls: Any, first: int) -> None:
        take_calls(self, run, [*reversed(calls)] if is_second else calls, first)

    JournaledRun.take_calls = in_another_order  # type: ignore[method-assign]
    return await two_calls(world)


async def lost_commits(world: KillWorld) -> AgentResult[Any]:
    record, count = _OpenInFile.record, [0]

    async def lose_some(self: _OpenInFile, key: Any, text: str) -> None:
        count[0] += 1
        if count[0] % 3:
            await record(self, key, text)

    _OpenInFile.record = lose_some  # type: ignore[method-assign]
    return await two_calls(world)


@pytest.mark.parametrize(
    ("scenario", "said"),
    [
        (recorded_before_the_effect, "and it was finished"),
        (known_by_the_order_of_starting, "JournalMismatch"),
        (lost_commits, "are lost"),
    ],
    ids=["record before effect", "order of starting", "lost commit"],
)
def test_what_does_not_survive_is_found(scenario: Callable[[KillWorld], Any], said: str) -> None:
    with pytest.raises(KillFaults) as caught:
        kill_everywhere(scenario, points=7, directory=IN_MEMORY)
    assert any(said in fault for fault in caught.value.report.faults), caught.value
    assert (caught.value.report.writes, caught.value.report.points) == (10, 7)


async def without_a_journal(world: KillWorld) -> AgentResult[Any]:
    return await BaseAgent("A", "a", client=world.model(["hello"])).run("go")


async def failing(world: KillWorld) -> AgentResult[Any]:
    raise RuntimeError("no luck")


@pytest.mark.parametrize(
    ("scenario", "said"), [(without_a_journal, "writes nothing"), (failing, "no luck")], ids=["no journal", "fails"]
)
def test_a_scenario_that_proves_nothing_is_refused(scenario: Callable[[KillWorld], Any], said: str) -> None:
    with pytest.raises(KillFaults, match=said):
        kill_everywhere(scenario)


def test_a_scenario_that_nobody_can_import_is_refused() -> None:
    def local(world: KillWorld) -> None: ...

    with pytest.raises(ValueError, match="cannot be imported"):
        kill_everywhere(local)


def test_nothing_is_left_in_the_directory(tmp_path: Path) -> None:
    kill_everywhere(SCENARIOS["streams"], points=1, directory=tmp_path)
    assert [*tmp_path.iterdir()] == []
