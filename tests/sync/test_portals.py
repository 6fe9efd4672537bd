"""The event loops of blocking callers at their edges: what ends them, who leaves them, and where from."""

from __future__ import annotations

import asyncio
import contextvars
import gc
import logging
import random
import signal
import subprocess
import sys
import textwrap
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from typing import Any

import anyio
import pytest
from fastapi import Depends, FastAPI
from fastapi.testclient import TestClient

from fractal import (
    AgentResult,
    BaseAgent,
    FractalError,
    InvalidArguments,
    PortalClosed,
    RunCancelled,
    SyncInAsyncError,
    abandoned_threads,
    sync,
    tool,
)
from fractal.sync import _event_loop
from fractal.sync._portal import Portal
from fractal.testing import ScriptedModel, answers
from tests.support import LOOPS, Talkative, outcomes, portal_threads, until


def agent(*steps: Any, **options: Any) -> BaseAgent:
    return BaseAgent("A", "a", client=ScriptedModel(list(steps) or (lambda _: "hello")), **options)


GOOD = agent()
ASK = answers.calls(answers.call("ask"))


def talkative() -> BaseAgent:
    """An agent whose answer does not end."""
    return BaseAgent("A", "a", client=Talkative())


# ---- what ends a loop


def interrupting_approver() -> tuple[BaseAgent, type[BaseException]]:
    @tool(requires_approval=True)
    async def ask() -> None: ...

    def approve(_: object) -> bool:  # as a prompt does at which somebody presses Ctrl-C, in whatever thread it runs
        raise KeyboardInterrupt

    return agent(ASK, approve=approve).add_tool(ask), KeyboardInterrupt


def interrupted_tool(*, is_async: bool) -> tuple[BaseAgent, type[BaseException]]:
    def ask() -> None:
        raise KeyboardInterrupt

    async def ask_async() -> None:
        ask()

    return agent(ASK).add_tool(ask_async if is_async else ask, name="ask"), KeyboardInterrupt


def interrupted_observer() -> tuple[BaseAgent, type[BaseException]]:
    def observe(event: Any) -> None:
        if event.kind == "tool_started":
            raise KeyboardInterrupt

    return agent(ASK, observers=[observe]).add_tool(lambda: None, name="ask"), KeyboardInterrupt


def leaving_validator() -> tuple[BaseAgent, type[BaseException]]:
    one = agent()

    @one.output_validator
    async def leave(_: object) -> None:
        sys.exit("validator")

    return one, SystemExit


def leaving_prompt() -> tuple[BaseAgent, type[BaseException]]:
    return BaseAgent("A", lambda: sys.exit("prompt"), client=ScriptedModel([])), SystemExit


ENDERS: dict[str, Callable[[], tuple[BaseAgent, type[BaseException]]]] = {
    "an approver": interrupting_approver,
    "a plain tool": lambda: interrupted_tool(is_async=False),
    "an async tool": lambda: interrupted_tool(is_async=True),
    "an observer": interrupted_observer,
    "a validator": leaving_validator,
    "a prompt function": leaving_prompt,
}


def read(one: BaseAgent) -> AgentResult:
    with sync.stream(one, "go", timeout=5) as stream:
        return stream.result()


def read_many(one: BaseAgent) -> list[Any]:
    with sync.stream_many(one, ["go"], timeout=5) as batch:
        return list(batch)


VERBS: dict[str, Callable[[BaseAgent], Any]] = {
    "run": lambda one: sync.run(one, "go", timeout=5),
    "run_many": lambda one: sync.run_many(one, ["go"], timeout=5),
    "start": lambda one: sync.start(one, "go", timeout=5).result(),
    "stream": read,
    "stream_many": read_many,
}


