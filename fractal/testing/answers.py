"""What a model answers in a test, as plain data.

An `Answer` says what the assistant replies and, for an HTTP endpoint, what goes wrong on the way. It is
shared by `fractal.testing.endpoint`, which sends it over a socket, and by models scripted in memory. The
functions here build the common ones and read best with the module's name in front:

```python
from fractal.testing import answers

script = [
    answers.calls(answers.call("weather", {"city": "Turin"})),
    answers.failure(429, "slow down", retry_after=0.1),
    answers.text("It rains in Turin."),
]
```
"""

import itertools
import json
import re
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal, TypeAlias, TypedDict, TypeGuard, Unpack

__all__ = [
    "Answer",
    "AnswerLike",
    "AnswerOptions",
    "ToolCallAnswer",
    "as_answer",
    "call",
    "calls",
    "cut",
    "empty",
    "failure",
    "hang",
    "nothing",
    "raw",
    "refusal",
    "text",
]

_call_numbers = itertools.count(1)
_completion_numbers = itertools.count(1)


@dataclass(frozen=True, slots=True, kw_only=True)
class ToolCallAnswer:
    """One tool call of an assistant's message; build it with `call`.

    Attributes:
        id: What the tool's result has to name.
        name: The tool.
        arguments: The JSON text of the arguments, as it goes on the wire; it may be malformed on purpose.
    """

    id: str
    name: str
    arguments: str = "{}"

    def wire_form(self) -> dict[str, Any]:
        """Return the entry of `tool_calls` in a chat completion."""
        return {
            "id": self.id,
            "type": "function",
            "function": {"name": self.name, "arguments": self.arguments},
        }


@dataclass(frozen=True, slots=True, kw_only=True)
class Answer:
    """The answer to one request.

    Example:
        ```python
        slow = Answer(text="at last", delay=0.5, usage=(200, 3))
        ```

    Attributes:
        text: The assistant's text; None sends `"content": null`.
        tool_calls: The calls the assistant makes, in order.
        refusal: Why the model refused, or None.
        finish_reason: None derives it: "tool_calls" if there are calls, else "stop".
        usage: Tokens of the prompt and of the completion; or the whole usage object, as an endpoint would send it.
        delay: Seconds before the answer starts.
        chunk_delay: Seconds between two chunks of a streamed answer.
        extra: Unknown fields, merged into the top level of the completion.
        message_extra: Unknown fields of the assistant's message, for example `reasoning_content`.
        status: The HTTP status.
        headers: Headers added to the response.
        error: The error object of a failure: `message`, `type`, `code` and `param`.
        body: Bytes sent in place of any JSON, or None.
        content_type: The type of the body that is sent when the answer is not streamed.
        wire: How much arrives. "whole": everything. "cut": the head, half of the body, then the connection
            closes. "nothing": the connection closes without a byte. "hang": nothing, until the client leaves.
    """

    text: str | None = None
    tool_calls: tuple[ToolCallAnswer, ...] = ()
    refusal: str | None = None
    finish_reason: str | None = None
    usage: tuple[int, int] | Mapping[str, Any] = (10, 5)
    delay: float = 0.0
    chunk_delay: float = 0.0
    extra: Mapping[str, object] = field(default_factory=dict[str, object])
    message_extra: Mapping[str, object] = field(default_factory=dict[str, object])
    status: int = 200
    headers: Mapping[str, str] = field(default_factory=dict[str, str])
    error: Mapping[str, object] | None = None
    body: bytes | None = None
    content_type: str = "application/json"
    wire: Literal["whole", "cut", "nothing", "hang"] = "whole"

    def completion(self, model: str) -> dict[str, Any]:
        """Return the `chat.completion` object of this answer, with an id of its own.

        Args:
            model: The name of the model the object carries.
        """
        message: dict[str, Any] = {"role": "assistant", "content": self.text, "refusal": self.refusal}
        if self.tool_calls:
            message["tool_calls"] = [each.wire_form() for each in self.tool_calls]
        choice = {
            "index": 0,
            "message": {**message, **self.message_extra},
            "logprobs": None,
            "finish_reason": self._derived_finish_reason(),
        }
        return {
            **_envelope("chat.completion", model),
            "choices": [choice],
            "usage": self._usage(),
            **self.extra,
        }

    def chunks(self, model: str, *, include_usage: bool = False) -> list[dict[str, Any]]:
        """Return the `chat.completion.chunk` objects that stream this answer, all under one id.

        Args:
            model: The name of the model the chunks carry.
            include_usage: End with a chunk of no choices that carries the usage.
        """
        base = {**_envelope("chat.completion.chunk", model), **self.extra}
        if include_usage:
            base["usage"] = None
        found = [{**base, "choices": [_choice(delta, None)]} for delta in self._deltas()]
        found.append({**base, "choices": [_choice({}, self._derived_finish_reason())]})
        if include_usage:
            found.append({**base, "choices": [], "usage": self._usage()})
        return found

    def _derived_finish_reason(self) -> str:
        return self.finish_reason or ("tool_calls" if self.tool_calls else "stop")

    def _usage(self) -> dict[str, Any]:
        if not isinstance(self.usage, tuple):
            return dict(self.usage)
        prompt, completion = self.usage
        return {
            "prompt_tokens": prompt,
            "completion_tokens": completion,
            "total_tokens": prompt + completion,
        }

    def _deltas(self) -> Iterator[dict[str, Any]]:
        yield {"role": "assistant", "content": None, **self.message_extra}
        for piece in _words(self.text):
            yield {"content": piece}
        for piece in _words(self.refusal):
            yield {"refusal": piece}
        for index, each in enumerate(self.tool_calls):
            # The name comes first and whole, the arguments in pieces that know only their index: a client
            # that joins them by id, or parses each one, is found out.
            start = each.wire_form()
            start["function"]["arguments"] = ""
            yield {"tool_calls": [{"index": index, **start}]}
            middle = len(each.arguments) // 2
            for part in (each.arguments[:middle], each.arguments[middle:]):
                yield {"tool_calls": [{"index": index, "function": {"arguments": part}}]}


