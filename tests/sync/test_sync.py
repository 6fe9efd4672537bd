"""The blocking facade, from every place a caller can be."""

from __future__ import annotations

import contextvars
import multiprocessing
import os
import signal
import subprocess
import sys
import textwrap
import threading
import time
import warnings
from collections.abc import Callable
from typing import Any

import anyio
import pytest

from fractal import (
    BaseAgent,
    FractalError,
    InvalidArguments,
    Limits,
    RunCancelled,
    SyncInAsyncError,
    sync,
    tool,
)
from fractal._concurrency.gates import tool_threads
from fractal._engine.below import Errand
from fractal.sync._portal import Portal
from fractal.testing import Endpoint, ScriptedModel, answers
from tests.forking import forked
from tests.support import assert_continuable, calls_then, outcomes, portal_threads

StartEndpoint = Callable[..., Endpoint]


def echo(**options: Any) -> BaseAgent:
    return BaseAgent("Echo", "echo", client=ScriptedModel(lambda r: r.transcript.messages[-1]["content"]), **options)


@pytest.fixture(params=["shared", "asyncio", "trio", pytest.param("uvloop", marks=pytest.mark.slow)])
def portal(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch):
    """The shared portal, and one of each kind for a block."""
    if request.param == "shared":
        # A new one: FastAPI's caches keep agents of other tests alive, and with them the connections of their loop.
        shared = Portal()
        monkeypatch.setattr("fractal.sync._portal._shared", shared)
        yield None
        shared.close()
        return
    kind = {"trio": {"backend": "trio"}, "uvloop": {"use_uvloop": True}}.get(request.param, {})
    with sync.portal(**kind) as own:
        yield own


def test_every_blocking_verb_answers(portal: object):
    agent = echo().add_tool(lambda a: a * 2, name="twice")
    assert sync.run(agent, "one").content == "one"
    assert agent.run_sync("two").content == "two"
    assert [r.content for r in sync.run_many(agent, ["a", "b", "c"], max_concurrency=2)] == ["a", "b", "c"]
    assert sync.execute_tool(agent, "twice", a=4).content == 8
    assert sync.start(agent, "four").result(timeout=5).content == "four"


def test_the_legacy_class_has_blocking_verbs_and_decorated_tools(portal: object, endpoint: StartEndpoint):
    class Legacy(sync.BaseAgent):
        @tool
        def plain(self, tool_name: str) -> str:
            return tool_name.upper()

        @tool
        async def later(self) -> str:
            await anyio.sleep(0)
            return "later"

    one = endpoint(calls_then("done", answers.call("plain", {"tool_name": "a"}), answers.call("later")))
    with Legacy("Legacy", "legacy") as agent:
        result = agent.run("go", 5, 1, timeout=20)
        assert (result.content, [call.content for call in result.tool_results]) == ("done", ["A", "later"])
        assert agent("go").content == agent.run_sync("go").content == "done"
        assert agent.execute_tool("plain", tool_name="b").content == "B"
        assert agent.call_agent(echo(), "hi").content == "hi"
    one.wait_until_closed()
    assert agent.run("go", messages=result.messages).success


def test_blocking_and_awaiting_agents_delegate_to_each_other(endpoint: StartEndpoint):
    legacy = sync.BaseAgent("legacy", "l", client=ScriptedModel(lambda _: "from legacy"))
    modern = BaseAgent(
        "modern", "m", client=ScriptedModel([[answers.call("delegate_to_legacy", {"query": "?"})], "ok"])
    )
    assert modern.register_delegate(legacy).run_sync("go").tool_results[0].content == "from legacy"


def test_failures_of_many_runs_are_results_in_order():
    def reply(request: Any) -> Any:
        text = request.transcript.messages[-1]["content"]
        return answers.failure(400, "odd") if int(text) % 2 else answers.text(text, delay=0.01 * (5 - int(text)))

    agent = BaseAgent("A", "a", client=ScriptedModel(reply))
    results = sync.run_many(agent, (str(n) for n in range(5)), max_concurrency=3)
    assert [r.content if r.success else r.stop_reason for r in results] == ["0", "model_error", "2", "model_error", "4"]
    with pytest.raises(InvalidArguments, match="max_concurrency"):
        sync.run_many(agent, ["0"], max_concurrency=0)


