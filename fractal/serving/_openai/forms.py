"""The forms in which OpenAI's clients read answers: of chat completions and of responses, whole and streamed."""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from typing import TYPE_CHECKING, Any

from fractal._json import encode, text_of
from fractal.errors import Refused
from fractal.serving._openai.client_tools import text_beside_calls
from fractal.serving._openai.faults import Fault

if TYPE_CHECKING:
    from fractal.results import AgentResult, Usage
    from fractal.serving._openai.asked import Asked

__all__ = ["ChatForm", "Form", "ResponseForm"]


class Form(ABC):
    """An answer in the form of a client.

    Args:
        asked: What is answered.
    """

    def __init__(self, asked: Asked) -> None:
        self._asked, self._id, self._at = asked, "", int(time.time())

    def of_run(self, run_id: str) -> None:
        """Take the id of the run, of which ids are made."""
        self._id = run_id

    @abstractmethod
    def whole(self, result: AgentResult) -> dict[str, Any]:
        """The answer that is not streamed."""

    @abstractmethod
    def opening(self) -> bytes:
        """The first events of a stream."""

    @abstractmethod
    def piece(self, text: str) -> bytes:
        """A piece of text."""

    @abstractmethod
    def closing(self, result: AgentResult) -> bytes:
        """The last events of a stream that succeeded."""

    @abstractmethod
    def failing(self, fault: Fault) -> bytes:
        """The last events of a stream that began and then failed."""


def _refusal_of(result: AgentResult) -> str | None:
    return text_of(result.error) if isinstance(result.exception, Refused) else None


class ChatForm(Form):
    """A chat completion."""

    def whole(self, result: AgentResult) -> dict[str, Any]:
        """The answer that is not streamed."""
        refusal, calls = _refusal_of(result), self._asked.tools.calls_in(result, self._id)
        said = text_beside_calls(result) if calls else text_of(result.content)
        message: dict[str, Any] = {"role": "assistant", "content": None if refusal else said, "refusal": refusal}
        if calls:
            message["tool_calls"] = calls
        choice = {"index": 0, "message": message, "finish_reason": "tool_calls" if calls else "stop", "logprobs": None}
        return self._head("chat.completion", [choice]) | {"usage": _chat_usage(result.usage)}

    def opening(self) -> bytes:
        """The first events of a stream."""
        return self._chunk({"role": "assistant", "content": "", "refusal": None})

    def piece(self, text: str) -> bytes:
        """A piece of text."""
        return self._chunk({"content": text})

    def closing(self, result: AgentResult) -> bytes:
        """The last events of a stream that succeeded."""
        refusal = _refusal_of(result)
        frames = self._chunk({"refusal": refusal}) if refusal else b""
        calls = self._asked.tools.calls_in(result, self._id)
        for index, call in enumerate(calls):
            frames += self._chunk({"tool_calls": [{"index": index, **call}]})
        frames += self._chunk({}, "tool_calls" if calls else "stop")
        if self._asked.wants_usage:
            usage = {"usage": _chat_usage(result.usage)}
            frames += _frame(encode(self._head("chat.completion.chunk", []) | usage))
        return frames + _frame(b"[DONE]")

    def failing(self, fault: Fault) -> bytes:
        """The last events of a stream that began and then failed."""
        return _frame(encode(fault.body()))

    def _chunk(self, delta: dict[str, Any], finish_reason: str | None = None) -> bytes:
        choice = {"index": 0, "delta": delta, "finish_reason": finish_reason, "logprobs": None}
        usage = {"usage": None} if self._asked.wants_usage else {}
        return _frame(encode(self._head("chat.completion.chunk", [choice]) | usage))

    def _head(self, kind: str, choices: list[Any]) -> dict[str, Any]:
        head = {"id": f"chatcmpl-{self._id}", "object": kind, "created": self._at, "model": self._asked.model}
        return head | {"choices": choices}


def _chat_usage(usage: Usage) -> dict[str, Any]:
    return {
        "prompt_tokens": usage.input_tokens,
        "completion_tokens": usage.output_tokens,
        "total_tokens": usage.total_tokens,
        "prompt_tokens_details": {"cached_tokens": usage.cached_input_tokens, "audio_tokens": 0},
        "completion_tokens_details": {"reasoning_tokens": usage.reasoning_tokens, "audio_tokens": 0},
    }


