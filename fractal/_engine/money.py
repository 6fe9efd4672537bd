"""The money of a question to a model: set aside before each of its requests, settled by its reply."""

from __future__ import annotations

from contextvars import ContextVar
from typing import TYPE_CHECKING, Self

from fractal.errors import ModelError, PriceUnknown, RequestTimedOut
from fractal.models.combined import names_asked

if TYPE_CHECKING:
    from types import TracebackType

    from fractal._concurrency.gates import Gate
    from fractal._engine.run import Run
    from fractal.limits import Reservation
    from fractal.model import ModelRequest
    from fractal.prices import Price

__all__ = ["Money"]

_passed: ContextVar[tuple[Gate, ...]] = ContextVar("fractal_gates_of_money", default=())
"""Gates that the current task is behind: a model may run agents to find its answer, and would wait for itself."""


class Money:
    """A block around a request, for which the money that its reply can cost is set aside.

    Args:
        run: The run that asks.
        request: The question.
        prompt_tokens: Tokens of the prompt, by estimate.

    Raises:
        PriceUnknown: A model that may answer has no price, so that nobody can say what it costs.
    """

    __slots__ = ("_gates", "_most", "_prompt", "_reservation", "_run", "_token")

    def __init__(self, run: Run, request: ModelRequest, prompt_tokens: int) -> None:
        self._run = run
        prices = [_price(run, name) for name in names_asked(run.settings.model, request.model)]
        reply_tokens = request.reply_tokens
        self._prompt = max(price.most(prompt_tokens, 0) for price in prices)
        self._most = max(price.most(prompt_tokens, reply_tokens) for price in prices)
        # A reply without a bound may cost anything. One at a time, no more than one of them can go over.
        gates = run.budget.gates_of_money() if not reply_tokens else ()
        self._gates = [gate for gate in gates if gate not in _passed.get()]
        self._reservation: Reservation | None = None

    def charge(self) -> None:
        """Spend the most that one more request for the same question can cost; its real cost stays unknown.

        Raises:
            BudgetExceeded: There is not that much left.
        """
        self._run.budget.spend("cost", self._most)

    def settle(self, cost: int | None) -> None:
        """Spend the cost of the reply; None: unknown, and all that was set aside is spent."""
        assert self._reservation is not None
        self._reservation.commit(cost)

    async def __aenter__(self) -> Self:
        held: list[Gate] = []
        try:
            for gate in self._gates:
                await gate.acquire(self._run.clock.waiting)
                held.append(gate)
            self._reservation = self._run.budget.reserve("cost", self._most)
        except BaseException:
            _release(held)
            raise
        self._token = _passed.set((*_passed.get(), *self._gates))
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        _passed.reset(self._token)
        assert self._reservation is not None
        with self._reservation:  # gives back what is not spent
            if error is not None and (isinstance(error, RequestTimedOut) or not isinstance(error, ModelError)):
                self._reservation.commit(self._prompt)  # it was cut, and the endpoint may have read that far
        _release(self._gates)


def _release(gates: list[Gate]) -> None:
    for gate in gates:
        gate.release()


def _price(run: Run, model: str) -> Price:
    price = run.prices.find(model) if run.prices is not None else None
    if price is None:
        raise PriceUnknown(model)
    return price
