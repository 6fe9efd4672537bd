"""Exports of traces, opened in programs that nobody of the project wrote: Phoenix and speedscope."""

from __future__ import annotations

import base64
import functools
import http.server
import json
import os
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import anyio
import httpx2
import pytest

from fractal import BaseAgent
from fractal.cli.main import main
from fractal.testing import ScriptedModel, answers
from tests.browser import CHROMIUM, chromium
from tests.endpoints.servers import ENVIRONMENTS
from tests.served import free_port, served


def installed(name: str) -> Path:
    """The folder of a viewer; without one the test is skipped."""
    folder = ENVIRONMENTS / name
    if not (folder / ".ready").exists():
        pytest.skip(f"{name} is not installed: scripts/test-endpoints {name}")
    return folder


async def look(place: str) -> str:
    """Look at a place."""
    if place == "nowhere":
        raise LookupError("there is no such place")
    return f"rain in {place}"


@pytest.fixture
def trace(tmp_path: Path) -> Path:
    """The trace of an agent that asks two others at once, one of which fails at a call."""
    calls = [[answers.call("look", {"place": place}), "It depends."] for place in ("Rome", "nowhere")]
    scouts = [
        BaseAgent(f"Scout {n}", "You look.", client=ScriptedModel(script)).add_tool(look)
        for n, script in enumerate(calls)
    ]
    asked = [answers.call(f"delegate_to_scout_{n}", {"query": "Rain?"}) for n in range(2)]
    script = [answers.calls(*asked), "Take an umbrella."]
    chief = BaseAgent("Chief", "You decide.", client=ScriptedModel(script), tracing_output_file=tmp_path / "t.jsonl")
    for scout in scouts:
        chief.register_delegate(scout)
    anyio.run(chief.run, "Where does it rain?")
    return tmp_path / "t.jsonl"


def exported(trace: Path, form: str) -> Path:
    file = trace.with_suffix(f".{form}")
    assert main(["trace", "export", "--format", form, str(trace), "-o", str(file)]) == 0
    return file


# ---- Phoenix, a backend of OpenTelemetry, which takes the protobuf alone


def protobuf_of(line: str) -> bytes:
    """A line of OTLP JSON, whose ids are hexadecimal, as protobuf."""
    pytest.importorskip("opentelemetry.proto")
    from google.protobuf.json_format import ParseDict
    from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest

    def with_ids(found: dict[str, Any]) -> dict[str, Any]:
        names = {"traceId", "spanId", "parentSpanId"} & found.keys()
        return found | {name: base64.b64encode(bytes.fromhex(found[name])).decode() for name in names}

    return ParseDict(json.loads(line, object_hook=with_ids), ExportTraceServiceRequest()).SerializeToString()


_FACTS = "name parentId spanId statusCode spanKind"
SPANS = f"{{ projects {{ edges {{ node {{ spans(first: 99) {{ edges {{ node {{ {_FACTS} }} }} }} }} }} }} }}"


@pytest.mark.timeout(180)
def test_phoenix_has_the_tree_of_an_otlp_export(trace: Path, tmp_path: Path) -> None:
    program = installed("phoenix") / "bin/phoenix"
    environment = {
        **os.environ,
        "PHOENIX_HOST": "127.0.0.1",
        "PHOENIX_GRPC_PORT": str(free_port()),
        "PHOENIX_WORKING_DIR": str(tmp_path / "phoenix"),
        "PHOENIX_TELEMETRY_ENABLED": "false",
    }
    command = ["env", "PHOENIX_PORT={}", str(program), "serve"]
    with served(
        lambda port: [word.format(port) for word in command], "/healthz", environment=environment, start_seconds=120
    ) as port:
        url = f"http://127.0.0.1:{port}"
        for line in exported(trace, "otlp").read_text().splitlines():
            headers = {"Content-Type": "application/x-protobuf"}
            assert httpx2.post(f"{url}/v1/traces", content=protobuf_of(line), headers=headers).status_code == 200
        spans = spans_of(url)
    names = {span["spanId"]: span["name"] for span in spans}
    assert sorted((names.get(span["parentId"], ""), span["name"], span["spanKind"]) for span in spans) == sorted(TREE)
    failed = [span["name"] for span in spans if span["statusCode"] == "ERROR"]
    assert failed == ["execute_tool look"]


TREE = [
    ("", "invoke_agent Chief", "agent"),
    *[("invoke_agent Chief", "chat gpt-4o-mini", "llm")] * 2,
    *(
        part
        for n in range(2)
        for part in (
            ("invoke_agent Chief", f"execute_tool delegate_to_scout_{n}", "tool"),
            (f"execute_tool delegate_to_scout_{n}", f"invoke_agent Scout {n}", "agent"),
            *[(f"invoke_agent Scout {n}", "chat gpt-4o-mini", "llm")] * 2,
            (f"invoke_agent Scout {n}", "execute_tool look", "tool"),
        )
    ),
]


def spans_of(url: str) -> list[dict[str, Any]]:
    """The spans that Phoenix has, once they are all there."""
    for _ in range(100):
        found = httpx2.post(f"{url}/graphql", json={"query": SPANS}).json()["data"]["projects"]["edges"]
        spans = [edge["node"] for project in found for edge in project["node"]["spans"]["edges"]]
        if len(spans) >= len(TREE):
            return spans
        threading.Event().wait(0.2)
    raise AssertionError("Phoenix has not got all spans")


# ---- speedscope, which opens Chrome's trace events


@contextmanager
def files_served(folder: Path) -> Iterator[str]:
    handler = functools.partial(http.server.SimpleHTTPRequestHandler, directory=str(folder))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()
        thread.join()


@pytest.mark.timeout(180)
@pytest.mark.skipif(CHROMIUM is None, reason="Chromium is not here: apt-get install chromium")
def test_speedscope_has_the_lanes_of_a_perfetto_export(trace: Path, tmp_path: Path) -> None:
    program = installed("speedscope") / "node_modules/speedscope/dist/release"
    export = exported(trace, "perfetto")
    for file in program.iterdir():
        (tmp_path / file.name).symlink_to(file)
    events = json.loads(export.read_text())
    events = events["traceEvents"] if isinstance(events, dict) else events
    lanes = {(event["pid"], event["tid"]) for event in events if event["ph"] == "X"}
    with chromium() as browser, files_served(tmp_path) as url:
        page = browser.new_page()
        said = list[str]()
        page.on("console", lambda message: said.append(message.text))
        page.goto(f"{url}/index.html#profileURL={url}/{export.name}")
        page.wait_for_function("document.title.includes('t.perfetto')", timeout=60_000)
        shown = page.locator("body").inner_text()
    assert "Importing as Trace Event Format profile" in said
    assert not [text for text in said if "rror" in text]
    count = re.search(r"\(1/(\d+)\)", shown)
    assert count is not None, shown
    assert int(count[1]) == len(lanes)
