"""Looking is not touching: what is called is what was checked and approved, whatever is done to what is shown of it."""

from __future__ import annotations

import copy
import dataclasses
import datetime
import threading
from collections.abc import Callable, Iterable
from typing import Annotated, Any, NamedTuple

import anyio
import pytest
from pydantic import AfterValidator, BaseModel, BeforeValidator, Field, Json
from typing_extensions import TypedDict

from fractal import AgentResult, Allow, BaseAgent, PendingCall, RunContext, run_many, sync, tool
from fractal.testing import ScriptedModel, answers
from tests.support import in_thread, outcomes
from tests.without_uvloop import anyio_backend  # noqa: F401


class Payment(BaseModel):
    iban: str
    amounts: list[int]


@dataclasses.dataclass
class Owner:
    name: str


SENT: dict[str, Any] = {
    "payment": {"iban": "DE89", "amounts": [1, 2]},
    "notes": ["a", {"b": ["c"]}],
    "owner": {"name": "Ada"},
    "labels": ["x"],
    "to": "Bob",
}


@dataclasses.dataclass
class Bank:
    """A tool with arguments of every kind, and what it was called with."""

    paid: list[dict[str, Any]] = dataclasses.field(default_factory=list)

    def agent(self, *, plain: bool = False, guarded: bool = True, **options: Any) -> BaseAgent:
        def pay(payment: Payment, notes: list[Any], owner: Owner, labels: set[str], to: str) -> str:
            """Pay."""
            given = {"payment": payment, "notes": notes, "owner": owner, "labels": labels, "to": to}
            self.paid.append(copy.deepcopy(given))
            return "paid"

        async def pay_async(payment: Payment, notes: list[Any], owner: Owner, labels: set[str], to: str) -> str:
            await anyio.sleep(0)
            return pay(payment, notes, owner, labels, to)

        marked = tool(name="pay", requires_approval=guarded)(pay if plain else pay_async)
        model = ScriptedModel([answers.call("pay", SENT), "done"])
        return BaseAgent("Bank", "You pay.", client=model, **options).add_tool(marked)


def right() -> dict[str, Any]:
    return {
        "payment": Payment(iban="DE89", amounts=[1, 2]),
        "notes": ["a", {"b": ["c"]}],
        "owner": Owner("Ada"),
        "labels": {"x"},
        "to": "Bob",
    }


def spoil(arguments: Any) -> None:
    """Change whatever can be changed of arguments, at every depth."""
    arguments["to"] = "****"
    arguments["payment"].iban = "****"
    arguments["payment"].amounts.clear()
    arguments["notes"][1]["b"].append("d")
    arguments["notes"].append("e")
    arguments["owner"].name = "****"
    arguments["labels"].add("y")
    del arguments["to"]


def spoil_event(event: Any) -> None:
    if event.kind in ("tool_started", "approval_requested", "approval_answered"):
        spoil(event.arguments)
    if event.kind == "tool_finished":
        spoil(event.result.metadata["arguments"])
        event.result.metadata.clear()
        event.result.content = "****"


async def read(agent: BaseAgent, *, spoiling: bool = False) -> AgentResult:
    async with agent.stream("go", buffer=0) as stream:
        async for event in stream:
            if spoiling:
                spoil_event(event)
        return await stream.result()


async def batch(agent: BaseAgent) -> AgentResult:
    [result] = await run_many(agent, ["go"])
    return result


async def blocking(agent: BaseAgent) -> AgentResult:
    result: AgentResult = await in_thread(sync.run, agent, "go")
    return result


ENTRIES: dict[str, Callable[[BaseAgent], Any]] = {
    "run": lambda agent: agent.run("go"),
    "stream": read,
    "run_many": batch,
    "sync.run": blocking,
}


@pytest.mark.parametrize("plain", [True, False], ids=["plain", "async"])
@pytest.mark.parametrize("entry", ENTRIES)
async def test_what_observers_and_approvers_do_to_arguments_reaches_nothing(entry: str, plain: bool) -> None:
    bank = Bank()

    def approve(call: PendingCall) -> bool:
        assert dict(call.arguments) == right(), "nobody before has touched it"
        spoil(call.arguments)
        return True

    result = await ENTRIES[entry](bank.agent(plain=plain, approve=approve, observers=[spoil_event]))
    assert bank.paid == [right()]
    [call] = result.tool_results
    assert call.metadata == {"arguments": right(), "terminate": False}
    assert call.content == "paid"


