"""What comes back of runs and tool calls, through JSON too."""

import copy
import dataclasses
import datetime as dt
import json
import pickle
from decimal import Decimal
from typing import Any, get_args

import pytest
from pydantic import BaseModel, ValidationError

from fractal import (
    AgentResult,
    AgentReturnPart,
    BaseAgent,
    BudgetExceeded,
    Outcome,
    Refused,
    RunError,
    StopReason,
    ToolResult,
    ToolReturnPart,
    Usage,
)
from fractal.testing import ScriptedModel, answers
from tests.support import shown

HISTORY: list[dict[str, Any]] = [
    {"role": "user", "content": "hi"},
    {"role": "assistant", "content": "hello", "unknown_field": [1]},
]


class Person(BaseModel):
    name: str
    born: dt.date | None = None


@dataclasses.dataclass
class Point:
    x: int


class Opaque:
    def __str__(self) -> str:
        return "an opaque thing"


CONTENTS: list[tuple[Any, Any]] = [  # what a tool returns, its form in JSON
    ("text", "text"),
    ("", ""),
    ('{"text": "that looks like JSON"}', '{"text": "that looks like JSON"}'),
    (None, None),
    (True, True),
    (5, 5),
    (10**30, 10**30),
    (1.5, 1.5),
    ([1, [2]], [1, [2]]),
    ({"a": {"b": None}}, {"a": {"b": None}}),
    ((1, "a"), [1, "a"]),
    ({3}, [3]),
    (Person(name="Ada", born=dt.date(1815, 12, 10)), {"name": "Ada", "born": "1815-12-10"}),
    ([Person(name="Ada")], [{"name": "Ada", "born": None}]),
    ({"who": Person(name="Ada")}, {"who": {"name": "Ada", "born": None}}),
    (Point(1), {"x": 1}),
    (dt.date(2024, 5, 6), "2024-05-06"),
    (dt.timedelta(seconds=90), "PT1M30S"),
    (Decimal("1.50"), "1.50"),
    (b"\xff\x00", "_wA="),
    (Opaque(), "an opaque thing"),
    ({"deep": [Opaque()]}, {"deep": ["an opaque thing"]}),
    (ValueError("odd"), "odd"),
    ("lone \ud800", "lone \ufffd"),
    ({"deep": "lone \ud800"}, {"deep": "lone \ufffd"}),
    (float("inf"), None),
]


@pytest.mark.parametrize(("content", "form"), CONTENTS, ids=[shown(content)[:40] for content, _ in CONTENTS])
@pytest.mark.parametrize("kind", [AgentResult, ToolResult])
def test_content_is_kept_as_it_is_and_goes_through_json_in_its_json_form(kind: Any, content: Any, form: Any) -> None:
    facts = {"agent_name": "A"} if kind is AgentResult else {"tool_name": "f"}
    result = kind(content=content, metadata={"arguments": {"x": content}}, **facts)
    assert result.content is content
    assert result.metadata["arguments"]["x"] is content

    dumped = result.model_dump_json()
    assert json.loads(dumped)["content"] == form
    assert json.loads(dumped) == json.loads(json.dumps(result.model_dump(mode="json")))
    loaded = kind.model_validate_json(dumped)
    assert loaded.content == form
    assert loaded.metadata == {"arguments": {"x": form}}
    assert loaded.model_dump_json() == dumped


def whole_result() -> AgentResult:
    call = ToolResult(
        content="x", tool_name="f", metadata={"arguments": {}, "terminate": False}, elapsed=0.5, call_id="c"
    )
    late = ToolResult(tool_name="g", error="no answer", outcome="abandoned", call_id="d")
    return AgentResult(
        content="hello",
        agent_name="A",
        metadata={"iterations": 1, "messages": HISTORY},
        stop_reason="terminated",
        messages=HISTORY,
        usage=Usage(requests=1, tool_calls=2, input_tokens=3, output_tokens=4),
        run_id="r",
        tool_results=[call, late],
        abandoned=[late],
        warnings=["odd"],
        elapsed=1.5,
    )


def failed_result() -> AgentResult:
    facts = {"reason": "refusal", "error": "no", "error_type": "refusal"}
    return AgentResult(content="no", agent_name="A", success=False, error="no", stop_reason="refusal", metadata=facts)


