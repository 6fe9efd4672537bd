"""One run, four ways to start it: whatever happens, `run`, `stream`, `sync.run` and `sync.stream` tell the same of it.

Each scenario runs in all of them, on asyncio, uvloop and trio, against an endpoint of its own. Compared are the result
with its transcript and its error, the requests that the endpoint got, and what an observer was told.
"""

from __future__ import annotations

import dataclasses
import json
import re
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import anyio
import openai
import pytest
from pydantic import BaseModel

from fractal import (
    AgentResult,
    Allow,
    AnswerRejected,
    Approval,
    BaseAgent,
    Deny,
    Event,
    Limits,
    PendingCall,
    RunContext,
    ToolResult,
    UserError,
    sync,
    tool,
)
from fractal._engine import ask as _ask
from fractal._functions.arguments import with_object_arguments
from fractal.events import ModelRequested, ModelResponded, TextDelta, ToolCallDelta
from fractal.models.openai import OpenAIModel
from fractal.testing import Endpoint, answers
from fractal.testing.answers import Answer, AnswerLike, ToolCallAnswer
from fractal.testing.endpoint import Answers, RecordedRequest
from tests.support import assert_continuable, in_thread

REFUSAL = "I would rather not"


@pytest.fixture(autouse=True)
def _short_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_ask, "FIRST_BACK_OFF", 0.01)


@pytest.fixture(autouse=True, scope="module")
def _http_is_imported() -> None:
    """The first request of a process imports the HTTP library, which would take the time of a scenario."""
    with Endpoint("ok") as one:
        sync.run(BaseAgent("A", "a", client=own_wire(one)), "go").raise_for_error()


# ---- what a scenario is made of


def own_wire(endpoint: Endpoint) -> OpenAIModel:
    return OpenAIModel(base_url=endpoint.url, api_key="sk-test")


def async_sdk(endpoint: Endpoint) -> openai.AsyncOpenAI:
    return openai.AsyncOpenAI(base_url=endpoint.url, api_key="sk-test")


def blocking_sdk(endpoint: Endpoint) -> openai.OpenAI:
    return openai.OpenAI(base_url=endpoint.url, api_key="sk-test")


Build = Callable[..., BaseAgent]


def agent(*tools: Callable[..., Any], name: str = "A", prompt: Any = None, **settings: Any) -> Build:
    """Builds an agent; its system prompt is its name, unless there is another."""

    def build(**more: Any) -> BaseAgent:
        made = BaseAgent(name, name if prompt is None else prompt, **settings, **more)
        for each in tools:
            made.add_tool(each)
        return made

    return build


JUST_AN_AGENT = agent()


def team(parent: Build, *children: Build) -> Build:
    """Builds an agent with delegates, all of them asking the same endpoint."""

    def build(client: Any, **more: Any) -> BaseAgent:
        made = parent(client=client, **more)
        for child in children:
            made.register_delegate(child(client=client))
        return made

    return build


@dataclasses.dataclass(frozen=True, kw_only=True)
class Scenario:
    """What the endpoint answers, who asks it what, and how that has to end."""

    name: str
    answers: Answers
    agent: Build = JUST_AN_AGENT
    asked: Any = "go"
    options: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    client: Callable[[Endpoint], Any] = own_wire
    ends: str = "finished"
    says: str = "done"  # is in the content
    outcomes: str = ""  # of the run's own tool calls
    requests: int = 1  # that the endpoint gets
    is_parallel: bool = False  # things end, or ask, in no certain order
    is_whole: bool = False  # the endpoint cannot stream
    streams_inside: bool = False  # a tool streams, whatever the run around it does


def call(name: str, arguments: Mapping[str, object] | str = "{}", *, id: str = "c1") -> ToolCallAnswer:
    return answers.call(name, arguments, id=id)


def calls(*named: tuple[str, Mapping[str, object]]) -> Answer:
    return answers.calls(*[call(name, arguments, id=f"c{n}") for n, (name, arguments) in enumerate(named, 1)])


def by_agent(**scripts: AnswerLike | Sequence[AnswerLike]) -> Answers:
    """Answers each agent from a script of its own: the first for the user's turn, the next after tool results…"""

    def reply(request: RecordedRequest) -> AnswerLike:
        messages = request.body["messages"]
        script = scripts[messages[0]["content"]]
        turn = sum(message["role"] == "assistant" for message in messages)
        return script[turn] if isinstance(script, list) else script  # type: ignore[return-value]

    return reply


def shown_whole(answer: Answer) -> Answer:
    """The answer of an endpoint that does not stream, even if it is asked to."""
    return answers.raw(json.dumps(answer.completion("m")), content_type="application/json")


class Point(BaseModel):
    x: int
    y: int = 0


async def look(city: str) -> str:
    await anyio.sleep(0)
    return f"rain in {city}"


def measure(city: str, days: int = 1) -> dict[str, Any]:
    return {"city": city, "days": days}


def point() -> Point:
    return Point(x=1)


async def nothing() -> None:
    pass


async def fails() -> None:
    raise ValueError("it is broken \ud83d")


def fails_plainly() -> None:
    raise KeyError("x")


async def sleeps() -> str:
    await anyio.sleep(5)
    return "never"


