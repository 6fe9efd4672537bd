"""The command line: `fractal demo`, `fractal run`, `fractal chat` and `fractal run-many`.

Exit status: 0 success, 1 the run gave no answer, 2 wrong use, 130 interrupted by Ctrl-C.
"""

from __future__ import annotations

import argparse
import importlib
import importlib.metadata
import inspect
import io
import json
import os
import sys
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import anyio
from pydantic import BaseModel

from fractal._json import jsonable
from fractal._scopes import leaves
from fractal.agent import AgentDefinition, BaseAgent
from fractal.errors import FractalError, InvalidArguments
from fractal.models.openai import OpenAIModel

if TYPE_CHECKING:
    from types import ModuleType

    from rich.console import Console

    from fractal._tree import RunTree
    from fractal.results import AgentResult

__all__ = ["main"]

FAILED = 1
WRONG_USE = 2
INTERRUPTED = 130  # 128 + SIGINT, as shells say it


class _WrongUse(Exception):
    """The command line asks for something that cannot be; the text says what there is."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line.

    Args:
        arguments: What follows the command's name. None: what the process was started with.

    Returns:
        The exit status.

    Raises:
        SystemExit: The arguments cannot be read, or ask for help or the version.
    """
    options = _parser().parse_args(arguments)
    for stream in (sys.stdout, sys.stderr):
        # A terminal or pipe that lacks a character is no reason to lose the answer.
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    try:
        command: Callable[[argparse.Namespace], int] = options.command
        return command(options)
    except BrokenPipeError:
        # Whoever read our output has gone; Python would complain again when it flushes at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return FAILED
    except _WrongUse as error:
        return _fail(options, str(error), WRONG_USE)
    except BaseException as error:
        return _failed(options, error)


def _failed(options: argparse.Namespace, error: BaseException) -> int:
    errors = leaves(error)
    # On trio, Ctrl-C may come out of a task group, and with others.
    if any(isinstance(each, KeyboardInterrupt) for each in errors):
        return _fail(options, "interrupted", INTERRUPTED)
    if not all(isinstance(each, Exception) for each in errors):
        raise error
    if getattr(options, "verbose", False):
        traceback.print_exception(error)
    return _fail(options, "; ".join(map(_described, errors)), FAILED)


def _fail(options: argparse.Namespace, message: str, status: int) -> int:
    print(f"fractal {options.name}: {message}", file=sys.stderr)
    return status


def _described(error: BaseException) -> str:
    from fractal._tree import printable

    words = [f"{type(error).__name__}: {error}".removesuffix(": "), *getattr(error, "__notes__", ())]
    return printable("; ".join(words))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="fractal",
        description="LLM agents as structured concurrency.",
        epilog="Exit status: 0 success, 1 no answer, 2 wrong use, 130 interrupted.",
    )
    parser.add_argument("--version", action="version", version=f"fractal {_version()}")
    commands = parser.add_subparsers(title="commands", dest="name", required=True, metavar="COMMAND")
    _add_demo(commands.add_parser("demo", help="watch three agents work side by side", description=_DEMO))
    _add_run(
        commands.add_parser(
            "run",
            help="ask an agent one question",
            description=_RUN,
            epilog="On a terminal the tree of what was done goes to standard error.",
        )
    )
    _add_chat(commands.add_parser("chat", help="talk with an agent", description=_CHAT))
    _add_run_many(commands.add_parser("run-many", help="ask an agent every line of a file", description=_RUN_MANY))
    return parser


_DEMO = """A planner asks two specialists at once, and they call their tools side by side; one tool exceeds its timeout.
Without OPENAI_API_KEY, OPENAI_BASE_URL and --base-url an endpoint in this process plays the models."""

_CHAT = """Talk with an agent in the terminal. Ctrl-C stops an answer, not the program; /help tells what else there is.
Without a terminal each line of standard input is a turn, and only the answers are printed."""

_RUN_MANY = """Ask an agent every line of a file, so many at a time. For each answer a line of JSON with `index`,
`input` and `result` is written as it comes; how far it is goes to standard error."""

_RUN = "Ask an agent one question and print its answer: text as it is, anything else as JSON."


def _add_demo(parser: argparse.ArgumentParser) -> None:
    parser.set_defaults(command=_demo)
    _add_backend(parser)
    parser.add_argument("--base-url", metavar="URL", help="OpenAI-compatible endpoint to talk to")
    parser.add_argument("--model", metavar="NAME", help="model there; default: OPENAI_MODEL, or gpt-4o-mini")
    parser.add_argument("--timeout", type=_seconds, metavar="S", help="seconds the planner has")


def _add_run(parser: argparse.ArgumentParser) -> None:
    parser.set_defaults(command=_run)
    parser.add_argument("question", help="what to ask; - reads it from standard input")
    _add_agent(parser)
    parser.add_argument("--json", action="store_true", help="print the whole result as JSON, a failed one too")
    parser.add_argument(
        "-v", "--verbose", action="store_true", help="show the tree also without a terminal, and tracebacks"
    )


