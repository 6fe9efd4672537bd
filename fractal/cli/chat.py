"""`fractal chat`: a conversation in the terminal.

The main thread has the terminal to itself: nobody else reads or writes there. It reads what happens from the queue of
an answer (`_chat_turn`) and shows it (`_chat_screen`).

Ctrl-C is an exception only where the main thread waits: at the prompt, and for an answer; anywhere else it is noted
until the next such place, and cannot tear what is being kept. While an answer comes it cancels the answer's task, and
the end, cleanup included, is waited for; one more Ctrl-C there leaves the program.
"""

from __future__ import annotations

import json
import logging
import signal
import sys
import threading
from collections.abc import Callable, Generator, Mapping
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from functools import partial
from typing import TYPE_CHECKING, Any, Literal

from fractal import sync
from fractal._agent import verbs
from fractal._json import decode, encode, is_list, is_mapping
from fractal._texts import escaped, said_by
from fractal.agent import BaseAgent
from fractal.approval import Allow, Approval, Deny
from fractal.cli.chat_input import Keyboard
from fractal.cli.chat_screen import Screen, call_text, counted, usage_text
from fractal.cli.chat_turn import Question, Turn
from fractal.cli.door import json_line, reports_shown, show
from fractal.cli.files import read_bounded, replace
from fractal.cli.which_agent import WrongUse
from fractal.definition import AgentDefinition
from fractal.errors import ConversationConflict, FractalError, InvalidMessages, StoreError
from fractal.messages import Message, Transcript
from fractal.results import Usage

if TYPE_CHECKING:
    from types import FrameType, TracebackType

    from fractal.durable import Conversation
    from fractal.results import AgentResult

__all__ = ["chat", "load_messages", "save_messages"]

_HELP = """\
/save FILE   write the conversation as JSON     /load FILE   go on with one that was saved
/new         begin another one                  /tools       what the agent can call
/usage       what was used so far               /exit        leave, as Ctrl-D does
A line that begins with // is sent with one slash. Pasted lines are one question, and a line that ends
with \\ goes on in the next. Ctrl-C stops an answer."""

_PATIENCE = 0.5
"""Seconds an answer may take to stop until we say that it is waited for."""


def chat(
    agent: AgentDefinition,
    *,
    backend: Literal["asyncio", "trio"],
    messages: list[Message],
    kept: Conversation | None = None,
    save: str | None,
    options: Mapping[str, Any],
) -> bool:
    """Talk until the input ends.

    Args:
        agent: Who answers.
        backend: Event loop to run on.
        messages: Conversation to go on with.
        kept: Conversation of a store to go on with in their place, or None.
        save: File that the conversation is written to after each answer, or None.
        options: Of each run.

    Returns:
        Whether all went well: the conversation is saved where it had to be and, without a terminal, the last line was
        answered.
    """
    is_terminal = sys.stdin.isatty() and sys.stdout.isatty()
    with ExitStack() as stack:
        portal = stack.enter_context(sync.portal(backend=backend))
        stack.enter_context(_entered(agent))
        if kept is not None:
            stack.enter_context(_opened(kept))
        interrupts = _Interrupts()
        if is_terminal:
            # Warnings are shown in the conversation itself.
            stack.enter_context(reports_shown(logging.ERROR))
            stack.enter_context(interrupts)
        talk = _Talk(agent, portal, interrupts, messages, kept, save, options, is_terminal)
        talk.go_on()
    return talk.is_saved and (is_terminal or talk.has_answered)


def load_messages(path: str) -> list[Message]:
    """Read a conversation: a list of messages, or a whole result of `fractal run --json`.

    Raises:
        OSError: The file cannot be read.
        ValueError: It holds no conversation; says why.
    """
    found = decode(read_bounded(path))
    messages = found.get("messages") if is_mapping(found) else found
    if not is_list(messages):
        raise ValueError("it holds no list of messages")
    try:
        return Transcript(messages).messages
    except InvalidMessages as error:
        raise ValueError(str(error)) from error


def save_messages(path: str, messages: list[Message]) -> None:
    """Write a conversation as JSON; a file that is there is replaced in one step.

    Raises:
        OSError: It cannot be written; a file that is there is as it was.
    """
    plain = decode(encode(messages))  # without what UTF-8 or JSON cannot carry
    replace(path, escaped(json.dumps(plain, indent=1, ensure_ascii=False)) + "\n")


def _entered(agent: AgentDefinition) -> AbstractContextManager[object]:
    """Open an agent for the whole conversation, in the event loop that runs it."""
    if isinstance(agent, sync.BaseAgent):
        return agent
    return sync.enter(agent) if isinstance(agent, BaseAgent) else nullcontext()


