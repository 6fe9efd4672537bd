"""What can be read only once is read once, inside the call: the caller gets what the model saw."""

from __future__ import annotations

import csv
import dataclasses
import io
import itertools
import json
import time
from collections import OrderedDict, deque
from collections.abc import AsyncIterator, Callable, Iterable, Iterator
from types import MappingProxyType
from typing import Any, NamedTuple

import anyio
import pytest
from pydantic import BaseModel

from fractal import AgentResult, BaseAgent, Limits, ToolResult, sync, tool
from fractal.testing import ScriptedModel, answers
from tests.support import RUNS, by_run, in_thread, outcomes, with_turns


def numbers() -> Iterator[int]:
    yield from (1, 2)


async def numbers_async() -> AsyncIterator[int]:
    yield 1
    await anyio.sleep(0)
    yield 2


class Once:
    """An iterator of a class of the user's own."""

    def __init__(self) -> None:
        self._rest = [2, 1]

    def __iter__(self) -> Once:
        return self

    def __next__(self) -> int:
        if not self._rest:
            raise StopIteration
        return self._rest.pop()


class OnceAsync:
    def __init__(self) -> None:
        self._rest = [2, 1]

    def __aiter__(self) -> OnceAsync:
        return self

    async def __anext__(self) -> int:
        await anyio.sleep(0)
        if not self._rest:
            raise StopAsyncIteration
        return self._rest.pop()


class Rows(BaseModel):
    rows: Iterable[int]
    name: str = "x"


@dataclasses.dataclass
class Held:
    it: Any
    name: str = "x"


@dataclasses.dataclass(frozen=True, slots=True)
class Slotted:
    it: Any
    name: str = "x"


class Pair(NamedTuple):
    a: Any
    b: int


ONE_SHOT: dict[str, tuple[Callable[[], Any], Any]] = {  # what makes it, and what it holds
    "generator": (numbers, [1, 2]),
    "expression": (lambda: (n for n in (1, 2)), [1, 2]),
    "map": (lambda: map(int, ["1", "2"]), [1, 2]),
    "filter": (lambda: filter(None, [0, 1, 2]), [1, 2]),
    "zip": (lambda: zip([1], ["a"], strict=True), [(1, "a")]),
    "enumerate": (lambda: enumerate("a"), [(0, "a")]),
    "iterator": (lambda: iter([1, 2]), [1, 2]),
    "reversed": (lambda: reversed([2, 1]), [1, 2]),
    "chain": (lambda: itertools.chain([1], [2]), [1, 2]),
    "rows": (lambda: csv.reader(["a,b", "c,d"]), [["a", "b"], ["c", "d"]]),
    "lines": (lambda: io.StringIO("a\nb"), ["a\n", "b"]),
    "own class": (Once, [1, 2]),
    "views": (lambda: {1: 2}.items(), [(1, 2)]),
    "empty": (lambda: iter(()), []),
    "in a dict": (lambda: {"n": numbers(), "x": 1}, {"n": [1, 2], "x": 1}),
    "in a list": (lambda: [0, numbers()], [0, [1, 2]]),
    "in a tuple": (lambda: (numbers(), 3), ([1, 2], 3)),
    "in a named tuple": (lambda: Pair(numbers(), 3), Pair([1, 2], 3)),
    "in a deque": (lambda: deque([numbers()], maxlen=5), deque([[1, 2]])),
    "in an ordered dict": (lambda: OrderedDict(n=numbers()), OrderedDict(n=[1, 2])),
    "in a proxy": (lambda: MappingProxyType({"n": numbers()}), {"n": [1, 2]}),
    "in an iterator": (lambda: map(lambda n: iter([n]), [1, 2]), [[1], [2]]),
    "deep": (lambda: {"a": [{"b": (numbers(),)}]}, {"a": [{"b": ([1, 2],)}]}),
    "in a dataclass": (lambda: Held(numbers()), Held([1, 2])),
    "in slots": (lambda: [Slotted(numbers())], [Slotted([1, 2])]),
    "in a model": (lambda: Rows(rows=[1, 2]), Rows.model_construct(rows=[1, 2])),
    "in models": (lambda: [Rows(rows=[1, 2])], [Rows.model_construct(rows=[1, 2])]),
    "async generator": (numbers_async, [1, 2]),
    "async iterator": (OnceAsync, [1, 2]),
    "async in a dict": (lambda: {"n": numbers_async(), "m": numbers()}, {"n": [1, 2], "m": [1, 2]}),
    "async in a generator": (lambda: (each for each in [numbers_async()]), [[1, 2]]),
}


def plain_tool(make: Callable[[], Any], **options: Any) -> Any:
    def get() -> Any:
        return make()

    return tool(**options)(get)


