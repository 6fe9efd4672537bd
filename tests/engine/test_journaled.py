"""Runs with a journal: what is recorded is not done again, wherever the process ended."""

from __future__ import annotations

import json
from typing import Any

import pytest

from fractal import BaseAgent, JournalMismatch, RunContext, RunInProgress, sync, tool
from fractal._engine.journaled import step_here
from fractal.durable import MemoryJournal
from fractal.events import ToolFinished, ToolStarted
from fractal.model import Delta, ModelRequest, Reply
from fractal.testing import ScriptedModel, ScriptedRequest, answers


def turns(request: ScriptedRequest) -> int:
    """The replies in the conversation of a request."""
    return sum(message["role"] == "assistant" for message in request["messages"])


class Shop:
    """An agent that adds twice in one turn, and then once more; and what it has done."""

    def __init__(self, **options: Any) -> None:
        self.added: list[int] = []
        self.keys: list[str] = []

        @tool(**options)
        async def add(number: int, ctx: RunContext) -> int:
            """Add a number."""
            self.added.append(number)
            self.keys.append(ctx.idempotency_key)
            return 2 * number

        self.add = add

        def answer(request: ScriptedRequest) -> Any:
            return [answers.calls(self.call(1), self.call(2)), answers.calls(self.call(3)), "done"][turns(request)]

        self.model = ScriptedModel(answer)
        self.agent = BaseAgent("Shop", "You add.", client=self.model).add_tool(add)

    @staticmethod
    def call(number: int) -> Any:
        return answers.call("add", {"number": number}, id=f"call_{number}")


def cut_after(journal: MemoryJournal, records: int, run_id: str = "one") -> MemoryJournal:
    """The journal as a process leaves it that ends after so many records."""
    left = MemoryJournal()
    left.runs[run_id] = dict([*journal.runs[run_id].items()][:records])
    return left


async def test_a_run_goes_on_after_each_record_and_pays_and_does_nothing_twice() -> None:
    whole, first = MemoryJournal(), Shop(idempotent=True)
    undisturbed = await first.agent.run("go", journal=whole, run_id="one")
    keys = [*whole.runs["one"]]
    for records in range(len(keys) + 1):
        there, again = keys[:records], Shop(idempotent=True)
        result = await again.agent.run("go", journal=cut_after(whole, records), run_id="one")
        assert result.content == "done"
        assert result.messages == undisturbed.messages
        assert len(again.model.requests) == 3 - sum(key.endswith("reply") for key in there)
        assert len(again.added) == 3 - sum(key.endswith("finished") for key in there)
        assert {*again.keys} <= {*first.keys}
        assert result.usage.requests == 3 + (there[-1:] != [] and there[-1].endswith("sent"))


@pytest.mark.parametrize("policy", [{}, {"after_crash": "fail"}], ids=["default", "fail"])
async def test_a_call_that_was_at_work_is_told_to_the_model_as_unknown(policy: dict[str, Any]) -> None:
    whole = MemoryJournal()
    await Shop(**policy).agent.run("go", journal=whole, run_id="one")
    keys = [*whole.runs["one"]]
    started = max(map(keys.index, ("1.0 time 1 started", "1.1 time 1 started")))
    again = Shop(**policy)
    result = await again.agent.run("go", journal=cut_after(whole, started + 1), run_id="one")
    assert result.content == "done"
    assert again.added == [3]
    assert [call.outcome for call in result.tool_results] == ["error", "error", "ok"]
    assert "unknown whether it took effect" in (result.tool_results[0].error or "")


async def test_a_call_that_was_at_work_is_told_to_its_end() -> None:
    whole = MemoryJournal()
    await Shop().agent.run("go", journal=whole, run_id="one")
    keys = [*whole.runs["one"]]
    started = max(map(keys.index, ("1.0 time 1 started", "1.1 time 1 started")))
    journal = cut_after(whole, started + 1)
    async with Shop().agent.stream("go", journal=journal, run_id="one") as stream:
        events = [event async for event in stream if isinstance(event, (ToolStarted, ToolFinished))]
    unknown = [event.result.outcome for event in events[:4] if isinstance(event, ToolFinished)]
    assert [event.kind for event in events] == ["tool_started", "tool_finished"] * 3
    assert unknown == ["error", "error"]


async def test_another_input_is_no_silent_replay() -> None:
    journal, shop = MemoryJournal(), Shop()
    await shop.agent.run("go", journal=journal, run_id="one")
    with pytest.raises(JournalMismatch, match=r"user: go.*user: stop") as caught:
        await shop.agent.run("stop", journal=journal, run_id="one")
    assert (caught.value.run_id, caught.value.step) == ("one", "start")


