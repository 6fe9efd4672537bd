"""`ServingRoute`: what all routes have in common: ids of requests, and problems as answers."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Coroutine, Mapping
from typing import Any

from fastapi.dependencies.models import Dependant
from fastapi.exceptions import RequestValidationError
from fastapi.routing import APIRoute
from starlette.requests import Request
from starlette.responses import Response

from fractal._log import log
from fractal.errors import FractalError
from fractal.serving.bodies import request_id, request_id_of, shown_faults
from fractal.serving.problems import PROBLEM_TYPE, Problem, problem_of

__all__ = ["ServingRoute", "json_response", "problem_for", "problem_response"]

Handler = Callable[[Request], Coroutine[Any, Any, Response]]


class ServingRoute(APIRoute):
    """A route whose answers carry the id of their request, and whose errors are problem details.

    An `HTTPException` of a dependency, one that checks who asks say, is left to the application.
    """

    def get_route_handler(self) -> Handler:
        """The handler of the route, with what all routes have in common."""
        handle = super().get_route_handler()
        directly: Handler = self.endpoint if _finds_only_the_request(handle, self.endpoint) else handle

        async def handle_with_id(request: Request) -> Response:
            token = request_id.set(given := request_id_of(request))
            try:
                # FastAPI's own telemetry tells what happens on its way to the endpoint.
                way = handle if "fastapi.telemetry" in request.scope else directly
                response = await self._answered(way, request)
                response.raw_headers.append((b"x-request-id", given.encode()))
                return response
            finally:
                request_id.reset(token)

        return handle_with_id

    async def _answered(self, handle: Handler, request: Request) -> Response:
        try:
            return await handle(request)
        except RequestValidationError as error:
            faults: Any = error.errors()
            said = "the request does not fit: see errors"
            return self.refusal(Problem(422, "invalid_request", said, errors=shown_faults(faults)))
        except FractalError as error:
            return self.refusal(problem_for(error))

    def refusal(self, problem: Problem) -> Response:
        """The answer that tells of a problem."""
        return problem_response(problem)


def _finds_only_the_request(handle: Handler, endpoint: object) -> bool:
    """Whether a handler of FastAPI's only passes the request on, which costs more than most of what we do with it.

    Dependencies of the application, of every router around ours, and our own are what it may have to see to. What
    FastAPI has found is known to its handler alone; where that cannot be seen, all is left to FastAPI.
    """
    found = inspect.getclosurevars(handle).nonlocals.get("dependant") if inspect.isfunction(handle) else None
    if not isinstance(found, Dependant) or found.call is None or found.call != endpoint or found.dependencies:
        return False
    return [*inspect.signature(found.call).parameters] == ["request"]


def problem_for(error: FractalError) -> Problem:
    """The problem that a failure of a request is; one that tells nothing is logged."""
    if not isinstance(error, Problem):
        log.failure(f"request {request_id.get()} failed", error)
    return problem_of(error)


def problem_response(problem: Problem, headers: Mapping[str, str] | None = None) -> Response:
    """The answer that tells of a problem."""
    return Response(problem.json(), problem.status, {**problem.headers, **(headers or {})}, PROBLEM_TYPE)


def json_response(body: bytes, headers: Mapping[str, str] | None = None) -> Response:
    """An answer of JSON that is written already."""
    return Response(body, 200, headers, "application/json")
