"""The transcript of a run: chat-completions messages, appended and never changed."""

from __future__ import annotations

import types
from collections import deque
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Literal, NamedTuple

from fractal._functions.arguments import with_object_arguments
from fractal._json import encode, is_list, is_mapping, text_of
from fractal._texts import clean_text, kind_of, repr_of
from fractal.errors import InvalidArguments, InvalidMessages

__all__ = ["AS_WRITTEN", "Message", "MessageForm", "Transcript", "user_message"]

Message = dict[str, Any]
"""One chat-completions message, as it goes over the wire: `{"role": "user", "content": "hi"}`."""


class MessageForm(NamedTuple):
    """The form of assistants' messages for an endpoint that refuses the one in which they were written.

    Attributes:
        content: What stands for no content beside tool calls: `"as_written"`, `"blank"` for an empty text in place of
            null, or `"null"` for null in place of an empty text.
        extra: Which messages keep their further fields, such as `reasoning_content`: `"all"`, those with tool
            `"calls"`, or `"none"`.
        between: What stands between a tool's result and a user's turn right after it: `"nothing"`, or an assistant's
            `"turn"`, where a run was cut.
    """

    content: Literal["as_written", "blank", "null"] = "as_written"
    extra: Literal["all", "calls", "none"] = "all"
    between: Literal["nothing", "turn"] = "nothing"


AS_WRITTEN = MessageForm()

_CUT_OFF = {"role": "assistant", "content": "…"}

_STANDARD = frozenset({"role", "content", "name", "refusal", "tool_calls", "function_call", "audio"})
_PLAIN = _STANDARD - {"audio"}
_STANDARD_OF_CALL = frozenset({"id", "type", "function"})


def _in_form(message: Message, form: MessageForm) -> Message:
    """A message of the transcript in the form that is sent.

    Args:
        message: The message.
        form: What the endpoint takes.

    Returns:
        The message itself, where it is sent as it stands.
    """
    if message["role"] != "assistant":
        return message
    audio = message.get("audio")
    if is_mapping(audio) and "id" in audio and len(audio) > 1:  # endpoints take back the id alone
        message = {**message, "audio": {"id": audio["id"]}}
    if form == AS_WRITTEN:
        return message
    calls = message.get("tool_calls")
    if form.extra == "none" or (form.extra == "calls" and not calls):
        message = {name: value for name, value in message.items() if name in _STANDARD}
        if calls:
            message["tool_calls"] = [_without_extra(call) for call in calls]
    if calls and not message.get("content") and form.content != "as_written":
        message = {**message, "content": "" if form.content == "blank" else None}
    return message


def _without_extra(call: Any) -> Any:
    return {name: value for name, value in call.items() if name in _STANDARD_OF_CALL}


_ROLES = frozenset({"system", "developer", "user", "assistant", "tool", "function"})
_SPEAKERS = _ROLES - {"tool"}
_PART_TYPES = frozenset({"text", "image_url", "input_audio", "file", "video_url", "refusal"})


def user_message(user_input: object) -> Message:
    """The user's turn: text as it is, content parts with text among them as parts, anything else as JSON.

    Raises:
        InvalidArguments: There is no input, or only something that would give one.
    """
    _check_input(user_input)
    return {"role": "user", "content": _as_parts(user_input) or text_of(user_input)}


_ROUTINES = (types.FunctionType, types.BuiltinFunctionType, types.MethodType, types.MethodWrapperType)


def _check_input(user_input: object) -> None:
    kind = kind_of(user_input)  # an object may say that it is of another
    if kind is str:
        return
    if user_input is None:
        raise InvalidArguments("user_input is None: pass text, a dict, a list, a pydantic model or content parts")
    if hasattr(kind, "__await__"):
        raise InvalidArguments(f"user_input is {repr_of(user_input)}: await it, and pass what it gives")
    if issubclass(kind, (type, *_ROUTINES)):
        raise InvalidArguments(f"user_input is {repr_of(user_input)}: call it, and pass what it returns")


def _as_parts(value: object) -> list[Any] | None:
    """A list of content parts, and of texts if there is a part beside them, as parts; None for anything else."""
    if not is_list(value) or not any(map(_is_part, value)):
        return None
    if not all(isinstance(item, str) or _is_part(item) for item in value):
        return None
    return [{"type": "text", "text": clean_text(item)} if isinstance(item, str) else item for item in value]


