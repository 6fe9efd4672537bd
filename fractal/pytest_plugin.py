"""The tools of `fractal.testing` as fixtures of pytest.

pytest imports this at its start, in every project that has Fractal installed, so the tools themselves are imported when
a fixture is used, and not before.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from fractal.testing import CancelReport, Endpoint, EventRecorder, VirtualTime

__all__ = [
    "fractal_cancel_everywhere",
    "fractal_endpoint",
    "fractal_events",
    "fractal_no_requests",
    "fractal_no_stalls",
    "fractal_nothing_left",
    "fractal_virtual_time",
]

_is_watched = pytest.StashKey[bool]()
_started = pytest.StashKey[ExitStack]()  # endpoints, which are none of what a test leaves


@pytest.fixture
def fractal_endpoint(
    request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Callable[..., Endpoint]]:
    """Starts endpoints on this machine, and has agents without a client of their own ask the last one.

    Call it as `fractal.testing.Endpoint`; what it has started is closed after the test.
    """
    from fractal.testing import Endpoint

    with ExitStack() as started:
        request.node.stash[_started] = started

        def start(*arguments: Any, **options: Any) -> Endpoint:
            endpoint = started.enter_context(Endpoint(*arguments, **options))
            monkeypatch.setenv("OPENAI_BASE_URL", endpoint.url)
            monkeypatch.setenv("OPENAI_API_KEY", options.get("api_key") or "sk-test")
            return endpoint

        yield start


@pytest.fixture
def fractal_nothing_left(request: pytest.FixtureRequest) -> Iterator[None]:
    """Fails the test if it leaves a task, a thread, a socket or a file: `fractal.testing.assert_nothing_left`."""
    if request.node.stash.get(_is_watched, False):
        yield  # the test itself is watched, and only that: its tasks can be seen from its own event loop alone
        return
    from fractal.testing import assert_nothing_left

    with assert_nothing_left():
        yield


@pytest.fixture
def fractal_events() -> Iterator[EventRecorder]:
    """The events of all runs in the test, which fails if they are not well formed: `fractal.testing.record_events`."""
    from fractal.testing import record_events

    with record_events() as events:
        yield events
    events.assert_well_formed()


@pytest.fixture
def fractal_no_requests() -> Iterator[list[str]]:
    """Lets no model reach anything but this machine: `fractal.testing.block_real_requests`."""
    from fractal.testing import block_real_requests

    with block_real_requests() as blocked:
        yield blocked


@pytest.fixture
def fractal_no_stalls() -> Iterator[list[str]]:
    """Fails the test if a tool or callback blocks its event loop: `fractal.testing.stall_guard`."""
    from fractal.testing import stall_guard

    with stall_guard() as stalls:
        yield stalls
    assert not stalls, "\n".join(["the event loop was blocked:", *stalls])


@pytest.fixture
def fractal_virtual_time() -> VirtualTime:
    """A clock on which hours pass in milliseconds: `fractal.testing.virtual_time`."""
    from fractal.testing import virtual_time

    return virtual_time()


@pytest.fixture
def fractal_cancel_everywhere() -> Callable[..., CancelReport]:
    """Cancels a scenario at each of its checkpoints: `fractal.testing.cancel_everywhere`."""
    from fractal.testing import cancel_everywhere

    return cancel_everywhere


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Wrap the tests themselves that shall leave nothing, in whatever event loop a plugin runs them."""
    for item in items:
        if type(item).__name__ == "TestCaseFunction" or not isinstance(item, pytest.Function):
            continue  # unittest looks for its methods itself
        if fractal_nothing_left.__name__ in item.fixturenames:
            item.obj = _leaving_nothing(item, item.obj)
            item.stash[_is_watched] = True


def _leaving_nothing(item: pytest.Item, test: Callable[..., Any]) -> Callable[..., Any]:
    def close_endpoints() -> None:
        if (started := item.stash.get(_started, None)) is not None:
            started.close()

    if inspect.iscoroutinefunction(test):

        @functools.wraps(test)
        async def watched_in_loop(*arguments: Any, **named: Any) -> None:
            from fractal.testing import assert_nothing_left

            async with assert_nothing_left():
                try:
                    await test(*arguments, **named)
                finally:
                    close_endpoints()

        return watched_in_loop

    @functools.wraps(test)
    def watched(*arguments: Any, **named: Any) -> None:
        from fractal.testing import assert_nothing_left

        with assert_nothing_left():
            try:
                test(*arguments, **named)
            finally:
                close_endpoints()

    return watched
