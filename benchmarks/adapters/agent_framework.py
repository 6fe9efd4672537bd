"""Microsoft agent-framework."""

from __future__ import annotations

from typing import Any

from agent_framework import Agent
from agent_framework.openai import OpenAIChatCompletionClient
from openai import AsyncOpenAI

from benchmarks import work
from benchmarks.adapters import Adapter, One, Task


class Agents(Adapter):
    """One agent for all runs; telemetry is off by default."""

    packages = ("agent-framework-core", "agent-framework-openai", "openai")
    imports = "from agent_framework import Agent; from agent_framework.openai import OpenAIChatCompletionClient"

    def agent(self, task: Task, **more: Any) -> Any:
        self.client = AsyncOpenAI(base_url=task.url, api_key="none", max_retries=0, timeout=work.PATIENCE)
        return self.with_client(task.size + 1, **more)

    def with_client(self, turns: int, **more: Any) -> Any:
        client = OpenAIChatCompletionClient(model=work.MODEL, async_client=self.client)
        client.function_invocation_configuration["max_iterations"] = turns
        return Agent(client=client, instructions=work.PROMPT, **more)

    def running(self, agent: Any) -> One:
        async def one() -> object:
            return (await agent.run(work.QUESTION)).text

        return one

    def tools(self, task: Task) -> One:
        return self.running(self.agent(task, tools=[task.tool]))

    def stream(self, task: Task) -> One:
        agent = self.agent(task)

        async def one() -> int:
            count = 0
            async for update in agent.run(work.QUESTION, stream=True):
                count += bool(update.text)
            return count

        return one

    def object(self, task: Task) -> One:
        from benchmarks.adapters.weather import Weather

        agent = self.agent(task)

        async def one() -> object:
            return (await agent.run(work.QUESTION, options={"response_format": Weather})).value

        return one

    def delegate(self, task: Task) -> One:
        agent = self.agent(task)
        for _ in range(task.size - 1):
            asked = agent.as_tool(name="ask", description="Ask a colleague.", arg_name="query")
            agent = self.with_client(10, tools=[asked])
        return self.running(agent)

    async def aclose(self) -> None:
        await self.client.close()