@contextmanager
def _opened(kept: Conversation) -> Generator[None]:
    """A block in which a conversation of a store is open.

    Raises:
        WrongUse: It cannot be read.
    """
    with ExitStack() as stack:
        try:
            stack.enter_context(sync.enter(kept))
        except StoreError as error:
            raise WrongUse(f"--conversation {kept.id}: {said_by(error)}") from None
        yield


class _Interrupts:
    """Ctrl-C as an exception where the program can take it; one that comes elsewhere waits until then.

    Until it is entered, Ctrl-C does what it does anyway.
    """

    def __init__(self) -> None:
        self._is_welcome = self._is_noted = False
        self._before: Any = None

    def __enter__(self) -> None:
        if threading.current_thread() is threading.main_thread():
            self._before = signal.signal(signal.SIGINT, self._on_signal)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self._before is not None:
            signal.signal(signal.SIGINT, self._before)

    @contextmanager
    def welcome(self) -> Generator[None]:
        """A block that Ctrl-C may interrupt.

        Raises:
            KeyboardInterrupt: Ctrl-C, here or since the last such place.
        """
        self._is_welcome = True
        try:
            if self._is_noted:
                self._on_signal(signal.SIGINT, None)
            yield
        finally:
            self._is_welcome = False

    def forget(self) -> None:
        """Drop a pending Ctrl-C: a key pressed in haste comes several times."""
        self._is_noted = False

    def _on_signal(self, signal_number: int, frame: FrameType | None) -> None:
        self._is_noted = not self._is_welcome
        if self._is_welcome:
            self._is_welcome = False  # one at a time
            raise KeyboardInterrupt