def async_tool(make: Callable[[], Any], **options: Any) -> Any:
    async def get() -> Any:
        await anyio.sleep(0)
        return make()

    return tool(**options)(get)


KINDS = {"plain": plain_tool, "async": async_tool}


def reader(get: Any, **options: Any) -> BaseAgent:
    return BaseAgent("A", "a", client=ScriptedModel([answers.call("get", {}), "done"]), **options).add_tool(get)


def told(result: AgentResult) -> Any:
    return json.loads(result.messages[2]["content"])


async def by_execute_tool(agent: BaseAgent) -> ToolResult:
    return await agent.execute_tool("get")


async def by_sync_execute_tool(agent: BaseAgent) -> ToolResult:
    result: ToolResult = await in_thread(sync.execute_tool, agent, "get")
    return result


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", ONE_SHOT)
async def test_the_content_is_what_the_model_saw(name: str, kind: str) -> None:
    make, holds = ONE_SHOT[name]
    seen: list[Any] = []
    result = await by_run(reader(KINDS[kind](make), observers=[seen.append]))
    [call] = result.tool_results
    assert call.content == holds
    assert type(call.content) is type(holds)
    assert [event.result.content for event in seen if event.kind == "tool_finished"] == [holds]
    assert told(result) == json.loads(ToolResult(content=holds, tool_name="x").model_dump_json())["content"]


@pytest.mark.parametrize("entry", RUNS, ids=lambda entry: entry.__name__)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", ["generator", "map", "async generator", "in a dict"])
async def test_what_ends_a_run_can_be_read_by_its_caller(name: str, kind: str, entry: Any) -> None:
    make, holds = ONE_SHOT[name]
    result = await entry(reader(KINDS[kind](make, terminate=True)))
    assert (result.content, result.stop_reason) == (holds, "terminated")
    assert told(result) == holds


@pytest.mark.parametrize("entry", [by_execute_tool, by_sync_execute_tool], ids=lambda entry: entry.__name__)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", ["generator", "map", "async generator", "in a dict"])
async def test_what_a_tool_yields_comes_whole_from_execute_tool(name: str, kind: str, entry: Any) -> None:
    make, holds = ONE_SHOT[name]
    assert (await entry(reader(KINDS[kind](make)))).content == holds


async def test_a_function_that_yields_is_a_tool_by_itself() -> None:
    def rows(city: str) -> Iterator[str]:
        yield city
        yield "Oslo"

    async def cities(city: str) -> AsyncIterator[str]:
        yield city
        await anyio.sleep(0)
        yield "Oslo"

    class Kit:
        async def cities(self, city: str) -> AsyncIterator[str]:
            yield city
            yield "Oslo"

    for function in (rows, cities, Kit().cities):
        agent = BaseAgent("A", "a").add_tool(function, name="get")
        assert (await agent.execute_tool("get", city="Rome")).content == ["Rome", "Oslo"]


# ---- what goes wrong on the way


def broken() -> Iterator[str]:
    yield "one"
    raise OSError("the disk is gone")


def broken_value() -> Iterator[str]:
    yield "one"
    raise ValueError("odd")


async def broken_async() -> AsyncIterator[str]:
    yield "one"
    raise OSError("the disk is gone")


class Exits:
    def __iter__(self) -> Exits:
        return self

    def __next__(self) -> int:
        raise SystemExit(3)


