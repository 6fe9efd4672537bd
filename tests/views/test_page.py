"""The page of a trace: its spans, its lanes, what was waited for, and that whatever a trace says is data in it."""

from __future__ import annotations

import base64
import hashlib
import itertools
import json
import math
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import anyio
import pytest
from hypothesis import given, settings, strategies as st

from fractal import BaseAgent, TraceEvent, TracingKit
from fractal._views import page_runs
from fractal._views.page import PageRuns, page_of
from fractal._views.page_lanes import lanes_of, waited_for
from fractal._views.page_spans import LONGEST_TEXT, PageSpan, RunSpans
from fractal.testing import ScriptedModel
from fractal.tracing import TraceReader, TraceUnreadable, counts
from fractal.tracing.counts import Counts
from fractal.tracing.record import TYPES
from fractal.tracing.trace import Trace
from tests.pages import AT, HOSTILE, Scripts, real, told


def spans_of(*events: TraceEvent) -> RunSpans:
    run = RunSpans()
    for event in events:
        run.take(event)
    run.settle()
    return run


def page(*events: TraceEvent, complaints: Iterable[str] = ()) -> str:
    runs = PageRuns()
    for event in events:
        runs.take(event)
    return "".join(page_of(runs, "t", [*complaints]))


# ---- spans


def test_the_spans_are_the_tree_of_the_run():
    run = spans_of(*real())
    tree = [(span.kind, span.name, run.spans[span.parent].name if span.parent >= 0 else "") for span in run.spans]
    assert sorted(tree) == sorted(
        [
            ("run", "Chief", ""),
            ("model", "large", "Chief"),
            ("tool", "search", "Chief"),
            ("tool", "ask", "Chief"),
            ("run", "Below", "ask"),
            ("model", "small", "Below"),
            ("tool", "search", "Below"),
            ("model", "small", "Below"),
            ("model", "large", "Chief"),
        ]
    )
    outcomes = {(span.agent, span.name): span.outcome for span in run.spans if span.kind == "tool"}
    assert outcomes == {("Chief", "search"): "ok", ("Chief", "ask"): "ok", ("Below", "search"): "error"}


def test_a_conversation_says_what_the_model_saw():
    run = spans_of(*real())
    chief, last = run.spans[0], max((s for s in run.spans if s.name == "large"), key=lambda s: s.start)
    talk = chief.detail["talk"]
    assert talk[0] == ["user", "go on", []]
    said = [run.spans[each] for each in talk[1:]]
    assert [span.name for span in said] == ["large", "search", "ask", "large"]
    assert [call[0] for call in said[0].detail["reply"][2]] == ["search", "ask"]
    assert last.detail["sees"] == {"upto": 4, "opening": 0, "tools": 0}
    assert chief.detail["openings"] == [[["system", "You lead.", []]]]
    assert chief.detail["tools"] == [["search", "ask"]]


def test_results_stand_in_the_order_in_which_they_were_asked_for():
    calls = [{"id": each, "function": {"name": each, "arguments": "{}"}} for each in "abc"]
    run = spans_of(
        told("agent_start"),
        told("model_request", 1),
        told("model_response", 2, result={"tool_calls": calls}),
        *(told("tool_call", 3, tool_name=each, tool_call_id=each) for each in "abc"),
        *(told("tool_result", 4 + n, tool_name=each, tool_call_id=each) for n, each in enumerate("cab")),
        told("model_request", 8, metadata={"kept": [0, 2]}),
    )
    talk = run.spans[0].detail["talk"]
    assert [run.spans[each].name for each in talk[2:]] == ["a", "b", "c"]
    assert run.spans[-1].detail["sees"] == {"upto": 5, "opening": -1, "tools": -1, "kept": [0, 2]}


def test_what_has_no_end_is_unfinished():
    run = spans_of(told("agent_start"), told("model_request", 1), told("tool_call", 2, tool_name="t"))
    assert [(span.outcome, span.end) for span in run.spans] == [("unfinished", None)] * 3


def test_the_end_of_a_run_ends_what_goes_on_in_it():
    end = told("agent_end", 5, metadata={"success": False, "stop_reason": "deadline"}, error="too late")
    run = spans_of(told("agent_start"), told("tool_call", 2, tool_name="t"), told("model_request", 3), end)
    assert [(span.outcome, span.end) for span in run.spans] == [("timeout", AT + 5)] * 3
    assert run.spans[0].detail["reason"] == "deadline"
    assert run.spans[0].detail["error"] == "too late"


