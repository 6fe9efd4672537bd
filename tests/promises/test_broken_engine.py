"""The harness finds what it is for: with one piece of the engine broken, some scenario no longer stops as it should."""

from __future__ import annotations

import inspect
import pkgutil
import textwrap
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from fractal import abandoned_threads
from fractal._concurrency import gates as _gates
from fractal.testing import CancellationFaults, Endpoint, cancel_everywhere
from tests import scenarios
from tests.edge_scenarios import SCENARIOS
from tests.scenarios import OVER_HTTP, answer_over_http, check_events
from tests.streams import Watch

# What is broken: the function, the words in it, and what they are replaced by; where that shows, and how.
BREAKAGES: dict[str, tuple[str, str, str, str, str]] = {
    "a cancellation is made a result": (
        "fractal._concurrency.background:Background.result",
        "raise\n    if self._error is not None",
        "pass\n    if self._error is not None",
        "async_tools_side_by_side",
        "RunCancelled took the place of the cancellation",
    ),
    "tool calls are answered only if nothing happens": (
        "fractal._engine.calls:answer_calls",
        "finally:",
        "except ZeroDivisionError:\n        pass\n    else:",
        "async_tools_side_by_side",
        "cannot be continued",
    ),
    "the end of a tool call is not told": (
        "fractal._engine.calls:_call_all",
        "call.tell_now()",
        "pass",
        "sequential_tools_with_every_limit",
        "the events are not well-formed: .* in it there still goes on: tool call",
    ),
    "a stream does not wait for its task": (
        "fractal._concurrency.feed_block:FeedBlock.aclose",
        "await task.cancel_and_join()",
        "task.cancel()",
        "a_stream_that_is_left",
        "tasks left: fractal run",
    ),
    "a second cancellation ends the wait for a stream's task": (
        "fractal._concurrency.workers:wait_out",
        "except anyio.get_cancelled_exc_class() as error:",
        "except ZeroDivisionError as error:",
        "a_stream_that_is_left",
        "tasks left: fractal run",
    ),
    "whoever calls a run does not wait for its cleanup": (
        "fractal._concurrency.background:Background.result",
        "await self.join()",
        "pass",
        "a_batch_that_fails_while_others_clean_up",
        "tasks left: fractal batch",
    ),
    "what a tool has begun is not ended": (
        "fractal._engine.below:Below.end",
        "await self._join(key)",
        "pass",
        "child_runs_that_a_tool_forgets",
        "the tool call that began it is not open",
    ),
    "what tasks of the user's own begin is not known": (
        "fractal._engine.below:Origin.do",
        "self.run is not None",
        "self.run is not None and self.is_enclosed",
        "child_runs_that_a_tool_forgets",
        "tasks left: .*fractal run",
    ),
    "what threads begin is not known": (
        "fractal._engine.below:Errand.begun_here",
        "run is not None and not run.is_over",
        "False",
        "handles_that_a_plain_tool_leaves",
        "has begun and not ended",
    ),
    "a cleanup has no grace": (
        "fractal._concurrency.grace:_Watched._shield_if_cut",
        "scope.deadline = anyio.current_time() + self._grace",
        "scope.shield = False",
        "cleanups_that_await",
        "a cleanup that awaits was cut",
    ),
    "tasks that a tool awaits have no grace": (
        "fractal._concurrency.grace:_Watched._with_notice",
        "self._held, wanted._asyncio_future_blocking = wanted, False",
        "return wanted",
        "cleanups_that_await",
        "a cleanup that awaits was cut",
    ),
    "what is begun below a run is not noted": (
        "fractal._engine.below:Below.note",
        "self._tasks[task] = key, is_reached",
        "pass",
        "child_runs_that_a_tool_forgets",
        "tasks left: .*fractal run",
    ),
    "a task that is cancelled is not joined": (
        "fractal._concurrency.background:Background.cancel_and_join",
        "await self.join()",
        "pass",
        "a_stream_that_is_left",
        "tasks left: fractal run",
    ),
    "the end of a tool call is told twice": (
        "fractal._engine.call:Call.tell_now",
        "self._emitted = 2",
        "pass",
        "async_tools_side_by_side",
        "it has not started, or has ended before",
    ),
    "a tool's thread is left, whatever the tool says": (
        "fractal._engine.invoke:_in_thread",
        "abandon=abandon",
        "abandon=True",
        "tools_in_threads",
        "a tool that must be waited for goes on",
    ),
    "a slot that comes too late is kept": (
        "fractal._concurrency.gates:Gate.acquire",
        "if granted:",
        "if False:",
        "places_for_one_call_at_a_time",
        "a limit has 1 more places taken",
    ),
    "a thread that never began keeps its place": (
        "fractal._concurrency.threads:ThreadCall._leave",
        "if never_began:\n        self._release()",
        "pass",
        "tools_in_threads",
        "a limit has",
    ),
    "a thread is not waited for": (
        "fractal._concurrency.threads:ThreadCall.run",
        "abandon=self.abandon",
        "abandon=True",
        "tools_in_threads",
        "a tool that must be waited for goes on",
    ),
    "what was reserved is not given back": (
        "fractal.limits:Reservation.__exit__",
        "self._budget.correct(self._resource, -self._amount)",
        "pass",
        "async_tools_side_by_side",
        "a reservation was not given back",
    ),
    "the connection of a request that was cut is kept": (
        "fractal.models._http.connections:Exchange.__aenter__",
        "await lender.close(connection)",
        "pass",
        "requests_over_http",
        "a connection is in use",
    ),
    "a place for a request is not given back": (
        "fractal.models._http.pool:_Slot.__aexit__",
        "self._gate.release()",
        "self._gate.release() if exc[0] is None else None",
        "more_requests_than_connections",
        "a limit has 1 more places taken",
    ),
}


