"""`TracingKit` and `TraceEvent`: what agents did, in memory and in files, at every way to run them."""

from __future__ import annotations

import dataclasses
import json
import logging
import math
import os
import signal
import subprocess
import sys
import threading
from collections import Counter
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import anyio
import pytest

import fractal
from fractal import (
    AgentResult,
    Allow,
    AnswerRejected,
    BaseAgent,
    Defer,
    InvalidArguments,
    Limits,
    OpenAIModel,
    TraceEvent,
    TracingKit,
    run_many,
    sync,
    tool,
)
from fractal._engine.observers import _without_secrets  # pyright: ignore[reportPrivateUsage]
from fractal._views.page_spans import RunSpans
from fractal.durable import MemoryJournal
from fractal.reply import Reply, ToolCall
from fractal.testing import Endpoint, ScriptedModel, answers
from fractal.tracing import TraceReader
from fractal.tracing.otlp import otlp_lines
from tests.odd import VALUES
from tests.without_uvloop import anyio_backend  # noqa: F401

StartEndpoint = Callable[..., Endpoint]

FIELDS = [
    *("timestamp", "event_type", "agent_name", "run_id", "parent_agent", "delegation_depth", "tool_name"),
    *("tool_call_id", "parallel_group_id", "arguments", "result", "error", "elapsed_time", "metadata"),
]


async def search(query: str) -> str:
    """Search."""
    return f"found {query}"


async def fail(query: str) -> str:
    """Fail."""
    raise ValueError(f"nothing about {query}")


def of(trace: list[TraceEvent], *kinds: str) -> list[TraceEvent]:
    return [event for event in trace if event.event_type in kinds]


def read(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_bytes().split(b"\n") if line]


def files(folder: Path) -> list[Path]:
    return [path for path in folder.rglob("*") if path.is_file()]


def kit_of(agent: BaseAgent) -> TracingKit:
    assert agent.tracing is not None
    return agent.tracing


def searcher(name: str = "Searcher", **options: Any) -> BaseAgent:
    """An agent that makes two calls side by side, one of which fails, and then answers."""

    def script(request: Any) -> Any:
        if request.transcript.messages[-1]["role"] == "user":
            return answers.calls(answers.call("search", {"query": "a"}), answers.call("fail", {"query": "b"}))
        return "done"

    return BaseAgent(name, "You search.", "m", ScriptedModel(script), **options).add_tool(search).add_tool(fail)


def team(**options: Any) -> BaseAgent:
    """Three levels: Chief asks two Leads at once, each asks a Searcher."""

    def leading(request: Any) -> Any:
        asks = request.transcript.messages[-1]["role"] == "user"
        return answers.call("delegate_to_Searcher", {"query": "?"}) if asks else "led"

    def chief(request: Any) -> Any:
        if request.transcript.messages[-1]["role"] == "user":
            both = ("delegate_to_Left", "delegate_to_Right")
            return answers.calls(*(answers.call(name, {"query": name}) for name in both))
        return "decided"

    leads = [
        BaseAgent(name, "You lead.", "m", ScriptedModel(leading)).register_delegate(
            searcher(), tool_name="delegate_to_Searcher"
        )
        for name in ("Left", "Right")
    ]
    agent = BaseAgent("Chief", "You decide.", "m", ScriptedModel(chief), **options)
    for lead in leads:
        agent.register_delegate(lead, tool_name=f"delegate_to_{lead.name}")
    return agent


# ---- the names of the contract


def test_the_names_are_there() -> None:
    assert fractal.TracingKit is TracingKit
    assert fractal.TraceEvent is TraceEvent
    assert {"TracingKit", "TraceEvent"} <= set(fractal.__all__)
    assert [each.name for each in dataclasses.fields(TraceEvent)] == FIELDS


def test_an_agent_without_tracing_has_none_and_loads_nothing_of_it() -> None:
    code = (
        "import sys, anyio\nfrom fractal import BaseAgent\nfrom fractal.testing import ScriptedModel\n"
        "agent = BaseAgent('A', 'a', client=ScriptedModel(['hi']))\nanyio.run(agent.run, 'go')\n"
        "print(agent.tracing, any(name.startswith('fractal.tracing') for name in sys.modules))"
    )
    said = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert said.split() == ["None", "False"]


@pytest.mark.parametrize(
    ("options", "is_traced"),
    [
        ({}, False),
        ({"enable_tracing": False}, False),
        ({"enable_tracing": True}, True),
        ({"tracing_output_file": "trace.jsonl"}, True),
        ({"enable_tracing": False, "tracing_output_file": "trace.jsonl"}, False),
        ({"enable_tracing": True, "tracing_output_file": Path("trace.jsonl")}, True),
    ],
)
def test_tracing_is_on_if_it_is_enabled_or_has_a_file(options: Any, is_traced: bool) -> None:
    assert (BaseAgent("A", "a", **options).tracing is not None) is is_traced


