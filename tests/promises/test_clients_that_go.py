"""A client that goes away ends its run, or does not, as you say: over HTTP, watched by others and taken up again."""

from __future__ import annotations

import anyio
import pytest

from fractal.testing import answers
from tests.serving.support import Shop, served
from tests.visits import Visit, get

ASK = {"input": "hi"}


@pytest.mark.parametrize("spec_version", ["2.3", "2.4"])
@pytest.mark.parametrize("path", ["/runs", "/runs/stream"])
async def test_a_run_is_cancelled_with_its_tools_when_its_client_leaves(path: str, spec_version: str) -> None:
    async with served(agent := Shop(answers.call("search"))) as app:
        visit = Visit("POST", path, json=ASK, spec_version=spec_version)
        async with visit.going_on(app):
            await agent.searching.wait()
            visit.leave()
        assert agent.cleaned_up.is_set()
        [run] = (await get(app, "/runs")).json["runs"]
        assert (run["state"], run["problem"]["detail"]) == ("cancelled", "its client has gone")
        told = (await get(app, f"/runs/{run['id']}")).json["result"]
        assert (told["stop_reason"], len(told["messages"])) == ("cancelled", 3)


@pytest.mark.parametrize("path", ["/runs", "/runs/stream"])
async def test_a_run_goes_on_as_long_as_one_of_its_clients_waits(path: str) -> None:
    async with served(agent := Shop(answers.call("search"), "done")) as app:
        first = Visit("POST", path, json=ASK)
        async with first.going_on(app):
            await agent.searching.wait()
            [run] = (await get(app, "/runs")).json["runs"]
            second = Visit("GET", f"/runs/{run['id']}/stream")
            async with second.going_on(app):
                await second.event("tool_started" if path == "/runs/stream" else "events_skipped")
                first.leave()
                await anyio.wait_all_tasks_blocked()
                agent.let_go.set()
        assert second.text == "done"


@pytest.mark.parametrize("path", ["/runs", "/runs/stream"])
async def test_a_detached_run_goes_on_without_its_client_and_is_fetched_later(path: str) -> None:
    async with served(agent := Shop(answers.call("search"), "done"), on_disconnect="detach") as app:
        visit = Visit("POST", path, json=ASK)
        async with visit.going_on(app):
            await agent.searching.wait()
            visit.leave()
        [run] = (await get(app, "/runs")).json["runs"]
        assert run["state"] == "running"
        late = Visit("GET", f"/runs/{run['id']}/stream")
        async with late.going_on(app):
            await late.event("tool_started" if path == "/runs/stream" else "events_skipped")
            agent.let_go.set()
        assert late.text == "done"
        assert (await get(app, f"/runs/{run['id']}")).json["result"]["content"] == "done"
