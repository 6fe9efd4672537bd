"""`ServedRuns`: agents, the runs that clients have asked of them, and the bounds of all that."""

from __future__ import annotations

import math
from collections.abc import AsyncGenerator, Awaitable, Mapping
from contextlib import asynccontextmanager
from typing import Any, Literal, TypeVar

import anyio
from anyio.lowlevel import EventLoopToken, current_token
from typing_extensions import TypedDict

from fractal._checks import is_count
from fractal._concurrency.gates import Gate
from fractal._concurrency.scopes import single_error
from fractal._json import is_mapping
from fractal._log import log
from fractal._texts import repr_of
from fractal.agent import BaseAgent
from fractal.errors import InvalidArguments
from fractal.limits import Limits
from fractal.serving.bodies import request_id
from fractal.serving.clients import Client, Gone
from fractal.serving.event_log import EventLog
from fractal.serving.host import host_of
from fractal.serving.problems import Problem
from fractal.serving.record import MemoryStore, RunRecord, RunStore
from fractal.serving.run import RunAsked, ServedRun, wait_for

__all__ = ["OnDisconnect", "ServedRuns", "ServingOptions", "checked_agents", "served_runs"]

T = TypeVar("T")

OnDisconnect = Literal["cancel", "detach"]
"""What becomes of a run when the last client that waits for it has gone: it is cancelled, or goes on."""


class ServingOptions(TypedDict, total=False):
    """The arguments of `ServedRuns` besides the agents."""

    on_disconnect: OnDisconnect
    timeout: float
    limits: Limits | None
    max_concurrency: int
    max_queue: int
    max_events: int
    max_bytes: int
    store: RunStore | None


STORE_SECONDS = 5.0
"""Seconds that a store has to keep a run, or to tell of some."""


