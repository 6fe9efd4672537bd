"""A run watched from blocking code."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, Generic, overload

from typing_extensions import TypeForm, Unpack

import fractal.streaming
from fractal._agent import verbs
from fractal._engine.overrides import override_of, returned_as
from fractal.events import TextDelta
from fractal.results import Content, Content_co
from fractal.streaming import DEFAULT_BUFFER
from fractal.sync._block import Block

if TYPE_CHECKING:
    from types import TracebackType

    from fractal.definition import AgentDefinition
    from fractal.events import Event
    from fractal.options import PlainOptions, RunOptions
    from fractal.results import AgentResult

__all__ = ["RunStream", "stream"]


@overload
def stream(
    agent: AgentDefinition[Content],
    user_input: object,
    *,
    buffer: int = DEFAULT_BUFFER,
    output_type: None = None,
    **options: Unpack[PlainOptions],
) -> RunStream[Content]: ...


@overload
def stream(
    agent: AgentDefinition[Any],
    user_input: object,
    *,
    buffer: int = DEFAULT_BUFFER,
    output_type: TypeForm[Content],
    **options: Unpack[PlainOptions],
) -> RunStream[Content]: ...


def stream(
    agent: AgentDefinition[Any],
    user_input: object,
    *,
    buffer: int = DEFAULT_BUFFER,
    **options: Unpack[RunOptions],
) -> RunStream[Any]:
    """Answer one input, and watch it happen, blocking.

    Works wherever `run` does. Leaving the block ends the run, also by `break` in a loop that is its last statement,
    by an exception or by Ctrl-C; when the next line runs, nothing of it is left.

    Args:
        agent: The agent.
        user_input: As in `BaseAgent.run`.
        buffer: Events that may wait for the reader while the run goes on.
        **options: As `RunOptions` describes them.

    Returns:
        The run, to be entered: `with sync.stream(…) as stream`.

    Example:
        ```python
        with sync.stream(agent, "Tell me a story.") as stream:
            for text in stream.text():
                print(text, end="", flush=True)
        ```
    """
    if (override := override_of(agent, "stream")) is not None:
        given = {name: value for name, value in options.items() if value is not None}
        made: object = override(user_input, buffer=buffer, **given)
        if isinstance(made, Block):  # of a blocking agent
            return returned_as(RunStream, made, agent, "stream")
        return RunStream(returned_as(fractal.streaming.RunStream, made, agent, "stream"))
    return RunStream(verbs.open_stream(agent, user_input, buffer, **options))


class RunStream(Block, Generic[Content_co]):
    """A run as its events, for blocking code: `fractal.RunStream` without the awaiting; made by `stream`.

    Open it, read it and close it in whatever thread; one opened in a plain `def` tool stays in the tool's thread.
    """

    _noun, _entered_by = "run", "with sync.stream(…) as stream:"

    def __init__(self, stream: fractal.streaming.RunStream[Content_co]) -> None:
        super().__init__(stream)
        self._stream = stream
        self._events: deque[Event] = deque()
        self._is_read = False  # to the end, or as far as anybody wanted

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._read_no_more()
        super().__exit__(kind, error, traceback)

    @property
    def run_id(self) -> str:
        """Id of the run, as in its events and its result; events of delegates have others."""
        return self._stream.run_id

    def __next__(self) -> Event:
        """The next event, of the run or of a run below it.

        Raises:
            StopIteration: The run is over.
            UserError: The run could not be carried out; raised where `run` would raise it.
        """
        if not self._events and not self._is_read:
            self._events.extend(self._caller(self._stream.take))
        if not self._events:
            raise StopIteration
        return self._events.popleft()

    def text(self) -> Iterator[str]:
        """The pieces of text that the run's own model writes; other events, and delegates' texts, are passed over."""
        for event in self:
            if isinstance(event, TextDelta) and event.run_id == self.run_id:
                yield event.text

    def partial(self) -> Iterator[Any]:
        """The answer as it grows, for a run with an `output_type`; see `fractal.RunStream.partial`.

        Raises:
            InvalidArguments: The run has no `output_type`.
        """
        partials = self._stream.partials()
        from fractal._answers.partial import NOTHING

        return (value for event in self if (value := partials.see(event)) is not NOTHING)

    def result(self) -> AgentResult[Content_co]:
        """The result of the run.

        Inside the block this lets the run go on to its end, dropping the events that nobody has read. After the block
        it says how far the run came: a run that was left early has the stop reason `"cancelled"`.

        Raises:
            UserError: The run could not be carried out; raised where `run` would raise it.
        """
        caller = self._caller
        self._read_no_more()
        return self._stream.ended or caller(self._stream.result)

    def _read_no_more(self) -> None:
        self._is_read = True
        self._events.clear()
