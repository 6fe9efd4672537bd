"""`RunStream`: a run, watched while it happens."""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable
from typing import TYPE_CHECKING, Any, Generic

from fractal._concurrency.background import Background
from fractal._concurrency.feed import Feed
from fractal._concurrency.feed_block import FeedBlock
from fractal._engine.held_back import HeldBack
from fractal._engine.loop import conduct, converse
from fractal._engine.overrides import Adoption, adopting
from fractal.errors import InvalidArguments, RunCancelled
from fractal.events import Event, TextDelta
from fractal.results import Content_co

if TYPE_CHECKING:
    from fractal._answers.partial import Partials, PartialStream
    from fractal._engine.run import Run
    from fractal.results import AgentResult

__all__ = ["DEFAULT_BUFFER", "RunStream", "TextStream"]

DEFAULT_BUFFER = 64
"""Events that may wait for their reader."""


class RunStream(FeedBlock[Event], Generic[Content_co]):
    """A run as its events, while it happens; an async context manager that an agent's `stream` makes.

    Iterate it for events, or `text()` for the answer alone. The run goes no faster than it is read: when `buffer`
    events wait, it waits too. Leaving the block ends it, in whatever way the block is left: its tools are cancelled,
    its tasks joined and its connection closed, before the next line runs.

    The run has a task of its own, and the block holds no scope open in yours. So a stream may sit in an async generator
    that somebody else steps, drops and leaves to the garbage collector, as web frameworks do.

    Example:
        ```python
        async with agent.stream("Tell me a story.") as stream:
            async for event in stream:
                match event:
                    case TextDelta(text=text):
                        print(text, end="", flush=True)
                    case ToolStarted(tool_name=name):
                        print(f"[{name}]")
        result = await stream.result()
        ```
    """

    _noun, _entered_by = "run", "async with agent.stream(…) as stream:"

    def __init__(
        self,
        begin: Callable[[], Run],
        buffer: int = DEFAULT_BUFFER,
        *,
        through: Callable[[], Awaitable[AgentResult[Content_co]]] | None = None,
        prepare: Callable[[Run], None] | None = None,
        is_held_back: bool = False,
    ) -> None:
        """Make the stream of a run.

        Args:
            begin: Makes the run.
            buffer: Events that may wait for the reader.
            through: The agent's own `run`, which begins the run that is streamed; `begin`'s never does, then.
            prepare: Called with that run before it begins.
            is_held_back: Whether nothing that its model writes is shown until the agent's own `run` has returned.
        """
        super().__init__(buffer)
        self._begin, self._through, self._prepare = begin, through, prepare
        self._is_held_back = is_held_back
        self._run: Run | None = None
        self._returned: AgentResult[Content_co] | None = None  # by the agent's own `run`
        self._ids: set[str] = set()

    def _start(self, feed: Feed[Event]) -> Background[None]:
        run = self._run = self._begin()
        self._ids.add(run.run_id)

        async def go() -> None:
            try:
                await (conduct(run, converse) if self._through is None else self._ask(self._through, run, feed))
            finally:
                feed.close()

        task: Background[None]
        if self._through is None:
            run.emitter.feeds += (feed,)
            run.start_clock()
            task = Background(go, run.task_name, run.clock.scope)
            task.on_cancel, task.on_more_time = run.cut, run.allow_until
        else:
            task = Background(go, run.task_name)
            task.on_cancel = self._cancel_run
        if run.parent is not None:
            run.parent.note_below(task, is_reached=run.origin.is_enclosed)
        return task

    async def _ask(self, ask: Callable[[], Awaitable[AgentResult[Content_co]]], first: Run, feed: Feed[Event]) -> None:
        """Call the agent's own `run`, and stream each run that it begins; the result is what it returns."""
        held_back, around = HeldBack(feed, self.is_own) if self._is_held_back else None, adopting.get()

        def take(run: Run) -> None:
            if self._run is first:
                run.take_id(first.run_id)
            self._run = run
            self._ids.add(run.run_id)
            run.emitter.feeds += (held_back or feed,)
            if self._prepare is not None:
                self._prepare(run)
            if around is not None:
                around.tell(run)

        try:
            with Adoption(first.agent, first.parent, take, sees_to_streams=True):
                self._returned = await ask()
        finally:
            if held_back is not None:
                held_back.let_out(self._returned)

    def _cancel_run(self) -> None:
        """Cancel the run that the agent's own `run` has begun, before it takes one more step."""
        if self._run is not None:
            self._run.cancel()

    def is_own(self, run_id: str) -> bool:
        """Whether an event is of the run itself, and not of one below it."""
        return run_id in self._ids

    @property
    def run_id(self) -> str:
        """Id of the run, as in its events and its result; events of delegates have others."""
        return self._begun.run_id

    async def __anext__(self) -> Event:
        """The next event, of the run or of a run below it.

        Raises:
            StopAsyncIteration: The run is over.
            UserError: The run could not be carried out; raised where `run` would raise it.
        """
        return await self._next()

    async def take(self) -> list[Event]:
        """Wait for events and take all there are; an empty list when the run is over. For batches.

        Raises:
            UserError: As when iterating.
        """
        feed, task = self._for_reading()
        events = await feed.take()
        if not events:
            await task.wait()
        return events

    def text(self) -> TextStream:
        """The pieces of text that the run's own model writes; other events, and delegates' texts, are passed over.

        Text that a model writes beside tool calls is among them, as it is in the transcript. A model that cannot
        stream gives its text in one piece.
        """
        return TextStream(self)

    def partial(self) -> PartialStream:
        """The answer as it grows, for a run with an `output_type`: values of that type, as far as they are written.

        Of a model or dataclass that is not complete, fields that have not come yet, or do not fit, have their defaults,
        or None. If the model has to answer again, the values begin anew. The last one is the answer itself, if there is
        one. Only plain validation has been done on those before: output validators see the answer alone.

        Raises:
            InvalidArguments: The run has no `output_type`.
        """
        from fractal._answers.partial import PartialStream

        return PartialStream(self, self.partials())

    def partials(self) -> Partials:
        """The maker of `partial`'s values from events; for other ways to iterate.

        Raises:
            InvalidArguments: The run has no `output_type`.
        """
        answer = self._begun.answer
        if answer is None or answer.type is None:
            raise InvalidArguments("the run has no output_type, so its answer is text: iterate stream.text()")
        from fractal._answers.partial import Partials

        return Partials(self.run_id, answer.type, answer.tool_name)

    async def result(self) -> AgentResult[Content_co]:
        """The result of the run.

        Inside the block this lets the run go on to its end, dropping the events that nobody has read. After the block
        it says how far the run came: a run that was left early has the stop reason `"cancelled"`; then it may be asked
        for in any event loop.

        Raises:
            InvalidArguments: The run asks for its own result, in a tool say, and would wait for itself; or it goes on
                in another event loop.
            UserError: The run could not be carried out; raised where `run` would raise it.
        """
        if self.ended is not None and not self._here()[1].is_here:
            return self.ended
        feed, task = self._for_reading()
        if task.is_around_caller:
            raise InvalidArguments("a run cannot wait for its own end: ask for the result outside its tools")
        feed.stop_reading()
        await task.wait()
        # A loop that ends may cancel a task before its first step.
        return self._returned or self._begun.result or self._begun.fail(RunCancelled())

    @property
    def ended(self) -> AgentResult[Content_co] | None:
        """The result of the run once it has ended, cleanup included; None before that, or if `result` would raise."""
        return (self._returned or self._begun.result) if self.is_settled else None

    def _inner_html(self) -> str:
        from fractal._html import of_result

        return of_result(self._run.result) if self._run is not None and self._run.result is not None else ""

    @property
    def _begun(self) -> Run:
        self._here()
        assert self._run is not None
        return self._run


class TextStream(AsyncIterator[str]):
    """The text of a run, piece by piece; made by `RunStream.text`."""

    def __init__(self, stream: RunStream[Any]) -> None:
        self._stream = stream

    async def __anext__(self) -> str:
        """The next piece.

        Raises:
            StopAsyncIteration: The run is over.
        """
        while True:
            event = await self._stream.__anext__()
            if isinstance(event, TextDelta) and self._stream.is_own(event.run_id):
                return event.text
