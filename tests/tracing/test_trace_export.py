"""`fractal trace export`: what other viewers are given, whatever is in the file."""

from __future__ import annotations

import base64
import json
import math
import os
import random
import subprocess
import sys
import tracemalloc
from collections import Counter
from collections.abc import Iterable
from itertools import pairwise
from pathlib import Path
from typing import Any

import anyio
import pytest
from google.protobuf.json_format import ParseDict
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest
from opentelemetry.proto.trace.v1.trace_pb2 import Span, Status

from fractal import BaseAgent
from fractal.cli.main import main
from fractal.testing import ScriptedModel, answers
from fractal.tracing import TraceReader
from fractal.tracing.otlp import otlp_lines
from fractal.tracing.perfetto import perfetto_lines
from fractal.tracing.spans import Spans
from tests.cli.test_trace_command import ODD, STEERING, line, written
from tests.spans import tree_of_events

FORMATS = ["otlp", "perfetto"]


async def look(place: str) -> str:
    """Look."""
    if place == "nowhere":
        raise LookupError("there is no such place")
    await anyio.sleep(0.002)
    return f"rain in {place}"


@pytest.fixture(scope="module")
def traced(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[Any]]:
    """The trace of a run with delegates in parallel, and its events."""
    path, events = tmp_path_factory.mktemp("traces") / "trace.jsonl", []

    def agent(name: str, *calls: Any, **options: Any) -> BaseAgent:
        script: Any = lambda r: answers.calls(*calls) if r.body["messages"][-1]["role"] == "user" else "done"  # noqa: E731
        return BaseAgent(name, name, f"model {name}", ScriptedModel(script), **options).add_tool(look)

    low = agent("Low", *(answers.call("look", {"place": place}) for place in ("x", "nowhere")))
    asks = [answers.call("ask", {"query": f"{n}"}) for n in range(2)]
    mid = agent("Mid", *asks).register_delegate(low, "ask")
    boss = agent(
        "Boss", *asks, answers.call("look", {"place": "y"}), tracing_output_file=path, observers=[events.append]
    )
    boss.register_delegate(mid, "ask")
    for _ in range(2):
        assert anyio.run(boss.run, "go on").success
    return path, events


# ---- OTLP


def requests_of(lines: Iterable[str]) -> list[ExportTraceServiceRequest]:
    """What a collector would read; JSON of protobuf has ids in base64, and that of OTLP in hex."""
    requests: list[ExportTraceServiceRequest] = []
    for text in lines:
        request = json.loads(text)
        for span in spans_in(request):
            for name in ("traceId", "spanId", "parentSpanId"):
                if name in span:
                    span[name] = base64.b64encode(bytes.fromhex(span[name])).decode()
        requests.append(ParseDict(request, ExportTraceServiceRequest()))
    return requests


def spans_in(request: dict[str, Any]) -> list[dict[str, Any]]:
    return [span for each in request["resourceSpans"] for scope in each["scopeSpans"] for span in scope["spans"]]


def spans_of(lines: Iterable[str]) -> list[Span]:
    parsed = requests_of(lines)
    return [
        span
        for request in parsed
        for each in request.resource_spans
        for scope in each.scope_spans
        for span in scope.spans
    ]


def attributes_of(span: Span) -> dict[str, Any]:
    return {each.key: getattr(each.value, each.value.WhichOneof("value") or "string_value") for each in span.attributes}


def tree_of(spans: list[Span]) -> frozenset[Any]:
    below: dict[bytes, list[Span]] = {}
    for span in spans:
        below.setdefault(span.parent_span_id, []).append(span)

    def within(above: bytes) -> frozenset[Any]:
        return frozenset(Counter((span.name, within(span.span_id)) for span in below.get(above, [])).items())

    return within(b"")