async def test_what_a_reader_of_a_stream_does_to_events_reaches_nothing() -> None:
    bank = Bank()
    result = await read(bank.agent(approve=lambda call: True), spoiling=True)
    assert bank.paid == [right()]
    assert result.tool_results[0].metadata["arguments"] == right()


async def test_what_is_done_to_an_allowed_call_afterwards_comes_too_late() -> None:
    bank, seen = Bank(), []

    def approve(call: PendingCall) -> Allow:
        seen.append({**call.arguments, "to": "Carl"})
        return Allow(seen[0])

    def watch(event: Any) -> None:
        if event.kind == "approval_answered":
            seen[0]["payment"].amounts.append(99)
            seen[0]["notes"].append("late")

    await bank.agent(approve=approve, observers=[watch]).run("go")
    assert bank.paid == [{**right(), "to": "Carl"}]


async def test_each_event_has_its_own_copy() -> None:
    seen: list[Any] = []
    bank = Bank()
    await bank.agent(approve=lambda call: True, observers=[seen.append]).run("go")
    shown = [event.arguments for event in seen if hasattr(event, "arguments")]
    assert len(shown) == 3
    spoil(shown[0])
    assert shown[1] == shown[2] == right()


async def test_a_tool_that_changes_its_arguments_does_not_change_what_is_told_of_them() -> None:
    seen: list[Any] = []

    @tool
    async def sort(items: list[int], more: dict[str, list[int]], kinds: set[str], **rest: list[int]) -> list[int]:
        items.sort()
        more["a"].clear()
        kinds.add("z")
        rest["b"].clear()
        return items

    sent = {"items": [2, 1], "more": {"a": [1]}, "kinds": ["k"], "b": [5]}
    model = ScriptedModel([answers.call("sort", sent), "done"])
    for observers in ([], [seen.append]):
        agent = BaseAgent("A", "a", client=model, observers=observers).add_tool(sort)
        direct = await agent.execute_tool("sort", **copy.deepcopy(sent))
        told = {"items": [2, 1], "more": {"a": [1]}, "kinds": {"k"}, "b": [5]}
        assert direct.metadata["arguments"] == told
        assert direct.content == [1, 2]
    assert [event.arguments for event in seen if event.kind == "tool_started"] == [told]
    assert [event.result.metadata["arguments"] for event in seen if event.kind == "tool_finished"] == [told]


async def test_the_arguments_given_to_execute_tool_are_not_changed_by_whoever_looks() -> None:
    mine = {"notes": ["a"]}

    def watch(event: Any) -> None:
        if event.kind == "tool_started":
            event.arguments["notes"]["notes"].append("b")

    def take(notes: Any) -> Any:
        return notes

    agent = BaseAgent("A", "a", observers=[watch]).add_tool(take)
    result = await agent.execute_tool("take", notes=mine)
    assert mine == {"notes": ["a"]}
    assert result.content == {"notes": ["a"]}


async def test_an_abandoned_call_is_out_of_reach_of_whoever_reads_its_result() -> None:
    release, got = threading.Event(), []

    @tool(timeout=0.05)
    def slow(items: list[int]) -> None:
        release.wait(30)
        got.append(list(items))

    def watch(event: Any) -> None:
        if event.kind == "tool_finished":
            event.result.metadata["arguments"]["items"].clear()

    agent = BaseAgent("A", "a", observers=[watch]).add_tool(slow)
    result = await agent.execute_tool("slow", items=[1, 2])
    assert result.outcome == "abandoned"
    result.metadata["arguments"]["items"].clear()
    release.set()
    await in_thread(lambda: [each for _ in range(3000) if not got for each in [threading.Event().wait(0.01)]])
    assert got == [[1, 2]]


# ---- what else is shown


async def test_the_users_turn_and_a_delegates_question_are_what_they_are_whatever_observers_do() -> None:
    asked: list[Any] = []

    def answer(request: Any) -> str:
        asked.append(request.transcript.messages[-1]["content"])
        return "inner answer"

    inner = BaseAgent("Inner", "i", client=ScriptedModel(answer))
    script = ScriptedModel([answers.call("ask", {"sql": {"table": ["a"]}}), "done"])

    def watch(event: Any) -> None:
        if event.kind == "run_started":
            event.message["content"] = "****"
        if event.kind == "delegation_started":
            event.query["sql"]["table"].clear()
        if event.kind in ("run_finished", "delegation_finished") and event.result.agent_name != "Boss":
            event.result.content = "****"

    boss = BaseAgent("Boss", "b", client=script, observers=[watch])
    boss.register_delegate(inner, tool_name="ask", parameters={"sql": {"type": "dict"}})
    result = await boss.run("pay DE89")
    assert asked == ['{"sql":{"table":["a"]}}']
    assert script.requests[0]["messages"][-1] == {"role": "user", "content": "pay DE89"}
    assert result.tool_results[0].content == "inner answer"
    assert result.messages[2]["content"] == "inner answer"


