"""`fractal worker`: a process that works on durable runs, until it is told to stop.

At SIGTERM and Ctrl-C it takes no more runs, lets those that are under way end for a while, and hands the others back:
another worker goes on with them.
"""

from __future__ import annotations

import argparse
import os
import signal
import socket
import threading
from collections import defaultdict
from collections.abc import Generator, Sequence
from contextlib import contextmanager
from importlib import import_module
from typing import Any

from fractal.cli.door import tell
from fractal.cli.numbers import number
from fractal.cli.which_agent import WrongUse, imported

__all__ = ["WORKER", "add_worker_arguments", "work"]

WORKER = """Work on durable runs: those of queues, and those of this worker that its end has cut off, until SIGTERM or
Ctrl-C. The modules make a DurableAgent for each agent. What is under way then has some seconds to end, and is handed
back to other workers after them."""


def add_worker_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of the command to its parser."""
    parser.add_argument("--agents", metavar="MODULE", required=True, nargs="+", help="modules that make durable agents")
    parser.add_argument("--database", metavar="URL", required=True, help="sqlite:///runs.db or postgresql://…")
    parser.add_argument("--name", dest="app", required=True, help="name of the application, as in all of its processes")
    parser.add_argument(
        "--code", metavar="VERSION", default="1", help="version of the code: a worker takes runs of its own; default: 1"
    )
    parser.add_argument(
        "--id",
        default=socket.gethostname(),
        help="id of this worker, the same after each start; default: the name of the host",
    )
    parser.add_argument("--queue", metavar="NAME", nargs="+", help="queues to take runs of; default: all")
    parser.add_argument(
        "--lease",
        type=_lease,
        default=15.0,
        metavar="S",
        help="seconds without a sign of life after which a worker is dead, and others take its runs; default: 15",
    )
    parser.add_argument("--grace", type=_grace, default=30.0, metavar="S", help="seconds to end in; default: 30")


def _grace(text: str) -> float:
    return number(float, text, "seconds, a number from 0 to 999999", lambda given: 0 <= given < 1e6)


def _lease(text: str) -> float:
    return number(float, text, "seconds, a number from 0.1 to 999999", lambda given: 0.1 <= given < 1e6)


def work(options: argparse.Namespace) -> int:
    """Work on durable runs until a signal says to stop.

    Raises:
        WrongUse: There is no DBOS, no agent, or no database.
    """
    from fractal.durable import DurableAgent
    from fractal.durable.dbos_workers import Heart

    dbos = _dbos()
    made: list[DurableAgent[Any]] = []
    for name in options.agents:
        made += [each for each in vars(imported(name)).values() if isinstance(each, DurableAgent)]
    if not made:
        raise WrongUse(f"there is no DurableAgent in {', '.join(options.agents)}")
    with _stopping() as is_to_stop:
        _launch(dbos, options)
        heart = Heart(options.app, options.code, options.id, options.lease)
        heart.start()
        tell(f"fractal worker {options.id}: works on {', '.join(sorted(each.name for each in made))}")
        while not is_to_stop.wait(1):  # so often it looks, as a signal does not wake it everywhere
            pass
        tell(f"fractal worker {options.id}: takes no more runs")
        dbos.DBOS.destroy(workflow_completion_timeout_sec=round(options.grace))
        heart.stop()
        handed_back = _hand_back(dbos, options)
    tell(f"fractal worker {options.id}: has ended; {handed_back} handed back")
    return 0


def _dbos() -> Any:
    try:
        return import_module("dbos")
    except ImportError:
        raise WrongUse("a worker needs DBOS: pip install 'fractal-anyio[durable]'") from None


def _launch(dbos: Any, options: argparse.Namespace) -> None:
    config: dict[str, Any] = {
        "name": options.app,
        "system_database_url": options.database,
        "application_version": options.code,
        "executor_id": options.id,
        "log_level": "WARNING",
    }
    try:
        dbos.DBOS(config=config)
        if options.queue:
            dbos.DBOS.listen_queues(options.queue)
        dbos.DBOS.launch()
    except Exception as error:
        # The text of some repeats the URL, with its password.
        reason = type(error).__name__ if "@" in options.database else f"{type(error).__name__}: {error}"
        raise WrongUse(f"DBOS cannot begin: {reason}") from None


@contextmanager
def _stopping() -> Generator[threading.Event]:
    """An event that is set by the signals that end a process; a second one ends it at once."""
    event = threading.Event()

    def stop(number: int, frame: object) -> None:
        if event.is_set():
            os._exit(128 + number)
        event.set()

    before = {number: signal.signal(number, stop) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield event
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _hand_back(dbos: Any, options: argparse.Namespace) -> int:
    """Put the runs that are still under way here back into their queues; returns how many there were."""
    from fractal.durable.dbos_workers import forget

    client = dbos.DBOSClient(system_database_url=options.database)
    try:
        left: Sequence[Any] = client.list_workflows(
            status="PENDING", executor_id=options.id, load_input=False, load_output=False
        )
        by_queue: defaultdict[str | None, list[str]] = defaultdict(list)
        for each in left:
            by_queue[each.queue_name].append(each.workflow_id)
        for queue, ids in by_queue.items():
            client.resume_workflows(ids, queue_name=queue)
        forget(client._sys_db, options.app, options.code, options.id)
    finally:
        client.destroy()
    return len(left)
