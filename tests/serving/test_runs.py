"""Runs over HTTP: asked for, watched, listed and ended."""

from __future__ import annotations

import logging
import uuid
from typing import Any

import anyio
import pytest
from fastapi import FastAPI, Header

from fractal import BaseAgent, RunContext, tool
from fractal.errors import InvalidArguments
from fractal.serving import (
    MemoryStore,
    RunRecord,
    ServedRuns,
    agent_router,
    openai_router,
    request_id,
    serving_lifespan,
)
from fractal.serving.agui import agui_router
from fractal.testing import ScriptedModel, answers
from tests.serving.support import Shop, Words, served
from tests.visits import Visit, delete, get, post, until

ASK = {"input": "hi"}


async def test_a_run_is_answered_when_it_is_done() -> None:
    async with served(Shop("hello")) as app:
        visit = await post(app, "/runs", ASK)
        assert (visit.status, visit.json["state"], visit.json["agent"]) == (200, "finished", "Shop")
        result = visit.json["result"]
        assert (result["content"], result["success"], result["error"]) == ("hello", True, None)
        assert [message["role"] for message in result["messages"]] == ["user", "assistant"]
        assert visit.headers["x-run-id"] == visit.json["id"]
        assert (await get(app, f"/runs/{visit.json['id']}")).json == visit.json


async def test_a_conversation_goes_on_with_the_messages_of_its_result() -> None:
    agent = Shop("one", "two")
    async with served(agent) as app:
        first = (await post(app, "/runs", ASK)).json["result"]
        second = (await post(app, "/runs", {**ASK, "messages": first["messages"]})).json["result"]
    assert [message["content"] for message in second["messages"]] == ["hi", "one", "hi", "two"]


async def test_an_application_without_its_lifespan_serves_too() -> None:
    app = FastAPI()
    app.include_router(agent_router(Shop("hello", "again")), prefix="/api")
    with anyio.fail_after(5):
        assert (await post(app, "/api/runs", ASK)).json["result"]["content"] == "hello"
        assert (await post(app, "/api/runs/stream", ASK)).text == "again"


async def test_the_router_opens_its_agents_where_nobody_else_does() -> None:
    async with served(agent := Shop(answers.call("search"), "done"), lifespan=False, on_disconnect="detach") as app:
        visit = Visit("POST", "/runs", json=ASK)
        async with visit.going_on(app):
            await agent.searching.wait()
            visit.leave()
        agent.let_go.set()
        [listed] = (await get(app, "/runs")).json["runs"]
        await until(app, f"/runs/{listed['id']}", lambda visit: visit.json["state"] == "finished")


async def test_a_detached_run_without_a_lifespan_is_refused_and_the_log_says_what_to_do(
    caplog: pytest.LogCaptureFixture,
) -> None:
    app = FastAPI()
    app.include_router(agent_router(Shop("hello"), on_disconnect="detach"))
    for path in ("/runs", "/runs/stream"):
        visit = await post(app, path, ASK)
        assert (visit.status, visit.json["reason"]) == (500, "error")
        assert "serving_lifespan" in caplog.text
        assert "serving_lifespan" not in visit.body.decode()


async def test_a_stream_gives_the_events_of_a_run_under_ids_that_grow() -> None:
    async with served(Shop("hello")) as app:
        visit = await post(app, "/runs/stream", ASK)
        assert (visit.status, visit.headers["content-type"]) == (200, "text/event-stream; charset=utf-8")
        kinds = ["run_started", "model_requested", "text_delta", "model_responded", "run_finished"]
        assert [event["event"] for event in visit.events] == kinds
        run_id = visit.headers["x-run-id"]
        assert [event["id"] for event in visit.events] == [f"{run_id}.{number}" for number in range(1, 6)]
        assert {event["data"]["run_id"] for event in visit.events} == {run_id}
        assert visit.text == visit.events[-1]["data"]["result"]["content"] == "hello"


