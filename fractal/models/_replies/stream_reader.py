"""A streamed chat completion: from events to pieces, from pieces to the reply."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from pydantic_core import from_json

from fractal._json import encode, is_list, is_mapping
from fractal._texts import clean_text
from fractal.errors import BadReply, ConnectionFailed, ModelError, ReplyTooLarge
from fractal.model import UNSAID, Delta, Reply, Sink, show_whole
from fractal.models._replies.events import ErrorData, EventReader
from fractal.models._replies.merging import Merged
from fractal.models._replies.reading import (
    LONGEST_NAME,
    broken_off,
    decoded,
    function_in,
    reply_to_message,
    text_in,
)
from fractal.models._replies.reported import briefly, reported_error
from fractal.models._replies.usage import AnswerFacts
from fractal.models._secrets import NO_SECRETS, Secrets
from fractal.models.bounds import ReplyBounds
from fractal.reply import says_calls

__all__ = ["ReplyReader"]

_DONE = b"[DONE]"
_READ = frozenset({"role", "content", "refusal", "tool_calls", "function_call", "reasoning_content", "reasoning"})
_READ_OF_CALL = frozenset({"index", "id", "type", "function", "custom"})
_READ_OF_FUNCTION = frozenset({"name", "arguments", "input"})
_MOST_CHOICES = 128


class ReplyReader:
    """Reads one streamed completion, hands out its pieces, and keeps the whole.

    Args:
        sink: Where the pieces go; None keeps the whole alone.
        bounds: The most that is read.
        secrets: What no error may repeat.

    Attributes:
        is_done: Whether the endpoint has said its last word.
    """

    def __init__(self, sink: Sink | None, bounds: ReplyBounds, secrets: Secrets = NO_SECRETS) -> None:
        self._sink, self._bounds, self._secrets = sink, bounds, secrets
        self._events = EventReader(bounds.line)
        self._choices: dict[int, _Choice] = {}  # by index; with `n` in the extra fields there are several
        self._facts = AnswerFacts()
        self.is_done = False

    @property
    def is_finished(self) -> bool:
        """Whether the model has ended: nothing but the usage can follow."""
        return bool(self._choices) and all(choice.finish_reason for choice in self._choices.values())

    async def read(self, data: bytes) -> None:
        """Take the next bytes of the stream, cut anywhere.

        Raises:
            ModelError: The endpoint reports an error, or writes what is no chunk of a completion.
        """
        await self._take(self._events.read(data))

    async def end(self) -> Reply:
        """Take the end of the stream.

        Returns:
            The whole reply.

        Raises:
            ConnectionFailed: The stream ended before the model had.
            ModelError: The endpoint reports an error, or says that it broke off.
        """
        if not self.is_finished:
            await self._take(filter(_is_whole, self._events.end()))
        reply = self._reply()
        if self._sink is not None and 0 not in self._choices:  # only now it is known which choice is the answer
            await show_whole(reply, self._sink)
        return reply

    async def add(self, chunk: object) -> None:
        """Take the next chunk.

        Raises:
            ModelError: It reports an error, or is no chunk of a completion.
        """
        for piece in self._deltas(chunk):
            if self._sink is not None:
                await self._sink(piece)

    def can_do_without_the_rest(self, error: Exception) -> bool:
        """Whether the answer is whole, though reading its stream ended with an error.

        After the finish reason all that can be lost is the usage; after the last word, nothing. What the endpoint
        itself reports counts until then.
        """
        return self.is_done or (self.is_finished and not isinstance(error, ModelError))

    def _reply(self) -> Reply:
        answer = self._choices.get(0) or next(iter(self._choices.values()), None)
        if answer is None or (answer.finish_reason is None and not (self.is_done and answer.says_anything)):
            raise ConnectionFailed("the stream ended before the answer did: there is no finish reason")
        error = reported_error({"error": answer.error}, self._secrets) or broken_off(answer.finish_reason)
        if error is not None:
            raise error
        if len(self._choices) > 1 and not answer.calls and says_calls(answer.finish_reason):
            # Some gateways put a model's text into one choice and its calls into the next.
            answer.calls = next((other.calls for other in self._choices.values() if other.calls), answer.calls)
        return reply_to_message(answer.message(), answer.finish_reason or UNSAID, self._facts, self._bounds)

    async def _take(self, payloads: Iterable[bytes]) -> None:
        for payload in payloads:
            for piece in self._said(payload):
                if self._sink is not None:
                    await self._sink(piece)

    def _said(self, payload: bytes) -> list[Delta]:
        """The deltas of an event."""
        if payload.startswith(_DONE):
            self.is_done = True
        if self.is_done or not payload:  # an empty event only keeps the line open
            return []
        if isinstance(payload, ErrorData):
            raise self._error_of(payload)
        try:
            chunk = decoded(payload, self._bounds)
        except ValueError:
            raise BadReply(f"the endpoint streamed {self._quoted(payload)!r}, which is not JSON") from None
        return self._deltas(chunk)

    def _deltas(self, chunk: object) -> list[Delta]:
        """The deltas of a chunk. A stream has hundreds of chunks, and nearly all add one piece of text."""
        if not is_mapping(chunk):
            error, said = reported_error(chunk, self._secrets), self._quoted(briefly(chunk, self._secrets))
            raise error or BadReply(f"the endpoint streamed {said!r}, which is no chunk of a completion")
        choices = chunk.get("choices")
        if not choices or chunk.get("error"):
            error = reported_error(chunk, self._secrets)
            if error is not None:
                raise error
        if not self._choices:  # nothing was read yet
            self._facts.read_origin(chunk)
        if chunk.get("usage") or "x_groq" in chunk:
            self._facts.read_usage(chunk)
        found: list[Delta] = []
        for raw in choices if is_list(choices) else ():
            if is_mapping(raw):
                found += self._deltas_of_choice(raw)
        return found

    def _deltas_of_choice(self, raw: Mapping[str, Any]) -> list[Delta]:
        index = raw.get("index")
        index = index if isinstance(index, int) else 0
        choice = self._choices.get(index)
        if choice is None:
            if len(self._choices) == _MOST_CHOICES:
                return []
            choice = self._choices[index] = _Choice(self._bounds)
        found: list[Delta] = []
        delta = raw.get("delta")
        if not is_mapping(delta):
            delta = raw.get("message")  # a whole message, where an endpoint streams nothing else
        if delta and is_mapping(delta):
            found = choice.deltas(delta)
        reason = raw.get("finish_reason")
        if isinstance(reason, str) and reason:  # some endpoints send an empty one until the end
            choice.finish_reason = reason
        if raw.get("error"):
            choice.error = raw["error"]
        if usage := raw.get("usage"):
            self._facts.read_usage({"usage": usage})
        return found if index == 0 else []

    def _error_of(self, data: bytes) -> ModelError:
        try:
            said = decoded(data, self._bounds)
        except ValueError:
            said = data.decode(errors="replace")
        error = reported_error(said, self._secrets, is_certain=True)
        return error or BadReply("the endpoint broke off")

    def _quoted(self, said: bytes | str) -> str:
        text = said[:2000].decode(errors="replace") if isinstance(said, bytes) else said
        return self._secrets.quoted(clean_text(text), 200)


class _Choice:
    """One choice of a stream, as far as it has come.

    Attributes:
        finish_reason: The endpoint's word for why it stopped; None until it has said one.
        error: What it reports of a fault.
        calls: Its tool calls.
    """

    def __init__(self, bounds: ReplyBounds) -> None:
        self._bounds = bounds
        self.finish_reason: str | None = None
        self.error: Any = None
        self._text = _Pieces()
        self._parts: Merged | None = None  # the content, where an endpoint writes it in parts
        self._reasoning: dict[str, _Pieces] = {}
        self._refusal: list[str] = []
        self._extra = Merged()
        self.calls: list[_Call] = []
        self._by_index: dict[Any, _Call] = {}  # the last one of each index
        self._by_id: dict[tuple[Any, str], _Call] = {}

    @property
    def says_anything(self) -> bool:
        """Whether the choice has a text or a call."""
        return bool(self._text or self.calls)

    def deltas(self, delta: Mapping[str, Any]) -> list[Delta]:
        """The deltas of a piece of the message."""
        content = delta.get("content")
        if isinstance(content, str) and self._parts is None and len(delta) == 1:  # as nearly all are
            text = self._text.add(content)
            return [Delta("text", text)] if text else []
        found = list(self._reasoning_deltas(delta))
        self._keep_parts(content)
        text = text_in(content, "text")
        if piece := self._text.add(text) if text or isinstance(content, str) else "":
            found.append(Delta("text", piece))
        found += self._other_deltas(delta)
        return found

    def message(self) -> dict[str, Any]:
        """The whole message, as an endpoint that does not stream would have sent it."""
        extra = self._extra.value()
        for name, pieces in self._reasoning.items():
            extra[name] = pieces.whole()
        return {
            "content": self._text.whole() if self._parts is None else self._parts.get("content"),
            "refusal": "".join(self._refusal) or None,
            "tool_calls": [call.wire_form() for call in self.calls],
            **extra,
        }

    def _reasoning_deltas(self, delta: Mapping[str, Any]) -> Iterator[Delta]:
        content, shown = delta.get("content"), False
        for part in content if is_list(content) else ():
            if is_mapping(part) and (thinking := text_in(part.get("thinking"), "text")):
                yield Delta("reasoning", clean_text(thinking))
        # Under the one name or the other; some endpoints send both.
        for name in ("reasoning_content", "reasoning"):
            reasoning = delta.get(name)
            if isinstance(reasoning, str):
                piece = self._reasoning.setdefault(name, _Pieces()).add(reasoning)
                if piece and not shown:
                    shown = True
                    yield Delta("reasoning", piece)
            elif reasoning is not None:
                self._extra.add({name: reasoning})
                if not shown and (piece := text_in(reasoning, "text")):
                    shown = True
                    yield Delta("reasoning", clean_text(piece))

    def _other_deltas(self, delta: Mapping[str, Any]) -> Iterator[Delta]:
        if refusal := text_in(delta.get("refusal"), "refusal") or text_in(_list(delta.get("content")), "refusal"):
            self._refusal.append(refusal)
        if not delta.keys() <= _READ:
            self._extra.add({name: value for name, value in delta.items() if name not in _READ})
        calls = delta.get("tool_calls")
        if not is_list(calls):
            calls = [{"function": delta["function_call"]}] if is_mapping(delta.get("function_call")) else ()
        for raw in calls:
            if is_mapping(raw) and (piece := self._delta_of_call(raw)) is not None:
                yield piece

    def _keep_parts(self, content: object) -> None:
        """Keep the content in parts, once an endpoint has written one."""
        if self._parts is None and is_list(content) and content:
            self._parts = Merged()
            if self._text:
                self._parts.add({"content": [{"type": "text", "text": self._text.whole()}]})
        if self._parts is not None and content:
            parts = content if is_list(content) else [{"type": "text", "text": content}]
            self._parts.add({"content": parts})

    def _delta_of_call(self, raw: Mapping[str, Any]) -> Delta | None:
        function = function_in(raw)
        name, arguments = function.get("name"), function.get("arguments", function.get("input"))
        name = clean_text(name[:LONGEST_NAME]) if isinstance(name, str) and name else None
        if arguments is not None and not isinstance(arguments, str):  # some endpoints send the object itself
            arguments = encode(arguments).decode()
        call = self._call_of(raw, name, arguments or "")
        is_named_now = call.name is None and name is not None
        if is_named_now:
            call.name = name  # once: some endpoints repeat it in every delta
        if not raw.keys() <= _READ_OF_CALL:
            call.extra.add({key: value for key, value in raw.items() if key not in _READ_OF_CALL})
        if not function.keys() <= _READ_OF_FUNCTION:
            call.extra.add({"function": {key: function[key] for key in function if key not in _READ_OF_FUNCTION}})
        piece = call.add(arguments) if arguments is not None else ""
        if call.size > self._bounds.arguments:
            raise ReplyTooLarge("arguments", self._bounds.arguments)
        if not piece and not is_named_now:
            return None
        return Delta("tool_call", piece, index=call.index, call_id=call.id, tool_name=call.name)

    def _call_of(self, raw: Mapping[str, Any], name: str | None, arguments: str) -> _Call:
        """The call that a delta continues or begins; the index tells, where an endpoint sends it and means it."""
        index, call_id = raw.get("index"), raw.get("id")
        index = index if isinstance(index, (int, str)) else None
        call_id = clean_text(call_id) if isinstance(call_id, str) and call_id else None
        call = self._by_id.get((index, call_id)) if call_id is not None else None
        if call is None:
            call = self._by_index.get(index)
        if call is None and name is None and call_id is not None:
            call = self._by_id.get((None, call_id))  # some endpoints number the pieces
        if call is None or call.is_over(call_id, name, arguments):
            if len(self.calls) >= self._bounds.calls:
                raise ReplyTooLarge("calls", self._bounds.calls)
            call = _Call(len(self.calls), call_id)
            self.calls.append(call)
            self._by_index[index] = self._by_index[None] = call
        call.id = call.id or call_id
        if call.id is not None:
            self._by_id[index, call.id] = self._by_id[None, call.id] = call
        return call


class _Pieces:
    """A text that comes in pieces, handed out without splitting surrogate pairs."""

    __slots__ = ("_half", "_pieces")

    def __init__(self) -> None:
        self._pieces: list[str] = []
        self._half = ""

    def __bool__(self) -> bool:
        return any(self._pieces)

    def add(self, text: str) -> str:
        """Take a piece.

        Returns:
            What of the text can be shown now.
        """
        self._pieces.append(text)
        if self._half or not text.isascii():
            text, self._half = self._half + text, ""
            if "\ud800" <= text[-1] <= "\udbff":
                text, self._half = text[:-1], text[-1]
            text = clean_text(text)
        return text

    def whole(self) -> str | None:
        """The whole text; None if there was no piece, not even an empty one."""
        return "".join(self._pieces) if self._pieces else None


class _Call:
    """A tool call, as far as it has come.

    Attributes:
        index: Which of the reply's calls it is, from 0.
        id: Its id, once the endpoint has sent it.
        name: The tool, once the endpoint has named it.
        extra: Further fields.
        size: Characters of its arguments.
    """

    __slots__ = ("_arguments", "_end", "extra", "id", "index", "name", "size")

    def __init__(self, index: int, call_id: str | None) -> None:
        self.index, self.id = index, call_id
        self.name: str | None = None
        self.extra = Merged()
        self.size = 0
        self._arguments = _Pieces()
        self._end = _EndOfObject()

    def add(self, arguments: str) -> str:
        """Take a piece of the arguments; returns the part of them that can be shown now."""
        self.size += len(arguments)
        self._end.add(arguments)
        return self._arguments.add(arguments)

    def is_over(self, call_id: str | None, name: str | None, arguments: str) -> bool:
        """Whether a delta belongs to another call.

        Some endpoints number all calls 0 or not at all, some give each delta another id. Only one that names a tool can
        begin a call, and it does if the tool or the id is another one, or if this call's arguments are complete.
        """
        if name is None:
            return False
        is_other = call_id is not None and self.id is not None and call_id != self.id
        return is_other or self.name not in (None, name) or (bool(arguments.strip()) and self._end.is_reached())

    def wire_form(self) -> dict[str, Any]:
        """The call as an entry of `tool_calls`."""
        extra = self.extra.value()
        function = {"name": self.name, "arguments": self._arguments.whole(), **extra.pop("function", {})}
        return {"id": self.id, "function": function, **extra}


class _EndOfObject:
    """A check whether the JSON object in a growing text is complete; looks at each character once, on demand."""

    __slots__ = ("_depth", "_escaped", "_in_text", "_pieces", "_was_open")

    def __init__(self) -> None:
        self._pieces: list[str] = []
        self._depth, self._was_open = 0, False
        self._in_text = self._escaped = False

    def add(self, text: str) -> None:
        self._pieces.append(text)

    def is_reached(self) -> bool:
        """Whether an object has been opened and closed."""
        for character in "".join(self._pieces):
            if self._in_text:
                self._in_text = self._escaped or character != '"'
                self._escaped = not self._escaped and character == "\\"
            elif character == '"':
                self._in_text = True
            elif character in "{[":
                self._depth, self._was_open = self._depth + 1, True
            elif character in "}]":
                self._depth -= 1
        self._pieces = []
        return self._was_open and self._depth <= 0


def _list(content: object) -> list[Any] | None:
    return content if is_list(content) else None


def _is_whole(data: bytes) -> bool:
    try:
        from_json(data)
    except ValueError:
        return data.startswith(_DONE)
    return True
