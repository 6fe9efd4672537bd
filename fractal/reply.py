"""What a model answers: a reply, its tool calls, and the pieces in which it comes."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from fractal._functions.arguments import written_object
from fractal._json import is_mapping
from fractal.messages import Message

__all__ = ["UNSAID", "Delta", "Reply", "ToolCall", "says_calls"]

UNSAID = "unsaid"
"""The finish reason of a stream that ended without one."""

# Words of endpoints, in lower case, for why they stopped.
_CALLS = frozenset({"function_call", "tool_call", "tool_calls", "tool_use"})
_CUT = frozenset({"length", "max_tokens", "model_length", "max_output_tokens", "token_limit"})
_WHOLE = frozenset(
    {
        "complete",
        "completed",
        "done",
        "end",
        "end_of_turn",
        "end_turn",
        "eos",
        "eos_token",
        "finish",
        "finished",
        "normal",
        "stop",
        "stop_sequence",
        "stop_token",
    }
)
_FILTERED = frozenset(
    {
        "blocklist",
        "content_filter",
        "content_filtered",
        "guardrail_intervened",
        "image_safety",
        "prohibited_content",
        "recitation",
        "safety",
        "sensitive",
        "spii",
    }
)


@dataclass(frozen=True, slots=True)
class ToolCall:
    """One tool call of a reply.

    Args:
        id: Its id, unique within the reply.
        name: The tool's name.
        arguments: The arguments as the model wrote them: the JSON of an object, if it did well.
        extra: Further fields of the call as the endpoint wrote them, such as a signature; they go back to it.
        is_object: Whether the arguments are known to be the JSON of an object.
    """

    id: str
    name: str
    arguments: str
    extra: Mapping[str, Any] = field(default_factory=dict[str, Any], hash=False)
    is_object: bool = field(default=False, repr=False, compare=False)

    def wire_form(self) -> dict[str, Any]:
        """The call as an entry of `tool_calls`."""
        function = {"name": self.name, "arguments": self.arguments}
        if not self.is_object:
            function["arguments"] = written_object(self.arguments)
        if not self.extra:
            return {"id": self.id, "type": "function", "function": function}
        function |= self.extra.get("function", {})
        return {"id": self.id, "type": "function", **self.extra, "function": function}


@functools.lru_cache(maxsize=256)
def _meaning(finish_reason: str | None) -> Literal["whole", "cut", "filtered", "unknown"]:
    """The meaning of an endpoint's finish reason."""
    word = (finish_reason or "stop").lower()
    if word in _WHOLE or word in _CALLS:
        return "whole"
    return "cut" if word in _CUT else "filtered" if word in _FILTERED else "unknown"


def says_calls(finish_reason: object) -> bool:
    """Whether an endpoint's finish reason says that the model calls tools."""
    return isinstance(finish_reason, str) and finish_reason.lower() in _CALLS


@dataclass(frozen=True, slots=True, kw_only=True)
class Reply:
    """The reply of a model.

    Attributes:
        text: The text, or None.
        tool_calls: The calls it asks for, in order.
        refusal: Why it declines, or None.
        finish_reason: The endpoint's word for why it stopped; `"unsaid"` if it ended a stream without one, or None.
        input_tokens: Prompt tokens, those that a cache served or took included; 0 if not told.
        output_tokens: Completion tokens, reasoning included; 0 if not told.
        cached_input_tokens: Those of the prompt tokens that the endpoint's cache served.
        cache_write_input_tokens: Those of the prompt tokens that it put into its cache.
        reasoning_tokens: Those of the completion tokens that the model thought with.
        model: Name of the model that wrote it, in the endpoint's words, or None.
        id: The endpoint's id of the answer, or None.
        content: The content as the endpoint wrote it, where that is something else than `text`: a list of parts, an
            empty text, a text with the model's thinking in it. None: `text` is all there is.
        extra: Further fields of the message as the endpoint wrote them, such as `reasoning_content`; they go back to
            it with the conversation.
    """

    text: str | None = None
    tool_calls: tuple[ToolCall, ...] = ()
    refusal: str | None = None
    finish_reason: str | None = None
    input_tokens: int = 0
    output_tokens: int = 0
    cached_input_tokens: int = 0
    cache_write_input_tokens: int = 0
    reasoning_tokens: int = 0
    model: str | None = field(default=None, compare=False)
    id: str | None = field(default=None, compare=False)
    content: str | list[Any] | None = field(default=None, hash=False)
    extra: Mapping[str, Any] = field(default_factory=dict[str, Any], hash=False)

    @property
    def is_cut(self) -> bool:
        """Whether the reply ends at the token limit, and not where the model meant to."""
        return _meaning(self.finish_reason) == "cut"

    @property
    def is_filtered(self) -> bool:
        """Whether the endpoint's filter has withheld the reply, or the rest of it."""
        return _meaning(self.finish_reason) == "filtered"

    @property
    def is_doubtful(self) -> bool:
        """Whether the finish reason leaves open that the reply is whole."""
        return _meaning(self.finish_reason) == "unknown"

    @property
    def promises_calls(self) -> bool:
        """Whether the endpoint says that the model calls tools, and there is no call."""
        return not self.tool_calls and says_calls(self.finish_reason)

    @property
    def media(self) -> list[str]:
        """The content besides text: the kinds of the parts, and `audio` or `images` beside the content."""
        parts = self.content if isinstance(self.content, list) else ()
        kinds = {str(part.get("type")) for part in parts if is_mapping(part)} - {"text", "thinking", "reasoning"}
        return sorted(kinds | {name for name in ("audio", "images") if self.extra.get(name)})

    def message(self) -> Message:
        """The reply as an assistant's message of the transcript: as the endpoint wrote it, and fit to be sent back."""
        content: Any = self.content if self.content is not None else self.text
        if not content and self.refusal and not self.tool_calls:
            content = self.refusal
        message: Message = {"role": "assistant", "content": content, **self.extra}
        if self.tool_calls:
            message["tool_calls"] = [call.wire_form() for call in self.tool_calls]
        return message


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
