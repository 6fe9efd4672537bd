"""An agent with effects, as a workflow of DBOS, and processes that work on its runs; started by `test_dbos_agent`.

Each effect is a line in the file that `EFFECTS` names: a model that was asked, a tool that has acted. A run asks the
model three times, and makes two times three calls side by side.
"""

from __future__ import annotations

import json
import os
import random
import signal
import sys
import threading
from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

import anyio
from anyio import to_thread

from fractal import BaseAgent, Defer, tool
from fractal.durable import DurableAgent, dbos_journal
from fractal.testing import ScriptedModel, answers


def note(line: str) -> None:
    """Add a line to the effects, at once and as a whole."""
    descriptor = os.open(os.environ["EFFECTS"], os.O_WRONLY | os.O_APPEND | os.O_CREAT)
    os.write(descriptor, f"{line}\n".encode())
    os.close(descriptor)


async def book(order: str, n: int) -> str:
    """Book something."""
    await anyio.sleep(float(os.environ.get("PACE", "0")))
    note(f"{order} booked {n}")
    return f"booked {n}"


def answer(request: Any) -> Any:
    order = next(each["content"] for each in request.messages if each["role"] == "user")
    results = sum(each["role"] == "tool" for each in request.messages)
    note(f"{order} asked {results}")
    if results == 6:
        return f"{order} is done"
    return [answers.call("book", {"order": order, "n": n}, id=f"c{n}") for n in range(results, results + 3)]


def clerk() -> BaseAgent[str]:
    return BaseAgent("Clerk", "You book.", client=ScriptedModel(answer)).add_tool(tool(book))


def refunder() -> BaseAgent[str]:
    """An agent whose calls wait for approval: it books as the clerk does."""
    agent = BaseAgent("Refunder", "You book.", client=ScriptedModel(answer), approve=lambda _: Defer())
    return agent.add_tool(tool(requires_approval=True)(book))


def kill_at(point: int, *, begun: bool = False) -> None:
    """End this process at the k-th moment before or after a record, or before or after a workflow is begun, too."""
    moments = 0

    def pass_by() -> None:
        nonlocal moments
        moments += 1
        if moments == point:
            os.kill(os.getpid(), signal.SIGKILL)

    def killing(function: Any) -> Any:
        async def call(*arguments: Any) -> Any:
            pass_by()
            value = await function(*arguments)
            pass_by()
            return value

        return call

    dbos_journal._OpenInDBOS.record = killing(dbos_journal._OpenInDBOS.record)
    if begun:
        DurableAgent._begun = killing(DurableAgent._begun)


def launch(
    database: str, executor: str = "one", *, takes_runs: bool = True, make: Callable[[], BaseAgent[str]] = clerk
) -> DurableAgent[str]:
    from dbos import DBOS

    config: Any = {
        "name": "fractal-tests",
        "system_database_url": database,
        "application_version": "1",
        "executor_id": executor,
        "log_level": "CRITICAL",
        "notification_listener_polling_interval_sec": 0.05,
    }
    DBOS(config=config)
    durable = DurableAgent(make(), name="clerk")
    if not takes_runs:
        DBOS.listen_queues(["nobody's"])
    DBOS.launch()
    return durable


def in_child(function: Callable[[], object]) -> int:
    """Call a function in a process of its own; returns how that ended."""
    if os.fork() == 0:
        function()
        os._exit(0)
    return os.waitstatus_to_exitcode(os.wait()[1])


def moment_by_moment(
    points: Iterable[int], begin: Callable[[int], object], finish: Callable[[list[str]], object]
) -> None:
    """Begin a run in a process for each point, until one comes to its end, and end all of them in another."""
    orders: list[str] = []
    for point in points:
        orders.append(f"order-{point}")
        if in_child(partial(begin, point)) == 0:
            break
    assert in_child(partial(finish, orders)) == 0


def again_and_again(database: str, backend: str, points: str) -> None:
    """Begin one run in processes that end at each of the points in turn, and let the last one go on to its end."""

    async def ask(durable: DurableAgent[str]) -> None:
        run = await durable.start("order", run_id="order")
        events = [json.loads(event.model_dump_json()) async for event in run.events()]
        sys.stdout.write(json.dumps({"result": events[-1]["result"], "events": events[:-1]}))

    def work(point: int) -> None:
        kill_at(point)
        anyio.run(ask, launch(database), backend=backend)
        sys.stdout.flush()

    for point in (*map(int, filter(None, points.split(","))), 0):
        sys.stderr.write(f"{in_child(partial(work, point))}\n")


