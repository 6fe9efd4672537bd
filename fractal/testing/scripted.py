"""A model that answers from a script, for tests without an endpoint."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from types import TracebackType
from typing import Self

import anyio

from fractal._concurrency.current import current_run
from fractal._concurrency.scopes import FaultOfTest
from fractal.errors import ConnectionFailed, RunError
from fractal.model import ModelRequest, Reply
from fractal.models._replies.reading import reply_from, reply_of
from fractal.models._replies.reported import status_error
from fractal.models.bounds import DEFAULT_BOUNDS
from fractal.testing._requests import ScriptedRequest
from fractal.testing.answers import Answer, AnswerLike, ToolCallAnswer, as_answer

__all__ = ["ScriptedModel"]


class ScriptedModel:
    """A `Model` that gives prepared answers, in memory; give it to an agent as `client=`.

    It understands the same `answers` as the embedded endpoint, delays and HTTP errors included, and can serve any
    number of runs at once. As a context manager it fails the test when the script was not used up.

    Args:
        script: Answers in the order in which they are asked for: texts, tool calls, `answers.…`, or exceptions to
            raise. Or a function from the request to the answer, which may return such an exception. A fault of the test
            itself makes no result: a function that raises, an answer that is none and a script that is used up are
            raised out of every verb, whatever agent of a tree asks. Only a `RunError` that the function raises counts
            as the model's.

    Attributes:
        requests: What was asked, in order: each has `messages`, `tools` and `body`, and is a dict of the fields itself.

    Example:
        >>> import anyio
        >>> from fractal import BaseAgent
        >>> from fractal.testing import ScriptedModel
        >>> with ScriptedModel(["hello"]) as model:
        ...     anyio.run(BaseAgent("Greeter", "You greet.", client=model).run, "hi").content
        'hello'
    """

    def __init__(
        self,
        script: Sequence[AnswerLike | BaseException] | Callable[[ScriptedRequest], AnswerLike | BaseException],
    ) -> None:
        if isinstance(script, (str, Answer, ToolCallAnswer)):
            raise TypeError("the script is a list of answers, or a function: put a single answer into a list")
        self._function = script if callable(script) else None
        self._left = [] if callable(script) else list(script)
        self._lock = threading.Lock()
        self.requests: list[ScriptedRequest] = []

    async def respond(self, request: ModelRequest) -> Reply:
        """Give the next answer.

        Raises:
            ModelError: The answer is an error, or breaks off.
            AssertionError: The script is used up.
        """
        answer = self._next(request)
        if isinstance(answer, BaseException):
            raise answer
        await anyio.sleep(answer.delay)
        match answer.wire:
            case "hang":
                await anyio.sleep_forever()
            case "nothing" | "cut":
                raise ConnectionFailed("the script breaks off here")
            case "whole":
                pass
        headers = {name.lower(): value for name, value in answer.headers.items()}
        headers.setdefault("content-type", answer.content_type)
        if answer.body is not None:
            return reply_from(answer.status, headers, answer.body, DEFAULT_BOUNDS)
        if answer.status >= 400:
            raise status_error(answer.status, headers, {"error": answer.error or {}})
        return reply_of(answer.completion(request.model))

    @property
    def answers_left(self) -> int:
        """Answers of the script that nobody has asked for yet; 0 for a function."""
        return len(self._left)

    def assert_used_up(self) -> None:
        """Fail if there are answers left.

        Raises:
            AssertionError: There are.
        """
        assert not self._left, f"{len(self._left)} answers of the script were not asked for, the first: {self._left[0]}"

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if error is None:
            self.assert_used_up()

    def _next(self, request: ModelRequest) -> Answer | BaseException:
        try:
            answer = self._asked(ScriptedRequest(request))
            return answer if isinstance(answer, BaseException) else as_answer(answer)
        except RunError:
            raise
        except Exception as fault:
            if current_run.get() is None:
                raise
            raise FaultOfTest(fault) from fault

    def _asked(self, request: ScriptedRequest) -> AnswerLike | BaseException:
        with self._lock:
            self.requests.append(request)
            if self._function is None:
                assert self._left, f"the script is used up; this is request {len(self.requests)}"
                return self._left.pop(0)
        return self._function(request)
