"""OpenTelemetry: spans that are the tree of the run however it runs and ends, metrics, contexts, and no content."""

from __future__ import annotations

import dataclasses
import gc
import json
import logging
import subprocess
import sys
import threading
import warnings
from collections.abc import AsyncGenerator, Awaitable, Callable
from contextlib import nullcontext
from contextvars import copy_context
from typing import Any

import anyio
import anyio.to_thread
import pytest
from hypothesis import HealthCheck, Phase, given, settings
from opentelemetry import context as contexts, metrics, trace
from opentelemetry.propagate import extract
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.sampling import ALWAYS_OFF
from opentelemetry.trace import SpanKind, StatusCode

from fractal import (
    AgentResult,
    BaseAgent,
    InvalidArguments,
    Limits,
    ModelRequested,
    ModelResponded,
    OpenAIModel,
    Price,
    Reply,
    RunFinished,
    RunStarted,
    ToolCall,
    ToolFinished,
    ToolResult,
    ToolStarted,
    TracingKit,
    run_many,
    sync,
)
from fractal.models import ModelRequest
from fractal.models._http.address import server_of
from fractal.testing import Endpoint, ScriptedModel, answers
from fractal.testing._leftovers import running_tasks
from fractal.tracing import Instrumentation
from fractal.tracing.otlp import otlp_lines
from tests.played import Stage
from tests.programs import LOOP_KINDS, make
from tests.spans import Telemetry, assert_parents, parent_of, size_of, tree_of_events, tree_of_spans
from tests.support import LOOPS
from tests.trees import Grown, Tree, trees
from tests.without_uvloop import anyio_backend  # noqa: F401

StartEndpoint = Callable[..., Endpoint]


@pytest.fixture
def told() -> Telemetry:
    return Telemetry()


async def look(place: str) -> str:
    """Look."""
    await anyio.sleep(0)
    return f"rain in {place}"


def walk(place: str) -> str:
    """Walk."""
    return f"walked to {place}"


def team(told: Telemetry, **options: Any) -> BaseAgent:
    """Two delegates at once, each of which asks two more at once, while tools run in tasks and threads."""

    def agent(name: str, *calls: Any, **more: Any) -> BaseAgent:
        script: Any = lambda r: answers.calls(*calls) if r.body["messages"][-1]["role"] == "user" else "done"  # noqa: E731
        return BaseAgent(name, name, f"model {name}", ScriptedModel(script if calls else lambda r: "deep"), **more)

    at = {"place": "x"}
    low, lower = agent("Low"), agent("Lower", answers.call("walk", at)).add_tool(walk)
    asks = answers.call("low", {"query": "?"}), answers.call("lower", {"query": "?"}), answers.call("look", at)
    mids = [agent(name, *asks).register_delegate(low, "low").register_delegate(lower, "lower") for name in ("M1", "M2")]
    boss = agent(
        "Boss",
        *(answers.call(name, {"query": "?"}) for name in ("m1", "m2", "m1")),
        answers.call("walk", at),
        observers=told.observers,
        **options,
    )
    for mid, name in zip(mids, ("m1", "m2"), strict=True):
        boss.register_delegate(mid.add_tool(look), name)
    return boss.add_tool(walk)


# ---- the tree


async def by_run(agent: BaseAgent) -> None:
    assert (await agent.run("go")).success


async def by_stream(agent: BaseAgent) -> None:
    async with agent.stream("go") as stream:
        async for _ in stream:
            pass


async def by_many(agent: BaseAgent) -> None:
    assert all(result.success for result in await run_many(agent, ["one", "two", "three"]))


async def by_facade_in_a_thread(agent: BaseAgent) -> None:
    assert (await anyio.to_thread.run_sync(sync.run, agent, "go")).success


async def by_a_call(agent: BaseAgent) -> None:
    assert (await agent.execute_tool("m1", query="?")).outcome == "ok"


@pytest.mark.parametrize("way", [by_run, by_stream, by_many, by_facade_in_a_thread, by_a_call])
async def test_spans_are_the_tree_of_the_run(way: Callable[[BaseAgent], Awaitable[None]], told: Telemetry) -> None:
    await way(team(told))
    tree = tree_of_spans(told.spans)
    assert tree == tree_of_events(told.events)
    assert size_of(tree) == len(told.spans) > 10
    assert {span.kind for span in told.spans if span.name.startswith("chat")} == {SpanKind.CLIENT}
    assert {span.kind for span in told.spans if not span.name.startswith("chat")} == {SpanKind.INTERNAL}
    assert trace.get_current_span() is trace.INVALID_SPAN