@pytest.mark.parametrize("path", ["/runs", "/runs/stream"])
async def test_a_run_is_watched_by_readers_that_come_late_and_by_those_that_come_back(path: str) -> None:
    async with served(agent := Shop(answers.call("search"), "the answer")) as app:
        first = Visit("POST", path, json=ASK)
        async with first.going_on(app):
            await agent.searching.wait()
            [listed] = (await get(app, "/runs")).json["runs"]
            watch = f"/runs/{listed['id']}/stream"
            late = Visit("GET", watch)
            async with late.going_on(app):
                await late.event("tool_started" if path == "/runs/stream" else "events_skipped")
                agent.let_go.set()
        assert late.text == "the answer"
        after = await get(app, watch)
        assert [event["data"] for event in after.events] == [event["data"] for event in late.events]
        back = await get(app, watch, headers={"Last-Event-ID": late.events[2]["id"]})
        assert back.events == late.events[3:]
        again = await post(app, "/runs/stream", ASK, headers={"Last-Event-ID": late.events[2]["id"]})
        assert again.events == late.events[3:]


async def test_a_reader_of_a_run_that_nobody_has_watched_is_told_its_text() -> None:
    async with served(Shop("the answer")) as app:
        run_id = (await post(app, "/runs", ASK)).json["id"]
        late = await get(app, f"/runs/{run_id}/stream")
        assert [event["event"] for event in late.events] == ["events_skipped", "run_finished"]
        assert (late.events[0]["data"]["skipped"], late.text) == (None, "the answer")
        assert (await get(app, f"/runs/{run_id}")).json["text"] == "the answer"


@pytest.mark.parametrize("bounds", [{"max_events": 10}, {"max_bytes": 3000}], ids=str)
async def test_what_a_reader_has_missed_for_good_is_told_with_the_text_so_far(bounds: dict[str, int]) -> None:
    text = " ".join(map(str, range(100)))
    async with served(BaseAgent("A", "a", client=Words(text)), **bounds) as app:
        run_id = (await post(app, "/runs/stream", ASK)).headers["x-run-id"]
        late = await get(app, f"/runs/{run_id}/stream")
        gap, *others = late.events
        assert (gap["event"], gap["data"]["skipped"]) == ("events_skipped", int(gap["id"].partition(".")[2]))
        assert others[-1]["event"] == "run_finished"
        assert sum(each["event"] == "text_delta" for each in others) >= 3
        assert late.text == text


@pytest.mark.parametrize(
    ("last", "status"),
    [("run_" + "0" * 32 + ".1", 400), ("7", 400), ("{id}.9999", 400), ("{id}.-1", 400), ("{id}.1\u0661", 400)],
)
async def test_a_last_event_id_that_is_none_of_the_run_is_refused(last: str, status: int) -> None:
    async with served(Shop("hello")) as app:
        run_id = (await post(app, "/runs", ASK)).json["id"]
        headers = {"Last-Event-ID": last.format(id=run_id)}
        visit = await get(app, f"/runs/{run_id}/stream", headers=headers)
        assert (visit.status, visit.json["reason"]) == (status, "last_event_id")


@pytest.mark.parametrize("on_disconnect", ["cancel", "detach"])
@pytest.mark.parametrize("path", ["/runs", "/runs/stream"])
async def test_a_run_that_is_deleted_has_ended_before_the_answer(path: str, on_disconnect: Any) -> None:
    async with served(agent := Shop(answers.call("search")), on_disconnect=on_disconnect) as app:
        visit = Visit("POST", path, json=ASK)
        async with visit.going_on(app):
            await agent.searching.wait()
            [run] = (await get(app, "/runs")).json["runs"]
            ended = await delete(app, f"/runs/{run['id']}")
            assert agent.cleaned_up.is_set()
        assert (ended.status, ended.json["state"]) == (200, "cancelled")
        assert (await delete(app, f"/runs/{run['id']}")).json == ended.json
        if path == "/runs":
            assert (visit.status, visit.json["reason"], visit.json["run_id"]) == (409, "cancelled", run["id"])
        else:
            end = visit.events[-1]["data"]
            assert (end["kind"], end["state"], end["problem"]["reason"]) == ("run_finished", "cancelled", "cancelled")


