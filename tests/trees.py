"""Random trees of runs: what they are made of, how one is grown and cut, and what must hold of each.

A tree is plain data, so that hypothesis can make it smaller and print it. Time is virtual, and the tasks take turns in
a random order; so no part of a tree needs a thread.
"""

from __future__ import annotations

import asyncio
import math
from collections import Counter
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any, Literal

import anyio
from anyio.lowlevel import current_token
from hypothesis import strategies as st

from fractal import (
    AgentResult,
    AgentToolkit,
    BaseAgent,
    Limits,
    ModelRequested,
    RunContext,
    RunFinished,
    ToolFinished,
    ToolIgnoredCancellation,
    ToolResult,
    tool,
)
from fractal._concurrency.current import current_run
from fractal._engine.run import Run
from fractal.testing import ScriptedModel, answers
from fractal.testing._leftovers import running_tasks
from tests.schedules import run_shuffled
from tests.streams import Watch, assert_well_formed
from tests.support import assert_continuable

NEVER = 10_000.0
"""Seconds, virtual ones; whatever has not ended by then hangs."""

SLACK = 0.01

# ---- what a tree is

Act = Literal["returns", "raises", "hangs", "is late", "asks below"]


@dataclass(frozen=True)
class CallPlan:
    """A tool call: which tool, and what it does after its delay; `is late`: goes on that long once cancelled."""

    tool: str
    act: Act
    delay: float


@dataclass(frozen=True)
class Turn:
    """What the model does: answers, fails, or asks for calls."""

    kind: Literal["text", "calls", "hang", "empty", "refusal", "busy", "bad request", "breaks off", "bad calls"]
    delay: float
    calls: tuple[CallPlan, ...] = ()


@dataclass(frozen=True)
class AgentPlan:
    turns: tuple[Turn, ...]
    limits: Limits
    timeout: float | None
    approval: Literal["yes", "no", "late", "fails", "never", "nobody"]
    below: tuple[AgentPlan, ...] = ()


@dataclass(frozen=True)
class Cut:
    """How the whole is cancelled: in which way, at which moment, or before that after so many steps of its tasks."""

    way: Literal["scope", "native"]
    at: float
    step: int | None


@dataclass(frozen=True)
class Tree:
    root: AgentPlan
    cut: Cut
    seed: int


_DEPTH = 3

# Few values, so that moments often fall together.
delays = st.sampled_from([0.0, 0.0, 0.0, 1.0, 2.0, 3.0])
TOOLS = ["free", "free", "alone", "narrow", "brief", "final", "strict", "asking"]


def calls(depth: int) -> st.SearchStrategy[tuple[CallPlan, ...]]:
    plain = st.builds(
        CallPlan,
        tool=st.sampled_from(TOOLS),
        act=st.sampled_from(["returns", "returns", "raises", "hangs", "is late", "asks below"]),
        delay=delays,
    )
    below = st.builds(
        CallPlan, tool=st.sampled_from(["below_0", "below_1"]), act=st.just("returns"), delay=st.just(0.0)
    )
    return st.lists(st.one_of(plain, below) if depth else plain, min_size=1, max_size=4).map(tuple)


def turns(depth: int) -> st.SearchStrategy[Turn]:
    asking = st.builds(Turn, kind=st.just("calls"), delay=delays, calls=calls(depth))
    others = ["text", "hang", "empty", "refusal", "busy", "bad request", "breaks off", "bad calls"]
    return st.one_of(asking, asking, st.builds(Turn, kind=st.sampled_from(others), delay=delays))


def maybe(*values: Any) -> st.SearchStrategy[Any]:
    return st.sampled_from([*[None] * (2 * len(values)), *values])


limits = st.builds(
    Limits,
    max_iterations=maybe(1, 2),
    max_requests=maybe(1, 2, 3, 5),
    max_tool_calls=maybe(0, 1, 2, 4),
    max_tokens=maybe(500, 1500, 3000),
    max_depth=maybe(1),
    request_timeout=maybe(2.0),
    tool_timeout=maybe(1.0, 4.0),
    grace=maybe(0.0, 1.0),
    reserve=maybe(1.0, 2.0),
    on_stubborn=maybe("raise"),
)


def agents(depth: int) -> st.SearchStrategy[AgentPlan]:
    asking = st.builds(Turn, kind=st.just("calls"), delay=delays, calls=calls(depth))
    return st.builds(
        AgentPlan,
        turns=st.builds(lambda first, more: (first, *more), asking, st.lists(turns(depth), max_size=2)),
        limits=limits,
        timeout=maybe(1.0, 3.0, 6.0),
        approval=st.sampled_from(["yes", "yes", "no", "late", "fails", "never", "nobody"]),
        below=st.lists(agents(depth - 1), min_size=depth == _DEPTH, max_size=2).map(tuple) if depth else st.just(()),
    )


