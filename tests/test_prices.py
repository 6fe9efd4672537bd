"""Prices: what tokens cost, and which price is for which model."""

from __future__ import annotations

import functools
import importlib
import logging
import math
import sys
import threading
import time
from typing import Any

import anyio
import pytest
from hypothesis import given, strategies as st

from fractal import BaseAgent, InvalidArguments, Limits, Price, PriceUnknown, Reply, abandoned_threads, tool
from fractal._engine import run as _run
from fractal._engine.pricing import Prices, prices_of_library
from fractal.prices import MONEY, amount_of
from fractal.testing import ScriptedModel, answers
from tests.streams import Watch

SMALL = Price(input=0.15, output=0.6, cached=0.075, cache_write=0.3)


def test_a_price_is_for_a_million_tokens() -> None:
    assert Price(input=2, output=8).cost(input_tokens=1_000_000) == 2.0
    assert Price(input=2, output=8).cost(output_tokens=500_000) == 4.0


def test_cached_tokens_and_those_put_into_the_cache_are_part_of_the_prompt_and_have_prices_of_their_own() -> None:
    cost = SMALL.cost(input_tokens=3000, output_tokens=1000, cached_input_tokens=1000, cache_write_input_tokens=1000)
    assert cost == pytest.approx((0.15 + 0.075 + 0.3 + 0.6) / 1000)


def test_cached_tokens_that_are_counted_apart_from_the_prompt_earn_no_money() -> None:
    price = Price(input=10, output=0, cached=1, cache_write=2)
    assert price.cost(input_tokens=10, cached_input_tokens=1000) == pytest.approx(1000e-6)
    assert price.cost(input_tokens=10, cached_input_tokens=8, cache_write_input_tokens=8) == pytest.approx(24e-6)


def test_without_prices_of_their_own_they_cost_as_the_others() -> None:
    tokens = {"input_tokens": 3000, "cached_input_tokens": 1000, "cache_write_input_tokens": 500}
    assert Price(input=1, output=1).cost(**tokens) == 0.003


def test_above_a_number_of_prompt_tokens_all_of_a_request_costs_more() -> None:
    price = Price(input=1, output=10, above=((1000, Price(input=2, output=20)), (5000, Price(input=4, output=40))))
    costs = [price.cost(input_tokens=n, output_tokens=100) for n in (1000, 1001, 5000, 5001)]
    assert costs == pytest.approx([0.002, 0.004002, 0.012, 0.024004])


def test_what_a_request_costs_at_most_is_with_the_dearest_way_to_count_its_prompt() -> None:
    assert SMALL.most(1000, 100) == amount_of(0.0003 + 0.00006)


@given(st.floats(0, 1000), st.integers(0, 10**6), st.integers(0, 10**6), st.data())
def test_no_request_costs_more_than_its_most(rate: float, prompt: int, reply: int, data: st.DataObject) -> None:
    cached = data.draw(st.integers(0, prompt))
    price = Price(input=rate, output=2 * rate, cached=rate / 10, cache_write=rate * 1.25)
    written = data.draw(st.integers(0, prompt - cached))
    assert price.amount(prompt, reply, cached, written) <= price.most(prompt, reply)


def test_sums_of_money_are_exact() -> None:
    third = amount_of(0.1)
    assert third + third + third == amount_of(0.3)
    assert sum(Price(input=0.1, output=0).amount(1, 0) for _ in range(10)) == amount_of(1e-6)


def test_no_limit_is_infinite() -> None:
    assert amount_of(None) == amount_of(math.inf) == math.inf
    assert amount_of(1) == MONEY


@pytest.mark.parametrize("wrong", [-1, "1", None, math.nan, math.inf, True])
@pytest.mark.parametrize("name", ["input", "output", "cached", "cache_write"])
def test_a_price_that_is_none_is_refused_by_its_name(name: str, wrong: Any) -> None:
    if wrong is None and name.startswith("cache"):
        return
    with pytest.raises(InvalidArguments, match=rf"Price\.{name} is "):
        Price(**{"input": 1, "output": 1, name: wrong})


@pytest.mark.parametrize("wrong", [(5,), ((5, 6),), (("5", SMALL),), ((5, SMALL, 1),)])
def test_prices_of_long_requests_that_are_none_are_refused(wrong: Any) -> None:
    with pytest.raises(InvalidArguments, match=r"Price\.above has "):
        Price(input=1, output=1, above=wrong)


