"""Limits, and the ledger that holds a tree of runs to them."""

import dataclasses
import inspect
import math
import random
import threading
import time
from typing import Any

import pytest
from hypothesis import given, settings, strategies as st

from fractal import BudgetExceeded, InvalidArguments, Limits, Reply, SharedBudget, Usage
from fractal.limits import DEFAULT_LIMITS, Budget, Reservation, Resource
from fractal.prices import MONEY

NAMES = [field.name for field in dataclasses.fields(Limits) if field.name != "on_stubborn"]


# ---- Limits


@pytest.mark.parametrize("name", NAMES)
def test_a_limit_is_a_number_from_0_up_or_none(name: str) -> None:
    for value in (0, 1, 2.5, 0.0, math.inf, 10**30, None):
        assert getattr(Limits(**{name: value}), name) == value


@pytest.mark.parametrize("name", NAMES)
def test_anything_else_is_refused_with_its_name_and_value(name: str) -> None:
    wrong: list[Any] = [-1, -0.001, -math.inf, math.nan, "5", True, False, [], 1j, object()]
    for value in wrong:
        with pytest.raises(InvalidArguments) as caught:
            Limits(**{name: value})
        assert f"Limits.{name} is {value!r}" in str(caught.value)


def test_a_stubborn_tool_is_waited_for_or_left() -> None:
    assert [Limits(on_stubborn=each).on_stubborn for each in ("wait", "raise", None)] == ["wait", "raise", None]
    merged = Limits(on_stubborn="raise").over(Limits(on_stubborn="wait", grace=2))
    assert (merged.on_stubborn, merged.grace) == ("raise", 2)
    assert Limits().over(merged).on_stubborn == "raise"
    with pytest.raises(InvalidArguments, match=r'Limits.on_stubborn is True: it is "wait" or "raise"'):
        Limits(on_stubborn=True)  # type: ignore[arg-type]


def test_limits_are_given_by_name_and_never_change() -> None:
    with pytest.raises(TypeError):
        Limits(5)  # type: ignore[call-arg]
    with pytest.raises(TypeError):
        Limits(max_request=5)  # type: ignore[call-arg]
    with pytest.raises(dataclasses.FrozenInstanceError):
        Limits().max_requests = 5  # type: ignore[misc]


def test_limits_can_be_compared_and_hashed() -> None:
    assert {Limits(max_requests=2), Limits(max_requests=2)} == {Limits(max_requests=2)}


limit_values = st.none() | st.integers(0, 9) | st.just(math.inf)


@settings(deadline=None)
@given(
    st.fixed_dictionaries(dict.fromkeys(NAMES, limit_values)), st.fixed_dictionaries(dict.fromkeys(NAMES, limit_values))
)
def test_a_limit_that_is_said_goes_before_one_that_lies_under_it(first: dict[str, Any], second: dict[str, Any]) -> None:
    merged = Limits(**first).over(Limits(**second))
    for name in NAMES:
        assert getattr(merged, name) == (second[name] if first[name] is None else first[name])


def test_limits_over_nothing_are_the_same_limits() -> None:
    limits = Limits(max_requests=0)
    assert limits.over(None) is limits
    assert limits.over(Limits()) == limits
    assert Limits().over(limits) == limits


def test_zero_is_said_and_infinity_lifts() -> None:
    merged = Limits(max_requests=0, max_tokens=math.inf).over(Limits(max_requests=9, max_tokens=9))
    assert (merged.max_requests, merged.max_tokens) == (0, math.inf)


def test_the_defaults_are_those_of_the_docstring() -> None:
    said = inspect.getdoc(Limits) or ""
    assert Limits(max_iterations=10, max_depth=8, grace=5, reserve=0, on_stubborn="wait") == DEFAULT_LIMITS
    for name, words in {"max_iterations": "Default 10", "max_depth": "Default 8", "reserve": "Default 0"}.items():
        assert words in said.partition(f"{name}:")[2].partition("_timeout:")[0]


# ---- Budget


def budgets(*limits: Limits) -> list[Budget]:
    """A chain of ledgers, the root first."""
    chain: list[Budget] = []
    for own in limits:
        chain.append(Budget(own, chain[-1] if chain else None))
    return chain


def used(*ledgers: Budget, of: Resource = "requests") -> list[int]:
    return [ledger.used[of] for ledger in ledgers]


def test_a_reservation_is_entered_here_and_above_and_nowhere_else() -> None:
    root, middle, leaf = budgets(Limits(), Limits(), Limits())
    sibling = Budget(Limits(), root)
    middle.reserve("requests", 2)

    assert used(root, middle, leaf, sibling) == [2, 2, 0, 0]
    assert middle.used == {"requests": 2, "tool_calls": 0, "tokens": 0, "cost": 0}


