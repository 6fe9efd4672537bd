"""`RunHost`: the tasks of runs that outlive the request that asked for them, and their end."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Awaitable, Callable, Iterable
from contextlib import AsyncExitStack, asynccontextmanager
from typing import TYPE_CHECKING, Any

import anyio
from anyio.lowlevel import RunVar

from fractal._concurrency.scopes import single_error
from fractal._log import log

if TYPE_CHECKING:
    from fractal.agent import BaseAgent
    from fractal.serving.run import ServedRun

__all__ = ["RunHost", "host_of", "hosting"]


class RunHost:
    """The task group of runs that no request waits for.

    Attributes:
        is_closing: Whether no run may begin any more.
    """

    def __init__(self, group: anyio.abc.TaskGroup) -> None:
        self._group = group
        self._runs: set[ServedRun] = set()
        self.is_closing = False

    def start(self, run: ServedRun, carry_out: Callable[[ServedRun], Awaitable[object]]) -> None:
        """Carry out a run in a task of its own."""
        self._runs.add(run)

        async def go() -> None:
            try:
                await carry_out(run)
            finally:
                self._runs.discard(run)

        self._group.start_soon(go, name=run.id)

    async def close(self, grace: float) -> None:
        """Let the runs go on for a grace, then cancel the rest and wait for their ends; say which they are."""
        self.is_closing = True
        with anyio.move_on_after(grace):
            for run in tuple(self._runs):
                await run.ended.wait()
        unfinished = tuple(self._runs)
        for run in unfinished:
            log.warning(f"run {run.id} has not finished within the grace of {grace:g} s at shutdown: it is cancelled")
            run.cancel("the server was shut down")
        for run in unfinished:
            await run.ended.wait()


_hosts: RunVar[dict[int, RunHost]] = RunVar("fractal_hosts")


def _hosts_here() -> dict[int, RunHost]:
    """The hosts of this event loop, by the id of the agent."""
    try:
        return _hosts.get()
    except LookupError:
        _hosts.set({})
        return _hosts.get()


def host_of(agent: object) -> RunHost | None:
    """The host in this event loop of the runs of an agent; None if there is none."""
    return _hosts_here().get(id(agent))


@asynccontextmanager
async def hosting(agents: Iterable[BaseAgent[Any]], grace: float) -> AsyncGenerator[None]:
    """Open agents and a host for their runs, for a block; what is open already is left to whoever opened it.

    Args:
        agents: The agents.
        grace: Seconds that runs may go on at the end of the block.
    """
    hosts = _hosts_here()
    mine = [agent for agent in agents if id(agent) not in hosts]
    if not mine:
        yield
        return
    async with AsyncExitStack() as stack:
        for agent in mine:
            await stack.enter_async_context(agent)
        with single_error():
            async with anyio.create_task_group() as group:
                host = RunHost(group)
                hosts.update((id(agent), host) for agent in mine)
                try:
                    yield
                    await host.close(grace)
                finally:
                    host.is_closing = True
                    for agent in mine:
                        del hosts[id(agent)]