# ---- tables


@pytest.mark.parametrize("wrong", [[], "gpt", {"gpt": 1.0}, {"gpt": {"input": 1}}])
def test_a_table_that_is_none_is_refused(wrong: Any) -> None:
    with pytest.raises(InvalidArguments, match="prices="):
        Prices(wrong)


@pytest.mark.parametrize("name", ["small", "small-2024-07-18", "small-20240718", "acme/small", "acme/small@20240718"])
def test_a_model_is_found_under_its_plain_name_too(name: str) -> None:
    assert Prices({"small": SMALL}).find(name) is SMALL


@pytest.mark.parametrize("name", ["smaller", "small-2", "small-mini", "large", "acme/large"])
def test_another_model_is_not(name: str) -> None:
    assert Prices({"small": SMALL}).find(name) is None


def test_a_name_that_is_in_the_table_as_it_is_goes_first() -> None:
    other = Price(input=9, output=9)
    assert Prices({"small": SMALL, "small-2024-07-18": other}).find("small-2024-07-18") is other


def test_of_an_unknown_model_is_told_once() -> None:
    told: list[str] = []
    prices = Prices({"small": SMALL})
    for _ in range(3):
        assert prices.find("large", told.append) is None
    assert told == ["prices= has no price for the model 'large': what it costs is not known"]


def test_the_model_that_wrote_a_reply_counts_and_if_it_is_unknown_the_one_that_was_asked() -> None:
    large = Price(input=9, output=9)
    prices, told = Prices({"small": SMALL, "large": large}), list[str]()
    assert prices.of_reply(Reply(model="large"), "small", told.append) is large
    assert prices.of_reply(Reply(model="some-deployment"), "small", told.append) is SMALL
    assert prices.of_reply(Reply(), "small", told.append) is SMALL
    assert told == []


def test_an_endpoint_that_makes_up_names_takes_no_memory() -> None:
    prices = Prices({"small": SMALL})
    for number in range(5000):
        prices.of_reply(Reply(model=f"m{number}"), "small", lambda message: None)
    assert len(prices._found) <= 1000
    assert prices.find("small") is SMALL


# ---- the library


def test_the_library_knows_prices_and_is_asked_once_for_a_model(monkeypatch: pytest.MonkeyPatch) -> None:
    genai_prices = pytest.importorskip("genai_prices")
    asked: list[str] = []
    real = genai_prices.calc_price
    monkeypatch.setattr(genai_prices, "calc_price", lambda usage, model: asked.append(model) or real(usage, model))
    prices = Prices()
    first = prices.find("gpt-4o-mini")
    assert first is not None
    assert (first.input, first.output, first.cached) == (0.15, 0.6, 0.075)
    assert prices.find("gpt-4o-mini") is first
    assert asked == ["gpt-4o-mini"]


@pytest.mark.parametrize("model", ["gpt-4o-mini", "claude-sonnet-4-5", "gemini-2.5-pro", "gpt-5"])
@pytest.mark.parametrize("tokens", [1000, 200_000, 200_001, 300_000])
def test_what_a_request_costs_is_what_the_library_says(model: str, tokens: int) -> None:
    genai_prices = pytest.importorskip("genai_prices")
    usage = genai_prices.Usage(input_tokens=tokens, output_tokens=1000, cache_read_tokens=500)
    price = Prices().find(model)
    assert price is not None
    cost = price.cost(input_tokens=tokens, output_tokens=1000, cached_input_tokens=500)
    assert cost == pytest.approx(float(genai_prices.calc_price(usage, model).total_price))


def test_a_model_the_library_does_not_know_is_told_in_the_log_once(caplog: pytest.LogCaptureFixture) -> None:
    pytest.importorskip("genai_prices")
    prices, told = Prices(), list[str]()
    with caplog.at_level(logging.INFO, "fractal"):
        for _ in range(3):
            assert prices.find("a-model-of-our-own", told.append) is None
    assert [record.message for record in caplog.records] == [
        "genai-prices knows no price of the model 'a-model-of-our-own': what it costs is not known"
    ]
    assert told == []


