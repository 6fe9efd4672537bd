"""What the loop asks of a model: one question, one reply."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol, TypeVar, cast, runtime_checkable
from uuid import uuid4

from fractal._json import clean_text, encode, is_list
from fractal.errors import BadReply, InvalidArguments, ReplyTooLarge
from fractal.messages import Message, Transcript
from fractal.models.bounds import DEFAULT_BOUNDS, ReplyBounds

__all__ = [
    "Delta",
    "Model",
    "ModelRequest",
    "ModelSettings",
    "Reply",
    "RequestControl",
    "Sink",
    "StreamingModel",
    "ToolCall",
    "ToolSchemas",
    "show_whole",
    "stream_or_respond",
]


_Item = TypeVar("_Item")


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelSettings:
    """Fields of every request of an agent; None leaves a field out, so that the endpoint's default holds.

    Args:
        temperature: Sampling temperature.
        max_tokens: Tokens the reply may have.
        reasoning_effort: How long a reasoning model thinks, such as `"low"`.
        extra: Further fields of the request, such as `{"top_p": 0.5}`.

    Raises:
        InvalidArguments: `extra` has a field that the agent fills itself.
    """

    temperature: float | None = None
    max_tokens: int | None = None
    reasoning_effort: str | None = None
    extra: Mapping[str, Any] = field(default_factory=dict[str, Any])

    def __post_init__(self) -> None:
        reserved = {"model", "messages", "tools", "stream"} & set(self.extra)
        if reserved:
            raise InvalidArguments(f"extra fields {sorted(reserved)}: these fields of a request are the agent's own")

    def fields(self) -> dict[str, Any]:
        """The request's fields."""
        named = {
            "temperature": self.temperature,
            "max_tokens": self.max_tokens,
            "reasoning_effort": self.reasoning_effort,
        }
        return {name: value for name, value in named.items() if value is not None} | dict(self.extra)


class ToolSchemas:
    """The tools on offer, as chat-completions schemas, encoded once.

    Args:
        schemas: One `{"type": "function", "function": {…}}` for each tool.
    """

    __slots__ = ("_encoded", "schemas")

    def __init__(self, schemas: Sequence[dict[str, Any]] = ()) -> None:
        self.schemas = list(schemas)
        self._encoded: bytes | None = None

    def encoded(self) -> bytes:
        """The schemas as a JSON array."""
        if self._encoded is None:
            self._encoded = encode(self.schemas)
        return self._encoded

    def plus(self, other: ToolSchemas) -> ToolSchemas:
        """These tools and the other ones; what is encoded already is not encoded again."""
        both = ToolSchemas([*self.schemas, *other.schemas])
        if self.schemas and other.schemas:
            both._encoded = self.encoded()[:-1] + b"," + other.encoded()[1:]
        return both