def _add_chat(parser: argparse.ArgumentParser) -> None:
    parser.set_defaults(command=_chat)
    _add_agent(parser)
    parser.add_argument("--continue", dest="conversation", metavar="FILE", help="go on with a conversation saved there")
    parser.add_argument("--save", metavar="FILE", help="save the conversation there after each answer")


def _add_run_many(parser: argparse.ArgumentParser) -> None:
    parser.set_defaults(command=_run_many)
    parser.add_argument("inputs", help="file of inputs, one on each line; - reads standard input")
    _add_agent(parser)
    parser.add_argument("--max-concurrency", type=_count, default=8, metavar="N", help="runs at a time; default: 8")
    parser.add_argument(
        "--on-error", choices=("collect", "fail_fast"), default="collect", help="whether a failed run ends it all"
    )
    parser.add_argument("--jsonl", action="store_true", help="each line is JSON, and not text")
    parser.add_argument("-o", "--output", metavar="FILE", help="write the results there")
    parser.add_argument("-q", "--quiet", action="store_true", help="do not show how far it is")


def _add_agent(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--agent",
        metavar="MODULE:ATTRIBUTE",
        help="agent to ask: an object, or a class or function that makes one without arguments; modules of the current"
        " directory are found. Default: an assistant without tools",
    )
    _add_backend(parser)
    parser.add_argument("--timeout", type=_seconds, metavar="S", help="seconds each run has")
    parser.add_argument("--max-iterations", type=_count, metavar="N", help="turns each run has")
    parser.add_argument("--base-url", metavar="URL", help="endpoint of the default agent; not with --agent")
    parser.add_argument("--model", metavar="NAME", help="model of the default agent; not with --agent")