def sleeps_in_a_thread() -> str:
    time.sleep(0.5)
    return "late"


async def stops_slowly() -> None:
    try:
        await anyio.sleep(5)
    finally:
        with anyio.CancelScope(shield=True):
            await anyio.sleep(0.2)


@tool(sequential=True)
async def alone(n: int) -> int:
    await anyio.sleep(0)
    return n


@tool(on_error="raise")
async def fatal() -> None:
    raise ValueError("it is broken")


@tool(terminate=True)
def report(x: int) -> Point:
    return Point(x=x)


def who(ctx: RunContext[dict[str, str]]) -> str:
    return f"{ctx.deps['user']} {ctx.depth} {ctx.tool_name} {ctx.call_id} {len(ctx.messages)} {ctx.usage.requests}"


async def prompt_of_context(ctx: RunContext[str]) -> str:
    await anyio.sleep(0)
    return f"You help {ctx.deps}."


def broken_prompt() -> str:
    raise RuntimeError("no prompt today")


def asks_another(how: str) -> Build:
    """Builds an agent with a tool that asks another agent in some way."""

    def build(client: Any, **more: Any) -> BaseAgent:
        child = BaseAgent("child", "child", client=client)
        parent = BaseAgent("parent", "parent", client=client, **more)

        async def by_call() -> Any:
            return (await parent.call_agent(child, {"q": 1})).content

        async def by_stream() -> str:
            async with child.stream("?") as stream:
                return "".join([text async for text in stream.text()])

        def by_sync_run() -> Any:
            return sync.run(child, "?").content

        def by_sync_stream() -> str:
            with sync.stream(child, "?") as stream:
                return "".join(stream.text())

        async def by_tool() -> Any:
            return (await parent.execute_tool("look", city="Rome")).content

        ways = {each.__name__: each for each in (by_call, by_stream, by_sync_run, by_sync_stream, by_tool)}
        return parent.add_tool(ways[how]).add_tool(look)

    return build


def structured_team(client: Any, **more: Any) -> BaseAgent:
    """Two levels of delegates, the lower one with structured input."""
    low = BaseAgent("low", "low", client=client)
    middle = BaseAgent("middle", "middle", client=client).register_delegate(
        low, tool_name="query", parameters={"sql": {"type": "str"}, "limit": {"type": "int", "default": 5}}
    )
    return BaseAgent("parent", "parent", client=client, **more).register_delegate(middle)


def endless_team(client: Any, **more: Any) -> BaseAgent:
    echo = BaseAgent("echo", "echo", client=client, limits=Limits(max_depth=2), **more)
    return echo.register_delegate(echo)


def delegated(to: str, id: str = "c1") -> ToolCallAnswer:
    return call(f"delegate_to_{to.lower()}", {"query": f"{to}?"}, id=id)


LOOK = call("look", {"city": "Rome"})
PARTS = [{"type": "text", "text": "one "}, {"type": "text", "text": "two"}]
PICTURE = {"type": "image_url", "image_url": {"url": "https://example.org/cat.png"}}
BUSY = answers.failure(503, "busy", headers={"retry-after-ms": "1"})
HISTORY = [
    {"role": "user", "content": [{"type": "text", "text": "Is it raining?"}, PICTURE]},
    answers.calls(call("look", {"city": "Rome"}, id="old")).completion("m")["choices"][0]["message"],
    {"role": "tool", "tool_call_id": "old", "content": "rain"},
    {"role": "assistant", "content": "Yes 🌧"},
]

TEXTS = [
    Scenario(name="plain text", answers=["done"]),
    Scenario(name="text with many kinds of characters", answers=["é 😀 𝄞 \x00 \u2028 שלום\r\n\tdone "]),
    Scenario(name="text with halves of pairs", answers=["a \ud83d b \ude00 \ud83d\ude00 done\ud83d"], says="\ufffd b"),
    Scenario(name="a long text", answers=["word " * 500 + "done"]),
    Scenario(name="text in parts", answers=[Answer(message_extra={"content": PARTS})], says="one two"),
    Scenario(
        name="fields nobody asked for", answers=[answers.text("done", extra={"x": {"y": 1}}, message_extra={"z": 2})]
    ),
    Scenario(name="reasoning", answers=[answers.text("done", message_extra={"reasoning_content": "Let me think."})]),
    Scenario(name="tokens", answers=[answers.text("done", usage=(1234, 56))]),
    Scenario(name="white space, then text", answers=[" \n", "done"], requests=2),
    Scenario(name="nothing, then text", answers=[answers.empty(), answers.text(""), "done"], requests=3),
    Scenario(
        name="never a word", answers=answers.empty(), options={"max_retries": 2}, ends="no_content", says="", requests=3
    ),
    Scenario(name="cut at the token limit", answers=[answers.text("half", finish_reason="length")], says="half"),
    Scenario(name="a refusal", answers=[answers.refusal(REFUSAL)], ends="refusal", says=REFUSAL),
    Scenario(
        name="withheld by a filter", answers=[Answer(finish_reason="content_filter")], ends="refusal", says="withheld"
    ),
    Scenario(
        name="cut by a filter",
        answers=[answers.text("half", finish_reason="content_filter")],
        ends="refusal",
        says="filter",
    ),
    Scenario(
        name="an endpoint that does not stream",
        answers=[shown_whole(answers.calls(LOOK, text="So:")), shown_whole(answers.text("done"))],
        agent=agent(look),
        outcomes="ok",
        requests=2,
        is_whole=True,
    ),
]

