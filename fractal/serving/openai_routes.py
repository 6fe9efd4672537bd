"""`openai_router`: agents for every client of OpenAI's, as if each were a model."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from typing import Any

try:
    from fastapi import APIRouter, Request
    from starlette.requests import ClientDisconnect
    from starlette.responses import JSONResponse, Response
except ImportError as missing:  # pragma: no cover - installed wherever the tests run
    raise ImportError("fractal.serving needs FastAPI: pip install 'fractal-anyio[fastapi]'") from missing

from fractal.definition import AgentDefinition
from fractal.errors import InvalidArguments
from fractal.fastapi import CLIENT_HAS_GONE
from fractal.limits import Limits
from fractal.options import RunOptions
from fractal.serving._openai.answering import Answering, fault_response
from fractal.serving._openai.asked import Asked, chat_asked, response_asked
from fractal.serving._openai.faults import Fault, wrong
from fractal.serving._openai.forms import ChatForm, Form, ResponseForm

__all__ = ["openai_router"]

MAX_BODY = 4 * 1024 * 1024


def openai_router(
    agents: AgentDefinition | Mapping[str, AgentDefinition],
    *,
    timeout: float | None = None,
    limits: Limits | None = None,
    max_body: int = MAX_BODY,
) -> APIRouter:
    """Make the routes by which clients of OpenAI's talk to agents as to models.

    There are `POST /v1/chat/completions`, `POST /v1/responses` and `GET /v1/models`. What the caller sends as
    conversation is the history of the run, and its last message is the question. Tools are the agent's own: those of
    a caller are refused, and calls of the agent's are not shown. A client that goes away ends its run.

    Args:
        agents: One agent, which is the model of its name, or several by the names of models.
        timeout: Seconds that each run may take. None: the agent's own.
        limits: What each run may use; fields left at None are the agent's.
        max_body: Bytes that a request may have.

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
    named = _named(agents)
    options: RunOptions = {"timeout": timeout, "limits": limits}
    router, at = APIRouter(tags=["OpenAI"]), int(time.time())

    async def answered(request: Request, read: Callable[..., Asked], form: Callable[[Asked], Form]) -> Response:
        try:
            asked = read(await _body(request, max_body), named)
        except Fault as fault:
            return fault_response(fault)
        except ClientDisconnect:
            return Response(status_code=CLIENT_HAS_GONE)
        return Answering(asked, form(asked), options)

    @router.post("/v1/chat/completions", openapi_extra=_BODY, response_class=JSONResponse)
    async def create_chat_completion(request: Request) -> Response:
        """Answer the last message of a conversation, whole or streamed."""
        return await answered(request, chat_asked, ChatForm)

    @router.post("/v1/responses", openapi_extra=_BODY, response_class=JSONResponse)
    async def create_response(request: Request) -> Response:
        """Answer an input, whole or streamed."""
        return await answered(request, response_asked, ResponseForm)

    @router.get("/v1/models")
    async def list_models() -> dict[str, Any]:
        """List the agents."""
        return {"object": "list", "data": [_model(name, at) for name in named]}

    @router.get("/v1/models/{model:path}", response_class=JSONResponse)
    async def retrieve_model(model: str) -> Response:
        """Tell of one agent."""
        if model not in named:
            return fault_response(wrong("there is no model of that name", "model", "model_not_found", 404))
        return JSONResponse(_model(model, at))

    return router


_BODY = {"requestBody": {"required": True, "content": {"application/json": {"schema": {"type": "object"}}}}}


def _named(agents: AgentDefinition | Mapping[str, AgentDefinition]) -> dict[str, AgentDefinition]:
    if isinstance(agents, AgentDefinition):
        return {agents.name: agents}
    if not isinstance(agents, Mapping) or not agents:
        raise InvalidArguments("openai_router takes an agent, or agents by the names that clients give as model")
    for name, agent in agents.items():
        if not isinstance(name, str) or not name or not isinstance(agent, AgentDefinition):
            raise InvalidArguments(f"agents[{name!r}] is no agent with a name")
    return dict(agents)


def _model(name: str, at: int) -> dict[str, Any]:
    return {"id": name, "object": "model", "created": at, "owned_by": "fractal"}


async def _body(request: Request, most: int) -> bytes:
    pieces, size = list[bytes](), 0
    async for piece in request.stream():
        size += len(piece)
        if size > most:
            raise wrong(f"the body of the request has more than {most:,} bytes", code="request_too_large", status=413)
        pieces.append(piece)
    return b"".join(pieces)
