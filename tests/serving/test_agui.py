"""Agents for front ends that speak AG-UI: every event is one of the protocol, in an order that it allows."""

from __future__ import annotations

import json
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import anyio
import httpx2
import pytest
from fastapi import Depends, FastAPI, HTTPException
from pydantic import TypeAdapter

from fractal import BaseAgent, tool
from fractal.serving import Problem, ServedRuns, serving_lifespan
from fractal.testing import Endpoint, ScriptedModel, answers
from tests.on_uvicorn import on_uvicorn
from tests.visits import Visit, post

core = pytest.importorskip("ag_ui.core", reason="AG-UI is not here: pip install ag-ui-protocol")
from fractal.serving._agui.asked import conversation_of, read_input  # noqa: E402
from fractal.serving._agui.translating import Translator  # noqa: E402
from fractal.serving.agui import agui_router  # noqa: E402

StartEndpoint = Callable[..., Endpoint]
EVENT: TypeAdapter[Any] = TypeAdapter(core.Event)


@tool
async def look(what: str) -> dict[str, str]:
    """Look."""
    if what == "nothing":
        raise LookupError("it is not there")
    return {"seen": what}


class Client:
    """A front end: it sends inputs and keeps what it hears."""

    def __init__(self, url: str) -> None:
        self.url = url
        self.messages: list[Any] = []

    def post(self, path: str = "/agui", **given: Any) -> httpx2.Response:
        body = {"threadId": "t", "runId": "r", "messages": self.messages, **given}
        return httpx2.post(f"{self.url}{path}", json=body, trust_env=False, timeout=20)

    def ask(self, text: Any, path: str = "/agui", **given: Any) -> list[Any]:
        self.messages.append({"id": f"u{len(self.messages)}", "role": "user", "content": text})
        return self.heard(self.post(path, **given))

    def resume(self, **entry: Any) -> list[Any]:
        return self.heard(self.post(resume=[{"status": "resolved", **entry}]))

    def heard(self, answer: httpx2.Response) -> list[Any]:
        assert answer.status_code == 200, answer.text
        assert answer.headers["content-type"].startswith("text/event-stream")
        frames = [frame.removeprefix("data: ") for frame in answer.text.split("\n\n") if frame.startswith("data: ")]
        assert_allowed([json.loads(frame) for frame in frames])
        return [EVENT.validate_json(frame) for frame in frames]


def assert_allowed(events: list[dict[str, Any]]) -> None:
    """The order is one that the protocol allows: begun once, open before it goes on, closed before the end."""
    assert events[0]["type"] == "RUN_STARTED"
    assert events[-1]["type"] in ("RUN_FINISHED", "RUN_ERROR")
    assert not {"RUN_STARTED", "RUN_FINISHED", "RUN_ERROR"} & {event["type"] for event in events[1:-1]}
    opens = ("TEXT_MESSAGE_START", "TOOL_CALL_START", "REASONING_START", "REASONING_MESSAGE_START", "SUBAGENT_STARTED")
    goes_on = ("TEXT_MESSAGE_CONTENT", "TOOL_CALL_ARGS", "REASONING_MESSAGE_CONTENT")
    ends = ("TEXT_MESSAGE_END", "TOOL_CALL_END", "REASONING_END", "REASONING_MESSAGE_END", "SUBAGENT_FINISHED")
    open_now, begun = set[tuple[str, str]](), set[tuple[str, str]]()
    for event in events:
        kind = event["type"]
        if kind.startswith("SUBAGENT"):
            what = ("SUBAGENT", event["subagentRunId"])
        else:
            what = (kind.rpartition("_")[0], event.get("messageId") or event.get("toolCallId") or "")
            if event.get("subagentRunId"):
                assert ("SUBAGENT", event["subagentRunId"]) in open_now, event
        if kind in opens:
            assert what not in begun, event
            open_now.add(what)
            begun.add(what)
        elif kind in goes_on:
            assert what in open_now, event
        elif kind in (*ends, "SUBAGENT_ERROR"):
            open_now.remove(what)
        elif kind == "TOOL_CALL_RESULT":
            assert ("TOOL_CALL", event["toolCallId"]) not in open_now
    assert open_now == set()


