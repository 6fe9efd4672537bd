"""The ledgers and the gates, under any sequence of what runs do with them."""

from __future__ import annotations

import math
from typing import Any

import anyio
import pytest
from hypothesis import given, settings, strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, consumes, invariant, multiple, rule

from fractal._concurrency.gates import Gate
from fractal.errors import BudgetExceeded
from fractal.limits import Budget, Limits, Reservation, Resource
from fractal.prices import MONEY, amount_of
from tests.schedules import run_shuffled

RESOURCES: list[Resource] = ["requests", "tool_calls", "tokens", "cost"]
amounts = st.integers(0, 6)
limits = st.builds(
    Limits,
    max_requests=st.none() | st.integers(0, 8),
    max_tool_calls=st.none() | st.integers(0, 8),
    max_tokens=st.none() | st.integers(0, 8),
    max_cost=st.none() | st.integers(0, 8).map(lambda amount: amount / MONEY),
)


class Node:
    """What a ledger should hold, counted in another way: the sum of what is entered in it and below it."""

    def __init__(self, limits: Limits, parent: Node | None) -> None:
        self.budget = Budget(limits, parent.budget if parent else None)
        self.allowed: dict[Resource, float] = {
            resource: most if (most := getattr(limits, f"max_{resource}")) is not None else math.inf
            for resource in RESOURCES
        } | {"cost": amount_of(limits.max_cost)}
        self.parent = parent
        self.entered: list[list[Any]] = []  # resource and amount, of this ledger and those below

    def upwards(self) -> list[Node]:
        return [self, *(self.parent.upwards() if self.parent else [])]

    def used(self, resource: Resource) -> int:
        return sum(amount for kind, amount in self.entered if kind == resource)

    def has_room(self, resource: Resource, amount: int) -> bool:
        needed = max(amount, 1)
        return all(each.used(resource) + needed <= each.allowed[resource] for each in self.upwards())

    def enter(self, resource: Resource, amount: int) -> list[Any]:
        entry = [resource, amount]
        for each in self.upwards():
            each.entered.append(entry)
        return entry


class Ledgers(RuleBasedStateMachine):
    """A tree of ledgers, whose runs reserve, commit, are cancelled, and spend, in any order."""

    nodes = Bundle("nodes")
    reservations = Bundle("reservations")

    def __init__(self) -> None:
        super().__init__()
        self.all: list[Node] = []

    @rule(target=nodes, limits=limits)
    def begin(self, limits: Limits) -> Node:
        return self._add(Node(limits, None))

    @rule(target=nodes, parent=nodes, limits=limits)
    def delegate(self, parent: Node, limits: Limits) -> Node:
        return self._add(Node(limits, parent))

    @rule(target=reservations, node=nodes, resource=st.sampled_from(RESOURCES), amount=amounts)
    def reserve(self, node: Node, resource: Resource, amount: int) -> Any:
        has_room = node.has_room(resource, amount)
        try:
            reservation = node.budget.reserve(resource, amount)
        except BudgetExceeded:
            assert not has_room, "refused, with room for it"
            return multiple()
        assert has_room, "overshot"
        return reservation, node.enter(resource, amount)

    @rule(node=nodes, resource=st.sampled_from(RESOURCES), amount=amounts)
    def spend(self, node: Node, resource: Resource, amount: int) -> None:
        has_room = node.has_room(resource, amount)
        try:
            node.budget.spend(resource, amount)
        except BudgetExceeded:
            assert not has_room, "refused, with room for it"
        else:
            assert has_room, "overshot"
            node.enter(resource, amount)

    @rule(held=consumes(reservations), less=st.none() | amounts)
    def commit(self, held: tuple[Reservation, list[Any]], less: int | None) -> None:
        """Spend it: as it was reserved, or less."""
        reservation, entry = held
        with reservation:
            reservation.commit(min(less, entry[1]) if less is not None else None)
        entry[1] = min(less, entry[1]) if less is not None else entry[1]

    @rule(held=consumes(reservations))
    def cancel(self, held: tuple[Reservation, list[Any]]) -> None:
        reservation, entry = held
        with reservation:
            pass
        entry[1] = 0

    @rule(held=consumes(reservations))
    def fail_after_commit(self, held: tuple[Reservation, list[Any]]) -> None:
        """What is spent stays spent, whatever happens then."""
        with pytest.raises(ValueError, match="late"), held[0]:
            held[0].commit()
            raise ValueError("late")

    @invariant()
    def nothing_is_overshot_and_nothing_lost(self) -> None:
        for node in self.all:
            for resource in RESOURCES:
                assert node.budget.used[resource] == node.used(resource)
                assert node.budget.used[resource] <= node.allowed[resource]

    def _add(self, node: Node) -> Node:
        self.all.append(node)
        return node


TestLedgers = Ledgers.TestCase
TestLedgers.settings = settings(max_examples=60, stateful_step_count=30)


class Queue:
    """Tasks that come to a gate, are let in, leave again or are cancelled, at any moment."""

    def __init__(self, limit: int) -> None:
        self.limit, self.gate = limit, Gate(limit, "a place")
        self.scopes: list[anyio.CancelScope] = []
        self.inside: dict[int, anyio.Event] = {}
        self.waiting: list[int] = []  # in the order in which they came

    async def run(self, steps: list[tuple[str, int]]) -> None:
        async with anyio.create_task_group() as group:
            for what, which in steps:
                if what == "comes":
                    self.scopes.append(anyio.CancelScope())
                    group.start_soon(self._pass, len(self.scopes) - 1)
                elif what == "leaves" and self.inside:
                    list(self.inside.values())[which % len(self.inside)].set()
                elif what == "is cancelled" and self.scopes:
                    self.scopes[which % len(self.scopes)].cancel()
                elif what == "all settle":
                    await anyio.wait_all_tasks_blocked()
                    await anyio.sleep(0)  # a place that was given on wakes its task from the loop, which is no task
                    await anyio.wait_all_tasks_blocked()
                    assert self.gate.held == len(self.inside) == min(self.limit, len(self.inside) + len(self.waiting))
                    assert self.gate.waiting == len(self.waiting)
                assert self.gate.held <= self.limit
            group.cancel_scope.cancel()
        assert (self.gate.held, self.gate.waiting) == (0, 0)

    async def _pass(self, number: int) -> None:
        with self.scopes[number]:
            self.waiting.append(number)
            try:
                await self.gate.acquire()
                if self.limit == 1:  # of two that were let in together the second may get its turn first
                    assert not [other for other in self._before(number) if not self.scopes[other].cancel_called]
            finally:
                self.waiting.remove(number)
            try:
                self.inside[number] = anyio.Event()
                assert len(self.inside) <= self.limit
                await self.inside[number].wait()
            finally:
                del self.inside[number]
                self.gate.release()

    def _before(self, number: int) -> list[int]:
        return self.waiting[: self.waiting.index(number)]


kinds = st.sampled_from(["comes", "comes", "leaves", "is cancelled", "all settle"])


@pytest.mark.parametrize("backend", ["asyncio", "trio"])
@settings(max_examples=60)
@given(limit=st.integers(1, 3), steps=st.lists(st.tuples(kinds, st.integers(0, 9)), max_size=30), seed=st.integers(0))
def test_a_gate_lets_in_no_more_than_its_limit_in_turn_and_loses_no_place(
    backend: str, limit: int, steps: list[tuple[str, int]], seed: int
):
    run_shuffled(lambda: Queue(limit).run(steps), backend=backend, seed=seed)
