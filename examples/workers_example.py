"""Runs that are spread over processes: a batch goes through a queue to two workers, one of which is killed meanwhile.

The other one takes over its runs.

python examples/workers_example.py

It needs the extra `durable`. The runs are kept in a file of SQLite; for many machines give a URL of PostgreSQL.
"""

import asyncio
import os
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

from _offline import Turn, endpoint
from dbos import DBOS

from fractal import BaseAgent, Progress, run_many, tool
from fractal.durable import DurableAgent
from fractal.testing.answers import AnswerLike, call

NAME = "workers-example"


@tool
async def ship(order: str) -> str:
    """Ship an order.

    Args:
        order: Which.
    """
    await asyncio.sleep(0.1)
    return f"{order} is on its way"


agent = BaseAgent("Clerk", "You handle orders.").add_tool(ship)
clerk = DurableAgent(agent, name="shipping-clerk")  # all processes know it by its name


def model(turn: Turn) -> AnswerLike:
    """What the model answers, where there is none."""
    return turn.results[0] if turn.results else call("ship", {"order": turn.question})


class Worker:
    """A process that works on runs: what `fractal worker` is in a shell."""

    def __init__(self, database: str, one: str) -> None:
        words = ["--agents", Path(__file__).stem, "--name", NAME, "--database", database, "--id", one, "--lease", "2"]
        command = [sys.executable, "-m", "fractal", "worker", *words, "--grace", "2"]
        self.process = subprocess.Popen(command, cwd=Path(__file__).parent, stderr=subprocess.DEVNULL)

    def end(self, number: signal.Signals) -> None:
        """Send a signal, and wait for the end."""
        self.process.send_signal(number)
        self.process.wait()


async def main(database: str) -> None:
    """Spread a batch over two workers."""
    DBOS(config={"name": NAME, "system_database_url": database, "application_version": "1", "log_level": "ERROR"})
    DBOS.listen_queues(["none"])  # this process only asks
    await asyncio.to_thread(DBOS.launch)
    await asyncio.to_thread(lambda: DBOS.register_queue("orders", worker_concurrency=2, polling_interval_sec=0.2))
    workers = {one: Worker(database, one) for one in ("first", "second")}

    def kill_one(progress: Progress) -> None:
        if progress.done == 4:
            workers.pop("first").end(signal.SIGKILL)
            print("a worker was killed", flush=True)

    try:
        orders = [f"order {number}" for number in range(12)]
        results = await run_many(clerk, orders, on="orders", max_concurrency=12, progress=kill_one, timeout=60)
        print(f"{sum(result.success for result in results)} of {len(results)} orders were handled")
        print(results[-1].content)
    finally:
        for worker in workers.values():
            worker.end(signal.SIGTERM)
        await asyncio.to_thread(DBOS.destroy)


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as directory, endpoint(model):  # which the workers use, too
        asyncio.run(main(os.environ.get("DATABASE", f"sqlite:///{directory}/runs.db")))
