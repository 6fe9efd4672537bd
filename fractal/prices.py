"""`Price`: what the tokens of a model cost."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from fractal.errors import InvalidArguments

if TYPE_CHECKING:
    from fractal.model import Reply

__all__ = ["MONEY", "Price", "amount_of"]

MONEY = 10**12
"""Ledgers count money in whole numbers of this part of the currency, so that sums are exact."""

_PER_TOKEN = MONEY // 10**6  # prices are for a million tokens


def amount_of(money: float | None) -> float:
    """An amount of money as ledgers count it: a whole number, or infinity.

    Args:
        money: In the currency of the prices. None: no limit.
    """
    return math.inf if money is None or money == math.inf else round(money * MONEY)


@dataclass(frozen=True, slots=True, kw_only=True)
class Price:
    """The price of a model's tokens: money for a million of them, in any one currency.

    Args:
        input: Of the prompt.
        output: Of the reply, reasoning included.
        cached: Of the prompt's tokens that the endpoint's cache served. None: as the others.
        cache_write: Of the prompt's tokens that it put into its cache. None: as the others.
        above: Prices of long requests, each with the number of prompt tokens above which it holds for the whole
            request.

    Raises:
        InvalidArguments: A price is no number from 0 up.

    Example:
        >>> Price(input=0.15, output=0.6).cost(input_tokens=2000, output_tokens=500)
        0.0006
    """

    input: float
    output: float
    cached: float | None = None
    cache_write: float | None = None
    above: tuple[tuple[int, Price], ...] = ()
    _rates: tuple[int, int, int, int] = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        for name in ("input", "output", "cached", "cache_write"):
            value = getattr(self, name)
            if (value is None and name.startswith("cache")) or _is_price(value):
                continue
            raise InvalidArguments(f"Price.{name} is {value!r}: give the money for a million tokens, from 0 up")
        for each in self.above:
            if not (isinstance(each, tuple) and len(each) == 2 and type(each[0]) is int and isinstance(each[1], Price)):
                raise InvalidArguments(f"Price.above has {each!r}: give pairs of a number of tokens and a Price")
        rates = (
            self.input,
            self.input if self.cached is None else self.cached,
            self.input if self.cache_write is None else self.cache_write,
            self.output,
        )
        object.__setattr__(self, "_rates", tuple(round(rate * _PER_TOKEN) for rate in rates))

    def amount(self, input_tokens: int, output_tokens: int, cached: int = 0, written: int = 0) -> int:
        """The cost of a request, as ledgers count money.

        Args:
            input_tokens: Prompt tokens, those that a cache served or took included.
            output_tokens: Completion tokens.
            cached: Prompt tokens that the endpoint's cache served.
            written: Prompt tokens that it put into its cache.
        """
        rates = (self._for(input_tokens) if self.above else self)._rates
        plain = max(input_tokens - cached - written, 0)  # some count the others apart
        return plain * rates[0] + cached * rates[1] + written * rates[2] + output_tokens * rates[3]

    def of_reply(self, reply: Reply) -> int:
        """The cost of a reply, as ledgers count money."""
        cached, written = reply.cached_input_tokens, reply.cache_write_input_tokens
        return self.amount(reply.input_tokens, reply.output_tokens, cached, written)

    def most(self, input_tokens: int, output_tokens: int) -> int:
        """The highest cost of a request, whatever a cache does, as ledgers count money."""
        rates = self._for(input_tokens)._rates
        return input_tokens * max(rates[:3]) + output_tokens * rates[3]

    def cost(
        self,
        *,
        input_tokens: int = 0,
        output_tokens: int = 0,
        cached_input_tokens: int = 0,
        cache_write_input_tokens: int = 0,
    ) -> float:
        """The cost of a request.

        Args:
            input_tokens: Prompt tokens, those that a cache served or took included.
            output_tokens: Completion tokens.
            cached_input_tokens: Prompt tokens that the endpoint's cache served.
            cache_write_input_tokens: Prompt tokens that it put into its cache.
        """
        return self.amount(input_tokens, output_tokens, cached_input_tokens, cache_write_input_tokens) / MONEY

    def _for(self, input_tokens: int) -> Price:
        """The price for a request of so many prompt tokens."""
        found, start = self, 0
        for above, price in self.above:
            if start <= above < input_tokens:
                found, start = price, above
        return found


def _is_price(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and 0 <= value < math.inf