@pytest.mark.parametrize(
    "make",
    [
        lambda: BaseAgent("A", "a", enable_tracing="yes"),  # type: ignore[arg-type]
        lambda: BaseAgent("A", "a", tracing_output_file=5),  # type: ignore[arg-type]
        lambda: TracingKit(max_events=0),
        lambda: TracingKit(max_text=True),
        lambda: TracingKit(redact="secret"),  # type: ignore[arg-type]
        lambda: TracingKit(secrets="secret"),
        lambda: TracingKit(secrets=[5]),  # type: ignore[list-item]
    ],
)
def test_settings_that_make_no_sense_are_refused(make: Callable[[], object]) -> None:
    with pytest.raises(InvalidArguments):
        make()


# ---- what is told


async def test_tracing_that_is_assigned_holds_from_the_next_run_on(tmp_path: Path) -> None:
    agent = searcher()
    await agent.run("one")
    agent.enable_tracing = True
    kit = agent.tracing
    assert kit is not None
    await agent.run("two")
    agent.temperature = 0.5  # what it keeps outlives other changes
    assert agent.tracing is kit
    agent.enable_tracing = False
    assert agent.tracing is None
    await agent.run("three")
    assert [event.arguments for event in of(kit.get_trace(), "agent_start")] == [{"user_input": "two"}]
    agent.enable_tracing, agent.tracing_output_file = None, tmp_path / "trace.jsonl"
    await agent.run("four")
    assert len(read(tmp_path / "trace.jsonl")) == 11


async def test_a_run_is_told_from_its_start_to_its_end() -> None:
    agent = searcher(enable_tracing=True)
    result = await agent.run("find it")
    trace = kit_of(agent).get_trace()
    assert [event.event_type for event in trace[:5]] == [
        *("agent_start", "model_request", "model_response", "tool_call", "tool_call")
    ]
    assert sorted(event.event_type for event in trace[5:8]) == ["error", "tool_result", "tool_result"]
    assert [event.event_type for event in trace[8:]] == ["model_request", "model_response", "agent_end"]
    assert {(event.agent_name, event.run_id, event.parent_agent, event.delegation_depth) for event in trace} == {
        ("Searcher", result.run_id, None, 0)
    }
    assert all(one.timestamp <= other.timestamp for one, other in pairwise(trace))
    assert trace[0].arguments == {"user_input": "find it"}
    assert (trace[-1].result, trace[-1].error) == ("done", None)
    assert trace[-1].elapsed_time == result.elapsed
    assert trace[-1].metadata["stop_reason"] == "finished"
    assert trace[-1].metadata["usage"]["requests"] == 2


async def test_calls_are_told_with_arguments_results_errors_and_times() -> None:
    agent = searcher(enable_tracing=True)
    result = await agent.run("find it")
    trace = kit_of(agent).get_trace()
    good, bad = sorted(of(trace, "tool_call"), key=lambda event: event.tool_name != "search")
    assert (good.tool_name, good.arguments) == ("search", {"query": "a"})
    assert (bad.tool_name, bad.arguments) == ("fail", {"query": "b"})
    ends = {event.tool_call_id: event for event in of(trace, "tool_result")}
    assert set(ends) == {call.call_id for call in result.tool_results}
    assert ends[good.tool_call_id].result == "found a"
    assert ends[good.tool_call_id].error is None
    assert ends[bad.tool_call_id].error == "ValueError: nothing about b"
    for call in result.tool_results:
        assert ends[call.call_id].elapsed_time == call.elapsed
    [error] = of(trace, "error")
    assert (error.tool_name, error.tool_call_id, error.error) == (
        "fail",
        bad.tool_call_id,
        ends[bad.tool_call_id].error,
    )


async def test_calls_of_one_reply_have_one_group_and_those_of_another_reply_another_one() -> None:
    script = [answers.calls(*[answers.call("search", {"query": str(n)}) for n in range(3)])] * 2
    agent = BaseAgent("A", "a", client=ScriptedModel([*script, "done"]), enable_tracing=True).add_tool(search)
    await agent.run("go")
    groups = [event.parallel_group_id for event in of(kit_of(agent).get_trace(), "tool_call")]
    assert None not in groups
    assert sorted(Counter(groups).values()) == [3, 3]
    results = [event.parallel_group_id for event in of(kit_of(agent).get_trace(), "tool_result")]
    assert sorted(map(str, results)) == sorted(map(str, groups))


async def deferred_and_resumed(kit: TracingKit, run_id: str) -> None:
    """A run of four turns; in the second it waits for approval, and another process goes on with it."""

    def script(request: Any) -> Any:
        said = sum(message["role"] == "assistant" for message in request.transcript.messages)
        names = ["search", "ask", "search"]
        calls = (answers.call(name, {"query": "?"}) for name in names[said : said + 1] * 2)
        return answers.calls(*calls) if said < 3 else "done"

    @tool(requires_approval=True)
    async def ask(query: str) -> str:
        return query

    def agent(**options: Any) -> BaseAgent:
        made = BaseAgent("A", "a", "m", ScriptedModel(script), observers=[kit], **options)
        return made.add_tool(search).add_tool(ask)

    journal = MemoryJournal()
    result = await agent(approve=lambda call: Defer()).run("go", journal=journal, run_id=run_id)
    answered = {call.call_id: Allow() for call in result.pending}
    assert (await agent().resume(journal, run_id, answered)).success


