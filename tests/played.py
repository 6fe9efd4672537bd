"""Random programs: how one is played, and what must hold of it whatever happens in it."""

from __future__ import annotations

import asyncio
import threading
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Generator, Sequence
from contextlib import contextmanager, nullcontext, suppress
from functools import partial
from typing import Any

import anyio
import anyio.to_thread
import trio
from anyio.lowlevel import checkpoint, current_token

import fractal.sync
from fractal import (
    AgentToolkit,
    BaseAgent,
    OpenAIModel,
    RunCancelled,
    RunContext,
    RunError,
    RunFinished,
    ToolFinished,
    ToolIgnoredCancellation,
    abandoned_threads,
    run_many,
    stream_many,
    tool,
)
from fractal._engine.run import Run, run_watchers
from fractal.model import ModelRequest, Reply
from fractal.models._http.pool import close_idle_pools
from fractal.sync import Portal
from fractal.sync._portal import PortalCall
from fractal.testing import Endpoint, ScriptedModel, answers
from fractal.testing._leftovers import Belongings, running_tasks, wait_until_empty
from fractal.testing._recording import assert_well_formed
from fractal.testing._seen_runs import Slots
from fractal.testing.answers import AnswerLike
from fractal.testing.endpoint import RecordedRequest
from tests.programs import UNIT, AgentPlan, Cut, Program, Step
from tests.schedules import run_shuffled
from tests.support import run_on
from tests.trees import Watcher, check_ledger, check_result
from tests.ways import Begun, begin, begin_in_thread, cancels_its_own

__all__ = ["Stage"]

PATIENCE = 10.0
"""Seconds; what has not ended by then hangs."""

_AT_WORK: dict[BaseAgent, tuple[Played, AgentPlan]] = {}


# ---- the tools, which look up what they are to do


def _of_call(ctx: RunContext, turn: int, number: int) -> tuple[Played, Begun, Step]:
    played, plan = _AT_WORK[ctx.agent]  # type: ignore[index]
    steps = plan.turns[turn] if turn < len(plan.turns) else None
    step = steps[min(number, len(steps) - 1)] if steps else _NOTHING
    children = [played.children[ctx.agent][each] for each in step.children]  # type: ignore[index]
    return played, Begun(played, ctx.agent, children, step.patience), step  # type: ignore[arg-type]


_NOTHING = Step("act", None, (), 0.0, 0.0, None, "returns", "none")


async def _do(ctx: RunContext, turn: int, number: int) -> str:
    played, begun, step = _of_call(ctx, turn, number)
    with played.at_work(ctx) as returned:
        try:
            with anyio.move_on_after(step.scope) if step.scope is not None else nullcontext():
                await anyio.sleep(step.delay)
                if step.way is not None:
                    await begin(step.way, begun)
            match step.then:
                case "raises":
                    raise ValueError("no luck")
                case "hangs":
                    await played.hang()
                case "cancels its own":
                    await cancels_its_own()
        except anyio.get_cancelled_exc_class():
            if step.cleanup == "none":
                raise
            await played.clean_up(step, begun)
            if step.cleanup != "goes on":
                raise
        returned()
        return "done"


def _block(ctx: RunContext, turn: int, number: int) -> str:
    played, begun, step = _of_call(ctx, turn, number)
    with played.at_work(ctx) as returned:
        time.sleep(step.delay)
        if step.way is not None and not (step.way in _NEEDS_CHILD and not begun.children):
            begin_in_thread(step.way, begun)
        if step.then == "raises":
            raise ValueError("no luck")
        returned()
        return "done"


_NEEDS_CHILD = ("read", "read_and_left", "batch_blocking")


def _async_tool(name: str, **options: Any) -> Any:
    @tool(name=name, **options)
    async def one(ctx: RunContext, turn: int, number: int) -> str:
        return await _do(ctx, turn, number)

    return one


def _plain_tool(name: str, **options: Any) -> Any:
    @tool(name=name, **options)
    def one(ctx: RunContext, turn: int, number: int) -> str:
        return _block(ctx, turn, number)

    return one