@pytest.mark.parametrize("streamed", [False, True])
def test_they_are_through_the_facade(streamed: bool, shared_portal: object, told: Telemetry) -> None:
    with told.tracer.start_as_current_span("outside") as outside:
        if streamed:
            with sync.stream(team(told), "go") as stream:
                assert list(stream)
        else:
            assert sync.run(team(told), "go").success
        assert trace.get_current_span() is outside
    context = outside.get_span_context()
    assert tree_of_spans(told.spans, context.span_id) == tree_of_events(told.events)
    assert {span.context.trace_id for span in told.spans if span.context} == {context.trace_id}


@pytest.mark.parametrize("backend", ["asyncio", "trio"])
@settings(max_examples=40, phases=[Phase.explicit, Phase.generate], suppress_health_check=[HealthCheck.too_slow])
@given(trees)
def test_they_are_of_random_trees_however_these_are_cut(backend: str, tree: Tree) -> None:
    told = Telemetry()
    Grown(tree, told.observers).run(backend)
    assert tree_of_spans(told.spans) == tree_of_events(told.events)
    assert size_of(tree_of_spans(told.spans)) == len(told.spans)
    assert repr(told.instrumentation) == "<Instrumentation: 0 runs go on>"


@pytest.mark.parametrize("kind", LOOP_KINDS)
def test_they_are_of_random_programs_that_begin_runs_in_every_way(kind: str, told: Telemetry) -> None:
    loop, *is_virtual = kind.split()
    if loop not in LOOPS:
        pytest.skip(f"{loop} is not here")
    with nullcontext() if is_virtual else sync.portal(**LOOPS[loop]) as portal:
        stage = Stage(loop, portal, told.observers)
        for seed in range(80):
            stage.play(make(kind, seed))
            if seed >= 7 and len(told.spans) > 30:  # how many there are by then depends on when they are cut
                break
        stage.close()
    assert_parents(told.spans, told.events)
    assert len(told.spans) == size_of(tree_of_spans(told.spans)) == size_of(tree_of_events(told.events)) > 30


async def test_a_run_that_is_cut_ends_its_spans(told: Telemetry) -> None:
    agent = BaseAgent("A", "a", "m", ScriptedModel(lambda r: answers.hang()), observers=told.observers)
    with anyio.move_on_after(0.05):
        await agent.run("go")
    assert (await agent.run("go", timeout=0.05)).stop_reason == "deadline"
    async with agent.stream("go"):
        pass
    facts = [(span.name, (span.attributes or {})["error.type"], span.status.status_code) for span in told.spans]
    assert set(facts[:2]) == {
        ("chat m", "cancelled", StatusCode.ERROR),
        ("invoke_agent A", "cancelled", StatusCode.ERROR),
    }
    assert set(facts[2:4]) == {("chat m", "timeout", StatusCode.ERROR), ("invoke_agent A", "timeout", StatusCode.ERROR)}
    assert facts[-1] == ("invoke_agent A", "cancelled", StatusCode.ERROR)
    reasons = [(span.attributes or {}).get("fractal.stop_reason") for span in told.spans if "agent" in span.name]
    assert reasons == ["cancelled", "deadline", "cancelled"]


# ---- what is current where


async def test_spans_of_a_tool_are_below_its_own(told: Telemetry) -> None:
    async def in_a_task() -> str:
        """In a task."""
        with told.tracer.start_as_current_span("of in_a_task"):
            await anyio.sleep(0)
            return await anyio.to_thread.run_sync(in_a_thread)

    def in_a_thread() -> str:
        """In a thread."""
        with told.tracer.start_as_current_span("of in_a_thread"):
            return "done"

    def in_another_loop() -> str:
        """In another loop."""

        async def inside() -> str:
            with told.tracer.start_as_current_span("of in_another_loop"):
                return str((await below.run("?")).content)

        return anyio.run(inside)

    def in_a_thread_of_its_own() -> str:
        """In a thread of its own."""
        thread = threading.Thread(target=copy_context().run, args=(in_another_loop,))
        thread.start()
        thread.join()
        return "done"

    def by_facade() -> str:
        """By the facade."""
        return str(sync.run(below, "?").content)

    below = BaseAgent("Below", "b", "m", ScriptedModel(lambda r: "deep"))
    tools = [in_a_task, in_a_thread, in_another_loop, in_a_thread_of_its_own, by_facade]
    script = [answers.calls(*(answers.call(each.__name__, {}) for each in tools)), "done"]
    agent = BaseAgent("A", "a", "m", ScriptedModel(script), observers=told.observers)
    for each in tools:
        agent.add_tool(each)
    assert all(call.outcome == "ok" for call in (await agent.run("go")).tool_results)
    by_id = {span.context.span_id: span.name for span in told.spans if span.context}
    above = {(span.name, by_id.get(parent_of(span) or 0)) for span in told.spans if not span.name.startswith("chat")}
    assert above == {
        ("invoke_agent A", None),
        *((f"execute_tool {each.__name__}", "invoke_agent A") for each in tools),
        ("of in_a_task", "execute_tool in_a_task"),
        ("of in_a_thread", "of in_a_task"),
        ("of in_a_thread", "execute_tool in_a_thread"),
        ("of in_another_loop", "execute_tool in_another_loop"),
        ("of in_another_loop", "execute_tool in_a_thread_of_its_own"),
        ("invoke_agent Below", "of in_another_loop"),
        ("invoke_agent Below", "execute_tool by_facade"),
    }


