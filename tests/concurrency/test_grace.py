"""Time to clean up: one cancellation, peace for the grace, and cancellation for good; and whose cancellations count."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Generator
from contextlib import suppress
from functools import partial
from typing import Any

import anyio
import anyio.lowlevel
import pytest
import trio

from fractal import (
    BaseAgent,
    FallbackModel,
    LimitedModel,
    Limits,
    RaceModel,
    UnexpectedError,
    run_many,
    stream_many,
    tool,
)
from fractal._concurrency import grace as _grace
from fractal._concurrency.current import current_run
from fractal._concurrency.grace import answered, graced
from fractal.model import ModelRequest, Reply
from fractal.testing import ScriptedModel, answers
from tests.schedules import in_virtual_time
from tests.support import outcomes

HISTORY: list[dict[str, Any]] = [{"role": role, "content": "word " * 10} for role in ("user", "assistant") * 3]


class Session:
    """A thing whose end awaits, as a transaction that is rolled back."""

    def __init__(self, seconds: float = 0.1) -> None:
        self.seconds = seconds
        self.log: list[str] = []
        self.opened = anyio.Event()

    async def use(self) -> None:
        """Use it until somebody cancels this."""
        try:
            self.opened.set()
            await anyio.sleep(60)
        finally:
            self.log.append("begun")
            await anyio.sleep(0)
            await anyio.sleep(self.seconds)
            async with anyio.create_task_group() as group:
                group.start_soon(anyio.sleep, 0)
            self.log.append("done")

    async def hold(self) -> None:
        """As `use`, in a context manager."""
        async with self:
            self.opened.set()
            await anyio.sleep(60)

    async def __aenter__(self) -> None:
        pass

    async def __aexit__(self, *exc: object) -> None:
        self.log.append("begun")
        await anyio.sleep(self.seconds)
        self.log.append("done")


class Doing:
    """A model that awaits something."""

    def __init__(self, function: Callable[[], Awaitable[object]]) -> None:
        self.function = function

    async def respond(self, request: ModelRequest) -> Reply:
        await self.function()
        return Reply(text="done")


def agent_with(place: str, function: Callable[[], Awaitable[object]]) -> tuple[BaseAgent, dict[str, Any]]:
    """An agent that awaits a function in some place, and what else a run of it takes."""

    async def hook(*_: object) -> Any:
        await function()
        return "x"

    async def prompt() -> str:
        await function()
        return "p"

    done = ScriptedModel(lambda request: "done")
    if place in MODELS:
        return BaseAgent("A", "a", client=model_with(place, function)), {}
    if place in (*TOOLS, "approve"):
        called = tool_with(place, function)
        model = ScriptedModel(lambda request: "done" if len(request.transcript) > 1 else answers.call("work"))
        agent = BaseAgent("A", "a", client=model).add_tool(called, name="work")
        return agent, {"approve": hook} if place == "approve" else {}
    if place == "compact":
        return BaseAgent("A", "a", client=done, context_window=40, compact=hook), {"messages": HISTORY}
    agent = BaseAgent("A", prompt if place == "prompt" else "a", client=done)
    if place != "prompt":
        agent.output_validator(hook if place == "validator" else lambda value: hook())
    return agent, {}


def tool_with(place: str, function: Callable[[], Awaitable[object]]) -> Any:
    async def work() -> str:
        await function()
        return "worked"

    def late() -> Awaitable[Any]:
        return work()

    async def stepwise() -> AsyncIterator[str]:
        await function()
        yield "x"

    @tool(requires_approval=True)
    async def pay() -> str:
        return "paid"

    tools: dict[str, Any] = {
        "tool": work,
        "awaitable of a plain tool": late,
        "generator tool": stepwise,
        "approve": pay,
    }
    return tools[place]


def model_with(place: str, function: Callable[[], Awaitable[object]]) -> Any:
    models: dict[str, Callable[[], Any]] = {
        "model": lambda: Doing(function),
        "fallback": lambda: FallbackModel(Doing(function), Doing(anyio.lowlevel.checkpoint)),
        "limited": lambda: LimitedModel(Doing(function), max_concurrency=1),
        "race": lambda: RaceModel(Doing(function), Doing(lambda: anyio.sleep(60))),
    }
    return models[place]()


TOOLS = ["tool", "awaitable of a plain tool", "generator tool"]
MODELS = ["model", "fallback", "limited", "race"]
PLACES = ["tool", "generator tool", "prompt", "approve", "compact", "validator", *MODELS]
BEHIND_THREADS = ["awaitable of a plain tool", "awaitable of a plain validator"]
places = pytest.mark.parametrize("place", PLACES)
places_behind_threads = pytest.mark.parametrize("place", BEHIND_THREADS)


# ---- ways to be cut


CUT = 0.2


async def by_timeout(agent: BaseAgent, options: dict[str, Any], session: Session) -> None:
    assert (await agent.run("go", timeout=CUT, **options)).stop_reason == "deadline"


async def by_scope(agent: BaseAgent, options: dict[str, Any], session: Session) -> None:
    async with anyio.create_task_group() as group:
        group.start_soon(partial(agent.run, "go", **options))
        await session.opened.wait()
        group.cancel_scope.cancel()


async def by_stream(agent: BaseAgent, options: dict[str, Any], session: Session) -> None:
    async with agent.stream("go", **options):
        await session.opened.wait()


async def by_batch(agent: BaseAgent, options: dict[str, Any], session: Session) -> None:
    with anyio.move_on_after(CUT):
        await run_many(agent, ["go"], **options)


async def by_task(agent: BaseAgent, options: dict[str, Any], session: Session) -> None:
    task = asyncio.ensure_future(agent.run("go", **options))
    await session.opened.wait()
    task.cancel()
    await asyncio.wait([task])


async def by_two_cancellations(agent: BaseAgent, options: dict[str, Any], session: Session) -> None:
    task = asyncio.ensure_future(agent.run("go", **options))
    await session.opened.wait()
    task.cancel()
    await asyncio.sleep(0.03)
    task.cancel()
    await asyncio.wait([task])


async def by_wait_for(agent: BaseAgent, options: dict[str, Any], session: Session) -> None:
    with suppress(TimeoutError):
        await asyncio.wait_for(agent.run("go", **options), CUT)


ON_ASYNCIO = [by_task, by_two_cancellations, by_wait_for]
WAYS = [by_timeout, by_scope, by_stream, by_batch, *ON_ASYNCIO]


@in_virtual_time
@places
@pytest.mark.parametrize("way", WAYS, ids=lambda each: each.__name__)
async def test_a_cleanup_that_awaits_comes_to_its_end(place: str, way: Any, anyio_backend_name: str):
    if way in ON_ASYNCIO and anyio_backend_name != "asyncio":
        pytest.skip("asyncio's own")
    session = Session()
    agent, options = agent_with(place, session.use)
    with anyio.fail_after(5):
        await way(agent, options, session)
    assert session.log == ["begun", "done"]


@places_behind_threads
@pytest.mark.parametrize("way", [by_scope, by_stream, by_task], ids=lambda each: each.__name__)
async def test_the_cleanup_of_what_a_thread_has_returned_comes_to_its_end(
    place: str, way: Any, anyio_backend_name: str
):
    if way in ON_ASYNCIO and anyio_backend_name != "asyncio":
        pytest.skip("asyncio's own")
    session = Session(seconds=0.02)
    agent, options = agent_with(place, session.use)
    with anyio.fail_after(5):
        await way(agent, options, session)
    assert session.log == ["begun", "done"]


@pytest.mark.parametrize("place", ["tool", "validator", "model"])
async def test_a_context_manager_that_awaits_at_its_end_comes_to_it(place: str):
    session = Session()
    agent, options = agent_with(place, session.hold)
    with anyio.fail_after(5):
        await agent.run("go", timeout=0.1, **options)
    assert session.log == ["begun", "done"]


@in_virtual_time
async def test_a_tool_past_its_own_time_has_its_grace_and_disturbs_no_sibling():
    session = Session()

    @tool(timeout=0.1)
    async def brief() -> None:
        await session.use()

    async def sibling() -> str:
        await anyio.sleep(0.4)
        return "the sibling's"

    model = ScriptedModel([answers.calls(answers.call("brief"), answers.call("sibling")), "done"])
    result = await BaseAgent("A", "a", client=model).add_tool(brief).add_tool(sibling).run("go")
    assert (session.log, outcomes(result)) == (["begun", "done"], ["timeout", "ok"])


@in_virtual_time
async def test_a_request_past_its_time_has_its_grace():
    session = Session()
    agent = BaseAgent("A", "a", client=Doing(session.use), limits=Limits(request_timeout=0.1))
    result = await agent.run("go", max_retries=0)
    assert (session.log, result.success) == (["begun", "done"], False)


@in_virtual_time
@places
async def test_a_cleanup_that_outlasts_its_grace_is_cancelled_for_good_and_named(place: str):
    session = Session(seconds=60)
    agent, options = agent_with(place, session.use)
    with anyio.fail_after(5):
        started = anyio.current_time()
        result = await agent.run("go", timeout=0.1, limits=Limits(grace=0.3), **options)
    assert session.log == ["begun"]
    assert anyio.current_time() - started == pytest.approx(0.4)
    assert result.stop_reason == "deadline"


@in_virtual_time
@pytest.mark.parametrize("place", ["tool", "prompt", "model"])
async def test_what_does_not_stop_after_its_grace_is_named(place: str):
    async def hold_on() -> None:
        ends = anyio.current_time() + 0.8
        while anyio.current_time() < ends:
            with suppress(BaseException):
                await anyio.sleep(0.6)

    agent, options = agent_with(place, hold_on)
    with anyio.fail_after(5):
        result = await agent.run("go", timeout=0.1, limits=Limits(grace=0.1), **options)
    [warning] = result.warnings
    assert "has not stopped 0.1 s after it was cancelled" in warning
    assert "in hold_on" in warning


@in_virtual_time
async def test_without_grace_a_cleanup_is_cut_at_its_first_await():
    session = Session()
    agent, options = agent_with("tool", session.use)
    await agent.run("go", timeout=0.1, limits=Limits(grace=0), **options)
    assert session.log == ["begun"]


@in_virtual_time
@pytest.mark.parametrize("place", ["tool", "validator", "model"])
async def test_what_swallows_its_cancellations_in_a_loop_is_told_of_few(place: str):
    told = 0

    async def swallow() -> None:
        nonlocal told
        ends = anyio.current_time() + 1
        while anyio.current_time() < ends:
            try:
                await anyio.sleep(0.5)
            except BaseException:  # just what nobody should do
                told += 1

    agent, options = agent_with(place, swallow)
    with anyio.fail_after(5):
        await agent.run("go", timeout=0.05, limits=Limits(grace=0.1), **options)
    assert 1 < told < 150


@in_virtual_time
@pytest.mark.parametrize("way", ["awaited", "gathered", "in a task of a task"])
@pytest.mark.parametrize("place", ["tool", "prompt", "model"])
async def test_tasks_that_it_awaits_are_told_once_and_come_to_their_end(place: str, way: str, anyio_backend_name: str):
    if anyio_backend_name == "trio":
        pytest.skip("asyncio's own: a task that waits for another leaves it to that to be cancelled")
    session, told = Session(), 0

    async def hold_out() -> None:
        nonlocal told
        try:
            await asyncio.sleep(60)
        except asyncio.CancelledError:
            ends = anyio.current_time() + 0.05
            while anyio.current_time() < ends:
                try:
                    await asyncio.sleep(0.05)
                except asyncio.CancelledError:
                    told += 1
            raise

    async def use() -> None:
        if way == "awaited":
            await asyncio.ensure_future(session.use())
        elif way == "gathered":
            await asyncio.gather(session.use(), hold_out(), return_exceptions=True)
        else:
            await asyncio.ensure_future(asyncio.ensure_future(hold_out()))
            session.log += ["never"]

    agent, options = agent_with(place, use)
    with anyio.fail_after(5):
        await agent.run("go", timeout=0.1, **options)
    assert session.log == ([] if "of a task" in way else ["begun", "done"])
    assert told == 0


async def test_a_run_that_is_cut_before_a_tool_has_begun_calls_it_not_at_all():
    called: list[str] = []

    async def work() -> None:
        called.append("work")

    agent = BaseAgent("A", "a", client=ScriptedModel([answers.call("work"), "done"])).add_tool(work)
    with anyio.CancelScope() as scope:
        agent.observers = (lambda event: scope.cancel() if event.kind == "model_responded" else None,)
        await agent.run("go")
    assert called == []


# ---- scopes, groups and nurseries of the function's own


async def test_a_scope_of_the_tools_own_goes_before_the_grace():
    """The scope has to see its cancellation come out; what follows it has the grace."""
    log: list[str] = []

    async def work() -> None:
        with anyio.move_on_after(0.1) as scope:
            try:
                await anyio.sleep(60)
            finally:
                time.sleep(0.15)  # noqa: ASYNC251  # the run's time is over too
                log.append("first")
        log.append(f"caught {scope.cancelled_caught}")
        try:
            await anyio.sleep(60)
        finally:
            await anyio.sleep(0.05)
            log.append("second")

    agent, _ = agent_with("tool", work)
    with anyio.fail_after(5):
        await agent.run("go", timeout=0.2)
    assert log[0] == "first"
    assert log[-1] in ("second", "first")


async def cut_behind_shield(agent: BaseAgent, is_shielded: anyio.Event, goes_on: anyio.Event) -> None:
    """Run an agent, cut the run while its tool waits behind a shield, and then let the tool go on."""
    async with anyio.create_task_group() as group:
        group.start_soon(agent.run, "go")
        await is_shielded.wait()
        group.cancel_scope.cancel()
        with anyio.CancelScope(shield=True):
            await anyio.lowlevel.checkpoint()
            await anyio.lowlevel.checkpoint()
            goes_on.set()


async def test_a_scope_that_ends_behind_a_shield_while_the_run_is_cut_leaves_the_cleanup_its_grace(
    anyio_backend_name: str,
):
    """What comes out of the scope is the cancellation, as it has told the tool: there is none after that."""
    if anyio_backend_name == "trio":
        pytest.skip("there the tool is told again")
    log: list[str] = []
    is_shielded, goes_on = anyio.Event(), anyio.Event()

    async def work() -> None:
        try:
            with anyio.move_on_after(0):
                try:
                    await anyio.sleep(60)
                finally:
                    with anyio.CancelScope(shield=True):
                        is_shielded.set()
                        await goes_on.wait()
        finally:
            log.append("begun")
            await anyio.sleep(0)
            await anyio.sleep(0.01)
            log.append("done")

    agent, _ = agent_with("tool", work)
    with anyio.fail_after(5):
        await cut_behind_shield(agent, is_shielded, goes_on)
    assert log == ["begun", "done"]


async def test_a_scope_that_ends_in_the_moment_of_the_cut_leaves_the_cleanup_its_grace(anyio_backend_name: str):
    if anyio_backend_name == "trio":
        pytest.skip("there the tool is told again")
    log: list[str] = []
    opened = anyio.Event()

    @tool(timeout=0.1)
    async def work() -> None:
        try:
            try:
                with anyio.move_on_after(0.05):
                    opened.set()
                    await anyio.sleep(60)
            finally:
                with anyio.CancelScope(shield=True):
                    await anyio.sleep(0.01)
            await anyio.sleep(60)
        finally:
            log.append("begun")
            await anyio.sleep(0)
            await anyio.sleep(0.01)
            log.append("done")

    agent = BaseAgent("A", "a", client=ScriptedModel([answers.call("work"), "done"])).add_tool(work)
    with anyio.fail_after(5):
        async with anyio.create_task_group() as group:
            group.start_soon(agent.run, "go")
            await opened.wait()
            time.sleep(0.2)  # noqa: ASYNC251  # both times are over when the event loop looks again
    assert log == ["begun", "done"]


@pytest.mark.parametrize("inside", [False, True])
async def test_what_follows_a_scope_that_has_ended_is_told_that_the_run_is_cut(inside: bool):
    """The shield after it, and one in a task of the tool's own, are no part of that scope."""
    log: list[str] = []
    is_shielded, goes_on = anyio.Event(), anyio.Event()

    async def hold() -> None:
        with anyio.CancelScope(shield=True):
            is_shielded.set()
            await goes_on.wait()

    async def work() -> None:
        with anyio.move_on_after(0):
            await anyio.sleep(60)
        try:
            if inside:
                async with anyio.create_task_group() as group:
                    group.start_soon(hold)
            else:
                await hold()
            await anyio.sleep(60)
        finally:
            log.append("told")

    agent, _ = agent_with("tool", work)
    with anyio.fail_after(3):
        await cut_behind_shield(agent, is_shielded, goes_on)
    assert log == ["told"]