TOOLKIT = AgentToolkit(
    _async_tool("act"),
    _async_tool("act_alone", sequential=True),
    _async_tool("act_briefly", timeout=2 * UNIT),
    _async_tool("act_strictly", on_error="raise"),
    _plain_tool("wait", on_cancel="wait"),
    _plain_tool("leave"),
)


# ---- the models


def _answer(plan: AgentPlan, messages: Any) -> AnswerLike:
    turn = sum(message["role"] == "assistant" for message in messages)
    steps = plan.turns[turn] if turn < len(plan.turns) else None
    if steps is None:
        return answers.text("some text", delay=plan.delay)
    asked = (answers.call(step.tool, {"turn": turn, "number": number}) for number, step in enumerate(steps))
    return answers.calls(*asked, delay=plan.delay)


class _Model(ScriptedModel):
    def __init__(self, played: Played, plan: AgentPlan) -> None:
        super().__init__(lambda request: _answer(plan, request.messages))
        self._played, self._plan = played, plan

    async def respond(self, request: ModelRequest) -> Reply:
        self._played.note_request()
        turn = sum(message["role"] == "assistant" for message in request.transcript.messages)
        if turn < len(self._plan.turns) and self._plan.turns[turn] is None:
            await self._played.hang()
        return await super().respond(request)


# ---- a program that is played