class ResponseForm(Form):
    """A response, of OpenAI's newer interface."""

    def __init__(self, asked: Asked) -> None:
        super().__init__(asked)
        self._number = 0
        self._texts: list[str] = []

    def whole(self, result: AgentResult) -> dict[str, Any]:
        """The answer that is not streamed."""
        refusal = _refusal_of(result)
        part = {"type": "refusal", "refusal": refusal} if refusal else _text_part(text_of(result.content))
        return self._response("completed", [self._message("completed", [part])], usage=result.usage)

    def opening(self) -> bytes:
        """The first events of a stream."""
        item, part = self._message("in_progress", []), _text_part("")
        return b"".join(
            (
                self._event("response.created", response=self._response("in_progress")),
                self._event("response.in_progress", response=self._response("in_progress")),
                self._event("response.output_item.added", output_index=0, item=item),
                self._event("response.content_part.added", part=part, **self._where()),
            )
        )

    def piece(self, text: str) -> bytes:
        """A piece of text."""
        self._texts.append(text)
        return self._event("response.output_text.delta", delta=text, logprobs=[], **self._where())

    def closing(self, result: AgentResult) -> bytes:
        """The last events of a stream that succeeded."""
        refusal, text = _refusal_of(result), "".join(self._texts)
        part = {"type": "refusal", "refusal": refusal} if refusal else _text_part(text)
        item = self._message("completed", [part])
        if refusal:
            done = self._event("response.refusal.done", refusal=refusal, **self._where())
        else:
            done = self._event("response.output_text.done", text=text, logprobs=[], **self._where())
        return b"".join(
            (
                done,
                self._event("response.content_part.done", part=part, **self._where()),
                self._event("response.output_item.done", output_index=0, item=item),
                self._event("response.completed", response=self._response("completed", [item], usage=result.usage)),
            )
        )

    def failing(self, fault: Fault) -> bytes:
        """The last events of a stream that began and then failed."""
        code = "rate_limit_exceeded" if fault.status == 429 else "server_error"
        error = {"code": code, "message": fault.message}
        item = self._message("incomplete", [_text_part("".join(self._texts))])
        return self._event("response.failed", response=self._response("failed", [item], error=error))

    def _where(self) -> dict[str, Any]:
        return {"item_id": f"msg_{self._id}", "output_index": 0, "content_index": 0}

    def _message(self, status: str, content: list[Any]) -> dict[str, Any]:
        head = {"id": f"msg_{self._id}", "type": "message", "role": "assistant"}
        return head | {"status": status, "content": content}

    def _response(
        self,
        status: str,
        output: list[Any] | None = None,
        *,
        usage: Usage | None = None,
        error: dict[str, str] | None = None,
    ) -> dict[str, Any]:
        return {
            "id": f"resp_{self._id}",
            "object": "response",
            "created_at": self._at,
            "status": status,
            "error": error,
            "incomplete_details": None,
            "instructions": None,
            "metadata": {},
            "model": self._asked.model,
            "output": output or [],
            "parallel_tool_calls": True,
            "temperature": None,
            "tool_choice": "auto",
            "tools": [],
            "top_p": None,
            "store": False,
            "usage": None if usage is None else _response_usage(usage),
        }

    def _event(self, kind: str, **facts: Any) -> bytes:
        number, self._number = self._number, self._number + 1
        return _frame(encode({"type": kind, "sequence_number": number, **facts}), kind)


def _text_part(text: str) -> dict[str, Any]:
    return {"type": "output_text", "text": text, "annotations": []}


def _response_usage(usage: Usage) -> dict[str, Any]:
    details = {"cached_tokens": usage.cached_input_tokens, "cache_write_tokens": usage.cache_write_input_tokens}
    return {
        "input_tokens": usage.input_tokens,
        "input_tokens_details": details,
        "output_tokens": usage.output_tokens,
        "output_tokens_details": {"reasoning_tokens": usage.reasoning_tokens},
        "total_tokens": usage.total_tokens,
    }


def _frame(data: bytes, event: str = "") -> bytes:
    """A server-sent event; JSON has no line ends that could end it."""
    return (f"event: {event}\n".encode() if event else b"") + b"data: " + data + b"\n\n"
