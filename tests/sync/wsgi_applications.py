"""Applications as gunicorn loads them before it forks its workers: Flask's, Django's and a bare one."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from werkzeug.middleware.dispatcher import DispatcherMiddleware

from fractal import BaseAgent, sync

sys.path.insert(0, str(Path(__file__).parents[2] / "examples"))

import django_example
import flask_example

agent = BaseAgent("Bare", "You answer.", timeout=20)

# The parent has an event loop and an open connection before there is a worker.
assert sync.run(agent, "before the fork").success
assert sync.run(flask_example.agent, "before the fork").success


def bare(environ: dict[str, Any], start_response: Callable[..., object]) -> Iterable[bytes]:
    question = json.loads(environ["wsgi.input"].read(int(environ.get("CONTENT_LENGTH") or 0)) or b'{"question": "?"}')
    result = sync.run(agent, question["question"])
    start_response("200 OK", [("Content-Type", "application/json")])
    return [json.dumps({"answer": result.content}).encode()]


_routes = DispatcherMiddleware(bare, {"/flask": flask_example.app, "/django": django_example.wsgi})


def application(environ: dict[str, Any], start_response: Callable[..., object]) -> Iterable[bytes]:
    """The applications, which say in each answer which worker it is of."""

    def start(status: str, headers: list[tuple[str, str]], *more: Any) -> object:
        return start_response(status, [*headers, ("X-Worker", str(os.getpid()))], *more)

    return _routes(environ, start)