def _is_part(value: object) -> bool:
    kind = value.get("type") if is_mapping(value) else None
    return isinstance(kind, str) and kind in _PART_TYPES


def _is_plain(message: Mapping[str, Any]) -> bool:
    """Whether a message is a role and a text, as nearly all of a long history are: then there is no more to check."""
    kind = type(message)
    if kind is not dict or len(message) != 2:
        return False
    role = message.get("role")
    return type(role) is str and role in _SPEAKERS and type(message.get("content")) is str


class Transcript:
    """The messages of a run, without the system prompt.

    It only grows, and it is always one that an endpoint accepts: every tool call is answered exactly once, in
    call order, before anything else is said, and with arguments that are JSON objects. Each message is encoded once,
    so a request costs the new messages and not a walk over the past.

    Args:
        messages: History to continue, as an earlier `AgentResult.messages` gave it.

    Attributes:
        traits: What is in it that some endpoint refuses: `"null_content"` and `"blank_content"` beside tool calls,
            `"extra"` fields in a message without calls, `"call_extra"` in one with calls, `"user_after_tool"`; and
            `"audio"`.
        has_calls: Whether there is a tool call in it.

    Raises:
        InvalidMessages: The history is not one an endpoint would accept; says which message and why.

    Example:
        >>> transcript = Transcript([{"role": "user", "content": "hi"}])
        >>> transcript.append({"role": "assistant", "content": "hello"})
        >>> len(transcript)
        2
    """

    __slots__ = ("_fragments", "_messages", "_open_calls", "has_calls", "traits")

    def __init__(self, messages: Iterable[Mapping[str, Any]] = ()) -> None:
        self._messages: list[Message] = []
        self._fragments: dict[MessageForm, list[bytes]] = {AS_WRITTEN: []}
        self.traits = set[str]()
        self.has_calls = False
        self._open_calls: deque[str] = deque()
        for message in messages:
            self.append(message)
        self.require_answered()

    def __len__(self) -> int:
        return len(self._messages)

    @property
    def messages(self) -> list[Message]:
        """A new list of the messages so far."""
        return list(self._messages)

    def since(self, position: int) -> list[Message]:
        """The messages from a position on, without a walk over those before it."""
        return self._messages[position:]

    @property
    def open_calls(self) -> Sequence[str]:
        """Ids of the tool calls that are not answered yet, in call order."""
        return tuple(self._open_calls)

    def append(self, message: Mapping[str, Any], *, is_reply: bool = False) -> None:
        """Add one message.

        Args:
            message: The message.
            is_reply: Whether a `Reply` has made it, and so its arguments are objects already.

        Raises:
            InvalidMessages: An endpoint would refuse the history with it.
        """
        if self._open_calls or not _is_plain(message):
            message = self._taken(message, is_reply=is_reply)
        messages = self._messages
        if messages and messages[-1]["role"] == "tool" and message["role"] not in ("assistant", "tool"):
            self.traits.add("user_after_tool")
        messages.append({**message})

    def _taken(self, message: Mapping[str, Any], *, is_reply: bool) -> Mapping[str, Any]:
        """Check a message, and note its calls; returns the message that is kept."""
        fault = self._fault(message)
        if fault is not None:
            raise InvalidMessages(len(self._messages), fault)
        content = message.get("content")
        if type(content) is not str and isinstance(content, str):
            message = {**message, "content": clean_text(content)}  # what is kept is what is sent: plain text
        if message["role"] == "tool":
            self._open_calls.popleft()
        elif (len(message) > 2 or content is None) and (message.get("tool_calls") or not message.keys() <= _PLAIN):
            message = self._noted(message, is_reply=is_reply)
        return message

    def _noted(self, message: Mapping[str, Any], *, is_reply: bool) -> Mapping[str, Any]:
        """Note the parts and calls of a message; returns the message that is kept."""
        self._open_calls.extend(call["id"] for call in message.get("tool_calls") or ())
        if self._open_calls:
            self.has_calls, message = True, message if is_reply else with_object_arguments(message)
        if message["role"] == "assistant":
            self.traits |= _traits_of(message)
        return message

    def answer(self, call_id: str, content: str) -> None:
        """Answer the next open tool call."""
        self.append({"role": "tool", "tool_call_id": call_id, "content": content})

    def require_answered(self) -> None:
        """Check that no tool call is open.

        Raises:
            InvalidMessages: One is.
        """
        if self._open_calls:
            raise InvalidMessages(
                len(self._messages) - 1,
                f"tool call {self._open_calls[0]!r} has no result: add a tool message for it",
            )

    def encoded(self, form: MessageForm = AS_WRITTEN) -> list[bytes]:
        """Each message as JSON, encoded when first asked for and kept.

        Args:
            form: What the endpoint takes.
        """
        fragments = self._fragments.setdefault(form, [])
        if form == AS_WRITTEN and "audio" not in self.traits:
            for message in self._messages[len(fragments) :]:
                fragments.append(encode(message))
            return fragments
        for position in range(len(fragments), len(self._messages)):
            fragments.append(b",".join(map(encode, self._sent(position, form))))
        return fragments

    def sent(self, kept: Sequence[int] | None, form: MessageForm) -> list[Message]:
        """The messages in the form that is sent.

        Args:
            kept: Positions of those that are sent. None: all.
            form: What the endpoint takes.
        """
        if form == AS_WRITTEN and "audio" not in self.traits:
            return self.messages if kept is None else [self._messages[position] for position in kept]
        positions = range(len(self)) if kept is None else kept
        return [message for position in positions for message in self._sent(position, form)]

    def _sent(self, position: int, form: MessageForm) -> list[Message]:
        """The message at a position in the form that is sent, after what must stand before it."""
        message = self._messages[position]
        follows_tool = position > 0 and self._messages[position - 1]["role"] == "tool"
        if form.between == "turn" and message["role"] == "user" and follows_tool:
            return [_CUT_OFF, message]
        return [_in_form(message, form)]

    def _fault(self, message: object) -> str | None:
        if not is_mapping(message):
            return f"a message is a dict with a role, not {type(message).__name__}"
        role = message.get("role")
        if not isinstance(role, str) or role not in _ROLES:
            return f"unknown role {role!r}"
        if role == "tool":
            return self._fault_of_answer(message)
        if self._open_calls:
            return f"tool call {self._open_calls[0]!r} must be answered before a {role} message"
        if message.get("content") is not None and message.get("tool_calls") is None:  # as in nearly all
            return None
        return _fault_of_calls(message.get("tool_calls")) or _fault_of_content(message, role)

    def _fault_of_answer(self, message: Mapping[str, Any]) -> str | None:
        call_id = message.get("tool_call_id")
        if message.get("content") is None:
            return f"the result of tool call {call_id!r} has no content"
        if not self._open_calls:
            return f"a result for tool call {call_id!r}, which nobody made"
        if call_id != self._open_calls[0]:
            return f"a result for {call_id!r} where {self._open_calls[0]!r} comes first: results go in call order"
        return None


