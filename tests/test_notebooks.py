"""What a notebook shows of what users hold in their hands: small, escaped and bounded HTML, and a short `repr()`."""

from __future__ import annotations

import html.parser
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import anyio
import pytest

from fractal import (
    AgentResult,
    BaseAgent,
    BatchItem,
    Progress,
    RunCancelled,
    ToolResult,
    run_many,
    stream_many,
    sync,
    tool,
)
from fractal.cli.stand_in import play
from fractal.testing import Endpoint, EventRecorder, ScriptedModel, answers, record_events

NOTEBOOK = Path(__file__).parents[1] / "examples" / "notebook.ipynb"
EVIL = "<script>alert('x')</script><img src=x onerror=\"y\"> & \u202e\x1b[31m"
QUESTION = f"How is the weather in {EVIL}?"
TAGS = {"div", "b", "pre", "table", "tr", "td", "th", "small", "progress"}


class Reader(html.parser.HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.tags: set[str] = set()
        self.attributes: set[str] = set()
        self.open: list[str] = []
        self.text = ""

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        self.open.append(tag)
        self.attributes |= {name for name, _ in attrs}

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data


def read(shown: Any, *, most: int = 20_000) -> str:
    """The text of what a notebook shows of an object, which must be safe, short and well formed."""
    return read_page(shown._repr_html_(), most=most)


def read_page(page: str, *, most: int = 20_000) -> str:
    """The text of a page, which must be safe, short and well formed."""
    assert len(page) < most
    reader = Reader()
    reader.feed(page)
    reader.close()
    assert reader.tags <= TAGS
    assert reader.attributes <= {"class", "style", "max", "value"}
    assert reader.open == []
    assert "\u202e" not in page
    assert "\x1b" not in page
    return reader.text


class Breaking:
    def __repr__(self) -> str:
        raise ValueError("no text")

    __str__ = __repr__


@tool(name="look")
def look(city: str) -> dict[str, Any]:
    """Look <b>closely</b>."""
    return {"seen": city}


def agent(*script: Any, name: str = f"W {EVIL}") -> BaseAgent:
    script = script or (answers.call("look", {"city": EVIL}), f"sunny {EVIL}")
    return BaseAgent(name, "p", client=ScriptedModel(list(script))).add_tool(look)


# ---- results


async def test_a_result_shows_its_answer_its_calls_and_what_it_used() -> None:
    result = await agent().run(QUESTION)
    said = read(result)
    for word in ("sunny <script>alert('x')", "look(city=<script>", "2 requests", "1 tool calls", "20+10 tokens", "ok"):
        assert word in said
    assert "answered" in said
    assert "seen" in read(result.tool_results[0])


async def test_a_failure_shows_why() -> None:
    result = await agent(answers.failure(400, f"no {EVIL}")).run("go")
    assert "no answer (model_error)" in read(result)
    assert "no <script>" in read(result)


async def test_the_repr_of_a_result_has_the_question_once_and_no_more_of_a_transcript_than_a_line_or_two() -> None:
    result = await agent("sunny").run("How is Rome?")
    assert repr(result).count("How is Rome?") == 1
    long = await agent("sunny").run("x" * 5000, messages=[{"role": "user", "content": "y" * 5000}])
    assert len(repr(long)) < 2000
    assert "metadata={'iterations': 1, 'model': " in repr(result)
    assert result.metadata["messages"] is result.messages


@pytest.mark.parametrize(
    "content",
    ["x" * 10**6, ["x" * 1000] * 1000, Breaking(), {"a": Breaking()}, None, b"\xff", EVIL, 5, {EVIL: EVIL}],
    ids=range(9),
)
def test_whatever_is_in_a_result_its_html_is_short_and_safe(content: Any) -> None:
    call = ToolResult(content=content, tool_name=EVIL, metadata={"arguments": {EVIL: content}}, call_id="c")
    many = [call] * 500
    facts = {"agent_name": EVIL, "tool_results": many, "warnings": [EVIL] * 100}
    for result in (
        AgentResult(content=content, **facts),
        AgentResult(content=content, error=EVIL * 10**4, **facts),
    ):
        assert "and 450 more" in read(result, most=80_000)
        read(BatchItem(index=0, input=content, result=result), most=80_000)
    read(call)
    read(ToolResult(tool_name="f", error=EVIL, metadata={"arguments": content}))


# ---- agents, streams, handles, batches, events


def test_an_agent_shows_its_card() -> None:
    for one in (agent(), sync.BaseAgent(EVIL, "p").add_tool(look)):
        assert "look(city: string)" in read(one)


async def test_a_stream_shows_where_it_is_and_at_last_its_result() -> None:
    stream = agent().stream("go")
    assert "has not begun" in read(stream)
    assert repr(stream) == "<RunStream: the run has not begun>"
    async with stream:
        assert "goes on" in read(stream)
        async for event in stream:
            read(event)
    assert "has ended" in read(stream)
    assert "sunny" in read(stream)


async def test_a_batch_shows_how_far_it_is() -> None:
    batch = stream_many(agent(*["sunny"] * 3), ["go"] * 3)
    assert "has not begun" in read(batch)
    async with batch:
        async for item in batch:
            assert "sunny" in read(item)
    assert "3 of 3 done" in read(batch)
    assert "3 of 3 done" in read(batch.progress)
    assert "max" in batch.progress._repr_html_()
    read(Progress(total=None, done=1, failed=0, running=1, elapsed=1.0))


def test_blocking_streams_batches_and_handles_show_where_they_are() -> None:
    with sync.stream(agent(), "go", buffer=0) as stream:  # which waits for its reader
        assert "goes on" in read(stream)
        stream.result()
    assert "sunny" in read(stream)
    assert repr(stream) == "<RunStream: the run has ended>"
    with sync.stream_many(agent("sunny"), ["go"]) as batch:
        list(batch)
    assert "1 of 1 done" in read(batch)
    handle = sync.start(agent(answers.hang()), "go")
    assert repr(handle) == "<Handle: the run goes on>"
    assert "goes on" in read(handle)
    handle.cancel()
    with pytest.raises(RunCancelled):
        handle.result(timeout=10)
    assert "has ended" in read(handle)
    assert "no answer (cancelled)" in read(handle)


async def test_recorded_events_show_the_tree_of_calls() -> None:
    boss = BaseAgent("Boss", "b", client=ScriptedModel([answers.call("ask", {"query": EVIL}), "done"]))
    with record_events() as events:
        await boss.register_delegate(agent(), "ask").run("go")
    said = read(events)
    assert "Boss" in said
    assert "· └ look" in said
    for event in events:
        assert event.kind in read(event)
    read(EventRecorder())


# ---- the bar below a cell


class Display:
    """A notebook's own display, as far as a bar uses it."""

    def __init__(self) -> None:
        self.pictures: list[dict[str, str]] = []

    def __call__(self, picture: dict[str, str], *, raw: bool, display_id: bool) -> Display:
        assert raw
        assert display_id
        self.pictures.append(picture)
        return self

    def update(self, picture: dict[str, str], *, raw: bool) -> None:
        assert raw
        self.pictures.append(picture)


@pytest.fixture
def cell(monkeypatch: pytest.MonkeyPatch) -> Iterator[Display]:
    """A cell of a notebook: IPython with a kernel."""
    ipython = pytest.importorskip("IPython")
    import IPython.display

    display = Display()
    monkeypatch.setattr(ipython, "get_ipython", lambda: type("Shell", (), {"kernel": object()})())
    monkeypatch.setattr(IPython.display, "display", display)
    yield display
    assert "IPython" in sys.modules


async def test_progress_in_a_notebook_is_a_bar_below_the_cell(
    cell: Display, capsys: pytest.CaptureFixture[str]
) -> None:
    with anyio.fail_after(10):
        await run_many(agent(*["sunny"] * 3), ["go"] * 3, progress=True)
    assert cell.pictures[-1]["text/plain"].startswith("3 of 3 done")
    assert '<progress max="3" value="3">' in cell.pictures[-1]["text/html"]
    assert capsys.readouterr().err == ""


def test_progress_of_blocking_code_in_a_notebook_is_a_bar_too(cell: Display) -> None:
    sync.run_many(agent("sunny"), ["go"], progress=True)
    assert '<progress max="1" value="1">' in cell.pictures[-1]["text/html"]


async def test_progress_in_a_terminals_ipython_is_not_a_cell(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    ipython = pytest.importorskip("IPython")
    monkeypatch.setattr(ipython, "get_ipython", lambda: object())
    await run_many(agent("sunny"), ["go"], progress=True)
    assert "1 of 1 done" in capsys.readouterr().err


def test_a_handle_shows_why_its_run_could_not_be_carried_out() -> None:
    options: Any = {"limits": 5}
    handle = sync.start(BaseAgent("A", "a", client=ScriptedModel(["done"])), "go", **options)
    with pytest.raises(TypeError):
        handle.result(10)
    assert "limits=5" in handle._repr_html_()


# ---- a real notebook


def test_the_notebook_among_the_examples_is_kept_without_outputs() -> None:
    nbformat = pytest.importorskip("nbformat")
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    nbformat.validate(notebook)
    assert [cell.outputs for cell in notebook.cells if cell.cell_type == "code" and cell.outputs] == []
    assert [cell.execution_count for cell in notebook.cells if cell.get("execution_count")] == []


@pytest.mark.slow
def test_a_notebook_awaits_blocks_streams_and_shows_what_comes_of_it(
    endpoint: Callable[..., Endpoint], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("ipykernel")
    started = endpoint(play)
    monkeypatch.setenv("PYTHONPATH", str(NOTEBOOK.parents[1]))
    card, awaited, blocking, live, printed, batch, tree, late = executed(NOTEBOOK, tmp_path)

    assert "weather(city: string)" in read_page(card["text/html"])
    for shown, city in ((awaited, "Rome"), (blocking, "Oslo")):
        assert f"sunny in {city}" in read_page(shown["text/html"])
        assert "Guide answered, 2 requests, 1 tool calls" in read_page(shown["text/html"])
        assert shown["text/plain"].startswith(f"AgentResult(content='sunny in {city}'")
    assert live["text/markdown"] == "sunny in Lima"
    assert "has ended" in read_page(live["text/html"])
    assert printed["text"] == "sunny in Bern"
    assert '<progress max="4" value="4">' in batch["text/html"]
    assert batch["text/plain"] == "['sunny in Rome', 'sunny in Oslo', 'sunny in Lima', 'sunny in Bern']"
    assert "weather" in read_page(tree["text/html"])
    assert "no answer (deadline)" in read_page(late["text/html"])
    assert any(len(request.messages) > 4 for request in started.requests), "the second question goes on with the first"


def executed(path: Path, folder: Path) -> list[dict[str, str]]:
    """What each code cell of a notebook shows, by media type, none of which is an error or a warning."""
    import nbformat

    outputs = folder / "executed.ipynb"
    # In a process of its own: it leaves sockets to the garbage collector, and an event loop.
    program = f"from nbclient.cli import main; main(argv=['--timeout=40', '--output={outputs}', '{path}'])"
    subprocess.run([sys.executable, "-c", program], check=True, timeout=55, cwd=folder)
    return [shown_by(cell) for cell in nbformat.read(outputs, as_version=4).cells if cell.cell_type == "code"]


def shown_by(cell: Any) -> dict[str, str]:
    shown: dict[str, str] = {}
    for output in cell.outputs:
        assert output.get("name") != "stderr", output
        shown |= output.get("data") or {"text": output["text"]}
    return shown