class ServedRuns:
    """Agents that are served, with the runs that were asked of them; several routers may share it.

    Args:
        agents: An agent, or agents by the names that clients know them by.
        on_disconnect: What becomes of a run when the last client that waits for it has gone.
        timeout: Seconds a run may take, the wait for its turn included; a client may ask for less.
        limits: What a run may use, over the agent's own limits.
        max_concurrency: Runs at a time.
        max_queue: Runs that may wait for their turn.
        max_events: Events of a run that are kept for readers.
        max_bytes: Bytes of them.
        store: Where runs are kept that have ended. None: in memory, the newest.

    Attributes:
        turn: Where runs wait for their turn.

    Raises:
        InvalidArguments: An argument cannot be what was meant.
    """

    def __init__(
        self,
        agents: BaseAgent[Any] | Mapping[str, BaseAgent[Any]],
        *,
        on_disconnect: OnDisconnect = "cancel",
        timeout: float = 300.0,
        limits: Limits | None = None,
        max_concurrency: int = 100,
        max_queue: int = 100,
        max_events: int = 10_000,
        max_bytes: int = 2**20,
        store: RunStore | None = None,
    ) -> None:
        self.agents = checked_agents(agents)
        if on_disconnect not in ("cancel", "detach"):
            raise InvalidArguments(f"on_disconnect={repr_of(on_disconnect)}: give 'cancel' or 'detach'")
        if not isinstance(timeout, int | float) or not 0 < timeout < math.inf:
            raise InvalidArguments(f"timeout={repr_of(timeout)}: give seconds, more than 0 and not infinite")
        counts = {"max_concurrency": max_concurrency, "max_events": max_events, "max_bytes": max_bytes}
        for name, value in counts.items():
            if not is_count(value) or not value:
                raise InvalidArguments(f"{name}={repr_of(value)}: give a whole number from 1 up")
        if not is_count(max_queue):
            raise InvalidArguments(f"max_queue={repr_of(max_queue)}: give a whole number from 0 up")
        self.on_disconnect: OnDisconnect = on_disconnect
        self.timeout, self.limits = timeout, limits
        self.max_concurrency, self.max_queue = max_concurrency, max_queue
        self._max_events, self._max_bytes = max_events, max_bytes
        self.store: RunStore = MemoryStore() if store is None else store
        self.turn = Gate(max_concurrency, "a turn of the server's")
        self._live: dict[str, ServedRun] = {}
        self._keys: dict[tuple[str | None, str], ServedRun] = {}
        self._driven: set[str] = set()
        self._calls = 0

    # ---- asking for runs

    def agent_named(self, name: str | None) -> tuple[str, BaseAgent[Any]]:
        """An agent and its name; the first one without a name.

        Raises:
            Problem: There is none of that name, 404.
        """
        if name is None:
            return next(iter(self.agents.items()))
        if name not in self.agents:
            raise Problem(404, "unknown_agent", "there is no such agent")
        return name, self.agents[name]

    async def begin(self, name: str | None, asked: RunAsked) -> ServedRun | RunRecord:
        """Take a run in, to be carried out by `attended`; or find the one that the same request has begun.

        Args:
            name: Name of the agent; None for the first.
            asked: What is asked for.

        Returns:
            The run; a record, if it has been begun before and has ended.

        Raises:
            Problem: There is no such agent, no room, another request of the same name, or the store cannot tell of one.
        """
        name, agent = self.agent_named(name)
        if asked.timeout is not None and asked.timeout > self.timeout:
            raise Problem(422, "timeout_too_long", f"a run may take no more than {self.timeout:g} s")
        if (before := await self._begun_before(asked)) is not None:
            return _watched(before)
        token = current_token()  # which takes AnyIO some time
        self._check_room(agent, token)
        log_ = EventLog(ServedRun.new_id(), max_events=self._max_events, max_bytes=self._max_bytes)
        run = ServedRun(name, agent, asked, log_, token)
        run.limits, run.ends_with_clients = self.limits, self.on_disconnect == "cancel"
        self._live[run.id] = run
        if asked.key is not None:
            self._keys[asked.owner, asked.key] = run
        return run

    async def _begun_before(self, asked: RunAsked) -> ServedRun | RunRecord | None:
        if asked.key is None:
            return None
        # Asked before and after the store, which may take its time: a run is among these until it is stored.
        name = (asked.owner, asked.key)
        begun: ServedRun | RunRecord | None = self._keys.get(name)
        begun = begun or await _from_store(self.store.find(*name)) or self._keys.get(name)
        if begun is None:
            return None
        fingerprint = begun.asked.fingerprint if isinstance(begun, ServedRun) else begun.fingerprint
        if fingerprint != asked.fingerprint:
            raise Problem(422, "idempotency_key_reused", "that Idempotency-Key was sent with another request")
        return begun

    def _check_room(self, agent: BaseAgent[Any], token: EventLoopToken) -> None:
        host = host_of(agent, token)
        if host is not None and host.is_closing:
            raise Problem(503, "shutting_down", "the server is shutting down", retry_after=5)
        if host is None and self.on_disconnect == "detach":
            raise InvalidArguments(
                "on_disconnect='detach' needs somebody who owns the runs: FastAPI(lifespan=serving_lifespan(agent))"
            )
        self._check_queue()

    def _check_queue(self) -> None:
        if not self._has_room:
            raise Problem(429, "too_many_runs", "too many runs wait for their turn", retry_after=1)

    @property
    def _has_room(self) -> bool:
        return len(self._live) + self._calls < self.max_concurrency + self.max_queue

    @asynccontextmanager
    async def calling(self) -> AsyncGenerator[None]:
        """Wait for a turn for a block that is no run, such as a single tool call; it counts as one.

        Raises:
            Problem: There is no room, or the turn has not come in time.
        """
        self._check_queue()
        self._calls += 1
        try:
            await wait_for(self.turn, self.timeout)
            try:
                yield
            finally:
                self.turn.release()
        finally:
            self._calls -= 1

    # ---- carrying them out

    async def finished(self, run: ServedRun, gone: Gone) -> RunRecord | None:
        """Wait for a run as a client of it; have it carried out, if that is not so yet.

        Args:
            run: The run.
            gone: Returns when the client has closed its connection.

        Returns:
            What became of it; None if the client has gone first, and the run goes on.
        """
        client = Client(run, gone)
        try:
            if self._is_to_be_driven(run):
                await self.carry_out(run)
            else:
                with client.scope:
                    await run.ended.wait()
        finally:
            await client.left()
        return run.record() if run.is_over else None

    @asynccontextmanager
    async def attended(self, run: ServedRun, gone: Gone) -> AsyncGenerator[Client]:
        """Be a client of a run for a block, which is cancelled when the client goes away.

        Have the run carried out, if that is not so yet: in a task of the block, which then ends when the run has ended;
        or in one of its host, where runs outlive their clients.

        Args:
            run: The run.
            gone: Returns when the client has closed its connection.
        """
        client = Client(run, gone)
        try:
            with single_error():
                async with anyio.create_task_group() as group:
                    if self._is_to_be_driven(run):
                        group.start_soon(self.carry_out, run)
                    try:
                        with client.scope:
                            yield client
                    finally:
                        client.leave()
        finally:
            await client.left()

    def _is_to_be_driven(self, run: ServedRun) -> bool:
        """Whether a run has to be carried out by its client; one that has a host is begun there."""
        if run.id in self._driven or run.is_over:
            return False
        self._driven.add(run.id)
        host = None if run.ends_with_clients else host_of(self.agents[run.agent_name], run.token)
        if host is not None:
            host.start(run, self.carry_out)
        return host is None

    async def carry_out(self, run: ServedRun) -> None:
        """Carry out a run to its end, and keep what became of it."""
        agent = self.agents[run.agent_name]
        asked = run.asked.timeout or min(agent.timeout or self.timeout, self.timeout)
        host = host_of(agent, run.token)
        if host is not None:
            host.note(run)
        token = request_id.set(run.asked.request_id)  # a streamed run begins after the request has been read
        try:
            log.info(f"run {run.id} of agent {run.agent_name!r} begins for request {run.asked.request_id}")
            await run.drive(self.turn, asked)
        finally:
            request_id.reset(token)
            run.end()
            log.info(f"run {run.id} for request {run.asked.request_id} has ended: {run.state}")
            await self._keep(run)
            self._forget(run)
            if host is not None:
                host.note_end(run)

    async def _keep(self, run: ServedRun) -> None:
        if type(self.store) is MemoryStore:  # which neither waits nor fails: no scope of the backend's, which costs
            self.store.keep(run.record())
            return
        with anyio.move_on_after(STORE_SECONDS, shield=True) as scope:
            try:
                await self.store.save(run.record())
            except Exception as error:
                log.failure(f"the store could not keep run {run.id}", error)
        if scope.cancelled_caught:
            log.warning(f"the store has not kept run {run.id} within {STORE_SECONDS:g} s")

    def _forget(self, run: ServedRun) -> None:
        del self._live[run.id]
        self._driven.discard(run.id)
        if run.asked.key is not None:
            self._keys.pop((run.asked.owner, run.asked.key), None)

    # ---- finding them

    def live(self, run_id: str, owner: str | None = None) -> ServedRun | None:
        """A run of an owner that has not ended; None if there is none."""
        run = self._live.get(run_id)
        return run if run is not None and run.asked.owner == owner else None

    async def find(self, run_id: str, owner: str | None = None) -> ServedRun | RunRecord:
        """A run of an owner, one that goes on or one that is kept; its events are kept from now on.

        Raises:
            Problem: There is none, 404; or the store cannot tell, 503.
        """
        found: ServedRun | RunRecord | None = self.live(run_id, owner)
        found = found or await _from_store(self.store.load(run_id)) or self.live(run_id, owner)
        if found is None or (isinstance(found, RunRecord) and found.owner != owner):
            raise Problem(404, "unknown_run", "there is no such run")
        return _watched(found)

    async def page(self, owner: str | None, before: tuple[float, str] | None, limit: int) -> list[RunRecord]:
        """The newest runs of an owner, those that go on among them, the newest first.

        Raises:
            Problem: The store cannot tell, 503.
        """
        kept = await _from_store(self.store.page(owner, before, limit))
        live = [run.record() for run in self._live.values() if run.asked.owner == owner]
        found = {each.id: each for each in (*live, *kept) if before is None or each.position < before}
        return sorted(found.values(), key=lambda each: each.position, reverse=True)[:limit]

    @property
    def is_ready(self) -> bool:
        """Whether a run would be taken in now."""
        token = current_token()
        hosts = [host_of(agent, token) for agent in self.agents.values()]
        is_hosted = self.on_disconnect == "cancel" or all(hosts)
        return is_hosted and self._has_room and not any(host is not None and host.is_closing for host in hosts)