async def test_a_model_and_a_hook_see_the_spans_they_are_called_in(told: Telemetry) -> None:
    seen: dict[str, int] = {}

    def model(request: Any) -> Any:
        seen["model"] = trace.get_current_span().get_span_context().span_id
        return "hi"

    def system() -> str:
        seen["system"] = trace.get_current_span().get_span_context().span_id
        return "Be brief."

    agent = BaseAgent("A", system, "m", ScriptedModel(model), observers=told.observers)
    assert (await agent.run("go")).success
    by_id = {span.context.span_id: span.name for span in told.spans if span.context}
    assert {who: by_id[span_id] for who, span_id in seen.items()} == {"model": "chat m", "system": "invoke_agent A"}


async def test_guards_and_hooks_around_have_the_spans_of_what_they_are_around(told: Telemetry) -> None:
    seen: dict[str, set[int]] = {}

    def note(who: str) -> None:
        seen.setdefault(who, set()).add(trace.get_current_span().get_span_context().span_id)

    async def around_tool(ctx: Any, call: Any, next: Any) -> Any:
        note("around the tool")
        return await next(call)

    async def around_model(ctx: Any, request: Any, next: Any) -> Any:
        note("around the model")
        return await next(request)

    async def guard(ctx: Any) -> None:
        note("guard")
        await anyio.sleep(0)

    script = [answers.call("look", {"place": "x"}), "done"]
    hooks: dict[str, Any] = {"around_tool": around_tool, "around_model": around_model, "guard": guard}
    agent = BaseAgent("A", "a", "m", ScriptedModel(script), observers=told.observers, **hooks)
    await by_run(agent.add_tool(look))
    by_id = {span.context.span_id: span.name for span in told.spans if span.context}
    assert {who: {by_id[span_id] for span_id in ids} for who, ids in seen.items()} == {
        "around the tool": {"execute_tool look"},
        "around the model": {"invoke_agent A"},
        "guard": {"invoke_agent A"},
    }
    assert tree_of_spans(told.spans) == tree_of_events(told.events)


async def test_a_run_that_a_guard_stops_ends_its_spans(told: Telemetry) -> None:
    async def guard(ctx: Any) -> None:
        await anyio.sleep(0.01)
        raise LookupError("no")

    agent = BaseAgent("A", "a", "m", ScriptedModel([answers.hang()]), observers=told.observers, guard=guard)
    assert not (await agent.run("go")).success
    assert tree_of_spans(told.spans) == tree_of_events(told.events)
    assert {span.name for span in told.spans if "error.type" in (span.attributes or {})} == {"chat m", "invoke_agent A"}


async def test_a_run_is_below_the_request_that_it_serves(told: Telemetry) -> None:
    inbound = extract({"traceparent": f"00-{'ab' * 16}-{'cd' * 8}-01"})
    token = contexts.attach(inbound)
    try:
        await by_run(BaseAgent("A", "a", "m", ScriptedModel(["hi"]), observers=told.observers))
    finally:
        contexts.detach(token)
    root = told.named("invoke_agent A")
    assert root.context is not None
    assert root.parent is not None
    assert (root.context.trace_id, root.parent.span_id) == (int("ab" * 16, 16), int("cd" * 8, 16))


async def test_where_no_context_came_along_the_parent_is_that_of_the_run(told: Telemetry) -> None:
    async def forgetful() -> str:
        """Forget."""
        contexts.attach(contexts.Context())
        return str((await below.run("?")).content)

    below = BaseAgent("Below", "b", "m", ScriptedModel(["deep"]))
    agent = BaseAgent("A", "a", "m", ScriptedModel([answers.call("forgetful", {}), "done"]), observers=told.observers)
    await by_run(agent.add_tool(forgetful))
    call = told.named("execute_tool forgetful")
    assert call.context is not None
    assert parent_of(told.named("invoke_agent Below")) == call.context.span_id