@in_virtual_time
@pytest.mark.parametrize("where", ["inside", "around"])
async def test_groups_of_the_tools_own_end_with_it(where: str):
    log: list[str] = []

    async def child() -> None:
        try:
            await anyio.sleep(60)
        finally:
            log.append("child")

    async def work() -> None:
        try:
            async with anyio.create_task_group() as group:
                group.start_soon(child)
                await anyio.sleep(60) if where == "inside" else None
        finally:
            await anyio.sleep(0.05)
            log.append("work")

    agent, _ = agent_with("tool", work)
    with anyio.fail_after(5):
        result = await agent.run("go", timeout=0.1)
    assert (log, outcomes(result)) == (["child", "work"], ["timeout"])


@in_virtual_time
async def test_a_second_cancellation_leaves_runs_alone_that_a_cleanup_begins(anyio_backend_name: str):
    if anyio_backend_name != "asyncio":
        pytest.skip("asyncio's own")
    log: list[str] = []
    reporter = BaseAgent("Reporter", "r", client=Doing(lambda: anyio.sleep(0.1)))
    opened = asyncio.Event()

    async def work() -> None:
        try:
            opened.set()
            await anyio.sleep(60)
        finally:
            log.append(str((await reporter.run("it was cut")).content))

    agent, _ = agent_with("tool", work)
    task = asyncio.ensure_future(agent.run("go"))
    with anyio.fail_after(5):
        await opened.wait()
        for _ in range(2):
            task.cancel()
            await asyncio.sleep(0.03)
        await asyncio.wait([task])
    assert (log, task.cancelled()) == (["done"], True)