async def _from_store(telling: Awaitable[T]) -> T:
    """The value that a store gives, which may be somebody's database.

    Raises:
        Problem: It fails or takes too long, 503.
    """
    try:
        with anyio.fail_after(STORE_SECONDS):
            return await telling
    except Exception as error:
        log.failure("the store of runs cannot tell", error)
        raise Problem(503, "store_failed", "what is kept of runs cannot be told now", retry_after=1) from None


def served_runs(
    agents: BaseAgent[Any] | Mapping[str, BaseAgent[Any]] | ServedRuns, options: ServingOptions
) -> ServedRuns:
    """The runs that a router is given, or those that it makes of agents.

    Raises:
        InvalidArguments: An argument cannot be what was meant, or there are options for runs that are made already.
    """
    if not isinstance(agents, ServedRuns):
        return ServedRuns(agents, **options)
    if options:
        raise InvalidArguments(f"{sorted(options)} belong to the ServedRuns that the router is given")
    return agents


def _watched(found: ServedRun | RunRecord) -> ServedRun | RunRecord:
    """The run, the events of which are kept from now on."""
    if isinstance(found, ServedRun):
        found.watch()
    return found


def checked_agents(agents: Any) -> dict[str, BaseAgent[Any]]:
    """The agents that are served, by name.

    Raises:
        InvalidArguments: There is none, or something is no agent.
    """
    given: dict[Any, Any] = dict(agents) if is_mapping(agents) else {getattr(agents, "name", ""): agents}
    if not given:
        raise InvalidArguments("there is no agent to serve: give one, or several by name")
    for name, agent in given.items():
        if not isinstance(agent, BaseAgent):
            raise InvalidArguments(f"{repr_of(agent)} cannot be served: give a BaseAgent, or several by name")
        if not isinstance(name, str) or not name:
            raise InvalidArguments(f"{repr_of(name)} cannot be the name of an agent: give a text")
    return given
