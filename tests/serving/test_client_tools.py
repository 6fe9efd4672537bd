"""Tools of OpenAI's clients, offered beside an agent's own: who makes which calls, and how the conversation goes on."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import openai
import pytest
from fastapi import FastAPI

from fractal import BaseAgent, RunStarted, tool
from fractal.serving import MemoryStore, ServedRuns
from fractal.serving._openai.asked import chat_asked
from fractal.serving._openai.faults import Fault
from fractal.serving.openai_routes import openai_router
from fractal.testing import Endpoint, ScriptedModel, answers, record_events
from tests.on_uvicorn import on_uvicorn
from tests.visits import post

StartEndpoint = Callable[..., Endpoint]
HI: Any = [{"role": "user", "content": "hi"}]
ASK: Any = {
    "type": "function",
    "function": {
        "name": "ask_user",
        "description": "Ask the user.",
        "parameters": {"type": "object", "properties": {"question": {"type": "string"}}, "required": ["question"]},
        "strict": True,
    },
}
LOCATE: Any = {"type": "function", "function": {"name": "locate"}}


class Guide(BaseAgent):
    def __init__(self, **options: Any) -> None:
        super().__init__("Guide", "You guide.", **options)
        self.booked = list[str]()

    @tool
    async def book(self, city: str) -> str:
        """Book a room."""
        self.booked.append(city)
        return f"booked in {city}"


@contextmanager
def served(agents: Any, **options: Any) -> Iterator[openai.OpenAI]:
    app = FastAPI()
    app.include_router(openai_router(agents, client_tools=True, **options))
    http = openai.DefaultHttpxClient(trust_env=False)
    with on_uvicorn(app) as url, openai.OpenAI(base_url=f"{url}/v1", api_key="none", http_client=http) as client:
        yield client


def told(*messages: Any) -> list[dict[str, Any]]:
    return [each if isinstance(each, dict) else each.model_dump(exclude_none=True) for each in messages]


def answered(message: Any, *contents: str) -> list[dict[str, Any]]:
    """A message with calls and what the client's tools have said."""
    results = [
        {"role": "tool", "tool_call_id": call.id, "content": content}
        for call, content in zip(message.tool_calls, contents, strict=True)
    ]
    return told(message, *results)


def test_a_clients_tool_is_offered_beside_the_agents_and_left_to_the_client(endpoint: StartEndpoint) -> None:
    question = {"question": "when?"}
    started = endpoint([answers.calls(answers.call("ask_user", question, id="c1"), text="Let me ask."), "Then today."])
    with served(Guide()) as client:
        [choice] = client.chat.completions.create(model="Guide", messages=HI, tools=[ASK]).choices
        assert (choice.finish_reason, choice.message.content) == ("tool_calls", "Let me ask.")
        [call] = choice.message.tool_calls or []
        assert (call.function.name, json.loads(call.function.arguments)) == ("ask_user", question)
        history = [*HI, *answered(choice.message, "today")]
        [choice] = client.chat.completions.create(model="Guide", messages=history, tools=[ASK]).choices
        assert (choice.finish_reason, choice.message.content) == ("stop", "Then today.")
    first, second = (request.body for request in started.requests)
    assert [each["function"]["name"] for each in first["tools"]] == ["book", "ask_user"]
    assert first["tools"][1] == ASK
    *_, asked, result = second["messages"]
    assert asked["tool_calls"][0]["id"] == result["tool_call_id"] == "c1"
    assert result["content"] == "today"


def test_what_the_agents_own_tools_have_told_is_not_lost_and_not_done_again(endpoint: StartEndpoint) -> None:
    """The client is not shown those calls, so they are not in what it sends."""
    both = answers.calls(answers.call("book", {"city": "Oslo"}), answers.call("ask_user", {"question": "when?"}))
    script = [answers.call("book", {"city": "Rome"}), both, answers.call("locate"), "Done."]
    started, agent = endpoint(script), Guide()
    with served(agent) as client:
        history, shown = list(HI), list[list[str]]()
        for said in ("today", "here"):
            [choice] = client.chat.completions.create(model="Guide", messages=history, tools=[ASK, LOCATE]).choices
            shown.append([call.function.name for call in choice.message.tool_calls or []])
            history += answered(choice.message, said)
        [choice] = client.chat.completions.create(model="Guide", messages=history, tools=[ASK, LOCATE]).choices
    assert choice.message.content == "Done."
    assert (shown, agent.booked) == ([["ask_user"], ["locate"]], ["Rome", "Oslo"])
    seen = [each["content"] for each in started.requests[-1].body["messages"] if each["role"] == "tool"]
    assert seen == ["booked in Rome", "booked in Oslo", "today", "here"]


class Forgetful(MemoryStore):
    async def load(self, run_id: str) -> None:
        return None