INPUTS = [
    Scenario(name="a dict as input", answers=["done"], asked={"q": [1, None, "é"]}),
    Scenario(name="a model as input", answers=["done"], asked=Point(x=1)),
    Scenario(name="content parts as input", answers=["done"], asked=["What is this?", PICTURE]),
    Scenario(name="halves of pairs as input", answers=["done"], asked="a \ud83d b \ud83d\ude00"),
    Scenario(name="a conversation that goes on", answers=["done"], options={"messages": HISTORY}),
    Scenario(
        name="a prompt of its own for each run",
        answers=["done"],
        agent=agent(prompt=prompt_of_context),
        options={"deps": "Ada"},
    ),
    Scenario(
        name="a prompt with placeholders",
        answers=["done"],
        agent=agent(prompt="Help {user} with {x}.", system_context={"user": "Ada"}),
    ),
    Scenario(name="no prompt", answers=["done"], agent=agent(prompt="")),
    Scenario(
        name="a prompt that fails",
        answers=[],
        agent=agent(prompt=broken_prompt),
        ends="error",
        says="no prompt today",
        requests=0,
    ),
    Scenario(
        name="settings and further fields",
        answers=["done"],
        agent=agent(look, model="m-7", temperature=0.5, max_tokens=9, reasoning_effort="low", extra_body={"seed": 1}),
    ),
]

TOOLS = [
    Scenario(name="a tool", answers=[[LOOK], "done"], agent=agent(look), outcomes="ok", requests=2),
    Scenario(name="a plain tool", answers=[[call("point")], "done"], agent=agent(point), outcomes="ok", requests=2),
    Scenario(
        name="tools one turn after another",
        answers=[answers.calls(LOOK, text="First this."), [call("measure", {"city": "Oslo", "days": 2})], "done"],
        agent=agent(look, measure),
        outcomes="ok ok",
        requests=3,
    ),
    Scenario(
        name="tools side by side",
        answers=[calls(("look", {"city": "Rome"}), ("measure", {"city": "é😀"}), ("nothing", {})), "done"],
        agent=agent(look, measure, nothing),
        outcomes="ok ok ok",
        requests=2,
        is_parallel=True,
    ),
    Scenario(
        name="tools that must be alone",
        answers=[calls(("alone", {"n": 1}), ("alone", {"n": 2}), ("alone", {"n": 3})), "done"],
        agent=agent(alone),
        outcomes="ok ok ok",
        requests=2,
    ),
    Scenario(
        name="tools that fail",
        answers=[calls(("fails", {}), ("fails_plainly", {})), "done"],
        agent=agent(fails, fails_plainly),
        outcomes="error error",
        requests=2,
        is_parallel=True,
    ),
    Scenario(
        name="a tool whose failure ends the run",
        answers=[calls(("fatal", {}), ("look", {"city": "Rome"}))],
        agent=agent(fatal, look),
        ends="tool_error",
        says="it is broken",
        outcomes="error ok",
        is_parallel=True,
    ),
    Scenario(
        name="arguments that do not fit",
        answers=[
            answers.calls(
                call("look", '{"city": ', id="1"), call("look", "[1]", id="2"), call("look", "", id="3"),
                call("look", {"town": "Rome"}, id="4"), call("measure", {"city": "Rome", "days": "many"}, id="5"),
            ),
            "done",
        ],
        agent=agent(look, measure),
        outcomes="error error error error error",
        requests=2,
    ),
    Scenario(
        name="a tool there is not",
        answers=[[call("fly", {"to": "Rome"})], "done"],
        agent=agent(look),
        outcomes="error",
        requests=2,
    ),
    Scenario(
        name="a tool that ends the run",
        answers=[[call("report", {"x": 7})]],
        agent=agent(report),
        ends="terminated",
        says="x=7",
        outcomes="ok",
    ),
    Scenario(
        name="a tool that should end the run and fails",
        answers=[[call("report", {"x": "many"})], "done"],
        agent=agent(report),
        outcomes="error",
        requests=2,
    ),
    Scenario(
        name="a tool that looks at its run",
        answers=[[call("who")], "done"],
        agent=agent(who),
        options={"deps": {"user": "Ada"}},
        outcomes="ok",
        requests=2,
    ),
    Scenario(
        name="a tool that calls a tool",
        answers=by_agent(parent=[[call("by_tool")], "done"]),
        agent=asks_another("by_tool"),
        outcomes="ok",
        requests=2,
    ),
]  # fmt: skip

