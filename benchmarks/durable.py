"""What durable runs cost: beside runs without a journal, and beside workflows of DBOS that are written by hand.

`python -m benchmarks.durable [RUNS] [DATABASE]`; a run asks its model eleven times and makes thirty tool calls, three
at a time, in one process, in turns. Costs are processor time, threads included, and numbers are medians of rounds. A
record is of a request, a reply, the beginning or the end of a call.

Runs through DBOS stand beside two others. "By hand" is a workflow that does the same work without us: the same requests
to the same client, and the same calls three at a time, each of them a step of its own. It has half as many steps, since
it notes neither what was sent nor that a call has begun. "Bare" is a workflow that keeps the texts of our records, each
in a step of its own, and does nothing else; it is what a record costs beside a step of DBOS, where what a run costs
without a journal is taken off ours. The database is a file of SQLite, if no URL is given.
"""

from __future__ import annotations

import asyncio
import json
import sys
import tempfile
import time
from collections.abc import Awaitable, Callable
from statistics import median
from typing import Any
from uuid import uuid4

import anyio
from dbos import DBOS

from fractal import BaseAgent, Limits, tool
from fractal.durable import DurableAgent, MemoryJournal, SQLiteJournal
from fractal.durable._database import Database
from fractal.messages import Transcript
from fractal.model import ModelRequest
from fractal.testing import ScriptedModel, answers

ROUNDS, CALLS = 7, 30
Run = Callable[[], Awaitable[Any]]


async def look(n: int) -> str:
    """Look something up."""
    return f"found {n}"


def model(request: Any) -> Any:
    """Three calls at a time, then the answer."""
    results = sum(each["role"] == "tool" for each in request.messages)
    if results == CALLS:
        return "all is done"
    return [answers.call("look", {"n": n}, id=f"c{n}") for n in range(results, results + 3)]


client = ScriptedModel(model)
agent = BaseAgent("Looker", "You look things up.", client=client, limits=Limits(max_iterations=50))
agent.add_tool(tool(look, idempotent=True))
durable = DurableAgent(agent, name="looker")


@DBOS.workflow(name="bare")
async def bare(texts: dict[str, str]) -> str:
    """A workflow that keeps the records of a run, and does nothing else."""

    async def keep(text: str) -> str:
        return text

    for key, text in texts.items():
        await DBOS.reserve_step().run_async({"name": key}, keep, text)
    return texts["end"]


async def ask(messages: list[dict[str, Any]]) -> dict[str, Any]:
    """Ask the model, as a step; returns its message."""
    system, transcript = "You look things up.", Transcript(messages)
    reply = await client.respond(ModelRequest(model="gpt-4o-mini", system=system, transcript=transcript))
    said: dict[str, Any] = {"role": "assistant", "content": reply.text}
    if reply.tool_calls:
        said["tool_calls"] = [
            {"id": call.id, "type": "function", "function": {"name": call.name, "arguments": call.arguments}}
            for call in reply.tool_calls
        ]
    return said


async def called(call: dict[str, Any]) -> dict[str, Any]:
    """Make a call, as a step; returns the message for the model."""
    content = await look(**json.loads(call["function"]["arguments"]))
    return {"role": "tool", "tool_call_id": call["id"], "content": content}


@DBOS.workflow(name="by hand")
async def by_hand(question: str) -> str:
    """The work of a run, as one would write it with DBOS alone."""
    messages: list[dict[str, Any]] = [{"role": "user", "content": question}]
    while "tool_calls" in (said := await DBOS.run_step_async({"name": "ask"}, ask, messages)):
        steps = [DBOS.reserve_step().run_async({"name": "look"}, called, call) for call in said["tool_calls"]]
        messages += [said, *await asyncio.gather(*steps)]
    return str(said["content"])


async def cost_of(run: Run, times: int) -> float:
    """Processor milliseconds of one run."""
    began = time.process_time()
    for _ in range(times):
        await run()
    return (time.process_time() - began) / times * 1000


async def in_turns(runs: dict[str, Run], times: int) -> dict[str, list[float]]:
    """What each costs in each round, in milliseconds."""
    costs: dict[str, list[float]] = {name: [] for name in runs}
    for run in runs.values():
        await run()
    for number in range(ROUNDS):
        for name in [*runs][:: -1 if number % 2 else 1]:
            costs[name].append(await cost_of(runs[name], times))
    return costs


async def records() -> dict[str, str]:
    """The records of one run."""
    journal = MemoryJournal()
    await agent.run("go", journal=journal, run_id="one")
    return journal.runs["one"]


