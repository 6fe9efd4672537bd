"""Fixtures for the whole suite: the backends, an endpoint, and a look at what a test leaves behind."""

from __future__ import annotations

import functools
import gc
import importlib.util
import inspect
import os
import threading
import time
from collections.abc import Awaitable, Callable, Iterator

import anyio
import hypothesis
import pytest

from fractal.testing import Endpoint

BACKENDS = [
    pytest.param(("asyncio", {}), id="asyncio"),
    pytest.param(("trio", {}), id="trio"),
]
if importlib.util.find_spec("uvloop"):
    BACKENDS.append(pytest.param(("asyncio", {"use_uvloop": True}), id="asyncio+uvloop"))


@pytest.fixture(params=BACKENDS)
def anyio_backend(request: pytest.FixtureRequest) -> tuple[str, dict[str, object]]:
    """Every async test runs on asyncio, on trio, and on asyncio with uvloop."""
    return request.param


@pytest.fixture(params=["asyncio", "trio"])
def backend(request: pytest.FixtureRequest) -> str:
    """For tests that start their event loops themselves."""
    return request.param


@pytest.fixture
def endpoint(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., Endpoint]]:
    """Starts embedded endpoints and points the environment at the last one."""
    started: list[Endpoint] = []

    def start(*arguments: object, **options: object) -> Endpoint:
        one = Endpoint(*arguments, **options).start()  # type: ignore[arg-type]
        started.append(one)
        monkeypatch.setenv("OPENAI_BASE_URL", one.url)
        monkeypatch.setenv("OPENAI_API_KEY", "sk-test")
        return one

    yield start
    for one in started:
        one.close()


@pytest.fixture(autouse=True)
def _clean_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    """No test reaches a real endpoint by accident."""
    for name in [name for name in os.environ if name.startswith("OPENAI_") or name == "CONTEXT_WINDOW"]:
        monkeypatch.delenv(name)


@pytest.fixture(autouse=True)
def _nothing_left(request: pytest.FixtureRequest) -> Iterator[None]:
    """After each test no thread is left but the shared portal's, which stays by design, and its idle workers."""
    before = set(threading.enumerate())
    yield
    if {"anyio_backend", "endpoint", "backend"} & {*request.fixturenames}:
        gc.collect()  # an unclosed socket or generator warns here, and warnings are errors
    deadline = time.monotonic() + 5
    while left := [t for t in threading.enumerate() if t not in before and not _stays(t)]:
        if time.monotonic() > deadline:
            pytest.fail(f"threads left: {left}")
        left[0].join(0.05)


def _stays(thread: threading.Thread) -> bool:
    # Idle workers of the portal are daemons like it; trio keeps its own for the next run.
    return thread.daemon and thread.name.startswith(
        ("fractal portal", "AnyIO worker thread", "Trio thread", "asyncio_")
    )


def pytest_collection_finish() -> None:
    """Keep what the tests are made of out of the garbage collections after each of them."""
    # Imported by now: what it does when it is loaded looks for objects that a frozen heap hides.
    assert hypothesis.is_hypothesis_test is not None
    gc.collect()
    gc.freeze()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Let every async test fail that leaves a task behind."""
    for item in items:
        if isinstance(item, pytest.Function) and inspect.iscoroutinefunction(item.obj):
            item.obj = _leaving_no_task(item.obj)


def _closes_a_generator(task: anyio.TaskInfo) -> bool:
    """The loop's own task for a generator that another library left to the garbage collector."""
    others = tuple(f"close asyncgen {name}" for name in ("openai", "httpx2", "httpcore2"))
    return type(task.coro).__name__ == "async_generator_athrow" or str(task.name).startswith(others)


def _leaving_no_task(test: Callable[..., Awaitable[None]]) -> Callable[..., Awaitable[None]]:
    @functools.wraps(test)
    async def watched(*arguments: object, **named: object) -> None:
        before = {task.id for task in anyio.get_running_tasks()}
        await test(*arguments, **named)
        left = [task for task in anyio.get_running_tasks() if task.id not in before and not _closes_a_generator(task)]
        assert not left, f"tasks left: {left}"

    return watched
