"""A background task as a block of blocking code."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar, Self

from fractal.errors import InvalidArguments
from fractal.sync._portal import Caller

if TYPE_CHECKING:
    from types import TracebackType

    from fractal._concurrency.feed_block import FeedBlock

__all__ = ["Block"]


class Block:
    """An async block entered and left from a thread; the base of blocking streams and batches.

    Args:
        awaited: The block.
    """

    _noun: ClassVar[str]
    _entered_by: ClassVar[str]
    _call: Caller | None = None  # here too: Ctrl-C may end `__init__` before it is set

    def __init__(self, awaited: FeedBlock[Any]) -> None:
        self._awaited = awaited

    def __enter__(self) -> Self:
        if self._call is not None:
            raise InvalidArguments(f"a {self._noun} is entered once: make another one")
        self._call = Caller.here()
        try:
            self._call(self._awaited.__aenter__)
        except BaseException:  # Ctrl-C may come when it has begun already
            self._call.end(self._awaited.aclose)
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if not self._awaited.is_settled:
            self._caller.end(lambda: self._awaited.__aexit__(kind, error, traceback))

    def __del__(self) -> None:
        # Not left: by Ctrl-C in the moment of leaving, say.
        if self._call is not None and not self._awaited.is_settled and not self._call.is_over:
            self._call.call(self._awaited.aclose).start()

    def __repr__(self) -> str:
        return f"<{type(self).__name__}: the {self._noun} {self._awaited.state}>"

    def _repr_html_(self) -> str:
        return self._awaited.html()

    def __iter__(self) -> Self:
        return self

    @property
    def _caller(self) -> Caller:
        if self._call is None:
            raise InvalidArguments(f"the {self._noun} has not begun: write `{self._entered_by}`")
        return self._call
