"""The parsers of the commands: what each takes, and what its help says."""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Mapping, Sequence
from typing import Any, NoReturn

from fractal import __version__
from fractal._texts import printable
from fractal.cli.numbers import count, port, seconds

__all__ = ["EXPORT", "WRONG_USE", "read_arguments"]

EXPORT = "trace export"
"""What argparse takes for the one word that names the command."""

WRONG_USE = 2
"""The exit status of what cannot be done as it was asked for."""


class _Parser(argparse.ArgumentParser):
    commands: Mapping[str, argparse.ArgumentParser] = {}

    def error(self, message: str) -> NoReturn:
        super().error(printable(message))  # which repeats what was given, in whatever characters


def read_arguments(given: Sequence[str]) -> argparse.Namespace:
    """Read what the command line was given.

    Raises:
        SystemExit: It cannot be read, asks for help or the version, or names no command.
    """
    parser = _make_parser()
    options, others = parser.parse_known_args([EXPORT, *given[2:]] if [*given[:2]] == EXPORT.split() else given)
    if others:  # told by the command itself: argparse would show the usage of no command
        command = parser.commands.get(options.name, parser)
        command.error(f"unrecognized arguments: {' '.join(others)}{_meant(options, given, others)}")
    if options.name is None:
        parser.print_help(sys.stderr)
        raise SystemExit(WRONG_USE)
    return options


_AGENT = re.compile(r"[\w.]+:[\w.]+")


def _meant(options: argparse.Namespace, given: Sequence[str], others: Sequence[str]) -> str:
    """The hint for somebody who wrote more words than a command takes; "" if there is none."""
    if hasattr(options, "agent") and not options.agent:
        for word in given:
            if _AGENT.fullmatch(word):
                return f": an agent is given by name, as in --agent {word}"
    if hasattr(options, "question") and not any(word.startswith("-") for word in others):
        return ": the question is one argument; put it in quotes"
    return ""