@pytest.mark.parametrize("why", ["forgotten", "of another owner", "edited", "with less calls", "of nobody"])
def test_a_conversation_that_is_not_that_of_a_kept_run_is_taken_as_the_client_tells_it(
    why: str, endpoint: StartEndpoint
) -> None:
    calls = answers.calls(answers.call("locate", id="c2"), answers.call("ask_user", {"question": "when?"}))
    started = endpoint([answers.call("book", {"city": "Rome"}), calls, "Done."])
    owners = iter(["ann", "bob" if why == "of another owner" else "ann"])
    store = Forgetful() if why == "forgotten" else MemoryStore()
    with served(ServedRuns(Guide(), store=store), owner=lambda: next(owners)) as client:
        [choice] = client.chat.completions.create(model="Guide", messages=HI, tools=[ASK, LOCATE]).choices
        history = [*HI, *answered(choice.message, "here", "today")]
        if why == "with less calls":
            del history[1]["tool_calls"][1], history[3]
        if why == "edited":
            history[0] = {"role": "user", "content": "hello"}
        if why == "of nobody":
            history[1]["tool_calls"][0]["id"] = history[2]["tool_call_id"] = "call_x"
        [choice] = client.chat.completions.create(model="Guide", messages=history, tools=[ASK, LOCATE]).choices
        assert choice.message.content == "Done."
    _, *sent = started.requests[-1].body["messages"]
    assert [each["role"] for each in sent] == ["user", "assistant", *["tool"] * (len(history) - 2)]
    assert sent[1]["tool_calls"][0]["id"] == sent[2]["tool_call_id"] == ("call_x" if why == "of nobody" else "c2")


def test_calls_are_streamed_after_the_text_and_a_stream_goes_on_with_their_results(endpoint: StartEndpoint) -> None:
    calls = answers.calls(answers.call("locate"), answers.call("ask_user", {"question": "when?"}), text="Let me see.")
    endpoint([calls, "Then today."])
    options: Any = {"model": "Guide", "tools": [ASK, LOCATE], "stream_options": {"include_usage": True}}
    with served(Guide()) as client:
        with client.chat.completions.stream(messages=HI, **options) as stream:
            chunks = [event.chunk for event in stream if event.type == "chunk"]
            [choice] = stream.get_final_completion().choices
        assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices) == "Let me see."
        assert (choice.finish_reason, choice.message.content) == ("tool_calls", "Let me see.")
        assert [call.function.name for call in choice.message.tool_calls or []] == ["locate", "ask_user"]
        assert chunks[-1].usage is not None
        history = [*HI, *answered(choice.message, "here", "today")]
        with client.chat.completions.stream(messages=history, **options) as stream:
            assert stream.get_final_completion().choices[0].message.content == "Then today."


def test_a_next_question_goes_on_after_calls_of_the_clients(endpoint: StartEndpoint) -> None:
    started = endpoint([answers.call("locate", id="c1"), "In Rome.", "Sunny."])
    with served(Guide()) as client:
        [choice] = client.chat.completions.create(model="Guide", messages=HI, tools=[LOCATE]).choices
        history = [*HI, *answered(choice.message, "Rome")]
        [choice] = client.chat.completions.create(model="Guide", messages=history, tools=[LOCATE]).choices
        history += told(choice.message, {"role": "user", "content": "And the weather?"})
        [choice] = client.chat.completions.create(model="Guide", messages=history).choices
        assert choice.message.content == "Sunny."
    sent = started.requests[-1].body
    assert [each["role"] for each in sent["messages"]] == ["system", "user", "assistant", "tool", "assistant", "user"]
    assert sent["messages"][3]["tool_call_id"] == "c1"
    assert [each["function"]["name"] for each in sent["tools"]] == ["book"]


def test_with_tool_choice_none_no_tool_of_the_client_is_offered(endpoint: StartEndpoint) -> None:
    started = endpoint("well")
    with served(Guide()) as client:
        client.chat.completions.create(model="Guide", messages=HI, tools=[ASK], tool_choice="none")
    assert [each["function"]["name"] for each in started.requests[0].body["tools"]] == ["book"]


def test_arguments_that_are_no_object_go_back_to_the_model(endpoint: StartEndpoint) -> None:
    endpoint([answers.call("locate", "[1"), answers.call("locate", {"self": 1, "arguments": 2, "ctx": 3})])
    with served(Guide()) as client:
        [choice] = client.chat.completions.create(model="Guide", messages=HI, tools=[LOCATE]).choices
    [call] = choice.message.tool_calls or []
    assert json.loads(call.function.arguments) == {"self": 1, "arguments": 2, "ctx": 3}