def everywhere(database: str, backend: str, first: str, step: str) -> None:
    """Begin runs in processes that end, each a moment later than the one before, and go on with all in one process.

    When a run comes to its end first, that was the last.
    """

    def begin(point: int) -> None:
        kill_at(point)

        async def ask() -> None:
            run = await launch(database, f"dead-{point}").start(f"order-{point}", run_id=f"order-{point}")
            await run.result()

        anyio.run(ask, backend=backend)

    async def go_on(durable: DurableAgent[str], orders: list[str]) -> None:
        from dbos import DBOS

        results: dict[str, Any] = {}

        async def finish(order: str) -> None:
            results[order] = json.loads((await durable.find(order).result()).model_dump_json())

        await to_thread.run_sync(DBOS.resume_workflows, orders)
        async with anyio.create_task_group() as group:
            for order in orders:
                group.start_soon(finish, order)
        sys.stdout.write(json.dumps(results))

    def finish(orders: list[str]) -> None:
        anyio.run(go_on, launch(database, "last"), orders, backend=backend)
        sys.stdout.flush()

    moment_by_moment(range(int(first), 1000, int(step)), begin, finish)


def approved(database: str, backend: str, first: str, step: str) -> None:
    """Approve of what runs wait for in processes that end, each a moment later than the one before, and go on with all.

    When a run comes to its end first, that was the last.
    """

    async def approve_of_all(durable: DurableAgent[str], order: str) -> Any:
        result = await durable.find(order).result()
        while result.pending:
            run = await durable.resume(order, {call.call_id: True for call in result.pending})
            result = await run.result()
        return json.loads(result.model_dump_json())

    def begin(point: int) -> None:
        async def ask() -> None:
            durable, order = launch(database, f"dead-{point}", make=refunder), f"order-{point}"
            await (await durable.start(order, run_id=order)).result()
            kill_at(point, begun=True)
            await approve_of_all(durable, order)

        anyio.run(ask, backend=backend)

    async def go_on(durable: DurableAgent[str], orders: list[str]) -> None:
        from dbos import DBOS

        left = await to_thread.run_sync(partial(DBOS.list_workflows, status="PENDING"))
        await to_thread.run_sync(DBOS.resume_workflows, [each.workflow_id for each in left])
        sys.stdout.write(json.dumps({order: await approve_of_all(durable, order) for order in orders}))

    def finish(orders: list[str]) -> None:
        anyio.run(go_on, launch(database, "last", make=refunder), orders, backend=backend)
        sys.stdout.flush()

    moment_by_moment(range(int(first), 1000, int(step)), begin, finish)


def at_random(database: str, backend: str, seed: str, number: str) -> None:
    """Begin a run in each of so many processes, which are killed at a random moment of it, and let one end them all.

    Each process also goes on with what those before it have left, so a run may be hit more than once.
    """
    moments = random.Random(int(seed))

    async def begin(durable: DurableAgent[str], order: str) -> None:
        await durable.start(order, run_id=order)
        await anyio.sleep_forever()

    def work(order: str, moment: float) -> None:
        def kill() -> None:
            os.kill(os.getpid(), signal.SIGKILL)

        durable = launch(database)
        threading.Timer(moment, kill).start()
        anyio.run(begin, durable, order, backend=backend)

    async def finish(durable: DurableAgent[str], orders: list[str]) -> None:
        results: dict[str, Any] = {}
        for order in orders:
            run = await durable.start(order, run_id=order)  # the first may have been killed before it had begun one
            results[order] = json.loads((await run.result()).model_dump_json())
        sys.stdout.write(json.dumps(results))
        sys.stdout.flush()

    def end(orders: list[str]) -> None:
        anyio.run(finish, launch(database), orders, backend=backend)

    orders = [f"order-{n}" for n in range(int(number))]
    for order in orders:
        moment = moments.uniform(0, 0.4)
        sys.stderr.write(f"{moment:.4f} ")
        sys.stderr.flush()
        assert in_child(partial(work, order, moment)) == -signal.SIGKILL
    assert in_child(partial(end, orders)) == 0


def leave(database: str) -> None:
    """Begin a run, and end the process by the end of its program, without a word to DBOS."""

    async def begin(durable: DurableAgent[str]) -> None:
        run = await durable.start("order", run_id="order")
        while not os.path.exists(os.environ["EFFECTS"]):  # noqa: ASYNC110, ASYNC240 - in a file
            await anyio.sleep(0.01)
        sys.stdout.write(await run.status())

    anyio.run(begin, launch(database))


def fill(database: str, number: str) -> None:
    """Put so many runs into the queue `orders`, and wait for their results."""
    from dbos import DBOS

    durable, results = launch(database, "filler", takes_runs=False), dict[str, Any]()
    DBOS.register_queue("orders", global_concurrency=4, worker_concurrency=3, polling_interval_sec=0.1)

    async def finish(order: str) -> None:
        run = await durable.enqueue("orders", order, run_id=order)
        results[order] = json.loads((await run.result()).model_dump_json())

    async def finish_all() -> None:
        async with anyio.create_task_group() as group:
            for order in range(int(number)):
                group.start_soon(finish, f"order-{order}")

    anyio.run(finish_all)
    sys.stdout.write(json.dumps(results))
    sys.stdout.flush()
    os._exit(0)


if __name__ == "__main__":
    import dbos  # noqa: F401  # once, for all processes that are forked from here

    globals()[sys.argv[1]](*sys.argv[2:])