@contextmanager
def served(agents: Any, **options: Any) -> Iterator[Client]:
    app = FastAPI()
    app.include_router(agui_router(agents, **options))
    with on_uvicorn(app, timeout_graceful_shutdown=1) as url:
        yield Client(url)


def kinds(events: list[Any]) -> list[str]:
    found: list[str] = []
    for event in events:
        if not found or found[-1] != event.type.value or "CONTENT" not in event.type.value:
            found.append(event.type.value)
    return found


def texts(events: list[Any]) -> list[str]:
    said: dict[str, str] = {}
    for event in events:
        if event.type.value == "TEXT_MESSAGE_CONTENT":
            said[event.message_id] = said.get(event.message_id, "") + event.delta
    return list(said.values())


def test_an_answer_is_a_message_with_what_it_used(endpoint: StartEndpoint):
    endpoint(answers.text("one two three", usage=(7, 3)))
    with served(BaseAgent("Guide", "g")) as client:
        events = client.ask("hi")
    assert kinds(events) == [
        "RUN_STARTED",
        "TEXT_MESSAGE_START",
        "TEXT_MESSAGE_CONTENT",
        "TEXT_MESSAGE_END",
        "RUN_FINISHED",
    ]
    assert texts(events) == ["one two three"]
    first, last = events[0], events[-1]
    assert (first.thread_id, first.run_id, first.protocol_version) == ("t", "r", "1.0")
    assert (last.thread_id, last.run_id, last.result, last.outcome.type) == ("t", "r", "one two three", "success")
    assert (last.usage[0].input_tokens, last.usage[0].output_tokens, last.usage[0].total_tokens) == (7, 3, 10)


def test_tool_calls_come_with_arguments_and_results_and_belong_to_one_message(endpoint: StartEndpoint):
    calls = [answers.call("look", {"what": "x"}, id="a"), answers.call("look", {"what": "nothing"}, id="b")]
    endpoint([answers.calls(*calls, text="Let me look."), answers.call("look", {"what": "y"}, id="a"), "well"])
    with served(BaseAgent("Guide", "g").add_tool(look)) as client:
        events = client.ask("hi")
    started = [event for event in events if event.type.value == "TOOL_CALL_START"]
    assert [(each.tool_call_id, each.tool_call_name) for each in started] == [
        ("a", "look"),
        ("b", "look"),
        ("a~2", "look"),
    ]
    said = next(event for event in events if event.type.value == "TEXT_MESSAGE_START")
    assert started[0].parent_message_id == started[1].parent_message_id == said.message_id
    assert started[2].parent_message_id != said.message_id
    assert next(json.loads(each.delta) for each in events if each.type.value == "TOOL_CALL_ARGS") == {"what": "x"}
    results = {each.tool_call_id: each.content for each in events if each.type.value == "TOOL_CALL_RESULT"}
    assert json.loads(results["a"]) == {"seen": "x"}
    assert results["b"] == "Error: the tool failed"  # what exceptions say is no business of clients


def test_reasoning_is_told_apart(endpoint: StartEndpoint):
    endpoint(answers.text("well", message_extra={"reasoning_content": "hm, hm"}))
    with served(BaseAgent("Guide", "g")) as client:
        events = client.ask("hi")
    thought = "".join(each.delta for each in events if each.type.value == "REASONING_MESSAGE_CONTENT")
    assert thought == "hm, hm"
    assert texts(events) == ["well"]