@pytest.mark.parametrize("result", [whole_result(), failed_result(), AgentResult(agent_name="A")], ids=repr)
def test_a_result_comes_back_from_json_and_from_a_pickle_as_it_went(result: AgentResult) -> None:
    for back in (
        AgentResult.model_validate_json(result.model_dump_json()),
        AgentResult.model_validate(json.loads(json.dumps(result.model_dump(mode="json")))),
        AgentResult.model_validate(result.model_dump()),
        pickle.loads(pickle.dumps(result)),
        copy.deepcopy(result),
    ):
        assert back == result
        assert back.model_dump() == result.model_dump()


def test_the_old_names_are_the_same_classes() -> None:
    assert AgentReturnPart is AgentResult
    assert ToolReturnPart is ToolResult


def test_little_is_needed_to_build_one() -> None:
    result = AgentResult(agent_name="A")
    assert (result.content, result.success, result.stop_reason, result.error) == (None, True, "finished", None)
    assert (result.messages, result.metadata, result.usage) == ([], {}, Usage())
    call = ToolResult(tool_name="f")
    assert (call.content, call.error, call.outcome, call.metadata, call.exception) == (None, None, "ok", {}, None)
    for kind in (AgentResult, ToolResult):
        with pytest.raises(ValidationError):
            kind()


def test_nothing_is_shared_between_two_results() -> None:
    one, two = AgentResult(agent_name="A"), AgentResult(agent_name="A")
    one.messages.append({"role": "user", "content": "x"})
    one.metadata["x"] = 1
    assert (two.messages, two.metadata) == ([], {})


@pytest.mark.parametrize("stop_reason", get_args(StopReason))
def test_every_stop_reason_goes_through_json(stop_reason: StopReason) -> None:
    result = AgentResult(agent_name="A", stop_reason=stop_reason)
    assert AgentResult.model_validate_json(result.model_dump_json()).stop_reason == stop_reason


@pytest.mark.parametrize("outcome", get_args(Outcome))
def test_every_outcome_goes_through_json(outcome: Outcome) -> None:
    result = ToolResult(tool_name="f", outcome=outcome)
    assert ToolResult.model_validate_json(result.model_dump_json()).outcome == outcome


def test_unknown_words_are_refused() -> None:
    with pytest.raises(ValidationError):
        AgentResult(agent_name="A", stop_reason="bored")  # type: ignore[arg-type]
    with pytest.raises(ValidationError):
        ToolResult(tool_name="f", outcome="fine")  # type: ignore[arg-type]


# ---- messages


def test_the_messages_in_the_metadata_are_the_very_same_list() -> None:
    result = whole_result()
    assert result.metadata["messages"] is result.messages
    for back in (
        AgentResult.model_validate_json(result.model_dump_json()),
        pickle.loads(pickle.dumps(result)),
        copy.deepcopy(result),
        result.model_copy(deep=True),
    ):
        assert back.messages == HISTORY
        assert back.metadata["messages"] is back.messages


def test_messages_that_are_only_in_the_metadata_are_not_lost() -> None:
    result = AgentResult(content="x", agent_name="A", metadata={"iterations": 1, "messages": HISTORY})
    assert result.messages == HISTORY
    assert result.metadata["messages"] is result.messages


def test_messages_are_not_put_where_nobody_wants_them() -> None:
    assert AgentResult(agent_name="A", messages=HISTORY, metadata={"a": 1}).metadata == {"a": 1}


@pytest.mark.parametrize(
    ("part", "form"),
    [
        ({"type": "text", "text": "lone \ud800"}, {"type": "text", "text": "lone \ufffd"}),
        ({"type": "text", "text": Opaque()}, {"type": "text", "text": "an opaque thing"}),
        ({"type": "file", "file": b"\xff"}, {"type": "file", "file": "_w=="}),
    ],
    ids=["surrogate", "object", "bytes"],
)
def test_messages_with_odd_parts_go_through_json_as_they_go_over_the_wire(part: Any, form: Any) -> None:
    messages = [{"role": "user", "content": [part]}]
    result = AgentResult(agent_name="A", messages=messages, metadata={"messages": messages})
    dumped = json.loads(result.model_dump_json())

    assert dumped["messages"] == [{"role": "user", "content": [form]}]
    assert dumped["metadata"]["messages"] == dumped["messages"]


# ---- errors


