"""Tools of a client: offered to the model beside the agent's own, called by the client, and gone on with afterwards.

A call of one ends the run, as a terminating tool does, when the agent's own calls of the same reply have ended. The ids
that the client is shown name the run, so that the next one has what the agent's own tools have told before.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from fractal._functions.schema import ArgumentsFault, Parameters
from fractal._json import decode, is_list, is_mapping
from fractal.errors import FractalError
from fractal.model import ToolSchemas
from fractal.serving._openai.faults import wrong
from fractal.serving.problems import Problem
from fractal.serving.record import RunRecord
from fractal.toolkit import Tool, ToolOptions

if TYPE_CHECKING:
    from fractal.messages import Message
    from fractal.results import AgentResult
    from fractal.serving.registry import ServedRuns

__all__ = ["ClientTools", "read_tools", "text_beside_calls", "turns_from", "without_runs"]

MOST_TOOLS = 128
"""Tools of a client in one request; as OpenAI's own."""

_ASKED = "the client is asked to make this call"
"""The result of a call that is left to the client, until it has given its own."""

_ID = re.compile(r"(run_[0-9a-f]{32})-(.*)", re.ASCII | re.DOTALL)


class ClientTools:
    """The tools of a client, as far as a run needs them.

    Args:
        schemas: What the model is told of each.

    Raises:
        InvalidTool: No endpoint takes such a name.
    """

    def __init__(self, schemas: Sequence[dict[str, Any]] = ()) -> None:
        self._schemas = ToolSchemas(schemas)
        self.tools: Mapping[str, Tool] = {schema["function"]["name"]: _tool(schema["function"]) for schema in schemas}

    def schemas(self) -> ToolSchemas:
        """The schemas that the model sees."""
        return self._schemas

    def calls_in(self, result: AgentResult, run_id: str) -> list[dict[str, Any]]:
        """The calls that the client shall make; none if the run has ended in another way.

        Args:
            result: How the run has ended.
            run_id: Its id.
        """
        asked = _last_calls(result.messages) if self.tools and result.success else []
        ended = result.tool_results[len(result.tool_results) - len(asked) :]
        names = {each.call_id: each.tool_name for each in ended if each.outcome == "ok"}
        return [
            {
                "id": f"{run_id}-{call['id']}",
                "type": "function",
                "function": {"name": names[call["id"]], "arguments": call["function"]["arguments"]},
            }
            for call in asked
            if names.get(call["id"]) in self.tools
        ]


class _Parameters(Parameters):
    """The parameters of a client's tool, which are the client's business, if they are an object."""

    __slots__ = ()

    def __init__(self, json_schema: dict[str, Any]) -> None:
        self.json_schema, self.context_names = json_schema, set[str]()
        self.shown_names = dict[str, str]()

    def check(self, arguments: str | Mapping[str, Any]) -> dict[str, Any]:
        """The arguments as they are."""
        try:
            given = decode(arguments or "{}") if isinstance(arguments, str) else arguments
        except ValueError:
            given = None
        if not is_mapping(given):
            raise ArgumentsFault("the arguments are no JSON object")
        return dict(given)

    def bind(self, arguments: Mapping[str, Any], context: object) -> tuple[list[Any], dict[str, Any]]:
        """The arguments as one, whatever their names are."""
        return [arguments], {}


async def _is_the_clients(arguments: Mapping[str, Any]) -> str:
    return _ASKED


def _tool(function: Mapping[str, Any]) -> Tool:
    parameters, description = _Parameters(function.get("parameters") or {}), function.get("description") or ""
    return Tool(function["name"], description, _is_the_clients, parameters, True, ToolOptions(terminate=True))


def read_tools(given: object, known: Iterable[str]) -> ClientTools:
    """Read the tools of a request.

    Args:
        given: What it has as `tools`.
        known: Names of the agent's own tools.

    Raises:
        Fault: They cannot be offered; says why.
    """
    if given is None:
        return ClientTools()
    if not is_list(given) or len(given) > MOST_TOOLS:
        raise wrong(f"tools is no list of up to {MOST_TOOLS} functions", "tools")
    schemas = [_schema(each, f"tools[{index}]") for index, each in enumerate(given)]
    names = [schema["function"]["name"] for schema in schemas]
    for index, name in enumerate(names):
        if name in names[:index]:
            raise wrong(f"there are two tools named {name}", f"tools[{index}]")
        if name in known:
            raise wrong(f"the agent has a tool named {name} of its own: give yours another name", f"tools[{index}]")
    try:
        return ClientTools(schemas)
    except FractalError as error:
        raise wrong(f"a tool cannot be offered: {error}", "tools") from None


