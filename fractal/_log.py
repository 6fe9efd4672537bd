"""The log of the package, the logger `fractal`: one line for each message, whatever is in it; and where warnings point.

What somebody else wrote cannot forge a line there, and what a handler of the user's raises is shown as `logging` itself
shows what happens in handlers: it disturbs no run.
"""

from __future__ import annotations

import inspect
import logging
import traceback
from collections.abc import Callable
from functools import partial
from typing import Any

from fractal._texts import described, log_line, str_of

__all__ = ["level_of_caller", "log"]


class _Log:
    """Logs texts, and objects whose `str()` is made only if the line is written.

    Attributes:
        is_debugging: Whether anybody wants to know what happens step by step.
    """

    def __init__(self, logger: logging.Logger) -> None:
        self._logger = logger
        self.is_debugging: Callable[[], bool] = partial(logger.isEnabledFor, logging.DEBUG)

    def debug(self, message: object, error: BaseException | None = None) -> None:
        """Log what happens, with the traceback of an error that it is about."""
        self._log(logging.DEBUG, message, error)

    def info(self, message: object) -> None:
        """Log what is good to know."""
        self._log(logging.INFO, message)

    def warning(self, message: object) -> None:
        """Log what is odd, but stops nothing."""
        self._log(logging.WARNING, message)

    def failure(self, message: object, error: BaseException) -> None:
        """Log what a function of the user's raised where nobody can be told, with its traceback."""
        self._log(logging.ERROR, message, error)

    def _log(self, level: int, message: object, error: BaseException | None = None) -> None:
        if not self._logger.isEnabledFor(level):
            return
        if error is not None and not _has_traceback(error):
            message, error = f"{str_of(message)}: {described(error)}", None
        line: Any = log_line(message) if isinstance(message, str) else _Line(message)
        try:
            self._logger.log(level, "%s", line, exc_info=error, stacklevel=3)
        except Exception:  # a filter, or a handler that looks after nothing
            if logging.raiseExceptions:
                traceback.print_exc()


class _Line:
    """A message that is made when it is written."""

    def __init__(self, message: object) -> None:
        self._message = message

    def __str__(self) -> str:
        return log_line(str_of(self._message))


def _has_traceback(error: BaseException) -> bool:
    """Whether a traceback can be made of an exception, whose class may be a user's."""
    try:
        traceback.TracebackException.from_exception(error)
    except Exception:
        return False
    return True


log = _Log(logging.getLogger("fractal"))


def level_of_caller() -> int:
    """The `stacklevel`, for the function that calls this, of the nearest code that is not the package's own."""
    level, frame = 0, inspect.currentframe()
    while frame is not None and frame.f_globals.get("__name__", "").startswith("fractal."):
        level, frame = level + 1, frame.f_back
    return level
