"""What a client of AG-UI asks for: its conversation as chat messages, and its answers to interrupts."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from ag_ui.core import (
    AssistantMessage,
    DataSource,
    ImagePart,
    Message as AnyMessage,
    ResumeEntry,
    RunAgentInput,
    TextPart,
    ToolMessage,
    UrlSource,
    UserMessage,
)
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from fractal._json import text_of
from fractal.messages import Message
from fractal.serving.bodies import shown_faults
from fractal.serving.problems import Problem

__all__ = ["DECISION", "Decided", "conversation_of", "decisions_of", "interrupt_id", "read_input"]

_ID = re.compile(r"(run_[0-9a-f]{32})\.([0-9]{1,15})\.(.+)", re.ASCII | re.DOTALL)


class Answer(BaseModel):
    """What a client has to send as the payload of an answer to an interrupt."""

    model_config = ConfigDict(extra="forbid")

    decision: Literal["allow", "deny"] = Field(description="Whether the call is made.")
    reason: str | None = Field(default=None, max_length=4000, description="Why not, as the model is told.")
    arguments: dict[str, Any] | None = Field(default=None, description="All arguments, in place of the model's.")


DECISION: dict[str, Any] = Answer.model_json_schema()
"""JSON Schema of an answer."""


@dataclass(frozen=True, kw_only=True)
class Decided:
    """An answer to an interrupt.

    Attributes:
        run_id: The run that waits for it.
        after: Number of the last event of that run that the client has seen.
        approval_id: The call that is decided on.
        answer: The decision.
    """

    run_id: str
    after: int
    approval_id: str
    answer: Answer


def interrupt_id(run_id: str, after: int, approval_id: str) -> str:
    """The id of an interrupt, by which the run goes on where the client left it."""
    return f"{run_id}.{after}.{approval_id}"


def read_input(body: bytes) -> RunAgentInput:
    """Read and check what a client has sent.

    Raises:
        Problem: It is no input, or asks for something that there is not.
    """
    try:
        given = RunAgentInput.model_validate_json(body)
    except ValidationError as error:
        faults: list[Any] = list(error.errors(include_url=False, include_context=False, include_input=False))
        said = "the request is no input of AG-UI: see errors"
        raise Problem(422, "invalid_request", said, errors=shown_faults(faults)) from None
    for name in ("tools", "state", "forwarded_props"):
        if getattr(given, name):
            said = f"{name} has no effect here: the agent has tools and a state of its own; leave it out"
            raise Problem(422, "unsupported", said)
    return given


def decisions_of(entries: Sequence[ResumeEntry]) -> list[Decided]:
    """Read the answers to interrupts.

    Raises:
        Problem: One of them is none.
    """
    return [_decided(entry) for entry in entries]


def _decided(entry: ResumeEntry) -> Decided:
    found = _ID.fullmatch(entry.interrupt_id)
    if found is None:
        raise Problem(404, "unknown_interrupt", "there is no such interrupt")
    if entry.status == "cancelled":
        answer = Answer(decision="deny", reason="nobody has decided on it")
    else:
        try:
            answer = Answer.model_validate(entry.payload)
        except ValidationError:
            raise Problem(422, "invalid_request", "the payload does not fit the interrupt's responseSchema") from None
    return Decided(run_id=found[1], after=int(found[2]), approval_id=found[3], answer=answer)


# ---- conversations


def conversation_of(given: RunAgentInput) -> tuple[Any, list[Message]]:
    """The user's turn, and the messages before it, in the form of chats.

    Raises:
        Problem: The last message is not the user's, or one has a form that models are not sent.
    """
    messages = [message for each in given.messages if (message := _message(each)) is not None]
    if not messages or messages[-1]["role"] != "user" or not messages[-1]["content"]:
        raise Problem(422, "invalid_messages", "the last message has to be the user's, and say something")
    history = list(_in_order(messages[:-1]))
    if given.context:
        facts = "\n".join(f"{each.description}: {each.value}" for each in given.context)
        history.append({"role": "system", "content": f"Context:\n{facts}"})
    return messages[-1]["content"], history


def _message(given: AnyMessage) -> Message | None:
    """A message in the form of chats; None for one that models are not sent."""
    if getattr(given, "subagent_run_id", None) is not None:  # what a delegate has said and done
        return None
    match given:
        case UserMessage(content=content):
            return {"role": "user", "content": content if isinstance(content, str) else list(_parts(content))}
        case ToolMessage(content=content, tool_call_id=call_id):
            text = (
                content if isinstance(content, str) else text_of([each.model_dump(by_alias=True) for each in content])
            )
            return {"role": "tool", "tool_call_id": call_id, "content": text}
        case AssistantMessage(content=content, tool_calls=calls):
            made = [
                {"id": call.id, "type": "function", "function": call.function.model_dump(by_alias=True)}
                for call in calls or ()
            ]
            return {"role": "assistant", "content": content, **({"tool_calls": made} if made else {})}
        case _ if given.role in ("system", "developer"):
            return {"role": given.role, "content": given.content}
        case _:
            return None


def _parts(content: Sequence[Any]) -> Iterator[dict[str, Any]]:
    for part in content:
        match part:
            case TextPart(text=text):
                yield {"type": "text", "text": text}
            case ImagePart(source=UrlSource(value=url)):
                yield {"type": "image_url", "image_url": {"url": url}}
            case ImagePart(source=DataSource(value=data, mime_type=kind)):
                yield {"type": "image_url", "image_url": {"url": f"data:{kind};base64,{data}"}}
            case _:
                raise Problem(422, "unsupported", "a message may have text and images, by URL or as data")


def _in_order(messages: Sequence[Message]) -> Iterator[Message]:
    """The messages with the results of tools behind the calls, in the order of the calls, as endpoints want them.

    A client that has watched a run has them in the order in which they came, and none of a call that was cut.
    """
    results = {message["tool_call_id"]: message for message in messages if message["role"] == "tool"}
    for message in _joined(messages):
        yield message
        for call in message.get("tool_calls", ()):
            missing: Mapping[str, Any] = {"role": "tool", "tool_call_id": call["id"], "content": "Error: no result"}
            yield dict(results.get(call["id"], missing))


def _joined(messages: Sequence[Message]) -> Iterator[Message]:
    """All but the results of tools; what an assistant says and calls right after it is one message with its text."""
    last: Message | None = None
    for message in messages:
        if message["role"] == "tool":
            continue
        is_more = message["role"] == "assistant" and not message["content"] and last is not None
        if is_more and last is not None and last["role"] == "assistant" and message.get("tool_calls"):
            last["tool_calls"] = [*last.get("tool_calls", ()), *message["tool_calls"]]
            continue
        if last is not None:
            yield last
        last = dict(message)
    if last is not None:
        yield last
