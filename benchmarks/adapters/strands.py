"""strands."""

from __future__ import annotations

from typing import Any

from openai import AsyncOpenAI
from strands import Agent, tool
from strands.models.openai import OpenAIModel

from benchmarks import work
from benchmarks.adapters import Adapter, One, Task


class Agents(Adapter):
    """An agent for each run, since it keeps the conversation and refuses a second run meanwhile; one client for all."""

    packages = ("strands-agents", "openai")
    imports = "from strands import Agent; from strands.models.openai import OpenAIModel"
    play = {"object_tool": "Weather"}  # noqa: RUF012

    def model(self, task: Task, *, stream: bool = False) -> Any:
        self.client = AsyncOpenAI(base_url=task.url, api_key="none", max_retries=0, timeout=work.PATIENCE)
        return OpenAIModel(client=self.client, model_id=work.MODEL, stream=stream)

    def agent(self, model: Any, **more: Any) -> Any:
        return Agent(model=model, system_prompt=work.PROMPT, callback_handler=None, **more)

    def tools(self, task: Task) -> One:
        model, tools = self.model(task), [tool(task.tool)]

        async def one() -> object:
            return str(await self.agent(model, tools=tools).invoke_async(work.QUESTION)).strip()

        return one

    def stream(self, task: Task) -> One:
        model = self.model(task, stream=True)

        async def one() -> int:
            count = 0
            async for event in self.agent(model).stream_async(work.QUESTION):
                count += bool(event.get("data"))
            return count

        return one

    def object(self, task: Task) -> One:
        from benchmarks.adapters.weather import Weather

        model = self.model(task)

        async def one() -> object:
            agent = self.agent(model)
            return (await agent.invoke_async(work.QUESTION, structured_output_model=Weather)).structured_output

        return one

    def delegate(self, task: Task) -> One:
        model = self.model(task)

        def level(depth: int) -> Any:
            if depth == 1:
                return self.agent(model)

            @tool
            async def ask(query: str) -> str:
                """Ask a colleague."""
                return str(await level(depth - 1).invoke_async(query)).strip()

            return self.agent(model, tools=[ask])

        async def one() -> object:
            return str(await level(task.size).invoke_async(work.QUESTION)).strip()

        return one

    async def aclose(self) -> None:
        await self.client.close()
