"""The way through any object with `chat.completions.create`: a test's double, another library's client."""

from __future__ import annotations

import inspect
from contextlib import aclosing, suppress
from typing import TYPE_CHECKING, Any, Self, cast

from pydantic import BaseModel

from fractal._concurrency.gates import client_threads
from fractal._concurrency.threads import ThreadCall
from fractal._json import is_list, is_mapping
from fractal.errors import BadReply
from fractal.model import show_whole
from fractal.models._faults import translated
from fractal.models._replies.reading import reply_of
from fractal.models._replies.stream_reader import ReplyReader

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from fractal.model import ModelRequest, Reply, Sink
    from fractal.models.bounds import ReplyBounds

__all__ = ["ObjectWire", "plain"]

_REQUEST = "a request by a blocking client"


class ObjectWire:
    """A wire that calls `create`, with the request as its keyword arguments.

    Args:
        create: The function.
        bounds: The most that is read of one answer.
    """

    def __init__(self, create: Callable[..., Any], bounds: ReplyBounds) -> None:
        self._create, self._bounds = create, bounds

    async def respond(self, request: ModelRequest) -> Reply:
        """Call `create`: awaited if it is a coroutine function, else from a worker thread."""
        with translated():
            return reply_of(plain(await self._call(request)), self._bounds)

    async def stream(self, request: ModelRequest, sink: Sink) -> Reply:
        """Call `create`, and read what it returns: chunks, awaited or not, or a whole completion after all."""
        with translated():
            answer = await self._call(request)
            if _is_completion(answer):
                reply = reply_of(plain(answer), self._bounds)
                await show_whole(reply, sink)
                return reply
            reader = ReplyReader(sink, self._bounds)
            async with aclosing(_chunks_of(answer)) as chunks:
                async for chunk in chunks:
                    await reader.add(plain(chunk))
            return await reader.end()

    async def _call(self, request: ModelRequest) -> Any:
        create, parameters = self._create, request.parameters()
        if request.headers:
            parameters["extra_headers"] = dict(request.headers)
        if inspect.iscoroutinefunction(create):
            return await create(**parameters)
        # In a list: a thread must not hand over a bare coroutine on trio.
        call = ThreadCall(
            lambda: [create(**parameters)], _REQUEST, threads=client_threads, waiting=request.paused, abandon=True
        )
        [answer] = await call.run()
        return await answer if inspect.isawaitable(answer) else answer


class _Chunks:
    """The chunks that a double's `create` hands out, awaited or one by one from a worker thread."""

    def __init__(self, source: Any) -> None:
        self._source = source
        self._end = object()

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> Any:
        if hasattr(self._source, "__anext__"):
            return await self._source.__anext__()
        call = ThreadCall(lambda: [next(self._source, self._end)], _REQUEST, threads=client_threads, abandon=True)
        [chunk] = await call.run()
        if chunk is self._end:
            raise StopAsyncIteration
        return chunk

    async def aclose(self) -> None:
        for name in ("aclose", "close"):
            close = getattr(self._source, name, None)
            if callable(close):
                # A generator that an abandoned thread waits in cannot be closed.
                with suppress(ValueError):
                    closed = close()
                    if inspect.isawaitable(closed):
                        await closed
                return


def _is_completion(answer: Any) -> bool:
    """Whether `create(stream=True)` returned a completion after all."""
    return is_list(answer.get("choices") if is_mapping(answer) else getattr(answer, "choices", None))


def _chunks_of(answer: Any) -> _Chunks:
    """The chunks that `create(stream=True)` returned, whatever form they have.

    Raises:
        BadReply: It is neither a completion nor a stream of chunks.
    """
    kind: Any = answer.__class__
    for begin in ("__aiter__", "__iter__"):
        if hasattr(kind, begin) and not is_mapping(answer):
            return _Chunks(getattr(answer, begin)())
    raise BadReply(f"create(stream=True) returned {answer!r}, which is neither a completion nor a stream of chunks")


_DETAILS = ("prompt_tokens_details", "completion_tokens_details")

_NAMES = {
    "completion": ("id", "model", "choices", "usage", "error"),
    "choice": ("message", "delta", "finish_reason", "index", "error"),
    "message": ("content", "refusal", "reasoning_content", "tool_calls", "function_call"),
    "call": ("id", "index", "function"),
    "function": ("name", "arguments"),
    "usage": ("prompt_tokens", "completion_tokens", "total_tokens", *_DETAILS),
    "details": ("cached_tokens", "cache_write_tokens", "reasoning_tokens"),
}
"""What is read of an object by name, by what it is: a mock has every attribute, and tells of none."""

_INNER = {
    "choices": "choice",
    "message": "message",
    "delta": "message",
    "tool_calls": "call",
    "function": "function",
    "function_call": "function",
    "usage": "usage",
    **dict.fromkeys(_DETAILS, "details"),
}


def plain(answer: Any, what: str = "completion") -> Any:
    """A completion or a chunk in JSON's own types, from a dict, a pydantic model, or objects with the same attributes.

    Args:
        answer: The object.
        what: What it is; a key of the table of names.
    """
    if answer is None or _is_json(answer):
        return answer
    if isinstance(answer, BaseModel):
        return answer.model_dump(mode="json", warnings=False)
    found: dict[str, Any] = {}
    for name in dict.fromkeys((*_NAMES[what], *_own_names(answer))):
        value: Any = answer.get(name) if is_mapping(answer) else getattr(answer, name, None)
        inner = _INNER.get(name)
        if inner is None:
            value = value if _is_json(value) else None
        elif isinstance(value, (list, tuple)):
            value = [plain(each, inner) for each in cast("list[Any]", value)]
        elif name in ("choices", "tool_calls") or _says_nothing(value):
            value = None
        else:
            value = plain(value, inner)
        if value is not None:
            found[name] = value
    return found


def _own_names(source: object) -> Iterable[str]:
    """Names of the fields, or of the attributes that somebody has set."""
    if is_mapping(source):
        return source
    names = getattr(source, "__dict__", ())
    return [name for name in names if not name.startswith("_") and name != "method_calls"]  # the latter is a mock's own


def _says_nothing(value: object) -> bool:
    return value is None or isinstance(value, (str, int, float))


def _is_json(value: object) -> bool:
    if is_mapping(value):
        return all(map(_is_json, value.values()))
    if is_list(value):
        return all(map(_is_json, value))
    return value is None or isinstance(value, (str, int, float))