DELEGATES = [
    Scenario(
        name="a delegate",
        answers=by_agent(parent=[[delegated("child")], "done"], child=[[LOOK], "from below"]),
        agent=team(agent(name="parent"), agent(look, name="child")),
        outcomes="ok",
        requests=4,
    ),
    Scenario(
        name="delegates of delegates, with structured input",
        answers=by_agent(
            parent=[[delegated("middle")], "done"], middle=[[call("query", {"sql": "select 1"})], "7!"], low="7",
        ),
        agent=structured_team,
        outcomes="ok",
        requests=5,
    ),
    Scenario(
        name="delegates side by side",
        answers=by_agent(
            parent=[[delegated("a", "1"), delegated("b", "2"), delegated("c", "3")], "done"],
            a="A", b=[[LOOK], "B"], c=answers.text("C", delay=0.02),
        ),
        agent=team(agent(name="parent"), agent(name="a"), agent(look, name="b"), agent(name="c")),
        outcomes="ok ok ok",
        requests=6,
        is_parallel=True,
    ),
    Scenario(
        name="delegates that fail",
        answers=by_agent(
            parent=[[delegated("refuses", "1"), delegated("loops", "2"), delegated("broken", "3")], "done"],
            refuses=answers.refusal(REFUSAL), loops=answers.calls(LOOK, text="half"), broken=answers.failure(400, "no"),
        ),
        agent=team(
            agent(name="parent"), agent(name="refuses"), agent(look, name="loops", limits=Limits(max_iterations=2)),
            agent(name="broken"),
        ),
        outcomes="error error error",
        requests=6,
        is_parallel=True,
    ),
    Scenario(
        name="a delegate without time",
        answers=by_agent(parent=[[delegated("child")], "done"], child=answers.hang()),
        agent=team(agent(name="parent"), agent(name="child", timeout=0.3)),
        outcomes="error",
        requests=3,
    ),
    Scenario(
        name="delegates too deep",
        answers=by_agent(echo=[[delegated("echo")], "done"]),
        agent=endless_team,
        outcomes="ok",
        requests=6,
    ),
    Scenario(
        name="a tool that asks another agent",
        answers=by_agent(parent=[[call("by_call")], "done"], child="from below"),
        agent=asks_another("by_call"),
        outcomes="ok",
        requests=3,
    ),
    Scenario(
        name="a tool that streams another agent",
        answers=by_agent(parent=[[call("by_stream")], "done"], child="from below"),
        agent=asks_another("by_stream"),
        outcomes="ok",
        requests=3,
        streams_inside=True,
    ),
    Scenario(
        name="a plain tool that runs another agent",
        answers=by_agent(parent=[[call("by_sync_run")], "done"], child="from below"),
        agent=asks_another("by_sync_run"),
        outcomes="ok",
        requests=3,
    ),
    Scenario(
        name="a plain tool that streams another agent",
        answers=by_agent(parent=[[call("by_sync_stream")], "done"], child="from below"),
        agent=asks_another("by_sync_stream"),
        outcomes="ok",
        requests=3,
        streams_inside=True,
    ),
]  # fmt: skip

FAULTS = [
    Scenario(name="429, then text", answers=[answers.failure(429, "slow down", retry_after=0.01), "done"], requests=2),
    Scenario(
        name="503 again and again",
        answers=[BUSY] * 3,
        options={"max_retries": 2},
        ends="model_error",
        says="HTTP 503: busy",
        requests=3,
    ),
    Scenario(
        name="400",
        answers=[answers.failure(400, "no", code="model_not_found")],
        ends="model_error",
        says="HTTP 400: no",
    ),
    Scenario(name="401", answers=[answers.failure(401, "who?")], ends="model_error", says="HTTP 401: who?"),
    Scenario(name="a proxy's page", answers=[answers.raw("<h1>Bad gateway</h1>", status=502), "done"], requests=2),
    Scenario(
        name="a page in place of an endpoint",
        answers=[answers.raw("<h1>Hello</h1>")],
        ends="model_error",
        says="base URL",
    ),
    Scenario(
        name="half of a JSON body, then text",
        answers=[answers.raw('{"choices": [', content_type="application/json"), "done"],
        requests=2,
    ),
    Scenario(
        name="an error in place of a completion",
        answers=answers.raw('{"error": "oops"}', content_type="application/json"),
        options={"max_retries": 1},
        ends="model_error",
        says="oops",
        requests=2,
    ),
    Scenario(name="closed without a byte, then text", answers=[answers.nothing(), "done"], requests=2),
    Scenario(
        name="closed without a byte again and again",
        answers=answers.nothing(),
        options={"max_retries": 1},
        ends="model_error",
        says="no whole answer",
        requests=2,
    ),
    Scenario(
        name="cut before anything was shown, then text",
        answers=[answers.cut(answers.refusal(REFUSAL)), "done"],
        requests=2,
    ),
    Scenario(
        name="a failure after tools",
        answers=[[LOOK], answers.failure(403, "no")],
        agent=agent(look),
        ends="model_error",
        says="HTTP 403",
        outcomes="ok",
        requests=2,
    ),
    Scenario(
        name="a wait that is too long to be meant",
        answers=[answers.failure(429, "later", retry_after=500)],
        ends="model_error",
        says="HTTP 429: later",
    ),
]  # fmt: skip

