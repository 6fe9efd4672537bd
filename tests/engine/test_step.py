"""What a reply asks for: one answer for each kind of reply, and the same one every time."""

import copy
import json
from typing import Any

import pytest

from fractal import AgentToolkit, BaseAgent, ModelRequest, Reply, ToolCall
from fractal._engine.step import AskAgain, BoundCall, CallTools, Decline, Finish, bind, next_step
from fractal.messages import Transcript
from fractal.toolkit import Tool

calls: list[Any] = []


def add(a: int, b: int = 1) -> int:
    calls.append((a, b))
    return a + b


def now() -> str:
    return "noon"


TOOLS = AgentToolkit(add, now).tools
GOOD = ToolCall("c1", "add", '{"a": 2}')


@pytest.mark.parametrize(
    ("reply", "step"),
    [
        (Reply(text="hi"), Finish("hi")),
        (Reply(text="hi", finish_reason="length"), Finish("hi")),
        (Reply(text="0"), Finish("0")),
        (Reply(refusal="no"), Decline("no")),
        (Reply(text="sorry", refusal="no"), Decline("no")),
        (Reply(refusal=""), Decline("")),
        (Reply(), AskAgain()),
        (Reply(finish_reason="stop"), AskAgain()),
        (Reply(finish_reason="tool_calls"), AskAgain()),
        (Reply(finish_reason="length", output_tokens=9), AskAgain()),
    ],
    ids=repr,
)
def test_a_reply_without_calls_is_an_answer_a_refusal_or_nothing(reply: Reply, step: object) -> None:
    assert next_step(reply, TOOLS) == step


@pytest.mark.parametrize("word", ["content_filter", "SAFETY", "recitation", "sensitive"])
@pytest.mark.parametrize("said", [{}, {"text": "It is made of"}, {"tool_calls": (GOOD,)}], ids=["", "half", "call"])
def test_an_answer_that_a_filter_has_withheld_or_cut_is_a_refusal(said: dict[str, Any], word: str) -> None:
    step = next_step(Reply(finish_reason=word, **said), TOOLS)
    assert isinstance(step, Decline)
    assert "content filter" in step.reason


async def test_a_run_whose_answer_is_withheld_ends_with_a_refusal_and_a_history_that_goes_on() -> None:
    class Filtered:
        async def respond(self, request: ModelRequest) -> Reply:
            return Reply(finish_reason="content_filter")

    result = await BaseAgent("A", "prompt", client=Filtered()).run("hi")
    assert (result.success, result.stop_reason) == (False, "refusal")
    assert Transcript(result.messages).messages == result.messages


@pytest.mark.parametrize(
    "reply",
    [
        Reply(tool_calls=(GOOD,)),
        Reply(tool_calls=(GOOD,), text="let me see"),
        Reply(tool_calls=(GOOD,), refusal="no"),
        Reply(tool_calls=(GOOD,), finish_reason="stop"),
    ],
    ids=repr,
)
def test_calls_come_before_everything_else_in_a_reply(reply: Reply) -> None:
    assert next_step(reply, TOOLS) == CallTools(
        (BoundCall(call_id="c1", name="add", tool=TOOLS["add"], arguments={"a": 2}),)
    )


def test_calls_are_bound_in_order_and_one_that_fails_does_not_disturb_the_others() -> None:
    sent = (GOOD, ToolCall("c2", "nowhere", "{}"), ToolCall("c3", "add", "{"), ToolCall("c4", "now", ""))
    step = next_step(Reply(tool_calls=sent), TOOLS)

    assert isinstance(step, CallTools)
    assert [call.call_id for call in step.calls] == ["c1", "c2", "c3", "c4"]
    assert [call.fault is None for call in step.calls] == [True, False, False, True]
    assert [call.tool for call in step.calls] == [TOOLS["add"], None, None, TOOLS["now"]]


@pytest.mark.parametrize(
    "name",
    ["functions.add", "add<|channel|>commentary", "<|start|>add", "functions.add:0", "add(", " add ", "ADD", "f.Add"],
)
def test_a_name_with_other_capitals_or_a_templates_words_around_it_is_that_of_the_one_tool_in_it(name: str) -> None:
    call = bind("c", name, '{"a": 2}', TOOLS)
    assert (call.name, call.tool, call.arguments, call.fault) == ("add", TOOLS["add"], {"a": 2}, None)