cuts = st.builds(
    Cut,
    way=st.sampled_from(["scope", "native"]),
    at=st.sampled_from([30.0, 30.0, 30.0, 0.0, 1.0, 2.0, 3.0, 5.0]),  # at last, for some hang
    step=st.one_of(st.none(), st.none(), st.integers(1, 120)),
)
trees = st.builds(Tree, root=agents(_DEPTH), cut=cuts, seed=st.integers(0, 2**16))

# ---- how it grows


class Watcher(Watch):
    """Sees all that happens in a tree, in what it tells and at the places where it reaches the model and the tools."""

    def __init__(self) -> None:
        super().__init__()
        self.runs: dict[str, Run] = {}
        self.requests: Counter[str] = Counter()
        self.started: Counter[str] = Counter()
        self.now_in: dict[str, str] = {}  # the call of each tool that is at work
        self.began: set[str] = set()
        self.returned: set[str] = set()
        self.faults: list[str] = []

    def __call__(self, event: Any) -> None:
        super().__call__(event)
        run = current_run.get()
        if run is not None:
            self.runs.setdefault(run.run_id, run)
            self.expect_within_budget(run)

    def expect(self, holds: bool, what: str) -> None:
        """Note a fault; where it is found, raising would only become an outcome like others."""
        if not holds:
            self.faults.append(what)

    def expect_within_budget(self, run: Run) -> None:
        for each in upwards(run):
            for resource, allowed in each.budget._allowed.items():
                self.expect(each.budget.used[resource] <= allowed, f"{resource} overshot at depth {each.depth}")

    def counted(self, counts: Counter[str], most: str) -> Run:
        """Count what has reached the model or a tool, in all runs above too."""
        run = current_run.get()
        assert run is not None
        for each in upwards(run):
            counts[each.run_id] += 1
            limit = getattr(each.limits, most)
            self.expect(limit is None or counts[each.run_id] <= limit, f"{most} overshot at depth {each.depth}")
        return run

    def arrived(self, counts: Counter[str], most: str) -> Run:
        """Count it, and see that it is in time."""
        run = self.counted(counts, most)
        self.expect(anyio.current_time() <= run.clock.deadline + SLACK, "something began after the deadline")
        return run

    def tool_began(self, context: RunContext) -> str:
        run = self.arrived(self.started, "max_tool_calls")
        call_id = str(context.call_id)
        self.expect(call_id not in self.began, "a call was made twice")
        self.expect(anyio.current_time() <= run.clock.soft_deadline + SLACK, "a tool began after the soft deadline")
        deadline = anyio.current_effective_deadline()
        for each in upwards(run):
            self.expect(deadline <= each.clock.deadline, "a tool may take longer than a run above it")
        if context.tool_name in ("narrow", "alone"):
            duplicates = [other for other, name in self.now_in.items() if name == context.tool_name]
            beside = [
                event.call_id
                for event in self
                if event.kind == "tool_started" and event.run_id == context.run_id and event.call_id in self.now_in
            ]
            self.expect(context.tool_name != "narrow" or not duplicates, "narrow ran twice at once")
            self.expect(context.tool_name != "alone" or not beside, "alone ran beside another call")
        self.began.add(call_id)
        self.now_in[call_id] = str(context.tool_name)
        return call_id


def upwards(run: Run | None) -> Iterator[Run]:
    while run is not None:
        yield run
        run = run.parent


async def perform(ctx: RunContext, act: Act, delay: float) -> str:
    """Do what the plan says."""
    watcher, children = ctx.deps
    call_id = watcher.tool_began(ctx)
    try:
        await anyio.sleep(delay)
        match act:
            case "raises":
                raise ValueError("no luck")
            case "hangs":
                await anyio.sleep_forever()
            case "is late":
                await go_on_for(delay)
            case "asks below":
                await ask_below(ctx.agent, children[ctx.agent])
        watcher.returned.add(call_id)
        return "done"
    finally:
        del watcher.now_in[call_id]


async def go_on_for(seconds: float) -> None:
    """Wait to be cancelled, and then do not stop for so long."""
    try:
        await anyio.sleep(seconds)
    except anyio.get_cancelled_exc_class():
        until = anyio.current_time() + seconds
        while anyio.current_time() < until:
            with suppress(anyio.get_cancelled_exc_class()):  # asyncio's own, which no shield keeps out
                with anyio.CancelScope(shield=True):
                    await anyio.sleep(until - anyio.current_time())
        raise


async def ask_below(agent: BaseAgent, children: Sequence[BaseAgent]) -> None:
    for child in children[:1]:
        async with child.stream("?", buffer=1) as stream:
            async for _ in stream:
                pass
    for child in children[1:]:
        await agent.call_agent(child, "?")


