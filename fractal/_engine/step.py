"""What a reply asks for. Pure: no I/O, no clock, the same answer every time."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from fractal._functions.schema import ArgumentsFault
from fractal._json import decode

if TYPE_CHECKING:
    from fractal.model import Reply, ToolCall
    from fractal.toolkit import Tool

__all__ = ["AskAgain", "BoundCall", "CallTools", "Decline", "Finish", "Step", "bind", "bound_calls", "next_step"]


@dataclass(frozen=True, slots=True, kw_only=True)
class BoundCall:
    """A tool call matched with the available tools.

    Attributes:
        call_id: Its id.
        name: The tool's name, as the model wrote it.
        tool: The tool, or None if there is none or the arguments do not fit.
        arguments: The arguments as the function's own types; what the model sent, if they do not fit.
        fault: What the model is told is wrong with the call, or None.
        sent: The arguments as they were sent: JSON text, or values by name.
    """

    call_id: str
    name: str
    tool: Tool | None
    arguments: Any
    fault: str | None = None
    sent: Any = field(default=None, repr=False, compare=False)


@dataclass(frozen=True, slots=True)
class CallTools:
    """The step of a reply that calls tools, after which the model is asked again."""

    calls: tuple[BoundCall, ...]


@dataclass(frozen=True, slots=True)
class Finish:
    """The step of a reply that is the answer."""

    content: str


@dataclass(frozen=True, slots=True)
class Decline:
    """The step of a reply in which the model refuses to answer."""

    reason: str


@dataclass(frozen=True, slots=True)
class AskAgain:
    """The step of an empty reply."""


Step = CallTools | Finish | Decline | AskAgain


def next_step(reply: Reply, tools: Mapping[str, Tool]) -> Step:
    """Decide what a reply asks for.

    Args:
        reply: The model's reply.
        tools: The tools there are, by name.
    """
    if reply.is_filtered:
        return Decline("the endpoint's content filter withheld the answer, or a part of it")
    if reply.tool_calls:
        return CallTools(tuple(bound_calls(reply.tool_calls, tools, is_cut=reply.is_cut)))
    if reply.refusal is not None:
        return Decline(reply.refusal)
    if reply.text is not None and not reply.text.isspace():
        return Finish(reply.text)
    return AskAgain()


def bind(call_id: str, name: str, arguments: str | Mapping[str, Any], tools: Mapping[str, Tool]) -> BoundCall:
    """Match one call with the available tools."""
    tool = tools.get(name) or _meant(name, tools)
    if tool is None:
        there_are = ", ".join(tools) or "none"
        return _vain(call_id, name, arguments, f"there is no tool {name!r}. Tools: {there_are}")
    name = tool.name
    try:
        checked = tool.parameters.check(arguments)
    except ArgumentsFault as error:
        return _vain(call_id, name, arguments, f"the call of {name!r} does not fit: {error}")
    return BoundCall(call_id=call_id, name=name, tool=tool, arguments=checked, sent=arguments)


def _vain(call_id: str, name: str, arguments: str | Mapping[str, Any], fault: str) -> BoundCall:
    """A call that no tool can answer."""
    shown = _shown(arguments)
    return BoundCall(call_id=call_id, name=name, tool=None, arguments=shown, fault=fault, sent=arguments)


def _meant(name: str, tools: Mapping[str, Tool]) -> Tool | None:
    """The tool that a name with template text around it, or in other capitals, means; None if unsure."""
    parts = re.split(r"[^\w-]+", name[:200])
    found = {part for part in parts if part in tools}
    if not found:
        lower = {part.lower() for part in parts}
        found = {known for known in tools if known.lower() in lower}
    return tools[found.pop()] if len(found) == 1 else None


def bound_calls(calls: Iterable[ToolCall], tools: Mapping[str, Tool], *, is_cut: bool) -> list[BoundCall]:
    """Match the calls of a reply, which may have been cut at the token limit, with the available tools."""
    bound = [bind(call.id, call.name, call.arguments, tools) for call in calls]
    return list(map(_with_cut_noted, bound)) if is_cut else bound


def _with_cut_noted(call: BoundCall) -> BoundCall:
    """A call of a reply that was cut at the token limit; its fault says so to the model."""
    if call.fault is None:
        return call
    return replace(call, fault=f"{call.fault}. The reply was cut at the token limit: make fewer calls, or write less")


def _shown(arguments: str | Mapping[str, Any]) -> Any:
    if not isinstance(arguments, str):
        return dict(arguments)
    try:
        return decode(arguments)
    except ValueError:
        return arguments