def _make_parser() -> _Parser:
    """The parser of the command line; `name` is the command that was given, or None."""
    parser = _Parser(
        prog="fractal",
        description="LLM agents as structured concurrency.",
        epilog="Exit status: 0 success, 1 no answer, 2 wrong use, 130 interrupted.",
    )
    parser.add_argument("--version", action="version", version=f"fractal {__version__}")
    commands = parser.add_subparsers(title="commands", dest="name", metavar="COMMAND")
    parser.commands = commands.choices
    _add_demo(commands.add_parser("demo", help="watch three agents work side by side", description=_DEMO))
    _add_run(
        commands.add_parser(
            "run",
            help="ask an agent one question",
            description=_RUN,
            epilog="On a terminal a tree of the run goes to standard error, if rich is installed.",
        )
    )
    _add_chat(commands.add_parser("chat", help="talk with an agent", description=_CHAT))
    _add_run_many(commands.add_parser("run-many", help="ask an agent every line of a file", description=_RUN_MANY))
    _add_serve(commands.add_parser("serve", help="serve agents over HTTP, with a chat page", description=_SERVE))
    _add_trace(commands.add_parser("trace", help="show a trace file in the terminal", description=_TRACE))
    _add_trace(commands.add_parser("view", help="another name of `trace`", description=_TRACE))
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
Without OPENAI_API_KEY, OPENAI_BASE_URL and --base-url an endpoint inside this process answers for the models."""

_CHAT = """Talk with an agent in the terminal. Ctrl-C stops an answer, not the program; /help lists the commands.
Without a terminal each line of standard input is a turn, and only the answers are printed."""

_RUN_MANY = """Ask an agent every line of a file, so many at a time. For each answer a line of JSON with `index`,
`input` and `result` is written as it comes; progress goes to standard error."""

_RUN = "Ask an agent one question and print its answer: text as it is, anything else as JSON."

_SERVE = """Serve agents until Ctrl-C: a chat page for browsers, /v1 for OpenAI's clients, and /runs for programs. Only
this machine reaches it unless --host says otherwise, and then a token is asked for."""

_TRACE = """Show the newest runs of a trace file as trees: who did what, with a bar of time for each part, so that
parts which ran side by side stand side by side. Of a directory, list the runs in its .jsonl files."""

_VIEWS = {
    "flow": "what happened, one event on a line",
    "hierarchy": "who asked whom: the agents alone, with a bar of time for each",
    "compact": "one run on a line: when, how it ended, how long it took, what it used",
    "summary": "numbers of the whole trace, of any length",
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
    _add_backend(parser)
    parser.add_argument("--base-url", metavar="URL", help="OpenAI-compatible endpoint to talk to")
    parser.add_argument("--model", metavar="NAME", help="model there; default: OPENAI_MODEL, or gpt-4o-mini")
    parser.add_argument("--timeout", type=seconds, metavar="S", help="time limit of the run in seconds")
    shown = parser.add_mutually_exclusive_group()
    shown.add_argument("--trace", metavar="FILE", help="write a page that shows the run in a browser to this file")
    shown.add_argument("--serve", action="store_true", help="serve the agents with a chat page instead")
    parser.add_argument("--port", type=port, default=8000, metavar="N", help="where to serve them; default: 8000")


def _add_serve(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--agent",
        action="append",
        metavar="MODULE:ATTRIBUTE",
        help="agent to serve, as in `fractal run`; may be given several times. Default: an assistant without tools",
    )
    parser.add_argument("--base-url", metavar="URL", help="endpoint of the default agent; not with --agent")
    parser.add_argument("--model", metavar="NAME", help="model of the default agent; not with --agent")
    parser.add_argument("--host", default="127.0.0.1", help="where to listen; default: 127.0.0.1, this machine alone")
    parser.add_argument(
        "--port", type=port, default=8000, metavar="N", help="port to listen on; default: 8000; 0: a free one"
    )
    parser.add_argument(
        "--on-disconnect",
        choices=("cancel", "detach"),
        default="detach",
        help="whether a run whose client has gone is cancelled or goes on, so that a page finds it again after a"
        " reload; default: detach. OpenAI's clients cannot come back: their runs are always cancelled",
    )
    parser.add_argument("--timeout", type=seconds, metavar="S", help="time limit of each run in seconds; default: 300")
    parser.add_argument("--token", help="token that clients have to send; default: FRACTAL_TOKEN")
    parser.add_argument("--no-token", action="store_true", help="let everybody in who reaches the host")
    parser.add_argument("--open", action="store_true", help="open the page in a browser")


def _add_run(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("question", help="what to ask; - reads it from standard input")
    _add_agent(parser)
    parser.add_argument("--json", action="store_true", help="print the whole result as JSON, a failed one too")
    parser.add_argument(
        "-v", "--verbose", action="store_true", help="show the tree without a terminal, too, and tracebacks of errors"
    )


def _add_chat(parser: argparse.ArgumentParser) -> None:
    _add_agent(parser)
    begin = parser.add_mutually_exclusive_group()
    begin.add_argument(
        "--continue", dest="continued", metavar="FILE", help="go on with the conversation saved in this file"
    )
    begin.add_argument(
        "--conversation", metavar="ID", help="go on with the conversation of this id, and keep what is said"
    )
    parser.add_argument(
        "--store",
        metavar="FILE|URL",
        help="where --conversation is kept: a file, or postgresql://…; default: FRACTAL_CONVERSATIONS, or a file in"
        " your home directory",
    )
    parser.add_argument("--save", metavar="FILE", help="save the conversation to this file after each answer")


def _add_run_many(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("inputs", help="file of inputs, one on each line; - reads standard input")
    _add_agent(parser)
    parser.add_argument("--max-concurrency", type=count, default=8, metavar="N", help="runs at a time; default: 8")
    parser.add_argument(
        "--on-error",
        choices=("collect", "fail_fast"),
        default="collect",
        help="after a failed run: go on, or end the batch",
    )
    parser.add_argument("--jsonl", action="store_true", help="each line is JSON, not text")
    parser.add_argument(
        "-o", "--output", metavar="FILE", help="file for the results; one that exists needs --append or --resume"
    )
    more = parser.add_mutually_exclusive_group()
    more.add_argument("--append", action="store_true", help="add the results to those in the output file")
    more.add_argument(
        "--resume", action="store_true", help="go on: leave out inputs that have an answer in the output file already"
    )
    parser.add_argument("-q", "--quiet", action="store_true", help="do not show progress")


def _add_trace(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("trace", metavar="FILE|DIR", help="file of a TracingKit, or a directory: lists its runs")
    what = parser.add_mutually_exclusive_group()
    for view, help_of_it in _VIEWS.items():
        what.add_argument(f"--{view}", dest="view", action="store_const", const=view, help=help_of_it)
    parser.add_argument("--run", default="", metavar="ID", help="show only runs whose ids begin with this")
    parser.add_argument(
        "--follow", action="store_true", help="show the trace while it grows, until its runs have ended"
    )
    parser.add_argument("--json", action="store_true", help="print numbers, errors or the list of runs as JSON")


def _add_export(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("file", help="file of a TracingKit, or of tracing_output_file=")
    parser.add_argument("--format", required=True, choices=("otlp", "perfetto"), help="what to write")
    parser.add_argument("-o", "--output", metavar="FILE", help="file to write; default: standard output")


def _add_visualize(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("trace", metavar="FILE|DIR", help="file of a TracingKit, or a directory of such")
    parser.add_argument("-o", "--output", metavar="FILE", help="file to write; default: standard output")


def _add_worker(commands: Any) -> None:
    from fractal.cli.worker import WORKER, add_worker_arguments

    parser = commands.add_parser("worker", help="work on durable runs", description=WORKER)
    add_worker_arguments(parser)


def _add_endpoint(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--port", type=port, default=0, metavar="N", help="port to listen on; default: a free one")
    parser.add_argument(
        "words",
        nargs=argparse.REMAINDER,
        metavar="COMMAND",
        help="command to run while the endpoint answers, with its arguments",
    )


def _add_agent(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--agent",
        metavar="MODULE:ATTRIBUTE",
        help="agent to ask: an object, or a class or function that makes one without arguments; modules of the current"
        " directory are found. Default: an assistant without tools",
    )
    _add_backend(parser)
    parser.add_argument("--timeout", type=seconds, metavar="S", help="time limit of each run in seconds")
    parser.add_argument("--max-iterations", type=count, metavar="N", help="most turns of each run")
    parser.add_argument("--base-url", metavar="URL", help="endpoint of the default agent; not with --agent")
    parser.add_argument("--model", metavar="NAME", help="model of the default agent; not with --agent")


def _add_backend(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--backend", choices=("asyncio", "trio"), default="asyncio", help="event loop to run on")
