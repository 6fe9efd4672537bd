"""The command line: `fractal demo`, `run`, `chat`, `run-many`, `serve`, `trace`, `visualize` and `endpoint`.

Exit status: 0 success, 1 the run gave no answer, 2 wrong use, 130 interrupted by Ctrl-C.
"""

from __future__ import annotations

import argparse
import importlib.util
import io
import os
import sys
from collections.abc import Callable, Sequence
from contextlib import nullcontext, suppress
from typing import TYPE_CHECKING, Any, NoReturn

import anyio
from pydantic import BaseModel

from fractal import __version__, sync
from fractal._agent import verbs
from fractal._concurrency.scopes import leaves
from fractal._concurrency.threads import abandoned_threads
from fractal._texts import described, is_a, printable, said_by, str_of
from fractal.agent import BaseAgent
from fractal.cli.door import json_text, reports_shown, say, say_json, tell, tell_traceback
from fractal.cli.files import check_writable
from fractal.cli.which_agent import OTHER_ENDPOINTS, WrongUse, agent_at, assistant, checked_url
from fractal.definition import AgentDefinition
from fractal.errors import FractalError, InvalidArguments, MissingCredentials, UserError

if TYPE_CHECKING:
    from fractal.results import AgentResult

__all__ = ["main"]

FAILED = 1
WRONG_USE = 2
INTERRUPTED = 130  # 128 + SIGINT, as shells say it