def test_what_is_not_committed_is_given_back() -> None:
    root, leaf = budgets(Limits(max_requests=1), Limits())
    with leaf.reserve("requests"):
        assert used(root, leaf) == [1, 1]
    assert used(root, leaf) == [0, 0]

    with pytest.raises(ZeroDivisionError), leaf.reserve("requests"):
        raise ZeroDivisionError
    assert used(root, leaf) == [0, 0]


def test_what_is_committed_stays_spent() -> None:
    root, leaf = budgets(Limits(), Limits())
    with leaf.reserve("requests", 3) as reservation:
        reservation.commit()
    assert used(root, leaf) == [3, 3]


@pytest.mark.parametrize("actual", [0, 4, 10, 25])
def test_a_commit_corrects_to_what_was_really_used(actual: int) -> None:
    root, leaf = budgets(Limits(max_tokens=20), Limits())
    with leaf.reserve("tokens", 10) as reservation:
        reservation.commit(actual)
    assert used(root, leaf, of="tokens") == [actual, actual]


def test_a_reservation_left_twice_is_given_back_once() -> None:
    [ledger] = budgets(Limits())
    reservation = ledger.reserve("requests", 2)
    with reservation:
        pass
    with reservation:
        pass
    assert used(ledger) == [0]


@pytest.mark.parametrize("resource", ["requests", "tool_calls", "tokens"])
@pytest.mark.parametrize("place", [0, 1, 2])
def test_the_tightest_ledger_of_the_chain_decides_and_then_nothing_is_reserved(resource: Any, place: int) -> None:
    limits = [Limits(**{f"max_{resource}": 2 if here == place else 100}) for here in range(3)]
    chain = budgets(*limits)
    leaf = chain[-1]
    leaf.reserve(resource, 2).commit()
    with pytest.raises(BudgetExceeded) as caught:
        leaf.reserve(resource)

    assert (caught.value.resource, caught.value.limit, caught.value.used) == (resource, 2, 2)
    assert used(*chain, of=resource) == [2, 2, 2]


@pytest.mark.parametrize(
    ("limit", "amount", "fits"),
    [(0, 0, False), (0, 1, False), (1, 0, True), (1, 1, True), (1, 2, False), (1.5, 1, True), (1.5, 2, False)],
)
def test_a_reservation_fits_or_not(limit: float, amount: int, fits: bool) -> None:
    [ledger] = budgets(Limits(max_tokens=limit))
    if fits:
        ledger.reserve("tokens", amount)
        assert used(ledger, of="tokens") == [amount]
    else:
        with pytest.raises(BudgetExceeded):
            ledger.reserve("tokens", amount)
        assert used(ledger, of="tokens") == [0]


def test_when_all_is_spent_even_an_estimate_of_nothing_does_not_fit() -> None:
    [ledger] = budgets(Limits(max_tokens=5))
    ledger.reserve("tokens", 5).commit()
    with pytest.raises(BudgetExceeded):
        ledger.reserve("tokens", 0)


def test_a_resource_is_unlimited_if_no_ledger_up_to_the_root_limits_it() -> None:
    root, middle, leaf = budgets(Limits(max_tokens=5), Limits(max_requests=5), Limits())

    assert root.is_unlimited("requests")
    assert not leaf.is_unlimited("requests")
    assert not leaf.is_unlimited("tokens")
    assert middle.is_unlimited("tool_calls")
    assert Budget(Limits(max_tokens=math.inf)).is_unlimited("tokens")


def test_an_infinite_limit_never_stops_anything() -> None:
    [ledger] = budgets(Limits(max_requests=math.inf))
    ledger.reserve("requests", 10**18).commit()
    ledger.reserve("requests", 10**18)


def test_reported_tokens_are_noted_here_and_above() -> None:
    root, leaf = budgets(Limits(), Limits())
    leaf.add_reply(Reply(input_tokens=3, output_tokens=4, cached_input_tokens=2), 5)
    root.add_reply(Reply(input_tokens=10, output_tokens=20, reasoning_tokens=7), 6)
    assert leaf.usage() == Usage(input_tokens=3, output_tokens=4, cached_input_tokens=2, cost=5 / MONEY)
    assert root.usage() == Usage(
        input_tokens=13, output_tokens=24, cached_input_tokens=2, reasoning_tokens=7, cost=11 / MONEY
    )
    leaf.add_reply(Reply(), None)
    assert leaf.usage().cost is root.usage().cost is None


def test_a_shared_ledger_is_entered_once_wherever_it_is_shared() -> None:
    shared = SharedBudget(max_requests=3)
    root = Budget(Limits(), None, (shared, shared))
    leaf = Budget(Limits(), root, (shared,))
    leaf.spend("requests")
    root.spend("requests", 2)
    assert (shared.used["requests"], root.used["requests"], leaf.used["requests"]) == (3, 3, 1)
    with pytest.raises(BudgetExceeded):
        leaf.spend("requests")