def test_the_spans_of_otlp_are_the_tree_of_the_runs(
    traced: tuple[Path, list[Any]], capsys: pytest.CaptureFixture[str]
) -> None:
    path, events = traced
    assert main(["trace", "export", "--format", "otlp", str(path)]) == 0
    spans = spans_of(capsys.readouterr().out.splitlines())
    assert tree_of(spans) == tree_of_events(events)
    assert len({span.span_id for span in spans}) == len(spans) > 40
    roots = {event.run_id for event in events if event.depth == 0}
    assert {span.trace_id.hex() for span in spans} == roots
    assert {(len(span.trace_id), len(span.span_id)) for span in spans} == {(16, 8)}
    assert all(span.start_time_unix_nano <= span.end_time_unix_nano for span in spans)
    assert {span.kind for span in spans if span.name.startswith("chat ")} == {Span.SPAN_KIND_CLIENT}


def test_they_say_what_happened(traced: tuple[Path, list[Any]]) -> None:
    spans = spans_of(otlp_lines(TraceReader(traced[0])))
    facts = [attributes_of(span) | {"name": span.name} for span in spans]
    assert not [each for each in facts if "fractal.unfinished" in each or "fractal.no_beginning" in each]
    [failed, *_] = [each for each in facts if "error.type" in each]
    assert (failed["gen_ai.tool.name"], failed["fractal.outcome"], failed["error.type"]) == ("look", "error", "_OTHER")
    assert json.loads(failed["gen_ai.tool.call.arguments"]) == {"place": "nowhere"}
    [status, *_] = [span.status for span in spans if span.status.code == Status.STATUS_CODE_ERROR]
    assert status.message == "LookupError: there is no such place"
    first, second = [each for each in facts if each["name"] == "chat model Low"][:2]
    if json.loads(first["gen_ai.input.messages"])[0]["role"] != "user":
        first, second = second, first
    assert first["gen_ai.operation.name"] == "chat"
    assert first["gen_ai.request.model"] == first["gen_ai.response.model"] == "model Low"
    assert (first["gen_ai.usage.input_tokens"], first["gen_ai.usage.output_tokens"]) == (10, 5)
    assert json.loads(first["gen_ai.system_instructions"]) == [{"type": "text", "content": "Low"}]
    replies = [
        [message["role"] for message in json.loads(each["gen_ai.input.messages"])]
        for each in facts
        if each["name"] == "chat model Low"
    ]
    assert sorted(replies) == [["tool", "tool"]] * 8 + [["user"]] * 8
    [run, *_] = [each for each in facts if each["name"] == "invoke_agent Low"]
    assert (run["fractal.stop_reason"], run["gen_ai.usage.input_tokens"]) == ("finished", 20)
    assert json.loads(run["gen_ai.output.messages"])[0]["parts"] == [{"type": "text", "content": "done"}]


