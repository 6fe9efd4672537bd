"""`serving_lifespan`: agents and detached runs, from the start of an application to its end."""

from __future__ import annotations

import math
from collections.abc import AsyncGenerator, Callable, Mapping
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from typing import Any

from fractal._texts import repr_of
from fractal.agent import BaseAgent
from fractal.errors import InvalidArguments
from fractal.serving.host import hosting
from fractal.serving.registry import ServedRuns, checked_agents

__all__ = ["serving_lifespan"]

Lifespan = Callable[[Any], AbstractAsyncContextManager[None]]


def serving_lifespan(
    agents: BaseAgent[Any] | Mapping[str, BaseAgent[Any]] | ServedRuns, *, grace: float = 10.0
) -> Lifespan:
    """The lifespan of an application that serves agents: `FastAPI(lifespan=serving_lifespan(agent))`.

    At the start it opens the agents, at the end it closes them. Runs that outlive their clients belong to it: at the
    end they may go on for the grace, then they are cancelled, and the log says which.

    Args:
        agents: What the routers are given.
        grace: Seconds that runs may go on at shutdown.

    Raises:
        InvalidArguments: An argument cannot be what was meant.
    """
    if not isinstance(grace, int | float) or not 0 <= grace < math.inf:
        raise InvalidArguments(f"grace={repr_of(grace)}: give seconds, from 0 up and not infinite")
    served = agents.agents if isinstance(agents, ServedRuns) else checked_agents(agents)

    @asynccontextmanager
    async def lifespan(app: object) -> AsyncGenerator[None]:
        async with hosting(served.values(), grace):
            yield

    return lifespan