EXPORT = "trace export"


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line.

    Args:
        arguments: What follows the command's name. None: what the process was started with.

    Returns:
        The exit status.

    Raises:
        SystemExit: The arguments cannot be read, or ask for help or the version.
    """
    parser = _parser()
    given = [*(sys.argv[1:] if arguments is None else arguments)]
    if given[:2] == EXPORT.split():  # for argparse a command is one word
        given[:2] = [EXPORT]
    options = parser.parse_args(given)
    if options.name is None:
        parser.print_help(sys.stderr)
        raise SystemExit(WRONG_USE)
    for stream in (sys.stdout, sys.stderr):
        # A terminal or pipe that lacks a character is no reason to lose the answer.
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    try:
        command: Callable[[argparse.Namespace], int] = options.command
        with reports_shown():
            return command(options)
    except BrokenPipeError:
        # Whoever read our output has gone; Python would complain again when it flushes at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return FAILED
    except WrongUse as error:
        return _fail(options, str(error), WRONG_USE)
    except BaseException as error:
        return _failed(options, error)
    finally:
        if options.command in (_run, _run_many):  # `chat` has told it, and the tools of the demo do nothing
            _tell_what_goes_on(options)


def _tell_what_goes_on(options: argparse.Namespace) -> None:
    """Name the functions that go on because they could not be stopped; the program does not wait for them."""
    for each in abandoned_threads():
        words = f"{each.name} could not be stopped and may still take effect"
        if each.where is not None:
            words += f"; as the program ends it is at {each.where}"
        with suppress(OSError):  # whoever reads may have gone
            tell(f"fractal {options.name}: {words}")


def _failed(options: argparse.Namespace, error: BaseException) -> int:
    errors = leaves(error)
    # On trio, Ctrl-C may come out of a task group, and with others.
    if any(is_a(each, KeyboardInterrupt) for each in errors):
        return _fail(options, "interrupted", INTERRUPTED)
    if is_a(error, SystemExit) and (error.code is None or isinstance(error.code, int)):
        raise error
    if getattr(options, "verbose", False):
        tell_traceback(error)
    status = WRONG_USE if all(is_a(each, UserError) for each in errors) else FAILED
    return _fail(options, "; ".join(map(_text_of, errors)), status)


def _text_of(error: BaseException) -> str:
    if is_a(error, SystemExit):  # its text, which Python would write as it is
        return str_of(error.code)
    try:
        notes = list(getattr(error, "__notes__", ()))
    except Exception:  # of a user's class, whose attributes raise
        notes = []
    return "; ".join([described(error), *map(str_of, notes)])


def _fail(options: argparse.Namespace, message: str, status: int) -> int:
    tell(f"fractal {options.name}: {message}")
    return status


# ---- what there is to say


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        super().error(printable(message))  # which repeats what was given, in whatever characters


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(
        prog="fractal",
        description="LLM agents as structured concurrency.",
        epilog="Exit status: 0 success, 1 no answer, 2 wrong use, 130 interrupted.",
    )
    parser.add_argument("--version", action="version", version=f"fractal {__version__}")
    commands = parser.add_subparsers(title="commands", dest="name", metavar="COMMAND")
    _add_demo(commands.add_parser("demo", help="watch three agents work side by side", description=_DEMO))
    _add_run(
        commands.add_parser(
            "run",
            help="ask an agent one question",
            description=_RUN,
            epilog="On a terminal the tree of what was done goes to standard error, if rich is installed.",
        )
    )
    _add_chat(commands.add_parser("chat", help="talk with an agent", description=_CHAT))
    _add_run_many(commands.add_parser("run-many", help="ask an agent every line of a file", description=_RUN_MANY))
    _add_serve(commands.add_parser("serve", help="serve agents over HTTP, with a chat page", description=_SERVE))
    _add_trace(commands.add_parser("trace", help="show what a trace file tells", description=_TRACE))
    _add_trace(commands.add_parser("view", help="show it, by another name", description=_TRACE))
    _add_export(commands.add_parser(EXPORT, help="write a trace file for other viewers", description=_EXPORT))
    _add_visualize(
        commands.add_parser("visualize", help="write a page that shows a trace in a browser", description=_VISUALIZE)
    )
    _add_worker(commands)
    _add_endpoint(
        commands.add_parser("endpoint", help="serve a stand-in for a model, to try things", description=_ENDPOINT)
    )
    return parser


_DEMO = """A planner asks two specialists at once, and they call their tools side by side; one tool exceeds its timeout.
Without OPENAI_API_KEY, OPENAI_BASE_URL and --base-url an endpoint in this process plays the models."""

_CHAT = """Talk with an agent in the terminal. Ctrl-C stops an answer, not the program; /help tells what else there is.
Without a terminal each line of standard input is a turn, and only the answers are printed."""

_RUN_MANY = """Ask an agent every line of a file, so many at a time. For each answer a line of JSON with `index`,
`input` and `result` is written as it comes; how far it is goes to standard error."""

_RUN = "Ask an agent one question and print its answer: text as it is, anything else as JSON."

_SERVE = """Serve agents until Ctrl-C: a chat page for browsers, /v1 for OpenAI's clients, and /runs for programs. Only
this machine reaches it unless --host says otherwise, and then a token is asked for."""

_TRACE = """Show what a trace file tells: of each of the newest runs who did what, and a bar of time for each part, so
that what ran side by side stands side by side. Of a directory, the list of the runs in its .jsonl files."""

_VIEWS = {
    "flow": "what happened, one event on a line",
    "hierarchy": "who asked whom: the agents alone, with a bar of time for each",
    "compact": "one run on a line: when, how it ended, how long it took, what it used",
    "summary": "the numbers of all of it, however long it is",
    "errors": "the errors, one on a line",
}

_EXPORT = """Write a trace file in the form that other viewers read: otlp, lines of JSON for Jaeger, Grafana and
collectors of OpenTelemetry; perfetto, JSON for ui.perfetto.dev and chrome://tracing."""

_VISUALIZE = """Write one page of HTML that shows a trace in a browser, without a network: who did what, side by side
and nested, what models saw, what it cost and why it ended. Of a directory, the runs of all its .jsonl files."""

_ENDPOINT = """Serve chat completions on this machine until Ctrl-C, or as long as a command runs, which finds the
endpoint in OPENAI_BASE_URL. No model answers: tools that the question names are called, and what they return is the
answer."""


def _add_demo(parser: argparse.ArgumentParser) -> None:
    parser.set_defaults(command=_demo)
    _add_backend(parser)
    parser.add_argument("--base-url", metavar="URL", help="OpenAI-compatible endpoint to talk to")
    parser.add_argument("--model", metavar="NAME", help="model there; default: OPENAI_MODEL, or gpt-4o-mini")
    parser.add_argument("--timeout", type=_seconds, metavar="S", help="seconds the planner has")
    shown = parser.add_mutually_exclusive_group()
    shown.add_argument("--trace", metavar="FILE", help="write a page there that shows the run in a browser")
    shown.add_argument("--serve", action="store_true", help="serve the agents with a chat page instead")
    parser.add_argument("--port", type=_port, default=8000, metavar="N", help="where to serve them; default: 8000")