@pytest.mark.parametrize("verb", VERBS)
@pytest.mark.parametrize("ender", ENDERS)
def test_ctrl_c_and_sys_exit_in_a_run_are_its_callers_and_end_nothing_else(
    ender: str, verb: str, shared_portal: Portal
):
    free = threading.Event()

    async def wait() -> str:
        while not free.is_set():  # noqa: ASYNC110  # an event of threads
            await anyio.sleep(0.002)
        return "waited"

    other = sync.start(agent(answers.call("wait"), "other").add_tool(wait), "go")
    one, error = ENDERS[ender]()
    with pytest.raises(error):
        VERBS[verb](one)
    for again in VERBS.values():
        assert again(GOOD)
    free.set()
    assert other.result(5).content == "other"


@pytest.mark.parametrize("how", ["stop", "all tasks"])
def test_a_tool_that_ends_asyncios_loop_ends_no_later_call(how: str, loop: str, shared_portal: Portal):
    if loop == "trio":
        pytest.skip("asyncio's own")

    async def end() -> str:
        if how == "stop":
            asyncio.get_running_loop().stop()
        else:
            for task in asyncio.all_tasks():
                task.cancel()
        await asyncio.sleep(0.01)
        return "went on"

    one = agent(answers.call("end"), "done").add_tool(end)
    try:
        assert sync.run(one, "go", timeout=5).content == "done"
        assert how == "stop"
    except RunCancelled:
        assert how == "all tasks"
    for verb in VERBS.values():
        assert verb(GOOD)


# ---- leaving


def portal_dependency(**options: Any) -> Callable[[], Iterator[Portal]]:
    def opened() -> Iterator[Portal]:
        with sync.portal(**options) as portal:
            yield portal

    return opened


def test_a_dependency_of_fastapi_may_hold_a_portal(loop: str, shared_portal: Portal):
    app, seen = FastAPI(), list[Portal]()
    held = Depends(portal_dependency(**LOOPS[loop]))

    @app.get("/")
    def answer(portal: Any = held) -> Any:
        seen.append(portal)
        return sync.run(GOOD, "go").content

    with TestClient(app) as client:
        assert [client.get("/").json() for _ in range(3)] == ["hello"] * 3
    assert len(seen) == 3
    assert not any(portal.is_running for portal in seen)


def test_a_generator_that_holds_a_portal_and_is_dropped_ends_it(loop: str):
    generator = portal_dependency(**LOOPS[loop])()
    portal = contextvars.copy_context().run(next, generator)
    del generator
    assert not portal.is_running


def test_what_was_opened_in_a_block_does_not_start_it_again(loop: str, shared_portal: Portal):
    before = len(portal_threads())
    with sync.portal(**LOOPS[loop]):
        copy = contextvars.copy_context()
        stream = sync.stream(talkative(), "go").__enter__()
        batch = sync.stream_many(GOOD, ["a", "b"]).__enter__()
        handle = sync.start(talkative(), "go")
        next(stream)
    assert stream.result().stop_reason == "cancelled"
    for use in (lambda: next(stream), lambda: next(batch), handle.result):
        with pytest.raises((RunCancelled, StopIteration)):
            use()
    stream.__exit__(None, None, None)
    batch.__exit__(None, None, None)
    for verb in VERBS.values():
        with pytest.raises(PortalClosed):
            copy.run(verb, GOOD)
    assert len(portal_threads()) == before


def test_calls_of_threads_that_share_a_portal_end_when_its_block_is_left(loop: str):
    """A race: some of them come while it closes; none may be lost, and none may hang."""
    ends, threads = Counter[str](), list[threading.Thread]()
    for seed in range(25):
        over = threading.Event()

        def work(over: threading.Event = over) -> None:
            while not over.is_set():
                try:
                    sync.run(GOOD, "go")
                    ends["ok"] += 1
                except FractalError as error:
                    ends[type(error).__name__] += 1

        with sync.portal(**LOOPS[loop]):
            begun = [threading.Thread(target=contextvars.copy_context().run, args=(work,)) for _ in range(3)]
            threads += begun
            for thread in begun:
                thread.start()
            time.sleep(random.Random(seed).random() * 0.01)
        over.set()
        for thread in begun:
            thread.join(10)
    assert not [thread for thread in threads if thread.is_alive()]
    assert set(ends) <= {"ok", "RunCancelled", "PortalClosed"}
    assert ends["ok"]


# ---- what does not end