async def test_what_ends_a_run_is_not_changed_by_who_hears_of_it() -> None:
    @tool(terminate=True)
    def book() -> dict[str, list[str]]:
        return {"rooms": ["1"]}

    def watch(event: Any) -> None:
        if event.kind == "tool_finished":
            event.result.content["rooms"].append("2")
            event.result.outcome = "error"

    model = ScriptedModel([answers.call("book", {}), "done"])
    result = await BaseAgent("A", "a", client=model, observers=[watch]).add_tool(book).run("go")
    assert (result.content, result.stop_reason) == ({"rooms": ["1"]}, "terminated")


async def test_the_messages_that_a_tool_or_an_approver_is_shown_are_copies() -> None:
    def spoil_messages(ctx: RunContext[Any]) -> None:
        ctx.messages[0]["content"] = "****"
        for message in ctx.messages:
            for call in message.get("tool_calls", ()):
                call["function"]["arguments"] = "{}"

    def approve(call: PendingCall, ctx: RunContext[Any]) -> bool:
        spoil_messages(ctx)
        return True

    @tool(requires_approval=True)
    def look(ctx: RunContext[Any], place: str) -> str:
        spoil_messages(ctx)
        return place

    model = ScriptedModel([answers.call("look", {"place": "here"}), "done"])
    result = await BaseAgent("A", "a", client=model, approve=approve).add_tool(look).run("go")
    assert model.requests[-1]["messages"][1]["content"] == "go"
    assert model.requests[-1]["messages"][2]["tool_calls"][0]["function"]["arguments"] == '{"place": "here"}'
    assert result.messages[0]["content"] == "go"


# ---- nobody looks, nobody pays


class Costly:
    """Arguments that say when they are copied."""

    copies = 0

    def __deepcopy__(self, memo: Any) -> Costly:
        Costly.copies += 1
        return self

    @classmethod
    def make(cls, value: Any) -> Any:
        return value if isinstance(value, Costly) else Costly()


Made = Annotated[Any, BeforeValidator(Costly.make)]


async def test_without_anybody_who_looks_nothing_is_copied_deeply() -> None:
    async def take(
        it: Annotated[Any, BeforeValidator(Costly.make)], items: list[Annotated[Any, BeforeValidator(Costly.make)]]
    ) -> str:
        return "taken"

    Costly.copies = 0
    script = [answers.call("take", {"it": "x", "items": ["y"] * 5}), "done"]
    result = await BaseAgent("A", "a", client=ScriptedModel(script)).add_tool(take).run("go")
    assert outcomes(result) == ["ok"]
    assert Costly.copies == 0
    seen: list[Any] = []
    await BaseAgent("A", "a", client=ScriptedModel(script), observers=[seen.append]).add_tool(take).run("go")
    assert Costly.copies > 0


async def test_what_cannot_be_copied_is_shown_as_it_is() -> None:
    lock = threading.Lock()

    async def take(it: Any, items: list[int]) -> bool:
        return it is lock

    seen: list[Any] = []
    agent = BaseAgent("A", "a", observers=[seen.append]).add_tool(take)
    result = await agent.execute_tool("take", it=lock, items=[1])
    assert result.content is True
    [started] = [event for event in seen if event.kind == "tool_started"]
    assert started.arguments["it"] is lock


async def test_arguments_that_contain_themselves_can_be_shown() -> None:
    loop: list[Any] = []
    loop.append(loop)

    def take(it: Any) -> str:
        return "taken"

    seen: list[Any] = []
    result = await BaseAgent("A", "a", observers=[seen.append]).add_tool(take).execute_tool("take", it=loop)
    assert result.outcome == "ok"


# ---- converted once


def percent(value: float) -> float:
    return value / 100


Share = Annotated[float, AfterValidator(percent)]


class Part(TypedDict):
    name: str
    share: Share


class Span(NamedTuple):
    start: Share
    end: Share


class Opaque:
    """Equal to itself alone."""

    def __init__(self, text: str) -> None:
        self.text = text