BROKEN: dict[str, tuple[Callable[[], Any], str]] = {
    "generator": (broken, "OSError: the disk is gone"),
    "value": (broken_value, "ValueError: odd"),
    "map": (lambda: map(int, ["1", "x"]), "ValueError: invalid literal for int()"),
    "async generator": (broken_async, "OSError: the disk is gone"),
    "in a dict": (lambda: {"a": broken()}, "OSError: the disk is gone"),
    "in a dataclass": (lambda: [Held(broken_value())], "ValueError: odd"),
    "in a model": (lambda: Rows(rows=["x"]), "ValidationError: "),  # type: ignore[list-item]
    "async in a list": (lambda: [broken_async()], "OSError: the disk is gone"),
    "exit": (Exits, "the tool called sys.exit(3)"),
    "unicode": (lambda: map(lambda b: b.decode(), [b"\xff"]), "UnicodeDecodeError: "),
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", BROKEN)
async def test_what_is_raised_on_the_way_is_what_the_tool_raised(name: str, kind: str) -> None:
    make, text = BROKEN[name]

    async def ship() -> str:
        await anyio.sleep(0.01)
        return "shipped"

    script = [[answers.call("get", {}), answers.call("ship", {})], "done"]
    agent = BaseAgent("A", "a", client=ScriptedModel(script)).add_tool(KINDS[kind](make)).add_tool(ship)
    result = await agent.run("go")
    assert (result.content, outcomes(result)) == ("done", ["error", "ok"])
    assert str(result.tool_results[0].error).startswith(text)
    assert str(result.messages[2]["content"]).startswith(f"Error: {text}")


@pytest.mark.parametrize("kind", KINDS)
async def test_with_on_error_raise_it_ends_the_run(kind: str) -> None:
    result = await by_run(reader(KINDS[kind](broken, on_error="raise")))
    assert (result.success, result.stop_reason) == (False, "tool_error")
    assert isinstance(result.exception.__cause__, OSError)  # type: ignore[union-attr]


# ---- time


def endless() -> Iterator[int]:
    yield from itertools.count()


async def endless_async() -> AsyncIterator[int]:
    for n in itertools.count():
        yield n


@pytest.mark.parametrize("make", [endless, endless_async, lambda: {"a": endless()}], ids=["sync", "async", "deep"])
@pytest.mark.parametrize("kind", KINDS)
async def test_what_never_ends_is_cut_in_time_and_leaves_nothing(kind: str, make: Any) -> None:
    started = time.monotonic()
    result = await by_run(reader(KINDS[kind](make, timeout=0.05)))
    assert outcomes(result)[0] in ("timeout", "abandoned")
    assert time.monotonic() - started < 10
    # `abandoned` for a moment at most: the fixture of all tests sees that the thread ends.


async def test_a_run_that_is_cut_while_it_reads_closes_the_generator() -> None:
    closed: list[str] = []

    async def rows() -> AsyncIterator[int]:
        try:
            yield 1
            await anyio.sleep(60)
        finally:
            closed.append("async")

    def lines() -> Iterator[int]:
        try:
            yield from itertools.count()
        finally:
            closed.append("plain")

    async def hand_out() -> Any:
        return lines()

    agent = BaseAgent("A", "a", limits=Limits(tool_timeout=0.05)).add_tool(rows).add_tool(hand_out)
    assert (await agent.execute_tool("rows")).outcome == "timeout"
    assert (await agent.execute_tool("hand_out")).outcome == "timeout"
    assert closed == ["async", "plain"]


async def test_other_tasks_go_on_while_a_long_generator_is_read() -> None:
    async def many() -> Any:
        return iter(range(20_000))

    agent = BaseAgent("A", "a").add_tool(many)
    result, turns = await with_turns(lambda: agent.execute_tool("many"))
    assert len(result.content) == 20_000
    assert turns > 20


# ---- what can be read as often as one likes


class Odd:
    """Something that can be iterated over, and is no iterator."""

    def __iter__(self) -> Iterator[int]:
        yield 1

    def __str__(self) -> str:
        return "odd"


loop: list[Any] = [1]
loop.append(loop)


@pytest.mark.parametrize(
    "value",
    ["text", 5, None, [1, [2]], {"a": [1]}, (1, 2), {1}, range(3), deque([1]), Held([1]),
     Rows.model_construct(rows=[1]), Odd(), b"ab", loop, [Odd(), Held(1)], {"a": object()}],
    ids=lambda value: type(value).__name__,
)  # fmt: skip
@pytest.mark.parametrize("kind", KINDS)
async def test_anything_else_stays_the_object_that_it_is(kind: str, value: Any) -> None:
    result = await by_execute_tool(reader(KINDS[kind](lambda: value)))
    assert result.error is None
    assert result.content is value


async def test_what_is_nested_too_deeply_to_be_shown_is_no_error() -> None:
    deep: Any = object()
    for _ in range(5000):
        deep = [deep]
    result = await by_execute_tool(reader(plain_tool(lambda: deep)))
    assert (result.outcome, result.content is deep) == ("ok", True)

    def endlessly() -> Any:
        return (endlessly_deep() for _ in range(1))

    def endlessly_deep() -> Any:
        return endlessly_deep()

    result = await by_execute_tool(reader(plain_tool(endlessly)))
    assert str(result.error).startswith("RecursionError")


async def test_the_tools_own_object_is_not_changed() -> None:
    held = Held(numbers())
    result = await by_execute_tool(reader(async_tool(lambda: held)))
    assert result.content == Held([1, 2])
    assert result.content is not held
    assert not isinstance(held.it, list)


# ---- answers


async def test_an_answer_of_an_iterable_is_a_checked_list() -> None:
    agent = BaseAgent("A", "a", client=ScriptedModel(['{"result": ["x"]}', '{"result": ["1", 2]}']))
    result = await agent.run("go", output_type=Iterable[int], output_mode="prompt")
    assert result.content == [1, 2]
    assert result.content == [1, 2], "and can be read again"

    rows = BaseAgent("A", "a", client=ScriptedModel(['{"rows": ["x"]}', '{"rows": ["1"]}']), output_type=Rows)
    answer = (await rows.run("go", output_mode="prompt")).content
    assert answer.rows == [1]
