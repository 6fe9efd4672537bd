"""An application that a real server serves: the same agent by both policies, with its model in a thread."""

from __future__ import annotations

import logging
import os
import time
from collections import Counter, defaultdict
from contextlib import asynccontextmanager
from typing import Any

import anyio
from fastapi import FastAPI

from fractal import BaseAgent, RunFinished, tool
from fractal.events import Event
from fractal.serving import ServedRuns, agent_router, request_id, serving_lifespan
from fractal.testing import Endpoint, answers
from fractal.testing.answers import AnswerLike
from fractal.testing.endpoint import RecordedRequest

logging.basicConfig(level=logging.INFO, format="%(message)s")
GRACE = 1.0
WORDS = " ".join(f"word{number}" for number in range(30))
MUCH = " ".join(["x" * 4000] * 200)


def model(request: RecordedRequest) -> AnswerLike:
    """Play the model: a tool call if the question wants one, then its words."""
    question = request.messages[-1]["content"] if request.messages[-1]["role"] == "user" else ""
    if question.startswith("search"):
        return answers.call("search", {"seconds": float(question.split()[1])})
    if question.startswith("say"):
        return question.removeprefix("say ")
    if question.startswith("much"):
        return MUCH
    return answers.text(WORDS, chunk_delay=0.03)


endpoint = Endpoint(model)
tools = Counter[str]()
times: defaultdict[str, dict[str, float]] = defaultdict(dict)
"""By the id of a request: when its client was seen to have gone, its tool was cancelled, and its run had ended."""


def note(what: str, request: str | None = None) -> None:
    times[request or request_id.get() or ""].setdefault(what, time.monotonic())


def note_end(event: Event) -> None:
    if isinstance(event, RunFinished):  # all tasks of the run have ended, and its connection to the model is closed
        note("ended")


class NoteGoing:
    """A middleware that notes when the server has told that a client is gone."""

    def __init__(self, app: Any) -> None:
        self._app = app

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        names = {name: value.decode() for name, value in scope.get("headers", ())}

        async def received() -> Any:
            message = await receive()
            if message["type"] == "http.disconnect":
                note("gone", names.get(b"x-request-id"))
            return message

        await self._app(scope, received, send)


@tool
async def search(seconds: float) -> str:
    """Search."""
    tools["begun"] += 1
    try:
        await anyio.sleep(seconds)
        tools["finished"] += 1
    except BaseException:
        tools["cancelled"] += 1
        note("cancelled")
        raise
    finally:
        tools["ended"] += 1
    return "found"


agent = BaseAgent("Server", "You answer.", max_retries=0, observers=[note_end]).add_tool(search)
bounds: Any = {"max_concurrency": 300, "max_queue": 300}
cancelling = ServedRuns(agent, on_disconnect="cancel", **bounds)
detaching = ServedRuns(agent, on_disconnect="detach", **bounds)


@asynccontextmanager
async def lifespan(app: FastAPI) -> Any:
    with endpoint:
        os.environ |= {"OPENAI_BASE_URL": endpoint.url, "OPENAI_API_KEY": "sk-test"}
        async with serving_lifespan(agent, grace=GRACE)(app):
            yield


app = FastAPI(lifespan=lifespan)
app.add_middleware(NoteGoing)
app.include_router(agent_router(cancelling, body_timeout=1), prefix="/cancel")
app.include_router(agent_router(detaching, body_timeout=1), prefix="/detach")


@app.get("/seen")
async def what_was_seen() -> dict[str, int]:
    """Tell what tools did, and how many requests the model is answering."""
    return {"begun": 0, "ended": 0, "cancelled": 0, **tools, "in_flight": endpoint.in_flight}


@app.get("/times")
async def when_it_was() -> dict[str, dict[str, float]]:
    """Tell what happened to each request when its client had gone."""
    return times