def test_delegates_are_subagents(endpoint: StartEndpoint):
    ask_middle = answers.call("delegate_to_middle", {"query": "why?"}, id="m")
    ask_deep = answers.call("delegate_to_deep", {"query": "why?"}, id="m")
    endpoint([ask_middle, ask_deep, "deep reason", "middle reason", "because"])
    middle = BaseAgent("Middle", "m").register_delegate(BaseAgent("Deep", "d"))
    with served(BaseAgent("Guide", "g").register_delegate(middle)) as client:
        events = client.ask("hi")
    outer, inner = [event for event in events if event.type.value == "SUBAGENT_STARTED"]
    assert (outer.name, outer.parent_subagent_run_id, outer.parent_tool_call_id) == ("Middle", None, "m")
    assert (inner.name, inner.parent_subagent_run_id, inner.parent_tool_call_id) == (
        "Deep",
        outer.subagent_run_id,
        "m~2",
    )
    said = [event.subagent_run_id for event in events if event.type.value == "TEXT_MESSAGE_START"]
    assert said == [inner.subagent_run_id, outer.subagent_run_id, None]
    assert texts(events) == ["deep reason", "middle reason", "because"]


def test_a_delegate_that_fails_is_a_subagent_s_error(endpoint: StartEndpoint):
    endpoint([answers.call("delegate_to_below", {"query": "why?"}), answers.failure(401, "secret"), "without it"])
    with served(BaseAgent("Guide", "g").register_delegate(BaseAgent("Below", "b"))) as client:
        answer = client.ask("hi")
    error = next(event for event in answer if event.type.value == "SUBAGENT_ERROR")
    assert (error.message, error.code) == ("the model could not answer", "model_error")
    assert answer[-1].outcome.type == "success"


@tool(requires_approval=True)
def pay(euros: int) -> str:
    """Pay somebody."""
    return f"paid {euros}"


@pytest.mark.parametrize(
    ("entry", "told"),
    [
        ({"payload": {"decision": "allow"}}, "paid 7"),
        ({"payload": {"decision": "allow", "arguments": {"euros": 5}}}, "paid 5"),
        ({"payload": {"decision": "deny", "reason": "too much"}}, "Error: denied: too much"),
        ({"status": "cancelled"}, "Error: denied: nobody has decided on it"),
    ],
)
@pytest.mark.parametrize("on_disconnect", ["cancel", "detach"])
def test_an_approval_is_an_interrupt_that_the_next_request_answers(
    entry: dict[str, Any], told: str, on_disconnect: str, endpoint: StartEndpoint
):
    one = endpoint([answers.call("pay", {"euros": 7}, id="p"), "well"])
    with served(BaseAgent("Guide", "g").add_tool(pay), on_disconnect=on_disconnect) as client:
        first = client.ask("pay")
        (interrupt,) = first[-1].outcome.interrupts
        assert (interrupt.reason, interrupt.tool_call_id) == ("tool_approval", "p")
        assert interrupt.metadata == {"toolName": "pay", "arguments": {"euros": 7}}
        assert set(interrupt.response_schema["properties"]) == {"decision", "reason", "arguments"}
        second = client.resume(interruptId=interrupt.id, **entry)
        again = client.post(
            resume=[{"interruptId": interrupt.id, "status": "resolved", "payload": {"decision": "allow"}}]
        )
    assert "TOOL_CALL_RESULT" not in kinds(first)
    assert [each.content for each in second if each.type.value == "TOOL_CALL_RESULT"] == [told]
    assert "TOOL_CALL_START" not in kinds(second)
    assert (second[-1].outcome.type, texts(second)) == ("success", ["well"])
    assert again.status_code == 404
    assert len(one.requests) == 2


@pytest.mark.parametrize("max_bytes", [2**20, 2**15], ids=["all is kept", "much is dropped"])
def test_an_interrupt_after_a_long_run_goes_on_where_it_was(max_bytes: int, endpoint: StartEndpoint):
    many = [answers.call("look_long", id=f"look-{number}") for number in range(5)]
    endpoint([*many, answers.call("pay", {"euros": 7}, id="p"), "well"])

    def look_long() -> str:
        """Look."""
        return "seen " * 4000

    agent = BaseAgent("Guide", "g").add_tool(pay).add_tool(look_long)
    with served(agent, max_bytes=max_bytes) as client:
        first = client.ask("pay")
        (interrupt,) = first[-1].outcome.interrupts
        second = client.resume(interruptId=interrupt.id, payload={"decision": "allow"})
    assert "TOOL_CALL_START" not in kinds(second)
    assert [each.tool_call_id for each in second if each.type.value == "TOOL_CALL_RESULT"] == ["p"]
    assert texts(second) == ["well"]
    ids = [{each.message_id for each in events if hasattr(each, "message_id")} for events in (first, second)]
    assert not ids[0] & ids[1]


