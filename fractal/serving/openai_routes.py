"""`openai_router`: agents for every client of OpenAI's, as if each were a model."""

from __future__ import annotations

import time
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import replace
from functools import partial
from typing import Any

from fastapi import APIRouter
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from typing_extensions import Unpack

from fractal.agent import BaseAgent
from fractal.approval import Deny, PendingCall
from fractal.serving._openai.answering import Answering, fault_response
from fractal.serving._openai.asked import Asked, chat_asked, response_asked
from fractal.serving._openai.client_tools import turns_from
from fractal.serving._openai.faults import Fault, fault_of, wrong
from fractal.serving._openai.forms import ChatForm, Form, ResponseForm
from fractal.serving.askers import deps_of, noting, owner_of
from fractal.serving.bodies import Bounds, read_bytes, request_id
from fractal.serving.lifespan import serving_lifespan
from fractal.serving.problems import Problem
from fractal.serving.registry import ServedRuns, ServingOptions, served_runs
from fractal.serving.route import ServingRoute
from fractal.serving.run import RunAsked, ServedRun

__all__ = ["openai_router"]

Read = Callable[[bytes, Mapping[str, BaseAgent[Any]]], Asked]


def openai_router(
    agents: BaseAgent[Any] | Mapping[str, BaseAgent[Any]] | ServedRuns,
    *,
    owner: Callable[..., Any] | None = None,
    deps: Callable[..., Any] | None = None,
    client_tools: bool = False,
    max_body: int = 2**22,
    body_timeout: float = 30.0,
    **options: Unpack[ServingOptions],
) -> APIRouter:
    """Make the routes by which clients of OpenAI's talk to agents as to models.

    There are `POST /v1/chat/completions`, `POST /v1/responses` and `GET /v1/models`. What the caller sends as
    conversation is the history of the run, and its last message is the question. Calls of the agent's tools are not
    shown. A client that goes away ends its run.

    Args:
        agents: An agent, which is the model of its name; agents by the names of models; or `ServedRuns` that other
            routers share.
        owner: As in `agent_router`.
        deps: As in `agent_router`.
        client_tools: Whether chat completions offer the tools of a request to the model, beside the agent's own, and
            leave their calls to the client. Otherwise such a request is refused.
        max_body: Bytes that a request's body may have.
        body_timeout: Seconds that it may take to come.
        **options: Those of `ServedRuns`: `timeout`, `limits`, `max_concurrency`, `max_queue` and so on.

    Returns:
        The router, for `app.include_router`; with its `dependencies=` for authentication.

    Raises:
        InvalidArguments: An argument cannot be what was meant.

    Example:
        ```python
        app = FastAPI()
        app.include_router(openai_router(agent))
        # OpenAI(base_url="http://127.0.0.1:8000/v1", api_key="none").chat.completions.create(model=agent.name, …)
        ```
    """
    runs = served_runs(agents, options)
    bounds, at = Bounds(max_body=max_body, seconds=body_timeout), int(time.time())
    router = APIRouter(
        tags=["OpenAI"],
        route_class=_Route,
        lifespan=serving_lifespan(runs),
        dependencies=noting(owner, deps),
    )

    async def answered(request: Request, read: Read, form: type[Form]) -> Response:
        try:
            asked = read(await read_bytes(request, bounds), runs.agents)
            return Answering(runs, _beginning(runs, asked, request), asked, form(asked))
        except Fault as fault:
            return fault_response(fault)

    async def create_chat_completion(request: Request) -> Response:
        """Answer the last message of a conversation, whole or streamed."""
        return await answered(request, partial(chat_asked, takes_tools=client_tools), ChatForm)

    async def create_response(request: Request) -> Response:
        """Answer an input, whole or streamed."""
        return await answered(request, response_asked, ResponseForm)

    async def list_models() -> dict[str, Any]:
        """List the agents."""
        return {"object": "list", "data": [_model(name, at) for name in runs.agents]}

    async def retrieve_model(model: str) -> Response:
        """Tell of one agent."""
        if model not in runs.agents:
            return fault_response(wrong("there is no model of that name", "model", "model_not_found", 404))
        return JSONResponse(_model(model, at))

    router.add_api_route("/v1/chat/completions", create_chat_completion, methods=["POST"], openapi_extra=_BODY)
    router.add_api_route("/v1/responses", create_response, methods=["POST"], openapi_extra=_BODY)
    router.add_api_route("/v1/models", list_models, methods=["GET"])
    router.add_api_route("/v1/models/{model:path}", retrieve_model, methods=["GET"])
    return router


class _Route(ServingRoute):
    """A route whose errors are in the form of OpenAI's."""

    def refusal(self, problem: Problem) -> Response:
        return fault_response(fault_of(problem))


_BODY = {"requestBody": {"required": True, "content": {"application/json": {"schema": {"type": "object"}}}}}


def _beginning(runs: ServedRuns, asked: Asked, request: Request) -> Callable[[], Awaitable[ServedRun]]:
    """The function that begins the run."""
    owner = owner_of(request)
    given = RunAsked(
        input=asked.user_input,
        messages=asked.messages,
        is_streamed=asked.is_streamed,
        owner=owner,
        deps=deps_of(request),
        options={"approve": _deny},
        tools=asked.tools if asked.tools.tools else None,
        request_id=request_id.get(),
    )

    async def begin() -> ServedRun:
        before = [*asked.messages, {"role": "user", "content": asked.user_input}]
        turns = await turns_from(runs, owner, before, asked.turns) if asked.turns else ()
        run = await runs.begin(asked.model, replace(given, turns=turns) if turns else given)
        assert isinstance(run, ServedRun)  # only a request with a key can be one that has ended
        run.ends_with_clients = True  # nobody can come back to an answer of this kind
        return run

    return begin


async def _deny(call: PendingCall) -> Deny:
    """The answer about calls that need approval, for which there is nobody to ask here."""
    return Deny("there is nobody to approve it")


def _model(name: str, at: int) -> dict[str, Any]:
    return {"id": name, "object": "model", "created": at, "owned_by": "fractal"}