def closing_in(seconds: float, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_event_loop, "CLOSE_TIMEOUT", seconds)


def test_a_tool_that_is_to_be_waited_for_is_so_at_the_end_of_a_block_and_is_named(
    loop: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
):
    closing_in(0.3, monkeypatch)
    began, ended = threading.Event(), threading.Event()

    @tool(on_cancel="wait")
    def ask() -> None:
        began.set()
        time.sleep(0.7)
        ended.set()

    with sync.portal(**LOOPS[loop]) as portal:
        handle = sync.start(agent(ASK).add_tool(ask), "go")
        began.wait(5)
    assert ended.is_set()
    assert not portal.is_running
    with pytest.raises(RunCancelled) as caught:
        handle.result(0)
    assert outcomes(caught.value.result) == ["ok"]
    [told] = [record.getMessage() for record in caplog.records if "goes on" in record.getMessage()]
    assert "tool 'ask' at test_portals.py:" in told
    assert told.endswith("it is waited for")


def test_what_holds_out_against_its_cancellation_is_named_and_left(
    loop: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
):
    closing_in(0.2, monkeypatch)
    began, free = threading.Event(), threading.Event()

    async def ask() -> None:
        began.set()
        while not free.is_set():
            try:
                await anyio.sleep(0.01)
            except BaseException:
                with anyio.CancelScope(shield=True):
                    await anyio.sleep(0.01)

    with sync.portal(**LOOPS[loop]) as portal:
        sync.start(agent(ASK).add_tool(ask), "go")
        began.wait(5)
    assert portal.is_running
    [told] = [record.getMessage() for record in caplog.records if "is closed" in record.getMessage()]
    assert "ask at test_portals.py:" in told
    assert told.endswith("it is left to itself")
    free.set()
    until(lambda: not portal.is_running)


def test_a_function_that_blocks_the_loop_is_named_when_the_portal_closes(
    loop: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
):
    closing_in(0.1, monkeypatch)
    began, free = threading.Event(), threading.Event()

    async def ask() -> None:
        began.set()
        free.wait(10)

    with sync.portal(**LOOPS[loop]) as portal:
        sync.start(agent(ASK).add_tool(ask), "go")
        began.wait(5)
    assert "the event loop is blocked at test_portals.py:" in caplog.text
    free.set()
    until(lambda: not portal.is_running)


@pytest.mark.parametrize("on_cancel", ["abandon", "wait"])
def test_a_plain_tool_may_close_the_portal_that_runs_it(on_cancel: Any, loop: str):
    ended = threading.Event()

    @tool(on_cancel=on_cancel)
    def ask() -> None:
        portal.close()
        ended.set()

    with sync.portal(**LOOPS[loop]) as portal, pytest.raises(RunCancelled):
        sync.run(agent(ASK).add_tool(ask), "go")
    assert ended.wait(5)
    until(lambda: not abandoned_threads())


# ---- the garbage collector


def opened(make: Callable[[], AbstractContextManager[Any]]) -> Iterator[Any]:
    with make() as block:
        yield from block


BLOCKS: dict[str, Callable[[], AbstractContextManager[Any]]] = {
    "stream": lambda: sync.stream(talkative(), "go", timeout=60),
    "batch": lambda: sync.stream_many(GOOD, (str(n) for n in range(10**9)), max_concurrency=1, timeout=60),
}


@pytest.mark.parametrize("where", ["loop", "thread of a tool", "elsewhere"])
@pytest.mark.parametrize("block", BLOCKS)
def test_a_generator_that_is_collected_ends_what_it_has_opened_and_hangs_nobody(
    block: str, where: str, shared_portal: Portal
):
    class Client:  # a request handler, a session …: in a cycle with the generator it reads from
        pass

    client: Any = Client()
    client.me, client.frames = client, opened(BLOCKS[block])
    next(client.frames)
    running = shared_portal.running()
    under_way = len(tasks(shared_portal))
    del client

    async def collect() -> None:
        gc.collect()

    if where == "elsewhere":
        gc.collect()
    else:
        plain = where == "thread of a tool"
        one = agent(ASK, "done").add_tool(gc.collect if plain else collect, name="ask")
        assert sync.run(one, "go", timeout=5).content == "done"
    until(lambda: len(tasks(shared_portal)) < under_way)
    assert sync.run(GOOD, "go", timeout=5).content == "hello"
    assert shared_portal.running() is running


