"""What users of the older framework have written, from the pages that they learned it of: it works as it stands.

The blocks are in our words, with their calls. Each runs on both event loops; `asyncio.gather` and `asyncio.wait_for` of
theirs on asyncio, where task groups and `fail_after` say the same on trio.
"""

from __future__ import annotations

import asyncio
import json
import logging
import time
from collections.abc import Awaitable, Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Literal, Optional

import anyio
import httpx2
import pytest
import sniffio
from fastapi import FastAPI, HTTPException
from openai import AsyncOpenAI, OpenAI
from pydantic import BaseModel

from fractal import (
    AgentResult,
    AgentReturnPart,
    AgentToolkit,
    BaseAgent,
    Limits,
    RunContext,
    ToolResult,
    ToolReturnPart,
    TraceEvent,
    TracingKit,
    UserError,
    sync,
    tool,
)
from fractal.testing import Endpoint, ScriptedModel, answers
from tests.without_uvloop import anyio_backend  # noqa: F401

StartEndpoint = Callable[..., Endpoint]


class Person(BaseModel):
    name: str
    age: int


class Reporter(BaseAgent):
    """An agent as the pages define one: a class, tools as decorated methods, plain ones beside async ones."""

    def __init__(self, client: Any = None, **options: Any) -> None:
        super().__init__(name="Data Reporter", system_prompt="You report.", client=client, **options)
        self.pool: list[str] | None = None

    async def __aenter__(self) -> Reporter:
        self.pool = ["open"]
        return self

    async def __aexit__(self, *args: object) -> None:
        assert self.pool is not None
        self.pool.append("closed")

    @AgentToolkit.register_as_tool
    def plain_tool(self, data: str) -> str:
        """Work on data, blocking."""
        time.sleep(0.1)
        return f"plain {data}"

    @AgentToolkit.register_as_tool
    async def async_tool(self, data: str) -> dict:  # type: ignore[type-arg]
        """Work on data, awaiting."""
        await anyio.sleep(0.1)
        return {"data": data}

    @AgentToolkit.register_as_tool
    def return_string(self) -> str:
        return "Hello"

    @AgentToolkit.register_as_tool
    async def return_dict(self) -> dict:  # type: ignore[type-arg]
        return {"key": "value", "nested": {"data": [1, None]}}

    @AgentToolkit.register_as_tool
    async def return_list(self) -> list:  # type: ignore[type-arg]
        return ["one", 2, True]

    @AgentToolkit.register_as_tool
    def return_model(self) -> Person:
        return Person(name="Ada", age=36)

    @AgentToolkit.register_as_tool
    async def return_models(self) -> list:  # type: ignore[type-arg]
        return [Person(name="Ada", age=36), Person(name="Bob", age=7)]

    @AgentToolkit.register_as_tool
    def return_empty(self) -> list:  # type: ignore[type-arg]
        return []

    @AgentToolkit.register_as_tool
    def fails(self, message: str) -> Person:
        """Fail.

        Args:
            message (str): What nobody reads.
        """
        raise ValueError("Simulated tool error")


@pytest.fixture
def url(endpoint: StartEndpoint, monkeypatch: pytest.MonkeyPatch) -> str:
    """An endpoint that says hello, where the environment says that it is."""
    started = endpoint(lambda request: "hello")
    monkeypatch.setenv("OPENAI_BASE_URL", started.url)
    monkeypatch.setenv("OPENAI_API_KEY", "sk-test")
    return started.url


def in_parallel(*work: Awaitable[Any]) -> Awaitable[list[Any]]:
    """`asyncio.gather` where there is one, else the same with a task group."""
    if sniffio.current_async_library() == "asyncio":
        return asyncio.gather(*work)
    return _gathered(work)


async def _gathered(work: tuple[Awaitable[Any], ...]) -> list[Any]:
    found: list[Any] = [None] * len(work)

    async def one(index: int, awaitable: Awaitable[Any]) -> None:
        found[index] = await awaitable

    async with anyio.create_task_group() as group:
        for index, awaitable in enumerate(work):
            group.start_soon(one, index, awaitable)
    return found


# ---- agents and their clients


