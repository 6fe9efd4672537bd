"""A tree of what happened, made from events: what the terminal's pictures are drawn from.

All text in it is for one line of a terminal: what a model or a tool wrote can neither colour a screen nor move the
cursor.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from itertools import islice
from typing import Any, Literal, cast

from fractal._json import is_same, text_of
from fractal._texts import one_line
from fractal.events import (
    DelegationStarted,
    Event,
    ModelRequested,
    ModelResponded,
    RetryScheduled,
    RunFinished,
    RunStarted,
    ToolFinished,
    ToolStarted,
)

__all__ = ["Part", "RunTree", "Tree", "brief", "brief_reply"]


@dataclass(slots=True, kw_only=True)
class Part:
    """A part of a run that takes time: the run, a request to the model, or a tool call.

    Attributes:
        kind: Which of these.
        label: The agent's name, the tool's, or `model`.
        agent: Name of the agent whose run it is, or is in.
        detail: What it was about, in one line.
        started: Seconds since the epoch.
        ended: The same; None while it goes on.
        outcome: How it ended: a tool call's outcome or a run's stop reason, `ok` for success; empty while it goes on.
        requests: Requests to the endpoint, those of the runs below included; None for a tool call.
        tokens: Prompt and completion tokens, or None.
        parts: What it consists of, in the order of starting.
    """

    kind: Literal["run", "model", "tool"]
    label: str
    agent: str
    detail: str = ""
    started: float
    ended: float | None = None
    outcome: str = ""
    requests: int | None = None
    tokens: tuple[int, int] | None = None
    parts: list[Part] = field(default_factory=list["Part"])

    @property
    def seconds(self) -> float:
        """Seconds that the part took, or has taken so far."""
        return (self.ended if self.ended is not None else time.time()) - self.started

    def end(self, at: float, outcome: str) -> None:
        """Note the end of the part; only the first call counts."""
        if self.ended is None:
            self.ended, self.outcome = max(at, self.started), outcome

    def walk(self) -> Iterator[Part]:
        """The part and all parts in it."""
        yield self
        for part in self.parts:
            yield from part.walk()


class Tree:
    """Parts inside each other, to be drawn.

    Attributes:
        roots: The runs that no other one began.
    """

    def __init__(self) -> None:
        self.roots: list[Part] = []

    @property
    def work(self) -> float:
        """Seconds of all requests and tool calls added up, as if they had run one after the other."""
        return sum(part.seconds for part in self.walk() if not part.parts and part.kind != "run")

    @property
    def wall(self) -> float:
        """Seconds from the first start to the last end."""
        return max(root.started + root.seconds for root in self.roots) - self.start if self.roots else 0.0

    @property
    def start(self) -> float:
        """The start of the first run, in seconds since the epoch."""
        return min((root.started for root in self.roots), default=time.time())

    def walk(self) -> Iterator[Part]:
        """All parts, those above first."""
        for root in self.roots:
            yield from root.walk()

    def rows(self, guides: tuple[str, str, str, str]) -> Iterator[tuple[str, Part]]:
        """All parts with the lines that lead to them, for drawing.

        Args:
            guides: What stands before a part, the last part, and below either of them.
        """
        for root in self.roots:
            yield "", root
            yield from _rows_below(root, "", guides)


class RunTree(Tree):
    """An observer that keeps what happened as a tree of parts.

    Example:
        ```python
        tree = RunTree()
        agent = BaseAgent("Planner", "You plan.", observers=[tree])
        await agent.run("A day in Rome")
        Console().print(result_table(tree, UNICODE))
        ```

    Args:
        notes: A word to show with the calls of a tool, by the tool's name.
    """

    def __init__(self, notes: Mapping[str, str] | None = None) -> None:
        super().__init__()
        self._notes = dict(notes or {})
        self._runs: dict[str, Part] = {}
        self._open: dict[tuple[str, str], Part] = {}  # by run and call id; a model request's id is empty
        self._arguments: dict[tuple[str, str], object] = {}  # of open tool calls
        self._delegating: set[tuple[str | None, str | None]] = set()  # calls that are nothing but another agent's run

    def __call__(self, event: Event) -> None:
        """Enter one event."""
        match event:
            case RunStarted():
                self._run_started(event)
            case RunFinished():
                self._run_finished(event)
            case ModelRequested() | ToolStarted():
                self._part_started(event)
            case ModelResponded():
                self._responded(event)
            case RetryScheduled():
                self._retry(event)
            case ToolFinished():
                self._tool_finished(event)
            case DelegationStarted():
                self._delegation_started(event)
            case _:
                pass

    def _run_started(self, event: RunStarted) -> None:
        call = self._open.get((event.parent_id or "", event.call_id or ""))
        if call is not None and (event.parent_id, event.call_id) in self._delegating:
            # The call that delegates and the run it starts are one thing to whoever looks.
            run = call
            run.kind, run.label, run.agent = "run", one_line(event.agent_name), event.agent_name
        else:
            run = Part(kind="run", label=one_line(event.agent_name), agent=event.agent_name, started=event.at)
            parent = call or self._runs.get(event.parent_id or "")
            (parent.parts if parent else self.roots).append(run)
        run.detail = one_line(text_of(event.message.get("content") or ""))
        self._runs[event.run_id] = run

    def _run_finished(self, event: RunFinished) -> None:
        result, run = event.result, self._runs.get(event.run_id)
        if run is None:
            return
        ended = {"deadline": "timeout", "cancelled": "cancelled"}.get(result.stop_reason, "error")
        for part in run.parts:
            part.end(event.at, ended)
        run.end(event.at, "ok" if result.success else ended if ended != "error" else result.stop_reason)
        usage = result.usage
        run.requests, run.tokens = usage.requests, (usage.input_tokens, usage.output_tokens)

    def _part_started(self, event: ModelRequested | ToolStarted) -> None:
        run = self._runs.get(event.run_id)
        if run is None:  # a tool called without a run
            return
        if isinstance(event, ToolStarted):
            key, label = event.call_id, event.tool_name
            detail = _with_note(brief(event.arguments), self._notes.get(label))
        else:
            key, label = "", "model"
            detail = "" if event.attempt == 1 else f"try {event.attempt}"
        part = Part(
            kind="tool" if isinstance(event, ToolStarted) else "model",
            label=one_line(label),
            agent=event.agent_name,
            detail=detail,
            started=event.at,
            requests=None if isinstance(event, ToolStarted) else 1,
        )
        run.parts.append(part)
        self._open[event.run_id, key] = part
        if isinstance(event, ToolStarted):
            self._arguments[event.run_id, key] = event.arguments

    def _responded(self, event: ModelResponded) -> None:
        part = self._open.pop((event.run_id, ""), None)
        if part is not None:
            part.detail = brief_reply(event.message)
            part.tokens = (event.input_tokens, event.output_tokens)
            part.end(event.at, "ok")

    def _retry(self, event: RetryScheduled) -> None:
        part = self._open.pop((event.run_id, ""), None)
        if part is not None:
            part.detail = one_line(event.error)
            part.end(event.at, "error")

    def _tool_finished(self, event: ToolFinished) -> None:
        self._arguments.pop((event.run_id, event.call_id), None)
        part = self._open.pop((event.run_id, event.call_id), None)
        if part is None or part.kind == "run":  # a run tells its own end
            return
        part.end(event.at, event.result.outcome)
        if event.result.outcome == "error":
            part.detail = one_line(event.result.error or "")

    def _delegation_started(self, event: DelegationStarted) -> None:
        # A tool of the user's may ask another agent among other things; one that hands on what it was given is the run.
        given = self._arguments.get((event.run_id, event.call_id or ""))
        if is_same(given, event.query) or is_same(given, {"query": event.query}):
            self._delegating.add((event.run_id, event.call_id))


def _rows_below(part: Part, before: str, guides: tuple[str, str, str, str]) -> Iterator[tuple[str, Part]]:
    inner, last, below_inner, below_last = guides
    for index, child in enumerate(part.parts):
        is_last = index == len(part.parts) - 1
        yield before + (last if is_last else inner), child
        yield from _rows_below(child, before + (below_last if is_last else below_inner), guides)


def brief(arguments: object) -> str:
    """The arguments of a call, in one line."""
    if not isinstance(arguments, Mapping):
        return one_line(text_of(arguments))
    values = islice(cast("Mapping[str, object]", arguments).values(), 10)  # more have no room in a line
    return ", ".join(one_line(text_of(value), 60) for value in values)


def brief_reply(message: Mapping[str, Any]) -> str:
    """A model's message in one line: the calls that it asks for, or its text."""
    calls = [one_line(call["function"]["name"]) for call in message.get("tool_calls") or ()]
    if not calls:
        return one_line(text_of(message.get("content") or message.get("refusal") or ""))
    counted = [f"{name} x{calls.count(name)}" if calls.count(name) > 1 else name for name in dict.fromkeys(calls)]
    return f"calls {', '.join(counted)}"


def _with_note(detail: str, note: str | None) -> str:
    return f"{note}  {detail}" if note else detail