def opaque(value: Any) -> Opaque:
    if not isinstance(value, str):
        raise ValueError("give text")
    return Opaque(value)


CONVERTED: dict[str, tuple[Any, Any, Any]] = {  # annotation, what is sent, what arrives
    "validator": (Share, 50, 0.5),
    "json": (Json[list[int]], "[1, 2]", [1, 2]),
    "list": (list[Share], [50, 20], [0.5, 0.2]),
    "dict": (dict[str, Share], {"a": 50}, {"a": 0.5}),
    "typed dict": (list[Part], [{"name": "a", "share": 50}], [{"name": "a", "share": 0.5}]),
    "named tuple": (Span, [10, 20], Span(0.1, 0.2)),
    "tuple": (tuple[Share, str], [50, "x"], (0.5, "x")),
    "iterable": (Iterable[Share], [50], [0.5]),
    "date": (datetime.date, "2026-05-01", datetime.date(2026, 5, 1)),
    "alias": (Annotated[Share, Field(alias="from")], 50, 0.5),
    "nothing": (float, float("inf"), float("inf")),
}


def guarded(kind: Any, sent: Any, approve: Any) -> tuple[BaseAgent, list[Any]]:
    got: list[Any] = []

    async def take(x, note=""):  # type: ignore[no-untyped-def]
        got.append((x, note))

    take.__annotations__ = {"x": kind, "note": str}
    name = "from" if "alias" in repr(kind) else "x"
    value = "Infinity" if sent == float("inf") else None
    arguments = f'{{"{name}": {value}}}' if value else {name: sent}
    model = ScriptedModel([answers.call("take", arguments), "done"])
    agent = BaseAgent("A", "a", client=model, approve=approve).add_tool(tool(requires_approval=True)(take))
    return agent, got


WAYS_TO_ALLOW: dict[str, Callable[[PendingCall], Any]] = {
    "True": lambda call: True,
    "Allow()": lambda call: Allow(),
    "the same": lambda call: Allow(call.arguments),
    "a copy": lambda call: Allow(copy.deepcopy(dict(call.arguments))),
    "with a note": lambda call: Allow({**call.arguments, "note": "seen"}),
}


@pytest.mark.parametrize("way", WAYS_TO_ALLOW)
@pytest.mark.parametrize("name", CONVERTED)
async def test_what_was_shown_is_what_is_executed(name: str, way: str) -> None:
    kind, sent, arrives = CONVERTED[name]
    seen: list[Any] = []

    def approve(call: PendingCall) -> Any:
        seen.append(copy.deepcopy(call.arguments["x"]))
        return WAYS_TO_ALLOW[way](call)

    agent, got = guarded(kind, sent, approve)
    result = await agent.run("go")
    assert outcomes(result) == ["ok"], result.tool_results[0].error
    assert seen == [arrives]
    assert got == [(arrives, "seen" if way == "with a note" else "")]
    assert type(got[0][0]) is type(arrives)


@pytest.mark.parametrize(
    ("kind", "sent", "change", "arrives"),
    [
        (list[Share], [50, 20], lambda x: [*x, 30], [0.5, 0.2, 0.3]),
        (list[Share], [50, 20], lambda x: [30, *x], [0.3, 0.5, 0.2]),
        (list[Share], [50, 20], lambda x: x[1:], [0.2]),
        (list[Share], [50, 20, 10], lambda x: [x[0], 40, x[2]], [0.5, 0.4, 0.1]),
        (list[Share], [50, 20, 10], lambda x: [x[0], x[2]], [0.5, 0.1]),
        (dict[str, Share], {"a": 50}, lambda x: {**x, "b": 20}, {"a": 0.5, "b": 0.2}),
        (
            list[Part],
            [{"name": "a", "share": 50}],
            lambda x: [{**x[0], "name": "z"}],
            [{"name": "z", "share": 0.5}],
        ),
        (Span, [10, 20], lambda x: x._replace(end=30), Span(0.1, 0.3)),
        (tuple[Share, str], [50, "x"], lambda x: (x[0], "y"), (0.5, "y")),
        (dict[str, list[Share]], {"a": [50, 20]}, lambda x: {"a": [*x["a"], 10]}, {"a": [0.5, 0.2, 0.1]}),
        (Share, 50, lambda x: 20, 0.2),
        (float, 1.0, lambda x: True, 1.0),
    ],
    ids=[
        "end",
        "front",
        "first gone",
        "middle",
        "middle gone",
        "key",
        "field",
        "named",
        "tuple",
        "deep",
        "all",
        "bool",
    ],
)
async def test_of_what_was_changed_only_the_changes_are_converted(
    kind: Any, sent: Any, change: Callable[[Any], Any], arrives: Any
) -> None:
    agent, got = guarded(kind, sent, lambda call: Allow({**call.arguments, "x": change(call.arguments["x"])}))
    result = await agent.run("go")
    assert outcomes(result) == ["ok"], result.tool_results[0].error
    assert [x for x, _ in got] == [arrives]


