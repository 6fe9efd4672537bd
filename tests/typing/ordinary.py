"""Code that users write, with and without types of answers: all of it is valid. Only type checkers read it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

from pydantic import BaseModel
from typing_extensions import Unpack

from fractal import (
    AgentOptions,
    AgentResult,
    BaseAgent,
    BatchItem,
    BatchStream,
    Limits,
    RunBounds,
    RunOptions,
    RunStream,
    ToolResult,
    run_many,
    stream_many,
    sync,
    tool,
)
from fractal.sync import Handle


class Order(BaseModel):
    pieces: int


class Exact(BaseAgent):
    async def run(
        self,
        user_input: object,
        max_iterations: int | None = None,
        max_retries: int | None = None,
        messages: Sequence[Mapping[str, Any]] | None = None,
        **options: Unpack[RunBounds],
    ) -> AgentResult:
        result: AgentResult = await super().run(user_input, max_iterations, max_retries, messages, **options)
        return result.model_copy(update={"content": "x"})

    def stream(
        self,
        user_input: object,
        max_iterations: int | None = None,
        max_retries: int | None = None,
        messages: Sequence[Mapping[str, Any]] | None = None,
        *,
        buffer: int = 64,
        **options: Unpack[RunBounds],
    ) -> RunStream:
        return super().stream(user_input, max_iterations, max_retries, messages, buffer=buffer, **options)

    async def execute_tool(self, tool_name: str = "", /, **arguments: Any) -> ToolResult:
        return await super().execute_tool(tool_name, **arguments)


class SExact(sync.BaseAgent):
    def run(self, user_input: object, *arguments: Any, **options: Any) -> AgentResult:
        return super().run(user_input, *arguments, **options)


class My(BaseAgent):
    model = "m"
    output_type = Order

    def __init__(self, city: str, **options: Unpack[AgentOptions]) -> None:
        super().__init__(name="x", system_prompt=self.prompt, **options)

    def prompt(self) -> str:
        return "p"


class Asks(Protocol):
    async def run(self, user_input: object, /) -> AgentResult: ...


def takes(a: Asks) -> None: ...
async def main(agent: BaseAgent, agents: dict[str, BaseAgent], flag: bool) -> list[AgentResult]:
    agents["a"] = My("x")
    agents["b"] = BaseAgent("x", "p", output_type=Order)
    takes(agent)
    takes(My("x"))
    takes(agents["b"])
    async with My("x") as m:
        (await m.run("x")).content.anything()
    r = await agent.run("x", output_type=Order if flag else None)
    rs = await run_many(agent, ["x"])
    hs: list[Handle] = [sync.start(a, "x") for a in agents.values()]
    items: list[BatchItem] = []
    batch: BatchStream
    async with stream_many(agent, ["x"]) as batch:
        items = [item async for item in batch]
    kw: dict[str, Any] = {}
    await agent.run("x", **kw)
    BaseAgent("a", "p", **kw)
    o: RunOptions = {"timeout": 3, "output_type": Order | None}
    await agent.run("x", **o)
    ao: AgentOptions = {"temperature": 3, "output_type": list[Order], "limits": Limits()}
    BaseAgent("a", "p", **ao).register_delegate(My("x")).add_tool(len)
    assert r.success
    assert len(hs) == len(items)
    x = [await a.run("q") for a in (My("x"), agent)]
    fn = agent.run
    x.append(await fn("q"))
    return rs + x


@tool
def one() -> int:
    return 1


@tool(name="two", timeout=1)
async def another(x: int) -> int:
    return x