async def test_a_stream_that_is_dropped_in_a_foreign_generator_leaves_no_context_behind(
    told: Telemetry, caplog: pytest.LogCaptureFixture
) -> None:
    async def pieces(agent: BaseAgent) -> AsyncGenerator[object]:
        async with agent.stream("go") as stream:
            async for event in stream:
                yield event

    async def close(dropped: AsyncGenerator[object]) -> None:
        await dropped.aclose()

    with caplog.at_level(logging.DEBUG), told.tracer.start_as_current_span("reader") as reader:
        for _ in range(3):
            for wanted in (1, 3, 6):
                generator = pieces(team(told))
                for _ in range(wanted):
                    await anext(generator)
                    assert trace.get_current_span() is reader
                async with anyio.create_task_group() as group:
                    group.start_soon(close, generator)  # in another task, as frameworks do
                assert trace.get_current_span() is reader
        gc.collect()
    assert not [record for record in caplog.records if "opentelemetry" in record.name]
    context = reader.get_span_context()
    assert tree_of_spans(told.spans, context.span_id) == tree_of_events(told.events)


async def test_nor_does_one_that_nobody_closes(told: Telemetry, caplog: pytest.LogCaptureFixture) -> None:
    async def pieces(agent: BaseAgent) -> AsyncGenerator[object]:
        async with agent.stream("go") as stream:
            async for event in stream:
                yield event

    with caplog.at_level(logging.DEBUG), told.tracer.start_as_current_span("reader") as reader:
        generator: Any = pieces(team(told))
        with anyio.fail_after(10), warnings.catch_warnings():
            warnings.simplefilter("ignore", ResourceWarning)  # trio's, about the generator
            before = len(running_tasks())
            await anext(generator)
            del generator
            while not told.spans or len(running_tasks()) > before:
                gc.collect()
                await anyio.sleep(0)
        assert trace.get_current_span() is reader
    assert not [record for record in caplog.records if "opentelemetry" in record.name]


async def test_traceparent_is_sent_where_it_is_wanted(endpoint: StartEndpoint) -> None:
    one = endpoint([answers.failure(503), "hi", "hi"])
    model = OpenAIModel(base_url=one.url, api_key="sk-test")
    told, silent = Telemetry(send_traceparent=True), Telemetry()
    for each in (told, silent):
        agent = BaseAgent("A", "a", "m", model, observers=each.observers)
        async with agent:
            await by_run(agent)
    context = told.named("chat m").context
    assert context is not None
    sent = [request.headers.get("traceparent") for request in one.requests]
    wanted = f"00-{context.trace_id:032x}-{context.span_id:016x}"
    assert [header and header[: len(wanted)] for header in sent] == [wanted, wanted, None]


# ---- what a span says


@pytest.mark.usefixtures("brief_pauses")
async def test_retries_are_in_one_span(endpoint: StartEndpoint) -> None:
    one = endpoint([answers.failure(503), answers.failure(503), "hi", answers.failure(400)])
    told = Telemetry()
    agent = BaseAgent(
        "A", "a", "m", OpenAIModel(base_url=one.url, api_key="sk-test"), observers=told.observers, max_retries=5
    )
    async with agent:
        await by_run(agent)
        assert not (await agent.run("go")).success
    well, _, badly, failed = told.spans
    assert (well.attributes or {})["fractal.attempts"] == 3
    assert "error.type" not in (well.attributes or {})
    assert (badly.attributes or {})["error.type"] == (failed.attributes or {})["error.type"] == "StatusError"
    assert (badly.attributes or {})["fractal.attempts"] == 1


SET = {"top_p": 0.5, "seed": 7, "stop": "END", "n": 1, "logprobs": True, "metadata": {"user": "x"}}


