"""What `assert_nothing_left` finds, what it lets pass, and what it waits for."""

from __future__ import annotations

import socket
import subprocess
import sys
import textwrap
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import anyio
import openai
import pytest

from fractal import BaseAgent, OpenAIModel, abandoned_threads, sync, tool
from fractal.testing import Endpoint, ScriptedModel, answers, assert_nothing_left
from fractal.testing._leftovers import wait_until_empty
from tests.support import in_thread


@pytest.fixture
def until_the_end() -> Iterator[threading.Event]:
    """Set when the test is over, so that what it leaves behind on purpose goes away."""
    over = threading.Event()
    yield over
    over.set()


def asking(endpoint: Endpoint, **options: object) -> BaseAgent:
    return BaseAgent("A", "a", client=OpenAIModel(base_url=endpoint.url), **options)  # type: ignore[arg-type]


def stuck() -> BaseAgent:
    return BaseAgent("Stuck", "s", client=ScriptedModel([answers.hang()]))


# ---- what it finds


async def test_a_task_is_found_and_its_line_is_named():
    async def outlive() -> None:
        await anyio.sleep_forever()

    async with anyio.create_task_group() as group:
        with pytest.raises(AssertionError, match=r"task .*outlive.* at test_nothing_left.py:\d+ in outlive"):
            async with assert_nothing_left(within=0.05):
                group.start_soon(outlive)
                await anyio.sleep(0)
        group.cancel_scope.cancel()


def test_a_thread_is_found_and_its_line_is_named(until_the_end: threading.Event):
    def outlive() -> None:
        until_the_end.wait()

    left = threading.Thread(target=outlive, name="left")
    with (
        pytest.raises(AssertionError, match=r"thread 'left' at test_nothing_left.py:\d+ in outlive"),
        assert_nothing_left(within=0.05),
    ):
        left.start()
    until_the_end.set()
    left.join()


def test_a_socket_is_found_and_its_addresses_are_named():
    with Endpoint() as endpoint, pytest.raises(AssertionError) as caught, assert_nothing_left(within=0.05):
        port = int(endpoint.url.split(":")[2].removesuffix("/v1"))
        client = socket.create_connection(("127.0.0.1", port))
        here = client.getsockname()[1]
    client.close()
    assert f"at 127.0.0.1:{here} to 127.0.0.1:{port} (file descriptor " in str(caught.value)


def test_a_file_is_found_and_named(tmp_path: Path):
    path = tmp_path / "left.txt"
    with pytest.raises(AssertionError, match=r"left.txt \(file descriptor \d+\)"), assert_nothing_left(within=0.05):
        file = path.open("w")
    file.close()


def test_all_leftovers_are_told_a_line_each(tmp_path: Path, until_the_end: threading.Event):
    thread = threading.Thread(target=until_the_end.wait, name="left")
    with pytest.raises(AssertionError) as caught, assert_nothing_left(within=0.05):
        thread.start()
        file = (tmp_path / "left.txt").open("w")
    file.close()
    until_the_end.set()
    thread.join()
    assert len(str(caught.value).splitlines()) == 3


def test_a_run_that_was_started_and_not_joined_is_found():
    with (
        pytest.raises(AssertionError, match=r"task .*, on the event loop of fractal.sync, at "),
        assert_nothing_left(within=0.05),
    ):
        handle = sync.start(stuck(), "go")
    handle.cancel()


# ---- what it lets pass


@pytest.mark.parametrize("wire", ["own", "sdk"])
async def test_connections_that_are_kept_for_the_next_request_are_put_away(wire: str):
    with await in_thread(Endpoint().start) as endpoint:
        async with openai.AsyncOpenAI(base_url=endpoint.url, api_key="any") as client:
            agent = asking(endpoint) if wire == "own" else BaseAgent("A", "a", client=client)
            async with assert_nothing_left():
                assert (await agent.run("hi")).success
            await in_thread(endpoint.wait_until_closed)
            assert (await agent.run("hi again")).success


def test_the_event_loop_of_blocking_calls_is_put_away_if_the_block_has_started_it():
    with Endpoint() as endpoint:
        for _ in range(2):
            with assert_nothing_left():
                assert sync.run(asking(endpoint), "hi").success
            endpoint.wait_until_closed()


def test_an_event_loop_of_blocking_calls_that_ran_before_goes_on():
    with Endpoint() as endpoint:
        sync.run(asking(endpoint), "hi")
        [before] = [thread for thread in threading.enumerate() if thread.name.startswith("fractal portal")]
        with assert_nothing_left():
            assert sync.run(asking(endpoint), "hi").success
        assert before.is_alive()


def test_a_loop_with_all_its_agents_leaves_nothing(backend: str):
    with Endpoint() as endpoint, assert_nothing_left():
        assert anyio.run(asking(endpoint).run, "hi", backend=backend).success


def test_a_block_that_is_the_first_of_its_process_to_use_uvloop_leaves_nothing():
    pytest.importorskip("uvloop")
    program = """
        import anyio
        from fractal.testing import assert_nothing_left

        for use_uvloop in (False, True):
            with assert_nothing_left(within=0.05):
                anyio.run(anyio.sleep, 0, backend_options={"use_uvloop": use_uvloop})
    """
    subprocess.run([sys.executable, "-c", textwrap.dedent(program)], check=True)


def test_a_thread_that_is_listed_as_abandoned_may_go_on(backend: str, until_the_end: threading.Event):
    @tool
    def outlive() -> None:
        until_the_end.wait()

    agent = BaseAgent("A", "a", client=ScriptedModel([answers.call("outlive")]), timeout=0.1).add_tool(outlive)
    with assert_nothing_left(within=0.05):
        anyio.run(agent.run, "go", backend=backend)
    assert [each.name for each in abandoned_threads()] == ["tool 'outlive'"]
    until_the_end.set()
    assert not wait_until_empty(lambda: [each.name for each in abandoned_threads()], 5)


async def test_idle_threads_that_the_loop_keeps_are_nobodys():
    async with assert_nothing_left(within=0.05):
        await in_thread(int)


# ---- what it waits for


def test_a_thread_that_is_ending_is_waited_for():
    with assert_nothing_left():
        threading.Timer(0.1, int).start()


async def test_a_task_that_is_ending_is_waited_for():
    async with anyio.create_task_group() as group, assert_nothing_left():
        group.start_soon(anyio.sleep, 0.05)


# ---- and what it does not hide


def test_a_block_that_fails_tells_its_own_error(until_the_end: threading.Event):
    thread = threading.Thread(target=until_the_end.wait)
    with pytest.raises(ValueError, match="mine"), assert_nothing_left():
        thread.start()
        raise ValueError("mine")
    until_the_end.set()
    thread.join()


@pytest.mark.parametrize("use", ["sync", "async"])
def test_a_cut_goes_through_the_block(use: str, backend: str):
    async def cut() -> None:
        with anyio.move_on_after(0.01):
            if use == "async":
                async with assert_nothing_left():
                    await anyio.sleep_forever()
            with assert_nothing_left():
                await anyio.sleep_forever()

    started = time.monotonic()
    anyio.run(cut, backend=backend)
    assert time.monotonic() - started < 4
