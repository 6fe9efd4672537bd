"""langchain: `create_agent`, on langgraph."""

from __future__ import annotations

from typing import Any

from langchain.agents import create_agent
from langchain.agents.structured_output import ProviderStrategy
from langchain_core.tools import StructuredTool
from langchain_openai import ChatOpenAI

from benchmarks import work
from benchmarks.adapters import Adapter, One, Task

QUESTION = {"messages": [{"role": "user", "content": work.QUESTION}]}


class Agents(Adapter):
    """One agent for all runs, without a checkpointer or tracing."""

    packages = ("langchain", "langgraph", "langchain-openai", "openai")
    imports = "from langchain.agents import create_agent; from langchain_openai import ChatOpenAI"

    def agent(self, task: Task, **more: Any) -> Any:
        model = ChatOpenAI(model=work.MODEL, base_url=task.url, api_key="none", max_retries=0, timeout=work.PATIENCE)  # type: ignore[arg-type]
        return create_agent(model, system_prompt=work.PROMPT, **more)

    def running(self, agent: Any, turns: int = 10) -> One:
        config = {"recursion_limit": 2 * turns + 5}

        async def one() -> object:
            return (await agent.ainvoke(QUESTION, config))["messages"][-1].content

        return one

    def tools(self, task: Task) -> One:
        way = "coroutine" if task.tool.__code__.co_flags & 0x80 else "func"
        made: Any = StructuredTool.from_function
        return self.running(self.agent(task, tools=[made(**{way: task.tool})]), task.size + 1)

    def stream(self, task: Task) -> One:
        agent = self.agent(task)

        async def one() -> int:
            count = 0
            async for chunk, _ in agent.astream(QUESTION, stream_mode="messages"):
                count += bool(chunk.content)
            return count

        return one

    def object(self, task: Task) -> One:
        from benchmarks.adapters.weather import Weather

        agent = self.agent(task, response_format=ProviderStrategy(Weather))

        async def one() -> object:
            return (await agent.ainvoke(QUESTION))["structured_response"]

        return one

    def delegate(self, task: Task) -> One:
        def level(depth: int) -> Any:
            if depth == 1:
                return self.agent(task)
            colleague = level(depth - 1)

            async def ask(query: str) -> str:
                """Ask a colleague."""
                answer = await colleague.ainvoke({"messages": [{"role": "user", "content": query}]})
                return str(answer["messages"][-1].content)

            return self.agent(task, tools=[StructuredTool.from_function(coroutine=ask)])

        return self.running(level(task.size))
