"""The programs in `examples/`: each is run as a newcomer runs it, and the web application is served and asked."""

from __future__ import annotations

import asyncio
import importlib.util
import json
import multiprocessing
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any

import anyio
import httpx2
import pytest
import uvicorn
from fastapi import FastAPI

from fractal import BaseAgent, RunFinished, TextDelta, tool
from fractal.testing import Endpoint, answers
from tests.served import served

ROOT = Path(__file__).parents[2]
EXAMPLES = ROOT / "examples"
PROGRAMS = sorted(path.stem for path in EXAMPLES.glob("*_example.py"))
STRICT = ("-W", "error", "-W", "ignore:Async generator:ResourceWarning")  # on trio, HTTP libraries leave some

EndpointFactory = Callable[..., Endpoint]
Loader = Callable[[str], ModuleType]


def command(program: str, *arguments: str) -> list[str]:
    return [sys.executable, *STRICT, str(EXAMPLES / f"{program}.py"), *arguments]


def environment(**extra: str) -> dict[str, str]:
    kept = {name: value for name, value in os.environ.items() if not name.startswith("OPENAI_")}
    return kept | {"PYTHONPATH": str(ROOT), "PYTHONUNBUFFERED": "1"} | extra


def run(program: str, *arguments: str, cwd: Path, **extra: str) -> str:
    """What a program prints; it must end well and have nothing to complain of."""
    done = subprocess.run(
        command(program, *arguments), capture_output=True, text=True, timeout=50, cwd=cwd, env=environment(**extra)
    )
    assert (done.returncode, done.stderr) == (0, ""), done.stdout
    return done.stdout


