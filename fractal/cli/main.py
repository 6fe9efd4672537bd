"""The command line: `fractal demo`, `run`, `chat`, `run-many`, `serve`, `trace`, `visualize` and `endpoint`.

Exit status: 0 success, 1 the run gave no answer, 2 wrong use, 130 interrupted by Ctrl-C.
"""

from __future__ import annotations

import argparse
import importlib.util
import io
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext, suppress
from typing import TYPE_CHECKING, Any

import anyio
from pydantic import BaseModel

from fractal import sync
from fractal._agent import verbs
from fractal._concurrency.scopes import leaves
from fractal._concurrency.threads import abandoned_threads
from fractal._texts import described, is_a, said_by, str_of
from fractal.agent import BaseAgent
from fractal.cli.door import json_text, reports_shown, say, say_json, tell, tell_traceback
from fractal.cli.files import check_writable
from fractal.cli.parsers import EXPORT, WRONG_USE, read_arguments
from fractal.cli.which_agent import OTHER_ENDPOINTS, WrongUse, agent_at, assistant, checked_url
from fractal.definition import AgentDefinition
from fractal.errors import FractalError, InvalidArguments, MissingCredentials, UserError

if TYPE_CHECKING:
    from fractal.results import AgentResult

__all__ = ["main"]

FAILED = 1
INTERRUPTED = 130  # 128 + SIGINT, as shells say it


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line.

    Args:
        arguments: What follows the command's name. None: what the process was started with.

    Returns:
        The exit status.

    Raises:
        SystemExit: The arguments cannot be read, or ask for help or the version.
    """
    _open_streams()
    options = read_arguments(sys.argv[1:] if arguments is None else arguments)
    for stream in (sys.stdout, sys.stderr):
        # A terminal or pipe that lacks a character is no reason to lose the answer.
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    try:
        with reports_shown():
            return _COMMANDS[options.name](options)
    except BrokenPipeError:
        # Whoever read our output has gone; Python would complain again when it flushes at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return FAILED
    except WrongUse as error:
        return _fail(options, str(error), WRONG_USE)
    except BaseException as error:
        return _failed(options, error)
    finally:
        if options.name in ("run", "run-many"):  # `chat` has told it, and the tools of the demo do nothing
            _tell_what_goes_on(options)


def _open_streams() -> None:
    """Open the streams that a process was started without, as a service may be: they read and write nothing."""
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, mode, encoding="utf-8"))  # noqa: SIM115  # as long as the process


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
    from fractal.cli.trace_follow import RunsLost
    from fractal.cli.trace_views import show_trace

    how = {"is_followed": options.follow, "as_json": options.json, "has_rich": _has_rich()}
    try:
        show_trace(options.trace, options.view, run_id=options.run, **how)
    except RunsLost as error:
        return _fail(options, str(error), FAILED)
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


def _worker(options: argparse.Namespace) -> int:
    from fractal.cli.worker import work

    return work(options)


_COMMANDS: Mapping[str, Callable[[argparse.Namespace], int]] = {
    "demo": _demo,
    "run": _run,
    "chat": _chat,
    "run-many": _run_many,
    "serve": _serve,
    "trace": _trace,
    "view": _trace,
    EXPORT: _trace_export,
    "visualize": _visualize,
    "worker": _worker,
    "endpoint": _endpoint,
}


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