@pytest.mark.parametrize("kind", ["our own", "their client"])
async def test_a_request_says_whom_it_asks_and_for_what(kind: str, endpoint: StartEndpoint) -> None:
    openai = pytest.importorskip("openai")
    one, told, kit = endpoint(["hi", "hi"]), Telemetry(), TracingKit()
    url = one.url.replace("http://", "http://user:word@") if kind == "our own" else one.url
    client = OpenAIModel(base_url=url) if kind == "our own" else openai.AsyncOpenAI(base_url=url, api_key="sk-test")
    more: dict[str, Any] = {"temperature": 0.2, "max_tokens": 50, "reasoning_effort": "low", "extra_body": SET}
    async with BaseAgent("A", "a", "m", client, observers=[*told.observers, kit], **more) as agent:
        await by_run(agent)
    wanted = {
        "gen_ai.request.temperature": 0.2,
        "gen_ai.request.max_tokens": 50,
        "gen_ai.request.top_p": 0.5,
        "gen_ai.request.seed": 7,
        "gen_ai.request.stop_sequences": ("END",),
        "gen_ai.request.reasoning.level": "low",
        "gen_ai.request.model": "m",
        "server.address": "127.0.0.1",
        "server.port": int(one.url.split(":")[2].split("/")[0]),
    }
    facts = dict(told.named("chat m").attributes or {})
    assert {name: facts[name] for name in facts if name.startswith(("gen_ai.request.", "server."))} == wanted
    [(about, _)] = told.metrics()["gen_ai.client.inference.duration"]
    assert (about["server.address"], about["server.port"]) == ("127.0.0.1", wanted["server.port"])
    [request] = [event for event in kit.get_trace() if event.event_type == "model_request"]
    assert request.metadata["parameters"] == {"temperature": 0.2, "max_tokens": 50, "reasoning_effort": "low"} | SET
    assert request.metadata["server"] == ["127.0.0.1", wanted["server.port"]]
    assert "word" not in request.to_json()
    [[line]] = [json.loads(line)["resourceSpans"][0]["scopeSpans"] for line in otlp_lines(kit.get_trace())]
    [chat] = [span for span in line["spans"] if span["name"] == "chat m"]
    assert {each["key"] for each in chat["attributes"]} >= wanted.keys()


@pytest.mark.parametrize("url", ["", "what?", "ftp://host", "http://", "http://[::1", "http://h:99999"])
def test_a_url_that_names_no_server_says_none(url: str) -> None:
    assert server_of(url) is None


def test_the_server_of_a_url_is_its_host_and_port() -> None:
    assert server_of("https://user:key@api.example.com/v1?key=x") == ("api.example.com", 443)
    assert server_of(" http://[::1]:8000/v1") == ("::1", 8000)


@pytest.mark.parametrize("odd", [5, ("a", "b"), ["h"], RuntimeError("no")], ids=repr)
async def test_what_a_model_of_ones_own_calls_server_may_be_anything(odd: Any, told: Telemetry) -> None:
    class Mine(ScriptedModel):
        @property
        def server(self) -> Any:
            if isinstance(odd, Exception):
                raise odd
            return odd

    await by_run(BaseAgent("A", "a", "m", Mine(["hi"]), observers=told.observers))
    assert "server.address" not in (told.named("chat m").attributes or {})


@pytest.mark.parametrize("jump", [-1e6, 1e6])
async def test_a_clock_that_is_set_meanwhile_changes_no_duration(jump: float, told: Telemetry) -> None:
    def tell(event: Any) -> None:
        is_later = event.kind in ("model_responded", "tool_finished", "run_finished")
        told.instrumentation(dataclasses.replace(event, at=event.at + jump) if is_later else event)

    assert told.instrumentation.wants_run()
    model = ScriptedModel([answers.call("look", {"place": "x"}), "done"])
    await by_run(BaseAgent("A", "a", "m", model, observers=[tell]).add_tool(look))
    assert len(told.spans) == 4
    assert all(span.end_time and span.start_time and 0 < span.end_time - span.start_time < 60e9 for span in told.spans)
    lasting = [points for name, points in told.metrics().items() if name.endswith("duration")]
    assert len(lasting) == 3
    assert all(0 < point.sum < 60 for points in lasting for _, point in points)


async def test_names_that_a_model_makes_up_are_cut_and_searched_for_secrets(told: Telemetry) -> None:
    key, long = "sk-live-0123456789abcdefghij", "x" * 10**6

    class Odd:
        async def respond(self, request: Any) -> Reply:
            if len(request.transcript) > 1:
                return Reply(text="done")
            calls = tuple(ToolCall(call_id, name, "{}") for call_id, name in (("1", key), (key, "look"), (long, long)))
            return Reply(tool_calls=calls, model=long, id=long, finish_reason=long, input_tokens=1)

    await by_run(BaseAgent("A", "a", "m", Odd(), observers=told.observers).add_tool(look))
    told_all = str([(span.name, dict(span.attributes or {})) for span in told.spans]) + str(told.metrics())
    assert "execute_tool [redacted]" in told_all
    assert key not in told_all
    assert len(told_all) < 50_000


