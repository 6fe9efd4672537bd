"""Durable runs that wait for somebody, and what holds over restarts: answers, deadlines, budgets, streams."""

from __future__ import annotations

import functools
import json
import pickle
import time
from collections.abc import Callable
from contextlib import asynccontextmanager
from typing import Any

import anyio
import pytest
from pydantic import BaseModel

from fractal import (
    AgentResult,
    AgentToolkit,
    Allow,
    ApprovalPending,
    BaseAgent,
    Defer,
    Deny,
    InvalidArguments,
    JournalError,
    JournalMismatch,
    JournalNotWritten,
    JournalUnreadable,
    Limits,
    ModelRequest,
    NotPending,
    PendingCall,
    Price,
    Reply,
    RunContext,
    RunUnknown,
    SharedBudget,
    TextDelta,
    ToolResult,
    UnexpectedError,
    WarningRaised,
    tool,
)
from fractal.durable import MemoryJournal
from fractal.model import Delta
from fractal.testing import ScriptedModel, answers, check_messages
from fractal.toolkit import Tool
from tests.engine.test_journaled import cut_after, turns
from tests.schedules import in_virtual_time


def by_turn(*script: Any) -> ScriptedModel:
    """A model whose next answer follows from the conversation, as after a restart it must."""
    return ScriptedModel(lambda request: script[turns(request)])


def pays(*orders: int) -> Any:
    return answers.calls(*(answers.call("pay", {"order": order}, id=f"pay_{order}") for order in orders))


class Clerk:
    """An agent that pays some orders, each of which somebody has to approve, and what it has paid."""

    def __init__(self, *orders: int, **options: Any) -> None:
        self.paid: list[int] = []
        self.asked: list[PendingCall] = []

        @tool(**{"requires_approval": True, **options})
        async def pay(order: int) -> str:
            """Pay an order."""
            self.paid.append(order)
            return f"paid {order}"

        self.model = by_turn(pays(*(orders or (1, 2))), "done")
        self.agent = BaseAgent("Clerk", "You pay.", client=self.model, approve=self.approve).add_tool(pay)

    def approve(self, call: PendingCall) -> Any:
        self.asked.append(call)
        return Defer() if call.arguments["order"] > 1 or call.is_interrupted else Allow()


async def test_a_deferred_call_ends_the_run_and_its_answer_goes_on_with_it_elsewhere() -> None:
    journal, first, second = MemoryJournal(), Clerk(1, 2, 3), Clerk(1, 2, 3)
    waits = await first.agent.run("go", journal=journal, run_id="one")
    assert (waits.stop_reason, waits.success, first.paid) == ("approval", False, [1])
    pending = [(call.call_id, call.arguments) for call in waits.pending]
    assert pending == [("pay_2", {"order": 2}), ("pay_3", {"order": 3})]
    assert [call.outcome for call in waits.tool_results] == ["ok", "skipped", "skipped"]
    assert isinstance(waits.exception, ApprovalPending)
    check_messages(waits.messages)
    result = await second.agent.resume(journal, "one", {"pay_2": Allow({"order": 20}), "pay_3": Deny("too much")})
    assert (result.content, second.paid) == ("done", [20])
    assert [call.outcome for call in result.tool_results] == ["ok", "ok", "denied"]
    assert (second.asked, len(second.model.requests)) == ([], 1)


async def test_calls_that_wait_survive_json_and_pickle() -> None:
    result = await Clerk(2).agent.run("go", journal=MemoryJournal(), run_id="one")
    again = AgentResult.model_validate_json(result.model_dump_json())
    assert again.pending == pickle.loads(pickle.dumps(result)).pending == result.pending
    assert (again.stop_reason, again.success) == ("approval", False)


async def test_calls_that_get_no_answer_go_on_waiting() -> None:
    journal, clerk = MemoryJournal(), Clerk(2, 3)
    await clerk.agent.run("go", journal=journal, run_id="one")
    for result in (
        await clerk.agent.run("go", journal=journal, run_id="one"),
        await clerk.agent.resume(journal, "one"),
    ):
        assert [call.call_id for call in result.pending] == ["pay_2", "pay_3"]
    result = await clerk.agent.resume(journal, "one", {"pay_3": True})
    assert ([call.call_id for call in result.pending], clerk.paid) == (["pay_2"], [3])
    result = await clerk.agent.resume(journal, "one", {"pay_2": False})
    assert (result.content, clerk.paid, len(clerk.asked), len(clerk.model.requests)) == ("done", [3], 2, 2)


async def test_only_calls_that_were_issued_can_be_answered_and_only_once() -> None:
    journal, clerk = MemoryJournal(), Clerk(2, 3)
    await clerk.agent.run("go", journal=journal, run_id="one")
    before = dict(journal.runs["one"])
    with pytest.raises(NotPending, match="call 'pay_9' of run 'one'") as caught:
        await clerk.agent.resume(journal, "one", {"pay_2": Allow(), "pay_9": Allow()})
    assert (caught.value.call_id, journal.runs["one"]) == ("pay_9", before)
    await clerk.agent.resume(journal, "one", {"pay_2": Allow()})
    with pytest.raises(NotPending, match="those that do: 'pay_3'"):
        await clerk.agent.resume(journal, "one", {"pay_2": Deny()})
    await clerk.agent.resume(journal, "one", {"pay_3": Allow()})
    with pytest.raises(NotPending, match="those that do: none"):
        await clerk.agent.resume(journal, "one", {"pay_3": Allow()})
    assert clerk.paid == [2, 3]


