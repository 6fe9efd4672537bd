"""The spans of a trace, of which exports, the page and the pictures of a terminal are made."""

from __future__ import annotations

from typing import Any

from fractal import TraceEvent
from fractal.tracing.spans import MOST_OPEN, Span, Spans
from tests.pages import AT, told


def steps_of(*events: TraceEvent, most_open: int = MOST_OPEN) -> list[tuple[str, Span]]:
    spans = Spans(most_open)
    steps = [step for event in events for step in spans.take(event)]
    steps += spans.finish()
    assert spans.open == 0
    assert [span for what, span, _ in steps if what == "begin"] == [*dict.fromkeys(span for _, span, _ in steps)]
    return [(what, span) for what, span, _ in steps]


def ended(*events: TraceEvent, **options: Any) -> list[tuple[str, str, str, float, float]]:
    return [
        (span.kind, span.name, span.outcome, span.begin - AT, (span.end or 0) - AT)
        for what, span in steps_of(*events, **options)
        if what == "end"
    ]


def test_a_request_has_its_tries_and_the_waits_between_them():
    assert ended(
        told("agent_start"),
        told("model_request", 1, metadata={"model": "m"}),
        told("retry", 2, metadata={"message": "429"}),
        told("model_request", 5, metadata={"model": "m", "attempt": 2}),
        told("model_response", 6, metadata={"model": "m-2"}),
        told("agent_end", 7, metadata={"success": True}),
    ) == [
        ("try", "m", "error", 1, 2),
        ("wait", "before the next try", "ok", 2, 5),
        ("try", "m", "ok", 5, 6),
        ("chat", "m", "ok", 1, 6),
        ("run", "A", "ok", 0, 7),
    ]


def test_a_call_that_is_abandoned_ends_after_its_run():
    call = {"tool_name": "t", "tool_call_id": "c"}
    events = [
        told("agent_start"),
        told("tool_call", 1, **call),
        told("agent_end", 2, metadata={"success": False, "stop_reason": "deadline", "abandoned": ["c"]}),
    ]
    late = told("tool_result", 3, **call, metadata={"outcome": "abandoned"})
    assert ended(*events, late, late) == [("run", "A", "timeout", 0, 2), ("tool", "t", "abandoned", 1, 3)]
    assert ended(*events) == [("run", "A", "timeout", 0, 2), ("tool", "t", "unfinished", 1, 2)]


def test_a_call_id_that_comes_twice_ends_the_first_call():
    call = {"tool_name": "t", "tool_call_id": "c"}
    told_twice = [told("tool_call", 1, **call), told("tool_call", 2, **call), told("tool_result", 3, **call)]
    assert ended(told("agent_start"), *told_twice)[:2] == [
        ("tool", "t", "unfinished", 1, 2),
        ("tool", "t", "ok", 2, 3),
    ]


def test_a_run_that_begins_again_ends_what_it_was():
    again = ended(told("agent_start"), told("tool_call", 1, tool_name="t"), told("agent_start", 2))
    assert again == [
        ("tool", "t", "unfinished", 1, 1),
        ("run", "A", "unfinished", 0, 1),
        ("run", "A", "unfinished", 2, 2),
    ]


def test_of_too_many_open_spans_the_oldest_run_ends():
    starts = [told("agent_start", n, metadata={"run": f"r{n}"}) for n in range(5)]
    assert [begin for _, _, _, begin, _ in ended(*starts, most_open=2)] == [0, 1, 2, 4, 3]


def test_a_wait_for_approval_ends_with_the_answer():
    call = {"tool_name": "pay", "tool_call_id": "c"}
    asked = told("approval_request", 1, **call)
    given, denied = (told("approval_answer", 4, **call, metadata={"is_allowed": each}) for each in (True, False))
    assert ended(told("agent_start"), asked, given)[0] == ("wait", "approval of pay", "ok", 1, 4)
    assert ended(told("agent_start"), asked, denied)[0] == ("wait", "approval of pay", "denied", 1, 4)
