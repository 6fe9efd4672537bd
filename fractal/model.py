"""What the loop asks of a model: one question, one reply."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any, Protocol, cast, runtime_checkable

from fractal._concurrency.grace import answered
from fractal._json import encode
from fractal.errors import InvalidArguments
from fractal.messages import AS_WRITTEN, Message, MessageForm, Transcript
from fractal.reply import UNSAID, Delta, Reply, ToolCall

__all__ = [
    "UNSAID",
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
    "ask_model",
    "show_whole",
    "stream_or_respond",
]

_OF_TOOLS = frozenset({"parallel_tool_calls", "tool_choice"})


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
            raise InvalidArguments(f"extra_body has {sorted(reserved)}: these fields of a request are the agent's own")

    def fields(self) -> dict[str, Any]:
        """The request's fields."""
        fields: dict[str, Any] = {}
        if self.temperature is not None:
            fields["temperature"] = self.temperature
        if self.max_tokens is not None:
            fields["max_tokens"] = self.max_tokens
        if self.reasoning_effort is not None:
            fields["reasoning_effort"] = self.reasoning_effort
        return {**fields, **self.extra}


class ToolSchemas:
    """The tools on offer, as chat-completions schemas, encoded once.

    Args:
        schemas: One `{"type": "function", "function": {…}}` for each tool.
    """

    __slots__ = ("_encoded", "schemas")

    def __init__(self, schemas: Sequence[dict[str, Any]] = ()) -> None:
        self.schemas = list(schemas)
        self._encoded: bytes | None = None

    def names(self) -> list[str]:
        """The names of the tools."""
        return [schema["function"]["name"] for schema in self.schemas]

    def encoded(self) -> bytes:
        """The schemas as a JSON array."""
        if self._encoded is None:
            self._encoded = encode(self.schemas)
        return self._encoded

    def plus(self, other: ToolSchemas) -> ToolSchemas:
        """The tools of both; what is encoded already is not encoded again."""
        both = ToolSchemas([*self.schemas, *other.schemas])
        if self.schemas and other.schemas:
            both._encoded = self.encoded()[:-1] + b"," + other.encoded()[1:]
        return both


class RequestControl(Protocol):
    """The run's side of a request, for a model that does more than ask once."""

    def charge(self) -> None:
        """Spend one more request."""
        ...

    def paused(self, waiting_for: str) -> AbstractContextManager[None]:
        """Stop the clock of the request in a block, and note its wait if the run's time ends in it."""
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
        instruction: A last word to the model for this request alone, at the end of the system prompt; not part of
            the transcript.
        form: How the transcript's messages are sent, as far as the endpoint is known to refuse some form.
        headers: Further HTTP headers of this request alone; none that signs it.
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
    form: MessageForm = AS_WRITTEN
    headers: Mapping[str, str] = field(default_factory=dict[str, str], repr=False)
    control: RequestControl | None = field(default=None, repr=False, compare=False)

    def charge(self) -> None:
        """Count one more request; a model that sends several for one question calls this before each but the first.

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
        """Messages of the conversation that are sent, with one that stands for others if it is no system message."""
        kept = len(self.transcript) if self.kept is None else len(self.kept)
        return kept + (self.summary is not None and self._system_text(self.summary) is None)

    @property
    def reply_tokens(self) -> int:
        """Tokens that the reply may have at most, whichever field says it; 0 if none does."""
        fields = {**self.settings.fields(), **self.fields}
        limits = [fields.get(name) for name in ("max_tokens", "max_completion_tokens")]
        return max((limit for limit in limits if isinstance(limit, int)), default=0)

    @property
    def has_tools(self) -> bool:
        """Whether there are tools on offer."""
        return self.tools is not None and bool(self.tools.schemas)

    def parameters(self) -> dict[str, Any]:
        """The request as the keyword arguments of `chat.completions.create`."""
        sent = self.transcript.sent(self.kept, self.form)
        parameters = {"model": self.model, "messages": [*self.opening(), *sent], **self._fields()}
        if self.tools is not None and self.tools.schemas:
            parameters["tools"] = self.tools.schemas
        return parameters

    def body(self) -> bytes:
        """The request as JSON: joined from the messages' encoded forms, not walked anew."""
        whole = self.transcript.encoded(self.form)
        fragments = whole if self.kept is None else [whole[position] for position in self.kept]
        messages = b",".join([*map(encode, self.opening()), *fragments])
        head = encode({"model": self.model, **self._fields()})[:-1]
        tools = b',"tools":' + self.tools.encoded() if self.tools is not None and self.tools.schemas else b""
        return b"".join((head, b',"messages":[', messages, b"]", tools, b"}"))

    def _fields(self) -> dict[str, Any]:
        fields = self.settings.fields()
        if fields and not self.has_tools:  # endpoints refuse what is said of tools where there are none
            fields = {name: value for name, value in fields.items() if name not in _OF_TOOLS}
        return {**fields, **self.fields}

    def opening(self) -> list[Message]:
        """The messages before the conversation: at most one system message, since many endpoints take no second."""
        if self.summary is None and self.instruction is None:  # as nearly always
            return [{"role": "system", "content": self.system}] if self.system else []
        summary = self._system_text(self.summary) if self.summary is not None else None
        others = [self.summary] if self.summary is not None and summary is None else []
        said = "\n\n".join(filter(None, (self.system, summary, self.instruction)))
        return [{"role": "system", "content": said}, *others] if said else others

    @staticmethod
    def _system_text(message: Message) -> str | None:
        """The text of a system message; None for any other."""
        content = message.get("content")
        return content if message.get("role") == "system" and isinstance(content, str) else None


Sink = Callable[[Delta], Awaitable[None]]
"""Where the pieces of a reply go; awaited, so that a slow reader slows the model down."""


@runtime_checkable
class Model(Protocol):
    """A model of any kind that answers requests; given to an agent as `client=`.

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


def ask_model(model: Model, request: ModelRequest, sink: Sink | None) -> Awaitable[Any]:
    """Ask a model, which may be a user's: with its grace, and with failures told from a cancellation.

    Args:
        model: Who is asked.
        request: The question.
        sink: Awaited with each piece; None: the reply comes whole.

    Returns:
        What it returns, once that is awaited; it should be a `Reply`.

    Raises:
        ModelError: There is no usable answer, or it broke off.
    """
    reply = model.respond(request) if sink is None else stream_or_respond(model, request, sink)
    if getattr(model, "needs_no_grace", False) is True:
        return reply
    return answered(reply, f"the model {type(model).__name__}")


async def stream_or_respond(model: Model, request: ModelRequest, sink: Sink) -> Reply:
    """Stream a model's reply if the model can; else hand out the text of the whole reply as one piece.

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