def finished_or_failed() -> Iterator[None]:
    yield
    raise HTTPException(418, "no tea")


async def test_a_request_that_fails_before_its_answer_is_sent_begins_no_run():
    runs = ServedRuns(BaseAgent("Guide", "g", client=ScriptedModel(["hi"])))
    app = FastAPI()
    app.include_router(agui_router(runs), dependencies=[Depends(finished_or_failed, scope="function")])
    asked = {"threadId": "t", "runId": "r", "messages": [{"id": "1", "role": "user", "content": "hi"}]}
    async with serving_lifespan(runs)(app):
        assert (await post(app, "/agui", asked)).status == 418
    assert await runs.page(None, None, 9) == []


def test_a_delegate_that_needs_approval_is_suspended_and_taken_up_again(endpoint: StartEndpoint):
    endpoint(
        [
            answers.call("delegate_to_below", {"query": "pay"}),
            answers.calls(answers.call("pay", {"euros": 7}), answers.call("look_long")),
            "it is paid",
            "done",
        ]
    )

    async def look_long() -> str:
        """Look."""
        await anyio.sleep(0.4)
        return "seen"

    below = BaseAgent("Below", "b").add_tool(pay).add_tool(look_long)
    with served(BaseAgent("Guide", "g").register_delegate(below)) as client:
        first = client.ask("pay")
        suspended = next(event for event in first if event.type.value == "SUBAGENT_FINISHED")
        (interrupt,) = first[-1].outcome.interrupts
        assert suspended.outcome.type == "suspended"
        assert suspended.outcome.interrupt_ids == [interrupt.id]
        assert interrupt.subagent_run_id == suspended.subagent_run_id
        assert kinds(first).count("TOOL_CALL_RESULT") == 1  # the other call was waited for
        second = client.resume(interruptId=interrupt.id, payload={"decision": "allow"})
    assert second[1].type.value == "SUBAGENT_STARTED"
    assert second[1].subagent_run_id == suspended.subagent_run_id
    assert texts(second) == ["it is paid", "done"]


def test_what_answers_no_interrupt_is_refused(endpoint: StartEndpoint):
    endpoint([answers.call("pay", {"euros": 7}), "well"])
    with served(BaseAgent("Guide", "g").add_tool(pay)) as client:
        (interrupt,) = client.ask("pay")[-1].outcome.interrupts
        good = {"interruptId": interrupt.id, "status": "resolved", "payload": {"decision": "allow"}}
        run_id, after, _ = interrupt.id.split(".", 2)

        def status(*entries: dict[str, Any]) -> int:
            return client.post(resume=list(entries)).status_code

        assert status({**good, "interruptId": "x"}) == 404
        assert status({**good, "interruptId": f"run_{'0' * 32}.1.x"}) == 404
        assert status({**good, "interruptId": f"{run_id}.{after}.x"}) == 409
        assert status({**good, "interruptId": f"{run_id}.999999.{interrupt.id.rpartition('.')[2]}"}) == 404
        assert status(good, good) == 404
        assert status({**good, "payload": {"decision": "maybe"}}) == 422
        assert status({**good, "payload": None}) == 422
        assert client.resume(**good)[-1].outcome.type == "success"