async def fsyncs_per_run(journal: SQLiteJournal) -> float:
    """How many of a run's commits wait for the disk."""
    within, count = Database._within, 0  # pyright: ignore[reportPrivateUsage]

    def counted(self: Database, work: Any, synchronous: str) -> Any:
        nonlocal count
        count += synchronous == "FULL"
        return within(self, work, synchronous)

    Database._within = counted  # type: ignore[method-assign]
    try:
        for _ in range(10):
            await agent.run("go", journal=journal, run_id=uuid4().hex)
    finally:
        Database._within = within  # type: ignore[method-assign]
    return count / 10


async def journals(folder: str, times: int) -> None:
    """Tell what a journal costs."""
    sqlite, steps = SQLiteJournal(f"{folder}/journal.db"), len(await records())
    costs = await in_turns(
        {
            "no journal": lambda: agent.run("go"),
            "memory": lambda: agent.run("go", journal=MemoryJournal(), run_id="one"),
            "SQLite": lambda: agent.run("go", journal=sqlite, run_id=uuid4().hex),
        },
        times,
    )
    none = median(costs["no journal"])
    print(f"{'journal':12} {'ms a run':>9} {'ms a step':>10}    ({steps} steps)")
    for name, each in costs.items():
        print(f"{name:12} {median(each):9.2f} {(median(each) - none) / steps:10.3f}")
    count = await fsyncs_per_run(sqlite)
    print(f"SQLite: {count:.1f} fsyncs a run, {count / steps:.2f} a step\n")


async def steps_of_ours() -> int:
    """How many steps of DBOS keep the records of a run."""
    run = await durable.start("go")
    await run.result()
    return len(await DBOS.list_workflow_steps_async(run.run_id))


async def workflows(times: int) -> None:
    """Tell what a run costs through us, beside workflows of DBOS without us."""
    texts = await records()

    async def ours() -> None:
        await (await durable.start("go")).result()

    async def wait(workflow: Any, given: Any) -> None:
        handle = await DBOS.start_workflow_async(workflow, given)
        await handle.get_result(polling_interval_sec=0.01)

    runs: dict[str, Run] = {
        "no journal": lambda: agent.run("go"),
        "ours": ours,
        "by hand": lambda: wait(by_hand, "go"),
        "bare": lambda: wait(bare, texts),
    }
    costs = await in_turns(runs, times)
    steps = {"ours": await steps_of_ours(), "by hand": 1 + CALLS // 3 + CALLS, "bare": len(texts)}
    print(f"{'DBOS':12} {'ms a run':>9} {'steps':>10}")
    for name, number in steps.items():
        print(f"{name:12} {median(costs[name]):9.2f} {number:10}")
    record = median((a - b) / c for a, b, c in zip(costs["ours"], costs["no journal"], costs["bare"], strict=True))
    run = median(a / b for a, b in zip(costs["ours"], costs["by hand"], strict=True))
    print(f"DBOS: a record through us costs {record:.2f} times a bare step, and a run {run:.2f} times one by hand\n")


async def recovery() -> None:
    """Tell how long it takes to go on with long runs."""

    async def step() -> str:
        """Do a step."""
        return "done"

    for turns in (50, 500):

        def said(request: Any, turns: int = turns) -> Any:
            n = len(request["messages"]) // 2
            return answers.call("step", {}, id=f"call_{n}") if n < turns else "done"

        journal = MemoryJournal()
        walker = BaseAgent("Walker", "You walk.", client=ScriptedModel(said)).add_tool(step)
        await walker.run("go", max_iterations=1000, journal=journal, run_id="one")
        del journal.runs["one"]["end"]
        began = time.process_time()
        await walker.run("go", max_iterations=1000, journal=journal, run_id="one")
        milliseconds = (time.process_time() - began) * 1000
        print(f"recovery of {turns} turns: {milliseconds:.0f} ms, {milliseconds / turns:.2f} ms a turn")


async def main(times: int, database: str, folder: str) -> None:
    """Measure all of it."""
    await journals(folder, times)
    await workflows(times)
    await recovery()


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as folder:
        times = int(sys.argv[1]) if len(sys.argv) > 1 else 5
        database = sys.argv[2] if len(sys.argv) > 2 else f"sqlite:///{folder}/runs.db"
        name = "fractal-benchmarks"
        DBOS(config={"name": name, "system_database_url": database, "application_version": "1", "log_level": "ERROR"})
        DBOS.launch()
        anyio.run(main, times, database, folder)
        DBOS.destroy()
