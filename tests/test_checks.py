"""Numbers that users give."""

from __future__ import annotations

import math
from typing import Any

import pytest

from fractal._checks import is_count, is_number


@pytest.mark.parametrize(("value", "least"), [(0, 0), (1, 1), (7, 3), (10**30, 1)])
def test_a_whole_number_from_the_least_one_up_is_a_count(value: int, least: int) -> None:
    assert is_count(value, least)


@pytest.mark.parametrize(("value", "least"), [(0, 1), (-1, 0), (2, 3), (True, 0), (1.0, 0), ("1", 0), (None, 0)])
def test_anything_else_is_none(value: Any, least: int) -> None:
    assert not is_count(value, least)


@pytest.mark.parametrize("value", [0, -1, 2.5, math.inf])
def test_whole_and_broken_numbers_are_numbers(value: float) -> None:
    assert is_number(value)


@pytest.mark.parametrize("value", [True, math.nan, "1", None, 1j])
def test_a_bool_and_what_is_not_a_number_are_none(value: Any) -> None:
    assert not is_number(value)


def test_a_number_may_be_too_large_for_a_float():
    assert is_number(10**400)
    assert is_number(-(10**400))
