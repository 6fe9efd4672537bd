"""An agent in pools of workers: threads, processes that are forked, processes that start anew.

python examples/pools_example.py
"""

import multiprocessing
import os
from collections.abc import Callable, Iterator
from concurrent.futures import Executor, ProcessPoolExecutor, ThreadPoolExecutor
from functools import partial

from _offline import Turn, endpoint

from fractal import BaseAgent, sync, tool
from fractal.testing.answers import AnswerLike, call


@tool
def length(word: str) -> int:
    """Count the letters of a word."""
    return len(word)


agent = BaseAgent("Clerk", "You count letters.", timeout=20).add_tool(length)

WORDS = ["amber", "lichen", "tide", "heath", "estuary", "moss"]


def work(word: str) -> tuple[str, int]:
    """One task of a queue: what a Celery task or a job of RQ would be."""
    result = sync.run(agent, word)  # its timeout is below that of the queue, so that the run ends as a result
    result.raise_for_error()
    return str(result.content), os.getpid()


def pools() -> Iterator[tuple[str, Callable[[], Executor]]]:
    """The pools by name; each is made when it is used."""
    yield "threads", partial(ThreadPoolExecutor, 3)
    for method in multiprocessing.get_all_start_methods():
        if method != "forkserver":  # as spawn
            context = multiprocessing.get_context(method)
            yield f"processes ({method})", partial(ProcessPoolExecutor, 2, mp_context=context)


def main() -> None:
    # Used before the forks: their event loops are their own, and so are their connections.
    print(f"here: {work('dune')[0]}")
    for name, make in pools():
        with make() as pool:
            done = list(pool.map(work, WORDS))
        others = {process for _, process in done} - {os.getpid()}
        print(f"{name}: {', '.join(answer for answer, _ in done)} ({len(others)} other processes)")


def model(turn: Turn) -> AnswerLike:
    """Play the model: count, then tell."""
    return f"{turn.question} {turn.results[0]}" if turn.results else call("length", {"word": turn.question})


if __name__ == "__main__":
    with endpoint(model):
        main()