@pytest.mark.parametrize("lines", [otlp_lines, perfetto_lines])
def test_ids_are_the_same_whenever_a_file_is_read_also_while_it_grows(
    lines: Any, traced: tuple[Path, list[Any]], tmp_path: Path
) -> None:
    whole = [*lines(TraceReader(traced[0]))]
    assert whole == [*lines(TraceReader(traced[0]))]
    text = traced[0].read_text().splitlines(keepends=True)
    (tmp_path / "half").write_text("".join(text[: len(text) // 2]))
    ids = {(span.span_id, span.name, span.parent_span_id) for span in spans_of(otlp_lines(TraceReader(traced[0])))}
    half = {
        (span.span_id, span.name, span.parent_span_id) for span in spans_of(otlp_lines(TraceReader(tmp_path / "half")))
    }
    assert half < ids


def test_a_run_whose_id_has_another_form_gets_a_trace_id_of_its_own(tmp_path: Path) -> None:
    runs = ["r", "0" * 32, "ab" * 16]
    lines = [line(kind, run_id=run, metadata={"run": run}) for run in runs for kind in ("agent_start", "agent_end")]
    spans = spans_of(otlp_lines(TraceReader(written(tmp_path / "t", *lines))))
    ids = [span.trace_id.hex() for span in spans]
    assert len({*ids}) == 3
    assert "0" * 32 not in ids
    assert ids[2] == "ab" * 16


# ---- Perfetto


def events_of(lines: Iterable[str]) -> list[dict[str, Any]]:
    events: list[dict[str, Any]] = json.loads("\n".join(lines))["traceEvents"]
    return events


def assert_no_lane_overlaps(events: list[dict[str, Any]]) -> None:
    lanes: dict[tuple[int, int], list[tuple[int, int]]] = {}
    for event in events:
        if event["ph"] == "X":
            assert event["dur"] >= 0
            lanes.setdefault((event["pid"], event["tid"]), []).append((event["ts"], event["ts"] + event["dur"]))
    for spans in lanes.values():
        spans.sort()
        assert all(before[1] <= after[0] for before, after in pairwise(spans))


def test_perfetto_has_a_lane_for_what_overlaps_and_arrows_to_delegates(
    traced: tuple[Path, list[Any]], capsys: pytest.CaptureFixture[str]
) -> None:
    path, told = traced
    assert main(["trace", "export", "--format", "perfetto", str(path)]) == 0
    events = events_of(capsys.readouterr().out.splitlines())
    assert_no_lane_overlaps(events)
    spans = [event for event in events if event["ph"] == "X"]
    wanted = Counter(event.kind for event in told)
    assert len(spans) == wanted["run_started"] + wanted["model_requested"] + wanted["tool_started"]
    assert {event["cname"] for event in spans if event["args"]["outcome"] == "ok"} == {"good"}
    assert {event["cname"] for event in spans if event["args"]["outcome"] == "error"} == {"terrible"}
    arrows = {phase: {event["id"]: event for event in events if event["ph"] == phase} for phase in "sf"}
    assert len(arrows["s"]) == len(arrows["f"]) == wanted["delegation_started"] == 12
    for number, start in arrows["s"].items():
        end = arrows["f"][number]
        [call] = [span for span in spans if is_in(start, span)]
        [run] = [span for span in spans if is_in(end, span) and span["cat"] == "invoke_agent"]
        assert (call["name"], run["ts"], end["bp"]) == ("ask", end["ts"], "e")
        assert run["name"] in ("Mid", "Low")
    names = {event["args"]["name"].partition(": ")[2] for event in events if event["name"] == "process_name"}
    assert names == {"Boss"}
    named = {(event["pid"], event["tid"]) for event in events if event["name"] == "thread_name"}
    assert {(event["pid"], event["tid"]) for event in spans} == named


def is_in(arrow: dict[str, Any], span: dict[str, Any]) -> bool:
    is_there = (arrow["pid"], arrow["tid"]) == (span["pid"], span["tid"])
    return is_there and span["ts"] <= arrow["ts"] <= span["ts"] + span["dur"]


# ---- whatever is in the file


def test_of_a_file_that_ends_anywhere_what_goes_on_is_unfinished(
    traced: tuple[Path, list[Any]], tmp_path: Path
) -> None:
    lines = traced[0].read_text().splitlines(keepends=True)
    begins, ends = ("agent_start", "model_request", "tool_call"), ("agent_end", "model_response", "tool_result")
    for count in range(1, len(lines) // 2):
        (tmp_path / "t").write_text("".join(lines[:count]) + lines[count][:20])
        kinds = Counter(json.loads(text)["event_type"] for text in lines[:count])
        spans = spans_of(otlp_lines(TraceReader(tmp_path / "t")))
        assert len(spans) == sum(kinds[kind] for kind in begins)
        unfinished = [span for span in spans if "fractal.unfinished" in attributes_of(span)]
        assert len(unfinished) == len(spans) - sum(kinds[kind] for kind in ends)
        last = max(json.loads(text)["timestamp"] for text in lines[:count])
        assert all(span.end_time_unix_nano <= last * 1e9 + 1000 for span in spans)
        drawn = events_of(perfetto_lines(TraceReader(tmp_path / "t")))
        assert_no_lane_overlaps(drawn)
        assert Counter(event.get("cname") for event in drawn)["yellow"] == len(unfinished)


def test_a_file_without_its_beginning_has_what_ended_later(traced: tuple[Path, list[Any]], tmp_path: Path) -> None:
    lines = traced[0].read_text().splitlines(keepends=True)
    for count in range(1, len(lines) - 1):
        (tmp_path / "t").write_text("".join(lines[count:]))
        kinds = Counter(json.loads(text)["event_type"] for text in lines[count:])
        spans = spans_of(otlp_lines(TraceReader(tmp_path / "t")))
        for kind, name in (("agent_end", "invoke_agent"), ("model_response", "chat"), ("tool_result", "execute_tool")):
            assert len([span for span in spans if span.name.startswith(name)]) == kinds[kind]
        assert len({span.span_id for span in spans}) == len(spans)
        assert_no_lane_overlaps(events_of(perfetto_lines(TraceReader(tmp_path / "t"))))


def test_no_lane_overlaps_in_whatever_order_the_lines_are(traced: tuple[Path, list[Any]], tmp_path: Path) -> None:
    lines = traced[0].read_text().splitlines(keepends=True)
    shuffle = random.Random(5)
    for _ in range(50):
        some = shuffle.sample(lines, len(lines) // 2)
        (tmp_path / "t").write_text("".join(some))
        assert_no_lane_overlaps(events_of(perfetto_lines(TraceReader(tmp_path / "t"))))
        assert spans_of(otlp_lines(TraceReader(tmp_path / "t")))


@pytest.mark.parametrize("form", FORMATS)
@pytest.mark.parametrize(
    ("content", "why"),
    [(b"", "the file is empty"), (b"hello\n", "no line of it is an event"), (b'{"resourceSpans":[]}\n', "no line")],
    ids=["empty", "text", "foreign"],
)
def test_what_is_no_trace_is_wrong_use_and_writes_nothing(
    form: str, content: bytes, why: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "t").write_bytes(content)
    (tmp_path / "out").write_text("precious")
    for more in ([], ["-o", str(tmp_path / "out")]):
        assert main(["trace", "export", "--format", form, str(tmp_path / "t"), *more]) == 2
        told = capsys.readouterr()
        assert (told.out, why in told.err) == ("", True)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == {"t": content, "out": b"precious"}


@pytest.mark.parametrize("form", FORMATS)
def test_broken_lines_are_told_of(
    form: str, traced: tuple[Path, list[Any]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "t").write_bytes(b"\xff\n{}\n" + traced[0].read_bytes() + b'{"timesta')
    assert main(["trace", "export", "--format", form, str(tmp_path / "t")]) == 0
    told = capsys.readouterr()
    for complaint in ("1 line is not JSON", "1 line is no event", "the last line is cut"):
        assert complaint in told.err
    assert told.out


@pytest.mark.parametrize("odd", [*ODD, math.nan, math.inf], ids=lambda odd: repr(odd)[:12])
def test_values_of_any_type_stop_nothing(odd: Any, tmp_path: Path) -> None:
    lines: list[object] = [line("agent_start")]
    fields = ("timestamp", "agent_name", "run_id", "tool_name", "tool_call_id", "parallel_group_id")
    names = ("run", "parent_run", "call", "model", "usage", "cost", "outcome", "success", "stop_reason", "input_tokens")
    names += ("added", "history", "opening", "iteration", "first_piece", "finish_reason", "response_id", "error_type")
    for kind in ("agent_start", "model_request", "model_response", "tool_call", "tool_result", "agent_end", odd):
        more = ("arguments", "result", "error", "elapsed_time", "metadata")
        lines += [line(kind, **{name: odd}) for name in (*fields, *more)]
        lines += [line(kind, metadata={"run": "r", name: odd}) for name in names]
        lines.append(line(kind, result={"content": odd, "tool_calls": odd, "role": odd}))
    path = written(tmp_path / "t", *lines, odd)
    lines_of_otlp = [*otlp_lines(TraceReader(path))]
    assert spans_of(lines_of_otlp)
    assert not [each for each in lines_of_otlp if '"doubleValue":null' in each]
    assert_no_lane_overlaps(events_of(perfetto_lines(TraceReader(path))))


@pytest.mark.parametrize("at", [0, -1e11, 9e11, 1.5])
@pytest.mark.parametrize("form", FORMATS)
def test_any_moment_can_be_written(form: str, at: float, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    lines = [line("agent_start", timestamp=at), line("agent_end", timestamp=at)]
    assert main(["trace", "export", "--format", form, written(tmp_path / "t", *lines)]) == 0
    written_lines = capsys.readouterr().out.splitlines()
    assert spans_of(written_lines) if form == "otlp" else events_of(written_lines)


@pytest.mark.parametrize("form", FORMATS)
def test_nothing_in_a_file_steers_the_terminal(form: str, tmp_path: Path, monkeypatch: Any, capsys: Any) -> None:
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    names = {"agent_name": STEERING, "run_id": STEERING, "tool_name": STEERING, "tool_call_id": STEERING}
    metadata = {"run": STEERING, "outcome": STEERING, "stop_reason": STEERING, "model": STEERING, "call": STEERING}
    lines = [
        line(kind, **names, metadata=metadata, error=STEERING, result=STEERING, arguments={"user_input": STEERING})
        for kind in ("agent_start", "model_request", "model_response", "tool_call", "tool_result", "agent_end")
    ]
    assert main(["trace", "export", "--format", form, written(tmp_path / "t", *lines)]) == 0
    told = capsys.readouterr().out
    assert not {"\x1b", "\x07", "\u202e", "\r", "\x00"} & set(told)
    assert "[bold]" in told


@pytest.mark.parametrize("lines", [otlp_lines, perfetto_lines])
@pytest.mark.parametrize(
    "kinds", [("agent_start", "tool_call", "tool_result", "agent_end"), ("agent_start", "tool_call")]
)
def test_the_memory_it_takes_does_not_grow_with_the_file(
    lines: Any, kinds: tuple[str, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("fractal.tracing.exported.MOST_HELD", 200_000)

    def peak(runs: int) -> int:
        path = tmp_path / f"{runs}"
        with open(path, "w") as file:
            for n in range(runs):
                for kind in kinds:
                    who = {"run_id": f"r{n}", "metadata": {"run": f"r{n}"}, "tool_name": "t", "tool_call_id": "c"}
                    file.write(json.dumps(line(kind, **who, result="x" * 500)) + "\n")
        tracemalloc.start()
        count = sum(1 for _ in lines(TraceReader(path)))
        _, most = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        assert count >= runs // 100
        return most

    peak(100)  # what is loaded once
    assert peak(4000) < peak(400) + 500_000


def test_a_run_of_any_number_of_calls_takes_bounded_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fractal.tracing.exported.MOST_HELD", 2_000_000)
    call = [line(kind, tool_name="t", tool_call_id="c", result="x" * 1000) for kind in ("tool_call", "tool_result")]
    path = written(tmp_path / "t", line("agent_start"), *call * 12_000, line("agent_end"))
    tracemalloc.start()
    lines = sum("unfinished" not in each for each in otlp_lines(TraceReader(path)))
    _, most = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert lines == 121
    assert most < 8_000_000


def test_a_line_of_otlp_has_a_bounded_length(tmp_path: Path) -> None:
    call = [line(kind, tool_name="t", tool_call_id="c", result="x" * 100_000) for kind in ("tool_call", "tool_result")]
    path = written(tmp_path / "t", line("agent_start"), *call * 50, line("agent_end"))
    lengths = [len(each) for each in otlp_lines(TraceReader(path))]
    assert max(lengths) < 2_000_000 < sum(lengths)


def test_what_is_told_of_a_run_after_its_end_is_passed_over(tmp_path: Path) -> None:
    ends = [line("tool_result", tool_name="t", tool_call_id="c"), line("agent_end")]
    path = written(tmp_path / "t", line("agent_start"), line("tool_call", tool_name="t", tool_call_id="c"), *ends * 2)
    assert [span.name for span in spans_of(otlp_lines(TraceReader(path)))] == ["execute_tool t", "invoke_agent A"]


def test_of_the_runs_that_have_ended_the_newest_are_known(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fractal.tracing.spans._MOST_ENDED", 100)
    runs = [line(kind, metadata={"run": f"{n}"}) for n in range(300) for kind in ("agent_start", "agent_end")]
    spans = Spans()
    assert sum(len([*spans.take(event)]) for event in TraceReader(written(tmp_path / "t", *runs))) == 600
    assert [*spans._ended] == [f"{n}" for n in range(200, 300)]
    assert (spans._runs, spans.open) == ({}, 0)


def test_an_end_without_a_beginning_has_the_length_that_it_tells(tmp_path: Path) -> None:
    for kind in ("agent_end", "model_response", "tool_result"):
        spans = spans_of(otlp_lines(TraceReader(written(tmp_path / "t", line(kind, elapsed_time=5.0)))))
        assert {span.end_time_unix_nano - span.start_time_unix_nano for span in spans} == {5_000_000_000}


def test_a_trace_of_events_that_take_no_time_has_no_spans(tmp_path: Path) -> None:
    path = written(tmp_path / "t", line("error", error="no"), line("warning"))
    assert [*otlp_lines(TraceReader(path))] == []
    assert events_of(perfetto_lines(TraceReader(path))) == []


# ---- where it goes


@pytest.mark.parametrize("form", FORMATS)
def test_it_is_written_to_a_file(
    form: str, traced: tuple[Path, list[Any]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    out.write_text("old")
    assert main(["trace", "export", str(traced[0]), "--format", form, "-o", str(out)]) == 0
    assert capsys.readouterr() == ("", "")
    assert main(["trace", "export", str(traced[0]), "--format", form]) == 0
    assert out.read_text() == capsys.readouterr().out


def test_the_trace_itself_a_link_and_a_missing_folder_are_refused(
    traced: tuple[Path, list[Any]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = traced[0].read_bytes()
    (tmp_path / "link").symlink_to(tmp_path / "elsewhere")
    for to, why in (
        (traced[0], "the trace itself"),
        (tmp_path / "link", "it is a link"),
        (tmp_path / "none" / "out", "No such file"),
        (tmp_path, "Is a directory"),
    ):
        assert main(["trace", "export", str(traced[0]), "--format", "otlp", "-o", str(to)]) == 2
        assert f"fractal trace export: -o {to}: " in (told := capsys.readouterr().err)
        assert why in told
    assert traced[0].read_bytes() == before
    assert [path.name for path in tmp_path.iterdir()] == ["link"]


def test_a_file_that_is_called_export_can_be_shown(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = written(tmp_path / "export", line("agent_start"), line("agent_end"))
    assert main(["trace", f"{path}", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["runs"] == 1
    with pytest.raises(SystemExit) as caught:
        main(["trace", "export"])
    assert caught.value.code == 2


def test_a_reader_that_goes_away_is_no_error(traced: tuple[Path, list[Any]]) -> None:
    command = f"{sys.executable} -m fractal trace export --format otlp {traced[0]} | head -c 1"
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}
    done = subprocess.run(command, shell=True, capture_output=True, text=True, env=environment, timeout=60)
    assert (done.stdout, done.stderr) == ("{", "")
