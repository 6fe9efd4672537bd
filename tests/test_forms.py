"""Results and events are told whatever is in them: as JSON and back, as text, in a log, and to another process."""

from __future__ import annotations

import copy
import json
import logging
import pickle
from collections.abc import Iterator
from typing import Any

import pytest
from pydantic import TypeAdapter

from fractal import (
    AgentResult,
    ApprovalAnswered,
    ApprovalRequested,
    DelegationFinished,
    DelegationStarted,
    Event,
    LimitHit,
    ModelResponded,
    RunError,
    RunFinished,
    RunStarted,
    TextDelta,
    ToolCallDelta,
    ToolFinished,
    ToolResult,
    ToolStarted,
    Usage,
    WarningRaised,
)
from fractal._event import event_of
from fractal._json import encode, jsonable, text_of
from tests.odd import VALUES, Model, Textless, nested

HALF = "half \ud800"
WHO: dict[str, Any] = {"run_id": HALF, "parent_id": None, "agent_name": HALF, "depth": 0}
CALL: dict[str, Any] = {"tool_name": HALF, "call_id": HALF}


def tool_result(value: Any) -> ToolResult:
    # As the engine makes it, which does not look at the values.
    return ToolResult.of_facts(
        ValueError(value),
        content=value,
        tool_name=HALF,
        metadata={"arguments": {"x": value}, HALF: value},
        error=HALF,
        outcome="error",
        elapsed=0.5,
        call_id=HALF,
    )


def agent_result(value: Any) -> AgentResult:
    error, call, messages = RunError(HALF), tool_result(value), [{"role": "user", "content": value, HALF: value}]
    error.result = result = AgentResult.of_facts(
        error,
        content=value,
        agent_name=HALF,
        success=False,
        metadata={"messages": messages, "more": value},
        stop_reason="error",
        error=HALF,
        messages=messages,
        usage=Usage(requests=1, input_tokens=10**5000),
        run_id=HALF,
        tool_results=[call],
        abandoned=[call],
        pending=[],
        warnings=[HALF],
        elapsed=1.0,
    )
    return result


def events(value: Any) -> Iterator[Event]:
    message = {"role": "user", "content": value, HALF: value}
    yield RunStarted(**WHO, message=message, call_id=HALF)
    yield ModelResponded(
        **WHO, message=message, finish_reason=HALF, input_tokens=10**5000, output_tokens=-(10**5000), elapsed=0.5
    )
    yield TextDelta(**WHO, text=HALF)
    yield ToolCallDelta(**WHO, **CALL, index=0, arguments=HALF)
    yield ToolStarted(**WHO, **CALL, arguments=value)
    yield ApprovalRequested(**WHO, **CALL, arguments=value)
    yield ApprovalAnswered(**WHO, **CALL, arguments=value, is_allowed=False, reason=HALF)
    yield ToolFinished(**WHO, **CALL, result=tool_result(value))
    yield DelegationStarted(**WHO, call_id=HALF, to_agent=HALF, query=value)
    yield DelegationFinished(**WHO, call_id=None, to_agent=HALF, result=agent_result(value))
    yield LimitHit(**WHO, limit="depth", message=HALF)
    yield WarningRaised(**WHO, message=HALF)
    yield RunFinished(**WHO, result=agent_result(value))


any_value = pytest.mark.parametrize("make", VALUES.values(), ids=VALUES)


@any_value
def test_whatever_is_in_a_result_it_goes_through_json_and_comes_back(make: Any) -> None:
    for one in (tool_result(make()), agent_result(make())):
        text = one.model_dump_json()
        assert json.loads(text) == json.loads(json.dumps(one.model_dump(mode="json")))
        loaded = type(one).model_validate_json(text.encode())
        assert json.loads(loaded.model_dump_json(exclude={"metadata"})) == json.loads(
            one.model_dump_json(exclude={"metadata"})
        )
        type(one).model_validate(one.model_dump())


@any_value
def test_whatever_is_in_a_result_it_can_be_printed_and_logged(make: Any, caplog: pytest.LogCaptureFixture) -> None:
    for one in (tool_result(make()), agent_result(make()), Usage(requests=10**5000)):
        for text in (repr(one), str(one), f"{one}"):
            text.encode()
        logging.getLogger("tests").warning("%s %r", one, one)


@any_value
def test_whatever_is_in_a_result_another_process_gets_it(make: Any) -> None:
    for one in (tool_result(make()), agent_result(make())):
        back = pickle.loads(pickle.dumps(one))
        assert back.model_dump_json()
        if isinstance(back, AgentResult):
            assert back.metadata["messages"] is back.messages
            assert back.exception is not None
            assert back.exception.result is back


@any_value
def test_whatever_is_in_an_event_it_is_told(make: Any) -> None:
    adapter: TypeAdapter[Event] = TypeAdapter(Event)
    for event in events(make()):
        text = event.model_dump_json()
        loaded = adapter.validate_json(text)
        assert type(loaded) is type(event)
        assert event.model_dump(mode="json")["kind"] == event.kind == event.model_dump()["kind"]
        repr(event).encode()
        again = pickle.loads(pickle.dumps(event))
        assert type(again) is type(event)
        again.model_dump_json()