def _schema(given: object, where: str) -> dict[str, Any]:
    function = given.get("function") if is_mapping(given) and given.get("type") == "function" else None
    if not is_mapping(function) or not isinstance(function.get("name"), str):
        raise wrong(f"{where} is no function with a name", where, "unsupported_parameter")
    kinds: dict[str, tuple[type, str]] = {
        "description": (str, "text"),
        "parameters": (dict, "JSON Schema"),
        "strict": (bool, "true or false"),
    }
    shown: dict[str, Any] = {"name": function["name"], "parameters": {"type": "object", "properties": {}}}
    for name, (kind, what) in kinds.items():
        value = function.get(name)
        if value is None:
            continue
        if not isinstance(value, kind):
            raise wrong(f"{where}.function.{name} is no {what}", f"{where}.function.{name}")
        shown[name] = value
    return {"type": "function", "function": shown}


def text_beside_calls(result: AgentResult) -> str | None:
    """What the model has written beside the last calls of a run."""
    texts: Iterator[str | None] = (each["content"] for each in reversed(result.messages) if each["role"] == "assistant")
    return next(texts, None)


# ---- the next request


def without_runs(messages: Iterable[Message]) -> list[Message]:
    """Messages of a client with the ids of calls as the model gave them."""
    return [_without_run(message) for message in messages]


def _without_run(message: Message) -> Message:
    if message.get("role") == "tool":
        return {**message, "tool_call_id": _parts(message.get("tool_call_id"))[1]}
    if is_list(calls := message.get("tool_calls")):
        own = [{**each, "id": _parts(each.get("id"))[1]} if is_mapping(each) else each for each in calls]
        return {**message, "tool_calls": own}
    return message


def _parts(call_id: Any) -> tuple[str | None, Any]:
    """The run that an id names, and the id without it."""
    matched = _ID.fullmatch(call_id) if isinstance(call_id, str) else None
    return (matched[1], matched[2]) if matched is not None else (None, call_id)


async def turns_from(
    runs: ServedRuns, owner: str | None, before: Sequence[Message], turns: Sequence[Message]
) -> list[Message]:
    """The turns since the user's last one, with those that the client was not shown, if the run that had them is kept.

    Args:
        runs: Where it would be kept.
        owner: Whose it has to be.
        before: The conversation up to the user's last turn, with that.
        turns: What the client has after that, which is taken as it is if it is not that of the run.
    """
    shown = without_runs(turns)
    run_id, _ = _parts(next((call["id"] for call in _last_calls(turns)), None))
    if run_id is None:
        return shown
    try:
        found = await runs.find(run_id, owner)
    except Problem:
        return shown
    kept = _messages_of(found if isinstance(found, RunRecord) else found.record())
    said, asked = _last_results(shown), _last_results(kept)
    if kept[: len(before)] != [*before] or said.keys() != {i for i, each in asked.items() if each["content"] == _ASKED}:
        return shown
    last = len(kept) - len(asked)
    return [*kept[len(before) : last], *(said.get(call_id, result) for call_id, result in asked.items())]


def _messages_of(record: RunRecord) -> list[Message]:
    result = decode(record.result_json) if record.result_json is not None else None
    return result["messages"] if is_mapping(result) else []


def _last_results(messages: Sequence[Message]) -> dict[str, Message]:
    """The results at the end of a conversation, by the ids of their calls."""
    found: list[Message] = []
    for message in reversed(messages):
        if message.get("role") != "tool":
            break
        found.append(message)
    return {message["tool_call_id"]: message for message in reversed(found)}


def _last_calls(messages: Sequence[Message]) -> list[Mapping[str, Any]]:
    """The calls of the last message that has some, if nothing but their results comes after it."""
    for message in reversed(messages):
        if message.get("role") != "tool":
            return list(message.get("tool_calls") or [])
    return []