def _add_serve(parser: argparse.ArgumentParser) -> None:
    parser.set_defaults(command=_serve)
    parser.add_argument(
        "--agent",
        action="append",
        metavar="MODULE:ATTRIBUTE",
        help="agent to serve, as in `fractal run`; may be given several times. Default: an assistant without tools",
    )
    parser.add_argument("--base-url", metavar="URL", help="endpoint of the default agent; not with --agent")
    parser.add_argument("--model", metavar="NAME", help="model of the default agent; not with --agent")
    parser.add_argument("--host", default="127.0.0.1", help="where to listen; default: 127.0.0.1, this machine alone")
    parser.add_argument("--port", type=_port, default=8000, metavar="N", help="default: 8000; 0: a free one")
    parser.add_argument(
        "--on-disconnect",
        choices=("cancel", "detach"),
        default="detach",
        help="whether a run whose client has gone is cancelled or goes on, so that a page finds it again after a"
        " reload; default: detach. OpenAI's clients cannot come back: their runs are always cancelled",
    )
    parser.add_argument("--timeout", type=_seconds, metavar="S", help="seconds each run has; default: 300")
    parser.add_argument("--token", help="what clients have to know; default: FRACTAL_TOKEN")
    parser.add_argument("--no-token", action="store_true", help="let everybody in who reaches the host")
    parser.add_argument("--open", action="store_true", help="open the page in a browser")


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
    begin = parser.add_mutually_exclusive_group()
    begin.add_argument("--continue", dest="continued", metavar="FILE", help="go on with a conversation saved there")
    begin.add_argument("--conversation", metavar="ID", help="go on with the conversation of that id, and keep it")
    parser.add_argument(
        "--store",
        metavar="FILE|URL",
        help="where --conversation is kept: a file, or postgresql://…; default: FRACTAL_CONVERSATIONS, or a file of"
        " yours",
    )
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
    parser.add_argument("-o", "--output", metavar="FILE", help="write the results there; a file that is there stays")
    more = parser.add_mutually_exclusive_group()
    more.add_argument("--append", action="store_true", help="add the results to those in the output file")
    more.add_argument(
        "--resume", action="store_true", help="go on: leave out inputs that have an answer in the output file already"
    )
    parser.add_argument("-q", "--quiet", action="store_true", help="do not show how far it is")


def _add_trace(parser: argparse.ArgumentParser) -> None:
    parser.set_defaults(command=_trace)
    parser.add_argument("trace", metavar="FILE|DIR", help="file of a TracingKit, or a directory: lists its runs")
    what = parser.add_mutually_exclusive_group()
    for view, help_of_it in _VIEWS.items():
        what.add_argument(f"--{view}", dest="view", action="store_const", const=view, help=help_of_it)
    parser.add_argument("--run", default="", metavar="ID", help="only the runs whose ids begin so")
    parser.add_argument("--follow", action="store_true", help="show it while it grows, until its runs have ended")
    parser.add_argument("--json", action="store_true", help="numbers, errors or the list of runs as JSON")


def _add_export(parser: argparse.ArgumentParser) -> None:
    parser.set_defaults(command=_trace_export)
    parser.add_argument("file", help="file of a TracingKit, or of tracing_output_file=")
    parser.add_argument("--format", required=True, choices=("otlp", "perfetto"), help="what to write")
    parser.add_argument("-o", "--output", metavar="FILE", help="write it there; default: to standard output")


def _add_visualize(parser: argparse.ArgumentParser) -> None:
    parser.set_defaults(command=_visualize)
    parser.add_argument("trace", metavar="FILE|DIR", help="file of a TracingKit, or a directory of such")
    parser.add_argument("-o", "--output", metavar="FILE", help="write the page there; default: to standard output")


