"""Fixtures for the whole suite: the backends, an endpoint, and a look at what a test leaves behind."""

from __future__ import annotations

import functools
import gc
import inspect
import itertools
import os
import signal
import ssl
import sys
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from pathlib import Path

import anyio
import hypothesis
import pytest

from fractal import abandoned_threads
from fractal._engine.pricing import prices_of_library
from fractal.models._http import connections as _connections
from fractal.models._http.pool import machine_tls
from fractal.sync import _portal
from fractal.sync._portal import Portal
from fractal.testing import Endpoint, assert_nothing_left
from fractal.testing._leftovers import running_tasks, wait_until_empty
from tests.certificate import CERTIFICATE, KEY, KEYLESS
from tests.clients import KINDS, Models
from tests.support import BACKENDS, LOOPS

# The same examples each time, so that a change is judged by what it changes, and not by chance. With
# `--hypothesis-profile=fresh` each run has others, of a seed that a failure prints: to look for bugs.
hypothesis.settings.register_profile("fixed", deadline=None, derandomize=True)
hypothesis.settings.register_profile("fresh", deadline=None, print_blob=True)
hypothesis.settings.load_profile("fixed")


@pytest.fixture(params=BACKENDS)
def anyio_backend(request: pytest.FixtureRequest) -> tuple[str, dict[str, object]]:
    """Every async test runs on asyncio and on trio, and with the slow ones on asyncio with uvloop."""
    return request.param


@pytest.fixture(params=["asyncio", "trio"])
def backend(request: pytest.FixtureRequest) -> str:
    """For tests that start their event loops themselves."""
    return request.param


@pytest.fixture(params=[pytest.param(each, marks=[pytest.mark.slow] if each == "uvloop" else []) for each in LOOPS])
def loop(request: pytest.FixtureRequest) -> str:
    """The same, with uvloop: for what is not the same on asyncio's own."""
    return request.param


@pytest.fixture
def shared_portal(loop: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[Portal]:
    """A new one, on each loop, for blocking calls outside of portals' blocks."""
    one = Portal(**LOOPS[loop])
    monkeypatch.setattr(_portal, "_shared", one)
    yield one
    one.close()


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


@pytest.fixture
def tls(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[ssl.SSLContext]:
    """A server's side of TLS, with a certificate that the environment names as trusted."""
    for name, text in (("key", KEY), ("certificate", CERTIFICATE)):
        (tmp_path / name).write_text(text)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(tmp_path / "certificate", tmp_path / "key")
    monkeypatch.setenv("SSL_CERT_FILE", str(tmp_path / "certificate"))
    machine_tls.cache_clear()
    yield context
    machine_tls.cache_clear()


@pytest.fixture(params=[False, True], ids=["plain", "TLS"])
def maybe_tls(request: pytest.FixtureRequest) -> ssl.SSLContext | None:
    """A server's side of TLS, and none."""
    return request.getfixturevalue("tls") if request.param else None


@pytest.fixture(params=KINDS)
async def models(request: pytest.FixtureRequest) -> AsyncIterator[Models]:
    """Makes models of each kind of client that sends over HTTP."""
    made = Models(request.param)
    yield made
    await made.aclose()


@pytest.fixture(scope="session")
def keyless(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A file with the certificate of an authority that has certified nothing."""
    path = tmp_path_factory.mktemp("certificates") / "keyless.pem"
    path.write_text(KEYLESS)
    return path


@pytest.fixture(autouse=True)
def _clean_environment(monkeypatch: pytest.MonkeyPatch, keyless: Path) -> None:
    """No test reaches a real endpoint by accident, or trusts one."""
    # Clients of the SDK read all that the machine trusts, each anew, which takes them longer than a test.
    monkeypatch.setenv("SSL_CERT_FILE", str(keyless))
    for name in [name for name in os.environ if name.startswith("OPENAI_") or name == "CONTEXT_WINDOW"]:
        monkeypatch.delenv(name)


@pytest.fixture
def brief_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    """A request is sent again soon; how long the pauses are is tested in virtual time."""
    monkeypatch.setattr("fractal._engine.ask.back_off_seconds", lambda attempt: 0.001)


@pytest.fixture(autouse=True)
def _nothing_left() -> Iterator[None]:
    """After each test no thread, socket or file is left; not even an abandoned thread, which users may leave."""
    gc.freeze()  # the collection below then looks only at what the test has made, which is quick
    with assert_nothing_left():
        yield
        gc.collect()  # an unclosed socket or generator warns here, and warnings are errors
    gone_on = wait_until_empty(lambda: [f"{each.name} at {each.where}" for each in abandoned_threads()], 5)
    assert not gone_on, f"threads left: {gone_on}"


_modules = itertools.count(1)


def pytest_configure() -> None:
    """Let Ctrl-C reach the programs that tests start, also where the tests themselves run in the background."""
    # There a shell has it ignored, and what ignores a signal hands that down.
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(autouse=True, scope="module")
def _no_frozen_garbage() -> Iterator[None]:
    """Let go, now and then, of what was in use when a test began, and is not any more."""
    yield
    # That looks at all objects there are, of which most belong to the 30 000 tests: half a second.
    if next(_modules) % 20 == 0:
        gc.unfreeze()
        gc.collect()
        gc.freeze()


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call(item: pytest.Item) -> Iterator[None]:
    """Count no lines in this thread for a test that is marked `untraced`.

    pytest-cov's own mark stops coverage as a whole, and threads that there are already are then counted no more.
    """
    if item.get_closest_marker("untraced") is None:
        return (yield)
    tracing = sys.gettrace()
    sys.settrace(None)
    try:
        return (yield)
    finally:
        sys.settrace(tracing)


def pytest_collection_finish() -> None:
    """Have everything loaded that looks for objects when it is loaded: a frozen heap hides them."""
    assert hypothesis.is_hypothesis_test is not None
    # What the first request of a process loads is no time of the test that happens to send it.
    assert machine_tls() is not None
    assert _connections.Connections(machine_tls, 1) is not None
    if (prices := prices_of_library()) is not None:
        anyio.run(prices.load)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Let every async test fail that leaves a task behind."""
    for item in items:
        if isinstance(item, pytest.Function) and inspect.iscoroutinefunction(item.obj):
            item.obj = _leaving_no_task(item.obj)


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Say how often the tests that cancel everywhere have cancelled, and what; and what others have counted."""
    visited = [
        point
        for report in terminalreporter.getreports("passed")
        for name, points in report.user_properties
        if name == "points"
        for point in points
    ]
    for report in terminalreporter.getreports("passed"):
        for name, value in report.user_properties:
            if name == "numbers":
                terminalreporter.write_line(str(value))
    if visited:
        scenarios, by_way = {scenario for scenario, *_ in visited}, Counter[str]()
        for _, backend, way, count in visited:
            by_way[f"{backend} {way}"] += count
        shown = ", ".join(f"{way} {count}" for way, count in sorted(by_way.items()))
        terminalreporter.write_line(f"{len(scenarios)} scenarios, cancelled at {by_way.total()} points: {shown}")


def _leaving_no_task(test: Callable[..., Awaitable[None]]) -> Callable[..., Awaitable[None]]:
    @functools.wraps(test)
    async def watched(*arguments: object, **named: object) -> None:
        before = {task.id for task in running_tasks()}
        await test(*arguments, **named)
        left = [task for task in running_tasks() if task.id not in before]
        assert not left, f"tasks left: {left}"

    return watched
