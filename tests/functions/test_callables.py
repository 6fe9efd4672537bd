"""What stands behind a callable, without anything of it being run."""

from __future__ import annotations

import functools
import types
from collections.abc import AsyncIterator
from typing import Any

import pytest

from fractal import InvalidTool, tool
from fractal._functions.callables import (
    bound_names,
    core_of,
    described,
    fixed_names,
    is_async,
    is_async_generator,
    layers,
    name_of,
    receiver_of,
    unbound,
)


def plain(a: int, b: int = 1) -> int:
    return a


async def coroutine(a: int) -> int:
    return a


async def generator(a: int) -> AsyncIterator[int]:
    yield a


class Called:
    def __call__(self, a: int) -> int:
        return a


class CalledAsync:
    async def __call__(self, a: int) -> int:
        return a


class CalledStatic:
    @staticmethod
    async def __call__(a: int) -> int:
        return a


class Holder:
    def method(self, a: int, b: int = 1) -> int:
        return a

    async def method_async(self, a: int, b: int = 1) -> int:
        return a

    @classmethod
    def of_class(cls, a: int) -> int:
        return a

    part = functools.partialmethod(method, b=2)
    part_async = functools.partialmethod(method_async, b=2)
    part_of_object = functools.partialmethod(Called(), b=2)


class Wraps:
    def __init__(self, function: Any) -> None:
        functools.update_wrapper(self, function)
        self.function = function

    def __call__(self, *arguments: Any) -> Any:
        return self.function(*arguments)


@functools.wraps(coroutine)
def wrapper(*arguments: Any) -> Any:
    return coroutine(*arguments)


holder, called = Holder(), Called()

KNOWN: list[tuple[Any, str, bool, Any, Any]] = [  # what, its name, whether it is awaited, its core, its receiver
    (plain, "plain", False, plain, None),
    (coroutine, "coroutine", True, coroutine, None),
    (functools.partial(plain, 1), "plain", False, plain, None),
    (functools.partial(functools.partial(coroutine), 1), "coroutine", True, coroutine, None),
    (functools.lru_cache(plain), "plain", False, plain, None),
    (wrapper, "coroutine", False, coroutine, None),
    (Wraps(plain), "plain", False, plain, None),
    (holder.method, "method", False, Holder.method, holder),
    (functools.partial(holder.method_async, 1), "method_async", True, Holder.method_async, holder),
    (Holder.of_class, "of_class", False, Holder.__dict__["of_class"].__func__, Holder),
    (holder.part, "method", False, Holder.method, holder),
    (holder.part_async, "method_async", True, Holder.method_async, holder),
    (Holder.part, "method", False, Holder.method, None),
    (called, "Called", False, Called.__call__, called),
    (functools.partial(called), "Called", False, Called.__call__, called),
    (CalledStatic(), "CalledStatic", True, CalledStatic.__call__, ...),
    (CalledAsync(), "CalledAsync", True, CalledAsync.__call__, ...),
    (Holder, "Holder", False, Holder, None),
    (len, "len", False, len, None),
    (lambda: 1, "function", False, ..., None),
]


@pytest.mark.parametrize(("it", "name", "awaited", "core", "receiver"), KNOWN, ids=[str(n) for n in range(len(KNOWN))])
def test_what_a_callable_ends_in_is_found(it: Any, name: str, awaited: bool, core: Any, receiver: Any) -> None:
    assert (name_of(it), is_async(it)) == (name, awaited)
    assert core is ... or core_of(it) is core
    assert receiver is ... or receiver_of(it) is receiver


def test_functions_that_yield_asynchronously_are_told_apart() -> None:
    for it in (generator, functools.partial(generator, 1), functools.partial(functools.partial(generator))):
        assert is_async_generator(it)
        assert not is_async(it)
    assert not any(map(is_async_generator, (plain, coroutine, called, len)))


def test_names_that_are_bound_or_taken_are_found_on_all_the_way() -> None:
    def f(a: int, b: int, c: int, /, d: int, *, e: int, **more: int) -> None: ...

    inner = functools.update_wrapper(functools.partial(f, 1, d=2), f)
    outer = functools.partial(inner, x=3)
    assert bound_names(outer) == {"d", "x"}
    assert fixed_names(outer) == {"d", "e", "x"}
    assert bound_names(holder.part) == {"b"}


def test_a_partial_that_looks_like_its_function_is_described_as_a_partial() -> None:
    import inspect

    part = functools.update_wrapper(functools.partial(plain, 1), plain)
    assert list(inspect.signature(part).parameters) == ["a", "b"], "as Python sees it"
    assert list(inspect.signature(described(part)).parameters) == ["b"]
    assert list(inspect.signature(described(types.MethodType(part, 5))).parameters) == []
    assert list(inspect.signature(described(CalledStatic())).parameters) == ["a"]


def test_what_goes_round_in_circles_comes_to_an_end() -> None:
    def f() -> None: ...

    f.__wrapped__ = f  # type: ignore[attr-defined]
    assert layers(f) == [f]
    assert core_of(f) is f
    with pytest.raises(InvalidTool, match="signature cannot be read"):
        from fractal import Tool

        Tool.from_function(f)


class Touchy:
    """Like a proxy outside of what it stands for: whoever touches it, fails."""

    def __getattr__(self, name: str) -> Any:
        raise RuntimeError(name)

    @property
    def __wrapped__(self) -> Any:
        raise RuntimeError("wrapped")

    @property
    def __name__(self) -> str:  # type: ignore[override]
        raise RuntimeError("name")

    def __call__(self, a: int) -> int:
        return a


def test_an_object_that_cannot_be_asked_is_what_is_called() -> None:
    it = Touchy()
    assert layers(it)[0] is it
    assert layers(it, asks=False)[0] is it
    assert name_of(it) == "Touchy"
    assert not is_async(it)
    assert receiver_of(it) is it


class Stub:
    """Like what stands for a remote object: it has whatever it is asked for, by the same kind of object."""

    def __init__(self, path: str = "") -> None:
        self.path = path

    def __getattr__(self, name: str) -> Any:
        return Stub(f"{self.path}.{name}")

    def __call__(self, a: int) -> str:
        return self.path


def test_a_stub_that_answers_to_any_name_wraps_nothing() -> None:
    it = Stub()
    assert (core_of(it), name_of(it)) == (it, "Stub")


class Unset:
    __slots__ = ("__wrapped__",)

    def __call__(self, a: int) -> int:
        return a


def test_a_slot_that_is_not_set_is_no_wrapper() -> None:
    it = Unset()
    assert (name_of(it), receiver_of(it)) == ("Unset", it)
    assert name_of(5) == "int"


def test_unbound_is_the_function_of_a_method() -> None:
    assert unbound(holder.method) is Holder.method
    assert unbound(Holder.__dict__["of_class"]) is core_of(Holder.of_class)
    assert unbound(plain) is plain


def test_a_partialmethod_is_not_marked_itself() -> None:
    with pytest.raises(InvalidTool, match="mark the function that the partialmethod calls"):
        tool(timeout=1.0)(functools.partialmethod(Holder.method, b=2))