def _add_worker(commands: Any) -> None:
    from fractal.cli.worker import WORKER, add_worker_arguments, work

    parser = commands.add_parser("worker", help="work on durable runs", description=WORKER)
    parser.set_defaults(command=work)
    add_worker_arguments(parser)


def _add_endpoint(parser: argparse.ArgumentParser) -> None:
    parser.set_defaults(command=_endpoint)
    parser.add_argument("--port", type=_port, default=0, metavar="N", help="where to listen; default: a free one")
    parser.add_argument(
        "words", nargs=argparse.REMAINDER, metavar="COMMAND", help="command to run meanwhile, with its arguments"
    )


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


def _port(text: str) -> int:
    port = int(text)
    if not 0 <= port < 1 << 16:
        raise ValueError
    return port


# argparse names the type in "invalid … value".
_seconds.__name__, _count.__name__, _port.__name__ = "seconds", "count", "port"


# ---- the commands


def _demo(options: argparse.Namespace) -> int:
    if not _has_rich():
        raise WrongUse("the demo draws with rich, which is not here: pip install rich")
    from rich.console import Console

    from fractal.cli.demo import run_demo, serve_demo
    from fractal.cli.visualize import check_output

    checked_url(options.base_url)
    if options.serve:
        serve_demo(base_url=options.base_url, model=options.model, timeout=options.timeout, port=options.port)
        return 0
    if options.trace is not None:
        check_output("--trace", options.trace)
    result, left = run_demo(
        Console(highlight=False),
        backend=options.backend,
        base_url=options.base_url,
        model=options.model,
        timeout=options.timeout,
        trace=options.trace,
    )
    if not result.success:
        return _no_answer(options, result)
    return 0 if left.is_clean else _fail(options, f"the run has ended, and yet: {left}", FAILED)


def _serve(options: argparse.Namespace) -> int:
    from fractal.cli.serve import Address, serve_agents

    paths: list[str | None] = options.agent or [None]
    agents = dict[str, AgentDefinition]()
    for path in paths:
        agent = _agent(argparse.Namespace(agent=path, model=options.model, base_url=options.base_url))
        if agent.name in agents:
            raise WrongUse(f"two agents are called {agent.name!r}: clients could not tell them apart")
        agents[agent.name] = agent
    serve_agents(
        agents,
        Address(host=options.host, port=options.port, token=options.token, is_open=options.no_token),
        on_disconnect=options.on_disconnect,
        timeout=options.timeout,
        opens=options.open,
    )
    return 0


def _run(options: argparse.Namespace) -> int:
    agent = _agent(options)
    question = _question(options.question)
    ask: Callable[[], Any] = lambda: _ask(agent, question, options)  # noqa: E731
    if _has_rich():
        from fractal.cli.run_tree import asked_and_drawn

        result = asked_and_drawn(agent, ask, options.backend, is_wanted=options.verbose, say=lambda r: _say(options, r))
    else:
        result = anyio.run(ask, backend=options.backend)
        _say(options, result)
    return 0 if result.success else _no_answer(options, result)


def _say(options: argparse.Namespace, result: AgentResult) -> None:
    if options.json:
        say_json(result.model_dump_json(indent=2))
    elif result.success:
        _say_content(result.content)


def _say_content(content: object) -> None:
    if isinstance(content, str):
        say(content)
    else:
        say_json(content.model_dump_json(indent=2) if isinstance(content, BaseModel) else json_text(content))


def _no_answer(options: argparse.Namespace, result: AgentResult) -> int:
    reason, cause = result.error or "", result.exception and result.exception.__cause__
    if isinstance(cause, FractalError):
        reason += f"; before that: {said_by(cause)}"
    elif cause is not None and getattr(options, "verbose", False):
        tell_traceback(cause)
    is_wrong_use = isinstance(result.exception, MissingCredentials)
    if is_wrong_use:
        reason += f"; {OTHER_ENDPOINTS}"
    message = f"{result.agent_name} gave no answer ({result.stop_reason}): {reason}"
    return _fail(options, message, WRONG_USE if is_wrong_use else FAILED)


async def _ask(agent: AgentDefinition, question: str, options: argparse.Namespace) -> AgentResult:
    given = _given(options)
    # It may open something of its own.
    async with agent if isinstance(agent, (BaseAgent, sync.BaseAgent)) else nullcontext():
        if isinstance(agent, BaseAgent):
            return await agent.run(question, **given)
        return await verbs.ask(agent, question, **given)  # its verbs block


