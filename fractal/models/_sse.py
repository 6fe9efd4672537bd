"""A streamed chat completion: from bytes to events, from events to the reply."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from pydantic_core import from_json

from fractal._json import clean_text, decode, encode, is_list, is_mapping
from fractal.errors import BadReply, ConnectionFailed, ModelError
from fractal.models._faults import status_error
from fractal.models._secrets import NO_SECRETS, Secrets
from fractal.models.base import Delta, Reply, Sink
from fractal.models.bounds import ReplyBounds

__all__ = ["ReplyReader"]

_DONE = b"[DONE]"
_BLANK = (b"", b"\r")


class ReplyReader:
    """Reads one streamed completion, hands out its pieces, and keeps the whole.

    Args:
        sink: Where the pieces go.
        bounds: The most that is read.
        secrets: What no error may repeat.
    """

    def __init__(self, sink: Sink, bounds: ReplyBounds, secrets: Secrets = NO_SECRETS) -> None:
        self._sink, self._bounds, self._secrets = sink, bounds, secrets
        self._events = _Events()
        self._text = _Pieces()
        self._reasoning = _Pieces()
        self._refusal: list[str] = []
        self._calls: list[_Call] = []
        self._finish_reason: str | None = None
        self._usage: Mapping[str, Any] = {}
        self.is_done = False

    async def read(self, data: bytes) -> None:
        """Take the next bytes of the stream, cut anywhere.

        Raises:
            ModelError: The endpoint reports an error, or writes what is no chunk of a completion.
        """
        for payload in self._events.read(data):
            if payload.startswith(_DONE):
                self.is_done = True
            elif payload and not self.is_done:  # an empty event only keeps the line open
                for piece in self._deltas(self._parsed(payload)):
                    await self._sink(piece)

    async def add(self, chunk: object) -> None:
        """Take the next chunk.

        Raises:
            ModelError: It reports an error, or is no chunk of a completion.
        """
        for piece in self._deltas(chunk):
            await self._sink(piece)

    def can_do_without_the_rest(self, error: Exception) -> bool:
        """Whether the answer is whole, though reading its stream ended with an error.

        After the finish reason all that can be lost is the usage; after the last word, nothing. What the endpoint
        itself reports counts until then.
        """
        return self.is_done or (self._finish_reason is not None and not isinstance(error, ModelError))

    def reply(self) -> Reply:
        """The whole, when the stream has ended.

        Raises:
            ConnectionFailed: It ended before the model had.
        """
        if self._finish_reason is None:
            raise ConnectionFailed("the stream ended before the answer did: there is no finish reason")
        message = {
            "content": self._text.whole(),
            "refusal": "".join(self._refusal) or None,
            "tool_calls": [call.wire_form() for call in self._calls],
        }
        choice = {"message": message, "finish_reason": self._finish_reason}
        return Reply.from_completion({"choices": [choice], "usage": self._usage}, self._bounds)

    def _deltas(self, chunk: object) -> Iterator[Delta]:
        """What a chunk adds, piece by piece. A stream has hundreds of chunks, and nearly all add one piece of text."""
        if not is_mapping(chunk):
            raise BadReply(f"the endpoint streamed {self._quoted(chunk, 200)!r}, which is no chunk of a completion")
        if chunk.get("error") or chunk.get("object") == "error":
            raise self._reported(chunk)
        usage = chunk.get("usage")
        if usage and is_mapping(usage):  # some endpoints send an empty one with every chunk
            self._usage = usage
        choices = chunk.get("choices")
        for choice in choices if is_list(choices) else ():
            # With `n` in the extra fields there are more; a run follows the first.
            if is_mapping(choice) and not choice.get("index"):
                delta = choice.get("delta")
                if delta and is_mapping(delta):
                    yield from self._deltas_of_choice(delta)
                reason = choice.get("finish_reason")
                if isinstance(reason, str) and reason:  # some endpoints send an empty one until the end
                    self._finish_reason = reason

    def _deltas_of_choice(self, delta: Mapping[str, Any]) -> Iterator[Delta]:
        reasoning = _text(delta.get("reasoning_content")) or _text(delta.get("reasoning"))
        if reasoning and (piece := self._reasoning.add(reasoning)):
            yield Delta("reasoning", piece)
        content = delta.get("content")
        text = _text(content)
        if text and (piece := self._text.add(text)):
            yield Delta("text", piece)
        if refusal := _text(delta.get("refusal")) or _joined(content, "refusal"):
            self._refusal.append(refusal)
        calls = delta.get("tool_calls")
        for call in calls if is_list(calls) else ():
            if is_mapping(call) and (new := self._added_to_call(call)):
                yield new

    def _added_to_call(self, delta: Mapping[str, Any]) -> Delta | None:
        function: object = delta.get("function") or delta.get("custom")
        function = function if is_mapping(function) else {}
        name, arguments = function.get("name"), function.get("arguments", function.get("input"))
        name = clean_text(name) if isinstance(name, str) and name else None
        if arguments is not None and not isinstance(arguments, str):  # some endpoints send the object itself
            arguments = encode(arguments).decode()
        index = self._index_of(delta, name, arguments or "")
        call = self._calls[index]
        is_named_now = call.name is None and name is not None
        if is_named_now:
            call.name = name  # once: some endpoints repeat it in every delta
        piece = call.arguments.add(arguments) if arguments is not None else ""
        if not piece and not is_named_now:
            return None
        return Delta("tool_call", piece, index=index, call_id=call.id, tool_name=call.name)

    def _index_of(self, delta: Mapping[str, Any], name: str | None, arguments: str) -> int:
        """Which call a delta continues or begins; the index tells, where an endpoint sends it and means it."""
        place, call_id = delta.get("index"), delta.get("id")
        call_id = call_id if isinstance(call_id, str) and call_id else None
        fitting = [at for at, call in enumerate(self._calls) if place in (None, call.place)]
        same = [at for at in fitting if call_id is not None and self._calls[at].id == call_id]
        for at in (same or fitting)[-1:]:
            call = self._calls[at]
            if not call.is_over(call_id, name, arguments):
                call.id = call.id or call_id
                return at
        self._calls.append(_Call(place, call_id))
        return len(self._calls) - 1

    def _parsed(self, payload: bytes) -> object:
        try:
            return decode(payload)
        except ValueError as error:
            raise BadReply(f"the endpoint streamed {self._quoted(payload, 200)!r}, which is not JSON") from error

    def _reported(self, chunk: Mapping[str, Any]) -> ModelError:
        details: object = chunk.get("error") or chunk
        facts: Mapping[str, Any] = details if is_mapping(details) else {}
        for code in (facts.get("status"), facts.get("code")):
            if isinstance(code, int) and 400 <= code < 600:
                return status_error(code, {}, chunk, self._secrets)
        said, code = facts.get("message") or details, facts.get("code")
        fault = ModelError(f"the endpoint broke off: {self._quoted(said, 1000)}", code=str(code) if code else None)
        fault.retryable = True
        return fault

    def _quoted(self, said: object, longest: int) -> str:
        """What an endpoint wrote, without the key, and only then cut, so that no half of it stays."""
        text = said.decode(errors="replace") if isinstance(said, bytes) else str(said)
        return self._secrets.removed_from(text)[:longest]


class _Events:
    """Server-sent events, cut out of bytes that may be cut anywhere."""

    def __init__(self) -> None:
        self._rest = b""
        self._data: list[bytes] = []

    def read(self, data: bytes) -> list[bytes]:
        """The data of the events that these bytes complete."""
        if data.endswith(b"\n\n") and data.find(b"\n") == len(data) - 2 and not self._rest and not self._data:
            # One line and its end, as most endpoints write their events, one by one.
            return [data[5:].strip()] if data.startswith(b"data:") else []
        *lines, self._rest = (self._rest + data).split(b"\n")
        whole: list[bytes] = []
        for line in lines:
            if line.startswith(b"data:"):
                self._data.append(line[5:].strip())
            elif self._data and line in _BLANK:
                whole.append(b"\n".join(self._data))
                self._data.clear()
        return whole


class _Pieces:
    """Text that comes in pieces; no half of a surrogate pair is handed out."""

    def __init__(self) -> None:
        self._pieces: list[str] = []
        self._half = ""

    def add(self, text: str) -> str:
        """Take a piece; what of it can be shown now."""
        self._pieces.append(text)
        if self._half or not text.isascii():
            text, self._half = self._half + text, ""
            if "\ud800" <= text[-1] <= "\udbff":
                text, self._half = text[:-1], text[-1]
            text = clean_text(text)
        return text

    def whole(self) -> str | None:
        """All of it; None if there was not even an empty piece."""
        return "".join(self._pieces) if self._pieces else None


class _Call:
    __slots__ = ("arguments", "id", "name", "place")

    def __init__(self, place: object, call_id: str | None) -> None:
        self.place, self.id = place, call_id
        self.name: str | None = None
        self.arguments = _Pieces()

    def is_over(self, call_id: str | None, name: str | None, arguments: str) -> bool:
        """Whether a delta belongs to another call.

        Some endpoints number all calls 0 or not at all, some give each delta another id. Only one that names a tool can
        begin a call, and it does if the tool or the id is another one, or if this call's arguments are complete.
        """
        if name is None:
            return False
        is_other = call_id is not None and self.id is not None and call_id != self.id
        return is_other or self.name not in (None, name) or (bool(arguments.strip()) and self._has_all_arguments())

    def wire_form(self) -> dict[str, Any]:
        return {"id": self.id, "function": {"name": self.name, "arguments": self.arguments.whole()}}

    def _has_all_arguments(self) -> bool:
        try:
            return is_mapping(from_json(self.arguments.whole() or ""))
        except ValueError:
            return False


def _text(content: object) -> str:
    """Text, also where an endpoint writes it in parts."""
    if content is None:
        return ""
    return content if isinstance(content, str) else _joined(content, "text")


def _joined(parts: object, kind: str) -> str:
    if not is_list(parts):
        return ""
    pieces = [part.get(kind) for part in parts if is_mapping(part)]
    return "".join(piece for piece in pieces if isinstance(piece, str))