async def test_groups_differ_from_run_to_run_and_when_another_process_goes_on_with_one() -> None:
    kit = TracingKit()
    for run_id in ("the same customer's order 1", "the same customer's order 2"):
        await deferred_and_resumed(kit, run_id)
    calls = [event for event in of(kit.get_trace(), "tool_call") if event.tool_name == "search"]
    assert len(calls) == 8
    assert set(Counter(event.parallel_group_id for event in calls).values()) == {2}


async def test_of_a_run_that_goes_on_is_told_what_its_model_sees_in_either_part() -> None:
    kit = TracingKit()
    await deferred_and_resumed(kit, "one")
    trace = kit.get_trace()
    requests = of(trace, "model_request")
    assert [len(event.metadata.get("added", ())) for event in requests] == [0, 0, 6, 0]

    [text] = otlp_lines(trace)
    spans = json.loads(text)["resourceSpans"][0]["scopeSpans"][0]["spans"]
    assert len({span["spanId"] for span in spans}) == len(spans) == 14
    said = [{each["key"]: each["value"] for each in span["attributes"]} for span in spans if "chat" in span["name"]]
    brought = [json.loads(each["gen_ai.input.messages"]["stringValue"]) for each in said]
    assert ["".join(message["role"][0] for message in messages) for messages in brought] == ["u", "tt", "uattatt", "tt"]

    page = RunSpans()
    for event in trace:
        page.take(event)
    page.settle()
    talks = [len(span.detail["talk"]) for span in page.spans if span.kind == "run"]
    assert [span.detail["sees"]["upto"] for span in page.spans if span.kind == "model"] == [1, 4, 7, 10]
    assert talks == [7, 11]


async def test_delegates_at_any_depth_and_side_by_side_are_in_the_trace_of_the_caller() -> None:
    agent = team(enable_tracing=True)
    result = await agent.run("go")
    trace = kit_of(agent).get_trace()
    assert {event.run_id for event in trace} == {result.run_id}
    starts = [(event.agent_name, event.parent_agent, event.delegation_depth) for event in of(trace, "agent_start")]
    assert sorted(starts, key=lambda start: (start[2], start)) == [
        ("Chief", None, 0),
        ("Left", "Chief", 1),
        ("Right", "Chief", 1),
        ("Searcher", "Left", 2),
        ("Searcher", "Right", 2),
    ]
    for event in trace:  # all that happens in a run says the same of where it is
        parents = {each.parent_agent for each in trace if each.metadata["run"] == event.metadata["run"]}
        assert parents == {event.parent_agent}
    assert Counter(event.event_type for event in trace)["agent_end"] == 5


async def test_delegations_are_told_by_the_agent_that_delegates() -> None:
    agent = team(enable_tracing=True)
    await agent.run("go")
    trace = kit_of(agent).get_trace()
    begun, ended = of(trace, "agent_delegate"), of(trace, "delegation_end")
    assert sorted((event.agent_name, event.arguments["to_agent"]) for event in begun if event.arguments) == [
        *(("Chief", "Left"), ("Chief", "Right"), ("Left", "Searcher"), ("Right", "Searcher"))
    ]
    left, right = (event for event in begun if event.agent_name == "Chief")
    assert left.parallel_group_id == right.parallel_group_id is not None
    assert {left.tool_name, right.tool_name} == {"delegate_to_Left", "delegate_to_Right"}
    assert {event.tool_call_id for event in begun} == {event.tool_call_id for event in ended}
    assert {event.result for event in ended if event.agent_name == "Chief"} == {"led"}
    assert all(event.elapsed_time is not None and event.elapsed_time >= 0 for event in ended)
    called_by = {event.metadata["call"] for event in of(trace, "agent_start") if event.delegation_depth == 1}
    assert called_by == {left.tool_call_id, right.tool_call_id}


async def test_an_agent_that_is_called_by_hand_is_in_the_trace_too() -> None:
    other = BaseAgent("Other", "b", client=ScriptedModel(["deep"]))
    agent = BaseAgent("A", "a", client=ScriptedModel([answers.call("ask", {}), "done"]), enable_tracing=True)

    async def ask() -> Any:
        """Ask."""
        return (await agent.call_agent(other, "?")).content

    result = await agent.add_tool(ask).run("go")
    trace = kit_of(agent).get_trace()
    [child] = [event for event in of(trace, "agent_start") if event.delegation_depth]
    assert (child.agent_name, child.parent_agent, child.run_id) == ("Other", "A", result.run_id)
    assert [event.result for event in of(trace, "delegation_end")] == ["deep"]


