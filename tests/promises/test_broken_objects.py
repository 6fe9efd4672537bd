"""Exceptions of users' whose text, class or attributes cannot be had: every run ends with a result all the same."""

from __future__ import annotations

import logging
import pickle
from collections.abc import Callable, Iterator
from functools import partial
from typing import Annotated, Any

import anyio
import pytest
from pydantic import AfterValidator, BaseModel, field_validator

from fractal import (
    AgentResult,
    BaseAgent,
    Deny,
    Event,
    FallbackModel,
    InvalidArguments,
    RaceModel,
    StatusError,
    ToolStarted,
    run_many,
    stream_many,
    sync,
    tool,
)
from fractal._engine.observers import Brief
from fractal.testing import ScriptedModel, answers
from tests.odd import EXCEPTIONS, VALUES, Classless, Group, Spent, Textless, Unshown
from tests.support import in_thread
from tests.without_uvloop import anyio_backend  # noqa: F401

Raise = Callable[..., Any]


@pytest.fixture(autouse=True)
def log(caplog: pytest.LogCaptureFixture) -> Iterator[pytest.LogCaptureFixture]:
    """All of it is logged, and what cannot be made a line of the log would fail the test."""
    caplog.set_level(logging.DEBUG, "fractal")
    yield caplog
    assert all(record.getMessage().isprintable() for record in caplog.records if record.name == "fractal")


async def ship() -> str:
    await anyio.lowlevel.checkpoint()
    return "shipped"


def two_calls(arguments: dict[str, Any] | None = None) -> ScriptedModel:
    return ScriptedModel([[answers.call("charge", arguments or {}), answers.call("ship", {})], "done"])


def plain_tool(fail: Raise, **options: Any) -> BaseAgent:
    return BaseAgent("A", "a", client=two_calls(), **options).add_tool(lambda: fail(), name="charge")


def async_tool(fail: Raise, **options: Any) -> BaseAgent:
    async def charge() -> None:
        await anyio.lowlevel.checkpoint()
        fail()

    return BaseAgent("A", "a", client=two_calls(), **options).add_tool(charge)


def final_tool(fail: Raise, **options: Any) -> BaseAgent:
    @tool(on_error="raise")
    def charge() -> None:
        fail()

    return BaseAgent("A", "a", client=two_calls(), **options).add_tool(charge)


def argument(fail: Raise, **options: Any) -> BaseAgent:
    def charge(amount: Annotated[int, AfterValidator(lambda amount: fail())]) -> None:
        pytest.fail("it has no arguments")

    return BaseAgent("A", "a", client=two_calls({"amount": 1}), **options).add_tool(charge)


def approver(fail: Raise, **options: Any) -> BaseAgent:
    @tool(requires_approval=True)
    def charge() -> None:
        pytest.fail("nobody has approved it")

    return BaseAgent("A", "a", client=two_calls(), approve=lambda call: fail(), **options).add_tool(charge)


def prompt(fail: Raise, **options: Any) -> BaseAgent:
    return BaseAgent("A", lambda: fail(), client=ScriptedModel(["done"]), **options)


def validator(fail: Raise, **options: Any) -> BaseAgent:
    agent = BaseAgent("A", "a", client=ScriptedModel(["done"]), **options)
    agent.output_validator(lambda answer: fail())
    return agent


def output(fail: Raise, **options: Any) -> BaseAgent:
    class City(BaseModel):
        name: str

        @field_validator("name")
        @classmethod
        def check(cls, name: str) -> str:
            return fail()

    return BaseAgent("A", "a", client=ScriptedModel(['{"name": "Rome"}']), output_type=City, **options)


class Failing:
    def __init__(self, fail: Raise) -> None:
        self._fail = fail

    async def respond(self, request: Any) -> Any:
        self._fail()


def model(fail: Raise, **options: Any) -> BaseAgent:
    return BaseAgent("A", "a", client=Failing(fail), **options)


def fallback(fail: Raise, **options: Any) -> BaseAgent:
    return BaseAgent("A", "a", client=FallbackModel(Failing(fail), Failing(fail)), **options)


def race(fail: Raise, **options: Any) -> BaseAgent:
    return BaseAgent("A", "a", client=RaceModel(Failing(fail), Failing(fail)), **options)


def counter(fail: Raise, **options: Any) -> BaseAgent:
    options |= {"context_window": 1000, "count_tokens": lambda message: fail()}
    return BaseAgent("A", "a", client=ScriptedModel(["done"]), **options)