@pytest.mark.parametrize("mode", ["tool", "prompt"])
def test_an_agent_with_typed_answers_may_ask_the_client_too(mode: Any, endpoint: StartEndpoint) -> None:
    endpoint([answers.call("locate"), answers.call("locate")])
    with served(Guide(output_type=dict[str, int], output_mode=mode)) as client:
        [choice] = client.chat.completions.create(model="Guide", messages=HI, tools=[LOCATE]).choices
        chunks = list(client.chat.completions.create(model="Guide", messages=HI, tools=[LOCATE], stream=True))
    assert choice.finish_reason == chunks[-1].choices[0].finish_reason == "tool_calls"
    assert choice.message.content is None


@pytest.mark.parametrize("is_streamed", [False, True])
async def test_an_agent_with_a_run_of_its_own_has_the_tools_and_turns_of_the_client(is_streamed: bool) -> None:
    class Own(Guide):
        async def run(self, user_input: Any, *arguments: Any, **options: Any) -> Any:
            return await super().run(user_input, *arguments, **options)

    model = ScriptedModel([answers.call("locate", id="c1"), "In Rome."])
    app = FastAPI()
    app.include_router(openai_router(Own(client=model), client_tools=True))
    body = {"model": "Guide", "tools": [LOCATE], "stream": is_streamed}
    asked = await post(app, "/v1/chat/completions", {**body, "messages": HI})
    assert '"finish_reason":"tool_calls"' in asked.body.decode()
    call = {"id": "c1", "type": "function", "function": {"name": "locate", "arguments": "{}"}}
    result = {"role": "tool", "tool_call_id": "c1", "content": "Rome"}
    history = [*HI, {"role": "assistant", "content": None, "tool_calls": [call]}, result]
    told = await post(app, "/v1/chat/completions", {**body, "messages": history})
    assert "Rome." in told.body.decode()
    assert model.requests[-1].messages[-2:] == history[-2:]


def read(**body: Any) -> Any:
    agents = {"Guide": Guide()}
    return chat_asked(json.dumps({"model": "Guide", "messages": HI, **body}).encode(), agents, takes_tools=True)


def function(**facts: Any) -> dict[str, Any]:
    return {"type": "function", "function": {"name": "f", **facts}}


@pytest.mark.parametrize(
    ("body", "param", "said"),
    [
        ({"tools": [function(name="book")]}, "tools[0]", "has a tool named book of its own"),
        ({"tools": [function(), function()]}, "tools[1]", "two tools named f"),
        ({"tools": [{"type": "web_search"}]}, "tools[0]", "is no function"),
        ({"tools": [{"type": "custom", "custom": {"name": "f"}}]}, "tools[0]", "is no function"),
        ({"tools": [function(name="no name")]}, "tools", "cannot be offered"),
        ({"tools": [function(parameters=[])]}, "tools[0].function.parameters", "is no JSON Schema"),
        ({"tools": [function(description=1)]}, "tools[0].function.description", "is no text"),
        ({"tools": [function(strict="yes")]}, "tools[0].function.strict", "is no true or false"),
        ({"tools": "all"}, "tools", "is no list"),
        ({"tools": [function(name=f"f{n}") for n in range(129)]}, "tools", "is no list of up to 128"),
        ({"tool_choice": "required"}, "tool_choice", "the model calls which tools it wants"),
        ({"tool_choice": {"type": "function", "function": {"name": "f"}}}, "tool_choice", "the model calls which"),
        ({"functions": [{"name": "f"}]}, "functions", "not supported"),
        ({"messages": [{"role": "assistant", "content": "x"}]}, "messages[0]", "has to be the user's turn"),
        ({"messages": [*HI, {"role": "tool", "tool_call_id": "x", "content": "y"}]}, "messages[1]", ""),
    ],
    ids=range(15),
)
def test_tools_that_cannot_be_offered_are_refused(body: dict[str, Any], param: str, said: str) -> None:
    with pytest.raises(Fault) as caught:
        read(**body)
    assert (caught.value.status, caught.value.param) == (400, param)
    assert said in caught.value.message


async def test_observers_are_told_of_the_users_turn_and_then_of_those_after_it() -> None:
    model = ScriptedModel([answers.call("locate"), "Done."])
    app = FastAPI()
    app.include_router(openai_router(Guide(client=model), client_tools=True))
    asked = (await post(app, "/v1/chat/completions", {"model": "Guide", "messages": HI, "tools": [LOCATE]})).json
    message = asked["choices"][0]["message"]
    result = {"role": "tool", "tool_call_id": message["tool_calls"][0]["id"], "content": "Rome"}
    with record_events() as events:
        body = {"model": "Guide", "messages": [*HI, message, result], "tools": [LOCATE]}
        assert (await post(app, "/v1/chat/completions", body)).json["choices"][0]["message"]["content"] == "Done."
    [started] = [event for event in events if isinstance(event, RunStarted)]
    assert (started.message, started.history) == (HI[0], [])
