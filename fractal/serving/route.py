"""`ServingRoute`: what all routes have in common: ids of requests, and problems as answers."""

from __future__ import annotations

from collections.abc import Callable, Coroutine, Mapping
from typing import Any

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

        async def handle_with_id(request: Request) -> Response:
            token = request_id.set(request_id_of(request))
            try:
                response = await self._answered(handle, request)
                response.headers["X-Request-Id"] = request_id.get() or ""
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