async def test_another_tool_result_is_no_silent_replay() -> None:
    journal = MemoryJournal()
    await Shop().agent.run("go", journal=journal, run_id="one")
    left = cut_after(journal, len(journal.runs["one"]) - 1)
    records = left.runs["one"]
    changed = json.loads(records["1.0 finished"])
    changed["value"]["text"] = "99"
    records["1.0 finished"] = json.dumps(changed)
    with pytest.raises(JournalMismatch, match=r"tool: 2.*tool: 99"):
        await Shop().agent.run("go", journal=left, run_id="one")


async def test_a_run_that_has_ended_gives_its_result_and_nothing_happens() -> None:
    journal, shop = MemoryJournal(), Shop()
    first = await shop.agent.run("go", journal=journal, run_id="one")
    again = await shop.agent.run("go", journal=journal, run_id="one")
    assert again.model_dump() == first.model_dump()
    assert (len(shop.model.requests), sorted(shop.added)) == (3, [1, 2, 3])


def test_the_facade_records_the_same(backend: str) -> None:
    journal, shop = MemoryJournal(), Shop(idempotent=True)
    with sync.portal(backend=backend):
        whole = sync.run(shop.agent, "go", journal=journal, run_id="one")
        left = cut_after(journal, 5)
        assert sync.run(shop.agent, "go", journal=left, run_id="one").content == whole.content
        assert sync.resume(shop.agent, left, "one").content == whole.content
        blocking = sync.BaseAgent("Shop", "You add.", client=shop.model).add_tool(shop.add)
        assert blocking.resume(cut_after(journal, 5), "one").content == whole.content


async def test_a_run_inside_of_itself_is_in_progress() -> None:
    journal = MemoryJournal()

    async def again() -> str:
        """Begin the run anew."""
        with pytest.raises(RunInProgress, match="run 'one' is in progress"):
            await agent.run("go", journal=journal, run_id="one")
        return "refused"

    agent = BaseAgent("A", "a", client=ScriptedModel([answers.call("again"), "done"])).add_tool(again)
    result = await agent.run("go", journal=journal, run_id="one")
    assert [call.content for call in result.tool_results] == ["refused"]


async def test_a_journal_may_have_a_method_that_is_called_wait():
    class Own:
        kept = MemoryJournal()

        def open(self, run_id: str) -> Any:
            return self.kept.open(run_id)

        async def wait(self) -> None: ...

    agent = BaseAgent("A", "a", client=ScriptedModel(["hello"]))
    for _ in range(2):
        assert (await agent.run("hi", journal=Own(), run_id="one")).content == "hello"


async def test_a_step_is_known_where_it_is_made_in_calls_inside_of_calls_too() -> None:
    steps = list[str | None]()

    async def outer(ctx: RunContext) -> str:
        """Call another tool."""
        steps.append(step_here())
        return str((await ctx.agent.execute_tool("inner")).content)

    async def inner() -> str:
        """Be called."""
        steps.append(step_here())
        return "here"

    def answer(request: ScriptedRequest) -> Any:
        steps.append(step_here())
        return [answers.call("outer"), "done"][turns(request)]

    agent = BaseAgent("A", "a", client=ScriptedModel(answer)).add_tool(outer).add_tool(inner)
    assert (await agent.run("go", journal=MemoryJournal(), run_id="one")).content == "done"
    assert steps == ["one: 1", "one: 1.0", "one: 1.0", "one: 2"]
    steps.clear()
    await agent.run("go")
    assert steps == [None] * 4


async def test_what_a_model_thinks_is_shown_as_it_comes_and_only_text_is_recorded() -> None:
    class Thinking:
        async def respond(self, request: ModelRequest) -> Reply:
            return await self.stream(request, print)  # type: ignore[arg-type]

        async def stream(self, request: ModelRequest, sink: Any) -> Reply:
            await sink(Delta("reasoning", "a greeting"))
            await sink(Delta("text", "hello"))
            return Reply(text="hello")

    journal = MemoryJournal()
    async with BaseAgent("A", "a", client=Thinking()).stream("go", journal=journal, run_id="one") as stream:
        pieces = [event async for event in stream if event.kind in ("reasoning_delta", "text_delta")]
    assert [event.kind for event in pieces] == ["reasoning_delta", "text_delta"]
    assert [key for key in journal.runs["one"] if "shown" in str(key)] == ["1 shown"]
