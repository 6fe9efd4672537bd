"""Tool calls that wait for approval, which comes in another request."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import pytest
from fastapi import FastAPI

from fractal import Allow, BaseAgent, tool
from fractal.testing import ScriptedModel, answers
from tests.serving.support import Shop, served
from tests.visits import Visit, delete, get, post, until

ASK = {"input": "hi"}
PAY = answers.call("pay", {"euros": 5}, id="call_1")


@asynccontextmanager
async def asking(app: FastAPI, path: str = "/runs/stream") -> AsyncIterator[tuple[Visit, dict[str, Any], str]]:
    """A run with a call that waits, what is shown of that, and where it is answered."""
    visit = Visit("POST", path, json=ASK)
    async with visit.going_on(app):
        listed = await until(app, "/runs", lambda visit: visit.json["runs"] and visit.json["runs"][0]["pending"])
        run = listed.json["runs"][0]
        [pending] = run["pending"]
        yield visit, pending, f"/runs/{run['id']}/approvals/{pending['approval_id']}"


@pytest.mark.parametrize("path", ["/runs", "/runs/stream"])
async def test_a_call_is_made_when_it_is_allowed(path: str) -> None:
    async with served(agent := Shop(PAY, "thanks")) as app:
        async with asking(app, path) as (visit, pending, answer):
            facts = (pending["tool_name"], pending["call_id"], pending["arguments"], pending["description"])
            assert facts == ("pay", "call_1", {"euros": 5}, "Pay.")
            if path == "/runs/stream":
                assert (await visit.event("approval_requested"))["data"] == pending
            assert agent.paid == []
            assert (await post(app, answer, {"decision": "allow"})).status == 204
        assert agent.paid == [{"euros": 5, "to": "me"}]
        [run] = (await get(app, "/runs")).json["runs"]
        assert (run["state"], run["pending"]) == ("finished", [])


@pytest.mark.parametrize("path", ["/runs", "/runs/stream"])
async def test_a_client_is_asked_also_by_an_agent_with_a_run_of_its_own(path: str) -> None:
    class Twice(Shop):
        async def run(self, user_input: Any, *arguments: Any, **options: Any) -> Any:
            await super().run("first", *arguments, **options)
            return await super().run(user_input, *arguments, **options)

    async with served(agent := Twice("the first answer", PAY, "thanks")) as app:
        async with asking(app, path) as (_, _, answer):
            assert (await post(app, answer, {"decision": "allow"})).status == 204
        assert agent.paid == [{"euros": 5, "to": "me"}]
        [run] = (await get(app, "/runs")).json["runs"]
        assert (run["state"], run["pending"]) == ("finished", [])


async def test_the_model_is_told_why_a_call_is_denied() -> None:
    async with served(agent := Shop(PAY, "sorry")) as app:
        async with asking(app) as (visit, _, answer):
            await post(app, answer, {"decision": "deny", "reason": "too dear"})
        assert agent.paid == []
        said = visit.events[-1]["data"]["result"]["messages"][2]["content"]
        assert "too dear" in said
        answered = next(each["data"] for each in visit.events if each["event"] == "approval_answered")
        assert (answered["is_allowed"], answered["reason"]) == (False, "too dear")


async def test_a_call_is_made_with_the_arguments_that_were_allowed_and_not_with_what_does_not_fit() -> None:
    async with served(agent := Shop(PAY, "thanks", answers.call("pay", {"euros": 7}), "no")) as app:
        async with asking(app) as (_, _, answer):
            changed = {"decision": "allow", "arguments": {"euros": 3, "to": "you"}}
            assert (await post(app, answer, changed)).status == 204
        assert agent.paid == [{"euros": 3, "to": "you"}]
        async with asking(app) as (visit, _, answer):
            await post(app, answer, {"decision": "allow", "arguments": {"euros": "all of it", "from": "him"}})
        assert len(agent.paid) == 1
        assert "do not fit" in visit.events[-1]["data"]["result"]["messages"][2]["content"]


async def test_only_calls_that_wait_are_answered_and_each_once() -> None:
    async with served(agent := Shop(PAY, "thanks")) as app:
        async with asking(app) as (_, pending, answer):
            run = f"/runs/{pending['run_id']}"
            allow = {"decision": "allow"}
            for forged in ("call_2", "pay", "../call_1", "%2e%2e", "call_1/", "__class__", "run_started"):
                visit = await post(app, f"{run}/approvals/{forged}", allow)
                assert (visit.status, visit.json["reason"]) == (404, "unknown_approval")
            assert (await post(app, f"/runs/run_{'0' * 32}/approvals/call_1", allow)).status == 404
            for wrong in ({}, {"decision": "yes"}, {**allow, "more": 1}, {"decision": "deny", "arguments": {}}, []):
                assert (await post(app, answer, wrong)).status == 422
            assert agent.paid == []
            assert (await post(app, answer, {"decision": "deny"})).status == 204
            again = await post(app, answer, allow)
            assert (again.status, again.json["reason"]) in ((409, "already_answered"), (409, "run_ended"))
        assert agent.paid == []
        assert (await post(app, answer, allow)).status == 409


async def test_an_answer_never_meets_a_later_call_of_the_same_id() -> None:
    async with served(agent := Shop(PAY, PAY, "thanks")) as app:
        async with asking(app) as (visit, _, first):
            await post(app, first, {"decision": "allow"})
            asked = await visit.event("approval_requested", 2)
            assert (await post(app, first, {"decision": "allow"})).status == 409
            assert len(agent.paid) == 1
            path = f"{first.rpartition('/')[0]}/{asked['data']['approval_id']}"
            assert (await post(app, path, {"decision": "deny"})).status == 204
        assert len(agent.paid) == 1


async def test_calls_of_delegates_wait_too_each_under_an_id_of_its_own() -> None:
    paid = list[int]()

    @tool(requires_approval=True)
    async def pay(euros: int) -> str:
        """Pay."""
        paid.append(euros)
        return "paid"

    def clerk(name: str, euros: int) -> BaseAgent:
        model = ScriptedModel([answers.call("pay", {"euros": euros}, id="call_1"), "done"])
        return BaseAgent(name, "a", client=model).add_tool(pay)

    asks = answers.calls(answers.call("ann", {"query": "pay"}), answers.call("bob", {"query": "pay"}))
    boss = BaseAgent("Boss", "a", client=ScriptedModel([asks, "all done"]))
    boss.register_delegate(clerk("Ann", 1), "ann")
    boss.register_delegate(clerk("Bob", 2), "bob")
    async with served(boss) as app:
        visit = Visit("POST", "/runs/stream", json=ASK)
        async with visit.going_on(app):
            asked = [(await visit.event("approval_requested", number))["data"] for number in (1, 2)]
            run = visit.headers["x-run-id"]
            assert len({each["approval_id"] for each in asked}) == 2
            for each in asked:
                decision = "allow" if each["agent_name"] == "Bob" else "deny"
                await post(app, f"/runs/{run}/approvals/{each['approval_id']}", {"decision": decision})
    assert paid == [2]


async def test_a_call_that_nobody_answers_ends_with_the_deadline_of_its_run() -> None:
    async with served(agent := Shop(PAY, "thanks")) as app:
        visit = await post(app, "/runs", {**ASK, "timeout": 0.05})
        assert (visit.status, visit.json["reason"]) == (504, "deadline")
        [run] = (await get(app, "/runs")).json["runs"]
        assert (run["state"], run["pending"], agent.paid) == ("failed", [], [])
        stream = await get(app, f"/runs/{run['id']}/stream")
        assert [each["event"] for each in stream.events] == ["approval_requested", "events_skipped", "run_finished"]
        assert stream.events[-1]["data"]["problem"]["reason"] == "deadline"


async def test_a_run_that_waits_for_approval_can_be_cancelled() -> None:
    async with served(agent := Shop(PAY, "thanks")) as app, asking(app) as (_, pending, answer):
        await delete(app, f"/runs/{pending['run_id']}")
        assert (await post(app, answer, {"decision": "allow"})).status == 409
    assert agent.paid == []


async def test_an_agent_with_an_approver_of_its_own_asks_that() -> None:
    async with served(agent := Shop(PAY, "thanks", approve=lambda call: Allow())) as app:
        visit = await post(app, "/runs/stream", ASK)
        assert "approval_requested" not in [each["event"] for each in visit.events]
    assert agent.paid == [{"euros": 5, "to": "me"}]