def test_a_call_that_is_abandoned_ends_when_it_ends():
    run = spans_of(
        told("agent_start"),
        told("tool_call", 1, tool_name="t", tool_call_id="c"),
        told("agent_end", 2, metadata={"success": False, "stop_reason": "deadline", "abandoned": ["c"]}),
        told("tool_result", 3, tool_name="t", tool_call_id="c", metadata={"outcome": "abandoned"}),
    )
    assert (run.spans[1].outcome, run.spans[1].end) == ("abandoned", AT + 3)


def test_a_retry_is_a_failed_request_and_a_wait():
    run = spans_of(
        told("agent_start"),
        told("model_request", 1),
        told("retry", 2, metadata={"wait": 3, "message": "429"}),
        told("model_request", 5, metadata={"attempt": 2}),
        told("model_response", 6, result={"content": "hi"}),
    )
    seen = [(span.kind, span.outcome, span.start - AT, (span.end or 0) - AT) for span in run.spans[1:]]
    assert seen == [("model", "error", 1, 2), ("wait", "ok", 2, 5), ("model", "ok", 5, 6)]
    assert run.spans[1].detail["error"] == "429"
    assert [kind for _, kind, _, _ in run.marks] == ["retry"]


def test_an_approval_is_a_wait():
    call = {"tool_name": "pay", "tool_call_id": "c"}
    run = spans_of(
        told("agent_start"),
        told("approval_request", 1, **call),
        told("approval_answer", 9, metadata={"is_allowed": False, "reason": "no"}, **call),
    )
    assert [(s.kind, s.name, s.outcome) for s in run.spans[1:]] == [("wait", "approval of pay", "denied")]


def test_what_began_in_another_file_begins_with_its_first_event():
    run = spans_of(told("tool_result", 5, tool_name="t", elapsed_time=2.0))
    assert [(span.kind, span.start - AT) for span in run.spans] == [("run", 3.0), ("tool", 3.0)]
    assert run.first == AT + 3


# ---- lanes


def test_parallel_calls_have_lanes_of_their_own_and_later_ones_take_them_again():
    run = spans_of(
        told("agent_start"),
        *(told("tool_call", 1, tool_name=each, tool_call_id=each) for each in "abc"),
        *(told("tool_result", 2, tool_name=each, tool_call_id=each) for each in "abc"),
        told("model_request", 2),
        told("model_response", 3),
    )
    assert lanes_of(run.spans, run.last).of_spans == [0, 1, 2, 3, 1]


def test_runs_of_one_agent_share_lanes_only_if_they_do_not_overlap():
    def below(run_id: str, begin: float, end: float) -> list[TraceEvent]:
        who = {"agent_name": "B", "metadata": {"run": run_id, "parent_run": "r"}}
        return [told("agent_start", begin, **who), told("agent_end", end, **who)]

    run = spans_of(told("agent_start"), *below("one", 1, 3), *below("two", 2, 4), *below("three", 3, 5))
    lanes = lanes_of(run.spans, run.last)
    assert lanes.of_spans == [0, 1, 2, 1]
    assert lanes.labels == [("A", 0), ("B", 1), ("B", 1)]


@st.composite
def some_spans(draw: st.DrawFn) -> list[PageSpan]:
    spans = [PageSpan(kind="run", name="A", agent="A", parent=-1, start=0, end=100)]
    for _ in range(draw(st.integers(0, 25))):
        parent = draw(st.integers(0, len(spans) - 1))
        above = spans[parent]
        start = draw(st.integers(int(above.start), int(above.end or 0)))
        end = draw(st.integers(start, int(above.end or 0)))
        kind = draw(st.sampled_from(("run", "tool", "model"))) if above.kind != "model" else "run"
        name = draw(st.sampled_from("AB"))
        spans.append(PageSpan(kind=kind, name=name, agent="A", parent=parent, start=start, end=end))
    return spans


@given(some_spans())
def test_no_two_spans_of_a_lane_overlap(spans: list[PageSpan]):
    lanes = lanes_of(spans, 100)
    by_lane: dict[int, list[PageSpan]] = {}
    for span, lane in zip(spans, lanes.of_spans, strict=True):
        by_lane.setdefault(lane, []).append(span)
    assert by_lane.keys() == set(range(len(lanes.labels)))
    for each in by_lane.values():
        each.sort(key=lambda span: (span.start, span.end))
        assert all((one.end or 0) <= other.start for one, other in itertools.pairwise(each))