def tasks(portal: Portal) -> list[str]:
    async def look() -> list[str]:
        return [str(task.name) for task in anyio.get_running_tasks() if str(task.name).startswith("fractal ")]

    return sync.call(look)


def test_a_block_in_the_garbage_is_ended_without_a_generator(shared_portal: Portal):
    stream: Any = sync.stream(talkative(), "go").__enter__()
    next(stream)
    stream.me = stream
    del stream
    gc.collect()
    until(lambda: not tasks(shared_portal))


# ---- in the loop itself


@pytest.mark.parametrize("what", ["stream", "handle"])
def test_what_was_opened_elsewhere_and_is_waited_for_in_its_own_loop_is_an_error(what: str, shared_portal: Portal):
    handle = sync.start(talkative(), "go")
    with sync.stream(talkative(), "go") as stream:
        next(stream)

        async def ask() -> None:
            stream.result() if what == "stream" else handle.result()

        result = sync.run(agent(ASK, "done").add_tool(ask), "go", timeout=5)
        assert isinstance(result.tool_results[0].exception, SyncInAsyncError)
    handle.cancel()
    with pytest.raises(RunCancelled):
        handle.result(5)


def test_a_stream_of_a_tools_thread_stays_there(shared_portal: Portal):
    streams: list[Any] = []

    def ask() -> None:
        streams.append(sync.stream(talkative(), "go").__enter__())

    assert sync.run(agent(ASK, "done").add_tool(ask), "go").content == "done"
    with pytest.raises(InvalidArguments, match="stays in the tool's thread"):
        next(streams[0])
    streams[0].__exit__(None, None, None)
    assert not tasks(shared_portal)


# ---- signal handlers


HANDLER = """
import signal, sys, threading, time
from fractal import BaseAgent, sync
from fractal.testing import ScriptedModel

options = {"asyncio": {}, "uvloop": {"use_uvloop": True}, "trio": {"backend": "trio"}}[sys.argv[1]]
good = BaseAgent("G", "g", client=ScriptedModel(lambda _: "hello"))
handled = 0
is_inside = False

def handler(*_):
    global handled, is_inside
    if is_inside:
        return
    is_inside = True
    try:
        handled += sync.run(good, "last words").content == "hello"
        with sync.stream(good, "x") as stream:
            handled += stream.result().success
        handle.cancel()
    finally:
        is_inside = False

signal.signal(signal.SIGALRM, handler)
from fractal.sync import _event_loop, _portal
_event_loop.CLOSE_TIMEOUT = 30  # a busy machine is slow, and is interrupted all the time
_portal._shared = _portal.Portal(**options)
handle = sync.start(good, "x")
rounds = int(sys.argv[2])
for round in range(rounds):
    # At another moment each time, and again while it starts.
    _portal._shared.close()
    signal.setitimer(signal.ITIMER_REAL, 0.0002 + 0.0001 * (round % 50), 0.0011)
    handle = sync.start(good, "x")
    assert sync.run(good, "x").content == "hello"
    with sync.portal(**options):
        assert sync.run_many(good, ["x", "y"])[1].content == "hello"
    signal.setitimer(signal.ITIMER_REAL, 0)
print("handled" if handled > rounds / 10 else handled)
"""


@pytest.mark.skipif(not hasattr(signal, "setitimer"), reason="needs signals")
@pytest.mark.parametrize("rounds", [20, pytest.param(300, marks=pytest.mark.slow)])
def test_a_signal_handler_may_call_whatever_it_interrupts(loop: str, rounds: int):
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(HANDLER), loop, str(rounds)], capture_output=True, text=True, timeout=100
    )
    assert (done.stdout, done.stderr, done.returncode) == ("handled\n", "", 0)