async def test_what_is_changed_in_place_and_handed_back_is_checked() -> None:
    def approve(call: PendingCall) -> Allow:
        call.arguments["x"].append(30)
        return Allow(call.arguments)

    agent, got = guarded(list[Share], [50], approve)
    await agent.run("go")
    assert got == [([0.5, 0.3], "")]

    def spoil_it(call: PendingCall) -> Allow:
        call.arguments["x"].append("many")
        return Allow(call.arguments)

    agent, got = guarded(list[int], [1], spoil_it)
    result = await agent.run("go")
    assert (outcomes(result), got) == (["denied"], [])


async def test_an_object_that_is_equal_to_itself_alone_is_known_again() -> None:
    kind = Annotated[Any, BeforeValidator(opaque)]
    agent, got = guarded(kind, "a", lambda call: Allow({**call.arguments, "note": "seen"}))
    result = await agent.run("go")
    assert outcomes(result) == ["ok"], result.tool_results[0].error
    assert [x.text for x, _ in got] == ["a"]


async def test_a_validator_is_called_once_for_a_call_that_is_allowed_unchanged() -> None:
    calls: list[Any] = []

    def count(value: int) -> int:
        calls.append(value)
        return value

    agent, _ = guarded(Annotated[int, AfterValidator(count)], 5, lambda call: Allow({**call.arguments, "note": "n"}))
    await agent.run("go")
    assert calls == [5]


async def test_a_model_that_is_handed_back_changed_is_taken_as_it_is() -> None:
    class Discount(BaseModel):
        share: Share
        note: str = ""

    def approve(call: PendingCall) -> Allow:
        return Allow({"x": call.arguments["x"].model_copy(update={"note": "seen"})})

    agent, got = guarded(Discount, {"share": 50}, approve)
    await agent.run("go")
    assert [(x.share, x.note) for x, _ in got] == [(0.5, "seen")]


# ---- names


@tool(requires_approval=True)
def trains(
    from_: Annotated[str, Field(alias="from")],
    when: str = Field("now", validation_alias="time"),
    to: str = "Rome",
) -> str:
    return f"{from_} to {to} {when}"


@pytest.mark.parametrize(
    ("allowed", "content"),
    [
        (lambda arguments: arguments, "Bern to Rome now"),
        (lambda arguments: {**arguments, "to": "Oslo"}, "Bern to Oslo now"),
        (lambda arguments: {**arguments, "from_": "Paris"}, "Paris to Rome now"),
        (lambda arguments: {"from": "Paris", "time": "late"}, "Paris to Rome late"),
        (lambda arguments: {"from_": "Paris", "when": "late"}, "Paris to Rome late"),
    ],
    ids=["unchanged", "other", "by the function's name", "by the model's names", "by the function's names"],
)
async def test_a_call_with_aliases_can_be_allowed_by_either_name(allowed: Any, content: str) -> None:
    model = ScriptedModel([answers.call("trains", {"from": "Bern"}), "done"])
    agent = BaseAgent("A", "a", client=model, approve=lambda call: Allow(allowed(dict(call.arguments))))
    [call] = (await agent.add_tool(trains).run("go")).tool_results
    assert call.content == content, call.error


async def test_names_that_change_places_are_those_of_the_function_in_what_is_allowed() -> None:
    @tool(requires_approval=True)
    def swap(a: Annotated[int, Field(alias="b")], b: Annotated[int, Field(alias="a")]) -> list[int]:
        return [a, b]

    for change, arrives in (({}, [1, 2]), ({"a": 5}, [5, 2]), ({"b": 5}, [1, 5])):
        model = ScriptedModel([answers.call("swap", {"b": 1, "a": 2}), "done"])
        approve = lambda call, change=change: Allow({**call.arguments, **change})  # noqa: E731
        [call] = (await BaseAgent("A", "a", client=model, approve=approve).add_tool(swap).run("go")).tool_results
        assert call.content == arrives, call.error
