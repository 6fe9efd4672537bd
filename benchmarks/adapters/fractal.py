"""Fractal, in its kinds."""

from __future__ import annotations

import contextvars
import threading
import time
from collections.abc import Callable
from typing import Any, ClassVar

import anyio

from benchmarks import work
from benchmarks.adapters import Adapter, One, Task
from fractal import BaseAgent, TextDelta, sync
from fractal.messages import Transcript
from fractal.models.base import ModelRequest
from fractal.models.openai import OpenAIModel
from fractal.testing import ScriptedModel, answers


class Own(Adapter):
    """Fractal's own wire, on asyncio."""

    packages = ("fractal", "anyio", "pydantic", "httpx2")
    imports = "from fractal import BaseAgent"

    def model(self, task: Task) -> Any:
        """What sends the requests."""
        return OpenAIModel(base_url=task.url, api_key="none", max_connections=task.connections)

    def agent(self, task: Task, name: str = "Looker") -> BaseAgent:
        self.agents = [BaseAgent(name, work.PROMPT, work.MODEL, self.model(task))]
        return self.agents[0]

    def tools(self, task: Task) -> One:
        agent = self.agent(task).add_tool(task.tool, name="look")
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
    from benchmarks.adapters.by_hand import Weather

    return Weather


class WithOpenAI(Own):
    """With the client that a user brings."""

    packages = ("fractal", "openai")
    imports = "from openai import AsyncOpenAI; from fractal import BaseAgent"

    def model(self, task: Task) -> Any:
        from openai import AsyncOpenAI

        client = AsyncOpenAI(base_url=task.url, api_key="none")
        return client if task.connections is None else OpenAIModel(client, max_connections=task.connections)


class OnTrio(Own):
    """On trio."""

    packages = ("fractal", "trio")
    imports = "import trio; from fractal import BaseAgent"
    backend: ClassVar[tuple[str, dict[str, Any]] | None] = ("trio", {})


class OnUvloop(Own):
    """On uvloop."""

    packages = ("fractal", "uvloop")
    imports = "import uvloop; from fractal import BaseAgent"
    backend: ClassVar[tuple[str, dict[str, Any]] | None] = ("asyncio", {"use_uvloop": True})


class Sync(Own):
    """`fractal.sync`, called from threads."""

    imports = "from fractal import BaseAgent, sync"
    backend: ClassVar[tuple[str, dict[str, Any]] | None] = None

    def tools(self, task: Task) -> Callable[[], Any]:
        agent = self.agent(task).add_tool(task.tool, name="look")
        return lambda: content(sync.run(agent, work.QUESTION, max_iterations=task.size + 1))

    def stream(self, task: Task) -> Callable[[], Any]:
        agent = self.agent(task)

        def one() -> int:
            with sync.stream(agent, work.QUESTION) as stream:
                return sum(isinstance(event, TextDelta) for event in stream)

        return one

    def object(self, task: Task) -> Callable[[], Any]:
        agent, weather = self.agent(task), _weather()
        return lambda: content(sync.run(agent, work.QUESTION, output_type=weather))

    def delegate(self, task: Task) -> Callable[[], Any]:
        agent = self.delegating(task)
        return lambda: content(sync.run(agent, work.QUESTION))

    def history(self, task: Task) -> Callable[[], Any]:
        agent, messages = self.agent(task), work.history(task.size)
        return lambda: content(sync.run(agent, work.QUESTION, messages=messages))


# ---- the facade against the awaited run, with a model in memory


def facade(threads: int, calls: int, latency: float) -> dict[str, float]:
    """CPU and wall seconds of one call: awaited in so many tasks, and blocking in so many threads."""
    awaited = anyio.run(_awaited, threads, calls, latency)
    blocking = _blocking(threads, calls, latency)
    return {
        "awaited cpu": awaited[0],
        "awaited wall": awaited[1],
        "blocking wall": blocking[1],
        "more cpu": blocking[0] - awaited[0],
    }


def _greeter(latency: float) -> BaseAgent:
    answer = answers.text(work.ANSWER, delay=latency)
    return BaseAgent("Greeter", "You greet.", client=ScriptedModel(lambda _: answer))


async def _awaited(tasks: int, calls: int, latency: float) -> tuple[float, float]:
    agent = _greeter(latency)

    async def caller() -> None:
        for _ in range(calls):
            content(await agent.run("hi"))

    async def all_callers() -> None:
        async with anyio.create_task_group() as group:
            for _ in range(tasks):
                group.start_soon(caller)

    await all_callers()
    agent = _greeter(latency)  # the old one's model has kept every request
    cpu, wall = time.process_time(), time.perf_counter()
    await all_callers()
    return (time.process_time() - cpu) / (tasks * calls), (time.perf_counter() - wall) / (tasks * calls)


def _blocking(count: int, calls: int, latency: float) -> tuple[float, float]:
    with sync.portal():
        _in_threads(count, calls, _greeter(latency))
        cpu, wall = time.process_time(), time.perf_counter()
        _in_threads(count, calls, _greeter(latency))
        return (time.process_time() - cpu) / (count * calls), (time.perf_counter() - wall) / (count * calls)


def _in_threads(count: int, calls: int, agent: BaseAgent) -> None:
    def caller() -> None:
        for _ in range(calls):
            content(sync.run(agent, "hi"))

    threads = [threading.Thread(target=contextvars.copy_context().run, args=(caller,)) for _ in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