def _chat(options: argparse.Namespace) -> int:
    from fractal.cli.chat import chat, load_messages
    from fractal.cli.kept import conversation_of

    agent = _agent(options)
    try:
        messages = load_messages(options.continued) if options.continued is not None else []
    except (OSError, ValueError) as error:
        raise WrongUse(f"--continue {options.continued}: {_why(error)}") from None
    if options.store is not None and options.conversation is None:
        raise WrongUse("--store is where a conversation is kept: name it with --conversation")
    if options.save is not None:
        try:
            check_writable(options.save)
        except IsADirectoryError:
            pass  # told when it is to be written
        except OSError as error:
            raise WrongUse(f"--save {options.save}: {_why(error)}") from None
    is_well = chat(
        agent,
        backend=options.backend,
        messages=messages,
        kept=conversation_of(options.conversation, options.store) if options.conversation is not None else None,
        save=options.save,
        options=_given(options),
    )
    return 0 if is_well else FAILED


def _why(error: OSError | ValueError) -> str:
    return (isinstance(error, OSError) and error.strerror) or said_by(error)


def _run_many(options: argparse.Namespace) -> int:
    from fractal.cli.batch import Destination, answer_file

    try:
        is_added = options.append or options.resume
        to = Destination(path=options.output, is_added=is_added, leaves_out=options.resume)
        done = answer_file(
            _agent(options),
            options.inputs,
            to=to,
            as_json=options.jsonl,
            max_concurrency=options.max_concurrency,
            on_error=options.on_error,
            is_quiet=options.quiet,
            options=_given(options),
            backend=options.backend,
        )
    except InvalidArguments as error:
        raise WrongUse(str(error)) from None
    failed = done.progress.failed
    messages = [f"{failed} of {done.progress.done} runs gave no answer", *done.why()] if failed else []
    if done.unreadable:
        raise WrongUse("\n  ".join([done.unreadable, *messages]))
    return _fail(options, "\n  ".join(messages), FAILED) if failed else 0


def _trace(options: argparse.Namespace) -> int:
    from fractal.cli.trace_views import show_trace

    how = {"is_followed": options.follow, "as_json": options.json, "has_rich": _has_rich()}
    show_trace(options.trace, options.view, run_id=options.run, **how)
    return 0


def _trace_export(options: argparse.Namespace) -> int:
    from fractal.cli.trace import export

    export(options.file, options.format, options.output)
    return 0


def _visualize(options: argparse.Namespace) -> int:
    from fractal.cli.visualize import visualize

    visualize(options.trace, options.output)
    return 0


def _endpoint(options: argparse.Namespace) -> int:
    from fractal.cli.stand_in import run_endpoint
    from fractal.testing.endpoint import EndpointError

    words = options.words[1:] if options.words[:1] == ["--"] else options.words
    try:
        return run_endpoint(options.port, words)
    except EndpointError as error:
        raise WrongUse(f"--port {options.port}: {described(error.__cause__ or error)}") from None
    except OSError as error:
        raise WrongUse(f"{words[0]}: {error.strerror or error}") from None


def _has_rich() -> bool:
    return importlib.util.find_spec("rich") is not None


def _given(options: argparse.Namespace) -> dict[str, Any]:
    """The options that were given, without defaults: an agent's own `run` may take fewer."""
    named = {"timeout": options.timeout, "max_iterations": options.max_iterations}
    return {name: value for name, value in named.items() if value is not None}


def _question(given: str) -> str:
    question = sys.stdin.read() if given == "-" else given
    if not question.strip():
        raise WrongUse("there is no question" + (" on standard input" if given == "-" else ""))
    return question


def _agent(options: argparse.Namespace) -> AgentDefinition:
    if options.agent is None:
        return assistant(options.model, options.base_url)
    for name in ("model", "base_url"):
        if getattr(options, name) is not None:
            flag = name.replace("_", "-")
            raise WrongUse(f"--{flag} is for the default agent: what --agent names has its own")
    return agent_at(options.agent)
