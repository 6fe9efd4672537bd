"""What awaiting code opens, opened and used from blocking code: agents with pools, and async functions."""

from __future__ import annotations

import asyncio
import gc
import logging
import threading
from collections.abc import AsyncGenerator, Awaitable, Callable
from contextlib import asynccontextmanager, suppress
from contextvars import ContextVar
from types import TracebackType
from typing import Any, Self

import anyio
import pytest
from anyio.lowlevel import current_token

from fractal import BaseAgent, InvalidArguments, RunCancelled, SyncInAsyncError, sync, tool
from fractal._agent import verbs
from fractal.sync import _entered
from fractal.sync._portal import Portal
from fractal.testing import ScriptedModel, answers
from tests.support import LOOPS

USE = answers.calls(answers.call("use"))
ASK = answers.calls(answers.call("ask"))


class Opening:
    """What agents with a pool have in common: they note what happens, and in which task and event loop."""

    seen: list[Any]
    suppress = False
    at_begin: Callable[[], Awaitable[object]] | None = None
    at_end: Callable[[], Awaitable[object]] | None = None

    def _note(self, what: str) -> None:
        self.__dict__.setdefault("seen", []).append(what)

    async def __aenter__(self) -> Self:
        if self.at_begin is not None:
            await self.at_begin()
        # As a task group has it: it can only be left where it was entered.
        scope = self.__dict__.setdefault("scopes", {})[anyio.get_current_task().id] = anyio.CancelScope()
        scope.__enter__()
        self.loop = current_token().native_token
        self._note("open")
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> bool:
        self.__dict__["scopes"].pop(anyio.get_current_task().id).__exit__(None, None, None)
        if self.at_end is not None:
            await self.at_end()
        self._note(f"closed by {kind.__name__}" if kind is not None else "closed")
        return self.suppress

    @tool
    async def use(self) -> str:
        """Use it."""
        assert current_token().native_token is self.loop
        self._note("used")
        return "used"


class Shop(Opening, sync.BaseAgent):
    """A blocking one."""


class AwaitingShop(Opening, BaseAgent):
    """An awaiting one."""


def shop(kind: Any = Shop, *steps: Any) -> Any:
    return kind("Shop", "s", client=ScriptedModel([*(steps or (USE, "done"))]))


def block_of(one: Any) -> Any:
    """The block that opens an agent, of either class."""
    return one if isinstance(one, sync.BaseAgent) else sync.enter(one)


def use(one: Any) -> Any:
    return sync.run(one, "go")


@pytest.fixture(params=[Shop, AwaitingShop])
def one(request: pytest.FixtureRequest) -> Any:
    return shop(request.param)


# ---- agents


def test_a_block_opens_an_agent_in_the_loop_of_its_runs_and_closes_it(one: Any, loop: str, shared_portal: Portal):
    with block_of(one) as opened:
        assert opened is one
        assert use(one).content == "done"
    assert one.seen == ["open", "used", "closed"]


def test_a_block_closes_an_agent_however_it_ends(one: Any, loop: str, shared_portal: Portal):
    with pytest.raises(LookupError), block_of(one):
        raise LookupError
    assert one.seen == ["open", "closed by LookupError"]


def test_an_agent_may_suppress_what_ended_its_block(one: Any, loop: str, shared_portal: Portal):
    one.__dict__["suppress"] = True
    with block_of(one):
        raise LookupError
    assert one.seen == ["open", "closed by LookupError"]


async def failing() -> None:
    raise ValueError("no pool")


def test_what_cannot_be_opened_is_told_and_no_block_begins(one: Any, loop: str, shared_portal: Portal):
    one.__dict__["at_begin"] = failing
    with pytest.raises(ValueError, match="no pool"), block_of(one):
        pytest.fail("it is open")
    del one.__dict__["at_begin"]
    with block_of(one):
        assert use(one).content == "done"
    assert one.seen == ["open", "used", "closed"]