LIMITS = [
    Scenario(
        name="no request left",
        answers=[[LOOK], [LOOK]],
        agent=agent(look),
        options={"limits": Limits(max_requests=2)},
        ends="budget",
        says="the budget of",
        outcomes="ok ok",
        requests=2,
    ),
    Scenario(
        name="no request at all",
        answers=[],
        options={"limits": Limits(max_requests=0)},
        ends="budget",
        says="the budget of",
        requests=0,
    ),
    Scenario(
        name="no request left to try again",
        answers=[BUSY, BUSY],
        options={"limits": Limits(max_requests=2)},
        ends="budget",
        says="the budget of",
        requests=2,
    ),
    Scenario(
        name="not enough tool calls",
        answers=[calls(*[("alone", {"n": n}) for n in range(4)])],
        agent=agent(alone, limits=Limits(max_tool_calls=2)),
        ends="budget",
        says="2 tool calls",
        outcomes="ok ok skipped skipped",
    ),
    Scenario(
        name="not enough turns",
        answers=[LOOK, LOOK],
        agent=agent(look),
        options={"max_iterations": 2},
        ends="max_iterations",
        says="2",
        outcomes="ok ok",
        requests=2,
    ),
    Scenario(
        name="not enough tokens",
        answers=[answers.calls(LOOK, usage=(300, 50)), "never"],
        agent=agent(look),
        options={"limits": Limits(max_tokens=400)},
        ends="budget",
        says="400 tokens",
        outcomes="ok",
    ),
    Scenario(
        name="a budget shared with a delegate",
        answers=by_agent(parent=[[delegated("child")], "never"], child=[[LOOK], "never"]),
        agent=team(agent(name="parent"), agent(look, name="child")),
        options={"limits": Limits(max_requests=2)},
        ends="budget",
        says="the budget of",
        outcomes="error",
        requests=2,
    ),
]

TIMES = [
    Scenario(name="no time at all", answers=[], options={"timeout": 0}, ends="deadline", says="0 s", requests=0),
    Scenario(
        name="no time for the model", answers=answers.hang(), options={"timeout": 0.3}, ends="deadline", says="0.3 s"
    ),
    Scenario(
        name="no time for a tool",
        answers=[[call("sleeps")]],
        agent=agent(sleeps, timeout=0.3),
        ends="deadline",
        says="0.3 s",
        outcomes="timeout",
    ),
    Scenario(
        name="no time for a delegate's tool",
        answers=by_agent(parent=[[delegated("child")]], child=[[call("sleeps")]]),
        agent=team(agent(name="parent"), agent(sleeps, name="child")),
        options={"timeout": 0.4},
        ends="deadline",
        says="0.4 s",
        outcomes="timeout",
        requests=2,
    ),
    Scenario(
        name="time for a last word",
        answers=[[call("sleeps")], "done, as far as it went"],
        agent=agent(sleeps, timeout=5.3, limits=Limits(reserve=5.0)),
        ends="soft_deadline",
        outcomes="timeout",
        requests=2,
    ),
    Scenario(
        name="time for nothing but a last word",
        answers=[[call("sleeps")], "done"],
        agent=agent(sleeps, timeout=5.0, limits=Limits(reserve=5.0)),
        ends="soft_deadline",
        outcomes="skipped",
        requests=2,
    ),
    Scenario(
        name="a tool without time",
        answers=[[call("sleeps")], "done"],
        agent=agent(sleeps, limits=Limits(tool_timeout=0.1)),
        outcomes="timeout",
        requests=2,
    ),
    Scenario(
        name="a tool that stops slowly",
        answers=[[call("stops_slowly")], "done"],
        agent=agent(stops_slowly, limits=Limits(tool_timeout=0.05, grace=0.05)),
        outcomes="timeout",
        requests=2,
    ),
    Scenario(
        name="a thread that does not stop",
        answers=[[call("sleeps_in_a_thread")], "done"],
        agent=agent(sleeps_in_a_thread, limits=Limits(tool_timeout=0.1)),
        outcomes="abandoned",
        requests=2,
    ),
    Scenario(
        name="requests without time",
        answers=answers.hang(),
        options={"limits": Limits(request_timeout=0.2), "max_retries": 1},
        ends="model_error",
        says="0.2 s",
        requests=2,
    ),
    Scenario(
        name="a request without time, then text",
        answers=[answers.hang(), "done"],
        agent=agent(limits=Limits(request_timeout=0.3)),
        requests=2,
    ),
    Scenario(
        name="a wait longer than there is time",
        answers=[answers.failure(429, "later", retry_after=60)],
        options={"timeout": 5},
        ends="deadline",
        says="HTTP 429: later",
    ),
]

LONG = [{"role": role, "content": f"{role} {n} " * 20} for n in range(20) for role in ("user", "assistant")]
WRONG_POINT = '{"x": "many"}'


def refuses_formats(request: RecordedRequest) -> AnswerLike:
    if "response_format" in request.body:
        return Answer(status=400, error={"message": "unknown field", "param": "response_format"})
    return [call("final_answer", {"x": 7})]


def positive(**more: Any) -> BaseAgent:
    """Builds an agent that wants its answers above 0."""
    made = BaseAgent("A", "A", output_type=int, output_mode="prompt", **more)

    @made.output_validator
    def check(answer: int) -> int:
        if answer <= 0:
            raise AnswerRejected("it has to be above 0")
        return answer + 1

    return made


