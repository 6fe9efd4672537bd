"""The way through any object with `chat.completions.create`: a test's double, another library's client."""

from __future__ import annotations

import inspect
from contextlib import aclosing, suppress
from typing import TYPE_CHECKING, Any, Self, cast

from pydantic import BaseModel

from fractal._json import is_list, is_mapping
from fractal._threads import ThreadCall
from fractal.errors import BadReply
from fractal.models._faults import translated
from fractal.models._sse import ReplyReader
from fractal.models.base import Reply, show_whole

if TYPE_CHECKING:
    from collections.abc import Callable

    from fractal.models.base import ModelRequest, Sink
    from fractal.models.bounds import ReplyBounds

__all__ = ["ObjectWire", "plain"]

_REQUEST = "a request by a blocking client"


class ObjectWire:
    """Calls `create`, with the request as its keyword arguments.

    Args:
        create: The function.
        bounds: The most that is read of one answer.
    """

    def __init__(self, create: Callable[..., Any], bounds: ReplyBounds) -> None:
        self._create, self._bounds = create, bounds

    async def respond(self, request: ModelRequest) -> Reply:
        """Call `create`: awaited if it is a coroutine function, else from a worker thread."""
        with translated():
            return Reply.from_completion(plain(await self._call(request)), self._bounds)

    async def stream(self, request: ModelRequest, sink: Sink) -> Reply:
        """Call `create`, and read what it returns: chunks, awaited or not, or a whole completion after all."""
        with translated():
            answer = await self._call(request)
            if is_list(_field(answer, "choices")):
                reply = Reply.from_completion(plain(answer), self._bounds)
                await show_whole(reply, sink)
                return reply
            reader = ReplyReader(sink, self._bounds)
            async with aclosing(_chunks_of(answer)) as chunks:
                async for chunk in chunks:
                    await reader.add(_plain_chunk(chunk))
            return reader.reply()

    async def _call(self, request: ModelRequest) -> Any:
        create, parameters = self._create, request.parameters()
        if inspect.iscoroutinefunction(create):
            return await create(**parameters)
        # In a list: a thread must not hand over a bare coroutine on trio.
        call = ThreadCall(lambda: [create(**parameters)], _REQUEST, waiting=request.paused, abandon=True)
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
        [chunk] = await ThreadCall(lambda: [next(self._source, self._end)], _REQUEST, abandon=True).run()
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


def _chunks_of(answer: Any) -> _Chunks:
    """How to read what `create(stream=True)` returned.

    Raises:
        BadReply: It is neither a completion nor a stream of chunks.
    """
    kind: Any = answer.__class__
    for begin in ("__aiter__", "__iter__"):
        if hasattr(kind, begin) and not is_mapping(answer):
            return _Chunks(getattr(answer, begin)())
    raise BadReply(f"create(stream=True) returned {answer!r}, which is neither a completion nor a stream of chunks")


def plain(answer: Any) -> Any:
    """A completion in JSON's own types, from a dict, a pydantic model, or objects with the same attributes."""
    if isinstance(answer, BaseModel):
        return answer.model_dump(mode="json", warnings=False)
    if answer is None:
        return None
    # Read by name, since a mock has every attribute and only those set to plain values count.
    choices = _field(answer, "choices")
    return {
        "choices": [_plain_choice(choice) for choice in cast("list[Any]", choices)]
        if isinstance(choices, (list, tuple))
        else [],
        "usage": _fields(_field(answer, "usage"), "prompt_tokens", "completion_tokens"),
        "error": _field(answer, "error"),
    }


def _plain_chunk(chunk: Any) -> Any:
    if isinstance(chunk, BaseModel):
        return chunk.model_dump(mode="json", warnings=False)
    if is_mapping(chunk):
        return chunk
    return {
        "choices": [_plain_chunk_choice(choice) for choice in _items(_field(chunk, "choices"))],
        "usage": _fields(_field(chunk, "usage"), "prompt_tokens", "completion_tokens"),
    }


def _plain_chunk_choice(choice: Any) -> dict[str, Any]:
    delta = _field(choice, "delta")
    plain_delta = _fields(delta, "content", "refusal", "reasoning_content")
    plain_delta["tool_calls"] = [
        {**_fields(call, "id", "index"), "function": _fields(_field(call, "function"), "name", "arguments")}
        for call in _items(_field(delta, "tool_calls"))
    ]
    return {"delta": plain_delta, **_fields(choice, "finish_reason")}


def _plain_choice(choice: Any) -> dict[str, Any]:
    message = _field(choice, "message")
    plain_message = _fields(message, "content", "refusal")
    calls = _field(message, "tool_calls")
    if isinstance(calls, (list, tuple)):
        plain_message["tool_calls"] = [
            {**_fields(call, "id"), "function": _fields(_field(call, "function"), "name", "arguments")}
            for call in _items(cast("list[Any]", calls))
        ]
    return {"message": plain_message if message is not None else None, **_fields(choice, "finish_reason")}


def _items(value: object) -> list[Any]:
    return list(cast("list[Any]", value)) if isinstance(value, (list, tuple)) else []


def _fields(source: object, *names: str) -> dict[str, Any]:
    return {name: _field(source, name) for name in names}


def _field(source: Any, name: str) -> Any:
    if isinstance(source, BaseModel):
        source = source.model_dump(mode="json", warnings=False)
    return source.get(name) if is_mapping(source) else getattr(source, name, None)
