"""Objects from JSON that is still being written.

The text is scanned once, piece by piece. A complete value is validated once for each open value around it, so the work
grows with the length of the text times the depth of its values; only the open values are built anew for each look, and
they copy what they hold, not what is inside that.

This module is loaded by the first run that is watched so.
"""

from __future__ import annotations

import functools
from collections.abc import AsyncIterator, Iterator
from typing import Any, cast

from anyio.lowlevel import checkpoint

from fractal._answers.kinds import shape_of
from fractal._answers.output import WRAPPER, OutputFault, OutputType
from fractal._answers.scanner import Scanner
from fractal._answers.shapes import NOTHING, Shape
from fractal._json import is_same
from fractal.events import Event, ModelRequested, RunFinished, TextDelta, ToolCallDelta

_LOOKS = 256
_LONGEST_STEP = 16_384
"""Characters that are read in one go, while the event loop stands still."""

__all__ = ["NOTHING", "PartialReader", "PartialStream", "Partials"]


class PartialReader:
    """Reads an answer of a type while it is written.

    What it shows is of the type, as far as it goes. A value that is complete has been validated. Of a model, dataclass
    or named tuple that is open, fields that have not arrived, or do not fit, have their defaults, or None; in an open
    TypedDict they are missing, in a list they are left out. An open string is shown as far as it is a plain `str`;
    numbers, dates, enums and the like come when they are complete. An open member of a union is shown once it is clear
    which one it is. Validators of whole models and lists have not seen an open one.

    Args:
        output: The type.

    Example:
        >>> from fractal._answers.output import output_for
        >>> reader = PartialReader(output_for(list[str]))
        >>> [reader.feed(piece) for piece in ('{"result": ["a', 'b", "c', '"]}')]
        [['a'], ['ab', 'c'], ['ab', 'c']]
    """

    __slots__ = ("_last", "_next_look", "_output", "_scanner", "_shapes")

    def __init__(self, output: OutputType) -> None:
        self._output, self._shapes = output, _shapes_of(output)
        self._scanner = Scanner(output.start_of_json)
        self._last: Any = NOTHING
        self._next_look = 0

    def feed(self, text: str) -> Any:
        """Take the next piece of the answer.

        Never raises, whatever the text is. Values inside what it returns may be shared with what it returns later, so
        they are for reading.

        Returns:
            The object as far as it goes; NOTHING if there is nothing to show, nothing new, or too little: a long one is
            shown again when it has grown by a 256th. When the JSON is complete, the validated object, and from then on
            NOTHING.
        """
        scanner = self._scanner
        if not scanner.feed(text):
            return NOTHING
        if scanner.whole is not None:
            try:
                return self._output.check(scanner.whole)
            except OutputFault:
                return NOTHING
        if scanner.length < self._next_look:
            return NOTHING
        # Each look costs as much as there is to see. All of them together cost no more than so many of the last one if
        # they become rarer.
        self._next_look = scanner.length + scanner.length // _LOOKS
        shown = self._shown()
        if shown is NOTHING or is_same(shown, self._last):
            return NOTHING
        self._last = shown
        return shown

    def _shown(self) -> Any:
        root = self._scanner.root
        if root is None:
            return NOTHING
        bare, wrapper = self._shapes
        if wrapper is None or not root.is_object:
            return bare.open_frame(root, 0)
        shown = wrapper.open_frame(root, 0)
        return cast("dict[str, Any]", shown).get(WRAPPER, NOTHING) if isinstance(shown, dict) else NOTHING


@functools.lru_cache(maxsize=256)
def _shapes_of(output: OutputType) -> tuple[Shape, Shape | None]:
    """The shape of the type, and that of the object it is wrapped in."""
    bare = shape_of(output.adapter.core_schema)
    return bare, shape_of(output.wrapper.core_schema) if output.wrapper is not None else None


class PartialStream(AsyncIterator[Any]):
    """The answer of a run as it grows; made by `RunStream.partial`."""

    def __init__(self, stream: AsyncIterator[Event], partials: Partials) -> None:
        self._stream, self._partials = stream, partials

    async def __anext__(self) -> Any:
        """The next value.

        Raises:
            StopAsyncIteration: The run is over.
        """
        while True:
            value: Any = NOTHING
            for number, seen in enumerate(self._partials.steps(await self._stream.__anext__())):
                if number:
                    await checkpoint()
                value = seen if seen is not NOTHING else value
            if value is not NOTHING:
                return value


class Partials:
    """Reads values that are still being written from a run's events.

    Args:
        run_id: The run; events of others are passed over.
        kind: What its answers are.
        tool_name: The tool that takes the answer, if one does.
    """

    def __init__(self, run_id: str, kind: OutputType, tool_name: str) -> None:
        self._run_id, self._kind, self._tool_name = run_id, kind, tool_name
        self._call: int | None = None
        self._reader = PartialReader(kind)
        self._last: Any = NOTHING

    def see(self, event: Event) -> Any:
        """Take the next event.

        Returns:
            The value that it completes, or `NOTHING`.
        """
        values = [value for value in self.steps(event) if value is not NOTHING]
        return values[-1] if values else NOTHING

    def steps(self, event: Event) -> Iterator[Any]:
        """Take the next event in steps that take a moment each.

        Yields:
            After each the value as far as it goes, or `NOTHING`.
        """
        for value in self._steps(event) if event.run_id == self._run_id else ():
            self._last = value if value is not NOTHING else self._last
            yield value

    def _steps(self, event: Event) -> Iterator[Any]:
        match event:
            case ModelRequested():
                self._begin(None)
            case TextDelta(text=text) if self._call is None:
                yield from self._read(text)
            case ToolCallDelta(tool_name=self._tool_name, index=index, arguments=arguments):
                if index != self._call:
                    self._begin(index)
                yield from self._read(arguments)
            case RunFinished(result=result) if result.success and not is_same(result.content, self._last):
                yield result.content
            case _:
                pass

    def _read(self, text: str) -> Iterator[Any]:
        for start in range(0, len(text), _LONGEST_STEP):
            yield self._reader.feed(text[start : start + _LONGEST_STEP])

    def _begin(self, call: int | None) -> None:
        self._call, self._reader = call, PartialReader(self._kind)
