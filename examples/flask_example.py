"""An agent in Flask: views that never await, answers as they are written, a client that leaves a stream ends its run.

python examples/flask_example.py [PORT]
gunicorn --preload --workers 2 --threads 8 --chdir examples flask_example:app

curl -d '{"question": "bolts"}' -H 'content-type: application/json' http://127.0.0.1:8000/query
curl -N -d '{"question": "bolts"}' -H 'content-type: application/json' http://127.0.0.1:8000/stream
"""

import json
import sys
import time
from collections.abc import Iterator
from typing import Any

from _offline import Turn, endpoint
from flask import Flask, Response, request

from fractal import BaseAgent, Limits, RunError, sync, tool
from fractal.testing.answers import AnswerLike, call

SECONDS = 20  # for a run: less than the server's own limit, which kills the worker


class Shop(BaseAgent):
    def __init__(self) -> None:
        super().__init__("Shop", "You sell tools. Look prices up.", limits=Limits(max_requests=10), timeout=SECONDS)

    @tool
    def price(self, article: str, pieces: int = 1) -> dict[str, Any]:
        """Tell what something costs.

        Args:
            article: Its name.
            pieces: How many.
        """
        time.sleep(0.1)  # a database
        return {"article": article, "euros": 1.5 * len(article) * pieces}


agent = Shop()  # one for all threads, and for all workers that are forked after this
app = Flask(__name__)


@app.post("/query")
def query() -> dict[str, Any]:
    result = sync.run(agent, request.json["question"], messages=request.json.get("history"))
    result.raise_for_error()
    return {"answer": result.content, "history": result.messages, "run_id": result.run_id}


@app.post("/stream")
def stream() -> Response:
    return Response(frames(request.json["question"]), mimetype="text/event-stream")


def frames(question: str) -> Iterator[str]:
    # When the client has gone, the server closes this generator at its next piece: the block ends, and with it the run.
    with sync.stream(agent, question) as events:
        for text in events.text():
            yield f"event: text\ndata: {json.dumps(text)}\n\n"
        result = events.result()
    end = {"run_id": result.run_id, "error": result.error}
    yield f"event: end\ndata: {json.dumps(end)}\n\n"


@app.get("/health")
def health() -> dict[str, Any]:
    return {"status": "ok", "agent": agent.name}


@app.errorhandler(RunError)
def run_failed(error: RunError) -> tuple[dict[str, Any], int]:
    return {"detail": str(error), "reason": error.stop_reason}, 504 if error.stop_reason == "deadline" else 502


def main(port: int = 8000) -> None:
    with endpoint(model):
        app.run(port=port)  # for development: a thread for each request


def model(turn: Turn) -> AnswerLike:
    """Play the model: look the price up, then tell it."""
    return f"That is {turn.results[0]}." if turn.results else call("price", {"article": turn.question})


if __name__ == "__main__":
    main(*map(int, sys.argv[1:2]))