def test_what_cannot_be_closed_is_told(one: Any, loop: str, shared_portal: Portal):
    one.__dict__["at_end"] = failing
    with pytest.raises(ValueError, match="no pool"), block_of(one):
        pass


def test_a_block_in_a_plain_tool_is_a_part_of_its_run(one: Any, loop: str, shared_portal: Portal):
    def ask() -> str:
        with block_of(one):
            return str(use(one).content)

    chief = BaseAgent("C", "c", client=ScriptedModel([ASK, "told"])).add_tool(ask)
    result = sync.run(chief, "go")
    assert result.tool_results[0].content == "done"
    assert result.usage.requests == 4
    assert one.seen == ["open", "used", "closed"]


def test_a_block_that_a_plain_tool_has_left_open_is_closed_with_its_call(loop: str, shared_portal: Portal):
    one, kept = shop(AwaitingShop), list[Any]()

    def ask() -> None:
        kept.append(sync.enter(one))
        kept[0].__enter__()

    chief = BaseAgent("C", "c", client=ScriptedModel([ASK, "told"])).add_tool(ask)
    assert sync.run(chief, "go").content == "told"
    assert one.seen[0] == "open"
    assert one.seen[1].startswith("closed by Cancelled")
    assert kept[0].__exit__(None, None, None) is False


def test_a_block_that_a_cancelled_tool_is_in_is_closed(loop: str, shared_portal: Portal):
    one, is_in = shop(AwaitingShop), threading.Event()

    def ask() -> None:
        with sync.enter(one):
            is_in.set()
            sync.call(anyio.sleep_forever)

    chief = BaseAgent("C", "c", client=ScriptedModel([ASK])).add_tool(ask)
    handle = sync.start(chief, "go")
    assert is_in.wait(5)
    handle.cancel()
    with pytest.raises(RunCancelled):
        handle.result(5)
    assert one.seen[0] == "open"
    assert one.seen[1].startswith("closed by ")


def test_the_end_of_the_event_loop_closes_what_is_open(loop: str):
    one = shop(AwaitingShop)
    with sync.portal(**LOOPS[loop]):
        block = sync.enter(one)
        block.__enter__()
    assert one.seen[1].startswith("closed by Cancelled")
    assert block.__exit__(None, None, None) is False


def test_what_cannot_be_closed_in_time_at_the_end_of_the_event_loop_is_named(
    loop: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
):
    monkeypatch.setattr(_entered, "GRACE", 0.05)
    one = shop(AwaitingShop)
    one.__dict__["at_end"] = anyio.sleep_forever
    with caplog.at_level(logging.WARNING, "fractal"), sync.portal(**LOOPS[loop]):
        sync.enter(one).__enter__()
    assert "had to be left, and has not been in 0.05 s" in caplog.text


def test_a_block_in_the_garbage_is_closed(loop: str, shared_portal: Portal):
    one, closed = shop(AwaitingShop), threading.Event()

    async def tell() -> None:
        closed.set()

    one.__dict__["at_end"] = tell
    block: Any = sync.enter(one)
    block.__enter__()
    block.me = block
    del block
    gc.collect()
    assert closed.wait(5)


def test_a_block_is_closed_in_its_own_event_loop_without_waiting(loop: str, shared_portal: Portal):
    one, closed = shop(AwaitingShop), threading.Event()

    async def tell() -> None:
        closed.set()

    one.__dict__["at_end"] = tell
    block = sync.enter(one)
    block.__enter__()

    async def leave() -> bool:
        return block.__exit__(None, None, None)

    assert sync.call(leave) is False
    assert closed.wait(5)


def test_several_threads_may_have_a_blocking_agent_open_each_for_itself(loop: str, shared_portal: Portal):
    one, all_in = Shop("Shop", "s", client=ScriptedModel(lambda _: "done")), threading.Barrier(4)
    contents: list[Any] = []

    def work() -> None:
        with one:
            all_in.wait(5)
            contents.append(one.run("go").content)

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(10)
    assert contents == ["done"] * 4
    assert sorted(one.seen) == ["closed"] * 4 + ["open"] * 4