@in_virtual_time
async def test_a_scope_that_is_left_by_itself_while_the_run_is_cut_is_no_end_of_the_grace():
    log: list[str] = []

    async def work() -> None:
        try:
            await anyio.sleep(60)
        finally:
            with anyio.move_on_after(0.05) as scope:
                await anyio.sleep(60)
            log.append(f"{scope.cancelled_caught}")
            await anyio.sleep(0.05)
            log.append("done")

    agent, _ = agent_with("tool", work)
    with anyio.fail_after(5):
        await agent.run("go", timeout=0.1)
    assert log == ["True", "done"]


async def test_an_awaitable_that_is_no_coroutine_is_awaited_all_the_same():
    class Ready:
        def __await__(self) -> Any:
            return iter(())

    class Slow:
        def __await__(self) -> Generator[Any, Any, str]:
            yield from anyio.sleep(0.01).__await__()
            return "x"

    for awaitable in (Ready, Slow):
        agent = BaseAgent("A", "a", client=ScriptedModel(lambda request: "done"))
        agent.output_validator(lambda value, awaitable=awaitable: awaitable())
        assert (await agent.run("go")).success, awaitable


async def test_a_future_is_awaited_as_a_hooks_answer(anyio_backend_name: str):
    if anyio_backend_name != "asyncio":
        pytest.skip("asyncio's own")
    loop = asyncio.get_running_loop()

    def approve(_: Any) -> Any:
        future = loop.create_future()
        loop.call_soon_threadsafe(future.set_result, True)
        return future

    agent, _ = agent_with("approve", anyio.lowlevel.checkpoint)
    assert outcomes(await agent.run("go", approve=approve)) == ["ok"]


