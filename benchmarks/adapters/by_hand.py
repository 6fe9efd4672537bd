"""Loops that one would write without a framework: with the `openai` SDK, with httpx2, with aiohttp."""

from __future__ import annotations

import asyncio
import inspect
import json
from collections.abc import AsyncIterator, Awaitable, Callable
from itertools import cycle
from typing import TYPE_CHECKING, Any, ClassVar

import anyio

from benchmarks import work
from benchmarks.adapters import Adapter, One, Task

if TYPE_CHECKING:
    from benchmarks.adapters.weather import Weather

Messages = list[dict[str, Any]]
Functions = dict[str, Callable[..., Awaitable[str]]]
POOL = 100
"""Connections of one client where thousands are wanted: a pool looks through all it has at each request."""


ASK_SCHEMA = {
    "type": "function",
    "function": {
        "name": "ask",
        "description": "Ask a colleague.",
        "parameters": {"type": "object", "properties": {"query": {"type": "string"}}, "required": ["query"]},
    },
}


def asking(text: str) -> Messages:
    return [{"role": "system", "content": work.PROMPT}, {"role": "user", "content": text}]


class ByHand(Adapter):
    """The loop, for whoever can send a request."""

    to_thread: ClassVar[Callable[..., Awaitable[Any]]] = staticmethod(asyncio.to_thread)

    async def ask(self, messages: Messages, tools: list[dict[str, Any]] | None) -> dict[str, Any]:
        """One request; gives the assistant's message as a dict."""
        raise NotImplementedError

    def pieces(self) -> AsyncIterator[str]:
        """The pieces of text of a streamed answer."""
        raise NotImplementedError

    async def ask_for_object(self) -> Weather:
        """One request for an object."""
        raise NotImplementedError

    def open(self, task: Task) -> None:
        """Make the clients."""
        raise NotImplementedError

    async def run(self, messages: Messages, schemas: list[dict[str, Any]], functions: Functions) -> str:
        """The loop itself."""
        while True:
            message = await self.ask(messages, schemas)
            messages.append(message)
            calls = message.get("tool_calls")
            if not calls:
                return str(message["content"])
            results = await side_by_side([called(call, functions) for call in calls])
            messages += [
                {"role": "tool", "tool_call_id": call["id"], "content": result}
                for call, result in zip(calls, results, strict=True)
            ]

    def tools(self, task: Task) -> One:
        self.open(task)
        look = task.tool

        async def look_in_thread(place: str) -> str:
            return str(await self.to_thread(look, place))

        functions: Functions = {"look": look if inspect.iscoroutinefunction(look) else look_in_thread}
        schemas = [work.SCHEMA]
        return lambda: self.run(asking(work.QUESTION), schemas, functions)

    def stream(self, task: Task) -> One:
        self.open(task)

        async def one() -> int:
            count = 0
            async for piece in self.pieces():
                count += bool(piece)
            return count

        return one

    def object(self, task: Task) -> One:
        self.open(task)
        return self.ask_for_object

    def delegate(self, task: Task) -> One:
        self.open(task)

        async def level(depth: int, query: str) -> str:
            if depth == 1:
                return str((await self.ask(asking(query), None))["content"])
            return await self.run(asking(query), [ASK_SCHEMA], {"ask": lambda query: level(depth - 1, query)})

        return lambda: level(task.size, work.QUESTION)

    def history(self, task: Task) -> One:
        self.open(task)
        system, user = asking(work.QUESTION)
        messages = [system, *work.history(task.size), user]

        async def one() -> str:
            return str((await self.ask(messages, None))["content"])

        return one

    request = history


async def called(call: dict[str, Any], functions: Functions) -> str:
    function = call["function"]
    return await functions[function["name"]](**json.loads(function["arguments"]))


async def side_by_side(calls: list[Any]) -> list[str]:
    return await asyncio.gather(*calls)