OBJECTS = [
    Scenario(
        name="an object by a format",
        answers=['{"x": 7}'],
        agent=agent(output_type=Point, output_mode="native"),
        says="x=7",
    ),
    Scenario(
        name="an object by a tool",
        answers=[[LOOK], [call("final_answer", {"x": 7})]],
        agent=agent(look, output_type=Point, output_mode="tool"),
        says="x=7",
        outcomes="ok ok",
        requests=2,
    ),
    Scenario(
        name="a list by words",
        answers=["Here it is:\n```json\n[1, 2]\n```"],
        agent=agent(output_mode="prompt"),
        options={"output_type": list[int]},
        says="[1, 2]",
    ),
    Scenario(
        name="an object where a way to ask for it is refused",
        answers=refuses_formats,
        agent=agent(output_type=Point),
        says="x=7",
        outcomes="ok",
        requests=2,
    ),
    Scenario(
        name="an object at the third time",
        answers=['{"x": ', WRONG_POINT, '{"x": 7}'],
        agent=agent(output_type=Point, output_mode="native"),
        says="x=7",
        requests=3,
    ),
    Scenario(
        name="an object by a tool at the second time",
        answers=[[call("final_answer", WRONG_POINT)], [call("final_answer", '{"x": 7}')]],
        agent=agent(output_type=Point, output_mode="tool"),
        says="x=7",
        outcomes="error ok",
        requests=2,
    ),
    Scenario(
        name="never an object",
        answers=WRONG_POINT,
        agent=agent(output_type=Point, output_mode="native"),
        options={"max_retries": 1},
        ends="invalid_output",
        says="'x'",
        requests=2,
    ),
    Scenario(name="an answer that is sent back", answers=["-5", "5"], agent=positive, says="6", requests=2),
]


@tool(requires_approval=True)
def spend(amount: int) -> int:
    return amount


async def allows_little(pending: PendingCall, ctx: RunContext[Any]) -> Approval:
    await anyio.sleep(0)
    return Allow({"amount": 5}) if pending.arguments["amount"] > 5 else ctx.depth == 0


def denies(pending: PendingCall) -> Deny:
    return Deny(f"{pending.tool_name} nothing")


def cannot_say(pending: PendingCall) -> bool:
    raise ValueError("nobody is there")


async def never_says(pending: PendingCall) -> bool:
    await anyio.sleep(5)
    return True


APPROVALS = [
    Scenario(
        name=name,
        answers=[[call("spend", {"amount": amount})], "done"],
        agent=agent(spend, approve=approve),
        outcomes=outcomes,
        requests=2,
    )
    for name, amount, approve, outcomes in (
        ("a call that is allowed", 3, allows_little, "ok"),
        ("a call that is changed", 30, allows_little, "ok"),
        ("a call that is denied", 3, denies, "denied"),
        ("a call that nobody can allow", 3, None, "denied"),
        ("a call whose approver fails", 3, cannot_say, "denied"),
    )
] + [
    Scenario(
        name="a call that nobody answers for in time",
        answers=[[call("spend", {"amount": 3})]],
        agent=agent(spend),
        options={"approve": never_says, "timeout": 0.3},
        ends="deadline",
        says="0.3 s",
        outcomes="timeout",
    ),
]

WINDOWS = [
    Scenario(
        name="a conversation that is too long",
        answers=[[LOOK], "done"],
        agent=agent(look, context_window=600),
        options={"messages": LONG},
        outcomes="ok",
        requests=2,
    ),
    Scenario(
        name="a conversation that is summed up",
        answers=[[LOOK], "done"],
        agent=agent(look, context_window=600, compact=lambda messages: f"{len(messages)} messages"),
        options={"messages": LONG},
        outcomes="ok",
        requests=2,
    ),
    Scenario(
        name="a question that is too long",
        answers=[],
        agent=agent(context_window=100),
        asked="word " * 500,
        ends="context_window",
        says="100",
        requests=0,
    ),
]

CLIENTS = [
    Scenario(name=f"{scenario.name}, by {client.__name__}", client=client, **{
        field.name: getattr(scenario, field.name)
        for field in dataclasses.fields(Scenario) if field.name not in ("name", "client")
    })
    for client in (async_sdk, blocking_sdk)
    for scenario in [*TEXTS, *TOOLS, *FAULTS]
    if scenario.name in (
        "text with many kinds of characters", "tools one turn after another", "429, then text", "401",
        "closed without a byte, then text", "an endpoint that does not stream",
    )
]  # fmt: skip

SCENARIOS = [*TEXTS, *INPUTS, *TOOLS, *DELEGATES, *FAULTS, *LIMITS, *TIMES, *OBJECTS, *APPROVALS, *WINDOWS, *CLIENTS]


# ---- the ways


async def run(one: BaseAgent, scenario: Scenario, seen: list[Event]) -> AgentResult:
    return await one.run(scenario.asked, **scenario.options)


async def stream(one: BaseAgent, scenario: Scenario, seen: list[Event]) -> AgentResult:
    async with one.stream(scenario.asked, **scenario.options) as stream:
        events = [event async for event in stream]
        result = await stream.result()
    assert_shown(events, seen, result, scenario)
    return result


def sync_run(one: BaseAgent, scenario: Scenario, seen: list[Event]) -> AgentResult:
    return sync.run(one, scenario.asked, **scenario.options)