@pytest.mark.parametrize("kind", [AsyncOpenAI, OpenAI, None])
async def test_an_agent_is_asked_through_every_client(kind: Any, url: str):
    client = kind(api_key="sk-test", base_url=url) if kind is not None else None
    agent = Reporter(client=client)
    result = await agent.run("Your query", max_iterations=10, max_retries=3, messages=None)
    assert (result.content, result.success, agent.client) == ("hello", True, client)
    again = await agent("And now?", messages=result.messages)
    assert [message["role"] for message in again.messages] == ["user", "assistant", "user", "assistant"]
    assert (await anyio.to_thread.run_sync(lambda: agent.run_sync("x"))).content == "hello"
    await agent.aclose()
    if kind is AsyncOpenAI:
        await client.close()
    elif kind is OpenAI:
        client.close()


async def test_a_double_is_a_client():
    class Completions:
        async def create(self, **request: Any) -> Any:
            message = {"role": "assistant", "content": f"{request['model']} heard {request['messages'][-1]['content']}"}
            return {"choices": [{"message": message, "finish_reason": "stop"}]}

    double = SimpleNamespace(chat=SimpleNamespace(completions=Completions()))
    result = await BaseAgent(name="A", system_prompt="p", model="gpt-4o", client=double).run("me")
    assert result.content == "gpt-4o heard me"


def test_to_build_an_agent_needs_no_key_and_no_endpoint(monkeypatch: pytest.MonkeyPatch):
    for name in ("OPENAI_API_KEY", "OPENAI_BASE_URL", "OPENAI_MODEL", "CONTEXT_WINDOW"):
        monkeypatch.delenv(name, raising=False)
    agent = BaseAgent("A", "p")
    assert (agent.model, agent.context_window, agent.client) == ("gpt-4o-mini", None, None)
    monkeypatch.setenv("OPENAI_MODEL", "gpt-x")
    monkeypatch.setenv("CONTEXT_WINDOW", "9000")
    assert (BaseAgent("A", "p").model, BaseAgent("A", "p").context_window) == ("gpt-x", 9000)
    assert BaseAgent("A", "p", "given").model == "given"


def test_what_an_agent_was_given_can_be_read():
    limits, kit, client = Limits(max_requests=3), AgentToolkit(len), ScriptedModel([])
    agent = BaseAgent(
        "A",
        "You help {who}.",
        "gpt-x",
        client,
        toolkit=kit,
        temperature=0.5,
        max_tokens=7,
        reasoning_effort="low",
        output_type=None,
        limits=limits,
        timeout=5,
        context_window=4000,
        system_context={"who": "Ada"},
        enable_tracing=False,
        observers=(),
    )
    assert (agent.name, agent.model, agent.client, agent.limits) == ("A", "gpt-x", client, limits)
    assert (agent.temperature, agent.max_tokens, agent.reasoning_effort) == (0.5, 7, "low")
    assert (agent.timeout, agent.context_window, agent.system_context) == (5, 4000, {"who": "Ada"})
    assert agent.system_prompt == "You help Ada."
    assert list(agent.toolkit.get_tools()) == ["len"]
    assert agent.reset() is None  # type: ignore[func-returns-value]


async def test_an_agent_with_a_pool_is_a_context_manager():
    model = ScriptedModel(["ok"])
    async with Reporter(client=model) as agent:
        assert (await agent.run("query")).content == "ok"
        assert agent.pool == ["open"]
    assert agent.pool == ["open", "closed"]
    async with BaseAgent("A", "p", client=ScriptedModel(["ok"])) as plain:
        assert (await plain.run("query")).content == "ok"


def test_the_card_of_an_agent_can_be_read():
    card = str(Reporter(model="gpt-x"))
    for part in ("Data Reporter", "gpt-x", "plain_tool", "data"):
        assert part in card
    assert len(repr(Reporter()).splitlines()) == 1


# ---- prompts