class OnOpenAI(ByHand):
    """`client.chat.completions.create`, as in the SDK's README."""

    packages = ("openai", "httpx2", "pydantic")
    imports = "from openai import AsyncOpenAI"

    def open(self, task: Task) -> None:
        from openai import AsyncOpenAI

        facts: dict[str, Any] = {"base_url": task.url, "api_key": "none", "max_retries": 0, "timeout": work.PATIENCE}
        self.clients = [AsyncOpenAI(**facts) for _ in range(max((task.connections or 0) // POOL, 1))]
        self.client = self.clients[0]
        self.next_client = cycle(self.clients).__next__

    async def ask(self, messages: Messages, tools: list[dict[str, Any]] | None) -> dict[str, Any]:
        create: Any = self.next_client().chat.completions.create
        offered = {"tools": tools} if tools else {}
        response = await create(model=work.MODEL, messages=messages, **offered)
        return response.choices[0].message.model_dump(exclude_none=True)

    async def pieces(self) -> AsyncIterator[str]:
        messages: Any = asking(work.QUESTION)
        stream = await self.client.chat.completions.create(model=work.MODEL, messages=messages, stream=True)
        async with stream:
            async for chunk in stream:
                if chunk.choices:
                    yield chunk.choices[0].delta.content or ""

    async def ask_for_object(self) -> Weather:
        from benchmarks.adapters.weather import Weather

        messages: Any = asking(work.QUESTION)
        parse = self.client.chat.completions.parse
        response = await parse(model=work.MODEL, messages=messages, response_format=Weather)
        parsed = response.choices[0].message.parsed
        assert parsed is not None
        return parsed

    async def aclose(self) -> None:
        for client in self.clients:
            await client.close()


class OverHttp(ByHand):
    """The same without an SDK: dicts in, dicts out."""

    async def post(self, body: dict[str, Any]) -> dict[str, Any]:
        """One request; gives the JSON of the answer."""
        raise NotImplementedError

    def lines(self, body: dict[str, Any]) -> AsyncIterator[bytes]:
        """The data of each event of a streamed answer."""
        raise NotImplementedError

    async def ask(self, messages: Messages, tools: list[dict[str, Any]] | None) -> dict[str, Any]:
        body: dict[str, Any] = {"model": work.MODEL, "messages": messages}
        if tools:
            body["tools"] = tools
        message: dict[str, Any] = (await self.post(body))["choices"][0]["message"]
        return message

    async def pieces(self) -> AsyncIterator[str]:
        body = {"model": work.MODEL, "messages": asking(work.QUESTION), "stream": True}
        async for data in self.lines(body):
            choices = json.loads(data)["choices"]
            if choices:
                yield choices[0]["delta"].get("content") or ""

    async def ask_for_object(self) -> Weather:
        from benchmarks.adapters.weather import Weather

        shape = {"name": "Weather", "schema": Weather.model_json_schema(), "strict": True}
        wanted = {"type": "json_schema", "json_schema": shape}
        body = {"model": work.MODEL, "messages": asking(work.QUESTION), "response_format": wanted}
        return Weather.model_validate_json((await self.post(body))["choices"][0]["message"]["content"])


class OnHttpx2(OverHttp):
    """httpx2."""

    packages = ("httpx2",)
    imports = "import httpx2"

    def open(self, task: Task) -> None:
        import httpx2

        count = max((task.connections or 0) // POOL, 1)
        # What the SDK sets too. httpx2's own limit of 100 connections would make 500 runs wait for each other.
        limits = httpx2.Limits(max_connections=1000, max_keepalive_connections=100)
        self.clients = [httpx2.AsyncClient(limits=limits, timeout=work.PATIENCE) for _ in range(count)]
        self.next_client = cycle(self.clients).__next__
        self.url = f"{task.url}/chat/completions"

    async def post(self, body: dict[str, Any]) -> dict[str, Any]:
        response = await self.next_client().post(self.url, json=body)
        response.raise_for_status()
        answer: dict[str, Any] = response.json()
        return answer

    async def lines(self, body: dict[str, Any]) -> AsyncIterator[bytes]:
        rest = b""
        async with self.next_client().stream("POST", self.url, json=body) as response:
            async for data in response.aiter_bytes():
                *events, rest = (rest + data).split(b"\n\n")
                for event in events:
                    if event != b"data: [DONE]":
                        yield event[6:]

    async def aclose(self) -> None:
        for client in self.clients:
            await client.aclose()


class OnHttpx2Trio(OnHttpx2):
    """httpx2 on trio."""

    backend: ClassVar[tuple[str, dict[str, Any]] | None] = ("trio", {})
    packages = ("httpx2", "trio")
    imports = "import httpx2, trio"
    to_thread: ClassVar[Callable[..., Awaitable[Any]]] = staticmethod(anyio.to_thread.run_sync)

    async def run(self, messages: Messages, schemas: list[dict[str, Any]], functions: Functions) -> str:
        while True:
            message = await self.ask(messages, schemas)
            messages.append(message)
            calls = message.get("tool_calls")
            if not calls:
                return str(message["content"])
            results: dict[str, str] = {}

            async def note(call: dict[str, Any], results: dict[str, str] = results) -> None:
                results[call["id"]] = await called(call, functions)

            async with anyio.create_task_group() as group:
                for call in calls:
                    group.start_soon(note, call)
            messages += [{"role": "tool", "tool_call_id": call["id"], "content": results[call["id"]]} for call in calls]


class OnAiohttp(OverHttp):
    """aiohttp."""

    packages = ("aiohttp",)
    imports = "import aiohttp"

    def open(self, task: Task) -> None:
        import aiohttp

        connector = aiohttp.TCPConnector(limit=max(task.connections or 0, 1000))
        timeout = aiohttp.ClientTimeout(work.PATIENCE)
        self.session = aiohttp.ClientSession(connector=connector, timeout=timeout)
        self.url = f"{task.url}/chat/completions"

    async def post(self, body: dict[str, Any]) -> dict[str, Any]:
        async with self.session.post(self.url, json=body, raise_for_status=True) as response:
            answer: dict[str, Any] = await response.json()
            return answer

    async def lines(self, body: dict[str, Any]) -> AsyncIterator[bytes]:
        rest = b""
        async with self.session.post(self.url, json=body, raise_for_status=True) as response:
            async for data in response.content.iter_any():
                *events, rest = (rest + data).split(b"\n\n")
                for event in events:
                    if event != b"data: [DONE]":
                        yield event[6:]

    async def aclose(self) -> None:
        await self.session.close()