def test_many_runs_are_so_many_at_a_time_and_inputs_wait_outside(endpoint: StartEndpoint):
    one = endpoint("ok", latency=0.02)
    taken = 0

    def inputs() -> Any:
        nonlocal taken
        for n in range(20):
            taken += 1
            assert taken <= len(one.requests) + 3
            yield str(n)

    assert len(sync.run_many(BaseAgent("A", "a"), inputs(), max_concurrency=3)) == 20
    assert one.max_in_flight <= 3


def test_eight_threads_with_fifty_runs_each_share_one_loop_and_its_connections(endpoint: StartEndpoint):
    others = set(portal_threads())
    one = endpoint(
        lambda request: (
            answers.call("twice", {"n": int(request.body["messages"][-1]["content"])})
            if request.body["messages"][-1]["role"] == "user"
            else request.body["messages"][-1]["content"]
        )
    )
    agent = BaseAgent("A", "a").add_tool(lambda n: 2 * n, name="twice")
    right: list[bool] = []

    def ask(thread: int) -> None:
        numbers = range(1000 * thread, 1000 * thread + 50)
        right.extend(agent.run_sync(str(n)).content == str(2 * n) for n in numbers)

    threads = [threading.Thread(target=ask, args=(n,)) for n in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert right == [True] * 400
    assert len(set(portal_threads()) - others) <= 1
    assert one.connections_opened <= 8


@pytest.mark.parametrize("inner", ["shared", "asyncio", "trio"])
async def test_inside_a_running_loop_it_works_and_warns(inner: str):
    agent = echo()

    def use() -> object:
        if inner == "shared":
            return sync.run(agent, "hi").content
        with sync.portal(backend=inner):  # type: ignore[arg-type]
            return sync.run(agent, "hi").content

    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        assert use() == "hi"
    [warning] = caught
    assert warning.category is sync.LoopBlockedWarning
    assert warning.filename == __file__


class Blocking(sync.BaseAgent):
    @tool
    def look(self) -> str:
        return "seen"


@pytest.mark.parametrize(
    "use",
    [
        *(lambda: sync.run(echo(), "hi"), lambda: echo().run_sync("hi"), lambda: sync.run_many(echo(), ["hi"])),
        *(lambda: sync.start(echo(), "hi").result(), lambda: sync.call(anyio.sleep, 0)),
        *(lambda: blocking().run("hi"), lambda: blocking()("hi"), lambda: blocking().execute_tool("look")),
        *(lambda: entered(blocking()), lambda: entered(sync.enter(echo())), lambda: entered(sync.stream(echo(), "hi"))),
    ],
    ids=["run", "run_sync", "run_many", "start", "call", "verb", "agent()", "execute_tool", "with", "enter", "stream"],
)
async def test_the_warning_points_to_the_line_that_blocks(use: Callable[[], object]):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        use()
    assert {(each.category, each.filename) for each in caught} == {(sync.LoopBlockedWarning, __file__)}


def blocking() -> Blocking:
    return Blocking("B", "b", client=ScriptedModel(lambda request: "ok"))


def entered(block: Any) -> None:
    with block:
        pass


def test_on_the_portals_own_loop_it_is_an_error_and_no_deadlock(portal: object):
    agent = BaseAgent("A", "a", client=ScriptedModel([[answers.call("nested")], "done"]))

    async def nested() -> str:
        return str(sync.run(echo(), "hi").content)

    result = sync.run(agent.add_tool(nested), "go", timeout=20)
    assert outcomes(result) == ["error"]
    assert isinstance(result.tool_results[0].exception, SyncInAsyncError)


class Nesting(BaseAgent):
    """A plain tool that asks a slow child through the facade."""

    def __init__(self, child: BaseAgent, **options: Any) -> None:
        super().__init__("Nesting", "nesting", **options)
        self.child = child
        self.loops: list[object] = []
        self.raised: list[BaseException] = []

    @tool
    def ask(self) -> object:
        try:
            return sync.run(self.child, "?").content
        except BaseException as error:
            self.raised.append(error)
            raise

    @tool(on_cancel="wait")
    def ask_and_wait(self) -> object:
        return self.ask()


@pytest.mark.parametrize("name", ["ask", "ask_and_wait"])
async def test_in_a_plain_tool_it_joins_the_run_and_is_cut_by_its_deadline(name: str, endpoint: StartEndpoint):
    child_results: list[Any] = []
    one = endpoint(
        lambda request: (
            answers.text("late", delay=5)
            if request.body["messages"][0]["content"] == "child"
            else answers.calls(answers.call(name))
        )
    )
    child = BaseAgent(
        "child", "child", observers=[lambda e: child_results.append(e) if e.kind == "run_finished" else None]
    )
    agent = Nesting(child)
    before = len(portal_threads())
    result = await agent.run("go", timeout=0.3)
    assert result.elapsed < 2.5
    assert result.stop_reason == "deadline"
    assert [(e.depth, e.result.stop_reason) for e in child_results] == [(1, "deadline")]
    assert result.usage.requests == 2
    assert len(portal_threads()) == before  # no second loop
    one.wait_for_disconnects(1)
    assert_continuable(result)


async def test_a_tool_that_is_timed_out_has_not_ended_before_the_run_that_joined_it(endpoint: StartEndpoint):
    order: list[str] = []

    async def tidy() -> None:
        try:
            await anyio.sleep(5)
        finally:
            with anyio.CancelScope(shield=True):
                await anyio.sleep(0.2)

    model = ScriptedModel(lambda _: answers.call("tidy"))
    child = BaseAgent("child", "c", client=model, observers=[lambda e: order.append(f"{e.agent_name} {e.kind}")])
    agent = Nesting(
        child.add_tool(tidy),
        client=ScriptedModel([answers.call("ask"), "went on"]),
        limits=Limits(tool_timeout=0.1),
        observers=[lambda e: order.append(f"{e.agent_name} {e.kind}")],
    )
    result = await agent.run("go")
    assert (result.content, outcomes(result)) == ("went on", ["abandoned"])
    assert order.index("child run_finished") < order.index("Nesting tool_finished")


async def test_in_a_plain_tool_it_shares_the_budget(endpoint: StartEndpoint):
    one = endpoint(lambda request: answers.call("ask") if len(request.body["messages"]) == 2 else "done")
    child = BaseAgent("child", "child")
    result = await Nesting(child).run("go", limits=Limits(max_requests=2))
    assert len(one.requests) == 2
    assert result.stop_reason == "budget"


def streamed(agent: BaseAgent) -> object:
    with sync.stream(agent, "?") as stream:
        return stream.result().content


ASKING: dict[str, Callable[[BaseAgent], object]] = {
    "run": lambda agent: sync.run(agent, "?").content,
    "start": lambda agent: sync.start(agent, "?").result().content,
    "stream": streamed,
    "many": lambda agent: sync.run_many(agent, ["?"])[0].content,
}


@pytest.mark.parametrize("verb", ASKING)
async def test_more_nested_calls_than_there_are_threads_do_not_wait_for_each_other(
    verb: str, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(tool_threads, "_limit", 2)
    leaf = BaseAgent(
        "leaf", "l", client=ScriptedModel(lambda r: "leaf" if len(r.transcript) > 1 else answers.call("work"))
    )
    leaf.add_tool(lambda: time.sleep(0.01), name="work")
    model = ScriptedModel([[answers.call("ask") for _ in range(6)], "done"])
    agent = BaseAgent("A", "a", client=model).add_tool(lambda: ASKING[verb](leaf), name="ask")
    with anyio.fail_after(10):
        result = await agent.run("go")
    assert outcomes(result) == ["ok"] * 6
    assert tool_threads.held == 0


def test_context_variables_of_the_caller_reach_the_run(portal: object):
    variable = contextvars.ContextVar("variable", default="unset")
    agent = BaseAgent("A", "a", client=ScriptedModel(lambda r: "x" if len(r.transcript) > 1 else answers.call("look")))
    agent.add_tool(lambda: variable.get(), name="look")
    variable.set("mine")
    assert agent.run_sync("go").tool_results[0].content == "mine"


def test_a_handle_is_cancelled_from_another_thread(portal: object, endpoint: StartEndpoint):
    one = endpoint(answers.text("late", delay=5))
    handle = sync.start(BaseAgent("A", "a"), "go")
    one.wait_for_requests(1)
    assert not handle.done()
    with pytest.raises(TimeoutError, match="goes on"):
        handle.result(timeout=0.01)
    threading.Thread(target=handle.cancel).start()
    with pytest.raises(RunCancelled) as caught:
        handle.result(timeout=5)
    assert handle.done()
    assert caught.value.result.stop_reason == "cancelled"
    assert caught.value.result.messages == [{"role": "user", "content": "go"}]
    one.wait_for_disconnects(1)
    handle.cancel()  # once more does nothing


def test_a_handle_cancelled_at_once_never_asks(endpoint: StartEndpoint):
    one = endpoint("hello")
    agent = BaseAgent("A", "a")
    for _ in range(20):
        handle = sync.start(agent, "go")
        handle.cancel()
        try:
            handle.result(5)
        except RunCancelled:
            continue
    assert one.in_flight == 0


def test_a_handle_that_nobody_was_given_ends_its_run(portal: object):
    began, ended = threading.Event(), threading.Event()

    async def wait() -> None:
        began.set()
        try:
            await anyio.sleep_forever()
        finally:
            ended.set()

    handle = sync.Handle(BaseAgent("A", "a", client=ScriptedModel([answers.call("wait")])).add_tool(wait), "go")
    assert began.wait(5)
    del handle  # as when Ctrl-C comes in the moment in which `start` returns
    assert ended.wait(5)


def test_leaving_a_portals_block_cancels_what_runs_on_it(endpoint: StartEndpoint, backend: Any):
    one = endpoint(answers.text("late", delay=5))
    with sync.portal(backend=backend):
        handle = sync.start(BaseAgent("A", "a"), "go")
        one.wait_for_requests(1)
    with pytest.raises(RunCancelled):
        handle.result(timeout=5)
    one.wait_until_closed()


def test_a_timeout_bounds_a_blocking_run(portal: object, endpoint: StartEndpoint):
    endpoint(answers.text("late", delay=5))
    result = sync.run(BaseAgent("A", "a"), "go", timeout=0.2)
    assert (result.stop_reason, result.elapsed < 2.5) == ("deadline", True)


def test_wrong_use_is_raised_in_the_callers_thread(portal: object):
    with pytest.raises(InvalidArguments, match="user_input is None"):
        sync.run(echo(), None)
    with pytest.raises(InvalidArguments, match="timeout"):
        sync.run(echo(), "go", timeout=-1)


def test_a_backend_that_cannot_start_says_so():
    with pytest.raises(FractalError, match="no curio event loop"), sync.portal(backend="curio"):  # type: ignore[arg-type]
        pass


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs os.fork")
def test_after_a_fork_the_child_has_a_loop_of_its_own(endpoint: StartEndpoint):
    endpoint("hello")
    agent = BaseAgent("A", "a")
    assert agent.run_sync("parent").success
    with sync.portal(backend="trio"):
        assert agent.run_sync("parent").success
        for _ in range(2):
            assert forked(lambda: agent.run_sync("child", timeout=10).content == "hello") == 0
    context = multiprocessing.get_context("fork")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        process = context.Process(target=lambda: sys.exit(0 if agent.run_sync("child").success else 1))
        process.start()
    process.join(20)
    assert process.exitcode == 0
    assert agent.run_sync("parent again").success


SCRIPT = """
import anyio, sys, time
from fractal import BaseAgent, sync, tool

class Slow(BaseAgent):
    @tool
    async def slow(self):
        print("started", flush=True)
        try:
            await anyio.sleep(30)
        finally:
            with anyio.CancelScope(shield=True):
                await anyio.sleep(0.2)
            print("cleaned up", flush=True)

with sync.portal(backend=sys.argv[1]):
    try:
        sync.run(Slow("Slow", "slow"), "go")
    except KeyboardInterrupt:
        print("interrupted", flush=True)
"""


@pytest.mark.skipif(sys.platform == "win32", reason="needs SIGINT")
@pytest.mark.parametrize("while_doing", ["tool", "request"])
def test_ctrl_c_cancels_waits_for_the_cleanup_and_is_raised(
    while_doing: str, endpoint: StartEndpoint, backend: str, tmp_path: Any
):
    one = endpoint(answers.calls(answers.call("slow")) if while_doing == "tool" else answers.text("late", delay=30))
    program = tmp_path / "program.py"
    program.write_text(textwrap.dedent(SCRIPT))
    process = subprocess.Popen(
        [sys.executable, program, backend], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    one.wait_for_requests(1, timeout=20)
    if while_doing == "tool":
        assert process.stdout is not None
        assert process.stdout.readline() == "started\n"
    interrupted = time.monotonic()
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=20)
    assert out.split("\n")[:-1] == (["cleaned up", "interrupted"] if while_doing == "tool" else ["interrupted"])
    assert err == ""
    assert process.returncode == 0
    assert time.monotonic() - interrupted < 5
    one.wait_until_closed()


# The shared portal, which each of them uses first, is one of asyncio's.
@pytest.mark.parametrize(
    ("client", "backend"),
    [("None", "asyncio"), ("None", "trio"), ("openai.AsyncOpenAI()", "trio"), ("openai.OpenAI()", "trio")],
)
def test_a_program_that_uses_the_facade_ends_cleanly(client: str, endpoint: StartEndpoint, backend: str):
    one = endpoint(calls_then("done", answers.call("work")))
    code = (
        f"import time; from fractal import BaseAgent, sync\n{'' if client == 'None' else 'import openai'}\n"
        f"agent = BaseAgent('A', 'a', client={client}).add_tool(lambda: time.sleep(0.01), name='work')\n"
        "print(sync.run(agent, 'go').content)\n"
        f"own = sync.portal(backend={backend!r}); own.__enter__()\n"
        "handle = sync.start(agent, 'go'); print(handle.result(20).content)"
    )
    warn = ["-W", "error", "-W", "ignore:Async generator:ResourceWarning"]
    done = subprocess.run([sys.executable, *warn, "-c", code], capture_output=True, text=True, timeout=30)
    assert (done.stdout, done.stderr, done.returncode) == ("done\ndone\n", "", 0)
    one.wait_until_closed()


def test_a_call_that_its_run_cancels_before_it_has_begun_is_cancelled(monkeypatch: pytest.MonkeyPatch, backend: str):
    begun_here = Errand.begun_here

    def cancelled_at_once(cancel: Any) -> Errand | None:
        errand = begun_here(cancel)
        cancel()
        assert cancel.__self__.wait(5)
        return errand

    def ask() -> str:
        monkeypatch.setattr(Errand, "begun_here", cancelled_at_once)
        with pytest.raises(RunCancelled):
            sync.start(BaseAgent("B", "b", client=ScriptedModel(["never"])), "go").result(10)
        monkeypatch.undo()
        return "cancelled"

    agent = BaseAgent("A", "a", client=ScriptedModel([answers.call("ask"), "done"])).add_tool(ask)
    with sync.portal(backend=backend):
        result = sync.run(agent, "go", timeout=10)
    assert (result.content, [each.content for each in result.tool_results]) == ("done", ["cancelled"])
