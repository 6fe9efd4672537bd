"""What an exception says, for the model."""

from __future__ import annotations

from typing import Any

from fractal._concurrency.scopes import leaves
from fractal._texts import described, is_a, message_of, repr_of, said_by
from fractal.errors import AnswerRejected, RunError

__all__ = ["explain"]

# What asyncio and trio say when a function of asyncio is called, or awaited, on trio. Used for a hint, nothing more.
_ASYNCIO_ON_TRIO = ("no running event loop", "framework like asyncio")


_exit_code: Any = vars(SystemExit)["code"].__get__  # not by the attribute, which a user's class may replace


def explain(error: BaseException) -> str:
    """The text of a tool's exception for the model: one phrase for each exception of a group."""
    members = leaves(error)
    if members != [error]:
        return "; ".join(map(explain, members))
    if is_a(error, SystemExit):
        return f"the tool called sys.exit({repr_of(_exit_code(error))})"
    if is_a(error, (RunError, AnswerRejected)):  # written for the model already
        return said_by(error)
    text, hint = message_of(error), ""
    if is_a(error, (RuntimeError, TypeError)) and any(words in text for words in _ASYNCIO_ON_TRIO):
        hint = ": the tool uses asyncio, and this run is on another event loop; use anyio in it"
    return described(error) + hint
