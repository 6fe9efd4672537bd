"""Events of runs, kept; and what a sequence of them must be, whatever happens to the runs that tell it."""

from __future__ import annotations

from collections.abc import Iterable
from types import TracebackType
from typing import Self

from fractal._engine.run import Run, run_watchers
from fractal.events import (
    DelegationFinished,
    DelegationStarted,
    Event,
    ModelRequested,
    ModelResponded,
    ReasoningDelta,
    RetryScheduled,
    RunFinished,
    RunStarted,
    ToolCallDelta,
    ToolFinished,
    ToolStarted,
)
from fractal.results import AgentResult

__all__ = ["EventRecorder", "assert_well_formed", "record_events"]


class EventRecorder(list[Event]):
    """The events of runs, a list in the order in which they were emitted.

    As an observer it keeps the events of one agent and of what runs below it. As a context manager it keeps those of
    every run of the process that begins in its block, without a change to any agent.

    Example:
        >>> import anyio
        >>> from fractal import BaseAgent
        >>> from fractal.testing import ScriptedModel
        >>> with EventRecorder() as events:
        ...     result = anyio.run(BaseAgent("Greeter", "You greet.", client=ScriptedModel(["hello"])).run, "hi")
        >>> events.kinds
        ['run_started', 'model_requested', 'model_responded', 'run_finished']
        >>> events.assert_well_formed()
    """

    def __call__(self, event: Event) -> None:
        """Keep an event."""
        self.append(event)

    def __eq__(self, other: object) -> bool:
        # Another recorder that has heard the same is not this one: a run tells both.
        return self is other if isinstance(other, EventRecorder) else super().__eq__(other)

    def __ne__(self, other: object) -> bool:
        return not self == other

    def __enter__(self) -> Self:
        run_watchers.append(self._watch)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        run_watchers.remove(self._watch)

    def _repr_html_(self) -> str:
        from fractal._views.tree_html import of_events

        return of_events(self)

    def _watch(self, run: Run) -> None:
        run.emitter.add_observer(self)

    @property
    def kinds(self) -> list[str]:
        """The kind of each event."""
        return [event.kind for event in self]

    def results(self, agent_name: str | None = None) -> list[AgentResult]:
        """The results of the runs that have ended.

        Args:
            agent_name: Only those of this agent.
        """
        ends = (event for event in self if isinstance(event, RunFinished))
        return [end.result for end in ends if agent_name in (None, end.agent_name)]

    def assert_well_formed(self) -> None:
        """Check that the events tell whole stories.

        Each run, tool call and delegation that has started has ended once, inside what it is a part of; a run says
        nothing after its end; run ids, parents and depths fit together; and the pieces of a reply come while the model
        is asked.

        Raises:
            AssertionError: They do not; it names the event.
        """
        assert_well_formed(self)


def record_events() -> EventRecorder:
    """Make a recorder of events, to be entered as a block or given to an agent as one of its `observers`.

    Example:
        >>> import anyio
        >>> from fractal import BaseAgent
        >>> from fractal.testing import ScriptedModel, record_events
        >>> greeter = BaseAgent("Greeter", "You greet.", client=ScriptedModel(["hello"]))
        >>> with record_events() as events:
        ...     result = anyio.run(greeter.run, "hi")
        >>> [each.content for each in events.results()]
        ['hello']
    """
    return EventRecorder()


def assert_well_formed(events: Iterable[Event]) -> None:
    """See `EventRecorder.assert_well_formed`."""
    tree = _Tree()
    for number, event in enumerate(events, 1):
        try:
            tree.see(event)
        except _Fault as fault:
            heading = f"event {number}, {event.kind} of {event.agent_name} (run {event.run_id[:8]})"
            raise AssertionError(f"{heading}: {fault}") from None
    unended = [*tree.parts, *(("run", run_id) for run_id in tree.starts.keys() - tree.ended)]
    if unended:
        named = ", ".join(sorted({_named(part, tree.starts) for part in unended}))
        raise AssertionError(f"what has started has not ended: {named}")