async def test_requests_are_told_with_what_the_model_sees_and_what_it_takes() -> None:
    answer = answers.text("hi", usage={"prompt_tokens": 7, "completion_tokens": 3})
    agent = BaseAgent("A", "Be brief.", "m", ScriptedModel([answer]), enable_tracing=True).add_tool(search)
    history = [{"role": "user", "content": "one"}, {"role": "assistant", "content": "two"}]
    await agent.run("three", messages=history)
    start, request, reply, _ = kit_of(agent).get_trace()
    assert start.metadata["history"] == history
    assert start.metadata["limits"] == {"max_iterations": 10, "max_depth": 8}
    assert request.metadata["opening"] == [{"role": "system", "content": "Be brief."}]
    assert request.metadata["tools"] == ["search"]
    assert (request.metadata["model"], request.metadata["messages"]) == ("m", 3)
    assert reply.result == {"role": "assistant", "content": "hi"}
    assert (reply.metadata["input_tokens"], reply.metadata["output_tokens"]) == (7, 3)
    assert reply.elapsed_time is not None


async def test_what_is_said_to_the_model_besides_is_told() -> None:
    agent = BaseAgent("A", "a", client=ScriptedModel(["no", "yes"]), enable_tracing=True, output_type=str)

    @agent.output_validator
    def check(answer: str) -> None:
        if answer == "no":
            raise AnswerRejected("say yes")

    await agent.run("go")
    [_, second] = of(kit_of(agent).get_trace(), "model_request")
    assert "say yes" in str(second.metadata["added"])


async def test_a_run_that_fails_says_why() -> None:
    agent = BaseAgent("A", "a", client=ScriptedModel(["x"] * 3), enable_tracing=True, limits=Limits(max_requests=0))
    result = await agent.run("go")
    limit, error, end = kit_of(agent).get_trace()[-3:]
    assert (limit.event_type, error.event_type, end.event_type) == ("limit", "error", "agent_end")
    assert error.error == end.error == result.error
    assert (end.metadata["success"], end.metadata["stop_reason"]) == (False, "budget")


async def test_a_run_that_is_cancelled_has_an_end_and_so_have_its_calls() -> None:
    async def wait() -> None:
        """Wait."""
        await anyio.sleep_forever()

    agent = BaseAgent("A", "a", client=ScriptedModel([answers.call("wait", {})]), enable_tracing=True).add_tool(wait)
    with anyio.move_on_after(0.1):
        await agent.run("go")
    trace = kit_of(agent).get_trace()
    call, end = trace[-2:]
    assert (call.event_type, call.metadata["outcome"]) == ("tool_result", "cancelled")
    assert (end.event_type, end.metadata["stop_reason"]) == ("agent_end", "cancelled")
    assert not of(trace, "error")


# ---- every way to run


async def test_a_stream_is_told_as_a_run_is(tmp_path: Path) -> None:
    agent = searcher(tracing_output_file=tmp_path / "trace.jsonl")
    async with agent.stream("go") as stream:
        async for _ in stream:
            pass
    streamed = Counter(event["event_type"] for event in read(tmp_path / "trace.jsonl"))
    other = searcher(enable_tracing=True)
    await other.run("go")
    assert streamed == Counter(event.event_type for event in kit_of(other).get_trace())


async def test_a_stream_that_is_left_has_an_end(tmp_path: Path) -> None:
    agent = searcher(tracing_output_file=tmp_path / "trace.jsonl")
    async with agent.stream("go") as stream:
        async for _ in stream:
            break
    assert read(tmp_path / "trace.jsonl")[-1]["event_type"] == "agent_end"


async def test_a_tool_that_is_called_alone_is_told(tmp_path: Path) -> None:
    agent = searcher(tracing_output_file=tmp_path / "trace.jsonl")
    await agent.execute_tool("search", query="x")
    start, call, result, end = read(tmp_path / "trace.jsonl")
    assert (start["event_type"], end["event_type"]) == ("agent_start", "agent_end")
    assert (call["event_type"], call["arguments"]) == ("tool_call", {"query": "x"})
    assert (result["event_type"], result["result"]) == ("tool_result", "found x")
    assert call["run_id"] == result["run_id"]
    assert call["parallel_group_id"] is None
    assert not kit_of(agent)._runs


def test_the_blocking_facade_traces_too(tmp_path: Path) -> None:
    agent = searcher(tracing_output_file=tmp_path / "{run_id}.jsonl")
    result = sync.run(agent, "go")
    assert read(tmp_path / f"{result.run_id}.jsonl")[-1]["event_type"] == "agent_end"
    with sync.stream(agent, "go") as stream:
        for _ in stream:
            break
    assert len(list(tmp_path.iterdir())) == 2
    sync.execute_tool(agent, "search", query="x")
    assert len(list(tmp_path.iterdir())) == 3
    results = sync.run_many(agent, ["a", "b"])
    assert all(read(tmp_path / f"{each.run_id}.jsonl")[-1]["event_type"] == "agent_end" for each in results)


def test_a_blocking_agent_has_a_trace_too() -> None:
    agent = sync.BaseAgent("A", "a", client=ScriptedModel(["hi"]), enable_tracing=True)
    agent.run("go")
    assert agent.tracing is not None
    assert agent.tracing.get_trace()[-1].event_type == "agent_end"


