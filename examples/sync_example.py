"""An agent in code that never awaits: threads, many inputs, a run cancelled from elsewhere, Ctrl-C.

python examples/sync_example.py [SECONDS]

SECONDS is how long the last run waits for a Ctrl-C of yours; 3, if you say nothing.
"""

import json
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor

from _offline import Turn, endpoint

from fractal import RunCancelled, RunContext, sync, tool
from fractal.testing.answers import AnswerLike, call


class Legacy(sync.BaseAgent):
    """The class is the same as `fractal.BaseAgent`, and its verbs block."""

    def __init__(self) -> None:
        super().__init__(name="Stock", system_prompt="You run a warehouse. Use the tools.")

    @tool
    def price(self, article: str) -> float:
        """Tell the price of an article.

        Args:
            article: Its name.
        """
        time.sleep(0.2)  # a database, say
        return len(article) * 1.5

    @tool(on_cancel="wait")
    def count_everything(self, ctx: RunContext) -> str:
        """Count the whole stock, shelf by shelf; takes a minute."""
        shelves = 0
        print("  the scanner is on", flush=True)
        try:
            while shelves < 600:
                ctx.check_cancelled()  # a thread cannot be killed, but it can ask whether its answer is still wanted
                time.sleep(0.1)
                shelves += 1
            return f"{shelves} shelves"
        finally:
            print(f"  cleanup: the scanner is off again, after {shelves} shelves", flush=True)


def threads(agent: Legacy) -> None:
    print("Four threads use one agent:")
    started = time.monotonic()
    with ThreadPoolExecutor(4) as pool:
        for result in pool.map(agent.run, ["bolts", "nuts", "washers", "screws"]):
            print(f"  {result.content}")
    print(f"  together: {time.monotonic() - started:.1f} s")


def many(agent: Legacy) -> None:
    print("Six inputs, three at a time, answered in order; a run that failed would be a result as well:")
    for result in sync.run_many(agent, [f"{size} mm drill" for size in range(1, 7)], max_concurrency=3):
        print(f"  {result.content}" if result.success else f"  failed: {result.error}")


def handle(agent: Legacy) -> None:
    print("A handle can be cancelled from any thread:")
    started = sync.start(agent, "everything")
    threading.Timer(0.5, started.cancel).start()
    try:
        print(f"  {started.result().content}")
    except RunCancelled as error:
        print(f"  {error}: {error.result.stop_reason}, after {error.result.usage.requests} request(s)")


def interrupt(agent: Legacy, seconds: float) -> None:
    print("Ctrl-C ends the run, waits for its cleanup, and is then raised where the run was called.")
    try:
        print(f"  You have {seconds:g} s to try it:", flush=True)
        result = agent.run("everything", timeout=seconds)
        print(f"  nobody interrupted: {result.stop_reason}")
    except KeyboardInterrupt:
        print("  interrupted, and nothing is left running")
        sys.exit(130)


def main(seconds: float = 3) -> None:
    with Legacy() as agent:
        threads(agent)
        many(agent)
        handle(agent)
        interrupt(agent, seconds)


def model(turn: Turn) -> AnswerLike:
    """Play the model: one tool call, then an answer with what it told."""
    if turn.question == "everything":
        return turn.results[0] if turn.results else call("count_everything")
    if not turn.results:
        return call("price", {"article": turn.question})
    return f"{turn.question}: {json.loads(turn.results[0]):.2f} euros"


if __name__ == "__main__":
    with endpoint(model):
        main(*map(float, sys.argv[1:2]))
