"""Event loops whose tasks take turns in a random order, which a seed repeats; and asyncio in virtual time.

An event loop promises no order among the tasks that can go on, and real ones keep one all the same: what works only
in that order works by luck. trio can be told to shuffle them. For asyncio there is a loop here that does; it shuffles
the steps of tasks and leaves all other callbacks in their order, on which transports and futures rely.
"""

from __future__ import annotations

import asyncio
import random
import selectors
import zlib
from collections import deque
from collections.abc import Awaitable, Callable, Generator
from contextlib import contextmanager
from functools import partial
from typing import Any, TypeVar
from weakref import WeakKeyDictionary

import anyio
import pytest
import trio
import trio.testing

from tests.support import BACKENDS

T = TypeVar("T")

Step = Callable[[], object]


def run_shuffled(
    scenario: Callable[[], Awaitable[T]], *, backend: str, seed: int, virtual: bool = False, step: Step | None = None
) -> T:
    """Run a scenario in an event loop of its own whose tasks take turns in a random order.

    Args:
        scenario: An async function without arguments.
        backend: `"asyncio"` or `"trio"`.
        seed: Of the order.
        virtual: Whether time jumps to the next deadline when every task waits: without threads and sockets then.
        step: Called at each step of each task.
    """
    if backend == "asyncio":
        options: dict[str, Any] = {"loop_factory": lambda: ShuffledLoop(seed, virtual=virtual, step=step)}
        return anyio.run(scenario, backend="asyncio", backend_options=options)
    options = {"instruments": [_Steps(step)] if step is not None else []}
    if virtual:
        options["clock"] = trio.testing.MockClock(autojump_threshold=0)
    with trio_shuffled(seed):
        return anyio.run(scenario, backend="trio", backend_options=options)


SHUFFLED = [pytest.param((name, None), id=f"{name}+shuffled", marks=pytest.mark.slow) for name in ("asyncio", "trio")]


@pytest.fixture(params=BACKENDS + SHUFFLED)
def in_any_order(request: pytest.FixtureRequest) -> Generator[tuple[str, dict[str, Any]]]:
    """As `anyio_backend`, imported by that name: async tests run with their tasks in a random order too.

    It follows from the test's name, and so is the same whenever the test runs.
    """
    backend, options = request.param
    if options is not None:
        yield backend, options
        return
    seed = zlib.crc32(request.node.name.encode())
    with trio_shuffled(seed):
        yield backend, {"loop_factory": partial(ShuffledLoop, seed)} if backend == "asyncio" else {}


# ---- trio


@contextmanager
def trio_shuffled(seed: int) -> Generator[None]:
    """Have trio's tasks take turns in an order that depends on nothing but the seed."""
    run: Any = trio._core._run
    was_allowed, state = run._ALLOW_DETERMINISTIC_SCHEDULING, run._r.getstate()
    run._ALLOW_DETERMINISTIC_SCHEDULING = True
    run._r.seed(seed)
    try:
        yield
    finally:
        run._ALLOW_DETERMINISTIC_SCHEDULING = was_allowed
        run._r.setstate(state)


class _Steps(trio.abc.Instrument):
    def __init__(self, step: Step) -> None:
        self._step = step

    def before_task_step(self, task: trio.lowlevel.Task) -> None:
        self._step()


# ---- asyncio


class VirtualLoop(asyncio.SelectorEventLoop):
    """An asyncio loop whose time begins at 0, and jumps to the next timer when every task waits.

    Args:
        virtual: Whether it does so; otherwise it is asyncio's own.
    """

    def __init__(self, *, virtual: bool = True) -> None:
        self._now: float | None = 0.0 if virtual else None
        super().__init__(_Jumping(self) if virtual else None)

    def time(self) -> float:
        return super().time() if self._now is None else self._now

    def jump(self, seconds: float | None) -> None:
        """Let virtual time pass, up to the next timer."""
        if seconds is None:
            raise RuntimeError("every task waits, without a deadline, for something that none of them will do")
        assert self._now is not None
        self._now += seconds


class ShuffledLoop(VirtualLoop):
    """An asyncio loop whose tasks take turns in a random order.

    Args:
        seed: Of the order.
        virtual: Whether its time is virtual; it begins at 0.
        step: Called before each step of each task.
    """

    def __init__(self, seed: int, *, virtual: bool = False, step: Step | None = None) -> None:
        self._numbers: WeakKeyDictionary[asyncio.Task[Any], int] = WeakKeyDictionary()
        super().__init__(virtual=virtual)
        self._ready: deque[asyncio.Handle] = _Shuffled(random.Random(seed), self._numbers, step or (lambda: None))
        self.set_task_factory(self._numbered)

    def _run_once(self) -> None:
        assert isinstance(self._ready, _Shuffled)
        self._ready.is_new_turn = True
        super()._run_once()  # type: ignore[misc]  # private, but the one place where a turn begins

    def _numbered(self, loop: Any, coroutine: Any, **options: Any) -> asyncio.Task[Any]:
        task = asyncio.Task(coroutine, loop=loop, **options)
        self._numbers[task] = len(self._numbers)
        return task


class _Shuffled(deque[asyncio.Handle]):
    """The handles that are ready, of which each turn of the loop takes those that are there when it begins."""

    def __init__(self, order: random.Random, numbers: WeakKeyDictionary[asyncio.Task[Any], int], step: Step) -> None:
        super().__init__()
        self._order, self._numbers, self._step = order, numbers, step
        self.is_new_turn = False

    def popleft(self) -> asyncio.Handle:
        if self.is_new_turn:
            self.is_new_turn = False
            self._shuffle()
        handle = super().popleft()
        if _task_of(handle) is not None:
            self._step()
        return handle

    def _shuffle(self) -> None:
        steps = [handle for handle in self if _task_of(handle) is not None]
        others = [handle for handle in self if _task_of(handle) is None]
        # First an order of their own: AnyIO cancels tasks in that of a set, which differs from run to run.
        steps.sort(key=lambda handle: self._numbers.get(_task_of(handle), 0))  # type: ignore[arg-type]
        self._order.shuffle(steps)
        self.clear()
        # A callback may have to make ready what a task was woken for: asyncio's sockets do so.
        self.extend(others + steps)


def _task_of(handle: asyncio.Handle) -> asyncio.Task[Any] | None:
    owner = getattr(handle._callback, "__self__", None)  # type: ignore[attr-defined]
    return owner if isinstance(owner, asyncio.Task) else None


class _Jumping(selectors.DefaultSelector):  # type: ignore[misc,valid-type]  # which class it is depends on the system
    """A selector that does not wait: what the loop would wait for a timer passes at once."""

    def __init__(self, loop: VirtualLoop) -> None:
        super().__init__()
        self._loop = loop

    def select(self, timeout: float | None = None) -> Any:
        events = super().select(0)
        if not events and timeout != 0:
            self._loop.jump(timeout)
        return events


VIRTUAL = [
    pytest.param(("asyncio", {"loop_factory": VirtualLoop}), id="asyncio in virtual time"),
    pytest.param(("trio", {"clock": trio.testing.MockClock(autojump_threshold=0)}), id="trio in virtual time"),
]
"""For async tests that wait for nothing but timers and each other: no threads, sockets, processes or signals."""

in_virtual_time = pytest.mark.parametrize("anyio_backend", VIRTUAL)