async def test_prompts_are_texts_templates_and_functions():
    class Moody(BaseAgent):
        def __init__(self) -> None:
            self.mode = "friendly"
            super().__init__(name="Moody", system_prompt=self._prompt)

        def _prompt(self) -> str:
            return f"You are a {self.mode} assistant."

    agent = Moody()
    assert agent.system_prompt == "You are a friendly assistant."
    agent.mode = "formal"
    assert agent.system_prompt == "You are a formal assistant."

    template = BaseAgent("T", 'User: {name}, {plan}. Say {"a": 1}.', system_context={"name": "Ada", "plan": "free"})
    template.update_system_context(plan="pro")
    assert template.system_prompt == 'User: Ada, pro. Say {"a": 1}.'
    assert BaseAgent("T", "Hello {name}!", system_context={}).system_prompt == "Hello {name}!"
    assert BaseAgent("T", "p").system_context == {}

    calls: list[int] = []

    async def later() -> str:
        calls.append(1)
        return f"call {len(calls)}"

    model = ScriptedModel(["a", "b"])
    dynamic = BaseAgent("D", later, client=model)
    assert calls == []
    await dynamic.run("x")
    await dynamic.run("x")
    assert [request["messages"][0]["content"] for request in model.requests] == ["call 1", "call 2"]


# ---- tools


@pytest.mark.parametrize("name", ["plain_tool", "async_tool"])
async def test_tools_run_side_by_side(name: str):
    agent = Reporter()
    begun = time.monotonic()
    results = await in_parallel(*(agent.execute_tool(name, data=data) for data in "a" * 25))
    assert time.monotonic() - begun < 1.2  # one after another they would take 2.5
    assert [result.error for result in results] == [None] * 25
    assert {"plain_tool": "plain a", "async_tool": {"data": "a"}}[name] == results[0].content


@pytest.mark.parametrize(
    ("name", "content", "shown"),
    [
        ("return_string", "Hello", "Hello"),
        ("return_dict", {"key": "value", "nested": {"data": [1, None]}}, None),
        ("return_list", ["one", 2, True], None),
        ("return_model", Person(name="Ada", age=36), '{"name":"Ada","age":36}'),
        (
            "return_models",
            [Person(name="Ada", age=36), Person(name="Bob", age=7)],
            '[{"name":"Ada","age":36},{"name":"Bob","age":7}]',
        ),
        ("return_empty", [], "[]"),
    ],
)
async def test_a_tool_may_return_what_it_likes(name: str, content: Any, shown: str | None):
    result = await Reporter().execute_tool(name)
    assert (result.content, type(result.content), result.tool_name, result.error) == (
        content,
        type(content),
        name,
        None,
    )
    assert (result.outcome, result.metadata) == ("ok", {"arguments": {}, "terminate": False})
    model = ScriptedModel([answers.call(name), "done"])
    run = await Reporter(client=model).run("x")
    told = run.messages[2]["content"]
    assert told == shown if shown is not None else json.loads(told) == content
    assert run.tool_results[0].content == content


async def test_what_goes_wrong_with_a_tool_is_told_and_not_raised():
    agent = Reporter()
    for name, arguments, words in (
        ("fails", {"message": "x"}, "Simulated tool error"),
        ("nothing", {}, "nothing"),
        ("plain_tool", {}, "data"),
        ("plain_tool", {"data": "x", "more": 1}, "more"),
    ):
        result = await agent.execute_tool(name, **arguments)  # type: ignore[arg-type]
        assert isinstance(result, ToolResult)
        assert result.error is not None
        assert words in result.error


async def test_tools_are_marked_in_every_way_and_added():
    @tool
    def one(count: int, kind: Literal["a", "b"] = "a", who: Optional[Person] = None) -> int:  # noqa: UP045
        """Count.

        Args:
            count: How many.
        """
        assert who is None or isinstance(who, Person)
        return count

    @tool(name="second", description="Say.", terminate=True, timeout=5, on_cancel="wait", max_concurrency=1)
    async def two(self: str, name: str, tool_name: str, messages: str, ctx: str) -> str:
        return self + name + tool_name + messages + ctx

    class Kit(AgentToolkit):
        @tool(sequential=True, on_error="raise")
        @staticmethod
        def still(x: int) -> int:
            return x

        @tool
        @classmethod
        def of_class(cls, x: int) -> str:
            return cls.__name__

        @tool
        def of_run(self, ctx: RunContext[Any]) -> str:
            return ctx.run_id

    agent = BaseAgent("A", "p", toolkit=Kit())
    agent.add_tool(one).add_tool(two).add_tool(len, name="size", terminate=True)
    assert list(agent.get_tools()) == ["still", "of_class", "of_run", "one", "second", "size"]
    schemas = {each["function"]["name"]: each["function"] for each in agent.get_tool_schemas()}
    properties = schemas["one"]["parameters"]["properties"]
    assert properties["count"] == {"type": "integer", "description": "How many."}
    assert (properties["kind"]["enum"], properties["kind"]["default"]) == (["a", "b"], "a")
    assert schemas["of_run"]["parameters"]["properties"] == {}
    free = {name: name[0] for name in ("self", "name", "tool_name", "messages", "ctx")}
    assert (await agent.execute_tool("second", **free)).content == "sntmc"
    assert (await agent.execute_tool("one", count="3", who={"name": "Ada", "age": 1})).content == 3
    assert (await agent.execute_tool("of_class", x=1)).content == "Kit"