async def test_two_hundred_runs_at_once_make_two_hundred_whole_traces(tmp_path: Path) -> None:
    agent = team(tracing_output_file=tmp_path / "trace_{run_id}.jsonl")
    results: list[AgentResult] = list(await run_many(agent, [f"{n}" for n in range(200)], max_concurrency=200))
    assert len(files(tmp_path)) == 200
    for number, result in enumerate(results):
        trace = read(tmp_path / f"trace_{result.run_id}.jsonl")
        counts = Counter(event["event_type"] for event in trace)
        assert trace[0]["arguments"] == {"user_input": str(number)}
        assert counts["agent_start"] == counts["agent_end"] == 5
        assert counts["tool_call"] == counts["tool_result"] == 8
        assert counts["agent_delegate"] == counts["delegation_end"] == 4
        assert {event["run_id"] for event in trace} == {result.run_id}
    assert not kit_of(agent)._runs


def test_runs_on_several_event_loops_share_one_kit() -> None:
    agent = searcher(enable_tracing=True)

    def work(backend: str) -> None:
        for _ in range(10):
            anyio.run(agent.run, "go", backend=backend)

    threads = [threading.Thread(target=work, args=(backend,)) for backend in ("asyncio", "trio") * 2]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert kit_of(agent).get_summary()["runs"] == 40
    assert len(kit_of(agent)) == 40 * 11


async def test_one_kit_for_several_agents_tells_of_each_once() -> None:
    kit = TracingKit()
    below = searcher(observers=[kit])
    script = [answers.call("ask", {"query": "?"}), "done"]
    agent = BaseAgent("A", "a", client=ScriptedModel(script), observers=[kit])
    result = await agent.register_delegate(below, tool_name="ask").run("go")
    assert [event.agent_name for event in of(kit.get_trace(), "agent_start")] == ["A", "Searcher"]
    assert {event.run_id for event in kit.get_trace()} == {result.run_id}


async def test_a_delegate_with_tracing_of_its_own_has_its_part_in_its_own_trace_too() -> None:
    below = searcher(enable_tracing=True)
    script = [answers.call("ask", {"query": "?"}), "done"]
    agent = BaseAgent("A", "a", client=ScriptedModel(script), enable_tracing=True)
    await agent.register_delegate(below, tool_name="ask").run("go")
    assert {event.agent_name for event in kit_of(agent).get_trace()} == {"A", "Searcher"}
    assert {event.agent_name for event in kit_of(below).get_trace()} == {"Searcher"}


# ---- files


async def test_runs_append_to_a_file_without_placeholders(tmp_path: Path) -> None:
    agent = searcher(enable_tracing=True, tracing_output_file=str(tmp_path / "trace.jsonl"))
    for _ in range(3):
        await agent.run("go")
    events = read(tmp_path / "trace.jsonl")
    assert len(events) == 33
    assert len({event["run_id"] for event in events}) == 3
    assert [list(event) for event in events] == [FIELDS] * 33


async def test_run_id_and_timestamp_in_its_name_make_a_file_for_each_run(tmp_path: Path) -> None:
    agent = searcher(tracing_output_file=tmp_path / "{timestamp}" / "trace_{run_id}_{timestamp}_{other}.jsonl")
    for _ in range(2):
        result = await agent.run("go")
        [path] = [each for each in files(tmp_path) if result.run_id in each.name]
        stamp = path.parent.name
        assert path.name == f"trace_{result.run_id}_{stamp}_{{other}}.jsonl"
        assert len(stamp) == 15
        assert len(read(path)) == 11


async def test_whatever_a_run_is_called_its_file_is_where_it_was_meant_and_can_be_read(tmp_path: Path) -> None:
    ids = ["a/../../../out", "..\\out", "..", ".out", 'or"der\\17', "{timestamp}", "übermorgen"]
    for number, run_id in enumerate(ids):
        around = tmp_path / str(number)
        folder = around / "in" / "here"
        agent = searcher(tracing_output_file=folder / "trace_{run_id}.jsonl")
        assert (await agent.run("go", journal=MemoryJournal(), run_id=run_id)).success
        agent.tracing_output_file = folder / "{run_id}" / "trace.jsonl"
        assert (await agent.run("go", journal=MemoryJournal(), run_id=run_id)).success
        assert len({path.parent for path in files(folder)}) == 2
        assert files(folder) == files(around)
        for path in files(folder):
            lines = read(path)
            assert {line["run_id"] for line in lines} == {run_id}
            assert len(lines) == 11
    assert len(files(tmp_path)) == 2 * len(ids)


async def test_a_relative_file_stays_where_it_was_meant(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path)
    agent = searcher(tracing_output_file="trace.jsonl")
    monkeypatch.chdir(tmp_path / "elsewhere")
    await agent.run("go")
    assert len(read(tmp_path / "trace.jsonl")) == 11


async def test_a_file_can_be_read_while_a_run_goes_on(tmp_path: Path) -> None:
    seen: list[str] = []

    async def look() -> None:
        """Look."""
        with anyio.fail_after(5):
            while len(seen) < 4:
                await anyio.sleep(0.005)
                if (tmp_path / "trace.jsonl").exists():
                    seen[:] = [event["event_type"] for event in read(tmp_path / "trace.jsonl")]

    script = [answers.call("look", {}), "done"]
    agent = BaseAgent("A", "a", client=ScriptedModel(script), tracing_output_file=tmp_path / "trace.jsonl")
    assert (await agent.add_tool(look).run("go")).tool_results[0].outcome == "ok"
    assert seen == ["agent_start", "model_request", "model_response", "tool_call"]


@pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="nobody is killed like that here")
def test_after_a_kill_each_line_of_the_file_is_whole(tmp_path: Path) -> None:
    code = (
        "import anyio, itertools, os, signal, threading, time\nfrom fractal import BaseAgent, run_many\n"
        "from fractal.testing import ScriptedModel\n"
        "def killer():\n    while not os.path.exists('trace.jsonl') or os.path.getsize('trace.jsonl') < 1_500_000:\n"
        "        time.sleep(0.01)\n    os.kill(os.getpid(), signal.SIGKILL)\n"
        "model = ScriptedModel(lambda r: 'long ' * 2000)\n"
        "agent = BaseAgent('A', 'a', client=model, tracing_output_file='trace.jsonl')\n"
        "threading.Thread(target=killer).start()\n"
        "async def main():\n    while True:\n        await run_many(agent, ['go'] * 20, max_concurrency=20)\n"
        "anyio.run(main)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, timeout=60)
    assert done.returncode == -signal.SIGKILL
    whole, _, rest = (tmp_path / "trace.jsonl").read_bytes().rpartition(b"\n")
    lines = whole.split(b"\n")
    assert len(lines) > 100
    for line in lines:
        assert json.loads(line)["agent_name"] == "A"
    assert len(rest) < 20_000  # at most the last one is cut


def test_what_is_told_last_is_written_before_the_program_ends(tmp_path: Path) -> None:
    code = (
        "from fractal import TracingKit, RunStarted\n"
        "kit = TracingKit('trace.jsonl')\n"
        "for n in range(5000):\n"
        "    kit(RunStarted(run_id=str(n), parent_id=None, agent_name='A', depth=0, message={'content': 'x'}))\n"
    )
    subprocess.run([sys.executable, "-c", code], cwd=tmp_path, check=True, timeout=60)
    assert len(read(tmp_path / "trace.jsonl")) == 5000


async def test_a_file_that_cannot_be_written_ends_no_run(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "file").write_text("")
    agent = searcher(tracing_output_file=tmp_path / "file" / "trace.jsonl")
    with anyio.fail_after(10):
        assert (await agent.run("go")).success
    assert "cannot be written" in caplog.text
    assert len(kit_of(agent)) == 11


# ---- what is kept


async def test_what_is_kept_can_be_asked_for_by_run_and_forgotten() -> None:
    agent = searcher(enable_tracing=True)
    first, second = await agent.run("one"), await agent.run("two")
    kit = kit_of(agent)
    assert len(kit.get_trace()) == len(kit) == 22
    assert kit.get_trace(first.run_id)[0].arguments == {"user_input": "one"}
    assert kit.get_summary(second.run_id)["runs"] == 1
    assert kit.get_trace("another") == []
    kit.clear()
    assert (kit.get_trace(), len(kit), bool(kit)) == ([], 0, True)
    await agent.run("three")
    assert len(kit.get_trace()) == 11


async def test_a_summary_has_the_numbers() -> None:
    answer = answers.text("led", usage={"prompt_tokens": 1000, "completion_tokens": 100})
    agent = team(enable_tracing=True)
    agent.register_delegate(BaseAgent("Priced", "p", "p", ScriptedModel([answer])), tool_name="priced")
    await agent.run("go")
    summary = kit_of(agent).get_summary()
    counts = ("total_events", "runs", "agent_runs", "model_calls", "tool_calls", "delegations", "errors")
    assert tuple(summary[name] for name in counts) == (len(kit_of(agent)), 1, 5, 10, 8, 4, 2)
    assert (summary["input_tokens"], summary["output_tokens"]) == (100, 50)
    assert summary["success_rate"] == 0.75
    assert summary["stop_reasons"] == {"finished": 5}
    assert summary["agents"]["Searcher"]["count"] == 2
    assert summary["tools"]["fail"] == {**summary["tools"]["fail"], "count": 2, "failed": 2}
    assert summary["total_time"] > 0
    assert math.isfinite(summary["average_tool_time"])
    json.dumps(summary)


def test_a_summary_of_nothing_is_one() -> None:
    summary = TracingKit().get_summary()
    assert (summary["total_events"], summary["total_time"], summary["success_rate"]) == (0, 0.0, 1.0)


async def test_what_is_kept_can_be_exported(tmp_path: Path) -> None:
    agent = searcher(enable_tracing=True)
    first, _ = await agent.run("one"), await agent.run("two")
    kit = kit_of(agent)
    kit.export_json(tmp_path / "all.json")
    assert [TraceEvent(**event) for event in json.loads((tmp_path / "all.json").read_text())] == kit.get_trace()
    reader = TraceReader(tmp_path / "all.json")
    assert ([*reader], reader.complaints()) == ([*kit.get_trace()], [])
    assert {path.stat().st_mode & 0o777 for path in files(tmp_path)} == {0o600}
    kit.export_json(str(tmp_path / "one.jsonl"), first.run_id)
    assert [TraceEvent(**event) for event in read(tmp_path / "one.jsonl")] == kit.get_trace(first.run_id)
    TracingKit().export_json(tmp_path / "none.json")
    assert json.loads((tmp_path / "none.json").read_text()) == []


async def test_of_many_events_the_newest_are_kept() -> None:
    kit = TracingKit(max_events=15)
    agent = searcher(observers=[kit])
    await agent.run("one")
    second = await agent.run("two")
    assert len(kit) == 15
    assert len(kit.get_trace(second.run_id)) == 11
    assert kit.get_summary()["dropped_events"] == 7


async def test_what_is_kept_has_a_bound_in_bytes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fractal.tracing.kit._MOST_BYTES", 100_000)
    agent = BaseAgent("A", "a", client=ScriptedModel(lambda r: "word " * 3000), enable_tracing=True)
    for _ in range(20):
        await agent.run("go")
    assert sum(len(event.to_json()) for event in kit_of(agent).get_trace()) < 110_000
    assert kit_of(agent).get_summary()["dropped_events"] > 50


async def test_long_texts_are_cut_and_say_so_and_the_run_has_them_whole(tmp_path: Path) -> None:
    async def long() -> str:
        """Long."""
        return "x" * 1_000_000

    kit = TracingKit(tmp_path / "trace.jsonl", max_text=1000)
    script = [answers.call("long", {}), "done"]
    result = await BaseAgent("A", "a", client=ScriptedModel(script), observers=[kit]).add_tool(long).run("y" * 5000)
    assert len(result.tool_results[0].content) == 1_000_000
    [end] = of(kit.get_trace(), "tool_result")
    assert end.result == "x" * 1000 + "… [cut: 999000 more characters]"
    assert (tmp_path / "trace.jsonl").stat().st_size < 30_000


def test_a_kit_says_what_it_has() -> None:
    kit = TracingKit()
    assert repr(kit) == "<TracingKit: 0 events>"
    assert str(kit) == "TracingKit(events=0, agent_runs=0, tool_calls=0, errors=0)"


async def test_whoever_changes_what_a_trace_gives_changes_only_that() -> None:
    agent = searcher(enable_tracing=True)
    await agent.run("go")
    for event in kit_of(agent).get_trace():
        event.metadata.clear()
        event.agent_name = "****"
    assert all(event.metadata and event.agent_name == "Searcher" for event in kit_of(agent).get_trace())


# ---- whatever is in it


@pytest.mark.parametrize("make", VALUES.values(), ids=VALUES)
async def test_whatever_a_tool_returns_is_told(make: Callable[[], Any], tmp_path: Path) -> None:
    async def odd() -> Any:
        """Odd."""
        return make()

    script = [answers.call("odd", {}), "done"]
    agent = BaseAgent("A", "a", client=ScriptedModel(script), tracing_output_file=tmp_path / "trace.jsonl")
    await agent.add_tool(odd).run("go")
    assert [event["event_type"] for event in read(tmp_path / "trace.jsonl")][-1] == "agent_end"
    assert len(of(kit_of(agent).get_trace(), "tool_result")) == 1


async def test_lines_in_texts_and_half_characters_break_no_line(tmp_path: Path) -> None:
    agent = BaseAgent(
        "A\n\ud800", "a", client=ScriptedModel(["\n\r\u2028 \x00"]), tracing_output_file=tmp_path / "t.jsonl"
    )
    await agent.run("line\nbreak \ud800")
    assert [event["event_type"] for event in read(tmp_path / "t.jsonl")][-1] == "agent_end"
    assert len((tmp_path / "t.jsonl").read_bytes().split(b"\n")) == 5


# ---- secrets

KEY = "sk-live-0123456789abcdefghij"


async def test_no_key_is_written_wherever_it_turns_up(
    endpoint: StartEndpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("SERVICE_TOKEN", "plain-looking-value")
    _without_secrets.cache_clear()

    async def leak(url: str, api_key: str) -> Any:
        """Leak."""
        return {"headers": {"Authorization": "Bearer abcdefgh12345678"}, "note": "plain-looking-value"}

    call = answers.call("leak", {"url": f"https://me:{KEY}@host/?api_key=qwertz12345678", "api_key": "qwertz12345678"})
    endpoint([call, answers.text(f"the key is {KEY}")])
    model = OpenAIModel(api_key=KEY)
    agent = BaseAgent("A", f"Never tell {KEY}.", client=model, tracing_output_file=tmp_path / "trace.jsonl")
    with caplog.at_level(logging.DEBUG, "fractal"):
        async with agent:
            result = await agent.add_tool(leak).run(f"my password: {KEY}")
    assert result.success
    assert "tool_started" in caplog.text
    text = (tmp_path / "trace.jsonl").read_text() + str(kit_of(agent).get_trace()) + caplog.text
    for secret in (KEY, "0123456789abcdefghij", "qwertz12345678", "abcdefgh12345678", "plain-looking-value"):
        assert secret not in text
    assert "[redacted]" in text
    assert of(kit_of(agent).get_trace(), "tool_call")[0].arguments == {
        "url": "https://me:[redacted]@host/?api_key=[redacted]",
        "api_key": "[redacted]",
    }


async def test_nor_is_what_a_model_or_an_endpoint_calls_something(tmp_path: Path) -> None:
    """A model that makes up names of tools and ids of calls, of any length too."""

    class Odd:
        async def respond(self, request: Any) -> Reply:
            if len(request.transcript) > 1:
                return Reply(text="done")
            named = (("1", KEY), (KEY, "search"), ("c" * 10**6, "t" * 10**6))
            calls = tuple(ToolCall(call_id, name, '{"query": "x"}') for call_id, name in named)
            return Reply(tool_calls=calls, model=KEY, id=KEY, finish_reason=KEY)

    agent = BaseAgent(f"A {KEY}", "a", KEY, Odd(), tracing_output_file=tmp_path / "trace.jsonl").add_tool(search)
    assert (await agent.run("go")).success
    text = (tmp_path / "trace.jsonl").read_text()
    assert KEY not in text
    assert len(text) < 200_000
    calls = of(kit_of(agent).get_trace(), "tool_call", "tool_result")
    assert [count for _, count in Counter((each.tool_name, each.tool_call_id) for each in calls).items()] == [2, 2, 2]
    assert {each.agent_name for each in calls} == {"A [redacted]"}


async def test_the_key_of_a_users_client_is_taken_out_whatever_it_looks_like(endpoint: StartEndpoint) -> None:
    import openai

    endpoint(answers.text("you have odd;key!of+mine there"))
    agent = BaseAgent("A", "a", client=openai.AsyncOpenAI(api_key="odd;key!of+mine"), enable_tracing=True)
    async with agent:
        await agent.run("go")
    assert "odd;key" not in str(kit_of(agent).get_trace())


async def test_a_hook_has_the_last_word(tmp_path: Path) -> None:
    def redact(event: TraceEvent) -> TraceEvent | None:
        if event.event_type == "model_request":
            return None
        if event.arguments:
            event.arguments = {"left": "out"}
        return event

    kit = TracingKit(tmp_path / "trace.jsonl", redact=redact)
    await searcher(observers=[kit]).run("go")
    told = read(tmp_path / "trace.jsonl")
    assert len(told) == 9
    assert [event["arguments"] for event in told if event["arguments"]] == [{"left": "out"}] * 3
    assert [TraceEvent(**event) for event in told] == kit.get_trace()


async def test_a_hook_that_fails_leaves_the_contents_out(caplog: pytest.LogCaptureFixture) -> None:
    def redact(event: TraceEvent) -> Any:
        raise ValueError(event.event_type)

    kit = TracingKit(redact=redact)
    result = await searcher(observers=[kit]).run("tell nobody")
    assert result.success
    assert len(kit) == 11
    assert "tell nobody" not in str(kit.get_trace())
    assert {event.metadata["run"] for event in kit.get_trace()} == {result.run_id}
    assert "redact= failed" in caplog.text


@pytest.mark.skipif(os.name == "nt", reason="there are no such rights there")
def changing(field: str, value: object) -> Callable[[TraceEvent], TraceEvent]:
    def redact(event: TraceEvent) -> TraceEvent:
        setattr(event, field, value)
        return event

    return redact


async def test_whatever_a_hook_makes_of_an_event_a_trace_can_be_looked_at(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    kept = {"metadata": None, "elapsed_time": "x", "tool_name": 5, "arguments": [1], "delegation_depth": None}
    for field, value in (*kept.items(), ("timestamp", None), ("event_type", "mine"), ("agent_name", None)):
        path = tmp_path / f"{field}.jsonl"
        kit = TracingKit(path, redact=changing(field, value))
        assert (await searcher(observers=[kit]).run("go")).success
        assert len(kit.get_trace()._repr_html_()) > 100
        assert kit.get_summary()["total_events"] == 11
        assert str(kit).startswith("TracingKit(events=11")
        assert [*TraceReader(path)] == [*kit.get_trace()]
        assert ("redact= failed" in caplog.text) is (field not in kept)
        assert ("left out" in str([event.result for event in kit.get_trace()])) is (field not in kept)


async def test_only_its_owner_may_read_a_trace(tmp_path: Path) -> None:
    await searcher(tracing_output_file=tmp_path / "trace.jsonl").run("go")
    assert (tmp_path / "trace.jsonl").stat().st_mode & 0o077 == 0


async def test_what_a_subclass_does_at_the_end_of_a_run_is_waited_for(tmp_path: Path) -> None:
    seen: list[int] = []

    class Kit(TracingKit):
        async def settle(self, run_id: str) -> None:
            await super().settle(run_id)
            seen.append(len((tmp_path / "t.jsonl").read_text().splitlines()))

    await BaseAgent("A", "a", client=ScriptedModel(["hi"]), observers=[Kit(tmp_path / "t.jsonl")]).run("go")
    assert seen == [4]
