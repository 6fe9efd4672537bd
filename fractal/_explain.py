"""What an exception says, for the model."""

from __future__ import annotations

from fractal._json import text_of_error, words_of
from fractal._scopes import leaves
from fractal.errors import AnswerRejected, RunError

__all__ = ["explain"]

# What asyncio and trio say when a function of asyncio is called, or awaited, on trio. Used for a hint, nothing more.
_ASYNCIO_ON_TRIO = ("no running event loop", "framework like asyncio")


def explain(error: BaseException) -> str:
    """What a tool raised, for the model: one phrase for each exception of a group."""
    members = leaves(error)
    if members != [error]:
        return "; ".join(map(explain, members))
    if isinstance(error, SystemExit):
        return f"the tool called sys.exit({error.code!r})"
    text = words_of(error)
    if isinstance(error, (RunError, AnswerRejected)):  # written for the model already
        return text
    hint = ""
    if isinstance(error, (RuntimeError, TypeError)) and any(words in text for words in _ASYNCIO_ON_TRIO):
        hint = ": the tool uses asyncio, and this run is on another event loop; use anyio in it"
    return text_of_error(error) + hint
