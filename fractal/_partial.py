"""Objects from JSON that is still being written.

The text is scanned once, piece by piece. A complete value is validated once for each open value around it, so the work
grows with the length of the text times the depth of its values; only the open values are built anew for each look, and
they copy what they hold, not what is inside that.
"""

from __future__ import annotations

import functools
from typing import Any, cast

from fractal._json import is_same
from fractal._output import WRAPPER, OutputFault, OutputType
from fractal._scanner import Scanner
from fractal._shapes import NOTHING, Shape, shape_of

__all__ = ["NOTHING", "PartialReader"]


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
        >>> from fractal._output import output_for
        >>> reader = PartialReader(output_for(list[str]))
        >>> [reader.feed(piece) for piece in ('{"result": ["a', 'b", "c', '"]}')]
        [['a'], ['ab', 'c'], ['ab', 'c']]
    """

    __slots__ = ("_last", "_output", "_scanner", "_shapes")

    def __init__(self, output: OutputType) -> None:
        self._output, self._shapes = output, _shapes_of(output)
        self._scanner = Scanner(output.start_of_json)
        self._last: Any = NOTHING

    def feed(self, text: str) -> Any:
        """Take the next piece of the answer.

        Never raises, whatever the text is. Values inside what it returns may be shared with what it returns later, so
        they are for reading.

        Returns:
            The object as far as it goes; NOTHING if there is nothing to show or nothing new. When the JSON is complete,
            the validated object, and from then on NOTHING.
        """
        scanner = self._scanner
        if not scanner.feed(text):
            return NOTHING
        if scanner.whole is not None:
            try:
                return self._output.check(scanner.whole)
            except OutputFault:
                return NOTHING
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