async def test_a_tool_can_end_the_run():
    agent = BaseAgent("A", "p", client=ScriptedModel([answers.call("finish", {"total": 3})]))

    @agent.add_tool
    def other() -> str:
        return "x"

    def finish(total: int) -> dict[str, int]:
        return {"total": total}

    agent.add_tool(finish, terminate=True)  # type: ignore[attr-defined]
    result = await agent.run("x")  # type: ignore[attr-defined]
    assert (result.content, result.success, result.metadata["terminated_by_tool"]) == ({"total": 3}, True, "finish")


# ---- results


async def test_a_result_has_what_the_pages_name():
    model = ScriptedModel([answers.call("return_string"), answers.text("done", usage=(3, 4))])
    result = await Reporter(client=model, model="gpt-x").run({"question": 1})
    assert (AgentReturnPart, ToolReturnPart) == (AgentResult, ToolResult)
    assert (result.agent_name, result.content, result.success) == ("Data Reporter", "done", True)
    assert result.metadata["iterations"] == 2
    assert (result.metadata["model"], result.metadata["terminated_by_tool"]) == ("gpt-x", None)
    assert result.metadata["messages"] is result.messages
    assert json.loads(result.messages[0]["content"]) == {"question": 1}
    assert (result.stop_reason, result.error, result.abandoned, result.warnings) == ("finished", None, [], [])
    assert result.raise_for_error() is result
    assert result.elapsed >= 0
    assert result.run_id
    loaded = AgentResult.model_validate_json(result.model_dump_json())
    assert (loaded.content, loaded.messages, loaded.usage) == ("done", result.messages, result.usage)


