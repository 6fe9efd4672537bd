"""An agent in Django: plain views on WSGI, views that await on ASGI, where a client that leaves ends its run.

python examples/django_example.py [PORT]
gunicorn --preload --workers 2 --threads 8 --chdir examples django_example:wsgi
uvicorn --app-dir examples django_example:asgi

curl -d '{"question": "bolts"}' http://127.0.0.1:8000/query
curl -d '{"question": "bolts"}' http://127.0.0.1:8000/awaited
curl -N -d '{"question": "bolts"}' http://127.0.0.1:8000/stream
"""

import json
import sys
from collections.abc import AsyncIterator
from typing import Any

import anyio
import uvicorn
from _offline import Turn, endpoint
from django.conf import settings
from django.core.asgi import get_asgi_application
from django.core.wsgi import get_wsgi_application
from django.http import HttpRequest, HttpResponse, JsonResponse, StreamingHttpResponse
from django.urls import path
from django.views.decorators.http import require_POST

from fractal import AgentResult, BaseAgent, Limits, sync, tool
from fractal.testing.answers import AnswerLike, call

SECONDS = 20  # for a run: less than the server's own limit, which kills the worker

if not settings.configured:  # what is a `settings.py` in a project
    settings.configure(ROOT_URLCONF=__name__, SECRET_KEY="for an example", ALLOWED_HOSTS=["127.0.0.1", "localhost"])


class Shop(BaseAgent):
    def __init__(self) -> None:
        super().__init__("Shop", "You sell tools. Look prices up.", limits=Limits(max_requests=10), timeout=SECONDS)

    @tool
    async def price(self, article: str, pieces: int = 1) -> dict[str, Any]:
        """Tell what something costs.

        Args:
            article: Its name.
            pieces: How many.
        """
        await anyio.sleep(0.1)  # a database
        return {"article": article, "euros": 1.5 * len(article) * pieces}


agent = Shop()  # one for all threads, and for all workers that are forked after this


@require_POST
def query(request: HttpRequest) -> HttpResponse:
    """A plain view, on WSGI; on ASGI Django calls it in a thread."""
    return answer(sync.run(agent, question_of(request)))


@require_POST
async def awaited(request: HttpRequest) -> HttpResponse:
    """A view that awaits, on ASGI: Django cancels it when its client has gone."""
    return answer(await agent.run(question_of(request)))


@require_POST
async def stream(request: HttpRequest) -> StreamingHttpResponse:
    """An answer as it is written, on ASGI."""
    return StreamingHttpResponse(frames(question_of(request)), content_type="text/event-stream")


async def frames(question: str) -> AsyncIterator[str]:
    async with agent.stream(question) as events:  # the end of the block, by a client that leaves too, ends the run
        async for text in events.text():
            yield f"event: text\ndata: {json.dumps(text)}\n\n"
        result = await events.result()
    yield f"event: end\ndata: {json.dumps({'run_id': result.run_id, 'error': result.error})}\n\n"


def health(request: HttpRequest) -> HttpResponse:
    return JsonResponse({"status": "ok", "agent": agent.name})


def question_of(request: HttpRequest) -> str:
    return str(json.loads(request.body)["question"])


def answer(result: AgentResult) -> HttpResponse:
    if result.success:
        return JsonResponse({"answer": result.content, "history": result.messages, "run_id": result.run_id})
    failed = {"detail": result.error, "reason": result.stop_reason}
    return JsonResponse(failed, status=504 if result.stop_reason == "deadline" else 502)


urlpatterns = [path(view.__name__, view) for view in (query, awaited, stream, health)]
wsgi, asgi = get_wsgi_application(), get_asgi_application()


def main(port: int = 8000) -> None:
    with endpoint(model):
        uvicorn.run(asgi, host="127.0.0.1", port=port, lifespan="off")


def model(turn: Turn) -> AnswerLike:
    """Play the model: look the price up, then tell it."""
    return f"That is {turn.results[0]}." if turn.results else call("price", {"article": turn.question})


if __name__ == "__main__":
    main(*map(int, sys.argv[1:2]))
