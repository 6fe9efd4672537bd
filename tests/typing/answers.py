# pyright: strict, reportUnnecessaryTypeIgnoreComment=true
"""What type checkers know of answers, by every verb. Nothing runs this: `scripts/check` has mypy and pyright read it.

What has to be an error says so to both, and neither may find nothing to ignore there.
"""

from __future__ import annotations

from collections.abc import AsyncIterator
from dataclasses import dataclass
from typing import Annotated, Any, Literal, TypedDict, assert_type

from pydantic import BaseModel, Field
from typing_extensions import Unpack

from fractal import (
    AgentOptions,
    AgentResult,
    BaseAgent,
    BatchItem,
    RunBounds,
    RunOptions,
    RunStream,
    run_many,
    stream_many,
    sync,
)


class Order(BaseModel):
    article: str
    pieces: int = 1


@dataclass
class Point:
    x: int


class Row(TypedDict):
    name: str


class Refund(Order):
    reason: str


class Orders(BaseAgent[Order]):
    """Says in its bases what it answers with; the run asks the model for that."""


class Blocking(sync.BaseAgent[Order]):
    """The same for blocking code."""


class Plain(BaseAgent):
    """Says nothing."""


# ---- what an agent's constructor knows

clerk = BaseAgent("Clerk", "You read orders.", output_type=Order)
assert_type(clerk, BaseAgent[Order])
assert_type(
    BaseAgent("Clerk", "You read orders.", "gpt", None, temperature=0, output_type=list[Order]).output_type, Any
)
assert_type(BaseAgent("A", "p", output_type=list[Order]), BaseAgent[list[Order]])
assert_type(BaseAgent("A", "p", output_type=Point), BaseAgent[Point])
assert_type(BaseAgent("A", "p", output_type=Row), BaseAgent[Row])
assert_type(BaseAgent("A", "p", output_type=int), BaseAgent[int])
assert_type(BaseAgent("A", "p", output_type=str), BaseAgent[str])
assert_type(BaseAgent("A", "p", output_type=Order | Point), BaseAgent[Order | Point])
assert_type(BaseAgent("A", "p", output_type=Order | None), BaseAgent[Order | None])
assert_type(BaseAgent("A", "p", output_type=Literal["yes", "no"]), BaseAgent[Literal["yes", "no"]])
assert_type(BaseAgent("A", "p", output_type=Annotated[int, Field(ge=1)]), BaseAgent[int])
assert_type(BaseAgent("A", "p", output_type=Any), BaseAgent[Any])
assert_type(BaseAgent[Order]("A", "p"), BaseAgent[Order])
assert_type(sync.BaseAgent("A", "p", output_type=Order), sync.BaseAgent[Order])
assert_type(clerk.replace(temperature=0), BaseAgent[Order])

# Nothing is known of these: a tool with `terminate=True` may end a run with whatever it returns.
assert_type(BaseAgent("A", "p"), BaseAgent[Any])
assert_type(BaseAgent("A", "p", output_type=None), BaseAgent[Any])


# ---- every verb of an agent


async def of_an_awaiting_agent(agent: BaseAgent[Order]) -> None:
    assert_type((await agent.run("x")).content, Order)
    assert_type((await agent.run("x", 3, 0, [], timeout=5)).content, Order)
    assert_type((await agent("x")).content, Order)
    assert_type(agent.run_sync("x").content, Order)
    assert_type((await agent.run("x")).raise_for_error().content, Order)
    async with agent.stream("x", buffer=0) as stream:
        assert_type(stream, RunStream[Order])
        assert_type(await stream.result(), AgentResult[Order])
        assert_type(stream.ended, AgentResult[Order] | None)
    assert_type([result.content for result in await run_many(agent, ["x"])], list[Order])
    async with stream_many(agent, ["x"]) as batch:
        async for item in batch:
            assert_type(item, BatchItem[Order])
            assert_type(item.result.content, Order)
    assert_type((await BaseAgent("Boss", "p").call_agent(agent, "x")).content, Order)


async def of_one_run(agent: BaseAgent[Order]) -> None:
    """What one run is given comes before what the agent has."""
    assert_type((await agent.run("x", output_type=Point)).content, Point)
    assert_type((await agent.run("x", 3, output_type=list[str], timeout=5)).content, list[str])
    assert_type((await agent.run("x", output_type=Order | Point)).content, Order | Point)
    assert_type((await agent.run("x", output_type=Literal["a", "b"])).content, Literal["a", "b"])
    assert_type((await agent.run("x", output_type=str)).content, str)
    assert_type((await agent.run("x", output_type=None)).content, Order)
    assert_type((await agent("x", output_type=Point)).content, Point)
    assert_type(agent.run_sync("x", output_type=Point).content, Point)
    async with agent.stream("x", output_type=Point, buffer=0) as stream:
        assert_type((await stream.result()).content, Point)
    assert_type((await run_many(agent, ["x"], output_type=Point, max_concurrency=2))[0].content, Point)
    async with stream_many(agent, ["x"], output_type=Point) as batch:
        assert_type((await anext(batch)).result.content, Point)


