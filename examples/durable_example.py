"""A run that outlives its process: it is killed while it pays, goes on in another one, and waits for somebody's word.

python examples/durable_example.py
"""

import asyncio
import os
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

from _offline import Turn, endpoint

from fractal import Allow, BaseAgent, Defer, PendingCall, RunContext, tool
from fractal.durable import SQLiteJournal
from fractal.testing.answers import AnswerLike, call, calls


@tool(idempotent=True)
async def pay(order: int, ctx: RunContext) -> str:
    """Pay an order.

    Args:
        order: Its number.
    """
    print(f"  process pays order {order}")
    if os.environ.get("CRASH") and order == 2:
        await asyncio.sleep(0.5)  # order 1 is paid, and recorded, by then
        os.kill(os.getpid(), signal.SIGKILL)
    return f"paid order {order} with key {ctx.idempotency_key[:6]}"


@tool(requires_approval=True)
async def refund(order: int) -> str:
    """Refund an order.

    Args:
        order: Its number.
    """
    return f"refunded order {order}"


def later(pending: PendingCall) -> Defer:
    """Nobody is here to ask."""
    return Defer()


def clerk() -> BaseAgent:
    """Make the agent; each process makes its own."""
    return BaseAgent("Clerk", "You pay and refund orders.", approve=later).add_tool(pay).add_tool(refund)


async def work(path: str) -> None:
    """Begin the run, or go on with it."""
    journal = SQLiteJournal(path)
    result = await clerk().run("Pay orders 1 and 2, and refund 3.", journal=journal, run_id="orders", timeout=86_400)
    print(f"  {result.stop_reason}: {[f'{each.tool_name} {dict(each.arguments)}' for each in result.pending]}")


async def answer(path: str) -> None:
    """Answer what waits, in yet another process."""
    journal = SQLiteJournal(path)
    result = await clerk().run("Pay orders 1 and 2, and refund 3.", journal=journal, run_id="orders")
    result = await clerk().resume(journal, "orders", {each.call_id: Allow() for each in result.pending})
    print(f"  {result.content}")
    print(f"  {len(await journal.records('orders'))} records")


def model(turn: Turn) -> AnswerLike:
    """Play the model."""
    if not turn.results:
        return calls(call("pay", {"order": 1}), call("pay", {"order": 2}))
    if len(turn.results) == 2:
        return call("refund", {"order": 3})
    return f"All done: {'; '.join(turn.results)}."


def process(name: str, path: Path, **environment: str) -> int:
    """Run a function of this file in a process of its own."""
    command = [sys.executable, __file__, name, str(path)]
    return subprocess.run(command, env={**os.environ, **environment}, check=False).returncode


def main() -> None:
    """Let one process after the other work on the run."""
    with tempfile.TemporaryDirectory() as directory:
        path = Path(directory, "runs.db")
        print("a process is killed in the middle:", flush=True)
        print(f"  ended with {process('work', path, CRASH='1')}", flush=True)
        print("another goes on:", flush=True)
        process("work", path)
        print("a third answers, later:", flush=True)
        process("answer", path)


if __name__ == "__main__":
    if len(sys.argv) == 3:
        asyncio.run({"work": work, "answer": answer}[sys.argv[1]](sys.argv[2]))
    else:
        with endpoint(model):  # which the processes use, too
            main()
