"""What the examples share: without a key, an endpoint on this machine answers in place of a real one."""

import os
from collections.abc import Callable, Generator
from contextlib import contextmanager
from dataclasses import dataclass

from fractal.testing import Endpoint
from fractal.testing.answers import AnswerLike
from fractal.testing.endpoint import RecordedRequest


@dataclass(frozen=True)
class Turn:
    """What a model is asked: the system prompt, the newest question, and what its tools have answered so far."""

    system: str
    question: str
    results: list[str]


@contextmanager
def endpoint(model: Callable[[Turn], AnswerLike]) -> Generator[None]:
    """Use the endpoint that OPENAI_API_KEY or OPENAI_BASE_URL stand for; if neither is set, have `model` answer."""
    if os.environ.get("OPENAI_API_KEY") or os.environ.get("OPENAI_BASE_URL"):
        yield
        return
    print("(no OPENAI_API_KEY and no OPENAI_BASE_URL: the model's part is played by this program)", flush=True)
    with Endpoint(lambda request: model(_turn(request))) as started:
        os.environ["OPENAI_BASE_URL"] = started.url  # agents look it up at each request
        try:
            yield
        finally:
            del os.environ["OPENAI_BASE_URL"]


def _turn(request: RecordedRequest) -> Turn:
    messages = request.body["messages"]
    newest = max(index for index, message in enumerate(messages) if message["role"] == "user")
    return Turn(
        system="".join(message["content"] for message in messages if message["role"] == "system"),
        question=str(messages[newest]["content"]),
        results=[message["content"] for message in messages[newest:] if message["role"] == "tool"],
    )