class Played:
    """A program, and how it went.

    Args:
        program: What is played.
        stage: Where.
    """

    def __init__(self, program: Program, stage: Stage) -> None:
        self.program, self.watcher, self._stage = program, Watcher(), stage
        self.kept: list[object] = []  # tasks that tools forget
        self.threads: list[threading.Thread] = []
        self.children: dict[BaseAgent, list[BaseAgent]] = {}
        self.runs: list[Run] = []
        self.is_over = False
        self.foreign: Any = None  # a task group that no run has opened
        self._lock = threading.Lock()
        self._in_loop: set[str] = set()  # async tool calls at work
        self._cleanups: Counter[str] = Counter()
        self._cut: Callable[[], object] | None = None  # while it can be cut
        self._left_to_cut = program.cuts_in_cleanup
        self._cut_at: float | None = None
        self._home: object = None
        self.root = self._grown(program.root)

    def expect(self, holds: bool, what: str) -> None:
        """Note a fault."""
        self.watcher.expect(holds, what)

    def _grown(self, plan: AgentPlan) -> BaseAgent:
        children = [self._grown(each) for each in plan.below]
        agent = BaseAgent(
            "A",
            "a",
            client=self._model(plan) if not children else _Model(self, plan),
            toolkit=TOOLKIT,
            limits=plan.limits,
            timeout=plan.timeout,
            observers=[self.watcher, *self._stage.observers],
        )
        self.children[agent] = children
        _AT_WORK[agent] = self, plan
        return agent

    def _model(self, plan: AgentPlan) -> Any:
        if self.program.over_http and None not in plan.turns:
            return OpenAIModel(model=self._stage.model_of(plan), base_url=self._stage.url(), api_key="any")
        return _Model(self, plan)

    def first_tool(self, agent: BaseAgent) -> str:
        """The name of the tool that its model asks for first."""
        [steps, *_] = *_AT_WORK[agent][1].turns, None
        return steps[0].tool if steps else "act"

    # ---- what happens in it

    @contextmanager
    def at_work(self, ctx: RunContext) -> Generator[Callable[[], None]]:
        """Around a tool's work; gives what notes that it returns."""
        call_id, is_async = str(ctx.call_id), str(ctx.tool_name).startswith("act")
        with self._lock:
            self.watcher.counted(self.watcher.started, "max_tool_calls")
        self.expect(call_id not in self.watcher.began, "a call was made twice")
        self.watcher.began.add(call_id)
        if is_async:
            self._in_loop.add(call_id)
        try:
            yield partial(self.watcher.returned.add, call_id)
        finally:
            self._in_loop.discard(call_id)

    def note_request(self) -> None:
        with self._lock:
            self.watcher.counted(self.watcher.requests, "max_requests")

    async def hang(self) -> None:
        """Wait until it is all over."""
        while not self.is_over:  # noqa: ASYNC110  # in whatever event loop
            await anyio.sleep(5 * UNIT)

    async def clean_up(self, step: Step, begun: Begun) -> None:
        """Clean up, as the plan says; and have the whole cut once more meanwhile."""
        self._cleanups["begun"] += 1
        if self._left_to_cut and self.is_home:
            self._left_to_cut -= 1
            await_now = asyncio.get_running_loop().call_soon if self.program.backend == "asyncio" else None
            await_now(self.cut) if await_now is not None else self.cut()
        with anyio.CancelScope(shield=True) if step.cleanup == "shields" else nullcontext():
            match step.cleanup:
                case "awaits" | "awaits and raises" | "shields":
                    await anyio.sleep(0)
                    await anyio.sleep(step.delay)
                case "asks" if begun.children:
                    await begun.first.run("?")
                case "goes on":
                    for _ in range(2):
                        with suppress(anyio.get_cancelled_exc_class()):
                            await anyio.sleep(UNIT)
        self._cleanups["done"] += 1
        if step.cleanup in ("raises", "awaits and raises"):
            raise ConnectionError("reset while closing")

    @property
    def is_home(self) -> bool:
        """Whether this is the event loop in which it began."""
        return current_token().native_token is self._home

    def cut(self, cut: Cut | None = None) -> None:
        """Cancel what awaits it all, if that goes on."""
        if self._cut is None:
            return
        if cut is not None and cut.of_all and self.program.backend == "asyncio":
            for each in asyncio.all_tasks() - self._tasks_before:
                each.cancel()
        self._cut()

    # ---- from its beginning to its end

    async def main(self) -> None:
        """Play it, and see what is left of it at once, and in the end."""
        self._home = current_token().native_token
        before = {task.id for task in running_tasks()}
        self._tasks_before = asyncio.all_tasks() if self.program.backend == "asyncio" else set()
        with anyio.move_on_after(PATIENCE) as patience:
            async with anyio.create_task_group() as self.foreign:
                with self._alarms():
                    await self._play()
                self._check_what_is_below()
                self.is_over = True
                for thread in self.threads:
                    await anyio.to_thread.run_sync(thread.join)
            await self._settle(before)
        self.expect(not patience.cancel_called, "it hangs")
        left = [task for task in running_tasks() if task.id not in before]
        self.expect(not left, f"tasks left: {left}")

    @contextmanager
    def _alarms(self) -> Generator[None]:
        """Have it cut at its moments meanwhile; by no task, for all of them may be cancelled."""
        if self.program.backend == "asyncio":
            loop = asyncio.get_running_loop()
            timers = [loop.call_later(cut.at, self.cut, cut) for cut in self.program.cuts]
            yield
            for timer in timers:
                timer.cancel()
        else:
            for cut in self.program.cuts:
                trio.lowlevel.spawn_system_task(self._alarm, cut, name="alarm")
            yield

    async def _alarm(self, cut: Cut) -> None:
        await anyio.sleep(cut.at)
        self.cut(cut)

    async def _play(self) -> None:
        function = getattr(self, "_" + self.program.verb.replace(" ", "_"))
        if self.program.verb == "facade":
            await anyio.to_thread.run_sync(self._facade)
        elif self.program.backend == "asyncio" and self.program.is_native:
            await self._play_in_task(function)
        else:
            await self._play_in_scope(function)

    async def _play_in_task(self, function: Callable[[], Awaitable[None]]) -> None:
        was_cut: list[float] = []

        def cut() -> None:
            if task.cancel():
                was_cut.append(0)

        task = asyncio.ensure_future(function())
        self._cut = cut
        while not task.done():
            with anyio.move_on_after(PATIENCE, shield=True):  # a task in the foreign group may end that
                await asyncio.wait([task])
        self._cut = None
        error = None if task.cancelled() else task.exception()
        self._check_error(error)
        is_told = isinstance(error, ToolIgnoredCancellation)
        self.expect(not was_cut or task.cancelled() or is_told, f"a cancellation was swallowed: {error!r}")
        self.expect(bool(was_cut) or not task.cancelled(), "it was cancelled by nobody")

    async def _play_in_scope(self, function: Callable[[], Awaitable[None]]) -> None:
        cut_at: list[float] = []

        def cut() -> None:
            cut_at.append(anyio.current_time())
            scope.cancel()

        error: BaseException | None = None
        with anyio.CancelScope() as scope:
            self._cut = cut
            try:
                await function()
            except Exception as raised:
                error = raised
            await checkpoint()  # what came while a stream was left, which waits for its end, is told by the next wait
        self._cut = None
        self._check_error(error)
        if cut_at and not scope.cancelled_caught and error is None and self.program.is_virtual:
            self.expect(anyio.current_time() < cut_at[0] + UNIT / 2, "a scope's cancellation was swallowed")

    def _check_error(self, error: BaseException | None) -> None:
        is_told = isinstance(error, ToolIgnoredCancellation) and self.program.may_leave
        self.expect(error is None or is_told, f"it raised {error!r}")

    def _check_what_is_below(self) -> None:
        """When a verb has returned there is nothing left of what began below it; what begins then is of its own."""
        if self.program.may_leave:
            return
        for run in self.runs:
            goes_on = run.parent is not None and run.has_begun and run.result is None
            top = run
            while top.parent is not None:
                top = top.parent
            self.expect(not goes_on or top.result is None, "a run below goes on")
        # What a task that was forgotten has begun late is a run of its own, and so are the tools of that.
        if all(run.result is not None for run in self.runs if run.has_begun):
            self.expect(not self._in_loop or self.program.verb == "tool", "a tool goes on")

    async def _settle(self, before: set[int]) -> None:
        """Wait for what ends a turn of the loop later, or is left to itself, and says so."""

        def goes_on() -> bool:
            return any(task.id not in before for task in running_tasks()) or bool(self._in_loop or abandoned_threads())

        while goes_on():  # noqa: ASYNC110  # nobody tells when they end
            await anyio.sleep(UNIT)

    # ---- verbs

    async def _run(self) -> None:
        await self.root.run("go")

    async def _stream(self) -> None:
        async with self.root.stream("go", buffer=1) as stream:
            async for _ in stream:
                pass

    async def _stream_left(self) -> None:
        async with self.root.stream("go", buffer=0) as stream:
            async for event in stream:
                if isinstance(event, ToolFinished) or len(self.watcher) > 12:
                    break

    async def _batch(self) -> None:
        await run_many(self.root, ["go", "go", "go"], max_concurrency=2)

    async def _batch_streamed(self) -> None:
        async with stream_many(self.root, ["go", "go", "go"], max_concurrency=2, buffer=0) as results:
            async for _ in results:
                pass

    async def _tool(self) -> None:
        await self.root.execute_tool(self.first_tool(self.root), turn=0, number=0)

    def _facade(self) -> None:
        handle = fractal.sync.start(self.root, "go")
        try:
            for cut in self.program.cuts:
                try:
                    handle.result(timeout=cut.at)
                    return
                except TimeoutError:
                    handle.cancel()
            handle.result()
        except RunCancelled:
            return
        except RunError as error:  # such as of a tool that was left to itself, which outranks a cancellation
            self._check_error(error)

    # ---- what must hold

    def check(self) -> None:
        """Whatever happened in it, it keeps to what was promised."""
        for check in (self._check_events, self._check_runs, self._check_cleanups):
            try:
                check()
            except AssertionError as fault:
                self.expect(False, f"{check.__name__}: {fault}")
        faults = list(dict.fromkeys(self.watcher.faults))
        assert not faults, f"{faults}\nkind {self.program.kind!r}, seed {self.program.seed}: {self.program}"

    def _check_events(self) -> None:
        if not self.program.may_leave:
            assert_well_formed(self.watcher)
        for event in self.watcher:
            if isinstance(event, RunFinished):
                check_result(event.result)
                is_own = "cancels its own" in str(self.program.root)
                assert is_own or "Cancelled" not in str(event.result.error), "a cancellation is no error of a run's"
            elif isinstance(event, ToolFinished) and event.tool_name.startswith("act"):
                self._check_call(event)

    def _check_call(self, event: ToolFinished) -> None:
        outcome, has_returned = event.result.outcome, event.call_id in self.watcher.returned
        if outcome == "ok":
            assert has_returned, "a tool that is told to have returned has not"
        elif outcome in ("skipped", "denied"):
            assert event.call_id not in self.watcher.began, "a tool that is told to be skipped was called"

    def _check_runs(self) -> None:
        for run in self.runs:
            if run.result is None and run.has_begun:
                raise AssertionError("a run has begun and not ended")
            if run.result is not None and not self.program.over_http:
                check_ledger(self.watcher, run)

    def _check_cleanups(self) -> None:
        if self.program.cleanups_have_time:
            assert self._cleanups["begun"] == self._cleanups["done"], "a cleanup was cut"