@pytest.mark.parametrize(
    ("answer", "options", "reason"),
    [
        (answers.refusal("no"), {}, "refusal"),
        (answers.empty(), {"max_retries": 0}, "no_content_after_retries"),
        (answers.call("return_string"), {"max_iterations": 1}, "max_iterations_reached"),
        (answers.failure(429), {"max_retries": 0}, "rate_limit"),
        (answers.failure(400), {}, "api_error"),
        (answers.nothing(delay=5), {"timeout": 0.2}, "timeout"),
    ],
    ids=["refusal", "empty", "iterations", "rate limit", "bad request", "timeout"],
)
async def test_a_run_that_fails_is_a_result_with_its_reason(
    answer: Any, options: dict[str, Any], reason: str, endpoint: StartEndpoint, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setenv("OPENAI_BASE_URL", endpoint(lambda request: answer).url)
    monkeypatch.setenv("OPENAI_API_KEY", "sk-test")
    async with BaseAgent("A", "p") as agent:
        agent.add_tool(lambda: "x", name="return_string")
        result = await agent.run("x", **options)
    assert (result.success, result.metadata["reason"]) == (False, reason)
    assert result.metadata["error"] == result.error == result.content
    assert result.metadata["error_type"]
    with pytest.raises(Exception, match=r"\w"):
        result.raise_for_error()


# ---- agent to agent


async def test_agents_ask_each_other():
    def specialist(*said: Any) -> BaseAgent:
        return BaseAgent("Data Analyst", "You analyse.", client=ScriptedModel(list(said)))

    parameters = {
        "sql": {"type": "str", "description": "The query."},
        "limit": {"type": "int", "description": "Rows.", "required": False},
    }
    model = ScriptedModel([answers.call("delegate_to_data_analyst", {"query": "sales?"}), "42, says the analyst"])
    above = BaseAgent("Above", "p", client=model)
    above.register_delegate(specialist("42"))
    above.register_delegate(specialist("rows"), tool_name="ask_sql", description="Ask SQL.", parameters=parameters)
    with pytest.deprecated_call():
        above.register_agent(specialist("old"), "old_name", "Ask the old way.")
    assert list(above.get_tools()) == ["delegate_to_data_analyst", "ask_sql", "old_name"]
    schema = above.get_tool_schemas()[1]["function"]["parameters"]
    assert (schema["required"], list(schema["properties"])) == (["sql"], ["sql", "limit"])
    result = await above.run("x")
    assert (result.content, result.tool_results[0].content) == ("42, says the analyst", "42")
    assert (await above.execute_tool("ask_sql", sql="SELECT 1")).content == "rows"
    assert (await above.call_agent(specialist("direct"), "x")).content == "direct"
    for wrong in (
        "bad",
        {"sql": "str"},
        {"sql": {"type": "tuple"}},
        {"sql": {"typ": "str"}},
        {"x": {"required": "yes"}},
    ):
        with pytest.raises(TypeError, match="parameters"):
            BaseAgent("A", "p").register_delegate(specialist(), parameters=wrong)  # type: ignore[arg-type]


async def test_several_agents_run_at_once_and_one_agent_answers_several():
    agents = [BaseAgent(name, "p", client=ScriptedModel(lambda request: "ok")) for name in "abc"]
    results = await in_parallel(*(agent.run("x") for agent in agents), *(agents[0].run(f"{n}") for n in range(20)))
    assert [result.content for result in results] == ["ok"] * 23


# ---- around it


async def test_an_endpoint_of_fastapi_awaits_an_agent(url: str):
    app, agent = FastAPI(title="Agentic API"), Reporter()

    @app.post("/query")
    async def query_agent(query: str) -> dict[str, Any]:
        try:
            result = await agent.run(query, max_iterations=10)
        except Exception as error:
            raise HTTPException(status_code=500, detail=str(error)) from error
        return {"success": result.success, "response": result.content, "metadata": result.metadata}

    @app.get("/health")
    async def health() -> dict[str, str]:
        return {"status": "healthy", "agent": agent.name}

    @app.get("/statistics")
    async def statistics() -> Any:
        return (await agent.execute_tool("return_dict")).content

    transport = httpx2.ASGITransport(app)
    async with agent, httpx2.AsyncClient(transport=transport, base_url="http://app") as http:
        answer = (await http.post("/query", params={"query": "hi"})).json()
        assert (answer["success"], answer["response"], answer["metadata"]["iterations"]) == (True, "hello", 1)
        assert (await http.get("/health")).json() == {"status": "healthy", "agent": "Data Reporter"}
        assert (await http.get("/statistics")).json()["key"] == "value"
    await BaseAgent.aclose(agent)


async def test_a_run_that_takes_too_long_is_left_with_nothing_running():
    ended = anyio.Event()

    async def wait() -> None:
        try:
            await anyio.sleep_forever()
        finally:
            ended.set()

    agent = BaseAgent("A", "p", client=ScriptedModel([answers.call("wait")])).add_tool(wait)
    with pytest.raises(TimeoutError):
        if sniffio.current_async_library() == "asyncio":
            await asyncio.wait_for(agent.run("x"), timeout=0.1)
        else:
            with anyio.fail_after(0.1):
                await agent.run("x")
    assert ended.is_set()


async def test_the_log_shows_a_run_and_never_a_key(url: str, caplog: pytest.LogCaptureFixture):
    with caplog.at_level(logging.DEBUG):
        async with BaseAgent("A", "p", client=None) as agent:
            await agent.run("x")
    assert "fractal" in {record.name.split(".")[0] for record in caplog.records}
    assert "sk-test" not in caplog.text


async def test_what_runs_did_is_in_the_trace_and_its_file(tmp_path: Path):
    def specialist(name: str) -> BaseAgent:
        return BaseAgent(name, "p", client=ScriptedModel(["ok"]))

    called = [answers.call("delegate_to_one", {"query": "x"}), answers.call("delegate_to_two", {"query": "x"})]
    model = ScriptedModel([answers.calls(*called, answers.call("bad")), "done"])
    agent = BaseAgent(
        "Boss", "p", client=model, enable_tracing=True, tracing_output_file=f"{tmp_path}/trace_{{run_id}}.jsonl"
    )
    agent.register_delegate(specialist("One")).register_delegate(specialist("Two"))

    def bad() -> None:
        raise ValueError("bad")

    result = await agent.add_tool(bad).run("x")
    kit = agent.tracing
    assert isinstance(kit, TracingKit)
    events = kit.get_trace()
    assert all(isinstance(event, TraceEvent) for event in events)
    types = ["agent_start", "agent_end", "agent_delegate", "delegation_end", "tool_call", "tool_result", "error"]
    assert set(types) <= {event.event_type for event in events}
    fields = (
        "timestamp event_type agent_name run_id parent_agent delegation_depth tool_name tool_call_id"
        " parallel_group_id arguments result error elapsed_time metadata"
    )
    assert all(hasattr(event, name) for event in events for name in fields.split())
    below = {event.agent_name: event for event in events if event.event_type == "agent_start" and event.parent_agent}
    assert {name: (each.parent_agent, each.delegation_depth) for name, each in below.items()} == {
        "One": ("Boss", 1),
        "Two": ("Boss", 1),
    }
    assert kit.get_summary()["delegations"] == 2
    kit.export_json(f"{tmp_path}/trace.json")
    assert json.loads((tmp_path / "trace.json").read_text())
    assert (tmp_path / f"trace_{result.run_id}.jsonl").read_text().count("\n") == len(events)
    kit.clear()
    assert kit.get_trace() == []
    assert BaseAgent("A", "p", enable_tracing=False).tracing is None


async def test_a_stream_gives_events_text_and_the_result():
    agent = BaseAgent("A", "p", client=ScriptedModel(["hello"] * 2))
    async with agent.stream("x") as stream:
        kinds = [event.kind async for event in stream]
        assert (kinds[0], kinds[-1]) == ("run_started", "run_finished")
    async with agent.stream("x") as stream:
        assert "".join([text async for text in stream.text()]) == "hello"
        assert (await stream.result()).content == "hello"


def test_blocking_code_has_the_same(backend: Any):
    class Legacy(sync.BaseAgent):
        @tool
        def search(self, query: str) -> str:
            return query.upper()

    agent = BaseAgent("A", "p", client=ScriptedModel(lambda request: "ok")).add_tool(str.upper, name="search")
    with sync.portal(backend=backend):
        assert sync.run(agent, "query", timeout=30).content == "ok"
        assert [each.content for each in sync.run_many(agent, ["a", "b"], max_concurrency=8)] == ["ok", "ok"]
        assert sync.execute_tool(Legacy("L", "p"), "search", query="x").content == "X"
        with sync.stream(agent, "query") as stream:
            for _ in stream:
                break
        handle = sync.start(agent, "query")
        handle.cancel()
        handle = sync.start(agent, "query")
        assert handle.result(timeout=5).content == "ok"
        assert Legacy("L", "p", client=ScriptedModel(["ok"])).run("x").content == "ok"


# ---- what is refused, and says where it is now


def test_what_toolkits_did_says_where_it_is_done():
    for name in ("execute_tool", "register_delegate", "register_agent"):
        with pytest.raises(AttributeError, match=r"agent\.(execute_tool|register_delegate)"):
            getattr(AgentToolkit(), name)
    with pytest.raises(AttributeError, match=r"'AgentToolkit' object has no attribute 'nothing'$"):
        AgentToolkit().nothing  # noqa: B018
    assert not hasattr(AgentToolkit(), "__deepcopy__")


async def test_wrong_use_is_raised_at_once():
    agent = BaseAgent("A", "p", client=ScriptedModel([]))
    for wrong in ({"max_iterations": "many"}, {"timeout": "30"}, {"messages": 5}, {"nothing": 1}):
        with pytest.raises(UserError):
            await agent.run("x", **wrong)  # type: ignore[arg-type]