def test_the_conversation_of_a_client_is_the_history(endpoint: StartEndpoint):
    one = endpoint("well")
    calls = [
        {"id": name, "type": "function", "function": {"name": "look", "arguments": '{"what": "x"}'}} for name in "abc"
    ]
    with served(BaseAgent("Guide", "g")) as client:
        client.messages = [
            {"id": "1", "role": "system", "content": "be brief"},
            {"id": "2", "role": "user", "content": "hi"},
            {"id": "3", "role": "assistant", "content": "Let me look.", "toolCalls": calls[:2]},
            {"id": "3b", "role": "assistant", "toolCalls": calls[2:]},
            {"id": "4", "role": "tool", "toolCallId": "b", "content": "B"},
            {"id": "5", "role": "reasoning", "content": "hm"},
            {"id": "6", "role": "tool", "toolCallId": "a", "content": "A"},
            {"id": "7", "role": "assistant", "content": "of a delegate", "subagentRunId": "s"},
            {"id": "8", "role": "assistant", "content": "so"},
        ]
        image = {"type": "image", "source": {"type": "data", "value": "AAAA", "mimeType": "image/png"}}
        client.ask([{"type": "text", "text": "and?"}, image], context=[{"description": "place", "value": "Rome"}])
    sent = one.requests[0].body["messages"][1:]
    assert [each["role"] for each in sent] == [
        *("system", "user", "assistant", "tool", "tool", "tool", "assistant", "system", "user"),
    ]
    assert [call["id"] for call in sent[2]["tool_calls"]] == ["a", "b", "c"]
    assert [(each["tool_call_id"], each["content"]) for each in sent[3:6]] == [
        ("a", "A"),
        ("b", "B"),
        ("c", "Error: no result"),
    ]
    assert sent[7]["content"] == "Context:\nplace: Rome"
    assert sent[8]["content"][1] == {"type": "image_url", "image_url": {"url": "data:image/png;base64,AAAA"}}


AUDIO = {"type": "audio", "source": {"type": "url", "value": "x"}}


@pytest.mark.parametrize(
    "given",
    [
        {"tools": [{"name": "f", "description": "", "parameters": {}}]},
        {"state": {"a": 1}},
        {"forwardedProps": {"a": 1}},
        {"messages": []},
        {"messages": [{"id": "1", "role": "assistant", "content": "x"}]},
        {"messages": [{"id": "1", "role": "nobody", "content": "x"}]},
        {
            "messages": [
                {"id": "1", "role": "user", "content": [{"type": "audio", "source": {"type": "url", "value": "x"}}]}
            ]
        },
        {"messages": "hi"},
        {"threadId": None},
    ],
)
def test_what_cannot_be_done_is_refused(given: dict[str, Any]):
    asked = {"threadId": "t", "runId": "r", "messages": [{"id": "1", "role": "user", "content": "hi"}], **given}
    with pytest.raises(Problem) as caught:
        conversation_of(read_input(json.dumps(asked).encode()))
    assert caught.value.status == 422


def test_a_refusal_is_a_problem(endpoint: StartEndpoint):
    endpoint("never")
    with served(BaseAgent("Guide", "g"), max_body=1000) as client:
        answer = client.post(messages=[])
        assert (answer.status_code, answer.headers["content-type"]) == (422, "application/problem+json")
        assert client.post(messages="x" * 1000).status_code == 413


def test_an_agent_is_chosen_by_its_name(endpoint: StartEndpoint):
    one = endpoint("well")
    with served({"a b": BaseAgent("A", "I am a"), "c": BaseAgent("C", "I am c")}) as client:
        client.ask("hi")
        client.ask("hi", "/agui/c")
        client.ask("hi", "/agui/a%20b")
        assert client.post("/agui/x").status_code == 404
    assert [each.body["messages"][0]["content"] for each in one.requests] == ["I am a", "I am c", "I am a"]


def test_errors_and_cancellation_are_told(endpoint: StartEndpoint):
    endpoint(answers.failure(401, "secret"))
    runs = ServedRuns(BaseAgent("Guide", "g"))
    with served(runs) as client:
        last = client.ask("hi")[-1]
    assert (last.type.value, last.message, last.code) == ("RUN_ERROR", "the model could not answer", "model_error")