class _Talk:
    """One conversation."""

    def __init__(
        self,
        agent: AgentDefinition,
        portal: sync.Portal,
        interrupts: _Interrupts,
        messages: list[Message],
        kept: Conversation | None,
        save: str | None,
        options: Mapping[str, Any],
        is_terminal: bool,
    ) -> None:
        self._kept = kept
        self._agent, self._portal, self._interrupts = agent, portal, interrupts
        self._messages, self._save_to, self._options = kept.messages if kept else messages, save, options
        self._is_terminal = is_terminal
        self._screen = Screen(is_terminal)
        self._keyboard = Keyboard(interrupts.welcome) if is_terminal else None
        self._last_usage = self._usage = Usage()
        self.has_answered = self.is_saved = True
        self._commands: dict[str, Callable[[str], None]] = {
            "help": lambda _: show(_HELP),
            "save": self._save,
            "load": self._load,
            "new": self._begin_anew,
            "tools": lambda _: show(str(self._agent)),
            "usage": self._show_usage,
        }

    def go_on(self) -> None:
        """Take lines until there are none, or one says so."""
        if self._is_terminal:
            show(f"{self._agent.name} listens. /help tells what else there is.")
            if self._messages:
                self._screen.note(f"the conversation goes on: {counted(len(self._messages), 'message')}")
        was_interrupted = False
        while True:
            try:
                line = self._line().strip()
            except EOFError:
                return
            except KeyboardInterrupt:
                if not self._is_terminal:
                    raise
                show("")
                if was_interrupted:
                    return
                was_interrupted = True
                self._screen.note("Ctrl-C once more, Ctrl-D or /exit leaves")
                continue
            was_interrupted = False
            if line == "/exit":
                return
            self._take(line)

    def _line(self) -> str:
        return self._keyboard.question() if self._keyboard is not None else input()

    def _take(self, line: str) -> None:
        if line.startswith("/") and not line.startswith("//") and "\n" not in line:
            name, _, rest = line[1:].partition(" ")
            command = self._commands.get(name)
            if command is None:
                self._screen.note(f"there is no /{name}; /help tells what there is")
            else:
                command(rest.strip())
        elif line:
            self._answer(line[1:] if line.startswith("//") else line)

    # ---- an answer

    def _answer(self, question: str) -> None:
        # Without a buffer: what was told before a question is read before it.
        history: Any = {"messages": self._messages} if self._kept is None else {"conversation": self._kept}
        stream = partial(verbs.open_stream, self._agent, question, 0, **history, **self._options)
        turn = Turn(stream, self._portal, can_ask=self._is_terminal)
        was_stopped = self._was_stopped(turn)
        try:
            result = turn.result()
        except ConversationConflict:
            self._read_again()
            return
        except FractalError as error:
            self.has_answered = False
            self._screen.note(f"no answer: {said_by(error)}")
            return
        if was_stopped:
            self._screen.note("stopped")
        if result is not None:
            self._keep(result, was_stopped)

    def _was_stopped(self, turn: Turn) -> bool:
        """See a turn through to its end; returns whether the user has stopped it."""
        turn.start()
        try:
            with self._interrupts.welcome():
                for news in turn:
                    if not isinstance(news, Question):
                        self._screen.show(news)
                    elif news.is_open and self._keyboard is not None:  # without one nobody is asked
                        news.answer(self._decision(news, self._keyboard))
                turn.wait()
        except BaseException as error:
            turn.cancel()
            if isinstance(error, KeyboardInterrupt):
                self._screen.note_key()
            has_ended = turn.has_ended_within(_PATIENCE)
            self._interrupts.forget()
            if not has_ended:
                self._screen.note("waiting for what does not stop at once; Ctrl-C again leaves the program")
                with self._interrupts.welcome():
                    turn.wait()
            if not self._is_terminal or not isinstance(error, (KeyboardInterrupt, EOFError)):
                raise
            return True
        return False

    def _keep(self, result: AgentResult, was_stopped: bool) -> None:
        has_done = len(result.messages) > len(self._messages) + 1
        self._screen.end(result)
        if self._kept is not None:
            has_done = len(self._kept.messages) > len(self._messages)
            self._messages = self._kept.messages
        elif result.success or was_stopped or has_done:
            self._messages, has_done = result.messages, True
        if not has_done and self._is_terminal:
            # An endpoint that does not take it would not take the next one after it either.
            self._screen.note("the question is not kept")
        self._last_usage, self._usage = result.usage, self._usage + result.usage
        self.has_answered = result.success
        if self._save_to is not None:
            self._write(self._save_to)

    def _read_again(self) -> None:
        """Read a conversation with which somebody else has gone on; the question is to be asked again."""
        assert self._kept is not None
        self.has_answered = False
        try:
            sync.call(self._kept.reload)
        except StoreError as error:
            self._screen.note(f"not kept, and not read again: {said_by(error)}")
            return
        self._messages = self._kept.messages
        now = counted(len(self._messages), "message")
        self._screen.note(f"not kept: somebody else has gone on with the conversation, which has {now} now; ask again")

    # ---- calls that need approval

    def _decision(self, question: Question, keyboard: Keyboard) -> Approval:
        self._screen.begin_line()
        agent = f"{question.agent_name}: " if question.depth else ""
        # With escapes, not blanks: what is approved is what is shown.
        show(escaped(f"Call {agent}{call_text(question.call.tool_name, question.call.arguments)}?"))
        while True:
            word = keyboard.answer("[y]es / [n]o / [e]dit, or a reason why not: ").strip()
            match word.lower():
                case "":
                    continue
                case "y" | "yes":
                    return Allow()
                case "n" | "no":
                    return Deny()
                case "e" | "edit":
                    edited = self._edited(question.call.arguments, keyboard)
                    if edited is not None:
                        return Allow(edited)
                case _:
                    return Deny(word)

    def _edited(self, arguments: Mapping[str, Any], keyboard: Keyboard) -> Mapping[str, Any] | None:
        """The changed arguments for a call; None if the text holds none."""
        now = json_line(arguments)
        if not keyboard.has_editor:
            show(now)
        edited = keyboard.answer("arguments as JSON: ", now)
        try:
            found = decode(edited)
        except ValueError as error:
            self._screen.note(f"that is not JSON: {error}")
            return None
        if is_mapping(found):
            return found
        self._screen.note('give an object: {"name": value, …}')
        return None

    # ---- commands

    def _save(self, path: str) -> None:
        path = path or self._save_to or ""
        if not path:
            self._screen.note("/save FILE: name the file")
        elif self._write(path):
            self._screen.note(f"saved in {path}: {counted(len(self._messages), 'message')}")

    def _write(self, path: str) -> bool:
        try:
            save_messages(path, self._messages)
        except (OSError, ValueError, RuntimeError) as error:  # the latter: a home that nobody knows
            self._screen.note(f"not saved: {error}")
            is_saved = False
        else:
            is_saved = True
        if path == self._save_to:
            self.is_saved = is_saved
        return is_saved

    def _load(self, path: str) -> None:
        if not path or self._kept is not None:
            self._screen.note("/load FILE: name the file" if self._kept is None else self._stays())
            return
        try:
            self._messages = load_messages(path)
        except (OSError, ValueError, RuntimeError) as error:
            self._screen.note(f"not loaded: {error}")
        else:
            self._screen.note(f"loaded from {path}: {counted(len(self._messages), 'message')}")

    def _begin_anew(self, _: str) -> None:
        if self._kept is not None:
            self._screen.note(self._stays())
            return
        self._messages = []
        self._screen.note("a new conversation")

    def _stays(self) -> str:
        return "this conversation is kept: for another one leave, and name it with --conversation"

    def _show_usage(self, _: str) -> None:
        show(f"last answer: {usage_text(self._last_usage)}\nin all:      {usage_text(self._usage)}")