def _named(name: str, options: dict[str, Any]) -> Callable[..., Any]:
    @tool(name=name, **options)
    async def one(ctx: RunContext, act: Act, delay: float) -> str:
        return await perform(ctx, act, delay)

    return one


OPTIONS: dict[str, dict[str, Any]] = {
    "free": {},
    "alone": {"sequential": True},
    "narrow": {"max_concurrency": 1},
    "brief": {"timeout": 1.0},
    "final": {"terminate": True},
    "strict": {"on_error": "raise"},
    "asking": {"requires_approval": True},
}
TOOLKIT = AgentToolkit(*(_named(name, options) for name, options in OPTIONS.items()))
GATE = TOOLKIT.tools["narrow"].gate


def _answer(turn: Turn) -> Any:
    match turn.kind:
        case "text":
            return answers.text("some text", delay=turn.delay)
        case "calls":
            return answers.calls(*map(_call, turn.calls), delay=turn.delay)
        case "bad calls":
            return answers.calls(answers.call("free", "{"), answers.call("unknown"), answers.call("free", {"act": 1}))
        case "hang":
            return answers.hang()
        case "empty":
            return answers.empty()
        case "refusal":
            return answers.refusal("no")
        case "busy":
            return answers.failure(429, "busy", retry_after=turn.delay)
        case "bad request":
            return answers.failure(400, "no")
        case "breaks off":
            return answers.nothing(delay=turn.delay)


def _call(plan: CallPlan) -> Any:
    is_delegate = plan.tool.startswith("below")
    return answers.call(plan.tool, {"query": "?"} if is_delegate else {"act": plan.act, "delay": plan.delay})


def _approver(kind: str) -> Callable[[Any], Any] | None:
    if kind == "nobody":
        return None

    async def approve(pending: Any) -> bool:
        match kind:
            case "late":
                await anyio.sleep(2.0)
            case "never":
                await anyio.sleep_forever()
            case "fails":
                raise ValueError("nobody there")
        return kind != "no"

    return approve


class Grown:
    """A tree of agents, and how it went.

    Args:
        tree: What it grows from.
        observers: Who watches it, too.
    """

    def __init__(self, tree: Tree, observers: Sequence[Any] = ()) -> None:
        self.tree, self.watcher, self.observers = tree, Watcher(), observers
        self.children: dict[BaseAgent, list[BaseAgent]] = {}
        self.root = self._grow(tree.root)
        self.end: AgentResult | ToolIgnoredCancellation | None = None  # None: it was cancelled
        self.ended = self.cut_at = math.inf
        self._steps = 0
        self._cut: Callable[[], object] | None = None  # while it can be cut

    def _grow(self, plan: AgentPlan) -> BaseAgent:
        children = [self._grow(each) for each in plan.below]
        agent = BaseAgent(
            "A",
            "a",
            client=ScriptedModel(self._script(plan)),
            toolkit=TOOLKIT,
            limits=plan.limits,
            timeout=plan.timeout,
            approve=_approver(plan.approval),
            observers=[self.watcher, *self.observers],
        )
        for number, child in enumerate(children):
            agent.register_delegate(child, f"below_{number}")
        self.children[agent] = children
        return agent

    def _script(self, plan: AgentPlan) -> Callable[[Any], Any]:
        left = list(plan.turns)

        def answer(request: Any) -> Any:
            self.watcher.arrived(self.watcher.requests, "max_requests")
            return _answer(left.pop(0) if left else Turn("text", 0.0))

        return answer

    def run(self, backend: str) -> Grown:
        """Run it to its end, and see that it comes to one and leaves no task."""
        run_shuffled(self._main, backend=backend, seed=self.tree.seed, virtual=True, step=self._step)
        return self

    async def _main(self) -> None:
        before = {task.id for task in running_tasks()}
        async with anyio.create_task_group() as group:
            group.start_soon(self._alarm)
            with anyio.move_on_after(NEVER) as patience:
                await (_cut_natively if self._is_native() else _cut_by_scope)(self)
            assert not patience.cancel_called, "it hangs"
            self.ended = anyio.current_time()
            group.cancel_scope.cancel()
        if self.is_left_behind:
            await anyio.sleep(4 * self.lateness)  # what was left to itself comes to its end
        left = [task for task in running_tasks() if task.id not in before]
        assert not left, f"tasks left: {left}"

    def _is_native(self) -> bool:
        is_asyncio = anyio.get_cancelled_exc_class() is asyncio.CancelledError
        return is_asyncio and self.tree.cut.way == "native"

    async def _alarm(self) -> None:
        await anyio.sleep(self.tree.cut.at)
        self._do_cut()

    def _step(self) -> None:
        if self._cut is not None:
            self._steps += 1
            if self.tree.cut.step == self._steps:
                self._do_cut()

    def _do_cut(self) -> None:
        if self._cut is not None and self.cut_at == math.inf:
            self.cut_at = self.now()
            self._cut()

    @contextmanager
    def cut_by(self, cut: Callable[[], object]) -> Generator[None]:
        """Say what cancels it, while it runs."""
        self._cut, self.now = cut, current_token().backend_class.current_time
        try:
            yield
        finally:
            self._cut = None

    async def go(self) -> None:
        try:
            self.end = await self.root.run("go", deps=(self.watcher, self.children))
        except ToolIgnoredCancellation as error:
            self.end = error
        finally:
            self._cut = None

    @property
    def lateness(self) -> float:
        """How long any of its tools goes on after it was cancelled."""
        turns = (turn for plan in plans(self.tree.root) for turn in plan.turns)
        return max((call.delay for turn in turns for call in turn.calls if call.act == "is late"), default=0.0)

    @property
    def is_left_behind(self) -> bool:
        """Whether a tool was left to itself."""
        return any(isinstance(event, RunFinished) and event.result.abandoned for event in self.watcher)