# ---- cancellations that are nobody's order


async def own_way() -> None:
    """Await a task that it has cancelled itself, when it is cancelled: right in asyncio."""
    worker = asyncio.ensure_future(asyncio.sleep(60))
    try:
        await asyncio.wait([worker])
    except asyncio.CancelledError:
        worker.cancel()
    await worker


async def cancelled_inside() -> None:
    """Await what something else cancels."""
    worker = asyncio.ensure_future(asyncio.sleep(60))
    asyncio.get_running_loop().call_later(0.01, worker.cancel)
    await worker


async def cancels_itself() -> None:
    task = asyncio.current_task()
    assert task is not None
    task.cancel()
    await asyncio.sleep(60)


async def raises_it() -> None:
    raise asyncio.CancelledError


async def in_a_group_of_its_own() -> None:
    async with anyio.create_task_group() as group:
        group.start_soon(cancelled_inside)
        await asyncio.sleep(60)


foreign = pytest.mark.parametrize(
    "function", [cancelled_inside, cancels_itself, raises_it], ids=lambda each: each.__name__
)


def require_asyncio(function: object, backend: str) -> None:
    if backend != "asyncio" and function is not raises_it:
        pytest.skip("asyncio's own")


@in_virtual_time
@foreign
async def test_a_foreign_cancellation_is_the_failure_of_a_tool(function: Any, anyio_backend_name: str):
    require_asyncio(function, anyio_backend_name)

    async def sibling() -> str:
        await anyio.sleep(0.05)
        return "the sibling's"

    async def work() -> None:
        await function()

    calls = answers.calls(answers.call("work"), answers.call("sibling"), answers.call("work"))
    agent = BaseAgent("A", "a", client=ScriptedModel([calls, "done"])).add_tool(work).add_tool(sibling)
    result = await agent.run("go", timeout=5)
    assert (result.content, outcomes(result)) == ("done", ["error", "ok", "error"])
    assert "cancelled from inside" in (result.tool_results[0].error or "")
    assert (await agent.execute_tool("work")).outcome == "error"


