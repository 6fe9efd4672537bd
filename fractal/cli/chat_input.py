"""What a chat reads in a terminal: questions of one line or several, and answers to what it asks itself."""

from __future__ import annotations

import os
import select
import sys
from collections.abc import Callable
from contextlib import AbstractContextManager, suppress
from typing import TYPE_CHECKING

from fractal.cli.door import show

if TYPE_CHECKING:
    from types import ModuleType

__all__ = ["Keyboard"]


class Keyboard:
    """The terminal's keyboard.

    Args:
        welcome: A block in which Ctrl-C is an exception.

    Attributes:
        has_editor: Whether a line can be edited, and begin with something that is there already.
    """

    def __init__(self, welcome: Callable[[], AbstractContextManager[None]]) -> None:
        self._welcome = welcome
        self._editor = _line_editor()
        self._tells_pasted = self._editor is not None and _marks_pasted(self._editor)
        self.has_editor = self._editor is not None

    def question(self) -> str:
        """Read what the user wants to say: a line, lines that were pasted, or lines that end with a backslash.

        Raises:
            EOFError: There is nothing more.
            KeyboardInterrupt: Ctrl-C.
        """
        with self._welcome():
            lines = [input("\n> ")]
            while lines[-1].endswith("\\") or (not self._tells_pasted and _more_is_there()):
                lines.append(input(". "))
        question = "\n".join(line.removesuffix("\\") for line in lines)
        if self._editor is not None and question.strip():
            self._editor.add_history(question)
        return question

    def answer(self, prompt: str, prefilled: str = "") -> str:
        """Read a line that answers a prompt, and none that was typed before the prompt was there.

        Raises:
            EOFError: There is nothing more.
            KeyboardInterrupt: Ctrl-C.
        """
        editor = self._editor
        _forget_what_was_typed()
        if editor is not None:
            editor.set_startup_hook(lambda: editor.insert_text(prefilled))
        try:
            return input(prompt)
        except EOFError:
            show("")
            raise
        finally:
            if editor is not None:
                editor.set_startup_hook(None)


def _line_editor() -> ModuleType | None:
    """The line editor, if installed; `input` uses it once it is loaded."""
    try:
        import readline
    except ImportError:
        return None
    readline.set_auto_history(False)  # answers to prompts are no questions
    return readline


def _marks_pasted(editor: ModuleType) -> bool:
    """Have the terminal mark pasted text; returns whether it does."""
    is_able = getattr(editor, "_READLINE_VERSION", 0) >= 0x0801 and "libedit" not in (editor.__doc__ or "")
    if not is_able or os.environ.get("TERM", "dumb") == "dumb":
        return False
    editor.parse_and_bind("set enable-bracketed-paste on")
    return True


def _more_is_there() -> bool:
    """Whether another line has come already, so that it was pasted together with the one before."""
    try:
        return bool(select.select([sys.stdin], [], [], 0)[0])
    except (OSError, ValueError):  # it cannot be asked, as on Windows
        return False


def _forget_what_was_typed() -> None:
    try:
        import termios
    except ImportError:  # not on Windows
        return
    with suppress(termios.error):
        termios.tcflush(sys.stdin.fileno(), termios.TCIFLUSH)