class RequestControl(Protocol):
    """The run's side of a request: what a model that does more than ask once has to tell it."""

    def charge(self) -> None:
        """Spend one more request."""
        ...

    def paused(self, waiting_for: str) -> AbstractContextManager[None]:
        """Stop the clock of the request's own time, and know what is waited for if the run's is over meanwhile."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelRequest:
    """One question to a model.

    Args:
        model: Name of the model at the endpoint.
        system: The system prompt, or None.
        transcript: The conversation so far.
        kept: Positions of the transcript's messages that are sent, when it is too long to send all. None: all.
        summary: Stands for the messages that are not sent, before those that are; or None.
        tools: Tools on offer, or None for none.
        settings: Sampling settings and further fields.
        fields: Fields of this request alone, such as `response_format`.
        instruction: A last word to the model for this request alone; not part of the transcript.
        control: The run's side of it, or None outside a run.
    """

    model: str
    system: str | None
    transcript: Transcript
    kept: Sequence[int] | None = None
    summary: Message | None = None
    tools: ToolSchemas | None = None
    settings: ModelSettings = field(default_factory=ModelSettings)
    fields: Mapping[str, Any] = field(default_factory=dict[str, Any])
    instruction: str | None = None
    control: RequestControl | None = field(default=None, repr=False, compare=False)

    def charge(self) -> None:
        """Count one more request; a model that sends several for one question calls it before each but the first.

        Raises:
            BudgetExceeded: The run's budget has no request left; nothing may be sent.
        """
        if self.control is not None:
            self.control.charge()

    def paused(self, waiting_for: str) -> AbstractContextManager[None]:
        """A block that does not count as time of the request, such as waiting in a queue of our own.

        `Limits.request_timeout` stands still meanwhile; the run's deadline does not.

        Args:
            waiting_for: What is waited for, for the error of a run whose deadline passes meanwhile.
        """
        return self.control.paused(waiting_for) if self.control is not None else nullcontext()

    @property
    def message_count(self) -> int:
        """Messages of the conversation that are sent, with the one that stands for others."""
        kept = len(self.transcript) if self.kept is None else len(self.kept)
        return kept + (self.summary is not None)

    def parameters(self) -> dict[str, Any]:
        """The request as the keyword arguments of `chat.completions.create`."""
        messages = [*self._before(), *self._selected(self.transcript.messages), *self._after()]
        parameters = {"model": self.model, "messages": messages, **self.settings.fields(), **self.fields}
        if self.tools is not None and self.tools.schemas:
            parameters["tools"] = self.tools.schemas
        return parameters

    def body(self) -> bytes:
        """The request as JSON: joined from the messages' encoded forms, not walked anew."""
        fragments = self._selected(self.transcript.encoded())
        messages = b",".join([*map(encode, self._before()), *fragments, *map(encode, self._after())])
        head = encode({"model": self.model, **self.settings.fields(), **self.fields})[:-1]
        tools = b',"tools":' + self.tools.encoded() if self.tools is not None and self.tools.schemas else b""
        return b"".join((head, b',"messages":[', messages, b"]", tools, b"}"))

    def _selected(self, whole: Sequence[_Item]) -> Sequence[_Item]:
        return whole if self.kept is None else [whole[position] for position in self.kept]

    def _before(self) -> list[Message]:
        system: list[Message] = [{"role": "system", "content": self.system}] if self.system else []
        return [*system, self.summary] if self.summary is not None else system

    def _after(self) -> list[Message]:
        return [{"role": "system", "content": self.instruction}] if self.instruction else []


@dataclass(frozen=True, slots=True)
class ToolCall:
    """One tool call of a reply.

    Args:
        id: Its id, unique within the reply.
        name: The tool's name.
        arguments: The arguments as the model wrote them: JSON, if it did well.
    """

    id: str
    name: str
    arguments: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Reply:
    """What a model answered.

    Attributes:
        text: The text, or None.
        tool_calls: The calls it asks for, in order.
        refusal: Why it declines, or None.
        finish_reason: The endpoint's word for why it stopped, or None.
        input_tokens: Prompt tokens, 0 if not told.
        output_tokens: Completion tokens, 0 if not told.
    """

    text: str | None = None
    tool_calls: tuple[ToolCall, ...] = ()
    refusal: str | None = None
    finish_reason: str | None = None
    input_tokens: int = 0
    output_tokens: int = 0

    def message(self) -> Message:
        """The reply as an assistant's message of the transcript."""
        message: Message = {
            "role": "assistant",
            "content": self.text or (self.refusal if not self.tool_calls else None),
        }
        if self.tool_calls:
            message["tool_calls"] = [
                {"id": call.id, "type": "function", "function": {"name": call.name, "arguments": call.arguments}}
                for call in self.tool_calls
            ]
        return message

    @classmethod
    def from_completion(cls, completion: Any, bounds: ReplyBounds = DEFAULT_BOUNDS) -> Reply:
        """Read a `chat.completion` object; fields nobody asked for are passed over.

        Args:
            completion: The object.
            bounds: The most that is read of it.

        Raises:
            BadReply: It has no message.
            ReplyTooLarge: It is over a bound.
        """
        match completion:
            case {"choices": [{"message": {} as message} as choice, *_]}:
                content, usage = message.get("content"), _get(completion, "usage", _OBJECT)
            case _:
                raise BadReply(_why_no_message(completion))
        return cls(
            text=_text(content, "text"),
            tool_calls=_tool_calls(message, bounds),
            refusal=_text(message.get("refusal"), "refusal") or _text(content, "refusal", parts_only=True),
            finish_reason=_get(choice, "finish_reason", str),
            input_tokens=_get(usage, "prompt_tokens", int) or 0,
            output_tokens=_get(usage, "completion_tokens", int) or 0,
        )


@dataclass(frozen=True, slots=True)
class Delta:
    """A piece of a reply that is still being written.

    Attributes:
        kind: What it is a piece of: the answer's `text`, the model's `reasoning`, or the arguments of a `tool_call`.
        text: The piece.
        index: For a tool call: which of the reply's calls, from 0.
        call_id: For a tool call: its id, once the endpoint has sent it.
        tool_name: For a tool call: the tool, once the endpoint has sent it.
    """

    kind: Literal["text", "reasoning", "tool_call"]
    text: str
    index: int = 0
    call_id: str | None = None
    tool_name: str | None = None