class Stage:
    """Where programs are played, one after the other, on one kind of event loop.

    Args:
        loop: `"asyncio"`, `"uvloop"` or `"trio"`.
        portal: Where blocking calls go.
        observers: Who watches all runs, too.
    """

    def __init__(self, loop: str, portal: Portal | None, observers: Sequence[Any] = ()) -> None:
        self._loop, self._portal, self.observers = loop, portal, observers
        self._endpoint: Endpoint | None = None
        self._plans: dict[str, AgentPlan] = {}
        self.runs = 0
        self.requests_over_http = 0

    def play(self, program: Program) -> None:
        """Play one to its end, and see that it kept to what was promised.

        Raises:
            AssertionError: It did not.
        """
        played = Played(program, self)
        if program.over_http:
            self.url()
        in_portal = self._tasks_of_portal().keys()
        slots, belongings = Slots(), Belongings()

        def look() -> list[str]:
            tasks = self._tasks_of_portal()
            return [*belongings.left(), *slots.left(), *(tasks[each] for each in tasks.keys() - in_portal)]

        run_watchers.append(played.runs.append)
        try:
            if program.is_virtual:
                run_shuffled(played.main, backend=program.backend, seed=program.seed, virtual=True)
            else:
                run_on(self._loop, played.main)
        finally:
            run_watchers.remove(played.runs.append)
            _AT_WORK.clear()
        self.runs += len(played.runs)
        left = wait_until_empty(look, 5)
        played.expect(not left, f"left: {left}")
        played.check()

    def _tasks_of_portal(self) -> dict[int, str]:
        """What goes on in the event loop of blocking calls."""
        if self._portal is None:
            return {}

        async def look() -> dict[int, str]:
            await close_idle_pools()
            own = anyio.get_current_task()
            return {task.id: f"task {task.name}" for task in running_tasks() if task.id != own.id}

        return PortalCall(look, self._portal).result_or_cancel()

    # ---- models over HTTP

    def url(self) -> str:
        """Of an endpoint that answers for plans."""
        if self._endpoint is None:
            self._endpoint = Endpoint(self._reply).start()
        return self._endpoint.url

    def model_of(self, plan: AgentPlan) -> str:
        """The name of the model that answers for a plan."""
        name = f"model-{len(self._plans)}"
        self._plans[name] = plan
        return name

    def close(self) -> None:
        """Stop the endpoint."""
        if self._endpoint is not None:
            self._endpoint.close()

    def _reply(self, request: RecordedRequest) -> AnswerLike:
        self.requests_over_http += 1
        return _answer(self._plans[request.body["model"]], request.body["messages"])