def test_a_blocking_agent_is_open_once_for_each_block_around_it(loop: str, shared_portal: Portal):
    one = shop(Shop)
    with one, one:
        assert one.seen == ["open", "open"]
    assert one.seen == ["open", "open", "closed", "closed"]


def test_a_blocking_agent_may_be_left_in_another_thread(loop: str, shared_portal: Portal):
    one = shop(Shop)
    one.__enter__()
    thread = threading.Thread(target=one.__exit__, args=(None, None, None))
    thread.start()
    thread.join(10)
    assert one.seen == ["open", "closed"]


def test_a_blocking_agent_without_a_pool_closes_its_connections(
    loop: str, shared_portal: Portal, monkeypatch: pytest.MonkeyPatch
):
    released: list[str] = []

    async def release(agent: object) -> None:
        released.append("released")

    monkeypatch.setattr(verbs, "release", release)
    with sync.BaseAgent("P", "p", client=ScriptedModel(["done"])) as plain:
        assert plain.run("go").content == "done"
        assert released == []
    assert released


def test_a_blocking_agent_can_be_closed_without_a_block(
    loop: str, shared_portal: Portal, monkeypatch: pytest.MonkeyPatch
):
    released: list[str] = []

    async def release(agent: object) -> None:
        released.append("released")

    monkeypatch.setattr(verbs, "release", release)
    sync.BaseAgent("P", "p", client=ScriptedModel([])).close()
    assert released == ["released"]


async def test_a_blocking_agent_is_opened_by_awaiting_code_as_well():
    one = shop(Shop)
    async with one as opened:
        assert opened is one
    assert one.seen == ["open", "closed"]


def test_a_block_that_is_cancelled_while_it_is_left_is_left_all_the_same(loop: str, shared_portal: Portal):
    one, began, release = shop(AwaitingShop), threading.Event(), threading.Event()
    errors: list[BaseException] = []

    async def slow() -> None:
        began.set()
        while not release.is_set():  # noqa: ASYNC110  # an event of threads
            await anyio.sleep(0.002)

    def leave() -> None:
        try:
            block.__exit__(None, None, None)
        except RunCancelled as error:
            errors.append(error)

    one.__dict__["at_end"] = slow
    block = sync.enter(one)
    block.__enter__()
    thread = threading.Thread(target=leave)
    thread.start()
    assert began.wait(5)
    assert block._call is not None
    block._call.cancel_from_thread()
    sync.call(anyio.lowlevel.checkpoint)  # the event loop has heard of it
    release.set()
    thread.join(10)
    assert len(errors) == 1
    assert one.seen == ["open", "closed"]


def test_what_says_itself_that_it_was_cancelled_is_told(loop: str, shared_portal: Portal):
    async def cancelled() -> None:
        raise RunCancelled("as somebody wanted")

    one = shop(AwaitingShop)
    one.__dict__["at_end"] = cancelled
    with pytest.raises(RunCancelled, match="as somebody wanted"), sync.enter(one):
        pass


def test_a_block_is_left_when_all_tasks_are_cancelled_natively(loop: str, shared_portal: Portal):
    if loop == "trio":
        pytest.skip("asyncio's own")
    one = shop(AwaitingShop)
    block = sync.enter(one)
    block.__enter__()

    async def cancel_all() -> None:
        for task in asyncio.all_tasks():
            task.cancel()
        await anyio.sleep(0)

    with pytest.raises(RunCancelled):
        sync.call(cancel_all)
    with suppress(RunCancelled):  # if it has not ended by then
        block.__exit__(None, None, None)
    assert one.seen == ["open", "closed by CancelledError"]


# ---- other things


@asynccontextmanager
async def pool(seen: list[str]) -> AsyncGenerator[str]:
    seen.append("open")
    try:
        async with anyio.create_task_group():
            yield "pool"
    finally:
        seen.append("closed")


