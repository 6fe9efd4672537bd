"""smolagents: blocking agents, one for each thread, since an agent keeps the conversation of its run."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any, ClassVar

from smolagents import LogLevel, OpenAIModel, Tool, ToolCallingAgent

from benchmarks import work
from benchmarks.adapters import Adapter, Task


class Look(Tool):  # type: ignore[misc]
    """The tool."""

    name = "look"
    description = work.DESCRIPTION
    inputs = {"place": {"type": "string", "description": "Where to look."}}  # noqa: RUF012
    output_type = "string"

    def forward(self, place: str) -> str:
        return work.look_plain(place)


class Agents(Adapter):
    """`ToolCallingAgent`: its answer is a call of the tool `final_answer`."""

    packages = ("smolagents", "openai")
    imports = "from smolagents import OpenAIModel, ToolCallingAgent"
    backend: ClassVar[tuple[str, dict[str, Any]] | None] = None
    play = {"answer_tool": ("final_answer", "answer"), "ask_argument": "task"}  # noqa: RUF012
    cannot = {  # noqa: RUF012
        "stream": "its answers are arguments of a tool call, which come whole",
        "object": "its answers have no schema",
        "cancel": "a run is not cancelled from outside; interrupt() waits for the step",
    }

    def tools(self, task: Task) -> Callable[[], Any]:
        model = self.model(task)
        look = Look()
        if task.tool is not work.look:
            look.forward = task.tool
        return self.in_each_thread(lambda: self.agent(model, [look], max_steps=task.size + 1))

    def delegate(self, task: Task) -> Callable[[], Any]:
        model = self.model(task)

        def made() -> Any:
            agent = self.agent(model, [])
            for _ in range(task.size - 1):
                agent.name, agent.description = "ask", "Ask a colleague."
                agent = self.agent(model, [], managed_agents=[agent])
            return agent

        return self.in_each_thread(made)

    def model(self, task: Task) -> Any:
        return OpenAIModel(
            work.MODEL, api_base=task.url, api_key="none", client_kwargs={"max_retries": 0, "timeout": work.PATIENCE}
        )

    def agent(self, model: Any, tools: list[Any], **more: Any) -> Any:
        return ToolCallingAgent(tools, model, instructions=work.PROMPT, verbosity_level=LogLevel.OFF, **more)

    def in_each_thread(self, made: Callable[[], Any]) -> Callable[[], Any]:
        mine = threading.local()

        def one() -> object:
            if not hasattr(mine, "agent"):
                mine.agent = made()
            return mine.agent.run(work.QUESTION)

        return one