RESOURCES: tuple[Resource, ...] = ("requests", "tool_calls", "tokens", "cost")

trees = st.lists(  # each ledger: its parent (an earlier one) and its limits
    st.tuples(st.integers(0, 9), st.tuples(*[st.none() | st.integers(0, 12)] * 4)), min_size=1, max_size=7
)
moves = st.lists(
    st.tuples(
        st.sampled_from(["reserve", "commit", "correct", "give back"]),
        st.integers(0, 9),
        st.sampled_from(RESOURCES),
        st.integers(0, 6),
    ),
    max_size=40,
)


class Bookkeeper:
    """Does by hand what a tree of ledgers should do."""

    def __init__(self, tree: list[tuple[int, tuple[int | None, ...]]]) -> None:
        self.limits = [dict(zip(RESOURCES, allowed, strict=True)) for _, allowed in tree]
        self.used = [dict.fromkeys(RESOURCES, 0) for _ in tree]
        self.ledgers: list[Budget] = []
        self.chains: list[list[int]] = []  # for each ledger, itself and those above
        for index, (parent, _) in enumerate(tree):
            named = {f"max_{name}": value for name, value in self.limits[index].items()}
            if named["max_cost"] is not None:
                named["max_cost"] /= MONEY
            own = Limits(**named)
            self.ledgers.append(Budget(own, self.ledgers[parent % index] if index else None))
            self.chains.append([index, *(self.chains[parent % index] if index else [])])
        self.held: list[tuple[Reservation, int, Resource, int]] = []

    def enter(self, index: int, resource: Resource, amount: int) -> None:
        for above in self.chains[index]:
            self.used[above][resource] += amount

    def reserve(self, index: int, resource: Resource, amount: int) -> None:
        room = [(self.limits[above][resource], self.used[above][resource]) for above in self.chains[index]]
        fits = all(limit is None or spent + max(amount, 1) <= limit for limit, spent in room)
        try:
            reservation = self.ledgers[index].reserve(resource, amount)
        except BudgetExceeded:
            assert not fits
        else:
            assert fits
            self.enter(index, resource, amount)
            self.held.append((reservation, index, resource, amount))

    def settle(self, number: int, how: str, actual: int) -> None:
        reservation, index, resource, reserved = self.held.pop(number % len(self.held))
        with reservation:
            if how == "commit":
                reservation.commit()
            elif how == "correct":
                reservation.commit(min(actual, reserved))
                self.enter(index, resource, min(actual, reserved) - reserved)
            else:
                self.enter(index, resource, -reserved)

    def check(self) -> None:
        assert [ledger.used for ledger in self.ledgers] == self.used
        for used, limits in zip(self.used, self.limits, strict=True):
            assert all(used[name] >= 0 and (limits[name] is None or used[name] <= limits[name]) for name in RESOURCES)


@settings(deadline=None)
@given(trees, moves)
def test_no_ledger_of_any_tree_ever_goes_over_its_limit_and_what_is_given_back_is_there_again(
    tree: list[tuple[int, tuple[int | None, ...]]], moves: list[tuple[str, int, Resource, int]]
) -> None:
    books = Bookkeeper(tree)
    for move, number, resource, amount in moves:
        if move == "reserve":
            books.reserve(number % len(tree), resource, amount)
        elif books.held:
            books.settle(number, move, amount)
        books.check()
    while books.held:
        books.settle(0, "give back", 0)
    books.check()


class Slow(int):
    """An amount that lets other threads run in the middle of being added."""

    def __radd__(self, other: int) -> int:
        time.sleep(0)
        return other + int(self)


def test_threads_that_hammer_one_tree_never_overspend_it_and_lose_nothing() -> None:
    limit = 20
    root = Budget(Limits(max_requests=limit))
    leaves = [Budget(Limits(), Budget(Limits(), root)) for _ in range(8)]
    committed = [0] * len(leaves)
    seen: list[int] = []
    start = threading.Barrier(len(leaves))

    def hammer(number: int) -> None:
        dice = random.Random(number)
        start.wait()
        for _ in range(100):
            try:
                with leaves[number].reserve("requests", Slow(dice.randint(1, 5))) as reservation:
                    seen.append(root.used["requests"])
                    if dice.random() < 0.02:
                        reservation.commit(1)
                        committed[number] += 1
            except BudgetExceeded as error:
                seen.append(error.used)

    threads = [threading.Thread(target=hammer, args=(number,)) for number in range(len(leaves))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()

    assert max(seen) <= limit
    assert sum(committed) > 0
    assert used(root) == [sum(committed)]
    assert used(*leaves) == committed