@given(some_spans())
def test_what_was_waited_for_adds_up_to_the_whole(spans: list[PageSpan]):
    seconds = waited_for(spans, 100)
    assert math.isclose(sum(seconds), 100)
    assert all(0 <= each <= (span.end or 0) - span.start for each, span in zip(seconds, spans, strict=True))


def test_a_run_waits_for_the_longer_of_two_calls():
    run = spans_of(
        told("agent_start"),
        *(told("tool_call", 1, tool_name=each, tool_call_id=each) for each in "ab"),
        told("tool_result", 2, tool_name="a", tool_call_id="a"),
        told("tool_result", 5, tool_name="b", tool_call_id="b"),
        told("agent_end", 6, metadata={"success": True}),
    )
    assert waited_for(run.spans, run.last) == [2, 0, 4]


# ---- what a trace says is data


def test_whatever_a_trace_says_is_data_in_the_page():
    text = page(
        told("agent_start", agent_name=HOSTILE, arguments={"user_input": HOSTILE}),
        told("model_request", 1, metadata={"model": HOSTILE, "tools": [HOSTILE], "opening": [{"content": HOSTILE}]}),
        told("model_response", 2, result={"content": HOSTILE, "tool_calls": [{"function": {"name": HOSTILE}}]}),
        told("tool_call", 3, tool_name=HOSTILE, tool_call_id=HOSTILE, arguments={HOSTILE: HOSTILE}),
        told("tool_result", 4, tool_name=HOSTILE, tool_call_id=HOSTILE, error=HOSTILE, result=HOSTILE),
        told("warning", 5, metadata={"message": HOSTILE}),
        complaints=[HOSTILE],
    )
    scripts = Scripts(text)
    assert [name for kind, name, _ in scripts.found if not kind] == [""]
    assert "img" not in scripts.tags
    assert all("<" not in data and "\u2028" not in data for kind, _, data in scripts.found if kind)
    assert scripts.data["page"]["notes"] == [HOSTILE]
    details = scripts.data["run-0-0"]
    assert details[0]["talk"][0] == ["user", HOSTILE, []]
    assert details[1]["reply"][1] == HOSTILE
    assert details[2]["error"] == HOSTILE


def test_the_page_runs_its_own_program_and_no_other():
    scripts = Scripts(page(told("agent_start")))
    [program] = [text for kind, _, text in scripts.found if not kind]
    digest = base64.b64encode(hashlib.sha256(program.encode()).digest()).decode()
    rules = dict(rule.strip().split(" ", 1) for rule in scripts.policy.split(";"))
    assert rules["default-src"] == "'none'"
    assert rules["script-src"] == f"'sha256-{digest}'"
    assert rules["style-src"] == "'unsafe-inline'"
    ways_out = ("innerHTML", "outerHTML", "insertAdjacentHTML", "document.write", "eval(", "http:", "https:", "fetch(")
    assert [each for each in ways_out if each in program] == []


def test_marks_of_the_template_in_a_trace_are_no_marks():
    scripts = Scripts(page(told("agent_start", arguments={"user_input": "@data@ @hash@ @program@"})))
    assert scripts.data["page"]["rows"][0]["input"] == "@data@ @hash@ @program@"


def test_numbers_keep_all_of_their_digits_and_halves_of_characters_end_nothing():
    text = page(told("agent_start"), told("tool_call", 1, tool_name="t", arguments={"n": 2**70, "half": "\ud800"}))
    assert str(2**70) in Scripts(text).data["run-0-0"][1]["arguments"]


_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=8,
)
_facts = ("run", "parent_run", "call", "opening", "tools", "added", "kept", "attempt", "usage", "limits", "timeout")
_more = ("outcome", "abandoned", "cost", "input_tokens", "history", "success", "stop_reason", "model", "message")
_names = ("agent_name", "run_id", "tool_name", "tool_call_id", "parallel_group_id", "arguments", "result", "error")
_lines = st.fixed_dictionaries(
    {"timestamp": st.floats(0, 1e10), "event_type": st.sampled_from(TYPES), "agent_name": st.text(max_size=3)},
    optional={
        **{name: _values for name in (*_names[1:], "elapsed_time", "delegation_depth")},
        "metadata": st.dictionaries(
            st.sampled_from((*_facts, *_more)), _values | st.sampled_from(("r", "s")), max_size=6
        ),
    },
)


