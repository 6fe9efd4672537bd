"""Users' own objects may fail to make a text: that disturbs nothing else, and what is kept of one is plain text."""

from __future__ import annotations

import enum
from collections.abc import Callable
from typing import Annotated, Any

import anyio
import pytest
from pydantic import AfterValidator

from fractal import (
    AnswerRejected,
    BaseAgent,
    ModelRequest,
    PendingCall,
    Reply,
    ToolCall,
    run_many,
    sync,
    tool,
)
from fractal.testing import ScriptedModel, answers
from tests.support import RUNS, in_thread, outcomes
from tests.without_uvloop import anyio_backend  # noqa: F401


class Spent(Exception):
    def __str__(self) -> str:
        return f"the quota of {self.tenant} is spent"  # type: ignore[attr-defined]  # nobody has set it


class SpentValue(ValueError):
    def __str__(self) -> str:
        raise RuntimeError("no text")


class Nonsense(Exception):
    def __str__(self) -> str:
        return 5  # type: ignore[return-value]


class Deep(Exception):
    def __str__(self) -> str:
        return str(self)


ERRORS = [Spent, SpentValue, Nonsense, Deep]


def raising(error: type[Exception]) -> Callable[..., Any]:
    def fail(*_: object) -> Any:
        raise error

    return fail


@pytest.mark.parametrize("entry", RUNS, ids=lambda entry: entry.__name__)
@pytest.mark.parametrize("error", ERRORS, ids=lambda error: error.__name__)
@pytest.mark.parametrize("kind", ["plain", "async", "group"])
async def test_a_tool_whose_error_has_no_text_disturbs_no_other_call(kind: str, error: type[Exception], entry: Any):
    def charge() -> None:
        raise error

    async def charge_async() -> None:
        raise error

    async def charge_together() -> None:
        async with anyio.create_task_group() as group:
            group.start_soon(charge_async)

    async def ship() -> str:
        await anyio.sleep(0.01)
        return "shipped"

    function = {"plain": charge, "async": charge_async, "group": charge_together}[kind]
    script = [[answers.call("charge", {}), answers.call("ship", {})], "done"]
    seen: list[Any] = []
    agent = BaseAgent("A", "a", client=ScriptedModel(script), observers=[seen.append])
    result = await entry(agent.add_tool(function, name="charge").add_tool(ship))
    assert (result.content, outcomes(result)) == ("done", ["error", "ok"])
    assert result.tool_results[0].error == error.__name__
    assert seen[-1].kind == "run_finished"


@pytest.mark.parametrize("error", ERRORS, ids=lambda error: error.__name__)
async def test_execute_tool_gives_a_result(error: type[Exception]) -> None:
    def fail() -> None:
        raise error

    agent = BaseAgent("A", "a").add_tool(fail)
    assert (await agent.execute_tool("fail")).error == error.__name__
    assert (await in_thread(sync.execute_tool, agent, "fail")).error == error.__name__


def refuse(value: int) -> int:
    raise Spent


def refuse_value(value: int) -> int:
    raise SpentValue


async def test_a_validator_of_an_argument_is_told_to_the_model() -> None:
    def take(x: Annotated[int, AfterValidator(refuse)], y: Annotated[int, AfterValidator(refuse_value)]):
        raise AssertionError("not called")

    script = [[answers.call("take", {"x": 1, "y": "z"}), answers.call("take", {"x": "z", "y": 1})], "done"]
    result = await BaseAgent("A", "a", client=ScriptedModel(script)).add_tool(take).run("go")
    assert (result.content, outcomes(result)) == ("done", ["error", "error"])


async def test_an_argument_without_a_repr_is_told_of() -> None:
    class Mute:
        def __repr__(self) -> str:
            raise RuntimeError("no text")

    def take(x: int) -> int:
        return x

    result = await BaseAgent("A", "a").add_tool(take).execute_tool("take", x=Mute())
    assert "'x': Input should be a valid integer (got <Mute>)" in (result.error or "")