@foreign
@pytest.mark.parametrize("place", ["prompt", "validator", "awaitable of a plain validator", "compact", *MODELS[:1]])
async def test_a_foreign_cancellation_is_the_failure_of_a_hook(place: str, function: Any, anyio_backend_name: str):
    require_asyncio(function, anyio_backend_name)
    agent, options = agent_with(place, function)
    result = await agent.run("go", max_retries=0, timeout=5, **options)
    assert not result.success or result.warnings
    if not result.success:
        assert isinstance(result.exception, UnexpectedError)
        assert "cancelled from inside" in str(result.error)


@foreign
async def test_a_foreign_cancellation_denies_when_it_is_asked_for_approval(function: Any, anyio_backend_name: str):
    require_asyncio(function, anyio_backend_name)
    agent, options = agent_with("approve", function)
    result = await agent.run("go", **options)
    assert (result.content, outcomes(result)) == ("done", ["denied"])


@in_virtual_time
@pytest.mark.parametrize("place", ["prompt", "validator", "compact", "approve", "tool", "model"])
async def test_what_ends_in_its_own_way_when_it_is_cut_is_out_of_time(place: str, anyio_backend_name: str):
    if anyio_backend_name != "asyncio":
        pytest.skip("asyncio's own")
    agent, options = agent_with(place, own_way)
    assert (await agent.run("go", timeout=0.1, **options)).stop_reason == "deadline"
    with anyio.move_on_after(0.1) as scope:
        await agent.run("go", **options)
    assert scope.cancelled_caught
    with pytest.raises(TimeoutError):
        await asyncio.wait_for(agent.run("go", **options), 0.1)


