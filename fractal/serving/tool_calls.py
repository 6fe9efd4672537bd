"""Single tools of an agent over HTTP, where they are asked for."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

import anyio
from fastapi import HTTPException
from starlette.requests import Request
from starlette.responses import Response

from fractal._agent.verbs import deps_of_calls
from fractal._json import encode
from fractal.agent import BaseAgent
from fractal.errors import InvalidArguments
from fractal.fastapi import CLIENT_HAS_GONE, ends_with_client
from fractal.results import ToolResult
from fractal.serving.askers import deps_of
from fractal.serving.bodies import Bounds, read_object
from fractal.serving.problems import Problem
from fractal.serving.registry import ServedRuns
from fractal.serving.route import json_response

__all__ = ["ToolCalls"]


class ToolCalls:
    """The route that calls one tool.

    Args:
        runs: Whose agents these are.
        names: The tools that may be called; True for all.
        bounds: What of a body is read.

    Raises:
        InvalidArguments: No agent has a tool of such a name.
    """

    def __init__(self, runs: ServedRuns, names: bool | Collection[str], bounds: Bounds) -> None:
        self._runs, self._names, self._bounds = runs, names, bounds
        known = {name for agent in runs.agents.values() for name in agent.get_tools()}
        if not isinstance(names, bool) and (unknown := sorted({*names} - known)):
            raise InvalidArguments(f"tools={unknown}: no agent that is served has such tools")

    async def call(self, name: str, request: Request, agent: str | None = None) -> Response:
        """Call a tool with the arguments in the body, as the model would."""
        _, its = self._runs.agent_named(agent)
        if name not in its.get_tools() or (self._names is not True and name not in _listed(self._names)):
            raise Problem(404, "unknown_tool", "there is no such tool")
        arguments = await read_object(request, self._bounds)
        try:
            async with ends_with_client(request):
                result = await self._called(its, name, arguments, deps_of(request))
        except HTTPException as error:
            raise Problem(CLIENT_HAS_GONE, "client_gone", "the client has gone") from error
        if result.error is not None:
            raise _problem_of_call(result)
        return json_response(
            encode({"content": result.model_dump(mode="json")["content"], "outcome": "ok", "elapsed": result.elapsed})
        )

    async def _called(self, agent: BaseAgent[Any], name: str, arguments: dict[str, Any], deps: Any) -> ToolResult:
        deadline = anyio.current_time() + self._runs.timeout
        async with self._runs.calling():
            token = deps_of_calls.set(deps)
            try:
                with anyio.CancelScope(deadline=deadline):
                    return await agent.execute_tool(name, **arguments)
            finally:
                deps_of_calls.reset(token)
        raise Problem(504, "timeout", "the tool did not finish in time")


def _listed(names: bool | Collection[str]) -> Collection[str]:
    return () if isinstance(names, bool) else names


def _problem_of_call(result: ToolResult) -> Problem:
    match result.outcome:
        case "timeout":
            return Problem(504, "timeout", "the tool did not finish in time")
        case "denied":
            return Problem(403, "denied", "the tool needs approval, and nobody is there to give it")
        case "error" if result.exception is None:  # it was not called
            return Problem(422, "invalid_arguments", result.error or "the arguments do not fit")
        case _:
            return Problem(500, "tool_error", "the tool failed")
