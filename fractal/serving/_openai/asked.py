"""What a client of OpenAI's asks for: the bodies of its requests, read and checked."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from fractal._json import decode, is_list, is_mapping
from fractal.agent import BaseAgent
from fractal.errors import InvalidMessages
from fractal.messages import Message, Transcript
from fractal.serving._openai.client_tools import ClientTools, read_tools, without_runs
from fractal.serving._openai.faults import wrong

__all__ = ["Asked", "chat_asked", "response_asked"]


@dataclass(frozen=True, kw_only=True)
class Asked:
    """A question for an agent.

    Attributes:
        model: Name of the agent, as the client gave it.
        agent: The agent.
        user_input: The user's turn: text, or content parts.
        messages: The conversation before it.
        turns: What has been said since, by the model and by tools of the client.
        tools: The tools of the client, which are offered beside the agent's.
        is_streamed: Whether the answer is wanted while it is written.
        wants_usage: Whether a stream ends with what was used.
        ignored: Names of parameters that have no effect: what they set is the agent's business.
    """

    model: str
    agent: BaseAgent[Any]
    user_input: str | list[Any]
    messages: list[Message]
    is_streamed: bool
    turns: Sequence[Message] = ()
    tools: ClientTools = field(default_factory=ClientTools)
    wants_usage: bool = False
    ignored: tuple[str, ...] = ()


Agents = Mapping[str, BaseAgent[Any]]

_Rule = tuple[Callable[[Any], bool], str]
"""Whether a value asks for nothing that is not there, and what the client is told otherwise."""

_TOOLS: _Rule = lambda given: not given, "the agent has tools of its own, and takes none of its callers: leave it out"
_CHOICE: _Rule = lambda given: given in (None, "none", "auto"), _TOOLS[1]
_NOTHING: _Rule = lambda given: not given, "there is no such thing here: leave it out"
_TEXT_ALONE = "the agent answers in text: leave it out"

_OF_CHATS: Mapping[str, _Rule] = {
    "tools": _TOOLS,
    "functions": _TOOLS,
    "web_search_options": (lambda given: given is None, _TOOLS[1]),
    "tool_choice": _CHOICE,
    "function_call": _CHOICE,
    "n": (lambda given: given in (None, 1), "there is one answer to each request: leave it out"),
    "logprobs": _NOTHING,
    "top_logprobs": _NOTHING,
    "response_format": (lambda given: given is None or _type_of(given) == "text", _TEXT_ALONE),
    "modalities": (lambda given: given in (None, ["text"]), _TEXT_ALONE),
    "audio": (lambda given: given is None, _TEXT_ALONE),
}
_OF_CHATS_WITH_TOOLS: Mapping[str, _Rule] = {
    **_OF_CHATS,
    "tools": (lambda given: True, ""),
    "tool_choice": (_CHOICE[0], "the model calls which tools it wants: leave it out"),
}
_OF_RESPONSES: Mapping[str, _Rule] = {
    "tools": _TOOLS,
    "tool_choice": _CHOICE,
    "top_logprobs": _NOTHING,
    "include": (lambda given: not is_list(given) or "message.output_text.logprobs" not in given, _NOTHING[1]),
    "background": _NOTHING,
    "prompt": _NOTHING,
    "previous_response_id": (lambda given: given is None, "no response is kept: send the conversation as input"),
    "conversation": (lambda given: given is None, "no conversation is kept: send it as input"),
    "text": (lambda given: not _format_of(given) or _type_of(_format_of(given)) == "text", _TEXT_ALONE),
}

_NAME = re.compile(r"[A-Za-z_][\w-]{0,63}", re.ASCII)
_MOST_NAMES = 32


def chat_asked(data: bytes, agents: Agents, *, takes_tools: bool = False) -> Asked:
    """Read the body of a request for a chat completion.

    Args:
        data: The body.
        agents: The agents.
        takes_tools: Whether tools of the client are offered, and their results taken.

    Raises:
        Fault: It cannot be answered; says why.
    """
    body = _object(data)
    model, agent = _agent_of(body, agents)
    _check(body, _OF_CHATS_WITH_TOOLS if takes_tools else _OF_CHATS)
    is_streamed, options = _flag(body, "stream"), body.get("stream_options")
    if options is not None and not is_mapping(options):
        raise wrong("stream_options is no object", "stream_options")
    user_input, messages, turns = _conversation(body.get("messages"), "messages", takes_turns=takes_tools)
    offered = body.get("tools") if takes_tools and body.get("tool_choice") != "none" else None
    return Asked(
        model=model,
        agent=agent,
        user_input=user_input,
        messages=messages,
        turns=turns,
        tools=read_tools(offered or None, agent.get_tools()),
        is_streamed=is_streamed,
        wants_usage=options is not None and _flag(options, "include_usage"),
        ignored=_ignored(body, {"model", "messages", "stream", "stream_options", *_OF_CHATS}),
    )


def response_asked(data: bytes, agents: Agents) -> Asked:
    """Read the body of a request for a response.

    Raises:
        Fault: It cannot be answered; says why.
    """
    body = _object(data)
    model, agent = _agent_of(body, agents)
    _check(body, _OF_RESPONSES)
    given, instructions = body.get("input"), body.get("instructions")
    if instructions is not None and not isinstance(instructions, str):
        raise wrong("instructions is no text", "instructions")
    user_input, messages, _ = _conversation(list(_messages_of(given)), "input")
    return Asked(
        model=model,
        agent=agent,
        user_input=user_input,
        messages=[*([{"role": "system", "content": instructions}] if instructions else []), *messages],
        is_streamed=_flag(body, "stream"),
        ignored=_ignored(body, {"model", "input", "instructions", "stream", *_OF_RESPONSES} - _partly_taken(body)),
    )


def _object(data: bytes) -> Mapping[str, Any]:
    try:
        body = decode(data)
    except ValueError:
        raise wrong("the body of the request is not JSON") from None
    if not is_mapping(body):
        raise wrong("the body of the request is no JSON object")
    return body


def _agent_of(body: Mapping[str, Any], agents: Agents) -> tuple[str, BaseAgent[Any]]:
    model = body.get("model")
    if not isinstance(model, str) or not model:
        raise wrong(f"say with model which agent is asked: {_names(agents)}", "model", "missing_required_parameter")
    if model not in agents:
        raise wrong(f"there is no model of that name, only {_names(agents)}", "model", "model_not_found", 404)
    return model, agents[model]


def _names(agents: Agents) -> str:
    shown = ", ".join(sorted(agents)[:_MOST_NAMES])
    return shown if len(agents) <= _MOST_NAMES else f"{shown}, …"


def _flag(body: Mapping[str, Any], name: str) -> bool:
    value = body.get(name)
    if value is not None and not isinstance(value, bool):
        raise wrong(f"{name} is neither true nor false", name)
    return bool(value)


def _check(body: Mapping[str, Any], rules: Mapping[str, _Rule]) -> None:
    for name, (is_nothing, why) in rules.items():
        if name in body and not is_nothing(body[name]):
            raise wrong(f"{name} is not supported: {why}", name, "unsupported_parameter")


def _ignored(body: Mapping[str, Any], known: set[str]) -> tuple[str, ...]:
    names = [name for name, value in body.items() if name not in known and value is not None]
    return tuple(name for name in names if _NAME.fullmatch(name))[:_MOST_NAMES]


def _partly_taken(body: Mapping[str, Any]) -> set[str]:
    """Parameters of a response that are checked, and have parts without effect: a `verbosity` of the text, say."""
    text = body.get("text")
    return {"include", "text"} if is_mapping(text) and text.keys() - {"format"} else {"include"}


def _type_of(value: object) -> object:
    return value.get("type") if is_mapping(value) else None


def _format_of(value: object) -> object:
    return value.get("format") if is_mapping(value) else value


# ---- conversations


def _conversation(
    given: object, param: str, *, takes_turns: bool = False
) -> tuple[str | list[Any], list[Message], list[Message]]:
    """The user's last turn, the messages before it and those after it.

    Args:
        given: The messages.
        param: What the client calls them.
        takes_turns: Whether they may go on with calls of the client's tools, the last of which have been answered.
    """
    if not is_list(given) or not given:
        raise wrong(f"{param} is no list of messages", param, "missing_required_parameter")
    for index, each in enumerate(given):
        if not is_mapping(each):
            raise wrong(f"{param}[{index}] is no message", f"{param}[{index}]")
    try:
        Transcript(given)
    except InvalidMessages as error:
        raise wrong(f"{param}[{error.index}]: {error.fault}", f"{param}[{error.index}]") from None
    at = len(given) - 1
    if takes_turns and given[at].get("role") == "tool":
        at = max((index for index, each in enumerate(given) if each.get("role") == "user"), default=at)
    content = given[at].get("content")
    if given[at].get("role") != "user" or not content:
        raise wrong(f"the last of {param} has to be the user's turn, and say something", f"{param}[{len(given) - 1}]")
    return content, without_runs(given[:at]), [dict(each) for each in given[at + 1 :]]


def _messages_of(given: object) -> Iterator[Message]:
    """The input of a response as chat messages."""
    if isinstance(given, str):
        yield {"role": "user", "content": given}
        return
    if not is_list(given):
        raise wrong("input is neither text nor a list of messages", "input", "missing_required_parameter")
    for index, item in enumerate(given):
        where = f"input[{index}]"
        if not is_mapping(item) or item.get("type", "message") != "message":
            raise wrong(f"{where} is no message: the agent calls its tools itself", where, "unsupported_parameter")
        content = item.get("content")
        if is_list(content):
            content = [_part(part, f"{where}.content[{number}]") for number, part in enumerate(content)]
            if item.get("role") != "user":  # others speak text alone
                content = "".join(str(part.get("text", "")) for part in content)
        yield {"role": item.get("role"), "content": content}


def _part(part: object, where: str) -> dict[str, Any]:
    """A part of a message's content, as chats have it."""
    kind = _type_of(part)
    if is_mapping(part) and kind in ("input_text", "output_text") and isinstance(part.get("text"), str):
        return {"type": "text", "text": part["text"]}
    if is_mapping(part) and kind == "refusal" and isinstance(part.get("refusal"), str):
        return {"type": "text", "text": part["refusal"]}
    if is_mapping(part) and kind == "input_image" and isinstance(part.get("image_url"), str):
        detail = part.get("detail")
        return {"type": "image_url", "image_url": {"url": part["image_url"], **({"detail": detail} if detail else {})}}
    raise wrong(f"{where} is neither text nor an image with a URL", where, "unsupported_parameter")
