"""`agent_router`: the routes by which clients begin, watch, answer and end runs of agents."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping
from typing import Any

from fastapi import APIRouter
from typing_extensions import Unpack

from fractal._checks import is_count
from fractal._texts import repr_of
from fractal.agent import BaseAgent
from fractal.errors import InvalidArguments
from fractal.serving.askers import noting
from fractal.serving.bodies import Bounds, Decision, RunRequest
from fractal.serving.lifespan import serving_lifespan
from fractal.serving.registry import ServedRuns, ServingOptions, served_runs
from fractal.serving.route import ServingRoute
from fractal.serving.run_routes import RunRoutes
from fractal.serving.tool_calls import ToolCalls
from fractal.serving.views import PROBLEM_RESPONSES, Health, RunPage, RunView, ToolView, event_stream

__all__ = ["agent_router"]


def agent_router(
    agents: BaseAgent[Any] | Mapping[str, BaseAgent[Any]] | ServedRuns,
    *,
    tools: bool | Collection[str] = False,
    owner: Callable[..., Any] | None = None,
    deps: Callable[..., Any] | None = None,
    max_body: int = 2**20,
    body_timeout: float = 30.0,
    keep_alive: float = 15.0,
    **options: Unpack[ServingOptions],
) -> APIRouter:
    """The routes by which clients use agents, for any FastAPI application: `app.include_router(agent_router(agent))`.

    `POST /runs`, `POST /runs/stream`, `GET /runs`, `GET /runs/{id}`, `GET /runs/{id}/stream`, `DELETE /runs/{id}`,
    `POST /runs/{id}/approvals/{call_id}`, `POST /tools/{name}`, `GET /health` and `GET /ready`. Prefixes, dependencies,
    authentication and CORS are the application's.

    Args:
        agents: An agent, agents by the names that clients know them by, or `ServedRuns` that other routers share.
        tools: Whether clients may call single tools; or the names of those that they may.
        owner: A dependency that says whose a request is, as a text, a number or a UUID; each owner has runs of their
            own. If it gives None or an empty text, the request is refused with 401. None: all are of one owner.
        deps: A dependency that gives what tools find as `ctx.deps`.
        max_body: Bytes that a request's body may have.
        body_timeout: Seconds that it may take to come.
        keep_alive: Seconds of silence after which a stream sends a comment.
        **options: Those of `ServedRuns`: `on_disconnect`, `timeout`, `limits`, `max_concurrency`, `max_queue`,
            `max_events`, `max_bytes`, `store`.

    Raises:
        InvalidArguments: An argument cannot be what was meant.

    Example:
        ```python
        app = FastAPI(lifespan=serving_lifespan(agent))
        app.include_router(agent_router(agent, on_disconnect="detach", max_concurrency=50), prefix="/api")
        ```
    """
    runs = served_runs(agents, options)
    for name, seconds in (("body_timeout", body_timeout), ("keep_alive", keep_alive)):
        if not isinstance(seconds, int | float) or not 0 < seconds < math.inf:
            raise InvalidArguments(f"{name}={repr_of(seconds)}: give seconds, more than 0 and not infinite")
    if not is_count(max_body) or not max_body:
        raise InvalidArguments(f"max_body={repr_of(max_body)}: give a whole number from 1 up")
    bounds = Bounds(max_body=max_body, seconds=body_timeout)
    router = APIRouter(
        route_class=ServingRoute,
        lifespan=serving_lifespan(runs),
        responses=PROBLEM_RESPONSES,
        dependencies=noting(owner, deps),
    )
    _add_run_routes(router, RunRoutes(runs, bounds, keep_alive))
    if tools:
        calls = ToolCalls(runs, tools, bounds)
        body = _body({"type": "object"})
        router.add_api_route("/tools/{name}", calls.call, methods=["POST"], response_model=ToolView, openapi_extra=body)
    return router


def _add_run_routes(router: APIRouter, routes: RunRoutes) -> None:
    asks = _body(RunRequest.model_json_schema())
    add = router.add_api_route
    add("/runs", routes.run, methods=["POST"], openapi_extra=asks, response_model=RunView)
    add("/runs/stream", routes.stream, methods=["POST"], openapi_extra=asks, responses=event_stream())
    add("/runs", routes.page, methods=["GET"], response_model=RunPage)
    add("/runs/{run_id}", routes.one, methods=["GET"], response_model=RunView)
    add("/runs/{run_id}", routes.end, methods=["DELETE"], response_model=RunView)
    add("/runs/{run_id}/stream", routes.watch, methods=["GET"], responses=event_stream())
    answers = _body(Decision.model_json_schema())
    path = "/runs/{run_id}/approvals/{call_id:path}"
    add(path, routes.answer, methods=["POST"], status_code=204, openapi_extra=answers)
    add("/health", routes.health, methods=["GET"], response_model=Health)
    add("/ready", routes.ready, methods=["GET"], response_model=Health)


def _body(schema: dict[str, Any]) -> dict[str, Any]:
    """The OpenAPI description of a body that we read ourselves, within bounds."""
    return {"requestBody": {"required": True, "content": {"application/json": {"schema": schema}}}}