def sync_stream(one: BaseAgent, scenario: Scenario, seen: list[Event]) -> AgentResult:
    with sync.stream(one, scenario.asked, **scenario.options) as stream:
        events = list(stream)
        result = stream.result()
    assert_shown(events, seen, result, scenario)
    return result


def assert_shown(events: list[Event], seen: list[Event], result: AgentResult, scenario: Scenario) -> None:
    """The reader of a stream sees what an observer sees, and piece by piece all that the model said."""
    assert [id(event) for event in events] == [id(event) for event in seen]
    assert events[-1].kind == "run_finished"
    assert events[-1].result is result
    text: dict[str, str] = {}
    arguments: dict[tuple[str, str | None, str], str] = {}
    for event in events:
        match event:
            case ModelRequested():
                text[event.run_id] = ""
            case TextDelta():
                text[event.run_id] += event.text
            case ToolCallDelta():
                key = event.run_id, event.call_id, event.tool_name
                arguments[key] = arguments.get(key, "") + event.arguments
            case ModelResponded(message=message, run_id=run_id):
                said = message["content"] or ""
                if isinstance(said, list):
                    said = "".join(part["text"] for part in said)
                assert text[run_id] == (said.removesuffix("\ufffd") if said != REFUSAL else "")
                for made in () if scenario.is_whole else message.get("tool_calls", ()):
                    name, sent = made["function"]["name"], made["function"]["arguments"]
                    written = {"function": {"arguments": arguments.pop((run_id, made["id"], name))}}
                    [kept] = with_object_arguments({"tool_calls": [written]})["tool_calls"]
                    assert kept["function"]["arguments"] == sent
            case _:
                pass
    assert not arguments


# ---- what is compared


_MEASURED = re.compile(
    r"(\d+(\.\d+)?(e-?\d+)? s\b)|((?<=127\.0\.0\.1:)\d+)|((?<=direct_)[0-9a-f]+)"
    r"|(\(received \d+ bytes, expected \d+\)|\(incomplete chunked read\))"  # the HTTP library, of a body that is cut
)
STREAMED = ("stream", "sync.stream")
_DELTAS = {"text_delta", "reasoning_delta", "tool_call_delta"}
_ASKS_FOR_A_STREAM = {"stream", "stream_options"}
_NEVER_EQUAL = {"run_id", "parent_id", "at", "elapsed", "wait", "response_id", "first_piece", "server"}


def plain(value: Any) -> Any:
    """A value without what differs from run to run: measured seconds, ports, ids of direct calls, bytes."""
    match value:
        case str():
            return _MEASURED.sub("…", value)
        case list() | tuple():
            return [plain(item) for item in value]
        case dict():
            return {key: plain(item) for key, item in value.items()}
        case AgentResult():
            facts = {name: getattr(value, name) for name in AgentResult.model_fields if name not in _NEVER_EQUAL}
            facts["metadata"] = {key: item for key, item in value.metadata.items() if key != "messages"}
            return plain({**facts, "exception": value.exception})
        case ToolResult():
            facts = {name: getattr(value, name) for name in ToolResult.model_fields if name not in _NEVER_EQUAL}
            return plain({**facts, "exception": value.exception})
        case BaseException():
            names = ("status", "code", "param", "request_id", "retryable", "retry_after")
            facts = {name: getattr(value, name, None) for name in names}
            return plain(
                {"class": type(value).__name__, "text": str(value), **facts, "cause": type(value.__cause__).__name__}
            )
        case _:
            return value


def told(event: Event) -> dict[str, Any]:
    """An event as its facts."""
    names = (field.name for field in dataclasses.fields(event))
    return {name: plain(getattr(event, name)) for name in names if name not in _NEVER_EQUAL}


def account(result: AgentResult, seen: Sequence[Event], requests: Sequence[RecordedRequest], scenario: Scenario) -> Any:
    """All that is told of a run, in a form that is equal for equal runs."""
    bodies = [
        plain({name: value for name, value in each.body.items() if name not in _ASKS_FOR_A_STREAM}) for each in requests
    ]
    events = [told(event) for event in seen if event.kind not in _DELTAS]
    if scenario.is_parallel:
        bodies.sort(key=repr)
        events.sort(key=repr)
    return {"result": plain(result), "requests": bodies, "events": events}


async def accounts_of(scenario: Scenario, backend: tuple[str, Mapping[str, Any]]) -> dict[str, Any]:
    """What each way tells of a scenario, all at the same time: those that wait for something wait together."""
    found: dict[str, Any] = {}

    async def go(name: str, way: Callable[..., Any], portal: Mapping[str, Any] | None) -> None:
        one, seen = Endpoint(scenario.answers), list[Event]()
        await in_thread(one.start)
        try:
            built = scenario.agent(client=scenario.client(one), observers=[seen.append])
            arguments = way, built, scenario, seen
            result = await (way(*arguments[1:]) if portal is None else in_thread(in_portal, portal, *arguments))
        finally:
            with anyio.CancelScope(shield=True):
                await in_thread(one.close)
        assert_continuable(result)
        if not scenario.streams_inside:
            assert {each.body.get("stream") for each in one.requests} <= {True if name in STREAMED else None}
        found[name] = account(result, seen, one.requests, scenario)

    name, options = backend
    own = {"backend": name, **options}
    other = {"backend": "asyncio" if name == "trio" else "trio"}
    async with anyio.create_task_group() as group:
        group.start_soon(go, "run", run, None)
        group.start_soon(go, "stream", stream, None)
        group.start_soon(go, "sync.run", sync_run, own)
        group.start_soon(go, "sync.stream", sync_stream, own)
        group.start_soon(go, f"sync.run on {other['backend']}", sync_run, other)
    return found