@any_value
def test_no_value_is_without_a_form_in_json(make: Any) -> None:
    json.loads(json.dumps(jsonable(make()), ensure_ascii=False).encode())
    text_of(make()).encode()
    encode(make())


def test_what_is_odd_in_a_value_becomes_text_and_the_rest_stays() -> None:
    value = {"bad": Textless(), "half \ud83d": [1, {"deep": "\ud83d"}], (1, 2): Model(inner="\ud83d"), "big": 10**5000}
    assert jsonable(value) == {
        "bad": "Textless",
        "half \ufffd": [1, {"deep": "\ufffd"}],
        "[1,2]": {"inner": "\ufffd"},
        "big": "1" + "0" * 5000,
    }


def test_what_stands_in_a_result_is_no_deeper_than_readers_of_json_take() -> None:
    for depth in (90, 150, 250, 400):
        text = agent_result(nested(depth)).model_dump_json()
        assert AgentResult.model_validate_json(text).content
    assert jsonable(nested(90)) == nested(90)


def test_what_cannot_be_pickled_is_sent_in_its_json_form_and_the_rest_as_it_is() -> None:
    class Local(Exception):
        """No other process knows it."""

    made = Model(inner=1)
    result = ToolResult.of_facts(
        Local(),
        content=lambda: 1,
        tool_name="f",
        metadata={"arguments": {"x": made}, "terminate": False},
        error="Local",
        outcome="error",
        elapsed=0.0,
        call_id=None,
    )
    back = pickle.loads(pickle.dumps(result))
    assert "lambda" in back.content
    assert back.metadata["arguments"]["x"] == made
    assert back.exception is None
    assert (result.exception, callable(result.content)) == (result._exception, True)


def test_an_exception_that_cannot_be_made_again_is_left_out_of_a_pickle_and_the_same_in_a_copy() -> None:
    class Needy(ValueError):
        def __init__(self, code: int, text: str) -> None:
            super().__init__(text)

    globals()["Needy"], Needy.__qualname__ = Needy, "Needy"
    result = ToolResult(tool_name="f", outcome="error", error="no")
    result._exception = Needy(1, "no")
    assert pickle.loads(pickle.dumps(result)).exception is None
    run = agent_result("x").model_copy(update={"tool_results": [result]})
    for one in (copy.deepcopy(result), copy.deepcopy(run).tool_results[0], run.model_copy(deep=True).tool_results[0]):
        assert (one is result, one.exception) == (False, result.exception)
    result._exception = ValueError("no")
    assert repr(pickle.loads(pickle.dumps(result)).exception) == "ValueError('no')"


def test_copies_of_events_keep_what_is_in_them() -> None:
    function = lambda: 1  # noqa: E731
    event = ToolStarted(**WHO, **CALL, arguments={"f": function, "list": [1]})
    assert copy.copy(event) is event
    deep = copy.deepcopy(event)
    assert deep == event
    assert deep.arguments["f"] is function
    assert deep.arguments["list"] is not event.arguments["list"]


def test_an_event_of_a_run_is_as_one_that_its_class_makes() -> None:
    for by_hand in events([1]):
        facts = {name: getattr(by_hand, name) for name in type(by_hand).__slots__}
        event = event_of(type(by_hand), {**WHO, "at": by_hand.at}, facts)
        assert type(event) is type(by_hand)
        assert event == by_hand
        assert repr(event) == repr(by_hand)
        for name in ("depth", "kind"):
            with pytest.raises(AttributeError):
                setattr(event, name, 1)
        with pytest.raises(AttributeError):
            del event.depth


def test_an_event_without_a_fact_or_with_one_too_many_is_refused() -> None:
    for facts in ({}, {"message": "m", "other": 1}):
        with pytest.raises(TypeError):
            event_of(WarningRaised, WHO, facts)


def test_a_result_by_hand_takes_texts_that_no_wire_can_carry() -> None:
    result = AgentResult(agent_name=HALF, error=HALF, warnings=[HALF], messages=[{"role": "user", HALF: HALF}])
    assert (result.agent_name, result.error, result.warnings) == ("half \ufffd",) * 2 + (["half \ufffd"],)
    assert AgentResult.model_validate_json(result.model_dump_json()).messages == [
        {"role": "user", "half \ufffd": "half \ufffd"}
    ]


def test_text_of_a_result_is_that_of_its_content() -> None:
    assert str(AgentResult(agent_name="A", content=["Ada"])) == "A: ['Ada']"
    assert str(AgentResult(agent_name="A", content=Textless())) == "A: Textless"
    assert str(AgentResult(agent_name="A", content="\ud83d\ude00\ud83d")) == "A: 😀\ufffd"
    assert "content={'x': 'Textless', 'y': 1}" in repr(AgentResult(agent_name="A", content={"x": Textless(), "y": 1}))