async def test_a_call_says_how_it_ended(told: Telemetry) -> None:
    async def slow() -> None:
        """Slow."""
        await anyio.sleep_forever()

    async def bad() -> None:
        """Bad."""
        raise LookupError("the patient is called Bob")

    calls = [answers.call("slow", {}), answers.call("bad", {}), answers.call("look", {"place": "x"})]
    model = ScriptedModel([answers.calls(*calls, answers.call("made_up", {})), "done"])
    agent = BaseAgent("A", "a", "m", model, observers=told.observers, limits=Limits(tool_timeout=0.05))
    await by_run(agent.add_tool(bad).add_tool(look).add_tool(slow))
    facts = {span.name: span.attributes or {} for span in told.spans}
    said = {name: (each["fractal.outcome"], each.get("error.type")) for name, each in facts.items() if "tool" in name}
    assert said == {
        "execute_tool slow": ("timeout", "timeout"),
        "execute_tool bad": ("error", "LookupError"),
        "execute_tool look": ("ok", None),
        "execute_tool made_up": ("error", "_OTHER"),
    }
    points = told.metrics()["gen_ai.execute_tool.duration"]
    of_tools = {(about["gen_ai.tool.name"], about.get("error.type")) for about, _ in points}
    assert of_tools == {("slow", "timeout"), ("bad", "LookupError"), ("look", None), ("_OTHER", "_OTHER")}


def test_what_has_not_been_told_to_end_ends_with_the_run(told: Telemetry) -> None:
    who: dict[str, Any] = {"run_id": "r", "parent_id": None, "agent_name": "A", "depth": 0, "at": 1.0}
    request = {"attempt": 1, "message_count": 1, "model": "m"}
    result = AgentResult(agent_name="A", success=False, stop_reason="cancelled", error="cut")

    def tell() -> None:
        for event in (
            ModelResponded(**who, message={}, finish_reason=None, input_tokens=0, output_tokens=0, elapsed=0.0),
            RunStarted(**who, message={"role": "user", "content": "go"}),
            ModelRequested(**who, iteration=1, **request),
            ModelRequested(**who, iteration=2, **request),
            ToolStarted(**who, tool_name="t", call_id="c", arguments={}),
            RunFinished(**who, result=result),
            ToolFinished(**who, tool_name="t", call_id="c", result=ToolResult(tool_name="t")),
        ):
            told.instrumentation(event)

    assert told.instrumentation.wants_run()
    copy_context().run(tell)
    assert [span.name for span in told.spans] == ["chat m", "execute_tool t", "chat m", "invoke_agent A"]
    assert {(span.attributes or {})["error.type"] for span in told.spans} == {"cancelled"}


SECRET = "sk-abcdefghijklmnopqrstuv"


def talk(told: Telemetry) -> BaseAgent:
    async def ask_bob(question: str) -> dict[str, str]:
        """Ask Bob."""
        if question == "Bob?":
            raise LookupError(f"Bob does not know {question}")
        return {"of": "Bob"}

    script = [*(answers.call("ask_bob", {"question": each}) for each in ("Bob?", "Bob!")), f"Bob says {SECRET}"]
    return BaseAgent("A", "You know Bob.", "m", ScriptedModel(script), observers=told.observers).add_tool(ask_bob)


async def test_without_include_content_nothing_that_was_said_is_told(told: Telemetry) -> None:
    await by_run_with(talk(told), "Who is Bob?")
    assert not [span.to_json() for span in told.spans if "Bob" in span.to_json()]
    assert {span.status.description for span in told.spans} == {None}


async def by_run_with(agent: BaseAgent, question: str) -> None:
    history = [{"role": "user", "content": "Hello"}, {"role": "assistant", "content": "Hello, I am Bob"}]
    assert (await agent.run(question, messages=history)).success


async def test_with_include_content_it_is_but_for_secrets() -> None:
    told = Telemetry(include_content=True)
    await by_run_with(talk(told), f"Who is {SECRET}?")
    assert not [span.to_json() for span in told.spans if SECRET in span.to_json()]
    first, tool, second, other, _, run = (span.attributes or {} for span in told.spans)
    assert first["gen_ai.system_instructions"] == '[{"type":"text","content":"You know Bob."}]'
    assert run["gen_ai.input.messages"] == (
        '[{"role":"user","parts":[{"type":"text","content":"Who is [redacted]?"}]}]'
    )
    messages = decoded(second["gen_ai.input.messages"])
    assert [message["role"] for message in messages] == ["user", "assistant", "user", "assistant", "tool"]
    [call] = messages[3]["parts"]
    assert (call["type"], call["name"], call["arguments"]) == ("tool_call", "ask_bob", {"question": "Bob?"})
    assert messages[4]["parts"][0]["type"] == "tool_call_response"
    assert decoded(tool["gen_ai.tool.call.arguments"]) == {"question": "Bob?"}
    assert decoded(other["gen_ai.tool.call.result"]) == {"of": "Bob"}
    assert decoded(run["gen_ai.output.messages"])[0]["parts"] == [{"type": "text", "content": "Bob says [redacted]"}]
    assert told.spans[1].status.description == "LookupError: Bob does not know Bob?"