def test_a_call_that_comes_while_a_block_is_left_uses_the_former_portal(loop: str, monkeypatch: pytest.MonkeyPatch):
    """As of a signal handler, which may interrupt AnyIO in a copy of the context."""
    said: list[object] = []
    ask_to_end = _event_loop.EventLoop.ask_to_end

    def interrupted(of: _event_loop.EventLoop) -> None:
        monkeypatch.undo()
        said.append(contextvars.copy_context().run(sync.run, GOOD, "last words").content)
        ask_to_end(of)

    with sync.portal(**LOOPS[loop]):
        monkeypatch.setattr(_event_loop.EventLoop, "ask_to_end", interrupted)
    assert said == ["hello"]


def test_an_error_of_a_signal_handler_is_not_taken_for_the_end_of_the_loop(monkeypatch: pytest.MonkeyPatch, loop: str):
    with sync.portal(**LOOPS[loop]) as portal:
        backend = portal._loop._token.backend_class  # type: ignore[union-attr]

        def interrupted(*_: object) -> None:
            monkeypatch.undo()
            raise RuntimeError("a handler's")

        monkeypatch.setattr(backend, "run_sync_soon", interrupted)
        with pytest.raises(RuntimeError, match="a handler's"):
            portal.close()


def test_a_block_whose_end_was_interrupted_is_ended_for_good(loop: str, monkeypatch: pytest.MonkeyPatch):
    wait_for_end, is_waited_for = _event_loop.EventLoop._wait_for_end, threading.Event()

    def interrupted(ending: _event_loop.EventLoop, *given: Any) -> Any:
        if ending is not this:  # the end of an earlier test's
            return wait_for_end(ending, *given)
        monkeypatch.undo()
        is_waited_for.set()
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt), sync.portal(**LOOPS[loop]) as portal:
        context, this = contextvars.copy_context(), portal.running()
        this._soon(is_waited_for.wait, 20)  # it does not end before
        monkeypatch.setattr(_event_loop.EventLoop, "_wait_for_end", interrupted)
    gc.collect()
    until(lambda: not portal.is_running)
    with pytest.raises(PortalClosed):
        context.run(sync.run, GOOD, "hi")
    assert sync.run(GOOD, "hi").content == "hello"


# ---- at the end of the program


END = """
import sys, threading, time
from fractal import BaseAgent, sync, tool
from fractal.testing import ScriptedModel, answers
from fractal.sync import _event_loop
_event_loop.CLOSE_TIMEOUT = 0.5
began = threading.Barrier(3)

@tool(on_cancel="wait")
def pay():
    began.wait()
    time.sleep(1)
    print("paid", flush=True)

@tool
async def clean_up():
    import anyio
    try:
        await anyio.to_thread.run_sync(began.wait)
        await anyio.sleep(60)
    finally:
        with anyio.CancelScope(shield=True):
            await anyio.sleep(0.1)
        print("cleaned up", flush=True)

options = {"asyncio": {}, "uvloop": {"use_uvloop": True}, "trio": {"backend": "trio"}}[sys.argv[1]]
own = sync.portal(**options)
own.__enter__()
for name in ("pay", "clean_up"):
    agent = BaseAgent("A", "a", client=ScriptedModel([answers.call(name)])).add_tool(pay).add_tool(clean_up)
    sync.start(agent, "go")
began.wait()
"""


def test_at_the_end_of_the_program_what_runs_is_cancelled_and_what_is_to_be_waited_for_is(loop: str):
    done = subprocess.run([sys.executable, "-c", END, loop], capture_output=True, text=True, timeout=30)
    assert done.stdout == "cleaned up\npaid\n"
    assert done.returncode == 0
    assert "tool 'pay'" in done.stderr
    assert "it is waited for" in done.stderr


def test_the_log_of_a_portal_that_ends_as_it_should_is_empty(loop: str, caplog: pytest.LogCaptureFixture):
    with caplog.at_level(logging.DEBUG, "fractal.sync"), sync.portal(**LOOPS[loop]):
        assert sync.run(GOOD, "go").success
    assert "portal" not in caplog.text