def delegate(fail: Raise, **options: Any) -> BaseAgent:
    calls = [[answers.call("ask", {"query": "?"})], "done"]
    return BaseAgent("A", "a", client=ScriptedModel(calls), **options).register_delegate(prompt(fail), "ask")


TOOLS = (plain_tool, async_tool, argument, approver)
OTHERS = (final_tool, prompt, validator, output, model, fallback, race, counter, delegate)

every_exception = pytest.mark.parametrize("make", EXCEPTIONS.values(), ids=EXCEPTIONS)


def raising(make: Callable[[], Exception]) -> Raise:
    def fail() -> None:
        raise make()

    return fail


async def by_run(agent: BaseAgent) -> AgentResult:
    return await agent.run("go", max_retries=0)


async def by_stream(agent: BaseAgent) -> AgentResult:
    async with agent.stream("go", max_retries=0) as stream:
        assert [event async for event in stream][-1].kind == "run_finished"
    return await stream.result()


async def by_many(agent: BaseAgent) -> AgentResult:
    [result] = await run_many(agent, ["go"], max_retries=0)
    return result


async def by_sync(agent: BaseAgent) -> AgentResult:
    return await in_thread(lambda: sync.run(agent, "go", max_retries=0))


WAYS = (by_run, by_stream, by_many, by_sync)


def check(result: AgentResult, events: list[Event]) -> None:
    assert events[-1].kind == "run_finished"
    for told in (result, *events):
        assert told.model_dump_json()
        assert repr(told)
        pickle.loads(pickle.dumps(told))
    assert isinstance(result.exception, Exception) is not result.success


@every_exception
@pytest.mark.parametrize("where", TOOLS, ids=lambda where: where.__name__)
async def test_a_call_that_fails_is_told_and_disturbs_no_other(where: Any, make: Any):
    events: list[Event] = []
    result = await by_run(where(raising(make), observers=[events.append]).add_tool(ship))
    assert result.stop_reason == "finished"
    expected = "denied" if where is approver else "error"
    assert [call.outcome for call in result.tool_results] == [expected, "ok"]
    check(result, events)


@every_exception
@pytest.mark.parametrize("where", OTHERS, ids=lambda where: where.__name__)
async def test_a_run_that_fails_has_a_result_and_a_last_event(where: Any, make: Any):
    events: list[Event] = []
    result = await by_run(where(raising(make), observers=[events.append]).add_tool(ship))
    assert result.error or result.success
    check(result, events)


@pytest.mark.parametrize("way", WAYS[1:], ids=lambda way: way.__name__)
@pytest.mark.parametrize("make", [Spent, Unshown, lambda: Group("g", [Spent()])], ids=["Spent", "Unshown", "Group"])
@pytest.mark.parametrize("where", [*TOOLS, *OTHERS], ids=lambda where: where.__name__)
async def test_the_same_holds_for_every_verb(where: Any, make: Any, way: Any):
    events: list[Event] = []
    check(await way(where(raising(make), observers=[events.append]).add_tool(ship)), events)


@every_exception
async def test_a_tool_that_is_called_directly_has_a_result(make: Any):
    for where in (plain_tool, async_tool):
        agent = where(raising(make))
        one = await agent.execute_tool("charge")
        other = await in_thread(lambda agent=agent: sync.execute_tool(agent, "charge"))
        assert (one.outcome, one.error) == (other.outcome, other.error)
        assert one.outcome == "error"
        assert one.error


async def test_the_text_is_the_name_of_the_class():
    result = await by_run(plain_tool(raising(Spent)).add_tool(ship))
    assert result.tool_results[0].error == "Spent"
    assert result.messages[2]["content"] == "Error: Spent"
    failed = await by_run(prompt(raising(Spent)))
    assert (failed.error, type(failed.exception.__cause__)) == ("Spent", Spent)  # type: ignore[union-attr]
    counted = await by_run(counter(raising(Spent)))
    assert counted.error == "the token counter failed on a system message: Spent"
    assert type(counted.exception.__cause__) is Spent  # type: ignore[union-attr]


async def test_one_run_that_fails_so_leaves_the_others_of_a_batch_alone():
    agent = BaseAgent("B", "b", client=ScriptedModel(lambda request: request.transcript.messages[-1]["content"]))

    @agent.output_validator
    def check(text: str) -> None:
        if text == "two":
            raise Spent

    assert [result.success for result in await run_many(agent, ["one", "two", "three"])] == [True, False, True]
    async with stream_many(agent, ["one", "two", "three"]) as batch:
        assert {item.index: item.result.success async for item in batch} == {0: True, 1: False, 2: True}