def decoded(text: Any) -> Any:
    return json.loads(text)


class Thinker:
    """A model that says what it used."""

    async def respond(self, request: ModelRequest) -> Reply:
        return Reply(
            text="hi",
            model="m-2026",
            id="r1",
            finish_reason="stop",
            input_tokens=100,
            output_tokens=50,
            cached_input_tokens=30,
            cache_write_input_tokens=20,
            reasoning_tokens=10,
        )


async def test_what_a_reply_used_is_told_in_attributes_and_counters(told: Telemetry) -> None:
    prices = {"m-2026": Price(input=1, output=10)}
    agent = BaseAgent("A", "a", "m", Thinker(), observers=told.observers, prices=prices)
    await by_run(agent)
    chat, run = told.named("chat m").attributes or {}, told.named("invoke_agent A").attributes or {}
    assert {name: value for name, value in chat.items() if name != "fractal.run_id"} == {
        "gen_ai.operation.name": "chat",
        "gen_ai.provider.name": "openai",
        "gen_ai.agent.name": "A",
        "gen_ai.request.model": "m",
        "gen_ai.response.model": "m-2026",
        "gen_ai.response.id": "r1",
        "gen_ai.response.finish_reasons": ("stop",),
        "gen_ai.usage.input_tokens": 100,
        "gen_ai.usage.output_tokens": 50,
        "gen_ai.usage.cache_read.input_tokens": 30,
        "gen_ai.usage.cache_write.input_tokens": 20,
        "gen_ai.usage.reasoning.output_tokens": 10,
        "fractal.attempts": 1,
        "fractal.cost": pytest.approx(0.0006),
    }
    assert {name: value for name, value in run.items() if name != "fractal.run_id"} == {
        "gen_ai.operation.name": "invoke_agent",
        "gen_ai.agent.name": "A",
        "gen_ai.usage.input_tokens": 100,
        "gen_ai.usage.output_tokens": 50,
        "fractal.stop_reason": "finished",
    }
    points = told.metrics()
    counters = "input_tokens output_tokens cache_read.input_tokens cache_write.input_tokens reasoning.output_tokens"
    for name, count in zip(counters.split(), (100, 50, 30, 20, 10), strict=True):
        [(about, point)] = points.pop(f"gen_ai.client.inference.usage.{name}")
        assert (about["gen_ai.request.model"], about["gen_ai.token.modality"], point.value) == ("m", "unknown", count)
    assert set(points) == {
        "gen_ai.client.inference.duration",
        "gen_ai.invoke_agent.duration",
        "gen_ai.invoke_agent.inference_calls",
        "gen_ai.invoke_agent.tool_calls",
    }


async def test_older_names_are_those_that_most_backends_read() -> None:
    told = Telemetry(older_names=True, provider_name="mistral_ai")
    agent = BaseAgent("A", "a", "m", Thinker(), observers=told.observers)
    async with agent.stream("go") as stream:
        await stream.result()
    chat, run = told.named("chat m").attributes or {}, told.named("invoke_agent A").attributes or {}
    for facts in (chat, run):
        assert facts["gen_ai.usage.cache_creation.input_tokens"] == 20
        assert "gen_ai.usage.cache_write.input_tokens" not in facts
        assert facts["gen_ai.provider.name"] == "mistral_ai"
    assert chat["gen_ai.system"] == "mistral_ai"
    points = told.metrics()
    usage = {about["gen_ai.token.type"]: point.sum for about, point in points["gen_ai.client.token.usage"]}
    assert usage == {"input": 100, "output": 50}
    assert "gen_ai.client.operation.duration" in points
    assert not [name for name in points if "inference." in name]


async def test_the_time_to_the_first_piece_is_told_of_streams_alone(told: Telemetry) -> None:
    agent = BaseAgent("A", "a", "m", ScriptedModel(lambda r: "one two"), observers=told.observers)
    await by_run(agent)
    assert "gen_ai.client.inference.time_to_first_chunk" not in told.metrics()
    await by_stream(agent)
    whole, _, streamed, _ = (span.attributes or {} for span in told.spans)
    assert "gen_ai.response.time_to_first_chunk" not in whole
    assert "gen_ai.request.stream" not in whole
    [(_, point)] = told.metrics()["gen_ai.client.inference.time_to_first_chunk"]
    assert streamed["gen_ai.response.time_to_first_chunk"] == point.sum >= 0
    assert streamed["gen_ai.request.stream"] is True