async def _cut_by_scope(grown: Grown) -> None:
    with anyio.CancelScope() as scope, grown.cut_by(scope.cancel):
        await grown.go()


async def _cut_natively(grown: Grown) -> None:
    task = asyncio.ensure_future(grown.go())
    with grown.cut_by(task.cancel):
        await asyncio.wait([task])
    if not task.cancelled():
        task.result()


def plans(root: AgentPlan) -> Iterator[AgentPlan]:
    yield root
    for each in root.below:
        yield from plans(each)


# ---- what must hold of each


def check(grown: Grown) -> None:
    """Whatever happened in it, a tree keeps to what was promised."""
    watcher = grown.watcher
    assert not watcher.faults, watcher.faults
    assert not watcher.now_in, "a tool is still at work"
    assert GATE is not None
    assert (GATE.held, GATE.waiting) == (0, 0), "a place in a limit is lost"
    # A task that is cancelled before its first step tells nothing; what is left to itself ends after its run.
    if watcher and not grown.is_left_behind:
        assert_well_formed(watcher)
    check_end(grown)
    for run in watcher.runs.values():
        check_ledger(watcher, run)
        assert run.parent is None or run.clock.deadline <= run.parent.clock.deadline, "a child outlives its parent"
    for event in watcher:
        if isinstance(event, RunFinished):
            check_result(event.result)
        elif isinstance(event, ToolFinished):
            check_call(watcher, event.result)
        elif isinstance(event, ModelRequested):
            most = watcher.runs[event.run_id].limits.max_iterations
            assert most is None or event.iteration <= most


def check_end(grown: Grown) -> None:
    """It returns when it must, and a cancellation comes out."""
    root, late = grown.tree.root, grown.lateness
    if root.limits.on_stubborn == "raise":
        late = min(late, root.limits.grace if root.limits.grace is not None else 5.0)
    timeout = root.timeout if root.timeout is not None else math.inf
    assert grown.ended <= min(timeout, grown.cut_at) + late + SLACK, "it returns too late"
    if grown.end is None:
        assert grown.cut_at < math.inf, "it was cancelled by nobody"
    elif isinstance(grown.end, AgentResult):
        assert grown.ended <= grown.cut_at + SLACK, "the cancellation was swallowed"


def check_ledger(watcher: Watcher, run: Run) -> None:
    budget = run.budget
    assert budget.used["requests"] == watcher.requests[run.run_id], "requests that nobody sent, or nobody counted"
    assert budget.used["tool_calls"] >= watcher.started[run.run_id]
    assert budget.used["tokens"] == budget.usage().total_tokens, "tokens that nobody used"


def check_result(result: AgentResult) -> None:
    """Every call has one result and one answer, in call order."""
    asked = [call["id"] for message in result.messages for call in message.get("tool_calls") or ()]
    assert [each.call_id for each in result.tool_results] == asked
    if result.messages:
        assert_continuable(result)
    assert result.success == (result.stop_reason in ("finished", "terminated", "soft_deadline"))
    assert result.elapsed >= 0


def check_call(watcher: Watcher, result: ToolResult) -> None:
    """What is said of a call is what was seen of it."""
    assert result.elapsed >= 0
    if result.tool_name not in OPTIONS:
        return
    if result.outcome == "ok":
        assert result.call_id in watcher.returned, "it did not return"
    elif result.outcome in ("skipped", "denied"):
        assert result.call_id not in watcher.began, "it was started"
    elif result.outcome != "abandoned":
        assert result.call_id not in watcher.returned, "it returned"