AnswerLike: TypeAlias = Answer | str | ToolCallAnswer | Sequence[ToolCallAnswer]
"""What may stand for an answer: a text, a tool call, several calls of one message, or an `Answer`."""


class AnswerOptions(TypedDict, total=False):
    """The fields of `Answer` that the builders take besides what they are named for."""

    finish_reason: str | None
    usage: tuple[int, int] | Mapping[str, Any]
    delay: float
    chunk_delay: float
    extra: Mapping[str, object]
    message_extra: Mapping[str, object]
    headers: Mapping[str, str]
    wire: Literal["whole", "cut", "nothing", "hang"]


def text(content: str, **more: Unpack[AnswerOptions]) -> Answer:
    """Answer with a text.

    Example:
        ```python
        answers.text("hi", usage=(100, 20), message_extra={"reasoning_content": "a greeting"})
        ```
    """
    return Answer(text=content, **more)


def call(name: str, arguments: Mapping[str, object] | str = "{}", *, id: str | None = None) -> ToolCallAnswer:
    """Make one tool call.

    Example:
        ```python
        answers.call("add", {"a": 1, "b": 2})
        answers.call("add", '{"a": 1, ')  # malformed on purpose
        ```

    Args:
        name: The tool to call.
        arguments: The arguments; a string is sent as it is.
        id: None makes one that no other call of this process has been given: "call_1", "call_2", …
    """
    sent = arguments if isinstance(arguments, str) else json.dumps(dict(arguments))
    return ToolCallAnswer(id=f"call_{next(_call_numbers)}" if id is None else id, name=name, arguments=sent)


def calls(*calls: ToolCallAnswer, text: str | None = None, **more: Unpack[AnswerOptions]) -> Answer:
    """Answer with tool calls, made in one message.

    Example:
        ```python
        answers.calls(answers.call("a"), answers.call("b"), text="Let me look.")
        ```
    """
    return Answer(text=text, tool_calls=calls, **more)