async def test_an_approver_that_fails_denies() -> None:
    for approve in (raising(Spent), raising(SpentValue)):

        @tool(requires_approval=True)
        def pay() -> None:
            raise AssertionError("not called")

        def ask(call: PendingCall, approve: Any = approve) -> Any:
            return approve(call)

        agent = BaseAgent("A", "a", client=ScriptedModel([answers.call("pay", {}), "done"]), approve=ask)
        result = await agent.add_tool(pay).run("go")
        assert (result.content, outcomes(result)) == ("done", ["denied"])


class Unfit(AnswerRejected):
    def __str__(self) -> str:
        raise RuntimeError("no text")


def failing_agent(where: str, error: type[Exception]) -> BaseAgent:
    model = ScriptedModel(lambda request: "two")
    if where == "prompt":
        return BaseAgent("A", raising(error), client=model)
    if where == "counter":
        return BaseAgent("A", "a", client=model, context_window=1000, count_tokens=raising(error))
    agent = BaseAgent("A", "a", client=model)

    def check(text: str) -> None:
        if text == "two":
            raise error

    agent.output_validator(check)
    return agent


@pytest.mark.parametrize("entry", RUNS, ids=lambda entry: entry.__name__)
@pytest.mark.parametrize("error", [Spent, SpentValue], ids=lambda error: error.__name__)
@pytest.mark.parametrize("where", ["prompt", "counter", "validator"])
async def test_a_run_that_fails_so_is_a_result_like_any_other(where: str, error: type[Exception], entry: Any) -> None:
    result = await entry(failing_agent(where, error))
    assert (result.success, result.stop_reason) == (False, "error")
    assert isinstance(result.exception.__cause__, error)
    assert error.__name__ in result.error


async def test_a_rejection_without_a_text_is_a_rejection() -> None:
    agent = BaseAgent("A", "a", client=ScriptedModel(lambda request: "two"))

    def check(text: str) -> None:
        raise Unfit("no")

    agent.output_validator(check)
    assert (await agent.run("go")).stop_reason == "invalid_output"


async def test_one_of_many_that_fails_so_loses_no_other() -> None:
    model = ScriptedModel(lambda request: request.transcript.messages[-1]["content"])
    agent = BaseAgent("A", "a", client=model)

    def check(text: str) -> None:
        if text == "two":
            raise Spent

    agent.output_validator(check)
    assert [each.success for each in await run_many(agent, ["one", "two", "three"])] == [True, False, True]
    many = await in_thread(sync.run_many, agent, ["one", "two", "three"])
    assert [each.success for each in many] == [True, False, True]


# ---- plain text


class Colour(str, enum.Enum):  # noqa: UP042  # not as StrEnum: its str() is no value
    RED = "red"


class Loud(str):
    __slots__ = ()

    def __str__(self) -> str:
        return self.upper()


class Echo:
    """A model whose texts are no plain ones."""

    async def respond(self, request: ModelRequest) -> Reply:
        if request.transcript.messages[-1]["role"] == "tool":
            return Reply(text=Loud("done"))
        return Reply(tool_calls=(ToolCall("c1", "get", "{}"),))


@pytest.mark.parametrize("value", [Colour.RED, Loud("red")], ids=["enum", "subclass"])
@pytest.mark.parametrize("is_async", [True, False], ids=["async", "plain"])
async def test_what_is_kept_of_a_text_is_plain_text(value: Any, is_async: bool) -> None:
    async def get_async() -> Any:
        return value

    get = get_async if is_async else lambda: value
    agent = BaseAgent("A", "a", client=Echo()).add_tool(get, name="get")
    history = [{"role": "user", "content": Loud("before")}, {"role": "assistant", "content": Loud("after")}]
    result = await agent.run(Colour.RED, messages=history)
    contents = [message["content"] for message in result.messages]
    assert contents == ["before", "after", "red", None, "red", "done"]
    assert {type(each) for each in contents} == {str, type(None)}
    assert f"{contents[4]}" == "red"
    assert result.tool_results[0].content is value


async def test_a_terminating_tool_keeps_its_member() -> None:
    @tool(terminate=True)
    def get() -> Colour:
        return Colour.RED

    result = await BaseAgent("A", "a", client=ScriptedModel([answers.call("get", {})])).add_tool(get).run("go")
    assert result.content is Colour.RED
    assert type(result.messages[-1]["content"]) is str