@pytest.mark.parametrize("name", ["add.now", "functions.plus", "adds", "now_add", "x" * 10_000 + ".add"])
def test_a_name_in_which_no_tool_or_more_than_one_is_named_is_no_tool(name: str) -> None:
    assert bind("c", name, '{"a": 2}', TOOLS).tool is None


@pytest.mark.parametrize(
    ("name", "arguments", "shown", "words"),
    [
        ("nowhere", "{}", {}, ["there is no tool 'nowhere'", "add, now"]),
        ("nowhere", '{"a": [1]}', {"a": [1]}, ["there is no tool 'nowhere'"]),
        ("nowhere", "{broken", "{broken", ["there is no tool 'nowhere'"]),
        ("", "{}", {}, ["there is no tool ''"]),
        ("add", "{broken", "{broken", ["'add'", "not valid JSON"]),
        ("add", "null", None, ["'add'", "'a' is missing"]),
        ("add", "[1]", [1], ["'add'", "JSON object"]),
        ("add", "{}", {}, ["'add'", "'a' is missing"]),
        ("add", '{"a": "x"}', {"a": "x"}, ["'add'", "'a'", "integer"]),
        ("add", '{"a": 1, "c": 2}', {"a": 1, "c": 2}, ["'add'", "no parameter 'c', only a, b"]),
        ("add", {"a": "x"}, {"a": "x"}, ["'add'", "'a'"]),
    ],
)
def test_a_call_that_does_not_fit_says_why_and_keeps_what_was_sent(
    name: str, arguments: Any, shown: Any, words: list[str]
) -> None:
    call = bind("c", name, arguments, TOOLS)

    assert (call.call_id, call.name, call.tool, call.arguments) == ("c", name, None, shown)
    assert all(word in (call.fault or "") for word in words), call.fault


@pytest.mark.parametrize(
    "arguments",
    [
        "[" * 100_000,
        '{"a": ' + "[" * 100_000 + "]" * 100_000 + "}",
        '{"a": ' + "1" * 10_000 + "}",
        "\ud800",
        '"\\ud800"',
    ],
    ids=["open", "deep", "digits", "surrogate", "escaped surrogate"],
)
@pytest.mark.parametrize("name", ["add", "nowhere"])
def test_no_arguments_are_too_odd_to_be_answered(name: str, arguments: str) -> None:
    call = bind("c", name, arguments, TOOLS)

    assert call.fault is not None
    assert call.tool is None
    assert len(call.fault) < 500
    json.dumps(call.arguments)


def test_without_tools_there_are_none_to_name() -> None:
    assert bind("c", "add", "{}", {}).fault == "there is no tool 'add'. Tools: none"


def test_a_step_is_pure() -> None:
    sent = (GOOD, ToolCall("c2", "nowhere", '{"a": {}}'))
    reply = Reply(tool_calls=sent, text="x")
    before, tools = copy.deepcopy(reply), dict(TOOLS)
    calls.clear()

    first = next_step(reply, tools)
    assert isinstance(first, CallTools)
    first.calls[0].arguments["a"] = 99
    second = next_step(reply, tools)

    assert reply == before
    assert tools == dict(TOOLS)
    assert isinstance(second, CallTools)
    assert second.calls[0].arguments == {"a": 2}
    assert calls == [], "nothing is called yet"


def test_steps_are_values() -> None:
    for step in (Finish("x"), Decline("x"), AskAgain(), CallTools(())):
        assert step == copy.copy(step)
        with pytest.raises((AttributeError, TypeError)):
            step.content = "y"  # type: ignore[union-attr]


def test_an_unfit_default_is_not_the_models_fault() -> None:
    def f(a: int = "not a number") -> Any:  # type: ignore[assignment]
        return a

    call = bind("c", "f", "{}", {"f": Tool.from_function(f)})
    assert (call.fault, call.arguments) == (None, {})
