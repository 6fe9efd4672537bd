"""Agents in blocking applications: Flask, Django and bare WSGI in forked workers with threads; pools of processes."""

from __future__ import annotations

import json
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any

import httpx2
import pytest

from fractal import BaseAgent, sync
from fractal.testing import Endpoint, answers
from tests.served import served

ROOT = Path(__file__).parents[2]

pytestmark = [pytest.mark.skipif(os.name == "nt", reason="forks"), pytest.mark.timeout(120)]

EndpointFactory = Callable[..., Endpoint]
Answered = tuple[str, str, str, str]
"""A path, a question, its answer, and the worker that gave it."""


def model(request: Any) -> answers.AnswerLike:
    """Look the price of an article up, then repeat it; an agent without tools gets the question back."""
    *_, last = request.body["messages"]
    if last["role"] == "tool":
        return f"the tool says {last['content']}"
    return answers.call("price", {"article": last["content"]}) if request.body.get("tools") else last["content"]


def the_answer_of(path: str, question: str) -> str:
    price = json.dumps({"article": question, "euros": 1.5 * len(question)}, separators=(",", ":"))
    return question if path == "/" else f"the tool says {price}"


def serving(command: Callable[[int], Sequence[str]], path: str) -> AbstractContextManager[int]:
    environment = dict(os.environ) | {"PYTHONPATH": str(ROOT), "PYTHONWARNINGS": "error"}
    return served(command, path, environment=environment, start_seconds=60)


@contextmanager
def gunicorn(log: Path) -> Iterator[str]:
    """Two forked workers with four threads each, of applications that were loaded, and have asked, before the fork."""
    command = [sys.executable, "-m", "gunicorn", "--preload", "--workers=2", "--threads=4", f"--log-file={log}"]
    command += ["--worker-connections=4", "--keep-alive=0"]  # so that no worker takes all
    application = "tests.sync.wsgi_applications:application"
    with serving(lambda port: [*command, f"--bind=127.0.0.1:{port}", application], "/flask/health") as port:
        yield f"http://127.0.0.1:{port}"
    said = log.read_text()
    assert "Traceback" not in said, said
    assert "[ERROR]" not in said, said
    assert "Shutting down: Master" in said, said


def leave(url: str, path: str, question: str, when: Callable[[socket.socket], object]) -> None:
    """Send a question, wait for something, and close the connection."""
    body = json.dumps({"question": question}).encode()
    headers = ["Host: localhost", "Content-Type: application/json", f"Content-Length: {len(body)}"]
    port = int(url.rpartition(":")[2])
    with socket.create_connection(("127.0.0.1", port), 10) as connection:
        connection.settimeout(20)
        connection.sendall("\r\n".join([f"POST {path} HTTP/1.1", *headers, "", ""]).encode() + body)
        when(connection)


def read_until(text: bytes) -> Callable[[socket.socket], None]:
    def read(connection: socket.socket) -> None:
        seen = b""
        while text not in seen:
            piece = connection.recv(4096)
            assert piece, seen
            seen += piece

    return read


# ---- WSGI


@pytest.mark.slow
def test_agents_used_before_the_fork_answer_in_all_workers_and_threads_of_gunicorn(
    endpoint: EndpointFactory, tmp_path: Path
) -> None:
    endpoint(model, latency=0.02)
    with gunicorn(tmp_path / "log") as url, httpx2.Client(base_url=url, trust_env=False, timeout=30) as client:

        def ask(number: int) -> Answered:
            path, question = ("/flask/query", "/django/query", "/")[number % 3], "x" * (number + 1)
            answered = client.post(path, json={"question": question}).raise_for_status()
            return path, question, answered.json()["answer"], answered.headers["x-worker"]

        seen, give_up = set[tuple[str, str]](), time.monotonic() + 30
        while len(seen) < 6 and time.monotonic() < give_up:  # three applications in two workers
            with ThreadPoolExecutor(12) as threads:
                for path, question, answer, worker in threads.map(ask, range(24)):
                    assert answer == the_answer_of(path, question)
                    seen.add((path, worker))
    assert len({worker for _, worker in seen}) == 2
    assert len(seen) == 6


@pytest.mark.slow
def test_a_client_that_leaves_a_stream_of_flasks_ends_its_run(endpoint: EndpointFactory, tmp_path: Path) -> None:
    def endless(request: Any) -> answers.AnswerLike:
        if request.body["messages"][-1]["content"] == "before the fork":
            return "yes"
        return answers.text("word " * 5000, chunk_delay=0.01)

    started = endpoint(endless)
    with gunicorn(tmp_path / "log") as url:
        leave(url, "/flask/stream", "go", read_until(b"event: text"))
        started.wait_for_disconnects(1, 30)


# ---- Django on ASGI


@pytest.mark.slow
def test_djangos_views_on_asgi_answer_and_end_with_their_clients(endpoint: EndpointFactory) -> None:
    def answer(request: Any) -> answers.AnswerLike:
        return answers.hang() if request.body["messages"][-1]["content"] == "hang" else model(request)

    started = endpoint(answer)
    command = [sys.executable, "-m", "uvicorn", "--app-dir", str(ROOT / "examples"), "--lifespan=off"]
    with serving(lambda port: [*command, f"--port={port}", "django_example:asgi"], "/health") as port:
        url = f"http://127.0.0.1:{port}"
        with httpx2.Client(base_url=url, trust_env=False, timeout=30) as client:
            for path in ("/query", "/awaited"):
                answered = client.post(path, json={"question": "bolts"}).raise_for_status()
                assert answered.json()["answer"] == the_answer_of(path, "bolts")
            streamed = client.post("/stream", json={"question": "bolts"}).raise_for_status().text
            assert streamed.count("event: text") > 1
            assert '"error": null' in streamed
        for number, path in enumerate(("/awaited", "/stream"), 1):
            before = len(started.requests)
            leave(url, path, "hang", lambda _, before=before: started.wait_for_requests(before + 1, 15))
            started.wait_for_disconnects(number, 15)


# ---- queues


class TooLong(Exception):
    """What a queue raises in a task that takes too long, as Celery's `soft_time_limit` does."""


def test_what_a_signal_handler_raises_in_a_task_ends_its_run(endpoint: EndpointFactory) -> None:
    def too_long(*_: object) -> None:
        raise TooLong

    started = endpoint(lambda request: "yes" if request.body["messages"][-1]["content"] == "next" else answers.hang())
    agent = BaseAgent("Clerk", "You work.", timeout=30)
    before = signal.signal(signal.SIGUSR1, too_long)
    watch = threading.Thread(target=lambda: (started.wait_for_requests(1, 15), os.kill(os.getpid(), signal.SIGUSR1)))
    watch.start()
    try:
        with pytest.raises(TooLong):
            sync.run(agent, "hang")
        started.wait_for_disconnects(1, 15)
    finally:
        watch.join()
        signal.signal(signal.SIGUSR1, before)
    assert sync.run(agent, "next").content == "yes"
