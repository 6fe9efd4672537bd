"""`serving_app`: an application with all that serves agents: runs, OpenAI's routes and the chat page."""

from __future__ import annotations

import importlib.util
from collections.abc import Collection, Mapping
from typing import Any

from fastapi import FastAPI
from typing_extensions import Unpack

from fractal import __version__
from fractal.agent import BaseAgent
from fractal.errors import InvalidArguments
from fractal.serving._page.routes import page_router
from fractal.serving.access import Access
from fractal.serving.lifespan import serving_lifespan
from fractal.serving.openai_routes import openai_router
from fractal.serving.registry import ServedRuns, ServingOptions, served_runs
from fractal.serving.router import agent_router

__all__ = ["serving_app"]


def serving_app(
    agents: BaseAgent[Any] | Mapping[str, BaseAgent[Any]] | ServedRuns,
    *,
    token: str | None = None,
    hosts: Collection[str] | None = None,
    grace: float = 10.0,
    **options: Unpack[ServingOptions],
) -> FastAPI:
    """Make an application that serves agents: what `fractal serve` runs.

    Args:
        agents: An agent, agents by name, or `ServedRuns`.
        token: The token that clients have to send: programs as `Authorization: Bearer …`, browsers by opening
            `/?token=…`. None: none.
        hosts: Names in the `Host` header that are answered to; None: any.
        grace: Seconds that detached runs may go on at shutdown.
        **options: Those of `ServedRuns`.

    Returns:
        The application: the routes of `agent_router` and `openai_router`, the chat page at `/`, and
        `/openapi.json`; with the extra `ag-ui` those of `agui_router` too.

    Raises:
        InvalidArguments: An argument cannot be what was meant.

    Example:
        ```python
        app = serving_app(agent, on_disconnect="detach")  # uvicorn module:app
        ```
    """
    if token is not None and (not isinstance(token, str) or not token.strip()):
        raise InvalidArguments("token: give a text that is not empty, or None to let everybody in")
    runs = served_runs(agents, options)
    app = FastAPI(
        title="Fractal",
        version=__version__,
        lifespan=serving_lifespan(runs, grace=grace),
        docs_url=None,  # those pages load their scripts from elsewhere
        redoc_url=None,
    )
    app.include_router(agent_router(runs))
    app.include_router(openai_router(runs))
    app.include_router(page_router(runs.agents))
    if importlib.util.find_spec("ag_ui") is not None:
        from fractal.serving.agui import agui_router

        app.include_router(agui_router(runs))
    app.add_middleware(Access, token=token, hosts=hosts)
    return app
