"""How users' own functions are called."""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable
from typing import Any

import pytest

from fractal import InvalidArguments, RunContext
from fractal._engine.hooks import Hook
from tests.support import shown


def only_output(output: str) -> str:
    return output


def context_last(output: str, ctx: RunContext) -> Any:
    return output, ctx


def context_first(ctx: RunContext[dict[str, int]], output: str) -> Any:
    return output, ctx


def keywords_only(*, run: RunContext[Any] | None, answer: str) -> Any:
    return answer, run


def positional_only(ctx: RunContext, output: str, /) -> Any:
    return output, ctx


def with_defaults(output: str, strict: bool = True, *, ctx: RunContext | None = None) -> Any:
    assert strict
    return output, ctx


def needed_last(*, strict: bool = True, output: str) -> Any:
    assert strict is True
    return output


def not_annotated(answer):  # type: ignore[no-untyped-def]
    return answer


class Judge:
    def method(self, ctx: RunContext, output: str) -> Any:
        return output, ctx

    def __call__(self, output: str, ctx: RunContext) -> Any:
        return output, ctx


CONTEXT: Any = object()
BOTH = ("text", CONTEXT)


@pytest.mark.parametrize(
    ("function", "value"),
    [
        (only_output, "text"),
        (not_annotated, "text"),
        (needed_last, "text"),
        (lambda answer: answer, "text"),
        (functools.partial(context_last), BOTH),
        (functools.partial(with_defaults, strict=True), BOTH),
        (context_last, BOTH),
        (context_first, BOTH),
        (keywords_only, BOTH),
        (positional_only, BOTH),
        (with_defaults, BOTH),
        (Judge().method, BOTH),
        (Judge(), BOTH),
        (lambda answer, ctx: (answer, ctx), BOTH),
        (lambda *answer: answer[0], "text"),
        (str.upper, "TEXT"),
    ],
    ids=shown,
)
def test_a_hook_gets_the_output_and_the_context_if_it_asks_for_it(function: Callable[..., Any], value: Any) -> None:
    positional, by_name = Hook(function, "check").arguments("text", CONTEXT)
    assert function(*positional, **by_name) == value


async def test_an_async_hook_is_awaited() -> None:
    async def look(ctx: RunContext, output: str) -> Any:
        return output, ctx

    assert await Hook(look, "check")("text", CONTEXT) == BOTH


@pytest.mark.parametrize(
    "function",
    [
        lambda: None,
        lambda output, more, third: None,
        lambda **output: None,
        lambda output, *, needed: None,
    ],
)
def test_a_hook_that_takes_something_else_is_wrong_use(function: Callable[..., Any]) -> None:
    with pytest.raises(InvalidArguments, match=r"check=.*RunContext"):
        Hook(function, "check")


def only_context(ctx: RunContext) -> None: ...


def two_contexts(output: str, ctx: RunContext, again: RunContext) -> None: ...


def names_nothing(output: NoSuchName) -> None: ...  # type: ignore[name-defined]  # noqa: F821


@pytest.mark.parametrize(
    ("function", "words"),
    [(only_context, "one value"), (two_contexts, "one value"), (names_nothing, "NoSuchName"), ("text", "function")],
)
def test_a_hook_that_cannot_be_read_is_wrong_use(function: Any, words: str) -> None:
    with pytest.raises(InvalidArguments, match=words):
        Hook(function, "check")


async def test_a_plain_hook_runs_in_a_worker_thread() -> None:
    def where(_: object) -> threading.Thread:
        return threading.current_thread()

    assert await Hook(where, "check")(None, CONTEXT) is not threading.current_thread()


async def test_what_a_hook_raises_comes_out_as_it_is() -> None:
    def plain(_: object) -> None:
        raise LookupError("plain")

    async def awaited(_: object) -> None:
        raise LookupError("awaited")

    for function in (plain, awaited):
        with pytest.raises(LookupError, match=function.__name__):
            await Hook(function, "check")(None, CONTEXT)
