"""System prompts that were written for `str.format`: their author is told, and nobody else."""

from __future__ import annotations

import warnings
from typing import Any

import pytest

from fractal import BaseAgent, sync

VALUES: dict[str, object] = {"who": "Ada", "price": 1.5, "name": "x"}
FOR_FORMAT = [
    'Answer as {{"a": {who}}}',
    '{{"a": 1}} for {who}',
    "{{\n  a\n}}",
    "{price:.2f}",
    "{price:>10}",
    "{price:{name}}",
    "{price:,}",
    "{who!r}",
    "{who.name}",
    "{who[0]}",
    "{who[name].first!s:>5}",
    "{who:%Y-%m-%d}",
    "{who:}",
]
PLAIN = [
    "Help {who}.",
    'Answer as {"a": {"b": {who}}}',
    '{"who": "…", "price": 1.5, "a": {"b": [{}]}}',
    "{who: text, price: number}",
    "{ who }",
    "{who: string}",
    "{other:.2f} and {other!r}",
    "function f() { if (who) { return 1 }}",
    "{}",
    "{0}",
    "}} {",
]


def agents() -> list[type[Any]]:
    return [BaseAgent, sync.BaseAgent, type("Own", (BaseAgent,), {})]


@pytest.mark.parametrize("kind", agents(), ids=lambda kind: kind.__module__ + kind.__name__)
@pytest.mark.parametrize("template", FOR_FORMAT)
def test_a_template_that_only_str_format_reads_warns_where_it_is_given(kind: Any, template: str) -> None:
    with pytest.warns(UserWarning, match="the system prompt has") as told:
        kind("A", template, system_context=VALUES)
    assert [warning.filename for warning in told] == [__file__]

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        agent = kind("A", template)  # no template yet
    with pytest.warns(UserWarning, match="the system prompt has") as told:
        agent.update_system_context(**VALUES)
    assert [warning.filename for warning in told] == [__file__]
    agent.update_system_context(who="Grace")  # told once


@pytest.mark.parametrize("template", PLAIN)
def test_plain_braces_are_left_alone_without_a_word(template: str) -> None:
    BaseAgent("A", template, system_context=VALUES).update_system_context(more=1)


def test_what_a_function_returns_is_no_template() -> None:
    BaseAgent("A", lambda: "{{who}}", system_context=VALUES)


def test_a_subclass_is_told_at_its_own_line() -> None:
    class Own(BaseAgent):
        def __init__(self) -> None:
            super().__init__("A", "{who!r}", system_context=VALUES)

    with pytest.warns(UserWarning, match=r"\{who!r\}, which reaches the model as it is: write \{who\}") as told:
        Own()
    assert told[0].filename == __file__
