"""Names of OpenTelemetry's semantic conventions for generative AI, v0.1.0, and what has none there.

They are constants of our own: the package that has them marks all of them as moved, and to depend on it would tie the
names to its version.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from fractal._json import is_list, is_mapping
from fractal._texts import clean_text

__all__ = ["error_of_call", "error_of_run", "of_parameters", "of_server", "usage_of_reply"]

OPERATION = "gen_ai.operation.name"
PROVIDER = "gen_ai.provider.name"
AGENT_NAME = "gen_ai.agent.name"
REQUEST_MODEL = "gen_ai.request.model"
SERVER_ADDRESS = "server.address"
SERVER_PORT = "server.port"
REQUEST_STREAM = "gen_ai.request.stream"
RESPONSE_MODEL = "gen_ai.response.model"
RESPONSE_ID = "gen_ai.response.id"
FINISH_REASONS = "gen_ai.response.finish_reasons"
FIRST_CHUNK = "gen_ai.response.time_to_first_chunk"
INPUT_TOKENS = "gen_ai.usage.input_tokens"
OUTPUT_TOKENS = "gen_ai.usage.output_tokens"
CACHE_READ_TOKENS = "gen_ai.usage.cache_read.input_tokens"
CACHE_WRITE_TOKENS = "gen_ai.usage.cache_write.input_tokens"
REASONING_TOKENS = "gen_ai.usage.reasoning.output_tokens"
TOOL_NAME = "gen_ai.tool.name"
TOOL_TYPE = "gen_ai.tool.type"
TOOL_CALL_ID = "gen_ai.tool.call.id"
TOOL_ARGUMENTS = "gen_ai.tool.call.arguments"
TOOL_RESULT = "gen_ai.tool.call.result"
INPUT_MESSAGES = "gen_ai.input.messages"
OUTPUT_MESSAGES = "gen_ai.output.messages"
INSTRUCTIONS = "gen_ai.system_instructions"
ERROR_TYPE = "error.type"

# What the conventions have no name for.
RUN_ID = "fractal.run_id"
STOP_REASON = "fractal.stop_reason"
OUTCOME = "fractal.outcome"
ATTEMPTS = "fractal.attempts"
COST = "fractal.cost"
GROUP = "fractal.parallel_group_id"
UNFINISHED = "fractal.unfinished"
NO_BEGINNING = "fractal.no_beginning"

AGENT, CHAT, TOOL = "invoke_agent", "chat", "execute_tool"
"""The operations; their spans are called by them and by what they are about."""

ANY_PROVIDER = "openai"
"""What `gen_ai.provider.name` is where nobody says it: of all endpoints that speak OpenAI's language."""

TIMEOUT, CANCELLED, OTHER = "timeout", "cancelled", "_OTHER"
"""Values of `error.type`; others are names of classes, outcomes, or types of errors."""

OLDER_PROVIDER = "gen_ai.system"
OLDER = {CACHE_WRITE_TOKENS: "gen_ai.usage.cache_creation.input_tokens"}
"""Names until v1.41, where they are others."""

_TOKENS = {
    "input_tokens": INPUT_TOKENS,
    "output_tokens": OUTPUT_TOKENS,
    "cached_input_tokens": CACHE_READ_TOKENS,
    "cache_write_input_tokens": CACHE_WRITE_TOKENS,
    "reasoning_tokens": REASONING_TOKENS,
}

TOKENS = tuple(_TOKENS)
"""What counts of tokens are called here."""


_PARAMETERS = {
    "temperature": "gen_ai.request.temperature",
    "max_tokens": "gen_ai.request.max_tokens",
    "max_completion_tokens": "gen_ai.request.max_tokens",
    "top_p": "gen_ai.request.top_p",
    "top_k": "gen_ai.request.top_k",
    "frequency_penalty": "gen_ai.request.frequency_penalty",
    "presence_penalty": "gen_ai.request.presence_penalty",
    "seed": "gen_ai.request.seed",
    "n": "gen_ai.request.choice.count",
}
_STOP = "gen_ai.request.stop_sequences"
_REASONING = "gen_ai.request.reasoning.level"


def of_parameters(parameters: object) -> dict[str, Any]:
    """Attributes for the parameters of a request that the conventions have names for, and whose values fit."""
    if not is_mapping(parameters) or not parameters:
        return {}
    given = ((name, parameters.get(ours)) for ours, name in _PARAMETERS.items())
    found: dict[str, Any] = {name: value for name, value in given if type(value) in (int, float)}
    if found.get(_PARAMETERS["n"]) == 1:  # that is what is meant where nothing is said
        del found[_PARAMETERS["n"]]
    stop, level = parameters.get("stop"), parameters.get("reasoning_effort")
    stops = [clean_text(each)[:_LONGEST] for each in (stop if is_list(stop) else [stop]) if isinstance(each, str)]
    if stops:
        found[_STOP] = stops[:_MOST_STOPS]
    if isinstance(level, str):
        found[_REASONING] = clean_text(level)[:_LONGEST]
    return found


_LONGEST, _MOST_STOPS = 100, 20
"""Characters of a text among the parameters, and texts of a list of them."""


def of_server(server: object) -> dict[str, Any]:
    """Attributes for host and port of an endpoint."""
    match server:
        case (str() as host, int() as port):
            return {SERVER_ADDRESS: clean_text(host)[:_LONGEST], SERVER_PORT: port}
        case _:
            return {}


def usage_of_reply(counts: Mapping[str, Any]) -> dict[str, int]:
    """Attributes for the tokens of a reply that are known."""
    return {name: counts[ours] for ours, name in _TOKENS.items() if type(counts.get(ours)) is int and counts[ours] > 0}


def error_of_run(success: bool, stop_reason: str | None, error_type: str | None, kind: str | None) -> str | None:
    """The `error.type` of a run; None if it went well.

    Args:
        success: Whether it gave an answer.
        stop_reason: Why it ended.
        error_type: The type of its error, as in the metadata of its result.
        kind: Name of the class of its error, if that is known.
    """
    if success:
        return None
    if stop_reason == "cancelled":
        return CANCELLED
    if stop_reason == "deadline" or error_type == "timeout":
        return TIMEOUT
    return kind or error_type or stop_reason or OTHER


def error_of_call(outcome: str, kind: str | None = None) -> str | None:
    """The `error.type` of a tool call; None if it went well.

    Args:
        outcome: How it ended.
        kind: Name of the class of its error, if that is known.
    """
    if outcome == "ok":
        return None
    return (kind or OTHER) if outcome == "error" else outcome