async def test_an_exception_without_a_text_ends_a_batch_that_is_to_fail_fast():
    agent = BaseAgent("B", "b", client=Failing(raising(Spent)))
    with pytest.raises(Exception, match="Spent"):
        await run_many(agent, ["one", "two", "three"], on_error="fail_fast", max_concurrency=3)


async def test_reasons_and_answers_of_an_approver_may_be_anything():
    for answer, words in ((Deny(Textless()), "denied: "), (Textless(), "denied: the approval was not understood")):  # type: ignore[arg-type]
        agent = approver(lambda answer=answer: answer).add_tool(ship)
        result = await by_run(agent)
        assert [call.outcome for call in result.tool_results] == ["denied", "ok"]
        assert (result.tool_results[0].error or "").startswith(words)


# ---- observers


class Saver:
    async def __call__(self, event: Event) -> None:
        pytest.fail("nobody awaits it")

    async def save(self, event: Event) -> None:
        pytest.fail("nobody awaits it")

    @staticmethod
    async def keep(event: Event) -> None:
        pytest.fail("nobody awaits it")


async def save(event: Event) -> None:
    pytest.fail("nobody awaits it")


async def save_each(event: Event) -> Any:
    yield event


def yield_each(event: Event) -> Any:
    yield event


def partly(function: Any) -> Any:
    return partial(partial(function))


LAZY: dict[str, Any] = {
    "async function": save,
    "async method": Saver().save,
    "async static method": Saver.keep,
    "object with an async call": Saver(),
    "partial": partly(save),
    "partial of an object": partly(Saver()),
    "async generator": save_each,
    "generator": yield_each,
}
lazy = pytest.mark.parametrize("function", LAZY.values(), ids=LAZY)


@lazy
def test_an_observer_that_has_to_be_awaited_is_refused_when_the_agent_is_made(function: Any):
    with pytest.raises(InvalidArguments, match="give a plain function"):
        BaseAgent("A", "a", observers=[function])


@lazy
def test_so_is_a_counter_of_tokens(function: Any):
    with pytest.raises(InvalidArguments, match="give a plain function"):
        BaseAgent("A", "a", context_window=100, count_tokens=function)


@lazy
async def test_so_is_what_is_told_of_progress(function: Any):
    with pytest.raises(InvalidArguments, match="a plain function that takes a Progress"):
        await run_many(BaseAgent("A", "a", client=ScriptedModel(["ok"])), ["a"], progress=function)


@pytest.mark.parametrize(
    "observers", [5, print, "ab", [None], [5], ["ab"], [Textless()]], ids=lambda o: type(o).__name__
)
def test_what_cannot_be_called_is_no_observer(observers: Any):
    with pytest.raises(InvalidArguments, match="observers"):
        BaseAgent("A", "a", observers=observers)


@pytest.mark.parametrize(
    "function", [lambda event: save(event), lambda event: save_each(event), lambda event: yield_each(event)],
    ids=["coroutine", "async generator", "generator"],
)  # fmt: skip
async def test_what_an_observer_gives_to_be_awaited_is_told_of_once(function: Any, caplog: pytest.LogCaptureFixture):
    seen: list[Event] = []
    agent = BaseAgent("A", "a", client=ScriptedModel(["ok"] * 2), observers=[function, seen.append])
    result = await agent.run("go")
    assert [text for text in result.warnings if "nobody awaits" in text] == result.warnings
    assert len(result.warnings) == 1
    assert caplog.text.count("nobody awaits") == 1
    assert seen[-1].kind == "run_finished"
    caplog.clear()
    assert await run_many(agent, ["go"], progress=function)
    assert "progress= gave" in caplog.text


async def test_an_observer_may_start_a_task_and_return_anything():
    tasks: list[Any] = []

    async def keep(event: Event) -> None:
        await anyio.lowlevel.checkpoint()

    async with anyio.create_task_group() as group:

        def observe(event: Event) -> Any:
            tasks.append(group.start_soon(keep, event))
            return tasks[-1]

        agent = BaseAgent("A", "a", client=ScriptedModel(["ok"]), observers=[observe, lambda event: [event]])
        assert (await agent.run("go")).warnings == []
    assert len(tasks) == 4


