"""The ways to run an agent that are measured, and what one of them has to offer.

A module of this folder is one library; it is imported only in a process that measures it. Module names of other
frameworks are also those of their environments and of the files in `benchmarks/peers`.
"""

from __future__ import annotations

import importlib
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from typing import Any, ClassVar

from benchmarks import work

One = Callable[[], Awaitable[Any]]
"""Does the work once and gives the answer; a plain function if the adapter has no event loop."""


@dataclass(frozen=True)
class Task:
    """What an adapter is to make ready.

    Args:
        kind: Name of the adapter's method.
        url: The endpoint's, with `/v1`.
        size: Turns, messages of the history, or levels of delegation.
        at_once: How many run side by side, for who has to size a pool.
        connections: Connections that may be open. None: what the library allows unasked.
        tool: The function that the model calls as `look`.
    """

    kind: str
    url: str
    size: int = 1
    at_once: int = 1
    connections: int | None = None
    tool: Callable[..., Any] = work.look


@dataclass(frozen=True)
class Spans:
    """Where the spans and metrics of runs go.

    Args:
        tracers: OpenTelemetry's provider of tracers.
        meters: That of meters.
        has_content: Whether spans have what was said.
    """

    tracers: Any
    meters: Any
    has_content: bool


class Adapter:
    """One way to run an agent.

    Each kind of work is a method that gets a `Task` and gives a function that does it once. It is called on the event
    loop that the function runs on.
    """

    backend: ClassVar[tuple[str, dict[str, Any]] | None] = ("asyncio", {})
    """AnyIO's name of the event loop and its options; None for blocking functions, which run in threads."""
    packages: ClassVar[tuple[str, ...]] = ()
    """Distributions whose versions are told."""
    imports: ClassVar[str] = ""
    """The statement that a user's module begins with."""
    cannot: ClassVar[dict[str, str]] = {}
    """Kinds of work that this library has no way for, and why."""
    play: ClassVar[dict[str, Any]] = {}
    """What the endpoint has to know: see `benchmarks.endpoint.Play`."""

    def tools(self, task: Task) -> One:
        """Ask; call the tools that the reply wants, side by side; ask again, until there is a text."""
        raise NotImplementedError

    def watched_tools(self, task: Task, spans: Spans) -> One:
        """As `tools`, with spans and metrics of each run; of those that `benchmarks.spans` measures."""
        raise NotImplementedError

    def stream(self, task: Task) -> One:
        """Read an answer piece by piece; gives the number of pieces with text."""
        raise NotImplementedError

    def object(self, task: Task) -> One:
        """Get an answer as a checked object."""
        raise NotImplementedError

    def delegate(self, task: Task) -> One:
        """Ask an agent that asks an agent, `size` levels deep, by the tool `ask`."""
        raise NotImplementedError

    def history(self, task: Task) -> One:
        """Ask with `size` messages of history; one model call, no tools."""
        raise NotImplementedError

    async def aclose(self) -> None:
        """Close what was opened."""


@dataclass(frozen=True)
class Spec:
    """Where an adapter is found.

    Args:
        title: What it is called in tables.
        module: Its module in this folder.
        kind: The class there.
        is_peer: It has an environment of its own, with the module's name.
    """

    title: str
    module: str
    kind: str = "Agents"
    is_peer: bool = False
    needs: tuple[str, ...] = field(default=())

    def load(self) -> Adapter:
        """Import it and make one."""
        module = importlib.import_module(f"{__name__}.{self.module}")
        made: Adapter = getattr(module, self.kind)()
        return made


BASE = "by-hand-openai"

ADAPTERS: dict[str, Spec] = {
    BASE: Spec("by hand, AsyncOpenAI", "by_hand", "OnOpenAI"),
    "by-hand-httpx2": Spec("by hand, httpx2", "by_hand", "OnHttpx2"),
    "by-hand-httpx2-trio": Spec("by hand, httpx2 on trio", "by_hand", "OnHttpx2Trio"),
    "by-hand-aiohttp": Spec("by hand, aiohttp", "by_hand", "OnAiohttp", needs=("aiohttp",)),
    "fractal": Spec("fractal", "fractal", "Own"),
    "fractal-openai": Spec("fractal, a user's AsyncOpenAI", "fractal", "WithOpenAI"),
    "fractal-trio": Spec("fractal on trio", "fractal", "OnTrio"),
    "fractal-uvloop": Spec("fractal on uvloop", "fractal", "OnUvloop", needs=("uvloop",)),
    "fractal-sync": Spec("fractal.sync, in threads", "fractal", "Sync"),
    "agno": Spec("agno", "agno", is_peer=True),
    "agent-framework": Spec("agent-framework", "agent_framework", is_peer=True),
    "langchain": Spec("langchain", "langchain", is_peer=True),
    "openai-agents": Spec("openai-agents", "openai_agents", is_peer=True),
    "pydantic-ai": Spec("pydantic-ai", "pydantic_ai", is_peer=True),
    "smolagents": Spec("smolagents, in threads", "smolagents", is_peer=True),
    "strands": Spec("strands", "strands", is_peer=True),
}