@settings(max_examples=150)
@given(st.lists(_lines, min_size=1, max_size=12))
def test_a_page_is_made_of_any_events(tmp_path_factory: pytest.TempPathFactory, lines: list[dict[str, Any]]):
    path = tmp_path_factory.mktemp("odd") / "trace.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    runs = PageRuns()
    try:
        for event in TraceReader(path):
            runs.take(event)
    except TraceUnreadable:
        return
    data = Scripts("".join(page_of(runs, "t"))).data
    for row in data["page"]["rows"]:
        spans = data[f"run-{row['block']}"]["spans"]
        assert all(parent < position for position, parent in enumerate(spans["parent"]))
        assert all(start <= end for start, end in zip(spans["start"], spans["end"], strict=True))


def test_deep_values_and_deep_delegation_are_shown(tmp_path: Path):
    deep: Any = "x"
    for _ in range(150):
        deep = [deep]
    below = [
        told("agent_start", n, agent_name=f"A{n}", metadata={"run": f"r{n}", "parent_run": f"r{n - 1}"})
        for n in range(3000)
    ]
    data = Scripts(page(*below, told("tool_call", 3001, tool_name="t", arguments={"deep": deep}))).data
    assert len(data["run-0"]["lanes"]) == 3002


# ---- bounds


def test_of_many_runs_the_oldest_have_a_row_and_no_details(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(page_runs, "MOST_EVENTS", 10)
    events = [
        told(kind, n, run_id=f"r{n}", metadata={"run": f"r{n}"})
        for n in range(10)
        for kind in ("agent_start", "agent_end")
    ]
    data = Scripts(page(*events)).data
    assert [row["block"] for row in data["page"]["rows"]] == [None] * 5 + [0, 1, 2, 3, 4]
    assert all(row["reason"] == "finished" for row in data["page"]["rows"])
    assert "5 older runs have a row and nothing more" in data["page"]["notes"][0]


def test_of_very_many_runs_the_oldest_are_counted(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(page_runs, "MOST_ROWS", 10)
    data = Scripts(page(*(told("agent_start", n, run_id=f"r{n}") for n in range(25)))).data
    assert len(data["page"]["rows"]) == 10
    assert data["page"]["notes"] == ["15 older runs are not in this page: it shows the newest 10"]


def test_of_a_very_long_run_the_beginning_is_shown_and_the_ends(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(page_runs, "MOST_EVENTS", 5)
    calls = [told("tool_call", n, tool_name="t", tool_call_id=f"{n}") for n in range(10)]
    end = told("agent_end", 20, metadata={"success": True})
    data = Scripts(page(told("agent_start"), *calls, end)).data
    assert len(data["run-0"]["spans"]["start"]) == 6
    assert data["run-0"]["spans"]["end"][0] == 20
    assert data["page"]["notes"][0].startswith("5 steps of run r are left out")


def test_texts_are_cut_where_there_are_too_many(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(page_runs, "MOST_TEXT", 5000)
    calls = [told("tool_call", n, tool_name="t", tool_call_id=f"{n}", arguments={"a": "x" * 1000}) for n in range(20)]
    data = Scripts(page(told("agent_start"), *calls)).data
    details = [each for name, part in data.items() if name.startswith("run-0-") for each in part]
    assert "the rest is left out" in details[-1]["arguments"]
    assert "the rest is left out" not in details[1]["arguments"]
    assert any("texts of run r are cut" in note for note in data["page"]["notes"])


def test_a_text_that_is_too_long_is_cut_and_says_so():
    run = spans_of(told("agent_start", result="x"), told("agent_end", 1, result="x" * (LONGEST_TEXT + 7)))
    assert run.spans[0].detail["result"].endswith("… [cut: 7 more characters]")


def test_what_was_said_is_in_parts_of_their_own():
    calls = [told("tool_call", n, tool_name="t", tool_call_id=f"{n}", arguments={"a": "x" * 50_000}) for n in range(60)]
    data = Scripts(page(told("agent_start"), *calls)).data
    chunks = data["run-0"]["chunks"]
    assert len(chunks) > 2
    assert sum(len(data[f"run-0-{n}"]) for n in range(len(chunks))) == 61
    assert [first + len(data[f"run-0-{n}"]) for n, first in enumerate(chunks)][:-1] == chunks[1:]


def test_the_rows_of_a_page_tell_what_a_run_used():
    [row] = Scripts(page(*real())).data["page"]["rows"]
    assert (row["agent"], row["input"], row["reason"]) == ("Chief", "go on", "finished")
    assert (row["agents"], row["requests"], row["tools"], row["errors"]) == (2, 4, 3, 1)


def test_runs_and_calls_that_failed_are_counted_in_traces_without_events_of_errors_too():
    data = Scripts(
        page(
            told("agent_start"),
            told("tool_result", 1, tool_name="t", error="Boom"),
            told("tool_result", 2, tool_name="t", error="cancelled", metadata={"outcome": "cancelled"}),
            told("agent_end", 3, error="over", metadata={"success": False, "stop_reason": "deadline"}),
        )
    ).data
    assert data["page"]["rows"][0]["errors"] == 2


def counted(*events: TraceEvent) -> Counts:
    made = Counts()
    for event in events:
        made.take(event)
    return made


def over(at: float, run: str = "r", **metadata: Any) -> TraceEvent:
    return told("agent_end", at, error="over", metadata={"run": run, "stop_reason": "deadline", **metadata})


def cut(run: str = "r") -> TraceEvent:
    return told("tool_result", 2, error="no answer", metadata={"run": run, "outcome": "timeout"})


def test_what_the_end_of_a_runs_time_has_cut_is_one_error_with_it():
    below = [cut("s"), cut("s"), over(2, "s", parent_run="r", success=False)]
    assert counted(told("agent_start"), cut(), *below, cut(), over(3, success=False)).errors == 1


def test_what_has_run_out_of_its_own_time_before_is_an_error_by_itself():
    assert counted(cut(), told("model_request", 2), cut(), over(3, success=False)).errors == 2
    assert counted(cut(), told("agent_end", 3, metadata={"success": True, "stop_reason": "finished"})).errors == 1


def test_what_was_denied_cancelled_or_left_out_has_not_failed():
    harmless = ("denied", "cancelled", "skipped")
    assert counted(*(told("tool_result", error="no", metadata={"outcome": each}) for each in harmless)).errors == 0
    assert counted(told("tool_result", 2, error="late", metadata={"outcome": "abandoned"})).errors == 1


def test_a_request_that_was_sent_again_or_cut_is_a_request_and_no_reply():
    found = counted(*[told("model_request")] * 3, told("model_response"))
    assert (found.requests, found.replies) == (3, 1)


def test_of_very_many_runs_with_cut_parts_some_are_known(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(counts, "_MOST_RUNS", 10)
    assert len(counted(*[cut(f"r{n}") for n in range(30)])._cut) == 10


# ---- in a notebook


def test_a_notebook_shows_a_trace_as_a_tree_beside_a_timeline():
    shown = Trace(real())._repr_html_()
    rows = re.findall(r"<tr><td>([^<]*)</td>.*?margin-left:([0-9.]+)%;width:([0-9.]+)%.*?</tr>", shown)
    assert [name for name, _, _ in rows] == [
        *("Chief", "· model", "· search", "· ask", "· · Below", "· · · model", "· · · search", "· · · model"),
        "· model",
    ]
    assert (rows[0][1], rows[0][2]) == ("0.0", "100.0")
    assert all(float(left) + float(width) <= 100.1 for _, left, width in rows)
    assert "LookupError: nothing there" in shown


def test_each_run_of_a_notebook_has_a_scale_of_its_own():
    runs = [
        told(kind, at + 1000 * n, run_id=f"r{n}", metadata={"run": f"r{n}"})
        for n in range(2)
        for at, kind in ((0, "agent_start"), (1, "agent_end"))
    ]
    assert Trace(runs)._repr_html_().count("margin-left:0.0%;width:100.0%") == 2


def test_a_notebook_shows_what_goes_on_and_what_has_no_beginning():
    shown = Trace([told("agent_start"), told("tool_call", 1, tool_name="t")])._repr_html_()
    assert shown.count("unfinished") == 2
    late = Trace([told("tool_result", 5, tool_name="t", elapsed_time=2.0)])._repr_html_()
    assert "<td>· t</td>" in late
    assert "<td>2.000</td><td>ok</td>" in late


def test_a_notebook_shows_a_trace_as_texts():
    kit = TracingKit()
    agent = BaseAgent("<b>A</b>", "a", client=ScriptedModel(["done <script>alert(1)</script>\u202e"]), observers=[kit])
    assert anyio.run(agent.run, HOSTILE).success
    trace = kit.get_trace()
    assert trace == [*trace]
    shown = trace._repr_html_()
    assert "4 events" in shown
    assert "&lt;b&gt;A&lt;/b&gt;" in shown
    assert [each for each in ("<script", "<img", "<b>A", "\u202e") if each in shown] == []
    assert TracingKit().get_trace()._repr_html_().startswith('<div class="fractal"><div><b>0 events</b>')


def test_a_notebook_shows_the_beginning_of_a_long_trace():
    trace = Trace(told("warning", n) for n in range(1000))
    assert "and 950 more" in trace._repr_html_()
