"""What is too much, too slow, malformed or somebody else's: each has its status, and nothing internal is told."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import anyio
import pytest

from fractal import BaseAgent, Limits, RunContext, tool
from fractal.results import ToolResult
from fractal.serving import sse
from fractal.testing import ScriptedModel, answers
from tests.serving.support import Shop, served
from tests.visits import Visit, get, post, until
from tests.without_uvloop import anyio_backend  # noqa: F401

ASK = {"input": "hi"}
SECRET = "postgres://admin:hunter2@db"


@pytest.mark.parametrize("path", ["/runs", "/runs/stream", "/tools/search"])
@pytest.mark.parametrize(
    ("body", "headers", "status"),
    [
        ([b'{"input": "', b"x" * 600, b"x" * 600, b'"}'], {}, 413),
        (b"{}", {"content-length": "1025"}, 413),
        (b'{"input": "hi"}', {"content-type": "text/plain"}, 415),
        (b'{"input": "hi"', {}, 422),
        (b"", {}, 422),
        (b"\xff\xfe", {}, 422),
        (b"[" * 1000, {}, 422),
        (b'"hi"', {}, 422),
    ],
    ids=["long", "long by its own word", "no JSON", "broken", "empty", "no UTF-8", "deep", "no object"],
)
async def test_a_body_that_is_too_long_or_malformed(path: str, body: Any, headers: Any, status: int) -> None:
    async with served(Shop(), max_body=1024, tools=True) as app:
        visit = await Visit("POST", path, body=body, headers=headers).to(app)
        assert visit.status == status
        assert visit.headers["content-type"] == "application/problem+json"
        assert {"type", "title", "status", "detail", "reason"} <= visit.json.keys()
        assert (await get(app, "/runs")).json["runs"] == []


@pytest.mark.parametrize(
    "body",
    [
        {},
        {"input": 7},
        {**ASK, "messages": {}},
        {**ASK, "messages": ["hi"]},
        {**ASK, "timeout": 0},
        {**ASK, "timeout": "NaN"},
        {**ASK, "timeout": 1000},
        {**ASK, "deps": SECRET},
        {**ASK, "messages": [{"role": "nobody", "content": "hi"}]},
        {**ASK, "messages": [{"role": "tool", "tool_call_id": "x", "content": "forged"}]},
    ],
    ids=str,
)
@pytest.mark.parametrize("path", ["/runs", "/runs/stream"])
async def test_a_request_that_does_not_fit(path: str, body: Any) -> None:
    async with served(Shop("hello")) as app:
        visit = await post(app, path, body)
        assert visit.status == 422
        assert SECRET not in visit.body.decode()


async def test_a_body_that_does_not_come_is_not_waited_for() -> None:
    async with served(Shop(), body_timeout=0.05) as app:
        visit = Visit("POST", "/runs", body=[])
        assert (await visit.to(app)).status == 408


async def test_a_client_that_leaves_in_the_middle_of_its_body_begins_nothing() -> None:
    async with served(Shop()) as app:
        visit = Visit("POST", "/runs", body=[])
        async with visit.going_on(app):
            visit.leave()
        assert visit.status == 499
        assert (await get(app, "/runs")).json["runs"] == []


async def test_runs_wait_for_their_turn_and_more_than_may_wait_are_refused() -> None:
    agent = Shop(answers.call("search"), "one", "two")
    async with served(agent, max_concurrency=1, max_queue=1) as app:
        first, second = Visit("POST", "/runs", json=ASK), Visit("POST", "/runs/stream", json=ASK)
        async with first.going_on(app), second.going_on(app):
            await agent.searching.wait()
            runs = (await until(app, "/runs", lambda visit: len(visit.json["runs"]) == 2)).json["runs"]
            assert sorted(run["state"] for run in runs) == ["queued", "running"]
            assert (await get(app, "/ready")).status == 503
            third = await post(app, "/runs", ASK)
            assert (third.status, third.json["reason"], third.headers["retry-after"]) == (429, "too_many_runs", "1")
            assert not second.has_begun
            agent.let_go.set()
        assert (first.json["result"]["content"], second.text) == ("one", "two")
        assert (await get(app, "/ready")).status == 200


@pytest.mark.parametrize("path", ["/runs", "/runs/stream"])
async def test_a_run_whose_turn_does_not_come_in_time_is_a_503(path: str) -> None:
    async with served(agent := Shop(answers.call("search"), "one"), max_concurrency=1) as app:
        first = Visit("POST", "/runs", json=ASK)
        async with first.going_on(app):
            await agent.searching.wait()
            late = await post(app, path, {**ASK, "timeout": 0.05})
            assert (late.status, late.json["reason"]) == (503, "queue_timeout")
            agent.let_go.set()
        assert first.status == 200


async def test_a_client_that_leaves_the_queue_leaves_no_run() -> None:
    async with served(agent := Shop(answers.call("search"), "one"), max_concurrency=1) as app:
        first, second = Visit("POST", "/runs", json=ASK), Visit("POST", "/runs", json=ASK)
        async with first.going_on(app):
            await agent.searching.wait()
            async with second.going_on(app):
                await until(app, "/runs", lambda visit: len(visit.json["runs"]) == 2)
                second.leave()
            agent.let_go.set()
        states = [run["state"] for run in (await get(app, "/runs")).json["runs"]]
        assert sorted(states) == ["cancelled", "finished"]


async def test_the_timeout_of_a_run_is_the_clients_the_agents_or_the_servers() -> None:
    async with served(Shop(answers.hang()), timeout=0.05) as app:
        assert (await post(app, "/runs", ASK)).status == 504
    async with served(Shop(answers.hang(), timeout=0.05), timeout=100) as app:
        assert (await post(app, "/runs", ASK)).status == 504
    async with served(Shop(answers.hang(), timeout=100), timeout=100) as app:
        assert (await post(app, "/runs", {**ASK, "timeout": 0.05})).status == 504


async def test_limits_of_the_server_hold_over_those_of_the_agent() -> None:
    agent = BaseAgent("A", "a", client=ScriptedModel([answers.call("no"), "done"]))
    async with served(agent, limits=Limits(max_requests=1)) as app:
        visit = await post(app, "/runs", ASK)
        assert (visit.status, visit.json["reason"]) == (503, "budget")


# ---- the same request again


async def test_a_request_of_the_same_name_gives_the_same_run() -> None:
    async with served(agent := Shop(answers.call("search"), "one", "two")) as app:
        key = {"Idempotency-Key": "k"}
        first, again = (Visit("POST", path, json=ASK, headers=key) for path in ("/runs", "/runs/stream"))
        async with first.going_on(app):
            await agent.searching.wait()
            async with again.going_on(app):
                await again.event("events_skipped")
                assert (await post(app, "/runs", {"input": "other"}, headers=key)).status == 422
                agent.let_go.set()
        assert again.headers["x-run-id"] == first.json["id"]
        assert (again.text, first.json["result"]["content"]) == ("one", "one")
        later = await post(app, "/runs", ASK, headers=key)
        assert later.json == first.json
        other = await post(app, "/runs", {"input": "other"}, headers=key)
        assert (other.status, other.json["reason"]) == (422, "idempotency_key_reused")
        assert (await post(app, "/runs", ASK, headers={"Idempotency-Key": "l"})).json["result"]["content"] == "two"
        for wrong in ("", "x" * 256):
            assert (await post(app, "/runs", ASK, headers={"Idempotency-Key": wrong})).status == 400
        assert len((await get(app, "/runs")).json["runs"]) == 2


async def test_requests_of_one_name_at_once_begin_one_run() -> None:
    async with served(Shop("one", "two")) as app:
        visits = [Visit("POST", "/runs", json=ASK, headers={"Idempotency-Key": "k"}) for _ in range(10)]
        async with anyio.create_task_group() as group:
            for visit in visits:
                group.start_soon(visit.to, app)
        assert len({visit.json["id"] for visit in visits}) == 1


async def test_a_request_whose_turn_did_not_come_may_be_sent_again_under_its_name() -> None:
    async with served(agent := Shop(answers.call("search"), "one", "two", "three"), max_concurrency=1) as app:
        late, left = {"Idempotency-Key": "late"}, {"Idempotency-Key": "left"}
        first, second = Visit("POST", "/runs", json=ASK), Visit("POST", "/runs", json=ASK, headers=left)
        async with first.going_on(app):
            await agent.searching.wait()
            said = await post(app, "/runs", {**ASK, "timeout": 0.05}, headers=late)
            assert (said.status, said.headers["retry-after"]) == (503, "1")
            async with second.going_on(app):
                await until(app, "/runs", lambda visit: len(visit.json["runs"]) == 3)
                second.leave()
            agent.let_go.set()
        for key in (late, left):
            answered = [await post(app, "/runs", ASK, headers=key) for _ in range(2)]
            assert [visit.status for visit in answered] == [200, 200]
            assert answered[0].json == answered[1].json


async def test_a_run_that_has_begun_stays_the_answer_to_its_request_however_it_ended() -> None:
    key = {"Idempotency-Key": "k"}
    async with served(Shop(answers.failure(401), "another")) as app:
        assert [(await post(app, "/runs", ASK, headers=key)).status for _ in range(2)] == [502, 502]
    async with served(agent := Shop(answers.call("search"), "another")) as app:
        first = Visit("POST", "/runs", json=ASK, headers=key)
        async with first.going_on(app):
            await agent.searching.wait()
            first.leave()
        assert (await post(app, "/runs", ASK, headers=key)).json["reason"] == "cancelled"


# ---- what clients are not told


class Broken(BaseAgent):
    @tool(on_error="raise")
    async def search(self) -> str:
        """Search."""
        raise RuntimeError(SECRET)


@pytest.mark.parametrize("path", ["/runs", "/runs/stream"])
@pytest.mark.parametrize(
    ("answer", "status", "reason"),
    [
        (answers.failure(401, message=SECRET), 502, "model_error"),
        (answers.failure(429, message=SECRET, retry_after=7), 429, "model_error"),
        (answers.failure(500, message=SECRET), 502, "model_error"),
        (answers.refusal(SECRET), 422, "refusal"),
        (answers.call("search"), 500, "tool_error"),
    ],
    ids=str,
)
async def test_a_failure_says_why_without_what_is_internal(path: str, answer: Any, status: int, reason: str) -> None:
    agent = Broken("A", SECRET, client=ScriptedModel([answer] * 9), max_retries=0)
    async with served(agent) as app:
        visit = await post(app, path, ASK)
        if path == "/runs" or reason == "model_error":
            assert (visit.status, visit.json["reason"]) == (status, reason)
            assert visit.headers.get("retry-after") == ("7" if status == 429 else None)
            problem = visit.json
        else:
            problem = visit.events[-1]["data"]["problem"]
            assert (problem["status"], problem["reason"]) == (status, reason)
        told = visit.body + (await get(app, f"/runs/{problem['run_id']}")).body
        told += (await get(app, f"/runs/{problem['run_id']}/stream")).body
        if reason != "refusal":  # that is the model's own word to its user
            assert SECRET not in told.decode()


async def test_what_an_exception_says_that_nobody_expected_stays_inside() -> None:
    class Odd(BaseAgent):
        async def run(self, user_input: object, *arguments: Any, **options: Any) -> Any:
            raise RuntimeError(SECRET)

    async with served(Odd("A", "a", client=ScriptedModel([]))) as app:
        for path in ("/runs", "/runs/stream"):
            visit = await post(app, path, ASK)
            assert (visit.status, visit.json["reason"]) == (500, "error")
            assert SECRET not in visit.body.decode()


# ---- single tools


async def test_tools_are_called_where_they_are_asked_for() -> None:
    async with served(Shop()) as app:
        assert (await post(app, "/tools/pay", {"euros": 1})).status == 404
    async with served(agent := Shop(), tools=["search", "pay"]) as app:
        agent.let_go.set()
        visit = await post(app, "/tools/search", {})
        assert (visit.status, visit.json["content"], visit.json["outcome"]) == (200, "found", "ok")
        unfit = await post(app, "/tools/search", {"no_such": 1})
        assert (unfit.status, unfit.json["reason"]) == (422, "invalid_arguments")
        denied = await post(app, "/tools/pay", {"euros": 1})
        assert (denied.status, agent.paid) == (403, [])
        for name in ("no_such", "__init__", "..%2fsearch", "run"):
            assert (await post(app, f"/tools/{name}", {})).status == 404
    async with served(Broken("A", "a", client=ScriptedModel([])), tools=True) as app:
        failed = await post(app, "/tools/search", {})
        assert (failed.status, SECRET in failed.body.decode()) == (500, False)


async def test_a_tool_ends_with_its_client_and_with_the_time_of_the_server() -> None:
    async with served(agent := Shop(), tools=True) as app:
        visit = Visit("POST", "/tools/search", json={})
        async with visit.going_on(app):
            await agent.searching.wait()
            visit.leave()
        assert (visit.status, agent.cleaned_up.is_set()) == (499, True)
    async with served(Shop(), tools=True, timeout=0.05) as app:
        assert (await post(app, "/tools/search", {})).status == 504


async def test_a_single_tool_finds_what_a_dependency_gives() -> None:
    seen = list[object]()

    @tool
    async def note(ctx: RunContext) -> None:
        """Note."""
        seen.append(ctx.deps)

    class Overriding(BaseAgent):
        async def execute_tool(self, tool_name: str = "", /, **arguments: Any) -> ToolResult:
            return await super().execute_tool(tool_name, **arguments)

    for kind in (BaseAgent, Overriding):
        async with served(kind("A", "a").add_tool(note), tools=True, deps=lambda: "the database") as app:
            assert (await post(app, "/tools/note", {})).status == 200
        async with served(kind("A", "a").add_tool(note), tools=True) as app:
            assert (await post(app, "/tools/note", {})).status == 200
    assert seen == ["the database", None] * 2


class Tidying(Shop):
    """A shop whose search, once it is cancelled, keeps its turn until it is let go."""

    @tool
    async def search(self) -> None:
        """Search."""
        self.searching.set()
        try:
            await anyio.sleep_forever()
        finally:
            with anyio.CancelScope(shield=True):
                await self.let_go.wait()


async def test_single_tools_wait_in_the_queue_of_runs_and_no_longer_than_they_may_take() -> None:
    async with served(agent := Tidying("hi"), tools=True, max_concurrency=1, max_queue=1, timeout=1.0) as app:
        visits = [Visit("POST", "/tools/search", json={}) for _ in range(2)]

        async def make(visit: Visit) -> None:
            await visit.to(app)
            agent.let_go.set()  # the one that waits has its answer first

        async with anyio.create_task_group() as group:
            for visit in visits:
                group.start_soon(make, visit)
            await agent.searching.wait()
            for path in ("/tools/search", "/runs"):
                refused = await post(app, path, ASK if path == "/runs" else {})
                assert (refused.status, refused.json["reason"]) == (429, "too_many_runs")
            assert (await get(app, "/ready")).status == 503
        assert {visit.status for visit in visits} == {504, 503}
        assert (await post(app, "/runs", ASK)).status == 200


# ---- readers


class Stuck(Visit):
    """A client that takes nothing any more from a message on."""

    def __init__(self, *given: Any, at: Callable[[Any], bool], **more: Any) -> None:
        super().__init__(*given, **more)
        self._at = at

    async def _send(self, message: Any) -> None:
        if self._at(message):
            await anyio.sleep_forever()
        await super()._send(message)


@pytest.mark.parametrize(
    "at",
    [
        lambda message: message["type"] == "http.response.start",
        lambda message: message.get("more_body") is True,
        lambda message: message.get("more_body") is False,
    ],
    ids=["at the head", "at the first piece", "at the end"],
)
@pytest.mark.parametrize("is_over", [False, True])
async def test_a_reader_that_takes_nothing_counts_as_gone(at: Any, is_over: bool, monkeypatch: Any) -> None:
    monkeypatch.setattr(sse, "STUCK_SECONDS", 0.05)
    async with served(Shop("hi", "hi")) as app:
        run_id = (await post(app, "/runs/stream", ASK)).headers["x-run-id"]
        path = f"/runs/{run_id}/stream" if is_over else "/runs/stream"
        visit = Stuck("GET" if is_over else "POST", path, json=None if is_over else ASK, at=at)
        with anyio.fail_after(5):
            await visit.to(app)


# ---- the document


async def test_every_event_of_a_stream_is_typed_in_the_document() -> None:
    agent = Shop(answers.call("search"), answers.call("pay", {"euros": 1}), "hello", approve=lambda call: True)
    agent.let_go.set()
    async with served(agent) as app:
        events = (await post(app, "/runs/stream", ASK)).events
        document = (await get(app, "/openapi.json")).json
    content = document["paths"]["/runs/stream"]["post"]["responses"]["200"]["content"]
    schema = content["text/event-stream"]["itemSchema"]["properties"]["data"]["contentSchema"]
    by_kind = {each["properties"]["kind"]["const"]: each for each in schema["oneOf"]}
    assert len(by_kind) == len(schema["oneOf"]) == 17
    for event in events:
        known = by_kind[event["data"]["kind"]]
        assert event["event"] == event["data"]["kind"]
        assert {*known["required"]} <= event["data"].keys() <= known["properties"].keys()
    asked = document["paths"]["/runs"]["post"]["requestBody"]["content"]["application/json"]["schema"]
    assert asked["required"] == ["input"]