def test_anything_for_async_with_can_be_entered(loop: str, shared_portal: Portal):
    seen: list[str] = []
    with sync.enter(pool(seen)) as opened:
        assert opened == "pool"
        assert seen == ["open"]
    assert seen == ["open", "closed"]


def test_what_is_no_async_context_manager_cannot_be_entered():
    wrong: Any = threading.Lock()
    with pytest.raises(InvalidArguments, match="give something for `async with`"):
        sync.enter(wrong)


def test_a_block_is_entered_once_and_left_only_after_that(loop: str, shared_portal: Portal):
    block = sync.enter(pool([]))
    with pytest.raises(InvalidArguments, match="has not begun"):
        block.__exit__(None, None, None)
    with block, pytest.raises(InvalidArguments, match="entered once"):
        block.__enter__()


def test_a_block_of_a_tools_thread_stays_there(loop: str, shared_portal: Portal):
    seen, errors = list[str](), list[BaseException]()

    def ask() -> None:
        def leave() -> None:
            try:
                block.__exit__(None, None, None)
            except InvalidArguments as error:
                errors.append(error)

        block = sync.enter(pool(seen))
        block.__enter__()
        thread = threading.Thread(target=leave)
        thread.start()
        thread.join(10)

    chief = BaseAgent("C", "c", client=ScriptedModel([ASK, "told"])).add_tool(ask)
    assert sync.run(chief, "go", timeout=10).content == "told"
    assert "stays in the tool's thread" in str(errors[0])
    assert seen == ["open", "closed"]


def test_an_async_function_is_called_with_what_is_given(loop: str, shared_portal: Portal):
    variable: ContextVar[str] = ContextVar("variable")
    variable.set("context")

    async def told(*words: str, end: str) -> str:
        await anyio.sleep(0)
        return " ".join([*words, variable.get(), end])

    assert sync.call(told, "a", "b", end="!") == "a b context !"


def test_what_an_async_function_raises_is_raised(loop: str, shared_portal: Portal):
    with pytest.raises(ValueError, match="no pool"):
        sync.call(failing)


def test_what_is_no_async_function_cannot_be_called(shared_portal: Portal):
    wrong: Any = failing()
    with pytest.raises(InvalidArguments, match="give an async function"):
        sync.call(wrong)
    for wrong in (object(), None):
        with pytest.raises(InvalidArguments, match="give an async function"):
            sync.call(wrong)
    wrong = len
    with pytest.raises(InvalidArguments, match="it is no async function"):
        sync.call(wrong, "text")


def test_an_async_function_in_a_plain_tool_ends_with_its_run(loop: str, shared_portal: Portal):
    ended, seen = threading.Event(), list[str]()

    async def wait() -> None:
        try:
            await anyio.sleep_forever()
        finally:
            seen.append("ended")

    def ask() -> None:
        try:
            sync.call(wait)
        finally:
            ended.set()

    chief = BaseAgent("C", "c", client=ScriptedModel([ASK])).add_tool(ask)
    assert sync.run(chief, "go", timeout=0.2).stop_reason == "deadline"
    assert ended.wait(5)
    assert seen == ["ended"]


def test_a_call_in_the_event_loop_that_would_answer_it_is_an_error(shared_portal: Portal):
    async def ask() -> None:
        sync.call(anyio.sleep, 0)

    with pytest.raises(SyncInAsyncError):
        sync.call(ask)


def test_a_block_ends_without_an_error_where_its_tool_was_left_to_itself_in_that_moment():
    """The end of the block reaches a call that is over: whoever left the tool to itself has told."""

    class Over:
        has_ended = must_not_wait = False
        is_over = True

        def end(self, leave: Callable[[], object]) -> None:
            pass

        def result(self) -> bool:
            raise RunCancelled

        def cancel_from_thread(self) -> None:
            pass

    block: Any = sync.enter(BaseAgent("A", "a"))
    block._call = block._caller = Over()
    assert block.__exit__(None, None, None) is False
