"""The runs of Fractal that something makes, and whether each has kept its promises at its end."""

from __future__ import annotations

from collections.abc import Generator
from contextlib import contextmanager

from fractal._concurrency.gates import all_gates
from fractal._concurrency.threads import abandoned_threads
from fractal._engine.run import Run, run_watchers
from fractal.testing._history import check_messages
from fractal.testing._recording import EventRecorder, assert_well_formed

__all__ = ["SeenRuns", "Slots"]


class SeenRuns:
    """All runs of the process that are made while `watched` is on."""

    def __init__(self) -> None:
        self._runs: list[Run] = []
        self._events = EventRecorder()

    @contextmanager
    def watched(self) -> Generator[None]:
        """See the runs that are made meanwhile."""
        run_watchers.append(self._runs.append)
        with self._events:
            try:
                yield
            finally:
                run_watchers.remove(self._runs.append)

    def taken(self) -> list[str]:
        """The faults of the runs seen since the last time, in words; all of them should have ended."""
        faults = [fault for run in self._runs for fault in _faults_of(run)]
        try:
            assert_well_formed(self._events)
        except AssertionError as fault:
            faults.append(f"the events are not well-formed: {fault}")
        self._runs.clear()
        self._events.clear()
        return faults


def _faults_of(run: Run) -> Generator[str]:
    name, budget = run.settings.agent_name, run.budget
    if run.result is None and run.has_begun:
        yield f"the run of {name} has begun and not ended"
    used, reported = budget.used["tokens"], budget.tokens["input_tokens"] + budget.tokens["output_tokens"]
    if used != reported:
        yield f"the ledger of {name} holds {used} tokens where {reported} were used: a reservation was not given back"
    messages = run.messages
    if messages:
        try:
            check_messages([*messages, {"role": "user", "content": "go on"}])
        except ValueError as fault:
            yield f"the transcript of {name} cannot be continued: {fault}"


class Slots:
    """The limits of the process, and how many held a slot of each, or waited for one, at first."""

    def __init__(self) -> None:
        self._before = {gate: (gate.held, gate.waiting) for gate in list(all_gates)}

    def note_new(self) -> None:
        """Note the gates that were made since; those of an event loop are gone after its end."""
        for gate in list(all_gates):
            self._before.setdefault(gate, (0, 0))

    def left(self) -> list[str]:
        """The gates with more slots taken or tasks waiting than at first, beyond those of abandoned threads."""
        abandoned = len(abandoned_threads())
        return [
            f"a limit has {gate.held - held} more places taken and {gate.waiting - waiting} more tasks waiting"
            for gate, (held, waiting) in self._before.items()
            if gate.held > held + abandoned or gate.waiting > waiting
        ]