async def test_the_library_is_loaded_once_and_in_a_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[str, bool]] = []
    loop = threading.get_ident()

    def find(name: str) -> None:
        asked.append((name, threading.get_ident() == loop))
        time.sleep(0.05)

    monkeypatch.setattr(importlib, "import_module", find)
    prices = Prices()
    async with anyio.create_task_group() as group:
        for _ in range(5):
            group.start_soon(prices.load)
    assert asked == [("genai_prices", False)]
    assert prices.is_loaded
    assert Prices({"small": SMALL}).is_loaded


async def test_the_time_that_loading_takes_is_none_of_the_run(monkeypatch: pytest.MonkeyPatch) -> None:
    def find(name: str) -> None:
        time.sleep(1.2)
        raise ImportError

    monkeypatch.setattr(importlib, "import_module", find)
    monkeypatch.setattr(_run, "prices_of_library", functools.cache(Prices))
    agent = BaseAgent("A", "a", client=ScriptedModel(["hi"] * 3), limits=Limits(reserve=0.4), timeout=1.0)
    results: list[Any] = []

    async def run() -> None:
        results.append(await agent.run("go"))

    async def stream() -> None:
        async with agent.stream("go") as stream:
            assert [piece async for piece in stream.text()] == ["hi"]
        results.append(await stream.result())

    async with anyio.create_task_group() as group:
        for verb in (run, run, stream):
            group.start_soon(verb)
    assert [result.stop_reason for result in results] == ["finished"] * 3


async def test_prices_are_loaded_when_there_are_tokens_to_be_paid(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []
    monkeypatch.setattr(importlib, "import_module", asked.append)
    monkeypatch.setattr(_run, "prices_of_library", functools.cache(Prices))
    model = ScriptedModel([answers.calls(answers.call("pay"), usage=(0, 0)), answers.text("paid")])

    @tool
    def pay() -> str:
        asked.append("nobody, until the tool was called")
        return "paid"

    result = await BaseAgent("A", "a", client=model, toolkit=[pay]).run("go")
    assert (result.content, asked[:2]) == ("paid", ["nobody, until the tool was called", "genai_prices"])


async def test_a_budget_in_money_has_prices_loaded_before_the_request(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []
    monkeypatch.setattr(importlib, "import_module", asked.append)
    monkeypatch.setattr(_run, "prices_of_library", functools.cache(Prices))
    model = ScriptedModel(["hi"])
    with pytest.raises(PriceUnknown):
        await BaseAgent("A", "a", client=model, limits=Limits(max_cost=1)).run("go")
    assert (asked[0], model.requests) == ("genai_prices", [])


async def test_a_run_that_is_cancelled_while_prices_are_loaded_ends_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    goes_on = threading.Event()

    def find(name: str) -> None:
        goes_on.wait(20)

    monkeypatch.setattr(importlib, "import_module", find)
    monkeypatch.setattr(_run, "prices_of_library", Prices)
    try:
        began = time.monotonic()
        with anyio.move_on_after(0.1) as scope:
            watch = Watch()
            await BaseAgent("A", "a", client=ScriptedModel(["hi"]), observers=[watch]).run("go")
        assert scope.cancelled_caught
        [result] = watch.results()
        assert (result.usage.requests, result.usage.output_tokens > 0, result.usage.cost) == (1, True, None)
        assert time.monotonic() - began < 10
    finally:
        goes_on.set()
        while abandoned_threads():  # noqa: ASYNC110  # nobody tells the event loop
            await anyio.sleep(0.01)


@pytest.mark.parametrize("error", [ImportError("half installed"), AttributeError("calc_price"), TypeError()], ids=repr)
async def test_a_library_that_is_of_no_use_ends_no_run(
    error: Exception, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fail(name: str) -> None:
        raise error

    monkeypatch.setattr(importlib, "import_module", fail)
    monkeypatch.setattr(_run, "prices_of_library", Prices)
    result = await BaseAgent("A", "a", client=ScriptedModel(["hi"])).run("go")
    assert (result.content, result.usage.cost) == ("hi", None)
    assert "genai-prices cannot say" in caplog.text


def test_without_the_library_there_are_no_prices(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "genai_prices", None)
    prices_of_library.cache_clear()
    assert prices_of_library() is None
    prices_of_library.cache_clear()