def test_a_success_has_nothing_to_raise() -> None:
    result = whole_result()
    assert result.exception is None
    assert result.raise_for_error() is result


def test_a_failure_raises_the_error_it_came_from() -> None:
    result, error = failed_result(), Refused("no")
    result._exception, error.result = error, result

    for _ in range(2):
        with pytest.raises(Refused) as caught:
            result.raise_for_error()
        assert caught.value is error
        assert caught.value.result is result


def test_after_a_trip_through_json_the_error_is_a_run_error_with_the_same_text_and_the_result() -> None:
    result = AgentResult.model_validate_json(failed_result().model_dump_json())
    with pytest.raises(RunError, match=r"^no$") as caught:
        result.raise_for_error()

    assert caught.value.result is result
    assert result.exception is caught.value


def test_a_failure_without_a_text_says_its_stop_reason() -> None:
    with pytest.raises(RunError, match="max_iterations"):
        AgentResult(agent_name="A", success=False, stop_reason="max_iterations").raise_for_error()


def test_a_failed_result_survives_a_pickle_with_its_error() -> None:
    result, error = failed_result(), BudgetExceeded("tokens", 5, 5)
    result._exception, error.result = error, result
    loaded = pickle.loads(pickle.dumps(result)).exception

    assert isinstance(loaded, BudgetExceeded)
    assert (loaded.resource, loaded.limit, loaded.used) == ("tokens", 5, 5)


def test_a_tool_result_knows_the_exception_but_json_does_not() -> None:
    result = ToolResult(tool_name="f", error="ValueError: odd", outcome="error")
    result._exception = ValueError("odd")
    assert result.exception is result._exception
    assert "exception" not in json.loads(result.model_dump_json())
    assert ToolResult.model_validate_json(result.model_dump_json()).exception is None


# ---- results that were stored by older code, or built by hand

OLD_FAILURES: list[tuple[dict[str, Any], StopReason]] = [
    ({"reason": "refusal"}, "refusal"),
    ({"reason": "no_content_after_retries"}, "no_content"),
    ({"reason": "max_iterations_reached"}, "max_iterations"),
    ({"error": "429", "error_type": "rate_limit"}, "model_error"),
    ({"error": "slow", "error_type": "timeout"}, "model_error"),
    ({"error": "400", "error_type": "api_error"}, "model_error"),
    ({"error": "bad", "error_type": "json_decode_error"}, "model_error"),
    ({"error": "odd", "error_type": "unexpected_error"}, "error"),
    ({"reason": "bored", "error_type": "refusal"}, "refusal"),
    ({"reason": ["odd"]}, "error"),
    ({}, "error"),
    (None, "error"),  # type: ignore[list-item]
]


@pytest.mark.parametrize(("metadata", "stop_reason"), OLD_FAILURES)
@pytest.mark.parametrize("success", [False, 0], ids=repr)
def test_a_stored_failure_of_the_older_form_is_that_failure(
    metadata: dict[str, Any] | None, stop_reason: StopReason, success: Any
) -> None:
    stored = {"content": "so it went", "agent_name": "a", "success": success, "metadata": metadata}
    for result in (AgentResult.model_validate_json(json.dumps(stored)), AgentResult(**stored)):
        assert (result.success, result.stop_reason) == (False, stop_reason)
        assert result.error == (metadata or {}).get("error", "so it went")
        assert AgentResult.model_validate_json(result.model_dump_json()) == result
        with pytest.raises(RunError, match=result.error) as caught:
            result.raise_for_error()
        assert caught.value.stop_reason == stop_reason


@pytest.mark.parametrize("name", ["metadata", "messages", "tool_results", "abandoned", "warnings", "usage"])
def test_a_stored_null_is_the_empty_form_of_its_field(name: str) -> None:
    stored = json.dumps({"content": "x", "agent_name": "a", "success": True, name: None})
    assert AgentResult.model_validate_json(stored) == AgentResult(content="x", agent_name="a")


def test_a_stored_tool_result_of_the_older_form_has_the_outcome_it_had() -> None:
    for error, outcome in ((None, "ok"), ("odd", "error")):
        stored = {"content": "", "tool_name": "f", "metadata": None, "error": error}
        result = ToolResult.model_validate_json(json.dumps(stored))
        assert (result.outcome, result.error, result.metadata) == (outcome, error, {})


