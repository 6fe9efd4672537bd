"""Fractal, in its kinds."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, ClassVar

import httpx2  # noqa: F401  # the first request loads it; each fork would do so again

from benchmarks import work
from benchmarks.adapters import Adapter, One, Spans, Task
from fractal import BaseAgent, TextDelta
from fractal.messages import Transcript
from fractal.model import ModelRequest
from fractal.models.openai import OpenAIModel


class Own(Adapter):
    """Fractal's own wire, on asyncio."""

    packages = ("fractal-anyio", "anyio", "pydantic", "httpx2")
    imports = "from fractal import BaseAgent"

    def model(self, task: Task) -> Any:
        """What sends the requests."""
        return OpenAIModel(base_url=task.url, api_key="none", max_connections=task.connections)

    def agent(self, task: Task, name: str = "Looker", **options: Any) -> BaseAgent:
        self.agents = [BaseAgent(name, work.PROMPT, work.MODEL, self.model(task), **options)]
        return self.agents[0]

    def watched_tools(self, task: Task, spans: Spans) -> One:
        from fractal.tracing import Instrumentation

        return self.tools(task, [Instrumentation(spans.tracers, spans.meters, include_content=spans.has_content)])

    def tools(self, task: Task, observers: Sequence[Any] = ()) -> One:
        agent = self.agent(task, observers=observers).add_tool(task.tool, name="look")
        turns = task.size + 1

        async def one() -> object:
            return content(await agent.run(work.QUESTION, turns))

        return one

    def stream(self, task: Task) -> One:
        agent = self.agent(task)

        async def one() -> int:
            count = 0
            async with agent.stream(work.QUESTION) as stream:
                async for event in stream:
                    count += isinstance(event, TextDelta)
            return count

        return one

    def object(self, task: Task) -> One:
        agent = self.agent(task)

        async def one() -> object:
            return content(await agent.run(work.QUESTION, output_type=_weather()))

        return one

    def delegate(self, task: Task) -> One:
        agent = self.delegating(task)

        async def one() -> object:
            return content(await agent.run(work.QUESTION))

        return one

    def delegating(self, task: Task) -> BaseAgent:
        agent = self.agent(task)
        for _ in range(task.size - 1):
            agent = BaseAgent("Asker", work.PROMPT, work.MODEL, self.model(task)).register_delegate(
                agent, "ask", "Ask a colleague."
            )
        return agent

    def history(self, task: Task) -> One:
        agent = self.agent(task)
        messages = work.history(task.size)

        async def one() -> object:
            return content(await agent.run(work.QUESTION, messages=messages))

        return one

    def request(self, task: Task) -> One:
        """A model call of a run whose transcript has grown: what `history` is without reading the history in."""
        model = self.model(task)
        if not hasattr(model, "respond"):
            model = OpenAIModel(model)
        transcript = Transcript([*work.history(task.size), {"role": "user", "content": work.QUESTION}])
        request = ModelRequest(model=work.MODEL, system=work.PROMPT, transcript=transcript)

        async def one() -> object:
            return (await model.respond(request)).text

        return one


def content(result: Any) -> object:
    """The content of a result that is a success."""
    result.raise_for_error()
    return result.content


def _weather() -> Any:
    from benchmarks.adapters.weather import Weather

    return Weather


class WithOpenAI(Own):
    """With the client that a user brings."""

    packages = ("fractal-anyio", "openai")
    imports = "from openai import AsyncOpenAI; from fractal import BaseAgent"

    def model(self, task: Task) -> Any:
        from openai import AsyncOpenAI

        client = AsyncOpenAI(base_url=task.url, api_key="none", timeout=work.PATIENCE)
        return client if task.connections is None else OpenAIModel(client, max_connections=task.connections)


class OnTrio(Own):
    """On trio."""

    packages = ("fractal-anyio", "trio")
    imports = "import trio; from fractal import BaseAgent"
    backend: ClassVar[tuple[str, dict[str, Any]] | None] = ("trio", {})


class OnUvloop(Own):
    """On uvloop."""

    packages = ("fractal-anyio", "uvloop")
    imports = "import uvloop; from fractal import BaseAgent"
    backend: ClassVar[tuple[str, dict[str, Any]] | None] = ("asyncio", {"use_uvloop": True})


class Sync(Own):
    """`fractal.sync`, called from threads."""

    imports = "from fractal import BaseAgent, sync"
    backend: ClassVar[tuple[str, dict[str, Any]] | None] = None

    def __init__(self) -> None:
        from fractal import sync

        self.sync = sync

    def tools(self, task: Task) -> Callable[[], Any]:
        agent = self.agent(task).add_tool(task.tool, name="look")
        return lambda: content(self.sync.run(agent, work.QUESTION, max_iterations=task.size + 1))

    def stream(self, task: Task) -> Callable[[], Any]:
        agent = self.agent(task)

        def one() -> int:
            with self.sync.stream(agent, work.QUESTION) as stream:
                return sum(isinstance(event, TextDelta) for event in stream)

        return one

    def object(self, task: Task) -> Callable[[], Any]:
        agent, weather = self.agent(task), _weather()
        return lambda: content(self.sync.run(agent, work.QUESTION, output_type=weather))

    def delegate(self, task: Task) -> Callable[[], Any]:
        agent = self.delegating(task)
        return lambda: content(self.sync.run(agent, work.QUESTION))

    def history(self, task: Task) -> Callable[[], Any]:
        agent, messages = self.agent(task), work.history(task.size)
        return lambda: content(self.sync.run(agent, work.QUESTION, messages=messages))