@in_virtual_time
async def test_a_tool_past_its_time_that_ends_in_its_own_way_disturbs_no_sibling(anyio_backend_name: str):
    if anyio_backend_name != "asyncio":
        pytest.skip("asyncio's own")

    async def sibling() -> str:
        await asyncio.sleep(0.3)
        return "the sibling's"

    model = ScriptedModel([answers.calls(answers.call("own_way"), answers.call("sibling")), "done"])
    agent = BaseAgent("A", "a", client=model).add_tool(tool(timeout=0.1)(own_way)).add_tool(sibling)
    result = await agent.run("go")
    assert (result.content, outcomes(result)) == ("done", ["timeout", "ok"])


@foreign
@pytest.mark.parametrize("concurrency", [1, 3])
async def test_a_batch_has_a_result_for_each_input_whatever_is_cancelled_inside(
    concurrency: int, function: Any, anyio_backend_name: str
):
    require_asyncio(function, anyio_backend_name)

    async def prompt(ctx: Any) -> str:
        ctx.deps.append(1)
        if len(ctx.deps) in (1, 3, 5):
            await function()
        return "p"

    agent = BaseAgent("A", prompt, client=ScriptedModel(lambda request: "done"))
    results = await run_many(agent, range(5), max_concurrency=concurrency, deps=[])
    assert [result.success for result in results].count(True) == 2
    assert len(results) == 5
    seen = [item.index async for item in _items(agent, concurrency)]
    assert sorted(seen) == [0, 1, 2, 3, 4]


async def _items(agent: BaseAgent, concurrency: int) -> AsyncIterator[Any]:
    async with stream_many(agent, range(5), max_concurrency=concurrency, deps=[]) as batch:
        async for item in batch:
            yield item