def in_portal(portal: Mapping[str, Any], way: Callable[..., AgentResult], *arguments: Any) -> AgentResult:
    with sync.portal(**portal):
        return way(*arguments)


@pytest.mark.parametrize("scenario", SCENARIOS, ids=lambda scenario: scenario.name)
async def test_all_ways_to_run_tell_the_same(scenario: Scenario, anyio_backend: tuple[str, Mapping[str, Any]]):
    with anyio.fail_after(20):
        found = await accounts_of(scenario, anyio_backend)
    expected = found.pop("run")
    result = expected["result"]
    assert (result["stop_reason"], len(expected["requests"])) == (scenario.ends, scenario.requests)
    assert plain(scenario.says) in str(result["content"])
    assert " ".join(each["outcome"] for each in result["tool_results"]) == scenario.outcomes
    assert len(found) == 4
    for way, told_there in found.items():
        assert told_there == expected, f"{way} differs from run"


# ---- where the ways differ, and have to


async def in_all_ways(scenario: Scenario, backend: tuple[str, Mapping[str, Any]]) -> tuple[Any, Any]:
    """What `run` and what `stream` tell of a scenario; the blocking ways tell the same."""
    found = await accounts_of(scenario, backend)
    for way, told_there in found.items():
        assert told_there == found["stream" if way in STREAMED else "run"], way
    return found["run"], found["stream"]


async def test_a_reply_that_breaks_off_is_asked_for_again_only_if_nobody_has_seen_a_piece_of_it(
    anyio_backend: tuple[str, Mapping[str, Any]],
):
    script = [answers.cut("one two three four five six"), "done"]
    run, stream = await in_all_ways(Scenario(name="cut", answers=script), anyio_backend)
    assert (run["result"]["content"], len(run["requests"])) == ("done", 2)
    assert (stream["result"]["stop_reason"], len(stream["requests"])) == ("model_error", 1)
    assert stream["result"]["exception"]["class"] == "ConnectionFailed"
    assert stream["result"]["exception"]["retryable"]
    assert run["requests"][0] == stream["requests"][0]
    assert stream["result"]["messages"] == run["result"]["messages"][:1]


async def test_an_endpoint_that_cannot_tell_the_usage_of_a_stream_costs_one_request_more(
    anyio_backend: tuple[str, Mapping[str, Any]],
):
    def reply(request: RecordedRequest) -> AnswerLike:
        if "stream_options" in request.body:
            return Answer(status=400, error={"message": "unknown field", "param": "stream_options"})
        return "done" if request.body["messages"][-1]["role"] == "tool" else [LOOK]

    scenario = Scenario(name="usage", answers=reply, agent=agent(look))
    run, stream = await in_all_ways(scenario, anyio_backend)
    assert (len(run["requests"]), len(stream["requests"])) == (2, 3)
    assert stream["requests"][1:] == run["requests"]
    assert (run["result"]["usage"].requests, stream["result"]["usage"].requests) == (2, 3)
    assert (run["result"]["usage"].total_tokens, stream["result"]["usage"].total_tokens) == (30, 0)
    same = {"usage"} ^ run["result"].keys()
    assert {name: stream["result"][name] for name in same} == {name: run["result"][name] for name in same}


# ---- wrong use


def wrong_prompt() -> int:
    return 3


WRONG = {
    "a time that is none": ({"timeout": -1}, "go", "timeout=-1"),
    "retries that are none": ({"max_retries": -1}, "go", "max_retries=-1"),
    "limits that are none": ({"limits": {"max_requests": 2}}, "go", "give Limits"),
    "an unknown option": ({"timout": 1}, "go", "timout"),
    "no input": ({}, None, "user_input is None"),
    "a history that no endpoint takes": ({"messages": [{"role": "tool", "content": "x"}]}, "go", "which nobody made"),
    "a prompt that is none": ({}, "go", "returned 3"),
}


@pytest.mark.parametrize(("options", "asked", "words"), WRONG.values(), ids=WRONG)
async def test_all_ways_to_run_refuse_wrong_use_in_the_same_words(
    options: dict[str, Any], asked: Any, words: str, anyio_backend: tuple[str, Mapping[str, Any]]
):
    name, more = anyio_backend
    scenario = Scenario(name="wrong", answers=[], asked=asked, options=options)
    built = BaseAgent("A", wrong_prompt if "3" in words else "a", client=OpenAIModel(base_url="http://127.0.0.1:1"))
    raised: dict[str, UserError] = {}
    for way in (run, stream, sync_run, sync_stream):
        with pytest.raises(UserError, match=words) as caught:
            if way in (run, stream):
                await way(built, scenario, [])
            else:
                await in_thread(in_portal, {"backend": name, **more}, way, built, scenario, [])
        raised[way.__name__] = caught.value
    assert len({(type(error), str(error)) for error in raised.values()}) == 1