# ---- the end of the server


@pytest.mark.parametrize("on_disconnect", ["cancel", "detach"])
async def test_runs_have_a_grace_at_the_end_of_the_server_and_those_cancelled_then_are_told_of(
    on_disconnect: Any, caplog: pytest.LogCaptureFixture
) -> None:
    agent = Shop(answers.call("search"), "done")
    visit = Visit("POST", "/runs/stream", json=ASK)
    async with anyio.create_task_group() as group, served(agent, on_disconnect=on_disconnect, grace=0.05) as app:
        group.start_soon(visit.to, app)
        await agent.searching.wait()
        await visit.event("tool_started")
    assert agent.cleaned_up.is_set()
    end = visit.events[-1]["data"]
    assert (end["kind"], end["problem"]["detail"]) == ("run_finished", "the server was shut down")
    assert f"run {end['run_id']} has not finished within the grace" in caplog.text


async def test_the_end_of_the_server_waits_until_runs_are_kept_whose_requests_it_has_cut() -> None:
    class Slow(MemoryStore):
        async def save(self, record: RunRecord) -> None:
            await anyio.sleep(0.05)
            await super().save(record)

    async def ask(app: FastAPI) -> None:
        with request:
            await post(app, "/runs", ASK)

    agent, store, request = Shop(answers.call("search"), "done"), Slow(), anyio.CancelScope()
    async with anyio.create_task_group() as group:
        async with served(agent, store=store) as app:
            group.start_soon(ask, app)
            await agent.searching.wait()
            request.cancel()  # as servers do with what is not done in time, before they end the lifespan
        [run] = await store.page(None, None, 10)
    assert run.state == "cancelled"


async def test_a_run_that_ends_within_the_grace_is_not_cut_and_none_begins_meanwhile() -> None:
    agent, later = Shop(answers.call("search"), "done"), list[Visit]()
    async with anyio.create_task_group() as group, served(agent, on_disconnect="detach", grace=5) as app:
        visit = Visit("POST", "/runs", json=ASK)
        group.start_soon(visit.to, app)
        await agent.searching.wait()

        async def at_the_end() -> None:
            await until(app, "/ready", lambda visit: visit.status == 503)
            later.append(await post(app, "/runs", ASK))
            agent.let_go.set()

        group.start_soon(at_the_end)
    assert visit.json["result"]["content"] == "done"
    assert (later[0].status, later[0].json["reason"]) == (503, "shutting_down")
    assert later[0].headers["retry-after"] == "5"


# ---- lists, owners, names


async def test_runs_are_listed_by_pages_the_newest_first() -> None:
    async with served(Shop(*"abcde")) as app:
        ids = [(await post(app, "/runs", ASK)).json["id"] for _ in range(5)]
        listed, following = list[str](), "/runs?limit=2"
        while following:
            page = (await get(app, following)).json
            assert len(page["runs"]) <= 2
            listed += [run["id"] for run in page["runs"]]
            following = page["next"] and f"/runs?limit=2&before={page['next']}"
        assert listed == ids[::-1]
        assert (await get(app, "/runs?limit=0")).status == 422
        assert (await get(app, "/runs?before=x")).status == 400