async def test_what_cannot_be_resumed_is_refused() -> None:
    journal, clerk = MemoryJournal(), Clerk(2)
    with pytest.raises(RunUnknown, match="the journal has no run 'one'"):
        await clerk.agent.resume(journal, "one")
    await clerk.agent.run("go", journal=journal, run_id="one")
    wrong: Any = [{"answers": [1]}, {"answers": {"pay_2": "yes"}}, {"answers": {"pay_2": Defer()}}, {"messages": []}]
    for each in wrong:
        with pytest.raises(InvalidArguments):
            await clerk.agent.resume(journal, "one", **each)
    with pytest.raises(InvalidArguments):
        await clerk.agent.resume(None, "one")  # type: ignore[arg-type]
    with pytest.raises(JournalMismatch, match=r'"Clerk".*"Another"'):
        await clerk.agent.replace(name="Another").resume(journal, "one", {"pay_2": Allow()})


async def test_without_a_journal_nothing_can_be_deferred() -> None:
    clerk = Clerk(2)
    result = await clerk.agent.run("go")
    assert (result.content, [call.outcome for call in result.tool_results]) == ("done", ["denied"])
    assert any("with journal=" in warning for warning in result.warnings)


async def test_the_calls_of_delegates_wait_with_the_run_above() -> None:
    journal = MemoryJournal()
    helpers = [Clerk(1, 2), Clerk(3)]
    ask = answers.calls(*(answers.call(f"delegate_to_{n}", {"query": "pay"}, id=f"ask_{n}") for n in (0, 1)))
    lead = BaseAgent("Lead", "You lead.", client=by_turn(ask, "all done"))
    for n, helper in enumerate(helpers):
        lead.register_delegate(helper.agent.replace(name=str(n)))
    result = await lead.run("go", journal=journal, run_id="one")
    assert result.stop_reason == "approval"
    assert [call.arguments["order"] for call in result.pending] == [2, 3]
    check_messages(result.messages)
    result = await lead.resume(journal, "one", {call.call_id: Allow() for call in result.pending})
    assert (result.content, [helper.paid for helper in helpers]) == ("all done", [[1, 2], [3]])
    assert [len(helper.model.requests) for helper in helpers] == [2, 2]
    assert (result.usage.requests, result.usage.tool_calls) == (6, 5)


async def interrupted(clerk: Clerk, *, at: str = "1.0 time 1 started", **options: Any) -> MemoryJournal:
    """The journal of a clerk whose process ended in the middle of its call."""
    whole = MemoryJournal()
    await clerk.agent.run("go", journal=whole, run_id="one", **options)
    return cut_after(whole, [*whole.runs["one"]].index(at) + 1)


@pytest.mark.parametrize("answer", [Allow(), Deny("look first"), Defer()])
async def test_ask_leaves_it_to_whoever_approves_whether_an_interrupted_call_is_made_again(answer: Any) -> None:
    journal = await interrupted(Clerk(1, requires_approval=False, after_crash="ask"))
    again, asked = Clerk(1, requires_approval=False, after_crash="ask"), list[PendingCall]()

    def approve(call: PendingCall) -> Any:
        asked.append(call)
        return answer

    result = await again.agent.run("go", journal=journal, run_id="one", approve=approve)
    assert [call.is_interrupted for call in asked] == [True]
    if isinstance(answer, Defer):
        assert [call.is_interrupted for call in result.pending] == [True]
        result = await again.agent.resume(journal, "one", {"pay_1": Allow()}, approve=approve)
    assert result.content == "done"
    assert again.paid == ([] if isinstance(answer, Deny) else [1])
    assert len(asked) == 1


async def test_an_approved_call_that_was_interrupted_is_not_approved_anew() -> None:
    journal = await interrupted(Clerk(1, after_crash="repeat"))
    again = Clerk(1, after_crash="repeat")
    again.approve = lambda call: Deny()  # type: ignore[method-assign]
    assert (await again.agent.run("go", journal=journal, run_id="one", approve=again.approve)).content == "done"
    assert again.paid == [1]


async def test_an_interrupted_call_of_a_tool_that_raises_ends_the_run() -> None:
    journal = await interrupted(Clerk(1, requires_approval=False, on_error="raise"))
    result = await Clerk(1, requires_approval=False, on_error="raise").agent.run("go", journal=journal, run_id="one")
    assert (result.stop_reason, "unknown whether it took effect" in str(result.error)) == ("tool_error", True)