def test_an_object_is_the_result_and_a_new_text_a_message(endpoint: StartEndpoint):
    endpoint('{"city": "Rome"}')
    with served(BaseAgent("Guide", "g", output_type=dict[str, str])) as client:
        assert client.ask("hi")[-1].result == {"city": "Rome"}
    endpoint("draft")
    agent = BaseAgent("Guide", "g")
    agent.output_validator(lambda answer: "final")
    with served(agent) as client:
        assert texts(client.ask("hi")) == ["draft", "final"]


@pytest.mark.parametrize("on_disconnect", ["cancel", "detach"])
def test_a_client_that_goes_away_cancels_or_not_as_the_server_says(on_disconnect: str, endpoint: StartEndpoint):
    endpoint([answers.call("work"), "well"])
    began, go_on, ended = threading.Event(), threading.Event(), list[str]()
    over = threading.Event()

    @tool
    async def work() -> None:
        """Work."""
        try:
            began.set()
            while not go_on.is_set():  # noqa: ASYNC110 - it is set in another thread
                await anyio.sleep(0.01)
            ended.append("done")
        except anyio.get_cancelled_exc_class():
            ended.append("cancelled")
            raise
        finally:
            over.set()

    with served(BaseAgent("Guide", "g").add_tool(work), on_disconnect=on_disconnect) as client:
        message = {"id": "1", "role": "user", "content": "go"}
        body = json.dumps({"threadId": "t", "runId": "r", "messages": [message]}).encode()
        head = (
            f"POST /agui HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
        )
        host, port = client.url.removeprefix("http://").split(":")
        with socket.create_connection((host, int(port)), 10) as connection:
            connection.sendall(head.encode() + body)
            assert began.wait(5)
        if on_disconnect == "detach":
            assert not over.wait(0.3)
            go_on.set()
        assert over.wait(2)
    assert ended == ["cancelled" if on_disconnect == "cancel" else "done"]


@pytest.mark.parametrize("is_known_before", [False, True])
def test_a_call_that_waits_is_not_under_way_in_whatever_order_that_is_told(is_known_before: bool):
    about = {"agent_name": "A", "depth": 0, "at": 1.0, "run_id": "run_1", "call_id": "c", "tool_name": "pay"}
    events = [{**about, "kind": kind, "arguments": {}} for kind in ("tool_started", "approval_requested")]
    translator = Translator("run_1", "t", "r")
    told = [event for each in (reversed(events) if is_known_before else events) for event in translator.take(each)]
    assert kinds(told) == ["TOOL_CALL_START", "TOOL_CALL_ARGS", "TOOL_CALL_END"]
    assert translator.is_idle
    translator.take({**about, "kind": "approval_answered", "is_allowed": True})
    assert not translator.is_idle


async def test_a_client_that_comes_back_with_the_same_request_gets_its_run_from_the_beginning() -> None:
    began, go_on = anyio.Event(), anyio.Event()

    @tool
    async def work() -> str:
        """Work."""
        began.set()
        await go_on.wait()
        return "done"

    model = ScriptedModel([answers.call("work"), "well", "another"])
    agent = BaseAgent("Guide", "g", client=model).add_tool(work)
    app = FastAPI(lifespan=serving_lifespan(agent))
    app.include_router(agui_router(agent, on_disconnect="detach"))
    body = {"threadId": "t", "runId": "r1", "messages": [{"id": "1", "role": "user", "content": "go"}]}
    with anyio.fail_after(20):
        async with app.router.lifespan_context(app):
            first = Visit("POST", "/agui", json=body)
            async with first.going_on(app):
                await began.wait()
                first.leave()
            second = Visit("POST", "/agui", json=body)
            async with second.going_on(app):
                await second.has_told(b"TOOL_CALL_START")
                go_on.set()
            ended = await post(app, "/agui", body)
            other = await post(app, "/agui", {**body, "runId": "r2"})
    assert data_of(second) == data_of(ended)
    assert data_of(ended)[0]["runId"] == "r1"
    assert [each["delta"] for each in data_of(ended) if each["type"] == "TEXT_MESSAGE_CONTENT"] == ["well"]
    assert_allowed(data_of(ended))
    assert first.headers["x-run-id"] == second.headers["x-run-id"] == ended.headers["x-run-id"]
    assert [each["delta"] for each in data_of(other) if each["type"] == "TEXT_MESSAGE_CONTENT"] == ["another"]
    assert other.headers["x-run-id"] != ended.headers["x-run-id"]


