"""The portal at its edges: before it has begun, while it closes, after it has ended, in a forked child."""

from __future__ import annotations

import logging
import sys
import threading
import types
from collections.abc import Callable, Iterator
from typing import Any
from weakref import WeakSet

import anyio
import pytest

from fractal import FractalError, RunCancelled, sync
from fractal.sync import _portal
from fractal.sync._portal import Portal, PortalCall


@pytest.fixture
def portal(backend: Any) -> Iterator[Portal]:
    one = Portal(backend)
    yield one
    one.close()


async def seven() -> int:
    return 7


def running(portal: Portal) -> threading.Thread:
    portal.start()
    assert portal._thread is not None
    return portal._thread


def test_a_portal_that_has_not_begun_takes_nothing_and_closes_at_once(portal: Portal):
    call = PortalCall(seven, portal)
    assert not portal.soon(lambda: None)
    assert not portal.spawn(call)
    portal._stop()
    portal.close()
    call.cancel_from_thread()
    with pytest.raises(RunCancelled, match="no event loop any more"):
        call.result()


def test_a_portal_that_has_ended_takes_nothing_until_it_is_started_anew(portal: Portal):
    running(portal)
    portal.close()
    portal.close()
    assert not portal.soon(lambda: None)
    assert PortalCall(seven, portal).result_or_cancel() == 7


def test_a_call_that_comes_while_the_portal_closes_is_dropped(portal: Portal):
    running(portal)
    portal.soon(portal._stop)
    call = PortalCall(seven, portal).start()
    with pytest.raises(RunCancelled):
        call.result()


def test_a_call_that_is_cancelled_before_it_is_started_never_runs(portal: Portal):
    running(portal)
    called: list[int] = []

    async def note() -> None:
        called.append(1)

    call = PortalCall(note, portal)
    call.cancel_from_thread()
    with pytest.raises(RunCancelled):
        call.start().result()
    assert called == []


def test_a_portal_does_not_start_while_the_program_ends(portal: Portal, monkeypatch: pytest.MonkeyPatch):
    with monkeypatch.context() as ending, pytest.raises(FractalError, match="the program is ending"):
        ending.setattr(sys, "is_finalizing", lambda: True)
        portal.start()


def ends_with(error: BaseException) -> Callable[..., None]:
    """`anyio.run`, with an event loop that fails when it has ended."""
    run = anyio.run

    def failing(*arguments: Any, **options: Any) -> None:
        run(*arguments, **options)
        raise error

    return failing


def test_what_an_event_loop_fails_with_after_all_was_closed_is_only_logged(
    portal: Portal, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
):
    monkeypatch.setattr(anyio, "run", ends_with(RuntimeError("no thread any more")))
    with caplog.at_level(logging.DEBUG, "fractal"):
        thread = running(portal)
        portal.close()
        thread.join(10)
    assert "portal did not close cleanly" in caplog.text
    assert "no thread any more" in caplog.text


def test_what_an_event_loop_fails_with_while_it_is_needed_is_told_by_its_thread(monkeypatch: pytest.MonkeyPatch):
    told: list[BaseException | None] = []
    monkeypatch.setattr(threading, "excepthook", lambda facts: told.append(facts.exc_value))
    portal = Portal()
    thread = running(portal)

    def fail() -> None:
        raise SystemExit("out of order")

    portal.soon(fail)
    thread.join(10)
    assert [str(error) for error in told] == ["out of order"]


def test_all_portals_are_closed_when_the_program_ends(portal: Portal, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(_portal, "_running", WeakSet([portal]))
    thread = running(portal)
    _portal._close_all()
    assert not thread.is_alive()


def test_a_forked_child_has_a_shared_portal_of_its_own(monkeypatch: pytest.MonkeyPatch):
    before = Portal()
    monkeypatch.setattr(_portal, "_shared", before)
    _portal._start_anew_after_fork()
    assert _portal._shared is not before


async def test_a_cell_of_a_notebook_is_not_warned_that_its_loop_is_blocked(monkeypatch: pytest.MonkeyPatch):
    notebook: Any = types.ModuleType("IPython")
    notebook.get_ipython = lambda: None
    monkeypatch.setitem(sys.modules, "IPython", notebook)
    with pytest.warns(sync.LoopBlockedWarning):
        _portal.here()
    notebook.get_ipython = object
    _portal.here()