def refusal(text: str) -> Answer:
    """Refuse to answer: no content, the reason in `refusal`."""
    return Answer(refusal=text)


def empty() -> Answer:
    """Answer with neither content nor tool calls, as models now and then do."""
    return Answer()


def failure(
    status: int,
    message: str = "the endpoint was told to fail",
    *,
    code: str | None = None,
    type: str | None = None,
    retry_after: float | None = None,
    headers: Mapping[str, str] | None = None,
) -> Answer:
    """Fail with an HTTP status and an error object.

    Example:
        ```python
        answers.failure(429, "slow down", code="rate_limit_exceeded", retry_after=2)
        ```

    Args:
        status: The HTTP status.
        message: What the error says.
        code: The error's code, or None.
        type: None derives it from the status.
        retry_after: Seconds sent as `Retry-After`; None sends no such header.
        headers: Further headers.
    """
    sent = dict(headers or {})
    if retry_after is not None:
        sent["Retry-After"] = f"{retry_after:g}"
    kind = type or ("server_error" if status >= 500 else "invalid_request_error")
    error = {"message": message, "type": kind, "code": code, "param": None}
    return Answer(status=status, error=error, headers=sent)


def raw(body: bytes | str, *, status: int = 200, content_type: str = "text/html") -> Answer:
    """Answer with a body that is no chat completion, as a proxy in between would.

    Example:
        ```python
        answers.raw("<h1>Bad gateway</h1>", status=502)
        ```
    """
    sent = body.encode() if isinstance(body, str) else body
    return Answer(body=sent, status=status, content_type=content_type)


def cut(answer: AnswerLike = "an answer that breaks off in the middle") -> Answer:
    """Send the first half of an answer, then close the connection.

    Example:
        ```python
        answers.cut(answers.call("weather", {"city": "Turin"}))
        ```
    """
    return replace(as_answer(answer), wire="cut")


def nothing(*, delay: float = 0.0) -> Answer:
    """Close the connection without a byte, `delay` seconds after the request."""
    return Answer(delay=delay, wire="nothing")


def hang() -> Answer:
    """Keep the client waiting until it goes away."""
    return Answer(wire="hang")


def as_answer(answer: AnswerLike) -> Answer:
    """Convert what may stand for an answer to an `Answer`.

    Example:
        ```python
        assert as_answer("hi") == Answer(text="hi")
        ```

    Raises:
        TypeError: `answer` is none of `AnswerLike`; the text names what it is.
    """
    return _convert(answer)


def _convert(value: object) -> Answer:
    if isinstance(value, Answer):
        return value
    if isinstance(value, str):
        return Answer(text=value)
    if isinstance(value, ToolCallAnswer):
        return Answer(tool_calls=(value,))
    if not _is_sequence(value):
        raise TypeError(f"an answer is an Answer, a str, a ToolCallAnswer or a sequence of these calls, not {value!r}")
    if not value:
        raise TypeError("an empty sequence is no answer; use answers.empty() for an empty message")
    return Answer(tool_calls=tuple(_as_call(each, index) for index, each in enumerate(value)))


def _is_sequence(value: object) -> TypeGuard[Sequence[object]]:
    return isinstance(value, Sequence) and not isinstance(value, bytes | bytearray)


def _as_call(value: object, index: int) -> ToolCallAnswer:
    if isinstance(value, ToolCallAnswer):
        return value
    raise TypeError(f"a sequence as an answer holds only tool calls, but item {index} is {value!r}")


def _envelope(kind: str, model: str) -> dict[str, Any]:
    return {
        "id": f"chatcmpl-{next(_completion_numbers)}",
        "object": kind,
        "created": int(time.time()),
        "model": model,
    }


def _choice(delta: dict[str, Any], finish_reason: str | None) -> dict[str, Any]:
    return {"index": 0, "delta": delta, "logprobs": None, "finish_reason": finish_reason}


def _words(content: str | None) -> list[str]:
    """Split a text so that the pieces joined are the text again; an empty text is one empty piece."""
    if content is None:
        return []
    return re.findall(r"\S+\s*|\s+", content) or [""]
