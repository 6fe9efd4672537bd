"""`TracingKit`: an observer that keeps what runs did, and writes it to a file."""

from __future__ import annotations

import os
import re
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from typing import TYPE_CHECKING, Any

from fractal._concurrency.forks import lock
from fractal._json import decode
from fractal._log import log
from fractal._redact import DEFAULT_TEXT, PayloadWriter
from fractal._texts import repr_of
from fractal.errors import InvalidArguments
from fractal.events import Event, RunEvent, RunFinished, RunObserver, RunStarted
from fractal.tracing.jsonl import writer
from fractal.tracing.read import event_of
from fractal.tracing.record import TraceEvent
from fractal.tracing.telling import RunFacts, lines_by_kind
from fractal.tracing.trace import Trace

if TYPE_CHECKING:
    from pathlib import Path

__all__ = ["TracingKit"]

DEFAULT_EVENTS = 10_000

_MOST_BYTES = 32 * 2**20
"""Of the events that are kept in memory, as JSON."""

_NO_NAME = re.compile(r"[/\\]|^\.+")
"""What would lead an id that a user chose to another folder."""

Redact = Callable[[TraceEvent], "TraceEvent | None"]
"""Has the last word on an event before it is kept and written: returns it, changed or not, or None to leave it out."""


class TracingKit(RunObserver):
    """A keeper of traces, for any number of runs at once, which also writes them to a file as lines of JSON.

    An agent has one with `enable_tracing=True`; give one to several agents as `observers=[kit]`. All that happens below
    a run is in its trace: delegates, at any depth, need no tracing of their own.

    Nothing secret is kept or written: what looks like a key, a token or a password, by its form or by the name of its
    field, in URLs and in texts too; nor the values of environment variables with such names.

    Args:
        output_file: File that events are appended to, as they happen; `{run_id}` and `{timestamp}` in its name stand
            for the run's id, with `_` for what would lead to another folder, and for when it began, so that each run
            has a file of its own. None: no file.
        redact: Called with each event before it is kept and written; returns it, changed or not, or None to leave it
            out. One that fails leaves the event's contents out.
        max_events: Events that are kept in memory; the oldest are dropped then.
        max_text: Characters of one text of an event; longer ones are cut, and the cut is marked.
        secrets: Further values that are never kept or written.

    Raises:
        InvalidArguments: `output_file` is no path, `max_events` or `max_text` no whole number from 1 up, `redact` no
            function, or `secrets` no list of texts.

    Example:
        >>> import anyio
        >>> from fractal import BaseAgent
        >>> from fractal.testing import ScriptedModel
        >>> kit = TracingKit()
        >>> agent = BaseAgent("Greeter", "You greet.", client=ScriptedModel(["hello"]), observers=[kit])
        >>> _ = anyio.run(agent.run, "hi")
        >>> [event.event_type for event in kit.get_trace()]
        ['agent_start', 'model_request', 'model_response', 'agent_end']
    """

    def __init__(
        self,
        output_file: str | Path | None = None,
        *,
        redact: Redact | None = None,
        max_events: int = DEFAULT_EVENTS,
        max_text: int = DEFAULT_TEXT,
        secrets: Iterable[str] = (),
    ) -> None:
        for name, value in (("max_events", max_events), ("max_text", max_text)):
            if type(value) is not int or value < 1:
                raise InvalidArguments(f"{name}={value!r}: give a whole number from 1 up")
        if redact is not None and not callable(redact):
            raise InvalidArguments(f"redact={repr_of(redact)}: give a function of an event")
        if isinstance(secrets, str) or not all(isinstance(secret, str) for secret in secrets):
            raise InvalidArguments("secrets: give a list of texts")
        self.output_file = _path_of(output_file)
        self._redact = redact
        self._payload = PayloadWriter(secrets, max_text)
        self._kept: deque[tuple[str | None, bytes]] = deque()
        self._max_events, self._size, self._dropped = max_events, 0, 0
        self._lock = lock()  # runs on several event loops may share a kit
        self._runs: dict[str, RunFacts] = {}

    def __call__(self, event: Event) -> None:
        """Keep an event, and have it written."""
        tell = lines_by_kind.get(type(event))
        if tell is None:  # a piece of a stream: what it is a piece of will be told
            return
        run = self._runs.get(event.run_id)
        if run is None:
            run = self._begin(event)
        for line in tell(event, run, self._payload):
            self._keep(run, line)
        if type(event) is RunFinished:
            self._runs.pop(event.run_id, None)

    def is_settled(self, run_id: str) -> bool:
        """Whether all of a run is in its file."""
        if type(self).settle is not TracingKit.settle:  # a subclass has more to do
            return False
        return self.output_file is None or writer.catch_up()

    async def settle(self, run_id: str) -> None:
        """Wait until all of a run is in its file, for a moment at most."""
        await writer.settle()

    def get_trace(self, run_id: str | None = None) -> Trace:
        """The kept events, in the order in which they happened.

        Args:
            run_id: Id of a run that was begun by no other one, as in its result: only of that, and of what is below
                it. None: all.

        Returns:
            A list, which a notebook shows as a tree with bars of time.
        """
        return Trace(TraceEvent.of(decode(line)) for line in self._lines(run_id))

    def get_summary(self, run_id: str | None = None) -> dict[str, Any]:
        """Numbers about the events that are kept.

        Args:
            run_id: As in `get_trace`.

        Returns:
            `total_events`, and `dropped_events`, which are kept no longer; `runs`, those that a user began, and
            `agent_runs`, all; `model_calls`, `tool_calls`, `delegations`, `retries`, `warnings`, `errors`;
            `input_tokens`, `output_tokens`, and `cost`, None if it is not known of each reply; `total_time`, seconds
            from the first event to the last, and `average_tool_time`; `success_rate` of the tool calls;
            `stop_reasons`, why runs ended and how often; and for each of `agents`, `tools` and `models` its `count`,
            how often it `failed`, its `seconds` and the `longest` of them.
        """
        from fractal.tracing.summary import summary_of

        return summary_of(self.get_trace(run_id)) | {"dropped_events": self._dropped}

    def export_json(self, path: str | Path, run_id: str | None = None) -> None:
        """Write the kept events to a file, whose former content is lost; a new one is for its owner alone.

        Args:
            path: The file. One that ends in `.jsonl` gets a line of JSON for each event, as `output_file` does; any
                other one is a single JSON array. The command line reads both.
            run_id: As in `get_trace`.

        Raises:
            OSError: The file cannot be written.
        """
        lines = list(self._lines(run_id))
        text = b"".join(line + b"\n" for line in lines)
        if not os.fspath(path).lower().endswith(".jsonl"):
            text = b"[\n" + b",\n".join(lines) + b"\n]\n"
        with open(path, "wb", opener=lambda name, flags: os.open(name, flags, 0o600)) as file:
            file.write(text)

    def clear(self) -> None:
        """Forget the events that are kept; runs that go on are traced further, and files stay."""
        with self._lock:
            self._kept.clear()
            self._size = self._dropped = 0

    def flush(self, timeout: float = 2.0) -> bool:
        """Wait, blocking, until all events so far are in their files.

        A run has waited for that, for a second at most, when it returns.

        Args:
            timeout: Seconds to wait.

        Returns:
            Whether they are.
        """
        return writer.flush(timeout)

    def __len__(self) -> int:
        return len(self._kept)

    def __bool__(self) -> bool:
        return True  # also one that has kept nothing yet

    def __repr__(self) -> str:
        return f"<TracingKit: {len(self._kept)} events>"

    def __str__(self) -> str:
        facts = self.get_summary()
        named = ", ".join(f"{name}={facts[name]}" for name in ("agent_runs", "tool_calls", "errors"))
        return f"TracingKit(events={facts['total_events']}, {named})"

    def _begin(self, event: RunEvent) -> RunFacts:
        above = self._runs.get(event.parent_id or "")
        run = RunFacts(
            run_id=event.run_id,
            root=above.root if above else event.run_id,
            parent_id=event.parent_id,
            parent_agent=above.agent if above else None,
            agent=event.agent_name,
            depth=event.depth,
            path=above.path if above else self._path(event),
            name=self._payload.name,
        )
        if type(event) is RunStarted:  # after its end some things may still be told
            self._runs[event.run_id] = run
        return run

    def _keep(self, run: RunFacts, line: bytes) -> None:
        wanted = line if self._redact is None else self._as_wanted(line, self._redact)
        if wanted is None:
            return
        if run.path is not None:
            writer.write(run.path, wanted)
        with self._lock:
            self._kept.append((run.root, wanted))
            self._size += len(wanted)
            if len(self._kept) > self._max_events or self._size > _MOST_BYTES:
                self._drop_oldest()

    def _drop_oldest(self) -> None:
        while len(self._kept) > self._max_events or (self._size > _MOST_BYTES and len(self._kept) > 1):
            self._size -= len(self._kept.popleft()[1])
            self._dropped += 1

    def _as_wanted(self, line: bytes, redact: Redact) -> bytes | None:
        event = TraceEvent.of(decode(line))
        try:
            wanted = redact(event)
            return _line_of(wanted) if wanted is not None else None
        except Exception as error:
            log.failure(f"redact= failed on {event.event_type}: the contents of the event are left out", error)
            event = TraceEvent.of(decode(line))
            event.arguments, event.result, event.error = None, "[left out: redact= failed]", None
            event.metadata = {name: event.metadata[name] for name in ("run", "parent_run") if name in event.metadata}
            return event.to_json().encode()

    def _path(self, event: RunEvent) -> str | None:
        """The file of the run that the user began."""
        if self.output_file is None or "{" not in self.output_file:
            return self.output_file
        began = time.strftime("%Y%m%d_%H%M%S", time.localtime(event.at))
        return self.output_file.replace("{timestamp}", began).replace("{run_id}", _NO_NAME.sub("_", event.run_id))

    def _lines(self, run_id: str | None) -> Iterator[bytes]:
        with self._lock:
            kept = list(self._kept)
        return (line for root, line in kept if run_id in (None, root))


def _line_of(event: TraceEvent) -> bytes:
    """The line of an event that a user's function has made."""
    whole = event_of(decode(event.to_json()))
    if whole is None:
        raise ValueError(f"no event of a trace: {repr_of(event)}")
    return whole.to_json().encode()


def _path_of(file: str | Path | None) -> str | None:
    if file is None:
        return None
    try:
        return os.path.abspath(os.fsdecode(file))
    except (TypeError, ValueError):
        raise InvalidArguments(f"output_file={repr_of(file)}: give a path, or None for no file") from None