def _add_backend(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--backend", choices=("asyncio", "trio"), default="asyncio", help="event loop to run on")


def _seconds(text: str) -> float:
    seconds = float(text)
    if not 0 < seconds < float("inf"):
        raise ValueError
    return seconds


def _count(text: str) -> int:
    count = int(text)
    if count < 1:
        raise ValueError
    return count


# argparse names the type in "invalid … value".
_seconds.__name__, _count.__name__ = "seconds", "count"


def _version() -> str:
    try:
        return importlib.metadata.version("fractal")
    except importlib.metadata.PackageNotFoundError:
        return "(not installed)"


def _need_rich() -> None:
    try:
        importlib.import_module("rich")
    except ImportError:
        raise _WrongUse("the command line draws with rich, which is not here: pip install 'fractal[cli]'") from None


def _demo(options: argparse.Namespace) -> int:
    _need_rich()
    from rich.console import Console

    from fractal._demo import run_demo

    result, left = run_demo(
        Console(highlight=False),
        backend=options.backend,
        base_url=options.base_url,
        model=options.model,
        timeout=options.timeout,
    )
    if not result.success:
        return _no_answer(options, result)
    return 0 if left.is_clean else _fail(options, f"the run has ended, and yet: {left}", FAILED)


def _no_answer(options: argparse.Namespace, result: AgentResult) -> int:
    from fractal._tree import printable

    reason, cause = result.error or "", result.exception and result.exception.__cause__
    if isinstance(cause, FractalError):
        reason += f"; before that: {cause}"
    elif cause is not None and getattr(options, "verbose", False):
        traceback.print_exception(cause)
    return _fail(options, printable(f"{result.agent_name} gave no answer ({result.stop_reason}): {reason}"), FAILED)


def _run(options: argparse.Namespace) -> int:
    _need_rich()
    from rich.console import Console

    from fractal._terminal import look_of, result_table
    from fractal._tree import RunTree

    agent = _agent(options)
    question = _question(options.question)
    console, tree = Console(stderr=True, highlight=False), RunTree()
    agent.observers = (*agent.observers, tree)
    result = anyio.run(_ask, agent, question, options, console, tree, backend=options.backend)
    if options.json:
        print(result.model_dump_json(indent=2))
    elif result.success:
        print(_content(result.content))
    sys.stdout.flush()  # before what goes to standard error, where both are one terminal
    if options.verbose or sys.stderr.isatty():
        console.print()
        console.print(result_table(tree, look_of(console), console.width))
    return 0 if result.success else _no_answer(options, result)


def _chat(options: argparse.Namespace) -> int:
    from fractal._chat import chat, load_messages

    agent = _agent(options)
    try:
        messages = load_messages(options.conversation) if options.conversation is not None else []
    except (OSError, ValueError) as error:
        words = (isinstance(error, OSError) and error.strerror) or error
        raise _WrongUse(f"--continue {options.conversation}: {words}") from None
    if options.save is not None and not Path(options.save).expanduser().resolve().parent.is_dir():
        raise _WrongUse(f"--save {options.save}: there is no such directory")
    is_well = chat(agent, backend=options.backend, messages=messages, save=options.save, options=_given(options))
    return 0 if is_well else FAILED


def _run_many(options: argparse.Namespace) -> int:
    from fractal._batch import answer_file

    try:
        progress = answer_file(
            _agent(options),
            options.inputs,
            output=options.output,
            as_json=options.jsonl,
            max_concurrency=options.max_concurrency,
            on_error=options.on_error,
            is_quiet=options.quiet,
            options=_given(options),
            backend=options.backend,
        )
    except InvalidArguments as error:
        raise _WrongUse(str(error)) from None
    if progress.failed:
        return _fail(options, f"{progress.failed} of {progress.done} runs gave no answer", FAILED)
    return 0


def _given(options: argparse.Namespace) -> dict[str, Any]:
    """Only what was said: an agent may have a `run` of its own that knows less."""
    named = {"timeout": options.timeout, "max_iterations": options.max_iterations}
    return {name: value for name, value in named.items() if value is not None}


async def _ask(
    agent: AgentDefinition, question: str, options: argparse.Namespace, console: Console, tree: RunTree
) -> AgentResult:
    from fractal._terminal import watch

    given = _given(options)
    if not isinstance(agent, BaseAgent):  # one whose verbs block
        return await watch(console, tree, lambda: agent.drive(question, **given))
    async with agent:  # it may open something of its own there
        return await watch(console, tree, lambda: agent.run(question, **given))


def _question(given: str) -> str:
    question = sys.stdin.read() if given == "-" else given
    if not question.strip():
        raise _WrongUse("there is no question" + (" on standard input" if given == "-" else ""))
    return question


def _content(content: object) -> str:
    if isinstance(content, str):
        from fractal._tree import printable

        # A file gets what the model wrote; a terminal is not to be steered by it.
        return printable(content) if sys.stdout.isatty() else content
    if isinstance(content, BaseModel):
        return content.model_dump_json(indent=2)
    return json.dumps(jsonable(content), indent=2, ensure_ascii=False)


def _agent(options: argparse.Namespace) -> AgentDefinition:
    if options.agent is None:
        client = OpenAIModel(base_url=options.base_url)
        return BaseAgent("assistant", "You are a helpful assistant.", options.model, client)
    for name in ("model", "base_url"):
        if getattr(options, name) is not None:
            flag = name.replace("_", "-")
            raise _WrongUse(f"--{flag} is for the default agent: what --agent names has its own")
    return _made(options.agent, _found(options.agent))


def _found(path: str) -> object:
    module_name, colon, attribute = path.partition(":")
    if not colon or not module_name or not attribute:
        raise _WrongUse(f"--agent {path}: write module:attribute, as in app.agents:planner")
    module = _imported(module_name)
    found: object = module
    for name in attribute.split("."):
        try:
            found = getattr(found, name)
        except AttributeError:
            raise _WrongUse(f"module {module_name!r} has no {attribute!r}; {_agents_of(module)}") from None
    return found


def _imported(name: str) -> ModuleType:
    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())  # as python -m does
    try:
        return importlib.import_module(name)
    except (Exception, SystemExit) as error:
        missing = error.name if isinstance(error, ModuleNotFoundError) else None
        if missing is not None and f"{name}.".startswith(f"{missing}."):
            raise _WrongUse(f"there is no module {name!r}, neither installed nor in {os.getcwd()}") from None
        place = traceback.extract_tb(error.__traceback__)[-1]
        # A syntax error names its own place.
        where = "" if isinstance(error, SyntaxError) else f" ({place.filename}:{place.lineno})"
        raise _WrongUse(f"module {name!r} cannot be imported: {type(error).__name__}: {error}{where}") from error


def _agents_of(module: ModuleType) -> str:
    names = [name for name, value in vars(module).items() if isinstance(value, AgentDefinition)]
    return f"its agents: {', '.join(names)}" if names else "there is no agent in it"


def _made(path: str, found: object) -> AgentDefinition:
    """The agent that an attribute is, or makes."""
    if isinstance(found, AgentDefinition):
        return found
    if not callable(found) or _is_other_class(found):
        raise _WrongUse(f"{path} is {_kind(found)}, not an agent")
    make: Callable[[], object] = found
    if inspect.iscoroutinefunction(make):
        raise _WrongUse(f"{path} is an async function: give a plain one that returns an agent")
    try:
        inspect.signature(make).bind()
    except TypeError as error:
        raise _WrongUse(f"{path} is {_kind(make)} that cannot be called without arguments: {error}") from None
    agent = make()
    if not isinstance(agent, AgentDefinition):
        raise _WrongUse(f"{path}() is {_kind(agent)}, not an agent")
    return agent


def _is_other_class(found: object) -> bool:
    return isinstance(found, type) and not issubclass(found, AgentDefinition)


def _kind(found: object) -> str:
    if isinstance(found, type):
        return f"the class {found.__name__}"
    if inspect.isroutine(found):
        return "a function"
    return "None" if found is None else f"of type {type(found).__name__}"