def broken(function: Callable[..., Any], words: str, replacement: str) -> Any:
    """The code of a function in which something is different."""
    source = textwrap.dedent(inspect.getsource(function))
    assert words in source, f"the engine has changed: {words!r} is not in {function.__qualname__}"
    source = source[source.index("async def ") if "async def " in source else source.index("def ") :]
    namespace: dict[str, Any] = dict(function.__globals__)
    exec("from __future__ import annotations\n" + source.replace(words, replacement), namespace)
    return namespace[function.__name__].__code__


@pytest.fixture
def _slots_given_back() -> Iterator[None]:
    """A broken engine keeps slots of limits of the whole process, which later tests need."""
    yield
    deadline = time.monotonic() + 5
    while abandoned_threads() and time.monotonic() < deadline:
        threading.Event().wait(0.01)
    for gate in list(_gates.all_gates):
        gate.forget_holders()


@pytest.mark.usefixtures("_slots_given_back")
@pytest.mark.parametrize("breakage", BREAKAGES)
def test_a_broken_engine_does_not_pass(
    breakage: str, endpoint: Callable[..., Endpoint], monkeypatch: pytest.MonkeyPatch
):
    where, words, replacement, name, fault = BREAKAGES[breakage]
    function = inspect.unwrap(pkgutil.resolve_name(where))
    function = getattr(function, "__func__", function)
    if name in OVER_HTTP:
        endpoint(answer_over_http)
    if "goes on" in fault and name == "tools_in_threads":
        # On a busy machine the look at what goes on comes late: the tool must not have ended by itself.
        monkeypatch.setattr(scenarios, "MOMENT", 0.03)
    watch = Watch()
    scenario = SCENARIOS[name](watch)
    monkeypatch.setattr(function, "__code__", broken(function, words, replacement))
    with pytest.raises(CancellationFaults, match=fault):
        cancel_everywhere(scenario, check=lambda: check_events(watch), within=1)