Sink = Callable[[Delta], Awaitable[None]]
"""Where the pieces of a reply go; awaited, so that a slow reader slows the model down."""


@runtime_checkable
class Model(Protocol):
    """Anything that answers requests; give one to an agent as `client=`.

    A model raises `ModelError` when it cannot answer; the loop decides whether to ask again. It must let
    cancellation pass and must leave nothing running when it does.

    Example:
        >>> class Echo:
        ...     async def respond(self, request: ModelRequest) -> Reply:
        ...         return Reply(text=request.transcript.messages[-1]["content"])
        >>> isinstance(Echo(), Model)
        True
    """

    async def respond(self, request: ModelRequest) -> Reply:
        """Answer one request.

        Raises:
            ModelError: There is no usable answer.
        """
        ...


@runtime_checkable
class StreamingModel(Model, Protocol):
    """A model that can also show its reply while it is written.

    A model without `stream` works in streamed runs too: its reply arrives in one piece.
    """

    async def stream(self, request: ModelRequest, sink: Sink) -> Reply:
        """Answer one request, handing out each piece as it comes.

        Args:
            request: The question.
            sink: Awaited with each piece. Once it has been called, the question is not asked again.

        Returns:
            The whole reply.

        Raises:
            ModelError: There is no usable answer, or it broke off.
        """
        ...


async def stream_or_respond(model: Model, request: ModelRequest, sink: Sink) -> Reply:
    """Stream a model's reply if it can do that, else hand out the text of its whole reply as one piece.

    Args:
        model: Who is asked.
        request: The question.
        sink: Awaited with each piece.

    Returns:
        The whole reply.

    Raises:
        ModelError: There is no usable answer, or it broke off.
    """
    # The class is asked, not the object: a mock has every attribute.
    if callable(getattr(model.__class__, "stream", None)):
        return await cast("StreamingModel", model).stream(request, sink)
    reply = await model.respond(request)
    if isinstance(reply, Reply):
        await show_whole(reply, sink)
    return reply


async def show_whole(reply: Reply, sink: Sink) -> None:
    """Hand out the text of a reply that came whole as one piece."""
    if reply.text:
        await sink(Delta("text", reply.text))


_OBJECT: Any = (dict, Mapping)  # nearly all are dicts, and that is asked sooner


def _get(source: Any, name: str, kind: Any) -> Any:
    """A field of a JSON object if it has the type it should have, else None: endpoints leave out what they like."""
    value = source.get(name) if isinstance(source, _OBJECT) else None
    return value if isinstance(value, kind) else None


def _text(content: object, kind: str, *, parts_only: bool = False) -> str | None:
    if is_list(content):  # some endpoints answer in parts
        return clean_text("".join(_get(part, kind, str) or "" for part in content)) or None
    return clean_text(content) or None if isinstance(content, str) and not parts_only else None


def _tool_calls(message: object, bounds: ReplyBounds) -> tuple[ToolCall, ...]:
    calls: list[ToolCall] = []
    seen: set[str] = set()
    written = _get(message, "tool_calls", list) or ()
    if len(written) > bounds.calls:
        raise ReplyTooLarge("calls", bounds.calls)
    for raw in written:
        function: Any = _get(raw, "function", _OBJECT) or _get(raw, "custom", _OBJECT) or {}
        call_id = _get(raw, "id", str)
        if not call_id or call_id in seen:
            # Some endpoints send none, or one for all; a history needs an id of its own for each call.
            call_id = f"call_{uuid4().hex[:24]}"
        seen.add(call_id)
        arguments = function.get("arguments", function.get("input"))
        if not isinstance(arguments, str):  # some endpoints send the object itself
            arguments = encode(arguments).decode() if arguments is not None else "{}"
        name = _get(function, "name", str) or "unnamed"
        calls.append(ToolCall(call_id, clean_text(name), clean_text(arguments)))
    return tuple(calls)


def _why_no_message(completion: object) -> str:
    error = _get(completion, "error", _OBJECT) or _get(completion, "error", str)
    if error:
        return f"the endpoint answered with an error in place of a completion: {error}"
    return f"the endpoint's answer has no choices[0].message: {str(completion)[:200]}"