class Same:
    """Says that it equals everything."""

    def __init__(self) -> None:
        self.seen: list[str] = []

    def __call__(self, event: Event) -> None:
        self.seen.append(event.kind)

    def __eq__(self, other: object) -> bool:
        return True

    __hash__ = None  # type: ignore[assignment]


class Unequal(Same):
    def __eq__(self, other: object) -> bool:
        raise OSError("not to be compared")

    __hash__ = None  # type: ignore[assignment]


@pytest.mark.parametrize("kind", [Same, Unequal])
async def test_observers_are_told_apart_by_what_they_are(kind: Any):
    one, other = kind(), kind()
    child = BaseAgent("B", "b", client=ScriptedModel(["ok"]), observers=[one])
    model = ScriptedModel([[answers.call("ask", {"query": "?"})], "done"])
    agent = BaseAgent("A", "a", client=model, observers=[one, other]).register_delegate(child, "ask")
    await agent.run("go")
    assert one.seen == other.seen
    assert one.seen.count("run_finished") == 2


class Broken:
    __name__ = property(lambda self: 1 / 0)

    def __init__(self, error: BaseException) -> None:
        self._error = error

    def __call__(self, event: Event) -> None:
        raise self._error

    def __repr__(self) -> str:
        raise OSError("no text")


@pytest.mark.parametrize(
    "error", [SystemExit(2), GeneratorExit(), Spent(), Unshown(), BaseException("odd")], ids=lambda e: type(e).__name__
)
async def test_what_an_observer_raises_is_logged_and_the_others_are_told(error: Any, caplog: pytest.LogCaptureFixture):
    seen: list[Event] = []
    agent = BaseAgent("A", "a", client=ScriptedModel(["ok"]), observers=[Broken(error), seen.append])
    result = await agent.run("go")
    assert result.success
    assert seen[-1].kind == "run_finished"
    assert caplog.text.count("observer <Broken> failed on") == len(seen)


async def test_a_keyboard_interrupt_in_an_observer_is_one():
    agent = BaseAgent("A", "a", client=ScriptedModel(["ok"]), observers=[Broken(KeyboardInterrupt())])
    caught: list[BaseException] = []
    try:
        await agent.run("go")
    except KeyboardInterrupt as error:
        caught.append(error)
    assert len(caught) == 1


# ---- the log


@pytest.mark.parametrize("make", VALUES.values(), ids=VALUES)
def test_an_event_is_one_line_of_the_log_whatever_is_in_it(make: Any):
    event = ToolStarted(
        run_id="r", parent_id=None, agent_name="A\n", depth=0, tool_name="f\x1b[2J", call_id="\ud800", arguments=make()
    )
    assert str(Brief(event)).isprintable()


class Refusing(logging.Handler):
    def handle(self, record: logging.LogRecord) -> Any:
        raise OSError("the log is full")


async def test_a_handler_that_raises_disturbs_no_run(capsys: pytest.CaptureFixture[str]):
    logger, handler = logging.getLogger("fractal"), Refusing()
    logger.addHandler(handler)
    try:
        result = await by_run(plain_tool(raising(Spent)).add_tool(ship))
    finally:
        logger.removeHandler(handler)
    assert result.success
    assert "the log is full" in capsys.readouterr().err


async def test_a_line_of_the_log_is_one_line(caplog: pytest.LogCaptureFixture):
    evil = "a\r\nWARNING fractal: all is well\x1b[2J\x9b31m\u202e\u200b\x7f"
    bad = Failing(raising(lambda: StatusError(evil, status=400)))
    agent = BaseAgent(evil, "a", client=FallbackModel(bad, ScriptedModel([answers.call(evil, {evil: evil}), "ok"])))
    agent.add_tool(lambda: raising(lambda: ValueError(evil))(), name="f")
    await agent.run(evil)
    messages = [record.getMessage() for record in caplog.records]
    assert any("a model failed" in message and r"a\u000d\nWARNING" in message for message in messages)
    assert all(message.isprintable() for message in messages)


async def test_an_input_may_be_an_object_that_does_not_say_its_class():
    result = await BaseAgent("A", "a", client=ScriptedModel(["done"])).run(Classless())
    assert result.content == "done"


class Noteless(InvalidArguments):
    def add_note(self, note: str) -> None:
        raise ValueError("no notes")


async def test_an_exception_that_takes_no_notes_ends_a_batch_as_itself():
    class Own(BaseAgent):
        async def run(self, *given: Any, **options: Any) -> AgentResult:
            raise Noteless

    with pytest.raises(Noteless):
        await run_many(Own("A", "a"), ["a"])