@pytest.mark.parametrize(
    "facts",
    [{"error": "odd"}, {"stop_reason": "refusal"}, {"metadata": {"reason": "refusal"}}, {"success": False}],
    ids=repr,
)
def test_a_result_by_hand_that_says_it_failed_has_failed(facts: dict[str, Any]) -> None:
    result = AgentResult(content=None, agent_name="A", **facts)
    assert not result.success
    assert result.stop_reason in ("error", "refusal")
    assert result.error
    assert str(result) == f"A failed: {result.error}"


@pytest.mark.parametrize("facts", [{"error": "odd"}, {"stop_reason": "deadline"}], ids=repr)
def test_a_result_that_contradicts_itself_is_refused(facts: dict[str, Any]) -> None:
    with pytest.raises(ValidationError, match="contradicts"):
        AgentResult(agent_name="A", success=True, **facts)
    with pytest.raises(ValidationError, match="contradicts"):
        ToolResult(tool_name="f", outcome="ok", error="odd")


def test_a_success_may_have_any_metadata() -> None:
    result = AgentResult(content="x", agent_name="A", success=True, metadata={"reason": "refusal"})
    assert (result.success, result.stop_reason, result.error) == (True, "finished", None)


# ---- the rest


def test_a_result_as_text_says_who_and_what() -> None:
    assert str(whole_result()) == "A: hello"
    assert str(failed_result()) == "A failed: no"


def test_usage_adds_up_and_never_changes() -> None:
    usage = Usage(input_tokens=3, output_tokens=4)
    assert usage.total_tokens == 7
    with pytest.raises(ValidationError):
        usage.requests = 5  # type: ignore[misc]


@pytest.mark.parametrize("kind", [AgentResult, ToolResult, Usage])
def test_every_field_is_described_and_the_classes_have_a_json_schema(kind: type[BaseModel]) -> None:
    assert all(field.description for field in kind.model_fields.values())
    assert set(kind.model_json_schema(mode="serialization")["properties"]) == set(kind.model_fields)


@pytest.mark.anyio
async def test_what_a_run_makes_is_what_validation_would_have_made() -> None:
    model = ScriptedModel([answers.calls(answers.call("add", {"a": 1}), answers.call("add", {"a": "x"})), "done"])
    failing = ScriptedModel([answers.failure(400, "no")])
    for client in (model, failing):
        made = await BaseAgent("A", "a", client=client).add_tool(lambda a: a + 1, name="add").run("go")
        for one in (made, *made.tool_results):
            assert list(vars(one)) == list(type(one).model_fields)
            checked = type(one)(**vars(one))
            assert vars(checked) == vars(one)
            assert one.model_fields_set == set(type(one).model_fields)
            assert type(one).model_validate_json(one.model_dump_json()).model_dump() == one.model_dump()
            assert copy.deepcopy(one).model_dump() == one.model_dump()
        assert made.metadata["messages"] is made.messages


# ---- the type of the content, which only type checkers know


def test_a_result_with_a_type_is_the_same_class():
    assert AgentResult[Person] is AgentResult
    result = AgentResult[Person](content=Person(name="Ada"), agent_name="A")
    assert type(result) is AgentResult
    assert repr(result).startswith("AgentResult(content=")
    assert type(pickle.loads(pickle.dumps(result))) is AgentResult
    assert AgentResult[Person].model_validate_json(result.model_dump_json()).content == {"name": "Ada", "born": None}
    assert AgentResult.model_json_schema()["properties"]["content"] == {
        "default": None,
        "description": "The answer: text, or what a terminating tool returned. After a failure the reason as text.",
        "title": "Content",
    }


def test_a_result_equals_what_json_a_pickle_or_a_copy_makes_of_it() -> None:
    call = ToolResult.of_facts(
        KeyError("x"),
        content=None,
        tool_name="look",
        metadata={"arguments": {}, "terminate": False},
        error="KeyError: 'x'",
        outcome="error",
        elapsed=0.1,
        call_id="1",
    )
    run = AgentResult(content="ok", agent_name="A", tool_results=[call])
    for result in (call, run):
        kind = type(result)
        for same in (kind.model_validate_json(result.model_dump_json()), pickle.loads(pickle.dumps(result)), result):
            assert same == result
            assert copy.deepcopy(same) == result
    assert call != call.changed(elapsed=0.2)
    assert call != run
    assert call != "look"
