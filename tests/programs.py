"""Random programs: agents whose tools begin other runs in every way there is, cut at random moments. What they are.

Unlike the trees of `tests.trees` they also use what is the event loop's own, and threads: tasks that nobody awaits,
foreign groups, the blocking facade. They are made from a seed, plainly, since most of the time goes to playing many.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

from fractal import Limits

__all__ = ["ASYNCIO", "BOTH", "LOOP_KINDS", "PLAIN", "THREADED", "TRIO", "AgentPlan", "Cut", "Program", "Step", "make"]

UNIT = 0.001
"""Seconds: delays, timeouts and cuts are few of them, so that they often fall together."""

LOOP_KINDS = ["asyncio", "asyncio in virtual time", "uvloop", "trio", "trio in virtual time"]

# ---- ways to begin runs in a tool; `tests.ways` has the functions

BOTH = [
    "awaited", "in_a_group", "in_a_foreign_group", "forgotten_in_a_foreign_group", "in_a_shield", "called",
    "streamed", "stream_left", "stream_left_open", "batch", "batch_streamed", "by_its_tool", "all_in_a_scope",
]  # fmt: skip
ASYNCIO = [
    "gathered", "created", "forgotten", "waited_for", "shielded", "in_a_native_group", "in_a_native_timeout",
    "cancelled_natively", "cancelled_natively", "gathered_and_cancelled",
]  # fmt: skip
TRIO = ["in_a_nursery", "in_a_system_task", "in_a_nursery_that_is_cut"]
THREADED = ["in_a_worker_thread", "in_a_thread_of_its_own", "started_in_a_thread"]
PLAIN = ["blocking", "started", "started_and_left", "started_and_cancelled", "read", "read_and_left", "batch_blocking"]

Tool = Literal["act", "act_alone", "act_briefly", "act_strictly", "wait", "leave"]
Then = Literal["returns", "raises", "hangs", "cancels its own"]
Cleanup = Literal["none", "awaits", "raises", "awaits and raises", "asks", "shields", "goes on"]
Verb = Literal["run", "stream", "stream left", "batch", "batch streamed", "tool", "facade"]


@dataclass(frozen=True)
class Step:
    """What one tool call does: begins runs of these children, and then what it does when it is done or cut."""

    tool: Tool
    way: str | None
    children: tuple[int, ...]
    delay: float
    patience: float
    scope: float | None
    then: Then
    cleanup: Cleanup


@dataclass(frozen=True)
class AgentPlan:
    """An agent; its model asks for the steps of a turn, or, if a turn is None, does not answer."""

    turns: tuple[tuple[Step, ...] | None, ...]
    limits: Limits
    timeout: float | None
    delay: float
    below: tuple[AgentPlan, ...] = ()


@dataclass(frozen=True)
class Cut:
    """A cancellation of the task that awaits it all: when, and whether of all other tasks too."""

    at: float
    of_all: bool = False


@dataclass(frozen=True)
class Program:
    """What is played."""

    kind: str
    seed: int
    root: AgentPlan
    verb: Verb
    is_native: bool
    cuts: tuple[Cut, ...]
    cuts_in_cleanup: int
    over_http: bool
    plans: list[AgentPlan] = field(default_factory=list, repr=False)

    @property
    def is_virtual(self) -> bool:
        return "virtual" in self.kind

    @property
    def backend(self) -> str:
        return "trio" if self.kind.startswith("trio") else "asyncio"

    @property
    def may_leave(self) -> bool:
        """Whether a tool that does not stop may be left to itself."""
        return any(plan.limits.on_stubborn == "raise" for plan in self.plans)

    @property
    def cleanups_have_time(self) -> bool:
        """Whether each cleanup has more of it than it takes, whatever happens."""
        patient = all(plan.limits.grace is None and plan.limits.on_stubborn is None for plan in self.plans)
        # One that answers what nobody has cut from outside has no grace, and is itself cut then.
        is_due = not any(word in str(self.root) for word in ("cancels its own", "asks"))
        # On trio a scope of the tool's own that ends in the same moment may take the grace: not looked at here.
        own = ("stream_left'", "all_in_a_scope", "in_a_nursery_that_is_cut") if self.backend == "trio" else ()
        is_due = is_due and not any(word in str(self.root) for word in own)
        return patient and is_due and not any(cut.of_all for cut in self.cuts)


def make(kind: str, seed: int) -> Program:
    """The program of a seed."""
    return _Maker(kind, seed).program()


class _Maker:
    def __init__(self, kind: str, seed: int) -> None:
        self._kind, self._seed = kind, seed
        self._random = random.Random(f"{kind} {seed}")
        self._ways = BOTH + (TRIO if kind.startswith("trio") else ASYNCIO)
        self._has_threads = "virtual" not in kind
        if self._has_threads:
            self._ways = self._ways + THREADED
        self._plans: list[AgentPlan] = []

    def program(self) -> Program:
        one = self._random
        is_native = one.random() < 0.7
        return Program(
            kind=self._kind,
            seed=self._seed,
            root=self._agent(2),
            verb=one.choice(self._verbs()),
            is_native=is_native,
            cuts=self._cuts(is_native),
            cuts_in_cleanup=one.choice([0, 0, 1, 2]),
            over_http=self._has_threads and one.random() < 0.08,
            plans=self._plans,
        )

    def _verbs(self) -> Sequence[Verb]:
        verbs: list[Verb] = ["run", "run", "run", "stream", "stream left", "batch", "batch streamed", "tool"]
        return [*verbs, "facade"] if self._has_threads else verbs

    def _cuts(self, is_native: bool) -> tuple[Cut, ...]:
        one = self._random
        moments = [one.choice([0, 1, 2, 3, 4, 5, 6, 8, 10, 14]) * UNIT for _ in range(one.choice([0, 0, 1, 1, 2, 3]))]
        last = Cut(30 * UNIT)  # for some of it may hang
        return *(Cut(moment, is_native and one.random() < 0.1) for moment in sorted(moments)), last

    def _agent(self, depth: int) -> AgentPlan:
        one = self._random
        below = tuple(self._agent(depth - 1) for _ in range(one.choice([1, 2]) if depth == 2 else depth))
        chances = [1, 1, 2] if depth else [0, 0, 1, 1]
        turns = tuple(self._turn(len(below)) for _ in range(one.choice(chances)))
        plan = AgentPlan(turns, self._limits(), self._maybe(1, 2, 3, 5), self._delay(), below)
        self._plans.append(plan)
        return plan

    def _turn(self, children: int) -> tuple[Step, ...] | None:
        if self._random.random() < 0.04:
            return None
        return tuple(self._step(children) for _ in range(self._random.choice([1, 2, 2, 3])))

    def _step(self, children: int) -> Step:
        one = self._random
        tools: list[Tool] = ["act"] * 6 + ["act_alone", "act_briefly", "act_strictly"]  # type: ignore[assignment]
        tool = one.choice([*tools, "wait", "wait", "leave"] if self._has_threads else tools)
        way: str | None = None
        if children and one.random() < 0.85:
            way = one.choice(PLAIN if tool in ("wait", "leave") else self._ways)
        thens: list[Then] = ["returns"] * 6 + ["raises", "hangs", "cancels its own"]  # type: ignore[assignment]
        cleanups: list[Cleanup] = [
            "none",
            "none",
            "awaits",
            "raises",
            "awaits and raises",
            "asks",
            "shields",
            "goes on",
        ]
        return Step(
            tool,
            way,
            tuple(one.randrange(children) for _ in range(one.choice([1, 1, 2]))) if way else (),
            self._delay(),
            one.choice([0, 0, 1, 2, 50]) * UNIT,
            # AnyIO's scopes try anew each turn while a task that is awaited cleans up: virtual time would stand still.
            None if way in ASYNCIO and not self._has_threads else self._maybe(0, 1, 3),
            one.choice(thens),
            one.choice(["none", "none", *cleanups]),
        )

    def _limits(self) -> Limits:
        one = self._random
        return Limits(
            max_requests=one.choice([None] * 6 + [1, 3, 5]),
            max_tool_calls=one.choice([None] * 6 + [1, 2, 4]),
            max_tokens=one.choice([None] * 6 + [500, 3000]),
            max_depth=one.choice([None] * 8 + [1]),
            tool_timeout=self._maybe(1, 3),
            grace=one.choice([None] * 6 + [0.0, 2 * UNIT]),
            on_stubborn=one.choice([None] * 9 + ["raise"]),
        )

    def _delay(self) -> float:
        return self._random.choice([0, 0, 0, 1, 1, 2, 3]) * UNIT

    def _maybe(self, *units: int) -> float | None:
        value = self._random.choice([None] * (3 * len(units)) + [*units])  # type: ignore[list-item]
        return value * UNIT if value is not None else None
