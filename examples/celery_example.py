"""An agent in tasks of Celery: in forked workers, tried again after a failure, and ended by a time limit.

python examples/celery_example.py

It needs Celery: pip install celery. The broker is a folder, so that nothing else has to run; in earnest it is a server.
"""

import os
import subprocess
import sys
import tempfile
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path

from _offline import Turn, endpoint
from celery import Celery
from celery.exceptions import SoftTimeLimitExceeded

from fractal import BaseAgent, sync, tool
from fractal.errors import RunError
from fractal.testing.answers import AnswerLike, call, failure, hang

FOLDER = "CELERY_EXAMPLE_FOLDER"


@tool
def length(word: str) -> int:
    """Count the letters of a word."""
    return len(word)


agent = BaseAgent("Clerk", "You count letters.", timeout=20).add_tool(length)


def application(folder: Path) -> Celery:
    """Celery with a folder as its broker, and for the results."""
    app = Celery("celery_example", broker="filesystem://", backend=folder.as_uri())
    places = dict.fromkeys(("data_folder_in", "data_folder_out"), str(folder / "queue"))
    app.conf.broker_transport_options = {**places, "control_folder": str(folder / "control"), "polling_interval": 0.05}
    return app


app = application(Path(os.environ.get(FOLDER, "celery-example")).absolute())


@app.task(name="work", autoretry_for=(RunError,), max_retries=3, default_retry_delay=0)
def work(word: str) -> str:
    """Count. A run that fails is tried again by the queue: it is another run."""
    result = sync.run(agent, word)
    result.raise_for_error()
    return str(result.content)


@app.task(name="hurry", soft_time_limit=1)
def hurry(word: str) -> str:
    """Count, if that takes no time; Celery raises its exception here, after the run has ended."""
    try:
        return str(sync.run(agent, word).content)
    except SoftTimeLimitExceeded:
        return f"{word}: that took too long"


@contextmanager
def worker(folder: Path) -> Generator[None]:
    """A worker of two forked processes: what `celery -A celery_example worker` is in a shell."""
    words = ["--concurrency=2", "--loglevel=error", "--without-gossip", "--without-mingle", "--without-heartbeat"]
    command = [sys.executable, "-m", "celery", "-A", Path(__file__).stem, "worker", *words]
    place, environment = Path(__file__).parent, os.environ | {FOLDER: str(folder)}
    with open(os.devnull, "w") as nothing:
        process = subprocess.Popen(command, cwd=place, env=environment, stdout=nothing, stderr=nothing)
    try:
        yield
    finally:
        process.terminate()
        process.wait()


def main() -> None:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for part in ("queue", "control"):
            (folder / part).mkdir()
        queue = application(folder)
        with worker(folder):
            asked = [queue.send_task("work", [word]) for word in ("amber", "lichen", "flaky")]
            late = queue.send_task("hurry", ["endless"])
            for each in (*asked, late):
                print(each.get(timeout=40, interval=0.05))


_failed = set[str]()


def model(turn: Turn) -> AnswerLike:
    """Play the model: count, then tell; it fails once for one word, and never answers for another."""
    if turn.question == "endless":
        return hang()
    if turn.question == "flaky" and turn.question not in _failed:
        _failed.add(turn.question)
        return failure(400)
    return f"{turn.question} {turn.results[0]}" if turn.results else call("length", {"word": turn.question})


if __name__ == "__main__":
    with endpoint(model):
        main()
