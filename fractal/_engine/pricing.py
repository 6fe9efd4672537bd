"""Which price holds for a model: the user's table, or what the library `genai-prices` knows."""

from __future__ import annotations

import functools
import importlib
import importlib.util
import re
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from fractal._concurrency.gates import Gate
from fractal._concurrency.threads import ThreadCall
from fractal._log import log
from fractal._texts import repr_of
from fractal.errors import InvalidArguments
from fractal.prices import Price

if TYPE_CHECKING:
    from fractal._engine.hooks import Warn
    from fractal.model import Reply

__all__ = ["Prices", "prices_of_library"]

# "gpt-4o-2024-08-06" is the model that a table calls "gpt-4o", and "openai/gpt-4o" too.
_DATE = re.compile(r"[-@](\d{4}-\d{2}-\d{2}|\d{8})$")

_NAMES_OF_LIBRARY = {
    "input": "input_mtok",
    "output": "output_mtok",
    "cached": "cache_read_mtok",
    "cache_write": "cache_write_mtok",
}

_PRICES = "the prices of models"

_MOST_NAMES = 1000  # that are remembered: endpoints may call their models what they like


class Prices:
    """The prices of models, by name.

    Args:
        table: The user's table. None: the prices that the library knows, if it is installed.

    Raises:
        InvalidArguments: The table is none.

    Attributes:
        is_loaded: Whether prices are found without a wait; else `load` sees to that.
    """

    def __init__(self, table: Mapping[str, Price] | None = None) -> None:
        if table is not None and not (
            isinstance(table, Mapping) and all(isinstance(price, Price) for price in table.values())
        ):
            raise InvalidArguments(
                f'prices={repr_of(table)}: give a dict of model names to Price(…), as {{"gpt-4o": Price(…)}}'
            )
        self._table = dict(table) if table is not None else None
        self._found: dict[str, Price | None] = {}
        self.is_loaded, self._loading = table is not None, Gate(1, _PRICES)

    async def load(self) -> None:
        """Import the library of prices, which takes a tenth of a second, without blocking the event loop."""
        async with self._loading.slot():
            if not self.is_loaded:  # pragma: no branch - coverage does not see the way out of the block
                await ThreadCall(lambda: _known_to_library(""), _PRICES, threads=None, abandon=True).run()
                self.is_loaded = True

    def find(self, model: str, warn: Warn | None = None) -> Price | None:
        """The price of a model, or None; looked up once.

        Args:
            model: Its name, as it is asked for or as it names itself.
            warn: Told, once, that a model has no price.
        """
        try:
            return self._found[model]
        except KeyError:
            pass
        if len(self._found) >= _MOST_NAMES:
            self._found.clear()
        price = self._found[model] = self._look_up(model)
        if price is None and warn is not None:
            self._say_unknown(model, warn)
        return price

    def of_reply(self, reply: Reply, asked: str, warn: Warn) -> Price | None:
        """The price of the model that wrote a reply; of the one asked for if the reply names none that has one."""
        if reply.model is not None and reply.model != asked:
            price = self.find(reply.model)
            if price is not None:
                return price
        return self.find(asked, warn)

    def _look_up(self, model: str) -> Price | None:
        plain = _DATE.sub("", model)
        names = dict.fromkeys((model, plain, plain.rpartition("/")[2]))
        if self._table is None:
            return next(filter(None, map(_known_to_library, names)), None)
        return next((self._table[name] for name in names if name in self._table), None)

    def _say_unknown(self, model: str, warn: Warn) -> None:
        if self._table is not None:
            warn(f"prices= has no price for the model {model!r}: what it costs is not known")
        else:
            log.info(f"genai-prices knows no price of the model {model!r}: what it costs is not known")


@functools.cache
def prices_of_library() -> Prices | None:
    """The prices of the library; None where it is not installed."""
    return Prices() if importlib.util.find_spec("genai_prices") is not None else None


def _known_to_library(model: str) -> Price | None:
    try:
        genai_prices: Any = importlib.import_module("genai_prices")
        found = genai_prices.calc_price(genai_prices.Usage(input_tokens=1, output_tokens=1), model)
        return _of_library(found.model_price)
    except LookupError:
        return None
    except Exception as error:  # no run fails because of that
        log.failure("genai-prices cannot say what a model costs", error)
        return None


def _of_library(prices: Any) -> Price | None:
    """One of the library's prices as one of ours; None if it is not per token."""
    rates: dict[str, Any] = {ours: getattr(prices, theirs) for ours, theirs in _NAMES_OF_LIBRARY.items()}
    if rates["input"] is None or rates["output"] is None:
        return None
    starts = sorted({tier.start for rate in rates.values() for tier in getattr(rate, "tiers", ())})
    above = tuple((start, Price(**{name: _rate(rate, start) for name, rate in rates.items()})) for start in starts)
    return Price(**{name: _rate(rate, -1) for name, rate in rates.items()}, above=above)


def _rate(rate: Any, start: int) -> Any:
    """The rate above a number of tokens."""
    if rate is None:
        return None
    tiers = [tier.price for tier in getattr(rate, "tiers", ()) if tier.start <= start]
    return float(tiers[-1] if tiers else getattr(rate, "base", rate))