async def test_a_client_that_comes_back_to_a_call_that_waits_is_asked_again() -> None:
    @tool(requires_approval=True)
    async def pay() -> str:
        """Pay."""
        return "paid"

    agent = BaseAgent("Guide", "g", client=ScriptedModel([answers.call("pay"), "well"])).add_tool(pay)
    app = FastAPI(lifespan=serving_lifespan(agent))
    app.include_router(agui_router(agent, on_disconnect="detach"))
    body = {"threadId": "t", "runId": "r1", "messages": [{"id": "1", "role": "user", "content": "go"}]}
    with anyio.fail_after(20):
        async with app.router.lifespan_context(app):
            asked = [data_of(await post(app, "/agui", body))[-1]["outcome"] for _ in range(2)]
            assert asked[0] == asked[1]
            (interrupt,) = asked[1]["interrupts"]
            entry = {"interruptId": interrupt["id"], "status": "resolved", "payload": {"decision": "allow"}}
            rest = data_of(await post(app, "/agui", {**body, "runId": "r2", "resume": [entry]}))
            assert [each["delta"] for each in rest if each["type"] == "TEXT_MESSAGE_CONTENT"] == ["well"]
            again = data_of(await post(app, "/agui", body))
            assert again[-1]["outcome"]["type"] == "success"


async def test_where_runs_end_with_their_clients_the_same_request_begins_another_one() -> None:
    agent = BaseAgent("Guide", "g", client=ScriptedModel(["one", "two"]))
    app = FastAPI(lifespan=serving_lifespan(agent))
    app.include_router(agui_router(agent))
    body = {"threadId": "t", "runId": "r1", "messages": [{"id": "1", "role": "user", "content": "go"}]}
    with anyio.fail_after(20):
        async with app.router.lifespan_context(app):
            said = [data_of(await post(app, "/agui", body)) for _ in range(2)]
    assert [each["delta"] for told in said for each in told if each["type"] == "TEXT_MESSAGE_CONTENT"] == ["one", "two"]


async def test_an_interrupt_on_each_backend_without_a_server() -> None:
    model = ScriptedModel([answers.call("pay", {"euros": 7}), "well"])
    runs = ServedRuns(BaseAgent("Guide", "g", client=model).add_tool(pay))
    app = FastAPI()
    app.include_router(agui_router(runs))
    asked = {"threadId": "t", "runId": "r", "messages": [{"id": "1", "role": "user", "content": "pay"}]}
    with anyio.fail_after(5):
        async with serving_lifespan(runs)(app):
            first = data_of(await post(app, "/agui", asked))
            (interrupt,) = first[-1]["outcome"]["interrupts"]
            entry = {"interruptId": interrupt["id"], "status": "resolved", "payload": {"decision": "allow"}}
            second = data_of(await post(app, "/agui", {**asked, "resume": [entry]}))
    assert [each["content"] for each in second if each["type"] == "TOOL_CALL_RESULT"] == ["paid 7"]
    assert second[-1]["outcome"] == {"type": "success"}


async def test_runs_that_nobody_would_own_while_they_wait_are_refused() -> None:
    app = FastAPI()
    app.include_router(agui_router(BaseAgent("Guide", "g", client=ScriptedModel(["well"]))))
    asked = {"threadId": "t", "runId": "r", "messages": [{"id": "1", "role": "user", "content": "hi"}]}
    assert (await post(app, "/agui", asked)).status == 500  # its lifespan has not begun


def data_of(visit: Visit) -> list[dict[str, Any]]:
    frames = visit.body.decode().split("\n\n")
    events = [json.loads(frame.removeprefix("data: ")) for frame in frames if frame.startswith("data: ")]
    assert_allowed(events)
    return events
