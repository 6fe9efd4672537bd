"""The ways to an endpoint, and answers that are the same whole and streamed."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import httpx2
import openai

from fractal import AgentResult, BaseAgent, OpenAIModel
from fractal.testing import Endpoint, answers
from fractal.testing.answers import Answer
from fractal.testing.endpoint import RecordedRequest

Script = Callable[[dict[str, Any], int], Any]
"""From the body of a request and its number to an answer: a message, or what `refusal` makes."""


@dataclass
class Refusal:
    """A refusal by the endpoint."""

    status: int
    body: Any


def refusal(words: str, status: int = 400, **facts: Any) -> Refusal:
    return Refusal(status, {"error": {"message": words, "type": None, "param": None, "code": None, **facts}})


def call(name: str, arguments: str = "{}", call_id: str = "call_1", **more: Any) -> dict[str, Any]:
    return {"id": call_id, "type": "function", "function": {"name": name, "arguments": arguments}, **more}


def completion(message: Mapping[str, Any], finish_reason: str | None) -> dict[str, Any]:
    choice = {"index": 0, "message": {"role": "assistant", "content": None, **message}, "finish_reason": finish_reason}
    return {
        "id": "x",
        "object": "chat.completion",
        "created": 0,
        "model": "m",
        "choices": [choice],
        "usage": {"prompt_tokens": 3, "completion_tokens": 2, "total_tokens": 5},
    }


def chunk(delta: Mapping[str, Any], finish_reason: str | None = None, **more: Any) -> dict[str, Any]:
    choice = {"index": 0, "delta": dict(delta), "finish_reason": finish_reason}
    return {"id": "x", "object": "chat.completion.chunk", "created": 0, "model": "m", "choices": [choice], **more}


def chunks(message: Mapping[str, Any], finish_reason: str | None) -> list[dict[str, Any]]:
    """The message in pieces: texts cut in two, each call in a chunk of its own."""
    message = {"role": "assistant", "content": None, **message}
    calls = message.pop("tool_calls", [])
    first = {name: value[: len(value) // 2] if isinstance(value, str) else value for name, value in message.items()}
    rest = {name: value[len(value) // 2 :] for name, value in message.items() if isinstance(value, str)}
    pieces = [chunk({**first, "role": "assistant"}), chunk({**rest, "role": "assistant"})]
    pieces += [chunk({"tool_calls": [{"index": index, **each}]}) for index, each in enumerate(calls)]
    usage = {"prompt_tokens": 3, "completion_tokens": 2, "total_tokens": 5}
    return [*pieces, chunk({}, finish_reason), {**chunk({}), "choices": [], "usage": usage}]


def events(*payloads: Any, done: bool = True) -> str:
    lines = [payload if isinstance(payload, str) else f"data: {json.dumps(payload)}\n\n" for payload in payloads]
    return "".join(lines) + ("data: [DONE]\n\n" if done else "")


def finish_of(message: Mapping[str, Any]) -> str:
    return message.get("finish") or ("tool_calls" if message.get("tool_calls") else "stop")


def as_answer(said: Any, *, streams: bool) -> Answer:
    """What an endpoint writes."""
    if isinstance(said, Refusal):
        return answers.raw(json.dumps(said.body), status=said.status, content_type="application/json")
    finish, said = finish_of(said), {name: value for name, value in said.items() if name != "finish"}
    if streams:
        return answers.raw(events(*chunks(said, finish)), content_type="text/event-stream")
    return answers.raw(json.dumps(completion(said, finish)), content_type="application/json")


class Double:
    """A client that is no SDK's, with the script behind it.

    Args:
        script: What it answers.
        form: What it makes of a completion.
    """

    def __init__(self, script: Script, form: Callable[[Any], Any]) -> None:
        self.bodies: list[dict[str, Any]] = []
        self._script, self._form = script, form
        self.chat = SimpleNamespace(completions=self)

    async def create(self, **parameters: Any) -> Any:
        self.bodies.append(json.loads(json.dumps(parameters)))
        said = self._script(self.bodies[-1], len(self.bodies))
        if isinstance(said, Refusal):
            response = httpx2.Response(said.status, json=said.body, request=httpx2.Request("POST", "http://host/v1"))
            kind = openai.InternalServerError if said.status >= 500 else openai.BadRequestError
            raise kind(said.body["error"]["message"], response=response, body=said.body["error"])
        finish, said = finish_of(said), {name: value for name, value in said.items() if name != "finish"}
        if not parameters.get("stream"):
            return self._form(completion(said, finish))

        async def pieces() -> Any:
            for each in chunks(said, finish):
                yield self._form(each)

        return pieces()


def namespace(value: Any) -> Any:
    """Objects with attributes in place of dicts, as doubles have; what no one knows stays a dict."""
    if isinstance(value, list):
        return [namespace(each) for each in value]
    if not isinstance(value, dict):
        return value
    known = {"choices", "message", "delta", "tool_calls", "function", "usage"}
    return SimpleNamespace(**{name: namespace(each) if name in known else each for name, each in value.items()})


def typed(value: Any) -> Any:
    """The SDK's own models."""
    chat: Any = openai.types.chat
    kind = chat.ChatCompletionChunk if "chunk" in value["object"] else chat.ChatCompletion
    return kind.construct(**value)


HTTP: dict[str, Callable[[str], Any]] = {
    "own HTTP": lambda url: OpenAIModel(base_url=url, api_key="any"),
    "AsyncOpenAI": lambda url: openai.AsyncOpenAI(base_url=url, api_key="any"),
    "OpenAI": lambda url: openai.OpenAI(base_url=url, api_key="any"),
}
DOUBLES: dict[str, Callable[[Any], Any]] = {"dicts": lambda value: value, "objects": namespace, "models": typed}


@dataclass
class Asked:
    """What came of a run."""

    result: AgentResult
    bodies: list[dict[str, Any]]


async def ask(wire: str, way: str, script: Script, **options: Any) -> Asked:
    """Run an agent against a script.

    Args:
        wire: A way to an endpoint, of `HTTP` or `DOUBLES`.
        way: "run" or "stream".
        script: What is answered.
        **options: For the agent; `tools` are added, `run` are options of the run.
    """
    tools, run = options.pop("tools", ()), {"max_retries": 0, "timeout": 20, **options.pop("run", {})}
    if wire in DOUBLES:
        double = Double(script, DOUBLES[wire])
        return Asked(await _run(BaseAgent("A", "You help.", "m", double, **options), tools, way, run), double.bodies)

    def play(request: RecordedRequest) -> Answer:
        said = script(request.body, len(endpoint.requests))
        return as_answer(said, streams=bool(request.body.get("stream")))

    with Endpoint(play) as endpoint:
        agent = BaseAgent("A", "You help.", "m", HTTP[wire](endpoint.url), **options)
        result = await _run(agent, tools, way, run)
        return Asked(result, [request.body for request in endpoint.requests])


async def _run(agent: BaseAgent, tools: Any, way: str, run: dict[str, Any]) -> AgentResult:
    for tool in tools:
        agent.add_tool(tool)
    if way == "run":
        return await agent.run("Hi?", **run)
    async with agent.stream("Hi?", **run) as stream:
        async for _ in stream:
            pass
    return await stream.result()
