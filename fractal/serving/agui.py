"""`agui_router`: agents for front ends that speak AG-UI, the Agent User Interaction Protocol.

Needs the extra `ag-ui`, besides `fastapi`.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from importlib import import_module
from typing import TYPE_CHECKING, Any

from anyio.lowlevel import current_token
from fastapi import APIRouter
from starlette.requests import Request
from starlette.responses import Response
from typing_extensions import Unpack

try:
    import_module("ag_ui.core")
except ImportError as missing:  # pragma: no cover - installed wherever the tests run
    raise ImportError("fractal.serving.agui needs ag-ui-protocol: pip install 'fractal-anyio[ag-ui]'") from missing

from fractal.agent import BaseAgent
from fractal.errors import InvalidArguments
from fractal.serving._agui.answering import AguiEvents, Begin
from fractal.serving._agui.asked import Decided, conversation_of, decisions_of, read_input
from fractal.serving.askers import deps_of, noting, owner_of
from fractal.serving.bodies import Bounds, read_bytes, request_id
from fractal.serving.host import host_of
from fractal.serving.lifespan import serving_lifespan
from fractal.serving.problems import Problem
from fractal.serving.record import RunRecord
from fractal.serving.registry import ServedRuns, ServingOptions, served_runs
from fractal.serving.route import ServingRoute
from fractal.serving.run import RunAsked, ServedRun

if TYPE_CHECKING:
    from ag_ui.core import RunAgentInput

__all__ = ["agui_router"]


def agui_router(
    agents: BaseAgent[Any] | Mapping[str, BaseAgent[Any]] | ServedRuns,
    *,
    owner: Callable[..., Any] | None = None,
    deps: Callable[..., Any] | None = None,
    max_body: int = 2**22,
    body_timeout: float = 30.0,
    **options: Unpack[ServingOptions],
) -> APIRouter:
    """Make the routes by which AG-UI's clients use agents: `POST /agui`, and `POST /agui/{agent}` for one by its name.

    Delegates are subagents. A call that needs approval is an interrupt: the stream ends, and the next request answers
    it by `resume`, with what the interrupt's `responseSchema` says. Until then the run waits, within its time.
    With `on_disconnect="detach"` the same request again, with its `threadId` and `runId`, is answered with the events
    of the run that it has begun, from their beginning.

    Args:
        agents: An agent, agents by name, or `ServedRuns` that other routers share.
        owner: As in `agent_router`.
        deps: As in `agent_router`.
        max_body: Bytes that a request's body may have.
        body_timeout: Seconds that it may take to come.
        **options: Those of `ServedRuns`.

    Returns:
        The router, for `app.include_router`.

    Raises:
        InvalidArguments: An argument cannot be what was meant.

    Example:
        ```python
        app = FastAPI()
        app.include_router(agui_router(agent))
        ```
    """
    runs = served_runs(agents, options)
    bounds = Bounds(max_body=max_body, seconds=body_timeout)
    router = APIRouter(
        tags=["AG-UI"],
        route_class=ServingRoute,
        lifespan=serving_lifespan(runs),
        dependencies=noting(owner, deps),
    )

    async def answered(request: Request, name: str | None) -> Response:
        given = read_input(await read_bytes(request, bounds))
        begin = _resuming(runs, given, request) if given.resume else _beginning(runs, name, given, request)
        return AguiEvents(runs, begin, thread_id=given.thread_id, client_run_id=given.run_id)

    async def run_agent(request: Request) -> Response:
        """Run the first agent, and answer with its events in the words of AG-UI."""
        return await answered(request, None)

    async def run_agent_of_name(agent: str, request: Request) -> Response:
        """Run an agent, and answer with its events in the words of AG-UI."""
        return await answered(request, agent)

    router.add_api_route("/agui", run_agent, methods=["POST"], openapi_extra=_BODY)
    router.add_api_route("/agui/{agent:path}", run_agent_of_name, methods=["POST"], openapi_extra=_BODY)
    return router


_BODY = {"requestBody": {"required": True, "content": {"application/json": {"schema": {"type": "object"}}}}}


def _beginning(runs: ServedRuns, name: str | None, given: RunAgentInput, request: Request) -> Begin:
    """The function that begins a run."""
    user_input, messages = conversation_of(given)
    same = hashlib.sha256(f"{name}\n{given.model_dump_json()}".encode()).hexdigest()
    asked = RunAsked(
        input=user_input,
        messages=messages,
        is_streamed=True,
        owner=owner_of(request),
        deps=deps_of(request),
        key=f"AG-UI {same}" if runs.on_disconnect == "detach" else None,  # otherwise it has ended with its client
        fingerprint=same,
        request_id=request_id.get(),
    )

    async def begin() -> tuple[ServedRun | RunRecord, int]:
        _, agent = runs.agent_named(name)
        if host_of(agent, current_token()) is None:
            raise InvalidArguments(
                "a run that waits for an approval outlives its request: the lifespan of the application has to be that"
                " of the router, or FastAPI(lifespan=serving_lifespan(agent))"
            )
        return await runs.begin(name, asked), 0

    return begin


def _resuming(runs: ServedRuns, given: RunAgentInput, request: Request) -> Begin:
    """The function that takes up the run that waits for answers."""
    decisions, owner = decisions_of(given.resume or ()), owner_of(request)

    async def begin() -> tuple[ServedRun, int]:
        return _resumed(runs, decisions, owner)

    return begin


def _resumed(runs: ServedRuns, decisions: list[Decided], owner: str | None) -> tuple[ServedRun, int]:
    """The run that waits for these answers, which it is given, and the last event that the client knows."""
    run = runs.live(decisions[0].run_id, owner)
    if run is None:
        raise Problem(404, "unknown_interrupt", "the run that asked does not wait any more")
    if len({each.approval_id for each in decisions}) < len(decisions) or any(
        each.run_id != run.id or each.after > run.log.last for each in decisions
    ):
        raise Problem(404, "unknown_interrupt", "there is no such interrupt")
    waiting = {each["approval_id"] for each in run.approvals.pending}
    if not waiting.issuperset(each.approval_id for each in decisions):
        raise Problem(409, "already_answered", "that interrupt has been answered, or there was none")
    for each in decisions:
        answer = each.answer
        run.approvals.answer(each.approval_id, answer.decision, reason=answer.reason, arguments=answer.arguments)
    return run, max(each.after for each in decisions)