async def test_an_owner_sees_and_ends_and_answers_own_runs_alone() -> None:
    def who(x_user: str = Header()) -> str:
        return x_user

    ann, bob = {"x-user": "ann"}, {"x-user": "bob"}
    agent = Shop(answers.call("pay", {"euros": 5}), "done", "bob's")
    async with served(agent, owner=who) as app:
        visit = Visit("POST", "/runs/stream", json=ASK, headers={**ann, "Idempotency-Key": "k"})
        async with visit.going_on(app):
            asked = (await visit.event("approval_requested"))["data"]
            path = f"/runs/{asked['run_id']}"
            answer = f"{path}/approvals/{asked['approval_id']}"
            assert (await get(app, path, headers=bob)).status == 404
            assert (await get(app, f"{path}/stream", headers=bob)).status == 404
            assert (await delete(app, path, headers=bob)).status == 404
            assert (await post(app, answer, {"decision": "allow"}, headers=bob)).status == 404
            assert (await get(app, "/runs", headers=bob)).json["runs"] == []
            assert (await post(app, answer, {"decision": "deny"}, headers=ann)).status == 204
        others = await post(app, "/runs", ASK, headers={**bob, "Idempotency-Key": "k"})
        assert others.json["result"]["content"] == "bob's"
        assert (await get(app, path, headers=bob)).status == 404
        assert (await get(app, path, headers=ann)).json["result"]["content"] == "done"
        assert (await get(app, path)).status == 422  # who asks is not said


@pytest.mark.parametrize("nobody", [None, "", "  "])
async def test_a_request_of_nobodys_is_refused_and_asks_no_model(nobody: str | None) -> None:
    agent = Shop()
    async with served(agent, owner=lambda: nobody, tools=True) as app:
        app.include_router(openai_router(agent, owner=lambda: nobody), prefix="/openai")
        app.include_router(agui_router(agent, owner=lambda: nobody), prefix="/front")
        for path in ("/runs", "/runs/stream", "/tools/search", "/openai/v1/chat/completions", "/front/agui"):
            refused = await post(app, path, ASK)
            assert refused.status == 401
            assert "it is not known who asks" in str(refused.json)
        assert (await get(app, "/runs")).json["reason"] == "unknown_owner"
        assert (await get(app, "/runs/run_x")).status == 401
        assert (await get(app, "/openai/v1/models")).json["error"]["code"] == "unknown_owner"
    assert not agent.searching.is_set()


@pytest.mark.parametrize("odd", [True, object(), ["ann"]], ids=["a flag", "an object", "a list"])
async def test_an_owner_that_is_no_text_is_the_applications_mistake(
    odd: object, caplog: pytest.LogCaptureFixture
) -> None:
    async with served(Shop(), owner=lambda: odd) as app:
        assert (await post(app, "/runs", ASK)).status == 500
    assert "owner= gave" in caplog.text


@pytest.mark.parametrize("owner", [7, uuid.UUID(int=7)])
async def test_numbers_and_uuids_are_owners(owner: object) -> None:
    async with served(Shop("done"), owner=lambda: owner) as app:
        run_id = (await post(app, "/runs", ASK)).json["id"]
        assert [run["id"] for run in (await get(app, "/runs")).json["runs"]] == [run_id]


@pytest.mark.parametrize("on_disconnect", ["cancel", "detach"])
def test_a_hook_that_exits_ends_its_run_and_no_server(on_disconnect: str, backend: str) -> None:
    async def leave(answer: str) -> str:
        raise SystemExit(3)

    agent = BaseAgent("A", "a", client=ScriptedModel(["one", "two"]))
    agent.output_validator(leave)

    async def ask() -> list[tuple[int, Any]]:
        async with served(agent, on_disconnect=on_disconnect) as app:
            answered, streamed = await post(app, "/runs", ASK), await post(app, "/runs/stream", ASK)
            listed = (await get(app, "/runs")).json["runs"]
        return [(answered.status, answered.json["reason"]), (streamed.status, [run["state"] for run in listed])]

    try:
        seen: Any = anyio.run(ask, backend=backend)
    except BaseException as error:  # which would end pytest as well
        seen = error
    assert seen == [(500, "error"), (200, ["failed", "failed"])]


async def test_the_agent_is_chosen_by_its_name() -> None:
    async with served({"one": Shop("first"), "two": Shop("second")}) as app:
        assert (await post(app, "/runs", ASK)).json["result"]["content"] == "first"
        assert (await post(app, "/runs", {**ASK, "agent": "two"})).json["result"]["content"] == "second"
        for name in ("three", "../one", "__class__"):
            assert (await post(app, "/runs", {**ASK, "agent": name})).status == 404
        assert (await get(app, "/health")).json == {"status": "ok", "agents": ["one", "two"]}


