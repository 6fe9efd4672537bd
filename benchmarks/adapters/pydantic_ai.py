"""pydantic-ai."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from openai import AsyncOpenAI
from pydantic_ai import Agent, InstrumentationSettings, NativeOutput, UsageLimits
from pydantic_ai.capabilities import Instrumentation
from pydantic_ai.models.openai import OpenAIChatModel
from pydantic_ai.providers.openai import OpenAIProvider

from benchmarks import work
from benchmarks.adapters import Adapter, One, Spans, Task


class Agents(Adapter):
    """One agent for all runs; tools side by side, as they are by default."""

    packages = ("pydantic-ai-slim", "openai")
    imports = "from pydantic_ai import Agent; from pydantic_ai.models.openai import OpenAIChatModel"

    def model(self, task: Task) -> Any:
        self.client = AsyncOpenAI(base_url=task.url, api_key="none", max_retries=0, timeout=work.PATIENCE)
        return OpenAIChatModel(work.MODEL, provider=OpenAIProvider(openai_client=self.client))

    def watched_tools(self, task: Task, spans: Spans) -> One:
        settings = InstrumentationSettings(
            tracer_provider=spans.tracers, meter_provider=spans.meters, include_content=spans.has_content
        )
        return self.tools(task, [Instrumentation(settings)])

    def tools(self, task: Task, capabilities: Sequence[Any] = ()) -> One:
        agent = Agent(self.model(task), instructions=work.PROMPT, tools=[task.tool], capabilities=capabilities)
        limits = UsageLimits(request_limit=None)

        async def one() -> object:
            return (await agent.run(work.QUESTION, usage_limits=limits)).output

        return one

    def stream(self, task: Task) -> One:
        agent = Agent(self.model(task), instructions=work.PROMPT)

        async def one() -> int:
            async with agent.run_stream(work.QUESTION) as result:
                return len([piece async for piece in result.stream_text(delta=True, debounce_by=None) if piece])

        return one

    def object(self, task: Task) -> One:
        from benchmarks.adapters.weather import Weather

        agent = Agent(self.model(task), instructions=work.PROMPT, output_type=NativeOutput(Weather))

        async def one() -> object:
            return (await agent.run(work.QUESTION)).output

        return one

    def delegate(self, task: Task) -> One:
        model = self.model(task)

        def level(depth: int) -> Any:
            if depth == 1:
                return Agent(model, instructions=work.PROMPT)
            colleague = level(depth - 1)

            async def ask(query: str) -> str:
                """Ask a colleague."""
                return str((await colleague.run(query)).output)

            return Agent(model, instructions=work.PROMPT, tools=[ask])

        agent = level(task.size)

        async def one() -> object:
            return (await agent.run(work.QUESTION)).output

        return one

    async def aclose(self) -> None:
        await self.client.close()