def of_the_blocking_facade(agent: BaseAgent[Order], blocking: sync.BaseAgent[Order]) -> None:
    assert_type(sync.run(agent, "x").content, Order)
    assert_type(sync.run(blocking, "x", timeout=1).content, Order)
    assert_type(sync.run(agent, "x", output_type=Point).content, Point)
    assert_type(sync.run_many(agent, ["x"])[0].content, Order)
    assert_type(sync.run_many(agent, ["x"], output_type=Point)[0].content, Point)
    with sync.stream(agent, "x") as stream:
        assert_type(stream.result().content, Order)
    with sync.stream(agent, "x", output_type=Point) as other:
        assert_type(other.result().content, Point)
    with sync.stream_many(agent, ["x"]) as batch:
        assert_type([item.result.content for item in batch], list[Order])
    with sync.stream_many(agent, ["x"], output_type=Point) as others:
        assert_type([item.result.content for item in others], list[Point])
    assert_type(sync.start(agent, "x").result(timeout=5).content, Order)
    assert_type(sync.start(agent, "x", output_type=Point).result().content, Point)
    assert_type(blocking.run("x").content, Order)
    assert_type(blocking.run("x", output_type=Point).content, Point)
    assert_type(blocking("x").content, Order)
    assert_type(blocking("x", 3, output_type=Point).content, Point)
    assert_type(blocking.run_sync("x").content, Order)
    assert_type(blocking.call_agent(agent, "x").content, Order)
    with blocking.stream("x") as mine:
        assert_type(mine.result().content, Order)
    with blocking.stream("x", output_type=Point) as mine_other:
        assert_type(mine_other.result().content, Point)


async def of_subclasses() -> None:
    assert_type((await Orders("A", "p").run("x")).content, Order)
    assert_type(Blocking("A", "p").run("x").content, Order)
    assert_type((await Plain("A", "p").run("x")).content, Any)
    assert_type((await Plain("A", "p").run("x", output_type=Order)).content, Order)


# ---- what ordinary code goes on to be


async def bare_names(agent: BaseAgent, agents: list[BaseAgent], result: AgentResult) -> AgentResult:
    agents.append(clerk)
    agents.append(Orders("A", "p"))
    bare: AgentResult = await clerk.run("x")
    wide: AgentResult[Order] = await BaseAgent("R", "p", output_type=Refund).run("x")  # a Refund is an Order
    assert_type(
        (wide.messages, bare.content["as before"], result.content.whatever), tuple[list[dict[str, Any]], Any, Any]
    )
    return await agent.run("x")


class Overrides(BaseAgent):
    async def run(self, user_input: object, *arguments: Any, **options: Any) -> AgentResult:
        result: AgentResult = await super().run(user_input, *arguments, **options)
        return result


class OverridesInFull(BaseAgent[Order]):
    async def run(  # type: ignore[override]  # pyright: ignore[reportIncompatibleMethodOverride]
        self, user_input: object, max_iterations: int | None = None, **options: Unpack[RunBounds]
    ) -> AgentResult[Order]:
        """Is refused: it takes no `messages`, and `output_type` would have it answer with something else."""
        raise NotImplementedError


class PassesOn(BaseAgent):
    def __init__(self, city: str, **options: Unpack[AgentOptions]) -> None:
        super().__init__("Guide", f"You know {city}.", **options)


def make(**options: Unpack[AgentOptions]) -> BaseAgent:
    return BaseAgent("A", "p", **options)


async def every_verb(agent: BaseAgent[Order], **options: Unpack[RunOptions]) -> AsyncIterator[AgentResult]:
    """Options that are passed on may hold an `output_type`, so nothing should be known: pyright believes the agent."""
    yield await agent.run("x", **options)
    yield await agent("x", **options)
    yield agent.run_sync("x", **options)
    yield await agent.stream("x", **options).result()
    yield (await run_many(agent, ["x"], **options))[0]
    async with stream_many(agent, ["x"], **options) as batch:
        yield (await anext(batch)).result
    yield sync.run(agent, "x", **options)
    yield sync.run_many(agent, ["x"], **options)[0]
    yield sync.start(agent, "x", **options).result()
    yield sync.stream(agent, "x", **options).result()
    yield next(sync.stream_many(agent, ["x"], **options)).result
    yield Blocking("A", "p").run("x", **options)
    yield Blocking("A", "p").stream("x", **options).result()


# ---- what has to be an error


async def errors(agent: BaseAgent[Order]) -> None:
    result = await agent.run("x")
    del result.content.nothing  # type: ignore[attr-defined]  # pyright: ignore[reportAttributeAccessIssue]
    wrong: AgentResult[Point] = result  # type: ignore[assignment]  # pyright: ignore[reportAssignmentType]
    point = (await agent.run("x", output_type=Point)).content
    del point.article  # type: ignore[attr-defined]  # pyright: ignore[reportAttributeAccessIssue]
    await agent.run("x", output_type=3)  # type: ignore[call-overload]  # pyright: ignore[reportArgumentType, reportCallIssue]
    await agent.run("x", time_out=3)  # type: ignore[call-overload]  # pyright: ignore[reportCallIssue]
    await agent.run("x", timeout="3")  # type: ignore[call-overload]  # pyright: ignore[reportArgumentType]
    sync.run(agent, "x", nothing=3)  # type: ignore[call-overload]  # pyright: ignore[reportCallIssue]
    BaseAgent("A", "p", temprature=1)  # type: ignore[call-overload]  # pyright: ignore[reportCallIssue]
    agent.temprature = 1  # type: ignore[attr-defined]  # pyright: ignore[reportAttributeAccessIssue]
    make(temprature=1)  # type: ignore[call-arg]  # pyright: ignore[reportCallIssue]
    PassesOn("Rome", temperature="hot")  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
    assert_type(wrong.content, Point)