async def test_tools_find_what_a_dependency_gives() -> None:
    seen = list[object]()

    @tool
    async def note(ctx: RunContext) -> str:
        """Note."""
        seen.append(ctx.deps)
        return "noted"

    agent = BaseAgent("A", "a", client=ScriptedModel([answers.call("note"), "done"])).add_tool(note)
    async with served(agent, deps=lambda: "the database") as app:
        assert (await post(app, "/runs", ASK)).status == 200
    assert seen == ["the database"]


# ---- ids of requests


@pytest.mark.parametrize("path", ["/runs", "/runs/stream"])
@pytest.mark.parametrize("on_disconnect", ["cancel", "detach"])
async def test_the_id_of_a_request_comes_back_and_is_in_the_log_and_found_by_tools(
    path: str, on_disconnect: str, caplog: pytest.LogCaptureFixture
) -> None:
    seen = list[str | None]()

    @tool
    async def look() -> str:
        """Look."""
        seen.append(request_id.get())
        return "seen"

    agent = BaseAgent("A", "a", client=ScriptedModel([answers.call("look"), "done", "done"])).add_tool(look)
    with caplog.at_level(logging.INFO, "fractal"):
        async with served(agent, on_disconnect=on_disconnect) as app:
            visit = await post(app, path, ASK, headers={"X-Request-ID": "mine-1"})
            assert visit.headers["x-request-id"] == "mine-1"
            forged = await post(app, path, ASK, headers={"X-Request-ID": "a\tb"})
            assert forged.headers["x-request-id"].startswith("req_")
    assert seen == ["mine-1"]
    assert f"run {visit.headers['x-run-id']} of agent 'A' begins for request mine-1" in caplog.text


# ---- settings


@pytest.mark.parametrize(
    "options",
    [
        {"on_disconnect": "stop"},
        {"timeout": 0},
        {"timeout": float("inf")},
        {"max_concurrency": 0},
        {"max_queue": -1},
        {"max_events": 0},
        {"max_bytes": True},
        {"max_body": 0},
        {"keep_alive": 0},
        {"body_timeout": -1},
        {"tools": ["no_such"]},
    ],
)
def test_settings_that_cannot_be_meant_are_refused(options: dict[str, Any]) -> None:
    with pytest.raises(InvalidArguments, match=next(iter(options))):
        agent_router(Shop(), **options)


@pytest.mark.parametrize("agents", [{}, {"": Shop()}, "Shop", {"a": Shop}, {1: Shop()}], ids=str)
def test_what_is_no_agent_is_not_served(agents: Any) -> None:
    with pytest.raises(InvalidArguments):
        agent_router(agents)
    with pytest.raises(InvalidArguments):
        serving_lifespan(agents)


def test_routers_that_share_runs_take_no_options_of_theirs() -> None:
    with pytest.raises(InvalidArguments, match="max_queue"):
        agent_router(ServedRuns(Shop()), max_queue=1)
    with pytest.raises(InvalidArguments, match="grace"):
        serving_lifespan(Shop(), grace=-1)


async def test_the_store_forgets_what_ended_first() -> None:
    async with served(Shop(*"abc"), store=MemoryStore(max_runs=2)) as app:
        ids = [(await post(app, "/runs", ASK)).json["id"] for _ in range(3)]
        assert [(await get(app, f"/runs/{each}")).status for each in ids] == [404, 200, 200]
    async with served(Shop("a" * 2000, "b" * 2000), store=MemoryStore(max_bytes=9000)) as app:
        ids = [(await post(app, "/runs", ASK)).json["id"] for _ in range(2)]
        assert [(await get(app, f"/runs/{each}")).status for each in ids] == [404, 200]
    for wrong in ({"max_runs": 0}, {"max_bytes": "1"}):
        with pytest.raises(InvalidArguments):
            MemoryStore(**wrong)  # type: ignore[arg-type]
