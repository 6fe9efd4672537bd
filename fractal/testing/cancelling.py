"""Cancel a scenario at each of its checkpoints, and see that nothing is left of it."""

from __future__ import annotations

import contextvars
import threading
from collections.abc import Awaitable, Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from fractal._concurrency.stuck import line_in_thread
from fractal.errors import InvalidArguments
from fractal.testing._leftovers import Belongings, Complaints, wait_until_empty
from fractal.testing._seen_runs import SeenRuns, Slots

if TYPE_CHECKING:
    from fractal.testing._steps import Visit

__all__ = ["CancelReport", "CancellationFault", "CancellationFaults", "cancel_everywhere"]

_BACKENDS = ("asyncio", "trio")
_MOST_FAULTS = 10
_ENDS_IN_A_ROW = 2  # threads make schedules vary: a run that is shorter by chance is no reason to stop


@dataclass(frozen=True, slots=True)
class CancelReport:
    """The numbers of cancellations of a scenario, all without a fault.

    Attributes:
        points: How many checkpoints were visited, by backend and way: `{("asyncio", "scope"): 41, …}`.

    Example:
        >>> print(CancelReport({("trio", "scope"): 40, ("trio", "native"): 41}))
        cancelled at 81 points: trio scope 40, native 41
    """

    points: dict[tuple[str, str], int]

    @property
    def total(self) -> int:
        """The number of times that the scenario was cancelled."""
        return sum(self.points.values())

    def __str__(self) -> str:
        last = ""
        words: list[str] = []
        for (backend, way), count in self.points.items():
            words.append(f"{way} {count}" if backend == last else f"{backend} {way} {count}")
            last = backend
        return f"cancelled at {self.total} points: {', '.join(words)}"


@dataclass(frozen=True, slots=True)
class CancellationFault:
    """One fault after a cancellation of a scenario.

    Attributes:
        backend: `"asyncio"` or `"trio"`.
        way: How it was cancelled.
        point: After which of its steps, from 1; 0: it was not.
        points: How many steps there are when nobody cancels it.
        place: Where the task was that made that step, as `file.py:12 in function`.
        problem: What was wrong.
    """

    backend: str
    way: str
    point: int
    points: int
    place: str
    problem: str

    def __str__(self) -> str:
        when = f"point {self.point} of {self.points} ({self.place})" if self.point else "not cancelled"
        return f"{self.backend}, {self.way}, {when}: {self.problem}"


class CancellationFaults(AssertionError):
    """A scenario did not stop as it should.

    Attributes:
        faults: What was wrong, in the order in which it was found; the search ends after ten.
    """

    def __init__(self, faults: Sequence[CancellationFault]) -> None:
        self.faults = tuple(faults)
        super().__init__("\n".join(["cancelled, the scenario did not stop as it should:", *map(str, faults)]))


def cancel_everywhere(
    scenario: Callable[[], Awaitable[object]],
    *,
    backends: Sequence[str] = _BACKENDS,
    ways: Sequence[str] | None = None,
    within: float = 5.0,
    check: Callable[[], object] | None = None,
) -> CancelReport:
    """Run a scenario again and again, and cancel it after each step that it makes, wherever it then is.

    A step ends where a task of the event loop waits; so each await that gives up control is a place to be cancelled at,
    in the scenario's own task and in those it starts. After each run there must be nothing left: no task, no thread
    that still works (but those that `fractal.abandoned_threads` lists), no socket or open file, nothing that nobody
    closed or awaited. The cancellation must have come out, not an error or a result. Each Fractal run has ended with a
    transcript that can be continued, has told a well-formed sequence of events, and has given back what it had
    reserved and its places in limits. And `check` must pass. This starts event loops of its own, so call it from a
    plain test, not from an async one.

    The scenario is run without being cut first, so that what is made once in a process is there. It should take
    milliseconds, since it will be run hundreds of times: let a `ScriptedModel` or an `Endpoint` answer.

    Args:
        scenario: An async function without arguments, which does the same each time it is called.
        backends: The event loops to run it on.
        ways: How to cancel it: `"scope"`, AnyIO's cancel scope; `"native"`, `asyncio.Task.cancel` or a cancel scope of
            trio's; `"native twice"`, two such calls in a row; `"wait_for"`, the end of an `asyncio.wait_for`;
            `"again"`, a scope, and a second cancellation one to four steps later, while the first one is being
            cleaned up after. None: all that the backend has.
        within: Seconds a run may take, and after it a thread or socket to end, before that is a fault.
        check: Called after each run, in its event loop; may be async. Raises if something is not as it should be.

    Returns:
        How many points were visited.

    Raises:
        CancellationFaults: The scenario did not stop as it should; a line for each thing that is wrong. The search
            ends after ten.
        InvalidArguments: There is no such backend or way.
        Exception: What the scenario raises when it is not cancelled.

    Example:
        >>> import anyio
        >>> async def scenario() -> None:
        ...     await anyio.sleep(0)
        ...     await anyio.sleep(0)
        >>> cancel_everywhere(scenario, backends=["trio"], ways=["scope"]).total > 1
        True
    """
    search = _Search(scenario, within, check)
    points: dict[tuple[str, str], int] = {}
    with search.complaints.watched(), search.runs.watched():
        for backend, way in _combinations(backends, ways):
            points[backend, way] = search.through(backend, way)
    if search.faults:
        raise CancellationFaults(search.faults)
    return CancelReport(points)


