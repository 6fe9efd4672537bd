"""agno."""

from __future__ import annotations

from typing import Any

from agno.agent import Agent
from agno.models.openai import OpenAIChat
from openai import AsyncOpenAI

from benchmarks import work
from benchmarks.adapters import Adapter, One, Task


class Agents(Adapter):
    """One agent for all runs, without a database or telemetry."""

    packages = ("agno", "openai")
    imports = "from agno.agent import Agent; from agno.models.openai import OpenAIChat"

    def agent(self, task: Task, **more: Any) -> Any:
        self.client = AsyncOpenAI(base_url=task.url, api_key="none", max_retries=0, timeout=work.PATIENCE)
        return self.with_client(**more)

    def with_client(self, **more: Any) -> Any:
        model = OpenAIChat(id=work.MODEL, async_client=self.client)
        return Agent(model=model, instructions=work.PROMPT, telemetry=False, **more)

    def running(self, agent: Any) -> One:
        async def one() -> object:
            return (await agent.arun(work.QUESTION)).content

        return one

    def tools(self, task: Task) -> One:
        return self.running(self.agent(task, tools=[task.tool]))

    def stream(self, task: Task) -> One:
        agent = self.agent(task)

        async def one() -> int:
            count = 0
            async for event in agent.arun(work.QUESTION, stream=True):
                count += event.event == "RunContent" and bool(event.content)
            return count

        return one

    def object(self, task: Task) -> One:
        from benchmarks.adapters.weather import Weather

        return self.running(self.agent(task, output_schema=Weather))

    def delegate(self, task: Task) -> One:
        self.agent(task)

        def level(depth: int) -> Any:
            if depth == 1:
                return self.with_client()
            colleague = level(depth - 1)

            async def ask(query: str) -> str:
                """Ask a colleague."""
                return str((await colleague.arun(query)).content)

            return self.with_client(tools=[ask])

        return self.running(level(task.size))

    async def aclose(self) -> None:
        await self.client.close()