@pytest.fixture
def _interruptible() -> Iterator[None]:
    """Have Ctrl-C reach the programs also when the tests run in the background, where shells have it ignored."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.fixture
def load(monkeypatch: pytest.MonkeyPatch) -> Loader:
    """Imports an example afresh, so that each test has its own agent."""
    monkeypatch.syspath_prepend(str(EXAMPLES))

    def load(program: str) -> ModuleType:
        spec = importlib.util.spec_from_file_location(program, EXAMPLES / f"{program}.py")
        assert spec is not None
        assert spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        monkeypatch.setitem(sys.modules, program, module)  # annotations are looked up there
        spec.loader.exec_module(module)
        return module

    return load


# ---- the programs


@pytest.mark.slow
def test_the_asyncio_example_runs_tools_and_runs_side_by_side_and_survives_its_timeout(tmp_path: Path) -> None:
    output = run("async_example", cwd=tmp_path)

    assert "Rome: 19 degrees, the train leaves at 8:05." in output
    assert "Oslo: 19 degrees, the train leaves at 8:05. (10 messages)" in output
    assert re.search(r"Nice: .*\n.*Vienna: .*\n.*Madrid: ", output)
    assert "forecast(city: string)" in output, "the agent's card"
    assert "success=False stop_reason=deadline: the run did not finish within 0.3 s" in output
    [(forecast, train)] = re.findall(r"tools: forecast ([\d.]+) s, next_train ([\d.]+) s", output)
    assert max(float(forecast), float(train)) < 0.7, "waiting for the other would make it 0.8 s"
    [together] = re.findall(r"three runs together: ([\d.]+) s", output)
    assert 0.4 <= float(together) < 2.4, "six tools of 0.4 s each"


@pytest.mark.slow
def test_the_trio_example_needs_no_asyncio_and_its_cut_run_cleans_up(tmp_path: Path) -> None:
    output = run("trio_example", cwd=tmp_path)

    for line in ("amber: a word of 5 letters", "lichen: a word of 6 letters", "tide: a word of 4 letters"):
        assert line in output
    assert "archipelago: a word of 11 letters (4 requests, both agents together)" in output
    assert output.endswith("  cleanup: 'perpetual motion' is not looked up any more\n  cut=True\n")


@pytest.mark.slow
def test_the_sync_example_answers_threads_many_inputs_and_a_cancelled_handle(tmp_path: Path) -> None:
    output = run("sync_example", "0.3", cwd=tmp_path)

    assert re.search(r"bolts: 7\.50 .*\n.*nuts: 6\.00 .*\n.*washers: 10\.50 .*\n.*screws: 9\.00 ", output)
    assert re.findall(r"(\d) mm drill: 15\.00 euros", output) == list("123456")
    assert "the run was cancelled: cancelled, after 1 request(s)" in output
    assert output.count("cleanup: the scanner is off again") == output.count("the scanner is on") == 2
    assert "nobody interrupted: deadline" in output


@pytest.mark.slow
@pytest.mark.skipif(os.name == "nt", reason="signals to one process")
@pytest.mark.usefixtures("_interruptible")
def test_ctrl_c_ends_the_sync_example_after_the_cleanup_of_its_run(tmp_path: Path) -> None:
    with subprocess.Popen(
        command("sync_example", "40"),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=tmp_path,
        env=environment(),
    ) as process:
        assert process.stdout is not None
        while "to try it" not in process.stdout.readline():
            assert process.poll() is None
        assert "the scanner is on" in process.stdout.readline()

        process.send_signal(signal.SIGINT)
        sent = time.monotonic()
        output, errors = process.communicate(timeout=20)

    assert time.monotonic() - sent < 10
    assert (process.returncode, errors) == (130, "")
    assert re.fullmatch(
        r"  cleanup: the scanner is off again, after \d+ shelves\n  interrupted, and nothing is left running\n", output
    )


@pytest.mark.slow
def test_the_multiagent_example_prints_its_tree_and_keeps_to_its_budget(tmp_path: Path) -> None:
    output = run("multiagent_example", cwd=tmp_path)
    plenty, tight = output.split("A budget holds for the whole tree")

    assert "success=True: Open: Museo Egizio: 9:00 to 19:00. agnolotti for 2." in plenty
    assert "requests of all agents together: 5" in plenty
    # Both delegates have begun before either has ended, one level below the coordinator.
    assert plenty.index("  |  Guide begins") < plenty.index("  |  Cook begins") < plenty.index("  |  Guide ends")
    assert "  Coordinator ends: finished, 5 request(s)" in plenty
    assert "success=False: the budget of 3 requests is spent" in tight
    assert "requests of all agents together: 3" in tight


@pytest.mark.slow
def test_the_streaming_example_shows_text_events_and_what_leaving_early_does(tmp_path: Path) -> None:
    output = run("streaming_example", cwd=tmp_path)
    first, events, left, slow, blocking = output.split("\n\n")

    assert first.endswith("An answer, piece by piece:\n  It is sunny in Rome.")
    # The delegate's events are inside the run's, one step to the right.
    inner = events[events.index("    Reporter begins\n") : events.index("    Reporter ends: finished\n")]
    assert [line for line in inner.splitlines() if not line.startswith("    ")] == []
    assert events.index("  > delegate_to_reporter") < events.index(inner) < events.index("  < delegate_to_reporter ok")
    assert "\n  'sunny '\n" in events
    assert "\n    'sunny '\n" in events
    assert "'It is sunny in Oslo.', 4 requests of both agents" in events
    assert left.endswith("  cleanup: the archive is closed again\n  cancelled, with archive cancelled")
    assert "'Once ', then a pause" in slow
    assert "then 'upon ', and that is enough" in slow
    assert blocking.endswith("  It  | is  | sunny  | in  | Bern.\n")


@pytest.mark.slow
def test_the_structured_output_example_checks_corrects_and_gives_up(tmp_path: Path) -> None:
    output = run("structured_output_example", cwd=tmp_path)

    assert "  3 x screws, 4.50\n  1 x drill, 89.00\n  Ada Byrne pays 102.50 euros (2 requests)\n" in output
    assert "  ['screws', 'drill']\n  'order'\n" in output
    assert "  1 line(s), total None\n  2 line(s), total None\n  whole: 102.5\n" in output
    assert output.endswith("  2 answers, the last one: the answer is not valid JSON: there is no JSON object in it\n")


@pytest.mark.slow
@pytest.mark.skipif(os.name == "nt", reason="signals to one process")
@pytest.mark.usefixtures("_interruptible")
def test_the_durable_example_survives_the_end_of_its_process(tmp_path: Path) -> None:
    output = run("durable_example", cwd=tmp_path)
    assert "ended with -9" in output
    assert output.count("process pays order 1") == 1
    assert output.count("process pays order 2") == 2
    assert "approval: [\"refund {'order': 3}\"]" in output
    assert "refunded order 3" in output


@pytest.mark.slow
def test_the_workers_example_handles_each_order_though_a_worker_is_killed(tmp_path: Path) -> None:
    output = run("workers_example", cwd=tmp_path)
    assert "a worker was killed\n" in output
    assert output.endswith("12 of 12 orders were handled\norder 11 is on its way\n")


@pytest.mark.slow
def test_the_pools_example_answers_in_threads_and_in_all_kinds_of_processes(tmp_path: Path) -> None:
    output = run("pools_example", cwd=tmp_path)
    answered = "amber 5, lichen 6, tide 4, heath 5, estuary 7, moss 4"
    assert "here: dune 4\n" in output
    assert f"threads: {answered} (0 other processes)\n" in output
    found = re.findall(rf"^processes \((\w+)\): {answered} \([12] other processes\)$", output, re.MULTILINE)
    assert {*found} == {"fork", "spawn"} & {*multiprocessing.get_all_start_methods()}


@pytest.mark.slow
@pytest.mark.skipif(os.name == "nt", reason="Celery does not run there")
def test_the_celery_example_tries_a_failed_run_again_and_ends_one_that_takes_too_long(
    tmp_path: Path, load: Loader
) -> None:
    play, turn = load("celery_example").model, load("_offline")._turn
    with Endpoint(lambda request: play(turn(request))) as started:
        output = run("celery_example", cwd=tmp_path, OPENAI_BASE_URL=started.url, OPENAI_API_KEY="none")
        assert output == "amber 5\nlichen 6\nflaky 5\nendless: that took too long\n"
        assert sum(request.body["messages"][-1]["content"] == "flaky" for request in started.requests) == 2
        started.wait_for_disconnects(1, 15)


@pytest.mark.slow
@pytest.mark.parametrize("program", ["flask_example", "django_example"])
def test_the_blocking_web_examples_serve_from_the_command_line(program: str) -> None:
    with served(lambda port: command(program, str(port)), "/health", environment=environment()) as port:
        asked = {"question": "bolts"}
        answered = httpx2.post(f"http://127.0.0.1:{port}/query", json=asked, trust_env=False, timeout=20)
    assert answered.json()["answer"] == 'That is {"article":"bolts","euros":7.5}.'


def test_the_fastapi_example_serves_from_the_command_line_until_ctrl_c(tmp_path: Path) -> None:
    with subprocess.Popen(
        command("fastapi_example", "0"),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        cwd=tmp_path,
        env=environment(),
    ) as process:
        assert process.stdout is not None
        while not (found := re.search(r"http://127\.0\.0\.1:\d+", process.stdout.readline())):
            assert process.poll() is None
        with httpx2.Client(base_url=found[0], trust_env=False) as client:
            answered = client.post("/query", json={"question": "bolts"})

        process.send_signal(signal.SIGINT)
        output, _ = process.communicate(timeout=20)

    assert answered.json()["answer"] == 'That is {"article":"bolts","euros":7.5}.'
    assert process.returncode == 0
    assert "Application shutdown complete" in output
    assert "Traceback" not in output


@pytest.mark.slow
def test_with_an_endpoint_in_the_environment_the_examples_ask_that_one(
    tmp_path: Path, endpoint: EndpointFactory
) -> None:
    started = endpoint("from the endpoint")

    output = run("async_example", cwd=tmp_path, OPENAI_BASE_URL=started.url, OPENAI_MODEL="some-model")

    assert "  from the endpoint\n" in output
    assert "played by this program" not in output
    assert {request.body["model"] for request in started.requests} == {"some-model"}


@pytest.mark.parametrize("program", PROGRAMS)
def test_importing_an_example_runs_nothing(program: str, load: Loader, capsys: pytest.CaptureFixture[str]) -> None:
    module = load(program)

    assert capsys.readouterr() == ("", "")
    assert callable(module.main)
    assert callable(module.model)


def test_the_readme_lists_every_example() -> None:
    listed = re.findall(r"^\| `(\w+)\.py`", (EXAMPLES / "README.md").read_text(encoding="utf-8"), re.MULTILINE)

    assert sorted(listed) == PROGRAMS


# ---- the web application, served on the loopback interface


@contextmanager
def serving(app: FastAPI, loop: str = "auto") -> Iterator[httpx2.Client]:
    """A client of an application that a server in a thread of its own serves."""
    # No websockets: some versions warn of what they use of other people's.
    options = {"log_config": None, "loop": loop, "timeout_graceful_shutdown": 5, "ws": "none"}
    config = uvicorn.Config(app, host="127.0.0.1", port=0, **options)
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run, name="server")
    thread.start()
    try:
        give_up = time.monotonic() + 10
        while not server.started:
            assert thread.is_alive(), "the application did not start"
            assert time.monotonic() < give_up, "the application did not start in time"
            time.sleep(0.005)
        port = server.servers[0].sockets[0].getsockname()[1]
        with httpx2.Client(base_url=f"http://127.0.0.1:{port}", trust_env=False, timeout=20) as client:
            yield client
    finally:
        server.should_exit = True
        thread.join(15)
        assert not thread.is_alive(), "the server did not stop"


@pytest.fixture(params=["asyncio", pytest.param("uvloop", marks=pytest.mark.slow)])
def loop(request: pytest.FixtureRequest) -> str:
    if request.param == "uvloop":
        pytest.importorskip("uvloop")
    return request.param


@pytest.fixture
def shop(load: Loader) -> ModuleType:
    """The example, with one more route that tells which tasks its event loop has."""
    module = load("fastapi_example")
    module.app.get("/tasks")(tasks)
    return module


async def tasks() -> int:
    return len(asyncio.all_tasks())


def model(request: Any) -> answers.AnswerLike:
    """Ask for the price of what the user names, then repeat it."""
    *_, before, last = [{}, *request.body["messages"]]
    if last["role"] == "user":
        return answers.call("price", {"article": last["content"]})
    assert before["role"] == "assistant"
    return f"the tool says {last['content']}"


def leave(client: httpx2.Client, path: str, body: object, when: Callable[[], object]) -> None:
    """Send a request, wait for something, and close the connection without having read an answer."""
    payload = json.dumps(body).encode()
    head = f"POST {path} HTTP/1.1\r\nHost: here\r\nContent-Type: application/json\r\nContent-Length: {len(payload)}\r\n"
    with socket.create_connection((client.base_url.host, client.base_url.port or 80), 10) as connection:
        connection.sendall(head.encode() + b"\r\n" + payload)
        when()


def until(condition: Callable[[], bool], what: str) -> None:
    give_up = time.monotonic() + 10
    while not condition():
        assert time.monotonic() < give_up, what
        time.sleep(0.01)


def test_a_query_is_answered_and_goes_on_with_its_history(
    endpoint: EndpointFactory, shop: ModuleType, loop: str
) -> None:
    started = endpoint(model)
    with serving(shop.app, loop) as client:
        first = client.post("/query", json={"question": "bolts"}).raise_for_status().json()
        second = client.post("/query", json={"question": "nuts", "history": first["history"]}).raise_for_status().json()

    assert first["answer"] == 'the tool says {"article":"bolts","euros":7.5}'
    assert second["answer"] == 'the tool says {"article":"nuts","euros":6.0}'
    assert [m["content"] for m in started.requests[-1].body["messages"] if m["role"] == "user"] == ["bolts", "nuts"]
    assert first["run_id"] != second["run_id"]


def test_a_tool_is_called_without_a_model(endpoint: EndpointFactory, shop: ModuleType) -> None:
    started = endpoint(model)
    with serving(shop.app) as client:
        answered = client.post("/tools/price", json={"article": "bolts", "pieces": 2}).raise_for_status().json()

    assert answered["content"] == {"article": "bolts", "euros": 15.0}
    assert answered["outcome"] == "ok"
    assert started.requests == []


def test_health_tells_the_agent_and_its_tools_without_a_request(endpoint: EndpointFactory, shop: ModuleType) -> None:
    started = endpoint(model)
    with serving(shop.app) as client:
        answered = client.get("/health").raise_for_status().json()

    assert answered == {"status": "ok", "agent": "Shop", "model": "gpt-4o-mini", "tools": ["price"]}
    assert started.requests == []


@pytest.mark.parametrize(
    "body",
    [
        pytest.param({}, id="no question"),
        pytest.param({"question": ""}, id="an empty question"),
        pytest.param({"question": "bolts", "timeout": 0}, id="no time"),
        pytest.param({"question": "bolts", "history": "yesterday"}, id="a history that is no list"),
        pytest.param({"question": "bolts", "history": [{"role": "tool", "tool_call_id": "x"}]}, id="a broken history"),
    ],
)
def test_a_query_that_does_not_fit_is_a_422_and_asks_no_model(
    body: dict[str, Any], endpoint: EndpointFactory, shop: ModuleType
) -> None:
    started = endpoint(model)
    with serving(shop.app) as client:
        answered = client.post("/query", json=body)

    assert answered.status_code == 422
    assert answered.json()["detail"]
    assert started.requests == []


@pytest.mark.parametrize(
    ("answer", "status", "said"),
    [
        pytest.param(answers.failure(400, "no such model"), 502, "no such model", id="bad request"),
        pytest.param(answers.failure(401, "who are you"), 502, "who are you", id="wrong key"),
        pytest.param(
            answers.failure(429, "pay first", code="insufficient_quota", retry_after=7), 429, "pay first", id="quota"
        ),
        pytest.param(answers.raw("<h1>Welcome</h1>"), 502, "not JSON", id="a web page"),
        pytest.param(answers.refusal("not that"), 422, "not that", id="refusal"),
        pytest.param(answers.call("no_such_tool"), 503, "after 10 iterations", id="endless tool calls"),
    ],
)
def test_a_run_that_fails_is_an_http_error_with_its_reason(
    answer: answers.AnswerLike, status: int, said: str, endpoint: EndpointFactory, shop: ModuleType
) -> None:
    endpoint(answer)
    with serving(shop.app) as client:
        answered = client.post("/query", json={"question": "bolts"})

    assert answered.status_code == status
    assert said in answered.json()["detail"]
    assert answered.headers.get("retry-after") == ("7" if status == 429 else None)


def test_a_query_that_takes_too_long_is_a_504_and_leaves_nothing_running(
    endpoint: EndpointFactory, shop: ModuleType, loop: str
) -> None:
    started = endpoint(answers.hang())
    with serving(shop.app, loop) as client:
        before = client.get("/tasks").json()
        answered = client.post("/query", json={"question": "bolts", "timeout": 0.2})
        after = client.get("/tasks").json()
        started.wait_for_disconnects(1)

    assert answered.status_code == 504
    assert answered.json() == {"detail": "the run did not finish within 0.2 s", "reason": "deadline"}
    assert answered.elapsed.total_seconds() < 3
    assert after == before


@pytest.mark.parametrize(
    ("path", "body", "status", "said"),
    [
        pytest.param("nothing", {}, 404, "there is no tool 'nothing'", id="unknown"),
        pytest.param("price", {}, 422, "'article' is missing", id="missing argument"),
        pytest.param("price", {"article": "bolts", "pieces": "some"}, 422, "'pieces'", id="wrong type"),
        pytest.param("broken", {}, 500, "ValueError: out of order", id="raises"),
        pytest.param("endless", {}, 504, "timed out after", id="too slow"),
    ],
)
def test_a_tool_that_cannot_answer_is_an_http_error(
    path: str, body: dict[str, Any], status: int, said: str, endpoint: EndpointFactory, shop: ModuleType
) -> None:
    @tool
    def broken() -> None:
        raise ValueError("out of order")

    @tool(timeout=0.1)
    async def endless() -> None:
        await anyio.sleep_forever()

    endpoint(model)
    shop.agent.add_tool(broken).add_tool(endless)
    with serving(shop.app) as client:
        answered = client.post(f"/tools/{path}", json=body)

    assert answered.status_code == status
    assert said in answered.json()["detail"]


def test_twenty_requests_at_once_are_not_mixed_up(endpoint: EndpointFactory, shop: ModuleType, loop: str) -> None:
    started = endpoint(model, latency=0.1)
    articles = ["x" * (number + 1) for number in range(20)]
    with serving(shop.app, loop) as client, ThreadPoolExecutor(20) as pool:
        found = list(pool.map(lambda name: client.post("/query", json={"question": name}).json(), articles))

    for article, answered in zip(articles, found, strict=True):
        price = json.dumps({"article": article, "euros": 1.5 * len(article)}, separators=(",", ":"))
        assert answered["answer"] == f"the tool says {price}"
        assert [m["content"] for m in answered["history"] if m["role"] == "user"] == [article]
    assert len({answered["run_id"] for answered in found}) == 20
    assert len(started.requests) == 40
    assert started.max_in_flight > 4, "the requests were answered one after the other"


def test_a_client_that_leaves_while_the_model_thinks_cancels_its_run(
    endpoint: EndpointFactory, shop: ModuleType, loop: str
) -> None:
    started = endpoint(answers.hang())
    events: list[Any] = []
    shop.agent.observers = (events.append,)
    with serving(shop.app, loop) as client:
        before = client.get("/tasks").json()
        leave(client, "/query", {"question": "bolts"}, lambda: started.wait_for_requests(1))
        started.wait_for_disconnects(1)
        until(lambda: client.get("/tasks").json() == before, "a task is left running")

    [end] = [event for event in events if isinstance(event, RunFinished)]
    assert end.result.stop_reason == "cancelled"
    assert len(started.requests) == 1


@pytest.mark.parametrize("path", ["/query", "/tools/slow"])
def test_a_client_that_leaves_while_a_tool_works_cancels_the_tool(
    path: str, endpoint: EndpointFactory, shop: ModuleType
) -> None:
    begun, cleaned_up = threading.Event(), threading.Event()

    @tool
    async def slow(question: str = "") -> None:
        begun.set()
        try:
            await anyio.sleep_forever()
        finally:
            cleaned_up.set()

    endpoint(answers.call("slow"))
    shop.agent.add_tool(slow)
    with serving(shop.app) as client:
        before = client.get("/tasks").json()
        leave(client, path, {"question": "bolts"}, lambda: begun.wait(10))
        assert cleaned_up.wait(5), "the example's own limit for tools is 10 s"
        until(lambda: client.get("/tasks").json() == before, "a task is left running")


def frames_of(response: httpx2.Response) -> list[tuple[str, Any]]:
    """The server-sent events of a response."""
    assert response.headers["content-type"].startswith("text/event-stream")
    events = [event.split("\n") for event in response.text.removesuffix("\n\n").split("\n\n")]
    return [(name.removeprefix("event: "), json.loads(data.removeprefix("data: "))) for name, data in events]


def test_an_answer_is_streamed_and_goes_on_with_its_history(
    endpoint: EndpointFactory, shop: ModuleType, loop: str
) -> None:
    endpoint(model)
    with serving(shop.app, loop) as client:
        first = frames_of(client.post("/stream", json={"question": "bolts"}).raise_for_status())
        end = first[-1][1]
        second = frames_of(client.post("/stream", json={"question": "nuts", "history": end["history"]}))

    assert first[:-1] == [
        ("tool", {"name": "price", "arguments": {"article": "bolts"}}),
        ("text", "the "),
        ("text", "tool "),
        ("text", "says "),
        ("text", '{"article":"bolts","euros":7.5}'),
    ]
    assert second[-1][0] == "end"
    assert len(second[-1][1]["history"]) == 8
    assert second[-1][1]["run_id"] != end["run_id"]


@pytest.mark.parametrize(
    ("body", "answer", "reason", "said"),
    [
        pytest.param({}, answers.failure(400, "no such model"), "model_error", "no such model", id="bad request"),
        pytest.param({"timeout": 0.2}, answers.hang(), "deadline", "within 0.2 s", id="too slow"),
        pytest.param({}, answers.refusal("not that"), "refusal", "not that", id="refusal"),
        pytest.param(
            {"history": [{"role": "tool"}]}, "never asked", "history", "has no content", id="a broken history"
        ),
    ],
)
def test_a_streamed_run_that_fails_says_so_in_its_last_event(
    body: dict[str, Any],
    answer: answers.AnswerLike,
    reason: str,
    said: str,
    endpoint: EndpointFactory,
    shop: ModuleType,
) -> None:
    endpoint(answer)
    with serving(shop.app) as client:
        [(event, data)] = frames_of(client.post("/stream", json={"question": "bolts", **body}))

    assert (event, data["reason"]) == ("error", reason)
    assert said in data["detail"]


@pytest.mark.parametrize("when", ["the model is silent", "text comes", "a tool works"])
def test_a_client_that_leaves_a_stream_ends_its_run(
    when: str, endpoint: EndpointFactory, shop: ModuleType, loop: str, caplog: pytest.LogCaptureFixture
) -> None:
    begun, cleaned_up = threading.Event(), threading.Event()
    ends: list[str] = []

    @tool
    async def slow() -> None:
        begun.set()
        try:
            await anyio.sleep_forever()
        finally:
            cleaned_up.set()

    def watch(event: Any) -> None:
        if isinstance(event, TextDelta):
            begun.set()
        elif isinstance(event, RunFinished):
            ends.append(event.result.stop_reason)

    shop.agent.add_tool(slow)
    shop.agent.observers = (watch,)
    answer = {
        "the model is silent": answers.hang(),
        "text comes": answers.text("la " * 500, chunk_delay=0.02),
        "a tool works": answers.call("slow"),
    }[when]
    started = endpoint(answer)
    with serving(shop.app, loop) as client:
        before = client.get("/tasks").json()
        is_silent = when == "the model is silent"
        leave(
            client,
            "/stream",
            {"question": "bolts"},
            lambda: started.wait_for_requests(1) if is_silent else begun.wait(10),
        )
        until(lambda: bool(ends), "the run goes on")
        until(lambda: client.get("/tasks").json() == before, "a task is left running")

    assert ends == ["cancelled"]
    assert len(started.requests) == 1
    assert cleaned_up.is_set() is (when == "a tool works")
    assert [record.message for record in caplog.records if record.levelname in ("WARNING", "ERROR")] == []


@pytest.mark.parametrize("hanging", ["model", "tool"])
def test_asyncio_wait_for_in_a_handler_raises_timeout_error_and_leaves_nothing_running(
    hanging: str, endpoint: EndpointFactory, loop: str
) -> None:
    cleaned_up = threading.Event()
    app = FastAPI()

    @tool
    async def slow() -> None:
        try:
            await anyio.sleep_forever()
        finally:
            cleaned_up.set()

    agent = BaseAgent("Shop", "You sell tools.").add_tool(slow)

    @app.post("/hurried")
    async def hurried() -> dict[str, Any]:
        before = asyncio.all_tasks()
        try:
            await asyncio.wait_for(agent.run("bolts"), 0.2)
        except TimeoutError as error:
            left = asyncio.all_tasks() - before
            return {"raised": type(error).__name__, "left": [repr(task) for task in left]}
        return {}

    started = endpoint(answers.hang() if hanging == "model" else answers.call("slow"))
    with serving(app, loop) as client:
        answered = client.post("/hurried").raise_for_status()
        if hanging == "model":
            started.wait_for_disconnects(1)
        else:
            assert cleaned_up.is_set()

    assert answered.json() == {"raised": "TimeoutError", "left": []}
    assert answered.elapsed.total_seconds() < 3
    assert len(started.requests) == 1


async def test_the_application_answers_in_process_on_every_backend(endpoint: EndpointFactory, shop: ModuleType) -> None:
    endpoint(model)
    transport = httpx2.ASGITransport(app=shop.app)
    async with shop.agent, httpx2.AsyncClient(transport=transport, base_url="http://shop") as client:
        answered = await client.post("/query", json={"question": "bolts"})
        missing = await client.post("/query", json={})
        called = await client.post("/tools/price", json={"article": "nuts"})

    assert answered.json()["answer"] == 'the tool says {"article":"bolts","euros":7.5}'
    assert missing.status_code == 422
    assert called.json()["content"] == {"article": "nuts", "euros": 6.0}