def _combinations(backends: Sequence[str], ways: Sequence[str] | None) -> Iterator[tuple[str, str]]:
    from fractal.testing._steps import WAYS  # asyncio, which only this needs

    known = {way for of_backend in WAYS.values() for way in of_backend}
    for what, given, there in (("backends", backends, WAYS.keys()), ("ways", ways or (), known)):
        if isinstance(given, str) or not set(given) <= set(there):
            raise InvalidArguments(f"{what}={given!r}: give some of {', '.join(map(repr, sorted(there)))}")
    for backend in backends:
        for way in WAYS[backend]:
            if ways is None or way in ways:
                yield backend, way


class _Search:
    def __init__(
        self, scenario: Callable[[], Awaitable[object]], within: float, check: Callable[[], object] | None
    ) -> None:
        self._scenario, self._within = scenario, within
        self._checks = [check] if check is not None else []
        self._points = 0
        self._prepared: set[str] = set()
        self.faults: list[CancellationFault] = []
        self.complaints, self.runs = Complaints(), SeenRuns()

    def through(self, backend: str, way: str) -> int:
        """Visit every point; returns how many there were."""
        if backend not in self._prepared:  # what there is once in a process, or a backend, is made now
            self._prepared.add(backend)
            self._run(self._make(backend, way, 0))
            self._news()
        found = len(self.faults)
        self._points = self._visit(backend, way, 0).count
        if len(self.faults) > found:  # it is wrong already without a cancellation
            return 0
        point = ends = 0
        while ends < _ENDS_IN_A_ROW and len(self.faults) < _MOST_FAULTS:
            if self._visit(backend, way, point + 1).is_cut:
                point, ends = point + 1, 0
            else:
                ends += 1
        return point

    def _visit(self, backend: str, way: str, point: int) -> Visit:
        """Run the scenario once, and note what it has left."""
        slots = Slots()
        visit = self._make(backend, way, point, slots.note_new, *self._checks)
        before = Belongings()
        self._run(visit)
        # Once something is wrong it need not be waited for as long again.
        patience = self._within / 20 if self.faults else self._within
        faults = [*visit.faults, *self._news()]
        left = wait_until_empty(lambda: [*before.left(), *slots.left()], patience)
        self._note(visit, *faults, *(f"left: {what}" for what in left))
        return visit

    def _news(self) -> list[str]:
        """The new faults of unclosed objects, and of runs."""
        return [*self.complaints.taken(), *self.runs.taken()]

    def _make(self, backend: str, way: str, point: int, *checks: Callable[[], object]) -> Visit:
        from fractal.testing._steps import Visit

        return Visit(self._scenario, backend, way, point, checks)

    def _run(self, visit: Visit) -> None:
        errors: list[BaseException] = []

        def work() -> None:
            try:
                visit.run()
            except BaseException as error:
                errors.append(error)

        # In a thread, so that one that never comes back is a fault and no test that hangs.
        thread = threading.Thread(
            target=contextvars.copy_context().run, args=(work,), name="cancel_everywhere", daemon=True
        )
        thread.start()
        thread.join(self._within)
        if thread.is_alive():
            line = line_in_thread(thread) or visit.whereabouts()
            self._note(visit, f"it has not come back after {self._within:g} s: {line}")
            raise CancellationFaults(self.faults)
        for error in [*errors, *([visit.error] if visit.error is not None else [])]:
            raise error

    def _note(self, visit: Visit, *problems: str) -> None:
        for problem in problems:
            fault = CancellationFault(
                visit.backend, visit.way, visit.point, self._points, visit.line or "not cancelled", problem
            )
            self.faults.append(fault)
