"""Routes: dependencies are asked wherever they stand, and FastAPI is spared its work where there are none."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from fastapi import APIRouter, Depends, FastAPI, HTTPException
from fastapi.dependencies.utils import solve_dependencies

from fractal.serving import ServedRuns, agent_router
from tests.serving.support import Shop
from tests.visits import post

ASK = {"input": "Find it"}


def refuse() -> None:
    raise HTTPException(401, "who are you?")


def of_application(router: APIRouter) -> FastAPI:
    app = FastAPI(dependencies=[Depends(refuse)])
    app.include_router(router)
    return app


def of_inclusion(router: APIRouter) -> FastAPI:
    app = FastAPI()
    app.include_router(router, prefix="/open")  # the same router, where nobody is refused
    app.include_router(router, dependencies=[Depends(refuse)])
    return app


def of_router_around(router: APIRouter) -> FastAPI:
    app, around = FastAPI(), APIRouter(dependencies=[Depends(refuse)])
    around.include_router(router)
    app.include_router(around)
    return app


def of_inclusion_further_out(router: APIRouter) -> FastAPI:
    app, around = FastAPI(), APIRouter()
    around.include_router(router)
    app.include_router(around, dependencies=[Depends(refuse)])
    return app


@pytest.mark.parametrize("path", ["/runs", "/runs/stream"])
@pytest.mark.parametrize("made", [of_application, of_inclusion, of_router_around, of_inclusion_further_out])
async def test_dependencies_are_asked_wherever_they_stand(made: Callable[[APIRouter], FastAPI], path: str) -> None:
    runs = ServedRuns(Shop("found"))
    visit = await post(made(agent_router(runs)), path, ASK)
    assert (visit.status, visit.json) == (401, {"detail": "who are you?"})
    assert await runs.page(None, None, 10) == []


async def test_an_inclusion_without_dependencies_is_as_open_as_it_was() -> None:
    assert (await post(of_inclusion(agent_router(Shop("found"))), "/open/runs", ASK)).status == 200


@pytest.mark.parametrize("is_told", [False, True])
async def test_a_route_with_nothing_to_find_is_searched_only_where_frameworks_tell_of_that(
    is_told: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    searched = list[str]()

    async def solve(**facts: Any) -> Any:
        searched.append(facts["request"].url.path)
        return await solve_dependencies(**facts)

    monkeypatch.setattr("fastapi.routing.solve_dependencies", solve)
    app = FastAPI()
    app.include_router(agent_router(Shop("found")))

    async def traced(scope: Any, receive: Any, send: Any) -> None:
        await app({**scope, "fastapi.telemetry": None} if is_told else scope, receive, send)

    assert (await post(traced, "/runs", ASK)).json["result"]["content"] == "found"
    assert searched == (["/runs"] if is_told else [])