async def test_a_foreign_cancellation_out_of_the_inputs_ends_the_batch_with_an_error():
    async def inputs() -> AsyncIterator[str]:
        yield "a"
        await raises_it()

    agent = BaseAgent("A", "a", client=ScriptedModel(lambda request: "done"))
    with anyio.fail_after(5), pytest.raises(UnexpectedError, match="the iterator of inputs was cancelled from inside"):
        await run_many(agent, inputs())


@pytest.mark.parametrize("place", ["tool", "validator", "approve"])
async def test_a_cancellation_out_of_an_event_loop_in_a_thread_is_a_failure(place: str):
    async def inner() -> None:
        task = asyncio.ensure_future(asyncio.sleep(5))
        asyncio.get_running_loop().call_later(0.02, task.cancel)
        await task

    def reads(*_: object) -> None:
        asyncio.run(inner())

    @tool(requires_approval=place == "approve")
    def work() -> None:
        reads()

    model = ScriptedModel(lambda request: "done" if len(request.transcript) > 1 else answers.call("work"))
    agent = BaseAgent("A", "a", client=model if place != "validator" else ScriptedModel(["done"])).add_tool(work)
    if place == "validator":
        agent.output_validator(lambda value: reads())
    result = await agent.run("go", approve=reads if place == "approve" else None)
    if place == "validator":
        assert isinstance(result.exception, UnexpectedError)
    else:
        assert (result.content, outcomes(result)) == ("done", ["error" if place == "tool" else "denied"])


async def test_a_cancellation_of_trio_out_of_a_thread_is_a_failure():
    async def inner() -> None:
        with trio.CancelScope() as scope:
            scope.cancel()
            await trio.sleep(1)
        raise ValueError("after it")

    def reads() -> None:
        trio.run(inner)

    model = ScriptedModel([answers.call("reads"), "done"])
    result = await BaseAgent("A", "a", client=model).add_tool(reads).run("go")
    assert (result.content, outcomes(result)) == ("done", ["error"])


async def test_a_group_without_a_cancellation_leaves_as_it_is():
    group = ExceptionGroup("both", [ValueError(), LookupError()])

    async def fail() -> None:
        raise group

    with pytest.raises(ExceptionGroup) as caught:
        await _grace.settled(fail(), "the hook")
    assert caught.value is group


async def test_an_awaitable_in_its_grace_can_be_ended_and_a_pause_ends_with_what_comes_in_it():
    ended = list[str]()

    async def wait() -> None:
        try:
            await anyio.lowlevel.checkpoint()
        finally:
            ended.append("here")

    def pause() -> Generator[Any, Any, None]:
        try:
            yield
        finally:
            ended.append("pause")

    watched: Any = _grace._Watched(wait(), None, None, anyio.CancelScope())
    watched._rest, watched._after_rest = pause(), lambda: "told"
    next(watched._rest)
    assert watched.throw(LookupError) == "told"
    assert (ended, watched._rest) == (["pause"], None)
    watched._steps.send(None)
    watched.close()
    assert ended == ["pause", "here"]


async def test_a_future_that_has_ended_passes_no_cancellation_on(anyio_backend_name: str):
    if anyio_backend_name != "asyncio":
        pytest.skip("asyncio's own")
    held: asyncio.Future[None] = asyncio.get_running_loop().create_future()
    work = anyio.lowlevel.checkpoint()
    watched: Any = _grace._Watched(work, None, None, anyio.CancelScope())
    assert watched._pass_on(held, lambda: "told") is held
    held.set_result(None) if not held.cancelled() else None
    assert watched._pass_on(held, lambda: "told") == "told"
    await work


async def test_a_run_above_in_another_event_loop_gives_no_grace_and_hears_no_warning():
    """As where a plain tool calls `sync.start`: its context has the run, and its event loop is another one."""

    class Elsewhere:
        class clock:
            is_here = False

    async def work() -> str:
        return "done"

    above: Any = Elsewhere()
    token = current_run.set(above)
    try:
        assert await graced(work()) == "done"
    finally:
        current_run.reset(token)


async def test_of_a_group_with_cancellations_that_nobody_asked_for_the_others_come_out():
    async def work() -> None:
        raise BaseExceptionGroup("both", [asyncio.CancelledError(), ValueError("no luck")])

    with pytest.raises(ExceptionGroup) as caught:
        await answered(work(), "it")
    assert [repr(each) for each in caught.value.exceptions] == ["ValueError('no luck')"]