async def test_calls_are_counted_for_the_agent_that_makes_them(told: Telemetry) -> None:
    await by_run(team(told))
    points = told.metrics()
    calls, requests = (
        {about["gen_ai.agent.name"]: (point.count, point.sum) for about, point in points[f"gen_ai.invoke_agent.{name}"]}
        for name in ("tool_calls", "inference_calls")
    )
    assert calls == {"Boss": (1, 4), "M1": (2, 6), "M2": (1, 3), "Low": (3, 0), "Lower": (3, 3)}
    assert requests == {"Boss": (1, 2), "M1": (2, 4), "M2": (1, 2), "Low": (3, 3), "Lower": (3, 6)}
    assert {tuple(point.explicit_bounds[:2]) for _, point in points["gen_ai.invoke_agent.duration"]} == {(0.1, 0.2)}


# ---- who listens


async def test_without_an_sdk_runs_are_not_observed() -> None:
    silent = Instrumentation(trace.NoOpTracerProvider(), metrics.NoOpMeterProvider())
    assert not silent.wants_run()
    assert not Instrumentation(trace.ProxyTracerProvider()).wants_run()
    assert not Instrumentation().wants_run()


async def test_two_do_not_mix_up_their_spans() -> None:
    one, other = Telemetry(), Telemetry()
    agent = team(one)
    agent.observers = [*one.observers, other.instrumentation]
    with one.tracer.start_as_current_span("outside") as outside:
        await by_run(agent)
    for told in (one, other):
        tree = tree_of_spans(told.spans, outside.get_span_context().span_id)
        assert tree == tree_of_events(one.events)


async def test_metrics_alone_do_and_spans_alone_do() -> None:
    told = Telemetry()
    with_metrics = Instrumentation(trace.NoOpTracerProvider(), told.meter_provider)
    with_spans = Instrumentation(told.tracer_provider, metrics.NoOpMeterProvider())
    await by_run(BaseAgent("A", "a", "m", ScriptedModel(["hi"]), observers=[with_metrics]))
    assert told.spans == ()
    assert "gen_ai.invoke_agent.duration" in told.metrics()
    await by_run(BaseAgent("A", "a", "m", ScriptedModel(["hi"]), observers=[with_spans]))
    assert [span.name for span in told.spans] == ["chat m", "invoke_agent A"]


async def test_spans_that_are_not_sampled_have_their_context_all_the_same() -> None:
    told = Telemetry(include_content=True)
    unsampled = Instrumentation(TracerProvider(sampler=ALWAYS_OFF, shutdown_on_exit=False), told.meter_provider)
    seen: list[bool] = []

    async def here() -> None:
        """Here."""
        seen.append(trace.get_current_span().get_span_context().is_valid)

    model = ScriptedModel([answers.call("here", {}), "done"])
    await by_run(BaseAgent("A", "a", "m", model, observers=[unsampled]).add_tool(here))
    assert seen == [True]
    assert "gen_ai.execute_tool.duration" in told.metrics()


def test_a_global_provider_is_taken_up_when_it_is_there_and_only_then() -> None:
    code = """
import anyio
from opentelemetry import trace
early = trace.get_tracer_provider()
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from fractal import BaseAgent
from fractal.testing import ScriptedModel
from fractal.testing._leftovers import running_tasks
from fractal.tracing import Instrumentation
agents = [
    BaseAgent("A", "a", client=ScriptedModel(lambda r: "hi"), observers=[Instrumentation(given)])
    for given in (None, early)
]
for agent in agents:
    anyio.run(agent.run, "go")
exporter, provider = InMemorySpanExporter(), TracerProvider()
provider.add_span_processor(SimpleSpanProcessor(exporter))
trace.set_tracer_provider(provider)
for agent in agents:
    anyio.run(agent.run, "go")
print(len(exporter.get_finished_spans()))
"""
    told = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert told.stdout == "4\n"


def test_without_the_package_it_says_what_to_install() -> None:
    code = """
import sys
sys.modules["opentelemetry"] = None
import fractal.tracing
try:
    fractal.tracing.Instrumentation
except ImportError as error:
    print(error)
"""
    told = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert told.stdout == "Instrumentation needs OpenTelemetry: pip install opentelemetry-api\n"


def test_tracing_loads_no_opentelemetry() -> None:
    code = "import sys; from fractal.tracing import TracingKit; print('opentelemetry' in sys.modules)"
    told = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert told.stdout == "False\n"


@pytest.mark.parametrize(
    "options",
    [{"tracer_provider": "x"}, {"meter_provider": TracerProvider(shutdown_on_exit=False)}, {"provider_name": ""}],
    ids=["tracer", "meter", "name"],
)
def test_what_is_no_provider_is_refused(options: dict[str, Any]) -> None:
    with pytest.raises(InvalidArguments, match=next(iter(options))):
        Instrumentation(**options)