def _traits_of(message: Mapping[str, Any]) -> set[str]:
    calls, traits = message.get("tool_calls") or (), set[str]()
    if calls and not message.get("content"):
        traits.add("null_content" if message.get("content") is None else "blank_content")
    has_extra = not message.keys() <= _STANDARD
    for call in () if has_extra else calls:
        has_extra = has_extra or not call.keys() <= _STANDARD_OF_CALL
    if has_extra:
        traits.add("call_extra" if calls else "extra")
    if "audio" in message:
        traits.add("audio")
    return traits


def _fault_of_content(message: Mapping[str, Any], role: str) -> str | None:
    if message.get("content") is not None:
        return None
    if role == "assistant" and (message.get("tool_calls") or message.get("refusal") or message.get("function_call")):
        return None
    return f"a {role} message says nothing: it has no content"


def _fault_of_calls(calls: object) -> str | None:
    if calls is None:
        return None
    if not is_list(calls) or not calls:
        return "tool_calls is no list of calls: leave it out where there are none"
    ids: set[str] = set()
    for call in calls:
        call_id = call.get("id") if is_mapping(call) else None
        if not isinstance(call_id, str) or not call_id:
            return "a tool call has no id"
        if call_id in ids:
            return f"two tool calls have the id {call_id!r}"
        ids.add(call_id)
    return None
