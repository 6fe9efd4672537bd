"""openai-agents."""

from __future__ import annotations

from typing import Any

from agents import Agent, OpenAIChatCompletionsModel, Runner, function_tool, set_tracing_disabled
from openai import AsyncOpenAI
from openai.types.responses import ResponseTextDeltaEvent

from benchmarks import work
from benchmarks.adapters import Adapter, One, Task

set_tracing_disabled(True)


class Agents(Adapter):
    """One agent for all runs, without tracing."""

    packages = ("openai-agents", "openai")
    imports = "from agents import Agent, Runner"
    play = {"ask_argument": "input"}  # noqa: RUF012

    def agent(self, task: Task, **more: Any) -> Any:
        self.client = AsyncOpenAI(base_url=task.url, api_key="none", max_retries=0, timeout=work.PATIENCE)
        return self.with_client(**more)

    def with_client(self, **more: Any) -> Any:
        model = OpenAIChatCompletionsModel(work.MODEL, openai_client=self.client)
        return Agent(name="Looker", instructions=work.PROMPT, model=model, **more)

    def running(self, agent: Any, turns: int = 10) -> One:
        async def one() -> object:
            return (await Runner.run(agent, work.QUESTION, max_turns=turns)).final_output

        return one

    def tools(self, task: Task) -> One:
        return self.running(self.agent(task, tools=[function_tool(task.tool)]), task.size + 1)

    def stream(self, task: Task) -> One:
        agent = self.agent(task)

        async def one() -> int:
            count = 0
            async for event in Runner.run_streamed(agent, work.QUESTION).stream_events():
                is_text = event.type == "raw_response_event" and isinstance(event.data, ResponseTextDeltaEvent)
                count += is_text and bool(event.data.delta)
            return count

        return one

    def object(self, task: Task) -> One:
        from benchmarks.adapters.weather import Weather

        return self.running(self.agent(task, output_type=Weather))

    def delegate(self, task: Task) -> One:
        agent = self.agent(task)
        for _ in range(task.size - 1):
            agent = self.with_client(tools=[agent.as_tool("ask", "Ask a colleague.")])
        return self.running(agent)

    async def aclose(self) -> None:
        await self.client.close()