async def test_a_recorded_failure_ends_the_run_that_goes_on_as_it_did() -> None:
    class Odd(Exception):
        """An exception that no journal can keep."""

    @tool(on_error="raise")
    def fail() -> None:
        """Fail."""
        raise Odd("no luck")

    whole = MemoryJournal()
    agent = BaseAgent("A", "a", client=by_turn(answers.call("fail"))).add_tool(fail)
    first = await agent.run("go", journal=whole, run_id="one")
    left = cut_after(whole, len(whole.runs["one"]) - 1)
    again = await agent.run("go", journal=left, run_id="one")
    assert again.error == first.error
    assert again.stop_reason == first.stop_reason == "tool_error"


# ---- the option is not lost, however a tool is registered


def plain(order: int) -> str:
    """Pay."""
    return ""


def wrapped(function: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(function)
    def inner(*args: Any, **kwargs: Any) -> Any:
        return function(*args, **kwargs)

    return inner


class Kit(AgentToolkit):
    @tool(after_crash="ask")
    def pay(self, order: int) -> str:
        """Pay."""
        return ""


class Below(Kit):
    @tool(timeout=5)
    def pay(self, order: int) -> str:
        """Pay."""
        return ""


@pytest.mark.parametrize(
    "registered",
    [
        lambda: tool(after_crash="ask")(wrapped(plain)),
        lambda: functools.partial(tool(after_crash="ask")(wrapped(plain)), order=1),
        lambda: wrapped(tool(after_crash="ask")(wrapped(plain))),
        lambda: tool(after_crash=None)(tool(after_crash="ask")(wrapped(plain))),
        lambda: tool(timeout=3)(wrapped(tool(after_crash="ask")(wrapped(plain)))),
        lambda: Kit().pay,
        lambda: Below().pay,
    ],
    ids=["marked", "partial", "wrapper", "said again", "marked again", "method", "overridden"],
)
def test_what_becomes_of_a_call_after_a_crash_is_not_lost(registered: Callable[[], Any]) -> None:
    assert Tool.from_function(registered()).options.after_crash == "ask"


def test_what_becomes_of_a_call_after_a_crash_survives_toolkits_and_agents() -> None:
    for kit in (Kit(), Below(), AgentToolkit(*Kit())):
        [found] = BaseAgent("A", "a", toolkit=kit).replace(name="B").toolkit
        assert found.options.after_crash == "ask"
    with pytest.raises(InvalidArguments, match="after_crash='never'"):
        tool(after_crash="never")  # type: ignore[call-overload]


# ---- time and money


async def test_the_deadline_is_that_of_the_first_process() -> None:
    journal = await interrupted(Clerk(1, requires_approval=False, idempotent=True), timeout=100)
    seen: list[float] = []

    @tool(name="pay", idempotent=True)
    async def pay(order: int, ctx: RunContext) -> str:
        """Pay an order."""
        seen.append(ctx.remaining())
        return f"paid {order}"

    agent = BaseAgent("Clerk", "You pay.", client=by_turn(pays(1), "done")).add_tool(pay)
    for passed, timeout in ((60, 100), (60, None), (0, 10)):
        now = MemoryJournal()
        now.runs["one"] = dict(journal.runs["one"])
        start = json.loads(now.runs["one"]["start"])
        start["value"]["deadline"] = time.time() + 100 - passed
        now.runs["one"]["start"] = json.dumps(start)
        await agent.run("go", journal=now, run_id="one", timeout=timeout)
    assert [round(left, -1) for left in seen] == [40, 40, 10]
    start["value"]["deadline"] = time.time() - 1
    journal.runs["one"]["start"] = json.dumps(start)
    result = await agent.run("go", journal=journal, run_id="one", timeout=100)
    assert (result.stop_reason, len(seen)) == ("deadline", 3)


async def test_the_time_of_waiting_for_an_answer_does_not_count() -> None:
    journal, clerk = MemoryJournal(), Clerk(2)
    await clerk.agent.run("go", journal=journal, run_id="one", timeout=50)
    start = json.loads(journal.runs["one"]["start"])
    start["value"]["deadline"] = time.time() - 1000  # the pause was long
    journal.runs["one"]["start"] = json.dumps(start)
    result = await clerk.agent.resume(journal, "one", {"pay_2": Allow()})
    assert (result.content, clerk.paid) == ("done", [2])


async def test_what_was_spent_stays_spent() -> None:
    reply = Reply(text="done", input_tokens=10, output_tokens=5, model="m")

    class Model:
        async def respond(self, request: ModelRequest) -> Reply:
            return reply

    whole = MemoryJournal()
    options: Any = {"model": "m", "client": Model(), "prices": {"m": Price(input=1000, output=1000)}}
    await BaseAgent("A", "a", **options).run("go", journal=whole, run_id="one")
    for records, requests in ((2, 1), (3, 1)):  # sent, and no more is known; replied
        again = BaseAgent("A", "a", **options)
        journal = cut_after(whole, records)
        result = await again.run("go", journal=journal, run_id="one", limits=Limits(max_requests=requests))
        assert result.stop_reason == ("budget" if records == 2 else "finished")
        assert result.usage.requests == 1
    assert result.usage.cost == pytest.approx(0.015)
    assert result.usage.total_tokens == 15


async def test_money_that_was_spent_stays_spent() -> None:
    options: Any = {"model": "gpt", "prices": {"gpt": Price(input=1000, output=1000)}, "max_tokens": 10}

    async def look() -> str:
        """Look."""
        return "nothing"

    def agent() -> BaseAgent[Any]:
        return BaseAgent("A", "a", client=by_turn(answers.call("look"), "done"), **options).add_tool(look)

    whole = MemoryJournal()
    first = await agent().run("go", journal=whole, run_id="one", limits=Limits(max_cost=1))
    assert first.success
    left = cut_after(whole, [*whole.runs["one"]].index("1.0 finished") + 1)
    result = await agent().run("go", journal=left, run_id="one", limits=Limits(max_cost=0.001))
    assert (result.stop_reason, result.usage.requests) == ("budget", 1)
    left = cut_after(whole, [*whole.runs["one"]].index("1.0 finished") + 1)
    result = await agent().run("go", journal=left, run_id="one", limits=Limits(max_cost=1))
    assert (result.content, result.usage.cost) == ("done", first.usage.cost)


async def helped(ctx: RunContext, agent: BaseAgent[Any]) -> str:
    return str((await ctx.agent.call_agent(agent, "help")).content)


def asks_in_a_tool(helper: BaseAgent[Any]) -> BaseAgent[Any]:
    @tool
    async def both(ctx: RunContext) -> str:
        """Ask twice."""
        return await helped(ctx, helper) + await helped(ctx, helper)

    return BaseAgent("Lead", "You lead.", client=by_turn(answers.call("both", id="b"), "done")).add_tool(both)


def asks_by_delegation(helper: BaseAgent[Any]) -> BaseAgent[Any]:
    calls = [answers.call("delegate_to_Helper", {"query": each}, id=each) for each in "ab"]
    agent = BaseAgent("Lead", "You lead.", client=by_turn(answers.calls(*calls), "done"))
    agent.register_delegate(helper)
    return agent


def asks_for_approval(helper: BaseAgent[Any]) -> BaseAgent[Any]:
    async def approve(call: PendingCall, ctx: RunContext) -> bool:
        return await helped(ctx, helper) == "helped"

    @tool(requires_approval=True)
    def pay() -> str:
        """Pay."""
        return "paid"

    script = by_turn(answers.call("pay", id="p"), "done")
    return BaseAgent("Lead", "You lead.", client=script, approve=approve).add_tool(pay)


def asks_for_a_summary(helper: BaseAgent[Any]) -> BaseAgent[Any]:
    @tool
    def look() -> str:
        """Look."""
        return "word " * 2000

    async def compact(messages: list[Any], ctx: RunContext) -> str:
        return await helped(ctx, helper)

    def answer(request: Any) -> Any:
        is_summed_up = any("helped" in str(each.get("content")) for each in request["messages"])
        return "done" if is_summed_up else answers.call("look", id=f"look_{turns(request)}")

    script = ScriptedModel(answer)
    return BaseAgent("Lead", "You lead.", client=script, context_window=5000, compact=compact).add_tool(look)


@pytest.mark.parametrize("lead", [asks_in_a_tool, asks_by_delegation, asks_for_approval, asks_for_a_summary])
async def test_what_runs_below_had_spent_stays_spent(lead: Callable[[BaseAgent[Any]], BaseAgent[Any]]) -> None:
    def run(journal: MemoryJournal, **options: Any) -> Any:
        helper = BaseAgent("Helper", "You help.", client=ScriptedModel(lambda request: "helped"))
        return lead(helper).run("go", journal=journal, run_id="one", **options)

    whole = MemoryJournal()
    first = await run(whole)
    assert (first.content, first.usage.requests > len(first.tool_results) + 1) == ("done", True)
    keys = [*whole.runs["one"]]
    for records, key in enumerate(keys, 1):
        result = await run(cut_after(whole, records))
        if not any("unknown" in str(each.error) for each in result.tool_results):
            kinds = [each.rpartition(" ")[2] for each in keys[:records]]
            in_flight = kinds.count("sent") - kinds.count("reply")  # requests that were sent again
            again = result.usage.model_copy(update={"requests": result.usage.requests - in_flight})
            assert again == first.usage, key
    left = cut_after(whole, len(keys) - 3)  # the last reply is missing
    limits = Limits(max_requests=first.usage.requests - 1)
    assert (await run(left, limits=limits)).stop_reason == "budget"


async def test_a_shared_budget_takes_once_what_a_run_spends_that_goes_on() -> None:
    journal, today = MemoryJournal(), SharedBudget(max_requests=6, max_tool_calls=3)

    @tool(requires_approval=True)
    def pay() -> str:
        """Pay."""
        return "paid"

    helper = BaseAgent("Helper", "You help.", client=by_turn(answers.call("pay", id="p"), "helped")).add_tool(pay)
    asks = answers.call("delegate_to_Helper", {"query": "help"}, id="d")
    script = by_turn(answers.call("look", id="l"), asks, "done")
    lead = BaseAgent("Lead", "You lead.", client=script, approve=lambda call: Defer(), budget=today)
    lead.add_tool(tool(name="look")(lambda: "seen")).register_delegate(helper)
    waits = await lead.run("go", journal=journal, run_id="one")
    assert (waits.stop_reason, today.usage().requests, today.usage().tool_calls) == ("approval", 3, 1)
    result = await lead.resume(journal, "one", {call.call_id: True for call in waits.pending})
    assert (result.content, result.usage) == ("done", today.usage())
    again = await lead.run("go", journal=journal, run_id="one")
    assert again.usage == today.usage()


# ---- streams


class Writer:
    """A model that writes words, and dies after so many."""

    def __init__(self, text: str, dies_after: int | None = None) -> None:
        self._words, self._dies_after = text.split(" "), dies_after

    async def respond(self, request: ModelRequest) -> Reply:
        raise AssertionError

    async def stream(self, request: ModelRequest, sink: Callable[[Delta], Any]) -> Reply:
        for n, word in enumerate(self._words):
            if n == self._dies_after:
                await anyio.sleep_forever()
            await sink(Delta("text", word + " " * (n < len(self._words) - 1)))
        return Reply(text=" ".join(self._words))


async def shown(journal: MemoryJournal, writer: Any, until: int = 10**9) -> tuple[list[str], list[str]]:
    """The texts that a stream shows, and its warnings; left after so many texts."""
    texts, warnings = list[str](), list[str]()
    async with BaseAgent("A", "a", client=writer).stream("go", buffer=0, journal=journal, run_id="one") as stream:
        async for event in stream:
            if isinstance(event, TextDelta):
                texts.append(event.text)
                if len(texts) == until:
                    break
            elif isinstance(event, WarningRaised):
                warnings.append(event.message)
    return texts, warnings


async def test_text_that_was_shown_is_not_shown_again_and_the_rest_follows() -> None:
    journal = MemoryJournal()
    assert await shown(journal, Writer("it is a fine day", dies_after=3), until=3) == (["it ", "is ", "a "], [])
    assert await shown(journal, Writer("it is a fine day")) == (["fine ", "day"], [])
    assert await shown(journal, Writer("it is a fine day")) == ([], [])


async def test_another_text_than_the_one_that_was_shown_is_shown_whole_and_told() -> None:
    for text in ("it was a fine day", "no"):
        journal = MemoryJournal()
        await shown(journal, Writer("it is a fine day", dies_after=3), until=3)
        texts, warnings = await shown(journal, Writer(text))
        assert "".join(texts) == text
        assert len(warnings) == (text != "no")


async def test_a_reply_that_nobody_was_shown_is_shown() -> None:
    whole = MemoryJournal()
    await BaseAgent("A", "a", client=by_turn("hello")).run("go", journal=whole, run_id="one")
    left = cut_after(whole, len(whole.runs["one"]) - 1)
    assert await shown(left, Writer("never asked", dies_after=0)) == (["hello"], [])


# ---- delegates


async def test_delegates_that_a_tool_asks_at_once_are_found_again_whatever_their_order() -> None:
    def lead(order: list[str], asked: list[str]) -> BaseAgent[Any]:
        def answer(request: Any) -> str:
            asked.append(request["messages"][-1]["content"])
            return f"did {asked[-1]}"

        helper = BaseAgent("Helper", "You help.", client=ScriptedModel(answer))

        @tool(after_crash="repeat")
        async def ask_all(ctx: RunContext) -> list[Any]:
            """Ask for everything."""
            return sorted([(await ctx.agent.call_agent(helper, each)).content for each in order])

        return BaseAgent("Lead", "You lead.", client=by_turn(answers.call("ask_all"), "done")).add_tool(ask_all)

    whole, first = MemoryJournal(), list[str]()
    await lead(["a", "b", "a"], first).run("go", journal=whole, run_id="one")
    records = whole.runs["one"]
    kept = [key for key in records if not key.startswith(("1.0 finished", "2 ", "end"))]
    left, again = MemoryJournal(), list[str]()
    left.runs["one"] = {key: records[key] for key in kept}
    result: AgentResult[Any] = await lead(["b", "a", "a"], again).run("go", journal=left, run_id="one")
    assert (first, again) == (["a", "b", "a"], [])
    assert result.tool_results[0].content == ["did a", "did a", "did b"]
    assert result.usage.requests == 5


async def test_a_mismatch_below_ends_the_run_and_is_no_error_of_a_tool() -> None:
    journal = MemoryJournal()
    helper = BaseAgent("Helper", "You help.", client=by_turn("hello"))
    ask = answers.call("delegate_to_helper", {"query": "help"})
    lead = BaseAgent("Lead", "You lead.", client=by_turn(ask, "done")).register_delegate(helper)
    await lead.run("go", journal=journal, run_id="one")
    records = journal.runs["one"]
    for key in [key for key in records if key.startswith(("1.0 finished", "2 ", "end")) or key.endswith(" end")]:
        del records[key]
    [reply] = [key for key in records if key.endswith("/1 reply")]
    changed = json.loads(records[reply])
    changed["given"]["sha256"] = "0"
    records[reply] = json.dumps(changed)
    with pytest.raises(JournalMismatch, match="/1 reply"):
        await lead.run("go", journal=journal, run_id="one")


# ---- results, and stores that fail


async def test_a_failed_end_is_an_end_too() -> None:
    journal = MemoryJournal()
    agent = BaseAgent("A", "a", client=ScriptedModel([answers.refusal("I will not")]))
    first = await agent.run("go", journal=journal, run_id="one")
    again = await agent.run("go", journal=journal, run_id="one")
    assert (again.stop_reason, again.error) == (first.stop_reason, first.error) == ("refusal", "I will not")
    assert type(again.exception) is type(first.exception)
    assert again.exception is not None
    assert again.exception.result is again


async def test_an_answer_of_a_class_that_no_journal_can_name_is_read_anew() -> None:
    class Bill(BaseModel):
        total: int

    journal = MemoryJournal()
    agent = BaseAgent("A", "a", client=ScriptedModel(['{"total": 3}']), output_type=Bill, output_mode="native")
    await agent.run("go", journal=journal, run_id="one")
    assert (await agent.run("go", journal=journal, run_id="one")).content == Bill(total=3)
    text = await agent.replace(output_type=list[int]).run("go", journal=journal, run_id="one")
    assert text.content == {"total": 3}


async def test_a_result_that_no_journal_can_keep_is_warned_of() -> None:
    class Odd:
        def __str__(self) -> str:
            return "odd"

    @tool
    def make() -> Odd:
        """Make something odd."""
        return Odd()

    whole = MemoryJournal()
    agent = BaseAgent("A", "a", client=by_turn(answers.call("make"), "done")).add_tool(make)
    first = await agent.run("go", journal=whole, run_id="one")
    assert any("a journal cannot keep" in warning for warning in first.warnings)
    again = await agent.run("go", journal=cut_after(whole, len(whole.runs["one"]) - 1), run_id="one")
    assert again.messages == first.messages
    assert again.tool_results[0].content == "odd"


async def test_a_store_that_fails_ends_the_run_before_the_tool_begins() -> None:
    done: list[int] = []

    class Failing(MemoryJournal):
        @asynccontextmanager
        async def open(self, run_id: str) -> Any:
            async with super().open(run_id) as opened:
                record = opened.record

                async def fail(key: Any, text: str) -> None:
                    if key.kind == "started":
                        raise OSError("the store is on fire")
                    await record(key, text)

                opened.record = fail
                yield opened

    @tool
    def work() -> None:
        """Work."""
        done.append(1)

    agent = BaseAgent("A", "a", client=by_turn(answers.call("work"), "done")).add_tool(work)
    with pytest.raises(JournalNotWritten, match="the store is on fire"):
        await agent.run("go", journal=Failing(), run_id="one")
    assert done == []


@pytest.mark.parametrize("told", [OSError("the store is on fire"), b"{}"], ids=["raises", "no text"])
async def test_a_store_that_cannot_be_read_below_a_tool_ends_the_run_and_is_no_error_of_the_tool(told: Any) -> None:
    class Failing(MemoryJournal):
        @asynccontextmanager
        async def open(self, run_id: str) -> Any:
            def recall(key: Any) -> Any:
                if not key.path:
                    return plain(key)
                if isinstance(told, Exception):
                    raise told
                return told

            async with super().open(run_id) as opened:
                plain, opened.recall = opened.recall, recall
                yield opened

    helper, journal = BaseAgent("Helper", "You help.", client=ScriptedModel(["never asked"])), Failing()
    with pytest.raises(JournalUnreadable, match=r"on fire|it is no text"):
        await asks_by_delegation(helper).run("go", journal=journal, run_id="one")
    assert not [key for key in journal.runs["one"] if key.endswith("finished")]


@pytest.mark.parametrize("given", [OSError("the store is on fire"), None], ids=["raises", "gives nothing"])
async def test_a_store_that_cannot_be_opened_is_told(given: Any) -> None:
    class Failing:
        @asynccontextmanager
        async def open(self, run_id: str) -> Any:
            if given is not None:
                raise given
            yield None

    with pytest.raises(JournalError, match=r"the journal of run 'one' cannot be opened: (OSError: the store|its open)"):
        await Clerk().agent.run("go", journal=Failing(), run_id="one")


async def test_what_a_hook_asks_again_has_records_of_its_own() -> None:
    asked: list[int] = []

    def answer(request: Any) -> str:
        asked.append(1)
        return f"answer {len(asked)}"

    async def twice(ctx: Any, request: Any, next: Any) -> Any:
        await next()
        return await next()

    whole = MemoryJournal()
    agent = BaseAgent("A", "a", client=ScriptedModel(answer), around_model=twice)
    assert (await agent.run("go", journal=whole, run_id="one")).content == "answer 2"
    keys = [*whole.runs["one"]]
    left = cut_after(whole, keys.index("1 reply") + 1)
    assert (await agent.run("go", journal=left, run_id="one")).content == "answer 3"
    assert [key for key in left.runs["one"] if key.endswith("reply")] == ["1 reply", "1+2 reply"]


async def test_a_window_is_where_it_was_and_its_summary_is_not_made_again() -> None:
    summed: list[int] = []

    def sum_up(messages: list[Any]) -> str:
        summed.append(len(messages))
        return "a summary"

    def sent(request: Any) -> Any:
        systems.append([message for message in request["messages"] if message["role"] == "system"])
        return "done" if request["messages"][-1]["role"] == "tool" else answers.call("look")

    def look() -> str:
        """Look."""
        return "nothing"

    systems: list[Any] = []
    history = [{"role": ("user", "assistant")[n % 2], "content": "word " * 100} for n in range(20)]
    agent = BaseAgent("A", "a", client=ScriptedModel(sent), context_window=2000, compact=sum_up).add_tool(look)
    whole = MemoryJournal()
    await agent.run("go", messages=history, journal=whole, run_id="one")
    left = cut_after(whole, [*whole.runs["one"]].index("1.0 finished") + 1)
    before = len(summed)
    result = await agent.run("go", messages=history, journal=left, run_id="one")
    assert (result.content, len(summed)) == ("done", before)
    assert systems[-1] == systems[1]


async def test_the_way_in_which_an_answer_is_asked_for_is_that_of_the_first_process() -> None:
    class Bill(BaseModel):
        total: int

    def answer(request: Any) -> Any:
        if "response_format" in request:
            return answers.failure(400, "no response_format", code="unsupported")
        return answers.call("final_answer", {"total": 3}) if turns(request) else answers.call("look")

    def look() -> str:
        """Look."""
        return "nothing"

    def agent() -> BaseAgent[Any]:
        return BaseAgent("A", "a", client=ScriptedModel(answer), output_type=Bill).add_tool(look)

    whole = MemoryJournal()
    first = await agent().run("go", journal=whole, run_id="one")
    assert first.content == Bill(total=3)
    left = cut_after(whole, len(whole.runs["one"]) - 1)
    again = await agent().run("go", journal=left, run_id="one")
    assert (again.content, again.usage.requests) == (Bill(total=3), first.usage.requests)


# ---- other code than that of the first process


async def test_results_of_a_tool_that_is_gone_are_kept_and_its_other_calls_are_told() -> None:
    whole, first = MemoryJournal(), Clerk(1, 2, requires_approval=False)
    await first.agent.run("go", journal=whole, run_id="one")
    records = whole.runs["one"]
    for position, contents in ((None, ["paid 1", "paid 2"]), ("1.1", ["paid 1", None])):
        left = MemoryJournal()
        kept = [key for key in records if not key.startswith(("2 ", "end")) and key.split(" ")[0] != position]
        left.runs["one"] = {key: records[key] for key in kept}
        agent = Clerk(1, 2).agent
        agent.remove_tool("pay")
        result = await agent.run("go", journal=left, run_id="one")
        assert [call.content for call in result.tool_results] == contents
        assert result.content == "done"


@pytest.mark.parametrize("change", ["gone", "of other parameters"])
async def test_a_call_that_was_interrupted_is_unknown_though_it_cannot_be_made_any_more(change: str) -> None:
    whole, first = MemoryJournal(), Clerk(1, requires_approval=False, idempotent=True)
    await first.agent.run("go", journal=whole, run_id="one")
    agent = Clerk(1).agent
    agent.remove_tool("pay")
    if change != "gone":
        agent.add_tool(tool(name="pay")(lambda order, currency: "paid"))
    left = cut_after(whole, [*whole.runs["one"]].index("1.0 time 1 started") + 1)
    told = [(await agent.run("go", journal=left, run_id="one")).tool_results[0].error for _ in range(2)]
    assert all("unknown whether it took effect" in str(each) for each in told)
    del left.runs["one"]["end"]
    assert (await first.agent.run("go", journal=left, run_id="one")).tool_results[0].error == told[0]


async def test_calls_that_an_own_execute_tool_makes_are_recorded() -> None:
    made: list[str] = []

    class Own(BaseAgent[Any]):
        async def execute_tool(self, tool_name: str = "", /, **arguments: Any) -> Any:
            made.append(tool_name)
            return ToolResult(content=f"{tool_name} of another server", tool_name=tool_name)

    whole = MemoryJournal()
    agent = Own("A", "a", client=by_turn(answers.call("remote", {"n": 1}), "done"))
    first = await agent.run("go", journal=whole, run_id="one")
    assert first.tool_results[0].content == "remote of another server"
    for end, outcome, times in (("1.0 finished", "ok", 1), ("1.0 time 1 started", "error", 1)):
        left = cut_after(whole, [*whole.runs["one"]].index(end) + 1)
        result = await agent.run("go", journal=left, run_id="one")
        assert ([call.outcome for call in result.tool_results], len(made)) == ([outcome], times)


@pytest.mark.parametrize("seconds", [0.0, 0.05], ids=["before it begins", "while it waits"])
async def test_the_time_of_a_callers_scope_is_none_of_the_runs(seconds: float) -> None:
    journal, has_waited = MemoryJournal(), []

    @tool(idempotent=True)
    async def wait() -> str:
        """Wait, the first time."""
        if seconds and not has_waited:
            has_waited.append(True)
            await anyio.sleep_forever()
        return "waited"

    agent = BaseAgent("A", "a", client=by_turn(answers.call("wait"), "done")).add_tool(wait)
    with anyio.move_on_after(seconds) as scope:
        await agent.run("go", journal=journal, run_id="one")
    assert scope.cancelled_caught
    for text in [text for key, text in journal.runs.get("one", {}).items() if key == "start"]:
        assert json.loads(text)["value"]["deadline"] is None
    result = await agent.run("go", journal=journal, run_id="one")
    assert (result.stop_reason, result.content) == ("finished", "done")


async def test_a_run_that_a_cancelled_caller_still_began_goes_on_later() -> None:
    class Slow(MemoryJournal):
        """A journal that takes its time to open, in which the caller is cancelled."""

        @asynccontextmanager
        async def open(self, run_id: str) -> Any:
            with anyio.CancelScope(shield=True):
                await anyio.sleep(0.02)
                async with super().open(run_id) as opened:
                    yield opened

    journal = Slow()
    agent = BaseAgent("A", "a", client=by_turn("done"))
    with anyio.move_on_after(0.01):
        await agent.run("go", journal=journal, run_id="one")
    result = await agent.run("go", journal=journal, run_id="one")
    assert (result.stop_reason, result.content) == ("finished", "done")


@in_virtual_time
async def test_more_time_of_the_callers_moves_no_deadline_that_is_recorded() -> None:
    journal = MemoryJournal()

    @tool(idempotent=True)
    async def wait() -> None:
        """Wait."""
        await anyio.sleep_forever()

    agent = BaseAgent("A", "a", client=by_turn(answers.call("wait"), "done")).add_tool(wait)
    with anyio.move_on_after(0.1):
        await agent.run("go", journal=journal, run_id="one", timeout=0.4)
    started = anyio.current_time()
    with anyio.fail_after(0.5):
        result = await agent.run("go", journal=journal, run_id="one", timeout=5)
    assert result.stop_reason == "deadline"
    assert anyio.current_time() - started < 0.45


def _values_in(value: Any, path: tuple[str, ...] = ()) -> list[tuple[str, ...]]:
    """The paths of the values inside of a record's value, two deep, and of itself."""
    below = value.items() if isinstance(value, dict) and len(path) < 2 else ()
    return [path, *(deeper for key, each in below for deeper in _values_in(each, (*path, key)))]


def _changed(value: Any, path: tuple[str, ...], to: Any) -> Any:
    return to if not path else {**value, path[0]: _changed(value[path[0]], path[1:], to)}


async def test_a_record_that_somebody_has_damaged_is_told_as_that_or_does_no_harm() -> None:
    def agent() -> BaseAgent[Any]:
        @tool(requires_approval=True)
        async def pay() -> str:
            """Pay."""
            return "paid"

        asks = answers.calls(answers.call("pay", id="pay"), text="Let me pay.")
        made = BaseAgent(
            "A", "a", client=by_turn(asks, "done"), approve=lambda call: Defer(),
            context_window=300, compact=lambda messages: "They talked.",
        )  # fmt: skip
        return made.add_tool(pay)

    async def go(journal: MemoryJournal) -> AgentResult[Any]:
        async with agent().stream("go", messages=history, journal=journal, run_id="one", timeout=1000) as stream:
            result = await stream.result()
        pending = {call.call_id: Allow() for call in result.pending}
        return await agent().resume(journal, "one", pending) if pending else result

    history = [{"role": role, "content": "word " * 50} for _ in range(4) for role in ("user", "assistant")]
    whole = MemoryJournal()
    assert (await go(whole)).content == "done"
    records = whole.runs["one"]
    assert {"pause 1 pause", "pause 1 start", "1 try 1 window", "1 shown"} <= records.keys()
    told = 0
    for index, key in enumerate(records):
        for path in _values_in(json.loads(records[key])["value"]):
            for wrong in ({"x": 1}, -1):
                left = cut_after(whole, index + 1)
                record = json.loads(records[key])
                left.runs["one"][key] = json.dumps({**record, "value": _changed(record["value"], path, wrong)})
                try:
                    result = await go(left)
                except JournalError:
                    told += 1
                else:
                    assert not isinstance(result.exception, UnexpectedError), (key, path, wrong)
    assert told > 50


@pytest.mark.parametrize("damage", ['"v":NaN', '"v":1,"name":Infinity'])
async def test_a_record_with_numbers_that_json_has_not_is_damaged(damage: str) -> None:
    journal, agent = MemoryJournal(), BaseAgent("A", "a", client=by_turn("done"))
    await agent.run("go", journal=journal, run_id="one")
    journal.runs["one"]["start"] = journal.runs["one"]["start"].replace('"v":1', damage, 1)
    with pytest.raises(JournalUnreadable, match="it is damaged"):
        await agent.run("go", journal=journal, run_id="one")


async def test_nothing_is_taken_up_without_a_journal_and_an_id() -> None:
    nothing: Any = None
    with pytest.raises(InvalidArguments, match="resume needs a journal, and the id of a run that it has"):
        await BaseAgent("A", "a").resume(nothing, nothing)
