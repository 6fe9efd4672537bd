"""An agent behind HTTP: one object for all requests, errors as statuses, a client that leaves ends its run.

python examples/fastapi_example.py [PORT]
uvicorn --app-dir examples fastapi_example:app

curl -d '{"question": "bolts"}' -H 'content-type: application/json' http://127.0.0.1:8000/query
curl -N -d '{"question": "bolts"}' -H 'content-type: application/json' http://127.0.0.1:8000/stream
curl -d '{"article": "bolts"}' -H 'content-type: application/json' http://127.0.0.1:8000/tools/price
"""

import json
import sys
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import anyio
import uvicorn
from _offline import Turn, endpoint
from fastapi import FastAPI, HTTPException, Request
from fastapi.responses import JSONResponse, StreamingResponse
from pydantic import BaseModel, Field

from fractal import (
    BaseAgent,
    InvalidMessages,
    LimitReached,
    Limits,
    ModelError,
    RateLimited,
    Refused,
    RequestTimedOut,
    RunError,
    TextDelta,
    ToolResult,
    ToolStarted,
    tool,
)
from fractal.fastapi import ends_with_client
from fractal.testing.answers import AnswerLike, call


class Shop(BaseAgent):
    def __init__(self) -> None:
        super().__init__(
            name="Shop",
            system_prompt="You sell tools. Look prices up.",
            limits=Limits(max_requests=10, tool_timeout=10),
        )

    @tool
    async def price(self, article: str, pieces: int = 1) -> dict[str, Any]:
        """Tell what something costs.

        Args:
            article: Its name.
            pieces: How many.
        """
        await anyio.sleep(0.1)  # a database
        return {"article": article, "euros": 1.5 * len(article) * pieces}


class Question(BaseModel):
    question: str = Field(min_length=1)
    history: list[dict[str, Any]] = Field(default=[], description="`history` of the last answer, to go on with it.")
    timeout: float = Field(default=30, gt=0, le=120, description="Seconds it may take.")


class Answer(BaseModel):
    answer: str
    history: list[dict[str, Any]]
    run_id: str


agent = Shop()  # nothing is opened, and no key is looked for, before the first run


@asynccontextmanager
async def lifespan(app: FastAPI) -> AsyncGenerator[None]:
    with endpoint(model):
        async with agent:  # at shutdown: close its connections
            yield


app = FastAPI(title="Shop", lifespan=lifespan)


@app.post("/query")
async def query(question: Question, request: Request) -> Answer:
    async with ends_with_client(request):
        result = await agent.run(question.question, messages=question.history, timeout=question.timeout)
        result.raise_for_error()
        return Answer(answer=str(result.content), history=result.messages, run_id=result.run_id)


@app.post("/stream")
async def stream(question: Question) -> StreamingResponse:
    """Give the answer while it is written, as server-sent events: `text` and `tool`, at last `end` or `error`."""
    return StreamingResponse(frames(question), media_type="text/event-stream")


async def frames(question: Question) -> AsyncIterator[str]:
    # When the client goes away this generator is closed, wherever it waits, and the end of the block ends the run.
    try:
        async with agent.stream(question.question, messages=question.history, timeout=question.timeout) as events:
            async for event in events:
                match event:
                    case TextDelta(text=text):
                        yield frame("text", text)
                    case ToolStarted(tool_name=name, arguments=arguments):
                        yield frame("tool", {"name": name, "arguments": arguments})
                    case _:
                        pass
    except InvalidMessages as error:
        yield frame("error", {"detail": f"history: {error}", "reason": "history"})
        return
    result = await events.result()
    if result.success:
        yield frame("end", {"history": result.messages, "run_id": result.run_id})
    else:  # the HTTP status has gone out already
        yield frame("error", {"detail": result.error, "reason": result.stop_reason})


def frame(event: str, data: object) -> str:
    """One server-sent event; JSON keeps line ends in the data from ending it."""
    return f"event: {event}\ndata: {json.dumps(data)}\n\n"


@app.post("/tools/{name}")
async def call_tool(name: str, arguments: dict[str, Any], request: Request) -> ToolResult:
    if name not in agent.get_tools():
        raise HTTPException(404, f"there is no tool {name!r}")
    async with ends_with_client(request):
        result = await agent.execute_tool(name, **arguments)
        if result.error is not None:
            bad_arguments = result.outcome == "error" and result.exception is None  # the tool was not called
            status = 504 if result.outcome == "timeout" else 422 if bad_arguments else 500
            raise HTTPException(status, result.error)
        return result


@app.get("/health")
async def health() -> dict[str, Any]:
    return {"status": "ok", "agent": agent.name, "model": agent.model, "tools": sorted(agent.get_tools())}


@app.exception_handler(RunError)
async def run_failed(request: Request, error: RunError) -> JSONResponse:
    """Say with an HTTP status why a run did not succeed."""
    match error:
        case RateLimited():
            status = 429
        case RequestTimedOut():
            status = 504
        case LimitReached():  # time, or the requests and turns that `Limits` allows
            status = 504 if error.stop_reason == "deadline" else 503
        case Refused():
            status = 422
        case ModelError():
            status = 502
        case _:
            status = 500
    wait = getattr(error, "retry_after", None)
    headers = {"Retry-After": f"{wait:.0f}"} if wait is not None else None
    return JSONResponse({"detail": str(error), "reason": error.stop_reason}, status, headers)


@app.exception_handler(InvalidMessages)
async def bad_history(request: Request, error: InvalidMessages) -> JSONResponse:
    return JSONResponse({"detail": f"history: {error}"}, 422)


def main(port: int = 8000) -> None:
    uvicorn.run(app, host="127.0.0.1", port=port)


def model(turn: Turn) -> AnswerLike:
    """Play the model: look the price up, then tell it."""
    return f"That is {turn.results[0]}." if turn.results else call("price", {"article": turn.question})


if __name__ == "__main__":
    main(*map(int, sys.argv[1:2]))
