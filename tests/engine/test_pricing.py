"""Which price holds for a model, where the library that knows prices has odd ones."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import anyio
import pytest

from fractal._engine import pricing
from fractal._engine.pricing import Prices


async def test_the_library_of_prices_is_loaded_once_however_many_want_it(monkeypatch: pytest.MonkeyPatch):
    loaded = list[str]()
    monkeypatch.setattr(pricing, "_known_to_library", loaded.append)
    prices = Prices()
    async with anyio.create_task_group() as group:
        for _ in range(3):
            group.start_soon(prices.load)
    assert (loaded, prices.is_loaded) == ([""], True)


@pytest.mark.parametrize("missing", ["input", "output"])
def test_a_model_that_is_not_paid_by_the_token_has_no_price(missing: str):
    rates: dict[str, Any] = dict.fromkeys(pricing._NAMES_OF_LIBRARY.values(), 1)
    rates[pricing._NAMES_OF_LIBRARY[missing]] = None
    assert pricing._of_library(SimpleNamespace(**rates)) is None