class _Fault(Exception):
    """An event that is impossible where it is."""


def _require(holds: bool, fault: str) -> None:
    if not holds:
        raise _Fault(fault)


_Part = tuple[str, ...]


class _Tree:
    """Runs, and their open parts."""

    def __init__(self) -> None:
        self.starts: dict[str, RunStarted] = {}
        self.ended: set[str] = set()
        self.parts: dict[_Part, str] = {}  # what is open, with the run that it is a part of
        self._asking: set[str] = set()
        self._parents_elsewhere: set[str] = set()

    def see(self, event: Event) -> None:
        match event:
            case RunStarted():
                self._start_run(event)
            case ToolStarted() | DelegationStarted():
                _require(_key(event) not in self.parts, "it starts a second time")
                self.parts[_key(event)] = event.run_id
            case ToolFinished() | DelegationFinished():
                self._end_call(event)
            case RunFinished():
                self._end_run(event)
            case _:
                self._see_request(event)
        start = self.starts.get(event.run_id)
        if start is None:
            raise _Fault("its run has not started")
        same = (start.parent_id, start.depth, start.agent_name) == (event.parent_id, event.depth, event.agent_name)
        _require(same, "it says something else of its run than the run's start")
        _require(isinstance(event, RunFinished) or event.run_id not in self.ended, "it comes after its run's end")

    def _start_run(self, event: RunStarted) -> None:
        _require(event.run_id not in self.starts, "the run starts a second time")
        _require(event.run_id not in self._parents_elsewhere, "a run below it has started before")
        parent = self.starts.get(event.parent_id or "")
        if parent is not None:
            _require(parent.run_id not in self.ended, "the run above it has ended")
            _require(
                event.depth == parent.depth + 1, f"its depth is {event.depth}, that of the run above {parent.depth}"
            )
            begun = event.call_id is None or ("tool", parent.run_id, event.call_id) in self.parts
            _require(begun, "the tool call that began it is not open")
            self.parts["run", event.run_id] = parent.run_id
        elif event.parent_id is not None:  # of an agent that nobody listens to
            self._parents_elsewhere.add(event.parent_id)
        _require((event.depth == 0) == (event.parent_id is None), f"its depth is {event.depth}")
        self.starts[event.run_id] = event

    def _end_run(self, event: RunFinished) -> None:
        self.parts.pop(("run", event.run_id), None)
        still = [_named(part, self.starts) for part, run_id in self.parts.items() if run_id == event.run_id]
        _require(not still, f"in it there still goes on: {', '.join(still)}")
        _require(event.run_id not in self.ended, "the run ends a second time")
        _require(event.result.run_id == event.run_id, "its result is that of another run")
        self.ended.add(event.run_id)

    def _end_call(self, event: ToolFinished | DelegationFinished) -> None:
        _require(self.parts.pop(_key(event), None) == event.run_id, "it has not started, or has ended before")
        for child in self.starts.values():
            if child.parent_id == event.run_id and child.call_id == event.call_id:
                _require(child.run_id in self.ended, f"the run of {child.agent_name} that it began goes on")

    def _see_request(self, event: Event) -> None:
        match event:
            case ModelRequested():
                self._asking.add(event.run_id)
            case ReasoningDelta() | ToolCallDelta():  # a hook around requests may give a text of its own
                _require(event.run_id in self._asking, "the model is not being asked")
            case ModelResponded() | RetryScheduled():
                _require(event.run_id in self._asking, "the model was not asked")
                self._asking.remove(event.run_id)
            case _:
                pass


def _key(event: ToolStarted | ToolFinished | DelegationStarted | DelegationFinished) -> _Part:
    return event.kind.partition("_")[0], event.run_id, str(event.call_id)


def _named(part: _Part, starts: dict[str, RunStarted]) -> str:
    kind, run_id, *call = part
    start = starts.get(run_id)
    agent_name = start.agent_name if start is not None else run_id[:8]
    return f"a run of {agent_name}" if kind == "run" else f"{kind} call {call[0]} of {agent_name}"
