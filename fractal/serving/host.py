"""`RunHost`: the tasks of runs that outlive the request that asked for them, and their end."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Callable, Coroutine, Iterable
from contextlib import AsyncExitStack, asynccontextmanager
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary

import anyio
from anyio.lowlevel import current_token

from fractal._concurrency.scopes import single_error
from fractal._log import log

if TYPE_CHECKING:
    from anyio.lowlevel import EventLoopToken

    from fractal.agent import BaseAgent
    from fractal.serving.run import ServedRun

__all__ = ["RunHost", "host_of", "hosting"]


LAST_SECONDS = 10.0
"""Seconds that runs which a server's own tasks carry out have to end when they are cancelled at shutdown."""


class RunHost:
    """The runs of agents until the end of the application: the task group of those that no request waits for.

    Attributes:
        is_closing: Whether no run may begin any more.
    """

    def __init__(self, group: anyio.abc.TaskGroup) -> None:
        self._group = group
        self._runs: set[ServedRun] = set()
        self._none_left: anyio.Event | None = None
        self.is_closing = False

    def start(self, run: ServedRun, carry_out: Callable[[ServedRun], Coroutine[Any, Any, None]]) -> None:
        """Carry out a run in a task of its own."""
        self.note(run)
        self._group.start_soon(carry_out, run, name=run.id)

    def note(self, run: ServedRun) -> None:
        """Note a run that goes on, in whatever task."""
        self._runs.add(run)

    def note_end(self, run: ServedRun) -> None:
        """Note that a run has ended, and is kept."""
        self._runs.discard(run)
        if self._none_left is not None and not self._runs:
            self._none_left.set()

    async def close(self, grace: float) -> None:
        """Let the runs go on for a grace, then cancel the rest and wait for their ends; say which they are.

        Those of requests too: servers cancel their tasks, and would end the process before the ends of these are told.
        """
        self.is_closing = True
        with anyio.move_on_after(grace):
            await self._wait_for_ends()
        for run in self._runs:
            log.warning(f"run {run.id} has not finished within the grace of {grace:g} s at shutdown: it is cancelled")
            run.cancel("the server was shut down")
        with anyio.move_on_after(LAST_SECONDS):  # those of the group are waited for with that
            await self._wait_for_ends()

    async def _wait_for_ends(self) -> None:
        if self._runs:
            self._none_left = anyio.Event()
            await self._none_left.wait()


_hosts: WeakKeyDictionary[object, dict[int, RunHost]] = WeakKeyDictionary()
"""The hosts of each event loop, by the id of the agent."""


def host_of(agent: object, token: EventLoopToken) -> RunHost | None:
    """The host of the runs of an agent in an event loop; None if there is none."""
    hosts = _hosts.get(token.native_token)
    return hosts.get(id(agent)) if hosts is not None else None


@asynccontextmanager
async def hosting(agents: Iterable[BaseAgent[Any]], grace: float) -> AsyncGenerator[None]:
    """Open agents and a host for their runs, for a block; what is open already is left to whoever opened it.

    Args:
        agents: The agents.
        grace: Seconds that runs may go on at the end of the block.
    """
    hosts = _hosts.setdefault(current_token().native_token, {})
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
