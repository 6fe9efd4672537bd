"""What a run may use: `Limits` says it, `Budget` is the ledger that holds a whole tree of runs to it."""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Literal

from fractal._checks import is_number
from fractal._concurrency.forks import lock
from fractal._concurrency.gates import Gate
from fractal._concurrency.grace import DEFAULT_GRACE
from fractal.errors import BudgetExceeded, InvalidArguments
from fractal.prices import MONEY, amount_of
from fractal.results import Usage

if TYPE_CHECKING:
    from types import TracebackType

    from fractal.model import Reply

__all__ = ["Budget", "Limits", "Reservation", "Resource", "SharedBudget", "limit_of_iterations", "limits_below"]

Resource = Literal["requests", "tool_calls", "tokens", "cost"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """The limits of a run and of every run it delegates to.

    Give them to an agent, to one run, or to both: a field set for the run goes before the agent's. `None` means
    "not said here", and for counts no limit; `math.inf` lifts a limit that the agent has.

    Args:
        max_iterations: Turns of one run: a model's reply and the tool calls it asks for. Default 10.
        max_requests: Requests that reach the endpoint, retries included, over the whole tree of runs.
        max_tool_calls: Tool calls that models ask for, over the whole tree, those that cannot be made too.
        max_tokens: Prompt and completion tokens, over the whole tree. Reserved by estimate before a request and
            corrected by what the endpoint reports, so the last reply can go over by the error of the estimate.
        max_cost: Money, in the currency of the prices, over the whole tree. Before a request what it can cost at most
            is reserved: the tokens of the prompt, by estimate, and those of the reply, as far as `max_tokens` of the
            agent says how many there may be. Without that replies come one at a time, and the last of them can go
            over by what it takes. The prices of the models have to be known.
        max_depth: Delegations inside each other below the run. Default 8 below the first one; a run below another keeps
            to that one's limit, and can only have a nearer one.
        request_timeout: Seconds one request to the endpoint may take; a retry starts anew. None: as long as the
            client allows.
        tool_timeout: Seconds for tools that have no timeout of their own.
        grace: Seconds an async tool has to clean up after it was cancelled before it is named in a warning.
            Default 5.
        on_stubborn: What becomes of a run whose async tool goes on for longer than its grace. `"wait"`, the default:
            the run waits for it. `"raise"`: the run leaves it to itself and raises `ToolIgnoredCancellation`. A run
            below does as the one above it, unless its own limits say otherwise.
        reserve: Seconds kept back at the end of the run's time: when only these are left, tools are cut, no tool
            is offered any more, and the model is asked for a final answer. Default 0: no such turn.

    Raises:
        InvalidArguments: A value is negative or not a number.

    Example:
        >>> Limits(max_requests=2).over(Limits(max_requests=9, grace=1.0)).grace
        1.0
    """

    max_iterations: float | None = None
    max_requests: float | None = None
    max_tool_calls: float | None = None
    max_tokens: float | None = None
    max_cost: float | None = None
    max_depth: float | None = None
    request_timeout: float | None = None
    tool_timeout: float | None = None
    grace: float | None = None
    reserve: float | None = None
    on_stubborn: Literal["wait", "raise"] | None = None

    def __post_init__(self) -> None:
        if self.on_stubborn not in (None, "wait", "raise"):
            raise InvalidArguments(f'Limits.on_stubborn is {self.on_stubborn!r}: it is "wait" or "raise"')
        for field in fields(self):
            value = getattr(self, field.name)
            if value is None or field.name == "on_stubborn":
                continue
            if not is_number(value) or value < 0:
                raise InvalidArguments(f"Limits.{field.name} is {value!r}: give a number from 0 up, or None")

    def over(self, other: Limits | None) -> Limits:
        """The limits of both; where both have one, that of this object."""
        return self if other is None else _merged(self, other)


@functools.lru_cache(maxsize=256)  # every run asks, and mostly for the same two
def _merged(first: Limits, second: Limits) -> Limits:
    named = ((field.name, getattr(first, field.name)) for field in fields(first))
    return Limits(**{name: value if value is not None else getattr(second, name) for name, value in named})


def limit_of_iterations(max_iterations: int) -> Limits:
    """Limits of iterations alone; cached, since nearly every run has the same and a check takes time."""
    return _of_iterations(max_iterations) if isinstance(max_iterations, int) else Limits(max_iterations=max_iterations)


@functools.lru_cache(maxsize=256, typed=True)  # typed: 1 is a number of iterations, True is none
def _of_iterations(max_iterations: int) -> Limits:
    return Limits(max_iterations=max_iterations)


@functools.lru_cache(maxsize=256)
def limits_below(above: Limits) -> Limits:
    """The limits of a run below another, whose limits hold where the run has none of its own.

    The counts of both are in the ledger, and the run above says how deep the whole may get.
    """
    return Limits(on_stubborn=above.on_stubborn, max_depth=math.inf).over(DEFAULT_LIMITS)


DEFAULT_LIMITS = Limits(max_iterations=10, max_depth=8, grace=DEFAULT_GRACE, reserve=0.0, on_stubborn="wait")


class Budget:
    """The ledger of a run: its reservations and expenses, inside the ledgers of the runs above.

    A reservation is checked against every ledger up to the root and entered into all of them in one step, with no
    await between, so no schedule of parallel runs can spend what is not there. The lock is for runs on several event
    loops. Money is counted in whole numbers, so that sums are exact: see `prices.MONEY`.

    Args:
        limits: What this run, with all below it, may use.
        parent: Ledger of the run that started this one.
        shared: Ledgers that other trees of runs use too.

    Attributes:
        used: What is reserved or spent, by resource.
        tokens: What the endpoint reported, by the names of `Usage`.
        cost: What it cost, as ledgers count money.
        is_priced: Whether `cost` has all of it in it: each reply reported its tokens, and its model has a price.
        is_shared: Whether runs of several trees spend from it. Such a ledger takes what they spend when they spend it,
            and not once more what a durable run had spent before it went on.
    """

    __slots__ = ("_above", "_allowed", "_gate", "_limited", "cost", "is_priced", "tokens", "used")

    is_shared = False

    def __init__(self, limits: Limits, parent: Budget | None = None, shared: tuple[Budget, ...] = ()) -> None:
        self._allowed, self._limited = _allowed_by(limits)
        above = (parent, *parent._above) if parent is not None else ()
        if shared:  # a delegate may have a shared budget that a run above it has too
            above += tuple(each for each in dict.fromkeys(shared) if each not in above)
        # Without this one: a ledger that knew itself would stay, with the run, until the garbage collector came.
        self._above: tuple[Budget, ...] = above
        for ledger in above:
            self._limited |= ledger._limited
        self._gate: Gate | None = None
        self.used: dict[Resource, int] = {"requests": 0, "tool_calls": 0, "tokens": 0, "cost": 0}
        self.tokens: dict[str, int] = dict.fromkeys(_TOKENS, 0)
        self.cost, self.is_priced = 0, True

    def reserve(self, resource: Resource, amount: int = 1) -> Reservation:
        """Set an amount aside, here and in every ledger above.

        Returns:
            The reservation: a context manager that gives back what was not committed.

        Raises:
            BudgetExceeded: One of the ledgers has not that much left; nothing was reserved.
        """
        self.spend(resource, amount)
        return Reservation(self, resource, amount)

    def spend(self, resource: Resource, amount: int = 1) -> None:
        """Spend an amount, here and in every ledger above, in one step.

        Raises:
            BudgetExceeded: One of the ledgers has not that much left; nothing was spent.
        """
        line = (self, *self._above)
        with _lock:
            if resource in self._limited:
                needed = amount or 1  # an estimate of nothing still needs something left to spend
                for ledger in line:
                    if ledger.used[resource] + needed > ledger._allowed[resource]:
                        raise ledger._exceeded(resource)
            for ledger in line:
                ledger.used[resource] += amount

    def is_unlimited(self, resource: Resource) -> bool:
        """Whether neither this ledger nor one above limits a resource."""
        return resource not in self._limited

    def add_reply(self, reply: Reply, cost: int | None, *, is_recalled: bool = False) -> None:
        """Note the usage that the endpoint reported with a reply, here and above.

        Args:
            reply: The reply.
            cost: What it cost, as ledgers count money; None if nobody knows.
            is_recalled: Whether it came before the run went on, which shared ledgers know already.
        """
        has_parts = reply.cached_input_tokens or reply.cache_write_input_tokens or reply.reasoning_tokens
        with _lock:
            for ledger in self._of_tree() if is_recalled else (self, *self._above):
                tokens = ledger.tokens
                tokens["input_tokens"] += reply.input_tokens
                tokens["output_tokens"] += reply.output_tokens
                if has_parts:
                    tokens["cached_input_tokens"] += reply.cached_input_tokens
                    tokens["cache_write_input_tokens"] += reply.cache_write_input_tokens
                    tokens["reasoning_tokens"] += reply.reasoning_tokens
                if cost is None:
                    ledger.is_priced = False
                else:
                    ledger.cost += cost

    def add_usage(self, usage: Usage) -> None:
        """Note the usage of a run below that ended before this one went on, here and above."""
        spent: dict[Resource, int] = {
            "requests": usage.requests,
            "tool_calls": usage.tool_calls,
            "tokens": usage.total_tokens,
        }
        cost = amount_of(usage.cost) if usage.cost is not None else None
        if cost is not None and not self.is_unlimited("cost"):
            spent["cost"] = int(cost)
        for resource, amount in spent.items():
            self.correct(resource, amount, is_recalled=True)
        with _lock:
            for ledger in self._of_tree():
                for name in _TOKENS:
                    ledger.tokens[name] += getattr(usage, name)
                ledger.is_priced = ledger.is_priced and cost is not None
                ledger.cost += int(cost or 0)

    def correct(self, resource: Resource, amount: int, *, is_recalled: bool = False) -> None:
        """Add or, if negative, give back an amount without asking whether it fits.

        Args:
            resource: What of.
            amount: How much.
            is_recalled: Whether it was spent before the run went on, which shared ledgers know already.
        """
        if amount:
            with _lock:
                for ledger in self._of_tree() if is_recalled else (self, *self._above):
                    ledger.used[resource] += amount

    def _of_tree(self) -> list[Budget]:
        """This ledger and those above that no other trees of runs use."""
        return [ledger for ledger in (self, *self._above) if not ledger.is_shared]

    def gates_of_money(self) -> list[Gate]:
        """The gates for replies of unknown cost: one for each ledger that limits money, in a fixed order."""
        with _lock:
            limiting = [ledger for ledger in (self, *self._above) if ledger._allowed["cost"] < math.inf]
            for ledger in limiting:
                ledger._gate = ledger._gate or Gate(1, "other replies that may cost any amount: max_tokens is not set")
        return sorted((ledger._gate for ledger in limiting if ledger._gate is not None), key=id)

    def usage(self) -> Usage:
        """The usage so far."""
        return Usage(
            requests=self.used["requests"],
            tool_calls=self.used["tool_calls"],
            cost=self.cost / MONEY if self.is_priced else None,
            **self.tokens,
        )

    def _exceeded(self, resource: Resource) -> BudgetExceeded:
        scale = MONEY if resource == "cost" else 1
        return BudgetExceeded(resource, self._allowed[resource] / scale, self.used[resource] / scale)


_TOKENS = (
    "input_tokens",
    "output_tokens",
    "cached_input_tokens",
    "cache_write_input_tokens",
    "reasoning_tokens",
)


class SharedBudget(Budget):
    """A budget that several runs share, one after the other or at once: that of a tenant, or of a day.

    Give it to agents, to runs, or to both, as `budget=`: what each of them uses, with its delegates, is taken from it
    too, before it is used. It may be shared by runs in several event loops and threads.

    Args:
        max_requests: As in `Limits`.
        max_tool_calls: As in `Limits`.
        max_tokens: As in `Limits`.
        max_cost: As in `Limits`; all prices have to be in one currency.

    Raises:
        InvalidArguments: A value is negative or not a number.

    Example:
        >>> SharedBudget(max_cost=5.0).usage().requests
        0
    """

    __slots__ = ()

    is_shared = True

    def __init__(
        self,
        *,
        max_requests: float | None = None,
        max_tool_calls: float | None = None,
        max_tokens: float | None = None,
        max_cost: float | None = None,
    ) -> None:
        super().__init__(
            Limits(max_requests=max_requests, max_tool_calls=max_tool_calls, max_tokens=max_tokens, max_cost=max_cost)
        )

    def __repr__(self) -> str:
        scales = {"cost": MONEY}
        shown = (
            f"{resource}={self.used[resource] / scales.get(resource, 1):g} of {most / scales.get(resource, 1):g}"
            for resource, most in self._allowed.items()
            if most < math.inf
        )
        return f"<SharedBudget {', '.join(shown) or 'without limits'}>"


# One for all ledgers: an entry goes into several, of trees that share some of them.
_lock = lock()


@functools.lru_cache(maxsize=256)
def _allowed_by(limits: Limits) -> tuple[dict[Resource, float], frozenset[Resource]]:
    """The most of each resource that limits allow, and the resources that they limit."""
    allowed: dict[Resource, float] = {
        "requests": _or_unlimited(limits.max_requests),
        "tool_calls": _or_unlimited(limits.max_tool_calls),
        "tokens": _or_unlimited(limits.max_tokens),
        "cost": amount_of(limits.max_cost),
    }
    return allowed, frozenset(resource for resource, most in allowed.items() if most != math.inf)


def _or_unlimited(limit: float | None) -> float:
    return math.inf if limit is None else limit


class Reservation:
    """An amount set aside on a ledger: `commit()` spends it, leaving the block without gives it back."""

    __slots__ = ("_amount", "_budget", "_resource")

    def __init__(self, budget: Budget, resource: Resource, amount: int) -> None:
        self._budget = budget
        self._resource: Resource = resource
        self._amount = amount

    def commit(self, actual: int | None = None) -> None:
        """Spend the amount.

        Args:
            actual: What was really used, if that is known better than when it was reserved.
        """
        if actual is not None:
            self._budget.correct(self._resource, actual - self._amount)
        self._amount = 0

    def __enter__(self) -> Reservation:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self._amount:
            self._budget.correct(self._resource, -self._amount)
            self._amount = 0
