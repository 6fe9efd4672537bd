"""What the developer has fixed is out of reach for whoever sends arguments: a model, an approver, `execute_tool`."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Annotated, Any

import pytest
from pydantic import Field
from pydantic.json_schema import SkipJsonSchema
from typing_extensions import TypedDict, Unpack

from fractal import AgentToolkit, Allow, BaseAgent, InvalidTool, RunContext, Tool, run_many, sync, tool
from fractal.testing import ScriptedModel, answers
from tests.support import in_thread

got: list[dict[str, Any]] = []


@pytest.fixture(autouse=True)
def _nothing_got() -> None:
    got.clear()


def orders(query: str, user_id: int, **filters: str) -> str:
    got.append({"query": query, "user_id": user_id, **filters})
    return "orders"


async def orders_async(query: str, user_id: int, **filters: str) -> str:
    return orders(query, user_id, **filters)


def keywords_only(query: str, *, user_id: int = 0, **filters: str) -> str:
    return orders(query, user_id, **filters)


def into_keywords(query: str, **filters: Any) -> str:
    got.append({"query": query, **filters})
    return "orders"


class Shop(AgentToolkit):
    def orders(self, query: str, user_id: int, **filters: str) -> str:
        return orders(query, user_id, **filters)

    @classmethod
    def of_class(cls, query: str, user_id: int, **filters: str) -> str:
        return orders(query, user_id, **filters)

    mine = functools.partialmethod(orders, user_id=42)
    mine_of_class = functools.partialmethod(of_class, user_id=42)


class Called:
    def __call__(self, query: str, user_id: int, **filters: str) -> str:
        return orders(query, user_id, **filters)


def looking_like_its_function(function: Callable[..., Any], **bound: Any) -> Any:
    return functools.update_wrapper(functools.partial(function, **bound), function)


def around(inner: Any) -> Any:
    @functools.wraps(inner)
    def wrapper(*arguments: Any, **named: Any) -> Any:
        return inner(*arguments, **named)

    return wrapper


def with_a_signature_of_its_own() -> Any:
    import inspect

    def wrapper(**named: Any) -> Any:
        return orders(user_id=42, **named)

    functools.update_wrapper(wrapper, orders)
    parameters = list(inspect.signature(orders).parameters.values())
    wrapper.__signature__ = inspect.Signature([p for p in parameters if p.name != "user_id"])  # type: ignore[attr-defined]
    return wrapper


FIXED: dict[str, Any] = {
    "partial": functools.partial(orders, user_id=42),
    "async": functools.partial(orders_async, user_id=42),
    "keyword only": functools.partial(keywords_only, user_id=42),
    "into the keywords": functools.partial(into_keywords, user_id=42),
    "inner partial": functools.partial(looking_like_its_function(orders, user_id=42), region="eu"),
    "outer partial": functools.partial(looking_like_its_function(orders, region="eu"), user_id=42),
    "bound twice": functools.partial(looking_like_its_function(orders, user_id=1), user_id=42),
    "looks like its function": looking_like_its_function(orders, user_id=42),
    "marked": functools.partial(tool(timeout=9.0)(functools.partial(orders, user_id=42)), region="eu"),
    "wrapped": around(functools.partial(orders, user_id=42)),
    "wrapped and bound": functools.partial(around(functools.partial(orders, user_id=42)), region="eu"),
    "method": functools.partial(Shop().orders, user_id=42),
    "class method": functools.partial(Shop.of_class, user_id=42),
    "partialmethod": Shop().mine,
    "partialmethod of a class method": Shop().mine_of_class,
    "object": functools.partial(Called(), user_id=42),
    "cached": functools.partial(functools.lru_cache(maxsize=0)(orders), user_id=42),
    "signature": with_a_signature_of_its_own(),
}


def offered(function: Any, **options: Any) -> BaseAgent:
    return BaseAgent("Shop", "s", **options).add_tool(function, name="orders")


def asking(function: Any, arguments: dict[str, Any], **options: Any) -> BaseAgent:
    return offered(function, client=ScriptedModel([answers.call("orders", arguments), "done"]), **options)


async def by_run(function: Any, arguments: dict[str, Any]) -> Any:
    return (await asking(function, arguments).run("go")).tool_results[0]


async def by_stream(function: Any, arguments: dict[str, Any]) -> Any:
    async with asking(function, arguments).stream("go") as stream:
        return (await stream.result()).tool_results[0]


async def by_run_many(function: Any, arguments: dict[str, Any]) -> Any:
    return (await run_many(asking(function, arguments), ["go"]))[0].tool_results[0]


async def by_sync_run(function: Any, arguments: dict[str, Any]) -> Any:
    return (await in_thread(sync.run, asking(function, arguments), "go")).tool_results[0]


async def by_execute_tool(function: Any, arguments: dict[str, Any]) -> Any:
    return await offered(function).execute_tool("orders", **arguments)


async def by_sync_execute_tool(function: Any, arguments: dict[str, Any]) -> Any:
    return await in_thread(lambda: sync.execute_tool(offered(function), "orders", **arguments))


async def by_allow(function: Any, arguments: dict[str, Any]) -> Any:
    def approve(call: Any) -> Allow:
        return Allow({**call.arguments, **arguments})

    guarded = tool(requires_approval=True)(functools.partial(function))
    return (await asking(guarded, {"query": "all"}, approve=approve).run("go")).tool_results[0]


ENTRIES = [by_run, by_stream, by_run_many, by_sync_run, by_execute_tool, by_sync_execute_tool, by_allow]


@pytest.mark.parametrize("entry", ENTRIES, ids=lambda entry: entry.__name__)
@pytest.mark.parametrize("name", FIXED)
async def test_nobody_else_sets_what_is_bound(name: str, entry: Any) -> None:
    call = await entry(FIXED[name], {"query": "all", "user_id": "1"})
    assert got == []
    assert call.outcome == ("denied" if entry is by_allow else "error")
    assert "there is no parameter 'user_id', only query" in call.error


@pytest.mark.parametrize("name", FIXED)
async def test_what_is_bound_is_passed_and_other_names_are_free(name: str) -> None:
    call = await offered(FIXED[name]).execute_tool("orders", query="all", colour="red")
    assert call.error is None
    [given] = got
    assert given.items() >= {"query": "all", "user_id": 42, "colour": "red"}.items()
    assert given.get("region", "eu") == "eu"


@pytest.mark.parametrize("name", FIXED)
def test_what_is_bound_is_not_offered(name: str) -> None:
    schema = Tool.from_function(FIXED[name]).parameters.json_schema
    assert list(schema["properties"]) == ["query"]
    assert schema["required"] == ["query"]


async def test_what_is_bound_by_position_is_out_of_reach_too() -> None:
    def read(user_id: int, path: str, **more: str) -> str:
        got.append({"user_id": user_id, "path": path, **more})
        return path

    call = await offered(functools.partial(read, 42)).execute_tool("orders", path="x", user_id=1)
    assert "there is no parameter 'user_id', only path" in (call.error or "")

    def by_position(user_id: int, /, **more: Any) -> str:
        got.append({"first": user_id, **more})
        return "read"

    # The name of a parameter that is positional only is free for others.
    assert (await offered(functools.partial(by_position, 42)).execute_tool("orders", user_id=1)).error is None
    assert got == [{"first": 42, "user_id": 1}]


async def test_self_and_the_class_are_out_of_reach() -> None:
    for method in (Shop().orders, Shop.of_class, Called()):
        call = await offered(method).execute_tool("orders", query="all", user_id=1, **{"self": "x", "cls": "x"})
        assert "there is no parameter" in (call.error or ""), call.error
    assert got == []


async def test_the_context_is_out_of_reach() -> None:
    def read(ctx: RunContext[Any], path: str, **more: Any) -> str:
        got.append({"ctx": ctx, "path": path, **more})
        return path

    seen: list[Any] = []
    agent = offered(read, observers=[seen.append])
    await agent.execute_tool("orders", path="x", ctx="forged")
    assert [type(each["ctx"]) for each in got] == [RunContext]
    [started] = [event for event in seen if event.kind == "tool_started"]
    assert started.arguments == {"path": "x"}, "nobody is shown what has no effect"


async def test_a_parameter_that_is_hidden_from_models_keeps_its_default() -> None:
    def read(path: str, limit: SkipJsonSchema[int] = 10, **more: Any) -> str:
        got.append({"path": path, "limit": limit, **more})
        return path

    read.__annotations__["limit"] = Annotated[int, SkipJsonSchema()]
    agent = offered(read)
    assert list(agent.get_tool_schemas()[0]["function"]["parameters"]["properties"]) == ["path"]
    assert "there is no parameter 'limit'" in ((await agent.execute_tool("orders", path="x", limit=99)).error or "")
    assert (await agent.execute_tool("orders", path="x")).error is None
    assert got == [{"path": "x", "limit": 10}]


def test_a_hidden_parameter_without_a_default_is_refused() -> None:
    def read(path: str, secret: Any) -> str:
        return path

    read.__annotations__["secret"] = Annotated[int, SkipJsonSchema()]
    with pytest.raises(InvalidTool, match="'secret' is hidden from models: give it a default"):
        Tool.from_function(read)


class Filters(TypedDict, total=False):
    colour: str
    tenant: str


async def test_what_is_bound_of_an_unpacked_typed_dict_is_out_of_reach() -> None:
    def read(path: str, **filters: Unpack[Filters]) -> str:
        got.append({"path": path, **filters})
        return path

    read.__annotations__["filters"] = Unpack[Filters]
    agent = offered(functools.partial(read, tenant="ours"))
    assert list(agent.get_tool_schemas()[0]["function"]["parameters"]["properties"]) == ["path", "colour"]
    assert "there is no parameter 'tenant'" in ((await agent.execute_tool("orders", path="x", tenant="b")).error or "")
    assert (await agent.execute_tool("orders", path="x", colour="red")).error is None
    assert got == [{"path": "x", "tenant": "ours", "colour": "red"}]


async def test_an_alias_does_not_open_what_is_bound() -> None:
    def read(path: str, user: Annotated[int, Field(alias="user_id")] = 0, **more: Any) -> str:
        got.append({"path": path, "user": user, **more})
        return path

    read.__annotations__["user"] = Annotated[int, Field(alias="user_id")]
    agent = offered(functools.partial(read, user=42))
    assert "there is no parameter 'user'" in ((await agent.execute_tool("orders", path="x", user=1)).error or "")
    assert got == []
